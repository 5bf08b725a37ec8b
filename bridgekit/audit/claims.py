"""Claims as data: read them, recompute each, and judge it.

    claims, documents = load_claims("preserved_data/claims.yaml")
    verdicts = [judge(claim, records) for claim in claims]

Verdicts: `agrees`, `differs`, `not supported at this n`, `cannot be checked`. A difference whose sign is
reversed, and a count that fits its complement, is marked as the opposite of what the data say.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path

import yaml

from bridgekit.audit.measures import MEASURES, Measured, MissingData, Records

AGREES, DIFFERS = "agrees", "differs"
UNSUPPORTED, UNCHECKABLE = "not supported at this n", "cannot be checked"
VERDICTS = (AGREES, DIFFERS, UNSUPPORTED, UNCHECKABLE)
RELATIONS = {"=": operator.eq, ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_KEYS = {"id", "document", "says", "value", "measure", "relation", "tolerance", "effect", "missing"}
_ROUNDING = 6e-4  # values are given with three digits


@dataclass
class Verdict:
    """One judged claim; `found` is the recomputed value as text, `why` one line on what decides it."""

    claim: dict
    verdict: str
    found: str = ""
    why: str = ""
    opposite: bool = False
    measured: Measured | None = None


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
    if "measure" in claim:
        check_measure(f"{path}: claim {name}", claim["measure"], MEASURES)


def check_measure(where: str, measure: object, known: dict) -> None:
    if not isinstance(measure, dict) or len(measure) != 1 or not isinstance(next(iter(measure.values())), dict):
        raise ValueError(f"{where}: write measure as {{name: {{argument: value}}}}")
    if (name := next(iter(measure))) not in known:
        raise ValueError(f"{where}: no measure '{name}' (there are: {', '.join(known)})")


def recompute(measure: dict, records: Records, known: dict | None = None) -> Measured:
    """The measure a claim names; wrong arguments are missing data with a message, not a crash."""
    ((name, arguments),) = measure.items()
    try:
        return (known or MEASURES)[name](records, **arguments)
    except TypeError as error:
        raise MissingData(f"measure '{name}': {error}") from None


def judge(claim: dict, records: Records) -> Verdict:
    """Hold one claim against the data."""
    if "missing" in claim:
        return Verdict(claim, UNCHECKABLE, why=f"missing: {claim['missing']}")
    try:
        measured = recompute(claim["measure"], records)
    except MissingData as error:
        return Verdict(claim, UNCHECKABLE, why=str(error))
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
