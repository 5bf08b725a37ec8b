"""The tables that the notebook of the first experiments draws: curves, gains, headroom, power, claims; no raw file.

records = run_audit("preserved_data/first_experiments").records
figure = plots.plot_headroom(headroom_table(records))
"""

from __future__ import annotations

import itertools
import typing

import pandas as pd

from bridgekit.audit.claims import VERDICTS, Records, Verdict
from bridgekit.audit.first_runs import Record, effective_settings, identity
from bridgekit.results.statistics import mcnemar_exact, minimum_detectable_effect, n_for_effect
from bridgekit.results.table import share, tidy
from bridgekit.results.verdict import headroom

SIZES = (100, 200, 400, 800, 1600, 3200, 6400, 12800)


def direction_of(record: Record) -> str:
    """`Mistral-7B to Llama-3.1-8B`, from the logged model names."""
    names = [str(record.config.get(f"{role}_model", "unknown")).split("/")[-1] for role in ("source", "target")]
    return " to ".join(name.removeprefix("Meta-").split("-Instruct")[0] for name in names)


def runs_table(records: Records) -> pd.DataFrame:
    """Per run its direction, and its label with the named settings in which the runs of that direction differ."""
    runs = pd.DataFrame([{"run": name, "direction": direction_of(record)} for name, record in records.items()])
    settings = {name: effective_settings(record.config) for name, record in records.items()}
    labels = []
    for run, direction in runs.itertuples(index=False):
        others = [settings[other] for other in runs["run"][runs["direction"] == direction]]
        named = sorted(key for key, value in settings[run].items() if isinstance(value, str))
        differ = [key for key in named if len({repr(other.get(key)) for other in others}) > 1]
        words = ", ".join(f"{key.split('_')[-1]} {settings[run][key]}" for key in differ)
        labels.append(f"{records[run].label}\n({words})" if words else records[run].label)
    runs.insert(1, "label", labels)
    return runs


def curves_table(records: Records) -> pd.DataFrame:
    """Accuracy by run, condition and evaluation, with Wilson intervals; `group` is equal for replicates.

    The final evaluation has no step: the runs do not say after which step it was made.
    """
    runs = runs_table(records)
    runs["group"] = pd.factorize(pd.Series([repr(identity(record, seed=False)) for record in records.values()]))[0]
    parts = [
        tidy(record.at(step).reset_index()).assign(run=name, at=step)
        for name, record in records.items()
        for step in record.steps
    ]
    shares = share(pd.concat(parts), ["run", "at", "condition"]).rename(columns={"point": "accuracy"})
    shares["final"], shares["step"] = shares["at"] == "final", pd.to_numeric(shares["at"], errors="coerce")
    columns = [*runs, "condition", "final", "step", "accuracy", "low", "high", "n"]
    return runs.merge(shares[shares["condition"].isin(["source", "target", "bridged"])])[columns]


def gains_table(records: Records) -> pd.DataFrame:
    """Questions gained and lost against the target alone at each run's last evaluation."""
    rows = []
    for record in records.values():
        last = record.at(record.steps[-1])
        gained = int((last["bridged_correct"] & ~last["target_correct"]).sum())
        lost = int((last["target_correct"] & ~last["bridged_correct"]).sum())
        rows.append({"gained": gained, "lost": lost, "n": len(last), "p": mcnemar_exact(gained, lost)})
    table = runs_table(records).join(pd.DataFrame(rows))
    return table.sort_values(["direction", "lost"], ascending=[False, True], ignore_index=True)


def headroom_table(records: Records) -> pd.DataFrame:
    """Who is right on how many questions, by direction: what any bridge could gain."""
    rows = {}
    for record in records.values():
        counts = headroom(record.at(record.steps[-1])).counts
        rows.setdefault(direction_of(record), {"label": direction_of(record).replace(" to ", " to\n")} | counts)
    return pd.DataFrame(rows.values())


def power_table(records: Records) -> pd.DataFrame:
    """The smallest difference that n questions can show, at the discordance these runs really have."""
    last = {name: record.at(record.steps[-1]) for name, record in records.items()}
    key = {name: identity(record, seed=False) for name, record in records.items()}
    same = [pair for pair in itertools.combinations(records, 2) if key[pair[0]] == key[pair[1]]]
    replicated = sorted({name for pair in same for name in pair} or records)
    compared = {
        "two runs of one setting": [(last[a]["bridged_correct"], last[b]["bridged_correct"]) for a, b in same],
        "bridged against target alone": [(last[n]["bridged_correct"], last[n]["target_correct"]) for n in replicated],
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
