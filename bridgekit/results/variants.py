"""What a study shows: its finished runs, paired differences to the reference, curves, axes, and the table of a paper.

    runs = read_runs(study, planned, "runs")     # {variant: {seed: evaluation frame}}, finished ones alone
    table = compare_variants(study, runs)        # for plot_forest and ablation_table

An interval must hold for other problems *and* for other training seeds. Its variance is the sum of two: over units, of
the differences averaged over seeds, and over seeds, of each seed's mean; its quantile is Student's, with the degrees of
freedom of Satterthwaite. The sum counts the noise of single answers twice, so it is wide rather than short. Simulated,
435 problems about 290 units, a true difference of 0.05, a seed's difference deviating by 0, 0.02 and 0.1: coverage
0.98, 0.97 and 0.93 with three seeds, 0.99, 0.98 and 0.94 with five. One seed says nothing of others: its interval is
for other problems alone.
"""

from __future__ import annotations

import json
import math
import typing
from pathlib import Path

import numpy as np

from bridgekit.config import Config
from bridgekit.results import statistics as stats
from bridgekit.results import verdict
from bridgekit.results.capacity import carried_bits, message_bits, said_from_message, said_values
from bridgekit.results.figures_runs import curve_from_metrics
from bridgekit.runs import find_eval, lexicon_seed_of, load_eval, read_run_config, read_status
from bridgekit.study import Study, same_run, swept_keys
from bridgekit.tasks import load_examples
from bridgekit.tasks.units import GROUP_SHARES, N_UNITS, SPLIT_SHARES, VALUES

if typing.TYPE_CHECKING:
    import pandas as pd

SUBSETS = ("source_only_held_unit", "all")
POWER, ALPHA = 0.8, 0.05
AXES = {  # the figures of studies along an axis: {name: the key that must vary}
    "capacity": "task.n_facts",
    "generalisation": "task.train_units_share",
    "compression": "bridge.n_soft_tokens",
}
Runs = dict[str, dict[int, "pd.DataFrame"]]


def read_runs(study: Study, planned: dict[str, Config], runs_dir: str | Path) -> Runs:
    """Final evaluations of the finished runs of a plan, by variant and seed, in the study's order."""
    runs: Runs = {}
    for variant, seed, folder in finished_runs(study, planned, runs_dir):
        runs.setdefault(variant, {})[seed] = load_eval(find_eval(folder))
    return runs


def finished_runs(study: Study, planned: dict[str, Config], runs_dir: str | Path) -> list[tuple[str, int, Path]]:
    """(variant, seed, folder) of runs that are finished and are what is planned."""
    found = []
    for variant in study.variants:
        for seed in study.seeds_of(variant):
            name = study.folder(variant, seed)
            folder = Path(runs_dir) / name
            finished = name in planned and read_status(folder).get("state") == "finished"
            if finished and same_run(read_run_config(folder), planned[name]):
                found.append((variant, seed, folder))
    return found


def pooled_difference(ones: list[pd.DataFrame], others: list[pd.DataFrame], subset: str) -> dict:
    """Bridged accuracy of one variant minus another's over pairs of runs on the same problems.

    difference low high p n n_units n_seeds deviation df, and `by_seed`: the difference of each pair.
    """
    from scipy.special import stdtr

    differences, units = [], None
    for one, other in zip(ones, others, strict=True):
        one, other = (verdict.select_subset(f, subset).set_index("id").sort_index() for f in (one, other))
        if not one.index.equals(other.index) or (units is not None and not units.index.equals(one.index)):
            raise ValueError("these variants were not tested on the same problems: their runs cannot be paired")
        units = _units_of(one)
        right = [stats.read_correct(f, "bridged").astype(float) for f in (one, other)]
        differences.append(right[0] - right[1])
    by_seed = np.stack(differences, axis=1)  # (problems, seeds)
    mean, deviation, df = _mean_and_deviation(by_seed, units)
    half = student_quantile(1 - ALPHA / 2, df) * deviation
    return {
        "difference": mean, "low": max(-1.0, mean - half), "high": min(1.0, mean + half),
        "p": float(2 * stdtr(df, -abs(mean) / deviation)), "n": len(by_seed), "n_units": int(units.nunique()),
        "n_seeds": by_seed.shape[1], "deviation": deviation, "df": df, "by_seed": by_seed.mean(axis=0).tolist(),
    }  # fmt: skip


def _mean_and_deviation(values: np.ndarray, units: pd.Series) -> tuple[float, float, float]:
    """Mean of (problems, seeds), its standard deviation over units and seeds, and the degrees of freedom.

    Two answers are added, one gained and one lost: without them equal answers would have no uncertainty at all.
    """
    codes = units.astype("category").cat.codes.to_numpy()
    (n, n_seeds), n_units, mean = values.shape, int(codes.max()) + 1, float(values.mean())
    sums, sizes = np.bincount(codes, weights=values.mean(axis=1)), np.bincount(codes)
    spread = float(((sums - mean * sizes) ** 2).sum()) + 2
    over_units = (n_units + 2) / (n_units + 1) * spread / (n + 2) ** 2
    if n_seeds == 1:
        return mean, math.sqrt(over_units), n_units + 1
    over_seeds = float(values.mean(axis=0).var(ddof=1)) / n_seeds
    both = over_units + over_seeds
    df = both**2 / (over_units**2 / (n_units + 1) + over_seeds**2 / (n_seeds - 1))
    return mean, math.sqrt(both), df


def student_quantile(share: float, df: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, share))


def pooled_accuracy(frames: list[pd.DataFrame], subset: str, condition: str = "bridged") -> stats.Interval:
    """Accuracy of a variant over its seeds, with the same two variances."""
    parts = [verdict.select_subset(frame, subset).set_index("id").sort_index() for frame in frames]
    right = np.stack([stats.read_correct(part, condition).astype(float) for part in parts], axis=1)
    mean, deviation, df = _mean_and_deviation(right, _units_of(parts[0]))
    half = student_quantile(1 - ALPHA / 2, df) * deviation
    n_units = _units_of(parts[0]).nunique()
    return stats.Interval(mean, max(0.0, mean - half), min(1.0, mean + half), len(right), n_units)


def _units_of(rows: pd.DataFrame) -> pd.Series:
    """The unit of each row; where there are none, each question is its own."""
    known = "unit" in rows and rows["unit"].notna().all()
    return rows["unit"] if known else rows.index.to_series()


def compare_variants(study: Study, runs: Runs, subsets: typing.Sequence[str] = SUBSETS) -> pd.DataFrame:
    """A row for each variant and subset: difference to the reference, Holm's p over the table, and the smallest
    difference that would have been found with power 0.8 at the strictest level of Holm's steps.

    Seeds are paired in the study's order; a pair of which one run is missing is left out. No reference, no rows.
    """
    import pandas as pd

    rows = []
    if study.reference not in runs:
        return pd.DataFrame(rows)
    for variant in [name for name in runs if name != study.reference]:
        pairs = _pair_seeds(study, runs, variant)
        for subset in subsets if pairs else ():
            found = pooled_difference([a for a, _ in pairs], [b for _, b in pairs], subset)
            rows.append({"variant": variant, "reference": study.reference, "subset": subset, **found,
                         "replicates": study.replicates.get(variant, "")})  # fmt: skip
    adjusted = stats.holm({str(i): row["p"] for i, row in enumerate(rows)})
    for i, row in enumerate(rows):
        row["adjusted_p"] = adjusted[str(i)]
        row["holds"] = adjusted[str(i)] <= ALPHA
        quantiles = student_quantile(1 - ALPHA / len(rows) / 2, row["df"]) + student_quantile(POWER, row["df"])
        row["smallest_effect"] = min(1.0, quantiles * row["deviation"])
    return pd.DataFrame(rows)


def _pair_seeds(study: Study, runs: Runs, variant: str) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
    own, reference = study.seeds_of(variant), study.seeds_of(study.reference)
    both = zip(own, reference, strict=True)
    there = runs[variant], runs[study.reference]
    return [(there[0][a], there[1][b]) for a, b in both if a in there[0] and b in there[1]]


def read_curves(study: Study, planned: dict[str, Config], runs_dir: str | Path) -> pd.DataFrame:
    """Validation accuracy of `bridged` over steps: variant seed step accuracy low high n n_units; of finished runs."""
    import pandas as pd

    curves = []
    for variant, seed, folder in finished_runs(study, planned, runs_dir):
        curve = curve_from_metrics(folder / "metrics.jsonl")
        curves.append(curve[curve["condition"] == "bridged"].assign(variant=variant, seed=seed))
    return pd.concat(curves, ignore_index=True) if curves else pd.DataFrame()


def tabulate_variants(
    study: Study, runs: Runs, compared: pd.DataFrame, costs: dict[str, dict[str, float]], subsets=SUBSETS
) -> pd.DataFrame:  # fmt: skip
    """A row for each variant and subset, the reference included: accuracy, and beside it what was compared."""
    import pandas as pd

    rows = []
    for variant, seeds in runs.items():
        for subset in subsets:
            share = pooled_accuracy(list(seeds.values()), subset)
            rows.append({
                "variant": variant, "subset": subset, "replicates": study.replicates.get(variant, ""),
                **costs.get(variant, {}), "n_seeds": len(seeds), "n": share.n,
                "n_units": share.n_clusters, "accuracy": share.point, "low": share.low, "high": share.high,
            })  # fmt: skip
    table = pd.DataFrame(rows)
    wanted = ["difference", "difference_low", "difference_high", "adjusted_p", "holds", "smallest_effect"]
    if compared.empty:
        return table.assign(**dict.fromkeys(wanted, float("nan")))
    beside = compared.rename(columns={"low": "difference_low", "high": "difference_high"})
    return table.merge(beside[["variant", "subset", *wanted]], on=["variant", "subset"], how="left")


def read_costs(study: Study, planned: dict[str, Config], runs_dir: str | Path) -> dict[str, dict[str, float]]:
    """Trained parameters of each variant, and the mean seconds that its steps took.

    A module that is switched off is gone from the count. Seconds depend on what else ran on the same device.
    """
    counts, seconds = {}, {}
    for variant, _, folder in finished_runs(study, planned, runs_dir):
        counts[variant] = read_status(folder).get("parameters", float("nan"))
        timing = folder / "timing.json"
        spent = json.loads(timing.read_text()) if timing.is_file() else {}
        seconds.setdefault(variant, []).append(spent.get("train bridged", float("nan")))
    return {v: {"parameters": counts[v], "seconds": float(np.mean(seconds[v]))} for v in counts}


def evaluation_inputs(study: Study, planned: dict[str, Config], runs_dir: str | Path) -> list[Path]:
    """The evaluation files that the figures of a study are drawn from."""
    return [find_eval(folder) for _, _, folder in finished_runs(study, planned, runs_dir)]


def swept_axis(planned: dict[str, Config]) -> str:
    """Which figure the study's runs make: capacity, generalisation or compression; empty if they lie on no axis."""
    keys = swept_keys(planned)
    found = [name for name, key in AXES.items() if key in keys]
    return found[0] if found and keys <= {*AXES.values(), "bridge.producer"} else ""


def read_axis(study: Study, planned: dict[str, Config], runs: Runs, runs_dir: str | Path) -> pd.DataFrame:
    """A row for each run of a study on an axis: what it was, what it recovers, and the bits that it carries.

    Recovered: the share of what the target gets right when told, on held-out source-only problems.
    """
    import pandas as pd

    rows = []
    for variant, seeds in runs.items():
        for seed, frame in seeds.items():
            config = planned[study.folder(variant, seed)]
            share = verdict.recovery(frame, subset="source_only_held_unit")
            row = {
                "variant": variant, "seed": seed, "producer": config.bridge.producer,
                "n_soft_tokens": config.bridge.n_soft_tokens, "train_units": count_train_units(config),
                "recovery": share.point, "low": share.low, "high": share.high,
                "n": share.n, "n_units": share.n_clusters,
            }  # fmt: skip
            if config.task.variant == "context":
                row |= {"n_facts": config.task.n_facts} | _bits_columns(frame, config)
                row |= _values_columns(frame, config, Path(runs_dir) / study.folder(variant, seed))
            rows.append(row)
    return pd.DataFrame(rows)


def _bits_columns(frame: pd.DataFrame, config: Config) -> dict:
    rows = verdict.select_subset(frame, "source_only")
    bits = message_bits(
        carried_bits(rows["value"], said_values(rows), VALUES, rows["unit"]),
        config.task.n_facts,
        config.bridge.source_view,
    )
    k = config.bridge.n_soft_tokens
    return {"bits": bits.point, "bits_low": bits.low, "bits_high": bits.high, "bits_per_token": bits.point / k,
            "bits_per_token_low": bits.low / k, "bits_per_token_high": bits.high / k}  # fmt: skip


def _values_columns(frame: pd.DataFrame, config: Config, folder: Path) -> dict:
    """How many answers say some value of their message; its facts are made again from the run's own record."""
    rows = verdict.select_subset(frame, "source_only")
    facts = {example.id: example.facts for example in load_examples(config, lexicon_seed_of(folder), "test")}
    among = said_from_message(said_values(rows), [facts[i] for i in rows["id"]])
    share = stats.clustered_proportion(among, rows["unit"])
    return {"in_message": share.point, "in_message_low": share.low, "in_message_high": share.high}


def count_train_units(config: Config) -> int:
    """Source-only units that the bridge may meet in training."""
    group = "source_only" if config.pair.direction == "forward" else "target_only"
    n = round(N_UNITS * GROUP_SHARES[group] * SPLIT_SHARES["train"])
    return max(1, round(n * config.task.train_units_share))
