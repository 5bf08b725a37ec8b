"""When may a run say that the bridge transfers? The claim rule, its controls and its numbers in words.

    print(headroom(frame).text)                      # before training; needs `source` and `target` alone
    verdict = judge([frame_1, frame_2, frame_3])     # one final evaluation for each training seed
    verdict.text, verdict.table()                    # the claim in two sentences with its details; a row per control
    conditions_table(frame)                          # what the bars and the table are drawn from

The rule: bridged beats `target`, `shuffled`, each selection of the trained controls `constant` and `self_bridge` (best
on the mix, best on source-only problems, last weights), each with a paired interval over units above zero in every
training seed, and on the source-only problems `shuffled` and the constants once more; and each comparison's largest p
survives Holm. A control whose weights are known to be from before half of the training counts as not run. Rivals stand
beside the rule. Problems about units that the bridge was trained on (novelty `seen`) count nowhere in it, because their
answers can be memorised; they have a row of their own in the table.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd

from bridgekit.config import CONDITIONS
from bridgekit.results import statistics as stats
from bridgekit.results import table
from bridgekit.results.statistics import Difference, Interval, paired_difference, read_correct
from bridgekit.results.table import SUBSETS
from bridgekit.runs import INVALID

RULE = {"all": ("target", "constant", "shuffled", "self_bridge"), "source_only": ("shuffled", "constant")}
RIVALS = ("target_told", "relay_full", "relay_cut", "relay_answer", "router", "union")
SELECTIONS = {"source_only": "best on source-only validation", "last": "last weights"}  # beside the best on the mix
TABLE_COLUMNS = ("condition", "subset", "n", "n_units", "accuracy", "low", "high", "invalid")
TELLING = 5  # equal wrong answers that show two frames to be one run; fewer may be chance


@dataclass(frozen=True)
class Headroom:
    """What a perfect bridge could gain over the target, and what this many problems can show."""

    n: int
    n_units: int
    source: Interval
    target: Interval
    union: Interval
    counts: dict[str, int]  # problems right for source_only, both, target_only, neither
    gain_possible: float  # union minus target
    smallest_effect: float  # found with power 0.8, at the two models' own discordance and correlation
    text: str


@dataclass(frozen=True)
class Comparison:
    seed: int
    control: str
    subset: str
    difference: Difference  # bridged minus control
    adjusted_p: float  # Holm over the comparisons of the rule, each with its largest p of all seeds
    holds: bool
    step: int | None = None  # of the control's weights, where the run recorded it

    @property
    def label(self) -> str:
        return describe_control(self.control) + ("" if self.subset == "all" else " on source-only problems")


@dataclass(frozen=True)
class Verdict:
    passes: bool  # the rule holds and nothing of it was left out
    complete: bool  # every control was run in every seed
    outcome: str  # transfers | unproven | fails | harms
    comparisons: list[Comparison]
    not_run: list[str]
    not_applicable: list[str]
    failed: list[Comparison]
    rivals: dict[str, list[Difference]]  # bridged minus rival, one for each seed
    exact: list[Interval | None]  # share right where neither source nor target was, for each seed
    seeds: list[int]
    text: str

    def to_dict(self) -> dict:
        return asdict(self)

    def differences(self) -> pd.DataFrame:
        """A row for each comparison: label seed subset control step point low high n n_units p adjusted_p holds ..."""
        seeds = {c.seed: f", seed {c.seed}" if len(self.seeds) > 1 else "" for c in self.comparisons}
        rows = [{"label": c.label + seeds[c.seed]} | vars(c) | vars(c.difference) for c in self.comparisons]
        return pd.DataFrame(rows).rename(columns={"difference": "point", "n_clusters": "n_units"})

    def table(self) -> pd.DataFrame:
        """A short table of texts: a row for each control, with the seed in which its interval begins lowest."""
        rows = []
        for worst, seeds in _by_cell(self.comparisons):
            steps = _steps(seeds) or "\N{EN DASH}"
            holds = "yes" if all(c.holds for c in seeds) else "no"
            rows.append((worst.label, steps, str(worst.difference), f"{worst.adjusted_p:.2g}", holds))
        rows += [(name, *["\N{EN DASH}"] * 3, "not run") for name in self.not_run]
        head = ("control", "weights from step", "bridged minus control", "p after Holm", "holds")
        return pd.DataFrame(rows, columns=head)


def describe_control(name: str) -> str:
    """A control in words: `constant.last` is the constant with its last weights."""
    control, _, selection = name.partition(".")
    return f"{control}, {SELECTIONS.get(selection, selection)}" if selection else control


def headroom(frame: pd.DataFrame, level: float = 0.95) -> Headroom:
    """How much room there is for transfer, from the source's and the target's own answers alone."""
    rows = select_subset(frame)
    source, target = read_correct(rows, "source"), read_correct(rows, "target")
    shares = {c: _accuracy(rows, c, level) for c in ("source", "target", "union")}
    n, n_units = len(rows), shares["target"].n_clusters
    masks = {"source_only": source & ~target, "both": source & target, "target_only": target & ~source}
    counts = {name: int(mask.sum()) for name, mask in (masks | {"neither": ~source & ~target}).items()}
    # with no discordant pair the rule of three says how many there may still be
    discordance = max(counts["source_only"] + counts["target_only"], min(3, n)) / n
    icc = stats.intraclass_correlation(source.astype(float) - target, rows.get("unit"))
    effect = stats.minimum_detectable_effect(n, discordance, n_units, icc, alpha=1 - level)
    gain = counts["source_only"] / n
    hope = "" if effect <= gain else ": more than there is, so that no bridge could be shown to help here"
    text = (
        f"{_size(n, n_units)}: source {shares['source']}, target {shares['target']}, "
        f"either {shares['union']}. The source alone is right on {counts['source_only']:,}, so a "
        f"bridge that loses nothing can gain {gain:+.3f}. The smallest gain this set finds with power 0.8 "
        f"is {effect:+.3f}{hope}."
    )
    return Headroom(n, n_units, **shares, counts=counts, gain_possible=gain, smallest_effect=effect, text=text)


def recovery(
    frame: pd.DataFrame, condition: str = "bridged", subset: str = "source_only", ceiling: str = "target_told"
) -> Interval:
    """What `condition` has right as a share of what the ceiling has right on the same held-out problems."""
    return stats.paired_ratio(select_subset(frame, subset), condition, ceiling)


def donor_follow(frame: pd.DataFrame, subset: str = "all", level: float = 0.95) -> Interval:
    """How often the `shuffled` answer is the one that would be right if the donor's fact were true."""
    rows = select_subset(frame, subset)
    for column in ("shuffled_extracted", "donor_gold"):
        if column not in rows or rows[column].isna().all():
            raise ValueError(f"no `{column}` in the evaluation: the condition `shuffled` was not run")
    rows = rows[rows["donor_gold"].notna()]
    follows = rows["shuffled_extracted"].map(_as_text) == rows["donor_gold"].map(_as_text)
    return stats.clustered_proportion(follows, rows.get("unit"), level)


def conditions_table(frame: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """Accuracy, interval, invalid share, n and n_units of every condition on every subset that is there."""
    rows = []
    for subset in SUBSETS:
        part = select_subset(frame, subset, allow_empty=True)
        for condition in CONDITIONS if len(part) else ():
            if f"{condition}_correct" in part:
                share = _accuracy(part, condition, level)
                text = part.get(f"{condition}_extracted")  # computed conditions have none
                invalid = float("nan") if text is None else float((text == INVALID).mean())
                row = (condition, subset, share.n, share.n_clusters, share.point, share.low, share.high, invalid)
                rows.append(dict(zip(TABLE_COLUMNS, row, strict=True)))
    if not rows:
        raise ValueError("nothing to tabulate: no `<condition>_correct` column, or only seen units")
    return pd.DataFrame(rows)


def judge(
    frames: Sequence[pd.DataFrame], *, seeds: list[int] | None = None, steps: int | None = None, level: float = 0.95
) -> Verdict:
    """The claim rule on one final evaluation frame for each training seed.

    Without `seeds`, those that the frames name (`attrs["seed"]`), else 1, 2, ... `steps` is how long the bridge was
    trained, where the frames do not say it (`attrs["steps"]`).
    """
    if seeds is None:
        seeds = [frame.attrs.get("seed", i) for i, frame in enumerate(frames, start=1)]
    if not seeds or len(seeds) != len(frames) or len(set(seeds)) != len(seeds):
        raise ValueError(f"judge: {len(frames)} frames, seeds {list(seeds)}: give one frame for each distinct seed")
    _check_distinct(frames)
    parts = {}
    for seed, frame in zip(seeds, frames, strict=True):
        parts[seed] = select_subset(frame)
        parts[seed].attrs = {"steps": steps} | frame.attrs
    shares = [_accuracy(rows, "bridged", level) for rows in parts.values()]
    cells, not_run = _compare(parts, "all", level)
    source_only_cells, left_out, not_applicable = _compare_source_only(parts, level)
    comparisons, not_run = _adjust(cells | source_only_cells, parts, 1 - level), not_run + left_out
    failed = [c for c in comparisons if not c.holds]
    harms = any(c.control == "target" and c.difference.high < 0 for c in comparisons)
    outcome = "harms" if harms else "fails" if failed else "unproven" if not_run else "transfers"
    rivals = {
        rival: [paired_difference(rows, "bridged", rival, level=level) for rows in parts.values()]
        for rival in RIVALS
        if all(f"{rival}_correct" in rows for rows in parts.values())
    }
    exact = [_exact(rows, level) for rows in parts.values()]
    found = (outcome == "transfers", not not_run, outcome, comparisons, not_run, not_applicable, failed, rivals, exact)
    verdict = Verdict(*found, seeds=list(seeds), text="")
    return replace(verdict, text=_describe(verdict, shares, level))


def _check_distinct(frames: Sequence[pd.DataFrame]) -> None:
    """Refuse a run that is given twice: equal log-probabilities, or without them equal answers, some of them wrong."""
    fingerprints = []
    for frame in frames:
        rows = frame.sort_values("id") if "id" in frame else frame
        answers = [c for c in rows if c.endswith(("_logprob", "_extracted", "_correct", "_said"))]
        if "bridged_logprob" in rows:
            answers = ["bridged_logprob"]
        elif "bridged_correct" not in rows or (~rows["bridged_correct"].astype(bool)).sum() < TELLING:
            continue
        fingerprints.append(rows[["id", *answers] if "id" in rows else answers].astype(str).to_csv(index=False))
    if len(set(fingerprints)) < len(fingerprints):
        raise ValueError("judge: two frames are the same run (equal answers or log-probabilities); give one per seed")


def select_subset(frame: pd.DataFrame, subset: str = "all", allow_empty: bool = False) -> pd.DataFrame:
    """The rows of one of SUBSETS, `union_correct` added; held-out problems unless it names the seen ones."""
    if frame.empty:
        raise ValueError("the evaluation has no rows: nothing to judge")
    for key in ("id", "index"):
        if key in frame and len(twice := frame[key][frame[key].duplicated()]):
            raise ValueError(f"{key} {twice.iloc[0]} occurs twice: give one evaluation step of one run")
    rows = table.select(frame, subset)
    if rows.empty and not allow_empty:
        raise ValueError(f"no held-out problem in subset `{subset}`: all rows are seen units or other groups")
    if "union_correct" not in rows and len(rows) and {"source_correct", "target_correct"} <= set(rows):
        rows = rows.assign(union_correct=read_correct(rows, "source") | read_correct(rows, "target"))
    return rows


def _compare(parts: dict[int, pd.DataFrame], subset: str, level: float) -> tuple[dict, list[str]]:
    """Differences by (subset, control) and seed, and the controls that were not run, or not trained, in every seed."""
    cells, not_run = {}, []
    for control in (*RULE[subset], "constant_natural"):
        names = [control, *(f"{control}.{selection}" for selection in SELECTIONS)]
        ran = [s for s, rows in parts.items() if any(f"{name}_correct" in rows for name in names)]
        for name in names:
            for seed, rows in parts.items():
                if f"{name}_correct" in rows and _is_untrained(rows, name):
                    step, where = _step_of(rows, name), f", seed {seed}" if len(parts) > 1 else ""
                    not_run.append(f"{describe_control(name)} (not trained: weights of step {step:,}{where})")
                elif f"{name}_correct" in rows:
                    found = paired_difference(rows, "bridged", name, level=level)
                    cells.setdefault((subset, name), {})[seed] = found
        # a bridge trained on the natural mix has one constant, not two: the second is never missed
        if len(ran) < len(parts) and (ran or control in RULE[subset]):
            missing = ", ".join(str(seed) for seed in parts if seed not in ran)
            not_run.append(control + (f" (seed {missing})" if ran else ""))
    return cells, not_run


def _step_of(rows: pd.DataFrame, name: str) -> int | None:
    """The step that a trained control's weights come from, where the run recorded it."""
    control, _, selection = name.partition(".")
    return rows.attrs.get("controls", {}).get(control, {}).get(selection or "mix")


def _is_untrained(rows: pd.DataFrame, name: str) -> bool:
    """Whether the record says that the weights are from before half of the bridge's training."""
    step, steps = _step_of(rows, name), rows.attrs.get("steps")
    return step is not None and (step == 0 or (steps is not None and 2 * step < steps))


def _compare_source_only(parts: dict[int, pd.DataFrame], level: float) -> tuple[dict, list[str], list[str]]:
    """The same on the source-only problems, what was left out of it, and whether it applies at all.

    Its controls are those of the whole set: one that was not run is named there already.
    """
    grouped = [s for s, rows in parts.items() if "group" in rows and rows["group"].notna().any()]
    if not grouped:
        return {}, [], ["the source-only part (this task has no knowledge groups)"]
    only = {s: select_subset(parts[s], "source_only", allow_empty=True) for s in grouped}
    few = [s for s, rows in only.items() if _n_units(rows) < 2]
    left_out = [f"the source-only part (no knowledge groups in seed {s})" for s in parts if s not in grouped]
    if few:
        where = f" in seed {', '.join(map(str, few))}" if len(few) < len(parts) else ""
        left_out.append(f"the source-only part (fewer than two held-out units{where})")
    only = {s: rows for s, rows in only.items() if s not in few}
    return _compare(only, "source_only", level)[0], left_out, []


def _adjust(cells: dict, parts: dict[int, pd.DataFrame], alpha: float) -> list[Comparison]:
    """A comparison holds if its interval lies above zero and its cell's largest p survives Holm.

    Where it does not survive, only the seed with that largest p fails.
    """
    largest = {cell: max(d.p for d in by_seed.values()) for cell, by_seed in cells.items()}
    adjusted, comparisons = stats.holm(largest), []
    for cell, by_seed in cells.items():
        for seed, d in by_seed.items():
            holds = d.low > 0 and (adjusted[cell] <= alpha or d.p < largest[cell])
            step = _step_of(parts[seed], cell[1])
            comparisons.append(Comparison(seed, cell[1], cell[0], d, adjusted[cell], bool(holds), step))
    return comparisons


def _exact(rows: pd.DataFrame, level: float) -> Interval | None:
    if "union_correct" not in rows or rows["union_correct"].all():
        return None
    return _accuracy(rows[~rows["union_correct"].astype(bool)], "bridged", level)


def _accuracy(rows: pd.DataFrame, condition: str, level: float) -> Interval:
    return stats.clustered_proportion(read_correct(rows, condition), rows.get("unit"), level)


def _n_units(rows: pd.DataFrame) -> int:
    return rows["unit"].nunique() + int(rows["unit"].isna().sum()) if "unit" in rows else len(rows)


def _as_text(answer) -> str:
    """135 and 135.0 are one answer: a column with nulls turns its integers into floats."""
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _by_cell(comparisons: list[Comparison]) -> list[tuple[Comparison, list[Comparison]]]:
    """For each subset and control: the comparison whose interval begins lowest, and those of all seeds."""
    cells: dict[tuple, list[Comparison]] = {}
    for c in comparisons:
        cells.setdefault((c.subset, c.control), []).append(c)
    return [(min(seeds, key=lambda c: c.difference.low), seeds) for seeds in cells.values()]


def _steps(comparisons: list[Comparison]) -> str:
    return ", ".join(f"{step:,}" for step in sorted({c.step for c in comparisons} - {None}))


def _describe(verdict: Verdict, shares: list[Interval], level: float) -> str:
    """Two sentences for the claim and the accuracy, then the details: each control, what was not run, who else wins."""
    n_seeds, not_run = len(verdict.seeds), ", ".join(verdict.not_run)
    seeds = f"each of {n_seeds} training seeds" if n_seeds > 1 else "its one training seed"
    ran = f"it beats every control that was run, in {seeds}" if verdict.comparisons else "no control was run"
    lost = [c for c in verdict.comparisons if c.control == "target" and c.difference.high < 0]
    accuracy = shares[0] if n_seeds == 1 else f"{_points(shares)} in seeds {verdict.seeds}"
    sizes = " / ".join(dict.fromkeys(_size(share.n, share.n_clusters) for share in shares))
    claims = {
        "transfers": f"The bridge transfers: it beats every control in {seeds}.",
        "unproven": f"It is not yet proven that the bridge transfers: {ran}, but not run: {not_run}.",
        "fails": "It does not hold that the bridge transfers.",
        "harms": f"The bridge harms: it is worse than the target alone ({_seeds(lost)}).",
    }
    lines = [claims[verdict.outcome], f"Bridged {accuracy} on {sizes} ({level:.0%} intervals)."]
    lines += _describe_differences(verdict, " in the worst seed" if n_seeds > 1 else "")
    if verdict.failed:
        cells = (f"{worst.label} ({_seeds(failed)})" for worst, failed in _by_cell(verdict.failed))
        lines.append(f"Not shown to beat {', '.join(cells)}.")
    if verdict.not_run and verdict.outcome != "unproven":
        lines.append(f"Not run: {not_run}.")
    if verdict.not_applicable:
        lines.append(f"Not applicable: {', '.join(verdict.not_applicable)}.")
    if beyond := [share for share in verdict.exact if share]:
        value = beyond[0] if len(beyond) == 1 else _points(beyond)
        lines.append(f"Where neither model was right ({beyond[0].n:,} problems), the bridge was on {value}.")
    if n_seeds < 3:
        lines.append(f"A headline needs three training seeds; this is {n_seeds}.")
    return " ".join(lines)


def _describe_differences(verdict: Verdict, worst_seed: str) -> list[str]:
    """Bridged minus each control, with the step of its weights, and who wins of bridge and rivals in every seed."""
    lines, parts = [], []
    for worst, seeds in _by_cell(verdict.comparisons):
        weights = f" (weights of step {_steps(seeds)})" if _steps(seeds) else ""
        parts.append(f"{worst.label}{weights} {worst.difference}")
    if parts:
        p = max(c.adjusted_p for c in verdict.comparisons)
        lines.append(f"Bridged minus control{worst_seed}: {'; '.join(parts)} (p after Holm at most {p:.2g}).")
    found: dict[str, list[str]] = {"these win": [], "the bridge beats": [], "undecided": []}
    for rival, by_seed in verdict.rivals.items():
        won, lost = all(d.high < 0 for d in by_seed), all(d.low > 0 for d in by_seed)
        name = f"{rival} {min(by_seed, key=lambda d: d.low)}"
        found["these win" if won else "the bridge beats" if lost else "undecided"].append(name)
    if parts := [f"{title}: {', '.join(names)}" for title, names in found.items() if names]:
        lines.append(f"Rivals beside the rule, bridged minus rival{worst_seed}: {'; '.join(parts)}.")
    return lines


def _seeds(comparisons: list[Comparison]) -> str:
    return ", ".join(
        f"seed {c.seed} {c.difference}" + (f" but p after Holm {c.adjusted_p:.2g}" if c.difference.low > 0 else "")
        for c in comparisons
    )


def _points(shares: list[Interval]) -> str:
    return " / ".join(f"{share.point:.3f}" for share in shares)


def _size(n: int, n_units: int) -> str:
    return f"{n:,} problems about {n_units:,} units" if n_units < n else f"{n:,} questions"
