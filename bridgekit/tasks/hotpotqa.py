"""HotpotQA: the source reads the paragraphs, the target the question alone; exact match decides, F1 stands beside it.

    bridgekit fetch hotpotqa --out data/hotpotqa
    task.task=hotpotqa task.data=data/hotpotqa task.variant=context

Rows have `question`, `answer`, `context` and `supporting_facts`, as on the hub or in the official files. `target_told`
is the target with the paragraphs. With `task.variant=weights` nobody else reads them, and rows may be without.
"""

import re
import string
from collections import Counter
from pathlib import Path

from bridgekit import config as configuration
from bridgekit.keys import INVALID
from bridgekit.tasks import Example, from_jsonl
from bridgekit.tasks.real import real_task

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def extract(text: str) -> str:
    """The first line that says something, or `[invalid]`."""
    return next((" ".join(line.split()) for line in text.split("\n") if line.strip()), INVALID)


def is_complete(text: str) -> bool:
    """True once a line that says something has ended: decoding may stop there."""
    return any(line.strip() for line in text.split("\n")[:-1])


def normalize(answer: str) -> list[str]:
    """The words that are compared: the official script's lower case, no punctuation, then no articles."""
    return re.sub(r"\b(a|an|the)\b", " ", answer.lower().translate(_PUNCTUATION)).split()


def is_right(extracted: str, gold: str) -> bool:
    """Exact match."""
    return extracted != INVALID and normalize(extracted) == normalize(gold)


def measures(extracted: str, gold: str) -> dict[str, float]:
    """F1 of the words; a yes, no or noanswer has no part in common with anything else."""
    ours, theirs = normalize(extracted), normalize(gold)
    is_choice = any(" ".join(words) in ("yes", "no", "noanswer") for words in (ours, theirs))
    common = sum((Counter(ours) & Counter(theirs)).values())
    if extracted == INVALID or not common or is_choice and ours != theirs:
        return {"f1": 0.0}
    return {"f1": 2 * common / (len(ours) + len(theirs))}


def join_paragraphs(row: dict, n: int) -> str:
    """`title: text`, a line for each paragraph; the first `n` of them, supporting ones before others; 0: all."""
    context, supporting = row.get("context"), row.get("supporting_facts") or []
    try:
        pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, dict) else context
        texts = {title: " ".join("".join(sentences).split()) for title, sentences in pairs or ()}
        needed = set(supporting["title"] if isinstance(supporting, dict) else (title for title, _ in supporting))
    except (TypeError, ValueError, KeyError):
        raise ValueError("its `context` or `supporting_facts` is not titles with sentences") from None
    chosen = sorted(texts, key=lambda title: title not in needed)[: n or None]
    return "".join(f"{title}: {text}\n" for title, text in texts.items() if title in chosen)


def load(path: Path, split: str, task: configuration.Task) -> list[Example]:
    in_context = task.variant == "context"

    def more(row: dict) -> dict[str, str]:
        answer, paragraphs = " ".join(row["answer"].split()), join_paragraphs(row, task.n_paragraphs)
        if in_context and not paragraphs:
            raise ValueError("no `context`, which the source is to read: take task.variant=weights, or other files")
        facts = paragraphs if in_context else ""
        return {"solution": answer, "gold": answer, "facts": facts, "told": paragraphs}

    return from_jsonl(path, split, name="hotpotqa", extract=extract, form="`Rome`", more=more)


TASK = real_task(
    "hotpotqa", load, extract=extract, is_complete=is_complete, is_right=is_right, measures=measures,
    marker="", write=str,
)  # fmt: skip
