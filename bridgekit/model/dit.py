"""DiT: soft tokens by rectified flow, from noise to tokens in a few Euler steps under the source's condition.

Departures from the first experiments: the condition is all source states through cross-attention (`dit_condition`
mean or attention pools them into one vector, as they did); training runs the same sampling as evaluation, so that
the target is trained on the tokens it will see (`dit_tokens: teacher` brings back tokens made from noised gold
embeddings); the flow loss has a gradient; noise belongs to the example (its seed), not to the moment; and the network
predicts the tokens, from which the velocity follows, so that the last step lands on its prediction and no noise is
left over (`dit_prediction: velocity` is the usual form, which must learn to cancel all noise itself).
"""

import torch
from torch import nn

from bridgekit.model.layers import (
    Attention,
    FeedForward,
    Queries,
    SourceReader,
    count_soft_tokens,
    sinusoids,
)
from bridgekit.model.message import MAX_SOFT_TOKENS, Message, hashed_normal, hashed_uniform

NEAR_END = 0.05  # 1 - t below which a predicted token's velocity is not divided further


def modulate(x, shift, scale):
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

    def forward(self, x, time, source, mask, query_mask, want_weights):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(time).chunk(6, -1)
        y = modulate(self.norms[0](x), shift_1, scale_1)
        x = x + (1 + gate_1[:, None]) * self.self(y, y, query_mask)[0]
        weights = None
        if self.cross is not None:
            update, weights = self.cross(self.norms[1](x), source, mask, want_weights)
            x = x + update
        y = modulate(self.norms[2](x), shift_2, scale_2)
        return x + (1 + gate_2[:, None]) * self.feed(y), weights


class DiT(nn.Module):
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

    def condition(self, states, mask, want_weights=False):
        """The source for cross-attention (B, S, dim), its pooled vector (B, dim) or None, pooling weights."""
        source = self.read(states)
        if self.config.dit_condition == "mean":
            weights = mask / mask.sum(1, keepdim=True).clamp(min=1)
            return source, (source * weights[..., None]).sum(1), weights[:, None] if want_weights else None
        if self.pool is not None:
            pooled, weights = self.pool(self.pool_query.expand(len(source), -1, -1), source, mask, want_weights)
            return source, pooled[:, 0], weights
        return source, None, None

    def velocity(self, x, t, source, pooled, mask, query_mask, want_weights=False):
        """x (B, K, D_t) at time t (B,) -> velocity (B, K, D_t), cross-attention weights (B, K, S) or None"""
        time = self.time(sinusoids(t * 1000, self.config.bridge_dim))
        if pooled is not None:
            time = time + pooled
        h = self.enter(x) + self.queries(x.shape[1], source if pooled is None else torch.zeros_like(source), mask)
        attention = None
        for block in self.blocks:
            h, weights = block(h, time, source, mask, query_mask, want_weights)
            if weights is not None:
                attention = weights / len(self.blocks) + (0 if attention is None else attention)
        out = self.leave(self.norm(h))
        if self.config.dit_prediction == "tokens":
            out = (out - x) / (1 - t).clamp(min=NEAR_END)[:, None, None]
        return out, attention

    def forward(self, states, mask, seeds, teacher=None, want_attention=False) -> Message:
        k, query_mask = count_soft_tokens(self.config.n_soft_tokens, mask, MAX_SOFT_TOKENS)
        source, pooled, attention = self.condition(states, mask, want_attention)
        noise = hashed_normal(seeds, (k, self.target_dim))
        flow_error = estimate = None
        if teacher is not None:
            flow_error, estimate = self.flow(teacher, noise, seeds, source, pooled, mask, query_mask)
        if self.training and self.config.dit_tokens == "teacher":
            return Message(estimate, query_mask, flow_error=flow_error)
        steps = self.config.dit_steps_train if self.training else self.config.dit_steps_eval
        x = noise
        for i in range(steps):
            t = torch.full((len(x),), i / steps, device=x.device)
            v, weights = self.velocity(x, t, source, pooled, mask, query_mask, want_attention and i == steps - 1)
            x = x + v / steps
            attention = weights if weights is not None else attention
        if want_attention and attention is not None and attention.shape[1] == 1:
            attention = attention.expand(-1, k, -1)
        return Message(x, query_mask, attention=attention, flow_error=flow_error)

    def flow(self, teacher, noise, seeds, source, pooled, mask, query_mask):
        """Rectified flow towards the teacher's embeddings (unit size, cut or zero-padded to K).

        -> mean squared error of the velocity (B,), one-step estimate of the tokens (B, K, D_t)"""
        embeds, real = teacher
        k = noise.shape[1]
        goal = torch.zeros_like(noise)
        n = min(k, embeds.shape[1])
        goal[:, :n] = (embeds * real[..., None])[:, :n].float()
        goal = (
            goal / goal.pow(2).sum((1, 2), keepdim=True).div(goal.ne(0).sum((1, 2), keepdim=True).clamp(min=1)).sqrt()
        )
        t = hashed_uniform(seeds + 1, 1)[:, 0].float()
        x = (1 - t)[:, None, None] * noise + t[:, None, None] * goal
        v, _ = self.velocity(x, t, source, pooled, mask, query_mask)
        error = (v - (goal - noise)).pow(2).mean(-1)  # (B, K)
        real_k = query_mask.float()
        return (error * real_k).sum(1) / real_k.sum(1), x + (1 - t)[:, None, None] * v
