"""Keep what is worth keeping of a run, and the manifest of everything kept.

    bridgekit preserve RUN            copy or derive RUN into preserved_data/, add its manifest entry
    bridgekit preserve --study NAME   pack the finished runs NAME_* of a runs folder into studies/NAME.tar.xz; with
                                      --add, put those that are not kept yet to those that are
    bridgekit preserve --manifest     write preserved_data/README.md again from the entries

Runs of the first experiments are kept as compact tables under `first_experiments/`, runs of this package as
they are (final evaluation compressed). Nothing kept is overwritten: a folder appears whole, by one rename.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pandas as pd

from bridgekit.audit.outcomes import curve_of, evaluation_files, rescore, text_facts
from bridgekit.audit.runfolders import FACTS_FILE, OUTCOMES_FILE, RunRecord, find_runs, read_run
from bridgekit.audit.runlogs import PATH_KEYS
from bridgekit.results import manifest
from bridgekit.runs import hash_file
from bridgekit.studies import keep_study

ROOT = Path("preserved_data")
FIRST = "first_experiments"
SMALL_FILES = (  # of a run of this package: all that its numbers are recomputed from, and how it went
    "config.yaml", "provenance.json", "status.json", "metrics*.jsonl", "summary.log", "verdict.json",
    "timing.json", "train.log", "attention.npz",
)  # fmt: skip


def preserve(
    run: str | Path,
    root: str | Path = ROOT,
    name: str | None = None,
    max_jsonl_mb: float = 1.5,
    max_checkpoint_mb: float = 2.0,
) -> Path:
    """Keep one run; returns its folder. Compressed JSONL and checkpoint files above their limits stay out."""
    record = read_run(run, name)
    if record.outcomes.empty and record.losses.empty:
        raise ValueError(f"{run}: neither evaluations nor losses could be read, so there is nothing to keep")
    home = Path(root) / FIRST if record.generation != "bridgekit" else Path(root)
    folder = home / record.name.replace('"', "").replace("'", "")
    if folder.exists():
        raise ValueError(f"{folder}: already kept; what is preserved is never overwritten (another --name?)")
    home.mkdir(parents=True, exist_ok=True)
    for left_over in home.glob(f".{glob.escape(folder.name)}.*"):  # of a preserve that was killed
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=home) as partial:
        part = Path(partial) / folder.name
        part.mkdir()
        if record.generation == "bridgekit":
            _copy_run(record, part, max_jsonl_mb, max_checkpoint_mb)
        else:
            write_tables(record, part)
            _write_text_tables(record, part)
            _compress_evaluations(record, part, max_jsonl_mb)
        _write_checksums(record, part)
        manifest.write_entry(part, read_run(part, folder.name))
        os.rename(part, folder)
    return folder


def write_tables(record: RunRecord, folder: Path) -> None:
    """Configuration, outcomes, curve and losses of a first-experiments run as compact tables."""
    settings = record.facts.get("settings_text") or {k: str(v) for k, v in record.config.items()}
    facts = {
        "world_size": record.facts.get("world_size"),
        "translator_params_m": record.facts.get("parameters_m"),
        "gpu": record.facts.get("gpu"),
    }
    lines = [f"{k}: {v}" for k, v in {**settings, **facts}.items() if v is not None and k not in PATH_KEYS]
    (folder / "config.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    known = ("started", "ended", "saved_best", "stopped_at", "crashes")
    facts = {key: record.facts[key] for key in known if record.facts.get(key)}
    facts["problems"] = record.problems
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if len(record.outcomes):
        write_gzip(folder / OUTCOMES_FILE, record.outcomes.to_csv(index=False, lineterminator="\n").encode())
        curve_of(record.outcomes).to_csv(folder / "curve.csv", index=False, float_format="%.4f")
    if len(record.losses):
        record.losses.to_csv(folder / "losses.csv", index=False)
    if len(record.logged):
        record.logged.to_csv(folder / "logged.csv", index=False)


def _write_text_tables(record: RunRecord, folder: Path) -> None:
    """What only the full texts tell: labels that move under each extraction rule, repeated questions."""
    for name, read in (("rescored.csv", rescore), ("texts.csv", text_facts)):
        frames = [read(path).assign(step=step) for step, path in evaluation_files(record.folder)]
        frames = [frame for frame in frames if len(frame)]
        if frames:
            table = pd.concat(frames, ignore_index=True)
            table[["step", *[c for c in table if c != "step"]]].to_csv(folder / name, index=False)


def _compress_evaluations(record: RunRecord, folder: Path, max_jsonl_mb: float) -> bool:
    """Copy the final evaluation as `.jsonl.gz`; False when it is larger than the limit or not there."""
    finals = [path for step, path in evaluation_files(record.folder) if step == "final"]
    if not finals or finals[0].is_symlink():
        return False
    opener = gzip.open if finals[0].suffix == ".gz" else open
    kept = folder / "eval_samples_step_final.jsonl.gz"
    with opener(finals[0], "rb") as source:
        write_gzip(kept, source)
    if kept.stat().st_size <= max_jsonl_mb * 1e6:
        return True
    kept.unlink()
    return False


def _copy_run(record: RunRecord, folder: Path, max_jsonl_mb: float, max_checkpoint_mb: float) -> None:
    for path in sorted(found for pattern in SMALL_FILES for found in record.folder.glob(pattern)):
        if path.is_file() and not path.is_symlink():
            shutil.copyfile(path, folder / path.name)
    if not _compress_evaluations(record, folder, max_jsonl_mb) and len(record.outcomes):
        write_gzip(folder / OUTCOMES_FILE, record.outcomes.to_csv(index=False, lineterminator="\n").encode())
    for name in ("bridged", "constant"):  # the diagnostics set the one against the other
        bridge = record.folder / "checkpoint" / f"{name}.safetensors"
        if bridge.is_file():
            data = halve_checkpoint(bridge.read_bytes())
            if len(data) <= max_checkpoint_mb * 1e6:
                (folder / "checkpoint").mkdir(exist_ok=True)
                (folder / "checkpoint" / bridge.name).write_bytes(data)


def halve_checkpoint(data: bytes) -> bytes:
    """A safetensors file with its float32 tensors in half precision: enough to look inside a bridge."""
    import numpy as np
    import safetensors.numpy

    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {}) | {"precision": "float16"}
    tensors = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in safetensors.numpy.load(data).items()}
    return safetensors.numpy.save(tensors, metadata)


def _write_checksums(record: RunRecord, folder: Path) -> None:
    """sha256 of every original file and of every file kept, so that both can be told from later changes."""
    inside = record.folder.resolve()
    original = [p for p in sorted(record.folder.rglob("*")) if p.is_file() and p.resolve().is_relative_to(inside)]
    sums = {
        "original": {p.relative_to(record.folder).as_posix(): hash_file(p) for p in original},
        "kept": {p.relative_to(folder).as_posix(): hash_file(p) for p in sorted(folder.rglob("*")) if p.is_file()},
    }
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def changed_files(folder: Path) -> list[str]:
    """Kept files whose bytes are no longer those of the checksums, or that are gone."""
    path = folder / "checksums.json"
    if not path.is_file():
        return []
    kept = json.loads(path.read_text(encoding="utf-8"))["kept"]
    return [n for n, digest in kept.items() if not (folder / n).is_file() or hash_file(folder / n) != digest]


def write_gzip(path: Path, data) -> None:
    """Write bytes or a binary file compressed; the same data gives the same bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(data) if isinstance(data, bytes) else shutil.copyfileobj(data, file, 1 << 20)


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit preserve` verb."""
    parser = argparse.ArgumentParser(prog="bridgekit preserve", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", metavar="RUN", help="run folder, or a folder of run folders")
    parser.add_argument("--root", default=str(ROOT), help="where runs are kept (default: %(default)s)")
    parser.add_argument("--name", help="keep a single run under this name")
    parser.add_argument("--max-jsonl-mb", type=float, default=1.5, help="limit of the compressed final JSONL")
    parser.add_argument("--max-checkpoint-mb", type=float, default=2.0, help="limit of a checkpoint file")
    parser.add_argument("--study", help="pack the finished runs of this study into one file")
    parser.add_argument("--add", action="store_true", help="the study is kept already: put the runs that are new to it")
    parser.add_argument("--runs-dir", default="runs", help="where the study's runs are (default: %(default)s)")
    parser.add_argument("--manifest", action="store_true", help="only write the manifest again")
    args = parser.parse_args(argv)
    if not args.runs and not args.manifest and not args.study:
        parser.error("name a RUN, a --study, or ask for --manifest")
    failed = 0
    try:
        if args.study:
            path = keep_study(args.runs_dir, args.study, Path(args.root) / "studies", args.add)
            print(f"kept {path} ({path.stat().st_size / 1e6:.2f} MB)")
            return 0
        folders = [folder for run in args.runs for folder in find_runs(run) or [Path(run)]]
        if args.name and len(folders) > 1:
            raise ValueError(f"--name is for one run; {args.runs[0]} holds {len(folders)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        try:
            kept = preserve(folder, args.root, args.name, args.max_jsonl_mb, args.max_checkpoint_mb)
            print(f"kept {kept}; now fill in the why and the publishability in {kept / manifest.ENTRY}")
        except (ValueError, OSError) as error:
            failed = 2
            print(f"error: {error}", file=sys.stderr)
    print(f"manifest: {manifest.write_manifest(args.root)}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
