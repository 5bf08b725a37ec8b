"""One, two and four processes learn and say the same: nothing depends on how the work is dealt out.

python -m pytest tests/train/test_processes.py

Every loss is on, so that each way across processes is taken: counts, gradients, gathered rows, sampled answers.
Set BRIDGEKIT_TEST_DROPOUT to another share than the 0.2 of this test to measure it.
"""

import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from bridgekit.launch import open_run, training_command
from bridgekit.runs import create_run, find_eval, load_jsonl, load_status
from bridgekit.train import worker

DROPOUT = float(os.environ.get("BRIDGEKIT_TEST_DROPOUT", 0.2))
LOSSES = dict(
    kl_weight=0.1, prompt_weight=0.1, token_weight=0.1, info_nce_weight=0.1, format_weight=0.1, flow_weight=0.1,
    decode_weight=0.1, decode_every=2, decode_batch=4, decode_samples=2, decode_tokens=24,
    decode_estimator="policy_gradient", teacher_steps=2,
)  # fmt: skip
CONDITIONS = ["source", "target", "bridged", "noise", "shuffled", "relay_cut"]


@pytest.fixture(scope="module")
def run(tiny, pair):
    """`run(n)`: the folder of a training, of a bridge and a control, that n processes have finished.

    With `then`, n have begun it and others have ended it. One alone is this process, on one thread.
    """

    def make(world: int, then: int = 0):
        config = tiny(
            n_test=17, n_val=7, val_samples=7, warmup_steps=3, max_new_tokens=12, num_processes=world,
            producer="dit", injector="prefix+residual", dropout=DROPOUT, state_dropout=DROPOUT, controls=["constant"],
            source_only_share=0.8, conditions=CONDITIONS, **LOSSES,
        )  # fmt: skip
        folder, more = create_run(config), {"env": os.environ | {"OMP_NUM_THREADS": "1"}, "text": True}
        if then:
            begun = subprocess.Popen(training_command(folder, "train", world), **more)
            metrics = folder / "metrics.jsonl"
            while begun.poll() is None and not (metrics.is_file() and metrics.read_text().count('"loss"') >= 2):
                time.sleep(0.02)
            (child,) = psutil.Process(begun.pid).children()
            child.terminate()
            assert begun.wait() and load_status(folder)["state"] == "stopped"
            open_run(config.with_(num_processes=then), folder)
        elif world == 1:
            assert worker.main([str(folder)]) == 0
            return folder
        command = training_command(folder, "train", then or world)
        done = subprocess.run(command, capture_output=True, timeout=600, **more)
        assert done.returncode == 0 and load_status(folder)["state"] == "finished", done.stderr[-3000:]
        return folder

    return make


def largest_difference(one: dict, two: dict) -> float:
    """Of the losses of one metrics row, relative to their size."""
    pairs = [(one["loss"], two["loss"]), *((v, two["losses"][k]) for k, v in one["losses"].items())]
    return max(abs(a - b) / max(abs(a), 1e-2) for a, b in pairs)


@pytest.fixture(scope="module")
def alone(run):
    return run(1)


MORE = [2, pytest.param(4, marks=pytest.mark.slow)]  # four take a minute on two cores


@pytest.mark.parametrize("world", MORE)
def test_the_number_of_processes_changes_nothing(run, alone, world):
    compare(alone, run(world), world)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(run, alone):
    """Begun by one process, which is asked to stop after two steps, and ended by two."""
    compare(alone, run(1, then=2), 2)


def compare(one_folder, folder, world: int) -> None:
    folders = (one_folder, folder)
    assert [json.loads((f / "provenance.json").read_text())["processes"] for f in folders] == [1, world]
    files = ("metrics.jsonl", "metrics_constant.jsonl")
    first, second = ([row for name in files for row in load_jsonl(f / name)] for f in folders)
    assert len({(f / "controls.json").read_text() for f in folders}) == 1
    worst = max(largest_difference(a, b) for a, b in zip(first, second, strict=True) if "loss" in a)
    print(f"{world} processes: losses differ by {worst:.1e} at most", file=sys.stderr)
    assert worst < 1e-5
    for one, two in zip(first, second, strict=True):
        assert one["step"] == two["step"] and one.get("eval") == two.get("eval")
    rows, others = (list(load_jsonl(find_eval(f))) for f in folders)
    assert len(rows) == 17 + 8  # with the problems about seen units
    for one, two in zip(rows, others, strict=True):
        assert two == {k: pytest.approx(v, abs=1e-4) if k.endswith("logprob") else v for k, v in one.items()}
    own, found = (np.load(f / "attention.npz") for f in folders)
    assert np.array_equal(own["ids"], found["ids"])
    assert found["mean"].astype(float) == pytest.approx(own["mean"].astype(float), abs=2e-3)
