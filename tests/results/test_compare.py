"""A study's differences, its axes, bits on channels whose capacity is known, and the plan's decision rule.

python -m pytest tests/results/test_compare.py
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from bridgekit.config import load_config
from bridgekit.results import compare, table
from bridgekit.results import statistics as stats
from bridgekit.results.compare import carried_bits, decide
from bridgekit.results.style import format_interval
from bridgekit.tasks import Example, units
from bridgekit.tasks.units import NARROW

VALUES = NARROW.all
FULL = math.log2(len(VALUES))


def draw_answers(seeds=(1, 2, 3), **rates: float) -> pd.DataFrame:
    """Variants that are right with these rates, on 200 problems about 100 units of the source alone."""
    rng, parts = np.random.default_rng(0), []
    for variant, rate in rates.items():
        for seed in seeds:
            part = pd.DataFrame({"id": [f"p{i:03d}" for i in range(200)], "unit": np.repeat(np.arange(100), 2)})
            part = part.assign(group="source_only", novelty="held_unit", gold="1", correct=rng.random(200) < rate)
            parts.append(part.assign(variant=variant, seed=seed, condition="bridged", value=12 + part["unit"] % 48))
    return pd.concat(parts, ignore_index=True)


def test_the_smallest_effect_is_found_four_times_in_five_at_the_strictest_level():
    compared = compare.compare_variants(draw_answers(a=0.5, b=0.9, c=0.5), "a").set_index(["variant", "subset"])
    row = compared.loc["b", "source_only_held_unit"]
    drawn = row["smallest_effect"] / row["deviation"] + np.random.default_rng(2).standard_normal(2000)
    assert (drawn > scipy.stats.t.ppf(1 - 0.05 / 4 / 2, row["df"])).mean() == pytest.approx(0.8, abs=0.03)


def test_a_missing_run_leaves_its_pair_out():
    answers = draw_answers(a=0.5, b=0.9)
    missing = answers[(answers["variant"] != "a") | (answers["seed"] != 2)]
    assert set(compare.compare_variants(missing, "a")["n_seeds"]) == {2}
    assert compare.compare_variants(answers[answers["variant"] == "b"], "a").empty


def test_a_replicate_is_paired_with_its_own_seeds():
    again = [draw_answers((101, 102, 103), a=0.5), draw_answers((201, 202), d=0.6)]
    answers = pd.concat([draw_answers(b=0.5, c=0.9), *again], ignore_index=True)
    compared = compare.compare_variants(answers, "b", replicates={"a": "b", "d": "b"})
    rows = compared[compared["subset"] == "all"].set_index("variant")
    assert rows["n_seeds"].to_dict() == {"c": 3, "a": 3, "d": 2}
    assert rows["replicates"].to_dict() == {"c": "", "a": "b", "d": "b"}
    assert list(compare.compare_variants(answers, "b")["variant"].unique()) == ["c"]  # undeclared: no seed in common


def test_the_table_of_gains_says_what_was_measured(tmp_path):
    for seed in (1, 2):
        (tmp_path / f"b{seed}").mkdir()
        (tmp_path / f"b{seed}" / "status.json").write_text(json.dumps({"parameters": 12345}))
        (tmp_path / f"b{seed}" / "timing.json").write_text(json.dumps({"train bridged": 10.0 * seed}))
    costs = compare.load_costs({"b": [tmp_path / "b1", tmp_path / "b2"], "a": [tmp_path / "none"]})
    assert costs["seconds"].tolist()[0] == 15 and math.isnan(costs["parameters"][1])
    answers = pd.concat([draw_answers(a=0.5, b=0.9), draw_answers((101, 102, 103), c=0.5)], ignore_index=True)
    compared = compare.compare_variants(answers, "a", replicates={"c": "a"})
    gains = compare.gains_table(answers, compared, costs).set_index("variant")
    assert list(gains.index) == ["a", "b", "c (replicate of a)"]
    share = table.share(answers[answers["variant"] == "b"]).iloc[0]
    accuracy, change = "all held-out problems (n = 200 on 100 units)", "difference, all held-out problems"
    assert gains.loc["b", accuracy] == format_interval(share.point, share.low, share.high)
    row = compared[(compared["variant"] == "b") & (compared["subset"] == "all")].iloc[0]
    assert gains.loc["b", change].startswith(format_interval(row.point, row.low, row.high, signed=True))
    assert (gains.loc["b", "parameters"], gains.loc["b", "seconds"]) == ("12,345", "15")
    assert gains.loc["a", change] == "reference" and gains.loc["a", "parameters"] == ""
    compare.write_table(gains, tmp_path / "new" / "gains")
    assert "reference" in (tmp_path / "new/gains.md").read_text()
    assert "tabular" in (tmp_path / "new/gains.tex").read_text()


# -- axes ---------------------------------------------------------------------------------------------------


def test_axes_are_found_from_what_varies():
    def axis(*changes: dict) -> str:
        return compare.swept_axis([load_config(seed=i, **values) for i, values in enumerate(changes)])

    assert axis({"n_soft_tokens": 4}, {"n_soft_tokens": 8, "producer": "dit"}) == "compression"
    assert axis({"variant": "context", "n_facts": 2}, {"variant": "context", "n_facts": 4}) == "capacity"
    assert axis({"train_units_share": 0.5}, {"train_units_share": 1.0}) == "generalisation"
    assert axis({"lr": 0.1}, {"lr": 0.2}) == axis({}, {}) == axis({"n_soft_tokens": 4, "lr": 0.1}, {}) == ""


def test_train_units_are_counted_as_the_task_takes_them():
    for direction, share in (("forward", 0.2), ("swapped", 1.0)):
        config = load_config(direction=direction, train_units_share=share, n_train=20_000)
        lexicon = units.make_lexicon(2)
        lexicon = units.swap_roles(lexicon) if direction == "swapped" else lexicon
        examples = units.make_examples(lexicon, "train", 20_000, 1, share=0.9, train_units_share=share)
        met = {e.unit for e in examples if e.group == "source_only"}
        assert compare.axis_settings(config)["train_units"] == len(met)


def test_a_row_of_an_axis_is_a_run_with_its_recovery_and_its_bits():
    bridged = draw_answers((1, 2), k4=0.7)
    bridged["said"] = np.where(bridged["correct"], bridged["value"], np.nan)
    bridged.loc[[399, 398], ["said", "correct"]] = [[99, False], [13, False]]  # of the message, and of no message
    told = bridged.assign(condition="target_told", correct=True)
    settings = {"n_soft_tokens": 4, "n_facts": 2, "source_view": "facts", "producer": "resampler"}
    pairs = {i: (("tob", v), ("gaf", 99)) for i, v in zip(bridged["id"], bridged["value"], strict=True)}
    blank = {"split": "test", "question": "?", "solution": "", "gold": "1"}
    tests = [Example(id=i, fact_pairs=facts, **blank) for i, facts in pairs.items()]
    along = compare.axis_table(pd.concat([bridged, told]), {"k4": settings}, {"k4": tests})
    row, run = along.iloc[1], bridged[bridged["seed"] == 2]
    assert (row.variant, row.seed, row.n_soft_tokens) == ("k4", 2, 4) and row.point == run["correct"].mean()
    bits = carried_bits(run["value"], run["said"], VALUES, run["unit"])
    assert (row.bits, row.bits_per_token_low) == (2 * bits.point, pytest.approx(2 * bits.low / 4))
    assert row.in_message == pytest.approx(run["correct"].mean() + 1 / 200) and row.in_message < row.in_message_high
    plain = compare.axis_table(pd.concat([bridged, told]), {"k4": {"n_soft_tokens": 4}}, {})
    assert "bits" not in plain and list(plain["point"]) == list(along["point"])


# -- bits ---------------------------------------------------------------------------------------------------


def channel(n: int, right: float) -> tuple[np.ndarray, np.ndarray]:
    """n values, said right with this probability and at random otherwise."""
    rng = np.random.default_rng(0)
    true, other = rng.choice(VALUES, n), rng.choice(VALUES, n)
    return true, np.where(rng.random(n) < right, true, other)


@pytest.mark.parametrize("right", [0.3, 0.9])
def test_known_channels(right):
    """A symmetric channel's information is log2 48 - H(hit) - P(miss) log2 47."""
    hit = right + (1 - right) / len(VALUES)
    miss = 1 - hit
    truth = FULL - sum(-p * math.log2(p) for p in (hit, miss) if p > 1e-12) - miss * math.log2(len(VALUES) - 1)
    bits = carried_bits(*channel(20_000, right), VALUES)
    assert bits.point == pytest.approx(truth, abs=0.05) and bits.low <= truth + 0.02


def test_noise_is_not_counted_as_information():
    """Where a plug-in estimate says 0.91 bits; perfect answers carry all that there is."""
    for right, bits in ((0.0, -0.04), (1.0, 5.58)):
        assert carried_bits(*channel(2000, right), VALUES).point == pytest.approx(bits, abs=0.02)


def test_near_misses_carry_something_and_silence_nothing():
    true, _ = channel(5000, 0.0)
    near = true + np.random.default_rng(3).integers(-1, 2, len(true))
    assert math.log2(48 / 3) - 0.1 < carried_bits(true, near, VALUES).point < math.log2(48 / 3) + 0.1
    silent = [None if i % 2 else int(v) for i, v in enumerate(true)]
    assert carried_bits(true, silent, VALUES).point == pytest.approx(FULL / 2, abs=0.1)
    assert carried_bits(true, [None] * len(true), VALUES).point == 0
    assert carried_bits(true, np.full(len(true), 10**9), VALUES).point == pytest.approx(0, abs=0.05)


def test_units_not_answers_are_what_counts():
    true, said = channel(400, 0.5)
    alone = carried_bits(true, said, VALUES)
    five = carried_bits(np.repeat(true, 5), np.repeat(said, 5), VALUES, np.repeat(np.arange(400), 5))
    assert (five.n, five.n_clusters) == (2000, 400)
    assert five.high - five.low == pytest.approx(alone.high - alone.low, rel=0.25)


def test_bits_of_what_was_not_drawn_are_refused():
    with pytest.raises(ValueError, match="value 11"):
        carried_bits([11, 12], [1, 1], VALUES)


# -- the plan's decision rule -------------------------------------------------------------------------------


def make_frame(right: int, n: int) -> pd.DataFrame:
    """`right` of `n` answers bridged, spread evenly."""
    order = np.random.default_rng(0).permutation(n)
    return pd.DataFrame({"bridged_correct": order < right, "target_correct": np.arange(n) < n / 2})


@pytest.mark.parametrize(("percent", "above", "below"), [(70, "go on", "B and C"), (65, "B and C", "A, B and C")])
def test_edges_are_exact_for_every_n(percent, above, below):
    """0.65 and 0.70 in whole numbers; 0.7 * n is not a whole number in floating point for every n."""
    for n in range(20, 320):
        lowest = -(-percent * n // 100)
        assert [decide(make_frame(right, n)).branch for right in (lowest, lowest - 1)] == [above, below]


def test_probabilities_are_those_of_a_simulated_replicate():
    """A true accuracy drawn around the run's own, a replicate drawn around that."""
    rng, n = np.random.default_rng(0), 200
    decided = decide(make_frame(129, n))  # as the first experiment
    assert (decided.accuracy.point, decided.branch, decided.target) == (0.645, "A, B and C", 0.5)
    error = stats.pooled_mean(make_frame(129, n)[["bridged_correct"]].to_numpy(float)).error
    again = rng.binomial(n, (129 / n + error * rng.standard_normal(100_000)).clip(0, 1))
    assert sum(decided.replicate.values()) == pytest.approx(1) and 0.3 < decided.differs < 0.6
    for branch, (low, high) in {"go on": (140, 201), "B and C": (130, 140), "A, B and C": (0, 130)}.items():
        assert decided.replicate[branch] == pytest.approx(((again >= low) & (again < high)).mean(), abs=0.01)


def test_only_the_letters_that_are_due_run():
    names = ["phase1", "B", "A", "C"]
    low, middle, high = (decide(make_frame(k, 200)) for k in (100, 135, 190))
    assert compare.due_variants(names, None) == compare.due_variants(names, low) == names
    assert compare.due_variants(names, middle) == ["phase1", "B", "C"]
    assert compare.due_variants(names, high) == []  # phase1 alone compares with nothing
    assert compare.due_variants(["base", "kl"], high) == ["base", "kl"]
