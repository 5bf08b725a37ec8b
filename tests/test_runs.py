"""Run folders: nobody shares or overwrites one, what is damaged is named, and old and new evaluations read alike.

python -m pytest tests/test_runs.py
"""

import gzip
import json
import os
import re
import shlex
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bridgekit import runs
from bridgekit.config import ConfigError, load_config
from bridgekit.results.preserve import keep_study
from bridgekit.runs import create_run, find_eval, load_eval, open_study, write_jsonl

ROOT = Path(__file__).parent.parent
N = 300  # lines used of a preserved evaluation, enough for a verdict


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    with gzip.open(find_eval(ROOT / "preserved_data" / "headline_dit_seed1")) as stream:
        return [line for line, _ in zip(stream, range(N), strict=False)]


def at_once(call, n: int = 4) -> list:
    """What `n` calls return that start together."""
    barrier = threading.Barrier(n)
    with ThreadPoolExecutor(n) as pool:
        return [made.result() for made in [pool.submit(lambda: (barrier.wait(), call())[1]) for _ in range(n)]]


def test_runs_of_one_second_and_one_name_get_folders_of_their_own(tmp_path):
    made = at_once(lambda: create_run(load_config(runs_dir=str(tmp_path / "runs"))))
    assert len(set(made)) == 4 and all(re.fullmatch(r"phase1_\d{8}_\d{6}(_[2-4])?", path.name) for path in made)
    assert all((folder / "config.yaml").is_file() for folder in made)


def test_a_folder_that_is_there_or_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="full' exists already"):
        create_run(load_config(), tmp_path / "full")
    with pytest.raises(ConfigError, match="cannot be written.*run.runs_dir"):
        create_run(load_config(runs_dir=str(tmp_path / "full" / "notes.txt")))
    (tmp_path / "empty").mkdir()
    assert create_run(load_config(), tmp_path / "empty") == tmp_path / "empty"


def test_a_file_has_its_bytes_on_the_disk_before_its_name(tmp_path, monkeypatch):
    done, real = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: done.append("fsync"))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), real(a, b)))
    runs.write_text_atomic(tmp_path / "some.txt", "text")
    assert done == ["fsync", "rename"]
    with pytest.raises(TypeError):
        runs.write_bytes_atomic(tmp_path / "some.txt", None)
    assert [p.name for p in tmp_path.iterdir()] == ["some.txt"] and (tmp_path / "some.txt").read_text() == "text"


def test_the_record_names_machine_code_and_a_command_that_can_be_typed(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("BRIDGEKIT_COMMAND", "bridgekit run notebooks/phase1.ipynb -f parameters/phase1.yaml")
    record = runs.provenance(load_config(seed=5))
    assert record["command"] == "bridgekit run notebooks/phase1.ipynb -f parameters/phase1.yaml"
    assert record["cpu"] and record["threads"] == 3 and record["seed"] == 5 and len(record["commit"]) == 40
    monkeypatch.delenv("BRIDGEKIT_COMMAND")
    monkeypatch.setattr(sys, "argv", ["worker.py", f"{ROOT}/runs/some run", "--stage", "train"])
    for world, launcher in (("1", "python"), ("2", "accelerate launch --multi_gpu --num_processes 2")):
        monkeypatch.setenv("WORLD_SIZE", world)
        wanted = f"{launcher} -m bridgekit.train.worker 'runs/some run' --stage train"
        assert runs.provenance(load_config())["command"] == wanted
    assert shlex.split(runs.join_command(["bridgekit", "config", "-o", "name=a b"]))[-1] == "name=a b"
    assert runs.join_command([f"{Path.home()}/x/run"]) == "~/x/run"


@pytest.mark.parametrize("name", ["some.jsonl", "some.jsonl.gz"])
@pytest.mark.parametrize(("number", "end"), [(7, b"\xc3\n"), (N, b"\n")])  # also inside a character
def test_a_line_cut_in_half_is_named_and_left_out_only_when_asked(tmp_path, lines, name, number, end):
    cut = [*lines[: number - 1], lines[number - 1][: len(lines[number - 1]) // 2] + end, *lines[number:]]
    path, data = tmp_path / name, b"".join(cut)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    (tmp_path / "whole.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line {number}: .*--skip-broken") as caught:
        load_eval(path)
    assert "\n" not in str(caught.value)
    frame, whole = load_eval(path, skip_broken=True), load_eval(tmp_path / "whole.jsonl")
    assert frame.attrs["left_out"] == [number] and "left_out" not in whole.attrs
    assert list(frame["id"]) == [i for n, i in enumerate(whole["id"], 1) if n != number]


def test_a_compressed_file_cut_in_half_is_named_with_the_first_line_that_is_lost(tmp_path, lines):
    data, path = gzip.compress(b"".join(lines)), tmp_path / "eval_samples_step_final.jsonl.gz"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="the compressed file is cut here") as caught:
        load_eval(path)
    frame = load_eval(path, skip_broken=True)
    assert f"{path}, line {len(frame) + 1}:" in str(caught.value)
    assert 0 < len(frame) < N and frame.attrs["left_out"] == [len(frame) + 1]


@pytest.mark.parametrize(
    ("text", "named"),
    [("", "no examples"), ("\n\n", "no examples"), ("[1]\n", "line 1"), ('{"step": 1}\n', "gold_extracted")],
)
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, text, named):
    (tmp_path / "some.jsonl").write_text(text)
    with pytest.raises(ValueError, match=named):
        load_eval(tmp_path / "some.jsonl")


def test_the_task_s_own_score_counts_where_there_is_one(tmp_path):
    row = {"gold_extracted": "1/2", "source_extracted": "0.5", "target_extracted": "1/2", "constant_extracted": "1/2"}
    row |= {"constant.last_extracted": "3", "bridged_extracted": "[invalid]"}
    write_jsonl(tmp_path / "old.jsonl", [row, row | {"gold_extracted": "[invalid]"}])
    frame = load_eval(tmp_path / "old.jsonl")
    assert frame["source_correct"].tolist() == [False, False] and frame["target_correct"].tolist() == [True, False]
    assert frame["bridged_correct"].tolist() == [False, False] and frame["union_correct"].tolist() == [True, False]
    assert not frame["constant.last_correct"].any() and "controls" not in frame.attrs
    write_jsonl(tmp_path / "new.jsonl.gz", [row | {"source_correct": True, "constant_correct": None}])
    (tmp_path / "controls.json").write_text(json.dumps({"constant": {"mix": 300}}))
    frame = load_eval(tmp_path / "new.jsonl.gz", texts=False)
    assert frame["source_correct"].tolist() == [True] and frame["constant_correct"].tolist() == [False]
    assert frame["constant_correct"].dtype.kind == "b" and frame.attrs["controls"] == {"constant": {"mix": 300}}


@pytest.fixture
def some_runs(tmp_path) -> Path:
    """Two finished runs of the study `s_t` and one that is not, with answers that differ."""
    usual = {"unit": "w", "group": "source_only", "novelty": "held_unit", "target_extracted": "0", "family": None}
    usual |= {"question": "Q", "source_full": "text"}
    for seed in (1, 2, 3):
        folder, rows = create_run(load_config(seed=seed), tmp_path / "runs" / f"s_t_base_seed{seed}"), []
        for i in range(40):
            answers = {"gold": str(i), "source": str(i), "bridged": str(i if i % (seed + 1) else 0)}
            rows.append(usual | {"index": i, "id": f"u-{i}"} | {f"{k}_extracted": v for k, v in answers.items()})
        write_jsonl(folder / runs.FINAL, rows)
        runs.write_status(folder, state="finished" if seed < 3 else "running")
    return tmp_path / "runs"


def test_every_number_survives_packing_and_texts_stay_out(some_runs, tmp_path):
    path = keep_study(some_runs, "s_t", tmp_path / "kept")
    folder = open_study("s_t", tmp_path / "kept", tmp_path / "open")
    assert sorted(p.name for p in folder.iterdir()) == ["s_t_base_seed1", "s_t_base_seed2"]
    for name in ("s_t_base_seed1", "s_t_base_seed2"):
        before, after = (load_eval(find_eval(root / name)) for root in (some_runs, folder))
        columns = [column for column in after if column in before]
        assert before[columns].equals(after[columns]) and not {"question", "source_full"} & set(after)
        assert runs.load_run_config(folder / name) == runs.load_run_config(some_runs / name)
    assert path.read_bytes() == keep_study(some_runs, "s_t", tmp_path / "again").read_bytes()
    assert path.read_bytes() == keep_study(folder, "s_t", tmp_path / "packed before").read_bytes()


def test_an_archive_of_equal_size_and_other_content_is_unpacked_again(some_runs, tmp_path):
    sizes, folders = set(), []
    for letter in "ab":
        runs.write_status(some_runs / "s_t_base_seed1", state="finished", best=letter)
        path = keep_study(some_runs, "s_t", tmp_path / "kept")
        folders.append(open_study("s_t", tmp_path / "kept", tmp_path / "open"))
        sizes.add(path.stat().st_size)
        path.unlink()
    assert len(sizes) == 1, "the test needs two archives of one size"
    assert [runs.load_status(folder / "s_t_base_seed1")["best"] for folder in folders] == ["a", "b"]


def test_readers_that_unpack_at_once_get_one_whole_copy_wherever_they_are(some_runs, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    keep_study(some_runs, "s_t", "preserved_data/studies")
    (folder,) = set(at_once(lambda: open_study("s_t")))
    assert list((tmp_path / "runs" / ".studies").iterdir()) == [folder] and not [*(tmp_path / "notebooks").iterdir()]
    assert len(list(folder.glob("*/config.yaml"))) == 2
    with pytest.raises(FileNotFoundError, match="other.tar.xz"):
        open_study("other")


def test_what_is_kept_is_never_replaced_and_later_runs_are_added(some_runs, tmp_path):
    early, kept = tmp_path / "early", tmp_path / "kept"
    shutil.copytree(some_runs / "s_t_base_seed2", early / "s_t_base_seed2")
    keep_study(early, "s_t", kept)
    with pytest.raises(ValueError, match="already kept"):
        keep_study(some_runs, "s_t", kept)
    with pytest.raises(ValueError, match="no finished run of a study 's_t' that is not kept already"):
        keep_study(early, "s_t", kept, add=True)
    whole = keep_study(some_runs, "s_t", tmp_path / "at once").read_bytes()
    write_jsonl(some_runs / "s_t_base_seed2" / runs.FINAL, [])  # must not replace what is kept
    assert keep_study(some_runs, "s_t", kept, add=True).read_bytes() == whole
