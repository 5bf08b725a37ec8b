"""Tasks: where the questions come from, which text each model reads, and how an answer is scored. No torch here.

    task = get_task(config)
    examples = task.examples(config, lexicon_seed, "test")
    task.is_right(task.extract(text), examples[0].gold)

A prompt is three pieces, so that soft tokens can be put between them: a shared `prefix` (few-shot examples, or
nothing), the example's own `question`, and the `cue` after which the model answers.

A task of your own is a class with `examples(config, split)`, named as `task.task: path/to/file.py:Class`. It may also
define `extract(text)`, `is_complete(text)`, `is_right(extracted, gold)` and `has_groups`:

    class Capitals:
        def examples(self, config, split):
            return from_jsonl(f"data/capitals_{split}.jsonl", split)
"""

import importlib
import inspect
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from bridgekit import extend
from bridgekit.config import OPTIONS, Config, ConfigError, check_models, is_path, to_flat
from bridgekit.runs import load_jsonl
from bridgekit.tasks.answers import INVALID, answer_is_complete, extract_answer

CUE = "\nAnswer:\n"


@dataclass(frozen=True, kw_only=True)
class Example:
    """A question with its answer, and what is known of it."""

    id: str
    split: str  # train | val | test
    question: str
    solution: str  # the gold worked answer, ends in `#### n`
    gold: str
    shots: str = ""  # solved questions in front of it, which all prompts have
    facts: str = ""  # read by the source alone (context variant)
    told: str = ""  # the needed fact in words, for `target_told`
    group: str | None = None  # who knows the unit; None where questions are independent
    unit: str | None = None
    value: int | None = None
    novelty: str | None = None  # of the unit, for a bridge trained on the train split
    family: str | None = None
    steps: int | None = None
    donor_id: str | None = None  # whose source states `shuffled` uses
    donor_gold: str | None = None  # the answer if the donor's fact were true here
    fact_pairs: tuple[tuple[str, int], ...] = ()  # (word, value) of `facts`
    numbers: dict[str, int] = field(default_factory=dict, hash=False)  # of the question, by their names in the family
    value_at: int | None = None  # the character of `solution` where the unit's value is first written


@dataclass(frozen=True)
class Prompt:
    """Text of one prompt in its three pieces."""

    prefix: str
    question: str
    cue: str = CUE

    @property
    def text(self) -> str:
        return self.prefix + self.question + self.cue


def literal_prompt(example: Example) -> Prompt:
    return Prompt(example.shots, f"Question: {example.question}")


def source_prompt(example: Example) -> Prompt:
    """The source's own prompt: the target's, plus the facts when they are given to it in context."""
    return replace(literal_prompt(example), prefix=example.shots + example.facts)


def told_prompt(example: Example) -> Prompt:
    """The target's prompt with the needed fact in words."""
    return replace(literal_prompt(example), prefix=example.shots + example.told)


def relay_prompt(example: Example, helper_text: str) -> Prompt:
    """The target's prompt with the source's own words in front: the rival that hands over text."""
    helper = f"Helper: {helper_text.strip().replace(chr(10), ' ')}\n"
    return replace(literal_prompt(example), prefix=example.shots + helper)


def same_answer(extracted: str, gold: str) -> bool:
    return extracted == gold != INVALID


@dataclass(frozen=True, kw_only=True)
class Task:
    """A source of questions that scores its own answers."""

    name: str
    examples: Callable[..., list[Example]]  # (config, lexicon_seed, split, share=None): `share` of source-only problems
    check: Callable[[Config], object]  # refuses missing data before anything starts
    has_groups: bool = False  # is it known which model knows what?
    extract: Callable[[str], str] = extract_answer
    is_complete: Callable[[str], bool] = answer_is_complete  # may decoding stop here?
    is_right: Callable[[str, str], bool] = same_answer


def get_task(config: Config, code_dir: str | Path | None = None) -> Task:
    """The configuration's task; one of the user's comes from `code_dir`, a run folder's copy, or from the project."""
    name = config.task.task
    if not is_path(name):
        return importlib.import_module(f"bridgekit.tasks.{name}").TASK  # they take `Example` from here
    made, options = extend.load_checked(config, "task.task", code_dir)
    own = made(**options) if inspect.isclass(made) else made
    parts = {p: getattr(own, p) for p in ("has_groups", "extract", "is_complete", "is_right") if hasattr(own, p)}

    def examples(config: Config, lexicon_seed: int | None, split: str, share: float | None = None) -> list[Example]:
        return own_examples(task, own, config if share is None else config.with_(source_only_share=share), split)

    task = Task(name=name, examples=examples, check=lambda config: check_splits(task, config), **parts)
    return task


def load_examples(
    config: Config, lexicon_seed: int | None, split: str, share: float | None = None, code_dir: str | Path | None = None
) -> list[Example]:
    """The examples of a split; `share` overrides the training mix's share of source-only problems."""
    return get_task(config, code_dir).examples(config, lexicon_seed, split, share)


def check_inputs(config: Config) -> None:
    """Refuse missing models, data and files of the user's, before a run folder exists."""
    check_models(config)
    for key, text in to_flat(config).items():
        if key in OPTIONS and is_path(text):
            extend.load_checked(config, key)
    get_task(config).check(config)


# ---- tasks of the user's --------------------------------------------------------------------------------------------


def own_examples(task: Task, own: object, config: Config, split: str) -> list[Example]:
    """As many examples of a split as the configuration asks for, with donors; what a run cannot use is refused."""
    examples, wanted = list(own.examples(config, split)), getattr(config.task, f"n_{split}")

    def refuse(why: str):
        raise ConfigError(f"task.task: {task.name}: examples(config, '{split}'): {why}")

    if len(examples) < wanted:
        refuse(f"gives {len(examples)} examples, task.n_{split} asks for {wanted}: ask for fewer")
    if wrong := [e for e in examples if not isinstance(e, Example)]:
        refuse(f"must give bridgekit.tasks.Example, got {type(wrong[0]).__name__}")
    examples = [replace(e, split=split) for e in examples[:wanted]]
    if len({e.id for e in examples}) < len(examples):
        refuse("two examples have one id")
    for e in examples:
        if not task.is_right(task.extract(e.solution), e.gold):
            refuse(f"{e.id}: its solution reads as '{task.extract(e.solution)}', its gold answer is '{e.gold}'")
        if task.has_groups != (e.group is not None):
            refuse(f"{e.id}: its group is {e.group!r}, and has_groups is {task.has_groups}")
        if not e.told and "target_told" in config.eval.conditions:
            refuse(f"{e.id}: has no fact in words (`told`): give it, or leave target_told out of eval.conditions")
    return examples if any(e.donor_id for e in examples) else give_donors(examples)


def check_splits(task: Task, config: Config) -> None:
    """Refuse a question that is in two splits: its answer would be learned by heart."""
    where: dict[str, str] = {}
    for split in ("train", "val", "test"):
        for e in task.examples(config, None, split):
            if where.setdefault(e.facts + e.question, split) != split:
                raise ConfigError(
                    f"task.task: {task.name}: '{e.question[:60]}' is in {where[e.facts + e.question]} and {split}"
                )


def from_jsonl(
    path: str | Path, split: str, question: str = "question", answer: str = "answer", name: str = "",
    extract: Callable[[str], str] = extract_answer,
) -> list[Example]:  # fmt: skip
    """The questions of a file with one JSON object a line; a row that is none is refused with its number."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"task.data: no file '{path}'")
    return list(_load_rows(path, path.stat().st_mtime_ns, split, question, answer, name or path.stem, extract))


@lru_cache(maxsize=8)
def _load_rows(path: Path, changed_ns: int, split: str, question: str, answer: str, name: str, extract: Callable):
    examples = []
    for number, row in enumerate(load_jsonl(path), start=1):
        texts = row.get(question), row.get(answer)
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f"task.data: {path}, row {number}: needs texts `{question}` and `{answer}`")
        asked, solution = (text.strip() for text in texts)
        if (gold := extract(solution)) == INVALID:
            raise ConfigError(f"task.data: {path}, row {number}: no final answer in its `{answer}`, such as `#### 12`")
        made = Example(id=f"{name}-{split}-{number:05d}", split=split, question=asked, solution=solution, gold=gold)
        examples.append(made)
    return tuple(examples)


def give_donors(
    examples: list[Example], differs: str = "gold", rng: random.Random | None = None,
    answer_with: Callable[[Example, int], str] | None = None,
) -> list[Example]:  # fmt: skip
    """Name each example's donor: the next one of its group that differs, counted from itself or from a drawn place.

    `answer_with(example, value)` is the answer that the donor's value would give here. An example whose group has one
    value has no donor, and then no `shuffled` condition.
    """
    groups: dict[str | None, list[Example]] = defaultdict(list)
    for e in examples:
        groups[e.group].append(e)
    place, out = dict.fromkeys(groups, 0), []
    for e in examples:
        others, place[e.group] = groups[e.group], place[e.group] + 1
        start = rng.randrange(len(others)) if rng else place[e.group]
        ring = (others[(start + i) % len(others)] for i in range(len(others)))
        donor = next((o for o in ring if getattr(o, differs) != getattr(e, differs)), None)
        if donor is not None:
            e = replace(e, donor_id=donor.id, donor_gold=answer_with(e, donor.value) if answer_with else None)
        out.append(e)
    return out
