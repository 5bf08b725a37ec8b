"""Figures of a study: forest of its variants, validation curves, capacity, generalisation, compression; its table.

    fig = plot_forest(compare_variants(study, runs))
    fig = plot_capacity(read_axis(study, planned, runs, "runs"))
    print(ablation_table(compare_variants(study, runs)))

The numbers come in finished (bridgekit/variants.py makes them); nothing here computes a statistic but the mean of the
seeds it draws. Each mark carries a `gid`, as in the other figures.
"""

from __future__ import annotations

import typing

from bridgekit.results.figures_studies import PRODUCER_LOOKS
from bridgekit.results.figures_text import format_rows
from bridgekit.results.style import (
    COLORS,
    DARK,
    SUBSET_LABELS,
    TEXT_WIDTH,
    check_frame,
    draw_interval,
    figure_size,
    fix_tick_size,
    list_rows,
    paper_figure,
    size_text,
)

if typing.TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FACT_LOOKS = ("#F0A202", "#D1495B", "#7B2D8B", "#1F4E8C", "#12304F", "#3B3B3B")  # few facts light, many dark
FACT_MARKERS = "osD^vP"
BAND = "#E6E6E6"


@paper_figure
def plot_forest(frame: pd.DataFrame) -> Figure:
    """Each variant minus the reference, a panel for each subset: pooled over seeds, single seeds as small dots.

    Filled where Holm's p over the whole table is at most 0.05; the grey band is what could not have been found.
    Columns as `compare_variants` gives them.
    """
    check_frame(frame, "forest", "variant", "difference", ["smallest_effect", "n", "n_units", "adjusted_p"])
    subsets, variants = list(dict.fromkeys(frame["subset"])), list(dict.fromkeys(frame["variant"]))
    if frame.duplicated(["variant", "subset"]).any():
        raise ValueError("forest: a variant stands twice on one subset; give the table of one study")
    fig, axes = _new_figures(1, len(subsets), (1.35 + 0.24 * len(variants)) / TEXT_WIDTH, sharey=True)
    for ax, subset in zip(axes, subsets, strict=True):
        rows = frame[frame["subset"] == subset].set_index("variant")
        reach = _forest_reach(rows)
        for y, name in enumerate(variants):
            if name in rows.index:
                _draw_effect(ax, y, rows.loc[name], f"{name}:{subset}", reach)
        ax.axvline(0, color="black", lw=0.8, zorder=2)
        list_rows(ax, [_row_name(frame, name) for name in variants])
        label = SUBSET_LABELS.get(subset, subset).replace("\n", " ")
        ax.set_title(f"{label}\n{size_text(rows)},\n{_seeds_text(rows)}", fontsize=8)
        ax.locator_params(axis="x", nbins=4)
        ax.set_xlim(-reach, reach)
    fig.supxlabel(f"accuracy, bridged, minus that of '{frame['reference'].iloc[0]}'", fontsize=8.5)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    for ax in axes[1:]:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=2, columnspacing=1.2)
    return fig


def _forest_reach(rows: pd.DataFrame) -> float:
    """How far the axis goes: what was measured, with the bands as far as they are not much wider.

    One variant that ruins everything would press all others onto the line: it lies outside, and an arrow says where.
    """
    far = rows.apply(lambda row: max(map(abs, [row["low"], row["high"], *row["by_seed"]])), axis=1)
    within = rows[far <= 6 * far.median()]
    reach = max(0.01, far[within.index].max())
    return min(1.08 * max(reach, within["smallest_effect"].max()), 1.5 * reach)


def _draw_effect(ax: Axes, y: float, row: pd.Series, gid: str, reach: float) -> None:
    from matplotlib.patches import Rectangle

    smallest, bridged = row["smallest_effect"], COLORS["bridged"]
    look = {"color": BAND, "lw": 0, "zorder": 0, "label": "too small to be found (power 0.8)"}
    ax.add_patch(Rectangle((-smallest, y - 0.42), 2 * smallest, 0.84, gid=f"band:{gid}", **look))
    colour, face = (bridged, bridged) if row["holds"] else (COLORS["constant"], "white")
    name = "differs (Holm, p \N{LESS-THAN OR EQUAL TO} 0.05)" if row["holds"] else "no difference shown"
    draw_interval(ax, y, row["low"], row["high"], gid, colour)
    ax.plot(row["difference"], y, "o", color=colour, mfc=face, mew=1.2, ms=5, zorder=4, label=name, gid=f"point:{gid}")
    if abs(row["difference"]) > reach:
        look = {"color": colour, "mfc": face, "mew": 1.2, "ms": 5, "ls": "", "gid": f"outside:{gid}"}
        left = row["difference"] < 0
        ax.plot((-0.95 if left else 0.95) * reach, y, marker="<" if left else ">", label="further out", **look)
    for value in row["by_seed"] if len(row["by_seed"]) > 1 else ():
        ax.plot(value, y + 0.28, ".", color=DARK, ms=3, zorder=3, label="one seed", gid=f"seed:{gid}")
    text = f"{row['difference']:+.3f}".replace("-", "\N{MINUS SIGN}")
    where = {"xycoords": ("axes fraction", "data"), "va": "center", "annotation_clip": False}
    ax.annotate(text, (1.02, y), fontsize=7.5, weight="bold" if row["holds"] else "normal", **where)


def _row_name(frame: pd.DataFrame, variant: str) -> str:
    if "replicates" in frame and (of := frame.loc[frame["variant"] == variant, "replicates"].iloc[0]):
        return f"{variant} (replicate of {of})"
    return variant


def _seeds_text(rows: pd.DataFrame) -> str:
    few, many = int(rows["n_seeds"].min()), int(rows["n_seeds"].max())
    return f"{few} seed{'s' if few != 1 else ''}" if few == many else f"{few} to {many} seeds"


def _new_figures(n_rows: int, n_columns: int, aspect: float, **options) -> tuple[Figure, list[Axes]]:
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(n_rows, n_columns, figsize=figure_size(1.0, aspect), squeeze=False, **options)
    plt.close(fig)
    for ax in axes.flat:
        fix_tick_size(ax)
    return fig, list(axes.flat)


@paper_figure
def plot_curves(frame: pd.DataFrame, reference: str = "") -> Figure:
    """Validation accuracy over steps, a panel for each variant: seeds thin, their mean thick, the reference in grey.

    Columns variant, seed, step, accuracy, low, high, n, n_units; a band is the interval of one seed over units.
    """
    check_frame(frame, "curves", "variant", "accuracy", ["seed", "step", "n"])
    variants = list(dict.fromkeys(frame["variant"]))
    columns = min(4, len(variants)) if len(variants) != 4 else 2
    n_rows = -(-len(variants) // columns)
    fig, axes = _new_figures(n_rows, columns, (0.7 + 1.25 * n_rows) / TEXT_WIDTH, sharex=True, sharey=True)
    other = frame[frame["variant"] == reference]
    for ax, variant in zip(axes, variants, strict=False):
        rows = frame[frame["variant"] == variant]
        for seed, run in rows.groupby("seed"):
            run = run.sort_values("step")
            look = {"color": COLORS["bridged"], "lw": 0, "alpha": 0.25 / rows["seed"].nunique()}
            ax.fill_between(run["step"], run["low"], run["high"], gid=f"band:{variant}:{seed}", **look)
            ax.plot(run["step"], run["accuracy"], color=COLORS["bridged"], lw=0.5, gid=f"seed:{variant}:{seed}")
        if len(other) and variant != reference:
            mean = _mean_over_seeds(other, "step", "accuracy")
            ax.plot(mean.index, mean, color="#707070", lw=1.2, ls=(0, (4, 1.5)), label=f"mean of '{reference}'")
        mean = _mean_over_seeds(rows, "step", "accuracy")
        look = {"color": COLORS["bridged"], "marker": "o", "ms": 2.6, "lw": 1.6, "label": "mean of the seeds"}
        ax.plot(mean.index, mean, zorder=3, gid=f"line:{variant}", **look)
        ax.set_title(variant, fontsize=8)
        ax.locator_params(axis="x", nbins=4)
    for ax in axes[len(variants) :]:
        ax.set_visible(False)
    fig.supxlabel(f"training step (validation: {size_text(frame)})", fontsize=8.5)
    fig.supylabel("accuracy on validation", fontsize=8.5)
    _legend_of(fig, axes)
    return fig


def _legend_of(fig: Figure, axes: list[Axes]) -> None:
    """One legend above all panels, each name once."""
    once: dict = {}
    for ax in axes:
        once |= {label: handle for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    fig.legend(once.values(), once.keys(), loc="outside upper left", ncols=4, columnspacing=1.2)


def _mean_over_seeds(rows: pd.DataFrame, x: str, y: str) -> pd.Series:
    """The mean where every seed has a value, so that a seed that ends early makes no jump."""
    grouped = rows.groupby(x)[y].agg(["mean", "size"])
    return grouped.loc[grouped["size"] == grouped["size"].max(), "mean"]


@paper_figure
def plot_capacity(frame: pd.DataFrame) -> Figure:
    """Against soft tokens, a line for each number of facts: what is recovered, whether the answer says any value of the
    message, and the bits carried per soft token.

    Columns n_facts, n_soft_tokens, seed, and recovery, in_message, bits_per_token, the last two with _low and _high.
    """
    check_frame(frame, "capacity", "variant", "recovery", ["n_facts", "n_soft_tokens", "seed", "bits_per_token"])
    panels = {
        "recovery": ("right value (share of told)", "low", "high"),
        "in_message": ("any value of the message", "in_message_low", "in_message_high"),
        "bits_per_token": ("bits per soft token", "bits_per_token_low", "bits_per_token_high"),
    }
    fig, axes = _new_figures(1, len(panels), 0.44)
    facts = sorted(frame["n_facts"].unique())
    if len(facts) > len(FACT_LOOKS):
        raise ValueError(f"capacity: {len(facts)} numbers of facts, but at most {len(FACT_LOOKS)} can be told apart")
    for i, n_facts in enumerate(facts):
        rows, name = frame[frame["n_facts"] == n_facts], f"{n_facts} fact{'s' if n_facts > 1 else ''}"
        look = {"color": FACT_LOOKS[i], "marker": FACT_MARKERS[i], "label": name}
        nudge = 2 ** (0.12 * (i - (len(facts) - 1) / 2))
        for ax, (column, (_, low, high)) in zip(axes, panels.items(), strict=True):
            _draw_line(ax, rows, "n_soft_tokens", column, low, high, look, nudge)
    for ax, (title, _, _) in zip(axes, panels.values(), strict=True):
        _log_axis(ax, frame["n_soft_tokens"], "soft tokens")
        ax.set_title(title, fontsize=8)
    for ax in axes[:2]:
        ax.set_ylim(-0.03, 1.04)
    axes[-1].axhline(0, color="black", lw=0.6)
    _legend_of(fig, axes)
    return fig


def _draw_line(
    ax: Axes, rows: pd.DataFrame, x: str, y: str, low: str, high: str, look: dict, nudge: float = 1.0
) -> None:
    """Mean over the seeds there are as a line; each seed a mark with its own interval, side by side on a log axis."""
    seeds = sorted(rows["seed"].unique())
    mean = rows.groupby(x)[y].mean()
    ax.plot(mean.index * nudge, mean, lw=1.4, zorder=3, gid=f"line:{y}:{look['label']}", **look | {"ms": 4})
    for row in rows.to_dict("records"):
        place = row[x] * nudge * 1.03 ** (seeds.index(row["seed"]) - (len(seeds) - 1) / 2)
        gid = f"{y}:{look['label']}:{row[x]}:{row['seed']}"
        draw_interval(ax, place, row[low], row[high], gid, look["color"], upright=True)
        if len(seeds) > 1:
            ax.plot(place, row[y], ".", color=look["color"], ms=3, gid=f"point:{gid}")


def _log_axis(ax: Axes, values: typing.Iterable, label: str) -> None:
    from matplotlib.ticker import NullLocator

    places = sorted(set(values))
    ax.set_xscale("log", base=2)
    ax.set_xticks(places, [f"{v:,}" for v in places])
    ax.xaxis.set_minor_locator(NullLocator())
    if len(places) > 7:
        ax.tick_params(axis="x", labelrotation=45)
    ax.set_xlabel(label)


@paper_figure
def plot_generalisation(frame: pd.DataFrame) -> Figure:
    """Held-out recovery against the number of train units; a line for each producer, a mark for each seed."""
    return _plot_producers(frame, "train_units", "source-only units met in training")


@paper_figure
def plot_compression(frame: pd.DataFrame) -> Figure:
    """Held-out recovery against the number of soft tokens; a line for each producer, a mark for each seed."""
    return _plot_producers(frame, "n_soft_tokens", "soft tokens")


def _plot_producers(frame: pd.DataFrame, x: str, label: str) -> Figure:
    check_frame(frame, x, "variant", "recovery", [x, "seed", "n"])
    fig, (ax,) = _new_figures(1, 1, 0.55)
    producers = [p for p in PRODUCER_LOOKS if p in set(frame["producer"])]
    for i, producer in enumerate(producers):
        name, edge, face, marker = PRODUCER_LOOKS[producer]
        look = {"color": edge, "mfc": face, "marker": marker, "label": name, "ls": "-" if i == 0 else (0, (4, 1.5))}
        nudge = 2 ** (0.1 * (i - (len(producers) - 1) / 2))
        _draw_line(ax, frame[frame["producer"] == producer], x, "recovery", "low", "high", look, nudge)
    _log_axis(ax, frame[x], label)
    ax.set_ylim(min(-0.03, frame["low"].min() - 0.02), max(1.04, frame["high"].max() + 0.02))
    ax.set_ylabel(f"recovered on held-out units\n({size_text(frame)})")
    _legend_of(fig, [ax])
    return fig


AXIS_PLOTS = {"capacity": plot_capacity, "generalisation": plot_generalisation, "compression": plot_compression}


def plot_axis(frame: pd.DataFrame, axis: str) -> Figure:
    """The figure of the axis that a study lies on (`variants.swept_axis`)."""
    if axis not in AXIS_PLOTS:
        raise ValueError(f"axis: '{axis}' has no figure (there are: {', '.join(AXIS_PLOTS)})")
    return AXIS_PLOTS[axis](frame)


def ablation_table(frame: pd.DataFrame, style: str = "markdown") -> str:
    """The table of a paper: a row for each variant, columns of accuracy and difference for each subset.

    Columns as `tabulate_variants` gives them; the reference has no difference.
    """
    check_frame(frame, "ablation table", "variant", "accuracy", ["n", "n_seeds"])
    subsets, variants = list(dict.fromkeys(frame["subset"])), list(dict.fromkeys(frame["variant"]))
    cells = {(row["variant"], row["subset"]): row for row in frame.to_dict("records")}
    head = ["variant", "seeds", "trained\nparameters", "seconds\nof steps"]
    for subset in subsets:
        label = SUBSET_LABELS.get(subset, subset).replace("\n", " ")
        n = size_text(frame[frame["subset"] == subset])
        head += [f"{label}\n({n})", "difference\n[95%], Holm's p", "could be\nfound from"]
    body = []
    for variant in variants:
        first = cells[variant, subsets[0]]
        costs = [first.get(name, float("nan")) for name in ("parameters", "seconds")]
        row = [_row_name(frame, variant), str(first["n_seeds"]), *(f"{c:,.0f}" if c == c else "" for c in costs)]
        for subset in subsets:
            row += _cells(cells.get((variant, subset)))
        body.append(row)
    return format_rows(head, body, style)


def _cells(row: dict | None) -> list[str]:
    none = "\N{EN DASH}"
    if row is None:
        return [none] * 3
    accuracy = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
    if row["difference"] != row["difference"]:
        return [accuracy, "reference", none]
    change = f"{row['difference']:+.3f} [{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]"
    p = f"{row['adjusted_p']:.2g}" if row["adjusted_p"] >= 0.001 else "<0.001"
    return [accuracy, f"{change}, {p}{'*' if row['holds'] else ''}", f"{row['smallest_effect']:.3f}"]
