"""The plan's decision rule, executed on a finished Phase 1 run: which ablations are due, and how firm that is.

    decision = decide_run("preserved_data/first_experiments/phase1_full_20251116_201212")
    print(decision.text)
    append_appendix("runs/REPORT.md", "ablation", decision.text)

The rule looks at one number, the bridged accuracy of the final evaluation: 0.70 and above goes on, from 0.65 the
variants B and C are due, below it A, B and C. Counts are compared as whole numbers, so that 130 of 200 is 0.65.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist

import pandas as pd

from bridgekit.audit.outcomes import conditions_of, is_right
from bridgekit.audit.runfolders import read_run
from bridgekit.config import ConfigError
from bridgekit.results import reports, verdict
from bridgekit.results import statistics as stats
from bridgekit.results.manifest import replace_block
from bridgekit.results.statistics import Interval
from bridgekit.runs import find_eval, load_eval

GO_ON, B_AND_C, A_B_AND_C = "go on", "B and C", "A, B and C"
BRANCHES = {  # branch: (lowest accuracy in percent, the variants that are due)
    GO_ON: (70, ()),
    B_AND_C: (65, ("B", "C")),
    A_B_AND_C: (0, ("A", "B", "C")),
}
LETTERS = BRANCHES[A_B_AND_C][1]


@dataclass(frozen=True)
class Decision:
    run: str
    right: int
    accuracy: Interval  # bridged, over units
    target: float  # the target alone, on the same problems
    branch: str
    variants: tuple[str, ...]  # that the plan asks for
    replicate: dict[str, float]  # how likely each branch is for a repetition of this run
    outcome: str  # of the claim rule
    text: str

    @property
    def differs(self) -> float:
        """How likely a repetition would be sent elsewhere."""
        return 1 - self.replicate[self.branch]

    def to_dict(self) -> dict:
        return asdict(self) | {"differs": self.differs}


def choose_branch(right: int, n: int) -> str:
    """The branch of `right` answers out of `n`, in whole numbers: no rounding moves an edge."""
    if not 0 <= right <= n or n < 1:
        raise ValueError(f"decision: {right} right of {n} is impossible")
    return next(branch for branch, (percent, _) in BRANCHES.items() if 100 * right >= percent * n)


def branch_probabilities(right: int, n: int, deviation: float) -> dict[str, float]:
    """How likely each branch is for a repetition, whose number of right answers is as uncertain as this one's.

    Normal, with the variance of both draws; counts are whole, so an edge lies half an answer below it.
    """
    both, chances, above = NormalDist(right / n, 2**0.5 * deviation), {}, 0.0
    for branch, (percent, _) in BRANCHES.items():
        lowest = -(-percent * n // 100)  # the smallest count that reaches this branch
        reached = 1.0 if percent == 0 else 1 - both.cdf((lowest - 0.5) / n)
        chances[branch], above = reached - above, reached
    return chances


def standard_error(correct: pd.Series, units: pd.Series | None) -> float:
    """Of a share, over units; with two answers more, one right and one wrong, so that it is never zero."""
    n = len(correct)
    share, effect = (correct.sum() + 1) / (n + 2), 1.0
    if units is not None and units.nunique() > 1:
        sizes = units.value_counts()
        icc = stats.intraclass_correlation(correct.astype(float), units)
        effect = stats.design_effect(float((sizes**2).sum() / sizes.sum()), icc)
    return float((share * (1 - share) * effect / n) ** 0.5)


def decide(frame: pd.DataFrame, run: str) -> Decision:
    """The decision from one final evaluation with `bridged_correct`, `target_correct` and, if there, `unit`."""
    rows = verdict.select_subset(frame)
    correct = pd.Series(stats.read_correct(rows, "bridged"), index=rows.index)
    units = rows["unit"] if "unit" in rows and rows["unit"].notna().all() else None
    right, n = int(correct.sum()), len(correct)
    branch = choose_branch(right, n)
    replicate = branch_probabilities(right, n, standard_error(correct, units))
    judged = verdict.judge([frame])
    decision = Decision(
        run, right, stats.clustered_proportion(correct, units), float(stats.read_correct(rows, "target").mean()),
        branch, BRANCHES[branch][1], replicate, judged.outcome, text="",
    )  # fmt: skip
    return Decision(**vars(decision) | {"text": f"{_describe(decision)}\n\nThe claim rule on this run: {judged.text}"})


def decide_run(folder: str | Path) -> Decision:
    """The same for a finished run folder, of this package or of the first experiments."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"phase1_run: {folder}: no such run folder")
    return decide(read_final(folder), folder.name)


def read_final(folder: Path) -> pd.DataFrame:
    """The final evaluation as a frame; of the first experiments there may be only a table of outcomes."""
    record = read_run(folder)
    if "final" not in record.steps():
        raise ConfigError(f"phase1_run: {folder} has no final evaluation: the rule is about the final accuracy")
    if record.generation == "bridgekit":
        return load_eval(find_eval(folder))
    last = record.at("final")
    right = {f"{c}_correct": is_right(last, c) for c in conditions_of(last)}
    return pd.DataFrame(right).rename_axis("index").reset_index()


def due_variants(names: list[str], decision: Decision | None) -> list[str]:
    """Which of a study's variants to run: of the plan's A, B and C only those that its rule asks for.

    Nothing where fewer than two are left, because one variant compares with nothing.
    """
    if decision is None:
        return list(names)
    due = [name for name in names if name not in LETTERS or name in decision.variants]
    return due if len(due) > 1 else []


def _describe(d: Decision) -> str:
    share = d.accuracy
    units = f" about {share.n_clusters:,} units" if share.n_clusters < share.n else ""
    due = f"variants {d.branch} are due" if d.variants else "no ablation is due, the plan goes on to the swap"
    said = (
        f"**{'Run ' + d.branch if d.variants else 'Go on'}.** The final bridged accuracy of `{d.run}` is {d.right:,} "
        f"of {share.n:,} problems{units}, {share.point:.3f} [{share.low:.3f}, {share.high:.3f}]. The plan goes on from "
        f"0.70, asks for B and C from 0.65 and for A, B and C below it: {due}."
    )
    chances = "; ".join(f"{branch}: {d.replicate[branch]:.2f}" for branch in BRANCHES)
    said += (
        f" If the run were repeated, the branch would be another with probability {d.differs:.2f} ({chances}). This is "
        "a normal approximation with the variance of both draws of problems; another training seed comes on top."
    )
    alone = choose_branch(round(d.target * share.n), share.n)
    if alone == GO_ON:
        said += (
            f" The rule cannot tell whether the bridge is of use: the target alone has {d.target:.3f}, so a bridge "
            "that changes nothing goes on."
        )
    elif d.branch != alone and share.point > d.target:
        said += f" The target alone, with {d.target:.3f}, would have been sent to: {alone}."
    return said


def append_appendix(report: str | Path, study: str, text: str) -> Path:
    """Put the comparative gains of a study into the report, between markers of its own; again, in the same place."""
    report = Path(report)
    report.parent.mkdir(parents=True, exist_ok=True)
    with reports.locked(report.parent):
        reports.edit_file(report, lambda there: replace_block(there, f"comparative gains of {study}", text))
    return report
