"""This project's own numbers: what a document states comes out of a preserved run, or the audit fails.

    preserved_data/own_claims.yaml
    - document: README.md
      value: "0.894"                # exactly as the document prints it; the document must contain it
      near: "recovered"             # optional: on the same line as these words
      measure: {accuracy: {run: [one_20261120_101500, two_20261120_101700], over: mean}}

`run` may be a list with `over`: min, max, mean or sd. `part`: value (default), low, high or p.
"""

from __future__ import annotations

import json
import re
import statistics
from functools import lru_cache
from pathlib import Path

import pandas as pd
import yaml

from bridgekit.audit.claims import AGREES, DIFFERS, UNCHECKABLE, Verdict, check_measure, recompute
from bridgekit.audit.measures import MEASURES, Measured, MissingData, Records, record_of
from bridgekit.results.statistics import clustered_proportion, paired_difference, paired_ratio, wilson
from bridgekit.runs import hash_file, load_eval_once
from bridgekit.studies import open_study

FILE = "own_claims.yaml"
_KEYS = {"document", "value", "near", "measure"}
_NUMBER = re.compile(r"(?:(?P<sign>[-+−±])\s*)?(?P<digits>\d[\d,]*)(?P<decimals>\.\d+)?(?P<percent>\s*%)?")
_OVER = {"min": min, "max": max, "mean": statistics.fmean, "sd": statistics.stdev}


def folder_of(records: Records, run: str) -> Path:
    """The folder of a kept run: its own, or that in the study which its name begins with."""
    if run in records:
        return record_of(records, run).folder
    for path in (path for home in _homes(records) for path in (home / "studies").glob("*.tar.xz")):
        study = path.name.split(".")[0]
        if run.startswith(f"{study}_") and (folder := open_study(study, path.parent) / run).is_dir():
            return folder
    raise MissingData(f"run '{run}' is not preserved")


def _homes(records: Records) -> set[Path]:
    """Where runs are kept: the folder that holds these claims."""
    return {home for record in records.values() for home in record.folder.parents if (home / FILE).is_file()}


def drawn(records: Records, figure: str, column: str, pick: str = "mean", **where) -> Measured:
    """A value of the data that a figure was drawn from, as long as neither it nor the figure's inputs have changed.

    `figure` is the path from the project's folder without suffix, `where` says which rows, by columns of the data.
    """
    base = next((home.parent / figure for home in _homes(records)), Path(figure))
    csv, sidecar = base.with_name(base.name + ".csv"), base.with_name(base.name + ".json")
    if not csv.is_file() or not sidecar.is_file():
        raise MissingData(f"no figure {figure}: {csv.name} or {sidecar.name} is not there")
    facts = json.loads(sidecar.read_text(encoding="utf-8"))
    for part in (facts["data"], *facts["inputs"]):
        path = base.parent / part["name"]
        if not path.is_file() or _hash_once(path, path.stat().st_mtime_ns) != part["sha256"]:
            raise MissingData(f"figure {figure}: {part['name']} is not what it was drawn from; draw it again")
    rows = _read_csv_once(csv, csv.stat().st_mtime_ns)
    for name, wanted in where.items():
        if name not in rows:
            raise MissingData(f"{csv.name} has no column '{name}'")
        rows = rows[rows[name] == wanted]
    if rows.empty or column not in rows:
        raise MissingData(f"{csv.name} has no '{column}' where {where}")
    return Measured(float(rows[column].agg(pick)), len(rows))


@lru_cache(maxsize=512)
def _hash_once(path: Path, changed_ns: int) -> str:
    return hash_file(path)


@lru_cache(maxsize=64)
def _read_csv_once(path: Path, changed_ns: int) -> pd.DataFrame:
    return pd.read_csv(path)


def frame_of(records: Records, run: str, file: str = "", **subset) -> pd.DataFrame:
    """Rows of one evaluation file (default: the final one) that match e.g. group="source_only"."""
    folder = folder_of(records, run)
    names = [file] if file else ["eval_samples_step_final.jsonl.gz", "eval_samples_step_final.jsonl"]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise MissingData(f"run '{run}' has no {names[0]}")
    wanted = {column: tuple(values) if isinstance(values, list) else (values,) for column, values in subset.items()}
    try:
        frame = _select_once(path.resolve(), path.stat().st_mtime_ns, tuple(wanted.items()))
    except KeyError as error:
        raise MissingData(f"{path.name} of run '{run}' has no column {error}") from None
    if frame.empty:
        raise MissingData(f"no row of run '{run}' has {subset}")
    return frame


@lru_cache(maxsize=256)  # many claims are about the same rows of one run
def _select_once(path: Path, changed_ns: int, wanted: tuple) -> pd.DataFrame:
    frame = load_eval_once(path, texts=False)
    keep = pd.Series(True, index=frame.index)
    for column, values in wanted:
        keep &= frame[column].isin(values)
    return frame if keep.all() else frame[keep]


def _right(frame: pd.DataFrame, condition: str) -> pd.Series:
    if f"{condition}_correct" not in frame:
        raise MissingData(f"no condition '{condition}' (there are: {', '.join(_conditions(frame))})")
    return frame[f"{condition}_correct"]


def _conditions(frame: pd.DataFrame) -> list[str]:
    return [c.removesuffix("_correct") for c in frame if c.endswith("_correct")]


def accuracy(records: Records, run: str, condition: str = "bridged", file: str = "", **subset) -> Measured:
    frame = frame_of(records, run, file, **subset)
    right = _right(frame, condition)
    found = clustered_proportion(right, frame["unit"] if "unit" in frame else None)
    return Measured(found.point, found.n, found.low, found.high)


def difference(records: Records, run: str, first: str, second: str, file: str = "", **subset) -> Measured:
    """Paired difference in accuracy, its interval over units (questions where there are none)."""
    frame = frame_of(records, run, file, **subset)
    _right(frame, first), _right(frame, second)
    test = paired_difference(frame, first, second)
    return Measured(test.difference, test.n, test.low, test.high, test.p)


def recovery(
    records: Records,
    run: str,
    condition: str = "bridged",
    ceiling: str = "target_told",
    file: str = "",
    **subset,
) -> Measured:
    """Accuracy as a share of the ceiling's on the same items."""
    frame = frame_of(records, run, file, **subset)
    if not _right(frame, ceiling).any():
        raise MissingData(f"{ceiling} has nothing right there, so there is no share of it")
    _right(frame, condition)
    share = paired_ratio(frame, condition, ceiling)
    return Measured(share.point, share.n, share.low, share.high)


def count_items(records: Records, run: str, file: str = "", **subset) -> Measured:
    return Measured(len(frame_of(records, run, file, **subset)))


def count_units(records: Records, run: str, file: str = "", **subset) -> Measured:
    return Measured(int(frame_of(records, run, file, **subset)["unit"].nunique()))


def follows_donor(records: Records, run: str, condition: str = "shuffled", file: str = "", **subset) -> Measured:
    """Share of answers that are those of the donor's fact."""
    frame = frame_of(records, run, file, **subset)
    frame = frame[frame["donor_gold"].notna()] if "donor_gold" in frame else frame.iloc[:0]
    if frame.empty:
        raise MissingData(f"run '{run}' has no donor_gold there")
    follows = frame[f"{condition}_extracted"].astype(str) == frame["donor_gold"].astype(str)
    return Measured(float(follows.mean()), len(frame), *wilson(int(follows.sum()), len(follows)))


def metric(records: Records, run: str, name: str, pick: str = "last") -> Measured:
    """A column of metrics.jsonl, of training lines or validation lines: its last, highest or lowest value."""
    record = record_of(records, run)
    for table in (record.logged, record.losses):
        if name in table and table[name].notna().any():
            column = table[name].dropna()
            return Measured(float({"last": column.iloc[-1], "max": column.max(), "min": column.min()}[pick]))
    raise MissingData(f"metrics.jsonl of run '{run}' has no '{name}'")


OWN_MEASURES = MEASURES | {
    f.__name__: f for f in (accuracy, difference, recovery, count_items, count_units, follows_donor, metric, drawn)
}


def load_own_claims(path: str | Path) -> list[dict]:
    """The entries of own_claims.yaml; none where the file is not there."""
    path = Path(path)
    if not path.is_file():
        return []
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of entries with document, value and measure")
    for number, entry in enumerate(entries, 1):
        where = f"{path}: entry {number}"
        if not isinstance(entry, dict) or not {"document", "value", "measure"} <= set(entry) <= _KEYS:
            raise ValueError(f"{where}: give document, value, measure and, if wanted, near")
        if not isinstance(entry["value"], str):
            raise ValueError(f"{where}: quote the value, so that it is compared as the document prints it")
        check_measure(where, entry["measure"], OWN_MEASURES)
    return entries


def judge_own(entry: dict, records: Records, project: Path) -> Verdict:
    """Does the document print the value, and does the value come out of the data?"""
    claim = {"id": f"{entry['document']}: {entry['value']}", "says": entry.get("near", ""), **entry}
    document = project / entry["document"]
    if not document.is_file():
        return Verdict(claim, DIFFERS, why=f"{entry['document']} does not exist")
    lines = document.read_text(encoding="utf-8").splitlines()
    if not any(entry["value"] in line and entry.get("near", "") in line for line in lines):
        near = f" on a line with '{entry['near']}'" if "near" in entry else ""
        return Verdict(claim, DIFFERS, why=f"{entry['document']} does not print {entry['value']}{near}")
    try:
        found = _measure_over_runs(entry["measure"], records)
    except MissingData as error:
        return Verdict(claim, UNCHECKABLE, why=str(error))
    shown = print_like(entry["value"], found)
    why = "" if shown == entry["value"] else f"printed {entry['value']}, recomputed {shown}"
    return Verdict(claim, AGREES if not why else DIFFERS, shown, why)


def _measure_over_runs(measure: dict, records: Records) -> float | str:
    ((name, arguments),) = measure.items()
    arguments = dict(arguments)
    runs, over, part = arguments.pop("run", None), arguments.pop("over", None), arguments.pop("part", "value")
    if isinstance(runs, list) and over not in _OVER:
        raise MissingData(f"a list of runs needs over: {', '.join(_OVER)}")
    several = runs if isinstance(runs, list) else [runs]
    values = []
    for run in several:
        given = arguments if run is None else {"run": run, **arguments}
        measured = recompute({name: given}, records, OWN_MEASURES)
        if getattr(measured, part, None) is None:
            raise MissingData(f"measure '{name}' has no '{part}'")
        values.append(getattr(measured, part))
    return _OVER[over](values) if over else values[0]


def print_like(printed: str, value: float | str) -> str:
    """The value with the decimals, sign, separators, percent sign and surroundings of the printed number."""
    match = _NUMBER.search(printed)
    if isinstance(value, str) or not match:
        return str(value)
    number = value * 100 if match["percent"] else value
    decimals = len(match["decimals"] or ".") - 1
    text = f"{abs(number):{',' if ',' in match['digits'] else ''}.{decimals}f}"
    negative = number < 0 and float(text.replace(",", "")) != 0
    minus = "−" if "−" in printed else "-"
    sign = minus if negative else match["sign"] if match["sign"] in ("+", "±") else ""
    return f"{printed[: match.start()]}{sign}{text}{match['percent'] or ''}{printed[match.end() :]}"
