"""Recompute every claim of the first experiments from their data, and say what is wrong with the runs themselves.

    bridgekit audit                        text
    bridgekit audit --format json          the same for a program; html and markdown for readers
    bridgekit audit --update-readme        put findings and verdicts into preserved_data/README.md

It only reads (except for that README and --output), needs no torch, and goes on when a run is damaged. The exit code
is 1 where a kept run has changed, is gone or cannot be read.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from bridgekit.audit.claims import VERDICTS, Records, Verdict, judge, load_claims
from bridgekit.audit.findings import Finding, find_all
from bridgekit.audit.first_runs import load_run
from bridgekit.audit.keep import write_manifest
from bridgekit.config import Parser
from bridgekit.results.preserve import ROOT, changed_files, find_runs
from bridgekit.results.reports import ENTRY, render
from bridgekit.runs import write_text_atomic

FORMATS = {"text": "audit.txt.j2", "json": "", "html": "audit.html.j2", "markdown": "findings.md.j2"}


@dataclass
class Audit:
    """Everything one audit says."""

    records: Records = field(default_factory=Records)
    verdicts: list[Verdict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    documents: dict[str, str] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)  # kept runs that changed, are gone or cannot be read

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(verdict.verdict for verdict in self.verdicts)
        return {name: found[name] for name in VERDICTS}


def run_audit(root: str | Path = ROOT) -> Audit:
    """Audit all runs below `root` and the claims beside them; a damaged run is a line in the report, not its end."""
    root, audit = Path(root), Audit()
    for folder in find_runs(root):
        place = folder.relative_to(root)
        try:
            record, changed = load_run(folder), changed_files(folder)
            alone = Records({record.name: record})  # what cannot be counted would stop the others' audit too
            find_all(alone), labels_moved(alone)
        except Exception as error:  # noqa: BLE001 - whatever is damaged, it is this run's
            said = " ".join(str(error).split()) or type(error).__name__
            audit.damaged.append(f"{place}: cannot be read: {said}")
            continue
        changes = [f"{name} is not what was preserved (checksum)" for name in changed]
        if record.generation == "derived" and not (folder / "checksums.json").is_file():
            changes.append("checksums.json is gone: nothing says what was preserved")
        audit.damaged += [f"{place}: {change}" for change in changes]
        if (first := audit.records.setdefault(record.name, record)) is not record:
            other = first.folder.relative_to(root)
            record.problems.append(f"the name '{record.name}' is also that of {other}; only that one is used")
        audit.problems += [f"{place}: {problem}" for problem in record.problems]
    if (root / "claims.yaml").is_file():
        claims, audit.documents = load_claims(root / "claims.yaml")
        audit.verdicts = [judge(claim, audit.records) for claim in claims]
    listed = (root / "README.md").read_text(encoding="utf-8") if (root / "README.md").is_file() else ""
    gone = {run for run in re.findall(rf"\]\(([\w./-]+)/{ENTRY}\)", listed) if not (root / run).is_dir()}
    audit.damaged += [f"{run}: gone, but README.md lists it" for run in sorted(gone)]
    audit.problems += audit.damaged
    audit.findings = find_all(audit.records, audit.verdicts)
    return audit


def labels_moved(records: Records) -> pd.DataFrame:
    """Per extraction rule: labels that move when preserved texts are scored again, and right answers then."""
    files = [path for record in records.values() if (path := record.folder / "rescored.csv").is_file()]
    if not files:
        return pd.DataFrame()
    counts = pd.concat(map(pd.read_csv, files)).drop(columns="step")
    return counts.groupby(["rule", "condition"], sort=False).sum().reset_index()


def format_audit(audit: Audit, form: str = "text") -> str:
    """An audit in one of the FORMATS; `markdown` is the generated block of preserved_data/README.md."""
    moved, first = labels_moved(audit.records), [r.name for r in audit.records.values() if r.generation != "bridgekit"]
    if form == "json":
        content = {
            "runs": list(audit.records),
            "counts": audit.counts,
            "claims": [asdict(verdict) for verdict in audit.verdicts],
            "findings": [asdict(finding) for finding in audit.findings],
            "labels_moved": moved.to_dict("records"),
            "problems": audit.problems,
        }
        return json.dumps(content, indent=1, ensure_ascii=False, default=str)
    return render(FORMATS[form], counts=audit.counts, moved=moved, first=first, **vars(audit)).rstrip()


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit audit` verb."""
    parser = Parser(prog="bridgekit audit", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=str(ROOT), help="the preserved runs (default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")
    parser.add_argument("--update-readme", action="store_true", help="write the findings into the README of the root")
    args = parser.parse_args(argv)
    audit = run_audit(args.root)
    report = format_audit(audit, args.format)
    if args.output:
        write_text_atomic(args.output, report + "\n")
    else:
        print(report)
    if args.update_readme:
        write_manifest(args.root, {"findings": format_audit(audit, "markdown")})
    return 1 if audit.damaged else 0
