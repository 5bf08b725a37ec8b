"""A study: many runs of one configuration, planned and checked as a whole.

    study = load_study("parameters/studies/losses.yaml")
    planned = plan_study(study)                  # {"<study>_<variant>_seed<N>": Config}
    run_planned(planned, "runs").check()         # on the GPUs there are; finished runs are kept

A file has a `base` (one file or several, of which later ones win), `seeds`, shared `overrides`, and what is varied:
`variants` ({name: {key: value}}; `after: other` starts from a variant above, `pair: name` takes a pair of its own) and
`grid` ({key: [values]} or {key: {name: value}}: every combination, for each variant); `pairs` are {name:
{lexicon_seed: n}}, and `drawn_from` is the commit whose hash their seeds are numbers of. Two variants that are the same
experiment are refused, because their difference would be noise sold as an effect, unless one is a declared replicate:
`replicates: {A: B}` runs A on the seeds of B plus 100.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from bridgekit import launch
from bridgekit.alive import lock_run
from bridgekit.config import (
    Config,
    ConfigError,
    Parser,
    differences,
    effective_settings,
    format_override,
    load_config,
    load_layers,
    load_parameters,
    parse_texts,
    refuse_if,
    to_flat,
)
from bridgekit.runner import SLOTS_PER_GPU, is_done, prepare_folder, run_planned
from bridgekit.runs import project_root
from bridgekit.tasks import check_inputs, check_positions, measure_prompts
from bridgekit.tasks.extend import check_parts

REPLICATE_SHIFT = 100
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
NOTEBOOK_KEYS = ("notebook", "phase1_run", "report", "runs_dir", "slots")  # may stand in the file, for a notebook
# What is measured at the end, and by how many processes; the trained bridge is the same.
MEASUREMENT = ("eval.conditions", "eval.eval_samples", "train.controls", "train.num_processes")


@dataclass
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
    drawn_from: str = ""  # the commit at which the recipe was frozen: `draw_lexicons` makes the pairs' seeds of it

    def __post_init__(self) -> None:
        parse_texts("overrides", self.overrides)
        whole = expand_grid(expand_variants(self.variants), self.grid)
        # {variant: pair}, where it is not the base's
        self.pair_of = {name: changes.pop("pair") for name, changes in whole.items() if "pair" in changes}
        self.variants = {name: [format_override(*change) for change in own.items()] for name, own in whole.items()}
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


def draw_lexicons(commit: str) -> list[int]:
    """The lexicon seeds that a frozen recipe is tried on: its commit's hash, four digits each, chosen by nobody."""
    is_hash = isinstance(commit, str) and re.fullmatch("[0-9a-f]{40}", commit)
    refuse_if(not is_hash, f"drawn_from: expected the 40 digits of a commit (`git rev-parse`), got {commit!r}")
    return [int(commit[i : i + 4], 16) for i in range(0, len(commit), 4)]


def load_study(path: str | Path) -> Study:
    """The study of a file, checked; the file's name is the study's where it says no other."""
    values, known = load_parameters(path), [one.name for one in fields(Study)]
    for key in set(values) - {*known, *NOTEBOOK_KEYS}:
        raise ConfigError(f"{path}: unknown key '{key}' (a study has: {', '.join(known)})")
    if "base" not in values or not values.keys() & {"variants", "grid"}:
        raise ConfigError(f"{path}: needs `base:` and `variants:` or `grid:`, a study has a base and variants of it")
    bases = values["base"] if isinstance(values["base"], list) else [values["base"]]
    are_files = bases and all(isinstance(base, str) for base in bases)
    refuse_if(not are_files, f"{path}: base: expected a file of parameters or a list of them, got {values['base']!r}")
    try:
        return Study(**{"name": Path(path).stem} | {k: v for k, v in values.items() if k in known})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def expand_variants(variants: object) -> dict[str, dict[str, object]]:
    """{name: {key: value}} with everything that `after` brings; a list of key=value texts is a variant too."""
    refuse_if(not isinstance(variants, dict), f"variants: expected {{name: {{key: value}}}}, got {variants!r}")
    whole: dict[str, dict[str, object]] = {None: {}}
    for name, changes in variants.items():
        changes = dict(changes) if isinstance(changes, dict) else parse_texts(f"variants.{name}", changes)
        start, above = changes.pop("after", None), ", ".join(filter(None, whole))
        refuse_if(start not in whole, f"variants.{name}.after: '{start}' is no variant above it ({above})")
        whole[name] = whole[start] | changes
    return {name: changes for name, changes in whole.items() if name is not None}


def expand_grid(variants: dict[str, dict], grid: object) -> dict[str, dict]:
    """Every variant with every combination of the grid; the parts of a name are joined with `_`."""
    is_grid = isinstance(grid, dict) and all(isinstance(axis, (list, dict)) and axis for axis in grid.values())
    refuse_if(not is_grid, f"grid: expected {{key: [values]}} or {{key: {{name: value}}}}, got {grid!r}")
    for key, axis in grid.items():
        named = axis if isinstance(axis, dict) else {str(value): value for value in axis}
        variants = {
            f"{name}_{label}".removeprefix("_"): changes | {key: value}
            for (name, changes), (label, value) in itertools.product((variants or {"": {}}).items(), named.items())
        }
    return variants


def check_study(study: Study) -> None:
    """Refuse what is no study at all; whether its variants differ is for `plan_study`, which reads the base."""
    variants, seeds, known = study.variants, study.seeds, f"(there are: {', '.join(map(str, study.variants))})"
    for key, kind in (("seeds", list), ("pairs", dict), ("replicates", dict), ("pair_options", list)):
        value = getattr(study, key)
        refuse_if(not isinstance(value, kind), f"{key}: expected a {kind.__name__}, got {value!r}")
    for name in (study.name, *variants):
        is_name = isinstance(name, str) and NAME.fullmatch(name)
        refuse_if(not is_name, f"name {name!r}: use letters, digits, '_', '-' and '.'")
    refuse_if(len(variants) < 2, f"variants: a comparison needs at least two variants, got {variants!r}")
    are_seeds = seeds and all(type(seed) is int and seed >= 0 for seed in seeds) and len(set(seeds)) == len(seeds)
    refuse_if(not are_seeds, f"seeds: expected whole numbers, each once, got {seeds!r}")
    refuse_if(study.reference not in {"", *variants}, f"reference: no variant '{study.reference}' {known}")
    for name, pair in study.pairs.items():
        is_pair = isinstance(pair, dict) and set(pair) == {"lexicon_seed"} and type(pair["lexicon_seed"]) is int
        refuse_if(not is_pair, f"pairs.{name}: needs a whole number `lexicon_seed` and nothing else, got {pair!r}")
    for name, pair in study.pair_of.items():
        refuse_if(pair not in study.pairs, f"variants.{name}.pair: '{pair}' is not among `pairs`")
    if study.drawn_from:
        drawn, named = draw_lexicons(study.drawn_from), [pair["lexicon_seed"] for pair in study.pairs.values()]
        out = "these are fixed; after a change of the recipe take the commit of that change"
        refuse_if(named != drawn[: len(named)], f"pairs: lexicon seeds {named}, drawn_from gives {drawn}: {out}")
    for name, of in study.replicates.items():
        for one in (name, of):
            refuse_if(one not in variants, f"replicates: no variant '{one}' to declare '{name}: {of}' with {known}")
        instead, shared = "the variant that it repeats", set(study.seeds_of(name)) & set(seeds)
        refuse_if(of in study.replicates, f"replicates: '{of}' is a replicate itself: name {instead}")
        refuse_if(name == study.reference, f"reference: '{name}' is declared a replicate: compare with {instead}")
        refuse_if(
            shared,
            f"replicates: '{name}' would run seed {min(shared, default=0)} of '{of}' again (its seeds are those of the "
            f"study plus {REPLICATE_SHIFT}): choose other seeds",
        )


def plan_study(study: Study, runs_dir: str | Path = "runs", keep: Sequence[str] | None = None) -> dict[str, Config]:
    """{folder name: configuration} of all runs, seeds innermost; `keep` names the variants that are due.

    The whole study is checked, also what is not due.
    """
    files = study.base if isinstance(study.base, list) else [study.base]
    base = to_flat(study.base) if isinstance(study.base, Config) else load_layers(files)
    shared = [*base.pop("overrides", []), *study.overrides]
    configs: dict[str, Config] = {}
    lengths: dict[tuple, tuple | None] = {}
    for name, texts in study.variants.items():
        own = {"run.name": name, "run.seed": 0, "run.runs_dir": f"{runs_dir}", "run.cache_dir": f"{runs_dir}/.cache"}
        if pair := study.pair_of.get(name):
            own |= {f"pair.{side}_model": f"{runs_dir}/pairs/{pair}/{side}" for side in ("source", "target")}
        try:
            last = [format_override(*item) for item in own.items()]  # a name may look like a number
            config = configs[name] = load_config(overrides=[*shared, *texts, *last], **base)
            # A pair of the study's own is made when it runs.
            check_inputs(config.with_(source_model="embedded", target_model="embedded") if pair else config)
            check_parts(config)
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
            apart = {k: pair for k, pair in differences(flat, flats[of])[0].items() if k not in MEASUREMENT}
            for key, (one, other) in apart.items():
                why = f"{key} is {one!r} in the one and {other!r} in the other"
                raise ConfigError(f"replicates: '{name}' is no replicate of '{of}': {why}")
            continue
        settings = {k: v for k, v in effective_settings(flat, seed=False).items() if k not in MEASUREMENT}
        same = first.setdefault(repr(sorted(settings.items())), name)
        if same != name:
            inert = [key for key in flat if flat[key] != flats[same][key] and key != "run.name"]
            hint = f" ({', '.join(inert)} without effect here)" if inert else ""
            out = f"change one, or declare it with replicates: {{{name}: {same}}}"
            raise ConfigError(f"variants: '{same}' and '{name}' are the same experiment{hint}: {out}")


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
            "prompt_teacher: these overrides teach nothing by the prompt: name teacher=prompt and a prompt_weight, "
            "token_weight or flow_weight above 0, with an injector that has soft tokens"
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


def list_planned(planned: dict[str, Config], runs_dir: str | Path) -> None:
    """A line for each run: whether it is due, and what it changes of the first one's settings."""
    first = to_flat(next(iter(planned.values())))
    for name, config in planned.items():
        apart = differences(first, to_flat(config))[0]
        changes = [format_override(key, value) for key, (_, value) in apart.items() if not key.startswith("run.")]
        print(f"{'finished' if is_done(Path(runs_dir) / name, config) else 'due':8}  {name}  {' '.join(changes)}")


def main(argv: list[str] | None = None) -> None:
    """The `bridgekit study` verb."""
    parser = Parser(prog="bridgekit study", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a file of parameters/studies/")
    parser.add_argument("--runs-dir", default="runs")
    slots = f"trainings at once on each GPU (default: {SLOTS_PER_GPU}, and 1 where there is no GPU)"
    parser.add_argument("--slots", type=int, default=0, help=slots)
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these variants of the file, with all seeds")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they change, start nothing")
    args = parser.parse_args(argv)
    study = load_study(args.file)
    there, unknown = ", ".join(study.variants), set(args.only or []) - set(study.variants)
    refuse_if(unknown, f"--only: '{min(unknown, default='')}' is no variant of this file (there are: {there})")
    planned = plan_study(study, args.runs_dir, args.only)
    if args.dry_run:
        return list_planned(planned, args.runs_dir)
    run_planned(planned, args.runs_dir, args.slots, study.pairs, study.pair_options).check()
