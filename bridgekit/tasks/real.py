"""Real questions: read from a folder with a train and a test file, split so that no question stands in two splits.

    bridgekit fetch math --out data/math          # once, where there is a network; --origin DIR: from a folder
    task.task=math task.data=data/math

Compute nodes often have no network: a run names files, not a data set. They are the data set's own, with a JSON object
a line (train.jsonl, test.jsonl), as one JSON list (train.json, test.json), or folders train/ and test/ with a JSON file
for each row. Validation is cut from the training file, and solved training questions may stand in front of every
question (`task.n_shots`).
"""

import functools
import importlib
import json
import random
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from bridgekit import config as configuration
from bridgekit.config import Config, ConfigError, Parser, refuse_if
from bridgekit.tasks import CUE, FILES, Example, Task, give_donors

SPLITS = ("train", "test")
HUB = {  # {task: (data set, its configuration)}
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default"),
    "hotpotqa": ("hotpotqa/hotpot_qa", "distractor"),
}
Load = Callable[[Path, str, configuration.Task], list[Example]]  # (file, split, the configuration's task section)


def real_task(name: str, load: Load, **parts) -> Task:
    """A task whose files `load` reads; `parts` say how it scores."""
    examples = functools.partial(make_examples, name, functools.lru_cache(maxsize=4)(load_version(load)))
    return Task(name=name, examples=examples, check=lambda config: [examples(config, None, s) for s in SPLITS], **parts)


def load_version(load: Load) -> Callable:
    """`load` of a file as it is now: (file, split, task section, its time and size), which can be remembered."""
    return lambda path, split, task, version: tuple(load(path, split, task))


def make_examples(
    name: str, load: Callable, config: Config, lexicon_seed: int | None, split: str, share: float | None = None
) -> list[Example]:
    """The questions of a split, in an order that `task.data_seed` decides; those of the test file in its own."""
    task, files = config.task, [find_file(config, split) for split in SPLITS]
    stamps = [(f.stat().st_mtime_ns, f.stat().st_size) for f in files]
    train, test = (load(f, s, task, v) for f, s, v in zip(files, SPLITS, stamps, strict=True))
    tested, wanted = {e.question for e in test}, getattr(task, f"n_{split}")
    rest = list({e.question: e for e in train if e.question not in tested}.values())
    random.Random(f"{name} {task.data_seed}").shuffle(rest)
    shown, rest = rest[: task.n_shots], rest[task.n_shots :]
    examples, taken = {
        "test": (list(test), ""),
        "val": (rest, f", once {task.n_shots} shown are taken"),
        "train": (rest[task.n_val :], f", once {task.n_shots} shown and {task.n_val} for validation are taken"),
    }[split]
    has = f"{task.data} has {len(examples)}{taken}: ask for fewer"
    refuse_if(wanted > len(examples), f"task.n_{split}: {wanted} asked for, {has}")
    shots = "".join(f"Question: {e.question}{CUE}{e.solution}\n\n" for e in shown)
    examples = [replace(e, split=split, shots=shots) for e in examples[:wanted]]
    untold = "target_told" in config.eval.conditions and next((e.id for e in examples if not e.told), None)
    refuse_if(untold, f"eval.conditions: 'target_told' needs the fact in words, which {untold} lacks: leave it out")
    return give_donors(examples) if split == "test" else examples


def find_file(config: Config, split: str) -> Path:
    """The file of a split in the folder that the configuration names."""
    task = config.task
    found = [path for end in (".jsonl", ".json", "") if (path := Path(task.data, split + end)).exists()]
    out = f"`bridgekit fetch {task.task} --out DIR` makes both"
    refuse_if(not found, f"task.data: no {split}.jsonl in '{task.data}': {out}")
    return found[0]


def fetch(name: str, out: str | Path, origin: str = "") -> dict[str, int]:
    """Make the folder of train.jsonl, test.jsonl and origin.json, whole or not at all. -> questions of each split

    Where a data set has no test split with answers, its validation split is the test file."""
    import datasets

    datasets.disable_progress_bars()
    out, (place, part) = Path(out), (origin, None) if origin else HUB[name]
    if out.exists():
        raise FileExistsError(f"--out: '{out}' exists; choose another folder, or move it away")
    try:
        loaded = datasets.load_dataset(place, part)
    except Exception as error:  # the library's own, the network's, the hub's
        raise ConfigError(f"--origin: cannot load '{place}': {str(error).strip().splitlines()[0]}") from None
    splits = {"train": "train", "test": "validation" if name == "hotpotqa" and "validation" in loaded else "test"}
    if missing := [split for split in splits.values() if split not in loaded]:
        raise ConfigError(f"--origin: '{place}' has no split '{missing[0]}' (there are: {', '.join(loaded)})")
    load = importlib.import_module(f"bridgekit.tasks.{FILES.get(name, name)}").load
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial:
        folder, sizes = Path(partial, out.name), {}
        for split, theirs in splits.items():
            loaded[theirs].to_json(folder / f"{split}.jsonl", force_ascii=False)
            sizes[split] = len(load(folder / f"{split}.jsonl", split, configuration.Task()))
        record = {"task": name, "origin": place, "questions": sizes, "datasets": datasets.__version__}
        (folder / "origin.json").write_text(json.dumps(record, indent=1) + "\n")
        folder.rename(out)
    return sizes


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="bridgekit fetch", description="Bring real questions into a folder.")
    parser.add_argument("task", choices=list(HUB))
    parser.add_argument("--out", required=True, help="the folder for train.jsonl and test.jsonl")
    parser.add_argument("--origin", default="", help="another data set of the same columns, or a local folder of one")
    args = parser.parse_args(argv)
    n = fetch(args.task, args.out, args.origin)
    print(f"{args.out}: {n['train']:,} and {n['test']:,} questions; now task.task={args.task} task.data={args.out}")
    return 0
