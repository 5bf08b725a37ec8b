"""Runs as records: of the first experiments, of the compact tables kept of them, and of this package.

    for folder in find_runs("preserved_data"):
        record = load_run(folder)
        record.at("final")                # frame by index: gold, <condition>_pred, <condition>_correct

Reading never changes a file and never stops at a damaged one: what is wrong is listed in `record.problems`. A log of
the first experiments mixes four processes, progress bars, carriage returns and generated text: it is searched for the
few phrases that carry facts.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from bridgekit import config as configuration
from bridgekit.results.preserve import EVAL_FILE, find_runs, generation_of
from bridgekit.runs import INVALID, load_json, load_jsonl, load_run_config

SETTINGS_AS_FACTS = {"world_size": "world_size", "translator_params_m": "parameters_m", "gpu": "gpu"}  # in config.yaml
PATH_KEYS = ("log_dir", "save_path")  # where a run was written is no part of its configuration
INERT = (  # keys of the first experiments: (without effect when this holds, beginnings of the settings concerned)
    (lambda c: not c.get("decode_loss_weight", 1), ("decode_interval", "decode_samples", "decode_max_length")),
    (lambda c: c.get("bridge", "dit") != "dit", ("dit_",)),
    (lambda c: not c.get("dit_loss_weight", 1), ("dit_loss_warmup",)),
    (lambda c: c.get("soft_injection", "adapter") != "adapter", ("adapter_scale",)),
    (lambda c: True, ("show_eval_samples",)),
)
FACTS = {  # fact: (what the log says, what that is); said several times, the last counts
    "world_size": (r"(?:World size:|Sharding \d+ samples across) (\d+)", int),
    "gpu": (r"GPU 0: (.+)", str.strip),
    "parameters_m": (r"Translator parameters: (\d+\.?\d*)M", float),
    "saved_best": (r"Saved BEST translator \(acc=(\d+\.?\d*)\)", float),
    "stopped_at": (r"Stopping early at step (\d+)", int),
}
TABLES = {  # of a compact copy, and how they are read: steps and labels are compared as text
    "losses.csv": {},
    "logged.csv": {"dtype": {"step": str}},
    "outcomes.csv.gz": {"dtype": str, "keep_default_na": False},
}
SECTION = 1 << 16  # a configuration block or traceback is never longer than this
REPORTED = 5  # of each kind of damage, this many lines are named
_STAMP = re.compile(r"_?(\d{8})_(\d{6})")
_LOSS = re.compile(r"Step (\d+)/(\d+) \| Loss \(avg over last \d+\): ([-+.\w]+)((?: \| \w+: [-+.\w]+)*)")
_PART = re.compile(r"\| (\w+): ([-+.\w]+)")
_EVALUATION = re.compile(r"\[(?:Eval\] Step (\d+) \||Final Eval\])(.*)")
_ACCURACY = re.compile(r"([A-Z]\w*)(?:-alone)? acc: ([-+.\w]+)")
_SETTING = re.compile(r"([a-z][a-z0-9_]*): (.*)")
_BLOCK_END = re.compile(
    r"^(?:==== |\[Eval\]|\[Final|\[Distributed|Step \d+/|World size|Translator par).*", re.MULTILINE
)
_END = re.compile(r"End time: \w{3} (\w{3} +\d+) ([\d:]+(?: [AP]M)?)(?: [A-Z]{2,5})? (\d{4})")
_CRASH = r"Traceback \(most recent call last\):|CUDA out of memory|oom_kill|oom-kill|SIGKILL|exceeded memory limit"
_FRAME = re.compile(r'File "([^"\n]+)", line (\d+), in (.+)(?=\n(.*))?')
_ERROR = re.compile(r"^(?:\[rank(\d+)\]: ?)?([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*)", re.MULTILINE)
_LIBRARY = re.compile(r"(?:site|dist)-packages/|/lib(?:64)?/python\d")
_MEMORY = re.compile(r"out of memory|OutOfMemory|oom[-_]kill|memory limit", re.IGNORECASE)
_PER_GIB = {"GiB": 1, "MiB": 2**10, "KiB": 2**20, "bytes": 2**30}
_GIB = r"(\d+\.?\d*) (GiB|MiB|KiB|bytes)"
_AMOUNTS = {
    "asked_gib": f"allocate {_GIB}",
    "total_gib": f"capacity of {_GIB}",
    "in_use_gib": f"{_GIB} (?:memory in use|already allocated)",
}


class MissingData(ValueError):
    """What is asked of a run is not among the data that were kept of it."""


@dataclass
class Record:
    """Everything that claims, findings and tables need to know about one run."""

    name: str
    folder: Path
    generation: str  # first | bridgekit | derived (a compact copy of the first)
    config: dict = field(default_factory=dict)  # flat; dotted keys for this package's runs
    facts: dict = field(default_factory=dict)  # world_size parameters_m gpu started ended crashes ...
    outcomes: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["step", "index", "gold"]))
    losses: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["step", "loss"]))
    logged: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=["step"]))  # accuracies in the log
    problems: list[str] = field(default_factory=list)
    evaluations: dict[str, pd.DataFrame] = field(default_factory=dict, repr=False)  # by step, made when asked for

    @property
    def label(self) -> str:
        """The name without its time stamp: what the run was called as a treatment."""
        return _STAMP.sub("", self.name).strip("\"'_ ")

    @property
    def steps(self) -> list[str]:
        return sorted(self.outcomes["step"].unique(), key=step_order)

    @property
    def last(self) -> pd.DataFrame:
        """The last evaluation; empty where there is none."""
        return self.at(self.steps[-1] if self.steps else "")

    def at(self, step: str | int) -> pd.DataFrame:
        """One evaluation by index: gold, and of every condition evaluated there the label and whether it is right."""
        if step not in self.evaluations:
            part = self.outcomes[self.outcomes["step"] == str(step)].set_index("index").sort_index().dropna(axis=1)
            labels = part.filter(regex="_pred$")
            right = labels.eq(part["gold"], axis=0) & (labels != INVALID)
            self.evaluations[step] = part.join(right.rename(columns=lambda name: name.replace("_pred", "_correct")))
        return self.evaluations[step]

    def right(self, condition: str, step: str | int = "final", label: str = "") -> pd.Series:
        """Right or wrong by index at one step; with `label`, whether the answer is that label."""
        if str(step) not in self.steps:
            raise MissingData(f"run '{self.name}' has no evaluation of step {step}")
        if condition == "union":
            return self.right("source", step) | self.right("target", step)
        evaluation = self.at(step)
        if f"{condition}_pred" not in evaluation:
            raise MissingData(f"run '{self.name}' has no condition '{condition}' at step {step}")
        return evaluation[f"{condition}_pred"] == label if label else evaluation[f"{condition}_correct"]

    @property
    def curve(self) -> pd.DataFrame:
        """Per step: accuracy and number of invalid answers of every condition, and n."""
        rows = []
        for step in self.steps:
            part = self.at(step)
            shares = part.filter(regex="_correct$").mean().rename(lambda name: name.replace("_correct", "_acc"))
            invalid = part.filter(regex="_pred$").eq(INVALID).sum()
            invalid = invalid.rename(lambda name: f"invalid_{name.removesuffix('_pred')}")
            rows.append({"step": step, **shares, **invalid, "n": len(part)})
        return pd.DataFrame(rows, columns=None if rows else ["step", "n"])


def step_order(step: object) -> float:
    return float("inf") if str(step) == "final" else float(step)


def effective_settings(config: dict, seed: bool = True) -> dict:
    """The settings that can matter; without `seed` also those of replicates are equal."""
    if any("." in key for key in config):
        return configuration.effective_settings(config, seed)
    inert = tuple(key for holds, keys in INERT if holds(config) for key in keys) + (() if seed else ("seed",))
    return {key: value for key, value in config.items() if not key.startswith(inert)}


def identity(record: Record, seed: bool = True) -> tuple:
    """Equal for two runs exactly when they are the same experiment on the same number of processes."""
    settings = {key: repr(value) for key, value in effective_settings(record.config, seed).items()}
    return *sorted(settings.items()), ("world_size", record.facts.get("world_size"))


# -- run folders --------------------------------------------------------------------------------------------


def load_run(folder: str | Path, name: str | None = None) -> Record:
    """Read one run folder; `name` defaults to the stamped folder it lies in."""
    runs = find_runs(folder)
    if len(runs) != 1:
        what = "several runs in it: " + ", ".join(path.name for path in runs) if runs else "no run in it"
        raise ValueError(f"{folder}: {what}; name the folder with the train.log or the evaluation files")
    record = Record(name or _name_of(runs[0]), runs[0], generation_of(runs[0]))
    {"first": _load_first, "derived": _load_derived, "bridgekit": _load_own}[record.generation](record)
    every, numbered = record.config.get("eval_every"), {int(step) for step in record.steps if step != "final"}
    if isinstance(every, int) and every > 0:
        due = range(0, max(numbered, default=-1) + 1, every)
        missing = [*itertools.islice((step for step in due if step not in numbered), REPORTED)]
        record.problems += [f"evaluation of step {step} is missing (eval_every is {every})" for step in missing]
    record.problems = [*dict.fromkeys(record.problems)]
    return record


def _name_of(folder: Path) -> str:
    """The folder that carries the time stamp; for one of several runs in it, `stamped_folder.sub_folder`."""
    folder = folder.resolve()
    if _STAMP.search(folder.name) or not _STAMP.search(folder.parent.name):
        return folder.name
    return folder.parent.name if len(find_runs(folder.parent)) == 1 else f"{folder.parent.name}.{folder.name}"


def _load_first(record: Record) -> None:
    for path in _own_files(record, "train.log"):
        load_log(record, path)
    if not record.facts:
        record.problems.append("train.log: not there, so no configuration, losses or crashes")
    stamp, summaries = _STAMP.search(record.name), (record.folder / "summary.log", record.folder.parent / "summary.log")
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in summaries if path.is_file()]
    ended = _END.search("".join(texts[:1]))
    record.facts["started"] = parse_time("".join(stamp.groups())) if stamp else None
    record.facts["ended"] = parse_time("{0} {2} {1}".format(*ended.groups())) if ended else None
    _load_evaluations(record)
    _compare_with_log(record)


def _load_derived(record: Record) -> None:
    config = yaml.safe_load((record.folder / "config.yaml").read_text(encoding="utf-8")) or {}
    record.facts = {fact: config.pop(key) for key, fact in SETTINGS_AS_FACTS.items() if key in config}
    record.facts |= load_json(record.folder / "run.json")
    record.problems += record.facts.pop("problems", [])  # found when it was preserved
    record.config = {key: _plain_value(value) if isinstance(value, str) else value for key, value in config.items()}
    for name, options in TABLES.items():
        if (path := record.folder / name).is_file():
            setattr(record, name.split(".")[0], pd.read_csv(path, **options))
    record.outcomes = record.outcomes.astype({"index": int})
    _compare_with_log(record)


def _load_own(record: Record) -> None:
    record.facts = load_json(record.folder / "provenance.json") | load_json(record.folder / "status.json")
    record.config = configuration.to_flat(load_run_config(record.folder))
    for path in _own_files(record, "metrics.jsonl"):
        rows = list(load_jsonl(path, broken := []))
        record.losses = pd.DataFrame([{"step": row["step"], "loss": row["loss"]} for row in rows if "loss" in row])
        record.problems += [f"{path.name}: line {number} is no JSON object" for number in broken]
    _load_evaluations(record)


def _own_files(record: Record, *names: str) -> Iterator[Path]:
    """Those of the files that are there, and are no link out of the run folder."""
    for path in (record.folder / name for name in names):
        if not path.resolve().is_relative_to(record.folder.resolve()):
            record.problems.append(f"{path.name}: a link that leads out of the run folder; not read")
        elif path.is_file():
            yield path
        elif path.exists():
            record.problems.append(f"{path.name}: no plain file; not read")


def _load_evaluations(record: Record) -> None:
    frames, steps = [record.outcomes], {}
    files = {path.name: step for step, path in evaluation_files(record.folder)}
    for path in _own_files(record, *files):
        if (first := steps.setdefault(files[path.name], path.name)) == path.name:
            frames.append(load_outcomes(path, record.problems, files[path.name]))
        else:
            record.problems.append(f"{path.name}: step {files[path.name]} is also in {first}; the first is kept")
    record.outcomes = pd.concat([frame for frame in frames if len(frame)] or frames[:1], ignore_index=True)


def evaluation_files(folder: Path) -> list[tuple[str, Path]]:
    """(step, file) of the evaluation files in a folder, numbered ones in order, `final` last."""
    found = [(match[1], path) for path in folder.iterdir() if (match := EVAL_FILE.fullmatch(path.name))]
    return sorted(found, key=lambda item: (step_order(item[0]), item[1].name))


def _plain_value(text: str) -> object:
    """A logged setting as YAML reads it, with Python's None."""
    try:
        return None if text == "None" else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _compare_with_log(record: Record) -> None:
    """The accuracies a log printed must be those of the stored outcomes."""
    curve = record.curve.set_index("step")
    for _, step, name, logged in record.logged.melt("step").itertuples():
        found = curve[f"{name}_acc"].get(step, logged) if f"{name}_acc" in curve else logged
        if abs(found - logged) >= 5.1e-4:
            record.problems.append(f"step {step}: the log says {name} {logged}, the outcomes give {found:.4f}")


# -- files of the first experiments -------------------------------------------------------------------------


def load_log(record: Record, path: Path) -> None:
    """The configuration, facts, losses and accuracies of one log; what is wrong with it is listed, never raised."""
    text = path.read_text(encoding="utf-8", errors="replace")  # every kind of line end becomes a new line
    found = {name: re.findall(pattern, text) for name, (pattern, _) in FACTS.items()}
    record.facts = {name: kind(found[name][-1]) for name, (_, kind) in FACTS.items() if found[name]}
    # Other processes write between the block's lines.
    block = text.partition("==== Config ====")[2][:SECTION].partition("\n")[2]
    block = _BLOCK_END.split(block, maxsplit=1)[0].split("\n")
    settings = dict(match.groups() for line in block if (match := _SETTING.fullmatch(line.rstrip())))
    record.facts["settings_text"] = {key: value for key, value in settings.items() if key not in PATH_KEYS}
    record.config = {key: _plain_value(value) for key, value in record.facts["settings_text"].items()}
    steps = list(_LOSS.finditer(text))
    losses = [{"step": m[1], "loss": m[3]} | {k.lower(): v for k, v in _PART.findall(m[4])} for m in steps]
    logged = {m[1] or "final": {k.lower(): v for k, v in _ACCURACY.findall(m[2])} for m in _EVALUATION.finditer(text)}
    record.losses = _to_numbers(pd.DataFrame(losses, columns=None if losses else ["step", "loss"]))
    record.logged = _to_numbers(pd.DataFrame(logged.values(), logged)).rename_axis("step").reset_index()
    crashes = record.facts["crashes"] = []
    for match in re.finditer(_CRASH, text):
        step = next((int(m[1]) for m in reversed(steps) if m.start() < match.start()), 0)
        crash = {"step": step} | _describe_crash(text[match.start() : match.start() + SECTION])
        if not any(_is_copy(crash, other) for other in crashes):
            crashes.append(crash)
    problems = _find_problems(record, steps[-1][2] if steps else "unknown") if text else ["the log is empty (0 bytes)"]
    record.problems += [f"{path.name}: {problem}" for problem in problems]


def _plain_label(label: object) -> str:
    """A label that a CSV gives back as it is: without line ends, control characters and halves of characters."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(label))


def _to_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.apply(pd.to_numeric, errors="coerce")


def _is_copy(crash: dict, other: dict) -> bool:
    """Every process prints its own copy of a crash, the launcher another, and a traceback ends in its cause."""
    same = all(crash.get(part, other.get(part)) == other.get(part) for part in ("step", "kind", "where"))
    return same or crash["kind"] == "ChildFailedError"


def _describe_crash(text: str) -> dict:
    """Kind and message, the innermost line outside libraries, and GiB asked for, in use and in all."""
    crash, error = {"kind": "traceback cut off", "message": ""}, re.match("()(.*)", text)
    if text.startswith("Traceback"):
        error = _ERROR.search(text)
        frames = _FRAME.findall(text, 0, error.start() if error else len(text))
        for file, line, function, code in [frame for frame in frames if not _LIBRARY.search(frame[0])][-1:]:
            crash["where"] = f"{Path(file).name}:{line} in {function.strip()}"
            crash["code"] = re.sub(r"^\[rank\d+\]:", "", code).strip()
    if not error:
        return crash
    rank, message = error.groups()
    kind = "out of memory" if _MEMORY.search(message) else message.split(":")[0].split(".")[-1]
    crash |= {"kind": kind, "message": message[:300].strip()} | ({"rank": int(rank)} if rank else {})
    amounts = {name: match for name, pattern in _AMOUNTS.items() if (match := re.search(pattern, message))}
    return crash | {name: round(float(match[1]) / _PER_GIB[match[2]], 3) for name, match in amounts.items()}


def _find_problems(record: Record, planned: str) -> list[str]:
    losses, logged, crashes = record.losses, record.logged, record.facts["crashes"]
    why = f"crashed ({crashes[0]['kind']})" if crashes else "no final evaluation"
    checks = {
        "no configuration block ('==== Config ====')": not record.config,
        "a loss is not a number": losses["loss"].isna().any(),
        "steps go backwards, so two trainings were written into one log": (losses["step"].diff() < 0).any(),
    }
    for _, step, condition, share in logged.melt("step").itertuples():
        checks[f"{condition} accuracy at step {step} is {share}, not 0 to 1"] = not 0 <= share <= 1
    last = losses["step"].iloc[-1] if len(losses) else 0
    checks[f"{why}, last at step {last} of {planned}"] = "final" not in set(logged["step"])
    return [problem for problem, holds in checks.items() if holds]


def parse_time(text: str) -> str | None:
    """A moment as ISO text, on the run's own clock; None where it is none."""
    moment = pd.to_datetime(text, errors="coerce")
    return None if pd.isna(moment) else moment.isoformat()


def load_outcomes(path: Path, problems: list[str], step: str) -> pd.DataFrame:
    """Frame `step index gold <condition>_pred ...` of one file by index; damage goes to `problems`.

    A damaged line is reported with its number and left out; the rest of the file is still used. Problems about units
    met in training are no part of any score.
    """
    rows = pd.DataFrame(load_jsonl(path, broken := []), dtype=object)
    rows.index = sorted({*range(1, len(rows) + len(broken) + 1)} - {*broken})[: len(rows)]  # the lines they stand in
    asked = [key for key in rows if key.endswith("_extracted") and key != "gold_extracted"]
    labels = [key for key in asked if rows[key].notna().mean() > 0.5]  # what most rows have: one may be damaged
    keys = ["gold_extracted", *labels]
    rows = rows.reindex(columns=["index", "novelty", "eval_step", *keys])
    steps = sorted(set(rows["eval_step"].dropna().astype(str)) - {step})
    whole = {
        "no whole number under 'index'": rows["index"].map(lambda index: type(index) is int and abs(index) < 2**63),
        "no '<condition>_extracted' key": pd.Series(bool(labels), rows.index),
        **{f"no text under '{key}'": rows[key].map(type).isin([str, int]) for key in keys},
    }
    damage = {}
    for kind, good in whole.items():
        good = good.reindex(rows.index).astype(bool)
        damage[kind], rows = rows.index[~good], rows[good]
    twice = rows["index"].duplicated()
    damage["index given twice, the first is kept"] = rows.index[twice]
    damage = dict(sorted(damage.items(), key=lambda item: list(item[1][:1])))
    damage["not a whole JSON object: cut off or binary"] = broken
    damage[f"eval_step inside is {steps}, the file name says {step}"] = [1] * bool(steps)
    for kind, lines in damage.items():
        if len(lines):
            named = ", ".join(map(str, lines[:REPORTED])) + (", ..." if len(lines) > REPORTED else "")
            problems.append(f"{path.name}: {kind} (line {named}; {len(lines)} in all)")
    rows = rows[~twice & (rows["novelty"] != "seen")][["index", *keys]].sort_values("index", ignore_index=True)
    if rows.empty:
        empty = path.stat().st_size == 0
        why = "the file is empty (0 bytes)" if empty else "no usable line (needed: index, gold_extracted, *_extracted)"
        problems.append(f"{path.name}: {why}")
    rows[keys] = rows[keys].map(_plain_label)
    rows.insert(0, "step", step)
    renamed = {key: key.replace("_extracted", "_pred") for key in labels} | {"gold_extracted": "gold"}
    return rows.astype({"index": int}).rename(columns=renamed)
