"""What is stored of a notebook: no outputs, one strict parameters cell, short cells; its parameters files.

python -m pytest tests/test_notebooks.py
"""

import ast
from pathlib import Path

import nbformat
import pytest

from bridgekit.config import Config, load_parameters
from bridgekit.launch import gather_parameters, load_defaults, resolve_config

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PARAMETERS = sorted((ROOT / "parameters").glob("*.yaml"))
LONGEST_CELL = 15


def name_of(path: Path) -> str:
    return path.stem


def cells_of(path: Path, kind: str = "code") -> list:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def notebook_of(parameters: Path) -> Path:
    """Every file says for which notebook it is."""
    return ROOT / "notebooks" / f"{load_parameters(parameters)['notebook']}.ipynb"


def test_there_are_notebooks_and_parameters_files():
    assert {"phase1"} <= {n.stem for n in NOTEBOOKS}
    assert {"phase1", "phase1_gpu", "phase1_seeds", "phase1_smoke"} <= {p.stem for p in PARAMETERS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_is_valid_and_stored_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert "papermill" not in notebook.metadata
    for cell in cells_of(path):
        assert not cell.outputs and cell.execution_count is None, cell.source
        assert "papermill" not in cell.metadata and "execution" not in cell.metadata, cell.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_has_one_cell_of_literal_parameters(path):
    tagged = [cell for cell in cells_of(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    nodes = ast.parse(tagged[0].source).body
    for node in nodes:
        assert isinstance(node, ast.Assign) and len(node.targets) == 1, ast.unparse(node)
        ast.literal_eval(node.value)  # refuses what is computed
        assert node.lineno == node.end_lineno or node.targets[0].id == "overrides"
    names = [node.targets[0].id for node in nodes]
    assert len(names) == len(set(names))
    assert len([name for name in names if name != "overrides"]) <= 15


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_cells_are_short_and_only_call(path):
    for cell in cells_of(path):
        lines = [line for line in cell.source.splitlines() if line.strip()]
        limit = 20 if "parameters" in cell.metadata.get("tags", []) else LONGEST_CELL
        assert len(lines) <= limit, f"{len(lines)} lines: {lines[0]}"
        assert not any(line.lstrip().startswith(("!", "%")) for line in lines), cell.source
        assert "sys.path" not in cell.source
        for node in ast.walk(ast.parse(cell.source)):
            assert not isinstance(node, (ast.ClassDef, ast.FunctionDef)), f"{node.name} belongs in the package"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_a_notebook_explains_itself(path):
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].cell_type == "markdown" and cells[0].source.startswith("# ")
    for cell in cells:
        if "plot_" in cell.source:  # one picture, saved with what it was drawn from
            assert cell.source.count("plot_") == cell.source.count("save_figure(") == 1, cell.source
    prose = " ".join(cell.source for cell in cells_of(path, "markdown"))
    assert "**Question.**" in prose and "**Protocol.**" in prose


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_defaults_of_a_notebook_that_runs_something_are_a_configuration(path):
    defaults = load_defaults(path)
    if "run_dir" in defaults:
        assert defaults["run_dir"] == ""
        assert isinstance(resolve_config(defaults), Config)
        handed_on = "".join(cell.source for cell in cells_of(path) if "load_config(" in cell.source)
        assert all(f"{name}={name}" in handed_on for name in set(defaults) - {"run_dir"}), handed_on


@pytest.mark.parametrize("path", PARAMETERS, ids=name_of)
def test_every_parameters_file_fits_its_notebook(path):
    notebook = notebook_of(path)
    values = gather_parameters(notebook, [path], {}, [])
    assert set(values) == set(load_defaults(notebook))
    if "run_dir" in values:
        assert isinstance(resolve_config(values), Config)


@pytest.mark.parametrize("path", [n for n in NOTEBOOKS if "run_dir" in load_defaults(n)], ids=name_of)
def test_a_notebook_with_its_defaults_is_its_first_parameters_file(path):
    """Run-all in JupyterLab and `make` give the same run."""
    values = gather_parameters(path, [ROOT / "parameters" / f"{path.stem}.yaml"], {}, [])
    assert resolve_config(values) == resolve_config(load_defaults(path))
