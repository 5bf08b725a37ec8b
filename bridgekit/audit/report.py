"""Recompute every claim of the first experiments from their data, and say what is wrong with the runs themselves.

    bridgekit audit                        text
    bridgekit audit --format json          the same for a program; --format html for a page
    bridgekit audit --update-readme        put findings and verdicts into preserved_data/README.md

It only reads (except for that README and --output), needs no torch, and goes on when a run is damaged.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from bridgekit.audit.claims import VERDICTS, Verdict, judge, load_claims
from bridgekit.audit.findings import Finding, find_all
from bridgekit.audit.first_runs import Record, find_runs, load_run
from bridgekit.results.preserve import ROOT, changed_files, write_manifest
from bridgekit.results.reports import render
from bridgekit.runs import write_text_atomic

CLAIMS = "claims.yaml"


@dataclass
class Audit:
    """Everything one audit says."""

    records: dict[str, Record] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    documents: dict[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(verdict.verdict for verdict in self.verdicts)
        return {name: found[name] for name in VERDICTS}


def run_audit(root: str | Path = ROOT) -> Audit:
    """Audit all runs below `root` and the claims beside them."""
    root, audit = Path(root), Audit()
    for folder in find_runs(root):
        _add_run(folder, root, audit)
    if (root / CLAIMS).is_file():
        claims, audit.documents = load_claims(root / CLAIMS)
        audit.verdicts = [judge(claim, audit.records) for claim in claims]
    audit.findings = find_all(audit.records, audit.verdicts)
    return audit


def _add_run(folder: Path, root: Path, audit: Audit) -> None:
    """One damaged run is a line in the report, not the end of it."""
    place = folder.relative_to(root)
    try:
        record, changed = load_run(folder), changed_files(folder)
    except (ValueError, OSError, KeyError) as error:
        audit.problems.append(f"{place}: cannot be read: {' '.join(str(error).split())}")
        return
    audit.problems += [f"{place}: {problem}" for problem in record.problems]
    audit.problems += [f"{place}: {name} is not what was preserved (checksum)" for name in changed]
    first = audit.records.setdefault(record.name, record)
    if first is not record:
        other = first.folder.relative_to(root)
        audit.problems.append(f"{place}: the name '{record.name}' is also that of {other}; only that one is used")


def labels_moved(records: dict[str, Record]) -> pd.DataFrame:
    """Per extraction rule: labels that move when preserved texts are scored again, and right answers then."""
    tables = [pd.read_csv(p) for r in records.values() if (p := r.folder / "rescored.csv").is_file()]
    if not tables:
        return pd.DataFrame()
    sums = ["n", "moved", "right_stored", "right", "to_right", "to_wrong"]
    return pd.concat(tables).groupby(["rule", "condition"], sort=False)[sums].sum().reset_index()


def format_text(audit: Audit) -> str:
    moved = labels_moved(audit.records)
    table = moved.to_string(index=False) if len(moved) else ""
    return render("audit.txt.j2", counts=audit.counts, moved=table, **vars(audit)).rstrip()


def format_json(audit: Audit) -> str:
    shown = ("claim", "verdict", "found", "why", "opposite")
    content = {
        "runs": list(audit.records),
        "counts": audit.counts,
        "claims": [{name: getattr(verdict, name) for name in shown} for verdict in audit.verdicts],
        "findings": [asdict(finding) for finding in audit.findings],
        "labels_moved": labels_moved(audit.records).to_dict("records"),
        "problems": audit.problems,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=str)


def format_html(audit: Audit) -> str:
    moved = labels_moved(audit.records)
    content = vars(audit) | {
        "counts": audit.counts,
        "moved": moved.to_html(index=False, border=0) if len(moved) else "",
    }
    return render("audit.html.j2", **content)


def format_markdown(audit: Audit) -> str:
    """The generated block of preserved_data/README.md: faults apart from healthy replicates, claims folded."""
    faults, replicates = [], []
    for finding in audit.findings:
        runs = list(dict.fromkeys(finding.runs))
        first = [run for run in runs if audit.records[run].generation != "bridgekit"] if runs else []
        whole = len(first) > 1 and len(first) == sum(r.generation != "bridgekit" for r in audit.records.values())
        names = "all of the first experiments" if whole else ", ".join(f"`{run}`" for run in runs)
        healthy = finding.kind == "replicates" and not first
        (replicates if healthy else faults).append({"kind": finding.kind, "names": names, "text": finding.text})
    moved = labels_moved(audit.records)
    rows = [moved.columns, ["---"] * moved.shape[1], *moved.itertuples(index=False)] if len(moved) else []
    table = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
    found = {"faults": faults, "replicates": replicates, "counts": audit.counts, "verdicts": audit.verdicts}
    return render("findings.md.j2", moved=table, **found)


FORMATS = {"text": format_text, "json": format_json, "html": format_html}


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit audit` verb."""
    parser = argparse.ArgumentParser(prog="bridgekit audit", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=str(ROOT), help="the preserved runs (default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")
    parser.add_argument("--update-readme", action="store_true", help="write the findings into the README of the root")
    args = parser.parse_args(argv)
    audit = run_audit(args.root)
    report = FORMATS[args.format](audit)
    if args.output:
        write_text_atomic(Path(args.output), report + "\n")
    else:
        print(report)
    if args.update_readme:
        write_manifest(args.root, {"findings": format_markdown(audit)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
