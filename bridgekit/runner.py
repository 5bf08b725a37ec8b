"""Run what is planned, several trainings at a time, on the GPUs there are; what is finished is kept.

    run_planned(planned, "runs").check()     # {folder name: Config}; again after an interruption

Small models leave a GPU mostly idle while Python prepares the next launch; several trainings fill the gaps, if CUDA's
multi-process service runs (`nvidia-cuda-mps-control -d`): without it they take turns, with it they share.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridgekit import launch, runs
from bridgekit.alive import LOOK_SECONDS, Child, lock_run
from bridgekit.config import Config, ConfigError, refuse_if
from bridgekit.results.live import LiveView, describe_progress
from bridgekit.runs import load_run_config, load_status, project_root
from bridgekit.train.plan import check_devices, refuse_unfit

SLOTS_PER_GPU = 6


def is_done(folder: Path, config: Config) -> bool:
    """Whether a folder holds this very run, finished; one that is finished otherwise is refused, never touched."""
    if load_status(folder).get("state") != "finished":
        return False
    try:
        if runs.same_run(load_run_config(folder), config):
            return True
    except ValueError as error:
        raise ConfigError(f"'{folder}' is finished, but cannot be read ({error}): move it away") from None
    raise ConfigError(f"'{folder}' is finished with another configuration: move it away, or use another name")


def prepare_folder(folder: Path, config: Config) -> None:
    """The folder of a run that is due, which goes on from what there is; one of other settings moves to `.unfinished`.

    To be called while the folder is locked: nobody else writes it then.
    """
    if folder.is_dir():
        with contextlib.suppress(ValueError):
            if runs.same_run(load_run_config(folder), config):
                return
        folder.rename(runs.make_folder(folder.parent / ".unfinished", folder.name))
    launch.open_run(config, folder=folder)


def list_gpus() -> list[str]:
    """The GPUs a child may be given, as CUDA_VISIBLE_DEVICES names them; a scheduler may have left us only some.

    Asked without torch, whose context would take memory on each.
    """
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.replace(" ", "").split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


@dataclass(eq=False, kw_only=True)
class Job:
    """What a child does in a folder, from waiting to its end. Its kinds say how: `Training`, `Making`, `Execution`."""

    name: str
    folder: Path
    n_gpus: int = 1
    pair: Path | None = None  # the folder of its pair, where this study makes that first
    passes_on: bool = False  # whether the child passes a stop on to its own children
    gpus: list[str] = field(default_factory=list)
    child: Child | None = None
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


@dataclass(eq=False, kw_only=True)
class Training(Job):
    """A run of a study."""

    config: Config

    def is_done(self) -> bool:
        return is_done(self.folder, self.config)

    def make_folder(self) -> None:
        with lock_run(self.folder):
            prepare_folder(self.folder, self.config)

    def prepare(self, threads: int) -> list[str]:
        """The command that trains, its folder made."""
        refuse_unfit(self.config)
        prepare_folder(self.folder, self.config)
        runs.write_status(self.folder, state="running", stage="train")
        n = self.config.train.num_processes
        return launch.training_command(self.folder, "train", n, max(1, threads // n))

    def settle(self) -> str:
        """Why it failed; empty where it did not."""
        return launch.settle(self.child, "train")

    def arguments(self) -> list[str]:
        """What is typed behind `bridgekit` to do it elsewhere, in the folder that is made."""
        return ["train", "--resume", str(self.folder)]


@dataclass(eq=False, kw_only=True)
class Making(Job):
    """The making of a pair."""

    lexicon_seed: int
    options: list[str]

    def is_done(self) -> bool:
        record = self.folder / "pair.json"
        if record.is_file() and (seed := json.loads(record.read_text()).get("lexicon_seed")) != self.lexicon_seed:
            raise ConfigError(
                f"'{self.folder}' was made with lexicon_seed {seed}, not {self.lexicon_seed}: move it away"
            )
        return record.is_file()

    def make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare(self, threads: int) -> list[str]:
        self.make_folder()
        return [sys.executable, "-m", "bridgekit.train.pretrain", *self.arguments()[1:]]

    def settle(self) -> str:
        return self.child.why() if self.child.process.returncode else ""

    def arguments(self) -> list[str]:
        return ["pair", "--out", str(self.folder), "--lexicon-seed", str(self.lexicon_seed), *self.options]


def plan_jobs(
    planned: dict[str, Config], runs_dir: str | Path, pairs: dict | None = None, pair_options: Sequence = ()
) -> list[Job]:
    """The jobs of a study: the pairs that it needs, then its runs."""
    root = project_root() / runs_dir
    made = {root / "pairs" / name: pair["lexicon_seed"] for name, pair in (pairs or {}).items()}
    trainings = []
    for name, config in planned.items():
        pair = (project_root() / config.pair.source_model).parent
        ours = {"pair": pair if pair in made else None, "n_gpus": config.train.num_processes}
        trainings.append(Training(name=name, folder=root / name, config=config, **ours))
    needed, options = {job.pair for job in trainings}, [str(option) for option in pair_options]
    return [
        Making(name=f"pair {folder.name}", folder=folder, lexicon_seed=seed, options=options)
        for folder, seed in made.items() if folder in needed
    ] + trainings  # fmt: skip


class Runner:
    """Jobs from waiting to done: `outcome` has a line for each, and `failed` names those that went wrong.

    There are `slots` at once on each GPU, or on the CPU where there is none, and `at_most` in all.
    """

    def __init__(self, jobs: Sequence[Job], slots: int = 0, at_most: int = 0) -> None:
        if slots < 0:
            raise ConfigError(f"slots: trainings at once on each GPU, or 0 for the default, got {slots}")
        self.gpus, self.waiting, self.active = list_gpus(), list(jobs), list[Job]()
        self.slots = slots or (SLOTS_PER_GPU if self.gpus else 1)
        self.at_most = at_most or self.slots * max(1, len(self.gpus))
        for job in jobs:
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(job, Training):
                check_devices(job.config)
            lacking = 0 < len(self.gpus) < job.n_gpus
            why = f"train.num_processes: {job.name} needs {job.n_gpus} GPUs, there are {len(self.gpus)}"
            refuse_if(lacking, why)
        self.n_runs = sum(not isinstance(job, Making) for job in jobs)
        self.threads = runs.count_threads(max(1, min(self.at_most, len(jobs))))
        self.failed: dict[str, Job] = {}
        self.outcome: dict[str, str] = {}
        self.view = LiveView()

    def run(self) -> None:
        """Everything that is not done yet; a run that fails stops no other. However this ends, no child is left."""
        started = time.time()
        try:
            while self.waiting or self.active:
                unmade = {job.folder for job in (*self.waiting, *self.active) if isinstance(job, Making)}
                for job in [job for job in self.waiting if job.pair not in unmade]:
                    if not self._start(job):
                        break  # the plan's order: a run that needs several GPUs is not overtaken for ever
                for job in [job for job in self.active if job.child.poll() is not None]:
                    self._finish(job)
                self._show(time.time() - started)
                time.sleep(LOOK_SECONDS if self.active else 0)
        except BaseException:
            launch.end_children({job.folder: job.child for job in self.active})
            for job in self.active:
                job.lock.close()
            raise
        n_done = self.n_runs - sum(not isinstance(job, Making) for job in self.failed.values())
        self.view.note(f"{n_done} of {self.n_runs} runs done in {time.time() - started:.0f} s")

    def check(self) -> None:
        """Raise if a run failed, in one line."""
        for name, job in self.failed.items():
            why = f"the first: {self.outcome[name]}; see train.log in each folder of {job.folder.parent}"
            raise RuntimeError(f"failed: {', '.join(self.failed)} ({why})")

    def _start(self, job: Job) -> bool:
        """Start a job, or settle it where there is nothing to start; False if it has to wait for its turn."""
        load = Counter(gpu for other in self.active for gpu in other.gpus)
        free = [gpu for gpu in sorted(self.gpus or ["none"], key=load.__getitem__) if load[gpu] < self.slots]
        n = job.n_gpus if self.gpus else 1
        if len(free) < n or len(self.active) >= self.at_most:
            return False
        job.gpus = free[:n]
        try:
            if unmade := next((other for other in self.failed.values() if other.folder == job.pair), None):
                raise ConfigError(f"its pair could not be made, see {unmade.folder / 'train.log'}")
            if not job.passes_on:  # a child that is a command of ours locks what it writes
                job.lock.enter_context(lock_run(job.folder))
            if job.is_done():
                self._settle(job, "kept")
            else:
                extra = {"CUDA_VISIBLE_DEVICES": ",".join(job.gpus)} if self.gpus else {}
                extra["OMP_NUM_THREADS"] = str(self.threads)
                job.child = Child(job.folder, job.prepare(self.threads), job.passes_on, **extra)
                self.waiting.remove(job)
                self.active.append(job)
        except (ValueError, OSError) as error:
            self._settle(job, " ".join(str(error).split()), failed=True)
        return True

    def _finish(self, job: Job) -> None:
        self.active.remove(job)
        code, summary = job.child.process.returncode, job.folder / "summary.log"
        why = job.settle()
        text = summary.read_text().strip() if summary.exists() else "done"
        if why:
            text = f"{'stopped' if load_status(job.folder).get('state') == 'stopped' else 'FAILED'} ({code}): {why}"
        self._settle(job, text, bool(why), f"{time.time() - job.child.started:4.0f} s gpu {','.join(job.gpus)}  ")

    def _settle(self, job: Job, text: str, failed: bool = False, before: str = "") -> None:
        """A job's last word."""
        job.lock.close()
        self.waiting = [other for other in self.waiting if other is not job]
        self.outcome[job.name] = text
        self.failed |= {job.name: job} if failed else {}
        if text != "kept":
            self.view.note(f"{before}{job.name}: {text}")

    def _show(self, elapsed: float) -> None:
        n_left = sum(not isinstance(job, Making) for job in (*self.waiting, *self.active))
        first = {job.name: {"stage": "running"} | load_status(job.folder) for job in self.active[:2]}
        parts = {name: {key: status.get(key) for key in ("stage", "step", "steps")} for name, status in first.items()}
        running = [f"{name}: {describe_progress(part)}" for name, part in parts.items()]
        running += [f"{len(self.active) - 2} more"] if len(self.active) > 2 else []
        stage = f"{self.n_runs - n_left} of {self.n_runs} runs have ended"
        self.view.show({"stage": stage, "running": ", ".join(running), "elapsed": elapsed})


def run_planned(
    planned: dict[str, Config], runs_dir: str | Path, slots: int = 0, pairs=None, pair_options=()
) -> Runner:
    """Run what is planned and not finished; `.check()` of what comes back raises if a run failed."""
    runner = Runner(plan_jobs(planned, runs_dir, pairs, pair_options), slots)
    runner.run()
    return runner
