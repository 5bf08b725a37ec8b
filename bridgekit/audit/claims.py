"""Claims as data: each sentence of the first experiments' documents, recomputed from the kept runs and judged.

    claims, documents = load_claims("preserved_data/claims.yaml")
    verdicts = [judge(claim, records) for claim in claims]

A claim names a measure and its arguments. Verdicts: `agrees`, `differs`, `not supported at this n`, `cannot be
checked`. A difference whose sign is reversed, and a count that fits its complement, is the opposite of what was said.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
import yaml

from bridgekit.audit.first_runs import MissingData, Record, effective_settings, step_order
from bridgekit.results.statistics import n_for_effect, paired_difference, wilson
from bridgekit.results.style import format_share
from bridgekit.runs import INVALID

AGREES, DIFFERS = "agrees", "differs"
UNSUPPORTED, UNCHECKABLE = "not supported at this n", "cannot be checked"
VERDICTS = (AGREES, DIFFERS, UNSUPPORTED, UNCHECKABLE)
RELATIONS = {"=": operator.eq, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_KEYS = {"id", "document", "says", "value", "measure", "relation", "tolerance", "effect", "missing"}
_ROUNDING = 6e-4  # values are given with three digits


class Records(dict[str, Record]):
    """Runs by name."""

    def __missing__(self, run: str) -> Record:
        raise MissingData(f"run '{run}' is not preserved")


@dataclass
class Verdict:
    """One judged claim; `found` is the recomputed value as text, `why` one line on what decides it."""

    claim: dict
    verdict: str
    found: str = ""
    why: str = ""
    opposite: bool = False


# -- measures: records by name and a claim's arguments -> {value, and where they apply n, low, high, p, needed} -------


def value(
    records: Records, run: str, column: str = "bridged", pick: str | int = "final", label: str = "", **bounds: int | str
) -> dict:
    """Share right of a condition (or of answers that are `label`, or `union`) at a step, or a pick over steps.

    `pick`: a step, or max, min, mean, idxmax, or fall (max minus final), over the numbered steps `from` .. `to`;
    `to: final` counts the final evaluation too.
    """
    if unknown := set(bounds) - {"from", "to"}:
        raise TypeError(f"value() has no argument '{min(unknown)}'")
    record = records[run]
    if pick not in ("max", "min", "mean", "idxmax", "fall"):
        right = record.right(column, pick, label)
        return {"value": float(right.mean()), **_wilson(right.sum(), len(right))}
    first, last = step_order(bounds.get("from", 0)), step_order(bounds.get("to", 10**9))
    shares = {s: record.right(column, s, label).mean() for s in record.steps if first <= step_order(s) <= last}
    if not shares:
        raise MissingData(f"run '{run}' has no numbered evaluation from step {first:g} on")
    if pick == "idxmax":
        return {"value": int(max(shares, key=shares.get))}
    if pick == "fall":
        return {"value": float(max(shares.values()) - record.right(column, "final", label).mean())}
    found = float(pd.Series(shares).agg(pick))
    n = len(record.at(next(iter(shares))))
    return {"value": found} | (_wilson(round(found * n), n) if pick != "mean" else {})


def _wilson(right: int, n: int) -> dict:
    low, high = wilson(int(right), n)
    return {"n": n, "low": low, "high": high}


def answered(records: Records, run: str, condition: str = "bridged", step: str | int = "final") -> dict:
    """Number of answers that are an answer at all."""
    invalid = records[run].right(condition, step, INVALID)
    return {"value": int((~invalid).sum()), "n": len(invalid)}


def difference(records: Records, minus: dict, **first: str | int) -> dict:
    """Share right in one place minus that in another, on the same items: McNemar's p, and the n it would need.

    A place is `run`, `column` and `step`; `minus` says only in what the other differs.
    """
    return paired(*(_answers(records, **place) for place in (first, first | minus)))


def _answers(records: Records, run: str, column: str = "bridged", step: str | int = "final") -> pd.Series:
    return records[run].right(column, step)


def paired(first: pd.Series, second: pd.Series) -> dict:
    """The difference of two right/wrong columns."""
    frame = pd.concat({"first_correct": first, "second_correct": second}, axis=1, join="inner")
    if frame.empty:
        raise MissingData("the two evaluations share no item")
    test = paired_difference(frame, "first", "second")
    needed = n_for_effect(abs(test.difference), (test.gained + test.lost) / test.n) if test.difference else None
    found = {"value": test.difference, "n": test.n, "low": test.low, "high": test.high}
    return found | {"p": test.mcnemar_p, "needed": needed}


def fact(records: Records, run: str, key: str, other: str = "") -> dict:
    """A setting, or what a run recorded or gives: hours, last_step, last_numbered, crash_count.

    With `other`: how far two runs lie apart in it; `settings` counts those that differ and have an effect.
    """
    record = records[run]
    if key == "settings" and other:
        one, another = (effective_settings(records[name].config) for name in (run, other))
        return {"value": sum(repr(one.get(name)) != repr(another.get(name)) for name in one | another)}
    if other:
        one, another = (float(fact(records, name, key)["value"]) for name in (run, other))
        return {"value": round(abs(one - another), 3)}
    if key == "hours":
        start, end = (datetime.fromisoformat(fact(records, run, moment)["value"]) for moment in ("started", "ended"))
        return {"value": (end - start).total_seconds() / 3600}
    counted = {
        "last_step": int(record.losses["step"].max()) if len(record.losses) else None,
        "last_numbered": max((int(step) for step in record.steps if step != "final"), default=None),
        "crash_count": len(record.facts.get("crashes") or []) if len(record.logged) else None,
    }
    known = {name: found for name, found in (record.facts | counted).items() if found is not None} | record.config
    if key not in known:
        raise MissingData(f"run '{run}' has no record of '{key}'")
    return {"value": known[key]}


def text_share(records: Records, run: str, column: str, condition: str = "bridged", step="final") -> dict:
    """Share of texts with a property that `bridgekit preserve` counted in the full texts."""
    path, place = records[run].folder / "texts.csv", (condition, str(step))
    rows = pd.read_csv(path, dtype={"step": str}).set_index(["condition", "step"]) if path.is_file() else pd.DataFrame()
    if place not in rows.index:
        raise MissingData(f"run '{run}' has no texts of {condition} at step {step}")
    return {"value": float(rows[column][place] / rows["n"][place]), "n": int(rows["n"][place])}


MEASURES = {measure.__name__: measure for measure in (value, answered, difference, fact, text_share)}


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
    names = [str(claim.get("id", f"number {number}")) for number, claim in enumerate(claims, 1)]
    for number, (name, claim) in enumerate(zip(names, claims, strict=True)):
        if mistake := _find_mistake(claim):
            raise ValueError(f"{path}: claim {name}: {mistake}")
        if name in names[:number]:
            raise ValueError(f"{path}: two claims have the id '{name}'; give one another id")
    return claims, loaded.get("documents") or {}


def _find_mistake(claim: dict) -> str | None:
    """What is wrong with how a claim is written, if anything."""
    unknown, lacking = set(claim) - _KEYS, [k for k in ("id", "document", "says", "value") if claim.get(k) is None]
    measure = claim.get("measure", {"value": {}})
    arguments = list(measure.values()) if isinstance(measure, dict) else []
    mistakes = {
        f"unknown key '{min(unknown, default='')}' (known: {', '.join(sorted(_KEYS))})": unknown,
        f"no '{''.join(lacking[:1])}'": lacking,
        "give either 'measure' or 'missing'": ("measure" in claim) == ("missing" in claim),
        f"relation must be one of {' '.join(RELATIONS)}": claim.get("relation", "=") not in RELATIONS,
        "write measure as {name: {argument: value}}": len(arguments) != 1 or not isinstance(arguments[0], dict),
        f"no measure '{''.join(measure)}' (there are: {', '.join(MEASURES)})": not set(measure) <= set(MEASURES),
    }
    return next((mistake for mistake, holds in mistakes.items() if holds), None)


def judge(claim: dict, records: Records) -> Verdict:
    """Hold one claim against the data."""
    if "missing" in claim:
        return Verdict(claim, UNCHECKABLE, why=f"missing: {claim['missing']}")
    ((name, arguments),) = claim["measure"].items()
    try:
        measured = MEASURES[name](records, **arguments)
    except (MissingData, TypeError) as error:
        wrong_arguments = "" if isinstance(error, MissingData) else f"measure '{name}': "
        return Verdict(claim, UNCHECKABLE, why=f"{wrong_arguments}{error}")
    stated, found = claim["value"], measured["value"]
    verdict = Verdict(claim, AGREES, show(found))
    if isinstance(stated, str) or isinstance(found, str):
        if str(stated) != str(found):
            verdict.verdict, verdict.why = DIFFERS, f"stated {stated}, recorded {found}"
    elif claim.get("effect") and "p" in measured:
        _judge_effect(verdict, **measured)
    elif not _holds(claim, found):
        # a count of those left over is the opposite of what was said
        verdict.opposite = isinstance(found, int) and "n" in measured and found == measured["n"] - stated
        verdict.verdict, verdict.why = DIFFERS, _contrast(claim, found)
        verdict.why += ": the data say the opposite" * verdict.opposite
    elif "low" in measured:
        low, high = format_share(measured["low"]), format_share(measured["high"])
        verdict.why = f"n = {measured['n']}, 95% interval {low} to {high}"
    return verdict


def _judge_effect(
    verdict: Verdict, value: float, n: int, low: float, high: float, p: float, needed: int | None
) -> None:
    """A difference, and what this n can carry: one that it cannot tell from nothing is not supported."""
    claim, unclear = verdict.claim, low <= 0 <= high
    shown = f"{format_share(low, signed=True)} to {format_share(high, signed=True)}"
    verdict.why = f"n = {n}, 95% interval {shown}, p = {p:.2g}"
    if unclear and needed:
        verdict.why += f"; a difference of this size needs n = {needed:,}"
    if not _holds(claim, value):
        direction = {">": 1, ">=": 1, "<": -1, "<=": -1}.get(claim.get("relation"), claim["value"])
        verdict.verdict, verdict.opposite = DIFFERS, direction * value < 0
        contrast = _contrast(claim, value) + ": the data point the other way" * verdict.opposite
        verdict.why = f"{contrast}; {verdict.why}"
    elif unclear:
        verdict.verdict = UNSUPPORTED


def _holds(claim: dict, found: float) -> bool:
    stated, relation = float(claim["value"]), claim.get("relation", "=")
    default = 0.0 if isinstance(claim["value"], int) and not claim.get("effect") else _ROUNDING
    near = abs(found - stated) <= claim.get("tolerance", default) + 1e-9
    return near if relation == "=" else RELATIONS[relation](found, stated)


def _contrast(claim: dict, found: float) -> str:
    relation = f"{claim['relation']} " if "relation" in claim else ""
    return f"stated {relation}{show(claim['value'])}, recomputed {show(found)}"


def show(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return format_share(value) if abs(value) < 100 else f"{value:.0f}"
