"""Every loss as a pure function, against plain loops or torch's own, whatever the number of processes.

python -m pytest tests/model/test_losses.py
"""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bridgekit.model import losses

B, A, V, K, P, D = 3, 5, 11, 4, 6, 8


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mask_of(lengths: tuple[int, ...], width: int) -> torch.Tensor:
    return torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]


LOGITS, OTHER, TOKENS, EMBEDS = draw(B, A, V), draw(B, A, V, seed=1), draw(B, K, D), draw(B, P, D, seed=1) * 3
LABELS = torch.randint(0, V, (B, A), generator=torch.Generator().manual_seed(9))
MASK, SOFT, PROMPT = mask_of((5, 2, 3), A), mask_of((4, 1, 3), K), mask_of((2, 6, 3), P)
ANCHORS, POSITIVES = draw(B, D), draw(2 * B, D, seed=1) + 5


def values(total: losses.Total) -> tuple[float, int]:
    return pytest.approx(total[0].item(), rel=1e-4), int(total[1])


def test_likelihood_and_divergence_are_those_of_torch():
    wanted = F.cross_entropy(LOGITS[MASK], LABELS[MASK], reduction="sum").item()
    assert values(losses.answer_nll(LOGITS, LABELS, MASK)) == (wanted, 10)
    student, teacher = LOGITS.log_softmax(-1), OTHER.log_softmax(-1)
    for first, n in ((0, 10), (2, 6)):
        counted = MASK & (torch.arange(A) < (first or A))
        wanted = F.kl_div(student[counted], teacher[counted], log_target=True, reduction="sum").item()
        assert values(losses.kl_slice(LOGITS, OTHER, MASK, first)) == (wanted, n)


def test_prompt_alignment_by_hand():
    places = [(i, j) for i in range(B) for j in range(K) if SOFT[i, j] and PROMPT[i, j]]
    size = np.mean([EMBEDS[place].square().numpy() for place in places])
    wanted = sum((TOKENS[place] - EMBEDS[place]).square().mean().item() / size for place in places)
    assert values(losses.prompt_alignment(TOKENS, SOFT, EMBEDS, PROMPT)) == (wanted, len(places))


def test_the_teachers_token_is_the_likelier_the_nearer_its_embedding():
    table, ids = draw(V, D, seed=3), torch.randint(0, V, (B, P), generator=torch.Generator().manual_seed(4))
    places = [(i, j) for i in range(B) for j in range(K) if SOFT[i, j] and PROMPT[i, j]]
    size, wanted = table.square().sum(1).mean(), 0.0
    for place in places:
        shares = (-losses.SHARP * (TOKENS[place] - table).square().sum(1) / size).softmax(0)
        wanted -= shares[ids[place]].log().item()
    assert values(losses.token_nll(TOKENS, SOFT, table, ids, PROMPT)) == (wanted, len(places))


def test_tokens_that_one_soft_token_holds_are_told_apart_as_its_sum():
    table = draw(V, D, seed=3)
    ids, mask = torch.tensor([[1, 2, 3, 4]]), torch.tensor([[True, True, True, False]])
    places = torch.tensor([[0, 0, 2, 0]])
    summed, real = losses.gather_places(table[ids], mask, places)
    assert real.tolist() == [[True, False, True, False]]
    assert torch.allclose(summed[0], torch.stack([table[1] + table[2], 0 * table[0], table[3], 0 * table[0]]))
    soft = summed[:, :3] + 0.1 * draw(1, 3, D, seed=5)
    alone = [soft[:, :1] - table[2], soft[:, :1] - table[1], soft[:, 2:]]  # less what else stands there
    wanted = sum(
        losses.token_nll(x, mask[:, :1], table, ids[:, i : i + 1], mask[:, :1])[0] for i, x in enumerate(alone)
    )
    total, count = losses.token_nll(soft, torch.ones(1, 3, dtype=torch.bool), table, ids, mask, places)
    assert torch.allclose(total, wanted) and count == 3
    cut, n = losses.token_nll(soft[:, :2], torch.ones(1, 2, dtype=torch.bool), table, ids, mask, places)
    assert n == 2 and 0 < cut < total  # what no soft token holds is not asked for


@pytest.mark.parametrize("offset", [0, 1, B])
def test_info_nce_by_hand(offset):
    centred, wanted = POSITIVES - POSITIVES.mean(0), 0.0
    for i in range(B):
        scores = [torch.cosine_similarity(ANCHORS[i], other, dim=0).item() / 0.2 for other in centred]
        wanted += math.log(sum(map(math.exp, scores))) - scores[offset + i]
    assert values(losses.info_nce(ANCHORS, POSITIVES, offset, 0.2)) == (wanted, B)


def test_losses_do_not_depend_on_the_number_of_processes():
    """Prompt alignment is in units of the size over all processes, which `reduce` gives; InfoNCE has all positives."""
    embeds = EMBEDS * torch.tensor([1.0, 5.0, 0.2])[:, None, None]
    whole, given = losses.prompt_alignment(TOKENS, SOFT, embeds, PROMPT)[0].item(), []
    parts = [[x[rows] for x in (TOKENS, SOFT, embeds, PROMPT)] for rows in (slice(0, 1), slice(1, 3))]
    alone = [losses.prompt_alignment(*part, reduce=lambda own: given.append(own) or own)[0].item() for part in parts]
    both = tuple(map(sum, zip(*given, strict=True)))
    shares = [losses.prompt_alignment(*part, reduce=lambda own: both)[0].item() for part in parts]
    assert sum(shares) == pytest.approx(whole, rel=1e-5) != pytest.approx(sum(alone), rel=1e-2)


def test_pooling_leaves_padding_out():
    means = torch.stack([TOKENS[i, : SOFT[i].sum()].mean(0) for i in range(B)])
    assert torch.allclose(losses.pool(TOKENS, SOFT), means, atol=1e-6)


def test_policy_gradient_and_its_baseline_by_hand():
    reward = torch.tensor([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert torch.allclose(losses.leave_one_out(reward), torch.tensor([[1.0, -0.5, -0.5], [0.0, 0.0, 0.0]]))
    logits = torch.zeros(3, 2, 4)
    logits[0, 0, 1] = math.log(3.0)  # probabilities 1/6, 3/6, 1/6, 1/6
    ids, mask = torch.tensor([[1, 0], [2, 3], [0, 0]]), torch.tensor([[True, True], [True, False], [True, True]])
    wanted = -(1.0 * (math.log(0.5) + math.log(0.25)) - 0.5 * math.log(0.25) - 0.25 * 2 * math.log(0.25))
    assert values(losses.policy_gradient(logits, ids, mask, torch.tensor([1.0, -0.5, -0.25]))) == (wanted, 5)
