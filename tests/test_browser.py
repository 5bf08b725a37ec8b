"""The example browser: its filters count right, its text cannot break the page, its menus do what they say.

python -m pytest tests/test_browser.py
"""

import json

import pytest

from bridgekit.results import browser
from bridgekit.runs import load_eval


def row(i, group, novelty, target, bridged, **more):
    gold = str(10 + i)
    said = {"source": "0", "target": gold if target else "1", "bridged": gold if bridged else "2", "shuffled": "77"}
    texts = {f"{c}_full": f"so it is\n#### {a}" for c, a in said.items()} | {
        f"{c}_extracted": a for c, a in said.items()
    }
    facts = {"group": group, "novelty": novelty, "unit": "pim", "value": 12, "donor_gold": "77"}
    asked = {"id": f"q{i}", "question": f"How many {i}?", "gold_full_text": f"#### {gold}", "gold_extracted": gold}
    return asked | facts | texts | more


ROWS = [
    row(0, "source_only", "held_unit", False, True),
    row(1, "source_only", "held_value", False, False),
    row(2, "target_only", "held_unit", True, False),
    row(3, "both", "held_unit", True, True),
    row(4, "source_only", "held_unit", False, True),
]


@pytest.fixture
def frame(tmp_path):
    path = tmp_path / "eval_samples_step_final.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return load_eval(path)


def ids(rows) -> list[str]:
    return list(rows["id"])


def test_filters_leave_what_they_name(frame):
    assert ids(browser.choose_rows(frame)) == ["q0", "q1", "q2", "q3", "q4"]
    assert ids(browser.choose_rows(frame, outcome="gained")) == ["q0", "q4"]
    assert ids(browser.choose_rows(frame, outcome="harmed")) == ["q2"]
    assert ids(browser.choose_rows(frame, "source_only", "held_value", "wrong both ways")) == ["q1"]
    assert browser.choose_rows(frame, "both", outcome="harmed").empty
    assert browser.count_rows(frame) == (
        "5 problems: 2 gained, 1 harmed, 1 right both ways, 1 wrong both ways."
    )  # fmt: skip


@pytest.mark.parametrize("wrong", [dict(group="nobody"), dict(novelty="new"), dict(outcome="won")])
def test_a_filter_that_does_not_exist_is_named(frame, wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name}: no '{value}'"):
        browser.choose_rows(frame, **wrong)


def test_an_example_shows_every_condition_once_and_who_followed_the_donor(frame):
    text = browser.format_example(frame.iloc[0])
    for name in ("source alone", "target alone", "bridged", "shuffled source"):
        assert text.count(f">{name}<") == 1
    assert [text.count(f">{v}<") for v in ("right", "wrong", "the donor's answer")] == [1, 2, 1]
    assert "so it is<br>#### 10" in text and "unit pim, value 12" in text


def test_nothing_an_answer_says_can_become_markup(frame):
    hostile = frame.iloc[0].copy()
    hostile["bridged_full"] = "<script>alert(1)</script> $x$ | </table>"
    hostile["question"] = "<img src=x> costs $3 and $4?"
    text = browser.format_example(hostile)
    assert "<script>" not in text and "<img" not in text and text.count("</table>") == 1
    assert "$3" not in text  # a dollar would start a formula


def test_a_run_without_groups_can_be_browsed_too(frame):
    plain = frame.drop(columns=["group", "novelty"])
    assert browser.list_values(plain, "group") == [browser.ANY]
    assert "bridged" in browser.format_example(plain.iloc[0])


def test_menus_and_slider_change_what_is_shown(frame):
    box = browser.browse_examples(frame)
    (group, novelty, outcome, place), shown = box.children[0].children, box.children[1]
    assert "How many 0?" in shown.value and place.max == 5
    place.value = 3
    assert "How many 2?" in shown.value
    outcome.value = "gained"
    assert "How many 0?" in shown.value and (place.value, place.max, place.description) == (1, 2, "of 2")
    place.value = 2
    assert "How many 4?" in shown.value
    novelty.value = "held_value"
    assert shown.value == "No question is like that."
    outcome.value = browser.ANY
    assert "How many 1?" in shown.value and place.max == 1
    group.value = "both"
    assert shown.value == "No question is like that."
    novelty.value = group.value = browser.ANY
    assert place.max == 5
