"""Claims as data: each sentence of the first experiments' documents, recomputed from the kept runs and judged.

    claims, documents = load_claims("preserved_data/claims.yaml")
    verdicts = [judge(claim, records) for claim in claims]

A claim names a measure and its arguments; most are `value`: one column of a run's evaluations, picked at a step or
over steps. Verdicts: `agrees`, `differs`, `not supported at this n`, `cannot be checked`. A difference whose sign is
reversed, and a count that fits its complement, is marked as the opposite of what the data say.
"""

from __future__ import annotations

import operator
import typing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
import yaml

from bridgekit.audit.first_runs import Record, differing_settings, is_right, step_order
from bridgekit.results.statistics import n_for_effect, paired_difference, wilson
from bridgekit.runs import INVALID

AGREES, DIFFERS = "agrees", "differs"
UNSUPPORTED, UNCHECKABLE = "not supported at this n", "cannot be checked"
VERDICTS = (AGREES, DIFFERS, UNSUPPORTED, UNCHECKABLE)
RELATIONS = {"=": operator.eq, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
Records = dict[str, Record]
_KEYS = {"id", "document", "says", "value", "measure", "relation", "tolerance", "effect", "missing"}
_ROUNDING = 6e-4  # values are given with three digits


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


@dataclass
class Verdict:
    """One judged claim; `found` is the recomputed value as text, `why` one line on what decides it."""

    claim: dict
    verdict: str
    found: str = ""
    why: str = ""
    opposite: bool = False
    measured: Measured | None = None


# -- measures -----------------------------------------------------------------------------------------------


def value(records: Records, run: str, column: str = "bridged", pick: str | int = "final", label: str = "",
          **bounds: int | str) -> Measured:  # fmt: skip
    """Share right of a condition (or of answers that are `label`, or `union`) at a step, or a pick over steps.

    `pick`: a step, or max, min, mean, idxmax, or fall (max minus final), over the numbered steps `from` .. `to`;
    `to: final` counts the final evaluation too.
    """
    if unknown := set(bounds) - {"from", "to"}:
        raise TypeError(f"value() has no argument '{sorted(unknown)[0]}'")
    if pick == "fall":
        highest, final = (value(records, run, column, p, label).value for p in ("max", "final"))
        return Measured(float(highest - final))
    if pick not in ("max", "min", "mean", "idxmax"):
        right = answers_at(records, run, column, pick, label)
        return Measured(float(right.mean()), len(right), *wilson(int(right.sum()), len(right)))
    first, last = (step_order(bounds.get(key, default)) for key, default in (("from", 0), ("to", 10**9)))
    steps = [step for step in record_of(records, run).steps() if first <= step_order(step) <= last]
    if not steps:
        raise MissingData(f"run '{run}' has no numbered evaluation from step {first:g} on")
    shares = pd.Series({step: answers_at(records, run, column, step, label).mean() for step in steps})
    if pick == "idxmax":
        return Measured(int(shares.idxmax()))
    found = float(getattr(shares, pick)())
    n = len(record_of(records, run).at(steps[0]))
    return Measured(found) if pick == "mean" else Measured(found, n, *wilson(round(found * n), n))


def record_of(records: Records, run: str) -> Record:
    if run not in records:
        raise MissingData(f"run '{run}' is not preserved")
    return records[run]


def answers_at(records: Records, run: str, condition: str, step: str | int, label: str = "") -> pd.Series:
    """Right or wrong by index at one step; with `label`, whether the answer is that label."""
    record = record_of(records, run)
    if str(step) not in record.steps():
        raise MissingData(f"run '{run}' has no evaluation of step {step}")
    if condition == "union":
        return answers_at(records, run, "source", step) | answers_at(records, run, "target", step)
    outcomes, column = record.at(step), f"{condition}_pred"
    if column not in outcomes or outcomes[column].isna().any():
        raise MissingData(f"run '{run}' has no condition '{condition}' at step {step}")
    return outcomes[column] == label if label else is_right(outcomes, condition)


def answered(records: Records, run: str, condition: str = "bridged", step: str | int = "final") -> Measured:
    """Number of answers that are an answer at all."""
    invalid = answers_at(records, run, condition, step, INVALID)
    return Measured(int((~invalid).sum()), len(invalid))


def paired(first: pd.Series, second: pd.Series) -> Measured:
    """Difference of two right/wrong columns on the same items, McNemar's p, and the n it would need."""
    both = first.index.intersection(second.index)
    if not len(both):
        raise MissingData("the two evaluations share no item")
    frame = pd.DataFrame({"first_correct": first.loc[both].to_numpy(), "second_correct": second.loc[both].to_numpy()})
    test = paired_difference(frame, "first", "second")
    unequal = test.gained != test.lost
    needed = n_for_effect(abs(test.difference), (test.gained + test.lost) / test.n) if unequal else None
    return Measured(test.difference, test.n, test.low, test.high, test.mcnemar_p, needed)


def gap(records: Records, run: str, first: str, second: str, step: str | int = "final") -> Measured:
    """Accuracy of one condition minus another in the same evaluation."""
    return paired(answers_at(records, run, first, step), answers_at(records, run, second, step))


def between(
    records: Records, run: str, other: str, condition: str = "bridged", step="final", other_step="final"
) -> Measured:
    """Accuracy in one run (or step) minus that in another, on the same items."""
    return paired(answers_at(records, run, condition, step), answers_at(records, other, condition, other_step))


def setting(records: Records, run: str, key: str) -> Measured:
    config = record_of(records, run).config
    if key not in config:
        raise MissingData(f"run '{run}' logged no setting '{key}'")
    return Measured(config[key])


def fact(records: Records, run: str, key: str) -> Measured:
    """Something a run recorded, or counted from its record: hours, last_step, last_numbered, crash_count."""
    record = record_of(records, run)
    if key == "hours":
        start, end = (datetime.fromisoformat(str(fact(records, run, moment).value)) for moment in ("started", "ended"))
        return Measured((end - start).total_seconds() / 3600)
    found = {
        "last_step": None if record.losses.empty else int(record.losses["step"].max()),
        "last_numbered": max((int(step) for step in record.steps() if step != "final"), default=None),
        "crash_count": None if record.logged.empty else len(record.facts.get("crashes") or []),
    }.get(key, record.facts.get(key))
    if found is None:
        raise MissingData(f"run '{run}' has no record of '{key}'")
    return Measured(found)


def settings_apart(records: Records, run: str, other: str) -> Measured:
    """Number of settings that differ between two runs and have an effect."""
    return Measured(len(differing_settings(record_of(records, run), record_of(records, other))))


def parameters_apart(records: Records, run: str, other: str) -> Measured:
    """Difference in trained parameters, in millions."""
    one, another = (float(fact(records, name, "parameters_m").value) for name in (run, other))
    return Measured(round(abs(one - another), 3))


def text_share(records: Records, run: str, column: str, condition: str = "bridged", step="final") -> Measured:
    """Share of texts with a property that `bridgekit preserve` counted in the full texts."""
    path = record_of(records, run).folder / "texts.csv"
    table = pd.read_csv(path, dtype={"step": str}) if path.is_file() else pd.DataFrame(columns=["condition", "step"])
    row = table[(table["condition"] == condition) & (table["step"] == str(step))]
    if row.empty:
        raise MissingData(f"run '{run}' has no texts of {condition} at step {step}")
    return Measured(float(row[column].iloc[0] / row["n"].iloc[0]), int(row["n"].iloc[0]))


MEASURES: dict[str, typing.Callable[..., Measured]] = {
    f.__name__: f for f in (value, answered, gap, between, setting, fact, settings_apart, parameters_apart, text_share)
}


# -- claims -------------------------------------------------------------------------------------------------


def load_claims(path: str | Path) -> tuple[list[dict], dict[str, str]]:
    """The claims of a YAML file and its documents; a malformed claim is refused with its id."""
    path = Path(path)
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    claims = loaded.get("claims") or [] if isinstance(loaded, dict) else None
    if not isinstance(claims, list) or not all(isinstance(claim, dict) for claim in claims):
        raise ValueError(f"{path}: expected a list of claims under 'claims'")
    seen: set[str] = set()
    for number, claim in enumerate(claims, 1):
        name = str(claim.get("id", f"number {number}"))
        _check_claim(path, name, claim)
        if name in seen:
            raise ValueError(f"{path}: two claims have the id '{name}'; give one another id")
        seen.add(name)
    return claims, loaded.get("documents") or {}


def _check_claim(path: Path, name: str, claim: dict) -> None:
    if unknown := set(claim) - _KEYS:
        raise ValueError(
            f"{path}: claim {name}: unknown key '{sorted(unknown)[0]}' (known: {', '.join(sorted(_KEYS))})"
        )
    for key in ("id", "document", "says", "value"):
        if claim.get(key) is None:
            raise ValueError(f"{path}: claim {name}: no '{key}'")
    if ("measure" in claim) == ("missing" in claim):
        raise ValueError(f"{path}: claim {name}: give either 'measure' or 'missing'")
    if claim.get("relation", "=") not in RELATIONS:
        raise ValueError(f"{path}: claim {name}: relation must be one of {' '.join(RELATIONS)}")
    measure = claim.get("measure")
    if measure is None:
        return
    if not isinstance(measure, dict) or len(measure) != 1 or not isinstance(next(iter(measure.values())), dict):
        raise ValueError(f"{path}: claim {name}: write measure as {{name: {{argument: value}}}}")
    if (measure_name := next(iter(measure))) not in MEASURES:
        raise ValueError(f"{path}: claim {name}: no measure '{measure_name}' (there are: {', '.join(MEASURES)})")


def judge(claim: dict, records: Records) -> Verdict:
    """Hold one claim against the data."""
    if "missing" in claim:
        return Verdict(claim, UNCHECKABLE, why=f"missing: {claim['missing']}")
    ((name, arguments),) = claim["measure"].items()
    try:
        measured = MEASURES[name](records, **arguments)
    except MissingData as error:
        return Verdict(claim, UNCHECKABLE, why=str(error))
    except TypeError as error:  # wrong arguments
        return Verdict(claim, UNCHECKABLE, why=f"measure '{name}': {error}")
    verdict = Verdict(claim, AGREES, show(measured.value), measured=measured)
    stated, found = claim["value"], measured.value
    if isinstance(stated, str) or isinstance(found, str):
        if str(stated) != str(found):
            verdict.verdict, verdict.why = DIFFERS, f"stated {stated}, recorded {found}"
        return verdict
    if not _holds(claim, float(found)):
        verdict.verdict, verdict.opposite = DIFFERS, _is_opposite(claim, measured)
        verdict.why = f"stated {claim.get('relation', '')} {show(stated)}, recomputed {show(found)}".replace("  ", " ")
        if verdict.opposite:
            verdict.why += ": the data point the other way" if claim.get("effect") else ": the data say the opposite"
    if claim.get("effect"):
        _weigh(verdict, measured)
    elif measured.low is not None and verdict.verdict == AGREES:
        verdict.why = f"n = {measured.n}, 95% interval {measured.low:.3f} to {measured.high:.3f}"
    return verdict


def _holds(claim: dict, found: float) -> bool:
    stated, relation = float(claim["value"]), claim.get("relation", "=")
    if relation == "=":
        default = 0.0 if isinstance(claim["value"], int) and not claim.get("effect") else _ROUNDING
        return abs(found - stated) <= claim.get("tolerance", default) + 1e-9
    return RELATIONS[relation](found, stated)


def _is_opposite(claim: dict, measured: Measured) -> bool:
    """A difference of the other sign, or a count that fits those left over."""
    stated, found = float(claim["value"]), float(measured.value)
    if claim.get("effect"):
        wanted = {">": 1.0, ">=": 1.0, "<": -1.0, "<=": -1.0}.get(claim.get("relation", "="), stated)
        return wanted * found < 0
    whole = isinstance(measured.value, int) and measured.n is not None
    return whole and found != stated and found == measured.n - stated


def _weigh(verdict: Verdict, measured: Measured) -> None:
    """Say what this n can carry; a difference it cannot tell from nothing is not supported."""
    weight = f"n = {measured.n}, 95% interval {measured.low:+.3f} to {measured.high:+.3f}, p = {measured.p:.2g}"
    unclear = measured.low <= 0 <= measured.high
    if unclear and measured.needed:
        weight += f"; a difference of this size needs n = {measured.needed:,}"
    if verdict.verdict == AGREES and unclear:
        verdict.verdict = UNSUPPORTED
    verdict.why = f"{verdict.why}; {weight}" if verdict.why else weight


def show(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
