"""Figures of a look inside a bridge: attention, gates, soft tokens, entropy, CKA, the linear probe, the causal check.

    fig = plot_probe(list_probe(probe_pair(source, lexicon)), layers=(3, 4, 5))
    fig = plot_attention(weights, tokens, names)  # (K, S): soft tokens by source tokens

Most are calls of `rows` and `lines`; attention maps and the CKA grid are images. Frames come from `measure`, `probe`
and `causal`.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Sequence

from bridgekit.results.draw import INK, check_frame, lines, open_panels, paper_figure, rows
from bridgekit.results.plots import as_points
from bridgekit.results.style import PAGE, format_share, words

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
CAUSAL = {  # where the donor's states are put; whose value the answer says
    "nowhere": "nowhere",
    "whole prompt": "at the whole prompt",
    "unit word": "at the unit's word",
    "all but the word": "all but the unit's word",
    "follows": "the donor's value",
    "stays": "its own value",
}
PLACES = {"first token": "first answer token", "value": "first digit of the unit's value"}


@paper_figure
def plot_attention(
    weights: np.ndarray, tokens: Sequence[str], names: Sequence[str] = (), title: str = "", most: float | None = None
) -> Figure:
    """Attention of each soft token (row) to the source's tokens (column), (K, S), every token written out.

    `names` are the nearest words of the soft tokens; `most` is the top of the colour scale, to compare questions.
    Of a longer prompt the 48 neighbours with the most attention are drawn, and the axis says so.
    """
    import numpy as np

    weights = np.asarray(weights, dtype=float)
    if weights.ndim != 2 or weights.shape[1] != len(tokens) or not weights.size:
        raise ValueError(f"attention: weights must be (soft tokens, {len(tokens)}), got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum():
        raise ValueError("attention: weights are NaN, negative or all zero; give them after the softmax")
    start, stop = _find_busiest(weights)
    part, where = weights[:, start:stop], ""
    if part.shape != weights.shape:
        share = f"{part.sum() / weights.sum():.0%} of the attention"
        where = f" ({start + 1}\N{EN DASH}{stop} of {len(tokens)}, {share})"
    n_soft, every = len(part), max(1, len(part) // 24)
    ax = _open_image(title or "What each soft token looks at", 0.9 + 0.11 * min(max(n_soft, 8), 24), PAGE)
    image = ax.imshow(part, aspect="auto", vmin=0, vmax=most, gid="attention")
    shown = [_show_token(token) for token in tokens[start:stop]]
    ax.set_xticks(range(stop - start), shown, rotation=90, family="DejaVu Sans Mono", parse_math=False)
    labels = [f"{_show_token(names[i])}  {i + 1}" if len(names) else str(i + 1) for i in range(n_soft)]
    ax.set_yticks(range(0, n_soft, every), labels[::every], parse_math=False)
    ax.tick_params(length=0, pad=1)
    ax.set(xlabel=f"source token{where}", ylabel="soft token" + (", nearest word" if len(names) else ""))
    return _add_bar(ax, image, "attention")


def _find_busiest(weights: np.ndarray, width: int = 48) -> tuple[int, int]:
    """The first column, and the one past the last, of the `width` neighbours with most attention."""
    import numpy as np

    width = min(width, weights.shape[1])
    running = np.concatenate([[0], np.cumsum(weights.sum(axis=0))])
    start = int(np.argmax(running[width:] - running[:-width]))
    return start, start + width


def _show_token(token: str) -> str:
    """A token as one visible line; both tokenizer families mark spaces, byte-level ones also newlines."""
    for mark, meaning in (("\u2581", " "), ("\u0120", " "), ("\u010a", "\n")):
        token = token.replace(mark, meaning)
    return token.replace("\n", NEWLINE).strip() or SPACE


def _open_image(title: str, height: float, width: float) -> typing.Any:
    import pandas as pd

    _, axes = open_panels(pd.DataFrame({"": [0]}), None, [height], title, {}, width)
    return axes[None]


def _add_bar(ax: typing.Any, image: typing.Any, label: str) -> Figure:
    bar = ax.figure.colorbar(image, ax=ax, pad=0.01, fraction=0.03, aspect=25, label=label)
    bar.outline.set_linewidth(0.5)
    bar.ax.tick_params(labelsize=7)
    return ax.figure


@paper_figure
def plot_cka(frame: pd.DataFrame) -> Figure:
    """CKA of every pair of representations (columns a, b, cka); a representation with itself is 1 and left out."""
    import numpy as np

    frame = check_frame(frame, "cka", ["a", "b"], "CKA")
    names = list(dict.fromkeys([*frame["a"], *frame["b"]]))
    grid = np.full((len(names), len(names)), np.nan)
    ax = _open_image("How alike are states, message and embeddings?", 1.0 + 0.2 * len(names), PAGE)
    for row in frame.itertuples():
        low, high = sorted([names.index(row.a), names.index(row.b)])
        grid[high, low] = max(row.point, 0)
        ax.text(
            low, high, format_share(row.point, 2), ha="center", va="center", color="white" if row.point > 0.45 else INK
        )
    image = ax.imshow(grid, vmin=0, vmax=1, aspect="auto", gid="cka")
    ax.set(xlim=(-0.5, len(names) - 1.5), ylim=(len(names) - 0.5, 0.5))
    ax.set_xticks(range(len(names) - 1), [str(i + 1) for i in range(len(names) - 1)])
    ax.set_yticks(range(1, len(names)), [f"{name}  {i}" for i, name in enumerate(names[1:], 2)])
    ax.tick_params(length=0)
    ax.set_xlabel(f"the same, by number (1: {names[0]})")
    return _add_bar(ax, image, "linear CKA, unbiased")


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

    table = table[table["place"] == place].assign(group=lambda rows: rows["group"].map(words))
    right = {"entropy": "right_probability", "low": "right_low", "high": "right_high"}
    parts = [table.assign(panel="entropy, bits"), table.assign(panel="probability of the right token")]
    parts[1] = parts[1].assign(**{name: table[column] for name, column in right.items()})
    look = {"xlabel": PLACES.get(place, place), "title": "How sure is the target, and is it right?"}
    return rows(pd.concat(parts), "group", "entropy", color="condition", panel="panel", sharex=False, **look)


def plot_probe(frame: pd.DataFrame, layers: Iterable[int] = ()) -> Figure:
    """Share of units whose digit a linear probe reads, by layer (x), place (column), digit (row); `layers` are read by
    the bridge and shaded."""
    if unknown := set(frame["novelty"]) - set(NOVELTY):
        raise ValueError(f"probe: unknown novelty '{min(unknown)}' (known: {', '.join(NOVELTY)})")
    frame = as_points(frame, "accuracy").assign(asked=frame["novelty"].map(NOVELTY), place="at the " + frame["place"])
    look = {"bars": True, "ylim": (-0.03, 1.03), "width": PAGE, "height": 1.0, "xlabel": "source layer"}
    look |= {"title": "Where in the source can the value be read? (share of units; shaded: what the bridge reads)"}
    fig = lines(frame.drop(columns="n"), "layer", color="asked", panel=("digit", "place"), **look)
    for ax in fig.axes:
        for layer in layers:
            ax.axvspan(layer - 0.4, layer + 0.4, color="#ebebeb", lw=0, zorder=0)
    return fig


def plot_causal(table: pd.DataFrame) -> Figure:
    """How often the answer is the donor's, and how often its own, by where the donor's states were put."""
    table = table.assign(variant=table["variant"].replace(CAUSAL), whose=table["outcome"].map(CAUSAL))
    title = "Put another unit's states into the source: whose value does the answer say?"
    return rows(table, "variant", "share", color="condition", panel="whose", xlabel="share of answers", title=title)
