"""Every loss as a pure function, against plain loops and against the same with labels or padding moved.

python -m pytest tests/model/test_losses.py
"""

import math

import numpy as np
import pytest
import torch

from bridgekit.model import losses

B, A, V, K, P, D = 3, 5, 11, 4, 6, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: tuple[int, ...], width: int) -> torch.Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


LABELS = torch.randint(0, V, (B, A), generator=torch.Generator().manual_seed(9))
MASK, MARKER, SOFT, PROMPT = mask_of((5, 2, 3), A), mask_of((2, 1, 2), A), mask_of((4, 1, 3), K), mask_of((2, 6, 3), P)


def later(mask: torch.Tensor) -> torch.Tensor:
    """The same mask, one place later."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)


def log_softmax(scores) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    return scores - scores.max() - math.log(np.exp(scores - scores.max()).sum())


def places(*masks) -> list[tuple[int, int]]:
    width = min(mask.shape[1] for mask in masks)
    return [(i, j) for i in range(B) for j in range(width) if all(mask[i, j] for mask in masks)]


def nll_by_hand(logits, labels, mask):
    return [-log_softmax(logits[i, j])[labels[i, j]] for i, j in places(mask)]


def kl_by_hand(student, teacher, mask, first=0):
    found = [(i, j) for i, j in places(mask) if not first or j < first]
    pairs = [(log_softmax(teacher[place]), log_softmax(student[place])) for place in found]
    return [float((np.exp(p) * (p - q)).sum()) for p, q in pairs]


def prompt_by_hand(tokens, mask, embeds, embeds_mask):
    found = [(tokens[i, j].numpy(), embeds[i, j].numpy()) for i, j in places(mask, embeds_mask)]
    size = np.mean([np.square(e) for _, e in found])
    return [np.square(t - e).mean() / size for t, e in found]


def info_nce_by_hand(anchors, positives, offset, temperature):
    anchors, positives = anchors.numpy(), positives.numpy() - positives.numpy().mean(0)
    norms = np.linalg.norm(anchors, axis=1)[:, None] * np.linalg.norm(positives, axis=1)
    return [-log_softmax(row)[offset + i] for i, row in enumerate(anchors @ positives.T / norms / temperature)]


LOGITS, OTHER, TOKENS, EMBEDS = draw(B, A, V), draw(B, A, V, seed=1), draw(B, K, D), draw(B, P, D, seed=1) * 3
ANCHORS, POSITIVES = draw(B, D), draw(2 * B, D, seed=1) + 5
CASES = {  # the loss, how it is computed by hand, its arguments, and the same with something moved
    "nll": (losses.answer_nll, nll_by_hand, (LOGITS, LABELS, MASK),
            [(LOGITS, LABELS.roll(1, 1), MASK), (LOGITS, LABELS, later(MASK))]),
    "format": (losses.format_nll, nll_by_hand, (LOGITS, LABELS, MARKER), [(LOGITS, LABELS, later(MARKER))]),
    "kl": (losses.kl_slice, kl_by_hand, (LOGITS, OTHER, MASK),
           [(LOGITS, OTHER.roll(1, 1), MASK), (LOGITS, OTHER, later(MASK)), (LOGITS, OTHER, MASK, 2)]),
    "prompt": (losses.prompt_alignment, prompt_by_hand, (TOKENS, SOFT, EMBEDS, PROMPT),
               [(TOKENS, SOFT, EMBEDS.roll(1, 1), PROMPT), (TOKENS, SOFT, EMBEDS, later(PROMPT))]),
    "info_nce": (losses.info_nce, info_nce_by_hand, (ANCHORS, POSITIVES, 0, 0.2),
                 [(ANCHORS, POSITIVES, 1, 0.2), (ANCHORS, POSITIVES, B, 0.2)]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_loss_is_what_it_is_by_hand_and_sees_what_is_moved(name):
    loss, by_hand, right, moved = CASES[name]
    for arguments in (right, *moved):
        total, count = loss(*arguments)
        terms = by_hand(*arguments)
        assert total.item() == pytest.approx(sum(terms), rel=1e-4) and int(count) == len(terms)
        assert arguments is right or not math.isclose(total, loss(*right)[0], rel_tol=1e-2)


def test_losses_do_not_depend_on_the_number_of_processes():
    """Prompt alignment is in units of the size over all processes, which `reduce` gives; InfoNCE has all positives."""
    embeds = EMBEDS * torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    whole, given = losses.prompt_alignment(TOKENS, SOFT, embeds, PROMPT)[0].item(), []
    parts = [[x[rows] for x in (TOKENS, SOFT, embeds, PROMPT)] for rows in (slice(0, 1), slice(1, 3))]
    alone = [losses.prompt_alignment(*part, reduce=lambda own: given.append(own) or own)[0].item() for part in parts]
    both = tuple(map(sum, zip(*given, strict=True)))
    shares = [losses.prompt_alignment(*part, reduce=lambda own: both)[0].item() for part in parts]
    assert sum(shares) == pytest.approx(whole, rel=1e-5) != pytest.approx(sum(alone), rel=1e-2)
    flipped = ANCHORS.flip(0)
    pieces = [losses.info_nce(x, POSITIVES, offset, 0.2)[0].item() for x, offset in ((ANCHORS, 0), (flipped, B))]
    assert losses.info_nce(torch.cat([ANCHORS, flipped]), POSITIVES, 0, 0.2)[0].item() == pytest.approx(sum(pieces))


def test_pooling_leaves_padding_out_and_the_flow_sums():
    means = torch.stack([TOKENS[i, : SOFT[i].sum()].mean(0) for i in range(B)])
    assert torch.allclose(losses.pool(TOKENS, SOFT), means, atol=1e-6)
    assert [x.item() for x in losses.flow(torch.tensor([1.0, 2.5]))] == [3.5, 2]


def test_policy_gradient_and_its_baseline_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert torch.allclose(losses.leave_one_out(reward), torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0]]))
    logits = torch.zeros(3, 2, 4)
    logits[0, 0, 1] = math.log(3.0)  # probabilities 1/6, 3/6, 1/6, 1/6
    ids, mask = torch.tensor([[1, 0], [2, 3], [0, 0]]), torch.tensor([[True, True], [True, False], [True, True]])
    total, count = losses.policy_gradient(logits, ids, mask, torch.tensor([1.0, -0.5, -0.25]))
    wanted = -(1.0 * (math.log(0.5) + math.log(0.25)) - 0.5 * math.log(0.25) - 0.25 * 2 * math.log(0.25))
    assert count.item() == 5 and total.item() == pytest.approx(wanted, rel=1e-5)
