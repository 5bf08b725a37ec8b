"""What is drawn is what was given, at its true place, with its interval; what cannot be drawn truthfully is refused.

python -m pytest tests/results/test_plots.py
"""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from bridgekit.results import plots
from bridgekit.results.plots import lines, rows
from bridgekit.results.statistics import wilson
from bridgekit.results.style import COLORS, COLUMN, OTHER, PAGE


def marks(fig, gid):
    return fig.findobj(lambda artist: artist.get_gid() == gid)


def mark(fig, gid):
    (only,) = marks(fig, gid)
    return only


def span(artist):
    """(low, high) of a drawn interval, whichever way it runs."""
    (segment,) = artist.get_segments()
    return tuple(segment[:, np.ptp(segment, axis=0).argmax()])


def is_open(artist):
    return to_hex(artist.get_markerfacecolor()) == "#ffffff"


def names_of(ax):
    return [label.get_text() for label in ax.get_yticklabels()]


def legend_of(fig):
    return [text.get_text() for text in fig.legends[0].get_texts()]


FRAME = pd.DataFrame(
    [("one", "a", 0.5, 0.4, 0.6, 10), ("two", "a", 0.7, 0.6, 0.8, 10), ("one", "b", 0.2, 0.1, 0.3, 10)],
    columns=["name", "kind", "point", "low", "high", "n"],
)


# The primitives


def test_rows_draw_every_point_and_interval_in_the_frame_s_order():
    fig = rows(FRAME, "name", color="kind", title="Seen")
    assert names_of(fig.axes[0]) == ["one", "two"] and fig.axes[0].yaxis_inverted()
    for row in FRAME.itertuples():
        gid = f"{row.name}:{row.kind}"
        assert mark(fig, f"point:{gid}").get_xdata()[0] == row.point
        assert span(mark(fig, f"interval:{gid}")) == (row.low, row.high)
        assert mark(fig, f"point:{gid}").get_color() == OTHER["ab".index(row.kind)]
    assert mark(fig, "point:one:a").get_ydata()[0] < 0 < mark(fig, "point:one:b").get_ydata()[0]  # one row, apart
    assert legend_of(fig) == ["a", "b"]
    assert fig.get_supxlabel() == "(n = 10)" and fig.axes[0].get_xlim() == (-0.02, 1.02)
    assert [text.get_text() for text in fig.axes[0].texts] == ["0.500", "0.700", "0.200"]


def test_conditions_have_their_own_order_and_colours_without_being_asked():
    frame = FRAME.head(2).assign(name=["bridged", "source"])
    fig = rows(frame, "name", references={"target": 0.4}, numbers="interval")
    assert names_of(fig.axes[0]) == ["source alone", "bridged"]
    assert mark(fig, "point:bridged").get_color() == COLORS["bridged"]
    assert mark(fig, "reference:target").get_xdata() == [0.4, 0.4] and legend_of(fig) == ["target alone 0.400"]
    assert "0.500 [0.400, 0.600]" in [text.get_text() for text in fig.axes[0].texts]


def test_panels_stand_side_by_side_and_say_n_where_it_differs():
    fig = rows(FRAME.assign(n=[10, 10, 30]), "name", panel="kind")
    assert [ax.get_title("left") for ax in fig.axes] == ["a\nn = 10", "b\nn = 30"] and fig.get_figwidth() == PAGE
    many = pd.concat([FRAME.head(2).assign(panel=f"p{i}") for i in range(7)])
    assert [ax.get_gridspec().ncols for ax in rows(many, "name", panel="panel").axes] == [3] * 7


def test_lines_are_drawn_at_their_true_x_with_the_seeds_and_their_mean():
    frame = pd.DataFrame({"x": [1, 2, 1, 2], "seed": [1, 1, 2, 2], "point": [0.1, 0.3, 0.3, 0.5]})
    frame = pd.concat([frame.assign(kind=k, point=frame["point"] + i / 10) for i, k in enumerate("ab")])
    frame = frame.assign(low=frame["point"] - 0.1, high=frame["point"] + 0.1)
    for bars in (False, True):
        fig = lines(frame, "x", color="kind", bars=bars)
        for i, kind in enumerate("ab"):
            line = mark(fig, f"line:{kind}")
            assert line.get_xdata().tolist() == [1, 2]  # the same places for both: nothing is moved along x
            assert line.get_ydata() == pytest.approx([0.2 + i / 10, 0.4 + i / 10])
            assert len(marks(fig, f"seed:{kind}")) == len(marks(fig, f"{'interval' if bars else 'band'}:{kind}")) == 2
    short = frame[(frame["seed"] == 1) | (frame["x"] == 1)]
    assert mark(lines(short, "x", color="kind"), "line:a").get_xdata().tolist() == [1]  # no jump where a seed ends
    fig = lines(short, "x", color="kind", bars=True)
    assert mark(fig, "fewer:a").get_xdata().tolist() == [2] and "open: not every seed" in legend_of(fig)
    with pytest.raises(ValueError, match="the seeds of 'a' share no x"):
        lines(frame[frame["seed"] == frame["x"]], "x", color="kind")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: f.head(0), "no rows"),
        (lambda f: f.drop(columns="point"), "no column 'point'"),
        (lambda f: f.assign(point=[0.5, np.nan, 0.2]), "'two, a': point is not a number"),
        (lambda f: f.assign(high=[0.6, 0.65, 0.3]), "'two, a': point is outside its interval"),
        (lambda f: pd.concat([f, f]), "'one, a': two rows of this name"),
    ],
)
def test_what_cannot_be_drawn_truthfully_is_refused(change, message):
    for draw in (lambda f: rows(f, "name", color="kind"), lambda f: lines(f, "name", color="kind")):
        with pytest.raises(ValueError) as error:
            draw(change(FRAME))
        assert message in str(error.value).replace("a, one", "one, a").replace("a, two", "two, a")


# The figures of a run or a study


def test_forest_shows_effect_interval_seeds_and_what_could_not_be_found(compared):
    fig = plots.plot_forest(compared)
    for row in compared.itertuples():
        name = {"kl": "kl", "info_nce": "info nce", "b2": "b2 (again base)"}[row.variant]
        gid = f"{row.subset}:{name}:{row.holds}"
        assert mark(fig, f"point:{gid}").get_xdata()[0] == row.point
        assert is_open(mark(fig, f"point:{gid}")) == (not row.holds)
        assert [dot.get_xdata()[0] for dot in marks(fig, f"seed:{gid}")] == pytest.approx(row.by_seed)
        band = mark(fig, f"band:{gid}")
        assert (band.get_x(), band.get_width()) == pytest.approx((-row.smallest_effect, 2 * row.smallest_effect))
    ruined = compared[compared["variant"] == "kl"].assign(variant="ruined")
    ruined[["point", "low", "high"]] -= 0.9
    both = plots.plot_forest(pd.concat([compared, ruined]))
    assert [ax.get_xlim() for ax in both.axes] == [ax.get_xlim() for ax in fig.axes]  # it does not hide the others
    assert mark(both, "outside:all:ruined:True").get_marker() == "<"


def test_axes_of_a_study_show_chance_and_which_marks_lack_a_seed(along):
    single = along[along["n_facts"] == 1]
    fig = plots.plot_axis(single, "compression")
    for producer, part in single.groupby("producer"):
        mean = part.groupby("n_soft_tokens")["point"].mean()
        assert mark(fig, f"line:{producer}").get_xydata() == pytest.approx(np.array(list(mean.items())))
        assert mark(fig, f"fewer:{producer}").get_xdata().tolist() == [64]
    resampler = along[along["producer"] == "resampler"]
    fig = plots.plot_axis(resampler, "capacity")
    assert set(mark(fig, "reference:16").get_ydata()) == {1 / 16}  # guessing among sixteen facts
    bits = resampler[resampler["n_facts"] == 16].groupby("n_soft_tokens")["bits_per_token"].mean()
    assert mark(fig, "line:bits per soft token:16").get_ydata() == pytest.approx(bits.to_numpy())


def test_headroom_segments_add_up_to_one():
    counts, left = {"source_only": 7, "both": 101, "target_only": 53, "neither": 0}, 0.0
    fig = plots.plot_headroom(pd.DataFrame([counts]))
    for name, count in counts.items():
        bar = mark(fig, f"bar:{name}")
        assert bar.get_x() == pytest.approx(left) and bar.get_width() == pytest.approx(count / 161)
        left += bar.get_width()
    assert {t.get_text() for t in fig.axes[0].texts} == {"7", "101", "53", ""} and names_of(fig.axes[0]) == ["n = 161"]


def every_figure(conditions, compared, along):
    yield plots.plot_conditions(conditions)
    yield plots.plot_groups(conditions)
    yield plots.plot_forest(compared)
    yield plots.plot_axis(along[along["n_facts"] == 1], "compression")
    yield plots.plot_axis(along[along["producer"] == "dit"], "capacity")
    yield plots.plot_differences(compared.assign(control=compared["variant"].replace({"kl": "constant_natural"})))
    yield plots.plot_headroom(pd.DataFrame([{"source_only": 470, "both": 610, "target_only": 900, "neither": 20}]))


def test_no_text_is_small_clipped_or_on_another(monkeypatch, conditions, compared, along):
    draw, boxes = matplotlib.text.Text.draw, {}

    def recording_draw(text, renderer, *args, **kwargs):
        if text.get_visible() and text.get_text().strip():
            boxes[text] = matplotlib.text.Text.get_window_extent(text, renderer)
        return draw(text, renderer, *args, **kwargs)

    for fig in every_figure(conditions, compared, along):
        monkeypatch.setattr(matplotlib.text.Text, "draw", recording_draw)
        boxes.clear()
        fig.draw_without_rendering()
        monkeypatch.setattr(matplotlib.text.Text, "draw", draw)
        assert len(boxes) >= 8 and fig.get_figwidth() in (COLUMN, PAGE)
        assert min(text.get_fontsize() for text in boxes) >= 7 and matplotlib.pyplot.get_fignums() == []
        for i, (text, box) in enumerate(boxes.items()):
            whole = fig.bbox.padded(1)
            assert whole.contains(*box.min) and whole.contains(*box.max), text
            for other in list(boxes)[:i]:
                assert not box.padded(-1.5).overlaps(boxes[other].padded(-1.5)), (text, other)


# The curve of a run


def write_metrics(folder, *more):
    """Three evaluations of 256 problems on 64 units between lines of losses, then the lines `more`."""
    lines_of, now = [{"step": 1, "loss": 1.0}], {"source": 0.5, "target": 0.75, "n": 256, "n_units": 64}
    for step, bridged in ((0, 0.75), (100, 0.8125), (200, 0.875)):
        lines_of.append({"step": step, "eval": now | {"bridged": bridged, "bridged_source_only": 0.5}})
    path = folder / "metrics.jsonl"
    path.write_text("\n".join([*map(json.dumps, lines_of), *more]))
    return path


def test_curve_has_a_wilson_interval_over_units_or_the_effective_n(tmp_path):
    found = plots.load_curve(write_metrics(tmp_path))
    assert list(found.columns) == ["step", "condition", "point", "low", "high", "n", "n_units"] and len(found) == 9
    last = found[(found["step"] == 200) & (found["condition"] == "bridged")].iloc[0]
    assert (last["low"], last["high"]) == pytest.approx(wilson(56, 64)) and last["point"] == 0.875
    effective = json.dumps({"step": 300, "eval": {"bridged": 0.5, "n": 256, "n_units": 64, "n_effective": 100}})
    again = json.dumps({"step": 100, "eval": {"bridged": 0.5, "n": 256, "n_units": 64}})
    found = plots.load_curve(write_metrics(tmp_path, effective, again, '{"step": 400, "ev'))  # still being written
    assert found["low"].iloc[-1] == pytest.approx(wilson(50, 100)[0]) and found["step"].is_monotonic_increasing
    assert found.loc[(found["step"] == 100) & (found["condition"] == "bridged"), "point"].tolist() == [0.5]


@pytest.mark.parametrize(
    "text, message",
    [("", "no evaluation"), ('{"step": 0, "ev\n{"step": 1, "loss": 1.0}\n', "metrics.jsonl:1: not JSON")],
)
def test_metrics_that_give_no_curve_are_refused(tmp_path, text, message):
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        plots.load_curve(tmp_path / "metrics.jsonl")
