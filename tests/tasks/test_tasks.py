"""A task scores itself; one of the user's needs a few lines, and what a run cannot use is refused before it starts.

python -m pytest tests/tasks/test_tasks.py
"""

import json
import time
from dataclasses import replace

import pytest
from conftest import refused

from bridgekit.config import ConfigError, load_config
from bridgekit.tasks import Example, check_inputs, get_task, give_donors, load_examples

CAPITALS = """
from bridgekit.tasks import from_jsonl


class Capitals:
    def examples(self, config, split):
        return from_jsonl(f"{config.task.data}/{split}.jsonl", split, "country", "capital", extract=self.extract)

    def extract(self, text):
        return text.strip().lower() or "[invalid]"
"""


@pytest.fixture
def capitals(tmp_path, monkeypatch):
    """A project with a task of its own: `capitals(**changes)` is a configuration that asks for it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "capitals.py").write_text(CAPITALS)
    for split in ("train", "val", "test"):
        rows = [{"country": f"{split} {i}?", "capital": f"City{i}"} for i in range(6)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(**changes):
        sizes = {"n_train": 6, "n_val": 4, "n_test": 5, "val_samples": 4}
        asked = {"conditions": ["source", "target", "bridged"], "controls": ["constant"]}
        return load_config(**({"task": "capitals.py:Capitals", "data": "data"} | sizes | asked | changes))

    return make


def test_a_task_of_ones_own_is_a_class_of_a_few_lines(capitals):
    check_inputs(capitals())
    task = get_task(capitals())
    test = task.examples(capitals(), None, "test")
    assert len(CAPITALS.strip().splitlines()) <= 10
    assert [len(load_examples(capitals(), None, split)) for split in ("train", "val")] == [6, 4]
    assert [e.id for e in test] == [f"test-test-{i:05d}" for i in range(1, 6)]
    assert test[0].gold == "city0" and task.is_right(task.extract(" City0\n"), test[0].gold)
    assert not task.is_right(task.extract(" "), "[invalid]") and not task.has_groups and not task.is_complete("City0")
    by_id = {e.id: e for e in test}
    assert all(by_id[e.donor_id].gold != e.gold for e in test)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("return from_jsonl", "return list", ["must give bridgekit.tasks.Example, got str"]),
        ("{split}.jsonl", "train.jsonl", ["'train 0?' is in train and val"]),
        ('"capital"', '"city"', ["train.jsonl, row 1: needs texts `country` and `city`"]),
        ("extract=self.extract", "extract=str.upper", ["its solution reads as 'city0', its gold answer is 'CITY0'"]),
        ("    def extract", "    has_groups = True\n\n    def extract", ["its group is None, and has_groups is True"]),
        ('text.strip().lower() or "[invalid]"', '"[invalid]"', ["row 1: no final answer in its `capital`"]),
        ("import from_jsonl", "import from_json", ["task.task: capitals.py:2", "from_json"]),
    ],
)
def test_what_a_run_cannot_use_is_refused_before_it_starts(capitals, tmp_path, old, new, named):
    text = CAPITALS.replace(old, new, 1)
    if new == "return list":
        text = text.replace(', "country", "capital", extract=self.extract', "").replace('jsonl", split)', 'jsonl")')
    (tmp_path / "capitals.py").write_text(text)
    message = refused(check_inputs, capitals())
    assert all(part in message for part in named), message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"n_test": 7}, "gives 6 examples, task.n_test asks for 7"),
        ({"conditions": ["source", "target", "bridged", "target_told"]}, "no fact in words"),
        ({"options": ["size=3"]}, "no option 'size'"),
        ({"producer": "nowhere.py:Mine"}, "bridge.producer: no file 'nowhere.py'"),
        ({"source_model": "./nowhere"}, "pair.source_model: no model"),
        ({"data": "nowhere"}, "task.data: no file 'nowhere/train.jsonl'"),
    ],
)
def test_what_is_missing_is_refused_before_a_run_folder_exists(capitals, changes, named):
    with pytest.raises(ConfigError, match=named):
        check_inputs(capitals(**changes))


def test_donors_differ_and_are_of_the_same_group():
    made = [
        Example(id=str(i), split="", question="", solution="", gold=str(i % 2), group="ab"[i // 4]) for i in range(8)
    ]
    assert [e.donor_id for e in give_donors(made)] == ["1", "2", "3", "0", "5", "6", "7", "4"]
    assert give_donors(made[:1])[0].donor_id is None
    alike = [replace(made[0], id=str(i)) for i in range(20_000)]  # yes, yes, yes: no pair of them is looked at twice
    since = time.process_time()
    assert {e.donor_id for e in give_donors([*alike, made[1]])} == {"0", "1"}
    assert time.process_time() - since < 10
