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

from bridgekit.audit.first_runs import MissingData, Record, effective_settings, step_order
from bridgekit.keys import load_yaml, refuse_if
from bridgekit.results.reports import render
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


# A measure takes records by name and a claim's arguments; it gives `value`, where they apply n, low, high, p, needed.


def value(
    records: Records, run: str, column: str = "bridged", pick: str | int = "final", label: str = "", **bounds: int | str
) -> dict:
    """Share right of a condition (or of answers that are `label`, or `union`) at a step, or a pick over steps.

    `pick`: a step, or max, min, mean, idxmax, or fall (max minus final), over the numbered steps `from` .. `to`;
    `to: final` counts the final evaluation too.
    """
    if unknown := set(bounds) - {"from", "to"}:
        raise TypeError(f"value() has no argument '{min(unknown)}'")
    record, first, end = records[run], step_order(bounds.get("from", 0)), step_order(bounds.get("to", 10**9))
    if pick in ("max", "min", "mean", "idxmax", "fall"):
        steps = [step for step in record.steps if first <= step_order(step) <= end]
        shares = pd.Series({step: record.right(column, step, label).mean() for step in steps})
        if shares.empty:
            raise MissingData(f"run '{run}' has no numbered evaluation from step {first:g} on")
        final = record.right(column, "final", label).mean() if pick == "fall" else 0
        found = {"mean": shares.mean(), "idxmax": shares.idxmax(), "fall": shares.max() - final}
        if pick in found:
            return {"value": int(found[pick]) if pick == "idxmax" else float(found[pick])}
        pick = shares.idxmax() if pick == "max" else shares.idxmin()
    right = record.right(column, pick, label)
    low, high = wilson(int(right.sum()), len(right))
    return {"value": float(right.mean()), "n": len(right), "low": low, "high": high}


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


def kept_runs(records: Records) -> dict:
    """Number of runs of the first experiments that are preserved."""
    return {"value": sum(record.generation != "bridgekit" for record in records.values())}


def fact(records: Records, run: str, key: str, other: str = "", plus: str = "") -> dict:
    """A setting, or what a run recorded or gives: hours, last_step, last_numbered, crash_count.

    With `other`: how far two runs lie apart in it; `settings` counts those that differ and have an effect. With
    `plus`: the sum of two runs.
    """
    record = records[run]
    if plus:
        return {"value": sum(float(fact(records, name, key)["value"]) for name in (run, plus))}
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


MEASURES = {measure.__name__: measure for measure in (value, answered, difference, fact, kept_runs, text_share)}


def load_claims(path: str | Path) -> tuple[list[dict], dict[str, str]]:
    """The claims of a YAML file and its documents; a malformed claim is refused with its id."""
    loaded = load_yaml(path) or {}
    claims, seen = loaded.get("claims") or [] if isinstance(loaded, dict) else None, set()
    whole = isinstance(claims, list) and all(isinstance(claim, dict) for claim in claims)
    refuse_if(not whole, f"{path}: expected a list of claims under 'claims'")
    for number, claim in enumerate(claims, 1):
        name = str(claim.get("id", f"number {number}"))
        for mistake, holds in _find_mistakes(claim).items():
            refuse_if(holds, f"{path}: claim {name}: {mistake}")
        refuse_if(name in seen, f"{path}: two claims have the id '{name}'; give one another id")
        seen.add(name)
    return claims, loaded.get("documents") or {}


def _find_mistakes(claim: dict) -> dict[str, object]:
    """{mistake in how a claim is written: whether it was made}."""
    unknown, lacking = set(claim) - _KEYS, [k for k in ("id", "document", "says", "value") if claim.get(k) is None]
    measure = claim.get("measure", {"value": {}})
    arguments = list(measure.values()) if isinstance(measure, dict) else []
    return {
        f"unknown key '{min(unknown, default='')}' (known: {', '.join(sorted(_KEYS))})": unknown,
        f"no '{''.join(lacking[:1])}'": lacking,
        "give either 'measure' or 'missing'": ("measure" in claim) == ("missing" in claim),
        f"relation must be one of {' '.join(RELATIONS)}": claim.get("relation", "=") not in RELATIONS,
        "write measure as {name: {argument: value}}": len(arguments) != 1 or not isinstance(arguments[0], dict),
        f"no measure '{''.join(measure)}' (there are: {', '.join(MEASURES)})": not set(measure) <= set(MEASURES),
    }


def judge(claim: dict, records: Records) -> Verdict:
    """Hold one claim against the data; of a difference also say whether this n can tell it from none."""
    if "missing" in claim:
        return Verdict(claim, UNCHECKABLE, why=f"missing: {claim['missing']}")
    ((name, arguments),) = claim["measure"].items()
    try:
        measured = {"n": None} | MEASURES[name](records, **arguments)
    except (ValueError, KeyError, OSError) as error:  # not among the data, or what was kept is damaged
        return Verdict(claim, UNCHECKABLE, why=str(error))
    except TypeError as error:
        return Verdict(claim, UNCHECKABLE, why=f"measure '{name}': {error}")
    stated, found = claim["value"], measured["value"]
    text, effect = isinstance(stated, str) or isinstance(found, str), bool(claim.get("effect")) and "p" in measured
    agrees = str(stated) == str(found) if text else _holds(claim, found)
    unclear = effect and measured["low"] <= 0 <= measured["high"]
    # the opposite of what was said is a count of those left over, or a difference of the other sign
    opposite = measured["n"] is not None and isinstance(found, int) and found == measured["n"] - stated
    if effect:
        opposite = {">": 1, ">=": 1, "<": -1, "<=": -1}.get(claim.get("relation"), stated) * found < 0
    verdict = Verdict(claim, AGREES if agrees else DIFFERS, show(found), opposite=opposite and not agrees)
    verdict.verdict = UNSUPPORTED if agrees and unclear else verdict.verdict
    words = {"text": text, "effect": effect, "unclear": unclear, "show": show}
    verdict.why = render("why.txt.j2", **vars(verdict) | measured | words).strip().replace("\n", "")
    return verdict


def _holds(claim: dict, found: float) -> bool:
    stated, relation = float(claim["value"]), claim.get("relation", "=")
    default = 0.0 if isinstance(claim["value"], int) and not claim.get("effect") else _ROUNDING
    near = abs(found - stated) <= claim.get("tolerance", default) + 1e-9
    return near if relation == "=" else RELATIONS[relation](found, stated)


def show(value: object) -> str:
    """A value as a table shows it."""
    if not isinstance(value, float):
        return str(value)
    return format_share(value) if abs(value) < 100 else f"{value:.0f}"
