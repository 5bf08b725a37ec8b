"""What a bridge attends to, kept small: per-example means by source token, and a few whole maps for the figures.

Shapes: N examples, S source tokens, K soft tokens.
"""

import io
from pathlib import Path

import numpy as np

from bridgekit.model.message import Message
from bridgekit.model.pair import LanguageModel
from bridgekit.model.states import SourceStates
from bridgekit.runs import write_bytes_atomic
from bridgekit.tasks.base import Example

FULL_MAPS = 16
TOKEN_CLASSES = ("other", "unit", "digit")


def classify_tokens(lm: LanguageModel, example: Example, row: list[int]) -> list[int]:
    """For each source token: 1 if it is part of the question's unit word, 2 if a digit, else 0."""
    pieces = [lm.tokenizer.decode([i]) for i in row]
    classes = [2 if p.strip().isdigit() else 0 for p in pieces]
    if example.unit:
        text, ends = "", []
        for p in pieces:
            text += p
            ends.append(len(text))
        start = text.find(example.unit)
        while start >= 0:
            for i, end in enumerate(ends):
                if end > start and end - len(pieces[i]) < start + len(example.unit):
                    classes[i] = 1
            start = text.find(example.unit, start + 1)
    return classes


def keep_attention(store: dict, message: Message, mask, chunk, examples, states: SourceStates) -> None:
    """Mean attention of all soft tokens per source token, and a few whole maps, under each example's id."""
    if message.attention is None:
        return
    for i, (index, example) in enumerate(zip(chunk, examples, strict=True)):
        n = int(states.lengths[index])
        weights = message.attention[i, :, :n].float().cpu().numpy()
        store[f"mean/{example.id}"] = weights.mean(0).astype(np.float16)
        store[f"class/{example.id}"] = np.array(classify_tokens(states.lm, example, states.rows[index]), np.int8)
        if index < FULL_MAPS:
            store[f"map/{example.id}"] = weights.astype(np.float16)
            tokens = [states.lm.tokenizer.decode([t]) for t in states.rows[index]]
            store[f"tokens/{example.id}"] = np.array(tokens, dtype=np.str_)


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def merge_attention(parts: list[Path], out: Path) -> None:
    """One file for the run: padded mean attention and token classes, row by id, and the whole maps."""
    arrays: dict[str, np.ndarray] = {}
    for part in parts:
        with np.load(part, allow_pickle=False) as loaded:
            arrays |= {k: loaded[k] for k in loaded.files}
    ids = sorted(k.split("/", 1)[1] for k in arrays if k.startswith("mean/"))
    if not ids:
        return
    width = max(len(arrays[f"mean/{i}"]) for i in ids)
    mean = np.zeros((len(ids), width), np.float16)
    classes = np.full((len(ids), width), -1, np.int8)
    for row, i in enumerate(ids):
        mean[row, : len(arrays[f"mean/{i}"])] = arrays[f"mean/{i}"]
        classes[row, : len(arrays[f"class/{i}"])] = arrays[f"class/{i}"]
    maps = {k: v for k, v in arrays.items() if k.startswith(("map/", "tokens/"))}
    write_bytes_atomic(out, pack_arrays({"ids": np.array(ids), "mean": mean, "token_class": classes} | maps))
