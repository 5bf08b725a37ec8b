"""pyproject.toml (ranges), constraints.txt (exact versions) and environment.yml (conda) agree.

python -m pytest tests/test_environment.py
"""

import ast
import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = [Requirement(line) for line in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]]
REGISTRY = re.compile(r"https?://|file:/|git\+|--(extra-)?index-url|--find-links|--trusted-host")


def read_pins() -> dict[str, str]:
    """{canonical name: version} of constraints.txt; a line that is not one exact pin fails."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {}
    for line in lines:
        requirement = Requirement(line)
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and "*" not in specifier.version, line
        assert canonicalize_name(requirement.name) not in pins, f"pinned twice: {line}"
        pins[canonicalize_name(requirement.name)] = specifier.version
    return pins


def conda() -> tuple[list[str], list[str]]:
    """The conda lines and the pip lines of environment.yml."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [line["pip"] for line in lines if isinstance(line, dict)]
    return [line for line in lines if isinstance(line, str)], pip


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_every_declared_range_holds_its_pin(requirement):
    pins = read_pins()
    name = canonicalize_name(requirement.name)
    assert name in pins, f"{requirement.name}: declared in pyproject.toml, not pinned in constraints.txt"
    assert requirement.specifier.contains(pins[name]), f"{name}: {pins[name]} is outside {requirement.specifier}"


def test_pins_cover_what_the_declared_packages_need():
    """Nothing that is installed for this project is left to float (torch itself pins CUDA packages)."""
    pins, todo, seen = read_pins(), list(DECLARED), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        if re.match(r"nvidia-|cuda-|triton$", name):
            continue
        assert name in pins, f"{name}: needed, but not pinned in constraints.txt"
        try:
            installed = distribution(name)
        except PackageNotFoundError:  # another Python's or platform's package
            continue
        if installed.version.split("+")[0] != pins[name]:  # its needs are not those of the pinned version
            continue
        needs = [Requirement(line) for line in installed.requires or []]
        extras = ["", *requirement.extras]
        todo += [n for n in needs if n.marker is None or any(n.marker.evaluate({"extra": e}) for e in extras)]


def test_conda_users_get_the_same_environment():
    conda_lines, pip_lines = conda()
    python = next(line for line in conda_lines if line.startswith("python"))
    assert "pip" in conda_lines
    allowed = SpecifierSet(python.removeprefix("python"))
    for minor in range(8, 20):  # conda may offer no Python that pyproject.toml refuses
        if allowed.contains(f"3.{minor}.9"):
            assert SpecifierSet(PROJECT["requires-python"]).contains(f"3.{minor}.9"), python
    assert "--constraint constraints.txt" in pip_lines
    assert "--editable ." in pip_lines
    listed = [Requirement(line) for line in pip_lines if not line.startswith("-")]
    assert sorted(r.name for r in listed) == sorted(r.name for r in DECLARED)
    pins = read_pins()
    for requirement in listed:
        assert str(requirement.specifier) == f"=={pins[canonicalize_name(requirement.name)]}", requirement.name


def test_torch_is_a_range_for_the_package_and_a_pin_for_the_set_up():
    (torch,) = [r for r in DECLARED if r.name == "torch"]
    assert "==" not in str(torch.specifier)
    assert "^torch==" in (ROOT / ".ci/install").read_text(), "the pin must stand in the install command itself"
    assert "torch" in read_pins()


@pytest.mark.parametrize(
    "name", ["pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/install", ".ci/run"]
)
def test_no_registry_address_in_any_set_up_file(name):
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        assert not REGISTRY.search(line), f"{name}:{number}: {line}"
    assert not (ROOT / "uv.lock").exists(), "uv.lock records registry addresses"


def test_this_python_is_one_the_project_accepts():
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


def test_every_third_party_import_of_the_package_is_declared():
    modules = {
        "yaml": "pyyaml",
        "IPython": "ipykernel",
        "nbclient": "papermill",
    }  # import name -> its package
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for path in (ROOT / "bridgekit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"bridgekit"}:
                package = canonicalize_name(modules.get(top, top))
                assert package in declared, f"{path.name} imports {top}: declare it in pyproject.toml"
