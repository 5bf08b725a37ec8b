"""Tables, transcripts and the browser say what the frames say, whatever characters a model has written.

python -m pytest tests/results/test_tables.py
"""

import html
import json
import re

import pytest

from bridgekit.config import CONDITIONS
from bridgekit.results import tables
from bridgekit.results.style import LABELS, markdown
from bridgekit.runs import load_eval


def test_conditions_as_a_table_in_the_usual_order(conditions):
    table = tables.tabulate_conditions(conditions)
    columns = ["condition", "all held-out problems (n = 2,000)", "source-only,\nheld-out units (n = 300)"]
    assert list(table.columns) == [*columns, "target-only (n = 920)", "both know it (n = 500)"]
    assert table["condition"].tolist() == [LABELS[c] for c in CONDITIONS]
    row = conditions.query("condition == 'bridged' and subset == 'target_only'").iloc[0]
    assert table.iloc[2, 3][:5] == f"{row['accuracy']:.3f}" and table.iloc[2, 3].count(",") == 1
    fewer = tables.tabulate_conditions(conditions.query("condition != 'router' or subset == 'all'"))
    assert "| router | 0." in markdown(fewer) and markdown(fewer).count("| \N{EN DASH} | \N{EN DASH} |") == 1
    with pytest.raises(ValueError, match="no subset 'held'"):
        tables.tabulate_conditions(conditions, ["held"])


# Answers


def example(i, group, novelty, target, bridged):
    gold = str(10 + i)
    answers = {"source": "0", "target": gold if target else "1", "bridged": gold if bridged else "2", "shuffled": "77"}
    texts = {f"{c}_full": f"so it is\n#### {answer}" for c, answer in answers.items()}
    texts |= {f"{c}_extracted": answer for c, answer in answers.items()}
    facts = {"id": f"q{i}", "group": group, "novelty": novelty, "unit": f"pim{i}", "value": 12, "donor_gold": "77"}
    return facts | texts | {"question": f"How many {i}?", "gold_full_text": f"#### {gold}", "gold_extracted": gold}


EXAMPLES = [
    example(0, "source_only", "held_unit", False, True),
    example(1, "source_only", "held_value", False, False),
    example(2, "target_only", "held_unit", True, False),
    example(3, "both", "held_unit", True, True),
    example(4, "source_only", "held_unit", False, True),
]


@pytest.fixture
def frame(tmp_path):
    path = tmp_path / "eval_samples_step_final.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    return load_eval(path)


def test_transcripts_show_one_gained_one_wrong_one_harmed_with_the_unit_s_value(frame):
    text = tables.format_transcripts(frame)
    found = [int(n) for n in re.findall(r"<b><code>How many (\d)", text)]
    assert found[0] in (0, 4) and found[1:] == [1, 2]
    assert "(2 of 5 problems)" in text and text.count("(1 of 5 problems)") == 2
    assert f"right: <code>#### 1{found[0]}</code>" in text and f"unit pim{found[0]} (its value: 12)" in text
    assert "<td" in text and "the donor's answer" in text and "group source-only" in text
    assert tables.format_transcripts(frame, n=6, seed=1) == tables.format_transcripts(frame, n=6, seed=1)
    assert len({tables.format_transcripts(frame, n=1, seed=seed) for seed in range(8)}) == 2
    missing = tables.format_transcripts(frame[frame["id"] != "q2"])
    assert "**Harmed: target alone is right, bridged is wrong.** None of 4 problems." in missing


def test_transcripts_do_without_shuffled_but_not_without_the_bridge(frame):
    plain = frame.drop(columns=["shuffled_full", "shuffled_extracted", "shuffled_correct"])
    assert "shuffled" not in tables.format_transcripts(plain)
    for bad, n, message in (
        (frame.drop(columns="bridged_correct"), 3, "no answers of condition 'bridged'"),
        (frame.head(0), 3, "0 rows"),
        (frame, 0, "n = 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tables.format_transcripts(bad, n)


def test_no_answer_can_become_markup_in_a_table_or_a_page(frame):
    nasty = "costs $5 | and *then* `$6`\n<script>_x_</script> [a](b) \\$ ~~ </table>"
    frame.loc[0, "bridged_full"] = frame.loc[0, "question"] = nasty
    for text in (tables.format_transcripts(frame.head(1)), tables.format_example(frame.iloc[0])):
        cells = re.findall(r"<code>(.*?)</code>", text)
        assert [html.unescape(cell.replace("<br>", "\n")) for cell in cells].count(nasty) == 2
        assert "<script>" not in text and text.count("</table>") == 1
        assert not any(set("|$*_`~[]\\") & set(cell) for cell in cells)


def test_an_example_shows_every_condition_once_right_and_wrong_in_colour(frame):
    page = tables.format_example(frame.iloc[0], extras="<i>nearest words</i>")
    for name in ("source alone", "target alone", "bridged", "shuffled source"):
        assert page.count(f"> {name}<") == 1
    assert [page.count(f">{v}<") for v in ("right", "wrong", "the donor's answer")] == [1, 2, 1]
    assert page.count("#e2f2e2") == 4 and page.count("#fbe3e1") == 12  # four cells a row
    assert "(its value: 12)" in page and "<i>nearest words</i>" in page and "held-out units" in page
    assert "bridged" in tables.format_example(frame.drop(columns=["group", "novelty"]).iloc[0])


def test_filters_leave_what_they_name(frame):
    def ids(**wanted):
        return list(tables.choose_rows(frame, **wanted)["id"])

    assert ids() == ["q0", "q1", "q2", "q3", "q4"] and ids(outcome="gained") == ["q0", "q4"]
    assert ids(group="source_only", novelty="held_value", outcome="wrong both ways") == ["q1"]
    assert (
        ids(group="both", outcome="harmed") == [] and ids(search="PIM3") == ["q3"] and ids(search="many 1?") == ["q1"]
    )
    assert tables.count_rows(frame) == "5 problems: 2 gained, 1 harmed, 1 right both ways, 1 wrong both ways."
    for name, value in dict(group="nobody", novelty="new", outcome="won").items():
        with pytest.raises(ValueError, match=f"{name}: no '{value}'"):
            tables.choose_rows(frame, **{name: value})
    assert tables.list_values(frame.drop(columns="group"), "group") == [tables.ANY]


def test_the_browser_steps_searches_and_filters(frame):
    box = tables.browse_examples(frame, extras=lambda name: f"<i>inside {name}</i>")
    (group, novelty, outcome, search), (back, ahead, place, of) = (row.children for row in box.children[:2])
    shown = box.children[2]
    assert "How many 0?" in shown.value and "<i>inside q0</i>" in shown.value and of.value == "of 5"
    ahead.click(), ahead.click()
    assert "How many 2?" in shown.value and place.value == 3
    back.click()
    assert "How many 1?" in shown.value
    outcome.value = "gained"
    assert "How many 0?" in shown.value and (place.value, place.max, of.value) == (1, 2, "of 2")
    ahead.click(), ahead.click(), ahead.click()  # no further than the last
    assert "How many 4?" in shown.value
    search.value = "pim0"
    assert "How many 0?" in shown.value and of.value == "of 1"
    novelty.value = "held_value"
    assert shown.value == "No question is like that."
    search.value, novelty.value, outcome.value = "", tables.ANY, tables.ANY
    names = [label for label, _ in group.options]
    assert of.value == "of 5" and names == ["any", "both know it", "source-only", "target-only"]
