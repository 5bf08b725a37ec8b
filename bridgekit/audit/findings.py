"""What an audit finds by itself in a set of runs, without being told which run is which.

    findings = find_all(records, verdicts)

Each detector takes the records by name and yields findings from what the runs hold: settings, stored answers, losses,
log facts. It names runs because it found them, never because it knows them.
"""

from __future__ import annotations

import itertools
import typing
from dataclasses import dataclass

import pandas as pd

from bridgekit.audit.claims import Records, Verdict, paired
from bridgekit.audit.first_runs import Record, identity
from bridgekit.results.style import format_share

ALPHA = 0.05
TEXTS = {  # kind: what is said of the runs, in the order in which kinds are reported
    "same configuration, different labels": "labelled as {n} treatments ({names}), but the configurations are "
    "identical; apart: {apart}{sizes}",
    "replicates": "{n} replicates end at {ends}: mean {mean}, standard deviation {sd}, spread {spread}{smallest}",
    "best checkpoint is not the best": "kept as best: step {step} with {highest}; evaluated at the end: {end}, with "
    "{changed} of {n} answers unlike those of step {step}",
    "selection on the test set": "all {n} items of the final evaluation are those of the {evaluations} numbered ones; "
    "the highest of them, {highest}, is a choice on the test set",
    "the same weights score differently": "the final weights are the last or the best ones, but {changes}",
    "baselines differ": "{model} alone: {uses}; {changed} of {n} answers differ",
    "baselines generated again": "source and target alone gave the same answers at every evaluation; {repeated:,} of "
    "{total:,} generated answers ({share:.0%}) repeat work already done",
    "the bridge harms": "bridged is {below} below the target alone (n = {n}, interval {low} to {high}, "
    "McNemar p = {p:.2g})",
    "crash": "{kind} after step {step}{where}{used}",
    "a sentence says the opposite of the data": '{id}: "{says}" {why}',
    "documents disagree": "{values} for the same quantity; recomputed {found}",
}
Findings = typing.Iterator["Finding"]


@dataclass
class Finding:
    kind: str
    runs: list[str]
    text: str
    numbers: dict


def find_all(records: Records, verdicts: typing.Sequence[Verdict] = ()) -> list[Finding]:
    """Every finding of every detector, and what the claims say against the data or against each other."""
    detectors = same_configuration, replicates, checkpoints, baselines_differ, repeated_baselines, harms, crashes
    found = [finding for detector in detectors for finding in detector(records)]
    found += [*opposites(verdicts), *documents_disagree(verdicts)]
    return sorted(found, key=lambda finding: list(TEXTS).index(finding.kind))


def _finding(kind: str, runs: list[str], numbers: dict | None = None, **words: object) -> Finding:
    return Finding(kind, runs, TEXTS[kind].format(**(numbers or {}) | words), numbers or {})


def _group(items: typing.Iterable, key: typing.Callable) -> list[list]:
    """Items of an equal key, if there are several."""
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault(repr(key(item)), []).append(item)
    return [group for group in groups.values() if len(group) > 1]


# -- one experiment under several names ---------------------------------------------------------------------


def same_configuration(records: Records) -> Findings:
    """Runs under different labels whose settings differ in nothing that has an effect."""
    for group in _group((record for record in records.values() if record.config), identity):
        labels = sorted({record.label for record in group})
        keys = sorted({key for record in group for key in record.config})
        values = {key: sorted({str(record.config.get(key)) for record in group}) for key in keys}
        apart = [f"{key} ({', '.join(found)}) without effect" for key, found in values.items() if len(found) > 1]
        sizes = sorted({f"{r.facts['parameters_m']}M" for r in group if r.facts.get("parameters_m")})
        words = {"n": len(labels), "names": ", ".join(labels), "apart": "; ".join(apart) or "nothing"}
        words["sizes"] = f"; trained parameters: {', '.join(sizes)}" if sizes else ""
        if len(labels) > 1:
            runs = [record.name for record in group]
            yield _finding("same configuration, different labels", runs, {"labels": labels}, **words)


def replicates(records: Records) -> Findings:
    """Runs that differ at most in the seed, and how far their results lie apart."""
    records = [record for record in records.values() if record.config and _last(record, "bridged") is not None]
    for group in _group(records, lambda record: identity(record, seed=False)):
        right = {record.name: _last(record, "bridged") for record in group}
        ends, pairs = pd.Series({k: float(v.mean()) for k, v in right.items()}), [*itertools.combinations(right, 2)]
        p = [paired(right[a], right[b])["p"] for a, b in pairs if len(right[a].index.intersection(right[b].index))]
        smallest = f"; smallest p of their {len(pairs)} pairs {min(p):.2g}" if p else ""
        words = {"mean": ends.mean(), "sd": ends.std(), "spread": ends.max() - ends.min()}
        words = {name: format_share(share) for name, share in words.items()}
        words |= {"n": len(ends), "ends": ", ".join(map(format_share, ends)), "smallest": smallest}
        yield _finding("replicates", list(right), {"scores": ends.to_dict(), "sd": float(ends.std())}, **words)


def _last(record: Record, condition: str) -> pd.Series | None:
    """Right or wrong by index in the last evaluation, if the condition was evaluated there."""
    return record.at(record.steps[-1]).get(f"{condition}_correct") if record.steps else None


# -- the checkpoint that was kept ---------------------------------------------------------------------------


def checkpoints(records: Records) -> Findings:
    """Weights kept as best that are not, a choice on the test items, and equal weights with unequal answers."""
    for name, record in records.items():
        *numbered, last = record.steps or [""]
        final, before = record.at(last), record.at(numbered[-1] if numbered else last)
        same_items = before["gold"].astype(str).equals(final["gold"].astype(str))
        if not numbered or last != "final" or not same_items or "bridged_pred" not in final:
            continue
        scores = record.curve.set_index("step")["bridged_acc"].to_dict()
        end, n = scores.pop("final"), len(final)
        best = max(scores, key=scores.get)
        moved = {step: _count_changes(record, "bridged", step, "final") for step in (numbered[-1], best)}
        words = {"n": n, "highest": format_share(scores[best]), "end": format_share(end)}
        if (record.config.get("early_stop_patience") or record.config.get("train.patience")) and end < scores[best]:
            words |= {"step": best, "changed": moved[best]}
            numbers = {"best": scores[best], "final": end}
            yield _finding("best checkpoint is not the best", [name], numbers, **words)
        yield _finding("selection on the test set", [name], {"evaluations": len(scores)}, **words)
        if all(moved.values()):
            changes = [
                f"{changed} of {n} answers moved since step {step} ({format_share(scores[step])} to {words['end']})"
                for step, changed in moved.items()
            ]
            numbers = {"moved": max(abs(end - scores[step]) for step in moved)}
            yield _finding("the same weights score differently", [name], numbers, changes=" and ".join(changes))


def _count_changes(record: Record, condition: str, step: str, other: str) -> int:
    """How many answers of the other evaluation are not those of the first."""
    first, second = (record.at(s)[f"{condition}_pred"].astype(str) for s in (step, other))
    return int((second != first.reindex(second.index)).sum())


# -- frozen models ------------------------------------------------------------------------------------------


def baselines_differ(records: Records) -> Findings:
    """A frozen model alone must answer alike in every run; compared by model, whatever its role."""
    rows = []
    for record, role in itertools.product(records.values(), ("source", "target")):
        last = record.at(record.steps[-1]) if record.steps else {}
        if f"{role}_pred" in last and (model := _model_of(record, role)):
            world = f" on {record.facts['world_size']} GPU" if record.facts.get("world_size") else ""
            use = f"{format_share(last[f'{role}_correct'].mean())} as {role}{world}"
            row = {"model": model, "asked": tuple(last["gold"].items()), "answers": tuple(last[f"{role}_pred"])}
            rows.append(row | {"run": record.name, "use": use})
    for (model, _), same in pd.DataFrame(rows).groupby(["model", "asked"], sort=False) if rows else ():
        for pair in itertools.combinations([part for _, part in same.groupby("answers", sort=False)], 2):
            (one, n), (other, _) = ((part["answers"].iloc[0], len(part["answers"].iloc[0])) for part in pair)
            uses = " and ".join(f"{part['use'].iloc[0]} ({len(part)} runs)" for part in pair)
            numbers = {"model": model, "changed": sum(map(str.__ne__, one, other))}
            yield _finding("baselines differ", pd.concat(pair)["run"].tolist(), numbers, uses=uses, n=n)


def _model_of(record: Record, role: str) -> str | None:
    """The model's name; the two of the embedded pair share theirs and are told apart by their place in it."""
    model = record.config.get(f"{role}_model") or record.config.get(f"pair.{role}_model")
    if model == "embedded" and record.config.get("pair.direction") == "swapped":
        role = "target" if role == "source" else "source"
    return f"embedded {role}" if model == "embedded" else model and str(model)


def repeated_baselines(records: Records) -> Findings:
    """Frozen models generated again at every evaluation, with the same answers each time."""
    runs, numbers = [], {"repeated": 0, "total": 0}
    for record in records.values():
        first, *more = record.steps or [""]
        frozen = [c for c in ("source", "target") if more and f"{c}_pred" in record.outcomes]
        if same := [c for c in frozen if not any(_count_changes(record, c, first, step) for step in more)]:
            runs.append(record.name)
            numbers["repeated"] += len(same) * len(more) * len(record.at(first))
            numbers["total"] += record.outcomes.filter(regex="_pred$").size
    if runs:
        yield _finding("baselines generated again", runs, numbers, share=numbers["repeated"] / numbers["total"])


# -- results ------------------------------------------------------------------------------------------------


def harms(records: Records) -> Findings:
    """Bridged significantly below the target alone."""
    for name, record in records.items():
        bridged, target = _last(record, "bridged"), _last(record, "target")
        test = {"value": 0} if bridged is None or target is None else paired(bridged, target)
        if test["value"] < 0 and test["p"] < ALPHA:
            low, high = (format_share(test[end], signed=True) for end in ("low", "high"))
            words = {"below": format_share(-test["value"]), "n": test["n"], "low": low, "high": high}
            yield _finding("the bridge harms", [name], {"difference": test["value"], "p": test["p"]}, **words)


def crashes(records: Records) -> Findings:
    """Tracebacks and lacks of memory that a log holds."""
    for name, record in records.items():
        for crash in record.facts.get("crashes") or []:
            used = f", {crash['in_use_gib']:.1f} GiB in use" if "in_use_gib" in crash else ""
            where = f" at {crash['where']}: {crash.get('code', '')}" if crash.get("where") else ""
            yield Finding("crash", [name], TEXTS["crash"].format(**crash | {"used": used, "where": where}), crash)


# -- documents ----------------------------------------------------------------------------------------------


def opposites(verdicts: typing.Sequence[Verdict]) -> Findings:
    """Sentences that say the opposite of the data."""
    for verdict in verdicts:
        if verdict.opposite:
            yield _finding(
                "a sentence says the opposite of the data", _runs_of(verdict), why=verdict.why, **verdict.claim
            )


def documents_disagree(verdicts: typing.Sequence[Verdict]) -> Findings:
    """Two documents that give one quantity different values."""
    equal = [v for v in verdicts if "measure" in v.claim and v.claim.get("relation", "=") == "="]
    for group in _group(equal, lambda verdict: verdict.claim["measure"]):
        stated = {str(verdict.claim["value"]): verdict.claim["document"] for verdict in group}
        if len(stated) > 1 and len({verdict.claim["document"] for verdict in group}) > 1:
            values = " and ".join(f"{document} {value}" for value, document in stated.items())
            found = group[0].found or "not at all"
            yield _finding("documents disagree", _runs_of(group[0]), values=values, found=found)


def _runs_of(verdict: Verdict) -> list[str]:
    (arguments,) = verdict.claim.get("measure", {"": {}}).values()
    named = arguments.get("run"), arguments.get("other"), arguments.get("minus", {}).get("run")
    return [run for run in named if run]
