"""Every loss against plain loops, alone and in a training step: aligned, with a gradient to the bridge.

python -m pytest tests/test_losses.py
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bridgekit.model import losses
from bridgekit.model.bridge import build_bridge
from bridgekit.model.generation import answer_logits, bridged_logits
from bridgekit.model.message import Soft
from bridgekit.train.steps import step_losses

NAMES = ("nll", "kl", "prompt", "info_nce", "format", "flow")
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


# -- through the training step ------------------------------------------------------------------------------


@pytest.fixture
def one_step(tiny, pair, val, training_set):
    """`one_step(nll_weight=1.0, ...)`: configuration, fresh bridge, batch and the losses of one step."""

    def make(**changes):
        config = tiny(**(dict(nll_weight=0.0) | changes))
        torch.manual_seed(0)
        bridge = build_bridge(config, 2, pair.source.hidden_size, pair.target)
        batch = training_set(config, val).batch(np.array([4, 0, 9]), np.array([1, 2, 3]))
        found = step_losses(config, bridge, pair.target, batch, lambda rows: (rows, 0))
        return config, bridge, batch, found

    return make


@pytest.mark.parametrize(
    "name, producer",
    [
        *((name, producer) for name in NAMES[:-1] for producer in ("resampler", "dit", "constant")),
        ("flow", "dit"),
    ],
)
def test_each_loss_alone_has_a_gradient_to_the_bridge(one_step, pair, name, producer):
    _, bridge, _, found = one_step(producer=producer, **{f"{name}_weight": 1.0})
    assert list(found) == [name]
    total, count = found[name]
    (total / count).backward()
    for part, p in bridge.named_parameters():
        gated = producer == "dit" and ".time." in f".{part}"  # opens with the first step, as the others move
        assert p.grad is not None and (gated or p.grad.abs().sum() > 0), f"{name}: nothing reaches {part}"
        assert p.grad.isfinite().all()
    assert all(p.grad is None for p in pair.target.model.parameters())


def test_a_loss_without_weight_is_not_computed(one_step):
    assert list(one_step(nll_weight=1.0)[3]) == ["nll"]
    assert one_step()[3] == {}


def plain_answer_logits(lm, before, soft, after, labels) -> torch.Tensor:
    """One example, nothing padded, through the model's own forward: the logits that predict its answer."""
    parts = [lm.embed(before), soft, lm.embed(torch.cat([after, labels]))]
    logits = lm.model(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]
    return logits[-len(labels) - 1 : -1]


def examples_of(batch):
    """(before, after, literal, labels, marker) of each example without its padding."""
    pairs = (batch.before, batch.after, batch.literal, (batch.labels, batch.labels_mask))
    for i in range(len(batch.labels)):
        ids = [part[i][mask[i]] for part, mask in pairs]
        yield *ids, batch.marker[i][: len(ids[-1])]


@pytest.mark.parametrize("position", ["start", "question", "end"])
@pytest.mark.parametrize("mode", ["soft_plus_text", "soft_only"])
@pytest.mark.parametrize("k", [0, 3, -1])
def test_answer_logits_are_those_of_the_plain_forward(one_step, pair, position, mode, k):
    """Ragged prompts, answers and soft tokens against one example at a time; k = 0: no soft tokens."""
    lm = pair.target
    _, bridge, batch, _ = one_step(soft_position=position, prompt_mode=mode, n_soft_tokens=k or 1)
    with torch.no_grad():
        message = bridge.encode(batch.states, batch.mask, batch.seeds)
        soft = Soft(message.tokens, message.mask) if k else None
        found = answer_logits(lm, batch.before, batch.after, soft, batch.labels, batch.labels_mask)
        for i, (before, after, _, labels, _) in enumerate(examples_of(batch)):
            tokens = message.tokens[i][message.mask[i]] if k else lm.embed(before[:0])
            wanted = plain_answer_logits(lm, before, tokens, after, labels)
            assert torch.allclose(found[i, : len(labels)], wanted, atol=1e-5, rtol=1e-5)


def test_a_step_s_losses_are_those_of_its_examples_one_by_one(one_step, pair):
    """The whole of the training step against plain loops over unpadded examples."""
    weights = dict(
        nll_weight=1.0, kl_weight=0.5, kl_tokens=6, format_weight=0.1, prompt_weight=0.2, info_nce_weight=1.0
    )
    config, bridge, batch, found = one_step(**weights, soft_position="end", n_soft_tokens=-1, teacher="prompt")
    lm, nothing = pair.target, torch.zeros(0, pair.target.hidden_size)
    with torch.no_grad():
        message = bridge.encode(batch.states, batch.mask, batch.seeds)
        nll, kl, marker_nll, anchors, positives, tokens, embeds = [], [], [], [], [], [], []
        for i, (before, after, literal, labels, marker) in enumerate(examples_of(batch)):
            soft = message.tokens[i][message.mask[i]]
            student = plain_answer_logits(lm, before, soft, after, labels).tolist()
            alone = plain_answer_logits(lm, literal[:0], nothing, literal, labels).tolist()
            every, ids = [[True] * len(labels)], [labels.tolist()]
            nll.append(nll_by_hand([student], ids, every))
            marker_nll.append(nll_by_hand([student], ids, [marker.tolist()]))
            kl.append(kl_by_hand([student], [alone], every, first=6))
            anchors.append(soft.mean(0).tolist())
            positives.append(lm.embed(literal).mean(0).tolist())
            tokens.append(soft.tolist())
            embeds.append(lm.embed(literal).tolist())
    for name, parts in (("nll", nll), ("kl", kl), ("format", marker_nll)):
        assert agree(found[name], (sum(t for t, _ in parts), sum(n for _, n in parts))), name
    n = [min(len(t), len(e)) for t, e in zip(tokens, embeds, strict=True)]
    ones = [[True] * k for k in n]
    tokens, embeds = ([row[:k] for row, k in zip(some, n, strict=True)] for some in (tokens, embeds))
    assert agree(found["prompt"], prompt_by_hand(tokens, ones, embeds, ones))
    assert agree(found["info_nce"], info_nce_by_hand(anchors, positives, 0, config.loss.info_nce_temperature))


def test_moving_labels_or_padding_of_a_batch_moves_every_answer_loss(one_step, pair):
    config, bridge, batch, found = one_step(nll_weight=1.0, kl_weight=1.0, format_weight=1.0)

    def again(**changes):
        return step_losses(config, bridge, pair.target, replace(batch, **changes), lambda rows: (rows, 0))

    for changes in (
        dict(labels=batch.labels.roll(1, dims=1)),
        dict(labels_mask=shift(batch.labels_mask), marker=shift(batch.marker)),
    ):
        for name, (total, _) in again(**changes).items():
            assert not math.isclose(total.item(), found[name][0].item(), rel_tol=1e-2), name
    longer = torch.cat([batch.labels, torch.full_like(batch.labels[:, :2], 7)], dim=1)  # more padding: nothing moves
    wider = {"labels_mask": batch.labels_mask, "marker": batch.marker}
    wider = {k: torch.cat([v, torch.zeros_like(v[:, :2])], dim=1) for k, v in wider.items()}
    for name, (total, count) in again(labels=longer, **wider).items():
        assert agree((total, count), (found[name][0].item(), int(found[name][1]))), name


@pytest.mark.parametrize("teacher", ["answer", "prompt"])
def test_the_flow_goes_to_the_teacher_s_embeddings(one_step, pair, teacher):
    config, bridge, batch, found = one_step(producer="dit", flow_weight=1.0, teacher=teacher)
    ids, mask = (batch.labels, batch.labels_mask) if teacher == "answer" else batch.literal
    embeds = pair.target.embed(ids)

    def error(embeds, mask) -> float:
        message = bridge.encode(batch.states, batch.mask, batch.seeds, teacher=(embeds, mask))
        return message.flow_error.sum().item()

    assert agree(found["flow"], (error(embeds, mask), len(ids)))
    for moved in (error(embeds.roll(1, dims=1), mask), error(embeds, mask_of((1, 1, 1), mask.shape[1]))):
        assert not math.isclose(moved, found["flow"][0].item(), rel_tol=1e-3)


def test_the_teacher_of_kl_reads_the_question(one_step, pair):
    """Where the bridged prompt has the same text and no soft tokens, student and teacher are one."""
    _, _, batch, _ = one_step()
    nothing = (batch.literal[0][:, :0], batch.literal[1][:, :0])
    with torch.no_grad():
        student = answer_logits(pair.target, batch.before, batch.after, None, batch.labels, batch.labels_mask)
        teacher = answer_logits(pair.target, nothing, batch.literal, None, batch.labels, batch.labels_mask)
    assert losses.kl_slice(student, teacher, batch.labels_mask)[0].item() == pytest.approx(0, abs=1e-4)


def test_bridged_logits_go_through_the_injector(one_step, pair):
    _, bridge, batch, _ = one_step()
    message = bridge.encode(batch.states, batch.mask, batch.seeds)
    soft = Soft(message.tokens, message.mask)
    wanted = answer_logits(pair.target, batch.before, batch.after, soft, batch.labels, batch.labels_mask)
    assert torch.equal(
        bridged_logits(pair.target, bridge, message, batch.before, batch.after, batch.labels, batch.labels_mask), wanted
    )
