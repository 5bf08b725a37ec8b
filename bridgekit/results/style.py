"""How every figure and number looks, and how a figure is saved; `plots` draws them.

    fig = plots.plot_conditions(table)
    save_figure(fig, "figures/conditions", table, inputs=["runs/x/eval_samples_step_final.jsonl"])
    format_share(0.9825), format_interval(0.9825, 0.976, 0.989), markdown(frame)

A condition's colour means nothing else in any figure; each comes with a marker, so that a grey print can be read.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
import typing
from collections.abc import Sequence
from contextlib import AbstractContextManager
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path

import pandas as pd

from bridgekit.config import CONDITIONS
from bridgekit.runs import hash_file

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE_FILE = Path(__file__).with_name("paper.mplstyle")
COLUMN, PAGE = 3.3, 6.9  # inches: one column of a two-column paper, and both
DASH = "\N{EN DASH}"

# The two models in ochre and blue, blues for what else the target reads as text, the bridge in the one strong
# red, controls in greys, text relays in greens, what is computed from other columns in violets.
_LOOK = {  # condition: (label, colour, marker, dashes)
    "source": ("source alone", "#D9A420", "s", (0, (5, 1.5))),
    "target": ("target alone", "#4C86BF", "D", (0, (3, 1.2))),
    "bridged": ("bridged", "#B3190F", "o", "-"),
    "target_suffix": ("target, same text", "#9CC3E6", "d", (0, (1, 1))),
    "target_told": ("target, told the fact", "#173F6B", "^", (0, (7, 1.5, 1, 1.5))),
    "zero": ("zero states", "#C6C6C6", "v", (0, (1, 2))),
    "noise": ("noise states", "#A8A8A8", "<", (0, (1, 3))),
    "shuffled": ("shuffled source", "#8A8A8A", ">", (0, (4, 2))),
    "constant": ("constant, bridge's mix", "#5C5C5C", "X", (0, (2, 2))),
    "constant_natural": ("constant, natural mix", "#938672", "P", (0, (2, 1, 1, 1))),
    "self_bridge": ("self-bridge", "#2B2B2B", "p", (0, (6, 3))),
    "relay_full": ("text relay, whole", "#00705A", "h", (0, (8, 2))),
    "relay_cut": ("text relay, cut", "#2FA084", "8", (0, (5, 2, 1, 2))),
    "relay_answer": ("text relay, answer", "#7CCBB4", "*", (0, (3, 3))),
    "router": ("router", "#7D6BA8", "H", (0, (2, 1))),
    "union": ("union of both", "#B9A9D6", (4, 1, 0), (0, (1, 1.5))),
}
LABELS, COLORS, MARKERS, DASHES = ({c: _LOOK[c][i] for c in CONDITIONS} for i in range(4))
FAMILY_STARTS = ("bridged", "target_suffix", "zero", "relay_full")  # a thin rule goes above these rows
OTHER = ("#8C2D6B", "#A8B83A", "#6B3A12", "#E58FC4", "#5A6B00", "#B5179E")  # categories that are no condition
ORDERED = ("#F2A9D8", "#D65DB1", "#9C2A7F", "#4B1D3F")  # few light, many dark
_SHAPES = ("o", "s", "^", "D", "v", "P")
_DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)), (0, (2, 2)), (0, (8, 2)))
SUBSET_LABELS = {
    "all": "all held-out problems",
    "source_only": "source-only",
    "source_only_seen": "source-only,\nseen units",
    "source_only_held_unit": "source-only,\nheld-out units",
    "source_only_held_value": "source-only,\nheld-out values",
    "target_only": "target-only",
    "both": "both know it",
}
WORDS = LABELS | SUBSET_LABELS | {"joint": "both digits"}
WORDS |= {"seen": "seen units", "held_unit": "held-out units", "held_value": "held-out values"}
CODES = {"dit": "DiT", "kv": "KV cache", "prefix+residual": "prefix + residual"}  # also within a longer name


def words(name: object) -> str:
    """A code name as a reader should see it: `dit x prefix+residual, swapped` is `DiT × prefix + residual, swapped`."""
    if name in WORDS:
        return WORDS[name]
    text = re.sub(r"[\w+]+", lambda code: CODES.get(code[0], code[0]), str(name))
    return text.replace(" x ", " \N{MULTIPLICATION SIGN} ").replace("_", " ")


def choose_looks(frame: pd.DataFrame, color: str | None) -> dict[typing.Any, dict]:
    """Colour, marker and dashes of each value of the column `color`, or of the one condition that `color` names.

    A condition has its own, numbers stand on a scale, other values in `OTHER`; marks have a dark edge, so that pale
    ones show in grey print.
    """
    from matplotlib.colors import to_rgb

    if color is not None and color not in frame and color not in COLORS:
        raise ValueError(f"color: '{color}' is neither a column nor a condition")
    values = list(dict.fromkeys(frame[color])) if color in frame else [color]
    others, palette = [value for value in values if value not in COLORS], OTHER
    if len(others) > 1 and frame[color].dtype.kind in "iuf":
        others, palette = sorted(others), ORDERED
    if len(others) > len(palette):
        raise ValueError(f"colour: {len(others)} values, but at most {len(palette)} can be told apart: use panels")
    looks = {value: (COLORS[value], MARKERS[value], DASHES[value]) for value in values if value in COLORS}
    looks |= {value: look for value, *look in zip(others, palette, _SHAPES, _DASHES, strict=False)}
    dark = {color: [0.62 * part for part in to_rgb(color)] for color, _, _ in looks.values()}
    return {v: {"color": c, "mec": dark[c], "mew": 0.6, "marker": m, "ls": d} for v, (c, m, d) in looks.items()}


def use_style() -> AbstractContextManager:
    """The paper style, and none of the user's own, for a `with`."""
    import matplotlib.style

    return matplotlib.style.context(STYLE_FILE, after_reset=True)


# Numbers as text


def format_share(value: float, digits: int = 3, signed: bool = False) -> str:
    """The one rounding of every table, figure and text: half to even, free of binary dust; zero has no sign.

    A count is written out.
    """
    if not math.isfinite(value):
        return f"{value}"
    if isinstance(value, int):
        return f"{value:{'+' if signed else ''},}"
    exact = Decimal(f"{value:.9f}").quantize(Decimal(1).scaleb(-digits), ROUND_HALF_EVEN)
    return f"{abs(exact)}" if not exact else f"{exact:{'+' if signed else ''}}"


def format_interval(point: float, *ends: float, digits: int = 3, signed: bool = False) -> str:
    """`0.982 [0.976, 0.989]`; without the interval's ends the point alone."""
    point, *ends = (format_share(value, digits, signed) for value in (point, *ends))
    return f"{point} [{', '.join(ends)}]" if ends else point


def format_row(row: typing.Any, signed: bool = False) -> str:
    """The `point [low, high]` of a row of numbers."""
    return format_interval(row.point, row.low, row.high, signed=signed)


def format_size(rows: pd.DataFrame) -> str:
    """`n = 2,000 on 760 units`; a range where rows differ, no units where questions are independent."""
    sizes = rows.filter(["n", "n_units"])
    texts = [DASH.join(f"{n:,.0f}" for n in sorted({sizes[c].min(), sizes[c].max()})) for c in sizes]
    if sizes.notna().all(axis=None) and sizes.nunique(axis=1).eq(2).any():
        return f"n = {texts[0]} on {texts[1]} units"
    return f"n = {texts[0]}" if texts else ""


def markdown(frame: pd.DataFrame, strong: str | None = None) -> str:
    """A frame of texts and numbers as a Markdown table; the row whose first cell is `strong` is bold."""
    rows = [[_cell(value) for value in row] for row in frame.itertuples(index=False)]
    rows = [[f"**{cell}**" for cell in row] if row[0] == strong else row for row in rows]
    lines = [[_cell(column) for column in frame], ["---"] + ["---:"] * (frame.shape[1] - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex(frame: pd.DataFrame) -> str:
    """The same table for the paper (booktabs)."""
    marks = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "<": "$<$", DASH: "--"})
    table = frame.map(_cell, marks=marks).rename(columns=lambda name: _cell(name, marks))
    return table.to_latex(index=False, column_format="l" + "r" * (table.shape[1] - 1))


def _cell(value: object, marks: dict | None = None) -> str:
    if value is None or value != value:
        value = DASH
    text = format_share(value) if isinstance(value, float) else str(value).replace("\n", " ")
    return text.translate(marks or {})


# Saving


def save_figure(fig: Figure, path_without_suffix: str | Path, data: pd.DataFrame, inputs: Sequence = ()) -> list[Path]:
    """Write PDF, PNG, the data drawn (CSV) and a sidecar (JSON) with sha256 of the data and of every input.

    The bytes depend on the figure and the data alone. Input names are relative to the sidecar, so that a run folder
    can be moved. All four files are complete before the first of them replaces an old one.
    """
    base, suffixes = Path(path_without_suffix), (".pdf", ".png", ".csv", ".json")
    if base.suffix in suffixes:
        raise ValueError(f"{base}: leave '{base.suffix}' off; {', '.join(suffixes)} are all written")
    if data.empty:
        raise ValueError(f"{base}: the data of this figure has no rows; pass the frame that was drawn")
    base.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{base.name}.", dir=base.parent) as folder, use_style():
        parts = pdf, png, csv, sidecar = [Path(folder, base.name + suffix) for suffix in suffixes]
        fig.savefig(pdf, metadata={"Creator": "bridgekit", "Producer": None, "CreationDate": None})
        fig.savefig(png, metadata={"Software": None})
        data.to_csv(csv, index=False, float_format="%.10g", lineterminator="\n", encoding="utf-8")
        names = {Path(os.path.relpath(file, base.parent)).as_posix(): hash_file(file) for file in inputs}
        facts = {"figure": base.name, "data": {"name": csv.name, "rows": len(data), "sha256": hash_file(csv)}}
        facts["inputs"] = [{"name": name, "sha256": digest} for name, digest in names.items()]
        sidecar.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return [part.replace(base.parent / part.name) for part in parts]
