"""Every configuration key in one line: type, default, meaning, what is allowed, and when it has an effect.

    steps: int = key(500, "training steps", ">= 0")
    kl_tokens: int = key(0, "first answer tokens compared; 0: all", ">= 0", "loss.kl_weight > 0")

Limits and conditions are written alike: `>= 0 and < 1`, `= -1 or >= 1`, `bridge.producer = dit or task.n_facts > 1`.
`config` builds, checks and compares configurations; import from there. Nothing here imports torch.
"""

import operator
import re
from dataclasses import dataclass, field, fields
from pathlib import Path

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
FILE_OBJECT = "path/to/file.py:Object"  # among the allowed names: an object in a file of the user's (extend.py)
OPTIONS = {  # {a key that may name such an object: the key with the object's options}
    "bridge.producer": "bridge.producer_options", "bridge.injector": "bridge.injector_options",
    "task.task": "task.options", "loss.extra": "loss.extra_options",
}  # fmt: skip

# Conditions of several keys; `=` also holds for an object of the user's, which may use every key.
CONTEXT, WEIGHTS = "task.variant = context", "task.variant = weights"
DIT, READS = "bridge.producer = dit", "bridge.producer != constant"
WIDE = "bridge.producer != constant or bridge.injector != prefix"
SOFT = "bridge.injector != residual and bridge.injector != kv"
QUERIES = (  # with one query per source token each starts from its own state; a pooled source has no states
    "bridge.producer = resampler and bridge.n_soft_tokens != -1"
    " or bridge.producer = dit and bridge.n_soft_tokens != -1 and bridge.dit_condition = cross"
)
IMITATES = f"loss.prompt_weight > 0 or {DIT} and loss.flow_weight > 0 or {DIT} and bridge.dit_tokens = teacher"
DECODES, EXTRA = "loss.decode_weight > 0", "loss.extra_weight > 0"
NEVER = "never"  # bookkeeping: changes no result
COMPARE = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
    "=": operator.eq,
    "!=": operator.ne,
}


def key(default, meaning: str, allowed: tuple | str = "", matters_if: str = ""):
    """A key's default, with its meaning, its names or limits, and the condition without which it has no effect."""
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed, "matters_if": matters_if})


def is_path(text: object) -> bool:
    """Whether a value names an object in a file below the project's root: `path/to/file.py:Object`."""
    found = isinstance(text, str) and re.fullmatch(r"([^:/~][^:]*\.py):[A-Za-z_]\w*", text)
    return bool(found) and ".." not in Path(found[1]).parts


def holds(condition: str, flat: dict[str, object], value: object = None) -> bool:
    """Whether `a = x and b > 0 or c != y` holds for the keys of `flat`; a part without a key is about `value`."""

    def part_holds(part: str) -> bool:
        *name, sign, wanted = part.split()
        found = flat[name[0]] if name else value
        if is_path(found):  # an object of the user's may use everything
            return True
        return (
            COMPARE[sign](found, type(found)(wanted))
            if isinstance(found, (int, float))
            else COMPARE[sign](found, wanted)
        )

    return any(all(map(part_holds, either.split(" and "))) for either in condition.split(" or "))


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's name, folders and seed."""

    name: str = key("phase1", "the run folder is runs_dir/<name>_<timestamp>", matters_if=NEVER)
    runs_dir: str = key("runs", "folder of the run folders", matters_if=NEVER)
    cache_dir: str = key("runs/.cache", "answers of the frozen models alone, by content", matters_if=NEVER)
    seed: int = key(1, "of the bridge's first weights, its examples and its sampler's noise", ">= 0 and < 4294967296")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The two frozen models."""

    source_model: str = key("embedded", "the model whose states are read: `embedded`, a local folder or a hub id")
    target_model: str = key("embedded", "the model that answers: `embedded`, a local folder or a hub id")
    direction: str = key("forward", "`swapped` exchanges the two models", ("forward", "swapped"))
    source_device: str = key("auto", "of the source: auto, cpu, mps, cuda or cuda:<number>")
    target_device: str = key("auto", "of the target: auto, cpu, mps, cuda or cuda:<number>")
    dtype: str = key("auto", "of both models; auto: float32 on CPU, bfloat16 on GPU", ("auto", "float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class Task:
    """The questions."""

    task: str = key("units", "invented units, or real questions", ("units", "gsm8k", FILE_OBJECT))
    options: tuple[str, ...] = key((), "name=value of a task of your own", (), f"task.task = {FILE_OBJECT}")
    data: str = key("", "folder with train.jsonl and test.jsonl, from the project's root", "", "task.task != units")
    n_shots: int = key(0, "solved training questions in front of each question (gsm8k)", ">= 0")
    variant: str = key("weights", "the source has facts in its weights or in its context", ("weights", "context"))
    n_facts: int = key(4, "facts in the source's context", "> 0", CONTEXT)
    vary_facts: bool = key(False, "train on 1, 2, 4, ... n_facts facts", "", f"{CONTEXT} and task.n_facts > 1")
    data_seed: int = key(1, "of the problems that are drawn, and of the order of real questions")
    n_train: int = key(16384, "training problems", "> 0")
    n_val: int = key(512, "validation problems", "> 0")
    n_test: int = key(2000, "test problems", "> 0")
    source_only_share: float = key(-1.0, "of the training mix; -1: the natural mix", "= -1 or >= 0 and <= 1")
    train_units_share: float = key(1.0, "of the train units; smaller shares are nested", "> 0 and <= 1", WEIGHTS)
    train_values_share: float = key(1.0, "of the values trained on; nested as well", "> 0 and <= 1", WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class Bridge:
    """What is trained: a producer makes a message from source states, an injector brings it into the target."""

    producer: str = key("resampler", "makes the message", (*PRODUCERS, FILE_OBJECT))
    producer_options: tuple[str, ...] = key(
        (), "name=value of a producer of your own", (), f"bridge.producer = {FILE_OBJECT}"
    )
    injector: str = key("prefix", "brings the message into the target", (*INJECTORS, FILE_OBJECT))
    injector_options: tuple[str, ...] = key(
        (), "name=value of an injector of your own", (), f"bridge.injector = {FILE_OBJECT}"
    )
    n_soft_tokens: int = key(16, "-1: as many as the source's prompt has, at most 2048", "= -1 or >= 1 and <= 2048")
    soft_position: str = key(
        "start", "soft tokens stand after BOS, before or after the question", ("start", "question", "end"), SOFT
    )
    prompt_mode: str = key("auto", "what the target reads; auto: by teacher", ("auto", "soft_plus_text", "soft_only"))
    train_prompt_mode: str = key("same", "what it reads in training", ("same", "soft_plus_text", "soft_only"))
    source_view: str = key(
        "prompt", "what the bridge reads: the source's prompt, also its own solution, or the facts in context alone",
        ("prompt", "solution", "facts"), READS,
    )  # fmt: skip
    source_layers: str = key("auto", "hidden states, e.g. 2,4,6; auto: at 0.6, 0.8 and all of the depth", "", READS)
    queries: str = key(
        "learned",
        "initial queries; local: learned + mean of the j-th K-th of the source",
        ("learned", "local"),
        QUERIES,
    )
    source_projection: bool = key(False, "a learnable projection of source states, first the identity", "", READS)
    rms_match: bool = key(True, "bring soft tokens to the size of the target's embeddings")
    inject_layers: str = key("auto", "target layers, e.g. 2,4,6; auto: eight", "", "bridge.injector != prefix")
    bridge_dim: int = key(192, "width of the bridge, a multiple of heads", "> 0", WIDE)
    depth: int = key(2, "blocks of the producer", "> 0", READS)
    heads: int = key(6, "attention heads", "> 0", WIDE)
    dropout: float = key(0.0, "inside the bridge", ">= 0 and < 1", WIDE)
    state_dropout: float = key(0.0, "of source states: against learning train words by heart", ">= 0 and < 1", READS)
    dit_steps_train: int = key(4, "sampling steps in training", "> 0", DIT)
    dit_steps_eval: int = key(4, "sampling steps in evaluation", "> 0", DIT)
    dit_condition: str = key("cross", "attend to source states, or pool them", ("cross", "mean", "attention"), DIT)
    dit_prediction: str = key("tokens", "what is predicted at each step", ("tokens", "velocity"), DIT)
    dit_tokens: str = key("sampled", "in training; teacher: noised gold embeddings", ("sampled", "teacher"), DIT)
    teacher: str = key("answer", "what flow and prompt alignment imitate", ("answer", "prompt"), IMITATES)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The losses; a weight of 0 switches one off."""

    nll_weight: float = key(1.0, "likelihood of the gold answer", ">= 0")
    answer_tokens: int = key(0, "first answer tokens that are supervised; 0: all", ">= 0")
    kl_weight: float = key(0.0, "KL to the target alone on the answer's tokens", ">= 0")
    kl_tokens: int = key(0, "first answer tokens compared; 0: all", ">= 0", "loss.kl_weight > 0")
    prompt_weight: float = key(0.0, "distance of soft tokens from the teacher's embeddings", ">= 0")
    info_nce_weight: float = key(0.0, "tell one's own question from the others of the batch", ">= 0")
    info_nce_temperature: float = key(0.07, "of InfoNCE", "> 0", "loss.info_nce_weight > 0")
    format_weight: float = key(0.0, "likelihood of the answer's `####` marker", ">= 0")
    flow_weight: float = key(0.0, "rectified flow of a DiT", ">= 0", DIT)
    decode_weight: float = key(0.0, "a loss on what the bridged target decodes freely", ">= 0")
    decode_estimator: str = key(
        "own_steps", "gold answer after its own steps, or by reward", ("own_steps", "policy_gradient"), DECODES
    )
    decode_every: int = key(10, "training steps from one free decoding to the next", "> 0", DECODES)
    decode_batch: int = key(16, "questions decoded, over all processes", "> 0", DECODES)
    decode_samples: int = key(
        4, "answers sampled for a question", "> 0", f"{DECODES} and loss.decode_estimator = policy_gradient"
    )
    decode_tokens: int = key(64, "new tokens at most", "> 0", DECODES)
    extra: str = key("", "a loss of your own", ("", FILE_OBJECT), EXTRA)
    extra_weight: float = key(0.0, "of a loss of your own", ">= 0")
    extra_options: tuple[str, ...] = key((), "name=value of a loss of your own", (), EXTRA)


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training loop."""

    steps: int = key(500, "training steps", ">= 0")
    batch_size: int = key(32, "over all processes", "> 0")
    lr: float = key(1.0e-3, "highest learning rate", "> 0")
    warmup_steps: int = key(40, "of linear warm-up, before a cosine to zero", ">= 0")
    weight_decay: float = key(0.01, "of AdamW", ">= 0")
    grad_clip: float = key(1.0, "largest norm of the gradient", "> 0")
    eval_every: int = key(100, "steps from one validation to the next", "> 0")
    val_samples: int = key(256, "validation problems answered each time, at most n_val", "> 0")
    patience: int = key(0, "validations without a better one before stopping; 0: never", ">= 0")
    cache_states_gb: float = key(4.0, "source states are kept when they fit in this", ">= 0", NEVER)
    num_processes: int = key(1, "processes, one GPU each", "> 0")
    controls: tuple[str, ...] = key(("constant", "constant_natural"), "trained controls", CONTROLS)


@dataclass(frozen=True, kw_only=True)
class Eval:
    """The evaluation."""

    eval_samples: int = key(-1, "test problems; -1: all of n_test", "= -1 or >= 1")
    eval_batch_size: int = key(128, "prompts decoded at once", "> 0", NEVER)
    max_new_tokens: int = key(96, "tokens of an answer, at most", "> 0")
    conditions: tuple[str, ...] = key(tuple(c for c in CONDITIONS if c not in CONTROLS), "who answers", CONDITIONS)
    noise_floor: bool = key(False, "count answers that flip at a second batch size", "", NEVER)


SECTIONS = {cls.__name__.lower(): cls for cls in (Run, Pair, Task, Bridge, Loss, Train, Eval)}
KEYS = {f"{section}.{f.name}": f for section, cls in SECTIONS.items() for f in fields(cls)}
BY_NAME = {name.split(".")[1]: name for name in KEYS}
DEFAULTS = {name: f.default for name, f in KEYS.items()}
