"""Read a run's answers one question at a time, all conditions side by side. Works from the JSONL alone.

    frame = load_eval(find_eval("runs/x"))
    browse_examples(frame)                        # in JupyterLab: choose group, novelty, outcome; step through
    HTML(format_example(frame.iloc[0]))           # one example, also where nobody can click

`choose_rows` is the filter behind the menus. ipywidgets is imported only where the browser is built.
"""

from __future__ import annotations

import html
import typing

from bridgekit.config import CONDITIONS
from bridgekit.results.style import LABELS

if typing.TYPE_CHECKING:
    import ipywidgets
    import pandas as pd

ANY = "any"
OUTCOMES = {  # (target alone, bridged) right?
    "gained": (False, True),
    "harmed": (True, False),
    "right both ways": (True, True),
    "wrong both ways": (False, False),
}


def choose_rows(frame: pd.DataFrame, group: str = ANY, novelty: str = ANY, outcome: str = ANY) -> pd.DataFrame:
    """The questions of a group, a novelty of their unit, and an outcome; `any` leaves out nothing."""
    if outcome != ANY and outcome not in OUTCOMES:
        raise ValueError(f"outcome: no '{outcome}' (there are: {ANY}, {', '.join(OUTCOMES)})")
    wanted = {column: value for column, value in (("group", group), ("novelty", novelty)) if value != ANY}
    for column, value in wanted.items():
        if value not in list_values(frame, column):
            raise ValueError(f"{column}: no '{value}' (there are: {', '.join(list_values(frame, column))})")
    for column, value in wanted.items():
        frame = frame[frame[column] == value]
    if outcome != ANY:
        target, bridged = OUTCOMES[outcome]
        frame = frame[(frame["target_correct"] == target) & (frame["bridged_correct"] == bridged)]
    return frame


def list_values(frame: pd.DataFrame, column: str) -> list[str]:
    """What a menu offers: `any`, then what is there."""
    return [ANY, *(sorted(frame[column].dropna().unique()) if column in frame else [])]


def format_example(row: pd.Series) -> str:
    """HTML of one question: what was asked, the right answer, and a line for each condition that answered."""
    facts = [f"{name} {row[name]}" for name in ("id", "group", "novelty", "unit", "value", "family", "donor_id")
             if name in row and row[name] == row[name] and row[name] is not None]  # fmt: skip
    lines = [f"<b>{escape(row['question'])}</b>", escape(", ".join(facts)), _line("gold", row["gold_full_text"])]
    body = []
    for condition in CONDITIONS:
        if f"{condition}_full" not in row or not isinstance(row[f"{condition}_full"], str):
            continue
        answer, right = row[f"{condition}_extracted"], bool(row[f"{condition}_correct"])
        verdict = "right" if right else "wrong"
        if condition == "shuffled" and not right and answer == row.get("donor_gold"):
            verdict = "the donor's answer"
        cells = (LABELS[condition], _code(answer), verdict, _code(row[f"{condition}_full"]))
        body.append("<tr>" + "".join(f'<td style="text-align: left">{cell}</td>' for cell in cells) + "</tr>")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in ("condition", "answer", "", "text")) + "</tr>"
    return "<br>".join(lines) + f"<table>{head}{''.join(body)}</table>"


def escape(text: object) -> str:
    """Text as it is: no tag, and no dollar that would start a formula."""
    return html.escape(str(text)).replace("$", "&#36;<wbr>")


def _code(text: object) -> str:
    return f"<code>{html.escape(str(text).strip()).replace(chr(10), '<br>')}</code>"


def _line(name: str, text: object) -> str:
    return f"{name}: {_code(text)}"


def count_rows(frame: pd.DataFrame) -> str:
    """How many questions each outcome has, in words, for under the browser."""
    n = {outcome: len(choose_rows(frame, outcome=outcome)) for outcome in OUTCOMES}
    return f"{len(frame):,} problems: " + ", ".join(f"{count:,} {outcome}" for outcome, count in n.items()) + "."


def browse_examples(frame: pd.DataFrame) -> ipywidgets.VBox:
    """Menus for group, novelty and outcome, a slider over the questions they leave, and the question chosen."""
    import ipywidgets

    menus = {
        "group": ipywidgets.Dropdown(options=list_values(frame, "group"), description="group"),
        "novelty": ipywidgets.Dropdown(options=list_values(frame, "novelty"), description="novelty"),
        "outcome": ipywidgets.Dropdown(options=[ANY, *OUTCOMES], description="outcome"),
    }
    place = ipywidgets.IntSlider(min=1, max=max(len(frame), 1), description="question", continuous_update=False)
    shown, found = ipywidgets.HTML(), [frame]

    def show(change=None) -> None:
        rows = found[0]
        shown.value = format_example(rows.iloc[place.value - 1]) if len(rows) else "No question is like that."

    def choose(change=None) -> None:
        found[0] = choose_rows(frame, **{name: menu.value for name, menu in menus.items()})
        place.max = max(len(found[0]), 1)
        place.value = 1
        place.description = f"of {len(found[0]):,}"
        show()

    for menu in menus.values():
        menu.observe(choose, names="value")
    place.observe(show, names="value")
    choose()
    return ipywidgets.VBox([ipywidgets.HBox([*menus.values(), place]), shown])
