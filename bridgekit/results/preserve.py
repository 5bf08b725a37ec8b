"""Kept runs: what is kept of a run of this package or of all runs of a study, and the manifest of everything kept.

    keep_study("runs", "ablation_losses")  # -> preserved_data/studies/ablation_losses.tar.xz
    write_manifest("preserved_data")       # its README.md, again from the runs' entries

`audit.keep.keep_run` keeps a single run of either kind.

Nothing kept is overwritten, and a folder appears whole, by one rename. An entry is `manifest.md` in the run's folder:
only what stands between its markers is written again.
"""

import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from bridgekit import runs
from bridgekit.results.reports import ENTRY, UNWRITTEN, describe_run, render, write_blocks, write_entry
from bridgekit.results.table import said_value
from bridgekit.runs import FINAL, find_eval, hash_file, load_json, load_jsonl

ROOT, FIRST = Path("preserved_data"), "first_experiments"
EVAL_FILE = re.compile(r"eval_samples_step_(\d+|final)\.jsonl(?:\.gz)?")
FILES = (  # all that the numbers of a run are recomputed from, and how it went
    "config.yaml provenance.json status.json metrics*.jsonl summary.log verdict.json controls.json timing.json "
    "train.log attention.npz code/code.json code/*.py"
).split()
_PROSE = re.compile(r"\*\*(Why it was run|Publishability)\.\*\*\s*(.*?)\s*(?=\n\*\*|\n<!--|\Z)", re.DOTALL)
STUDIES = ROOT / "studies"
STUDY_FILES = ("config.yaml", "status.json", "provenance.json", "metrics.jsonl", "timing.json", "controls.json")
STUDY_COLUMNS = (  # beside the extracted answers
    "eval_step index id split group unit value novelty family steps donor_gold gold_extracted bridged_said"
).split()
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 27}]  # one dictionary for all that the runs repeat
CHECKPOINTS = ("bridged", "constant")  # the diagnostics set the one against the other


def find_runs(root: str | Path) -> list[Path]:
    """Run folders at or below `root`, in order of name; links are not followed, nor hidden folders entered."""
    if not Path(root).is_dir():
        raise ValueError(f"{root}: no such folder; name a run folder or a folder of run folders")
    found = []
    for path, below, _ in os.walk(root):
        if generation_of(Path(path)):
            found.append(Path(path))
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith("."))
    return found


def generation_of(folder: Path) -> str | None:
    """Who wrote a folder: bridgekit, the first experiments' program, or `derived` from those; None: it is no run."""
    names = {path.name for path in folder.iterdir()}
    if names & {"metrics.jsonl", "provenance.json", "status.json"}:
        return "bridgekit"
    if names & {"outcomes.csv.gz", "run.json"}:
        return "derived"
    return "first" if "train.log" in names or any(map(EVAL_FILE.fullmatch, names)) else None


def preserve(run: Path, root: Path, name: str | None, max_jsonl_mb: float, max_checkpoint_mb: float) -> Path:
    """Keep a run of this package; texts of a larger JSONL, and larger checkpoint files, stay out."""

    def fill(folder: Path) -> str:
        for path in sorted(found for pattern in FILES for found in run.glob(pattern)):
            if path.is_file() and not path.is_symlink():
                place = folder / path.relative_to(run)
                place.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, place)
        if not compress_evaluation(run, folder, max_jsonl_mb) and not (folder / "metrics.jsonl").is_file():
            raise ValueError(f"{run}: neither evaluations nor losses could be read, so there is nothing to keep")
        for bridge in (run / "checkpoint" / f"{name}.safetensors" for name in CHECKPOINTS):
            if bridge.is_file() and len(data := halve_checkpoint(bridge)) <= max_checkpoint_mb * 1e6:
                (folder / "checkpoint").mkdir(exist_ok=True)
                (folder / "checkpoint" / bridge.name).write_bytes(data)
        return describe_run(folder)

    return keep_folder(run, root, name or run.resolve().name, fill)


def keep_folder(run: Path, home: Path, name: str, fill: Callable[[Path], str]) -> Path:
    """A new folder below `home`, filled with what is kept of a run, its checksums and the entry that `fill` returns."""
    folder = home / refuse_path(name.replace('"', "").replace("'", ""), "--name")
    if folder.exists():
        raise ValueError(f"{folder}: already kept; what is preserved is never overwritten (another --name?)")
    home.mkdir(parents=True, exist_ok=True)
    for left_over in home.glob(f".{glob.escape(folder.name)}.*"):  # of a preserve that was killed
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=home) as partial:
        part = Path(partial) / folder.name
        part.mkdir()
        entry = fill(part)
        original = load_json(run / "checksums.json").get("original")  # of a run that was preserved before
        made = {name: digest for name, digest in _hash_files(part).items() if name != ENTRY}  # which is written again
        sums = {"original": original or _hash_files(run), "kept": made}
        (part / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n", encoding="utf-8")
        write_entry(part, entry)
        os.rename(part, folder)
    return folder


def copy_kept(run: Path, home: Path, name: str) -> Path:
    """A kept run once more in another place: the same files, the original's checksums, its own words."""

    def fill(folder: Path) -> str:
        for path in run.iterdir():
            if path.is_file() and not path.is_symlink() and path.name != "checksums.json":
                shutil.copyfile(path, folder / path.name)
        entry = folder / ENTRY
        return (
            re.search(r"(?s)<!-- generated: metrics -->\n(.*?)\n<!-- end: metrics -->|\Z", entry.read_text())[1] or ""
        )

    return keep_folder(run, home, name, fill)


def refuse_path(name: str, option: str) -> str:
    """A name that is one visible folder, not a way out of the folder that it is for."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{option}: '{name}' is no folder's name; use letters, digits, '_', '-' and '.'")
    return name


@contextlib.contextmanager
def warned(folder: Path) -> Iterator[None]:
    """A kept run that cannot be read is named; the others go on."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever is damaged, it is this run's
        print(f"warning: {folder}: cannot be read ({' '.join(str(error).split())}); restore it", file=sys.stderr)


def _hash_files(folder: Path) -> dict[str, str]:
    """{name: sha256} of every file that really lies in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    inside = [path for path in files if path.resolve().is_relative_to(folder.resolve())]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in inside}


def compress_evaluation(run: Path, folder: Path, max_mb: float, without_texts: bool = True) -> bool:
    """Keep the final evaluation as `.jsonl.gz`. Above the limit: without texts but the bridged answer's, or not."""
    finals = [path for path in (run / FINAL, run / f"{FINAL}.gz") if path.is_file() and not path.is_symlink()]
    if not finals:
        return False
    data, kept = finals[0].read_bytes(), folder / f"{FINAL}.gz"
    try:
        data = gzip.compress(gzip.decompress(data) if finals[0].suffix == ".gz" else data, mtime=0)
    except (OSError, EOFError, zlib.error):
        raise ValueError(f"{finals[0]}: the compressed file is cut or damaged: restore it") from None
    if len(data) <= max_mb * 1e6:
        kept.write_bytes(data)
    elif without_texts:
        stays = ("bridged_full",)  # the value that an answer names is read from it
        rows = load_jsonl(finals[0])
        runs.write_jsonl(kept, ({k: v for k, v in r.items() if k in stays or not k.endswith("_full")} for r in rows))
    return kept.is_file()


def halve_checkpoint(path: Path) -> bytes:
    """A safetensors file with its float32 tensors in half precision: enough to look inside a bridge."""
    import numpy as np
    from safetensors.numpy import safe_open, save

    with safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        metadata = (file.metadata() or {}) | {"precision": "float16"}
    return save({k: v.astype(np.float16) if v.dtype == np.float32 else v for k, v in tensors.items()}, metadata)


def changed_files(folder: Path) -> list[str]:
    """Kept files whose bytes are no longer those of the checksums, or that are gone."""
    kept = load_json(folder / "checksums.json").get("kept", {})
    return [n for n, digest in kept.items() if not (folder / n).is_file() or hash_file(folder / n) != digest]


def keep_study(runs_dir: str | Path, name: str, root: str | Path = STUDIES, add: bool = False) -> Path:
    """Pack the finished runs `<name>_*` of a runs folder; returns the file. The same runs give the same bytes.

    Of an answer the extracted label is kept, and the unit's value that the bridged one names: 15 kB a run. `add` puts
    new runs to those already kept, of which none is replaced.
    """
    path, files, packed = runs.project_root() / root / f"{refuse_path(name, '--study')}.tar.xz", {}, io.BytesIO()
    if path.exists() and not add:
        raise ValueError(f"{path}: already kept; what is preserved is never overwritten (--add puts new runs to it)")
    kept = sorted(runs.open_study(name, root).iterdir()) if path.exists() else []
    folders = [p for p in sorted(Path(runs_dir).glob(f"{name}_*")) if runs.load_status(p).get("state") == "finished"]
    new = [folder for folder in folders if folder.name not in {old.name for old in kept}]
    if not new:
        what = "that is not kept already" if folders else f"(folders {name}_*)"
        raise ValueError(f"{runs_dir}: no finished run of a study '{name}' {what}")
    for folder in [*kept, *new]:
        files |= {f"{folder.name}/{f}": (folder / f).read_bytes() for f in STUDY_FILES if (folder / f).is_file()}
        files[f"{folder.name}/{FINAL}"] = "".join(map(_lean_line, load_jsonl(find_eval(folder)))).encode()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for member, data in sorted(files.items()):
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.write_bytes_atomic(path, lzma.compress(packed.getvalue(), filters=FILTERS))
    return path


def _lean_line(row: dict) -> str:
    kept = {k: v for k, v in row.items() if k in STUDY_COLUMNS or k.endswith(("_extracted", "_correct"))}
    if "family" in row and "bridged_full" in row:  # not of a run that was packed before, on another machine
        kept["bridged_said"] = said_value(row["bridged_full"], row["family"])
    return json.dumps(kept, ensure_ascii=False) + "\n"


def write_manifest(root: str | Path, blocks: dict[str, str] | None = None) -> Path:
    """Bring this package's entries and the README of `root` up to date; `blocks` are further generated blocks."""
    root, groups = Path(root), {}
    for folder in find_runs(root):
        if generation_of(folder) == "bridgekit":
            with warned(folder):
                write_entry(folder, describe_run(folder))
        if not (folder / ENTRY).is_file():
            continue
        entry, place = (folder / ENTRY).read_text(encoding="utf-8"), folder.relative_to(root).as_posix()
        key = re.sub(r"_seed\d+$", "", place)
        group = {"name": key.split("/")[-1], "first": FIRST in place, "prose": {}, "runs": []}
        group = groups.setdefault(key, group)
        for part, text in _PROSE.findall(entry):
            if text not in ("", UNWRITTEN):
                group["prose"][part, " ".join(text.split())] = None  # once, where all runs of a group say the same
        shares = dict(re.findall(r"^\| ([\w ,-]+) \| \d+/\d+ \| ([\d.]+) ", entry, re.MULTILINE))
        group["runs"].append({"name": folder.name, "place": place, "shares": shares})
    listed = sorted(groups.values(), key=lambda group: group["first"])
    blocks = {"runs": render("preserved_runs.md.j2", groups=listed)} | (blocks or {})
    path = write_blocks(root / "README.md", "preserved.md.j2", blocks)
    headings = re.findall(r"^##(#*) (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for _, title in headings]
    lines = [f"{'  ' * len(level)}- [{title}](#{a})" for (level, title), a in zip(headings, anchors, strict=True)]
    return write_blocks(path, "preserved.md.j2", {"contents": "\n".join(lines)})
