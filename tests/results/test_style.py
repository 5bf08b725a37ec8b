"""Figures look the same everywhere, numbers are rounded in one way, and files are saved to the same bytes every time.

python -m pytest tests/results/test_style.py
"""

import hashlib
import json
import subprocess
import sys

import matplotlib
import numpy as np
import pandas as pd
import pytest

from bridgekit.config import CONDITIONS
from bridgekit.results import plots, style
from bridgekit.results.style import COLORS, MARKERS, ORDERED, OTHER, save_figure


def test_a_condition_s_colour_and_marker_mean_nothing_else():
    assert len(set(COLORS.values())) == len(set(MARKERS.values())) == len(CONDITIONS)
    assert not {*OTHER, *ORDERED} & {*COLORS.values()}
    frame = pd.DataFrame({"name": ["bridged", "resampler", "dit"], "size": [8, 1, 2]})
    looks = style.choose_looks(frame, "name")
    assert looks["bridged"]["color"] == COLORS["bridged"] and looks["resampler"]["color"] == OTHER[0]
    sizes = style.choose_looks(frame, "size")
    assert [sizes[n]["color"] for n in (1, 2, 8)] == list(ORDERED[:3])
    assert style.choose_looks(frame, "target")["target"]["color"] == COLORS["target"]
    with pytest.raises(ValueError, match="7 values, but at most 6"):
        style.choose_looks(pd.DataFrame({"name": list("abcdefg")}), "name")
    with pytest.raises(ValueError, match="'names' is neither a column nor a condition"):
        style.choose_looks(frame, "names")


@pytest.mark.parametrize(
    "value, signed, text",
    [
        (5895 / 6000, False, "0.982"),  # 0.9825: f"{:.3f}" says 0.983
        (np.mean([0.9845, 0.981, 0.982]), False, "0.982"),  # the same share as a mean of seeds
        (0.9835, False, "0.984"),
        (-0.0002, True, "0.000"),
        (0.0002, True, "0.000"),
        (0.1714, True, "+0.171"),
        (-0.0165, True, "-0.016"),
    ],
)
def test_one_number_has_one_rounding(value, signed, text):
    assert style.format_share(value, signed=signed) == text


def test_intervals_and_sizes_in_words():
    assert style.format_interval(0.171, 0.143, 0.2, signed=True) == "+0.171 [+0.143, +0.200]"
    assert style.format_interval(0.5) == "0.500" and style.format_share(1234, signed=True) == "+1,234"
    rows = pd.DataFrame({"n": [2000, 2000], "n_units": [760, 800]})
    assert style.format_size(rows) == "n = 2,000 on 760\N{EN DASH}800 units"
    assert style.format_size(rows.assign(n_units=rows["n"])) == "n = 2,000"


def test_a_frame_as_markdown_and_as_latex():
    frame = pd.DataFrame({"variant": ["info_nce", "base"], "all\nproblems": [0.9825, np.nan], "p": ["<0.001*", "1"]})
    head, _, first, second = style.markdown(frame, strong="base").splitlines()
    assert head == "| variant | all problems | p |" and first == "| info_nce | 0.982 | <0.001* |"
    assert second == "| **base** | **\N{EN DASH}** | **1** |"
    latex = style.latex(frame)
    assert r"info\_nce & 0.982 & $<$0.001* \\" in latex and r"base & -- & 1 \\" in latex
    assert r"\toprule" in latex and "variant & all problems & p" in latex


def test_style_does_not_leak_out_nor_in():
    before = dict(matplotlib.rcParams)
    with style.use_style():
        assert matplotlib.rcParams["font.size"] == 7 and not matplotlib.rcParams["axes.spines.top"]
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "ytick.left": False}):
        fig = plots.plot_headroom(HEADROOM)
    assert fig.axes[0].xaxis.label.get_fontsize() == 7 and fig.axes[0].get_facecolor() == (1, 1, 1, 1)


def test_importing_the_modules_imports_no_plotting_library():
    code = "import sys\nimport bridgekit.results.plots, bridgekit.results.tables, bridgekit.inside.plots\n"
    code += "heavy = {'matplotlib', 'seaborn', 'torch', 'ipywidgets'}\n"
    result = subprocess.run(
        [sys.executable, "-c", code + "print(sorted(heavy & set(sys.modules)))"], capture_output=True
    )
    assert result.stdout.strip() == b"[]", result


# Saving

HEADROOM = pd.DataFrame(
    [("Mistral to Llama", 7, 101, 53, 39), ("embedded pair", 470, 610, 900, 20)],
    columns=["label", "source_only", "both", "target_only", "neither"],
)


def test_saving_writes_four_files_and_a_sidecar_that_checks(tmp_path):
    source = tmp_path / "run" / "metrics.jsonl"
    source.parent.mkdir()
    source.write_text("{}\n")
    data = HEADROOM.assign(share=[1 / 3, 2 / 3])
    paths = save_figure(plots.plot_headroom(data), tmp_path / "run" / "figures" / "headroom_0.5", data, [source])
    assert [p.name for p in paths] == [f"headroom_0.5{s}" for s in (".pdf", ".png", ".csv", ".json")]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(p.name for p in paths)
    sidecar = json.loads(paths[3].read_text())
    digest = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (source, paths[2])}
    assert sidecar["inputs"] == [{"name": "../metrics.jsonl", "sha256": digest[source]}]
    assert sidecar["data"] == {"name": "headroom_0.5.csv", "rows": 2, "sha256": digest[paths[2]]}
    pd.testing.assert_frame_equal(pd.read_csv(paths[2]), data, check_dtype=False)
    assert paths[0].read_bytes().startswith(b"%PDF") and paths[1].read_bytes().startswith(b"\x89PNG")


def test_saving_again_gives_the_same_bytes_also_after_the_figure_was_shown(tmp_path, conditions):
    fig = plots.plot_groups(conditions)
    first = [p.read_bytes() for p in save_figure(fig, tmp_path / "figure", conditions)]
    with matplotlib.rc_context({"font.size": 20}):
        fig.draw_without_rendering()  # as a notebook does, in the notebook's own style
    again = [p.read_bytes() for p in save_figure(fig, tmp_path / "figure", conditions)]
    anew = [p.read_bytes() for p in save_figure(plots.plot_groups(conditions), tmp_path / "b" / "figure", conditions)]
    assert first == again == anew
    for word in (b"CreationDate", b"ModDate", b"atplotlib"):
        assert word not in first[0] + first[1]
    with pytest.raises(FileNotFoundError, match="gone.jsonl"):
        save_figure(fig, tmp_path / "other", conditions, [tmp_path / "gone.jsonl"])
    assert not list(tmp_path.glob("*other*"))


def test_a_save_that_fails_leaves_the_old_files_and_nothing_else(tmp_path):
    old = {p.name: p.read_bytes() for p in save_figure(plots.plot_headroom(HEADROOM), tmp_path / "figure", HEADROOM)}
    other = plots.plot_headroom(HEADROOM.tail(1))
    other.axes[0].set_ylabel(r"$\frac{1}$")  # refused by matplotlib only when it is drawn
    with pytest.raises(ValueError):
        save_figure(other, tmp_path / "figure", HEADROOM)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old
