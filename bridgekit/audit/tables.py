"""The tables that the notebook of the first experiments draws: curves, gains, headroom, power, claims; no raw file.

records = load_records("preserved_data/first_experiments")
fig = plot_headroom(headroom_table(records))
"""

from __future__ import annotations

import itertools
import typing
from pathlib import Path

import pandas as pd

from bridgekit.audit.claims import VERDICTS, Records, Verdict, answers_at
from bridgekit.audit.first_runs import (
    Record,
    conditions_of,
    effective_settings,
    find_runs,
    identity,
    is_right,
    load_run,
)
from bridgekit.results.statistics import mcnemar_exact, minimum_detectable_effect, n_for_effect, wilson

SIZES = (100, 200, 400, 800, 1600, 3200, 6400, 12800)


def load_records(root: str | Path) -> Records:
    """Readable runs below `root` by name."""
    return {record.name: record for record in map(load_run, find_runs(root))}


def direction_of(record: Record) -> str:
    """`Mistral-7B to Llama-3.1-8B`, from the logged model names."""
    names = [str(record.config.get(f"{role}_model", "unknown")).split("/")[-1] for role in ("source", "target")]
    return " to ".join(name.removeprefix("Meta-").split("-Instruct")[0] for name in names)


def curves_table(records: Records) -> pd.DataFrame:
    """Accuracy by run, condition and evaluation, with Wilson intervals; `group` is equal for replicates.

    The final evaluation has no step: the runs do not say after which step it was made.
    """
    groups: dict[tuple, int] = {}
    labels, rows = label_runs(records), []
    for name, record in records.items():
        run = {"run": name, "label": labels[name], "direction": direction_of(record)}
        run["group"] = groups.setdefault(identity(record, seed=False), len(groups))
        for step, condition in itertools.product(record.steps(), ("source", "target", "bridged")):
            part = record.at(step)
            if condition in conditions_of(part):
                right, n = int(is_right(part, condition).sum()), len(part)
                low, high = wilson(right, n)
                at = {"final": step == "final", "step": None if step == "final" else int(step)}
                share = {"accuracy": right / n, "low": low, "high": high, "n": n}
                rows.append(run | {"condition": condition} | at | share)
    return pd.DataFrame(rows)


def label_runs(records: Records) -> dict[str, str]:
    """Each run's label, with the named settings in which the runs of its direction differ."""
    labels = {}
    for name, record in records.items():
        settings = [effective_settings(r.config) for r in records.values() if direction_of(r) == direction_of(record)]
        own = effective_settings(record.config)
        differ = [k for k, v in own.items() if isinstance(v, str) and len({repr(s.get(k)) for s in settings}) > 1]
        words = ", ".join(f"{key.split('_')[-1]} {record.config[key]}" for key in sorted(differ))
        labels[name] = f"{record.label}\n({words})" if words else record.label
    return labels


def _last_answers(records: Records, record: Record) -> dict[str, pd.Series]:
    return {c: answers_at(records, record.name, c, record.steps()[-1]) for c in ("source", "target", "bridged")}


def gains_table(records: Records) -> pd.DataFrame:
    """Questions gained and lost against the target alone at each run's last evaluation."""
    labels, rows = label_runs(records), []
    for name, record in records.items():
        right = _last_answers(records, record)
        gained = int((right["bridged"] & ~right["target"]).sum())
        lost = int((right["target"] & ~right["bridged"]).sum())
        run = {"run": name, "label": labels[name], "direction": direction_of(record), "gained": gained, "lost": lost}
        rows.append(run | {"n": len(right["target"]), "p": mcnemar_exact(gained, lost)})
    return pd.DataFrame(rows).sort_values(["direction", "lost"], ascending=[False, True], ignore_index=True)


def headroom_table(records: Records) -> pd.DataFrame:
    """Who is right on how many questions, by direction: what any bridge could gain."""
    rows = {}
    for record in records.values():
        right = _last_answers(records, record)
        source, target = right["source"], right["target"]
        parts = {"source_only": source & ~target, "both": source & target, "target_only": target & ~source}
        counts = {name: int(part.sum()) for name, part in (parts | {"neither": ~source & ~target}).items()}
        rows.setdefault(direction_of(record), {"label": direction_of(record).replace(" to ", " to\n")} | counts)
    return pd.DataFrame(rows.values())


def power_table(records: Records) -> pd.DataFrame:
    """The smallest difference that n questions can show, at the discordance these runs really have."""
    right = {name: _last_answers(records, record) for name, record in records.items()}
    same = [
        pair for pair in itertools.combinations(records, 2) if len({identity(records[n], seed=False) for n in pair}) < 2
    ]
    replicated = {name for pair in same for name in pair} or set(records)
    compared = {
        "two runs of one setting": [(right[a]["bridged"], right[b]["bridged"]) for a, b in same],
        "bridged against target alone": [(right[n]["bridged"], right[n]["target"]) for n in sorted(replicated)],
    }
    rows = []
    for label, pairs in compared.items():
        shares = [float((one != other).mean()) for one, other in pairs]
        if shares and (discordance := sum(shares) / len(shares)) > 0:
            needed = n_for_effect(min(0.02, discordance), discordance)
            row = {"comparison": label, "discordance": discordance, "needed_for_2_points": needed}
            rows += [row | {"n": n, "effect": minimum_detectable_effect(n, discordance)} for n in SIZES]
    return pd.DataFrame(rows)


def verdicts_table(verdicts: typing.Sequence[Verdict]) -> pd.DataFrame:
    """Number of claims by document and verdict."""
    counts = pd.crosstab([v.claim["document"] for v in verdicts], [v.verdict for v in verdicts])
    return counts.reindex(columns=list(VERDICTS), fill_value=0).rename_axis("document").reset_index()
