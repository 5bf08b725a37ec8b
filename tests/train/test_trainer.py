"""Training: a step's losses, the best weights by each measure, and what cannot be learned from.

python -m pytest tests/train/test_trainer.py
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import safetensors
import torch

from bridgekit.config import CONTROLS, to_flat
from bridgekit.model import losses
from bridgekit.model.bridge import checkpoint_path
from bridgekit.model.generation import Generated
from bridgekit.runs import load_jsonl
from bridgekit.train import objective, trainer
from bridgekit.train.captured import map_batch
from bridgekit.train.objective import decode_loss, encode_batch, own_steps, step_losses
from bridgekit.train.trainer import BestWeights


@pytest.fixture(scope="session")
def one_step(tiny, make_experiment, training_set, val):
    """A configuration's experiment with a bridge, three examples of unequal lengths, and the losses of one step."""

    def make(indices=(4, 0, 9), **changes):
        experiment = make_experiment(tiny(source_layers="1,2", **changes))
        bridge = experiment.build_bridge().eval()
        batch = training_set(experiment.config, val).batch(np.array(indices), np.arange(1, len(indices) + 1))
        return experiment, bridge, batch, step_losses(experiment, bridge, batch)

    return make


# The losses of one step and their gradients stand in the goldens of trainings, how they are dealt out to processes in
# test_processes.py.


def test_the_first_steps_learn_from_the_teacher_alone_and_the_others_without_it(one_step):
    staged = dict(prompt_weight=1.0, info_nce_weight=0.1, decode_weight=1.0, decode_every=1, decode_tokens=4)
    experiment, bridge, batch, first = one_step(**staged, teacher_steps=2, steps=4)
    assert set(first) == {"prompt"} and set(step_losses(experiment, bridge, batch, 1)) == {"prompt"}
    assert set(step_losses(experiment, bridge, batch, 2)) == {"nll", "info_nce", "decode"}
    weights = vars(objective.due_weights(trainer.control_config(experiment.config, "constant"), 0))
    assert [name for name in weights if name.endswith("_weight") and weights[name]] == ["nll_weight", "decode_weight"]


def test_a_loss_of_one_s_own_is_given_what_it_names(one_step):
    def spread(message, labels, scale):
        return scale * message.tokens.var(dim=1).mean()

    experiment, bridge, batch, _ = one_step(nll_weight=1.0)
    experiment.extra_loss = objective.wrap_extra_loss(spread, {"scale": 2.0})
    total, count = step_losses(experiment, bridge, batch)["extra"]
    wanted = 2 * bridge.encode(batch.states, batch.mask, batch.seeds).tokens.var(dim=1).mean()
    assert total.item() / count == pytest.approx(wanted.item(), rel=1e-5)
    takes_all = lambda **given: (given["logits"].sum(), torch.tensor(len(given)))  # noqa: E731
    experiment.extra_loss = objective.wrap_extra_loss(takes_all, {})
    assert step_losses(experiment, bridge, batch)["extra"][1] == 6


# -- decode-aware supervision -----------------------------------------------------------------------------------------

DECODE = dict(decode_weight=1.0, decode_every=2, decode_batch=4, decode_samples=3, decode_tokens=20)


def decoded(one_step, **changes):
    experiment, bridge, batch, _ = one_step(indices=range(6), **(DECODE | changes))
    return experiment, bridge, batch, bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment)


def test_the_decoded_rows_alone_give_the_same_loss(one_step):
    """Captured steps encode no others."""
    experiment, bridge, batch, message = decoded(one_step)
    few = map_batch(batch, lambda x: x[:4])
    wanted, count = decode_loss(experiment, bridge, batch, message)
    found, same = decode_loss(experiment, bridge, few, encode_batch(experiment, bridge, few, "bridged"))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5) != 0 and torch.equal(count, same)


@pytest.mark.parametrize(
    "estimator, injector, k",
    [("own_steps", "residual", 4), ("policy_gradient", "prefix", 4), ("policy_gradient", "kv", -1)],
)
def test_the_decode_loss_reaches_the_bridge(one_step, monkeypatch, estimator, injector, k):
    some_right = lambda reward: torch.arange(reward.numel()).view_as(reward) - 5.5  # noqa: E731
    monkeypatch.setattr(losses, "leave_one_out", some_right)  # the target seldom is
    experiment, bridge, batch, message = decoded(
        one_step, decode_estimator=estimator, injector=injector, n_soft_tokens=k
    )
    total, count = decode_loss(experiment, bridge, batch, message)
    assert count > 0 and math.isfinite(total.item())
    (total / count).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in bridge.parameters()), "no gradient"


def test_an_answer_is_not_right_where_the_gold_one_cannot_be_read(one_step, monkeypatch):
    experiment, bridge, batch, message = decoded(one_step, decode_estimator="policy_gradient")
    rewards = []
    monkeypatch.setattr(losses, "leave_one_out", lambda reward: rewards.append(reward) or reward)
    ids, mask = batch.final
    decode_loss(experiment, bridge, replace(batch, final=(ids[:, :0], mask[:, :0])), message)
    assert rewards[0].sum() == 0


def test_own_steps_end_before_the_marker(pair):
    ids = pair.target.tokenize(["<<3*4=12>>12 pins.\n#### 12"])[0]
    steps = own_steps(pair.target, Generated("", 0.0, len(ids), (*ids, *pair.target.eos_ids)))
    assert pair.target.tokenizer.decode(steps) == "<<3*4=12>>12 pins.\n"
    unfinished = pair.target.tokenize(["<<3*4=1"])[0]
    assert own_steps(pair.target, Generated("", 0.0, 3, tuple(unfinished))) == unfinished


# -- the best weights -------------------------------------------------------------------------------------------------


def offer_all(experiment, name: str, measured: list[tuple[float, float]]) -> BestWeights:
    """Accuracies on the mix and on source-only problems, as validation finds them in steps of one."""
    best, bridge = BestWeights(experiment, name), experiment.build_bridge(name)
    for step, (mix, only) in enumerate(measured):
        with torch.no_grad():
            next(bridge.parameters()).fill_(step)
        best.offer(bridge, step, {"mix": mix, "source_only": only})
    return best


def weights_at(experiment, name: str) -> float:
    with safetensors.safe_open(checkpoint_path(experiment.folder, name), "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).flatten()[0].item(), file.metadata()["step"]


def test_better_or_equal_is_kept_and_waiting_is_counted(tiny, make_experiment):
    experiment = make_experiment(tiny(steps=6, producer="constant"))
    found = []
    measured = [(a, 0.0) for a in (0.3, 0.5, 0.4, 0.5, 0.6, 0.1, 0.2)]
    for n in range(1, 8):
        best = offer_all(experiment, "bridged", measured[:n])
        found.append((weights_at(experiment, "bridged")[0], best.waited))
    # An equal accuracy is taken, because later weights saw more; but it is no progress.
    assert found == [(0, 0), (1, 0), (1, 1), (3, 2), (4, 0), (4, 1), (4, 2)]


def test_a_control_s_weights_come_from_its_second_half_by_three_measures(tiny, make_experiment):
    """On the mix doing nothing is best, so step 0 would win there: a control must be trained, and chosen fairly."""
    experiment = make_experiment(tiny(steps=6, controls=["constant"]))
    measured = [(0.9, 0.0), (0.8, 0.1), (0.8, 0.2), (0.7, 0.3), (0.5, 0.6), (0.5, 0.4), (0.4, 0.4)]
    best = offer_all(experiment, "constant", measured)
    assert {k: s.step for k, s in best.selections.items()} == {"mix": 3, "source_only": 4, "last": 6}
    assert best.waited == 3  # counted from half of the steps on
    bridges = best.load()
    assert list(bridges) == ["constant", "constant.source_only", "constant.last"]
    for name, step in zip(bridges, (3, 4, 6), strict=True):
        assert weights_at(experiment, name) == (step, str(step))
        assert next(bridges[name].parameters()).flatten()[0] == step


def test_a_selection_of_the_same_step_is_kept_once(tiny, make_experiment):
    experiment = make_experiment(tiny(steps=4, controls=["constant"]))
    assert list(offer_all(experiment, "constant", [(0.1, 0.1)] * 5).load()) == ["constant"]
    assert [p.stem for p in (experiment.folder / "checkpoint").iterdir()] == ["constant"]
    without_groups = [(0.5, -1.0), (0.4, -1.0), (0.6, -1.0), (0.2, -1.0), (0.1, -1.0)]
    assert list(offer_all(experiment, "constant", without_groups).load()) == ["constant", "constant.last"]


def test_patience_stops_a_bridge_at_once_and_a_control_after_half_of_its_steps(tiny, make_experiment):
    changes = dict(steps=12, eval_every=1, lr=1e-12, patience=2, val_samples=6, max_new_tokens=4)
    experiment = make_experiment(tiny(**changes, controls=["constant"]))
    steps = {}
    for name, file in (("bridged", "metrics.jsonl"), ("constant", "metrics_constant.jsonl")):
        trainer.train_bridge(experiment, name)
        steps[name] = [m["step"] for m in load_jsonl(experiment.folder / file) if "eval" in m]
    assert steps == {"bridged": [0, 1, 2], "constant": [6, 7, 8]}  # not validated before half


def test_the_time_that_is_left_is_told_once_a_tenth_of_the_steps_is_known(tiny, make_experiment):
    experiment, told = make_experiment(tiny(steps=20, eval_every=20, val_samples=6, max_new_tokens=4)), {}
    experiment.report = lambda stage, step=0, seconds_left=None, **_: told.setdefault(step, seconds_left)
    trainer.train_bridge(experiment, "bridged")
    assert told[1] is None and told[2] > 0 and told[20] == 0


# -- what is trained, and how fast ------------------------------------------------------------------------------------


def test_a_control_is_the_bridge_s_own_training_but_for_one_thing(tiny):
    config = tiny(producer="dit", flow_weight=0.1, info_nce_weight=0.2, source_only_share=0.6)
    changed = {
        name: {k for k, v in to_flat(trainer.control_config(config, name)).items() if v != to_flat(config)[k]}
        for name in CONTROLS
    }
    speak_of_the_source = {"loss.flow_weight", "loss.info_nce_weight"}
    assert changed["self_bridge"] == set()
    assert changed["constant"] == {"bridge.producer", *speak_of_the_source}
    assert changed["constant_natural"] == {"bridge.producer", "task.source_only_share", *speak_of_the_source}


def test_a_warm_up_longer_than_the_training_ends_at_the_peak(tiny):
    """Every other rate stands in the goldens."""
    assert [trainer.learning_rate(tiny(steps=3, warmup_steps=10), step) for step in range(3)] == [1 / 3, 2 / 3, 1]


def test_summary_of_rows_counts_units_and_groups():
    rows = [
        {"group": g, "unit": u, "gold_extracted": "1", "bridged_extracted": b}
        for g, u, b in (("source_only", "a", "1"), ("source_only", "a", "2"), ("both", "b", "1"), ("both", "c", "1"))
    ]
    wanted = {"bridged": 0.75, "bridged_source_only": 0.5, "n": 4, "n_units": 3}
    assert trainer.summarise_rows(rows, ("bridged",)) == wanted
    for row in rows:
        row.update(group=None, unit=None, bridged_correct=True)  # the task's own score counts
    assert trainer.summarise_rows(rows, ("bridged",)) == {"bridged": 1.0, "n": 4, "n_units": 4}
