"""Intervals, paired tests and power for answers that share units, of one training seed or pooled over several.

    difference = paired_difference(frame, "bridged", "target")  # bool `<condition>_correct`, clusters `unit`
    pooled = pooled_mean(right, units)                          # (problems, seeds): also for other seeds

Problems about one unit stand or fall together, so the unit is resampled, not the problem. A null unit, or no unit
column at all, makes each question its own cluster. The methods were chosen by their coverage at level 0.95 when units
of 2 to 4 problems are shared; `python tests/results/test_statistics.py` simulates this table again:

| interval                                    | mean of 36 cells | lowest cell |
|---------------------------------------------|------------------|-------------|
| difference: plain percentile over clusters  | 0.928            | 0.714       |
| difference: with Student tails              | 0.931            | 0.716       |
| difference: and pseudo-clusters (used)      | 0.961            | 0.939       |
| ratio: the same (used)                      | 0.955            | 0.938       |
| proportion: Wilson on the questions         | 0.864            | 0.736       |
| proportion: Wilson on effective n (used)    | 0.951            | 0.926       |

A cell is 1,000 draws (40 or 300 units, six sets of rates, correlation 0, 0.3 or 0.8), so it moves by 0.007.
"""

import math
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import pandas as pd
from scipy.special import bdtr, ndtr, ndtri, stdtr, stdtrit

from bridgekit.results.style import format_interval

TAIL = (1 - 0.95) / 2  # what every interval leaves out on each side
Z_TAIL, Z_POWER = NormalDist().inv_cdf(1 - TAIL), NormalDist().inv_cdf(0.8)  # of a test at 0.05 with power 0.8
ROUNDING = 1e-12  # what differs by less is equal


@dataclass(frozen=True)
class Interval:
    point: float
    low: float
    high: float
    n: int
    n_clusters: int

    def __str__(self) -> str:
        return format_interval(self.point, self.low, self.high)


# A mean over problems and training seeds, with its standard error, degrees of freedom and p, of a true mean of 0.
Pooled = namedtuple("Pooled", "point low high n n_clusters n_seeds error df p")


@dataclass(frozen=True)
class Difference:
    """Share right of `a` minus share right of `b` on the same questions; `gained`: right for `a` alone."""

    a: str
    b: str
    n: int
    n_clusters: int
    difference: float
    low: float
    high: float
    p: float
    gained: int
    lost: int
    mcnemar_p: float

    def __str__(self) -> str:
        return format_interval(self.difference, self.low, self.high, signed=True)


def wilson(k: float, n: float, effective_n: float | None = None) -> tuple[float, float]:
    """Score interval of k right out of n answers (Wilson 1927), of which only `effective_n` may be independent."""
    if not 0 <= k <= n or not n > 0:
        raise ValueError(f"wilson: {k} right of {n} is impossible; need 0 <= k <= n and n > 0")
    share, n, z = k / n, effective_n or n, Z_TAIL
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return float(max(0.0, min(share, centre - half))), float(min(1.0, max(share, centre + half)))


def clustered_proportion(correct: Sequence, clusters: Sequence | None = None) -> Interval:
    """Share right, with Wilson's interval on the effective n; one cluster tells nothing: it gives [0, 1].

    That is n over the design effect, an estimate: Student's quantile replaces the normal one (Korn and Graubard).
    """
    values, codes = _check_values(correct, "correct", binary=True), cluster_codes(clusters, len(correct))
    n, n_clusters, effective_n = len(values), int(codes.max()) + 1, None
    if n_clusters == 1:
        return Interval(float(values.mean()), 0.0, 1.0, n, 1)
    if n_clusters < n:
        wider = stdtrit(n_clusters - 1, TAIL) / Z_TAIL
        effective_n = float(n / (_design_effect(values, codes) * wider**2))
    return Interval(float(values.mean()), *wilson(float(values.sum()), n, effective_n), n, n_clusters)


def clustered_mean(values: Sequence, clusters: Sequence | None = None) -> Interval:
    """Mean of any number per question, with Student's interval on the clusters' own sums (linearised variance).

    One cluster tells nothing: its interval is infinite.
    """
    numbers, codes = _check_values(values, "values"), cluster_codes(clusters, len(values))
    mean, n_clusters = float(numbers.mean()), int(codes.max()) + 1
    if n_clusters == 1:
        return Interval(mean, -math.inf, math.inf, len(numbers), 1)
    residuals = np.bincount(codes, weights=numbers - mean)
    error = math.sqrt(n_clusters / (n_clusters - 1) * (residuals**2).sum()) / len(numbers)
    half = -float(stdtrit(n_clusters - 1, TAIL)) * error
    return Interval(mean, mean - half, mean + half, len(numbers), n_clusters)


def pooled_mean(values: np.ndarray, clusters: Sequence | None = None, lowest: float = 0.0) -> Pooled:
    """Mean of (problems, seeds) answers, or differences (lowest -1), uncertain for other problems *and* other seeds.

    Its variance is the sum of two: over units, of the values averaged over seeds, and over seeds, of each seed's mean;
    the degrees of freedom are Satterthwaite's. Answer noise enters both, so the interval is conservative: with 435
    problems about 290 units and three seeds that deviate by 0, 0.02 and 0.1 it covered 0.98, 0.97 and 0.93. Two answers
    are added, one gained and one lost: without them equal answers would have no uncertainty at all.
    """
    codes, mean = cluster_codes(clusters, len(values)), float(values.mean())
    (n, n_seeds), n_clusters = values.shape, int(codes.max()) + 1
    sums, sizes = np.bincount(codes, weights=values.mean(axis=1)), np.bincount(codes)
    spread = float(((sums - mean * sizes) ** 2).sum()) + 2
    variance, df = (n_clusters + 2) / (n_clusters + 1) * spread / (n + 2) ** 2, n_clusters + 1
    if n_seeds > 1:
        over_units, over_seeds = variance, float(values.mean(axis=0).var(ddof=1)) / n_seeds
        variance = over_units + over_seeds
        df = variance**2 / (over_units**2 / (n_clusters + 1) + over_seeds**2 / (n_seeds - 1))
    error = math.sqrt(variance)
    half, p = float(stdtrit(df, 1 - TAIL)) * error, float(2 * stdtr(df, -abs(mean) / error))
    return Pooled(mean, max(lowest, mean - half), min(1.0, mean + half), n, n_clusters, n_seeds, error, df, p)


def read_correct(frame: pd.DataFrame, condition: str) -> np.ndarray:
    """Right or wrong for each row of a frame; refused where the condition has not answered every question."""
    column = f"{condition}_correct"
    if column not in frame:
        raise ValueError(f"no column `{column}`: condition `{condition}` was not evaluated")
    return _check_values(frame[column], column, binary=True).astype(bool)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact binomial p of b questions right for one alone against c right for the other alone."""
    return min(1.0, 2 * float(bdtr(min(b, c), b + c, 0.5)))


def paired_difference(frame: pd.DataFrame, a: str, b: str, n_boot: int = 10_000) -> Difference:
    """Accuracy of condition `a` minus that of `b`; interval and two-sided p by bootstrap over clusters."""
    if a == b:
        raise ValueError(f"paired_difference: `{a}` compared with itself; name two conditions")
    # one order for the draws, so that a - b and b - a are exact opposites
    right, n_clusters, sums = _resample_pairs(frame, *sorted((a, b)), n_boot)
    moved, replicates = right[0] - right[1], (sums[0] - sums[1]) / sums[2]
    point, gained, lost = float(moved.mean()), int((moved > 0).sum()), int((moved < 0).sum())
    low, high = _percentiles(replicates, point, n_clusters)
    # p with the +1 correction, through the same Student tails as the interval
    smaller_side = min((replicates <= ROUNDING).sum(), (replicates >= -ROUNDING).sum())
    quantile = ndtri(min(1.0, 2 * (1 + smaller_side) / (1 + n_boot)) / 2)
    p = float(2 * stdtr(n_clusters - 1, quantile / math.sqrt(n_clusters / (n_clusters - 1))))
    if a > b:
        point, low, high, gained, lost = -point, -high, -low, lost, gained
    return Difference(a, b, len(frame), n_clusters, point, low, high, p, gained, lost, mcnemar_exact(gained, lost))


def paired_ratio(frame: pd.DataFrame, a: str, b: str, n_boot: int = 10_000) -> Interval:
    """Answers `a` has right as a share of those `b` has right on the same questions (may exceed 1)."""
    right, n_clusters, sums = _resample_pairs(frame, a, b, n_boot)
    if not right[1].any():
        raise ValueError(f"`{b}` has none of {len(frame)} questions right: nothing to take a share of")
    # a replicate in which b has nothing right bounds the share from nowhere: it counts as infinite
    replicates = np.divide(sums[0], sums[1], out=np.full(n_boot, np.inf), where=sums[1] > ROUNDING)
    point = float(right[0].sum() / right[1].sum())
    return Interval(point, *_percentiles(replicates, point, n_clusters), len(frame), n_clusters)


def holm(pvalues: dict) -> dict:
    """Holm's step-down adjusted p values, in the order given."""
    ordered = pd.Series(pvalues, dtype=float).sort_values(kind="stable")
    adjusted = (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1.0)
    return {name: float(adjusted[name]) for name in pvalues}


def n_for_effect(effect: float, discordance: float) -> int:
    """Number of independent pairs at which a two-sided McNemar test at 0.05 finds `effect` with power 0.8.

    n = (z_a sqrt(D) + z_b sqrt(D - effect^2))^2 / effect^2, with D the share of pairs that differ (Connor 1987).
    """
    if not 0 < abs(effect) <= discordance + ROUNDING <= 1 + 2 * ROUNDING:
        raise ValueError(f"n_for_effect: need 0 < effect <= discordance <= 1, got {effect} and {discordance}")
    spread = Z_TAIL * math.sqrt(discordance) + Z_POWER * math.sqrt(max(0.0, discordance - effect**2))
    return math.ceil((spread / effect) ** 2)


def minimum_detectable_effect(n: int, discordance: float, n_clusters: int | None = None, icc: float = 0.0) -> float:
    """Smallest accuracy difference n pairs in n_clusters can find: `n_for_effect` solved for it; 1.0 means none."""
    if n < 1 or not 0 < discordance <= 1 or not 1 <= (n_clusters or n) <= n:
        raise ValueError(f"minimum_detectable_effect: impossible n={n}, {discordance=} or {n_clusters=}")
    effective_n = n / (1 + (n / (n_clusters or n) - 1) * icc)
    # with u = sqrt(D - effect^2) it is (n + z_b^2) u^2 + 2 z_a z_b sqrt(D) u + (z_a^2 - n) D = 0
    half_b, lead = Z_TAIL * Z_POWER * math.sqrt(discordance), effective_n + Z_POWER**2
    root = math.sqrt(max(0.0, half_b**2 - lead * (Z_TAIL**2 - effective_n) * discordance))
    u = (root - half_b) / lead
    return 1.0 if u < 0 else math.sqrt(discordance - u**2)


def intraclass_correlation(values: Sequence, clusters: Sequence | None) -> float:
    """One-way ANOVA estimate of the correlation inside clusters, clipped to [0, 1]; 0 where each has one member.

    1, the cautious answer, where the values never vary or there is one cluster only: such data say nothing about it.
    """
    values, codes = np.asarray(values, dtype=float), cluster_codes(clusters, len(values))
    sizes, sums = np.bincount(codes), np.bincount(codes, weights=values)
    n, n_clusters = len(values), len(sizes)
    if n_clusters == n:
        return 0.0
    between, within = ((sums**2) / sizes).sum(), (values**2).sum()
    within_mean = (within - between) / (n - n_clusters)
    if n_clusters == 1 or within - sums.sum() ** 2 / n < ROUNDING * n:
        return 1.0
    between_mean = (between - sums.sum() ** 2 / n) / (n_clusters - 1)
    usual_size = (n - (sizes**2).sum() / n) / (n_clusters - 1)
    icc = (between_mean - within_mean) / (between_mean + (usual_size - 1) * within_mean)
    return float(min(1.0, max(0.0, icc)))


def _design_effect(values: np.ndarray, codes: np.ndarray) -> float:
    """How many of these correlated answers are worth one independent answer (Kish)."""
    sizes = np.bincount(codes)
    return 1 + (float((sizes**2).sum() / sizes.sum()) - 1) * intraclass_correlation(values, codes)


def _resample_pairs(frame: pd.DataFrame, a: str, b: str, n_boot: int) -> tuple[np.ndarray, int, np.ndarray]:
    """Right of (a, b), the number of clusters, and sums of (a, b, size) over n_boot draws of as many clusters.

    Two pseudo-clusters join the draw, one gained and one lost, as Bonett and Price (2012) add one to each discordant
    count: without them, data in which nothing differs would claim [0, 0] with certainty. Each stands for one
    independent answer, so it weighs as much as a design effect of correlated ones. With no discordant pair in n
    independent questions the interval is about +-3/n, the rule of three.
    """
    right = np.stack([read_correct(frame, a), read_correct(frame, b)]).astype(float)  # (2, questions)
    codes = cluster_codes(frame.get("unit"), len(frame))
    if codes.max() == 0:
        raise ValueError(f"all {len(codes)} questions are one `unit`: an interval needs at least two")
    weight = _design_effect(right[0] - right[1], codes)
    sums = [np.bincount(codes, weights=right[0]), np.bincount(codes, weights=right[1]), np.bincount(codes)]
    # equal clusters are drawn together: a multinomial over the distinct ones is the same bootstrap, but fast
    kinds, counts = np.unique(np.stack(sums), axis=1, return_counts=True)
    kinds = np.concatenate([kinds, [[weight, 0], [0, weight], [weight, weight]]], axis=1)  # (3, kinds)
    counts = np.append(counts, [1, 1])
    draws = np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=n_boot)
    return right, int(codes.max()) + 1, kinds @ draws.T  # (3, n_boot)


def _percentiles(replicates: np.ndarray, point: float, n_clusters: int) -> tuple[float, float]:
    """Percentile interval with Student's tails, sqrt(J/(J-1)) wider (Hesterberg 2015); the point is never outside."""
    tail = ndtr(stdtrit(n_clusters - 1, TAIL) * math.sqrt(n_clusters / (n_clusters - 1)))
    low, high = np.quantile(replicates, [tail, 1 - tail], method="inverted_cdf")  # infinite values allowed
    return min(float(low), point), max(float(high), point)


def _check_values(values: Sequence, name: str, binary: bool = False) -> np.ndarray:
    """The values as numbers; refused where nothing can be counted, or not everything."""
    numbers = pd.Series(values).to_numpy(dtype=float)
    counted = int(np.isfinite(numbers).sum())
    if counted < max(1, len(numbers)):
        raise ValueError(f"`{name}` misses {len(numbers) - counted} of {len(numbers)} values: evaluate every question")
    if binary and not np.isin(numbers, (0, 1)).all():
        raise ValueError(f"`{name}` must hold only right (True) and wrong (False)")
    return numbers


def cluster_codes(clusters: Sequence | None, n: int) -> np.ndarray:
    """Clusters as 0..J-1; null is a cluster of its own, because nothing says what it would share."""
    if clusters is None:
        return np.arange(n)
    codes = pd.factorize(pd.Series(clusters))[0]
    codes[codes < 0] = codes.max() + 1 + np.arange((codes < 0).sum())
    return codes
