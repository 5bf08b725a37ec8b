"""The headline runs as tables: recovery per seed and lexicon, the repaired faults, what made the difference.

    frame = read_recovery()       # from preserved_data/headline_*, made by `bridgekit sweep parameters/headline.yaml`

Everything is recomputed from the preserved evaluation JSONL; no number is kept here.
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from bridgekit import verdict
from bridgekit.runs import find_eval, load_eval
from bridgekit.stats import clustered_proportion

ROOT = Path("preserved_data")
SEEDS = (1, 2, 3)
LEXICONS = {"lexicon 1": "", "lexicon 2": "_lex2", "lexicon 3": "_lex3"}
HELD = {
    "held-out units": "source_only_held_unit",
    "held-out values": "source_only_held_value",
    "both": "source_only",
}
FAULTS = {  # each run repairs one fault more than the one above it
    "the seeds' design": "fault0_seeds",
    "+ literal prompt in training": "fault1_prompt",
    "+ own samples, all losses live": "fault2_sampling",
    "+ attends to every state": "fault3_attend",
    "+ predicts tokens": "fault4_tokens",
    "+ answer likelihood alone": "fault5_nll",
    "+ source-rich mix, state dropout": "dit",
}
DIFFERENCES = {  # the working DiT with one thing taken back
    "working DiT": "dit",
    "predicts velocity": "dit_velocity",
    "lower source layers too (2, 3, 5)": "dit_low_layers",
    "no state dropout": "dit_no_dropout",
    "15% of the training units": "dit_few_units",
}


def load_run(name: str, seed: int = 1, root: Path = ROOT) -> pd.DataFrame:
    return load_eval(find_eval(root / f"headline_{name}_seed{seed}"))


def each_run(root: Path = ROOT) -> Iterator[tuple[str, str, int, pd.DataFrame]]:
    """(lexicon, producer, seed, frame) of the runs with all controls."""
    for lexicon, suffix in LEXICONS.items():
        for producer in ("resampler", "dit"):
            for seed in SEEDS:
                yield lexicon, producer, seed, load_run(producer + suffix, seed, root)


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


def read_verdicts(root: Path = ROOT) -> pd.DataFrame:
    """The claim rule over three training seeds, for each producer and lexicon."""
    frames: dict[tuple[str, str], list[pd.DataFrame]] = {}
    for lexicon, producer, _, frame in each_run(root):
        frames.setdefault((lexicon, producer), []).append(frame)
    rows = []
    for (lexicon, producer), some in frames.items():
        judged = verdict.judge(some, seeds=list(SEEDS))
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


def read_series(series: dict[str, str], subset: str = "source_only_held_unit", root: Path = ROOT) -> pd.DataFrame:
    """Accuracy on held-out source-only problems of single-seed runs on lexicon 1, for `plot_faults`."""
    rows = []
    for label, name in series.items():
        frame = load_run(name, 1, root)
        part = verdict.select_subset(frame, subset)
        share = clustered_proportion(part["bridged_correct"], part["unit"])
        rows.append(
            {"step_label": label, "recovery": share.point, "low": share.low, "high": share.high,
             "target": part["target_correct"].mean(), "target_told": part["target_told_correct"].mean(),
             "mix": verdict.select_subset(frame)["bridged_correct"].mean(), "n": len(part)}
        )  # fmt: skip
    return pd.DataFrame(rows)
