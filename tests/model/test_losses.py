"""Every loss as a pure function, against plain loops and against the same with labels or padding moved.

python -m pytest tests/model/test_losses.py
"""

import math

import numpy as np
import pytest
import torch

from bridgekit.model import losses

B, A, V, K, P, D = 3, 5, 11, 4, 6, 8
ANSWER_LENGTHS, SOFT_LENGTHS, PROMPT_LENGTHS = (5, 2, 3), (4, 1, 3), (2, 6, 3)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: tuple[int, ...], width: int) -> torch.Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


LABELS = torch.randint(0, V, (B, A), generator=torch.Generator().manual_seed(9))
MASK = mask_of(ANSWER_LENGTHS, A)


def shift(mask: torch.Tensor) -> torch.Tensor:
    """The same mask, one place later."""
    return torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)


def log_softmax(scores: list[float]) -> list[float]:
    top = max(scores)
    size = math.log(sum(math.exp(s - top) for s in scores)) + top
    return [s - size for s in scores]


def nll_by_hand(logits, labels, mask) -> tuple[float, int]:
    terms = [
        -log_softmax(logits[i][j])[labels[i][j]]
        for i in range(len(labels)) for j in range(len(labels[i])) if mask[i][j]
    ]  # fmt: skip
    return sum(terms), len(terms)


def kl_by_hand(student, teacher, mask, first=0) -> tuple[float, int]:
    terms = []
    for i, row in enumerate(mask):
        for j, counts in enumerate(row):
            if counts and (not first or j < first):
                p, q = log_softmax(teacher[i][j]), log_softmax(student[i][j])
                terms.append(sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)))
    return sum(terms), len(terms)


def prompt_by_hand(tokens, mask, embeds, embeds_mask) -> tuple[float, int]:
    places = [
        (i, j) for i in range(len(tokens)) for j in range(min(len(tokens[i]), len(embeds[i])))
        if mask[i][j] and embeds_mask[i][j]
    ]  # fmt: skip
    size = np.mean([np.square(embeds[i][j]) for i, j in places])
    return sum(np.mean(np.square(np.subtract(tokens[i][j], embeds[i][j]))) / size for i, j in places), len(places)


def info_nce_by_hand(anchors, positives, offset, temperature) -> tuple[float, int]:
    positives = np.asarray(positives)
    positives = positives - positives.mean(0)
    total = 0.0
    for i, anchor in enumerate(np.asarray(anchors)):
        cosines = [anchor @ p / np.linalg.norm(anchor) / np.linalg.norm(p) for p in positives]
        total -= log_softmax([c / temperature for c in cosines])[offset + i]
    return total, len(anchors)


def agree(found: losses.Total, wanted: tuple[float, int]) -> bool:
    assert int(found[1]) == wanted[1]
    return found[0].item() == pytest.approx(wanted[0], rel=1e-4)


# -- pure functions -----------------------------------------------------------------------------------------


def test_answer_nll_by_hand_and_shifted():
    logits = draw(B, A, V)
    right = losses.answer_nll(logits, LABELS, MASK)
    assert agree(right, nll_by_hand(logits.tolist(), LABELS.tolist(), MASK.tolist()))
    for labels, mask in ((LABELS.roll(1, dims=1), MASK), (LABELS, shift(MASK))):
        moved = losses.answer_nll(logits, labels, mask)
        assert agree(moved, nll_by_hand(logits.tolist(), labels.tolist(), mask.tolist()))
        assert not math.isclose(moved[0], right[0], rel_tol=1e-2)


def test_format_counts_the_marker_alone():
    logits, marker = draw(B, A, V), mask_of((2, 1, 2), A)
    right = losses.format_nll(logits, LABELS, marker)
    assert agree(right, nll_by_hand(logits.tolist(), LABELS.tolist(), marker.tolist()))
    moved = losses.format_nll(logits, LABELS, shift(marker))
    assert agree(moved, nll_by_hand(logits.tolist(), LABELS.tolist(), shift(marker).tolist()))
    assert not math.isclose(moved[0], right[0], rel_tol=1e-2)


@pytest.mark.parametrize("first", [0, 2])
def test_kl_by_hand_and_shifted(first):
    student, teacher = draw(B, A, V), draw(B, A, V, seed=1)
    right = losses.kl_slice(student, teacher, MASK, first)
    assert agree(right, kl_by_hand(student.tolist(), teacher.tolist(), MASK.tolist(), first))
    for other, mask in ((teacher.roll(1, dims=1), MASK), (teacher, shift(MASK))):
        moved = losses.kl_slice(student, other, mask, first)
        assert agree(moved, kl_by_hand(student.tolist(), other.tolist(), mask.tolist(), first))
        assert not math.isclose(moved[0], right[0], rel_tol=1e-2)
    assert losses.kl_slice(teacher, teacher, MASK, first)[0].item() == pytest.approx(0, abs=1e-5)


def test_prompt_alignment_by_hand_and_shifted():
    tokens, embeds = draw(B, K, D), draw(B, P, D, seed=1) * 3
    mask, real = mask_of(SOFT_LENGTHS, K), mask_of(PROMPT_LENGTHS, P)
    right = losses.prompt_alignment(tokens, mask, embeds, real)
    assert agree(right, prompt_by_hand(tokens.tolist(), mask.tolist(), embeds.tolist(), real.tolist()))
    for other, other_mask in ((embeds.roll(1, dims=1), real), (embeds, shift(real))):
        moved = losses.prompt_alignment(tokens, mask, other, other_mask)
        assert agree(moved, prompt_by_hand(tokens.tolist(), mask.tolist(), other.tolist(), other_mask.tolist()))
        assert not math.isclose(moved[0], right[0], rel_tol=1e-2)
    assert losses.prompt_alignment(embeds, real, embeds, real)[0] == 0
    assert agree(losses.prompt_alignment(tokens * 5, mask, embeds * 5, real), (right[0].item(), int(right[1])))


def test_prompt_alignment_does_not_depend_on_the_number_of_processes():
    """Each process's part of the sum, in units of the size over all of them, which `reduce` gives it."""
    scale = torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    tokens, embeds = draw(B, K, D), draw(B, P, D, seed=1) * scale
    parts = [tokens, mask_of(SOFT_LENGTHS, K), embeds, mask_of(PROMPT_LENGTHS, P)]
    whole = losses.prompt_alignment(*parts)
    assert torch.equal(losses.prompt_alignment(*parts, reduce=lambda total: total)[0], whole[0])
    given = []
    for rows in (slice(0, 1), slice(1, 3)):  # first each process's own size, then the sum of both
        losses.prompt_alignment(*(x[rows] for x in parts), reduce=lambda total: given.append(total) or total)
    both = tuple(map(sum, zip(*given, strict=True)))
    shares = [
        losses.prompt_alignment(*(x[rows] for x in parts), reduce=lambda _: both) for rows in (slice(0, 1), slice(1, 3))
    ]
    assert sum(total.item() for total, _ in shares) == pytest.approx(whole[0].item(), rel=1e-5)
    alone = [losses.prompt_alignment(*(x[rows] for x in parts))[0].item() for rows in (slice(0, 1), slice(1, 3))]
    assert sum(alone) != pytest.approx(whole[0].item(), rel=1e-2)


def test_info_nce_by_hand_and_shifted():
    anchors, positives = draw(B, D), draw(2 * B, D, seed=1) + 5
    right = losses.info_nce(anchors, positives, 0, 0.2)
    assert agree(right, info_nce_by_hand(anchors, positives, 0, 0.2))
    for offset in (1, B):
        moved = losses.info_nce(anchors, positives, offset, 0.2)
        assert agree(moved, info_nce_by_hand(anchors, positives, offset, 0.2))
        assert not math.isclose(moved[0], right[0], rel_tol=1e-2)
    both = torch.cat([anchors, anchors.flip(0)])  # two processes, each with its own half, are one with all
    parts = losses.info_nce(anchors, positives, 0, 0.2)[0] + losses.info_nce(anchors.flip(0), positives, B, 0.2)[0]
    assert losses.info_nce(both, positives, 0, 0.2)[0].item() == pytest.approx(parts.item(), rel=1e-5)


def test_pooling_leaves_padding_out():
    tokens, mask = draw(B, K, D), mask_of(SOFT_LENGTHS, K)
    for i, n in enumerate(SOFT_LENGTHS):
        assert torch.allclose(losses.pool(tokens, mask)[i], tokens[i, :n].mean(0), atol=1e-6)


def test_flow_sums_over_examples():
    assert agree(losses.flow(torch.tensor([1.0, 2.5])), (3.5, 2))


def test_policy_gradient_and_its_baseline_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    advantage = losses.leave_one_out(reward)
    assert torch.allclose(advantage, torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0]]))
    logits = torch.zeros(3, 2, 4)
    logits[0, 0, 1] = math.log(3.0)  # probabilities 1/6, 3/6, 1/6, 1/6
    ids = torch.tensor([[1, 0], [2, 3], [0, 0]])
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    total, count = losses.policy_gradient(logits, ids, mask, torch.tensor([1.0, -0.5, -0.25]))
    wanted = -(1.0 * (math.log(0.5) + math.log(0.25)) - 0.5 * math.log(0.25) - 0.25 * 2 * math.log(0.25))
    assert count.item() == 5 and total.item() == pytest.approx(wanted, rel=1e-5)
