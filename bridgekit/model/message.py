"""The bridge contract: a producer makes a message once per question, an injector brings it into the target.

    message = bridge.encode(states, mask, seeds)         # Message, made once
    soft = bridge.injector.soft(message)                 # soft tokens to put into the prompt, or None
    with bridge.injector.attach(target, current): ...    # what else it does to the target, at every step

`current()` gives the message of the rows that are in the batch now: decoding drops rows that have ended. All noise and
dropout of a bridge is a function of each example's seed, so that batches, processes and devices change nothing.
Shapes: B batch, S source tokens, D_t target hidden size, K soft tokens, P target places.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Message:
    """What crosses the bridge. `attention` and `flow_error` are there when they were asked for and apply."""

    tokens: torch.Tensor  # (B, K, D_t)
    mask: torch.Tensor  # (B, K)
    alignment: torch.Tensor | None = None  # (B, P, 2): the message tokens, from and to, that stand for a target place
    attention: torch.Tensor | None = None  # (B, K, S), rows sum to one
    flow_error: torch.Tensor | None = None  # (B,)
    seeds: torch.Tensor | None = None  # (B,) of the examples, for an injector's dropout

    def select(self, rows: torch.Tensor) -> "Message":
        """The message of these rows alone, without what is only reported."""
        alignment, seeds = (None if x is None else x[rows] for x in (self.alignment, self.seeds))
        return Message(self.tokens[rows], self.mask[rows], alignment, seeds=seeds)


class Injector(nn.Module):
    """What the target does with a message; this one does nothing. The others stand in injectors.py."""

    aligned = False  # does it need to know which source token stands for which target token?
    reads_each_step = True  # does it look at the message for every new token, or only with the prompt?

    def __init__(self, config=None, target=None):
        super().__init__()
        self.half = False  # arithmetic in half precision, on a GPU: the bridge says so

    def precision(self, x: torch.Tensor) -> AbstractContextManager:
        """The context in which an injector computes."""
        return in_half(self.half, x.device)

    def soft(self, message: Message) -> Message | None:
        """What of a message stands in the target's prompt as soft tokens; None: nothing."""
        return None

    def attach(self, target, current: Callable[[], Message]) -> AbstractContextManager:
        """What is done to the target for as long as the context is open."""
        return nullcontext()

    def gates(self) -> dict[str, float]:
        """How far each gate is open, -1 to 1; empty where there is none."""
        return {}


def in_half(half: bool, device: torch.device) -> AbstractContextManager:
    """Matrix products in bfloat16 on a GPU, where `half` asks for it."""
    return torch.autocast("cuda", torch.bfloat16) if half and device.type == "cuda" else nullcontext()


# ---- randomness by seed -------------------------------------------------------------------------------------------

CPU_CHUNK, GPU_CHUNK = 1 << 17, 1 << 24  # hashes computed at a time; the numbers do not depend on it


def hashed_uniform(seeds: torch.Tensor, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Uniform numbers in (0, 1) that depend on each example's seed alone. (B,) -> (B, n), the first n of a stream

    A counter-based generator: the same in any batch, process or device, which torch's own generators are not.
    """
    out = torch.empty(len(seeds), n, dtype=dtype, device=seeds.device)
    for start, end, bits in _hashes(seeds, n):
        out[:, start:end] = _uniform(bits)
    return out


def hashed_normal(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise by each example's seed. (B,) -> (B, *shape); a longer shape begins with a shorter one's"""
    n = math.prod(shape)
    out = torch.empty(len(seeds), n, device=seeds.device)
    for start, end, bits in _hashes(seeds, 2 * n):
        radius, angle = _uniform(bits).unflatten(1, (-1, 2)).unbind(-1)
        out[:, start // 2 : end // 2] = (-2 * radius.log()).sqrt() * (2 * torch.pi * angle).cos()
    return out.view(-1, *shape)


class Dropout(nn.Module):
    """Dropout whose mask depends on the example's seed and the element's place alone, not on the batch or its padding.

    Places are counted along the flattened example, so what is padded must be its first dimension, on the right.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p, self.salt = p, 0  # the bridge numbers its dropouts, so that no two have the same mask

    def forward(self, x: torch.Tensor, seeds: torch.Tensor | None) -> torch.Tensor:
        """(B, ...), (B,) -> (B, ...)"""
        if not self.training or self.p == 0:
            return x
        if seeds is None:
            raise ValueError("dropout needs each example's seed: pass the producer's `seeds`, or Message(seeds=...)")
        return x * self.mask(x, seeds)

    def mask(self, x: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        """0, or 1 / (1 - p), for each element of x (B, ...), in its dtype. Each hash decides two of them."""
        n, threshold = x[0].numel(), round(self.p * 0x10000)
        mask = x.new_empty(len(x), n + n % 2)
        for start, end, bits in _hashes(seeds, (n + 1) // 2, self.salt):
            mask[:, 2 * start : 2 * end] = bits.view(torch.int16) >= threshold - 0x8000
        return mask[:, :n].mul_(0x10000 / (0x10000 - threshold)).reshape(x.shape)


def _hashes(seeds: torch.Tensor, n: int, salt: int = 0) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The first n of each seed's stream of 32-bit hashes, a bounded piece at a time: (start, end, (B, end - start))."""
    keys = _mix((seeds * 0x9E3779B + 0x7F4A7C15).int())
    if salt:
        keys = _mix(keys + (salt * 0x1B873593 & 0x7FFFFFFF))
    piece = max(2, (CPU_CHUNK if seeds.device.type == "cpu" else GPU_CHUNK) // max(1, len(seeds)) // 2 * 2)
    for start in range(0, n, piece):
        counter = torch.arange(start, min(start + piece, n), dtype=torch.int32, device=seeds.device)
        yield start, start + len(counter), _mix(keys[:, None] + counter * 0x2545F491)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit numbers in place. int32 wraps around, as unsigned numbers do; only its shift keeps the sign."""
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
        x = x.bitwise_xor_((x >> shift).bitwise_and_((1 << 32 - shift) - 1)).mul_(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _uniform(bits: torch.Tensor) -> torch.Tensor:
    return ((bits & 0xFFFFFF).double() + 0.5) / 0x1000000
