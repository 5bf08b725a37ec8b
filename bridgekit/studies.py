"""Many runs of one study in one file: what its figures are recomputed from, without what all runs have in common.

    keep_study("runs", "ablation_losses")                    # -> preserved_data/studies/ablation_losses.tar.xz
    folder = open_study("ablation_losses")                   # its run folders, unpacked once into runs/.studies
    bridgekit preserve --study ablation_losses --runs-dir runs

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

from bridgekit.capacity import said_value
from bridgekit.runs import find_eval, read_jsonl, read_status, write_bytes_atomic

ROOT = Path("preserved_data/studies")
FILES = ("config.yaml", "status.json", "provenance.json", "metrics.jsonl", "timing.json")
ALWAYS = (
    "eval_step", "index", "id", "split", "group", "unit", "value", "novelty", "family", "steps", "donor_gold",
    "gold_extracted",
)  # fmt: skip
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 27}]


def keep_study(runs_dir: str | Path, name: str, root: str | Path = ROOT) -> Path:
    """Pack the finished runs `<name>_*` of a runs folder; returns the file. The same runs give the same bytes."""
    folders = [p for p in sorted(Path(runs_dir).glob(f"{name}_*")) if read_status(p).get("state") == "finished"]
    if not folders:
        raise ValueError(f"{runs_dir}: no finished run of a study '{name}' (folders {name}_*)")
    path = Path(root) / f"{name}.tar.xz"
    if path.exists():
        raise ValueError(f"{path}: already kept; what is preserved is never overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for folder in folders:
            for file in FILES:
                if (folder / file).is_file():
                    _add(archive, f"{folder.name}/{file}", (folder / file).read_bytes())
            _add(archive, f"{folder.name}/eval_samples_step_final.jsonl", _lean_answers(folder))
    write_bytes_atomic(path, lzma.compress(packed.getvalue(), filters=FILTERS))
    return path


def _lean_answers(folder: Path) -> bytes:
    lines = []
    for row in read_jsonl(find_eval(folder)):
        kept = {k: v for k, v in row.items() if k in ALWAYS or k.endswith("_extracted")}
        if "family" in row:
            kept["bridged_said"] = said_value(row["bridged_full"], row["family"])
        lines.append(json.dumps(kept, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    archive.addfile(entry, io.BytesIO(data))


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
