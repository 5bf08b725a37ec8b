"""Strict run configuration: typed sections, refused typos, YAML in and out.

    config = load_config("parameters/phase1.yaml", overrides=["train.steps=200"])

A key may be given as `section.name` or by its name alone, because names are unique across sections: that is what
lets a notebook's flat parameters cell and dotted overrides be one mechanism. Nothing here imports torch.
"""

import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

# Order matters: it is the order of table rows and legends everywhere.
CONDITIONS = (
    "source", "target", "bridged", "target_suffix", "target_told", "zero", "noise", "shuffled", "constant",
    "constant_natural", "self_bridge", "relay_full", "relay_cut", "relay_answer", "router", "union",
)  # fmt: skip
GROUPS = ("source_only", "target_only", "both")
PRODUCERS = ("resampler", "dit", "constant")
INJECTORS = ("prefix",)
CONTROLS = ("constant", "constant_natural", "self_bridge")  # each is a training of its own
COMPUTED = ("router", "union")  # made from other columns, never generated


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key and the way out."""


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str = "phase1"  # the run folder is runs_dir/<name>_<timestamp>
    runs_dir: str = "runs"
    cache_dir: str = "runs/.cache"  # baselines of frozen models, by content
    seed: int = 1  # of the bridge's initialisation, its examples and its sampler noise


@dataclass(frozen=True, kw_only=True)
class Pair:
    source_model: str = "embedded"  # `embedded`, a local folder, or a hub id
    target_model: str = "embedded"
    direction: str = "forward"  # `swapped` exchanges the two
    source_device: str = "auto"
    target_device: str = "auto"
    dtype: str = "auto"  # float32 on CPU, bfloat16 on GPU


@dataclass(frozen=True, kw_only=True)
class Task:
    task: str = "units"
    variant: str = "weights"  # where the source has the facts: `weights` or its `context`
    n_facts: int = 4  # facts in the context variant
    data_seed: int = 1
    n_train: int = 16384
    n_val: int = 512
    n_test: int = 2000
    source_only_share: float = -1.0  # of the training mix; -1 keeps the natural mix
    train_units_share: float = 1.0  # nested subsets of the train units, for the generalisation curve


@dataclass(frozen=True, kw_only=True)
class Bridge:
    producer: str = "resampler"
    injector: str = "prefix"
    n_soft_tokens: int = 16  # -1: as many as the source prompt has, at most 2,048
    soft_position: str = "start"  # `start` after BOS | `question` after a shared prefix | `end` after the question
    prompt_mode: str = "soft_plus_text"  # `soft_only` leaves the literal question out
    train_prompt_mode: str = "same"  # the seeds trained in another mode than they evaluated
    source_view: str = "prompt"  # `solution` adds the source's own worked answer | `facts` the context alone
    source_layers: str = "auto"  # comma-separated hidden-state indices; auto: the last fifth of the depth
    source_projection: bool = False  # learnable, identity at the start
    rms_match: bool = True
    bridge_dim: int = 192
    depth: int = 2
    heads: int = 6
    dropout: float = 0.0
    state_dropout: float = 0.0  # on the source states themselves: against learning train words by heart
    dit_steps_train: int = 4
    dit_steps_eval: int = 4
    dit_condition: str = "cross"  # `mean` and `attention` pool the source into one vector
    dit_prediction: str = "tokens"  # what the network predicts at each step: `tokens` or `velocity`
    dit_tokens: str = "sampled"  # `teacher`: training tokens come from noised gold embeddings, as in the seeds
    teacher: str = "answer"  # what flow and prompt alignment imitate: `answer` or `prompt` embeddings


@dataclass(frozen=True, kw_only=True)
class Loss:
    nll_weight: float = 1.0
    answer_tokens: int = 0  # first answer tokens that are supervised at all; 0: all. Fewer cost less per step
    kl_weight: float = 0.0
    kl_tokens: int = 0  # first answer tokens compared; 0: all
    prompt_weight: float = 0.0
    info_nce_weight: float = 0.0
    info_nce_temperature: float = 0.07
    format_weight: float = 0.0
    flow_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 500
    batch_size: int = 32  # over all processes
    lr: float = 1.0e-3
    warmup_steps: int = 40
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    eval_every: int = 100
    val_samples: int = 256
    patience: int = 0  # evaluations without a better validation accuracy before stopping; 0: never
    cache_states_gb: float = 4.0  # frozen source states are kept when they fit in this
    num_processes: int = 1
    controls: tuple[str, ...] = ("constant", "constant_natural")


@dataclass(frozen=True, kw_only=True)
class Eval:
    eval_samples: int = -1  # test problems; -1: all of n_test
    eval_batch_size: int = 128
    max_new_tokens: int = 96
    conditions: tuple[str, ...] = tuple(c for c in CONDITIONS if c not in CONTROLS)
    noise_floor: bool = False  # evaluate `bridged` at a second batch size and report flipped answers


@dataclass(frozen=True, kw_only=True)
class Config:
    run: Run = field(default_factory=Run)
    pair: Pair = field(default_factory=Pair)
    task: Task = field(default_factory=Task)
    bridge: Bridge = field(default_factory=Bridge)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)

    def with_(self, **changes) -> "Config":
        """A copy with some keys changed, checked like any other configuration."""
        return build_config(to_flat(self) | {resolve_key(k): v for k, v in changes.items()})

    @property
    def n_eval(self) -> int:
        return self.task.n_test if self.eval.eval_samples == -1 else self.eval.eval_samples


SECTIONS = {f.name: f.default_factory for f in fields(Config)}
KEYS = {f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in fields(cls)}
BY_NAME = {key.split(".")[1]: key for key in KEYS}

CHOICES = {
    "pair.direction": ("forward", "swapped"),
    "pair.dtype": ("auto", "float32", "bfloat16"),
    "task.task": ("units",),
    "task.variant": ("weights", "context"),
    "bridge.producer": PRODUCERS,
    "bridge.injector": INJECTORS,
    "bridge.soft_position": ("start", "question", "end"),
    "bridge.prompt_mode": ("soft_plus_text", "soft_only"),
    "bridge.train_prompt_mode": ("same", "soft_plus_text", "soft_only"),
    "bridge.source_view": ("prompt", "solution", "facts"),
    "bridge.dit_condition": ("cross", "mean", "attention"),
    "bridge.dit_prediction": ("tokens", "velocity"),
    "bridge.dit_tokens": ("sampled", "teacher"),
    "bridge.teacher": ("answer", "prompt"),
}
POSITIVE = (
    "task.n_facts", "task.n_train", "task.n_val", "task.n_test", "bridge.bridge_dim", "bridge.depth", "bridge.heads",
    "bridge.dit_steps_train", "bridge.dit_steps_eval", "train.batch_size", "train.lr", "train.grad_clip",
    "train.eval_every", "train.val_samples", "train.num_processes", "eval.eval_batch_size", "eval.max_new_tokens",
    "loss.info_nce_temperature",
)  # fmt: skip
NOT_NEGATIVE = tuple(k for k in KEYS if k.startswith("loss.")) + (
    "train.steps", "train.warmup_steps", "train.patience", "train.cache_states_gb", "train.weight_decay", "run.seed",
    "bridge.dropout", "bridge.state_dropout",
)  # fmt: skip


def resolve_key(name: str) -> str:
    """The dotted key for a full or short name; an unknown one is refused with its nearest neighbour."""
    key = name if name in KEYS else BY_NAME.get(name)
    if key is None:
        near = difflib.get_close_matches(str(name), [*KEYS, *BY_NAME], n=1, cutoff=0.0)[0]
        raise ConfigError(f"unknown parameter '{name}': did you mean '{near}'? (all keys: bridgekit config --help)")
    return key


def parse_override(text: str) -> tuple[str, object]:
    """`train.steps=200` to (key, value); the value is read as YAML, then held to the key's type."""
    if "=" not in text:
        raise ConfigError(f"override '{text}': write it as key=value")
    name, value = text.split("=", 1)
    try:
        return resolve_key(name.strip()), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"override '{text}': its value is not valid YAML") from None


def check_type(key: str, value: object) -> object:
    """Hold a value to its field's type; an int may stand for a float, nothing else is converted."""
    kind = KEYS[key].type
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value):
            return tuple(value)
        raise ConfigError(f"{key}: expected a list of names, got {value!r}")
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        hint = ""
        if kind in (int, float) and isinstance(value, str) and _is_number(value):
            hint = f" (YAML reads {value} as text: write 1.0e-4 with a dot and a signed exponent)"
        raise ConfigError(f"{key}: expected {kind.__name__}, got {type(value).__name__} {value!r}{hint}")
    return value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def build_config(flat: dict[str, object]) -> Config:
    """A checked Config from {key: value}; keys may be short or dotted."""
    sections: dict[str, dict] = {name: {} for name in SECTIONS}
    for name, value in flat.items():
        key = resolve_key(name)
        section, leaf = key.split(".")
        sections[section][leaf] = check_type(key, value)
    config = Config(**{name: SECTIONS[name](**values) for name, values in sections.items()})
    check_values(config)
    return config


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = (), **values) -> Config:
    """Read a flat or sectioned YAML file, then keyword values, then dotted overrides; later ones win."""
    flat: dict[str, object] = {}
    if path is not None:
        flat |= read_parameters(path)
        own = flat.pop("overrides", None) or []
        if not isinstance(own, list) or not all(isinstance(o, str) for o in own):
            raise ConfigError(f"{path}: overrides: expected a list of key=value texts, got {own!r}")
        overrides = [*own, *overrides]
    flat = {resolve_key(k): v for k, v in flat.items()}
    flat |= {resolve_key(k): v for k, v in values.items()}
    flat |= dict(parse_override(o) for o in overrides)
    return build_config(flat)


def read_parameters(path: str | Path) -> dict[str, object]:
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
    flat: dict[str, object] = {}
    for name, value in loaded.items():
        if name in SECTIONS and isinstance(value, dict):
            flat |= {f"{name}.{leaf}": v for leaf, v in value.items()}
        else:
            flat[name] = value
    return flat


def to_flat(config: Config) -> dict[str, object]:
    return {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in KEYS}


def dump_config(config: Config) -> str:
    """YAML text that `load_config` reads back to an equal Config."""
    nested = dataclasses.asdict(config, dict_factory=lambda items: {k: _plain(v) for k, v in items})
    return yaml.safe_dump(nested, sort_keys=False)


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def check_values(config: Config) -> None:
    """Refuse values no run can have; the message names the key and what would do."""
    flat = to_flat(config)

    def refuse(key: str, why: str) -> typing.NoReturn:
        raise ConfigError(f"{key}: {why}, got {flat[key]!r}")

    for key, allowed in CHOICES.items():
        if flat[key] not in allowed:
            refuse(key, f"must be one of {', '.join(allowed)}")
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            refuse(key, "must be a finite number")
    for key in POSITIVE:
        if not flat[key] > 0:
            refuse(key, "must be above 0")
    for key in NOT_NEGATIVE:
        if not flat[key] >= 0:
            refuse(key, "must not be negative")
    if config.bridge.n_soft_tokens != -1 and not 1 <= config.bridge.n_soft_tokens <= 2048:
        refuse("bridge.n_soft_tokens", "must be 1 to 2048, or -1 for as many as the source prompt has")
    if config.bridge.bridge_dim % config.bridge.heads:
        refuse("bridge.heads", f"must divide bridge_dim ({config.bridge.bridge_dim})")
    for key in ("bridge.dropout", "bridge.state_dropout"):
        if flat[key] >= 1:
            refuse(key, "must be below 1")
    share = config.task.source_only_share
    if share != -1 and not 0 <= share <= 1:
        refuse("task.source_only_share", "must lie between 0 and 1, or be -1 for the natural mix")
    if not 0 < config.task.train_units_share <= 1:
        refuse("task.train_units_share", "must lie above 0 and at most at 1")
    if not (config.eval.eval_samples == -1 or 1 <= config.eval.eval_samples <= config.task.n_test):
        refuse("eval.eval_samples", f"must be 1 to n_test ({config.task.n_test}), or -1 for all")
    if config.train.val_samples > config.task.n_val:
        refuse("train.val_samples", f"must not exceed n_val ({config.task.n_val})")
    if config.bridge.source_view == "facts" and config.task.variant != "context":
        refuse("bridge.source_view", "`facts` needs task.variant: context")
    if config.loss.flow_weight > 0 and config.bridge.producer not in ("dit", "constant"):
        refuse("loss.flow_weight", "needs bridge.producer: dit, nothing else has a flow")
    if config.train.batch_size % config.train.num_processes:
        refuse("train.batch_size", f"must be a multiple of num_processes ({config.train.num_processes})")
    for key, allowed in (("eval.conditions", CONDITIONS), ("train.controls", CONTROLS)):
        for name in flat[key]:
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)[0]
                refuse(key, f"'{name}' is not one of {', '.join(allowed)} (nearest: {near})")
    for name in ("source", "target", "bridged"):
        if name not in config.eval.conditions:
            refuse("eval.conditions", f"must hold '{name}': every verdict compares source, target and bridged")
    if not config.run.name or not set(config.run.name) <= set(_NAME_CHARACTERS):
        refuse("run.name", "use letters, digits, '_', '-' and '.'")


_NAME_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."
