"""Producers: what makes a message from the source's states. Resampler, DiT (rectified flow) and the learned constant.

Departures from the first experiments: the condition is all source states through cross-attention (`dit_condition`
mean or attention pools them into one vector, as they did); training runs the same sampling as evaluation, so that
the target is trained on the tokens it will see (`dit_tokens: teacher` brings back tokens made from noised gold
embeddings); the flow loss has a gradient; noise belongs to the example (its seed), not to the moment; and the network
predicts the tokens, from which the velocity follows, so that the last step lands on its prediction and no noise is
left over (`dit_prediction: velocity` is the usual form, which must learn to cancel all noise itself).

Shapes: B batch, S source tokens, Q queries, N keys, K soft tokens, D width, H heads.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from bridgekit.model.message import MAX_SOFT_TOKENS, Dropout, Message, hashed_normal, hashed_uniform


class Attention(nn.Module):
    """Multi-head attention of queries over a context; returns its weights when asked."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, width: int = 0, context_width: int = 0):
        """`width` of the queries and of what comes out, and `context_width`, where they are not `dim`."""
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.query = nn.Linear(width or dim, dim, bias=False)
        self.key_value = nn.Linear(context_width or dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, width or dim, bias=False)

    def forward(self, x, context, mask=None, want_weights: bool = False, seeds=None):
        """x (B, Q, D), context (B, N, D), mask (B, N), seeds (B,) -> (B, Q, D), weights (B, Q, N) or None"""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if mask is None else mask[:, None, None, :]
        weights = None
        if want_weights:
            scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            if bias is not None:
                scores = scores.masked_fill(~bias, -torch.inf)
            weights = scores.softmax(-1).mean(1)
        out = F.scaled_dot_product_attention(q, k, v, bias)
        # Dropout on the output, not on the weights: those have as many places as the batch is padded to.
        return self.dropout(self.out(out.transpose(1, 2).flatten(2)), seeds), weights


class FeedForward(nn.Sequential):
    """Two layers with dropout between them. (B, K, D), seeds (B,) -> (B, K, D)"""

    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), Dropout(dropout), nn.Linear(4 * dim, dim))

    def forward(self, x, seeds=None):
        widen, activate, dropout, narrow = self
        return narrow(dropout(activate(widen(x)), seeds))


class SourceReader(nn.Module):
    """Captured states to the bridge's width; each layer is normalised, because their sizes differ a hundredfold."""

    def __init__(self, n_layers: int, source_dim: int, dim: int, dropout: float):
        super().__init__()
        self.n_layers = n_layers
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(source_dim, elementwise_affine=False)
        self.project = nn.Linear(n_layers * source_dim, dim)

    def forward(self, states, seeds):
        """(B, S, L * D_s), (B,) -> (B, S, dim)"""
        return self.project(self.dropout(self.norm(states.unflatten(-1, (self.n_layers, -1))).flatten(2), seeds))


def count_soft_tokens(n_soft_tokens: int, mask: torch.Tensor) -> tuple[int, torch.Tensor]:
    """How many soft tokens and which are real; -1 takes as many as the source prompt has. mask (B, S) -> (B, K)"""
    if n_soft_tokens != -1:
        return n_soft_tokens, mask.new_ones(mask.shape[0], n_soft_tokens)
    k = min(mask.shape[1], MAX_SOFT_TOKENS)
    return k, torch.arange(k, device=mask.device)[None, :] < mask.sum(1, keepdim=True)


def sinusoids(positions: torch.Tensor, dim: int, base: float = 10_000.0) -> torch.Tensor:
    """(...,) -> (..., dim)"""
    rates = torch.exp(-math.log(base) * torch.arange(dim // 2, device=positions.device) / (dim // 2))
    angles = positions.float()[..., None] * rates
    return F.pad(torch.cat([angles.sin(), angles.cos()], -1), (0, dim % 2))


def pool_stretches(source: torch.Tensor, mask: torch.Tensor, k: int) -> torch.Tensor:
    """Mean of the j-th of k equal stretches of each row's real places; k of them or more: each place on its own.

    source (B, S, dim), mask (B, S) with the real places in front -> (B, k, dim)"""
    real = mask.sum(1, keepdim=True)
    j = torch.arange(k, device=source.device)[None, :]
    start, end = j * real // k, ((j + 1) * real + k - 1) // k
    sums = F.pad((source.float() * mask[..., None]).cumsum(1), (0, 0, 1, 0))
    wide = (-1, -1, source.shape[-1])
    total = sums.gather(1, end[..., None].expand(*wide)) - sums.gather(1, start[..., None].expand(*wide))
    return total / (end - start)[..., None].clamp(min=1)


class Queries(nn.Module):
    """K learned starting points; `local` ones also start from the j-th of K stretches of the source, so that several
    facts need not be told apart by attention alone. Where K follows the prompt, each has its own place and state."""

    def __init__(self, config, dim: int):
        super().__init__()
        self.n_soft_tokens, self.local = config.n_soft_tokens, config.queries == "local"
        self.points = nn.Parameter(torch.randn(max(self.n_soft_tokens, 1), dim) * 0.5)

    def forward(self, k: int, source: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """source (B, S, dim), mask (B, S) -> (B, K, dim)"""
        if self.n_soft_tokens == -1:
            places = sinusoids(torch.arange(k, device=self.points.device), self.points.shape[1])
            return self.points + places + source[:, :k]
        if self.local:
            return self.points + pool_stretches(source, mask, k)
        return self.points[None].expand(len(source), -1, -1)


class ResamplerBlock(nn.Module):
    """Cross-attention to the source, self-attention among the queries, feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.cross = Attention(dim, heads, dropout)
        self.self = Attention(dim, heads, dropout)
        self.feed = FeedForward(dim, dropout)

    def forward(self, x, source, mask, query_mask, seeds, want_weights):
        """x (B, K, dim), source (B, S, dim) -> x, weights (B, K, S) or None"""
        update, weights = self.cross(self.norms[0](x), source, mask, want_weights, seeds)
        x = x + update
        y = self.norms[1](x)
        x = x + self.self(y, y, query_mask, seeds=seeds)[0]
        return x + self.feed(self.norms[2](x), seeds), weights


class Resampler(nn.Module):
    """Queries that read the source through cross-attention, block by block."""

    def __init__(self, config, n_layers: int, source_dim: int, target_dim: int):
        super().__init__()
        dim = config.bridge_dim
        self.n_soft_tokens = config.n_soft_tokens
        self.read = SourceReader(n_layers, source_dim, dim, config.state_dropout)
        self.queries = Queries(config, dim)
        self.blocks = nn.ModuleList(ResamplerBlock(dim, config.heads, config.dropout) for _ in range(config.depth))
        self.out = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, target_dim))

    def forward(self, states, mask, seeds, teacher=None, want_attention=False) -> Message:
        """states (B, S, L * D_s), mask (B, S) -> tokens (B, K, D_t)"""
        source = self.read(states, seeds)
        k, query_mask = count_soft_tokens(self.n_soft_tokens, mask)
        x = self.queries(k, source, mask)
        attention = 0
        for block in self.blocks:
            x, weights = block(x, source, mask, query_mask, seeds, want_attention)
            attention = attention + weights / len(self.blocks) if want_attention else None
        return Message(self.out(x), query_mask, attention=attention)


NEAR_END = 0.05  # 1 - t below which a predicted token's velocity is not divided further


def modulate(x, shift, scale):
    """x (B, K, dim), shift and scale (B, dim) -> (B, K, dim)"""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the source (if it is not pooled), feed-forward; all gated by the time."""

    def __init__(self, dim: int, heads: int, dropout: float, cross: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim, elementwise_affine=False) for _ in range(3))
        self.self = Attention(dim, heads, dropout)
        self.cross = Attention(dim, heads, dropout) if cross else None
        self.feed = FeedForward(dim, dropout)
        self.modulation = nn.Linear(dim, 6 * dim)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x, time, source, mask, query_mask, seeds, want_weights):
        """x (B, K, dim), time (B, dim), source (B, S, dim) -> x, weights (B, K, S) or None"""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(time).chunk(6, -1)
        y = modulate(self.norms[0](x), shift_1, scale_1)
        x = x + (1 + gate_1[:, None]) * self.self(y, y, query_mask, seeds=seeds)[0]
        weights = None
        if self.cross is not None:
            update, weights = self.cross(self.norms[1](x), source, mask, want_weights, seeds)
            x = x + update
        y = modulate(self.norms[2](x), shift_2, scale_2)
        return x + (1 + gate_2[:, None]) * self.feed(y, seeds), weights


class DiT(nn.Module):
    """Rectified flow from noise to tokens, conditioned on the source; all steps of a message share its dropout."""

    def __init__(self, config, n_layers: int, source_dim: int, target_dim: int):
        super().__init__()
        dim = config.bridge_dim
        self.config, self.target_dim = config, target_dim
        self.read = SourceReader(n_layers, source_dim, dim, config.state_dropout)
        self.queries = Queries(config, dim)
        self.enter = nn.Linear(target_dim, dim)
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        cross = config.dit_condition == "cross"
        self.pool = Attention(dim, config.heads) if config.dit_condition == "attention" else None
        self.pool_query = nn.Parameter(torch.randn(1, 1, dim)) if self.pool is not None else None
        self.blocks = nn.ModuleList(DiTBlock(dim, config.heads, config.dropout, cross) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.leave = nn.Linear(dim, target_dim)

    def condition(self, states, mask, seeds, want_weights=False):
        """The source for cross-attention (B, S, dim), its pooled vector (B, dim) or None, pooling weights."""
        source = self.read(states, seeds)
        if self.config.dit_condition == "mean":
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
            return source, (source * weights[..., None]).sum(1), weights[:, None] if want_weights else None
        if self.pool is not None:
            pooled, weights = self.pool(self.pool_query.expand(len(source), -1, -1), source, mask, want_weights)
            return source, pooled[:, 0], weights
        return source, None, None

    def velocity(self, x, t, context, want_weights=False):
        """x (B, K, D_t) at time t (B,) -> velocity (B, K, D_t), cross-attention weights (B, K, S) or None"""
        source, pooled, mask, query_mask, seeds = context
        time = self.time(sinusoids(t * 1000, self.config.bridge_dim))
        if pooled is not None:
            time = time + pooled
        h = self.enter(x) + self.queries(x.shape[1], source if pooled is None else torch.zeros_like(source), mask)
        attention = None
        for block in self.blocks:
            h, weights = block(h, time, source, mask, query_mask, seeds, want_weights)
            if weights is not None:
                attention = weights / len(self.blocks) + (0 if attention is None else attention)
        out = self.leave(self.norm(h))
        if self.config.dit_prediction == "tokens":
            out = (out - x) / (1 - t).clamp(min=NEAR_END)[:, None, None]
        return out, attention

    def forward(self, states, mask, seeds, teacher=None, want_attention=False) -> Message:
        """states (B, S, L * D_s), mask (B, S), seeds (B,) -> tokens (B, K, D_t); `teacher` asks for the flow's error"""
        k, query_mask = count_soft_tokens(self.config.n_soft_tokens, mask)
        source, pooled, attention = self.condition(states, mask, seeds, want_attention)
        context = (source, pooled, mask, query_mask, seeds)
        noise = hashed_normal(seeds, (k, self.target_dim))
        flow_error = None
        if teacher is not None:
            flow_error, estimate = self.flow(teacher, noise, context)
            if self.training and self.config.dit_tokens == "teacher":
                return Message(estimate, query_mask, flow_error=flow_error)
        steps = self.config.dit_steps_train if self.training else self.config.dit_steps_eval
        x = noise
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)
            v, weights = self.velocity(x, t, context, want_attention and i == steps - 1)
            x = x + v / steps
            attention = weights if weights is not None else attention
        if want_attention and attention is not None and attention.shape[1] == 1:
            attention = attention.expand(-1, k, -1)
        return Message(x, query_mask, attention=attention, flow_error=flow_error)

    def flow(self, teacher, noise, context):
        """Rectified flow towards the teacher's embeddings (unit size, cut or zero-padded to K).

        -> mean squared error of the velocity (B,), one-step estimate of the tokens (B, K, D_t)"""
        embeds, real = teacher
        *_, query_mask, seeds = context
        goal = torch.zeros_like(noise)
        n = min(noise.shape[1], embeds.shape[1])
        goal[:, :n] = (embeds * real[..., None])[:, :n].float()
        size = goal.pow(2).sum((1, 2), keepdim=True) / goal.ne(0).sum((1, 2), keepdim=True).clamp(min=1)
        goal = goal / size.sqrt()
        t = hashed_uniform(seeds + 1, 1, noise.dtype)[:, 0]
        x = (1 - t)[:, None, None] * noise + t[:, None, None] * goal
        v, _ = self.velocity(x, t, context)
        error = (v - (goal - noise)).pow(2).mean(-1)  # (B, K)
        real_k = query_mask.float()
        return (error * real_k).sum(1) / real_k.sum(1), x + (1 - t)[:, None, None] * v


class Constant(nn.Module):
    """Learned tokens, the same for every question: what a prefix achieves without a source."""

    def __init__(self, config, n_layers: int, source_dim: int, target_dim: int):
        super().__init__()
        self.n_soft_tokens = config.n_soft_tokens
        n = MAX_SOFT_TOKENS if config.n_soft_tokens == -1 else config.n_soft_tokens
        self.tokens = nn.Parameter(torch.randn(n, target_dim))

    def forward(self, states, mask, seeds, teacher=None, want_attention=False) -> Message:
        k, query_mask = count_soft_tokens(self.n_soft_tokens, mask)
        return Message(self.tokens[None, :k].expand(len(mask), -1, -1), query_mask)


PRODUCERS = {"resampler": Resampler, "dit": DiT, "constant": Constant}
