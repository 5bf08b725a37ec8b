"""Evaluation files that are damaged: refused with file and line, used without the line only when asked.

python -m pytest tests/test_runs.py
"""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridgekit.runs import find_eval, load_eval, read_jsonl, write_jsonl

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "preserved_data" / "headline_dit_seed1"
N = 300  # lines used of the preserved evaluation, enough for a verdict


@pytest.fixture(scope="module")
def lines() -> list[bytes]:
    with gzip.open(find_eval(KEPT)) as stream:
        return [line for line, _ in zip(stream, range(N), strict=False)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


def cut(lines: list[bytes], number: int, inside_a_character: bool = False) -> bytes:
    """The file with line `number` ending in its middle, as a full disk leaves it."""
    half = lines[number - 1][: len(lines[number - 1]) // 2]
    return b"".join([*lines[: number - 1], half + (b"\xc3" if inside_a_character else b"") + b"\n", *lines[number:]])


@pytest.mark.parametrize("name", ["eval_samples_step_final.jsonl", "eval_samples_step_final.jsonl.gz"])
@pytest.mark.parametrize("number", [1, 7, N])
@pytest.mark.parametrize("inside_a_character", [False, True])
def test_a_line_cut_in_half_is_named_and_left_out_only_when_asked(tmp_path, lines, name, number, inside_a_character):
    path = write(tmp_path / name, cut(lines, number, inside_a_character))
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}, line {number}: .*--skip-broken") as caught:
        load_eval(path)
    assert "\n" not in str(caught.value)
    frame, whole = load_eval(path, skip_broken=True), load_eval(write(tmp_path / "whole.jsonl", b"".join(lines)))
    assert frame.attrs["left_out"] == [number] and "left_out" not in whole.attrs
    assert list(frame["id"]) == [i for n, i in enumerate(whole["id"], 1) if n != number]


@pytest.mark.parametrize("keep", [0.4, 0.9])
def test_a_compressed_file_cut_in_half_is_named_with_the_first_line_that_is_lost(tmp_path, lines, keep):
    data = gzip.compress(b"".join(lines), mtime=0)
    path = tmp_path / "eval_samples_step_final.jsonl.gz"
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(ValueError, match="the compressed file is cut here") as caught:
        load_eval(path)
    frame = load_eval(path, skip_broken=True)
    assert f"{path}, line {len(frame) + 1}:" in str(caught.value)
    assert 0 < len(frame) < N and frame.attrs["left_out"] == [len(frame) + 1]
    assert list(frame["id"]) == [json.loads(line)["id"] for line in lines[: len(frame)]]


@pytest.mark.parametrize(
    ("data", "named"),
    [(b"", "no examples"), (b"\n\n", "no examples"), (b"[1]\n", "line 1"), (b'{"step": 1}\n', "gold_extracted")],
)
def test_a_file_that_is_no_evaluation_is_refused(tmp_path, data, named):
    with pytest.raises(ValueError, match=named):
        load_eval(write(tmp_path / "some.jsonl", data))


def test_rows_are_read_back_as_written(tmp_path):
    rows = [{"a": 1, "b": "\u00e9"}, {}, {"a": None}]
    for name in ("some.jsonl", "some.jsonl.gz"):
        write_jsonl(tmp_path / name, rows)
        assert list(read_jsonl(tmp_path / name)) == rows


def test_a_verdict_leaves_out_a_broken_line_only_when_asked(tmp_path, lines):
    write(tmp_path / "eval_samples_step_final.jsonl", cut(lines, 5))
    command = [sys.executable, "-m", "bridgekit.cli", "verdict", str(tmp_path)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2 and not refused.stdout
    assert "line 5:" in refused.stderr and refused.stderr.count("\n") == 1
    asked = subprocess.run([*command, "--skip-broken"], capture_output=True, text=True)
    assert asked.returncode == 0, asked.stderr
    assert f"left out line 5; {N - 1} lines are used" in asked.stdout and "The bridge transfers" in asked.stdout
