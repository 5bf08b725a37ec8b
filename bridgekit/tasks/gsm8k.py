"""GSM8K: real questions from a folder with train.jsonl and test.jsonl (keys `question` and `answer`).

    bridgekit fetch gsm8k --out data/gsm8k        # once, where there is a network
    task.task=gsm8k task.data=data/gsm8k

Validation is cut from the training file, so that the test file is read at the end alone. Solved training questions may
stand in front of every question (`task.n_shots`), the same in all splits; nothing is in two of them.
"""

import random
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from bridgekit.config import ConfigError, Task
from bridgekit.runs import read_jsonl
from bridgekit.tasks.answers import INVALID, extract_answer
from bridgekit.tasks.base import CUE, Example


def make_examples(task: Task, split: str) -> list[Example]:
    """The questions of a split, in an order that `task.data_seed` decides; those of the test file in its own."""
    test = read_questions(Path(task.data) / "test.jsonl")
    shots, rest = _shots_and_rest(task, test)
    if split == "test":
        return give_donors(_cut(task, "n_test", test, shots))
    if split == "val":
        return _cut(task, "n_val", [replace(e, split="val") for e in rest], shots)
    return _cut(task, "n_train", rest[task.n_val :], shots)


def _shots_and_rest(task: Task, test: list[Example]) -> tuple[str, list[Example]]:
    """The solved questions that stand in front of all others, and the training questions behind them."""
    asked = {e.question for e in test}
    train = {e.question: e for e in read_questions(Path(task.data) / "train.jsonl") if e.question not in asked}
    order = list(train.values())
    random.Random(f"gsm8k {task.data_seed}").shuffle(order)
    shots = order[: task.n_shots]
    return "".join(f"Question: {e.question}{CUE}{e.solution}\n\n" for e in shots), order[task.n_shots :]


def _cut(task: Task, key: str, examples: list[Example], shots: str) -> list[Example]:
    wanted = getattr(task, key)
    if wanted > len(examples):
        taken = "" if key == "n_test" else f", once {task.n_shots} shown"
        taken += f" and {task.n_val} for validation are taken" if key == "n_train" else " are taken" if taken else ""
        raise ConfigError(f"task.{key}: {wanted} asked for, {task.data} has {len(examples)}{taken}: ask for fewer")
    return [replace(e, shots=shots) for e in examples[:wanted]]


@lru_cache(maxsize=4)
def _read(path: Path, changed_ns: int) -> tuple[Example, ...]:
    split = path.stem
    examples = []
    for number, row in enumerate(read_jsonl(path), start=1):
        question, answer = row.get("question"), row.get("answer")
        if not isinstance(question, str) or not isinstance(answer, str) or not question.strip():
            raise ConfigError(f"task.data: {path}, row {number}: needs texts `question` and `answer`")
        if (gold := extract_answer(answer)) == INVALID:
            raise ConfigError(f"task.data: {path}, row {number}: its answer ends in no `#### number`")
        examples.append(
            Example(id=f"gsm8k-{split}-{number:05d}", split=split, question=question.strip(), solution=answer.strip(),
                    gold=gold)
        )  # fmt: skip
    return tuple(examples)


def read_questions(path: Path) -> list[Example]:
    """The file's questions; what is no question with an answer is refused with its row."""
    if not path.is_file():
        raise ConfigError(f"task.data: no {path.name} in '{path.parent}': `bridgekit fetch gsm8k --out DIR` makes both")
    return list(_read(path, path.stat().st_mtime_ns))


def give_donors(examples: list[Example]) -> list[Example]:
    """Each question's donor is the next one whose answer differs; what that answer would be *here* nobody knows."""
    out = []
    for i, example in enumerate(examples):
        ring = (*examples[i + 1 :], *examples[:i])
        donor = next((e for e in ring if e.gold != example.gold), None)
        out.append(replace(example, donor_id=donor.id if donor else None))
    return out
