"""Batches: bad entries are named and stop no other, a second call does exactly what is missing.

python -m pytest tests/test_batch.py
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import nbformat
import pytest
import yaml
from conftest import TINY
from test_runner import FAST, scripted  # noqa: F401 - a fixture

from bridgekit import cli, runs
from bridgekit.batch import plan_entries

ROOT = Path(__file__).parent.parent
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
VARIANTS = {"one": {}, "two": {"lr": 0.5}}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with a study of two runs, phase1, and a notebook that writes a line into a file."""
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks/phase1.ipynb", tmp_path / "notebooks")
    cells = [nbformat.v4.new_code_cell(text) for text in ('word = "a"', "print(word, file=open('said', 'a'))")]
    for name, tags in (("say", ["parameters"]), ("untagged", [])):
        cells[0].metadata["tags"] = tags
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), tmp_path / "notebooks" / f"{name}.ipynb")
    files = {
        "tiny": FAST, "some": {"base": "tiny.yaml", "seeds": [1], "variants": VARIANTS},
        "word": {"word": "b"}, "swap": {"notebook": "swap", "steps": 3}, "model": {"overrides": ["source_model=./no"]},
    }  # fmt: skip
    for name, values in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("BRIDGEKIT_COMMAND", "")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_batch(*entries: object, more: tuple = ()) -> int:
    Path("night.yaml").write_text(yaml.safe_dump({"entries": list(entries)}))
    return cli.main(["batch", "night.yaml", *more])


PHASE1 = {"notebook": "notebooks/phase1.ipynb"}
TINY_OVERRIDES = [f"{key}={value}" for key, value in TINY.items() if key not in ("controls", "conditions")]


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ({"notebook": "notebooks/none.ipynb"}, ["none.ipynb", "no such notebook"]),
        ({"notebook": "notebooks/untagged.ipynb"}, ["untagged.ipynb", "'parameters'"]),
        (PHASE1 | {"parameters": "swap.yaml"}, ["swap.yaml", "'swap'", "'phase1'"]),
        (PHASE1 | {"parameters": "none.yaml"}, ["none.yaml"]),
        (PHASE1 | {"parameters": {"steps": 3}}, ["parameters: expected a file or a list of files"]),
        (PHASE1 | {"overrides": "steps=3"}, ["overrides", "list"]),
        (PHASE1 | {"overrides": ["stps=3"]}, ["stps", "steps"]),
        (PHASE1 | {"parameters": "model.yaml"}, ["pair.source_model", "./no"]),
        (PHASE1 | {"override": []}, ["'override'", "'overrides'"]),
        ({"study": "none.yaml"}, ["none.yaml"]),
        ({"study": "some.yaml", "overrides": []}, ["'overrides'", "'study'"]),
        ({"study": "some.yaml", "notebook": "x"}, ["notebook: FILE", "study: FILE"]),
        ("some.yaml", ["study: FILE", "'some.yaml'"]),
        (None, ["None"]),
    ],
)
def test_a_bad_entry_is_named_and_gets_no_folder(project, capsys, entry, named):
    assert run_batch(entry) == 2
    out = capsys.readouterr()
    assert out.err.startswith("bad: entry 1 (") and out.err.count("\n") == 1, out.err
    assert all(part in out.err for part in named), out.err
    assert not Path("runs").exists()


@pytest.mark.parametrize("text", ["entries: []", "runs: [a]", "entries: {a: b}", "entries: [{study: some.yaml}]\na: b"])
def test_a_file_that_is_no_batch_is_refused(project, capsys, text):
    Path("night.yaml").write_text(text)
    assert cli.main(["batch", "night.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: night.yaml: ") and "entries" in err and err.count("\n") == 1


def test_a_second_call_does_exactly_what_is_missing(project, capsys, scripted):  # noqa: F811
    """Of a study, of a notebook, and of the same notebook with other parameters; a failing run stops no other."""
    say = {"notebook": "notebooks/say.ipynb"}
    night = [{"study": "some.yaml"}, say, say | {"parameters": "word.yaml"}, say, {"study": "some.yaml"}]
    scripted["some_two_seed1"] = "print('error: train.lr: too high'); raise SystemExit(2)"
    assert run_batch(*night, more=("--jobs", "2")) == 1
    said = capsys.readouterr()
    bad = [
        "entry 4 (notebooks/say.ipynb): say is in entry 2 already",
        "entry 5 (some.yaml): some_one_seed1 is in entry",
    ]
    assert all(f"bad: {line}" in said.err.split("failed:")[0] for line in bad), said.err
    assert "failed: some_two_seed1: FAILED (2): train.lr: too high\n" in said.err and "3 of 4 runs done" in said.out
    assert sorted(Path("said").read_text()) == ["\n", "\n", "a", "b"]
    before = {path: path.stat().st_mtime_ns for path in Path("runs").glob("s*/*")}
    assert cli.main(["status"]) == 0
    shown = capsys.readouterr().out
    assert "some_two_seed1" in shown and "failed" in shown and "train: train.lr: too high" in shown
    assert "3 finished" in shown and "1 failed" in shown
    del scripted["some_two_seed1"]
    assert run_batch(*night[:3]) == 0
    out = capsys.readouterr().out
    assert "4 runs: 3 are finished or under way, 1 are started" in out and out.endswith("all is done\n"), out
    changed = {path.parent.name for path in Path("runs").glob("s*/*") if path.stat().st_mtime_ns != before.get(path)}
    assert changed == {"some_two_seed1"} and sorted(Path("said").read_text()) == ["\n", "\n", "a", "b"]


def test_what_waits_is_queued_and_without_its_batch_stale(project, capsys, tiny):
    folder = runs.create_run(tiny(), Path("runs/one"))
    for pid, state in ((os.getpid(), "queued     waits for its batch"), (2**22 + 1, "stale      its batch is gone")):
        runs.write_status(folder, state="queued", pid=pid)
        assert cli.main(["status"]) == 0 and state in capsys.readouterr().out


def test_a_clone_without_runs_is_told_how_to_make_one(project, capsys):
    assert cli.main(["status"]) == 0 and "no runs yet" in capsys.readouterr().out
    assert cli.main(["status", "nowhere"]) == 2 and "nowhere: no run folder" in capsys.readouterr().err


def test_a_notebook_that_needs_more_gpus_than_there_are_is_bad(project, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert run_batch(PHASE1 | {"overrides": ["num_processes=2"]}) == 2
    assert "train.num_processes: phase1 needs 2 GPUs, there are 1" in capsys.readouterr().err


def test_an_entry_of_another_name_is_another_run(project):
    entries = [PHASE1 | {"overrides": [f"run.name={name}", *TINY_OVERRIDES]} for name in ("a", "b")]
    jobs, bad = plan_entries(entries)
    assert not bad and [job.name for job in jobs] == ["phase1 a (entry 1)", "phase1 b (entry 2)"]
    for job in jobs:
        job.make_folder()
    again, _ = plan_entries(entries)
    assert [job.folder for job in again] == [job.folder for job in jobs] and not any(job.is_done() for job in again)
    assert [job.folder.name.rsplit("_", 2)[0] for job in again] == ["a", "b"]


# -- twenty real runs -------------------------------------------------------------------------------------------


def wait_for(reached, seconds: float = 900):
    """What `reached` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
    return found


def training_runs(project: Path, pattern: str) -> list[Path]:
    """Runs whose training has begun."""
    return [path.parent for path in project.glob(f"{pattern}/metrics.jsonl") if path.stat().st_size > 200]


def kill_worker(project: Path, run: Path) -> None:
    workers = [p for p in faults.processes_of(project, str(run)) if "bridgekit.train.worker" in p.cmdline()]
    os.kill(workers[-1].pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a disk of its own, to fill, needs root")
def test_of_twenty_runs_three_fail_are_named_and_are_what_a_second_call_does(tmp_path, monkeypatch, capsys):
    """Five notebooks and a study of fifteen runs, two at once: one is killed, one has a full disk, one entry is bad."""
    project, small = faults.make_project(tmp_path), tmp_path / "small"
    small.mkdir()
    quick = ["train.controls=[]", "loss.decode_weight=0", "train.eval_every=6", "train.steps=12"]
    phase1 = {"notebook": "notebooks/phase1.ipynb", "parameters": "small.yaml"}
    entries = [
        phase1 | {"overrides": [*quick, "train.steps=60", "run.name=killed"]},
        phase1 | {"overrides": [*quick, "train.steps=60", "run.runs_dir=small"]},
        phase1 | {"overrides": [*quick, "run.seed=3"], "parameters": "later.yaml"},
        phase1 | {"overrides": [*quick, "run.seed=4"]},
        phase1 | {"overrides": [*quick, "run.seed=5"]},
        {"study": "study.yaml"},
    ]
    study = {"base": "small.yaml", "overrides": quick, "seeds": [1, 2, 3]}
    study["variants"] = {f"lr{n}": {"train.lr": n / 1000} for n in range(1, 6)}
    (project / "study.yaml").write_text(yaml.safe_dump(study))
    (project / "night.yaml").write_text(yaml.safe_dump({"entries": entries}))
    monkeypatch.chdir(project)
    command = [sys.executable, "-m", "bridgekit", "batch", "night.yaml", "--jobs", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(small)], check=True)
    try:
        began = time.monotonic()
        batch = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        (full,) = wait_for(lambda: training_runs(project, "small/phase1_*"))
        faults.harm("disk full", project, small)
        (killed,) = wait_for(lambda: training_runs(project, "runs/killed_*"))
        kill_worker(project, killed)
        out, first = batch.communicate()[0], time.monotonic() - began
        lost = [line for line in out.splitlines() if line.startswith(("failed: ", "bad: "))][-3:]
        assert batch.returncode == 1 and "17 of 19 runs done" in out, out
        assert "killed by SIGKILL" in lost[0] and "the disk is full" in lost[1] and "later.yaml" in lost[2], out
        states = subprocess.run(
            [*command[:3], "status", "runs", "small"], capture_output=True, text=True, env=environment
        )
        assert "17 finished" in states.stdout and out.count("later.yaml") == 2, states.stdout
        faults.heal("disk full", project, small)
        (project / "later.yaml").write_text((project / "small.yaml").read_text())
        before = {run: run.stat().st_mtime_ns for run in faults.finished(project)}
        began = time.monotonic()
        again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert again.returncode == 0 and "3 are started" in again.stdout and again.stdout.endswith("all is done\n"), (
            again
        )
        assert (
            len(faults.finished(project)) == 19
            and (full / "phase1.ipynb").is_file()
            and (killed / "phase1.ipynb").is_file()
        )
        assert all(run.stat().st_mtime_ns == when for run, when in before.items()), "a finished run was written to"
        with capsys.disabled():
            print(f"\n20 runs: {first:.0f} s, then the three: {time.monotonic() - began:.0f} s\n" + "\n".join(lost))
            print(states.stdout)
    finally:
        subprocess.run(["umount", str(small)], check=False)
