"""Run folders: made once, written atomically, read back as frames.

    folder = create_run(config)                       # runs/<name>_<YYYYmmdd_HHMMSS>/ with config.yaml
    frame = load_eval(folder / "eval_samples_step_final.jsonl")

A file is written beside its place and renamed, so what has a final name is whole.
"""

import datetime
import gzip
import hashlib
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path

from bridgekit.config import CONDITIONS, Config, ConfigError, dump_config, load_config

FINAL = "eval_samples_step_final.jsonl"
INVALID = "[invalid]"  # what stands in `<condition>_extracted` where no answer was found


def create_run(config: Config, folder: str | Path | None = None) -> Path:
    """A new run folder with its resolved config; one that exists, or cannot be written, is refused."""
    if folder is None or folder == "":
        stamp = datetime.datetime.now().strftime("%Y%m%d_%H%M%S")
        folder = Path(config.run.runs_dir) / f"{config.run.name}_{stamp}"
    folder = Path(folder)
    if (folder / "config.yaml").exists() or (folder.exists() and any(folder.iterdir())):
        raise ConfigError(f"run folder '{folder}' exists already: choose another run.name, or wait a second")
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        write_text_atomic(folder / "config.yaml", dump_config(config))
    except OSError as error:
        raise ConfigError(f"run folder '{folder}' cannot be written ({error.strerror}): set run.runs_dir") from None
    return folder


def read_run_config(folder: str | Path) -> Config:
    return load_config(Path(folder) / "config.yaml")


def write_text_atomic(path: str | Path, text: str) -> None:
    write_bytes_atomic(path, text.encode())


def write_bytes_atomic(path: str | Path, data: bytes) -> None:
    path = Path(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """One JSON object a line; `.gz` is compressed without a time stamp, so equal rows make equal files."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if str(path).endswith(".gz"):
        buffer = io.BytesIO()
        with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as stream:
            stream.write(text.encode())
        write_bytes_atomic(path, buffer.getvalue())
    else:
        write_text_atomic(path, text)


def append_jsonl(path: str | Path, row: dict) -> None:
    with Path(path).open("a") as stream:
        stream.write(json.dumps(row) + "\n")


def read_jsonl(path: str | Path, left_out: list[int] | None = None) -> Iterator[dict]:
    """Rows of a `.jsonl` or `.jsonl.gz`; a line cut in half, or a cut file, is refused with file and line number.

    Given a list `left_out`, the whole lines are read, and the list takes the numbers of the others.
    """
    path, number = Path(path), 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                row = _parse_row(line)
                if row is not None:
                    yield row
                elif left_out is None:
                    raise ValueError(f"{path}, line {number}: not a whole JSON object; {_WAY_OUT}")
                else:
                    left_out.append(number)
        except (EOFError, gzip.BadGzipFile, zlib.error):
            if left_out is None:
                raise ValueError(f"{path}, line {number + 1}: the compressed file is cut here; {_WAY_OUT}") from None
            left_out.append(number + 1)


_WAY_OUT = "restore the file, or read an evaluation without its broken lines (`--skip-broken`)"


def _parse_row(line: bytes) -> dict | None:
    try:
        row = json.loads(line)
    except ValueError:  # also what is not UTF-8: a line may be cut inside a character
        return None
    return row if isinstance(row, dict) else None


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


_TEXTS = ("question", "gold_full_text")


def load_eval(path: str | Path, skip_broken: bool = False, texts: bool = True):
    """The evaluation JSONL as a DataFrame with a bool `<condition>_correct` per condition present.

    With `skip_broken` it is used without its broken lines; their numbers are in `frame.attrs["left_out"]`. Without
    `texts` only what is counted is kept: the texts fill the memory.
    """
    import pandas as pd

    left_out: list[int] = []
    rows = read_jsonl(path, left_out if skip_broken else None)
    if not texts:
        rows = ({k: v for k, v in r.items() if not k.endswith("_full") and k not in _TEXTS} for r in rows)
    frame = pd.DataFrame(rows)
    if frame.empty:
        raise ValueError(f"{path}: no examples in it")
    for key in ("gold_extracted", "source_extracted", "target_extracted"):
        if key not in frame:
            raise ValueError(f"{path}: no '{key}' in it, so it is no evaluation of a run")
    for condition in CONDITIONS:
        if f"{condition}_extracted" in frame:
            said = frame[f"{condition}_extracted"]
            frame[f"{condition}_correct"] = (said == frame["gold_extracted"]) & (said != INVALID)
    frame["union_correct"] = frame["source_correct"] | frame["target_correct"]
    if left_out:
        frame.attrs["left_out"] = left_out
    return frame


def load_eval_once(path: str | Path, texts: bool = True):
    """`load_eval` where many tables read one file: kept while it is unchanged, and no reader may change it."""
    stat = os.stat(path)
    return _load_once(Path(path).resolve(), stat.st_mtime_ns, stat.st_size, texts)


@lru_cache(maxsize=64)
def _load_once(path: Path, changed_ns: int, size: int, texts: bool):
    return load_eval(path, texts=texts)


def write_status(folder: str | Path, **status) -> None:
    """What a watcher shows: state, stage, step, steps, loss, val_accuracy, best, seconds_left, elapsed."""
    write_text_atomic(Path(folder) / "status.json", json.dumps(status) + "\n")


def read_status(folder: str | Path) -> dict:
    path = Path(folder) / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}


def lexicon_seed_of(folder: str | Path) -> int:
    """Which lexicon the pair of a run was taught, from the run's own record."""
    return json.loads((Path(folder) / "provenance.json").read_text())["lexicon_seed"]


def provenance(config: Config) -> dict:
    """Where a run's numbers come from: code, versions, machine kind, seeds. Holds no user or host name."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "numpy", "pandas"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    text = dump_config(config)
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions,
        "platform": platform.platform(terse=True),
        "cpus": os.cpu_count(),
        "seed": config.run.seed,
        "config_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "command": " ".join(
            ["python", "-m", "bridgekit.train.worker", *(a for a in sys.argv[1:] if not a.startswith("/"))]
        ),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def watch_parent() -> None:
    """End this process soon after the one that asked for it (BRIDGEKIT_PARENT_PID) is gone.

    A killed kernel cannot clean up after itself, and an orphan would hold its GPU.
    """
    wanted = os.environ.get("BRIDGEKIT_PARENT_PID")
    if not wanted:
        return

    def watch() -> None:
        while True:
            time.sleep(1.0)
            if not _is_alive(int(wanted)):
                os._exit(143)

    threading.Thread(target=watch, daemon=True, name="watch-parent").start()


def _is_alive(pid: int) -> bool:
    """False for a gone process and for a zombie: nobody is behind it any more."""
    import psutil

    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
