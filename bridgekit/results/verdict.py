"""When may a run say that the bridge transfers? The claim rule, its controls and its numbers in words.

    print(headroom(frame).text)                    # before training; needs `source` and `target` alone
    print(judge([frame_1, frame_2, frame_3]).text)  # one final evaluation for each training seed
    conditions_table(frame)                        # what the bars and the table are drawn from

The rule: bridged beats `target`, `constant` (both, if there are two), `shuffled` and `self_bridge`, each with
a paired interval over units above zero in every training seed, and on the source-only problems `shuffled` and
`constant` once more; and each comparison's largest p survives Holm. Rivals stand beside the rule. Problems
about units the bridge was trained on (novelty `seen`) count nowhere in it, because their answers can be
memorised; they have a row of their own in the table.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd

from bridgekit.config import CONDITIONS, GROUPS
from bridgekit.results import statistics as stats
from bridgekit.results.statistics import Difference, Interval, paired_difference, read_correct
from bridgekit.tasks.answers import INVALID

RULE = {"all": ("target", "constant", "shuffled", "self_bridge"), "source_only": ("shuffled", "constant")}
RIVALS = ("target_told", "relay_full", "relay_cut", "relay_answer", "router", "union")
SOURCE_ONLY, TARGET_ONLY, BOTH = GROUPS
SUBSETS = {  # column: value; all but the seen ones are held-out problems
    "all": {},
    "source_only": {"group": SOURCE_ONLY},
    "source_only_seen": {"group": SOURCE_ONLY, "novelty": "seen"},
    "source_only_held_unit": {"group": SOURCE_ONLY, "novelty": "held_unit"},
    "source_only_held_value": {"group": SOURCE_ONLY, "novelty": "held_value"},
    "target_only": {"group": TARGET_ONLY},
    "both": {"group": BOTH},
}


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

    @property
    def n_source_only_right(self) -> int:
        return self.counts["source_only"]


@dataclass(frozen=True)
class Comparison:
    seed: int
    control: str
    subset: str
    difference: Difference  # bridged minus control
    adjusted_p: float  # Holm over the comparisons of the rule, each with its largest p of all seeds
    holds: bool

    @property
    def label(self) -> str:
        return self.control if self.subset == "all" else f"{self.control} on source-only problems"


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
        """One row for each comparison of the rule, as `plot_differences` wants it."""
        rows = []
        for c in self.comparisons:
            label = c.label + (f", seed {c.seed}" if len(self.seeds) > 1 else "")
            own = {"label": label, "seed": c.seed, "subset": c.subset, "holds": c.holds}
            rows.append(own | {"adjusted_p": c.adjusted_p} | asdict(c.difference))
        return pd.DataFrame(rows)


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
    return Headroom(n, n_units, **shares, counts=counts, gain_possible=gain, smallest_effect=effect,
                    text=text)  # fmt: skip


def recovery(frame: pd.DataFrame, condition: str = "bridged", subset: str = "source_only",
             ceiling: str = "target_told", level: float = 0.95) -> Interval:  # fmt: skip
    """What `condition` has right as a share of what the ceiling has right on the same held-out problems."""
    return stats.paired_ratio(select_subset(frame, subset), condition, ceiling, level=level)


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
                rows.append({
                    "condition": condition, "subset": subset, "n": share.n, "n_units": share.n_clusters,
                    "accuracy": share.point, "low": share.low, "high": share.high,
                    "invalid": float("nan") if text is None else float((text == INVALID).mean()),
                })  # fmt: skip
    if not rows:
        raise ValueError("nothing to tabulate: no `<condition>_correct` column, or only seen units")
    return pd.DataFrame(rows)


def judge(frames: Sequence[pd.DataFrame], *, seeds: list[int] | None = None, level: float = 0.95) -> Verdict:
    """The claim rule on one final evaluation frame for each training seed."""
    seeds = list(range(1, len(frames) + 1)) if seeds is None else list(seeds)
    if not seeds or len(seeds) != len(frames) or len(set(seeds)) != len(seeds):
        raise ValueError(f"judge: {len(frames)} frames, seeds {seeds}: give one frame for each distinct seed")
    runs = [frame["bridged_logprob"].tolist() for frame in frames if "bridged_logprob" in frame]
    if any(run in runs[:i] for i, run in enumerate(runs)):
        raise ValueError("judge: two frames are the same run (equal log-probabilities); give one per seed")
    parts = dict(zip(seeds, (select_subset(frame) for frame in frames), strict=True))
    shares = [_accuracy(rows, "bridged", level) for rows in parts.values()]
    cells, not_run = _compare(parts, "all", level)
    source_only_cells, left_out, not_applicable = _compare_source_only(parts, level)
    comparisons, not_run = _adjust(cells | source_only_cells, 1 - level), not_run + left_out
    failed = [c for c in comparisons if not c.holds]
    harms = any(c.control == "target" and c.difference.high < 0 for c in comparisons)
    outcome = "harms" if harms else "fails" if failed else "unproven" if not_run else "transfers"
    rivals = {
        rival: [paired_difference(rows, "bridged", rival, level=level) for rows in parts.values()]
        for rival in RIVALS
        if all(f"{rival}_correct" in rows for rows in parts.values())
    }
    exact = [_exact(rows, level) for rows in parts.values()]
    verdict = Verdict(outcome == "transfers", not not_run, outcome, comparisons, not_run, not_applicable,
                      failed, rivals, exact, seeds, text="")  # fmt: skip
    return replace(verdict, text=_describe(verdict, shares, level))


def select_subset(frame: pd.DataFrame, subset: str = "all", allow_empty: bool = False) -> pd.DataFrame:
    """The rows of one of SUBSETS, `union_correct` added; held-out problems unless it names the seen ones."""
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset `{subset}`; there are {', '.join(SUBSETS)}")
    if frame.empty:
        raise ValueError("the evaluation has no rows: nothing to judge")
    for key in ("id", "index"):
        if key in frame and len(twice := frame[key][frame[key].duplicated()]):
            raise ValueError(f"{key} {twice.iloc[0]} occurs twice: give one evaluation step of one run")
    wanted, keep = SUBSETS[subset], pd.Series(True, index=frame.index)
    if "novelty" in frame and "novelty" not in wanted:
        keep &= ~frame["novelty"].isin(["seen"])
    for column, value in wanted.items():
        keep &= frame[column].isin([value]) if column in frame else False
    rows = frame[keep]
    if rows.empty and not allow_empty:
        raise ValueError(f"no held-out problem in subset `{subset}`: all rows are seen units or other groups")
    if "union_correct" not in rows and len(rows) and {"source_correct", "target_correct"} <= set(rows):
        rows = rows.assign(union_correct=read_correct(rows, "source") | read_correct(rows, "target"))
    return rows


def _compare(parts: dict[int, pd.DataFrame], subset: str, level: float) -> tuple[dict, list[str]]:
    """Differences by (subset, control) and seed, and the controls that were not run in every seed."""
    cells, not_run = {}, []
    for control in (*RULE[subset], "constant_natural"):
        ran = [seed for seed, rows in parts.items() if f"{control}_correct" in rows]
        if ran:
            by_seed = {s: paired_difference(parts[s], "bridged", control, level=level) for s in ran}
            cells[subset, control] = by_seed
        # a bridge trained on the natural mix has one constant, not two: the second is never missed
        if len(ran) < len(parts) and (ran or control in RULE[subset]):
            missing = ", ".join(str(seed) for seed in parts if seed not in ran)
            not_run.append(control + (f" (seed {missing})" if ran else ""))
    return cells, not_run


def _compare_source_only(parts: dict[int, pd.DataFrame], level: float) -> tuple[dict, list[str], list[str]]:
    """The same on the source-only problems, what was left out of it, and whether it applies at all.

    Its controls are those of the whole set: one that was not run is named there already.
    """
    if not all("group" in rows and rows["group"].notna().any() for rows in parts.values()):
        return {}, [], ["the source-only part (this task has no knowledge groups)"]
    parts = {s: select_subset(rows, "source_only", allow_empty=True) for s, rows in parts.items()}
    if min(_n_units(rows) for rows in parts.values()) < 2:
        return {}, ["the source-only part (fewer than two held-out units)"], []
    return _compare(parts, "source_only", level)[0], [], []


def _adjust(cells: dict, alpha: float) -> list[Comparison]:
    """A comparison holds if its interval lies above zero and its cell's largest p survives Holm."""
    largest = {cell: max(d.p for d in by_seed.values()) for cell, by_seed in cells.items()}
    adjusted = stats.holm(largest)
    return [
        Comparison(seed, control, subset, d, adjusted[subset, control],
                   bool(d.low > 0 and (adjusted[subset, control] <= alpha or d.p < largest[subset, control])))
        for (subset, control), by_seed in cells.items() for seed, d in by_seed.items()
    ]  # fmt: skip


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


def _describe(verdict: Verdict, shares: list[Interval], level: float) -> str:
    """The verdict in words: what holds, by how much in the worst seed, what was left out, who else wins."""
    n_seeds, not_run = len(verdict.seeds), ", ".join(verdict.not_run)
    seeds = f"each of {n_seeds} training seeds" if n_seeds > 1 else "its one training seed"
    lost = [c for c in verdict.comparisons if c.control == "target" and c.difference.high < 0]
    ran = f"It beats every control that was run, in {seeds}" if verdict.comparisons else "No control was run"
    sizes = " / ".join(dict.fromkeys(_size(share.n, share.n_clusters) for share in shares))
    accuracy = shares[0] if n_seeds == 1 else f"{_range(shares)} in seeds {verdict.seeds}"
    worst_seed = " in the worst seed" if n_seeds > 1 else ""
    lines = [
        {
            "transfers": f"The bridge transfers: it beats every control in {seeds}.",
            "unproven": f"Not yet a proof that the bridge transfers. {ran}; not run: {not_run}.",
            "fails": "It does not hold that the bridge transfers.",
            "harms": f"The bridge harms: it is worse than the target alone ({_seeds(lost)}).",
        }[verdict.outcome],
        f"On {sizes}, {level:.0%} intervals: bridged {accuracy}.",
        *_compare_in_words(verdict.comparisons, worst_seed),
    ]
    if verdict.failed:
        cells = dict.fromkeys(c.label for c in verdict.failed)
        failures = (f"{cell} ({_seeds([c for c in verdict.failed if c.label == cell])})" for cell in cells)
        lines.append(f"Not shown to beat {', '.join(failures)}.")
    if verdict.not_run and verdict.outcome != "unproven":
        lines.append(f"Not run, so that it could not be a complete proof either: {not_run}.")
    if verdict.not_applicable:
        lines.append(f"Not applicable: {', '.join(verdict.not_applicable)}.")
    lines += _rivals_in_words(verdict.rivals, worst_seed)
    if beyond := [share for share in verdict.exact if share]:
        value = beyond[0] if len(beyond) == 1 else _range(beyond)
        lines.append(f"Where neither model was right ({beyond[0].n:,} problems), the bridge was on {value}.")
    if n_seeds < 3:
        lines.append(f"A headline needs three training seeds; this is {n_seeds}.")
    return " ".join(lines)


def _compare_in_words(comparisons: list[Comparison], worst_seed: str) -> list[str]:
    """A sentence for each subset: bridged minus control, in the seed where the interval begins lowest."""
    lines = []
    for subset in RULE:
        here = [c for c in comparisons if c.subset == subset]
        worst = [min((c for c in here if c.control == name), key=lambda c: c.difference.low)
                 for name in dict.fromkeys(c.control for c in here)]  # fmt: skip
        if worst:
            problems = "" if subset == "all" else f" on the {worst[0].difference.n:,} source-only problems"
            differences = ", ".join(f"{c.control} {c.difference}" for c in worst)
            said = f"Bridged minus control{problems}{worst_seed}: {differences}"
            lines.append(f"{said} (p after Holm at most {max(c.adjusted_p for c in here):.2g}).")
    return lines


def _rivals_in_words(rivals: dict[str, list[Difference]], worst_seed: str) -> list[str]:
    """Who wins beside the rule: the rival, the bridge, or neither in every seed."""
    said = {"wins": [], "loses": [], "open": []}
    for rival, by_seed in rivals.items():
        won, lost = all(d.high < 0 for d in by_seed), all(d.low > 0 for d in by_seed)
        worst = min(by_seed, key=lambda d: d.low)
        said["wins" if won else "loses" if lost else "open"].append(f"{rival} {worst}")
    titles = {"wins": "these win", "loses": "the bridge beats", "open": "undecided"}
    parts = [f"{titles[key]}: {', '.join(found)}" for key, found in said.items() if found]
    return [f"Rivals beside the rule, bridged minus rival{worst_seed}: {'; '.join(parts)}."] if parts else []


def _seeds(comparisons: list[Comparison]) -> str:
    return ", ".join(
        f"seed {c.seed} {c.difference}" + (f" but p after Holm {c.adjusted_p:.2g}" if c.difference.low > 0 else "")
        for c in comparisons
    )


def _range(shares: list[Interval]) -> str:
    return " / ".join(f"{share.point:.3f}" for share in shares)


def _size(n: int, n_units: int) -> str:
    return f"{n:,} problems about {n_units:,} units" if n_units < n else f"{n:,} questions"
