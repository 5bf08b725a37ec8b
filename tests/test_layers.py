"""The shape of the package: six folders, imports point downward, facts and edges know no torch, no file grows too long.

python -m pytest tests/test_layers.py
"""

import ast
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
EDGES = {"launch", "runner", "study", "cli", "__init__", "__main__"}
TENSORS = {"model", "train", "inside", "inside.probe"}  # the only places that may import these:
HEAVY = {"torch", "transformers", "accelerate", "peft"}
LONGEST_FILE, MOST_LAYERS, MOST_AT_THE_TOP = 400, 13, 10
FILES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}


def place_of(module: str) -> str:
    """The folder, or the file at the top; the probe stands by itself, because making a pair records it."""
    return module if module == "inside.probe" else module.split(".")[0]


def imported_names(module: str) -> set[str]:
    """Every module that a file imports anywhere, inside functions too; what a type checker alone reads is left out."""
    names, tree = set(), ast.parse(FILES[module].read_text(), module)
    for branch in [n for n in tree.body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]:
        tree.body.remove(branch)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: write imports from the package's root"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def siblings(module: str) -> set[str]:
    """The files of this package that a file imports."""
    names = {name.removeprefix("bridgekit.") for name in imported_names(module) if name.startswith("bridgekit.")}
    found = {name if name in FILES else f"{name}.__init__" for name in names}
    found = {name for name in found if name in FILES and name != module}
    # `from bridgekit.tasks import units` names the folder and the file; it is the file that is meant.
    folders = {name for name in found if name.endswith(".__init__")}
    return {f for f in found if f not in folders or not any(o.startswith(f[: -len("__init__")]) for o in found - {f})}


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downward(module):
    place = place_of(module)
    if place in EDGES:
        return
    assert place in BELOW, f"bridgekit/{place} is new: enter it in BELOW"
    wrong = {other for other in siblings(module) if place_of(other) not in BELOW[place] | {place}}
    assert not wrong, f"{module} imports {', '.join(sorted(wrong))}, which stand above it"


@pytest.mark.parametrize("module", [m for m in FILES if place_of(m) not in TENSORS])
def test_facts_and_edges_never_import_the_tensor_libraries(module):
    heavy = {name.split(".")[0] for name in imported_names(module)} & HEAVY
    assert not heavy, f"{module} imports {', '.join(heavy)}"


def test_there_are_no_circles_and_few_layers():
    depth: dict[str, int] = {}

    def measure(module: str, trail: tuple[str, ...]) -> int:
        assert module not in trail, " imports ".join([*trail[trail.index(module) :], module])
        if module not in depth:
            depth[module] = 1 + max((measure(o, (*trail, module)) for o in sorted(siblings(module))), default=0)
        return depth[module]

    deepest = max(FILES, key=lambda module: measure(module, ()))
    assert depth[deepest] <= MOST_LAYERS, f"{deepest} stands on {depth[deepest]} layers of files"


def test_the_package_has_six_folders_and_few_files_at_its_top():
    folders = {name.split(".")[0] for name in FILES if "." in name}
    assert folders == {"tasks", "model", "train", "results", "inside", "audit"}
    assert len([name for name in FILES if "." not in name]) <= MOST_AT_THE_TOP


@pytest.mark.parametrize("module", FILES)
def test_a_file_stays_readable(module):
    lines = len(FILES[module].read_text().splitlines())
    assert lines <= LONGEST_FILE, f"bridgekit/{module} has {lines} lines; the longest allowed has {LONGEST_FILE}"


def loaded_by(*modules: str) -> set[str]:
    """The top-level modules of a fresh interpreter after importing `modules`."""
    code = f"import sys, {', '.join(modules)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(child.stdout.split())


def test_importing_the_package_is_cheap():
    slow = HEAVY | {"numpy", "pandas", "scipy", "matplotlib", "seaborn", "IPython", "papermill", "datasets"}
    assert not loaded_by("bridgekit", "bridgekit.cli") & slow


def test_facts_and_edges_load_no_tensor_library():
    """Also not through other packages: pandas or papermill must not be made to bring torch along."""
    names = [m.removesuffix(".__init__") for m in FILES if place_of(m) not in TENSORS and not m.startswith("__")]
    assert not loaded_by(*(f"bridgekit.{name}" for name in names)) & HEAVY
