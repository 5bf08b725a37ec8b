"""What a look inside a bridge comes down to: small frames with intervals over units. No model, no torch.

    shares = attention_by_class("runs/x/attention.npz", load_eval(find_eval("runs/x")))
    gates = gates_from_metrics("runs/x/metrics.jsonl")
    table = cka_table({"source": x, "soft tokens": y}, units)

`bridgekit.diagnostics` measures, this summarises, `figures_diagnostics` draws, `readings_inside` puts it into words.
Shapes: N questions, K soft tokens, S source tokens, D any width.
"""

from __future__ import annotations

import math
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bridgekit.results.statistics import Interval
from bridgekit.runs import load_jsonl

if typing.TYPE_CHECKING:
    import pandas as pd

CLASS_LABELS = {1: "unit word", 2: "digits", 0: "rest"}  # as `attention.classify_tokens` numbers them
N_FOLDS = 10  # of units, left out in turn for the interval of a CKA
LEVEL = 0.95


def clustered_mean(values: Sequence, clusters: Sequence | None = None) -> Interval:
    """Mean of a number per question, with Student's interval on the clusters' own sums.

    The mean is a ratio (sum over clusters of sums to that of sizes); its linearised variance is that of survey
    practice. One cluster tells nothing: its interval is infinite.
    """
    import pandas as pd
    from scipy.special import stdtrit

    values = np.asarray(values, dtype=float)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError("clustered_mean: needs at least one value, and none that is NaN or infinite")
    codes = np.arange(len(values)) if clusters is None else pd.factorize(np.asarray(clusters))[0]
    mean, n = float(values.mean()), int(codes.max()) + 1
    if n == 1:
        return Interval(mean, -math.inf, math.inf, len(values), 1)
    residuals = np.bincount(codes, weights=values - mean)
    error = math.sqrt(n / (n - 1) * (residuals**2).sum()) / len(values)
    half = -stdtrit(n - 1, (1 - LEVEL) / 2) * error
    return Interval(mean, mean - half, mean + half, len(values), n)


def summarise(frame: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Mean of `value` in each cell of `by`, with low, high, n and n_units."""
    import pandas as pd

    rows = []
    for key, some in frame.groupby(list(by), sort=False, observed=True):
        mean = clustered_mean(some[value], some["unit"])
        rows.append(dict(zip(by, key, strict=True)) | {value: mean.point, "low": mean.low, "high": mean.high,
                                                       "n": mean.n, "n_units": mean.n_clusters})  # fmt: skip
    return pd.DataFrame(rows)


# ---- attention ----------------------------------------------------------------------------------------------------


def load_attention(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of an attention.npz: ids, mean, token_class and a few whole maps with their tokens."""
    with np.load(path, allow_pickle=False) as loaded:
        return {k: loaded[k] for k in loaded.files}


def attention_by_class(arrays: dict[str, np.ndarray], frame: pd.DataFrame) -> pd.DataFrame:
    """Share of the attention on each class of source token, beside the share of the tokens that are of it."""
    import pandas as pd

    unit_of = dict(zip(frame["id"], frame["unit"], strict=True))
    known = [i for i, name in enumerate(arrays["ids"]) if str(name) in unit_of]
    if not known:
        raise ValueError("attention.npz: none of its examples is in the evaluation file: they are of different runs")
    mean, classes = arrays["mean"][known].astype(float), arrays["token_class"][known]
    units = [unit_of[str(arrays["ids"][i])] for i in known]
    rows = []
    for number, label in CLASS_LABELS.items():
        of_class, real = classes == number, classes >= 0
        share = clustered_mean((mean * of_class).sum(1) / mean.sum(1), units)
        rows.append({"token_class": label, "share": share.point, "low": share.low, "high": share.high,
                     "uniform": float((of_class.sum(1) / real.sum(1)).mean()), "n": share.n,
                     "n_units": share.n_clusters})  # fmt: skip
    return pd.DataFrame(rows)


def map_ids(arrays: dict[str, np.ndarray], frame: pd.DataFrame, n: int) -> dict[str, str]:
    """`n` examples whose whole map was kept, as {id: title}; those only the source knew come first."""
    kept = {k.split("/", 1)[1] for k in arrays if k.startswith("map/")}
    rows = [row for row in frame.to_dict("records") if row["id"] in kept]
    rows.sort(key=lambda row: (row["group"] != "source_only", row["id"]))
    return {row["id"]: f"{row['unit']} = {row['value']:.0f}, {row['group']}" if row["unit"] else row["id"]
            for row in rows[:n]}  # fmt: skip


def map_frame(arrays: dict[str, np.ndarray], example_id: str) -> pd.DataFrame:
    """One example's map as rows: soft_token, place, token, weight."""
    import pandas as pd

    weights, tokens = arrays[f"map/{example_id}"], arrays[f"tokens/{example_id}"]
    k, s = weights.shape
    return pd.DataFrame({
        "id": example_id, "soft_token": np.repeat(np.arange(k), s), "place": np.tile(np.arange(s), k),
        "token": np.tile(tokens, k), "weight": weights.astype(float).ravel(),
    })  # fmt: skip


# ---- gates --------------------------------------------------------------------------------------------------------


def gates_from_metrics(path: str | Path) -> pd.DataFrame:
    """Columns step, gate, value from the rows of a metrics.jsonl that have `gates`; empty where none has."""
    import pandas as pd

    rows = [(row["step"], gate, value) for row in load_jsonl(path) for gate, value in row.get("gates", {}).items()]
    return pd.DataFrame(rows, columns=["step", "gate", "value"])


# ---- soft tokens --------------------------------------------------------------------------------------------------


def varying_share(tokens: np.ndarray, n_boot: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of each soft token differs between questions: 1 - |mean|^2 / mean |token|^2, with its interval.

    tokens (N, K, D), one question per unit -> (K,), (K,), (K,). 0: the same for every question; 1: nothing shared.
    """
    n, k, _ = tokens.shape
    flat, sizes = tokens.reshape(n, -1), (tokens**2).sum(2)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot) / n

    def share(weights: np.ndarray) -> np.ndarray:
        means = (weights @ flat).reshape(len(weights), k, -1)
        # a draw repeats questions, which makes its mean longer than it would be: n/(n-1) takes that out
        return (1 - (means**2).sum(2) / (weights @ sizes)) * n / (n - 1)

    point = share(np.full((1, n), 1 / n))[0]
    tail = (1 - LEVEL) / 2
    spread = share(draws) * n / (n - 1)
    low, high = np.quantile(spread, [tail, 1 - tail], axis=0)
    return point, np.minimum(low, point), np.maximum(high, point)


# ---- CKA ----------------------------------------------------------------------------------------------------------


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Similarity of two representations of the same questions, (N, D1) and (N, D2): 1 alike, about 0 unrelated.

    Linear CKA (Kornblith 2019) on the unbiased HSIC (Song 2012): the plain one is far above 0 for unrelated
    representations as soon as they are wider than there are questions. May come out slightly negative.
    """
    return _cka_of(_centred_gram(x), _centred_gram(y))


def _centred_gram(x: np.ndarray) -> np.ndarray:
    """U-centred inner products of the questions: zero diagonal, rows that sum to zero. (N, D) -> (N, N)"""
    if x.ndim != 2 or len(x) < 4:
        raise ValueError(f"CKA: needs (questions, width) with at least 4 questions, got {x.shape}")
    x = x - x.mean(0)
    gram, n = x @ x.T, len(x)
    np.fill_diagonal(gram, 0.0)
    means = gram.sum(0) / (n - 2)
    means = means - means.sum() / (2 * (n - 1))
    gram = gram - means[:, None] - means[None, :]
    np.fill_diagonal(gram, 0.0)
    return gram


def _cka_of(gram_x: np.ndarray, gram_y: np.ndarray) -> float:
    size = math.sqrt((gram_x**2).sum() * (gram_y**2).sum())
    return float((gram_x * gram_y).sum() / size) if size > 0 else 0.0


def cka_table(representations: dict[str, np.ndarray], units: Sequence) -> pd.DataFrame:
    """CKA of every pair (columns a, b, cka, low, high, n, n_units); interval by leaving out folds of units."""
    import pandas as pd
    from scipy.special import stdtrit

    codes = pd.factorize(np.asarray(units))[0]
    n_units = int(codes.max()) + 1
    folds = min(N_FOLDS, n_units // 2)
    if folds < 2:
        raise ValueError(f"CKA: {n_units} units are too few for an interval: take more examples")
    keeps = [np.ones(len(codes), bool)] + [codes % folds != i for i in range(folds)]
    grams = {name: [_centred_gram(np.asarray(x, float)[keep]) for keep in keeps] for name, x in representations.items()}
    rows = []
    for i, a in enumerate(grams):
        for b in list(grams)[i + 1 :]:
            point, *left_out = (_cka_of(x, y) for x, y in zip(grams[a], grams[b], strict=True))
            spread = np.array(left_out) - np.mean(left_out)
            half = -stdtrit(folds - 1, (1 - LEVEL) / 2) * math.sqrt((folds - 1) / folds * (spread**2).sum())
            rows.append(dict(a=a, b=b, cka=point, low=point - half, high=point + half, n=len(codes), n_units=n_units))
    return pd.DataFrame(rows)
