"""What an injector does to the target: nothing at the start, then what its message says, at every step alike.

python -m pytest tests/test_injectors.py
"""

import numpy as np
import pytest
import torch

from bridgekit.config import ConfigError, load_config
from bridgekit.model.bridge import build_bridge
from bridgekit.model.generation import bridged_logits, decode_bridged, generate_batch, unpad
from bridgekit.model.injectors import align_message, pick_inject_layers
from bridgekit.model.message import Message
from bridgekit.model.states import align_tokens, read_source
from bridgekit.tasks import load_examples
from bridgekit.tasks.base import literal_prompt, source_prompt
from bridgekit.train.steps import step_losses

CLOSED = [("residual", 4), ("residual", -1), ("kv", -1)]  # those that leave the target's text as it is


@pytest.fixture
def one_batch(tiny, pair, val, training_set):
    """`one_batch(...)`: a bridge from layers 1 and 2, a batch of six problems, and the bridge's message."""

    def make(opened: bool = False, **changes):
        config = tiny(**changes)
        torch.manual_seed(0)
        bridge = build_bridge(config, 2, pair.source.hidden_size, pair.target).eval()
        if opened:
            for name, p in bridge.named_parameters():
                if name.endswith("opening"):
                    torch.nn.init.constant_(p, 1.0)
                elif name.endswith(("attend.out.weight", "mix.2.weight")):
                    p.data *= 10  # so much that greedy text changes
        batch = training_set(config, val[:6]).batch(np.arange(6), np.arange(6))
        message = bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment)
        return config, bridge, batch, message

    return make


def logits_of(pair, bridge, batch, message):
    return bridged_logits(pair.target, bridge, message, batch.before, batch.after, batch.labels, batch.labels_mask)


def alone(pair, batch):
    from bridgekit.model.generation import answer_logits

    nothing = (batch.literal[0][:, :0], batch.literal[1][:, :0])
    return answer_logits(pair.target, nothing, batch.literal, None, batch.labels, batch.labels_mask)


@pytest.mark.parametrize("producer", ["resampler", "dit", "constant"])
@pytest.mark.parametrize("injector, k", CLOSED)
def test_at_the_start_the_targets_logits_are_exactly_its_own(one_batch, pair, producer, injector, k):
    _, bridge, batch, message = one_batch(producer=producer, injector=injector, n_soft_tokens=k)
    assert torch.equal(logits_of(pair, bridge, batch, message), alone(pair, batch))
    assert set(bridge.injector.gates().values()) == {0.0}


@pytest.mark.parametrize("injector, k", [*CLOSED, ("prefix+residual", 4)])
def test_an_open_gate_lets_the_message_through_and_nothing_stays_behind(one_batch, pair, injector, k):
    def hooks() -> list:  # reading hidden states elsewhere leaves hooks of transformers' own
        return [(*m._forward_hooks, *m._forward_pre_hooks) for m in pair.target.model.modules()]

    _, bridge, batch, message = one_batch(True, injector=injector, n_soft_tokens=k)
    before = hooks()
    first = logits_of(pair, bridge, batch, message)
    assert not torch.allclose(first, alone(pair, batch), atol=1e-3)
    other = Message(message.tokens.flip(-1), message.mask, message.alignment)
    assert not torch.allclose(logits_of(pair, bridge, batch, other), first, atol=1e-4)
    assert torch.equal(alone(pair, batch), alone(pair, batch))
    assert hooks() == before


@pytest.mark.parametrize("injector, k", [*CLOSED, ("prefix+residual", 4)])
def test_decoding_step_by_step_says_what_the_whole_pass_predicts(one_batch, pair, injector, k):
    """Greedy tokens, given back as an answer, are the likeliest at each of their places: the cache loses nothing."""
    _, bridge, batch, message = one_batch(True, injector=injector, n_soft_tokens=k)
    with torch.no_grad():
        said = decode_bridged(pair.target, bridge, message, unpad(*batch.before), unpad(*batch.after), 12)
        plain = generate_batch(pair.target, unpad(*batch.literal), [[]] * 6, max_new_tokens=12)
    assert [g.ids for g in said] != [g.ids for g in plain]
    for i, g in enumerate(said):
        one, row = message.select(torch.tensor([i])), slice(i, i + 1)
        labels = torch.tensor([g.ids])
        before, after = ((ids[row], mask[row]) for ids, mask in (batch.before, batch.after))
        logits = bridged_logits(pair.target, bridge, one, before, after, labels, torch.ones_like(labels).bool())
        assert logits[0].argmax(-1).tolist() == list(g.ids)


@pytest.mark.parametrize("injector, k", [*CLOSED, ("prefix+residual", 4)])
def test_a_first_step_opens_the_gates(one_batch, pair, injector, k):
    config, bridge, batch, _ = one_batch(injector=injector, n_soft_tokens=k)
    total, count = step_losses(config, bridge, pair.target, batch, lambda rows: (rows, 0))["nll"]
    (total / count).backward()
    gates = [p for n, p in bridge.named_parameters() if n.endswith("opening")]
    assert gates and all(gate.grad.abs() > 0 for gate in gates)


# -- alignment ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["weights", "context"])
@pytest.mark.parametrize("direction", ["forward", "swapped"])
def test_every_target_token_is_covered_by_the_source_tokens_it_stands_for(tiny, pair, variant, direction):
    examples = load_examples(tiny(variant=variant), pair.lexicon_seed, "val")[:40]
    source, target = (pair.source, pair.target) if direction == "forward" else (pair.target, pair.source)
    spans = align_tokens(source, target, examples)
    rows = read_source(source, examples, "prompt", {})
    split_words = 0
    for example, span, row in zip(examples, spans, rows, strict=True):
        pairs = list(zip(span[::2], span[1::2], strict=True))
        prompt, read = literal_prompt(example).text, source_prompt(example).text
        ours = target.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        theirs = source.tokenizer(read, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        assert pairs[0] == (0, 1) and len(pairs) == 1 + len(ours)
        for (start, end), (a, b) in zip(pairs[1:], ours, strict=True):
            assert 1 <= start < end <= len(row)
            left, right = theirs[start - 1][0], theirs[end - 2][1]
            shift = len(read) - len(prompt)
            assert left <= a + shift and b + shift <= right, "covers the token's own characters"
            inner = theirs[start - 1][1] > a + shift and theirs[end - 2][0] < b + shift
            assert inner, "and no source token that shares none of them"
        split_words += len(ours) != len(theirs) - sum(b <= len(read) - len(prompt) for _, b in theirs)
    assert split_words > 0  # the tokenizers do differ


def test_aligned_tokens_are_means_of_their_spans_by_hand():
    tokens = torch.arange(1.0, 9.0).view(1, 4, 2)
    mask = torch.tensor([[True, True, True, False]])
    message = Message(tokens, mask, torch.tensor([[[0, 1], [1, 3], [3, 3]]]))
    found, here = align_message(message, torch.tensor([[0, 1, 2, 3]]))
    assert here.tolist() == [[True, True, False, False]]
    assert found[0, :2].tolist() == [[1.0, 2.0], [4.0, 5.0]]


def test_kv_without_an_alignment_is_an_error(one_batch, pair):
    _, bridge, batch, message = one_batch(injector="kv", n_soft_tokens=-1)
    with pytest.raises(ValueError, match="token alignment"):
        logits_of(pair, bridge, batch, Message(message.tokens, message.mask))


# -- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, key",
    [
        (dict(n_soft_tokens=16), "bridge.n_soft_tokens"),
        (dict(n_soft_tokens=-1, prompt_mode="soft_only"), "bridge.prompt_mode"),
        (dict(n_soft_tokens=-1, train_prompt_mode="soft_only"), "bridge.train_prompt_mode"),
        (dict(n_soft_tokens=-1, source_view="facts", variant="context"), "bridge.source_view"),
    ],
)
def test_kv_refuses_what_leaves_nothing_to_align(changes, key):
    with pytest.raises(ConfigError, match=key):
        load_config(injector="kv", **changes)


def test_layers_to_work_on():
    assert pick_inject_layers("auto", 4) == (0, 1, 2, 3)
    assert len(pick_inject_layers("auto", 32)) == 8 and pick_inject_layers("auto", 32)[-1] == 31
    assert pick_inject_layers("0,2", 4) == (0, 2)
    for wrong in ("0,4", "-1", "1,1", "two"):
        with pytest.raises(ConfigError, match="bridge.inject_layers"):
            pick_inject_layers(wrong, 4)
