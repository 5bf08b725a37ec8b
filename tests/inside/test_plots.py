"""Figures of a look inside a bridge show the numbers they are given, with their intervals, or refuse them.

python -m pytest tests/inside/test_plots.py
"""

import numpy as np
import pandas as pd
import pytest

from bridgekit.inside import plots

TOKENS = "▁Hal ▁has ▁9 ▁s is ak ▁ Ċ".split()


def found(fig, gid):
    return fig.findobj(lambda artist: artist.get_gid() == gid)


def test_attention_shows_the_whole_matrix_of_a_short_prompt():
    weights = np.random.default_rng(0).gamma(0.3, 1, (3, len(TOKENS)))
    fig = plots.plot_attention(weights, TOKENS, names=["▁So", "9", "$"], title="Seen", most=0.4)
    (image,) = found(fig, "attention")
    np.testing.assert_array_equal(image.get_array().reshape(weights.shape), weights)
    assert image.get_clim() == (0, 0.4)  # the same scale for every question
    shown = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    assert shown == ["Hal", "has", "9", "s", "is", "ak", "\N{OPEN BOX}", plots.NEWLINE]


def test_attention_shows_the_stretch_of_a_long_prompt_that_is_read_most():
    weights = np.full((2, 100), 0.1)
    weights[:, 40:88] = 5.0
    fig = plots.plot_attention(weights, [f"t{i}" for i in range(100)])
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == [f"t{i}" for i in range(40, 88)]


@pytest.mark.parametrize("weights, message", [(np.ones((3, 7)), "3 rows, 8 tokens"), (np.ones((3, 8)) * np.nan, "NaN")])
def test_attention_that_cannot_be_true_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_attention(weights, TOKENS)


def test_cka_is_written_once_for_each_pair():
    rows = [("states", "soft tokens", 0.2), ("states", "digits", 0.55), ("soft tokens", "digits", 0.15)]
    table = pd.DataFrame(rows, columns=["a", "b", "point"])
    fig = plots.plot_cka(table)
    assert [t.get_text() for t in fig.axes[0].texts] == ["0.20", "0.55", "0.15"]
    with pytest.raises(ValueError, match="point is not a number"):
        plots.plot_cka(table.assign(point=np.nan))


def test_probe_shades_the_layers_that_the_bridge_reads():
    rows = [(x, place, n, "tens", 0.1 * x) for x in range(3) for place in ("word end", "mean") for n in plots.NOVELTY]
    table = pd.DataFrame(rows, columns=["layer", "place", "novelty", "digit", "point"])
    table = table.assign(low=0.5 * table["point"], high=1.5 * table["point"], n=90)
    fig = plots.plot_probe(table, layers=(1, 2))
    (line,) = found(fig, f"line:tens, at the word end:{plots.NOVELTY['held_unit']}")
    assert line.get_ydata().tolist() == [0, 0.1, 0.2]
    assert all(len(ax.patches) == 2 for ax in fig.axes) and fig.axes[0].get_title("left") == "tens, at the word end"
    with pytest.raises(ValueError, match="asked is not a number"):
        plots.plot_probe(table.replace({"novelty": {"held_unit": "seen"}}))
