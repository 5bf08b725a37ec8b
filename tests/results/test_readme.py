"""README.md and RESULTS.md: every number is recomputed, rounded in one way, and none can be typed.

python -m pytest tests/results/test_readme.py
"""

import json
from pathlib import Path

import pytest
from first_generation import evaluation, write_own

from bridgekit.results import readme
from bridgekit.results.readme import Numbers, find_typed, render_document
from bridgekit.runs import hash_file

PROJECT = Path(__file__).parents[2]


def add_run(root, seed, right):
    """8 problems of 4 units: source-only about held-out units, then `both`; target right on the last four."""
    rows = evaluation(right, source_right=range(8), target_right=[4, 5, 6, 7])
    for i, row in enumerate(rows):
        group = "source_only" if i < 4 else "both"
        row |= {"id": f"u-{i}", "unit": f"u{i // 2}", "group": group, "novelty": "held_unit"}
        row |= {"target_told_extracted": row["gold_extracted"], "value": 10 + i, "family": "count"}
    folder = write_own(root / f"small_seed{seed}", rows, f"run: {{seed: {seed}}}\n")
    (folder / "metrics_constant.jsonl").write_text(
        "".join(json.dumps({"step": s, "eval": {"constant": a}}) + "\n" for s, a in ((0, 0.5), (10, 0.5 + seed - 1)))
    )
    return folder


@pytest.fixture
def numbers(tmp_path):
    for seed, right in ((1, [0, 1, 2, 4, 5, 6, 7]), (2, [0, 4, 5, 6, 7])):
        add_run(tmp_path / "preserved_data", seed, right)
    return Numbers(tmp_path / "preserved_data")


def test_numbers_of_one_run_and_of_all_its_seeds(numbers):
    assert str(numbers.share("small_seed1")) == "0.875" and str(numbers.share("small")) == "0.750"
    assert numbers.shares("small") == [0.875, 0.625] and numbers.share("small").n == 8
    assert str(numbers.share("small_seed1", "target", "source_only")) == "0.000"
    found = numbers.recovery("small")
    assert (str(found), found.low, found.high, found.percent) == ("0.500", 0.25, 0.75, "50%")
    assert str(numbers.difference("small_seed1")) == "+0.375"
    assert numbers.difference("small_seed1").interval.startswith("+0.375 [")
    assert numbers.verdict("small").seeds == [1, 2] and numbers.verdict("small").outcome in ("unproven", "fails")
    assert numbers.trained_controls() == {"all": 2, "untrained": 0}
    shown = numbers.example("small_seed1", ["target", "bridged"])
    assert "#### 100" in shown["answers"]["bridged"] and "#### 7" in shown["answers"]["target"]
    with pytest.raises(ValueError, match="no run 'other' is kept there"):
        numbers.share("other")


def test_a_changed_file_changes_the_number(numbers, tmp_path):
    folder = tmp_path / "preserved_data" / "small_seed1"
    path = folder / "eval_samples_step_final.jsonl"
    path.write_text(path.read_text().replace('"bridged_extracted": "100"', '"bridged_extracted": "101"'))
    rows = '{"step": 0, "eval": {"constant": 0.7}}\n{"step": 10, "eval": {"constant": 0.6}}\n'
    (folder / "metrics_constant.jsonl").write_text(rows)
    again = Numbers(tmp_path / "preserved_data")
    assert str(again.share("small_seed1")) == "0.750" and again.trained_controls() == {"all": 2, "untrained": 1}


def test_figure_data_are_refused_when_an_input_has_changed(numbers, tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    (folder / "causal.csv").write_text("variant,share\nword,0.98\nelsewhere,0.0\n")
    source = tmp_path / "preserved_data" / "small_seed1" / "config.yaml"
    parts = {"causal.csv": folder / "causal.csv", "../preserved_data/small_seed1/config.yaml": source}
    data, inputs = ({"name": name, "sha256": hash_file(path)} for name, path in parts.items())
    (folder / "causal.json").write_text(json.dumps({"data": data, "inputs": [inputs]}))
    assert numbers.figure_data("causal", "share", variant="word").percent == "98%"
    with pytest.raises(ValueError, match="2 rows where"):
        numbers.figure_data("causal", "share")
    source.write_text("run: {seed: 9}\n")
    with pytest.raises(ValueError, match="is not what it was drawn from"):
        numbers.figure_data("causal", "share", variant="word")


def test_check_names_the_first_line_that_differs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(readme, "render_document", lambda name, root: f"# {name}\nshare 0.750\n")
    arguments = ["--root", str(tmp_path / "preserved_data")]
    assert readme.main(arguments) == 0 and readme.main([*arguments, "--check"]) == 0
    (tmp_path / "RESULTS.md").write_text("# RESULTS.md\nshare 0.999\n")
    assert readme.main([*arguments, "--check"]) == 1
    error = capsys.readouterr().err
    assert "RESULTS.md, line 2: 'share 0.999' should be 'share 0.750'" in error and error.count("\n") == 1
    (tmp_path / "README.md").unlink()
    assert readme.main([*arguments, "--check"]) == 1 and "line 1: '(end)' should be" in capsys.readouterr().err


def test_a_template_with_a_typed_number_is_refused(tmp_path, monkeypatch):
    typed = "It has 0.894 there, right in 96%, +0.21 more."
    called = "{{ share('x') }} {{ fixed('0.001', 'a weight') }} {# was 0.894 #} {% set x = 0.05 %}"
    assert find_typed(typed) == ["0.894", "96%", "+0.21"]
    assert find_typed(called + " 8 soft tokens, 2,000 problems, 7B, eval_0.123.jsonl") == []
    (tmp_path / "README.md.j2").write_text(typed)
    monkeypatch.setattr(readme, "TEMPLATES", tmp_path)
    with pytest.raises(ValueError, match=r"README.md.j2: '0.894' is typed; call what recomputes it"):
        render_document("README.md", tmp_path)


def test_the_readme_of_this_project_is_what_its_template_gives():
    """RESULTS.md takes a minute: `bridgekit readme --check` compares both."""
    text = (PROJECT / "README.md").read_text()
    assert render_document("README.md", PROJECT / "preserved_data") == text, "run `make readme`"
    assert len(text.splitlines()) <= 250
