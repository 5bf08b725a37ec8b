"""Constant: the same learned soft tokens for every question. The control that has seen everything but the source."""

import torch
from torch import nn

from bridgekit.model.layers import count_soft_tokens
from bridgekit.model.message import MAX_SOFT_TOKENS, Message


class Constant(nn.Module):
    def __init__(self, config, n_layers: int, source_dim: int, target_dim: int):
        super().__init__()
        self.n_soft_tokens = config.n_soft_tokens
        n = MAX_SOFT_TOKENS if config.n_soft_tokens == -1 else config.n_soft_tokens
        self.tokens = nn.Parameter(torch.randn(n, target_dim))

    def forward(self, states, mask, seeds, teacher=None, want_attention=False) -> Message:
        k, query_mask = count_soft_tokens(self.n_soft_tokens, mask, MAX_SOFT_TOKENS)
        return Message(self.tokens[None, :k].expand(len(mask), -1, -1), query_mask)
