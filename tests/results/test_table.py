"""The table of answers, its three verbs, and what they refuse to pair.

python -m pytest tests/results/test_table.py
"""

import random

import numpy as np
import pandas as pd
import pytest

from bridgekit.results import statistics as stats
from bridgekit.results.table import difference, load_answers, over_pairs, ratio, said_value, select, share
from bridgekit.runs import write_jsonl
from bridgekit.tasks.units import FAMILIES, WIDE, draw_numbers, solve

UNITS = [f"u{i // 2}" for i in range(60)]


def write_run(folder, bridged: np.ndarray, texts: bool = True, **changes) -> None:
    """A run folder whose source is always right, and whose bridge is where `bridged` says; `changes` are functions."""
    folder.mkdir(parents=True)
    right, rows = {"source": np.ones(60, bool), "target": np.arange(60) % 3 == 0, "bridged": bridged}, []
    for i in range(60):
        row = {"id": f"p{i}", "index": i, "unit": UNITS[i], "group": "source_only", "gold_extracted": f"{i}"}
        row |= {"novelty": "seen" if i >= 50 else "held_unit", "value": 12 + i // 2, "family": "count"}
        row |= {f"{c}_extracted": f"{i}" if ok[i] else "[invalid]" for c, ok in right.items()}
        if texts:
            row |= {"question": f"Question {i}?"} | {f"{c}_full": f"<<9*{12 + i}=1>>1" for c in right}
        rows.append(row | {key: value(i) for key, value in changes.items()})
    write_jsonl(folder / "eval_samples_step_final.jsonl", rows)


def draw(seed: int, rate: float) -> np.ndarray:
    return np.random.default_rng(seed).random(60) < rate


@pytest.fixture
def runs(tmp_path):
    """Three seeds of `a` and of `b` on the same problems, `b` without texts."""
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s_a_seed{seed}", draw(seed, 0.9))
        write_run(tmp_path / f"s_b_seed{seed}", draw(10 + seed, 0.5), texts=False)
    return tmp_path


@pytest.fixture
def answers(runs):
    return load_answers({name: [runs / f"s_{name}_seed{seed}" for seed in (1, 2, 3)] for name in "ab"})


def test_a_row_is_a_run_a_condition_and_an_example(runs, answers):
    assert len(answers) == 6 * 4 * 60 and not answers.duplicated(["run", "condition", "id"]).any()
    assert set(answers["condition"]) == {"source", "target", "bridged", "union"}
    assert list(answers["variant"].unique()) == ["a", "b"] and set(answers["seed"]) == {1, 2, 3}
    row = answers[(answers.run == "s_a_seed2") & (answers.condition == "bridged") & (answers.id == "p7")].iloc[0]
    assert row.correct == draw(2, 0.9)[7] and (row.unit, row.gold, row.question) == ("u3", "7", "Question 7?")
    assert row.said == 19 and "text" not in answers and np.isnan(row.logprob)
    with_texts = load_answers(runs / "s_a_seed2", texts=True)
    assert with_texts.loc[with_texts["condition"] == "bridged", "text"].iloc[7] == "<<9*19=1>>1"


def test_runs_are_named_by_their_folder_unless_a_name_is_given(runs, tmp_path):
    seeds = load_answers(runs).groupby("variant", sort=False)["seed"].unique().map(list)
    assert seeds.to_dict() == {"s_a": [1, 2, 3], "s_b": [1, 2, 3]}
    one = load_answers(runs / "s_a_seed1" / "eval_samples_step_final.jsonl")
    assert set(one["run"]) == {"s_a_seed1"} and set(one["seed"]) == {1}
    write_run(tmp_path / "else" / "phase1_20260101_000000", draw(1, 0.9))
    (tmp_path / "else" / "phase1_20260101_000000" / "config.yaml").write_text("run:\n  seed: 7\n")
    assert set(load_answers(tmp_path / "else")["seed"]) == {7}
    assert set(select(seventh := load_answers(tmp_path / "else"))["novelty"]) == {"held_unit"}
    assert set(select(seventh, "source_only_seen")["novelty"]) == {"seen"} and select(seventh, "both").empty


def test_a_seed_given_twice_and_no_runs_at_all_are_refused(runs):
    with pytest.raises(ValueError, match="s_b_seed1: seed 1 of 'x' is .*s_a_seed1 already"):
        load_answers({"x": [runs / "s_a_seed1", runs / "s_b_seed1"]})
    with pytest.raises(ValueError, match="no run folders of 'x' were named"):
        load_answers({"x": []})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_answers(runs / "nowhere")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_value_is_read_from_every_family_of_worked_answers(family):
    rng = random.Random(family.name)
    for value in rng.sample(WIDE.all, 20):
        text, _ = solve(family, draw_numbers(rng, family), value, "pins")
        assert said_value(text, family.name) == value
        assert said_value(f"{text}\n<<3*99=297>>297", family.name) == value  # what follows the answer is not read


@pytest.mark.parametrize(
    ("text", "family", "value"),
    [
        ("<<9*37=334>>334 pins.\n#### 334", "count", 37),  # a slip in the product names its value all the same
        ("<<7-2=5>>5 pins.\n<<5*41=205>>205 pins.\n#### 205", "fewer", 41),
        ("<<9+37=46>>46 pins.\n#### 46", "count", None),
        ("#### <<9*37=333>>", "count", None),
        (None, "count", None),
        ("<<9*37=333>>", None, None),
    ],
)
def test_an_answer_that_names_no_value_is_not_guessed_at(text, family, value):
    assert said_value(text, family) == value


def test_one_seed_has_the_intervals_over_units(answers):
    one = answers[answers["run"] == "s_a_seed1"]
    cell, row = one[one["condition"] == "bridged"], share(one, by="condition").set_index("condition").loc["bridged"]
    theirs = stats.clustered_proportion(cell["correct"], cell["unit"])
    assert (row.point, row.low, row.high, row.n, row.n_units) == (*vars(theirs).values(),)
    frame = one.pivot(index="id", columns="condition", values="correct").add_suffix("_correct")
    frame = frame.join(cell.set_index("id")["unit"])
    found, paired = difference(one, "bridged", "target").iloc[0], stats.paired_difference(frame, "bridged", "target")
    assert (found.point, found.low, found.high, found.p) == (paired.difference, paired.low, paired.high, paired.p)
    assert (found.gained, found.lost, found.n_seeds) == (paired.gained, paired.lost, 1)
    of_ceiling, expected = ratio(one, "bridged", "source").iloc[0], stats.paired_ratio(frame, "bridged", "source")
    assert (of_ceiling.point, of_ceiling.low, of_ceiling.high) == (expected.point, expected.low, expected.high)


def test_several_seeds_are_pooled_and_more_uncertain(answers):
    bridged = answers[answers["condition"] == "bridged"]
    pooled, single = share(bridged, "variant").iloc[0], share(bridged, ["variant", "seed"])
    assert pooled.point == pytest.approx(single.loc[single["variant"] == "a", "point"].mean())
    assert (pooled.n, pooled.n_units, pooled.n_seeds) == (60, 30, 3)
    found = difference(bridged, "a", "b", on="variant").iloc[0]
    by_seed = [draw(s, 0.9).mean() - draw(10 + s, 0.5).mean() for s in (1, 2, 3)]
    assert found.point == pytest.approx(np.mean(by_seed)) and found.low < min(by_seed) and found.p < 0.05
    assert found.gained - found.lost == pytest.approx(180 * found.point)
    shuffled = bridged.sample(frac=1, random_state=0)
    assert difference(shuffled, "a", "b", on="variant").iloc[0].low == pytest.approx(found.low)
    # a kept run without questions is paired by the rest
    assert bridged.loc[bridged["variant"] == "b", "question"].isna().all()
    assert len(difference(bridged, "a", "b", by="seed", on="variant")) == 3


def test_a_pair_counts_once_and_the_interval_is_over_pairs():
    """By hand: three pairs with means 0.9, 0.8 and 0.7; the middle one has two seeds and a twin that repeats them."""
    cells = [
        ("a", "p1", 0.9),
        ("a", "p2", 0.85),
        ("a", "p2", 0.75),
        ("a", "p2", 0.85),
        ("a", "p2", 0.75),
        ("a", "p3", 0.7),
    ]
    cells = pd.DataFrame([*cells, ("b", "p1", 0.5), ("b", "p2", 0.5)], columns=["producer", "pair", "point"])
    found = over_pairs(cells, "producer").set_index("producer")
    half = 4.302652729911275 * 0.1 / np.sqrt(3)  # Student's quantile with two degrees of freedom
    one = found.loc["a"]
    assert (one["point"], one["lowest"], one["highest"]) == pytest.approx((0.8, 0.7, 0.9))
    assert (one["low"], one["high"]) == pytest.approx((0.8 - half, 0.8 + half))
    assert (one["spread"], one["n_pairs"]) == pytest.approx((0.1, 3)) and found.at["b", "low"] == 0.5
    assert list(over_pairs(cells.assign(measure="x"), ["measure", "producer"])["producer"]) == ["a", "b"]
    with pytest.raises(ValueError, match="has one pair: what holds for others needs at least two"):
        over_pairs(cells[cells["pair"] == "p1"], "producer")


def test_the_interval_over_pairs_covers_what_pairs_have_in_common():
    """2,000 sweeps of eight pairs that differ, each with noise of its own: the truth is in 0.95 of the intervals."""
    rng, n = np.random.default_rng(3), 2000
    pairs = 0.9 + rng.normal(0, 0.03, (n, 8)) + rng.normal(0, 0.02, (n, 8))
    cells = pd.DataFrame({"sweep": np.repeat(range(n), 8), "pair": np.tile(range(8), n), "point": pairs.ravel()})
    found = over_pairs(cells, "sweep")
    assert 0.94 < ((found["low"] <= 0.9) & (found["high"] >= 0.9)).mean() < 0.96


def test_a_number_that_is_no_yes_or_no_has_a_mean(answers):
    one = answers[(answers["run"] == "s_a_seed1") & (answers["condition"] == "bridged")]
    row, theirs = share(one, value="said").iloc[0], stats.clustered_mean(12 + np.arange(60), UNITS)
    assert (row.point, row.low, row.high) == pytest.approx((theirs.point, theirs.low, theirs.high))
    alone = pd.DataFrame({"entropy": [1.0, 2.0, 4.0], "group": "both"})  # no seed, no unit: each row stands alone
    assert share(alone, "group", "entropy").iloc[0].point == pytest.approx(7 / 3)


@pytest.mark.parametrize("changed", ["id", "gold_extracted", "value", "question"])
def test_runs_are_paired_by_their_problems_and_never_by_the_id_alone(runs, changed):
    write_run(runs / "t_c_seed1", draw(5, 0.5), **{changed: lambda i: 99 + i if changed == "value" else f"other {i}"})
    both = load_answers({"a": runs / "s_a_seed1", "c": runs / "t_c_seed1"})
    both = both[both["condition"] == "bridged"]
    named = "ids differ" if changed == "id" else f"{changed.removesuffix('_extracted')} of p0 differs"
    for verb in (difference, ratio):
        with pytest.raises(ValueError, match=f"not tested on the same problems .{named}"):
            verb(both, "a", "c", on="variant")
    with pytest.raises(ValueError, match=f"not tested on the same problems .{named}"):
        share(both.assign(variant="x", seed=both["variant"].map({"a": 1, "c": 2})))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: select(f, "held"), "unknown subset `held`"),
        (lambda f: share(f, by="variant"), "several values of `condition` in one cell"),
        (lambda f: share(f[f.variant == "a"], "condition", "said"), "`said` is no yes or no"),
        (lambda f: difference(f, "bridged", "target"), "several values of `variant` in one cell"),
        (lambda f: difference(f[f.variant == "a"], "bridged", "zero"), "`zero` is no condition of these answers"),
        (lambda f: difference(f[(f.variant == "a") == (f.seed < 3)], "a", "b", "condition", "variant"), "no seed in"),
        (lambda f: ratio(f[f.variant == "a"], "bridged", "target"), "3 seeds in one cell: put seed into by"),
        (lambda f: share(f.iloc[:0]), "the table is empty"),
        (lambda f: share(pd.concat([f, f]), by=["variant", "condition"]), "occurs twice in one run"),
    ],
)
def test_what_cannot_be_counted_is_refused(answers, call, named):
    with pytest.raises(ValueError, match=named):
        call(answers)
