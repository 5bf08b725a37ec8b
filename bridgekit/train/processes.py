"""What crosses the processes of a job; with one process nothing does.

Shapes: B batch, D width.
"""

import torch
from accelerate.utils import gather_object


class Processes:
    """This process among those of the job; without an accelerator it is the only one."""

    def __init__(self, accelerator=None):
        self.accelerator = accelerator
        self.rank, self.world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        if self.world > 1:
            self.accelerator.wait_for_everyone()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over processes, on all of them; it travels through the accelerator's device."""
        if self.world == 1:
            return values
        return self.accelerator.reduce(values.detach().to(self.accelerator.device), "sum").to(values.device)

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows of all processes, one process after the other. (B, D) -> (B * world, D)"""
        if self.world == 1:
            return rows
        return self.accelerator.gather(rows.to(self.accelerator.device)).to(rows.device)

    def gather_objects(self, value) -> list:
        """The value of each process, in the order of ranks, on all of them."""
        return [value] if self.world == 1 else gather_object([value])


def sum_gradients(bridge: torch.nn.Module, processes: Processes) -> None:
    """Add all processes' gradients; each already is its part of the global mean."""
    if processes.world == 1:
        return
    parameters = [p for p in bridge.parameters() if p.grad is not None]  # the same on all: so are the losses
    flat = processes.sum(torch.cat([p.grad.flatten() for p in parameters]))
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))
