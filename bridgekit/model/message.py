"""The bridge contract: a producer makes a message once per question, an injector brings it into the target.

    message = bridge.encode(states, mask, seeds)         # Message, made once
    soft = bridge.injector.soft(message)                 # soft tokens to put into the prompt, or None
    with bridge.injector.attach(target, current): ...    # what else it does to the target, at every step

`current()` gives the message of the rows that are in the batch now: decoding drops rows that have ended.

Training, generation and evaluation use only these three lines, so any producer works with any injector.
Shapes: B batch, S source tokens, L captured layers, D_s and D_t hidden sizes, K soft tokens.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

MAX_SOFT_TOKENS = 2048  # the cap when there are as many soft tokens as source tokens


@dataclass
class Soft:
    """What an injector hands the decode loop: soft tokens (B, K, D_t) with their mask (B, K)."""

    tokens: torch.Tensor
    mask: torch.Tensor


@dataclass
class Message:
    """What crosses the bridge. `attention` and `flow_error` are there when they were asked for and apply."""

    tokens: torch.Tensor  # (B, K, D_t)
    mask: torch.Tensor  # (B, K)
    alignment: torch.Tensor | None = None  # (B, P, 2): the message tokens, from and to, that stand for a target place
    attention: torch.Tensor | None = None  # (B, K, S), rows sum to one
    flow_error: torch.Tensor | None = None  # (B,)

    def select(self, rows: torch.Tensor) -> "Message":
        alignment = None if self.alignment is None else self.alignment[rows]
        return Message(self.tokens[rows], self.mask[rows], alignment)


class Injector(nn.Module):
    """What the target does with a message; this one does nothing. The others stand in injectors.py."""

    aligned = False  # does it need to know which source token stands for which target token?

    def soft(self, message: Message) -> Soft | None:
        return None

    def attach(self, target, current: Callable[[], Message]) -> AbstractContextManager:
        return nullcontext()

    def gates(self) -> dict[str, float]:
        """How far each gate is open, -1 to 1; empty where there is none."""
        return {}


def hashed_uniform(seeds: torch.Tensor, n: int) -> torch.Tensor:
    """Uniform numbers in (0, 1) that depend on each example's seed alone. (B,) -> (B, n), the first n of a stream

    A counter-based generator: the same in any batch, process or device, which torch's own generators are not.
    """
    counter = torch.arange(n, device=seeds.device)
    bits = _mix(_mix(seeds[:, None] * 0x9E3779B + 0x7F4A7C15) + counter[None, :] * 0x2545F491)
    return ((bits & 0xFFFFFF).double() + 0.5) / 0x1000000


def hashed_normal(seeds: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Standard normal noise by each example's seed. (B,) -> (B, *shape); a longer shape begins with a shorter one's"""
    uniform = hashed_uniform(seeds, 2 * math.prod(shape)).unflatten(1, (-1, 2))
    noise = (-2 * uniform[..., 0].log()).sqrt() * (2 * torch.pi * uniform[..., 1]).cos()
    return noise.float().view(-1, *shape)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Scramble 32-bit counters held in int64; multiplications stay below 2**63."""
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 0x297A2D39)):
        x = x & 0xFFFFFFFF
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 16)
