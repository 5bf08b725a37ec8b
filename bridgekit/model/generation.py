"""One decode path for every condition: batched greedy decoding with a KV cache, from text and soft tokens alike.

    texts = generate_batch(lm, before, after)                          # a model alone: rows of token ids
    texts = decode_bridged(target, bridge, message, before, after, 96)  # with what the bridge brings
    logits = bridged_logits(target, bridge, message, before, after, labels, mask)  # of given answers, with a gradient

Shapes: B batch, T tokens, K soft tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from bridgekit.model.bridge import Bridge
from bridgekit.model.message import Message, Soft, hashed_uniform
from bridgekit.model.pair import LanguageModel
from bridgekit.tasks.answers import answer_is_complete

CHECK_EVERY = 16  # steps between looks at the text of rows that have not ended
GROWTH = 32  # cache slots allocated at a time
READ_EVERY = 8  # steps between reading tokens back from a GPU
SHRINK_AT = 0.75  # a batch shrinks when no larger share of its rows goes on


@dataclass(frozen=True)
class Generated:
    text: str
    logprob: float  # mean over the generated tokens
    n_tokens: int
    ids: tuple[int, ...] = ()


@dataclass
class _Row:
    ids: list[int] = field(default_factory=list)
    logprob: float = 0.0
    ended: bool = False


class PreallocatedLayer(DynamicLayer):
    """A cache layer that grows by GROWTH slots at a time.

    Concatenation would copy the whole cache for every token: two fifths of the time on a CPU."""

    keys = values = None  # the filled part of `slots`
    slots: tuple[torch.Tensor, torch.Tensor] | None = None
    filled: torch.Tensor | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **options):
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        # Where rows were taken out meanwhile, the keys are other tensors than the slots' filled part.
        if self.slots is None or self.keys is not self.filled or new > self.slots[0].shape[-2]:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            shape = (*key_states.shape[:2], new + GROWTH)
            self.slots = tuple(s.new_empty(*shape, s.shape[-1]) for s in (key_states, value_states))
            for slots, cached in zip(self.slots, (self.keys, self.values), strict=True):
                if old:
                    slots[:, :, :old] = cached
        for slots, fresh in zip(self.slots, (key_states, value_states), strict=True):
            slots[:, :, old:new] = fresh
        self.keys, self.values = (slots[:, :, :new] for slots in self.slots)
        self.filled = self.keys
        return self.keys, self.values


def new_cache(lm: LanguageModel) -> DynamicCache:
    cache = DynamicCache(config=lm.model.config)
    cache.layers = [PreallocatedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def pad_ids(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask. -> (B, T), (B, T) bool"""
    width = max((len(r) for r in rows), default=0)
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows], dtype=torch.long).view(len(rows), width)
    lengths = torch.tensor([len(r) for r in rows])
    mask = torch.arange(width)[None, :] < lengths[:, None]
    return ids.to(device), mask.to(device)


def compact(embeds: torch.Tensor, mask: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Push all padding to one side, keeping the order of what is real. (B, T, D), (B, T)"""
    key = mask if side == "left" else ~mask
    order = torch.argsort(key.to(torch.uint8), dim=1, stable=True)
    return embeds.gather(1, order[:, :, None].expand_as(embeds)), mask.gather(1, order)


def assemble(lm: LanguageModel, before: tuple, after: tuple, soft: Soft | None, side: str) -> tuple[torch.Tensor, ...]:
    """Embeddings (B, T, D), mask (B, T), positions (B, T) of [before | soft | after]; ids and mask before and after."""
    middle = [] if soft is None else [(soft.tokens.to(lm.dtype), soft.mask)]
    parts, masks = zip((lm.embed(before[0]), before[1]), *middle, (lm.embed(after[0]), after[1]), strict=True)
    embeds, mask = compact(torch.cat(parts, dim=1), torch.cat(masks, dim=1), side)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return embeds, mask, positions


@torch.no_grad()
def generate_batch(
    lm: LanguageModel,
    before: list[list[int]],
    after: list[list[int]],
    *,
    soft: Soft | None = None,
    attach: AbstractContextManager | None = None,
    select=None,
    max_new_tokens: int = 96,
    sample_seeds: torch.Tensor | None = None,
    is_complete: Callable[[str], bool] = answer_is_complete,
) -> list[Generated]:
    """Greedy continuation of each row; finished rows leave the batch.

    `attach` is what a non-prefix injector does to the target while it decodes, and `select(rows)` tells it which rows
    are left. With `sample_seeds` (B,) the tokens are drawn instead, each row's by its own seed. A text that a task
    calls complete (`is_complete`) ends its row, whether or not the model ended it."""
    n = len(before)
    device = lm.device
    rows = [_Row() for _ in range(n)]
    alive = list(range(n))
    with attach or nullcontext():
        embeds, mask, positions = assemble(lm, pad_ids(before, device), pad_ids(after, device), soft, "left")
        cache = new_cache(lm)
        step_input = {"inputs_embeds": embeds}
        position = positions[:, -1:]
        pending: list[tuple[torch.Tensor, torch.Tensor]] = []  # chosen tokens not yet read back
        for step in range(max_new_tokens):
            out = lm.model(
                **step_input, attention_mask=mask, position_ids=positions, past_key_values=cache,
                use_cache=True, logits_to_keep=1,
            )  # fmt: skip
            scores = out.logits[:, -1].float().log_softmax(-1)
            score, chosen = scores.max(-1) if sample_seeds is None else draw(scores, sample_seeds + 7919 * step)
            pending.append((chosen, score))
            last = step == max_new_tokens - 1
            # Reading back is a sync on a GPU: do it every few steps there, at each step on CPU where it is free.
            if last or device.type == "cpu" or len(pending) == READ_EVERY:
                check = is_complete if step % CHECK_EVERY == CHECK_EVERY - 1 else None
                keep = _read_back(lm, pending, alive, rows, check)
                pending = []
                if last or not keep:
                    break
                if len(keep) <= SHRINK_AT * len(alive):
                    left = torch.tensor(keep, device=device)
                    cache.batch_select_indices(left)
                    chosen, mask, position = chosen[left], mask[left], position[left]
                    alive = [alive[i] for i in keep]
                    sample_seeds = None if sample_seeds is None else sample_seeds[left]
                    if select is not None:
                        select(left)
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
            positions = position = position + 1
            step_input = {"input_ids": chosen[:, None]}
    texts = lm.tokenizer.batch_decode([_until_eos(r.ids, lm.eos_ids) for r in rows], skip_special_tokens=True)
    ended = zip(texts, rows, strict=True)
    return [Generated(text, row.logprob / len(row.ids), len(row.ids), tuple(row.ids)) for text, row in ended]


def draw(scores: torch.Tensor, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, with its log-probability, by the row's seed alone. (B, V), (B,) -> (B,), (B,)"""
    uniform = hashed_uniform(seeds, scores.shape[1])
    chosen = (scores - (-uniform.log()).log()).argmax(-1)  # Gumbel's way to draw from a softmax
    return scores.gather(1, chosen[:, None])[:, 0], chosen


def _until_eos(ids: list[int], eos_ids: set[int]) -> list[int]:
    return ids[:-1] if ids and ids[-1] in eos_ids else ids


def _read_back(lm, pending, alive, rows: list[_Row], is_complete: Callable[[str], bool] | None) -> list[int]:
    """Move chosen tokens to the rows they belong to; returns the batch rows that are not finished."""
    chosen = torch.stack([c for c, _ in pending], dim=1).tolist()
    scores = torch.stack([s for _, s in pending], dim=1).tolist()
    keep = []
    for i, index in enumerate(alive):
        row = rows[index]
        for token, score in zip(chosen[i], scores[i], strict=True):
            if not row.ended:
                row.ids.append(token)
                row.logprob += score
                row.ended = token in lm.eos_ids
        # A row's own length decides when its text is looked at, so its text cannot depend on its neighbours.
        if is_complete is not None and not row.ended:
            row.ended = is_complete(lm.tokenizer.decode(row.ids, skip_special_tokens=True))
        if not row.ended:
            keep.append(i)
    return keep


def answer_logits(lm: LanguageModel, before, after, soft, labels, labels_mask) -> torch.Tensor:
    """Logits that predict the answer's tokens after [before | soft | after]. -> (B, A, V)

    Hidden states come first and the head sees the answer's places alone: logits at every place of every soft token
    are what ran the first experiments out of memory.
    """
    text = (torch.cat([after[0], labels], dim=1), torch.cat([after[1], labels_mask], dim=1))
    embeds, mask, _ = assemble(lm, before, text, soft, "right")
    # Padding is at the right end, where causal attention never looks: no mask is needed.
    hidden = lm.decoder(inputs_embeds=embeds, use_cache=False).last_hidden_state
    first = mask.sum(1) - labels_mask.sum(1) - 1
    places = (first[:, None] + torch.arange(labels.shape[1], device=labels.device)).clamp(max=hidden.shape[1] - 1)
    hidden = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
    return lm.model.get_output_embeddings()(hidden)


def bridged_logits(target: LanguageModel, bridge: Bridge, message: Message, before, after, labels, mask):
    """Logits of the bridged target on these answers, with a gradient to the bridge. (B, A, V)"""
    with bridge.injector.attach(target, lambda: message):
        return answer_logits(target, before, after, bridge.injector.soft(message), labels, mask)


def decode_bridged(
    target: LanguageModel, bridge: Bridge, message: Message, before: list, after: list, max_new_tokens: int,
    sample_seeds: torch.Tensor | None = None, is_complete: Callable[[str], bool] = answer_is_complete,
) -> list[Generated]:  # fmt: skip
    """The one place where a message meets the target's decode loop, whichever bridge it came from.

    Decoding is evaluation: the injector has no dropout here, also in the middle of training."""
    current = [message]

    def select(rows: torch.Tensor) -> None:
        current[0] = current[0].select(rows)

    with evaluating(bridge.injector) as injector:
        return generate_batch(
            target, before, after, soft=injector.soft(message), attach=injector.attach(target, lambda: current[0]),
            select=select, max_new_tokens=max_new_tokens, sample_seeds=sample_seeds, is_complete=is_complete,
        )  # fmt: skip


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module in evaluation mode, for as long as the context is open."""
    was_training = module.training
    try:
        yield module.eval()
    finally:
        module.train(was_training)


def unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
