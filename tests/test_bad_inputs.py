"""Two hundred bad inputs and five hundred mutated configurations: each is refused in one line, before a run exists.

python -m pytest tests/test_bad_inputs.py

`bad_inputs.yaml` is the table: by class, a command as it is typed and what its one line must name: the key or the file,
and the way out. The commands run in a project that is made once; none may write anything into it.
"""

import json
import lzma
import random
import re
import shlex
import shutil
import tarfile
from pathlib import Path

import huggingface_hub.constants
import nbformat
import papermill
import pytest
import yaml

from bridgekit import alive, cli
from bridgekit.config import KEYS, load_config

ROOT = Path(__file__).parent.parent
CLASSES = yaml.safe_load((ROOT / "tests/bad_inputs.yaml").read_text())
ROWS = [pytest.param(*row, id=f"{kind}-{n:02d}") for kind, rows in CLASSES.items() for n, row in enumerate(rows, 1)]
RUN = ROOT / "preserved_data" / "phase1_cpu_seed1"
PAIR = ROOT / "bridgekit" / "model" / "embedded_pair"


# -- a project with everything that can be wrong ----------------------------------------------------------------------


def write(path: Path, content: str | bytes = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def copy_wrong(good: Path, folder: Path, files: dict[str, str | bytes | None]) -> None:
    """A copy of a folder in which these files hold something else, or, where it is None, are gone."""
    shutil.copytree(good, folder, copy_function=shutil.copyfile)
    for file, content in files.items():
        (folder / file).unlink(missing_ok=True)
        if content is not None:
            write(folder / file, content)


def make_parameters(folder: Path) -> None:
    """Files of parameters, of studies and of batches."""
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9))
    small = "source_model=embedded target_model=embedded prompt_format=plain inject_from=auto n_train=200 n_val=100"
    texts = {
        "twice": "steps: 3\nsteps: 4",
        "twice_deep": "train: {steps: 3, lr: 0.1, steps: 4}",
        "bomb": bomb,
        "itself": "overrides: &a [*a]",
        "latin": "name: caf\xe9".encode("latin-1"),
        "object": "name: !!python/object/apply:os.system [id]",
        "format": "format: 9",
        "octal": "steps: 0100",
        "on": "steps: on",
        "huge": f"steps: {'9' * 400}",
        "deep": "a: " + "[" * 3000,
        "long": "a: " + "b" * 300_000,
        "override_key": "overrides: [train.stps=3]",
        "escape": 'name: "a\\u001bb"',
        "gsm8k": f"overrides: [{', '.join(f'{small} n_test=80 val_samples=80'.split())}]",
        "own": "controls: [constant]\nconditions: [source, target, bridged]",
    }
    for name, text in texts.items():
        write(folder / "p" / f"{name}.yaml", text)
    (folder / "p" / "folder.yaml").mkdir()
    base = f"base: {ROOT}/parameters/phase1_smoke.yaml\n"
    two = "variants: {a: {}, b: {depth: 1}}"
    studies = {
        "empty": "",
        "unknown": f"{base}{two}\nseedz: [1]",
        "one": f"{base}variants: {{a: {{}}}}",
        "seeds": f"{base}{two}\nseeds: '12'",
        "seed_twice": f"{base}{two}\nseeds: [1, 1]",
        "same": f"{base}variants: {{a: {{}}, b: {{decode_every: 3}}}}",
        "key": f"{base}variants: {{a: {{}}, b: {{dpeth: 1}}}}",
        "value": f"{base}variants: {{a: {{}}, b: {{depth: 0}}}}",
        "after": f"{base}variants: {{a: {{after: c}}, b: {{depth: 1}}}}",
        "variant_name": f"{base}variants: {{a: {{}}, ../b: {{depth: 1}}}}",
        "reference": f"{base}{two}\nreference: c",
        "base_gone": f"base: parameters/none.yaml\n{two}",
        "base_type": f"base: 3\n{two}",
        "grid": f"{base}grid: {{depth: 3}}",
        "pairs": f"{base}{two}\npairs: {{p: {{seed: 3}}}}",
        "replicate": f"{base}{two}\nreplicates: {{a: c}}",
        "missing_data": f"base: {ROOT}/parameters/phase1_gsm8k.yaml\n{two}",
        "too_long": f"{base}variants: {{a: {{}}, b: {{n_soft_tokens: 1024}}}}",
        "cuda": f"{base}{two}\noverrides: [pair.target_device=cuda]",
    }
    for name, text in studies.items():
        write(folder / "s" / f"{name}.yaml", text)
    phase1 = "notebook: notebooks/phase1.ipynb"
    entries = {
        "both": f"{phase1}, study: s/key.yaml",
        "neither": "parameters: parameters/phase1_smoke.yaml",
        "unknown": f"{phase1}, parameter: parameters/phase1_smoke.yaml",
        "gone": "notebook: notebooks/none.ipynb",
        "cell": "notebook: n/none.ipynb",
        "other": f"{phase1}, parameters: {ROOT}/parameters/swap_smoke.yaml",
        "files": f"{phase1}, parameters: {{a: 1}}",
        "override": f"{phase1}, overrides: [train.stpes=3]",
        "overrides": f"{phase1}, overrides: train.steps=3",
        "study": "study: s/key.yaml",
    }
    batches = {name: f"entries: [{{{text}}}]" for name, text in entries.items()}
    batches |= {
        "empty": "",
        "text": "entries: night",
        "list": f"- {phase1}",
        "keys": f"entries: [{{{phase1}}}]\njobs: 3",
    }
    batches |= {"site_key": "partitoin: gpu", "site_time": "time: 3600", "site_modules": "modules: gcc"}
    for name, text in batches.items():
        write(folder / "b" / f"{name}.yaml", text)


def make_notebooks(folder: Path) -> None:
    """Notebooks whose parameters cell is broken, and files that are none."""

    def tagged(source: str):
        return nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})

    cells = {
        "magic": [tagged("%matplotlib inline\nsteps = 3")],
        "syntax": [tagged("steps = (")],
        "computed": [tagged("steps = 2 * warmup")],
        "tuple": [tagged("a, b = 1, 2")],
        "attribute": [tagged("config.steps = 3")],
        "two": [tagged("steps = 3"), tagged("steps = 4")],
        "none": [],
    }
    for name, some in cells.items():
        write(folder / "n" / f"{name}.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=some)))
    texts = {
        "empty": "",
        "list": "[]",
        "object": "{}",
        "cut": (ROOT / "notebooks/phase1.ipynb").read_text()[:900],
        "bytes": b"\xff\xfe\x00",
        "future": '{"nbformat": 99, "nbformat_minor": 0, "metadata": {}, "cells": []}',
    }
    for name, text in texts.items():
        write(folder / "n" / f"{name}.ipynb", text)


def make_pairs(folder: Path) -> None:
    """Copies of the embedded pair whose target, or whose record, lacks something."""
    wrong = {  # {name: {file: what it holds, None: it is gone}}
        "no_config": {"target/config.json": None},
        "no_weights": {"target/model.safetensors": None},
        "no_tokenizer": {"target/tokenizer.json": None},
        "bad_config": {"target/config.json": "{"},
        "list_config": {"target/config.json": "[]"},
        "mamba": {"target/config.json": '{"model_type": "mamba"}'},
        "pickled": {"target/model.safetensors": None, "target/pytorch_model.bin": "x"},
        "bad_tokenizer": {"target/tokenizer.json": "{"},
        "empty_weights": {"target/model.safetensors": ""},
        "cut_weights": {"target/model.safetensors": (PAIR / "target/model.safetensors").read_bytes()[:5000]},
        "no_record": {"pair.json": None},
        "list_record": {"pair.json": "[]"},
        "other_lexicon": {"pair.json": '{"lexicon_seed": 1, "lexicon": "0"}'},
    }
    for name, files in wrong.items():
        copy_wrong(PAIR, folder / "m" / name, files)
    write(folder / "m" / "file", "no folder")
    write(folder / "m" / "made" / "pair.json", "{}")


TASKS = """
from bridgekit.tasks import Example, from_jsonl

class Texts:
    def examples(self, config, split):
        return ["a question"] * 20_000

class Wrong:
    def examples(self, config, split):
        return [Example(id=f"{i}", split=split, question="a", solution="#### 3", gold="4") for i in range(20_000)]

class Breaks:
    def examples(self, config, split):
        return [1 / 0]

class Cut:
    def examples(self, config, split):
        return from_jsonl("d/cut.jsonl.gz", split)

class Needs(Cut):
    def __init__(self, folder):
        self.folder = folder
"""
PARTS = """
from torch import nn

class Narrow(nn.Module):
    def __init__(self, config, n_layers, source_dim, target_dim):
        super().__init__()
        self.net, self.k = nn.Linear(n_layers * source_dim, 7), config.n_soft_tokens

    def forward(self, states, mask):
        return self.net(states.mean(1))[:, None].expand(-1, self.k, -1)
"""


def make_data(folder: Path) -> None:
    """Folders of real questions with broken rows, and objects of a user's own."""
    rows = [f'{{"question": "What is {i} + 1?", "answer": "#### {i + 1}"}}\n' for i in range(500)]
    good, test = "".join(rows[:400]), "".join(rows[400:])
    train = {
        "few": rows[0],
        "no_test": good,
        "empty": "",
        "no_json": "hello\n",
        "cut": good[:-20],
        "no_gold": '{"question": "a", "answer": "none"}\n',
        "list": "[1, 2]\n",
        "bytes": b"\xff\xfe\n",
        "cut_list": '[{"question": ',
        "good": good,
    }
    for name, text in train.items():
        write(folder / "d" / name / "train.jsonl", text)
        if name != "no_test":
            write(folder / "d" / name / "test.jsonl", test)
    write(folder / "d" / "cut.jsonl.gz", b"\x1f\x8b\x08\x00broken")
    write(folder / "own" / "tasks.py", TASKS)
    write(folder / "own" / "parts.py", PARTS)


def make_runs(folder: Path) -> None:
    """Copies of a kept run that lost something, are not finished, or were made of other things."""
    answers, bridge = "eval_samples_step_final.jsonl.gz", "checkpoint/bridged.safetensors"
    config = (RUN / "config.yaml").read_text().removeprefix("format: 2\n")
    wrong = {  # {name: {file: what it holds, None: it is gone}}
        "good": {},
        "again": {},
        "bad_config": {"config.yaml": "run: ["},
        "twice_config": {"config.yaml": config + "eval: {}\n"},
        "future": {"config.yaml": "format: 9\n" + config},
        "other_steps": {"config.yaml": config.replace("steps: 450", "steps: 451").replace("seed: 1", "seed: 2")},
        "no_answers": {answers: None},
        "cut": {answers: (RUN / answers).read_bytes()[:50_000]},
        "no_gzip": {answers: "hello"},
        "failed": {"status.json": '{"state": "failed", "error": "out of memory"}'},
        "bad_provenance": {"provenance.json": "{"},
        "no_pair": {"provenance.json": "{}"},
        "no_bridge": {bridge: None},
        "cut_bridge": {bridge: "cut"},
        "code": {"code/code.json": "{}"},
    }
    for name, files in wrong.items():
        copy_wrong(RUN, folder / "r" / name, files)
    (folder / "r" / "empty").mkdir()


def make_archives(folder: Path) -> None:
    """Kept studies that are no archive, or would write what and where they should not; claims that are none."""
    home = folder / "preserved_data" / "studies"
    (folder / "runs" / ".studies").mkdir(parents=True)  # where they are unpacked
    write(home / "text.tar.xz", "hello")
    write(home / "empty.tar.xz", "")
    write(home / "cut.tar.xz", (ROOT / "preserved_data/studies/values.tar.xz").read_bytes()[:50_000])
    link = {"type": tarfile.SYMTYPE, "linkname": "/etc"}
    members = {  # {archive: {member: its header}}
        "escape": {"../escaped/config.yaml": {}},
        "large": {"x_a_seed1/config.yaml": {"size": 5 << 30}},  # says so, and is cut: it must not be believed first
        "many": {f"x_a_seed1/{i}": {} for i in range(10_001)},
        "link": {"x_a_seed1": link},
    }
    for archive, headers in members.items():
        entries = [tarfile.TarInfo(member) for member in headers]
        for entry, header in zip(entries, headers.values(), strict=True):
            for name, value in header.items():
                setattr(entry, name, value)
        write(home / f"{archive}.tar.xz", lzma.compress(b"".join(e.tobuf() for e in entries) + bytes(1024), preset=0))
    texts = {
        "number": "claims: 3",
        "open": "claims: [",
        "twice": "claims: []\nclaims: []",
        "bytes": b"\xff\xfe",
        "key": "claims: [{id: a, document: d, says: s, value: 1, colour: red, measure: {value: {}}}]",
    }
    for name, text in texts.items():
        write(folder / "k" / name / "claims.yaml", text)


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write(folder / "pyproject.toml")
    for name in ("parameters", "notebooks"):
        (folder / name).symlink_to(ROOT / name)
    for make in (make_parameters, make_notebooks, make_pairs, make_data, make_runs, make_archives):
        make(folder)
    return folder


# -- the table --------------------------------------------------------------------------------------------------------


def list_files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.fixture
def nothing_starts(monkeypatch):
    """What is not refused would train for minutes; it fails here instead."""

    def start(*arguments, **options):
        raise AssertionError(f"was not refused, but started {arguments[1:2]}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no test waits for a network
    monkeypatch.setattr(alive.Child, "__init__", start)
    monkeypatch.setattr(papermill, "execute_notebook", start)


def test_the_table_has_eleven_classes_of_twenty_and_nothing_twice():
    assert all(len(rows) == 20 for rows in CLASSES.values()) and len(CLASSES) == 11
    assert len({row[0] for rows in CLASSES.values() for row in rows}) == 20 * len(CLASSES)


@pytest.mark.parametrize(("command", "named", "way_out"), ROWS)
def test_a_bad_input_is_refused_in_one_line(project, capsys, monkeypatch, nothing_starts, command, named, way_out):
    """`NAME=value` in front of a command is the environment's."""
    words = shlex.split(command)
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    monkeypatch.setenv("BRIDGEKIT_COMMAND", "")  # `main` writes it for the children
    monkeypatch.chdir(project)
    before = list_files(project)
    assert cli.main(words) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith(("error: ", "bad: ")) and out.err.count("\n") == 1, out.out + out.err
    assert named in out.err and way_out in out.err, out.err
    assert len(out.err) < 1200 and "Traceback" not in out.err and list_files(project) == before


# -- mutated configurations -------------------------------------------------------------------------------------------

VALUES = r"""-1  0  1  2.5  1e-4  1.0e+300  .nan  -.inf  0100  1:30  0x1F  yes  null  ~  ''  text  'a b'  []  [1]
[source, [target]]  [source, target, bridged]  {}  {a: 1}  2026-11-22  *gone  &a 3  &a [*a]  !!python/name:os.system
!!binary aGk=  !!timestamp 2026-99-99  !!bool maybe  !!set {a}  "\u0000"  "\ud800"  "\e[31m"  ../../etc  /dev/null
~/runs  a/b.py:C  embedded  org/name  geometry:tiny  cuda:99  soft_only  auto  @  `  %  {  ]  - 1  [[[[
"a  'b  :  #c"""
VALUES = re.split(r"  |\n", VALUES)
VALUES += ["|\n  two\n  lines", "9" * 30, "9" * 5000, f"'{'x' * 3000}'", "\x07", "a\0b"]
VALUES += ["\N{GREEK SMALL LETTER ALPHA}", "\N{ZERO WIDTH SPACE}", "\N{PILE OF POO}", "\N{RIGHT-TO-LEFT OVERRIDE}a"]


def mutate(rng: random.Random) -> str:
    """A parameters file with some keys that have no business there, or are no values of theirs."""
    lines = []
    for key in rng.sample(sorted(KEYS), rng.randint(1, 3)):
        default, _, allowed, _ = KEYS[key]
        fitting = [str(allowed[0]) or "''"] if allowed and isinstance(allowed, tuple) else [json.dumps(default)]
        value = rng.choice(VALUES) if rng.random() < 0.7 else rng.choice(fitting)
        section, name = key.split(".")
        misspelt = name[: rng.randrange(len(name))] + rng.choice("aexyz_. ") + name[rng.randrange(len(name)) :]
        form = rng.choice(
            ["{name}: {value}", "{key}: {value}", "{section}: {{{name}: {value}}}", "overrides: ['{key}={value}']"]
        )
        name = misspelt if rng.random() < 0.15 else name
        lines.append(form.format(name=name, key=key, section=section, value=value))
    if rng.random() < 0.15:
        lines.append(rng.choice(lines))  # a name twice
    text = "\n".join(lines)
    return text[: rng.randrange(len(text))] if rng.random() < 0.1 else text


def test_five_hundred_mutated_configurations_are_loaded_or_refused_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("BRIDGEKIT_COMMAND", "")
    monkeypatch.chdir(tmp_path)
    ended, path = [], tmp_path / "mutated.yaml"
    for seed in range(500):
        path.write_bytes(mutate(random.Random(seed)).encode("utf-8", "surrogatepass"))
        code = cli.main(["config", "-f", str(path)])
        out, text = capsys.readouterr(), path.read_bytes()
        is_refused = (
            code == 2 and out.out == "" and out.err.startswith(("error: ", "bad: ")) and out.err.count("\n") == 1
        )
        assert is_refused and len(out.err) < 1200 or code == 0 and out.err == "", (seed, text, out.err)
        if code == 0:  # what is accepted is what is written into a run
            assert load_config(path).train.steps >= 0
        ended.append(code)
    assert ended.count(0) > 40 and ended.count(2) > 300 and list(tmp_path.iterdir()) == [path]
