"""GSM8K: real questions from a folder with train.jsonl and test.jsonl (keys `question` and `answer`).

    bridgekit fetch gsm8k --out data/gsm8k        # once, where there is a network
    bridgekit fetch gsm8k --out data/gsm8k --origin DIR      # the same data set, where it lies already
    task.task=gsm8k task.data=data/gsm8k

Compute nodes often have no network, and a folder has a hash: so a run names files, not a data set's name. Validation is
cut from the training file, so that the test file is read at the end alone. Solved training questions may stand in front
of every question (`task.n_shots`), the same in all splits; no question is in two splits.
"""

import argparse
import json
import random
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from bridgekit.config import Config, ConfigError
from bridgekit.tasks import CUE, Example, Task, from_jsonl, give_donors

HUB = ("openai/gsm8k", "main")  # data set and configuration
SPLITS = ("train", "test")


def make_examples(config: Config, lexicon_seed: int | None, split: str, share: float | None = None) -> list[Example]:
    """The questions of a split, in an order that `task.data_seed` decides; those of the test file in its own."""
    task, folder = config.task, check_data(config)
    train, test = (from_jsonl(folder / f"{name}.jsonl", name, name="gsm8k") for name in SPLITS)
    tested = {e.question for e in test}
    rest = list({e.question: e for e in train if e.question not in tested}.values())
    random.Random(f"gsm8k {task.data_seed}").shuffle(rest)
    shown, rest = rest[: task.n_shots], rest[task.n_shots :]
    examples = {"test": test, "val": rest, "train": rest[task.n_val :]}[split]
    wanted = getattr(task, f"n_{split}")
    if wanted > len(examples):
        taken = {"test": "", "val": f", once {task.n_shots} shown are taken",
                 "train": f", once {task.n_shots} shown and {task.n_val} for validation are taken"}  # fmt: skip
        message = f"{wanted} asked for, {task.data} has {len(examples)}{taken[split]}: ask for fewer"
        raise ConfigError(f"task.n_{split}: {message}")
    shots = "".join(f"Question: {e.question}{CUE}{e.solution}\n\n" for e in shown)
    examples = [replace(e, split=split, shots=shots) for e in examples[:wanted]]
    return give_donors(examples) if split == "test" else examples


def check_data(config: Config) -> Path:
    """The folder with both files."""
    folder = Path(config.task.data)
    for name in SPLITS:
        if not (folder / f"{name}.jsonl").is_file():
            raise ConfigError(f"task.data: no {name}.jsonl in '{folder}': `bridgekit fetch gsm8k --out DIR` makes both")
    return folder


TASK = Task(name="gsm8k", examples=make_examples, check=check_data)


def fetch(name: str, out: str | Path, origin: str = "") -> Path:
    """The folder with train.jsonl, test.jsonl and where they came from; it appears whole or not at all."""
    import datasets

    out = Path(out)
    if out.exists():
        raise FileExistsError(f"--out: '{out}' exists; choose another folder, or move it away")
    place, part = (origin, None) if origin else HUB
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
        sizes = {split: len(from_jsonl(folder / f"{split}.jsonl", split, name=name)) for split in SPLITS}
        record = {"task": name, "origin": place, "questions": sizes, "datasets": datasets.__version__}
        (folder / "origin.json").write_text(json.dumps(record, indent=1) + "\n")
        shutil.move(folder, out)
    return out


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bridgekit fetch", description="Bring real questions into a folder.")
    parser.add_argument("task", choices=["gsm8k"])
    parser.add_argument("--out", required=True, help="the folder for train.jsonl and test.jsonl")
    parser.add_argument("--origin", default="", help="another data set of the same columns, or a local folder of one")
    args = parser.parse_args(argv)
    folder = fetch(args.task, args.out, args.origin)
    sizes = json.loads((folder / "origin.json").read_text())["questions"]
    print(f"{folder}: {sizes['train']:,} and {sizes['test']:,} questions; now task.task={args.task} task.data={folder}")
    return 0
