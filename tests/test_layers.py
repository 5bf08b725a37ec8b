"""The shape of the package: six folders, imports point downward, facts and edges know no torch, no file grows too long.

python -m pytest tests/test_layers.py
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bridgekit"
# What a file of a place may import: {place: places below it}. Files at the package's top stand under their own name.
BELOW = {
    "keys": set(),
    "config": {"keys"},
    "runs": {"keys", "config"},
    "alive": {"keys", "config", "runs"},
    "extend": {"keys", "config"},
    "tasks": {"keys", "config", "runs", "extend"},
    "results": {"keys", "config", "runs", "alive", "tasks"},
    "audit": {"keys", "config", "runs", "tasks", "results"},
    "model": {"keys", "config", "runs", "extend", "tasks"},
    "inside.probe": {"keys", "config", "runs", "tasks", "results", "model"},
    "train": {"keys", "config", "runs", "alive", "extend", "tasks", "results", "model", "inside.probe"},
    "inside": {"keys", "config", "runs", "extend", "tasks", "results", "model", "train", "inside.probe"},
}
EDGES = {"launch", "runner", "study", "batch", "slurm", "cli", "__init__", "__main__"}
TENSORS = {"model", "train", "inside", "inside.probe"}  # the only places that may import these:
HEAVY = {"torch", "transformers", "accelerate", "peft"}
LONGEST_FILE, MOST_LAYERS, MOST_AT_THE_TOP = 400, 13, 12
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
LIGHT = [name for name in FILES if name.split(".")[0] not in TENSORS]


def place_of(module: str) -> str:
    """The folder, or the file at the top; the probe stands by itself, because making a pair records it."""
    return module if module == "inside.probe" else module.split(".")[0]


def imported_by(module: str) -> set[str]:
    """Every module that a file imports anywhere, inside functions too; what a type checker alone reads is left out."""
    names, tree = set(), ast.parse(FILES[module].read_text(), module)
    for branch in [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]:
        tree.body.remove(branch)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write imports from the package's root"
            full = {alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name.removeprefix("bridgekit.") in FILES else node.module for name in full.values()}
    return names


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downward_and_a_file_stays_readable(module):
    place, names = place_of(module), [n for n in imported_by(module) if n.startswith("bridgekit.")]
    if place not in EDGES:
        assert place in BELOW, f"bridgekit/{place} is new: enter it in BELOW"
        above = {place_of(name.removeprefix("bridgekit.")) for name in names} - BELOW[place] - {place}
        assert not above, f"{module} imports {', '.join(sorted(above))}, which stand above it"
    assert len(FILES[module].read_text().splitlines()) <= LONGEST_FILE, f"bridgekit/{module} is too long"


def test_there_are_no_circles_and_few_layers():
    below = {m: {n.removeprefix("bridgekit.") for n in imported_by(m) if n.startswith("bridgekit.")} for m in FILES}
    below = {m: {n if n in FILES else f"{n}.__init__" for n in names} - {m} for m, names in below.items()}
    depth: dict[str, int] = {}
    for module in graphlib.TopologicalSorter(below).static_order():  # refuses a circle, and names it
        depth[module] = 1 + max((depth[other] for other in below[module]), default=0)
    deepest = max(depth, key=depth.get)
    assert depth[deepest] <= MOST_LAYERS, f"{deepest} stands on {depth[deepest]} layers of files"


def test_facts_and_edges_never_import_the_tensor_libraries():
    heavy = {name: {imported.split(".")[0] for imported in imported_by(name)} & HEAVY for name in LIGHT}
    assert not any(heavy.values()), heavy


def test_the_package_has_six_folders_and_few_files_at_its_top():
    folders = {name.split(".")[0] for name in FILES if "." in name}
    assert folders == {"tasks", "model", "train", "results", "inside", "audit"}
    assert len([name for name in FILES if "." not in name]) <= MOST_AT_THE_TOP


def loaded_by(code: str) -> set[str]:
    """The top-level modules of a fresh interpreter after running `code`."""
    code += "\nimport sys\nprint(*{name.split('.')[0] for name in sys.modules})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_the_package_loads_quickly_and_facts_and_edges_load_no_tensor_library():
    """Also not through other packages: pandas or papermill must not be made to bring torch along."""
    slow = HEAVY | {"numpy", "pandas", "scipy", "matplotlib", "seaborn", "IPython", "papermill", "datasets"}
    assert not loaded_by("import bridgekit, bridgekit.cli; assert bridgekit.load_config().train.steps == 500") & slow
    names = [f"bridgekit.{name.removesuffix('.__init__')}" for name in LIGHT if not name.startswith("__")]
    assert not loaded_by(f"import {', '.join(names)}") & HEAVY


UNSAFE = {"pickle", "shelve", "dill", "joblib", "marshal", "torch.load", "eval", "exec", "os.system", "yaml.load"}


@pytest.mark.parametrize("module", FILES)
def test_nothing_that_a_file_brings_can_run(module):
    """No pickles in any form, and archives by a safe filter; `yaml.load` is the strict one in keys.py alone."""
    tree = ast.parse(FILES[module].read_text(), module)
    imported = {name.split(".")[0] for name in imported_by(module)}
    calls = {ast.unparse(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    allowed = {"yaml.load"} if module == "keys" else set()
    assert not (imported | set(calls)) & UNSAFE - allowed
    options = {name: ast.unparse(call) for name, call in calls.items()}
    assert all("filter='data'" in text for name, text in options.items() if name.endswith(".extractall"))
    assert all("allow_pickle=False" in text for name, text in options.items() if name in ("np.load", "numpy.load"))
