"""What a bridge reads: the right text, the same states cached or computed, places paired by characters.

python -m pytest tests/model/test_states.py
"""

import numpy as np
import pytest
import torch

from bridgekit.model.states import Ragged, SourceStates, align_tokens, in_batches, read_source
from bridgekit.tasks import literal_prompt, load_examples, source_prompt

CPU = torch.device("cpu")
LAYERS = (1, 2)


def test_batches_hold_rows_of_like_length_and_each_row_once():
    batches = in_batches([5, 1, 9, 5, 2, 2, 7], 3)
    assert [b.tolist() for b in batches] == [[2, 6, 0], [3, 4, 5], [1]]  # equal lengths stay in order
    assert in_batches([], 3) == []
    ids, mask = Ragged([[1, 2, 3, 4], [5], [6, 7]], CPU).take(np.array([2, 1, 2]))
    assert ids.shape == (3, 2) and [i[m].tolist() for i, m in zip(ids, mask, strict=True)] == [[6, 7], [5], [6, 7]]


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


def test_what_the_bridge_reads(tiny, pair, val):
    lm = pair.source
    examples = load_examples(tiny(variant="context", n_facts=3), pair.lexicon_seed, "val")[:4]
    worked = {e.id: "#### 7" for e in examples}
    for view in ("prompt", "solution", "facts"):
        for e, row in zip(examples, read_source(lm, examples, view, worked), strict=True):
            text = e.facts if view == "facts" else e.facts + literal_prompt(e).text
            assert row == lm.bos + lm.tokenize([text])[0] + (lm.tokenize(["#### 7"])[0] if view == "solution" else [])
    assert read_source(lm, val[:1], "prompt", {})[0] == lm.bos + lm.tokenize([literal_prompt(val[0]).text])[0]


@pytest.mark.parametrize("variant", ["weights", "context"])
@pytest.mark.parametrize("direction", ["forward", "swapped"])
def test_every_target_token_is_covered_by_the_source_tokens_it_stands_for(tiny, pair, variant, direction):
    examples = load_examples(tiny(variant=variant), pair.lexicon_seed, "val")[:40]
    source, target = (pair.source, pair.target) if direction == "forward" else (pair.target, pair.source)
    rows, split_words = read_source(source, examples, "prompt", {}), 0
    for example, span, row in zip(examples, align_tokens(source, target, examples), rows, strict=True):
        pairs = list(zip(span[::2], span[1::2], strict=True))
        prompt, read = literal_prompt(example).text, source_prompt(example).text
        (ours,), (theirs,) = target.locate([prompt])[1], source.locate([read])[1]
        assert pairs[0] == (0, 1) and len(pairs) == 1 + len(ours)
        shift = len(read) - len(prompt)
        for (start, end), (a, b) in zip(pairs[1:], ours, strict=True):
            assert 1 <= start < end <= len(row)
            covers = theirs[start - 1][0] <= a + shift and b + shift <= theirs[end - 2][1]
            no_more = theirs[start - 1][1] > a + shift and theirs[end - 2][0] < b + shift
            assert covers and no_more, "the token's own characters, and no source token that shares none of them"
        split_words += len(ours) != len(theirs) - sum(b <= shift for _, b in theirs)
    assert split_words > 0  # the tokenizers do differ
