"""The conditions as one table: who answers, what it reads, whose message it gets; and the evaluation of all of them.

    rows = experiment.evaluate(examples, {"bridged": bridge}, step="final")  # a dict, and a JSONL line, per example
    mine = TABLE | {"same_unit": Bridged("bridged", reads=another_question)}  # a control of one's own
    experiment.evaluate(examples, bridges, conditions=mine)

Each process answers every n-th example, the first writes all rows in order. A row depends on its example alone: the
sampler's noise has a seed per example, and answers of frozen models are kept under the hash of all they depend on.
Shapes: B batch, S source tokens, L captured layers, D_s source hidden size, K soft tokens.
"""

from __future__ import annotations

import io
import typing
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from bridgekit.config import CONTROLS, nearest, refuse_if
from bridgekit.model.bridge import Bridge
from bridgekit.model.generation import Generated, decode_bridged
from bridgekit.model.message import Message, hashed_normal
from bridgekit.model.pair import LanguageModel, split_prompts
from bridgekit.model.states import SourceStates, in_batches
from bridgekit.runs import UNFINISHED, is_correct, write_bytes_atomic, write_jsonl
from bridgekit.tasks import Example, Prompt, literal_prompt, relay_prompt, source_prompt, told_prompt
from bridgekit.tasks.answers import INVALID
from bridgekit.train.baselines import KINDS, AnswerFile
from bridgekit.train.data import split_target

if typing.TYPE_CHECKING:
    from bridgekit.train.experiment import Experiment

FULL_MAPS = 16  # whole attention maps kept of each evaluation


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    """A frozen model answers a text alone; with a `relay` the text holds what the source answered."""

    model: str  # source | target
    prompt: Callable[..., Prompt]  # (example), or (example, helper_text) with a relay
    relay: Callable[[Experiment, list[str]], list[str]] | None = None  # the source's texts -> what is handed over
    beside_message: bool = False  # exactly the text that the bridged prompt has beside its soft tokens


@dataclass(frozen=True)
class Bridged:
    """The target answers with a message that `bridge` makes of an example's states, as they are or changed."""

    bridge: str
    reads: Callable[[Example, dict[str, Example]], Example] | None = None  # (example, examples by id); None: its own
    change: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None  # (states, mask, seeds)


@dataclass(frozen=True)
class Choice:
    """Two other conditions; the first one's answer where its log-probability leads by more than the threshold."""

    first: str
    second: str


def cut_to_soft_tokens(experiment: Experiment, texts: list[str]) -> list[str]:
    """As many tokens of the text as the bridge has soft tokens."""
    target, k = experiment.pair.target, experiment.config.bridge.n_soft_tokens
    cut = [ids[: k if k != -1 else None] for ids in target.tokenize(texts)]
    return target.tokenizer.batch_decode(cut, skip_special_tokens=True)


def answer_alone(experiment: Experiment, texts: list[str]) -> list[str]:
    return ["" if a == INVALID else experiment.task.write(a) for a in map(experiment.task.extract, texts)]


def find_donor(example: Example, by_id: dict[str, Example]) -> Example:
    """Its own states would make `shuffled` a second `bridged`: a problem without its donor is refused."""
    if example.donor_id not in by_id:
        raise ValueError(f"eval.conditions: 'shuffled' has no donor for {example.id}: take more problems")
    return by_id[example.donor_id]


def zeros(states: torch.Tensor, mask: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(states)


def matched_noise(states: torch.Tensor, mask: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Random states with each layer's size, from each example's seed. (B, S, L, D_s)"""
    size = (states.float().pow(2).mean(-1, keepdim=True) * mask[..., None, None]).sum(1, keepdim=True)
    size = (size / mask.sum(1)[:, None, None, None]).sqrt()
    noise = hashed_normal(seeds, states.shape[1:])
    return (noise * size * mask[..., None, None]).to(states.dtype)


TABLE: dict[str, Text | Bridged | Choice] = {  # in the order of tables; `union` is counted, it has no text of its own
    "source": Text("source", source_prompt),
    "target": Text("target", literal_prompt),
    "bridged": Bridged("bridged"),
    "target_suffix": Text("target", literal_prompt, beside_message=True),
    "target_told": Text("target", told_prompt),
    "zero": Bridged("bridged", change=zeros),
    "noise": Bridged("bridged", change=matched_noise),
    "shuffled": Bridged("bridged", reads=find_donor),
    "constant": Bridged("constant"),
    "constant_natural": Bridged("constant_natural"),
    "self_bridge": Bridged("self_bridge"),
    "relay_full": Text("target", relay_prompt, relay=lambda experiment, texts: texts),
    "relay_cut": Text("target", relay_prompt, relay=cut_to_soft_tokens),
    "relay_answer": Text("target", relay_prompt, relay=answer_alone),
    "router": Choice("source", "target"),
}


# ---- one condition --------------------------------------------------------------------------------------------------


def answer_row(
    experiment: Experiment, row: Text | Bridged | Choice, examples: list[Example], bridges: dict[str, Bridge],
    answers: dict[str, list[Generated]] | None = None, attention: dict | None = None,
    kept: AnswerFile | None = None, name: str = "",
) -> list[Generated]:  # fmt: skip
    """What one row of the table says to each example; `answers` holds what other conditions said to the same ones.

    With a file `kept`, the answers of the condition `name` that it has are not made again."""
    answers = {} if answers is None else answers

    def answer_other(name: str) -> list[Generated]:
        return answers.get(name) or answer_row(experiment, TABLE[name], examples, bridges, answers)

    if isinstance(row, Choice):
        pairs = zip(answer_other(row.first), answer_other(row.second), strict=True)
        return [a if lead(a, b) > experiment.router_threshold else b for a, b in pairs]
    if isinstance(row, Text):
        helpers = [g.text for g in answer_other("source")] if row.relay else None
        prompts = make_prompts(experiment, row, examples, helpers)
        return experiment.baselines.answer(getattr(experiment.pair, row.model), prompts)
    if row.bridge not in bridges:
        raise ValueError(f"no bridge '{row.bridge}': train one, load a run that has it, or pass bridges={{...}}")
    state_examples = examples
    if row.reads:  # whose states it reads may be any problem of the same split
        splits = {e.split for e in examples} & {"val", "test"}
        by_id = {e.id: e for e in (*(e for s in splits for e in experiment.examples(s)), *examples)}
        state_examples = [row.reads(e, by_id) for e in examples]
    states, bridge = experiment.source_states(state_examples, row.bridge), bridges[row.bridge]
    keys = kept.keys(name, bridge, examples) if kept else []
    return decode_messages(experiment, bridge, examples, states, row.change, attention, kept=kept, keys=keys)


def lead(first: Generated, second: Generated) -> float:
    """Of the mean log-probability, as it stands in the rows that the threshold was tuned on."""
    return round(first.logprob, 5) - round(second.logprob, 5)


def make_prompts(experiment: Experiment, row: Text, examples: list[Example], helpers: list[str] | None) -> list[Prompt]:
    """The texts of a condition without soft tokens; `helpers` are the source's texts, for a relay."""
    if row.beside_message and experiment.config.bridge.prompt_mode == "soft_only":
        return [Prompt("", "") for _ in examples]
    if row.relay is None:
        return [row.prompt(e) for e in examples]
    return [row.prompt(e, h) for e, h in zip(examples, row.relay(experiment, helpers), strict=True)]


def sampler_seed(seed: int, example_id: str) -> int:
    return zlib.crc32(f"{seed} {example_id}".encode()) >> 1


@torch.no_grad()
def decode_messages(
    experiment: Experiment, bridge: Bridge, examples: list[Example], states: SourceStates,
    change: Callable | None = None, attention: dict | None = None, batch_size: int = 0,
    kept: AnswerFile | None = None, keys: Sequence[str] = (),
) -> list[Generated]:  # fmt: skip
    """The target's answers to `examples` with the messages that `bridge` makes of `states`, one row per example.

    What the file `kept` has under an example's key is taken from it, the rest is put there batch by batch."""
    config, target = experiment.config, experiment.pair.target
    pieces = split_prompts(target, [literal_prompt(e) for e in examples])
    shared, before, after = split_target(config, target, pieces, config.bridge.prompt_mode)
    seeds = experiment.seeds(examples)
    results: list = [None] * len(examples)
    waiting = np.array([i for i in range(len(examples)) if not kept or keys[i] not in kept.known], dtype=int)
    bridge.eval()
    for chunk in in_batches([len(after[i]) for i in waiting], batch_size or config.eval.eval_batch_size):
        chunk = waiting[chunk]
        hidden, mask = states.batch(chunk, target.device)
        noise_seeds = torch.from_numpy(seeds[chunk]).to(target.device)
        hidden = hidden if change is None else change(hidden, mask, noise_seeds)
        message = bridge.encode(
            hidden, mask, noise_seeds, alignment=states.alignment(chunk, target.device),
            want_attention=attention is not None,
        )  # fmt: skip
        looked: dict[str, np.ndarray] = {}
        if attention is not None:
            keep_attention(looked, message, chunk, [examples[i] for i in chunk], states)
            attention |= looked
        texts, ends = ([before[i] for i in chunk], [after[i] for i in chunk]), experiment.task.is_complete
        options = dict(is_complete=ends, shared=shared)
        decoded = decode_bridged(target, bridge, message, *texts, config.eval.max_new_tokens, **options)
        for i, generated in zip(chunk, decoded, strict=True):
            results[i] = generated
        if kept:
            kept.add({keys[i]: (results[i], select_attention(looked, examples[i].id)) for i in chunk})
    for i in sorted(set(range(len(examples))) - set(waiting)):
        results[i], looked = kept.known[keys[i]]
        if attention is not None:
            attention |= looked
    return results


# ---- one evaluation -------------------------------------------------------------------------------------------------


def evaluate(
    experiment: Experiment, examples: list[Example], bridges: dict[str, Bridge], step: str | None,
    conditions: tuple[str, ...] | dict, want_attention: bool = False, stage: str = "",
) -> list[dict]:  # fmt: skip
    """Rows of all examples on the first process, an empty list on the others.

    `conditions` are names, or rows by name. With a `step` the first process writes eval_samples_step_<step>.jsonl into
    the run folder; with a `stage` a watcher sees which condition is at work."""
    processes = experiment.processes
    local = examples[processes.rank :: processes.world]
    answers: dict[str, list[Generated]] = {}
    attention: dict[str, np.ndarray] = {}
    kept = AnswerFile(experiment.folder / UNFINISHED) if experiment.folder and step == "final" else None
    for name, row in choose_rows(experiment, conditions, bridges).items():
        if stage:
            experiment.report(f"{stage} {name}")
        store = attention if name == "bridged" and want_attention else None
        answers[name] = answer_row(experiment, row, local, bridges, answers, store, kept, name)
    lines = [make_row(experiment, e, {c: a[i] for c, a in answers.items()}) for i, e in enumerate(local)]
    everything = processes.gather_objects({"lines": lines, "attention": attention})
    if not processes.is_first:
        return []
    by_id = {line["id"]: line for part in everything for line in part["lines"]}
    rows = [{"eval_step": step or "notebook", "index": i} | by_id[e.id] for i, e in enumerate(examples)]
    if experiment.folder and step is not None:
        store = {k: v for part in everything for k, v in part["attention"].items()}
        save_attention(store, experiment.folder / "attention.npz")
        write_jsonl(experiment.folder / f"eval_samples_step_{step}.jsonl", rows)  # last: it says that all is there
    if kept:
        kept.path.unlink(missing_ok=True)
    return rows


def choose_rows(experiment: Experiment, conditions: tuple[str, ...] | dict, bridges: dict) -> dict:
    """Rows by name; without controls that were not trained and a router without threshold."""
    table = TABLE | conditions if isinstance(conditions, dict) else TABLE

    def is_ready(row: Text | Bridged | Choice) -> bool:
        if isinstance(row, Choice):
            return experiment.router_threshold is not None
        return isinstance(row, Text) or row.bridge in bridges or row.bridge.split(".")[0] not in CONTROLS

    rows = {name: find_row(name, table) for name in conditions if name != "union"}
    return {name: row for name, row in rows.items() if is_ready(row)}


def find_row(name: str, table: dict = TABLE) -> Text | Bridged | Choice:
    """The row of a condition; `constant.last` is that of `constant` with the bridge of this name."""
    if name == "union":
        raise ValueError("eval.conditions: 'union' is counted from source and target, it answers nothing itself")
    own = name.split(".")[0]
    refuse_if(own not in table, f"no condition '{name}': did you mean '{nearest(own, table)}'?")
    return table[name] if name in table else replace(table[own], bridge=name)


def make_row(experiment: Experiment, example: Example, said: dict[str, Generated]) -> dict:
    task = experiment.task
    row = {
        "question": example.question, "gold_full_text": example.solution, "gold_extracted": example.gold,
        "id": example.id, "split": example.split, "group": example.group, "unit": example.unit,
        "value": example.value, "novelty": example.novelty, "family": example.family, "steps": example.steps,
        "donor_id": example.donor_id, "donor_gold": example.donor_gold,
        "sampler_seed": sampler_seed(experiment.config.run.seed, example.id),
    }  # fmt: skip
    for condition, generated in said.items():
        extracted = task.extract(generated.text)
        row[f"{condition}_full"] = generated.text
        row[f"{condition}_extracted"] = extracted
        row[f"{condition}_logprob"] = round(generated.logprob, 5)
        row[f"{condition}_correct"] = bool(task.is_right(extracted, example.gold))
        row |= {f"{condition}_{name}": value for name, value in task.measures(extracted, example.gold).items()}
    return row


def tune_router(rows: list[dict]) -> float:
    """The log-probability lead of the source above which its answer is taken; best on validation, middle of ties."""
    leads = np.array([r["source_logprob"] - r["target_logprob"] for r in rows])
    source, target = (np.array([is_correct(r, name) for r in rows]) for name in ("source", "target"))
    order = np.argsort(leads, kind="stable")
    # right[k]: the k smallest leads go to the target, the rest to the source
    right = np.concatenate([[0], np.cumsum(target[order])]) + np.concatenate(
        [np.cumsum(source[order][::-1])[::-1], [0]]
    )
    right[1:-1][np.diff(leads[order]) == 0] = -1  # no threshold tells equal leads apart
    best = np.flatnonzero(right == right.max())
    k = int(best[len(best) // 2])
    ends = np.concatenate([[leads[order[0]] - 1e-6], leads[order], [leads[order[-1]] + 1e-6]])
    return float((ends[k] + ends[k + 1]) / 2)


def count_flips(experiment: Experiment, examples: list[Example], bridge: Bridge, rows: list[dict]) -> dict:
    """Bridged answers that change though nothing but the arithmetic does: no difference below this means anything.

    With another batch size; on a GPU also step by step instead of by captured graphs, and with the whole prompt read in
    every row instead of a shared start once."""
    size, small = experiment.config.eval.eval_batch_size, max(1, experiment.config.eval.eval_batch_size // 8)
    states, target = experiment.source_states(examples), experiment.pair.target

    def flip(batch_size: int = 0) -> int:
        target.forget()
        said = decode_messages(experiment, bridge, examples, states, batch_size=batch_size)
        return sum(experiment.task.extract(g.text) != r["bridged_extracted"] for g, r in zip(said, rows, strict=True))

    found = {"batch_sizes": [size, small], "flipped": flip(small), "n": len(rows)}
    usual = target.captures, target.in_parts
    try:
        if target.captures:
            target.captures = False
            found["eager"] = flip()
            if target.in_parts and not bridge.injector.reads_each_step:  # other injectors begin behind a shared start
                target.in_parts = False
                found["unshared"] = flip()
    finally:
        target.captures, target.in_parts = usual
        target.forget()
    return found


# ---- what the bridge attends to, kept small -------------------------------------------------------------------------


def classify_tokens(lm: LanguageModel, example: Example, row: list[int]) -> list[int]:
    """For each source token: 1 if it is part of the question's unit word, 2 if a digit, else 0."""
    pieces = [lm.tokenizer.decode([i]) for i in row]
    classes = [2 if p.strip().isdigit() else 0 for p in pieces]
    if example.unit:
        text, ends = "", []
        for p in pieces:
            text += p
            ends.append(len(text))
        start = text.find(example.unit)
        while start >= 0:
            for i, end in enumerate(ends):
                if end > start and end - len(pieces[i]) < start + len(example.unit):
                    classes[i] = 1
            start = text.find(example.unit, start + 1)
    return classes


def keep_attention(store: dict, message: Message, chunk, examples: list[Example], states: SourceStates) -> None:
    """Mean attention of all soft tokens per source token, and a few whole maps, under each example's id."""
    if message.attention is None:
        return
    for i, (index, example) in enumerate(zip(chunk, examples, strict=True)):
        weights = message.attention[i, :, : int(states.lengths[index])].float().cpu().numpy()
        store[f"mean/{example.id}"] = weights.mean(0).astype(np.float16)
        store[f"class/{example.id}"] = np.array(classify_tokens(states.lm, example, states.rows[index]), np.int8)
        if index < FULL_MAPS:
            store[f"map/{example.id}"] = weights.astype(np.float16)
            tokens = [states.lm.tokenizer.decode([t]) for t in states.rows[index]]
            store[f"tokens/{example.id}"] = np.array(tokens, dtype=np.str_)


def select_attention(store: dict[str, np.ndarray], example_id: str) -> dict[str, np.ndarray]:
    """What `keep_attention` has put there about one example."""
    return {k: store[k] for k in (f"{kind}/{example_id}" for kind in KINDS) if k in store}


def save_attention(store: dict[str, np.ndarray], path: Path) -> None:
    """One file without pickles: padded mean attention and token classes, row by id, and the whole maps."""
    ids = sorted(k.split("/", 1)[1] for k in store if k.startswith("mean/"))
    if not ids:
        return
    width = max(len(store[f"mean/{i}"]) for i in ids)
    mean, classes = np.zeros((len(ids), width), np.float16), np.full((len(ids), width), -1, np.int8)
    for row, i in enumerate(ids):
        mean[row, : len(store[f"mean/{i}"])] = store[f"mean/{i}"]
        classes[row, : len(store[f"class/{i}"])] = store[f"class/{i}"]
    maps = {k: store[k] for k in sorted(store) if k.startswith(("map/", "tokens/"))}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, ids=np.array(ids), mean=mean, token_class=classes, **maps)
    write_bytes_atomic(path, buffer.getvalue())
