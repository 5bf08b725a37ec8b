"""The comparative gains of a study in words and files: what each variant changes, and what could not have been seen.

print(describe_gains(study, compared))
write_tables(table, "runs/ablation/table")      # .md and .tex
"""

from __future__ import annotations

import typing
from pathlib import Path

from bridgekit.config import Config
from bridgekit.results.figures_ablation import ablation_table
from bridgekit.results.style import SUBSET_LABELS
from bridgekit.runs import write_text_atomic
from bridgekit.study import Study

if typing.TYPE_CHECKING:
    import pandas as pd


def describe_plan(study: Study, planned: dict[str, Config], said: dict[str, str] | None = None) -> str:
    """Markdown: each variant with what it changes and its seeds; what is not due is said."""
    lines = [f"Study `{study.name}` from `{study.base}`: {len(planned)} runs.", "", "| variant | changes | seeds |",
             "| --- | --- | --- |"]  # fmt: skip
    for variant, own in study.variants.items():
        seeds = [str(seed) for seed in study.seeds_of(variant) if study.folder(variant, seed) in planned]
        of = study.replicates.get(variant)
        changes = f"replicate of {of}" if of else ", ".join(f"`{text}`" for text in own) or "nothing"
        lines.append(f"| {variant} | {changes} | {', '.join(seeds) or 'not due'} |")
    return "\n".join(lines)


def describe_gains(study: Study, compared: pd.DataFrame) -> str:
    """A sentence for each variant and subset, and how large the differences of replicates are."""
    if compared.empty:
        why = f"'{study.reference}' has no finished run" if study.reference else "the study names no reference"
        return f"Nothing was compared: {why}."
    tests, differ = len(compared), compared[compared["holds"]]
    lines = [
        f"Of {tests} comparisons with '{study.reference}', {len(differ)} {'differs' if len(differ) == 1 else 'differ'} "
        "at 0.05 after Holm over all of them."
    ]
    for row in compared.to_dict("records"):
        lines.append(_describe_row(row))
    for variant, of in study.replicates.items():
        rows = compared[(compared["variant"] == variant) & (of == study.reference)]
        if len(rows):
            largest = rows["difference"].abs().max()
            lines.append(f"{variant} repeats {of} with other seeds and differs from it by up to {largest:.3f}: noise.")
    lines += [text] if (text := _caution(compared)) else []
    return "\n".join(f"- {line}" for line in lines)


def _describe_row(row: dict) -> str:
    p = f"p after Holm {row['adjusted_p']:.2g}"
    size = f"n = {row['n']:,} on {row['n_units']:,} units, {row['n_seeds']} seed{'s' if row['n_seeds'] > 1 else ''}"
    name = f"**{row['variant']}**, {_where(row)}: {_value(row)}, {p} ({size})"
    if row["holds"]:
        alone = " in this one seed" if row["n_seeds"] == 1 else ""
        return f"{name}: {'better' if row['difference'] > 0 else 'worse'} than '{row['reference']}'{alone}."
    if row["smallest_effect"] >= 1:
        return f"{name}: no difference shown, and none could have been found."
    return (
        f"{name}: no difference shown; one of {row['smallest_effect']:.3f} or more would have been found (power 0.8)."
    )


def describe_curves(curves: pd.DataFrame) -> str:
    """Where each variant was best on validation, on the mean of its seeds."""
    lines = []
    for variant, rows in curves.groupby("variant", sort=False):
        mean = rows.groupby("step")["accuracy"].mean()
        best = f"{mean.max():.3f} at step {mean.idxmax():,} of {mean.index.max():,}"
        lines.append(f"- {variant}: best mean on validation {best}, {rows['seed'].nunique()} seeds")
    return "\n".join(lines)


def describe_verdict(study: Study, planned: dict[str, Config], runs: dict, compared: pd.DataFrame) -> str:
    """What the study may say: how much of it is finished, what differs, and what no difference means here."""
    n = sum(len(seeds) for seeds in runs.values())
    if not planned:
        return "**No ablation is due**, so nothing was run."
    said = f"**{n} of {len(planned)} runs are finished.**"
    if compared.empty:
        return f"{said} {describe_gains(study, compared).strip('- ')}"
    better = compared[compared["holds"] & (compared["difference"] > 0)]
    worse = compared[compared["holds"] & (compared["difference"] < 0)]
    open_ = compared[~compared["holds"]]
    for rows, word in ((better, "Better"), (worse, "Worse")):
        found = ", ".join(f"{_name(r)} {_value(r)}" for r in rows.to_dict("records"))
        said += f" {word} than '{study.reference}': {found or 'nothing'}."
    if len(open_):
        low, high = open_["smallest_effect"].min(), open_["smallest_effect"].max()
        said += (
            f" For the other {len(open_)} comparisons no difference is shown; what would have been found with power "
            f"0.8 begins at {low:.3f} to {high:.3f}, and smaller effects may exist."
        )
    return said + f" {_caution(compared)}".rstrip()


def _caution(compared: pd.DataFrame) -> str:
    few = int(compared["n_seeds"].min())
    said = f"With {few} training seed{'s' if few > 1 else ''} a variant this is a reading, not a result."
    return said if few < 3 else ""


def _where(row: dict) -> str:
    return SUBSET_LABELS.get(row["subset"], row["subset"]).replace("\n", " ")


def _name(row: dict) -> str:
    return f"{row['variant']} on {_where(row)}"


def _value(row: dict) -> str:
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def describe_axis(frame: pd.DataFrame, axis: str) -> str:
    """The best and the least run of an axis, in the quantity that its figure shows."""
    column, key = {
        "capacity": ("bits_per_token", ["n_facts", "n_soft_tokens"]),
        "generalisation": ("recovery", ["producer", "train_units"]),
        "compression": ("recovery", ["producer", "n_soft_tokens"]),
    }[axis]
    means = frame.groupby(key)[column].mean()
    what = "bits per soft token" if axis == "capacity" else "recovered"
    names = [name.replace("_", " ") for name in key]

    def at(place: tuple) -> str:
        return ", ".join(f"{name} {value}" for name, value in zip(names, place, strict=True))

    return (
        f"Means over seeds, {what}: most {means.max():.3f} ({at(means.idxmax())}), least {means.min():.3f} "
        f"({at(means.idxmin())}); {len(frame)} runs."
    )


def write_tables(table: pd.DataFrame, path_without_suffix: str | Path, format_table=ablation_table) -> list[Path]:
    """The table as Markdown and LaTeX, ready for a paper; `format_table(table, style)` says how."""
    base = Path(path_without_suffix)
    base.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, style in ((".md", "markdown"), (".tex", "latex")):
        written.append(base.with_name(base.name + suffix))
        write_text_atomic(written[-1], format_table(table, style))
    return written


def describe_appendix(study: Study, compared: pd.DataFrame, table: pd.DataFrame, decision: str) -> str:
    """The appendix of comparative gains that the plan asks for."""
    parts = [f"## Appendix: comparative gains of `{study.name}`", decision, ablation_table(table),
             describe_gains(study, compared)]  # fmt: skip
    return "\n\n".join(part.strip() for part in parts if part)
