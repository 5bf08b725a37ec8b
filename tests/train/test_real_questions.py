"""A run on real questions goes through to a verdict that names what does not apply.

python -m pytest tests/train/test_real_questions.py
"""

import json

from bridgekit.results import verdict
from bridgekit.runs import create_run, find_eval, load_eval, load_status
from bridgekit.train.worker import open_job, run_training

CONDITIONS = ("source", "target", "bridged", "target_suffix", "shuffled", "relay_full", "router", "union")


def test_a_run_on_real_questions_goes_through(tiny, tmp_path):
    for name, first, n in (("train", 0, 40), ("test", 40, 12)):
        rows = [{"question": f"{i} and {i % 7}?", "answer": f"#### {i + i % 7}"} for i in range(first, first + n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = tiny(task="gsm8k", data=str(tmp_path), n_train=16, n_val=8, n_test=12, val_samples=8, n_shots=1, steps=2,
                  controls=["constant"], conditions=list(CONDITIONS), soft_position="question")  # fmt: skip
    folder = create_run(config)
    run_training(open_job(folder))
    frame = load_eval(find_eval(folder))
    assert load_status(folder)["state"] == "finished" and len(frame) == 12
    assert {f"{c}_correct" for c in CONDITIONS if c != "union"} <= set(frame)
    judged = verdict.judge([frame], seeds=[1])
    assert "the source-only part (this task has no knowledge groups)" in judged.not_applicable
    assert "self_bridge" in judged.not_run and "12 questions" in verdict.headroom(frame).text
