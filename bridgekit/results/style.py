"""How every figure looks and how it is saved; the plots are in `figures_runs` and `figures_studies`.

    with use_style():
        fig, ax = new_figure(width_share=1.0, aspect=0.6)
    save_figure(fig, "figures/accuracy", data=curve, inputs=["runs/x/metrics.jsonl"])

One colour per condition everywhere. Each condition also has a marker, and a lightness or a hatch of its own,
so that it is told apart in grey print and by colour-blind readers. matplotlib is imported where it is used:
importing this module costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
import typing
from pathlib import Path

from bridgekit.config import CONDITIONS
from bridgekit.runs import hash_file

if typing.TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE_FILE = Path(__file__).with_name("paper.mplstyle")
TEXT_WIDTH = 5.5  # inches, of a one-column paper

# The two models in ochre and blue, blues for what else the target reads as text, the bridge in the one strong
# red, controls in greys, text relays in greens, what is computed from other columns in violets.
_LOOK = {  # condition: (label, colour, marker, hatch, dashes)
    "source": ("source alone", "#D9A420", "s", "///", (0, (5, 1.5))),
    "target": ("target alone", "#4C86BF", "D", "\\\\\\", (0, (3, 1.2))),
    "bridged": ("bridged", "#B3190F", "o", "", "-"),
    "target_suffix": ("target, same text", "#9CC3E6", "d", "...", (0, (1, 1))),
    "target_told": ("target, told the fact", "#173F6B", "^", "xxx", (0, (7, 1.5, 1, 1.5))),
    "zero": ("zero states", "#C6C6C6", "v", "", (0, (1, 2))),
    "noise": ("noise states", "#A8A8A8", "<", "....", (0, (1, 3))),
    "shuffled": ("shuffled source", "#8A8A8A", ">", "---", (0, (4, 2))),
    "constant": ("constant, bridge's mix", "#5C5C5C", "X", "|||", (0, (2, 2))),
    "constant_natural": ("constant, natural mix", "#938672", "P", "+++", (0, (2, 1, 1, 1))),
    "self_bridge": ("self-bridge", "#2B2B2B", "p", "\\\\", (0, (6, 3))),
    "relay_full": ("text relay, whole", "#00705A", "h", "oo", (0, (8, 2))),
    "relay_cut": ("text relay, cut", "#2FA084", "8", "OO", (0, (5, 2, 1, 2))),
    "relay_answer": ("text relay, answer", "#7CCBB4", "*", "**", (0, (3, 3))),
    "router": ("router", "#7D6BA8", "H", "//", (0, (2, 1))),
    "union": ("union of both", "#B9A9D6", (4, 1, 0), "xx", (0, (1, 1.5))),
}
LABELS = {c: _LOOK[c][0] for c in CONDITIONS}
COLORS = {c: _LOOK[c][1] for c in CONDITIONS}
MARKERS = {c: _LOOK[c][2] for c in CONDITIONS}
HATCHES = {c: _LOOK[c][3] for c in CONDITIONS}
DASHES = {c: _LOOK[c][4] for c in CONDITIONS}
FAMILY_STARTS = ("bridged", "target_suffix", "zero", "relay_full")  # a thin rule goes above these rows
SUBSET_LABELS = {
    "all": "all held-out problems",
    "source_only": "source-only",
    "source_only_seen": "source-only,\nseen units",
    "source_only_held_unit": "source-only,\nheld-out units",
    "source_only_held_value": "source-only,\nheld-out values",
    "target_only": "target-only",
    "both": "both know it",
}
DARK = "#303030"


@contextlib.contextmanager
def use_style() -> typing.Iterator[None]:
    """Apply the paper style, and none of the user's own, inside a `with`."""
    import matplotlib.style

    with matplotlib.style.context(STYLE_FILE, after_reset=True):
        yield


def paper_figure(plot: typing.Callable[..., Figure]) -> typing.Callable[..., Figure]:
    """Decorator of every plot function: draw in the paper style, then fix the places of axes and text.

    A layout computed again at each drawing moves a little each time: a figure that was shown would be saved
    to other bytes than one that was not. To change one: `fig.set_layout_engine("constrained")`.
    """

    @functools.wraps(plot)
    def drawn(*args, **kwargs) -> Figure:
        with use_style():
            fig = plot(*args, **kwargs)
            for _ in range(3):  # margins depend on the axes' size and the other way round
                fig.draw_without_rendering()
            fig.set_layout_engine("none")
        return fig

    return drawn


def figure_size(width_share: float = 1.0, aspect: float = 0.6) -> tuple[float, float]:
    """Inches of a figure as wide as a share of the text and `aspect` times as high."""
    if not 0 < width_share <= 1:
        raise ValueError(f"width_share: must lie above 0 and at most at 1, the text width; got {width_share}")
    if not aspect > 0:
        raise ValueError(f"aspect: must be above 0, got {aspect}")
    return TEXT_WIDTH * width_share, TEXT_WIDTH * width_share * aspect


def new_figure(width_share: float = 1.0, aspect: float = 0.6) -> tuple[Figure, Axes]:
    """A figure with one axes that a notebook shows once: where a cell returns it, not again on its own."""
    import matplotlib.pyplot as plt  # makes Jupyter show figures; a bare Figure would print as text

    fig, ax = plt.subplots(figsize=figure_size(width_share, aspect))
    plt.close(fig)
    fix_tick_size(ax)
    return fig, ax


def fix_tick_size(ax: Axes) -> None:
    """Ticks are counted anew at each drawing, by the size in force then unless it is said here."""
    import matplotlib

    ax.tick_params(labelsize=matplotlib.rcParams["xtick.labelsize"])


def ink(colour: str) -> tuple[float, ...]:
    """The condition's colour, dark enough for text on white."""
    from matplotlib.colors import to_rgb

    return tuple(0.62 * part for part in to_rgb(colour))


def draw_interval(
    ax: Axes, place: float, low: float, high: float, gid: str, color: str = DARK, upright: bool = False
) -> None:
    """A line from low to high at `place`, with a white rim where it is dark, so that it shows on any bar."""
    from matplotlib.patheffects import withStroke

    rim = [withStroke(linewidth=2.3, foreground="white")] if color == DARK else []
    look = {"color": color, "lw": 1.1 if rim else 1.6, "path_effects": rim, "zorder": 3}
    draw = ax.vlines if upright else ax.hlines
    draw(place, low, high, gid=f"interval:{gid}", **look)


def list_rows(ax: Axes, labels: typing.Iterable[str], guides: bool = True) -> None:
    """Names on the left, the first on top; with `guides` a pale line leads from each name to its mark."""
    labels = list(labels)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(not guides)
    ax.locator_params(axis="x", nbins=6)
    ax.grid(guides, axis="y")


def write_right(ax: Axes, y: float, text: str, bold: bool = False) -> None:
    """A row's numbers, to the right of the axes."""
    text = text.replace("-", "\N{MINUS SIGN}")
    weight = "bold" if bold else "normal"
    where = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
    ax.annotate(text, (1.02, y), fontsize=7.5, weight=weight, **where)


def size_text(rows: pd.DataFrame) -> str:
    """`n = 2,000 on 760 units`; a range where rows differ, no units where questions are independent."""
    text = f"n = {_range(rows['n'])}"
    if "n_units" in rows and rows["n_units"].notna().all() and (rows["n_units"] != rows["n"]).any():
        text += f" on {_range(rows['n_units'])} units"
    return text


def _range(values: pd.Series) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,}\N{EN DASH}{high:,}"


def check_frame(frame: pd.DataFrame, what: str, name: str, value: str = "", columns: typing.Sequence[str] = ()) -> None:
    """Refuse what cannot be drawn truthfully: no rows, no such column, NaN, a value beside its interval.

    `name` is the column that names a row in messages; `value`, if given, is drawn with `low` and `high`.
    """
    numeric = [value, "low", "high", *columns] if value else [*columns]
    for column in (name, *numeric):
        if column not in frame.columns:
            there = ", ".join(map(str, frame.columns))
            raise ValueError(f"{what}: no column '{column}' (there are: {there})")
    if frame.empty:
        raise ValueError(f"{what}: no rows, so nothing to draw; evaluate something first")
    for column in numeric:
        bad = frame[frame[column].isna()]
        if len(bad):
            raise ValueError(f"{what}: {column} of '{bad[name].iloc[0]}' is not a number; leave that row out")
    for row in frame[[name, *numeric]].to_dict("records") if value else ():
        if not row["low"] - 1e-9 <= row[value] <= row["high"] + 1e-9:
            beside = f"{row[value]:.4g} is outside its interval [{row['low']:.4g}, {row['high']:.4g}]"
            raise ValueError(f"{what}: {value} of '{row[name]}', {beside}")


def check_conditions(names: typing.Iterable[str], present: typing.Iterable[str], what: str) -> None:
    """Refuse the first name that is no condition at all or was not evaluated."""
    present = list(present)
    for name in names:
        if name not in CONDITIONS:
            raise ValueError(f"{what}: '{name}' is not a condition (they are: {', '.join(CONDITIONS)})")
        if name not in present:
            raise ValueError(f"{what}: no rows for condition '{name}' (there are: {', '.join(present)})")


def save_figure(
    fig: Figure, path_without_suffix: str | Path, data: pd.DataFrame, inputs: typing.Sequence[str | Path] = ()
) -> list[Path]:
    """Write PDF, PNG, the data drawn (CSV) and a sidecar (JSON) with sha256 of the data and of every input.

    The bytes depend on the figure and the data alone. Input names are relative to the sidecar, so that a run
    folder can be moved. All four files are complete before the first of them replaces an old one.
    """
    base = Path(path_without_suffix)
    suffixes = (".pdf", ".png", ".csv", ".json")
    if base.suffix in suffixes:
        raise ValueError(f"{base}: leave '{base.suffix}' off; {', '.join(suffixes)} are all written")
    if data.empty:
        raise ValueError(f"{base}: the data of this figure has no rows; pass the frame that was drawn")
    for file in inputs:
        if not Path(file).is_file():
            raise ValueError(f"{base}: input {file} does not exist, so the figure cannot be traced to it")
    base.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{base.name}.", dir=base.parent) as folder:
        parts = [Path(folder, base.name + suffix) for suffix in suffixes]
        pdf, png, csv, sidecar = parts
        with use_style():
            no_dates = {"Creator": "bridgekit", "Producer": None, "CreationDate": None}
            fig.savefig(pdf, metadata=no_dates)
            fig.savefig(png, metadata={"Software": None})
        data.to_csv(csv, index=False, float_format="%.10g", lineterminator="\n", encoding="utf-8")
        facts = {
            "figure": base.name,
            "data": {"name": csv.name, "rows": len(data), "sha256": hash_file(csv)},
            "inputs": [{"name": _relative(f, base.parent), "sha256": hash_file(f)} for f in inputs],
        }
        sidecar.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        for part in parts:
            os.replace(part, base.parent / part.name)
    return [base.parent / part.name for part in parts]


def _relative(file: str | Path, folder: Path) -> str:
    return Path(os.path.relpath(file, folder)).as_posix()
