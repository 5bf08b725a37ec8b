"""What is drawn is what was given, with its intervals; what cannot be drawn truthfully is refused."""

import json

import numpy as np
import pandas as pd
import pytest
from figure_frames import (
    SIZES,
    accuracy_curve,
    broken,
    conditions_table,
    drawn,
    mark,
    marks,
    span,
)

from bridgekit.config import CONDITIONS
from bridgekit.results.figures_runs import (
    GROUP_CONDITIONS,
    GROUP_SUBSETS,
    curve_from_metrics,
    plot_accuracy_curve,
    plot_conditions,
    plot_groups,
)
from bridgekit.results.statistics import wilson
from bridgekit.results.style import HATCHES, LABELS


def test_accuracy_curve_draws_every_evaluation_with_its_band_and_the_baselines():
    curve, fig = accuracy_curve(), drawn("accuracy")
    bridged = curve[curve["condition"] == "bridged"]
    np.testing.assert_array_equal(mark(fig, "line:bridged").get_xydata(), bridged[["step", "accuracy"]])
    band = mark(fig, "band:bridged").get_paths()[0].vertices
    for row in bridged.itertuples():
        assert {row.low, row.high} <= set(band[band[:, 0] == row.step, 1])
    for name in ("source", "target", "union", "target_told"):
        row = curve[curve["condition"] == name].iloc[0]
        assert set(mark(fig, f"line:{name}").get_ydata()) == {row.accuracy}
        level = mark(fig, f"band:{name}")
        assert (level.get_y(), level.get_y() + level.get_height()) == pytest.approx((row.low, row.high))
    labels = {name: mark(fig, f"label:{name}").get_text() for name in ("source", "bridged")}
    assert labels == {
        "source": "source alone 0.492",
        "bridged": f"bridged {bridged['accuracy'].iloc[-1]:.3f}",
    }
    assert "n = 256 on 180 units" in fig.axes[0].get_ylabel()


def test_accuracy_curve_of_several_seeds_draws_each_and_their_mean():
    curve, fig = accuracy_curve((1, 2, 3)), drawn("accuracy_seeds")
    bridged = curve[curve["condition"] == "bridged"]
    thin = {tuple(line.get_ydata()) for line in marks(fig, "seed:bridged")}
    assert thin == {tuple(run["accuracy"]) for _, run in bridged.groupby("seed")}
    assert len(thin) == len(marks(fig, "band:bridged")) == 3
    mean = bridged.groupby("step")["accuracy"].mean()
    np.testing.assert_allclose(mark(fig, "line:bridged").get_ydata(), mean)


def test_the_mean_of_seeds_stops_where_the_first_of_them_stopped():
    curve = accuracy_curve((1, 2))
    fig = plot_accuracy_curve(curve[(curve["seed"] == 1) | (curve["step"] <= 300)])
    assert mark(fig, "line:bridged").get_xdata().max() == 300
    assert max(line.get_xdata().max() for line in marks(fig, "seed:bridged")) == 700


def test_the_first_evaluation_alone_has_its_interval_too():
    curve = accuracy_curve().query("step == 0")
    row = curve[curve["condition"] == "bridged"].iloc[0]
    assert span(mark(plot_accuracy_curve(curve), "interval:bridged")) == (row["low"], row["high"])


def test_a_baseline_that_moves_is_drawn_moving():
    curve = accuracy_curve().drop(columns="seed")
    moved = (curve["condition"] == "target") & (curve["step"] == 700)
    curve.loc[moved, ["accuracy", "low", "high"]] = [0.5, 0.45, 0.55]
    assert mark(plot_accuracy_curve(curve), "line:target").get_ydata()[-1] == 0.5


@pytest.mark.parametrize("name, subset", [("conditions", "all"), ("conditions_held", "source_only_held_unit")])
def test_conditions_are_dots_with_intervals_in_the_usual_order(name, subset):
    table, fig = conditions_table(), drawn(name)
    rows = table[table["subset"] == subset].set_index("condition")
    for y, condition in enumerate(CONDITIONS):
        row = rows.loc[condition]
        assert mark(fig, f"point:{condition}").get_xydata().tolist() == [[row["accuracy"], y]]
        assert span(mark(fig, f"interval:{condition}")) == (row["low"], row["high"])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [LABELS[c] for c in CONDITIONS]
    assert fig.axes[0].yaxis_inverted()


def test_groups_are_bars_with_intervals_and_n():
    rows = conditions_table().set_index(["condition", "subset"])
    fig = drawn("groups")
    for subset in GROUP_SUBSETS:
        for name in GROUP_CONDITIONS:
            row = rows.loc[(name, subset)]
            bar = mark(fig, f"bar:{name}:{subset}")
            assert bar.get_height() == row["accuracy"] and (bar.get_hatch() or "") == HATCHES[name]
            assert span(mark(fig, f"interval:{name}:{subset}")) == (row["low"], row["high"])
    ticks = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    for text, (n, units) in zip(ticks, SIZES.values(), strict=True):
        assert text.endswith(f"n = {n}\n{units} units")


def test_groups_leave_out_what_was_not_evaluated_unless_asked_for():
    table = conditions_table()
    fewer = table[table["condition"] != "target_told"]
    fig = plot_groups(fewer)
    assert not marks(fig, "bar:target_told:both") and marks(fig, "bar:bridged:both")
    with pytest.raises(ValueError, match="no rows for condition 'target_told'"):
        plot_groups(fewer, conditions=["bridged", "target_told"])


# Bad input: one line that names what is wrong


def without(frame, condition):
    return frame[frame["condition"] != condition]


BAD = {
    "empty curve": (lambda: plot_accuracy_curve(accuracy_curve().head(0)), "accuracy curve: no rows"),
    "no bridged": (
        lambda: plot_accuracy_curve(without(accuracy_curve(), "bridged")),
        "no rows for condition 'bridged'",
    ),
    "nan accuracy": (
        lambda: plot_accuracy_curve(broken(accuracy_curve(), "accuracy", np.nan, 2)),
        "accuracy of 'bridged' is not a number",
    ),
    "no column": (lambda: plot_accuracy_curve(accuracy_curve().drop(columns="high")), "no column 'high'"),
    "unknown condition": (
        lambda: plot_accuracy_curve(broken(accuracy_curve(), "condition", "bridge")),
        "'bridge' is not a condition",
    ),
    "two rows a step": (
        lambda: plot_accuracy_curve(accuracy_curve((1, 2)).drop(columns="seed")),
        "two rows of 'bridged' at one step",
    ),
    "no subset": (lambda: plot_conditions(conditions_table(), "sources"), "no subset 'sources'"),
    "two runs": (lambda: plot_conditions(pd.concat([conditions_table()] * 2)), "two rows for condition"),
    "nan interval": (
        lambda: plot_conditions(broken(conditions_table(), "low", np.nan), conditions_table()["subset"].iloc[0]),
        f"low of '{conditions_table()['condition'].iloc[0]}' is not a number",
    ),
    "no groups": (
        lambda: plot_groups(conditions_table().query("subset == 'all'")),
        "no knowledge group in this table",
    ),
    "condition not in a group": (
        lambda: plot_groups(conditions_table().query("condition != 'shuffled' or subset != 'both'")),
        "groups, both: no rows for condition 'shuffled'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_drawn_truthfully_is_refused_in_one_line(name):
    draw, message = BAD[name]
    with pytest.raises(ValueError) as error:
        draw()
    assert message in str(error.value) and "\n" not in str(error.value)


# The curve of a run


def metrics():
    lines = [{"step": s, "loss": 1.0 / s, "lr": 1e-3, "grad_norm": 1.0, "losses": {}, "seconds": 1} for s in (1, 50)]
    now = {"source": 0.5, "target": 0.75, "n": 256, "n_units": 64}
    for step, bridged in ((0, 0.75), (100, 0.8125), (200, 0.875)):
        lines.append({"step": step, "eval": now | {"bridged": bridged, "bridged_source_only": 0.5}})
    return lines


def test_curve_has_a_wilson_interval_over_the_units_of_each_evaluation():
    curve = curve_from_metrics(metrics())
    assert list(curve.columns) == ["step", "condition", "accuracy", "low", "high", "n", "n_units"]
    assert len(curve) == 9 and set(curve["condition"]) == {"source", "target", "bridged"}
    last = curve[(curve["step"] == 200) & (curve["condition"] == "bridged")].iloc[0]
    assert (last["low"], last["high"]) == pytest.approx(wilson(56, 64)) and last["accuracy"] == 0.875
    assert mark(plot_accuracy_curve(curve), "line:bridged").get_ydata().tolist() == [0.75, 0.8125, 0.875]


def test_curve_without_units_or_with_an_effective_n_uses_that():
    lines = metrics()
    for line in lines[2:]:
        del line["eval"]["n_units"]
    assert curve_from_metrics(lines)["low"].iloc[0] == pytest.approx(wilson(128, 256)[0])
    lines[2]["eval"]["n_effective"] = 100
    assert curve_from_metrics(lines)["low"].iloc[0] == pytest.approx(wilson(50, 100)[0])


def test_curve_is_read_from_a_file_still_being_written_and_a_resumed_step_counts_once(tmp_path):
    file = tmp_path / "metrics.jsonl"
    again = {"step": 100, "eval": {"bridged": 0.5, "source": 0.5, "target": 0.75, "n": 256, "n_units": 64}}
    lines = [json.dumps(line) for line in [*metrics(), again]]
    file.write_text("\n".join(lines) + '\n{"step": 300, "ev')
    curve = curve_from_metrics(file)
    assert curve.loc[(curve["step"] == 100) & (curve["condition"] == "bridged"), "accuracy"].tolist() == [0.5]
    assert curve["step"].is_monotonic_increasing and curve["step"].max() == 200


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no evaluation"),
        ('{"step": 1, "loss": 2.0}\n', "no evaluation"),
        ('{"step": 0, "eval": {"bridged": 0.5}}\n', "step 0 has no n"),
        ('{"step": 0, "eval": {"bridged": NaN, "n": 4}}\n', "bridged at step 0 is nan"),
        ('{"step": 0, "ev\n{"step": 1, "loss": 1.0}\n', "metrics.jsonl:1: not JSON"),
    ],
)
def test_metrics_that_give_no_curve_are_refused(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        curve_from_metrics(tmp_path / "metrics.jsonl")
