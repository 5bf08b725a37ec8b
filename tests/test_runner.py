"""Many runs at once: finished ones are kept, nothing is overwritten, a failing one is reported, none is left alive.

python -m pytest tests/test_runner.py
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import TINY

from bridgekit import cli, launch, runner, runs
from bridgekit.config import ConfigError, load_config
from bridgekit.runner import SLOTS_PER_GPU, Runner, is_done, list_gpus, run_planned
from bridgekit.runs import create_run, load_jsonl, load_status, lock_run, write_status, write_text_atomic

FAST = TINY | dict(steps=2, n_test=8, n_val=8, val_samples=8, n_train=16, eval_every=2, max_new_tokens=4)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Children inherit it; two threads that wait for each other crawl where tests share the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def scripted(monkeypatch):
    """`scripted[name] = code`: what the child of a run does instead of training, with `folder` in its sight."""
    codes: dict[str, str] = {}
    usual = (
        "import json, pathlib; pathlib.Path(folder, 'status.json').write_text(json.dumps({'state': 'finished'}))\n"
        "pathlib.Path(folder, 'summary.log').write_text('done now')"
    )

    def command(folder, stage, n, threads=0):
        return [sys.executable, "-c", f"folder = {str(folder)!r}\n" + codes.get(folder.name, usual)]

    monkeypatch.setattr(launch, "training_command", command)
    return codes


def plan(*names: str, **changes) -> dict:
    return {name: load_config(**FAST | {"name": name} | changes) for name in names}


def finish(config, folder: Path) -> Path:
    """A run folder as a finished run leaves it."""
    create_run(config, folder)
    write_text_atomic(folder / "summary.log", "done before\n")
    write_status(folder, state="finished")
    return folder


def wait_until(condition, seconds: float = 120) -> None:
    """The limit is there to end a broken test, not to measure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing for {seconds} s"
        time.sleep(0.05)


def test_a_finished_run_is_kept_and_another_s_is_not_taken_for_it(tmp_path, scripted):
    same, other = plan("same"), plan("other", lr=0.25)
    finish(same["same"], tmp_path / "same")
    finish(plan("other")["other"], tmp_path / "other")
    finish(plan("broken")["broken"], tmp_path / "broken")
    (tmp_path / "broken" / "config.yaml").write_text("train: {stps: 3}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    outcome = run_planned(same | other | plan("broken"), tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before
    assert outcome.outcome["same"] == "kept" and outcome.failed == ["other", "broken"]
    assert "another configuration" in outcome.outcome["other"] and "cannot be read" in outcome.outcome["broken"]
    with pytest.raises(RuntimeError, match="failed: other, broken"):
        outcome.check()
    assert is_done(tmp_path / "same", same["same"].with_(**{"run.name": "renamed", "runs_dir": "moved"}))


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path, scripted):
    folder = create_run(plan("a")["a"], tmp_path / "a")
    (folder / "metrics.jsonl").write_text("half")
    with lock_run(folder):
        outcome = run_planned(plan("a", "b"), tmp_path)
    assert outcome.failed == ["a"] and "being written by process" in outcome.outcome["a"]
    assert (folder / "metrics.jsonl").read_text() == "half" and outcome.outcome["b"] == "done now"


def test_an_unfinished_folder_is_moved_away_with_its_log_and_a_headroom_is_gone_on_from(tmp_path, scripted):
    begun, fresh = (create_run(plan(name)[name], tmp_path / name) for name in ("begun", "fresh"))
    (begun / "metrics.jsonl").write_text("half")
    (begun / "train.log").write_text("how far it was")
    (fresh / "headroom.jsonl").write_text("measured")
    run_planned(plan("begun", "fresh"), tmp_path).check()
    (moved,) = (tmp_path / ".unfinished").iterdir()
    assert moved.name.startswith("begun_") and (moved / "train.log").read_text() == "how far it was"
    assert not (begun / "metrics.jsonl").exists() and (fresh / "headroom.jsonl").read_text() == "measured"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("print('error: train.lr: too high'); raise SystemExit(2)", "FAILED (2): train.lr: too high"),
        ("import os; os.kill(os.getpid(), 9)", "FAILED (-9): its process ended without a word"),
        ("pass", "FAILED (0): its process ended without a word"),
    ],
)
def test_a_failed_run_is_marked_with_its_reason_and_stops_no_other(tmp_path, scripted, capsys, code, reason):
    scripted["bad"] = code
    outcome = run_planned(plan("bad", "good"), tmp_path, slots=2)
    assert outcome.failed == ["bad"] and outcome.outcome == {"bad": reason, "good": "done now"}
    status = load_status(tmp_path / "bad")
    assert status["state"] == "failed" and reason.endswith(status["error"])
    assert "1 of 2 runs done" in capsys.readouterr().out


def test_a_pair_that_cannot_be_made_ends_its_runs_in_a_line_and_no_other(tmp_path, scripted):
    models = {f"{side}_model": str(tmp_path / "pairs" / "new" / side) for side in ("source", "target")}
    planned = plan("on_new", **models) | plan("on_old")
    outcome = run_planned(planned, tmp_path, pairs={"new": {"lexicon_seed": 9}}, pair_options=["--no-such-option"])
    assert outcome.failed == ["pair new", "on_new"] and outcome.outcome["on_old"] == "done now"
    assert "its pair could not be made" in outcome.outcome["on_new"]
    (tmp_path / "pairs" / "new" / "pair.json").write_text(json.dumps({"lexicon_seed": 8}))
    outcome = run_planned(plan("on_new", **models), tmp_path, pairs={"new": {"lexicon_seed": 9}})
    assert "made with lexicon_seed 8, not 9" in outcome.outcome["pair new"] and "on_new" in outcome.failed


def test_slots_and_gpus_that_are_not_there_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="slots: .*got -1"):
        Runner({}, tmp_path, -1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="train.num_processes: a needs 2 GPUs, there are 1"):
        Runner(plan("a", num_processes=2), tmp_path)
    for visible, gpus in (("0,2, 5", ["0", "2", "5"]), ("GPU-8f1c", ["GPU-8f1c"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert list_gpus() == gpus
        assert Runner({}, tmp_path).free == dict.fromkeys(gpus or ["none"], SLOTS_PER_GPU if gpus else 1)


def test_a_run_on_two_gpus_gets_two_and_is_not_overtaken(tmp_path, scripted, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    seen = "import os, json, pathlib; p = pathlib.Path(folder); g = os.environ['CUDA_VISIBLE_DEVICES']\n"
    seen += "(p / 'status.json').write_text(json.dumps({'state': 'finished'})); (p / 'summary.log').write_text(g)"
    scripted |= dict.fromkeys(("a", "both", "z"), seen)
    planned = plan("a") | plan("both", num_processes=2) | plan("z")
    outcome = run_planned(planned, tmp_path, slots=1)
    assert list(outcome.outcome) == ["a", "both", "z"] and outcome.outcome["both"] == "0,1"


def test_progress_of_all_runs_is_one_line_that_a_waiting_terminal_can_follow(tmp_path, scripted, monkeypatch):
    scripted["long"] = (
        "import json, pathlib, time; p = pathlib.Path(folder, 'status.json')\n"
        "p.write_text(json.dumps({'state': 'running', 'stage': 'train bridged', 'step': 3, 'steps': 8}))\n"
        "time.sleep(1)\n"
        "p.write_text(json.dumps({'state': 'finished'}))"
    )
    monkeypatch.setenv("BRIDGEKIT_FOLLOWED", str(tmp_path))
    shown = []
    monkeypatch.setattr(runner.LiveView, "_show_in_notebook", lambda self, text, status: shown.append(text))
    made = Runner(plan("long", "short"), tmp_path, 1)
    made.view.in_notebook, made.view.followed = True, tmp_path
    made.run()
    assert any("0 of 2 runs finished · 0:00:0" in text and "so far" in text and "long: train bridged 3/8" in text for text in shown)
    assert load_status(tmp_path)["stage"].endswith("of 2 runs finished")


def test_an_interruption_ends_the_children_and_marks_their_runs(tmp_path, scripted, monkeypatch):
    """As in a notebook, whose kernel lives on after the stop button."""
    scripted["long"] = "import time; time.sleep(600)"
    made = Runner(plan("long", "next"), tmp_path, 1)
    monkeypatch.setattr(time, "sleep", lambda seconds: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert made.active[0].child.poll() is not None and not (tmp_path / "next").exists()
    assert load_status(tmp_path / "long")["error"] == "interrupted"
    with lock_run(tmp_path / "long"):
        pass


# -- with real trainings ----------------------------------------------------------------------------------------


@pytest.fixture
def study_file(tmp_path) -> Path:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FAST))
    study = {"name": "some", "base": str(tmp_path / "tiny.yaml"), "seeds": [1]}
    study["variants"] = {"one": {}, "two": {"num_processes": 2, "lr": 0.5}}
    (tmp_path / "some.yaml").write_text(yaml.safe_dump(study))
    return tmp_path / "some.yaml"


def test_a_study_trains_through_accelerate_on_several_processes_too(study_file, tmp_path, capsys):
    assert cli.main(["study", str(study_file), "--runs-dir", str(tmp_path / "runs"), "--slots", "1"]) == 0
    assert "2 of 2 runs done" in capsys.readouterr().out
    for name, n in (("some_one_seed1", 1), ("some_two_seed1", 2)):
        folder = tmp_path / "runs" / name
        assert load_status(folder)["state"] == "finished"
        assert len(list(load_jsonl(runs.find_eval(folder)))) == 8 + 8
        record = json.loads((folder / "provenance.json").read_text())
        assert record["processes"] == n and record["command"].startswith("bridgekit study ")
    assert cli.main(["sweep", str(study_file), "--runs-dir", str(tmp_path / "runs"), "--slots", "-1"]) == 2
    assert cli.main(["study", str(study_file), "--only", "three"]) == 2


def test_a_terminated_study_ends_with_its_children_in_one_line(study_file, tmp_path):
    study_file.write_text(study_file.read_text() + "\noverrides: [train.steps=1000000]\n")
    command = [sys.executable, "-m", "bridgekit", "study", str(study_file), "--runs-dir", str(tmp_path / "runs")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs" / "some_one_seed1"
    wait_until((folder / "metrics.jsonl").exists)
    family = psutil.Process(child.pid).children(recursive=True)
    child.terminate()
    out, err = child.communicate(timeout=60)
    assert child.returncode == 143 and err == "error: terminated\n"
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert load_status(folder)["state"] == "failed" and not (tmp_path / "runs" / "some_two_seed1").exists()
