"""A user's own producer, injector, loss and task: found by file, held to their contract, trusted when told.

python -m pytest tests/test_extend.py
"""

import inspect
import json

import pytest
from conftest import refused

from bridgekit.config import is_path, load_config
from bridgekit.tasks import extend

PRODUCER = """
class Mean:
    def __init__(self, config, n_layers, source_dim, target_dim, width=64, gain=1.0):
        self.width, self.gain = width, gain

    def forward(self, states, mask):
        return states


class Short(Mean):
    def __init__(self, config):
        pass


class Needy(Mean):
    def __init__(self, config, n_layers, source_dim, target_dim, *, heads):
        pass


def answer_length(logits, labels_mask, power=2):
    return power


class Task:
    def examples(self, config, split):
        return []


not_a_class = 3
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with own/parts.py, and the working directory in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "parts.py").write_text(PRODUCER)
    return tmp_path


def test_an_object_is_named_by_a_file_below_the_project():
    outside = ["/a/b.py:Name", "~/b.py:Name", "../b.py:Name", "a/../../b.py:Name"]
    assert all(map(is_path, ["a/b.py:Name", "b.py:_name"]))
    assert not any(map(is_path, [*outside, "resampler", "", "b.py", "b.py:1st", "b.py:a.b", "b.txt:Name"]))


def test_an_edited_file_is_loaded_again(project):
    first = extend.load_object("bridge.producer", "own/parts.py:Mean")
    assert extend.load_object("bridge.producer", "own/parts.py:Mean") is first
    (project / "own" / "parts.py").write_text(PRODUCER.replace("gain=1.0", "gain=2.0"))
    assert inspect.signature(extend.load_object("bridge.producer", "own/parts.py:Mean")).parameters["gain"].default == 2


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("import os\n\n1 / 0\n", ["own/bad.py:3", "ZeroDivisionError"]),
        ("def f():\n    raise KeyError('x')\n\n\nf()\n", ["own/bad.py:2", "KeyError"]),
        ("a = 1\nclass Mean(\n", ["own/bad.py:2", "SyntaxError"]),
        ("raise SystemExit('no')\n", ["own/bad.py:1", "no"]),
    ],
)
def test_a_file_that_does_not_import_is_refused_with_its_line(project, source, named):
    (project / "own" / "bad.py").write_text(source)
    message = refused(extend.load_object, "bridge.producer", "own/bad.py:Mean")
    assert all(part in message for part in ["bridge.producer", *named]), message


def test_what_is_not_there_is_refused(project):
    assert "no file 'own/none.py'" in refused(extend.load_object, "task.task", "own/none.py:Task")
    assert "did you mean 'Mean'?" in refused(extend.load_object, "bridge.producer", "own/parts.py:Maen")


@pytest.mark.parametrize(
    ("key", "name", "named"),
    [
        ("bridge.producer", "answer_length", ["parts.py:20 answer_length must be a class"]),
        ("bridge.producer", "Task", ["parts.py:24 Task has no forward()"]),
        ("bridge.producer", "Short", ["parts.py:10 Short must be made as Short(config, n_layers"]),
        ("task.task", "Mean", ["has no examples()"]),
        ("loss.extra", "not_a_class", ["has no __call__()"]),
    ],
)
def test_an_object_of_the_wrong_kind_is_refused(project, key, name, named):
    message = refused(extend.load_object, key, f"own/parts.py:{name}")
    assert all(part in message for part in [key, *named]), message


def test_options_are_held_to_the_signature(project):
    def parse(name, *options, key="bridge.producer"):
        return extend.parse_options(key, extend.load_object(key, f"own/parts.py:{name}"), options)

    assert parse("Mean", "width=8", "gain=2") == {"width": 8, "gain": 2.0}
    assert parse("answer_length", "power=3", key="loss.extra") == {"power": 3}
    for option, named in (
        ("wdith=8", "no option 'wdith': did you mean 'width'?"),
        ("config=8", "no option 'config'"),
        ("width", "name=value"),
        ("width=[", "YAML"),
        ("width=many", "width: expected int"),
    ):
        assert named in refused(parse, "Mean", option)
    assert "once" in refused(parse, "Mean", "width=1", "width=2")
    assert "needs option 'heads'" in refused(parse, "Needy")
    assert "no option 'power'" in refused(lambda: parse("Task", "power=1", key="task.task"))


def test_a_run_keeps_a_copy_and_uses_it_only_when_trusted(project, tmp_path):
    run = tmp_path / "run"
    config = load_config(producer="own/parts.py:Mean", producer_options=["width=8"])
    extend.copy_code(load_config(), run)
    assert not run.exists() and extend.check_trust(run, False) is None  # nothing of the user's, nothing to trust
    extend.copy_code(config, run)
    record = json.loads((run / "code" / "code.json").read_text())
    assert record["bridge.producer"]["file"] == "own/parts.py" and record["bridge.producer"]["object"] == "Mean"
    assert "--trust-code" in refused(extend.check_trust, run, False)
    code = extend.check_trust(run, True)
    (project / "own" / "parts.py").unlink()
    made, options = extend.load_checked(config, "bridge.producer", code)
    assert made(None, 3, 8, 8, **options).width == 8
    (code / "own" / "parts.py").write_text("import os\n")
    assert "not the file that was trained with" in refused(extend.check_trust, run, True)
    (code / "code.json").write_text("[]")
    assert "damaged" in refused(extend.check_trust, run, True)
