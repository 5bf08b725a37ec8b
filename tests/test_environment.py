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
FILES = ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile", ".ci/install", ".ci/run")


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    """{canonical name: version} of constraints.txt; a line that is not one exact pin fails."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.+!-]+( *;.*)?", line) for line in lines)
    names = {canonicalize_name(Requirement(line).name): str(Requirement(line).specifier)[2:] for line in lines}
    assert len(names) == len(lines), "pinned twice"
    return names


@pytest.mark.parametrize("requirement", DECLARED, ids=lambda requirement: requirement.name)
def test_every_declared_range_holds_its_pin(requirement, pins):
    version = pins.get(canonicalize_name(requirement.name))
    assert version, f"{requirement.name}: declared in pyproject.toml, not pinned in constraints.txt"
    assert requirement.specifier.contains(version), f"{version} is outside {requirement}"


def test_pins_cover_what_the_declared_packages_need(pins):
    """Nothing that is installed for this project is left to float (torch itself pins CUDA packages)."""
    todo, seen = list(DECLARED), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *sorted(requirement.extras)) in seen or re.match(r"nvidia-|cuda-|triton$", name):
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in pins, f"{name}: needed, but not pinned in constraints.txt"
        try:
            installed = distribution(name)
        except PackageNotFoundError:  # another Python's or platform's package
            continue
        if installed.version.split("+")[0] != pins[name]:  # its needs are not those of the pinned version
            continue
        needs, extras = map(Requirement, installed.requires or []), ["", *requirement.extras]
        todo += [n for n in needs if n.marker is None or any(n.marker.evaluate({"extra": e}) for e in extras)]


def test_conda_users_get_the_same_environment(pins):
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (pip,) = [line["pip"] for line in lines if isinstance(line, dict)]
    (python,) = [line for line in lines if str(line).startswith("python")]
    allowed, accepted = SpecifierSet(python.removeprefix("python")), SpecifierSet(PROJECT["requires-python"])
    for version in (f"3.{minor}.9" for minor in range(8, 20)):  # conda may offer no Python that pyproject.toml refuses
        assert not allowed.contains(version) or accepted.contains(version), python
    assert "pip" in lines and {"--constraint constraints.txt", "--editable ."} <= set(pip)
    listed = {r.name: str(r.specifier) for r in (Requirement(line) for line in pip if not line.startswith("-"))}
    assert listed == {r.name: f"=={pins[canonicalize_name(r.name)]}" for r in DECLARED}


def test_torch_is_a_range_for_the_package_and_a_pin_for_the_set_up(pins):
    (torch,) = [r for r in DECLARED if r.name == "torch"]
    assert "==" not in str(torch.specifier) and "torch" in pins
    assert "^torch==" in (ROOT / ".ci/install").read_text(), "the pin must stand in the install command itself"


def test_no_registry_address_in_any_set_up_file_and_this_python_is_accepted():
    for name in FILES:
        assert not REGISTRY.search((ROOT / name).read_text()), name
    assert not (ROOT / "uv.lock").exists(), "uv.lock records registry addresses"
    assert SpecifierSet(PROJECT["requires-python"]).contains(".".join(map(str, sys.version_info[:3])))


def test_every_third_party_import_of_the_package_is_declared():
    packages = {"yaml": "pyyaml", "IPython": "ipykernel", "nbclient": "papermill"}  # import name -> its package
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    for path in (ROOT / "bridgekit").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"bridgekit"}:
                package = canonicalize_name(packages.get(top, top))
                assert package in declared, f"{path.name} imports {top}: declare it in pyproject.toml"
