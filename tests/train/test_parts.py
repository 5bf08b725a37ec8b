"""A user's own producer, injector and loss are tried on random numbers before a run exists.

python -m pytest tests/train/test_parts.py
"""

from pathlib import Path

import pytest
import torch

from bridgekit import cli
from bridgekit.model.geometry import make_stand_in
from bridgekit.model.pair import LanguageModel
from bridgekit.tasks import extend
from bridgekit.train import parts

OWN = """
from torch import nn

from bridgekit.model.injectors import Prefix, Residual
from bridgekit.model.message import Injector, Message


class Wide(nn.Module):
    def __init__(self, config, n_layers, source_dim, target_dim):
        super().__init__()
        self.net = nn.Linear(n_layers * source_dim, target_dim + 1)

    def forward(self, states, mask):
        return self.net(states)


class Reads(Residual):
    pass


class Raises(Injector):
    def __init__(self, config, target):
        raise ValueError("on purpose")


class Breaks(Injector):
    def attach(self, target, current):
        return target.layers[99]


class Cut(Injector):
    def soft(self, message):
        return Message(message.tokens[..., :7], message.mask)


class Nan(Prefix):
    def soft(self, message):
        return Message(message.tokens * float("nan"), message.mask)


def right(logits, labels_mask, batch, target, power=2):
    return logits.pow(power).mean() + target.embed(batch.literal[0]).mean()


def pair(logits, labels_mask, message):
    return message.tokens.mean() * (logits.mean(-1) * labels_mask).sum(), labels_mask.sum()


def rows(message):
    return message.tokens.mean((1, 2))


def nan(message):
    return message.tokens.mean() / 0 * 0


def nothing(message):
    message.tokens.mean()


def detached(logits):
    return logits.detach().mean()


def breaks(message):
    return message.tokens[:, 99].mean()


def in_place(message):
    squares = message.tokens.exp()
    mean = squares.pow(2).mean()
    squares.zero_()
    return mean


def numbers(logits):
    return 0.5, 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("BRIDGEKIT_COMMAND", "")
    return tmp_path


@pytest.mark.parametrize(
    ("key", "name", "reason"),
    [
        ("bridge.injector", "Raises", "ValueError: on purpose"),
        ("bridge.injector", "Breaks", "IndexError: index 99 is out of range"),
        ("bridge.injector", "Cut", "RuntimeError: Sizes of tensors must match"),
        ("bridge.injector", "Nan", "the target's hidden states are not finite with its message"),
        ("loss.extra", "rows", "returned shapes (2,), (): wanted a scalar, or (sum, count)"),
        ("loss.extra", "nan", "returned nan on random numbers"),
        ("loss.extra", "nothing", "it returned None, wanted a scalar"),
        ("loss.extra", "detached", "has no gradient: make it of `logits` or `message`"),
        ("loss.extra", "breaks", "IndexError: index 99 is out of bounds"),
        ("loss.extra", "in_place", "modified by an inplace operation"),
        ("loss.extra", "numbers", "returned shapes float, int: wanted"),
    ],
)
def test_a_part_of_ones_own_that_cannot_work_is_refused_in_one_line(project, capsys, key, name, reason):
    weight = ["loss.extra_weight=0.1"] if key == "loss.extra" else []
    assert parts.main([f"{key}=own.py:{name}", *weight]) == 2
    line = next(n for n, text in enumerate(OWN.splitlines(), 1) if text.startswith((f"class {name}", f"def {name}(")))
    said = capsys.readouterr().err
    assert said.startswith(f"{key}: own.py:{line} {name}: ") and said.count("\n") == 1 and reason in said, said


@pytest.mark.parametrize(
    "overrides",
    [
        "bridge.injector=own.py:Reads loss.extra=own.py:right loss.extra_options=[power=3]",
        "bridge.producer=dit loss.extra=own.py:pair",
        "bridge.injector=kv bridge.n_soft_tokens=-1 loss.extra=own.py:right",
    ],
)
def test_what_can_be_trained_with_is_let_through(project, capsys, overrides):
    assert parts.main([*overrides.split(), "loss.extra_weight=0.1"]) == 0 and capsys.readouterr().err == ""


def test_a_target_without_files_has_sizes_that_a_producer_is_tried_with(project, capsys):
    given = ["pair.target_model=geometry:tiny", "bridge.injector=own.py:Raises", "bridge.n_soft_tokens=-1"]
    assert parts.main(given) == 0
    assert parts.main([*given, "bridge.producer=own.py:Wide"]) == 2
    assert "returned tokens (2, 5, 65) of torch.float32, wanted (2, 5, 64)" in capsys.readouterr().err


def test_the_commands_try_each_part_and_write_nothing(project, capsys, monkeypatch):
    """In a process of its own, whose one line and exit code they give."""
    assert cli.main(["train", "-o", "loss.extra=own.py:rows", "-o", "loss.extra_weight=0.1"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("error: loss.extra: own.py:") and shown.err.count("\n") == 1
    tried = []
    monkeypatch.setattr(extend, "try_apart", tried.append)
    monkeypatch.setattr("bridgekit.launch.check_texts", lambda config: 1 / 0)  # nothing more is done here
    with pytest.raises(ZeroDivisionError):
        cli.main(["train", "-o", "bridge.injector=own.py:Raises"])
    assert "bridge.injector=own.py:Raises" in tried[0] and not Path("runs").exists()


def test_a_stand_in_is_what_the_target_is_but_for_its_numbers(pair):
    folder = parts.find_model("target_model", "embedded").folder
    model, tokenizer = make_stand_in(folder)
    lm = LanguageModel(model, tokenizer, "", "")
    real = {name: weight.shape for name, weight in pair.target.model.state_dict().items() if "mlp" not in name}
    assert {name: weight.shape for name, weight in model.state_dict().items() if "mlp" not in name} == real
    assert lm.sample == pair.target.sample and not any(p.requires_grad for p in model.parameters())
    assert not torch.equal(lm.embed(torch.tensor([3])), pair.target.embed(torch.tensor([3])))
