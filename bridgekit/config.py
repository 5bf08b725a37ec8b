"""Strict run configuration: typed sections, refused typos, YAML in and out.

    config = load_config("parameters/phase1.yaml", overrides=["train.steps=200"])

A key may be given as `section.name` or by its name alone, because names are unique across sections: that is what
lets a notebook's flat parameters cell and dotted overrides be one mechanism. Nothing here imports torch.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml

from bridgekit.limits import (  # noqa: F401 (names of a configuration's parts: the package takes them from here)
    COMPUTED,
    CONDITIONS,
    CONTROLS,
    GROUPS,
    INJECTORS,
    PRODUCERS,
    SOFT_INJECTORS,
    ConfigError,
    check_values,
)


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
    task: str = "units"  # invented units, where the truth about who knows what is known | `gsm8k`, real questions
    data: str = ""  # of real questions: a folder with train.jsonl and test.jsonl (`bridgekit fetch`)
    n_shots: int = 0  # of real questions: solved training questions in front of each
    variant: str = "weights"  # where the source has the facts: `weights` or its `context`
    n_facts: int = 4  # facts in the context variant
    vary_facts: bool = False  # train on contexts of 1, 2, 4, ... facts, up to n_facts: few are learned before many
    data_seed: int = 1
    n_train: int = 16384
    n_val: int = 512
    n_test: int = 2000
    source_only_share: float = -1.0  # of the training mix; -1 keeps the natural mix
    train_units_share: float = 1.0  # nested subsets of the train units, for the generalisation curve
    train_values_share: float = 1.0  # train on the units of that share of the values alone: is a value composed?


@dataclass(frozen=True, kw_only=True)
class Bridge:
    producer: str = "resampler"
    injector: str = "prefix"
    n_soft_tokens: int = 16  # -1: as many as the source prompt has, at most 2,048
    soft_position: str = "start"  # `start` after BOS | `question` after a shared prefix | `end` after the question
    prompt_mode: str = "auto"  # `soft_plus_text`, or `soft_only` without the literal question; auto: by the teacher
    train_prompt_mode: str = "same"  # the seeds trained in another mode than they evaluated
    source_view: str = "prompt"  # `solution` adds the source's own worked answer | `facts` the context alone
    source_layers: str = "auto"  # comma-separated hidden-state indices; auto: at 0.6, 0.8 and all of the depth
    queries: str = "learned"  # what a soft token starts from; `local`: also from its own stretch of the source
    source_projection: bool = False  # learnable, identity at the start
    rms_match: bool = True
    inject_layers: str = "auto"  # target layers that a residual or kv injector works on; auto: eight, spread evenly
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
    decode_weight: float = 0.0  # the bridged target answers freely, and a loss on what it said reaches the bridge
    decode_estimator: str = "own_steps"  # gold answer after its own steps, or `policy_gradient` on right and wrong
    decode_every: int = 10  # training steps from one such decoding to the next
    decode_batch: int = 16  # questions decoded, over all processes
    decode_samples: int = 4  # answers sampled to a question (policy_gradient)
    decode_tokens: int = 64  # new tokens at most


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
    if config.bridge.prompt_mode == "auto":  # resolved once, so that a run folder says which it was
        config = dataclasses.replace(config, bridge=dataclasses.replace(config.bridge, prompt_mode=prompt_mode(config)))
    check_values(config, to_flat(config))
    return config


def prompt_mode(config: Config) -> str:
    """What `auto` means: tokens taught to be the prompt stand in its place, all others stand beside it."""
    taught = config.loss.prompt_weight > 0 or config.loss.flow_weight > 0 or config.bridge.dit_tokens == "teacher"
    has_tokens = config.bridge.injector in SOFT_INJECTORS
    return "soft_only" if config.bridge.teacher == "prompt" and taught and has_tokens else "soft_plus_text"


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
