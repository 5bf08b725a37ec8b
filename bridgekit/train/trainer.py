"""Train one bridge or one trained control: the loop, its validation, and the best weights.

The examples of a step are a function of (seed, step, slot): resuming and other process counts follow by themselves.
"""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from bridgekit.config import Config
from bridgekit.model.bridge import Bridge, build_bridge, load_bridge, save_bridge
from bridgekit.model.pair import Pair
from bridgekit.runs import append_jsonl, write_status
from bridgekit.tasks import Example, load_examples
from bridgekit.train.data import TrainingSet, TrainingTexts
from bridgekit.train.evaluator import Evaluator
from bridgekit.train.steps import (
    gather_rows,
    global_counts,
    local_batch,
    reduce_values,
    share_value,
    step_losses,
    sum_gradients,
)  # fmt: skip


@dataclass
class Job:
    """One run: what all its trainings share."""

    config: Config
    folder: Path
    accelerator: Accelerator
    pair: Pair
    val: list[Example]
    test: list[Example]
    donors: list[Example] = field(default_factory=list)  # all test problems, where `test` is only some of them
    started: float = field(default_factory=time.time)
    minutes: dict[str, float] = field(default_factory=dict)  # where the time went
    texts: dict[float, tuple[list[Example], TrainingTexts]] = field(default_factory=dict)  # by share of the mix

    @property
    def is_first(self) -> bool:
        return self.accelerator.is_main_process

    def report(self, stage: str, **status) -> None:
        if self.is_first:
            elapsed = round(time.time() - self.started, 1)
            write_status(self.folder, state="running", stage=stage, elapsed=elapsed, **status)

    def log(self, text: str) -> None:
        if self.is_first:
            print(text, flush=True)

    def spend(self, what: str, since: float) -> None:
        self.minutes[what] = round(self.minutes.get(what, 0) + time.time() - since, 1)


def variant(config: Config, name: str) -> Config:
    """The configuration of a control: the bridge's own, but for what makes it a control."""
    plain = dict(flow_weight=0.0, info_nce_weight=0.0, prompt_weight=0.0, producer="constant", dit_tokens="sampled")
    if name == "constant":
        return config.with_(**plain)
    if name == "constant_natural":
        return config.with_(**plain, source_only_share=-1.0)
    return config


def train_bridge(job: Job, name: str, evaluator: Evaluator) -> Bridge:
    """Train one bridge or trained control to its best validation accuracy; its best weights are on disk."""
    config, started = variant(job.config, name), time.time()
    source = job.pair.target if name == "self_bridge" else job.pair.source
    layers = evaluator.self_layers if name == "self_bridge" else evaluator.layers
    set_seed(config.run.seed)
    bridge = build_bridge(config, len(layers), source.hidden_size, job.pair.target).to(job.accelerator.device)
    job.log(f"{name}: {bridge.n_parameters:,} parameters, {config.bridge.producer} x {config.bridge.injector}")
    data = prepare_data(job, config, name, evaluator)
    job.spend("prepare", started)
    fit(job, name, config, bridge, data, evaluator)
    load_bridge(bridge, job.folder, name)
    return bridge


def prepare_data(job: Job, config: Config, name: str, evaluator: Evaluator) -> TrainingSet:
    job.report(f"prepare {name}")
    share = config.task.source_only_share
    if share not in job.texts:
        examples = load_examples(config, job.pair.lexicon_seed, "train")
        job.texts[share] = examples, TrainingTexts(config, job.pair.target, examples)
    examples, texts = job.texts[share]
    return TrainingSet(texts, evaluator.source_states(name, examples, config.train.cache_states_gb))


def learning_rate(config: Config, step: int) -> float:
    """Share of the peak: linear warm-up, then a cosine to zero."""
    warmup = min(config.train.warmup_steps, config.train.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.train.steps - warmup)))


def fit(job: Job, name: str, config: Config, bridge: Bridge, data: TrainingSet, evaluator: Evaluator) -> None:
    settings, accelerator = config.train, job.accelerator
    optimizer = torch.optim.AdamW(
        bridge.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(config, s))
    best = Best(job, name)
    log_every = max(1, settings.steps // 50)
    metrics = job.folder / ("metrics.jsonl" if name == "bridged" else f"metrics_{name}.jsonl")
    running: dict[str, torch.Tensor] = {}
    times: dict[str, int] = {}
    started, since = time.time(), time.time()
    best.offer(bridge, 0, validate(job, name, bridge, evaluator, 0, metrics))
    for step in range(settings.steps):
        bridge.train()
        batch = local_batch(config, data, step, accelerator)
        totals = step_losses(config, bridge, job.pair.target, batch, lambda x: gather_rows(accelerator, x), step)
        means = {k: total / count for k, (total, count) in global_counts(accelerator, totals).items()}
        loss = sum(getattr(config.loss, f"{k}_weight") * mean for k, mean in means.items())
        loss.backward()
        sum_gradients(accelerator, bridge)
        norm = torch.nn.utils.clip_grad_norm_(bridge.parameters(), settings.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        for k, v in {**means, "loss": loss, "grad_norm": norm}.items():
            running[k] = running.get(k, 0) + v.detach()
            times[k] = times.get(k, 0) + 1  # a loss that is taken every few steps is a mean over those
        done = step + 1
        if done % log_every == 0 or done == settings.steps:
            values = {k: v / times[k] for k, v in reduce_values(accelerator, running).items()}
            running, times = {}, {}
            check_finite(name, done, values)
            write_progress(job, name, config, metrics, done, values, schedule, started, best, bridge.injector.gates())
        if done % settings.eval_every == 0 or done == settings.steps:
            job.spend(f"train {name}", since)
            best.offer(bridge, done, validate(job, name, bridge, evaluator, done, metrics))
            since = time.time()
            if settings.patience and best.waited >= settings.patience:
                job.log(f"{name}: no better validation accuracy in {best.waited} evaluations, stopping at {done}")
                break
    job.log(f"{name}: best validation accuracy {best.accuracy:.4f} at step {best.step}")


def check_finite(name: str, step: int, values: dict[str, float]) -> None:
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    if bad:
        raise RuntimeError(f"{name}: {bad[0]} is {values[bad[0]]} at step {step}: lower train.lr or train.grad_clip")


def write_progress(job, name, config, metrics, step, values, schedule, started, best, gates) -> None:
    if not job.is_first:
        return
    seconds = time.time() - started
    left = seconds / step * (config.train.steps - step)
    parts = {k: round(v, 6) for k, v in values.items() if k not in ("loss", "grad_norm")}
    row = {"step": step, "loss": round(values["loss"], 6), "lr": schedule.get_last_lr()[0],
           "grad_norm": round(values["grad_norm"], 5), "losses": parts, "seconds": round(seconds, 2)}  # fmt: skip
    if gates:
        row["gates"] = {k: round(v, 5) for k, v in gates.items()}
    append_jsonl(metrics, row)
    print(f"{name} step {step}/{config.train.steps} loss {row['loss']:.4f} {parts} {seconds:.0f} s", flush=True)
    job.report(
        f"train {name}", step=step, steps=config.train.steps, loss=row["loss"], val_accuracy=best.last,
        best=best.accuracy, seconds_left=round(left, 1),
    )  # fmt: skip


def validate(job: Job, name: str, bridge: Bridge, evaluator: Evaluator, step: int, metrics: Path) -> float:
    """Accuracy on the validation problems; for the bridge itself the texts are kept as well."""
    since = time.time()
    examples = job.val[: job.config.train.val_samples]
    label = str(step) if name == "bridged" else f"{name}_{step}"
    wanted = ("source", "target", "bridged") if name == "bridged" else (name,)
    rows = evaluator.evaluate(examples, {name: bridge}, label, wanted)
    accuracy = 0.0
    if job.is_first:
        result = summarise_rows(rows, wanted)
        append_jsonl(metrics, {"step": step, "eval": result})
        accuracy = result[name]
        job.log(f"{name} step {step} validation {result}")
        if name != "bridged":
            (job.folder / f"eval_samples_step_{label}.jsonl").unlink()
    job.spend(f"validate {name}", since)
    return share_value(job.accelerator, accuracy)


def summarise_rows(rows: list[dict], conditions: tuple[str, ...]) -> dict:
    right = {c: np.array([r[f"{c}_extracted"] == r["gold_extracted"] for r in rows]) for c in conditions}
    result = {c: round(float(r.mean()), 5) for c, r in right.items()}
    only = np.array([r["group"] == "source_only" for r in rows])
    if only.any():
        result |= {f"{c}_source_only": round(float(r[only].mean()), 5) for c, r in right.items()}
    units = {r["unit"] for r in rows if r["unit"]}
    return result | {"n": len(rows), "n_units": len(units) or len(rows)}


class Best:
    """The best weights so far, on disk the moment they are the best: later training cannot change them."""

    def __init__(self, job: Job, name: str):
        self.job, self.name = job, name
        self.accuracy, self.step, self.waited, self.last = -1.0, 0, 0, None

    def offer(self, bridge: Bridge, step: int, accuracy: float) -> None:
        self.last = accuracy
        if accuracy < self.accuracy or (step == 0 and accuracy == self.accuracy):
            self.waited += 1
            return
        self.waited = self.waited + 1 if accuracy == self.accuracy else 0
        self.accuracy, self.step = accuracy, step
        if self.job.is_first:
            save_bridge(bridge, self.job.folder, self.name, {"step": str(step), "val_accuracy": f"{accuracy:.5f}"})
        self.job.accelerator.wait_for_everyone()
