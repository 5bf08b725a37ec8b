"""The command line and the strict checks before a headless notebook: one clear line, and nothing left behind.

python -m pytest tests/test_cli.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

from bridgekit import cli, headless
from bridgekit.config import ConfigError, load_config, to_flat

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks/phase1.ipynb"


def refuse(capsys, *argv: str) -> str:
    """The one line a mistaken command ends in."""
    assert cli.main([str(part) for part in argv]) == 2
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.startswith("error: ") and out.err.count("\n") == 1, out.err
    return out.err


def write_yaml(folder: Path, text: str) -> Path:
    path = folder / "some.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("stpes: 20", ["stpes", "'steps'", "phase1.ipynb"]),
        ("lr: 1e-4", ["train.lr", "1.0e-4"]),
        ("steps: '20'", ["train.steps", "str"]),
        ("steps: on", ["train.steps", "bool"]),
        ("n_soft_tokens: 0", ["bridge.n_soft_tokens"]),
        ("producer: transformer", ["bridge.producer", "resampler"]),
        ("eval_samples: 100000", ["eval.eval_samples", "n_test"]),
        ("depth: 3", ["depth", "override"]),
        ("train: {steps: 20}", ["train.steps", "override"]),
        ("run_dir: runs/old", ["run_dir", "name"]),
        ("overrides: train.steps=3", ["overrides", "list"]),
        ("overrides: [train.stps=3]", ["train.stps", "train.steps"]),
        ("overrides: [3]", ["overrides", "3"]),
        ("- 3", ["key: value"]),
        ("a: [", ["some.yaml", "YAML"]),
    ],
)
def test_a_mistaken_parameters_file_is_refused_before_a_run_folder_is_made(tmp_path, capsys, text, named):
    path = write_yaml(tmp_path, text)
    message = refuse(capsys, "run", NOTEBOOK, "-f", path, "-o", f"run.runs_dir={tmp_path / 'runs'}")
    for part in named:
        assert part in message
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["run", "notebooks/none.ipynb"], ["notebooks/none.ipynb"]),
        (["run", NOTEBOOK, "-f", "none.yaml"], ["none.yaml"]),
        (["run", NOTEBOOK, "-p", "lr", "1e-4"], ["train.lr", "1.0e-4"]),
        (["run", NOTEBOOK, "-o", "train.steps"], ["train.steps", "key=value"]),
        (["run", ROOT / "README.md"], ["README.md", "notebook"]),
        (["run", NOTEBOOK, "-p", "name", "a/b"], ["run.name"]),
        (["train", "-o", "train.steps=x"], ["train.steps"]),
        (["config", "-o", "steps=-1"], ["train.steps"]),
        (["verdict", "runs/none"], ["runs/none"]),
    ],
)
def test_a_mistaken_command_is_refused_in_one_line(capsys, argv, named):
    message = refuse(capsys, *argv)
    for part in named:
        assert part in message


def test_a_runs_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    message = refuse(capsys, "run", NOTEBOOK, "-o", f"run.runs_dir={tmp_path / 'file'}")
    assert "run.runs_dir" in message


def test_a_notebook_without_one_parameters_cell_is_refused(tmp_path):
    text = NOTEBOOK.read_text().replace('"parameters"', '"other"')
    path = tmp_path / "plain.ipynb"
    path.write_text(text)
    with pytest.raises(ConfigError, match="plain.ipynb.*'parameters'.*found 0"):
        headless.read_defaults(path)


def test_later_parameters_win_and_overrides_add_up(tmp_path):
    path = write_yaml(tmp_path, "steps: 7\nseed: 4\noverrides: [task.n_val=300, train.steps=9]\n")
    values = headless.gather_parameters(NOTEBOOK, path, {"seed": 5}, ["task.n_val=400"])
    assert (values["steps"], values["seed"]) == (7, 5)
    config = headless.resolve_config(values)
    assert (config.train.steps, config.task.n_val, config.run.seed) == (9, 400, 5)
    # a file without a list keeps the notebook's own, one with a list replaces it
    assert values["overrides"] == ["task.n_val=300", "train.steps=9", "task.n_val=400"]
    kept = headless.gather_parameters(NOTEBOOK, write_yaml(tmp_path, "steps: 7\n"), {}, ["task.n_val=400"])
    assert kept["overrides"] == [*headless.read_defaults(NOTEBOOK)["overrides"], "task.n_val=400"]


def test_printed_configuration_reads_back(tmp_path, capsys):
    overrides = ["train.lr=3.0e-4", "eval.conditions=[source, target, bridged]", "run.name=other"]
    assert cli.main(["config", *(part for text in overrides for part in ("-o", text))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("=")[0] for line in lines] == list(to_flat(load_config()))
    assert sum(line.endswith("  # changed") for line in lines) == 3
    assert load_config(overrides=[line.split("  #")[0] for line in lines]) == load_config(overrides=overrides)


def test_help_names_every_key_with_its_type_default_and_comment():
    text = cli.describe_keys()
    for key in to_flat(load_config()):
        assert f"  {key} (" in text
    assert "bridge.n_soft_tokens (int, 16): -1: as many as the source prompt has" in text


def test_a_mistake_leaves_no_traceback_and_exit_code_2():
    command = [sys.executable, "-m", "bridgekit.cli", "run", str(NOTEBOOK), "-o", "train.stps=3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_every_verb_of_the_help_is_there(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for verb in ("run", "train", "config", "verdict", *cli.FORWARDED):
        assert f"    {verb} " in text
