"""The claim rule branch by branch, headroom, recovery and the table, on frames with known rates.

python -m pytest tests/results/test_verdict.py
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bridgekit.results.statistics import minimum_detectable_effect, paired_difference, wilson
from bridgekit.results.verdict import headroom, judge

SOURCE = {"source_only": 0.97, "target_only": 0.04, "both": 0.97}
TARGET = {"source_only": 0.04, "target_only": 0.97, "both": 0.97}
BRIDGED = {"source_only": 0.90, "target_only": 0.96, "both": 0.97}
HALF = {"source_only": 0.7, "target_only": 0.96, "both": 0.97}
EVERYTHING = {"source_only": 0.97, "target_only": 0.97, "both": 0.97}
CONTROLS = ("constant", "shuffled", "self_bridge")


def make_frame(seed: int, n_units: int = 150, seen: int = 0, **rates: dict) -> pd.DataFrame:
    """Three problems a unit; the last `seen` units are those the bridge trained on."""
    rng, number = np.random.default_rng(seed), np.repeat(np.arange(n_units), 3)
    frame = pd.DataFrame({"id": [f"q{i}" for i in range(len(number))], "unit": [f"u{n}" for n in number]})
    groups = np.random.default_rng(0).choice(["source_only", "target_only", "both"], n_units, p=[0.3, 0.4, 0.3])
    frame["group"] = groups[number]  # every seed is asked the same problems
    held = np.where(number % 2, "held_value", "held_unit")
    frame["novelty"] = np.where(number >= n_units - seen, "seen", held)
    rates = {"source": SOURCE, "target": TARGET, "bridged": BRIDGED} | dict.fromkeys(CONTROLS, TARGET) | rates
    for condition, by_group in rates.items():
        right = rng.random(len(frame)) < frame["group"].map(by_group)
        frame[f"{condition}_correct"] = right
        frame[f"{condition}_extracted"] = np.where(right, "12", "[invalid]")
    return frame


def without(frame: pd.DataFrame, *conditions: str) -> pd.DataFrame:
    return frame.drop(columns=[f"{c}_{key}" for c in conditions for key in ("correct", "extracted")])


@pytest.fixture(scope="module")
def frames() -> list[pd.DataFrame]:
    return [make_frame(seed) for seed in (1, 2, 3)]


# -- the rule -----------------------------------------------------------------------------------------------


def test_a_bridge_that_beats_every_control_in_every_seed_transfers(frames):
    verdict = judge(frames, seeds=[7, 8, 9])
    assert verdict.passes and verdict.complete and verdict.outcome == "transfers"
    assert verdict.failed == verdict.not_run == verdict.not_applicable == []
    only = [f"{label} on source-only problems" for label in ("target", *CONTROLS)]
    asked = [(label, seed) for label in ("target", *CONTROLS, *only) for seed in (7, 8, 9)]
    assert [(c.label, c.seed) for c in verdict.comparisons] == asked
    assert verdict.text.startswith("The bridge transfers: in each of 3 training seeds it beats every control, on all ")
    assert "on all problems and on the source-only ones. Bridged" in verdict.text
    assert "on 450 problems about 150 units (95% intervals)" in verdict.text and "headline" not in verdict.text
    worst = min((c for c in verdict.comparisons if c.control == "target"), key=lambda c: c.difference.low)
    assert f"in the worst seed: target {worst.difference}; constant +0." in verdict.text
    assert worst.difference == paired_difference(frames[worst.seed - 7], "bridged", "target")


def test_the_first_experiment_harmed():
    """11 questions gained and 36 lost of 200, 129 right."""
    bridged = [True] * 129 + [False] * 71
    target = [False] * 11 + [True] * 118 + [True] * 36 + [False] * 35
    verdict = judge([pd.DataFrame({"bridged_correct": bridged, "target_correct": target})])
    (against_target,) = verdict.comparisons
    assert (against_target.difference.gained, against_target.difference.lost) == (11, 36)
    assert verdict.outcome == "harms" and "Bridged 0.645 [0.577, 0.708] on 200 questions" in verdict.text
    assert verdict.not_run == list(CONTROLS) and "Not run: constant, shuffled, self_bridge." in verdict.text


def test_without_groups_the_source_only_part_does_not_apply(frames):
    verdict = judge([frame.drop(columns=["group", "unit", "novelty"]) for frame in frames])
    assert verdict.passes and {c.subset for c in verdict.comparisons} == {"all"}
    assert "Not applicable: the source-only part" in verdict.text and "on 450 questions" in verdict.text


def test_what_was_seen_in_training_counts_nowhere():
    """A bridge that memorised its 60 train units beats everything on them, and it is no transfer."""
    memorised = make_frame(1, n_units=150, seen=60, bridged=TARGET)
    memorised.loc[memorised["novelty"] == "seen", "bridged_correct"] = True
    assert paired_difference(memorised, "bridged", "target").low > 0
    assert judge([memorised]).outcome == "fails"


def test_both_constants_must_be_beaten(frames):
    verdict = judge([make_frame(1, constant_natural=EVERYTHING)])
    assert [c.label for c in verdict.failed] == ["constant_natural", "constant_natural on source-only problems"]
    # the second constant is needed only where somebody trained one
    assert judge([make_frame(1, constant_natural=TARGET), frames[1]]).not_run == ["constant_natural (seed 2)"]


def with_selection(frame: pd.DataFrame, name: str, rates: dict, **controls) -> pd.DataFrame:
    """The frame with another selection of a trained control, and the record of all controls' steps."""
    other = make_frame(99, constant=rates)
    frame = frame.assign(**{f"{name}_{key}": other[f"constant_{key}"] for key in ("correct", "extracted")})
    frame.attrs = {"steps": 400} | ({"controls": controls} if controls else {})
    return frame


def test_each_selection_of_a_control_must_be_beaten(frames):
    beaten = judge([with_selection(frames[0], "constant.last", TARGET, constant={"mix": 200, "last": 400})])
    assert beaten.passes and "constant, last weights (weights of step 400) +0." in beaten.text
    steps = {(c.control, c.subset): c.step for c in beaten.comparisons}
    assert steps["constant", "all"] == 200 and steps["constant.last", "source_only"] == 400
    stronger = judge([with_selection(frames[0], "constant.source_only", EVERYTHING)])
    label = "constant, best on source-only validation"
    assert [c.label for c in stronger.failed] == [label, f"{label} on source-only problems"]
    assert stronger.outcome == "fails" and list(stronger.table()["holds"]).count("no") == 2


@pytest.mark.parametrize(("step", "trained"), [(199, False), (200, True)])  # of 400
def test_a_control_with_weights_from_before_half_of_training_was_not_run(frames, step, trained):
    verdict = judge([with_selection(frames[0], "constant.last", TARGET, self_bridge={"mix": step})])
    assert verdict.passes == trained and ("self_bridge" in {c.control for c in verdict.comparisons}) == trained
    assert verdict.not_run == ([] if trained else [f"self_bridge (not trained: weights of step {step})"])
    assert f"weights of step {step}" in verdict.text and ("not run" in set(verdict.table()["holds"])) != trained


def test_several_comparisons_at_the_edge_do_not_survive_holm():
    """Each interval is above zero, but three chances of 4% are not one."""
    n = 400
    bridged = np.arange(n) < 200
    frame = pd.DataFrame({"bridged_correct": bridged, "target_correct": np.zeros(n, bool)})
    for i, control in enumerate(CONTROLS):
        frame[f"{control}_correct"] = bridged
        frame.loc[20 * i : 20 * i + 19, f"{control}_correct"] = False
        frame.loc[200 + 20 * i : 207 + 20 * i, f"{control}_correct"] = True
    verdict = judge([frame])
    assert all(c.difference.low > 0 and c.difference.p < 0.05 for c in verdict.comparisons)
    assert {c.control for c in verdict.failed} == set(CONTROLS) and verdict.outcome == "fails"
    assert "but p after Holm 0.1" in verdict.text
    assert judge([frame.drop(columns=["shuffled_correct", "self_bridge_correct"])]).failed == []


def test_every_seeds_own_interval_must_lie_above_zero_and_holm_takes_the_largest_p(frames):
    verdict = judge([frames[0], make_frame(2, bridged=TARGET)])
    for control in ("target", "shuffled"):
        first, second = [c for c in verdict.comparisons if (c.control, c.subset) == (control, "all")]
        assert first.holds and not second.holds
        assert first.adjusted_p == second.adjusted_p >= max(first.difference.p, second.difference.p) > 0.05
    assert verdict.outcome == "fails" and "(seed 2 " in verdict.text and "(seed 1 " not in verdict.text


def test_rivals_stand_beside_the_rule(frames):
    rivals = {"relay_full": EVERYTHING, "router": TARGET, "target_told": HALF}
    verdict = judge([make_frame(seed, bridged=HALF, **rivals) for seed in (1, 2, 3)])
    assert verdict.passes and list(verdict.rivals) == ["target_told", "relay_full", "router", "union"]
    text = verdict.text[verdict.text.index("Rivals") :]
    win, beats = text.index("these win: relay_full -"), text.index("; the bridge beats: router")
    assert "union -" in text[win:beats] and "; undecided: target_told" in text


def test_right_where_neither_model_was(frames):
    frame, verdict = frames[0], judge(frames[:1])
    neither = frame[~frame["source_correct"] & ~frame["target_correct"]]
    (beyond,) = verdict.exact
    assert (beyond.n, beyond.point) == (len(neither), neither["bridged_correct"].mean())
    assert (
        f"Of the {len(neither)} problems that neither model had right, the bridge had {beyond} right." in verdict.text
    )
    assert judge([frame.assign(source_correct=True)]).exact == judge([without(frame, "source")]).exact == [None]


def test_a_verdict_is_json_and_a_table(frames):
    verdict = judge(frames)
    stored = json.loads(json.dumps(verdict.to_dict()))
    assert stored["passes"] is True and stored["text"] == verdict.text
    assert stored["comparisons"][0]["difference"]["n_clusters"] == 150
    table = verdict.differences()
    assert table["label"].is_unique and table["holds"].all() and len(table) == 24
    short = verdict.table().set_index("control")
    worst = min((c for c in verdict.comparisons if c.label == "target"), key=lambda c: c.difference.low)
    assert len(short) == 8 and short.loc["target", "bridged minus control"] == str(worst.difference)


def test_two_runs_that_answer_alike_are_not_taken_for_one(frames):
    """A kept run has no log-probabilities: its answers must show it, unless nearly all are right."""
    again = frames[0].sample(frac=1, random_state=0)
    right = frames[0].assign(bridged_correct=True, bridged_extracted="12")
    assert judge([right, right.copy()]).passes
    told_apart = [f.assign(bridged_logprob=p) for f, p in ((frames[0], -0.25), (again, -0.5))]
    assert len(judge(told_apart).seeds) == 2


def test_order_of_rows_and_names_of_units_change_nothing_and_folders_name_their_seeds():
    frame = make_frame(1, n_units=40)
    other = frame.sample(frac=1, random_state=5).assign(unit=lambda rows: "x" + rows["unit"].str[::-1])
    assert judge([other]).text == judge([frame]).text and headroom(other).text == headroom(frame).text
    kept = Path(__file__).parents[2] / "preserved_data"
    assert judge([kept / "headline_dit_fresh4_seed2", kept / "headline_dit_fresh4_seed3"]).seeds == [2, 3]


# -- the numbers around it ----------------------------------------------------------------------------------


def questions(source_only: int, both: int, target_only: int, neither: int) -> pd.DataFrame:
    source = [True] * (source_only + both) + [False] * (target_only + neither)
    target = [False] * source_only + [True] * (both + target_only) + [False] * neither
    return pd.DataFrame({"source_correct": source, "target_correct": target})


def test_headroom_of_the_first_experiment():
    room = headroom(questions(7, 101, 53, 39))
    assert (room.n, room.n_units, room.counts["source_only"]) == (200, 200, 7)
    assert (room.source.point, room.target.point, room.union.point) == (0.54, 0.77, 0.805)
    assert (room.union.low, room.union.high) == wilson(161, 200)
    assert room.gain_possible == pytest.approx(0.035)
    assert room.smallest_effect == minimum_detectable_effect(200, 0.035) == pytest.approx(0.0366, abs=0.001)
    assert "no bridge could be shown to help here" in room.text
    swapped = headroom(questions(59, 94, 9, 38))
    assert swapped.gain_possible > swapped.smallest_effect and "no bridge" not in swapped.text
    assert swapped.counts == {"source_only": 59, "both": 94, "target_only": 9, "neither": 38}


def test_headroom_counts_units_and_held_out_problems_only(frames):
    room = headroom(frames[0])
    assert room.n_units == 150 and "450 problems about 150 units" in room.text
    assert room.smallest_effect > 1.3 * headroom(frames[0].drop(columns="unit")).smallest_effect
    assert headroom(make_frame(5, n_units=150, seen=50)).n == 300
    equal = headroom(questions(0, 50, 0, 50))
    assert equal.gain_possible == 0 and equal.smallest_effect == minimum_detectable_effect(100, 0.03)  # rule of three


def test_headroom_speaks_of_the_test_set_that_the_bridge_will_be_tried_on(frames, tmp_path):
    frame = frames[0].filter(regex="^(id|unit|group|novelty|source.*|target.*)$").assign(gold_extracted="12")
    frame.to_json(tmp_path / "headroom.jsonl", orient="records", lines=True)
    here = headroom(tmp_path / "headroom.jsonl")
    assert here.smallest_effect == headroom(frames[0]).smallest_effect
    (tmp_path / "config.yaml").write_text("task: {n_test: 1800}\neval: {eval_samples: -1}\n")
    there = headroom(tmp_path / "headroom.jsonl")
    assert there.smallest_effect == pytest.approx(here.smallest_effect / 2, rel=0.05) and there.counts == here.counts
    assert "The smallest gain that 1,800 test problems find" in there.text and "450 problems about 150" in there.text


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda f: judge([]), "0 runs, seeds"),
        (lambda f: judge([f, f], seeds=[1, 1]), "give one run for each distinct seed"),
        (lambda f: judge([without(f, "bridged")]), "`bridged` was not evaluated"),
        (lambda f: judge([f.assign(novelty="seen")]), "no held-out problem in this evaluation"),
        (lambda f: judge([f.assign(unit="u")]), "all 450 questions are one `unit`"),
        (lambda f: judge([pd.concat([f, f])]), "id q0 occurs twice"),
        (lambda f: judge([f.assign(shuffled_correct=None)]), "`shuffled_correct` misses 450 of 450"),
        (lambda f: headroom(without(f, "source")), "`source` was not evaluated"),
    ],
)
def test_bad_frames_are_refused(frames, call, message):
    with pytest.raises(ValueError, match=message):
        call(frames[0])
