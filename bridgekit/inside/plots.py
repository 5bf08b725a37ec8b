"""Figures of a look inside a bridge that no single call of `rows` or `lines` draws: maps of tokens, CKA, the probe.

    fig = plot_probe(list_probe(probe_pair(source, lexicon)), layers=(3, 4, 5))
    fig = plot_attention(weights, tokens, names)  # (K, S): soft tokens by source tokens
    fig = plot_states(norms, tokens, layers)      # (L, S)

Frames come from `measure` and `probe`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence

from bridgekit.results.draw import BAND, check_frame, finish_figure, lines, open_panels, paper_figure
from bridgekit.results.style import PAGE, words

if typing.TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

NEWLINE, SPACE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\N{OPEN BOX}"
NOVELTY = {  # what a probe is asked about: in words
    "held_unit": "a unit the probe never saw",
    "held_value": "a unit and value it never saw",
    "not taught": "a unit the model was never taught",
}
WIDEST = 48  # tokens of a map


def plot_attention(
    weights: np.ndarray, tokens: Sequence[str], names: Sequence[str] = (), title: str = "", most: float | None = None
) -> Figure:
    """Attention of each soft token (row) to the source's tokens (column), (K, S), every token written out.

    `names` are the nearest words of the soft tokens; `most` is the top of the colour scale, to compare questions.
    """
    labels = [f"{_show_token(names[i])}  {i + 1}" if len(names) else str(i + 1) for i in range(len(weights))]
    title, ylabel = title or "What each soft token looks at", "soft token" + (", nearest word" if len(names) else "")
    return plot_tokens(weights, tokens, labels, "attention", ylabel, title, most)


def plot_states(norms: np.ndarray, tokens: Sequence[str], layers: Sequence[int]) -> Figure:
    """How long the source's states are: layers (rows) by source tokens (columns), (L, S)."""
    title = "The source's states: what the bridge is given"
    return plot_tokens(norms, tokens, list(map(str, layers)), "length of state", "source layer", title)


@paper_figure
def plot_tokens(
    values: np.ndarray, tokens: Sequence[str], labels: list[str], what: str, ylabel: str, title: str, most=None
) -> Figure:
    """A map of a value that is never negative, by row and source token; of a longer prompt its busiest stretch."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    if values.shape != (len(labels), len(tokens)):
        raise ValueError(f"{what}: values must be ({len(labels)} rows, {len(tokens)} tokens), got {values.shape}")
    if not (values >= 0).all() or not 0 < values.sum() < np.inf:
        raise ValueError(f"{what}: values are NaN, negative or all zero; give attention after the softmax")
    width, xlabel = min(WIDEST, len(tokens)), "source token"
    start = int(np.convolve(values.sum(axis=0), np.ones(width), "valid").argmax())
    part = values[:, start : start + width]
    if width < len(tokens):
        stretch = f"{start + 1}\N{EN DASH}{start + width} of {len(tokens)}"
        xlabel += f" ({stretch}, {part.sum() / values.sum():.0%} of the {what})"
    shown = [_show_token(token) for token in tokens[start : start + width]]
    ticks = {"xticklabels": shown, "yticklabels": labels, "vmax": most}
    fig = _draw_map(part, what, title, xlabel, 0.9 + 0.11 * min(max(len(labels), 8), 24), **ticks)
    fig.axes[0].set_ylabel(ylabel)
    fig.axes[0].tick_params("x", rotation=90, labelfontfamily="DejaVu Sans Mono")
    fig.axes[0].tick_params("y", rotation=0)
    return fig


def _show_token(token: str) -> str:
    """A token as one visible line; both tokenizer families mark spaces, byte-level ones also newlines."""
    marks = {"\u2581": " ", "\u0120": " ", "\u010a": NEWLINE, "\n": NEWLINE}
    return token.translate(str.maketrans(marks)).strip() or SPACE


def _draw_map(values: np.ndarray, what: str, title: str, xlabel: str, height: float, **look) -> Figure:
    """An image of `values` (rows, columns) with the scale of its colours; `look` goes to seaborn's heatmap."""
    import pandas as pd
    import seaborn as sns

    panels = open_panels(pd.DataFrame([0]))
    ax, _ = panels[None]
    scale = {"pad": 0.01, "fraction": 0.03, "aspect": 25, "label": what}
    sns.heatmap(values, ax=ax, vmin=0, cmap="Greys", cbar_kws=scale, gid=what, **look)
    ax.set(xlabel=xlabel, ylabel="")
    for text in ax.get_xticklabels() + ax.get_yticklabels():
        text.set_parse_math(False)
    for each in ax.figure.axes:
        each.tick_params(length=0, pad=1, labelsize=7)
    return finish_figure(panels, title, "", PAGE, height)


@paper_figure
def plot_cka(frame: pd.DataFrame) -> Figure:
    """CKA of every pair of representations (columns a, b, point); a representation with itself is 1 and left out."""
    frame = check_frame(frame, "point", ["a", "b"], "CKA")
    names = list(dict.fromkeys([*frame["a"], *frame["b"]]))
    grid = frame.pivot(index="b", columns="a", values="point").reindex(index=names[1:], columns=names[:-1])
    title, right = "How alike are states, message and embeddings?", f"the same, by number (1: {names[0]})"
    ticks = {"xticklabels": range(1, len(names)), "yticklabels": [f"{n}  {i}" for i, n in enumerate(names[1:], 2)]}
    look = {"vmax": 1, "annot": True, "fmt": ".2f", "annot_kws": {"size": 7}, **ticks}
    return _draw_map(grid, "linear CKA, unbiased", title, right, 1.2 + 0.2 * len(grid), **look)


def plot_probe(frame: pd.DataFrame, layers: Iterable[int] = ()) -> Figure:
    """Share of units whose digit a linear probe reads, by layer (x), digit and place; `layers` are read by the bridge
    and shaded."""
    panels = frame["digit"].map(words) + ", at the " + frame["place"]
    frame = frame.assign(asked=frame["novelty"].map(NOVELTY), panel=panels).drop(columns="n")
    look = {"bars": True, "ylim": (-0.03, 1.03), "width": PAGE, "height": 1.0, "xlabel": "source layer"}
    look |= {"title": "Where in the source can the value be read? (share of units; shaded: what the bridge reads)"}
    fig = lines(frame, "layer", color="asked", panel="panel", **look)
    for ax in fig.axes:
        for layer in layers:
            ax.axvspan(layer - 0.4, layer + 0.4, color=BAND, lw=0, zorder=0)
    return fig
