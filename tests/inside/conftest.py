"""What the tests of a look inside a bridge share: experiments whose bridges learned nothing, without a run folder."""

import pytest

from bridgekit.train.experiment import Experiment

SIZE = dict(n_val=60, n_test=120, val_samples=24, n_train=200)


@pytest.fixture(scope="package")
def open_fresh(tiny, pair):
    """`open_fresh(injector="kv")`: an experiment of these settings with a fresh bridge and a fresh constant."""

    def make(**changes) -> Experiment:
        experiment = Experiment(tiny(**SIZE | changes), pair=pair)
        experiment.bridges = {name: experiment.build_bridge(name).eval() for name in ("bridged", "constant")}
        return experiment

    return make


@pytest.fixture(scope="package")
def experiment(open_fresh):
    return open_fresh()
