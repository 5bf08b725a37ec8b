"""The paper's runs as tables: recovery by seed and lexicon, the main table, faults repaired, what made the difference.

    read_recovery()       # preserved_data/headline_*, made by `bridgekit sweep parameters/headline.yaml`
    read_compositions()   # those, and preserved_data/studies/compositions.tar.xz (parameters/compositions.yaml)
    read_series(FAULTS)   # those, and preserved_data/studies/repairs.tar.xz (parameters/repairs.yaml)

Everything is recomputed from the preserved evaluation JSONL; no number is kept here.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from bridgekit.config import Config
from bridgekit.results import verdict
from bridgekit.results.capacity import said_values
from bridgekit.results.figures_runs import curve_from_metrics
from bridgekit.results.figures_text import format_rows
from bridgekit.results.statistics import clustered_proportion
from bridgekit.results.style import LABELS, SUBSET_LABELS
from bridgekit.results.variants import Runs, pooled_accuracy, pooled_difference, read_runs
from bridgekit.runs import find_eval, lexicon_seed_of, load_eval_once, read_run_config
from bridgekit.studies import open_study
from bridgekit.study import Study, plan_study, read_study
from bridgekit.tasks.units import make_lexicon, pick_train_units

ROOT = Path("preserved_data")
LEXICONS = {"lexicon 2": "", "lexicon 4": "_fresh4", "lexicon 5": "_fresh5"}
COMPOSITIONS = {  # the main table
    ("resampler", "prefix", "forward"): "headline_resampler",
    ("dit", "prefix", "forward"): "headline_dit",
    ("dit", "residual", "forward"): "compositions_dit_residual",
    ("dit", "prefix+residual", "forward"): "compositions_dit_both",
    ("resampler", "kv", "forward"): "compositions_resampler_kv",
    ("resampler", "prefix", "swapped"): "compositions_resampler_swapped",
    ("dit", "prefix", "swapped"): "compositions_dit_swapped",
    ("dit", "residual", "swapped"): "compositions_dit_residual_swapped",
    ("dit", "prefix+residual", "swapped"): "compositions_dit_both_swapped",
    ("resampler", "kv", "swapped"): "compositions_resampler_kv_swapped",
}
HELD = {
    "held-out units": "source_only_held_unit",
    "held-out values": "source_only_held_value",
    "both": "source_only",
}
GROUPS_SHOWN = ("all", "source_only_held_unit", "source_only_held_value", "target_only", "both")
SHOWN = ("target", "constant", "shuffled", "self_bridge", "router", "relay_full", "relay_cut", "target_told")
FAULTS = {  # each run repairs one fault more than the one above it
    "the seeds' design": "repairs_fault0_seeds",
    "+ literal prompt in training": "repairs_fault1_prompt",
    "+ own samples, all losses live": "repairs_fault2_sampling",
    "+ attends to every state": "repairs_fault3_attend",
    "+ predicts tokens": "repairs_fault4_tokens",
    "+ answer likelihood alone": "repairs_fault5_nll",
    "+ source-rich mix, state dropout": "repairs_fault6_mix",
    "+ alignment to the gold answer": "repairs_dit",
}
DIFFERENCES = {  # the working DiT with one thing taken back
    "working DiT": "repairs_dit",
    "predicts velocity": "repairs_dit_velocity",
    "last source layer alone": "repairs_dit_last_layer",
    "no alignment to the gold answer": "repairs_fault6_mix",
    "no state dropout": "repairs_dit_no_dropout",
    "15% of the training units": "repairs_dit_few_units",
}
INTERVENED = {  # trained on half of the values, against as many units with all values (parameters/values.yaml)
    "resampler x prefix, swapped": "values_prefix",
    "dit x residual, swapped": "values_residual",
    "resampler x kv, swapped": "values_kv",
}
COMPARED = ("ablation_losses", "ablation_flow", "ablation_gpu")  # studies with a reference
ALONG = ("ablation_capacity", "ablation_generalisation", "ablation_compression")  # studies along an axis


def load_runs(name: str, root: Path = ROOT) -> dict[int, pd.DataFrame]:
    """The evaluations of a run by training seed."""
    return {seed: load_eval_once(find_eval(folder)) for seed, folder in run_folders(name, root).items()}


def run_folders(name: str, root: Path = ROOT) -> dict[int, Path]:
    """Folders of a run by seed; one without a folder of its own is in the study that its name begins with."""
    if not (kept := list(root.glob(f"{name}_seed*"))):
        kept = list(open_study(name.split("_")[0], root / "studies").glob(f"{name}_seed*"))
    if not kept:
        raise FileNotFoundError(f"{root}: no run '{name}' is kept there, nor in one of its studies")
    return dict(sorted((int(folder.name.rsplit("_seed", 1)[1]), folder) for folder in kept))


def each_run(root: Path = ROOT) -> Iterator[tuple[str, str, int, pd.DataFrame]]:
    """(lexicon, producer, seed, frame) of the runs with all controls."""
    for lexicon, suffix in LEXICONS.items():
        for producer in ("resampler", "dit"):
            for seed, frame in load_runs(f"headline_{producer}{suffix}", root).items():
                yield lexicon, producer, seed, frame


def read_recovery(subset: str = "source_only_held_unit", root: Path = ROOT) -> pd.DataFrame:
    """Recovery as a share of `target_told` on the same problems, and the bridge on the mix: a row for each run."""
    rows = []
    for lexicon, producer, seed, frame in each_run(root):
        share = verdict.recovery(frame, subset=subset)
        mix = verdict.select_subset(frame)["bridged_correct"].mean()
        rows.append(
            {"label": lexicon, "producer": producer, "seed": seed, "recovery": share.point, "low": share.low,
             "high": share.high, "n": share.n, "n_units": share.n_clusters, "mix": mix}
        )  # fmt: skip
    return pd.DataFrame(rows)


def read_courses(root: Path = ROOT) -> pd.DataFrame:
    """Validation accuracy over steps of both producers on the embedded pair, for `plot_curves`."""
    courses = []
    for name in ("headline_resampler", "headline_dit"):
        for seed, folder in run_folders(name, root).items():
            course = curve_from_metrics(folder / "metrics.jsonl")
            label = name.removeprefix("headline_")
            courses.append(course[course["condition"] == "bridged"].assign(variant=label, seed=seed))
    return pd.concat(courses, ignore_index=True)


def open_runs(name: str, root: Path = ROOT) -> tuple[Study, dict[str, Config], Runs, Path]:
    """A kept study: what was planned, its finished runs, and the folder that they were unpacked into."""
    study, folder = read_study(Path("parameters") / f"{name}.yaml"), open_study(name, root / "studies")
    planned = plan_study(study, "runs")
    return study, planned, read_runs(study, planned, folder), folder


def read_verdicts(root: Path = ROOT) -> pd.DataFrame:
    """The claim rule over three training seeds, for each producer and lexicon."""
    frames: dict[tuple[str, str], dict[int, pd.DataFrame]] = {}
    for lexicon, producer, seed, frame in each_run(root):
        frames.setdefault((lexicon, producer), {})[seed] = frame
    rows = []
    for (lexicon, producer), some in frames.items():
        judged = verdict.judge(list(some.values()), seeds=list(some))
        rows.append({"lexicon": lexicon, "producer": producer, "outcome": judged.outcome, "text": judged.text})
    return pd.DataFrame(rows)


def read_rivals(root: Path = ROOT) -> pd.DataFrame:
    """Accuracy on the mix of held-out problems: mean over seeds of each condition, by lexicon and producer."""
    rows = []
    for lexicon, producer, _, frame in each_run(root):
        held = verdict.select_subset(frame)
        shares = {c.removesuffix("_correct"): held[c].mean() for c in held if c.endswith("_correct")}
        rows.append({"lexicon": lexicon, "producer": producer} | shares)
    return pd.DataFrame(rows).groupby(["lexicon", "producer"], sort=False).mean().reset_index()


def read_compositions(root: Path = ROOT) -> pd.DataFrame:
    """The main table: a row for each composition and direction, over three seeds, with the verdict of the claim rule.

    A column for each group and condition: the bridge by group, every control and rival on the mix.
    """
    rows = []
    for (producer, injector, direction), name in COMPOSITIONS.items():
        by_seed = load_runs(name, root)
        frames = list(by_seed.values())
        judged = verdict.judge(frames, seeds=list(by_seed))
        row = {"producer": producer, "injector": injector, "direction": direction, "outcome": judged.outcome,
               "text": judged.text}  # fmt: skip
        for group in GROUPS_SHOWN:
            share = pooled_accuracy(frames, group)
            row |= {group: share.point, f"{group}_low": share.low, f"{group}_high": share.high, f"{group}_n": share.n}
        mixes = [verdict.select_subset(frame) for frame in frames]
        row["least_mix"] = min(mix["bridged_correct"].mean() for mix in mixes)
        row["gain"] = row["all"] - mixes[0]["target_correct"].mean()
        shares = pd.DataFrame([{c: mix[c].mean() for c in mix if c.endswith("_correct")} for mix in mixes]).mean()
        rows.append(row | {c.removesuffix("_correct"): value for c, value in shares.items()})
    return pd.DataFrame(rows)


def read_composition_recovery(subset: str = "source_only_held_unit", root: Path = ROOT) -> pd.DataFrame:
    """The same runs, a row for each seed, for `plot_recovery`: the label is injector and direction."""
    rows = []
    for (producer, injector, direction), name in COMPOSITIONS.items():
        for seed, frame in load_runs(name, root).items():
            share = verdict.recovery(frame, subset=subset)
            rows.append({"label": f"{injector}, {direction}", "producer": producer, "seed": seed,
                         "recovery": share.point, "low": share.low, "high": share.high, "n": share.n,
                         "n_units": share.n_clusters})  # fmt: skip
    return pd.DataFrame(rows)


def read_digits(root: Path = ROOT) -> pd.DataFrame:
    """What a composition says about values that no training unit has: which digits are right, and whose values it says.

    `trained_value` is the share of its wrong answers that say a value of the training units: remembered, not composed.
    """
    rows = []
    for (producer, injector, direction), name in COMPOSITIONS.items():
        folder = next(iter(run_folders(name, root).values()))
        lexicon = make_lexicon(lexicon_seed_of(folder))
        trained = {unit.value for unit in lexicon if unit.split == "train"}
        frames = list(load_runs(name, root).values())
        parts = [verdict.select_subset(frame, "source_only_held_value") for frame in frames]
        part = pd.concat(parts, ignore_index=True)
        said, wrong = pd.Series(said_values(part), dtype=float), ~part["bridged_correct"]
        share = pooled_accuracy(frames, "source_only_held_value")
        row = {"label": f"{producer} x {injector}, {direction}", "n": share.n, "n_units": share.n_clusters,
               "right": share.point, "low": share.low, "high": share.high}  # fmt: skip
        for digit, same in (("tens", said // 10 == part["value"] // 10), ("ones", said % 10 == part["value"] % 10)):
            found = clustered_proportion(same, part["unit"])
            row |= {f"{digit}_right": found.point, f"{digit}_low": found.low, f"{digit}_high": found.high}
        rows.append(row | {"n_wrong": int(wrong.sum()), "trained_value": said[wrong].isin(trained).mean()})
    return pd.DataFrame(rows)


def read_values(root: Path = ROOT) -> pd.DataFrame:
    """Accuracy on problems about held-out units, by whether their value was taken out of the training.

    A row for each composition and kind of value: with all values in training, without half of them (`all_values`,
    `half_values` with _low and _high), and the paired difference.
    """
    rows = []
    for label, name in INTERVENED.items():
        folder = next(iter(run_folders(f"{name}_values", root).values()))
        trained = [u for u in make_lexicon(lexicon_seed_of(folder)) if u.split == "train"]
        share = read_run_config(folder).task.train_values_share
        taught = {u.value for u in pick_train_units(trained, 1.0, share)}
        arms = [list(load_runs(f"{name}_{arm}", root).values()) for arm in ("units", "values")]
        for kind in ("taken out", "left in"):
            parts = [[f[f["value"].isin(taught) == (kind == "left in")] for f in frames] for frames in arms]
            row = {"label": label, "kind": kind}
            for arm, frames in zip(("all_values", "half_values"), parts, strict=True):
                found = pooled_accuracy(frames, "source_only_held_unit")
                row |= {arm: found.point, f"{arm}_low": found.low, f"{arm}_high": found.high}
            change = pooled_difference(parts[1], parts[0], "source_only_held_unit")
            row |= {
                "difference": change["difference"],
                "difference_low": change["low"],
                "difference_high": change["high"],
            }
            rows.append(row | {"n": change["n"], "n_units": change["n_units"]})
    return pd.DataFrame(rows)


def passing_compositions(table: pd.DataFrame, least: float = 0.95) -> list[str]:
    """Those that pass the claim rule in both directions, with at least `least` on the mix in every seed."""
    good = table[(table["outcome"] == "transfers") & (table["least_mix"] >= least)]
    directions = good.groupby(["producer", "injector"], sort=False)["direction"].nunique()
    return [f"{producer} x {injector}" for (producer, injector), n in directions.items() if n == 2]


def format_compositions(table: pd.DataFrame, style: str = "markdown") -> str:
    """The main table of the paper: the bridge by group, its controls and its rivals on the mix, the claim rule."""
    head = ["composition", *(f"{SUBSET_LABELS.get(g, g)}" for g in GROUPS_SHOWN)]
    head += [LABELS[c] for c in SHOWN] + ["claim rule"]
    body = []
    for row in table.to_dict("records"):
        cells = [f"{row[g]:.3f} [{row[f'{g}_low']:.3f}, {row[f'{g}_high']:.3f}]" for g in GROUPS_SHOWN]
        others = [f"{row[c]:.3f}" if row.get(c) == row.get(c) else "" for c in SHOWN]
        body.append([f"{row['producer']} x {row['injector']}, {row['direction']}", *cells, *others, row["outcome"]])
    return format_rows(head, body, style)


def read_series(series: dict[str, str], subset: str = "source_only_held_unit", root: Path = ROOT) -> pd.DataFrame:
    """Accuracy on held-out source-only problems of runs on the embedded pair, a row for each seed."""
    rows = []
    for label, name in series.items():
        for seed, frame in load_runs(name, root).items():
            part = verdict.select_subset(frame, subset)
            share = clustered_proportion(part["bridged_correct"], part["unit"])
            rows.append(
                {"step_label": label, "seed": seed, "recovery": share.point, "low": share.low, "high": share.high,
                 "target": part["target_correct"].mean(), "target_told": part["target_told_correct"].mean(),
                 "mix": verdict.select_subset(frame)["bridged_correct"].mean(), "n": len(part)}
            )  # fmt: skip
    return pd.DataFrame(rows)
