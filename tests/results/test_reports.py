"""The reports of a runs folder: the runs' own numbers, nothing twice, nothing lost, other people's text untouched.

python -m pytest tests/results/test_reports.py
"""

import gzip
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bridgekit.config import load_config
from bridgekit.results import reports, table, verdict
from bridgekit.results.reports import LOG, REPORT, SUMMARY, append_appendix, report_end
from bridgekit.results.statistics import paired_ratio
from bridgekit.results.style import format_interval
from bridgekit.runs import FINAL, create_run, find_eval, load_eval, write_status

KEPT = Path(__file__).parents[2] / "preserved_data"
WINS, LOSES = "headline_dit_seed1", "phase1_seeds_seed1"


@pytest.fixture
def add_run(tmp_path):
    """`add_run("name", WINS)`: a run folder in tmp_path/runs as a finished run leaves it, begun at a given minute."""

    def make(name: str, kept: str = WINS, minute: int = 0, n: int = 400) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for file in ("config.yaml", "status.json", "provenance.json", "verdict.json"):
            shutil.copyfile(KEPT / kept / file, folder / file)
        with gzip.open(find_eval(KEPT / kept), "rt") as stream:
            (folder / FINAL).write_text("".join(line for line, _ in zip(stream, range(n), strict=False)))
        facts = json.loads((folder / "provenance.json").read_text())
        facts["started"] = f"2026-11-20T15:{minute:02}:00+03:00"  # is shown in UTC
        (folder / "provenance.json").write_text(json.dumps(facts))
        return folder

    return make


def load(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in reports.FILES}


def test_the_numbers_are_those_of_the_conditions_table(add_run):
    folder = add_run("one")
    (folder / "verdict.json").unlink()
    report_end(folder)
    texts, frame = load(folder.parent), load_eval(find_eval(folder))
    rows = verdict.conditions_table(frame).query("subset == 'all'").set_index("condition")
    shown = [format_interval(*rows.loc[c, ["accuracy", "low", "high"]]) for c in ("source", "target", "bridged")]
    shown.append(str(paired_ratio(table.select(frame, "source_only_held_unit"), "bridged", "target_told")))
    assert all(number in text for text in texts.values() for number in shown)
    (line,) = [line for line in texts[SUMMARY].splitlines() if line.startswith("| [`")]
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    assert cells[:6] == ["[`one`](one)", "2026-11-20 12:00", "dit × prefix", "forward", "1", f"{rows['n'].iloc[0]:,}"]
    assert cells[-2:] == [verdict.judge([folder]).outcome, f"[{FINAL}](one/{FINAL})"] and "1 run in" in texts[REPORT]


def test_reporting_again_and_in_any_order_changes_nothing(add_run):
    minutes = {"b": 5, "a": 9, "d": 1, "c": 3}
    folders = {name: add_run(name, LOSES if name == "c" else WINS, minute) for name, minute in minutes.items()}
    for name in ("d", "a", "c", "b"):
        report_end(folders[name])
    runs = folders["a"].parent
    before = load(runs)
    report_end(folders["c"])
    assert load(runs) == before
    assert reports.main([str(runs)]) == 0 and load(runs) == before  # all of them again, from the folders
    for file, mark in ((LOG, "· `{}` ·"), (SUMMARY, "| [`{}`]"), (REPORT, "- [`{}`]")):
        places = [before[file].index(mark.format(name)) for name in ("a", "b", "c", "d")]
        assert places == sorted(places) and before[file].count(mark.format("a")) == 1, file
    assert before[REPORT].count("### [`") == 3


def test_text_around_the_blocks_stays_and_notes_of_a_run_come_along(add_run):
    folder = add_run("old", minute=1)
    report_end(folder)
    runs = folder.parent
    for name, text in load(runs).items():
        (runs / name).write_text(f"Above all.\n\n{text}\nBelow all.\n")
    for cell in "bc":
        append_appendix(runs / REPORT, "losses", f"## Appendix\n\n| a | {cell} |\n\n### [`no run`](x)")
    (folder / "notes.md").write_text("Hypothesis: it works.\n")
    report_end(add_run("new", minute=2))
    texts = load(runs)
    assert all(text.startswith("Above all.\n") and text.count("Below all.") == 1 for text in texts.values())
    log, report = texts[LOG], texts[REPORT]
    assert log.index("· `new` ·") < log.index("· `old` ·") < log.index("Hypothesis: it works.")
    assert "| a | c |" in report and "| a | b |" not in report and "### [`no run`](x)" in report


def test_a_run_that_beats_the_target_gets_its_subsection_and_keeps_its_prose(add_run):
    runs = add_run("wins").parent
    add_run("loses", LOSES)
    assert reports.main([str(runs)]) == 0
    text = (runs / REPORT).read_text()
    assert "### [`wins`](wins/manifest.md)" in text and "### [`loses`]" not in text
    words = "against the target alone:", "| union |", "bridged, source-only problems |"
    for part in (*words, f"`{FINAL}` (", "NVIDIA H200", "train.eval_every=300", "--stage train"):
        assert part in text, part
    assert not (runs / "loses/manifest.md").exists()
    (runs / "wins/figures").mkdir()
    (runs / "wins/figures/groups.png").write_bytes(b"x")
    entry = runs / "wins/manifest.md"
    entry.write_text(entry.read_text().replace("**Publishability.**", "## My reading\n\nIn the main table.\n\n**P.**"))
    report_end(runs / "wins")  # again, now that figures exist
    text = (runs / REPORT).read_text()
    assert "- `figures/groups.png` (0.0 kB)" in text
    assert "#### My reading\n\nIn the main table." in text and text.count("### [`wins`]") == 1


def test_a_run_made_again_that_fails_moves_up_and_loses_its_row(add_run):
    runs = add_run("again", minute=1).parent
    report_end(add_run("other", LOSES, minute=2))
    shutil.rmtree(runs / "again")
    folder = create_run(load_config(), runs / "again")  # it says nothing of its start: now
    reports.mark_ended(folder, "failed", "train: no <!-- end: runs --> in\nsight | of <script>it")
    reports.mark_ended(folder, "failed", "train: no <!-- end: runs --> in\nsight | of <script>it")
    texts = load(runs)
    assert texts[LOG].count("`again` · failed") == 1
    assert texts[LOG].index("`again` · failed") < texts[LOG].index("· `other` ·")
    assert "train: no &lt;!-- end: runs --> in sight \\| of &lt;script>it" in texts[LOG]
    assert "`again`]" not in texts[SUMMARY] and "`again`]" not in texts[REPORT]


def test_a_damaged_run_is_named_and_blocks_nothing(add_run, capsys):
    runs = add_run("whole").parent
    damaged, gone = add_run("damaged"), add_run("gone")
    write_status(add_run("running"), state="running")
    report_end(gone)
    shutil.rmtree(gone)
    (damaged / "verdict.json").write_text("{")
    report_end(damaged)
    assert "warning: no report of damaged: " in capsys.readouterr().err
    (damaged / "verdict.json").unlink()
    lines = (damaged / FINAL).read_bytes().splitlines(keepends=True)
    (damaged / FINAL).write_bytes(b"".join(lines[:4]) + lines[4][:50])
    assert reports.main([str(runs)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("warning: no report of damaged: ") and "line 5" in error and error.count("\n") == 1
    for text in load(runs).values():
        assert "whole" in text and not any(f"`{name}`" in text for name in ("gone", "running", "damaged"))
    report_end(runs / "whole" / "figures")  # no run at all: nothing to report
    assert capsys.readouterr().err == ""
    for folder, words in ((runs / "none", "no such folder"), (runs / "whole", "no run folder in it")):
        with pytest.raises(ValueError, match=words):
            reports.main([str(folder)])


# A process of its own: once all are ready each makes a run and reports it a single time.
REPORT_ONE = """
import pathlib, shutil, sys, time
from bridgekit.results import reports

folder, go = map(pathlib.Path, sys.argv[1:])
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
reports.report_end(shutil.copytree(folder, folder.with_name(f"{folder.name}_again")))
"""


def test_runs_that_end_at_once_wait_for_each_other_and_lose_nothing(add_run, tmp_path):
    """Real processes; none writes an entry twice, so that what is lost stays lost."""
    names = ["alpha", "beta", "gamma"]
    runs = [add_run(name, minute=i, n=60) for i, name in enumerate(names)][0].parent
    go, command = tmp_path / "go", [sys.executable, "-c", REPORT_ONE]
    children = [subprocess.Popen([*command, runs / n, go], stdout=subprocess.PIPE, text=True) for n in names]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * len(names)
    with reports.locked(runs):
        go.touch()
        time.sleep(0.5)
        assert not (runs / LOG).exists() and all(child.poll() is None for child in children)
    assert [child.wait(120) for child in children] == [0] * len(names)
    together = load(runs)
    for name in [*names, *(f"{name}_again" for name in names)]:
        assert together[LOG].count(f"· `{name}` ·") == together[SUMMARY].count(f"| [`{name}`]") == 1
    assert f"{2 * len(names)} runs in" in together[REPORT]
    assert not list(runs.glob(".*.md.*"))  # no half-written file is left
