"""Tasks: where the questions come from, which text each model reads, and how an answer is scored. No torch here.

    task = get_task(config)
    examples = task.examples(config, lexicon_seed, "test")
    task.is_right(task.extract(text), examples[0].gold)

A task of your own is a class with `examples(config, split)`, named as `task.task: path/to/file.py:Class`. It may also
define `extract(text)`, `is_complete(text)`, `is_right(extracted, gold)`, `measures(extracted, gold)`, `marker`,
`write(answer)` and `has_groups`; see `from_jsonl`.
"""

import gzip
import importlib
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from bridgekit.config import Config, ConfigError, refuse_if, resolve_model_folder
from bridgekit.keys import INVALID, SOFT_INJECTORS, is_path
from bridgekit.tasks import extend
from bridgekit.tasks.answers import answer_is_complete, extract_answer
from bridgekit.tasks.models import check_hub, check_models

CUE = "\nAnswer:\n"
LONGEST_CUE = 16  # tokens, at most, of what `soft_only` leaves of a prompt
MAX_SOFT_TOKENS = 2048  # the cap when there are as many soft tokens as source tokens


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
    """A prompt in three pieces, so that soft tokens can be put between them: `prefix` (solved questions, facts, or
    nothing), the example's own `question`, and the `cue` after which the model answers."""

    prefix: str
    question: str
    cue: str = CUE
    n_shared: int = 0  # characters of the prefix that all prompts of the task begin with

    @property
    def text(self) -> str:
        return self.prefix + self.question + self.cue


def literal_prompt(example: Example, front: str = "") -> Prompt:
    """The target's own prompt, with nothing in front of its question but the solved ones that all prompts have."""
    return Prompt(example.shots + front, f"Question: {example.question}", n_shared=len(example.shots))


def source_prompt(example: Example) -> Prompt:
    """The source's own prompt: the target's, plus the facts when they are given to it in context."""
    return literal_prompt(example, example.facts)


def told_prompt(example: Example) -> Prompt:
    """The target's prompt with the needed fact in words."""
    return literal_prompt(example, example.told)


def relay_prompt(example: Example, helper_text: str) -> Prompt:
    """The target's prompt with the source's own words in front: the rival that hands over text."""
    return literal_prompt(example, f"Helper: {helper_text.strip().replace(chr(10), ' ')}\n")


@dataclass(frozen=True, kw_only=True)
class Task:
    """A source of questions that scores its own answers."""

    name: str
    examples: Callable[..., list[Example]]  # (config, lexicon_seed, split, share=None): `share` of source-only problems
    check: Callable[[Config], object]  # refuses missing data before anything starts
    has_groups: bool = False  # is it known which model knows what?
    extract: Callable[[str], str] = extract_answer
    is_complete: Callable[[str], bool] = answer_is_complete  # may decoding stop here?
    is_right: Callable[[str, str], bool] = lambda extracted, gold: extracted == gold != INVALID
    measures: Callable[[str, str], dict[str, float]] = lambda extracted, gold: {}  # reported beside it, e.g. F1
    marker: str = "####"  # what a solution has before its final answer; empty: it is nothing but the answer
    write: Callable[[str], str] = "#### {}".format  # an extracted answer as a text that `extract` reads


PARTS = ("has_groups", "extract", "is_complete", "is_right", "measures", "marker", "write")  # a user's may have them
FILES = {"math": "math_problems"}  # tasks that do not stand in the file of their name


def get_task(config: Config, code_dir: str | Path | None = None) -> Task:
    """The configuration's task; one of the user's comes from `code_dir`, a run folder's copy, or from the project."""
    name = config.task.task
    if not is_path(name):
        return importlib.import_module(f"bridgekit.tasks.{FILES.get(name, name)}").TASK  # they take `Example` from here
    made, options = extend.load_checked(config, "task.task", code_dir)
    with extend.blame("task.task", made):
        own = made(**options) if inspect.isclass(made) else made
    parts = {part: getattr(own, part) for part in PARTS if hasattr(own, part)}

    def examples(config: Config, lexicon_seed: int | None, split: str, share: float | None = None) -> list[Example]:
        config = config if share is None else config.with_(source_only_share=share)
        with extend.blame("task.task", made):
            given = list(own.examples(config, split))
        return check_examples(task, config, split, given)

    task = Task(name=name, examples=examples, check=lambda config: check_splits(task, config), **parts)
    return task


def load_examples(config: Config, lexicon_seed: int | None, split: str, share: float | None = None) -> list[Example]:
    """The examples of a split; `share` overrides the training mix's share of source-only problems."""
    return get_task(config).examples(config, lexicon_seed, split, share)


def from_jsonl(
    path: str | Path, split: str, question="question", answer="answer", name="", extract=extract_answer,
    form="`#### 12`", more: Callable[[dict], dict] = lambda row: {},
) -> list[Example]:  # fmt: skip
    """The questions of a file with one JSON object a line, or a JSON list of them; rows that are none are refused.

    `more(row)` gives further fields of an Example, or says in a ValueError what is wrong with the row."""
    path, examples, wrong = Path(path), [], []
    refuse_if(not path.exists(), f"task.data: no file '{path}'")
    for number, row in load_rows(path):
        row = row if isinstance(row, dict) else {}
        texts = [row.get(question), row.get(answer)]
        try:
            if not all(isinstance(text, str) and text.strip() for text in texts):
                has = f" (it has {', '.join(map(str, row))})" if row else ""
                raise ValueError(f"needs texts `{question}` and `{answer}`{has}")
            asked, worked = map(str.strip, texts)
            if (gold := extract(worked)) == INVALID:
                raise ValueError(f"no final answer in its `{answer}`, such as {form}")
            fields = {"question": asked, "solution": worked, "gold": gold} | more(row)
            examples.append(Example(id=f"{name or path.stem}-{split}-{number:05d}", split=split, **fields))
        except ValueError as error:
            wrong.append(f"row {number}: {error}")
    rest = f"; and {len(wrong) - 3:,} more" if len(wrong) > 3 else ""
    refuse_if(wrong, f"task.data: {path}, {'; '.join(wrong[:3])}{rest}: correct them, or take them out")
    refuse_if(not examples, f"task.data: {path} is empty: it needs a JSON object a line, one for each question")
    return examples


def load_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(number, row) of a file with a JSON value a line or one JSON list, or of a folder with a JSON file for each row.

    A row that is no JSON is None."""
    if path.is_dir():
        yield from enumerate((parse_json(file.read_bytes()) for file in sorted(path.rglob("*.json"))), start=1)
        return
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError):
        raise ConfigError(f"task.data: {path} is damaged: restore it") from None
    rows = parse_json(raw) if raw.lstrip()[:1] == b"[" else map(parse_json, filter(bytes.strip, raw.split(b"\n")))
    refuse_if(rows is None, f"task.data: {path} is not one whole JSON list: restore it")
    yield from enumerate(rows, start=1)


def parse_json(raw: bytes) -> object:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def give_donors(examples: list[Example], differs: str = "gold", rng=None, answer_with=None) -> list[Example]:
    """Name each example's donor: the next one of its group that differs, from itself on or from a place `rng` draws.

    `answer_with(example, value)` is the answer that the donor's value would give here. An example whose group has one
    value has no donor, and then no `shuffled` condition.
    """
    groups: dict[str | None, list[Example]] = defaultdict(list)
    for e in examples:
        groups[e.group].append(e)
    place, out = dict.fromkeys(groups, 0), []
    unlike = {group: find_unlike([getattr(o, differs) for o in others]) for group, others in groups.items()}
    for e in examples:
        others, place[e.group] = groups[e.group], place[e.group] + 1
        start = (rng.randrange(len(others)) if rng else place[e.group]) % len(others)
        if getattr(others[start], differs) == getattr(e, differs):
            start = unlike[e.group][start]
        donor = None if start is None else others[start]
        if donor is not None:
            e = replace(e, donor_id=donor.id, donor_gold=answer_with(e, donor.value) if answer_with else None)
        out.append(e)
    return out


def find_unlike(values: list) -> list[int | None]:
    """For each place the next one, round the end, with another value; None where all are equal."""
    found: list[int | None] = [None] * len(values)
    for i in reversed(range(2 * len(values))):  # the second time round every place knows the one behind it
        here, behind = i % len(values), (i + 1) % len(values)
        found[here] = behind if values[behind] != values[here] else found[behind]
    return found


# ---- refused before anything starts ---------------------------------------------------------------------------------


def check_inputs(config: Config) -> None:
    """Refuse missing models, data and files of the user's, before a run folder exists."""
    check_models(config)
    check_hub(config)
    for key in extend.own_objects(config):
        extend.load_checked(config, key)
    get_task(config).check(config)


def check_texts(config: Config) -> None:
    """Refuse questions that do not fit into the target, as far as files tell, or that have no donors."""
    check_donors(config, get_task(config).examples(config, None, "test"))
    if lengths := measure_prompts(config):
        check_positions(config, *lengths)


def check_donors(config: Config, test: list[Example]) -> None:
    """Refuse a test without another question for each, where the `shuffled` condition needs one."""
    lacks = "shuffled" in config.eval.conditions and any(e.donor_id is None for e in test)
    refuse_if(lacks, "task.n_test: too few problems for each to have a donor: more, or no `shuffled` condition")


def check_examples(task: Task, config: Config, split: str, examples: list) -> list[Example]:
    """As many of a user's examples as the configuration asks for, with donors; what a run cannot use is refused."""
    wanted, needs_told = getattr(config.task, f"n_{split}"), "target_told" in config.eval.conditions
    what, n = f"task.task: {task.name}: examples(config, '{split}'):", len(examples)
    refuse_if(n < wanted, f"{what} gives {n} examples, task.n_{split} asks for {wanted}: ask for fewer")
    for e in examples:
        refuse_if(not isinstance(e, Example), f"{what} must give bridgekit.tasks.Example, got {type(e).__name__}")
    examples = [replace(e, split=split) for e in examples[:wanted]]
    refuse_if(len({e.id for e in examples}) < wanted, f"{what} two examples have one id")
    for e in examples:
        answer, of = task.extract(e.solution), f"{what} {e.id}:"
        is_right, out = task.is_right(answer, e.gold), "give it, or leave target_told out of eval.conditions"
        has_it = task.has_groups == (e.group is not None)
        refuse_if(not is_right, f"{of} its solution reads as '{answer}', its gold answer is '{e.gold}'")
        refuse_if(not has_it, f"{of} its group is {e.group!r}, and has_groups is {task.has_groups}")
        refuse_if(needs_told and not e.told, f"{of} has no fact in words (`told`): {out}")
    return examples if any(e.donor_id for e in examples) else give_donors(examples)


def check_splits(task: Task, config: Config) -> None:
    """Refuse a question that is in two splits: its answer would be learned by heart."""
    where: dict[str, str] = {}
    for split in ("train", "val", "test"):
        for e in task.examples(config, None, split):
            first = where.setdefault(e.facts + e.question, split)
            refuse_if(first != split, f"task.task: {task.name}: '{e.question[:60]}' is in {first} and {split}")


def check_positions(config: Config, n_positions: int, longest_prompt: int, longest_source: int) -> None:
    """Refuse more text, soft tokens and answer than the target has positions.

    `longest_prompt` of the target and `longest_source`, which the bridge reads, are tokens without BOS."""
    bridge, new = config.bridge, config.eval.max_new_tokens
    soft = bridge.n_soft_tokens if bridge.injector in SOFT_INJECTORS else 0  # the others take no positions
    if soft == -1:
        soft = min(MAX_SOFT_TOKENS, 1 + longest_source + (new if bridge.source_view == "solution" else 0))
    no_text = {bridge.prompt_mode, bridge.train_prompt_mode} <= {"soft_only", "same"}  # but the cue
    for key, n_soft, text, way_out in (  # the target alone reads its whole prompt, whatever the bridge
        ("eval.max_new_tokens", 0, longest_prompt, "use a shorter prompt or answer"),
        ("bridge.n_soft_tokens", soft, LONGEST_CUE if no_text else longest_prompt, "use fewer soft tokens"),
    ):
        parts, needed = f"{text} prompt tokens and {new} new ones", 1 + n_soft + text + new
        parts = f"{n_soft} soft tokens, " * bool(n_soft) + f"{parts} need {needed} positions"
        refuse_if(needed > n_positions, f"{key}: {parts}; the target has {n_positions}: {way_out}")


def measure_prompts(config: Config) -> tuple[int, int, int] | None:
    """What `check_positions` compares, from files alone; None where a model is not on this disk: training counts."""
    from tokenizers import Tokenizer

    task, keys = get_task(config), ("source_model", "target_model")
    try:
        folders = [resolve_model_folder(key, getattr(config.pair, key)) for key in keys]
        task.check(config)
    except ConfigError:  # a study makes such a pair when it runs
        return None
    if not all(folder and (folder / "tokenizer.json").is_file() for folder in folders):
        return None
    source, target = folders if config.pair.direction == "forward" else folders[::-1]
    n_positions = json.loads((target / "config.json").read_text()).get("max_position_embeddings")
    examples = [e for split in ("val", "test") for e in task.examples(config, None, split)]
    prompts, facts_alone = [source_prompt(e) for e in examples], config.bridge.source_view == "facts"
    longest = []
    for folder, texts in (
        (target, [literal_prompt(e).text for e in examples]),
        (source, [prompt.prefix if facts_alone else prompt.text for prompt in prompts]),
    ):
        encoded = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts, add_special_tokens=False)
        longest.append(max(map(len, encoded)))
    return (n_positions, *longest) if n_positions else None
