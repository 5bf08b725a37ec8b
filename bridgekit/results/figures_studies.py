"""Figures before and across runs: headroom, differences of the claim, repaired faults, recovery by seed.

    fig = plot_headroom({"source_only": 7, "both": 101, "target_only": 53, "neither": 39})
    fig = plot_differences(judge([frame_1, frame_2, frame_3]).differences())

The same rules as in `figures_runs`: the numbers come in finished, each mark carries a `gid`.
"""

from __future__ import annotations

import typing

from bridgekit.results.style import (
    COLORS,
    DARK,
    DASHES,
    HATCHES,
    LABELS,
    MARKERS,
    SUBSET_LABELS,
    TEXT_WIDTH,
    check_frame,
    draw_interval,
    ink,
    list_rows,
    new_figure,
    paper_figure,
    size_text,
    write_right,
)

if typing.TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In this order the source is right in the first two segments, the target in the middle two.
HEADROOM = {  # column: (label, colour, hatch)
    "source_only": ("only source right", COLORS["source"], HATCHES["source"]),
    "both": ("both right", "#DDDDDD", ""),
    "target_only": ("only target right", COLORS["target"], HATCHES["target"]),
    "neither": ("neither right", "#FFFFFF", ""),
}
PRODUCER_LOOKS = {  # two ways to make a message are one condition, so one colour; the marker tells them apart
    "resampler": ("resampler", COLORS["bridged"], COLORS["bridged"], MARKERS["bridged"]),
    "dit": ("DiT", COLORS["bridged"], "white", "s"),
    "constant": ("constant, no source", COLORS["constant"], COLORS["constant"], MARKERS["constant"]),
}


@paper_figure
def plot_headroom(headroom: dict | pd.DataFrame) -> Figure:
    """Counts of problems source_only, both, target_only, neither; a bar for each row (optional label)."""
    import pandas as pd

    table = pd.DataFrame([headroom]) if isinstance(headroom, dict) else headroom.reset_index(drop=True)
    table = table if "label" in table else table.assign(label="")
    check_frame(table, "headroom", "label", columns=list(HEADROOM))
    counts = table[list(HEADROOM)]
    if (counts < 0).any(axis=None) or (counts.sum(axis=1) <= 0).any():
        raise ValueError("headroom: a count is negative, or a bar has no problem at all")
    fig, ax = new_figure(aspect=(0.85 + 0.5 * len(table)) / TEXT_WIDTH)
    for y, row in counts.iterrows():
        left, total = 0.0, row.sum()
        for name, (label, colour, hatch) in HEADROOM.items():
            look = {"color": colour, "hatch": hatch, "lw": 0.6, "edgecolor": "white" if hatch else DARK}
            share, label = row[name] / total, label if y == 0 else None
            ax.barh(y, share, 0.56, left, label=label, gid=f"bar:{name}:{y}", **look)
            _write_count(ax, y, left, share, int(row[name]), colour)
            left += share
        ax.barh(y, 1, 0.56, color="none", edgecolor=DARK, lw=0.6, clip_on=False)
    sizes = zip(table["label"], counts.sum(axis=1), strict=True)
    list_rows(ax, [f"{label}\nn = {n:,.0f}".strip() for label, n in sizes], guides=False)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(0, 1)
    ax.set_xlabel("share of problems (number of problems in the bar)")
    fig.legend(loc="outside upper left", ncols=4, handlelength=1.8, handleheight=1.0, columnspacing=1.0)
    return fig


def _write_count(ax: Axes, y: int, left: float, share: float, count: int, colour: str) -> None:
    """The count in the middle of its segment, or above where the segment is narrower than the number."""
    if not count:
        return
    narrow = share < 0.018 * len(f"{count:,}")
    place = y - 0.4 if narrow else y
    text = ax.text(left + share / 2, place, f"{count:,}", ha="center", va="center", color=DARK)
    if narrow:
        text.set_fontsize(7)
    else:
        text.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 1.2})
        text.set_color("white" if colour == COLORS["target"] else DARK)


@paper_figure
def plot_differences(differences: pd.DataFrame) -> Figure:
    """Forest plot of columns label, difference, low, high, n, n_clusters, holds (filled where it holds).

    With the columns of a verdict's `differences()` a row is named by its control and has the seeds of that
    control together; its numbers are then the smallest and largest difference and the outermost bounds.
    Where not all rows are on the same problems, a line above each block says on which.
    """
    check_frame(differences, "differences", "label", "difference", ["n", "n_clusters", "holds"])
    table = _name_rows(differences)
    blocks, most = list(dict.fromkeys(table["block"])), table.groupby(["block", "row"]).size().max()
    names, places = [], {}
    for block in blocks:
        names += [block] if len(blocks) > 1 else []
        for row in dict.fromkeys(table.loc[table["block"] == block, "row"]):
            places[block, row] = len(names)
            names.append(row)
    fig, ax = new_figure(aspect=(0.95 + (0.14 + 0.08 * most) * len(names)) / TEXT_WIDTH)
    for (block, row), y in places.items():
        _draw_seeds(ax, y, table[(table["block"] == block) & (table["row"] == row)])
    ax.axvline(0, color="black", lw=0.8, zorder=1)
    list_rows(ax, names)
    for y in set(range(len(names))) - set(places.values()):
        ax.get_yticklabels()[y].set(style="italic", color="#606060", fontsize=7.5)
        ax.get_ygridlines()[y].set_visible(False)
    first = [LABELS.get(name, name) for name in dict.fromkeys(table["a"])] if "a" in table else []
    what = f"accuracy of {first[0]} minus that of the control" if len(first) == 1 else "difference in accuracy"
    on = blocks[0].replace("\n", " ")
    ax.set_xlabel(f"{what}\n({on})" if len(blocks) == 1 else what)
    _legend_once(fig, ax)
    return fig


def _name_rows(differences: pd.DataFrame) -> pd.DataFrame:
    """The table with columns `row`, the control or the label, and `block`, on which problems it was."""
    table = differences.rename(columns={"n_clusters": "n_units"}).reset_index(drop=True)
    controls = table["b"] if "b" in table else table["label"]
    table["row"] = [LABELS.get(b, label) for b, label in zip(controls, table["label"], strict=True)]
    table["block"] = [size_text(table.iloc[[i]]) for i in range(len(table))]
    if "subset" in table:
        subsets = [SUBSET_LABELS.get(s, s).replace("\n", " ") for s in table["subset"]]
        table["block"] = [f"{s},\n{size}" for s, size in zip(subsets, table["block"], strict=True)]
    keys = ["block", "row", *(["seed"] if "seed" in table else [])]
    for name in table.loc[table.duplicated(keys), "row"]:
        raise ValueError(f"differences: two rows for '{name}' on the same problems; a column seed must tell them apart")
    return table


def _draw_seeds(ax: Axes, y: float, rows: pd.DataFrame) -> None:
    bridged, other = COLORS["bridged"], COLORS["constant"]
    for place, row in zip(_side_by_side(y, len(rows), 0.5), rows.itertuples(), strict=True):
        edge, face = (bridged, bridged) if row.holds else (other, "white")
        draw_interval(ax, place, row.low, row.high, row.label, edge)
        look = {"color": edge, "mfc": face, "mew": 1.2, "ms": 5 if len(rows) == 1 else 3.5, "zorder": 4}
        name = "holds" if row.holds else "does not hold"
        ax.plot(row.difference, place, "o", label=name, gid=f"point:{row.label}", **look)
    values = f"{rows['difference'].min():+.3f}"
    values += f" to {rows['difference'].max():+.3f}" if len(rows) > 1 else ""
    write_right(ax, y, f"{values} [{rows['low'].min():.3f}, {rows['high'].max():.3f}]")


def _legend_once(fig: Figure, ax: Axes) -> None:
    """A legend above the axes in which every name comes once, however many marks have it."""
    once = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(once.values(), once.keys(), loc="outside upper left", ncols=3)


@paper_figure
def plot_faults(table: pd.DataFrame) -> Figure:
    """Why the first bridge could not work: a bar for each fault repaired, on top of the repairs above it.

    Columns step_label, recovery (accuracy on held-out source-only problems), low, high, target, target_told,
    optionally seed: then the bar is the mean and each seed a dot with its interval.
    """
    check_frame(table, "faults", "step_label", "recovery", ["target", "target_told"])
    steps = list(dict.fromkeys(table["step_label"]))
    fig, ax = new_figure(aspect=(0.95 + 0.3 * len(steps)) / TEXT_WIDTH)
    for y, step in enumerate(steps):
        rows = table[table["step_label"] == step]
        if len(rows) > 1 and ("seed" not in rows or rows["seed"].duplicated().any()):
            raise ValueError(f"faults: several rows for '{step}'; a column seed must tell them apart")
        mean = rows["recovery"].mean()
        ax.barh(y, mean, 0.64, color=COLORS["bridged"], lw=0, gid=f"bar:{step}")
        for place, row in zip(_side_by_side(y, len(rows), 0.4), rows.itertuples(), strict=True):
            draw_interval(ax, place, row.low, row.high, step)
            if len(rows) > 1:
                look = {"color": "white", "mec": DARK, "mew": 0.7, "ms": 3.2}
                ax.plot(row.recovery, place, "o", zorder=4, gid=f"point:{step}", **look)
        write_right(ax, y, f"{mean:.3f}")
    list_rows(ax, steps, guides=False)
    ax.set_xlim(0, 1)
    for height, name in ((3, "target"), (14, "target_told")):
        if table[name].nunique() > 1:
            raise ValueError(f"faults: column '{name}' has several values, but it is drawn as one line")
        value = table[name].iloc[0]
        _draw_reference(ax, name, value, f"{LABELS[name]} {value:.3f}", height)
    ax.set_xlabel("accuracy on source-only problems, held-out units")
    return fig


def _draw_reference(ax: Axes, name: str, x: float, text: str, height: float) -> None:
    """A vertical line over all rows, named `height` points above its upper end."""
    look = {"color": COLORS[name], "ls": DASHES[name], "lw": 1.2}
    ax.axvline(x, zorder=2, gid=f"reference:{name}", **look)
    left = x < sum(ax.get_xlim()) / 2
    look = {"color": ink(COLORS[name]), "ha": "left" if left else "right", "annotation_clip": False}
    where = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    ax.annotate(text, (x, 1), (-2 if left else 2, height), **look, **where)


def _side_by_side(y: float, n: int, width: float) -> list[float]:
    return [y + (i - (n - 1) / 2) * width / max(n - 1, 1) for i in range(n)]


@paper_figure
def plot_recovery(frame: pd.DataFrame) -> Figure:
    """What each bridge recovers as a share of `target_told` on the same problems; a dot for each seed.

    Columns label, producer, seed, recovery, low, high. Runs of one label lie together; the line is 1.0.
    """
    check_frame(frame, "recovery", "label", "recovery", ["seed"])
    check_frame(frame, "recovery", "producer")
    groups = {label: frame[frame["label"] == label] for label in dict.fromkeys(frame["label"])}
    most = max(map(len, groups.values()))
    fig, ax = new_figure(aspect=(0.85 + (0.16 + 0.09 * most) * len(groups)) / TEXT_WIDTH)
    for y, (label, rows) in enumerate(groups.items()):
        unknown = set(rows["producer"]) - set(PRODUCER_LOOKS)
        if unknown:
            known = ", ".join(PRODUCER_LOOKS)
            raise ValueError(f"recovery: unknown producer '{min(unknown)}' (known: {known})")
        rows = rows.assign(rank=rows["producer"].map(list(PRODUCER_LOOKS).index))
        rows = rows.sort_values(["rank", "seed"])
        for place, row in zip(_side_by_side(y, len(rows), 0.72), rows.itertuples(), strict=True):
            name, edge, face, marker = PRODUCER_LOOKS[row.producer]
            mark = f"{label}:{row.producer}:{row.seed}"
            draw_interval(ax, place, row.low, row.high, mark, edge)
            look = {"color": edge, "mfc": face, "ms": 4, "zorder": 4}
            ax.plot(row.recovery, place, marker, label=name, gid=f"point:{mark}", **look)
        if y:
            ax.axhline(y - 0.5, color="#d8d8d8", lw=0.5)
    list_rows(ax, groups, guides=False)
    margin = 0.03 * (max(frame["high"].max(), 1) - frame["low"].min())
    ax.set_xlim(frame["low"].min() - margin, max(frame["high"].max(), 1) + margin)
    _draw_reference(ax, "target_told", 1.0, LABELS["target_told"], 3)
    ax.set_xlabel("recovered: share of what the target gets right when told the fact")
    _legend_once(fig, ax)
    return fig


@paper_figure
def plot_digits(frame: pd.DataFrame) -> Figure:
    """Where a composition fails: which digit of a value that no training unit has is right; a row for each composition.

    Columns label, right low high, and for tens and ones <digit>_right, _low, _high (headline.read_digits).
    """
    check_frame(frame, "digits", "label", "right", ["tens_right", "ones_right", "n"])
    fig, ax = new_figure(aspect=(0.95 + 0.3 * len(frame)) / TEXT_WIDTH)
    for y, row in enumerate(frame.to_dict("records")):
        name = row["label"]
        ax.barh(y, row["right"], 0.7, color="#E6E6E6", lw=0, gid=f"bar:{name}", label="whole value right")
        draw_interval(ax, y + 0.27, row["low"], row["high"], f"right:{name}", "#9A9A9A")
        for place, digit, marker, face in ((-0.18, "tens", "D", "white"), (0.04, "ones", "o", COLORS["bridged"])):
            draw_interval(
                ax, y + place, row[f"{digit}_low"], row[f"{digit}_high"], f"{digit}:{name}", COLORS["bridged"]
            )
            look = {"color": COLORS["bridged"], "mfc": face, "ms": 4, "ls": "", "zorder": 4}
            gid = f"{digit}:{name}"
            ax.plot(row[f"{digit}_right"], y + place, marker, label=f"{digit} digit right", gid=f"point:{gid}", **look)
        write_right(ax, y, f"{row['right']:.3f}")
    list_rows(ax, frame["label"], guides=False)
    ax.set_xlim(0, 1)
    ax.set_xlabel(f"share of answers about values that no training unit has\n({size_text(frame)}, over the seeds)")
    _legend_once(fig, ax)
    return fig


@paper_figure
def plot_values(frame: pd.DataFrame) -> Figure:
    """What happens to a value that is taken out of the training; a row for each composition.

    Columns label, kind (`taken out`, `left in`), all_values, half_values (with _low, _high), n, n_units
    (headline.read_values).
    """
    check_frame(frame, "values", "label", "", ["kind", "all_values", "half_values", "n"])
    labels = list(dict.fromkeys(frame["label"]))
    fig, ax = new_figure(aspect=(0.95 + 0.42 * len(labels)) / TEXT_WIDTH)
    for row in frame.to_dict("records"):
        out = row["kind"] == "taken out"
        y = labels.index(row["label"]) + (-0.17 if out else 0.17)
        ink_, marker = (COLORS["bridged"], "o") if out else ("#7A7A7A", "s")
        for arm, face in (("all_values", "white"), ("half_values", ink_)):
            gid = f"{arm}:{row['kind']}:{row['label']}"
            place = y + (0.055 if arm == "half_values" else -0.055)
            draw_interval(ax, place, row[f"{arm}_low"], row[f"{arm}_high"], gid, ink_)
            when = "before" if arm == "all_values" else "after"
            look = {"color": ink_, "mfc": face, "ms": 4, "ls": "", "zorder": 4}
            ax.plot(row[arm], place, marker, gid=f"point:{gid}", label=f"values {row['kind']}, {when}", **look)
    list_rows(ax, labels, guides=False)
    ax.set_xlim(0, 1.02)
    said = "accuracy before and after half of the values\nare taken out of the training"
    ax.set_xlabel(f"{said} ({size_text(frame)})")
    _legend_once(fig, ax)
    return fig
