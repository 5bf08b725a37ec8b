"""Who writes a run folder, whether it still lives, and how it ends: locks, signs of life, children.

    with lock_run(folder):                      # one writer; the lock of a process that ends is free
        child = Child(folder, command)          # ends when we do, within GRACE_SECONDS
        while child.poll() is None: ...
        why = child.why()

A process that writes a folder touches a file there every few seconds. Nothing here imports torch.
"""

import contextlib
import fcntl
import functools
import itertools
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from bridgekit.config import ConfigError
from bridgekit.runs import BEAT, count_threads, load_status, project_root

GO_ON = 75  # exit code of what was stopped and can go on
BEAT_SECONDS = 5  # between a process's signs of life
LOOK_SECONDS = 0.25  # between looks at a child or a status
SILENT_SECONDS = 45  # after which a process counts as dead or stopped
GRACE_SECONDS = 30.0  # for a process that was asked to stop
ROOM = 1 << 16  # bytes without which a log can no longer say why its process ended
# What a log ends with: the worker's own word, an exception, or the signal that the launcher saw. {pattern: the reason}
REASONS = {
    r"^(?:\[\w+\]: ?)?error: (.+)$": "{}",
    r"^(?:\[\w+\]: ?)?(?!subprocess\.|torch\.distributed\.elastic)([\w.]*(?:Error|Exception)\b.*)$": "{}",
    r"(?:died with <Signals\.|Signal \d+ \()(\w+)(?:: \d+>|\) received by PID)": "a training process was killed by {}",
}


# -- who writes a folder ----------------------------------------------------------------------------------------


def lock_path(folder: str | Path, role: str) -> Path:
    folder = Path(folder).resolve()
    return folder.parent / f".{folder.name}.{role}.lock"


@contextlib.contextmanager
def lock_run(folder: str | Path, role: str = "launcher") -> Iterator[None]:
    """The right to write a run folder, as its `launcher` or its `worker`; who has it already is named.

    The system frees the lock of a process that ends, in whatever way, so no lock is ever stale.
    """
    path = lock_path(folder, role)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a+"))
            if not take_lock(file, fcntl.LOCK_EX):
                raise ConfigError(
                    f"run folder '{folder}' is being written by {find_writer(folder, role)}: wait, or end it"
                )
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break  # else its last holder has just removed this file: lock the new one
        stack.callback(path.unlink, missing_ok=True)
        file.truncate(0)
        print(f"process {os.getpid()} on {platform.node()}", end="", file=file, flush=True)
        yield


def take_lock(file: IO, kind: int, seconds: float = 0.3) -> bool:
    """Lock a file, but do not wait long: who only looks whether it is locked holds it for a moment, too."""
    until = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)


def find_writer(folder: str | Path, *roles: str) -> str:
    """Who writes a run folder, as `process 12 on node3`; empty where nobody does."""
    for role in roles or ("worker", "launcher"):
        with contextlib.suppress(FileNotFoundError), open(lock_path(folder, role)) as file:
            if not take_lock(file, fcntl.LOCK_SH, 0.0):
                return file.read() or "another process"
    return ""


def true_status(folder: str | Path) -> dict:
    """The status as it is now: a run that says `running` while nobody runs it, or `queued` for nobody, is `stale`.

    A lock shows who writes; where another host's locks are not seen, its heartbeat tells. What Slurm has stopped, and
    has in its queue again, is `preempted`.
    """
    status = load_status(folder)
    state, job = status.get("state"), status.get("job")
    jobs = list_slurm_jobs() if job else None
    if state == "stopped" and job in (jobs or ()):
        return status | {"state": "preempted", "error": f"job {job} goes on with it"}
    if state == "queued" and not is_awaited(status, jobs):
        gone = f"job {job} has ended without it: its output is in runs/slurm" if job else "its batch is gone"
        return status | {"state": "stale", "error": gone}
    is_here = status.get("host") == platform.node()
    between = is_here and "pid" in status and is_awaited(status, jobs)  # two stages, in a notebook
    if state != "running" or find_writer(folder) or between:
        return status
    if not is_here and silence(folder, min) < SILENT_SECONDS:
        return status
    return status | {"state": "stale", "error": "the process that ran it is gone", "seconds_left": None}


@functools.cache
def list_slurm_jobs() -> set[str] | None:
    """The ids of the jobs that Slurm has in its queue, waiting or running; None where Slurm cannot be asked."""
    if shutil.which("squeue") is None:
        return None
    command = ["squeue", "--noheader", "--array", "--format=%i"]
    listed = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if listed.returncode else set(listed.stdout.split())


def is_awaited(status: dict, jobs: set[str] | None) -> bool:
    """Whether a queued run's job or batch is there; of one that is not seen from here nobody can tell."""
    import psutil

    if "job" in status:
        return jobs is None or status["job"] in jobs
    return status.get("host") != platform.node() or psutil.pid_exists(status.get("pid", 0))


def silence(folder: str | Path, which: Callable = max) -> float:
    """Seconds since the last sign of life of the process that is silent longest (or, with `min`, shortest).

    Both times are the file system's own, so that the clocks of two hosts need not agree; infinite without any sign.
    """
    beats = [path.stat().st_mtime for path in Path(folder).glob(f"{BEAT}*")]
    if not beats:
        return math.inf
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".now.") as fresh:
            now = os.stat(fresh.name).st_mtime
    except OSError:  # a folder that may only be read
        now = time.time()
    return which(now - beat for beat in beats)


def wait_for_worker(folder: Path, *roles: str) -> None:
    """Until nobody writes a folder any more; a kernel's child stops a moment after its kernel."""
    deadline = time.time() + GRACE_SECONDS + 5
    while find_writer(folder, *roles) and time.time() < deadline:
        time.sleep(LOOK_SECONDS)


# -- how a run ends ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unless_in_thread(*signals: int) -> Iterator[None]:
    """Ignore signals for a moment; only a main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def training_command(run_dir: Path, stage: str, num_processes: int, threads: int = 0) -> list[str]:
    worker = ["bridgekit.train.worker", str(run_dir), "--stage", stage]
    return launch_command(worker, num_processes, threads)


def launch_command(module: list[str], num_processes: int, threads: int = 0) -> list[str]:
    """A module with its arguments by `accelerate launch`; on CPU too several processes need --multi_gpu."""
    machines = int(os.environ.get("BRIDGEKIT_MACHINES", 1))  # nodes of a Slurm job that `bridgekit submit` has sent
    options = {
        "num_processes": num_processes,
        "num_machines": machines,
        # A free one, because two runs may share a machine; nodes must know it, so it is the job's own.
        "main_process_port": 0 if machines == 1 else 20000 + int(os.environ["SLURM_JOB_ID"]) % 10000,
        "num_cpu_threads_per_process": threads or count_threads(max(1, num_processes // machines)),
        "mixed_precision": "no",  # `pair.dtype` decides
        "dynamo_backend": "no",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    flags += ["--multi_gpu"] if num_processes > 1 else []
    worker = ["-m", *module]
    if machines == 1:
        return [sys.executable, "-m", "accelerate.commands.launch", *flags, *worker]
    flags += ["--main_process_ip", os.environ["SLURMD_NODENAME"]]  # a launcher on each node; they meet on this one
    ranked = 'exec "$0" -m accelerate.commands.launch --machine_rank "$SLURM_PROCID" "$@"'
    nodes = f"srun --ntasks={machines} --kill-on-bad-exit=1 sh -c".split()
    return [*nodes, f"unset BRIDGEKIT_PARENT_PID; {ranked}", sys.executable, *flags, *worker]  # srun ends them


# What a launcher that has started us (torchrun, mpirun) tells its processes: a child begins a group of its own.
RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
RANKS |= {f"{name}_{what}" for name in ("PMI", "OMPI_COMM_WORLD", "MV2_COMM_WORLD") for what in ("RANK", "SIZE")}


class Child:
    """A process that writes a folder, with its output in train.log there; it ends when we do.

    It has a session of its own, so that a terminal's Ctrl-C comes to us alone. `passes_on` says that it is a command of
    ours, which ends its own children.
    """

    def __init__(self, folder: Path, command: list[str], passes_on: bool = False, **environment: str) -> None:
        ours = {"BRIDGEKIT_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        # OpenMP threads busy-wait: long spinning slows a shared machine tenfold, none slows an idle one by a quarter.
        whole = {"GOMP_SPINCOUNT": "30000"} | os.environ | ours | environment  # tens of microseconds
        whole = {name: value for name, value in whole.items() if name not in RANKS}
        self.folder, self.log, self.started = folder, folder / "train.log", time.time()
        self.passes_on = passes_on
        self.looked = self.awake = self.started
        self.silent = ""
        self.quiet()
        with open(self.log, "ab") as log:
            self.log_start = log.tell()
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "cwd": project_root(), "env": whole}
            self.process = subprocess.Popen(command, start_new_session=True, **streams)

    def poll(self) -> int | None:
        """The exit code, None while it runs; a child of which one process gives no sign of life any more is ended."""
        now = time.time()
        if now - self.looked > BEAT_SECONDS:
            if now - self.looked > 2 * BEAT_SECONDS:
                self.awake = now  # we stood still, and so may have the child: it has time to say something
            self.looked, silent = now, silence(self.folder)
            if SILENT_SECONDS < silent < math.inf and now - self.awake > SILENT_SECONDS:
                self.silent = f"a training process has given no sign of life for {silent:.0f} s"
                self.kill()
        return self.process.poll()

    def family(self) -> list:
        """Its living descendants; workers have sessions of their own, so no group reaches them."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            return psutil.Process(self.process.pid).children(recursive=True)
        return []

    def ask(self) -> None:
        """Ask the workers to stop: they keep what they have, and the launcher ends when they have."""
        import psutil

        for process in not self.passes_on and self.family() or [self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()

    def end(self, seconds: float = GRACE_SECONDS) -> None:
        """Wait for a child that was asked to stop, and make it."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        self.kill()

    def kill(self) -> None:
        """End it and all its descendants now."""
        import psutil

        for process in [*self.family(), self.process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        self.quiet()

    def quiet(self) -> None:
        """Forget the signs of life of processes that are gone."""
        for beat in self.folder.glob(f"{BEAT}*"):
            beat.unlink(missing_ok=True)

    def why(self) -> str:
        """Why it has ended."""
        unknown = f"the process ended with exit code {self.process.returncode}"
        if self.folder.exists() and shutil.disk_usage(self.folder).free < ROOM:
            unknown = "the disk is full: free some space, then go on"
        return self.silent or find_error(self.log, self.log_start) or unknown


def find_error(log: Path, start: int = 0) -> str | None:
    """Why a log ends: its last `error: ...` line after byte `start`, or last exception, or fatal signal."""
    text = "\n".join(log.read_bytes()[start:].decode(errors="replace").splitlines())
    for pattern, reason in REASONS.items():
        if found := re.findall(pattern, text, re.MULTILINE):
            return reason.format(found[-1])
    return None


# -- the child's side -------------------------------------------------------------------------------------------


def watch_parent(folder: str | Path | None = None, rank: int = 0) -> threading.Event:
    """Ask this process to stop soon after one that it works for is gone; with a `folder`, give signs of life there.

    A killed kernel cannot clean up after itself, and an orphan would hold its GPU. What has not stopped after
    GRACE_SECONDS is ended. The event that is returned ends the watch.
    """
    import psutil

    asked_by, starter = os.environ.get("BRIDGEKIT_PARENT_PID"), os.getppid()

    def is_gone() -> bool:
        try:  # nobody is behind a zombie any more; the launcher may be another process than who asked
            asker = psutil.Process(int(asked_by)) if asked_by else None
            return bool(asker) and (asker.status() == psutil.STATUS_ZOMBIE or os.getppid() != starter)
        except psutil.NoSuchProcess:
            return True

    def watch() -> None:
        for second in itertools.count():
            if quiet.wait(1.0):
                beat.unlink(missing_ok=True)
                return
            if folder is not None and second % BEAT_SECONDS == 0:
                try:
                    os.utime(beat) if beat.exists() else beat.touch()
                except OSError:
                    print(f"error: run folder {folder} is gone, or cannot be written", file=sys.stderr, flush=True)
                    os._exit(2)
            if is_gone():
                break
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os._exit(143)

    beat, quiet = Path(folder or ".") / f"{BEAT}{rank}", threading.Event()
    if asked_by or folder is not None:
        threading.Thread(target=watch, daemon=True, name="watch-parent").start()
    return quiet
