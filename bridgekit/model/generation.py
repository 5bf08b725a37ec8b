"""One decode loop for every condition: batched greedy decoding, from text and soft tokens alike.

    texts = generate_batch(lm, before, after)                          # a model alone: rows of token ids
    texts = decode_bridged(target, bridge, message, before, after, 96)  # with what the bridge brings
    logits = bridged_logits(target, bridge, message, before, after, labels, mask)  # of given answers, with a gradient

Shapes: B batch, T tokens, K soft tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from bridgekit.model.attention import Pass, Shared, attending
from bridgekit.model.decoding import open_steps
from bridgekit.model.message import Injector, Message, hashed_uniform
from bridgekit.model.pair import LanguageModel, pad_ids
from bridgekit.tasks.answers import answer_is_complete

if typing.TYPE_CHECKING:
    from bridgekit.model.bridge import Bridge

CHECK_EVERY = 16  # steps between looks at the text of rows that have not ended
LOOK_EVERY = {"cpu": 1}  # steps between looks at which rows have ended; elsewhere 8, because to look is to wait


# ---- what the target reads ------------------------------------------------------------------------------------------


def compact(embeds: torch.Tensor, mask: torch.Tensor, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Push all padding to one side, keeping the order of what is real. (B, T, D), (B, T)"""
    key = mask if side == "left" else ~mask
    order = torch.argsort(key.to(torch.uint8), dim=1, stable=True)
    return embeds.gather(1, order[:, :, None].expand_as(embeds)), mask.gather(1, order)


def assemble(
    lm: LanguageModel, before: tuple, after: tuple, soft: Message | None, side: str
) -> tuple[torch.Tensor, ...]:
    """Embeddings (B, T, D), mask (B, T), positions (B, T) of [before | soft | after]; ids and mask before and after."""
    middle = [] if soft is None else [(soft.tokens.to(lm.dtype), soft.mask)]
    parts, masks = zip((lm.embed(before[0]), before[1]), *middle, (lm.embed(after[0]), after[1]), strict=True)
    embeds, mask = compact(torch.cat(parts, dim=1), torch.cat(masks, dim=1), side)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    return embeds, mask, positions


def unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


# ---- logits of given answers ----------------------------------------------------------------------------------------


def answer_states(lm: LanguageModel, before, after, soft, labels, labels_mask, shared=None) -> torch.Tensor:
    """Last states that predict the answer's tokens after [shared | before | soft | after]. -> (B, A, D)

    Hidden states come first and the head sees the answer's places alone: logits at every place of every soft token
    are what ran the first experiments out of memory.
    """
    text = (torch.cat([after[0], labels], dim=1), torch.cat([after[1], labels_mask], dim=1))
    embeds, mask, positions = assemble(lm, before, text, soft, "right")
    # Padding is at the right end, where causal attention never looks: no mask is needed.
    places = {} if shared is None else {"position_ids": positions + len(shared)}
    with attending(lm, shared and Pass(shared)):
        hidden = lm.decoder(inputs_embeds=embeds, use_cache=False, **places).last_hidden_state
    first = mask.sum(1) - labels_mask.sum(1) - 1
    places = (first[:, None] + torch.arange(labels.shape[1], device=labels.device)).clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))


def answer_logits(lm: LanguageModel, *given) -> torch.Tensor:
    """Logits of what `answer_states` is given. -> (B, A, V)"""
    return lm.head(answer_states(lm, *given))


def bridged_logits(target: LanguageModel, bridge: Bridge, message: Message, before, after, labels, mask, shared=None):
    """Logits of the bridged target on these answers, with a gradient to the bridge. (B, A, V)"""
    with bridge.injector.attach(target, lambda: message):
        return answer_logits(target, before, after, bridge.injector.soft(message), labels, mask, shared)


# ---- free answers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Generated:
    text: str
    logprob: float  # mean over the generated tokens
    n_tokens: int
    ids: tuple[int, ...] = ()


@torch.no_grad()
def generate_batch(
    lm: LanguageModel, before: list, after: list, message: Message | None = None, injector: Injector | None = None,
    max_new_tokens: int = 96, sample_seeds=None, is_complete: Callable[[str], bool] = answer_is_complete,
    shared: Shared | None = None,
) -> list[Generated]:  # fmt: skip
    """Greedy continuation of rows of token ids, with what an injector makes of a message; ended rows leave the batch.

    All rows stand behind the `shared` start, if there is one. With `sample_seeds` (B,) the tokens are drawn instead,
    each row's by its own seed. A text that a task calls complete (`is_complete`) ends its row, whether or not the model
    ended it."""
    injector = injector or Injector()
    device, most = lm.device, max_new_tokens
    rows = torch.arange(len(before), device=device)  # those in the batch
    ids, scores = (torch.zeros(len(rows), most, dtype=dtype, device=device) for dtype in (torch.long, torch.float))
    lengths = torch.full_like(rows, most)  # a row that has not ended yet has the greatest
    ends = torch.tensor(sorted(lm.eos_ids), dtype=torch.long, device=device)
    soft = None if message is None else injector.soft(message)
    n_soft = 0 if soft is None else soft.mask.shape[1]
    widest = max((len(b) + len(a) for b, a in zip(before, after, strict=True)), default=0) + n_soft
    steps = open_steps(lm, shared, len(rows), widest + most)
    steps.message = message
    with injector.attach(lm, lambda: steps.message):
        texts = pad_ids(before, device), pad_ids(after, device)
        logits = steps.start(*assemble(lm, *texts, soft, steps.side), injector, message)
        for done in range(1, most + 1):
            scores_now = logits.float().log_softmax(-1)
            seeds = None if sample_seeds is None else sample_seeds[rows] + 7919 * (done - 1)
            scores[rows, done - 1], chosen = scores_now.max(-1) if seeds is None else draw(scores_now, seeds)
            ids[rows, done - 1] = chosen
            lengths[rows] = torch.where(torch.isin(chosen, ends), lengths[rows].clamp(max=done), lengths[rows])
            if done % LOOK_EVERY.get(device.type, 8) == 0:
                # A row's own length decides when its text is looked at, so its text cannot depend on its neighbours.
                going = rows[lengths[rows] > done] if done % CHECK_EVERY == 0 else rows[:0]
                if len(going):
                    texts = lm.tokenizer.batch_decode(ids[going, :done].tolist(), skip_special_tokens=True)
                    ended = [row for row, text in zip(going.tolist(), texts, strict=True) if is_complete(text)]
                    lengths[ended] = done
                left = (lengths[rows] > done).nonzero()[:, 0]
                if not len(left):
                    break
                if len(left) <= steps.smallest * len(rows):
                    steps.keep(left)
                    rows, chosen = rows[left], chosen[left]
            if done < most:
                logits = steps.next(chosen)
    found = [(i[:n], s[:n], n) for i, s, n in zip(ids.tolist(), scores.tolist(), lengths.tolist(), strict=True)]
    words = [[token for token in i if token not in lm.eos_ids] for i, _, _ in found]
    texts = lm.tokenizer.batch_decode(words, skip_special_tokens=True)
    return [Generated(text, sum(s) / n, n, tuple(i)) for text, (i, s, n) in zip(texts, found, strict=True)]


def draw(scores: torch.Tensor, seeds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One token a row, with its log-probability, by the row's seed alone. (B, V), (B,) -> (B,), (B,)"""
    uniform = hashed_uniform(seeds, scores.shape[1])
    chosen = (scores - (-uniform.log()).log()).argmax(-1)  # Gumbel's way to draw from a softmax
    return scores.gather(1, chosen[:, None])[:, 0], chosen


def decode_bridged(
    target: LanguageModel, bridge: Bridge, message: Message, before, after, max_new_tokens, sample_seeds=None, **options
) -> list[Generated]:
    """The one place where a message meets the target's decode loop, whichever bridge it came from.

    Decoding is evaluation: the injector has no dropout here, also in the middle of training."""
    options |= dict(max_new_tokens=max_new_tokens, sample_seeds=sample_seeds)
    with evaluating(bridge.injector) as injector:
        return generate_batch(target, before, after, message, injector, **options)


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module in evaluation mode, for as long as the context is open."""
    was_training = module.training
    try:
        yield module.eval()
    finally:
        module.train(was_training)
