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

import pandas as pd

from bridgekit.config import CONDITIONS
from bridgekit.results import style
from bridgekit.results.style import COLORS, COLUMN, PAGE, format_share, words

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, RULE, BAND = "#202020", "#c8c8c8", "#ebebeb"
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
    names = [":".join(dict.fromkeys(map(str, row))) for row in frame[keys].to_numpy(dtype=object)]  # also of no keys
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
    numbers: str = "point",  # point | interval | "": what is written to the right of each mark
    signed: bool = False,  # differences: numbers with a sign, and a line at zero
    references: Mapping = NOTHING,  # {name or (panel, name): x}: lines; a condition's name has its look
    sharex: bool = True,
    xlim: tuple | Mapping | None = None,  # of all or by panel; a mark beyond it is an arrow at the edge
    xlabel: str = "",
    title: str = "",
    width: float | None = None,  # inches; panels take both columns of a paper
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
    looks, names = style.choose_looks(frame, color), list(dict.fromkeys(frame[y]))
    cells = frame.groupby([panel, y] if panel else y)[y]
    most = cells.size().max()
    frame["at"] = frame[y].map(names.index) + (cells.cumcount() - (cells.transform("size") - 1) / 2) * 0.76 / most
    numeric = frame.filter(["point", "low", "high"])
    if xlim is None and not signed and numeric.min(axis=None) >= 0 and 0.25 < numeric.max(axis=None) <= 1:
        xlim = (-0.02, 1.02)
    width, panels = width or (PAGE if panel else COLUMN), open_panels(frame, panel, sharex=sharex)
    for key, (ax, part) in panels.items():
        limits = xlim.get(key) if isinstance(xlim, Mapping) else xlim
        list_rows(ax, names)
        for row in part.to_dict("records"):
            look = looks[row.get(color, color)] | {"ms": 4.2 if most < 4 else 3.4, "ls": ""}
            labels = [words(row[color])] if color in frame and color != y else []
            if fill:
                look |= {} if row[fill[0]] else {"mfc": "white"}
                labels.append(fill[1] if row[fill[0]] else fill[2])
            if band:
                reach, shade = row[band[0]], {"color": BAND, "lw": 0, "zorder": 0, "label": band[1]}
                ax.barh(row["at"], 2 * reach, 0.84, left=-reach, gid=f"band:{row['gid']}", **shade)
            _draw_mark(ax, row, look | {"label": ", ".join(labels)}, *limits or (-math.inf, math.inf))
            if numbers:
                _write_number(ax, row, numbers, signed, "bridged" in (row[y], row.get(color)))
        _draw_levels(ax.axvline, key, references, looks)
        if signed:
            ax.axvline(0, color="black", lw=0.8, zorder=1)
        if limits:  # without them panels share the limits of all
            ax.set_xlim(limits)
        ax.locator_params(axis="x", nbins=max(2, int(1.4 * width / len(panels))))
    tall = 0.05 + (0.12 if numbers or most < 3 else 0.09) * most  # inches of a row, if its name is no taller
    height = len(names) * max(tall, 0.15 + 0.12 * max(words(name).count("\n") for name in names))
    return finish_figure(panels, title, xlabel, width, max(0.35, height))  # a single row too has room for its mark


@paper_figure
def lines(
    frame: pd.DataFrame,
    x: str,
    y: str = "point",
    color: str | None = None,
    panel: str | None = None,
    *,
    bars: bool = False,  # intervals as bars at the points instead of a band
    references: Mapping = NOTHING,  # {name or (panel, name): y or (y, low, high)}: level lines
    log_x: bool = False,
    sharex: bool = True,
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
    looks, panels = style.choose_looks(frame, color), open_panels(frame, panel, sharex=sharex, sharey=sharey)
    for key, (ax, part) in panels.items():
        for value, series in part.groupby(color, sort=False) if color in frame else [(color, part)]:
            named = color in frame and color != panel
            _draw_series(ax, series, x, looks[value] | {"label": words(value) if named else ""}, bars)
        _draw_levels(ax.axhline, key, references, looks)
        if log_x:
            ax.set_xscale("log", base=2)
            ax.xaxis.set_major_formatter("{x:,.0f}")
        if limits := ylim.get(key) if isinstance(ylim, Mapping) else ylim:
            ax.set_ylim(limits)
        if ax.get_subplotspec().is_first_col():
            ax.set_ylabel(ylabel)
    return finish_figure(panels, title, xlabel, width, height)


def open_panels(frame: pd.DataFrame, panel: str | None = None, **share) -> dict:
    """{key: (axes, rows)} of each panel in the frame's order, or {None: ...}; `finish_figure` gives them their size."""
    import matplotlib.pyplot as plt
    import seaborn as sns

    parts = dict(list(frame.groupby(panel, sort=False))) if panel else {None: frame}
    across = min(4, math.ceil(math.sqrt(len(parts)))) if len(parts) > 5 else None
    grid = sns.FacetGrid(frame, col=panel, col_order=parts if panel else None, col_wrap=across, **share)
    grid.tick_params(labelsize=7)  # ticks are made anew at each drawing, by the size in force then
    grid.figure.set_layout_engine("constrained")
    plt.close(grid.figure)  # a notebook shows a figure that is returned; an open one it would show twice
    return {key: (ax, part) for ax, (key, part) in zip(grid.axes.flat, parts.items(), strict=True)}


def finish_figure(panels: dict, title: str, xlabel: str, width: float, height: float) -> Figure:
    """Title, legend, names of the panels and of x, and n: once if it is the same everywhere, else above the panels.

    `height`: inches of one panel.
    """
    found, sizes = {}, {key: style.format_size(part) for key, (_, part) in panels.items()}
    same, heads = len(set(sizes.values())) == 1, []
    for key, (ax, _) in panels.items():
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
        if key is not None:
            heads.append(ax.set_title(words(key) + ("" if same else "\n" + sizes[key].replace(" on ", "\non "))))
    fig, down = ax.figure, ax.get_gridspec().nrows
    title, longest = textwrap.fill(title, int(14 * width)), max(map(len, found), default=1)
    columns = max(1, min(len(found), int(width / (0.36 + 0.057 * longest))))
    above = 0.57 + 0.15 * title.count("\n") + 0.14 * -(-len(found) // columns)
    head = max((0.18 + 0.12 * (text.get_text().count("\n") + 1) for text in heads), default=0)
    fig.set_size_inches(width, above + down * (height + head))
    place, bold = {"loc": "outside upper left", "alignment": "left"}, {"weight": "bold", "size": 8}
    fig.legend(found.values(), found, title=title, title_fontproperties=bold, ncols=columns, **place)
    limit, size = int(16.5 * width), f"({sizes.popitem()[1]})" if same and any(sizes.values()) else ""
    between = " " if len(xlabel) + len(size) < limit else "\n"
    fig.supxlabel((textwrap.fill(xlabel, limit) + between + size).strip(), fontsize=7)
    return fig


def list_rows(ax: Axes, names: list) -> None:
    """Names on the left, the first on top; a pale line leads from each name to its marks, a rule parts families."""
    ax.set(yticks=range(len(names)), yticklabels=map(words, names), ylim=(len(names) - 0.45, -0.55))
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y")
    for at, name in enumerate(names):
        if at and name in style.FAMILY_STARTS and set(names) <= set(CONDITIONS):
            ax.axhline(at - 0.5, color=RULE, lw=0.5)
    for label in ax.get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "bridged" else "normal")


def _draw_mark(ax: Axes, row: dict, look: dict, left: float, right: float) -> None:
    """A mark's interval, the dots of its seeds and its point; beyond `left` or `right` that is an arrow at the edge."""
    gid, at, point, kind = row["gid"], row["at"], row["point"], "point"
    if "low" in row:
        ax.hlines(at, row["low"], row["high"], color=look["mec"], lw=1.1, zorder=3, gid=f"interval:{gid}")
    for seed in row["by_seed"] if len(row.get("by_seed", ())) > 1 else ():
        ax.plot(seed, at + 0.28, ".", color=INK, ms=2.5, zorder=3, gid=f"seed:{gid}", label="one seed")
    if not left <= point <= right:
        ax.plot([], [], **look)  # the legend shows the mark, not the arrow
        point, arrow = (0.96 * left, "<") if point < left else (0.96 * right, ">")
        look, kind = look | {"marker": arrow, "label": ""}, "outside"
    ax.plot(point, at, gid=f"{kind}:{gid}", zorder=4, clip_on=False, **look)


def _write_number(ax: Axes, row: dict, numbers: str, signed: bool, bold: bool) -> None:
    """A mark's number, or that with its interval, to the right of the axes."""
    digits = 3 if abs(row["point"]) < 10 else 1  # a share or bits; tokens and the like
    ends = (row["low"], row["high"]) if numbers == "interval" else ()
    text = style.format_interval(row["point"], *ends, digits=digits, signed=signed)
    look = {"fontsize": 7, "weight": "bold" if bold else "normal", "va": "center", "annotation_clip": False}
    place = {"xy": (1.04, row["at"]), "xycoords": ("axes fraction", "data")}
    ax.annotate(text.replace("-", "\N{MINUS SIGN}"), **place, **look)


def _draw_levels(line: Callable, panel: object, references: Mapping, looks: Mapping) -> None:
    """The lines of this panel, `line` being axhline or axvline of its axes, with their bands."""
    for key, value in references.items():
        where, name = key if isinstance(key, tuple) else (panel, key)
        point, *band = value if isinstance(value, tuple) else (value,)
        if where == panel:
            color = looks[name]["color"] if name in looks else COLORS.get(name, INK)
            label = words(name) + (f" {format_share(point)}" if key in COLORS else "")
            look = {"color": color, "ls": style.DASHES.get(name, (0, (1, 1.2))), "lw": 1, "zorder": 1}
            line(point, gid=f"reference:{name}", label=label, **look)
            if band:
                line.__self__.axhspan(*band, color=color, alpha=0.14, lw=0, gid=f"band:{name}")


def _draw_series(ax: Axes, series: pd.DataFrame, x: str, look: dict, bars: bool) -> None:
    """One line with the intervals of its seeds."""
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
        look |= {"ls": "", "mfc": "white", "label": "open: not every seed"}
        ax.plot(mean.index[~whole], mean[~whole], gid=f"fewer:{gid}", **look)
