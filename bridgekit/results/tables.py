"""Single examples and their browser: what was asked and answered, for notebooks.

    HTML(format_example(frame.iloc[0]))       # one example
    browse_examples(frame, extras)            # in JupyterLab: step through, search, filter

They work from the evaluation JSONL alone. Whatever a model has written is escaped.
"""

from __future__ import annotations

import html
import typing
from collections.abc import Callable, Sequence

import pandas as pd

from bridgekit.config import CONDITIONS
from bridgekit.results.style import COLORS, LABELS, WORDS, words

if typing.TYPE_CHECKING:
    import ipywidgets

FACTS = ("id", "group", "novelty", "unit", "value", "family", "donor_id")
OUTCOMES = {  # target alone and bridged, right?
    (False, True): "gained",
    (True, False): "harmed",
    (True, True): "right both ways",
    (False, False): "wrong both ways",
}


def find_outcomes(frame: pd.DataFrame) -> pd.Series:
    """For each question of an evaluation: gained, harmed, right or wrong both ways, target alone and bridged."""
    right = frame[["target_correct", "bridged_correct"]].astype(bool).itertuples(index=False, name=None)
    return pd.Series([OUTCOMES[pair] for pair in right], frame.index, dtype=object, name="outcome")


def format_example(row: pd.Series, extras: str = "", shown: Sequence[str] = CONDITIONS) -> str:
    """HTML of one question: what was asked, the right answer, a line for each condition; `extras` (HTML) beside it."""
    body = ""
    for condition in [c for c in shown if isinstance(row.get(f"{c}_full"), str)]:
        verdict = judge_answer(row, condition)
        shade = "#e2f2e2" if verdict == "right" else "#fbe3e1"
        name = f'<span style="color:{COLORS[condition]}">\N{BLACK SQUARE}</span> {LABELS[condition]}'
        cells = (
            name,
            escape(row[f"{condition}_extracted"]),
            html.escape(verdict, quote=False),
            escape(row[f"{condition}_full"]),
        )
        cells = "".join(f'<td style="text-align:left;color:black;background:{shade}">{cell}</td>' for cell in cells)
        body += f"<tr>{cells}</tr>"
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in ("condition", "answer", "", "text"))
    facts = row.reindex(FACTS).dropna().astype(str).str.removesuffix(".0")
    known = escape(", ".join(f"{name} {WORDS.get(fact, fact)}" for name, fact in facts.items()))
    question = f"<b>{escape(row['question'])}</b><br>{known}<br>right: {escape(row['gold_full_text'])}"
    table = f"{question}<table><tr>{head}</tr>{body}</table>"
    return f'<div style="display:flex;gap:2em;flex-wrap:wrap"><div>{table}</div><div>{extras}</div></div>'


def judge_answer(row: pd.Series, condition: str) -> str:
    """right | wrong | the donor's answer: what a condition's answer is."""
    donor = row.get("donor_gold") if condition == "shuffled" else None
    if row[f"{condition}_correct"] or donor is None or donor != donor:
        return "right" if row[f"{condition}_correct"] else "wrong"
    return "the donor's answer" if row["shuffled_extracted"] == donor else f"wrong (the donor's is {donor})"


def escape(text: object) -> str:
    """Verbatim text that ends no cell, starts no tag, emphasis or formula, in HTML as in Markdown."""
    marks = {ord(mark): f"&#{ord(mark)};" for mark in "|$*_`~[]\\"}
    text = html.escape(str(text).strip(), quote=False).translate(marks)
    return "<code>" + "<br>".join(text.splitlines()) + "</code>"


def browse_examples(frame: pd.DataFrame, extras: Callable[[str], str] | None = None) -> ipywidgets.interactive:
    """Menus, a search field and a slider through the questions; `extras(id)` gives HTML beside a question.

    For example its message's nearest words, or its attention.
    """
    import ipywidgets
    from IPython.display import HTML

    frame = frame.assign(outcome=find_outcomes(frame))
    texts = frame.filter(["unit", "id", "question"]).fillna("").astype(str).agg(" ".join, axis=1).str.lower()
    menus = {}
    for name in [name for name in ("group", "novelty", "outcome") if name in frame]:
        menus[name] = [("any", None), *((words(value), value) for value in sorted(frame[name].dropna().unique()))]

    def show(question: int, search: str, **chosen) -> HTML:
        wanted = texts.str.contains(search.lower(), regex=False)
        for name, value in chosen.items():
            wanted &= frame[name].eq(value) | (value is None)
        found, question = frame[wanted], min(question, wanted.sum())
        if found.empty:
            return HTML("No question is like that.")
        row = found.iloc[question - 1]
        example = format_example(row, extras(row["id"]) if extras else "")
        return HTML(f"question {question:,} of {len(found):,}{example}")

    slider = ipywidgets.IntSlider(value=1, min=1, max=len(frame))
    return ipywidgets.interactive(show, {"auto_display": True}, question=slider, search="", **menus)
