"""Single examples and the browser say what the frames say, whatever characters a model has written.

python -m pytest tests/results/test_tables.py
"""

import html
import json
import re

import pytest

from bridgekit.results import tables
from bridgekit.runs import load_eval


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
]


@pytest.fixture
def frame(tmp_path):
    path = tmp_path / "eval_samples_step_final.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    return load_eval(path)


def test_no_answer_can_become_markup_in_a_page(frame):
    nasty = "costs $5 | and *then* `$6`\n<script>_x_</script> [a](b) \\$ ~~ </table>"
    frame.loc[0, "bridged_full"] = frame.loc[0, "question"] = frame.loc[0, "donor_gold"] = nasty
    frame.loc[0, ["shuffled_extracted", "shuffled_correct"]] = "another", False
    text = tables.format_example(frame.iloc[0])
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
    assert "unit pim0, value 12" in page and "<i>nearest words</i>" in page and "held-out units" in page
    assert "shuffled" not in tables.format_example(frame.iloc[0], shown=("source", "bridged"))


def test_the_browser_steps_searches_and_filters(frame):
    assert list(tables.find_outcomes(frame)) == ["gained", "wrong both ways", "harmed", "right both ways"]
    box = tables.browse_examples(frame, extras=lambda name: f"<i>inside {name}</i>")
    question, search, group, _, outcome, _ = box.children
    assert "question 1 of 4" in box.result.data and "<i>inside q0</i>" in box.result.data
    question.value = 3
    assert "How many 2?" in box.result.data
    group.value = "source_only"
    assert "question 2 of 2" in box.result.data and "How many 1?" in box.result.data
    search.value = "PIM0"
    assert "question 1 of 1" in box.result.data and "How many 0?" in box.result.data
    outcome.value = "harmed"
    assert box.result.data == "No question is like that."
    assert [label for label, _ in group.options] == ["any", "both know it", "source-only", "target-only"]
