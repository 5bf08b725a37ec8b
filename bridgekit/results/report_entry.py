"""What one run says of itself in the reports: its row, its log entry, its manifest subsection; all recomputed.

    entry = read_entry("runs/phase1_20261120_132037")

Read are preserved files alone: configuration, provenance, status, verdict and the final evaluation.
"""

from __future__ import annotations

import datetime
import json
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path

from bridgekit.audit.runfolders import read_run
from bridgekit.config import load_config, read_parameters, to_flat
from bridgekit.results import verdict
from bridgekit.results.manifest import write_entry
from bridgekit.runs import find_eval, load_eval, read_status

if typing.TYPE_CHECKING:
    import pandas as pd

COLUMNS = ("run", "date (UTC)", "bridge", "direction", "seed", "n", "source", "target", "bridged",
           "recovered, held-out units", "verdict", "answers")  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What one run says of itself in the three files."""

    name: str
    date: str  # YYYY-mm-dd HH:MM, UTC
    log: str
    row: str | None  # None: there is no final evaluation
    subsection: str | None  # None: it does not beat the target


def read_entry(folder: str | Path) -> Entry:
    """Recompute a run's part of the reports from its folder; writes the `manifest.md` of one that beats the target."""
    folder = Path(folder)
    settings = to_flat(load_config()) | read_parameters(folder / "config.yaml")
    facts, status = _read_json(folder / "provenance.json"), read_status(folder)
    date, what = _date_of(folder, facts), _describe_what(settings, facts, status)
    try:
        answers = find_eval(folder)
    except FileNotFoundError:
        heading = f"### {date} · `{folder.name}` · {status.get('state', 'unknown')}"
        return Entry(folder.name, date, "\n".join([heading, f"- what: {what}", *_describe_failure(status)]), None, None)
    frame = load_eval(answers)
    judged = _read_json(folder / "verdict.json") or verdict.judge([frame], seeds=[settings["run.seed"]]).to_dict()
    shares, n = _read_shares(frame)
    recovered, link = _read_recovered(frame), f"[{answers.name}]({folder.name}/{answers.name})"
    row = [
        f"[`{folder.name}`]({folder.name})", date, f"{settings['bridge.producer']} × {settings['bridge.injector']}",
        settings["pair.direction"], settings["run.seed"], f"{n:,}", shares["source"], shares["target"],
        shares["bridged"], recovered, judged["outcome"], link,
    ]  # fmt: skip
    result = ", ".join(f"{c} {shares[c]}" for c in ("source", "target", "bridged"))
    log = [
        f"### {date} · `{folder.name}` · {judged['outcome']}",
        f"- what: {what}",
        f"- result on {n:,} test problems: {result}; recovered on held-out units {recovered}",
        f"- verdict: {judged['text']}",
        f"- answers: {link}",
        *_describe_failure(status),
    ]
    subsection = _write_subsection(folder, what, judged) if _beats_target(judged) else None
    return Entry(folder.name, date, "\n".join(log), "| " + " | ".join(map(str, row)) + " |", subsection)


def _read_shares(frame: pd.DataFrame) -> tuple[dict[str, str], int]:
    table = verdict.conditions_table(frame)
    rows = table[table["subset"] == "all"].set_index("condition")
    return {c: f"{r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for c, r in rows.iterrows()}, rows["n"].iloc[0]


def _read_recovered(frame: pd.DataFrame, subset: str = "source_only_held_unit") -> str:
    held = verdict.select_subset(frame, subset, allow_empty=True)
    if held.empty or "target_told_correct" not in held or not held["target_told_correct"].any():
        return "not measured"
    share = verdict.recovery(frame, subset=subset)
    if not math.isfinite(share.high):
        return f"{share.point:.3f} (too little for an interval)"
    return f"{share.point:.3f} [{share.low:.3f}, {share.high:.3f}]"


def _beats_target(judged: dict) -> bool:
    on_all = [c for c in judged["comparisons"] if c["control"] == "target" and c["subset"] == "all"]
    return bool(on_all) and all(c["difference"]["low"] > 0 for c in on_all)


def _describe_what(settings: dict, facts: dict, status: dict) -> str:
    """Composition, size, what differs from the package's defaults, and on what machine and commit it ran."""
    usual, k = to_flat(load_config()), settings["bridge.n_soft_tokens"]
    shown = ("bridge.producer", "bridge.injector", "bridge.n_soft_tokens", "train.steps", "train.batch_size",
             "pair.direction", "eval.conditions")  # fmt: skip
    own = {k: v for k, v in settings.items() if k not in shown and not k.startswith("run.") and k in usual}
    changed = [f"{k}={v}" for k, v in own.items() if v != (list(usual[k]) if isinstance(v, list) else usual[k])]
    said = [
        f"{settings['bridge.producer']} × {settings['bridge.injector']}, {settings['pair.direction']}",
        f"{'as many' if k == -1 else k} soft tokens" + (" as the source's prompt has" if k == -1 else ""),
        f"{settings['train.steps']:,} steps of {settings['train.batch_size']}, seed {settings['run.seed']}",
    ]
    machine = ", ".join(facts.get("gpus") or []) or "CPU"
    told = [
        facts.get("processes") and f"{facts['processes']} × {machine}",
        facts.get("commit") and f"commit {facts['commit'][:7]}" + (" with changes" if facts.get("dirty") else ""),
        status.get("parameters") and f"{status['parameters']:,} trained parameters",
        status.get("elapsed") and f"{status['elapsed'] / 60:.1f} minutes",
    ]
    text = "; ".join([*said, *(part for part in told if part)])
    return _one_line(text + (f". Unlike the defaults: {', '.join(changed)}" if changed else ""))


def _describe_failure(status: dict) -> list[str]:
    if status.get("state") != "failed":
        return []
    return [f"- failed in {status.get('stage') or 'no stage'}: {_one_line(status.get('error') or 'no reason given')}"]


def _write_subsection(folder: Path, what: str, judged: dict) -> str:
    """The run's `manifest.md`, its prose kept, as a subsection: why, command, metrics, publishability, artifacts."""
    why = f"Does the target answer what only the source knows? {what}."
    path = write_entry(folder, read_run(folder), why=why, publishability=judged["text"])
    lines = path.read_text(encoding="utf-8").strip().splitlines()
    body = [line for line in lines if not line.startswith(("<!--", f"## `{folder.name}`"))]
    text = re.sub(r"^#+ ", "#### ", "\n".join(body).strip(), flags=re.MULTILINE)  # headings of one's own stay below
    return f"### [`{folder.name}`]({folder.name}/{path.name})\n\n" + re.sub(r"\n{3,}", "\n\n", text)


def _date_of(folder: Path, facts: dict) -> str:
    """When the run began: as it says itself, as its folder is stamped, or as old as its configuration is."""
    if started := facts.get("started"):
        return started[:16].replace("T", " ")
    if stamp := re.search(r"(\d{4})(\d\d)(\d\d)_(\d\d)(\d\d)\d\d", folder.name):
        return "{}-{}-{} {}:{}".format(*stamp.groups())
    changed = (folder / "config.yaml").stat().st_mtime
    return datetime.datetime.fromtimestamp(changed, datetime.UTC).strftime("%Y-%m-%d %H:%M")


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise ValueError(f"{path}: not whole JSON; restore it, or remove it") from None


def _one_line(text: str, longest: int = 1200) -> str:
    """Text that can end neither a table cell, nor a line, nor a generated block."""
    text = " ".join(str(text).split()).replace("<!--", "&lt;!--").replace("|", "\\|")
    return text if len(text) <= longest else text[: longest - 3] + "..."
