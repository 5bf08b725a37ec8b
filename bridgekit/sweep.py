"""Many runs at once: packs trainings on the GPUs there are, makes the pairs they need, keeps what is finished.

    bridgekit sweep parameters/headline.yaml           # again after an interruption: finished runs are kept
    bridgekit sweep parameters/ablation_losses.yaml    # a study: the file that notebooks/ablation.ipynb reads
    outcome = run_planned(planned, "runs")             # what the notebook calls with {folder name: Config}

A sweep file names `runs` (each with `parameters`, `overrides`, `seeds`, and optionally a `pair`) and `pairs` (each a
`lexicon_seed`). Run folders are runs_dir/<sweep>_<run>_seed<N>: named by what they are, so that a second call finds
them. Small models leave a GPU mostly idle while Python prepares the next launch; several trainings fill the gaps, if
CUDA's multi-process service runs (`nvidia-cuda-mps-control -d`): without it they take turns, with it they share.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from bridgekit.config import Config, ConfigError, load_config
from bridgekit.launch import find_error, kill_tree, share_cores, start_child
from bridgekit.runs import create_run, read_run_config, read_status
from bridgekit.study import plan_study, read_study, same_run

RUN_KEYS = {"parameters", "overrides", "seeds", "pair"}
SLOTS_PER_GPU = 6


def read_sweep(path: str | Path) -> dict:
    """The sweep file, checked: unknown keys, missing files and impossible configurations are refused."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such sweep file")
    try:
        sweep = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(sweep, dict) or not isinstance(sweep.get("runs"), dict):
        raise ConfigError(f"{path}: needs `runs:`, a mapping of names to runs")
    for key in set(sweep) - {"runs", "pairs", "pair_options"}:
        raise ConfigError(f"{path}: unknown key '{key}' (there are: runs, pairs, pair_options)")
    pairs = sweep.get("pairs") or {}
    if not isinstance(pairs, dict):
        raise ConfigError(f"{path}: pairs: needs a mapping of names to `lexicon_seed`")
    for name, pair in pairs.items():
        if not isinstance(pair, dict) or set(pair) != {"lexicon_seed"}:
            raise ConfigError(f"{path}: pairs.{name}: needs `lexicon_seed` and nothing else, got {pair!r}")
    for name, run in sweep["runs"].items():
        if not isinstance(run, dict) or "parameters" not in run:
            raise ConfigError(f"{path}: runs.{name}: needs `parameters`, a file to start from")
        for key in set(run) - RUN_KEYS:
            raise ConfigError(f"{path}: runs.{name}: unknown key '{key}' (there are: {', '.join(sorted(RUN_KEYS))})")
        if run.get("pair") and run["pair"] not in pairs:
            raise ConfigError(f"{path}: runs.{name}.pair: '{run['pair']}' is not among `pairs`")
    return sweep


def plan_runs(path: Path, sweep: dict, runs_dir: Path) -> dict[str, tuple[Config, str | None]]:
    """{folder name: (config, pair name)}, in the file's order, seeds innermost."""
    planned = {}
    for name, run in sweep["runs"].items():
        for seed in run.get("seeds", [1]):
            own = [
                f"run.name={name}",
                f"run.seed={seed}",
                f"run.runs_dir={runs_dir}",
                f"run.cache_dir={runs_dir}/.cache",
            ]
            if run.get("pair"):
                folder = runs_dir / "pairs" / run["pair"]
                own += [f"pair.source_model={folder}/source", f"pair.target_model={folder}/target"]
            config = load_config(run["parameters"], [*run.get("overrides", []), *own])
            planned[f"{path.stem}_{name}_seed{seed}"] = (config, run.get("pair"))
    return planned


def list_gpus() -> list[str]:
    """The GPUs a child may be given, as CUDA_VISIBLE_DEVICES names them; a scheduler may have left us only some.

    Asked without torch, whose context would take memory on each.
    """
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.replace(" ", "").split(",") if name not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    n = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    return [str(i) for i in range(n)]


class Runner:
    """Runs what is planned, several at a time; `said` is what became of each run, in words."""

    def __init__(
        self, planned: Mapping[str, tuple[Config, str | None]], runs_dir: Path, slots: int = 0,
        pairs: dict | None = None, pair_options: list | None = None,
    ):  # fmt: skip
        self.planned, self.runs_dir = dict(planned), Path(runs_dir)
        self.pairs, self.pair_options = pairs or {}, [str(option) for option in pair_options or []]
        gpus = list_gpus()
        slots = slots or (SLOTS_PER_GPU if gpus else 1)
        self.slots: queue.Queue[str] = queue.Queue()
        for gpu in (gpus or ["none"]) * slots:  # the first, the second, ... and round again: spread before packing
            self.slots.put(gpu)
        self.at_once = self.slots.qsize()
        self.pair_ready = {name: threading.Event() for name in self.pairs}
        self.failed: list[str] = []
        self.said: dict[str, str] = {}
        self.children: set[subprocess.Popen] = set()
        self.stopped = threading.Event()

    def run(self) -> None:
        """Everything that is not done yet; afterwards `failed` names what did not work out."""
        started = time.time()
        # Daemons: an interrupted sweep ends at once, and its children with it.
        threads = [threading.Thread(target=self._make_pair, args=(n,), daemon=True) for n in self.pair_ready]
        threads += [threading.Thread(target=self._train, args=(n,), daemon=True) for n in self.planned]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # a notebook's kernel lives on after an interruption: nothing may go on behind its back
            self.stopped.set()
            for child in list(self.children):
                kill_tree(child)
            raise
        done = len(self.planned) - len(self.failed)
        print(f"{done} of {len(self.planned)} runs done in {time.time() - started:.0f} s", flush=True)

    def check(self) -> None:
        """Raise if a run failed, in one line."""
        if self.failed:
            why = f"the first: {self.said[self.failed[0]]}; see train.log in each folder of {self.runs_dir}"
            raise RuntimeError(f"failed: {', '.join(self.failed)} ({why})")

    def _child(self, command: list[str], log: Path, gpu: str) -> int:
        with open(log, "ab") as stream:
            own = share_cores(self.at_once) if gpu == "none" else {"CUDA_VISIBLE_DEVICES": gpu}
            child = start_child(command, stream, own)
            self.children.add(child)
            if self.stopped.is_set():  # it started while the others were being ended
                kill_tree(child)
            code = child.wait()
            self.children.discard(child)
            return code

    def _make_pair(self, name: str) -> None:
        folder = self.runs_dir / "pairs" / name
        if not (folder / "pair.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            seed = str(self.pairs[name]["lexicon_seed"])
            command = [sys.executable, "-m", "bridgekit.train.pretrain", "--out", str(folder), "--lexicon-seed", seed]
            gpu = self.slots.get()
            code = self._child([*command, *self.pair_options], folder / "train.log", gpu)
            self.slots.put(gpu)
            print(f"pair {name}: {'made' if code == 0 else f'FAILED ({code})'}", flush=True)
        self.pair_ready[name].set()

    def _train(self, name: str) -> None:
        config, pair = self.planned[name]
        folder = self.runs_dir / name
        if read_status(folder).get("state") == "finished":
            if not same_run(read_run_config(folder), config):
                self._say(name, "finished with another configuration; move the folder away", failed=True)
            else:
                self.said[name] = "kept"
            return
        if pair:
            self.pair_ready[pair].wait()
        gpu = self.slots.get()
        if self.stopped.is_set():
            self.slots.put(gpu)  # the next one waits for it, to stop as well
            return
        started, code = time.time(), "not started"
        try:
            shutil.rmtree(folder, ignore_errors=True)  # a half-finished run is made again
            create_run(config, folder)
            command = [sys.executable, "-m", "bridgekit.train.worker", str(folder), "--stage", "train"]
            code = self._child(command, folder / "train.log", gpu)
        except Exception as error:
            code = str(error)
        finally:
            self.slots.put(gpu)
        if self.stopped.is_set():
            return
        summary, log = folder / "summary.log", folder / "train.log"
        said = summary.read_text().strip() if summary.exists() else f"FAILED ({code})"
        if code != 0 and log.exists() and (reason := find_error(log)):
            said += f": {reason}"
        self._say(name, said, failed=code != 0, before=f"{time.time() - started:4.0f} s gpu {gpu}  ")

    def _say(self, name: str, text: str, failed: bool = False, before: str = "") -> None:
        self.said[name] = text
        if failed:
            self.failed.append(name)
        print(f"{before}{name}: {text}", flush=True)


class Sweep(Runner):
    """What a file of parameters/ names: a sweep with `runs`, or a study with `variants`."""

    def __init__(self, path: Path, runs_dir: Path, slots: int = 0):
        if is_study(path):
            study = read_study(path)
            planned = {name: (config, None) for name, config in plan_study(study, runs_dir).items()}
            super().__init__(planned, runs_dir, slots)
            self.name = study.name
        else:
            sweep = read_sweep(path)
            planned = plan_runs(path, sweep, runs_dir)
            super().__init__(planned, runs_dir, slots, sweep.get("pairs"), sweep.get("pair_options"))
            self.name = Path(path).stem

    def keep_only(self, names: list[str]) -> None:
        """Leave out all other runs, and the pairs that nobody then needs."""
        kept = {}
        for name in names:
            found = {f: plan for f, plan in self.planned.items() if f.rsplit("_seed", 1)[0] == f"{self.name}_{name}"}
            if not found:
                raise ConfigError(f"--only: '{name}' is no run of this file")
            kept |= found
        self.planned = kept
        needed = {pair for _, pair in kept.values()}
        self.pair_ready = {name: ready for name, ready in self.pair_ready.items() if name in needed}


def is_study(path: str | Path) -> bool:
    """Whether a file names variants; what is wrong with it otherwise, its reader says."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text()) if path.is_file() else None
    except yaml.YAMLError:
        return False
    return isinstance(content, dict) and "variants" in content


def run_planned(planned: Mapping[str, Config], runs_dir: str | Path, slots: int = 0) -> Runner:
    """Run what is planned and not finished; a run that fails stops no other. `.check()` raises if one did."""
    runner = Runner({name: (config, None) for name, config in planned.items()}, Path(runs_dir), slots)
    runner.run()
    return runner


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bridgekit sweep", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a sweep file, or the parameters file of a study")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    slots_help = f"trainings at once on each GPU (default: {SLOTS_PER_GPU}, and 1 where there is no GPU)"
    parser.add_argument("--slots", type=int, default=0, help=slots_help)
    parser.add_argument("--only", nargs="+", metavar="RUN", help="these runs or variants of the file, with all seeds")
    args = parser.parse_args(argv)
    sweep = Sweep(args.file, args.runs_dir, args.slots)
    if args.only:
        sweep.keep_only(args.only)
    sweep.run()
    sweep.check()


if __name__ == "__main__":
    main()
