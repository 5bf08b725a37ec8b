"""Both directions of a pair with the same hyperparameters, and the prompt teacher with and without the literal prompt.

    planned = plan_swap(config, ["teacher=prompt", "prompt_weight=1.0", "nll_weight=0.0"])  # {folder name: Config}
    headroom_files = measure_headroom(planned, "runs")
    sweep.run_planned(planned, "runs").check()                                              # finished ones are kept
    frames = read_arms(planned, "runs")                                                     # {arm: frame}

The rest are tables and sentences from those frames: nothing is said that is not measured.
"""

from __future__ import annotations

import shutil
import typing
from pathlib import Path

import pandas as pd

from bridgekit.audit.outcomes import evaluation_files
from bridgekit.config import CONDITIONS, Config, ConfigError, parse_override, prompt_mode
from bridgekit.launch import run_stage
from bridgekit.results import statistics as stats
from bridgekit.results import verdict
from bridgekit.results.style import LABELS, SUBSET_LABELS
from bridgekit.runs import create_run, find_eval, load_eval, read_run_config, read_status
from bridgekit.sweep import same_run
from bridgekit.tasks.answers import INVALID

DIRECTIONS = ("forward", "swapped")
TAUGHT = ("literal_kept", "soft_only")  # the two ways to evaluate a bridge that is taught to be the prompt
ARMS = {
    "forward": "forward",
    "swapped": "swapped",
    "literal_kept": "prompt teacher,\nliteral prompt kept",
    "soft_only": "prompt teacher,\nsoft tokens alone",
}


def plan_swap(config: Config, prompt_teacher: typing.Sequence[str]) -> dict[str, Config]:
    """{folder name: configuration} of the four trainings; `prompt_teacher` are the overrides of the last two.

    One of these leaves the prompt mode to the teacher, the other keeps the literal prompt, as in the experiment that
    failed; but for that they are equal.
    """
    changes = dict(parse_override(text) for text in prompt_teacher)
    for key in ("bridge.prompt_mode", "pair.direction"):
        if key in changes:
            raise ConfigError(f"prompt_teacher: leave {key} out, the notebook sets it: both prompt modes are run")
    # Its one comparison is between the two modes, so controls are trained only where they are asked for.
    taught = {"controls": []} | {key.split(".")[1]: value for key, value in changes.items()} | {"direction": "swapped"}
    chosen = config.with_(**taught, prompt_mode="auto")
    if prompt_mode(chosen) != "soft_only":
        raise ConfigError(
            "prompt_teacher: these overrides teach nothing by the prompt: name teacher=prompt and a prompt_weight or "
            "flow_weight above 0, with an injector that has soft tokens"
        )
    arms = {direction: config.with_(direction=direction) for direction in DIRECTIONS}
    arms |= {"literal_kept": config.with_(**taught, prompt_mode="soft_plus_text"), "soft_only": chosen}
    name, seed = config.run.name, config.run.seed
    return {f"{name}_{arm}_seed{seed}": own.with_(**{"run.name": f"{name}_{arm}"}) for arm, own in arms.items()}


def read_plan(planned: dict[str, Config]) -> str:
    """Which folder is which arm, and in what the arms differ."""
    lines = []
    for name, config in planned.items():
        teacher = "the prompt" if prompt_mode(config) == "soft_only" else "answers"
        mode, direction = config.bridge.prompt_mode, config.pair.direction
        lines.append(f"{name}: direction {direction}, taught by {teacher}, prompt_mode {mode}")
    kept, chosen = list(planned)[-2:]
    lines.append(
        f"{chosen}: the prompt teacher chooses soft_only by itself, because a bridge taught to be the prompt takes its "
        f"place. {kept} keeps the literal prompt against that choice, to measure what it does."
    )
    return "\n".join(lines)


def measure_headroom(planned: dict[str, Config], runs_dir: str | Path) -> dict[str, Path]:
    """Source and target alone in both directions, before anything is trained: {direction: headroom file}."""
    files = {}
    for (name, config), direction in zip(planned.items(), DIRECTIONS, strict=False):
        folder = Path(runs_dir) / name
        files[direction] = folder / "headroom.jsonl"
        if not _has_headroom(folder, config):
            shutil.rmtree(folder, ignore_errors=True)  # a half-finished run is made again
            create_run(config, folder)
            try:
                run_stage(folder, "baselines")
            except RuntimeError as error:
                raise RuntimeError(f"headroom of {name} failed: {error}") from None
    return files


def _has_headroom(folder: Path, config: Config) -> bool:
    if not (folder / "config.yaml").is_file():
        return False
    same = same_run(read_run_config(folder), config)
    if not same and read_status(folder).get("state") == "finished":
        raise ConfigError(f"name: '{folder}' is finished with another configuration; choose another name")
    return same and (folder / "headroom.jsonl").is_file()


def read_arms(planned: dict[str, Config], runs_dir: str | Path) -> dict[str, pd.DataFrame]:
    """The final evaluation of each arm."""
    return {arm: load_eval(find_eval(Path(runs_dir) / name)) for name, arm in zip(planned, ARMS, strict=True)}


def headroom_table(headrooms: dict[str, verdict.Headroom]) -> pd.DataFrame:
    """A row for each direction, as `plot_headroom` wants it."""
    return pd.DataFrame([{"label": direction} | room.counts for direction, room in headrooms.items()])


def arms_table(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """`conditions_table` of every arm, one below the other, with a column `arm`."""
    return pd.concat([verdict.conditions_table(f).assign(arm=arm) for arm, f in frames.items()], ignore_index=True)


def differences_table(judged: dict[str, verdict.Verdict]) -> pd.DataFrame:
    """The comparisons of the claim rule in every direction, as `plot_differences` wants them."""
    parts = []
    for direction, one in judged.items():
        rows = one.differences()
        rows["subset"] = [f"{direction}: {SUBSET_LABELS[s]}" for s in rows["subset"]]
        parts.append(rows.assign(label=[f"{direction}, {label}" for label in rows["label"]]))
    return pd.concat(parts, ignore_index=True)


def format_arms(table: pd.DataFrame, subset: str = "all") -> str:
    """Markdown: a row for each condition, a column for each arm."""
    rows = table[table["subset"] == subset]
    arms = [arm for arm in ARMS if arm in set(rows["arm"])]
    cells = {(r.condition, r.arm): f"{r.accuracy:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in rows.itertuples()}
    sizes = rows.groupby("arm")["n"].max()
    lines = ["| condition | " + " | ".join(f"{ARMS[a]} (n = {sizes[a]:,})".replace("\n", " ") for a in arms) + " |"]
    lines.append("|---|" + "---:|" * len(arms))
    for condition in CONDITIONS:
        if any((condition, arm) in cells for arm in arms):
            own = [cells.get((condition, arm), "\N{EN DASH}") for arm in arms]
            lines.append(f"| {LABELS[condition]} | " + " | ".join(own) + " |")
    return "\n".join(lines)


def read_headroom(headrooms: dict[str, verdict.Headroom]) -> str:
    """Each direction's room in words, and which of the two has more of it."""
    gains = {direction: room.gain_possible for direction, room in headrooms.items()}
    more = max(gains, key=gains.get)
    said = [f"**{direction}**: {room.text}" for direction, room in headrooms.items()]
    compared = ", ".join(f"{direction} {gain:+.3f}" for direction, gain in gains.items())
    where = f"There is more to gain {more}" if len(set(gains.values())) > 1 else "Both have the same room"
    return "\n\n".join([*said, f"{where} ({compared})."])


def pair_arms(frames: dict[str, pd.DataFrame], a: str, b: str) -> stats.Difference:
    """The bridge of arm `a` minus that of arm `b` on the same held-out problems."""
    one, other = (verdict.select_subset(frames[arm]).set_index("id") for arm in (a, b))
    both = one.index.intersection(other.index)
    if len(both) < max(len(one), len(other)):
        raise ValueError(f"{a} and {b}: evaluated on different problems, so they cannot be paired")
    columns = {f"{arm}_correct": rows.loc[both, "bridged_correct"].to_numpy() for arm, rows in ((a, one), (b, other))}
    return stats.paired_difference(pd.DataFrame(columns).assign(unit=one.loc[both, "unit"].to_numpy()), a, b)


def read_teacher(frames: dict[str, pd.DataFrame]) -> str:
    """What the prompt teacher does in either mode, against the target alone, and the two modes against each other."""
    lines = []
    for arm in TAUGHT:
        rows = verdict.select_subset(frames[arm])
        invalid = (rows["bridged_extracted"] == INVALID).mean()
        difference = stats.paired_difference(rows, "bridged", "target")
        lines.append(
            f"**{ARMS[arm].replace(chr(10), ' ')}**: bridged {rows['bridged_correct'].mean():.3f}, the target alone "
            f"{rows['target_correct'].mean():.3f}; difference {difference}, {_say(difference, 'it')}. "
            f"{invalid:.0%} of its answers are invalid."
        )
        only = verdict.select_subset(frames[arm], "source_only", allow_empty=True)
        if len(only):
            change = stats.paired_difference(only, "bridged", "target")
            arrives = "some of it arrives" if change.low > 0 else "it is not shown that any arrives"
            lines[-1] += (
                f" Of what only the source knows ({change.n:,} problems), "
                f"bridged {only['bridged_correct'].mean():.3f}, difference {change}: {arrives}."
            )
    kept, alone = pair_arms(frames, "literal_kept", "swapped"), pair_arms(frames, "literal_kept", "soft_only")
    lines.append(
        f"With the literal prompt kept, the prompt teacher against the bridge of the same direction without it: "
        f"{kept}. Literal prompt kept against soft tokens alone: {alone}."
    )
    return "\n\n".join(lines)


def read_arms_in_words(table: pd.DataFrame, arms: typing.Iterable[str], subset: str = "all") -> str:
    """For each arm the bridge, its target alone and, if there, what another question's message gives."""
    lines = []
    for arm in arms:
        rows = table[(table["arm"] == arm) & (table["subset"] == subset)].set_index("condition")
        said = {c: f"{r['accuracy']:.3f} [{r['low']:.3f}, {r['high']:.3f}]" for c, r in rows.iterrows()}
        if not said:
            lines.append(f"{arm}: no such problem among these.")
            continue
        text = f"{arm}: {said['bridged']} right bridged where the target alone has {said['target']}"
        text += f" and another question's message gives {said['shuffled']}" if "shuffled" in said else ""
        lines.append(f"{text} (n = {rows['n'].iloc[0]:,} about {rows['n_units'].iloc[0]:,} units).")
    return "\n\n".join(lines)


def read_training(folder: str | Path) -> str:
    """What training did to a bridge against the target alone, on validation, and which step's weights were kept.

    The weights that are tested are the best on validation: where training only harms, those from before it.
    """
    steps = [(int(step), path) for step, path in evaluation_files(Path(folder)) if step != "final"]
    if not steps:
        raise ValueError(
            f"{folder}: no validation answers (eval_samples_step_N.jsonl): they are in the run's own folder"
        )
    frames = {step: verdict.select_subset(load_eval(path)) for step, path in steps}
    best = max(frames, key=lambda step: (frames[step]["bridged_correct"].mean(), step))
    first, last = (stats.paired_difference(frames[step], "bridged", "target") for step in (min(frames), max(frames)))
    text = (
        f"On {last.n:,} validation problems, bridged minus target alone: {first} at step {min(frames):,}, "
        f"{last} at step {max(frames):,}, {_say(last, 'the trained bridge')}. Validation kept step {best:,}"
    )
    return text + (", the weights from before training, so the test shows no trained bridge." if best == 0 else ".")


def read_directions(judged: dict[str, verdict.Verdict], frames: dict[str, pd.DataFrame]) -> str:
    """One sentence for each direction and one that puts them beside each other."""
    lines = [f"**{direction}: {one.outcome}.** {one.text}" for direction, one in judged.items()]
    passed = [direction for direction, one in judged.items() if one.passes]
    said = "both directions pass" if len(passed) == 2 else f"only {passed[0]} passes" if passed else "neither passes"
    gains = ", ".join(f"{d} {stats.paired_difference(verdict.select_subset(frames[d]), 'bridged', 'target')}"
                      for d in judged)  # fmt: skip
    return "\n\n".join([*lines, f"With the same hyperparameters and one seed, {said} the claim rule; "
                        f"bridged minus target: {gains}."])  # fmt: skip


def _say(difference: stats.Difference, what: str) -> str:
    if difference.high < 0:
        return f"so {what} harms"
    return f"so {what} helps" if difference.low > 0 else f"so neither help nor harm is shown at n = {difference.n:,}"
