"""Resampler: K learned queries read the source's states through cross-attention."""

from torch import nn

from bridgekit.model.layers import Attention, FeedForward, Queries, SourceReader, count_soft_tokens
from bridgekit.model.message import MAX_SOFT_TOKENS, Message


class ResamplerBlock(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))
        self.cross = Attention(dim, heads, dropout)
        self.self = Attention(dim, heads, dropout)
        self.feed = FeedForward(dim, dropout)

    def forward(self, x, source, mask, query_mask, want_weights):
        update, weights = self.cross(self.norms[0](x), source, mask, want_weights)
        x = x + update
        y = self.norms[1](x)
        x = x + self.self(y, y, query_mask)[0]
        return x + self.feed(self.norms[2](x)), weights


class Resampler(nn.Module):
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
        source = self.read(states)
        k, query_mask = count_soft_tokens(self.n_soft_tokens, mask, MAX_SOFT_TOKENS)
        x = self.queries(k, source, mask)
        attention = 0
        for block in self.blocks:
            x, weights = block(x, source, mask, query_mask, want_attention)
            attention = attention + weights / len(self.blocks) if want_attention else None
        return Message(self.out(x), query_mask, attention=attention)
