"""Run folders: made once, written by one process at a time, read back as frames.

    folder = create_run(config)                       # runs/<name>_<YYYYmmdd_HHMMSS>/ with config.yaml
    frame = load_eval(find_eval(folder))              # a row per problem, a bool `<condition>_correct` per condition
    folder = open_study("ablation_losses")            # the run folders of a kept study

Files are written to a temporary name and renamed: a file with its final name is complete.
"""

import contextlib
import datetime
import gzip
import hashlib
import itertools
import json
import lzma
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from bridgekit.config import CONDITIONS, Config, ConfigError, dump_config, load_config, refuse_if
from bridgekit.keys import INVALID

FINAL = "eval_samples_step_final.jsonl"
RESUME = "checkpoint/resume"  # checkpoints of trainings, until their run has ended
BEAT = ".beat-"  # the file that a process touches as long as it lives, by its rank
MOST_FILES, MOST_BYTES = 10_000, 4 << 30  # of a kept study, unpacked: the largest has 450 files, 71 MB
UNFINISHED = ".answers.jsonl"  # those of the final evaluation, until it is whole


def project_root() -> Path:
    """The folder that relative paths start from; JupyterLab starts a kernel beside its notebook."""
    cwd = Path.cwd()
    return next((folder for folder in (cwd, *cwd.parents) if (folder / "pyproject.toml").is_file()), cwd)


def create_run(config: Config, folder: str | Path | None = None) -> Path:
    """A new run folder with its resolved config; a given `folder` must be new or empty."""
    where = Path(folder or config.run.runs_dir)
    try:
        where.mkdir(parents=True, exist_ok=True)
        path = where if folder else make_folder(where, config.run.name)
        if any(path.iterdir()):
            raise ConfigError(f"run folder '{where}' exists already: move it away, or set run.runs_dir")
        (path / "figures").mkdir()
        write_text_atomic(path / "config.yaml", dump_config(config))
    except OSError as error:
        raise ConfigError(f"run folder '{where}' cannot be written ({error.strerror}): set run.runs_dir") from None
    return path


def make_folder(root: Path, name: str) -> Path:
    """A new folder `name_<now>`, or `name_<now>_2`, ... where another process has made it in this second."""
    root.mkdir(parents=True, exist_ok=True)
    name += f"_{datetime.datetime.now():%Y%m%d_%H%M%S}"
    for path in itertools.chain([root / name], (root / f"{name}_{number}" for number in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            path.mkdir()
            return path


def load_run_config(folder: str | Path) -> Config:
    return load_config(Path(folder) / "config.yaml")


def same_run(one: Config, other: Config) -> bool:
    """Equal in all but names and folders: a run keeps being itself when it is renamed, fetched or preserved."""
    own = one.run
    return one == other.with_(**{"run.name": own.name, "run.runs_dir": own.runs_dir, "run.cache_dir": own.cache_dir})


def write_status(folder: str | Path, **status) -> None:
    """What a watcher shows: state, stage, step, steps, loss, val_accuracy, best, seconds_left, elapsed, gpu_gib.

    The state is `queued`, `running`, `finished`, `stopped` (asked to, or killed) or `failed`: the last two can go on.
    Who runs it stands in `host`, and in `job` where that is Slurm's; a run that is stopped keeps its job.
    """
    state, here = status.get("state"), {"host": platform.node()}
    known = {key: value for key, value in status.items() if key != "host" and (key != "job" or state != "running")}
    here |= {"job": slurm_job()["job"]} if state == "running" and slurm_job() else {}
    known |= here if state in ("running", "queued") else {}
    write_text_atomic(Path(folder) / "status.json", json.dumps(known) + "\n")


def load_status(folder: str | Path) -> dict:
    """What a run last said of itself; of a damaged file only that it is one."""
    path = Path(folder) / "status.json"
    try:
        status = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        return {"state": "unknown", "error": f"{path} is damaged ({error})"}
    return status if isinstance(status, dict) else {"state": "unknown", "error": f"{path} is damaged"}


def free_run(folder: str | Path) -> int:
    """Remove what a finished run needed to go on. -> bytes freed"""
    folder, freed = Path(folder), 0
    half_written = [path for path in folder.rglob(".*.????????") if path.is_file()]  # by a process that was killed
    for path in [folder / RESUME, folder / UNFINISHED, *folder.glob(f"{BEAT}*"), *half_written]:
        for file in [path, *sorted(path.rglob("*"))]:
            freed += file.stat().st_size if file.is_file() and file.stat().st_nlink == 1 else 0
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    return freed


# -- kept runs --------------------------------------------------------------------------------------------------


def open_study(name: str, root: str | Path = "preserved_data/studies", into: str | Path = "runs/.studies") -> Path:
    """The folder with a kept study's run folders, unpacked where this very archive has not been unpacked yet."""
    path, into = project_root() / root / f"{name}.tar.xz", project_root() / into
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no study of this name is kept (bridgekit preserve --study {name})")
    place = f"{name}.{hash_file(path)[:16]}"
    with contextlib.suppress(OSError):
        into.mkdir(parents=True, exist_ok=True)
    if not (into / place).is_dir() and not os.access(into, os.W_OK):  # of a checkout that may only be read
        into = Path(tempfile.gettempdir()) / f"bridgekit_studies_{os.getuid()}"
        into.mkdir(exist_ok=True)
    folder = into / place
    if not folder.is_dir():
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=into, ignore_cleanup_errors=True) as partial:
            unpack(path, Path(partial))
            with contextlib.suppress(OSError):  # another process was quicker: its copy is the same
                Path(partial).rename(folder)
    return folder


def unpack(path: Path, folder: Path) -> None:
    """The files of a kept study, no more and no larger than one has; what leads out of the folder is refused."""
    total, most = 0, f"{MOST_FILES:,} files or {MOST_BYTES >> 30} GiB"
    try:
        with tarfile.open(path, "r:xz") as archive:
            for number, member in enumerate(archive, start=1):
                total += member.size
                too_much = number > MOST_FILES or total > MOST_BYTES
                refuse_if(too_much, f"{path}: unpacks to more than {most}, which no study has: restore it")
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise ConfigError(f"{path}: no archive of a study ({error}): restore it") from None


# -- files ------------------------------------------------------------------------------------------------------


def write_text_atomic(path: str | Path, text: str) -> None:
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    """Replace a file as a whole; its bytes are on the disk before its name is, so a power cut leaves the old one."""
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON object a line; `.gz` is compressed without a time stamp, so equal rows make equal files."""
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    write_bytes_atomic(path, gzip.compress(data, mtime=0) if str(path).endswith(".gz") else data)


def append_jsonl(path: str | Path, row: dict) -> None:
    with Path(path).open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def load_jsonl(path: str | Path, broken: list[int] | None = None) -> Iterator[dict]:
    """Rows of a `.jsonl` or `.jsonl.gz`; a line cut in half, or a cut file, is refused with file and line number.

    Given a list `broken`, the whole lines are read, and the list takes the numbers of the others.
    """
    path, number = Path(path), 0

    def note(number: int, what: str) -> None:
        if broken is None:
            way_out = "restore the file, or read an evaluation without its broken lines (`--skip-broken`)"
            raise ValueError(f"{path}, line {number}: {what}; {way_out}")
        broken.append(number)

    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                row = None
                with contextlib.suppress(ValueError, RecursionError):  # also no UTF-8: a line may be cut anywhere
                    row = json.loads(line)
                if isinstance(row, dict):
                    yield row
                elif line.strip():
                    note(number, "not a whole JSON object")
        except (EOFError, gzip.BadGzipFile, zlib.error):
            note(number + 1, "the compressed file is cut here")


def load_json(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: not a whole JSON object; restore it, or remove it")
    return found


def hash_file(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_eval(folder: str | Path, step: str = "final") -> Path:
    """A run's evaluation file, compressed or not."""
    plain = Path(folder) / f"eval_samples_step_{step}.jsonl"
    for path in (plain, plain.with_suffix(".jsonl.gz")):
        if path.exists():
            return path
    raise FileNotFoundError(f"{plain}: not found: the run has not finished, or this is not a run folder")


def is_correct(row: dict, condition: str) -> bool:
    """As the task scored it; rows of older runs hold the extracted answers alone."""
    return row.get(f"{condition}_correct", row[f"{condition}_extracted"] == row["gold_extracted"])


def load_eval(path: str | Path, skip_broken: bool = False, texts: bool = True):
    """The evaluation JSONL as a DataFrame with a bool `<condition>_correct` per condition present.

    The task's own `_correct` counts where it was written; older files are scored by equal answers. With `skip_broken`
    broken lines are left out and listed in `frame.attrs["left_out"]`; without `texts` memory holds only what is
    counted. `attrs["controls"]` says from which steps the trained controls come, where the run has kept it;
    `attrs["unscored"]` names the conditions that some row has no answer or no score of: there it counts as wrong.
    """
    import pandas as pd

    broken: list[int] = []
    rows = load_jsonl(path, broken if skip_broken else None)
    if not texts:
        rows = ({k: v for k, v in row.items() if not k.endswith(("_full", "_full_text", "question"))} for row in rows)
    frame = pd.DataFrame(rows)
    if frame.empty:
        raise ValueError(f"{path}: no examples in it: restore the file")
    for key in ("gold_extracted", "source_extracted", "target_extracted"):
        if key not in frame:
            raise ValueError(f"{path}: no '{key}' in it, so it is no evaluation of a run")
    answered = [key.removesuffix("_extracted") for key in frame if key.endswith("_extracted")]
    for condition in dict.fromkeys(c for c in (*CONDITIONS, *answered) if c in answered and c != "gold"):
        answer, by_task = frame[f"{condition}_extracted"], frame.get(f"{condition}_correct")
        equal = (answer == frame["gold_extracted"]) & (answer != INVALID)
        frame[f"{condition}_correct"] = equal if by_task is None else by_task.eq(True)
        if answer.isna().any() or by_task is not None and by_task.isna().any():
            frame.attrs.setdefault("unscored", []).append(condition)
    frame["union_correct"] = frame["source_correct"] | frame["target_correct"]
    if broken:
        frame.attrs["left_out"] = broken
    if (controls := Path(path).parent / "controls.json").is_file():
        frame.attrs["controls"] = json.loads(controls.read_text())
    return frame


# -- where a run comes from -------------------------------------------------------------------------------------


def lexicon_seed_of(folder: str | Path) -> int:
    """Which lexicon the pair of a run was taught, from the run's own record."""
    return json.loads((Path(folder) / "provenance.json").read_text())["lexicon_seed"]


def provenance(config: Config) -> dict:
    """Where a run's numbers come from: code, versions, machine kind, seeds, command.

    It holds no user name, and no host name but those of the nodes that Slurm has given.
    """
    from importlib.metadata import version

    names = ("torch", "transformers", "accelerate", "tokenizers", "numpy", "pandas")
    world = int(os.environ.get("WORLD_SIZE", 1))
    launcher = f"accelerate launch --multi_gpu --num_processes {world}" if world > 1 else "python"
    worker = [*launcher.split(), "-m", "bridgekit.train.worker", *sys.argv[1:]]
    return {
        "commit": _output("git", "rev-parse", "HEAD"),
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "platform": platform.platform(terse=True),
        "cpu": _output("sed", "-n", "/^model name/{s/.*: //p;q}", "/proc/cpuinfo") or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": count_threads(),
        "seed": config.run.seed,
        "config_sha256": hashlib.sha256(dump_config(config).encode()).hexdigest(),
        "command": os.environ.get("BRIDGEKIT_COMMAND") or join_command(worker),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    } | ({"slurm": slurm_job()} if slurm_job() else {})


def slurm_job() -> dict[str, str]:
    """The id of the Slurm job that this process runs in, as squeue shows it, and its nodes; {} outside of one."""
    known = os.environ
    if "SLURM_JOB_ID" not in known:
        return {}
    array = f"{known['SLURM_ARRAY_JOB_ID']}_{known['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_TASK_ID" in known else ""
    return {"job": array or known["SLURM_JOB_ID"], "nodes": known.get("SLURM_JOB_NODELIST", "")}


def join_command(parts: Iterable[str]) -> str:
    """A command line as it can be typed in the project's folder; a home folder is `~`, so no user is named."""
    texts = [text.removeprefix(f"{project_root()}/").replace(f"{Path.home()}/", "~/", 1) for text in parts]
    return " ".join(text if text.startswith("~/") else shlex.quote(text) for text in texts)


def count_threads(n: int = 1) -> int:
    """Threads for each of `n` processes at once, unless the user has set them: more than cores make each crawl.

    A job scheduler may have left this process fewer cores than there are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // n))
    is_number = given.isdecimal() and int(given) > 0
    refuse_if(not is_number, f"OMP_NUM_THREADS: expected a whole number above 0, got '{given}': set it, or unset it")
    return int(given)


def _output(*command: str) -> str:
    """What a program prints; nothing where there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
