"""Losses as pure functions. Each returns (sum, count), so that a mean can be taken over all processes.

Shapes: B batch, A answer tokens, V vocabulary, K soft tokens, P teacher tokens, D target hidden size.
`logits[:, j]` predicts `labels[:, j]`; padding is where the mask is False.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

Total = tuple[torch.Tensor, torch.Tensor]
SHARP = 5.0  # nats for a squared distance of an embedding's own size


def answer_nll(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> Total:
    """Negative log-likelihood of the answer's tokens. (B, A, V), (B, A), (B, A)"""
    nll = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return (nll * mask.flatten()).sum(), mask.sum()


format_nll = answer_nll  # with a mask of the `####` marker's tokens alone


def kl_slice(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, first: int = 0) -> Total:
    """KL(teacher || student) over the same answer tokens; `first` > 0 compares only that many. (B, A, V) twice"""
    if first:
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) < first)
    log_p, log_q = teacher.float().log_softmax(-1), student.float().log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return (divergence * mask).sum(), mask.sum()


def prompt_alignment(tokens, mask, embeds, embeds_mask, reduce: Callable[[Total], Total] = lambda own: own) -> Total:
    """Squared distance of soft tokens from the teacher's embeddings at the same place, in units of their size.

    The shorter of the two is padded, and only places real in both count. (B, K, D), (B, K), (B, P, D), (B, P).
    The size is that of the global batch: `reduce` adds a (sum, count) over all processes.
    """
    n = min(tokens.shape[1], embeds.shape[1])
    both = mask[:, :n] & embeds_mask[:, :n]
    embeds = embeds[:, :n].float()
    total, count = reduce(((embeds.pow(2).mean(-1) * both).sum(), both.sum()))
    size = total / count.clamp(min=1)
    distance = (tokens[:, :n].float() - embeds).pow(2).mean(-1) / size.clamp(min=1e-8)
    return (distance * both).sum(), both.sum()


def gather_places(embeds: torch.Tensor, mask: torch.Tensor, places: torch.Tensor | None = None):
    """Sum of the embeddings at each place, and which have any; without places each has its own. (B, P, D), (B, P)"""
    if places is None:
        return embeds, mask
    held = (places[:, None] == torch.arange(places.shape[1], device=places.device)[:, None]) & mask[:, None]
    return held.to(embeds.dtype) @ embeds, held.any(-1)


def token_nll(tokens, mask, table, ids, ids_mask, places=None) -> Total:
    """Negative log-likelihood of the teacher's tokens: the nearer a word's embedding is to the soft token at its place,
    less the other embeddings there, the likelier the word. (B, K, D), (B, K), all embeddings (V, D), (B, P) each"""
    if places is not None:
        own, at = table[ids], places.clamp(max=tokens.shape[1] - 1)
        beside = gather_places(own, ids_mask, places)[0].gather(1, places[..., None].expand_as(own)) - own
        tokens = tokens.gather(1, at[..., None].expand(-1, -1, tokens.shape[2])) - beside
        mask = mask.gather(1, at) & (places == at)
    n, sizes = min(tokens.shape[1], ids.shape[1]), torch.linalg.vector_norm(table, dim=-1, dtype=torch.float32).square()
    distances = sizes - 2 * (tokens[:, :n].to(table.dtype) @ table.T).float()  # but for the soft token's own size
    return answer_nll(-SHARP * distances / sizes.mean(), ids[:, :n], mask[:, :n] & ids_mask[:, :n])


def pool(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over real places. (B, K, D), (B, K) -> (B, D)"""
    return (tokens.float() * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def info_nce(anchors: torch.Tensor, positives: torch.Tensor, offset: int, temperature: float) -> Total:
    """Tell one's own question from all others. anchors (B, D) of this process, positives (N, D) of all processes,
    where anchor i belongs to positive offset + i. The positives' common part is removed: without that they are
    nearly equal, and there is nothing to tell."""
    positives = positives.float() - positives.float().mean(0)
    scores = F.normalize(anchors.float(), dim=-1) @ F.normalize(positives, dim=-1).T / temperature
    labels = torch.arange(len(anchors), device=anchors.device) + offset
    return F.cross_entropy(scores, labels, reduction="sum"), torch.full((), len(anchors), device=anchors.device)


def policy_gradient(logits: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, advantage: torch.Tensor) -> Total:
    """Score-function estimate: sampled answers (B, A) made more likely by their advantage (B,)."""
    log_p = logits.float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return -(log_p * mask * advantage[:, None]).sum(), mask.sum()


def leave_one_out(reward: torch.Tensor) -> torch.Tensor:
    """Each answer's reward less the mean of the others to the same question. (B, samples) -> the same"""
    n = reward.shape[1]
    return reward - (reward.sum(1, keepdim=True) - reward) / (n - 1)


def flow(error: torch.Tensor) -> Total:
    """Mean squared velocity error of the generative producer. (B,)"""
    return error.sum(), torch.full((), len(error), device=error.device)
