"""Runs as records: of the first experiments, of the compact tables kept of them, and of this package.

    for folder in find_runs("preserved_data"):
        record = load_run(folder)
        record.at("final")                # frame by index: gold, <condition>_pred, <condition>_correct

Reading never changes a file and never stops at a damaged one: what is wrong is listed in `record.problems`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from bridgekit import config as configuration
from bridgekit.audit.first_logs import load_end, load_log, load_outcomes, parse_time
from bridgekit.results.preserve import EVAL_FILE, find_runs, generation_of
from bridgekit.results.reports import load_json
from bridgekit.runs import INVALID, load_jsonl, load_run_config

SETTINGS_AS_FACTS = {"world_size": "world_size", "translator_params_m": "parameters_m", "gpu": "gpu"}  # in config.yaml
INERT = (  # keys of the first experiments: (without effect when this holds, beginnings of the settings concerned)
    (lambda c: not c.get("decode_loss_weight", 1), ("decode_interval", "decode_samples", "decode_max_length")),
    (lambda c: c.get("bridge", "dit") != "dit", ("dit_",)),
    (lambda c: not c.get("dit_loss_weight", 1), ("dit_loss_warmup",)),
    (lambda c: c.get("soft_injection", "adapter") != "adapter", ("adapter_scale",)),
    (lambda c: True, ("show_eval_samples",)),
)
_STAMP = re.compile(r"_?(\d{8})_(\d{6})")


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
    losses: pd.DataFrame = field(default_factory=pd.DataFrame)
    logged: pd.DataFrame = field(default_factory=pd.DataFrame)  # accuracies the run itself printed
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name without its time stamp: what the run was called as a treatment."""
        return _STAMP.sub("", self.name).strip("\"'_ ")

    @property
    def steps(self) -> list[str]:
        return sorted(self.outcomes["step"].unique(), key=step_order)

    def at(self, step: str | int) -> pd.DataFrame:
        """One evaluation by index: gold, and of every condition evaluated there the label and whether it is right."""
        part = self.outcomes[self.outcomes["step"] == str(step)].set_index("index").sort_index().dropna(axis=1)
        labels = part.filter(regex="_pred$")
        right = labels.eq(part["gold"], axis=0) & (labels != INVALID)
        return part.join(right.rename(columns=lambda name: name.replace("_pred", "_correct")))

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
            right, labels = part.filter(regex="_correct$"), part.filter(regex="_pred$")
            row = {"step": step} | right.rename(columns=lambda c: c.replace("_correct", "_acc")).mean().to_dict()
            rows.append(row | {f"invalid_{c.removesuffix('_pred')}": (labels[c] == INVALID).sum() for c in labels})
            rows[-1]["n"] = len(part)
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
    folder = Path(folder)
    runs = find_runs(folder)
    if len(runs) != 1:
        what = "several runs in it: " + ", ".join(path.name for path in runs) if runs else "no run in it"
        raise ValueError(f"{folder}: {what}; name the folder with the train.log or the evaluation files")
    record = Record(name or _name_of(runs[0]), runs[0], generation_of(runs[0]))
    {"first": _load_first, "derived": _load_derived, "bridgekit": _load_own}[record.generation](record)
    every, numbered = record.config.get("eval_every"), [int(step) for step in record.steps if step != "final"]
    if isinstance(every, int) and every > 0 and numbered:
        missing = sorted(set(range(0, max(numbered) + 1, every)) - set(numbered))
        record.problems += [f"evaluation of step {step} is missing (eval_every is {every})" for step in missing]
    return record


def _name_of(folder: Path) -> str:
    """The folder that carries the time stamp; for one of several runs in it, `stamped_folder.sub_folder`."""
    folder = folder.resolve()
    if _STAMP.search(folder.name) or not _STAMP.search(folder.parent.name):
        return folder.name
    return folder.parent.name if len(find_runs(folder.parent)) == 1 else f"{folder.parent.name}.{folder.name}"


def _load_first(record: Record) -> None:
    for log in _own_files(record, "train.log"):
        record.facts = load_log(log)
        record.problems += record.facts.pop("problems")
        record.losses, record.logged = record.facts.pop("losses"), record.facts.pop("logged")
        record.config = {key: _plain_value(text) for key, text in record.facts["settings_text"].items()}
    if not record.facts:
        record.problems.append("train.log: not there, so no configuration, losses or crashes")
    stamp = _STAMP.search(record.name)
    summaries = [f for f in (record.folder / "summary.log", record.folder.parent / "summary.log") if f.is_file()]
    record.facts["started"] = parse_time("".join(stamp.groups())) if stamp else None
    record.facts["ended"] = load_end(summaries[0]) if summaries else None
    _load_evaluations(record)
    _compare_with_log(record)


def _load_derived(record: Record) -> None:
    config = yaml.safe_load((record.folder / "config.yaml").read_text(encoding="utf-8"))
    record.facts = {fact: config.pop(key) for key, fact in SETTINGS_AS_FACTS.items() if key in config}
    record.facts |= load_json(record.folder / "run.json")
    record.config = {key: _plain_value(value) if isinstance(value, str) else value for key, value in config.items()}
    if (path := record.folder / "losses.csv").is_file():
        record.losses = pd.read_csv(path)
    if (path := record.folder / "logged.csv").is_file():
        record.logged = pd.read_csv(path, dtype={"step": str})
    if (path := record.folder / "outcomes.csv.gz").is_file():
        record.outcomes = pd.read_csv(path, dtype=str, keep_default_na=False).astype({"index": int})
    _compare_with_log(record)


def _load_own(record: Record) -> None:
    record.facts = load_json(record.folder / "provenance.json") | load_json(record.folder / "status.json")
    record.config = configuration.to_flat(load_run_config(record.folder))
    if (path := record.folder / "metrics.jsonl").is_file():
        rows = list(load_jsonl(path, broken := []))
        losses = [{"step": row["step"], "loss": row["loss"]} | row.get("losses", {}) for row in rows if "loss" in row]
        record.losses = pd.DataFrame(losses)
        record.logged = pd.DataFrame([{"step": str(row["step"])} | row["eval"] for row in rows if "eval" in row])
        record.problems += [f"{path.name}: line {number} is no JSON object" for number in broken]
    _load_evaluations(record)


def _own_files(record: Record, *names: str) -> Iterator[Path]:
    """Those of the files that are there, and are no link out of the run folder."""
    for path in (record.folder / name for name in names):
        if not path.resolve().is_relative_to(record.folder.resolve()):
            record.problems.append(f"{path.name}: a link that leads out of the run folder; not read")
        elif path.is_file():
            yield path


def _load_evaluations(record: Record) -> None:
    frames, steps = [record.outcomes], {}
    files = {path.name: step for step, path in evaluation_files(record.folder)}
    for path in _own_files(record, *files):
        step = files[path.name]
        if step in steps:
            record.problems.append(f"{path.name}: step {step} is also in {steps[step]}; the first is kept")
        else:
            steps[step] = path.name
            frames.append(load_outcomes(path, record.problems, step))
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
    for _, step, name, logged in record.logged.melt("step").itertuples() if len(record.logged) else ():
        found = curve[f"{name}_acc"].get(step, logged) if f"{name}_acc" in curve else logged
        if abs(found - logged) >= 5.1e-4:
            record.problems.append(f"step {step}: the log says {name} {logged}, the outcomes give {found:.4f}")
