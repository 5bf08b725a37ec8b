"""GSM8K: rows with `question` and `answer`, which ends in `#### n`; an answer is right if its number is the gold one.

bridgekit fetch gsm8k --out data/gsm8k
task.task=gsm8k task.data=data/gsm8k
"""

from pathlib import Path

from bridgekit import config as configuration
from bridgekit.tasks import Example, from_jsonl
from bridgekit.tasks.real import real_task


def load(path: Path, split: str, task: configuration.Task) -> list[Example]:
    return from_jsonl(path, split, name="gsm8k")


TASK = real_task("gsm8k", load)
