"""Train one bridge or one trained control: the loop, a step's losses, validation and the best weights.

    bridges = train_bridge(experiment, "bridged")  # {"bridged": the best}, also in checkpoint/bridged.safetensors

The examples of a step are a function of (seed, step, slot), and every loss is a mean over the step's global batch, so
the number of processes changes neither what is read nor what is learned.
Shapes: B batch, T tokens, A answer tokens, K soft tokens, V vocabulary.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bridgekit.config import Config
from bridgekit.keys import TEACHERS, is_path
from bridgekit.model.bridge import Bridge, checkpoint_path, load_bridge, save_bridge
from bridgekit.runs import append_jsonl, is_correct, write_text_atomic
from bridgekit.train.captured import Captured, map_batch
from bridgekit.train.checkpoints import STOP, Checkpoints, Window, deal_window
from bridgekit.train.data import TrainingSet, step_batch
from bridgekit.train.objective import decode_loss, encode_batch, is_decoded, is_teachers_step, mean_losses, weigh
from bridgekit.train.processes import Processes, sum_gradients

if TYPE_CHECKING:
    from bridgekit.train.experiment import Experiment


# ---- the loop -------------------------------------------------------------------------------------------------------


def train_bridge(experiment: Experiment, name: str) -> dict[str, Bridge]:
    """Train `bridged` or a control. -> its best weights by name; a control's other selections as `name.selection`"""
    config, processes = experiment.config_of(name), experiment.processes
    settings, started = config.train, time.time()
    experiment.report(f"prepare {name}")
    bridge = experiment.build_bridge(name)
    experiment.log(f"{name}: {bridge.n_parameters:,} parameters, {config.bridge.producer} x {config.bridge.injector}")
    optimizer = build_optimizer(config, bridge)
    captured = Captured(experiment, name, bridge) if may_capture(experiment) else None
    metrics = experiment.folder / ("metrics.jsonl" if name == "bridged" else f"metrics_{name}.jsonl")
    best = BestWeights(experiment, name)
    checkpoints = Checkpoints(experiment, name, optimizer, metrics)
    state = checkpoints.load(bridge, best)
    if state.get("done") and state["steps"] == settings.steps:
        return best.load()
    data, start = experiment.training_data(name), state.get("step", 0)
    log_every = max(1, settings.steps // 50)
    window = deal_window(state["windows"], processes.rank, processes.world) if state else []
    experiment.spend("prepare", started)

    def is_validated(step: int) -> bool:
        return step >= best.first_step and (step % settings.eval_every == 0 or step == settings.steps)

    for done in range(start, settings.steps + 1):  # the first round only validates, where that is still to be done
        if done > start:
            if done == start + 1:  # from here on what fails is a step
                experiment.report(f"train {name}", step=start, steps=settings.steps)
            with STOP.after_step():
                since = time.time()
                window.append(train_step(experiment, name, bridge, optimizer, data, done - 1, captured))
                experiment.spend(f"train {name}", since)
                if done % log_every == 0 or done == settings.steps:
                    write_progress(experiment, name, metrics, done, window, best, bridge.injector.gates())
                    window = []
                if checkpoints.is_due(done):
                    check_finite(name, done, window, {})
                    checkpoints.save(bridge, best, done, window)
        if is_validated(done) and not (done == start and state.get("done")):
            best.offer(bridge, done, validate(experiment, name, bridge, done, metrics))
        if settings.patience and best.waited >= settings.patience:
            experiment.log(f"{name}: no better validation in {best.waited} evaluations, stopping at {done}")
            break
    with STOP.after_step():
        checkpoints.save(bridge, best, done, window, done=True)
    return best.load()


def train_step(
    experiment: Experiment, name: str, bridge: Bridge, optimizer: torch.optim.Optimizer, data: TrainingSet, step: int,
    captured: Captured | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """One step of the optimizer, counted from 0. -> its losses and the size of its gradient"""
    config, processes = experiment.config_of(name), experiment.processes
    bridge.train()
    for group in optimizer.param_groups:
        group["lr"] = config.train.lr * learning_rate(config, step)
    batch = step_batch(config, data, step, processes.rank, processes.world)
    if captured is None:
        means = experiment.step_losses(bridge, batch, step, name)
        means["loss"].backward()
    else:
        means = captured.run(batch, step, is_teachers_step(config, step))
        if is_decoded(config, step):
            n = int((batch.slots < config.loss.decode_batch).sum())  # the first rows; the rest need no message
            few = map_batch(batch, lambda x: x[: max(n, 1)])
            totals = {"decode": decode_loss(experiment, bridge, few, encode_batch(experiment, bridge, few, name, step))}
            decoded = mean_losses(totals, processes)
            weigh(config, decoded).backward()
            means |= decoded | {"loss": means["loss"] + weigh(config, decoded)}
    sum_gradients(bridge, processes)
    norm = torch.nn.utils.clip_grad_norm_(bridge.parameters(), config.train.grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=captured is None)
    return {k: v.detach() for k, v in {**means, "grad_norm": norm}.items()}


def build_optimizer(config: Config, bridge: Bridge) -> torch.optim.Optimizer:
    on_gpu = next(bridge.parameters()).is_cuda
    settings = dict(lr=config.train.lr, weight_decay=config.train.weight_decay, betas=(0.9, 0.98))
    return torch.optim.AdamW(bridge.parameters(), **settings, fused=on_gpu or None)


def may_capture(experiment: Experiment) -> bool:
    """Whether a step can be replayed: on one GPU, with losses of the package alone."""
    parts = experiment.config.bridge.producer, experiment.config.bridge.injector
    return experiment.pair.target.captures and not experiment.extra_loss and not any(map(is_path, parts))


def control_config(config: Config, name: str) -> Config:
    """The configuration of a control: the bridge's own, but for what makes it a control."""
    if name not in ("constant", "constant_natural"):
        return config
    idle = dict.fromkeys((*TEACHERS, "info_nce_weight"), 0.0)
    natural = {"source_only_share": -1.0} if name == "constant_natural" else {}
    alone = dict(producer="constant", producer_options=(), dit_tokens="sampled", teacher_steps=0)
    return config.with_(**alone, **idle, **natural)


def learning_rate(config: Config, step: int) -> float:
    """Share of the peak: linear warm-up, then a cosine to zero."""
    warmup = min(config.train.warmup_steps, config.train.steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.train.steps - warmup)))


def check_finite(name: str, step: int, window: Window, values: dict[str, float]) -> None:
    """Refuse to go on with numbers that are none; the message names the first step and its loss term."""
    first = step - len(window) + 1
    bad = [(first + i, k, v) for i, row in enumerate(window) for k, v in row.items() if not torch.isfinite(v)]
    bad += [(step, k, torch.tensor(v)) for k, v in values.items() if not math.isfinite(v)]  # of another process
    for step, term, value in bad[:1]:
        raise RuntimeError(f"{name}: {term} is {value.item()} at step {step}: lower train.lr or train.grad_clip")


def write_progress(experiment, name, metrics: Path, step: int, window: Window, best, gates: dict) -> None:
    """One row of metrics, one line of the log, and the status that a watcher shows."""
    settings, spent = experiment.config_of(name).train, experiment.seconds_spent
    seconds = spent[f"train {name}"] + spent.get(f"validate {name}", 0)
    values = average(window, experiment.processes)
    check_finite(name, step, window if not all(map(math.isfinite, values.values())) else [], values)
    parts = {k: round(v, 6) for k, v in values.items() if k not in ("loss", "grad_norm")}
    rate = settings.lr * learning_rate(experiment.config, step)
    row = {"step": step, "loss": round(values["loss"], 6), "lr": rate, "grad_norm": round(values["grad_norm"], 5)}
    row |= {"losses": parts, "seconds": round(seconds, 2)}
    if gates:
        row["gates"] = {k: round(v, 5) for k, v in gates.items()}
    if experiment.processes.is_first:
        append_jsonl(metrics, row)
    experiment.log(f"{name} step {step}/{settings.steps} loss {row['loss']:.4f} {parts} {seconds:.0f} s")
    # The first steps are slow: they prepare what the others find.
    left = round(seconds / step * (settings.steps - step), 1) if step * 10 >= settings.steps else None
    known = {} if best.last is None else {"val_accuracy": best.last, "best": best.selections["mix"].accuracy}
    experiment.report(f"train {name}", step=step, steps=settings.steps, loss=row["loss"], seconds_left=left, **known)


# ---- validation, and which weights are the best ---------------------------------------------------------------------


def validate(experiment: Experiment, name: str, bridge: Bridge, step: int, metrics: Path) -> dict[str, float]:
    """Shares right of the validation problems, on all processes; the bridge's own texts are written as well."""
    since = time.time()
    examples = experiment.examples("val")[: experiment.config.train.val_samples]
    wanted = ("source", "target", "bridged") if name == "bridged" else (name,)
    rows = experiment.evaluate(examples, {name: bridge}, str(step) if name == "bridged" else None, wanted)
    shares = summarise_rows(rows, wanted) if rows else {}
    if rows:
        append_jsonl(metrics, {"step": step, "eval": shares})
        experiment.log(f"{name} step {step} validation {shares}")
    experiment.spend(f"validate {name}", since)
    own = {"mix": shares.get(name, 0.0), "source_only": shares.get(f"{name}_source_only", -1.0)}
    return experiment.processes.gather_objects(own)[0]


def summarise_rows(rows: list[dict], conditions: tuple[str, ...]) -> dict:
    """Share right per condition, of all rows and of the source-only ones, with how many rows and units there are."""
    right = {c: [is_correct(r, c) for r in rows] for c in conditions}
    result = {c: round(sum(r) / len(rows), 5) for c, r in right.items()}
    only = [i for i, r in enumerate(rows) if r["group"] == "source_only"]
    if only:
        result |= {f"{c}_source_only": round(sum(r[i] for i in only) / len(only), 5) for c, r in right.items()}
    units = {r["unit"] for r in rows if r["unit"]}
    return result | {"n": len(rows), "n_units": len(units) or len(rows)}


@dataclass
class Selection:
    accuracy: float = -1.0  # of the measure it is chosen by
    step: int = 0


class BestWeights:
    """The best weights so far, on disk the moment they are the best: later training cannot change them.

    The bridge's are chosen on the validation mix. A control has three selections, because doing nothing harms nobody
    on the mix: by `mix`, by `source_only` and the `last`; each from the second half of the planned steps alone. Of
    equal accuracies the later step is taken, because its weights saw more; but it is no progress for `patience`."""

    def __init__(self, experiment: Experiment, name: str):
        self.experiment, self.name = experiment, name
        is_control = name != "bridged"
        train = experiment.config_of(name).train
        self.first_step = max(train.steps / 2 if is_control else 0, train.teacher_steps)  # before, nobody was to answer
        self.selections = {k: Selection() for k in (("mix", "source_only", "last") if is_control else ("mix",))}
        self.waited, self.last = 0, None

    def offer(self, bridge: Bridge, step: int, shares: dict[str, float]) -> None:
        self.last = shares["mix"]
        if step < self.first_step:
            return
        self.waited = 0 if shares["mix"] > self.selections["mix"].accuracy else self.waited + 1
        for key, selection in self.selections.items():
            accuracy = shares.get(key, shares["mix"])
            if key == "last" or accuracy >= max(selection.accuracy, 0):
                selection.accuracy, selection.step = accuracy, step
                if self.experiment.processes.is_first:
                    facts = {"step": str(step), "val_accuracy": f"{accuracy:.5f}"}
                    save_bridge(bridge, self.experiment.folder, self.file_name(key), facts)
        self.experiment.processes.wait()

    def describe(self) -> dict:
        """What a checkpoint keeps of this; `restore` takes it back."""
        selections = {key: vars(selection) for key, selection in self.selections.items()}
        return {"waited": self.waited, "last": self.last, "selections": selections}

    def restore(self, kept: dict) -> None:
        self.waited, self.last = kept["waited"], kept["last"]
        self.selections = {key: Selection(**selection) for key, selection in kept["selections"].items()}

    def file_name(self, key: str) -> str:
        return self.name if key == "mix" else f"{self.name}.{key}"

    def load(self) -> dict[str, Bridge]:
        """Bridges with the selected weights; a selection of the same step as `mix` is not kept a second time."""
        mix = self.selections["mix"]
        self.experiment.log(f"{self.name}: best validation accuracy {mix.accuracy:.4f} at step {mix.step}")
        others = [k for k, s in self.selections.items() if k != "mix" and s.accuracy >= 0 and s.step != mix.step]
        if self.experiment.processes.is_first and self.name != "bridged":
            for key in {*self.selections} - {"mix", *others}:
                checkpoint_path(self.experiment.folder, self.file_name(key)).unlink(missing_ok=True)
            path = self.experiment.folder / "controls.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            known[self.name] = {k: s.step for k, s in self.selections.items() if s.accuracy >= 0}
            write_text_atomic(path, json.dumps(known, indent=1) + "\n")
        bridges = {self.file_name(key): self.experiment.build_bridge(self.name) for key in ("mix", *others)}
        for file_name, bridge in bridges.items():
            load_bridge(bridge, self.experiment.folder, file_name)
        return bridges


def average(window: Window, processes: Processes) -> dict[str, float]:
    """Means over the steps that have a value. Losses are parts of a mean and add up over processes; the gradient's
    size is the same on all."""
    names = list(dict.fromkeys(k for row in window for k in row))
    columns = {k: [row[k] for row in window if k in row] for k in names}
    values = torch.stack([sum(columns[k]).float() for k in names])
    same_on_all = torch.tensor([k == "grad_norm" for k in names], device=values.device)
    summed = torch.where(same_on_all, values, processes.sum(values))
    return {k: total / len(columns[k]) for k, total in zip(names, summed.tolist(), strict=True)}
