"""A bridge's weights on disk: safetensors, whole or not there."""

from pathlib import Path

import safetensors.torch

from bridgekit.model.bridge import Bridge
from bridgekit.runs import write_bytes_atomic


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
