"""Attention in two parts: a start that all rows share, computed once, and each row's own places.

    shared = share_start(lm, ids)                        # keys and values of the few-shot examples, once per run
    with attending(lm, Pass(shared)):                    # every place sees the start, and its own row as always
        lm.decoder(inputs_embeds=embeds, position_ids=len(shared) + places, use_cache=False)

The two parts meet in one softmax: each gives its output and its log-sum-exp, and both together are exact. The start is
never expanded over the batch, has no gradient, and is not run again. On a GPU in half precision both parts are flash
attention, which reads no more of a cache than is filled; elsewhere it is one masked attention over both parts.
Shapes: B rows, T places, P shared places, C cache places, H heads, G key-value heads, D size of a head.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if typing.TYPE_CHECKING:
    from bridgekit.model.pair import LanguageModel

NAME = "bridgekit_two_part"  # under which transformers knows this attention
FUSED = 2048  # hidden size from which compiling is worth its seconds
LEAST = 32  # shared tokens below which sharing saves nothing
UNKNOWN = ("softcap", "s_aux", "position_bias")  # options of attention that the two parts do not have
aten = torch.ops.aten


class Shared:
    """A start's token ids, and each layer's keys and values (1, P, G, D)."""

    def __init__(self, ids: tuple[int, ...], layers: list[tuple[torch.Tensor, torch.Tensor]]):
        self.ids, self.layers = ids, layers

    def __len__(self) -> int:
        return len(self.ids)


class Cache:
    """Room for each row's own keys and values (B, C, G, D) in every layer; `lengths` (B,) says how much is filled."""

    def __init__(self, lm: LanguageModel, rows: int, places: int):
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.rows, self.places = rows, places
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=lm.device)
        self.starts = torch.arange(rows + 1, dtype=torch.int32, device=lm.device)

    def put(self, layer: int, first: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """The keys and values of the rows from `first` on, at their beginning. (b, T, G, D)"""
        if layer == len(self.layers):
            shapes = ((self.rows, self.places, *x.shape[2:]) for x in (k, v))
            self.layers.append(tuple(k.new_zeros(shape) for shape in shapes))
        for room, fresh in zip(self.layers[layer], (k, v), strict=True):
            room[first : first + len(fresh), : fresh.shape[1]] = fresh

    def keep(self, rows: torch.Tensor) -> None:
        """Bring some rows to the front. (b,)"""
        for room in (x for layer in self.layers for x in layer):
            room[: len(rows)] = room[rows]
        self.lengths[: len(rows)] = self.lengths[rows]


class Pass:
    """What attention does in one pass: read a shared start, fill a cache from row `first` on, or go on from it."""

    def __init__(self, shared: Shared | None, cache: Cache | None = None, first: int = 0, is_step: bool = False):
        self.shared, self.cache, self.first, self.is_step = shared, cache, first, is_step

    def attend(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """(B, T, H, D), (B, T, G, D) twice -> (B, T, H, D)"""
        start = None if self.shared is None else self.shared.layers[layer]
        if self.cache is not None and not self.is_step:
            self.cache.put(layer, self.first, k.detach(), v.detach())
        flash = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
        if self.is_step:
            return (step_flash if flash else step_plain)(self.cache, layer, q, k, v, start, scale)
        if flash and start is not None:
            return TwoParts.apply(q, k, v, *start, scale)
        if start is None:
            return attend_plain(q, k, v, None, None, scale)
        places = torch.arange(k.shape[1], device=q.device)
        return attend_plain(q, k, v, start, places[:, None] >= places, scale)


# ---- the two parts --------------------------------------------------------------------------------------------------


def fold(x: torch.Tensor) -> torch.Tensor:
    """All rows' places as those of one row, which a shared start is read by. (B, T, H, D) -> (1, B * T, H, D)"""
    return x.reshape(1, -1, *x.shape[2:])


def fold_lse(lse: torch.Tensor) -> torch.Tensor:
    """(B, H, T) -> (1, H, B * T)"""
    return lse.transpose(0, 1).reshape(1, lse.shape[1], -1)


def join(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """One softmax of the two parts' (output (B, T, H, D), log-sum-exp (B, H, T))."""
    (a, lse_a), (b, lse_b) = parts
    share = (lse_b - lse_a).sigmoid().transpose(1, 2)[..., None].to(a.dtype)
    return torch.lerp(a, b, share), torch.logaddexp(lse_a, lse_b)


def flash(q, k, v, is_causal: bool, scale: float) -> tuple[torch.Tensor, ...]:
    out = aten._flash_attention_forward(q, k, v, None, None, q.shape[1], k.shape[1], 0.0, is_causal, False, scale=scale)
    return out[:4]  # output (B, T, H, D), log-sum-exp (B, H, T), and what the backward pass wants back


class TwoParts(torch.autograd.Function):
    """Causal attention inside each row, and to a shared start without a gradient.

    The backward pass of a part is that of flash attention with the joint output and log-sum-exp: its probabilities are
    then those of the joint softmax."""

    @staticmethod
    def forward(ctx, q, k, v, start_k, start_v, scale):
        b, t, h, _ = q.shape
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        own, own_lse, *own_state = flash(q, k, v, True, scale)
        read, read_lse, *read_state = flash(fold(q), start_k, start_v, False, scale)
        read_lse = read_lse.view(h, b, t).transpose(0, 1)
        out, lse = join([(own, own_lse), (read.view_as(own), read_lse)])
        ctx.save_for_backward(q, k, v, start_k, start_v, out, lse, *own_state, *read_state)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, start_k, start_v, out, lse, *states = ctx.saved_tensors
        grad, t, n = grad.contiguous(), q.shape[1], start_k.shape[1]
        own = aten._flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, t, t, 0.0, True, *states[:2], scale=ctx.scale
        )
        folded = (fold(grad), fold(q), start_k, start_v, fold(out), fold_lse(lse).contiguous())
        read = aten._flash_attention_backward(
            *folded, None, None, folded[1].shape[1], n, 0.0, False, *states[2:], scale=ctx.scale
        )
        return own[0] + read[0].view_as(q), own[1], own[2], None, None, None


def step_flash(cache: Cache, layer: int, q, k, v, start, scale: float) -> torch.Tensor:
    """One place more of each row: put into its cache, then the filled part is read. (B, 1, H, D)

    The heads that share their keys stand as places one after the other, so that keys are read once for all of them."""
    (b, _, h, d), g, (keys, values) = q.shape, k.shape[2], write(cache, layer, k, v)
    n, starts, lengths = h // g, cache.starts[: b + 1].to(q.device), cache.lengths[:b].to(q.device)
    q = q.view(b, g, n, d).transpose(1, 2).reshape(b * n, g, d)
    out, lse, *_ = aten._flash_attention_forward(
        q, keys.flatten(0, 1), values.flatten(0, 1), starts * n, starts * cache.places, n, cache.places,
        0.0, False, False, scale=scale, seqused_k=lengths + 1,
    )  # fmt: skip
    if start is not None:
        read, read_lse, *_ = flash(q[None], *start, False, scale)
        out = join([(out[None], lse.view(1, g, b * n)), (read, read_lse)])[0]
    return out.view(b, n, g, d).transpose(1, 2).reshape(b, 1, h, d)


def write(cache: Cache, layer: int, k: torch.Tensor, v: torch.Tensor) -> list[torch.Tensor]:
    """Each row's next place; -> all keys and all values of these rows. (B, C, G, D)"""
    rows = torch.arange(len(k), device=k.device)
    for room, fresh in zip(cache.layers[layer], (k, v), strict=True):
        room.index_put_((rows, cache.lengths[: len(k)].to(k.device).long()), fresh[:, 0])
    return [room[: len(k)] for room in cache.layers[layer]]


def step_plain(cache: Cache, layer: int, q, k, v, start, scale: float) -> torch.Tensor:
    keys, values = write(cache, layer, k, v)
    filled = torch.arange(cache.places, device=q.device) <= cache.lengths[: len(q), None].to(q.device)
    return attend_plain(q, keys, values, start, filled[:, None, None], scale)


def attend_plain(q, k, v, start, visible: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Both parts as one masked attention; `visible` (..., T, C) says which own places a place sees; None: those before.

    Without a mask the fast kernels can be used."""
    if start is not None:
        k, v = (torch.cat([s.expand(len(x), -1, -1, -1), x], 1) for s, x in zip(start, (k, v), strict=True))
        visible = F.pad(visible, (start[0].shape[1], 0), value=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    options = dict(scale=scale, is_causal=visible is None, enable_gqa=q.shape[1] != k.shape[1])
    out = F.scaled_dot_product_attention(q, k, v, visible, **options)
    return out.transpose(1, 2)


# ---- in a model of transformers -------------------------------------------------------------------------------------

NOW: list[Pass] = []  # the passes that are under way, the innermost last


def answer_transformers(module, query, key, value, attention_mask, scaling=None, **options):
    """What a model's attention calls. (B, H, T, D), (B, G, T, D) twice -> (B, T, H, D)"""
    window = options.get("sliding_window") or module.config.max_position_embeddings
    other = [name for name in UNKNOWN if options.get(name) is not None]
    if other or window < module.config.max_position_embeddings:
        raise ValueError(f"attention with {other or 'a sliding window'} has no two parts")
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    return NOW[-1].attend(module.layer_idx, q, k, v, scaling or q.shape[-1] ** -0.5), None


ALL_ATTENTION_FUNCTIONS.register(NAME, answer_transformers)


@contextmanager
def attending(lm: LanguageModel, now: Pass | None) -> Iterator[None]:
    """The model attends as `now` says, for as long as the context is open; with None as it always does."""
    if now is None:
        yield
        return
    config = lm.decoder.config
    usual = config._attn_implementation
    config._attn_implementation_internal = NAME
    NOW.append(now)
    try:
        yield
    finally:
        NOW.pop()
        config._attn_implementation_internal = usual


def is_step() -> bool:
    """Is a pass under way that decodes one place of each row?"""
    return bool(NOW) and NOW[-1].is_step


@torch.no_grad()
def share_start(lm: LanguageModel, ids: tuple[int, ...]) -> Shared | None:
    """The start's keys and values, of the last few starts asked for; None where sharing is no use or not possible."""
    if len(ids) < LEAST or not attends_in_parts(lm):
        return None
    known = lm.starts
    if ids not in known:
        for old in list(known)[:-3]:
            del known[old]
        known[ids] = read_start(lm, ids)
    return known[ids]


def read_start(lm: LanguageModel, ids: tuple[int, ...]) -> Shared:
    cache = DynamicCache(config=lm.model.config)
    lm.decoder(input_ids=torch.tensor([ids], device=lm.device), past_key_values=cache, use_cache=True)
    found = [tuple(x.transpose(1, 2).contiguous() for x in (c.keys, c.values)) for c in cache.layers]
    return Shared(ids, found)


@torch.no_grad()
def attends_in_parts(lm: LanguageModel) -> bool:
    """Does two-part attention give this model's own hidden states? Tried once, on a few tokens.

    Layers that look back a fixed number of places do so also where a few tokens cannot show it."""
    if lm.in_parts is None:
        tokens = (lm.sample * 12)[:12]
        ids = torch.tensor([tokens], device=lm.device)
        try:
            whole = lm.decoder(input_ids=ids, use_cache=False).last_hidden_state[:, 6:].float()
            options = {"position_ids": torch.arange(6, 12, device=lm.device)[None]}
            with attending(lm, Pass(read_start(lm, tuple(tokens[:6])))):
                parts = lm.decoder(input_ids=ids[:, 6:], use_cache=False, **options).last_hidden_state
            apart = ((parts.float() - whole).norm() / whole.norm()).item()
            is_equal = apart < (1e-3 if lm.dtype == torch.float32 else 0.2)  # half precision adds up over layers
            kinds = {*(getattr(lm.decoder.config, "layer_types", None) or ())}
            lm.in_parts = is_equal and kinds <= {"full_attention", "sliding_attention"}  # windows are refused above
        except (AttributeError, IndexError, KeyError, TypeError, RuntimeError, ValueError):
            lm.in_parts = False  # another kind of attention: this model runs unshared
    return lm.in_parts


def share_rows(lm: LanguageModel, rows: list[list[int]], n: int) -> tuple[Shared | None, list[list[int]]]:
    """The start of n tokens that all rows have, and what is left of them; None and the rows as they are without one."""
    start = tuple(rows[0][:n]) if rows else ()
    shared = share_start(lm, start) if all(tuple(row[:n]) == start for row in rows) else None
    return shared, [row[n:] for row in rows] if shared else rows


def fuse_pieces(model: torch.nn.Module) -> bool:
    """Compile the norms and feed-forwards of a large model on a GPU: a seventh less time a step, and less memory.

    Where there is no compiler they stay as they are, which is said once."""
    pieces = [m for m in model.modules() if type(m).__name__.endswith(("RMSNorm", "MLP"))]
    if model.device.type != "cuda" or model.config.hidden_size < FUSED or not pieces:
        return False
    usual = [m.forward for m in pieces]
    for piece in pieces:
        piece.forward = torch.compile(piece.forward, dynamic=True)
    try:
        with torch.no_grad():
            for n in (3, 5):
                model.base_model(input_ids=torch.ones(2, n, dtype=torch.long, device=model.device), use_cache=False)
    except Exception as error:  # of any compiler there may be: the model works without
        print(f"{type(model).__name__}: not compiled ({type(error).__name__}), so it is slower", flush=True)
        for piece, forward in zip(pieces, usual, strict=True):
            piece.forward = forward
        return False
    return True
