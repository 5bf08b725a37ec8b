"""A run on real questions goes through, from files to a verdict that names what does not apply.

python -m pytest tests/train/test_real_questions.py
"""

import json

import pytest

from bridgekit.results import verdict
from bridgekit.runs import create_run, find_eval, load_eval, load_status
from bridgekit.train.worker import open_job, run_training

CONDITIONS = "source target bridged target_suffix shuffled relay_full relay_answer router union".split()


def gsm8k(i: int) -> dict:
    return {"question": f"{i} and {i % 7}?", "answer": f"#### {i + i % 7}"}


def math(i: int) -> dict:
    solution = f"It is\n\\[\\boxed{{\\frac{{{i}}}{{7}}}}.\\]"
    return {"problem": f"What is ${i}/7$?", "level": "Level 1", "type": "Algebra", "solution": solution}


def hotpotqa(i: int) -> dict:
    context = [[f"Ann {i}", [f"Ann {i} is old.", f" Her town is Bo{i % 7}."]], ["Other", ["It is another town."]]]
    facts = {"context": context, "supporting_facts": [[f"Ann {i}", 1]]}
    return {"question": f"Where is Ann {i}?", "answer": f"Bo{i % 7}", "_id": f"x{i}", "type": "bridge"} | facts


@pytest.mark.parametrize(
    ("task", "row", "options"),
    [
        ("gsm8k", gsm8k, {}),
        ("math", math, {"format_weight": 0.1}),
        ("hotpotqa", hotpotqa, {"variant": "context", "max_new_tokens": 8, "conditions": [*CONDITIONS, "target_told"]}),
    ],
)
def test_a_run_on_real_questions_goes_through(tiny, tmp_path, task, row, options):
    for name, first, n in (("train", 0, 40), ("test", 40, 12)):
        (tmp_path / f"{name}.json").write_text(json.dumps([row(i) for i in range(first, first + n)]))
    options = {"conditions": CONDITIONS} | options
    config = tiny(task=task, data=str(tmp_path), n_train=16, n_val=8, n_test=12, val_samples=8, n_shots=1, steps=2,
                  controls=["constant"], soft_position="question", **options)  # fmt: skip
    folder = create_run(config)
    run_training(open_job(folder))
    frame = load_eval(find_eval(folder))
    assert load_status(folder)["state"] == "finished" and len(frame) == 12
    answered = [c for c in config.eval.conditions if c != "union"]
    assert {f"{c}_correct" for c in answered} <= set(frame)
    assert [c for c in answered if f"{c}_f1" in frame] == (answered if task == "hotpotqa" else [])
    judged = verdict.judge([frame], seeds=[1])
    assert "the source-only part (this task has no knowledge groups)" in judged.not_applicable
    assert "self_bridge" in judged.not_run and "12 questions" in verdict.headroom(frame).text
