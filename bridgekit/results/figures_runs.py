"""The figures of a run: `plot_x(frame) -> Figure`. They draw what they are given, with its intervals.

    fig = plot_accuracy_curve(curve_from_metrics("runs/x/metrics.jsonl"))
    fig = plot_conditions(conditions_table(load_eval("runs/x/eval_samples_step_final.jsonl")))

Nothing here computes a statistic, shows or saves. Each drawn point, interval, band and bar carries a `gid`
such as `interval:bridged`, by which a reader of the SVG, or a test, finds it.
"""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path

from bridgekit.config import CONDITIONS
from bridgekit.results.style import (
    COLORS,
    DASHES,
    FAMILY_STARTS,
    HATCHES,
    LABELS,
    MARKERS,
    SUBSET_LABELS,
    TEXT_WIDTH,
    check_conditions,
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

GROUP_SUBSETS = ("source_only_seen", "source_only_held_unit", "source_only_held_value", "target_only", "both")
GROUP_CONDITIONS = ("source", "target", "bridged", "shuffled", "constant", "target_told")


def curve_from_metrics(metrics: list[dict] | str | Path) -> pd.DataFrame:
    """The validation accuracies of metrics.jsonl with Wilson intervals, for `plot_accuracy_curve`.

    The interval's n is `n_effective` where the line has one, else the number of units: problems of one unit
    are right or wrong together, so counting them all would promise too much. Of a step evaluated twice,
    as in a resumed run, the last evaluation counts.
    """
    import pandas as pd

    from bridgekit.results.statistics import wilson

    lines = _read_metrics(Path(metrics)) if isinstance(metrics, (str, Path)) else metrics
    by_step = {line["step"]: line["eval"] for line in lines if "eval" in line}
    rows = []
    for step, result in sorted(by_step.items()):
        if "n" not in result:
            raise ValueError(f"metrics: the evaluation at step {step} has no n, so no interval can be drawn")
        size = result.get("n_effective") or result.get("n_units") or result["n"]
        for name in [c for c in CONDITIONS if c in result]:
            if not math.isfinite(result[name]):
                raise ValueError(f"metrics: {name} at step {step} is {result[name]}, so the curve has a hole")
            low, high = wilson(result[name] * size, size)
            row = {"step": step, "condition": name, "accuracy": result[name], "low": low, "high": high}
            rows.append(row | {"n": result["n"], "n_units": result.get("n_units")})
    if not rows:
        raise ValueError("metrics: no evaluation yet; the first one comes after train.eval_every steps")
    return pd.DataFrame(rows)


def _read_metrics(path: Path) -> list[dict]:
    """Every complete line; the last one may still be being written."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the metrics.jsonl of a run folder")
    text, lines = path.read_text(encoding="utf-8"), []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
    return lines


@paper_figure
def plot_accuracy_curve(curve: pd.DataFrame, title: str | None = None) -> Figure:
    """Accuracy over steps from columns step, condition, accuracy, low, high and, if there, seed, n, n_units.

    Conditions other than `bridged` that never change are horizontal lines. With several seeds each is a thin
    line with its own band, and their mean, at the steps all of them reached, is the thick one.
    """
    check_frame(curve, "accuracy curve", "condition", "accuracy", ["step"])
    present = list(dict.fromkeys(curve["condition"]))
    check_conditions(["bridged", *present], present, "accuracy curve")
    fig, ax = new_figure(aspect=0.5)
    first, last = curve["step"].min(), curve["step"].max()
    ax.set_xlim(first, last if last > first else first + 1)
    ends = []
    for name in [c for c in CONDITIONS if c in present]:
        rows = curve[curve["condition"] == name]
        level = name != "bridged" and rows["accuracy"].nunique() == 1
        ends.append((_draw_level(ax, rows.iloc[0]) if level else _draw_course(ax, rows), name))
    margin = 0.04 * (curve["high"].max() - curve["low"].min())
    ax.set_ylim(max(curve["low"].min() - margin, -0.01), min(curve["high"].max() + margin, 1.01))
    ax.set_xlabel("training step")
    size = f"\n({size_text(curve)})" if "n" in curve else ""
    ax.set_ylabel(f"accuracy on validation{size}")
    if title:
        ax.set_title(title)
    _label_ends(fig, ax, ends)
    return fig


def _draw_level(ax: Axes, row: pd.Series) -> float:
    name = row["condition"]
    ax.axhspan(row["low"], row["high"], color=COLORS[name], alpha=0.14, lw=0, gid=f"band:{name}")
    ax.axhline(row["accuracy"], color=COLORS[name], ls=DASHES[name], lw=1.1, gid=f"line:{name}")
    return row["accuracy"]


def _draw_course(ax: Axes, rows: pd.DataFrame) -> float:
    name = rows["condition"].iloc[0]
    runs = [run for _, run in rows.groupby("seed")] if "seed" in rows else [rows]
    for run in (run.sort_values("step") for run in runs):
        steps = run["step"]
        if steps.duplicated().any():
            raise ValueError(f"accuracy curve: two rows of '{name}' at one step; add a column seed")
        look = {"color": COLORS[name], "alpha": 0.22 if len(runs) == 1 else 0.10, "lw": 0}
        ax.fill_between(steps, run["low"], run["high"], gid=f"band:{name}", **look)
        if len(run) == 1:  # a band over one step has no width
            one = run.iloc[0]
            draw_interval(ax, one["step"], one["low"], one["high"], name, COLORS[name], upright=True)
        if len(runs) > 1:
            ax.plot(steps, run["accuracy"], color=COLORS[name], lw=0.6, alpha=0.7, gid=f"seed:{name}")
    mean = rows.groupby("step")["accuracy"].agg(["mean", "size"])
    mean = mean.loc[mean["size"] == len(runs), "mean"]
    if mean.empty:
        raise ValueError(f"accuracy curve: the seeds of '{name}' share no step; draw them separately")
    look = {"color": COLORS[name], "ls": DASHES[name], "marker": MARKERS[name], "ms": 3.2, "lw": 1.7}
    ax.plot(mean.index, mean, clip_on=False, zorder=3, gid=f"line:{name}", **look)
    return mean.iloc[-1]


def _label_ends(fig: Figure, ax: Axes, ends: list[tuple[float, str]]) -> None:
    """Name each line where it ends; labels are moved apart as little as their height asks for."""
    from scipy.optimize import isotonic_regression

    ends = sorted(ends)
    fig.draw_without_rendering()  # the axes' height in points is known only after a layout
    height = ax.get_window_extent().height * 72 / fig.dpi
    gap = 10.5 / height * (ax.get_ylim()[1] - ax.get_ylim()[0])
    places = isotonic_regression([y - i * gap for i, (y, _) in enumerate(ends)]).x
    coords = ("axes fraction", "data")
    for i, (y, name) in enumerate(ends):
        ax.annotate(
            f"{LABELS[name]} {y:.3f}",
            (1, y),
            (1.035, places[i] + i * gap),
            xycoords=coords,
            textcoords=coords,
            va="center",
            color=ink(COLORS[name]),
            weight="bold" if name == "bridged" else "normal",
            arrowprops={"arrowstyle": "-", "color": COLORS[name], "lw": 0.7, "shrinkA": 1, "shrinkB": 1},
            annotation_clip=False,
            gid=f"label:{name}",
        )


@paper_figure
def plot_conditions(table: pd.DataFrame, subset: str = "all") -> Figure:
    """Accuracy of every condition on one subset of `conditions_table`, with intervals, in the usual order."""
    rows = subset_rows(table, subset)
    fig, ax = new_figure(aspect=(0.62 + 0.19 * len(rows)) / TEXT_WIDTH)
    for y, row in enumerate(rows.itertuples()):
        name = row.condition
        draw_interval(ax, y, row.low, row.high, name, COLORS[name])
        look = {"marker": MARKERS[name], "color": COLORS[name], "mec": "white", "mew": 0.4, "ms": 5.5}
        ax.plot(row.accuracy, y, zorder=4, gid=f"point:{name}", **look)
        write_right(ax, y, f"{row.accuracy:.3f} [{row.low:.3f}, {row.high:.3f}]", name == "bridged")
        if y and name in FAMILY_STARTS:
            ax.axhline(y - 0.5, color="#c8c8c8", lw=0.5)
    for value in rows.loc[rows["condition"] == "target", "accuracy"]:
        look = {"color": COLORS["target"], "ls": DASHES["target"], "lw": 0.8}
        ax.axvline(value, zorder=1, gid="reference:target", **look)
    list_rows(ax, [LABELS[c] for c in rows["condition"]])
    for tick, name in zip(ax.get_yticklabels(), rows["condition"], strict=True):
        tick.set_fontweight("bold" if name == "bridged" else "normal")
    group = SUBSET_LABELS.get(subset, subset).replace("\n", " ")
    ax.set_xlabel(f"accuracy, {group} ({size_text(rows)})")
    return fig


def subset_rows(table: pd.DataFrame, subset: str) -> pd.DataFrame:
    """The rows of one subset in the order of CONDITIONS; refused where one cannot be drawn."""
    check_frame(table, "conditions table", "subset")
    there = list(table["subset"].unique())
    if subset not in there:
        raise ValueError(f"conditions table: no subset '{subset}' (there are: {', '.join(there)})")
    rows, what = table[table["subset"] == subset], f"conditions table, {subset}"
    check_frame(rows, what, "condition", "accuracy", ["n"])
    check_conditions(rows["condition"], rows["condition"], what)
    for name in rows.loc[rows["condition"].duplicated(), "condition"]:
        raise ValueError(f"{what}: two rows for condition '{name}'; draw one run at a time")
    order = rows["condition"].map(CONDITIONS.index)
    return rows.iloc[order.argsort(kind="stable")].reset_index(drop=True)


@paper_figure
def plot_groups(table: pd.DataFrame, conditions: typing.Sequence[str] | None = None) -> Figure:
    """Bars by what the models know, from `conditions_table`; by default of the conditions that matter."""
    check_frame(table, "groups", "subset")
    check_frame(table, "groups", "condition")
    subsets = [s for s in GROUP_SUBSETS if s in set(table["subset"])]
    if not subsets:
        raise ValueError("groups: no knowledge group in this table; a task without units has none")
    shown = list(conditions or [c for c in GROUP_CONDITIONS if c in set(table["condition"])])
    fig, ax = new_figure(aspect=0.5)
    width, ticks = 0.84 / len(shown), []
    for x, subset in enumerate(subsets):
        rows = subset_rows(table, subset).set_index("condition")
        check_conditions(shown, rows.index, f"groups, {subset}")
        for i, name in enumerate(shown):
            row, place = rows.loc[name], x + (i - (len(shown) - 1) / 2) * width
            look = {"color": COLORS[name], "hatch": HATCHES[name], "edgecolor": "white", "lw": 0}
            label = LABELS[name] if x == 0 else None
            ax.bar(place, row["accuracy"], 0.92 * width, label=label, gid=f"bar:{name}:{subset}", **look)
            draw_interval(ax, place, row["low"], row["high"], f"{name}:{subset}", upright=True)
        ticks.append(f"{SUBSET_LABELS[subset]}\n{size_text(rows.loc[shown])}".replace(" on ", "\n"))
    ax.set_xticks(range(len(subsets)), ticks)
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("accuracy")
    ax.grid(axis="y")
    fig.legend(loc="outside upper left", ncols=3, handleheight=1.0, handlelength=2.0)
    return fig


@paper_figure
def plot_costs(table: pd.DataFrame) -> Figure:
    """Accuracy against the tokens that both models write for an answer; marks at one place stand beside each other.

    Columns condition, tokens, accuracy, low, high, n (bridgekit/costs.py).
    """
    check_frame(table, "costs", "condition", "accuracy", ["tokens", "n"])
    check_conditions(table["condition"], table["condition"], "costs")
    fig, ax = new_figure(aspect=0.55)
    for row in table.itertuples():
        name = row.condition
        same = table.index[(table["tokens"] - row.tokens).abs() < 2].tolist()
        place = row.tokens + 2.2 * (same.index(row.Index) - (len(same) - 1) / 2)
        draw_interval(ax, place, row.low, row.high, name, COLORS[name], upright=True)
        look = {"marker": MARKERS[name], "color": COLORS[name], "mec": "white", "mew": 0.4, "ms": 5.5}
        ax.plot(place, row.accuracy, ls="", zorder=4, label=LABELS[name], gid=f"point:{name}", **look)
    ax.set_xlim(0, 1.08 * table["tokens"].max())
    ax.set_ylim(table["low"].min() - 0.04, 1.02)
    ax.set_xlabel("tokens written one after the other, by both models together, for each answer")
    ax.set_ylabel(f"accuracy on the mix\n({size_text(table)})")
    fig.legend(loc="outside upper left", ncols=4)
    return fig
