"""One decode path: the model's own greedy text, whatever stands beside a row or in place of its tokens.

python -m pytest tests/model/test_generation.py
"""

import zlib

import pytest
import torch

from bridgekit.model import generation
from bridgekit.model.generation import (
    CHECK_EVERY,
    decode_bridged,
    draw,
    generate_batch,
    unpad,
)
from bridgekit.model.injectors import Prefix
from bridgekit.model.message import Message
from bridgekit.model.pair import pad_ids, split_prompts
from bridgekit.tasks import literal_prompt, told_prompt
from bridgekit.tasks.answers import answer_is_complete

N_NEW = 48


@pytest.fixture(scope="module")
def prompts(pair, val) -> list[list[int]]:
    """Token ids of prompts of several lengths whose answers have several lengths; some end at once."""
    lm = pair.target
    texts = [literal_prompt(e) for e in val[:6]] + [told_prompt(e) for e in val[6:8]]
    almost = lm.bos + lm.tokenize([literal_prompt(val[8]).text + val[8].solution])[0]  # nothing left but the end
    return [almost, *(lm.bos + p.all for p in split_prompts(lm, texts))]


def generate(lm, rows, n: int = N_NEW, **options):
    return generate_batch(lm, rows, [[] for _ in rows], max_new_tokens=n, **options)


def alike(found, others) -> bool:
    same = [(g.text, g.n_tokens) for g in found] == [(g.text, g.n_tokens) for g in others]
    return same and [g.logprob for g in found] == pytest.approx([g.logprob for g in others], abs=1e-5)


def test_greedy_text_is_that_of_transformers_with_its_log_probability(pair, prompts):
    lm, lengths = pair.target, set()
    for found, row in zip(generate(lm, prompts), prompts, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            out = lm.model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=N_NEW, do_sample=False)
            new = out[0, len(row) :]
            scores = lm.model(torch.cat([ids[0], new])[None]).logits[0, len(row) - 1 : -1].double().log_softmax(-1)
        assert found.text == lm.tokenizer.decode(new, skip_special_tokens=True) and found.ids == tuple(new.tolist())
        assert found.logprob == pytest.approx(scores.gather(1, new[:, None]).mean().item(), abs=1e-5)
        lengths.add(found.n_tokens)
    assert min(lengths) == 1 and len(lengths) >= 4  # rows did leave the batch one after the other


def test_neighbours_and_how_often_ends_are_looked_at_change_nothing(pair, prompts, monkeypatch):
    lm, together = pair.target, generate(pair.target, prompts)
    assert alike(generate(lm, prompts[::-1])[::-1], together)
    assert [g.n_tokens for g in generate(lm, prompts, 5)] == [1] + [5] * (len(prompts) - 1)
    monkeypatch.setitem(generation.LOOK_EVERY, "cpu", 8)  # as on a GPU
    assert alike(generate(lm, prompts), together)


def test_decoding_stops_when_the_answer_is_complete(pair, val):
    """A model that starts a new line where it should end, as base models do, stops soon after its answer."""
    lm, n = pair.target, CHECK_EVERY * 12
    (line,), (end,) = lm.tokenize(["\n"])[0], lm.eos_ids
    rows = [lm.bos + p.all for p in split_prompts(lm, [literal_prompt(e) for e in val[:4]])]

    def go_on(module, arguments, logits):
        logits[..., line] = logits[..., line].maximum(logits[..., end])
        logits[..., end] = -torch.inf
        return logits

    hook = lm.model.lm_head.register_forward_hook(go_on)
    try:
        going_on = generate(lm, rows, n)
        for is_complete, n_tokens in ((lambda text: False, n), (bool, CHECK_EVERY)):  # that is the task's to say
            assert {g.n_tokens for g in generate(lm, rows, n, is_complete=is_complete)} == {n_tokens}
    finally:
        hook.remove()
    for found, ended in zip(going_on, generate(lm, rows, n), strict=True):
        assert found.text.startswith(ended.text + "\n") and answer_is_complete(found.text)
        assert found.n_tokens == -(-ended.n_tokens // CHECK_EVERY) * CHECK_EVERY  # looked at every so many steps


# -- soft tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [(1, 4), (5, 6), (9, 30)])
def test_soft_tokens_stand_for_the_text_they_embed(pair, prompts, cut):
    """A piece of the prompt given as embeddings, of ragged length, gives the text of the whole prompt."""
    lm, (first, second) = pair.target, cut
    ids, mask = pad_ids([row[first:second] for row in prompts], lm.device)
    texts = [row[:first] for row in prompts], [row[second:] for row in prompts]
    assert alike(generate_batch(lm, *texts, Message(lm.embed(ids), mask), Prefix(), N_NEW), generate(lm, prompts))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("injector, k", [("prefix", -1), ("prefix+residual", 4), ("kv", -1)])
def test_a_bridged_text_does_not_depend_on_its_neighbours_or_on_dropout(one_batch, pair, injector, k, sampled):
    """Rows leave the batch one after the other, in the middle of training: each keeps its own message and seed."""
    _, bridge, batch, message = one_batch(True, injector=injector, n_soft_tokens=k, dropout=0.5)
    texts, seeds = [unpad(*part) for part in (batch.before, batch.after)], batch.seeds if sampled else None
    ends = {"is_complete": lambda text: zlib.crc32(text.encode()) % 2}  # of its own text alone
    evaluated = decode_bridged(pair.target, bridge, message, *texts, N_NEW, seeds, **ends)
    bridge.train()
    together = decode_bridged(pair.target, bridge, message, *texts, N_NEW, seeds, **ends)
    assert together == evaluated and all(module.training for module in bridge.modules())  # and training goes on
    assert len({g.n_tokens for g in together}) > 1 and len({g.text for g in together}) > 2
    for i, one in enumerate(together):
        row, own = message.select(torch.tensor([i])), seeds if seeds is None else seeds[i : i + 1]
        (alone,) = decode_bridged(pair.target, bridge, row, *([t[i]] for t in texts), N_NEW, own, **ends)
        assert alone.ids == one.ids


def test_drawn_tokens_follow_the_models_probabilities_and_their_own_seeds():
    scores = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, -1)
    seeds = torch.arange(20_000) * 13 + 5
    score, chosen = draw(scores, seeds)
    shares = torch.bincount(chosen, minlength=3) / len(chosen)
    assert torch.allclose(shares.float(), torch.tensor([0.6, 0.3, 0.1]), atol=0.015)
    assert torch.equal(score, scores.gather(1, chosen[:, None])[:, 0])
    assert torch.equal(draw(scores[:7], seeds[:7])[1], chosen[:7]) and not torch.equal(
        draw(scores, seeds + 1)[1], chosen
    )
