"""From examples to tensors: tokenized once, source states cached when they fit, batches a pure function of the step.

Shapes: B batch, S source tokens, L captured layers, D_s source hidden size, A answer tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

from bridgekit.config import SOFT_INJECTORS, Config, ConfigError
from bridgekit.model.generation import pad_ids
from bridgekit.model.pair import LanguageModel, Pair, Pieces, split_at_soft, split_prompts
from bridgekit.tasks.base import Example, Prompt, literal_prompt, source_prompt


def indices_at(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The examples of a step, a function of (seed, step) alone: resuming and other process counts follow."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {e: np.random.default_rng([seed, int(e)]).permutation(n) for e in np.unique(places // n)}
    return np.array([orders[p // n][p % n] for p in places])


def noise_seeds(seed: int, step: int, batch_size: int) -> np.ndarray:
    """Sampler seeds of a step's slots."""
    return np.random.default_rng([seed, step, 77]).integers(0, 2**31, batch_size)


def read_source(lm: LanguageModel, examples: list[Example], view: str, solutions: dict[str, str]) -> list[list[int]]:
    """Token ids of what the bridge reads: the source's prompt, with its own solution, or the facts alone."""
    prompts = [source_prompt(e) for e in examples]
    if view == "facts":
        return [lm.bos + ids for ids in lm.tokenize([p.prefix for p in prompts])]
    rows = [lm.bos + p.all for p in split_prompts(lm, prompts)]
    if view == "solution":
        said = lm.tokenize([solutions[e.id] for e in examples])
        rows = [row + more for row, more in zip(rows, said, strict=True)]
    return rows


def align_tokens(source: LanguageModel, target: LanguageModel, examples: list[Example]) -> list[list[int]]:
    """For each place of the target's literal prompt the source tokens that cover the same characters.

    -> rows of from, to, from, to, ... ; both tokenizers cut the same text at other places, and the source's prompt may
    have facts in front. BOS stands for BOS."""
    rows = []
    read = [source_prompt(e) for e in examples]
    asked = [literal_prompt(e) for e in examples]
    theirs = source.tokenizer([p.text for p in read], add_special_tokens=False, return_offsets_mapping=True)
    ours = target.tokenizer([p.text for p in asked], add_special_tokens=False, return_offsets_mapping=True)
    first = len(source.bos)
    for p, q, mine, other in zip(read, asked, ours["offset_mapping"], theirs["offset_mapping"], strict=True):
        shift = len(p.prefix) - len(q.prefix)
        starts, ends = np.array(other).T
        row = [0, first] * len(target.bos)
        for a, b in mine:
            start = int(np.searchsorted(ends, a + shift, "right"))  # the first token that ends after our first letter
            row += [first + start, first + int(np.searchsorted(starts, b + shift, "left"))]
        rows.append(row)
    return rows


class Ragged:
    """Rows of unequal length, padded once; a batch is a gather, trimmed to its own longest row."""

    def __init__(self, rows: list[list[int]], device: torch.device):
        self.lengths = np.array([len(r) for r in rows])
        self.ids, self.mask = pad_ids(rows, device)

    def take(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T), (B, T)"""
        width = int(self.lengths[indices].max())
        rows = torch.from_numpy(indices).to(self.ids.device)
        return self.ids[rows, :width], self.mask[rows, :width]


class SourceStates:
    """Frozen source states of a list of prompts, kept in one flat tensor or computed when asked.

    `spans` are the alignments of `align_tokens`, for an injector that needs them."""

    def __init__(
        self, lm: LanguageModel, rows: list[list[int]], layers: tuple[int, ...], budget_gb: float,
        spans: list[list[int]] | None = None,
    ):  # fmt: skip
        self.lm, self.rows, self.layers = lm, rows, layers
        self.spans = None if spans is None else Ragged(spans, lm.device)
        self.lengths = np.array([len(r) for r in rows])
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)[:-1]])
        size = int(self.lengths.sum()) * len(layers) * lm.hidden_size * lm.dtype.itemsize
        self.flat = self._compute_all() if size <= budget_gb * 1e9 else None

    def _compute_all(self) -> torch.Tensor:
        """(tokens of all prompts, L, D_s); prompts of like length go together, so little is padding"""
        flat = torch.empty(
            int(self.lengths.sum()),
            len(self.layers),
            self.lm.hidden_size,
            dtype=self.lm.dtype,
            device=self.lm.device,
        )
        order = np.argsort(self.lengths, kind="stable")
        for i in range(0, len(order), 256):
            chunk = order[i : i + 256]
            states, mask = self._compute(chunk)
            places = np.concatenate([np.arange(self.starts[j], self.starts[j] + self.lengths[j]) for j in chunk])
            flat[torch.from_numpy(places).to(flat.device)] = states[mask]
        return flat

    def _compute(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = pad_ids([self.rows[i] for i in indices], self.lm.device)
        return self.lm.hidden_states(ids, mask.long(), self.layers), mask

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, L, D_s), (B, S) on the target's device; padding is zero"""
        if self.flat is None:
            states, mask = self._compute(indices)
        else:
            lengths = self.lengths[indices]
            places = self.starts[indices][:, None] + np.arange(lengths.max())
            mask = torch.from_numpy(np.arange(lengths.max()) < lengths[:, None]).to(self.flat.device)
            places = torch.from_numpy(np.minimum(places, len(self.flat) - 1)).to(self.flat.device)
            states = self.flat[places]
        states = states * mask[..., None, None]
        return states.to(device), mask.to(device)

    def alignment(self, indices: np.ndarray, device: torch.device) -> torch.Tensor | None:
        """(B, P, 2); a place beyond a row's own prompt has an empty span"""
        return None if self.spans is None else self.spans.take(indices)[0].unflatten(1, (-1, 2)).to(device)


@dataclass
class Batch:
    states: torch.Tensor  # (B, S, L, D_s)
    mask: torch.Tensor  # (B, S)
    seeds: torch.Tensor  # (B,) of the sampler's noise
    alignment: torch.Tensor | None  # (B, P, 2), for an injector that needs it
    before: tuple[torch.Tensor, torch.Tensor]  # ids and mask of the target's text before the soft tokens
    after: tuple[torch.Tensor, torch.Tensor]  # and after them, without the answer
    literal: tuple[torch.Tensor, torch.Tensor]  # the whole literal prompt, for the KL teacher
    labels: torch.Tensor  # (B, A), the answer with its end token
    labels_mask: torch.Tensor  # (B, A)
    marker: torch.Tensor  # (B, A), True on the tokens of `####`
    final: tuple[torch.Tensor, torch.Tensor]  # the answer's last line, from `####` on, with its end token


class TrainingTexts:
    """What the target reads of all training examples, tokenized; shared by a bridge and its controls."""

    def __init__(self, config: Config, target: LanguageModel, examples: list[Example]):
        mode = config.bridge.train_prompt_mode
        mode = config.bridge.prompt_mode if mode == "same" else mode
        pieces = split_prompts(target, [literal_prompt(e) for e in examples])
        before, after = split_rows(target, pieces, config.bridge.soft_position, mode)
        answers, markers = tokenize_answers(target, [e.solution for e in examples])
        finals = [a[m.index(1) if 1 in m else len(a) :] for a, m in zip(answers, markers, strict=True)]
        first = config.loss.answer_tokens or None
        answers, markers = [a[:first] for a in answers], [m[:first] for m in markers]
        rows = [before, after, [target.bos + p.all for p in pieces], answers, markers, finals]
        self.device = target.device
        ragged = (Ragged(r, target.device) for r in rows)
        self.before, self.after, self.literal, self.answers, self.markers, self.finals = ragged


class TrainingSet:
    """Texts and source states of all training examples; `batch` gathers what a step needs."""

    def __init__(self, texts: TrainingTexts, states: SourceStates):
        self.texts, self.states = texts, states

    def batch(self, indices: np.ndarray, seeds: np.ndarray) -> Batch:
        texts = self.texts
        states, mask = self.states.batch(indices, texts.device)
        labels, labels_mask = texts.answers.take(indices)
        marker, _ = texts.markers.take(indices)
        return Batch(
            states, mask, torch.from_numpy(seeds).to(texts.device), self.states.alignment(indices, texts.device),
            texts.before.take(indices), texts.after.take(indices), texts.literal.take(indices), labels, labels_mask,
            marker.bool() & labels_mask, texts.finals.take(indices),
        )  # fmt: skip


def split_rows(lm: LanguageModel, pieces: list[Pieces], position: str, mode: str) -> tuple[list, list]:
    """Rows of token ids before and after the soft tokens."""
    both = [split_at_soft(lm, p, position, mode) for p in pieces]
    return [b for b, _ in both], [a for _, a in both]


def tokenize_answers(lm: LanguageModel, solutions: list[str]) -> tuple[list[list[int]], list[list[int]]]:
    """Answer ids ending in the end token, and for each token whether it belongs to the `####` marker."""
    encoded = lm.tokenizer(solutions, add_special_tokens=False, return_offsets_mapping=True)
    end = min(lm.eos_ids)
    answers, markers = [], []
    for text, ids, offsets in zip(solutions, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        start = text.rfind("####")
        answers.append([*ids, end])
        markers.append([int(start >= 0 and a < start + 4 and b > start) for a, b in offsets] + [0])
    return answers, markers


def check_fit(config: Config, pair: Pair, prompts: list[Prompt]) -> None:
    """Refuse more soft tokens, text and answer than the target has positions."""
    longest = max(len(p.all) for p in split_prompts(pair.target, prompts))
    soft = config.bridge.n_soft_tokens if config.bridge.injector in SOFT_INJECTORS else 0
    if soft == -1:
        soft = min(2048, max(len(p.all) + 1 for p in split_prompts(pair.source, prompts)))
    needed = 1 + soft + longest + config.eval.max_new_tokens
    if needed > pair.target.max_positions:
        raise ConfigError(
            f"bridge.n_soft_tokens: {soft} soft tokens, {longest} prompt tokens and {config.eval.max_new_tokens} new "
            f"ones need {needed} positions; the target has {pair.target.max_positions}: use fewer soft tokens"
        )
