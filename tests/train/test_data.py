"""From examples to tensors: the step alone decides a batch, padding changes nothing.

python -m pytest tests/train/test_data.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.tasks import CUE, Prompt, literal_prompt
from bridgekit.train.data import indices_at, noise_seeds, step_batch, tokenize_answers


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


def test_epochs_and_seeds_differ():
    first, second, other = indices_at(1, 0, 40, 40), indices_at(1, 1, 40, 40), indices_at(2, 0, 40, 40)
    assert not np.array_equal(first, second) and not np.array_equal(first, other)
    assert not set(noise_seeds(1, 0, 64)) & {*noise_seeds(1, 1, 64), *noise_seeds(2, 0, 64)}


@pytest.mark.parametrize("world", [2, 4])
def test_the_slots_of_all_processes_are_the_batch_of_one(tiny, training_set, val, world):
    """In turn: whatever the number of processes, the first n slots are the same questions with the same seeds."""
    config = tiny(batch_size=8, n_soft_tokens=-1)
    data = training_set(config, val)
    for step in (0, 2, 3):  # 24 examples: an epoch ends after three steps
        whole = step_batch(config, data, step)
        parts = [step_batch(config, data, step, rank, world) for rank in range(world)]
        for i in range(8):
            part, row = parts[i % world], i // world
            assert part.slots[row] == whole.slots[i] == i and part.seeds[row] == whole.seeds[i]
            for name in ("before", "after", "literal", "final"):
                assert rows_of(getattr(part, name))[row] == rows_of(getattr(whole, name))[i]
            assert rows_of((part.labels, part.labels_mask))[row] == rows_of((whole.labels, whole.labels_mask))[i]
            assert torch.equal(part.states[row][part.mask[row]], whole.states[i][whole.mask[i]])


@pytest.mark.parametrize("position", ["start", "question", "end"])
@pytest.mark.parametrize("mode", ["soft_plus_text", "soft_only"])
def test_a_training_batch_says_what_the_examples_say(tiny, pair, training_set, val, position, mode):
    data = training_set(tiny(soft_position=position, prompt_mode=mode), val)
    indices = np.array([7, 2, 11])
    batch = data.batch(indices, np.array([1, 2, 3]))
    lm = pair.target
    cue = lm.tokenize([CUE])[0]
    columns = (rows_of(p) for p in (batch.before, batch.after, batch.literal, (batch.labels, batch.labels_mask)))
    for i, before, after, literal, answer, marker in zip(indices, *columns, batch.marker, strict=True):
        assert literal == lm.bos + lm.tokenize([literal_prompt(val[i]).text])[0]
        assert before + after == (literal if mode == "soft_plus_text" else lm.bos + cue)
        if mode == "soft_only" or position != "end":
            assert before == lm.bos
        else:
            assert after == cue
        assert answer[-1] in lm.eos_ids and lm.tokenizer.decode(answer[:-1]) == val[i].solution
        marked = [token for token, is_marker in zip(answer, marker, strict=False) if is_marker]
        assert lm.tokenizer.decode(marked).strip() == "####"
    assert not batch.marker[~batch.labels_mask].any()


def test_the_marker_is_the_last_one():
    """Also where it shares no token with the rest, stands twice or not at all."""

    def tokenize_after(prompts, answers):  # one token a character
        return [list(map(ord, t)) for t in answers], [[(i, i + 1) for i in range(len(t))] for t in answers]

    lm = SimpleNamespace(tokenize_after=tokenize_after, prompt_format="plain", end_id=3)
    answers, markers = tokenize_answers(lm, [Prompt("", "Question: one")] * 2, ["#### 1\n#### 22", "no answer"])
    assert answers[0] == [*map(ord, "#### 1\n#### 22"), 3]
    assert markers[0] == [0] * 7 + [1] * 4 + [0] * 4 and markers[1] == [0] * 10
