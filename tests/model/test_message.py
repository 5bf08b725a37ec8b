"""Randomness by seed: noise and dropout are the example's own, whatever stands beside it.

python -m pytest tests/model/test_message.py
"""

import numpy as np
import pytest
import torch

from bridgekit.model import message as message_module
from bridgekit.model.message import Dropout, Message, hashed_normal, hashed_uniform

SEEDS = torch.tensor([5, 6, 2**31 - 1])


def dropout(p: float = 0.3, salt: int = 1) -> Dropout:
    made = Dropout(p)
    made.salt = salt
    return made


def test_noise_belongs_to_the_example_not_to_its_place():
    order = torch.tensor([2, 0, 1])
    assert torch.equal(hashed_normal(SEEDS[order], (4, 10)), hashed_normal(SEEDS, (4, 10))[order])
    assert torch.equal(hashed_normal(SEEDS, (9, 10))[:, :4], hashed_normal(SEEDS, (4, 10)))
    assert not torch.allclose(*hashed_normal(torch.tensor([8, 9]), (4, 10)))


@pytest.mark.parametrize("piece", [3, 100, 4096])
def test_computing_piece_by_piece_changes_no_bit(monkeypatch, piece):
    x = torch.ones(3, 7, 33)
    whole = hashed_uniform(SEEDS, 777), hashed_normal(SEEDS, (7, 33)), dropout().mask(x, SEEDS)
    monkeypatch.setattr(message_module, "CPU_CHUNK", piece)
    pieces = hashed_uniform(SEEDS, 777), hashed_normal(SEEDS, (7, 33)), dropout().mask(x, SEEDS)
    assert all(torch.equal(one, other) for one, other in zip(whole, pieces, strict=True))


def test_dropout_is_the_same_in_any_batch_width_and_order():
    x, made, order = torch.randn(3, 9, 11), dropout(), torch.tensor([1, 2, 0])
    together = made(x, SEEDS)
    assert torch.equal(made(x[order], SEEDS[order]), together[order])
    for width in (1, 4, 9):
        assert torch.equal(made(x[:, :width], SEEDS), together[:, :width])
    assert torch.equal(made(x[1:2], SEEDS[1:2])[0], together[1])
    half = made(x.bfloat16(), SEEDS)
    assert half.dtype == torch.bfloat16 and torch.equal(half != 0, together != 0)
    for other in (made(x, SEEDS + 1), dropout(salt=2)(x, SEEDS)):  # no more alike than by chance
        assert ((together == 0) == (other == 0)).float().mean().item() == pytest.approx(0.7**2 + 0.3**2, abs=0.1)
    with pytest.raises(ValueError, match="seed"):
        made(x, None)
    assert made.eval()(x, None) is x


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_leaves_out_its_share_and_keeps_the_mean(p):
    mask = dropout(p).mask(torch.ones(200, 500), torch.arange(200)).numpy()
    assert set(np.unique(mask)) == {0.0, mask.max()} and mask.max() == pytest.approx(1 / (1 - p), rel=1e-3)
    assert abs((mask == 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / mask.size)


def test_selected_rows_keep_their_seeds_and_alignment():
    tokens = torch.arange(12.0).view(3, 2, 2)
    whole = Message(tokens, tokens[..., 0] > 0, tokens.long(), seeds=SEEDS)
    left = whole.select(torch.tensor([2, 0]))
    for name in ("tokens", "mask", "alignment", "seeds"):
        assert torch.equal(getattr(left, name), getattr(whole, name)[[2, 0]])
