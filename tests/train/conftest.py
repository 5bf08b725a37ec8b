"""What the tests of training and answering share."""

import contextlib
import itertools

import pytest
import torch


@pytest.fixture(scope="session")
def build_bridges():
    """`build_bridges(experiment)`: untrained ones, because what a condition reads does not depend on training."""

    def build(experiment) -> dict:
        bridges = {}
        for name, number in zip(("bridged", "constant", "constant_natural", "self_bridge"), itertools.count(1)):
            bridges[name] = experiment.build_bridge(name)
            torch.manual_seed(number)
            with torch.no_grad():
                for p in bridges[name].parameters():
                    p.add_(torch.randn_like(p) * 0.02)
        return bridges

    return build


@pytest.fixture
def forwards():
    """`with forwards(lm, ...) as count:` counts the forward passes of language models in count[0]."""

    @contextlib.contextmanager
    def counted(*models):
        count = [0]

        def add(module, arguments):
            count[0] += 1

        hooks = [lm.model.register_forward_pre_hook(add) for lm in models]
        try:
            yield count
        finally:
            for hook in hooks:
                hook.remove()

    return counted
