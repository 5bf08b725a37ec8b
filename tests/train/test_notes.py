"""A note of several facts, folded into as many soft tokens as there are.

python -m pytest tests/train/test_notes.py
"""

from types import SimpleNamespace

import pytest

from bridgekit.tasks.units import state_facts
from bridgekit.train.notes import note_facts

TWO, ONE = (("tinev", 59), ("jiwatud", 34)), (("dorum", 16),)


@pytest.fixture
def noted(pair):
    """`noted(facts, k)`: the texts that each of k soft tokens holds, | between its tokens."""

    def make(facts, k):
        (row,) = note_facts(pair.target, [SimpleNamespace(fact_pairs=facts, facts=state_facts(facts))], k)
        held = {}
        for token, place in row:
            held.setdefault(place, []).append(pair.target.tokenizer.decode([token]))
        assert [*held] == sorted(held) and (k == -1 or not held or max(held) < k)
        return ["|".join(held.get(i, [])) for i in range(max([*held, -1]) + 1)]

    return make


def test_least_is_lost_first_where_there_is_less_room(noted):
    assert noted(ONE, -1) == ["Note|:", " A", " d", "or", "um", " is", " ", "1", "6", "."]
    assert noted(ONE, 9) == ["Note|:", " d", "or", "um", " is", " ", "1", "6", "."]
    assert noted(ONE, 8) == ["Note|:", " d", "or", "um", " ", "1", "6", "."]
    assert noted(ONE, 7) == ["Note|:", " d", "or", "um", " ", "1", "6|."]
    assert noted(ONE, 6) == ["Note|:", " d", "or", " ", "1", "6|."]
    assert noted(ONE, 5) == ["Note|:", " d", " ", "1", "6|."]
    assert noted(ONE, 4) == ["Note|:", " d", " |1", "6|."]
    assert noted(ONE, 1) == ["Note|:| d| |1|6|."]


def test_each_fact_has_an_equal_stretch_that_its_neighbours_do_not_move(noted):
    assert noted(TWO, 9) == ["Note|:", " tin", " ", "5", "9|.", " jiw", " ", "3", "4|."]
    assert noted(TWO, 25)[13:] == [" A", " jiw", "at", "ud", " is", " ", "3", "4", "."]
    assert noted(TWO[1:] + TWO[:1], 25)[13:] == [" A", " tin", "ev", " is", " ", "5", "9", "."]


def test_where_facts_are_more_than_soft_tokens_the_last_ones_hold_them(noted):
    assert noted(TWO, 2) == ["Note|:", " tin| |5|9|.| jiw| |3|4|."] and noted((), 4) == []
