"""Run folders as records: every fact is found, equal numbers come from every form, every damage has a clear line.

python -m pytest tests/audit/test_first_runs.py
"""

import gzip
import json
import math
import os

import pytest
from first_generation import BRIDGED, OOM, SETTINGS, evaluation, log_text, write_jsonl, write_own, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridgekit.audit.first_runs import effective_settings, find_runs, load_outcomes, load_run
from bridgekit.audit.keep import keep_run

NAME = "x_20251116_201212"
FINAL = "eval_samples_step_final.jsonl"
EVALUATIONS = {"20": (0.54, 0.77, 0.5), "40": (0.54, 0.77, 0.68), "60": (0.54, 0.77, 0.64)}


def load(tmp_path, text):
    """A run of which the log alone is there."""
    (tmp_path / NAME).mkdir(exist_ok=True)
    (tmp_path / NAME / "train.log").write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_run(tmp_path / NAME)


# -- the log --------------------------------------------------------------------------------------------------


def test_a_whole_log(tmp_path):
    record = load(tmp_path, log_text(evaluations=EVALUATIONS, best=0.68, final=(0.54, 0.77, 0.645)))
    facts = record.facts
    assert facts["settings_text"] == {key: str(value) for key, value in SETTINGS.items()}
    assert (facts["world_size"], facts["parameters_m"], facts["gpu"]) == (4, 60.9, "NVIDIA H100 80GB HBM3")
    assert record.losses.to_dict("list") == {"step": [20, 40, 60], "loss": [4, 3, 2], "dit_flow": [0.02, 0.04, 0.06]}
    logged = record.logged.set_index("step")
    assert logged.loc["40"].to_dict() == {"source": 0.54, "target": 0.77, "bridged": 0.68}
    assert logged.loc["final", "bridged"] == 0.645 and facts["saved_best"] == 0.68
    assert facts["crashes"] == [] and record.problems == [] and record.outcomes.empty and record.curve.empty


def test_the_crash_names_where_and_how_much_was_in_use(tmp_path):
    launcher = 'Traceback (most recent call last):\n  File "/bin/torchrun", line 8, in <module>\n    main()\n'
    launcher += "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    record = load(tmp_path, log_text(steps=40, crash=OOM + OOM.replace("rank0", "rank1") + launcher))
    (crash,) = record.facts["crashes"]  # four processes print one crash
    assert (crash["kind"], crash["step"], crash["rank"]) == ("out of memory", 40, 0)
    assert crash["where"] == "cross_attention.py:1771 in main"
    assert crash["code"] == "decode_out = tgt_model(**decode_data)"
    assert (crash["asked_gib"], crash["in_use_gib"], crash["total_gib"]) == (2.09, 77.59, 79.11)
    assert "crashed (out of memory), last at step 40 of 60" in record.problems[-1]


@pytest.mark.parametrize(("text", "expected"), [
    (OOM.replace("main\n", 'main\n[rank0]:     step()\n[rank0]:   File "/data/losses.py", line 7, in step\n', 1),
     {"where": "losses.py:7 in step"}),
    ("CUDA out of memory. Tried to allocate 512.00 MiB\n", {"asked_gib": 0.5}),
    ("Traceback (most recent call last):\n  File \"a.py\", line 3, in main\n    f()\nKeyError: 'x'\n",
     {"kind": "KeyError", "where": "a.py:3 in main", "code": "f()"}),
    ("Traceback (most recent call last):\n  Fi", {"kind": "traceback cut off"}),
    ("slurmstepd: error: Detected 1 oom_kill event\n", {"kind": "out of memory", "step": 60}),
])  # fmt: skip
def test_kinds_of_crashes(tmp_path, text, expected):
    (crash,) = load(tmp_path, log_text(crash=text)).facts["crashes"]
    assert {key: crash[key] for key in expected} == expected


def test_older_logs_and_other_line_ends(tmp_path):
    text = "==== Config ====\nlr: 0.1\nLoading source\n"
    text += "[Eval] Step 250 | Target-alone acc: 0.730 | Bridged acc: 0.470\n"
    record = load(tmp_path, text + "[Distributed Eval] Sharding 200 samples across 2 ranks:\n")
    assert record.logged.to_dict("records") == [{"step": "250", "target": 0.73, "bridged": 0.47}]
    assert record.config == {"lr": 0.1} and record.facts["world_size"] == 2
    text = log_text(evaluations=EVALUATIONS, final=(0.5, 0.5, 0.5))
    for end in ("\r", "\r\n"):
        record = load(tmp_path, text.replace("\n", end))
        assert len(record.config) == len(SETTINGS) and len(record.logged) == 4


@pytest.mark.parametrize(("text", "problem"), [
    ("", "train.log: the log is empty (0 bytes)"),
    ("Step 20/60 | Loss (avg over last 20): 1.0\n", "no configuration block"),
    (log_text(final=(0.5, 0.5, math.nan)), "bridged accuracy at step final is nan"),
    (log_text().replace("4.0000", "nan"), "a loss is not a number"),
    (log_text(final=(0, 0, 0)) * 2, "steps go backwards"),
    (log_text(), "no final evaluation, last at step 60 of 60"),
])  # fmt: skip
def test_what_is_wrong_with_a_log_is_one_line(tmp_path, text, problem):
    assert any(problem in line for line in load(tmp_path, text).problems)


# -- answers --------------------------------------------------------------------------------------------------


def test_order_does_not_matter_and_the_first_of_two_is_kept(tmp_path):
    rows = evaluation([0, 1, 2])
    straight = load_outcomes(write_jsonl(tmp_path / "a.jsonl", rows), [], "final")
    assert list(straight) == ["step", "index", "gold", "source_pred", "target_pred", "bridged_pred"]
    assert straight.astype(str).iloc[3].tolist() == ["final", "3", "103", "103", "103", "7"]
    again = rows[0] | {"bridged_extracted": "8"}
    turned = load_outcomes(write_jsonl(tmp_path / "b.jsonl", rows[::-1] + [again, rows[1]]), problems := [], "final")
    assert turned.equals(straight)
    assert problems == ["b.jsonl: index given twice, the first is kept (line 9, 10; 2 in all)"]
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert load_outcomes(packed, [], "final").equals(straight)
    packed.write_bytes(packed.read_bytes()[:-20])
    load_outcomes(packed, problems := [], "final")
    assert "not a whole JSON object" in problems[0]


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: r.pop("index"), "no whole number under 'index'"),
    (lambda r: r.update(index=2**70), "no whole number under 'index'"),
    (lambda r: r.pop("bridged_extracted"), "no text under 'bridged_extracted'"),
    (lambda r: r.update(source_extracted=float("nan")), "no text under 'source_extracted'"),
    (lambda r: r.update(target_extracted=None), "no text under 'target_extracted'"),
])  # fmt: skip
@pytest.mark.parametrize("number", [0, 4])
def test_a_damaged_line_is_named_and_the_others_are_used(tmp_path, change, message, number):
    rows = evaluation([0, 1])
    change(rows[number])
    frame = load_outcomes(write_jsonl(tmp_path / "e.jsonl", rows), problems := [], "final")
    assert frame["index"].tolist() == [i for i in range(8) if i != number]
    assert problems == [f"e.jsonl: {message} (line {number + 1}; 1 in all)"]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "the file is empty (0 bytes)"),
    (b"\x00\xff\xfe" * 50 + b"\n[1, 2]\n", "not a whole JSON object: cut off or binary (line 1, 2; 2 in all)"),
    (b'{"index": 1}\n{"a": 2}\n', "no '<condition>_extracted' key (line 1"),
])  # fmt: skip
def test_files_that_are_no_evaluation(tmp_path, content, message):
    path = tmp_path / "eval_samples_step_0.jsonl"
    path.write_bytes(content)
    assert load_outcomes(path, problems := [], "0").empty
    assert any(message in problem for problem in problems), problems


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3000), st.lists(st.binary(max_size=40) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["index", "gold_extracted", "source_extracted", "eval_step"]), inner, max_size=4),
    max_leaves=6).map(lambda value: json.dumps(value).encode())))  # fmt: skip
def test_no_damage_stops_the_readers(tmp_path, noise, cut, lines):
    text = log_text(evaluations=EVALUATIONS, final=(0.5, 0.5, 0.5), crash=OOM).encode()
    (tmp_path / NAME).mkdir(exist_ok=True)
    (tmp_path / NAME / "eval_samples_step_0.jsonl").write_bytes(b"\n".join(lines))
    record = load(tmp_path, text[: len(text) - cut] + noise + text[:cut] + noise)
    assert set(record.losses) >= {"step", "loss"} and record.outcomes["index"].is_unique
    assert len(record.outcomes) or record.problems


# -- run folders ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ended", "expected"), [
    ("End time: Sun Nov 16 22:08:44 PST 2025", "2025-11-16T22:08:44"),
    ("End time: Tue Nov 18 09:22:03 PM PST 2025", "2025-11-18T21:22:03"),
    ("End time: Tue Nov 99 09:22:03 PM PST 2025", None),
    ("\x00", None),
])  # fmt: skip
def test_a_run_of_the_first_experiments(tmp_path, ended, expected):
    run = write_run(tmp_path, "phase1_full_20251116_201212", BRIDGED)
    (run / "summary.log").write_text(ended)
    record = load_run(run)
    assert (record.name, record.label, record.generation) == ("phase1_full_20251116_201212", "phase1_full", "first")
    assert record.steps == ["0", "20", "40", "60", "final"] and record.problems == []
    assert record.config["seed"] == 1234 and record.config["bf16"] is True and record.config["dit_cfg_dropout"] is None
    assert record.facts["started"] == "2025-11-16T20:12:12" and record.facts.get("ended") == expected
    curve = record.curve.set_index("step")
    assert curve.loc["20", ["source_acc", "target_acc", "bridged_acc", "n"]].tolist() == [0.5, 0.75, 0.25, 8]


def test_what_does_not_fit_together_is_named(tmp_path):
    folder = write_run(tmp_path, NAME, BRIDGED) / "phase1_all_fix"
    log = folder / "train.log"
    log.write_text(log.read_text().replace("Bridged acc: 0.500", "Bridged acc: 0.625"))
    assert load_run(folder).problems == ["step 40: the log says bridged 0.625, the outcomes give 0.5000"]
    (folder / "eval_samples_step_40.jsonl").unlink()
    write_jsonl(folder / "eval_samples_step_20.jsonl", evaluation([0, 1], step=250))
    (folder / "eval_samples_step_60.jsonl.gz").write_bytes(b"")
    log.unlink()
    log.symlink_to(write_jsonl(tmp_path / "elsewhere.jsonl", evaluation(range(8))))
    problems = " | ".join(load_run(folder).problems)
    assert "train.log: a link that leads out of the run folder; not read" in problems
    assert "eval_step inside is ['250'], the file name says 20" in problems
    assert "eval_samples_step_60.jsonl.gz: step 60 is also in eval_samples_step_60.jsonl; the first is" in problems
    log.unlink()
    log.write_text(log_text())
    assert "evaluation of step 40 is missing (eval_every is 20)" in load_run(folder).problems


def test_awkward_names_several_runs_in_one_folder_and_none(tmp_path):
    for name, label in {'phase2_swap_"20251118_192955"': "phase2_swap", "it's a_20251118_192955": "it's a"}.items():
        record = load_run(write_run(tmp_path, name, BRIDGED))
        assert record.name == name and record.problems == [] and record.label == label
    run = write_run(tmp_path, "ablations_20251116_201212", BRIDGED, sub="1a")
    other = write_run(tmp_path / "other", "ablations_20251116_201212", BRIDGED, sub="2b")
    (other / "2b").rename(run / "2b")
    (run / "linked").symlink_to(write_run(tmp_path / "outside", NAME, BRIDGED) / "phase1_all_fix")
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
    assert record.losses.to_dict("records") == [{"step": 10, "loss": 2.5}] and record.steps == ["final"]
    assert record.problems == ["metrics.jsonl: line 3 is no JSON object"]
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
    assert load_run(run).curve[["bridged_acc", "invalid_bridged"]].values.tolist() == [[0, 1]]


def test_settings_without_effect_make_no_other_experiment():
    found = effective_settings({"decode_loss_weight": 0.0, "decode_interval": 5, "seed": 1}, seed=False)
    assert found == {"decode_loss_weight": 0.0}
    assert "adapter_scale" not in effective_settings({"soft_injection": "prefix", "adapter_scale": 2.0})
    assert effective_settings({"bridge": "resampler", "dit_pool": "mean"}) == {"bridge": "resampler"}


@pytest.mark.parametrize("line", [
    "Loading checkpoint shards:  33%|███      | 1/3 [00:11<00:22, 11.29s/it]", "Setting `pad_token_id` to 2.",
    "UserWarning: this is slow", "A sentence that somebody printed.",
])  # fmt: skip
def test_a_foreign_line_inside_the_configuration_cuts_nothing(tmp_path, line):
    text = log_text()
    cut = text.replace("bf16: True", f"{line}\nbf16: True")
    assert cut != text and load(tmp_path, cut).config == load(tmp_path, text).config


def test_odd_files_are_named_and_stop_nothing(tmp_path):
    run = write_run(tmp_path, NAME, BRIDGED) / "phase1_all_fix"
    rows = evaluation([0, 1])
    rows[2]["bridged_extracted"], rows[3]["bridged_extracted"] = "1\r2", "\ud800"
    (run / "eval_samples_step_99999999999999999999.jsonl").write_text("")
    write_jsonl(run / FINAL, rows)
    with (run / FINAL).open("a") as file:
        file.write("[" * 200_000 + "\n")
    (run / "eval_samples_step_20.jsonl").unlink()
    os.mkfifo(run / "eval_samples_step_20.jsonl")
    record = load_run(run)
    said = "\n".join(record.problems)
    assert "eval_samples_step_20.jsonl: no plain file; not read" in said and len(record.problems) < 20
    assert f"{FINAL}: not a whole JSON object: cut off or binary (line 9; 1 in all)" in said
    kept = load_run(keep_run(run.parent, tmp_path / "kept"))
    assert kept.at("final")["bridged_pred"].tolist()[2:4] == ["1\\r2", "\\ud800"]
    assert kept.outcomes.astype(str).equals(record.outcomes.astype(str))
