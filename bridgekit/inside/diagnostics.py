"""Look inside a finished run's bridge: attention, size and neighbours of soft tokens, entropy, CKA, the fact itself.

    opened = open_finished("preserved_data/headline_resampler_seed1")
    sizes = soft_token_sizes(opened, examples)
    entropy = answer_entropy(opened, examples)

Each function gives a frame for `figures_diagnostics` and `readings_inside`. The causal check is in `causal`.
Shapes: N examples, K soft tokens, S source tokens, D hidden size, A answer tokens, V vocabulary.
"""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from bridgekit.inside.measure import cka_table, clustered_mean, load_attention, summarise, varying_share
from bridgekit.inside.probe import (
    CHOOSE,
    FIT,
    DigitProbe,
    ask_examples,
    list_probe,
    one_hot_digits,
    probe_pair,
    probe_prompts,
)  # fmt: skip
from bridgekit.model.generation import answer_logits, bridged_logits
from bridgekit.runs import write_bytes_atomic
from bridgekit.tasks import Example, load_examples
from bridgekit.train.attention import classify_tokens, merge_attention, pack_arrays
from bridgekit.train.experiment import Experiment, chunks

LOG2 = float(np.log(2))


# ---- attention ----------------------------------------------------------------------------------------------------


def read_attention(opened: Experiment, examples: list[Example], scratch: Path) -> tuple[dict, Path]:
    """The run's attention and the file it is in; made from the checkpoint, into `scratch`, where the run has none.

    Empty where the bridge has no attention over source tokens, as a constant has not.
    """
    kept = opened.run / "attention.npz"
    if kept.is_file():
        return load_attention(kept), kept
    attention: dict[str, np.ndarray] = {}
    states = opened.evaluator.source_states("bridged", examples)
    opened.evaluator.decode_messages("bridged", opened.bridges["bridged"], examples, states, attention)
    if not attention:
        return {}, kept
    made, part = Path(scratch) / "attention.npz", Path(scratch) / "attention.part.npz"
    made.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(part, pack_arrays(attention))
    merge_attention([part], made)
    part.unlink()
    return load_attention(made), made


# ---- soft tokens --------------------------------------------------------------------------------------------------


def soft_token_sizes(opened: Experiment, examples: list[Example], name: str = "bridged") -> pd.DataFrame:
    """For each soft token: its RMS over questions, how much of it varies with the question, and the table's RMS.

    Where the number of soft tokens follows the prompt, the places that every question has.
    """
    tokens, mask = opened.encode(examples, name)
    k = int(mask.sum(1).min())
    tokens = tokens[:, :k].cpu().numpy().astype(float)
    rms, units_of = np.sqrt((tokens**2).mean(2)), [e.unit or e.id for e in examples]
    table = opened.pair.target.model.get_input_embeddings().weight.float()
    sizes = table.pow(2).mean(1).sqrt()
    five, half, most = torch.quantile(sizes, torch.tensor([0.05, 0.5, 0.95], device=sizes.device)).tolist()
    shares = varying_share(tokens)
    rows = []
    for i in range(k):
        mean = clustered_mean(rms[:, i], units_of)
        share, low, high = (float(x[i]) for x in shares)
        rows.append({
            "soft_token": i + 1, "rms": mean.point, "low": mean.low, "high": mean.high, "varying": share,
            "varying_low": low, "varying_high": high, "table_rms": opened.pair.target.embedding_rms,
            "vocabulary_5": five, "vocabulary_50": half, "vocabulary_95": most, "n": mean.n,
            "n_units": mean.n_clusters,
        })  # fmt: skip
    return pd.DataFrame(rows)


def nearest_tokens(opened: Experiment, examples: list[Example], top: int = 3, name: str = "bridged") -> pd.DataFrame:
    """The vocabulary tokens with the largest cosine to each soft token; a row an example, soft token and rank.

    `chance` is the largest cosine that a random direction finds in the same table, on average.
    """
    target = opened.pair.target
    table = torch.nn.functional.normalize(target.model.get_input_embeddings().weight.float(), dim=-1)  # (V, D)
    tokens, mask = opened.encode(examples, name)
    noise = torch.randn(512, table.shape[1], generator=torch.Generator().manual_seed(0)).to(table.device)
    chance = (torch.nn.functional.normalize(noise, dim=-1) @ table.T).amax(1).mean().item()
    rows = []
    for e, vectors, real in zip(examples, tokens, mask, strict=True):
        cosines, ids = (torch.nn.functional.normalize(vectors[real], dim=-1) @ table.T).topk(top, dim=-1)
        for i, (some, best) in enumerate(zip(cosines.tolist(), ids.tolist(), strict=True)):
            for rank, (cosine, token) in enumerate(zip(some, best, strict=True), start=1):
                rows.append({
                    "id": e.id, "unit": e.unit, "value": e.value, "soft_token": i + 1, "rank": rank,
                    "token": target.tokenizer.decode([token]), "cosine": cosine, "chance": chance,
                })  # fmt: skip
    return pd.DataFrame(rows)


# ---- entropy ------------------------------------------------------------------------------------------------------


def value_place(example: Example, offsets: list[tuple[int, int]]) -> int | None:
    """The answer token that begins the unit's value, where the gold answer first multiplies by it."""
    found = re.search(rf"\*{example.value}=", example.solution) if example.value is not None else None
    if found is None:
        return None
    start = found.start() + 1
    return next(i for i, (a, b) in enumerate(offsets) if a <= start < b)


@torch.no_grad()
def answer_entropy(opened: Experiment, examples: list[Example], names: tuple[str, ...] = ("bridged",)) -> pd.DataFrame:
    """Entropy in bits, and the right token's probability, at the first answer token and where the value is said.

    What stands before in the answer is the gold text, the same for every condition. One row an example, place and
    condition; `target` is the target alone on its literal prompt.
    """
    target, data, seeds = opened.pair.target, opened.training_set(examples), opened.seeds(examples)
    encoded = target.tokenizer([e.solution for e in examples], add_special_tokens=False, return_offsets_mapping=True)
    places = [(0, value_place(e, o)) for e, o in zip(examples, encoded["offset_mapping"], strict=True)]
    rows = []
    for chunk in chunks(len(examples)):
        batch = data.batch(chunk, seeds[chunk])
        nothing = (batch.literal[0][:, :0], batch.literal[1][:, :0])
        logits = {"target": answer_logits(target, nothing, batch.literal, None, batch.labels, batch.labels_mask)}
        for name in names:
            bridge = opened.bridges[name]
            message = bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment)
            logits[name] = bridged_logits(
                target, bridge, message, batch.before, batch.after, batch.labels, batch.labels_mask
            )
        for condition, scores in logits.items():
            logprobs = scores.float().log_softmax(-1)  # (B, A, V)
            entropy = -(logprobs.exp() * logprobs).sum(-1) / LOG2
            right = logprobs.gather(2, batch.labels[..., None])[..., 0].exp()
            for i, j in enumerate(chunk):
                e = examples[j]
                for place, at in zip(("first token", "value"), places[j], strict=True):
                    if at is not None:
                        rows.append({
                            "id": e.id, "unit": e.unit or e.id, "group": e.group or "all", "novelty": e.novelty,
                            "place": place, "condition": condition, "entropy": entropy[i, at].item(),
                            "right_probability": right[i, at].item(),
                        })  # fmt: skip
    return pd.DataFrame(rows)


def entropy_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean entropy and mean probability of the right token in each cell, with intervals over units."""
    by = ["place", "group", "condition"]
    bits, right = summarise(frame, "entropy", by), summarise(frame, "right_probability", by)
    bits["low"] = bits["low"].clip(lower=0)  # no entropy is below zero, no probability outside [0, 1]
    right[["low", "high"]] = right[["low", "high"]].clip(0, 1)
    right = right.rename(columns={"low": "right_low", "high": "right_high"}).drop(columns=["n", "n_units"])
    return bits.merge(right, on=by)


# ---- CKA ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare_representations(opened: Experiment, examples: list[Example], name: str = "bridged") -> pd.DataFrame:
    """CKA of every pair of: source states, soft tokens, the target's embeddings, and the digits of the value."""
    target, states = opened.pair.target, opened.evaluator.source_states("bridged", examples)
    found: dict[str, list[torch.Tensor]] = {}
    ends = [unit_end(opened, e, row) for e, row in zip(examples, states.rows, strict=True)]
    for chunk in chunks(len(examples)):
        hidden, mask = states.batch(chunk, target.device)  # (B, S, L, D)
        means = hidden.float().sum(1) / mask.sum(1)[:, None, None]
        for i, layer in enumerate(opened.evaluator.layers):
            if None not in ends:
                at = torch.tensor([ends[j] for j in chunk], device=hidden.device)
                here = hidden[torch.arange(len(chunk), device=hidden.device), at, i].float()
                found.setdefault(f"source layer {layer}, word end", []).append(here)
            found.setdefault(f"source layer {layer}, mean", []).append(means[:, i])
    tables = {k: torch.cat(found[k]).cpu().numpy() for k in sorted(found, key=lambda k: k.endswith("mean"))}
    tokens, mask = opened.encode(examples, name)
    k = int(mask.sum(1).min())
    tables["soft tokens"] = tokens[:, :k].flatten(1).cpu().numpy()
    for label, texts in (("target embeddings, question", [e.question for e in examples]),
                         ("target embeddings, answer", [e.solution for e in examples])):  # fmt: skip
        rows = [target.embed(torch.tensor(ids, device=target.device)).float().mean(0) for ids in target.tokenize(texts)]
        tables[label] = torch.stack(rows).cpu().numpy()
    if all(e.value is not None for e in examples):
        tables["digits of the value"] = one_hot_digits(torch.tensor([e.value for e in examples])).numpy()
    return cka_table(tables, [e.unit or e.id for e in examples])


def unit_end(opened: Experiment, example: Example, row: list[int]) -> int | None:
    """The last token of the unit's word where the question first says it; None where the task has no units."""
    if not example.unit:
        return None
    places = np.flatnonzero(np.array(classify_tokens(opened.pair.source, example, row)) == 1)
    words = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    word = words[1] if example.facts and len(words) > 1 else words[0]  # a note says the word before the question does
    return int(word[-1]) if len(word) else None


# ---- where the fact is --------------------------------------------------------------------------------------------


def probe_source(opened: Experiment, every: int = 1) -> pd.DataFrame:
    """The probe on the run's own source, in its own direction; `every` n-th unit or problem, for a quick look.

    Where the facts are in the context, no unit is taught: the probe is then fitted on problems of the train split.
    """
    if opened.config.task.variant == "weights":
        return list_probe(probe_pair(opened.pair.source, opened.lexicon[::every]))
    splits = {name: load_examples(opened.config.with_(n_train=4000), opened.pair.lexicon_seed, split)[::every]
              for name, split in ((FIT, "train"), (CHOOSE, "val"), ("held_unit", "test"))}  # fmt: skip
    return list_probe(probe_prompts(opened.pair.source, {k: ask_examples(v) for k, v in splits.items()}))


@torch.no_grad()
def probe_message(opened: Experiment, n: int = 2000, name: str = "bridged") -> pd.DataFrame:
    """The same probe on the bridge's message: can the value be read from the soft tokens themselves?

    Fitted on problems about source-only train units, which the bridge was trained on, so its messages about them may
    be better than those about the units reported on.
    """
    config = opened.config.with_(n_train=n, source_only_share=1.0)
    train = load_examples(config, opened.pair.lexicon_seed, "train")
    val = [e for e in load_examples(config, opened.pair.lexicon_seed, "val") if e.group == "source_only"]
    test = opened.pick("source_only", len(opened.test))

    def read(examples: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, mask = opened.encode(examples, name)
        fixed = bool(mask.all()) and opened.config.bridge.n_soft_tokens != -1
        x = tokens.flatten(1) if fixed else (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return x, torch.tensor([e.value for e in examples])

    probe = DigitProbe(*read(train), *read(val))
    shares = {}
    for novelty in ("held_unit", "held_value"):
        some = list({e.unit: e for e in test if e.novelty == novelty}.values())  # each unit once
        if some:
            shares[novelty] = probe.score(*read(some))
    return list_probe({-1: {"message": shares}})
