"""Train a bridge and its controls, keep the best by validation, and evaluate once on test.

    accelerate launch -m bridgekit.train.worker RUN_DIR --stage baselines     # source and target on validation
    accelerate launch -m bridgekit.train.worker RUN_DIR --stage train         # everything else

The run folder's config.yaml is all this reads.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from bridgekit.config import ConfigError
from bridgekit.model.bridge import Bridge
from bridgekit.model.pair import load_pair
from bridgekit.runs import (
    append_jsonl,
    load_eval,
    provenance,
    read_jsonl,
    read_run_config,
    watch_parent,
    write_jsonl,
    write_status,
    write_text_atomic,
)  # fmt: skip
from bridgekit.tasks import load_examples
from bridgekit.tasks.base import literal_prompt
from bridgekit.train.data import check_fit
from bridgekit.train.evaluator import Evaluator, tune_router
from bridgekit.train.trainer import Job, train_bridge


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
    rows = evaluator.evaluate(
        job.val, {}, "headroom", ("source", "target"), report=lambda c: job.report(f"baseline {c}")
    )
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
        job.test,
        bridges,
        "final",
        conditions,
        want_attention=True,
        donors=job.donors,
        report=lambda c: job.report(f"test {c}"),
    )
    job.spend("test", since)
    if config.eval.noise_floor and job.is_first:
        flips = evaluator.count_flips(job.test, bridges["bridged"], rows)
        append_jsonl(job.folder / "metrics.jsonl", {"step": config.train.steps, "noise_floor": flips})
    if job.is_first:
        finish(job, bridges["bridged"])


def finish(job: Job, bridge: Bridge) -> None:
    """Verdict, summary line, the status that says the run is finished, and its part of the reports."""
    from bridgekit.results.reports import report_end
    from bridgekit.results.verdict import judge

    frame = load_eval(job.folder / "eval_samples_step_final.jsonl")
    verdict = judge([frame], seeds=[job.config.run.seed])
    write_text_atomic(job.folder / "verdict.json", json.dumps(verdict.to_dict(), indent=1) + "\n")
    held = frame[frame["novelty"] != "seen"] if "novelty" in frame else frame
    shares = " ".join(
        f"{c} {held[f'{c}_correct'].mean():.4f}" for c in ("source", "target", "bridged") if f"{c}_correct" in held
    )
    write_text_atomic(job.folder / "summary.log", f"{job.folder.name} n {len(held)} {shares} {verdict.outcome}\n")
    write_text_atomic(job.folder / "timing.json", json.dumps(job.minutes, indent=1) + "\n")
    write_status(
        job.folder, state="finished", stage="done", elapsed=round(time.time() - job.started, 1),
        parameters=bridge.n_parameters,
    )  # fmt: skip
    report_end(job.folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridgekit.train.worker", description=__doc__.split("\n")[0])
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
            from bridgekit.results.reports import report_end

            write_status(args.run_dir, state="failed", stage=args.stage, error=str(error))
            report_end(args.run_dir)
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
