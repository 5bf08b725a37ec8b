"""One decode path: the model's own greedy text, whatever stands beside a row or in place of its tokens.

python -m pytest tests/model/test_generation.py
"""

from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cache_utils import DynamicLayer

from bridgekit.model import generation
from bridgekit.model.bridge import build_bridge
from bridgekit.model.generation import (
    CHECK_EVERY,
    PreallocatedLayer,
    answer_logits,
    assemble,
    bridged_logits,
    compact,
    decode_bridged,
    draw,
    generate_batch,
    pad_ids,
    unpad,
)
from bridgekit.model.injectors import Prefix
from bridgekit.model.message import Message, hashed_normal
from bridgekit.model.pair import split_prompts
from bridgekit.model.states import SourceStates, in_batches, read_source
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


def alike(found, others, tolerance: float = 1e-5) -> bool:
    logprobs = [g.logprob for g in others]
    same = [(g.text, g.n_tokens) for g in found] == [(g.text, g.n_tokens) for g in others]
    return same and [g.logprob for g in found] == pytest.approx(logprobs, abs=tolerance)


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


def test_rows_that_end_early_change_nothing_for_the_others(pair, prompts):
    together = generate(pair.target, prompts)
    assert alike([generate(pair.target, [row])[0] for row in prompts], together)
    assert alike(generate(pair.target, prompts[::-1])[::-1], together)
    assert [g.n_tokens for g in generate(pair.target, prompts, 5)] == [1] + [5] * (len(prompts) - 1)


def test_looking_at_ends_less_often_as_on_a_gpu_changes_nothing(pair, prompts, monkeypatch):
    lm, together = pair.target, generate(pair.target, prompts)
    monkeypatch.setitem(generation.LOOK_EVERY, "cpu", 8)
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


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4), st.booleans())
@settings(max_examples=50, deadline=None)
def test_compacting_moves_padding_to_one_side_and_keeps_order(rows, left):
    mask = torch.tensor(rows)
    embeds = torch.arange(mask.numel(), dtype=torch.float).view(*mask.shape, 1)
    packed, packed_mask = compact(embeds, mask, "left" if left else "right")
    for i, row in enumerate(rows):
        assert packed_mask[i].tolist() == sorted(row, reverse=not left)
        assert packed[i][packed_mask[i]].tolist() == embeds[i][mask[i]].tolist()


def test_positions_count_what_is_real(pair):
    before, after = pad_ids([[5, 6], [7]], pair.target.device), pad_ids([[8], [9, 10]], pair.target.device)
    soft = Message(torch.zeros(2, 2, pair.target.hidden_size), torch.tensor([[True, True], [True, False]]))
    _, mask, positions = assemble(pair.target, before, after, soft, "left")
    assert [p[m].tolist() for p, m in zip(positions, mask, strict=True)] == [[0, 1, 2, 3, 4], [0, 1, 2, 3]]


class Watching(Prefix):
    """A prefix that notes, at every step of the target, its message and how many rows the batch has."""

    @contextmanager
    def attach(self, target, current):
        def note(module, arguments, keywords):
            given = keywords["inputs_embeds"] if keywords.get("inputs_embeds") is not None else keywords["input_ids"]
            self.seen.append((current().tokens[:, 0, 0].tolist(), len(given)))

        hook, self.seen = target.model.register_forward_pre_hook(note, with_kwargs=True), []
        try:
            yield
        finally:
            hook.remove()


def test_an_injector_sees_the_message_of_the_rows_that_are_left(pair, prompts):
    lm, bridge, n = pair.target, torch.nn.Module(), len(prompts)
    bridge.injector = Watching()
    marks = torch.arange(n).float()[:, None, None].expand(-1, 2, lm.hidden_size) * 1e-3
    message = Message(marks, torch.ones(n, 2, dtype=torch.bool))
    decode_bridged(lm, bridge, message, [r[:1] for r in prompts], [r[1:] for r in prompts], N_NEW)
    rows = [tokens for tokens, _ in bridge.injector.seen]
    assert all(len(tokens) == size for tokens, size in bridge.injector.seen)
    assert len(rows[0]) == n > len(rows[-1])  # some rows have left
    assert all(set(now) <= set(before) and now == sorted(now) for before, now in zip(rows, rows[1:], strict=False))
    assert not lm.model._forward_pre_hooks  # and the target is left as it was


@pytest.mark.parametrize("condition", ["bridged", "zero", "noise", "constant"])
def test_text_does_not_depend_on_the_batch_size(tiny, pair, val, condition):
    """Alone, in batches of 7 and all at once: a condition's texts are the same, whatever its soft tokens are."""
    config = tiny(producer="constant" if condition == "constant" else "dit", n_soft_tokens=-1, state_dropout=0.2)
    torch.manual_seed(0)
    bridge = build_bridge(config, 2, pair.source.hidden_size, pair.target).eval()
    states = SourceStates(pair.source, read_source(pair.source, val[:12], "prompt", {}), (2, 4), 1.0)
    pieces = [p.all for p in split_prompts(pair.target, [literal_prompt(e) for e in val[:12]])]

    def decode(size: int) -> list:
        results = {}
        for chunk in in_batches([len(p) for p in pieces], size):
            hidden, mask = states.batch(chunk, pair.target.device)
            seeds = torch.from_numpy(chunk) + 100
            noise = hashed_normal(seeds, hidden.shape[1:]) * mask[..., None, None]
            hidden = {"zero": hidden * 0, "noise": noise}.get(condition, hidden)
            texts = [pair.target.bos] * len(chunk), [pieces[i] for i in chunk]
            found = decode_bridged(pair.target, bridge, bridge.encode(hidden, mask, seeds), *texts, 20)
            results |= dict(zip(chunk.tolist(), found, strict=True))
        return [results[i] for i in range(12)]

    alone = decode(1)
    assert alike(decode(7), alone, 1e-4) and alike(decode(64), alone, 1e-4)


def test_decoding_in_the_middle_of_training_has_no_dropout(one_batch, pair):
    _, bridge, batch, message = one_batch(True, injector="prefix+residual", dropout=0.5, heads=2)
    texts = [unpad(*part) for part in (batch.before, batch.after)]
    wanted = decode_bridged(pair.target, bridge, message, *texts, 12)
    bridge.train()
    assert decode_bridged(pair.target, bridge, message, *texts, 12) == wanted
    assert all(module.training for module in bridge.modules())  # and training goes on


# -- drawn tokens -------------------------------------------------------------------------------------------


def test_drawn_tokens_follow_the_models_probabilities_and_their_own_seeds():
    scores = torch.tensor([0.6, 0.3, 0.1]).log().expand(20_000, -1)
    seeds = torch.arange(20_000) * 13 + 5
    score, chosen = draw(scores, seeds)
    shares = torch.bincount(chosen, minlength=3) / len(chosen)
    assert torch.allclose(shares.float(), torch.tensor([0.6, 0.3, 0.1]), atol=0.015)
    assert torch.equal(score, scores.gather(1, chosen[:, None])[:, 0])
    assert torch.equal(draw(scores[:7], seeds[:7])[1], chosen[:7])  # whatever stands beside a row
    assert not torch.equal(draw(scores, seeds + 7919)[1], chosen)


def test_sampled_text_does_not_depend_on_the_batch(one_batch, pair):
    _, bridge, batch, message = one_batch()
    texts = [unpad(*part) for part in (batch.before, batch.after)]
    together = decode_bridged(pair.target, bridge, message, *texts, 20, batch.seeds)
    for i, one in enumerate(together):
        row = message.select(torch.tensor([i]))
        (alone,) = decode_bridged(pair.target, bridge, row, *([t[i]] for t in texts), 20, batch.seeds[i : i + 1])
        assert alone.ids == one.ids
    assert len({g.text for g in together}) > 1


# -- logits of given answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["start", "question", "end"])
@pytest.mark.parametrize("mode", ["soft_plus_text", "soft_only"])
@pytest.mark.parametrize("k", [0, 3, -1])
def test_answer_logits_are_those_of_the_plain_forward(one_batch, pair, position, mode, k):
    """Ragged prompts, answers and soft tokens against one example at a time; k = 0: no soft tokens."""
    lm, wanted = pair.target, dict(soft_position=position, prompt_mode=mode, n_soft_tokens=k or 1)
    _, bridge, batch, message = one_batch(indices=(4, 0, 9), **wanted)
    labels = batch.labels, batch.labels_mask
    with torch.no_grad():
        if k:
            found = bridged_logits(lm, bridge, message, batch.before, batch.after, *labels)
        else:
            found = answer_logits(lm, batch.before, batch.after, None, *labels)
        rows = zip(*(unpad(*part) for part in (batch.before, batch.after, labels)), strict=True)
        for i, (before, after, answer) in enumerate(rows):
            soft = message.tokens[i][message.mask[i]][: None if k else 0]
            text = [lm.embed(torch.tensor(ids, dtype=torch.long)) for ids in (before, after + answer)]
            wanted = lm.model(inputs_embeds=torch.cat([text[0], soft, text[1]])[None]).logits[0]
            assert torch.allclose(found[i, : len(answer)], wanted[-len(answer) - 1 : -1], atol=1e-5, rtol=1e-5)


# -- the cache ----------------------------------------------------------------------------------------------


def test_a_preallocated_cache_holds_what_a_growing_one_holds():
    torch.manual_seed(0)
    slotted, plain = caches = PreallocatedLayer(), DynamicLayer()
    pieces = [torch.randn(2, 6, 3, t, 4) for t in (7, *[1] * 40)]  # past the slots, twice
    for step, (keys, values) in enumerate(pieces):
        for cache in caches:
            if step in (3, 20):  # rows leave; the same number of rows in another order
                cache.batch_select_indices(torch.tensor([4, 0, 1, 5] if step == 3 else [2, 3, 0, 1]))
            if step == 10:
                cache.crop(-2)
        n = 6 if step < 3 else 4
        for one, other in zip(slotted.update(keys[:n], values[:n]), plain.update(keys[:n], values[:n]), strict=True):
            assert torch.equal(one, other)
        assert slotted.get_seq_length() == plain.get_seq_length()
