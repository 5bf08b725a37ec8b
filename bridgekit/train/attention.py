"""Names that inside/ still imports; they stand in conditions.py."""

import io
from pathlib import Path

import numpy as np

from bridgekit.train.conditions import TOKEN_CLASSES, classify_tokens, keep_attention, save_attention  # noqa: F401


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def merge_attention(parts: list[Path], out: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        with np.load(part, allow_pickle=False) as loaded:
            arrays |= {k: loaded[k] for k in loaded.files}
    save_attention(arrays, out)
