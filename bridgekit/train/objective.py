"""The losses of one training step: what the bridged target is held to, and how free decoding reaches the bridge.

    totals = step_losses(experiment, bridge, batch, step)      # {name: (sum, count)} over this process's part
    loss = weigh(config, mean_losses(totals, processes))

Shapes: B batch, A answer tokens, K soft tokens, P teacher tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from bridgekit.config import Config, Loss
from bridgekit.keys import TEACHERS
from bridgekit.model import losses
from bridgekit.model.bridge import Bridge
from bridgekit.model.generation import Generated, answer_logits, bridged_logits, decode_bridged, unpad
from bridgekit.model.message import Message
from bridgekit.model.pair import LanguageModel, pad_ids
from bridgekit.train.data import Batch
from bridgekit.train.processes import Processes

if TYPE_CHECKING:
    from bridgekit.train.experiment import Experiment


def step_losses(
    experiment: Experiment, bridge: Bridge, batch: Batch, step: int = 0, name: str = "bridged", decodes: bool = True
) -> dict[str, losses.Total]:
    """Every loss that has a weight and is due, as (sum, count) over this process's part of the batch.

    That of free decoding is left out where nothing `decodes`."""
    config, target, processes = experiment.config_of(name), experiment.pair.target, experiment.processes
    weights = due_weights(config, step)
    extra = None if is_teachers_step(config, step) else experiment.extra_loss
    message = encode_batch(experiment, bridge, batch, name, step)
    result = {}
    if weights.nll_weight or weights.kl_weight or weights.format_weight or extra:
        texts = (batch.before, batch.after, batch.labels, batch.labels_mask)
        logits = bridged_logits(target, bridge, message, *texts, batch.shared)
        if weights.nll_weight:
            result["nll"] = losses.answer_nll(logits, batch.labels, batch.labels_mask)
        if weights.format_weight:
            result["format"] = losses.format_nll(logits, batch.labels, batch.marker)
        if weights.kl_weight:
            with torch.no_grad():
                alone = target_logits(target, batch)
            result["kl"] = losses.kl_slice(logits, alone, batch.labels_mask, weights.kl_tokens)
        if extra:
            given = {"labels": batch.labels, "labels_mask": batch.labels_mask, "batch": batch, "target": target}
            result["extra"] = extra(logits=logits, message=message, **given)
    if weights.prompt_weight:
        everywhere = {} if processes.world == 1 else {"reduce": lambda pair: tuple(map(processes.sum, pair))}
        teacher = embed_teacher(config, target, batch)
        result["prompt"] = losses.prompt_alignment(message.tokens, message.mask, *teacher, **everywhere)
    if weights.token_weight:
        tokens = teacher_tokens(config, batch)
        result["token"] = losses.token_nll(message.tokens, message.mask, target.embeddings, *tokens)
    if weights.info_nce_weight:
        own = losses.pool(target.embed(batch.literal[0]), batch.literal[1])
        anchors = losses.pool(message.tokens, message.mask)
        offset = processes.rank * len(own)
        result["info_nce"] = losses.info_nce(anchors, processes.gather(own), offset, weights.info_nce_temperature)
    if weights.flow_weight and message.flow_error is not None:
        result["flow"] = losses.flow(message.flow_error)
    if decodes and is_decoded(config, step):
        result["decode"] = decode_loss(experiment, bridge, batch, message)
    return result


def is_teachers_step(config: Config, step: int) -> bool:
    """Is this one of the first steps, which learn from the teacher alone?"""
    return step < config.train.teacher_steps


def due_weights(config: Config, step: int) -> Loss:
    """The losses' weights at a step: with `teacher_steps` the first ones learn from the teacher alone, the rest not."""
    if not config.train.teacher_steps:
        return config.loss
    taught, names = is_teachers_step(config, step), [name for name in vars(config.loss) if name.endswith("_weight")]
    return replace(config.loss, **{name: 0.0 for name in names if (name in TEACHERS) != taught})


def is_decoded(config: Config, step: int) -> bool:
    """Is the loss on free decoding due at this step?"""
    return due_weights(config, step).decode_weight > 0 and (step + 1) % config.loss.decode_every == 0


def teacher_tokens(config: Config, batch: Batch) -> tuple[torch.Tensor, ...]:
    """What soft tokens are to imitate, and, where that is not the one at its own place, which holds it. (B, P) each"""
    texts = {"answer": (batch.labels, batch.labels_mask), "prompt": batch.literal, "facts": batch.noted}
    return texts[config.bridge.teacher]


def embed_teacher(config: Config, target: LanguageModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """What each soft token is to be: an embedding, or a sum of them; and for which there is any. (B, P, D), (B, P)"""
    ids, mask, *places = teacher_tokens(config, batch)
    return losses.gather_places(target.embed(ids), mask, *places)


def encode_batch(experiment: Experiment, bridge: Bridge, batch: Batch, name: str, step: int = 0) -> Message:
    """The messages of a batch; a generative producer sees its teacher where it learns from it."""
    config = experiment.config_of(name)
    needed = due_weights(config, step).flow_weight or config.bridge.dit_tokens == "teacher"
    teacher = embed_teacher(config, experiment.pair.target, batch) if needed else None
    return bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment, teacher=teacher)


def target_logits(target: LanguageModel, batch: Batch) -> torch.Tensor:
    """Logits of the target alone on a batch's answers. (B, A, V)"""
    if batch.taught is not None:
        return target.head(batch.taught)
    nothing = (batch.asked[0][:, :0], batch.asked[1][:, :0])
    return answer_logits(target, nothing, batch.asked, None, batch.labels, batch.labels_mask, batch.shared_asked)


def wrap_extra_loss(loss: Callable, options: dict) -> Callable[..., losses.Total]:
    """A user's loss, given those arguments that it names; a scalar is the mean over the batch's examples."""
    parameters = inspect.signature(loss).parameters.values()
    takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters}

    def extra(**given) -> losses.Total:
        result = loss(**{k: v for k, v in given.items() if takes_all or k in names}, **options)
        if isinstance(result, tuple):
            return result
        if result is None:
            raise TypeError("it returned None, wanted a scalar or (sum, count)")
        n = torch.tensor(len(given["labels"]), device=given["labels"].device)
        return result * n, n

    return extra


def decode_loss(experiment: Experiment, bridge: Bridge, batch: Batch, message: Message) -> losses.Total:
    """The bridged target answers the first `decode_batch` slots of the global batch; this process takes its own."""
    settings, target, task = experiment.config.loss, experiment.pair.target, experiment.task
    n, samples = int((batch.slots < settings.decode_batch).sum()), settings.decode_samples
    rows = torch.arange(n, device=batch.mask.device)
    sampled = settings.decode_estimator == "policy_gradient"
    seeds = None
    if sampled:  # every answer has a seed of its own, by its question's slot
        draws = torch.arange(samples, device=rows.device).repeat(n)
        rows = rows.repeat_interleave(samples)
        seeds = batch.seeds[rows] + batch.slots[rows] * samples + draws
    message = message.select(rows)
    before, after, final = ((ids[rows], mask[rows]) for ids, mask in (batch.before, batch.after, batch.final))
    texts = (unpad(*before), unpad(*after), settings.decode_tokens, seeds)
    answers = decode_bridged(target, bridge, message, *texts, is_complete=task.is_complete, shared=batch.shared)
    gold = unpad(*final)
    if sampled:
        labels, mask = pad_ids([list(g.ids) for g in answers], target.device)
        wanted = [task.extract(t) for t in target.tokenizer.batch_decode(gold, skip_special_tokens=True)]
        right = [float(task.is_right(task.extract(g.text), w)) for g, w in zip(answers, wanted, strict=True)]
        reward = torch.tensor(right, device=target.device).view(n, samples)
        logits = bridged_logits(target, bridge, message, before, after, labels, mask, batch.shared)
        return losses.policy_gradient(logits, labels, mask, losses.leave_one_out(reward).flatten())
    steps = [own_steps(target, g, task.marker) for g in answers]
    labels, mask = pad_ids([s + g for s, g in zip(steps, gold, strict=True)], target.device)
    lengths = torch.tensor([len(s) for s in steps], device=target.device)
    counted = mask & (torch.arange(mask.shape[1], device=target.device) >= lengths[:, None])
    logits = bridged_logits(target, bridge, message, before, after, labels, mask, batch.shared)
    return losses.answer_nll(logits, labels, counted)


def own_steps(target: LanguageModel, generated: Generated, marker: str = "####") -> list[int]:
    """The generated tokens up to the final answer: without the marker, what follows it, and the end.

    Where answers have no marker they have no steps."""
    ids = [i for i in generated.ids if i not in target.eos_ids]
    text = target.tokenizer.decode(ids)
    start = text.find(marker) if marker in text else len(text)
    lengths = map(len, target.tokenizer.batch_decode([ids[: n + 1] for n in range(len(ids))]))
    return ids[: next((n for n, length in enumerate(lengths) if length > start), len(ids))]


def mean_losses(totals: dict[str, losses.Total], processes: Processes) -> dict[str, torch.Tensor]:
    """This process's part of each loss's mean over the global batch."""
    counts = processes.sum(torch.stack([count.float() for _, count in totals.values()])).clamp(min=1)
    return {k: total / count for (k, (total, _)), count in zip(totals.items(), counts, strict=True)}


def weigh(config: Config, means: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(getattr(config.loss, f"{k}_weight") * mean for k, mean in means.items())
