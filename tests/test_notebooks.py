"""What is stored of a notebook: no outputs, one strict parameters cell, short cells; and its parameters files.

python -m pytest tests/test_notebooks.py        # they are executed by `make smoke`, see run_smoke.py
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from bridgekit.config import KEYS, load_config, load_parameters, to_flat
from bridgekit.launch import gather_parameters, load_defaults, notebook_config, resolve_config
from bridgekit.study import Study, plan_study, plan_swap

ROOT = Path(__file__).parent.parent
NOTEBOOKS = {path.stem: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
PARAMETERS = [p for p in sorted((ROOT / "parameters").glob("*.yaml")) if "notebook" in load_parameters(p)]  # no batch
LONGEST_CELL, MOST_PARAMETERS = 15, 15
OWN = {"run_dir", "overrides", "slots", "prompt_teacher"}  # parameters of phase1 and swap that are no keys
PLUMBING = ("sys.path", "os.environ", "subprocess", "importlib", "get_ipython")
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=list(NOTEBOOKS))
every_file = pytest.mark.parametrize("path", PARAMETERS, ids=[path.stem for path in PARAMETERS])


def code_cells(path: Path) -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def files_of(notebook: str) -> list[Path]:
    return [path for path in PARAMETERS if load_parameters(path)["notebook"] == notebook]


@every_notebook
def test_a_notebook_is_stored_as_jupyterlab_opens_it_and_says_what_it_asks(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}, cell.source
        assert not cell.get("outputs") and cell.get("execution_count") is None, cell.source
    first = notebook.cells[0].source
    assert first.startswith("# ") and "**Question.**" in first and "**Protocol.**" in first


@every_notebook
def test_a_notebook_has_one_cell_of_literal_parameters(path):
    (cell,) = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    nodes = ast.parse(cell.source).body
    for node in nodes:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1, ast.unparse(node)
        ast.literal_eval(node.value)  # refuses what is computed
        assert node.lineno == node.end_lineno or isinstance(node.value, (ast.List, ast.Dict)), ast.unparse(node)
    names = [node.targets[0].id for node in nodes]
    assert len(names) == len(set(names)) and len(set(names) - {"overrides"}) <= MOST_PARAMETERS


@every_notebook
def test_cells_are_short_without_plumbing_and_save_each_figure_with_its_data(path):
    sources = [cell.source for cell in code_cells(path)]
    for cell in code_cells(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        assert len(lines) <= LONGEST_CELL + 5 * bool(cell.metadata.get("tags")), f"{len(lines)} lines: {lines[0]}"
        assert not any(line.lstrip().startswith(("!", "%")) for line in lines), cell.source
        assert not any(word in cell.source for word in PLUMBING), cell.source
        drawn = len(re.findall(r"\bfigure = ", cell.source))
        assert drawn == cell.source.count("save_figure(") <= 1, cell.source
    assert any("os.chdir(launch.project_root())" in source for source in sources), "paths depend on the kernel's folder"
    assert "display_id" in sources[0] and "result.update(" in "".join(sources[-2:])  # the result stands on top


@every_file
def test_a_parameters_file_fits_its_notebook_and_says_everything(path):
    """No default of the notebook gets into a run that a file describes, so a changed default changes no such run."""
    notebook = NOTEBOOKS[load_parameters(path)["notebook"]]
    values, defaults = gather_parameters(notebook, [path], {}, []), load_defaults(notebook)
    assert set(values) == set(defaults)
    if notebook.stem in ("phase1", "ablation", "swap"):
        assert set(load_parameters(path)) == set(defaults) - {"run_dir"} | {"notebook"}


@pytest.mark.parametrize("path", files_of("phase1"), ids=lambda path: path.stem)
def test_a_file_gives_one_configuration_by_notebook_and_by_command_line(path):
    assert resolve_config(gather_parameters(NOTEBOOKS["phase1"], [path], {}, [])) == load_config([path], (), "phase1")


@pytest.mark.parametrize("name", ["phase1", "ablation", "swap"])
def test_run_all_in_jupyterlab_is_the_first_parameters_file(name):
    """Of phase1 a shorter one: six minutes are enough to wait for in a browser."""
    values = gather_parameters(NOTEBOOKS[name], [ROOT / "parameters" / f"{name}.yaml"], {}, [])
    defaults = load_defaults(NOTEBOOKS[name])
    if name != "phase1":
        assert values == defaults
        return
    long, short = to_flat(resolve_config(values)), to_flat(resolve_config(defaults))
    changed = {key for key in long if long[key] != short[key]}
    assert changed == {"train.steps", "train.eval_every", "train.controls", "task.n_test"}
    assert set(short["train.controls"]) < set(long["train.controls"]) and short["train.steps"] < long["train.steps"]


@pytest.mark.parametrize("name", ["phase1", "swap"])
def test_a_notebooks_own_names_are_its_configuration(name):
    defaults = load_defaults(NOTEBOOKS[name])
    assert set(defaults) - {key.split(".")[1] for key in KEYS} <= OWN
    config = notebook_config(name, defaults | {"steps": 7, "unrelated": object()})
    assert config.train.steps == 7 and config.run.name == name


@pytest.mark.parametrize("path", files_of("ablation") + files_of("swap"), ids=lambda path: path.stem)
def test_what_ablation_and_swap_would_run_is_accepted(path, monkeypatch):
    monkeypatch.setattr("bridgekit.study.measure_prompts", lambda config: None)  # its own tests are in test_study.py
    if path.stem.endswith("h100_node"):  # neither its models nor its questions are here
        monkeypatch.setattr("bridgekit.study.check_inputs", lambda config: None)
    values = gather_parameters(NOTEBOOKS[load_parameters(path)["notebook"]], [path], {}, [])
    if "variants" in values:
        names = ("name", "base", "variants", "seeds", "overrides", "replicates", "reference")
        study = Study(**{name: values[name] for name in names} | {"base": str(ROOT / values["base"])})
        assert len(plan_study(study)) == sum(len(study.seeds_of(variant)) for variant in study.variants)
    else:
        planned = plan_swap(resolve_config(values), values["prompt_teacher"])
        assert [one.pair.direction for one in planned.values()] == ["forward"] + 3 * ["swapped"]
