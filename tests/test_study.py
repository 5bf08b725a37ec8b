"""Studies: what is planned, and what is refused before anything runs.

python -m pytest tests/test_study.py
"""

import json
from pathlib import Path

import pytest
import yaml
from conftest import NEW_STUDIES, TINY

from bridgekit.config import ConfigError, load_config, to_flat
from bridgekit.runs import create_run, load_run_config, open_study, same_run, write_status
from bridgekit.study import Study, load_study, measure_headroom, plan_study, plan_swap
from bridgekit.study import main as study_verb
from bridgekit.tasks import check_positions, measure_prompts

ROOT = Path(__file__).parent.parent
VARIANTS = {"a": [], "b": ["lr=0.5"]}
TEACHER = ["teacher=prompt", "prompt_weight=1.0", "nll_weight=0.0", "n_soft_tokens=-1"]


@pytest.fixture
def study(tmp_path):
    """`study(variants=..., ...)` on a small base file."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    usual = {"name": "some", "base": str(tmp_path / "tiny.yaml"), "variants": VARIANTS, "seeds": [1, 2]}
    return lambda **changes: Study(**(usual | changes))


def test_runs_are_named_by_what_they_are(study):
    planned = plan_study(study(overrides=["steps=7"]), "some/runs")
    assert list(planned) == ["some_a_seed1", "some_a_seed2", "some_b_seed1", "some_b_seed2"]
    config = planned["some_b_seed2"]
    assert (config.run.name, config.run.seed, config.train.lr, config.train.steps) == ("b", 2, 0.5, 7)
    assert (config.run.runs_dir, config.run.cache_dir) == ("some/runs", "some/runs/.cache")
    assert list(plan_study(study(), keep=["b"])) == ["some_b_seed1", "some_b_seed2"]
    assert plan_study(study(), keep=[]) == {}


def test_a_grid_is_every_combination_of_every_variant(study):
    """The rest of the dialect stands in the goldens of plans: `after`, named values, pairs, replicates."""
    some = study(variants={"a": {}, "b": {"lr": 0.5}}, grid={"steps": [7, 8]})
    assert list(some.variants) == ["a_7", "a_8", "b_7", "b_8"] and some.variants["b_7"] == ["lr=0.5", "steps=7"]


def test_a_name_that_looks_like_a_number_stays_a_name(study):
    planned = plan_study(study(variants={}, grid={"depth": [1, 2]}), "007")
    assert [(one.run.name, one.run.runs_dir) for one in planned.values()][::2] == [("1", "007"), ("2", "007")]


def test_a_base_may_be_several_files_of_which_the_later_wins(study, tmp_path):
    (tmp_path / "more.yaml").write_text("notebook: phase1\nsteps: 9\noverrides: [lr=0.1]\n")
    (tmp_path / "most.yaml").write_text("steps: 11\noverrides: [batch_size=4]\n")
    base = [str(tmp_path / f"{name}.yaml") for name in ("tiny", "more", "most")]
    train = plan_study(study(base=base))["some_a_seed1"].train
    assert (train.steps, train.lr, train.batch_size) == (11, 0.1, 4)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(variants={"a": []}), ["at least two variants"]),
        (dict(variants=["a", "b"]), ["variants"]),
        (dict(variants={"a": [], "b/c": ["lr=0.5"]}), ["'b/c'", "letters"]),
        (dict(variants={"a": [], "b": "lr=0.5"}), ["variants.b", "list"]),
        (dict(variants={"a": [], "b": ["train.stps=3"]}), ["variants.b", "'train.steps'"]),
        (dict(variants={"a": {"after": "b"}, "b": {"lr": 0.5}}), ["variants.a.after", "'b'"]),
        (dict(variants={"a": [], "b": {"pair": "new"}}), ["variants.b.pair", "'new'"]),
        (dict(pairs={"new": {"seed": 3}}), ["pairs.new", "lexicon_seed"]),
        (dict(grid={"steps": 3}), ["grid"]),
        (dict(seeds=[]), ["seeds"]),
        (dict(seeds=[1, True]), ["seeds"]),
        (dict(seeds=[1, 1]), ["seeds", "once"]),
        (dict(reference="c"), ["reference", "'c'", "a, b"]),
        (dict(replicates={"c": "a"}), ["replicates", "'c'"]),
        (dict(variants={"a": [], "b": [], "c": []}, replicates={"b": "a", "c": "b"}), ["'b' is a replicate itself"]),
        (dict(replicates={"b": "a"}, reference="b"), ["reference", "'b'"]),
        (dict(variants={"a": [], "b": []}, replicates={"b": "a"}, seeds=[1, 101]), ["seed 101", "plus 100"]),
        (dict(overrides="lr=1"), ["overrides", "list"]),
        (dict(name="a b"), ["name"]),
        (dict(variants={"a": [], "b": ["lr=oops"]}), ["variants.b", "train.lr"]),
        (dict(base="none.yaml"), ["none.yaml"]),
        (dict(variants={"a": [], "big": ["n_soft_tokens=990"]}), ["variants.big", "990 soft tokens", "has 1024"]),
        (dict(variants={"a": [], "b": ["source_model=/none/here"]}), ["variants.b", "/none/here"]),
    ],
)
def test_what_cannot_be_compared_or_run_is_refused_before_anything_runs(study, changes, named):
    refuse(lambda: plan_study(study(**changes)), *named)


def refuse(call, *named: str) -> None:
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in named), message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("variants: {a: [], b: []}", ["base"]),
        ("base: x.yaml", ["variants"]),
        ("base: x.yaml\nvariant: {}", ["'variant'"]),
        ("base: x.yaml\nvariants: {a: []}", ["some.yaml", "at least two"]),
        ("runs: [", ["some.yaml", "YAML"]),
    ],
)
def test_a_mistaken_file_is_refused(tmp_path, text, named):
    (tmp_path / "some.yaml").write_text(text)
    refuse(lambda: load_study(tmp_path / "some.yaml"), *named)


@pytest.mark.parametrize(
    "own",
    [
        [],
        ["run.name=other", "runs_dir=elsewhere", "run.seed=7"],
        ["kl_tokens=20", "dit_steps_eval=9", "soft_position=question"],
        ["controls=[constant]", "eval_samples=8", "conditions=[source, target, bridged, zero]"],
    ],
)
def test_variants_that_amount_to_the_same_are_refused_unless_declared(study, own):
    named = "'a' and 'b' are the same experiment", "replicates: {b: a}"
    refuse(lambda: plan_study(study(variants={"a": [], "b": own})), *named)
    assert plan_study(study(variants={"a": [], "b": own}, replicates={"b": "a"}))  # declared, it may run


@pytest.mark.parametrize(
    ("shared", "own"),
    [(["kl_weight=0.1"], ["kl_tokens=20"]), ([], ["soft_position=end"])],
)
def test_variants_that_differ_in_effect_are_planned(study, shared, own):
    assert len(plan_study(study(overrides=shared, variants={"a": [], "b": own}))) == 4
    with pytest.raises(ConfigError, match=f"'b' is no replicate of 'a': .*{own[0].split('=')[0]}"):
        plan_study(study(overrides=shared, variants={"a": [], "b": own}, replicates={"b": "a"}))


@pytest.mark.parametrize("name", NEW_STUDIES)
def test_a_study_is_planned(name, monkeypatch):
    """The others of parameters/studies have goldens."""
    monkeypatch.chdir(ROOT)
    if name.endswith("h100_node"):  # neither its models nor its questions are here
        monkeypatch.setattr("bridgekit.study.check_inputs", lambda config: None)
        monkeypatch.setattr("bridgekit.study.measure_prompts", lambda config: None)
    some = load_study(f"parameters/studies/{name}.yaml")
    assert len(plan_study(some)) == len(some.variants) * len(some.seeds) > 3


def test_a_dry_run_lists_what_is_due_and_makes_nothing(tmp_path, capsys):
    study_verb(
        ["parameters/studies/facts.yaml", "--runs-dir", str(tmp_path), "--only", "learned", "local", "--dry-run"]
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[3].split() == ["due", "facts_local_seed1", "bridge.queries=local"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({}, 1024 - 1 - 40 - 24),
        (dict(prompt_mode="soft_only"), 1024 - 1 - 16 - 24),  # the literal prompt is left out
        (dict(prompt_mode="soft_only", train_prompt_mode="soft_plus_text"), 1024 - 1 - 40 - 24),
        (dict(injector="prefix+residual"), 1024 - 1 - 40 - 24),
        (dict(injector="residual"), 2048),  # takes no positions
    ],
)
def test_positions_are_counted_by_what_the_target_reads(changes, most):
    check_positions(load_config(**TINY | changes | {"n_soft_tokens": most}), 1024, 40, 640)
    if most < 2048:
        with pytest.raises(ConfigError, match=f"{most + 1} soft tokens"):
            check_positions(load_config(**TINY | changes | {"n_soft_tokens": most + 1}), 1024, 40, 640)


def test_a_prompt_that_fits_no_target_is_refused_whatever_the_bridge():
    with pytest.raises(ConfigError, match="eval.max_new_tokens: 1010 prompt tokens"):
        check_positions(load_config(**TINY, injector="residual", prompt_mode="soft_only"), 1024, 1010, 10)
    check_positions(load_config(**TINY | {"n_soft_tokens": -1}), 1024, 40, 940)
    with pytest.raises(ConfigError, match="983 soft tokens"):  # with the source's own answer, up to 24 tokens more
        config = load_config(**TINY | {"n_soft_tokens": -1, "source_view": "solution"})
        check_positions(config, 1024, 40, 958)
    assert measure_prompts(load_config(source_model="somebody/some-model")) is None  # it is measured when it is there


def swapped(*overrides: str, teacher: list[str] | None = None, **values) -> dict:
    config = load_config(overrides=overrides, **(TINY | {"name": "some", "seed": 3} | values))
    return plan_swap(config, TEACHER if teacher is None else teacher)


def test_the_lexicons_of_a_headline_are_its_commit_s_and_nobody_s_choice(study):
    commit = "0123" + "abcd" * 9
    pairs = {"p1": {"lexicon_seed": 0x0123}, "p2": {"lexicon_seed": 0xABCD}}
    changes = {"variants": {"a": {}, "b": {"lr": 0.5}}, "grid": {"pair": ["p1", "p2"]}}
    drawn = study(pairs=pairs, drawn_from=commit, **changes)
    assert drawn.pair_of == {f"{name}_{pair}": pair for name in "ab" for pair in pairs}
    for other in ({"p1": {"lexicon_seed": 0x0124}}, dict(reversed(pairs.items()))):
        with pytest.raises(ConfigError, match=r"pairs: lexicon seeds \[\d+.*drawn_from gives \[291, 43981.*commit"):
            study(pairs=other, drawn_from=commit, **changes | {"grid": {"pair": list(other)}})
    with pytest.raises(ConfigError, match="drawn_from: expected the 40 digits"):
        study(pairs=pairs, drawn_from="HEAD", **changes)


def test_the_kept_headline_is_what_its_file_says():
    """Every run that was planned is kept, on the lexicon drawn for it, and every pair's record is that of its runs."""
    planned = plan_study(load_study(ROOT / "parameters/studies/headline_fresh.yaml"))
    kept = {folder.name: folder for folder in open_study("headline_fresh", ROOT / "preserved_data/studies").iterdir()}
    pairs = json.loads((ROOT / "preserved_data/studies/headline_fresh_pairs.json").read_text())
    study = load_study(ROOT / "parameters/studies/headline_fresh.yaml")
    assert set(kept) == set(planned) and pairs["drawn_from"] == study.drawn_from
    for name, folder in kept.items():
        assert same_run(load_run_config(folder), planned[name])
        pair = study.pair_of[name.removeprefix("headline_fresh_").rsplit("_", 1)[0]]
        seed = json.loads((folder / "provenance.json").read_text())["lexicon_seed"]
        assert seed == study.pairs[pair]["lexicon_seed"] == pairs["pairs"][pair]["lexicon_seed"]


def test_the_arms_of_a_swap_differ_in_what_they_are_named_for():
    plan = swapped("train.controls=[constant]")
    assert list(plan) == [f"some_{arm}_seed3" for arm in ("forward", "swapped", "literal_kept", "soft_only")]
    forward, back, kept, alone = map(to_flat, plan.values())
    assert {k for k in forward if forward[k] != back[k]} == {"run.name", "pair.direction"}
    assert {k for k in kept if kept[k] != alone[k]} == {"run.name", "bridge.prompt_mode"}
    assert [c.bridge.prompt_mode for c in plan.values()] == ["soft_plus_text"] * 3 + ["soft_only"]
    assert [c.train.controls for c in plan.values()] == [("constant",)] * 2 + [()] * 2
    assert [c.run.name for c in plan.values()] == [name.removesuffix("_seed3") for name in plan]
    assert (alone["bridge.teacher"], alone["loss.prompt_weight"], alone["loss.nll_weight"]) == ("prompt", 1.0, 0.0)


@pytest.mark.parametrize(
    ("teacher", "named"),
    [
        (["teacher=prompt"], "prompt_teacher"),
        ([*TEACHER, "prompt_mode=soft_only"], "bridge.prompt_mode"),
        ([*TEACHER, "pair.direction=forward"], "pair.direction"),
        (["teachr=prompt"], "teacher"),
        (["flow_weight=0.1", "teacher=prompt"], "loss.flow_weight"),  # TINY's resampler has no flow
    ],
)
def test_a_prompt_teacher_that_teaches_nothing_is_refused(teacher, named):
    with pytest.raises(ConfigError, match=named):
        swapped(teacher=teacher)


def test_headroom_that_is_there_is_kept_and_another_configuration_s_is_refused(tmp_path):
    plan = swapped()
    for name in list(plan)[:2]:
        folder = create_run(plan[name], tmp_path / name)
        (folder / "headroom.jsonl").write_text("measured\n")
        write_status(folder, state="finished" if "forward" in name else "running")
    files = measure_headroom(plan, tmp_path)
    assert [path.read_text() for path in files.values()] == ["measured\n"] * 2
    assert [path.parent.name for path in files.values()] == list(plan)[:2]
    with pytest.raises(ConfigError, match="some_forward_seed3.* is finished with another configuration"):
        measure_headroom(swapped(lr=0.5), tmp_path)
    assert [path.read_text() for path in files.values()] == ["measured\n"] * 2
