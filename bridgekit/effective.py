"""What the first experiments' settings amount to; this package's own keys are in config.py.

    effective_settings(record.config)
    differing_settings(one_record, other_record)

A decode interval at decode weight 0, a DiT option of a run without a DiT, the name of the run: none of these
makes two runs different experiments.
"""

from __future__ import annotations

import typing

from bridgekit import config as configuration
from bridgekit.config import KEYS, NEVER

if typing.TYPE_CHECKING:
    from bridgekit.audit.runfolders import RunRecord

BOOKKEEPING = ("show_eval_samples", *(name for name, known in KEYS.items() if known.metadata["matters_if"] == NEVER))
_INERT = (  # (without effect when this holds, the settings concerned)
    (lambda c: not c.get("decode_loss_weight", 1), ("decode_interval", "decode_samples", "decode_max_length")),
    (lambda c: c.get("bridge", "dit") != "dit", ("dit_",)),
    (lambda c: not c.get("dit_loss_weight", 1), ("dit_loss_warmup",)),
    (lambda c: c.get("soft_injection", "adapter") != "adapter", ("adapter_scale",)),
)


def effective_settings(config: dict, seed: bool = True) -> dict:
    """The settings that can matter; without `seed` also those of replicates are equal."""
    inert = ("show_eval_samples", *(key for applies, keys in _INERT if applies(config) for key in keys))
    inert += () if seed else ("seed",)
    kept = {key: value for key, value in config.items() if not key.startswith(inert)}
    return configuration.effective_settings(kept, seed)


def identity(record: RunRecord, seed: bool = True) -> tuple:
    """Equal for two runs exactly when they are the same experiment on the same number of processes."""
    settings = effective_settings(record.config, seed)
    return (*sorted((k, repr(v)) for k, v in settings.items()), ("world_size", record.facts.get("world_size")))


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
