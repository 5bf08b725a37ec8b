"""The audit: each fault is found in runs made to have it, and in no others; the data alone judge claims.

python -m pytest tests/audit/test_audit.py
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from first_generation import BRIDGED, OOM, evaluation, write_jsonl, write_own, write_run

from bridgekit.audit import claims
from bridgekit.audit import report as audit
from bridgekit.audit.findings import find_all
from bridgekit.audit.first_runs import load_run
from bridgekit.audit.keep import keep_run

A, B = "treatment_20251116_201212", "control_20251117_013909"
PROJECT = Path(__file__).parents[2]
FINAL = "phase1_all_fix/eval_samples_step_final.jsonl"


def records_of(*folders):
    return claims.Records((record.name, record) for record in map(load_run, folders))


def find(*folders, verdicts=()):
    """{kind: texts} of all findings."""
    found = {}
    for finding in find_all(records_of(*folders), verdicts):
        found.setdefault(finding.kind, []).append(finding.text)
    return found


# -- findings -------------------------------------------------------------------------------------------------


def test_one_configuration_under_two_labels(tmp_path):
    one = write_run(tmp_path, A, BRIDGED, settings={"decode_interval": 200})
    found = find(one, write_run(tmp_path, B, BRIDGED, settings={"decode_interval": 50}))
    (text,) = found["same configuration, different labels"]
    assert "the configurations are identical" in text
    assert "decode_interval (200, 50) without effect; trained parameters: 60.9M" in text
    assert "2 replicates end at 0.375, 0.375" in found["replicates"][0]
    for i, change in enumerate([{"dit_pool": "attention"}, {"decode_loss_weight": 0.1}, {"soft_tokens": 64}, {}]):
        other = write_run(tmp_path / str(i), B, BRIDGED, settings=change, world=4 if change else 1)
        found = find(one, other)  # a setting with an effect, or another number of processes
        assert "same configuration, different labels" not in found and "replicates" not in found
    # under one label, or with another seed, replicates are no mislabelled treatments
    found = find(one, write_run(tmp_path, "treatment_20251120_101010", BRIDGED))
    assert "same configuration, different labels" not in found and "replicates" in found
    found = find(one, write_run(tmp_path / "seed", B, BRIDGED | {"final": [0, 1, 2, 3, 4]}, settings={"seed": 5}))
    assert "same configuration, different labels" not in found and "0.375, 0.625" in found["replicates"][0]


def test_best_checkpoint_selection_and_changed_answers(tmp_path):
    found = find(write_run(tmp_path, A, BRIDGED))
    best = found["best checkpoint is not the best"][0]
    assert "kept as best: step 40 with 0.500; evaluated at the end: 0.375, with 6 of 8" in best
    assert "all 8 items" in found["selection on the test set"][0]
    assert "answers moved since step 60 (0.375 to 0.375)" in found["the same weights score differently"][0]
    # a sound run: the final evaluation repeats the best step's answers; then validation and test items differ
    run = write_run(tmp_path / "sound", A, BRIDGED | {"final": [0, 1, 2, 3]})
    assert not {"best checkpoint is not the best", "the same weights score differently"} & set(find(run))
    write_jsonl(run / FINAL, [row | {"index": row["index"] + 500} for row in evaluation([0, 1, 2])])
    assert not {"selection on the test set", "the same weights score differently"} & set(find(run))


def test_baselines_harms_and_crashes(tmp_path):
    swapped = {"source_model": "org/Target", "target_model": "org/Source"}
    one, two = write_run(tmp_path, A, BRIDGED), write_run(tmp_path, B, BRIDGED, settings=swapped, world=1)
    for path in two.glob("*/eval*.jsonl"):
        write_jsonl(path, evaluation([0], source_right=range(7), target_right=range(4)))
    start = "org/Target alone: 0.750 as target on 4 GPU (1 runs) and 0.875 as source on 1 GPU"
    assert any(text.startswith(start) for text in find(one, two)["baselines differ"])
    run = write_run(tmp_path / "other", A, {"0": [], "20": [], "final": []}, crash=OOM)
    for path in run.glob("*/eval*.jsonl"):
        write_jsonl(path, evaluation([], target_right=range(8)))
    found = find(run)
    assert "32 of 72 generated answers (44%)" in found["baselines generated again"][0]
    assert "bridged is 1.000 below the target alone" in found["the bridge harms"][0]
    assert "main: decode_out = tgt_model(**decode_data), 77.6 GiB in use" in found["crash"][0]


# -- claims ---------------------------------------------------------------------------------------------------


def claim(value, measure, **more):
    return {"id": "c", "document": "d", "says": "s", "value": value, "measure": measure} | more


@pytest.mark.parametrize(("stated", "measure", "verdict", "words"), [
    (0.375, {"value": {"run": A}}, "agrees", "n = 8, 95% interval 0.137 to 0.694"),
    (0.38, {"value": {"run": A}}, "differs", "stated 0.380, recomputed 0.375"),
    (0.5, {"value": {"run": A, "pick": "max"}}, "agrees", ""),
    (40, {"value": {"run": A, "pick": "idxmax"}}, "agrees", ""),
    (0.125, {"value": {"run": A, "pick": "fall"}}, "agrees", ""),
    (0.25, {"value": {"run": A, "pick": "min", "from": 20}}, "agrees", ""),
    (0.25, {"value": {"run": A, "pick": "max", "to": 20}}, "agrees", ""),
    (0.75, {"value": {"run": A, "column": "target", "pick": 20}}, "agrees", ""),
    (0.75, {"value": {"run": A, "column": "union"}}, "agrees", ""),
    (-0.375, {"difference": {"run": A, "minus": {"column": "target"}}}, "agrees", "n = 8"),
    (0, {"fact": {"run": A, "key": "settings", "other": A}}, "agrees", ""),
    (0.625, {"value": {"run": A, "label": "203"}}, "agrees", ""),
    ("attention", {"fact": {"run": A, "key": "dit_pool"}}, "differs", "stated attention, recorded mean"),
    (4, {"fact": {"run": A, "key": "world_size"}}, "agrees", ""),
    (60, {"fact": {"run": A, "key": "last_step"}}, "agrees", ""),
    (1.0, {"value": {"run": "gone_20250101_000000"}}, "cannot be checked", "is not preserved"),
    (1.0, {"value": {"run": A, "pick": 250}}, "cannot be checked", "has no evaluation of step 250"),
    (1.0, {"value": {"run": A, "column": "relay"}}, "cannot be checked", "no condition 'relay'"),
    (1.0, {"value": {"ran": A}}, "cannot be checked", "measure 'value'"),
    (1.0, {"fact": {"run": A, "key": "prompt_alignment_weight"}}, "cannot be checked", "no record of"),
])  # fmt: skip
def test_verdicts_on_values(tmp_path, stated, measure, verdict, words):
    result = claims.judge(claim(stated, measure), records_of(write_run(tmp_path, A, BRIDGED)))
    assert result.verdict == verdict and words in result.why


def difference_of(folder, right, other, stated, **more):
    """The verdict on a difference between two runs with n = 400."""
    runs = [write_run(folder, name, {"final": []}) for name in (A, B)]
    for run, indices in zip(runs, (right, other), strict=True):
        write_jsonl(run / FINAL, evaluation(indices, n=400))
    between = {"difference": {"run": A, "minus": {"run": B}}}
    return claims.judge(claim(stated, between, effect=True, **more), records_of(*runs))


def test_a_difference_needs_a_large_enough_n(tmp_path):
    near, far = (range(200), [*range(193), 399]), (range(200), range(100))
    small = difference_of(tmp_path / "1", *near, 0.015)
    assert small.verdict == "not supported at this n"
    assert "n = 400" in small.why and "p = 0.07" in small.why and "needs n = " in small.why
    wrong_way = difference_of(tmp_path / "2", *near, -0.015)
    assert (wrong_way.verdict, wrong_way.opposite) == ("differs", True)
    assert difference_of(tmp_path / "3", *near, 0, relation="<").opposite
    assert difference_of(tmp_path / "4", *far, 0.25).verdict == "agrees"
    assert difference_of(tmp_path / "5", *far, 0.20).verdict == "differs"


def test_a_count_that_fits_its_complement_is_the_opposite(tmp_path):
    run = write_run(tmp_path, A, {"final": []})
    write_jsonl(run / FINAL, evaluation(range(6), other="[invalid]"))
    result = claims.judge(claim(2, {"answered": {"run": A}}), records_of(run))
    assert result.opposite and "stated 2, recomputed 6" in result.why
    assert not claims.judge(claim(3, {"answered": {"run": A}}), records_of(run)).opposite


def test_two_documents_with_two_values(tmp_path):
    run = write_run(tmp_path, A, BRIDGED)
    peak = {"value": {"run": A, "pick": "max"}}
    stated = [claim(0.5, peak, document="one"), claim(0.4, peak, document="two")]
    found = find(run, verdicts=[claims.judge(c, records_of(run)) for c in stated])
    assert found["documents disagree"] == ["one 0.5 and two 0.4 for the same quantity; recomputed 0.500"]


@pytest.mark.parametrize(("text", "message"), [
    ("claims: [", "not valid YAML"),
    ("claims: {a: 1}", "expected a list of claims"),
    ("claims: [{id: x, document: d, says: s, value: 1}]", "claim x: give either 'measure' or 'missing'"),
    ("claims: [{id: x, document: d, says: s, measure: {value: {}}}]", "claim x: no 'value'"),
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


# -- the verb -------------------------------------------------------------------------------------------------


def test_damage_is_reported_and_the_other_runs_are_audited(tmp_path):
    root, own = tmp_path / "preserved_data", "resampler_20261120_101500"
    kept = keep_run(write_run(tmp_path, A, BRIDGED), root, max_jsonl_mb=0)
    other = keep_run(write_run(tmp_path, B, BRIDGED), root, max_jsonl_mb=0)
    (other / "outcomes.csv.gz").write_bytes(b"")
    shutil.copytree(kept, root / "copies" / A)
    write_own(root / own, metrics="\x00\x01\n")
    (root / "broken_20260101_000000").mkdir()
    (root / "broken_20260101_000000" / "run.json").write_text("{")
    before = {p: p.read_bytes() for p in root.rglob("*") if p.is_file()}
    result = audit.run_audit(root)
    problems = "\n".join(result.problems)
    assert f"first_experiments/{B}: cannot be read: " in problems
    assert f"first_experiments/{A}: the name '{A}' is also that of copies/{A}; only that one is used" in problems
    assert f"{own}: metrics.jsonl: line 3 is no JSON object" in problems
    assert "broken_20260101_000000: " in problems
    assert {A, own} == set(result.records)
    assert {p: p.read_bytes() for p in root.rglob("*") if p.is_file()} == before


def test_every_form_gives_the_same_verdicts_and_the_readme_folds_its_claims(tmp_path, capsys):
    root = tmp_path / "preserved_data"
    keep_run(write_run(tmp_path, A, BRIDGED), root)
    rows = [claim(0.4, {"value": {"run": A, "pick": "max"}}, document="log", says="<b>peak</b> | more")]
    (root / "claims.yaml").write_text(yaml.safe_dump({"documents": {"log": "The log"}, "claims": rows}))
    for seed in (1, 2):
        write_own(root / f"own_seed{seed}", config=f"run: {{seed: {seed}}}\n")
    assert audit.main(["--root", str(root), "--format", "html", "--output", str(tmp_path / "a.html")]) == 0
    page = (tmp_path / "a.html").read_text()
    assert "&lt;b&gt;peak&lt;/b&gt; | more" in page and "stated 0.400, recomputed 0.500" in page
    assert audit.main(["--root", str(root), "--format", "json", "--output", str(tmp_path / "a.json")]) == 0
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["counts"]["differs"] == 1 and content["claims"][0]["found"] == "0.500"
    assert audit.main(["--root", str(root), "--update-readme"]) == 0
    assert "CLAIMS: differs (1)" in capsys.readouterr().out
    readme = (root / "README.md").read_text()
    faults, healthy = readme.split("### Replicates of healthy runs")
    assert "| selection on the test set |" in faults and "own_seed1" not in faults.split("### Findings in the runs")[1]
    assert "`own_seed1`, `own_seed2` | 2 replicates end at" in healthy
    folded = readme.split("<details><summary>differs: 1 claims</summary>")[1].split("</details>")[0]
    assert "<b>peak</b> \\| more" in folded and "stated 0.400, recomputed 0.500" in folded
    with pytest.raises(ValueError, match="no such folder"):
        audit.main(["--root", str(tmp_path / "nowhere")])


def test_the_preserved_runs_of_this_project():
    """Counted by hand from the first experiments' documents and tables."""
    result = audit.run_audit(PROJECT / "preserved_data")
    assert result.problems == []
    by_id = {v.claim["id"]: v for v in result.verdicts}
    assert by_id["log-B-peak"].found == "0.710" and by_id["man-C-rope-adds"].opposite
    assert by_id["man-O-answered"].opposite and by_id["log-oom-step"].verdict == "cannot be checked"
    labels = [f.numbers["labels"] for f in result.findings if f.kind == "same configuration, different labels"]
    assert ["ablB", "ablC", "phase1", "phase1_full"] in labels
    ends = [sorted(f.numbers["scores"].values()) for f in result.findings if f.kind == "replicates"]
    assert [0.625, 0.645, 0.645, 0.655] in ends
    readme = (PROJECT / "preserved_data" / "README.md").read_text()
    assert audit.format_audit(result, "markdown") in readme, "run `bridgekit audit --update-readme`"
