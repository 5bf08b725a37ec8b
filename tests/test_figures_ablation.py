"""Figures and table of a study are drawn as it was measured, or refused.

python -m pytest tests/test_figures_ablation.py
"""

import numpy as np
import pandas as pd
import pytest
from figure_frames import broken, mark, marks, span
from matplotlib.colors import to_hex

from bridgekit.results import gains
from bridgekit.results.figures_ablation import (
    ablation_table,
    plot_axis,
    plot_capacity,
    plot_compression,
    plot_curves,
    plot_forest,
    plot_generalisation,
)


@pytest.fixture
def compared():
    rows = []
    for i, (name, difference, holds) in enumerate([("kl", -0.2, True), ("info_nce", 0.01, False), ("b2", 0.0, False)]):
        for subset, scale, n in (("source_only_held_unit", 1.0, 393), ("all", 0.2, 2000)):
            value = difference * scale
            rows.append({
                "variant": name, "reference": "base", "subset": subset, "difference": value, "low": value - 0.05,
                "high": value + 0.05, "p": 0.001 if holds else 0.5, "n": n, "n_units": n - 100, "n_seeds": 3,
                "by_seed": [value - 0.02, value, value + 0.02], "replicates": "base" if name == "b2" else "",
                "adjusted_p": 0.0004 if holds else 1.0, "holds": holds, "smallest_effect": 0.08 + 0.01 * i,
            })  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def tabulated(compared):
    base = [
        {"variant": "base", "subset": subset, "replicates": "", "parameters": 450_000, "seconds": 88.4, "n_seeds": 3,
         "n": n, "n_units": n - 100, "accuracy": 0.81, "low": 0.78, "high": 0.84}
        for subset, n in (("source_only_held_unit", 393), ("all", 2000))
    ]  # fmt: skip
    columns = {"low": "difference_low", "high": "difference_high"}
    others = compared.rename(columns=columns).assign(accuracy=0.7, low=0.65, high=0.75, parameters=np.nan)
    return pd.concat([pd.DataFrame(base), others], ignore_index=True)


@pytest.fixture
def curves():
    rows = [
        {"variant": v, "seed": s, "step": step, "accuracy": a, "low": a - 0.05, "high": a + 0.05, "n": 500,
         "n_units": 300}
        for v, top in (("base", 0.8), ("kl", 0.6), ("prompt", 0.7)) for s in (1, 2)
        for step, a in ((0, 0.5), (50, 0.55 + s / 100), (100, top + s / 100))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def along():
    rows = []
    for producer in ("resampler", "dit"):
        for k in (1, 4, 16, 64):
            for facts in (1, 16):
                for seed in (1, 2):
                    share = 0.1 * np.log2(2 * k) + seed / 100
                    rows.append({
                        "variant": f"{producer}{k}_{facts}", "seed": seed, "producer": producer, "n_soft_tokens": k,
                        "train_units": 45 * k, "n_facts": facts, "recovery": share, "low": share - 0.1,
                        "high": share + 0.1, "n": 393, "n_units": 293, "bits": 5 * share,
                        "in_message": share + 0.2, "in_message_low": share + 0.1, "in_message_high": share + 0.3,
                        "bits_per_token": facts * share / k, "bits_per_token_low": facts * (share - 0.1) / k,
                        "bits_per_token_high": facts * (share + 0.1) / k,
                    })  # fmt: skip
    return pd.DataFrame(rows)


def test_forest_shows_effect_interval_seeds_and_what_could_not_be_found(compared):
    fig = plot_forest(compared)
    assert len(fig.axes) == 2
    for i, name in enumerate(compared["variant"].unique()):
        for row in compared[compared["variant"] == name].itertuples():
            gid = f"{name}:{row.subset}"
            point, band = mark(fig, f"point:{gid}"), mark(fig, f"band:{gid}")
            assert point.get_xydata().tolist() == [[row.difference, i]]
            assert (to_hex(point.get_markerfacecolor()) == "#ffffff") == (not row.holds)
            assert span(mark(fig, f"interval:{gid}")) == pytest.approx((row.low, row.high))
            seeds = [artist.get_xdata()[0] for artist in marks(fig, f"seed:{gid}")]
            assert seeds == pytest.approx(row.by_seed)
            assert (band.get_x(), band.get_width()) == pytest.approx((-row.smallest_effect, 2 * row.smallest_effect))
            low, high = point.axes.get_xlim()
            assert low < row.low and row.high < high  # nothing that was measured lies outside
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert names == ["kl", "info_nce", "b2 (replicate of base)"]
    assert "n = 393 on 293 units,\n3 seeds" in fig.axes[0].get_title(loc="left") + fig.axes[0].get_title()
    assert "'base'" in fig.get_supxlabel()


def test_a_variant_far_out_does_not_hide_the_others(compared):
    columns = ["difference", "low", "high"]
    ruined = compared[compared["variant"] == "kl"].assign(variant="ruined")
    ruined[columns] -= 0.9
    fig = plot_forest(pd.concat([compared, ruined], ignore_index=True))
    plain = plot_forest(compared)
    for ax, other, subset in zip(fig.axes, plain.axes, compared["subset"].unique(), strict=True):
        assert ax.get_xlim() == other.get_xlim()
        arrow = mark(fig, f"outside:ruined:{subset}")
        assert arrow.get_marker() == "<" and ax.get_xlim()[0] < arrow.get_xdata()[0] < 0
        assert not marks(fig, f"outside:kl:{subset}")


def test_forest_of_one_seed_draws_no_seeds(compared):
    one = compared.assign(by_seed=[[d] for d in compared["difference"]], n_seeds=1)
    assert not marks(plot_forest(one), "seed:kl:all")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda f: f.head(0), "no rows"),
        (lambda f: broken(f, "smallest_effect", float("nan")), "smallest_effect of 'kl'"),
        (lambda f: broken(f, "high", -0.9), "outside its interval"),
        (lambda f: f.drop(columns="adjusted_p"), "no column 'adjusted_p'"),
        (lambda f: pd.concat([f, f]), "stands twice"),
    ],
)
def test_a_forest_that_cannot_be_true_is_refused(compared, change, named):
    with pytest.raises(ValueError, match=named):
        plot_forest(change(compared))


def test_curves_have_a_panel_for_each_variant_and_the_mean_of_its_seeds(curves):
    fig = plot_curves(curves, "base")
    shown = [ax for ax in fig.axes if ax.get_visible()]
    assert [ax.get_title(loc="left") or ax.get_title() for ax in shown] == ["base", "kl", "prompt"]
    for variant, rows in curves.groupby("variant"):
        line = mark(fig, f"line:{variant}")
        assert line.get_ydata() == pytest.approx(rows.groupby("step")["accuracy"].mean().to_numpy())
        for seed, run in rows.groupby("seed"):
            assert mark(fig, f"seed:{variant}:{seed}").get_ydata().tolist() == run["accuracy"].tolist()
            band = mark(fig, f"band:{variant}:{seed}").get_paths()[0].vertices[:, 1]
            assert (band.min(), band.max()) == pytest.approx((run["low"].min(), run["high"].max()))
    assert "best mean on validation 0.815 at step 100 of 100, 2 seeds" in gains.describe_curves(curves)


def test_a_seed_that_ends_early_makes_no_jump(curves):
    short = curves[~((curves["variant"] == "kl") & (curves["seed"] == 2) & (curves["step"] == 100))]
    assert mark(plot_curves(short), "line:kl").get_xdata().tolist() == [0, 50]


def test_capacity_has_a_line_for_each_number_of_facts(along):
    rows = along[along["producer"] == "resampler"]
    fig = plot_capacity(rows)
    for column in ("recovery", "in_message", "bits_per_token"):
        for facts, name in ((1, "1 fact"), (16, "16 facts")):
            mean = rows[rows["n_facts"] == facts].groupby("n_soft_tokens")[column].mean()
            assert mark(fig, f"line:{column}:{name}").get_ydata() == pytest.approx(mean.to_numpy())
    first = rows[(rows["n_facts"] == 16) & (rows["n_soft_tokens"] == 4) & (rows["seed"] == 2)].iloc[0]
    low, high = span(mark(fig, "interval:bits_per_token:16 facts:4:2"))
    assert (low, high) == pytest.approx((first["bits_per_token_low"], first["bits_per_token_high"]))
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ["1", "4", "16", "64"]
    means = rows.groupby(["n_facts", "n_soft_tokens"])["bits_per_token"].mean()
    facts, k = means.idxmax()
    assert f"most {means.max():.3f} (n facts {facts}, n soft tokens {k})" in gains.describe_axis(rows, "capacity")


@pytest.mark.parametrize(
    ("plot", "x", "axis"),
    [(plot_generalisation, "train_units", "generalisation"), (plot_compression, "n_soft_tokens", "compression")],
)
def test_producers_are_told_apart(along, plot, x, axis):
    rows = along[along["n_facts"] == 1]
    fig = plot(rows)
    for producer, name in (("resampler", "resampler"), ("dit", "DiT")):
        own = rows[rows["producer"] == producer]
        line = mark(fig, f"line:recovery:{name}")
        assert line.get_ydata() == pytest.approx(own.groupby(x)["recovery"].mean().to_numpy())
        assert line.get_xdata() == pytest.approx(sorted(own[x].unique()), rel=0.05)  # beside each other, not elsewhere
    assert fig.axes[0].get_xscale() == "log"
    assert marks(plot_axis(rows, axis), "line:recovery:DiT")
    with pytest.raises(ValueError, match="'speed' has no figure"):
        plot_axis(rows, "speed")


def test_table_in_markdown_and_latex(tabulated, tmp_path):
    head, _, *body = ablation_table(tabulated).splitlines()
    assert "source-only, held-out units (n = 393 on 293 units)" in head
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in body]
    assert [row[0] for row in cells] == ["base", "kl", "info_nce", "b2 (replicate of base)"]
    assert cells[0][1:7] == ["3", "450,000", "88", "0.810 [0.780, 0.840]", "reference", "\N{EN DASH}"]
    assert cells[1][4:7] == ["0.700 [0.650, 0.750]", "-0.200 [-0.250, -0.150], <0.001*", "0.080"]
    assert cells[2][5] == "+0.010 [-0.040, +0.060], 1"
    written = gains.write_tables(tabulated, tmp_path / "study/table")
    assert [path.name for path in written] == ["table.md", "table.tex"]
    latex = written[1].read_text()
    assert latex.count(r"\\") == 3 + 4 - 1 and "$<$0.001" in latex and r"info\_nce" in latex and r"\textbf" not in latex
    assert {line.count(" & ") for line in latex.splitlines() if r"\\" in line} == {9}


def test_verdict_in_words_names_what_differs_and_what_could_not_be_seen(compared):
    from bridgekit.study import Study

    study = Study(name="s", base="x", variants={"base": [], "kl": []}, seeds=[1, 2, 3], reference="base")
    runs = {"base": {1: None}, "kl": {1: None}}
    said = gains.describe_verdict(study, dict.fromkeys("abc"), runs, compared)
    assert "2 of 3 runs are finished" in said and "Better than 'base': nothing." in said
    assert "kl on source-only, held-out units -0.200 [-0.250, -0.150]" in said
    assert "other 4 comparisons no difference is shown" in said and "0.090 to 0.100" in said
    assert "No ablation is due" in gains.describe_verdict(study, {}, {}, compared.head(0))
