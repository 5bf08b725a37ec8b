"""Runs side by side: the same conditions in a panel for each run, on one axis.

    fig = plot_side_by_side(table, panels={"forward": "forward", "swapped": "swapped"})

`table` is `conditions_table` of several runs with a column `arm`. Rules as in `figures_runs`.
"""

from __future__ import annotations

import typing

from bridgekit.config import CONDITIONS
from bridgekit.results.figures_runs import subset_rows
from bridgekit.results.style import (
    COLORS,
    DASHES,
    FAMILY_STARTS,
    LABELS,
    MARKERS,
    SUBSET_LABELS,
    TEXT_WIDTH,
    check_conditions,
    check_frame,
    draw_interval,
    figure_size,
    fix_tick_size,
    list_rows,
    paper_figure,
    size_text,
    write_right,
)

if typing.TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@paper_figure
def plot_side_by_side(
    table: pd.DataFrame,
    panels: dict[str, str],
    subset: str = "all",
    conditions: typing.Sequence[str] | None = None,
) -> Figure:
    """Accuracy with intervals, a row for each condition, a panel for each arm of `panels` ({arm: title}).

    The dashed line in a panel is that arm's own target alone; the value of each point stands on its right.
    """
    import matplotlib.pyplot as plt
    import pandas as pd

    check_frame(table, "side by side", "arm", "accuracy", ["n"])
    parts = {}
    for arm in panels:
        if arm not in set(table["arm"]):
            raise ValueError(f"side by side: no arm '{arm}' (there are: {', '.join(table['arm'].unique())})")
        parts[arm] = subset_rows(table[table["arm"] == arm], subset)
    there = {c for rows in parts.values() for c in rows["condition"]}
    check_conditions(conditions or (), there, "side by side")
    shown = [c for c in CONDITIONS if c in (conditions or there)]
    size = figure_size(aspect=(1.0 + 0.2 * len(shown)) / TEXT_WIDTH)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharex=True, squeeze=False)
    plt.close(fig)
    for i, (ax, (arm, title)) in enumerate(zip(axes[0], panels.items(), strict=True)):
        fix_tick_size(ax)
        _draw_panel(ax, arm, parts[arm].set_index("condition"), shown)
        list_rows(ax, [LABELS[c] for c in shown] if i == 0 else [""] * len(shown))
        ax.set_title(title, fontsize=8, weight="normal")
        ax.set_xlim(-0.05, 1.05)
        ax.set_xticks([0, 0.5, 1.0])
    for tick, name in zip(axes[0][0].get_yticklabels(), shown, strict=True):
        tick.set_fontweight("bold" if name == "bridged" else "normal")
    sizes = size_text(pd.concat(parts.values()))
    fig.supxlabel(f"accuracy, {SUBSET_LABELS.get(subset, subset)} ({sizes})".replace("\n", " "), fontsize=8.5)
    return fig


def _draw_panel(ax: Axes, arm: str, rows: pd.DataFrame, shown: list[str]) -> None:
    for y, name in enumerate(shown):
        if y and name in FAMILY_STARTS:
            ax.axhline(y - 0.5, color="#c8c8c8", lw=0.5)
        if name not in rows.index:
            continue
        row = rows.loc[name]
        draw_interval(ax, y, row["low"], row["high"], f"{arm}:{name}", COLORS[name])
        look = {"marker": MARKERS[name], "color": COLORS[name], "mec": "white", "mew": 0.4, "ms": 5}
        ax.plot(row["accuracy"], y, zorder=4, gid=f"point:{arm}:{name}", **look)
        write_right(ax, y, f"{row['accuracy']:.3f}", name == "bridged")
    if "target" in rows.index:
        look = {"color": COLORS["target"], "ls": DASHES["target"], "lw": 0.8}
        ax.axvline(rows.loc["target", "accuracy"], zorder=1, gid=f"reference:{arm}:target", **look)
