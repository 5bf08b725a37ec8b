"""Both directions of a pair with the same hyperparameters, and the prompt teacher with and without the literal prompt.

    planned = plan_swap(config, ["teacher=prompt", "prompt_weight=1.0", "nll_weight=0.0"])  # {folder name: Config}
    headroom_files = measure_headroom(planned, "runs")
    sweep.run_planned(planned, "runs").check()                                              # finished ones are kept
    answers = load_answers({arm: f"runs/{name}" for arm, name in zip(ARMS, planned)})        # for share, difference, ...
"""

from __future__ import annotations

import shutil
import typing
from pathlib import Path

from bridgekit.config import Config, ConfigError, parse_override, prompt_mode
from bridgekit.launch import run_stage
from bridgekit.runs import create_run, read_run_config, read_status
from bridgekit.sweep import same_run

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
