"""Every producer: one contract, nothing read from padding, noise that is the example's.

python -m pytest tests/model/test_producers.py
"""

import itertools

import pytest
import torch

from bridgekit.model.message import Dropout, hashed_normal

B, S, L, LENGTHS = 3, 7, 2, (7, 3, 5)  # of conftest's `source`: examples, source tokens, captured layers
SEEDS = torch.tensor([5, 6, 2**31 - 1])
READERS = [
    ("resampler", {}),
    ("resampler", {"queries": "local"}),
    ("resampler", {"queries": "placed"}),
    ("dit", {"queries": "local"}),
    ("dit", {"queries": "placed"}),
    *(("dit", {"dit_condition": condition}) for condition in ("cross", "mean", "attention")),
]


def real(message) -> list[torch.Tensor]:
    """Each example's real soft tokens."""
    return [tokens[mask] for tokens, mask in zip(message.tokens, message.mask, strict=True)]


def same(one, other, atol: float = 1e-5) -> bool:
    return all(
        a.shape == b.shape and torch.allclose(a, b, atol=atol) for a, b in zip(real(one), real(other), strict=True)
    )


@pytest.mark.parametrize("k", [4, -1])
@pytest.mark.parametrize("producer, changes", [*READERS, ("constant", {})])
def test_padding_and_neighbours_change_nothing(build, source, producer, changes, k):
    """Also in training: what is dropped out is the example's own."""
    bridge = build(training=True, producer=producer, n_soft_tokens=k, dropout=0.2, state_dropout=0.2, **changes)
    message = bridge.encode(*source(), SEEDS)
    assert message.mask.sum(1).tolist() == (list(LENGTHS) if k == -1 else [k] * B)
    sizes = message.tokens[message.mask].pow(2).mean(-1).sqrt()
    assert torch.allclose(sizes, sizes.new_tensor(bridge.rms), rtol=1e-3)
    assert same(bridge.encode(*source(width=S + 4, filler=77.0), SEEDS), message)
    states, mask = source()
    for i, n in enumerate(LENGTHS):
        alone = bridge.encode(states[i : i + 1, :n], mask[i : i + 1, :n], SEEDS[i : i + 1])
        assert torch.allclose(real(alone)[0], real(message)[i], atol=1e-5)
    salts = [m.salt for m in bridge.modules() if isinstance(m, Dropout)]
    assert salts == list(range(1, len(salts) + 1))  # no two modules drop the same places
    assert producer == "constant" or not same(bridge.eval().encode(states, mask, SEEDS), message, atol=1e-3)


@pytest.mark.parametrize("producer, changes", READERS)
def test_a_reader_reads_every_state(build, source, producer, changes):
    """A change in any layer at any place of the prompt changes the message; a constant is deaf to it."""
    states, mask = source()
    bridge, deaf = build(producer=producer, **changes), build(producer="constant")
    before, always = bridge.encode(states, mask, SEEDS), deaf.encode(states, mask, SEEDS)
    for place, layer in itertools.product((0, 2), range(L)):
        changed = states.clone()
        changed[:, place, layer] = changed[:, place, layer].flip(-1)
        assert not same(bridge.encode(changed, mask, SEEDS), before)
        assert same(deaf.encode(changed, mask, SEEDS), always, atol=0)


@pytest.mark.parametrize("producer", ["resampler", "dit"])
def test_placed_queries_know_in_which_order_the_source_stands(build, source, producer):
    states, mask = source()
    turned = states[:, [1, 0, 2, *range(3, S)]]  # all examples have three tokens
    for queries, knows in (("placed", True), ("learned", False)):
        bridge = build(producer=producer, queries=queries)
        assert same(bridge.encode(turned, mask, SEEDS), bridge.encode(states, mask, SEEDS)) != knows


@pytest.mark.parametrize("producer, changes", READERS)
def test_attention_is_a_share_of_real_source_tokens(build, source, producer, changes):
    states, mask = source(width=S + 2)
    bridge = build(producer=producer, **changes, depth=2)
    message = bridge.encode(states, mask, SEEDS, want_attention=True)
    assert message.attention.shape == (B, 4, S + 2)
    assert torch.allclose(message.attention.sum(-1), torch.ones(B, 4), atol=1e-5)
    assert (message.attention.transpose(1, 2)[~mask] == 0).all() and (message.attention >= 0).all()
    assert same(bridge.encode(states, mask, SEEDS), message)  # looking changes nothing
    assert bridge.encode(states, mask, SEEDS).attention is None


# -- rectified flow -----------------------------------------------------------------------------------------


def teacher(pair) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (B, 6, D_t) of answers of 6, 2 and 3 tokens."""
    mask = torch.arange(6)[None, :] < torch.tensor([6, 2, 3])[:, None]
    return pair.target.embed(torch.arange(B * 6).view(B, 6) + 40), mask


@pytest.mark.parametrize("prediction", ["tokens", "velocity"])
def test_training_samples_as_evaluation_does_by_seed(build, source, prediction):
    changes = dict(producer="dit", dit_prediction=prediction)
    trained, evaluated = (build(training=flag, **changes).encode(*source(), SEEDS) for flag in (True, False))
    assert same(trained, evaluated)
    for steps, seeds in ((1, SEEDS), (4, SEEDS + 7)):
        assert not same(build(dit_steps_eval=steps, **changes).encode(*source(), seeds), evaluated, atol=1e-4)


def test_teacher_tokens_are_for_training_alone(build, source, pair):
    message = {}
    for training, wanted in itertools.product((True, False), ("teacher", "sampled")):
        bridge = build(training=training, producer="dit", dit_tokens=wanted)
        message[training, wanted] = bridge.encode(*source(), SEEDS, teacher=teacher(pair))
    assert not same(message[True, "teacher"], message[True, "sampled"], atol=1e-3)
    assert same(message[False, "teacher"], message[False, "sampled"], atol=0)
    without = build(producer="dit", dit_tokens="teacher").encode(*source(), SEEDS)  # evaluation has no gold answer
    assert same(without, message[False, "teacher"], atol=0) and without.flow_error is None


@pytest.mark.parametrize("k", [4, 8])
def test_flow_error_as_computed_by_hand(build, source, pair, k):
    """With the last layer at zero the predicted velocity is zero, and the error is that of the goal alone.

    Places beyond the teacher's end are asked for nothing.
    """
    bridge = build(producer="dit", n_soft_tokens=k, dit_prediction="velocity")
    torch.nn.init.zeros_(bridge.producer.leave.weight)
    torch.nn.init.zeros_(bridge.producer.leave.bias)
    embeds, mask = teacher(pair)
    error = bridge.encode(*source(), SEEDS, teacher=(embeds, mask)).flow_error
    noise = hashed_normal(SEEDS, (k, pair.target.hidden_size))
    for i in range(B):
        n = min(k, int(mask[i].sum()))
        goal = embeds[i, :n] / embeds[i, :n].pow(2).mean().sqrt()  # of unit size
        assert error[i].item() == pytest.approx((goal - noise[i, :n]).pow(2).mean().item(), rel=1e-4)
