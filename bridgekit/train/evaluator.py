"""Evaluate every condition on one decode path, and write one line per example.

    rows = Evaluator(config, pair, accelerator, folder).evaluate(examples, bridges, step="final", conditions=(...))

Each process takes every n-th example and writes a part file per condition; the first merges them, in order. What a
row says depends on its example alone: sampler noise has a seed per example, and baselines of frozen models are kept
under the hash of everything they depend on. Shapes: B batch, S source tokens, K soft tokens.
"""

import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bridgekit.config import COMPUTED, CONDITIONS, Config
from bridgekit.model.bridge import Bridge
from bridgekit.model.generation import Generated, decode_bridged, generate_batch
from bridgekit.model.injectors import INJECTORS
from bridgekit.model.message import hashed_normal
from bridgekit.model.pair import LanguageModel, Pair, pick_layers, split_prompts
from bridgekit.model.states import SourceStates, align_tokens, read_source
from bridgekit.runs import read_jsonl, write_bytes_atomic, write_jsonl
from bridgekit.tasks.answers import INVALID, extract_answer
from bridgekit.tasks.base import Example, Prompt, literal_prompt, relay_prompt, source_prompt, told_prompt
from bridgekit.train.attention import keep_attention, merge_attention, pack_arrays
from bridgekit.train.data import split_rows

BASELINES = ("source", "target", "target_suffix", "target_told", "relay_full", "relay_cut", "relay_answer")


def sampler_seed(seed: int, example_id: str) -> int:
    return zlib.crc32(f"{seed} {example_id}".encode()) >> 1


class Evaluator:
    def __init__(self, config: Config, pair: Pair, accelerator, folder: Path):
        self.config, self.pair, self.accelerator, self.folder = config, pair, accelerator, Path(folder)
        self.layers = pick_layers(pair.source, config.bridge.source_layers)
        self.self_layers = pick_layers(pair.target, "auto")
        self.aligned = INJECTORS[config.bridge.injector].aligned
        self.cached: dict[str, Generated] = {}
        self.router_threshold: float | None = None

    # ---- one evaluation -------------------------------------------------------------------------------------

    def evaluate(
        self, examples: list[Example], bridges: dict[str, Bridge], step: str, conditions: tuple[str, ...],
        want_attention: bool = False, report: Callable[[str], None] = lambda text: None,
        donors: list[Example] | tuple = (),
    ) -> list[dict]:  # fmt: skip
        """Rows of all examples on the first process, an empty list on the others. `donors` holds the problems whose
        states `shuffled` reads, as far as they are not among the examples themselves."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        by_id = {e.id: e for e in (*donors, *examples)}
        local = examples[rank::world]
        parts = self.folder / ".parts" / step
        parts.mkdir(parents=True, exist_ok=True)
        self._load_cache(parts)
        self.accelerator.wait_for_everyone()  # what is cached must be the same for all before anybody adds to it
        said: dict[str, list[Generated]] = {}
        for condition in sorted(conditions, key=CONDITIONS.index):  # `relay_*` need what the source has said
            if condition in COMPUTED or (
                condition in ("constant", "constant_natural", "self_bridge") and condition not in bridges
            ):
                continue
            report(condition)
            attention = {} if condition == "bridged" and want_attention else None
            said[condition] = self._run(condition, local, by_id, said, bridges, attention)
            lines = [
                {"id": e.id, "full": g.text, "logprob": round(g.logprob, 5)}
                for e, g in zip(local, said[condition], strict=True)
            ]
            write_jsonl(parts / f"{condition}.{rank}.jsonl", lines)
            if attention is not None:
                write_bytes_atomic(parts / f"attention.{rank}.npz", pack_arrays(attention))
        self.accelerator.wait_for_everyone()
        rows = self._merge(parts, examples, list(said), step, world, want_attention) if rank == 0 else []
        if rank == 0:
            shutil.rmtree(parts)
        self.accelerator.wait_for_everyone()
        return rows

    def _merge(self, parts, examples, conditions, step, world, want_attention) -> list[dict]:
        texts = {
            c: {r["id"]: r for k in range(world) for r in read_jsonl(parts / f"{c}.{k}.jsonl")} for c in conditions
        }
        rows = [self._row(i, e, step, {c: texts[c][e.id] for c in conditions}) for i, e in enumerate(examples)]
        self._save_cache(rows, conditions)
        if self.router_threshold is not None and {"source", "target"} <= set(conditions):
            add_router(rows, self.router_threshold)
        write_jsonl(self.folder / f"eval_samples_step_{step}.jsonl", rows)
        if want_attention and "bridged" in conditions:
            merge_attention([parts / f"attention.{k}.npz" for k in range(world)], self.folder / "attention.npz")
        return rows

    def _row(self, index: int, example: Example, step: str, said: dict[str, dict]) -> dict:
        row = {
            "eval_step": step, "index": index, "question": example.question, "gold_full_text": example.solution,
            "gold_extracted": example.gold, "id": example.id, "split": example.split, "group": example.group,
            "unit": example.unit, "value": example.value, "novelty": example.novelty, "family": example.family,
            "steps": example.steps, "donor_id": example.donor_id, "donor_gold": example.donor_gold,
            "sampler_seed": sampler_seed(self.config.run.seed, example.id),
        }  # fmt: skip
        for condition, out in said.items():
            row[f"{condition}_full"] = out["full"]
            row[f"{condition}_extracted"] = extract_answer(out["full"])
            row[f"{condition}_logprob"] = out["logprob"]
        return row

    # ---- conditions -----------------------------------------------------------------------------------------

    def _run(self, condition, local, by_id, said, bridges, attention) -> list[Generated]:
        if condition in BASELINES:
            lm = self.pair.source if condition == "source" else self.pair.target
            return self._baseline(condition, lm, self._prompts(condition, local, said))
        reader = local
        if condition == "shuffled":
            lost = [e.id for e in local if e.donor_id not in by_id]
            if lost:  # its own states would make `shuffled` a second `bridged`
                raise ValueError(f"eval.conditions: 'shuffled' has no donor for {lost[0]}: take more problems")
            reader = [by_id[e.donor_id] for e in local]
        bridge = bridges["bridged" if condition in ("bridged", "shuffled", "zero", "noise") else condition]
        states = self.source_states(condition, reader)
        return self.decode_messages(condition, bridge, local, states, attention)

    def _prompts(self, condition: str, local: list[Example], said: dict) -> list[Prompt]:
        """The text of a condition that has no soft tokens."""
        if condition == "source":
            return [source_prompt(e) for e in local]
        if condition == "target_told":
            return [told_prompt(e) for e in local]
        if condition == "target_suffix" and self.config.bridge.prompt_mode == "soft_only":
            return [Prompt("", "") for _ in local]
        if not condition.startswith("relay"):
            return [literal_prompt(e) for e in local]
        if "source" not in said:
            raise ValueError(f"eval.conditions: '{condition}' hands over the source's answer: add 'source' before it")
        helpers = [g.text for g in said["source"]]
        if condition == "relay_cut":
            tokenizer, k = self.pair.target.tokenizer, self.config.bridge.n_soft_tokens
            cut = [ids[: k if k != -1 else None] for ids in self.pair.target.tokenize(helpers)]
            helpers = tokenizer.batch_decode(cut, skip_special_tokens=True)
        elif condition == "relay_answer":
            answers = [extract_answer(text) for text in helpers]
            helpers = ["" if a == INVALID else f"#### {a}" for a in answers]
        return [relay_prompt(e, h) for e, h in zip(local, helpers, strict=True)]

    def source_states(self, condition: str, reader: list[Example], cache_gb: float = 0) -> SourceStates:
        """What a bridge reads of these examples, in training and in evaluation alike; kept when it fits `cache_gb`.

        The target's own states for `self_bridge`, else the source's."""
        view = self.config.bridge.source_view
        if condition == "self_bridge":  # the target may read only what it can read anyway
            source, view, layers = self.pair.target, "prompt", self.self_layers
            reader = [replace(e, facts="") for e in reader]
        else:
            source, layers = self.pair.source, self.layers
        solutions = {}
        if view == "solution":
            texts = self._baseline("source", source, [source_prompt(e) for e in reader])
            solutions = {e.id: g.text for e, g in zip(reader, texts, strict=True)}
        spans = align_tokens(source, self.pair.target, reader) if self.aligned else None
        rows = read_source(source, reader, view, solutions)
        # A constant looks at nothing: it gets one token per prompt, and the source hardly runs.
        is_constant = condition.startswith("constant") or self.config.bridge.producer == "constant"
        if is_constant and self.config.bridge.n_soft_tokens != -1:
            rows = [row[:1] for row in rows]
        return SourceStates(source, rows, layers, cache_gb, spans)

    @torch.no_grad()
    def decode_messages(self, condition, bridge: Bridge, local, states: SourceStates, attention) -> list[Generated]:
        target, settings = self.pair.target, self.config.bridge
        pieces = split_prompts(target, [literal_prompt(e) for e in local])
        before, after = split_rows(target, pieces, settings.soft_position, settings.prompt_mode)
        seeds = np.array([sampler_seed(self.config.run.seed, e.id) for e in local])
        bridge.eval()

        def decode(chunk: np.ndarray) -> list[Generated]:
            hidden, mask = states.batch(chunk, target.device)
            noise_seeds = torch.from_numpy(seeds[chunk]).to(target.device)
            if condition == "zero":
                hidden = torch.zeros_like(hidden)
            elif condition == "noise":
                hidden = matched_noise(hidden, mask, noise_seeds)
            message = bridge.encode(
                hidden, mask, noise_seeds, alignment=states.alignment(chunk, target.device),
                want_attention=attention is not None,
            )  # fmt: skip
            if attention is not None:
                keep_attention(attention, message, mask, chunk, [local[i] for i in chunk], states)
            return decode_bridged(
                target, bridge, message, [before[i] for i in chunk], [after[i] for i in chunk],
                self.config.eval.max_new_tokens,
            )  # fmt: skip

        return self._in_batches(decode, [len(a) for a in after])

    def _in_batches(self, decode: Callable[[np.ndarray], list[Generated]], lengths: list[int]) -> list[Generated]:
        """Decode in batches of like length and put the results back in order."""
        order = np.argsort(lengths, kind="stable")
        results: list = [None] * len(lengths)
        size = self.config.eval.eval_batch_size
        for i in range(0, len(order), size):
            chunk = order[i : i + size]
            for j, result in zip(chunk, decode(chunk), strict=True):
                results[j] = result
        return results

    # ---- baselines, by content ------------------------------------------------------------------------------

    def _baseline(self, condition: str, lm: LanguageModel, prompts: list[Prompt]) -> list[Generated]:
        keys = [self._key(lm, p) for p in prompts]
        missing = [i for i, k in enumerate(keys) if k not in self.cached]
        if missing:
            rows = [lm.bos + p.all for p in split_prompts(lm, [prompts[i] for i in missing])]

            def decode(chunk: np.ndarray) -> list[Generated]:
                some = [rows[i] for i in chunk]
                return generate_batch(lm, some, [[] for _ in some], max_new_tokens=self.config.eval.max_new_tokens)

            for i, out in zip(missing, self._in_batches(decode, [len(r) for r in rows]), strict=True):
                self.cached[keys[i]] = out
        return [self.cached[k] for k in keys]

    def _key(self, lm: LanguageModel, prompt: Prompt) -> str:
        parts = [
            lm.fingerprint,
            str(lm.dtype),
            lm.device.type,
            self.config.eval.max_new_tokens,
            "greedy 1",
            prompt.text,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def _cache_file(self) -> Path:
        source, target = self.pair.source.fingerprint, self.pair.target.fingerprint
        name = f"{source}_{target}".replace("/", "-")
        return Path(self.config.run.cache_dir) / f"baselines_{name}.jsonl"

    def _load_cache(self, parts: Path) -> None:
        path = self._cache_file()
        if path.exists():
            self.cached |= {r["key"]: Generated(r["text"], r["logprob"], r["n"]) for r in read_jsonl(path)}
        self._known = set(self.cached)

    def _save_cache(self, rows: list[dict], conditions: list[str]) -> None:
        """The first process keeps its own new baselines; others' are cheap to make again on one process less."""
        fresh = {k: g for k, g in self.cached.items() if k not in self._known}
        if fresh:
            path = self._cache_file()
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = {r["key"]: r for r in read_jsonl(path)} if path.exists() else {}
            kept |= {k: {"key": k, "text": g.text, "logprob": g.logprob, "n": g.n_tokens} for k, g in fresh.items()}
            write_jsonl(path, kept.values())

    # ---- noise floor ----------------------------------------------------------------------------------------

    def count_flips(self, examples: list[Example], bridge: Bridge, rows: list[dict]) -> dict:
        """Bridged answers that change when the batch does: what no comparison on this machine can go below."""
        small = self.config.with_(eval_batch_size=max(1, self.config.eval.eval_batch_size // 8))
        other = Evaluator(small, self.pair, self.accelerator, self.folder)
        states = other.source_states("bridged", examples)
        again = other.decode_messages("bridged", bridge, examples, states, None)
        flipped = sum(extract_answer(g.text) != r["bridged_extracted"] for g, r in zip(again, rows, strict=True))
        sizes = [self.config.eval.eval_batch_size, small.eval.eval_batch_size]
        return {"batch_sizes": sizes, "flipped": flipped, "n": len(rows)}


def matched_noise(hidden: torch.Tensor, mask: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Random states with each layer's size, from each example's seed. (B, S, L, D)"""
    size = (hidden.float().pow(2).mean(-1, keepdim=True) * mask[..., None, None]).sum(1, keepdim=True)
    size = (size / mask.sum(1)[:, None, None, None]).sqrt()
    noise = hashed_normal(seeds, hidden.shape[1:])
    return (noise * size * mask[..., None, None]).to(hidden.dtype)


def tune_router(rows: list[dict]) -> float:
    """The log-probability lead of the source above which its answer is taken; best on validation, middle of ties."""
    lead = np.array([r["source_logprob"] - r["target_logprob"] for r in rows])
    source = np.array([r["source_extracted"] == r["gold_extracted"] for r in rows])
    target = np.array([r["target_extracted"] == r["gold_extracted"] for r in rows])
    order = np.argsort(lead, kind="stable")
    # right[k]: the k smallest leads go to the target, the rest to the source
    right = np.concatenate([[0], np.cumsum(target[order])]) + np.concatenate(
        [np.cumsum(source[order][::-1])[::-1], [0]]
    )
    right[1:-1][np.diff(lead[order]) == 0] = -1  # no threshold tells equal leads apart
    best = np.flatnonzero(right == right.max())
    k = int(best[len(best) // 2])
    ends = np.concatenate([[lead[order[0]] - 1e-6], lead[order], [lead[order[-1]] + 1e-6]])
    return float((ends[k] + ends[k + 1]) / 2)


def add_router(rows: list[dict], threshold: float) -> None:
    for row in rows:
        chosen = "source" if row["source_logprob"] - row["target_logprob"] > threshold else "target"
        row["router_full"] = row[f"{chosen}_full"]
        row["router_extracted"] = row[f"{chosen}_extracted"]
