"""Start a run's work in a child under `accelerate launch`, and show from outside how far it is.

    run_dir = open_run(config)
    run_stage(run_dir, "baselines")  # source and target alone, before any training
    run_stage(run_dir, "train")  # train, controls, final evaluation

The child's output goes to `train.log` in the run folder; what it is doing stands in `status.json`, which it
replaces atomically. This process imports no torch and holds no GPU.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import typing
from pathlib import Path

from bridgekit.config import Config, ConfigError
from bridgekit.runs import create_run, read_run_config, read_status, write_status

STAGES = ("baselines", "train")
POLL_SECONDS = 0.25
KILL_SECONDS = 3.0  # between asking the child to stop and making it
# What the worker says of its end, and, where it could say nothing, what the launcher above it saw.
_WORKER_ERROR = re.compile(r"(?:\[\w+\]: ?)?(?:error: (?P<own>.+)|(?P<python>[\w.]*(?:Error|Exception)\b.*))")
_KILLED = re.compile(r"died with <Signals\.(\w+)|Signal \d+ \((\w+)\) received by PID")
_LAUNCHER = ("subprocess.", "torch.distributed.elastic")


def project_root() -> Path:
    """What relative paths of a configuration start from; JupyterLab starts a kernel beside its notebook."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / "pyproject.toml").is_file()), here)


def open_run(config: Config, run_dir: str | Path = "") -> Path:
    """The run folder: a new one, or the one that was made for this very configuration."""
    if run_dir:
        if read_run_config(run_dir) != config:
            raise ConfigError(f"run_dir: '{run_dir}' was made for another configuration; leave run_dir empty")
        return Path(run_dir).resolve()
    with contextlib.chdir(project_root()):
        return create_run(config).resolve()


def run_training(run_dir: str | Path) -> None:
    """Every stage of one run, one after the other."""
    for stage in STAGES:
        run_stage(run_dir, stage)


def run_stage(run_dir: str | Path, stage: str) -> None:
    """Run one stage of a run in a child process and wait for it, showing one live line.

    Raises RuntimeError with the child's own reason if it fails. However this call ends, the child is gone.
    """
    run_dir = Path(run_dir).resolve()
    config = read_run_config(run_dir)
    if read_status(run_dir).get("state") == "finished":
        raise ConfigError(f"run '{run_dir}' is finished, and its test set is read once: open a new run")
    write_status(run_dir, state="running", stage=stage)
    line = ProgressLine()
    with open(run_dir / "train.log", "ab") as log:
        start = log.tell()
        child = start_child(training_command(run_dir, stage, config.train.num_processes), log)
        try:
            while child.poll() is None:
                line.show(read_status(run_dir))
                time.sleep(POLL_SECONDS)
        except BaseException:
            kill_tree(child)
            mark_failed(run_dir, f"{stage}: interrupted")
            raise
    if child.returncode != 0:
        reason = find_error(run_dir / "train.log", start)
        reason = reason or f"the training process ended with exit code {child.returncode}"
        mark_failed(run_dir, f"{stage}: {reason}")
        line.close(read_status(run_dir))
        raise RuntimeError(f"{stage} failed: {reason} (log: {run_dir / 'train.log'})")
    status = read_status(run_dir)
    if status["state"] == "running":  # the last stage itself says that the run is finished
        write_status(run_dir, **status | {"stage": f"{stage} done"})
    line.close(read_status(run_dir))


def mark_failed(run_dir: Path, reason: str) -> None:
    """The status of a run that will not finish; how far it was stays in it. The log of all runs says so too."""
    from bridgekit.results.reports import report_end

    write_status(run_dir, **read_status(run_dir) | {"state": "failed", "error": reason, "seconds_left": None})
    report_end(run_dir)


def training_command(run_dir: Path, stage: str, num_processes: int) -> list[str]:
    """The `accelerate launch` command; on CPU too several processes need --multi_gpu, or one starts."""
    threads = os.environ.get("OMP_NUM_THREADS") or max(1, count_cores() // num_processes)
    options = {
        "num_processes": num_processes,
        "num_machines": 1,
        "main_process_port": 0,  # a free one: two runs may share a machine
        "num_cpu_threads_per_process": threads,  # accelerate's own default is 1
        "mixed_precision": "no",  # `pair.dtype` decides
        "dynamo_backend": "no",
    }
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    if num_processes > 1:
        command.append("--multi_gpu")
    return [*command, "-m", "bridgekit.train.worker", str(run_dir), "--stage", stage]


def count_cores() -> int:
    """The cores this process may use, which a job scheduler may have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(n: int) -> dict[str, str]:
    """Threads for each of `n` children at once, unless the caller has set them: more than cores make each crawl."""
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, count_cores() // n))}


def start_child(command: list[str], log: typing.BinaryIO, extra: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a child in a session of its own: a terminal's Ctrl-C comes to us alone. It ends when we do."""
    environment = os.environ | {
        "BRIDGEKIT_PARENT_PID": str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that spin for long while they wait make a shared machine ten times slower; not at all, an idle one
        # by a quarter. This is some tens of microseconds.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "30000"),
        **(extra or {}),
    }
    return subprocess.Popen(
        command, cwd=project_root(), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True,
    )  # fmt: skip


def kill_tree(child: subprocess.Popen) -> None:
    """End a child and all its descendants; workers have sessions of their own, so no group reaches them."""
    import psutil

    try:
        parent = psutil.Process(child.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for end in ("terminate", "kill"):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, end)()
        _, family = psutil.wait_procs(family, timeout=KILL_SECONDS)
    child.wait()


def find_error(log: Path, start: int = 0) -> str | None:
    """Why a log ends: its last `error: ...` line after byte `start`, or last exception, or fatal signal."""
    with open(log, "rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    matches = [match for line in text.splitlines() if (match := _WORKER_ERROR.fullmatch(line))]
    own = [match["own"] for match in matches if match["own"]]
    python = [match["python"] for match in matches if not (match["python"] or _LAUNCHER[0]).startswith(_LAUNCHER)]
    signals = [f"a training process was killed by {a or b}" for a, b in _KILLED.findall(text)]
    return (own or python or signals or [None])[-1]


def describe_progress(status: dict) -> str:
    """A status as one line of text."""
    parts = [status.get("stage", "")]
    if status.get("steps"):
        parts.append(f"step {status.get('step', 0)}/{status['steps']}")
    for name, label in (("loss", "loss"), ("val_accuracy", "val"), ("best", "best")):
        if status.get(name) is not None:
            parts.append(f"{label} {status[name]:.3f}")
    ended = status.get("stage", "").endswith("done")
    for name, label in (("elapsed", "in all" if ended else "so far"), ("seconds_left", "left")):
        if status.get(name) is not None:
            parts.append(f"{format_seconds(status[name])} {label}")
    if status.get("error"):
        parts.append(f"failed: {status['error']}")
    return " · ".join(filter(None, parts))


def format_seconds(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ProgressLine:
    """One line, replaced in a notebook and on a terminal; elsewhere a line per stage and evaluation."""

    def __init__(self) -> None:
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        self.in_notebook = type(shell).__name__ == "ZMQInteractiveShell"
        self.on_terminal = not self.in_notebook and sys.stdout.isatty()
        self.handle = None  # of the notebook's output
        self.text = ""
        self.news: tuple = ()

    def show(self, status: dict) -> None:
        text = describe_progress(status)
        if text == self.text:
            return
        self.text = text
        if self.in_notebook:
            self._show_in_notebook(text)
        elif self.on_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text[:width]}", end="", flush=True)
        else:
            news = (status.get("stage"), status.get("val_accuracy"), status.get("best"), status.get("state"))
            if news != self.news:
                print(text, flush=True)
            self.news = news

    def _show_in_notebook(self, text: str) -> None:
        from IPython.display import display

        bundle = {"text/plain": text}
        if self.handle is None:
            self.handle = display(bundle, raw=True, display_id=True)
        else:
            self.handle.update(bundle, raw=True)

    def close(self, status: dict) -> None:
        self.show(status)
        if self.on_terminal and self.text:
            print(flush=True)


@contextlib.contextmanager
def following(run_dir: Path) -> typing.Iterator[None]:
    """Show a run's progress on this terminal while something else runs it."""
    line, stop = ProgressLine(), threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_SECONDS):
            line.show(read_status(run_dir))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        line.close(read_status(run_dir))
