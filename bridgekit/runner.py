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
from dataclasses import dataclass, field
from pathlib import Path

from bridgekit import launch, runs
from bridgekit.alive import LOOK_SECONDS, Child, lock_run
from bridgekit.config import Config, ConfigError
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


@dataclass(eq=False)
class Job:
    """A training, or the making of a pair (it has no `config`), from waiting to its end."""

    name: str
    folder: Path
    config: Config | None = None
    lexicon_seed: int = 0
    gpus: list[str] = field(default_factory=list)
    child: Child | None = None
    lock: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    @property
    def pair(self) -> Path | None:
        return (project_root() / self.config.pair.source_model).parent if self.config else None


class Runner:
    """Jobs from waiting to done: `outcome` has a line for each, and `failed` names those that went wrong."""

    def __init__(
        self, planned: dict[str, Config], runs_dir: str | Path, slots=0, pairs: dict | None = None, pair_options=()
    ) -> None:
        if slots < 0:
            raise ConfigError(f"slots: trainings at once on each GPU, or 0 for the default, got {slots}")
        self.gpus, self.runs_dir = list_gpus(), project_root() / runs_dir
        self.pair_options = [str(option) for option in pair_options]
        self.slots = slots or (SLOTS_PER_GPU if self.gpus else 1)
        self.runs_dir.mkdir(parents=True, exist_ok=True)
        trainings = [Job(name, self.runs_dir / name, config) for name, config in planned.items()]
        for job in trainings:
            check_devices(job.config)
        for job in trainings if self.gpus else ():
            if (n := job.config.train.num_processes) > len(self.gpus):
                raise ConfigError(f"train.num_processes: {job.name} needs {n} GPUs, there are {len(self.gpus)}")
        folders = {name: self.runs_dir / "pairs" / name for name in pairs or {}}
        seeds = {name: pairs[name]["lexicon_seed"] for name in folders if folders[name] in {j.pair for j in trainings}}
        makings = [Job(f"pair {name}", folders[name], lexicon_seed=seed) for name, seed in seeds.items()]
        self.waiting, self.active, self.n_runs = makings + trainings, list[Job](), len(trainings)
        self.threads = runs.count_threads(max(1, min(self.slots * max(1, len(self.gpus)), len(self.waiting))))
        self.failed: list[str] = []
        self.outcome: dict[str, str] = {}
        self.view = LiveView()

    def run(self) -> None:
        """Everything that is not done yet; a run that fails stops no other. However this ends, no child is left."""
        started = time.time()
        try:
            while self.waiting or self.active:
                unmade = {job.folder for job in (*self.waiting, *self.active) if not job.config}
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
        n_done = self.n_runs - sum(not name.startswith("pair ") for name in self.failed)
        self.view.note(f"{n_done} of {self.n_runs} runs done in {time.time() - started:.0f} s")

    def check(self) -> None:
        """Raise if a run failed, in one line."""
        if self.failed:
            why = f"the first: {self.outcome[self.failed[0]]}; see train.log in each folder of {self.runs_dir}"
            raise RuntimeError(f"failed: {', '.join(self.failed)} ({why})")

    def _start(self, job: Job) -> bool:
        """Start a job, or settle it where there is nothing to start; False if it has to wait for a GPU."""
        load = Counter(gpu for other in self.active for gpu in other.gpus)
        free = [gpu for gpu in sorted(self.gpus or ["none"], key=load.__getitem__) if load[gpu] < self.slots]
        n = job.config.train.num_processes if job.config and self.gpus else 1
        if len(free) < n:
            return False
        job.gpus = free[:n]
        try:
            job.lock.enter_context(lock_run(job.folder))
            if self._is_done(job):
                self._settle(job, "kept")
            else:
                self._launch(job)
        except (ValueError, OSError) as error:
            self._settle(job, " ".join(str(error).split()), failed=True)
        return True

    def _is_done(self, job: Job) -> bool:
        if job.config:
            if f"pair {job.pair.name}" in self.failed:
                raise ConfigError(f"its pair could not be made, see {job.pair / 'train.log'}")
            return is_done(job.folder, job.config)
        record = job.folder / "pair.json"
        if record.is_file() and (seed := json.loads(record.read_text()).get("lexicon_seed")) != job.lexicon_seed:
            raise ConfigError(f"'{job.folder}' was made with lexicon_seed {seed}, not {job.lexicon_seed}: move it away")
        return record.is_file()

    def _launch(self, job: Job) -> None:
        if job.config:
            refuse_unfit(job.config)
            prepare_folder(job.folder, job.config)
            runs.write_status(job.folder, state="running", stage="train")
            n = job.config.train.num_processes
            command = launch.training_command(job.folder, "train", n, max(1, self.threads // n))
        else:
            job.folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "bridgekit.train.pretrain", "--out", str(job.folder)]
            command += ["--lexicon-seed", str(job.lexicon_seed), *self.pair_options]
        extra = {"CUDA_VISIBLE_DEVICES": ",".join(job.gpus)} if self.gpus else {}
        extra["OMP_NUM_THREADS"] = str(self.threads)
        job.child = Child(job.folder, command, **extra)
        self.waiting.remove(job)
        self.active.append(job)

    def _finish(self, job: Job) -> None:
        self.active.remove(job)
        code, summary = job.child.process.returncode, job.folder / "summary.log"
        text = summary.read_text().strip() if summary.exists() else "made"
        failed = bool(launch.settle(job.child, "train") if job.config else code)
        if failed:
            ended = "stopped" if job.config and load_status(job.folder).get("state") == "stopped" else "FAILED"
            text = f"{ended} ({code}): {job.child.why()}"
        self._settle(job, text, failed, f"{time.time() - job.child.started:4.0f} s gpu {','.join(job.gpus)}  ")

    def _settle(self, job: Job, text: str, failed: bool = False, before: str = "") -> None:
        """A job's last word."""
        job.lock.close()
        self.waiting = [other for other in self.waiting if other is not job]
        self.outcome[job.name] = text
        self.failed += [job.name] if failed else []
        if text != "kept":
            self.view.note(f"{before}{job.name}: {text}")

    def _show(self, elapsed: float) -> None:
        n_left = sum(bool(job.config) for job in (*self.waiting, *self.active))
        first = {job.name: {"stage": "running"} | load_status(job.folder) for job in self.active[:2]}
        parts = {name: {key: status.get(key) for key in ("stage", "step", "steps")} for name, status in first.items()}
        running = [f"{name}: {describe_progress(part)}" for name, part in parts.items()]
        running += [f"{len(self.active) - 2} more"] if len(self.active) > 2 else []
        stage = f"{self.n_runs - n_left} of {self.n_runs} runs finished"
        self.view.show({"stage": stage, "running": ", ".join(running), "elapsed": elapsed})


def run_planned(planned: dict[str, Config], runs_dir: str | Path, *options, **more) -> Runner:
    """Run what is planned and not finished; `.check()` of what comes back raises if a run failed."""
    runner = Runner(planned, runs_dir, *options, **more)
    runner.run()
    return runner
