"""Run folders as records: equal numbers from every form of a run, a clear line for every damage.

python -m pytest tests/audit/test_first_runs.py
"""

import json

import pytest
from first_generation import BRIDGED, evaluation, log_text, write_jsonl, write_own, write_run

from bridgekit.audit.first_runs import (
    effective_settings,
    find_runs,
    identity,
    inert_differences,
    is_right,
    load_run,
)


def test_a_run_of_the_first_experiments(tmp_path):
    record = load_run(write_run(tmp_path, "phase1_full_20251116_201212", BRIDGED))
    assert (record.name, record.label, record.generation) == ("phase1_full_20251116_201212", "phase1_full", "first")
    assert record.steps() == ["0", "20", "40", "60", "final"]
    assert record.config["seed"] == 1234 and record.config["bf16"] is True and record.config["dit_cfg_dropout"] is None
    assert record.facts["started"] == "2025-11-16T20:12:12" and record.facts["ended"] == "2025-11-16T22:08:44"
    assert record.losses["dit_flow"].tolist() == [0.02, 0.04, 0.06] and record.problems == []
    curve = record.curve.set_index("step")
    assert curve.loc["20", ["source_acc", "target_acc", "bridged_acc", "n"]].tolist() == [0.5, 0.75, 0.25, 8]


def test_the_log_is_held_against_the_outcomes(tmp_path):
    run = write_run(tmp_path, "x_20251116_201212", BRIDGED)
    log = run / "phase1_all_fix" / "train.log"
    log.write_text(log.read_text().replace("Bridged acc: 0.500", "Bridged acc: 0.625"))
    assert load_run(run).problems == ["step 40: the log says bridged 0.625, the outcomes give 0.5000"]


def test_missing_step_and_wrong_step_inside(tmp_path):
    run = write_run(tmp_path, "x_20251116_201212", BRIDGED)
    folder = run / "phase1_all_fix"
    (folder / "eval_samples_step_40.jsonl").unlink()
    write_jsonl(folder / "eval_samples_step_20.jsonl", evaluation([0, 1], step=250))
    problems = load_run(run).problems
    assert "evaluation of step 40 is missing (eval_every is 20)" in problems
    assert any("eval_step inside is ['250'], the file name says 20" in problem for problem in problems)


def test_a_link_out_of_the_folder_is_not_read(tmp_path):
    run = write_run(tmp_path / "runs", "x_20251116_201212", BRIDGED)
    final = run / "phase1_all_fix" / "eval_samples_step_final.jsonl"
    final.unlink()
    final.symlink_to(write_jsonl(tmp_path / "elsewhere.jsonl", evaluation(range(8))))
    outside = write_run(tmp_path / "outside", "y_20251116_201212", BRIDGED)
    (tmp_path / "runs" / "linked").symlink_to(outside / "phase1_all_fix")
    record = load_run(run)
    assert "final" not in record.steps()
    assert "eval_samples_step_final.jsonl: a link that leads out of the run folder; not read" in record.problems
    assert find_runs(tmp_path / "runs") == [run / "phase1_all_fix"]


@pytest.mark.parametrize("stem", ['phase2_swap_"', "a run with spaces_", "it's_"])
def test_awkward_folder_names(tmp_path, stem):
    name = f"{stem}20251118_192955" + ('"' if '"' in stem else "")
    record = load_run(write_run(tmp_path, name, BRIDGED))
    assert record.name == name and record.problems == [] and record.label == stem.strip('_"')


def test_several_runs_in_one_folder(tmp_path):
    run = write_run(tmp_path, "ablations_20251116_201212", BRIDGED, sub="1a")
    other = write_run(tmp_path / "other", "ablations_20251116_201212", BRIDGED, sub="2b")
    (other / "2b").rename(run / "2b")
    names = [load_run(folder).name for folder in find_runs(run)]
    assert names == ["ablations_20251116_201212.1a", "ablations_20251116_201212.2b"]
    with pytest.raises(ValueError, match="several runs in it: 1a, 2b"):
        load_run(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no run in it"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        find_runs(tmp_path / "nowhere")


def test_a_run_of_this_package_is_read_as_the_package_reads_it(tmp_path):
    rows = evaluation([0, 1])
    rows[0]["novelty"] = "seen"  # an answer that may be memorised is no part of any score
    record = load_run(write_own(tmp_path / "resampler_20261120_101500", rows))
    assert record.generation == "bridgekit"
    assert record.config["run.seed"] == 3 and record.config["bridge.producer"] == "dit"
    assert record.losses.to_dict("records") == [{"step": 10, "loss": 2.5, "nll": 2.0}]
    assert record.logged.bridged.tolist() == [0.4] and record.steps() == ["final"] and record.problems == []
    assert len(record.at("final")) == 7 and is_right(record.at("final"), "bridged").sum() == 1


def test_damage_of_a_run_of_this_package_is_named(tmp_path):
    folder = write_own(tmp_path / "x_20261120_101500", metrics="{cut off\n")
    (folder / "config.yaml").write_text("bridge: {producers: dit}\n")
    lines = (folder / "eval_samples_step_final.jsonl").read_text().splitlines()
    (folder / "eval_samples_step_final.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    record = load_run(folder)
    problems = " | ".join(record.problems)
    assert "metrics.jsonl: line 3 is no JSON object" in problems and "did you mean" in problems
    assert "eval_samples_step_final.jsonl: not a whole JSON object (line 2)" in problems
    assert len(record.at("final")) == 7


def test_labels_are_compared_as_text_and_no_answer_is_never_right(tmp_path):
    rows = evaluation([0])
    rows[0]["bridged_extracted"] = "100.0"
    rows[1]["bridged_extracted"] = rows[1]["gold_extracted"] = "[invalid]"
    run = write_run(tmp_path, "x_20251116_201212", {"final": [0]})
    write_jsonl(run / "phase1_all_fix" / "eval_samples_step_final.jsonl", rows)
    assert load_run(run).curve.bridged_acc[0] == 0


def test_settings_without_effect_make_no_other_experiment(tmp_path):
    assert effective_settings({"decode_loss_weight": 0.0, "decode_interval": 5, "seed": 1}, seed=False) == {
        "decode_loss_weight": 0.0
    }
    assert "adapter_scale" not in effective_settings({"soft_injection": "prefix", "adapter_scale": 2.0})
    assert effective_settings({"bridge": "resampler", "dit_pool": "mean"}) == {"bridge": "resampler"}
    one, other = (
        load_run(write_run(tmp_path, f"{n}_20251116_201212", BRIDGED, settings={"decode_interval": n})) for n in (2, 5)
    )
    assert identity(one) == identity(other) and inert_differences(one, other) == {"decode_interval": (2, 5)}
    other.facts["world_size"] = 1  # another number of processes is another run
    assert identity(one) != identity(other)


def test_a_log_of_the_first_experiments_alone(tmp_path):
    (tmp_path / "x_20251116_201212").mkdir()
    (tmp_path / "x_20251116_201212" / "train.log").write_text(log_text())
    record = load_run(tmp_path / "x_20251116_201212")
    assert record.outcomes.empty and len(record.losses) == 3 and record.curve.empty
    assert json.dumps(record.facts["crashes"]) == "[]"
