"""What several runs show together: a study's differences, its axes, the bits of a message, the plan's rule.

    answers = load_answers(folder)                              # of all runs of a study, by variant and seed
    compared = compare_variants(answers, reference="base")      # Holm over the table, and the smallest effect
    table = gains_table(answers, compared, load_costs(runs))    # of texts, for a paper: write_table(table, "table")
    along = axis_table(answers, {variant: axis_settings(config) for variant, config in configs.items()})

Everything is computed from the table of answers (`table.load_answers`); no number is stored here.
"""

import math
from collections import namedtuple
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtr, stdtrit

from bridgekit.config import Config, to_flat
from bridgekit.keys import REAL
from bridgekit.results import statistics as stats
from bridgekit.results import style, table, verdict
from bridgekit.results.statistics import Interval
from bridgekit.runs import load_json, write_text_atomic
from bridgekit.tasks import Example
from bridgekit.tasks.units import GROUP_SHARES, N_UNITS, NARROW, SPLIT_SHARES, WIDE

SUBSETS = ("source_only_held_unit", "all")
POWER = 0.8
REPLICATE_SHIFT = 100  # between the seeds of a variant and those of its first replicate; of its second, twice that
AXES = {  # the figures of studies along an axis: {name: (the key that must vary, column of x, label of x)}
    "capacity": ("task.n_facts", "n_soft_tokens", "soft tokens in a message"),
    "generalisation": ("task.train_units_share", "train_units", "source-only units met in training"),
    "compression": ("bridge.n_soft_tokens", "n_soft_tokens", "soft tokens in a message"),
}


def find_subsets(answers: pd.DataFrame) -> list[str]:
    """Those that these answers have: of a real task nobody knows which problems one model alone can answer."""
    return [subset for subset in SUBSETS if len(table.select(answers, subset))]


def compare_variants(
    answers: pd.DataFrame, reference: str, replicates: Mapping[str, str] | None = None
) -> pd.DataFrame:
    """Bridged accuracy of each variant minus that of the reference, paired by problem and seed; a row for each subset.

    `adjusted_p` and `holds` are Holm's over the whole table, `smallest_effect` is what would have been found with power
    0.8 at the strictest of Holm's levels. `replicates` is {name: the variant it repeats}; their seeds are shifted by
    whole hundreds. A pair of which one run is missing is left out.
    """
    repeated = pd.Series(replicates or {}, dtype=object)
    shifts = REPLICATE_SHIFT * (1 + repeated.groupby(repeated).cumcount())
    bridged, rows = answers[answers["condition"] == "bridged"], []
    # so that a replicate meets its own pair
    bridged = bridged.assign(seed=bridged["seed"] - bridged["variant"].map(shifts).fillna(0).astype(int))
    seeds = {variant: set(cell["seed"]) for variant, cell in bridged.groupby("variant", sort=False)}
    paired = [v for v in seeds if v != reference and seeds[v] & seeds.get(reference, set())]
    for variant, subset in product(paired, find_subsets(bridged)):
        part = table.select(bridged, subset)
        found = table.difference(part, variant, reference, on="variant").to_dict("records")[0]
        one, other, units = table.pair_seeds(part, variant, reference, on="variant")
        pooled = stats.pooled_mean(one - other, units, lowest=-1.0)
        row = {"variant": variant, "reference": reference, "subset": subset} | found
        row |= {"by_seed": (one - other).mean(axis=0).tolist(), "deviation": pooled.error, "df": pooled.df}
        rows.append(row | {"replicates": repeated.get(variant, "")})
    compared = pd.DataFrame(rows)
    if rows:
        compared["adjusted_p"] = stats.holm(compared["p"].to_dict())
        compared["holds"] = compared["adjusted_p"] <= verdict.ALPHA
        quantiles = stdtrit(compared["df"], 1 - verdict.ALPHA / len(rows) / 2) + stdtrit(compared["df"], POWER)
        compared["smallest_effect"] = (quantiles * compared["deviation"]).clip(upper=1.0)
    return compared


def gains_table(answers: pd.DataFrame, compared: pd.DataFrame, costs: pd.DataFrame | None = None) -> pd.DataFrame:
    """The comparative gains as texts: a row for each variant; accuracy, difference and what could have been found.

    `costs` has a row for each variant with `parameters` and `seconds` (`load_costs`).
    """
    bridged = answers[answers["condition"] == "bridged"]
    gains = bridged.groupby("variant", sort=False)["seed"].nunique().rename("seeds").to_frame()
    if costs is not None:
        gains = gains.join(costs.set_index("variant").map(lambda cost: f"{cost:,.0f}" if cost == cost else ""))
    for subset in find_subsets(bridged):
        name, shares = style.words(subset).replace("\n", " "), table.share(table.select(bridged, subset), "variant")
        cells = compared[compared["subset"] == subset].set_index("variant")
        gains[f"{name} ({style.format_size(shares)})"] = shares.set_index("variant").apply(style.format_row, axis=1)
        changes = {c.Index: f"{style.format_row(c, signed=True)}, p {c.adjusted_p:.2g}" for c in cells.itertuples()}
        gains[f"difference, {name}"] = pd.Series(dict.fromkeys(cells["reference"], "reference") | changes, dtype=object)
        gains[f"could be found from, {name}"] = cells["smallest_effect"].map(style.format_share)
        again = {c.Index: f"{c.Index} (replicate of {c.replicates})" for c in cells.itertuples() if c.replicates}
    return gains.rename(again).rename_axis("variant").reset_index()


def load_costs(runs: dict[str, Sequence[str | Path]]) -> pd.DataFrame:
    """Trained parameters of each variant of {variant: run folders}, and the mean seconds that its steps took.

    A module that is switched off is gone from the count. Seconds depend on what else ran on the same device.
    """
    rows = []
    for variant, folders in runs.items():
        seconds = [load_json(Path(folder) / "timing.json").get("train bridged", math.nan) for folder in folders]
        parameters = load_json(Path(folders[-1]) / "status.json").get("parameters", math.nan)
        rows.append({"variant": variant, "parameters": parameters, "seconds": float(np.mean(seconds))})
    return pd.DataFrame(rows)


def write_table(frame: pd.DataFrame, path_without_suffix: str | Path) -> None:
    """A table of texts as Markdown and as LaTeX, ready for a paper."""
    base = Path(path_without_suffix)
    base.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomic(base.with_name(f"{base.name}.md"), style.markdown(frame))
    write_text_atomic(base.with_name(f"{base.name}.tex"), style.latex(frame))


# ---- a study along an axis ------------------------------------------------------------------------------------------


def swept_axis(configs: Iterable[Config]) -> str:
    """Which figure these configurations make: capacity, generalisation or compression; empty if they lie on no axis.

    Nor do those of a real task, where nobody knows what the target would answer if it were told."""
    flats = [to_flat(config) for config in configs]
    if any(flat["task.task"] in REAL for flat in flats):
        return ""
    varied = {key for flat in flats for key in flat if flat[key] != flats[0][key] and not key.startswith("run.")}
    keys = {key: name for name, (key, *_) in AXES.items()}
    found = [name for key, name in keys.items() if key in varied]
    return found[0] if found and varied <= {*keys, "bridge.producer"} else ""


def axis_settings(config: Config) -> dict:
    """Where a configuration lies on the axes; n_facts where the source has the facts in its context."""
    group = "source_only" if config.pair.direction == "forward" else "target_only"
    n_units = round(N_UNITS * GROUP_SHARES[group] * SPLIT_SHARES["train"])  # that the source alone knows
    settings = {"producer": config.bridge.producer, "n_soft_tokens": config.bridge.n_soft_tokens}
    settings["train_units"] = max(1, round(n_units * config.task.train_units_share))
    if config.task.variant == "context":
        settings |= {"n_facts": config.task.n_facts, "source_view": config.bridge.source_view}
    return settings


def axis_table(answers: pd.DataFrame, settings: dict[str, dict], tests: dict[str, list[Example]]) -> pd.DataFrame:
    """A row for each run: what it was, and the share of what the target gets right when told that it recovers.

    Where the settings have n_facts: the bits of its message (all, and per soft token), and how many answers name some
    value of it, by the facts of the variant's `tests` (a message may bring the values and not which word has which).
    """
    rows = []
    for (variant, seed), run in answers.groupby(["variant", "seed"], sort=False):
        recovered = table.ratio(table.select(run, "source_only_held_unit"), "bridged", "target_told")
        row = {"variant": variant, "seed": seed} | settings[variant] | recovered.to_dict("records")[0]
        if "n_facts" in row:
            part = table.select(run[run["condition"] == "bridged"], "source_only")
            values = next(kind.all for kind in (NARROW, WIDE) if set(part["value"]) <= set(kind.all))
            bits = carried_bits(part["value"], part["said"], values, part["unit"])
            # a message made from the facts alone, before the question, must hold each of them
            times, k = row["n_facts"] if row["source_view"] == "facts" else 1, row["n_soft_tokens"]
            row |= _prefixed("bits", bits, times) | _prefixed("bits_per_token", bits, times / k)
            stated = {example.id: {value for _, value in example.fact_pairs} for example in tests[variant]}
            named = [value in stated[i] for i, value in zip(part["id"], part["said"], strict=True)]
            row |= _prefixed("in_message", stats.clustered_proportion(named, part["unit"]))
        rows.append(row)
    return pd.DataFrame(rows)


def _prefixed(name: str, found: Interval, times: float = 1.0) -> dict:
    return {name: times * found.point, f"{name}_low": times * found.low, f"{name}_high": times * found.high}


# ---- bits of a message ----------------------------------------------------------------------------------------------

FOLDS = 10
SMOOTHING = 0.1  # of an answer, added to each distance


def carried_bits(
    values: Sequence[int], said: Sequence[float | None], alphabet: Sequence[int], units: Sequence | None = None
) -> Interval:
    """Bits of the true value that an answer carries, a lower bound; interval over units.

    `values` must have been drawn uniformly from `alphabet`; an answer that names no value carries none. The estimator
    is a cross-fitted lower bound on the mutual information of true and said value (Barber and Agakov 2003): the mean of
    log2 q(true | said) / p(true), with q fitted on nine tenths of the units and scored on the last, ten times: how much
    more often than by chance a said value lies d beside the true one. A plug-in estimate counts noise as information:
    of 2,000 answers that have nothing to do with the truth it says 0.91 bits, this one -0.04 (of perfect ones 5.58).
    """
    true, alphabet = np.asarray(values, dtype=int), np.asarray(sorted(alphabet), dtype=int)
    if not np.isin(true, alphabet).all():
        raise ValueError(f"bits: value {true[~np.isin(true, alphabet)][0]} is not in the alphabet it was drawn from")
    named, width = pd.Series(list(said), dtype=float), int(alphabet[-1] - alphabet[0])
    answered, codes = named.notna().to_numpy(), stats.cluster_codes(units, len(true))
    # beyond the alphabet's own width all said values are equally far off
    guess = named.fillna(alphabet[0]).clip(alphabet[0] - width - 1, alphabet[-1] + width + 1).to_numpy().astype(int)
    n_distances = 4 * width + 3
    distance = true - guess + 2 * width + 1  # as an index from 0: how far the true value lies from the said one
    distances = alphabet - guess[:, None] + 2 * width + 1  # (answers, values): and how far each other one
    fold = np.random.default_rng(0).permutation(int(codes.max()) + 1)[codes] % FOLDS
    scores = np.zeros(len(true))  # log2 q(true | said) / p(true)
    for f in range(min(FOLDS, int(codes.max()) + 1)):
        fit, test = answered & (fold != f), answered & (fold == f)
        by_chance = np.bincount(distances[fit].ravel(), minlength=n_distances) / len(alphabet)
        lift = (np.bincount(distance[fit], minlength=n_distances) + SMOOTHING) / (by_chance + SMOOTHING)
        scores[test] = np.log2(len(alphabet) * lift[distance[test]] / lift[distances[test]].sum(axis=1))
    return stats.clustered_mean(scores, codes)


# ---- the plan's decision rule ---------------------------------------------------------------------------------------

BRANCHES = {  # branch: (lowest accuracy in percent, the variants that are due)
    "go on": (70, ()),
    "B and C": (65, ("B", "C")),
    "A, B and C": (0, ("A", "B", "C")),
}
Decision = namedtuple("Decision", "accuracy target branch variants replicate differs")


def decide(frame: pd.DataFrame) -> Decision:
    """Which ablations the plan's rule asks for after one Phase 1 run, from its final evaluation, and how firm that is.

    The rule looks at the final bridged `accuracy` alone: 0.70 and above goes on, from 0.65 the `variants` B and C are
    due, below it A, B and C. `replicate` is the probability of each branch for a replicate, whose number of right
    answers is as uncertain as this one's; `differs` is that of another branch than this one.
    """
    rows = verdict.held_out(frame)
    correct, units = stats.read_correct(rows, "bridged"), rows.get("unit")
    right, n = int(correct.sum()), len(correct)
    # the smallest count that reaches each branch, in whole numbers: 130 of 200 is 0.65, and no rounding moves an edge
    lowest = np.array([-(-percent * n // 100) for percent, _ in BRANCHES.values()])
    branch = list(BRANCHES)[int((right < lowest).sum())]
    # normal, with the variance of both draws of problems; counts are whole, so an edge lies half an answer below it
    error = 2**0.5 * stats.pooled_mean(correct[:, None].astype(float), units).error
    reached = np.where(lowest > 0, ndtr((right - lowest + 0.5) / n / error), 1.0)
    chances = dict(zip(BRANCHES, np.diff(reached, prepend=0.0).tolist(), strict=True))
    target = float(stats.read_correct(rows, "target").mean())
    accuracy = stats.clustered_proportion(correct, units)
    return Decision(accuracy, target, branch, BRANCHES[branch][1], chances, 1 - chances[branch])


def due_variants(names: Sequence[str], decision: Decision | None) -> list[str]:
    """Which of a study's variants to run: of the plan's A, B and C only those that its rule asks for."""
    letters = BRANCHES["A, B and C"][1]
    due = [name for name in names if decision is None or name not in letters or name in decision.variants]
    return due if len(due) > 1 else []
