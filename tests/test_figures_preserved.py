"""The figures of the preserved runs draw what their tables say, and the tables what the runs say."""

import pandas as pd
import pytest
from first_generation import write_run
from test_audit import PROJECT, A, B
from test_runfolders import BRIDGED

from bridgekit.audit import figures_preserved as preserved
from bridgekit.audit.claims import judge, load_claims
from bridgekit.audit.report import CLAIMS
from bridgekit.results.figures_studies import plot_headroom


@pytest.fixture
def records(tmp_path):
    write_run(tmp_path, A, BRIDGED)
    write_run(tmp_path, B, BRIDGED | {"final": [0, 6, 7]})
    swapped = {"source_model": "org/Target", "target_model": "org/Source", "dit_pool": "attention"}
    write_run(tmp_path, "swap_20251118_192955", BRIDGED, settings=swapped)
    return preserved.load_records(tmp_path)


def artists(figure):
    return {a.get_gid(): a for ax in figure.axes for a in ax.get_children() if a.get_gid()}


def test_curves(records):
    curves = preserved.curves_table(records)
    assert len(curves) == 3 * 5 * 3
    assert curves.groupby("run")["group"].first().nunique() == 2
    assert set(curves["direction"]) == {"Source to Target", "Target to Source"}
    end = curves[(curves.run == B) & curves.final & (curves.condition == "bridged")].iloc[0]
    assert (end.accuracy, end.step, end.n) == (0.375, 80, 8) and end.low < 0.375 < end.high
    drawn = artists(preserved.plot_run_curves(curves))
    assert list(drawn[f"line:{A}"].get_ydata()) == [0, 0.25, 0.5, 0.375]
    assert "band:replicates" in drawn


def test_gains_are_counted_against_the_target(records):
    gains = preserved.gains_table(records).set_index("run")
    assert gains.loc[A, ["gained", "lost"]].tolist() == [0, 3]
    assert gains.loc[B, ["gained", "lost"]].tolist() == [2, 5]
    drawn = artists(preserved.plot_gains(gains.reset_index()))
    assert sorted(bar.get_width() for gid, bar in drawn.items() if gid.startswith("bar:lost")) == [-5, -3, -3]


def test_headroom_by_direction(records):
    table = preserved.headroom_table(records)
    assert table[["source_only", "both", "target_only", "neither"]].to_numpy().tolist() == 2 * [[0, 4, 2, 2]]
    assert plot_headroom(table).axes


def test_power_follows_the_discordance_of_the_runs(records):
    table = preserved.power_table(records)
    shares = table.groupby("comparison")["discordance"].first()
    assert shares["two runs of one setting"] == 0.75  # right on other questions in 6 of 8
    assert shares["bridged against target alone"] == pytest.approx((3 + 7) / 16)
    assert (table.groupby("comparison")["effect"].diff().dropna() < 0).all()
    drawn = preserved.plot_power(table)
    needed = f"n = {table.needed_for_2_points.min():,}"
    assert needed in [text.get_text() for text in drawn.axes[0].texts]


def test_nothing_to_draw_is_refused():
    with pytest.raises(ValueError, match="nothing to draw"):
        preserved.plot_gains(pd.DataFrame(columns=["run", "gained", "lost", "n", "p"]))


def test_the_preserved_runs_can_be_drawn():
    first = preserved.load_records(PROJECT / "preserved_data" / "first_experiments")
    assert sum(len(record.outcomes) for record in first.values()) == 13_400
    power = preserved.power_table(first).groupby("comparison")
    assert power["needed_for_2_points"].first()["two runs of one setting"] == pytest.approx(2451, abs=1)
    headroom = preserved.headroom_table(first).set_index("label")
    assert sorted(headroom["source_only"]) == [7, 59]
    claims, _ = load_claims(PROJECT / "preserved_data" / CLAIMS)
    verdicts = preserved.verdicts_table([judge(claim, first) for claim in claims])
    assert verdicts.drop(columns="document").to_numpy().sum() > 60
    assert preserved.plot_run_curves(preserved.curves_table(first)).axes
    assert preserved.plot_gains(preserved.gains_table(first)).axes
    assert preserved.plot_verdicts(verdicts).axes
