"""Keep what is worth keeping of a run or a study, with checksums, and the manifest of everything kept.

    bridgekit preserve RUN            copy or derive RUN into preserved_data/, add its manifest entry
    bridgekit preserve --study NAME   pack the finished runs NAME_* of a runs folder into studies/NAME.tar.xz; with
                                      --add, put those that are not kept yet to those that are
    bridgekit preserve --manifest     write preserved_data/README.md again from the entries

A run of this package is kept as it is, its final evaluation compressed; a run of the first experiments becomes compact
tables under `first_experiments/`. Nothing kept is overwritten, and a folder appears whole, by one rename. An entry is
`manifest.md` in the run's folder: only what stands between its markers is written again, the prose stays.
"""

from __future__ import annotations

import argparse
import glob
import gzip
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import typing
from pathlib import Path

from bridgekit.results.reports import ENTRY, UNWRITTEN, describe_run, load_json, render, replace_block, write_entry
from bridgekit.runs import hash_file, load_jsonl, write_jsonl, write_text_atomic

ROOT, FIRST = Path("preserved_data"), "first_experiments"
README = "README.md"
EVAL_FILE = re.compile(r"eval_samples_step_(\d+|final)\.jsonl(?:\.gz)?")
SMALL_FILES = (  # of a run of this package: all that its numbers are recomputed from, and how it went
    "config.yaml", "provenance.json", "status.json", "metrics*.jsonl", "summary.log", "verdict.json", "controls.json",
    "timing.json", "train.log", "attention.npz", "code.json", "code/*.py",
)  # fmt: skip
CHECKPOINTS = ("bridged", "constant")  # the diagnostics set the one against the other


# -- which folder is a run ----------------------------------------------------------------------------------


def find_runs(root: str | Path) -> list[Path]:
    """Run folders at or below `root`, in order of name; links that lead out of `root` are not followed."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; name a run folder or a folder of run folders")
    inside, found = root.resolve(), set()
    for path in [root, *sorted(root.rglob("*"))]:
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.is_dir() and path.resolve().is_relative_to(inside) and generation_of(path):
            found.add(path)
    return sorted(path for path in found if not found & set(path.parents))


def generation_of(folder: Path) -> str | None:
    """Who wrote a folder: bridgekit, the first experiments' program, or `derived` from those; None: it is no run."""
    names = {path.name for path in folder.iterdir()}
    if names & {"metrics.jsonl", "provenance.json", "status.json"}:
        return "bridgekit"
    if names & {"outcomes.csv.gz", "run.json"}:
        return "derived"
    return "first" if "train.log" in names or any(map(EVAL_FILE.fullmatch, names)) else None


def load_first_runs() -> typing.Any:
    """The reader of the first experiments. By name, as the command line does: nothing below depends on the audit."""
    return importlib.import_module("bridgekit.audit.first_runs")


# -- keeping one run ----------------------------------------------------------------------------------------


def preserve(
    run: str | Path,
    root: str | Path = ROOT,
    name: str | None = None,
    max_jsonl_mb: float = 1.5,
    max_checkpoint_mb: float = 2.0,
) -> Path:
    """Keep one run; returns its folder. Texts of a larger JSONL, and larger checkpoint files, stay out."""
    run = Path(run)
    own = run.is_dir() and generation_of(run) == "bridgekit"
    record = None if own else load_first_runs().load_run(run, name)
    home = Path(root) if own else Path(root) / FIRST
    folder = home / (name or (run.resolve().name if own else record.name)).replace('"', "").replace("'", "")
    if folder.exists():
        raise ValueError(f"{folder}: already kept; what is preserved is never overwritten (another --name?)")
    home.mkdir(parents=True, exist_ok=True)
    for left_over in home.glob(f".{glob.escape(folder.name)}.*"):  # of a preserve that was killed
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=home) as partial:
        part = Path(partial) / folder.name
        part.mkdir()
        if own:
            _copy_run(run, part, max_jsonl_mb, max_checkpoint_mb)
        else:
            load_first_runs().write_tables(record, part, max_jsonl_mb)
        _write_checksums(run if own else record.folder, part)
        refresh_entry(part)
        os.rename(part, folder)
    return folder


def _copy_run(run: Path, folder: Path, max_jsonl_mb: float, max_checkpoint_mb: float) -> None:
    for path in sorted(found for pattern in SMALL_FILES for found in run.glob(pattern)):
        if path.is_file() and not path.is_symlink():
            kept = folder / path.relative_to(run)
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, kept)
    evaluated = compress_evaluation(run, folder, max_jsonl_mb)
    if not evaluated and not (folder / "metrics.jsonl").is_file():
        raise ValueError(f"{run}: neither evaluations nor losses could be read, so there is nothing to keep")
    for name in CHECKPOINTS:
        bridge = run / "checkpoint" / f"{name}.safetensors"
        if bridge.is_file() and len(data := halve_checkpoint(bridge.read_bytes())) <= max_checkpoint_mb * 1e6:
            (folder / "checkpoint").mkdir(exist_ok=True)
            (folder / "checkpoint" / bridge.name).write_bytes(data)


def compress_evaluation(run: Path, folder: Path, max_mb: float, without_texts: bool = True) -> bool:
    """Keep the final evaluation as `.jsonl.gz`. Above the limit: without texts but the bridged answer's, or not."""
    finals = [path for path in sorted(run.glob("eval_samples_step_final.jsonl*")) if EVAL_FILE.fullmatch(path.name)]
    if not finals or finals[0].is_symlink():
        return False
    kept = folder / "eval_samples_step_final.jsonl.gz"
    with (gzip.open if finals[0].suffix == ".gz" else open)(finals[0], "rb") as source:
        write_gzip(kept, source)
    if kept.stat().st_size <= max_mb * 1e6:
        return True
    kept.unlink()
    if without_texts:
        stays = ("bridged_full",)  # the value that an answer names is read from it
        rows = load_jsonl(finals[0])
        write_jsonl(kept, ({k: v for k, v in r.items() if k in stays or not k.endswith("_full")} for r in rows))
    return without_texts


def halve_checkpoint(data: bytes) -> bytes:
    """A safetensors file with its float32 tensors in half precision: enough to look inside a bridge."""
    import numpy as np
    import safetensors.numpy

    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__", {}) | {"precision": "float16"}
    tensors = {k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in safetensors.numpy.load(data).items()}
    return safetensors.numpy.save(tensors, metadata)


def _write_checksums(run: Path, folder: Path) -> None:
    """sha256 of every original file and of every file kept, so that both can be told from later changes."""
    inside = run.resolve()
    sums = {}
    for name, place in (("original", run), ("kept", folder)):
        files = [p for p in sorted(place.rglob("*")) if p.is_file()]
        files = [p for p in files if name == "kept" or p.resolve().is_relative_to(inside)]
        sums[name] = {p.relative_to(place).as_posix(): hash_file(p) for p in files}
    (folder / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")


def changed_files(folder: Path) -> list[str]:
    """Kept files whose bytes are no longer those of the checksums, or that are gone."""
    kept = load_json(folder / "checksums.json").get("kept", {})
    return [n for n, digest in kept.items() if not (folder / n).is_file() or hash_file(folder / n) != digest]


def write_gzip(path: Path, data: bytes | typing.BinaryIO) -> None:
    """Write bytes or a binary file compressed; the same data gives the same bytes."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as file:
        file.write(data) if isinstance(data, bytes) else shutil.copyfileobj(data, file, 1 << 20)


# -- the manifest -------------------------------------------------------------------------------------------


def refresh_entry(folder: Path) -> Path:
    """The manifest entry of a kept run, its generated parts recomputed."""
    own = generation_of(folder) == "bridgekit"
    return write_entry(folder, describe_run(folder) if own else load_first_runs().describe_run(folder))


def write_manifest(root: str | Path, blocks: dict[str, str] | None = None) -> Path:
    """Bring every entry and the README of `root` up to date; `blocks` are further generated blocks."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict] = {}
    for folder in find_runs(root):
        entry = refresh_entry(folder).read_text(encoding="utf-8")
        place = folder.relative_to(root).as_posix()
        name = re.sub(r"_seed\d+$", "", place)
        group = groups.setdefault(name, {"name": name.split("/")[-1], "first": FIRST in place, "prose": {}, "runs": []})
        prose = {part: _find_prose(entry, part) for part in ("Why it was run", "Publishability")}
        group["prose"] |= {(part, text): None for part, text in prose.items() if text not in ("", UNWRITTEN)}
        shares = dict(re.findall(r"^\| ([\w ,-]+) \| \d+/\d+ \| ([\d.]+) ", entry, re.MULTILINE))
        group["runs"].append({"name": folder.name, "place": place, "shares": shares})
    path = root / README
    text = path.read_text(encoding="utf-8") if path.is_file() else render("preserved.md.j2")
    listed = sorted(groups.values(), key=lambda group: group["first"])
    for name, body in {"runs": render("preserved_runs.md.j2", groups=listed), **(blocks or {})}.items():
        text = replace_block(text, name, body)
    if "<!-- generated: contents -->" in text:
        headings = re.findall(r"^(##+) (.+)$", text, re.MULTILINE)
        lines = [f"{'  ' * (len(level) - 2)}- [{title}](#{_anchor(title)})" for level, title in headings]
        text = replace_block(text, "contents", "\n".join(lines))
    write_text_atomic(path, text)
    return path


def _find_prose(entry: str, part: str) -> str:
    found = re.search(rf"\*\*{part}\.\*\*\s*(.*?)\s*(?=\n\*\*|\n<!--|\Z)", entry, re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


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
    if args.study:
        from bridgekit.results.archive import keep_study

        path = keep_study(args.runs_dir, args.study, Path(args.root) / "studies", args.add)
        print(f"kept {path} ({path.stat().st_size / 1e6:.2f} MB)")
        return 0
    folders = [folder for run in args.runs for folder in find_runs(run) or [Path(run)]]
    if args.name and len(folders) > 1:
        raise ValueError(f"--name is for one run; {args.runs[0]} holds {len(folders)}")
    failed = 0
    for folder in folders:
        try:
            kept = preserve(folder, args.root, args.name, args.max_jsonl_mb, args.max_checkpoint_mb)
            print(f"kept {kept}; now fill in the why and the publishability in {kept / ENTRY}")
        except (ValueError, OSError) as error:
            failed = 2
            print(f"error: {error}", file=sys.stderr)
    print(f"manifest: {write_manifest(args.root)}")
    return failed
