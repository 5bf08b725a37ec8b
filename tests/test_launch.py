"""Children and headless notebooks as they really run: progress, failure, nothing left alive.

python -m pytest tests/test_launch.py
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
import yaml
from jupyter_client.manager import start_new_kernel

from bridgekit import cli, launch, live, runs
from bridgekit.config import ConfigError, load_config

ROOT = Path(__file__).parent.parent
TINY = [
    "task.n_train=64", "task.n_val=16", "task.n_test=24", "train.val_samples=16", "train.eval_every=2",
    "train.warmup_steps=1", "eval.max_new_tokens=24", "eval.conditions=[source, target, bridged, shuffled]",
    "train.controls=[]", "bridge.bridge_dim=16", "bridge.heads=2", "bridge.depth=1", "bridge.n_soft_tokens=4",
]  # fmt: skip
ENDLESS = [*TINY, "train.steps=1000000", "train.eval_every=1000000"]
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
CELLS = {  # of small notebooks: one that trains as phase1 does, and one that has no run folder of its own
    "phase1": [
        'name = "phase1"\nsteps = 2\nrun_dir = ""\noverrides = []',
        "from bridgekit import launch\nfrom bridgekit.config import load_config\n"
        'launch.refuse_unknown("phase1", globals())',
        "config = load_config(overrides=overrides, name=name, steps=steps)\n"
        "run_dir = launch.open_run(config, run_dir)\nlaunch.run_stage(run_dir, 'baselines')",
        "launch.run_stage(run_dir, 'train')",
    ],
    "many": [
        'runs_dir = "runs"\nn = 1\noverrides = []',
        "from bridgekit import launch, runner\nfrom bridgekit.config import load_config\n"
        "planned = {f'many_a_seed{i}': load_config(overrides=overrides, seed=i) for i in range(n)}",
        "runner.run_planned(planned, runs_dir).check()",
    ],
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Children inherit it; two threads that wait for each other crawl where tests share the cores."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A project folder of its own, with the two notebooks; the package is found from there too."""
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "notebooks").mkdir()
    for name, cells in CELLS.items():
        made = [nbformat.v4.new_code_cell(text) for text in cells]
        made[0].metadata["tags"] = ["parameters"]
        notebook = nbformat.v4.new_notebook(cells=made, metadata=KERNEL)
        nbformat.write(notebook, tmp_path / "notebooks" / f"{name}.ipynb")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def start(project: Path, *arguments: str, overrides: list[str]) -> subprocess.Popen:
    """A command of the user's, in a process of its own."""
    command = [sys.executable, "-m", "bridgekit", *arguments, *(part for text in overrides for part in ("-o", text))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=project)


def open_tiny_run(*overrides: str) -> Path:
    return launch.open_run(load_config(overrides=[*TINY, *overrides]))


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


def wait_for_training(project: Path) -> Path:
    """The run folder, once its workers train: step 0 is validated."""
    run_dir = wait_until(lambda: next(project.glob("runs/phase1_*/"), None))
    wait_until((run_dir / "metrics.jsonl").exists)
    return run_dir


# -- a child and its kernel -------------------------------------------------------------------------------------


@pytest.fixture
def endless(request, project):
    """A cell that trains without end on so many workers: (kernel's manager, client, run folder)."""
    manager, client = start_new_kernel(kernel_name="python3", cwd=str(project / "notebooks"))
    run_dir = open_tiny_run(*ENDLESS, f"train.num_processes={request.param}")
    client.execute(f"from bridgekit import launch; launch.run_stage({str(run_dir)!r}, 'train')")
    wait_for_training(project)
    assert len(processes_of(run_dir)) == 1 + request.param  # the launcher and its workers
    yield manager, client, run_dir
    client.stop_channels()
    manager.shutdown_kernel(now=True)
    for process in processes_of(project):
        process.kill()


def workers(n: int):
    return pytest.mark.parametrize("endless", [n], indirect=True)


def execute_reply(client) -> dict:
    """What the kernel says of the cell; answers to earlier requests may still lie before it."""
    while (message := client.get_shell_msg(timeout=120))["msg_type"] != "execute_reply":
        pass
    return message["content"]


def launcher_of(run_dir: Path) -> psutil.Process:
    (launcher,) = [p for p in processes_of(run_dir) if "accelerate.commands.launch" in p.cmdline()]
    return launcher


@workers(2)
def test_no_process_survives_a_killed_kernel(endless):
    manager, _, run_dir = endless
    os.kill(manager.provisioner.pid, signal.SIGKILL)
    wait_until(lambda: not processes_of(run_dir), seconds=5)


@workers(2)
def test_an_interrupted_cell_ends_its_workers_even_where_their_launcher_hangs(endless):
    manager, client, run_dir = endless
    launcher_of(run_dir).suspend()
    with pytest.raises(ConfigError, match="being written by process"):
        launch.run_stage(run_dir, "train")
    manager.interrupt_kernel()
    assert execute_reply(client)["ename"] == "KeyboardInterrupt"
    assert processes_of(run_dir) == []
    status = runs.load_status(run_dir)
    assert (status["state"], status["error"]) == ("failed", "train: interrupted")


@workers(1)
def test_a_killed_worker_fails_the_cell(endless):
    """As the kernel of an operating system short of memory does it: no last word in the log."""
    _, client, run_dir = endless
    launcher = launcher_of(run_dir)
    next(process for process in processes_of(run_dir) if process != launcher).kill()
    reply = execute_reply(client)
    assert "train failed: a training process was killed by SIGKILL" in reply["evalue"]
    assert runs.load_status(run_dir)["state"] == "failed"


# -- a headless notebook ----------------------------------------------------------------------------------------


def test_a_headless_run_leaves_what_the_notebook_shows(project):
    (project / "small.yaml").write_text(yaml.safe_dump({"notebook": "phase1", "overrides": TINY}))
    (project / "more.yaml").write_text("steps: 4\noverrides: [train.batch_size=8]\n")
    child = start(project, "run", "notebooks/phase1.ipynb", "-f", "small.yaml", "-f", "more.yaml", overrides=[])
    out, err = child.communicate()
    assert child.returncode == 0, err
    (run_dir,) = project.glob("runs/phase1_*/")
    assert runs.load_run_config(run_dir).train.batch_size == 8
    executed = nbformat.read(run_dir / "phase1.ipynb", as_version=4)
    stages = [cell for cell in executed.cells if cell.cell_type == "code" and "run_stage" in cell.source]
    assert [len(cell.outputs) for cell in stages] == [1, 1], "one view that is replaced"
    data = stages[1].outputs[0].data
    assert "done" in data["text/plain"] and "<svg" in data["text/html"] and len(data["text/html"]) < 4000
    assert "train bridged · step " in out, "the terminal shows progress too"
    assert f"executed notebook  {run_dir / 'phase1.ipynb'}" in out and not list(run_dir.glob("*.*.ipynb"))
    record = runs.json.loads((run_dir / "provenance.json").read_text())
    assert record["command"] == "bridgekit run notebooks/phase1.ipynb -f small.yaml -f more.yaml"
    with pytest.raises(ConfigError, match="finished"):
        launch.run_stage(run_dir, "train")


def test_a_notebook_with_many_runs_shows_them_on_the_terminal(project, capsys):
    options = [part for text in [*TINY, "train.steps=2"] for part in ("-o", text)]
    assert cli.main(["run", "notebooks/many.ipynb", "-p", "n", "1", *options]) == 0
    assert "0 of 1 runs finished" in capsys.readouterr().out
    (folder,) = project.glob("runs/many_2*")
    assert (folder / "many.ipynb").is_file() and (project / "runs" / "many_a_seed0" / "summary.log").is_file()


def test_a_headless_run_that_fails_looks_like_one(project):
    missing = f"pair.target_model={project / 'nowhere'}"
    child = start(project, "run", "notebooks/phase1.ipynb", overrides=[*TINY, missing])
    out, err = child.communicate()
    assert child.returncode == 2 and err.startswith("error: pair.target_model") and err.count("\n") == 1
    assert not (project / "runs").exists(), "what is missing is found before a run folder is made"
    child = start(project, "run", "notebooks/phase1.ipynb", overrides=[*TINY, "bridge.source_layers='99'"])
    out, err = child.communicate()
    assert child.returncode == 1 and err.count("\n") == 1
    assert err.startswith("error: phase1.ipynb failed: ") and "bridge.source_layers" in err
    (run_dir,) = project.glob("runs/phase1_*/")
    assert runs.load_status(run_dir)["state"] == "failed"
    assert [path.name for path in run_dir.glob("*.ipynb")] == ["phase1.failed.ipynb"]


@pytest.mark.parametrize("end", ["terminate the command", "kill the kernel"])
def test_a_command_that_is_ended_takes_everything_with_it_and_says_so_in_one_line(project, end):
    child = start(project, "run", "notebooks/phase1.ipynb", overrides=ENDLESS)
    run_dir = wait_for_training(project)
    family = psutil.Process(child.pid).children(recursive=True)
    (kernel,) = [process for process in family if "ipykernel_launcher" in " ".join(process.cmdline())]
    child.terminate() if end == "terminate the command" else kernel.kill()
    out, err = child.communicate(timeout=60)
    if end == "terminate the command":
        assert child.returncode == 143 and err == "error: terminated\n"
    else:
        assert child.returncode == 1 and err.startswith("error: phase1.ipynb failed: ") and err.count("\n") == 1
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert runs.load_status(run_dir)["state"] == "failed"
    assert [path.name for path in run_dir.glob("*.ipynb")] == ["phase1.failed.ipynb"]


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"stpes": 3}, "phase1.ipynb: no parameter 'stpes': did you mean 'steps'"),
        ({"lr": 0.5}, "lr: not in the parameters cell of phase1"),
        ({"notebook": "swap"}, "parameters of 'swap', not of 'phase1'"),
        ({"notebook": "phase1", "steps": "many"}, "train.steps"),
    ],
)
def test_plain_papermill_is_refused_what_the_notebook_does_not_know(project, parameters, named):
    with pytest.raises(papermill.PapermillExecutionError, match=named):
        papermill.execute_notebook(
            "notebooks/phase1.ipynb", "out.ipynb", parameters=parameters, progress_bar=False, cwd=project / "notebooks"
        )
    assert not (project / "runs").exists()


# -- folders, words and pictures --------------------------------------------------------------------------------


def test_a_run_folder_belongs_to_one_configuration_and_lies_in_the_project(project, monkeypatch):
    monkeypatch.chdir(project / "notebooks")
    run_dir = open_tiny_run()
    assert run_dir.parent == project / "runs"
    config = runs.load_run_config(run_dir)
    assert launch.open_run(config, run_dir) == run_dir
    with pytest.raises(ConfigError, match="run_dir.*another configuration"):
        launch.open_run(config.with_(steps=9), run_dir)


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
        "from bridgekit.live import LiveView\n"
        "view = LiveView()\n"
        "for step in range(3): view.show({'stage': 'train bridged', 'step': step, 'steps': 3, 'loss': 0.5,\n"
        "    'val_accuracy': step // 2, 'seconds_left': 61, 'elapsed': 3725})\n"
        "view.close({'stage': 'done', 'state': 'finished', 'elapsed': 10})\n"
    )
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert piped.splitlines() == [
        "train bridged · step 0/3 · loss 0.500 · val 0.000 · 1:02:05 so far · 0:01:01 left",
        "train bridged · step 2/3 · loss 0.500 · val 1.000 · 1:02:05 so far · 0:01:01 left",
        "done · 0:00:10 in all",
    ]
    ours, theirs = os.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    assert shown.count("\r\x1b[K") == 4 and shown.count("\n") == 1 and shown.endswith("done · 0:00:10 in all\r\n")


def test_the_curves_show_loss_and_accuracy_and_stay_small(tmp_path):
    assert live.draw_curves(tmp_path) == "" == live.draw_curves(None)
    rows = [{"step": 0, "eval": {"bridged": 0.25}}, *({"step": s, "loss": 1000 / s} for s in range(1, 2001))]
    runs.write_jsonl(tmp_path / "metrics.jsonl", [*rows, {"step": 2000, "eval": {"bridged": 0.875}}])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20')  # a line that is being written
    picture = live.draw_curves(tmp_path)
    assert "loss 0.500" in picture and "validation accuracy 0.875" in picture and len(picture) < 3000
    assert "220,63 420,26" in picture  # a quarter and seven eighths of 60 pixels above the axis at 78


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
    assert two[two.index("--num_processes") + 1] == "2" and one[one.index("--main_process_port") + 1] == "0"
