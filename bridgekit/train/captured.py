"""The losses and gradients of a training step as captured graphs: a GPU is not kept waiting for Python.

    means = captured.run(batch, step)      # as experiment.step_losses(...) and its backward pass

A graph is made for each size of a batch, and again where other losses begin. Widths are rounded up to multiples of
WIDTH, so that there are few sizes; what is padded is masked. All graphs share their memory. All randomness comes from
the batch's seeds, and so do the numbers of a replay. Free decoding is no part of a graph: its loss has a backward pass
of its own.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from bridgekit.model.bridge import Bridge
from bridgekit.train.data import Batch

if TYPE_CHECKING:
    from bridgekit.train.experiment import Experiment

WIDTH = 16
# As long as a prompt, or what is left of it; then as long as an answer.
QUESTIONS = ("states", "mask", "alignment", "before", "after", "literal", "asked", "noted")
ANSWERS = ("labels", "labels_mask", "marker", "final", "taught")
WHOLE = ("literal", "alignment")  # with the shared start


class Captured:
    """Replays of one bridge's training step, by the batch's size."""

    def __init__(self, experiment: Experiment, name: str, bridge: Bridge):
        self.experiment, self.name, self.bridge = experiment, name, bridge
        self.warm: set[bool] = set()  # whether the teacher's steps, and the others, have begun
        self.is_impossible = False
        self.graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, Batch, dict[str, torch.Tensor]]] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, batch: Batch, step: int, taught: bool = False) -> dict[str, torch.Tensor]:
        """The mean of each loss but that of decoding; the gradients are added to the bridge's.

        Steps in which the teacher alone counts (`taught`) have graphs of their own."""
        batch = pad_batch(batch)
        key = (taught, *(tuple(x.shape) for x in tensors(batch)))
        if taught not in self.warm:  # libraries set themselves up in the first step
            self.warm.add(taught)
            self.graphs.clear()  # those of the teacher's steps are not needed any more
            return self._step(batch, step)
        if key not in self.graphs and not self._capture(key, batch, step):
            return self._step(batch, step)
        graph, static, means = self.graphs[key]
        for room, fresh in zip(tensors(static), tensors(batch), strict=True):
            room.copy_(fresh)
        graph.replay()
        return {name: mean.clone() for name, mean in means.items()}

    def _step(self, batch: Batch, step: int) -> dict[str, torch.Tensor]:
        means = self.experiment.step_losses(self.bridge, batch, step, self.name, decodes=False)
        means["loss"].backward()
        return {name: mean.detach() for name, mean in means.items()}

    def _capture(self, key: tuple, batch: Batch, step: int) -> bool:
        """A graph for batches of this size and the losses of this step.

        False where the models do what no graph can hold, such as a choice."""
        if self.is_impossible:
            return False
        static = map_batch(batch, torch.clone)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # what the usual steps took is not needed beside the graph's own memory
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                means = self._step(static, step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.is_impossible = True
            self.experiment.log(f"{self.name}: its steps cannot be captured ({str(error).splitlines()[0]}): slower")
            return False
        self.graphs[key] = graph, static, means
        return True


def tensors(batch: Batch) -> list[torch.Tensor]:
    """All tensors of a batch, in order."""
    values = [getattr(batch, f.name) for f in fields(batch)]
    flat = [x for value in values for x in (value if isinstance(value, tuple) else (value,))]
    return [x for x in flat if isinstance(x, torch.Tensor)]


def map_batch(batch: Batch, function) -> Batch:
    """The batch with a function applied to each tensor."""

    def apply(value):
        if isinstance(value, tuple) and isinstance(value[0], torch.Tensor):
            return tuple(map(function, value))
        return function(value) if isinstance(value, torch.Tensor) else value

    return replace(batch, **{f.name: apply(getattr(batch, f.name)) for f in fields(batch)})


def pad_batch(batch: Batch) -> Batch:
    """The batch with all question-like widths brought to one multiple of WIDTH, and the answers' to another.

    Widths are those of the step's global batch, so that all processes replay the same graph."""
    question, answer = (-(-width // WIDTH) * WIDTH for width in batch.widths)
    shared = len(batch.shared_asked or ())

    def pad(x: torch.Tensor, n: int) -> torch.Tensor:
        return F.pad(x, (*(0, 0) * (x.ndim - 2), 0, n - x.shape[1]))

    changes = {}
    for name, n in (*dict.fromkeys(QUESTIONS, question).items(), *dict.fromkeys(ANSWERS, answer).items()):
        value, n = getattr(batch, name), n + shared * (name in WHOLE)
        if isinstance(value, tuple) and value[0].shape[1]:
            changes[name] = tuple(pad(x, n) for x in value)
        elif isinstance(value, torch.Tensor):
            changes[name] = pad(value, n)
    return replace(batch, **changes)
