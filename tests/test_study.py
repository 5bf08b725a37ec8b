"""Studies: what is planned, what is refused before anything runs, and that intervals keep what they promise.

python -m pytest tests/test_study.py
"""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import TINY

from bridgekit.config import ConfigError, load_config
from bridgekit.headless import gather_parameters, read_defaults
from bridgekit.results import gains, variants
from bridgekit.results import statistics as stats
from bridgekit.runs import create_run, write_jsonl, write_status
from bridgekit.study import Study, check_positions, measure_prompts, plan_study, read_study, same_run, swept_keys

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "parameters").glob("ablation*.yaml"))


@pytest.fixture
def study(tmp_path):
    """`study(variants=..., ...)` on a small base file."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    def make(**changes) -> Study:
        usual = dict(name="some", base=str(tmp_path / "tiny.yaml"), variants={"a": [], "b": ["lr=0.5"]}, seeds=[1, 2])
        return Study(**(usual | changes))

    return make


def test_runs_are_named_by_what_they_are(study):
    planned = plan_study(study(overrides=["steps=7"]), "some/runs")
    assert list(planned) == ["some_a_seed1", "some_a_seed2", "some_b_seed1", "some_b_seed2"]
    config = planned["some_b_seed2"]
    assert (config.run.name, config.run.seed, config.train.lr, config.train.steps) == ("b", 2, 0.5, 7)
    assert (config.run.runs_dir, config.run.cache_dir) == ("some/runs", "some/runs/.cache")
    assert list(plan_study(study(), keep=["b"])) == ["some_b_seed1", "some_b_seed2"]
    assert plan_study(study(), keep=[]) == {}


def test_replicates_run_on_seeds_of_their_own(study):
    some = study(variants={"b": [], "a": [], "again": [], "c": ["lr=0.5"]}, replicates={"a": "b", "again": "b"})
    planned = plan_study(some)
    seeds = {v: [c.run.seed for n, c in planned.items() if n.startswith(f"some_{v}_")] for v in some.variants}
    assert seeds == {"b": [1, 2], "a": [101, 102], "again": [201, 202], "c": [1, 2]}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(variants={"a": []}), ["at least two variants"]),
        (dict(variants=["a", "b"]), ["variants"]),
        (dict(variants={"a": [], "b/c": ["lr=0.5"]}), ["'b/c'", "letters"]),
        (dict(variants={"a": [], "b": "lr=0.5"}), ["variants.b", "list"]),
        (dict(seeds=[]), ["seeds"]),
        (dict(seeds=[1, True]), ["seeds"]),
        (dict(seeds=[1, 1]), ["seeds", "once"]),
        (dict(reference="c"), ["reference", "'c'", "a, b"]),
        (dict(replicates={"c": "a"}), ["replicates", "'c'"]),
        (dict(replicates={"a": "c"}), ["replicates", "'c'"]),
        (dict(variants={"a": [], "b": [], "c": []}, replicates={"b": "a", "c": "b"}), ["'b' is a replicate itself"]),
        (dict(replicates={"b": "a"}, reference="b"), ["reference", "'b'"]),
        (dict(variants={"a": [], "b": []}, replicates={"b": "a"}, seeds=[1, 101]), ["seed 101", "plus 100"]),
        (dict(overrides="lr=1"), ["overrides", "list"]),
        (dict(name="a b"), ["name"]),
    ],
)
def test_what_is_no_study_is_refused(study, changes, named):
    with pytest.raises(ConfigError) as caught:
        study(**changes)
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in named), str(caught.value)


@pytest.mark.parametrize(
    "own",
    [
        [],
        ["run.name=other", "runs_dir=elsewhere"],
        ["run.seed=7"],
        ["kl_tokens=20"],
        ["decode_every=3", "decode_estimator=policy_gradient", "decode_tokens=9"],
        ["dit_steps_eval=9", "dit_condition=mean"],
        ["info_nce_temperature=0.5"],
        ["teacher=prompt"],
        ["n_facts=16"],
        ["vary_facts=true"],
        ["soft_position=question"],
        ["inject_layers='0'"],
        ["train_prompt_mode=soft_plus_text"],
        ["controls=[constant]", "eval_samples=8", "conditions=[source, target, bridged, zero]"],
    ],
)
def test_variants_that_amount_to_the_same_are_refused(study, own):
    with pytest.raises(ConfigError) as caught:
        plan_study(study(variants={"a": [], "b": own}))
    assert "'a' and 'b' are the same experiment" in str(caught.value)
    assert "replicates: {b: a}" in str(caught.value)
    assert plan_study(study(variants={"a": [], "b": own}, replicates={"b": "a"}))  # declared, it may run


@pytest.mark.parametrize(
    ("shared", "own"),
    [
        (["variant=context", "source_view=facts"], ["train_units_share=0.5", "train_values_share=0.5"]),
        (["variant=context", "source_view=facts", "n_facts=1"], ["vary_facts=true"]),
        (["n_soft_tokens=-1"], ["queries=local"]),
        (["producer=dit", "dit_condition=mean"], ["queries=local"]),
        (["producer=constant"], ["queries=local"]),
    ],
)
def test_settings_that_do_nothing_beside_others_make_no_variant(study, shared, own):
    with pytest.raises(ConfigError, match="'a' and 'b' are the same experiment"):
        plan_study(study(overrides=shared, variants={"a": [], "b": own}))


@pytest.mark.parametrize(
    ("shared", "own"),
    [
        (["kl_weight=0.1"], ["kl_tokens=20"]),
        (["decode_weight=0.1"], ["decode_every=3"]),
        (["decode_weight=0.1", "decode_estimator=policy_gradient"], ["decode_samples=8"]),
        (["producer=dit"], ["dit_steps_eval=9"]),
        (["prompt_weight=0.1", "prompt_mode=soft_plus_text"], ["teacher=prompt"]),
        (["producer=dit", "dit_tokens=teacher", "prompt_mode=soft_plus_text"], ["teacher=prompt"]),
        (["variant=context", "source_view=facts"], ["n_facts=16"]),
        (["variant=context", "source_view=facts"], ["vary_facts=true"]),
        ([], ["queries=local"]),
        ([], ["train_values_share=0.5"]),
        ([], ["soft_position=end"]),
        (["injector=residual"], ["inject_layers='0'"]),
        (["injector=residual", "producer=constant"], ["bridge.heads=4"]),
        ([], ["source_projection=true"]),
        ([], ["eval_every=1"]),
    ],
)
def test_variants_that_differ_in_effect_are_planned(study, shared, own):
    assert len(plan_study(study(overrides=shared, variants={"a": [], "b": own}))) == 4
    with pytest.raises(ConfigError, match=f"'b' is no replicate of 'a': .*{own[0].split('=')[0]}"):
        plan_study(study(overrides=shared, variants={"a": [], "b": own}, replicates={"b": "a"}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(variants={"a": [], "b": ["lr=oops"]}), ["variants.b", "train.lr"]),
        (dict(variants={"a": [], "b": ["train.stps=3"]}), ["variants.b", "'train.steps'"]),
        (dict(base="none.yaml"), ["none.yaml"]),
        (dict(variants={"a": [], "big": ["n_soft_tokens=990"]}), ["variants.big", "990 soft tokens", "has 1024"]),
    ],
)
def test_an_impossible_plan_is_refused_before_anything_runs(study, changes, named):
    with pytest.raises(ConfigError) as caught:
        plan_study(study(**changes))
    assert all(part in str(caught.value) for part in named), str(caught.value)


def test_positions_are_counted_as_training_counts_them(pair):
    """The largest number of soft tokens that fits is the same for both checks."""
    from bridgekit.tasks import load_examples
    from bridgekit.tasks.base import literal_prompt
    from bridgekit.train.data import check_fit

    config = load_config(**TINY)
    prompts = [literal_prompt(e) for s in ("val", "test") for e in load_examples(config, pair.lexicon_seed, s)]
    positions, longest, _ = measured = measure_prompts(config)
    most = positions - 1 - longest - config.eval.max_new_tokens
    for soft, fits in ((most, True), (most + 1, False), (-1, True)):
        for check in (lambda c: check_positions("a", c, measured), lambda c: check_fit(c, pair, prompts)):
            if fits:
                check(config.with_(n_soft_tokens=soft))
            else:
                with pytest.raises(ConfigError, match=f"{soft} soft tokens"):
                    check(config.with_(n_soft_tokens=soft))
    assert measure_prompts(config.with_(target_model="somebody/some-model")) is None


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_parameters_file_is_a_study(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("bridgekit.study.measure_prompts", lambda config: (1024, 40, 640))  # as measured, but at once
    some = read_study(path)
    planned = plan_study(some)
    assert some.name == path.stem and len(planned) == len(some.variants) * len(some.seeds)
    assert all({"source", "target", "bridged", "target_told"} <= set(c.eval.conditions) for c in planned.values())


def test_axes_of_the_sweeps(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("bridgekit.study.measure_prompts", lambda config: None)
    for name in ("compression", "capacity", "generalisation", "losses"):
        planned = plan_study(read_study(f"parameters/ablation_{name}.yaml"))
        assert variants.swept_axis(planned) == ("" if name == "losses" else name)
    capacity = plan_study(read_study("parameters/ablation_capacity.yaml"))
    assert swept_keys(capacity) == {"task.n_facts", "bridge.n_soft_tokens"}


def test_defaults_of_the_notebook_are_its_first_parameters_file():
    notebook = ROOT / "notebooks/ablation.ipynb"
    assert gather_parameters(notebook, ROOT / "parameters/ablation.yaml", {}, []) == read_defaults(notebook)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("variants: {a: [], b: []}", ["base"]),
        ("base: x.yaml", ["variants"]),
        ("base: x.yaml\nvariant: {}", ["'variant'"]),
        ("base: x.yaml\nvariants: {a: []}", ["some.yaml", "at least two"]),
    ],
)
def test_a_mistaken_file_is_refused(tmp_path, text, named):
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_study(tmp_path / "some.yaml")
    assert all(part in str(caught.value) for part in named), str(caught.value)


# -- what a study shows -------------------------------------------------------------------------------------


def make_frame(right, units, group="source_only", target=None):
    """An evaluation frame in which `bridged` is right where `right` says."""
    n = len(right)
    return pd.DataFrame({
        "id": [f"p{i:04d}" for i in range(n)], "unit": units, "group": group, "novelty": "held_unit",
        "bridged_correct": np.asarray(right, dtype=bool), "source_correct": True,
        "target_correct": np.zeros(n, dtype=bool) if target is None else target, "target_told_correct": True,
    })  # fmt: skip


@pytest.fixture
def runs():
    """`runs(a, b, seeds)`: two variants with these accuracies on 200 problems about 100 units."""

    def make(seeds=3, **shares):
        rng, units = np.random.default_rng(0), np.repeat(np.arange(100), 2)
        return {v: {s + 1: make_frame(rng.random(200) < p, units) for s in range(seeds)} for v, p in shares.items()}

    return make


def test_differences_are_paired_by_problem_and_seed(study, runs):
    found = runs(a=0.5, b=0.9, c=0.5)
    some = study(variants={"a": [], "b": ["lr=0.5"], "c": ["lr=0.6"]}, seeds=[1, 2, 3], reference="a")
    table = variants.compare_variants(some, found).set_index(["variant", "subset"])
    row = table.loc["b", "source_only_held_unit"]
    pairs = [(found["b"][s].bridged_correct.mean() - found["a"][s].bridged_correct.mean()) for s in (1, 2, 3)]
    assert row["by_seed"] == pytest.approx(pairs) and row["difference"] == pytest.approx(np.mean(pairs))
    assert row["holds"] and row["low"] > 0 and (row["n"], row["n_units"], row["n_seeds"]) == (200, 100, 3)
    assert not table.loc["c", "all"]["holds"] and table.loc["c", "all"]["smallest_effect"] > 0.1
    family = {str(i): p for i, p in enumerate(table["p"])}
    assert table["adjusted_p"].tolist() == list(stats.holm(family).values())
    strictest = variants.student_quantile(1 - 0.05 / 4 / 2, row["df"]) + variants.student_quantile(0.8, row["df"])
    assert row["smallest_effect"] == pytest.approx(strictest * row["deviation"])  # of four comparisons
    words = gains.describe_gains(some, table.reset_index())
    assert "**b**" in words and "better than 'a'" in words and "no difference shown" in words
    # rows in another order are the same problems
    found["b"][1] = found["b"][1].sample(frac=1, random_state=1)
    again = variants.compare_variants(some, found).set_index(["variant", "subset"])
    assert again.loc["b", "all"]["difference"] == table.loc["b", "all"]["difference"]


def test_a_missing_run_leaves_its_pair_out_and_other_problems_are_refused(study, runs):
    found = runs(a=0.5, b=0.9)
    del found["a"][2]
    some = study(seeds=[1, 2, 3], reference="a")
    assert set(variants.compare_variants(some, found)["n_seeds"]) == {2}
    del found["a"]
    empty = variants.compare_variants(some, found)
    assert empty.empty and "no finished run" in gains.describe_gains(some, empty)
    table = variants.tabulate_variants(some, found, empty, {})
    assert table["difference"].isna().all() and set(table["variant"]) == {"b"}
    found = runs(a=0.5, b=0.9)
    found["b"][1]["id"] = "q" + found["b"][1]["id"]
    with pytest.raises(ValueError, match="same problems"):
        variants.compare_variants(some, found)


def test_a_replicate_is_paired_with_its_own_seeds(study, runs):
    found = runs(b=0.5, c=0.9) | {"a": {s + 100: frame for s, frame in runs(x=0.5)["x"].items()}}
    some = study(variants={"b": [], "a": [], "c": ["lr=1.0"]}, replicates={"a": "b"}, reference="b", seeds=[1, 2, 3])
    table = variants.compare_variants(some, found)
    assert set(table.loc[table["variant"] == "a", "n_seeds"]) == {3}
    assert "a repeats b with other seeds" in gains.describe_gains(some, table)


def test_equal_answers_have_an_uncertain_difference_all_the_same():
    frame = make_frame(np.ones(200), np.arange(200))
    found = variants.pooled_difference([frame], [frame], "all")
    assert found["difference"] == 0 and 2 / 200 < found["high"] < 4 / 200 and found["p"] == 1


@pytest.mark.parametrize(("n_seeds", "deviation"), [(1, 0.0), (3, 0.0), (3, 0.05), (5, 0.1)])
def test_intervals_hold_for_other_problems_and_other_seeds(n_seeds, deviation):
    """The differences of a seed deviate; the interval must cover the true difference of 0.1 about 95 times in 100."""
    rng, hits, n = np.random.default_rng(1), 0, 300
    units = pd.Series(np.repeat(np.arange(75), 2))
    for _ in range(n):
        shift = 0.1 + deviation * rng.standard_normal(n_seeds)
        unit = np.repeat(rng.random((75, 1)), 2, axis=0) < 0.5  # half the units are right or wrong together
        draws = [np.where(unit, np.repeat(rng.random((75, 1)), 2, axis=0), rng.random((150, 1))) for _ in "ab"]
        values = (draws[0] < 0.6 + shift).astype(float) - (draws[1] < 0.6).astype(float)
        mean, error, df = variants._mean_and_deviation(values, units)
        hits += abs(mean - 0.1) <= variants.student_quantile(0.975, df) * error
    assert 0.91 <= hits / n <= 1.0, hits / n


def test_what_would_have_been_found_is_found_with_power_0_8():
    """Differences drawn around the smallest effect are significant four times in five."""
    rng, n, found = np.random.default_rng(2), 2000, 0
    error, df = 0.03, 200.0
    effect = (variants.student_quantile(0.975, df) + variants.student_quantile(0.8, df)) * error
    for value in effect + error * rng.standard_normal(n):
        found += abs(value) > variants.student_quantile(0.975, df) * error
    assert found / n == pytest.approx(0.8, abs=0.03)


def test_only_finished_runs_of_the_planned_configuration_are_read(study, tmp_path):
    some = study(seeds=[1])
    planned = plan_study(some, tmp_path)
    for name, config in planned.items():
        folder = create_run(config, tmp_path / name)
        row = {"id": "p", "unit": "u", "group": "both", "gold_extracted": "1"}
        said = {f"{c}_extracted": "1" for c in ("source", "target", "bridged")}
        write_jsonl(folder / "eval_samples_step_final.jsonl", [row | said])
        write_status(folder, state="finished", parameters=5)
    assert list(variants.read_runs(some, planned, tmp_path)) == ["a", "b"]
    write_status(tmp_path / "some_b_seed1", state="running")
    assert list(variants.read_runs(some, planned, tmp_path)) == ["a"]
    costs = variants.read_costs(some, planned, tmp_path)
    assert costs["a"]["parameters"] == 5 and math.isnan(costs["a"]["seconds"])
    other = plan_study(study(seeds=[1], overrides=["steps=9"]), tmp_path)
    assert variants.read_runs(some, other, tmp_path) == {}


def test_a_run_stays_the_same_when_it_is_moved(study):
    here, there = plan_study(study(), "runs"), plan_study(study(), "elsewhere")
    assert same_run(here["some_a_seed1"], there["some_a_seed1"])
    assert not same_run(here["some_a_seed1"], there["some_a_seed2"])


def test_train_units_are_counted_as_the_task_takes_them():
    from bridgekit.tasks import units

    for direction, share in (("forward", 0.2), ("swapped", 1.0)):
        config = load_config(direction=direction, train_units_share=share, n_train=20_000)
        lexicon = units.make_lexicon(2)
        lexicon = units.swap_roles(lexicon) if direction == "swapped" else lexicon
        examples = units.make_examples(lexicon, "train", 20_000, 1, share=0.9, train_units_share=share)
        met = {e.unit for e in examples if e.group == "source_only"}
        assert variants.count_train_units(config) == len(met)
