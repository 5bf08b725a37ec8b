"""A training that was interrupted goes on bit for bit, and nothing damaged is gone on from.

python -m pytest tests/train/test_checkpoints.py
"""

import json
import os
import signal

import pytest
import torch

from bridgekit.config import ConfigError
from bridgekit.runs import RESUME, UNFINISHED, load_jsonl, load_run_config, load_status
from bridgekit.train import checkpoints, trainer, worker
from bridgekit.train.checkpoints import STOP, deal_window
from bridgekit.train.experiment import Experiment

EVERYTHING = dict(
    steps=8, eval_every=4, dropout=0.2, checkpoint_minutes=0.0, kl_weight=0.5, decode_weight=0.5, decode_every=3,
    decode_batch=4, decode_tokens=4, controls=["constant"], max_new_tokens=4, val_samples=8, n_test=8, patience=2,
    conditions=["source", "target", "bridged", "router"],
)  # fmt: skip


def run(experiment: Experiment) -> Experiment:
    """All of a run's stages in this process, from what its folder holds; a new object, as a new process has."""
    torch.manual_seed(99)  # another process has other random numbers
    fresh = Experiment(experiment.config, experiment.folder, experiment.processes.accelerator, experiment.pair)
    worker.run_training(fresh)
    return fresh


def files(folder) -> dict[str, object]:
    """Everything that must be equal, without times."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name.startswith("metrics"):
            found[name] = [{k: v for k, v in row.items() if k != "seconds"} for row in load_jsonl(path)]
        elif path.suffix in (".jsonl", ".safetensors", ".npz") or name in ("verdict.json", "controls.json"):
            found[name] = path.read_bytes()
    return found


def differing(folder, whole: dict[str, object]) -> list[str]:
    found = files(folder)
    return [name for name in {**whole, **found} if whole.get(name) != found.get(name)]


@pytest.fixture(scope="module")
def config(tiny):
    return tiny(**EVERYTHING)


@pytest.fixture(scope="module")
def whole(config, make_experiment) -> dict[str, object]:
    experiment = run(make_experiment(config))
    assert not (experiment.folder / RESUME).exists() and not (experiment.folder / UNFINISHED).exists()
    return files(experiment.folder)


def interrupt(monkeypatch, owner, name: str, call: int) -> None:
    """The call-th call of a function ends the process, as far as anybody outside can see."""
    real, calls = getattr(owner, name), []

    def once(*given, **more):
        calls.append(name)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*given, **more)

    monkeypatch.setattr(owner, name, once)


KILLED = {  # at many more points by tests/faults.py
    "in the middle of a checkpoint": (checkpoints, "hash_file", 11),
    "the evaluation is whole, the verdict is not there": (worker, "write_text_atomic", 1),
}


@pytest.mark.parametrize("point", KILLED)
def test_a_run_that_is_killed_ends_as_if_nobody_had(config, make_experiment, whole, monkeypatch, point):
    experiment = make_experiment(config)
    with monkeypatch.context() as patch:
        interrupt(patch, *KILLED[point])
        with pytest.raises(KeyboardInterrupt):
            run(experiment)
    assert load_status(experiment.folder)["state"] != "finished"
    run(experiment)
    assert differing(experiment.folder, whole) == []


def test_a_stop_waits_for_the_step_and_keeps_it(config, make_experiment, whole, monkeypatch):
    experiment = make_experiment(config)
    monkeypatch.setattr(checkpoints.Checkpoints, "is_due", lambda self, step: STOP.asked)
    real, steps = trainer.train_step, []

    def step(*given):
        steps.append(given[5])
        if len(steps) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    monkeypatch.setattr(trainer, "train_step", step)
    before = signal.getsignal(signal.SIGTERM)
    try:
        STOP.listen()
        with pytest.raises(SystemExit) as stopped:
            run(experiment)
    finally:
        signal.signal(signal.SIGTERM, before)
        STOP.asked = False
    assert stopped.value.code == 75
    run(experiment)
    assert steps[:8] == list(range(8)), "no step was made twice, and none was left out"
    assert differing(experiment.folder, whole) == []


@pytest.fixture
def stopped(config, make_experiment, monkeypatch):
    """A run that was killed in its seventh step, after checkpoints of the fifth and the sixth."""
    experiment = make_experiment(config)
    worker.record_provenance(experiment.folder, experiment.provenance() | {"data": worker.fingerprint_data(experiment)})
    with monkeypatch.context() as patch:
        interrupt(patch, trainer, "train_step", 7)
        with pytest.raises(KeyboardInterrupt):
            run(experiment)
    assert [p.name for p in sorted((experiment.folder / RESUME).iterdir())] == ["bridged-000005", "bridged-000006"]
    return experiment


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(stopped, whole, capsys):
    path = stopped.folder / RESUME / "bridged-000006/state.safetensors"
    path.write_bytes(path.read_bytes()[:-5] + b"other")
    run(stopped)
    out = capsys.readouterr().out
    assert "checkpoint bridged-000006 is damaged (state.safetensors is not what was written)" in out
    assert "goes on from step 5" in out and differing(stopped.folder, whole) == []


@pytest.mark.slow
def test_metrics_that_were_cut_make_the_training_begin_again(stopped, whole, capsys):
    (stopped.folder / "metrics.jsonl").write_text("")
    run(stopped)
    assert "metrics.jsonl is not what was written" in capsys.readouterr().out
    assert differing(stopped.folder, whole) == []


def test_a_loss_that_is_no_number_leaves_the_last_good_checkpoint(stopped, whole, monkeypatch):
    real = trainer.train_step

    def step(*given):
        values = real(*given)
        return values | ({"kl": torch.tensor(torch.nan)} if given[5] == 6 else {})

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        with pytest.raises(RuntimeError, match="bridged: kl is nan at step 7: lower train.lr"):
            run(stopped)
    assert sorted(p.name for p in (stopped.folder / RESUME).iterdir())[-1] == "bridged-000006"
    run(stopped)
    assert differing(stopped.folder, whole) == []


def test_out_of_memory_in_a_step_says_what_to_change_and_the_run_goes_on(stopped, whole, monkeypatch):
    real = trainer.train_step

    def step(*given):
        if given[5] == 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", step)
        with pytest.raises(torch.OutOfMemoryError) as met:
            run(stopped)
    said = worker.explain(met.value, {"stage": "train bridged", "step": 6})
    assert said.startswith("out of memory in step 7 of train bridged, or just after (")
    assert "GiB in use at most): smaller train.cache_states_gb or more train.num_processes" in said
    run(stopped)
    assert differing(stopped.folder, whole) == []


def test_other_models_or_data_are_refused(stopped):
    record = json.loads((stopped.folder / "provenance.json").read_text())
    worker.check_resumed(stopped.folder, record)
    for key, named in (("source", "source model"), ("target", "target model"), ("data", "data")):
        with pytest.raises(ConfigError, match=f"begun with another {named} .*open a new run"):
            worker.check_resumed(stopped.folder, record | {key: "another"})


def change_steps(stopped: Experiment, steps: int) -> Experiment:
    config = load_run_config(stopped.folder).with_(steps=steps, patience=0)
    return Experiment(config, stopped.folder, stopped.processes.accelerator, stopped.pair)


def test_a_run_may_become_longer_but_not_shorter_than_it_is(stopped):
    with pytest.raises(ConfigError, match="train.steps: bridged is at step 6 already, got 5"):
        run(change_steps(stopped, 5))
    run(change_steps(stopped, 9))
    rows = list(load_jsonl(stopped.folder / "metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10)) and rows[-1]["step"] == 9


def test_values_between_two_lines_go_to_the_processes_there_are():
    windows = [[{"nll": 1.0, "grad_norm": 3.0}], [{"nll": 2.0, "grad_norm": 3.0}]]
    assert deal_window(windows, 1, 2) == [{"nll": torch.tensor(2.0), "grad_norm": torch.tensor(3.0)}]
    one, other = (deal_window(windows, rank, 4) for rank in (0, 3))
    assert one == [{"nll": torch.tensor(3.0), "grad_norm": torch.tensor(3.0)}] and other[0]["nll"] == 0
    assert deal_window(windows, 0, 1) == one
