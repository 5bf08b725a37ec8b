"""The child process of a run: whole run folders, one reading of the test set, refusals in one line.

python -m pytest tests/train/test_worker.py
"""

import json
from collections import Counter

import pytest
import safetensors

from bridgekit.model.bridge import checkpoint_path
from bridgekit.runs import create_run, find_eval, load_eval, load_jsonl, load_status
from bridgekit.train import trainer, worker


@pytest.fixture(scope="module")
def past_the_best(tiny, make_experiment):
    """A finished run whose schedule turns round after step 4, so that it climbs the loss from there on."""
    config = tiny(
        steps=16, eval_every=4, lr=0.1, n_soft_tokens=8, source_only_share=0.0, max_new_tokens=40, val_samples=20,
        n_test=20, controls=["constant"], conditions=["source", "target", "bridged", "shuffled", "router", "union"],
    )  # fmt: skip
    experiment = make_experiment(config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "learning_rate", lambda config, step: 1.0 if step < 4 else -1.0)
        worker.record_provenance(experiment.folder, experiment.provenance())
        worker.run_training(experiment)
    return experiment


def evaluations(experiment) -> dict[int, float]:
    """Validation accuracy of the bridge by step."""
    return {m["step"]: m["eval"]["bridged"] for m in load_jsonl(experiment.folder / "metrics.jsonl") if "eval" in m}


def texts(path) -> list[str]:
    return [row["bridged_full"] for row in load_jsonl(path)]


def test_the_best_weights_are_the_ones_evaluated(past_the_best):
    experiment, found = past_the_best, evaluations(past_the_best)
    best = max(step for step in found if found[step] == max(found.values()))
    assert found[16] < found[best] and best < 16  # training did go on past the best
    with safetensors.safe_open(checkpoint_path(experiment.folder, "bridged"), "pt") as file:
        assert file.metadata().items() >= {"step": str(best), "val_accuracy": f"{found[best]:.5f}"}.items()
    bridges = {"bridged": experiment._load_bridge("bridged")}
    again = experiment.evaluate(experiment.examples("val")[:20], bridges, None, ("bridged",))
    kept = texts(experiment.folder / f"eval_samples_step_{best}.jsonl")
    assert [row["bridged_full"] for row in again] == kept != texts(experiment.folder / "eval_samples_step_16.jsonl")
    again = experiment.evaluate(experiment.examples("test"), bridges, None, ("bridged",))
    assert [row["bridged_full"] for row in again] == texts(find_eval(experiment.folder))


def test_a_run_folder_is_whole(past_the_best):
    folder = past_the_best.folder
    assert {path.name for path in folder.iterdir() if path.name != "figures"} == {
        "config.yaml", "provenance.json", "headroom.jsonl", "metrics.jsonl", "metrics_constant.jsonl", "controls.json",
        "eval_samples_step_final.jsonl", *(f"eval_samples_step_{step}.jsonl" for step in (0, 4, 8, 12, 16)),
        "attention.npz", "checkpoint", "verdict.json", "summary.log", "timing.json", "status.json", ".report.json",
    }  # fmt: skip
    status = load_status(folder)
    assert status["state"] == "finished" and status["parameters"] == past_the_best.build_bridge().n_parameters
    frame = load_eval(find_eval(folder))
    assert set(frame["split"]) == {"test"} and Counter(frame["novelty"])["seen"] == 8
    for step in (0, 4, 8, 12, 16):  # selection looks at validation alone
        assert {row["split"] for row in load_jsonl(folder / f"eval_samples_step_{step}.jsonl")} == {"val"}
    losses = [m for m in load_jsonl(folder / "metrics.jsonl") if "loss" in m]
    assert [m["step"] for m in losses] == list(range(1, 17))
    assert all(set(m["losses"]) == {"nll"} and m["grad_norm"] > 0 for m in losses)
    assert (folder / "summary.log").read_text().startswith(f"{folder.name} n 20 source ")  # held-out problems alone
    spent = json.loads((folder / "timing.json").read_text())
    assert {"prepare", "train bridged", "validate bridged", "train constant", "test"} <= set(spent)


def test_each_selection_of_a_control_stands_in_the_final_evaluation(past_the_best):
    folder = past_the_best.folder
    steps = json.loads((folder / "controls.json").read_text())["constant"]
    assert set(steps) == {"mix", "source_only", "last"} and min(steps.values()) >= 8 and steps["last"] == 16
    (row, *_) = load_jsonl(find_eval(folder))
    names = {k.removesuffix("_full") for k in row if k.startswith("constant") and k.endswith("_full")}
    assert names == {"constant"} | {f"constant.{key}" for key, step in steps.items() if step != steps["mix"]}
    assert {p.stem for p in (folder / "checkpoint").iterdir()} == {"bridged"} | names


def fail(capsys, folder, code: int | type[Exception]) -> str:
    """The one line that `python -m bridgekit.train.worker` ends in; nothing may look like a finished run's."""
    if isinstance(code, int):
        assert worker.main([str(folder)]) == code
    else:
        with pytest.raises(code):
            worker.main([str(folder)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert not list(folder.glob("eval_samples_step_final*")) and not list(folder.glob("verdict.json"))
    return lines[0]


def test_a_loss_that_is_no_number_ends_the_run(tiny, capsys):
    folder = create_run(tiny(lr=1e30, steps=3, max_new_tokens=4, val_samples=4))
    message = fail(capsys, folder, RuntimeError)
    assert "nll is nan at step 2" in message and "train.lr" in message
    status = load_status(folder)
    assert status["state"] == "failed" and status["error"] == message.replace("error: ", "train: ")


def test_a_full_disk_is_said_in_one_line(tiny, capsys, monkeypatch):
    def fail_to_write(*arguments, **status):
        raise OSError(28, "No space left on device")

    folder = create_run(tiny(name="full"))
    with monkeypatch.context() as patch:
        for name in ("write_status", "write_jsonl", "write_text_atomic"):
            patch.setattr(worker, name, fail_to_write)
        assert "the disk is full" in fail(capsys, folder, 2)


@pytest.mark.parametrize("changes, key", [
    (dict(n_soft_tokens=2000), "bridge.n_soft_tokens"),
    (dict(n_test=2, conditions=["source", "target", "bridged", "shuffled"]), "task.n_test"),
    (dict(num_processes=2), "train.num_processes: 2 asked for, 1 started"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_training(tiny, tmp_path, capsys, changes, key):
    folder = create_run(tiny(**changes))
    assert key in fail(capsys, folder, 2)
    assert load_status(folder)["state"] == "failed" and not (folder / "headroom.jsonl").exists()
    assert "config.yaml" in fail(capsys, tmp_path, 2)  # which is no run


def test_a_finished_run_is_not_read_again(past_the_best, capsys):
    folder = past_the_best.folder
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert worker.main([str(folder)]) == 2
    assert "its test set is read once: open a new run" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_fewer_test_problems_keep_all_donors(tiny, make_experiment):
    conditions = ["source", "target", "bridged", "shuffled"]
    experiment = make_experiment(tiny(n_test=40, eval_samples=5, conditions=conditions))
    test, held = worker.choose_test(experiment), experiment.test
    assert [e for e in test if e.novelty != "seen"] == held[:5] and len(held) == 40 and len(test) > 5
    assert {e.donor_id for e in test} <= {e.id for e in experiment.examples("test")}


def test_every_stage_says_where_its_numbers_come_from(tiny, make_experiment):
    experiment = make_experiment(tiny())
    path, record = experiment.folder / "provenance.json", experiment.provenance()
    worker.record_provenance(experiment.folder, record)
    first = json.loads(path.read_text())
    assert first["target"] == experiment.pair.target.fingerprint
    worker.record_provenance(experiment.folder, record | {"started": "later"})
    assert json.loads(path.read_text()) == first  # nothing has changed
    worker.record_provenance(experiment.folder, record | {"commit": "another"})
    now = json.loads(path.read_text())
    assert now["commit"] == "another" and [r["commit"] for r in now["earlier"]] == [first["commit"]]
