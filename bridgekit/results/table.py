"""One table of answers, a row per run, condition and example, and three verbs on it: share, difference, ratio.

    answers = load_answers({"resampler": ["runs/a_seed1", "runs/a_seed2"], "dit": ["runs/b_seed1", "runs/b_seed2"]})
    share(select(answers, "source_only_held_unit"), by=["variant", "condition"])
    difference(answers, "bridged", "target", by=["variant", "seed"])
    difference(bridged, "dit", "resampler", on="variant")           # two variants, paired by seed and problem
    ratio(select(answers, "source_only"), "bridged", "target_told", by=["variant", "seed"])

Every verb gives a row per cell of `by` with `point low high n n_units n_seeds`. A cell that holds one seed is uncertain
for other problems (Wilson on the effective n; paired bootstrap over units). A cell that holds several pools them, and
is uncertain for other seeds as well (`statistics.pooled_mean`).
"""

from __future__ import annotations

import re
import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bridgekit.config import GROUPS
from bridgekit.results import statistics as stats
from bridgekit.runs import find_eval, load_eval
from bridgekit.tasks.units import FAMILIES

if typing.TYPE_CHECKING:
    import pandas as pd

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
RUN = ("run", "variant", "seed", "condition")
EXAMPLE = ("id", "question", "group", "unit", "value", "novelty", "family", "gold", "donor_gold")
ANSWER = ("answer", "said", "correct", "logprob")
SAME_PROBLEM = ("question", "gold", "unit", "value", "family")  # agree where two runs were asked the same
By = str | Sequence[str]
Runs = str | Path | Sequence[str | Path] | dict[str, str | Path | Sequence[str | Path]]


def load_answers(runs: Runs, texts: bool = False) -> pd.DataFrame:
    """Answers of the final evaluations: run variant seed condition, the example's columns, gold answer correct logprob.

    `runs` is a run folder, a folder of run folders, an evaluation file, a list of these, or {variant: these}. Without a
    name the variant is the folder's. `said` is the unit's value that an answer names; `texts` adds `text`, the answer.
    """
    import pandas as pd

    named = runs if isinstance(runs, dict) else {None: runs}
    parts, places = [], {}
    for label, paths in named.items():
        files = [f for p in ([paths] if isinstance(paths, (str, Path)) else paths) for f in _find_files(Path(p))]
        if not files:
            raise ValueError(f"load_answers: no run folders{'' if label is None else f' of {label!r}'} were named")
        for file in files:
            run, seed = file.parent.name, _seed_of(file.parent)
            variant = re.sub(r"_seed\d+$", "", run) if label is None else label
            if (other := places.setdefault((variant, seed), file.parent)) != file.parent:
                raise ValueError(f"{file.parent}: seed {seed} of '{variant}' is {other} already; name one otherwise")
            parts.append(tidy(load_eval(file), texts).assign(run=run, variant=variant, seed=seed))
    return pd.concat(parts, ignore_index=True).reindex(columns=[*RUN, *EXAMPLE, *ANSWER, *(["text"] if texts else [])])


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return sorted(path.glob("*/eval_samples_step_final.jsonl*")) or [find_eval(path)]


def _seed_of(folder: Path) -> int:
    """From the folder's name, else from its configuration; 0 where neither says it."""
    import yaml

    if named := re.search(r"_seed(\d+)", folder.name):
        return int(named[1])
    config = folder / "config.yaml"
    return int((yaml.safe_load(config.read_text()).get("run") or {}).get("seed", 0)) if config.is_file() else 0


def tidy(frame: pd.DataFrame, texts: bool = False) -> pd.DataFrame:
    """One evaluation (a row per example, columns `<condition>_correct`) as a row per condition and example."""
    import pandas as pd

    example = frame.rename(columns={"gold_extracted": "gold"})
    example = example[[c for c in EXAMPLE if c in example]]
    parts = []
    for name in [c.removesuffix("_correct") for c in frame if c.endswith("_correct")]:
        part = example.assign(condition=name, correct=stats.read_correct(frame, name))
        for key, column in (("answer", "extracted"), ("logprob", "logprob"), ("said", "said"), ("text", "full")):
            if f"{name}_{column}" in frame:
                part[key] = frame[f"{name}_{column}"]
        if "text" in part and "family" in part and "said" not in part:  # a kept study has no texts, but what they said
            part["said"] = [said_value(*pair) for pair in zip(part["text"], part["family"], strict=True)]
        parts.append(part if texts else part.drop(columns="text", errors="ignore"))
    return pd.concat(parts, ignore_index=True)


PLACES = {f.name: next(i for i, step in enumerate(f.steps) if step.endswith("*v")) for f in FAMILIES}
STEP = re.compile(r"<<(-?\d+)([-+*/])(-?\d+)=(-?\d+)>>")


def said_value(text: object, family: object) -> int | None:
    """The unit's value that a worked answer uses in its own steps; None where it names none.

    Every family multiplies by the unit's value in one known step, as the right factor.
    """
    if not isinstance(text, str) or family not in PLACES:
        return None
    steps, place = STEP.findall(text.split("####")[0]), PLACES[family]
    return int(steps[place][2]) if len(steps) > place and steps[place][1] == "*" else None


def select(frame: pd.DataFrame, subset: str = "all") -> pd.DataFrame:
    """The rows of one of SUBSETS; held-out problems unless it names the seen ones. May be empty."""
    if subset not in SUBSETS:
        raise ValueError(f"unknown subset `{subset}`; there are {', '.join(SUBSETS)}")
    wanted, keep = SUBSETS[subset], np.ones(len(frame), dtype=bool)
    if "novelty" in frame and "novelty" not in wanted:
        keep &= ~frame["novelty"].isin(["seen"])
    for column, value in wanted.items():
        keep &= frame[column].isin([value]) if column in frame else False
    return frame[keep]


def share(frame: pd.DataFrame, by: By = (), value: str = "correct") -> pd.DataFrame:
    """Share right (the mean, where `value` is no yes or no) in each cell of `by`."""

    def measure(cell: pd.DataFrame) -> dict:
        units = cell.get("unit")
        if cell[value].dtype != bool:
            if _n_seeds(cell) > 1:
                raise ValueError(f"share: `{value}` is no yes or no, which are not pooled over seeds: put seed into by")
            return _columns(stats.clustered_mean(cell[value], units))
        if _n_seeds(cell) == 1:
            return _columns(stats.clustered_proportion(cell[value], units))
        return _columns(stats.pooled_mean(*_stack([rows for _, rows in cell.groupby("seed")], value)))

    return _by_cell(frame, by, measure, ("condition", "variant"))


def difference(
    frame: pd.DataFrame, a: str, b: str, by: Sequence[str] | str = (), on: str = "condition"
) -> pd.DataFrame:
    """Share of `a` minus share of `b`, which are conditions (or variants: `on`), on the same problems; p gained lost.

    Several seeds are paired seed by seed and pooled; gained and lost are then those of all seeds together.
    """

    def measure(cell: pd.DataFrame) -> dict:
        one, other, units = pair_seeds(cell, a, b, on)
        gained, lost = int((one > other).sum()), int((one < other).sum())
        if one.shape[1] == 1:
            found = stats.paired_difference(_side_by_side(one, other, units, a, b), a, b)
            row = _columns(stats.Interval(found.difference, found.low, found.high, found.n, found.n_clusters))
            return row | {"p": found.p, "gained": gained, "lost": lost}
        pooled = stats.pooled_mean(one - other, units, lowest=-1.0)
        return _columns(pooled) | {"p": pooled.p, "gained": gained, "lost": lost}

    return _by_cell(frame, by, measure, {"condition", "variant"} - {on})


def ratio(frame: pd.DataFrame, a: str, b: str, by: By = (), on: str = "condition") -> pd.DataFrame:
    """What `a` has right as a share of what `b` has right on the same problems of one seed."""

    def measure(cell: pd.DataFrame) -> dict:
        one, other, units = pair_seeds(cell, a, b, on)
        if one.shape[1] > 1:
            raise ValueError(f"ratio: {one.shape[1]} seeds in one cell: put seed into by; ratios are not pooled")
        return _columns(stats.paired_ratio(_side_by_side(one, other, units, a, b), a, b))

    return _by_cell(frame, by, measure, {"condition", "variant"} - {on})


def pair_seeds(frame: pd.DataFrame, a: str, b: str, on: str = "condition") -> tuple:
    """Answers of `a` and of `b` in the seeds that have both, (problems, seeds) each, and the problems' units."""
    sides = []
    for name in (a, b):
        if (rows := frame[frame[on] == name]).empty:
            raise ValueError(
                f"`{name}` is no {on} of these answers (there are: {', '.join(map(str, frame[on].unique()))})"
            )
        sides.append(dict(list(rows.groupby("seed"))) if "seed" in rows else {1: rows})
    seeds = [seed for seed in sides[0] if seed in sides[1]]
    if not seeds:
        raise ValueError(f"`{a}` and `{b}` have no seed in common: they cannot be paired")
    stacked, units = _stack([side[seed] for side in sides for seed in seeds])
    return stacked[:, : len(seeds)], stacked[:, len(seeds) :], units


def _stack(parts: list[pd.DataFrame], value: str = "correct") -> tuple[np.ndarray, pd.Series | None]:
    """Values of several runs beside each other, (problems, runs): refused unless their problems are the same."""
    parts = [part.set_index("id").sort_index() for part in parts]
    first = parts[0]
    if first.index.has_duplicates:
        raise ValueError(f"id {first.index[first.index.duplicated()][0]} occurs twice in one run: name one condition")
    for part in parts[1:]:
        if not part.index.equals(first.index):
            raise ValueError("these runs were not tested on the same problems (ids differ): they cannot be paired")
        for column in [c for c in SAME_PROBLEM if c in part and c in first]:
            known = (part[column].notna() & first[column].notna()).to_numpy()
            if (apart := known & (part[column].to_numpy() != first[column].to_numpy())).any():
                where = f"{column} of {first.index[apart][0]} differs"
                raise ValueError(f"these runs were not tested on the same problems ({where}): they cannot be paired")
    return np.stack([part[value].to_numpy(dtype=float) for part in parts], axis=1), first.get("unit")


def _side_by_side(one: np.ndarray, other: np.ndarray, units, a: str, b: str) -> pd.DataFrame:
    import pandas as pd

    frame = pd.DataFrame({f"{a}_correct": one[:, 0] > 0, f"{b}_correct": other[:, 0] > 0})
    return frame if units is None else frame.assign(unit=np.asarray(units))


def _columns(found: stats.Interval) -> dict:
    size = {"n": found.n, "n_units": found.n_clusters, "n_seeds": getattr(found, "n_seeds", 1)}
    return {"point": found.point, "low": found.low, "high": found.high} | size


def _n_seeds(cell: pd.DataFrame) -> int:
    return cell["seed"].nunique() if "seed" in cell else 1


def _by_cell(frame: pd.DataFrame, by: By, measure, apart: Sequence[str]) -> pd.DataFrame:
    """A row for each cell of `by`, in the order of the frame; columns in `apart` may not be mixed in one cell."""
    import pandas as pd

    by = [by] if isinstance(by, str) else list(by)
    if frame.empty:
        raise ValueError("no answers to count: the table is empty")
    rows = []
    for key, cell in frame.groupby(by, sort=False, observed=True, dropna=False) if by else [((), frame)]:
        for column in [c for c in apart if c in cell and c not in by and cell[c].nunique() > 1]:
            raise ValueError(f"several values of `{column}` in one cell: put {column} into by, or select one")
        rows.append(dict(zip(by, key, strict=True)) | measure(cell))
    return pd.DataFrame(rows)
