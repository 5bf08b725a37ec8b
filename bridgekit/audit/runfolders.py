"""One record per run folder, whoever wrote it: the first experiments, this package, or `bridgekit preserve`.

    from bridgekit.audit.runfolders import find_runs, read_run
    for folder in find_runs("preserved_data"):
        record = read_run(folder)

Reading never changes a file and never stops at a damaged one: what is wrong is listed in `record.problems`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from bridgekit.audit.outcomes import EVAL_FILE, curve_of, evaluation_files, read_outcomes, step_order
from bridgekit.audit.runlogs import read_log, read_summary

OUTCOMES_FILE = "outcomes.csv.gz"
FACTS_FILE = "run.json"
_STAMP = re.compile(r"_?(\d{8})_(\d{6})")


@dataclass
class RunRecord:
    """Everything later stages need to know about one run."""

    name: str
    folder: Path
    generation: str  # first | bridgekit | derived (a compact copy of the first)
    config: dict = field(default_factory=dict)  # flat; dotted keys for this package's runs
    facts: dict = field(default_factory=dict)  # world_size parameters_m gpu started ended crashes ...
    outcomes: pd.DataFrame = field(default_factory=pd.DataFrame)
    losses: pd.DataFrame = field(default_factory=pd.DataFrame)
    logged: pd.DataFrame = field(default_factory=pd.DataFrame)  # accuracies the run itself printed
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name without its time stamp: what the run was called as a treatment."""
        return _STAMP.sub("", self.name).strip("\"'_ ")

    @property
    def curve(self) -> pd.DataFrame:
        return curve_of(self.outcomes) if len(self.outcomes) else pd.DataFrame(columns=["step", "n"])

    def at(self, step: str | int) -> pd.DataFrame:
        """Outcomes of one evaluation, by index."""
        return self.outcomes[self.outcomes["step"] == str(step)].set_index("index").sort_index()

    def steps(self) -> list[str]:
        return sorted(self.outcomes["step"].unique(), key=step_order) if len(self.outcomes) else []


def find_runs(root: str | Path) -> list[Path]:
    """Run folders at or below `root`, in order of name; links that lead out of `root` are not followed."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; name a run folder or a folder of run folders")
    inside = root.resolve()
    found = set()
    for path in [root, *sorted(root.rglob("*"))]:
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.is_dir() and path.resolve().is_relative_to(inside) and generation_of(path):
            found.add(path)
    return sorted(path for path in found if not any(parent in found for parent in path.parents))


def generation_of(folder: Path) -> str | None:
    names = {path.name for path in folder.iterdir()}
    if "metrics.jsonl" in names or "provenance.json" in names or "status.json" in names:
        return "bridgekit"
    if OUTCOMES_FILE in names or FACTS_FILE in names:
        return "derived"
    if "train.log" in names or any(EVAL_FILE.fullmatch(name) for name in names):
        return "first"
    return None


def read_run(folder: str | Path, name: str | None = None) -> RunRecord:
    """Read one run folder; `name` defaults to the stamped folder it lies in."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    generation = generation_of(folder)
    if generation is None:
        below = [p for p in find_runs(folder) if p != folder]
        if len(below) != 1:
            what = "no run in it" if not below else "several runs in it: " + ", ".join(p.name for p in below)
            raise ValueError(f"{folder}: {what}; name the folder with the train.log or the evaluation files")
        return read_run(below[0], name)
    record = RunRecord(name or run_name(folder), folder, generation)
    {"first": _read_first, "bridgekit": _read_bridgekit, "derived": _read_derived}[generation](record)
    _check_steps(record)
    return record


def run_name(folder: Path) -> str:
    """The folder that carries the time stamp; for one of several runs in it, `stamped_folder.sub_folder`."""
    parent = folder.resolve().parent
    if _STAMP.search(folder.resolve().name) or not _STAMP.search(parent.name):
        return folder.resolve().name
    siblings = [p for p in parent.iterdir() if p.is_dir() and generation_of(p)]
    return parent.name if len(siblings) == 1 else f"{parent.name}.{folder.name}"


def _inside(record: RunRecord, name: str, folder: Path | None = None) -> Path | None:
    """The file, if it is there, a file, and not a link out of the run folder."""
    path = (folder or record.folder) / name
    if path.is_symlink() and not path.resolve().is_relative_to((folder or record.folder).resolve()):
        record.problems.append(f"{name}: a link that leads out of the run folder; not read")
        return None
    return path if path.is_file() else None


def _read_evaluations(record: RunRecord) -> None:
    """All outcomes: from the compact table where there is one, else from the evaluation files."""
    if path := _inside(record, OUTCOMES_FILE):
        try:
            record.outcomes = pd.read_csv(path, dtype=str, keep_default_na=False)
            record.outcomes["index"] = record.outcomes["index"].astype(int)
        except (ValueError, KeyError, EOFError, OSError) as error:
            record.problems.append(f"{OUTCOMES_FILE}: cannot be read ({str(error).splitlines()[0]})")
            record.outcomes = pd.DataFrame()
        return
    frames, seen = [], {}
    for step, path in evaluation_files(record.folder):
        if step in seen:
            record.problems.append(f"{path.name}: step {step} is also in {seen[step]}; the first is kept")
        elif _inside(record, path.name):
            seen[step] = path.name
            frames.append(read_outcomes(path, record.problems, step))
    frames = [frame.astype(object) for frame in frames if len(frame)]
    if frames:
        record.outcomes = pd.concat(frames, ignore_index=True)


def _read_first(record: RunRecord) -> None:
    log = _inside(record, "train.log")
    if log is None:
        record.problems.append("train.log: not there, so no configuration, losses or crashes")
    else:
        facts = read_log(log)
        record.problems += facts.problems
        record.config = {key: plain_value(text) for key, text in facts.settings.items()}
        record.facts = {
            "settings_text": facts.settings,
            "world_size": facts.world_size,
            "gpu": facts.gpu,
            "parameters_m": facts.parameters_m,
            "saved_best": facts.saved_best,
            "stopped_at": facts.stopped_at,
            "crashes": facts.crashes,
        }
        losses = {"step": facts.steps, "loss": facts.losses}
        record.losses = pd.DataFrame(losses).assign(
            **{name: [values.get(s) for s in facts.steps] for name, values in facts.components.items()}
        )
        record.logged = pd.DataFrame([{"step": s, **a} for s, a in facts.evaluations.items()])
    summary = _inside(record, "summary.log") or _inside(record, "summary.log", record.folder.parent)
    stamp = _STAMP.search(record.name)
    started = pd.to_datetime("".join(stamp.groups()), errors="coerce") if stamp else pd.NaT
    record.facts["started"] = None if pd.isna(started) else started.isoformat()
    record.facts["ended"] = read_summary(summary) if summary else None
    _read_evaluations(record)
    _compare_with_log(record)


def _read_bridgekit(record: RunRecord) -> None:
    for name, target in (("provenance.json", record.facts), ("status.json", record.facts)):
        if path := _inside(record, name):
            try:
                target |= json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, TypeError):
                record.problems.append(f"{name}: not a JSON object")
    _read_config(record)
    if path := _inside(record, "metrics.jsonl"):
        rows = _json_lines(path, record)
        losses = [{"step": r["step"], "loss": r["loss"], **r.get("losses", {})} for r in rows if "loss" in r]
        record.losses = pd.DataFrame(losses)
        record.logged = pd.DataFrame([{"step": str(r["step"]), **r["eval"]} for r in rows if "eval" in r])
    if path := _inside(record, "train.log"):
        facts = read_log(path)
        record.facts["crashes"] = facts.crashes
        if facts.settings:
            record.problems.append("train.log: of the first experiments, in a folder of this package")
    _read_evaluations(record)


def _json_lines(path: Path, record: RunRecord) -> list[dict]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            row = json.loads(line)
            row["step"] + 0
            rows.append(row)
        except (ValueError, TypeError, KeyError):
            record.problems.append(f"{path.name}: line {number} is no JSON object with a step")
    return rows


def _read_derived(record: RunRecord) -> None:
    _read_config(record)
    if path := _inside(record, FACTS_FILE):
        record.facts |= json.loads(path.read_text(encoding="utf-8"))
    for name, attribute in (("losses.csv", "losses"), ("logged.csv", "logged")):
        if path := _inside(record, name):
            types = {"step": str} if attribute == "logged" else None
            setattr(record, attribute, pd.read_csv(path, dtype=types))
    _read_evaluations(record)
    _compare_with_log(record)


def _read_config(record: RunRecord) -> None:
    path = _inside(record, "config.yaml")
    loaded = None
    if path:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            loaded = None
    if not isinstance(loaded, dict):
        record.problems.append("config.yaml: not there or no `key: value` lines: configuration unknown")
        return
    for key, value in loaded.items():
        if isinstance(value, dict):
            record.config |= {f"{key}.{leaf}": v for leaf, v in value.items()}
        else:
            record.config[key] = plain_value(value) if isinstance(value, str) else value
    for key, fact in (("world_size", "world_size"), ("translator_params_m", "parameters_m"), ("gpu", "gpu")):
        if key in record.config:  # facts of the log, kept beside the settings
            record.facts.setdefault(fact, record.config.pop(key))


def plain_value(text: str) -> object:
    """A logged setting as YAML reads it, with Python's None."""
    if text == "None":
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _check_steps(record: RunRecord) -> None:
    """Name the evaluations that should be there and are not."""
    every = record.config.get("eval_every")
    numbered = [int(s) for s in record.steps() if s != "final"]
    if not isinstance(every, int) or every <= 0 or not numbered:
        return
    for step in range(0, max(numbered) + 1, every):
        if step not in numbered:
            record.problems.append(f"evaluation of step {step} is missing (eval_every is {every})")


def _compare_with_log(record: RunRecord) -> None:
    """The accuracies a log printed must be those of the stored outcomes."""
    if record.logged.empty or record.outcomes.empty:
        return
    curve = record.curve.set_index("step")
    for row in record.logged.to_dict("records"):
        for name, value in row.items():
            column = f"{name}_acc"
            if name == "step" or row["step"] not in curve.index or column not in curve.columns:
                continue
            if not abs(curve.loc[row["step"], column] - value) < 5.1e-4:
                record.problems.append(
                    f"step {row['step']}: the log says {name} {value}, the outcomes give "
                    f"{curve.loc[row['step'], column]:.4f}"
                )
