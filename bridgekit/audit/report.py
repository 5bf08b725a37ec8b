"""Recompute every claim from its data, and say what is wrong with the runs themselves.

    bridgekit audit                        text; exit code 1 when a number of this project no longer holds
    bridgekit audit --format json          the same for a program; --format html for a page
    bridgekit audit --update-readme        put findings and verdicts into preserved_data/README.md

It only reads (except for that README and --output), needs no torch, and goes on when a run is damaged.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from bridgekit.audit.claims import AGREES, VERDICTS, Verdict, judge, load_claims
from bridgekit.audit.findings import Finding, find_all
from bridgekit.audit.own_claims import FILE, judge_own, load_own_claims
from bridgekit.audit.runfolders import RunRecord, find_runs, read_run
from bridgekit.results import manifest
from bridgekit.results.preserve import ROOT, changed_files
from bridgekit.runs import write_text_atomic

CLAIMS = "claims.yaml"


@dataclass
class Audit:
    """Everything one audit says."""

    records: dict[str, RunRecord] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    own: list[Verdict] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    documents: dict[str, str] = field(default_factory=dict)

    @property
    def broken(self) -> list[Verdict]:
        """Numbers of this project that do not come out of its data."""
        return [verdict for verdict in self.own if verdict.verdict != AGREES]

    @property
    def counts(self) -> dict[str, int]:
        found = Counter(verdict.verdict for verdict in self.verdicts)
        return {name: found[name] for name in VERDICTS}


def run_audit(root: str | Path = ROOT, project: str | Path = ".") -> Audit:
    """Audit all runs below `root` and the claims beside them; documents are looked for in `project`."""
    root, audit = Path(root), Audit()
    for folder in find_runs(root):
        _read(folder, root, audit)
    if (root / CLAIMS).is_file():
        claims, audit.documents = load_claims(root / CLAIMS)
        audit.verdicts = [judge(claim, audit.records) for claim in claims]
    own = load_own_claims(root / FILE)
    audit.own = [judge_own(entry, audit.records, Path(project)) for entry in own]
    audit.findings = find_all(audit.records, audit.verdicts)
    return audit


def _read(folder: Path, root: Path, audit: Audit) -> None:
    """One damaged run is a line in the report, not the end of it."""
    place = folder.relative_to(root)
    try:
        record = read_run(folder)
        changed = changed_files(folder)
    except (ValueError, OSError, KeyError) as error:
        audit.problems.append(f"{place}: cannot be read: {' '.join(str(error).split())}")
        return
    audit.problems += [f"{place}: {problem}" for problem in record.problems]
    audit.problems += [f"{place}: {name} is not what was preserved (checksum)" for name in changed]
    if record.name in audit.records:
        other = audit.records[record.name].folder.relative_to(root)
        audit.problems.append(f"{place}: the name '{record.name}' is also that of {other}; only that one is used")
    else:
        audit.records[record.name] = record


def labels_moved(records: dict[str, RunRecord]) -> pd.DataFrame:
    """Per extraction rule: labels that move when preserved texts are scored again, and right answers then."""
    tables = [pd.read_csv(p) for r in records.values() if (p := r.folder / "rescored.csv").is_file()]
    if not tables:
        return pd.DataFrame()
    table = pd.concat(tables, ignore_index=True)
    sums = ["n", "moved", "right_stored", "right", "to_right", "to_wrong"]
    return table.groupby(["rule", "condition"], sort=False)[sums].sum().reset_index()


def as_text(audit: Audit) -> str:
    lines = [f"{len(audit.records)} runs, {len(audit.verdicts)} claims of the first experiments: "
             + ", ".join(f"{n} {name}" for name, n in audit.counts.items())]  # fmt: skip
    for kind, group in _by_kind(audit.findings).items():
        lines += ["", kind.upper()] + [f"  {', '.join(dict.fromkeys(f.runs))}\n      {f.text}" for f in group]
    for name in VERDICTS[1:]:
        group = [v for v in audit.verdicts if v.verdict == name]
        lines += ["", f"CLAIMS: {name} ({len(group)})"] if group else []
        lines += [f"  {v.claim['id']}: {v.claim['says']}\n      {v.why}" for v in group]
    moved = labels_moved(audit.records)
    if len(moved):
        lines += ["", "LABELS MOVED BY EXTRACTION RULE", moved.to_string(index=False)]
    if audit.problems:
        lines += ["", "PROBLEMS WITH THE FILES"] + [f"  {problem}" for problem in audit.problems]
    lines += ["", f"this project's own numbers: {len(audit.own)} checked, {len(audit.broken)} do not hold"]
    lines += [f"  {v.claim['id']}: {v.why} ({v.verdict})" for v in audit.broken]
    return "\n".join(lines)


def _by_kind(findings: list[Finding]) -> dict[str, list[Finding]]:
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind, []).append(finding)
    return groups


def as_json(audit: Audit) -> str:
    def row(verdict: Verdict) -> dict:
        told = ("claim", "verdict", "found", "why", "opposite")
        return {name: getattr(verdict, name) for name in told}

    content = {
        "runs": list(audit.records),
        "counts": audit.counts,
        "claims": [row(v) for v in audit.verdicts],
        "own_claims": [row(v) for v in audit.own],
        "own_broken": len(audit.broken),
        "findings": [f.as_dict() for f in audit.findings],
        "labels_moved": labels_moved(audit.records).to_dict("records"),
        "problems": audit.problems,
    }
    return json.dumps(content, indent=1, ensure_ascii=False, default=str)


def as_markdown(audit: Audit) -> dict[str, str]:
    """The generated blocks of preserved_data/README.md."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    rows = ["| finding | runs | what was found |", "|---|---|---|"]
    for finding in audit.findings:
        runs = list(dict.fromkeys(finding.runs))
        named = ", ".join(f"`{run}`" for run in runs) if len(runs) < len(audit.records) else f"all {len(runs)} runs"
        rows.append(f"| {finding.kind} | {named} | {cell(finding.text)} |")
    rows += ["", "### Claims of the first experiments' documents", ""]
    rows += ["| verdict | claims |", "|---|---|"] + [f"| {name} | {n} |" for name, n in audit.counts.items()]
    rows += ["", "| claim | document | stated | recomputed | verdict | why |", "|---|---|---|---|---|---|"]
    for v in audit.verdicts:
        stated = f"{v.claim.get('relation', '')} {v.claim['value']}".strip()
        rows.append(
            f"| {cell(v.claim['says'])} | {v.claim['document']} | {stated} | {v.found} | {v.verdict} | {cell(v.why)} |"
        )
    moved = labels_moved(audit.records)
    if len(moved):
        rows += ["", "### Labels that move when the preserved texts are scored by another rule", ""]
        rows += ["| " + " | ".join(moved.columns) + " |", "|" + "---|" * len(moved.columns)]
        rows += ["| " + " | ".join(map(str, values)) + " |" for values in moved.itertuples(index=False)]
    return {"findings": "\n".join(rows)}


_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Audit</title>
<style>
body{{font:15px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#202020}}
table{{border-collapse:collapse;width:100%;margin:.5rem 0 2rem}}
td,th{{border-bottom:1px solid #ddd;padding:.35rem .6rem;text-align:left;vertical-align:top}}
.v0{{color:#00705A}}.v1{{color:#B3190F;font-weight:600}}.v2{{color:#8a6d00}}
.v3{{color:#777}}small{{color:#666}}</style>
<h1>Audit of the preserved runs</h1><p>{summary}</p>{body}</html>
"""


def as_html(audit: Audit) -> str:
    def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
        cells = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>" for row in rows)
        return "<table><tr>" + "".join(f"<th>{h}</th>" for h in head) + f"</tr>{cells}</table>"

    def mark(verdict: str) -> str:
        return f'<span class="v{VERDICTS.index(verdict)}">{verdict}</span>'

    escape = html.escape
    body = [
        "<h2>Findings</h2>",
        table(
            ("kind", "runs", "what was found"),
            [(escape(f.kind), "<br>".join(map(escape, dict.fromkeys(f.runs))), escape(f.text)) for f in audit.findings],
        ),
    ]
    for name, title in audit.documents.items():
        rows = [
            (
                escape(str(v.claim["says"])),
                escape(str(v.claim["value"])),
                escape(v.found),
                mark(v.verdict),
                escape(v.why),
            )
            for v in audit.verdicts
            if v.claim["document"] == name
        ]
        body += [
            f"<h2>{escape(title)}</h2>",
            table(("claim", "stated", "recomputed", "verdict", "why"), rows),
        ]
    moved = labels_moved(audit.records)
    if len(moved):
        body += [
            "<h2>Labels that move under another extraction rule</h2>",
            moved.to_html(index=False, border=0),
        ]
    if audit.problems:
        body += [
            "<h2>Problems with the files</h2><ul>",
            *(f"<li>{escape(p)}</li>" for p in audit.problems),
            "</ul>",
        ]
    rows = [(escape(v.claim["id"]), escape(v.found), mark(v.verdict), escape(v.why)) for v in audit.own]
    body += ["<h2>This project's own numbers</h2>", table(("number", "recomputed", "verdict", "why"), rows)]
    counts = ", ".join(f"{n} {mark(name)}" for name, n in audit.counts.items())
    return _PAGE.format(
        summary=f"{len(audit.records)} runs, {len(audit.verdicts)} claims: {counts}.", body="".join(body)
    )


FORMATS = {"text": as_text, "json": as_json, "html": as_html}


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit audit` verb."""
    parser = argparse.ArgumentParser(prog="bridgekit audit", description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=str(ROOT), help="the preserved runs (default: %(default)s)")
    parser.add_argument("--project", default=".", help="where the documents of own claims lie (default: here)")
    parser.add_argument("--format", choices=FORMATS, default="text")
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")
    parser.add_argument("--update-readme", action="store_true", help="write the findings into the README of the root")
    args = parser.parse_args(argv)
    try:
        audit = run_audit(args.root, args.project)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = FORMATS[args.format](audit)
    if args.output:
        write_text_atomic(Path(args.output), report + "\n")
    else:
        print(report)
    if args.update_readme:
        manifest.write_manifest(args.root, as_markdown(audit))
    for verdict in audit.broken:
        print(f"does not hold: {verdict.claim['id']}: {verdict.why}", file=sys.stderr)
    return 1 if audit.broken else 0


if __name__ == "__main__":
    sys.exit(main())
