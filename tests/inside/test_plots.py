"""Figures of a look inside a bridge show the numbers they are given, with their intervals, or refuse them.

python -m pytest tests/inside/test_plots.py
"""

import numpy as np
import pandas as pd
import pytest

from bridgekit.inside import plots
from bridgekit.results.style import COLORS

TOKENS = "▁Hal ▁has ▁9 ▁s is ak ▁ Ċ".split()


def found(fig, gid):
    return fig.findobj(lambda artist: artist.get_gid() == gid)


def x_of(fig, gid):
    (point,) = found(fig, gid)
    return point.get_xdata()[0]


def frame(columns, *rows):
    """Rows of text and one point each; the interval is half of it and one and a half times."""
    table = pd.DataFrame(rows, columns=columns.split())
    return table.assign(low=0.5 * table.iloc[:, -1], high=1.5 * table.iloc[:, -1], n=90, n_units=90)


def test_attention_shows_the_whole_matrix_of_a_short_prompt():
    weights = np.random.default_rng(0).gamma(0.3, 1, (3, len(TOKENS)))
    fig = plots.plot_attention(weights, TOKENS, names=["▁So", "9", "$"], title="Seen", most=0.4)
    (image,) = found(fig, "attention")
    np.testing.assert_array_equal(image.get_array(), weights)
    assert image.get_clim() == (0, 0.4)  # the same scale for every question
    shown = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    assert shown == ["Hal", "has", "9", "s", "is", "ak", "\N{OPEN BOX}", plots.NEWLINE]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["So  1", "9  2", "$  3"]


def test_attention_shows_the_stretch_of_a_long_prompt_that_is_read_most():
    weights = np.full((2, 100), 0.1)
    weights[:, 40:88] = 5.0
    fig = plots.plot_attention(weights, [f"t{i}" for i in range(100)])
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == [f"t{i}" for i in range(40, 88)]
    assert fig.axes[0].get_xlabel() == f"source token (41\N{EN DASH}88 of 100, {480 / 490.4:.0%} of the attention)"


@pytest.mark.parametrize(
    "weights, message", [(np.ones((3, 7)), r"\(soft tokens, 8\)"), (np.ones((3, 8)) * np.nan, "NaN")]
)
def test_attention_that_cannot_be_true_is_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_attention(weights, TOKENS)


def test_classes_of_tokens_stand_beside_an_even_spread():
    classes = frame("token_class share", ("unit word", 0.5), ("rest", 0.4)).assign(uniform=[0.1, 0.9])
    fig = plots.plot_attention_classes(classes)
    assert x_of(fig, "point:unit word:the bridge's attention") == 0.5
    assert x_of(fig, "point:unit word:spread evenly") == 0.1


def test_cka_is_written_once_for_each_pair():
    table = frame(
        "a b cka", ("states", "soft tokens", 0.2), ("states", "digits", 0.55), ("soft tokens", "digits", 0.15)
    )
    fig = plots.plot_cka(table)
    assert sorted(t.get_text() for t in fig.axes[0].texts) == ["0.15", "0.20", "0.55"]
    with pytest.raises(ValueError, match="cka is not a number"):
        plots.plot_cka(table.assign(cka=np.nan))


def test_gates_and_soft_tokens_are_lines_at_their_values():
    fig = plots.plot_gates(pd.DataFrame([(s, f"layer{i}", 0.01 * i * s) for i in (0, 2) for s in (10, 20)],
                                        columns=["step", "gate", "value"]))  # fmt: skip
    assert found(fig, "line:layer2")[0].get_ydata().tolist() == pytest.approx([0.2, 0.4])
    sizes = pd.DataFrame({"soft_token": [1, 2], "varying": [0.1, 0.5], "low": 0.1, "high": 0.1})
    fig = plots.plot_soft_sizes(sizes.assign(varying_low=[0.0, 0.4], varying_high=[0.2, 0.6]))
    assert found(fig, "line:None")[0].get_ydata().tolist() == [0.1, 0.5]


def test_entropy_stands_beside_the_probability_of_the_right_token():
    rows = [
        ("value", "source_only", "target", 1.1),
        ("value", "source_only", "bridged", 0.1),
        ("first token", "both", "target", 0),
    ]
    table = frame("place group condition entropy", *rows)
    table = table.assign(right_probability=[0.2, 0.96, 1], right_low=[0.1, 0.9, 1], right_high=[0.3, 1, 1])
    fig = plots.plot_entropy(table)
    assert x_of(fig, "point:entropy, bits:source-only:bridged") == 0.1
    assert x_of(fig, "point:probability of the right token:source-only:bridged") == 0.96
    assert fig.get_supxlabel() == "first digit of the unit's value (n = 90)"


def test_probe_shades_the_layers_that_the_bridge_reads():
    rows = [
        (layer, place, n, "tens", 0.1 * layer)
        for layer in (0, 1, 2)
        for place in ("word end", "last token")
        for n in plots.NOVELTY
    ]
    table = frame("layer place novelty digit accuracy", *rows)
    fig = plots.plot_probe(table, layers=(1, 2))
    (line,) = found(fig, f"line:tens:at the word end:{plots.NOVELTY['held_unit']}")
    assert line.get_ydata().tolist() == [0, 0.1, 0.2]
    assert all(len(ax.patches) == 2 for ax in fig.axes) and fig.axes[0].get_ylabel() == "tens"
    with pytest.raises(ValueError, match="unknown novelty 'seen'"):
        plots.plot_probe(table.replace({"novelty": {"held_unit": "seen"}}))


def test_causal_has_a_panel_for_whose_value_the_answer_says():
    table = frame(
        "condition variant outcome share",
        ("bridged", "unit word", "follows", 0.6),
        ("bridged", "unit word", "stays", 0.1),
    )
    fig = plots.plot_causal(table)
    (point,) = found(fig, "point:the donor's value:at the unit's word:bridged")
    assert point.get_xdata()[0] == 0.6 and point.get_color() == COLORS["bridged"]
    assert [ax.get_title("left") for ax in fig.axes] == ["the donor's value", "its own value"]
