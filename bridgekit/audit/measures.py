"""Named recomputations: every number that a claim may be held against, from the records of preserved runs.

    MEASURES["accuracy"](records, run="x_20251116_201212", condition="bridged", step="final")

A measure returns a `Measured`; a claim names a measure and its arguments in YAML. `MissingData` says what is
not there, so that a claim is called unverifiable instead of wrong.
"""

from __future__ import annotations

import typing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd

from bridgekit.audit.outcomes import is_right, step_order
from bridgekit.audit.runfolders import RunRecord
from bridgekit.effective import differing_settings
from bridgekit.results.statistics import Difference, n_for_effect, paired_difference, wilson
from bridgekit.tasks.answers import INVALID

Records = dict[str, RunRecord]


class MissingData(ValueError):
    """What a claim points at is not among the preserved data."""


@dataclass
class Measured:
    """A recomputed value; `n`, interval, p and the n it would need where they apply."""

    value: float | str | bool
    n: int | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None
    needed: int | None = None


def record_of(records: Records, run: str) -> RunRecord:
    if run not in records:
        raise MissingData(f"run '{run}' is not preserved")
    return records[run]


def outcomes_at(records: Records, run: str, step: str | int) -> pd.DataFrame:
    record = record_of(records, run)
    if str(step) not in record.steps():
        raise MissingData(f"run '{run}' has no evaluation of step {step}")
    return record.at(step)


def right_at(records: Records, run: str, condition: str, step: str | int) -> pd.Series:
    """Right or wrong by index."""
    outcomes = outcomes_at(records, run, step)
    if f"{condition}_pred" not in outcomes or outcomes[f"{condition}_pred"].isna().any():
        raise MissingData(f"run '{run}' has no condition '{condition}' at step {step}")
    return pd.Series(is_right(outcomes, condition), index=outcomes.index)


def accuracy(records: Records, run: str, condition: str = "bridged", step: str | int = "final") -> Measured:
    right = right_at(records, run, condition, step)
    return Measured(float(right.mean()), len(right), *wilson(int(right.sum()), len(right)))


def _numbered(records: Records, run: str, condition: str, first: int = 0, last: float = np.inf) -> pd.Series:
    record = record_of(records, run)
    steps = [s for s in record.steps() if s != "final" and first <= int(s) <= last]
    if not steps:
        raise MissingData(f"run '{run}' has no numbered evaluation from step {first} on")
    return pd.Series({s: right_at(records, run, condition, s).mean() for s in steps})


def peak(records: Records, run: str, condition: str = "bridged") -> Measured:
    curve = _numbered(records, run, condition)
    n = len(outcomes_at(records, run, curve.index[0]))
    return Measured(float(curve.max()), n, *wilson(round(curve.max() * n), n))


def peak_step(records: Records, run: str, condition: str = "bridged") -> Measured:
    return Measured(int(_numbered(records, run, condition).idxmax()))


def degradation(records: Records, run: str, condition: str = "bridged") -> Measured:
    """Highest numbered accuracy minus the final one."""
    return Measured(float(peak(records, run, condition).value - accuracy(records, run, condition).value))


def lowest(records: Records, run: str, condition: str = "bridged", first: int = 1, last: int = 10**9) -> Measured:
    return Measured(float(_numbered(records, run, condition, first, last).min()))


def highest(records: Records, run: str, condition: str = "bridged", first: int = 1, last: int = 10**9) -> Measured:
    return Measured(float(_numbered(records, run, condition, first, last).max()))


def _invalid(records: Records, run: str, condition: str, first: int) -> pd.Series:
    steps = [s for s in record_of(records, run).steps() if step_order(s) >= first]
    column = f"{condition}_pred"
    return pd.Series({s: (outcomes_at(records, run, s)[column] == INVALID).mean() for s in steps})


def invalid_share(
    records: Records,
    run: str,
    condition: str = "bridged",
    step: str | int = "final",
    over: str = "step",
    first: int = 1,
) -> Measured:
    """Share of answers without a number at one step, or lowest / highest / mean over all from `first` on."""
    if over == "step":
        invalid = outcomes_at(records, run, step)[f"{condition}_pred"] == INVALID
        return Measured(float(invalid.mean()), len(invalid), *wilson(int(invalid.sum()), len(invalid)))
    shares = _invalid(records, run, condition, first)
    return Measured(float({"lowest": shares.min, "highest": shares.max, "mean": shares.mean}[over]()))


def answered(records: Records, run: str, condition: str = "bridged", step: str | int = "final") -> Measured:
    predictions = outcomes_at(records, run, step)[f"{condition}_pred"]
    return Measured(int((predictions != INVALID).sum()), len(predictions))


def label_share(records: Records, run: str, label: str, condition: str = "bridged", step="final") -> Measured:
    predictions = outcomes_at(records, run, step)[f"{condition}_pred"]
    return Measured(float((predictions == label).mean()), len(predictions))


def paired(first: pd.Series, second: pd.Series) -> Measured:
    """Difference of two right/wrong columns on the same items, McNemar's p, and the n it would need."""
    both = first.index.intersection(second.index)
    if not len(both):
        raise MissingData("the two evaluations share no item")
    columns = {"first_correct": first.loc[both].to_numpy(), "second_correct": second.loc[both].to_numpy()}
    return from_difference(paired_difference(pd.DataFrame(columns), "first", "second"))


def from_difference(test: Difference) -> Measured:
    """A paired test as a measured value, with the n at which McNemar's test would find such a difference."""
    discordance = (test.gained + test.lost) / test.n
    needed = n_for_effect(abs(test.difference), discordance) if test.gained != test.lost else None
    return Measured(test.difference, test.n, test.low, test.high, test.mcnemar_p, needed)


def gap(records: Records, run: str, first: str, second: str, step: str | int = "final") -> Measured:
    """Accuracy of one condition minus another in the same evaluation."""
    return paired(right_at(records, run, first, step), right_at(records, run, second, step))


def between(
    records: Records, run: str, other: str, condition: str = "bridged", step="final", other_step="final"
) -> Measured:
    """Accuracy in one run (or step) minus that in another, on the same items."""
    return paired(right_at(records, run, condition, step), right_at(records, other, condition, other_step))


def union(records: Records, run: str, step: str | int = "final") -> Measured:
    right = right_at(records, run, "source", step) | right_at(records, run, "target", step)
    return Measured(float(right.mean()), len(right), *wilson(int(right.sum()), len(right)))


def only_source(records: Records, run: str, step: str | int = "final") -> Measured:
    right = right_at(records, run, "source", step) & ~right_at(records, run, "target", step)
    return Measured(int(right.sum()), len(right))


def setting(records: Records, run: str, key: str) -> Measured:
    config = record_of(records, run).config
    if key not in config:
        raise MissingData(f"run '{run}' logged no setting '{key}'")
    return Measured(config[key])


def fact(records: Records, run: str, key: str) -> Measured:
    value = record_of(records, run).facts.get(key)
    if value is None:
        raise MissingData(f"run '{run}' has no record of '{key}'")
    return Measured(value)


def settings_apart(records: Records, run: str, other: str) -> Measured:
    """Number of settings that differ between two runs and have an effect."""
    return Measured(len(differing_settings(record_of(records, run), record_of(records, other))))


def parameters_apart(records: Records, run: str, other: str) -> Measured:
    """Difference in trained parameters, in millions."""
    ours, theirs = fact(records, run, "parameters_m").value, fact(records, other, "parameters_m").value
    return Measured(round(abs(float(ours) - float(theirs)), 3))


def last_step(records: Records, run: str) -> Measured:
    losses = record_of(records, run).losses
    if losses.empty:
        raise MissingData(f"run '{run}' kept no losses")
    return Measured(int(losses["step"].max()))


def last_numbered(records: Records, run: str) -> Measured:
    return Measured(int(_numbered(records, run, "bridged").index[-1]))


def hours(records: Records, run: str) -> Measured:
    start, end = fact(records, run, "started").value, fact(records, run, "ended").value
    return Measured((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds() / 3600)


def crash_count(records: Records, run: str) -> Measured:
    record = record_of(records, run)
    if record.logged.empty:
        raise MissingData(f"the log of run '{run}' is not preserved")
    return Measured(len(record.facts.get("crashes") or []))


def text_share(records: Records, run: str, column: str, condition: str = "bridged", step="final") -> Measured:
    """Share of texts with a property that `bridgekit preserve` counted in the full texts."""
    path = record_of(records, run).folder / "texts.csv"
    if not path.is_file():
        raise MissingData(f"the texts of run '{run}' are not preserved")
    table = pd.read_csv(path, dtype={"step": str})
    row = table[(table["condition"] == condition) & (table["step"] == str(step))]
    if row.empty:
        raise MissingData(f"run '{run}' has no texts of {condition} at step {step}")
    return Measured(float(row[column].iloc[0] / row["n"].iloc[0]), int(row["n"].iloc[0]))


def file_size(records: Records, path: str, unit: str = "MB") -> Measured:
    """Size of a file or folder, relative to the project."""
    place = Path(path)
    if not place.exists():
        raise MissingData(f"{path} does not exist")
    files = [place] if place.is_file() else [p for p in place.rglob("*") if p.is_file()]
    return Measured(sum(p.stat().st_size for p in files) / {"MB": 1e6, "kB": 1e3, "bytes": 1}[unit])


MEASURES: dict[str, typing.Callable[..., Measured]] = {
    f.__name__: f
    for f in (
        accuracy, peak, peak_step, degradation, lowest, highest, invalid_share, answered, label_share, gap,
        between, union, only_source, setting, fact, settings_apart, parameters_apart, last_step,
        last_numbered, hours, crash_count, text_share, file_size,
    )
}  # fmt: skip
