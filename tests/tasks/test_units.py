"""The testbed: nothing leaks between splits, no number gives a value away, every worked answer is right.

python -m pytest tests/tasks/test_units.py
"""

import random
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.config import GROUPS, ConfigError, load_config
from bridgekit.tasks import literal_prompt, load_examples, source_prompt, told_prompt, units
from bridgekit.tasks.answers import extract_answer

SEED = 3
ANSWERS = {  # each family once more, as a formula
    "count": lambda a, b, c, k, v: a * v,
    "find": lambda a, b, c, k, v: a * v + b,
    "lose": lambda a, b, c, k, v: a * v - b,
    "double": lambda a, b, c, k, v: 2 * a * v,
    "share": lambda a, b, c, k, v: a * v / k,
    "trade": lambda a, b, c, k, v: a * v + b - c,
    "together": lambda a, b, c, k, v: (a + c) * v,
    "more": lambda a, b, c, k, v: 2 * a * v + b,
    "fewer": lambda a, b, c, k, v: (a - c) * v,
    "boxes": lambda a, b, c, k, v: k * a * v,
    "pile": lambda a, b, c, k, v: 2 * (a * v + b - c),
    "sold": lambda a, b, c, k, v: (a + c) * v - b,
}


@pytest.fixture(scope="module")
def lexicon():
    return units.make_lexicon(SEED)


@pytest.fixture(scope="module")
def small():
    """A lexicon so small that every unit is drawn several times."""
    return units.make_lexicon(SEED, 600)


@pytest.mark.parametrize("seed, kind", [(SEED, units.NARROW), (21, units.WIDE), (0xFFFF, units.WIDE)])
def test_held_out_values_belong_to_no_unit_a_bridge_trains_on(seed, kind):
    lexicon = units.make_lexicon(seed)
    assert len({u.word for u in lexicon}) == len(lexicon)  # no unit is in two groups or splits
    assert not {u.word for u in lexicon} & units.ORDINARY_WORDS
    held = {s: {u.value for u in lexicon if u.novelty == "held_value" and u.split == s} for s in ("val", "test")}
    assert {s: len(values) for s, values in held.items()} == kind.held
    assert not held["val"] & held["test"]  # what selection has looked at is not what is reported
    for group in GROUPS:  # and the other values are all there to be trained on
        trained = {u.value for u in lexicon if u.group == group and u.split == "train"}
        assert trained == set(kind.all) - held["val"] - held["test"]
    for digit_of in (lambda v: v // 10, lambda v: v % 10):  # a value is new, its digits are not
        assert {digit_of(v) for v in trained} == {digit_of(v) for v in kind.all}


def test_values_are_drawn_again_where_a_digit_would_be_left_out():
    """The first draw holds out every value that begins with 1; no real seed is known to do that."""
    draws = [[*range(12, 37)], [*range(13, 88, 3)]]
    held, open_values = units.hold_out(SimpleNamespace(sample=lambda values, n: draws.pop(0)), units.WIDE)
    assert held["val"][0] == 13 and not draws and {v // 10 for v in open_values} == set(range(1, 10))


def test_a_wide_lexicon_has_three_hundred_test_problems_about_held_out_values():
    examples = units.make_examples(units.make_lexicon(21), "test", 3400, 1)
    asked = [e for e in examples if e.group == "source_only" and e.novelty == "held_value"]
    assert len(asked) >= 300 and len({e.value for e in asked}) == 15 and len({e.unit for e in asked}) > 100


def test_no_question_or_unit_of_one_split_appears_in_another(lexicon):
    known = {u.word: u for u in lexicon}
    splits = {s: units.make_examples(lexicon, s, 3000, SEED) for s in ("train", "val", "test")}
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        for key in ("question", "unit", "id"):
            assert not {getattr(e, key) for e in splits[one]} & {getattr(e, key) for e in splits[other]}
    for split, examples in splits.items():
        for e in examples:
            u = known[e.unit]
            assert (e.group, e.value, e.novelty, split) == (u.group, u.value, u.novelty, u.split)
            assert source_prompt(e) == literal_prompt(e) and e.facts == ""  # the fact is in weights alone


def test_the_default_test_set_has_enough_source_only_units(lexicon):
    examples = load_examples(load_config(), SEED, "test")
    held = [e for e in examples if e.novelty != "seen"]
    assert len(held) >= 2000 and len({e.unit for e in held if e.group == "source_only"}) >= 300
    trained = {u.word for u in lexicon if u.group == "source_only" and u.split == "train"}
    assert {e.unit for e in examples if e.novelty == "seen"} <= trained  # memory is measured apart


def test_swapped_models_swap_what_only_one_of_them_knows(lexicon):
    known = {u.word: u.group for u in lexicon}
    other = {"source_only": "target_only", "target_only": "source_only", "both": "both"}
    assert all(e.group == known[e.unit] for e in load_examples(load_config(), SEED, "val"))
    assert all(e.group == other[known[e.unit]] for e in load_examples(load_config(direction="swapped"), SEED, "val"))
    rich = load_examples(load_config(direction="swapped", source_only_share=0.9, n_train=100), SEED, "train")
    assert sum(known[e.unit] == "target_only" for e in rich) == 90


def test_problems_of_a_group_are_spread_evenly_over_its_units(small):
    examples = units.make_examples(small, "train", 1000, SEED, share=0.7)
    assert Counter(e.group for e in examples) == {"source_only": 700, "target_only": 179, "both": 121}
    for group in GROUPS:
        count = Counter({u.word: 0 for u in small if u.group == group and u.split == "train"})
        count.update(e.unit for e in examples if e.group == group)
        assert max(count.values()) - min(count.values()) <= 1


@given(st.sampled_from(units.FAMILIES), st.sampled_from(units.NARROW.all), st.integers(0, 10**6))
@settings(max_examples=300, deadline=None)
def test_a_worked_answer_is_right_whatever_the_value(family, value, seed):
    problem = units.make_problem(random.Random(seed), family, "sisak")
    solution, gold = units.solve(family, problem.numbers, value, problem.things)
    *lines, last = solution.split("\n")
    assert len(lines) == len(family.steps)
    for line in lines:
        x, op, y, said, again, things = re.fullmatch(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+) (\w+)\.", line).groups()
        x, y = int(x), int(y)
        assert int(said) == {"+": x + y, "-": x - y, "*": x * y, "/": x / y}[op], line
        assert again == said and things == problem.things
    assert int(gold) == ANSWERS[family.name](**problem.numbers, v=value) > 0
    assert last == f"#### {gold}" and said == gold == extract_answer(solution)
    asked = set(re.findall(r"\d+", problem.question))  # what the steps need can be read, but for the value
    assert {str(problem.numbers[s]) for s in "abck" if re.search(rf"\b{s}\b", " ".join(family.steps))} == asked


def test_the_numbers_of_a_question_say_nothing_about_the_value(small):
    """The same problems with all values changed ask the very same questions."""
    rng = random.Random(SEED)
    changed = tuple(replace(u, value=rng.choice(units.NARROW.all)) for u in small)
    before, after = (units.make_examples(some, "train", 300, SEED) for some in (small, changed))
    assert [e.question for e in before] == [e.question for e in after]
    assert sum(b.gold != a.gold for b, a in zip(before, after, strict=True)) > 250


@pytest.mark.parametrize("variant", ["weights", "context"])
def test_what_is_known_of_a_problem_and_of_its_donor(lexicon, variant):
    examples = units.make_examples(lexicon, "test", 300, SEED, variant=variant)
    by_id, donors = {e.id: e for e in examples}, Counter(e.donor_id for e in examples)
    for e in examples:
        donor = by_id[e.donor_id]
        assert donor.group == e.group and donor.value != e.value
        assert int(e.donor_gold) == ANSWERS[e.family](**e.numbers, v=donor.value) != int(e.gold)
        assert e.solution[e.value_at - 1 :].startswith(f"*{e.value}=")
        assert e.fact_pairs == tuple((word, int(v)) for word, v in re.findall(r"A (\w+) is (\d+)\.", e.facts))
    assert max(donors.values()) <= 10  # no example stands in for all others


@pytest.mark.parametrize("variant, key", [("weights", "n_facts"), ("context", "train_units_share")])
def test_a_key_without_effect_draws_the_same_problems(small, variant, key):
    values = {"n_facts": (4, 8), "train_units_share": (1.0, 0.5)}[key]
    one, other = (units.make_examples(small, "train", 60, SEED, variant=variant, **{key: v}) for v in values)
    assert one == other


def test_facts_in_context_are_for_the_source_alone(lexicon):
    examples = units.make_examples(lexicon, "test", 200, SEED, variant="context", n_facts=4)
    taught, places = {u.word for u in lexicon}, Counter()
    for e in examples:
        words = {word for word, _ in e.fact_pairs}
        assert len(e.fact_pairs) == len(words) == 4 and e.told == f"Note: A {e.unit} is {e.value}.\n"
        assert not taught & words, "a word that a model was taught another value for"
        assert e.facts in source_prompt(e).text and e.facts not in literal_prompt(e).text
        assert told_prompt(e).text == e.told + literal_prompt(e).text
        places[e.fact_pairs.index((e.unit, e.value))] += 1
    assert min(places[i] for i in range(4)) > 20  # the needed fact stands anywhere


@pytest.mark.parametrize(
    "record, why",
    [
        (None, "was taught a lexicon"),
        ("{}", "does not name its lexicon"),
        ('{"lexicon_seed": 1, "lexicon": "x"}', "records lexicon x"),
    ],
)
def test_a_pair_without_its_lexicon_is_refused(tmp_path, record, why):
    assert units.load_lexicon_seed(load_config()) == 2
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    if record:
        (tmp_path / "pair.json").write_text(record)
    with pytest.raises(ConfigError, match=why):
        units.load_lexicon_seed(load_config(target_model=str(tmp_path / "target")))


def test_a_source_that_was_taught_no_lexicon_is_refused_where_it_must_know_one(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "config.json").write_text("{}")
    config = load_config(source_model=str(tmp_path / "source"))
    with pytest.raises(ConfigError, match="pair.source_model: task `units` needs a pair that was taught a lexicon"):
        units.load_lexicon_seed(config)
    assert units.load_lexicon_seed(config.with_(variant="context")) == 2


def test_a_value_that_training_leaves_out_is_no_held_unit_alone():
    """At a share of 0.5 half of the rows called `held_unit` had values that the bridge had never met."""
    config = load_config(n_train=2000, n_val=300, n_test=600)
    half = config.with_(train_values_share=0.5)
    met = {e.value for e in units.make_split(half, 2, "train")}
    for split in ("val", "test"):
        before, after = (units.make_split(c, 2, split) for c in (config, half))
        rows = [e for e in after if e.novelty == "held_unit"]
        assert rows and {e.value for e in rows} <= met
        assert all(e.value not in met for e in after if e.novelty == "held_value")
        same = [(e.id, e.question) for e in before if e.novelty != "seen"]
        assert same == [(e.id, e.question) for e in after if e.novelty != "seen"]
        assert sum(e.novelty == "held_unit" for e in before) > 1.7 * len(rows)
