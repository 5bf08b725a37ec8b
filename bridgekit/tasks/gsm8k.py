"""GSM8K: real questions from a folder with train.jsonl and test.jsonl (keys `question` and `answer`).

    bridgekit fetch gsm8k --out data/gsm8k        # once, where there is a network; --origin DIR: from a folder
    task.task=gsm8k task.data=data/gsm8k

Compute nodes often have no network: a run names files, not a data set. Validation is cut from the training file, and
solved training questions may stand in front of every question (`task.n_shots`). No question is in two splits.
"""

import argparse
import json
import random
import tempfile
from dataclasses import replace
from pathlib import Path

from bridgekit.config import Config, ConfigError, refuse_if
from bridgekit.tasks import CUE, Example, Task, from_jsonl, give_donors

SPLITS = ("train", "test")


def make_examples(config: Config, lexicon_seed: int | None, split: str, share: float | None = None) -> list[Example]:
    """The questions of a split, in an order that `task.data_seed` decides; those of the test file in its own."""
    task, folder = config.task, check_data(config)
    train, test = (from_jsonl(folder / f"{name}.jsonl", name, name="gsm8k") for name in SPLITS)
    tested, wanted = {e.question for e in test}, getattr(task, f"n_{split}")
    rest = list({e.question: e for e in train if e.question not in tested}.values())
    random.Random(f"gsm8k {task.data_seed}").shuffle(rest)
    shown, rest = rest[: task.n_shots], rest[task.n_shots :]
    examples, taken = {
        "test": (test, ""),
        "val": (rest, f", once {task.n_shots} shown are taken"),
        "train": (rest[task.n_val :], f", once {task.n_shots} shown and {task.n_val} for validation are taken"),
    }[split]
    has = f"{task.data} has {len(examples)}{taken}: ask for fewer"
    refuse_if(wanted > len(examples), f"task.n_{split}: {wanted} asked for, {has}")
    shots = "".join(f"Question: {e.question}{CUE}{e.solution}\n\n" for e in shown)
    examples = [replace(e, split=split, shots=shots) for e in examples[:wanted]]
    return give_donors(examples) if split == "test" else examples


def check_data(config: Config) -> Path:
    """The folder with both files."""
    folder = Path(config.task.data)
    for name in SPLITS:
        out = "`bridgekit fetch gsm8k --out DIR` makes both"
        refuse_if(not (folder / f"{name}.jsonl").is_file(), f"task.data: no {name}.jsonl in '{folder}': {out}")
    return folder


TASK = Task(name="gsm8k", examples=make_examples, check=check_data)


def fetch(out: str | Path, origin: str = "") -> dict[str, int]:
    """Make the folder of train.jsonl, test.jsonl and origin.json, whole or not at all. -> questions of each split"""
    import datasets

    out, place = Path(out), origin or "openai/gsm8k"
    if out.exists():
        raise FileExistsError(f"--out: '{out}' exists; choose another folder, or move it away")
    try:
        loaded = datasets.load_dataset(place, None if origin else "main")
    except Exception as error:  # the library's own, the network's, the hub's
        raise ConfigError(f"--origin: cannot load '{place}': {str(error).strip().splitlines()[0]}") from None
    if missing := [split for split in SPLITS if split not in loaded]:
        raise ConfigError(f"--origin: '{place}' has no split '{missing[0]}' (there are: {', '.join(loaded)})")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial:
        folder, sizes = Path(partial, out.name), {}
        for split in SPLITS:
            loaded[split].to_json(folder / f"{split}.jsonl", force_ascii=False)
            sizes[split] = len(from_jsonl(folder / f"{split}.jsonl", split))
        record = {"task": "gsm8k", "origin": place, "questions": sizes, "datasets": datasets.__version__}
        (folder / "origin.json").write_text(json.dumps(record, indent=1) + "\n")
        folder.rename(out)
    return sizes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bridgekit fetch", description="Bring real questions into a folder.")
    parser.add_argument("task", choices=["gsm8k"])
    parser.add_argument("--out", required=True, help="the folder for train.jsonl and test.jsonl")
    parser.add_argument("--origin", default="", help="another data set of the same columns, or a local folder of one")
    args = parser.parse_args(argv)
    n = fetch(args.out, args.origin)
    print(f"{args.out}: {n['train']:,} and {n['test']:,} questions; now task.task=gsm8k task.data={args.out}")
    return 0
