"""What stands under a figure in words, computed from what it shows: a notebook holds no typed number.

print(read_curve(curve_from_metrics("runs/x/metrics.jsonl")))
"""

from __future__ import annotations

import math
import typing

from bridgekit.config import Config, load_config, prompt_mode, to_flat
from bridgekit.results.style import LABELS
from bridgekit.results.verdict import donor_follow, recovery, select_subset

if typing.TYPE_CHECKING:
    import pandas as pd

CONTROLS = ("shuffled", "constant", "constant_natural", "self_bridge", "zero", "noise")


def read_changes(config: Config) -> str:
    """The keys in which a configuration differs from the package's defaults, a line each; the prompt mode's reason."""
    usual = to_flat(load_config())
    changes = [
        f"{key}: {value!r} (default {usual[key]!r})" for key, value in to_flat(config).items() if value != usual[key]
    ]
    return "\n".join([*(changes or ["every key has its default"]), *read_prompt_mode(config)])


def read_prompt_mode(config: Config) -> list[str]:
    """Why the literal question is in or out, where the teacher is the prompt; else nothing."""
    if prompt_mode(config) != "soft_only":
        return []
    if config.bridge.prompt_mode == "soft_only":
        return [
            "The bridge is taught to be the prompt (bridge.teacher: prompt), so it stands alone: prompt_mode soft_only."
        ]
    return [
        "The bridge is taught to be the prompt, and the literal prompt is kept beside it (prompt_mode: soft_plus_text "
        "overrides the soft_only that `auto` chooses): the target reads its question twice."
    ]


def read_curve(curve: pd.DataFrame) -> str:
    """Where the bridge was best, and from which step on its interval lay above the target alone."""
    bridged = curve[curve["condition"] == "bridged"].sort_values("step")
    best = bridged.loc[bridged["accuracy"].idxmax()]
    text = (
        f"Best on validation: {_share(best)} at step {best['step']:,} of {bridged['step'].max():,}, "
        f"which is the checkpoint that is evaluated."
    )
    target = curve.loc[curve["condition"] == "target", "accuracy"]
    if target.empty:
        return text
    level = target.iloc[-1]
    below = bridged.loc[bridged["low"] <= level, "step"]
    above = bridged.loc[bridged["step"] > (below.max() if len(below) else -1), "step"]
    if above.empty:
        return f"{text} At the end its interval does not lie above the target alone ({level:.3f})."
    return f"{text} From step {above.min():,} on its interval lies above the target alone ({level:.3f})."


def read_conditions(table: pd.DataFrame) -> str:
    """The bridge, the target and the strongest control on the mix of held-out problems."""
    rows = table[table["subset"] == "all"].set_index("condition")
    bridged, target = _share(rows.loc["bridged"]), _share(rows.loc["target"])
    text = f"Of {rows['n'].iloc[0]:,} held-out problems the target has {bridged} right bridged, {target} alone."
    controls = [name for name in CONTROLS if name in rows.index]
    if controls:
        best = rows.loc[controls, "accuracy"].idxmax()
        text += f" The strongest control, {LABELS[best]}, reaches {_share(rows.loc[best])}."
    return text


def read_groups(frame: pd.DataFrame) -> str:
    """What is recovered on units the bridge never saw, and whether answers follow the donor."""
    parts = []
    for subset, label in (
        ("source_only_held_unit", "held-out units"),
        ("source_only_held_value", "units of a held-out value"),
    ):
        rows = select_subset(frame, subset, allow_empty=True)
        if len(rows) and "target_told_correct" in rows and rows["target_told_correct"].any():
            share = recovery(frame, subset=subset)
            size = f"{share.n:,} problems about {share.n_clusters:,} {label}"
            if math.isfinite(share.high):
                parts.append(
                    f"On {size}, known to the source alone, the bridge recovers {share} "
                    "of what the target has right once it is told the fact."
                )
            else:
                parts.append(f"On {size}, known to the source alone, there is too little for an interval.")
    if "shuffled_extracted" in frame and "donor_gold" in frame and frame["donor_gold"].notna().any():
        share = donor_follow(frame, "source_only")
        parts.append(
            f"Given another question's message, {share} of the source-only answers are what the "
            "other question's fact makes them."
        )
    return " ".join(parts) or "This task has no knowledge groups."


def read_minutes(seconds: dict[str, float]) -> str:
    """A Markdown table of where a run's time went, the longest first."""
    total = sum(seconds.values())
    longest_first = sorted(seconds.items(), key=lambda item: -item[1])
    lines = ["| stage | minutes | share |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {spent / 60:.1f} | {spent / total:.0%} |" for name, spent in longest_first]
    return "\n".join([*lines, f"| all | {total / 60:.1f} | |"])


def _share(row: pd.Series) -> str:
    return f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
