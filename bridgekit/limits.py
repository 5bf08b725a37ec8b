"""What a configuration may hold: the names of things, and the values that no run can have.

Nothing here imports torch. `config` builds configurations and calls `check_values` on each.
"""

import difflib
import math
import typing

# Order matters: it is the order of table rows and legends everywhere.
CONDITIONS = (
    "source", "target", "bridged", "target_suffix", "target_told", "zero", "noise", "shuffled", "constant",
    "constant_natural", "self_bridge", "relay_full", "relay_cut", "relay_answer", "router", "union",
)  # fmt: skip
GROUPS = ("source_only", "target_only", "both")
PRODUCERS = ("resampler", "dit", "constant")
INJECTORS = ("prefix", "residual", "prefix+residual", "kv")
SOFT_INJECTORS = ("prefix", "prefix+residual")  # those whose message takes places in the target's prompt
CONTROLS = ("constant", "constant_natural", "self_bridge")  # each is a training of its own
COMPUTED = ("router", "union")  # made from other columns, never generated


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key and the way out."""


CHOICES = {
    "pair.direction": ("forward", "swapped"),
    "pair.dtype": ("auto", "float32", "bfloat16"),
    "task.task": ("units", "gsm8k"),
    "task.variant": ("weights", "context"),
    "bridge.producer": PRODUCERS,
    "bridge.injector": INJECTORS,
    "bridge.soft_position": ("start", "question", "end"),
    "bridge.prompt_mode": ("auto", "soft_plus_text", "soft_only"),
    "bridge.train_prompt_mode": ("same", "soft_plus_text", "soft_only"),
    "bridge.source_view": ("prompt", "solution", "facts"),
    "bridge.queries": ("learned", "local"),
    "bridge.dit_condition": ("cross", "mean", "attention"),
    "bridge.dit_prediction": ("tokens", "velocity"),
    "bridge.dit_tokens": ("sampled", "teacher"),
    "bridge.teacher": ("answer", "prompt"),
    "loss.decode_estimator": ("own_steps", "policy_gradient"),
}
POSITIVE = (
    "task.n_facts", "task.n_train", "task.n_val", "task.n_test", "bridge.bridge_dim", "bridge.depth", "bridge.heads",
    "bridge.dit_steps_train", "bridge.dit_steps_eval", "train.batch_size", "train.lr", "train.grad_clip",
    "train.eval_every", "train.val_samples", "train.num_processes", "eval.eval_batch_size", "eval.max_new_tokens",
    "loss.info_nce_temperature", "loss.decode_every", "loss.decode_batch", "loss.decode_samples", "loss.decode_tokens",
)  # fmt: skip
NOT_NEGATIVE = (
    "task.n_shots",
    "loss.nll_weight", "loss.answer_tokens", "loss.kl_weight", "loss.kl_tokens", "loss.prompt_weight",
    "loss.info_nce_weight", "loss.format_weight", "loss.flow_weight", "loss.decode_weight",
    "train.steps", "train.warmup_steps", "train.patience", "train.cache_states_gb", "train.weight_decay", "run.seed",
    "bridge.dropout", "bridge.state_dropout",
)  # fmt: skip
NAME_CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-."


def check_real_questions(config, refuse: typing.Callable) -> None:
    """Refuse what only a task whose facts are known can have."""
    if not config.task.data:
        refuse("task.data", f"task {config.task.task} needs a folder with train.jsonl and test.jsonl "
               f"(`bridgekit fetch {config.task.task} --out DIR`)")  # fmt: skip
    for key, plain in (("variant", "weights"), ("source_only_share", -1.0), ("train_units_share", 1.0),
                       ("train_values_share", 1.0)):  # fmt: skip
        if getattr(config.task, key) != plain:
            refuse(f"task.{key}", f"nobody knows who knows what in task {config.task.task}: leave it at {plain}")
    if "target_told" in config.eval.conditions:
        refuse("eval.conditions", f"'target_told' needs the fact in words, which task {config.task.task} has not")
    if "constant_natural" in config.train.controls:
        refuse(
            "train.controls", f"'constant_natural' is 'constant' again in task {config.task.task}, which has one mix"
        )


def check_values(config, flat: dict[str, object]) -> None:
    """Refuse values no run can have; the message names the key and what would do."""

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
    for key in ("train_units_share", "train_values_share"):
        if not 0 < getattr(config.task, key) <= 1:
            refuse(f"task.{key}", "must lie above 0 and at most at 1")
    if not (config.eval.eval_samples == -1 or 1 <= config.eval.eval_samples <= config.task.n_test):
        refuse("eval.eval_samples", f"must be 1 to n_test ({config.task.n_test}), or -1 for all")
    if config.train.val_samples > config.task.n_val:
        refuse("train.val_samples", f"must not exceed n_val ({config.task.n_val})")
    if config.task.task == "units":
        if config.task.n_shots:
            refuse("task.n_shots", "task units has no solved questions in front: only real questions have")
    else:
        check_real_questions(config, refuse)
    if config.bridge.source_view == "facts" and config.task.variant != "context":
        refuse("bridge.source_view", "`facts` needs task.variant: context")
    if config.bridge.injector == "kv":  # its message tokens are paired with the literal prompt's, one by one
        for key, needed in (("n_soft_tokens", -1), ("prompt_mode", "soft_plus_text")):
            if flat[f"bridge.{key}"] != needed:
                refuse(f"bridge.{key}", f"injector kv pairs source and target tokens: set {key}={needed}")
        if config.bridge.train_prompt_mode == "soft_only":
            refuse("bridge.train_prompt_mode", "injector kv needs the literal prompt in training as well: set same")
        if config.bridge.source_view == "facts":
            refuse("bridge.source_view", "injector kv pairs source and target tokens: the source must read the prompt")
    if config.loss.decode_weight > 0:
        if config.loss.decode_estimator == "policy_gradient" and config.loss.decode_samples < 2:
            refuse("loss.decode_samples", "policy_gradient compares answers to one question: use 2 or more")
        if config.loss.decode_batch % config.train.num_processes:
            refuse("loss.decode_batch", f"must be a multiple of num_processes ({config.train.num_processes})")
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
    if not config.run.name or not set(config.run.name) <= set(NAME_CHARACTERS):
        refuse("run.name", "use letters, digits, '_', '-' and '.'")
