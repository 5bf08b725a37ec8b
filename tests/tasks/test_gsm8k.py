"""Real questions: read from a folder, nothing in two splits, what they cannot have is refused.

python -m pytest tests/tasks/test_gsm8k.py
"""

import json
from pathlib import Path

import pytest

from bridgekit.config import ConfigError
from bridgekit.tasks import CUE, check_inputs, get_task, literal_prompt, load_examples, relay_prompt, source_prompt
from bridgekit.tasks.real import fetch, main

CONDITIONS = ("source", "target", "bridged", "shuffled", "relay_full")
N_TRAIN, N_TEST = 40, 12


def question(i: int) -> dict:
    more = i % 7
    answer = f"Ann has {i}+{more}=<<{i}+{more}={i + more}>>{i + more} pens.\n#### {i + more}"
    return {"question": f"Ann has {i} pens and buys {more} more. How many pens?", "answer": answer}


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path) -> Path:
    """A folder in the data set's format; the last training question stands in the test file as well."""
    write(tmp_path / "data" / "train.jsonl", [question(i) for i in range(N_TRAIN)])
    write(tmp_path / "data" / "test.jsonl", [question(i) for i in range(N_TRAIN - 1, N_TRAIN - 1 + N_TEST)])
    return tmp_path / "data"


@pytest.fixture
def real(tiny, data):
    def make(**changes):
        own = {"task": "gsm8k", "data": str(data), "n_train": 16, "n_val": 8, "n_test": 12, "val_samples": 8,
               "controls": ["constant"], "conditions": list(CONDITIONS)}  # fmt: skip
        return tiny(**(own | changes))

    return make


def test_no_question_is_in_two_splits_and_the_order_is_the_seed_s(real):
    config = real(n_shots=3)
    splits = {name: load_examples(config, None, name) for name in ("train", "val", "test")}
    assert [len(splits[name]) for name in splits] == [16, 8, 12]
    asked = [e.question for some in splits.values() for e in some]
    shown = splits["test"][0].shots
    assert len(set(asked)) == len(asked) and not any(f"Question: {q}{CUE}" in shown for q in asked)
    assert {e.shots for some in splits.values() for e in some} == {shown} and shown.count(CUE) == 3
    assert [e.id for e in splits["test"]] == [f"gsm8k-test-{i:05d}" for i in range(1, 13)]
    assert [e.id for e in splits["train"]] != [e.id for e in load_examples(real(data_seed=2), None, "train")][:16]
    everything = {e.question for e in load_examples(real(n_train=31, n_shots=0), None, "train")}
    assert question(N_TRAIN - 1)["question"] not in everything  # it is in the test file


def test_prompts_have_the_solved_questions_in_front_and_donors_another_answer(real):
    examples = {e.id: e for e in load_examples(real(n_shots=2), None, "test")}
    for e in examples.values():
        for prompt in (literal_prompt(e), source_prompt(e), relay_prompt(e, "It is\n7.")):
            assert prompt.prefix.startswith(e.shots) and prompt.question == f"Question: {e.question}"
        assert relay_prompt(e, "It is\n7.").prefix == f"{e.shots}Helper: It is 7.\n"
        assert examples[e.donor_id].gold != e.gold and e.donor_gold is None


def test_what_real_questions_cannot_have_is_refused(real):
    for changes, named in (
        ({"source_only_share": 0.5}, "task.source_only_share"),
        ({"train_units_share": 0.5}, "task.train_units_share"),
        ({"conditions": ["source", "target", "bridged", "target_told"]}, "eval.conditions: 'target_told'"),
        ({"controls": ["constant_natural"]}, "train.controls: 'constant_natural'"),
        ({"task": "units", "n_shots": 2}, "task.n_shots: .*leave it at 0"),
    ):
        with pytest.raises(ConfigError, match=named):
            real(**changes)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 1,200", "1200"), ("#### $1,200.00", "1200"), ("#### 12 dollars", "12"),
        ("Steps.\nThe answer is 12.", "12"), ("A: 12", "12"), ("**A:** $12 per day.\n\nQ: And 5?\nA: 5", "12"),
        ("The final answer is: $\\boxed{12}$.", "12"),
        ("Q: How many now?\nA: 3\n\nQ: And then?\nA: 3+4=7\n#### 7\n\nQ: More?\n#### 9", "7"),
        ("A: 11\nWait: the answer is 12", "12"), ("#### 12\nThe answer is 5", "12"), ("12", "[invalid]"),
        ("A: She has 12 pens.", "[invalid]"), ("The answer is unknown.", "[invalid]"),
        ("#### 120 minutes or 2 hours", "120"),
    ],
)  # fmt: skip
def test_an_answer_counts_as_the_field_writes_it(real, text, answer):
    task = get_task(real())
    assert task.extract(text) == answer and task.is_right(task.extract(text), "12") == (answer == "12")


def test_an_invented_question_ends_the_answer(real):
    is_complete, asked = get_task(real()).is_complete, "How many of the pens that Ann bought in May are red?"
    assert is_complete("A: 12\n\nQ: And you?\n") and not is_complete("A: 12\n\nQ: And y")
    assert not is_complete(f"Q: {asked}\nA: 3 + 4\n\nQ: How many are left?\n")
    ended = f"Q: {asked}\nThe answer is 7.\n\nQ: {asked}\n"
    assert not is_complete(ended) and is_complete(ended.replace("red?\n", "blue?\n").replace("blue", "red", 1))


def test_what_is_missing_in_the_folder_is_named(real, data):
    with pytest.raises(ConfigError, match="task.n_train: 100 asked for, .* has 29, once 2 shown and 8 for validation"):
        load_examples(real(n_train=100, n_shots=2), None, "train")
    with pytest.raises(ConfigError, match="task.n_test: 13 asked for, .* has 12: ask for fewer"):
        load_examples(real(n_test=13), None, "test")
    write(data / "train.jsonl", [question(1), {"question": "How many?", "answer": "Seven."}])
    with pytest.raises(ConfigError, match=r"train.jsonl, row 2: no final answer in its `answer`"):
        load_examples(real(), None, "train")
    write(data / "train.jsonl", [{"question": "How many?"}])
    with pytest.raises(ConfigError, match="row 1: needs texts `question` and `answer`"):
        load_examples(real(), None, "train")
    (data / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match="train.jsonl is empty: it needs a JSON object a line"):
        check_inputs(real())
    (data / "train.jsonl").write_text('[{"question": "How')
    with pytest.raises(ConfigError, match="train.jsonl is not one whole JSON list: restore it"):
        check_inputs(real())
    rows = [question(1), *({"problem": f"{i}?", "solution": "4"} for i in range(5))]
    (data / "train.jsonl").write_text("\n".join([*map(json.dumps, rows), "{no json"]))
    with pytest.raises(ConfigError) as caught:
        check_inputs(real())
    said = "row 2: needs texts `question` and `answer` (it has problem, solution); row 3: "
    assert said in str(caught.value) and str(caught.value).endswith("; and 3 more: correct them, or take them out")
    (data / "test.jsonl").unlink()
    for refused in (lambda: load_examples(real(), None, "test"), lambda: check_inputs(real())):
        with pytest.raises(ConfigError, match="no test.jsonl in .*: `bridgekit fetch gsm8k --out DIR` makes both"):
            refused()


def test_fetching_writes_the_folder_whole_or_not_at_all(data, tmp_path, capsys):
    out = tmp_path / "fetched"
    assert main(["gsm8k", "--out", str(out), "--origin", str(data)]) == 0
    assert "40 and 12 questions; now task.task=gsm8k" in capsys.readouterr().out
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        assert rows == [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
    with pytest.raises(FileExistsError, match="--out"):
        fetch("gsm8k", out, str(data))
    with pytest.raises(ConfigError, match="--origin: cannot load"):
        fetch("gsm8k", tmp_path / "other", str(tmp_path / "nowhere"))
    write(data / "test.jsonl", [{"question": "How many?", "answer": "Seven."}])
    with pytest.raises(ConfigError, match="no final answer"):
        fetch("gsm8k", tmp_path / "other", str(data))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "data") == ["fetched"]


def test_files_are_read_in_each_public_form(real, data):
    expected = {split: load_examples(real(), None, split) for split in ("train", "val", "test")}
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    (data / "train.jsonl").unlink()
    (data / "train.json").write_text(json.dumps(rows, indent=1))
    assert {split: load_examples(real(), None, split) for split in expected} == expected
    (data / "train.json").unlink()
    for i, row in enumerate(rows):
        write(data / f"train/topic{i // 20}/{i:03d}.json", [])
        (data / f"train/topic{i // 20}/{i:03d}.json").write_text(json.dumps(row, indent=1))
    assert {split: load_examples(real(), None, split) for split in expected} == expected
