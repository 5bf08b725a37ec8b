"""The audit: each fault is found in runs made to have it, and in no others; the data alone judge claims."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from first_generation import OOM, evaluation, write_jsonl, write_run
from test_runfolders import BRIDGED, write_own

from bridgekit.audit import claims, own_claims
from bridgekit.audit import report as audit
from bridgekit.audit.findings import find_all
from bridgekit.audit.measures import paired
from bridgekit.audit.runfolders import read_run
from bridgekit.results import preserve
from bridgekit.results.style import new_figure, save_figure
from bridgekit.runs import write_status
from bridgekit.studies import keep_study

A, B = "treatment_20251116_201212", "control_20251117_013909"
PROJECT = Path(__file__).parent.parent


def records_of(*folders):
    return {record.name: record for record in map(read_run, folders)}


def kinds(records, verdicts=()):
    found = {}
    for finding in find_all(records, verdicts):
        found.setdefault(finding.kind, []).append(finding)
    return found


# ---- detectors ----


def test_one_configuration_under_two_labels(tmp_path):
    one = write_run(tmp_path, A, BRIDGED, settings={"decode_interval": 200})
    two = write_run(tmp_path, B, BRIDGED, settings={"decode_interval": 50})
    found = kinds(records_of(one, two))
    assert (
        "decode_interval (200, 50) without effect; trained parameters: 60.9M"
        in found["same configuration, different labels"][0].text
    )
    assert "2 replicates end at 0.375, 0.375" in found["replicates"][0].text


@pytest.mark.parametrize("settings", [{"dit_pool": "attention"}, {"decode_loss_weight": 0.1}, {"soft_tokens": 64}])
def test_a_setting_with_an_effect_makes_another_experiment(tmp_path, settings):
    found = kinds(records_of(write_run(tmp_path, A, BRIDGED), write_run(tmp_path, B, BRIDGED, settings=settings)))
    assert "same configuration, different labels" not in found and "replicates" not in found


def test_an_interval_counts_where_its_weight_does(tmp_path):
    decode = {"decode_loss_weight": 0.1}
    one = write_run(tmp_path, A, BRIDGED, settings=decode)
    two = write_run(tmp_path, B, BRIDGED, settings=decode | {"decode_interval": 50})
    assert "replicates" not in kinds(records_of(one, two))


def test_a_run_repeated_under_its_own_label_is_no_mislabelled_treatment(tmp_path):
    one, two = write_run(tmp_path, A, BRIDGED), write_run(tmp_path, "treatment_20251120_101010", BRIDGED)
    found = kinds(records_of(one, two))
    assert "same configuration, different labels" not in found and "replicates" in found


def test_an_option_of_an_absent_module_is_inert(tmp_path):
    without = {"bridge": "resampler"}
    one = write_run(tmp_path, A, BRIDGED, settings=without)
    two = write_run(tmp_path, B, BRIDGED, settings=without | {"dit_pool": "attention"})
    assert "same configuration, different labels" in kinds(records_of(one, two))


def test_another_seed_is_a_replicate_but_not_the_same_configuration(tmp_path):
    one = write_run(tmp_path, A, BRIDGED)
    two = write_run(tmp_path, B, BRIDGED | {"final": [0, 1, 2, 3, 4]}, settings={"seed": 5})
    found = kinds(records_of(one, two))
    assert "same configuration, different labels" not in found
    assert found["replicates"][0].numbers["scores"] == {A: 0.375, B: 0.625}
    two = write_run(tmp_path / "w", B, BRIDGED, world=1)  # another number of processes is another run
    assert "replicates" not in kinds(records_of(one, two))


def test_best_checkpoint_selection_and_changed_answers(tmp_path):
    found = kinds(records_of(write_run(tmp_path, A, BRIDGED)))
    assert (
        "kept as best: step 40 with 0.500; evaluated at the end: 0.375, with 6 of 8"
        in found["best checkpoint is not the best"][0].text
    )
    assert "all 8 items" in found["selection on the test set"][0].text
    assert "answers moved since step 60 (0.375 to 0.375)" in found["the same weights score differently"][0].text


def test_a_sound_run_has_none_of_these(tmp_path):
    """The final evaluation repeats the best step's answers; validation and test items differ."""
    run = write_run(tmp_path, A, BRIDGED | {"final": [0, 1, 2, 3]})
    assert not {"best checkpoint is not the best", "the same weights score differently"} & set(kinds(records_of(run)))
    final = run / "phase1_all_fix" / "eval_samples_step_final.jsonl"
    rows = evaluation([0, 1, 2])
    for row in rows:
        row["index"] += 500
    write_jsonl(final, rows)
    found = kinds(records_of(run))
    assert "selection on the test set" not in found and "the same weights score differently" not in found


def test_baselines_of_one_model_in_two_roles(tmp_path):
    swapped = {"source_model": "org/Target", "target_model": "org/Source"}
    one, two = write_run(tmp_path, A, BRIDGED), write_run(tmp_path, B, BRIDGED, settings=swapped, world=1)
    for path in two.glob("*/eval*.jsonl"):
        rows = evaluation([0], source_right=[0, 1, 2, 3, 4, 5, 6], target_right=[0, 1, 2, 3])
        write_jsonl(path, rows)
    texts = [f.text for f in kinds(records_of(one, two))["baselines differ"]]
    assert any(
        t.startswith("org/Target alone: 0.750 as target on 4 GPU (1 runs) and 0.875 as source on 1 GPU") for t in texts
    )


def test_repeated_baselines_harms_and_crashes(tmp_path):
    bridged = {"0": [], "20": [], "final": []}
    run = write_run(tmp_path, A, bridged, crash=OOM)
    for path in run.glob("*/eval*.jsonl"):
        write_jsonl(path, evaluation([], target_right=range(8)))
    found = kinds(records_of(run))
    assert "32 of 72 generated answers (44%)" in found["baselines generated again"][0].text
    assert "bridged is 1.000 below the target alone" in found["the bridge harms"][0].text
    assert "main: decode_out = tgt_model(**decode_data), 77.6 GiB in use" in found["crash"][0].text


# ---- claims ----


def claim(value, measure, **more):
    return {"id": "c", "document": "d", "says": "s", "value": value, "measure": measure} | more


@pytest.mark.parametrize(("stated", "measure", "verdict", "words"), [
    (0.375, {"accuracy": {"run": A}}, "agrees", "n = 8, 95% interval 0.137 to 0.694"),
    (0.38, {"accuracy": {"run": A}}, "differs", "stated 0.380, recomputed 0.375"),
    (0.5, {"peak": {"run": A}}, "agrees", ""),
    (40, {"peak_step": {"run": A}}, "agrees", ""),
    (60, {"peak_step": {"run": A}}, "differs", "stated 60, recomputed 40"),
    (0.125, {"degradation": {"run": A}}, "agrees", ""),
    (0.75, {"accuracy": {"run": A, "condition": "target", "step": 20}}, "agrees", ""),
    ("mean", {"setting": {"run": A, "key": "dit_pool"}}, "agrees", ""),
    ("attention", {"setting": {"run": A, "key": "dit_pool"}}, "differs", "stated attention, recorded mean"),
    (4, {"fact": {"run": A, "key": "world_size"}}, "agrees", ""),
    (60, {"last_step": {"run": A}}, "agrees", ""),
    (0.75, {"union": {"run": A}}, "agrees", ""),
    (0, {"only_source": {"run": A}}, "agrees", ""),
    (0.625, {"label_share": {"run": A, "label": "203"}}, "agrees", ""),
    (1.0, {"accuracy": {"run": "gone_20250101_000000"}}, "cannot be checked", "is not preserved"),
    (1.0, {"accuracy": {"run": A, "step": 250}}, "cannot be checked", "has no evaluation of step 250"),
    (1.0, {"accuracy": {"run": A, "condition": "relay"}}, "cannot be checked", "no condition 'relay'"),
    (1.0, {"accuracy": {"ran": A}}, "cannot be checked", "measure 'accuracy'"),
    (1.0, {"setting": {"run": A, "key": "prompt_alignment_weight"}}, "cannot be checked", "no setting"),
])  # fmt: skip
def test_verdicts_on_values(tmp_path, stated, measure, verdict, words):
    result = claims.judge(claim(stated, measure), records_of(write_run(tmp_path, A, BRIDGED)))
    assert result.verdict == verdict and words in result.why


def big(tmp_path, name, right, n=400):
    run = write_run(tmp_path, name, {"final": []})
    write_jsonl(run / "phase1_all_fix" / "eval_samples_step_final.jsonl", evaluation(right, n=n))
    return run


def test_a_difference_needs_a_large_enough_n(tmp_path):
    records = records_of(big(tmp_path, A, range(200)), big(tmp_path, B, [*range(193), 399]))
    between = {"between": {"run": A, "other": B}}
    small = claims.judge(claim(0.015, between, effect=True), records)
    assert small.verdict == "not supported at this n"
    assert "n = 400" in small.why and "p = 0.07" in small.why and "needs n = " in small.why
    wrong_way = claims.judge(claim(-0.015, between, effect=True), records)
    assert (wrong_way.verdict, wrong_way.opposite) == ("differs", True)
    assert claims.judge(claim(0, between, relation="<", effect=True), records).opposite
    clear = records_of(big(tmp_path / "x", A, range(200)), big(tmp_path / "x", B, range(100)))
    assert claims.judge(claim(0.25, between, effect=True), clear).verdict == "agrees"
    assert claims.judge(claim(0.20, between, effect=True), clear).verdict == "differs"
    assert not claims.judge(claim(0.20, between, effect=True), clear).opposite


def test_a_count_that_fits_its_complement_is_the_opposite(tmp_path):
    run = write_run(tmp_path, A, {"final": []})
    path = run / "phase1_all_fix" / "eval_samples_step_final.jsonl"
    write_jsonl(path, evaluation(range(6), other="[invalid]"))
    result = claims.judge(claim(2, {"answered": {"run": A}}), records_of(run))
    assert result.opposite and "stated 2, recomputed 6" in result.why
    assert not claims.judge(claim(3, {"answered": {"run": A}}), records_of(run)).opposite


def test_paired_differences_need_common_items():
    import pandas as pd

    with pytest.raises(ValueError, match="share no item"):
        paired(pd.Series([True], index=[1]), pd.Series([True], index=[2]))


def test_two_documents_with_two_values(tmp_path):
    records = records_of(write_run(tmp_path, A, BRIDGED))
    said = [
        claim(0.5, {"peak": {"run": A}}, document="one"),
        claim(0.4, {"peak": {"run": A}}, document="two"),
    ]
    found = kinds(records, [claims.judge(c, records) for c in said])
    assert found["documents disagree"][0].text == "one 0.5 and two 0.4 for the same quantity; recomputed 0.500"


@pytest.mark.parametrize(("text", "message"), [
    ("claims: [", "not valid YAML"),
    ("claims: {a: 1}", "expected a list of claims"),
    ("claims: [{id: x, document: d, says: s, value: 1}]", "claim x: give either 'measure' or 'missing'"),
    ("claims: [{id: x, document: d, says: s, measure: {peak: {}}}]", "claim x: no 'value'"),
    ("claims: [{id: x, document: d, says: s, value: 1, measure: {peek: {}}}]", "claim x: no measure 'peek'"),
    ("claims: [{id: x, document: d, says: s, value: 1, measure: peak}]", "claim x: write measure as"),
    ("claims: [{id: x, document: d, says: s, value: 1, mesure: {}}]", "claim x: unknown key 'mesure'"),
    ("claims: [{id: x, document: d, says: s, value: 1, missing: m, relation: '~'}]", "relation must be one"),
    ("claims: [" + ", ".join(2 * ["{id: x, document: d, says: s, value: 1, missing: m}"]) + "]",
     "two claims have the id 'x'"),
])  # fmt: skip
def test_a_malformed_claims_file_is_refused(tmp_path, text, message):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        claims.load_claims(tmp_path / "claims.yaml")


# ---- this project's own numbers ----


OWN = "resampler_20261120_101500"


def own_project(tmp_path, entries, readme):
    """A project with one run: 8 questions of 4 units, bridged right on 6, target_told on 8, target on 4."""
    rows = evaluation([0, 1, 2, 3, 4, 5], target_right=[0, 1, 2, 3])
    for i, row in enumerate(rows):
        row |= {"unit": f"u{i // 2}", "group": "source_only" if i < 4 else "both", "novelty": "held_unit",
                "target_told_extracted": row["gold_extracted"], "shuffled_extracted": "5",
                "donor_gold": "5" if i < 2 else "6"}  # fmt: skip
    write_own(tmp_path / "preserved_data" / OWN, rows)
    (tmp_path / "preserved_data" / "own_claims.yaml").write_text(yaml.safe_dump(entries))
    (tmp_path / "README.md").write_text(readme)
    return audit.run_audit(tmp_path / "preserved_data", tmp_path)


@pytest.mark.parametrize(("value", "measure"), [
    ("0.750", {"accuracy": {"run": OWN}}),
    ("75%", {"accuracy": {"run": OWN}}),
    ("1.00", {"accuracy": {"run": OWN, "group": "source_only", "novelty": ["held_unit", "held_value"]}}),
    ("+0.25", {"difference": {"run": OWN, "first": "bridged", "second": "target"}}),
    ("−0.25", {"difference": {"run": OWN, "first": "target", "second": "bridged"}}),
    ("0.750", {"recovery": {"run": OWN}}),
    ("8 questions", {"count_items": {"run": OWN}}),
    ("2 units", {"count_units": {"run": OWN, "group": "both"}}),
    ("25.0%", {"follows_donor": {"run": OWN}}),
    ("0.40", {"metric": {"run": OWN, "name": "bridged", "pick": "max"}}),
    ("2.5", {"metric": {"run": OWN, "name": "loss"}}),
    ("0.75", {"accuracy": {"run": [OWN, OWN], "over": "min"}}),
    ("0.00", {"accuracy": {"run": [OWN, OWN], "over": "sd"}}),
    ("dit", {"setting": {"run": OWN, "key": "bridge.producer"}}),
])  # fmt: skip
def test_own_numbers_that_hold(tmp_path, value, measure):
    result = own_project(tmp_path, [{"document": "README.md", "value": value, "measure": measure}], f"It is {value}.")
    assert [v.why for v in result.own] == [""] and not result.broken


@pytest.mark.parametrize(("entry", "readme", "why"), [
    ({"value": "0.80", "measure": {"accuracy": {"run": OWN}}}, "It: 0.80.", "printed 0.80, recomputed 0.75"),
    ({"value": "0.75", "measure": {"accuracy": {"run": OWN}}}, "It: 0.76.", "README.md does not print 0.75"),
    ({"value": "0.75", "near": "held", "measure": {"accuracy": {"run": OWN}}}, "0.75\nheld", "on a line"),
    ({"value": "0.75", "measure": {"accuracy": {"run": "gone"}}}, "0.75", "run 'gone' is not preserved"),
    ({"value": "0.75", "measure": {"accuracy": {"run": OWN, "group": "none"}}}, "0.75", "no row of run"),
    ({"value": "0.75", "measure": {"accuracy": {"run": OWN, "colour": 1}}}, "0.75", "no column 'colour'"),
    ({"value": "0.75", "measure": {"accuracy": {"run": [OWN]}}}, "0.75", "a list of runs needs over"),
    ({"document": "NO.md", "value": "8", "measure": {"count_items": {"run": OWN}}}, "8", "does not exist"),
])  # fmt: skip
def test_own_numbers_that_do_not_hold(tmp_path, capsys, entry, readme, why):
    result = own_project(tmp_path, [{"document": "README.md"} | entry], readme)
    assert why in result.broken[0].why
    assert audit.main(["--root", str(tmp_path / "preserved_data"), "--project", str(tmp_path)]) == 1
    assert "does not hold: " in capsys.readouterr().err


def test_a_changed_answer_breaks_the_number(tmp_path):
    entries = [{"document": "README.md", "value": "0.750", "measure": {"accuracy": {"run": OWN}}}]
    assert not own_project(tmp_path, entries, "0.750").broken
    path = tmp_path / "preserved_data" / OWN / "eval_samples_step_final.jsonl"
    path.write_text(path.read_text().replace('"bridged_extracted": "100"', '"bridged_extracted": "101"'))
    assert audit.run_audit(tmp_path / "preserved_data", tmp_path).broken


def test_a_number_of_a_run_kept_in_a_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    entries = [
        {"document": "README.md", "value": "0.750", "measure": {"accuracy": {"run": f"s_{kind}_seed1"}}}
        for kind in ("base", "gone")
    ]
    own_project(tmp_path, entries, "0.750")
    shutil.copytree(tmp_path / "preserved_data" / OWN, tmp_path / "runs" / "s_base_seed1")
    write_status(tmp_path / "runs" / "s_base_seed1", state="finished")
    keep_study(tmp_path / "runs", "s", tmp_path / "preserved_data" / "studies")
    result = audit.run_audit(tmp_path / "preserved_data", tmp_path)
    assert [v.why for v in result.own] == ["", "run 's_gone_seed1' is not preserved"]


def test_a_number_of_a_figure_holds_as_long_as_its_inputs_do(tmp_path):
    measure = {"drawn": {"figure": "figures/gains", "column": "difference", "variant": "kl", "pick": "min"}}
    entries = [{"document": "README.md", "value": "-0.25", "measure": measure}]
    assert "no figure figures/gains" in own_project(tmp_path, entries, "-0.25").own[0].why
    data = pd.DataFrame({"variant": ["kl", "kl", "nce"], "difference": [-0.25, 0.5, -1.0]})
    source = tmp_path / "preserved_data" / OWN / "eval_samples_step_final.jsonl"
    save_figure(new_figure()[0], tmp_path / "figures" / "gains", data, [source])
    assert not audit.run_audit(tmp_path / "preserved_data", tmp_path).broken
    source.write_text(source.read_text() + "\n")
    again = audit.run_audit(tmp_path / "preserved_data", tmp_path).broken
    assert "is not what it was drawn from; draw it again" in again[0].why


@pytest.mark.parametrize(("printed", "value", "same"), [
    ("0.894", 0.8941, "0.894"), ("1,234 items", 1234.4, "1,234 items"), ("12 %", 0.1234, "12 %"),
    ("about 0.9x", 0.94, "about 0.9x"), ("+0.10", -0.1, "-0.10"), ("±0.02", 0.021, "±0.02"),
    ("−3", -3.2, "−3"),
    ("0.00", -0.001, "0.00"), ("passes", "fails", "fails"),
])  # fmt: skip
def test_numbers_are_printed_as_the_document_prints_them(printed, value, same):
    assert own_claims.print_like(printed, value) == same


# ---- the verb ----


def test_damage_is_reported_and_the_other_runs_are_audited(tmp_path):
    root = tmp_path / "preserved_data"
    kept = preserve.preserve(write_run(tmp_path, A, BRIDGED), root, max_jsonl_mb=0)
    other = preserve.preserve(write_run(tmp_path, B, BRIDGED), root, max_jsonl_mb=0)
    (other / "outcomes.csv.gz").write_bytes(b"")
    (root / "copies" / A).mkdir(parents=True)
    for path in kept.iterdir():
        (root / "copies" / A / path.name).write_bytes(path.read_bytes())
    write_own(root / OWN, metrics="\x00\x01\n")
    (root / "broken_20260101_000000").mkdir()
    (root / "broken_20260101_000000" / "run.json").write_text("{")
    (root / "broken_20260101_000000" / "outcomes.csv.gz").write_bytes(b"not gzip")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    result = audit.run_audit(root, tmp_path)
    said = "\n".join(result.problems)
    assert f"first_experiments/{B}: outcomes.csv.gz is not what was preserved (checksum)" in said
    assert f"first_experiments/{A}: the name '{A}' is also that of copies/{A}; only that one is used" in said
    assert f"{OWN}: metrics.jsonl: line 3 is no JSON object with a step" in said
    assert "broken_20260101_000000: " in said
    assert {A, B, OWN} <= set(result.records)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_all_three_forms_tell_the_same(tmp_path):
    root = tmp_path / "preserved_data"
    preserve.preserve(write_run(tmp_path, A, BRIDGED), root)
    lines = [claim(0.4, {"peak": {"run": A}}, document="log", says="<b>peak</b> & more")]
    (root / "claims.yaml").write_text(yaml.safe_dump({"documents": {"log": "The log"}, "claims": lines}))
    assert audit.main(["--root", str(root), "--format", "html", "--output", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text()
    assert "&lt;b&gt;peak&lt;/b&gt; &amp; more" in page and "stated 0.400, recomputed 0.500" in page
    assert audit.main(["--root", str(root), "--format", "json", "--output", str(tmp_path / "a.json")]) == 0
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["counts"]["differs"] == 1 and content["claims"][0]["found"] == "0.500"
    assert audit.main(["--root", str(root), "--update-readme"]) == 0
    readme = (root / "README.md").read_text()
    assert "| selection on the test set |" in readme and "stated 0.400, recomputed 0.500" in readme
    assert audit.main(["--root", str(tmp_path / "nowhere")]) == 2


def test_the_preserved_runs_of_this_project():
    """Counted by hand from the first experiments' documents and tables."""
    result = audit.run_audit(PROJECT / "preserved_data", PROJECT)
    assert not result.broken, [f"{v.claim['id']}: {v.why}" for v in result.broken]
    assert result.problems == []
    by_id = {v.claim["id"]: v for v in result.verdicts}
    assert by_id["man-p1-final"].verdict == "agrees" and by_id["man-p1-below-target"].verdict == "agrees"
    assert by_id["man-B-below-p1"].verdict == "not supported at this n"
    assert by_id["log-B-peak"].found == "0.710" and by_id["man-C-rope-adds"].opposite
    assert by_id["man-O-answered"].opposite and by_id["log-oom-step"].verdict == "cannot be checked"
    found = {}
    for finding in result.findings:
        found.setdefault(finding.kind, []).append(finding)
    labels = [sorted(f.numbers["labels"]) for f in found["same configuration, different labels"]]
    assert ["ablB", "ablC", "phase1", "phase1_full"] in labels
    ends = [sorted(f.numbers["scores"].values()) for f in found["replicates"]]
    assert [0.625, 0.645, 0.645, 0.655] in ends
    readme = (PROJECT / "preserved_data" / "README.md").read_text()
    assert audit.as_markdown(result)["findings"] in readme, "run `bridgekit audit --update-readme`"


def test_the_audit_imports_no_torch():
    program = "import sys, bridgekit.audit.report, bridgekit.results.preserve; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT).returncode == 0
