"""A study in one file: every number of its runs comes out of it as it went in.

python -m pytest tests/test_studies.py
"""

import json
import shutil
from pathlib import Path

import pytest

from bridgekit.config import load_config
from bridgekit.results import verdict
from bridgekit.results.capacity import said_values
from bridgekit.results.preserve import main
from bridgekit.runs import create_run, find_eval, load_eval, read_run_config, write_jsonl, write_status
from bridgekit.studies import keep_study, open_study
from bridgekit.tasks.units import FAMILIES

ONE_STEP = next(f.name for f in FAMILIES if f.steps[0].endswith("*v"))


@pytest.fixture
def runs(tmp_path) -> Path:
    """Two finished runs of the study `s` and one that is not, with answers that differ."""
    for seed in (1, 2, 3):
        folder = tmp_path / "runs" / f"s_base_seed{seed}"
        create_run(load_config(seed=seed, variant="context" if seed == 2 else "weights"), folder)
        rows = [
            {
                "eval_step": "final", "index": i, "question": "Q" * 50, "id": f"u-{i}", "unit": f"w{i % 7}",
                "group": "source_only", "novelty": "held_unit", "gold_extracted": str(i), "source_extracted": str(i),
                "source_full": "text", "target_extracted": "0", "target_full": "text",
                "bridged_extracted": str(i if i % (seed + 1) else 0), "family": ONE_STEP,
                "bridged_full": f"<<1*{i}={i}>>",
            }
            for i in range(40)
        ]  # fmt: skip
        write_jsonl(folder / "eval_samples_step_final.jsonl", rows)
        write_status(folder, state="finished" if seed < 3 else "running")
    return tmp_path / "runs"


def test_every_number_survives_and_texts_stay_out(runs, tmp_path):
    path = keep_study(runs, "s", tmp_path / "kept")
    folder = open_study("s", tmp_path / "kept", tmp_path / "open")
    assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == ["s_base_seed1", "s_base_seed2"]
    for name in ("s_base_seed1", "s_base_seed2"):
        before, after = (load_eval(find_eval(root / name)) for root in (runs, folder))
        assert verdict.conditions_table(before).equals(verdict.conditions_table(after))
        assert read_run_config(folder / name) == read_run_config(runs / name)
        assert "question" not in after and "source_full" not in after
        assert "bridged_full" not in after
        assert said_values(after) == said_values(before) == [*range(40)]
    assert path.read_bytes() == keep_study(runs, "s", tmp_path / "again").read_bytes()
    assert path.read_bytes() == keep_study(folder, "s", tmp_path / "packed before").read_bytes()


def test_it_is_unpacked_once_and_again_when_the_file_is_another(runs, tmp_path):
    keep_study(runs, "s", tmp_path / "kept")
    folder = open_study("s", tmp_path / "kept", tmp_path / "open")
    mark = folder / "s_base_seed1" / "status.json"
    mark.write_text(json.dumps({"state": "finished", "mine": True}))
    assert "mine" in (open_study("s", tmp_path / "kept", tmp_path / "open") / "s_base_seed1/status.json").read_text()
    (tmp_path / "kept" / "s.tar.xz").unlink()
    write_status(runs / "s_base_seed3", state="finished")
    keep_study(runs, "s", tmp_path / "kept")
    again = open_study("s", tmp_path / "kept", tmp_path / "open")
    assert (again / "s_base_seed3").is_dir() and "mine" not in (again / "s_base_seed1/status.json").read_text()
    assert [p.name for p in (tmp_path / "open").iterdir()] == ["s"]  # nothing half-unpacked is left


def test_what_is_kept_is_not_overwritten_and_what_is_not_there_is_named(runs, tmp_path, capsys):
    assert main(["--study", "s", "--runs-dir", str(runs), "--root", str(tmp_path / "p")]) == 0
    assert main(["--study", "s", "--runs-dir", str(runs), "--root", str(tmp_path / "p")]) == 2
    assert "never overwritten" in capsys.readouterr().err
    assert main(["--study", "other", "--runs-dir", str(runs), "--root", str(tmp_path / "p")]) == 2
    assert "no finished run of a study 'other'" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError, match="other.tar.xz"):
        open_study("other", tmp_path / "p")


def test_runs_that_came_later_are_added_and_those_kept_stay_as_they_are(runs, tmp_path):
    early, late, kept = tmp_path / "early", tmp_path / "late", tmp_path / "kept"
    for folder, names in ((early, ["s_base_seed2"]), (late, ["s_base_seed1", "s_base_seed2"])):
        for name in names:
            shutil.copytree(runs / name, folder / name)
    keep_study(early, "s", kept)
    with pytest.raises(ValueError, match="no finished run of a study 's' that is not kept already"):
        keep_study(early, "s", kept, add=True)
    write_jsonl(late / "s_base_seed2" / "eval_samples_step_final.jsonl", [])  # must not replace what is kept
    path = keep_study(late, "s", kept, add=True)
    assert path.read_bytes() == keep_study(runs, "s", tmp_path / "at once").read_bytes()
