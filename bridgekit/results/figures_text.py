"""Tables and example transcripts as text, for the notebook (Markdown), the README and the paper (LaTeX).

print(format_table(conditions_table(frame)))
print(format_transcripts(frame, n=3, seed=0))
"""

from __future__ import annotations

import html
import random
import typing

from bridgekit.config import CONDITIONS
from bridgekit.results.style import LABELS, SUBSET_LABELS, check_conditions, check_frame

if typing.TYPE_CHECKING:
    import pandas as pd

TABLE_SUBSETS = ("all", "source_only_held_unit", "target_only", "both")
SIDE_BY_SIDE = ("source", "target", "bridged", "shuffled")


def format_table(
    table: pd.DataFrame,
    style: str = "markdown",
    subsets: typing.Sequence[str] | None = None,
    percent: bool = False,
) -> str:
    """Accuracy with [low, high] for each condition (row) and subset (column) of `conditions_table`.

    Without `subsets`: the mix, the held-out source-only problems and the other groups, as far as there.
    """
    check_frame(table, "conditions table", "condition", "accuracy", ["n"])
    check_frame(table, "conditions table", "subset")
    check_conditions(table["condition"], table["condition"].unique(), "conditions table")
    there = list(table["subset"].unique())
    subsets = list(subsets or [s for s in TABLE_SUBSETS if s in there] or there)
    for subset in subsets:
        if subset not in there:
            raise ValueError(f"conditions table: no subset '{subset}' (there are: {', '.join(there)})")
    cells = {(r.condition, r.subset): r for r in table.itertuples()}
    head = ["condition", *(f"{SUBSET_LABELS.get(s, s)}\n(n = {_size(table, s)})" for s in subsets)]
    body = [
        [LABELS[c], *(_accuracy(cells.get((c, s)), percent) for s in subsets)]
        for c in CONDITIONS
        if any((c, s) in cells for s in subsets)
    ]
    return format_rows(head, body, style, LABELS["bridged"])


def format_rows(head: list[str], body: list[list[str]], style: str = "markdown", strong: str | None = None) -> str:
    """Cells as a table; the row whose first cell is `strong` is bold. A line break in a head makes two lines of it."""
    if style not in ("markdown", "latex"):
        raise ValueError(f"style: must be markdown or latex, got {style!r}")
    return _latex(head, body, strong) if style == "latex" else _markdown(head, body, strong)


def _size(table: pd.DataFrame, subset: str) -> str:
    n = table.loc[table["subset"] == subset, "n"]
    return f"{int(n.min()):,}" if n.nunique() == 1 else f"{int(n.min()):,}\N{EN DASH}{int(n.max()):,}"


def _accuracy(row: typing.Any, percent: bool) -> str:
    if row is None:
        return "\N{EN DASH}"
    scale, digits = (100, 1) if percent else (1, 3)
    value, low, high = (f"{scale * v:.{digits}f}" for v in (row.accuracy, row.low, row.high))
    return f"{value} [{low}, {high}]"


def _markdown(head: list[str], body: list[list[str]], strong: str | None) -> str:
    rows = [[f"**{cell}**" for cell in row] if row[0] == strong else row for row in body]
    rule = ["---"] + ["---:"] * (len(head) - 1)
    lines = [[cell.replace("\n", " ") for cell in row] for row in (head, rule, *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _latex(head: list[str], body: list[list[str]], strong: str | None) -> str:
    def line(row: typing.Sequence[str]) -> str:
        changes = {"\N{EN DASH}": "--", "%": r"\%", "_": r"\_", "<": "$<$"}
        cells = [cell.translate(str.maketrans(changes)) for cell in row]
        return " & ".join(rf"\textbf{{{c}}}" if row[0] == strong else c for c in cells) + r" \\"

    parts = [cell.split("\n") for cell in head]
    heads = zip(*([""] * (max(map(len, parts)) - len(part)) + part for part in parts), strict=True)
    rows = [r"\toprule", *map(line, heads), r"\midrule", *map(line, body), r"\bottomrule"]
    return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", *rows, r"\end{tabular}", ""])


def format_transcripts(frame: pd.DataFrame, n: int = 3, seed: int = 0) -> str:
    """Markdown of `n` examples drawn by `seed`: in turn one gained, one still wrong, one harmed.

    Where there was none of a kind the text says so, so that nobody takes silence for success.
    """
    if n < 1:
        raise ValueError(f"n: must be at least 1, got {n}")
    check_frame(frame, "transcripts", "question")
    shown = [c for c in SIDE_BY_SIDE if f"{c}_full" in frame]
    check_conditions(["target", "bridged"], shown, "transcripts")
    check_frame(frame, "transcripts", "question", columns=["target_correct", "bridged_correct"])
    target, bridged = frame["target_correct"].astype(bool), frame["bridged_correct"].astype(bool)
    kinds = {
        "Gained: target alone is wrong, bridged is right": frame[~target & bridged],
        "Still wrong: neither target alone nor bridged is right": frame[~target & ~bridged],
        "Harmed: target alone is right, bridged is wrong": frame[target & ~bridged],
    }
    generator, parts = random.Random(seed), []
    for turn, (title, rows) in enumerate(kinds.items()):
        wanted = len(range(turn, n, len(kinds)))
        picked = sorted(generator.sample(range(len(rows)), min(wanted, len(rows))))
        if wanted and not picked:
            parts.append(f"**{title}.** None of {len(frame):,} problems.\n")
        for i in picked:
            head = f"**{title}** ({len(rows):,} of {len(frame):,} problems).\n\n"
            parts.append(head + _transcript(rows.iloc[i], shown))
    return "\n".join(parts)


def _transcript(row: pd.Series, shown: list[str]) -> str:
    """Question and gold answer, then a column for each condition: its text and what was read from it."""
    facts = [f"{name} {row[name]}" for name in ("id", "group", "unit", "novelty") if _there(row.get(name))]
    gold = f"Gold answer: {_code(row['gold_extracted'])} {_code(', '.join(facts)) if facts else ''}"
    head = f"Question: {_code(row['question'])}  \n{gold.strip()}\n\n"
    texts, answers = [], []
    for name in shown:
        texts.append(_code(row[f"{name}_full"]))
        verdict = "right" if row[f"{name}_correct"] else "wrong"
        if name == "shuffled" and _there(row.get("donor_gold")) and not row["shuffled_correct"]:
            follows = row["shuffled_extracted"] == row["donor_gold"]
            verdict = "the donor's answer" if follows else f"wrong (the donor's is {row['donor_gold']})"
        answers.append(f"{_code(row[f'{name}_extracted'])} {verdict}")
    columns = [LABELS[name] for name in shown]
    rows = [columns, ["---"] * len(shown), texts, answers]
    return head + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def _there(value: object) -> bool:
    return value is not None and value == value and value != ""  # NaN is not equal to itself


def _code(text: object) -> str:
    """Verbatim text in one table cell: nothing in it may end the cell, become emphasis, or start a formula.

    Inside `code` MathJax leaves dollars alone; the characters Markdown would act on are written as entities.
    """
    text = html.escape(str(text).strip(), quote=False)
    for mark in "|$*_`~[]\\":
        text = text.replace(mark, f"&#{ord(mark)};")
    return "<code>" + "<br>".join(text.splitlines()) + "</code>"
