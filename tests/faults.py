"""Kill real runs, go on with them, and compare every byte with a run that nobody killed.

    python tests/faults.py --out preserved_data/faults.json     # 60 kills, the other faults, what checkpoints cost
    python tests/faults.py --kills 6 --seed 3 --pairs 0         # a few, for a look

A run of each kind (command line, notebook, study) is killed several times: its command, its worker, its kernel, with
SIGKILL or SIGTERM, at a random moment or in the middle of a checkpoint, an evaluation or a report. After each kill
nobody may be left alive, nothing may say `finished`, no whole file may be damaged; then the run goes on. At its end all
files are those of the reference, but for times. Last, runs with and without checkpoints take turns, on a machine that
should do nothing else. The file name has no test_ in front: pytest does not collect it.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import safetensors.numpy
import yaml

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = """
run.cache_dir=runs/.cache task.n_train=96 task.n_val=16 task.n_test=16 train.val_samples=8 train.eval_every=8
train.warmup_steps=2 train.steps=16 train.batch_size=4 train.controls=[constant] train.checkpoint_minutes=0
eval.max_new_tokens=24 eval.eval_batch_size=4 eval.conditions=[source,target,bridged,shuffled,router]
bridge.bridge_dim=16 bridge.heads=2 bridge.depth=1 bridge.n_soft_tokens=4 bridge.dropout=0.2
loss.decode_weight=0.1 loss.decode_every=5 loss.decode_batch=2 loss.decode_tokens=8""".split()
CELLS = (
    'run_dir = ""\noverrides = []',
    "from bridgekit import launch\nconfig = launch.notebook_config('phase1', globals())\n"
    "run_dir = launch.open_run(config, run_dir)\nfor stage in launch.STAGES:\n    launch.run_stage(run_dir, stage)",
)
KINDS = {  # kind of run: who is killed, by a piece of its command line; `command` is the process that the user started
    "train": ("command", "-m bridgekit.train.worker", "accelerate.commands.launch"),
    "run": ("command", "-m bridgekit.train.worker", "ipykernel_launcher"),
    "study": ("command", "-m bridgekit.train.worker"),
}
MOMENTS = {  # what the run folder holds at that moment, beside any other moment
    "checkpoint": "checkpoint/resume/.*",
    "evaluation": ".answers.jsonl",
    "report": "summary.log",
}
COMPARED = ("*.jsonl", "checkpoint/*.safetensors", "attention.npz", "controls.json", "verdict.json", "config.yaml")
END_SECONDS = 60  # within which all processes of a killed run must be gone


def make_project(folder: Path) -> Path:
    """A project with a small notebook, parameters and a study."""
    (folder / "notebooks").mkdir(parents=True)
    (folder / "pyproject.toml").write_text("")
    cells = [nbformat.v4.new_code_cell(text) for text in CELLS]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "notebooks" / "phase1.ipynb")
    (folder / "small.yaml").write_text(yaml.safe_dump({"notebook": "phase1", "overrides": SETTINGS}))
    study = {"base": "small.yaml", "variants": {"one": {"train.lr": 0.001}, "two": {"train.lr": 0.002}}}
    (folder / "many.yaml").write_text(yaml.safe_dump(study))
    return folder


def command_of(kind: str, project: Path) -> list[str]:
    """What the user types: to begin, or where there is a run folder already, to go on."""
    run = next(iter(sorted(project.glob("runs/phase1_*"))), None)
    go_on = ["--resume", str(run.relative_to(project))] if run else []
    begin = {
        "train": ["train", *(go_on or ["-f", "small.yaml"])],
        "run": ["run", "notebooks/phase1.ipynb", *(go_on or ["-f", "small.yaml"])],
        "study": ["study", "many.yaml"],
    }
    return [sys.executable, "-m", "bridgekit", *begin[kind]]


def start(kind: str, project: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = open(project / "command.log", "ab")  # noqa: SIM115 - the child has it
    return subprocess.Popen(command_of(kind, project), cwd=project, env=environment, stdout=log, stderr=log)


def run_of(pid: int) -> str:
    """The run folder that a worker or its launcher was started for."""
    return next((part for part in psutil.Process(pid).cmdline() if "/runs/" in part), "nowhere")


def processes_of(project: Path, run: str = "") -> list[psutil.Process]:
    """Everything that works in a project's folder; with `run` what was started for that run folder alone."""
    found = []
    for process in psutil.process_iter():
        try:
            is_mine = process.pid != os.getpid() and process.cwd() == str(project) and process.status() != "zombie"
            if is_mine and (not run or run in process.cmdline()):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def run_folders(project: Path) -> list[Path]:
    return [path.parent for path in sorted(project.glob("runs/*/config.yaml"))]


def find_damage(project: Path) -> list[str]:
    """Files with their final name that cannot be read whole."""
    damaged = []
    for folder in run_folders(project):
        for path in [
            p
            for pattern in ("*.json", "eval*.jsonl", "headroom.jsonl", "*/*.safetensors")
            for p in folder.glob(pattern)
        ]:
            try:
                if path.suffix == ".safetensors":
                    safetensors.numpy.load(path.read_bytes())
                else:
                    [
                        json.loads(line)
                        for line in (path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()])
                    ]
            except Exception as error:
                damaged.append(f"{path.relative_to(project)}: {error}")
    return damaged


def contents(folder: Path) -> dict[str, object]:
    """The files of a finished run by name, without times."""
    found = {}
    for path in [p for pattern in COMPARED for p in folder.glob(pattern)]:
        data = path.read_bytes()
        if path.name.startswith("metrics"):
            data = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in data.splitlines()]
        found[path.relative_to(folder).as_posix()] = data
    found["summary.log"] = (folder / "summary.log").read_text().split(" ", 1)[1]
    return found


def variant_of(folder: Path) -> str:
    return re.sub(r"_\d{8}_\d{6}$", "", folder.name)


def kill_once(kind: str, project: Path, rng: random.Random, seconds: float) -> dict:
    """Begin or go on, kill one process at some moment, and see what is left."""
    victim, sent = rng.choice(KINDS[kind]), rng.choice((signal.SIGKILL, signal.SIGTERM))
    moment = rng.choice([*MOMENTS, "any", "any", "any"])
    fate = {"kind": kind, "victim": victim.split()[-1], "signal": sent.name, "moment": moment, "killed": False}
    before = {folder: (folder / "status.json").read_bytes() for folder in finished(project)}
    patience = rng.uniform(1, 0.6 * seconds) if moment == "any" else 4 * seconds
    child, deadline = start(kind, project), time.time() + patience
    while child.poll() is None:
        here = [
            f for f in run_folders(project) if f not in before and moment in MOMENTS and any(f.glob(MOMENTS[moment]))
        ]
        targets = [child.pid] if victim == "command" else [p.pid for p in processes_of(project) if is_victim(p, victim)]
        if targets and (here or time.time() > deadline):
            chosen = rng.choice(targets)
            others_go_on = kind == "study" and victim != "command"  # a study loses one run, and trains the others
            ends = run_of(chosen) if others_go_on else ""
            os.kill(chosen, sent)
            fate["killed"] = True
            break
        time.sleep(0.003 if moment in MOMENTS else 0.05)
    if fate["killed"]:
        since = time.time()
        while (left := processes_of(project, ends)) and time.time() - since < END_SECONDS:
            child.poll()
            time.sleep(0.1)
        fate["seconds"] = round(time.time() - since, 1)
        fate["orphans"] = len(left)
        if others_go_on and child.poll() is None:  # it is gone on with once more below
            child.terminate()
        else:
            for process in left:
                process.kill()
    child.wait()
    fate["lost"] = len(find_damage(project)) + sum(not folder.is_dir() for folder in before)
    fate["false"] = sum(not (folder / "verdict.json").is_file() for folder in finished(project))
    fate["state"] = [
        json.loads((f / "status.json").read_text()).get("state")
        for f in run_folders(project)
        if (f / "status.json").is_file()
    ]
    return fate


def is_victim(process: psutil.Process, piece: str) -> bool:
    try:
        line = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
    return piece in line and ("accelerate" in piece or "accelerate" not in line)


def finished(project: Path) -> list[Path]:
    states = {folder: folder / "status.json" for folder in run_folders(project)}
    return [folder for folder, path in states.items() if path.is_file() and '"finished"' in path.read_text()]


def kill_and_go_on(kind: str, project: Path, kills: int, seed: int, reference: dict, seconds: float) -> list[dict]:
    """One run, killed several times, then to its end; its last fate says whether all its files are the reference's."""
    rng, fates, n_runs = random.Random(seed), [], 2 if kind == "study" else 1
    for _ in range(kills):
        if len(finished(project)) < n_runs:
            fates.append(kill_once(kind, project, rng, seconds * n_runs))
    if len(finished(project)) < n_runs or not list(project.glob("runs/*/phase1.ipynb")) and kind == "run":
        start(kind, project).wait()
    ends = {variant_of(folder): contents(folder) for folder in finished(project)}
    wrong = [f"{v}: {n}" for v, files in reference[kind].items() for n in files if ends.get(v, {}).get(n) != files[n]]
    wrong += [f"{v}: {n} is new" for v, files in ends.items() for n in files if n not in reference[kind][v]]
    for fate in fates:
        fate["differs"], fate["folders"] = wrong, len(run_folders(project)) - n_runs
    return fates


# -- other faults: what is said, and that the run goes on ------------------------------------------------------------


def harm(kind: str, project: Path, volume: Path | None) -> None:
    """What is done to a run in the middle of its training; a folder that is read-only is so from the start."""
    if kind == "folder deleted":
        (run,) = run_folders(project)
        shutil.rmtree(run)
    elif kind == "worker stopped":
        workers = [process for process in processes_of(project) if is_victim(process, "-m bridgekit.train.worker")]
        workers[-1].suspend()
    elif kind in OWN_LOSS:
        (project / "broken").touch()
    elif kind == "checkpoint damaged":
        for process in processes_of(project):
            process.kill()
    elif kind == "disk full":
        with contextlib.suppress(OSError), open(volume / "filler", "wb") as file:
            while True:
                file.write(bytes(4096))
                file.flush()


def heal(kind: str, project: Path, volume: Path | None) -> None:
    """What stands before the run is begun again: mended, but for a byte of its newest checkpoint."""
    if kind == "checkpoint damaged":
        newest = max(
            project.glob("runs/*/checkpoint/resume/bridged-*/*.safetensors"), key=lambda path: path.stat().st_mtime_ns
        )
        data = newest.read_bytes()
        newest.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    elif kind in OWN_LOSS:
        (project / "broken").unlink()
    elif kind == "disk full":
        (volume / "filler").unlink()
    elif kind == "folder read-only":
        subprocess.run(["mount", "-o", "remount,rw", str(volume)], check=True)


def meet_fault(kind: str, home: Path, reference: dict) -> dict:
    """A training that meets a fault: its exit code, its last word, how long it took, and what comes of going on."""
    project, volume = make_project(home / kind.replace(" ", "_")), None
    if kind in ("disk full", "folder read-only"):
        volume = project / "runs"
        volume.mkdir()
        size = "size=16m" if kind == "disk full" else "size=16m,ro"
        if subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(volume)], check=False).returncode:
            return {"fault": kind, "message": "not tried: a file system of its own needs root"}
    changed = {"worker stopped": ["train.num_processes=2"]}
    changed |= dict.fromkeys(OWN_LOSS, ["loss.extra=own.py:loss", "loss.extra_weight=1"])
    if kind in changed:
        settings = [*SETTINGS, *changed[kind]]
        own = "import torch\nfrom pathlib import Path\n\ndef fail():\n    raise torch.OutOfMemoryError('no room')\n\n"
        own += f"def loss(logits):\n    bad = Path('{project}/broken').exists()\n"
        (project / "own.py").write_text(f"{own}    return logits.mean() * ({OWN_LOSS.get(kind)} if bad else 0)\n")
        (project / "small.yaml").write_text(yaml.safe_dump({"notebook": "phase1", "overrides": settings}))
    child = start("train", project)
    while child.poll() is None and not any(
        len(f.read_bytes().splitlines()) > 6 for f in project.glob("runs/*/metrics.jsonl")
    ):
        time.sleep(0.05)
    since = time.time()
    harm(kind, project, volume)
    row = {"fault": kind, "exit code": child.wait(), "seconds": round(time.time() - since, 1)}
    row["message"] = (project / "command.log").read_text(errors="replace").splitlines()[-1].replace(f"{project}/", "")
    row["left alive"] = len(psutil.wait_procs(processes_of(project), timeout=5)[1])
    heal(kind, project, volume)
    if kind != "folder deleted":
        goes_on = start("train", project).wait() == 0
        ends = {variant_of(folder): contents(folder) for folder in finished(project)}
        # Two processes add up in another order, and another loss has a column of its own.
        same = kind not in changed and ends == reference["train"]
        row["goes on"] = "to the same bytes" if goes_on and same else str(goes_on)
    if kind == "checkpoint damaged":
        (log,) = project.glob("runs/*/train.log")
        row["message"] = next((line for line in log.read_text().splitlines() if "is damaged" in line), row["message"])
    if volume:
        subprocess.run(["umount", str(volume)], check=False)
    return row


OWN_LOSS = {"loss not finite": "float('nan')", "out of memory": "fail()"}  # a loss of the run's own that goes wrong
FAULTS = ("folder deleted", "worker stopped", "disk full", "folder read-only", "checkpoint damaged", *OWN_LOSS)


def time_pairs(n: int, home: Path) -> dict:
    """Runs with a checkpoint every six seconds and without any, in turns: seconds of each, and of writing inside."""
    table = {"steps": 40, "with": [], "without": [], "blocking_share": []}
    for i in range(2 * n):
        kind, folder = ("with", "without")[(i + i // 2) % 2], home / f"pair_{i}"
        minutes = {"with": 0.1, "without": 1e6}[kind]
        changes = [f"run.runs_dir={folder}", f"train.checkpoint_minutes={minutes}", "train.steps=40"]
        changes += ["task.n_train=1000", "task.n_test=64", "train.val_samples=64", "train.controls=[]"]
        changes += ["eval.conditions=[source,target,bridged]"]
        options = [part for change in changes for part in ("-o", change)]
        since = time.time()
        command = [sys.executable, "-m", "bridgekit", "train", "-f", "parameters/phase1.yaml", *options]
        whole = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}  # one run, all cores
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=whole)
        table[kind].append(round(time.time() - since, 1))
        if kind == "with":
            spent = json.loads(next(folder.glob("*/timing.json")).read_text())
            table["blocking_share"].append(round(spent["checkpoint"] / table[kind][-1], 5))
        print(kind, table[kind][-1], flush=True)
    ratios = [a / b for a, b in zip(table["with"], table["without"], strict=True)]
    return table | {"median_ratio": round(statistics.median(ratios), 4)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--per-run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--at-once", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a JSON file that the table is added to")
    args = parser.parse_args()
    home, began = Path(tempfile.mkdtemp(prefix="faults_")).resolve(), time.time()
    pool, reference, spent = concurrent.futures.ThreadPoolExecutor(args.at_once), {}, {}

    def run_whole(kind: str) -> None:
        project, since = make_project(home / f"reference_{kind}"), time.time()
        assert start(kind, project).wait() == 0, (project / "command.log").read_text()
        spent[kind] = time.time() - since
        reference[kind] = {variant_of(folder): contents(folder) for folder in finished(project)}

    list(pool.map(run_whole, KINDS))
    print(f"references: {', '.join(f'{kind} {seconds:.0f} s' for kind, seconds in spent.items())}", flush=True)
    fates, attempts, numbers = [], [], itertools.count()

    def work(_) -> None:
        while len(fates) < args.kills:
            i, kind = (number := next(numbers)), list(KINDS)[number % len(KINDS)]
            project = make_project(home / f"{kind}_{i}")
            due = min(args.per_run, args.kills - len(fates))
            for fate in kill_and_go_on(kind, project, due, args.seed * 1000 + i, reference, spent["train"]):
                print(json.dumps(fate), flush=True)
                attempts.append(fate)
                fates.extend([fate] * fate["killed"])

    faults = pool.map(lambda kind: meet_fault(kind, home, reference), FAULTS)  # they wait more than they work
    list(pool.map(work, range(args.at_once)))
    table = {
        "faults": list(faults),
        "kills": len(fates),
        "by_signal": collections.Counter(f["signal"] for f in fates),
        "by_victim": collections.Counter(f"{f['kind']}: {f['victim']}" for f in fates),
        "by_moment": collections.Counter(f["moment"] for f in fates),
        "runs": next(numbers),
        "orphans": sum(f["orphans"] for f in fates),
        "artifacts_lost": sum(f["lost"] for f in fates),
        "falsely_finished": sum(f["false"] for f in fates),
        "folders_lost": sum(f["folders"] != 0 for f in fates),
        "runs_that_differ": sum(bool(f["differs"]) for f in fates),
        "longest_end_seconds": max((f["seconds"] for f in fates), default=0),
        "checkpoint_pairs": time_pairs(args.pairs, home) if args.pairs else None,
        "minutes": round((time.time() - began) / 60, 1),
    }
    print(json.dumps(table, indent=1))
    if args.out:
        known = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text(
            json.dumps([*known, {"seed": args.seed, "attempts": len(attempts)} | table], indent=1) + "\n"
        )
    wrong = ("orphans", "artifacts_lost", "falsely_finished", "folders_lost", "runs_that_differ")
    return int(any(table[name] for name in wrong))


if __name__ == "__main__":
    sys.exit(main())
