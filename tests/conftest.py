"""What the tests of tensors and loops share: the pair, loaded once, and configurations that are tiny.

Nothing here imports torch before a test asks for it, so that the tests of facts and tables stay quick.
"""

import itertools
import os
from pathlib import Path

import pytest

from bridgekit.config import ConfigError, load_config

# Studies without goldens: test_study.py plans each, test_goldens.py all others.
NEW_STUDIES = "swap wide headline_fresh injectors recipe larger facts repairs_apart repairs_natural".split()
NEW_STUDIES += ["compression_h100_node"]
TINY = dict(
    source_device="cpu", target_device="cpu", n_train=64, n_val=24, n_test=24, val_samples=24, bridge_dim=16,
    heads=2, depth=1, n_soft_tokens=4, steps=4, batch_size=8, eval_every=2, warmup_steps=1, max_new_tokens=24,
    controls=[], conditions=["source", "target", "bridged"],
)  # fmt: skip


def refused(function, *given, **named) -> str:
    """What is said, in one line, of something that cannot work."""
    with pytest.raises(ConfigError) as caught:
        function(*given, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="session", autouse=True)
def nobody_waits_for_the_disk():
    """A kill leaves what was written, and no test cuts the power; test_runs.py looks at the order of both."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """`tiny(steps=2, ...)`: a configuration whose files all lie in a new folder."""

    def make(**changes):
        folder = tmp_path_factory.mktemp("tiny")
        return load_config(**(TINY | dict(runs_dir=f"{folder}/runs", cache_dir=f"{folder}/cache") | changes))

    return make


@pytest.fixture(scope="session")
def pair():
    """The embedded pair on one CPU thread; it is frozen, so tests may share it."""
    import torch

    from bridgekit.model.pair import load_pair

    torch.set_num_threads(1)
    return load_pair(load_config(**TINY))


@pytest.fixture(scope="session")
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture(scope="session")
def val(pair):
    """Validation problems of all three groups; each example's donor is among them."""
    from bridgekit.tasks import load_examples

    return load_examples(load_config(**TINY), pair.lexicon_seed, "val")


@pytest.fixture(scope="session")
def training_set(pair):
    """`training_set(config, examples)`: texts and source states of layers 1 and 2, ready for batches."""
    from bridgekit.model.states import SourceStates, align_tokens, read_source
    from bridgekit.train.data import TrainingSet, TrainingTexts

    def make(config, examples) -> TrainingSet:
        rows = read_source(pair.source, examples, "prompt", {})
        spans = align_tokens(pair.source, pair.target, examples)
        states = SourceStates(pair.source, rows, (1, 2), 1.0, spans)
        return TrainingSet(TrainingTexts(config, pair.target, examples), states)

    return make


@pytest.fixture(scope="session")
def make_experiment(pair, accelerator):
    """`make_experiment(config)`: a run folder and the experiment in it, without loading the pair again."""
    from bridgekit.runs import create_run
    from bridgekit.train.experiment import Experiment

    numbers = itertools.count(1)

    def make(config) -> Experiment:
        folder = Path(config.run.runs_dir) / f"{config.run.name}_{next(numbers)}"
        return Experiment(config, create_run(config, folder), accelerator, pair)

    return make
