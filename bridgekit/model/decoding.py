"""The bridged target's logits on given answers, and its loss on answers that it makes up itself.

Decode-aware supervision: every few steps the bridged target answers some questions freely, and what it said reaches
the bridge. `own_steps` asks for the gold answer's likelihood after the target's own steps; `policy_gradient` samples
answers and makes right ones likelier than wrong ones to the same question.
Shapes: B batch, A answer tokens, K soft tokens, V vocabulary, N sampled answers to a question.
"""

import torch

from bridgekit.config import Config
from bridgekit.model import losses
from bridgekit.model.batches import Batch
from bridgekit.model.bridge import Bridge, Message
from bridgekit.model.generation import Generated, assemble, generate_batch, pad_ids
from bridgekit.model.pair import LanguageModel
from bridgekit.tasks.answers import extract_answer


def answer_logits(lm: LanguageModel, before, after, soft, labels, labels_mask) -> torch.Tensor:
    """Logits that predict the answer's tokens after [before | soft | after]. -> (B, A, V)

    Hidden states come first and the head sees the answer's places alone: logits at every place of every soft token
    are what ran the first experiments out of memory.
    """
    text = (torch.cat([after[0], labels], dim=1), torch.cat([after[1], labels_mask], dim=1))
    embeds, mask, _ = assemble(lm, before, text, soft, "right")
    # Padding stands at the right end, where causal attention never looks: no mask is needed.
    hidden = lm.model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    first = mask.sum(1) - labels_mask.sum(1) - 1
    places = (first[:, None] + torch.arange(labels.shape[1], device=labels.device)).clamp(max=hidden.shape[1] - 1)
    hidden = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[2]))
    return lm.model.get_output_embeddings()(hidden)


def decode_loss(config: Config, bridge: Bridge, target: LanguageModel, batch: Batch, message: Message) -> losses.Total:
    """The loss of this process's share of `decode_batch` questions."""
    settings = config.loss
    n = min(settings.decode_batch // config.train.num_processes, len(batch.mask))
    rows = torch.arange(n, device=batch.mask.device)
    sampled = settings.decode_estimator == "policy_gradient"
    if sampled:
        rows = rows.repeat_interleave(settings.decode_samples)
    message = message.select(rows)
    before, after, final = ((ids[rows], mask[rows]) for ids, mask in (batch.before, batch.after, batch.final))
    seeds = batch.seeds[rows] + torch.arange(len(rows), device=rows.device) if sampled else None
    said = decode_bridged(target, bridge, message, unpad(*before), unpad(*after), settings.decode_tokens, seeds)
    gold = unpad(*final)
    if sampled:
        labels, mask = pad_ids([list(g.ids) for g in said], target.device)
        wanted = [extract_answer(t) for t in target.tokenizer.batch_decode(gold, skip_special_tokens=True)]
        right = [float(extract_answer(g.text) == w) for g, w in zip(said, wanted, strict=True)]
        reward = torch.tensor(right, device=target.device).view(n, settings.decode_samples)
        logits = bridged_logits(target, bridge, message, before, after, labels, mask)
        return losses.policy_gradient(logits, labels, mask, losses.leave_one_out(reward).flatten())
    steps = [own_steps(target, g) for g in said]
    labels, mask = pad_ids([s + g for s, g in zip(steps, gold, strict=True)], target.device)
    lengths = torch.tensor([len(s) for s in steps], device=target.device)
    counted = mask & (torch.arange(mask.shape[1], device=target.device) >= lengths[:, None])
    return losses.answer_nll(bridged_logits(target, bridge, message, before, after, labels, mask), labels, counted)


def bridged_logits(target: LanguageModel, bridge: Bridge, message: Message, before, after, labels, mask):
    """Logits of the bridged target on these answers, with a gradient to the bridge. (B, A, V)"""
    with bridge.injector.attach(target, lambda: message):
        return answer_logits(target, before, after, bridge.injector.soft(message), labels, mask)


def decode_bridged(
    target: LanguageModel, bridge: Bridge, message: Message, before: list, after: list, max_new_tokens: int,
    sample_seeds: torch.Tensor | None = None,
) -> list[Generated]:  # fmt: skip
    """The one place where a message meets the target's decode loop, whichever bridge it came from."""
    current = [message]

    def select(rows: torch.Tensor) -> None:
        current[0] = current[0].select(rows)

    return generate_batch(
        target, before, after, soft=bridge.injector.soft(message),
        attach=bridge.injector.attach(target, lambda: current[0]), select=select, max_new_tokens=max_new_tokens,
        sample_seeds=sample_seeds,
    )  # fmt: skip


def unpad(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]


def own_steps(target: LanguageModel, said: Generated) -> list[int]:
    """What was said up to its final answer: without the marker, what follows it, and the end."""
    ids = [i for i in said.ids if i not in target.eos_ids]
    pieces = target.tokenizer.batch_decode([[i] for i in ids])
    return ids[: next((n for n, piece in enumerate(pieces) if "#" in piece), len(ids))]
