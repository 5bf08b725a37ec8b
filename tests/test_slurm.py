"""Runs under a real Slurm of one node: preempted and put back, an array of which one fails, a job over its time limit.

    apt-get install slurm-wlm munge
    python -m pytest -m slow tests/test_slurm.py
    BRIDGEKIT_TRANSCRIPT=preserved_data/slurm_transcript.txt python -m pytest -m slow tests/test_slurm.py   # keeps it

What is checked without Slurm: scripts, sites and what is refused.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
import yaml

from bridgekit import cli, slurm
from bridgekit.alive import list_slurm_jobs
from bridgekit.config import ConfigError
from bridgekit.runs import FINAL, load_status

ROOT = Path(__file__).parent.parent
SITES = sorted((ROOT / "parameters/sites").glob("*.yaml"))
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
MISSING = [name for name in PROGRAMS if shutil.which(name) is None]
NAME, slow = "tests/test_slurm.py", pytest.mark.slow
SECONDS = 420  # that a run is waited for, two restarts and other work on the machine included
QUICK = "train.controls=[] loss.decode_weight=0 train.eval_every=12 eval.conditions=[source,target,bridged]".split()


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project with a small notebook, its parameters and a study of two runs."""
    monkeypatch.chdir(faults.make_project(tmp_path))
    Path("small.yaml").write_text(yaml.safe_dump({"notebook": "phase1", "overrides": [*faults.SETTINGS, *QUICK]}))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("BRIDGEKIT_COMMAND", "")
    list_slurm_jobs.cache_clear()
    return tmp_path


# -- without Slurm ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SITES, ids=lambda path: path.stem)
def test_a_shipped_site_is_known_and_its_script_is_bash(project, capsys, monkeypatch, path):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    assert cli.main(["submit", "many.yaml", "--site", str(path), "--dry-run"]) == 0
    script, site = capsys.readouterr().out, slurm.load_site(path)
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=True).returncode == 0
    assert "1) run=(train --resume runs/many_one_seed1) ;;" in script and "#SBATCH --array=1-2\n" in script
    assert all(line in script for line in site["lines"]) and f"{site['python']} -m bridgekit" in script
    assert ("for module in " + " ".join(site["modules"]) in script) == bool(site["modules"])
    assert (f"--gres={site['gres']}:1" in script) == bool(site["gres"]) and not Path("runs").exists()


@pytest.mark.parametrize(
    ("argv", "site", "named"),
    [
        ("many.yaml", {}, ["--time", "no forecast"]),
        ("many.yaml --time 90", {}, ["--time", "H:MM:SS", "'90'"]),
        ("many.yaml --time 1:00:00", {"partitions": "gpu"}, ["site.yaml", "'partitions'", "'partition'"]),
        ("many.yaml --time 1:00:00", {"modules": "gcc"}, ["site.yaml", "modules", "list"]),
        ("many.yaml --time 1:00:00 --nodes 3", {}, ["--nodes", "train.num_processes"]),
        ("many.yaml --time 1:00:00 -o train.steps=3", {}, ["-o", "many.yaml"]),
        ("none.yaml --time 1:00:00", {}, ["none.yaml"]),
        ("notebooks/none.ipynb --time 1:00:00", {}, ["notebooks/none.ipynb: no such notebook"]),
        ("many.yaml --time 1:00:00", {}, ["sbatch", "--dry-run"]),
    ],
)
def test_what_cannot_be_sent_is_refused_in_one_line(project, capsys, monkeypatch, argv, site, named):
    monkeypatch.setattr(slurm.shutil, "which", lambda name: None)
    Path("site.yaml").write_text(yaml.safe_dump(site))
    assert cli.main(["submit", *argv.split(), "--site", "site.yaml"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and all(part in err for part in named), err
    assert not Path("runs").exists()


def test_the_forecast_sets_the_time_limit_and_a_shorter_one_is_warned_of(project, capsys):
    Path("site.yaml").write_text("gres: gpu\ngpu: A100\n")
    assert cli.main(["submit", "many.yaml", "--site", "site.yaml", "--dry-run"]) == 0
    limit = re.search(r"--time=(\S+)", capsys.readouterr().out)[1]
    assert slurm.parse_time("", limit) % slurm.ROUND == 0 and slurm.parse_time("", limit) > 0
    Path("site.yaml").write_text("gres: gpu\ntime: 0:00:10\n")
    assert cli.main(["submit", "many.yaml", "--site", "site.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "warning: the time limit 0:00:10 is shorter than the forecast" in shown.err and "--time=0:00:10" in shown.out


def test_times_are_slurms():
    assert slurm.parse_time("", "2-01:00:05") == 2 * 86400 + 3605 and slurm.format_time(90061) == "25:01:01"
    with pytest.raises(ConfigError, match="D-HH:MM:SS"):
        slurm.parse_time("--time", "1:99:00")


def test_a_pair_that_is_not_made_is_made_before_its_runs(project, capsys):
    study = {"base": "small.yaml", "pairs": {"new": {"lexicon_seed": 9}}, "pair_options": ["--steps", 3]}
    study["variants"] = {"old": {}, "fresh": {"pair": "new"}}
    Path("study.yaml").write_text(yaml.safe_dump(study))
    assert cli.main(["submit", "study.yaml", "--time", "1:00:00", "--dry-run"]) == 0
    first, second = capsys.readouterr().out.split("#!/bin/bash -l\n")[1:]
    assert "run=(pair --out runs/pairs/new --lexicon-seed 9 --steps 3)" in first and "train" not in first
    assert "run=(train --resume runs/study_fresh_seed1)" in second and "array=1-2" in second


# -- with Slurm -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A Slurm of one node, for the tests of this file."""
    if MISSING:
        pytest.skip(f"no Slurm here ({', '.join(MISSING)}): apt-get install slurm-wlm munge")
    if os.geteuid():
        pytest.skip("a Slurm of one's own needs root")
    folder = tmp_path_factory.mktemp("slurm")
    began = subprocess.run([ROOT / "tests/slurm.sh", "start", folder], capture_output=True, text=True, check=False)
    if began.returncode:
        pytest.skip(f"Slurm does not start here: {began.stderr.strip()}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
    subprocess.run([ROOT / "tests/slurm.sh", "stop", folder], check=False)


@pytest.fixture(scope="module")
def transcript():
    lines: list[str] = []
    yield lines
    if place := os.environ.get("BRIDGEKIT_TRANSCRIPT"):
        text = "\n".join(lines)
        Path(ROOT / place).write_text(
            f"# Made by: BRIDGEKIT_TRANSCRIPT={place} python -m pytest -m slow {NAME}\n{text}\n"
        )


@pytest.fixture
def shell(project, cluster, transcript, request):
    """`shell("squeue")`: what a command prints, in the project; it stands in the transcript."""
    transcript.append(f"\n## {request.node.name.removeprefix('test_').replace('_', ' ')}\n")

    def run(command: str) -> str:
        line = command.replace("bridgekit ", f"{sys.executable} -m bridgekit ", 1)
        done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=project, check=False)
        shown = done.stdout + done.stderr
        for machine, name in ((str(project), "PROJECT"), (sys.executable, "python"), (os.uname().nodename, "node1")):
            shown = shown.replace(machine, name)
        transcript.append(f"$ {command}\n{shown.rstrip()}")
        return shown

    return run


def wait_for(what: str, reached, seconds: float = SECONDS):
    """What `reached` gives as soon as it gives something."""
    end = time.monotonic() + seconds
    while not (found := reached()):
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.2)
    return found


def rows(run: Path) -> int:
    """Training steps that a run has logged."""
    path = run / "metrics.jsonl"
    return len(path.read_bytes().splitlines()) if path.is_file() else 0


@slow
def test_a_preempted_run_is_put_back_and_goes_on_to_its_end(project, shell):
    submit = "bridgekit submit notebooks/phase1.ipynb -f small.yaml --time 0:20:00"
    job, (run,) = re.match(r"job (\d+): 1 run;", shell(submit))[1], faults.run_folders(project)
    shell("cat runs/slurm/phase1_*/job.sh")
    wait_for("training", lambda: rows(run) > 3)
    assert "running" in shell("bridgekit status") and "1 of 1 runs are finished or under way" in shell(submit)
    shell(f"scontrol requeue {job}")
    wait_for("the stop", lambda: load_status(run)["state"] == "stopped")
    assert f"preempted  job {job} goes on with it" in shell("bridgekit status")
    wait_for("the end", lambda: (run / "phase1.ipynb").is_file())
    wait_for("an empty queue", lambda: not shell_free("squeue --noheader"))
    assert "finished" in shell("bridgekit status") and faults.run_folders(project) == [run]
    record = json.loads((run / "provenance.json").read_text())
    assert record["slurm"]["job"] == job and record["command"].startswith("bridgekit submit notebooks/phase1.ipynb")
    assert shell("grep -o 'Slurm job [0-9]* on [a-z0-9]*' runs/LOG.md runs/REPORT.md").count(f"Slurm job {job}") == 2
    shell("cat runs/slurm/phase1_*/job.log")


def shell_free(command: str) -> str:
    """A command that is asked again and again, so no part of the transcript."""
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout


@slow
def test_of_an_array_one_fails_and_a_second_call_sends_that_one(project, shell):
    fail = "import os\n\ndef fail(message):\n    if 'SLURM_JOB_ID' in os.environ:\n"  # it is tried before it is sent
    Path("own.py").write_text(f"{fail}        raise ValueError('on purpose')\n    return message.tokens.mean()\n")
    study = yaml.safe_load(Path("many.yaml").read_text())
    study["variants"]["two"] = {"loss.extra": "own.py:fail", "loss.extra_weight": 0.1}
    Path("many.yaml").write_text(yaml.safe_dump(study))
    shell("bridgekit submit many.yaml --time 0:20:00")
    shell("bridgekit status")
    wait_for("an empty queue", lambda: not shell_free("squeue --noheader"))
    shown = shell("bridgekit status")
    assert "1 finished, 1 failed" in shown and "train: on purpose" in shown
    again = shell("bridgekit submit many.yaml --time 0:20:00 --dry-run")
    assert "1) run=(train --resume runs/many_two_seed1)" in again and "2) run" not in again


@slow
def test_a_run_over_its_time_limit_goes_on_in_its_job_until_it_is_finished(project, shell):
    """75 steps of a second each, in jobs that are asked to stop after 50 to 70 seconds."""
    own = "import time\n\ndef slow(message):\n    time.sleep(1)\n    return message.tokens.pow(2).mean()\n"
    Path("own.py").write_text(own)
    Path("site.yaml").write_text("time: 0:02:00\noptions: ['--signal=B:TERM@50']\n")
    options = "-o loss.extra=own.py:slow -o loss.extra_weight=0.1 -o train.steps=75 -o train.eval_every=25"
    submit = f"bridgekit submit notebooks/phase1.ipynb -f small.yaml {options} --site site.yaml"
    job, (run,) = re.match(r"job (\d+): 1 run;", shell(submit))[1], faults.run_folders(project)
    wait_for("the first stop", lambda: load_status(run)["state"] == "stopped")
    before = rows(run)
    assert f"preempted  job {job} goes on with it" in shell("bridgekit status") and not (run / FINAL).exists()
    wait_for("more steps", lambda: rows(run) > before)
    wait_for("an empty queue", lambda: not shell_free("squeue --noheader"))
    shown = shell(f"scontrol show job {job} | grep -o 'JobState=[A-Z]*\\|Restarts=[0-9]*\\|TimeLimit=[0-9:]*'")
    assert "COMPLETED" in shown and "Restarts=0" not in shown
    assert "finished" in shell("bridgekit status") and (run / "phase1.ipynb").is_file()
    steps = [row["step"] for row in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in row]
    asked = [row["id"] for row in map(json.loads, (run / FINAL).open())]
    assert len(steps) == len(set(steps)) and len(asked) == len(set(asked)), "a step or a test problem twice"
    assert "1 of 1 runs are finished" in shell(submit), "the test is read once"


@slow
def test_a_job_that_is_cancelled_stays_out_of_the_queue(project, shell):
    sent = shell("bridgekit submit notebooks/phase1.ipynb -f small.yaml -o train.steps=9999 --time 0:20:00")
    job, (run,) = re.match(r"job (\d+): 1 run;", sent)[1], faults.run_folders(project)
    wait_for("training", lambda: rows(run) > 3)
    shell(f"scancel {job}")
    wait_for("an empty queue", lambda: not shell_free("squeue --noheader"))
    assert "stopped" in shell("bridgekit status"), "who cancels a job does not want it back"


@slow
def test_a_module_that_is_not_there_ends_the_job_in_a_line(project, shell):
    Path("site.yaml").write_text("modules: [gcc/0.0.0]\ntime: 0:02:00\n")
    shell("bridgekit submit notebooks/phase1.ipynb -f small.yaml --site site.yaml")
    wait_for("an empty queue", lambda: not shell_free("squeue --noheader"))
    assert "error: modules: 'gcc/0.0.0' is not there (site.yaml)" in shell("cat runs/slurm/*/job.log")
    assert " has ended without it: its output is in runs/slurm" in shell("bridgekit status")


@slow
def test_a_partition_that_does_not_exist_is_refused(project, shell):
    Path("site.yaml").write_text("partition: gpu\ntime: 0:02:00\n")
    shown = shell("bridgekit submit many.yaml --site site.yaml")
    assert shown == "error: partition: no 'gpu' here (site.yaml): there are debug\n" and not Path("runs").exists()


@slow
def test_two_launchers_meet_as_those_of_two_nodes(project, shell):
    """On one host: the script of one node, with two tasks on it."""
    site = {
        "options": ["--ntasks=2", "--ntasks-per-node=2"],
        "lines": ["export BRIDGEKIT_MACHINES=2"],
        "time": "1:00:00",
    }
    Path("site.yaml").write_text(yaml.safe_dump(site))
    shell("bridgekit submit notebooks/phase1.ipynb -f small.yaml -o train.num_processes=2 --site site.yaml")
    (run,) = faults.run_folders(project)
    wait_for("an empty queue", lambda: not shell_free("squeue --noheader"))
    shell("bridgekit status")
    record = json.loads((run / "provenance.json").read_text())
    assert record["processes"] == 2 and load_status(run)["state"] == "finished", (run / "train.log").read_text()
