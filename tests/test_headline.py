"""The tables of the paper come out of the kept runs, and say what the claim rule and a count by hand say.

python -m pytest tests/test_headline.py
"""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from figure_frames import mark, span
from tokenizers import Tokenizer

from bridgekit.results import costs, headline, verdict
from bridgekit.results.capacity import said_value, said_values
from bridgekit.results.figures_runs import plot_costs
from bridgekit.results.figures_studies import plot_digits, plot_values
from bridgekit.results.variants import read_axis
from bridgekit.runs import find_eval, load_eval, read_run_config
from bridgekit.studies import open_study
from bridgekit.study import plan_study, read_study
from bridgekit.tasks import load_examples

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "preserved_data"


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(ROOT)  # studies are named by their parameter files


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return headline.read_digits(KEPT)


def test_recovery_of_a_run_is_that_of_its_evaluation():
    table = headline.read_recovery(root=KEPT)
    assert len(table) == 18 and table.groupby(["label", "producer"]).size().eq(3).all()
    row = table[(table["label"] == "lexicon 4") & (table["producer"] == "dit") & (table["seed"] == 2)].iloc[0]
    frame = load_eval(find_eval(KEPT / "headline_dit_fresh4_seed2"))
    rows = frame[(frame["group"] == "source_only") & (frame["novelty"] == "held_unit")]
    assert row.recovery == pytest.approx(rows["bridged_correct"].sum() / rows["target_told_correct"].sum())
    assert row.mix == frame[frame["novelty"] != "seen"]["bridged_correct"].mean()


def test_runs_with_and_without_a_folder_are_found_and_others_refused():
    assert list(headline.run_folders("headline_resampler", KEPT)) == [1, 2, 3]
    folders = headline.run_folders("compositions_dit_both", KEPT)
    assert list(folders) == [1, 2, 3] and folders[2].name == "compositions_dit_both_seed2"
    with pytest.raises(FileNotFoundError, match="no study of this name"):
        headline.load_runs("nothing_like_it", KEPT)
    with pytest.raises(FileNotFoundError, match="no run 'compositions_gru'"):
        headline.load_runs("compositions_gru", KEPT)


def test_the_main_table_has_every_composition_with_the_verdict_of_the_rule():
    table = headline.read_compositions(KEPT)
    assert len(table) == 10
    row = table[(table["injector"] == "kv") & (table["direction"] == "swapped")].iloc[0]
    frames = headline.load_runs("compositions_resampler_kv_swapped", KEPT)
    assert row.outcome == verdict.judge(list(frames.values()), seeds=list(frames)).outcome
    mixes = [frame[frame["novelty"] != "seen"] for frame in frames.values()]
    assert row.least_mix == min(mix["bridged_correct"].mean() for mix in mixes)
    assert row.self_bridge == pytest.approx(sum(mix["self_bridge_correct"].mean() for mix in mixes) / 3)
    for style in ("markdown", "latex"):
        assert f"{row.source_only_held_value:.3f}" in headline.format_compositions(table, style)


def test_only_what_passes_in_both_directions_is_named():
    base = {"injector": "prefix", "outcome": "transfers", "least_mix": 0.96}
    rows = [
        base | {"producer": name, "direction": direction} for name in "abcd" for direction in ("forward", "swapped")
    ]
    rows[2]["least_mix"] = 0.949
    rows[5]["outcome"] = "unproven"
    assert headline.passing_compositions(pd.DataFrame(rows[:-1])) == ["a x prefix"]


def test_digits_are_those_of_the_answers(digits):
    row = digits[digits["label"] == "resampler x prefix, forward"].iloc[0]
    frames = headline.load_runs("headline_resampler", KEPT).values()
    held = pd.concat([f[(f["group"] == "source_only") & (f["novelty"] == "held_value")] for f in frames])
    said = [said_value(text, family) for text, family in zip(held["bridged_full"], held["family"], strict=True)]
    right = [s is not None and s // 10 == v // 10 for s, v in zip(said, held["value"], strict=True)]
    assert row.tens_right == pytest.approx(sum(right) / len(right))
    assert (
        row.right == pytest.approx(held["bridged_correct"].mean()) and row.n_wrong == (~held["bridged_correct"]).sum()
    )


def test_the_figure_of_digits_shows_each_with_its_interval(digits):
    fig = plot_digits(digits)
    for row in digits.to_dict("records"):
        assert mark(fig, f"bar:{row['label']}").get_width() == row["right"]
        for digit in ("tens", "ones"):
            gid = f"{digit}:{row['label']}"
            assert mark(fig, f"point:{gid}").get_xdata()[0] == row[f"{digit}_right"]
            assert span(mark(fig, f"interval:{gid}")) == pytest.approx((row[f"{digit}_low"], row[f"{digit}_high"]))


@pytest.fixture(scope="module")
def values() -> pd.DataFrame:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return headline.read_values(KEPT)


def test_a_value_counts_as_taken_out_when_no_training_problem_had_it(values):
    folders = headline.run_folders("values_kv_values", KEPT)
    config = read_run_config(folders[1])
    met = {e.value for e in load_examples(replace(config, task=replace(config.task, n_train=4000)), 2, "train")}
    frames = headline.load_runs("values_kv_values", KEPT).values()
    parts = [f[(f["group"] == "source_only") & (f["novelty"] == "held_unit") & ~f["value"].isin(met)] for f in frames]
    row = values[(values["label"] == "resampler x kv, swapped") & (values["kind"] == "taken out")].iloc[0]
    assert row["n"] == len(parts[0]) > 100
    assert row.half_values == pytest.approx(sum(part["bridged_correct"].mean() for part in parts) / 3)
    assert row.difference == pytest.approx(row.half_values - row.all_values)


def test_the_figure_of_values_shows_both_trainings(values):
    fig = plot_values(values)
    for row in values.to_dict("records"):
        for arm in ("all_values", "half_values"):
            gid = f"{arm}:{row['kind']}:{row['label']}"
            assert mark(fig, f"point:{gid}").get_xdata()[0] == row[arm]
            assert span(mark(fig, f"interval:{gid}")) == pytest.approx((row[f"{arm}_low"], row[f"{arm}_high"]))


def test_what_a_message_holds_is_read_from_the_answers_and_its_own_facts():
    study, name = read_study("parameters/ablation_capacity.yaml"), "ablation_capacity_facts4_k16_seed2"
    planned, folder = plan_study(study), open_study("ablation_capacity", KEPT / "studies")
    frame, config = load_eval(find_eval(folder / name)), planned[name]
    row = read_axis(study, planned, {"facts4_k16": {2: frame}}, folder).iloc[0]
    notes = {e.id: e.facts for e in load_examples(config, 2, "test")}
    said = [f" is {value}." in notes[i] for i, value in zip(frame["id"], said_values(frame), strict=True)]
    assert len(frame) == 2000 and row.in_message == pytest.approx(sum(said) / 2000)
    assert row.recovery == pytest.approx(frame["bridged_correct"].sum() / frame["target_told_correct"].sum())


def test_costs_count_the_tokens_that_somebody_has_to_write():
    frame = load_eval(find_eval(KEPT / "headline_resampler_seed1"))
    pair = ROOT / "bridgekit" / "model" / "embedded_pair"
    table = costs.count_written([frame], pair).set_index("condition")
    held = frame[frame["novelty"] != "seen"]

    def written(who: str, column: str) -> float:
        tokenizer = Tokenizer.from_file(str(pair / who / "tokenizer.json"))
        return held[column].map(lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)).mean()

    assert table["tokens"]["bridged"] == pytest.approx(written("target", "bridged_full"))
    relay = written("source", "source_full") + written("target", "relay_full_full")
    assert table["tokens"]["relay_full"] == pytest.approx(relay)
    assert table["accuracy"]["router"] == pytest.approx(held["router_correct"].mean())
    fig = plot_costs(table.reset_index())
    for row in table.reset_index().itertuples():
        assert span(mark(fig, f"interval:{row.condition}")) == pytest.approx((row.low, row.high))
        assert abs(mark(fig, f"point:{row.condition}").get_xdata()[0] - row.tokens) < 4
