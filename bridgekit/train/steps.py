"""One training step: the bridged forward pass, its losses, and what crosses processes.

Every loss is a mean over the global batch, so the number of processes does not change what is learned.
Shapes: B batch, T tokens, A answer tokens, K soft tokens, V vocabulary.
"""

import torch
from accelerate import Accelerator

from bridgekit.config import Config
from bridgekit.model import losses
from bridgekit.model.bridge import Bridge
from bridgekit.model.generation import Generated, answer_logits, bridged_logits, decode_bridged, pad_ids, unpad
from bridgekit.model.message import Message
from bridgekit.model.pair import LanguageModel
from bridgekit.tasks.answers import extract_answer
from bridgekit.train.data import Batch, TrainingSet, indices_at, noise_seeds


def step_losses(
    config: Config, bridge: Bridge, target: LanguageModel, batch: Batch, gather, step: int = 0
) -> dict[str, losses.Total]:
    """Every loss whose weight is above zero, as (sum, count). `gather` collects positives from all processes."""
    weights = config.loss
    teacher = None
    if weights.flow_weight or weights.prompt_weight or config.bridge.dit_tokens == "teacher":
        ids, mask = (batch.labels, batch.labels_mask) if config.bridge.teacher == "answer" else batch.literal
        teacher = (target.embed(ids), mask)
    flow_teacher = teacher if weights.flow_weight or config.bridge.dit_tokens == "teacher" else None
    message = bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment, teacher=flow_teacher)
    result = {}
    if weights.nll_weight or weights.kl_weight or weights.format_weight:
        logits = bridged_logits(target, bridge, message, batch.before, batch.after, batch.labels, batch.labels_mask)
        if weights.nll_weight:
            result["nll"] = losses.answer_nll(logits, batch.labels, batch.labels_mask)
        if weights.format_weight:
            result["format"] = losses.format_nll(logits, batch.labels, batch.marker)
        if weights.kl_weight:
            nothing = (batch.literal[0][:, :0], batch.literal[1][:, :0])
            with torch.no_grad():
                alone = answer_logits(target, nothing, batch.literal, None, batch.labels, batch.labels_mask)
            result["kl"] = losses.kl_slice(logits, alone, batch.labels_mask, weights.kl_tokens)
    if weights.prompt_weight:
        result["prompt"] = losses.prompt_alignment(message.tokens, message.mask, *teacher)
    if weights.info_nce_weight:
        own = losses.pool(target.embed(batch.literal[0]), batch.literal[1])
        everyone, offset = gather(own)
        anchors = losses.pool(message.tokens, message.mask)
        result["info_nce"] = losses.info_nce(anchors, everyone, offset, weights.info_nce_temperature)
    if weights.flow_weight and message.flow_error is not None:
        result["flow"] = losses.flow(message.flow_error)
    if weights.decode_weight and (step + 1) % weights.decode_every == 0:
        result["decode"] = decode_loss(config, bridge, target, batch, message)
    return result


def local_batch(config: Config, data: TrainingSet, step: int, accelerator: Accelerator) -> Batch:
    """This process's slots of the step's global batch."""
    size, rank, world = config.train.batch_size, accelerator.process_index, accelerator.num_processes
    n = len(data.texts.answers.lengths)
    mine = slice(rank * size // world, (rank + 1) * size // world)
    seed = config.run.seed
    return data.batch(indices_at(seed, step, size, n)[mine], noise_seeds(seed, step, size)[mine])


def global_counts(accelerator: Accelerator, totals: dict[str, losses.Total]) -> dict[str, losses.Total]:
    """Counts summed over processes, so that each process's loss is its part of the global mean."""
    if accelerator.num_processes == 1:
        return {k: (total, count.clamp(min=1)) for k, (total, count) in totals.items()}
    counts = accelerator.reduce(torch.stack([c.float() for _, c in totals.values()]), "sum")
    return {k: (total, c.clamp(min=1)) for (k, (total, _)), c in zip(totals.items(), counts, strict=True)}


def sum_gradients(accelerator: Accelerator, bridge: Bridge) -> None:
    """Add all processes' gradients; each already is its part of the global mean."""
    if accelerator.num_processes == 1:
        return
    parameters = [p for p in bridge.parameters() if p.requires_grad]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = accelerator.reduce(torch.cat([p.grad.flatten() for p in parameters]), "sum")
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


def gather_rows(accelerator: Accelerator, rows: torch.Tensor) -> tuple[torch.Tensor, int]:
    return accelerator.gather(rows), accelerator.process_index * len(rows)


def reduce_values(accelerator: Accelerator, running: dict[str, torch.Tensor]) -> dict[str, float]:
    """Losses are parts of a mean and add up over processes; the gradient's size is the same on all."""
    names = list(running)
    values = torch.stack([torch.as_tensor(running[k], dtype=torch.float32) for k in names])
    if accelerator.num_processes > 1:
        summed = accelerator.reduce(values.to(accelerator.device), "sum")
        values = torch.where(
            torch.tensor([k == "grad_norm" for k in names], device=summed.device),
            values.to(summed.device),
            summed,
        )
    return dict(zip(names, values.tolist(), strict=True))


def share_value(accelerator: Accelerator, value: float) -> float:
    """The first process's value, on all."""
    if accelerator.num_processes == 1:
        return value
    box = torch.tensor([value if accelerator.is_main_process else 0.0], device=accelerator.device)
    return accelerator.reduce(box, "sum").item()


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


def own_steps(target: LanguageModel, said: Generated) -> list[int]:
    """What was said up to its final answer: without the marker, what follows it, and the end."""
    ids = [i for i in said.ids if i not in target.eos_ids]
    pieces = target.tokenizer.batch_decode([[i] for i in ids])
    return ids[: next((n for n, piece in enumerate(pieces) if "#" in piece), len(ids))]
