"""Many runs of one study in one file: what its figures are recomputed from, without what all runs have in common.

    keep_study("runs", "ablation_losses")                    # -> preserved_data/studies/ablation_losses.tar.xz
    folder = open_study("ablation_losses")                   # its run folders, unpacked once into runs/.studies
    bridgekit preserve --study ablation_losses --runs-dir runs           # again with --add: what has come since

A kept run has its configuration, status, course and, for each test problem, the extracted answer of every condition
and the unit's value that the bridged answer says; texts are left out. The runs of a study repeat each other's problems
and baselines, which a common dictionary stores once: 15 kB a run instead of 300.
"""

import io
import json
import lzma
import shutil
import tarfile
import tempfile
from pathlib import Path

from bridgekit.results.table import said_value
from bridgekit.runs import find_eval, read_jsonl, read_status, write_bytes_atomic

ROOT = Path("preserved_data/studies")
FILES = ("config.yaml", "status.json", "provenance.json", "metrics.jsonl", "timing.json")
ALWAYS = (
    "eval_step", "index", "id", "split", "group", "unit", "value", "novelty", "family", "steps", "donor_gold",
    "gold_extracted", "bridged_said",
)  # fmt: skip
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 27}]


def keep_study(runs_dir: str | Path, name: str, root: str | Path = ROOT, add: bool = False) -> Path:
    """Pack the finished runs `<name>_*` of a runs folder; returns the file. The same runs give the same bytes.

    `add` puts them to those already kept, of which none is replaced.
    """
    folders = [p for p in sorted(Path(runs_dir).glob(f"{name}_*")) if read_status(p).get("state") == "finished"]
    path = Path(root) / f"{name}.tar.xz"
    if path.exists() and not add:
        raise ValueError(f"{path}: already kept; what is preserved is never overwritten (--add puts new runs to it)")
    files = _read_study(path) if path.exists() else {}
    kept = {member.split("/")[0] for member in files}
    new = [p for p in folders if p.name not in kept]
    if not new:
        what = "that is not kept already" if folders else f"(folders {name}_*)"
        raise ValueError(f"{runs_dir}: no finished run of a study '{name}' {what}")
    for folder in new:
        files |= {f"{folder.name}/{f}": (folder / f).read_bytes() for f in FILES if (folder / f).is_file()}
        files[f"{folder.name}/eval_samples_step_final.jsonl"] = _lean_answers(folder)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for member in sorted(files):
            entry = tarfile.TarInfo(member)
            entry.size = len(files[member])
            archive.addfile(entry, io.BytesIO(files[member]))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes_atomic(path, lzma.compress(packed.getvalue(), filters=FILTERS))
    return path


def _read_study(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:xz") as archive:
        return {entry.name: archive.extractfile(entry).read() for entry in archive if entry.isfile()}


def _lean_answers(folder: Path) -> bytes:
    lines = []
    for row in read_jsonl(find_eval(folder)):
        kept = {k: v for k, v in row.items() if k in ALWAYS or k.endswith("_extracted")}
        if "family" in row and "bridged_full" in row:  # not of a run that was packed before, on another machine
            kept["bridged_said"] = said_value(row["bridged_full"], row["family"])
        lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def open_study(name: str, root: str | Path = ROOT, into: str | Path = "runs/.studies") -> Path:
    """The folder with the study's run folders, unpacked where that has not been done yet."""
    path = Path(root) / f"{name}.tar.xz"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no study of this name is kept (bridgekit preserve --study {name})")
    stamp = f"{path.stat().st_size}"
    folder = Path(into) / name
    if (folder / ".whole").is_file() and (folder / ".whole").read_text() == stamp:
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder.parent, ignore_cleanup_errors=True) as partial:
        with tarfile.open(path, "r:xz") as archive:
            archive.extractall(partial, filter="data")
        (Path(partial) / ".whole").write_text(stamp)
        shutil.rmtree(folder, ignore_errors=True)
        Path(partial).rename(folder)
    return folder
