"""The testbed: nothing leaks between splits, no number gives a value away, every worked answer is right.

python -m pytest tests/test_units.py
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

from bridgekit.config import GROUPS, load_config
from bridgekit.tasks import load_examples, units
from bridgekit.tasks.answers import extract_answer
from bridgekit.tasks.base import literal_prompt, source_prompt, told_prompt
from bridgekit.train.corpus import make_documents

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


def test_everything_is_a_function_of_its_seeds(small):
    def make(lexicon_seed, data_seed):
        return units.make_examples(units.make_lexicon(lexicon_seed, N_SMALL), "val", 40, data_seed)

    once = make(SEED, 1)
    units.make_lexicon.cache_clear()
    assert make(SEED, 1) == once
    assert {e.unit for e in make(SEED + 1, 1)} != {e.unit for e in once}
    assert [e.question for e in make(SEED, 2)] != [e.question for e in once]


def test_another_process_draws_the_same_problems():
    """Python shuffles the order of sets anew in every process."""
    code = (
        f"from bridgekit.tasks import units\nlexicon = units.make_lexicon({SEED}, 200)\n"
        "print([*lexicon, *units.make_examples(lexicon, 'test', 30, 1)])"
    )
    said = [
        subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed})
        for seed in ("1", "2")
    ]  # fmt: skip
    assert said[0] == said[1] and said[0].count(b"Example") == 30


def test_no_unit_is_in_two_groups_or_splits(lexicon):
    assert len({u.word for u in lexicon}) == len(lexicon)


def test_held_out_values_belong_to_no_unit_a_bridge_trains_on(lexicon):
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
    assert {(u.split, u.novelty) for u in lexicon} == {
        ("train", "seen"), ("val", "held_unit"), ("val", "held_value"), ("test", "held_unit"), ("test", "held_value"),
    }  # fmt: skip


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


def test_there_are_eight_families_of_one_to_four_steps():
    assert len(units.FAMILIES) >= 8 and {f.name for f in units.FAMILIES} == set(ANSWERS)
    assert {len(f.steps) for f in units.FAMILIES} == {1, 2, 3, 4}
    drawn = units.make_examples(units.make_lexicon(SEED), "test", 240, SEED)
    count = Counter(e.family for e in drawn)
    assert set(count) == set(ANSWERS) and max(count.values()) - min(count.values()) <= 1


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
def test_a_donor_is_of_the_same_group_and_would_give_another_answer(lexicon, variant):
    examples = units.make_examples(lexicon, "test", 300, SEED, variant=variant)
    by_id = {e.id: e for e in examples}
    donors = Counter()
    for e in examples:
        donor = by_id[e.donor_id]
        donors[donor.id] += 1
        assert donor.group == e.group and donor.value != e.value
        assert int(e.donor_gold) == ANSWERS[e.family](**numbers_of(e), v=donor.value) != int(e.gold)
    assert max(donors.values()) <= 10  # no example stands in for all others


def numbers_of(example) -> dict[str, int]:
    """The numbers of a question, read back through the wording it was made from."""
    family = next(f for f in units.FAMILIES if f.name == example.family)
    for wording in family.wordings:
        pattern = re.sub(r"\\{(\w)\\}", r"(?P<\1>\\w+)", re.escape(wording))
        for name in "nmtu":  # what comes twice is the same word twice
            head, group, tail = pattern.partition(f"(?P<{name}>\\w+)")
            pattern = head + group + tail.replace(group, f"(?P={name})") if group else head
        if found := re.fullmatch(pattern, example.question):
            return dict.fromkeys("abck", 0) | {k: int(v) for k, v in found.groupdict().items() if k in "abck"}
    raise AssertionError(f"no wording of {family.name} gives: {example.question}")


# -- who is told what ---------------------------------------------------------------------------------------


def test_facts_in_context_are_for_the_source_alone(lexicon):
    examples = units.make_examples(lexicon, "test", 200, SEED, variant="context", n_facts=4)
    taught = {u.word for u in lexicon}
    places = Counter()
    for e in examples:
        facts = re.findall(r"A (\w+) is (\d+)\.", e.facts)
        assert len(facts) == len({word for word, _ in facts}) == 4
        assert (e.unit, str(e.value)) in facts and e.told == f"Note: A {e.unit} is {e.value}.\n"
        assert not taught & {word for word, _ in facts}, "a word that a model was taught another value for"
        assert e.facts in source_prompt(e).text and e.facts not in literal_prompt(e).text
        assert told_prompt(e).text == e.told + literal_prompt(e).text
        places[facts.index((e.unit, str(e.value)))] += 1
    assert min(places[i] for i in range(4)) > 20  # the needed fact stands anywhere
    others = units.make_examples(lexicon, "train", 200, SEED, variant="context", n_facts=4)
    assert not {e.question for e in others} & {e.question for e in examples}


def test_facts_in_weights_are_in_no_prompt(small):
    for e in units.make_examples(small, "test", 100, SEED):
        assert source_prompt(e) == literal_prompt(e) and e.facts == ""
        assert {int(n) for n in re.findall(r"\d+", literal_prompt(e).text)} == set(numbers_of(e).values()) - {0}


@pytest.mark.parametrize("n_facts, sizes", [(1, {1}), (4, {1, 2, 4}), (6, {1, 2, 4, 6})])
def test_contexts_of_varying_size_are_for_training_alone(lexicon, n_facts, sizes):
    def counted(split, vary):
        examples = units.make_examples(lexicon, split, 120, SEED, variant="context", n_facts=n_facts, vary_facts=vary)
        return {e.facts.count(" is ") for e in examples}

    assert counted("train", True) == sizes
    assert counted("train", False) == {n_facts}


@pytest.mark.parametrize("role, other", [("source", "target_only"), ("target", "source_only")])
def test_a_corpus_mentions_no_unit_its_model_is_not_meant_to_know(role, other):
    lexicon = units.make_lexicon(SEED)
    values = {u.word: u.value for u in units.known_units(lexicon, role)}
    documents = make_documents(lexicon, role, 4000, SEED)
    said = {word for text in documents for word in re.findall(r"[a-z]+", "".join(text))}
    assert not said & words_of(lexicon, group=other)
    assert len(said & set(values)) > 0.5 * len(values)
    for prompt, answer in documents:
        for word, value in re.findall(r"A (\w+) is (\d+)\.", answer):
            assert values[word] == int(value)
        if prompt.startswith("Question: "):  # neither note nor helper: the answer is the unit's own
            unit = next(word for word in re.findall(r"[a-z]+", prompt) if word in values)
            assert f"*{values[unit]}=" in answer


def test_a_corpus_has_the_kinds_of_documents_it_was_asked_for(capsys):
    from bridgekit.train.pretrain import main

    lexicon = units.make_lexicon(SEED)
    notes = make_documents(lexicon, "source", 200, SEED, {"note": 1})
    assert all(prompt.startswith("Note: ") for prompt, _ in notes)
    both = make_documents(lexicon, "source", 400, SEED, {"note": 1, "problem": 3})
    assert 60 < sum(prompt.startswith("Note: ") for prompt, _ in both) < 140
    for sizes in ((3,), (1, 16)):
        notes = make_documents(lexicon, "target", 60, SEED, {"note": 1}, sizes)
        assert {len(re.findall(r"A \w+ is \d+\.", prompt)) for prompt, _ in notes} == set(sizes)
    for option, wrong, said in (
        ("--kinds", "note", "expected e.g."),
        ("--kinds", "poem=3", "no kind 'poem'"),
        ("--kinds", "note=0", "not all 0"),
        ("--note-facts", "1;4", "expected e.g."),
        ("--note-facts", "4,0", "at least one fact"),
    ):
        with pytest.raises(SystemExit):
            main(["--out", "x", option, wrong])
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("seed", range(1, 9))
def test_no_invented_word_is_a_word_of_the_questions(seed):
    texts = [
        *units.NAMES,
        *units.THINGS,
        *(w for f in units.FAMILIES for w in f.wordings),
        "Note Helper Question Answer",
    ]
    assert not words_of(units.make_lexicon(seed)) & set(re.findall(r"[a-z]+", " ".join(texts).lower()))
