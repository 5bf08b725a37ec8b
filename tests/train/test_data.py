"""From examples to tensors: the step alone decides a batch, the last marker is the one that counts.

python -m pytest tests/train/test_data.py
"""

from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.tasks import Prompt
from bridgekit.train.data import deal, indices_at, tokenize_answers


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation_of_all_examples(seed, batch_size, n):
    steps = [indices_at(seed, step, batch_size, n) for step in range(-(-3 * n // batch_size))]
    stream = np.concatenate(steps)
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    for step in reversed(range(len(steps))):  # asked again, in another order, after any others
        assert np.array_equal(indices_at(seed, step, batch_size, n), steps[step])


def test_questions_of_like_length_go_into_one_step():
    lengths, n, size, window = np.random.default_rng(0).integers(20, 400, 96), 96, 4, 8
    sorted_, plain = ([deal(1, step, size, lengths, w) for step in range(24)] for w in (window, 1))
    assert all(np.array_equal(one, indices_at(1, step, size, n)) for step, one in enumerate(plain))
    for first in range(0, 24, window):  # the same questions, dealt otherwise
        assert sorted(np.ravel(sorted_[first : first + window])) == sorted(np.ravel(plain[first : first + window]))
    padding = [sum(lengths[one].max() * size - lengths[one].sum() for one in steps) for steps in (sorted_, plain)]
    assert padding[0] < padding[1] / 3
    longest = [lengths[one].max() for one in sorted_[:window]]
    assert longest != sorted(longest)  # no course from short to long


def test_the_marker_is_the_last_one():
    """Also where it shares no token with the rest, stands twice or not at all."""

    def tokenize_after(prompts, answers, known):  # one token a character
        return [list(map(ord, t)) for t in answers], [[(i, i + 1) for i in range(len(t))] for t in answers]

    lm = SimpleNamespace(tokenize_after=tokenize_after, prompt_format="plain", end_id=3)
    answers, markers = tokenize_answers(lm, [Prompt("", "Question: one")] * 2, ["#### 1\n#### 22", "no answer"])
    assert answers[0] == [*map(ord, "#### 1\n#### 22"), 3]
    assert markers[0] == [0] * 7 + [1] * 4 + [0] * 4 and markers[1] == [0] * 10
