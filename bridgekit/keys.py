"""Every configuration key in one line: type, default, meaning, what is allowed, and when it has an effect.

    "train.steps": Key(500, "training steps", ">= 0"),
    "loss.kl_tokens": Key(0, "first answer tokens compared; 0: all", ">= 0", "loss.kl_weight > 0"),

Limits and conditions are written alike: `>= 0 and < 1`, `= -1 or >= 1`, `bridge.producer = dit or task.n_facts > 1`.
`load_yaml` reads the YAML that these and all other files of a user's are written in.
`config` builds, checks and compares configurations; import from there. Nothing here imports torch.
"""

import math
import re
import typing
from operator import eq, ge, gt, le, lt, ne
from pathlib import Path

import yaml

# Order matters: it is the order of table rows and legends everywhere.
CONDITIONS = tuple(
    "source target bridged target_suffix target_told zero noise shuffled constant constant_natural self_bridge"
    " relay_full relay_cut relay_answer router union".split()
)
GROUPS = ("source_only", "target_only", "both")
PRODUCERS = ("resampler", "dit", "constant")
INJECTORS = ("prefix", "residual", "prefix+residual", "kv")
SOFT_INJECTORS = ("prefix", "prefix+residual")  # those whose message takes places in the target's prompt
REAL = ("gsm8k", "math", "hotpotqa")  # tasks of real questions, read from files
CONTROLS = ("constant", "constant_natural", "self_bridge")  # each is a training of its own
VIEWS, STARTS = ("prompt", "question", "solution", "facts"), ("auto", "prompt", "question")
INVALID = "[invalid]"  # stands in `<condition>_extracted` where no answer was found
GEOMETRY = "geometry:"  # begins the name of a model with random weights (model/geometry.py)
# The published shapes, also of the hub's models of these names before their config.json is there (train/plan.py).
SIZES = "model_type hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
SIZES = (*SIZES.split(), "tie_word_embeddings", "max_position_embeddings")
GEOMETRIES = {
    "tiny": ("llama", 64, 2, 4, 2, 128, 2048, True, 1024),
    "qwen2.5-0.5b": ("qwen2", 896, 24, 14, 2, 4864, 151936, True, 32768),
    "qwen2.5-1.5b": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True, 32768),
    "mistral-7b": ("mistral", 4096, 32, 32, 8, 14336, 32768, False, 32768),
    "llama-3.1-8b": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 131072),
    "llama-3.1-70b": ("llama", 8192, 80, 64, 8, 28672, 128256, False, 131072),
}
# Kinds of model without a cache of keys and values, with one of their own, or with wrong states in a padded batch.
UNSUPPORTED = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm", "recurrent_gemma", "minimax")
PROMPT_FORMATS = ("plain", "chat")
FILE_OBJECT = "path/to/file.py:Object"  # among the allowed names: an object in a file of the user's (extend.py)
# {a key that may name such an object: the key with the object's options}
OPTIONS = {key: f"{key}_options" for key in ("bridge.producer", "bridge.injector", "loss.extra")}
OPTIONS["task.task"] = "task.options"

# Conditions of several keys; `=` also holds for an object of the user's, which may use every key.
FACTS, WEIGHTS = "task.variant = context and task.task = units", "task.variant = weights"
PARAGRAPHS = "task.task = hotpotqa"
PLACES = "initial; local: + mean of the source's j-th K-th; placed: source and queries know their places"
DIT, READS = "bridge.producer = dit", "bridge.producer != constant"
WIDE = f"{READS} or bridge.injector != prefix"
SOFT = "bridge.injector != residual and bridge.injector != kv"
# With one query per source token each starts from its own state; a pooled source has no states.
FIXED = "bridge.n_soft_tokens != -1"
QUERIES = f"bridge.producer = resampler and {FIXED} or {DIT} and {FIXED} and bridge.dit_condition = cross"
TEACHERS = ("prompt_weight", "token_weight", "flow_weight")  # of the losses that say what soft tokens are to be
TAUGHT = "loss.prompt_weight > 0 or loss.token_weight > 0"
FLOWS = f"{DIT} and loss.flow_weight > 0"
IMITATES = f"{TAUGHT} or {FLOWS} or {DIT} and bridge.dit_tokens = teacher"
# Every training step has a loss; a constant control does without InfoNCE and what a teacher says.
LOSS_OF_ALL = " or ".join(f"loss.{name}_weight > 0" for name in ("nll", "kl", "format", "extra"))
LOSS_OF_ALL += " or loss.decode_weight > 0 and loss.decode_every = 1 or train.steps = 0"
UNTAUGHT = f"{LOSS_OF_ALL} or loss.info_nce_weight > 0"
LOSS = f"{UNTAUGHT} or {TAUGHT} or {FLOWS}"
DECODES, EXTRA = "loss.decode_weight > 0", "loss.extra_weight > 0"
NEVER = "never"  # bookkeeping: changes no result
# What may differ when an interrupted run goes on, beside bookkeeping: how long it is, and on what machine.
SAFE = ("train.steps", "train.patience", "train.num_processes", "pair.source_device", "pair.target_device")
COMPARE = {">": gt, ">=": ge, "<": lt, "<=": le, "=": eq, "!=": ne}


LONGEST_YAML = 200_000  # characters; a file of parameters has a few thousand
MOST_NODES = 20_000  # of a YAML text, with everything that its aliases stand for


class ConfigError(ValueError):
    """A configuration that cannot run; the message is one line that names the key and the way out."""

    def __init__(self, message: object) -> None:
        text = " ".join(str(message).split())  # a value may be many lines, or very long
        super().__init__(text if len(text) <= 1000 else f"{text[:600]} ... {text[-300:]}")


def refuse_if(wrong: object, message: str) -> None:
    """Raise the one line that says what is wrong with something the user gave."""
    if wrong:
        raise ConfigError(message)


class StrictLoader(yaml.SafeLoader):
    """Safe YAML without its traps: a name may stand once, `0100` and `1:30` are texts, aliases stand for little."""

    def compose_mapping_node(self, anchor):
        """As in YAML, but the second of two equal names would silently win."""
        node, seen = super().compose_mapping_node(anchor), set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node

    def get_single_node(self):
        """As in YAML, but a few lines of aliases of aliases would fill the memory."""
        node = super().get_single_node()
        if node is not None and count_nodes(node, {}) > MOST_NODES:
            raise yaml.MarkedYAMLError(problem="its aliases stand for too much", problem_mark=node.start_mark)
        return node


def count_nodes(node: yaml.Node, known: dict[int, float]) -> float:
    """The parts of a YAML node, those behind aliases counted each time; infinite where it holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(count_nodes(part, known) for part in parts)
    return known[id(node)]


WHOLE, EXPONENT = "(0|[1-9][0-9_]*)", "([eE][-+][0-9]+)?"
NUMBERS = {  # the ways of writing a number: those of YAML but the octal, the hexadecimal and the sexagesimal one
    "tag:yaml.org,2002:int": rf"[-+]?{WHOLE}",
    "tag:yaml.org,2002:float": rf"[-+]?({WHOLE}\.[0-9_]*{EXPONENT}|\.[0-9][0-9_]*{EXPONENT}|\.inf)|\.nan",
}
StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, re.compile(rf"({NUMBERS[tag]})$") if tag in NUMBERS else form) for tag, form in forms]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(where: str, text: str) -> object:
    """A YAML text as plain values; `where` names the file or the key that is refused."""
    refuse_if(len(text) > LONGEST_YAML, f"{where}: longer than {LONGEST_YAML:,} characters: name a file of parameters")
    try:
        return yaml.load(text, StrictLoader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", None) or type(error).__name__
        place = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{where}: not valid YAML ({place}{why}): correct it, or put texts in quotes") from None


def load_yaml(path: str | Path) -> object:
    """What a YAML file holds."""
    try:
        return parse_yaml(str(path), Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text in UTF-8: save it as one") from None


class Key(typing.NamedTuple):
    """A key: its default and with it its type, meaning, names or limits, and without what it has no effect."""

    default: object
    meaning: str
    allowed: tuple | str = ""
    matters_if: str = ""


def is_path(text: object) -> bool:
    """Whether a value names an object in a file below the project's root: `path/to/file.py:Object`."""
    found = isinstance(text, str) and re.fullmatch(r"([^:/~][^:]*\.py):[A-Za-z_]\w*", text)
    return bool(found) and ".." not in Path(found[1]).parts


def holds(condition: str, flat: dict[str, object], value: object = None) -> bool:
    """Whether `a = x and b > 0 or c != y` holds for the keys of `flat`; a part without a key is about `value`."""

    def part_holds(part: str) -> bool:
        *name, sign, wanted = part.split()
        found = flat[name[0]] if name else value
        return is_path(found) or COMPARE[sign](found, type(found)(wanted))

    return any(all(map(part_holds, either.split(" and "))) for either in condition.split(" or "))


KEYS = {
    # A run's name, folders and seed.
    "run.name": Key("phase1", "the run folder is runs_dir/<name>_<timestamp>", matters_if=NEVER),
    "run.runs_dir": Key("runs", "folder of the run folders", matters_if=NEVER),
    "run.cache_dir": Key("runs/.cache", "answers of the frozen models alone, by content", matters_if=NEVER),
    "run.seed": Key(1, "of the bridge's first weights, its examples and its sampler's noise", ">= 0 and < 4294967296"),
    # The two frozen models.
    "pair.source_model": Key(
        "embedded", "whose states are read: `embedded`, a folder, a hub id (org/name@revision), geometry:<name>"
    ),
    "pair.target_model": Key(
        "embedded", "that answers: `embedded`, a folder, a hub id (org/name@revision), geometry:<name>"
    ),
    "pair.direction": Key("forward", "`swapped` exchanges the two models", ("forward", "swapped")),
    "pair.source_device": Key("auto", "of the source: auto, cpu, mps, cuda or cuda:<number>"),
    "pair.target_device": Key("auto", "of the target; shard:<number> spreads its layers over so many GPUs"),
    "pair.dtype": Key("auto", "of both models; auto: float32 on CPU, bfloat16 on GPU", ("auto", "float32", "bfloat16")),
    "pair.prompt_format": Key("plain", "a prompt as it is, or a user's turn of the chat template", PROMPT_FORMATS),
    # The questions.
    "task.task": Key("units", "invented units, or real questions", ("units", *REAL, FILE_OBJECT)),
    "task.options": Key((), "name=value of a task of your own", (), f"task.task = {FILE_OBJECT}"),
    "task.data": Key("", "folder with train.jsonl and test.jsonl, from the project's root", "", "task.task != units"),
    "task.n_shots": Key(0, "solved training questions in front of each real question", ">= 0"),
    "task.variant": Key("weights", "the source has facts in its weights or in its context", ("weights", "context")),
    "task.n_paragraphs": Key(0, "of hotpotqa, the supporting ones before others; 0: all", ">= 0", PARAGRAPHS),
    "task.n_facts": Key(4, "facts in the source's context", "> 0 and <= 1024", FACTS),
    "task.vary_facts": Key(False, "train on 1, 2, 4, ... n_facts facts", "", f"{FACTS} and task.n_facts > 1"),
    "task.data_seed": Key(1, "of the problems that are drawn, and of the order of real questions"),
    "task.n_train": Key(16384, "training problems", "> 0 and <= 10000000"),
    "task.n_val": Key(512, "validation problems", "> 0 and <= 1000000"),
    "task.n_test": Key(2000, "test problems", "> 0 and <= 1000000"),
    "task.source_only_share": Key(-1.0, "of the training mix; -1: the natural mix", "= -1 or >= 0 and <= 1"),
    "task.train_units_share": Key(1.0, "of the train units; smaller shares are nested", "> 0 and <= 1", WEIGHTS),
    "task.train_values_share": Key(1.0, "of the values trained on; nested as well", "> 0 and <= 1", WEIGHTS),
    # What is trained: a producer makes a message from source states, an injector brings it into the target.
    "bridge.producer": Key("resampler", "makes the message", (*PRODUCERS, FILE_OBJECT)),
    "bridge.producer_options": Key((), "name=value of one of your own", (), f"bridge.producer = {FILE_OBJECT}"),
    "bridge.injector": Key("prefix", "brings the message into the target", (*INJECTORS, FILE_OBJECT)),
    "bridge.injector_options": Key((), "name=value of one of your own", (), f"bridge.injector = {FILE_OBJECT}"),
    "bridge.n_soft_tokens": Key(16, "-1: as many as the source's prompt has, at most 2048", "= -1 or >= 1 and <= 2048"),
    "bridge.soft_position": Key("start", "after BOS, before or after the question", ("start", "question", "end"), SOFT),
    "bridge.prompt_mode": Key("auto", "the target reads; auto: by teacher", ("auto", "soft_plus_text", "soft_only")),
    "bridge.train_prompt_mode": Key("same", "what it reads in training", ("same", "soft_plus_text", "soft_only")),
    "bridge.source_view": Key("prompt", "prompt, its part after the shots, with solution, or facts", VIEWS, READS),
    "bridge.source_layers": Key("auto", "hidden states, e.g. 2,4,6; auto: at 0.6, 0.8 and all of the depth", "", READS),
    "bridge.queries": Key("learned", PLACES, ("learned", "local", "placed"), QUERIES),
    "bridge.source_projection": Key(False, "a learnable projection of source states, first the identity", "", READS),
    "bridge.rms_match": Key(True, "bring soft tokens to the size of the target's embeddings"),
    "bridge.inject_from": Key("auto", "the first place acted on; auto: after shots", STARTS, "task.n_shots > 0"),
    "bridge.inject_layers": Key("auto", "target layers, e.g. 2,4,6; auto: eight", "", "bridge.injector != prefix"),
    "bridge.kv_mix": Key("mlp", "a cache entry and a message token, joined", ("mlp", "linear"), "bridge.injector = kv"),
    "bridge.bridge_dim": Key(192, "width of the bridge, a multiple of heads", "> 0", WIDE),
    "bridge.bridge_dtype": Key("float32", "of its arithmetic on a GPU", ("float32", "bfloat16"), WIDE),
    "bridge.depth": Key(2, "blocks of the producer", "> 0", READS),
    "bridge.heads": Key(6, "attention heads", "> 0", WIDE),
    "bridge.dropout": Key(0.0, "inside the bridge", ">= 0 and < 1", WIDE),
    "bridge.state_dropout": Key(0.0, "of source states: against learning train words by heart", ">= 0 and < 1", READS),
    "bridge.dit_steps_train": Key(4, "sampling steps in training", "> 0", DIT),
    "bridge.dit_steps_eval": Key(4, "sampling steps in evaluation", "> 0", DIT),
    "bridge.dit_condition": Key("cross", "attend to source states, or pool them", ("cross", "mean", "attention"), DIT),
    "bridge.dit_prediction": Key("tokens", "what is predicted at each step", ("tokens", "velocity"), DIT),
    "bridge.dit_tokens": Key("sampled", "in training; teacher: noised gold embeddings", ("sampled", "teacher"), DIT),
    "bridge.teacher": Key(
        "answer", "what its losses (prompt, token, flow) imitate", ("answer", "prompt", "facts"), IMITATES
    ),
    # The losses; a weight of 0 switches one off.
    "loss.nll_weight": Key(1.0, "likelihood of the gold answer", ">= 0"),
    "loss.answer_tokens": Key(0, "first answer tokens that are supervised; 0: all", ">= 0"),
    "loss.kl_weight": Key(0.0, "KL to the target alone on the answer's tokens", ">= 0"),
    "loss.kl_tokens": Key(0, "first answer tokens compared; 0: all", ">= 0", "loss.kl_weight > 0"),
    "loss.prompt_weight": Key(0.0, "distance of soft tokens from the teacher's embeddings", ">= 0"),
    "loss.token_weight": Key(0.0, "likelihood of the teacher's tokens, read off the soft ones", ">= 0"),
    "loss.info_nce_weight": Key(0.0, "tell one's own question from the others of the batch", ">= 0"),
    "loss.info_nce_temperature": Key(0.07, "of InfoNCE", "> 0", "loss.info_nce_weight > 0"),
    "loss.format_weight": Key(0.0, "likelihood of the answer's `####` marker", ">= 0"),
    "loss.flow_weight": Key(0.0, "rectified flow of a DiT", ">= 0", DIT),
    "loss.decode_weight": Key(0.0, "a loss on what the bridged target decodes freely", ">= 0"),
    "loss.decode_estimator": Key("own_steps", "after own steps, or reward", ("own_steps", "policy_gradient"), DECODES),
    "loss.decode_every": Key(10, "training steps from one free decoding to the next", "> 0", DECODES),
    "loss.decode_batch": Key(16, "questions decoded, over all processes", "> 0", DECODES),
    "loss.decode_samples": Key(4, "per question", "> 0", f"{DECODES} and loss.decode_estimator = policy_gradient"),
    "loss.decode_tokens": Key(64, "new tokens at most", "> 0", DECODES),
    "loss.extra": Key("", "a loss of your own", ("", FILE_OBJECT), EXTRA),
    "loss.extra_weight": Key(0.0, "of a loss of your own", ">= 0"),
    "loss.extra_options": Key((), "name=value of a loss of your own", (), EXTRA),
    # The training loop.
    "train.steps": Key(500, "training steps", ">= 0"),
    "train.teacher_steps": Key(
        0, "first steps, in which the teacher's losses count alone; later only the others", ">= 0", TAUGHT
    ),
    "train.batch_size": Key(32, "over all processes", "> 0"),
    "train.sort_steps": Key(1, "steps among which questions are dealt by length, for less padding; 1: none", "> 0"),
    "train.lr": Key(1.0e-3, "highest learning rate", "> 0"),
    "train.warmup_steps": Key(40, "of linear warm-up, before a cosine to zero", ">= 0"),
    "train.weight_decay": Key(0.01, "of AdamW", ">= 0"),
    "train.grad_clip": Key(1.0, "largest norm of the gradient", "> 0"),
    "train.eval_every": Key(100, "steps from one validation to the next", "> 0"),
    "train.val_samples": Key(256, "validation problems answered each time, at most n_val", "> 0"),
    "train.patience": Key(0, "validations without a better one before stopping; 0: never", ">= 0"),
    "train.cache_states_gb": Key(4.0, "source states are kept when they fit in this", ">= 0", NEVER),
    "train.checkpoint_minutes": Key(5.0, "from one checkpoint to the next, which a run goes on from", ">= 0", NEVER),
    "train.num_processes": Key(1, "processes, one GPU each", "> 0"),
    "train.controls": Key(("constant", "constant_natural"), "trained controls", CONTROLS),
    # The evaluation.
    "eval.eval_samples": Key(-1, "test problems; -1: all of n_test", "= -1 or >= 1"),
    "eval.eval_batch_size": Key(128, "prompts decoded at once", "> 0", NEVER),
    "eval.max_new_tokens": Key(96, "tokens of an answer, at most", "> 0"),
    "eval.conditions": Key(tuple(c for c in CONDITIONS if c not in CONTROLS), "who answers", CONDITIONS),
    "eval.noise_floor": Key(False, "count answers that flip at a second batch size", "", NEVER),
}
SECTIONS = {  # {section: [(name without it, its key)]}
    section: [(name.split(".")[1], known) for name, known in KEYS.items() if name.startswith(f"{section}.")]
    for section in dict.fromkeys(name.split(".")[0] for name in KEYS)
}
BY_NAME = {name.split(".")[1]: name for name in KEYS}
DEFAULTS = {name: known.default for name, known in KEYS.items()}
