"""Preserving a run: everything needed is kept, nothing is overwritten, a kill leaves no half-kept run."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
from first_generation import OOM, evaluation, write_run
from test_runfolders import BRIDGED, write_own

from bridgekit.audit.runfolders import find_runs, read_run
from bridgekit.results import manifest, preserve
from bridgekit.results.preserve import changed_files

NAME = "phase1_full_20251116_201212"


@pytest.fixture
def root(tmp_path):
    return tmp_path / "preserved_data"


def test_the_kept_tables_say_what_the_raw_run_says(tmp_path, root):
    run = write_run(tmp_path, NAME, BRIDGED)
    kept = preserve.preserve(run, root, max_jsonl_mb=0)
    assert kept == root / "first_experiments" / NAME
    raw, again = read_run(run), read_run(kept)
    assert again.generation == "derived" and again.name == raw.name
    assert again.outcomes.astype(str).equals(raw.outcomes.astype(str))
    assert again.curve.equals(raw.curve) and again.losses.equals(raw.losses) and again.logged.equals(raw.logged)
    assert again.config == raw.config
    for key in ("world_size", "parameters_m", "gpu", "started", "ended", "saved_best"):
        assert again.facts[key] == raw.facts[key], key
    assert again.problems == [] and changed_files(kept) == []
    assert not list(kept.glob("*.jsonl.gz"))


def test_full_answers_are_kept_below_the_limit(tmp_path, root):
    kept = preserve.preserve(write_run(tmp_path, NAME, BRIDGED), root)
    assert (kept / "eval_samples_step_final.jsonl.gz").is_file()
    assert read_run(kept).steps() == ["0", "20", "40", "60", "final"]
    texts = pd.read_csv(kept / "texts.csv")
    assert len(texts) == 15 and (texts.invents_question == 8).all()


def test_a_run_of_this_package_is_kept_as_it_is(tmp_path, root):
    run = write_own(tmp_path / "resampler_20261120_101500")
    (run / "metrics_constant.jsonl").write_text('{"step": 10, "loss": 3.0}\n')
    (run / "checkpoint").mkdir()
    weights = {"a": np.linspace(0, 1, 500, dtype=np.float32), "steps": np.arange(3)}
    whole = safetensors.numpy.save(weights, {"step": "10"})
    (run / "checkpoint" / "bridged.safetensors").write_bytes(whole)
    (run / "checkpoint" / "constant.safetensors").write_bytes(whole)
    (run / "checkpoint" / "self_bridge.safetensors").write_bytes(whole)
    (run / "checkpoint" / "optimizer.pt").write_bytes(b"x")
    kept = preserve.preserve(run, root)
    names = sorted(p.relative_to(kept).as_posix() for p in kept.rglob("*") if p.is_file())
    assert names == [
        "checkpoint/bridged.safetensors",
        "checkpoint/constant.safetensors",
        "checksums.json",
        "config.yaml",
        "eval_samples_step_final.jsonl.gz",
        "manifest.md",
        "metrics.jsonl",
        "metrics_constant.jsonl",
        "provenance.json",
    ]
    halved = safetensors.numpy.load((kept / "checkpoint" / "bridged.safetensors").read_bytes())
    assert halved["a"].dtype == np.float16 and np.abs(halved["a"] - weights["a"]).max() < 1e-3
    assert np.array_equal(halved["steps"], weights["steps"])
    assert read_run(kept).outcomes.astype(str).equals(read_run(run).outcomes.astype(str))
    assert "`bridgekit run`" in (kept / "manifest.md").read_text()
    other = preserve.preserve(run, root, name="small_20261120_101500", max_jsonl_mb=0)
    assert (other / "outcomes.csv.gz").is_file() and read_run(other).generation == "bridgekit"
    assert read_run(other).outcomes.astype(str).equals(read_run(run).outcomes.astype(str))
    light = preserve.preserve(run, root, name="light_20261120_101500", max_checkpoint_mb=0.0005)
    assert not (light / "checkpoint").exists()


def test_a_run_without_any_evaluation_is_kept_with_its_losses(tmp_path, root):
    run = write_run(tmp_path, NAME, {}, crash=OOM)
    log = run / "phase1_all_fix" / "train.log"
    log.write_text(log.read_text() + "[Eval] Step 250 | Target-alone acc: 0.730 | Bridged acc: 0.470\n")
    kept = preserve.preserve(run, root)
    assert find_runs(root) == [kept]
    assert read_run(kept).losses.equals(read_run(run).losses)
    assert "crash: out of memory after step 60, cross_attention.py:1771 in main" in (kept / "manifest.md").read_text()
    assert "(step 250): target 0.730, bridged 0.470" in (kept / "manifest.md").read_text()
    assert manifest.write_manifest(root).is_file()


def test_the_same_run_gives_the_same_bytes(tmp_path, root):
    run = write_run(tmp_path, NAME, BRIDGED)
    one, two = preserve.preserve(run, root), preserve.preserve(run, tmp_path / "again")
    assert (one / "checksums.json").read_bytes() == (two / "checksums.json").read_bytes()


def test_nothing_kept_is_overwritten(tmp_path, root, capsys):
    run = write_run(tmp_path, NAME, BRIDGED)
    kept = preserve.preserve(run, root)
    before = {p: p.read_bytes() for p in kept.iterdir()}
    with pytest.raises(ValueError, match="already kept; what is preserved is never overwritten"):
        preserve.preserve(run, root)
    assert preserve.main([str(run), "--root", str(root)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert {p: p.read_bytes() for p in kept.iterdir()} == before


def test_a_kill_in_the_middle_leaves_nothing_that_looks_kept(tmp_path, root):
    run = write_run(tmp_path, NAME, BRIDGED)
    program = (
        "import os, signal, sys; from bridgekit.results import manifest, preserve;"
        "manifest.write_entry = lambda *a: os.kill(os.getpid(), signal.SIGKILL);"
        "preserve.preserve(sys.argv[1], sys.argv[2])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run), str(root)], env=os.environ)
    assert done.returncode == -signal.SIGKILL
    assert find_runs(root) == []
    kept = preserve.preserve(run, root)
    assert find_runs(root) == [kept]
    assert [p.name for p in kept.parent.iterdir()] == [NAME]


def test_quotes_in_a_folder_name_do_not_come_along(tmp_path, root):
    run = write_run(tmp_path, 'phase2_swap_"20251118_192955"', BRIDGED)
    assert preserve.preserve(run, root).name == "phase2_swap_20251118_192955"


def test_one_bad_run_does_not_stop_the_others(tmp_path, root, capsys):
    write_run(tmp_path / "runs", NAME, BRIDGED)
    bad = tmp_path / "runs" / "empty_20251116_000000"
    bad.mkdir()
    (bad / "train.log").write_bytes(b"")
    assert preserve.main([str(tmp_path / "runs"), "--root", str(root)]) == 2
    out = capsys.readouterr()
    assert "neither evaluations nor losses" in out.err and f"kept {root / 'first_experiments' / NAME}" in out.out
    assert (root / "README.md").is_file()


def test_prose_survives_and_generated_parts_follow_the_data(tmp_path, root):
    kept = preserve.preserve(write_run(tmp_path, NAME, BRIDGED), root)
    entry = kept / "manifest.md"
    assert entry.read_text().count(manifest.UNWRITTEN) == 2
    for part in ("Why it was run.", "Command.", "Key metrics.", "Publishability.", "Artifacts."):
        assert f"**{part}**" in entry.read_text()
    prose = entry.read_text().replace(manifest.UNWRITTEN, "Written by hand, with | and <tags>.", 1)
    entry.write_text(prose.replace("| bridged | 3/8", "| bridged | 8/8"))
    manifest.write_manifest(root)
    assert "Written by hand, with | and <tags>." in entry.read_text() and "| bridged | 3/8" in entry.read_text()
    readme = root / "README.md"
    readme.write_text("A hand-written opening.\n" + readme.read_text())
    first = manifest.write_manifest(root, {"findings": "found: nothing"}).read_text()
    assert first.startswith("A hand-written opening.") and "found: nothing" in first and "| bridged | 3/8" in first
    assert manifest.write_manifest(root).read_text() == first


def test_the_entry_states_gains_harms_and_intervals(tmp_path, root):
    text = (preserve.preserve(write_run(tmp_path, NAME, BRIDGED), root) / "manifest.md").read_text()
    assert "| bridged | 3/8 | 0.375 | 0.137 to 0.694 |" in text  # Wilson, 3 of 8
    assert "0 gained, 3 lost, difference -0.375 (" in text and "McNemar p = 0.25)" in text
    assert "highest of 4 numbered evaluations: 0.500 at step 40" in text
    assert "60 steps; 60.9M trained parameters; 4 × NVIDIA H100 80GB HBM3" in text


def test_intervals_of_this_packages_runs_are_over_units(tmp_path, root):
    rows = evaluation([0, 1, 2, 3], n=8)
    for i, row in enumerate(rows):
        row["unit"] = f"u{i // 4}"  # right on all of one unit, on none of the other
    kept = preserve.preserve(write_own(tmp_path / "resampler_20261120_101500", rows), root)
    text = (kept / "manifest.md").read_text()
    low, high = re.search(r"bridged \| 4/8 \| 0.500 \| ([\d.]+) to ([\d.]+)", text).groups()
    assert float(high) - float(low) > 0.9 and "over 2 units)" in text


def test_a_changed_file_is_noticed(tmp_path, root):
    kept = preserve.preserve(write_run(tmp_path, NAME, BRIDGED), root)
    (kept / "curve.csv").write_text("step\n")
    (kept / "losses.csv").unlink()
    assert changed_files(kept) == ["curve.csv", "losses.csv"]
    sums = json.loads((kept / "checksums.json").read_text())
    assert "train.log" in sums["original"] and "outcomes.csv.gz" in sums["kept"]
