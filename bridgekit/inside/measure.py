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
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import stdtrit
from torch.nn.functional import normalize

from bridgekit.inside import probe
from bridgekit.model.bridge import Bridge
from bridgekit.model.generation import bridged_logits, evaluating
from bridgekit.results.table import share
from bridgekit.results.tables import escape
from bridgekit.tasks import Example, source_prompt
from bridgekit.train.conditions import keep_attention, save_attention
from bridgekit.train.experiment import Experiment, chunks, encode_chunk
from bridgekit.train.objective import target_logits

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


def load_attention(experiment: Experiment, examples: list[Example], folder: Path) -> tuple[dict, Path]:
    """The run's attention and the file it is in; made from the checkpoint, into `folder`, where the run has none."""
    path = (experiment.run or folder) / "attention.npz"
    if not path.is_file():
        store, path = attend(experiment, examples), folder / "attention.npz"
        if not store:
            return {}, path
        folder.mkdir(parents=True, exist_ok=True)
        save_attention(store, path)
    return dict(np.load(path, allow_pickle=False)), path


def attention_by_class(arrays: dict[str, np.ndarray], frame: pd.DataFrame) -> pd.DataFrame:
    """Share of the attention on each class of source token, and the share an even spread would give it (`uniform`).

    `frame` has the examples' id and unit."""
    units = pd.Series(arrays["ids"]).map(dict(zip(frame["id"], frame["unit"], strict=True)))
    known = np.isin(arrays["ids"], frame["id"].to_numpy(str))
    if not known.any():
        raise ValueError("attention.npz: none of its examples is in the evaluation file: they are of different runs")
    mean, classes, parts = arrays["mean"][known].astype(float), arrays["token_class"][known], []
    for number, label in TOKEN_CLASSES.items():
        here = classes == number
        values = {"value": (mean * here).sum(1) / mean.sum(1), "uniform": here.sum(1) / (classes >= 0).sum(1)}
        parts.append(pd.DataFrame({"unit": units[known].to_numpy(), "token_class": label} | values))
    long = pd.concat(parts, ignore_index=True)
    even = long.groupby("token_class", sort=False)["uniform"].mean()
    return share(long, "token_class", "value").assign(uniform=even.to_numpy())


def map_ids(arrays: dict[str, np.ndarray], frame: pd.DataFrame, n: int) -> dict[str, str]:
    """`n` examples whose whole map was kept, as {id: title}; those only the source knew come first."""
    kept = frame[frame["id"].isin({key.split("/", 1)[1] for key in arrays if key.startswith("map/")})]
    rows = sorted(kept.to_dict("records"), key=lambda row: (row["group"] != "source_only", row["id"]))
    return {row["id"]: f"A {row['unit']} is {row['value']:.0f}" if row["unit"] else row["id"] for row in rows[:n]}


def map_frame(arrays: dict[str, np.ndarray], example_id: str) -> pd.DataFrame:
    """One example's map as rows: soft_token, place, weight, id, token."""
    weights = pd.DataFrame(arrays[f"map/{example_id}"].astype(float))
    long = weights.stack().rename_axis(["soft_token", "place"]).rename("weight").reset_index()
    return long.assign(id=example_id, token=arrays[f"tokens/{example_id}"][long["place"]])


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
    return table[list(names)].fillna("").rename(columns=names).rename_axis("soft token").reset_index()


def show_token(token: str) -> str:
    """A token as safe HTML, its spaces and line ends visible."""
    return escape(token.replace("\n", "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}").replace(" ", "\N{OPEN BOX}"))


def soft_token_sizes(experiment: Experiment, examples: list[Example], bridge: str | Bridge = "bridged"):
    """For each soft token the share of it that varies with the question, its RMS, and the embedding table's RMS.

    Where the number of soft tokens follows the prompt, the places that every question has.
    """
    tokens, mask = experiment.encode(examples, bridge)
    tokens = tokens[:, : int(mask.sum(1).min())].cpu().numpy().astype(float)
    soft = varying_share(tokens).assign(rms=np.sqrt((tokens**2).mean((0, 2))))
    n_units = len({e.unit or e.id for e in examples})
    return soft.assign(table_rms=experiment.pair.target.embedding_rms, n=len(examples), n_units=n_units)


def varying_share(tokens: np.ndarray) -> pd.DataFrame:
    """How much of each soft token differs between questions: 1 - |mean|^2 / mean |token|^2, with its interval.

    tokens (N, K, D), one question per unit -> K rows. 0: the same for every question; 1: nothing shared.
    """
    n, k, _ = tokens.shape
    draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=400)
    weights = np.vstack([np.ones(n), draws]) / n
    means = (weights @ tokens.reshape(n, -1)).reshape(len(weights), k, -1)
    # a draw repeats questions, which makes its mean longer than it would be: n/(n-1) takes that out
    point, *drawn = (1 - (means**2).sum(2) / (weights @ (tokens**2).sum(2))) * n / (n - 1)
    low, high = np.quantile(np.array(drawn) * n / (n - 1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    ends = {"low": np.minimum(low, point), "high": np.maximum(high, point)}
    return pd.DataFrame({"soft_token": np.arange(1, k + 1), "point": point} | ends)


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

    What stands before in the answer is the gold text, the same for every condition. A row per example and condition
    (`entropy`, `right`); condition `target` is the target alone on its literal prompt.
    """
    target, data, seeds = experiment.pair.target, experiment.training_set(examples), experiment.seeds(examples)
    facts, places = [{"id": e.id, "unit": e.unit, "group": e.group or "all"} for e in examples], []
    for e, offsets in zip(examples, target.locate([e.solution for e in examples])[1], strict=True):
        places.append(next(i for i, (start, end) in enumerate(offsets) if start <= e.value_at < end))
    facts, places, parts = pd.DataFrame(facts), torch.tensor(places, device=target.device), []
    for chunk in chunks(len(examples)):
        batch = data.batch(chunk, seeds[chunk])
        logits = {"target": target_logits(target, batch)}
        for name in names:
            message = encode_chunk(experiment.bridges[name], data.states, chunk, seeds, experiment.device)
            given = (message, batch.before, batch.after, batch.labels, batch.labels_mask, batch.shared)
            logits[name] = bridged_logits(target, experiment.bridges[name], *given)
        at, here = places[torch.from_numpy(chunk)], torch.arange(len(chunk))
        for condition, scores in logits.items():
            logprobs = scores[here, at].float().log_softmax(-1)  # (B, V)
            bits = -(logprobs.exp() * logprobs).sum(-1) / math.log(2)
            found = {"entropy": bits.tolist(), "right": logprobs[here, batch.labels[here, at]].exp().tolist()}
            parts.append(facts.iloc[chunk].assign(condition=condition, **found))
    return pd.concat(parts, ignore_index=True)


def entropy_table(answers: pd.DataFrame) -> pd.DataFrame:
    """Mean entropy (`entropy`) and mean probability of the right digit (`right`) by group and condition."""
    long = answers.melt(["unit", "group", "condition"], ["entropy", "right"], "measure", ignore_index=False)
    table = share(long.sort_index(kind="stable"), ["measure", "group", "condition"], "value")
    table["low"] = table["low"].clip(lower=0)  # no entropy is below zero, no probability outside [0, 1]
    return table.assign(high=table["high"].clip(upper=table["measure"].map({"entropy": math.inf, "right": 1})))


@torch.no_grad()
def compare_representations(experiment: Experiment, examples: list[Example], bridge: str | Bridge = "bridged"):
    """CKA of every pair of: source states, soft tokens, the target's embeddings, and the digits of the value."""
    target, states = experiment.pair.target, experiment.source_states(examples, cache_gb=math.inf)
    parts = states.flat.states.float().split(states.lengths.tolist())  # (S, L, D) of each example
    sources = {"mean": torch.stack([part.mean(0) for part in parts])}  # (N, L, D)
    if all(e.unit for e in examples):
        prompts = [source_prompt(e) for e in examples]
        texts = [p.prefix if experiment.config.bridge.source_view == "facts" else p.text for p in prompts]
        words = [probe.question_words(states.lm, t, e.unit)[0] for t, e in zip(texts, examples, strict=True)]
        ends = torch.stack([part[word.stop - 1] for part, word in zip(parts, words, strict=True)])
        sources = {"word end": ends} | sources
    layers, tables = list(enumerate(experiment.layers)), {}
    for place, found in sources.items():
        tables |= {f"source layer {layer}, {place}": found[:, i].cpu().numpy() for i, layer in layers}
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
    x = x - x.mean(0)
    gram, n = x @ x.T, len(x)
    np.fill_diagonal(gram, 0.0)
    means = gram.sum(0) / (n - 2)
    means = means - means.sum() / (2 * (n - 1))
    gram = gram - means[:, None] - means[None, :]
    np.fill_diagonal(gram, 0.0)
    return gram


def cka_table(representations: dict[str, np.ndarray], units: list) -> pd.DataFrame:
    """Linear CKA of every pair of (questions, width), 1 alike, about 0 unrelated: a, b, point low high n n_units.

    On the unbiased HSIC (Song 2012): the plain estimate is far above 0 for unrelated representations that are wider
    than there are questions. May come out slightly negative. The interval leaves out folds of units.
    """
    codes, names = pd.factorize(np.asarray(units))
    folds = min(N_FOLDS, len(names) // 2)
    if folds < 2:
        raise ValueError(f"CKA: {len(names)} units are too few for an interval: take more examples")
    keeps = [np.ones(len(codes), bool)] + [codes % folds != i for i in range(folds)]
    grams = {name: [_centred_gram(np.asarray(x, float)[keep]) for keep in keeps] for name, x in representations.items()}
    rows = []
    for a, b in combinations(grams, 2):
        products = [(x * y).sum() for x, y in zip(grams[a], grams[b], strict=True)]
        sizes = [math.sqrt((x**2).sum() * (y**2).sum()) for x, y in zip(grams[a], grams[b], strict=True)]
        point, *left_out = (float(p / size) if size > 0 else 0.0 for p, size in zip(products, sizes, strict=True))
        spread = np.array(left_out) - np.mean(left_out)
        half = float(stdtrit(folds - 1, (1 + LEVEL) / 2)) * math.sqrt((folds - 1) / folds * (spread**2).sum())
        rows.append([a, b, point, point - half, point + half, len(codes), len(names)])
    return pd.DataFrame(rows, columns=["a", "b", "point", "low", "high", "n", "n_units"])


def probe_source(experiment: Experiment, every: int = 1) -> pd.DataFrame:
    """The probe on the run's own source, in its own direction; `every` n-th unit or problem, for a quick look.

    Where the facts are in the context, no unit is taught: the probe is then fitted on problems of the train split.
    """
    if experiment.config.task.variant == "weights":
        return probe.probe_pair(experiment.pair.source, experiment.lexicon[::every])
    config, seed = experiment.config.with_(n_train=4000), experiment.pair.lexicon_seed
    splits = {probe.FIT: "train", probe.CHOOSE: "val", "held_unit": "test"}
    parts = {name: experiment.task.examples(config, seed, split)[::every] for name, split in splits.items()}
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
