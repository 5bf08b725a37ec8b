"""Realistic synthetic frames for the tests of the figures, the figures of them, ways to read them back."""

import functools

import numpy as np
import pandas as pd

from bridgekit.inside.figures_attention import plot_attention, plot_attention_classes
from bridgekit.results.figures_runs import plot_accuracy_curve, plot_conditions, plot_groups
from bridgekit.results.figures_studies import (
    plot_differences,
    plot_faults,
    plot_headroom,
    plot_recovery,
)
from bridgekit.results.statistics import wilson
from bridgekit.results.verdict import judge

# Accuracy of each condition on: source-only seen, held-out units, held-out values, target-only, both.
ACCURACY = {
    "source": (0.876, 0.874, 0.870, 0.050, 0.912),
    "target": (0.046, 0.042, 0.050, 0.914, 0.906),
    "bridged": (0.870, 0.776, 0.740, 0.916, 0.906),
    "target_suffix": (0.044, 0.042, 0.048, 0.914, 0.906),
    "target_told": (0.920, 0.915, 0.910, 0.916, 0.910),
    "zero": (0.050, 0.044, 0.050, 0.850, 0.840),
    "noise": (0.060, 0.050, 0.040, 0.800, 0.790),
    "shuffled": (0.070, 0.066, 0.050, 0.880, 0.870),
    "constant": (0.156, 0.060, 0.055, 0.904, 0.896),
    "constant_natural": (0.120, 0.055, 0.050, 0.910, 0.900),
    "self_bridge": (0.160, 0.062, 0.060, 0.910, 0.900),
    "relay_full": (0.850, 0.840, 0.830, 0.600, 0.920),
    "relay_cut": (0.310, 0.300, 0.290, 0.720, 0.900),
    "relay_answer": (0.870, 0.865, 0.860, 0.400, 0.930),
    "router": (0.700, 0.690, 0.680, 0.860, 0.930),
    "union": (0.885, 0.880, 0.880, 0.920, 0.975),
}
SIZES = {
    "source_only_seen": (160, 80),
    "source_only_held_unit": (300, 150),
    "source_only_held_value": (120, 60),
}
SIZES |= {"target_only": (920, 300), "both": (500, 170)}
TOKENS = "▁Hal ▁has ▁9 ▁s is ak ▁of ▁pins ▁and ▁finds ▁ 1 4 ▁more . ▁How ▁many ▁pins ? Ċ".split()


def interval_row(accuracy, n):
    low, high = wilson(round(accuracy * n), n)
    return {"accuracy": round(accuracy * n) / n, "low": low, "high": high}


def conditions_table():
    rows = []
    for name, values in ACCURACY.items():
        mix = sum(a * n for a, (n, _) in zip(values, SIZES.values(), strict=True)) / 2000
        parts = {"all": (mix, 2000, 760)}
        parts |= {s: (a, n, units) for a, (s, (n, units)) in zip(values, SIZES.items(), strict=True)}
        for subset, (a, n, units) in parts.items():
            sizes = {"condition": name, "subset": subset, "n": n, "n_units": units, "invalid": 0}
            rows.append(sizes | interval_row(a, n))
    return pd.DataFrame(rows).sample(frac=1, random_state=0)  # the order of rows must not matter


def evaluation(seed=5):
    """600 problems on 200 units, each of one group and novelty, right at random at the rates above."""
    generator, rows = np.random.default_rng(seed), []
    places = [("source_only", "seen"), ("source_only", "held_unit"), ("source_only", "held_value")]
    places += [("target_only", "held_unit"), ("both", "held_unit")]
    for i, place in enumerate(np.repeat(generator.choice(5, 200, p=[0.1, 0.15, 0.1, 0.4, 0.25]), 3)):
        group, novelty = places[place]
        row = {"index": i, "id": f"p{i}", "unit": f"unit{i // 3}", "group": group, "novelty": novelty}
        right = {f"{c}_correct": bool(generator.random() < ACCURACY[c][place]) for c in ACCURACY if c != "union"}
        rows.append(row | right)
    return pd.DataFrame(rows)


def accuracy_curve(seeds=(1,)):
    rows = []
    for seed in seeds:
        noise = np.random.default_rng(seed).normal(0, 0.012, 15)
        for i, step in enumerate(range(0, 701, 50)):
            bridged = 0.713 if step == 0 else 0.894 - 0.35 * np.exp(-step / 130) + noise[i]
            now = {"source": 0.493, "target": 0.713, "bridged": bridged, "union": 0.93, "target_told": 0.912}
            for name, a in now.items():
                sizes = {"step": step, "condition": name, "seed": seed, "n": 256, "n_units": 180}
                rows.append(sizes | interval_row(a, 256))
    return pd.DataFrame(rows)


def differences():
    rows = [
        ("bridged \N{MINUS SIGN} target", 0.166, 0.130, 0.200, 2000, 760, True),
        ("bridged \N{MINUS SIGN} constant", 0.171, 0.135, 0.207, 2000, 760, True),
        ("bridged \N{MINUS SIGN} self-bridge", 0.011, -0.012, 0.034, 2000, 760, False),
        ("bridged \N{MINUS SIGN} shuffled, source-only", 0.710, 0.660, 0.760, 300, 150, True),
    ]
    return pd.DataFrame(rows, columns=["label", "difference", "low", "high", "n", "n_clusters", "holds"])


def faults():
    steps = {
        "the seeds' design": 0.14,
        "+ answer teacher replaced by sampled tokens": 0.45,
        "+ answer likelihood": 0.67,
    }
    rows = []
    for label, a in (steps | {"+ resampler in place of the DiT": 0.78, "+ larger lexicon": 0.9}).items():
        for seed in (1, 2, 3):
            row = interval_row(a + (seed - 2) * 0.02, 150)
            row["recovery"] = row.pop("accuracy")
            rows.append({"step_label": label, "seed": seed, "target": 0.042, "target_told": 0.915} | row)
    return pd.DataFrame(rows)


def recovery():
    rows = []
    for label in ("development lexicon", "fresh lexicon 1", "fresh lexicon 2"):
        for producer, a in (("dit", 0.92), ("resampler", 0.96), ("constant", 0.08)):
            for seed in (1, 2, 3):
                value = a + (seed - 2) * 0.008
                row = {"label": label, "producer": producer, "seed": seed, "recovery": value}
                rows.append(row | {"low": value - 0.03, "high": value + 0.025})
    return pd.DataFrame(rows)


def headroom():
    names = ["label", "source_only", "both", "target_only", "neither"]
    rows = [("Mistral to Llama", 7, 101, 53, 39), ("embedded pair", 470, 610, 900, 20)]
    return pd.DataFrame(rows, columns=names)


def attention(n_soft=16, tokens=TOKENS):
    weights = np.random.default_rng(0).gamma(0.3, 1, (n_soft, len(tokens)))
    weights[:, 3:6] += 2
    return weights / weights.sum(axis=1, keepdims=True)


def attention_classes():
    rows = [
        ("unit word", 0.58, 0.55, 0.61, 0.12),
        ("numbers", 0.17, 0.15, 0.19, 0.16),
        ("other", 0.25, 0.2, 0.3, 0.72),
    ]
    return pd.DataFrame(rows, columns=["token_class", "share", "low", "high", "uniform"])


FIGURES = {
    "accuracy": lambda: plot_accuracy_curve(accuracy_curve().drop(columns="seed"), title="One run"),
    "accuracy_seeds": lambda: plot_accuracy_curve(accuracy_curve((1, 2, 3))),
    "conditions": lambda: plot_conditions(conditions_table()),
    "conditions_held": lambda: plot_conditions(conditions_table(), "source_only_held_unit"),
    "groups": lambda: plot_groups(conditions_table()),
    "differences": lambda: plot_differences(differences()),
    "verdict": lambda: plot_differences(judge([evaluation(), evaluation(seed=6)]).differences()),
    "faults": lambda: plot_faults(faults()),
    "recovery": lambda: plot_recovery(recovery()),
    "headroom": lambda: plot_headroom(headroom()),
    "attention": lambda: plot_attention(attention(), TOKENS, title="What the soft tokens read"),
    "attention_long": lambda: plot_attention(attention(64, TOKENS * 9), TOKENS * 9),
    "attention_classes": lambda: plot_attention_classes(attention_classes()),
}


@functools.cache
def drawn(name):
    """The figure of that name, drawn once for all tests that only look at it."""
    return FIGURES[name]()


def marks(fig, gid):
    return fig.findobj(lambda artist: artist.get_gid() == gid)


def mark(fig, gid):
    (only,) = marks(fig, gid)
    return only


def span(artist):
    """(low, high) of a drawn interval, whichever way it runs."""
    (segment,) = artist.get_segments()
    along = np.ptp(segment, axis=0).argmax()
    return tuple(segment[:, along])


def broken(frame, column, value, row=0):
    """The frame with one cell changed."""
    frame = frame.reset_index(drop=True)
    frame[column] = frame[column].astype(object)
    frame.loc[row, column] = value
    return frame
