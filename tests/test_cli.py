"""The command line and the strict checks before a headless notebook: one clear line, and nothing left behind.

python -m pytest tests/test_cli.py
"""

import subprocess
import sys
from pathlib import Path

import pytest

import bridgekit
from bridgekit import cli, launch
from bridgekit.config import ConfigError, load_config, to_flat

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks/phase1.ipynb"


@pytest.fixture(autouse=True)
def command_forgotten(monkeypatch):
    monkeypatch.setenv("BRIDGEKIT_COMMAND", "")  # `main` writes it for the children: see test_runner.py


def write_yaml(folder: Path, text: str, name: str = "some.yaml") -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ("run {notebook} -f parameters/swap.yaml", ["swap.yaml", "'swap'"]),
        ("train -f parameters/swap.yaml", ["swap.yaml", "'swap'"]),
        ("run parameters/swap.yaml", ["swap.yaml", "notebook"]),
        ("run {notebook} --trust-code", ["trust_code"]),
        ("run {notebook} -p name a/b", ["run.name"]),
        ("run {notebook} -f stpes:20", ["stpes", "'steps'", "phase1.ipynb"]),
        ("run {notebook} -f depth:3", ["depth", "override"]),
        ("run {notebook} -f run_dir:runs/old", ["run_dir", "name"]),
        ("run {notebook} -f overrides:[train.stps=3]", ["train.stps", "train.steps"]),
        ("study parameters/studies/flow.yaml --slots -2", ["slots", "-2"]),
        ("verdict runs/none", ["runs/none"]),
        ("plna parameters/phase1.yaml", ["plna", "'plan'"]),
        ("plan", ["name a file"]),
        ("plan parameters/studies/flow.yaml", ["flow.yaml", "a study", "bridgekit study"]),
        ("plan -f parameters/night.yaml", ["night.yaml", "a batch", "bridgekit batch"]),
    ],
)
def test_a_mistaken_command_is_refused_in_one_line_and_makes_no_run(tmp_path, capsys, monkeypatch, argv, named):
    """`-f key:value` stands for a file that says so."""
    monkeypatch.chdir(tmp_path)
    Path("parameters").symlink_to(ROOT / "parameters")
    argv = argv.format(notebook=NOTEBOOK).split()
    if ":" in argv[-1]:
        argv[-1] = str(write_yaml(tmp_path, argv[-1].replace(":", ": ")))
    assert cli.main(argv) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith("error: ") and out.err.count("\n") == 1, out.err
    assert all(part in out.err for part in named), out.err
    assert not (tmp_path / "runs").exists()


def test_a_notebook_without_one_parameters_cell_is_refused(tmp_path):
    path = write_yaml(tmp_path, NOTEBOOK.read_text().replace('"parameters"', '"other"'), "plain.ipynb")
    with pytest.raises(ConfigError, match="plain.ipynb.*'parameters'.*found 0"):
        launch.load_defaults(path)


def test_later_parameters_win_and_overrides_add_up(tmp_path):
    one = write_yaml(tmp_path, "notebook: phase1\nsteps: 7\nseed: 4\noverrides: [task.n_val=300, train.steps=9]\n")
    two = write_yaml(tmp_path, "steps: 8\noverrides: [task.n_val=350]\n", "two.yaml")
    values = launch.gather_parameters(NOTEBOOK, [one, two], {"seed": 5}, ["task.n_val=400"])
    assert (values["steps"], values["seed"], "notebook" in values) == (8, 5, False)
    # files with lists replace the notebook's own, files without keep it
    assert values["overrides"] == ["task.n_val=300", "train.steps=9", "task.n_val=350", "task.n_val=400"]
    kept = launch.gather_parameters(NOTEBOOK, [write_yaml(tmp_path, "steps: 7\n")], {}, ["task.n_val=400"])
    assert kept["overrides"] == [*launch.load_defaults(NOTEBOOK)["overrides"], "task.n_val=400"]


def test_printed_configuration_reads_back(tmp_path, capsys):
    layer = write_yaml(tmp_path, "notebook: phase1\nname: other\noverrides: [train.lr=0.1]\n")
    overrides = ["train.lr=3.0e-4", "eval.conditions=[source, target, bridged]"]
    assert cli.main(["config", "-f", str(layer), *(part for text in overrides for part in ("-o", text))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("=")[0] for line in lines] == list(to_flat(load_config()))
    assert sum(line.endswith("  # changed") for line in lines) == 3
    expected = load_config(overrides=[*overrides, "run.name=other"])
    assert load_config(overrides=[line.split("  #")[0] for line in lines]) == expected


def test_a_key_without_effect_is_marked(capsys):
    assert cli.main(["config", "-o", "loss.extra=mine.py:loss", "-o", "loss.kl_tokens=3"]) == 0
    out = capsys.readouterr().out
    assert "loss.extra=mine.py:loss  # changed, without effect: only if loss.extra_weight > 0" in out
    assert out.count("without effect") == 2


def test_a_verdict_that_did_not_ask_for_trained_controls_is_shown_as_such(capsys):
    runs = [str(ROOT / "preserved_data" / name) for name in ("headline_resampler_seed1", "phase1_make_seed1")]
    assert cli.main(["status", *runs]) == 0
    old, new, *_ = capsys.readouterr().out.splitlines()
    assert "transfers by an older rule" in old and "unproven ·" in new


def test_python_m_bridgekit_is_the_command_and_a_mistake_leaves_no_traceback():
    command = [sys.executable, "-m", "bridgekit", "config", "-o", "train.stps=3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_the_names_of_a_notebook_are_there():
    assert all(getattr(bridgekit, name) is not None for name in bridgekit.__all__)
