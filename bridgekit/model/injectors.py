"""What a target does with a message: soft tokens in its prompt, residuals through gated cross-attention, or its cache.

Everything but the prefix starts closed: its gates are zero, and the target's logits are exactly those it has alone.
Shapes: B batch, T target places, K message tokens, P places of the literal prompt, D_t hidden and D_kv cache width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import nn

from bridgekit.config import ConfigError
from bridgekit.model.adapter import add_to
from bridgekit.model.attention import is_step
from bridgekit.model.message import Injector, Message
from bridgekit.model.producers import Attention, average_spans
from bridgekit.model.tryout import takes_soft_tokens, try_projections
from bridgekit.tasks.models import pick_layers

GATE_SPEED = 10.0  # tanh(10 x): a scalar that starts at zero would need the whole training to open at the usual rate


class Prefix(Injector):
    """Soft tokens in the target's prompt; the target itself is left as it is."""

    reads_each_step = False

    def __init__(self, config=None, target=None):
        super().__init__(config, target)
        if target is not None and not takes_soft_tokens(target.parts, target.sample):
            kind = target.model.config.model_type
            why = f"{kind} reads more of a token than its embedding, so it cannot read soft tokens: use residual"
            raise ConfigError(f"bridge.injector: {config.injector}: {why}")

    def soft(self, message: Message) -> Message:
        return message


class Gate(nn.Module):
    """A learned factor, -1 to 1, that starts at zero."""

    def __init__(self):
        super().__init__()
        self.opening = nn.Parameter(torch.zeros(()))

    def forward(self) -> torch.Tensor:
        return (GATE_SPEED * self.opening).tanh()


class Reading(nn.Module):
    """One layer's gated cross-attention from the target's hidden states to the message."""

    def __init__(self, config, width: int):
        super().__init__()
        self.norm_hidden, self.norm_message = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attend = Attention(config.bridge_dim, config.heads, config.dropout, width)
        self.gate = Gate()

    def forward(self, hidden, message: Message):
        """(B, T, D_t) -> with what the message adds, (B, T, D_t)"""
        queries, tokens = self.norm_hidden(hidden.float()), self.norm_message(message.tokens)
        update, _ = self.attend(queries, tokens, message.mask, message.seeds)
        return hidden + (self.gate() * update).to(hidden.dtype)


class Residual(Injector):
    """The literal prompt stays; the message enters after chosen layers, at every place and every step."""

    def __init__(self, config, target):
        super().__init__()
        self.layers = pick_layers(target, config.inject_layers, "bridge.inject_layers")
        self.readings = nn.ModuleList(Reading(config, target.hidden_size) for _ in self.layers)

    @contextmanager
    def attach(self, target, current: Callable[[], Message]) -> Iterator[None]:
        def add(reading, module, inputs, output):
            hidden = output[0] if isinstance(output, tuple) else output  # some families' layers give more
            with self.precision(hidden):
                new = reading(hidden, current())
            return (new, *output[1:]) if isinstance(output, tuple) else new

        with ExitStack() as hooks:
            for index, reading in zip(self.layers, self.readings, strict=True):
                hooks.callback(target.layers[index].register_forward_hook(partial(add, reading)).remove)
            yield

    def gates(self) -> dict[str, float]:
        return {f"layer{i}": r.gate().item() for i, r in zip(self.layers, self.readings, strict=True)}


class PrefixAndResidual(Prefix, Residual):
    """The same message twice: as soft tokens, and through gated cross-attention."""

    reads_each_step = True


class Fuser(nn.Module):
    """What is added to one layer's keys or values of the prompt, from their own and the aligned message token."""

    def __init__(self, config, width: int, cache_width: int):
        super().__init__()
        self.norm_own, self.norm_message = nn.LayerNorm(cache_width), nn.LayerNorm(width)
        dim = config.bridge_dim
        if config.kv_mix == "linear":  # digits add up in it: values that training lacks are more than new words
            self.mix = nn.Linear(cache_width + width, cache_width)
        else:
            self.mix = nn.Sequential(nn.Linear(cache_width + width, dim), nn.GELU(), nn.Linear(dim, cache_width))
        self.gate = Gate()

    def forward(self, own, aligned):
        """(B, T, D_kv), (B, T, D_t) -> (B, T, D_kv)"""
        both = torch.cat([self.norm_own(own.float()), self.norm_message(aligned)], -1)
        return (self.gate() * self.mix(both)).to(own.dtype)


class CacheFusion(Injector):
    """The target's own keys and values of the prompt, plus a gated projection of the aligned message tokens.

    The message has one token per source token. Keys are changed before their rotation, so that a fused key keeps its
    place. Only the prompt's pass is touched: what is decoded afterwards reads the fused cache.
    """

    aligned, reads_each_step = True, False

    def __init__(self, config, target):
        super().__init__()
        self.layers = pick_layers(target, config.inject_layers, "bridge.inject_layers")
        found = {i: try_projections(target.parts, i, target.sample) for i in self.layers}
        if without := [str(i) for i, projections in found.items() if projections is None]:
            kind, others = target.model.config.model_type, [str(i) for i in found if found[i]]
            out = f"bridge.inject_layers={','.join(others)} or residual" if others else "residual"
            why = f"{kind} has layers without plain keys and values ({', '.join(without)}): use {out}"
            raise ConfigError(f"bridge.injector: kv: {why}")
        for name, projections in zip(("keys", "values"), zip(*found.values(), strict=True), strict=True):
            fusers = (Fuser(config, target.hidden_size, projection.width) for projection in projections)
            self.add_module(name, nn.ModuleList(fusers))

    @contextmanager
    def attach(self, target, current: Callable[[], Message]) -> Iterator[None]:
        aligned: list[torch.Tensor] = []  # in the prompt's pass: each place's message token, and whether it has one

        def look(module, inputs, options):
            """Before each pass: which message token belongs to each place; nothing while decoding."""
            cache, places = options.get("past_key_values"), options.get("position_ids")
            aligned.clear()
            if not is_step() and (cache is None or cache.get_seq_length() == 0):
                mask = options.get("attention_mask")
                if places is None and mask is not None:  # a family that counts places by the mask
                    places = (mask.long().cumsum(1) - 1).clamp(min=0)
                elif places is None:  # right-padded: a place is its index
                    rows, width, _ = options["inputs_embeds"].shape
                    places = torch.arange(width, device=target.device).expand(rows, -1)
                aligned.extend(align_message(current(), places))

        def fuse(fuser, own):
            if not aligned:
                return None
            with self.precision(own):
                return fuser(own, aligned[0]) * aligned[1][..., None].to(own.dtype)

        with ExitStack() as hooks:
            hooks.callback(target.decoder.register_forward_pre_hook(look, with_kwargs=True).remove)
            for index, keys, values in zip(self.layers, self.keys, self.values, strict=True):
                for projection, fuser in zip(target.parts.projections(index), (keys, values), strict=True):
                    hooks.enter_context(add_to(projection, partial(fuse, fuser)))
            yield

    def gates(self) -> dict[str, float]:
        parts = (("keys", self.keys), ("values", self.values))
        return {f"layer{i}.{name}": f.gate().item() for name, fs in parts for i, f in zip(self.layers, fs, strict=True)}


def align_message(message: Message, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean of the message tokens that stand for each target place. (B, T) -> (B, T, D_t), (B, T) bool

    `message.alignment` (B, P, 2) gives each place's first message token and the one after its last."""
    if message.alignment is None:
        raise ValueError("this injector needs a token alignment between the source's and the target's prompts")
    n = message.alignment.shape[1]
    spans = message.alignment.gather(1, places.clamp(max=n - 1)[..., None].expand(-1, -1, 2))
    start, end = spans.unbind(-1)
    return average_spans(message.tokens, message.mask, start, end), (places < n) & (end > start)


INJECTORS = {"prefix": Prefix, "residual": Residual, "prefix+residual": PrefixAndResidual, "kv": CacheFusion}
