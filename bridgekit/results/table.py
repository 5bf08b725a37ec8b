"""One table of answers, a row per run, condition and example, and three verbs on it: share, difference, ratio.

    answers = load_answers({"resampler": ["runs/a_seed1", "runs/a_seed2"], "dit": ["runs/b_seed1", "runs/b_seed2"]})
    share(select(answers, "source_only_held_unit"), by=["variant", "condition"])
    difference(bridged, "dit", "resampler", on="variant")           # two variants, paired by seed and problem
    ratio(select(answers, "source_only"), "bridged", "target_told", by=["variant", "seed"])
    over_pairs(cells, by="producer")                                # of any of these, where several pairs were made

Every verb gives a row per cell of `by` with `point low high n n_units n_seeds`. A cell that holds one seed is uncertain
for other problems; one that holds several pools them, and is uncertain for other seeds too (`statistics.pooled_mean`).
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bridgekit.keys import load_yaml, refuse_if
from bridgekit.results import statistics as stats
from bridgekit.runs import find_eval, load_eval, load_json, load_jsonl
from bridgekit.tasks.units import FAMILIES

SUBSETS = {  # column: value; all but the seen ones are held-out problems
    "all": {},
    "source_only": {"group": "source_only"},
    "source_only_seen": {"group": "source_only", "novelty": "seen"},
    "source_only_held_unit": {"group": "source_only", "novelty": "held_unit"},
    "source_only_held_value": {"group": "source_only", "novelty": "held_value"},
    "target_only": {"group": "target_only"},
    "both": {"group": "both"},
}
EXAMPLE = ("id", "question", "group", "unit", "value", "novelty", "family", "gold", "donor_gold")
ANSWER = {"answer": "extracted", "logprob": "logprob", "said": "said", "text": "full"}  # column: `<condition>_...`
SAME_PROBLEM = ("question", "gold", "unit", "value", "family")  # agree where two runs were asked the same
By = str | Sequence[str]
Runs = str | Path | Sequence[str | Path]


def load_answers(runs: Runs | dict[str, Runs], texts: bool = False) -> pd.DataFrame:
    """Answers of the final evaluations: run variant seed condition, the example's columns, gold answer correct logprob.

    `runs` is a run folder, a folder of run folders, an evaluation file, a list of these, or {variant: these}. Without a
    name the variant is the folder's. `said` is the unit's value that an answer names; `texts` adds `text`, the answer.
    """
    named = runs if isinstance(runs, dict) else {None: runs}
    parts, places = [], {}
    for label, paths in named.items():
        files = [f for p in ([paths] if isinstance(paths, (str, Path)) else paths) for f in _find_files(Path(p))]
        if not files:
            raise ValueError(f"load_answers: no run folders{'' if label is None else f' of {label!r}'} were named")
        for file in files:
            frame, run = load_frame(file), file.parent.name
            variant, seed = re.sub(r"_seed\d+$", "", run) if label is None else label, frame.attrs["seed"]
            if (other := places.setdefault((variant, seed), file.parent)) != file.parent:
                raise ValueError(f"{file.parent}: seed {seed} of '{variant}' is {other} already; name one otherwise")
            parts.append(tidy(frame).assign(run=run, variant=variant, seed=seed))
    columns = ["run", "variant", "seed", "condition", *EXAMPLE, "answer", "said", "correct", "logprob"]
    return pd.concat(parts, ignore_index=True).reindex(columns=columns + ["text"] * texts)


def load_frame(run: str | Path, skip_broken: bool = False) -> pd.DataFrame:
    """One evaluation as it lies there, a row per example; `attrs` has what its run folder says of it.

    That is `run`, `seed` (0: unknown), `steps`, `n_test`, `settings` (flat), `made_of` (models, lexicon, a user's own
    files) and `controls`.
    """
    file, *others = _find_files(Path(run))
    if others:
        raise ValueError(f"{run}: {1 + len(others)} runs in it; name one of them")
    frame, folder, settings, made_of = load_eval(file, skip_broken), file.parent, {}, {}
    if (path := folder / "config.yaml").is_file():
        known = load_yaml(path)
        refuse_if(not isinstance(known, dict), f"{path}: no configuration of a run: restore it")
        parts = {part: keys for part, keys in known.items() if isinstance(keys, dict)}
        settings = {f"{part}.{key}": value for part, keys in parts.items() for key, value in keys.items()}
        facts, code = load_json(folder / "provenance.json"), load_json(folder / "code" / "code.json")
        made_of = {key: facts.get(key) for key in ("source", "target", "lexicon_seed")}
        made_of["code"] = sorted(part["sha256"] for part in code.values())
    n_test = None if ":" in settings.get("task.task", "") else settings.get("task.n_test")
    asked = settings.get("eval.eval_samples", -1)
    named = re.search(r"_seed(\d+)", folder.name)  # of a folder without a configuration
    frame.attrs |= {
        "run": str(folder),
        "seed": int(settings.get("run.seed", named[1] if named else 0)),
        "steps": settings.get("train.steps"),
        "n_test": asked if n_test and 0 < asked < n_test else n_test,  # a task of a user's own may have another number
        "settings": settings,
        "made_of": made_of,
        "controls": load_control_steps(folder),
    }
    return frame


def load_control_steps(folder: Path) -> dict[str, dict[str, int]]:
    """{control: {selection: step its weights come from}}; of older runs from their validation: the last best one."""
    steps = load_json(folder / "controls.json")
    for path in [] if steps else sorted(folder.glob("metrics_*.jsonl")):
        control = path.stem.removeprefix("metrics_")
        scores = [(row["eval"][control], row["step"]) for row in load_jsonl(path, []) if control in row.get("eval", {})]
        steps |= {control: {"mix": max(scores)[1]}} if scores else {}
    return steps


def _find_files(path: Path) -> list[Path]:
    folders = {file.parent for file in path.glob("*/eval_samples_step_final.jsonl*")}
    return [path] if path.is_file() else [find_eval(folder) for folder in sorted(folders) or [path]]


def tidy(frame: pd.DataFrame) -> pd.DataFrame:
    """One evaluation (a row per example, columns `<condition>_correct`) as a row per condition and example."""
    frame = with_union(frame)
    example = frame.rename(columns={"gold_extracted": "gold"} | ({} if "id" in frame else {"index": "id"}))
    example, parts = example[[c for c in EXAMPLE if c in example]], []
    for name in [c.removesuffix("_correct") for c in frame if c.endswith("_correct")]:
        found = {key: frame[f"{name}_{column}"] for key, column in ANSWER.items() if f"{name}_{column}" in frame}
        part = example.assign(condition=name, correct=stats.read_correct(frame, name), **found)
        if "said" not in found and {"text", "family"} <= set(part):  # a kept study has no texts, but what they said
            part["said"] = pd.Series(map(said_value, part["text"], part["family"]), index=part.index, dtype=float)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def with_union(frame: pd.DataFrame) -> pd.DataFrame:
    """The evaluation with `union_correct`, right where source or target is, if both answered."""
    if "union_correct" in frame or not {"source_correct", "target_correct"} <= set(frame):
        return frame
    return frame.assign(union_correct=stats.read_correct(frame, "source") | stats.read_correct(frame, "target"))


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
    if "novelty" in frame and "novelty" not in SUBSETS[subset]:
        frame = frame[frame["novelty"] != "seen"]
    for column, value in SUBSETS[subset].items():
        frame = frame[frame[column] == value] if column in frame else frame[:0]
    return frame


def share(frame: pd.DataFrame, by: By = (), value: str = "correct") -> pd.DataFrame:
    """Share right (the mean, where `value` is no yes or no) in each cell of `by`."""

    def measure(cell: pd.DataFrame) -> dict:
        binary = cell[value].dtype == bool
        if cell["seed"].nunique() == 1:
            estimate = stats.clustered_proportion if binary else stats.clustered_mean
            return vars(estimate(cell[value], cell.get("unit")))
        if not binary:
            raise ValueError(f"share: `{value}` is no yes or no, which are not pooled over seeds: put seed into by")
        values, units = _spread(cell, ["seed"], value)
        return stats.pooled_mean(values.to_numpy(), units)._asdict()

    return _by_cell(frame, by, measure, {"condition", "variant"})


def difference(frame: pd.DataFrame, a: str, b: str, by: By = (), on: str = "condition") -> pd.DataFrame:
    """Share of `a` minus share of `b`, which are conditions (or variants: `on`), on the same problems; p gained lost.

    Several seeds are paired seed by seed and pooled; gained and lost are then those of all seeds together.
    """

    def measure(cell: pd.DataFrame) -> dict:
        one, other, units = pair_seeds(cell, a, b, on)
        if one.shape[1] == 1:
            return vars(stats.paired_difference(_side_by_side(one, other, units, a, b), a, b))
        counts = {"gained": int((one > other).sum()), "lost": int((one < other).sum())}
        return stats.pooled_mean(one - other, units, lowest=-1.0)._asdict() | counts

    return _by_cell(frame, by, measure, {"condition", "variant"} - {on}, ("p", "gained", "lost"))


def ratio(frame: pd.DataFrame, a: str, b: str, by: By = (), on: str = "condition") -> pd.DataFrame:
    """What `a` has right as a share of what `b` has right on the same problems of one seed."""

    def measure(cell: pd.DataFrame) -> dict:
        one, other, units = pair_seeds(cell, a, b, on)
        if one.shape[1] > 1:
            raise ValueError(f"ratio: {one.shape[1]} seeds in one cell: put seed into by; ratios are not pooled")
        return vars(stats.paired_ratio(_side_by_side(one, other, units, a, b), a, b))

    return _by_cell(frame, by, measure, {"condition", "variant"} - {on})


def over_pairs(cells: pd.DataFrame, by: By) -> pd.DataFrame:
    """What holds on average for pairs of models, of cells (`share`, `difference`, `ratio`) with a column `pair`.

    A pair counts once, with the mean of its seeds, and Student's interval is over the pairs: each has models, units and
    values of its own, so what moves its mean by chance, its problems included, is in what the pairs differ by.
    """
    means = cells.groupby([*([by] if isinstance(by, str) else by), "pair"], sort=False)["point"].mean()
    rows = []
    for key, found in means.groupby(level=list(range(means.index.nlevels - 1)), sort=False):
        if len(found) < 2:
            raise ValueError(f"over_pairs: {key} has one pair: what holds for others needs at least two")
        mean = stats.clustered_mean(found.to_numpy())
        ends = {"lowest": found.min(), "highest": found.max(), "spread": found.std(ddof=1), "n_pairs": len(found)}
        names = [by] if isinstance(by, str) else by
        rows.append(dict(zip(names, key if isinstance(key, tuple) else (key,), strict=True)) | vars(mean) | ends)
    return pd.DataFrame(rows).drop(columns=["n", "n_clusters"])


def pair_seeds(frame: pd.DataFrame, a: str, b: str, on: str = "condition") -> tuple:
    """Answers of `a` and of `b` in the seeds that have both, (problems, seeds) each, and the problems' units."""
    for name in (a, b):
        if not (frame[on] == name).any():
            there = ", ".join(map(str, frame[on].unique()))
            raise ValueError(f"`{name}` is no {on} of these answers (there are: {there})")
    both = frame[frame[on].isin([a, b])]
    both = both[both.groupby("seed")[on].transform("nunique") == len({a, b})]
    if both.empty:
        raise ValueError(f"`{a}` and `{b}` have no seed in common: they cannot be paired")
    answers, units = _spread(both, [on, "seed"])
    return answers[a].to_numpy(), answers[b].to_numpy(), units


def _spread(rows: pd.DataFrame, columns: list[str], value: str = "correct") -> tuple[pd.DataFrame, pd.Series | None]:
    """Values of several runs beside each other, (problems, runs), and units: refused where the problems differ."""
    if (twice := rows.duplicated(["id", *columns])).any():
        raise ValueError(f"id {rows['id'][twice].iloc[0]} occurs twice in one run: name one condition")
    refused = "these runs were not tested on the same problems ({} differs): they cannot be paired"
    answers, problems = rows.pivot(index="id", columns=columns, values=value), rows.groupby("id")
    if answers.isna().any(axis=None):
        raise ValueError(refused.replace("{} differs", "ids differ"))
    for column in [c for c in SAME_PROBLEM if c in rows]:
        if (apart := problems[column].nunique() > 1).any():  # a kept run may not know it
            raise ValueError(refused.format(f"{column} of {apart.idxmax()}"))
    return answers.astype(float), problems["unit"].first() if "unit" in rows else None


def _side_by_side(one: np.ndarray, other: np.ndarray, units: pd.Series | None, a: str, b: str) -> pd.DataFrame:
    unit = None if units is None else units.to_numpy()
    return pd.DataFrame({f"{a}_correct": one[:, 0], f"{b}_correct": other[:, 0], "unit": unit})


def _by_cell(
    frame: pd.DataFrame, by: By, measure: Callable[[pd.DataFrame], dict], apart: set[str], more: Sequence[str] = ()
) -> pd.DataFrame:
    """A row for each cell of `by`, in the order of the frame; columns in `apart` may not be mixed in one cell."""
    by = [by] if isinstance(by, str) else list(by)
    if frame.empty:
        raise ValueError("no answers to count: the table is empty")
    frame, rows = frame if "seed" in frame else frame.assign(seed=1), []
    for key, cell in frame.groupby(by, sort=False, observed=True, dropna=False) if by else [((), frame)]:
        for column in sorted(apart - set(by)):
            if column in cell and cell[column].nunique() > 1:
                raise ValueError(f"several values of `{column}` in one cell: put {column} into by, or select one")
        rows.append(dict(zip(by, key, strict=True)) | {"n_seeds": 1} | measure(cell))
    found = pd.DataFrame(rows).rename(columns={"difference": "point", "n_clusters": "n_units"})
    return found[[*by, "point", "low", "high", "n", "n_units", "n_seeds", *more]]
