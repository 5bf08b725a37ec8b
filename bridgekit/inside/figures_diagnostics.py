"""Figures of a look inside a bridge: gates, soft tokens, entropy, CKA, the linear probe, the causal check.

fig = plot_probe(list_probe(probe_pair(source, lexicon)))
fig = plot_causal(causal_table(causal_check(opened, examples)))

Attention maps are in `figures_attention`. Frames come from `inside`, `diagnostics`, `probes` and `causal`.
"""

from __future__ import annotations

import typing

from bridgekit.config import GROUPS
from bridgekit.results.style import (
    COLORS,
    DARK,
    LABELS,
    MARKERS,
    SUBSET_LABELS,
    TEXT_WIDTH,
    check_frame,
    draw_interval,
    figure_size,
    fix_tick_size,
    list_rows,
    new_figure,
    paper_figure,
    write_right,
)

if typing.TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What was in the source's weights in its own ochre, full and open; what was never taught in grey.
NOVELTY_LOOKS = {
    "held_unit": ("unit the probe never saw", COLORS["source"], COLORS["source"], "o"),
    "held_value": ("unit and value the probe never saw", COLORS["source"], "white", "s"),
    "not taught": ("unit the model was never taught", COLORS["shuffled"], "white", "^"),
}


def new_grid(rows: int, columns: int, aspect: float, **shared) -> tuple[Figure, typing.Any]:
    """A figure of several axes over the whole text width that a notebook shows once."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(rows, columns, figsize=figure_size(1.0, aspect), squeeze=False, **shared)
    plt.close(fig)
    for ax in axes.flat:
        fix_tick_size(ax)
    return fig, axes


def legend_above(fig: Figure, ax: Axes, columns: int = 3) -> None:
    """A legend above the axes in which every name comes once."""
    once = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    fig.legend(once.values(), once.keys(), loc="outside upper left", ncols=columns)


@paper_figure
def plot_gates(frame: pd.DataFrame) -> Figure:
    """How far each gate is open through training; columns step, gate, value. Zero is closed."""
    from matplotlib import colormaps

    check_frame(frame, "gates", "gate", columns=["step", "value"])
    names = list(dict.fromkeys(frame["gate"]))
    fig, ax = new_figure(aspect=0.5)
    ax.axhline(0, color="black", lw=0.8, zorder=1)
    for i, name in enumerate(names):
        rows = frame[frame["gate"] == name].sort_values("step")
        colour = colormaps["Reds"](0.35 + 0.6 * (i + 1) / len(names))
        look = {"color": colour, "marker": "os^Dv<>p"[i % 8], "ms": 3, "markevery": max(1, len(rows) // 8)}
        ax.plot(rows["step"], rows["value"], label=name, gid=f"gate:{name}", **look)
    ax.set_xlabel("training step")
    ax.set_ylabel("gate (0: closed)")
    legend_above(fig, ax, 4)
    return fig


@paper_figure
def plot_soft_sizes(frame: pd.DataFrame) -> Figure:
    """RMS of each soft token against the embedding table (left), and its share that varies by question (right)."""
    check_frame(frame, "soft tokens", "soft_token", "rms", ["table_rms", "vocabulary_5", "vocabulary_95"])
    check_frame(frame, "soft tokens", "soft_token", columns=["varying", "varying_low", "varying_high"])
    fig, axes = new_grid(1, 2, 0.42)
    left, right = axes[0]
    first = frame.iloc[0]
    look = {"color": "#DCE8F3", "lw": 0, "label": "middle 90% of the vocabulary", "gid": "band:vocabulary"}
    left.axhspan(first.vocabulary_5, first.vocabulary_95, **look)
    left.axhline(first.table_rms, color=COLORS["target"], lw=1.2, label="whole embedding table", gid="reference:table")
    for row in frame.itertuples():
        draw_interval(left, row.soft_token, row.low, row.high, f"rms:{row.soft_token}", upright=True)
        draw_interval(
            right, row.soft_token, row.varying_low, row.varying_high, f"varying:{row.soft_token}", upright=True
        )
    look = {"color": COLORS["bridged"], "ls": "", "marker": "o", "ms": 3.5, "zorder": 4}
    left.plot(frame["soft_token"], frame["rms"], label="soft token", gid="rms", **look)
    right.plot(frame["soft_token"], frame["varying"], gid="varying", **look)
    left.set_ylim(0, 1.12 * max(frame["high"].max(), first.vocabulary_95))
    right.set_ylim(0, 1)
    left.set_ylabel("RMS")
    right.set_ylabel("share that varies\nwith the question")
    for ax in (left, right):
        ax.set_xlabel("soft token")
        ax.set_xlim(frame["soft_token"].min() - 0.6, frame["soft_token"].max() + 0.6)
        ax.xaxis.get_major_locator().set_params(integer=True)
    legend_above(fig, left)
    return fig


@paper_figure
def plot_entropy(table: pd.DataFrame) -> Figure:
    """Entropy (above) and probability of the right token (below), at each place of the answer, by group."""
    columns = ["place", "group", "right_probability", "right_low", "right_high"]
    check_frame(table, "entropy", "condition", "entropy", columns)
    places, groups = list(dict.fromkeys(table["place"])), [g for g in GROUPS if g in set(table["group"])]
    groups = groups or list(dict.fromkeys(table["group"]))
    conditions = list(dict.fromkeys(table["condition"]))
    fig, axes = new_grid(2, len(places), 0.62, sharey=True, sharex="row")
    measures = (("entropy", "low", "high", "entropy, bits"), ("right_probability", "right_low", "right_high",
                                                             "probability of the right token"))  # fmt: skip
    for line, (value, low, high, label) in zip(axes, measures, strict=True):
        for ax, place in zip(line, places, strict=True):
            for row in table[table["place"] == place].to_dict("records"):
                shift = conditions.index(row["condition"]) - (len(conditions) - 1) / 2
                y, name = groups.index(row["group"]) + 0.5 * shift / len(conditions), row["condition"]
                draw_interval(ax, y, row[low], row[high], f"{value}:{place}:{row['group']}:{name}", COLORS[name])
                ax.plot(row[value], y, MARKERS[name], color=COLORS[name], label=LABELS[name], zorder=4)
            list_rows(ax, [SUBSET_LABELS.get(g, g) for g in groups], guides=False)
            ax.set_xlabel(label)
    for ax, place in zip(axes[0], places, strict=True):
        ax.set_title("first answer token" if place == "first token" else "first digit of the unit's value")
    axes[1, 0].set_xlim(-0.03, 1.03)
    axes[0, 0].set_xlim(left=-0.03 * max(table["high"].max(), 0.1), right=1.06 * max(table["high"].max(), 0.1))
    legend_above(fig, axes[0, 0])
    return fig


@paper_figure
def plot_cka(frame: pd.DataFrame) -> Figure:
    """CKA of every pair of representations, each with half the width of its interval; columns a, b, cka, low, high."""
    import numpy as np

    check_frame(frame, "CKA", "a", "cka", ["b"])
    names = list(dict.fromkeys([*frame["a"], *frame["b"]]))
    places = {name: i for i, name in enumerate(names)}
    grid = np.full((len(names), len(names)), np.nan)
    fig, ax = new_figure(aspect=(1.4 + 0.3 * len(names)) / TEXT_WIDTH)
    for row in frame.itertuples():
        y, x = max(places[row.a], places[row.b]), min(places[row.a], places[row.b])
        grid[y, x] = max(row.cka, 0)
        colour = "white" if row.cka > 0.45 else DARK
        text = f"{row.cka:.2f}\n\N{PLUS-MINUS SIGN}{(row.high - row.low) / 2:.2f}".replace("-", "\N{MINUS SIGN}")
        ax.text(x, y, text, ha="center", va="center", fontsize=6.5, color=colour, linespacing=0.95)
    image = ax.imshow(grid[1:, :-1], vmin=0, vmax=1, aspect="auto", gid="cka",
                      extent=(-0.5, len(names) - 1.5, len(names) - 0.5, 0.5))  # fmt: skip
    ax.set_xticks(range(len(names) - 1), [n.replace(", ", ",\n") for n in names[:-1]], rotation=40, ha="right")
    ax.set_yticks(range(1, len(names)), names[1:])
    ax.tick_params(length=0)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    bar = fig.colorbar(image, ax=ax, pad=0.01, fraction=0.03, aspect=25, label="linear CKA, unbiased")
    bar.outline.set_linewidth(0.5)
    fix_tick_size(bar.ax)
    return fig


@paper_figure
def plot_probe(frame: pd.DataFrame) -> Figure:
    """Share of units whose digit a linear probe reads, by layer (x), place (column) and digit (row)."""
    check_frame(frame, "probe", "novelty", "accuracy", ["layer", "place", "digit"])
    if unknown := set(frame["novelty"]) - set(NOVELTY_LOOKS):
        raise ValueError(f"probe: unknown novelty '{min(unknown)}' (known: {', '.join(NOVELTY_LOOKS)})")
    digits, places = list(dict.fromkeys(frame["digit"])), list(dict.fromkeys(frame["place"]))
    fig, axes = new_grid(len(digits), len(places), 0.24 * len(digits) + 0.12, sharex=True, sharey=True)
    for line, digit in zip(axes, digits, strict=True):
        for ax, place in zip(line, places, strict=True):
            for i, (novelty, (label, edge, face, marker)) in enumerate(NOVELTY_LOOKS.items()):
                rows = frame[(frame["digit"] == digit) & (frame["place"] == place) & (frame["novelty"] == novelty)]
                rows = rows.sort_values("layer")
                x = rows["layer"] + 0.09 * (i - 1)
                for at, row in zip(x, rows.itertuples(), strict=True):
                    draw_interval(
                        ax, at, row.low, row.high, f"{digit}:{place}:{novelty}:{row.layer}", edge, upright=True
                    )
                look = {"color": edge, "mfc": face, "ms": 3.2, "lw": 0.9, "zorder": 4}
                ax.plot(x, rows["accuracy"], marker=marker, label=label, gid=f"line:{digit}:{place}:{novelty}", **look)
            ax.set_ylim(-0.03, 1.03)
            ax.xaxis.get_major_locator().set_params(integer=True)
        line[0].set_ylabel({"joint": "both digits"}.get(digit, f"{digit} digit"))
    for ax, place in zip(axes[0], places, strict=True):
        ax.set_title(place)
    for ax in axes[-1]:
        ax.set_xlabel("source layer")
    legend_above(fig, axes[0, 0], 2)
    return fig


@paper_figure
def plot_causal(table: pd.DataFrame) -> Figure:
    """Share of answers that follow the donor (full) or stay (open), by where the donor's states were put.

    Columns condition, variant, outcome (follows | stays), share, low, high, n.
    """
    check_frame(table, "causal check", "condition", "share", ["variant", "outcome", "n"])
    variants, conditions = list(dict.fromkeys(table["variant"])), list(dict.fromkeys(table["condition"]))
    fig, ax = new_figure(aspect=(0.95 + (0.22 + 0.2 * len(conditions)) * len(variants)) / TEXT_WIDTH)
    for row in table.itertuples():
        shift = conditions.index(row.condition) - (len(conditions) - 1) / 2
        y, follows = variants.index(row.variant) + 0.55 * shift / len(conditions), row.outcome == "follows"
        colour = COLORS[row.condition]
        draw_interval(ax, y, row.low, row.high, f"{row.condition}:{row.variant}:{row.outcome}", colour)
        label = f"{LABELS[row.condition]}: {'the answer of the donor' if follows else 'its own answer'}"
        look = {"color": colour, "mfc": colour if follows else "white", "mew": 1.1, "ms": 5, "zorder": 4}
        ax.plot(row.share, y, MARKERS[row.condition], label=label, gid=f"point:{row.variant}:{row.outcome}", **look)
        if follows:
            write_right(ax, y, f"{row.share:.3f} [{row.low:.3f}, {row.high:.3f}]", bold=row.condition == "bridged")
    list_rows(ax, variants)
    ax.set_xlim(-0.02, 1.02)
    ax.set_ylabel("donor's states at")
    ax.set_xlabel(f"share of answers (n = {table['n'].max():,}); in numbers: follows the donor")
    legend_above(fig, ax, 2)
    return fig
