"""Many runs at once: packs trainings on the GPUs there are, makes the pairs they need, keeps what is finished.

    bridgekit sweep parameters/headline.yaml           # again after an interruption: finished runs are kept

A sweep file names `runs` (each with `parameters`, `overrides`, `seeds`, and optionally a `pair`) and `pairs` (each a
`lexicon_seed`). Run folders are runs_dir/<sweep>_<run>_seed<N>: named by what they are, so that a second call finds
them. Small models leave a GPU mostly idle while Python prepares the next launch; several trainings fill the gaps.
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

from bridgekit.config import Config, ConfigError, load_config
from bridgekit.launch import start_child
from bridgekit.runs import create_run, read_run_config, read_status

RUN_KEYS = {"parameters", "overrides", "seeds", "pair"}


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


class Sweep:
    def __init__(self, path: Path, runs_dir: Path, slots: int):
        self.sweep = read_sweep(path)
        self.runs_dir = runs_dir
        self.planned = plan_runs(path, self.sweep, runs_dir)
        self.slots: queue.Queue[str] = queue.Queue()
        for gpu in (
            list_gpus() or ["none"]
        ) * slots:  # the first, the second, ... and round again: spread before packing
            self.slots.put(gpu)
        self.pair_ready = {name: threading.Event() for name in self.sweep.get("pairs") or {}}
        self.failed: list[str] = []

    def run(self) -> None:
        started = time.time()
        # Daemons: an interrupted sweep ends at once, and its children with it.
        threads = [threading.Thread(target=self._make_pair, args=(n,), daemon=True) for n in self.pair_ready]
        threads += [threading.Thread(target=self._train, args=(n,), daemon=True) for n in self.planned]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(
            f"{len(self.planned) - len(self.failed)} of {len(self.planned)} runs done in {time.time() - started:.0f} s"
        )
        if self.failed:
            raise RuntimeError(f"failed: {', '.join(self.failed)} (see train.log in each folder of {self.runs_dir})")

    def _child(self, command: list[str], log: Path, gpu: str) -> int:
        with open(log, "ab") as stream:
            child = start_child(command, stream, {} if gpu == "none" else {"CUDA_VISIBLE_DEVICES": gpu})
            return child.wait()

    def _make_pair(self, name: str) -> None:
        folder = self.runs_dir / "pairs" / name
        if not (folder / "pair.json").exists():
            folder.mkdir(parents=True, exist_ok=True)
            options = [str(o) for o in self.sweep.get("pair_options", [])]
            seed = str(self.sweep["pairs"][name]["lexicon_seed"])
            command = [
                sys.executable,
                "-m",
                "bridgekit.pretrain",
                "--out",
                str(folder),
                "--lexicon-seed",
                seed,
                *options,
            ]
            gpu = self.slots.get()
            code = self._child(command, folder / "train.log", gpu)
            self.slots.put(gpu)
            print(f"pair {name}: {'made' if code == 0 else f'FAILED ({code})'}", flush=True)
        self.pair_ready[name].set()

    def _train(self, name: str) -> None:
        config, pair = self.planned[name]
        folder = self.runs_dir / name
        if read_status(folder).get("state") == "finished":
            if read_run_config(folder) != config:
                self.failed.append(name)
                print(f"{name}: finished with another configuration; move the folder away", flush=True)
            return
        if pair:
            self.pair_ready[pair].wait()
        gpu = self.slots.get()
        started = time.time()
        try:
            shutil.rmtree(folder, ignore_errors=True)  # a half-finished run is made again
            create_run(config, folder)
            command = [sys.executable, "-m", "bridgekit.train", str(folder), "--stage", "train"]
            code = self._child(command, folder / "train.log", gpu)
        except Exception as error:
            code = str(error)
        finally:
            self.slots.put(gpu)
        if code != 0:
            self.failed.append(name)
        summary = folder / "summary.log"
        said = summary.read_text().strip() if summary.exists() else f"FAILED ({code})"
        print(f"{time.time() - started:4.0f} s gpu {gpu}  {name}: {said}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bridgekit sweep", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="the sweep file")
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--slots", type=int, default=6, help="trainings at once on each GPU")
    args = parser.parse_args(argv)
    Sweep(args.file, args.runs_dir, args.slots).run()


if __name__ == "__main__":
    main()
