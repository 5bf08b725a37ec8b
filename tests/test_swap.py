"""Both directions beside each other: what is planned, what is kept, and sentences that say what the frames say.

python -m pytest tests/test_swap.py
"""

import numpy as np
import pandas as pd
import pytest
from conftest import TINY
from figure_frames import evaluation, mark, span

from bridgekit.config import ConfigError, load_config, to_flat
from bridgekit.results import statistics as stats
from bridgekit.results import swap, verdict
from bridgekit.results.figures_studies import plot_differences, plot_headroom
from bridgekit.results.figures_swap import plot_side_by_side
from bridgekit.runs import create_run, write_jsonl, write_status

TEACHER = ["teacher=prompt", "prompt_weight=1.0", "nll_weight=0.0", "n_soft_tokens=-1"]


def planned(*overrides: str, teacher: list[str] | None = None, **values) -> dict:
    config = load_config(overrides=overrides, **(TINY | {"name": "some", "seed": 3} | values))
    return swap.plan_swap(config, TEACHER if teacher is None else teacher)


@pytest.fixture
def frames() -> dict[str, pd.DataFrame]:
    """Four arms on the same problems: the bridge of `swapped` is worse, that of the last two worse still."""
    found = {arm: evaluation() for arm in swap.ARMS}
    for arm, every in (("swapped", 9), ("literal_kept", 3), ("soft_only", 2)):
        wrong = found[arm]["index"] % every == 0
        found[arm]["bridged_correct"] &= ~wrong
        found[arm]["bridged_extracted"] = np.where(wrong, "[invalid]", "7")
    return found


# -- the plan -----------------------------------------------------------------------------------------------


def test_the_arms_differ_in_what_they_are_named_for():
    plan = planned()
    assert list(plan) == [f"some_{arm}_seed3" for arm in swap.ARMS]
    forward, swapped, kept, alone = map(to_flat, plan.values())
    usual = {"run.name", "pair.direction"}
    assert {k for k in forward if forward[k] != swapped[k]} == usual
    assert {k for k in kept if kept[k] != alone[k]} == {"run.name", "bridge.prompt_mode"}
    assert [c.pair.direction for c in plan.values()] == ["forward", "swapped", "swapped", "swapped"]
    assert [c.bridge.prompt_mode for c in plan.values()] == ["soft_plus_text"] * 3 + ["soft_only"]
    assert (alone["bridge.teacher"], alone["loss.prompt_weight"], alone["loss.nll_weight"]) == ("prompt", 1.0, 0.0)
    assert {k for k in swapped if swapped[k] != kept[k]} == {
        "run.name", "bridge.teacher", "bridge.n_soft_tokens", "loss.prompt_weight", "loss.nll_weight",
    }  # fmt: skip


def test_controls_are_trained_for_the_directions_alone():
    plan = list(planned("train.controls=[constant, self_bridge]").values())
    assert [c.train.controls for c in plan] == [("constant", "self_bridge")] * 2 + [()] * 2
    plan = list(planned(teacher=[*TEACHER, "controls=[constant]"]).values())
    assert [c.train.controls for c in plan] == [()] * 2 + [("constant",)] * 2


def test_the_plan_says_that_the_prompt_teacher_chose():
    text = swap.read_plan(planned())
    assert "some_soft_only_seed3: the prompt teacher chooses soft_only by itself" in text
    assert "some_literal_kept_seed3: direction swapped, taught by the prompt, prompt_mode soft_plus_text" in text
    assert "some_forward_seed3: direction forward, taught by answers, prompt_mode soft_plus_text" in text


@pytest.mark.parametrize(
    ("teacher", "named"),
    [
        (["teacher=prompt"], "prompt_teacher"),
        (["prompt_weight=1.0"], "prompt_teacher"),
        ([*TEACHER, "prompt_mode=soft_only"], "bridge.prompt_mode"),
        ([*TEACHER, "pair.direction=forward"], "pair.direction"),
        (["teachr=prompt"], "teacher"),
        (["flow_weight=0.1", "teacher=prompt"], "loss.flow_weight"),  # TINY's resampler has no flow
    ],
)
def test_a_prompt_teacher_that_teaches_nothing_is_refused(teacher, named):
    with pytest.raises(ConfigError, match=named) as caught:
        planned(teacher=teacher)
    assert "\n" not in str(caught.value)


# -- headroom -----------------------------------------------------------------------------------------------


def test_headroom_that_is_there_is_kept_and_another_configuration_s_is_refused(tmp_path):
    plan = planned()
    for name in list(plan)[:2]:
        folder = create_run(plan[name], tmp_path / name)
        (folder / "headroom.jsonl").write_text("measured\n")
        write_status(folder, state="finished")
    files = swap.measure_headroom(plan, tmp_path)
    assert {direction: path.parent.name for direction, path in files.items()} == dict(
        zip(swap.DIRECTIONS, plan, strict=False)
    )
    assert [path.read_text() for path in files.values()] == ["measured\n"] * 2
    with pytest.raises(ConfigError, match="name: .*some_forward_seed3.* is finished with another configuration"):
        swap.measure_headroom(planned(lr=0.5), tmp_path)
    assert [path.read_text() for path in files.values()] == ["measured\n"] * 2


def test_headroom_that_cannot_be_measured_says_why(tmp_path):
    plan = planned(source_model=str(tmp_path / "none"))
    with pytest.raises(RuntimeError, match="headroom of some_forward_seed3 failed: .*none"):
        swap.measure_headroom(plan, tmp_path / "runs")


# -- what is said and drawn ---------------------------------------------------------------------------------


def test_arms_are_paired_problem_by_problem(frames):
    found = swap.pair_arms(frames, "forward", "swapped")
    rows, other = (verdict.select_subset(frames[arm]) for arm in swap.DIRECTIONS)
    assert found.difference == pytest.approx(rows["bridged_correct"].mean() - other["bridged_correct"].mean())
    assert found.lost == 0 and found.gained == (rows["bridged_correct"] & (rows["index"] % 9 == 0)).sum()
    shuffled = {"forward": frames["forward"].sample(frac=1, random_state=0), "swapped": frames["swapped"]}
    assert swap.pair_arms(shuffled, "forward", "swapped").gained == found.gained
    with pytest.raises(ValueError, match="different problems"):
        swap.pair_arms({"forward": frames["forward"].iloc[:-5], "swapped": frames["swapped"]}, "forward", "swapped")


def test_the_prompt_teacher_is_told_as_measured(frames):
    text = swap.read_teacher(frames)
    rows = verdict.select_subset(frames["soft_only"])
    against = stats.paired_difference(rows, "bridged", "target")
    assert f"difference {against.difference:+.3f} [{against.low:+.3f}, {against.high:+.3f}]" in text
    assert against.high < 0 and "so it harms" in text
    assert f"{(rows['bridged_extracted'] == '[invalid]').mean():.0%} of its answers are invalid" in text
    only = verdict.select_subset(frames["soft_only"], "source_only")
    change = stats.paired_difference(only, "bridged", "target")
    assert (
        f"({change.n:,} problems), bridged {only['bridged_correct'].mean():.3f}, difference {change.difference:+.3f}"
        in text
    )
    for arm in swap.TAUGHT:  # the same words for a bridge that helps would be a typed conclusion
        frames[arm] = evaluation().assign(bridged_extracted="7")
    assert "harms" not in swap.read_teacher(frames) and "so it helps" in swap.read_teacher(frames)


def test_what_training_did_is_told_from_the_validation_answers(tmp_path):
    def keep(step: int, right: list[bool]) -> None:
        rows = [
            {"id": f"v{i}", "index": i, "unit": f"u{i}", "gold_extracted": "1", "source_extracted": "1",
             "target_extracted": "1" if i % 2 else "0", "bridged_extracted": "1" if ok else "0"}
            for i, ok in enumerate(right)
        ]  # fmt: skip
        write_jsonl(tmp_path / f"eval_samples_step_{step}.jsonl", rows)

    odd = [bool(i % 2) for i in range(60)]
    keep(0, odd)
    keep(400, [False] * 60)
    text = swap.read_training(tmp_path)
    assert "+0.000 [" in text and "-0.500 [" in text and "so the trained bridge harms" in text
    assert "Validation kept step 0, the weights from before training" in text
    keep(800, [True] * 60)
    text = swap.read_training(tmp_path)
    assert "so the trained bridge helps. Validation kept step 800." in text
    with pytest.raises(ValueError, match="no validation answers"):
        (tmp_path / "empty").mkdir()
        swap.read_training(tmp_path / "empty")


def test_directions_are_told_as_judged(frames):
    judged = {d: verdict.judge([frames[d]], seeds=[1]) for d in swap.DIRECTIONS}
    passed = [d for d, one in judged.items() if one.passes]
    text = swap.read_directions(judged, frames)
    said = {2: "both directions pass", 1: "only", 0: "neither passes"}[len(passed)]
    assert said in text and all(one.text in text for one in judged.values())
    frames["swapped"]["bridged_correct"] = False
    judged["swapped"] = verdict.judge([frames["swapped"]], seeds=[1])
    text = swap.read_directions(judged, frames)
    assert "**swapped: harms.**" in text and "both directions pass" not in text


def test_headrooms_and_the_table_hold_every_arm(frames):
    rooms = {d: verdict.headroom(frames[d]) for d in swap.DIRECTIONS}
    assert "Both have the same room" in swap.read_headroom(rooms)
    frames["swapped"]["source_correct"] = True
    rooms["swapped"] = verdict.headroom(frames["swapped"])
    assert "There is more to gain swapped" in swap.read_headroom(rooms)
    counts = swap.headroom_table(rooms)
    assert (
        list(counts["label"]) == list(swap.DIRECTIONS) and counts.loc[1, "source_only"] > counts.loc[0, "source_only"]
    )
    assert plot_headroom(counts).axes[0].get_yticklabels()[1].get_text().startswith("swapped")
    table = swap.arms_table(frames)
    text = swap.format_arms(table)
    row = table[(table["arm"] == "soft_only") & (table["condition"] == "bridged") & (table["subset"] == "all")].iloc[0]
    (line,) = [line for line in text.splitlines() if line.startswith("| bridged |")]
    assert line.endswith(f"{row['accuracy']:.3f} [{row['low']:.3f}, {row['high']:.3f}] |") and line.count("|") == 6
    words = swap.read_arms_in_words(table, ["soft_only"])
    assert f"soft_only: {row['accuracy']:.3f} [" in words and f"n = {row['n']:,}" in words


def test_the_panels_are_drawn_as_measured(frames):
    table = swap.arms_table(frames)
    fig = plot_side_by_side(table, {"swapped": "one", "soft_only": "other"})
    assert [ax.get_title(loc="left") or ax.get_title() for ax in fig.axes] == ["one", "other"]
    rows = table[(table["subset"] == "all") & table["arm"].isin(["swapped", "soft_only"])]
    for row in rows.itertuples():
        assert mark(fig, f"point:{row.arm}:{row.condition}").get_xdata()[0] == row.accuracy
        assert span(mark(fig, f"interval:{row.arm}:{row.condition}")) == (row.low, row.high)
    few = plot_side_by_side(table, {"forward": "f"}, "source_only_held_unit", ["source", "bridged"])
    assert [t.get_text() for t in few.axes[0].get_yticklabels()] == ["source alone", "bridged"]
    for arguments, named in (
        (({"sideways": "s"},), "no arm 'sideways'"),
        (({"forward": "f"}, "none"), "no subset 'none'"),
        (({"forward": "f"}, "all", ["self"]), "'self' is not a condition"),
    ):
        with pytest.raises(ValueError, match=named):
            plot_side_by_side(table, *arguments)


def test_differences_of_both_directions_stand_in_blocks_of_their_own(frames):
    judged = {d: verdict.judge([frames[d]], seeds=[1]) for d in swap.DIRECTIONS}
    table = swap.differences_table(judged)
    names = [t.get_text() for t in plot_differences(table).axes[0].get_yticklabels()]
    assert [sum(name.startswith(f"{d}: ") for name in names) for d in swap.DIRECTIONS] == [2, 2]
    assert len(table) == sum(len(one.comparisons) for one in judged.values())
