"""The table of answers, its three verbs, and what they refuse to pair.

python -m pytest tests/results/test_table.py
"""

import json
import random

import numpy as np
import pandas as pd
import pytest

from bridgekit.results import statistics as stats
from bridgekit.results.table import difference, load_answers, ratio, said_value, select, share
from bridgekit.runs import write_jsonl
from bridgekit.tasks.units import FAMILIES, VALUES, draw_numbers, solve

UNITS = [f"u{i // 2}" for i in range(60)]


def write_run(folder, right: dict[str, np.ndarray], texts: bool = True, **changes) -> None:
    """A run folder whose conditions are right where `right` says; a source and a target are always there."""
    n, folder = len(UNITS), folder.resolve()
    folder.mkdir(parents=True)
    right = {"source": np.ones(n, bool), "target": np.arange(n) % 3 == 0} | right
    rows = []
    for i in range(n):
        row = {"id": f"p{i}", "index": i, "unit": UNITS[i], "group": "source_only", "gold_extracted": f"{i}",
               "novelty": "seen" if i >= 50 else "held_unit", "value": 12 + i // 2, "family": "count"}  # fmt: skip
        row |= {f"{c}_extracted": f"{i}" if ok[i] else "[invalid]" for c, ok in right.items()}
        if texts:
            row |= {"question": f"Question {i}?"} | {f"{c}_full": f"<<9*{12 + i}=1>>1" for c in right}
        rows.append(row | {key: value(i) for key, value in changes.items()})
    write_jsonl(folder / "eval_samples_step_final.jsonl", rows)


def draw(seed: int, rate: float) -> np.ndarray:
    return np.random.default_rng(seed).random(len(UNITS)) < rate


@pytest.fixture
def runs(tmp_path):
    """Three seeds of `a` and of `b` on the same problems, `b` without texts."""
    for seed in (1, 2, 3):
        write_run(tmp_path / f"s_a_seed{seed}", {"bridged": draw(seed, 0.9)})
        write_run(tmp_path / f"s_b_seed{seed}", {"bridged": draw(10 + seed, 0.5)}, texts=False)
    return tmp_path


@pytest.fixture
def answers(runs):
    return load_answers({name: [runs / f"s_{name}_seed{seed}" for seed in (1, 2, 3)] for name in "ab"})


# -- loading ------------------------------------------------------------------------------------------------


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
    whole = load_answers(runs)
    assert whole.groupby("variant", sort=False)["seed"].unique().map(list).to_dict() == {
        "s_a": [1, 2, 3], "s_b": [1, 2, 3],
    }  # fmt: skip
    one = load_answers(runs / "s_a_seed1" / "eval_samples_step_final.jsonl")
    assert set(one["run"]) == {"s_a_seed1"} and set(one["seed"]) == {1}
    write_run(tmp_path / "else" / "phase1_20260101_000000", {"bridged": draw(1, 0.9)})
    (tmp_path / "else/phase1_20260101_000000/config.yaml").write_text("run:\n  seed: 7\n")
    assert set(load_answers(tmp_path / "else" / "phase1_20260101_000000")["seed"]) == {7}


def test_a_seed_given_twice_and_no_runs_at_all_are_refused(runs):
    with pytest.raises(ValueError, match="s_b_seed1: seed 1 of 'x' is .*s_a_seed1 already"):
        load_answers({"x": [runs / "s_a_seed1", runs / "s_b_seed1"]})
    with pytest.raises(ValueError, match="no run folders of 'x' were named"):
        load_answers({"x": []})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_answers(runs / "nowhere")


def test_subsets_leave_out_what_was_seen_unless_they_name_it(answers):
    assert set(select(answers)["novelty"]) == {"held_unit"} == set(select(answers, "source_only")["novelty"])
    assert set(select(answers, "source_only_seen")["novelty"]) == {"seen"} and select(answers, "both").empty
    assert len(select(answers.drop(columns=["novelty", "group"]))) == len(answers)
    with pytest.raises(ValueError, match="unknown subset `held`"):
        select(answers, "held")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_value_is_read_from_every_family_of_worked_answers(family):
    rng = random.Random(family.name)
    for _ in range(50):
        value = rng.choice(VALUES)
        text, _ = solve(family, draw_numbers(rng, family), value, "pins")
        assert said_value(text, family.name) == value
        assert said_value(f"{text}\n<<3*99=297>>297", family.name) == value  # what follows the answer is not read


@pytest.mark.parametrize(
    ("text", "family", "value"),
    [
        ("<<9*37=334>>334 pins.\n#### 334", "count", 37),  # a slip in the product names its value all the same
        ("<<7-2=5>>5 pins.\n<<5*41=205>>205 pins.\n#### 205", "fewer", 41),
        ("<<7-2=5>>5 pins.\n#### 205", "fewer", None),
        ("<<9+37=46>>46 pins.\n#### 46", "count", None),
        ("<<9*37", "count", None),
        ("#### <<9*37=333>>", "count", None),
        (None, "count", None),
        (float("nan"), "count", None),
        ("<<9*37=333>>", None, None),
    ],
)
def test_an_answer_that_names_no_value_is_not_guessed_at(text, family, value):
    assert said_value(text, family) == value


# -- the verbs ----------------------------------------------------------------------------------------------


def test_one_seed_has_the_intervals_over_units(answers):
    one = answers[(answers["run"] == "s_a_seed1")]
    cell = one[one["condition"] == "bridged"]
    row = share(one, by="condition").set_index("condition").loc["bridged"]
    theirs = stats.clustered_proportion(cell["correct"], cell["unit"])
    assert (row.point, row.low, row.high, row.n, row.n_units) == (*vars(theirs).values(),)
    frame = one.pivot(index="id", columns="condition", values="correct").add_suffix("_correct")
    frame = frame.join(cell.set_index("id")["unit"])
    found, paired = difference(one, "bridged", "target").iloc[0], stats.paired_difference(frame, "bridged", "target")
    assert (found.point, found.low, found.high, found.p) == (paired.difference, paired.low, paired.high, paired.p)
    assert (found.gained, found.lost, found.n_seeds) == (paired.gained, paired.lost, 1)
    back = difference(one, "target", "bridged").iloc[0]
    assert (back.low, back.high, back.p) == (-found.high, -found.low, found.p)
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
    with pytest.raises(ValueError, match="3 seeds in one cell: put seed into by"):
        ratio(answers[answers["variant"] == "a"], "bridged", "target")


def test_a_number_that_is_no_yes_or_no_has_a_mean(answers):
    one = answers[answers["run"] == "s_a_seed1"].assign(length=lambda f: f["said"] / 2)
    row = share(one[one["condition"] == "bridged"], value="length").iloc[0]
    theirs = stats.clustered_mean((12 + np.arange(60)) / 2, UNITS)
    assert (row.point, row.low, row.high) == pytest.approx((theirs.point, theirs.low, theirs.high))
    alone = pd.DataFrame({"entropy": [1.0, 2.0, 4.0], "group": "both"})  # no seed, no unit: each row stands alone
    assert share(alone, "group", "entropy").iloc[0].point == pytest.approx(7 / 3)
    with pytest.raises(ValueError, match="`said` is no yes or no"):
        share(answers[(answers["variant"] == "a") & (answers["condition"] == "bridged")], value="said")


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("id", "ids differ"),
        ("gold_extracted", "gold of p0 differs"),
        ("unit", "unit of p0 differs"),
        ("value", "value of p0 differs"),
        ("family", "family of p0 differs"),
        ("question", "question of p0 differs"),
    ],
)
def test_runs_are_paired_by_their_problems_and_never_by_the_id_alone(runs, changed, named):
    other = {"value": lambda i: 99 - i // 2}.get(changed, lambda i: f"other {i // 2}")
    write_run(runs / "t_c_seed1", {"bridged": draw(5, 0.5)}, **{changed: other})
    both = load_answers({"a": runs / "s_a_seed1", "c": runs / "t_c_seed1"})
    both = both[both["condition"] == "bridged"]
    for refused in (
        lambda: difference(both, "a", "c", on="variant"),
        lambda: ratio(both, "a", "c", on="variant"),
        lambda: share(both.assign(variant="x", seed=both["variant"].map({"a": 1, "c": 2}))),
    ):
        with pytest.raises(ValueError, match=f"not tested on the same problems .{named}") as refusal:
            refused()
        assert "\n" not in str(refusal.value)


def test_a_kept_run_without_questions_is_paired_by_the_rest(answers):
    assert answers.loc[answers["variant"] == "b", "question"].isna().all()
    assert len(difference(answers[answers["condition"] == "bridged"], "a", "b", by="seed", on="variant")) == 3


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda f: share(f, by="variant"), "several values of `condition` in one cell"),
        (lambda f: share(f, by="condition"), "several values of `variant` in one cell"),
        (lambda f: difference(f, "bridged", "target"), "several values of `variant` in one cell"),
        (lambda f: difference(f, "a", "b", on="variant"), "several values of `condition` in one cell"),
        (lambda f: difference(f[f.variant == "a"], "bridged", "zero"), "`zero` is no condition of these answers"),
        (lambda f: share(f.iloc[:0]), "the table is empty"),
        (lambda f: share(pd.concat([f, f]), by=["variant", "condition"]), "occurs twice in one run"),
        (
            lambda f: difference(f[(f.variant == "a") == (f.seed < 3)].query("condition == 'bridged'"), "a", "b", on="variant"),
            "no seed in common",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_counted_is_refused(answers, call, named):
    with pytest.raises(ValueError, match=named) as refusal:
        call(answers)
    assert "\n" not in str(refusal.value)


def test_a_table_is_what_a_figure_takes(answers):
    rows = json.loads(share(answers, ["variant", "condition", "seed"]).to_json(orient="records"))
    assert len(rows) == 2 * 4 * 3 and all(r["low"] <= r["point"] <= r["high"] for r in rows)
