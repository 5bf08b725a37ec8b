"""Bring real questions into a folder that runs read: needs the network once, and no run needs it afterwards.

    bridgekit fetch gsm8k --out data/gsm8k
    bridgekit fetch gsm8k --out data/gsm8k --origin DIR      # the same data set, where it lies already

Compute nodes often have no network, and a folder has a hash: so a run names files, not a data set's name.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from bridgekit.config import ConfigError
from bridgekit.tasks import gsm8k

ORIGINS = {"gsm8k": ("openai/gsm8k", "main")}  # data set and configuration on the hub
SPLITS = ("train", "test")


def fetch(name: str, out: str | Path, origin: str = "") -> Path:
    """The folder with train.jsonl, test.jsonl and where they came from; it appears whole or not at all."""
    import datasets

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"--out: '{out}' exists; choose another folder, or move it away")
    place, part = (origin, None) if origin else ORIGINS[name]
    try:
        loaded = datasets.load_dataset(place, part)
    except Exception as error:  # the library's own, the network's, the hub's
        raise ConfigError(f"--origin: cannot load '{place}': {str(error).strip().splitlines()[0]}") from None
    if missing := [split for split in SPLITS if split not in loaded]:
        raise ConfigError(f"--origin: '{place}' has no split '{missing[0]}' (there are: {', '.join(loaded)})")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial:
        folder = Path(partial) / out.name
        folder.mkdir()
        for split in SPLITS:
            loaded[split].to_json(folder / f"{split}.jsonl", force_ascii=False)
        sizes = {split: len(gsm8k.read_questions(folder / f"{split}.jsonl")) for split in SPLITS}
        record = {"task": name, "origin": place, "questions": sizes, "datasets": datasets.__version__}
        (folder / "origin.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.move(folder, out)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bridgekit fetch", description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(ORIGINS))
    parser.add_argument("--out", required=True, help="the folder for train.jsonl and test.jsonl")
    parser.add_argument("--origin", default="", help="another data set of the same columns, or a local folder of one")
    args = parser.parse_args(argv)
    folder = fetch(args.task, args.out, args.origin)
    sizes = json.loads((folder / "origin.json").read_text())["questions"]
    print(f"{folder}: {sizes['train']:,} and {sizes['test']:,} questions; now task.task={args.task} task.data={folder}")
    return 0
