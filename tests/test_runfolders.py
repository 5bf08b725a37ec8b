"""Outcome and run-folder readers: equal numbers from every form of a run, a clear line for every damage."""

import gzip
import json

import numpy as np
import pytest
from first_generation import evaluation, log_text, write_jsonl, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridgekit.audit.outcomes import curve_of, read_outcomes, rescore, text_facts
from bridgekit.audit.runfolders import find_runs, read_run

BRIDGED = {"0": [], "20": [0, 1], "40": [0, 1, 2, 3], "60": [0, 1, 2], "final": [1, 2, 5]}


def test_outcomes_and_curve(tmp_path):
    path = write_jsonl(tmp_path / "eval_samples_step_20.jsonl", evaluation([0, 1], step=20))
    frame = read_outcomes(path, problems := [], "20")
    assert list(frame) == ["step", "index", "gold", "source_pred", "target_pred", "bridged_pred"]
    assert frame.astype(str).iloc[2].tolist() == ["20", "2", "102", "102", "102", "7"]
    curve = curve_of(frame).iloc[0]
    assert (curve.source_acc, curve.target_acc, curve.bridged_acc, curve.n) == (0.5, 0.75, 0.25, 8)
    assert problems == []


def test_order_does_not_matter_and_the_first_of_two_is_kept(tmp_path):
    rows = evaluation([0, 1, 2])
    straight = read_outcomes(write_jsonl(tmp_path / "a.jsonl", rows), [], "final")
    turned = read_outcomes(write_jsonl(tmp_path / "b.jsonl", rows[::-1] + rows[:2]), problems := [], "final")
    assert turned.astype(str).equals(straight.astype(str))
    assert problems == ["b.jsonl: index given twice, the first is kept (line 9, 10; 2 in all)"]


def test_compressed_and_plain_are_read_alike(tmp_path):
    plain = write_jsonl(tmp_path / "eval_samples_step_final.jsonl", evaluation([3]))
    packed = tmp_path / "eval_samples_step_final.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_outcomes(packed, [], "final").equals(read_outcomes(plain, [], "final"))
    packed.write_bytes(packed.read_bytes()[:-20])
    read_outcomes(packed, problems := [], "final")
    assert "cannot be read further (EOFError)" in problems[0]


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: r.pop("index"), "no whole number under 'index'"),
    (lambda r: r.update(index="3"), "no whole number under 'index'"),
    (lambda r: r.update(index=2**70), "no whole number under 'index'"),
    (lambda r: r.pop("bridged_extracted"), "no text under 'bridged_extracted'"),
    (lambda r: r.pop("gold_extracted"), "no text under 'gold_extracted'"),
    (lambda r: r.update(source_extracted=float("nan")), "no text under 'source_extracted'"),
    (lambda r: r.update(target_extracted=None), "no text under 'target_extracted'"),
])  # fmt: skip
def test_a_damaged_line_is_named_and_the_others_are_used(tmp_path, change, message):
    rows = evaluation([0, 1])
    change(rows[4])
    frame = read_outcomes(write_jsonl(tmp_path / "e.jsonl", rows), problems := [], "final")
    assert len(frame) == 7 and problems == [f"e.jsonl: {message} (line 5; 1 in all)"]


def test_files_that_are_no_evaluation(tmp_path):
    for content, message in (
        (b"", "the file is empty (0 bytes)"),
        (b"\x00\xff\xfe" * 50, "not JSON, cut off or binary"),
        (b'{"index": 1}\n{"a": 2}\n', "no '<condition>_extracted' key"),
        (b"[1, 2]\n3\n", "no JSON object"),
        (json.dumps(evaluation([0], n=1)[0]).encode()[:-9], "not JSON, cut off"),
    ):
        path = tmp_path / "eval_samples_step_0.jsonl"
        path.write_bytes(content)
        assert read_outcomes(path, problems := [], "0").empty
        assert any(message in p for p in problems), problems


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["index", "gold_extracted", "source_extracted", "eval_step"]), inner, max_size=4),
    max_leaves=6).map(lambda v: json.dumps(v).encode()))))  # fmt: skip
def test_no_content_stops_the_outcome_reader(tmp_path, lines):
    path = tmp_path / "eval_samples_step_0.jsonl"
    path.write_bytes(b"\n".join(lines))
    frame = read_outcomes(path, problems := [], "0")
    assert frame["index"].is_unique
    assert len(frame) or problems


def test_a_run_of_the_first_experiments(tmp_path):
    record = read_run(write_run(tmp_path, "phase1_full_20251116_201212", BRIDGED))
    assert (record.name, record.label, record.generation) == (
        "phase1_full_20251116_201212",
        "phase1_full",
        "first",
    )
    assert record.steps() == ["0", "20", "40", "60", "final"]
    assert record.config["seed"] == 1234 and record.config["bf16"] is True and record.config["dit_cfg_dropout"] is None
    assert record.facts["started"] == "2025-11-16T20:12:12" and record.facts["ended"] == "2025-11-16T22:08:44"
    assert record.losses["dit_flow"].tolist() == [0.02, 0.04, 0.06]
    assert record.problems == []


def test_the_log_is_held_against_the_outcomes(tmp_path):
    run = write_run(tmp_path, "x_20251116_201212", BRIDGED)
    log = run / "phase1_all_fix" / "train.log"
    log.write_text(log.read_text().replace("Bridged acc: 0.500", "Bridged acc: 0.625"))
    assert read_run(run).problems == ["step 40: the log says bridged 0.625, the outcomes give 0.5000"]


def test_missing_step_and_wrong_step_inside(tmp_path):
    run = write_run(tmp_path, "x_20251116_201212", BRIDGED)
    folder = run / "phase1_all_fix"
    (folder / "eval_samples_step_40.jsonl").unlink()
    write_jsonl(folder / "eval_samples_step_20.jsonl", evaluation([0, 1], step=250))
    problems = read_run(run).problems
    assert "evaluation of step 40 is missing (eval_every is 20)" in problems
    assert any("eval_step inside is ['250'], the file name says 20" in p for p in problems)


def test_a_link_out_of_the_folder_is_not_read(tmp_path):
    run = write_run(tmp_path / "runs", "x_20251116_201212", BRIDGED)
    secret = write_jsonl(tmp_path / "elsewhere.jsonl", evaluation([0, 1, 2, 3, 4, 5, 6, 7]))
    final = run / "phase1_all_fix" / "eval_samples_step_final.jsonl"
    final.unlink()
    final.symlink_to(secret)
    outside = write_run(tmp_path / "outside", "y_20251116_201212", BRIDGED)
    (tmp_path / "runs" / "linked").symlink_to(outside / "phase1_all_fix")
    record = read_run(run)
    assert "final" not in record.steps()
    assert "eval_samples_step_final.jsonl: a link that leads out of the run folder; not read" in record.problems
    assert find_runs(tmp_path / "runs") == [run / "phase1_all_fix"]


@pytest.mark.parametrize(
    "name", ['phase2_swap_"20251118_192955"', "a run with spaces_20251118_192955", "it's_20251118_192955"]
)
def test_awkward_folder_names(tmp_path, name):
    record = read_run(write_run(tmp_path, name, BRIDGED))
    assert record.name == name and record.problems == []
    assert record.label in ("phase2_swap", "a run with spaces", "it's")


def test_several_runs_in_one_folder(tmp_path):
    write_run(tmp_path, "ablations_20251116_201212", BRIDGED, sub="1a")
    write_run(tmp_path / "other", "ablations_20251116_201212", BRIDGED, sub="2b")
    (tmp_path / "other" / "ablations_20251116_201212" / "2b").rename(tmp_path / "ablations_20251116_201212" / "2b")
    names = [read_run(f).name for f in find_runs(tmp_path)]
    assert names == ["ablations_20251116_201212.1a", "ablations_20251116_201212.2b"]
    with pytest.raises(ValueError, match="several runs in it: 1a, 2b"):
        read_run(tmp_path / "ablations_20251116_201212")


def test_a_folder_without_a_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no run in it"):
        read_run(tmp_path / "empty")
    with pytest.raises(ValueError, match="no such folder"):
        find_runs(tmp_path / "nowhere")


def write_own(folder, rows=None, config=None, metrics=""):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config or "run: {seed: 3}\nbridge: {producer: dit}\n")
    (folder / "provenance.json").write_text('{"command": ["bridgekit", "run"]}')
    (folder / "metrics.jsonl").write_text(
        '{"step": 10, "loss": 2.5, "losses": {"nll": 2.0}}\n{"step": 10, "eval": {"bridged": 0.4, "n": 8}}\n' + metrics
    )
    write_jsonl(folder / "eval_samples_step_final.jsonl", rows or evaluation([0, 1]))
    return folder


def test_a_run_of_this_package(tmp_path):
    record = read_run(write_own(tmp_path / "resampler_20261120_101500"))
    assert record.generation == "bridgekit" and record.config == {"run.seed": 3, "bridge.producer": "dit"}
    assert record.losses.to_dict("records") == [{"step": 10, "loss": 2.5, "nll": 2.0}]
    assert record.logged.bridged.tolist() == [0.4] and record.steps() == ["final"] and record.problems == []


def test_mixed_generations_and_broken_metrics_are_named(tmp_path):
    folder = write_own(tmp_path / "x_20261120_101500", metrics="{cut off\n[]\n")
    (folder / "train.log").write_text(log_text())
    (folder / "config.yaml").write_text("- only\n- a list\n")
    problems = " | ".join(read_run(folder).problems)
    assert "metrics.jsonl: line 3 is no JSON object with a step" in problems
    assert "train.log: of the first experiments, in a folder of this package" in problems
    assert "config.yaml: not there or no `key: value` lines" in problems


def test_rescoring_counts_the_labels_that_move(tmp_path):
    rows = evaluation([0, 1])
    rows[2]["bridged_full"], rows[2]["bridged_extracted"] = "#### 102.00", "102.00"
    table = rescore(write_jsonl(tmp_path / "e.jsonl", rows)).set_index(["condition", "rule"])
    kept = table.loc[("bridged", "seeds")]
    assert (kept.n, kept.moved, kept.right) == (8, 0, 2)
    strict = table.loc[("bridged", "marker_last")]
    assert (strict.moved, strict.right, strict.to_right, strict.to_wrong) == (1, 3, 1, 0)
    assert table.loc[("source", "lm_eval_flexible")].to_wrong == 4  # it takes the invented question's answer


def test_repeated_and_invented_questions_are_counted(tmp_path):
    rows = evaluation([0, 1])
    rows[0]["bridged_full"] = "Q: What is number 0 of the list of questions?\nA: one\n#### 100"
    facts = text_facts(write_jsonl(tmp_path / "e.jsonl", rows)).set_index("condition")
    assert facts.loc["bridged", "repeats_question"] == 1 and facts.loc["source", "repeats_question"] == 0
    assert facts.loc["bridged", "invents_question"] == 7 and facts.loc["target", "invents_question"] == 8


def test_labels_are_compared_as_text_not_as_numbers(tmp_path):
    rows = evaluation([0])
    rows[0]["bridged_extracted"] = "100.0"
    rows[1]["bridged_extracted"] = rows[1]["gold_extracted"] = "[invalid]"  # no answer is never a right one
    frame = read_outcomes(write_jsonl(tmp_path / "e.jsonl", rows), [], "final")
    assert np.isclose(curve_of(frame).bridged_acc[0], 0.0)
