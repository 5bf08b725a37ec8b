"""Many runs at once: a mistaken file is refused whole, finished runs are kept, a failing one is reported.

python -m pytest tests/test_sweep.py
"""

import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import TINY

from bridgekit.config import ConfigError
from bridgekit.runs import (
    create_run,
    find_eval,
    read_jsonl,
    read_run_config,
    read_status,
    write_status,
    write_text_atomic,
)
from bridgekit.study import plan_study, read_study
from bridgekit.sweep import SLOTS_PER_GPU, Runner, Sweep, list_gpus, plan_runs, read_sweep, run_planned

FAST = TINY | dict(steps=2, n_test=8, n_val=8, val_samples=8, n_train=16, eval_every=2, max_new_tokens=4)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Children inherit it; two threads that wait for each other crawl where tests share the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def write(tmp_path):
    """`write(runs, pairs=...)`: a sweep file; TINY in it is a file of parameters small enough for a test."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(FAST))

    def make(content) -> Path:
        path = tmp_path / "some.yaml"
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        path.write_text(text.replace("TINY", str(tmp_path / "tiny.yaml")))
        return path

    return make


def command(path: Path, folder: Path) -> list[str]:
    sweep = [sys.executable, "-m", "bridgekit.cli", "sweep", str(path)]
    return [*sweep, "--runs-dir", str(folder / "runs"), "--slots", "1"]


def finish(sweep: Sweep, name: str, summary: str = "done before\n") -> Path:
    """A run folder as a finished run leaves it."""
    folder = create_run(sweep.planned[name][0], sweep.runs_dir / name)
    write_text_atomic(folder / "summary.log", summary)
    write_status(folder, state="finished")
    return folder


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("runs: [", ["some.yaml", "YAML"]),
        ("- a", ["some.yaml", "runs"]),
        ({"runs": {"a": {"parameters": "TINY"}}, "pairs": ["b"]}, ["some.yaml", "pairs"]),
        ({"runs": ["a"]}, ["some.yaml", "runs"]),
        ({"runs": {"a": {"parameters": "TINY"}}, "pair": {}}, ["some.yaml", "'pair'", "pairs"]),
        ({"runs": {"a": {"parameters": "TINY", "seed": [1]}}}, ["runs.a", "'seed'", "seeds"]),
        ({"runs": {"a": {"overrides": []}}}, ["runs.a", "parameters"]),
        ({"runs": {"a": None}}, ["runs.a", "parameters"]),
        ({"runs": {"a": {"parameters": "TINY", "pair": "b"}}}, ["runs.a.pair", "'b'", "pairs"]),
        ({"runs": {}, "pairs": {"b": {}}}, ["pairs.b", "lexicon_seed"]),
        ({"runs": {}, "pairs": {"b": {"lexicon_seed": 3, "steps": 1}}}, ["pairs.b", "lexicon_seed", "steps"]),
        ({"runs": {"a": {"parameters": "none.yaml"}}}, ["none.yaml"]),
        ({"runs": {"a": {"parameters": "TINY", "overrides": ["train.stps=3"]}}}, ["'train.steps'"]),
        ({"runs": {"a": {"parameters": "TINY", "overrides": ["n_soft_tokens=0"]}}}, ["bridge.n_soft_tokens"]),
    ],
)  # fmt: skip
def test_a_mistaken_sweep_is_refused_before_anything_starts(write, tmp_path, content, named):
    with pytest.raises(ConfigError) as caught:
        Sweep(write(content), tmp_path / "runs", 1)
    assert "\n" not in str(caught.value)
    for part in named:
        assert part in str(caught.value), str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_a_missing_sweep_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="none.yaml: no such sweep file"):
        read_sweep(tmp_path / "none.yaml")


def test_runs_are_named_by_what_they_are(write, tmp_path):
    runs = {
        "first": {"parameters": "TINY", "overrides": ["train.steps=7"], "seeds": [3, 1], "pair": "fresh"},
        "second": {"parameters": "TINY"},
    }
    path = write({"runs": runs, "pairs": {"fresh": {"lexicon_seed": 9}}})
    planned = plan_runs(path, read_sweep(path), tmp_path / "runs")
    assert list(planned) == ["some_first_seed3", "some_first_seed1", "some_second_seed1"]
    config, pair = planned["some_first_seed3"]
    assert (config.train.steps, config.run.seed, config.run.name, pair) == (7, 3, "first", "fresh")
    assert config.pair.source_model == str(tmp_path / "runs/pairs/fresh/source")
    assert config.run.cache_dir == str(tmp_path / "runs/.cache")
    assert planned["some_second_seed1"][0].pair.source_model == "embedded"


def test_some_runs_of_a_file_with_the_pairs_they_need(write, tmp_path):
    """`--only dit` is `dit` with all its seeds, and not `dit_fresh`."""
    tiny = {"parameters": "TINY", "seeds": [1, 2]}
    path = write({"runs": {"dit": tiny, "dit_fresh": tiny | {"pair": "new"}}, "pairs": {"new": {"lexicon_seed": 9}}})
    sweep = Sweep(path, tmp_path / "runs", 1)
    sweep.keep_only(["dit"])
    assert list(sweep.planned) == ["some_dit_seed1", "some_dit_seed2"] and not sweep.pair_ready
    sweep = Sweep(path, tmp_path / "runs", 1)
    sweep.keep_only(["dit_fresh"])
    assert list(sweep.planned) == ["some_dit_fresh_seed1", "some_dit_fresh_seed2"] and set(sweep.pair_ready) == {"new"}
    with pytest.raises(ConfigError, match="--only: 'fresh' is no run of this file"):
        sweep.keep_only(["fresh"])


def test_runs_take_turns_on_the_gpus_that_may_be_used(write, tmp_path, monkeypatch):
    for visible, gpus in (("0,2, 5", ["0", "2", "5"]), ("GPU-8f1c", ["GPU-8f1c"]), ("", []), ("-1", [])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert list_gpus() == gpus
        slots = Sweep(write({"runs": {"a": {"parameters": "TINY"}}}), tmp_path / "runs", 2).slots
        assert [slots.get() for _ in range(slots.qsize())] == (gpus or ["none"]) * 2


def test_a_finished_run_is_kept(write, tmp_path, capsys):
    sweep = Sweep(write({"runs": {"old": {"parameters": "TINY", "seeds": [1, 2]}}}), tmp_path / "runs", 1)
    folders = [finish(sweep, name) for name in sweep.planned]
    before = {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")}
    sweep.run()
    assert {path: path.stat().st_mtime_ns for folder in folders for path in folder.rglob("*")} == before
    assert "2 of 2 runs done" in capsys.readouterr().out


def test_a_finished_run_of_another_configuration_is_not_taken_for_this_one(write, tmp_path, capsys):
    runs = {"old": {"parameters": "TINY"}}
    folder = finish(Sweep(write({"runs": runs}), tmp_path / "runs", 1), "some_old_seed1")
    runs["old"]["overrides"] = ["train.lr=0.5"]
    sweep = Sweep(write({"runs": runs}), tmp_path / "runs", 1)
    sweep.run()
    with pytest.raises(RuntimeError, match="some_old_seed1"):
        sweep.check()
    assert "another configuration" in capsys.readouterr().out
    assert read_run_config(folder).train.lr != 0.5 and (folder / "summary.log").read_text() == "done before\n"


def test_a_failing_run_is_reported_and_the_others_go_on(write, tmp_path):
    """As a user calls it: one run is new, one is half-finished, one cannot work; the exit code says so."""
    runs = {
        "good": {"parameters": "TINY"},
        "bad": {"parameters": "TINY", "overrides": ["n_soft_tokens=2000"]},
    }
    path = write({"runs": runs})
    half = tmp_path / "runs/some_good_seed1"
    half.mkdir(parents=True)
    (half / "rest.txt").write_text("of an interrupted run")
    done = subprocess.run(command(path, tmp_path), capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: failed: some_bad_seed1") and done.stderr.count("\n") == 1
    assert (
        "some_bad_seed1: FAILED (2): bridge.n_soft_tokens: 2000 soft tokens" in done.stdout
        and "1 of 2 runs done" in done.stdout
    )
    assert read_status(half)["state"] == "finished" and not (half / "rest.txt").exists()
    assert len(list(read_jsonl(find_eval(half)))) == 8 + 8
    bad = tmp_path / "runs/some_bad_seed1"
    assert read_status(bad)["state"] == "failed" and "n_soft_tokens" in (bad / "train.log").read_text()
    assert not list(bad.glob("eval_samples*"))


def test_an_interrupted_sweep_ends_with_its_children(write, tmp_path):
    path = write({"runs": {"long": {"parameters": "TINY", "overrides": ["train.steps=1000000"], "seeds": [1, 2]}}})
    sweep = subprocess.Popen(command(path, tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def children() -> list[list[str]]:
        running = [p.info["cmdline"] or [] for p in psutil.process_iter(["cmdline"])]
        return [c for c in running if "bridgekit.train.worker" in c and str(tmp_path) in " ".join(c)]

    wait_until(children)
    sweep.terminate()
    assert sweep.wait(60) == 143
    wait_until(lambda: not children())
    assert len(list(tmp_path.glob("runs/some_long_seed*"))) == 1  # the queue was not worked off


def test_a_study_is_a_sweep_too(write, tmp_path, capsys):
    """The file of the ablation notebook; a finished run is kept, also one that was fetched from another folder."""
    path = write({"base": "TINY", "variants": {"a": [], "b": ["lr=0.5"]}, "seeds": [4], "reference": "a"})
    sweep = Sweep(path, tmp_path / "runs")
    assert list(sweep.planned) == ["some_a_seed4", "some_b_seed4"]
    for name in sweep.planned:
        finish(sweep, name)
    moved = tmp_path / "elsewhere"
    (tmp_path / "runs").rename(moved)
    outcome = run_planned(plan_study(read_study(path), moved), moved)
    outcome.check()
    assert outcome.said == {"some_a_seed4": "kept", "some_b_seed4": "kept"}
    assert "2 of 2 runs done" in capsys.readouterr().out


def test_a_mistaken_study_is_refused_before_anything_starts(write, tmp_path):
    path = write({"base": "TINY", "variants": {"a": [], "b": []}})
    with pytest.raises(ConfigError, match="'a' and 'b' are the same experiment"):
        Sweep(path, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_one_training_at_a_time_on_cpu_and_several_on_a_gpu(tmp_path, monkeypatch):
    for visible, slots in (("", 1), ("0,1", 2 * SLOTS_PER_GPU)):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert Runner({}, tmp_path).slots.qsize() == slots


def test_an_interruption_in_a_living_process_ends_the_children_and_starts_no_more(write, tmp_path, monkeypatch):
    """As in a notebook, whose kernel lives on after the stop button."""
    path = write({"base": "TINY", "variants": {"a": [], "b": ["lr=0.5"]}, "overrides": ["train.steps=1000000"]})
    runner = Sweep(path, tmp_path / "runs", 1)
    real, interrupted = threading.Thread.join, []

    def join(thread, timeout=None):
        if thread.daemon and timeout is None and not interrupted:
            wait_until(lambda: runner.children)
            interrupted.append(list(runner.children))
            raise KeyboardInterrupt
        return real(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert interrupted[0][0].poll() is not None  # gone by the time that the call returns
    wait_until(lambda: runner.slots.qsize() == 1)
    folders = list(tmp_path.glob("runs/some_*"))
    assert len(folders) == 1 and read_status(folders[0]).get("state") != "finished" and not runner.failed


def wait_until(condition, seconds: float = 120) -> None:
    """The limit is there to end a broken test, not to measure."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"nothing for {seconds} s"
        time.sleep(0.1)
