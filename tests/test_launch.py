"""Children and headless notebooks as they really run: progress, failure, nothing left alive.

python -m pytest tests/test_launch.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import start_new_kernel

from bridgekit import cli, launch, runs
from bridgekit.config import ConfigError, load_config

ROOT = Path(__file__).parent.parent
TINY = [
    "task.n_train=64", "task.n_val=16", "task.n_test=24", "train.val_samples=16", "train.eval_every=2",
    "train.warmup_steps=1", "eval.max_new_tokens=24", "eval.conditions=[source, target, bridged, shuffled]",
    "train.controls=[constant]",
]  # fmt: skip
ENDLESS = [*TINY, "train.steps=1000000", "train.eval_every=1000000"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Children inherit it; two threads that wait for each other crawl where tests share the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def open_tiny_run(folder: Path, *overrides: str) -> Path:
    return launch.open_run(load_config(overrides=[*TINY, *overrides], runs_dir=str(folder / "runs")))


def start_run_command(folder: Path, overrides: list[str]) -> subprocess.Popen:
    """`bridgekit run` on the phase1 notebook, in a process of its own."""
    options = [part for text in (*overrides, f"run.runs_dir={folder / 'runs'}") for part in ("-o", text)]
    command = [sys.executable, "-m", "bridgekit.cli", "run", str(ROOT / "notebooks/phase1.ipynb"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every living process with this folder in its command line: launcher and workers of its runs."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        if process.info["status"] != psutil.STATUS_ZOMBIE and str(folder) in " ".join(process.info["cmdline"] or []):
            found.append(process)
    return [process for process in found if "bridgekit.train.worker" in process.info["cmdline"]]


def wait_until(condition, seconds: float = 120):
    """The first true value of `condition`; the limit is there to end a broken test, not to measure."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"nothing for {seconds} s")


def wait_for_training(folder: Path) -> Path:
    """The run folder, once its workers train."""
    run_dir = wait_until(lambda: next(folder.glob("runs/*_*/"), None))
    wait_until((run_dir / "metrics.jsonl").exists)  # step 0 is validated, the loop begins
    return run_dir


@pytest.fixture
def kernel(tmp_path):
    """A real Jupyter kernel as (manager, client); ended with everything it started."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(ROOT / "notebooks"))
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    for process in processes_of(tmp_path):
        process.kill()


def workers(*counts: int):
    return pytest.mark.parametrize("endless", counts, indirect=True)


@pytest.fixture
def endless(request, tmp_path, kernel):
    """A cell that trains without end on so many workers: (kernel's manager, client, run folder)."""
    manager, client = kernel
    run_dir = open_tiny_run(tmp_path, *ENDLESS, f"train.num_processes={request.param}")
    client.execute(f"from bridgekit import launch; launch.run_stage({str(run_dir)!r}, 'train')")
    wait_for_training(tmp_path)
    assert len(processes_of(run_dir)) == 1 + request.param  # the launcher and its workers
    return manager, client, run_dir


def execute_reply(client) -> dict:
    """What the kernel says of the cell; answers to earlier requests may still lie before it."""
    while (message := client.get_shell_msg(timeout=120))["msg_type"] != "execute_reply":
        pass
    return message["content"]


def launcher_of(run_dir: Path) -> psutil.Process:
    (launcher,) = [p for p in processes_of(run_dir) if "accelerate.commands.launch" in p.cmdline()]
    return launcher


@workers(1, 2)
def test_no_process_survives_a_killed_kernel(endless):
    manager, _, run_dir = endless
    os.kill(manager.provisioner.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(run_dir), seconds=5)


@workers(2)
def test_an_interrupted_cell_ends_its_workers_even_where_their_launcher_hangs(endless):
    manager, client, run_dir = endless
    launcher_of(run_dir).suspend()
    manager.interrupt_kernel()
    assert execute_reply(client)["ename"] == "KeyboardInterrupt"
    assert processes_of(run_dir) == []
    status = runs.read_status(run_dir)
    assert (status["state"], status["error"]) == ("failed", "train: interrupted")
    assert not (run_dir / runs.FINAL).exists()


@workers(1)
def test_a_killed_worker_fails_the_cell(endless):
    """As the kernel of an operating system short of memory does it: no last word in the log."""
    _, client, run_dir = endless
    launcher = launcher_of(run_dir)
    next(process for process in processes_of(run_dir) if process != launcher).kill()
    reply = execute_reply(client)
    assert reply["ename"] == "RuntimeError"
    assert "train failed: a training process was killed by SIGKILL" in reply["evalue"]
    assert runs.read_status(run_dir)["state"] == "failed"


def test_a_child_that_cannot_start_is_reported_in_its_own_words(tmp_path):
    run_dir = open_tiny_run(tmp_path, f"pair.source_model={tmp_path / 'nowhere'}")
    with pytest.raises(RuntimeError, match="baselines failed: pair.source_model.*nowhere.*train.log") as error:
        launch.run_stage(run_dir, "baselines")
    assert "\n" not in str(error.value)
    assert runs.read_status(run_dir)["state"] == "failed"


def test_headless_run_leaves_what_the_notebook_shows(tmp_path):
    child = start_run_command(tmp_path, [*TINY, "train.steps=4"])
    out, err = child.communicate()
    assert child.returncode == 0, err
    (run_dir,) = tmp_path.glob("runs/*_*/")
    executed = nbformat.read(run_dir / "phase1.ipynb", as_version=4)
    stages = [cell for cell in executed.cells if cell.cell_type == "code" and "run_stage" in cell.source]
    assert [len(cell.outputs) for cell in stages] == [1, 1], "one line that is replaced"
    assert "done" in stages[1].outputs[0].data["text/plain"]
    assert runs.read_status(run_dir)["state"] == "finished"
    assert "train bridged · step " in out, "the terminal shows progress too"
    verdict = json.loads((run_dir / "verdict.json").read_text())["text"]
    assert verdict in " ".join(out.split())
    for name in ("accuracy_curve", "conditions", "differences", "groups", "headroom"):
        assert (run_dir / "figures" / f"{name}.pdf").stat().st_size and f"{name}.pdf" in out
    assert f"executed notebook  {run_dir / 'phase1.ipynb'}" in out
    assert not list(run_dir.glob("*.running.ipynb")) and not list(run_dir.glob("*.failed.ipynb"))
    with pytest.raises(ConfigError, match="finished"):
        launch.run_stage(run_dir, "train")


def test_a_notebook_that_runs_nothing_is_executed_without_a_configuration(tmp_path, monkeypatch, capsys):
    cells = [
        nbformat.v4.new_code_cell("n = 1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("n"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "read.ipynb")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "read.ipynb", "-p", "n", "41"]) == 0
    (folder,) = tmp_path.glob("runs/read_*")
    executed = nbformat.read(folder / "read.ipynb", as_version=4)
    assert executed.cells[-1].outputs[0].data["text/plain"] == "41"
    assert str(folder / "read.ipynb") in capsys.readouterr().out
    assert cli.main(["run", "read.ipynb", "-o", "train.steps=1"]) == 2
    assert "takes no overrides" in capsys.readouterr().err


def test_a_headless_run_that_fails_looks_like_one(tmp_path):
    child = start_run_command(tmp_path, [*TINY, f"pair.target_model={tmp_path / 'nowhere'}"])
    out, err = child.communicate()
    assert child.returncode == 1
    assert err.startswith("error: phase1.ipynb failed: baselines failed: pair.target_model") and err.count("\n") == 1
    (run_dir,) = tmp_path.glob("runs/*_*/")
    assert runs.read_status(run_dir)["state"] == "failed"
    assert [path.name for path in run_dir.glob("*.ipynb")] == ["phase1.failed.ipynb"]
    assert not list(run_dir.glob("figures/*")) and not (run_dir / "verdict.json").exists()


def test_a_killed_kernel_fails_the_headless_run(tmp_path):
    child = start_run_command(tmp_path, ENDLESS)
    run_dir = wait_for_training(tmp_path)
    workers = psutil.Process(child.pid).children(recursive=True)
    (kernel,) = [process for process in workers if "ipykernel_launcher" in " ".join(process.cmdline())]
    kernel.kill()
    out, err = child.communicate()
    assert child.returncode == 1 and err.startswith("error: phase1.ipynb failed: ") and err.count("\n") == 1
    wait_until(lambda: not processes_of(run_dir), seconds=5)
    assert runs.read_status(run_dir)["state"] == "failed"
    assert [path.name for path in run_dir.glob("*.ipynb")] == ["phase1.failed.ipynb"]


def test_a_terminated_command_takes_everything_with_it(tmp_path):
    child = start_run_command(tmp_path, ENDLESS)
    run_dir = wait_for_training(tmp_path)
    family = psutil.Process(child.pid).children(recursive=True)
    child.terminate()
    child.communicate()
    assert child.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert alive == [] and processes_of(run_dir) == []
    assert runs.read_status(run_dir)["state"] == "failed"
    assert [path.name for path in run_dir.glob("*.ipynb")] == ["phase1.failed.ipynb"]


def test_a_run_folder_belongs_to_one_configuration(tmp_path):
    run_dir = open_tiny_run(tmp_path)
    config = runs.read_run_config(run_dir)
    assert launch.open_run(config, run_dir) == run_dir
    with pytest.raises(ConfigError, match="run_dir.*another configuration"):
        launch.open_run(config.with_(steps=9), run_dir)


def test_relative_folders_start_from_the_project_wherever_the_kernel_is(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    run_dir = launch.open_run(load_config())
    assert run_dir.parent == tmp_path / "runs"
    assert launch.project_root() == tmp_path


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("step 1\nerror: train.lr: too high\nTraceback\nValueError: x\n", "train.lr: too high"),
        ("[rank0]: torch.OutOfMemoryError: No room.\n", "torch.OutOfMemoryError: No room."),
        ("KeyError: 'a'\nsubprocess.CalledProcessError: Command '[...]' returned 1.\n", "KeyError: 'a'"),
        ("subprocess.CalledProcessError: Command '[..]' died with <Signals.SIGKILL: 9>.\n",
         "a training process was killed by SIGKILL"),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
         "  error_file: <N/A>\n  traceback : Signal 9 (SIGKILL) received by PID 77\n",
         "a training process was killed by SIGKILL"),
        ("all is well\n", None),
        ("\xff\x00 loss 0.1", None),
    ],
)  # fmt: skip
def test_the_reason_of_an_end_is_read_from_the_log(tmp_path, log, reason):
    path = tmp_path / "train.log"
    path.write_bytes(b"error: of an earlier stage\n" + log.encode("latin-1"))
    assert launch.find_error(path, len("error: of an earlier stage\n")) == reason


def test_progress_is_one_line_on_a_terminal_and_news_elsewhere(tmp_path):
    """In a process of its own, once on a pseudo-terminal and once into a pipe."""
    code = (
        "from bridgekit.launch import ProgressLine\n"
        "line = ProgressLine()\n"
        "for step in range(3): line.show({'stage': 'train bridged', 'step': step, 'steps': 3, 'loss': 0.5,\n"
        "    'val_accuracy': step // 2, 'seconds_left': 61, 'elapsed': 3725})\n"
        "line.close({'stage': 'done', 'state': 'finished', 'elapsed': 10})\n"
    )
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert piped.splitlines() == [
        "train bridged · step 0/3 · loss 0.500 · val 0.000 · 1:02:05 so far · 1:01 left",
        "train bridged · step 2/3 · loss 0.500 · val 1.000 · 1:02:05 so far · 1:01 left",
        "done · 0:10 in all",
    ]
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    assert shown.count("\r\x1b[K") == 4 and shown.count("\n") == 1 and shown.endswith("done · 0:10 in all\r\n")


def test_a_child_knows_its_parent_and_does_not_spin(tmp_path, monkeypatch):
    """Spinning OpenMP threads cost a run on a shared machine several times its length."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    code = "import os; print(*(os.environ.get(n) for n in ('BRIDGEKIT_PARENT_PID', 'GOMP_SPINCOUNT', 'MORE')))"
    for expected in ("30000", "7"):
        with open(tmp_path / "log", "wb") as log:
            launch.start_child([sys.executable, "-c", code], log, {"MORE": "1"}).wait()
        assert (tmp_path / "log").read_text().split() == [str(os.getpid()), expected, "1"]
        monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # who sets it, has it


def test_several_processes_are_started_the_way_that_works_on_cpu():
    one, two = (launch.training_command(Path("r"), "train", n) for n in (1, 2))
    assert "--multi_gpu" not in one and "--multi_gpu" in two
    assert two[two.index("--num_processes") + 1] == "2" and "--cpu" not in two
    assert one[one.index("--main_process_port") + 1] == "0"
