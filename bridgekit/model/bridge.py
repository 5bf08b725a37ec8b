"""A bridge: optional source projection, producer and injector behind one interface, and its weights on disk."""

from pathlib import Path

import safetensors.torch
from torch import nn

from bridgekit.config import Config
from bridgekit.model.injectors import INJECTORS
from bridgekit.model.message import Injector, Message
from bridgekit.model.producers import PRODUCERS
from bridgekit.runs import write_bytes_atomic


class Bridge(nn.Module):
    """Optional source projection, producer, injector; soft tokens are brought to the target's embedding size."""

    def __init__(self, producer: nn.Module, injector: Injector, source_width: int, projection: bool, rms: float | None):
        super().__init__()
        self.producer = producer
        self.injector = injector
        self.rms = rms  # None: leave the size free
        self.projection = nn.Linear(source_width, source_width, bias=False) if projection else None
        if projection:
            nn.init.eye_(self.projection.weight)

    def encode(self, states, mask, seeds, *, alignment=None, teacher=None, want_attention: bool = False) -> Message:
        """states (B, S, L, D_s), mask (B, S), seeds (B,) of the sampler's noise -> Message.

        `alignment` (B, P, 2) says which source tokens stand for each place of the target's prompt.
        `teacher` (embeds (B, P, D_t), mask) is what a generative producer imitates: given in training only.
        """
        states = states.float().flatten(2) if self.projection is None else self.projection(states.float().flatten(2))
        message = self.producer(states, mask, seeds, teacher, want_attention)
        if self.rms is not None:
            size = message.tokens.float().pow(2).mean(-1, keepdim=True).add(1e-8).sqrt()
            message.tokens = message.tokens / size * self.rms
        message.alignment = alignment
        return message

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


def build_bridge(config: Config, n_layers: int, source_dim: int, target) -> Bridge:
    """A fresh bridge from `n_layers` captured layers of width `source_dim` to a target LanguageModel."""
    producer = PRODUCERS[config.bridge.producer](config.bridge, n_layers, source_dim, target.hidden_size)
    rms = target.embedding_rms if config.bridge.rms_match else None
    projection = config.bridge.source_projection and config.bridge.producer != "constant"
    injector = INJECTORS[config.bridge.injector](config.bridge, target)
    return Bridge(producer, injector, n_layers * source_dim, projection, rms)


def checkpoint_path(folder: Path, name: str) -> Path:
    return Path(folder) / "checkpoint" / f"{name}.safetensors"


def save_bridge(bridge: Bridge, folder: Path, name: str, metadata: dict[str, str]) -> None:
    path = checkpoint_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in bridge.state_dict().items()}
    write_bytes_atomic(path, safetensors.torch.save(state, metadata))


def load_bridge(bridge: Bridge, folder: Path, name: str) -> None:
    path = checkpoint_path(folder, name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no checkpoint of '{name}' in this run")
    bridge.load_state_dict(safetensors.torch.load_file(path))
