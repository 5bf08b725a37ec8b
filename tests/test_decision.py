"""The decision rule: every branch and its edges, the preserved accuracies, and how firm a decision is.

python -m pytest tests/test_decision.py
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bridgekit.config import ConfigError
from bridgekit.results.decision import (
    A_B_AND_C,
    B_AND_C,
    GO_ON,
    append_appendix,
    branch_probabilities,
    choose_branch,
    decide,
    decide_run,
    due_variants,
    standard_error,
)

FIRST = Path(__file__).parent.parent / "preserved_data/first_experiments"


def make_frame(right, n, target=0.5, units=None):
    """`right` of `n` answers bridged, spread evenly."""
    order = np.random.default_rng(0).permutation(n)
    return pd.DataFrame({
        "index": range(n), "bridged_correct": order < right, "target_correct": np.arange(n) < target * n,
        "source_correct": np.arange(n) % 2 == 0, **({"unit": units} if units is not None else {}),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("right", "n", "branch"),
    [
        (140, 200, GO_ON), (700, 1000, GO_ON), (7, 10, GO_ON), (200, 200, GO_ON), (1400, 2000, GO_ON),
        (139, 200, B_AND_C), (699, 1000, B_AND_C), (130, 200, B_AND_C), (13, 20, B_AND_C), (1300, 2000, B_AND_C),
        (1399, 2000, B_AND_C), (695, 1000, B_AND_C), (129, 200, A_B_AND_C), (1299, 2000, A_B_AND_C),
        (0, 200, A_B_AND_C), (649999, 1000000, A_B_AND_C),
    ],
)  # fmt: skip
def test_every_branch_and_its_edges(right, n, branch):
    """0.65, 0.695 and 0.70 in whole numbers; 0.7 * n is not a whole number in floating point for every n."""
    assert choose_branch(right, n) == branch
    assert decide(make_frame(right, n), "r").branch == branch if n <= 2000 else True


def test_edges_are_exact_for_every_n():
    for n in range(1, 3000):
        lowest = -(-70 * n // 100)
        assert choose_branch(lowest, n) == GO_ON and choose_branch(lowest - 1, n) != GO_ON
        lowest = -(-65 * n // 100)
        assert choose_branch(lowest, n) != A_B_AND_C and choose_branch(lowest - 1, n) == A_B_AND_C


@pytest.mark.parametrize(("right", "n"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_counts_are_refused(right, n):
    with pytest.raises(ValueError, match="impossible"):
        choose_branch(right, n)


@pytest.mark.parametrize(
    ("run", "right", "branch"),
    [
        ("phase1_full_20251116_201212", 129, A_B_AND_C),
        ("phase1_20251116_142710", 129, A_B_AND_C),
        ("ablB_20251116_234242", 125, A_B_AND_C),
        ("ablC_20251117_013909", 131, B_AND_C),
        ("phase2_swap_20251118_192955", 52, A_B_AND_C),
    ],
)
def test_the_preserved_runs_of_the_first_experiments(run, right, branch):
    decided = decide_run(FIRST / run)
    assert (decided.run, decided.right, decided.accuracy.n, decided.branch) == (run, right, 200, branch)
    assert decided.outcome == "harms" and "The bridge harms" in decided.text
    assert f"{right} of 200" in decided.text and f"{decided.differs:.2f}" in decided.text
    if not run.startswith("phase2"):  # there target-alone has 0.770, and a bridge that does nothing would go on
        assert "target alone has 0.770, so a bridge that changes nothing goes on" in decided.text


def test_four_replicates_were_sent_to_two_branches():
    """What the probabilities say of one run, its own replicates did: one in four was sent elsewhere."""
    names = ["phase1_full_20251116_201212", "phase1_20251116_142710", "ablB_20251116_234242", "ablC_20251117_013909"]
    branches = [decide_run(FIRST / name).branch for name in names]
    assert sorted(branches) == [A_B_AND_C] * 3 + [B_AND_C]
    assert 0.3 < decide_run(FIRST / names[0]).differs < 0.6


def test_a_run_without_a_final_evaluation_is_refused():
    with pytest.raises(ConfigError, match="213543 has no final evaluation"):
        decide_run(FIRST / "phase2_swap_20251118_213543")
    with pytest.raises(ConfigError, match="no such run folder"):
        decide_run(FIRST / "none")


def test_probabilities_are_those_of_a_simulated_repetition():
    """A true accuracy drawn around the run's own, a repetition drawn around that."""
    rng, n, right = np.random.default_rng(0), 200, 129
    deviation = standard_error(pd.Series(np.arange(n) < right), None)
    true = right / n + deviation * rng.standard_normal(100_000)
    again = rng.binomial(n, true.clip(0, 1))
    chances = branch_probabilities(right, n, deviation)
    assert sum(chances.values()) == pytest.approx(1)
    for branch, (low, high) in {GO_ON: (140, 201), B_AND_C: (130, 140), A_B_AND_C: (0, 130)}.items():
        assert chances[branch] == pytest.approx(((again >= low) & (again < high)).mean(), abs=0.01)


def test_problems_about_one_unit_count_less():
    right = pd.Series(np.repeat(np.arange(100) < 65, 10))
    alone = standard_error(right, pd.Series(np.arange(1000)))
    together = standard_error(right, pd.Series(np.repeat(np.arange(100), 10)))
    assert together == pytest.approx(alone * 10**0.5, rel=0.02)
    assert standard_error(pd.Series([True] * 50), None) > 0


def test_only_the_letters_that_are_due_run():
    names = ["phase1", "B", "A", "C"]
    low, middle, high = (decide(make_frame(k, 200), "r") for k in (100, 135, 190))
    assert due_variants(names, None) == names
    assert due_variants(names, low) == names
    assert due_variants(names, middle) == ["phase1", "B", "C"]
    assert due_variants(names, high) == []  # phase1 alone compares with nothing
    assert due_variants(["base", "kl"], high) == ["base", "kl"]


def test_the_appendix_keeps_what_others_wrote(tmp_path):
    report = tmp_path / "runs/REPORT.md"
    append_appendix(report, "one", "first words")
    report.write_text(report.read_text() + "\nwritten by hand\n")
    append_appendix(report, "two", "of another study")
    once = append_appendix(report, "one", "second words").read_text()
    assert "first words" not in once and once.count("second words") == 1
    assert "of another study" in once and "written by hand" in once and "## Latest runs" in once
    assert append_appendix(report, "one", "second words").read_text() == once
