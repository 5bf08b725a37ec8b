"""Manifest entries of preserved runs and the README made from them.

An entry is `manifest.md` in the run's folder: why, command, key metrics, publishability, artifacts. Only what
stands between `<!-- generated: x -->` and `<!-- end: x -->` is ever written again; prose stays as it is.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from bridgekit.audit.outcomes import conditions_of, evaluation_files, is_right
from bridgekit.audit.runfolders import RunRecord, find_runs, read_run
from bridgekit.results.statistics import clustered_proportion, paired_difference, wilson
from bridgekit.runs import load_eval, write_text_atomic

ENTRY = "manifest.md"
README = "README.md"
UNWRITTEN = "_Not written yet._"

_TEMPLATE = """## `{name}`

**Why it was run.** {why}

**Command.** {command}

**Key metrics.**

<!-- generated: metrics -->
<!-- end: metrics -->

**Publishability.** {publishability}

**Artifacts.**

<!-- generated: artifacts -->
<!-- end: artifacts -->
"""

_README = """# Preserved runs

Every run that a number in this project or in the first experiments' documents rests on. Each folder holds
what the number is recomputed from: `bridgekit audit` does so and says which claims stand, `bridgekit preserve
RUN` adds a run. For the plan, `differs` means that it was not done as planned.

## What the audit finds

<!-- generated: findings -->
_Run `bridgekit audit --update-readme`._
<!-- end: findings -->

## Runs

<!-- generated: runs -->
<!-- end: runs -->
"""


def replace_block(text: str, name: str, body: str) -> str:
    """Put `body` between the markers of a generated block; text without them gets them at its end."""
    start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    if start not in text or end not in text.split(start, 1)[1]:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    before, rest = text.split(start, 1)
    return f"{before}{start}\n{body.strip()}\n{end}{rest.split(end, 1)[1]}"


def write_entry(folder: Path, record: RunRecord, why: str = UNWRITTEN, publishability: str = UNWRITTEN) -> Path:
    """Create the entry from the template, or bring the generated parts of an existing one up to date."""
    path = folder / ENTRY
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        command = record.facts.get("command")
        command = " ".join(command) if isinstance(command, list) else command
        text = _TEMPLATE.format(
            name=record.name, why=why, publishability=publishability,
            command=f"`{command}`" if command else "not logged",
        )  # fmt: skip
    text = replace_block(text, "metrics", describe_metrics(record))
    text = replace_block(text, "artifacts", describe_files(folder))
    write_text_atomic(path, text)
    return path


def describe_metrics(record: RunRecord) -> str:
    """Markdown: accuracies with intervals, gains and harms against the target, how the run went."""
    lines = []
    if steps := record.steps():
        lines += _describe_answers(record, steps[-1])
        numbered = record.curve[record.curve["step"] != "final"]
        if len(numbered) > 1 and "bridged_acc" in numbered:
            peak = numbered.loc[numbered["bridged_acc"].idxmax()]
            found = f"{peak['bridged_acc']:.3f} at step {peak['step']}"
            lines.append(f"- highest of {len(numbered)} numbered evaluations: {found}")
    elif len(record.logged):
        row = record.logged.iloc[-1].dropna()
        told = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "step")
        lines.append(f"- no answers kept; the log's last evaluation (step {row['step']}): {told}")
    return "\n".join(lines + _describe_course(record))


def _describe_answers(record: RunRecord, step: str) -> list[str]:
    """A table of the last evaluation; intervals over units where the questions have them."""
    last, units = record.at(step), _units_of(record)
    where = "final evaluation" if step == "final" else f"last evaluation (step {step}; no final one)"
    lines = [f"| condition, {where} | right | accuracy | 95% interval |", "|---|---|---|---|"]
    right = {c: is_right(last, c) for c in conditions_of(last) if last[f"{c}_pred"].notna().all()}
    for condition, found in right.items():
        k, n = int(found.sum()), len(found)
        low, high = wilson(k, n)
        if units is not None:
            interval = clustered_proportion(found, units.reindex(last.index))
            low, high = interval.low, interval.high
        lines.append(f"| {condition} | {k}/{n} | {k / n:.3f} | {low:.3f} to {high:.3f} |")
    lines.append("")
    if {"bridged", "target"} <= set(right):
        frame = pd.DataFrame({f"{c}_correct": right[c] for c in ("bridged", "target")})
        test = paired_difference(
            frame if units is None else frame.assign(unit=units.reindex(last.index).values),
            "bridged",
            "target",
        )
        p = f"McNemar p = {test.mcnemar_p:.2g}" if units is None else f"over {test.n_clusters} units"
        lines.append(f"- against the target alone: {test.gained} gained, {test.lost} lost, difference "
                     f"{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f}, {p})")  # fmt: skip
    return lines


def _units_of(record: RunRecord) -> pd.Series | None:
    """The unit of each question of a run of this package, by index; None where questions are independent."""
    if record.generation != "bridgekit" or not (files := evaluation_files(record.folder)):
        return None
    try:
        frame = load_eval(files[-1][1])
    except (ValueError, KeyError, OSError):
        return None  # the damage is among the record's problems already
    known = "unit" in frame and frame["unit"].notna().any() and frame["index"].is_unique
    return frame.set_index("index")["unit"] if known else None


def _describe_course(record: RunRecord) -> list[str]:
    facts = record.facts
    told = [
        len(record.losses) and f"{int(record.losses['step'].iloc[-1])} steps",
        facts.get("parameters_m") and f"{facts['parameters_m']}M trained parameters",
        facts.get("world_size") and f"{facts['world_size']} × {facts.get('gpu') or 'processes'}",
        facts.get("started") and f"started {facts['started']}",
        facts.get("ended") and f"ended {facts['ended']}",
    ]
    lines = ["- " + "; ".join(str(part) for part in told if part)] if any(told) else []
    for crash in facts.get("crashes") or []:
        where = f", {crash['where']}" if crash.get("where") else ""
        lines.append(f"- crash: {crash['kind']} after step {crash['step']}{where}")
    return lines + [f"- note: {problem}" for problem in record.problems]


def describe_files(folder: Path) -> str:
    skip = (ENTRY, "checksums.json")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in skip and not _is_passing(p, folder)]
    return "\n".join(f"- `{p.relative_to(folder).as_posix()}` ({_size(p.stat().st_size)})" for p in files)


def _is_passing(path: Path, folder: Path) -> bool:
    """A hidden part file, or the notebook that is still being executed: not there under this name for long."""
    return ".running." in path.name or any(part.startswith(".") for part in path.relative_to(folder).parts)


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def write_manifest(root: str | Path, blocks: dict[str, str] | None = None) -> Path:
    """Bring every entry and the README of `root` up to date; `blocks` are further generated blocks."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    entries, rows = [], ["| run | evaluations | bridged | target | source |", "|---|---|---|---|---|"]
    for folder in find_runs(root):
        record = read_run(folder)
        entry = write_entry(folder, record).read_text(encoding="utf-8").strip()
        entries.append("\n".join(line for line in entry.split("\n") if not line.startswith("<!--")))
        rows.append(_table_row(root, folder, record))
    path = root / README
    text = path.read_text(encoding="utf-8") if path.is_file() else _README
    for name, body in {"runs": "\n".join(rows) + "\n\n" + "\n\n".join(entries), **(blocks or {})}.items():
        text = replace_block(text, name, body)
    write_text_atomic(path, text)
    return path


def _table_row(root: Path, folder: Path, record: RunRecord) -> str:
    steps = record.steps()
    last = record.at(steps[-1]) if steps else None
    cells = [
        f"{is_right(last, c).mean():.3f}" if last is not None and c in conditions_of(last) else ""
        for c in ("bridged", "target", "source")
    ]
    evaluations = f"{len(steps)}, last {steps[-1]}" if steps else "none"
    return f"| [`{record.name}`]({folder.relative_to(root).as_posix()}) | {evaluations} | " + " | ".join(cells) + " |"
