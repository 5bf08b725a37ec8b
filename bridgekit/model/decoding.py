"""One place more of every row, in two ways that give the same text: with the model's own cache, or in two parts.

    steps = open_steps(lm, shared, rows, places)
    logits = steps.start(embeds, mask, positions, injector, message)     # of each row's next token
    logits = steps.next(chosen)

`OwnCache` works with any model of transformers. `TwoParts` reads a start that all rows share once, keeps each row's own
keys in room of a fixed size, and on a GPU replays a captured graph: at 8B parameters a step is then bound by reading
the weights, not by launching kernels. Its room and its graphs are kept for the next batch of the same size.
Shapes: B rows, T places, D hidden size, V vocabulary.
"""

from __future__ import annotations

import typing

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bridgekit.model.attention import Cache, Pass, Shared, attending, attends_in_parts
from bridgekit.model.message import Injector, Message

if typing.TYPE_CHECKING:
    from bridgekit.model.pair import LanguageModel

GROWTH = 32  # cache slots allocated at a time
PREFILL = 32768  # places that a prompt's pass takes at once
KEPT = 2  # rooms with their graphs that a model keeps


def open_steps(lm: LanguageModel, shared: Shared | None, rows: int, places: int) -> OwnCache | TwoParts:
    """What decodes `rows` rows of at most `places` own places. A room that is large enough is used once more."""
    if shared is None and not (lm.device.type == "cuda" and attends_in_parts(lm)):
        return OwnCache(lm)
    kept = lm.rooms
    for room in kept:
        if room.shared is shared and room.cache.places >= places and rows <= room.cache.rows <= 2 * rows:
            return room
    del kept[: len(kept) - KEPT + 1]
    kept.append(TwoParts(lm, shared, rows, -(-places // GROWTH) * GROWTH))
    return kept[-1]


class OwnCache:
    """Left-padded rows and the cache that transformers has for this model."""

    smallest = 0.75  # a batch shrinks when no larger share of its rows goes on
    side = "left"

    def __init__(self, lm: LanguageModel):
        self.lm, self.cache, self.message = lm, new_cache(lm), None

    def start(self, embeds, mask, positions, injector: Injector, message: Message | None) -> torch.Tensor:
        self.message, self.mask, self.positions = message, mask, positions
        return self._run(inputs_embeds=embeds)

    def next(self, chosen: torch.Tensor) -> torch.Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return self._run(input_ids=chosen[:, None])

    def _run(self, **inputs) -> torch.Tensor:
        inputs |= {"attention_mask": self.mask, "position_ids": self.positions, "past_key_values": self.cache}
        return self.lm.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.reorder_cache(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.message = self.message and self.message.select(rows)


class TwoParts:
    """Right-padded rows behind a shared start, in room of a fixed size; on a GPU each step is one captured graph."""

    smallest = 0.5
    side = "right"

    def __init__(self, lm: LanguageModel, shared: Shared | None, rows: int, places: int):
        self.lm, self.shared, self.n = lm, shared, rows
        self.cache = Cache(lm, rows, places)
        self.ids = torch.zeros(rows, dtype=torch.long, device=lm.device)
        self.injector: Injector | None = None
        self.is_ours = True  # a user's injector may do what no graph can hold
        self.message: Message | None = None  # of the rows of the pass that is under way
        self.static: Message | None = None  # of all rows, at the same place in memory for every batch
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def start(self, embeds, mask, positions, injector: Injector, message: Message | None) -> torch.Tensor:
        self.n, offset, hidden = len(embeds), len(self.shared or ()), []
        self.cache.lengths.zero_()
        self.cache.lengths[: self.n] = mask.sum(1)
        size = max(1, PREFILL // embeds.shape[1])
        for first in range(0, self.n, size):
            rows = slice(first, first + size)
            if message is not None:
                self.message = message.select(torch.arange(self.n, device=embeds.device)[rows])
            with attending(self.lm, Pass(self.shared, self.cache, first)):
                out = self.lm.decoder(
                    inputs_embeds=embeds[rows], position_ids=positions[rows] + offset, use_cache=False
                ).last_hidden_state
            last = (mask[rows].sum(1) - 1)[:, None, None].expand(-1, -1, out.shape[2])
            hidden.append(out.gather(1, last))
        self._hold(injector, message)
        return self.lm.head(torch.cat(hidden))[:, 0]

    def _hold(self, injector: Injector, message: Message | None) -> None:
        """Put the message where the captured graphs read it; with another injector or shape they are made anew."""
        needed = message is not None and injector.reads_each_step
        known = self.static if injector is self.injector else None
        if needed and known is not None and known.tokens.shape[1:] == message.tokens.shape[1:]:
            for room, fresh in ((known.tokens, message.tokens), (known.mask, message.mask)):
                room[: self.n] = fresh
        elif needed or self.static is not None:
            self.graphs.clear()
            rows = torch.arange(self.cache.rows, device=self.ids.device).clamp(max=self.n - 1)
            self.static = message.select(rows) if needed else None
            self.is_ours = not needed or type(injector).__module__.startswith("bridgekit.")
        self.injector = injector if needed else None

    def next(self, chosen: torch.Tensor) -> torch.Tensor:
        self.ids[: self.n] = chosen
        size = self.cache.rows
        while size // 2 >= self.n:
            size //= 2
        may_capture = self.lm.captures and self.is_ours
        if not may_capture or size not in self.graphs and not self._capture(size):
            return self._step(self.n)
        graph, logits = self.graphs[size]
        graph.replay()
        return logits[: self.n]

    def _step(self, rows: int) -> torch.Tensor:
        lengths = self.cache.lengths[:rows]
        places = lengths[:, None].long() + len(self.shared or ())
        if self.static is not None:
            self.message = Message(self.static.tokens[:rows], self.static.mask[:rows])
        with attending(self.lm, Pass(self.shared, self.cache, is_step=True)):
            embeds = self.lm.embed(self.ids[:rows, None])
            hidden = self.lm.decoder(inputs_embeds=embeds, position_ids=places, use_cache=False).last_hidden_state
        lengths.add_(1)
        return self.lm.head(hidden)[:, -1]

    def _capture(self, rows: int) -> bool:
        """A graph of one step of the first `rows` rows; trying it moves nothing. False where none is possible."""
        before, stream = self.cache.lengths.clone(), torch.cuda.Stream(self.lm.device)
        stream.wait_stream(torch.cuda.current_stream(self.lm.device))
        with torch.cuda.stream(stream):
            self._step(rows)
        torch.cuda.current_stream(self.lm.device).wait_stream(stream)
        self.cache.lengths.copy_(before)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                logits = self._step(rows)
            self.graphs[rows] = graph, logits
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # the model chooses by its numbers, as some mixtures of experts do: step by step then
            self.is_ours = False
        self.cache.lengths.copy_(before)
        return rows in self.graphs

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows alone, brought to the front."""
        self.cache.keep(rows)
        if self.static is not None:
            for room in (self.static.tokens, self.static.mask):
                room[: len(rows)] = room[rows]
        self.n = len(rows)


# ---- the cache ------------------------------------------------------------------------------------------------------


class PreallocatedLayer(DynamicLayer):
    """A cache layer that grows by GROWTH slots at a time.

    Concatenation copies the whole cache for every token: a tenth to a sixth of the time at 128 soft tokens or more."""

    keys = values = None  # the filled part of `slots`
    slots: tuple[torch.Tensor, torch.Tensor] | None = None
    filled: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **options):
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        # Where rows were taken out meanwhile, the keys are other tensors than the slots' filled part.
        if self.slots is None or self.keys is not self.filled or new > self.slots[0].shape[-2]:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            shape = (*key_states.shape[:2], new + GROWTH)
            self.slots = tuple(s.new_empty(*shape, s.shape[-1]) for s in (key_states, value_states))
            for slots, cached in zip(self.slots, (self.keys, self.values), strict=True):
                if old:
                    slots[:, :, :old] = cached
        for slots, fresh in zip(self.slots, (key_states, value_states), strict=True):
            slots[:, :, old:new] = fresh
        self.keys, self.values = (slots[:, :, :new] for slots in self.slots)
        self.filled = self.keys
        return self.keys, self.values


def new_cache(lm: LanguageModel) -> DynamicCache:
    cache = DynamicCache(config=lm.model.config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
