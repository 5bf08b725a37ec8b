"""Tables and transcripts say what the frames say, whatever characters a model has written."""

import html
import re

import pandas as pd
import pytest
from figure_frames import conditions_table

from bridgekit.config import CONDITIONS
from bridgekit.results.figures_text import format_table, format_transcripts
from bridgekit.results.style import LABELS


def markdown_rows(text):
    return [[cell.strip() for cell in line.strip("|\n").split("|")] for line in text.splitlines()]


def test_table_has_every_condition_in_order_and_marks_the_bridge():
    head, _, *body = markdown_rows(format_table(conditions_table()))
    assert head == [
        "condition",
        "all held-out problems (n = 2,000)",
        "source-only, held-out units (n = 300)",
        "target-only (n = 920)",
        "both know it (n = 500)",
    ]
    assert [row[0].strip("*") for row in body] == [LABELS[c] for c in CONDITIONS]
    row = conditions_table().query("condition == 'bridged' and subset == 'source_only_held_unit'").iloc[0]
    assert body[2][2] == f"**{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]**"
    assert "**" not in "".join(body[0])


def test_table_in_percent_and_in_latex():
    table = conditions_table()
    row = table.query("condition == 'target' and subset == 'all'").iloc[0]
    cell = f"{100 * row['accuracy']:.1f} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"
    latex = format_table(table, style="latex", subsets=["all", "source_only_held_unit"], percent=True)
    latex = latex.splitlines()
    assert latex[:2] == [r"\begin{tabular}{lrr}", r"\toprule"] and latex[-1] == r"\end{tabular}"
    assert latex[2] == r" &  & source-only, \\" and latex[3] == r" & all held-out problems & held-out units \\"
    assert latex[4] == r"condition & (n = 2,000) & (n = 300) \\" and latex[7].startswith(f"target alone & {cell} & ")
    assert latex[8].startswith(r"\textbf{bridged} & \textbf{")


def test_table_shows_a_dash_where_a_condition_was_not_evaluated_on_a_subset():
    table = conditions_table().query("condition != 'router' or subset == 'all'")
    (row,) = [row for row in markdown_rows(format_table(table)) if row[0] == "router"]
    assert row[1][:2] == "0." and row[2:] == ["\N{EN DASH}"] * 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: format_table(t, style="html"), "style: must be markdown or latex"),
        (lambda t: format_table(t, subsets=["held"]), "no subset 'held'"),
        (lambda t: format_table(t.head(0)), "no rows"),
        (lambda t: format_table(t.assign(accuracy=float("nan"))), "is not a number"),
        (lambda t: format_table(t.drop(columns="n")), "no column 'n'"),
        (
            lambda t: format_table(t.replace({"condition": {"bridged": "bridge"}})),
            "'bridge' is not a condition",
        ),
    ],
)
def test_table_refuses_what_it_cannot_say(change, message):
    with pytest.raises(ValueError, match=message) as error:
        change(conditions_table())
    assert "\n" not in str(error.value)


def evaluation():
    """20 problems: 6 gained, 5 right for both, 5 wrong for both, 4 harmed."""
    target = [False] * 6 + [True] * 5 + [False] * 5 + [True] * 4
    bridged = [True] * 11 + [False] * 9
    rows = []
    for i, (t, b) in enumerate(zip(target, bridged, strict=True)):
        row = {
            "index": i,
            "id": f"p{i}",
            "question": f"Hal has {i} sisak of pins. How many pins?",
            "donor_gold": "7",
        }
        row |= {
            "gold_extracted": str(i * 15),
            "group": "source_only",
            "unit": "sisak",
            "novelty": "held_unit",
        }
        for name, right in {"source": True, "target": t, "bridged": b, "shuffled": False}.items():
            said = str(i * 15) if right else ("7" if name == "shuffled" and i % 2 else "1")
            row |= {f"{name}_full": f"{name} <<{i}*15={said}>>{said}\n#### {said}"}
            row |= {f"{name}_extracted": said, f"{name}_correct": right}
        rows.append(row)
    return pd.DataFrame(rows)


def questions(text):
    return [int(n) for n in re.findall(r"Question: <code>Hal has (\d+) sisak", text)]


def test_transcripts_show_one_gained_one_wrong_one_harmed():
    text = format_transcripts(evaluation())
    gained, wrong, harmed = questions(text)
    assert gained < 6 and 11 <= wrong < 16 and 16 <= harmed
    assert text.count("(6 of 20 problems)") == text.count("(5 of 20 problems)") == text.count("(4 of 20 problems)") == 1
    assert "| source alone | target alone | bridged | shuffled source |" in text
    assert "group source&#95;only" in text and f"Gold answer: <code>{gained * 15}</code>" in text
    first = text.split("**Still wrong")[0]
    assert "<code>" + str(gained * 15) + "</code> right" in first and "<code>1</code> wrong" in first


def test_transcripts_are_drawn_by_seed_in_equal_parts():
    assert format_transcripts(evaluation(), seed=3) == format_transcripts(evaluation(), seed=3)
    assert len({format_transcripts(evaluation(), seed=seed) for seed in range(8)}) > 1
    six = questions(format_transcripts(evaluation(), n=6))
    assert (
        len(set(six)) == 6
        and [sum(q in part for q in six) for part in (range(6), range(11, 16), range(16, 20))] == [2] * 3
    )
    assert len(questions(format_transcripts(evaluation(), n=1))) == 1


def test_transcripts_say_when_nothing_was_harmed():
    text = format_transcripts(evaluation().query("index < 16"))
    assert len(questions(text)) == 2
    assert "**Harmed: target alone is right, bridged is wrong.** None of 16 problems." in text


def test_transcripts_say_when_the_shuffled_answer_is_the_donors():
    frame = evaluation()
    odd, even = (format_transcripts(frame[frame["index"].isin([i])]) for i in (1, 2))
    assert "<code>7</code> the donor's answer" in odd and "<code>1</code> wrong (the donor's is 7)" in even


def test_transcripts_keep_any_text_inside_its_cell():
    frame = evaluation().head(1)
    nasty = "costs $5 | and *then* `$6`\n<b>_x_</b> [a](b) \\$ ~~"
    frame["bridged_full"] = nasty
    text = format_transcripts(frame)
    (line,) = [line for line in text.splitlines() if "costs" in line]
    assert line.count("|") == 5 and not set("$*_`~[]\\") & set(line)
    cell = re.findall(r"<code>(.*?)</code>", line)[2]
    assert html.unescape(cell.replace("<br>", "\n")) == nasty


def test_transcripts_do_without_shuffled_but_not_without_the_bridge():
    frame = evaluation().drop(columns=["shuffled_full", "shuffled_extracted", "shuffled_correct"])
    assert "shuffled" not in format_transcripts(frame)
    for bad, message in (
        (lambda: format_transcripts(frame.drop(columns="bridged_full")), "no rows for condition 'bridged'"),
        (lambda: format_transcripts(frame.head(0)), "no rows"),
        (lambda: format_transcripts(frame, n=0), "n: must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            bad()
