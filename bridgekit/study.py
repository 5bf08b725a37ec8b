"""A study: many runs of one configuration, planned and checked as a whole.

    study = load_study("parameters/studies/losses.yaml")
    planned = plan_study(study)                  # {"<study>_<variant>_seed<N>": Config}
    run_planned(planned, "runs").check()         # on the GPUs there are; finished runs are kept

A file has a `base` (one file or several, of which later ones win), `seeds`, shared `overrides`, and what is varied:
`variants` ({name: {key: value}}; `after: other` starts from a variant above, `pair: name` takes a pair of its own) and
`grid` ({key: [values]} or {key: {name: value}}: every combination, for each variant); `pairs` are {name:
{lexicon_seed: n}}. Two variants that are the same experiment are refused, because their difference would be noise sold
as an effect, unless one is a declared replicate: `replicates: {A: B}` runs A on the seeds of B plus 100.
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from bridgekit import launch
from bridgekit.config import (
    Config,
    ConfigError,
    differences,
    effective_settings,
    load_config,
    load_parameters,
    parse_override,
    to_flat,
)
from bridgekit.runner import SLOTS_PER_GPU, is_done, prepare_folder, run_planned
from bridgekit.runs import lock_run, project_root, same_run  # noqa: F401 (same_run: its former place)
from bridgekit.tasks import check_inputs, check_positions, measure_prompts

REPLICATE_SHIFT = 100
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
NOTEBOOK_KEYS = ("notebook", "phase1_run", "report", "runs_dir", "slots")  # may stand in the file, for a notebook
# What is measured at the end, and by how many processes; the trained bridge is the same.
MEASUREMENT = ("eval.conditions", "eval.eval_samples", "train.controls", "train.num_processes")


@dataclass(frozen=True)
class Study:
    """What a study file says; `variants` then holds each in full: {name: ["key=value", ...]}."""

    name: str
    base: str | list[str] | Config  # what all variants start from
    variants: dict[str, list[str]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [1])
    overrides: list[str] = field(default_factory=list)  # shared by all variants, before their own
    replicates: dict[str, str] = field(default_factory=dict)  # {name: the variant it repeats}
    reference: str = ""  # the variant that the others are compared with
    grid: dict[str, list | dict] = field(default_factory=dict)
    pairs: dict[str, dict] = field(default_factory=dict)
    pair_options: list = field(default_factory=list)  # of `bridgekit pair`, for all of them
    pair_of: dict[str, str] = field(default_factory=dict, init=False)  # {variant: pair}, where it is not the base's

    def __post_init__(self) -> None:
        parse_texts("overrides", self.overrides)
        variants = expand_grid(expand_variants(self.variants), self.grid)
        self.pair_of.update({name: changes.pop("pair") for name, changes in variants.items() if "pair" in changes})
        texts = {name: [format_override(*change) for change in changes.items()] for name, changes in variants.items()}
        object.__setattr__(self, "variants", texts)
        check_study(self)

    def seeds_of(self, variant: str) -> list[int]:
        """The training seeds of a variant, in the study's order; a replicate's are shifted."""
        repeated = self.replicates.get(variant)
        if repeated is None:
            return list(self.seeds)
        rank = [name for name, of in self.replicates.items() if of == repeated].index(variant) + 1
        return [seed + rank * REPLICATE_SHIFT for seed in self.seeds]

    def folder(self, variant: str, seed: int) -> str:
        return f"{self.name}_{variant}_seed{seed}"


def load_study(path: str | Path) -> Study:
    values, known = load_parameters(path), [one.name for one in fields(Study) if one.init]
    for key in set(values) - {*known, *NOTEBOOK_KEYS}:
        raise ConfigError(f"{path}: unknown key '{key}' (a study has: {', '.join(known)})")
    if "base" not in values or not values.keys() & {"variants", "grid"}:
        raise ConfigError(f"{path}: needs `base:` and `variants:` or `grid:`, a study has a base and variants of it")
    try:
        return Study(**{"name": Path(path).stem} | {k: v for k, v in values.items() if k in known})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def expand_variants(variants: object) -> dict[str, dict[str, object]]:
    """{name: {key: value}} with everything that `after` brings; a list of key=value texts is a variant too."""
    if not isinstance(variants, dict):
        raise ConfigError(f"variants: expected {{name: {{key: value}}}}, got {variants!r}")
    whole: dict[str, dict[str, object]] = {}
    for name, changes in variants.items():
        changes = dict(changes) if isinstance(changes, dict) else parse_texts(f"variants.{name}", changes)
        start = changes.pop("after", None)
        if start is not None and start not in whole:
            raise ConfigError(f"variants.{name}.after: '{start}' is no variant above it ({', '.join(whole)})")
        whole[name] = whole.get(start, {}) | changes
    return whole


def expand_grid(variants: dict[str, dict], grid: object) -> dict[str, dict]:
    """Every variant with every combination of the grid; the parts of a name are joined with `_`."""
    if not isinstance(grid, dict) or not all(isinstance(axis, (list, dict)) and axis for axis in grid.values()):
        raise ConfigError(f"grid: expected {{key: [values]}} or {{key: {{name: value}}}}, got {grid!r}")
    if not grid:
        return variants
    axes = [
        [(label, key, v) for label, v in (axis.items() if isinstance(axis, dict) else ((f"{v}", v) for v in axis))]
        for key, axis in grid.items()
    ]
    expanded = {}
    for variant, changes in (variants or {"": {}}).items():
        for cell in itertools.product(*axes):
            name = "_".join(filter(None, [variant, *(str(label) for label, _, _ in cell)]))
            expanded[name] = changes | {key: value for _, key, value in cell}
    return expanded


def format_override(key: str, value: object) -> str:
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=9999).splitlines()[0]}"


def parse_texts(key: str, texts: object) -> dict[str, object]:
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"{key}: expected a list of key=value texts, got {texts!r}")
    try:
        return dict(parse_override(text) for text in texts)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None


def check_study(study: Study) -> None:
    """Refuse what is no study at all; whether its variants differ is for `plan_study`, which reads the base."""
    known, seeds = f"(there are: {', '.join(study.variants)})", study.seeds
    for key, kind in (("seeds", list), ("pairs", dict), ("replicates", dict), ("pair_options", list)):
        if not isinstance(getattr(study, key), kind):
            raise ConfigError(f"{key}: expected a {kind.__name__}, got {getattr(study, key)!r}")
    for name in (study.name, *study.variants):
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"name {name!r}: use letters, digits, '_', '-' and '.'")
    if len(study.variants) < 2:
        raise ConfigError(f"variants: a comparison needs at least two variants, got {study.variants!r}")
    if not seeds or any(type(seed) is not int or seed < 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: expected whole numbers, each once, got {seeds!r}")
    if study.reference and study.reference not in study.variants:
        raise ConfigError(f"reference: no variant '{study.reference}' {known}")
    for name, pair in study.pairs.items():
        if not isinstance(pair, dict) or set(pair) != {"lexicon_seed"} or type(pair["lexicon_seed"]) is not int:
            raise ConfigError(f"pairs.{name}: needs a whole number `lexicon_seed` and nothing else, got {pair!r}")
    for name, pair in study.pair_of.items():
        if pair not in study.pairs:
            raise ConfigError(f"variants.{name}.pair: '{pair}' is not among `pairs`")
    for name, of in study.replicates.items():
        if missing := [one for one in (name, of) if one not in study.variants]:
            raise ConfigError(f"replicates: no variant '{missing[0]}' to declare '{name}: {of}' with {known}")
        if of in study.replicates:
            raise ConfigError(f"replicates: '{of}' is a replicate itself: name the variant that it repeats")
        if name == study.reference:
            raise ConfigError(f"reference: '{name}' is declared a replicate: compare with the variant that it repeats")
        if shared := set(study.seeds_of(name)) & set(seeds):
            raise ConfigError(
                f"replicates: '{name}' would run seed {min(shared)} of '{of}' again (its seeds are those of the study "
                f"plus {REPLICATE_SHIFT}): choose other seeds"
            )


def plan_study(study: Study, runs_dir: str | Path = "runs", keep: Sequence[str] | None = None) -> dict[str, Config]:
    """{folder name: configuration} of all runs, seeds innermost; `keep` names the variants that are due.

    The whole study is checked, also what is not due.
    """
    files = study.base if isinstance(study.base, list) else [study.base]
    base = to_flat(study.base) if isinstance(study.base, Config) else launch.load_layers(files)
    shared = [*base.pop("overrides", []), *study.overrides]
    configs: dict[str, Config] = {}
    lengths: dict[tuple, tuple | None] = {}
    for name, texts in study.variants.items():
        own = [f"run.name={name}", "run.seed=0", f"run.runs_dir={runs_dir}", f"run.cache_dir={runs_dir}/.cache"]
        if pair := study.pair_of.get(name):
            own += [f"pair.{side}_model={runs_dir}/pairs/{pair}/{side}" for side in ("source", "target")]
        try:
            config = configs[name] = load_config(overrides=[*shared, *texts, *own], **base)
            if not pair:  # a pair of the study's own is made when it runs
                check_inputs(config)
            read = config.pair, config.task, config.bridge.source_view
            if read not in lengths:
                lengths[read] = measure_prompts(config)
            if lengths[read] is not None:
                check_positions(config, *lengths[read])
        except ConfigError as error:
            raise ConfigError(f"variants.{name}: {error}") from None
    check_distinct(study, configs)
    due = [name for name in configs if keep is None or name in keep]
    return {study.folder(name, seed): configs[name].with_(seed=seed) for name in due for seed in study.seeds_of(name)}


def check_distinct(study: Study, configs: dict[str, Config]) -> None:
    """Refuse two variants that train the same bridge, and a replicate that does not."""
    flats, first = {name: to_flat(config) for name, config in configs.items()}, {}
    for name, flat in flats.items():
        if of := study.replicates.get(name):
            for key, (one, other) in differences(flat, flats[of])[0].items():
                if key not in MEASUREMENT:
                    apart = f"{key} is {one!r} in the one and {other!r} in the other"
                    raise ConfigError(f"replicates: '{name}' is no replicate of '{of}': {apart}")
            continue
        settings = {k: v for k, v in effective_settings(flat, seed=False).items() if k not in MEASUREMENT}
        same = first.setdefault(repr(sorted(settings.items())), name)
        if same != name:
            inert = [key for key in flat if flat[key] != flats[same][key] and key != "run.name"]
            raise ConfigError(
                f"variants: '{same}' and '{name}' are the same experiment"
                + (f" ({', '.join(inert)} without effect here)" if inert else "")
                + f": change one, or declare it with replicates: {{{name}: {same}}}"
            )


def swept_keys(planned: dict[str, Config]) -> set[str]:
    """The keys in which the runs of a plan differ, the seed and the names aside."""
    flats = [to_flat(config) for config in planned.values()]
    varied = {key for flat in flats for key in flat if flat[key] != flats[0][key]}
    return {key for key in varied if not key.startswith("run.")}


# -- swap: both directions, and the prompt teacher with and without the literal prompt --------------------------


def plan_swap(config: Config, prompt_teacher: Sequence[str]) -> dict[str, Config]:
    """{folder name: configuration} of the four arms; `prompt_teacher` are the overrides of the last two.

    One of these leaves the prompt mode to the teacher, the other keeps the literal prompt; but for that they are equal.
    """
    taught = parse_texts("prompt_teacher", list(prompt_teacher))
    for key in ("bridge.prompt_mode", "pair.direction"):
        if key in taught:
            raise ConfigError(f"prompt_teacher: leave {key} out, the arms set it: both prompt modes are run")
    chosen = load_config(**to_flat(config) | {"bridge.prompt_mode": "auto", "train.controls": []} | taught)
    if chosen.bridge.prompt_mode != "soft_only":
        raise ConfigError(
            "prompt_teacher: these overrides teach nothing by the prompt: name teacher=prompt and a prompt_weight or "
            "flow_weight above 0, with an injector that has soft tokens"
        )
    arms = {
        "forward": {"pair.direction": "forward"},
        "swapped": {"pair.direction": "swapped"},
        # Their one comparison is between the two modes, so controls are trained only where they are asked for.
        "literal_kept": {"after": "swapped", "train.controls": [], **taught, "bridge.prompt_mode": "soft_plus_text"},
        "soft_only": {"after": "literal_kept", "bridge.prompt_mode": "auto"},
    }
    own = config.run
    planned = plan_study(Study(own.name, config, arms, [own.seed]), own.runs_dir)
    named = {name: {"run.name": name.rsplit("_seed", 1)[0], "run.cache_dir": own.cache_dir} for name in planned}
    return {name: one.with_(**named[name]) for name, one in planned.items()}


def measure_headroom(planned: dict[str, Config], runs_dir: str | Path) -> dict[str, Path]:
    """Source and target alone in both directions, before anything is trained: {direction: headroom file}."""
    files = {}
    for (name, config), direction in zip(planned.items(), ("forward", "swapped"), strict=False):
        folder = project_root() / runs_dir / name
        files[direction] = folder / "headroom.jsonl"
        if not is_done(folder, config):
            with lock_run(folder):
                prepare_folder(folder, config)
            if not files[direction].is_file():
                launch.run_stage(folder, "baselines")
    return files


def main(argv: list[str] | None = None) -> None:
    """The `bridgekit study` verb."""
    parser = argparse.ArgumentParser(prog="bridgekit study", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a file of parameters/studies/")
    parser.add_argument("--runs-dir", default="runs")
    slots_help = f"trainings at once on each GPU (default: {SLOTS_PER_GPU}, and 1 where there is no GPU)"
    parser.add_argument("--slots", type=int, default=0, help=slots_help)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants of the file, with all seeds")
    args = parser.parse_args(argv)
    study = load_study(args.file)
    for name in args.only or []:
        if name not in study.variants:
            raise ConfigError(f"--only: '{name}' is no variant of this file (there are: {', '.join(study.variants)})")
    planned = plan_study(study, args.runs_dir, args.only)
    run_planned(planned, args.runs_dir, args.slots, study.pairs, study.pair_options).check()


if __name__ == "__main__":
    main()
