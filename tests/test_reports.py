"""The reports of a runs folder: the runs' own numbers, nothing twice, nothing lost, other people's text untouched.

python -m pytest tests/test_reports.py
"""

import gzip
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bridgekit import launch
from bridgekit.config import load_config
from bridgekit.results import reports, verdict
from bridgekit.results.manifest import replace_block
from bridgekit.results.report_entry import read_entry
from bridgekit.runs import create_run, find_eval, load_eval, write_status

KEPT = Path(__file__).parent.parent / "preserved_data"
WINS, LOSES = "headline_dit_seed1", "phase1_seeds_seed1"
FILES = (reports.LOG, reports.SUMMARY, reports.REPORT)
N = 400  # lines used of a preserved evaluation


@pytest.fixture
def add_run(tmp_path):
    """`add_run("name", WINS)`: a run folder in tmp_path/runs as a finished run leaves it, begun at a given minute."""

    def make(name: str, kept: str = WINS, minute: int = 0) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        for path in KEPT.joinpath(kept).iterdir():
            if path.suffix in (".yaml", ".json", ".log") and path.name not in ("verdict.json", "checksums.json"):
                shutil.copyfile(path, folder / path.name)
        with gzip.open(find_eval(KEPT / kept), "rt") as stream:
            lines = [line for line, _ in zip(stream, range(N), strict=False)]
        (folder / "eval_samples_step_final.jsonl").write_text("".join(lines))
        judged = verdict.judge([load_eval(find_eval(folder))], seeds=[1])
        (folder / "verdict.json").write_text(json.dumps(judged.to_dict()))
        facts = json.loads((folder / "provenance.json").read_text()) | {
            "started": f"2026-11-20T12:{minute:02}:00+00:00"
        }
        (folder / "provenance.json").write_text(json.dumps(facts))
        return folder

    return make


def read(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in FILES}


def test_the_numbers_are_those_of_the_conditions_table(add_run):
    folder = add_run("one")
    reports.report_end(folder)
    texts, frame = read(folder.parent), load_eval(find_eval(folder))
    table = verdict.conditions_table(frame)
    rows = table[table["subset"] == "all"].set_index("condition")
    recovered = verdict.recovery(frame, subset="source_only_held_unit")
    for condition in ("source", "target", "bridged"):
        row = rows.loc[condition]
        said = f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
        for text in texts.values():
            assert said in text, (condition, said)
    for text in texts.values():
        assert f"{recovered.point:.3f} [{recovered.low:.3f}, {recovered.high:.3f}]" in text
    (line,) = [line for line in texts[reports.SUMMARY].splitlines() if line.startswith("| [`")]
    cells = [cell.strip() for cell in line.strip("|").split(" | ")]
    assert cells[:6] == ["[`one`](one)", "2026-11-20 12:00", "dit × prefix", "forward", "1", f"{rows['n'].iloc[0]:,}"]
    assert cells[-2:] == [
        verdict.judge([frame]).outcome,
        "[eval_samples_step_final.jsonl](one/eval_samples_step_final.jsonl)",
    ]
    assert (folder.parent / "one/eval_samples_step_final.jsonl").is_file()


def test_a_run_reports_itself_when_it_finishes_and_when_it_fails(tiny, make_job, tmp_path):
    from bridgekit.train import worker as train

    job = make_job(tiny(steps=1, eval_every=1, val_samples=6, n_test=8, max_new_tokens=4))
    train.run_training(job)
    for text in read(job.folder.parent).values():
        assert f"`{job.folder.name}`" in text
    config = load_config(runs_dir=str(tmp_path / "runs"), source_model=str(tmp_path / "none"), target_device="cpu")
    folder = create_run(config)
    assert train.main([str(folder), "--stage", "baselines"]) == 2
    log = (folder.parent / reports.LOG).read_text()
    assert f"· `{folder.name}` · failed" in log and "- failed in baselines: " in log and "none" in log


def test_running_twice_adds_nothing_twice(add_run):
    for i, name in enumerate(("first", "second", "third")):
        reports.report_end(add_run(name, minute=i))
    folder = add_run("fourth", LOSES, minute=9).parent
    reports.report_end(folder / "fourth")
    before = read(folder)
    for name in ("third", "first", "fourth", "second"):
        reports.report_end(folder / name)
    assert read(folder) == before
    assert reports.main([str(folder)]) == 0
    assert read(folder) == before  # and all of them again, from the folders, is the same text
    for name in ("first", "second", "third", "fourth"):
        assert before[reports.LOG].count(f"· `{name}` ·") == before[reports.SUMMARY].count(f"| [`{name}`]") == 1
    assert before[reports.REPORT].count("### [`") == 3


def test_the_newest_run_comes_first_in_whatever_order_they_are_reported(add_run):
    folders = {name: add_run(name, LOSES, minute) for name, minute in (("b", 5), ("a", 9), ("d", 1), ("c", 3))}
    for name in ("d", "a", "c", "b"):
        reports.report_end(folders[name])
    texts = read(folders["a"].parent)
    for file, mark in ((reports.LOG, "· `{}` ·"), (reports.SUMMARY, "| [`{}`]"), (reports.REPORT, "- [`{}`]")):
        places = [texts[file].index(mark.format(name)) for name in ("a", "b", "c", "d")]
        assert places == sorted(places), file


def test_text_around_the_markers_stays_and_so_do_the_blocks_of_others(add_run):
    runs = add_run("old", minute=1).parent
    reports.report_end(runs / "old")
    for name in FILES:
        text = (runs / name).read_text()
        text = "Above all.\n\n" + text.replace("<!-- end: log old -->", "<!-- end: log old -->\n\nA remark on old.")
        (runs / name).write_text(text + "\nBelow all.\n")
    report = runs / reports.REPORT
    report.write_text(replace_block(report.read_text(), "comparative gains", "| a | b |\n\n### [`no run`](x)\n"))
    foreign = report.read_text()[report.read_text().index("<!-- generated: comparative gains -->") :]
    reports.report_end(add_run("older", minute=0))
    reports.report_end(add_run("new", minute=2))
    reports.report_end(runs / "old")
    for name in FILES:
        text = (runs / name).read_text()
        assert text.startswith("Above all.\n") and text.count("Below all.") == text.count("Above all.") == 1
    log = (runs / reports.LOG).read_text()
    order = ["· `new` ·", "· `old` ·", "A remark on old.", "· `older` ·"]
    assert [log.index(part) for part in order] == sorted(log.index(part) for part in order)
    assert foreign in report.read_text()


def test_a_run_that_beats_the_target_gets_its_subsection_and_keeps_its_prose(add_run):
    runs = add_run("wins").parent
    add_run("loses", LOSES)
    assert reports.main([str(runs)]) == 0
    text = (runs / reports.REPORT).read_text()
    assert "### [`wins`](wins/manifest.md)" in text and "### [`loses`]" not in text
    for part in ("Why it was run", "Command", "Key metrics", "Publishability", "Artifacts"):
        assert text.count(f"**{part}.**") == 1
    assert "against the target alone:" in text and "`eval_samples_step_final.jsonl` (" in text
    assert "NVIDIA H200" in text and "python -m bridgekit.train.worker" in text and "train.eval_every=300" in text
    assert not (runs / "loses/manifest.md").exists()
    entry = runs / "wins/manifest.md"
    entry.write_text(entry.read_text().replace("**Publishability.**", "## My reading\n\nIn the main table.\n\n**P.**"))
    reports.report_end(runs / "wins")
    text = (runs / reports.REPORT).read_text()
    assert "#### My reading\n\nIn the main table." in text and text.count("### [`wins`]") == 1


def test_failed_runs_are_logged_and_have_no_row(tmp_path):
    config = load_config(runs_dir=str(tmp_path / "runs"), name="some")
    folder = create_run(config)
    launch.mark_failed(folder, "train: no <!-- end: log x --> in\nsight | of it")
    launch.mark_failed(folder, "train: no <!-- end: log x --> in\nsight | of it")
    log = (folder.parent / reports.LOG).read_text()
    assert f"· `{folder.name}` · failed" in log and log.count(folder.name) == 3
    assert "train: no &lt;!-- end: log x --> in sight \\| of it" in log
    assert "| [`" not in (folder.parent / reports.SUMMARY).read_text()
    assert "No run has a final evaluation yet" in (folder.parent / reports.REPORT).read_text()


def test_a_run_made_again_under_its_name_moves_up(add_run):
    runs = add_run("again", minute=1).parent
    reports.report_end(runs / "again")
    reports.report_end(add_run("other", LOSES, minute=2))
    shutil.rmtree(runs / "again")
    folder = create_run(load_config(), runs / "again")
    (folder / "provenance.json").write_text(json.dumps({"started": "2026-11-20T12:05:00+00:00"}))
    launch.mark_failed(folder, "killed")  # its numbers are gone, so its row and its subsection go too
    texts = read(runs)
    assert texts[reports.LOG].index("`again` · failed") < texts[reports.LOG].index("· `other` ·")
    assert "`again`]" not in texts[reports.SUMMARY] and "`again`]" not in texts[reports.REPORT]


def test_a_report_that_cannot_be_written_does_not_fail_the_run(add_run, capsys):
    folder = add_run("cut")
    lines = (folder / "eval_samples_step_final.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "eval_samples_step_final.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:50])
    reports.report_end(folder)
    said = capsys.readouterr().err
    assert said.startswith("warning: no report of cut (") and "line 5" in said and said.count("\n") == 1
    reports.report_end(folder / "figures")  # no run at all: nothing to say
    assert capsys.readouterr().err == "" and not (folder / reports.LOG).exists()


def test_a_rebuild_goes_on_past_a_damaged_run_and_forgets_what_is_gone(add_run, capsys):
    runs = add_run("whole").parent
    damaged, gone = add_run("damaged"), add_run("gone")
    write_status(add_run("running"), state="running")
    reports.report_end(gone)
    shutil.rmtree(gone)
    (damaged / "verdict.json").write_text("{")
    assert reports.main([str(runs)]) == 2
    assert "verdict.json: not whole JSON" in capsys.readouterr().err
    for text in read(runs).values():
        assert "whole" in text and "`gone`" not in text and "`running`" not in text
    with pytest.raises(ValueError, match="no such folder"):
        reports.main([str(runs / "none")])
    with pytest.raises(ValueError, match="no run in it"):
        reports.main([str(runs / "whole")])


# A process of its own: once all are ready it reports runs that no other process reports, each a single time.
REPORT_MANY = """
import dataclasses, pathlib, sys, time
from bridgekit.results import reports
from bridgekit.results.report_entry import read_entry

folder, go = map(pathlib.Path, sys.argv[1:])
entry = read_entry(folder)
own = [f"{folder.name}_{k}" for k in range(12)]
texts = {k: getattr(entry, k) for k in ("name", "log", "row", "subsection")}
entries = [dataclasses.replace(entry, **{k: t.replace(folder.name, name) for k, t in texts.items()}) for name in own]
print("ready", flush=True)
while not go.exists():
    time.sleep(0.001)
for entry in entries:
    reports.write_reports(folder.parent, [entry])
"""


def test_runs_that_end_at_once_lose_nothing(add_run):
    """Real processes; none writes an entry twice, so that what is lost stays lost."""
    names = ["alpha", "beta", "gamma", "delta"]
    runs = [add_run(name, minute=i) for i, name in enumerate(names)][0].parent
    go = runs / "go"
    command = [sys.executable, "-c", REPORT_MANY]
    children = [subprocess.Popen([*command, runs / n, go], stdout=subprocess.PIPE, text=True) for n in names]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * len(names)
    go.touch()
    assert [child.wait(120) for child in children] == [0] * len(names)
    together = read(runs)
    for name in [f"{name}_{k}" for name in names for k in range(12)]:
        assert together[reports.LOG].count(f"· `{name}` ·") == 1
        assert together[reports.SUMMARY].count(f"| [`{name}`]") == 1
        assert together[reports.REPORT].count(f"### [`{name}`]") == 1
    assert f"{12 * len(names)} runs in" in together[reports.REPORT]
    assert not list(runs.glob(".*.md.*"))  # no half-written file is left


def test_the_order_of_reporting_changes_nothing(add_run, tmp_path):
    entries = [read_entry(add_run(name, minute=i)) for i, name in enumerate(("a", "b", "c"))]
    texts = []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        folder = tmp_path / f"reports{order[0]}"
        folder.mkdir()
        for i in order:
            reports.write_reports(folder, [entries[i]])
        texts.append(read(folder))
    assert texts[0] == texts[1] == texts[2]
