"""How many bits a message carries about the facts, from the values that the bridged answers name.

    carried_bits(rows["value"], said_values(rows), VALUES, rows["unit"])      # an Interval, in bits an answer

The estimator is a cross-fitted lower bound on the mutual information of true and said value (Barber and Agakov 2003):
the mean of log2 q(true | said) / p(true). p is the uniform prior that the values were drawn from. q is fitted on nine
tenths of the units and scored on the last, ten times: how much more often than by chance a said value lies d beside the
true one. A plug-in estimate would count noise as information: 48 values make 2,304 cells, which 2,000 answers leave
mostly empty. For answers that have nothing to do with the truth, and for perfect ones (log2 48 = 5.58), at n = 2,000:

| estimator               | independent | perfect |
|-------------------------|-------------|---------|
| plug-in                 | 0.91        | 5.57    |
| Miller-Madow            | 0.47        | 5.59    |
| cross-fitted (used)     | -0.04       | 5.58    |

`python -m pytest tests/test_capacity.py` computes this table again. The bound is below what is there where errors
depend on more than the distance.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Sequence

import numpy as np

from bridgekit.results.statistics import Interval
from bridgekit.tasks.units import FAMILIES

if typing.TYPE_CHECKING:
    import pandas as pd

STEPS = {family.name: family.steps for family in FAMILIES}
STEP = re.compile(r"<<(-?\d+)([-+*/])(-?\d+)=(-?\d+)>>")
FOLDS = 10
SMOOTHING = 0.1  # of an answer, added to each distance


def said_value(text: object, family: object) -> int | None:
    """The size of the unit that a worked answer names in its own steps; None where it names none.

    Every family multiplies by the unit's value in one known step, as the right factor.
    """
    if not isinstance(text, str) or family not in STEPS:
        return None
    place = next(i for i, step in enumerate(STEPS[family]) if step.endswith("*v"))
    steps = STEP.findall(text.split("####")[0])
    if len(steps) <= place or steps[place][1] != "*":
        return None
    return int(steps[place][2])


def said_values(rows: pd.DataFrame) -> list[int | None]:
    """What each bridged answer of an evaluation says; a study is kept without texts, but with this."""
    if "bridged_said" in rows:
        return [None if said != said else int(said) for said in rows["bridged_said"].astype(float)]
    return [said_value(text, family) for text, family in zip(rows["bridged_full"], rows["family"], strict=True)]


def carried_bits(
    values: Sequence[int], said: Sequence[int | None], alphabet: Sequence[int], units: Sequence | None = None,
    level: float = 0.95,
) -> Interval:  # fmt: skip
    """Bits of the true value that an answer carries, a lower bound; interval over units.

    `values` must have been drawn uniformly from `alphabet`. An answer that names no value carries none.
    """
    from scipy.special import stdtrit

    scores, codes = score_answers(values, said, alphabet, units)
    sums, sizes = np.bincount(codes, weights=scores), np.bincount(codes)
    n_units, mean = len(sizes), float(scores.mean())
    if n_units < 2:
        raise ValueError("bits: all answers are about one unit: an interval needs at least two")
    spread = float(((sums - mean * sizes) ** 2).sum()) * n_units / (n_units - 1)
    half = float(-stdtrit(n_units - 1, (1 - level) / 2)) * math.sqrt(spread) / len(scores)
    return Interval(mean, mean - half, mean + half, len(scores), n_units)


def score_answers(values, said, alphabet, units=None) -> tuple[np.ndarray, np.ndarray]:
    """log2 q(true | said) / p(true) of each answer, and its unit as 0..J-1. (n,), (n,)"""
    import pandas as pd

    true, alphabet = np.asarray(values, dtype=int), np.asarray(sorted(alphabet), dtype=int)
    if len(true) == 0 or len(said) != len(true):
        raise ValueError(f"bits: {len(true)} values and {len(said)} answers: give one answer for each value")
    if not np.isin(true, alphabet).all():
        raise ValueError(f"bits: value {true[~np.isin(true, alphabet)][0]} is not in the alphabet it was drawn from")
    codes = np.arange(len(true)) if units is None else pd.factorize(pd.Series(units))[0]
    told = np.array([s is not None and s == s for s in said])
    guess = np.array([int(s) if t else alphabet[0] for s, t in zip(said, told, strict=True)])
    # beyond the alphabet's own width all said values are equally far off
    width = int(alphabet[-1] - alphabet[0])
    guess = np.clip(guess, alphabet[0] - width - 1, alphabet[-1] + width + 1)
    fold = np.random.default_rng(0).permutation(int(codes.max()) + 1)[codes] % FOLDS
    scores = np.zeros(len(true))
    for f in range(min(FOLDS, int(codes.max()) + 1)):
        fit, test = told & (fold != f), told & (fold == f)
        lift = _lift(true[fit], guess[fit], alphabet, width)
        at = _distance(alphabet[None, :], guess[test][:, None], width)  # (answers, values)
        chosen = _distance(true[test], guess[test], width)
        scores[test] = np.log2(len(alphabet) * lift[chosen] / lift[at].sum(axis=1))
    return scores, codes


def _distance(true: np.ndarray, said: np.ndarray, width: int) -> np.ndarray:
    """True minus said value, as an index from 0 to 4 width + 2; said values lie at most width + 1 outside."""
    return true - said + 2 * width + 1


def _lift(true: np.ndarray, said: np.ndarray, alphabet: np.ndarray, width: int) -> np.ndarray:
    """For each distance: how often it occurred, divided by how often it would if said values told nothing."""
    n = 4 * width + 3
    found = np.bincount(_distance(true, said, width), minlength=n)
    by_chance = np.bincount(_distance(alphabet[None, :], said[:, None], width).ravel(), minlength=n) / len(alphabet)
    return (found + SMOOTHING) / (by_chance + SMOOTHING)


def said_from_message(said: Sequence[int | None], facts: Sequence[str]) -> list[bool]:
    """Whether each answer says the value of any fact that its message was made from, the one asked about or another.

    A message may bring the values across and not which word has which: then this is near one, and bits are few.
    """
    return [
        value is not None and value in {int(number) for number in re.findall(r" is (\d+)\.", stated)}
        for value, stated in zip(said, facts, strict=True)
    ]


def message_bits(bits: Interval, n_facts: int, view: str) -> Interval:
    """Bits in one message: a message made from the facts alone, before the question, must hold each of them."""
    times = n_facts if view == "facts" else 1
    return Interval(times * bits.point, times * bits.low, times * bits.high, bits.n, bits.n_clusters)
