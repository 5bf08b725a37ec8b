"""What a run says of itself: its manifest entry, and its part of the three reports of a runs folder.

    report_end("runs/phase1_20261120_132037")  # what a run calls when it has ended; again once its figures exist
    bridgekit report runs                      # all of them again, from the run folders

`LOG.md` has an entry for each run, newest first; `EXPERIMENTS_SUMMARY.md` a row; `REPORT.md` the latest results in
words and the manifest entry of each run that beats the target. Each file has one generated block, made anew under a
lock from what every run folder holds in its `.report.json`: runs that end at once lose nothing. Text around it stays.
"""

import contextlib
import datetime
import fcntl
import functools
import importlib.util
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jinja2
import pandas as pd

from bridgekit.alive import take_lock
from bridgekit.config import Parser, load_config, to_flat
from bridgekit.results import verdict
from bridgekit.results.statistics import paired_difference, paired_ratio
from bridgekit.results.style import format_interval, format_share
from bridgekit.results.table import load_control_steps, select
from bridgekit.runs import (
    find_eval,
    load_eval,
    load_json,
    load_jsonl,
    load_run_config,
    load_status,
    write_status,
    write_text_atomic,
)

LOG, SUMMARY, REPORT, RECORD = "LOG.md", "EXPERIMENTS_SUMMARY.md", "REPORT.md", ".report.json"
FILES = {LOG: "log", SUMMARY: "summary", REPORT: "report"}  # file: name of its two templates, whole and block
LOCK_SECONDS = 30  # that a run's end waits for who writes the reports
ENTRY, UNWRITTEN = "manifest.md", "_Not written yet._"
SHOWN = (
    "bridge.producer bridge.injector bridge.n_soft_tokens train.steps train.batch_size pair.direction eval.conditions"
).split()


def write_entry(folder: Path, metrics: str, why: str = UNWRITTEN, publishability: str = UNWRITTEN) -> Path:
    """Create a run's `manifest.md`, or bring the generated parts of an existing one up to date; its prose stays."""
    command = load_json(folder / "provenance.json").get("command")
    prose = {"name": folder.name, "why": why, "publishability": publishability, "command": command}
    blocks = {"metrics": metrics, "artifacts": _describe_files(folder)}
    return write_blocks(folder / ENTRY, "entry.md.j2", blocks, **prose)


def describe_run(folder: Path) -> str:
    """Markdown: what a run of this package answers, how long it was trained, and where its controls come from."""
    facts, status, path = load_json(folder / "provenance.json"), load_status(folder), folder / "metrics.jsonl"
    try:
        answers = describe_answers(load_eval(find_eval(folder), skip_broken=True, texts=False))
    except (FileNotFoundError, ValueError) as error:
        answers = f"- note: {_one_line(error)}"
    metrics = list(load_jsonl(path, [])) if path.is_file() else []
    steps = [row["step"] for row in metrics if "loss" in row]
    course = [f"{steps[-1]:,} steps"] if steps else []
    course += _describe_machine(facts, status) + ([f"started {facts['started']}"] if "started" in facts else [])
    lines = [
        f"weights of the trained control `{control}`: "
        + ", ".join(f"step {step}{' (untrained)' * (not step)} by {selection}" for selection, step in selected.items())
        for control, selected in load_control_steps(folder).items()
    ]
    lines += [describe_flips(row["noise_floor"]) for row in metrics if "noise_floor" in row]
    return render("metrics.md.j2", answers=answers, course=course, lines=lines)


def describe_flips(found: dict) -> str:
    """How many answers change by arithmetic alone: what a small difference is to be held against."""
    ways = {"flipped": "batches of {1} instead of {0}", "eager": "no captured graphs", "unshared": "no shared start"}
    counts = [f"{found[key]} with {way.format(*found['batch_sizes'])}" for key, way in ways.items() if key in found]
    return f"noise floor, of {found['n']:,} bridged answers change by arithmetic alone: {', '.join(counts)}"


def _describe_machine(facts: dict, status: dict) -> list[str]:
    trained = f"{status['parameters']:,} trained parameters" if status.get("parameters") else ""
    gpus = ", ".join(facts.get("gpus") or []) or "CPU"
    return [part for part in (trained, f"{facts['processes']} × {gpus}" if facts.get("processes") else "") if part]


def describe_answers(frame: pd.DataFrame, where: str = "final evaluation") -> str:
    """A table of an evaluation, the source-only problems below; intervals over units where there are units."""
    table, rows = verdict.conditions_table(frame), verdict.held_out(frame)
    over = "questions" if table["n"].eq(table["n_units"]).all() else "units"
    shown = table[table["subset"].isin(["all", "source_only"])].to_dict("records")
    test = paired_difference(rows, "bridged", "target") if {"bridged_correct", "target_correct"} <= set(rows) else None
    return render("answers.md.j2", rows=shown, where=where, over=over, test=test).rstrip()


def _describe_files(folder: Path) -> str:
    """Every file of a run with its size; hidden files and what is still being written are left out."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        if not re.search(r"\.running\.|(?:^|/)\.", name) and name not in (ENTRY, "checksums.json"):
            lines.append(f"- `{name}` ({f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'})")
    return "\n".join(lines)


def build_record(folder: Path) -> dict:
    """A run's part of the reports, recomputed from its files; `result` and `entry` are null where it has none."""
    settings, notes = to_flat(load_run_config(folder)), folder / "notes.md"
    facts, status = load_json(folder / "provenance.json"), load_status(folder)
    began = datetime.datetime.fromtimestamp((folder / "config.yaml").stat().st_mtime)  # if it says nothing of its own
    began = datetime.datetime.fromisoformat(facts.get("started") or began.isoformat()).astimezone(datetime.UTC)
    record = {
        "name": folder.name,
        "date": f"{began:%Y-%m-%d %H:%M}",
        "bridge": f"{settings['bridge.producer']} × {settings['bridge.injector']}",
        "direction": settings["pair.direction"],
        "seed": settings["run.seed"],
        "what": _describe_settings(settings, facts, status),
        "slurm": facts.get("slurm"),
        "notes": notes.read_text(encoding="utf-8").replace("<!--", "&lt;!--").strip() if notes.is_file() else "",
        "status": status,
        "judged": {"outcome": status.get("state", "unknown")},
        "result": None,
        "entry": None,
    }
    with contextlib.suppress(FileNotFoundError):  # a run that failed has no final evaluation
        answers = find_eval(folder)
        frame = load_eval(answers, texts=False)
        record["judged"] = judged = load_json(folder / "verdict.json") or verdict.judge([folder]).to_dict()
        table = verdict.conditions_table(frame).query("subset == 'all'").set_index("condition")
        shares = {name: format_interval(row.accuracy, row.low, row.high) for name, row in table.iterrows()}
        counts = {"n": int(table["n"].iloc[0]), "recovered": _describe_recovery(frame), "answers": answers.name}
        record["result"] = counts | {name: shares[name] for name in ("source", "target", "bridged")}
        on_all = [c for c in judged["comparisons"] if c["control"] == "target" and c["subset"] == "all"]
        if on_all and all(c["difference"]["low"] > 0 for c in on_all):
            why = f"Does the target answer what only the source knows? {record['what']}."
            record["entry"] = _nest_entry(write_entry(folder, describe_run(folder), why, judged["text"]))
    return record


def _describe_recovery(frame: pd.DataFrame, subset: str = "source_only_held_unit") -> str:
    held = select(frame, subset)
    if held.empty or "target_told_correct" not in held or not held["target_told_correct"].any():
        return "not measured"
    share = paired_ratio(held, "bridged", "target_told")
    return f"{format_share(share.point)} (too little for an interval)" if math.isinf(share.high) else str(share)


def _describe_settings(settings: dict, facts: dict, status: dict) -> str:
    """Composition, size, what differs from the package's defaults, and on what machine and commit it ran."""
    default = to_flat(load_config())
    given = {key: value for key, value in settings.items() if key not in SHOWN and not key.startswith("run.")}
    changed = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in given.items() if v != default[k]]
    course = {"machine": _describe_machine(facts, status), "facts": facts, "status": status}
    return _one_line(render("settings.md.j2", settings=settings, changed=changed, **course))


def _nest_entry(path: Path) -> str:
    """A manifest entry as a subsection: headings of its prose stay below it, markers go."""
    name, entry = path.parent.name, path.read_text(encoding="utf-8").strip()
    lines = [line for line in entry.splitlines() if not line.startswith(("<!--", f"## `{name}`"))]
    text = re.sub(r"^#+ ", "#### ", "\n".join(lines).strip(), flags=re.MULTILINE)
    return f"### [`{name}`]({name}/{ENTRY})\n\n" + re.sub(r"\n{3,}", "\n\n", text)


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


def write_reports(runs_dir: Path) -> tuple[int, int]:
    """Write the three files from all runs that have ended, newest first; returns how many these are, and how many
    folders were left out, because they cannot be read. A run's record is made again where a file of it is newer."""
    records, damaged = [], 0
    with locked(runs_dir):
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
                print(f"warning: no report of {folder.name}: {_one_line(error)}", file=sys.stderr)
        records.sort(key=lambda record: (record["date"], record["name"]), reverse=True)
        for name, template in FILES.items():
            block = {"runs": render(f"{template}_runs.md.j2", records=records)}
            write_blocks(runs_dir / name, f"{template}.md.j2", block)
    return len(records), damaged


def append_appendix(report: Path, study: str, text: str) -> Path:
    """Put the comparative gains of a study into the report, in a block of its own; again, in the same place."""
    report.parent.mkdir(parents=True, exist_ok=True)
    with locked(report.parent):
        return write_blocks(report, "report.md.j2", {f"comparative gains of {study}": text})


@contextlib.contextmanager
def locked(runs_dir: Path) -> Iterator[None]:
    """Whoever else wants to write the reports of this folder waits; the system frees the lock of a killed process."""
    with open(runs_dir / ".reports.lock", "a") as file:
        if not take_lock(file, fcntl.LOCK_EX, LOCK_SECONDS):
            raise OSError(f"{file.name} has been held by another process for {LOCK_SECONDS} s")
        yield


def write_blocks(path: Path, template: str, blocks: dict[str, str], **values: object) -> Path:
    """Put generated blocks between their markers, a new one at the end; other text stays. A new file: its template."""
    text = path.read_text(encoding="utf-8") if path.is_file() else render(template, **values)
    for name, body in blocks.items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        if start not in text or end not in text.split(start, 1)[1]:
            text = f"{text.rstrip()}\n\n{start}\n{end}\n"
        before, rest = text.split(start, 1)
        body = re.sub(r"<!-- (?=(?:generated|end): )", "&lt;!-- ", body.strip())  # words of a run that hold a marker
        text = f"{before}{start}\n{body}\n{end}{rest.split(end, 1)[1]}"
    write_text_atomic(path, text)
    return path


def render(template: str, finalize: Callable | None = None, **values: object) -> str:
    """A template of `templates/`, filled in; `finalize` turns each value into what is printed."""
    return _make_environment(finalize).get_template(template).render(**values)


def write_html(executed: Path) -> None:
    """The same as a page for any browser, where JupyterLab is installed, which brings the exporter."""
    if importlib.util.find_spec("nbconvert"):
        from nbconvert import HTMLExporter

        page, _ = HTMLExporter().from_filename(str(executed))
        write_text_atomic(executed.with_suffix(".html"), page)


@functools.cache
def _make_environment(finalize: Callable | None) -> jinja2.Environment:
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True, "finalize": finalize}
    loader = jinja2.FileSystemLoader(Path(__file__).with_name("templates"))
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined, **options)
    environment.filters |= {"share": format_share, "line": _one_line, "quote": shlex.quote}
    return environment


def _one_line(text: object) -> str:
    """Text that can end no table cell, line or generated block, and begin no tag; cut where it is very long."""
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", " ".join(str(text).split())).replace("|", "\\|")
    return text if len(text) <= 1200 else text[:1197] + "..."


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit report` verb."""
    parser = Parser(prog="bridgekit report", description=__doc__.splitlines()[0])
    parser.add_argument("runs_dir", type=Path, help="the folder in which the run folders lie")
    runs_dir = parser.parse_args(argv).runs_dir
    if not runs_dir.is_dir():
        raise ValueError(f"{runs_dir}: no such folder; name the one in which the run folders lie")
    if not any(runs_dir.glob("*/config.yaml")):
        raise ValueError(f"{runs_dir}: no run folder in it; name the one in which they lie")
    for record in runs_dir.glob(f"*/{RECORD}"):
        record.unlink()
    n, damaged = write_reports(runs_dir)
    if not n and not damaged:
        raise ValueError(f"{runs_dir}: no run in it that has ended")
    print(f"{n} run{'s' * (n != 1)} in {', '.join(str(runs_dir / name) for name in FILES)}")
    return 2 if damaged else 0
