"""One, two and four processes learn and say the same: nothing depends on how the work is dealt out.

python -m pytest tests/train/test_processes.py

Every loss is on, so that each way across processes is taken: counts, gradients, gathered rows, sampled answers.
Set BRIDGEKIT_TEST_DROPOUT to another share than the 0.2 of this test to measure it.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from bridgekit.launch import training_command
from bridgekit.runs import create_run, find_eval, load_jsonl, load_status

DROPOUT = float(os.environ.get("BRIDGEKIT_TEST_DROPOUT", 0.2))
LOSSES = dict(
    kl_weight=0.1, prompt_weight=0.1, info_nce_weight=0.1, format_weight=0.1, flow_weight=0.1, decode_weight=0.1,
    decode_every=2, decode_batch=4, decode_samples=2, decode_tokens=24, decode_estimator="policy_gradient",
)  # fmt: skip
CONDITIONS = ["source", "target", "bridged", "noise", "shuffled", "relay_cut"]


@pytest.fixture(scope="module")
def run(tiny):
    """`run(n)`: the folder of a training, of a bridge and a control, that n processes have finished."""

    def make(world: int):
        config = tiny(
            n_test=17, n_val=7, val_samples=7, warmup_steps=3, max_new_tokens=12, num_processes=world,
            producer="dit", injector="prefix+residual", dropout=DROPOUT, state_dropout=DROPOUT, controls=["constant"],
            source_only_share=0.8, conditions=CONDITIONS, **LOSSES,
        )  # fmt: skip
        folder = create_run(config)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            training_command(folder, "train", world), env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0 and load_status(folder)["state"] == "finished", done.stderr[-3000:]
        return folder

    return make


def largest_difference(one: dict, two: dict) -> float:
    """Of the losses of one metrics row, relative to their size."""
    pairs = [(one["loss"], two["loss"]), *((v, two["losses"][k]) for k, v in one["losses"].items())]
    return max(abs(a - b) / max(abs(a), 1e-2) for a, b in pairs)


def test_the_number_of_processes_changes_nothing(run):
    folders = [run(world) for world in (1, 2, 4)]
    assert [json.loads((f / "provenance.json").read_text())["processes"] for f in folders] == [1, 2, 4]
    files = ("metrics.jsonl", "metrics_constant.jsonl")
    metrics = [[row for name in files for row in load_jsonl(f / name)] for f in folders]
    assert len({(f / "controls.json").read_text() for f in folders}) == 1
    final = [list(load_jsonl(find_eval(f))) for f in folders]
    attention = [np.load(f / "attention.npz") for f in folders]
    assert len(final[0]) == 17 + 8  # with the problems about seen units
    for world in (1, 2):
        rows = [(a, b) for a, b in zip(metrics[0], metrics[world], strict=True) if "loss" in a]
        worst = max(largest_difference(a, b) for a, b in rows)
        print(f"{2**world} processes: losses differ by {worst:.1e} at most", file=sys.stderr)
        assert worst < 1e-5
        for one, two in zip(metrics[0], metrics[world], strict=True):
            assert one["step"] == two["step"] and one.get("eval") == two.get("eval")
        for one, two in zip(final[0], final[world], strict=True):
            assert two == {k: pytest.approx(v, abs=1e-4) if k.endswith("logprob") else v for k, v in one.items()}
        assert np.array_equal(attention[0]["ids"], attention[world]["ids"])
        found = attention[world]["mean"].astype(float)
        assert found == pytest.approx(attention[0]["mean"].astype(float), abs=2e-3)
