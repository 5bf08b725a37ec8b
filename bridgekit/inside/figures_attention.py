"""What the bridge attends to: one example token by token, and the share of each class of token.

fig = plot_attention(weights, tokens)  # (K, S): soft tokens by source tokens
fig = plot_attention_classes(frame)  # token_class, share
"""

from __future__ import annotations

import typing

from bridgekit.results.style import (
    COLORS,
    DARK,
    TEXT_WIDTH,
    check_frame,
    draw_interval,
    fix_tick_size,
    list_rows,
    new_figure,
    paper_figure,
    write_right,
)

if typing.TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from matplotlib.figure import Figure

NEWLINE, SPACE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\N{OPEN BOX}"


@paper_figure
def plot_attention(
    weights: np.ndarray, tokens: typing.Sequence[str], title: str | None = None, max_tokens: int = 48
) -> Figure:
    """Attention of each soft token (row) to the source's tokens (column), (K, S), every token written out.

    Of a longer prompt the `max_tokens` neighbours with the most attention are drawn, and the axis says so.
    """
    import numpy as np

    weights = np.asarray(weights, dtype=float)
    if weights.ndim != 2 or weights.shape[1] != len(tokens) or not weights.size:
        raise ValueError(f"attention: weights must be (soft tokens, {len(tokens)}), got {weights.shape}")
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum():
        raise ValueError("attention: weights are NaN, negative or all zero; give them after the softmax")
    start, stop = _busiest(weights, max_tokens)
    part = weights[:, start:stop]
    k, s = part.shape
    fig, ax = new_figure(aspect=(1.15 + 0.085 * min(max(k, 8), 24)) / TEXT_WIDTH)
    image = ax.imshow(part, aspect="auto", vmin=0, gid="attention")
    names = [_show_token(token) for token in tokens[start:stop]]
    ax.set_xticks(range(s), names, rotation=90, fontsize=6.5, family="DejaVu Sans Mono", parse_math=False)
    ax.tick_params(axis="x", length=0, pad=1)
    rows = range(0, k, max(1, k // 8))
    ax.set_yticks(rows, [str(i + 1) for i in rows])
    ax.set_ylabel("soft token")
    share = f"{part.sum() / weights.sum():.0%} of the attention"
    where = f" ({start + 1}\N{EN DASH}{stop} of {len(tokens)}, {share})" if s < len(tokens) else ""
    ax.set_xlabel(f"source token{where}")
    if title:
        ax.set_title(title, parse_math=False)
    bar = fig.colorbar(image, ax=ax, pad=0.01, fraction=0.03, aspect=25, label="attention")
    bar.outline.set_linewidth(0.5)
    fix_tick_size(bar.ax)
    return fig


def _busiest(weights: np.ndarray, max_tokens: int) -> tuple[int, int]:
    """The first column, and the one past the last, of the `max_tokens` neighbours with most attention."""
    import numpy as np

    if max_tokens < 1:
        raise ValueError(f"max_tokens: must be at least 1, got {max_tokens}")
    width = min(max_tokens, weights.shape[1])
    running = np.concatenate([[0], np.cumsum(weights.sum(axis=0))])
    start = int(np.argmax(running[width:] - running[:-width]))
    return start, start + width


def _show_token(token: str) -> str:
    """A token as one visible line; both tokenizer families mark spaces, byte-level ones also newlines."""
    for mark, meaning in (("\u2581", " "), ("\u0120", " "), ("\u010a", "\n")):
        token = token.replace(mark, meaning)
    return token.replace("\n", NEWLINE).strip() or SPACE


@paper_figure
def plot_attention_classes(frame: pd.DataFrame) -> Figure:
    """Share of the attention that goes to each class of source token; columns token_class, share.

    Optional: low and high (an interval), uniform (the share, were attention spread evenly over the tokens).
    """
    has_interval, has_uniform = "low" in frame or "high" in frame, "uniform" in frame
    more = ["uniform"] if has_uniform else []
    value, columns = ("share", more) if has_interval else ("", ["share", *more])
    check_frame(frame, "attention classes", "token_class", value, columns)
    fig, ax = new_figure(width_share=0.75, aspect=(0.85 + 0.24 * len(frame)) / (0.75 * TEXT_WIDTH))
    for y, row in enumerate(frame.itertuples()):
        ax.barh(y, row.share, 0.6, color=COLORS["bridged"], lw=0, gid=f"bar:{row.token_class}")
        if has_interval:
            draw_interval(ax, y, row.low, row.high, row.token_class)
        if has_uniform:
            look = {"color": "white", "mec": DARK, "mew": 0.8, "ms": 4.5, "zorder": 4}
            ax.plot(row.uniform, y, "D", gid=f"uniform:{row.token_class}", **look)
        write_right(ax, y, f"{row.share:.3f}")
    list_rows(ax, frame["token_class"], guides=False)
    ax.set_xlim(0, 1.05 * frame[["share", *(["high"] if has_interval else []), *more]].max(axis=None))
    ax.set_xlabel("share of attention")
    if has_uniform:
        fig.legend([ax.lines[0]], ["if spread evenly over tokens"], loc="outside upper left")
    return fig
