"""Frames such as the statistics give, for the tests of figures and tables."""

import numpy as np
import pandas as pd
import pytest

from bridgekit.config import CONDITIONS
from bridgekit.results.statistics import wilson

SIZES = {"all": (2000, 760), "source_only_seen": (160, 80), "source_only_held_unit": (300, 150)}
SIZES |= {"source_only_held_value": (120, 60), "target_only": (920, 300), "both": (500, 170)}


def interval_row(share, n):
    low, high = wilson(round(share * n), n)
    return {"point": round(share * n) / n, "low": low, "high": high}


@pytest.fixture
def conditions():
    """As `conditions_table`, in an order of rows that must not matter."""
    rows, generator = [], np.random.default_rng(0)
    for name in CONDITIONS:
        for subset, (n, units) in SIZES.items():
            row = {"condition": name, "subset": subset, "n": n, "n_units": units}
            rows.append(row | interval_row(generator.uniform(0.02, 0.99), n))
    return pd.DataFrame(rows).sample(frac=1, random_state=0).rename(columns={"point": "accuracy"})


@pytest.fixture
def compared():
    """As `compare_variants`: two variants and a replicate on two subsets, one difference that holds."""
    rows = []
    for name, difference, holds in (("kl", -0.2, True), ("info_nce", 0.01, False), ("b2", 0.0, False)):
        for subset, scale, n in (("source_only_held_unit", 1.0, 393), ("all", 0.2, 2000)):
            value = difference * scale
            row = {"variant": name, "reference": "base", "subset": subset, "point": value, "low": value - 0.05}
            row |= {"high": value + 0.05, "n": n, "n_units": n - 100, "n_seeds": 3}
            row["adjusted_p"] = 0.0004 if holds else 1.0
            row |= {"by_seed": [value - 0.02, value, value + 0.02], "replicates": "base" if name == "b2" else ""}
            rows.append(row | {"holds": holds, "smallest_effect": 0.08})
    return pd.DataFrame(rows)


@pytest.fixture
def along():
    """As `read_axis`: two producers, two numbers of facts, two seeds, of which one has no run with 64 soft tokens."""
    rows = []
    for producer in ("resampler", "dit"):
        for k, facts, seed in ((k, f, s) for k in (1, 4, 16, 64) for f in (1, 16) for s in (1, 2)):
            if (k, seed) != (64, 2):
                share = 0.1 * np.log2(2 * k) + seed / 100
                row = {"seed": seed, "producer": producer, "n_soft_tokens": k, "train_units": 45 * k, "n_facts": facts}
                row |= {"point": share, "low": share - 0.1, "high": share + 0.1, "n": 393, "n_units": 293}
                for column, value in {"in_message": share + 0.2, "bits_per_token": facts * share / k}.items():
                    row |= {column: value, f"{column}_low": 0.9 * value, f"{column}_high": 1.1 * value}
                rows.append(row)
    return pd.DataFrame(rows)
