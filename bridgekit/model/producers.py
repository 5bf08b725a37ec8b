"""Producers: what makes a message from the source's states. Resampler, DiT (rectified flow) and the learned constant.

Departures from the first experiments: the condition is all source states through cross-attention (`dit_condition` pools
them, as they did); training runs the same sampling as evaluation, so that the target is trained on the tokens it will
see (`dit_tokens: teacher` noises gold embeddings instead); the flow loss has a gradient; noise belongs to the example;
and the network predicts the tokens, from which the velocity follows, so that no noise is left over after the last step.

Shapes: B batch, S source tokens, Q queries, N keys, K soft tokens, D width, H heads.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from bridgekit.config import knows_places
from bridgekit.model.message import Dropout, Message, hashed_normal, hashed_uniform
from bridgekit.tasks import MAX_SOFT_TOKENS

NEAR_END = 0.05  # 1 - t below which a predicted token's velocity is not divided further


class Attention(nn.Module):
    """Multi-head attention of queries over a context; returns its weights when asked."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, width: int = 0):
        """`width` of queries, context and what comes out, where that is not `dim`."""
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.query = nn.Linear(width or dim, dim, bias=False)
        self.key_value = nn.Linear(width or dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, width or dim, bias=False)

    def forward(self, x, context, mask, seeds=None, want_weights: bool = False):
        """x (B, Q, D), context (B, N, D), mask (B, N), seeds (B,) -> (B, Q, D), weights (B, Q, N) or None"""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask, weights = mask[:, None, None, :], None
        if want_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).mean(1)
        out = F.scaled_dot_product_attention(q, k, v, mask)
        # Dropout on the output, not on the weights: those have as many places as the batch is padded to.
        return self.dropout(self.out(out.transpose(1, 2).flatten(2)), seeds), weights


class FeedForward(nn.Sequential):
    """Two layers with dropout between them. (B, K, D), seeds (B,) -> (B, K, D)"""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x, seeds):
        widen, activate, dropout, narrow = self
        return narrow(dropout(activate(widen(x)), seeds))


class SourceReader(nn.Module):
    """Captured states to the bridge's width; each layer is normalised, because their sizes differ a hundredfold.

    With `placed` queries the source's tokens then get their places and look at each other: which of several facts a
    token belongs to is counted here, as attention alone could not."""

    def __init__(self, config, n_layers: int, source_dim: int):
        super().__init__()
        dim, self.n_layers, self.dropout = config.bridge_dim, n_layers, Dropout(config.state_dropout)
        self.norm = nn.LayerNorm(source_dim, elementwise_affine=False)
        self.project = nn.Linear(n_layers * source_dim, dim)
        self.blocks = nn.ModuleList(Block(config, ("self",)) for _ in range(2 * knows_places(config)))

    def forward(self, states, mask, seeds):
        """(B, S, L * D_s), (B, S), (B,) -> (B, S, dim)"""
        source = self.norm(states.unflatten(-1, (self.n_layers, -1))).flatten(2)
        source = self.project(self.dropout(source, seeds))
        if len(self.blocks):
            source = source + sinusoids(torch.arange(source.shape[1], device=source.device), source.shape[-1])
            source, _ = run_blocks(self.blocks, source, source, mask, mask, seeds, False)
        return source


def mask_soft_tokens(n_soft_tokens: int, mask: torch.Tensor) -> torch.Tensor:
    """Which soft tokens are real; -1 takes as many as the source prompt has. mask (B, S) -> (B, K)"""
    if n_soft_tokens != -1:
        return mask.new_ones(len(mask), n_soft_tokens)
    places = torch.arange(min(mask.shape[1], MAX_SOFT_TOKENS), device=mask.device)
    return places < mask.sum(1, keepdim=True)


def sinusoids(positions: torch.Tensor, dim: int, base: float = 10_000.0) -> torch.Tensor:
    """(...,) -> (..., dim)"""
    rates = torch.exp(-math.log(base) * torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angles = positions.float()[..., None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, dim % 2))


def average_spans(x: torch.Tensor, mask: torch.Tensor, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Mean of x over the places from `start` to before `end`. x (B, N, D), mask (B, N), spans (B, K) -> (B, K, D)"""
    sums = F.pad((x.float() * mask[..., None]).cumsum(1), (0, 0, 1, 0))  # of the first places
    total, before = (sums.gather(1, i[..., None].expand(-1, -1, x.shape[-1])) for i in (end, start))
    return (total - before) / (end - start)[..., None].clamp(min=1)


class Queries(nn.Module):
    """K learned starting points; `local` ones also start from the mean of the j-th of K equal stretches of the source,
    so that several facts need not be told apart by attention alone, `placed` ones from their number. Where K follows
    the prompt, each has its own place and state."""

    def __init__(self, config, dim: int):
        super().__init__()
        self.n_soft_tokens = config.n_soft_tokens
        self.local, self.placed = config.queries == "local", knows_places(config)
        self.points = nn.Parameter(torch.randn(max(self.n_soft_tokens, 1), dim) * 0.5)

    def forward(self, k: int, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """source (B, S, dim), mask (B, S) with the real places in front -> (B, K, dim)"""
        j = torch.arange(k, device=self.points.device)
        if self.n_soft_tokens == -1:
            return self.points + sinusoids(j, self.points.shape[1]) + source[:, :k]
        if self.local:  # a stretch of a source that is shorter than K is one place
            real = mask.sum(1, keepdim=True)
            return self.points + average_spans(source, mask, j * real // k, ((j + 1) * real + k - 1) // k)
        points = self.points + sinusoids(j, self.points.shape[1]) if self.placed else self.points
        return points[None].expand(len(source), -1, -1)


class Block(nn.Module):
    """Attention to the source (cross) and among the queries (self) in the given order, then feed-forward.

    With `timed`, the time shifts, scales and gates self-attention and feed-forward; at first it does nothing."""

    def __init__(self, config, order: tuple[str, ...], timed: bool = False):
        super().__init__()
        dim, self.order = config.bridge_dim, order
        self.norms = nn.ModuleList(nn.LayerNorm(dim, elementwise_affine=not timed) for _ in range(len(order) + 1))
        for name in order:
            self.add_module(name, Attention(dim, config.heads, config.dropout))
        self.feed = FeedForward(dim, config.dropout)
        if timed:
            self.modulation = nn.Linear(dim, 6 * dim)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(self, x, source, mask, query_mask, seeds, want_weights, time=None):
        """x (B, K, dim), source (B, S, dim), time (B, 1, dim) -> x, weights (B, K, S) or None"""
        changes, weights = [0.0] * 6 if time is None else self.modulation(time).chunk(6, -1), None
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = changes
        for name, norm in zip(self.order, self.norms, strict=False):
            y = norm(x)
            if name == "cross":
                update, weights = self.cross(y, source, mask, seeds, want_weights)
            else:
                y = y * (1 + scale_1) + shift_1
                update = (1 + gate_1) * self.self(y, y, query_mask, seeds)[0]
            x = x + update
        y = self.norms[-1](x) * (1 + scale_2) + shift_2
        return x + (1 + gate_2) * self.feed(y, seeds), weights


def run_blocks(blocks: nn.ModuleList, x: torch.Tensor, *inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x after all blocks, and the mean of their weights (B, K, S), None where a block gives none."""
    found = []
    for block in blocks:
        x, weights = block(x, *inputs)
        found.append(weights)
    return x, None if weights is None else sum(w / len(found) for w in found)


class Resampler(nn.Module):
    """Queries that read the source through cross-attention, block by block."""

    def __init__(self, config, n_layers: int, source_dim: int, target_dim: int):
        super().__init__()
        dim, self.n_soft_tokens = config.bridge_dim, config.n_soft_tokens
        self.read = SourceReader(config, n_layers, source_dim)
        self.queries = Queries(config, dim)
        self.blocks = nn.ModuleList(Block(config, ("cross", "self")) for _ in range(config.depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, target_dim))

    def forward(self, states, mask, seeds, want_attention=False) -> Message:
        """states (B, S, L * D_s), mask (B, S) -> tokens (B, K, D_t)"""
        source, query_mask = self.read(states, mask, seeds), mask_soft_tokens(self.n_soft_tokens, mask)
        x = self.queries(query_mask.shape[1], source, mask)
        x, attention = run_blocks(self.blocks, x, source, mask, query_mask, seeds, want_attention)
        return Message(self.out(x), query_mask, attention=attention)


class DiT(nn.Module):
    """Rectified flow from noise to tokens, conditioned on the source; all steps of a message share its dropout."""

    def __init__(self, config, n_layers: int, source_dim: int, target_dim: int):
        super().__init__()
        dim, condition = config.bridge_dim, config.dit_condition
        self.config, self.target_dim = config, target_dim
        self.read = SourceReader(config, n_layers, source_dim)
        self.queries = Queries(config, dim)
        self.enter = nn.Linear(target_dim, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.pool = Attention(dim, config.heads) if condition == "attention" else None
        self.pool_query = nn.Parameter(torch.randn(1, 1, dim)) if condition == "attention" else None
        order = ("self", "cross") if condition == "cross" else ("self",)  # a pooled source comes with the time
        self.blocks = nn.ModuleList(Block(config, order, timed=True) for _ in range(config.depth))
        self.norm, self.leave = nn.LayerNorm(dim), nn.Linear(dim, target_dim)

    def condition(self, states, mask, seeds, want_weights=False):
        """The source for cross-attention (B, S, dim), its pooled vector (B, dim) or None, pooling weights."""
        source = self.read(states, mask, seeds)
        if self.config.dit_condition == "mean":
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
            return source, (source * weights[..., None]).sum(1), weights[:, None] if want_weights else None
        if self.pool is None:
            return source, None, None
        query = self.pool_query.expand(len(source), -1, -1)
        pooled, weights = self.pool(query, source, mask, want_weights=want_weights)
        return source, pooled[:, 0], weights

    def velocity(self, x, t, source, pooled, *context):
        """x (B, K, D_t) at time t (B,) -> velocity (B, K, D_t), cross-attention weights (B, K, S) or None"""
        time = self.time(sinusoids(t * 1000, self.config.bridge_dim))
        local = source
        if pooled is not None:
            time, local = time + pooled, torch.zeros_like(source)
        h = self.enter(x) + self.queries(x.shape[1], local, context[0])
        h, attention = run_blocks(self.blocks, h, source, *context, time[:, None])
        out = self.leave(self.norm(h))
        if self.config.dit_prediction == "tokens":
            out = (out - x) / (1 - t).clamp(min=NEAR_END)[:, None, None]
        return out, attention

    def forward(self, states, mask, seeds, teacher=None, want_attention=False) -> Message:
        """states (B, S, L * D_s), mask (B, S), seeds (B,) -> tokens (B, K, D_t); `teacher` asks for the flow's error"""
        source, pooled, attention = self.condition(states, mask, seeds, want_attention)
        query_mask = mask_soft_tokens(self.config.n_soft_tokens, mask)
        context = (source, pooled, mask, query_mask, seeds)
        x, flow_error = hashed_normal(seeds, (query_mask.shape[1], self.target_dim)), None
        if teacher is not None:
            flow_error, estimate = self.flow(*teacher, x, context)
            if self.training and self.config.dit_tokens == "teacher":
                return Message(estimate, query_mask, flow_error=flow_error)
        steps = self.config.dit_steps_train if self.training else self.config.dit_steps_eval
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)
            v, weights = self.velocity(x, t, *context, want_attention and i == steps - 1)
            x = x + v / steps
        if attention is not None:  # of pooling: all soft tokens share it
            weights = attention.expand(-1, query_mask.shape[1], -1)
        return Message(x, query_mask, attention=weights, flow_error=flow_error)

    def flow(self, embeds, real, noise, context):
        """Rectified flow towards the teacher's embeddings (unit size, cut to K); beyond its end nothing is asked.

        -> mean squared error of the velocity (B,), one-step estimate of the tokens (B, K, D_t)"""
        *_, query_mask, seeds = context
        goal, n = torch.zeros_like(noise), min(noise.shape[1], embeds.shape[1])
        places = noise.new_zeros(noise.shape[:2])  # (B, K), those that have a goal
        places[:, :n] = (real[:, :n] * query_mask[:, :n]).to(noise.dtype)
        goal[:, :n] = embeds[:, :n].float() * places[:, :n, None]
        size = goal.pow(2).sum((1, 2), keepdim=True) / goal.ne(0).sum((1, 2), keepdim=True).clamp(min=1)
        goal = goal / size.sqrt()
        t = hashed_uniform(seeds + 1, 1, noise.dtype)[:, :, None]
        x = (1 - t) * noise + t * goal
        v, _ = self.velocity(x, t[:, 0, 0], *context, False)
        error = (v - (goal - noise)).pow(2).mean(-1)  # (B, K)
        return (error * places).sum(1) / places.sum(1).clamp(min=1), x + (1 - t) * v


class Constant(nn.Module):
    """Learned tokens, the same for every question: what a prefix achieves without a source."""

    def __init__(self, config, n_layers: int, source_dim: int, target_dim: int):
        super().__init__()
        k = self.n_soft_tokens = config.n_soft_tokens
        self.tokens = nn.Parameter(torch.randn(MAX_SOFT_TOKENS if k == -1 else k, target_dim))

    def forward(self, states, mask) -> Message:
        query_mask = mask_soft_tokens(self.n_soft_tokens, mask)
        return Message(self.tokens[None, : query_mask.shape[1]].expand(len(mask), -1, -1), query_mask)


PRODUCERS = {"resampler": Resampler, "dit": DiT, "constant": Constant}
