"""From examples to tensors: the step alone decides a batch, caching and padding change nothing.

python -m pytest tests/test_batches.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.config import ConfigError
from bridgekit.model.pair import split_prompts
from bridgekit.model.states import Ragged, SourceStates, read_source
from bridgekit.tasks.base import CUE, literal_prompt
from bridgekit.train.data import check_fit, indices_at, noise_seeds, tokenize_answers
from bridgekit.train.steps import local_batch

CPU = torch.device("cpu")
LAYERS = (1, 2)


def rows_of(ids_and_mask: tuple[torch.Tensor, torch.Tensor]) -> list[list[int]]:
    """What a padded batch says, row by row; padding must stand at the end."""
    ids, mask = ids_and_mask
    rows = [i[m].tolist() for i, m in zip(ids, mask, strict=True)]
    assert all(i[: len(r)].tolist() == r for i, r in zip(ids, rows, strict=True))
    return rows


# -- which examples a step has ------------------------------------------------------------------------------


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


def test_sampler_seeds_are_a_function_of_the_step():
    seeds = [noise_seeds(1, step, 64) for step in (0, 1, 0)]
    assert np.array_equal(seeds[0], seeds[2]) and not set(seeds[0]) & set(seeds[1])
    assert not set(noise_seeds(2, 0, 64)) & set(seeds[0])


@pytest.mark.parametrize("world", [2, 4])
def test_the_slots_of_all_processes_are_the_batch_of_one(tiny, training_set, val, world):
    config = tiny(batch_size=8, n_soft_tokens=-1)
    data = training_set(config, val)
    for step in (0, 2, 3):  # 24 examples: an epoch ends after three steps

        def batch_of(rank, n, step=step):
            return local_batch(config, data, step, SimpleNamespace(process_index=rank, num_processes=n))

        whole, parts = batch_of(0, 1), [batch_of(rank, world) for rank in range(world)]
        for name in ("before", "after", "literal"):
            assert rows_of(getattr(whole, name)) == sum((rows_of(getattr(p, name)) for p in parts), [])
        labels = sum((rows_of((p.labels, p.labels_mask)) for p in parts), [])
        assert labels == rows_of((whole.labels, whole.labels_mask))
        assert whole.seeds.tolist() == sum((p.seeds.tolist() for p in parts), [])
        states = [s[m] for p in parts for s, m in zip(p.states, p.mask, strict=True)]
        for one, other, mask in zip(states, whole.states, whole.mask, strict=True):
            assert torch.equal(one, other[mask])


# -- tensors ------------------------------------------------------------------------------------------------


def test_a_ragged_batch_is_trimmed_to_its_longest_row():
    ragged = Ragged([[1, 2, 3, 4], [5], [6, 7]], CPU)
    assert rows_of(ragged.take(np.array([2, 1, 2]))) == [[6, 7], [5], [6, 7]]
    assert ragged.take(np.array([1, 2]))[0].shape == (2, 2)


def test_cached_states_equal_computed_ones(pair, val):
    rows = read_source(pair.source, val, "prompt", {})
    cached, computed = (SourceStates(pair.source, rows, LAYERS, budget) for budget in (1.0, 1e-9))
    assert cached.flat is not None and computed.flat is None
    for indices in (np.array([5, 0, 3]), np.array([len(val) - 1]), np.arange(len(val))):
        (one, mask), (other, other_mask) = cached.batch(indices, CPU), computed.batch(indices, CPU)
        assert torch.equal(mask, other_mask) and torch.allclose(one, other, atol=1e-5)
        assert not one[~mask].any() and not other[~mask].any()
        assert mask.sum(1).tolist() == [len(rows[i]) for i in indices]
    row = torch.tensor([rows[5]])
    alone = pair.source.hidden_states(row, torch.ones_like(row), LAYERS)
    assert torch.allclose(cached.batch(np.array([5]), CPU)[0], alone, atol=1e-5)


@pytest.mark.parametrize("position", ["start", "question", "end"])
@pytest.mark.parametrize("mode", ["soft_plus_text", "soft_only"])
def test_a_training_batch_says_what_the_examples_say(tiny, pair, training_set, val, position, mode):
    data = training_set(tiny(soft_position=position, prompt_mode=mode), val)
    indices = np.array([7, 2, 11])
    batch = data.batch(indices, np.array([1, 2, 3]))
    lm = pair.target
    for i, before, after, literal, answer, marker in zip(
        indices, rows_of(batch.before), rows_of(batch.after), rows_of(batch.literal),
        rows_of((batch.labels, batch.labels_mask)), batch.marker, strict=True,
    ):  # fmt: skip
        assert literal == lm.bos + lm.tokenize([literal_prompt(val[i]).text])[0]
        cue = lm.tokenize([CUE])[0]
        whole = literal if mode == "soft_plus_text" else lm.bos + cue
        assert before + after == whole
        if mode == "soft_only" or position != "end":
            assert before == lm.bos
        else:
            assert after == cue
        assert answer[-1] in lm.eos_ids and lm.tokenizer.decode(answer[:-1]) == val[i].solution
        marked = [token for token, is_marker in zip(answer, marker, strict=False) if is_marker]
        assert lm.tokenizer.decode(marked).strip() == "####"
    assert not batch.marker[~batch.labels_mask].any()


def test_training_may_leave_the_text_out_though_evaluation_has_it(tiny, pair, training_set, val):
    data = training_set(tiny(train_prompt_mode="soft_only", prompt_mode="soft_plus_text"), val[:2])
    after = rows_of(data.batch(np.array([0, 1]), np.array([1, 2])).after)
    assert after == pair.target.tokenize([CUE, CUE])


def test_the_marker_is_the_last_one():
    """Also where it shares no token with the rest, stands twice or not at all."""

    class Letters:  # one token a character
        def __call__(self, texts, add_special_tokens, return_offsets_mapping):
            return {
                "input_ids": [[ord(c) for c in t] for t in texts],
                "offset_mapping": [[(i, i + 1) for i in range(len(t))] for t in texts],
            }

    lm = SimpleNamespace(tokenizer=Letters(), eos_ids={3, 5})
    answers, markers = tokenize_answers(lm, ["#### 1\n#### 22", "no answer"])
    assert answers[0] == [*map(ord, "#### 1\n#### 22"), 3]
    assert markers[0] == [0] * 7 + [1] * 4 + [0] * 4 and markers[1] == [0] * 10


def test_what_the_bridge_reads(tiny, pair, val):
    from bridgekit.tasks import load_examples

    lm = pair.source
    examples = load_examples(tiny(variant="context", n_facts=3), pair.lexicon_seed, "val")[:4]
    said = {e.id: "#### 7" for e in examples}
    for view in ("prompt", "solution", "facts"):
        for e, row in zip(examples, read_source(lm, examples, view, said), strict=True):
            text = e.facts if view == "facts" else e.facts + literal_prompt(e).text
            wanted = lm.bos + lm.tokenize([text])[0] + (lm.tokenize(["#### 7"])[0] if view == "solution" else [])
            assert row == wanted
    assert read_source(lm, val[:1], "prompt", {})[0] == lm.bos + lm.tokenize([literal_prompt(val[0]).text])[0]


# -- what fits ----------------------------------------------------------------------------------------------


def test_more_soft_tokens_than_positions_are_refused(tiny, pair, val):
    prompts = [literal_prompt(e) for e in val]
    longest = max(len(p.all) for p in split_prompts(pair.target, prompts))
    room = pair.target.max_positions - 1 - longest - 24  # after BOS, the prompt and max_new_tokens
    check_fit(tiny(n_soft_tokens=room), pair, prompts)
    for n in (room + 1, 2048):
        with pytest.raises(ConfigError, match=r"^bridge.n_soft_tokens: .*use fewer soft tokens$") as caught:
            check_fit(tiny(n_soft_tokens=n), pair, prompts)
        assert str(pair.target.max_positions) in str(caught.value) and "\n" not in str(caught.value)


def test_as_many_soft_tokens_as_the_source_reads_must_fit_too(tiny, pair, val):
    prompts = [literal_prompt(e) for e in val]
    check_fit(tiny(n_soft_tokens=-1), pair, prompts)
    with pytest.raises(ConfigError, match="bridge.n_soft_tokens"):
        check_fit(tiny(n_soft_tokens=-1, max_new_tokens=pair.target.max_positions - 60), pair, prompts)
