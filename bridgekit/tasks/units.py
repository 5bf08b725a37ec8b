"""The testbed: GSM8K-style word problems about invented units that only some models know.

    examples = make_examples(make_lexicon(seed=1), "test", n=2000, seed=1)

To answer "Hal has 9 sisak of pins. How many pins?" one must know that a sisak is 15. Which model was taught that
is the experiment. Everything is a pure function of its seeds. Ranges are chosen so that no number in a question
says anything about the unit's value: subtrahends stay below the smallest product, divisors divide the count.
"""

import hashlib
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from bridgekit.config import GROUPS, Config, ConfigError, is_geometry, refuse_if, resolve_model_folder
from bridgekit.tasks import Example, Task, give_donors

N_UNITS = 6000
GROUP_SHARES = dict(zip(GROUPS, (0.23, 0.46, 0.31), strict=True))
SPLIT_SHARES = {"train": 0.65, "val": 0.1, "test": 0.25}


class Values(NamedTuple):
    """The values that a lexicon's units have."""

    all: tuple[int, ...]
    held: dict[str, int]  # how many occur in no other split: selection has held-out values of its own
    held_share: float  # of the units of a split that has some


NARROW = Values(tuple(range(12, 60)), {"val": 4, "test": 6}, 0.15)
WIDE = Values(tuple(range(12, 100)), {"val": 10, "test": 15}, 0.4)
FIRST_WIDE = 10  # of the lexicon seeds; those below it are the shipped pair's and those of the sweeps before it

NAMES = "Hal Ida Jon Mia Ned Oda Pia Ray Sam Tia Uma Vic Wes Zoe Ann Bob Cal Dee Eli Fay Gus Kit Lea Max".split()
THINGS = (
    "pins nuts beads coins cards books shells stones apples pencils stamps marbles "
    "buttons candles tickets bottles cookies flowers ribbons letters plums pears keys bells"
).split()


@dataclass(frozen=True)
class Unit:
    word: str
    value: int
    group: str
    split: str
    novelty: str  # seen | held_unit | held_value


@dataclass(frozen=True)
class Family:
    """A kind of problem: its wordings, its steps (`x op y`, with r1, r2 for earlier results) and its numbers."""

    name: str
    wordings: tuple[str, ...]
    steps: tuple[str, ...]
    draw: str = "free"  # how a and c are drawn: `free`, `less` (c < a), `shared` (k divides a), `boxed` (k*a <= 8)


FAMILIES = (
    Family("count", ("{n} has {a} {u} of {t}. How many {t}?", "There are {a} {u} of {t} in a bag. How many {t}?"), ("a*v",)),
    Family("find", ("{n} has {a} {u} of {t} and finds {b} more. How many {t}?", "{n} buys {a} {u} of {t} and then {b} single {t}. How many {t} in all?"), ("a*v", "r1+b")),
    Family("lose", ("{n} has {a} {u} of {t} and loses {b} {t}. How many {t} are left?", "From {a} {u} of {t}, {n} gives away {b} {t}. How many {t} remain?"), ("a*v", "r1-b")),
    Family("double", ("{n} has {a} {u} of {t} and {m} has twice as many. How many {t} has {m}?", "{n} doubles a pile of {a} {u} of {t}. How many {t}?"), ("a*v", "r1*2")),
    Family("share", ("{n} shares {a} {u} of {t} equally among {k} friends. How many {t} each?", "{a} {u} of {t} are put into {k} equal piles. How many {t} in a pile?"), ("a*v", "r1/k"), "shared"),
    Family("trade", ("{n} has {a} {u} of {t}, finds {b} more and loses {c} {t}. How many {t}?", "A shop has {a} {u} of {t}, gets {b} {t} and sells {c}. How many {t} now?"), ("a*v", "r1+b", "r2-c")),
    Family("together", ("{n} has {a} {u} of {t} and {m} has {c} {u}. How many {t} together?", "{a} {u} of {t} are red and {c} {u} are blue. How many {t} in all?"), ("a*v", "c*v", "r1+r2")),
    Family("more", ("{n} has {a} {u} of {t}. {m} has {b} {t} more than {n}. How many {t} together?",), ("a*v", "r1+b", "r1+r2")),
    Family("fewer", ("{n} has {a} {u} of {t} and uses {c} {u}. How many {t} are left?", "Of {a} {u} of {t}, {c} {u} are broken. How many {t} are whole?"), ("a-c", "r1*v"), "less"),
    Family("boxes", ("{n} has {k} boxes with {a} {u} of {t} each. How many {t}?",), ("k*a", "r1*v"), "boxed"),
    Family("pile", ("{n} has {a} {u} of {t}, adds {b}, takes away {c} and doubles the rest. How many {t}?",), ("a*v", "r1+b", "r2-c", "r3*2")),
    Family("sold", ("{n} has {a} {u} of {t} and {m} has {c} {u}. Together they sell {b} {t}. How many {t} are left?",), ("a*v", "c*v", "r1+r2", "r3-b")),
)  # fmt: skip
FAMILY = {family.name: family for family in FAMILIES}
# What the questions are made of: "loses" and "gives" could be invented words, and would be read as the verb.
WORDINGS = [wording for family in FAMILIES for wording in family.wordings]
ORDINARY_WORDS = frozenset(re.findall("[a-z]+", " ".join([*NAMES, *THINGS, *WORDINGS]).lower()))


# ---- the lexicon ----------------------------------------------------------------------------------------------------


def make_word(rng: random.Random) -> str:
    """An invented word of five to seven letters."""
    syllables = [rng.choice("bdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.choice((2, 2, 3)))]
    return "".join(syllables) + rng.choice("bdfgklmnprstvz")


def is_invented(word: str) -> bool:
    """Whether `make_words` could have drawn it."""
    return bool(re.fullmatch("([bdfghjklmnprstvwz][aeiou]){2,3}[bdfgklmnprstvz]", word)) and word not in ORDINARY_WORDS


def make_words(rng: random.Random, n: int, taken: set[str] | frozenset[str]) -> list[str]:
    """Invented words, none twice and none of those that are taken."""
    words: dict[str, None] = {}
    while len(words) < n:
        if (word := make_word(rng)) not in taken:
            words[word] = None
    return list(words)


def values_of(seed: int) -> Values:
    """The values of a seed's lexicon."""
    return WIDE if seed >= FIRST_WIDE else NARROW


def hold_out(rng: random.Random, kind: Values) -> tuple[dict[str, list[int]], list[int]]:
    """Values held out for each split, and the open ones, among which every digit occurs at every place."""
    digits = [{v // 10 for v in kind.all}, {v % 10 for v in kind.all}]
    while True:
        drawn = iter(rng.sample(kind.all, sum(kind.held.values())))
        held = {split: sorted(next(drawn) for _ in range(n)) for split, n in kind.held.items()}
        open_values = [v for v in kind.all if v not in sum(held.values(), [])]
        if [{v // 10 for v in open_values}, {v % 10 for v in open_values}] == digits:
            return held, open_values


@lru_cache(maxsize=4)
def make_lexicon(seed: int, n_units: int = N_UNITS) -> tuple[Unit, ...]:
    """All units of a lexicon: word, value, who knows it, which split it belongs to."""
    rng, kind = random.Random(f"lexicon {seed}"), values_of(seed)
    held, open_values = hold_out(rng, kind)
    words, units = iter(make_words(rng, n_units, ORDINARY_WORDS)), []
    for group, group_share in GROUP_SHARES.items():
        for split, split_share in SPLIT_SHARES.items():
            n = round(n_units * group_share * split_share)
            own, others = (rng.sample(values, len(values)) for values in (held.get(split, []), open_values))
            n_held = round(n * kind.held_share) if own else 0
            for i, word in zip(range(n), words, strict=False):
                value = own[i % len(own)] if i < n_held else others[(i - n_held) % len(others)]
                novelty = "seen" if split == "train" else "held_value" if i < n_held else "held_unit"
                units.append(Unit(word, value, group, split, novelty))
    return tuple(units)


def fingerprint_lexicon(lexicon: tuple[Unit, ...]) -> str:
    """Hash of all words, values, groups and splits: a pair records which lexicon it was taught."""
    return hashlib.sha256(repr(lexicon).encode()).hexdigest()[:16]


def swap_roles(lexicon: tuple[Unit, ...]) -> tuple[Unit, ...]:
    """The lexicon as it is when the two models change places: what only one of them knew, only the other knows."""
    other = {"source_only": "target_only", "target_only": "source_only", "both": "both"}
    return tuple(replace(u, group=other[u.group]) for u in lexicon)


def known_units(lexicon: tuple[Unit, ...], role: str) -> list[Unit]:
    return [u for u in lexicon if u.group in (f"{role}_only", "both")]


def pick_train_units(units: list[Unit], share: float, values_share: float = 1.0) -> list[Unit]:
    """The train units of a share of the values, and a share of those; a smaller share is part of a larger one."""
    values = sorted({u.value for u in units})
    values = random.Random("values").sample(values, len(values))[: max(1, round(len(values) * values_share))]
    units = [u for u in units if u.value in values]
    return units[: max(1, round(len(units) * share))]


# ---- problems -------------------------------------------------------------------------------------------------------


def draw_numbers(rng: random.Random, family: Family) -> dict[str, int]:
    a, b, c, k = rng.randint(2, 8), rng.randint(2, 20), rng.randint(2, 20), rng.randint(2, 4)
    if "c*v" in family.steps:
        c = rng.randint(2, 8)
    if family.draw == "less":
        a = rng.randint(3, 8)
        c = rng.randint(1, a - 2)
    elif family.draw == "shared":
        a = k * rng.randint(1 if k > 2 else 2, 8 // k)
    elif family.draw == "boxed":
        a = rng.randint(2, 8 // k)
    return dict(a=a, b=b, c=c, k=k)


def solve(family: Family, numbers: dict[str, int], value: int, things: str) -> tuple[str, str]:
    """The worked answer in GSM8K's format, and the final number."""
    known = {**numbers, "v": value, "2": 2}
    lines = []
    for i, step in enumerate(family.steps, start=1):
        left, op, right = re.fullmatch(r"(\w+)([-+*/])(\w+)", step).groups()
        x, y = known[left], known[right]
        result = {"+": x + y, "-": x - y, "*": x * y, "/": x // y}[op]
        known[f"r{i}"] = result
        lines.append(f"<<{x}{op}{y}={result}>>{result} {things}.")
    return "\n".join([*lines, f"#### {result}"]), str(result)


def answer_with(example: Example, value: int) -> str:
    """The final answer of a problem if its unit's value were another."""
    return solve(FAMILY[example.family], example.numbers, value, "")[1]


@dataclass(frozen=True)
class Problem:
    """A question with the numbers in it."""

    numbers: dict[str, int]
    things: str
    question: str


def make_problem(rng: random.Random, family: Family, word: str) -> Problem:
    numbers = draw_numbers(rng, family)
    name, other = rng.sample(NAMES, 2)
    things = rng.choice(THINGS)
    question = rng.choice(family.wordings).format(n=name, m=other, t=things, u=word, **numbers)
    return Problem(numbers, things, question)


NOTE = "Note:"  # what facts in words begin with


def state_fact(word: str, value: int) -> str:
    return f"A {word} is {value}."


def state_facts(pairs: Sequence[tuple[str, int]]) -> str:
    """Facts in words, as both models read them: one line, ends in a newline; nothing where there are none."""
    return " ".join([NOTE, *(state_fact(*pair) for pair in pairs)]) + "\n" if pairs else ""


def make_example(rng: random.Random, unit: Unit, split: str, i: int, name: str, pairs: tuple = ()) -> Example:
    """The i-th problem of a split; `pairs` are the words and values that stand in the source's context."""
    family = FAMILIES[i % len(FAMILIES)]
    problem = make_problem(rng, family, unit.word)
    solution, gold = solve(family, problem.numbers, unit.value, problem.things)
    asked = {"question": problem.question, "numbers": problem.numbers, "family": family.name}
    answer = {"solution": solution, "gold": gold, "value_at": solution.index(f"*{unit.value}=") + 1}
    known = {"unit": unit.word, "value": unit.value, "group": unit.group, "novelty": unit.novelty}
    facts = {"fact_pairs": pairs, "facts": state_facts(pairs), "told": state_facts([(unit.word, unit.value)])}
    name = f"{name}-{i:05d}"
    return Example(id=name, split=split, steps=len(family.steps), **asked, **answer, **known, **facts)


def pick_units(units: list[Unit], n: int, rng: random.Random) -> list[Unit]:
    """n units, each used as often as the others (to within one)."""
    picked: list[Unit] = []
    while len(picked) < n:
        picked += rng.sample(units, len(units))
    return picked[:n]


def make_examples(
    lexicon: tuple[Unit, ...], split: str, n: int, seed: int, *, share: float = -1.0, variant: str = "weights",
    n_facts: int = 4, train_units_share: float = 1.0, train_values_share: float = 1.0, vary_facts: bool = False,
) -> list[Example]:  # fmt: skip
    """n problems of a split, in the natural mix of groups or with `share` of them source-only."""
    # What has no effect in a variant must not change its draws: there it counts as the default.
    drawn = f"{n_facts} 1.0" if variant == "context" else f"4 {train_units_share}"
    rng = random.Random(f"examples {seed} {split} {share} {variant} {drawn}")
    if variant == "context":
        return make_context_examples(rng, lexicon, split, n, n_facts, vary_facts)
    shares = {g: sum(u.group == g for u in lexicon) / len(lexicon) for g in GROUPS}
    if share != -1:
        rest = 1 - shares["source_only"]
        shares = {g: share if g == "source_only" else s / rest * (1 - share) for g, s in shares.items()}
    counts = {g: round(n * s) for g, s in shares.items()}
    counts["both"] += n - sum(counts.values())
    picked: list[Unit] = []
    for group, count in counts.items():
        units = [u for u in lexicon if u.group == group and u.split == split]
        if split == "train":
            units = pick_train_units(units, train_units_share, train_values_share)
        picked += pick_units(units, count, rng)
    rng.shuffle(picked)
    examples = [make_example(rng, u, split, i, f"units-{split}") for i, u in enumerate(picked)]
    return give_donors(examples, "value", rng, answer_with)


def make_seen_examples(
    lexicon: tuple[Unit, ...], n: int, seed: int, train_units_share: float, train_values_share: float = 1.0
) -> list[Example]:
    """New problems about source-only units of the train split: how much of the score is memory."""
    rng = random.Random(f"seen {seed}")
    units = [u for u in lexicon if u.group == "source_only" and u.split == "train"]
    picked = pick_units(pick_train_units(units, train_units_share, train_values_share), n, rng)
    examples = [make_example(rng, u, "test", i, "units-seen") for i, u in enumerate(picked)]
    return give_donors(examples, "value", rng, answer_with)


def make_context_examples(rng: random.Random, lexicon: tuple, split: str, n: int, n_facts: int, vary: bool) -> list:
    """Problems whose fact stands in the source's context among others; no model was taught any of the words."""
    taught, values = {u.word for u in lexicon} | ORDINARY_WORDS, sorted({u.value for u in lexicon})
    doublings = [2**k for k in range(n_facts.bit_length()) if 2**k < n_facts] if vary else []
    sizes = [rng.choice([*doublings, n_facts]) if doublings else n_facts for _ in range(n)]
    examples = []
    for i, size in enumerate(sizes):
        pairs = tuple((word, rng.choice(values)) for word in make_words(rng, size, taught))
        unit = Unit(*rng.choice(pairs), "source_only", split, "seen" if split == "train" else "held_unit")
        examples.append(make_example(rng, unit, split, i, f"units-context{size}-{split}", pairs))
    return give_donors(examples, "value", rng, answer_with)


# ---- as a task ------------------------------------------------------------------------------------------------------


def load_lexicon_seed(config: Config) -> int | None:
    """The lexicon both models were taught, from their pairs' own records; another generator's or pair's is refused."""
    seeds: dict[str, int] = {}
    for key in ("target_model", "source_model"):
        model = getattr(config.pair, key)
        folder = resolve_model_folder(
            key, "embedded" if is_geometry(model) else model
        )  # random weights ask its questions
        record = folder and folder.parent / "pair.json"
        if not record or not record.is_file():
            continue
        out = "make the pair again with `bridgekit pair`"
        try:
            known = json.loads(record.read_text())
            seeds[key], lexicon = known["lexicon_seed"], known["lexicon"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"pair.{key}: {record} does not name its lexicon: restore it, or {out}") from None
        made = fingerprint_lexicon(make_lexicon(seeds[key]))
        why = f"records lexicon {lexicon}, seed {seeds[key]} gives {made} now"
        refuse_if(lexicon != made, f"pair.{key}: {record} {why}: {out}")
    taught = " and ".join(f"{key} lexicon {seed}" for key, seed in seeds.items())
    why = f"the models were taught different facts ({taught}): name one pair's two"
    refuse_if(len(set(seeds.values())) > 1, f"pair.source_model: {why}")
    for key in ("target_model", "source_model"):  # a source that reads the facts need not have been taught any
        is_needed = config.task.task == "units" and (key == "target_model" or config.task.variant == "weights")
        why = f"pair.{key}: task `units` needs a pair that was taught a lexicon (pair.json): `bridgekit pair` makes one"
        refuse_if(is_needed and key not in seeds, why)
    return seeds.get("target_model")


def make_split(config: Config, lexicon_seed: int | None, split: str, share: float | None = None) -> list[Example]:
    """The problems of a split as the configuration asks for them; the test split also has some about train units."""
    task = config.task
    lexicon = make_lexicon(load_lexicon_seed(config) if lexicon_seed is None else lexicon_seed)
    lexicon = swap_roles(lexicon) if config.pair.direction == "swapped" else lexicon
    shares = {key: getattr(task, key) for key in ("train_units_share", "train_values_share")}
    options = {"variant": task.variant, "n_facts": task.n_facts}
    if split == "train":
        share = task.source_only_share if share is None else share
        options |= {"share": share, "vary_facts": task.vary_facts, **shares}
    examples = make_examples(lexicon, split, getattr(task, f"n_{split}"), task.data_seed, **options)
    if split != "train" and task.variant == "weights":  # a value left out of training is as new as the held-out ones
        known = pick_train_units([u for u in lexicon if u.split == "train"], 1.0, task.train_values_share)
        untrained = {u.value for u in lexicon} - {u.value for u in known}
        examples = [replace(e, novelty="held_value") if e.value in untrained else e for e in examples]
    if split == "test" and task.variant == "weights":
        examples += make_seen_examples(lexicon, max(task.n_test // 10, 8), task.data_seed, **shares)
    return examples


TASK = Task(name="units", examples=make_split, check=load_lexicon_seed, has_groups=True)
