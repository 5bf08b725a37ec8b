"""Manifest entries of preserved runs and the README made from them.

An entry is `manifest.md` in the run's folder, in five parts: why, command, key metrics, publishability, artifacts.
Only what stands between `<!-- generated: x -->` and `<!-- end: x -->` is ever written again; prose stays as it is.
"""

from __future__ import annotations

from pathlib import Path

from bridgekit.outcomes import conditions_of, is_right
from bridgekit.runfolders import RunRecord, find_runs, read_run
from bridgekit.runs import write_text_atomic
from bridgekit.stats import mcnemar_exact, wilson

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

Every run that a number in this project or in the first experiments' documents rests on. Each folder holds what the
number is recomputed from; `bridgekit audit` does so and says which claims stand, `bridgekit preserve RUN` adds a run.

## What the audit finds

<!-- generated: findings -->
_Run `bridgekit audit --update-readme`._
<!-- end: findings -->

## Runs

<!-- generated: runs -->
<!-- end: runs -->
"""


def replace_block(text: str, name: str, body: str) -> str:
    """Put `body` between the markers of one generated block; text without the markers gets them at its end."""
    start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    if start not in text or end not in text.split(start, 1)[1]:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    before, rest = text.split(start, 1)
    return f"{before}{start}\n{body.strip()}\n{end}{rest.split(end, 1)[1]}"


def write_entry(
    folder: Path, record: RunRecord, why: str = UNWRITTEN, publishability: str = UNWRITTEN
) -> Path:
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
    """Accuracies with Wilson intervals, gains and harms against the target, and how the run went, as Markdown."""
    lines = []
    steps = record.steps()
    if steps:
        last = record.at(steps[-1])
        where = (
            "final evaluation"
            if steps[-1] == "final"
            else f"last evaluation (step {steps[-1]}; no final one)"
        )
        lines += [f"| condition, {where} | right | accuracy | 95% interval |", "|---|---|---|---|"]
        for condition in [c for c in conditions_of(last) if last[f"{c}_pred"].notna().all()]:
            right, n = int(is_right(last, condition).sum()), len(last)
            low, high = wilson(right, n)
            lines.append(f"| {condition} | {right}/{n} | {right / n:.3f} | {low:.3f} to {high:.3f} |")
        lines.append("")
        if {"bridged", "target"} <= set(conditions_of(last)):
            bridged, target = is_right(last, "bridged"), is_right(last, "target")
            gained, lost = int((bridged & ~target).sum()), int((target & ~bridged).sum())
            p = mcnemar_exact(gained, lost)
            lines.append(f"- against the target alone: {gained} gained, {lost} lost (McNemar p = {p:.2g})")
        if len(steps) > 2 and "bridged_acc" in record.curve:
            curve = record.curve[record.curve["step"] != "final"]
            peak = curve.loc[curve["bridged_acc"].idxmax()]
            lines.append(
                f"- highest of {len(curve)} numbered evaluations: {peak['bridged_acc']:.3f} at step {peak['step']}"
            )
    facts = record.facts
    done = len(record.losses) and f"{int(record.losses['step'].iloc[-1])} steps"
    told = [
        done,
        facts.get("parameters_m") and f"{facts['parameters_m']}M trained parameters",
        facts.get("world_size") and f"{facts['world_size']} × {facts.get('gpu') or 'processes'}",
        facts.get("started") and f"started {facts['started']}",
        facts.get("ended") and f"ended {facts['ended']}",
    ]
    lines.append("- " + "; ".join(str(part) for part in told if part)) if any(told) else None
    lines += [
        f"- crash: {c['kind']} after step {c['step']}{', ' + c['where'] if c.get('where') else ''}"
        for c in facts.get("crashes") or []
    ]
    lines += [f"- note: {problem}" for problem in record.problems]
    return "\n".join(lines)


def describe_files(folder: Path) -> str:
    skip = (ENTRY, "checksums.json")
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in skip]
    return "\n".join(f"- `{p.relative_to(folder).as_posix()}` ({_size(p.stat().st_size)})" for p in files)


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"


def write_manifest(root: str | Path, blocks: dict[str, str] | None = None) -> Path:
    """Bring every entry and the README of `root` up to date; `blocks` are further generated blocks by name."""
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
    return (
        f"| [`{record.name}`]({folder.relative_to(root).as_posix()}) | {evaluations} | "
        + " | ".join(cells)
        + " |"
    )
