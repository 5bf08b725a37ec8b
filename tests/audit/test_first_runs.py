"""Run folders as records: equal numbers from every form of a run, a clear line for every damage.

python -m pytest tests/audit/test_first_runs.py
"""

import pytest
from first_generation import BRIDGED, evaluation, log_text, write_jsonl, write_own, write_run

from bridgekit.audit.first_runs import effective_settings, find_runs, identity, load_run

NAME = "x_20251116_201212"
FINAL = "eval_samples_step_final.jsonl"


def test_a_run_of_the_first_experiments(tmp_path):
    record = load_run(write_run(tmp_path, "phase1_full_20251116_201212", BRIDGED))
    assert (record.name, record.label, record.generation) == ("phase1_full_20251116_201212", "phase1_full", "first")
    assert record.steps == ["0", "20", "40", "60", "final"]
    assert record.config["seed"] == 1234 and record.config["bf16"] is True and record.config["dit_cfg_dropout"] is None
    assert record.facts["started"] == "2025-11-16T20:12:12" and record.facts["ended"] == "2025-11-16T22:08:44"
    assert record.losses["dit_flow"].tolist() == [0.02, 0.04, 0.06] and record.problems == []
    curve = record.curve.set_index("step")
    assert curve.loc["20", ["source_acc", "target_acc", "bridged_acc", "n"]].tolist() == [0.5, 0.75, 0.25, 8]


def test_what_does_not_fit_together_is_named(tmp_path):
    folder = write_run(tmp_path, NAME, BRIDGED) / "phase1_all_fix"
    log = folder / "train.log"
    log.write_text(log.read_text().replace("Bridged acc: 0.500", "Bridged acc: 0.625"))
    assert load_run(folder).problems == ["step 40: the log says bridged 0.625, the outcomes give 0.5000"]
    (folder / "eval_samples_step_40.jsonl").unlink()
    write_jsonl(folder / "eval_samples_step_20.jsonl", evaluation([0, 1], step=250))
    problems = " | ".join(load_run(folder).problems)
    assert "evaluation of step 40 is missing (eval_every is 20)" in problems
    assert "eval_step inside is ['250'], the file name says 20" in problems


def test_a_link_out_of_the_folder_is_not_read(tmp_path):
    run = write_run(tmp_path / "runs", NAME, BRIDGED)
    final = run / "phase1_all_fix" / FINAL
    final.unlink()
    final.symlink_to(write_jsonl(tmp_path / "elsewhere.jsonl", evaluation(range(8))))
    outside = write_run(tmp_path / "outside", "y_20251116_201212", BRIDGED)
    (tmp_path / "runs" / "linked").symlink_to(outside / "phase1_all_fix")
    record = load_run(run)
    assert "final" not in record.steps
    assert f"{FINAL}: a link that leads out of the run folder; not read" in record.problems
    assert find_runs(tmp_path / "runs") == [run / "phase1_all_fix"]


@pytest.mark.parametrize("stem", ['phase2_swap_"', "a run with spaces_", "it's_"])
def test_awkward_folder_names(tmp_path, stem):
    name = f"{stem}20251118_192955" + ('"' if '"' in stem else "")
    record = load_run(write_run(tmp_path, name, BRIDGED))
    assert record.name == name and record.problems == [] and record.label == stem.strip('_"')


def test_several_runs_in_one_folder_and_none(tmp_path):
    run = write_run(tmp_path, "ablations_20251116_201212", BRIDGED, sub="1a")
    other = write_run(tmp_path / "other", "ablations_20251116_201212", BRIDGED, sub="2b")
    (other / "2b").rename(run / "2b")
    names = [load_run(folder).name for folder in find_runs(run)]
    assert names == ["ablations_20251116_201212.1a", "ablations_20251116_201212.2b"]
    messages = {run: "several runs in it: 1a, 2b", other: "no run in it", run / "3c": "no such folder"}
    for folder, message in messages.items():
        with pytest.raises(ValueError, match=message):
            load_run(folder)


def test_a_run_of_this_package_and_its_damage(tmp_path):
    rows = evaluation([0, 1])
    rows[0]["novelty"] = "seen"  # an answer that may be memorised is no part of any score
    folder = write_own(tmp_path / "resampler_20261120_101500", rows, metrics="{cut off\n")
    record = load_run(folder)
    assert record.config["run.seed"] == 3 and record.config["bridge.producer"] == "dit"
    assert record.losses.to_dict("records") == [{"step": 10, "loss": 2.5, "nll": 2.0}] and record.steps == ["final"]
    assert record.logged.bridged.tolist() == [0.4] and record.problems == ["metrics.jsonl: line 3 is no JSON object"]
    assert len(record.at("final")) == 7 and record.right("bridged").sum() == 1
    (folder / "config.yaml").write_text("bridge: {producers: dit}\n")
    with pytest.raises(ValueError, match="did you mean"):
        load_run(folder)


def test_labels_are_compared_as_text_and_no_answer_is_never_right(tmp_path):
    rows = evaluation([0])
    rows[0]["bridged_extracted"] = "100.0"
    rows[1]["bridged_extracted"] = rows[1]["gold_extracted"] = "[invalid]"
    run = write_run(tmp_path, NAME, {"final": [0]})
    write_jsonl(run / "phase1_all_fix" / FINAL, rows)
    assert load_run(run).curve.bridged_acc[0] == 0


def test_settings_without_effect_make_no_other_experiment(tmp_path):
    found = effective_settings({"decode_loss_weight": 0.0, "decode_interval": 5, "seed": 1}, seed=False)
    assert found == {"decode_loss_weight": 0.0}
    assert "adapter_scale" not in effective_settings({"soft_injection": "prefix", "adapter_scale": 2.0})
    assert effective_settings({"bridge": "resampler", "dit_pool": "mean"}) == {"bridge": "resampler"}
    runs = [write_run(tmp_path, f"{n}_20251116_201212", BRIDGED, settings={"decode_interval": n}) for n in (2, 5)]
    one, other = map(load_run, runs)
    assert identity(one) == identity(other)
    other.facts["world_size"] = 1  # another number of processes is another run
    assert identity(one) != identity(other)


def test_a_log_of_the_first_experiments_alone(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "train.log").write_text(log_text())
    record = load_run(tmp_path / NAME)
    assert record.outcomes.empty and len(record.losses) == 3 and record.curve.empty and record.facts["crashes"] == []
