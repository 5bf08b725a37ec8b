"""What an audit finds by itself in a set of runs, without being told which run is which.

    findings = find_all(records, verdicts)

Each detector takes the records by name and yields findings from what the runs hold: settings, stored answers, losses,
log facts. It names runs because it found them, never because it knows them. The words are in `finding.txt.j2`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from bridgekit.audit.claims import Records, Verdict, paired
from bridgekit.audit.first_runs import Record, identity
from bridgekit.results.reports import render

ALPHA = 0.05
Findings = Iterator["Finding"]


@dataclass
class Finding:
    """One fault, or one fact to know before the numbers are read; `numbers` are for programs."""

    kind: str
    runs: list[str]
    text: str
    numbers: dict


def find_all(records: Records, verdicts: Sequence[Verdict] = ()) -> list[Finding]:
    """Every finding of every detector, and what the claims say against the data or against each other."""
    detectors = same_configuration, replicates, checkpoints, baselines_differ, repeated_baselines, harms, crashes
    found = [finding for detector in detectors for finding in detector(records)]
    return [*found, *opposites(verdicts), *documents_disagree(verdicts)]


def _finding(kind: str, runs: list[str], facts: dict, *exported: str) -> Finding:
    """A finding with its words; of the facts that these need, `exported` are its numbers."""
    text = render("finding.txt.j2", finding=kind, **facts).strip().replace("\n", "")
    return Finding(kind, runs, text, {name: facts[name] for name in exported})


def _group(items: Iterable, key: Callable) -> list[list]:
    """Items of an equal key, if there are several."""
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(repr(key(item)), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


def same_configuration(records: Records) -> Findings:
    """Runs under different labels whose settings differ in nothing that has an effect."""
    for group in _group((record for record in records.values() if record.config), identity):
        labels = sorted({record.label for record in group})
        keys = sorted({key for record in group for key in record.config})
        values = {key: sorted({str(record.config.get(key)) for record in group}) for key in keys}
        apart = {key: found for key, found in values.items() if len(found) > 1}
        sizes = sorted({record.facts.get("parameters_m") for record in group} - {None})
        if len(labels) > 1:
            runs, facts = [record.name for record in group], {"labels": labels, "apart": apart, "sizes": sizes}
            yield _finding("same configuration, different labels", runs, facts, "labels")


def replicates(records: Records) -> Findings:
    """Runs that differ at most in the seed, and how far their results lie apart."""
    last = {name: record.last.get("bridged_correct") for name, record in records.items() if record.config}
    ended = [name for name, right in last.items() if right is not None]
    for group in _group(ended, lambda name: identity(records[name], seed=False)):
        ends, pairs = pd.Series({name: float(last[name].mean()) for name in group}), [*itertools.combinations(group, 2)]
        p = [paired(last[a], last[b])["p"] for a, b in pairs if len(last[a].index.intersection(last[b].index))]
        facts = {"scores": ends.to_dict(), "sd": float(ends.std()), "p": p, "n_pairs": len(pairs)}
        yield _finding("replicates", group, facts, "scores", "sd")


def checkpoints(records: Records) -> list[Finding]:
    """Weights kept as best that are not, a choice on the test items, and equal weights with unequal answers."""
    not_best, chosen, unequal = [], [], []
    for name, record in records.items():
        *numbered, last = record.steps or [""]
        asked = [record.at(step)["gold"].astype(str) for step in (*numbered[-1:], last)]
        if not numbered or last != "final" or "bridged_pred" not in record.last or not asked[0].equals(asked[1]):
            continue
        scores = record.curve.set_index("step")["bridged_acc"].to_dict()
        end = scores.pop("final")
        best = max(scores, key=scores.get)
        moved = {step: _count_changes(record, "bridged", step, "final") for step in (numbered[-1], best)}
        facts = {"n": len(record.last), "evaluations": len(scores), "scores": scores, "final": end}
        facts |= {"best": scores[best], "step": best, "changed": moved[best], "moved_since": moved}
        facts["moved"] = max(abs(end - scores[step]) for step in moved)
        if (record.config.get("early_stop_patience") or record.config.get("train.patience")) and end < scores[best]:
            not_best.append(_finding("best checkpoint is not the best", [name], facts, "best", "final"))
        chosen.append(_finding("selection on the test set", [name], facts, "evaluations"))
        if all(moved.values()):
            unequal.append(_finding("the same weights score differently", [name], facts, "moved"))
    return not_best + chosen + unequal


def _count_changes(record: Record, condition: str, step: str, other: str) -> int:
    """How many answers of the other evaluation are not those of the first, of the items that both have."""
    first, second = (record.at(s)[f"{condition}_pred"].astype(str) for s in (step, other))
    both = first.index.intersection(second.index)
    return int((second[both] != first[both]).sum())


def baselines_differ(records: Records) -> Findings:
    """A frozen model alone must answer alike in every run; compared by model, whatever its role."""
    rows = []
    for record, role in itertools.product(records.values(), ("source", "target")):
        last, model = record.last, _model_of(record, role)
        if f"{role}_pred" in last and model:
            row = {"model": model, "asked": tuple(last["gold"].items()), "answers": tuple(last[f"{role}_pred"])}
            use = {"role": role, "share": last[f"{role}_correct"].mean(), "world": record.facts.get("world_size")}
            rows.append(row | {"run": record.name, "use": use})
    for (model, _), same in pd.DataFrame(rows).groupby(["model", "asked"], sort=False) if rows else ():
        for pair in itertools.combinations([part for _, part in same.groupby("answers", sort=False)], 2):
            one, other = (part["answers"].iloc[0] for part in pair)
            uses = [part["use"].iloc[0] | {"n_runs": len(part)} for part in pair]
            facts = {"model": model, "changed": sum(map(str.__ne__, one, other)), "uses": uses, "n": len(one)}
            yield _finding("baselines differ", pd.concat(pair)["run"].tolist(), facts, "model", "changed")


def _model_of(record: Record, role: str) -> str | None:
    """The model's name; the two of the embedded pair share theirs and are told apart by their place in it."""
    model = record.config.get(f"{role}_model") or record.config.get(f"pair.{role}_model")
    if model == "embedded" and record.config.get("pair.direction") == "swapped":
        role = "target" if role == "source" else "source"
    return f"embedded {role}" if model == "embedded" else model and str(model)


def repeated_baselines(records: Records) -> Findings:
    """Frozen models generated again at every evaluation, with the same answers each time."""
    runs, facts = [], {"repeated": 0, "total": 0}
    for record in records.values():
        first, *more = record.steps or [""]
        frozen = [c for c in ("source", "target") if more and f"{c}_pred" in record.outcomes]
        if same := [c for c in frozen if not any(_count_changes(record, c, first, step) for step in more)]:
            runs.append(record.name)
            facts["repeated"] += len(same) * len(more) * len(record.at(first))
            facts["total"] += record.outcomes.filter(regex="_pred$").size
    if runs:
        yield _finding("baselines generated again", runs, facts, *facts)


def harms(records: Records) -> Findings:
    """Bridged significantly below the target alone."""
    for name, record in records.items():
        if {"bridged_correct", "target_correct"} <= set(last := record.last):
            test = paired(last["bridged_correct"], last["target_correct"])
            if test["value"] < 0 and test["p"] < ALPHA:
                facts = test | {"difference": test["value"]}
                yield _finding("the bridge harms", [name], facts, "difference", "p")


def crashes(records: Records) -> Findings:
    """Tracebacks and lacks of memory that a log holds."""
    for name, record in records.items():
        for crash in record.facts.get("crashes") or []:
            yield _finding("crash", [name], crash, *crash)


def opposites(verdicts: Sequence[Verdict]) -> Findings:
    """Sentences that say the opposite of the data."""
    for verdict in verdicts:
        if verdict.opposite:
            yield _finding("a sentence says the opposite of the data", _runs_of(verdict), vars(verdict))


def documents_disagree(verdicts: Sequence[Verdict]) -> Findings:
    """Two documents that give one quantity different values."""
    equal = [v for v in verdicts if "measure" in v.claim and v.claim.get("relation", "=") == "="]
    for group in _group(equal, lambda verdict: verdict.claim["measure"]):
        stated = {str(verdict.claim["value"]): verdict.claim["document"] for verdict in group}
        if len(stated) > 1 and len({verdict.claim["document"] for verdict in group}) > 1:
            facts = {"stated": stated, "found": group[0].found or "not at all"}
            yield _finding("documents disagree", _runs_of(group[0]), facts)


def _runs_of(verdict: Verdict) -> list[str]:
    (arguments,) = verdict.claim.get("measure", {"": {}}).values()
    named = *(arguments.get(key) for key in ("run", "other", "plus")), arguments.get("minus", {}).get("run")
    return [run for run in named if run]
