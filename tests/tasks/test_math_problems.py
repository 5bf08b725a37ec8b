r"""MATH: the last box is the answer, math-verify compares, and no answer takes longer than its time.

    python -m pytest tests/tasks/test_math_problems.py

pairs/math.json holds (text, gold answer, is it right?), judged by hand; math-verify agrees on each.
"""

import json
import time
from pathlib import Path

import pytest
from conftest import refused

from bridgekit.tasks import check_inputs, equivalence, get_task, load_examples
from bridgekit.tasks.math_problems import TASK

PAIRS = json.loads((Path(__file__).parent / "pairs/math.json").read_text())


def problem(i: int) -> dict:
    worked = f"Half of it is\n\\[\\frac{{{i}}}{{2}},\\]\nso it is $\\boxed{{\\frac{{{i}}}{{2}}}}$."
    return {"problem": f"What is half of ${i}$?", "solution": worked, "level": "Level 2", "type": "Algebra"}


@pytest.fixture
def real(ask_real):
    return ask_real("math", problem)


def test_pairs_are_scored_as_they_were_judged():
    assert len(PAIRS) >= 200 and 0.4 < sum(right for *_, right in PAIRS) / len(PAIRS) < 0.6
    wrong = [(text, gold) for text, gold, right in PAIRS if TASK.is_right(TASK.extract(text), gold) != right]
    assert not wrong


def test_an_answer_without_end_is_invalid_in_time_and_the_next_one_is_scored():
    assert TASK.is_right(TASK.extract("$\\boxed{2^{3}}$"), "8")  # the worker is there
    for endless in ("9^{9^{9^9}}", "\\binom{10^{12}}{10^{11}}", "1" * 600):
        for read in (equivalence.is_readable, equivalence.are_equal):
            read.cache_clear()
        begun = time.process_time(), time.monotonic()
        assert TASK.extract(f"$\\boxed{{{endless}}}$") == "[invalid]"
        assert not equivalence.are_equal("5", endless)
        assert time.process_time() - begun[0] < 1 and time.monotonic() - begun[1] < 60
    assert TASK.is_right(TASK.extract("$\\boxed{\\frac{16}{2}}$"), "8")


def test_a_worker_that_cannot_start_is_no_wrong_answer(monkeypatch):
    monkeypatch.setattr(equivalence, "__file__", "/nowhere/equivalence.py")
    with pytest.raises(RuntimeError, match="task math: its answers cannot be compared .*: pip install math-verify"):
        equivalence.Worker().ask("5")


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        ("$\\boxed{5}", True),
        ("$\\boxed{\\frac{1}{2}", False),
        ("\\boxed{}", False),
        ("\\boxed 1", False),
        ("\\boxed 1$", True),
    ],
)
def test_an_answer_is_complete_when_its_box_is_closed(text, complete):
    assert TASK.is_complete(text) == complete


def test_rows_become_examples_in_their_own_format(real):
    check_inputs(real(n_shots=2))
    for e in load_examples(real(n_shots=2), None, "test"):
        assert e.solution.count("\n") == 2 and e.gold.startswith("\\frac") and e.id.startswith("math-test-")
        assert TASK.extract(e.solution) == e.gold == TASK.extract(TASK.write(e.gold)) and e.shots.count("\\boxed") == 2
        assert e.solution.rfind(TASK.marker) > 0 and not get_task(real()).has_groups


def test_a_bad_file_is_named_with_its_rows(real, data):
    rows = [problem(1), problem(2) | {"solution": "It is 1."}, {"question": "How many?", "answer": "#### 3"}]
    data("train", rows)
    said = r"train.jsonl, row 2: no final answer in its `solution`, such as `\boxed{12}`; row 3: needs texts `problem`"
    assert said in refused(check_inputs, real())
    assert "task.data: task math needs a folder" in refused(real, data="")
