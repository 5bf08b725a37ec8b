"""Real questions: read from a folder, nothing in two splits, what they cannot have is refused.

python -m pytest tests/tasks/test_gsm8k.py
"""

import json

import pytest
from conftest import refused

from bridgekit.config import ConfigError
from bridgekit.tasks import CUE, check_inputs, get_task, literal_prompt, load_examples, relay_prompt, source_prompt
from bridgekit.tasks.real import fetch, main

CONDITIONS = ("source", "target", "bridged", "shuffled", "relay_full")


def question(i: int) -> dict:
    more = i % 7
    answer = f"Ann has {i}+{more}=<<{i}+{more}={i + more}>>{i + more} pens.\n#### {i + more}"
    return {"question": f"Ann has {i} pens and buys {more} more. How many pens?", "answer": answer}


@pytest.fixture
def real(ask_real, data):
    """The last training question stands in the test file as well."""
    make = ask_real("gsm8k", question, controls=["constant"], conditions=list(CONDITIONS))
    data("train", [question(i) for i in range(31)])
    return make


def test_no_question_is_in_two_splits_and_the_order_is_the_seed_s(real):
    config = real(n_shots=3)
    splits = {name: load_examples(config, None, name) for name in ("train", "val", "test")}
    assert [len(splits[name]) for name in splits] == [16, 8, 10]
    asked = [e.question for some in splits.values() for e in some]
    shown = splits["test"][0].shots
    assert len(set(asked)) == len(asked) and not any(f"Question: {q}{CUE}" in shown for q in asked)
    assert {e.shots for some in splits.values() for e in some} == {shown} and shown.count(CUE) == 3
    assert [e.id for e in splits["test"]] == [f"gsm8k-test-{i:05d}" for i in range(1, 11)]
    assert [e.id for e in splits["train"]] != [e.id for e in load_examples(real(data_seed=2), None, "train")][:16]
    everything = {e.question for e in load_examples(real(n_train=22, n_shots=0), None, "train")}
    assert question(30)["question"] not in everything  # it is in the test file


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
    with pytest.raises(ConfigError, match="task.n_train: 100 asked for, .* has 20, once 2 shown and 8 for validation"):
        load_examples(real(n_train=100, n_shots=2), None, "train")
    with pytest.raises(ConfigError, match="task.n_test: 11 asked for, .* has 10: ask for fewer"):
        load_examples(real(n_test=11), None, "test")
    train = data.folder / "train.jsonl"
    for text, named in (
        ("", "train.jsonl is empty: it needs a JSON object a line"),
        ('[{"question": "How', "train.jsonl is not one whole JSON list: restore it"),
        ('{"question": "How many?", "answer": "Seven."}', "train.jsonl, row 1: no final answer in its `answer`"),
    ):
        train.write_text(text)
        assert named in refused(check_inputs, real())
    rows = [question(1), *({"problem": f"{i}?", "solution": "4"} for i in range(5))]
    train.write_text("\n".join([*map(json.dumps, rows), "{no json"]))
    message = refused(check_inputs, real())
    said = "row 2: needs texts `question` and `answer` (it has problem, solution); row 3: "
    assert said in message and message.endswith("; and 3 more: correct them, or take them out")
    (data.folder / "test.jsonl").unlink()
    out = "`bridgekit fetch gsm8k --out DIR` makes both"
    for given in ((load_examples, real(), None, "test"), (check_inputs, real())):
        assert out in refused(*given)


def test_fetching_writes_the_folder_whole_or_not_at_all(real, data, tmp_path, capsys):
    out = tmp_path / "fetched"
    assert main(["gsm8k", "--out", str(out), "--origin", str(data.folder)]) == 0
    assert "31 and 10 questions; now task.task=gsm8k" in capsys.readouterr().out
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        assert rows == [json.loads(line) for line in (data.folder / f"{split}.jsonl").read_text().splitlines()]
    with pytest.raises(FileExistsError, match="--out"):
        fetch("gsm8k", out, str(data.folder))
    with pytest.raises(ConfigError, match="--origin: cannot load"):
        fetch("gsm8k", tmp_path / "other", str(tmp_path / "nowhere"))
    data("test", [{"question": "How many?", "answer": "Seven."}])
    with pytest.raises(ConfigError, match="no final answer"):
        fetch("gsm8k", tmp_path / "other", str(data.folder))
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "data") == ["fetched"]


def test_files_are_read_in_each_public_form(real, data):
    expected = {split: load_examples(real(), None, split) for split in ("train", "val", "test")}
    folder, rows = data.folder, [question(i) for i in range(31)]
    (folder / "train.jsonl").unlink()
    (folder / "train.json").write_text(json.dumps(rows, indent=1))
    assert {split: load_examples(real(), None, split) for split in expected} == expected
    (folder / "train.json").unlink()
    for i, row in enumerate(rows):
        (folder / f"train/topic{i // 20}").mkdir(parents=True, exist_ok=True)
        (folder / f"train/topic{i // 20}/{i:03d}.json").write_text(json.dumps(row, indent=1))
    assert {split: load_examples(real(), None, split) for split in expected} == expected
