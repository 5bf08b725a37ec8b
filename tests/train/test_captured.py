"""Captured graphs give what the usual steps give. Needs a GPU: where there is none all of it is skipped, which is said.

python -m pytest tests/train/test_captured.py
"""

import numpy as np
import pytest
import torch

from bridgekit.model import decoding
from bridgekit.train.captured import WIDTH, Captured, pad_batch
from bridgekit.train.experiment import Experiment
from bridgekit.train.trainer import build_optimizer, train_step

ON_GPU = dict(source_device="cuda", target_device="cuda", dtype="float32")
FACTS = dict(variant="context", n_facts=2, source_view="facts", teacher="facts", token_weight=1.0, queries="placed")
CASES = {
    "resampler": {},
    "kv": {"injector": "kv", "n_soft_tokens": -1},
    "residual": {"injector": "residual"},
    "dit": {"producer": "dit", "flow_weight": 0.1, "n_soft_tokens": 4},
    "decoded": {"decode_weight": 0.1, "decode_every": 2, "decode_batch": 2, "decode_tokens": 8},
    "facts": FACTS | {"prompt_weight": 0.1, "n_soft_tokens": 8, "teacher_steps": 4},
}


@pytest.mark.parametrize("more", [{}, FACTS], ids=["answer", "facts"])
def test_padding_to_a_multiple_changes_no_loss(tiny, make_experiment, more):
    experiment = make_experiment(tiny(kl_weight=0.5, prompt_weight=0.1, format_weight=0.1, dropout=0.2, **more))
    bridge, batch = experiment.build_bridge(), experiment.batch(0)
    padded = pad_batch(batch)
    assert padded.labels.shape[1] % WIDTH == 0 and padded.after[0].shape[1] % WIDTH == 0
    wanted, found = (experiment.step_losses(bridge.train(), b) for b in (batch, padded))
    assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in wanted.items()}, rel=1e-5)
    assert ("token" in wanted) == ("token_weight" in more)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES)
def test_captured_steps_train_as_the_usual_ones_do(tiny, case):
    changes = {"kl_weight": 0.5, "dropout": 0.1, "steps": 8, "lr": 1e-3} | CASES[case]
    histories = []
    for is_captured in (False, True):
        experiment = Experiment(tiny(**ON_GPU, **changes))
        bridge, data = experiment.build_bridge(), experiment.training_data()
        optimizer = build_optimizer(experiment.config, bridge)
        captured = Captured(experiment, "bridged", bridge) if is_captured else None
        steps = [train_step(experiment, "bridged", bridge, optimizer, data, i, captured) for i in range(8)]
        histories.append([{k: v.item() for k, v in step.items()} for step in steps])
    for usual, replayed in zip(*histories, strict=True):
        assert replayed == pytest.approx(usual, rel=2e-3, abs=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", ["resampler", "kv", "residual"])
def test_a_captured_decoding_says_what_the_usual_one_says(tiny, monkeypatch, case):
    experiment = Experiment(tiny(**ON_GPU, n_test=48, eval_batch_size=32, **CASES[case]))
    bridge, examples = experiment.build_bridge(), experiment.examples("test")
    with torch.no_grad():
        for name, p in bridge.named_parameters():
            if "opening" in name:
                p.fill_(0.05)
    fast = experiment.answer("bridged", examples, {"bridged": bridge})
    assert experiment.pair.target.rooms[-1].graphs
    monkeypatch.setattr(decoding, "attends_in_parts", lambda lm: False)
    plain = experiment.answer("bridged", examples, {"bridged": bridge})
    assert [g.text for g in fast] == [g.text for g in plain]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_target_on_two_gpus_trains_and_answers_as_on_one(tiny):
    losses, texts = [], []
    for place in ("cuda:0", "shard:2"):
        experiment = Experiment(tiny(**ON_GPU | {"target_device": place}, kl_weight=0.5, n_test=8, lr=1e-3, steps=3))
        assert experiment.pair.target.is_sharded == (place == "shard:2")
        bridge, data = experiment.build_bridge(), experiment.training_data()
        optimizer = build_optimizer(experiment.config, bridge)
        losses.append([train_step(experiment, "bridged", bridge, optimizer, data, i)["loss"].item() for i in range(3)])
        for condition in ("target", "bridged"):
            texts.append(
                [g.text for g in experiment.answer(condition, experiment.examples("test"), {"bridged": bridge})]
            )
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and texts[:2] == texts[2:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_that_do_not_fit_the_gpu_are_kept_in_memory(tiny):
    losses = []
    for gb in (1.0, 1e-6, 0.0):  # on the GPU, in memory, read anew
        experiment = Experiment(tiny(**ON_GPU, kl_weight=0.5, cache_states_gb=gb))
        data = experiment.training_data()
        flat = data.states.flat
        assert (flat and flat.states.device.type) == {1.0: "cuda", 1e-6: "cpu", 0.0: None}[gb]
        losses.append(experiment.step_losses(experiment.build_bridge(), data.batch(*batch_of(data)))["loss"].item())
    assert losses[1] == losses[0] == pytest.approx(losses[2], rel=1e-5)


def batch_of(data):
    """The first four examples, with a sampler's seed each."""
    return np.arange(4), np.arange(4)
