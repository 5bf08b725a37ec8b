"""The readers of the first experiments' logs and answers: every fact is found, every damage is named.

python -m pytest tests/audit/test_first_logs.py
"""

import gzip
import json
import math

import pytest
from first_generation import OOM, SETTINGS, evaluation, log_text, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridgekit.audit.first_logs import count_repeats, count_rescored, load_end, load_log, load_outcomes, load_texts

EVALUATIONS = {"20": (0.54, 0.77, 0.5), "40": (0.54, 0.77, 0.68), "60": (0.54, 0.77, 0.64)}


def load(tmp_path, text):
    path = tmp_path / "train.log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_log(path)


def test_a_whole_log(tmp_path):
    facts = load(tmp_path, log_text(evaluations=EVALUATIONS, best=0.68, final=(0.54, 0.77, 0.645)))
    assert facts["settings_text"] == {key: str(value) for key, value in SETTINGS.items()}
    assert (facts["world_size"], facts["parameters_m"], facts["gpu"]) == (4, 60.9, "NVIDIA H100 80GB HBM3")
    assert facts["losses"].to_dict("list") == {"step": [20, 40, 60], "loss": [4, 3, 2], "dit_flow": [0.02, 0.04, 0.06]}
    logged = facts["logged"].set_index("step")
    assert logged.loc["40"].to_dict() == {"source": 0.54, "target": 0.77, "bridged": 0.68}
    assert logged.loc["final", "bridged"] == 0.645 and facts["saved_best"] == 0.68
    assert facts["crashes"] == [] and facts["problems"] == []


def test_the_crash_names_where_and_how_much_was_in_use(tmp_path):
    launcher = 'Traceback (most recent call last):\n  File "/bin/torchrun", line 8, in <module>\n    main()\n'
    launcher += "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    facts = load(tmp_path, log_text(steps=40, crash=OOM + OOM.replace("rank0", "rank1") + launcher))
    (crash,) = facts["crashes"]  # four processes print one crash
    assert (crash["kind"], crash["step"], crash["rank"]) == ("out of memory", 40, 0)
    assert crash["where"] == "cross_attention.py:1771 in main"
    assert crash["code"] == "decode_out = tgt_model(**decode_data)"
    assert (crash["asked_gib"], crash["in_use_gib"], crash["total_gib"]) == (2.09, 77.59, 79.11)
    assert "crashed (out of memory), last at step 40 of 60" in facts["problems"][-1]


@pytest.mark.parametrize(("text", "expected"), [
    (OOM.replace("main\n", 'main\n[rank0]:     step()\n[rank0]:   File "/data/losses.py", line 7, in step\n', 1),
     {"where": "losses.py:7 in step"}),
    ("CUDA out of memory. Tried to allocate 512.00 MiB\n", {"asked_gib": 0.5}),
    ("Traceback (most recent call last):\n  File \"a.py\", line 3, in main\n    f()\nKeyError: 'x'\n",
     {"kind": "KeyError"}),
    ("Traceback (most recent call last):\n  Fi", {"kind": "traceback cut off"}),
    ("slurmstepd: error: Detected 1 oom_kill event\n", {"kind": "out of memory", "step": 60}),
])  # fmt: skip
def test_kinds_of_crashes(tmp_path, text, expected):
    (crash,) = load(tmp_path, log_text(crash=text))["crashes"]
    assert {key: crash[key] for key in expected} == expected


def test_older_logs_and_other_line_ends(tmp_path):
    text = "==== Config ====\nlr: 0.1\nLoading source\n"
    text += "[Eval] Step 250 | Target-alone acc: 0.730 | Bridged acc: 0.470\n"
    facts = load(tmp_path, text + "[Distributed Eval] Sharding 200 samples across 2 ranks:\n")
    assert facts["logged"].to_dict("records") == [{"step": "250", "target": 0.73, "bridged": 0.47}]
    assert facts["settings_text"] == {"lr": "0.1"} and facts["world_size"] == 2
    text = log_text(evaluations=EVALUATIONS, final=(0.5, 0.5, 0.5))
    for end in ("\r", "\r\n"):
        facts = load(tmp_path, text.replace("\n", end))
        assert len(facts["settings_text"]) == len(SETTINGS) and len(facts["logged"]) == 4


def test_what_is_wrong_with_a_log_is_one_line(tmp_path):
    assert load(tmp_path, b"")["problems"][0] == "train.log: the log is empty (0 bytes)"
    no_settings = load(tmp_path, "Step 20/60 | Loss (avg over last 20): 1.0\n")
    assert "no configuration block" in no_settings["problems"][0]
    nan = load(tmp_path, log_text(final=(0.5, 0.5, math.nan)).replace("4.0000", "nan"))["problems"]
    assert any("bridged accuracy at step final is nan" in problem for problem in nan)
    assert any("a loss is not a number" in problem for problem in nan)
    twice = load(tmp_path, log_text(final=(0, 0, 0)) * 2)["problems"]
    assert any("steps go backwards" in problem for problem in twice)
    assert "no final evaluation, last at step 60 of 60" in load(tmp_path, log_text())["problems"][0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3000))
def test_no_damage_stops_the_log_reader(tmp_path, noise, cut):
    text = log_text(evaluations=EVALUATIONS, final=(0.5, 0.5, 0.5), crash=OOM).encode()
    facts = load(tmp_path, text[: len(text) - cut] + noise + text[:cut] + noise)
    assert isinstance(facts["problems"], list) and set(facts["losses"]) >= {"step", "loss"}


@pytest.mark.parametrize(("text", "expected"), [
    ("End time: Sun Nov 16 22:08:44 PST 2025", "2025-11-16T22:08:44"),
    ("End time: Tue Nov 18 09:22:03 PM PST 2025", "2025-11-18T21:22:03"),
    ("End time: Tue Nov 99 09:22:03 PM PST 2025", None),
    ("\x00", None),
])  # fmt: skip
def test_end_times_of_both_clocks(tmp_path, text, expected):
    (tmp_path / "summary.log").write_text(text)
    assert load_end(tmp_path / "summary.log") == expected


# -- answers --------------------------------------------------------------------------------------------------


def test_order_does_not_matter_and_the_first_of_two_is_kept(tmp_path):
    rows = evaluation([0, 1, 2])
    straight = load_outcomes(write_jsonl(tmp_path / "a.jsonl", rows), [], "final")
    assert list(straight) == ["step", "index", "gold", "source_pred", "target_pred", "bridged_pred"]
    assert straight.astype(str).iloc[3].tolist() == ["final", "3", "103", "103", "103", "7"]
    turned = load_outcomes(write_jsonl(tmp_path / "b.jsonl", rows[::-1] + rows[:2]), problems := [], "final")
    assert turned.equals(straight)
    assert problems == ["b.jsonl: index given twice, the first is kept (line 9, 10; 2 in all)"]


def test_compressed_and_plain_are_read_alike(tmp_path):
    plain = write_jsonl(tmp_path / "eval_samples_step_final.jsonl", evaluation([3]))
    packed = tmp_path / "eval_samples_step_final.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert load_outcomes(packed, [], "final").equals(load_outcomes(plain, [], "final"))
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
def test_a_damaged_line_is_named_and_the_others_are_used(tmp_path, change, message):
    rows = evaluation([0, 1])
    change(rows[4])
    frame = load_outcomes(write_jsonl(tmp_path / "e.jsonl", rows), problems := [], "final")
    assert len(frame) == 7 and problems == [f"e.jsonl: {message} (line 5; 1 in all)"]


@pytest.mark.parametrize(("content", "message"), [
    (b"", "the file is empty (0 bytes)"),
    (b"\x00\xff\xfe" * 50, "cut off or binary"),
    (b'{"index": 1}\n{"a": 2}\n', "no '<condition>_extracted' key"),
    (b"[1, 2]\n3\n", "not a whole JSON object"),
])  # fmt: skip
def test_files_that_are_no_evaluation(tmp_path, content, message):
    path = tmp_path / "eval_samples_step_0.jsonl"
    path.write_bytes(content)
    assert load_outcomes(path, problems := [], "0").empty
    assert any(message in problem for problem in problems), problems


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=40), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["index", "gold_extracted", "source_extracted", "eval_step"]), inner, max_size=4),
    max_leaves=6).map(lambda v: json.dumps(v).encode()))))  # fmt: skip
def test_no_content_stops_the_answers_reader(tmp_path, lines):
    path = tmp_path / "eval_samples_step_0.jsonl"
    path.write_bytes(b"\n".join(lines))
    frame = load_outcomes(path, problems := [], "0")
    assert len(frame) == 0 or frame["index"].is_unique
    assert len(frame) or problems


def test_rescoring_counts_the_labels_that_move(tmp_path):
    rows = evaluation([0, 1])
    rows[2]["bridged_full"], rows[2]["bridged_extracted"] = "#### 102.00", "102.00"
    texts = load_texts(write_jsonl(tmp_path / "e.jsonl", rows), "final")
    table = count_rescored(texts).set_index(["condition", "rule"])
    stored = table.loc[("bridged", "seeds")]
    assert (stored.n, stored.moved, stored.right) == (8, 0, 2)
    strict = table.loc[("bridged", "marker_last")]
    assert (strict.moved, strict.right, strict.to_right, strict.to_wrong) == (1, 3, 1, 0)
    assert table.loc[("source", "lm_eval_flexible")].to_wrong == 4  # it takes the invented question's answer


def test_repeated_and_invented_questions_are_counted(tmp_path):
    rows = evaluation([0, 1])
    rows[0]["bridged_full"] = "Q: What is number 0 of the list of questions?\nA: one\n#### 100"
    facts = count_repeats(load_texts(write_jsonl(tmp_path / "e.jsonl", rows), "final")).set_index("condition")
    assert facts["repeats_question"].to_dict() == {"bridged": 1, "source": 0, "target": 0}
    assert facts["invents_question"].to_dict() == {"bridged": 7, "source": 8, "target": 8}
