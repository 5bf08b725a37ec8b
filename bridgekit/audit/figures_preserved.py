"""Figures of the first experiments' runs, and the tables they draw; no model, no raw file.

    records = load_records("preserved_data/first_experiments")
    fig = plot_run_curves(curves_table(records))

The headroom figure is `figures_studies.plot_headroom(headroom_table(records))`.
"""

from __future__ import annotations

import itertools
import typing
from pathlib import Path

import pandas as pd

from bridgekit.audit.claims import VERDICTS, Verdict
from bridgekit.audit.measures import Records, right_at
from bridgekit.audit.outcomes import conditions_of, is_right
from bridgekit.audit.runfolders import RunRecord, find_runs, read_run
from bridgekit.effective import effective_settings, identity
from bridgekit.results.statistics import mcnemar_exact, minimum_detectable_effect, n_for_effect, wilson
from bridgekit.results.style import (
    COLORS,
    DARK,
    DASHES,
    LABELS,
    TEXT_WIDTH,
    check_frame,
    ink,
    list_rows,
    new_figure,
    paper_figure,
    write_right,
)

if typing.TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERDICT_LOOKS = dict(
    zip(
        VERDICTS,
        (("#7CCBB4", ""), (COLORS["bridged"], ""), ("#D9A420", "///"), ("#DDDDDD", "...")),
        strict=True,
    )
)
RUN_LOOKS = (
    ("o", "-"),
    ("s", (0, (4, 1.5))),
    ("^", (0, (1, 1))),
    ("D", (0, (5, 1, 1, 1))),
    ("v", (0, (2, 2))),
)
SIZES = (100, 200, 400, 800, 1600, 3200, 6400, 12800)


def load_records(root: str | Path) -> Records:
    """Readable runs below `root` by name."""
    return {record.name: record for record in map(read_run, find_runs(root))}


def direction_of(record: RunRecord) -> str:
    """`Mistral-7B to Llama-3.1-8B`, from the logged model names."""
    names = [str(record.config.get(f"{role}_model", "unknown")).split("/")[-1] for role in ("source", "target")]
    return " to ".join(name.removeprefix("Meta-").split("-Instruct")[0] for name in names)


def curves_table(records: Records) -> pd.DataFrame:
    """Accuracy by run, condition and evaluation, with Wilson intervals; `group` is equal for replicates."""
    groups: dict[tuple, int] = {}
    told = _told_apart(records)
    rows = []
    for record in records.values():
        group = groups.setdefault(identity(record, seed=False), len(groups))
        every = record.config.get("eval_every") or 1
        last = max((int(s) for s in record.steps() if s != "final"), default=0)
        for step, condition in itertools.product(record.steps(), ("source", "target", "bridged")):
            part = record.at(step)
            if condition in conditions_of(part):
                right, n = int(is_right(part, condition).sum()), len(part)
                low, high = wilson(right, n)
                rows.append({"run": record.name, "label": told[record.name],
                             "direction": direction_of(record), "group": group, "condition": condition,
                             "final": step == "final",
                             "step": last + every if step == "final" else int(step),
                             "accuracy": right / n, "low": low, "high": high, "n": n})  # fmt: skip
    return pd.DataFrame(rows)


def _told_apart(records: Records) -> dict[str, str]:
    """Each run's label, with the named settings in which the runs of its direction differ."""
    told = {}
    for record in records.values():
        peers = [r for r in records.values() if direction_of(r) == direction_of(record)]
        settings = [effective_settings(r.config) for r in peers]
        named = [k for k, v in effective_settings(record.config).items()
                 if isinstance(v, str) and len({repr(s.get(k)) for s in settings}) > 1]  # fmt: skip
        words = ", ".join(f"{k.split('_')[-1]} {record.config[k]}" for k in sorted(named))
        told[record.name] = f"{record.label}\n({words})" if words else record.label
    return told


def _last_answers(records: Records, record: RunRecord) -> dict[str, pd.Series]:
    step = record.steps()[-1]
    return {c: right_at(records, record.name, c, step) for c in ("source", "target", "bridged")}


def gains_table(records: Records) -> pd.DataFrame:
    """Questions gained and lost against the target alone at each run's last evaluation."""
    told, rows = _told_apart(records), []
    for record in records.values():
        right = _last_answers(records, record)
        gained = int((right["bridged"] & ~right["target"]).sum())
        lost = int((right["target"] & ~right["bridged"]).sum())
        rows.append({"run": record.name, "label": told[record.name],
                     "direction": direction_of(record), "gained": gained, "lost": lost,
                     "n": len(right["target"]), "p": mcnemar_exact(gained, lost)})  # fmt: skip
    return pd.DataFrame(rows).sort_values(["direction", "lost"], ascending=[False, True], ignore_index=True)


def headroom_table(records: Records) -> pd.DataFrame:
    """Who is right on how many questions, by direction: what any bridge could gain."""
    rows = {}
    for record in records.values():
        right = _last_answers(records, record)
        source, target = right["source"], right["target"]
        counts = {"source_only": source & ~target, "both": source & target, "target_only": target & ~source,
                  "neither": ~source & ~target}  # fmt: skip
        rows.setdefault(direction_of(record), {name: int(found.sum()) for name, found in counts.items()})
    return pd.DataFrame([{"label": label.replace(" to ", " to\n"), **counts} for label, counts in rows.items()])


def power_table(records: Records) -> pd.DataFrame:
    """The smallest difference that n questions can show, at the discordance these runs really have."""
    right = {name: _last_answers(records, record) for name, record in records.items()}
    found: dict[str, list[float]] = {"two runs of one setting": [], "bridged against target alone": []}
    for one, other in itertools.combinations(records, 2):
        if identity(records[one], seed=False) == identity(records[other], seed=False):
            found["two runs of one setting"].append(float((right[one]["bridged"] != right[other]["bridged"]).mean()))
    replicated = {n for pair in itertools.combinations(records, 2) for n in pair if _replicates(records, *pair)}
    for name in replicated or records:
        found["bridged against target alone"].append(float((right[name]["bridged"] != right[name]["target"]).mean()))
    rows = []
    for label, shares in found.items():
        if shares and (discordance := sum(shares) / len(shares)) > 0:
            needed = n_for_effect(min(0.02, discordance), discordance)
            rows += [{"comparison": label, "discordance": discordance, "n": n, "needed_for_2_points": needed,
                      "effect": minimum_detectable_effect(n, discordance)} for n in SIZES]  # fmt: skip
    return pd.DataFrame(rows)


def _replicates(records: Records, one: str, other: str) -> bool:
    return identity(records[one], seed=False) == identity(records[other], seed=False)


def verdicts_table(verdicts: typing.Sequence[Verdict]) -> pd.DataFrame:
    """Number of claims by document and verdict."""
    counts = pd.crosstab([v.claim["document"] for v in verdicts], [v.verdict for v in verdicts])
    return counts.reindex(columns=list(VERDICTS), fill_value=0).rename_axis("document").reset_index()


@paper_figure
def plot_run_curves(curves: pd.DataFrame) -> Figure:
    """A panel for each direction: baselines with their bands, replicates as one band, other runs as lines."""
    import matplotlib.pyplot as plt

    check_frame(curves, "curves", "run", "accuracy", ["step", "n"])
    directions = list(dict.fromkeys(curves["direction"]))
    size = (TEXT_WIDTH, 3.6)
    fig, axes = plt.subplots(1, len(directions), figsize=size, sharey=True, squeeze=False)
    plt.close(fig)
    for ax, direction in zip(axes[0], directions, strict=True):
        rows = curves[curves["direction"] == direction]
        for name in ("source", "target"):
            base = rows[rows["condition"] == name].iloc[-1]
            above = base["accuracy"] == rows.loc[rows["condition"] != "bridged", "accuracy"].max()
            ax.axhspan(base["low"], base["high"], color=COLORS[name], alpha=0.14, lw=0)
            ax.axhline(base["accuracy"], color=COLORS[name], ls=DASHES[name], lw=1.1)
            place, side = (base["high"], "top") if above else (base["low"], "bottom")
            ax.annotate(LABELS[name], (0.99, place), xycoords=("axes fraction", "data"), ha="right", va=side,
                        fontsize=7, color=ink(COLORS[name]))  # fmt: skip
        _draw_runs(ax, rows[rows["condition"] == "bridged"])
        ax.set_title(direction.replace(" to ", " \N{RIGHTWARDS ARROW} "))
        ax.set_xlabel("training step (open mark: final)")
        ax.legend(loc="upper center", bbox_to_anchor=(0.45, -0.22), fontsize=6, handlelength=2.6)
    axes[0][0].set_ylabel(f"accuracy (n = {int(curves['n'].max())})")
    axes[0][0].set_ylim(-0.02, 0.9)
    return fig


def _draw_runs(ax: Axes, rows: pd.DataFrame) -> None:
    looks, red = iter(itertools.cycle(RUN_LOOKS)), COLORS["bridged"]
    for _, group in rows.groupby("group", sort=False):
        runs = list(group.groupby("run", sort=False))
        if len(runs) > 1:
            spread = group[~group["final"]].groupby("step")["accuracy"].agg(["min", "max"])
            label = f"spread of {len(runs)} runs of one setting"
            ax.fill_between(spread.index, spread["min"], spread["max"], color=red, alpha=0.2, lw=0,
                            label=label, gid="band:replicates")  # fmt: skip
        for place, (name, run) in enumerate(runs):
            marker, dashes = next(looks)
            beside = 60 * (place - (len(runs) - 1) / 2)  # finals of replicates stand side by side
            course, end = run[~run["final"]].sort_values("step"), run[run["final"]]
            ax.plot(course["step"], course["accuracy"], color=red, ls=dashes, marker=marker, ms=3, lw=0.9,
                    label=run["label"].iloc[0], gid=f"line:{name}")  # fmt: skip
            for row in end.itertuples():
                error = [[row.accuracy - row.low], [row.high - row.accuracy]]
                ax.errorbar(row.step + beside, row.accuracy, error, fmt=marker, ms=4, mfc="white", color=red,
                            lw=0.7, gid=f"interval:{name}")  # fmt: skip


@paper_figure
def plot_gains(gains: pd.DataFrame) -> Figure:
    """Per run: questions gained to the right, lost to the left of the target alone."""
    check_frame(gains, "gains", "run", columns=["gained", "lost", "n", "p"])
    fig, ax = new_figure(aspect=(0.8 + 0.3 * len(gains)) / TEXT_WIDTH)
    for y, row in gains.iterrows():
        ax.barh(y, row["gained"], 0.6, color=COLORS["bridged"], gid=f"bar:gained:{y}")
        ax.barh(
            y,
            -row["lost"],
            0.6,
            color=COLORS["target"],
            hatch="\\\\\\",
            edgecolor="white",
            lw=0,
            gid=f"bar:lost:{y}",
        )
        ax.text(row["gained"] + 1, y, f"+{row['gained']}", va="center", fontsize=7.5)
        ax.text(-row["lost"] - 1, y, f"\N{MINUS SIGN}{row['lost']}", va="center", ha="right", fontsize=7.5)
        write_right(ax, y, f"p = {row['p']:.1g}")
    names = [row.label if "\n" in row.label else f"{row.label}\n{row.direction}" for row in gains.itertuples()]
    list_rows(ax, names, guides=False)
    ax.tick_params(axis="y", labelsize=7)
    ax.axvline(0, color=DARK, lw=0.8)
    reach = 1.3 * max(gains["gained"].max(), gains["lost"].max())
    ax.set_xlim(-reach, max(0.3 * reach, 1.4 * gains["gained"].max()))
    ax.xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}")
    ax.set_xlabel(f"questions lost  |  gained against the target alone (of {int(gains['n'].max())})")
    return fig


@paper_figure
def plot_power(power: pd.DataFrame) -> Figure:
    """How large n must be: the smallest difference that can be found, against n, with 2 points marked."""
    check_frame(power, "power", "comparison", columns=["n", "effect", "needed_for_2_points"])
    fig, ax = new_figure(aspect=0.5)
    looks = {
        name: look for name, look in zip(power["comparison"].unique(), (("o", "-"), ("s", (0, (4, 1.5)))), strict=False)
    }
    for name, rows in power.groupby("comparison", sort=False):
        marker, dashes = looks[name]
        text = f"{name} ({rows['discordance'].iloc[0]:.1%} of answers differ)"
        ax.plot(rows["n"], 100 * rows["effect"], color=COLORS["bridged"], marker=marker, ls=dashes, label=text)
        needed = rows["needed_for_2_points"].iloc[0]
        ax.plot([needed, needed], [0, 2], color=DARK, lw=0.8, ls=(0, (2, 2)))
        side = "right" if needed == power["needed_for_2_points"].min() else "left"
        at = (-3 if side == "right" else 3, 0)
        ax.annotate(f"n = {needed:,}", (needed, 0.3), xytext=at, textcoords="offset points", ha=side)
    ax.axhline(2, color=DARK, lw=0.8)
    ax.annotate("the 2 points claimed", (200, 2), xytext=(4, 3), textcoords="offset points")
    ax.axvline(200, color=COLORS["target"], lw=1)
    ax.annotate("their n = 200", (200, 11), xytext=(4, 0), textcoords="offset points", color=ink(COLORS["target"]))
    ax.set_xscale("log")
    ax.set_xticks(SIZES, [f"{n:,}" for n in SIZES])
    ax.minorticks_off()
    ax.set_ylim(0)
    ax.set_xlabel("number of independent questions")
    ax.set_ylabel("smallest difference found\nwith 80% power (points)")
    ax.legend(loc="upper right")
    return fig


@paper_figure
def plot_verdicts(verdicts: pd.DataFrame) -> Figure:
    """A bar for each document, divided by verdict."""
    check_frame(verdicts, "verdicts", "document", columns=list(VERDICTS))
    fig, ax = new_figure(aspect=(0.75 + 0.34 * len(verdicts)) / TEXT_WIDTH)
    for y, row in verdicts.reset_index(drop=True).iterrows():
        left = 0
        for name in VERDICTS:
            colour, hatch = VERDICT_LOOKS[name]
            ax.barh(y, row[name], 0.6, left, color=colour, hatch=hatch, edgecolor="white", lw=0.6,
                    label=name if y == 0 else None, gid=f"bar:{name}:{y}")  # fmt: skip
            if row[name]:
                dark = "white" if name == VERDICTS[1] else DARK
                box = {"facecolor": colour, "edgecolor": "none", "pad": 0.8}
                ax.text(left + row[name] / 2, y, str(row[name]), ha="center", va="center", color=dark, bbox=box)
            left += row[name]
    list_rows(ax, verdicts["document"], guides=False)
    ax.set_xlabel("claims")
    fig.legend(loc="outside upper left", ncols=4)
    return fig
