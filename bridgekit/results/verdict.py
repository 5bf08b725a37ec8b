"""When may a run say that the bridge transfers? The claim rule, its controls and its numbers in words.

    print(headroom(frame).text)                      # before training; needs `source` and `target` alone
    verdict = judge([run_1, run_2, run_3])           # a run folder or its frame for each training seed
    verdict.text, verdict.table()                    # the claim in two sentences with its details; a row per control
    conditions_table(frame)                          # what the bars and the table are drawn from

The rule: bridged beats `target`, `shuffled` and each selection of the trained controls `constant` and `self_bridge`,
on all problems and on the source-only ones, each with a paired interval over units above zero in every training seed;
and each control's largest p survives Holm. A control whose weights are known to be from before half of the training
counts as not run, and so do problems that are missing. Problems about units that the bridge was trained on (novelty
`seen`) count nowhere in it, because their answers can be memorised; they have a row of their own in the table.

The runs must be seeds of one experiment: their folders say which pair, settings and seed they have. How often the rule
errs where there is no effect: `tests/results/simulate.py`.
"""

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations, product
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd

from bridgekit.config import CONDITIONS, differences, is_geometry
from bridgekit.results import statistics as stats
from bridgekit.results import table
from bridgekit.results.statistics import Difference, Interval, paired_difference, read_correct
from bridgekit.results.style import format_share
from bridgekit.results.table import SUBSETS
from bridgekit.runs import INVALID

RULE = ("target", "constant", "shuffled", "self_bridge")  # on all problems and on the source-only ones
RIVALS = ("target_told", "relay_full", "relay_cut", "relay_answer", "router", "union")
SELECTIONS = {"source_only": "best on source-only validation", "last": "last weights"}  # beside the best on the mix
ALPHA = 0.05
MIN_UNITS = 30  # with fewer an interval means little
TELLING, ALIKE = 5, 0.95  # so many wrong or unsure answers, and such a share of them equal, show two runs to be one
REPEATED = 0.05  # of the questions may stand twice by chance
SAME_PROBLEM = ("question", "gold_extracted", "group", "unit", "value", "novelty")


Headroom = namedtuple("Headroom", "n n_units source target union counts gain_possible smallest_effect text")


@dataclass
class Comparison:
    seed: int
    control: str
    subset: str
    difference: Difference  # bridged minus control
    adjusted_p: float = 1.0  # Holm over the comparisons of the rule, each with its largest p of all seeds
    holds: bool = False
    step: int | None = None  # of the control's weights, where the run recorded it

    @property
    def label(self) -> str:
        return describe_control(self.control) + ("" if self.subset == "all" else " on source-only problems")


@dataclass
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
    text: str = ""

    def to_dict(self) -> dict:
        return asdict(self)

    def differences(self) -> pd.DataFrame:
        """A row for each comparison: label seed subset control step point low high n n_units p adjusted_p holds ..."""
        suffixes = {seed: f", seed {seed}" if len(self.seeds) > 1 else "" for seed in self.seeds}
        rows = [{"label": c.label + suffixes[c.seed]} | vars(c) | vars(c.difference) for c in self.comparisons]
        return pd.DataFrame(rows).rename(columns={"difference": "point", "n_clusters": "n_units"})

    def table(self) -> pd.DataFrame:
        """A short table of texts: a row for each control, with the seed in which its interval begins lowest."""
        rows = []
        for label in dict.fromkeys(c.label for c in self.comparisons):
            seeds = [c for c in self.comparisons if c.label == label]
            worst = min(seeds, key=lambda c: c.difference.low)
            steps = ", ".join(f"{step:,}" for step in sorted({c.step for c in seeds} - {None})) or "\N{EN DASH}"
            holds = "yes" if all(c.holds for c in seeds) else "no"
            rows.append((label, steps, str(worst.difference), f"{worst.adjusted_p:.2g}", holds))
        rows += [(name, *["\N{EN DASH}"] * 3, "not run") for name in self.not_run]
        head = ("control", "weights from step", "bridged minus control", "p after Holm", "holds")
        return pd.DataFrame(rows, columns=head)


def describe_control(name: str) -> str:
    """A control in words: `constant.last` is the constant with its last weights."""
    control, _, selection = name.partition(".")
    return f"{control}, {SELECTIONS.get(selection, selection)}" if selection else control


def headroom(frame: pd.DataFrame | str | Path) -> Headroom:
    """What a perfect bridge could gain over the target, from the source's and the target's own answers alone.

    `counts` are the problems right for source_only, both, target_only, neither; `gain_possible` is union minus target.
    `smallest_effect` is that of bridge against target on the test set that the run folder names (else on these
    problems), with power 0.8, if the bridge changes answers on the source_only ones alone.
    """
    frame = table.load_frame(frame) if isinstance(frame, (str, Path)) else frame
    rows = held_out(frame)
    source, target = read_correct(rows, "source"), read_correct(rows, "target")
    shares = {name: _accuracy(rows, name) for name in ("source", "target", "union")}
    n, n_units = len(rows), shares["target"].n_clusters
    kinds = {"source_only": source > target, "both": source & target, "target_only": target > source}
    counts = {name: int(mask.sum()) for name, mask in (kinds | {"neither": ~(source | target)}).items()}
    # with no discordant pair the rule of three says how many there may still be
    discordance, n_test = max(counts["source_only"], min(3, n)) / n, frame.attrs.get("n_test") or n
    icc = stats.intraclass_correlation(kinds["source_only"], rows.get("unit"))
    test_units = max(1, round(n_units * n_test / n))  # as many problems about each as here
    effect, gain = stats.minimum_detectable_effect(n_test, discordance, test_units, icc), counts["source_only"] / n
    hope = "" if effect <= gain else ": more than there is, so that no bridge could be shown to help here"
    text = (
        f"{_size(shares['target'])}: source {shares['source']}, target {shares['target']}, "
        f"either {shares['union']}. The source alone is right on {counts['source_only']:,}, so a "
        f"bridge that loses nothing can gain {format_share(gain, signed=True)}. The smallest gain that {n_test:,} test "
        f"problems find with power 0.8 is {format_share(effect, signed=True)}{hope}."
    )
    return Headroom(n, n_units, *shares.values(), counts, gain, effect, text)


def conditions_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Accuracy, interval, invalid share, n and n_units of every condition on every subset that is there."""
    answers, parts = table.tidy(frame), []
    answers = answers[answers["condition"].isin(CONDITIONS)].assign(answer=answers.get("answer"))
    answers = answers.sort_values("condition", key=lambda names: names.map(CONDITIONS.index), kind="stable")
    for subset in SUBSETS:
        if len(part := table.select(answers, subset)):
            answered = part[part["answer"].notna()]  # a computed condition has no answers
            invalid = (answered["answer"] == INVALID).groupby(answered["condition"]).mean()
            shares = table.share(part, "condition").assign(subset=subset)
            parts.append(shares.assign(invalid=shares["condition"].map(invalid)))
    found = pd.concat(parts, ignore_index=True).rename(columns={"point": "accuracy"})
    return found[["condition", "subset", "n", "n_units", "accuracy", "low", "high", "invalid"]]


def judge(
    frames: Sequence[pd.DataFrame | str | Path], *, seeds: list[int] | None = None, n_boot: int = 10_000
) -> Verdict:
    """The claim rule on one final evaluation, as a frame or a run folder, for each training seed.

    `seeds` are for frames of no folder (else 1, 2, ...). Runs that are no seeds of one experiment are refused.
    """
    frames = [table.load_frame(frame) if isinstance(frame, (str, Path)) else frame for frame in frames]
    recorded = [frame.attrs.get("seed", 0) for frame in frames]
    seeds = [seed or i for i, seed in enumerate(recorded, start=1)] if seeds is None else list(seeds)
    if not seeds or len(seeds) != len(frames) or len(set(seeds)) != len(seeds):
        runs = "".join(f", {frame.attrs['run']}" for frame in frames if "run" in frame.attrs)
        raise ValueError(f"judge: {len(frames)} runs, seeds {seeds}{runs}: give one run for each distinct seed")
    if any(known not in (0, seed) for known, seed in zip(recorded, seeds, strict=True)):
        raise ValueError(f"judge: seeds {seeds} are asked for, but the runs have {recorded}: leave `seeds` out")
    parts = {seed: held_out(frame) for seed, frame in zip(seeds, frames, strict=True)}
    shares = [_accuracy(rows, "bridged") for rows in parts.values()]
    gaps = [gap for seed, rows in parts.items() for gap in _find_gaps(rows, seed)]
    gaps += [gap for pair in combinations(parts, 2) for gap in _compare_runs(*(parts[seed] for seed in pair), *pair)]
    comparisons, not_run, not_applicable = _apply_rule(parts, n_boot)
    not_run += gaps
    failed = [c for c in comparisons if not c.holds]
    outcomes = {"harms": _harmed(comparisons), "fails": failed, "unproven": not_run, "transfers": True}
    outcome = next(outcome for outcome, found in outcomes.items() if found)
    known = [rival for rival in RIVALS if all(f"{rival}_correct" in rows for rows in parts.values())]
    rivals = {rival: [paired_difference(rows, "bridged", rival, n_boot) for rows in parts.values()] for rival in known}
    neither = [rows[~read_correct(rows, "union")] if "union_correct" in rows else rows[:0] for rows in parts.values()]
    exact = [_accuracy(rows, "bridged") if len(rows) else None for rows in neither]
    found = (outcome == "transfers", not not_run, outcome, comparisons, not_run, not_applicable, failed, rivals, exact)
    verdict = Verdict(*found, list(seeds))
    verdict.text = _describe(verdict, shares)
    return verdict


def _find_gaps(rows: pd.DataFrame, seed: int) -> list[str]:
    """What one run lacks to be a proof; refused where its rows do not say which answers stand or fall together."""
    asked, n_units, gaps = rows.attrs.get("n_test") or len(rows), _count_units(rows), []
    for column in ("unit", "novelty"):
        grouped = rows["group"].notna() if "group" in rows else pd.Series(False, rows.index)
        if grouped.any() and (column not in rows or rows.loc[grouped, column].isna().any()):
            raise ValueError(f"judge: seed {seed} has problems with a group and no {column}: restore the column")
    names = [rows.attrs.get("settings", {}).get(f"pair.{role}_model", "") for role in ("source", "target")]
    if made_up := [name for name in names if is_geometry(name)]:
        gaps.append(f"models with trained weights ({' and '.join(made_up)} in seed {seed}: random, for planning alone)")
    if len(rows) != asked or rows.attrs.get("left_out"):
        gaps.append(f"the whole test set ({len(rows):,} of {asked:,} problems in seed {seed})")
    for condition in sorted({"bridged", *RULE} & {name.split(".")[0] for name in rows.attrs.get("unscored", ())}):
        gaps.append(f"{condition} (not scored on every problem in seed {seed})")
    if n_units < MIN_UNITS:
        gaps.append(f"a test of {MIN_UNITS} units or more ({n_units} in seed {seed})")
    if "question" in rows and (again := int(rows["question"].duplicated().sum())) > REPEATED * len(rows):
        gaps.append(f"a test of distinct problems ({again:,} stand twice in seed {seed})")
    return gaps


def _compare_runs(a: pd.DataFrame, b: pd.DataFrame, *seeds: int) -> list[str]:
    """Refuse two runs that are no seeds of one experiment, were asked other problems, or are one run; else the gaps."""
    one, other = (rows.attrs.get("run", f"seed {seed}") for rows, seed in zip((a, b), seeds, strict=True))
    if a.attrs.get("settings") and b.attrs.get("settings"):
        made = [rows.attrs["made_of"] for rows in (a, b)]
        apart = differences(a.attrs["settings"], b.attrs["settings"])[0]
        apart |= {key: (made[0][key], made[1][key]) for key in made[0] if made[0][key] != made[1][key]}
        for key in apart.keys() - {"run.seed"}:
            first, second = apart[key]
            why = f"{key} is {second!r} there and {first!r} here; judge runs that differ in run.seed alone"
            raise ValueError(f"judge: {other} is no other seed of {one}: {why}")
    key = next((key for key in ("id", "index") if key in a and key in b), None)
    a, b = (rows.set_index(key) if key else rows.reset_index(drop=True) for rows in (a, b))
    shared, missing = a.index.intersection(b.index), len(a.index.symmetric_difference(b.index))
    columns = [column for column in SAME_PROBLEM if column in a and column in b]
    unlike = (a.loc[shared, columns].astype(str) != b.loc[shared, columns].astype(str)).any()
    if shared.empty or unlike.any():
        what = f"{unlike.idxmax()} differs" if unlike.any() else "no id in common"
        raise ValueError(f"judge: {one} and {other} were not asked the same problems ({what}): judge seeds of one test")
    if _are_one_run(a.loc[shared], b.loc[shared]):
        raise ValueError(f"judge: {one} and {other} are the same run (equal wrong answers); give one run for each seed")
    return [f"{missing:,} problems (not in both seed {seeds[0]} and {seeds[1]})"] if missing else []


def _are_one_run(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    """Whether two evaluations by id are one: another seed makes other mistakes, and is unsure of other answers.

    Where the target alone says the same, the bridge does nothing, which two seeds may have in common."""
    column = "bridged_extracted" if "bridged_extracted" in a and "bridged_extracted" in b else "bridged_correct"
    equal, telling = a[column] == b[column], ~(read_correct(a, "bridged") & read_correct(b, "bridged"))
    if "bridged_logprob" in a and "bridged_logprob" in b:
        known = np.stack([rows["bridged_logprob"].to_numpy(dtype=float) for rows in (a, b)])
        equal, telling = equal & (abs(known[0] - known[1]) <= 0.051), telling | (known < -0.1).any(axis=0)
    if column == "bridged_extracted" and "target_extracted" in a and "target_extracted" in b:
        telling &= (a[column] != a["target_extracted"]) | (b[column] != b["target_extracted"])
    return bool(telling.sum() >= TELLING and equal[telling].mean() >= ALIKE)


def held_out(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows that count: all but those about seen units; refused where a problem stands twice, or none is left."""
    key = "id" if "id" in frame else "index"
    if key in frame and len(twice := frame[key][frame[key].duplicated()]):
        raise ValueError(f"{key} {twice.iloc[0]} occurs twice: give one evaluation step of one run")
    rows = table.select(frame)
    if rows.empty:
        raise ValueError("no held-out problem in this evaluation: it has no rows, or all are about seen units")
    return table.with_union(rows)


def _apply_rule(parts: dict[int, pd.DataFrame], n_boot: int) -> tuple[list[Comparison], list[str], list[str]]:
    """All comparisons of the rule with whether they hold, what was not run, and what does not apply."""
    comparisons, not_run = _compare(parts, "all", n_boot)
    grouped = {s: rows for s, rows in parts.items() if "group" in rows and rows["group"].notna().any()}
    only = {s: table.select(rows, "source_only") for s, rows in grouped.items()}
    has_groups = only or any(rows.attrs.get("settings", {}).get("task.task") == "units" for rows in parts.values())
    few = [s for s in parts if s not in only or _count_units(only[s]) < MIN_UNITS]
    not_run += [f"the source-only part (fewer than {MIN_UNITS} held-out units in seed {s})" for s in few if has_groups]
    # its controls are those of the whole set: one that was not run is named there already
    enough = {s: rows for s, rows in only.items() if _count_units(rows) > 1}
    comparisons += _compare(enough, "source_only", n_boot)[0]
    # a comparison holds if its interval lies above zero and its control's largest p of all seeds survives Holm; where
    # it does not survive, only the seed with that largest p fails
    largest = {c.label: max(o.difference.p for o in comparisons if o.label == c.label) for c in comparisons}
    adjusted = stats.holm(largest)
    for c in comparisons:
        c.adjusted_p = adjusted[c.label]
        c.holds = c.difference.low > 0 and (c.adjusted_p <= ALPHA or c.difference.p < largest[c.label])
    return comparisons, not_run, [] if has_groups else ["the source-only part (this task has no knowledge groups)"]


def _count_units(rows: pd.DataFrame) -> int:
    return len(set(stats.cluster_codes(rows.get("unit"), len(rows))))


def _harmed(comparisons: list[Comparison]) -> list[Comparison]:
    """The seeds in which the bridge is worse than the target, at a level divided by their number."""
    seeds = [c for c in comparisons if (c.control, c.subset) == ("target", "all")]
    return [c for c in seeds if c.difference.high < 0 and c.difference.p * len(seeds) <= ALPHA]


def _compare(parts: dict[int, pd.DataFrame], subset: str, n_boot: int) -> tuple[list[Comparison], list[str]]:
    """Bridged minus each control in each seed, and the controls that were not run, or not trained, in every seed."""
    comparisons, not_run = [], []
    # a bridge trained on the natural mix has one constant, not two: the second is never missed
    for control in (*RULE, "constant_natural"):
        names = {control: "mix"} | {f"{control}.{selection}": selection for selection in SELECTIONS}
        ran = [(n, s) for n, s in product(names, parts) if f"{n}_correct" in parts[s]]
        for name, seed in ran:
            rows = parts[seed]
            step = rows.attrs.get("controls", {}).get(control, {}).get(names[name])
            if step == 0 or step is not None and 2 * step < (rows.attrs.get("steps") or 0):
                where = f", seed {seed}" if len(parts) > 1 else ""
                not_run.append(f"{describe_control(name)} (not trained: weights of step {step:,}{where})")
            else:
                found = paired_difference(rows, "bridged", name, n_boot)
                comparisons.append(Comparison(seed, name, subset, found, step=step))
        missing = [str(seed) for seed in parts if all(seed != other for _, other in ran)]
        if missing and (ran or control in RULE):
            not_run.append(control + (f" (seed {', '.join(missing)})" if ran else ""))
    return comparisons, not_run


def _accuracy(rows: pd.DataFrame, condition: str) -> Interval:
    return stats.clustered_proportion(read_correct(rows, condition), rows.get("unit"))


def _describe(verdict: Verdict, shares: list[Interval]) -> str:
    """The verdict in words: `templates/verdict.txt.j2`, with who wins of bridge and rivals in every seed."""
    rivals: dict[str, list[str]] = {"these win": [], "the bridge beats": [], "undecided": []}
    for rival, seeds in verdict.rivals.items():
        wins = {"these win": all(d.high < 0 for d in seeds), "the bridge beats": all(d.low > 0 for d in seeds)}
        title = next((title for title in wins if wins[title]), "undecided")
        rivals[title].append(f"{rival} {min(seeds, key=lambda d: d.low)}")
    facts = vars(verdict) | {
        "accuracy": _join(shares) + (f" in seeds {verdict.seeds}" if len(shares) > 1 else ""),
        "sizes": dict.fromkeys(_size(share) for share in shares),
        "harmed": _harmed(verdict.comparisons),
        "table": [row for row in verdict.table().to_dict("records") if row["holds"] != "not run"],
        "rivals": [f"{title}: {', '.join(names)}" for title, names in rivals.items() if names],
        "beyond": [share for share in verdict.exact if share],
        "join": _join,
    }
    return " ".join(_load_template().render(facts).split())


@cache
def _load_template() -> jinja2.Template:
    text = Path(__file__).with_name("templates").joinpath("verdict.txt.j2").read_text(encoding="utf-8")
    return jinja2.Template(text, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)


def _join(shares: list[Interval]) -> str:
    return str(shares[0]) if len(shares) == 1 else " / ".join(format_share(share.point) for share in shares)


def _size(share: Interval) -> str:
    text = f"{share.n:,} problems about {share.n_clusters:,} units"
    return text if share.n_clusters < share.n else f"{share.n:,} questions"
