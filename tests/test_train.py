"""Training: the best weights are evaluated, files are whole or absent, what cannot work is refused.

python -m pytest tests/test_train.py
"""

import json
import math
import os
from collections import Counter

import numpy as np
import pytest
import safetensors
import torch

from bridgekit.config import CONTROLS, ConfigError
from bridgekit.model import bridge as checkpoints
from bridgekit.model.bridge import build_bridge
from bridgekit.runs import create_run, find_eval, load_eval, read_jsonl, read_status
from bridgekit.tasks import load_examples
from bridgekit.train import trainer
from bridgekit.train import worker as train
from bridgekit.train.evaluator import Evaluator

STATUS = {"state", "stage", "elapsed", "parameters"}


@pytest.fixture(scope="module")
def past_the_best(tiny, make_job):
    """A finished run whose schedule turns round after step 4, so that it climbs the loss from there on."""
    config = tiny(
        steps=16, eval_every=4, lr=0.1, n_soft_tokens=8, source_only_share=0.0, max_new_tokens=40,
        val_samples=20, n_test=20, conditions=["source", "target", "bridged", "shuffled"],
    )  # fmt: skip
    job = make_job(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "learning_rate", lambda config, step: 1.0 if step < 4 else -1.0)
        train.run_training(job)
    return job


def evaluations(job) -> dict[int, float]:
    """Validation accuracy of the bridge by step."""
    return {m["step"]: m["eval"]["bridged"] for m in read_jsonl(job.folder / "metrics.jsonl") if "eval" in m}


def texts(path) -> list[str]:
    return [row["bridged_full"] for row in read_jsonl(path)]


def load_best(job) -> torch.nn.Module:
    layers = Evaluator(job.config, job.pair, job.accelerator, job.folder).layers
    bridge = build_bridge(job.config, len(layers), job.pair.source.hidden_size, job.pair.target)
    checkpoints.load_bridge(bridge, job.folder, "bridged")
    return bridge


# -- the best weights ---------------------------------------------------------------------------------------


def test_the_best_weights_are_the_ones_evaluated(past_the_best, tmp_path):
    job = past_the_best
    found = evaluations(job)
    best = max(step for step in found if found[step] == max(found.values()))
    assert found[16] < found[best] and best < 16  # training did go on past the best
    with safetensors.safe_open(checkpoints.checkpoint_path(job.folder, "bridged"), "pt") as file:
        assert file.metadata() == {"step": str(best), "val_accuracy": f"{found[best]:.5f}"}
    bridge, evaluator = load_best(job), Evaluator(job.config, job.pair, job.accelerator, tmp_path)
    said = [row["bridged_full"] for row in evaluator.evaluate(job.val[:20], {"bridged": bridge}, "0", ("bridged",))]
    assert said == texts(job.folder / f"eval_samples_step_{best}.jsonl")
    assert said != texts(job.folder / "eval_samples_step_16.jsonl")
    said = [row["bridged_full"] for row in evaluator.evaluate(job.test, {"bridged": bridge}, "1", ("bridged",))]
    assert said == texts(find_eval(job.folder))


def test_a_run_folder_is_whole(past_the_best):
    job = past_the_best
    names = {path.name for path in job.folder.iterdir() if path.name not in ("figures", ".parts")}
    assert names == {
        "config.yaml", "provenance.json", "headroom.jsonl", "metrics.jsonl", "eval_samples_step_final.jsonl",
        *(f"eval_samples_step_{step}.jsonl" for step in (0, 4, 8, 12, 16)), "attention.npz", "checkpoint",
        "verdict.json", "summary.log", "timing.json", "status.json",
    }  # fmt: skip
    status = read_status(job.folder)
    assert set(status) >= STATUS and status["state"] == "finished"
    assert status["parameters"] == load_best(job).n_parameters
    frame = load_eval(find_eval(job.folder))
    assert set(frame["split"]) == {"test"} and Counter(frame["novelty"])["seen"] == 8
    for step in (0, 4, 8, 12, 16):  # selection looks at validation alone
        assert {row["split"] for row in read_jsonl(job.folder / f"eval_samples_step_{step}.jsonl")} == {"val"}
    losses = [m for m in read_jsonl(job.folder / "metrics.jsonl") if "loss" in m]
    assert [m["step"] for m in losses] == list(range(1, 17))
    for m in losses:
        assert {"loss", "lr", "grad_norm", "losses", "seconds"} <= set(m) and set(m["losses"]) == {"nll"}
        assert m["loss"] == pytest.approx(m["losses"]["nll"], abs=1e-5) and m["grad_norm"] > 0
    assert "bridged" in (job.folder / "summary.log").read_text()
    assert json.loads((job.folder / "provenance.json").read_text())["target"] == job.pair.target.fingerprint


def test_better_or_equal_is_kept_and_waiting_is_counted(tiny, make_job):
    job = make_job(tiny())
    bridge = build_bridge(job.config, 2, 4, job.pair.target)
    best, path = trainer.Best(job, "bridged"), checkpoints.checkpoint_path(job.folder, "bridged")
    said = []
    for step, accuracy in enumerate([0.3, 0.5, 0.4, 0.5, 0.6, 0.1, 0.2]):
        with torch.no_grad():
            bridge.producer.queries.points.fill_(step)
        best.offer(bridge, step, accuracy)
        kept = safetensors.torch.load_file(path)["producer.queries.points"][0, 0].item()
        said.append((int(kept), best.step, best.waited))
    # An equal accuracy is taken, because later weights saw more; but it is no progress.
    assert said == [(0, 0, 0), (1, 1, 0), (1, 1, 1), (3, 3, 2), (4, 4, 0), (4, 4, 1), (4, 4, 2)]


def test_training_stops_when_nothing_gets_better(tiny, make_job):
    job = make_job(tiny(steps=20, eval_every=1, lr=1e-12, patience=3, val_samples=6, max_new_tokens=4))
    train.run_training(job)
    assert list(evaluations(job)) == [0, 1, 2, 3]
    assert read_status(job.folder)["state"] == "finished"


# -- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_checkpoint_that_cannot_be_finished_leaves_the_old_one(tiny, pair, tmp_path, monkeypatch, error):
    bridge = build_bridge(tiny(), 2, 4, pair.target)
    checkpoints.save_bridge(bridge, tmp_path, "bridged", {"step": "1"})
    path = checkpoints.checkpoint_path(tmp_path, "bridged")
    before = path.read_bytes()
    with torch.no_grad():
        bridge.producer.queries.points.zero_()

    def fail(*arguments):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(type(error)):
            checkpoints.save_bridge(bridge, tmp_path, "bridged", {"step": "2"})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    checkpoints.save_bridge(bridge, tmp_path, "bridged", {"step": "2"})
    other = build_bridge(tiny(), 2, 4, pair.target)
    checkpoints.load_bridge(other, tmp_path, "bridged")
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), bridge.parameters(), strict=True))


def test_a_missing_checkpoint_is_named(tiny, pair, tmp_path):
    with pytest.raises(FileNotFoundError, match="constant.safetensors.*no checkpoint"):
        checkpoints.load_bridge(build_bridge(tiny(), 2, 4, pair.target), tmp_path, "constant")


def test_a_run_folder_is_made_once_and_where_it_can_be_written(tiny, tmp_path):
    config = tiny(runs_dir=str(tmp_path / "runs"), name="some")
    folder = create_run(config)
    assert folder.parent == tmp_path / "runs" and folder.name.startswith("some_2")
    with pytest.raises(ConfigError, match=r"^run folder '.*' exists already: choose another run.name.*$"):
        create_run(config, folder)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"^run folder '.*' cannot be written \(Not a directory\): set run.runs_dir$"):
        create_run(config.with_(runs_dir=str(tmp_path / "file/runs")))
    assert (tmp_path / "file").read_text() == "in the way"


# -- the command --------------------------------------------------------------------------------------------


def fail_main(capsys, folder, code: int | type[Exception]) -> str:
    """The one line `python -m bridgekit.train.worker` ends in; no file may look like a finished run's."""
    if isinstance(code, int):
        assert train.main([str(folder)]) == code
    else:
        with pytest.raises(code):
            train.main([str(folder)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert not list(folder.glob("eval_samples_step_final*")) and not list(folder.glob("verdict.json"))
    return lines[0]


def test_a_loss_that_is_no_number_ends_the_run(tiny, capsys):
    folder = create_run(tiny(lr=1e30, steps=3, max_new_tokens=4, val_samples=4))
    message = fail_main(capsys, folder, RuntimeError)
    assert "nan" in message and "train.lr" in message and "step" in message
    status = read_status(folder)
    assert status["state"] == "failed" and status["error"] == message.removeprefix("error: ")


def test_too_many_soft_tokens_are_refused_before_training(tiny, capsys):
    folder = create_run(tiny(n_soft_tokens=2000))
    assert "bridge.n_soft_tokens" in fail_main(capsys, folder, 2)
    assert read_status(folder)["state"] == "failed" and not (folder / "headroom.jsonl").exists()


def test_another_number_of_processes_than_asked_for_is_refused(tiny, capsys):
    folder = create_run(tiny(num_processes=2))
    message = fail_main(capsys, folder, 2)
    assert "train.num_processes" in message and "2 asked for, 1 started" in message


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert "config.yaml" in fail_main(capsys, tmp_path, 2)
    assert "config.yaml" in fail_main(capsys, tmp_path / "nothing", 2)


def test_a_problem_without_a_donor_is_refused_before_training(tiny, capsys):
    folder = create_run(tiny(n_test=2, conditions=["source", "target", "bridged", "shuffled"]))
    assert "task.n_test" in fail_main(capsys, folder, 2)


def test_fewer_test_problems_keep_all_donors(tiny):
    folder = create_run(tiny(n_test=40, eval_samples=5, conditions=["source", "target", "bridged", "shuffled"]))
    job = train.open_job(folder)
    held = [e for e in job.test if e.novelty != "seen"]
    assert len(held) == 5 and {e.donor_id for e in job.test} <= {e.id for e in job.donors}
    assert held == [e for e in job.donors if e.novelty != "seen"][:5]


# -- data and schedule --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.75, -1.0])
def test_the_mix_of_the_training_data_is_the_one_asked_for(tiny, pair, make_job, share):
    job = make_job(tiny(source_only_share=share, n_train=80))
    evaluator = Evaluator(job.config, pair, job.accelerator, job.folder)
    groups = {}
    for name in ("bridged", "constant", "constant_natural"):
        data = trainer.prepare_data(job, trainer.variant(job.config, name), name, evaluator)
        literal = data.texts.literal
        asked = {
            pair.target.tokenizer.decode(ids[mask][1:]) for ids, mask in zip(literal.ids, literal.mask, strict=True)
        }
        for mix in (0.75, -1.0):
            examples = load_examples(job.config.with_(source_only_share=mix), pair.lexicon_seed, "train")
            if asked == {f"Question: {e.question}\nAnswer:\n" for e in examples}:
                groups[name] = Counter(e.group for e in examples)["source_only"]
    natural = round(0.23 * 80)
    mixed = natural if share == -1 else 60
    assert groups == {"bridged": mixed, "constant": mixed, "constant_natural": natural}


def test_a_control_is_the_bridge_s_own_training_but_for_one_thing(tiny):
    from bridgekit.config import to_flat

    config = tiny(producer="dit", flow_weight=0.1, info_nce_weight=0.2, source_only_share=0.6)
    changed = {
        name: {k for k, v in to_flat(trainer.variant(config, name)).items() if v != to_flat(config)[k]}
        for name in CONTROLS
    }
    losses = {"loss.flow_weight", "loss.info_nce_weight"}  # they speak of the source
    assert changed["self_bridge"] == set()
    assert changed["constant"] == {"bridge.producer", *losses}
    assert changed["constant_natural"] == {"bridge.producer", "task.source_only_share", *losses}


def test_the_rate_warms_up_and_decays(tiny):
    config = tiny(steps=30, warmup_steps=10)
    rates = [trainer.learning_rate(config, step) for step in range(31)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:] == pytest.approx([(1 + math.cos(math.pi * i / 20)) / 2 for i in range(21)])
    assert trainer.learning_rate(tiny(steps=3, warmup_steps=10), 2) == 1.0  # a warm-up longer than the training


def test_summary_of_rows_counts_units_and_groups():
    rows = [
        {"group": g, "unit": u, "gold_extracted": "1", "bridged_extracted": b}
        for g, u, b in (
            ("source_only", "a", "1"),
            ("source_only", "a", "2"),
            ("both", "b", "1"),
            ("both", "c", "1"),
        )
    ]
    wanted = {"bridged": 0.75, "bridged_source_only": 0.5, "n": 4, "n_units": 3}
    assert trainer.summarise_rows(rows, ("bridged",)) == wanted
    for row in rows:
        row.update(group=None, unit=None)
    assert trainer.summarise_rows(rows, ("bridged",)) == {"bridged": 0.75, "n": 4, "n_units": 4}
    assert np.isfinite(wanted["bridged"])
