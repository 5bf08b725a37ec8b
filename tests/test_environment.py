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
PYTHON = SpecifierSet(PROJECT["requires-python"])
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


def test_pins_fit_and_cover_what_the_declared_packages_need(pins):
    """Nothing that is installed for this project is left to float (torch itself pins CUDA packages)."""
    todo, seen = list(DECLARED), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen or re.match(r"nvidia-|cuda-|triton$", name):
            continue
        seen.add(str(requirement))
        assert name in pins, f"{name}: needed, but not pinned in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{pins[name]} is outside {requirement}"
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
    (python,) = [line.removeprefix("python") for line in lines if str(line).startswith("python")]
    for version in (f"3.{minor}.9" for minor in range(8, 20)):  # conda may offer no Python that pyproject.toml refuses
        assert PYTHON.contains(version) or not SpecifierSet(python).contains(version), version
    assert "pip" in lines and {"--constraint constraints.txt", "--editable ."} <= set(pip)
    listed = {r.name: str(r.specifier) for r in (Requirement(line) for line in pip if not line.startswith("-"))}
    assert listed == {r.name: f"=={pins[canonicalize_name(r.name)]}" for r in DECLARED}


def test_set_up_files_name_no_registry_and_torch_s_pin_stands_in_the_install_command():
    for name in FILES:
        assert not REGISTRY.search((ROOT / name).read_text()), name
    assert not (ROOT / "uv.lock").exists(), "uv.lock records registry addresses"
    assert "^torch==" in (ROOT / ".ci/install").read_text()
    assert PYTHON.contains(".".join(map(str, sys.version_info[:3])))


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
