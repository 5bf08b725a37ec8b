"""Many runs at once: finished ones are kept, nothing is overwritten, a failing one is reported, none is left alive.

python -m pytest tests/test_runner.py
"""

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import TINY

from bridgekit import cli, launch, runner
from bridgekit.alive import Child, lock_run
from bridgekit.config import ConfigError, load_config
from bridgekit.runner import SLOTS_PER_GPU, Runner, is_done, list_gpus, plan_jobs, run_planned
from bridgekit.runs import create_run, load_status, write_status

FINISH = "(path / 'status.json').write_text(json.dumps({'state': 'finished'}))"
FAST = TINY | dict(steps=2, n_test=8, n_val=8, val_samples=8, n_train=16, eval_every=2, max_new_tokens=4)


@pytest.fixture
def scripted(monkeypatch):
    """`scripted[name] = code`: what the child of a run does instead of training, with `path` its folder."""
    codes: dict[str, str] = {}
    usual = f"{FINISH}; (path / 'summary.log').write_text('done now')"

    def command(folder, stage, n, threads=0):
        start = f"import json, os, pathlib, time; path = pathlib.Path({str(folder)!r})\n"
        return [sys.executable, "-c", start + codes.get(folder.name, usual)]

    monkeypatch.setattr(launch, "training_command", command)
    return codes


def plan(*names: str, **changes) -> dict:
    return {name: load_config(**FAST | {"name": name} | changes) for name in names}


def test_a_finished_run_is_kept_and_another_s_is_not_taken_for_it(tmp_path, scripted):
    same, other = plan("same"), plan("other", lr=0.25)
    for name in ("same", "other", "broken"):
        write_status(create_run(plan(name)[name], tmp_path / name), state="finished")
    (tmp_path / "broken" / "config.yaml").write_text("train: {stps: 3}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    outcome = run_planned(same | other | plan("broken"), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    assert outcome.outcome["same"] == "kept" and list(outcome.failed) == ["other", "broken"]
    assert "another configuration" in outcome.outcome["other"] and "cannot be read" in outcome.outcome["broken"]
    with pytest.raises(RuntimeError, match="failed: other, broken"):
        outcome.check()
    assert is_done(tmp_path / "same", same["same"].with_(**{"run.name": "renamed", "runs_dir": "moved"}))


def test_what_another_process_writes_is_left_alone_and_what_was_begun_goes_on(tmp_path, scripted):
    locked, begun = (create_run(plan(name)[name], tmp_path / name) for name in ("locked", "begun"))
    other = create_run(plan("other", lr=0.5)["other"], tmp_path / "other")
    for folder in (locked, begun, other):
        (folder / "metrics.jsonl").write_text("half")
    with lock_run(locked):
        outcome = run_planned(plan("locked", "begun", "other"), tmp_path, 3)
    assert list(outcome.failed) == ["locked"] and "being written by process" in outcome.outcome["locked"]
    assert outcome.outcome["begun"] == outcome.outcome["other"] == "done now"
    assert (locked / "metrics.jsonl").read_text() == (begun / "metrics.jsonl").read_text() == "half"
    (moved,) = (tmp_path / ".unfinished").iterdir()  # which was begun with other settings
    assert moved.name.startswith("other_") and (moved / "metrics.jsonl").read_text() == "half"
    assert not (other / "metrics.jsonl").exists()


def test_a_failed_run_is_marked_with_its_reason_and_stops_no_other(tmp_path, scripted, capsys):
    scripted["bad"] = "print('error: train.lr: too high'); raise SystemExit(2)"
    scripted["killed"], scripted["silent"] = "os.kill(os.getpid(), 9)", "pass"
    outcome = run_planned(plan("bad", "killed", "silent", "good"), tmp_path, slots=4)
    assert sorted(outcome.failed) == ["bad", "killed", "silent"] and outcome.outcome["good"] == "done now"
    assert outcome.outcome["bad"] == "FAILED (2): train.lr: too high"
    assert outcome.outcome["killed"] == "FAILED (-9): the process ended with exit code -9"
    assert outcome.outcome["silent"] == "FAILED (0): the process ended with exit code 0"
    status = load_status(tmp_path / "bad")
    assert (status["state"], status["error"]) == ("failed", "train: train.lr: too high")
    assert "1 of 4 runs done" in capsys.readouterr().out


def test_a_pair_that_cannot_be_made_ends_its_runs_in_a_line_and_no_other(tmp_path, scripted, monkeypatch):
    models = {f"{side}_model": str(tmp_path / "pairs" / "new" / side) for side in ("source", "target")}
    planned, pairs = plan("on_new", **models) | plan("on_old"), {"new": {"lexicon_seed": 9}, "no": {"lexicon_seed": 1}}
    started = []

    def start_child(folder, command, *arguments, **extra):
        if "bridgekit.train.pretrain" in command:
            started.append(command)
            command = [sys.executable, "-c", "raise ValueError('steps')"]
        return Child(folder, command, *arguments, **extra)

    monkeypatch.setattr(runner, "Child", start_child)
    outcome = run_planned(planned, tmp_path, pairs=pairs, pair_options=["--steps", 3])
    (command,) = started
    assert command[3:] == ["--out", str(tmp_path / "pairs" / "new"), "--lexicon-seed", "9", "--steps", "3"]
    assert sorted(outcome.failed) == ["on_new", "pair new"] and outcome.outcome["on_old"] == "done now"
    assert outcome.outcome["pair new"] == "FAILED (1): ValueError: steps"
    assert "its pair could not be made" in outcome.outcome["on_new"]
    (tmp_path / "pairs" / "new" / "pair.json").write_text(json.dumps({"lexicon_seed": 8}))
    outcome = run_planned(plan("on_new", **models), tmp_path, pairs=pairs)
    assert "made with lexicon_seed 8, not 9" in outcome.outcome["pair new"] and "on_new" in outcome.failed


def test_slots_and_gpus_that_are_not_there_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="slots: .*got -1"):
        Runner([], -1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="train.num_processes: a needs 2 GPUs, there are 1"):
        Runner(plan_jobs(plan("a", num_processes=2), tmp_path))
    for visible, gpus in (("0,2, 5", ["0", "2", "5"]), ("GPU-8f1c", ["GPU-8f1c"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert list_gpus() == gpus and Runner([]).slots == (SLOTS_PER_GPU if gpus else 1)


def test_a_run_on_two_gpus_gets_two_and_is_not_overtaken(tmp_path, scripted, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = f"{FINISH}; (path / 'summary.log').write_text(os.environ['CUDA_VISIBLE_DEVICES'])"
    scripted |= dict.fromkeys(("a", "both", "z"), seen)
    planned = plan("a") | plan("both", num_processes=2) | plan("z")
    outcome = run_planned(planned, tmp_path, slots=1)
    assert list(outcome.outcome) == ["a", "both", "z"] and outcome.outcome["both"] == "0,1"
    assert {outcome.outcome["a"], outcome.outcome["z"]} <= {"0", "1"}


def test_an_interruption_ends_the_children_and_marks_their_runs(tmp_path, scripted, monkeypatch):
    """As in a notebook, whose kernel lives on after the stop button."""
    scripted["long"] = "time.sleep(600)"
    made = Runner(plan_jobs(plan("long", "next"), tmp_path), 1)
    monkeypatch.setattr(Child, "poll", lambda self: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert made.active[0].child.process.poll() is not None and not (tmp_path / "next").exists()
    assert load_status(tmp_path / "long")["error"] == "interrupted"
    with lock_run(tmp_path / "long"):
        pass


def test_a_study_is_run_by_its_command(tmp_path, scripted, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    study = {"name": "some", "base": "tiny.yaml", "seeds": [1]}
    study["variants"] = {"one": {}, "two": {"num_processes": 2, "lr": 0.5}}
    for name, values in (("tiny", FAST), ("some", study)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(values))
    scripted["some_one_seed1"] = f"(path / 'summary.log').write_text(os.environ['BRIDGEKIT_COMMAND']); {FINISH}"
    assert cli.main(["study", "some.yaml", "--only", "one"]) == 0
    shown = capsys.readouterr().out
    assert "some_one_seed1: bridgekit study some.yaml --only one\n" in shown and "1 of 1 runs done" in shown
    for wrong in (["sweep", "some.yaml", "--slots", "-1"], ["study", "some.yaml", "--only", "three"]):
        assert cli.main(wrong) == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["some_one_seed1"]
