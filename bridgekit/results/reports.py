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
from collections import Counter
from pathlib import Path

from bridgekit.config import load_config, to_flat
from bridgekit.results import verdict
from bridgekit.results.statistics import paired_difference
from bridgekit.runs import find_eval, load_eval, load_jsonl, load_run_config, load_status, write_text_atomic

if typing.TYPE_CHECKING:
    import pandas as pd

LOG, SUMMARY, REPORT, RECORD = "LOG.md", "EXPERIMENTS_SUMMARY.md", "REPORT.md", "report.json"
FILES = {LOG: "log.md.j2", SUMMARY: "summary.md.j2", REPORT: "report.md.j2"}
ENTRY, UNWRITTEN = "manifest.md", "_Not written yet._"
COLUMNS = ("run", "date (UTC)", "bridge", "direction", "seed", "n", "source", "target", "bridged",
           "recovered, held-out units", "verdict", "answers")  # fmt: skip
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
    facts, status, lines = load_json(folder / "provenance.json"), load_status(folder), []
    try:
        lines += describe_answers(load_eval(find_eval(folder), skip_broken=True, texts=False))
    except (FileNotFoundError, ValueError) as error:
        lines.append(f"- note: {_one_line(str(error))}")
    metrics = folder / "metrics.jsonl"
    steps = [row["step"] for row in load_jsonl(metrics, []) if "loss" in row] if metrics.is_file() else []
    course = [
        steps and f"{steps[-1]:,} steps", status.get("parameters") and f"{status['parameters']:,} trained parameters",
        facts.get("processes") and f"{facts['processes']} × {', '.join(facts.get('gpus') or []) or 'CPU'}",
        facts.get("started") and f"started {facts['started']}",
    ]  # fmt: skip
    lines += ["- " + "; ".join(part for part in course if part)] if any(course) else []
    for control, selected in load_control_steps(folder).items():
        weights = ", ".join(f"step {step}{' (untrained)' * (not step)} by {name}" for name, step in selected.items())
        lines.append(f"- weights of the trained control `{control}`: {weights}")
    return "\n".join(lines)


def load_control_steps(folder: Path) -> dict[str, dict[str, int]]:
    """{control: {selection: step its weights come from}}; of older runs from their validation: the last best one."""
    if (folder / "controls.json").is_file():
        return load_json(folder / "controls.json")
    steps = {}
    for path in sorted(folder.glob("metrics_*.jsonl")):
        control = path.stem.removeprefix("metrics_")
        scores = [(row["eval"][control], row["step"]) for row in load_jsonl(path, []) if control in row.get("eval", {})]
        if scores:
            steps[control] = {"mix": max(scores)[1]}
    return steps


def describe_answers(frame: pd.DataFrame, where: str = "final evaluation") -> list[str]:
    """A table of an evaluation, the source-only problems below; intervals over units where there are units."""
    table = verdict.conditions_table(frame)
    over = "questions" if table["n"].eq(table["n_units"]).all() else "units"
    lines = [f"| condition, {where} | right | accuracy | 95% interval over {over} |", "|---|---|---|---|"]
    for row in table[table["subset"].isin(["all", "source_only"])].to_dict("records"):
        name = row["condition"] + (", source-only problems" if row["subset"] == "source_only" else "")
        right, interval = round(row["accuracy"] * row["n"]), f"{row['low']:.3f} to {row['high']:.3f}"
        lines.append(f"| {name} | {right}/{row['n']} | {row['accuracy']:.3f} | {interval} |")
    rows = verdict.select_subset(frame)
    if {"bridged_correct", "target_correct"} <= set(rows):
        test = paired_difference(rows, "bridged", "target")
        p = f"McNemar p = {test.mcnemar_p:.2g}" if over == "questions" else f"over {test.n_clusters} units"
        gain = f"difference {test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f}, {p})"
        lines += ["", f"- against the target alone: {test.gained} gained, {test.lost} lost, {gain}"]
    return lines


def _describe_files(folder: Path) -> str:
    """Every file of a run with its size; what is still being written is left out."""
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name, size = path.relative_to(folder).as_posix(), path.stat().st_size
        passing = ".running." in name or any(part.startswith(".") for part in name.split("/"))
        if not passing and name not in (ENTRY, RECORD, "checksums.json"):
            lines.append(f"- `{name}` ({f'{size / 1e6:.1f} MB' if size >= 1e6 else f'{size / 1e3:.1f} kB'})")
    return "\n".join(lines)


# -- a run's part of the reports ----------------------------------------------------------------------------


def build_record(folder: str | Path) -> dict:
    """A run's part of the reports, recomputed from its files: name date log, row and entry (null where it has none)."""
    folder = Path(folder)
    settings = to_flat(load_run_config(folder))
    facts, status = load_json(folder / "provenance.json"), load_status(folder)
    record = {"name": folder.name, "date": _find_date(folder, facts), "row": None, "entry": None}
    what, outcome, lines = _describe_settings(settings, facts, status), status.get("state", "unknown"), []
    with contextlib.suppress(FileNotFoundError):  # a run that failed has no final evaluation
        answers = find_eval(folder)
        frame = load_eval(answers, texts=False)
        judged = load_json(folder / "verdict.json") or verdict.judge([frame], seeds=[settings["run.seed"]]).to_dict()
        outcome, table = judged["outcome"], verdict.conditions_table(frame).query("subset == 'all'")
        shares = {r.condition: f"{r.accuracy:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in table.itertuples()}
        n, recovered = f"{table['n'].iloc[0]:,}", _describe_recovery(frame)
        link, bridge = f"[{answers.name}]({folder.name}/{answers.name})", _name_bridge(settings)
        cells = (f"[`{folder.name}`]({folder.name})", record["date"], bridge, settings["pair.direction"],
                 settings["run.seed"], n, shares["source"], shares["target"], shares["bridged"], recovered, outcome,
                 link)  # fmt: skip
        record["row"] = dict(zip(COLUMNS, map(str, cells), strict=True))
        result = ", ".join(f"{c} {shares[c]}" for c in ("source", "target", "bridged"))
        lines = [f"- result on {n} test problems: {result}; recovered on held-out units {recovered}",
                 f"- verdict: {judged['text']}", f"- answers: {link}"]  # fmt: skip
        if _beats_target(judged):
            why = f"Does the target answer what only the source knows? {what}."
            entry = write_entry(folder, describe_run(folder), why, judged["text"]).read_text(encoding="utf-8")
            record["entry"] = _nest_entry(entry, folder.name)
    if status.get("state") == "failed":
        lines.append(f"- failed in {status.get('stage') or 'no stage'}: {_one_line(status.get('error') or 'unknown')}")
    if (folder / "notes.md").is_file():
        lines += ["", (folder / "notes.md").read_text(encoding="utf-8").replace("<!--", "&lt;!--").strip()]
    heading = f"### {record['date']} · `{folder.name}` · {outcome}"
    return record | {"log": "\n".join([heading, f"- what: {what}", *lines])}


def _describe_recovery(frame: pd.DataFrame, subset: str = "source_only_held_unit") -> str:
    held = verdict.select_subset(frame, subset, allow_empty=True)
    if held.empty or "target_told_correct" not in held or not held["target_told_correct"].any():
        return "not measured"
    share = verdict.recovery(frame, subset=subset)
    return str(share) if math.isfinite(share.high) else f"{share.point:.3f} (too little for an interval)"


def _beats_target(judged: dict) -> bool:
    on_all = [c for c in judged["comparisons"] if c["control"] == "target" and c["subset"] == "all"]
    return bool(on_all) and all(c["difference"]["low"] > 0 for c in on_all)


def _name_bridge(settings: dict) -> str:
    return f"{settings['bridge.producer']} × {settings['bridge.injector']}"


def _describe_settings(settings: dict, facts: dict, status: dict) -> str:
    """Composition, size, what differs from the package's defaults, and on what machine and commit it ran."""
    default, k = to_flat(load_config()), settings["bridge.n_soft_tokens"]
    shown = ("bridge.producer", "bridge.injector", "bridge.n_soft_tokens", "train.steps", "train.batch_size",
             "pair.direction", "eval.conditions")  # fmt: skip
    given = {k: v for k, v in settings.items() if k in default and k not in shown and not k.startswith("run.")}
    changed = [f"{k}={list(v) if isinstance(v, tuple) else v}" for k, v in given.items() if v != default[k]]
    parts = [
        f"{_name_bridge(settings)}, {settings['pair.direction']}",
        "as many soft tokens as the source's prompt has" if k == -1 else f"{k} soft tokens",
        f"{settings['train.steps']:,} steps of {settings['train.batch_size']}, seed {settings['run.seed']}",
        facts.get("processes") and f"{facts['processes']} × {', '.join(facts.get('gpus') or []) or 'CPU'}",
        facts.get("commit") and f"commit {facts['commit'][:7]}" + (" with changes" if facts.get("dirty") else ""),
        status.get("parameters") and f"{status['parameters']:,} trained parameters",
        status.get("elapsed") and f"{status['elapsed'] / 60:.1f} minutes",
    ]
    text = "; ".join(part for part in parts if part)
    return _one_line(text + (f". Unlike the defaults: {', '.join(changed)}" if changed else ""))


def _nest_entry(entry: str, name: str) -> str:
    """A manifest entry as a subsection: headings of its prose stay below it, markers go."""
    lines = [line for line in entry.strip().splitlines() if not line.startswith(("<!--", f"## `{name}`"))]
    text = re.sub(r"^#+ ", "#### ", "\n".join(lines).strip(), flags=re.MULTILINE)
    return f"### [`{name}`]({name}/{ENTRY})\n\n" + re.sub(r"\n{3,}", "\n\n", text)


def _find_date(folder: Path, facts: dict) -> str:
    """When the run began, in UTC: by its own record, its folder's stamp (local time), or its configuration's age."""
    if started := facts.get("started"):
        moment = datetime.datetime.fromisoformat(started)
    elif stamp := re.search(r"\d{8}_\d{6}", folder.name):
        moment = datetime.datetime.strptime(stamp[0], "%Y%m%d_%H%M%S")
    else:
        moment = datetime.datetime.fromtimestamp((folder / "config.yaml").stat().st_mtime)
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


def write_reports(runs_dir: str | Path) -> tuple[int, int]:
    """Write the three files from all runs that have ended; returns how many are in them, and how many are damaged."""
    runs_dir = Path(runs_dir)
    with locked(runs_dir):
        records, damaged = load_records(runs_dir)
        winners = [record["entry"] for record in records if record["entry"]]
        rows = [record["row"] for record in records if record["row"]]
        counts = Counter(row["verdict"] for row in rows)
        blocks = {
            LOG: "\n\n".join(record["log"] for record in records),
            SUMMARY: _table(rows),
            REPORT: render("report_runs.md.j2", rows=rows, counts=counts, winners=winners),
        }
        for name, body in blocks.items():
            edit_file(runs_dir / name, lambda text, body=body: replace_block(_OLD_BLOCKS.sub("", text), "runs", body))
    return len(records), damaged


def load_records(runs_dir: Path) -> tuple[list[dict], int]:
    """What each run that has ended says of itself, newest first; made again where a file of it is newer.

    A folder that cannot be read is named and left out.
    """
    records, damaged = [], 0
    for folder in sorted(path.parent for path in runs_dir.glob("*/config.yaml")):
        try:
            if load_status(folder).get("state") not in ("finished", "failed"):
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
    changed = change(text if text is not None else render(FILES[path.name]) if path.name in FILES else "")
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
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(template).render(**values)


def load_json(path: Path) -> dict:
    """A JSON file; {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise ValueError(f"{path}: not whole JSON; restore it, or remove it") from None


def _table(rows: list[dict[str, str]]) -> str:
    words = ("run", "date (UTC)", "bridge", "direction", "verdict", "answers")
    rule = ["---" if column in words else "---:" for column in COLUMNS]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (COLUMNS, rule, *(row.values() for row in rows)))


def _one_line(text: str, longest: int = 1200) -> str:
    """Text that can end neither a table cell, nor a line, nor a generated block."""
    text = " ".join(str(text).split()).replace("<!--", "&lt;!--").replace("|", "\\|")
    return text if len(text) <= longest else text[: longest - 3] + "..."


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
