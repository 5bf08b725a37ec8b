"""Train a bridge and its controls, keep the best by validation, and evaluate once on test.

    accelerate launch -m bridgekit.train RUN_DIR --stage baselines     # source and target on validation
    accelerate launch -m bridgekit.train RUN_DIR --stage train         # everything else

The run folder's config.yaml is all this reads. The examples of a step are a function of (seed, step, slot) and every
loss is a mean over the global batch, so the number of processes does not change what is learned.
Shapes: B batch, T tokens, A answer tokens, K soft tokens, V vocabulary.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from bridgekit import losses
from bridgekit.batches import Batch, SourceStates, TrainingSet, TrainingTexts, check_fit, indices_at, noise_seeds, read_source
from bridgekit.bridges import Bridge, Message, build_bridge
from bridgekit.config import Config, ConfigError
from bridgekit.evaluator import Evaluator, tune_router
from bridgekit.generation import assemble
from bridgekit.pair import LanguageModel, Pair, load_pair, pick_layers
from bridgekit.runs import (
    append_jsonl, load_eval, provenance, read_jsonl, read_run_config, watch_parent, write_bytes_atomic, write_jsonl,
    write_status, write_text_atomic,
)  # fmt: skip
from bridgekit.tasks import Example, load_examples
from bridgekit.tasks.base import literal_prompt, source_prompt


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


# ---- the forward pass ----------------------------------------------------------------------------------------


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


def step_losses(config: Config, bridge: Bridge, target: LanguageModel, batch: Batch, gather) -> dict[str, losses.Total]:
    """Every loss whose weight is above zero, as (sum, count). `gather` collects positives from all processes."""
    weights = config.loss
    teacher = None
    if weights.flow_weight or weights.prompt_weight or config.bridge.dit_tokens == "teacher":
        ids, mask = (batch.labels, batch.labels_mask) if config.bridge.teacher == "answer" else batch.literal
        teacher = (target.embed(ids), mask)
    flow_teacher = teacher if weights.flow_weight or config.bridge.dit_tokens == "teacher" else None
    message = bridge.encode(batch.states, batch.mask, batch.seeds, teacher=flow_teacher)
    result = {}
    if weights.nll_weight or weights.kl_weight or weights.format_weight:
        logits = bridged_logits(target, bridge, message, batch)
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
    return result


def bridged_logits(target: LanguageModel, bridge: Bridge, message: Message, batch: Batch) -> torch.Tensor:
    """(B, A, V)"""
    soft = bridge.injector.soft(message)
    with bridge.injector.attach(target, lambda: message):
        return answer_logits(target, batch.before, batch.after, soft, batch.labels, batch.labels_mask)


# ---- one training --------------------------------------------------------------------------------------------


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
    data = prepare_data(job, config, name, source, layers)
    job.spend("prepare", started)
    fit(job, name, config, bridge, data, evaluator)
    load_bridge(bridge, job.folder, name)
    return bridge


def prepare_data(job: Job, config: Config, name: str, source: LanguageModel, layers) -> TrainingSet:
    job.report(f"prepare {name}")
    share = config.task.source_only_share
    if share not in job.texts:
        examples = load_examples(config, job.pair.lexicon_seed, "train")
        job.texts[share] = examples, TrainingTexts(config, job.pair.target, examples)
    examples, texts = job.texts[share]
    view, solutions = config.bridge.source_view, {}
    if name == "self_bridge":
        examples_read, view = [_without_facts(e) for e in examples], "prompt"
    else:
        examples_read = examples
        if view == "solution":
            evaluator = Evaluator(config, job.pair, job.accelerator, job.folder)
            said = evaluator._baseline("source", source, [source_prompt(e) for e in examples])
            solutions = {e.id: g.text for e, g in zip(examples, said, strict=True)}
    rows = read_source(source, examples_read, view, solutions)
    # A constant looks at nothing: it gets one token per prompt and no pass through the source.
    if config.bridge.producer == "constant" and config.bridge.n_soft_tokens != -1:
        rows = [r[:1] for r in rows]
    states = SourceStates(source, rows, layers, config.train.cache_states_gb)
    return TrainingSet(texts, states)


def _without_facts(example: Example) -> Example:
    from dataclasses import replace

    return replace(example, facts="")


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
    started, since = time.time(), time.time()
    best.offer(bridge, 0, validate(job, name, bridge, evaluator, 0, metrics))
    for step in range(settings.steps):
        bridge.train()
        batch = local_batch(config, data, step, accelerator)
        totals = step_losses(config, bridge, job.pair.target, batch, lambda x: gather_rows(accelerator, x))
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
        done = step + 1
        if done % log_every == 0 or done == settings.steps:
            values = {k: v / ((done - 1) % log_every + 1) for k, v in reduce_values(accelerator, running).items()}
            running = {}
            check_finite(name, done, values)
            write_progress(job, name, config, metrics, done, values, schedule, started, best)
        if done % settings.eval_every == 0 or done == settings.steps:
            job.spend(f"train {name}", since)
            best.offer(bridge, done, validate(job, name, bridge, evaluator, done, metrics))
            since = time.time()
            if settings.patience and best.waited >= settings.patience:
                job.log(f"{name}: no better validation accuracy in {best.waited} evaluations, stopping at {done}")
                break
    job.log(f"{name}: best validation accuracy {best.accuracy:.4f} at step {best.step}")


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
        values = torch.where(torch.tensor([k == "grad_norm" for k in names], device=summed.device), values.to(summed.device), summed)
    return dict(zip(names, values.tolist(), strict=True))


def check_finite(name: str, step: int, values: dict[str, float]) -> None:
    bad = [k for k, v in values.items() if not math.isfinite(v)]
    if bad:
        raise RuntimeError(f"{name}: {bad[0]} is {values[bad[0]]} at step {step}: lower train.lr or train.grad_clip")


def write_progress(job, name, config, metrics, step, values, schedule, started, best) -> None:
    if not job.is_first:
        return
    seconds = time.time() - started
    left = seconds / step * (config.train.steps - step)
    parts = {k: round(v, 6) for k, v in values.items() if k not in ("loss", "grad_norm")}
    row = {"step": step, "loss": round(values["loss"], 6), "lr": schedule.get_last_lr()[0],
           "grad_norm": round(values["grad_norm"], 5), "losses": parts, "seconds": round(seconds, 2)}  # fmt: skip
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


def share_value(accelerator: Accelerator, value: float) -> float:
    """The first process's value, on all."""
    if accelerator.num_processes == 1:
        return value
    box = torch.tensor([value if accelerator.is_main_process else 0.0], device=accelerator.device)
    return accelerator.reduce(box, "sum").item()


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


def checkpoint_path(folder: Path, name: str) -> Path:
    return Path(folder) / "checkpoint" / f"{name}.safetensors"


def save_bridge(bridge: Bridge, folder: Path, name: str, metadata: dict[str, str]) -> None:
    path = checkpoint_path(folder, name)
    path.parent.mkdir(exist_ok=True)
    state = {k: v.detach().cpu().contiguous() for k, v in bridge.state_dict().items()}
    write_bytes_atomic(path, safetensors.torch.save(state, metadata))


def load_bridge(bridge: Bridge, folder: Path, name: str) -> None:
    path = checkpoint_path(folder, name)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no checkpoint of '{name}' in this run")
    bridge.load_state_dict(safetensors.torch.load_file(path))


# ---- the job -------------------------------------------------------------------------------------------------


def open_job(folder: Path) -> Job:
    config = read_run_config(folder)
    use_cpu = not torch.cuda.is_available() or config.pair.target_device == "cpu"
    accelerator = Accelerator(cpu=use_cpu)
    if accelerator.num_processes != config.train.num_processes:
        raise ConfigError(
            f"train.num_processes: {config.train.num_processes} asked for, {accelerator.num_processes} started: "
            "start the job with bridgekit or `accelerate launch --multi_gpu --num_processes N`"
        )
    pair = load_pair(config, accelerator.device)
    val = load_examples(config, pair.lexicon_seed, "val")
    test = donors = load_examples(config, pair.lexicon_seed, "test")
    if "shuffled" in config.eval.conditions and any(e.donor_id is None for e in test):
        raise ConfigError("task.n_test: too few problems for each to have a donor: more, or no `shuffled` condition")
    if 0 < config.eval.eval_samples < config.task.n_test:
        seen = [e for e in test if e.novelty == "seen"]
        test = [e for e in test if e.novelty != "seen"][: config.eval.eval_samples] + seen
    check_fit(config, pair, [literal_prompt(e) for e in val + test])
    return Job(config, folder, accelerator, pair, val, test, donors)


def run_baselines(job: Job) -> None:
    """Source and target alone on all validation problems: the headroom, before anything is trained."""
    evaluator = Evaluator(job.config, job.pair, job.accelerator, job.folder)
    rows = evaluator.evaluate(job.val, {}, "headroom", ("source", "target"), report=lambda c: job.report(f"baseline {c}"))
    if job.is_first:
        write_jsonl(job.folder / "headroom.jsonl", rows)
        (job.folder / "eval_samples_step_headroom.jsonl").unlink()
        write_text_atomic(job.folder / "provenance.json", json.dumps(describe(job), indent=1) + "\n")


def describe(job: Job) -> dict:
    devices = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    return provenance(job.config) | {
        "gpus": sorted(devices), "processes": job.accelerator.num_processes, "dtype": str(job.pair.target.dtype),
        "source": job.pair.source.fingerprint, "target": job.pair.target.fingerprint,
        "lexicon_seed": job.pair.lexicon_seed,
    }  # fmt: skip


def run_training(job: Job) -> None:
    config = job.config
    if not (job.folder / "headroom.jsonl").exists():
        run_baselines(job)
    if job.is_first:
        for stale in job.folder.glob("metrics*.jsonl"):
            stale.unlink()
    job.accelerator.wait_for_everyone()
    evaluator = Evaluator(config, job.pair, job.accelerator, job.folder)
    evaluator.router_threshold = tune_router(list(read_jsonl(job.folder / "headroom.jsonl")))
    bridges = {name: train_bridge(job, name, evaluator) for name in ("bridged", *config.train.controls)}
    since = time.time()
    conditions = tuple(dict.fromkeys([*config.eval.conditions, *config.train.controls]))
    rows = evaluator.evaluate(
        job.test, bridges, "final", conditions, want_attention=True, donors=job.donors,
        report=lambda c: job.report(f"test {c}"),
    )
    job.spend("test", since)
    if config.eval.noise_floor and job.is_first:
        flips = evaluator.count_flips(job.test, bridges["bridged"], rows)
        append_jsonl(job.folder / "metrics.jsonl", {"step": config.train.steps, "noise_floor": flips})
    if job.is_first:
        finish(job, bridges["bridged"])


def finish(job: Job, bridge: Bridge) -> None:
    """Verdict, summary line, and last of all the status that says the run is finished."""
    from bridgekit.verdict import judge

    frame = load_eval(job.folder / "eval_samples_step_final.jsonl")
    verdict = judge([frame], seeds=[job.config.run.seed])
    write_text_atomic(job.folder / "verdict.json", json.dumps(verdict.to_dict(), indent=1) + "\n")
    held = frame[frame["novelty"] != "seen"] if "novelty" in frame else frame
    shares = " ".join(f"{c} {held[f'{c}_correct'].mean():.4f}" for c in ("source", "target", "bridged") if f"{c}_correct" in held)
    write_text_atomic(job.folder / "summary.log", f"{job.folder.name} n {len(held)} {shares} {verdict.outcome}\n")
    write_text_atomic(job.folder / "timing.json", json.dumps(job.minutes, indent=1) + "\n")
    write_status(
        job.folder, state="finished", stage="done", elapsed=round(time.time() - job.started, 1),
        parameters=bridge.n_parameters,
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridgekit.train", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", choices=("baselines", "train"), default="train")
    args = parser.parse_args(argv)
    watch_parent()
    job = None
    try:
        job = open_job(args.run_dir)
        (run_baselines if args.stage == "baselines" else run_training)(job)
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        if args.run_dir.is_dir():
            write_status(args.run_dir, state="failed", stage=args.stage, error=str(error))
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr, flush=True)
        if not isinstance(error, ConfigError):
            raise
        return 2
    finally:
        if job is not None:
            job.accelerator.wait_for_everyone() if sys.exc_info()[0] is None else None
            job.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
