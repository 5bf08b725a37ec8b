"""Two ways to draw numbers with intervals: `rows` and `lines`; `plots` makes the figures of a run of them.

    fig = rows(share(answers, by="condition"), y="condition", numbers="interval", title="Who answers right?")
    fig = lines(frame, x="n_soft_tokens", color="producer", log_x=True, title="What the bridge recovers")

A frame holds finished numbers, a row for each mark: `point low high n n_units`, and the columns it is split by;
`color` is a column, or one condition for all marks. Each mark has a `gid` such as `interval:all:bridged`.
"""

from __future__ import annotations

import functools
import math
import textwrap
import typing
from collections.abc import Callable, Mapping

from bridgekit.config import CONDITIONS
from bridgekit.results import style
from bridgekit.results.style import COLORS, COLUMN, PAGE, darken, format_share, words

if typing.TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE, BAND = "#202020", "#c8c8c8", "#ebebeb"
DOTTED = (0, (1, 1.2))
NOTHING: Mapping = {}


def paper_figure(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator of every plot function: draw in the paper style, then fix the places of axes and text.

    A layout computed again at each drawing moves a little each time: a figure that was shown would be saved
    to other bytes than one that was not. To change one: `fig.set_layout_engine("constrained")`.
    """

    @functools.wraps(plot)
    def draw(*args, **kwargs) -> Figure:
        with style.use_style():
            fig = plot(*args, **kwargs)
            for _ in range(3):  # margins depend on the axes' size and the other way round
                fig.draw_without_rendering()
            fig.set_layout_engine("none")
        return fig

    return draw


def check_frame(frame: pd.DataFrame, point: str, keys: list[str], what: str, *more: str) -> pd.DataFrame:
    """The frame with its column `point` under that name and a column `gid`; refused if it cannot be drawn truthfully.

    The columns `keys`, `more` and, if there, `seed` tell marks apart, so that no two rows may be equal in them.
    """
    columns = list(dict.fromkeys([*keys, *more]))
    if missing := [column for column in (point, *columns) if column not in frame]:
        raise ValueError(f"{what}: no column '{missing[0]}' (there are: {', '.join(map(str, frame.columns))})")
    if frame.empty:
        raise ValueError(f"{what}: no rows, so nothing to draw; evaluate something first")
    low, high = frame.get("low", frame[point]) - 1e-9, frame.get("high", frame[point]) + 1e-9
    wrong = {f"{c} is not a number": frame[c].isna() for c in (point, *columns, "low", "high") if c in frame}
    wrong[f"{point} is outside its interval"] = ~frame[point].between(low, high)
    again = frame.duplicated([*columns, *({"seed"} & set(frame))])
    wrong["two rows of this name; a column seed, color or panel must tell them apart"] = again
    for problem, where in wrong.items():
        if where.any():
            name = ", ".join(map(str, frame.loc[where, columns].iloc[0])).replace("\n", " ")
            raise ValueError(f"{what}: '{name}': {problem}")
    names = [":".join(dict.fromkeys(map(str, row))) for row in frame[keys].itertuples(index=False)]
    return frame.assign(point=frame[point], gid=names).reset_index(drop=True)


@paper_figure
def rows(
    frame: pd.DataFrame,
    y: str,
    x: str = "point",
    color: str | None = None,
    panel: str | None = None,
    *,
    fill: tuple[str, str, str] | None = None,  # a bool column; what a full and what an open mark mean
    band: tuple[str, str] | None = None,  # a column, drawn from minus to plus its value; what it means
    bars: bool = False,
    numbers: str = "point",  # point | interval | "": what is written to the right of each mark
    signed: bool = False,  # differences: numbers with a sign, and a line at zero
    references: Mapping = NOTHING,  # {name or (panel, name): x}: lines; a condition's name has its look
    stack: bool = False,  # panels below each other, each with rows of its own
    sharex: bool = True,
    xlim: tuple | Mapping | None = None,  # of all or by panel; a mark beyond it is an arrow at the edge
    xlabel: str = "",
    title: str = "",
    width: float | None = None,  # inches; side by side panels take both columns of a paper
) -> Figure:
    """A row for each value of `y`, in it a mark with its interval for each row of the frame, in the frame's order.

    Conditions have their own order and colours. Optional columns: `seed` lets a mark stand once for each seed;
    `by_seed`, a list of numbers, is drawn as dots. Shares have the axis from 0 to 1.
    """
    conditions = y in frame and set(frame[y]) <= set(CONDITIONS)
    color = y if conditions and color is None else color
    keys = [c for c in (panel, y, color if color in frame else None, fill and fill[0]) if c]
    frame = check_frame(frame, x, keys, title or "rows", *(band or ())[:1])
    frame = frame.sort_values(y, key=lambda names: names.map(CONDITIONS.index), kind="stable") if conditions else frame
    parts = dict(list(frame.groupby(panel, sort=False))) if panel else {None: frame}
    names = {key: list(dict.fromkeys((part if stack else frame)[y])) for key, part in parts.items()}
    most = int(frame.groupby([panel, y] if panel else y).size().max())
    tall = 0.05 + (0.12 if numbers or most < 3 else 0.09) * most  # inches of a row, if its name is no taller
    heights = [len(n) * max(tall, 0.15 + 0.12 * max(words(name).count("\n") for name in n)) for n in names.values()]
    numeric = frame[[c for c in ("point", "low", "high") if c in frame]].to_numpy()
    if xlim is None and not signed and numeric.min() >= 0 and 0.25 < numeric.max() <= 1:
        xlim = (-0.02, 1.02)
    looks = style.choose_looks(frame, color)
    handles = {words(v): look | {"ls": ""} for v, look in looks.items() if color in frame and color != y}
    levels = _list_levels(references, looks, handles)
    plain, kinds = [*looks.values()][0] | {"ls": ""}, {True: {}, False: {"mfc": "white"}}
    if fill:
        handles |= {fill[1 if k else 2]: plain | face for k, face in kinds.items() if k in set(frame[fill[0]])}
    handles |= {band[1]: {"color": BAND, "lw": 5}} if band else {}
    if "by_seed" in frame and frame["by_seed"].map(len).max() > 1:
        handles["one seed"] = {"color": INK, "marker": ".", "ls": "", "ms": 3}
    width = width or (PAGE if panel and not stack else COLUMN)
    fig, axes = open_panels(frame, panel, heights if stack else heights[:1], title, handles, width, sharex, stack)
    for key, part in parts.items():
        ax, limits = axes[key], xlim.get(key) if isinstance(xlim, Mapping) else xlim
        list_rows(ax, names[key], bars)
        for name, members in part.groupby(y, sort=False):
            for i, row in enumerate(members.to_dict("records")):
                at = names[key].index(name) + (i - (len(members) - 1) / 2) * 0.76 / most
                look = looks[row.get(color, color)] | {"ms": 4.2 if most < 4 else 3.4}
                look |= kinds[bool(row[fill[0]])] if fill else {}
                _draw_row(ax, at, row, look, bars and 0.7 / most, band and row[band[0]], limits)
                if numbers:
                    _write_number(ax, at, row, numbers, signed, "bridged" in (name, row.get(color)))
        for where, name, point, _, look in levels:
            if where in (None, key):
                ax.axvline(point, zorder=1, gid=f"reference:{name}", **look)
        if signed:
            ax.axvline(0, color="black", lw=0.8, zorder=1)
        if limits:  # without them panels share the limits of all
            ax.set_xlim(limits)
        ax.locator_params(axis="x", nbins=max(2, int(1.4 * width / (1 if stack else len(axes)))))
    return _label_panels(fig, axes, parts, xlabel)


@paper_figure
def lines(
    frame: pd.DataFrame,
    x: str,
    y: str = "point",
    color: str | None = None,
    panel: str | None = None,
    *,
    bars: bool = False,  # intervals as bars at the points instead of a band
    ends: bool = False,  # name each line where it ends instead of in a legend
    references: Mapping = NOTHING,  # {name or (panel, name): y or (y, low, high)}: level lines
    log_x: bool = False,
    sharey: bool = True,
    ylim: tuple | Mapping | None = None,
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
    width: float = COLUMN,
    height: float = 1.7,  # inches, of one panel
) -> Figure:
    """A line over `x` for each value of `color`, in `panel`s; x is measured, so that nothing is moved along it.

    With several seeds (a column `seed`) each is thin, with its own interval, and their mean is thick; where some
    have no value it ends, or with `bars` its mark is open. Without columns low and high there are no intervals.
    """
    keys = [c for c in (panel, color if color in frame else None) if c]
    frame = check_frame(frame, y, keys, title or "lines", x).sort_values(x, kind="stable")
    parts = dict(list(frame.groupby(panel, sort=False))) if panel else {None: frame}
    looks = style.choose_looks(frame, color)
    handles = {words(v): look for v, look in looks.items() if color in frame and color != panel}
    levels = _list_levels(references, looks, handles)
    if bars and frame.groupby([*keys, x]).size().nunique() > 1:
        handles["open: not every seed"] = {"color": INK, "mfc": "white", "marker": "o", "ls": ""}
    fig, axes = open_panels(frame, panel, [height], title, {} if ends else handles, width, sharey=sharey)
    for key, part in parts.items():
        ax, last = axes[key], {}
        for value, series in part.groupby(color, sort=False) if color in frame else [(color, part)]:
            last[value] = _draw_series(ax, series, x, looks[value], bars)
        for where, name, point, band, look in levels:
            if where in (None, key):
                last[name] = point
                ax.axhline(point, zorder=1, gid=f"reference:{name}", **look)
                ax.axhspan(*band, color=look["color"], alpha=0.14, lw=0, gid=f"band:{name}")
        if log_x:
            _scale_log(ax, sorted(set(frame[x])), width / ax.get_gridspec().ncols)
        if limits := ylim.get(key) if isinstance(ylim, Mapping) else ylim:
            ax.set_ylim(limits)
        ax.set_ylabel(ylabel if ax.get_subplotspec().is_first_col() else "")
        if ends:
            ax.set_xlim(frame[x].min(), max(frame[x].max(), frame[x].min() + 1))
            _label_ends(fig, ax, last, looks)
    return _label_panels(fig, axes, parts, xlabel)


def _list_levels(references: Mapping, looks: Mapping, handles: dict) -> list[tuple]:
    """(panel or None, name, value, band, look) of each line; `handles`, the legend, gets the names that it lacks."""
    found = []
    for key, value in references.items():
        panel, name = key if isinstance(key, tuple) else (None, key)
        point, *band = value if isinstance(value, tuple) else (value, value, value)
        color = looks.get(name, {"color": COLORS.get(name, INK)})["color"]
        found.append((panel, name, point, band, {"color": color, "ls": style.DASHES.get(name, DOTTED), "lw": 1.0}))
        if words(name) not in handles:
            single = key in COLORS and not isinstance(value, tuple)
            handles[words(name) + (f" {format_share(point)}" if single else "")] = found[-1][-1]
    return found


def open_panels(frame, panel, heights, title, handles, width, sharex=True, stack=False, sharey=True):
    """A figure and its panels {key: axes} below title and legend; `heights`: inches of each row of panels."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    panels = frame[panel].nunique() if panel and not stack else 1
    across = panels if panels < 6 else min(4, math.ceil(math.sqrt(panels)))
    down = -(-panels // across)
    title, longest = textwrap.fill(title, int(14 * width)), max(map(len, handles), default=1)
    columns = max(1, min(len(handles), int(width / (0.36 + 0.057 * longest))))
    above = 0.57 + 0.15 * title.count("\n") + 0.14 * -(-len(handles) // columns)
    form = {"col": panel, "col_wrap": across if down > 1 else None}
    form = {"row": panel, "gridspec_kws": {"height_ratios": heights}} if stack else form
    grid = sns.FacetGrid(frame, sharex=sharex, sharey=sharey and not stack, **form)
    grid.tick_params(labelsize=7)  # ticks are made anew at each drawing, by the size in force then
    fig, mark = grid.figure, functools.partial(plt.Line2D, [], [])
    plt.close(fig)  # a notebook shows a figure that is returned; an open one it would show twice
    fig.set_size_inches(width, above + down * (sum(heights) + (0.3 * len(heights) if panel else 0)))
    fig.set_layout_engine("constrained")
    entries = [mark(**{"ms": 4.5, "lw": 1.3} | look) if isinstance(look, dict) else look for look in handles.values()]
    place = {"loc": "outside upper left", "alignment": "left", "ncols": columns}
    bold = {"weight": "bold", "size": 8}
    fig.legend(entries, [*handles], title=title, title_fontproperties=bold, **place)
    return fig, grid.axes_dict or {None: grid.ax}


def _label_panels(fig: Figure, axes: dict, parts: dict, xlabel: str) -> Figure:
    """Titles of the panels, the label of x, and n: once if it is the same everywhere, else in the titles."""
    sizes = {key: style.format_size(part) for key, part in parts.items()}
    same = len(set(sizes.values())) == 1
    for key, ax in axes.items() if None not in axes else ():
        below = "" if same else "\n" + sizes[key]
        ax.set_title(words(key) + (below if ax.get_gridspec().ncols == 1 else below.replace(" on ", "\non ")))
    size = f"({sizes.popitem()[1]})" if same and any(sizes.values()) else ""
    limit = int(16.5 * fig.get_figwidth())
    between = " " if len(xlabel) + len(size) < limit else "\n"
    fig.supxlabel((textwrap.fill(xlabel, limit) + between + size).strip(), fontsize=7)
    return fig


def list_rows(ax: Axes, names: list, bars: bool) -> None:
    """Names on the left, the first on top; a pale line leads from each name to its marks, a rule parts families."""
    ax.set(yticks=range(len(names)), yticklabels=map(words, names), ylim=(len(names) - 0.45, -0.55))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(not bars, axis="y")
    for at, name in enumerate(names):
        if name == "bridged":
            ax.get_yticklabels()[at].set_fontweight("bold")
        if at and name in style.FAMILY_STARTS and set(names) <= set(CONDITIONS):
            ax.axhline(at - 0.5, color=RULE, lw=0.5)


def _draw_row(ax: Axes, at: float, row: dict, look: dict, bar: float, band: float | None, limits) -> None:
    """One mark at height `at`: its band, its interval, the point (or a bar of height `bar`), its seeds."""
    gid = row["gid"]
    if band is not None:
        ax.barh(at, 2 * band, 0.84, left=-band, color=BAND, lw=0, zorder=0, gid=f"band:{gid}")
    if "low" in row:
        ax.hlines(at, row["low"], row["high"], color=look["mec"], lw=1.1, zorder=3, gid=f"interval:{gid}")
    for seed in row["by_seed"] if len(row.get("by_seed", ())) > 1 else ():
        ax.plot(seed, at + 0.28, ".", color=INK, ms=2.5, zorder=3, gid=f"seed:{gid}")
    if bar:
        ax.barh(at, row["point"], bar, color=look["color"], lw=0, gid=f"bar:{gid}")
        return
    (left, right), place, kind = limits or (-math.inf, math.inf), row["point"], "point"
    if not left <= place <= right:
        place, arrow = (0.96 * left, "<") if place < left else (0.96 * right, ">")
        look, kind = look | {"marker": arrow}, "outside"
    ax.plot(place, at, gid=f"{kind}:{gid}", **look | {"ls": "", "zorder": 4})


def _write_number(ax: Axes, at: float, row: dict, numbers: str, signed: bool, bold: bool) -> None:
    """A mark's number, or that with its interval, to the right of the axes."""
    digits = 3 if abs(row["point"]) < 10 else 1  # a share or bits; tokens and the like
    values = [row["point"]] if numbers == "point" else [row["point"], row["low"], row["high"]]
    write = format_share if numbers == "point" else style.format_interval
    text = write(*values, digits, signed).replace("-", "\N{MINUS SIGN}")
    look = {"fontsize": 7, "weight": "bold" if bold else "normal", "va": "center", "annotation_clip": False}
    ax.annotate(text, (1.04, at), xycoords=("axes fraction", "data"), **look)


def _draw_series(ax: Axes, series: pd.DataFrame, x: str, look: dict, bars: bool) -> float:
    """One line with the intervals of its seeds; returns where it ends."""
    seeds = [run for _, run in series.groupby("seed")] if "seed" in series else [series]
    gid, shared = series["gid"].iloc[0], {"color": look["color"]}
    for run in seeds:
        if "low" in run and (bars or len(run) == 1):
            ax.vlines(run[x], run["low"], run["high"], lw=1, alpha=0.55, gid=f"interval:{gid}", **shared)
        elif "low" in run:
            pale = 0.1 if len(seeds) > 1 else 0.2
            ax.fill_between(run[x], run["low"], run["high"], lw=0, alpha=pale, gid=f"band:{gid}", **shared)
        if len(seeds) > 1:
            ax.plot(run[x], run["point"], "." if bars else "-", ms=3, lw=0.6, alpha=0.7, gid=f"seed:{gid}", **shared)
    mean = series.groupby(x)["point"].agg(["mean", "size"])
    whole = mean["size"] == len(seeds)
    if not whole.any():
        raise ValueError(f"lines: the seeds of '{gid}' share no {x}; draw them separately")
    mean = mean["mean"] if bars else mean.loc[whole, "mean"]
    look = look | {"ms": 3.6, "clip_on": False, "zorder": 3}
    ax.plot(mean.index, mean, gid=f"line:{gid}", markevery=max(1, len(mean) // 10), **look)
    if bars and not whole.all():
        ax.plot(mean.index[~whole], mean[~whole], gid=f"fewer:{gid}", **look | {"ls": "", "mfc": "white"})
    return mean.iloc[-1]


def _scale_log(ax: Axes, places: list, width: float) -> None:
    """A log axis with a tick at each measured place; a number at as many as have room in `width` inches."""
    every = -(-len(places) // int(3.2 * width))
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, [f"{place:,}" if i % every == 0 else "" for i, place in enumerate(places)])
    ax.set_xticks([], minor=True)


def _label_ends(fig: Figure, ax: Axes, ends: dict, looks: dict) -> None:
    """Name each line where it ends; labels are moved apart as little as their height asks for."""
    from scipy.optimize import isotonic_regression

    names = sorted(ends, key=ends.get)
    texts = [textwrap.fill(f"{words(name)} {format_share(ends[name])}", 17) for name in names]
    fig.draw_without_rendering()  # the axes' height in points is known only after a layout
    point = (ax.get_ylim()[1] - ax.get_ylim()[0]) * fig.dpi / (ax.get_window_extent().height * 72)
    room = [9.2 * point * (text.count("\n") + 1) for text in texts]
    below = [sum(room[:i]) + room[i] / 2 for i in range(len(room))]
    places = isotonic_regression([ends[name] - b for name, b in zip(names, below, strict=True)]).x + below
    look = {"xycoords": ("axes fraction", "data"), "textcoords": ("axes fraction", "data"), "va": "center"}
    for name, text, place in zip(names, texts, places, strict=True):
        color = looks.get(name, {"color": COLORS.get(name, INK)})["color"]
        look |= {"arrowprops": {"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkA": 1, "shrinkB": 1}}
        look |= {"color": darken(color), "weight": "bold" if name == "bridged" else "normal", "fontsize": 7}
        ax.annotate(text, (1, ends[name]), (1.06, place), annotation_clip=False, gid=f"label:{name}", **look)
