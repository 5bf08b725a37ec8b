"""The first experiments' runs as records: their logs and JSONL, and the compact tables that are kept of them.

    for folder in find_runs("preserved_data"):
        record = load_run(folder)         # a run of this package too, through bridgekit.runs

Reading never changes a file and never stops at a damaged one: what is wrong is listed in `record.problems`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import yaml

from bridgekit import config as configuration
from bridgekit.audit.first_logs import PATH_KEYS, count_rescored, count_texts, load_end, load_log, load_outcomes
from bridgekit.results.preserve import EVAL_FILE, compress_evaluation, find_runs, generation_of, write_gzip
from bridgekit.results.reports import describe_answers
from bridgekit.runs import INVALID, load_eval, load_jsonl, load_run_config

OUTCOMES_FILE, FACTS_FILE = "outcomes.csv.gz", "run.json"
SEED, BOOKKEEPING = "seed", ("show_eval_samples",)
INERT = (  # keys of the first experiments: (without effect when this holds, the settings concerned)
    (lambda c: not c.get("decode_loss_weight", 1), ("decode_interval", "decode_samples", "decode_max_length")),
    (lambda c: c.get("bridge", "dit") != "dit", ("dit_*",)),
    (lambda c: not c.get("dit_loss_weight", 1), ("dit_loss_warmup",)),
    (lambda c: c.get("soft_injection", "adapter") != "adapter", ("adapter_scale",)),
)
_STAMP = re.compile(r"_?(\d{8})_(\d{6})")


@dataclass
class Record:
    """Everything that claims, findings and tables need to know about one run."""

    name: str
    folder: Path
    generation: str  # first | bridgekit | derived (a compact copy of the first)
    config: dict = field(default_factory=dict)  # flat; dotted keys for this package's runs
    facts: dict = field(default_factory=dict)  # world_size parameters_m gpu started ended crashes ...
    outcomes: pd.DataFrame = field(default_factory=pd.DataFrame)  # step index gold <condition>_pred
    losses: pd.DataFrame = field(default_factory=pd.DataFrame)
    logged: pd.DataFrame = field(default_factory=pd.DataFrame)  # accuracies the run itself printed
    problems: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The name without its time stamp: what the run was called as a treatment."""
        return _STAMP.sub("", self.name).strip("\"'_ ")

    @property
    def curve(self) -> pd.DataFrame:
        """Per step: accuracy and number of invalid answers of every condition, and n."""
        rows = []
        for step in self.steps():
            part = self.at(step)
            names = [c for c in conditions_of(part) if part[f"{c}_pred"].notna().all()]
            row = {"step": step} | {f"{c}_acc": is_right(part, c).mean() for c in names}
            rows.append(row | {f"invalid_{c}": int((part[f"{c}_pred"] == INVALID).sum()) for c in names}
                        | {"n": len(part)})  # fmt: skip
        return pd.DataFrame(rows) if rows else pd.DataFrame(columns=["step", "n"])

    def at(self, step: str | int) -> pd.DataFrame:
        """Outcomes of one evaluation, by index."""
        return self.outcomes[self.outcomes["step"] == str(step)].set_index("index").sort_index()

    def steps(self) -> list[str]:
        return sorted(self.outcomes["step"].unique(), key=step_order) if len(self.outcomes) else []


def step_order(step: object) -> float:
    return float("inf") if str(step) == "final" else float(step)


def conditions_of(outcomes: pd.DataFrame) -> list[str]:
    return [c.removesuffix("_pred") for c in outcomes.columns if c.endswith("_pred")]


def is_right(outcomes: pd.DataFrame, condition: str) -> pd.Series:
    """Boolean per row: the label equals the gold label and is an answer at all."""
    answers = outcomes[f"{condition}_pred"]
    return (answers == outcomes["gold"]) & (answers != INVALID)


def effective_settings(config: dict, seed: bool = True) -> dict:
    """The settings that can matter; without `seed` also those of replicates are equal."""
    if any("." in key for key in config):
        return configuration.effective_settings(config, seed)
    inert = {key for holds, keys in INERT if holds(config) for key in keys} | {*BOOKKEEPING, *(() if seed else (SEED,))}
    return {k: v for k, v in config.items() if k not in inert and not ("dit_*" in inert and k.startswith("dit_"))}


def identity(record: Record, seed: bool = True) -> tuple:
    """Equal for two runs exactly when they are the same experiment on the same number of processes."""
    settings = effective_settings(record.config, seed)
    return *sorted((k, repr(v)) for k, v in settings.items()), ("world_size", record.facts.get("world_size"))


def differing_settings(one: Record, other: Record) -> dict[str, tuple]:
    """{setting: (in one, in the other)} for the settings that differ and have an effect."""
    return _apart(effective_settings(one.config), effective_settings(other.config))


def inert_differences(one: Record, other: Record) -> dict[str, tuple]:
    """{setting: (in one, in the other)} for the settings that differ without effect."""
    effective = differing_settings(one, other)
    return {k: v for k, v in _apart(one.config, other.config).items() if k not in (*effective, *BOOKKEEPING)}


def _apart(one: dict, other: dict) -> dict[str, tuple]:
    return {k: (one.get(k), other.get(k)) for k in {**one, **other} if repr(one.get(k)) != repr(other.get(k))}


# -- run folders --------------------------------------------------------------------------------------------


def load_run(folder: str | Path, name: str | None = None) -> Record:
    """Read one run folder; `name` defaults to the stamped folder it lies in."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    generation = generation_of(folder)
    if generation is None:
        below = [path for path in find_runs(folder) if path != folder]
        if len(below) != 1:
            what = "no run in it" if not below else "several runs in it: " + ", ".join(p.name for p in below)
            raise ValueError(f"{folder}: {what}; name the folder with the train.log or the evaluation files")
        return load_run(below[0], name)
    record = Record(name or _name_of(folder), folder, generation)
    {"first": _load_first, "derived": _load_derived, "bridgekit": _load_own}[generation](record)
    _check_steps(record)
    return record


def _name_of(folder: Path) -> str:
    """The folder that carries the time stamp; for one of several runs in it, `stamped_folder.sub_folder`."""
    folder = folder.resolve()
    if _STAMP.search(folder.name) or not _STAMP.search(folder.parent.name):
        return folder.name
    siblings = [path for path in folder.parent.iterdir() if path.is_dir() and generation_of(path)]
    return folder.parent.name if len(siblings) == 1 else f"{folder.parent.name}.{folder.name}"


def _find(record: Record, name: str, folder: Path | None = None) -> Path | None:
    """The file, if it is there, a file, and not a link out of the run folder."""
    folder = folder or record.folder
    path = folder / name
    if path.is_symlink() and not path.resolve().is_relative_to(folder.resolve()):
        record.problems.append(f"{name}: a link that leads out of the run folder; not read")
        return None
    return path if path.is_file() else None


def _load_first(record: Record) -> None:
    if log := _find(record, "train.log"):
        facts = load_log(log)
        record.problems += facts.pop("problems")
        record.losses, record.logged = facts.pop("losses"), facts.pop("logged")
        record.config = {key: _plain_value(text) for key, text in facts["settings_text"].items()}
        record.facts = facts
    else:
        record.problems.append("train.log: not there, so no configuration, losses or crashes")
    stamp = _STAMP.search(record.name)
    started = pd.to_datetime("".join(stamp.groups()), errors="coerce") if stamp else pd.NaT
    record.facts["started"] = None if pd.isna(started) else started.isoformat()
    summary = _find(record, "summary.log") or _find(record, "summary.log", record.folder.parent)
    record.facts["ended"] = load_end(summary) if summary else None
    frames, seen = [], {}
    for step, path in evaluation_files(record.folder):
        if step in seen:
            record.problems.append(f"{path.name}: step {step} is also in {seen[step]}; the first is kept")
        elif _find(record, path.name):
            seen[step] = path.name
            frames.append(load_outcomes(path, record.problems, step))
    if frames := [frame for frame in frames if len(frame)]:
        record.outcomes = pd.concat(frames, ignore_index=True)
    _compare_with_log(record)


def _load_derived(record: Record) -> None:
    path = _find(record, "config.yaml")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8")) if path else None
    except (yaml.YAMLError, UnicodeDecodeError):
        config = None
    if not isinstance(config, dict):
        record.problems.append("config.yaml: not there or no `key: value` lines: configuration unknown")
        config = {}
    facts = {"world_size": "world_size", "translator_params_m": "parameters_m", "gpu": "gpu"}  # beside the settings
    record.facts = {fact: config.pop(key) for key, fact in facts.items() if key in config}
    record.config = {key: _plain_value(value) if isinstance(value, str) else value for key, value in config.items()}
    if path := _find(record, FACTS_FILE):
        record.facts |= json.loads(path.read_text(encoding="utf-8"))
    if path := _find(record, "losses.csv"):
        record.losses = pd.read_csv(path)
    if path := _find(record, "logged.csv"):
        record.logged = pd.read_csv(path, dtype={"step": str})
    if path := _find(record, OUTCOMES_FILE):
        try:
            record.outcomes = pd.read_csv(path, dtype=str, keep_default_na=False)
            record.outcomes["index"] = record.outcomes["index"].astype(int)
        except (ValueError, KeyError, EOFError, OSError) as error:
            record.problems.append(f"{OUTCOMES_FILE}: cannot be read ({str(error).splitlines()[0]})")
            record.outcomes = pd.DataFrame()
    _compare_with_log(record)


def _load_own(record: Record) -> None:
    """A run of this package, as its own readers give it; problems about units met in training count in no score."""
    for name in ("provenance.json", "status.json"):
        if path := _find(record, name):
            try:
                record.facts |= json.loads(path.read_text(encoding="utf-8"))
            except (ValueError, TypeError):
                record.problems.append(f"{name}: not a JSON object")
    try:
        record.config = configuration.to_flat(load_run_config(record.folder))
    except (configuration.ConfigError, OSError) as error:
        record.problems.append(f"config.yaml: configuration unknown ({error})")
    if path := _find(record, "metrics.jsonl"):
        rows = list(load_jsonl(path, broken := []))
        losses = [{"step": r["step"], "loss": r["loss"]} | r.get("losses", {}) for r in rows if "loss" in r]
        record.losses = pd.DataFrame(losses)
        record.logged = pd.DataFrame([{"step": str(r["step"])} | r["eval"] for r in rows if "eval" in r])
        record.problems += [f"{path.name}: line {number} is no JSON object" for number in broken]
    frames = []
    for step, path in evaluation_files(record.folder):
        try:
            frame = load_eval(path, skip_broken=True, texts=False) if _find(record, path.name) else pd.DataFrame()
        except ValueError as error:
            record.problems.append(f"{path.name}: {error}")
            continue
        if broken := frame.attrs.get("left_out"):
            record.problems.append(f"{path.name}: not a whole JSON object (line {', '.join(map(str, broken))})")
        if "novelty" in frame:
            frame = frame[frame["novelty"] != "seen"]
        labels = {c: c.replace("_extracted", "_pred") for c in frame if c.endswith("_extracted")}
        frame = frame[["index", *labels]].rename(columns=labels | {"gold_extracted": "gold"})
        frames.append(frame.assign(step=step).drop_duplicates("index"))
    record.outcomes = pd.concat(frames, ignore_index=True) if frames else record.outcomes


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


def _check_steps(record: Record) -> None:
    """Name the evaluations that should be there and are not."""
    every, numbered = record.config.get("eval_every"), [int(s) for s in record.steps() if s != "final"]
    if isinstance(every, int) and every > 0 and numbered:
        missing = sorted(set(range(0, max(numbered) + 1, every)) - set(numbered))
        record.problems += [f"evaluation of step {step} is missing (eval_every is {every})" for step in missing]


def _compare_with_log(record: Record) -> None:
    """The accuracies a log printed must be those of the stored outcomes."""
    curve = record.curve.set_index("step")
    for row in record.logged.to_dict("records"):
        for column in [f"{name}_acc" for name in row if f"{name}_acc" in curve and row["step"] in curve.index]:
            found, name = curve.loc[row["step"], column], column.removesuffix("_acc")
            if not abs(found - row[name]) < 5.1e-4:
                problem = f"step {row['step']}: the log says {name} {row[name]}, the outcomes give {found:.4f}"
                record.problems.append(problem)


# -- keeping one --------------------------------------------------------------------------------------------


def write_tables(record: Record, folder: Path, max_jsonl_mb: float = 1.5) -> None:
    """Configuration, outcomes, curve, losses, and what only the full texts tell, as compact tables."""
    if record.outcomes.empty and record.losses.empty:
        raise ValueError(f"{record.folder}: neither evaluations nor losses could be read, so there is nothing to keep")
    settings = record.facts.get("settings_text") or {key: str(value) for key, value in record.config.items()}
    names = {"world_size": "world_size", "translator_params_m": "parameters_m", "gpu": "gpu"}
    lines = {**settings, **{key: record.facts.get(fact) for key, fact in names.items()}}
    text = "".join(f"{k}: {v}\n" for k, v in lines.items() if v is not None and k not in PATH_KEYS)
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    known = ("started", "ended", "saved_best", "stopped_at", "crashes")
    facts = {key: record.facts[key] for key in known if record.facts.get(key)} | {"problems": record.problems}
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if len(record.outcomes):
        write_gzip(folder / OUTCOMES_FILE, record.outcomes.to_csv(index=False, lineterminator="\n").encode())
        record.curve.to_csv(folder / "curve.csv", index=False, float_format="%.4f")
    for name, table in (("losses.csv", record.losses), ("logged.csv", record.logged)):
        if len(table):
            table.to_csv(folder / name, index=False)
    for name, count in (("rescored.csv", count_rescored), ("texts.csv", count_texts)):
        frames = [count(path).assign(step=step) for step, path in evaluation_files(record.folder)]
        if frames := [frame for frame in frames if len(frame)]:
            table = pd.concat(frames, ignore_index=True)
            table[["step", *[c for c in table if c != "step"]]].to_csv(folder / name, index=False)
    compress_evaluation(record.folder, folder, max_jsonl_mb, without_texts=False)


def describe_run(folder: Path) -> str:
    """The metrics of a kept run's manifest entry, in Markdown."""
    record, lines = load_run(folder), []
    if steps := record.steps():
        last = record.at(steps[-1])
        whole = [c for c in conditions_of(last) if last[f"{c}_pred"].notna().all()]
        frame = pd.DataFrame({f"{c}_correct": is_right(last, c) for c in whole})
        where = "final evaluation" if steps[-1] == "final" else f"last evaluation (step {steps[-1]}; no final one)"
        lines += describe_answers(frame, where)
        numbered = record.curve[record.curve["step"] != "final"]
        if len(numbered) > 1 and "bridged_acc" in numbered:
            peak = numbered.loc[numbered["bridged_acc"].idxmax()]
            highest = f"{peak['bridged_acc']:.3f} at step {peak['step']}"
            lines.append(f"- highest of {len(numbered)} numbered evaluations: {highest}")
    elif len(record.logged):
        row = record.logged.iloc[-1].dropna()
        logged = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "step")
        lines.append(f"- no answers kept; the log's last evaluation (step {row['step']}): {logged}")
    facts = record.facts
    course = [
        len(record.losses) and f"{int(record.losses['step'].iloc[-1])} steps",
        facts.get("parameters_m") and f"{facts['parameters_m']}M trained parameters",
        facts.get("world_size") and f"{facts['world_size']} × {facts.get('gpu') or 'processes'}",
        facts.get("started") and f"started {facts['started']}", facts.get("ended") and f"ended {facts['ended']}",
    ]  # fmt: skip
    lines += ["- " + "; ".join(part for part in course if part)] if any(course) else []
    for crash in facts.get("crashes") or []:
        where = f", {crash['where']}" if crash.get("where") else ""
        lines.append(f"- crash: {crash['kind']} after step {crash['step']}{where}")
    return "\n".join([*lines, *(f"- note: {problem}" for problem in record.problems)])
