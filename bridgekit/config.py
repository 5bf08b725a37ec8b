"""Strict run configuration: typed sections, refused typos, YAML in and out, and what makes two runs differ.

    config = load_config("parameters/phase1.yaml", overrides=["train.steps=200"])
    effective, inert = differences(to_flat(config), to_flat(other))

A key is `section.name` or its name alone, because names are unique across sections: that is what lets a notebook's flat
parameters cell and dotted overrides be one mechanism. The keys themselves stand in keys.py. Nothing here imports torch.
"""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bridgekit import keys
from bridgekit.keys import BY_NAME, DEFAULTS, FILE_OBJECT, KEYS, NEVER, OPTIONS, SECTIONS, holds, is_path

# The package takes the names of a configuration's parts from here.
CONDITIONS, CONTROLS, COMPUTED, GROUPS = keys.CONDITIONS, keys.CONTROLS, keys.COMPUTED, keys.GROUPS
PRODUCERS, INJECTORS, SOFT_INJECTORS = keys.PRODUCERS, keys.INJECTORS, keys.SOFT_INJECTORS
FORMAT = 2  # of a written configuration; a file without `format:` is of format 1 and stays readable
EMBEDDED = Path(__file__).parent / "model" / "embedded_pair"


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key and the way out."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run."""

    run: keys.Run = field(default_factory=keys.Run)
    pair: keys.Pair = field(default_factory=keys.Pair)
    task: keys.Task = field(default_factory=keys.Task)
    bridge: keys.Bridge = field(default_factory=keys.Bridge)
    loss: keys.Loss = field(default_factory=keys.Loss)
    train: keys.Train = field(default_factory=keys.Train)
    eval: keys.Eval = field(default_factory=keys.Eval)

    def with_(self, **changes) -> "Config":
        """A copy with some keys changed, checked like any other configuration."""
        return build_config(to_flat(self) | {resolve_key(k): v for k, v in changes.items()})

    @property
    def n_eval(self) -> int:
        return self.task.n_test if self.eval.eval_samples == -1 else self.eval.eval_samples


# ---- reading and writing --------------------------------------------------------------------------------------------


def resolve_key(name: str) -> str:
    """The dotted key for a full or short name; an unknown one is refused with its nearest neighbour."""
    found = name if name in KEYS else BY_NAME.get(name)
    if found is None:
        near = difflib.get_close_matches(str(name), [*KEYS, *BY_NAME], n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown parameter '{name}': did you mean '{near}'? (all keys: bridgekit config --help)")
    return found


def parse_override(text: str) -> tuple[str, object]:
    """`train.steps=200` to (key, value); the value is read as YAML, then held to the key's type."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"override '{text}': write it as key=value")
    try:
        return resolve_key(name.strip()), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override '{text}': its value is not valid YAML") from None


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), **values) -> Config:
    """Read a flat or sectioned YAML file, then keyword values, then dotted overrides; later ones win."""
    flat = {} if path is None else load_parameters(path)
    of_file = flat.pop("overrides", None) or []
    flat.pop("notebook", None)  # for which notebook the file is
    if not isinstance(of_file, list) or not all(isinstance(o, str) for o in of_file):
        raise ConfigError(f"{path}: overrides: expected a list of key=value texts, got {of_file!r}")
    flat = {resolve_key(k): v for k, v in flat.items()} | {resolve_key(k): v for k, v in values.items()}
    return build_config(flat | dict(parse_override(o) for o in [*of_file, *overrides]))


def load_parameters(path: str | Path) -> dict[str, object]:
    """The parameters of a YAML file as {name: value}; sections are flattened, `overrides` stays a list."""
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"{path}: no such parameters file")
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(loaded).__name__}")
    written_as = loaded.pop("format", 1)
    if type(written_as) is not int or not 1 <= written_as <= FORMAT:
        raise ConfigError(f"{path}: format {written_as!r} is not known here (1 to {FORMAT} are): update bridgekit")
    flat: dict[str, object] = {}
    for name, value in loaded.items():
        inside = name in SECTIONS and isinstance(value, dict)
        flat |= {f"{name}.{leaf}": v for leaf, v in value.items()} if inside else {name: value}
    return flat


def build_config(flat: dict[str, object]) -> Config:
    """A checked Config from {key: value}; keys may be short or dotted."""
    sections: dict[str, dict] = {name: {} for name in SECTIONS}
    for name, value in flat.items():
        section, leaf = resolve_key(name).split(".")
        sections[section][leaf] = check_type(f"{section}.{leaf}", KEYS[f"{section}.{leaf}"].type, value)
    config = Config(**{name: SECTIONS[name](**values) for name, values in sections.items()})
    if config.bridge.prompt_mode == "auto":  # resolved once, so that a run folder says which it was
        config = dataclasses.replace(config, bridge=dataclasses.replace(config.bridge, prompt_mode=prompt_mode(config)))
    for name, value in to_flat(config).items():
        check_value(name, value)
    check_rules(config)
    return config


def prompt_mode(config: Config) -> str:
    """What `auto` means: tokens taught to be the prompt stand in its place, all others stand beside it."""
    taught = config.loss.prompt_weight > 0 or config.loss.flow_weight > 0 or config.bridge.dit_tokens == "teacher"
    has_tokens = config.bridge.injector in SOFT_INJECTORS
    return "soft_only" if config.bridge.teacher == "prompt" and taught and has_tokens else "soft_plus_text"


def to_flat(config: Config) -> dict[str, object]:
    return {name: getattr(getattr(config, name.split(".")[0]), name.split(".")[1]) for name in KEYS}


def dump_config(config: Config) -> str:
    """YAML text that `load_config` reads back to an equal Config."""
    nested = dataclasses.asdict(config, dict_factory=lambda items: {k: _plain(v) for k, v in items})
    return yaml.safe_dump({"format": FORMAT} | nested, sort_keys=False)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def describe_keys() -> str:
    """Every key in a line: type, default, what is allowed, its meaning, and when it has an effect."""
    lines = ["keys, as section.name or name alone:"]
    for name, known in KEYS.items():
        allowed, only = known.metadata["allowed"], known.metadata["matters_if"]
        limits = allowed if isinstance(allowed, str) else "one of " * bool(allowed) + ", ".join(filter(None, allowed))
        kind = f"{'list' if isinstance(known.default, tuple) else known.type.__name__}, {_plain(known.default)!r}"
        effect = {"": "", NEVER: "; changes no result"}.get(only, f"; only if {only}")
        lines.append(f"  {name} ({kind}{'; ' if limits else ''}{limits}): {known.metadata['meaning']}{effect}")
    return "\n".join(lines)


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_type(name: str, kind: type, value: object) -> object:
    """Hold a value to its key's type; an int may stand for a float, nothing else is converted."""
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{name}: expected a list of names, got {value!r}")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        is_number = isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value, re.IGNORECASE)
        hint = f" (YAML reads {value} as text: write 1.0e-4 with a dot and a signed exponent)" if is_number else ""
        raise ConfigError(f"{name}: expected {kind.__name__}, got {type(value).__name__} {value!r}{hint}")
    return value


def check_value(name: str, value: object) -> None:
    """Refuse a value outside its key's names or limits."""
    allowed = KEYS[name].metadata["allowed"]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: must be a finite number, got {value}")
    if isinstance(allowed, str):
        if allowed and not holds(allowed, {}, value):
            raise ConfigError(f"{name}: must be {allowed}, got {value!r}")
        return
    for one in (value if isinstance(value, tuple) else (value,)) if allowed else ():
        if one not in allowed and not (FILE_OBJECT in allowed and is_path(one)):
            near = difflib.get_close_matches(one, allowed, n=1, cutoff=0.0)[0]
            names = ", ".join(filter(None, allowed))
            raise ConfigError(f"{name}: '{one}' is not one of {names} (nearest: {near})")


def check_rules(c: Config) -> None:
    """Refuse settings that exclude each other; the message names the key and the way out."""
    task, bridge, loss, flat, n = c.task, c.bridge, c.loss, to_flat(c), c.train.num_processes
    units, gsm8k, kv = task.task == "units", task.task == "gsm8k", bridge.injector == "kv"
    decodes, samples = loss.decode_weight > 0, loss.decode_estimator == "policy_gradient"
    has_flow = holds(keys.DIT, flat) or bridge.producer == "constant"
    is_device = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?").fullmatch
    device, multiple = "must be auto, cpu, mps, cuda or cuda:<number>", f"must be a multiple of num_processes ({n})"
    no_groups = f"task {task.task} has no knowledge groups: {{}} must stay {{}}".format
    pairs = "injector kv pairs the tokens of both prompts: set {}".format
    missing = [name for name in ("source", "target", "bridged") if name not in c.eval.conditions]
    idle = [name for name in c.train.controls if name != "self_bridge" and not has_loss(c, as_control=True)]
    rules = [  # (key, refused if, why)
        ("run.name", not re.fullmatch(r"[A-Za-z0-9_.-]+", c.run.name), "use letters, digits, '_', '-' and '.'"),
        ("pair.source_device", not is_device(c.pair.source_device), device),
        ("pair.target_device", not is_device(c.pair.target_device), device),
        ("bridge.heads", bridge.bridge_dim % bridge.heads, f"must divide bridge_dim ({bridge.bridge_dim})"),
        ("eval.eval_samples", c.eval.eval_samples > task.n_test, f"must be at most n_test ({task.n_test}), or -1"),
        ("train.val_samples", c.train.val_samples > task.n_val, f"must be at most n_val ({task.n_val})"),
        ("train.batch_size", c.train.batch_size % n, multiple),
        ("loss.decode_batch", decodes and loss.decode_batch % n, multiple),
        ("loss.decode_samples", decodes and samples and loss.decode_samples < 2,
         "policy_gradient compares answers to one question: use 2 or more"),
        ("loss.flow_weight", loss.flow_weight and not has_flow, "needs bridge.producer: dit, nothing else has a flow"),
        ("loss.extra_weight", loss.extra_weight and not loss.extra, f"needs loss.extra={FILE_OBJECT}"),
        ("task.n_shots", units and task.n_shots, "task units has no solved questions in front: leave it at 0"),
        ("task.data", gsm8k and not task.data,
         "task gsm8k needs a folder with train.jsonl and test.jsonl (`bridgekit fetch gsm8k --out DIR`)"),
        ("task.variant", not units and task.variant != "weights", no_groups("task.variant", "'weights'")),
        ("task.train_units_share", not units and task.train_units_share != 1, no_groups("train_units_share", 1)),
        ("task.train_values_share", not units and task.train_values_share != 1, no_groups("train_values_share", 1)),
        ("task.source_only_share", gsm8k and task.source_only_share != -1, no_groups("task.source_only_share", -1)),
        ("eval.conditions", gsm8k and "target_told" in c.eval.conditions,
         "'target_told' needs the fact in words, which task gsm8k does not have: leave it out"),
        ("train.controls", not units and task.source_only_share == -1 and "constant_natural" in c.train.controls,
         f"'constant_natural' is 'constant' again in task {task.task}, which has one mix: leave it out"),
        ("bridge.source_view", bridge.source_view == "facts" and task.variant != "context",
         "`facts` needs task.variant: context"),
        ("bridge.source_view", kv and bridge.source_view == "facts", pairs("source_view=prompt")),
        ("bridge.n_soft_tokens", kv and bridge.n_soft_tokens != -1, pairs("n_soft_tokens=-1")),
        ("bridge.prompt_mode", kv and bridge.prompt_mode != "soft_plus_text", pairs("prompt_mode=soft_plus_text")),
        ("bridge.train_prompt_mode", kv and bridge.train_prompt_mode == "soft_only", pairs("train_prompt_mode=same")),
        ("eval.conditions", missing, f"needs {', '.join(missing)}: every verdict compares source, target and bridged"),
        ("loss.nll_weight", not has_loss(c), "a training step would have no loss: give one a weight above 0"
         + (", or set loss.decode_every=1" if decodes else "")),
        ("train.controls", idle, f"{', '.join(idle)} would have no loss, because a constant is trained without flow, "
         "InfoNCE and prompt alignment: give another loss a weight, or leave it out"),
    ]  # fmt: skip
    for key, options in OPTIONS.items():
        why = f"{key} '{flat[key]}' takes no options, only an object of your own does"
        rules.append((options, flat[options] and not is_path(flat[key]), why))
    for key, broken, why in rules:
        if broken:
            raise ConfigError(f"{key}: {why}, got {flat[key]!r}")


def has_loss(config: Config, as_control: bool = False) -> bool:
    """Whether every training step has a loss; a constant control does without flow, InfoNCE and prompt alignment."""
    loss = config.loss
    weights = [loss.nll_weight, loss.kl_weight, loss.format_weight, loss.extra_weight]
    weights += [loss.decode_weight] if loss.decode_every == 1 else []
    if not as_control:
        weights += [loss.prompt_weight, loss.info_nce_weight]
        weights += [loss.flow_weight] if holds(keys.DIT, to_flat(config)) else []
    return any(weights) or config.train.steps == 0


def resolve_model_folder(key: str, model: str) -> Path | None:
    """The local folder of a model, or None for a hub id; a folder that is not there is refused."""
    if model == "embedded":
        return EMBEDDED / key.split("_")[0]
    path = Path(model)
    looks_local = path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1
    if looks_local and not (path / "config.json").is_file():
        raise ConfigError(f"pair.{key}: no model in '{model}' (config.json not found): give a folder or a hub id")
    return path if looks_local else None


def check_models(config: Config) -> None:
    """Refuse a missing pair before any run folder is made or GPU taken."""
    for key in ("source_model", "target_model"):
        folder = resolve_model_folder(key, getattr(config.pair, key))
        if folder is not None and not any(folder.glob("*.safetensors")):
            raise ConfigError(f"pair.{key}: no safetensors file in '{folder}': make a pair with `bridgekit pair`")


# ---- what makes two runs differ -------------------------------------------------------------------------------------


def effective_settings(flat: dict[str, object], seed: bool = True) -> dict[str, object]:
    """The settings that can change a result; without `seed` those of replicates are equal. Unknown keys are kept."""
    whole, kept = DEFAULTS | flat, {}
    mode, train_mode = whole["bridge.prompt_mode"], whole["bridge.train_prompt_mode"]
    no_text, no_prefix = {mode, train_mode} <= {"soft_only", "same"}, whole["task.task"] == "units"
    for name, value in flat.items():
        only = KEYS[name].metadata["matters_if"] if name in KEYS else ""
        if only == NEVER or only and not holds(only, whole) or name == "run.seed" and not seed:
            continue
        if name == "bridge.soft_position" and (no_text or no_prefix and value == "question"):
            value = "start"  # without text there is one place; without a shared prefix `question` is the start
        kept[name] = "same" if name == "bridge.train_prompt_mode" and value == mode else value
    return kept


def differences(a: dict[str, object], b: dict[str, object]) -> tuple[dict, dict]:
    """{key: (in a, in b)} of the settings that differ: those with an effect, and those without one."""
    a, b = ({name: _plain(value) for name, value in (DEFAULTS | flat).items()} for flat in (a, b))
    first, second = effective_settings(a), effective_settings(b)
    apart = {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}
    effective = {name: pair for name, pair in apart.items() if first.get(name) != second.get(name)}
    hidden = [name for name, known in KEYS.items() if known.metadata["matters_if"] == NEVER]
    return effective, {name: pair for name, pair in apart.items() if name not in effective and name not in hidden}
