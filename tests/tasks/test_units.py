"""The testbed: nothing leaks between splits, no number gives a value away, every worked answer is right.

python -m pytest tests/tasks/test_units.py
"""

import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.config import GROUPS, ConfigError, load_config
from bridgekit.tasks import literal_prompt, load_examples, source_prompt, told_prompt, units
from bridgekit.tasks.answers import extract_answer

SEED = 3
N_SMALL = 600  # units of a lexicon small enough for every unit to be drawn several times
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
    return units.make_lexicon(SEED, N_SMALL)


def words_of(lexicon, **wanted) -> set[str]:
    return {u.word for u in lexicon if all(getattr(u, key) == value for key, value in wanted.items())}


# -- lexicon and splits -------------------------------------------------------------------------------------


def test_another_process_draws_the_same_problems_and_another_seed_others():
    """Python shuffles the order of sets anew in every process."""
    call = f"units.make_examples(units.make_lexicon({SEED}, 200), 'test', 30, 1)"
    code = ["-c", f"from bridgekit.tasks import units; print({call})"]
    texts = [subprocess.check_output([sys.executable, *code], env=os.environ | {"PYTHONHASHSEED": s}) for s in "12"]
    assert texts[0] == texts[1] and texts[0].count(b"Example") == 30
    made = [
        units.make_examples(units.make_lexicon(seed, 200), "test", 30, data) for seed, data in ((3, 1), (4, 1), (3, 2))
    ]
    assert str(made[0]) == texts[0].decode().strip()
    assert not {e.unit for e in made[0]} & {e.unit for e in made[1]}
    assert [e.question for e in made[0]] != [e.question for e in made[2]]


def test_held_out_values_belong_to_no_unit_a_bridge_trains_on(lexicon):
    assert len({u.word for u in lexicon}) == len(lexicon)  # no unit is in two groups or splits
    held = {s: {u.value for u in lexicon if u.novelty == "held_value" and u.split == s} for s in ("val", "test")}
    assert {s: len(values) for s, values in held.items()} == units.HELD_VALUES
    assert not held["val"] & held["test"]  # what selection has looked at is not what is reported
    held_anywhere = held["val"] | held["test"]
    assert not held_anywhere & {u.value for u in lexicon if u.novelty != "held_value"}
    for group in GROUPS:  # and the other values are all there to be trained on
        trained = {u.value for u in lexicon if u.group == group and u.split == "train"}
        assert trained == set(units.VALUES) - held_anywhere
        for split, values in held.items():
            own = {u.value for u in lexicon if u.group == group and u.novelty == "held_value" and u.split == split}
            assert own == values
    assert {u.novelty for u in lexicon if u.split == "train"} == {"seen"}


def test_no_question_or_unit_of_one_split_appears_in_another(lexicon):
    splits = {s: units.make_examples(lexicon, s, 3000, SEED) for s in ("train", "val", "test")}
    for one, other in (("train", "test"), ("train", "val"), ("val", "test")):
        for key in ("question", "unit", "id"):
            shared = {getattr(e, key) for e in splits[one]} & {getattr(e, key) for e in splits[other]}
            assert not shared, f"{key} in both {one} and {other}: {sorted(shared)[:3]}"
    known = {u.word: u for u in lexicon}
    for split, examples in splits.items():
        for e in examples:
            u = known[e.unit]
            assert (e.group, e.value, e.novelty, split) == (u.group, u.value, u.novelty, u.split)
            assert source_prompt(e) == literal_prompt(e) and e.facts == ""  # the fact is in weights alone


def test_the_default_test_set_has_enough_source_only_units():
    config = load_config()
    examples = load_examples(config, SEED, "test")
    held = [e for e in examples if e.novelty != "seen"]
    assert len(held) == config.task.n_test >= 2000
    assert len({e.unit for e in held if e.group == "source_only"}) >= 300
    trained = words_of(units.make_lexicon(SEED), group="source_only", split="train")
    assert {e.unit for e in examples if e.novelty == "seen"} <= trained  # memory is measured apart


def test_swapped_models_swap_what_only_one_of_them_knows(lexicon):
    """The groups say who of the two *as configured* knows a unit, and the natural mix follows."""
    forward, swapped = (load_examples(load_config(direction=d), SEED, "val") for d in ("forward", "swapped"))
    known = {u.word: u.group for u in lexicon}
    other = {"source_only": "target_only", "target_only": "source_only", "both": "both"}
    assert all(e.group == known[e.unit] for e in forward)
    assert all(e.group == other[known[e.unit]] for e in swapped)
    before, after = (Counter(e.group for e in examples) for examples in (forward, swapped))
    assert before["source_only"] < before["target_only"]
    assert {other[group]: n for group, n in after.items()} == pytest.approx(before, abs=1)
    rich = load_examples(load_config(direction="swapped", source_only_share=0.9, n_train=100), SEED, "train")
    assert sum(known[e.unit] == "target_only" for e in rich) == 90


# -- problems -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split, n", [("train", 1000), ("val", 300), ("test", 200)])
def test_problems_are_spread_evenly_over_units(small, split, n):
    examples = units.make_examples(small, split, n, SEED)
    for group in GROUPS:
        count = Counter(dict.fromkeys(words_of(small, group=group, split=split), 0))
        count.update(e.unit for e in examples if e.group == group)
        assert max(count.values()) - min(count.values()) <= 1


@pytest.mark.parametrize("share, wanted", [(-1, (23, 46, 31)), (0.7, (70, 18, 12)), (0, (0, 60, 40)), (1, (100, 0, 0))])
def test_the_mix_of_groups(lexicon, share, wanted):
    examples = units.make_examples(lexicon, "train", 1000, SEED, share=share)
    count = Counter(e.group for e in examples)
    assert len(examples) == 1000
    assert [round(count[g] / 10) for g in GROUPS] == list(wanted)


def test_smaller_shares_of_the_train_units_are_nested(small):
    def words(share, group):
        examples = units.make_examples(small, "train", 2000, SEED, train_units_share=share)
        return {e.unit for e in examples if e.group == group}

    for group in GROUPS:
        quarter, half, whole = (words(share, group) for share in (0.25, 0.5, 1))
        assert quarter < half < whole == words_of(small, group=group, split="train")
        assert len(quarter) == pytest.approx(len(whole) / 4, abs=1) and len(half) == pytest.approx(
            len(whole) / 2, abs=1
        )
    seen = {e.unit for e in units.make_seen_examples(small, 100, SEED, 0.25)}
    assert seen <= words(0.25, "source_only")  # what is called seen was seen


def test_values_can_be_taken_out_of_the_training_and_smaller_shares_are_nested(small):
    def met(share, units_share=1.0):
        options = {"train_values_share": share, "train_units_share": units_share}
        return {(e.unit, e.value) for e in units.make_examples(small, "train", 3000, SEED, **options)}

    whole, half, some = met(1.0), met(0.5), met(0.5, 0.5)
    assert some < half < whole
    values, left = ({value for _, value in pairs} for pairs in (whole, half))
    assert len(left) == round(len(values) / 2)
    assert half == {(word, value) for word, value in whole if value in left}  # only those units are missing
    tests = units.make_examples(small, "test", 2000, SEED)
    assert values - left <= {e.value for e in tests if e.novelty == "held_unit"}  # and are still asked about
    assert {e.value for e in units.make_seen_examples(small, 200, SEED, 1.0, 0.5)} <= left
    assert met(0.01, 0.01)  # never none at all


@given(st.sampled_from(units.FAMILIES), st.sampled_from(units.VALUES), st.integers(0, 10**6))
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
    assert last == f"#### {gold}" and lines[-1].startswith(f"<<{x}{op}{y}={gold}>>")
    assert extract_answer(solution) == gold
    asked = set(re.findall(r"\d+", problem.question))  # what the steps need can be read, but for the value
    assert {str(problem.numbers[s]) for s in "abck" if re.search(rf"\b{s}\b", " ".join(family.steps))} == asked
    assert "sisak" in problem.question


def test_the_numbers_of_a_question_say_nothing_about_the_value(small):
    """The same problems with all values changed ask the very same questions."""
    rng = random.Random(SEED)
    changed = tuple(replace(u, value=rng.choice(units.VALUES)) for u in small)
    before, after = (units.make_examples(some, "train", 300, SEED) for some in (small, changed))
    assert [e.question for e in before] == [e.question for e in after]
    assert sum(b.gold != a.gold for b, a in zip(before, after, strict=True)) > 250


@pytest.mark.parametrize("variant", ["weights", "context"])
def test_what_is_known_of_a_problem_and_of_its_donor(lexicon, variant):
    examples = units.make_examples(lexicon, "test", 300, SEED, variant=variant)
    by_id = {e.id: e for e in examples}
    donors = Counter()
    for e in examples:
        donor = by_id[e.donor_id]
        donors[donor.id] += 1
        assert donor.group == e.group and donor.value != e.value
        assert int(e.donor_gold) == ANSWERS[e.family](**e.numbers, v=donor.value) != int(e.gold)
        assert e.solution[e.value_at - 1 :].startswith(f"*{e.value}=") and units.answer_with(e, e.value) == e.gold
        assert e.fact_pairs == tuple((word, int(v)) for word, v in re.findall(r"A (\w+) is (\d+)\.", e.facts))
    assert max(donors.values()) <= 10  # no example stands in for all others
    families = Counter(e.family for e in examples)
    assert set(families) == set(ANSWERS) and len(set(families.values())) == 1


@pytest.mark.parametrize("variant, key", [("weights", "n_facts"), ("context", "train_units_share")])
def test_a_key_without_effect_draws_the_same_problems(small, variant, key):
    values = {"n_facts": (4, 8), "train_units_share": (1.0, 0.5)}[key]
    one, other = (units.make_examples(small, "train", 60, SEED, variant=variant, **{key: v}) for v in values)
    assert one == other


# -- who is told what ---------------------------------------------------------------------------------------


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
    others = units.make_examples(lexicon, "train", 200, SEED, variant="context", n_facts=4)
    assert not {e.question for e in others} & {e.question for e in examples}


@pytest.mark.parametrize("n_facts, sizes", [(1, {1}), (4, {1, 2, 4}), (6, {1, 2, 4, 6})])
def test_contexts_of_varying_size_are_for_training_alone(lexicon, n_facts, sizes):
    def counted(split, vary):
        examples = units.make_examples(lexicon, split, 120, SEED, variant="context", n_facts=n_facts, vary_facts=vary)
        return {len(e.fact_pairs) for e in examples}

    assert counted("train", True) == sizes
    assert counted("train", False) == {n_facts}


@pytest.mark.parametrize("seed", range(1, 9))
def test_no_invented_word_is_a_word_of_the_questions(seed):
    wordings = [wording for family in units.FAMILIES for wording in family.wordings]
    texts = [*units.NAMES, *units.THINGS, *wordings, "Note Helper Question Answer"]
    assert not words_of(units.make_lexicon(seed)) & set(re.findall(r"[a-z]+", " ".join(texts).lower()))


def test_a_pair_without_its_lexicon_is_refused(tmp_path):
    assert units.load_lexicon_seed(load_config()) == 2
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "config.json").write_text("{}")
    config = load_config(target_model=str(tmp_path / "target"))
    with pytest.raises(ConfigError, match="was taught a lexicon"):
        units.load_lexicon_seed(config)
    for record, why in (
        ("{}", "does not name its lexicon"),
        ('{"lexicon_seed": 1, "lexicon": "x"}', "records lexicon x"),
    ):
        (tmp_path / "pair.json").write_text(record)
        with pytest.raises(ConfigError, match=why):
            units.load_lexicon_seed(config)
