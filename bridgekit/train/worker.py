"""The child process of a run: baselines, training, the test set once, verdict and reports.

    accelerate launch -m bridgekit.train.worker RUN_DIR --stage baselines     # source and target on validation
    accelerate launch -m bridgekit.train.worker RUN_DIR --stage train         # everything else

The run folder is all this reads. What is there already is not made again: a run that was stopped, killed or out of
memory is started once more, and goes on. Exit code 75 (GO_ON) says that it was asked to stop and can go on.
"""

import argparse
import contextlib
import errno
import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from bridgekit.alive import GO_ON, lock_run, watch_parent
from bridgekit.config import ConfigError
from bridgekit.model.pair import split_prompts
from bridgekit.runs import (
    FINAL,
    append_jsonl,
    free_run,
    load_jsonl,
    load_run_config,
    load_status,
    write_jsonl,
    write_status,
    write_text_atomic,
)  # fmt: skip
from bridgekit.tasks import Example, check_donors, check_positions, literal_prompt, source_prompt
from bridgekit.train.checkpoints import STOP
from bridgekit.train.conditions import count_flips, tune_router
from bridgekit.train.experiment import Experiment
from bridgekit.train.trainer import train_bridge


def open_job(folder: Path) -> Experiment:
    """The run's experiment on all its processes; what cannot work is refused before anything is trained."""
    config = load_run_config(folder)
    if load_status(folder).get("state") == "finished":
        raise ConfigError(f"run '{folder}' is finished, and its test set is read once: open a new run")
    accelerator = Accelerator(cpu=not torch.cuda.is_available() or config.pair.target_device == "cpu")
    if accelerator.num_processes != config.train.num_processes:
        raise ConfigError(
            f"train.num_processes: {config.train.num_processes} asked for, {accelerator.num_processes} started: "
            "start the job with bridgekit or `accelerate launch --multi_gpu --num_processes N`"
        )
    experiment = Experiment(config, folder, accelerator)
    check_donors(config, experiment.examples("test"))
    check_lengths(experiment)
    record = experiment.provenance() | {"data": fingerprint_data(experiment)}
    check_resumed(folder, record)
    if experiment.processes.is_first:
        record_provenance(folder, record)
    return experiment


def check_lengths(experiment: Experiment) -> None:
    """Refuse prompts, messages and answers that the target has no positions for."""
    pair, examples = experiment.pair, experiment.examples("val") + experiment.examples("test")
    longest_prompt = max(len(p.all) for p in split_prompts(pair.target, [literal_prompt(e) for e in examples]))
    prompts = [source_prompt(e) for e in examples]
    longest_source = max(len(p.all) for p in split_prompts(pair.source, prompts))
    check_positions(experiment.config, pair.target.max_positions, longest_prompt, longest_source)


def choose_test(experiment: Experiment) -> list[Example]:
    """The test problems of this run: `eval_samples` held-out ones, and those about train units."""
    n, test = experiment.config.eval.eval_samples, experiment.examples("test")
    if not 0 < n < experiment.config.task.n_test:
        return test
    return experiment.test[:n] + [e for e in test if e.novelty == "seen"]


def fingerprint_data(experiment: Experiment) -> str:
    """A hash of all questions and answers: a run that goes on must meet the same ones."""
    digest = hashlib.sha256()
    for example in (e for split in ("train", "val", "test") for e in experiment.examples(split)):
        digest.update(f"{example.id}\n{example.facts}{example.question}\n{example.solution}\n".encode())
    return digest.hexdigest()[:16]


def check_resumed(folder: Path, record: dict) -> None:
    """Refuse to go on with other models or other data than the run was begun with."""
    path = folder / "provenance.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    for key, what in (("source", "source model"), ("target", "target model"), ("data", "data")):
        if known.get(key, record[key]) != record[key]:
            apart = f"begun with another {what} ({known[key]}, here {record[key]})"
            raise ConfigError(f"run '{folder}': {apart}: give it the same, or open a new run")


def record_provenance(folder: Path, record: dict) -> None:
    """Where this stage's numbers come from; one on other code or elsewhere is added, the earlier ones stay."""
    path = folder / "provenance.json"
    if path.is_file():
        old = json.loads(path.read_text())
        if all(old.get(key) == record[key] for key in record.keys() - {"command", "started"}):
            return
        record["earlier"] = [*old.pop("earlier", []), old]
    write_text_atomic(path, json.dumps(record, indent=1) + "\n")


def run_baselines(experiment: Experiment) -> None:
    """Source and target alone on all validation problems: the headroom, before anything is trained."""
    rows = experiment.evaluate(experiment.examples("val"), {}, None, ("source", "target"), stage="baseline")
    for lm in (experiment.pair.source, experiment.pair.target):
        lm.forget()  # a training has other prompts, and needs the room
    if rows:
        write_jsonl(experiment.folder / "headroom.jsonl", [row | {"eval_step": "headroom"} for row in rows])


def run_training(experiment: Experiment) -> None:
    """The bridge and its controls, then one evaluation on test problems; what is done already is not done again."""
    config, folder, processes = experiment.config, experiment.folder, experiment.processes
    if not (folder / "headroom.jsonl").exists():
        run_baselines(experiment)
    processes.wait()
    experiment.router_threshold = tune_router(list(load_jsonl(folder / "headroom.jsonl")))
    for name in ("bridged", *config.train.controls):
        experiment.bridges |= train_bridge(experiment, name)
    experiment.forget_data()
    test = choose_test(experiment)
    if not (folder / FINAL).exists():
        since = time.time()
        conditions = tuple(dict.fromkeys([*config.eval.conditions, *experiment.bridges]))
        experiment.evaluate(test, None, "final", conditions, want_attention=True, stage="test")
        experiment.spend("test", since)
    if not processes.is_first:
        return
    if config.eval.noise_floor and not any("noise_floor" in row for row in load_jsonl(folder / "metrics.jsonl")):
        flips = count_flips(experiment, test, experiment.bridges["bridged"], list(load_jsonl(folder / FINAL)))
        append_jsonl(folder / "metrics.jsonl", {"step": config.train.steps, "noise_floor": flips})
    finish(experiment)


def finish(experiment: Experiment) -> None:
    """Verdict, summary line, the status that says the run is finished, and its part of the reports."""
    from bridgekit.results.reports import report_end
    from bridgekit.results.table import load_frame
    from bridgekit.results.verdict import judge

    folder = experiment.folder
    frame = load_frame(folder)
    verdict = judge([frame], seeds=[experiment.config.run.seed])
    write_text_atomic(folder / "verdict.json", json.dumps(verdict.to_dict(), indent=1) + "\n")
    held = frame[frame["novelty"] != "seen"] if "novelty" in frame else frame
    shares = " ".join(
        f"{c} {held[f'{c}_correct'].mean():.4f}" for c in ("source", "target", "bridged") if f"{c}_correct" in held
    )
    write_text_atomic(folder / "summary.log", f"{folder.name} n {len(held)} {shares} {verdict.outcome}\n")
    spent = {stage: round(seconds, 1) for stage, seconds in experiment.seconds_spent.items()}
    write_text_atomic(folder / "timing.json", json.dumps(spent, indent=1) + "\n")
    write_status(
        folder, state="finished", stage="done", elapsed=round(time.time() - experiment.started, 1),
        parameters=experiment.bridges["bridged"].n_parameters,
    )  # fmt: skip
    free_run(folder)  # last of all: until here a kill left what the run goes on from
    report_end(folder)


def explain(error: Exception, status: dict) -> str:
    """What went wrong, where the run was by its status, and what to change, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        stage, change = status["stage"], "smaller eval.eval_batch_size, smaller train.cache_states_gb or "
        if "step" in status:
            stage, change = f"step {status['step'] + 1} of {stage}, or just after", "smaller train.cache_states_gb or "
        used = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
        ways = f"{change}more train.num_processes, then go on with --resume"
        other = "a new run with a smaller train.batch_size or bridge.n_soft_tokens (`bridgekit plan` says what fits)"
        return f"out of memory in {stage} ({used:.1f} GiB in use at most): {ways}; or {other}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full ({error.filename or 'while writing'}): free some space, then go on with --resume"
    return (str(error) or type(error).__name__).splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridgekit.train.worker", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", choices=("baselines", "train"), default="train")
    args = parser.parse_args(argv)
    from bridgekit.results.reports import mark_ended

    rank, experiment, stack = int(os.environ.get("RANK", 0)), None, contextlib.ExitStack()
    STOP.listen()
    try:
        if not (args.run_dir / "config.yaml").is_file():
            raise ConfigError(f"{args.run_dir}: no run folder (config.yaml not found)")
        stack.callback(watch_parent(args.run_dir, rank).set)
        if rank == 0:
            stack.enter_context(lock_run(args.run_dir, "worker"))
        experiment = open_job(args.run_dir)
        (run_baselines if args.stage == "baselines" else run_training)(experiment)
        experiment.processes.wait()
    except SystemExit:  # asked to stop
        if rank == 0:
            mark_ended(args.run_dir, "stopped", "asked to stop")
        return GO_ON
    except Exception as error:
        why = explain(error, {"stage": args.stage} | load_status(args.run_dir))
        mark_ended(args.run_dir, "failed", f"{args.stage}: {why}")
        print(f"error: {why}", file=sys.stderr, flush=True)
        if not isinstance(error, (ConfigError, OSError)):
            raise
        return 2
    finally:
        if experiment is not None:  # gloo workers abort at exit where bridges or groups are left
            experiment.bridges.clear()
            experiment.processes.accelerator.free_memory()
            experiment.processes.accelerator.end_training()
        stack.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
