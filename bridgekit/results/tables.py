"""Tables, transcripts and the example browser: a run's answers as text, for notebooks, README and paper.

    Markdown(markdown(tabulate_conditions(table), strong="bridged"))
    Markdown(format_transcripts(frame, n=3, seed=0))
    browse_examples(frame, extras)            # in JupyterLab: step through, search, filter
    HTML(format_example(frame.iloc[0]))       # one example, also where nobody can click

They work from the evaluation JSONL alone. Whatever a model has written is escaped. ipywidgets is imported only where
the browser is built.
"""

from __future__ import annotations

import html
import random
import typing
from collections.abc import Callable, Sequence

from bridgekit.config import CONDITIONS
from bridgekit.results.plots import as_points, check_conditions
from bridgekit.results.style import COLORS, LABELS, format_interval, format_share, format_size, words

if typing.TYPE_CHECKING:
    import ipywidgets
    import pandas as pd

TABLE_SUBSETS = ("all", "source_only_held_unit", "target_only", "both")
SIDE_BY_SIDE = ("source", "target", "bridged", "shuffled")
FACTS = ("id", "group", "novelty", "unit", "value", "family", "donor_id")
ANY = "any"
OUTCOMES = {  # (target alone, bridged) right?
    "gained": (False, True),
    "harmed": (True, False),
    "right both ways": (True, True),
    "wrong both ways": (False, False),
}


# Tables


def tabulate_conditions(table: pd.DataFrame, subsets: Sequence[str] = ()) -> pd.DataFrame:
    """Accuracy with its interval as text: a row for each condition, a column for each subset of `conditions_table`.

    Without `subsets`: the mix, the held-out source-only problems and the other groups, as far as there.
    """
    import pandas as pd

    table = as_points(table, "accuracy")
    check_conditions((), table["condition"], "conditions table")
    present = set(table["subset"])
    for subset in subsets:
        if subset not in present:
            raise ValueError(f"conditions table: no subset '{subset}' (there are: {', '.join(sorted(present))})")
    cells = {(row.subset, row.condition): format_interval(row.point, row.low, row.high) for row in table.itertuples()}
    columns = {"condition": [c for c in CONDITIONS if c in set(table["condition"])]}
    for subset in subsets or [s for s in TABLE_SUBSETS if s in present] or sorted(present):
        size = format_size(table[table["subset"] == subset]).split(" on ")[0]
        columns[f"{words(subset)} ({size})"] = [cells.get((subset, c)) for c in columns["condition"]]
    return pd.DataFrame(columns).replace({"condition": LABELS})


def tabulate_variants(frame: pd.DataFrame) -> pd.DataFrame:
    """The table of a study as text: a row for each variant, for each subset accuracy, difference and smallest effect.

    `frame` has a row for each variant and subset; the reference has no difference. A column `label` names variants.
    """
    import pandas as pd

    frame = as_points(frame, "accuracy")
    rows = {}
    for row in frame.to_dict("records"):
        of, costs = row.get("replicates"), {"parameters": row.get("parameters"), "seconds": row.get("seconds")}
        name = row.get("label", words(row["variant"])) + (f" (again {words(of)})" if isinstance(of, str) and of else "")
        costs = {key: f"{cost:,.0f}" if cost is not None and cost == cost else "" for key, cost in costs.items()}
        text = rows.setdefault(row["variant"], {"variant": name, "seeds": str(row["n_seeds"]), **costs})
        subset = words(row["subset"]).replace("\n", " ")
        size = format_size(frame[frame["subset"] == row["subset"]])
        text[f"{subset} ({size})"] = format_interval(row["point"], row["low"], row["high"])
        change, smallest = "reference" if row.get("reference", row["variant"]) == row["variant"] else None, None
        if row["difference"] == row["difference"]:
            p = "<0.001" if row["adjusted_p"] < 0.001 else f"{row['adjusted_p']:.2g}"
            change = [row[column] for column in ("difference", "difference_low", "difference_high")]
            change = f"{format_interval(*change, signed=True)}, {p}{'*' if row['holds'] else ''}"
            smallest = format_share(row["smallest_effect"])
        text |= {f"{subset}: difference, Holm's p (* differs)": change, f"{subset}: could be found from": smallest}
    return pd.DataFrame(rows.values())


# Transcripts


def format_transcripts(frame: pd.DataFrame, n: int = 3, seed: int = 0) -> str:
    """Markdown of `n` examples drawn by `seed`: in turn one gained, one still wrong, one harmed.

    Where there was none of a kind the text says so, so that nobody takes silence for success.
    """
    if n < 1 or frame.empty:
        raise ValueError(f"transcripts: n must be at least 1 and there must be rows, got n = {n}, {len(frame)} rows")
    shown = [c for c in SIDE_BY_SIDE if f"{c}_full" in frame]
    check_conditions(["target", "bridged"], shown, "transcripts")
    titles = {
        "gained": "Gained: target alone is wrong, bridged is right",
        "wrong both ways": "Still wrong: neither target alone nor bridged is right",
        "harmed": "Harmed: target alone is right, bridged is wrong",
    }
    generator, parts = random.Random(seed), []
    for turn, (outcome, title) in enumerate(titles.items()):
        rows, wanted = choose_rows(frame, outcome=outcome), len(range(turn, n, len(titles)))
        picked = sorted(generator.sample(range(len(rows)), min(wanted, len(rows))))
        if wanted and not picked:
            parts.append(f"**{title}.** None of {len(frame):,} problems.\n")
        for i in picked:
            head = f"**{title}** ({len(rows):,} of {len(frame):,} problems).\n\n"
            parts.append(head + _transcript(rows.iloc[i], shown))
    return "\n".join(parts)


def _transcript(row: pd.Series, shown: list[str]) -> str:
    """Question and right answer, then a column for each condition: its text and what was read from it."""
    cells = [LABELS[c] for c in shown], ["---"] * len(shown), [escape(row[f"{c}_full"]) for c in shown]
    answers = [f"{escape(row[f'{c}_extracted'])} {judge_answer(row, c)}" for c in shown]
    facts = f"Right answer: {escape(row['gold_extracted'])} {escape(describe_facts(row))}"
    lines = "".join(f"| {' | '.join(line)} |\n" for line in (*cells, answers))
    return f"Question: {escape(row['question'])}  \n{facts}\n\n{lines}"


def describe_facts(row: pd.Series) -> str:
    """`id units-test-00001, group source-only, ..., unit tonimur (its value: 34)`, as far as the row has it."""
    facts = {name: row[name] for name in FACTS if name in row and row[name] == row[name] and row[name] is not None}
    value = facts.pop("value", None)
    value = (
        "" if value is None else f" (its value: {value:g})" if isinstance(value, float) else f" (its value: {value})"
    )
    texts = {name: words(fact) if name in ("group", "novelty") else str(fact) for name, fact in facts.items()}
    return ", ".join(f"{name} {text}{value if name == 'unit' else ''}" for name, text in texts.items())


def judge_answer(row: pd.Series, condition: str) -> str:
    """right | wrong | the donor's answer: what a condition's answer is."""
    if bool(row[f"{condition}_correct"]):
        return "right"
    donor = row.get("donor_gold")
    if condition != "shuffled" or donor is None or donor != donor:
        return "wrong"
    return "the donor's answer" if row["shuffled_extracted"] == donor else f"wrong (the donor's is {donor})"


def escape(text: object) -> str:
    """Verbatim text that ends no cell, starts no tag, emphasis or formula, in HTML as in Markdown."""
    text = html.escape(str(text).strip(), quote=False)
    for mark in "|$*_`~[]\\":
        text = text.replace(mark, f"&#{ord(mark)};")
    return "<code>" + "<br>".join(text.splitlines()) + "</code>"


# The example browser


def choose_rows(
    frame: pd.DataFrame, group: str = ANY, novelty: str = ANY, outcome: str = ANY, search: str = ""
) -> pd.DataFrame:
    """The questions of a group, a novelty of their unit, an outcome, and with `search` in unit, id or question."""
    for column, value in (("group", group), ("novelty", novelty)):
        if value not in (present := list_values(frame, column)):
            raise ValueError(f"{column}: no '{value}' (there are: {', '.join(present)})")
        frame = frame if value == ANY else frame[frame[column] == value]
    if outcome not in (ANY, *OUTCOMES):
        raise ValueError(f"outcome: no '{outcome}' (there are: {ANY}, {', '.join(OUTCOMES)})")
    if outcome != ANY:
        target, bridged = OUTCOMES[outcome]
        right = frame["target_correct"].astype(bool), frame["bridged_correct"].astype(bool)
        frame = frame[(right[0] == target) & (right[1] == bridged)]
    found = [
        frame[c].astype(str).str.contains(search, case=False, regex=False)
        for c in ("unit", "id", "question")
        if c in frame
    ]
    return frame[sum(found).astype(bool)] if search and found else frame


def list_values(frame: pd.DataFrame, column: str) -> list[str]:
    """What a menu offers: `any`, then what is there."""
    return [ANY, *(sorted(frame[column].dropna().unique()) if column in frame else [])]


def count_rows(frame: pd.DataFrame) -> str:
    """How many questions each outcome has, in words, for under the browser."""
    n = {outcome: len(choose_rows(frame, outcome=outcome)) for outcome in OUTCOMES}
    return f"{len(frame):,} problems: " + ", ".join(f"{count:,} {outcome}" for outcome, count in n.items()) + "."


def format_example(row: pd.Series, extras: str = "") -> str:
    """HTML of one question: what was asked, the right answer, a line for each condition; `extras` (HTML) beside it."""
    body = ""
    for condition in [c for c in CONDITIONS if isinstance(row.get(f"{c}_full"), str)]:
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


def browse_examples(frame: pd.DataFrame, extras: Callable[[str], str] | None = None) -> ipywidgets.VBox:
    """Menus, a search field and steps through the questions; `extras(id)` gives HTML beside a question.

    For example its message's nearest words, or its attention.
    """
    import ipywidgets as w

    menus = {}
    for name, values in {"group": None, "novelty": None, "outcome": [ANY, *OUTCOMES]}.items():
        options = [(words(value), value) for value in values or list_values(frame, name)]
        menus[name] = w.Dropdown(options=options, description=name)
    search = w.Text(description="search", placeholder="unit, id or word", continuous_update=False)
    back, ahead = (
        w.Button(description="\N{LEFTWARDS ARROW} previous"),
        w.Button(description="next \N{RIGHTWARDS ARROW}"),
    )
    place, shown = w.IntSlider(min=1, description="question", layout={"width": "28em"}), w.HTML()
    of, found = w.Label(), [frame]

    def show(change=None) -> None:
        row = found[0].iloc[place.value - 1] if len(found[0]) else None
        beside = extras(row["id"]) if extras and row is not None else ""
        shown.value = "No question is like that." if row is None else format_example(row, beside)

    def choose(change=None) -> None:
        found[0] = choose_rows(frame, **{name: menu.value for name, menu in menus.items()}, search=search.value)
        place.max, of.value = max(len(found[0]), 1), f"of {len(found[0]):,}"
        place.value = 1
        show()

    def step(by: int) -> None:
        place.value = min(max(place.value + by, 1), place.max)

    for widget in (*menus.values(), search):
        widget.observe(choose, names="value")
    place.observe(show, names="value")
    back.on_click(lambda button: step(-1))
    ahead.on_click(lambda button: step(1))
    choose()
    return w.VBox([w.HBox([*menus.values(), search]), w.HBox([back, ahead, place, of]), shown])
