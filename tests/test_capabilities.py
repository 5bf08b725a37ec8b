"""What could be asked for by name before the restructuring can be asked for now.

tests/goldens/capabilities.json lists what the old code offered by name, and where each is `now`: a pointer
`kind: name` that is found in the present code, `file: path`, `text: path | words in it`, or `gone: why`.

python -m pytest tests/test_capabilities.py
"""

import ast
import contextlib
import io
import json
import re
from pathlib import Path

import nbformat
import pytest

from bridgekit import cli
from bridgekit.audit.keep import keep_run
from bridgekit.config import CONDITIONS, CONTROLS, KEYS, load_config, to_flat
from bridgekit.results.verdict import RIVALS, RULE, SUBSETS
from bridgekit.runs import load_jsonl

ROOT = Path(__file__).parent.parent
CAPABILITIES = json.loads((ROOT / "tests/goldens/capabilities.json").read_text())


def usage(command, *arguments: str) -> set[str]:
    """The words of the usage that a command prints: its arguments, options and choices."""
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.raises(SystemExit):
        command([*arguments, "--help"])
    return set(re.findall(r"[\w-]+", printed.getvalue().split("\n\n")[0]))


def list_commands():
    from bridgekit.train import worker

    for verb in (*cli.VERBS, *cli.FORWARDED):
        yield f"verb: {verb}"
        yield from (f"option: {verb} {word}" for word in usage(cli.main, verb))
    yield from (f"option: worker {word}" for word in usage(worker.main))
    for line in (ROOT / "Makefile").read_text().splitlines():
        yield from (f"make: {target}" for target in re.findall(r"^([a-z0-9]+):.* ## ", line))
        yield from (f"make variable: {name}" for name in re.findall(r"^([A-Z]+) *\?=", line))


def list_settings():
    for name, known in KEYS.items():
        yield f"key: {name}"
        yield from (f"key: {name} = {choice}" for choice in known.allowed if isinstance(known.allowed, tuple))
    yield from (f"rival: {name}" for name in RIVALS)
    yield from (f"subset: {name} {json.dumps(rows, sort_keys=True)}" for name, rows in SUBSETS.items())
    yield from (f"rule: {subset}: {', '.join(RULE)}" for subset in ("all", "source_only"))


def list_notebooks():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            if cell.cell_type == "markdown":
                yield from (f"section: {path.stem}: {text}" for text in re.findall(r"^#+ (.+)$", cell.source, re.M))
                continue
            tree = ast.parse(cell.source)
            if cell.metadata.get("tags"):
                yield from (f"parameter: {path.stem} {node.targets[0].id}" for node in tree.body)
            for node in ast.walk(tree):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "save_figure":
                    yield f"figure: {path.stem} {ast.unparse(node.args[1].right)}"


@pytest.fixture(scope="module")
def run_files(tiny, make_experiment, tmp_path_factory):
    """The names of all files of a run with every condition and control, of its runs folder and of it when kept."""
    from bridgekit.train import worker

    experiment = make_experiment(
        tiny(steps=2, n_test=8, val_samples=4, n_val=8, max_new_tokens=4, conditions=CONDITIONS, controls=CONTROLS,
             injector="prefix+residual", noise_floor=True)
    )  # fmt: skip
    worker.record_provenance(experiment.folder, experiment.provenance())
    worker.run_training(experiment)
    run, found = experiment.folder, set()
    kept = keep_run(run, tmp_path_factory.mktemp("kept"))
    for where, folder in {"run file": run, "runs folder": run.parent, "kept file": kept}.items():
        found |= {f"{where}: {path.relative_to(folder)}" for path in folder.rglob("*") if path.is_file()}
    for path in run.glob("*.json*"):
        rows = load_jsonl(path) if path.suffix == ".jsonl" else [json.loads(path.read_text())]
        found |= {f"run file: {path.name} {key}" for row in rows for key in row}
    return found


@pytest.fixture(scope="module")
def present(run_files) -> set[str]:
    return {*list_commands(), *list_settings(), *list_notebooks(), *run_files}


@pytest.mark.parametrize("what", dict.fromkeys(entry["what"] for entry in CAPABILITIES))
def test_what_could_be_asked_for_is_there(what, present):
    entries = [entry for entry in CAPABILITIES if entry["what"] == what]
    lost = [entry["name"] for entry in entries if not is_there(entry["now"], present)]
    for entry in entries:
        if what in ("option", "configuration key"):  # with the choices that it had
            place = entry["now"] + " =" if what == "configuration key" else entry["now"].rpartition(" ")[0]
            choices = [f"{place} {choice}" for choice in entry["detail"].get("choices", [])]
            lost += [choice for choice in choices if choice not in present]
    assert not lost, "\n".join(lost)


def is_there(now: str, present: set[str]) -> bool:
    kind, name = now.split(": ", 1)
    path, _, words = name.partition(" | ")
    if kind == "gone":
        return bool(name)
    if kind in ("file", "text"):
        return (ROOT / path).exists() and (not words or words in (ROOT / path).read_text())
    return now in present


def test_a_key_has_the_default_that_it_had():
    now = to_flat(load_config())
    for entry in CAPABILITIES:
        if entry["what"] == "configuration key":
            default = now[entry["name"]]
            default = list(default) if isinstance(default, tuple) else default
            assert default == entry["detail"].get("resolved default", entry["detail"]["default"]), entry["name"]
