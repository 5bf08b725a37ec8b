"""Two ways to draw numbers with intervals: `rows` and `lines`; `plots` makes the figures of a run of them.

    fig = rows(share(answers, by="condition"), y="condition", numbers="interval", title="Who answers right?")
    fig = lines(frame, x="n_soft_tokens", color="producer", log_x=True, title="What the bridge recovers")

A frame holds finished numbers, a row for each mark: `point low high n n_units`, and the columns it is split by.
`color` is a column, or one condition for all marks. Nothing here computes a statistic but the mean of the seeds that
it draws; nothing shows or saves. Each mark has a `gid` such as `interval:all:bridged`, by which a test finds it.
"""

from __future__ import annotations

import functools
import math
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence

from bridgekit.config import CONDITIONS
from bridgekit.results import style
from bridgekit.results.style import COLORS, COLUMN, DASHES, FAMILY_STARTS, PAGE, darken, format_share, words

if typing.TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE, BAND = "#202020", "#c8c8c8", "#ebebeb"


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


def check_frame(frame: pd.DataFrame, point: str, columns: Iterable[str], what: str) -> pd.DataFrame:
    """The frame with `point` under that name; refused where it cannot be drawn truthfully.

    That is: no rows, a column that is not there, a number that is NaN, a point outside its interval, and two rows
    for one mark (`columns` and, if there, `seed` tell marks apart).
    """
    columns = list(dict.fromkeys(columns))
    for column in (point, *columns):
        if column not in frame:
            raise ValueError(f"{what}: no column '{column}' (there are: {', '.join(map(str, frame.columns))})")
    if frame.empty:
        raise ValueError(f"{what}: no rows, so nothing to draw; evaluate something first")
    frame = frame.rename(columns={point: "point"}).reset_index(drop=True)
    numeric = {"point": point} | {c: c for c in (*columns, "low", "high") if c in frame}
    wrong = {f"{shown} is not a number": frame[c].isna() for c, shown in numeric.items()}
    if "low" in frame:
        inside = frame["point"].between(frame["low"] - 1e-9, frame["high"] + 1e-9)
        wrong[f"{point} is outside its interval"] = ~inside
    again = frame.duplicated([*columns, *({"seed"} & set(frame))])
    wrong["two rows of this name; a column seed, color or panel must tell them apart"] = again
    for problem, where in wrong.items():
        for row in frame[where].to_dict("records"):
            name = ", ".join(str(row[column]).replace("\n", " ") for column in columns)
            raise ValueError(f"{what}: '{name}': {problem}")
    return frame


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
    references: Mapping | None = None,  # {name or (panel, name): x}: lines; a condition's name has its look
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
    frame = check_frame(frame, x, [*keys, *(band or ())[:1]], title or "rows")
    frame = frame.sort_values(y, key=lambda names: names.map(CONDITIONS.index), kind="stable") if conditions else frame
    looks, parts, references = _choose_looks(frame, color), _split(frame, panel), references or {}
    most = int(frame.groupby([panel, y] if panel else y).size().max())
    names = {key: list(dict.fromkeys((part if stack else frame)[y])) for key, part in parts}
    tall = 0.05 + (0.12 if numbers or most < 3 else 0.09) * most  # inches of a row, if its name is no taller
    lines_of = {key: max(words(name).count("\n") for name in shown) + 1 for key, shown in names.items()}
    heights = [len(names[key]) * max(tall, 0.12 * lines_of[key] + 0.03) for key in names]
    numeric = frame[[c for c in ("point", "low", "high") if c in frame]].to_numpy()
    if xlim is None and not signed and numeric.min() >= 0 and 0.25 < numeric.max() <= 1:
        xlim = (-0.02, 1.02)
    handles = {words(v): look | {"ls": ""} for v, look in looks.items() if color in frame and color != y}
    handles |= _name_references(references, handles, looks) | _name_marks(frame, [*looks.values()][0], fill, band)
    width = width or (PAGE if panel and not stack else COLUMN)
    fig, axes = open_panels(frame, panel, heights[: len(heights) if stack else 1], title, handles, width, sharex, stack)
    for key, part in parts:
        ax, limits = axes[key], xlim.get(key) if isinstance(xlim, Mapping) else xlim
        list_rows(ax, names[key], stack or key == parts[0][0], bars)
        for name, members in part.groupby(y, sort=False):
            for i, row in enumerate(members.to_dict("records")):
                at = names[key].index(name) + (i - (len(members) - 1) / 2) * 0.76 / most
                look = looks[row[color] if color in frame else color] | {"ms": 4.2 if most < 4 else 3.4}
                look = look | {"mfc": "white"} if fill and not row[fill[0]] else look
                _draw_row(ax, at, row, look, _gid(row, keys), bars and 0.7 / most, band and row[band[0]], limits)
                if numbers:
                    _write_number(ax, at, row, numbers == "interval", signed, "bridged" in (name, row.get(color)))
        _draw_references(ax, key, references, looks)
        if signed:
            ax.axvline(0, color="black", lw=0.8, zorder=1)
        if limits:  # without them panels share the limits of all
            ax.set_xlim(limits)
        ax.locator_params(axis="x", nbins=max(2, int(1.4 * width / (1 if stack else len(axes)))))
    return _label_panels(fig, axes, frame, panel, xlabel)


@paper_figure
def lines(
    frame: pd.DataFrame,
    x: str,
    y: str = "point",
    color: str | None = None,
    panel: str | tuple[str, str] | None = None,  # or (row, column)
    *,
    bars: bool = False,  # intervals as bars at the points instead of a band
    ends: bool = False,  # name each line where it ends instead of in a legend
    references: Mapping | None = None,  # {name or (panel, name): y or (y, low, high)}: level lines
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
    keys = [*([panel] if isinstance(panel, str) else panel or ()), *([color] if color in frame else [])]
    frame = check_frame(frame, y, [*keys, x], title or "lines").sort_values(x, kind="stable")
    looks, parts, references = _choose_looks(frame, color), _split(frame, panel), references or {}
    handles = {words(v): look for v, look in looks.items() if color in frame and color != panel and not ends}
    handles |= {} if ends else _name_references(references, handles, looks)
    counts = frame.groupby([*keys, x]).size()
    if bars and counts.min() < counts.max():
        handles["open: not every seed"] = {"color": INK, "mfc": "white", "marker": "o", "ls": ""}
    fig, axes = open_panels(frame, panel, [height], title, handles, width, sharey=sharey)
    for key, part in parts:
        ax, last = axes[key], {}
        for value, series in part.groupby(color, sort=False) if color in frame else [(color, part)]:
            last[value] = _draw_series(ax, series, x, looks[value], _gid(series.iloc[0], keys) or str(color), bars)
        last |= _draw_references(ax, key, references, looks, level=True)
        if log_x:
            _scale_log(ax, sorted(set(frame[x])), width / ax.get_gridspec().ncols)
        if limits := ylim.get(key) if isinstance(ylim, Mapping) else ylim:
            ax.set_ylim(limits)
        ax.set_ylabel(ylabel if ax.get_subplotspec().is_first_col() else "")
        if ends:
            ax.set_xlim(frame[x].min(), max(frame[x].max(), frame[x].min() + 1))
            _label_ends(fig, ax, last, looks)
    return _label_panels(fig, axes, frame, panel, xlabel)


def _split(frame: pd.DataFrame, panel: str | tuple | None) -> list[tuple]:
    """(key, rows) of each panel in the order of the frame; a figure without panels has the key None."""
    by = list(panel) if isinstance(panel, tuple) else panel
    return list(frame.groupby(by, sort=False)) if by else [(None, frame)]


def _gid(row: Mapping, keys: Sequence[str]) -> str:
    return ":".join(dict.fromkeys(str(row[key]) for key in keys))


def _choose_looks(frame: pd.DataFrame, color: str | None) -> dict:
    """{value of the column `color`, or `color` itself: colour, marker, dashes}."""
    if color is not None and color not in frame and color not in COLORS:
        raise ValueError(f"color: '{color}' is neither a column nor a condition")
    return style.choose_looks(frame[color] if color in frame else [color])


def _name_references(references: Mapping, handles: dict, looks: dict) -> dict[str, dict]:
    """The legend's entries for lines whose name is in it not yet; a condition's says its value too."""
    found = {}
    for key, level in references.items():
        panel, name = key if isinstance(key, tuple) else (None, key)
        value = f" {format_share(level)}" if panel is None and name in COLORS and not isinstance(level, tuple) else ""
        if words(name) not in handles:
            found[words(name) + value] = _reference_look(name, looks)
    return found


def _name_marks(frame: pd.DataFrame, look: dict, fill: tuple | None, band: tuple | None) -> dict[str, dict]:
    """The legend's entries for full and open marks, the band, and the dots of single seeds."""
    handles, faces = {}, {True: {"ls": ""}, False: {"ls": "", "mfc": "white"}}
    if fill:
        present = set(frame[fill[0]].astype(bool))
        handles = {fill[1 if full else 2]: look | faces[full] for full in faces if full in present}
    if band:
        handles[band[1]] = {"color": BAND, "lw": 5}
    if "by_seed" in frame and frame["by_seed"].map(len).max() > 1:
        handles["one seed"] = {"color": INK, "marker": ".", "ls": "", "ms": 3}
    return handles


def _reference_look(name: object, looks: dict) -> dict:
    if name in COLORS:
        return {"color": COLORS[name], "ls": DASHES[name], "lw": 1.1}
    return {"color": looks[name]["color"] if name in looks else INK, "ls": (0, (1, 1.2)), "lw": 1.0}


def open_panels(frame, panel, heights, title, handles, width, sharex=True, stack=False, sharey=True):
    """A figure and its panels {key: axes} below title and legend; `heights`: inches of each row of panels."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    row, col = panel if isinstance(panel, tuple) else (panel, None) if stack else (None, panel)
    across = frame[col].nunique() if col else 1
    wrap = 4 if not row and across > 5 else None
    heights = heights if stack else heights * (frame[row].nunique() if row else -(-across // (wrap or across)))
    title, longest = textwrap.fill(title, int(14 * width)), max(map(len, handles), default=1)
    columns = max(1, min(len(handles), int(width / (0.36 + 0.057 * longest))))
    above = 0.15 * (title.count("\n") + 1) + 0.14 * -(-len(handles) // columns)
    total = 0.42 + above + sum(heights) + (0.3 if panel else 0) * (len(heights) if stack or wrap else 1)
    ratios = None if wrap else {"height_ratios": heights}
    with plt.rc_context({"figure.constrained_layout.use": False}):  # seaborn calls a layout of its own
        grid = sns.FacetGrid(
            frame, row=row, col=col, col_wrap=wrap, sharex=sharex, sharey=sharey and not stack, gridspec_kws=ratios
        )
    fig, line = grid.figure, functools.partial(plt.Line2D, [], [])
    plt.close(fig)  # a notebook shows a figure that is returned; an open one it would show twice
    fig.set_size_inches(width, total)
    fig.set_layout_engine("constrained", h_pad=0.03, w_pad=0.03)
    entries = [line(**_edge({"ms": 4.5, "lw": 1.3} | h)) if isinstance(h, dict) else h for h in handles.values()]
    bold, place = {"weight": "bold", "size": 8}, "outside upper left"
    fig.legend(entries, [*handles], title=title, ncols=columns, loc=place, alignment="left", title_fontproperties=bold)
    for ax in grid.axes.flat:
        ax.set(title="", xlabel="", ylabel="")
        ax.tick_params(labelsize=7)  # ticks are made anew at each drawing, by the size in force then
    return fig, grid.axes_dict or {None: grid.ax}


def _edge(look: dict) -> dict:
    """The look with a dark edge around its marks, so that pale ones show in grey print."""
    return {"mec": darken(look["color"]), "mew": 0.6} | look


def _label_panels(fig: Figure, axes: dict, frame: pd.DataFrame, panel: str | tuple | None, xlabel: str) -> Figure:
    """Titles of the panels, the label of x, and n: once if it is the same everywhere, else in the titles."""
    sizes = {key: style.format_size(part) if "n" in part else "" for key, part in _split(frame, panel)}
    same = len(set(sizes.values())) == 1
    for key, ax in axes.items() if panel else ():
        grid = ax.get_subplotspec()
        if isinstance(panel, tuple):
            ax.set_title(words(key[1]) if grid.is_first_row() else "")
            ax.set_ylabel(words(key[0]) if grid.is_first_col() else "")
        else:
            size = "" if same or not sizes[key] else "\n" + sizes[key].replace(" on ", "\non ")
            ax.set_title(words(key) + (size.replace("\non", " on") if ax.get_gridspec().ncols == 1 else size))
    size = f"({sizes[next(iter(axes))]})" if same and sizes[next(iter(axes))] else ""
    limit = int(16.5 * fig.get_figwidth())
    between = " " if len(xlabel) + len(size) < limit else "\n"
    fig.supxlabel((textwrap.fill(xlabel, limit) + between + size).strip(), fontsize=7)
    return fig


def list_rows(ax: Axes, names: list, labelled: bool, bars: bool) -> None:
    """Names on the left, the first on top; a pale line leads from each name to its marks, a rule parts families."""
    ax.set_yticks(range(len(names)), [words(name) for name in names])
    ax.set_ylim(len(names) - 0.45, -0.55)
    ax.tick_params(axis="y", length=0, labelleft=labelled)
    ax.spines["left"].set_visible(False)
    ax.grid(not bars, axis="y")
    if labelled and "bridged" in names:
        ax.get_yticklabels()[names.index("bridged")].set_fontweight("bold")
    for at, name in enumerate(names):
        if at and name in FAMILY_STARTS and set(names) <= set(CONDITIONS):
            ax.axhline(at - 0.5, color=RULE, lw=0.5)


def _draw_row(ax: Axes, at: float, row: dict, look: dict, gid: str, bar: float, band: float | None, limits) -> None:
    """One mark at height `at`: its band, its interval, the point (or a bar of height `bar`), its seeds."""
    if band is not None:
        ax.barh(at, 2 * band, 0.84, left=-band, color=BAND, lw=0, zorder=0, gid=f"band:{gid}")
    if "low" in row:
        ax.hlines(at, row["low"], row["high"], color=darken(look["color"]), lw=1.1, zorder=3, gid=f"interval:{gid}")
    for seed in row["by_seed"] if len(row.get("by_seed", ())) > 1 else ():
        ax.plot(seed, at + 0.28, ".", color=INK, ms=2.5, zorder=3, gid=f"seed:{gid}")
    if bar:
        ax.barh(at, row["point"], bar, color=look["color"], lw=0, gid=f"bar:{gid}")
        return
    look, (left, right) = _edge(look | {"ls": "", "zorder": 4}), limits or (-math.inf, math.inf)
    ax.plot(row["point"], at, gid=f"point:{gid}", **look, clip_on=not left <= row["point"] <= right)
    if not left <= row["point"] <= right:
        end, arrow = (left, "<") if row["point"] < left else (right, ">")
        ax.plot(0.96 * end, at, gid=f"outside:{gid}", **look | {"marker": arrow})


def _write_number(ax: Axes, at: float, row: dict, interval: bool, signed: bool, bold: bool) -> None:
    """A mark's numbers, to the right of the axes."""
    digits = 3 if abs(row["point"]) < 10 else 1  # a share or bits; tokens and the like
    text = format_share(row["point"], digits, signed)
    if isinstance(row["point"], int):  # a count
        text = f"{row['point']:+,}" if signed else f"{row['point']:,}"
    elif interval:
        text = style.format_interval(row["point"], row["low"], row["high"], signed=signed)
    look = {"va": "center", "fontsize": 7, "weight": "bold" if bold else "normal", "annotation_clip": False}
    ax.annotate(text.replace("-", "\N{MINUS SIGN}"), (1.04, at), xycoords=("axes fraction", "data"), **look)


def _draw_references(ax: Axes, panel: object, references: Mapping, looks: dict, level: bool = False) -> dict:
    """The lines of this panel, upright or `level`, a level one with its band; returns {name: value}."""
    drawn = {}
    for key, value in references.items():
        only, name = key if isinstance(key, tuple) else (panel, key)
        if only != panel:
            continue
        look, (point, *band) = _reference_look(name, looks), value if isinstance(value, tuple) else (value,)
        (ax.axhline if level else ax.axvline)(point, zorder=1, gid=f"reference:{name}", **look)
        if band:
            ax.axhspan(*band, color=look["color"], alpha=0.14, lw=0, gid=f"band:{name}")
        drawn[name] = point
    return drawn


def _draw_series(ax: Axes, series: pd.DataFrame, x: str, look: dict, gid: str, bars: bool) -> float:
    """One line with the intervals of its seeds; returns where it ends."""
    seeds = [run for _, run in series.groupby("seed")] if "seed" in series else [series]
    small = {"ls": "", "marker": ".", "ms": 3} if bars else {"lw": 0.6, "alpha": 0.7}
    for run in seeds:
        if "low" in run and (bars or len(run) == 1):
            ax.vlines(run[x], run["low"], run["high"], lw=1, alpha=0.55, color=look["color"], gid=f"interval:{gid}")
        elif "low" in run:
            shade = {"color": look["color"], "alpha": 0.1 if len(seeds) > 1 else 0.2, "lw": 0}
            ax.fill_between(run[x], run["low"], run["high"], gid=f"band:{gid}", **shade)
        if len(seeds) > 1:
            ax.plot(run[x], run["point"], color=look["color"], gid=f"seed:{gid}", **small)
    mean = series.groupby(x)["point"].agg(["mean", "size"])
    whole = mean["size"] == len(seeds)
    if not whole.any():
        raise ValueError(f"lines: the seeds of '{gid}' share no {x}; draw them separately")
    mean = mean["mean"] if bars else mean.loc[whole, "mean"]
    look = _edge(look) | {"ms": 3.6, "clip_on": False, "zorder": 3}
    ax.plot(mean.index, mean, gid=f"line:{gid}", markevery=max(1, len(mean) // 10), **look)
    if bars and not whole.all():
        ax.plot(mean.index[~whole], mean[~whole], **look | {"ls": "", "mfc": "white"}, gid=f"fewer:{gid}")
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

    named = sorted((y, name, textwrap.fill(f"{words(name)} {format_share(y)}", 17)) for name, y in ends.items())
    fig.draw_without_rendering()  # the axes' height in points is known only after a layout
    point = (ax.get_ylim()[1] - ax.get_ylim()[0]) * fig.dpi / (ax.get_window_extent().height * 72)
    room = [9.2 * point * (text.count("\n") + 1) for *_, text in named]
    below = [sum(room[:i]) + room[i] / 2 for i in range(len(room))]
    places = isotonic_regression([y - b for (y, *_), b in zip(named, below, strict=True)]).x
    for (y, name, text), place, offset in zip(named, places, below, strict=True):
        color = _reference_look(name, looks)["color"]
        arrow = {"arrowstyle": "-", "color": color, "lw": 0.7, "shrinkA": 1, "shrinkB": 1}
        look = {"color": darken(color), "weight": "bold" if name == "bridged" else "normal", "fontsize": 7}
        coords = {"xycoords": ("axes fraction", "data"), "textcoords": ("axes fraction", "data"), "va": "center"}
        ax.annotate(text, (1, y), (1.06, place + offset), annotation_clip=False, arrowprops=arrow, **coords, **look,
                    gid=f"label:{name}")  # fmt: skip
