"""What the tests of model/ share: a bridge beside a batch of problems, and a bridge on states of its own."""

import numpy as np
import pytest
import torch

from bridgekit.model.bridge import build_bridge

B, S, L, D = 3, 7, 2, 10  # examples, source tokens, captured layers, source width
LENGTHS = (7, 3, 5)


@pytest.fixture
def one_batch(tiny, pair, val, training_set):
    """`one_batch(...)`: configuration, a bridge from layers 1 and 2, a batch of six problems, the bridge's message."""

    def make(opened: bool = False, indices=range(6), **changes):
        config, indices = tiny(**changes), np.array(indices)
        torch.manual_seed(0)
        bridge = build_bridge(config, 2, pair.source.hidden_size, pair.target).eval()
        for name, p in bridge.named_parameters() if opened else ():
            if name.endswith("opening"):
                torch.nn.init.constant_(p, 1.0)
            elif name.endswith(("attend.out.weight", "mix.2.weight")):
                p.data *= 10  # so much that greedy text changes
        batch = training_set(config, val[:12]).batch(indices, indices)
        message = bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment)
        return config, bridge, batch, message

    return make


@pytest.fixture
def build(tiny, pair):
    """`build(producer=..., ...)`: a bridge for `source()`, from one seed; what starts at zero is opened, as training
    does, because it would hide what stands behind it."""

    def make(training: bool = False, **changes):
        torch.manual_seed(0)
        bridge = build_bridge(tiny(**changes), L, D, pair.target).train(training)
        torch.manual_seed(1)
        for p in bridge.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.1)
        return bridge

    return make


@pytest.fixture(scope="session")
def source():
    """`source(width, filler)`: states (B, width, L, D) of ragged prompts and their mask; padding holds `filler`."""

    def make(width: int = S, filler: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
        states = torch.randn(B, S, L, D, generator=torch.Generator().manual_seed(1)) * 3 + 1
        states = torch.cat([states, torch.zeros(B, width - S, L, D)], dim=1)
        mask = torch.arange(width)[None, :] < torch.tensor(LENGTHS)[:, None]
        return states.masked_fill(~mask[..., None, None], filler), mask

    return make
