"""What an injector does to the target: nothing at the start, then what its message says, at every step alike.

python -m pytest tests/model/test_injectors.py
"""

from types import SimpleNamespace

import pytest
import torch

from bridgekit.config import ConfigError, load_config
from bridgekit.model.generation import answer_logits, bridged_logits
from bridgekit.model.injectors import CacheFusion, align_message
from bridgekit.model.losses import answer_nll
from bridgekit.model.message import Message

KV = dict(injector="kv", n_soft_tokens=-1)
READ = [dict(injector="residual", n_soft_tokens=k) for k in (4, -1)]
CLOSED = [*READ, KV, KV | {"kv_mix": "linear"}]  # those that leave the target's text as it is


def logits_of(pair, bridge, batch, message):
    return bridged_logits(pair.target, bridge, message, batch.before, batch.after, batch.labels, batch.labels_mask)


def alone(pair, batch):
    nothing = (batch.literal[0][:, :0], batch.literal[1][:, :0])
    return answer_logits(pair.target, nothing, batch.literal, None, batch.labels, batch.labels_mask)


@pytest.mark.parametrize("producer", ["resampler", "dit", "constant"])
@pytest.mark.parametrize("settings", CLOSED)
def test_at_the_start_the_logits_are_the_targets_own_and_every_gate_learns(one_batch, pair, producer, settings):
    _, bridge, batch, message = one_batch(producer=producer, **settings)
    logits = logits_of(pair, bridge, batch, message)
    assert torch.equal(logits, alone(pair, batch)) and set(bridge.injector.gates().values()) == {0.0}
    answer_nll(logits, batch.labels, batch.labels_mask)[0].backward()
    gates = [p for name, p in bridge.named_parameters() if name.endswith("opening")]
    assert gates and all(gate.grad.abs() > 0 for gate in gates)  # and a first step opens every gate


@pytest.mark.parametrize("settings", [*CLOSED, dict(injector="prefix+residual", n_soft_tokens=4)])
def test_an_open_gate_lets_the_message_through_and_nothing_stays_behind(one_batch, pair, settings):
    def hooks() -> list:  # reading hidden states elsewhere leaves hooks of transformers' own
        return [(*m._forward_hooks, *m._forward_pre_hooks) for m in pair.target.model.modules()]

    _, bridge, batch, message = one_batch(True, **settings)
    before = hooks()
    first = logits_of(pair, bridge, batch, message)
    assert not torch.allclose(first, alone(pair, batch), atol=1e-3)
    other = Message(message.tokens.flip(-1), message.mask, message.alignment)
    assert not torch.allclose(logits_of(pair, bridge, batch, other), first, atol=1e-4)
    assert torch.equal(alone(pair, batch), alone(pair, batch))
    assert hooks() == before


def test_aligned_tokens_are_means_of_their_spans_by_hand(one_batch, pair):
    tokens, mask = torch.arange(1.0, 9.0).view(1, 4, 2), torch.tensor([[True, True, True, False]])
    message = Message(tokens, mask, torch.tensor([[[0, 1], [1, 3], [3, 3]]]))
    found, real = align_message(message, torch.tensor([[0, 1, 2, 3]]))
    assert real.tolist() == [[True, True, False, False]] and found[0, :2].tolist() == [[1.0, 2.0], [4.0, 5.0]]
    _, bridge, batch, message = one_batch(injector="kv", n_soft_tokens=-1)
    with pytest.raises(ValueError, match="token alignment"):
        logits_of(pair, bridge, batch, Message(message.tokens, message.mask))


def test_kv_refuses_what_leaves_nothing_to_align():
    for changes, key in (
        (dict(prompt_mode="soft_only"), "bridge.prompt_mode"),
        (dict(train_prompt_mode="soft_only"), "bridge.train_prompt_mode"),
        (dict(source_view="facts", variant="context"), "bridge.source_view"),
    ):
        with pytest.raises(ConfigError, match=key):
            load_config(injector="kv", n_soft_tokens=-1, **changes)


def test_kv_refuses_layers_without_plain_keys_and_names_those_that_have_them(tiny, monkeypatch):
    def target(*plain):
        found = {i: (SimpleNamespace(width=8),) * 2 for i in plain}
        monkeypatch.setattr("bridgekit.model.injectors.try_projections", lambda parts, i, ids: found.get(i))
        model = SimpleNamespace(config=SimpleNamespace(model_type="other"))
        return SimpleNamespace(n_layers=2, hidden_size=8, parts=None, sample=[], model=model)

    for plain, out in ((), "residual"), ((1,), "bridge.inject_layers=1 or residual"):
        with pytest.raises(ConfigError, match=f"^bridge.injector: kv: other has layers .*0.*: use {out}$"):
            CacheFusion(tiny().bridge, target(*plain))
    CacheFusion(tiny().bridge, target(0, 1))
