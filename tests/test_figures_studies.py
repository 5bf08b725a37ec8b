"""Headroom, faults, recovery and attention are drawn as they were measured, or refused."""

import numpy as np
import pandas as pd
import pytest
from figure_frames import (
    TOKENS,
    attention,
    attention_classes,
    broken,
    differences,
    drawn,
    evaluation,
    faults,
    headroom,
    mark,
    marks,
    recovery,
    span,
)
from matplotlib.colors import to_hex

from bridgekit.inside.figures_attention import plot_attention, plot_attention_classes
from bridgekit.results import verdict
from bridgekit.results.figures_runs import plot_conditions, plot_groups
from bridgekit.results.figures_studies import (
    plot_differences,
    plot_faults,
    plot_headroom,
    plot_recovery,
)
from bridgekit.results.figures_text import format_table


def test_differences_are_filled_only_where_they_hold():
    fig, places = drawn("differences"), [1, 2, 3, 5]  # 0 and 4 say on how many problems the rows below are
    for y, row in zip(places, differences().itertuples(), strict=True):
        point = mark(fig, f"point:{row.label}")
        assert point.get_xydata().tolist() == [[row.difference, y]]
        assert (to_hex(point.get_markerfacecolor()) == "#ffffff") == (not row.holds)
        assert span(mark(fig, f"interval:{row.label}")) == (row.low, row.high)
    rows = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert [rows[y] for y in places] == list(differences()["label"])
    assert rows[0] == "n = 2,000 on 760 units" and rows[4] == "n = 300 on 150 units"


def test_differences_on_the_same_problems_say_so_once():
    fig = plot_differences(differences().head(3).assign(a="bridged"))
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == list(differences()["label"].head(3))
    assert fig.axes[0].get_xlabel() == "accuracy of bridged minus that of the control\n(n = 2,000 on 760 units)"


def test_the_seeds_of_a_verdict_share_a_row_named_by_its_control():
    worse = evaluation()
    worse["bridged_correct"] &= worse["index"] % 9 > 0
    found = verdict.judge([evaluation(), worse]).differences()
    fig = plot_differences(found)
    rows = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert rows[:2] == ["all held-out problems,\nn = 534 on 178 units", "target alone"]
    assert rows.count("shuffled source") == 2 and "source-only,\nn = 144 on 48 units" in rows
    for row in found.itertuples():
        assert mark(fig, f"point:{row.label}").get_xdata()[0] == row.difference
        assert span(mark(fig, f"interval:{row.label}")) == (row.low, row.high)
    target = found[found["b"] == "target"]
    low, high = target["difference"].min(), target["difference"].max()
    numbers = f"{low:+.3f} to {high:+.3f} [{target['low'].min():.3f}, {target['high'].max():.3f}]"
    assert numbers.replace("-", "\N{MINUS SIGN}") in [t.get_text() for t in fig.axes[0].texts]


def test_figures_and_tables_take_what_the_verdict_gives():
    """No frame made by hand: an evaluation goes through the statistics into every figure of it."""
    frame = evaluation()
    table, differences_found = verdict.conditions_table(frame), verdict.judge([frame]).differences()
    fig = plot_groups(table)
    right = frame.query("group == 'source_only' and novelty == 'held_unit'")["bridged_correct"].mean()
    assert mark(fig, "bar:bridged:source_only_held_unit").get_height() == pytest.approx(right)
    assert mark(plot_conditions(table), "point:union").get_xdata()[0] > 0.9
    assert "| **bridged** |" in format_table(table)
    forest = plot_differences(differences_found)
    assert forest.axes[0].get_xlabel() == "accuracy of bridged minus that of the control"
    assert marks(forest, "point:shuffled on source-only problems")
    counts = verdict.headroom(frame).counts
    assert mark(plot_headroom(counts), "bar:source_only:0").get_width() == counts["source_only"] / sum(counts.values())


def test_faults_are_bars_of_the_mean_with_every_seed_and_both_references():
    fig = drawn("faults")
    for label, rows in faults().groupby("step_label"):
        assert mark(fig, f"bar:{label}").get_width() == pytest.approx(rows["recovery"].mean())
        assert [p.get_xdata()[0] for p in marks(fig, f"point:{label}")] == list(rows["recovery"])
        spans = [span(i) for i in marks(fig, f"interval:{label}")]
        assert spans == list(zip(rows["low"], rows["high"], strict=True))
    assert mark(fig, "reference:target").get_xdata() == [0.042, 0.042]
    assert mark(fig, "reference:target_told").get_xdata() == [0.915, 0.915]


def test_recovery_draws_each_seed_of_each_producer():
    fig = drawn("recovery")
    for row in recovery().itertuples():
        name = f"{row.label}:{row.producer}:{row.seed}"
        assert mark(fig, f"point:{name}").get_xdata()[0] == row.recovery
        assert span(mark(fig, f"interval:{name}")) == (row.low, row.high)
    assert mark(fig, "reference:target_told").get_xdata() == [1.0, 1.0]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["resampler", "DiT", "constant, no source"]


def test_headroom_segments_add_up_to_one():
    for y, row in enumerate(headroom().itertuples()):
        left = 0.0
        for name in ("source_only", "both", "target_only", "neither"):
            bar = mark(drawn("headroom"), f"bar:{name}:{y}")
            assert bar.get_x() == pytest.approx(left)
            assert bar.get_width() == pytest.approx(getattr(row, name) / sum(row[2:]))
            left += bar.get_width()
        assert left == pytest.approx(1)
    assert {"7", "101", "53", "39", "470", "20"} <= {t.get_text() for t in drawn("headroom").axes[0].texts}


def test_attention_shows_the_whole_matrix_of_a_short_prompt():
    fig = drawn("attention")
    np.testing.assert_array_equal(mark(fig, "attention").get_array(), attention())
    shown = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    assert shown[:6] == ["Hal", "has", "9", "s", "is", "ak"] and shown[10] == "\N{OPEN BOX}"
    assert shown[-1] == "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"


def test_attention_shows_the_stretch_of_a_long_prompt_that_is_read_most():
    weights = np.full((2, 100), 0.1)
    weights[:, 70:75] = 5.0
    fig = plot_attention(weights, [f"t{i}" for i in range(100)], max_tokens=5)
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["t70", "t71", "t72", "t73", "t74"]
    assert fig.axes[0].get_xlabel() == f"source token (71\N{EN DASH}75 of 100, {25 / 34.5:.0%} of the attention)"


def test_attention_classes_show_share_interval_and_the_even_share():
    for row in attention_classes().itertuples():
        assert mark(drawn("attention_classes"), f"bar:{row.token_class}").get_width() == row.share
        assert span(mark(drawn("attention_classes"), f"interval:{row.token_class}")) == (row.low, row.high)
        assert mark(drawn("attention_classes"), f"uniform:{row.token_class}").get_xdata()[0] == row.uniform


BAD = {
    "beside its interval": (
        lambda: plot_differences(broken(differences(), "low", 0.5)),
        "difference of 'bridged \N{MINUS SIGN} target', 0.166 is outside its interval [0.5, 0.2]",
    ),
    "two of one name": (
        lambda: plot_differences(pd.concat([differences()] * 2)),
        "two rows for 'bridged \N{MINUS SIGN} target'",
    ),
    "faults without seed": (
        lambda: plot_faults(faults().drop(columns="seed")),
        "several rows for 'the seeds' design'",
    ),
    "two targets": (
        lambda: plot_faults(broken(faults(), "target", 0.1)),
        "column 'target' has several values",
    ),
    "unknown producer": (
        lambda: plot_recovery(broken(recovery(), "producer", "gru")),
        "unknown producer 'gru'",
    ),
    "negative count": (
        lambda: plot_headroom({"source_only": -1, "both": 3, "target_only": 1, "neither": 0}),
        "negative",
    ),
    "missing count": (lambda: plot_headroom({"source_only": 1, "both": 3}), "no column 'target_only'"),
    "attention shape": (lambda: plot_attention(attention(), TOKENS[:-1]), "(soft tokens, 19), got (16, 20)"),
    "attention nan": (lambda: plot_attention(attention() * np.nan, TOKENS), "NaN"),
    "class nan": (
        lambda: plot_attention_classes(broken(attention_classes(), "share", np.nan)),
        "share of 'unit word'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_drawn_truthfully_is_refused_in_one_line(name):
    draw, message = BAD[name]
    with pytest.raises(ValueError) as error:
        draw()
    assert message in str(error.value) and "\n" not in str(error.value)
