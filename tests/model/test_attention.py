"""The shared start, computed once: losses, gradients and texts are those of whole rows, with every injector.

python -m pytest tests/model/test_attention.py
"""

from dataclasses import replace

import pytest
import torch

from bridgekit.model import attention, injectors
from bridgekit.model.attention import attends_in_parts
from bridgekit.model.decoding import TwoParts, open_steps
from bridgekit.train import data

INJECTORS = {
    "prefix": {},
    "residual": {"inject_from": "question"},
    "prefix+residual": {"inject_from": "question"},
    "kv": {"inject_from": "question", "n_soft_tokens": -1},
}


@pytest.fixture
def make_shot(tiny, make_experiment):
    """An experiment whose questions stand behind two solved ones."""

    def make(**changes):
        small = dict(n_train=16, n_val=8, val_samples=8, max_new_tokens=12)
        experiment = make_experiment(tiny(soft_position="question", kl_weight=0.5, **small, **changes))
        made, shots = experiment.examples, ""
        for example in made("train")[:2]:
            shots += f"Question: {example.question}\nAnswer:\n{example.solution}\n\n"
        experiment.examples = lambda split, share=None: [replace(e, shots=shots) for e in made(split, share)]
        return experiment

    return make


def measure(experiment, weights=None):
    """A step's loss, its gradient, and texts of source and bridged; the gates are a little open."""
    bridge = experiment.build_bridge()
    if weights:
        bridge.load_state_dict(weights)
    for name, p in bridge.named_parameters():
        if "opening" in name:
            p.data.fill_(0.05)
    batch = experiment.batch(0)
    loss = experiment.step_losses(bridge, batch)["loss"]
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in bridge.parameters() if p.grad is not None])
    examples = experiment.examples("val")[:8]
    texts = [[g.text for g in experiment.answer(name, examples, {"bridged": bridge})] for name in ("source", "bridged")]
    return loss.item(), gradient, texts, batch


@pytest.mark.parametrize("injector", INJECTORS)
def test_a_shared_start_gives_what_whole_rows_give(make_shot, monkeypatch, injector):
    experiment = make_shot(injector=injector, **INJECTORS[injector])
    assert attends_in_parts(experiment.pair.source) and attends_in_parts(experiment.pair.target)
    loss, gradient, texts, batch = measure(experiment)
    start = len(batch.shared)
    assert start == len(batch.shared_asked) > attention.LEAST and experiment.training_data().states.front is not None

    # Whole rows, where the injectors are kept from the start by hand.
    monkeypatch.setattr(attention, "LEAST", 10**9)
    monkeypatch.setattr(data, "LEAST", 10**9)
    read, align, now = injectors.Reading.forward, injectors.align_message, {}

    def read_later(self, hidden, message):
        return torch.where((now["places"] >= start)[..., None], read(self, hidden, message), hidden)

    def align_later(message, places):
        tokens, real = align(message, places)
        return tokens, real & (places >= start)

    def watch(module, args, options):
        rows = next(options[k] for k in ("inputs_embeds", "input_ids") if options.get(k) is not None)
        counted = torch.arange(rows.shape[1]).expand(rows.shape[0], -1)
        now["places"] = counted if options.get("position_ids") is None else options["position_ids"]

    monkeypatch.setattr(injectors.Reading, "forward", read_later)
    monkeypatch.setattr(injectors, "align_message", align_later)
    whole = make_shot(injector=injector, **INJECTORS[injector])
    whole.pair.target.forget()
    hook = whole.pair.target.decoder.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        wanted, wanted_gradient, wanted_texts, batch = measure(whole)
    finally:
        hook.remove()
    assert batch.shared is None
    assert loss == pytest.approx(wanted, rel=1e-5) and texts == wanted_texts
    assert (gradient - wanted_gradient).norm() < 1e-4 * wanted_gradient.norm()


def test_room_is_used_once_more_where_it_is_large_enough(pair):
    lm = pair.target
    ids = tuple(lm.tokenize(["A start that is long enough to be shared by all of the rows. " * 4])[0])
    shared = attention.share_start(lm, ids)
    room = open_steps(lm, shared, 6, 40)
    assert isinstance(room, TwoParts) and open_steps(lm, shared, 5, 30) is room
    assert open_steps(lm, shared, 2, 30) is not room and open_steps(lm, shared, 6, 400) is not room
    assert len(lm.rooms) <= 2 and attention.share_start(lm, ids) is shared
    lm.forget()
    assert not lm.rooms


def turn_wrong(lm, monkeypatch):
    monkeypatch.setattr(attention, "attend_plain", lambda q, k, v, start, visible, scale: q)


def look_back(lm, monkeypatch):
    monkeypatch.setattr(lm.decoder.config, "layer_types", ["chunked_attention"], raising=False)


@pytest.mark.parametrize("spoil", [turn_wrong, look_back])
def test_attention_of_another_kind_runs_unshared(pair, monkeypatch, spoil):
    lm = pair.target
    lm.in_parts = None
    spoil(lm, monkeypatch)
    try:
        assert not attends_in_parts(lm) and attention.share_start(lm, tuple(range(1, 50))) is None
    finally:
        lm.in_parts = None
        lm.forget()
