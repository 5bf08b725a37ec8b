"""Figures look the same everywhere, can be read in grey, and are saved to the same bytes every time."""

import hashlib
import json
import os
import subprocess
import sys

import matplotlib.pyplot
import numpy as np
import pandas as pd
import pytest
from figure_frames import FIGURES, conditions_table, drawn, headroom
from matplotlib.colors import to_hex, to_rgb

from bridgekit.config import CONDITIONS
from bridgekit.results import style as figures
from bridgekit.results.figures_runs import GROUP_CONDITIONS
from bridgekit.results.figures_studies import plot_headroom
from bridgekit.results.style import COLORS, HATCHES, MARKERS, save_figure, use_style


def colour_of(artist):
    filled = hasattr(artist, "get_facecolor") and not hasattr(artist, "get_segments")
    colour = np.asarray(artist.get_facecolor() if filled else matplotlib.colors.to_rgba_array(artist.get_color()))
    return to_hex(colour.reshape(-1, 4)[0])


def test_every_figure_draws_a_condition_in_its_colour():
    seen = set()
    for fig in map(drawn, FIGURES):
        for artist in fig.findobj(lambda a: a.get_gid()):
            kind, condition = [*artist.get_gid().split(":"), ""][:2]
            if condition in COLORS and kind != "label" and colour_of(artist) != to_hex(figures.DARK):
                assert colour_of(artist) == COLORS[condition].lower(), artist.get_gid()
                seen.add(condition)
    assert seen == set(CONDITIONS)


def lightness(rgb):
    linear = np.where(np.array(rgb) <= 0.04045, np.array(rgb) / 12.92, ((np.array(rgb) + 0.055) / 1.055) ** 2.4)
    return 116 * np.cbrt(linear @ [0.2126, 0.7152, 0.0722]) - 16  # CIE L*, 0 black to 100 white


def test_conditions_are_told_apart_by_colour_and_marker_and_in_grey_by_lightness_or_hatch():
    for i, one in enumerate(CONDITIONS):
        for other in CONDITIONS[:i]:
            assert COLORS[one] != COLORS[other] and MARKERS[one] != MARKERS[other], (one, other)
            apart = abs(lightness(to_rgb(COLORS[one])) - lightness(to_rgb(COLORS[other])))
            assert apart >= 8 or HATCHES[one] != HATCHES[other], (one, other, apart)


# Machado, Oliveira and Fernandes 2009, severity 1.0; for linear RGB.
COLOUR_BLIND = {
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("kind", COLOUR_BLIND)
def test_the_conditions_of_one_figure_stay_apart_for_colour_blind_readers(kind):
    def seen(colour):
        rgb = np.array(to_rgb(colour))
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
        x, y, z = np.array(xyz) @ np.clip(np.array(COLOUR_BLIND[kind]) @ linear, 0, 1) / [0.9505, 1, 1.089]
        x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x, y, z))
        return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])  # CIE L*a*b*

    for i, one in enumerate(GROUP_CONDITIONS):
        for other in GROUP_CONDITIONS[:i]:
            assert np.linalg.norm(seen(COLORS[one]) - seen(COLORS[other])) > 15, (one, other)


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_is_clipped_and_no_two_texts_overlap(name, monkeypatch):
    fig, boxes, draw = drawn(name), {}, matplotlib.text.Text.draw

    def recording_draw(text, renderer, *args, **kwargs):
        if text.get_visible() and text.get_text().strip():
            boxes[text] = matplotlib.text.Text.get_window_extent(text, renderer)
        return draw(text, renderer, *args, **kwargs)

    monkeypatch.setattr(matplotlib.text.Text, "draw", recording_draw)
    fig.draw_without_rendering()
    assert len(boxes) >= 8
    for i, (text, box) in enumerate(boxes.items()):
        inside = fig.bbox.padded(1)
        assert inside.contains(*box.min) and inside.contains(*box.max), text
        for other in list(boxes)[:i]:
            both = box.padded(-1.0), boxes[other].padded(-1.0)
            assert not both[0].overlaps(both[1]), (text, other)
    sizes = [text.get_fontsize() for text in boxes]
    assert min(sizes) >= (6.5 if name.startswith("attention") else 7) and max(sizes) <= 9
    assert fig.get_figwidth() <= figures.TEXT_WIDTH


def test_style_does_not_leak_out_nor_in():
    before = dict(matplotlib.rcParams)
    with use_style():
        assert matplotlib.rcParams["font.size"] == 8 and not matplotlib.rcParams["axes.spines.top"]
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "ytick.left": False}):
        fig = plot_headroom(headroom())
    assert fig.axes[0].xaxis.label.get_fontsize() == 8 and to_hex(fig.axes[0].get_facecolor()) == "#ffffff"


def test_no_figure_stays_open_behind_the_one_returned():
    assert drawn("groups") and matplotlib.pyplot.get_fignums() == []  # an open one would be shown twice by a notebook


def test_figure_size_is_a_share_of_the_text():
    assert figures.figure_size(0.5, 0.8) == (2.75, pytest.approx(2.2))
    for bad in ((0, 0.6), (1.2, 0.6), (1, 0)):
        with pytest.raises(ValueError, match="width_share|aspect"):
            figures.figure_size(*bad)


def test_importing_the_modules_imports_no_plotting_library():
    modules = ("figures", "figures_attention", "figures_runs", "figures_studies", "figures_text")
    code = f"import sys\nfrom bridgekit import {', '.join(modules)}\n"
    code += "print(sorted({'matplotlib', 'seaborn', 'scipy', 'pandas', 'numpy', 'torch'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# Saving


def test_saving_writes_four_files_and_a_sidecar_that_checks(tmp_path):
    source = tmp_path / "run" / "metrics.jsonl"
    source.parent.mkdir()
    source.write_text("{}\n")
    data = headroom().assign(share=[1 / 3, 2 / 3])
    paths = save_figure(plot_headroom(data), tmp_path / "run" / "figures" / "headroom_0.5", data, [source])
    assert [p.name for p in paths] == [f"headroom_0.5{s}" for s in (".pdf", ".png", ".csv", ".json")]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)
    sidecar = json.loads(paths[3].read_text())
    digest = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (source, paths[2])}
    assert sidecar["inputs"] == [{"name": "../metrics.jsonl", "sha256": digest[source]}]
    assert sidecar["data"] == {"name": "headroom_0.5.csv", "rows": 2, "sha256": digest[paths[2]]}
    pd.testing.assert_frame_equal(pd.read_csv(paths[2]), data, check_dtype=False)
    assert paths[0].read_bytes().startswith(b"%PDF") and paths[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["accuracy", "groups", "attention"])
def test_saving_again_gives_the_same_bytes_also_after_the_figure_was_shown(tmp_path, name):
    data, fig = conditions_table(), FIGURES[name]()
    first = [p.read_bytes() for p in save_figure(fig, tmp_path / "figure", data)]
    with matplotlib.rc_context({"font.size": 20}):
        fig.draw_without_rendering()  # as a notebook does, in the notebook's own style
    again = [p.read_bytes() for p in save_figure(fig, tmp_path / "figure", data)]
    anew = [p.read_bytes() for p in save_figure(FIGURES[name](), tmp_path / "other" / "figure", data)]
    assert first == again == anew
    for word in (b"CreationDate", b"ModDate", b"atplotlib"):
        assert word not in first[0] + first[1]


def test_another_process_writes_the_same_bytes(tmp_path):
    code = f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\nimport figure_frames as t\n"
    code += "from bridgekit.results.style import save_figure\n"
    code += f"save_figure(t.plot_headroom(t.headroom()), {str(tmp_path / 'a')!r}, t.headroom())"
    environment = os.environ | {"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    save_figure(plot_headroom(headroom()), tmp_path / "here" / "a", headroom())
    for suffix in (".pdf", ".png", ".csv", ".json"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / "here" / f"a{suffix}").read_bytes()


class Unwritable:
    def __str__(self):
        raise OSError("no room")


@pytest.mark.parametrize("part", ["picture", "data"])
def test_a_save_that_fails_leaves_the_old_files_and_nothing_else(tmp_path, part):
    data = headroom()
    old = {p.name: p.read_bytes() for p in save_figure(plot_headroom(data), tmp_path / "figure", data)}
    other = plot_headroom(data.tail(1))
    if part == "picture":
        other.axes[0].set_xlabel(r"$\frac{1}$")  # refused by matplotlib only when it is drawn
    else:
        data = data.assign(label=[Unwritable(), Unwritable()])
    with pytest.raises((ValueError, OSError)):
        save_figure(other, tmp_path / "figure", data)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_saving_refuses_what_could_not_be_traced(tmp_path):
    fig, data = plot_headroom(headroom()), headroom()
    for path, frame, inputs, message in (
        (tmp_path / "a", data, [tmp_path / "gone.jsonl"], "gone.jsonl does not exist"),
        (tmp_path / "a", data.head(0), [], "has no rows"),
        (tmp_path / "a.pdf", data, [], "leave '.pdf' off"),
    ):
        with pytest.raises(ValueError, match=message):
            save_figure(fig, path, frame, inputs)
    assert list(tmp_path.iterdir()) == []
