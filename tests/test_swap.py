"""Both directions beside each other: what is planned and what is kept.

python -m pytest tests/test_swap.py
"""

import pytest
from conftest import TINY

from bridgekit.config import ConfigError, load_config, to_flat
from bridgekit.results import swap
from bridgekit.runs import create_run, write_status

TEACHER = ["teacher=prompt", "prompt_weight=1.0", "nll_weight=0.0", "n_soft_tokens=-1"]


def planned(*overrides: str, teacher: list[str] | None = None, **values) -> dict:
    config = load_config(overrides=overrides, **(TINY | {"name": "some", "seed": 3} | values))
    return swap.plan_swap(config, TEACHER if teacher is None else teacher)


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
