"""Preserving a run: everything needed is kept, nothing is overwritten, a kill leaves no half-kept run.

python -m pytest tests/audit/test_keep.py
"""

import json
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from first_generation import BRIDGED, OOM, evaluation, write_jsonl, write_own, write_run

from bridgekit.audit import keep
from bridgekit.audit.first_runs import load_run
from bridgekit.audit.keep import keep_run, write_manifest
from bridgekit.results.preserve import changed_files, find_runs, keep_study
from bridgekit.results.reports import UNWRITTEN
from bridgekit.runs import find_eval, load_eval

NAME, OWN = "phase1_full_20251116_201212", "resampler_20261120_101500"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "preserved_data"


def test_the_kept_tables_hold_what_the_raw_run_holds(tmp_path, root):
    run = write_run(tmp_path, NAME, BRIDGED)
    kept = keep_run(run, root, max_jsonl_mb=0)
    raw, again = load_run(run), load_run(kept)
    assert kept == root / "first_experiments" / NAME
    assert again.generation == "derived" and again.name == raw.name and again.config == raw.config
    for table in ("outcomes", "curve", "losses", "logged"):
        assert getattr(again, table).astype(str).equals(getattr(raw, table).astype(str)), table
    for key in ("world_size", "parameters_m", "gpu", "started", "ended", "saved_best"):
        assert again.facts[key] == raw.facts[key], key
    assert again.problems == [] and changed_files(kept) == [] and not list(kept.glob("*.jsonl.gz"))
    texts = pd.read_csv(kept / "texts.csv")
    assert len(texts) == 15 and (texts.invents_question == 8).all()
    whole = keep_run(run, tmp_path / "whole")
    assert (whole / "eval_samples_step_final.jsonl.gz").read_bytes()[4:8] == bytes(4)  # no time stamp
    twice = keep_run(run, tmp_path / "twice")
    assert (whole / "checksums.json").read_bytes() == (twice / "checksums.json").read_bytes()
    sums = json.loads((kept / "checksums.json").read_text())
    assert "train.log" in sums["original"] and "outcomes.csv.gz" in sums["kept"]
    (kept / "curve.csv").write_text("step\n")
    (kept / "losses.csv").unlink()
    assert changed_files(kept) == ["curve.csv", "losses.csv"]


def test_full_texts_are_scored_again_and_their_questions_counted(tmp_path, root):
    rows = evaluation([0, 1])
    rows[0]["bridged_full"] = "Q: What is number 0 of the list of questions?\nA: one\n#### 100"
    rows[2]["bridged_full"], rows[2]["bridged_extracted"] = "#### 102.00", "102.00"
    run = write_run(tmp_path, NAME, {"final": [0, 1]})
    write_jsonl(run / "phase1_all_fix" / "eval_samples_step_final.jsonl", rows)
    kept = keep_run(run, root)
    table = pd.read_csv(kept / "rescored.csv").set_index(["condition", "rule"])
    assert table.loc[("bridged", "seeds"), ["n", "moved", "right"]].tolist() == [8, 0, 2]
    strict = table.loc[("bridged", "marker_last")]
    assert (strict.moved, strict.right, strict.to_right, strict.to_wrong) == (1, 3, 1, 0)
    assert table.loc[("source", "lm_eval_flexible")].to_wrong == 4  # it takes the invented question's answer
    texts = pd.read_csv(kept / "texts.csv").set_index("condition")
    assert texts["repeats_question"].to_dict() == {"bridged": 1, "source": 0, "target": 0}
    assert texts["invents_question"].to_dict() == {"bridged": 6, "source": 8, "target": 8}


def test_a_run_of_this_package_is_kept_as_it_is(tmp_path, root):
    run = write_own(tmp_path / OWN)
    (run / "metrics_constant.jsonl").write_text('{"step": 10, "loss": 3.0}\n')
    (run / "controls.json").write_text('{"constant": {"mix": 600, "last": 1200}}')
    (run / "code").mkdir()
    (run / "code" / "my_bridge.py").write_text("# a user's own\n")
    (run / "checkpoint").mkdir()
    weights = {"a": np.linspace(0, 1, 500, dtype=np.float32), "steps": np.arange(3)}
    for name in ("bridged", "constant", "self_bridge"):
        (run / "checkpoint" / f"{name}.safetensors").write_bytes(safetensors.numpy.save(weights, {"step": "10"}))
    kept = keep_run(run, root)
    assert sorted(p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file()) == [
        "checkpoint/bridged.safetensors", "checkpoint/constant.safetensors", "checksums.json", "code/my_bridge.py",
        "config.yaml", "controls.json", "eval_samples_step_final.jsonl.gz", "manifest.md", "metrics.jsonl",
        "metrics_constant.jsonl", "provenance.json",
    ]  # fmt: skip
    halved = safetensors.numpy.load((kept / "checkpoint" / "bridged.safetensors").read_bytes())
    assert halved["a"].dtype == np.float16 and np.abs(halved["a"] - weights["a"]).max() < 1e-3
    assert np.array_equal(halved["steps"], weights["steps"])
    assert load_eval(find_eval(kept)).equals(load_eval(find_eval(run)))
    entry = (kept / "manifest.md").read_text()
    assert "`bridgekit run`" in entry and "`constant`: step 600 by mix, step 1200 by last" in entry
    light = keep_run(run, root, name="light_20261120_101500", max_jsonl_mb=0, max_checkpoint_mb=0.0005)
    lean = load_eval(find_eval(light))
    assert lean["bridged_correct"].equals(load_eval(find_eval(run))["bridged_correct"])
    assert "bridged_full" in lean and "source_full" not in lean and not (light / "checkpoint").exists()


def test_a_run_without_any_evaluation_or_without_a_log_is_kept_with_the_rest(tmp_path, root):
    unlogged = write_run(tmp_path / "unlogged", NAME, BRIDGED)
    (unlogged / "phase1_all_fix" / "train.log").unlink()
    kept = load_run(keep_run(unlogged, tmp_path / "other"))
    assert kept.outcomes.equals(load_run(unlogged).outcomes) and "not there" in kept.problems[0]
    run = write_run(tmp_path, NAME, {}, crash=OOM)
    log = run / "phase1_all_fix" / "train.log"
    log.write_text(log.read_text() + "[Eval] Step 250 | Target-alone acc: 0.730 | Bridged acc: 0.470\n")
    kept = keep_run(run, root)
    assert find_runs(root) == [kept] and load_run(kept).losses.equals(load_run(run).losses)
    entry = (kept / "manifest.md").read_text()
    assert "crash: out of memory after step 60, cross_attention.py:1771 in main" in entry
    assert "(step 250): target 0.730, bridged 0.470" in entry


def test_nothing_kept_is_overwritten_and_one_bad_run_does_not_stop_the_others(tmp_path, root, capsys):
    run = write_run(tmp_path, NAME, BRIDGED)
    kept = keep_run(run, root)
    before = {p: p.read_bytes() for p in kept.iterdir()}
    with pytest.raises(ValueError, match="already kept; what is preserved is never overwritten"):
        keep_run(run, root)
    write_run(tmp_path / "runs", 'swap_"20251118_192955"', BRIDGED)
    bad = tmp_path / "runs" / "empty_20251116_000000"
    bad.mkdir()
    (bad / "train.log").write_bytes(b"")
    assert keep.main([str(run), str(tmp_path / "runs"), "--root", str(root)]) == 2
    out = capsys.readouterr()
    assert "never overwritten" in out.err and "neither evaluations nor losses" in out.err and out.err.count("\n") == 2
    assert f"kept {root / 'first_experiments' / 'swap_20251118_192955'}" in out.out  # quotes do not come along
    assert {p: p.read_bytes() for p in kept.iterdir()} == before


def test_a_kill_in_the_middle_leaves_nothing_that_looks_kept(tmp_path, root):
    run = write_run(tmp_path, NAME, BRIDGED)
    program = (
        "import os, signal, sys; from bridgekit.audit import keep; from bridgekit.results import preserve;"
        "preserve.write_entry = lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        "keep.keep_run(sys.argv[1], sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run), str(root)])
    assert done.returncode == -signal.SIGKILL and find_runs(root) == []
    kept = keep_run(run, root)
    assert find_runs(root) == [kept] and [p.name for p in kept.parent.iterdir()] == [NAME]


def test_prose_survives_and_generated_parts_follow_the_data(tmp_path, root):
    entry = keep_run(write_run(tmp_path, NAME, BRIDGED), root) / "manifest.md"
    assert entry.read_text().count(UNWRITTEN) == 2
    prose = entry.read_text().replace(UNWRITTEN, "Written by hand, with | and <tags>.", 1)
    entry.write_text(prose.replace("| bridged | 3/8", "| bridged | 8/8"))
    for seed in (1, 2, 3):
        own = keep_run(write_own(tmp_path / f"headline_dit_seed{seed}"), root) / "manifest.md"
        own.write_text(own.read_text().replace(UNWRITTEN, "For the headline.", 1))
    write_manifest(root)
    assert "Written by hand, with | and <tags>." in entry.read_text() and "| bridged | 3/8" in entry.read_text()
    readme = root / "README.md"
    readme.write_text("A hand-written opening.\n" + readme.read_text())
    text = write_manifest(root, {"findings": "found: nothing"}).read_text()
    assert text.startswith("A hand-written opening.") and "found: nothing" in text and UNWRITTEN not in text
    assert f"[`{NAME}`](first_experiments/{NAME}/manifest.md) | 0.500 | 0.750 | 0.375 |" in text
    assert text.count("For the headline.") == 1 and text.count("manifest.md)") == 4
    contents = text.split("<!-- generated: contents -->")[1].split("<!-- end: contents -->")[0]
    assert "- [What the audit finds](#what-the-audit-finds)" in contents and "(#headline_dit)" in contents
    assert write_manifest(root).read_text() == text


def test_the_entry_states_gains_harms_and_intervals(tmp_path, root):
    text = (keep_run(write_run(tmp_path, NAME, BRIDGED), root) / "manifest.md").read_text()
    assert "| bridged | 3/8 | 0.375 | 0.137 to 0.694 |" in text  # Wilson, 3 of 8
    assert "0 gained, 3 lost, difference -0.375 (" in text and "McNemar p = 0.25)" in text
    assert "highest of 4 numbered evaluations: 0.500 at step 40" in text
    assert "60 steps; 60.9M trained parameters; 4 × NVIDIA H100 80GB HBM3" in text
    rows = evaluation([0, 1, 2, 3], n=8)
    for i, row in enumerate(rows):  # right on all of one unit, on none of the other
        row |= {"unit": f"u{i // 4}", "group": "source_only" if i % 2 else "both", "novelty": "held_unit"}
    text = (keep_run(write_own(tmp_path / OWN, rows), root) / "manifest.md").read_text()
    assert "over 2 units)" in text and "| union | 6/8 | 0.750" in text
    assert "| bridged, source-only problems | 2/4 | 0.500" in text


@pytest.mark.parametrize("name", ["../escape", "/tmp/escape", ".hidden", "a/b", ".."])
def test_a_name_stays_in_its_folder(tmp_path, root, name):
    for run in (write_run(tmp_path, NAME, BRIDGED), write_own(tmp_path / OWN)):
        with pytest.raises(ValueError, match="--name: .* is no folder's name"):
            keep_run(run, root, name)
    with pytest.raises(ValueError, match="--study: .* is no folder's name"):
        keep_study(tmp_path, name, root)
    assert not root.exists() or not list(root.rglob("*escape*"))


def test_a_kept_run_is_copied_as_it_is_and_a_changed_one_is_refused(tmp_path, root):
    kept = keep_run(write_run(tmp_path, NAME, BRIDGED), root, max_jsonl_mb=0)
    again = keep_run(kept, tmp_path / "again")
    for path in kept.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes() or path.name == "manifest.md", path
    assert changed_files(again) == []
    (kept / "losses.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ValueError, match="losses.csv changed since this run was preserved"):
        keep_run(kept, tmp_path / "third")


def test_a_damaged_kept_run_is_named_and_blocks_no_other(tmp_path, root, capsys):
    first = keep_run(write_run(tmp_path, NAME, BRIDGED), root)
    own = keep_run(write_own(tmp_path / OWN), root)
    (first / "run.json").write_text('{"star')
    (own / "provenance.json").write_text("")
    other = write_run(tmp_path, "swap_20251118_192955", BRIDGED)
    assert keep.main([str(other), "--root", str(root)]) == 0
    said = capsys.readouterr()
    assert str(first / "run.json") in said.err and str(own / "provenance.json") in said.err
    assert (root / "first_experiments" / other.name / "manifest.md").is_file() and other.name in (
        root / "README.md"
    ).read_text()


def test_settings_that_look_like_yaml_and_words_that_look_like_markers_are_kept(tmp_path, root):
    odd = {"stop": "Answer: x", "open": "{foo", "star": "*anchor", "list": "[1,2"}
    run = write_run(tmp_path, NAME, BRIDGED, settings=odd)
    kept = keep_run(run, root)
    assert load_run(kept).config == load_run(run).config
    entry = kept / "manifest.md"
    entry.write_text(entry.read_text().replace(UNWRITTEN, "See <!-- end: runs --> here.", 1))
    before = write_manifest(root).read_text()
    assert write_manifest(root).read_text() == before
