"""Summaries of a look inside a bridge, against cases whose answer is known.

python -m pytest tests/test_inside.py
"""

import json

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from bridgekit.inside import measure as inside
from bridgekit.inside import readings_inside

RNG = np.random.default_rng


# ---- CKA ----------------------------------------------------------------------------------------------------------


def states(n=120, width=20, seed=0):
    return RNG(seed).normal(size=(n, width)) * np.linspace(0.2, 3, width)


def test_cka_does_not_change_under_rotation_scale_and_shift():
    x = states()
    rotation = stats.ortho_group.rvs(20, random_state=1)
    assert inside.linear_cka(x, x) == pytest.approx(1)
    assert inside.linear_cka(x, 7 * x @ rotation + 3) == pytest.approx(1)
    y = states(seed=2) + x
    assert inside.linear_cka(x, y) == pytest.approx(inside.linear_cka(x @ rotation, 0.1 * y - 5))
    assert inside.linear_cka(x, y) == pytest.approx(inside.linear_cka(y, x))


@pytest.mark.parametrize("width", [5, 2000])
def test_cka_of_independent_states_is_about_zero_also_where_they_are_wider_than_many(width):
    """The plain estimate is far above zero there: with 2,000 wide states of 100 questions it is about 0.95."""
    found = [inside.linear_cka(RNG(i).normal(size=(100, width)), RNG(900 + i).normal(size=(100, width)))
             for i in range(20)]  # fmt: skip
    assert abs(np.mean(found)) < 0.02 and max(map(abs, found)) < 0.15


def test_cka_falls_with_noise():
    x = states()
    found = [inside.linear_cka(x, x + s * states(seed=3)) for s in (0, 0.5, 1, 2, 8)]
    assert found == sorted(found, reverse=True) and found[-1] < 0.2 < 0.8 < found[1]


def test_cka_of_a_constant_is_zero_and_of_three_questions_refused():
    assert inside.linear_cka(states(), np.ones((120, 3))) == pytest.approx(0)
    with pytest.raises(ValueError, match="at least 4 questions"):
        inside.linear_cka(states(3), states(3))


def test_cka_intervals_leave_out_units_and_cover_the_value_of_many():
    mixing = RNG(5).normal(size=(20, 20))
    large = states(4000, seed=6)
    truth = inside.linear_cka(large[:2000], large[:2000] @ mixing)
    covered = 0
    for i in range(40):
        x = states(80, seed=100 + i)
        row = inside.cka_table({"a": x, "b": x @ mixing}, range(80)).iloc[0]
        covered += row["low"] <= truth <= row["high"]
    assert covered >= 34
    twice = inside.cka_table({"a": np.repeat(x, 2, 0), "b": np.repeat(x @ mixing, 2, 0)}, np.repeat(range(80), 2))
    assert (twice.iloc[0]["n"], twice.iloc[0]["n_units"]) == (160, 80)
    with pytest.raises(ValueError, match="too few"):
        inside.cka_table({"a": x, "b": x}, [0] * 80)


# ---- means and shares ---------------------------------------------------------------------------------------------


def test_a_mean_of_independent_values_has_students_interval():
    values = RNG(1).normal(3, 2, size=17)
    mean = inside.clustered_mean(values)
    known = stats.ttest_1samp(values, 0).confidence_interval()
    assert (mean.low, mean.high) == pytest.approx((known.low, known.high)) and mean.n_clusters == 17


def test_asking_a_unit_again_makes_no_interval_shorter():
    values = RNG(1).normal(size=17)
    once, thrice = inside.clustered_mean(values), inside.clustered_mean(np.repeat(values, 3), np.repeat(range(17), 3))
    assert (thrice.low, thrice.high) == pytest.approx((once.low, once.high)) and thrice.n == 51
    assert inside.clustered_mean([1.0, 2.0], ["a", "a"]).high == np.inf
    with pytest.raises(ValueError, match="NaN"):
        inside.clustered_mean([1.0, np.nan])


def test_the_share_of_a_soft_token_that_varies_is_the_planted_one():
    fixed, own = RNG(1).normal(size=(1, 3, 200)), RNG(2).normal(size=(150, 3, 200))
    fixed *= np.sqrt(200 / (fixed**2).sum(2, keepdims=True))
    tokens = fixed + own * np.array([0, 1, 3])[None, :, None]
    share, low, high = inside.varying_share(tokens)
    assert share[0] == pytest.approx(0, abs=1e-12)
    assert share[1:] == pytest.approx([0.5, 0.9], abs=0.04)
    assert (low <= share).all() and (share <= high).all() and (high - low)[1:].max() < 0.1


# ---- attention and gates ------------------------------------------------------------------------------------------

FRAME = pd.DataFrame({"id": ["q1", "q2", "q3"], "unit": ["pim", "pim", "tor"], "value": [12, 12, 40],
                      "group": ["both", "both", "source_only"]})  # fmt: skip
ARRAYS = {
    "ids": np.array(["q1", "q2", "q3"]),
    "mean": np.array([[0.5, 0.3, 0.2, 0.0], [0.5, 0.1, 0.4, 0.0], [0.8, 0.1, 0.05, 0.05]], np.float16),
    "token_class": np.array([[1, 2, 0, -1], [1, 2, 0, -1], [1, 2, 0, 0]], np.int8),
    "map/q1": np.full((2, 3), 1 / 3, np.float16), "tokens/q1": np.array(["a", "b", "c"]),
    "map/q3": np.full((2, 4), 1 / 4, np.float16), "tokens/q3": np.array(["a", "b", "c", "d"]),
}  # fmt: skip


def test_attention_by_class_is_the_mean_share_beside_an_even_one():
    table = inside.attention_by_class(ARRAYS, FRAME).set_index("token_class")
    assert list(table.index) == ["unit word", "digits", "rest"]
    assert table["share"].tolist() == pytest.approx([0.6, 1 / 6, 0.7 / 3], abs=1e-3)
    assert table["uniform"].tolist() == pytest.approx([(1 / 3 + 1 / 3 + 1 / 4) / 3] * 2 + [(1 / 3 + 1 / 3 + 1 / 2) / 3])
    assert (table["n"] == 3).all() and (table["n_units"] == 2).all()
    assert "most of the attention goes to the unit word" in readings_inside.read_attention_classes(table.reset_index())
    with pytest.raises(ValueError, match="different runs"):
        inside.attention_by_class(ARRAYS, FRAME.assign(id="x"))


def test_maps_of_what_only_the_source_knew_come_first_with_their_tokens():
    assert inside.map_ids(ARRAYS, FRAME, 5) == {"q3": "tor = 40, source_only", "q1": "pim = 12, both"}
    assert inside.map_ids({}, FRAME, 5) == {}
    rows = inside.map_frame(ARRAYS, "q3")
    assert list(rows["token"]) == list("abcd") * 2 and rows["weight"].sum() == pytest.approx(2)


def test_gates_are_read_from_the_rows_that_have_them(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [{"step": 0, "eval": {"n": 1}}, {"step": 10, "loss": 1.0, "gates": {"layer1": 0.0, "layer3": 0.1}},
            {"step": 20, "loss": 0.5, "gates": {"layer1": 0.02, "layer3": -0.4}}]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    gates = inside.gates_from_metrics(path)
    assert gates.to_records(index=False).tolist() == [(10, "layer1", 0.0), (10, "layer3", 0.1), (20, "layer1", 0.02),
                                                      (20, "layer3", -0.4)]  # fmt: skip
    assert "layer3 is furthest open" in readings_inside.read_gates(gates, "residual")
    path.write_text(json.dumps(rows[0]) + "\n")
    none = inside.gates_from_metrics(path)
    assert none.empty and "No gates" in readings_inside.read_gates(none, "prefix")
    assert "before they were logged" in readings_inside.read_gates(none, "residual")
    path.write_text(json.dumps(rows[1]) + '\n{"step": 1')
    with pytest.raises(ValueError, match="line 2"):
        inside.gates_from_metrics(path)
