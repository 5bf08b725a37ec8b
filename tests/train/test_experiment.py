"""One object for a notebook, a training and a finished run: what a notebook does, and what cannot be opened.

python -m pytest tests/train/test_experiment.py
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import refused

from bridgekit.config import ConfigError
from bridgekit.model.bridge import checkpoint_path, save_bridge
from bridgekit.runs import write_status
from bridgekit.tasks import told_prompt
from bridgekit.train import experiment as experiment_module
from bridgekit.train.conditions import Text
from bridgekit.train.experiment import Experiment

QUESTION = "Hal has 9 lomom of pins. How many pins?"


@pytest.fixture(scope="module")
def experiment(tiny, pair):
    """As in a notebook: no run folder, no accelerate job."""
    return Experiment(tiny(n_train=64, batch_size=16, steps=8, lr=5e-3, warmup_steps=1), pair=pair)


@pytest.fixture(scope="module")
def run(tiny, make_experiment):
    """A finished run with a bridge and a constant, without its training."""
    made = make_experiment(tiny())
    for name in ("bridged", "constant"):
        save_bridge(made.build_bridge(name), made.folder, name, {"step": "4"})
    (made.folder / "provenance.json").write_text(json.dumps(made.provenance()))
    write_status(made.folder, state="finished")
    return made.folder


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda e: e.ask([QUESTION, QUESTION]), "ask: give one question as a text"),
        (lambda e: e.ask(3), "ask: give one question as a text"),
        (lambda e: e.ask(QUESTION, names=["sorce"]), "no condition 'sorce': did you mean 'source'?"),
        (lambda e: e.answer("bridgd", e.test[:1]), "no condition 'bridgd': did you mean 'bridged'?"),
        (lambda e: e.encode(QUESTION), "encode: give Examples"),
        (lambda e: e.encode([]), "encode: give Examples"),
    ],
)
def test_what_is_no_question_and_who_answers_none_is_refused(experiment, call, named):
    with pytest.raises(ConfigError, match=re.escape(named)):
        call(experiment)


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_a_notebook_sees_a_question_states_a_message_a_loss_and_a_loop(experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = experiment.examples("val")[0]
    assert example.gold in experiment.answer("target_told", [example])[0].text
    states, mask = experiment.source_states([example]).batch([0], experiment.device)
    assert states.shape == (1, mask.sum(), len(experiment.layers), experiment.pair.source.hidden_size)
    bridge = experiment.bridges["bridged"] = experiment.build_bridge()
    assert all(map(torch.equal, bridge.parameters(), experiment.build_bridge().parameters()))  # from the run's seed
    tokens, real = experiment.encode([example])
    assert tokens.shape == (1, 4, experiment.pair.target.hidden_size) and real.all()
    optimizer, found = torch.optim.AdamW(bridge.parameters(), lr=5e-3), []
    for _ in range(8):
        losses = experiment.step_losses(bridge.train(), experiment.batch(0))
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(losses["loss"].item())
    assert set(losses) == {"nll", "loss"} and found[-1] < found[0] * 0.95
    rows = experiment.evaluate(experiment.examples("val")[:3])
    assert [row["id"] for row in rows] == [e.id for e in experiment.examples("val")[:3]]
    del experiment.bridges["bridged"]
    assert not list(tmp_path.iterdir())  # nothing is written


def test_a_question_of_one_s_own_is_answered_side_by_side(experiment):
    assert list(experiment.ask(QUESTION)["condition"]) == ["source", "target"]
    frame = experiment.ask(QUESTION, experiment.build_bridge())
    assert list(frame) == ["condition", "answer", "extracted"]
    assert list(frame["condition"]) == ["source", "target", "bridged"]
    assert not frame["answer"].str.contains("\n").any() and frame["answer"].str.contains("####").any()
    example = experiment.examples("test")[0]  # any field of an Example may be given
    frame = experiment.ask(example.question, names=("target_told",), told=example.told)
    assert list(frame["extracted"]) == [example.gold]


def test_one_message_made_of_facts_serves_every_question_about_them(tiny, make_experiment):
    for view, same in (("facts", True), ("prompt", False)):
        experiment = make_experiment(tiny(variant="context", n_facts=2, source_view=view))
        first = experiment.examples("val")[0]
        other = replace(first, id="other", question="How many bells are in 3 of something else?")
        tokens, _ = experiment.encode([first, other], experiment.build_bridge())
        assert torch.equal(tokens[0], tokens[1]) == same


def test_any_condition_answers_by_name_or_as_a_row_of_one_s_own(experiment):
    example = experiment.examples("test")[0]
    bridges = {"bridged": experiment.build_bridge()}
    for name in ("relay_full", "shuffled", "noise"):  # what they need beside the example is found
        assert len(experiment.answer(name, [example], bridges)) == 1
    assert (
        experiment.answer(Text("target", told_prompt), [example])[0].text
        == experiment.answer("target_told", [example])[0].text
    )
    with pytest.raises(ValueError, match="'union' is counted"):
        experiment.answer("union", [example])


def test_a_finished_run_opens_with_both_its_bridges_and_is_not_written_to(run, pair):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    opened = Experiment.load(run, device="cpu", pair=pair)
    assert set(opened.bridges) == {"bridged", "constant"}
    assert not any(p.requires_grad for p in opened.bridges["bridged"].parameters())
    assert all(e.novelty != "seen" for e in opened.test) and len(opened.pick("both", 3)) == 3
    opened.evaluate(opened.test[:2])
    opened.ask(QUESTION)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def test_an_exported_bridge_opens_anywhere_and_says_the_same(run, pair, tmp_path, monkeypatch):
    opened = Experiment.load(run, device="cpu", pair=pair)
    out = opened.export(tmp_path / "artifact")
    names = {"config.yaml", "provenance.json", "status.json", "CARD.md", "checkpoint"}
    assert {p.name for p in out.iterdir()} == names
    monkeypatch.chdir(out)
    again = Experiment.load(".")
    assert again.ask(QUESTION).equals(opened.ask(QUESTION))
    card = (out / "CARD.md").read_text()
    pair = opened.pair.source.fingerprint, opened.pair.target.fingerprint, "lexicon seed 2"
    assert all(part in card for part in (*pair, "step 4 of 4", "What it may claim: nothing"))
    with pytest.raises(ConfigError, match="not empty"):
        opened.export(out)


def test_a_bridge_trained_in_a_notebook_can_be_exported(experiment, tmp_path):
    experiment.bridges["bridged"] = experiment.build_bridge()
    again = Experiment.load(experiment.export(tmp_path / "artifact"), pair=experiment.pair)
    del experiment.bridges["bridged"]
    assert set(again.bridges) == {"bridged"}


def test_code_of_a_user_s_own_is_not_run_unless_trusted(copy, pair, monkeypatch):
    (copy / "code").mkdir()
    (copy / "code/code.json").write_text("{}")
    build, code_dirs = experiment_module.build_bridge, []
    monkeypatch.setattr(experiment_module, "build_bridge", lambda *given: code_dirs.append(given[-1]) or build(*given))
    assert "code of its own" in refused(Experiment.load, copy, pair=pair) and not code_dirs
    Experiment.load(copy, pair=pair, trust_code=True)
    assert set(code_dirs) == {copy / "code"}


def test_what_is_no_finished_run_is_refused(copy, pair, tmp_path):
    assert "config.yaml not found" in refused(Experiment.load, tmp_path / "nothing", pair=pair)
    for state in ("running", "failed"):
        write_status(copy, state=state)
        assert f"not finished ({state})" in refused(Experiment.load, copy, pair=pair)
    (copy / "status.json").unlink()
    assert "not finished (never started)" in refused(Experiment.load, copy, pair=pair)
    write_status(copy, state="finished")
    checkpoint_path(copy, "bridged").unlink()
    assert f"{copy}: no checkpoint/bridged.safetensors" in refused(Experiment.load, copy, pair=pair)


@pytest.mark.parametrize("role", ["source", "target"])
def test_another_pair_than_the_one_trained_on_is_refused(copy, pair, role):
    record = json.loads((copy / "provenance.json").read_text())
    (copy / "provenance.json").write_text(json.dumps(record | {role: "0123456789abcdef"}))
    message = refused(Experiment.load, copy, pair=pair)
    assert f"trained on another {role} model (0123456789abcdef" in message and f"{role}_model" in message
    for text in ("", "{}", "[]"):
        (copy / "provenance.json").write_text(text)
        assert "does not say which pair" in refused(Experiment.load, copy, pair=pair)
