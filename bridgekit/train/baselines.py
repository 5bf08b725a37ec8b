"""Answers that are made once: of frozen models by content, and of a final evaluation until it is whole.

baselines = Baselines(task, max_new_tokens=96, batch_size=128, path=Path("runs/.cache/baselines_x.jsonl"))
answers = baselines.answer(pair.target, prompts)     # generated, or read
"""

import contextlib
import fcntl
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch

from bridgekit.model.attention import share_rows
from bridgekit.model.bridge import Bridge
from bridgekit.model.generation import Generated, generate_batch
from bridgekit.model.pair import LanguageModel, split_prompts
from bridgekit.model.states import count_shared, in_batches
from bridgekit.runs import load_jsonl
from bridgekit.tasks import Example, Prompt, Task

KINDS = {"mean": np.float16, "map": np.float16, "class": np.int8, "tokens": np.str_}  # of attention arrays


def fingerprint_weights(bridge: Bridge) -> str:
    digest = hashlib.sha256()
    for value in bridge.state_dict().values():
        digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class AnswerFile:
    """Answers by key, on disk as soon as their batch is made, so that no answer is made twice.

    All processes of all runs may append to one file, under a lock; a line that was cut by a kill is left out. Without a
    path the answers last as long as this object. `known` is {key: (answer, its attention)}."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, dict[str, tuple[Generated, dict]]()
        self.weights: dict[Bridge, str] = {}  # of bridges, hashed once: they do not change while this object lasts
        for row in load_jsonl(path, []) if path and path.exists() else ():
            with contextlib.suppress(KeyError, TypeError):
                looked = {k: np.array(v, dtype=KINDS[k.split("/")[0]]) for k, v in row.get("attention", {}).items()}
                self.known[row["key"]] = Generated(row["text"], row["logprob"], row["n"]), looked

    def keys(self, condition: str, bridge: Bridge, examples: list[Example]) -> list[str]:
        """The key of each answer that a condition gives with a bridge."""
        if bridge not in self.weights:
            self.weights[bridge] = fingerprint_weights(bridge)
        return [f"{condition} {self.weights[bridge]} {example.id}" for example in examples]

    def add(self, fresh: dict[str, tuple[Generated, dict[str, np.ndarray]]]) -> None:
        """Keep a batch of answers."""
        self.known |= fresh
        if not self.path:
            return
        lines = []
        for key, (answer, looked) in fresh.items():
            row = {"key": key, "text": answer.text, "logprob": answer.logprob, "n": answer.n_tokens}
            lines.append(row | ({"attention": {k: v.tolist() for k, v in looked.items()}} if looked else {}))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(max(0, file.seek(0, io.SEEK_END) - 1))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"  # after a line that was cut
            file.write(start + "".join(json.dumps(row) + "\n" for row in lines).encode())


class Baselines:
    """Answers of frozen models by content: a hash of weights, end tokens, decode settings and text."""

    def __init__(self, task: Task, max_new_tokens: int, batch_size: int, path: Path | None = None):
        self.task, self.max_new_tokens, self.batch_size, self.file = task, max_new_tokens, batch_size, AnswerFile(path)

    def answer(self, lm: LanguageModel, prompts: list[Prompt]) -> list[Generated]:
        keys, known = [self.key(lm, p) for p in prompts], self.file.known
        missing = [i for i, k in enumerate(keys) if k not in known]
        pieces = split_prompts(lm, [prompts[i] for i in missing])
        shared, rows = share_rows(lm, [lm.bos + p.all for p in pieces], count_shared(lm, pieces))
        for chunk in in_batches([len(r) for r in rows], self.batch_size):
            texts = [rows[i] for i in chunk]
            options = dict(max_new_tokens=self.max_new_tokens, is_complete=self.task.is_complete, shared=shared)
            made = generate_batch(lm, texts, [[] for _ in texts], **options)
            self.file.add({keys[missing[i]]: (g, {}) for i, g in zip(chunk, made, strict=True)})
        return [known[k][0] for k in keys]

    def key(self, lm: LanguageModel, prompt: Prompt) -> str:
        settings = self.task.name, self.max_new_tokens, "greedy 1"
        parts = [lm.decode_key, str(lm.dtype), lm.device.type, *settings, prompt.text]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
