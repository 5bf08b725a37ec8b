"""The three reports of a runs folder, kept by the runs themselves.

    report_end("runs/phase1_20261120_132037")  # what a run calls when it has finished or failed
    bridgekit report runs                      # all of them again, from the run folders

`LOG.md` has an entry for each run, newest first; `EXPERIMENTS_SUMMARY.md` a row; `REPORT.md` the latest results in
words and a manifest subsection for each run that beats the target. Only what stands between `<!-- generated: x -->`
and `<!-- end: x -->` is ever written again, and a run replaces its own part alone: text around the markers stays.
Runs that end at once wait for each other, so none is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import re
import sys
import typing
from collections import Counter
from pathlib import Path

from bridgekit.results.manifest import replace_block
from bridgekit.results.report_entry import COLUMNS, Entry, read_entry
from bridgekit.runs import read_status, write_text_atomic

LOG, SUMMARY, REPORT = "LOG.md", "EXPERIMENTS_SUMMARY.md", "REPORT.md"
LATEST = 8  # runs that REPORT.md tells in words
_TEMPLATES = {
    LOG: """# Log

An entry for each run, newest first, written by the run itself. What is written around the entries stays: the
hypothesis before a run, the remark after it.
""",
    SUMMARY: """# Experiments

A row for each run with a final evaluation, newest first, written by the run itself: test accuracy on the mix of
held-out problems with 95% intervals over units. "Recovered" is the share of what the target gets right when it is
told the fact. A row is one training seed; `bridgekit verdict RUN RUN RUN` judges several together.

<!-- generated: runs -->
<!-- end: runs -->
""",
    REPORT: """# Report

## Latest runs

<!-- generated: latest -->
<!-- end: latest -->

## Runs that beat the target

The paired interval of bridged minus target lies above zero. Prose belongs into the `manifest.md` of a run's folder;
from there it comes here when the run is reported again.

<!-- generated: winners -->
<!-- end: winners -->
""",
}
_LOG_ENTRY = re.compile(
    r"<!-- generated: log (?P<name>[^\n]+?) -->\n(?:### (?P<date>.{16}))?.*?<!-- end: log (?P=name) -->\n*", re.DOTALL
)
ROW, SUBSECTION = "| [`", "### [`"  # what a run's part of a block begins with; its name follows


def report_end(folder: str | Path) -> None:
    """Report a run that has just ended. A report that cannot be written is no reason for the run to fail."""
    folder = Path(folder).resolve()
    if not (folder / "config.yaml").is_file():
        return  # a notebook's own folder, or a run that never began
    try:
        write_reports(folder.parent, [read_entry(folder)])
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        print(f"warning: no report of {folder.name} ({said}): bridgekit report {folder.parent}", file=sys.stderr)


def write_reports(runs_dir: str | Path, entries: list[Entry], gone: typing.Callable[[str], bool] | None = None) -> None:
    """Put entries into the three files; `gone(name)` says which earlier ones are to be taken out."""
    runs_dir, gone = Path(runs_dir), gone or (lambda name: False)
    with locked(runs_dir):
        edit_file(runs_dir / LOG, lambda text: _put_logs(text, entries, gone))
        rows = {e.name: e.row for e in entries}
        summary = edit_file(runs_dir / SUMMARY, lambda text: _put_keyed(text, "runs", ROW, rows, gone, _sort_rows))
        subsections = {e.name: e.subsection for e in entries}
        latest = describe_latest(_block(summary, "runs"))

        def change(text: str) -> str:
            text = replace_block(text, "latest", latest)
            return _put_keyed(text, "winners", SUBSECTION, subsections, gone, _join_subsections)

        edit_file(runs_dir / REPORT, change)


@contextlib.contextmanager
def locked(runs_dir: str | Path) -> typing.Iterator[None]:
    """Whoever else wants to write the reports of this folder waits; the system frees the lock of a killed process."""
    with open(Path(runs_dir) / ".reports.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def edit_file(path: Path, change: typing.Callable[[str], str]) -> str:
    """Read, change, write atomically; to be called inside `locked`. Returns the new text."""
    text = path.read_text(encoding="utf-8") if path.is_file() else None
    changed = change(_TEMPLATES.get(path.name, "") if text is None else text)
    if changed != text:
        write_text_atomic(path, changed)
    return changed


# -- putting it into the files ------------------------------------------------------------------------------


def _put_logs(text: str, entries: list[Entry], gone: typing.Callable[[str], bool]) -> str:
    """Each entry between markers of its own, before the first older one; what stands between entries stays."""
    for found in list(_LOG_ENTRY.finditer(text)):
        if gone(found["name"]):
            text = text.replace(found[0], "")
    for entry in entries:
        there = {found["name"]: found for found in _LOG_ENTRY.finditer(text)}
        block = f"<!-- generated: log {entry.name} -->\n{entry.log}\n<!-- end: log {entry.name} -->"
        if entry.name in there and there[entry.name]["date"] == entry.date:
            text = replace_block(text, f"log {entry.name}", entry.log)
            continue
        if entry.name in there:  # a run that was made again is a newer one
            text = text.replace(there[entry.name][0], "")
        older = [m for m in _LOG_ENTRY.finditer(text) if (m["date"] or "", m["name"]) < (entry.date, entry.name)]
        place = older[0].start() if older else len(text)  # a remark below the last entry stays with that
        before, after = text[:place].rstrip("\n"), text[place:].lstrip("\n")
        text = f"{before}\n\n{block}\n" + (f"\n{after}" if after else "")
    return text


def _put_keyed(text: str, block: str, begin: str, parts: dict[str, str | None], gone, join) -> str:
    """The rows or subsections of a block, those of `parts` replaced; None takes one out."""
    pieces = ("\n" + _block(text, block)).split("\n" + begin)[1:]
    kept = {piece.split("`]", 1)[0]: begin + piece.strip() for piece in pieces}
    kept = {name: part for name, part in (kept | parts).items() if part and not gone(name)}
    return replace_block(text, block, join([kept[name] for name in sorted(kept)]))


def _sort_rows(rows: list[str]) -> str:
    rows = sorted(rows, key=lambda row: (_cells(row)["date (UTC)"], row), reverse=True)
    words = ("run", "date (UTC)", "bridge", "direction", "verdict", "answers")
    rule = ["---" if column in words else "---:" for column in COLUMNS]
    return "\n".join([f"| {' | '.join(line)} |" for line in (COLUMNS, rule)] + rows)


def _join_subsections(found: list[str]) -> str:
    return "\n\n".join(found) or "_None yet._"


def _cells(row: str) -> dict[str, str]:
    return dict(zip(COLUMNS, row.strip("| ").split(" | "), strict=False))


def _block(text: str, name: str) -> str:
    inside = re.search(rf"<!-- generated: {name} -->\n(.*?)<!-- end: {name} -->", text, re.DOTALL)
    return inside[1] if inside else ""


def describe_latest(table: str) -> str:
    """Outcomes counted, and the newest runs in words, from the rows of the summary."""
    rows = [_cells(line) for line in table.splitlines() if line.startswith(ROW)]
    if not rows:
        return "_No run has a final evaluation yet._"
    counts = Counter(row["verdict"] for row in rows)
    order = [name for name in ("transfers", "unproven", "fails", "harms") if counts[name]]
    lines = [f"{len(rows)} runs in [{SUMMARY}]({SUMMARY}): " + ", ".join(f"{counts[o]} {o}" for o in order) + ".", ""]
    for row in rows[:LATEST]:
        lines.append(
            f"- {row['run']} ({row['date (UTC)']}, {row['bridge']}, {row['direction']}, seed {row['seed']}): "
            f"**{row['verdict']}**. Bridged {row['bridged']} where the target alone has {row['target']} and the source "
            f"{row['source']}; recovered on held-out units {row['recovered, held-out units']}; n = {row['n']}."
        )
    return "\n".join(lines)


# -- all of them again --------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit report` verb."""
    parser = argparse.ArgumentParser(prog="bridgekit report", description=__doc__.splitlines()[0])
    parser.add_argument("runs_dir", type=Path, help="the folder in which the run folders lie")
    runs_dir = parser.parse_args(argv).runs_dir
    if not runs_dir.is_dir():
        raise ValueError(f"{runs_dir}: no such folder; name the one in which the run folders lie")
    entries, failed = [], 0
    for folder in sorted(path for path in runs_dir.iterdir() if (path / "config.yaml").is_file()):
        if read_status(folder).get("state") not in ("finished", "failed"):
            continue  # still running, or killed before it could say so
        try:
            entries.append(read_entry(folder))
        except (ValueError, KeyError, OSError) as error:
            failed = 2
            print(f"error: {folder.name}: {' '.join(str(error).split())}", file=sys.stderr)
    if not entries:
        raise ValueError(f"{runs_dir}: no run in it that has ended")
    write_reports(runs_dir, entries, gone=lambda name: not (runs_dir / name).is_dir())
    print(f"{len(entries)} runs in {', '.join(str(runs_dir / name) for name in (LOG, SUMMARY, REPORT))}")
    return failed
