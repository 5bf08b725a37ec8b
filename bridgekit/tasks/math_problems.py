"""MATH: rows with `problem` and `solution`, whose last \\boxed{...} is the answer; math-verify compares answers.

bridgekit fetch math --out data/math
task.task=math task.data=data/math
"""

import re
from collections.abc import Iterator
from pathlib import Path

from bridgekit import config as configuration
from bridgekit.keys import INVALID
from bridgekit.tasks import Example, from_jsonl
from bridgekit.tasks.answers import FOLLOW_UP
from bridgekit.tasks.equivalence import are_equal, is_readable
from bridgekit.tasks.real import real_task

_BOX = re.compile(r"\\(?:boxed|fbox)(?:\s*\{|\s+(?P<word>[^\s{}$\\]+))")  # \boxed{7}, \fbox{7} or \boxed 7
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace opens and closes nothing


def find_boxes(text: str) -> Iterator[tuple[int, str]]:
    """(end, content) of each closed box that holds something, in the order in which they open."""
    for box in _BOX.finditer(text):
        if box["word"]:
            yield box.end(), box["word"].rstrip(".,;")
            continue
        depth = 1
        for brace in _BRACE.finditer(text, box.end()):
            depth += {"{": 1, "}": -1}.get(brace[0], 0)
            if not depth:
                if content := text[box.end() : brace.start()].strip():
                    yield brace.end(), content
                break


def find_answer(text: str) -> str:
    """What stands in the last box before any further question that the model invents, or `[invalid]`."""
    boxes = list(find_boxes(text))
    follow_up = FOLLOW_UP.search(text, boxes[0][0]) if boxes else None
    return [content for end, content in boxes if not follow_up or end <= follow_up.start()][-1] if boxes else INVALID


def extract(text: str) -> str:
    """The answer in the last box; one that math-verify cannot value in its time is `[invalid]`."""
    answer = find_answer(text)
    return answer if answer != INVALID and is_readable(answer) else INVALID


def is_complete(text: str) -> bool:
    """True once a box is closed: decoding may stop there."""
    return any(end < len(text) or text[end - 1] == "}" for end, _ in find_boxes(text))  # `\boxed 1` may become 12


def is_right(extracted: str, gold: str) -> bool:
    return extracted != INVALID and are_equal(gold, extracted)


def load(path: Path, split: str, task: configuration.Task) -> list[Example]:
    form = r"`\boxed{12}`"
    return from_jsonl(path, split, "problem", "solution", name="math", extract=find_answer, form=form)


TASK = real_task(
    "math", load, extract=extract, is_complete=is_complete, is_right=is_right,
    marker=r"\boxed", write=r"\boxed{{{}}}".format,
)  # fmt: skip
