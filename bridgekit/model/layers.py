"""The few layers producers share. Shapes: B batch, Q queries, N keys, D width, H heads."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention of queries over a context; returns its weights when asked."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0, width: int = 0, context_width: int = 0):
        """`width` of the queries and of what comes out, and `context_width`, where they are not `dim`."""
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width or dim, dim, bias=False)
        self.key_value = nn.Linear(context_width or dim, 2 * dim, bias=False)
        self.out = nn.Linear(dim, width or dim, bias=False)

    def forward(self, x, context, mask=None, want_weights: bool = False):
        """x (B, Q, D), context (B, N, D), mask (B, N) -> (B, Q, D), weights (B, Q, N) or None"""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if mask is None else mask[:, None, None, :]
        weights = None
        if want_weights:
            scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
            if bias is not None:
                scores = scores.masked_fill(~bias, -torch.inf)
            weights = scores.softmax(-1).mean(1)
        out = F.scaled_dot_product_attention(q, k, v, bias, self.dropout if self.training else 0.0)
        return self.out(out.transpose(1, 2).flatten(2)), weights


class FeedForward(nn.Sequential):
    def __init__(self, dim: int, dropout: float = 0.0):
        super().__init__(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))


class SourceReader(nn.Module):
    """Captured states to the bridge's width; each layer is normalised, because their sizes differ a hundredfold."""

    def __init__(self, n_layers: int, source_dim: int, dim: int, dropout: float):
        super().__init__()
        self.n_layers = n_layers
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(source_dim, elementwise_affine=False)
        self.project = nn.Linear(n_layers * source_dim, dim)

    def forward(self, states):
        """(B, S, L * D_s) -> (B, S, dim)"""
        return self.project(self.dropout(self.norm(states.unflatten(-1, (self.n_layers, -1))).flatten(2)))


def count_soft_tokens(n_soft_tokens: int, mask: torch.Tensor, cap: int) -> tuple[int, torch.Tensor]:
    """How many soft tokens and which are real; -1 takes as many as the source prompt has. mask (B, S) -> (B, K)"""
    if n_soft_tokens != -1:
        return n_soft_tokens, mask.new_ones(mask.shape[0], n_soft_tokens)
    real = mask.sum(1).clamp(max=cap)
    k = min(mask.shape[1], cap)
    return k, torch.arange(k, device=mask.device)[None, :] < real[:, None]


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
