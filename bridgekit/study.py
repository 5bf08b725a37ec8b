"""A study: named variants of one configuration, each trained with every seed; what cannot be compared is refused.

    study = read_study("parameters/ablation.yaml")
    planned = plan_study(study)          # {"<study>_<variant>_seed<N>": Config}

Two variants that amount to the same experiment are refused, because their difference would be noise sold as an
effect, unless one is declared a replicate of the other: `replicates: {A: B}`. A replicate runs on other seeds, those of
the study plus 100 (a second replicate of the same variant plus 200), and shows how large noise is.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridgekit.config import Config, ConfigError, load_config, read_parameters, to_flat
from bridgekit.effective import effective_settings
from bridgekit.tasks import load_examples
from bridgekit.tasks.base import literal_prompt

REPLICATE_SHIFT = 100
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
OWN_KEYS = ("name", "base", "overrides", "variants", "replicates", "reference", "seeds")
NOTEBOOK_KEYS = ("phase1_run", "report", "runs_dir", "slots")  # stand in the same file, for the notebook alone
# What is measured at the end, and by how many processes; the trained bridge is the same.
MEASUREMENT = ("eval.conditions", "eval.eval_samples", "train.controls", "train.num_processes")


@dataclass(frozen=True)
class Study:
    name: str
    base: str  # the parameters file that all variants start from
    variants: dict[str, list[str]]  # {name: dotted overrides}
    seeds: list[int]
    overrides: list[str] = field(default_factory=list)  # shared by all variants, before their own
    replicates: dict[str, str] = field(default_factory=dict)  # {name: the variant it repeats}
    reference: str = ""  # the variant that the others are compared with

    def __post_init__(self) -> None:
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


def read_study(path: str | Path) -> Study:
    """The study of a parameters file of the ablation notebook."""
    values = read_parameters(path)
    for key in set(values) - {*OWN_KEYS, *NOTEBOOK_KEYS}:
        raise ConfigError(f"{path}: unknown key '{key}' (a study has: {', '.join((*OWN_KEYS, *NOTEBOOK_KEYS))})")
    for key in ("base", "variants"):
        if key not in values:
            raise ConfigError(f"{path}: needs `{key}:`, a study has a base file and variants of it")
    values = {"name": Path(path).stem, "seeds": [1]} | {k: v for k, v in values.items() if k in OWN_KEYS}
    try:
        return Study(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def check_study(study: Study) -> None:
    """Refuse what is no study at all; whether its variants differ is for `plan_study`, which reads the base."""
    if not isinstance(study.name, str) or not NAME.fullmatch(study.name):
        raise ConfigError(f"name: use letters, digits, '_', '-' and '.', got {study.name!r}")
    if not isinstance(study.variants, dict) or len(study.variants) < 2:
        raise ConfigError(f"variants: a comparison needs at least two variants, got {study.variants!r}")
    for name, own in study.variants.items():
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise ConfigError(f"variants: name {name!r}: use letters, digits, '_', '-' and '.'")
        check_overrides(f"variants.{name}", own)
    check_overrides("overrides", study.overrides)
    if not isinstance(study.seeds, list) or not study.seeds or any(type(s) is not int or s < 0 for s in study.seeds):
        raise ConfigError(f"seeds: expected a list of whole numbers, got {study.seeds!r}")
    if len(set(study.seeds)) < len(study.seeds):
        raise ConfigError(f"seeds: each seed once, got {study.seeds!r}")
    if study.reference and study.reference not in study.variants:
        raise ConfigError(f"reference: no variant '{study.reference}' (there are: {', '.join(study.variants)})")
    _check_replicates(study)


def _check_replicates(study: Study) -> None:
    if not isinstance(study.replicates, dict):
        raise ConfigError(f"replicates: expected {{name: the variant it repeats}}, got {study.replicates!r}")
    for name, of in study.replicates.items():
        for one in (name, of):
            if one not in study.variants:
                known = ", ".join(study.variants)
                raise ConfigError(f"replicates: no variant '{one}' to declare '{name}: {of}' with (there are: {known})")
        if of in study.replicates:
            raise ConfigError(f"replicates: '{of}' is a replicate itself: name the variant that it repeats")
        if name == study.reference:
            raise ConfigError(f"reference: '{name}' is declared a replicate: compare with the variant that it repeats")
        if shared := set(study.seeds_of(name)) & set(study.seeds):
            raise ConfigError(
                f"replicates: '{name}' would run seed {min(shared)} of '{of}' again (its seeds are those of the study "
                f"plus {REPLICATE_SHIFT}): choose other seeds"
            )


def check_overrides(key: str, own: object) -> None:
    if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
        raise ConfigError(f"{key}: expected a list of key=value texts, got {own!r}")


def plan_study(study: Study, runs_dir: str | Path = "runs", keep: Sequence[str] | None = None) -> dict[str, Config]:
    """{folder name: configuration} of all runs, seeds innermost; `keep` names the variants that are due.

    The whole study is checked, also what is not due.
    """
    configs = {name: _configure(study, name, runs_dir) for name in study.variants}
    _check_distinct(study, configs)
    measured: dict[tuple, tuple | None] = {}
    for name, config in configs.items():
        if (config.pair, config.task) not in measured:
            measured[config.pair, config.task] = measure_prompts(config)
        check_positions(name, config, measured[config.pair, config.task])
    return {
        study.folder(name, seed): config.with_(seed=seed)
        for name, config in configs.items()
        if keep is None or name in keep
        for seed in study.seeds_of(name)
    }


def _configure(study: Study, name: str, runs_dir: str | Path) -> Config:
    own = [f"run.name={name}", "run.seed=0", f"run.runs_dir={runs_dir}", f"run.cache_dir={runs_dir}/.cache"]
    try:
        return load_config(study.base, [*study.overrides, *study.variants[name], *own])
    except ConfigError as error:
        raise ConfigError(str(error) if study.base in str(error) else f"variants.{name}: {error}") from None


def settings_of(config: Config) -> dict:
    """What the trained bridge depends on, but for the seed."""
    settings = effective_settings(to_flat(config), seed=False)
    return {key: value for key, value in settings.items() if key not in MEASUREMENT}


def _check_distinct(study: Study, configs: dict[str, Config]) -> None:
    first: dict[str, str] = {}
    for name, config in configs.items():
        settings = settings_of(config)
        if name in study.replicates:
            other = settings_of(configs[study.replicates[name]])
            apart = [key for key in {**settings, **other} if settings.get(key) != other.get(key)]
            if apart:
                raise ConfigError(
                    f"replicates: '{name}' is no replicate of '{study.replicates[name]}': {apart[0]} is "
                    f"{settings.get(apart[0])!r} in the one and {other.get(apart[0])!r} in the other"
                )
            continue
        same = first.setdefault(repr(sorted(settings.items())), name)
        if same != name:
            raise ConfigError(
                f"variants: '{same}' and '{name}' are the same experiment{_inert(configs[same], config)}: "
                f"change one, or declare it with replicates: {{{name}: {same}}}"
            )


def _inert(one: Config, other: Config) -> str:
    """The keys in which two equal experiments differ without effect."""
    first, second = to_flat(one), to_flat(other)
    apart = [key for key in first if first[key] != second[key] and key != "run.name"]
    return f" ({', '.join(apart)} without effect here)" if apart else ""


def measure_prompts(config: Config) -> tuple[int, int, int] | None:
    """The target's positions, and the longest prompts of target and source in tokens; None for models on a hub."""
    reader, answerer = ("source", "target") if config.pair.direction == "forward" else ("target", "source")
    source, target, seed = _read_model(config, reader), _read_model(config, answerer), _lexicon_seed(config)
    if source is None or target is None or seed is None:
        return None
    examples = [e for split in ("val", "test") for e in load_examples(config, seed, split)]
    texts = [literal_prompt(e).text for e in examples]
    read = [e.facts + text for e, text in zip(examples, texts, strict=True)]
    return target[0], _longest(target[1], texts), _longest(source[1], read)


def check_positions(name: str, config: Config, measured: tuple[int, int, int] | None) -> None:
    """Refuse more positions than the target has before anything is trained, where its files can be read.

    `batches.check_fit` asks the same of the loaded pair, in each training.
    """
    if measured is None:
        return
    positions, longest, read = measured
    soft, new = config.bridge.n_soft_tokens, config.eval.max_new_tokens
    soft = min(2048, 1 + read) if soft == -1 else soft
    if (needed := 1 + soft + longest + new) > positions:
        raise ConfigError(
            f"variants.{name}: bridge.n_soft_tokens: {soft} soft tokens, {longest} prompt tokens and {new} new ones "
            f"need {needed} positions; the target has {positions}: use fewer soft tokens"
        )


def _read_model(config: Config, key: str) -> tuple | None:
    """(positions, tokenizer) of a model on disk."""
    from tokenizers import Tokenizer

    folder = _model_folder(config, key)
    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return None
    facts = json.loads((folder / "config.json").read_text())
    if "max_position_embeddings" not in facts:
        return None
    return facts["max_position_embeddings"], Tokenizer.from_file(str(folder / "tokenizer.json"))


def _model_folder(config: Config, key: str) -> Path:
    model = getattr(config.pair, f"{key}_model")
    return Path(__file__).parent / "model" / "embedded_pair" / key if model == "embedded" else Path(model)


def _lexicon_seed(config: Config) -> int | None:
    record = _model_folder(config, "target").parent / "pair.json"
    return json.loads(record.read_text()).get("lexicon_seed") if record.is_file() else None


def _longest(tokenizer, texts: list[str]) -> int:
    return max(len(encoded.ids) for encoded in tokenizer.encode_batch(texts, add_special_tokens=False))


def same_run(one: Config, other: Config) -> bool:
    """Equal in all but the folders: a run keeps being itself when it is fetched or preserved."""
    return one == other.with_(runs_dir=one.run.runs_dir, cache_dir=one.run.cache_dir)


def swept_keys(planned: dict[str, Config]) -> set[str]:
    """The keys in which the runs of a plan differ, the seed and the names aside."""
    flats = [to_flat(config) for config in planned.values()]
    varied = {key for flat in flats for key in flat if flat[key] != flats[0][key]}
    return {key for key in varied if not key.startswith("run.")}
