"""What an audit finds by itself in a set of runs, without being told which run is which.

    findings = find_all(records, verdicts)

Each detector takes the records by name and yields findings from what the runs hold: settings, stored answers, losses,
log facts. It names runs because it found them, never because it knows them.
"""

from __future__ import annotations

import itertools
import typing
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from bridgekit.audit.claims import Records, Verdict, answers_at, between, paired
from bridgekit.audit.first_runs import Record, conditions_of, identity, inert_differences, is_right

ALPHA = 0.05
Findings = typing.Iterator["Finding"]


@dataclass
class Finding:
    kind: str
    runs: list[str]
    text: str
    numbers: dict = field(default_factory=dict)


def find_all(records: Records, verdicts: typing.Sequence[Verdict] = ()) -> list[Finding]:
    """Every finding of every detector, and what the claims say against the data or against each other."""
    found = [finding for detector in DETECTORS for finding in detector(records)]
    return found + [finding for detector in CLAIM_DETECTORS for finding in detector(verdicts)]


# -- one experiment under several names ---------------------------------------------------------------------


def _replicates(records: Records, seed: bool) -> list[list[Record]]:
    groups: dict[tuple, list[Record]] = {}
    for record in (record for record in records.values() if record.config):
        groups.setdefault(identity(record, seed), []).append(record)
    return [group for group in groups.values() if len(group) > 1]


def same_configuration(records: Records) -> Findings:
    """Runs under different labels whose settings differ in nothing that has an effect."""
    for group in _replicates(records, seed=True):
        labels = sorted({record.label for record in group})
        if len(labels) < 2:
            continue
        inert: dict[str, set] = {}
        for one, other in itertools.combinations(group, 2):
            for key, values in inert_differences(one, other).items():
                inert.setdefault(key, set()).update(map(str, values))
        apart = "; ".join(f"{k} ({', '.join(sorted(v))}) without effect" for k, v in sorted(inert.items())) or "nothing"
        text = f"labelled as {len(labels)} treatments ({', '.join(labels)}), but the configurations are identical"
        text += f"; apart: {apart}"
        if sizes := sorted({f"{r.facts['parameters_m']}M" for r in group if r.facts.get("parameters_m")}):
            text += f"; trained parameters: {', '.join(sizes)}"
        yield Finding("same configuration, different labels", [r.name for r in group], text, {"labels": labels})


def replicates(records: Records) -> Findings:
    """Runs that differ at most in the seed, and how far their results lie apart."""
    for group in _replicates(records, seed=False):
        last = {r.name: step for r in group if (step := _last_step(r)) is not None}
        if len(last) < 2:
            continue
        scores = {name: _share(records[name], step) for name, step in last.items()}
        ends, pairs = np.array(list(scores.values())), list(itertools.combinations(last, 2))
        shared = [(a, b) for a, b in pairs if _share_items(records[a].at(last[a]), records[b].at(last[b]))]
        p = [between(records, a, b, "bridged", last[a], last[b]).p for a, b in shared]
        text = (
            f"{len(ends)} replicates end at {', '.join(f'{end:.3f}' for end in ends)}: mean {ends.mean():.3f}, "
            f"standard deviation {ends.std(ddof=1):.3f}, spread {np.ptp(ends):.3f}"
        ) + (f"; smallest p of their {len(pairs)} pairs {min(p):.2g}" if p else "")
        yield Finding("replicates", list(scores), text, {"scores": scores, "sd": float(ends.std(ddof=1))})


def _last_step(record: Record, *conditions: str) -> str | None:
    """The last evaluation, if bridged and `conditions` were evaluated there."""
    steps = record.steps()
    return steps[-1] if steps and {"bridged", *conditions} <= set(conditions_of(record.at(steps[-1]))) else None


def _share(record: Record, step: str) -> float:
    return float(is_right(record.at(step), "bridged").mean())


def _share_items(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    return not one.index.intersection(other.index).empty


# -- the checkpoint that was kept ---------------------------------------------------------------------------


def _courses(records: Records) -> typing.Iterator[tuple[Record, dict[str, float], float]]:
    """(run, bridged accuracy of each numbered evaluation, of the final one) where all ask the same items."""
    for record in records.values():
        numbered = [step for step in record.steps() if step != "final"]
        if numbered and _last_step(record) == "final" and _same_items(record, numbered[-1]):
            yield record, {step: _share(record, step) for step in numbered}, _share(record, "final")


def _same_items(record: Record, step: str) -> bool:
    one, other = record.at(step)["gold"], record.at("final")["gold"]
    return one.index.equals(other.index) and bool((one.astype(str) == other.astype(str)).all())


def _changed(record: Record, step: str, condition: str = "bridged", other: str = "final") -> int:
    """How many answers differ between two evaluations of the same items."""
    one, another = (record.at(s)[f"{condition}_pred"].astype(str) for s in (step, other))
    return int((one != another).sum()) if one.index.equals(another.index) else len(one)


def best_is_not_best(records: Records) -> Findings:
    """The weights kept as best, evaluated at the end, against the evaluation they were chosen by."""
    for record, scores, final in _courses(records):
        best = max(scores, key=scores.get)
        selected = record.config.get("early_stop_patience") or record.config.get("train.patience")
        if selected and final < scores[best] and (changed := _changed(record, best)):
            text = (
                f"kept as best: step {best} with {scores[best]:.3f}; evaluated at the end: {final:.3f}, with "
                f"{changed} of {len(record.at('final'))} answers unlike those of step {best}"
            )
            numbers = {"best": scores[best], "final": final}
            yield Finding("best checkpoint is not the best", [record.name], text, numbers)


def selection_on_test(records: Records) -> Findings:
    """The checkpoint or the peak is chosen on the very items that the final evaluation reports."""
    for record, scores, _ in _courses(records):
        text = (
            f"all {len(record.at('final'))} items of the final evaluation are those of the {len(scores)} numbered "
            f"ones; the highest of them, {max(scores.values()):.3f}, is a choice on the test set"
        )
        yield Finding("selection on the test set", [record.name], text, {"evaluations": len(scores)})


def same_weights_differ(records: Records) -> Findings:
    """The final weights are those of some numbered evaluation, yet none of these has their answers."""
    for record, scores, final in _courses(records):
        changed = {s: _changed(record, s) for s in dict.fromkeys([list(scores)[-1], max(scores, key=scores.get)])}
        if all(changed.values()):
            parts = [
                f"{n} of {len(record.at(step))} answers moved since step {step} ({scores[step]:.3f} to {final:.3f})"
                for step, n in changed.items()
            ]
            text = "the final weights are the last or the best ones, but " + " and ".join(parts)
            moved = max(abs(final - scores[step]) for step in changed)
            yield Finding("the same weights score differently", [record.name], text, {"moved": moved})


# -- frozen models ------------------------------------------------------------------------------------------


def baselines_differ(records: Records) -> Findings:
    """A frozen model alone must answer alike in every run; compared by model, whatever its role."""
    seen: dict[tuple, dict[tuple, list[tuple[str, str, str]]]] = {}
    for record in records.values():
        for role in ("source", "target"):
            model = _model_of(record, role)
            if model and record.steps() and role in conditions_of(record.outcomes):
                step = record.steps()[-1]
                last = record.at(step)
                questions = (tuple(last.index), tuple(last["gold"].astype(str)))
                answers = tuple(last[f"{role}_pred"].astype(str))
                seen.setdefault((model, questions), {}).setdefault(answers, []).append((record.name, role, step))
    for (model, _), variants in seen.items():
        for (one, first), (other, second) in itertools.combinations(variants.items(), 2):
            changed, parts = sum(a != b for a, b in zip(one, other, strict=True)), []
            for uses in (first, second):
                (run, role, step), world = uses[0], records[uses[0][0]].facts.get("world_size")
                share = answers_at(records, run, role, step).mean()
                parts.append(f"{share:.3f} as {role}{f' on {world} GPU' if world else ''} ({len(uses)} runs)")
            text = f"{model} alone: {' and '.join(parts)}; {changed} of {len(one)} answers differ"
            runs = [run for run, _, _ in first + second]
            yield Finding("baselines differ", runs, text, {"model": model, "changed": changed})


def _model_of(record: Record, role: str) -> str | None:
    """The model's name; the two of the embedded pair share theirs and are told apart by their place in it."""
    model = record.config.get(f"{role}_model") or record.config.get(f"pair.{role}_model")
    if model == "embedded":
        swapped = record.config.get("pair.direction") == "swapped"
        return f"embedded {({'source': 'target', 'target': 'source'}[role]) if swapped else role}"
    return str(model) if model else None


def repeated_baselines(records: Records) -> Findings:
    """Frozen models generated again at every evaluation, with the same answers each time."""
    repeated, total, runs = 0, 0, []
    for record in records.values():
        first, *more = record.steps() or [""]
        frozen = [c for c in ("source", "target") if more and c in conditions_of(record.outcomes)]
        if same := [c for c in frozen if not any(_changed(record, first, c, step) for step in more)]:
            runs.append(record.name)
            repeated += len(same) * len(more) * len(record.at(first))
            total += len(conditions_of(record.outcomes)) * len(record.outcomes)
    if runs:
        text = (
            f"source and target alone gave the same answers at every evaluation; {repeated:,} of {total:,} "
            f"generated answers ({repeated / total:.0%}) repeat work already done"
        )
        yield Finding("baselines generated again", runs, text, {"repeated": repeated, "total": total})


# -- results ------------------------------------------------------------------------------------------------


def harms(records: Records) -> Findings:
    """Bridged significantly below the target alone."""
    for name, record in records.items():
        if (step := _last_step(record, "target")) is None:
            continue
        test = paired(answers_at(records, name, "bridged", step), answers_at(records, name, "target", step))
        if test.value < 0 and test.p < ALPHA:
            text = (
                f"bridged is {-test.value:.3f} below the target alone (n = {test.n}, "
                f"interval {test.low:+.3f} to {test.high:+.3f}, McNemar p = {test.p:.2g})"
            )
            yield Finding("the bridge harms", [name], text, {"difference": test.value, "p": test.p})


def crashes(records: Records) -> Findings:
    """Tracebacks and lacks of memory that a log holds."""
    for name, record in records.items():
        for crash in record.facts.get("crashes") or []:
            used = f", {crash['in_use_gib']:.1f} GiB in use" if "in_use_gib" in crash else ""
            where = f" at {crash['where']}: {crash.get('code', '')}" if crash.get("where") else ""
            yield Finding("crash", [name], f"{crash['kind']} after step {crash['step']}{where}{used}", crash)


# -- documents ----------------------------------------------------------------------------------------------


def opposites(verdicts: typing.Sequence[Verdict]) -> Findings:
    """Sentences that say the opposite of the data."""
    for verdict in (verdict for verdict in verdicts if verdict.opposite):
        text = f'{verdict.claim["id"]}: "{verdict.claim["says"]}" {verdict.why}'
        yield Finding("a sentence says the opposite of the data", _runs_of(verdict), text)


def documents_disagree(verdicts: typing.Sequence[Verdict]) -> Findings:
    """Two documents that give one quantity different values."""
    by_measure: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        if "measure" in verdict.claim and verdict.claim.get("relation", "=") == "=":
            by_measure.setdefault(repr(verdict.claim["measure"]), []).append(verdict)
    for group in by_measure.values():
        stated = {str(v.claim["value"]): v.claim["document"] for v in group}
        if len(stated) > 1 and len({v.claim["document"] for v in group}) > 1:
            values = " and ".join(f"{document} {value}" for value, document in stated.items())
            text = f"{values} for the same quantity; recomputed {group[0].found or 'not at all'}"
            yield Finding("documents disagree", _runs_of(group[0]), text)


def _runs_of(verdict: Verdict) -> list[str]:
    arguments = next(iter(verdict.claim.get("measure", {"": {}}).values()))
    return [str(arguments[key]) for key in ("run", "other") if key in arguments]


DETECTORS = (
    same_configuration, replicates, best_is_not_best, selection_on_test, same_weights_differ,
    baselines_differ, repeated_baselines, harms, crashes,
)  # fmt: skip
CLAIM_DETECTORS = (opposites, documents_disagree)
