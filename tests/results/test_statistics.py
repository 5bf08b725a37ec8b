"""Intervals, tests and power against published values, scipy and statsmodels; coverage by simulation.

python -m pytest tests/results/test_statistics.py    a sample of the cells
python tests/results/test_statistics.py              the table at the top of results/statistics.py (fifteen minutes)
"""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import statsmodels.stats.api as sms
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.power import normal_sample_size_one_tail

from bridgekit.results import statistics as stats
from bridgekit.results.statistics import clustered_proportion, minimum_detectable_effect, n_for_effect, wilson


def frame_of(bridged, target, unit=None) -> pd.DataFrame:
    frame = pd.DataFrame({"bridged_correct": np.asarray(bridged, bool), "target_correct": np.asarray(target, bool)})
    return frame if unit is None else frame.assign(unit=unit)


def compare(frame: pd.DataFrame, n_boot: int = 10_000):
    return stats.paired_difference(frame, "bridged", "target", n_boot)


def draw_answers(rng, n_units: int, rates: tuple, correlation: float) -> pd.DataFrame:
    """Units of 2 to 4 problems; each draws its own rates of (gained, lost, both right, both wrong)."""
    unit = np.repeat(np.arange(n_units), rng.integers(2, 5, n_units))
    unit_rates = np.tile(rates, (n_units, 1))
    if correlation:
        unit_rates = rng.dirichlet(np.maximum(np.array(rates) * (1 / correlation - 1), 1e-9), n_units)
    kind = (rng.random(len(unit))[:, None] > unit_rates[unit, :3].cumsum(axis=1)).sum(axis=1)
    return frame_of((kind == 0) | (kind == 2), (kind == 1) | (kind == 2), unit)


# -- one condition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, n, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_equals_newcombes_published_table(k, n, low, high):
    assert wilson(k, n) == pytest.approx((low, high), abs=5e-5)


def test_independent_questions_have_wilsons_interval_and_all_right_is_not_certainty():
    right = [True] * 129 + [False] * 71  # the first experiment
    share = clustered_proportion(right)
    assert str(share) == "0.645 [0.577, 0.708]" and (share.low, share.high) == wilson(129, 200)
    assert clustered_proportion(right, [None] * 200) == share
    assert clustered_proportion([1] * 300, list(range(100)) * 3).low == pytest.approx(wilson(100, 100)[0], abs=0.002)
    share = clustered_proportion([1, 1, 1], ["u", "u", "u"])
    assert (share.low, share.high) == (0, 1)


def test_a_mean_of_independent_numbers_has_students_interval_and_copies_count_once():
    numbers = np.random.default_rng(0).normal(3, 2, 50)
    mean, four = stats.clustered_mean(numbers), stats.clustered_mean(np.repeat(numbers, 4), np.repeat(range(50), 4))
    theirs = scipy.stats.t.interval(0.95, 49, numbers.mean(), scipy.stats.sem(numbers))
    assert (mean.low, mean.high) == pytest.approx(theirs) and (four.low, four.high) == pytest.approx(theirs)
    assert (four.n, four.n_clusters) == (200, 50) and stats.clustered_mean(numbers, [None] * 50) == mean
    assert str(stats.clustered_mean([1.0, 2.0], ["u", "u"])) == "1.500 [-inf, inf]"


def test_equal_answers_of_several_seeds_have_an_uncertain_difference_all_the_same():
    same = stats.pooled_mean(np.zeros((200, 1)), np.arange(200), lowest=-1.0)
    assert same.point == 0 and 2 / 200 < same.high < 4 / 200 and same.p == 1
    assert stats.pooled_mean(np.ones((200, 3)), np.arange(200)).high == 1


@pytest.mark.parametrize(("n_seeds", "deviation"), [(1, 0.0), (3, 0.0), (3, 0.05), (5, 0.1)])
def test_pooled_intervals_hold_for_other_problems_and_other_seeds(n_seeds, deviation):
    """The differences of a seed deviate; the interval must cover the true difference of 0.1 about 95 times in 100."""
    rng, hits, n = np.random.default_rng(1), 0, 300
    for _ in range(n):
        shift = 0.1 + deviation * rng.standard_normal(n_seeds)
        unit = np.repeat(rng.random((75, 1)), 2, axis=0) < 0.5  # half the units are right or wrong together
        draws = [np.where(unit, np.repeat(rng.random((75, 1)), 2, axis=0), rng.random((150, 1))) for _ in "ab"]
        values = (draws[0] < 0.6 + shift).astype(float) - (draws[1] < 0.6)
        found = stats.pooled_mean(values, np.repeat(np.arange(75), 2), lowest=-1.0)
        hits += found.low <= 0.1 <= found.high
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0)
    assert 0.91 <= hits / n <= 1.0, hits / n


# -- paired tests -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("b, c", [(0, 0), (1, 0), (3, 9), (11, 36), (400, 460)])
def test_mcnemar_equals_statsmodels(b, c):
    assert stats.mcnemar_exact(b, c) == pytest.approx(mcnemar([[7, b], [c, 9]], exact=True).pvalue, rel=1e-9)


def test_holm_equals_statsmodels_and_keeps_the_order():
    p = {"e": 0.04, "a": 0.01, "d": 0.03, "b": 0.01, "c": 0.9, "f": 0.5}
    assert list(stats.holm(p)) == list(p) and stats.holm({}) == {}
    assert list(stats.holm(p).values()) == pytest.approx(sms.multipletests(list(p.values()), method="holm")[1])


def test_difference_equals_scipys_bootstrap_on_independent_questions():
    rng = np.random.default_rng(3)
    frame = frame_of(rng.random(800) < 0.7, rng.random(800) < 0.6)
    found, moved = compare(frame), frame["bridged_correct"].astype(float) - frame["target_correct"]
    theirs = scipy.stats.bootstrap((moved,), np.mean, method="percentile", n_resamples=10_000, rng=rng)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.0035)
    assert found.p == pytest.approx(2 * scipy.stats.norm.sf(abs(moved.mean()) / moved.sem()), abs=0.002)
    assert (found.difference, found.gained, found.lost) == (moved.mean(), (moved > 0).sum(), (moved < 0).sum())
    assert found.mcnemar_p == stats.mcnemar_exact(found.gained, found.lost)


def test_no_discordant_pair_is_the_rule_of_three_and_not_certainty():
    same = compare(frame_of([1] * 150 + [0] * 50, [1] * 150 + [0] * 50))
    assert same.high == -same.low == pytest.approx(3 / 200, rel=0.05)
    assert (same.difference, same.p, same.mcnemar_p) == (0, 1, 1)
    # in 50 units of 4 the unit is what counts: three units may still differ whole
    units = compare(frame_of([1] * 200, [1] * 200, np.repeat(np.arange(50), 4)))
    assert units.high == pytest.approx(3 / 50, rel=0.1)
    everything = compare(frame_of([1] * 200, [0] * 200))
    assert everything.high == 1 and 1 - everything.low == pytest.approx(6 / 200, rel=0.05)


def test_ratio_is_the_share_of_the_ceiling():
    frame = frame_of([1] * 60 + [0] * 40, [1] * 90 + [0] * 10, np.repeat(np.arange(50), 2))
    ratio = stats.paired_ratio(frame, "bridged", "target")
    assert ratio.point == pytest.approx(60 / 90) and 0.5 < ratio.low < 0.6 and 0.75 < ratio.high < 0.85
    perfect = stats.paired_ratio(frame.assign(bridged_correct=frame["target_correct"]), "bridged", "target")
    assert perfect.low < 1 < perfect.high
    rare = frame_of([1] + [0] * 99, [1] + [0] * 99)
    assert stats.paired_ratio(rare, "bridged", "target").high == np.inf


def test_difference_is_antisymmetric_and_blind_to_order_and_labels():
    frame = draw_answers(np.random.default_rng(4), 20, (0.3, 0.1, 0.4, 0.2), 0.3)
    found, back = compare(frame, 200), stats.paired_difference(frame, "target", "bridged", 200)
    assert (back.low, back.difference, back.high) == (-found.high, -found.difference, -found.low)
    assert (back.p, back.gained, back.lost) == (found.p, found.lost, found.gained)
    other = compare(frame.assign(unit=-frame["unit"]).sample(frac=1, random_state=0), 200)
    assert (other.low, other.high, other.p) == pytest.approx((found.low, found.high, found.p), abs=1e-9)


# -- power and correlation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("effect, discordance", [(0.02, 0.125), (0.02, 0.235), (0.1, 0.3), (0.1, 0.1), (0.3, 0.9)])
def test_sample_size_equals_statsmodels(effect, discordance):
    spread = np.sqrt(discordance - effect**2)
    theirs = normal_sample_size_one_tail(effect, 0.8, 0.05 / 2, np.sqrt(discordance), spread)
    n = n_for_effect(effect, discordance)
    assert n == np.ceil(theirs) and n == n_for_effect(-effect, discordance)
    assert minimum_detectable_effect(n, discordance) == pytest.approx(effect, rel=0.02)


def test_smallest_effect_counts_units_where_problems_are_copies():
    assert minimum_detectable_effect(400, 0.3, 100, icc=1) == minimum_detectable_effect(100, 0.3)
    assert minimum_detectable_effect(400, 0.3, 100, icc=0) == minimum_detectable_effect(400, 0.3)
    assert minimum_detectable_effect(3, 0.3) == 1  # three questions find nothing


def test_correlation_equals_shrout_and_fleiss_and_is_clipped_and_cautious():
    ratings = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]])
    assert stats.intraclass_correlation(ratings.ravel(), np.repeat(range(6), 4)) == pytest.approx(0.1657, abs=5e-5)
    frame = draw_answers(np.random.default_rng(0), 4000, (0.5, 0.0, 0.0, 0.5), 0.4)
    assert stats.intraclass_correlation(frame["bridged_correct"], frame["unit"]) == pytest.approx(0.4, abs=0.03)
    assert stats.intraclass_correlation([0, 1] * 20, np.repeat(np.arange(20), 2)) == 0
    assert stats.intraclass_correlation([0, 1, 1], [1, 2, 3]) == 0
    assert stats.intraclass_correlation([0, 0, 1, 1], [1, 1, 2, 2]) == 1
    assert stats.intraclass_correlation([1, 1, 1, 1], [1, 1, 2, 2]) == 1


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: wilson(3, 2), "3 right of 2 is impossible"),
        (lambda: n_for_effect(0.3, 0.2), "effect <= discordance"),
        (lambda: minimum_detectable_effect(10, 0.2, 11), "n_clusters=11"),
        (lambda: clustered_proportion([]), "`correct` misses 0 of 0 values"),
        (lambda: stats.clustered_mean([1.0, np.inf]), "`values` misses 1 of 2"),
        (lambda: clustered_proportion([1, None, 0]), "`correct` misses 1 of 3 values"),
        (lambda: clustered_proportion([0.5, 1.0]), "only right .True. and wrong"),
        (lambda: stats.paired_difference(frame_of([1, 0], [0, 0]), "zero", "zero"), "compared with itself"),
        (lambda: stats.paired_difference(frame_of([1, 0], [0, 0]), "bridged", "zero"), "`zero` was not evaluated"),
        (lambda: stats.paired_ratio(frame_of([1, 0, 1], [0, 0, 0]), "bridged", "target"), "`target` has none of 3"),
        (lambda: compare(frame_of([1, 0], [0, 0], ["u", "u"])), "all 2 questions are one `unit`"),
    ],
)
def test_what_cannot_be_counted_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- coverage -----------------------------------------------------------------------------------------------


def plain_percentile(frame: pd.DataFrame, student: bool = False) -> tuple[float, float]:
    """The textbook cluster bootstrap, with the tails of the normal or of Student's t."""
    moved = frame["bridged_correct"].astype(int) - frame["target_correct"]
    sums, sizes = np.bincount(frame["unit"], moved), np.bincount(frame["unit"])
    n_units, tail = len(sizes), 0.025
    drawn = np.random.default_rng(0).integers(0, n_units, (1000, n_units))
    if student:
        tail = scipy.stats.norm.cdf(scipy.stats.t.ppf(0.025, n_units - 1) * np.sqrt(n_units / (n_units - 1)))
    return tuple(np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [tail, 1 - tail]))


def ends(found) -> tuple[float, float]:
    return found.low, found.high


INTERVALS = {  # the rows of the table
    "difference: plain percentile over clusters": plain_percentile,
    "difference: with Student tails": lambda frame: plain_percentile(frame, student=True),
    "difference: and pseudo-clusters (used)": lambda frame: ends(compare(frame, 500)),
    "ratio: the same (used)": lambda frame: ends(stats.paired_ratio(frame, "bridged", "target", 500)),
    "proportion: Wilson on the questions": lambda frame: wilson(int(frame["bridged_correct"].sum()), len(frame)),
    "proportion: Wilson on effective n (used)": lambda f: ends(clustered_proportion(f["bridged_correct"], f["unit"])),
    "difference: over questions": lambda frame: ends(compare(frame.drop(columns="unit"), 500)),
}


def share_covered(names, n_units: int, rates: tuple, correlation: float, n_draws: int) -> dict[str, float]:
    """How often each of these intervals holds the truth."""
    rng, hits, share = np.random.default_rng(0), dict.fromkeys(names, 0), rates[0] + rates[2]
    truth = {"difference": rates[0] - rates[1], "proportion": share, "ratio": share / (rates[1] + rates[2])}
    for _ in range(n_draws):
        frame = draw_answers(rng, n_units, rates, correlation)
        for name in names:
            low, high = INTERVALS[name](frame)
            hits[name] += low - 1e-12 <= truth[name.split(":")[0]] <= high + 1e-12
    return {name: hit / n_draws for name, hit in hits.items()}


DRAWS = 250
MARGIN = 3.3 * np.sqrt(0.95 * 0.05 / DRAWS)  # a right interval falls outside once in a thousand runs


@pytest.mark.parametrize("n_units", [60, 300])
def test_intervals_cover_at_their_rate_when_problems_share_units(n_units):
    names = [name for name in INTERVALS if "used" in name or "questions" in name]
    for name, covered in share_covered(names, n_units, (0.25, 0.1, 0.35, 0.3), 0.5, DRAWS).items():
        if "used" in name:
            assert covered == pytest.approx(0.95, abs=MARGIN), name
        else:  # so the simulation can fail: intervals over questions do not cover here
            assert covered < 0.95 - 2 * MARGIN, name


@pytest.mark.parametrize("rates", [(0.97, 0.005, 0.02, 0.005), (0.05, 0.0, 0.9, 0.05)], ids=["nearly all", "few"])
def test_intervals_still_cover_where_nearly_nothing_or_nearly_everything_moves(rates):
    plain, _, difference, _, _, proportion, _ = INTERVALS
    covered = share_covered([plain, difference, proportion], 40, rates, 0.5, DRAWS)
    assert covered[difference] > 0.95 - MARGIN and covered[proportion] > 0.95 - MARGIN
    assert covered[plain] < 0.95 - MARGIN  # what the pseudo-clusters are for


def print_coverage_table(n_draws: int = 1000) -> None:
    rates_of = [(0.3, 0.1, 0.4, 0.2), (0.06, 0.06, 0.5, 0.38), (0.8, 0.01, 0.14, 0.05), (0.97, 0.005, 0.02, 0.005)]
    rates_of += [(0.05, 0, 0.9, 0.05), (0.015, 0.015, 0.035, 0.935)]
    found = {name: [] for name in list(INTERVALS)[:-1]}
    for cell in itertools.product((40, 300), rates_of, (0, 0.3, 0.8)):
        ceiling = cell[1][1] + cell[1][2]  # a share of next to nothing is not asked for
        names = [name for name in found if ceiling > 0.3 or not name.startswith("ratio")]
        for name, covered in share_covered(names, *cell, n_draws).items():
            found[name].append((covered, cell))
    for name, cells in found.items():
        print(f"{name}: mean {np.mean([share for share, _ in cells]):.3f}, lowest {min(cells)[0]:.3f} {min(cells)[1]}")


if __name__ == "__main__":
    print_coverage_table()
