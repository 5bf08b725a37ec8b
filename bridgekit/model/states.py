"""What a bridge reads: the source's token ids, their captured states, and which source tokens stand for which place.

Shapes: B batch, S source tokens, L captured layers, D_s source hidden size.
"""

import math

import numpy as np
import torch

from bridgekit.model.pair import LanguageModel, pad_ids, split_prompts
from bridgekit.tasks import Example, literal_prompt, source_prompt


def read_source(lm: LanguageModel, examples: list[Example], view: str, solutions: dict[str, str]) -> list[list[int]]:
    """Token ids of what the bridge reads: the source's prompt, with its own solution, or the facts alone."""
    prompts = [source_prompt(e) for e in examples]
    if view == "facts":
        return [lm.bos + ids for ids in lm.tokenize([p.prefix for p in prompts])]
    rows = [lm.bos + p.all for p in split_prompts(lm, prompts)]
    if view == "solution":
        worked = lm.tokenize([solutions[e.id] for e in examples])
        rows = [row + answer for row, answer in zip(rows, worked, strict=True)]
    return rows


def align_tokens(source: LanguageModel, target: LanguageModel, examples: list[Example]) -> list[list[int]]:
    """For each place of the target's literal prompt the source tokens that cover the same characters.

    -> rows of from, to, from, to, ... ; both tokenizers cut the same text at other places, and the source's prompt may
    have facts in front. BOS stands for BOS."""
    rows, first = [], len(source.bos)
    read, asked = [source_prompt(e) for e in examples], [literal_prompt(e) for e in examples]
    offsets = zip(source.offsets([p.text for p in read]), target.offsets([p.text for p in asked]), strict=True)
    for of_source, of_target, (theirs, ours) in zip(read, asked, offsets, strict=True):
        starts, ends = np.array(theirs).T
        own_starts, own_ends = np.array(ours).T + len(of_source.prefix) - len(of_target.prefix)
        start = first + np.searchsorted(ends, own_starts, "right")  # the first token that ends after our first letter
        end = first + np.searchsorted(starts, own_ends, "left")
        rows.append([0, first] * len(target.bos) + np.stack([start, end], 1).flatten().tolist())
    return rows


def in_batches(lengths, size: int) -> list[np.ndarray]:
    """Indices of rows in batches of like length, so that little is padding: the shortest first, `size` at most."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


class Ragged:
    """Rows of token ids of unequal length, padded once; a batch is a gather, trimmed to its own longest row."""

    def __init__(self, rows: list[list[int]], device: torch.device):
        self.rows, self.lengths = rows, np.array([len(r) for r in rows])
        self.ids, self.mask = pad_ids(rows, device)

    def take(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T), (B, T)"""
        rows, width = torch.from_numpy(indices).to(self.ids.device), int(self.lengths[indices].max())
        return self.ids[rows, :width], self.mask[rows, :width]


class SourceStates(Ragged):
    """Frozen source states of a list of prompts, kept in one flat tensor or computed when asked.

    `spans` are the rows of `align_tokens`, for an injector that needs them."""

    def __init__(self, lm: LanguageModel, rows: list[list[int]], layers: tuple[int, ...], budget_gb: float, spans=None):
        super().__init__(rows, lm.device)
        self.lm, self.layers, self.spans = lm, layers, None if spans is None else Ragged(spans, lm.device)
        self.starts, self.flat = self.lengths.cumsum() - self.lengths, None
        shape = (int(self.lengths.sum()), len(layers), lm.hidden_size)
        if math.prod(shape) * lm.dtype.itemsize <= budget_gb * 1e9:
            self.flat = torch.empty(*shape, dtype=lm.dtype, device=lm.device)
            for chunk in in_batches(self.lengths, 256):
                states, mask = self._compute(chunk)
                self.flat[self._places(chunk)[mask]] = states[mask]

    def _compute(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = self.take(indices)
        return self.lm.hidden_states(ids, mask.long(), self.layers), mask

    def _places(self, indices: np.ndarray) -> torch.Tensor:
        """Where the tokens of some prompts stand in the flat tensor, those of padding at its end. -> (B, S)"""
        places = self.starts[indices, None] + np.arange(self.lengths[indices].max())
        return torch.from_numpy(places.clip(max=len(self.flat) - 1)).to(self.flat.device)

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, L, D_s), (B, S) on the target's device; padding is zero"""
        if self.flat is None:
            states, mask = self._compute(indices)
        else:
            states, (_, mask) = self.flat[self._places(indices)], self.take(indices)
        return (states * mask[..., None, None]).to(device), mask.to(device)

    def alignment(self, indices: np.ndarray, device: torch.device) -> torch.Tensor | None:
        """(B, P, 2); a place beyond a row's own prompt has an empty span"""
        return None if self.spans is None else self.spans.take(indices)[0].unflatten(1, (-1, 2)).to(device)
