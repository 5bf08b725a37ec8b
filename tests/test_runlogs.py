"""The log reader: every fact is found whatever surrounds it, and no file stops it."""

import math

from first_generation import OOM, SETTINGS, log_text
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridgekit.audit import runlogs
from bridgekit.audit.runlogs import read_log, read_summary

EVALUATIONS = {"20": (0.54, 0.77, 0.5), "40": (0.54, 0.77, 0.68), "60": (0.54, 0.77, 0.64)}


def read(tmp_path, text):
    path = tmp_path / "train.log"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path)


def test_a_whole_log(tmp_path):
    facts = read(tmp_path, log_text(evaluations=EVALUATIONS, best=0.68, final=(0.54, 0.77, 0.645)))
    assert facts.settings == {key: str(value) for key, value in SETTINGS.items()}
    assert (facts.world_size, facts.parameters_m, facts.gpu) == (4, 60.9, "NVIDIA H100 80GB HBM3")
    assert list(facts.steps) == [20, 40, 60] and list(facts.losses) == [4.0, 3.0, 2.0]
    assert facts.components == {"dit_flow": {20: 0.02, 40: 0.04, 60: 0.06}}
    assert facts.evaluations["40"] == {"source": 0.54, "target": 0.77, "bridged": 0.68}
    assert facts.evaluations["final"]["bridged"] == 0.645
    assert facts.saved_best == 0.68 and facts.best_steps[1] == ("40", 0.68)
    assert facts.crashes == [] and facts.problems == []


def test_the_crash_names_where_and_how_much_was_in_use(tmp_path):
    launcher = 'Traceback (most recent call last):\n  File "/bin/torchrun", line 8, in <module>\n    main()\n'
    launcher += "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n"
    facts = read(tmp_path, log_text(steps=40, crash=OOM + OOM.replace("rank0", "rank1") + launcher))
    assert len(facts.crashes) == 1  # four processes print one crash
    crash = facts.crashes[0]
    assert (crash["kind"], crash["step"], crash["rank"]) == ("out of memory", 40, 0)
    assert crash["where"] == "cross_attention.py:1771 in main"
    assert crash["code"] == "decode_out = tgt_model(**decode_data)"
    assert (crash["asked_gib"], crash["in_use_gib"], crash["total_gib"]) == (2.09, 77.59, 79.11)
    assert "crashed (out of memory), last at step 40 of 60" in facts.problems[-1]


def test_the_crash_is_placed_in_the_innermost_line_of_the_project(tmp_path):
    inner = 'main\n[rank0]:     step(batch)\n[rank0]:   File "/data/run/losses.py", line 7, in step'
    crash = read(tmp_path, log_text(crash=OOM.replace("main\n", inner + "\n", 1))).crashes[0]
    assert crash["where"] == "losses.py:7 in step"
    small = read(tmp_path, log_text(crash="CUDA out of memory. Tried to allocate 512.00 MiB\n")).crashes[0]
    assert small["asked_gib"] == 0.5


def test_a_crash_that_is_no_lack_of_memory(tmp_path):
    text = "Traceback (most recent call last):\n  File \"a.py\", line 3, in main\n    f()\nKeyError: 'x'\n"
    assert read(tmp_path, log_text(crash=text)).crashes[0]["kind"] == "KeyError"
    assert (
        read(tmp_path, log_text(crash="Traceback (most recent call last):\n  Fi")).crashes[0]["kind"]
        == "traceback cut off"
    )
    assert read(tmp_path, log_text(crash="slurmstepd: error: Detected 1 oom_kill event\n")).crashes[0]["step"] == 60


def test_older_logs_without_source_accuracy_and_without_world_size(tmp_path):
    text = "==== Config ====\nlr: 0.1\nLoading source\n"
    text += "[Eval] Step 250 | Target-alone acc: 0.730 | Bridged acc: 0.470\n"
    facts = read(tmp_path, text + "[Distributed Eval] Sharding 200 samples across 2 ranks:\n")
    assert facts.evaluations == {"250": {"target": 0.73, "bridged": 0.47}}
    assert facts.settings == {"lr": "0.1"} and facts.world_size == 2


def test_reading_in_small_blocks_changes_nothing(tmp_path, monkeypatch):
    text = log_text(evaluations=EVALUATIONS, best=0.68, final=(0.54, 0.77, 0.645), crash=OOM)
    whole = read(tmp_path, text)
    for size in (64, 300, 1000):
        monkeypatch.setattr(runlogs, "BLOCK", size)
        assert vars(read(tmp_path, text)) == vars(whole)


def test_carriage_returns_as_line_ends(tmp_path):
    text = log_text(evaluations=EVALUATIONS, final=(0.5, 0.5, 0.5))
    for end in ("\r", "\r\n"):
        facts = read(tmp_path, text.replace("\n", end))
        assert len(facts.settings) == len(SETTINGS) and len(facts.evaluations) == 4


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    assert read(tmp_path, b"").problems == ["train.log: the log is empty (0 bytes)"]
    assert "no configuration block" in read(tmp_path, "Step 20/60 | Loss (avg over last 20): 1.0\n").problems[0]
    nan = read(tmp_path, log_text(final=(0.5, 0.5, math.nan)).replace("4.0000", "nan"))
    assert any("bridged accuracy at step final is nan" in p for p in nan.problems)
    assert any("a loss is not a number" in p for p in nan.problems)
    twice = read(tmp_path, log_text(final=(0, 0, 0)) * 2)
    assert any("steps go backwards" in p for p in twice.problems)
    assert "no final evaluation, last at step 60 of 60" in read(tmp_path, log_text()).problems[0]


def test_a_line_longer_than_any_block(tmp_path, monkeypatch):
    monkeypatch.setattr(runlogs, "LONGEST_LINE", 10_000)
    monkeypatch.setattr(runlogs, "BLOCK", 4_000)
    facts = read(tmp_path, b"x" * 50_000 + b"\n" + log_text(final=(0.5, 0.5, 0.5)).encode())
    assert len(facts.steps) == 3 and facts.evaluations["final"]["bridged"] == 0.5


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3000), st.integers(1, 500))
def test_no_damage_stops_the_reader(tmp_path, noise, cut, block):
    text = log_text(evaluations=EVALUATIONS, final=(0.5, 0.5, 0.5), crash=OOM).encode()
    keep, runlogs.BLOCK = runlogs.BLOCK, block
    try:
        facts = read(tmp_path, text[: len(text) - cut] + noise + text[:cut] + noise)
    finally:
        runlogs.BLOCK = keep
    assert isinstance(facts.problems, list) and len(facts.steps) == len(facts.losses)


def test_end_times_of_both_clocks(tmp_path):
    path = tmp_path / "summary.log"
    for text, expected in (
        ("End time: Sun Nov 16 22:08:44 PST 2025", "2025-11-16T22:08:44"),
        ("End time: Tue Nov 18 09:22:03 PM PST 2025", "2025-11-18T21:22:03"),
        ("End time: Tue Nov 99 09:22:03 PM PST 2025", None),
        ("\x00", None),
    ):
        path.write_text(text)
        assert read_summary(path) == expected
