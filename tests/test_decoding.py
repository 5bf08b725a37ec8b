"""Decode-aware supervision: what the target says by itself becomes a loss, and the loss reaches the bridge.

python -m pytest tests/test_decoding.py
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bridgekit.model import losses
from bridgekit.model.bridge import build_bridge
from bridgekit.model.generation import Generated, decode_bridged, draw, unpad
from bridgekit.tasks import load_examples
from bridgekit.tasks.answers import extract_answer
from bridgekit.train.steps import decode_loss, own_steps, step_losses

N = 6


@pytest.fixture
def one_batch(tiny, pair, val, training_set):
    def make(examples=val[:N], **changes):
        usual = dict(decode_weight=1.0, decode_every=2, decode_batch=4, decode_samples=3, decode_tokens=20)
        config = tiny(**(usual | changes))
        torch.manual_seed(0)
        bridge = build_bridge(config, 2, pair.source.hidden_size, pair.target).eval()
        batch = training_set(config, examples).batch(np.arange(N), np.arange(N))
        return config, bridge, batch, bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment)

    return make


@pytest.mark.parametrize("estimator", ["own_steps", "policy_gradient"])
@pytest.mark.parametrize("injector, k", [("prefix", 4), ("residual", 4), ("kv", -1)])
def test_the_loss_reaches_the_bridge(one_batch, pair, val, estimator, injector, k):
    unknown = [
        e for e in load_examples(one_batch()[0].with_(n_val=200), pair.lexicon_seed, "val") if e.group == "source_only"
    ][:N]
    made = one_batch(unknown, decode_estimator=estimator, injector=injector, n_soft_tokens=k, decode_tokens=60)
    config, bridge, batch, message = made
    if estimator == "policy_gradient":  # the target guesses: call a guess right that it does not make each time
        rows = torch.arange(4).repeat_interleave(3)
        texts = [unpad(ids[rows], mask[rows]) for ids, mask in (batch.before, batch.after)]
        seeds = batch.seeds[rows] + torch.arange(12)
        said = decode_bridged(pair.target, bridge, message.select(rows), *texts, 60, seeds)
        answers = [extract_answer(g.text) for g in said]
        guess = next(a for i, a in enumerate(answers) if len({*answers[i - i % 3 : i - i % 3 + 3]}) > 1)
        right = torch.tensor(pair.target.tokenize([f"#### {guess}"]))
        batch = replace(batch, final=(right.expand(N, -1), torch.ones(N, right.shape[1], dtype=torch.bool)))
    total, count = decode_loss(config, bridge, pair.target, batch, message)
    assert count > 0 and math.isfinite(total.item())
    (total / count).backward()
    grads = {n: p.grad for n, p in bridge.named_parameters() if p.grad is not None}
    assert any(g.abs().sum() > 0 for g in grads.values()), "no gradient"


def test_gold_answer_after_the_targets_own_steps_by_hand(one_batch, pair):
    """The mean over the questions' last lines, each after what the bridged target had said before its own marker."""
    config, bridge, batch, message = one_batch()
    found, count = decode_loss(config, bridge, pair.target, batch, message)
    wanted, n = 0.0, 0
    for i in range(4):
        one = message.select(torch.tensor([i]))
        before, after = batch.before[0][i][batch.before[1][i]], batch.after[0][i][batch.after[1][i]]
        said = decode_bridged(pair.target, bridge, one, [before.tolist()], [after.tolist()], 20)[0]
        steps = own_steps(pair.target, said)
        gold = batch.final[0][i][batch.final[1][i]].tolist()
        embed = pair.target.embed
        parts = [embed(before), one.tokens[0], embed(after), embed(torch.tensor(steps + gold, dtype=torch.long))]
        with torch.no_grad():
            scores = pair.target.model(inputs_embeds=torch.cat(parts)[None]).logits[0].log_softmax(-1)
        last = scores[-len(gold) - 1 : -1]
        wanted -= last.gather(1, torch.tensor(gold)[:, None]).sum().item()
        n += len(gold)
        assert pair.target.tokenizer.decode(gold, skip_special_tokens=True).startswith("####")
    assert count.item() == n and found.item() == pytest.approx(wanted, rel=1e-4)


def test_own_steps_end_before_the_marker(pair):
    ids = pair.target.tokenize(["<<3*4=12>>12 pins.\n#### 12"])[0]
    kept = own_steps(pair.target, Generated("", 0.0, len(ids), (*ids, *pair.target.eos_ids)))
    assert pair.target.tokenizer.decode(kept) == "<<3*4=12>>12 pins.\n"
    unfinished = pair.target.tokenize(["<<3*4=1"])[0]
    assert own_steps(pair.target, Generated("", 0.0, 3, tuple(unfinished))) == unfinished


def test_it_is_taken_every_few_steps_only(one_batch, pair):
    config, bridge, batch, _ = one_batch()
    taken = [
        "decode" in step_losses(config, bridge, pair.target, batch, lambda rows: (rows, 0), step) for step in range(4)
    ]
    assert taken == [False, True, False, True]


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


def test_drawn_tokens_follow_the_models_probabilities_and_their_own_seeds():
    scores = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, -1)
    seeds = torch.arange(20_000) * 13 + 5
    score, chosen = draw(scores, seeds)
    shares = torch.bincount(chosen, minlength=3) / len(chosen)
    assert torch.allclose(shares.float(), torch.tensor([0.6, 0.3, 0.1]), atol=0.015)
    assert torch.equal(score, scores.gather(1, chosen[:, None])[:, 0])
    assert torch.equal(draw(scores[:7], seeds[:7])[1], chosen[:7])  # whatever stands beside a row
    assert not torch.equal(draw(scores, seeds + 7919)[1], chosen)


def test_sampled_text_does_not_depend_on_the_batch(one_batch, pair):
    _, bridge, batch, message = one_batch()
    texts = [unpad(*part) for part in (batch.before, batch.after)]
    together = decode_bridged(pair.target, bridge, message, *texts, 20, batch.seeds)
    for i, said in enumerate(together):
        some = message.select(torch.tensor([i]))
        alone = decode_bridged(pair.target, bridge, some, *([t[i]] for t in texts), 20, batch.seeds[i : i + 1])
        assert alone[0].ids == said.ids
    assert len({g.text for g in together}) > 1
