"""Strict run configuration: typed sections, refused typos, YAML in and out, and what makes two runs differ.

    config = load_config("parameters/phase1.yaml", overrides=["train.steps=200"])
    effective, inert = differences(to_flat(config), to_flat(other))

A key is `section.name` or its name alone, because names are unique across sections: that is what lets a notebook's flat
parameters cell and dotted overrides be one mechanism. The keys themselves stand in keys.py. Nothing here imports torch.
"""

import argparse
import difflib
import glob
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, make_dataclass
from pathlib import Path

import yaml

from bridgekit import keys
from bridgekit.keys import (
    BY_NAME,
    DEFAULTS,
    FILE_OBJECT,
    GEOMETRIES,
    GEOMETRY,
    KEYS,
    NEVER,
    OPTIONS,
    SECTIONS,
    ConfigError,
    holds,
    is_path,
    load_yaml,
    parse_yaml,
    refuse_if,
)

# The package takes the names of a configuration's parts from here.
CONDITIONS, CONTROLS, GROUPS = keys.CONDITIONS, keys.CONTROLS, keys.GROUPS
PRODUCERS, INJECTORS, SOFT_INJECTORS = keys.PRODUCERS, keys.INJECTORS, keys.SOFT_INJECTORS
FORMAT = 2  # of a written configuration; a file without `format:` is of format 1 and stays readable
EMBEDDED = Path(__file__).parent / "model" / "embedded_pair"
OTHER_FILES = {"base": "study", "entries": "batch"}  # {a key that stands in no file of parameters: what has it}


class Parser(argparse.ArgumentParser):
    """A verb's arguments; a mistaken one is refused in one line, as everything else is."""

    def error(self, message: str) -> None:
        raise ConfigError(f"{self.prog}: {message} (all there is: {self.prog} --help)")


Run, Pair, Task, Bridge, Loss, Train, Eval = (
    make_dataclass(section.title(), [(name, type(known.default), known.default) for name, known in leaves], frozen=True)
    for section, leaves in SECTIONS.items()
)


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run; the fields of a section are the keys that begin with its name."""

    run: Run = Run()
    pair: Pair = Pair()
    task: Task = Task()
    bridge: Bridge = Bridge()
    loss: Loss = Loss()
    train: Train = Train()
    eval: Eval = Eval()

    def with_(self, **changes) -> "Config":
        """A copy with some keys changed, checked like any other configuration."""
        return build_config(to_flat(self), changes)


# ---- reading and writing --------------------------------------------------------------------------------------------


def resolve_key(name: str) -> str:
    """The dotted key for a full or short name; an unknown one is refused with its nearest neighbour."""
    if name not in KEYS and name not in BY_NAME:
        near = nearest(name, [*KEYS, *BY_NAME])
        raise ConfigError(f"unknown parameter '{name}': did you mean '{near}'? (all keys: bridgekit config --help)")
    return BY_NAME.get(name, name)


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that looks most like a mistaken one; empty where none is known."""
    return next(iter(difflib.get_close_matches(str(name)[:80], known, n=1, cutoff=0.0)), "")


def suggest_file(path: str | Path) -> str:
    """`: did you mean 'parameters/phase1.yaml'?` for a file that is not there, by those beside it; or what to name."""
    path, form = Path(path), f"*{glob.escape(Path(path).suffix)}"
    beside = [*path.parent.glob(form), *Path("parameters").rglob(form), *Path("notebooks").glob(form)]
    near = nearest(str(path), [str(p) for p in beside if p.is_file() and path.suffix])
    return f": did you mean '{near}'?" if near else ": name a file that exists"


def parse_override(text: str) -> tuple[str, object]:
    """`train.steps=200` to (key, value); the value is read as YAML, then held to the key's type."""
    name, equals, value = text.partition("=")
    refuse_if(not equals, f"override '{text}': write it as key=value")
    return resolve_key(name.strip()), parse_yaml(f"override '{text}'", value)


def format_override(key: str, value: object) -> str:
    """The text that `parse_override` reads."""
    return f"{key}={yaml.safe_dump(value, default_flow_style=True, width=9999).splitlines()[0]}"


def parse_texts(where: str, texts: object) -> dict[str, object]:
    """{dotted key: value} of a list of key=value texts; `where` names the list that is refused."""
    is_list = isinstance(texts, list) and all(isinstance(text, str) for text in texts)
    refuse_if(not is_list, f"{where}: expected a list of key=value texts, got {texts!r}")
    try:
        return dict(map(parse_override, texts))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def load_parameters(path: str | Path) -> dict[str, object]:
    """The parameters of a YAML file as {name: value}; sections are flattened, `overrides` stays a list."""
    refuse_if(not Path(path).is_file(), f"{path}: no such parameters file{suggest_file(path)}")
    loaded = load_yaml(path) or {}
    is_table = isinstance(loaded, dict)
    refuse_if(not is_table, f"{path}: expected `key: value` lines, got {type(loaded).__name__}")
    written_as = loaded.pop("format", 1)
    is_known = type(written_as) is int and 1 <= written_as <= FORMAT
    refuse_if(not is_known, f"{path}: format {written_as!r} is not known here (1 to {FORMAT} are): update bridgekit")
    parse_texts(f"{path}: overrides", loaded.get("overrides") or [])
    flat: dict[str, object] = {}
    for name, value in loaded.items():
        inside = name in SECTIONS and isinstance(value, dict)
        flat |= {f"{name}.{leaf}": v for leaf, v in value.items()} if inside else {name: value}
    return flat


def load_layers(files: Iterable[str | Path], notebook: str = "") -> dict[str, object]:
    """The parameters of several files: later ones win, and their lists of overrides add up."""
    values: dict[str, object] = {}
    for file in files:
        layer = load_parameters(file)
        meant, wrong = layer.pop("notebook", notebook), f"{file}: holds parameters of the notebook"
        refuse_if(notebook and meant != notebook, f"{wrong} '{meant}', not of '{notebook}': name that one")
        kind = next((kind for key, kind in OTHER_FILES.items() if key in layer and notebook == "phase1"), "")
        refuse_if(kind, f"{file}: holds a {kind}, not a run's parameters: bridgekit {kind} {file} (--help says more)")
        if "overrides" in layer:
            layer["overrides"] = [*values.get("overrides", []), *(layer["overrides"] or [])]
        values |= layer
    return values


def load_config(
    files: str | Path | Iterable[str | Path] = (), overrides: Iterable[str] = (), notebook: str = "", **values
) -> Config:
    """Read flat or sectioned YAML files, then keyword values, then dotted overrides; later ones win."""
    layer = load_layers([files] if isinstance(files, (str, Path)) else files, notebook)
    own = layer.pop("overrides", [])
    return build_config(layer, values, dict(map(parse_override, [*own, *overrides])))


def build_config(*layers: dict[str, object]) -> Config:
    """A checked Config from {key: value}, of which later ones win; keys may be short or dotted."""
    given = {resolve_key(name): value for layer in layers for name, value in layer.items()}
    flat = DEFAULTS | {name: check_value(name, value) for name, value in given.items()}
    if flat["bridge.prompt_mode"] == "auto":  # resolved once, so that a run folder says which it was
        # Tokens taught to be the prompt stand in its place, all others stand beside it.
        taught = any(flat[f"loss.{name}"] for name in keys.TEACHERS) or flat["bridge.dit_tokens"] == "teacher"
        alone = taught and flat["bridge.teacher"] == "prompt" and flat["bridge.injector"] in SOFT_INJECTORS
        flat["bridge.prompt_mode"] = "soft_only" if alone else "soft_plus_text"
    sections = {s: {leaf: flat[f"{s}.{leaf}"] for leaf, _ in leaves} for s, leaves in SECTIONS.items()}
    config = Config(**{s: type(getattr(Config, s))(**values) for s, values in sections.items()})
    check_rules(config)
    return config


def to_flat(config: Config) -> dict[str, object]:
    """{dotted key: value} of a configuration."""
    return {f"{section}.{leaf}": v for section, values in asdict(config).items() for leaf, v in values.items()}


def dump_config(config: Config) -> str:
    """YAML text that `load_config` reads back to an equal Config."""
    return yaml.safe_dump({"format": FORMAT} | asdict(config), sort_keys=False)


def describe_keys() -> str:
    """Every key in a line: type, default, what is allowed, its meaning, and when it has an effect."""
    lines = ["keys, as section.name or name alone:"]
    for name, (default, meaning, allowed, only) in KEYS.items():
        limits = allowed if isinstance(allowed, str) else "one of " * bool(allowed) + ", ".join(filter(None, allowed))
        kind = "list" if isinstance(default, tuple) else type(default).__name__
        about = "; ".join(filter(None, [f"{kind}, {format_override('', default)[1:]}", limits]))
        effect = {"": "", NEVER: "; changes no result"}.get(only, f"; only if {only}")
        lines.append(f"  {name} ({about}): {meaning}{effect}")
    return "\n".join(lines)


# ---- checks ---------------------------------------------------------------------------------------------------------


def check_type(name: str, kind: type, value: object) -> object:
    """Hold a value to its key's type; an int may stand for a float, nothing else is converted."""
    if kind is tuple:
        is_list = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
        refuse_if(not is_list, f"{name}: expected a list of names, got {value!r}")
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value) if abs(value) < 2**64 else math.inf
    is_number = isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value, re.IGNORECASE)
    way_out = "1.0e-4 with a dot and a signed exponent" if kind is float else "digits alone, without a leading zero"
    hint = f" (YAML reads {value} as text: write {way_out})" if is_number else ""
    found = f"{type(value).__name__} {value!r}{hint}"
    refuse_if(type(value) is not kind, f"{name}: expected {kind.__name__}, got {found}")
    return value


def check_value(name: str, value: object) -> object:
    """Hold a value to its key's type, and refuse one outside its names or limits."""
    default, _, allowed, _ = KEYS[name]
    value = check_type(name, type(default), value)
    refuse_if(isinstance(value, float) and not math.isfinite(value), f"{name}: must be a finite number, got {value}")
    is_huge = type(value) is int and abs(value) > 2**32
    refuse_if(is_huge, f"{name}: too large a number, got {value!r}: use a smaller one")
    unclear = [text for text in (value if isinstance(value, tuple) else [str(value)]) if not text.isprintable()]
    refuse_if(unclear, f"{name}: has characters that cannot be printed, got {value!r}: take them out")
    if isinstance(allowed, str):
        refuse_if(allowed and not holds(allowed, {}, value), f"{name}: must be {allowed}, got {value!r}")
        return value
    for one in (value if isinstance(value, tuple) else (value,)) if allowed else ():
        if one not in allowed and not (FILE_OBJECT in allowed and is_path(one)):
            is_file, names = FILE_OBJECT in allowed and ".py" in one, ", ".join(filter(None, allowed))
            hint = "a path begins in the project folder" if is_file else f"nearest: {nearest(one, allowed)}"
            raise ConfigError(f"{name}: '{one}' is not one of {names} ({hint})")
    return value


def count_shards(device: str) -> int:
    """Over how many GPUs `shard:<number>` spreads a model; 1 for any other device."""
    spread = re.fullmatch(r"shard:(\d+)", device)
    return int(spread[1]) if spread else 1


def knows_places(bridge) -> bool:
    """Whether `placed` queries are asked for and have an effect: a pooled source has no places."""
    pooled = bridge.producer == "dit" and bridge.dit_condition != "cross"
    return bridge.queries == "placed" and bridge.n_soft_tokens != -1 and not pooled


def check_rules(c: Config) -> None:
    """Refuse settings that exclude each other; the message names the key and the way out."""
    task, bridge, loss, flat, n = c.task, c.bridge, c.loss, to_flat(c), c.train.num_processes
    units, real, kv = task.task == "units", task.task in keys.REAL, bridge.injector == "kv"
    paragraphs = task.task == "hotpotqa"
    decodes, samples = loss.decode_weight > 0, loss.decode_estimator == "policy_gradient"
    has_flow = holds(keys.DIT, flat) or bridge.producer == "constant"
    is_device = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?").fullmatch
    device, multiple = "must be auto, cpu, mps, cuda or cuda:<number>", f"must be a multiple of num_processes ({n})"
    is_spread = count_shards(c.pair.target_device) > 1
    no_groups = f"task {task.task} has no knowledge groups: {{}} must stay {{}}".format
    pairs = "injector kv pairs the tokens of both prompts: set {}".format
    missing = [name for name in ("source", "target", "bridged") if name not in c.eval.conditions]
    idle = [name for name in c.train.controls if name != "self_bridge" and not holds(keys.LOSS_OF_ALL, flat)]
    rules = [  # (key, refused if, why)
        ("run.name", not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", c.run.name), "use letters, digits, '_', '-' and '.'"),
        ("run.runs_dir", not is_inside(c.run.runs_dir), INSIDE),
        ("run.cache_dir", not is_inside(c.run.cache_dir), INSIDE),
        ("pair.source_device", not is_device(c.pair.source_device), device),
        ("pair.target_device", not is_device(c.pair.target_device) and not is_spread, f"{device}, or shard:<GPUs>"),
        ("pair.target_device", is_spread and n > 1, "one process drives all its GPUs: set num_processes=1"),
        ("pair.target_device", is_spread and bridge.injector != "prefix", "only injector prefix reaches such a target"),
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
        ("task.data", real and not task.data, f"task {task.task} needs a folder with train.jsonl and test.jsonl "
         f"(`bridgekit fetch {task.task} --out DIR`)"),
        ("task.variant", task.variant != "weights" and not units and not paragraphs,
         no_groups("task.variant", "'weights'")),
        ("task.train_units_share", not units and task.train_units_share != 1, no_groups("train_units_share", 1)),
        ("task.train_values_share", not units and task.train_values_share != 1, no_groups("train_values_share", 1)),
        ("task.source_only_share", real and task.source_only_share != -1, no_groups("task.source_only_share", -1)),
        ("eval.conditions", real and not paragraphs and "target_told" in c.eval.conditions,
         f"'target_told' needs the fact in words, which task {task.task} does not have: leave it out"),
        ("loss.format_weight", paragraphs and loss.format_weight,
         "an answer of task hotpotqa has no marker that a loss could ask for: leave it at 0"),
        ("train.controls", not units and task.source_only_share == -1 and "constant_natural" in c.train.controls,
         f"'constant_natural' is 'constant' again in task {task.task}, which has one mix: leave it out"),
        ("bridge.inject_from", bridge.inject_from == "question" and bridge.injector in SOFT_INJECTORS
         and bridge.soft_position == "start" and bridge.prompt_mode != "soft_only",
         "a message before the shots acts on them: set soft_position=question"),
        ("bridge.source_view", bridge.source_view == "facts" and task.variant != "context",
         "`facts` needs task.variant: context"),
        ("bridge.teacher", bridge.teacher == "facts" and not holds(keys.FACTS, flat),
         "`facts` needs task.task: units and task.variant: context"),
        ("bridge.source_view", kv and bridge.source_view == "facts", pairs("source_view=prompt")),
        ("bridge.n_soft_tokens", kv and bridge.n_soft_tokens != -1, pairs("n_soft_tokens=-1")),
        ("bridge.prompt_mode", kv and bridge.prompt_mode != "soft_plus_text", pairs("prompt_mode=soft_plus_text")),
        ("bridge.train_prompt_mode", kv and bridge.train_prompt_mode == "soft_only", pairs("train_prompt_mode=same")),
        ("eval.conditions", missing, f"needs {', '.join(missing)}: every verdict compares source, target and bridged"),
        ("loss.nll_weight", not holds(keys.LOSS, flat), "a training step would have no loss: give one a weight above 0"
         + (", or set loss.decode_every=1" if decodes else "")),
        ("train.teacher_steps", c.train.teacher_steps and not (holds(keys.TAUGHT, flat) and holds(keys.UNTAUGHT, flat)),
         "needs prompt_weight or token_weight, and for each later step another loss (decode with decode_every=1)"),
        ("train.teacher_steps", c.train.teacher_steps >= c.train.steps > 0, f"must be below steps ({c.train.steps})"),
        ("train.controls", idle, f"{', '.join(idle)} would have no loss, because a constant is trained without flow, "
         "InfoNCE and what a teacher says: give another loss a weight, or leave it out"),
    ]  # fmt: skip
    alone = "{} '{}' takes no options, only an object of your own does".format
    rules += [(own, flat[own] and not is_path(flat[key]), alone(key, flat[key])) for key, own in OPTIONS.items()]
    for key, broken, why in rules:
        refuse_if(broken, f"{key}: {why}, got {flat[key]!r}")


INSIDE = "name a folder below the project's root, or an absolute path, without braces"


def is_inside(folder: str) -> bool:
    """Whether a folder that is written to lies below the project, or was asked for by its absolute path; papermill
    takes braces for a parameter."""
    outside = folder.startswith("~") or not folder.startswith("/") and ".." in Path(folder).parts
    return bool(folder) and not outside and not set(folder) & set("{}")


def check_written(values: dict[str, object]) -> None:
    """Refuse a notebook's parameter by which it would write outside of the project."""
    for name in (name for name in ("runs_dir", "out_dir", "figures_dir") if name in values):
        refuse_if(not is_inside(str(values[name])), f"{name}: {INSIDE}, got {values[name]!r}")


def resolve_model_folder(key: str, model: str) -> Path | None:
    """The local folder of a model; None for a hub id or random weights. A folder that is not there is refused."""
    if model == "embedded":
        return EMBEDDED / key.split("_")[0]
    if is_geometry(model):
        name = model.removeprefix(GEOMETRY).split("@")[0]
        why = f"no shape '{name}' (nearest: {nearest(name, GEOMETRIES)}; there are: {', '.join(GEOMETRIES)})"
        refuse_if(name not in GEOMETRIES, f"pair.{key}: {why}")
        return None
    path, hub_id = Path(model), model.split("@")[0]
    looks_local = path.exists() or model.startswith((".", "/", "~")) or hub_id.count("/") != 1
    missing = looks_local and not (path / "config.json").is_file()
    refuse_if(missing, f"pair.{key}: no model in '{model}' (config.json not found): give a folder or a hub id")
    return path if looks_local else None


def is_geometry(model: str) -> bool:
    """Whether a model's name asks for random weights of a published shape."""
    return model.startswith(GEOMETRY)


def is_safe(key: str) -> bool:
    """Whether a run may go on with another value of this key."""
    return key in keys.SAFE or KEYS[key].matters_if == NEVER


# ---- what makes two runs differ -------------------------------------------------------------------------------------


def effective_settings(flat: dict[str, object], seed: bool = True) -> dict[str, object]:
    """The settings that can change a result; without `seed` those of replicates are equal. Unknown keys are kept."""
    whole, kept = DEFAULTS | flat, {}
    mode, train_mode = whole["bridge.prompt_mode"], whole["bridge.train_prompt_mode"]
    no_text, no_prefix = {mode, train_mode} <= {"soft_only", "same"}, whole["task.task"] == "units"
    for name, value in flat.items():
        only = KEYS[name].matters_if if name in KEYS else ""
        if only == NEVER or only and not holds(only, whole) or name == "run.seed" and not seed:
            continue
        if name == "bridge.soft_position" and (no_text or no_prefix and value == "question"):
            value = "start"  # without text there is one place; without a shared prefix `question` is the start
        kept[name] = "same" if name == "bridge.train_prompt_mode" and value == mode else value
    return kept


def find_idle(config: Config) -> dict[str, str]:
    """{key: when it would have an effect} of the keys that were changed without any."""
    flat = to_flat(config)
    effective = effective_settings(flat)
    changed = [key for key, value in flat.items() if value != DEFAULTS[key] and key not in effective]
    return {key: KEYS[key].matters_if for key in changed if KEYS[key].matters_if != NEVER}


def differences(a: dict[str, object], b: dict[str, object]) -> tuple[dict, dict]:
    """{key: (in a, in b)} of the settings that differ: those with an effect, and those without one."""
    a, b = ({k: list(v) if isinstance(v, tuple) else v for k, v in (DEFAULTS | flat).items()} for flat in (a, b))
    first, second = effective_settings(a), effective_settings(b)
    apart = {name: (a.get(name), b.get(name)) for name in {**a, **b} if a.get(name) != b.get(name)}
    effective = {name: pair for name, pair in apart.items() if first.get(name) != second.get(name)}
    hidden = {*effective, *(name for name, known in KEYS.items() if known.matters_if == NEVER)}
    return effective, {name: pair for name, pair in apart.items() if name not in hidden}
