"""The figures that every run or study has, each a call of `rows` or `lines` (draw.py); what only a paper needs is a
call in its notebook.

    fig = plot_conditions(conditions_table(load_eval("runs/x/eval_samples_step_final.jsonl")))
    fig = plot_curves(load_curve("runs/x/metrics.jsonl").assign(variant="x"))

They take frames as `verdict`, `compare` and `load_curve` give them, and never show or save.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from bridgekit.config import CONDITIONS
from bridgekit.results.compare import AXES
from bridgekit.results.draw import INK, finish_figure, lines, list_rows, open_panels, paper_figure, rows
from bridgekit.results.statistics import wilson
from bridgekit.results.style import COLORS, COLUMN, DASH, PAGE, words
from bridgekit.results.verdict import SELECTIONS
from bridgekit.runs import load_jsonl

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["lines", "rows"]  # the primitives, for notebooks

GROUP_SUBSETS = ("source_only_seen", "source_only_held_unit", "source_only_held_value", "target_only", "both")
GROUP_CONDITIONS = ("source", "target", "bridged", "shuffled", "constant", "target_told")
HEADROOM = {  # column: (label, colour, hatch); the source is right in the first two, the target in the middle two
    "source_only": ("only source right", COLORS["source"], "///"),
    "both": ("both right", "#f4ecd8", ""),
    "target_only": ("only target right", COLORS["target"], "\\\\\\"),
    "neither": ("neither right", "#ffffff", ""),
}
CAPACITY = {  # panel: columns of the value and its interval
    "right value, of told": ("point", "low", "high"),
    "any value of the message": ("in_message", "in_message_low", "in_message_high"),
    "bits per soft token": ("bits_per_token", "bits_per_token_low", "bits_per_token_high"),
}


def load_curve(metrics: str | Path) -> pd.DataFrame:
    """The validation accuracies of metrics.jsonl with Wilson intervals: step condition point low high n n_units.

    The interval's n is `n_effective` where the line has one, else the number of units: problems of one unit are right
    or wrong together. Of a step evaluated twice the last evaluation counts; the last line may still be being written.
    """
    broken: list[int] = []
    lines_of = list(load_jsonl(metrics, broken)) if Path(metrics).is_file() else []
    if broken and broken[0] <= len(lines_of):
        raise ValueError(f"{metrics}:{broken[0]}: not JSON; restore the file")
    found = []
    for step, result in sorted({line["step"]: line["eval"] for line in lines_of if "eval" in line}.items()):
        size = result.get("n_effective") or result.get("n_units") or result["n"]
        for name in [c for c in CONDITIONS if c in result]:
            low, high = wilson(result[name] * size, size)
            row = {"step": step, "condition": name, "point": result[name], "low": low, "high": high}
            found.append(row | {"n": result["n"], "n_units": result.get("n_units")})
    if not found:
        raise ValueError("metrics: no evaluation yet; the first one comes after train.eval_every steps")
    return pd.DataFrame(found)


def plot_conditions(
    table: pd.DataFrame, subset: str = "all", panel: str | None = None, title: str = "Who answers right?"
) -> Figure:
    """Every condition of `conditions_table` on one subset; with `panel`, a column, several runs side by side.

    The dashed line is the target alone.
    """
    table = table[table["subset"] == subset]
    target = table[table["condition"] == "target"].to_dict("records")
    levels = {(row[panel], "target") if panel else "target": row["accuracy"] for row in target}
    look = {"xlabel": f"accuracy, {words(subset)}".replace("\n", " "), "numbers": "point" if panel else "interval"}
    return rows(table, "condition", "accuracy", panel=panel, references=levels, title=title, **look)


def plot_groups(table: pd.DataFrame) -> Figure:
    """The conditions that matter by what the models know, a panel for each group of `conditions_table`."""
    table = table[table["condition"].isin(GROUP_CONDITIONS) & table["subset"].isin(GROUP_SUBSETS)]
    table = table.sort_values("subset", key=lambda names: names.map(GROUP_SUBSETS.index), kind="stable")
    title = "Who answers right, by which model knows the fact?"
    return rows(table, "condition", "accuracy", panel="subset", xlabel="accuracy", title=title)


def plot_differences(differences: pd.DataFrame) -> Figure:
    """The comparisons of a verdict (`differences()`), a row for each control and set of problems."""
    places = ["" if subset == "all" else f",\n{words(subset)} problems" for subset in differences["subset"]]
    controls, selections = differences["control"].str.partition(".")[[0, 2]].to_numpy().T
    chosen = ["" if name == "" else f",\n{SELECTIONS[name]}" for name in selections]
    names = zip(map(words, controls), chosen, places, strict=True)
    table = differences.assign(against=["".join(parts) for parts in names])
    look = {"signed": True, "xlabel": "accuracy of bridged minus that of the control"}
    look |= {"fill": ("holds", "shown to be better", "not shown"), "title": "Does the bridge beat its controls?"}
    return rows(table, "against", color="bridged", **look)


def plot_forest(compared: pd.DataFrame, title: str = "What does each change do?") -> Figure:
    """Each variant of a study minus the reference (`compare_variants`); a column `label` may name it in words.

    Full marks differ by Holm's p over the whole table; inside the grey band nothing could have been found.
    """
    names = compared["label"] if "label" in compared else compared["variant"].map(words)
    copies = [f" (again {words(of)})" if isinstance(of, str) and of else "" for of in compared["replicates"]]
    reach = {subset: _reach(part) for subset, part in compared.groupby("subset")}
    seeds = DASH.join(map(str, sorted({compared["n_seeds"].min(), compared["n_seeds"].max()})))
    look = {"xlabel": f"accuracy, bridged, minus that of '{words(compared['reference'].iloc[0])}' ({seeds} seeds)"}
    look |= {"signed": True, "sharex": False, "xlim": {s: (-limit, limit) for s, limit in reach.items()}}
    look |= {"fill": ("holds", "differs (Holm, p \N{LESS-THAN OR EQUAL TO} 0.05)", "no difference shown")}
    look |= {"band": ("smallest_effect", "too small to be found (power 0.8)"), "title": title}
    return rows(compared.assign(row=names + copies), "row", color="bridged", panel="subset", **look)


def _reach(part: pd.DataFrame) -> float:
    """How far the axis goes: what was measured, with the bands as far as they are not much wider.

    One variant that ruins everything would press all others onto the line: it lies outside, and an arrow says where.
    """
    far = part.apply(lambda row: max(map(abs, [row["low"], row["high"], *row["by_seed"]])), axis=1)
    reach = max(0.01, far[far <= 6 * far.median()].max())
    return min(1.08 * max(reach, part["smallest_effect"].max()), 1.5 * reach)


def plot_curves(curves: pd.DataFrame, reference: str = "") -> Figure:
    """Validation accuracy over steps, a panel for each variant; the mean of the reference is drawn in all others."""
    table = curves.assign(line="bridged", panel=curves["variant"].map(words))
    mean = table[table["variant"] == reference].groupby("step", as_index=False).mean(numeric_only=True)
    mean = mean.assign(low=mean["point"], high=mean["point"], line=f"mean of '{words(reference)}'")
    others = table.loc[table["variant"] != reference, "panel"].unique()
    table = pd.concat([table, *(mean.assign(panel=panel) for panel in others)], ignore_index=True)
    look = {"xlabel": "training step", "ylabel": "accuracy on\nvalidation", "width": PAGE, "height": 1.15}
    return lines(table, "step", color="line", panel="panel", title="Accuracy on validation during training", **look)


def plot_axis(frame: pd.DataFrame, axis: str) -> Figure:
    """What each run of a study brings across along the axis the study lies on; of several facts, guessing is dotted."""
    _, x, label = AXES[axis]
    look = {"bars": True, "log_x": True, "xlabel": label}
    if axis != "capacity":
        look |= {"color": "producer", "panel": "producer", "ylabel": "recovered, of told"}
        return lines(frame, x, references={"target_told": 1.0}, title=f"What the bridge recovers, by {label}", **look)
    told, named, _ = CAPACITY
    parts = [frame.assign(panel=p, point=frame[c], low=frame[a], high=frame[b]) for p, (c, a, b) in CAPACITY.items()]
    look |= {"references": {(told, n): 1 / n for n in sorted(frame["n_facts"].unique()) if n > 1}, "width": PAGE}
    look |= {"sharey": False, "ylim": dict.fromkeys([told, named], (-0.02, 1.04))}
    title = "How many facts does a message hold? (colour: facts in it; dotted: guessing among them)"
    return lines(pd.concat(parts), x, color="n_facts", panel="panel", title=title, **look)


@paper_figure
def plot_shares(frame: pd.DataFrame, y: str, looks: Mapping, xlabel: str, title: str, whole: bool = True) -> Figure:
    """A bar for each row, divided into counts or shares of the whole; `looks`: {column: (label, colour, hatch)}."""
    sizes, panels = frame[list(looks)].sum(axis=1), open_panels(frame)
    ax, _ = panels[None]
    list_rows(ax, [f"{label}\nn = {n:,}".strip() for label, n in zip(frame[y], sizes, strict=True)])
    left = 0 * sizes
    for name, (label, color, hatch) in looks.items():
        width = frame[name] / (sizes if whole else 1)
        face = {"fc": color, "hatch": hatch, "ec": INK, "lw": 0.5, "label": label, "gid": f"bar:{name}"}
        bars = ax.barh(range(len(frame)), width, 0.5, left, **face)
        numbers = ax.bar_label(bars, [f"{count:,}" if count else "" for count in frame[name]], label_type="center")
        for number, share in zip(numbers, width / (1 if whole else sizes.max()), strict=True):
            number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85})
            if share < 0.026 * len(number.get_text()):  # too narrow: the number stands above it
                number.set(position=(0, 11), bbox=None)
        left = left + width
    ax.set(xlim=(0, 1) if whole else None, xlabel=xlabel)
    return finish_figure(panels, title, "", COLUMN, 0.4 * len(frame))


def plot_headroom(headroom: pd.DataFrame) -> Figure:
    """Counts of problems source_only, both, target_only, neither; a bar for each row (optional column label)."""
    table = headroom if "label" in headroom else headroom.assign(label="")
    xlabel = "share of problems (in the bar: their number)"
    return plot_shares(table, "label", HEADROOM, xlabel, "Which model knows the answer?")
