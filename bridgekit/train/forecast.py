"""What a run will cost on a GPU: bytes and seconds by arithmetic, from two models' shapes and the lengths of texts.

    source, target = Shape.of(config_json), Shape.of(other)
    needs = forecast(config, source, target, Lengths(1364, 1364, asked=(85,), read=(85,), answers=(180,)), "H200")
    needs.peak, needs.seconds["training step"]

Nothing is loaded or measured here, and torch is not imported; where a number is fitted, FITTED says to what.
Letters: B rows of a process, K soft tokens, T places of a row after the shared start, A answer tokens.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean

from bridgekit.config import SOFT_INJECTORS, Config, count_shards, format_override, knows_places

GiB = 1 << 30
# Fitted to medians of captured steps at Mistral-7B -> Llama-3.1-8B size on one H200, bfloat16, prefix of 1,364 tokens.
FITTED = {
    "efficiency": 0.62,  # of the matrix rate, in passes through frozen models: resampler steps of batch 2 and 8
    "float32": 1 / 16,  # of the bfloat16 rate: H200 nominal; the bridge of a DiT step with 2,048 soft tokens
    "weights_read": 1.6,  # seconds of a decode step over those that bandwidth allows: 2 rows
    "cache_read": 2.6,  # the same for keys and values: 200 rows
    "decode_layer": 90e-6,  # seconds of a layer in a captured decode step, beside reading: 2 rows
    "batch": 0.5,  # seconds of a decoded batch for graphs and texts: 200 rows
    "step": 3e-3,  # seconds of a captured training step beside its arithmetic: a guess
    "eager_layer": 2e-3,  # seconds of a layer, forward and backward, that is not captured: a guess
    "logits": 8,  # bytes of an answer's logit and its gradient, and of each loss's copies of both; KL has two models'
    "block": 26,  # numbers of the bridge's width that a block keeps of each query: counted in producers.py
    "reads": 2,  # and of each source token: its keys and values
    "message": 8,  # copies of a message in float32, forward and backward
    "half_bridge": 0.6,  # of the bytes that a bridge keeps, with bridge.bridge_dtype: bfloat16: a guess
    "context": 0.6 * GiB,  # of CUDA and its libraries: usual; no part of the measured peaks
    "graphs": 0.5 * GiB,  # of captured graphs: usual
    "start": 60.0,  # seconds to load the models: 28 measured from a warm disk
}
GPUS = {  # part of a name: dense bfloat16 FLOP/s, bytes/s of memory. H200 is measured, the others are nominal or usual.
    "H200": (801e12, 4.2e12),
    "H100": (800e12, 3.35e12),
    "A100": (250e12, 1.9e12),
    "4090": (150e12, 1.0e12),
    "": (100e12, 0.8e12),
}
WIDTH, FUSED, PREFILL = 16, 2048, 32768  # those of captured.py, attention.py and decoding.py, which need torch
CUE = 16  # tokens of a cue, padded


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder with gated feed-forwards, as Llama, Mistral and Qwen are."""

    hidden: int
    layers: int
    queries: int  # width of all heads
    keys: int  # width of all key-value heads
    ffn: int
    vocab: int
    tied: bool
    more: int  # parameters of a layer that are no matrix: biases and norms

    @classmethod
    def of(cls, config: dict) -> "Shape":
        """From config.json; a key that is not there is a KeyError."""
        c = config.get("text_config") or config
        kind, hidden, heads = c["model_type"], c["hidden_size"], c["num_attention_heads"]
        size = c.get("head_dim") or hidden // heads
        queries, keys, ffn = heads * size, (c.get("num_key_value_heads") or heads) * size, c["intermediate_size"]
        more = 2 * hidden + (queries + 2 * keys) * (kind == "qwen2") + 2 * size * (kind == "qwen3")
        more += (queries + 2 * keys + hidden) * bool(c.get("attention_bias")) * (kind != "qwen2")
        more += (2 * ffn + hidden) * bool(c.get("mlp_bias"))
        tied = config.get("tie_word_embeddings", c.get("tie_word_embeddings", False))
        experts = c.get("num_local_experts") or c.get("num_experts") or 1
        return cls(hidden, c["num_hidden_layers"], queries, keys, ffn * experts, c["vocab_size"], tied, more)

    @property
    def decoder(self) -> int:
        """Parameters of all layers."""
        matrices = 2 * self.hidden * (self.queries + self.keys) + 3 * self.hidden * self.ffn
        return self.layers * (matrices + self.more)

    @property
    def parameters(self) -> int:
        return self.decoder + self.hidden + self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def cached(self) -> int:
        """Numbers of keys and values of one place."""
        return 2 * self.layers * self.keys

    def saved(self, shared: bool, fused: bool) -> int:
        """Numbers that one place keeps for the backward pass: norms, attention in two parts or one, feed-forwards."""
        attention = 2 * self.queries + 2 * self.keys if shared else 4 * self.queries
        return self.layers * (self.hidden * (2 if fused else 4) + attention + self.ffn * (2 if fused else 3))

    def flops(self, places: float, logits: float = 0, seen: float = 0) -> float:
        """Of a forward pass over `places`, each of which sees `seen` others, with logits at some of them."""
        matrices = 2 * self.decoder * places + 2 * self.hidden * self.vocab * logits
        return matrices + 4 * self.layers * self.queries * places * seen


@dataclass(frozen=True)
class Lengths:
    """Tokens of the start that all prompts share, and of each sampled question, source text and answer."""

    shared: int  # of the target
    source_shared: int
    asked: tuple[int, ...]  # a question in the target's prompt, with its cue
    read: tuple[int, ...]  # what the source reads after the shared start
    answers: tuple[int, ...]
    origin: str = ""


def widest(lengths: tuple[int, ...], rows: float = math.inf, most: int = 0) -> int:
    """The length that a batch of `rows` is padded to, at its usual draw; the greatest without a number."""
    place = len(lengths) * (1 - 1 / (rows + 1)) if rows < math.inf else len(lengths)
    length = sorted(lengths)[min(int(place), len(lengths) - 1)]
    return -(-min(length, most or length) // WIDTH) * WIDTH


@dataclass(frozen=True)
class Needs:
    """Bytes by what they hold, in every phase, in training and in evaluation; and seconds."""

    resident: dict[str, float]
    training: dict[str, float]
    evaluation: dict[str, float]
    seconds: dict[str, float]
    gpu_hours: float
    bridge: int  # parameters
    disk: float

    @property
    def peak(self) -> float:
        return sum(self.resident.values()) + max(sum(self.training.values()), sum(self.evaluation.values()))


def count_layers(text: str, auto: int) -> int:
    return auto if text == "auto" else len(text.split(","))


def count_bridge(config: Config, source: Shape, target: Shape) -> tuple[int, int, int]:
    """Parameters of the source's reader, of what works on each query, and of the injector; a user's own parts as ours.

    The same sums as producers.py and injectors.py."""
    c, n, t = config.bridge, source.layers, target.hidden
    d, k = c.bridge_dim, c.n_soft_tokens
    layers = count_layers(c.source_layers, len({max(1, round(0.6 * n)), max(1, round(0.8 * n)), n}))
    inside, pooled = layers * source.hidden, c.dit_condition != "cross"
    feed, heads = 8 * d * d + 5 * d, 4 * d * d
    reader, work = inside * d + d, max(k, 1) * d + d * t + t + 2 * d
    reader += 2 * knows_places(c) * (heads + feed + 4 * d)
    if c.producer == "constant":
        reader, work = 0, (2048 if k == -1 else k) * t
    elif c.producer == "dit":
        work += t * d + d + 2 * (d * d + d) + (heads + d) * (c.dit_condition == "attention")
        work += c.depth * ((1 if pooled else 2) * heads + feed + 6 * (d * d + d))
    else:
        work += c.depth * (2 * heads + feed + 6 * d)
    reader += inside**2 * (c.source_projection and c.producer != "constant")
    reading, both = 4 * t + 4 * t * d + 1, target.keys + t
    mix = both * target.keys if c.kv_mix == "linear" else (both + target.keys) * d + d
    fuser = 2 * both + mix + target.keys + 1
    each = {"prefix": 0, "kv": 2 * fuser}.get(c.injector, reading)
    return reader, work, each * count_layers(c.inject_layers, min(target.layers, 8))


class Work:
    """What one process does; of two GPUs the target's is meant, where the bridge is."""

    def __init__(self, config: Config, source: Shape, target: Shape, lengths: Lengths, gpu: str):
        c, task, self.n = config.bridge, config.task, config.train.num_processes
        self.config, self.source, self.target, self.lengths = config, source, target, lengths
        self.reader, self.work, self.injector = count_bridge(config, source, target)
        self.bridge, half = self.reader + self.work + self.injector, c.bridge_dtype == "bfloat16"
        is_dit, taught = c.producer == "dit", c.dit_tokens == "teacher"
        sampled = c.dit_steps_train * (not taught) + (taught or config.loss.flow_weight > 0)
        self.passes = sampled if is_dit else 1  # through the bridge's blocks in a step
        self.inside = count_layers(c.source_layers, min(3, source.layers)) * source.hidden
        self.size = 4 if config.pair.dtype == "float32" else 2  # bytes of a number in the frozen models
        rate, self.bandwidth = next(rates for name, rates in GPUS.items() if name in gpu.upper())
        self.frozen_rate = FITTED["efficiency"] * rate * (FITTED["float32"] if self.size == 4 else 1)
        self.bridge_rate = rate * (FITTED["efficiency"] / 2 if half else FITTED["float32"])
        self.bridge_size = 4 * (FITTED["half_bridge"] if half else 1)  # bytes of a number that the bridge keeps
        places = {config.pair.source_device, config.pair.target_device}
        self.beside = "auto" in places or len(places) == 1  # the source is on the target's GPU
        self.shards = count_shards(config.pair.target_device)  # GPUs that hold the target
        self.beside |= self.shards > 1  # on the first of them
        self.is_soft = c.injector in SOFT_INJECTORS
        self.mode = c.prompt_mode if c.train_prompt_mode == "same" else c.train_prompt_mode
        begins = c.inject_from == "question" or c.inject_from == "auto" and task.n_shots > 0
        behind = c.soft_position != "start" if self.is_soft else begins
        self.shared = lengths.shared if behind and self.mode != "soft_only" else 0  # of the rows that have a message
        self.front = 0 if c.source_view in ("question", "facts") else lengths.source_shared  # read in every row
        decoded = config.loss.decode_batch // self.n if config.loss.decode_weight else 0
        self.decoded = decoded * (config.loss.decode_samples if config.loss.decode_estimator != "own_steps" else 1)
        room, n_train, has_kl = config.train.cache_states_gb * 1e9, task.n_train, config.loss.kl_weight > 0
        known = n_train * mean(lengths.read) * self.inside, n_train * mean(lengths.answers) * target.hidden * has_kl
        self.states, self.taught = (x * self.size if x * self.size <= room else 0 for x in known)
        self.keeps = room > 0  # what the GPU has no room for is kept in the machine's memory

    def widths(self, rows: float = math.inf) -> tuple[int, int, int, int, int]:
        """K, message tokens (also those that take no place), question, A and what the bridge reads, of `rows` rows."""
        c, lengths = self.config.bridge, self.lengths
        added = self.config.eval.max_new_tokens if c.source_view == "solution" else 0
        read = self.front + added + widest(lengths.read, rows)
        tokens = min(read, 2048) if c.n_soft_tokens == -1 else c.n_soft_tokens
        asked = CUE if self.mode == "soft_only" else widest(lengths.asked, rows) + lengths.shared - self.shared
        return tokens * self.is_soft, tokens, asked, widest(lengths.answers, rows, self.config.loss.answer_tokens), read

    # ---- bytes ------------------------------------------------------------------------------------------------------

    def resident(self) -> dict[str, float]:
        source, target, lengths = self.source, self.target, self.lengths
        start = lengths.source_shared * source.cached * self.beside + lengths.shared * target.cached / self.shards
        return {
            "weights of both models": (source.parameters * self.beside + target.parameters / self.shards) * self.size,
            "keys and values of the shared start": start * self.size,
            "CUDA context and graphs": FITTED["context"] + FITTED["graphs"],
        }

    def training(self) -> dict[str, float]:
        c, loss, target, (k, tokens, asked, a, read) = self.config.bridge, self.config.loss, self.target, self.widths()
        answers = max(a, loss.decode_tokens + WIDTH if self.decoded else 0)
        rows, places = max(self.config.train.batch_size // self.n, self.decoded), k + asked + answers
        weights = loss.nll_weight, loss.kl_weight, loss.kl_weight, loss.format_weight, loss.extra_weight
        compared = answers * (1 + sum(map(bool, weights))) + 2 * tokens * (loss.token_weight > 0)  # with all words
        fused = self.size == 2 and target.hidden >= FUSED
        validated = self.rooms(self.config.train.val_samples, k + asked)
        decoding = self.decoded * (k + asked + loss.decode_tokens) * target.cached * self.size
        kept = c.depth * self.passes * (k * FITTED["block"] + read * FITTED["reads"]) * c.bridge_dim  # by the bridge
        kept += 2 * knows_places(c) * read * FITTED["block"] * c.bridge_dim
        kept += (2 + self.passes) * FITTED["message"] / 3 * tokens * target.hidden
        kept += 3 * read * self.inside + self.injector * places // max(1, 3 * c.bridge_dim)
        return {
            "bridge, gradients, optimizer": 16 * self.bridge,
            "source states kept": self.states * self.beside,
            "target's states kept for KL": self.taught,
            "activations of the target": rows * places * target.saved(self.shared > 0, fused) * self.size / self.shards,
            "logits and their losses": rows * compared * target.vocab * FITTED["logits"],
            "activations of the bridge": rows * kept * self.bridge_size,
            "keys and values of answers": (validated * target.cached * self.size + decoding) / self.shards,
        }

    def rooms(self, questions: int, before: int) -> float:
        """Places of the rooms that answers to these questions leave behind, on this process.

        The longest questions come first, so all batches take the first one's room but a last one of few rows."""
        own, new = -(-questions // self.n), self.config.eval.max_new_tokens
        rows = min(self.config.eval.eval_batch_size, own)
        rest = own % rows if own > rows and 2 * (own % rows) < rows else 0
        return (rows + rest) * (before + new)

    def evaluation(self) -> dict[str, float]:
        source, target, lengths, (k, _, asked, _, _) = self.source, self.target, self.lengths, self.widths()
        n_test, new = self.config.task.n_test, self.config.eval.max_new_tokens
        rows = min(self.config.eval.eval_batch_size, -(-n_test // self.n))
        prompts = min(rows * (k + asked), PREFILL) * (3 * target.ffn + 4 * target.hidden) * self.size
        return {
            "the bridges": 4 * self.bridge * (1 + len(self.config.train.controls)),
            "keys and values of answers, target": self.rooms(n_test, k + asked)
            * target.cached
            * self.size
            / self.shards,
            "keys and values of answers, source": self.rooms(n_test, widest(lengths.read)) * source.cached * self.size,
            "a pass over the prompts": prompts + rows * target.vocab * 10 * (new > 0),
        }

    # ---- seconds ----------------------------------------------------------------------------------------------------

    def read_source(self, rows: int, read: float) -> float:
        return self.source.flops(rows * (read - self.front), seen=self.lengths.source_shared)

    def step_seconds(self, rows: int) -> float:
        c, loss, target = self.config.bridge, self.config.loss, self.target
        alike = self.config.train.sort_steps > 1  # then a batch is as wide as its usual row
        k, tokens, asked, a, read = self.widths(1 if alike else rows)
        t = k + asked + a
        frozen = 2 * target.flops(rows * t, rows * a, self.shared + t / 2)  # no weight has a gradient
        if loss.kl_weight:
            own = 0 if self.keeps else rows * (widest(self.lengths.asked, rows) + a)
            frozen += target.flops(own, rows * a, self.lengths.shared)
        frozen += 0 if self.keeps or c.producer == "constant" else self.read_source(rows, read)
        bridge = 6 * rows * (self.reader * read + self.work * tokens * self.passes + self.injector * t)
        bridge += 14 * rows * tokens * (tokens + read) * c.bridge_dim * c.depth * self.passes  # its attention
        bridge += 14 * rows * read * 2 * read * c.bridge_dim * 2 * knows_places(c)
        found = frozen / self.frozen_rate + bridge / self.bridge_rate + FITTED["step"]
        uncaptured = FITTED["eager_layer"] * (target.layers + c.depth * self.passes) * (loss.extra_weight > 0)
        return max(found, uncaptured)

    def decode_seconds(self, questions: int, new: int) -> float:
        """Bridged answers of this process to its part of the questions, none of which ends early."""
        own, target = -(-questions // self.n), self.target
        rows = min(own, self.config.eval.eval_batch_size)
        k, _, asked, _, read = self.widths(rows)
        first = target.flops(rows * (k + asked), rows, self.shared + (k + asked) / 2) + self.read_source(rows, read)
        cached = (self.shared + rows * (k + asked + new / 2)) * target.cached
        each = FITTED["weights_read"] * target.parameters + FITTED["cache_read"] * cached
        each = each * self.size / self.bandwidth + target.layers * FITTED["decode_layer"]
        return -(-own // rows) * (first / self.frozen_rate + new * each + FITTED["batch"])

    def seconds(self) -> dict[str, float]:
        task, loss, train, evaluation = self.config.task, self.config.loss, self.config.train, self.config.eval
        step, new = self.step_seconds(train.batch_size // self.n), evaluation.max_new_tokens
        if self.decoded:
            decoded = self.decode_seconds(self.decoded * self.n, loss.decode_tokens)
            decoded -= FITTED["batch"]  # its graph and room are there from the first time on
            step += (decoded + self.step_seconds(self.decoded)) / loss.decode_every
        validation, trainings = self.decode_seconds(train.val_samples, new), 1 + len(train.controls)
        passes = len(set(evaluation.conditions) - {"router", "union"}) + trainings - 1
        asked = task.n_test if evaluation.eval_samples == -1 else evaluation.eval_samples
        test = passes * self.decode_seconds(asked, new)
        baselines = 2 * self.decode_seconds(task.n_val, new)
        validations = 1 + -(-train.steps // train.eval_every)
        total = 2 * FITTED["start"] + baselines + trainings * (train.steps * step + validations * validation) + test
        parts = {"training step": step, "validation": validation, "baselines": baselines, "test": test}
        return parts | {"whole run": total}


def forecast(config: Config, source: Shape, target: Shape, lengths: Lengths, gpu: str) -> Needs:
    """What a run needs of each GPU, and for how long."""
    work, trainings = Work(config, source, target, lengths, gpu), 1 + len(config.train.controls)
    seconds = work.seconds()
    disk = work.bridge * (4 * (3 * trainings - 2) + 24 * trainings + 12)  # best weights, two checkpoints each, a third
    parts = work.resident(), work.training(), work.evaluation()
    return Needs(*parts, seconds, work.n * work.shards * seconds["whole run"] / 3600, work.bridge, disk)


# ---- what would fit -------------------------------------------------------------------------------------------------


def nearest_fit(config: Config, peak_of: Callable[[Config], float], memory: float) -> dict[str, object] | None:
    """The settings to change so that a run fits, with few halvings; None where nothing helps."""
    now, n, changes = config, config.train.num_processes, {}
    while peak_of(now) > memory:
        smaller = {
            "eval.eval_batch_size": now.eval.eval_batch_size // 2,
            "train.batch_size": now.train.batch_size // 2 // n * n,
            "loss.decode_batch": now.loss.decode_batch // 2 // n * n if now.loss.decode_weight else 0,
            "bridge.n_soft_tokens": max(now.bridge.n_soft_tokens, 0) // 2,
        }
        options = [(key, value) for key, value in smaller.items() if value]
        options += [("train.cache_states_gb", 0.0)] * (now.train.cache_states_gb > 0)
        peaks = {option: peak_of(now.with_(**dict([option]))) for option in options}
        best = next((o for o, peak in peaks.items() if peak <= memory), min(peaks, key=peaks.get))
        if peaks[best] >= peak_of(now):
            return None
        changes |= dict([best])
        now = config.with_(**changes)
    return changes


def describe_fit(changes: dict[str, object] | None) -> str:
    """The way out as a user types it."""
    if changes is None:
        return "no smaller batch fits: use smaller models or a larger GPU"
    return "what fits: " + " ".join(f"-o {format_override(key, value)}" for key, value in changes.items())
