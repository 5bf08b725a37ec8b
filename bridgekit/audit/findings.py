"""What an audit finds by itself in a set of runs, without being told which run is which.

    findings = find_all(records)

Each detector takes the records by name and yields findings. A detector sees what the runs hold: settings,
stored answers, losses, log facts. It names runs because it found them, never because it knows them.
"""

from __future__ import annotations

import itertools
import typing
from dataclasses import asdict, dataclass, field

import numpy as np

from bridgekit.audit.claims import Verdict
from bridgekit.audit.measures import Records, between, paired, right_at
from bridgekit.audit.outcomes import conditions_of, is_right
from bridgekit.audit.runfolders import RunRecord
from bridgekit.effective import identity, inert_differences

ALPHA = 0.05


@dataclass
class Finding:
    kind: str
    runs: list[str]
    text: str
    numbers: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def find_all(records: Records, verdicts: typing.Sequence[Verdict] = ()) -> list[Finding]:
    """Every finding of every detector, and what the claims say against the data or against each other."""
    found = [finding for detector in DETECTORS for finding in detector(records)]
    return found + [f for detector in CLAIM_DETECTORS for f in detector(verdicts)]


def _groups(records: Records, seed: bool) -> list[list[RunRecord]]:
    by_identity: dict[tuple, list[RunRecord]] = {}
    for record in records.values():
        if record.config:
            by_identity.setdefault(identity(record, seed), []).append(record)
    return [group for group in by_identity.values() if len(group) > 1]


def same_configuration(records: Records) -> typing.Iterator[Finding]:
    """Runs under different labels whose settings differ in nothing that has an effect."""
    for group in _groups(records, seed=True):
        labels = sorted({record.label for record in group})
        if len(labels) < 2:
            continue
        inert: dict[str, set] = {}
        for one, other in itertools.combinations(group, 2):
            for key, values in inert_differences(one, other).items():
                inert.setdefault(key, set()).update(map(str, values))
        apart = "; ".join(f"{k} ({', '.join(sorted(v))}) without effect" for k, v in sorted(inert.items())) or "nothing"
        sizes = sorted({str(r.facts["parameters_m"]) for r in group if r.facts.get("parameters_m")})
        text = f"labelled as {len(labels)} treatments ({', '.join(labels)}) but one configuration"
        text += f"; apart: {apart}"
        if sizes:
            text += f"; trained parameters: {', '.join(f'{s}M' for s in sizes)}"
        yield Finding("same configuration, different labels", [r.name for r in group], text, {"labels": labels})


def replicates(records: Records) -> typing.Iterator[Finding]:
    """Runs that differ at most in the seed, and how far their results lie apart."""
    for group in _groups(records, seed=False):
        scores = {r.name: float(is_right(last, "bridged").mean()) for r in group if (last := _last(r)) is not None}
        if len(scores) < 2:
            continue
        values = np.array(list(scores.values()))
        pairs = [_pair(records, a, b) for a, b in itertools.combinations(scores, 2)]
        lowest = min((p for p in pairs if p is not None), default=None)
        text = (
            f"{len(values)} replicates end at {', '.join(f'{v:.3f}' for v in values)}: "
            f"mean {values.mean():.3f}, standard deviation {values.std(ddof=1):.3f}, "
            f"spread {np.ptp(values):.3f}"
        )
        if lowest is not None:
            text += f"; smallest p of their {len(pairs)} pairs {lowest:.2g}"
        yield Finding("replicates", list(scores), text, {"scores": scores, "sd": float(values.std(ddof=1))})


def _last(record: RunRecord):
    steps = record.steps()
    last = record.at(steps[-1]) if steps else None
    return last if last is not None and "bridged" in conditions_of(last) else None


def _pair(records: Records, one: str, other: str) -> float | None:
    first, second = records[one].steps()[-1], records[other].steps()[-1]
    if not set(records[one].at(first).index) & set(records[other].at(second).index):
        return None
    return between(records, one, other, "bridged", first, second).p


def _final_and_numbered(records: Records) -> typing.Iterator[tuple[RunRecord, list[str]]]:
    for record in records.values():
        numbered = [s for s in record.steps() if s != "final"]
        if numbered and "final" in record.steps() and "bridged" in conditions_of(record.outcomes):
            yield record, numbered


def best_is_not_best(records: Records) -> typing.Iterator[Finding]:
    """The weights kept as best, evaluated at the end, against the evaluation they were chosen by."""
    for record, numbered in _final_and_numbered(records):
        if not (record.config.get("early_stop_patience") or record.config.get("train.patience")):
            continue
        scores = {s: float(is_right(record.at(s), "bridged").mean()) for s in numbered}
        best = max(scores, key=scores.get)
        if not _same_items(record, best):
            continue
        final = float(is_right(record.at("final"), "bridged").mean())
        changed = _changed(record, best, "final")
        if changed and final < scores[best]:
            text = (
                f"kept as best: step {best} with {scores[best]:.3f}; evaluated at the end: {final:.3f}, with "
                f"{changed} of {len(record.at('final'))} answers unlike those of step {best}"
            )
            yield Finding(
                "best checkpoint is not the best", [record.name], text, {"best": scores[best], "final": final}
            )


def selection_on_test(records: Records) -> typing.Iterator[Finding]:
    """The checkpoint or the peak is chosen on the very items that the final evaluation reports."""
    for record, numbered in _final_and_numbered(records):
        if _same_items(record, numbered[-1]):
            scores = [float(is_right(record.at(s), "bridged").mean()) for s in numbered]
            text = (
                f"all {len(record.at('final'))} items of the final evaluation are those of the "
                f"{len(numbered)} numbered ones; the highest of them, {max(scores):.3f}, "
                "is a choice on the test set"
            )
            yield Finding("selection on the test set", [record.name], text, {"evaluations": len(numbered)})


def same_weights_differ(records: Records) -> typing.Iterator[Finding]:
    """The final weights are those of some numbered evaluation, yet none of these has their answers."""
    for record, numbered in _final_and_numbered(records):
        if not _same_items(record, numbered[-1]):
            continue
        scores = {s: float(is_right(record.at(s), "bridged").mean()) for s in numbered}
        candidates = dict.fromkeys([numbered[-1], max(scores, key=scores.get)])
        changed = {s: _changed(record, s, "final") for s in candidates}
        if all(changed.values()):
            final = float(is_right(record.at("final"), "bridged").mean())
            parts = [
                f"{n} of {len(record.at(s))} answers moved since step {s} ({scores[s]:.3f} to {final:.3f})"
                for s, n in changed.items()
            ]
            text = "the final weights are the last or the best ones, but " + " and ".join(parts)
            moved = max(abs(final - scores[s]) for s in candidates)
            yield Finding("the same weights score differently", [record.name], text, {"moved": moved})


def _same_items(record: RunRecord, step: str) -> bool:
    one, other = record.at(step), record.at("final")
    return one.index.equals(other.index) and (one["gold"].astype(str) == other["gold"].astype(str)).all()


def _changed(record: RunRecord, step: str, other: str) -> int:
    return int((record.at(step)["bridged_pred"].astype(str) != record.at(other)["bridged_pred"].astype(str)).sum())


def baselines_differ(records: Records) -> typing.Iterator[Finding]:
    """A frozen model alone must answer alike in every run; compared by model, whatever its role."""
    seen: dict[str, list[tuple[str, str, str]]] = {}
    for record in records.values():
        for role in ("source", "target"):
            model = _model_of(record, role)
            if model and record.steps() and role in conditions_of(record.outcomes):
                seen.setdefault(model, []).append((record.name, role, record.steps()[-1]))
    for model, uses in seen.items():
        variants: dict[tuple, list[tuple[str, str, str]]] = {}
        for use in uses:
            last = records[use[0]].at(use[2])
            questions = (tuple(last.index), tuple(last["gold"].astype(str)))
            variants.setdefault((questions, tuple(last[f"{use[1]}_pred"].astype(str))), []).append(use)
        for (one, first), (other, second) in itertools.combinations(variants.items(), 2):
            if one[0] == other[0]:
                changed = sum(a != b for a, b in zip(one[1], other[1], strict=True))
                yield _baseline_finding(records, model, first, second, changed)


def _model_of(record: RunRecord, role: str) -> str | None:
    """The model's name; the two of the embedded pair share theirs and are told apart by their place in it."""
    config = record.config
    if f"{role}_model" in config:
        return str(config[f"{role}_model"])
    model = config.get(f"pair.{role}_model")
    if model == "embedded":
        swapped = config.get("pair.direction") == "swapped"
        return f"embedded {({'source': 'target', 'target': 'source'}[role]) if swapped else role}"
    return str(model) if model else None


def _baseline_finding(records: Records, model: str, first: list, second: list, changed: int) -> Finding:
    described = []
    for uses in (first, second):
        run, role, step = uses[0]
        right, world = right_at(records, run, role, step), records[run].facts.get("world_size")
        described.append(f"{right.mean():.3f} as {role}{f' on {world} GPU' if world else ''} ({len(uses)} runs)")
    flips = paired(right_at(records, first[0][0], first[0][1], first[0][2]),
                   right_at(records, second[0][0], second[0][1], second[0][2]))  # fmt: skip
    text = f"{model} alone: {' and '.join(described)}; {changed} of {flips.n} answers differ"
    return Finding("baselines differ", [use[0] for use in first + second], text, {"model": model, "changed": changed})


def repeated_baselines(records: Records) -> typing.Iterator[Finding]:
    """Frozen models generated again at every evaluation, with the same answers each time."""
    repeated, total, runs = 0, 0, []
    for record in records.values():
        steps, conditions = record.steps(), conditions_of(record.outcomes)
        frozen = [c for c in ("source", "target") if len(steps) > 1 and c in conditions]
        same = [c for c in frozen if all(_same_answers(record, c, steps[0], s) for s in steps[1:])]
        if same:
            runs.append(record.name)
            repeated += len(same) * (len(steps) - 1) * len(record.at(steps[0]))
            total += len(conditions) * len(record.outcomes)
    if runs:
        text = (
            f"source and target alone gave the same answers at every evaluation; {repeated:,} of {total:,} "
            f"generated answers ({repeated / total:.0%}) repeat work already done"
        )
        yield Finding("baselines generated again", runs, text, {"repeated": repeated, "total": total})


def _same_answers(record: RunRecord, condition: str, one: str, other: str) -> bool:
    column = f"{condition}_pred"
    return record.at(one)[column].astype(str).equals(record.at(other)[column].astype(str))


def harms(records: Records) -> typing.Iterator[Finding]:
    """Bridged significantly below the target alone."""
    for record in records.values():
        last = _last(record)
        if last is None or "target" not in conditions_of(last):
            continue
        step = record.steps()[-1]
        test = paired(right_at(records, record.name, "bridged", step), right_at(records, record.name, "target", step))
        if test.value < 0 and test.p < ALPHA:
            text = (
                f"bridged is {-test.value:.3f} below the target alone (n = {test.n}, "
                f"interval {test.low:+.3f} to {test.high:+.3f}, McNemar p = {test.p:.2g})"
            )
            yield Finding("the bridge harms", [record.name], text, {"difference": test.value, "p": test.p})


def crashes(records: Records) -> typing.Iterator[Finding]:
    for record in records.values():
        for crash in record.facts.get("crashes") or []:
            used = f", {crash['in_use_gib']:.1f} GiB in use" if "in_use_gib" in crash else ""
            where = f" at {crash['where']}: {crash.get('code', '')}" if crash.get("where") else ""
            text = f"{crash['kind']} after step {crash['step']}{where}{used}"
            yield Finding("crash", [record.name], text, crash)


def opposites(verdicts: typing.Sequence[Verdict]) -> typing.Iterator[Finding]:
    """Sentences that say the opposite of the data."""
    for verdict in verdicts:
        if verdict.opposite:
            text = f'{verdict.claim["id"]}: "{verdict.claim["says"]}" {verdict.why}'
            yield Finding("a sentence says the opposite of the data", _runs_of(verdict), text)


def documents_disagree(verdicts: typing.Sequence[Verdict]) -> typing.Iterator[Finding]:
    """Two documents that give one quantity different values."""
    by_measure: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if "measure" in verdict.claim and verdict.claim.get("relation", "=") == "=":
            by_measure.setdefault(repr(verdict.claim["measure"]), []).append(verdict)
    for group in by_measure.values():
        stated = {str(v.claim["value"]): v for v in group}
        if len(stated) > 1 and len({v.claim["document"] for v in group}) > 1:
            said = " and ".join(f"{v.claim['document']} {value}" for value, v in stated.items())
            text = f"{said} for the same quantity; recomputed {group[0].found or 'not at all'}"
            yield Finding("documents disagree", _runs_of(group[0]), text)


def _runs_of(verdict: Verdict) -> list[str]:
    arguments = next(iter(verdict.claim.get("measure", {"": {}}).values()))
    return [str(arguments[key]) for key in ("run", "other") if key in arguments]


DETECTORS = (
    same_configuration, replicates, best_is_not_best, selection_on_test, same_weights_differ,
    baselines_differ, repeated_baselines, harms, crashes,
)  # fmt: skip
CLAIM_DETECTORS = (opposites, documents_disagree)
