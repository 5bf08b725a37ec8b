"""Look inside a bridge: what it attends to, what its message is near, how sure the target is, what is alike, the fact.

    experiment = Experiment.load("preserved_data/headline_resampler_seed1")
    words = nearest_words(experiment, "bridged", experiment.pick("source_only", 3))
    classes = attention_by_class(attend(experiment, examples), examples)

`bridge` is a name of `experiment.bridges` or a bridge, trained or not. Tables have `point low high n n_units`.
The figures are in `plots`, the linear probe in `probe`, the intervention in `causal`.
Shapes: N examples, K soft tokens, S source tokens, D hidden size, A answer tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit
from torch.nn.functional import normalize

from bridgekit.inside import probe
from bridgekit.model.bridge import Bridge
from bridgekit.model.generation import answer_logits, bridged_logits, evaluating
from bridgekit.results.table import share
from bridgekit.results.tables import escape
from bridgekit.runs import load_jsonl
from bridgekit.tasks import Example, source_prompt
from bridgekit.train.conditions import keep_attention, save_attention
from bridgekit.train.experiment import Experiment, chunks, encode_chunk

TOKEN_CLASSES = {1: "unit word", 2: "digits", 0: "rest"}  # as attention.npz numbers them
N_FOLDS = 10  # of units, left out in turn for the interval of a CKA
LEVEL = 0.95


@torch.no_grad()
def attend(experiment: Experiment, examples: list[Example], bridge: str | Bridge = "bridged") -> dict[str, np.ndarray]:
    """Mean attention per source token and its class for all examples, whole maps (K, S) for the first few.

    Empty where the bridge has no attention over source tokens, as a constant has not.
    """
    name, bridge = experiment.find_bridge(bridge)
    states, seeds, store = experiment.source_states(examples, name), experiment.seeds(examples), {}
    with evaluating(bridge):
        for chunk in chunks(len(examples)):
            message = encode_chunk(bridge, states, chunk, seeds, experiment.device, want_attention=True)
            keep_attention(store, message, chunk, [examples[i] for i in chunk], states)
    return store


def load_attention(experiment: Experiment, examples: list[Example], folder: str | Path) -> tuple[dict, Path]:
    """The run's attention and the file it is in; made from the checkpoint, into `folder`, where the run has none."""
    path = (experiment.run or Path(folder)) / "attention.npz"
    if not path.is_file():
        store, path = attend(experiment, examples), Path(folder) / "attention.npz"
        if not store:
            return {}, path
        path.parent.mkdir(parents=True, exist_ok=True)
        save_attention(store, path)
    with np.load(path, allow_pickle=False) as loaded:
        return {key: loaded[key] for key in loaded.files}, path


def attention_by_class(arrays: dict[str, np.ndarray], frame: pd.DataFrame) -> pd.DataFrame:
    """Share of the attention on each class of source token, and the share an even spread would give it (`uniform`).

    `frame` has the examples' id and unit."""
    unit_of = dict(zip(frame["id"], frame["unit"], strict=True))
    known = [i for i, name in enumerate(arrays["ids"]) if str(name) in unit_of]
    if not known:
        raise ValueError("attention.npz: none of its examples is in the evaluation file: they are of different runs")
    mean, classes = arrays["mean"][known].astype(float), arrays["token_class"][known]
    units, parts = [unit_of[str(arrays["ids"][i])] for i in known], []
    for number, label in TOKEN_CLASSES.items():
        of_class, real = classes == number, classes >= 0
        part = {"value": (mean * of_class).sum(1) / mean.sum(1), "uniform": of_class.sum(1) / real.sum(1)}
        parts.append(pd.DataFrame({"unit": units, "token_class": label} | part))
    long = pd.concat(parts, ignore_index=True)
    even = long.groupby("token_class", sort=False)["uniform"].mean()
    return share(long, "token_class", "value").assign(uniform=even.to_numpy())


def map_ids(arrays: dict[str, np.ndarray], frame: pd.DataFrame, n: int) -> dict[str, str]:
    """`n` examples whose whole map was kept, as {id: title}; those only the source knew come first."""
    kept = frame[frame["id"].isin({key.split("/", 1)[1] for key in arrays if key.startswith("map/")})]
    rows = sorted(kept.to_dict("records"), key=lambda row: (row["group"] != "source_only", row["id"]))
    return {row["id"]: f"A {row['unit']} is {row['value']:.0f}" if row["unit"] else row["id"] for row in rows[:n]}


def map_frame(arrays: dict[str, np.ndarray], example_id: str) -> pd.DataFrame:
    """One example's map as rows: soft_token, place, token, weight."""
    weights = pd.DataFrame(arrays[f"map/{example_id}"].astype(float)).rename_axis("soft_token")
    long = (
        weights.reset_index()
        .melt("soft_token", var_name="place", value_name="weight")
        .sort_values("soft_token", kind="stable")
    )
    return long.assign(id=example_id, token=arrays[f"tokens/{example_id}"][long["place"].astype(int)])


def gates_from_metrics(path: str | Path) -> pd.DataFrame:
    """Columns step, gate, value from the rows of a metrics.jsonl that have `gates`; empty where none has."""
    rows = [(row["step"], gate, value) for row in load_jsonl(path) for gate, value in row.get("gates", {}).items()]
    return pd.DataFrame(rows, columns=["step", "gate", "value"])


@torch.no_grad()
def nearest_words(experiment: Experiment, bridge: str | Bridge, examples: list[Example], top: int = 3) -> pd.DataFrame:
    """The vocabulary tokens with the largest cosine to each soft token: a row per example, soft token and rank.

    `chance` is the largest cosine that a random direction finds in the same table, on average.
    """
    target = experiment.pair.target
    table = normalize(target.model.get_input_embeddings().weight.float(), dim=-1)  # (V, D)
    noise = torch.randn(512, table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device)
    chance, rows = (normalize(noise, dim=-1) @ table.T).amax(1).mean().item(), []
    for e, vectors, real in zip(examples, *experiment.encode(examples, bridge), strict=True):
        cosines, ids = (normalize(vectors[real], dim=-1) @ table.T).topk(top, dim=-1)
        for i, (found, best) in enumerate(zip(cosines.tolist(), ids.tolist(), strict=True)):
            for rank, (cosine, token) in enumerate(zip(found, best, strict=True), start=1):
                place = {"id": e.id, "unit": e.unit, "value": e.value, "soft_token": i + 1, "rank": rank}
                rows.append(place | {"token": target.tokenizer.decode([token]), "cosine": cosine, "chance": chance})
    return pd.DataFrame(rows)


def tabulate_words(words: pd.DataFrame, most: int = 16) -> pd.DataFrame:
    """Nearest words as text, safe in Markdown: a row for each of the first soft tokens, a column for each example."""
    shown = words[words["soft_token"] <= most]
    names = {row.id: f"{row.unit} = {row.value:.0f}" if row.unit else row.id for row in words.itertuples()}
    cells = [f"{show_token(row.token)} {row.cosine:.2f}" for row in shown.itertuples()]
    table = shown.assign(cell=cells).groupby(["soft_token", "id"], sort=False)["cell"].agg("<br>".join).unstack()
    return (
        table[list(names)].fillna("").rename(columns=names).reset_index().rename(columns={"soft_token": "soft token"})
    )


def show_token(token: str) -> str:
    """A token as safe HTML, its spaces and line ends visible."""
    return escape(token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(" ", "\N{OPEN BOX}"))


def soft_token_sizes(experiment: Experiment, examples: list[Example], bridge: str | Bridge = "bridged"):
    """For each soft token the share of it that varies with the question, its RMS, and the embedding table's RMS.

    Where the number of soft tokens follows the prompt, the places that every question has.
    """
    tokens, mask = experiment.encode(examples, bridge)
    tokens = tokens[:, : int(mask.sum(1).min())].cpu().numpy().astype(float)
    point, low, high = varying_share(tokens)
    sizes = {"rms": np.sqrt((tokens**2).mean((0, 2))), "table_rms": experiment.pair.target.embedding_rms}
    n_units = len({e.unit or e.id for e in examples})
    soft = {"soft_token": np.arange(1, len(point) + 1), "point": point, "low": low, "high": high}
    return pd.DataFrame(soft | sizes | {"n": len(examples), "n_units": n_units})


def varying_share(tokens: np.ndarray, n_boot: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of each soft token differs between questions: 1 - |mean|^2 / mean |token|^2, with its interval.

    tokens (N, K, D), one question per unit -> (K,), (K,), (K,). 0: the same for every question; 1: nothing shared.
    """
    n, k, _ = tokens.shape
    flat, sizes = tokens.reshape(n, -1), (tokens**2).sum(2)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_boot) / n

    def vary(weights: np.ndarray) -> np.ndarray:
        means = (weights @ flat).reshape(len(weights), k, -1)
        # a draw repeats questions, which makes its mean longer than it would be: n/(n-1) takes that out
        return (1 - (means**2).sum(2) / (weights @ sizes)) * n / (n - 1)

    point = vary(np.full((1, n), 1 / n))[0]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(vary(draws) * n / (n - 1), [tail, 1 - tail], axis=0)
    return point, np.minimum(low, point), np.maximum(high, point)


def describe_message(experiment: Experiment, bridge: str | Bridge = "bridged") -> Callable[[str], str]:
    """For the example browser: id of a test problem -> HTML of its message, with what each soft token looks at."""
    by_id = {e.id: e for e in experiment.examples("test")}

    def describe(example_id: str) -> str:
        example = by_id[example_id]
        words, store = nearest_words(experiment, bridge, [example]), attend(experiment, [example], bridge)
        weights, tokens, lines = store.get(f"map/{example_id}"), store.get(f"tokens/{example_id}"), []
        for number, near in words.groupby("soft_token"):
            looks = np.argsort(-weights[number - 1].astype(float))[:3] if weights is not None else []
            seen = " ".join(f"{show_token(tokens[i])} {weights[number - 1, i]:.2f}" for i in looks)
            names = " ".join(f"{show_token(row.token)} {row.cosine:.2f}" for row in near.itertuples())
            lines.append(f"<tr><td>{number}</td><td>{names}</td><td>{seen}</td></tr>")
        head = "<tr><th>soft token</th><th>nearest words</th><th>looks at</th></tr>"
        return f"<table>{head}{''.join(lines)}</table>"

    return describe


@torch.no_grad()
def answer_entropy(experiment: Experiment, examples: list[Example], names: tuple[str, ...] = ("bridged",)):
    """Entropy in bits and the right digit's probability where the gold answer first writes the unit's value.

    What stands before in the answer is the gold text, the same for every condition. A row per example, condition and
    measure (`value`); condition `target` is the target alone on its literal prompt.
    """
    target, data, seeds = experiment.pair.target, experiment.training_set(examples), experiment.seeds(examples)
    spans, rows = target.offsets([e.solution for e in examples]), []
    places = [
        next(i for i, (a, b) in enumerate(s) if a <= e.value_at < b) for e, s in zip(examples, spans, strict=True)
    ]
    for chunk in chunks(len(examples)):
        batch = data.batch(chunk, seeds[chunk])
        nothing = (batch.literal[0][:, :0], batch.literal[1][:, :0])
        logits = {"target": answer_logits(target, nothing, batch.literal, None, batch.labels, batch.labels_mask)}
        for name in names:
            message = encode_chunk(experiment.bridges[name], data.states, chunk, seeds, experiment.device)
            given = (message, batch.before, batch.after, batch.labels, batch.labels_mask)
            logits[name] = bridged_logits(target, experiment.bridges[name], *given)
        at, here = torch.tensor([places[i] for i in chunk], device=target.device), torch.arange(len(chunk))
        for condition, scores in logits.items():
            logprobs = scores[here, at].float().log_softmax(-1)  # (B, V)
            bits = -(logprobs.exp() * logprobs).sum(-1) / math.log(2)
            right = logprobs[here, batch.labels[here, at]].exp()
            for i, *found in zip(chunk, bits.tolist(), right.tolist(), strict=True):
                e = examples[i]
                facts = {"id": e.id, "unit": e.unit, "group": e.group or "all", "condition": condition}
                rows += [facts | {"measure": m, "value": v} for m, v in zip(("entropy", "right"), found, strict=True)]
    return pd.DataFrame(rows)


def entropy_table(answers: pd.DataFrame) -> pd.DataFrame:
    """Mean entropy (`entropy`) and mean probability of the right digit (`right`) by group and condition."""
    table = share(answers, ["measure", "group", "condition"], "value")
    table["low"] = table["low"].clip(lower=0)  # no entropy is below zero, no probability outside [0, 1]
    return table.assign(high=table["high"].clip(upper=table["measure"].map({"entropy": math.inf, "right": 1})))


@torch.no_grad()
def compare_representations(experiment: Experiment, examples: list[Example], bridge: str | Bridge = "bridged"):
    """CKA of every pair of: source states, soft tokens, the target's embeddings, and the digits of the value."""
    target, states = experiment.pair.target, experiment.source_states(examples)
    prompts, found = [source_prompt(e) for e in examples], {}
    texts = [p.prefix if experiment.config.bridge.source_view == "facts" else p.text for p in prompts]
    ends = [
        probe.question_words(states.lm, t, e.unit)[0].stop - 1 for t, e in zip(texts, examples, strict=True) if e.unit
    ]
    for chunk in chunks(len(examples)):
        hidden, mask = states.batch(chunk, target.device)  # (B, S, L, D)
        means = hidden.float().sum(1) / mask.sum(1)[:, None, None]
        for i, layer in enumerate(experiment.layers):
            if len(ends) == len(examples):
                word = hidden[torch.arange(len(chunk)), torch.tensor([ends[j] for j in chunk]), i].float()
                found.setdefault(f"source layer {layer}, word end", []).append(word)
            found.setdefault(f"source layer {layer}, mean", []).append(means[:, i])
    tables = {k: torch.cat(found[k]).cpu().numpy() for k in sorted(found, key=lambda k: k.endswith("mean"))}
    tokens, mask = experiment.encode(examples, bridge)
    tables["soft tokens"] = tokens[:, : int(mask.sum(1).min())].flatten(1).cpu().numpy()
    for label, texts in (("question", [e.question for e in examples]), ("answer", [e.solution for e in examples])):
        rows = [target.embed(torch.tensor(ids, device=target.device)).float().mean(0) for ids in target.tokenize(texts)]
        tables[f"target embeddings, {label}"] = torch.stack(rows).cpu().numpy()
    if all(e.value is not None for e in examples):
        tables["digits of the value"] = probe.one_hot_digits(torch.tensor([e.value for e in examples])).numpy()
    return cka_table(tables, [e.unit or e.id for e in examples])


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


def cka_table(representations: dict[str, np.ndarray], units: list) -> pd.DataFrame:
    """Linear CKA of every pair of (questions, width), 1 alike, about 0 unrelated: a, b, point low high n n_units.

    On the unbiased HSIC (Song 2012): the plain estimate is far above 0 for unrelated representations that are wider
    than there are questions. May come out slightly negative. The interval leaves out folds of units.
    """
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
            half = float(stdtrit(folds - 1, (1 + LEVEL) / 2)) * math.sqrt((folds - 1) / folds * (spread**2).sum())
            rows.append([a, b, point, point - half, point + half, len(codes), n_units])
    return pd.DataFrame(rows, columns=["a", "b", "point", "low", "high", "n", "n_units"])


def probe_source(experiment: Experiment, every: int = 1) -> pd.DataFrame:
    """The probe on the run's own source, in its own direction; `every` n-th unit or problem, for a quick look.

    Where the facts are in the context, no unit is taught: the probe is then fitted on problems of the train split.
    """
    if experiment.config.task.variant == "weights":
        return probe.probe_pair(experiment.pair.source, experiment.lexicon[::every])
    config, seed = experiment.config.with_(n_train=4000), experiment.pair.lexicon_seed
    splits = {probe.FIT: "train", probe.CHOOSE: "val", "held_unit": "test"}
    parts = {k: probe.ask_examples(experiment.task.examples(config, seed, s)[::every]) for k, s in splits.items()}
    return probe.probe_prompts(experiment.pair.source, parts)


@torch.no_grad()
def probe_message(experiment: Experiment, n: int = 2000, bridge: str | Bridge = "bridged") -> pd.DataFrame:
    """The same probe on the bridge's message: can the value be read from the soft tokens themselves?

    Fitted on problems about source-only train units, which the bridge was trained on, so its messages about them may
    be better than those about the units reported on.
    """
    config, seed = experiment.config.with_(n_train=n, source_only_share=1.0), experiment.pair.lexicon_seed
    train, val = (experiment.task.examples(config, seed, split) for split in ("train", "val"))

    def encode(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = experiment.encode(examples, bridge)
        fixed = bool(mask.all()) and config.bridge.n_soft_tokens != -1
        x = tokens.flatten(1) if fixed else (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return x, torch.tensor([e.value for e in examples])

    fitted = probe.DigitProbe(*encode(train), *encode([e for e in val if e.group == "source_only"]))
    test = list({e.unit: e for e in experiment.pick("source_only", len(experiment.test))}.values())  # each unit once
    read = fitted.read(*encode(test), [e.unit for e in test])
    novelty = {e.unit: e.novelty for e in test}
    return share(read.assign(novelty=read["unit"].map(novelty)), ["novelty", "digit"])
