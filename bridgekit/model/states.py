"""What a bridge reads: the source's token ids, their captured states, and which source tokens stand for which place.

Shapes: B batch, S source tokens, L captured layers, D_s source hidden size.
"""

import math
import os

import numpy as np
import psutil
import torch

from bridgekit.model.attention import Pass, attending, share_rows
from bridgekit.model.pair import LanguageModel, Pieces, format_prompts, pad_ids, split_prompts
from bridgekit.tasks import Example, literal_prompt, source_prompt

MOST_PLACES = 1 << 16  # that the source reads at once


def read_source(lm: LanguageModel, examples: list[Example], view: str, solutions: dict[str, str]) -> list[list[int]]:
    """Token ids of what the source reads: its prompt, with its own solution, or the facts alone.

    Of the view `question` it reads the whole prompt, and the bridge what comes after the shared start."""
    prompts = [source_prompt(e) for e in examples]
    if view == "facts":
        return [lm.bos + ids for ids in lm.tokenize([p.prefix for p in prompts])]
    rows = [lm.bos + p.all for p in split_prompts(lm, prompts)]
    if view == "solution":
        worked, _ = lm.tokenize_after(
            [p.text for p in format_prompts(lm, prompts)], [solutions[e.id] for e in examples]
        )
        rows = [row + answer for row, answer in zip(rows, worked, strict=True)]
    return rows


def align_tokens(source: LanguageModel, target: LanguageModel, examples: list[Example]) -> list[list[int]]:
    """For each place of the target's literal prompt the source tokens that cover the same characters.

    -> rows of from, to, from, to, ... ; both tokenizers cut the same text at other places, and the source's prompt may
    have facts in front. BOS stands for BOS."""
    rows, first = [], len(source.bos)
    read = format_prompts(source, [source_prompt(e) for e in examples])
    asked = format_prompts(target, [literal_prompt(e) for e in examples])
    _, of_read = source.locate([p.text for p in read])
    _, of_asked = target.locate([p.text for p in asked])
    for of_source, of_target, theirs, ours in zip(read, asked, of_read, of_asked, strict=True):
        starts, ends = np.array(theirs).T
        own_starts, own_ends = np.array(ours).T + len(of_source.prefix) - len(of_target.prefix)
        start = first + np.searchsorted(ends, own_starts, "right")  # the first token that ends after our first letter
        end = first + np.searchsorted(starts, own_ends, "left")
        rows.append([0, first] * len(target.bos) + np.stack([start, end], 1).flatten().tolist())
    return rows


def in_batches(lengths, size: int) -> list[np.ndarray]:
    """Indices of rows in batches of like length, so that little is padding, `size` at most.

    The longest come first: room that is enough for them is enough for all, and what does not fit fails at once."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def count_shared(lm: LanguageModel, pieces: list[Pieces]) -> int:
    """How many tokens, BOS among them, all prompts of the task begin with; 0 where they have nothing in common."""
    n = min((p.n_shared for p in pieces), default=0)
    return len(lm.bos) + n if n else 0


class Ragged:
    """Rows of token ids of unequal length, padded once; a batch is a gather, trimmed to its own longest row."""

    def __init__(self, rows: list[list[int]], device: torch.device):
        self.rows, self.lengths = rows, np.array([len(r) for r in rows])
        self.ids, self.mask = pad_ids(rows, device)

    def take(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T), (B, T)"""
        rows, width = torch.as_tensor(indices, device=self.ids.device), int(self.lengths[indices].max())
        return self.ids[rows, :width], self.mask[rows, :width]


class FlatStates:
    """States of rows of unequal length, one after the other in one tensor; a batch is a gather. (places, ...)"""

    def __init__(self, lengths: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        self.lengths, self.starts = lengths, lengths.cumsum() - lengths
        self.states = torch.empty(int(lengths.sum()), *shape, dtype=dtype, device=device)

    @classmethod
    def find_room(
        cls, lengths: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, gb: float
    ) -> torch.device | None:
        """Where they can be kept: on the model's device within `gb`, else in a part of the memory that is available."""
        size = int(lengths.sum()) * math.prod(shape) * dtype.itemsize
        if size <= gb * 1e9:
            return device
        if not gb or device.type == "cpu":
            return None
        beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # each process keeps its own
        return torch.device("cpu") if size <= psutil.virtual_memory().available / 4 / beside else None

    def _places(self, indices: np.ndarray) -> torch.Tensor:
        """Where the tokens of some rows stand, those of padding at the end. -> (B, S)"""
        places = self.starts[indices, None] + np.arange(self.lengths[indices].max())
        return torch.from_numpy(places.clip(max=len(self.states) - 1)).to(self.states.device)

    def put(self, indices: np.ndarray, states: torch.Tensor, mask: torch.Tensor) -> None:
        """(B, S, ...), (B, S)"""
        self.states[self._places(indices)[mask.to(self.states.device)]] = states[mask].to(self.states.device)

    def take(self, indices: np.ndarray, device: torch.device) -> torch.Tensor:
        """(B, S, ...) on a device that does not wait for it; what is padding is any state"""
        states = self.states[self._places(indices)]
        waits = states.device == device or device.type != "cuda"
        return states.to(device) if waits else states.pin_memory().to(device, non_blocking=True)


def in_parts(lengths: np.ndarray, size: int = 256) -> list[np.ndarray]:
    """Batches of like length, of at most MOST_PLACES tokens."""
    batches = in_batches(lengths, size)
    pieces = [-(-len(batch) * int(lengths[batch].max()) // MOST_PLACES) for batch in batches]
    return [part for batch, n in zip(batches, pieces, strict=True) for part in np.array_split(batch, n)]


class SourceStates:
    """Frozen source states of a list of prompts, kept in one flat tensor or computed when asked.

    The states of the `n_shared` tokens that all rows begin with are computed once; a bridge that does not
    `read_shared` is not given them. `rows` and `lengths` are of what the bridge reads. `spans` are the rows of
    `align_tokens`, for an injector that needs them."""

    def __init__(
        self, lm: LanguageModel, rows: list[list[int]], layers: tuple[int, ...], budget_gb: float, spans=None,
        n_shared: int = 0, read_shared: bool = True,
    ):  # fmt: skip
        self.lm, self.layers, self.flat, self.front = lm, layers, None, None
        self.shared, own = share_rows(lm, rows, n_shared)
        self.own = Ragged(own, lm.device)
        skipped = 0 if read_shared else n_shared
        self.rows = [row[skipped:] for row in rows]
        self.lengths = np.array([len(row) for row in self.rows])
        self.cut = 0 if self.shared else skipped  # places that are computed with each row, and not given to the bridge
        if self.shared and read_shared:
            ids = torch.tensor([self.shared.ids], device=lm.device)
            self.front = lm.hidden_states(ids, torch.ones_like(ids), layers)
        self.spans = None if spans is None else Ragged([[max(0, i - skipped) for i in row] for row in spans], lm.device)
        lengths, shape = self.own.lengths, (len(layers), lm.hidden_size)
        if room := FlatStates.find_room(lengths, shape, lm.dtype, lm.device, budget_gb):
            self.flat = FlatStates(lengths, shape, lm.dtype, room)
            for part in in_parts(lengths):
                self.flat.put(part, *self._compute(part))

    def _compute(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = self.own.take(indices)
        if self.shared is None:
            return self.lm.hidden_states(ids, mask.long(), self.layers), mask
        places = len(self.shared) + torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        with attending(self.lm, Pass(self.shared)):
            return self.lm.hidden_states(ids, None, self.layers, position_ids=places), mask

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, L, D_s), (B, S) on the target's device; padding is zero"""
        if self.flat is None:
            states, mask = self._compute(indices)
        else:
            states, (_, mask) = self.flat.take(indices, self.lm.device), self.own.take(indices)
        states = states * mask[..., None, None]
        if self.front is not None:
            states = torch.cat([self.front.expand(len(states), -1, -1, -1), states], 1)
            mask = torch.nn.functional.pad(mask, (self.front.shape[1], 0), value=True)
        return states[:, self.cut :].to(device), mask[:, self.cut :].to(device)

    def alignment(self, indices: np.ndarray, device: torch.device) -> torch.Tensor | None:
        """(B, P, 2); a place beyond a row's own prompt has an empty span"""
        return None if self.spans is None else self.spans.take(indices)[0].unflatten(1, (-1, 2)).to(device)
