"""From examples to tensors: the step alone decides a batch, padding changes nothing.

python -m pytest tests/train/test_data.py
"""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.tasks import Prompt
from bridgekit.train.data import indices_at, step_batch, tokenize_answers


def rows_of(ids_and_mask: tuple[torch.Tensor, torch.Tensor]) -> list[list[int]]:
    """What a padded batch says, row by row; padding must stand at the end."""
    ids, mask = ids_and_mask
    rows = [i[m].tolist() for i, m in zip(ids, mask, strict=True)]
    assert all(i[: len(r)].tolist() == r for i, r in zip(ids, rows, strict=True))
    return rows


@given(st.integers(0, 9), st.integers(1, 40), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation_of_all_examples(seed, batch_size, n):
    steps = [indices_at(seed, step, batch_size, n) for step in range(-(-3 * n // batch_size))]
    stream = np.concatenate(steps)
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    for step in reversed(range(len(steps))):  # asked again, in another order, after any others
        assert np.array_equal(indices_at(seed, step, batch_size, n), steps[step])


def test_the_slots_of_all_processes_are_the_batch_of_one(tiny, training_set, val):
    """In turn: whatever the number of processes, the first n slots are the same questions with the same seeds."""
    config, world = tiny(batch_size=8, n_soft_tokens=-1), 4
    data = training_set(config, val)
    for step in (2, 3):  # 24 examples: an epoch ends after three steps
        whole = step_batch(config, data, step)
        parts = [step_batch(config, data, step, rank, world) for rank in range(world)]
        for i in range(8):
            part, row = parts[i % world], i // world
            assert part.slots[row] == whole.slots[i] == i and part.seeds[row] == whole.seeds[i]
            for name in ("before", "after", "literal", "final"):
                assert rows_of(getattr(part, name))[row] == rows_of(getattr(whole, name))[i]
            assert rows_of((part.labels, part.labels_mask))[row] == rows_of((whole.labels, whole.labels_mask))[i]
            assert torch.equal(part.states[row][part.mask[row]], whole.states[i][whole.mask[i]])


def test_the_marker_is_the_last_one():
    """Also where it shares no token with the rest, stands twice or not at all."""

    def tokenize_after(prompts, answers):  # one token a character
        return [list(map(ord, t)) for t in answers], [[(i, i + 1) for i in range(len(t))] for t in answers]

    lm = SimpleNamespace(tokenize_after=tokenize_after, prompt_format="plain", end_id=3)
    answers, markers = tokenize_answers(lm, [Prompt("", "Question: one")] * 2, ["#### 1\n#### 22", "no answer"])
    assert answers[0] == [*map(ord, "#### 1\n#### 22"), 3]
    assert markers[0] == [0] * 7 + [1] * 4 + [0] * 4 and markers[1] == [0] * 10
