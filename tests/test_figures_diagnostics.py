"""Figures of a look inside a bridge show the numbers they are given, with their intervals, or refuse them.

python -m pytest tests/test_figures_diagnostics.py
"""

import pandas as pd
import pytest
from figure_frames import broken, mark, marks, span
from matplotlib.colors import to_hex

from bridgekit.inside import figures_diagnostics as figures
from bridgekit.inside import readings_inside
from bridgekit.results.style import COLORS, save_figure


def gates():
    return pd.DataFrame([(s, f"layer{i}", 0.01 * i * s) for i in (0, 2) for s in (10, 20, 30)],
                        columns=["step", "gate", "value"])  # fmt: skip


def sizes():
    rows = [dict(soft_token=i, rms=0.1, low=0.09, high=0.11, varying=0.2 * i, varying_low=0.2 * i - 0.05,
                 varying_high=0.2 * i + 0.04, table_rms=0.1, vocabulary_5=0.08, vocabulary_50=0.1, vocabulary_95=0.13,
                 n=50, n_units=50) for i in (1, 2, 3)]  # fmt: skip
    return pd.DataFrame(rows)


def entropy():
    rows = []
    for place, scale in (("first token", 0.001), ("value", 1)):
        for i, group in enumerate(("source_only", "target_only", "both")):
            for condition, base in (("target", 0.3), ("bridged", 0.1)):
                e, p = scale * (base + 0.05 * i), 1 - base
                rows.append(dict(place=place, group=group, condition=condition, entropy=e, low=e * 0.8, high=e * 1.3,
                                 n=90, n_units=90, right_probability=p, right_low=p - 0.1, right_high=p))  # fmt: skip
    return pd.DataFrame(rows)


def cka():
    names = ["source layer 4, word end", "soft tokens", "target embeddings, question", "digits of the value"]
    rows = [dict(a=a, b=b, cka=0.9 - 0.3 * i - 0.2 * j, low=0.8 - 0.3 * i - 0.2 * j, high=1.0 - 0.3 * i - 0.2 * j,
                 n=200, n_units=200) for i, a in enumerate(names) for j, b in enumerate(names) if i < j]  # fmt: skip
    return pd.DataFrame(rows)


def probe():
    rows = []
    for layer in (0, 1, 2):
        for place in ("word end", "next token", "last token"):
            for k, novelty in enumerate(("held_unit", "held_value", "not taught")):
                for digit in ("tens", "ones", "joint"):
                    share = 0.3 * layer / (k + 1) * (1 if place == "word end" else 0.5)
                    rows.append(dict(layer=layer, place=place, novelty=novelty, digit=digit, accuracy=share,
                                     low=max(share - 0.1, 0), high=share + 0.1, n=100 - 20 * k))  # fmt: skip
    return pd.DataFrame(rows)


def causal(constant=True):
    rows = []
    for condition in ("bridged", "constant")[: 1 + constant]:
        for variant in ("nowhere", "whole prompt", "unit word", "all but the word"):
            moved = condition == "bridged" and variant in ("whole prompt", "unit word")
            for outcome in ("follows", "stays"):
                share = 0.9 if moved == (outcome == "follows") and condition == "bridged" else 0.05
                rows.append(dict(condition=condition, variant=variant, outcome=outcome, share=share, low=share - 0.04,
                                 high=share + 0.05, n=200, n_units=190))  # fmt: skip
    return pd.DataFrame(rows)


CASES = {
    figures.plot_gates: (gates, "value"),
    figures.plot_soft_sizes: (sizes, "varying"),
    figures.plot_entropy: (entropy, "right_probability"),
    figures.plot_cka: (cka, "cka"),
    figures.plot_probe: (probe, "accuracy"),
    figures.plot_causal: (causal, "share"),
}


@pytest.mark.parametrize("plot", CASES, ids=lambda plot: plot.__name__)
def test_every_figure_is_saved_with_its_data_and_refuses_what_it_cannot_show(plot, tmp_path):
    make, column = CASES[plot]
    files = save_figure(plot(make()), tmp_path / "figure", make())
    assert len(files) == 4 and files[1].stat().st_size > 5000
    again = save_figure(plot(make()), tmp_path / "again", make())
    assert files[1].read_bytes() == again[1].read_bytes()
    with pytest.raises(ValueError, match=column):
        plot(broken(make(), column, float("nan")))
    with pytest.raises(ValueError, match="no rows"):
        plot(make().iloc[:0])
    with pytest.raises(ValueError, match=f"no column '{column}'"):
        plot(make().drop(columns=column))


@pytest.mark.parametrize("plot", CASES, ids=lambda plot: plot.__name__)
def test_no_text_is_cut_off_or_lies_on_another_figure_edge(plot):
    fig = plot(CASES[plot][0]())
    fig.canvas.draw()
    whole = fig.bbox
    ticks = {id(label) for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for tick in axis.get_major_ticks()
             for label in (tick.label1, tick.label2)}  # fmt: skip
    for text in fig.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible()):
        if text.get_text().strip() and id(text) not in ticks:  # of ticks some lie beyond the axes and are not drawn
            box = text.get_window_extent()
            assert box.x0 >= whole.x0 - 2 and box.x1 <= whole.x1 + 2, text.get_text()
            assert box.y0 >= whole.y0 - 2 and box.y1 <= whole.y1 + 2, text.get_text()


def test_each_soft_token_stands_at_its_size_and_share_with_its_interval():
    fig = figures.plot_soft_sizes(sizes())
    assert mark(fig, "rms").get_ydata().tolist() == sizes()["rms"].tolist()
    assert mark(fig, "varying").get_ydata().tolist() == sizes()["varying"].tolist()
    for row in sizes().itertuples():
        assert span(mark(fig, f"interval:rms:{row.soft_token}")) == pytest.approx((row.low, row.high))
        drawn = span(mark(fig, f"interval:varying:{row.soft_token}"))
        assert drawn == pytest.approx((row.varying_low, row.varying_high))


def test_probe_lines_hold_every_layer_of_their_cell_and_an_unknown_novelty_is_refused():
    fig, frame = figures.plot_probe(probe()), probe()
    for (digit, place, novelty), rows in frame.groupby(["digit", "place", "novelty"]):
        assert mark(fig, f"line:{digit}:{place}:{novelty}").get_ydata().tolist() == rows["accuracy"].tolist()
        for row in rows.itertuples():
            drawn = span(mark(fig, f"interval:{digit}:{place}:{novelty}:{row.layer}"))
            assert drawn == pytest.approx((row.low, row.high))
    with pytest.raises(ValueError, match="unknown novelty 'seen'"):
        figures.plot_probe(probe().replace({"novelty": {"held_unit": "seen"}}))


@pytest.mark.parametrize("constant", [True, False])
def test_who_follows_is_full_and_who_stays_is_open(constant):
    fig, table = figures.plot_causal(causal(constant)), causal(constant)
    for (variant, outcome), rows in table.groupby(["variant", "outcome"]):
        points = marks(fig, f"point:{variant}:{outcome}")
        assert sorted(p.get_xdata()[0] for p in points) == sorted(rows["share"])
        assert all((to_hex(p.get_markerfacecolor()) == "#ffffff") == (outcome == "stays") for p in points)
    for row in table.itertuples():
        drawn = mark(fig, f"interval:{row.condition}:{row.variant}:{row.outcome}")
        assert span(drawn) == pytest.approx((row.low, row.high))
        assert to_hex(drawn.get_colors()[0]) == COLORS[row.condition].lower()
    text = readings_inside.read_causal(table)
    assert "0.900 [0.860, 0.950] of the answers are the donor's, with its own 0.050" in text
    assert ("constant.safetensors" in text) == (not constant)


def test_entropy_has_a_panel_for_each_measure_and_place_on_one_scale():
    fig = figures.plot_entropy(entropy())
    assert len(fig.axes) == 4 and fig.axes[0].get_xlim() == fig.axes[1].get_xlim()
    drawn = span(mark(fig, "interval:entropy:value:source_only:bridged"))
    row = entropy().query("place == 'value' and group == 'source_only' and condition == 'bridged'").iloc[0]
    assert drawn == pytest.approx((row["low"], row["high"]))
    text = readings_inside.read_entropy(entropy())
    assert text.count("\n") == 3 and "0.300 [0.240, 0.390] bits alone, 0.100 [0.080, 0.130] bridged" in text


def test_cka_is_written_once_for_each_pair_and_read_for_the_soft_tokens():
    fig, frame = figures.plot_cka(cka()), cka()
    written = [t.get_text().replace("\N{MINUS SIGN}", "-") for t in fig.axes[0].texts]
    assert sorted(written) == sorted(f"{r.cka:.2f}\n\N{PLUS-MINUS SIGN}0.10" for r in frame.itertuples())
    text = readings_inside.read_cka(frame)
    assert "most like *source layer 4, word end*: CKA 0.700 [0.600, 0.800]" in text and "digits of the value" in text


def test_gates_are_drawn_one_line_each():
    fig = figures.plot_gates(gates())
    assert mark(fig, "gate:layer2").get_ydata().tolist() == pytest.approx([0.2, 0.4, 0.6])
    assert mark(fig, "gate:layer0").get_ydata().tolist() == [0, 0, 0]


def test_the_probes_reading_names_the_best_cell_and_the_layers_that_are_read():
    text = readings_inside.read_probe(probe(), (1,))
    assert "read best in layer 2, at the word end: 0.600 [0.500, 0.700], the best of 9 cells" in text
    assert "0.300 [0.200, 0.400] in layer 1" in text and "never taught: at most 0.200" in text
