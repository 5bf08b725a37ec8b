"""A bridge: optional source projection, producer and injector behind one interface, and its weights on disk.

    bridge = build_bridge(config, n_layers, source_dim, target)  # parts by name, or a user's: `path/to/file.py:Class`
    message = bridge.encode(states, mask, seeds)
    save_bridge(bridge, run, "bridged", {"step": "300"})

A user's producer is `class Mine(nn.Module): def __init__(self, config, n_layers, source_dim, target_dim, **options)`;
its `forward(self, states, mask)` returns a Message, or only its tokens. It may ask for `seeds`, `teacher` and
`want_attention` as well. A user's injector is a subclass of `message.Injector`: `__init__(self, config, target)`.
Shapes: B batch, S source tokens, L captured layers, D_s and D_t hidden sizes, K soft tokens, P target places.
"""

import hashlib
import inspect
import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

from bridgekit.config import Config, ConfigError, dump_config, refuse_if
from bridgekit.model.injectors import INJECTORS
from bridgekit.model.message import Dropout, Injector, Message, in_half
from bridgekit.model.producers import PRODUCERS
from bridgekit.runs import write_bytes_atomic
from bridgekit.tasks.extend import blame, load_checked

PARTS = {"producer": PRODUCERS, "injector": INJECTORS}


class Bridge(nn.Module):
    """Optional source projection, producer, injector; soft tokens are brought to the target's embedding size."""

    def __init__(self, producer: nn.Module, injector: Injector, config: Config, source_width: int, rms: float):
        super().__init__()
        settings = config.bridge
        self.producer, self.injector, self.projection = producer, injector, None
        if settings.source_projection and settings.producer != "constant":
            self.projection = nn.Linear(source_width, source_width, bias=False)
            nn.init.eye_(self.projection.weight)
        for salt, module in enumerate((m for m in self.modules() if isinstance(m, Dropout)), start=1):
            module.salt = salt
        self.half = injector.half = settings.bridge_dtype == "bfloat16"
        self.rms = rms if settings.rms_match else None  # None: leave the size free
        self.per_source_token = settings.n_soft_tokens == -1  # then message and source tokens share their mask
        digest = hashlib.sha256(dump_config(config).encode()).hexdigest()[:16]  # saved with the weights:
        self.metadata = {"config": digest, "producer": settings.producer, "injector": settings.injector}

    def encode(self, states, mask, seeds, *, alignment=None, teacher=None, want_attention: bool = False) -> Message:
        """states (B, S, L, D_s), mask (B, S), seeds (B,) of all randomness -> Message.

        `alignment` (B, P, 2) says which source tokens stand for each place of the target's prompt.
        `teacher` (embeds (B, P, D_t), mask) is what a generative producer imitates: given in training only.
        """
        with in_half(self.half, states.device):
            message = self.produce(states, mask, seeds, teacher, want_attention)
        message.tokens = message.tokens.float()
        if self.rms is not None:
            size = message.tokens.float().pow(2).mean(-1, keepdim=True).add(1e-8).sqrt()
            message.tokens = message.tokens / size * self.rms
        message.alignment, message.seeds = alignment, seeds
        return message

    def produce(self, states, mask, seeds, teacher=None, want_attention: bool = False) -> Message:
        """What the producer makes, at its own size; it is given what its `forward` accepts. (B, S, L, D_s), (B, S)"""
        rest = {"seeds": seeds, "teacher": teacher, "want_attention": want_attention}
        accepted = inspect.signature(self.producer.forward).parameters
        if not any(p.kind == p.VAR_KEYWORD for p in accepted.values()):
            rest = {name: value for name, value in rest.items() if name in accepted}
        states = states.float().flatten(2)
        message = self.producer(states if self.projection is None else self.projection(states), mask, **rest)
        if isinstance(message, torch.Tensor) and message.ndim == 3:
            real = mask[:, : message.shape[1]] if self.per_source_token else mask.new_ones(message.shape[:2])
            message = Message(message, real)
        return message

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def load_part(config: Config, kind: str, code_dir: Path | None = None) -> tuple[type, dict]:
    """The class of the bridge's `producer` or `injector`, and the options it is built with."""
    name = getattr(config.bridge, kind)
    return (PARTS[kind][name], {}) if name in PARTS[kind] else load_checked(config, f"bridge.{kind}", code_dir)


def build_bridge(config: Config, n_layers: int, source_dim: int, target, code_dir: Path | None = None) -> Bridge:
    """A fresh bridge from `n_layers` captured layers of width `source_dim` to a target LanguageModel, on its device.

    `code_dir` is a finished run's own copy of a user's files. A user's part is tried before it is trained."""
    given = {"producer": (n_layers, source_dim, target.hidden_size), "injector": (target,)}
    loaded = {kind: load_part(config, kind, code_dir) for kind in PARTS}
    parts = []
    for kind, (part, options) in loaded.items():
        with blame(f"bridge.{kind}", part):
            parts.append(part(config.bridge, *given[kind], **options))
    bridge = Bridge(*parts, config, n_layers * source_dim, target.embedding_rms).to(target.device)
    if any(part not in PARTS[kind].values() for kind, (part, _) in loaded.items()):
        try_bridge(bridge, (5, n_layers, source_dim), config.bridge.n_soft_tokens, target)
    return bridge


# ---- a user's own parts -------------------------------------------------------------------------------------------


def try_bridge(bridge: Bridge, shape: tuple[int, int, int], n_soft_tokens: int, target) -> None:
    """Refuse a bridge that cannot be trained: two questions of 5 and 3 random states (S, L, D_s) go through it."""
    device, places = target.device, torch.arange(5, device=target.device).expand(2, -1)
    mask = places < torch.tensor([[5], [3]], device=device)
    states = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device) * mask[..., None, None]
    k, seeds = 5 if n_soft_tokens == -1 else n_soft_tokens, mask.sum(1)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        maker = try_producer(bridge, states, mask, (2, k, target.hidden_size))
        with blame("bridge.injector", type(bridge.injector)) as bringer, torch.enable_grad():
            message = bridge.train().encode(states, mask, seeds, alignment=torch.stack([places, places + 1], -1))
            soft, embeds = bridge.injector.soft(message), target.embed(places)
            embeds = embeds if soft is None else torch.cat([soft.tokens.to(target.dtype), embeds], 1)
            with bridge.injector.attach(target, lambda: message):
                hidden = target.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state.float()
            is_finite = hidden.isfinite().all()
            refuse_if(not is_finite, f"{bringer} the target's hidden states are not finite with its message")
            if hidden.requires_grad:
                hidden.abs().sum().backward()
    reached = any(p.grad is not None and p.grad.any() for p in bridge.parameters())
    refuse_if(not reached, f"{maker} no gradient reaches a parameter: make tokens from `states` by parameters")
    bridge.zero_grad(set_to_none=True)


@torch.no_grad()
def try_producer(bridge: Bridge, states: torch.Tensor, mask: torch.Tensor, wanted: tuple[int, int, int]) -> str:
    """Refuse a producer whose tokens are not of the wanted shape (B, K, D_t), or change with the batch; -> its place"""
    seeds = mask.sum(1)
    with blame("bridge.producer", type(bridge.producer)) as maker:
        message = bridge.eval().produce(states, mask, seeds)
        check_message(maker, message, wanted)
        alone = bridge.produce(states[1:, :3], mask[1:, :3], seeds[1:]).tokens[0]
        same = torch.allclose(message.tokens[1, : len(alone)], alone, rtol=1e-3, atol=1e-4)
        why = "its tokens change with the batch: leave out padding (`mask`), draw by `seeds`"
        refuse_if(not same, f"{maker} {why}")
    return maker


def check_message(maker: str, message: Message, wanted: tuple[int, int, int]) -> None:
    """Refuse what is not a message of tokens of the wanted shape (B, K, D_t)."""
    found = tuple(message.shape) if isinstance(message, torch.Tensor) else type(message).__name__
    refuse_if(not isinstance(message, Message), f"{maker} returned {found}, wanted a Message or tokens {wanted}")
    tokens, mask = message.tokens, message.mask
    for name, part, shape, kind in (
        ("tokens", tokens, wanted, torch.float32),
        ("a mask", mask, wanted[:2], torch.bool),
    ):
        fits = part.shape == shape and (part.dtype == kind or name == "tokens" and part.is_floating_point())
        found = f"{tuple(part.shape)} of {part.dtype}"
        refuse_if(not fits, f"{maker} returned {name} {found}, wanted {shape} of {kind}")
    refuse_if(not tokens.isfinite().all(), f"{maker} returned tokens with NaN or infinite numbers")


# ---- on disk ------------------------------------------------------------------------------------------------------


def checkpoint_path(folder: Path, name: str) -> Path:
    return Path(folder) / "checkpoint" / f"{name}.safetensors"


def save_bridge(bridge: Bridge, folder: Path, name: str, metadata: dict[str, str]) -> None:
    """Weights and metadata (of the bridge: its parts, a hash of its configuration) as one safetensors file."""
    path = checkpoint_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in bridge.state_dict().items()}
    data = safetensors.torch.save(state, bridge.metadata | metadata)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])  # in which the library writes the metadata in any order
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    write_bytes_atomic(path, data[:8] + ordered + data[8 + size :])


def load_bridge(bridge: Bridge, folder: Path, name: str) -> dict[str, str]:
    """Weights from a run into a bridge of the same shape; returns their metadata."""
    path = checkpoint_path(folder, name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no checkpoint of '{name}' in this run")
    try:
        with safetensors.safe_open(path, "pt") as file:
            bridge.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            return file.metadata() or {}
    except (RuntimeError, safetensors.SafetensorError, OSError) as error:
        reason = f"does not fit the run's config.yaml ({' '.join(str(error).split())[:160]})"
        raise ConfigError(f"{path}: {reason}: restore both, or name another run") from None


def describe_card(bridge: Bridge, config: Config, pair, layers, metadata: dict[str, str], outcome: str = "") -> str:
    """The model card of a trained bridge as Markdown; `outcome` is its verdict's line, if there is one."""
    task, settings = config.task, config.bridge
    taught = "" if pair.lexicon_seed is None else f", lexicon seed {pair.lexicon_seed}"
    k = "one per source token" if settings.n_soft_tokens == -1 else settings.n_soft_tokens
    return f"""# Bridge {config.run.name}: {settings.producer} x {settings.injector}

- reads hidden states {", ".join(map(str, layers))} of {pair.source.origin} (`{pair.source.fingerprint}`)
- writes into {pair.target.origin} (`{pair.target.fingerprint}`); message tokens: {k}
- trained on task {task.task} ({task.variant}{taught}), {task.n_train:,} problems, seed {config.run.seed}
- weights of step {metadata.get("step", "unknown")} of {config.train.steps}; {bridge.n_parameters:,} parameters
- configuration {metadata.get("config", "unknown")}

It fits these two models alone; with others of the same shape it would run, and mean nothing.

What it may claim: {outcome or "nothing, there is no verdict on it yet"}.
"""
