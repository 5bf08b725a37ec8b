"""The shape of the package: imports point downward, the bottom layer knows no torch, no file grows too long.

python -m pytest tests/test_layers.py
"""

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bridgekit"
# Top-level modules and packages of bridgekit, bottom layer first. A new module is entered in one layer.
LAYERS = (
    """answers audit* browser capacity claims config corpus costs decision effective figures* findings gains headline
    inside limits manifest measures outcomes own_claims preserve readings* report_entry reports runfolders runlogs runs
    stats studies study tasks variants verdict""",
    "bridges losses pair",
    """attention batches causal checkpoints decoding diagnostics evaluator fetch finished generation pretrain probes
    steps train trainer""",
    "cli headless launch swap sweep",
)
HEAVY = {"torch", "transformers", "accelerate", "datasets", "peft"}
LONGEST = 400
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path != PACKAGE / "__init__.py"
}


def layers_of(module: str) -> list[int]:
    """The layers that name `module` (`bridges.dit` counts as `bridges`): one, if all is well."""
    top = module.split(".")[0]
    return [n for n, names in enumerate(LAYERS) if any(fnmatch(top, pattern) for pattern in names.split())]


def in_layer(layer: int) -> list[str]:
    return [module for module in MODULES if layer in layers_of(module)]


def imported_names(module: str) -> set[str]:
    """Every module that a file imports anywhere, inside functions too; relative imports made absolute."""
    package = ["bridgekit", *module.split(".")]
    if MODULES[module].name != "__init__.py":
        package.pop()
    names = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(), module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def heavy_imports(module: str) -> set[str]:
    return {name.split(".")[0] for name in imported_names(module)} & HEAVY


def siblings(module: str) -> set[str]:
    """The modules of this package that a module imports."""
    names = {name.removeprefix("bridgekit.") for name in imported_names(module) if name.startswith("bridgekit.")}
    found = {name for name in names if name in MODULES}
    # `from bridgekit.bridges import dit` names the package and the module; it is the module that is meant.
    return {name for name in found if not any(other.startswith(name + ".") for other in found)} - {module}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_belongs_to_one_layer_and_imports_downward(module):
    layers = layers_of(module)
    assert layers, f"bridgekit/{module} is new: enter it in its layer, in LAYERS of tests/test_layers.py"
    assert len(layers) == 1, f"bridgekit/{module} stands in the layers {layers}; it belongs to one"
    for other in siblings(module):
        above = [layer for layer in layers_of(other) if layer > layers[0]]
        assert not above, f"{module} (layer {layers[0]}) imports {other} (layer {above[0]}): imports point downward"


@pytest.mark.parametrize("module", in_layer(0) + in_layer(3))
def test_facts_and_edges_never_import_the_tensor_libraries(module):
    assert not heavy_imports(module), f"bridgekit/{module} imports {', '.join(heavy_imports(module))}"


def test_no_circles():
    """Follow imports from every module; meeting a module that is still open closes a circle."""
    done: set[str] = set()

    def follow(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " imports ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(siblings(module)):
                follow(other, (*trail, module))
            done.add(module)

    for module in MODULES:
        follow(module, ())
    assert done == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_file_stays_readable(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= LONGEST, f"bridgekit/{module} has {lines} lines: split it (longest allowed: {LONGEST})"


def loaded_by(*modules: str) -> set[str]:
    """The top-level modules of a fresh interpreter after importing `modules`."""
    code = f"import sys, {', '.join(modules)}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(child.stdout.split())


def test_importing_the_package_is_cheap():
    slow = HEAVY | {"numpy", "pandas", "scipy", "matplotlib", "seaborn", "IPython", "papermill"}
    assert not loaded_by("bridgekit") & slow


def test_facts_and_edges_load_no_tensor_library():
    """Also not through other packages: pandas or papermill must not be made to bring torch along."""
    assert not loaded_by(*(f"bridgekit.{module}" for module in in_layer(0) + in_layer(3))) & HEAVY
