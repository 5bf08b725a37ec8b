"""Tables, transcripts and the example browser: a run's answers as text, for notebooks, README and paper.

    Markdown(markdown(tabulate_conditions(table), strong="bridged"))
    Markdown(format_transcripts(frame, n=3, seed=0))
    browse_examples(frame, extras)            # in JupyterLab: step through, search, filter
    HTML(format_example(frame.iloc[0]))       # one example, also where nobody can click

They work from the evaluation JSONL alone. Whatever a model has written is escaped.
"""

from __future__ import annotations

import html
import random
import typing
from collections.abc import Callable, Sequence

from bridgekit.config import CONDITIONS
from bridgekit.results.style import COLORS, LABELS, format_interval, format_size, words

if typing.TYPE_CHECKING:
    import ipywidgets
    import pandas as pd

TABLE_SUBSETS = ("all", "source_only_held_unit", "target_only", "both")
SIDE_BY_SIDE = ("source", "target", "bridged", "shuffled")
FACTS = ("id", "group", "novelty", "unit", "value", "family", "donor_id")
ANY = "any"
OUTCOMES = {  # target alone and bridged, right?
    (False, True): "gained",
    (True, False): "harmed",
    (True, True): "right both ways",
    (False, False): "wrong both ways",
}
TRANSCRIPTS = {  # outcomes in the order in which transcripts take turns
    "gained": "Gained: target alone is wrong, bridged is right",
    "wrong both ways": "Still wrong: neither target alone nor bridged is right",
    "harmed": "Harmed: target alone is right, bridged is wrong",
}


def tabulate_conditions(table: pd.DataFrame, subsets: Sequence[str] = TABLE_SUBSETS) -> pd.DataFrame:
    """Accuracy with its interval as text: a row for each condition, a column for each subset of `conditions_table`.

    Without `subsets`: the mix, the held-out source-only problems and the other groups, as far as there.
    """
    import pandas as pd

    present = set(table["subset"])
    if unknown := [s for s in subsets if s not in present and subsets is not TABLE_SUBSETS]:
        raise ValueError(f"conditions table: no subset '{unknown[0]}' (there are: {', '.join(sorted(present))})")
    columns = {"condition": pd.Series({c: LABELS[c] for c in CONDITIONS if c in set(table["condition"])})}
    for subset in [s for s in subsets if s in present]:
        part = table[table["subset"] == subset].set_index("condition")
        texts = [format_interval(*row) for row in part[["accuracy", "low", "high"]].itertuples(index=False)]
        columns[f"{words(subset)} ({format_size(part).split(' on ')[0]})"] = pd.Series(texts, part.index)
    return pd.DataFrame(columns).reindex(columns["condition"].index).reset_index(drop=True)


def format_transcripts(frame: pd.DataFrame, n: int = 3, seed: int = 0) -> str:
    """Markdown of `n` examples drawn by `seed`: in turn one gained, one still wrong, one harmed.

    Where there was none of a kind the text says so, so that nobody takes silence for success.
    """
    if n < 1 or frame.empty:
        raise ValueError(f"transcripts: n must be at least 1 and there must be rows, got n = {n}, {len(frame)} rows")
    generator, parts = random.Random(seed), []
    for turn, (outcome, title) in enumerate(TRANSCRIPTS.items()):
        rows, wanted = choose_rows(frame, outcome=outcome), len(range(turn, n, len(TRANSCRIPTS)))
        for i in sorted(generator.sample(range(len(rows)), min(wanted, len(rows)))):
            head = f"**{title}** ({len(rows):,} of {len(frame):,} problems).\n\n"
            parts.append(head + format_example(rows.iloc[i], shown=SIDE_BY_SIDE))
        if wanted and rows.empty:
            parts.append(f"**{title}.** None of {len(frame):,} problems.")
    return "\n\n".join(parts)


def format_example(row: pd.Series, extras: str = "", shown: Sequence[str] = CONDITIONS) -> str:
    """HTML of one question: what was asked, the right answer, a line for each condition; `extras` (HTML) beside it."""
    body = ""
    for condition in [c for c in shown if isinstance(row.get(f"{c}_full"), str)]:
        verdict = judge_answer(row, condition)
        shade = "#e2f2e2" if verdict == "right" else "#fbe3e1"
        name = f'<span style="color:{COLORS[condition]}">\N{BLACK SQUARE}</span> {LABELS[condition]}'
        cells = (name, escape(row[f"{condition}_extracted"]), verdict, escape(row[f"{condition}_full"]))
        cells = "".join(f'<td style="text-align:left;color:black;background:{shade}">{cell}</td>' for cell in cells)
        body += f"<tr>{cells}</tr>"
    head = "".join(f'<th style="text-align:left">{name}</th>' for name in ("condition", "answer", "", "text"))
    question = f"<b>{escape(row['question'])}</b><br>{escape(describe_facts(row))}<br>"
    table = f"{question}right: {escape(row['gold_full_text'])}<table><tr>{head}</tr>{body}</table>"
    return f'<div style="display:flex;gap:2em;flex-wrap:wrap"><div>{table}</div><div>{extras}</div></div>'


def describe_facts(row: pd.Series) -> str:
    """`id units-test-00001, group source-only, ..., unit tonimur (its value: 34)`, as far as the row has it."""
    facts = row.reindex(FACTS).dropna().to_dict()
    facts |= {name: words(facts[name]) for name in ("group", "novelty") if name in facts}
    if {"unit", "value"} <= set(facts):
        facts["unit"] += f" (its value: {facts.pop('value'):g})"
    return ", ".join(f"{name} {fact}" for name, fact in facts.items())


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


# The example browser


def choose_rows(
    frame: pd.DataFrame, group: str = ANY, novelty: str = ANY, outcome: str = ANY, search: str = ""
) -> pd.DataFrame:
    """The questions of a group, a novelty of their unit, an outcome, and with `search` in unit, id or question."""
    if outcome != ANY:
        for condition in ("target", "bridged"):
            if f"{condition}_correct" not in frame:
                raise ValueError(f"{outcome}: no answers of condition '{condition}'; evaluate it first")
        right = frame[["target_correct", "bridged_correct"]].astype(bool).itertuples(index=False, name=None)
        frame = frame.assign(outcome=[OUTCOMES[pair] for pair in right])
    for column, value in {"group": group, "novelty": novelty, "outcome": outcome}.items():
        if value not in (present := list_values(frame, column)):
            raise ValueError(f"{column}: no '{value}' (there are: {', '.join(present)})")
        frame = frame if value == ANY else frame[frame[column] == value]
    texts = frame.reindex(columns=["unit", "id", "question"]).itertuples(index=False)
    return frame.loc[[search.lower() in "\n".join(map(str, row)).lower() for row in texts]]


def list_values(frame: pd.DataFrame, column: str) -> list[str]:
    """What a menu offers: `any`, then what is there."""
    there = frame[column].dropna().unique() if column in frame else ()
    return [ANY, *(OUTCOMES.values() if column == "outcome" else sorted(there))]


def count_rows(frame: pd.DataFrame) -> str:
    """How many questions each outcome has, in words, for under the browser."""
    counts = [f"{len(choose_rows(frame, outcome=outcome)):,} {outcome}" for outcome in OUTCOMES.values()]
    return f"{len(frame):,} problems: {', '.join(counts)}."


def browse_examples(frame: pd.DataFrame, extras: Callable[[str], str] | None = None) -> ipywidgets.VBox:
    """Menus, a search field and steps through the questions; `extras(id)` gives HTML beside a question.

    For example its message's nearest words, or its attention.
    """
    import ipywidgets as w

    names = ("group", "novelty", "outcome")
    menus = [w.Dropdown(options=[(words(v), v) for v in list_values(frame, n)], description=n) for n in names]
    search = w.Text(description="search", placeholder="unit, id or word", continuous_update=False)
    back, ahead = (
        w.Button(description="\N{LEFTWARDS ARROW} previous"),
        w.Button(description="next \N{RIGHTWARDS ARROW}"),
    )
    place = w.IntSlider(min=1, description="question", layout={"width": "28em"})
    of, shown = w.Label(), w.HTML()

    def show(change=None) -> None:
        found = choose_rows(frame, *(menu.value for menu in menus), search=search.value)
        place.max, of.value = max(len(found), 1), f"of {len(found):,}"
        shown.value = "No question is like that."
        if len(found):
            row = found.iloc[place.value - 1]
            shown.value = format_example(row, extras(row["id"]) if extras else "")

    def start(change) -> None:
        place.value = 1
        show()

    def step(button) -> None:
        place.value += 1 if button is ahead else -1  # no further than the slider goes

    for widget in (*menus, search):
        widget.observe(start, names="value")
    place.observe(show, names="value")
    back.on_click(step)
    ahead.on_click(step)
    show()
    return w.VBox([w.HBox([*menus, search]), w.HBox([back, ahead, place, of]), shown])
