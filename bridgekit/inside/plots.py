"""Figures of a look inside a bridge: states, attention, gates, soft tokens, entropy, CKA, the probe, the causal check.

    fig = plot_probe(list_probe(probe_pair(source, lexicon)), layers=(3, 4, 5))
    fig = plot_attention(weights, tokens, names)  # (K, S): soft tokens by source tokens

Most are calls of `rows` and `lines`; maps of tokens and the CKA grid are images. Frames come from `measure`, `probe`
and `causal`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence

from bridgekit.results.draw import BAND, INK, check_frame, lines, open_panels, paper_figure, rows
from bridgekit.results.style import PAGE, format_share, words

if typing.TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEWLINE, SPACE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\N{OPEN BOX}"
NOVELTY = {  # what a probe is asked about: in words
    "held_unit": "a unit the probe never saw",
    "held_value": "a unit and value it never saw",
    "not taught": "a unit the model was never taught",
}
CAUSAL = {  # where the donor's states are put; whose value the answer says
    "nowhere": "nowhere",
    "whole prompt": "at the whole prompt",
    "unit word": "at the unit's word",
    "all but the word": "all but the unit's word",
    "follows": "the donor's value",
    "stays": "its own value",
}
PLACES = {"first token": "first answer token", "value": "first digit of the unit's value"}
WIDEST = 48  # tokens of a map


def plot_attention(
    weights: np.ndarray, tokens: Sequence[str], names: Sequence[str] = (), title: str = "", most: float | None = None
) -> Figure:
    """Attention of each soft token (row) to the source's tokens (column), (K, S), every token written out.

    `names` are the nearest words of the soft tokens; `most` is the top of the colour scale, to compare questions.
    """
    labels = [f"{_show_token(names[i])}  {i + 1}" if len(names) else str(i + 1) for i in range(len(weights))]
    look = {"ylabel": "soft token" + (", nearest word" if len(names) else ""), "most": most}
    return plot_tokens(weights, tokens, labels, "attention", title=title or "What each soft token looks at", **look)


def plot_states(norms: np.ndarray, tokens: Sequence[str], layers: Sequence[int], title: str = "") -> Figure:
    """How long the source's states are: layers (rows) by source tokens (columns), (L, S)."""
    title = title or "The source's states: what the bridge is given"
    return plot_tokens(norms, tokens, list(map(str, layers)), "length of state", "source layer", title)


@paper_figure
def plot_tokens(
    values: np.ndarray,
    tokens: Sequence[str],
    labels: Sequence[str],
    what: str,
    ylabel: str = "",
    title: str = "",
    most: float | None = None,
) -> Figure:
    """A map of a value that is never negative, by row and source token; of a longer prompt its busiest stretch."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or values.shape != (len(labels), len(tokens)) or not values.size:
        raise ValueError(f"{what}: values must be ({len(labels)} rows, {len(tokens)} tokens), got {values.shape}")
    if not np.isfinite(values).all() or (values < 0).any() or not values.sum():
        raise ValueError(f"{what}: values are NaN, negative or all zero; give attention after the softmax")
    width, running = min(WIDEST, len(tokens)), np.concatenate([[0], np.cumsum(values.sum(axis=0))])
    start = int(np.argmax(running[width:] - running[:-width]))
    stop, every = start + width, max(1, len(labels) // 24)
    part, where = values[:, start:stop], ""
    if width < len(tokens):
        where = f" ({start + 1}\N{EN DASH}{stop} of {len(tokens)}, {part.sum() / values.sum():.0%} of the {what})"
    ax = _draw_image(part, title, 0.9 + 0.11 * min(max(len(labels), 8), 24), what, most)
    shown = [_show_token(token) for token in tokens[start:stop]]
    ax.set_xticks(range(width), shown, rotation=90, family="DejaVu Sans Mono", parse_math=False)
    ax.set_yticks(range(0, len(labels), every), labels[::every], parse_math=False)
    ax.set(xlabel=f"source token{where}", ylabel=ylabel)
    return ax.figure


def _show_token(token: str) -> str:
    """A token as one visible line; both tokenizer families mark spaces, byte-level ones also newlines."""
    marks = {"\u2581": " ", "\u0120": " ", "\u010a": NEWLINE, "\n": NEWLINE}
    return token.translate(str.maketrans(marks)).strip() or SPACE


def _draw_image(values: np.ndarray, title: str, height: float, label: str, most: float | None) -> Axes:
    """The axes of an image, with the scale of its colours beside it."""
    import pandas as pd

    ax = open_panels(pd.DataFrame([0]), None, [height], title, {}, PAGE)[1][None]
    image = ax.imshow(values, aspect="auto", vmin=0, vmax=most, gid=label)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, fraction=0.03, aspect=25, label=label)
    bar.outline.set_linewidth(0.5)
    bar.ax.tick_params(labelsize=7)
    ax.tick_params(length=0, pad=1)
    return ax


@paper_figure
def plot_cka(frame: pd.DataFrame) -> Figure:
    """CKA of every pair of representations (columns a, b, cka); a representation with itself is 1 and left out."""
    frame = check_frame(frame, "cka", ["a", "b"], "CKA")
    names = list(dict.fromkeys([*frame["a"], *frame["b"]]))
    grid = frame.pivot(index="b", columns="a", values="point").reindex(index=names[1:], columns=names[:-1])
    title, numbers = "How alike are states, message and embeddings?", range(len(grid))
    ax = _draw_image(grid.clip(lower=0), title, 1.2 + 0.2 * len(grid), "linear CKA, unbiased", 1)
    for row in frame.itertuples():
        place = names.index(row.a), names.index(row.b) - 1
        ax.text(
            *place, format_share(row.point, 2), ha="center", va="center", color="white" if row.point > 0.45 else INK
        )
    ax.set_xticks(numbers, [str(i + 1) for i in numbers])
    ax.set_yticks(numbers, [f"{name}  {i}" for i, name in enumerate(names[1:], 2)])
    ax.set_xlabel(f"the same, by number (1: {names[0]})")
    return ax.figure


def plot_attention_classes(frame: pd.DataFrame) -> Figure:
    """Share of the attention that goes to each class of source token, beside the share an even spread would give it."""
    import pandas as pd

    even = frame.assign(share=frame["uniform"], low=frame["uniform"], high=frame["uniform"], kind="spread evenly")
    both = pd.concat([frame.assign(kind="the bridge's attention"), even], ignore_index=True)
    look = {"xlabel": "share of attention", "title": "Which source tokens does the bridge look at?"}
    return rows(both, "token_class", "share", color="kind", **look)


def plot_gates(frame: pd.DataFrame) -> Figure:
    """How far each gate is open through training; columns step, gate, value. Zero is closed."""
    look = {"xlabel": "training step", "ylabel": "gate", "title": "How far the gates open (0: closed)"}
    return lines(frame, "step", "value", color="gate", references={"closed": 0}, **look)


def plot_soft_sizes(frame: pd.DataFrame) -> Figure:
    """The share of each soft token that varies with the question; the rest is the same for all."""
    frame = frame.assign(low=frame["varying_low"], high=frame["varying_high"])
    look = {"xlabel": "soft token", "ylabel": "share that varies", "title": "Which soft tokens depend on the question?"}
    return lines(frame, "soft_token", "varying", bars=True, ylim=(0, 1), height=1.3, **look)


def plot_entropy(table: pd.DataFrame, place: str = "value") -> Figure:
    """Entropy and probability of the right token at one place of the answer, by group, bridged and alone."""
    import pandas as pd

    table = table[table["place"] == place].drop(columns="place")
    right = table.drop(columns=["entropy", "low", "high"])
    right = right.rename(columns={"right_probability": "entropy", "right_low": "low", "right_high": "high"})
    both = pd.concat({"entropy, bits": table, "probability of the right token": right}, names=["panel"]).reset_index()
    look = {"xlabel": PLACES.get(place, place), "title": "How sure is the target, and is it right?"}
    return rows(both, "group", "entropy", color="condition", panel="panel", sharex=False, **look)


def plot_probe(frame: pd.DataFrame, layers: Iterable[int] = ()) -> Figure:
    """Share of units whose digit a linear probe reads, by layer (x), digit and place; `layers` are read by the bridge
    and shaded."""
    panels = frame["digit"].map(words) + ", at the " + frame["place"]
    frame = frame.assign(asked=frame["novelty"].map(NOVELTY), panel=panels).drop(columns="n")
    look = {"bars": True, "ylim": (-0.03, 1.03), "width": PAGE, "height": 1.0, "xlabel": "source layer"}
    look |= {"title": "Where in the source can the value be read? (share of units; shaded: what the bridge reads)"}
    fig = lines(frame, "layer", "accuracy", color="asked", panel="panel", **look)
    for ax in fig.axes:
        for layer in layers:
            ax.axvspan(layer - 0.4, layer + 0.4, color=BAND, lw=0, zorder=0)
    return fig


def plot_causal(table: pd.DataFrame) -> Figure:
    """How often the answer is the donor's, and how often its own, by where the donor's states were put."""
    table = table.assign(variant=table["variant"].replace(CAUSAL), whose=table["outcome"].map(CAUSAL))
    title = "Put another unit's states into the source: whose value does the answer say?"
    return rows(table, "variant", "share", color="condition", panel="whose", xlabel="share of answers", title=title)
