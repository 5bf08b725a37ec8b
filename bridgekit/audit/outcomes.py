"""Per-example outcomes of evaluation JSONL, of both generations, in bounded memory; and the curve they make.

    from bridgekit.audit.outcomes import read_outcomes, curve_of
    outcomes = read_outcomes("eval_samples_step_final.jsonl", problems := [])
    curve_of(outcomes)

Only the labels are kept, as small integers into one vocabulary: a million lines stay below 300 MB. A damaged
line is reported with its number and left out; the rest of the file is still used.
"""

from __future__ import annotations

import gzip
import json
import re
import typing
import zlib
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from bridgekit.tasks.answers import INVALID, RULES, extract_answer, truncate_followups

EVAL_FILE = re.compile(r"eval_samples_step_(\d+|final)\.jsonl(?:\.gz)?")
KEYS = ("step", "index", "gold")
REPORTED = 5  # of each kind of damage, this many lines are named


class Problems:
    """Counts each kind of damage and names the first lines that have it."""

    def __init__(self, name: str) -> None:
        self.name, self.lines, self.total = name, {}, Counter()

    def add(self, kind: str, line: int) -> None:
        self.total[kind] += 1
        if self.total[kind] <= REPORTED:
            self.lines.setdefault(kind, []).append(line)

    def report(self) -> list[str]:
        found = []
        for kind, lines in self.lines.items():
            more = ", ..." if self.total[kind] > REPORTED else ""
            found.append(f"{self.name}: {kind} (line {', '.join(map(str, lines))}{more}; {self.total[kind]} in all)")
        return found


def evaluation_files(folder: Path) -> list[tuple[str, Path]]:
    """(step, file) of the evaluation files in a folder, numbered ones in order, `final` last."""
    found = [(m[1], path) for path in folder.iterdir() if (m := EVAL_FILE.fullmatch(path.name))]
    return sorted(found, key=lambda item: (step_order(item[0]), item[1].name))


def step_order(step: object) -> float:
    return float("inf") if str(step) == "final" else float(step)


def read_rows(path: Path, problems: Problems) -> typing.Iterator[tuple[int, dict]]:
    """(line number, row) of every readable line of a `.jsonl` or `.jsonl.gz`."""
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    problems.add("not JSON, cut off or binary", number)
                    continue
                if isinstance(row, dict):
                    yield number, row
                else:
                    problems.add("no JSON object", number)
    except (EOFError, gzip.BadGzipFile, OSError, zlib.error) as error:
        problems.add(f"cannot be read further ({type(error).__name__})", number + 1)


def read_outcomes(path: str | Path, problems: list[str], step: str | None = None) -> pd.DataFrame:
    """Frame `step index gold <condition>_pred ...` of one file by index; damage goes to `problems`."""
    path = Path(path)
    damage = Problems(path.name)
    if path.stat().st_size == 0:
        problems.append(f"{path.name}: the file is empty (0 bytes)")
        return pd.DataFrame(columns=list(KEYS))
    vocabulary: dict[str, int] = {}
    columns: dict[str, array] = {"index": array("q")}
    inside: dict[str, None] = {}
    keys: list[str] = []
    for number, row in read_rows(path, damage):
        if row.get("novelty") == "seen":  # problems about training units show memory: no part of any score
            continue
        if not keys:
            keys = _label_keys(row)
            columns |= {key: array("i") for key in keys}
        if _is_whole(row, number, keys, damage):
            columns["index"].append(row["index"])
            for key in keys:
                columns[key].append(vocabulary.setdefault(str(row[key]), len(vocabulary)))
        inside[str(row.get("eval_step", step))] = None
    frame = _frame(columns, vocabulary, damage, str(step if step is not None else next(iter(inside), "")))
    others = sorted(set(inside) - {str(step)})
    if step is not None and others:
        damage.add(f"eval_step inside is {others}, the file name says {step}", 1)
    problems.extend(damage.report())
    if frame.empty:
        problems.append(f"{path.name}: no usable line (needed: index, gold_extracted, *_extracted)")
    return frame


def _label_keys(row: dict) -> list[str]:
    """The label columns of a file, from its first row that has any condition; the gold label first."""
    found = [key for key in row if key.endswith("_extracted") and key != "gold_extracted"]
    return ["gold_extracted", *found] if found else []


def _is_whole(row: dict, number: int, keys: list[str], damage: Problems) -> bool:
    """True when the row has an index and all labels; what it lacks is noted."""
    index = row.get("index")
    if type(index) is not int or not -(2**63) <= index < 2**63:
        damage.add("no whole number under 'index'", number)
    elif not keys:
        damage.add("no '<condition>_extracted' key", number)
    else:
        for key in keys:
            if type(row.get(key)) not in (str, int):
                damage.add(f"no text under '{key}'", number)
                return False
        return True
    return False


def _frame(columns: dict[str, array], vocabulary: dict, damage: Problems, step: str) -> pd.DataFrame:
    index = np.frombuffer(columns.pop("index"), dtype=np.int64) if columns["index"] else np.empty(0, np.int64)
    order = np.argsort(index, kind="stable")
    keep = np.ones(len(order), bool)
    keep[1:] = index[order][1:] != index[order][:-1]
    if not keep.all():
        for position in order[~keep][:REPORTED]:
            damage.add("index given twice, the first is kept", int(position) + 1)
        damage.total["index given twice, the first is kept"] = int((~keep).sum())
    order = order[keep]
    frame = pd.DataFrame({"step": step, "index": index[order]})
    names = list(vocabulary)
    for key, codes in columns.items():
        codes = np.frombuffer(codes, dtype=np.int32)[order] if len(codes) else np.empty(0, np.int32)
        column = "gold" if key == "gold_extracted" else f"{key.removesuffix('_extracted')}_pred"
        frame[column] = pd.Categorical.from_codes(codes, categories=names)
    return frame


def conditions_of(outcomes: pd.DataFrame) -> list[str]:
    return [c.removesuffix("_pred") for c in outcomes.columns if c.endswith("_pred")]


def is_right(outcomes: pd.DataFrame, condition: str) -> np.ndarray:
    """Boolean per row: the label equals the gold label and is an answer at all."""
    said = outcomes[f"{condition}_pred"].astype(object)
    return ((said == outcomes["gold"].astype(object)) & (said != INVALID)).to_numpy()


def curve_of(outcomes: pd.DataFrame) -> pd.DataFrame:
    """Per step: accuracy and number of invalid answers of every condition, and n."""
    rows = []
    for step in sorted(outcomes["step"].unique(), key=step_order):
        part = outcomes[outcomes["step"] == step]
        names = [c for c in conditions_of(part) if part[f"{c}_pred"].notna().all()]
        row = {"step": step} | {f"{c}_acc": is_right(part, c).mean() for c in names}
        row |= {f"invalid_{c}": int((part[f"{c}_pred"] == INVALID).sum()) for c in names}
        rows.append(row | {"n": len(part)})
    return pd.DataFrame(rows)


def rescore(path: str | Path) -> pd.DataFrame:
    """Per condition and extraction rule: labels unlike the stored ones, and how many answers are right."""
    counts: dict[tuple[str, str], Counter] = {}
    for _, row in read_rows(Path(path), Problems(Path(path).name)):
        gold = row.get("gold_extracted")
        for key, text in row.items():
            name = key.removesuffix("_full")
            if not key.endswith("_full") or not isinstance(text, str) or f"{name}_extracted" not in row:
                continue
            stored = row[f"{name}_extracted"]
            for rule in RULES:
                label = extract_answer(text, rule)
                counts.setdefault((name, rule), Counter()).update(
                    n=1, moved=label != stored, right_stored=stored == gold, right=label == gold,
                    to_right=label == gold != stored, to_wrong=label != gold == stored,
                )  # fmt: skip
    return pd.DataFrame([{"condition": c, "rule": r, **dict(n)} for (c, r), n in counts.items()])


def text_facts(path: str | Path) -> pd.DataFrame:
    """Per condition: texts that begin by repeating the question, and texts that invent a further one."""
    counts: dict[str, Counter] = {}
    for _, row in read_rows(Path(path), Problems(Path(path).name)):
        asked = _last_question(str(row.get("question", "")))
        for key, text in row.items():
            name = key.removesuffix("_full")
            if key.endswith("_full") and isinstance(text, str) and f"{name}_extracted" in row:
                opening = " ".join(text.removeprefix("Q:").split())[: max(len(asked), 1)]
                counts.setdefault(name, Counter()).update(
                    n=1, repeats_question=bool(asked) and opening == asked,
                    invents_question=truncate_followups(text) != text,
                )  # fmt: skip
    return pd.DataFrame([{"condition": c, **dict(n)} for c, n in counts.items()])


def _last_question(prompt: str) -> str:
    """First 60 characters of the question asked, after the worked examples of a few-shot prompt."""
    return " ".join(prompt.rsplit("Q:", 1)[-1].split("\nA:")[0].split())[:60]
