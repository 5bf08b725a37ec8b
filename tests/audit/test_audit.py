"""The audit: each fault is found in runs made to have it, and in no others; the data alone judge claims.

What it says of the kept runs, word for word, stands in preserved_data/README.md: the last test compares.

python -m pytest tests/audit/test_audit.py
"""

import gzip
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
from bridgekit.audit.keep import keep_run, write_manifest

A, B = "treatment_20251116_201212", "control_20251117_013909"
PROJECT = Path(__file__).parents[2]
FINAL = "phase1_all_fix/eval_samples_step_final.jsonl"


def records_of(*folders):
    return claims.Records((record.name, record) for record in map(load_run, folders))


def find(*folders):
    """{kind: texts} of all findings."""
    found = {}
    for finding in find_all(records_of(*folders)):
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


def test_a_sound_run_is_not_accused(tmp_path):
    # the final evaluation repeats the best step's answers; then validation and test items differ
    run = write_run(tmp_path, A, BRIDGED | {"final": [0, 1, 2, 3]})
    found = find(run)
    assert "all 8 items" in found["selection on the test set"][0]
    assert not {"best checkpoint is not the best", "the same weights score differently"} & set(found)
    write_jsonl(run / FINAL, [row | {"index": row["index"] + 500} for row in evaluation([0, 1, 2])])
    assert not {"selection on the test set", "the same weights score differently"} & set(find(run))


def test_baselines_and_crashes(tmp_path):
    swapped = {"source_model": "org/Target", "target_model": "org/Source"}
    one, two = write_run(tmp_path, A, BRIDGED), write_run(tmp_path, B, BRIDGED, settings=swapped, world=1, crash=OOM)
    for path in two.glob("*/eval*.jsonl"):
        write_jsonl(path, evaluation([0], source_right=range(7), target_right=range(4)))
    found = find(one, two)
    start = "org/Target alone: 0.750 as target on 4 GPU (1 runs) and 0.875 as source on 1 GPU"
    assert any(text.startswith(start) for text in found["baselines differ"])
    assert "64 of 120 generated answers (53%)" in found["baselines generated again"][0]
    assert "main: decode_out = tgt_model(**decode_data), 77.6 GiB in use" in found["crash"][0]


# -- claims ---------------------------------------------------------------------------------------------------


def claim(value, measure, **more):
    return {"id": "c", "document": "d", "says": "s", "value": value, "measure": measure} | more


@pytest.mark.parametrize(("stated", "measure", "verdict", "words"), [
    (0.375, {"value": {"run": A}}, "agrees", "n = 8, 95% interval 0.137 to 0.694"),
    (0.38, {"value": {"run": A}}, "differs", "stated 0.380, recomputed 0.375"),
    (0.25, {"value": {"run": A, "pick": "max", "to": 20}}, "agrees", ""),
    (0.75, {"value": {"run": A, "column": "union"}}, "agrees", ""),
    (-0.375, {"difference": {"run": A, "minus": {"column": "target"}}}, "agrees", "n = 8"),
    (0.625, {"value": {"run": A, "label": "203"}}, "agrees", ""),
    ("attention", {"fact": {"run": A, "key": "dit_pool"}}, "differs", "stated attention, recorded mean"),
    (1.0, {"value": {"run": "gone_20250101_000000"}}, "cannot be checked", "is not preserved"),
    (1.0, {"value": {"run": A, "pick": 250}}, "cannot be checked", "has no evaluation of step 250"),
    (1.0, {"value": {"run": A, "column": "relay"}}, "cannot be checked", "no condition 'relay'"),
    (1.0, {"value": {"ran": A}}, "cannot be checked", "measure 'value'"),
    (1.0, {"fact": {"run": A, "key": "prompt_alignment_weight"}}, "cannot be checked", "no record of"),
])  # fmt: skip
def test_verdicts_on_values(tmp_path, stated, measure, verdict, words):
    result = claims.judge(claim(stated, measure), records_of(write_run(tmp_path, A, BRIDGED)))
    assert result.verdict == verdict and words in result.why


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


def test_the_exit_code_protects_what_was_preserved(tmp_path, capsys):
    root = tmp_path / "preserved_data"
    kept = [keep_run(write_run(tmp_path, name, BRIDGED), root, max_jsonl_mb=0) for name in (A, B)]
    write_manifest(root)
    assert audit.main(["--root", str(root)]) == 0
    name = "outcomes.csv.gz"
    whole, other = (kept[0] / name).read_bytes(), (kept[1] / "losses.csv").read_bytes()
    (kept[0] / name).write_bytes(gzip.compress(gzip.decompress(whole).replace(b"final,1,101,101", b"final,1,101,102")))
    assert audit.main(["--root", str(root)]) == 1
    (kept[0] / name).write_bytes(whole)
    (kept[1] / "losses.csv").write_bytes(b"step,loss\nx,y\n")  # text in a cell
    (kept[1] / "checksums.json").rename(tmp_path / "checksums.json")
    assert audit.main(["--root", str(root)]) == 1
    (kept[1] / "losses.csv").write_bytes(other)
    (tmp_path / "checksums.json").rename(kept[1] / "checksums.json")
    (kept[1] / "checksums.json").write_text("[]")
    assert audit.main(["--root", str(root)]) == 1
    shutil.rmtree(kept[1])
    assert audit.main(["--root", str(root)]) == 1
    out = capsys.readouterr().out
    for words in (f"{A}: {name} is not what was preserved", f"{B}: checksums.json is gone", "not a whole JSON object"):
        assert words in out
    assert f"first_experiments/{B}: gone, but README.md lists it" in out


def test_problems_found_at_import_travel_with_the_run(tmp_path):
    run, root = write_run(tmp_path, A, BRIDGED), tmp_path / "preserved_data"
    with (run / "phase1_all_fix" / "eval_samples_step_40.jsonl").open("a") as file:
        file.write('{"index": 3\n')
    kept = keep_run(run, root, max_jsonl_mb=0)
    problem = "eval_samples_step_40.jsonl: not a whole JSON object: cut off or binary (line 9; 1 in all)"
    assert load_run(kept).problems == [problem] and f"- note: {problem}" in (kept / "manifest.md").read_text()
    assert audit.run_audit(root).problems == [f"first_experiments/{A}: {problem}"]


def test_a_cut_best_evaluation_counts_only_what_both_have(tmp_path):
    run = write_run(tmp_path, A, BRIDGED)
    path = run / "phase1_all_fix" / "eval_samples_step_40.jsonl"  # the best one
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    assert "with 4 of 8 answers" not in "".join(find(run)["best checkpoint is not the best"])
    assert "the same weights score differently" in find(run)


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
    assert "`own_seed1`, `own_seed2` | 2 replicates end at" in readme.split("### Replicates of healthy runs")[1]
    assert "&lt;b>peak&lt;/b> \\| more" in readme and "| selection on the test set |" in readme
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
