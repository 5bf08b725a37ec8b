"""Bits a message carries: the value that an answer names, and the estimator on channels whose capacity is known.

python -m pytest tests/test_capacity.py
"""

import math
import random

import numpy as np
import pytest

from bridgekit.results.capacity import carried_bits, message_bits, said_from_message, said_value
from bridgekit.results.statistics import Interval
from bridgekit.tasks.units import FAMILIES, VALUES, draw_numbers, solve, state_facts

FULL = math.log2(len(VALUES))


@pytest.fixture
def channel():
    """`channel(n, right)`: n values, said right with this probability and at random otherwise."""

    def make(n, right, seed=0):
        rng = np.random.default_rng(seed)
        true, other = rng.choice(VALUES, n), rng.choice(VALUES, n)
        return true, np.where(rng.random(n) < right, true, other)

    return make


def plug_in(true, said):
    """Mutual information of the counts as they are, and with Miller and Madow's correction, in bits."""

    def entropy(*columns):
        counts = np.unique(np.stack(columns), axis=1, return_counts=True)[1]
        return -(counts / len(true) * np.log2(counts / len(true))).sum(), len(counts)

    (h_x, k_x), (h_y, k_y), (h_xy, k_xy) = entropy(true), entropy(said), entropy(true, said)
    raw = h_x + h_y - h_xy
    return raw, raw + (k_x + k_y - k_xy - 1) / (2 * len(true) * math.log(2))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_the_value_is_read_from_every_family_of_worked_answers(family):
    rng = random.Random(family.name)
    for _ in range(50):
        value = rng.choice(VALUES)
        text, _ = solve(family, draw_numbers(rng, family), value, "pins")
        assert said_value(text, family.name) == value
        assert said_value(f"{text}\n<<3*99=297>>297", family.name) == value  # what follows the answer is not read


@pytest.mark.parametrize(
    ("text", "family", "value"),
    [
        ("<<9*37=334>>334 pins.\n#### 334", "count", 37),  # a slip in the product names its value all the same
        ("<<7-2=5>>5 pins.\n<<5*41=205>>205 pins.\n#### 205", "fewer", 41),
        ("<<7-2=5>>5 pins.\n#### 205", "fewer", None),
        ("<<9+37=46>>46 pins.\n#### 46", "count", None),
        ("<<9*37", "count", None),
        ("#### <<9*37=333>>", "count", None),
        ("", "count", None),
        (None, "count", None),
        (float("nan"), "count", None),
        ("<<9*37=333>>", "no such family", None),
        ("<<9*37=333>>", None, None),
    ],
)
def test_an_answer_that_names_no_value_is_not_guessed_at(text, family, value):
    assert said_value(text, family) == value


@pytest.mark.parametrize("right", [0.0, 0.3, 0.6, 0.9, 1.0])
def test_known_channels(channel, right):
    """A symmetric channel's information is log2 48 - H(hit) - P(miss) log2 47."""
    hit = right + (1 - right) / len(VALUES)
    miss = 1 - hit
    truth = FULL - sum(-p * math.log2(p) for p in (hit, miss) if p > 1e-12) - miss * math.log2(len(VALUES) - 1)
    bits = carried_bits(*channel(20_000, right), VALUES)
    assert bits.point == pytest.approx(truth, abs=0.05)
    assert bits.low <= truth + 0.02


def test_noise_is_not_counted_as_information(channel):
    """The table in the module's docstring, recomputed."""
    for right, raw, corrected, ours in ((0.0, 0.91, 0.47, -0.04), (1.0, 5.57, 5.59, 5.58)):
        true, said = channel(2000, right)
        assert plug_in(true, said) == pytest.approx((raw, corrected), abs=0.02)
        assert carried_bits(true, said, VALUES).point == pytest.approx(ours, abs=0.02)


def test_near_misses_carry_something_and_silence_nothing(channel):
    true, noise = channel(5000, 0.0)
    near = true + np.random.default_rng(3).integers(-1, 2, len(true))
    assert math.log2(48 / 3) - 0.1 < carried_bits(true, near, VALUES).point < math.log2(48 / 3) + 0.1
    silent = [None if i % 2 else int(v) for i, v in enumerate(true)]
    assert carried_bits(true, silent, VALUES).point == pytest.approx(FULL / 2, abs=0.1)
    assert carried_bits(true, [None] * len(true), VALUES).point == 0
    assert carried_bits(true, np.full(len(true), 10**9), VALUES).point == pytest.approx(0, abs=0.05)


def test_units_not_answers_are_what_counts(channel):
    true, said = channel(400, 0.5)
    alone = carried_bits(true, said, VALUES)
    five = carried_bits(np.repeat(true, 5), np.repeat(said, 5), VALUES, np.repeat(np.arange(400), 5))
    assert (five.n, five.n_clusters) == (2000, 400)
    assert five.high - five.low == pytest.approx(alone.high - alone.low, rel=0.25)


def test_a_message_made_before_the_question_holds_all_its_facts():
    bits = Interval(5.0, 4.5, 5.5, 100, 100)
    assert message_bits(bits, 16, "facts") == Interval(80.0, 72.0, 88.0, 100, 100)
    assert message_bits(bits, 16, "prompt") == bits


@pytest.mark.parametrize(
    ("values", "said", "named"),
    [([], [], "one answer for each"), ([12], [12, 13], "one answer for each"), ([11, 12], [1, 1], "value 11")],
)
def test_what_cannot_be_counted_is_refused(values, said, named):
    with pytest.raises(ValueError, match=named):
        carried_bits(values, said, VALUES)


def test_a_value_of_the_message_is_told_from_one_that_is_not():
    note = state_facts([("tob", 12), ("gaf", 34)])
    assert said_from_message([12, 34, 13, 1, None], [note] * 5) == [True, True, False, False, False]
