"""How a training survives its process: what it needs to go on, on disk, and how it is asked to stop.

    checkpoints = Checkpoints(experiment, "bridged", optimizer)
    start = checkpoints.load(bridge, best)            # {} where there is nothing to go on from
    checkpoints.save(bridge, best, step, window)      # checkpoint/resume/bridged-000250/

A checkpoint is a folder: weights, optimizer and random state as safetensors, links to the best weights so far, and
`state.json` with the checksums of all of them. It is written under another name and renamed, so it is whole or not
there; the last two are kept until the run has ended. Resumed in float32 on a CPU, a training goes on bit for bit.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch

from bridgekit.alive import GO_ON
from bridgekit.config import ConfigError
from bridgekit.runs import RESUME, hash_file, write_text_atomic

KEPT = 2  # checkpoints of a training that goes on
AGREE_EVERY = 8  # steps between questions whether another process was asked to stop

if typing.TYPE_CHECKING:
    from bridgekit.model.bridge import Bridge
    from bridgekit.train.experiment import Experiment
    from bridgekit.train.trainer import BestWeights

Window = list[dict[str, torch.Tensor]]  # the values of the steps since the last line of metrics.jsonl


class Checkpoints:
    """The checkpoints of one training: the first process writes them, all read them."""

    def __init__(self, experiment: "Experiment", name: str, optimizer: torch.optim.Optimizer, metrics: Path):
        self.experiment, self.name, self.optimizer, self.metrics = experiment, name, optimizer, metrics
        self.home, self.root = experiment.folder / "checkpoint", experiment.folder / RESUME
        self.saved = time.time()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step, because it is time or because a process was asked to stop."""
        processes = self.experiment.processes
        if processes.world > 1 and step % AGREE_EVERY:
            return False
        minutes = self.experiment.config.train.checkpoint_minutes
        return any(processes.gather_objects(STOP.asked or time.time() - self.saved >= 60 * minutes))

    def save(self, bridge: "Bridge", best: "BestWeights", step: int, window: Window, done: bool = False) -> None:
        """All that the next step needs; where a process was asked to stop, all processes end here."""
        since, experiment = time.time(), self.experiment
        windows = experiment.processes.gather_objects([{k: v.item() for k, v in row.items()} for row in window])
        if experiment.processes.is_first:
            state = {"step": step, "steps": experiment.config.train.steps, "done": done, "windows": windows}
            state |= {"best": best.describe(), "seconds": experiment.seconds_spent}
            state |= {"elapsed": time.time() - experiment.started, "metrics": sync(self.metrics)}
            self._write(state, bridge)
            for old in self._folders()[:-KEPT]:
                shutil.rmtree(old)
        experiment.processes.wait()
        experiment.spend("checkpoint", since)
        self.saved = time.time()
        if any(experiment.processes.gather_objects(STOP.asked)):
            raise SystemExit(GO_ON)

    def _write(self, state: dict, bridge: "Bridge") -> None:
        place = self.root / f"{self.name}-{state['step']:06d}"
        partial = place.with_name(f".{place.name}")
        for left_over in (place, partial):
            shutil.rmtree(left_over, ignore_errors=True)
        partial.mkdir(parents=True)
        safetensors.torch.save_file(self._tensors(bridge), partial / "state.safetensors")
        for weights in self._best_files():
            link(weights, partial / weights.name)
        files = sorted(partial.iterdir())
        with ThreadPoolExecutor() as pool:  # the disk and a core for each file, while the training waits
            synced, sums = pool.submit(sync, partial / "state.safetensors"), pool.map(hash_file, files)
            sums = dict(zip((path.name for path in files), sums, strict=True))
            synced.result()
        write_text_atomic(partial / "state.json", json.dumps(state | {"sha256": sums}) + "\n")
        partial.rename(place)
        sync(self.root)

    def _tensors(self, bridge: "Bridge") -> dict[str, torch.Tensor]:
        """Weights, optimizer and random state by name."""
        found = {f"bridge/{k}": v for k, v in bridge.state_dict().items()}
        for i, values in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer/{i}/{k}": v for k, v in values.items()}
        found["random/cpu"] = torch.get_rng_state()
        if self.experiment.device.type == "cuda":
            found["random/cuda"] = torch.cuda.get_rng_state(self.experiment.device)
        return {k: v.detach().cpu().contiguous() for k, v in found.items()}

    def load(self, bridge: "Bridge", best: "BestWeights") -> dict:
        """Put bridge, optimizer, best weights and metrics back to the newest whole checkpoint. -> its state, or {}"""
        processes = self.experiment.processes
        chosen = processes.gather_objects(self._find() if processes.is_first else None)[0]
        if chosen is None:
            if processes.is_first:
                self.metrics.unlink(missing_ok=True)  # of an attempt that left nothing to go on from
            return {}
        state = json.loads((chosen / "state.json").read_text())
        tensors: dict[str, dict[str, torch.Tensor]] = {"bridge": {}, "optimizer": {}, "random": {}}
        for key, value in safetensors.torch.load_file(chosen / "state.safetensors").items():
            kind, name = key.split("/", 1)
            tensors[kind][name] = value
        bridge.load_state_dict(tensors["bridge"])
        moments: dict[int, dict] = {}
        for key, value in tensors["optimizer"].items():
            index, name = key.split("/")
            moments.setdefault(int(index), {})[name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        torch.set_rng_state(tensors["random"]["cpu"])
        if self.experiment.device.type == "cuda" and "cuda" in tensors["random"]:
            torch.cuda.set_rng_state(tensors["random"]["cuda"], self.experiment.device)
        best.restore(state["best"])
        self.experiment.seconds_spent |= state["seconds"]
        self.experiment.started = min(self.experiment.started, time.time() - state["elapsed"])
        if processes.is_first:
            self._restore_files(chosen, state)
        processes.wait()
        self.experiment.log(f"{self.name}: goes on from step {state['step']}")
        return state

    def _restore_files(self, chosen: Path, state: dict) -> None:
        """Best weights and metrics as they were at this step; what came after it is made again."""
        for weights in self._best_files():
            weights.unlink()
        for weights in chosen.glob(f"{self.name}*.safetensors"):
            link(weights, self.home / weights.name)
        if state["metrics"]:
            os.truncate(self.metrics, state["metrics"])

    def _find(self) -> Path | None:
        """The newest checkpoint whose files are those that were written; a damaged one is named and left out."""
        for folder in reversed(self._folders()):
            try:
                state = json.loads((folder / "state.json").read_text())
                changed = [name for name, digest in state["sha256"].items() if hash_file(folder / name) != digest]
                if state["metrics"] and self.metrics.stat().st_size < state["metrics"]:
                    changed.append(self.metrics.name)
                if not changed:
                    self._check_steps(state)
                    return folder
                why = f"{', '.join(changed)} is not what was written"
            except (OSError, KeyError, TypeError, json.JSONDecodeError) as error:
                why = " ".join(str(error).split())
            self.experiment.log(f"{self.name}: checkpoint {folder.name} is damaged ({why}): the one before it is used")
        return None

    def _check_steps(self, state: dict) -> None:
        steps = self.experiment.config.train.steps
        if state["step"] > steps:
            raise ConfigError(f"train.steps: {self.name} is at step {state['step']} already, got {steps}")

    def _folders(self) -> list[Path]:
        """Whole checkpoints of this training, the oldest first."""
        return sorted(self.root.glob(f"{self.name}-[0-9]*"))

    def _best_files(self) -> list[Path]:
        """The weights that `best` has written, one file for each selection."""
        return [*self.home.glob(f"{self.name}.safetensors"), *self.home.glob(f"{self.name}.*.safetensors")]


def deal_window(windows: list[list[dict[str, float]]], rank: int, world: int) -> Window:
    """The values of this process since the last line; on another number of processes the first has them all."""
    rows = windows[rank] if len(windows) == world else [dict(row) for row in windows[0]]
    for i, row in enumerate(rows if len(windows) != world else ()):
        for name in row.keys() - {"grad_norm"}:  # which is the same on all
            row[name] = sum(other[i][name] for other in windows) if rank == 0 else 0.0
    return [{name: torch.tensor(value) for name, value in row.items()} for row in rows]


def link(source: Path, target: Path) -> None:
    """The same bytes under another name; a copy where the file system has no links. Written files are never changed."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def sync(path: Path) -> int:
    """Have a file (or a folder's list of names) on the disk itself. -> its size, 0 where there is none"""
    if not path.exists():
        return 0
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        return os.fstat(handle).st_size
    finally:
        os.close(handle)


class Stop:
    """SIGTERM asks a worker to stop: in a training loop after the step, with a checkpoint, elsewhere at once."""

    def __init__(self) -> None:
        self.asked, self.waits = False, False

    def listen(self) -> None:
        """Take SIGTERM from now on; the exit code GO_ON says that the run can go on."""
        signal.signal(signal.SIGTERM, self._hear)

    def _hear(self, *_: object) -> None:
        self.asked = True
        if not self.waits:
            sys.exit(GO_ON)

    @contextlib.contextmanager
    def after_step(self) -> typing.Iterator[None]:
        """Inside, a stop waits until the loop saves."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False


STOP = Stop()
