"""What a configuration amounts to: the settings that can change a result, without those that have no effect.

    effective_settings(record.config)
    differing_settings(one_record, other_record)

A decode interval at decode weight 0, a DiT option of a run without a DiT, the name of the run: none of these
makes two runs different experiments. Keys of the first experiments and of this package are both known.
"""

from __future__ import annotations

import typing

from bridgekit.audit.runfolders import RunRecord

SEEDS = ("seed", "run.seed")
BOOKKEEPING = ("show_eval_samples", "run.name", "run.runs_dir", "run.cache_dir",
               "eval.eval_batch_size", "eval.noise_floor", "train.cache_states_gb")  # fmt: skip

# (without effect when this holds, the settings concerned); a trailing * stands for any ending
_INERT: tuple[tuple[typing.Callable[[dict], bool], tuple[str, ...]], ...] = (
    (
        lambda c: not c.get("decode_loss_weight", 1),
        ("decode_interval", "decode_samples", "decode_max_length"),
    ),
    (lambda c: c.get("bridge", "dit") != "dit", ("dit_*",)),
    (lambda c: not c.get("dit_loss_weight", 1), ("dit_loss_warmup",)),
    (lambda c: c.get("soft_injection", "adapter") != "adapter", ("adapter_scale",)),
    (lambda c: c.get("bridge.producer", "dit") != "dit", ("bridge.dit_*", "loss.flow_weight")),
    (lambda c: c.get("bridge.producer") == "constant", ("bridge.source_*", "bridge.depth", "bridge.queries")),
    (
        lambda c: c.get("bridge.producer") == "constant" and c.get("bridge.injector", "prefix") == "prefix",
        ("bridge.heads", "bridge.bridge_dim", "bridge.dropout"),
    ),
    (lambda c: c.get("bridge.n_soft_tokens") == -1, ("bridge.queries",)),  # each starts from its own state anyway
    (  # it sees no states, only one vector of them
        lambda c: c.get("bridge.producer") == "dit" and c.get("bridge.dit_condition", "cross") != "cross",
        ("bridge.queries",),
    ),
    (lambda c: c.get("bridge.injector", "prefix") == "prefix", ("bridge.inject_layers",)),
    (lambda c: c.get("bridge.injector") in ("residual", "kv"), ("bridge.soft_position",)),
    (
        lambda c: not c.get("loss.decode_weight", 1),
        (
            "loss.decode_every",
            "loss.decode_estimator",
            "loss.decode_batch",
            "loss.decode_samples",
            "loss.decode_tokens",
        ),
    ),
    (lambda c: c.get("loss.decode_estimator") == "own_steps", ("loss.decode_samples",)),
    (lambda c: not c.get("loss.kl_weight", 1), ("loss.kl_tokens",)),
    (lambda c: not c.get("loss.info_nce_weight", 1), ("loss.info_nce_temperature",)),
    (lambda c: not _imitates(c), ("bridge.teacher",)),
    (lambda c: c.get("task.task") == "units", ("task.data",)),
    (lambda c: c.get("task.variant", "context") != "context", ("task.n_facts", "task.vary_facts")),
    (lambda c: c.get("task.variant") == "context", ("task.train_units_share", "task.train_values_share")),
    (lambda c: c.get("task.n_facts") == 1, ("task.vary_facts",)),
)

# (when this holds, this setting, amounts to this value): two spellings of one thing
_SAME: tuple[tuple[typing.Callable[[dict], bool], str, object], ...] = (
    (lambda c: c.get("bridge.train_prompt_mode") == c.get("bridge.prompt_mode"), "bridge.train_prompt_mode", "same"),
    # without few-shot examples the place after the shared prefix is the start; without text there is one place
    (
        lambda c: c.get("bridge.soft_position") == "question" and c.get("task.task") == "units",
        "bridge.soft_position",
        "start",
    ),
    (
        lambda c: {c.get("bridge.prompt_mode"), c.get("bridge.train_prompt_mode")} <= {"soft_only", "same"},
        "bridge.soft_position",
        "start",
    ),
)


def _imitates(config: dict) -> bool:
    """Whether anything of the run is made from the teacher's embeddings."""
    weights = config.get("loss.flow_weight", 1) or config.get("loss.prompt_weight", 1)
    return bool(weights) or config.get("bridge.dit_tokens") == "teacher"


def effective_settings(config: dict, seed: bool = True) -> dict:
    """The settings that can matter; without `seed` also those of replicates are equal."""
    same = {key: value for holds, key, value in _SAME if key in config and holds(config)}
    config = config | same
    inert = [key for holds, keys in _INERT if holds(config) for key in keys]
    dropped = (*BOOKKEEPING, *inert, *(() if seed else SEEDS))
    return {key: value for key, value in config.items() if not any(_matches(key, name) for name in dropped)}


def _matches(key: str, name: str) -> bool:
    return key.startswith(name[:-1]) if name.endswith("*") else key == name


def identity(record: RunRecord, seed: bool = True) -> tuple:
    """Equal for two runs exactly when they are the same experiment on the same number of processes."""
    settings = effective_settings(record.config, seed)
    return (
        *sorted((k, repr(v)) for k, v in settings.items()),
        ("world_size", record.facts.get("world_size")),
    )


def differing_settings(one: RunRecord, other: RunRecord, seed: bool = True) -> dict[str, tuple]:
    """{setting: (in one, in the other)} for the settings that differ and have an effect."""
    first, second = effective_settings(one.config, seed), effective_settings(other.config, seed)
    keys = dict.fromkeys([*first, *second])
    return {k: (first.get(k), second.get(k)) for k in keys if repr(first.get(k)) != repr(second.get(k))}


def inert_differences(one: RunRecord, other: RunRecord) -> dict[str, tuple]:
    """{setting: (in one, in the other)} for the settings that differ without effect."""
    keys = dict.fromkeys([*one.config, *other.config])
    apart = {k: (one.config.get(k), other.config.get(k)) for k in keys if one.config.get(k) != other.config.get(k)}
    effective = differing_settings(one, other)
    return {k: v for k, v in apart.items() if k not in effective and k not in BOOKKEEPING}
