"""What a run says of itself: its manifest entry, and its part of the three reports of a runs folder.

    report_end("runs/phase1_20261120_132037")  # what a run calls when it has ended; again once its figures exist
    bridgekit report runs                      # all of them again, from the run folders

`LOG.md` has an entry for each run, newest first; `EXPERIMENTS_SUMMARY.md` a row; `REPORT.md` the latest results in
words and the manifest entry of each run that beats the target. Each file has one generated block, made anew under a
lock from what every run folder holds in its `report.json`: runs that end at once lose nothing. Text around it stays.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import math
import re
import sys
import typing
from pathlib import Path

from bridgekit.config import load_config, to_flat
from bridgekit.results import verdict
from bridgekit.results.statistics import paired_difference, paired_ratio
from bridgekit.results.style import format_interval, format_share
from bridgekit.results.table import select
from bridgekit.runs import (
    find_eval,
    load_eval,
    load_jsonl,
    load_run_config,
    load_status,
    write_status,
    write_text_atomic,
)

if typing.TYPE_CHECKING:
    import pandas as pd

LOG, SUMMARY, REPORT, RECORD = "LOG.md", "EXPERIMENTS_SUMMARY.md", "REPORT.md", "report.json"
FILES = {LOG: "log", SUMMARY: "summary", REPORT: "report"}  # file: name of its two templates, whole and block
ENTRY, UNWRITTEN = "manifest.md", "_Not written yet._"
SHOWN = ("bridge.producer", "bridge.injector", "bridge.n_soft_tokens", "train.steps", "train.batch_size",
         "pair.direction", "eval.conditions")  # fmt: skip
_OLD_BLOCKS = re.compile(  # of an earlier form of these files
    r"(?:## (?:Latest runs|Runs that beat the target)\n+(?:The paired [^<]+)?)?"
    r"<!-- generated: (?P<name>latest|winners|log [^\n]+?) -->\n.*?<!-- end: (?P=name) -->\n*", re.DOTALL)  # fmt: skip


# -- a run's manifest entry ---------------------------------------------------------------------------------


def write_entry(folder: Path, metrics: str, why: str = UNWRITTEN, publishability: str = UNWRITTEN) -> Path:
    """Create a run's `manifest.md`, or bring the generated parts of an existing one up to date; its prose stays."""
    path = folder / ENTRY
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        command = load_json(folder / "provenance.json").get("command")
        command = " ".join(command) if isinstance(command, list) else command
        text = render("entry.md.j2", name=folder.name, why=why, publishability=publishability, command=command)
    text = replace_block(replace_block(text, "metrics", metrics), "artifacts", _describe_files(folder))
    write_text_atomic(path, text)
    return path


def describe_run(folder: Path) -> str:
    """Markdown: what a run of this package answers, how long it was trained, and where its controls come from."""
    facts, status, path = load_json(folder / "provenance.json"), load_status(folder), folder / "metrics.jsonl"
    try:
        answers = describe_answers(load_eval(find_eval(folder), skip_broken=True, texts=False))
    except (FileNotFoundError, ValueError) as error:
        answers = f"- note: {_one_line(error)}"
    steps = [row["step"] for row in load_jsonl(path, []) if "loss" in row] if path.is_file() else []
    course = [f"{steps[-1]:,} steps"] if steps else []
    course += _describe_machine(facts, status) + ([f"started {facts['started']}"] if "started" in facts else [])
    lines = [
        f"weights of the trained control `{control}`: "
        + ", ".join(f"step {step}{' (untrained)' * (not step)} by {selection}" for selection, step in selected.items())
        for control, selected in load_control_steps(folder).items()
    ]
    return render("metrics.md.j2", answers=answers, course=course, lines=lines)


def _describe_machine(facts: dict, status: dict) -> list[str]:
    trained = f"{status['parameters']:,} trained parameters" if status.get("parameters") else ""
    gpus = ", ".join(facts.get("gpus") or []) or "CPU"
    return [part for part in (trained, f"{facts['processes']} × {gpus}" if facts.get("processes") else "") if part]


def load_control_steps(folder: Path) -> dict[str, dict[str, int]]:
    """{control: {selection: step its weights come from}}; of older runs from their validation: the last best one."""
    if (folder / "controls.json").is_file():
        return load_json(folder / "controls.json")
    steps = {}
    for path in sorted(folder.glob("metrics_*.jsonl")):
        control = path.stem.removeprefix("metrics_")
        scores = [(row["eval"][control], row["step"]) for row in load_jsonl(path, []) if control in row.get("eval", {})]
        steps |= {control: {"mix": max(scores)[1]}} if scores else {}
    return steps


def describe_answers(frame: pd.DataFrame, where: str = "final evaluation") -> str:
    """A table of an evaluation, the source-only problems below; intervals over units where there are units."""
    table, rows = verdict.conditions_table(frame), verdict.held_out(frame)
    over = "questions" if table["n"].eq(table["n_units"]).all() else "units"
    shown = table[table["subset"].isin(["all", "source_only"])].to_dict("records")
    test = paired_difference(rows, "bridged", "target") if {"bridged_correct", "target_correct"} <= set(rows) else None
    return render("answers.md.j2", rows=shown, where=where, over=over, test=test).rstrip()


def _describe_files(folder: Path) -> str:
    """Every file of a run with its size; what is still being written is left out."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        if not re.search(r"\.running\.|(?:^|/)\.", name) and name not in (ENTRY, RECORD, "checksums.json"):
            lines.append(f"- `{name}` ({f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'})")
    return "\n".join(lines)


# -- a run's part of the reports ----------------------------------------------------------------------------


def build_record(folder: str | Path) -> dict:
    """A run's part of the reports, recomputed from its files: name date log, row and entry (null where it has none)."""
    folder = Path(folder)
    settings, notes = to_flat(load_run_config(folder)), folder / "notes.md"
    facts, status = load_json(folder / "provenance.json"), load_status(folder)
    what, judged = _describe_settings(settings, facts, status), {"outcome": status.get("state", "unknown"), "text": ""}
    record = {"name": folder.name, "date": _find_date(folder, facts), "row": None, "entry": None}
    with contextlib.suppress(FileNotFoundError):  # a run that failed has no final evaluation
        answers = find_eval(folder)
        frame = load_eval(answers, texts=False)
        judged = load_json(folder / "verdict.json") or verdict.judge([frame], seeds=[settings["run.seed"]]).to_dict()
        table = verdict.conditions_table(frame).query("subset == 'all'").set_index("condition")
        shares = {name: format_interval(row.accuracy, row.low, row.high) for name, row in table.iterrows()}
        record["row"] = {
            "run": f"[`{folder.name}`]({folder.name})",
            "date (UTC)": record["date"],
            "bridge": _name_bridge(settings),
            "direction": settings["pair.direction"],
            "seed": str(settings["run.seed"]),
            "n": f"{table['n'].iloc[0]:,}",
            **{name: shares[name] for name in ("source", "target", "bridged")},
            "recovered, held-out units": _describe_recovery(frame),
            "verdict": judged["outcome"],
            "answers": f"[{answers.name}]({folder.name}/{answers.name})",
        }
        on_all = [c for c in judged["comparisons"] if c["control"] == "target" and c["subset"] == "all"]
        if on_all and all(c["difference"]["low"] > 0 for c in on_all):
            why = f"Does the target answer what only the source knows? {what}."
            record["entry"] = _nest_entry(write_entry(folder, describe_run(folder), why, judged["text"]))
    words = {"what": what, "outcome": judged["outcome"], "verdict": judged["text"], "status": status}
    words["notes"] = notes.read_text(encoding="utf-8").replace("<!--", "&lt;!--").strip() if notes.is_file() else ""
    return record | {"log": render("log_entry.md.j2", **words, **record).rstrip()}


def _describe_recovery(frame: pd.DataFrame, subset: str = "source_only_held_unit") -> str:
    held = select(frame, subset)
    if held.empty or "target_told_correct" not in held or not held["target_told_correct"].any():
        return "not measured"
    share = paired_ratio(held, "bridged", "target_told")
    if math.isinf(share.high):
        return f"{format_share(share.point)} (too little for an interval)"
    return format_interval(share.point, share.low, share.high)


def _name_bridge(settings: dict) -> str:
    return f"{settings['bridge.producer']} × {settings['bridge.injector']}"


def _describe_settings(settings: dict, facts: dict, status: dict) -> str:
    """Composition, size, what differs from the package's defaults, and on what machine and commit it ran."""
    default, k = to_flat(load_config()), settings["bridge.n_soft_tokens"]
    given = {key: value for key, value in settings.items() if key not in SHOWN and not key.startswith("run.")}
    changed = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in given.items() if v != default[k]]
    parts = [
        f"{_name_bridge(settings)}, {settings['pair.direction']}",
        "as many soft tokens as the source's prompt has" if k == -1 else f"{k} soft tokens",
        f"{settings['train.steps']:,} steps of {settings['train.batch_size']}, seed {settings['run.seed']}",
        *_describe_machine(facts, status),
    ]
    if facts.get("commit"):
        parts.append(f"commit {facts['commit'][:7]}" + " with changes" * bool(facts.get("dirty")))
    if status.get("elapsed"):
        parts.append(f"{status['elapsed'] / 60:.1f} minutes")
    return _one_line("; ".join(parts) + (f". Unlike the defaults: {', '.join(changed)}" if changed else ""))


def _nest_entry(path: Path) -> str:
    """A manifest entry as a subsection: headings of its prose stay below it, markers go."""
    name, entry = path.parent.name, path.read_text(encoding="utf-8").strip()
    lines = [line for line in entry.splitlines() if not line.startswith(("<!--", f"## `{name}`"))]
    text = re.sub(r"^#+ ", "#### ", "\n".join(lines).strip(), flags=re.MULTILINE)
    return f"### [`{name}`]({name}/{ENTRY})\n\n" + re.sub(r"\n{3,}", "\n\n", text)


def _find_date(folder: Path, facts: dict) -> str:
    """When the run began, in UTC: by its own record, its folder's stamp (local time), or its configuration's age."""
    stamp = re.search(r"(\d{8})_(\d{6})", folder.name)
    started = facts.get("started") or (stamp and f"{stamp[1]}T{stamp[2]}")
    age = (folder / "config.yaml").stat().st_mtime
    moment = datetime.datetime.fromisoformat(started) if started else datetime.datetime.fromtimestamp(age)
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M")


# -- the three files ----------------------------------------------------------------------------------------


def report_end(folder: str | Path) -> None:
    """Report a run that has ended. A report that cannot be written is no reason for the run to fail."""
    folder = Path(folder).resolve()
    if not (folder / "config.yaml").is_file():
        return  # a notebook's own folder, or a run that never began
    (folder / RECORD).unlink(missing_ok=True)
    try:
        write_reports(folder.parent)
    except OSError as error:
        print(f"warning: no report of {folder.name} ({error}): bridgekit report {folder.parent}", file=sys.stderr)


def mark_ended(folder: str | Path, state: str, reason: str) -> None:
    """The status of a run that has ended too early; how far it was stays in it. The log of all runs says so too."""
    status = load_status(folder)
    if status.get("state") == "finished":
        return
    with contextlib.suppress(OSError):  # a full disk, or a folder that was deleted: the message says it
        write_status(folder, **status | {"state": state, "error": reason, "seconds_left": None})
        report_end(folder)


def write_reports(runs_dir: str | Path) -> tuple[int, int]:
    """Write the three files from all runs that have ended; returns how many are in them, and how many are damaged."""
    with locked(runs_dir):
        records, damaged = load_records(Path(runs_dir))
        for name, template in FILES.items():
            block = render(f"{template}_runs.md.j2", records=records)
            edit_file(Path(runs_dir, name), lambda text, b=block: replace_block(_OLD_BLOCKS.sub("", text), "runs", b))
    return len(records), damaged


def load_records(runs_dir: Path) -> tuple[list[dict], int]:
    """What each run that has ended says of itself, newest first; made again where a file of it is newer.

    A folder that cannot be read is named and left out.
    """
    records, damaged = [], 0
    for folder in sorted(path.parent for path in runs_dir.glob("*/config.yaml")):
        try:
            if load_status(folder).get("state") not in ("finished", "stopped", "failed"):
                continue  # still running, or killed before it could say so
            kept = folder / RECORD
            inputs = [p for p in folder.iterdir() if p.suffix in (".json", ".jsonl", ".yaml", ".md") and p != kept]
            if not kept.is_file() or any(p.stat().st_mtime_ns > kept.stat().st_mtime_ns for p in inputs):
                write_text_atomic(kept, json.dumps(build_record(folder), ensure_ascii=False, indent=1) + "\n")
            records.append(load_json(kept))
        except (ValueError, KeyError, OSError) as error:
            damaged += 1
            print(f"warning: no report of {folder.name}: {_one_line(str(error))}", file=sys.stderr)
    return sorted(records, key=lambda record: (record["date"], record["name"]), reverse=True), damaged


def append_appendix(report: str | Path, study: str, text: str) -> Path:
    """Put the comparative gains of a study into the report, in a block of its own; again, in the same place."""
    report = Path(report)
    report.parent.mkdir(parents=True, exist_ok=True)
    with locked(report.parent):
        edit_file(report, lambda there: replace_block(there, f"comparative gains of {study}", text))
    return report


@contextlib.contextmanager
def locked(runs_dir: str | Path) -> typing.Iterator[None]:
    """Whoever else wants to write the reports of this folder waits; the system frees the lock of a killed process."""
    with open(Path(runs_dir) / ".reports.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def edit_file(path: Path, change: typing.Callable[[str], str]) -> None:
    """Read, change, write atomically; to be called inside `locked`. A new file begins as its template."""
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    changed = change(text if text is not None else render(f"{FILES[path.name]}.md.j2") if path.name in FILES else "")
    if changed != text:
        write_text_atomic(path, changed)


def replace_block(text: str, name: str, body: str) -> str:
    """Put `body` between the markers of a generated block; text without them gets them at its end."""
    start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    if start not in text or end not in text.split(start, 1)[1]:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    before, rest = text.split(start, 1)
    return f"{before}{start}\n{body.strip()}\n{end}{rest.split(end, 1)[1]}"


def render(template: str, finalize: typing.Callable | None = None, **values: object) -> str:
    """A template of `templates/`, filled in; `finalize` turns each value into what is printed."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    options = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=loader, finalize=finalize, **options)
    environment.filters |= {"share": format_share, "line": _one_line}
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(template).render(**values)


def load_json(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise ValueError(f"{path}: not whole JSON; restore it, or remove it") from None


def _one_line(text: object) -> str:
    """Text that can end neither a table cell, nor a line, nor a generated block; cut where it is very long."""
    text = " ".join(str(text).split()).replace("<!--", "&lt;!--").replace("|", "\\|")
    return text if len(text) <= 1200 else text[:1197] + "..."


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit report` verb."""
    parser = argparse.ArgumentParser(prog="bridgekit report", description=__doc__.splitlines()[0])
    parser.add_argument("runs_dir", type=Path, help="the folder in which the run folders lie")
    runs_dir = parser.parse_args(argv).runs_dir
    if not runs_dir.is_dir():
        raise ValueError(f"{runs_dir}: no such folder; name the one in which the run folders lie")
    for record in runs_dir.glob(f"*/{RECORD}"):
        record.unlink()
    n, damaged = write_reports(runs_dir)
    if not n and not damaged:
        raise ValueError(f"{runs_dir}: no run in it that has ended")
    print(f"{n} run{'s' * (n != 1)} in {', '.join(str(runs_dir / name) for name in FILES)}")
    return 2 if damaged else 0
