"""The sentences under the figures say what the figures' data say.

python -m pytest tests/test_readings.py
"""

import pandas as pd
import pytest

from bridgekit.config import load_config
from bridgekit.results import readings


def curve(bridged: list[tuple[float, float, float]], target: float | None = 0.5) -> pd.DataFrame:
    """Steps 0, 100, ... with (accuracy, low, high) of the bridge, and a target that never changes."""
    rows = [
        {"step": 100 * i, "condition": "bridged", "accuracy": accuracy, "low": low, "high": high}
        for i, (accuracy, low, high) in enumerate(bridged)
    ]
    if target is not None:
        same = {"condition": "target", "accuracy": target, "low": target - 0.1, "high": target + 0.1}
        rows += [{"step": 100 * i} | same for i in range(len(bridged))]
    return pd.DataFrame(rows)


def test_the_curve_names_its_best_step_and_since_when_it_is_above_the_target():
    text = readings.read_curve(
        curve([(0.4, 0.3, 0.5), (0.7, 0.6, 0.8), (0.6, 0.5, 0.7), (0.8, 0.7, 0.9), (0.79, 0.6, 0.9)])
    )
    assert "0.800 [0.700, 0.900] at step 300 of 400" in text
    assert "From step 300 on" in text  # at 200 the interval touched the target: what came before does not count


@pytest.mark.parametrize(
    ("points", "said"),
    [
        ([(0.9, 0.8, 1.0), (0.5, 0.4, 0.6)], "At the end its interval does not lie above"),
        ([(0.9, 0.8, 1.0), (0.9, 0.8, 1.0)], "From step 0 on"),
    ],
)
def test_a_curve_that_ends_low_or_starts_high(points, said):
    assert said in readings.read_curve(curve(points))


def test_a_curve_without_a_target_only_names_its_best():
    assert readings.read_curve(curve([(0.2, 0.1, 0.3)], target=None)).endswith("is evaluated.")


def test_the_conditions_name_the_strongest_control_and_no_rival():
    accuracies = {"target": 0.5, "bridged": 0.9, "shuffled": 0.4, "constant": 0.6, "relay_full": 0.95}
    rows = [
        {"condition": name, "subset": "all", "n": 1000, "accuracy": a, "low": a - 0.02, "high": a + 0.02}
        for name, a in accuracies.items()
    ]
    table = pd.DataFrame([*rows, rows[3] | {"subset": "both", "accuracy": 0.99}])
    text = readings.read_conditions(table)
    assert "Of 1,000 held-out problems the target has 0.900 [0.880, 0.920] right bridged, 0.500" in text
    assert "constant, bridge's mix, reaches 0.600 [0.580, 0.620]" in text
    assert "relay" not in text and "0.99" not in text


def groups(n: int) -> pd.DataFrame:
    """n problems about n units: told, all right; bridged, every second; shuffled follows each third donor."""
    return pd.DataFrame(
        {
            "id": range(n), "unit": [f"u{i}" for i in range(n)],
            "group": "source_only", "novelty": "held_unit",
            "target_told_correct": True, "bridged_correct": [i % 2 == 0 for i in range(n)],
            "shuffled_extracted": ["7" if i % 3 == 0 else "0" for i in range(n)], "donor_gold": "7",
        }
    )  # fmt: skip


def test_groups_say_what_is_recovered_and_whether_answers_follow_the_donor():
    text = readings.read_groups(groups(120))
    assert "On 120 problems about 120 held-out units, known to the source alone, the bridge recovers 0.500 [" in text
    assert "message, 0.333 [" in text
    assert "held-out value" not in text


def test_a_task_without_groups_says_so():
    frame = groups(8).drop(columns=["group", "novelty", "unit", "shuffled_extracted"])
    assert readings.read_groups(frame) == "This task has no knowledge groups."


def test_minutes_are_a_table_that_adds_up():
    lines = readings.read_minutes({"test": 60.0, "train bridged": 180.0}).splitlines()
    assert lines[2:] == ["| train bridged | 3.0 | 75% |", "| test | 1.0 | 25% |", "| all | 4.0 | |"]


def test_changes_list_only_what_differs_from_the_defaults():
    assert readings.read_changes(load_config()) == "every key has its default"
    text = readings.read_changes(load_config(steps=7, controls=["constant"]))
    assert [line.split(":")[0] for line in text.splitlines()] == ["train.steps", "train.controls"]
    assert "train.steps: 7 (default " in text


def test_the_prompt_mode_gives_its_reason_where_the_teacher_is_the_prompt():
    taught = {"teacher": "prompt", "prompt_weight": 0.1}
    alone, beside = load_config(**taught), load_config(**taught, prompt_mode="soft_plus_text")
    assert "bridge.prompt_mode: 'soft_only' (default 'soft_plus_text')" in readings.read_changes(alone)
    assert "so it stands alone: prompt_mode soft_only" in readings.read_changes(alone)
    assert "overrides the soft_only" in readings.read_changes(beside)
    assert readings.read_changes(load_config(prompt_weight=0.1)).count("\n") == 0
