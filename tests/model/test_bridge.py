"""A bridge from parts: named ones or a user's own, tried before training; its weights on disk.

python -m pytest tests/model/test_bridge.py
"""

import itertools
import textwrap

import numpy as np
import pytest
import torch

from bridgekit.config import ConfigError
from bridgekit.model.bridge import build_bridge, load_bridge, save_bridge
from bridgekit.model.generation import bridged_logits
from bridgekit.model.losses import answer_nll

SEEDS = torch.tensor([5, 6, 2**31 - 1])


def test_dropout_of_an_injector_does_not_depend_on_the_batch(one_batch, pair):
    _, bridge, batch, message = one_batch(True, injector="prefix+residual", n_soft_tokens=-1, dropout=0.2)
    texts = batch.before, batch.after, (batch.labels, batch.labels_mask)

    def logits(rows):
        before, after, labels = ((ids[rows], mask[rows]) for ids, mask in texts)
        return bridged_logits(pair.target, bridge, message.select(rows), before, after, *labels)

    without = logits(torch.arange(6))
    bridge.train()
    together = logits(torch.arange(6))
    assert not torch.allclose(together, without, atol=1e-3)
    for i in (0, 4):
        real_places = batch.labels_mask[i]
        assert torch.allclose(logits(torch.tensor([i]))[0][real_places], together[i][real_places], atol=1e-4)


# -- a user's own parts -------------------------------------------------------------------------------------

MINE = """
    from torch import nn

    from bridgekit.model.message import Message

    class Mine(nn.Module):
        def __init__(self, config, n_layers, source_dim, target_dim, width=8):
            super().__init__()
            self.k = config.n_soft_tokens
            self.net = nn.Sequential(nn.Linear(n_layers * source_dim, width), nn.GELU(), nn.Linear(width, target_dim))

        def forward(self, states, mask{arguments}):
            {body}
"""
MEAN = """mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        tokens = self.net(mean)[:, None].repeat(1, self.k, 1)
        return {result}"""


@pytest.fixture
def write_part(tmp_path, monkeypatch, tiny, pair):
    """`write_part(result, ...)`: a configuration whose producer is a user's file, and the bridge that it makes."""
    monkeypatch.chdir(tmp_path)  # a user's file is named from the project's root
    number = itertools.count()

    def make(result: str = "tokens", arguments: str = "", body: str = MEAN, **changes):
        path = f"mine_{next(number)}.py"
        (tmp_path / path).write_text(textwrap.dedent(MINE).format(arguments=arguments, body=body.format(result=result)))
        config = tiny(**({"producer": f"{path}:Mine"} | changes))
        return config, build_bridge(config, 2, pair.source.hidden_size, pair.target)

    return make


@pytest.mark.parametrize("injector, k", [("prefix", 4), ("kv", -1)])
def test_a_users_producer_trains_in_a_bridge(write_part, pair, val, training_set, injector, k):
    changes = dict(injector=injector, n_soft_tokens=k, producer_options=["width=12"])
    config, bridge = write_part(body=MEAN if k == 4 else "return self.net(states)", **changes)
    assert bridge.producer.net[0].out_features == 12 and bridge.metadata["producer"].endswith(":Mine")
    batch, found = training_set(config, val).batch(np.arange(6), np.arange(6)), []
    texts = batch.before, batch.after, batch.labels, batch.labels_mask
    optimizer = torch.optim.AdamW(bridge.parameters(), lr=3e-3)
    for _ in range(12):
        message = bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment)
        loss = answer_nll(bridged_logits(pair.target, bridge, message, *texts), *texts[2:])[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert message.mask.sum(1).tolist() == ([4] * 6 if k == 4 else batch.mask.sum(1).tolist())
    assert found[-1] < found[0] * 0.99


@pytest.mark.parametrize(
    "arguments, names, found",
    [
        (", *, want_attention, teacher", "[want_attention, teacher]", ["bool", "NoneType"]),
        (", **rest", "list(rest.values())", ["Tensor", "NoneType", "bool"]),
    ],
)
def test_a_users_forward_is_given_what_it_accepts(write_part, arguments, names, found):
    _, bridge = write_part(arguments=arguments, body=f"self.seen = {names}; {MEAN}")
    bridge.encode(torch.randn(2, 3, 2, bridge.producer.net[0].in_features // 2), torch.ones(2, 3).bool(), SEEDS[:2])
    assert [type(x).__name__ for x in bridge.producer.seen] == found


@pytest.mark.parametrize(
    "result, reason",
    [
        ("tokens * float('nan')", "NaN"),
        ("tokens[:, :2]", r"returned tokens \(2, 2, \d+\) of torch.float32, wanted \(2, 4, \d+\)"),
        ("tokens[:, 0]", r"returned \(2, \d+\), wanted a Message or tokens"),
        ("(tokens, mask)", "returned tuple"),
        (
            "Message(tokens, tokens[..., 0])",
            r"returned a mask \(2, 4\) of torch.float32, wanted \(2, 4\) of torch.bool",
        ),
        ("tokens.detach()", "no gradient"),
        ("self.net(states.mean(1))[:, None].repeat(1, self.k, 1)", "leave out padding"),
        ("tokens.view(7, 7)", "RuntimeError: shape"),
    ],
)
def test_a_users_producer_that_cannot_work_is_refused_in_one_line(write_part, result, reason):
    with pytest.raises(ConfigError, match=rf"^bridge.producer: .*mine_\d.py:\d+ Mine: .*{reason}.*") as caught:
        write_part(result)
    assert "\n" not in str(caught.value)


def test_trying_a_users_part_leaves_no_trace(write_part):
    torch.manual_seed(3)
    _, bridge = write_part()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    for p in bridge.producer.net[::2]:  # as many draws as building takes
        p.reset_parameters()
    assert torch.equal(torch.rand(1), drawn) and all(p.grad is None for p in bridge.parameters())


# -- on disk ------------------------------------------------------------------------------------------------


def test_weights_come_back_with_what_is_known_of_them(build, source, tmp_path):
    bridge, other = build(), build()
    torch.nn.init.normal_(bridge.producer.queries.points)
    save_bridge(bridge, tmp_path, "bridged", {"step": "300"})
    metadata = load_bridge(other, tmp_path, "bridged")
    assert torch.equal(other.encode(*source(), SEEDS).tokens, bridge.encode(*source(), SEEDS).tokens)
    assert metadata == bridge.metadata | {"step": "300"} and metadata["producer"] == "resampler"


def test_weights_of_another_shape_or_a_broken_file_are_refused(build, tmp_path):
    save_bridge(build(), tmp_path, "bridged", {})
    path = tmp_path / "checkpoint/bridged.safetensors"
    for damaged in (path.read_bytes(), path.read_bytes()[:100]):
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"^[^\n]*safetensors: does not fit the run's config.yaml \([^\n]*$"):
            load_bridge(build(bridge_dim=8), tmp_path, "bridged")
    with pytest.raises(FileNotFoundError, match="no checkpoint of 'constant'"):
        load_bridge(build(), tmp_path, "constant")
