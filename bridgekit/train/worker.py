"""The child process of a run: baselines, training, the test set once, verdict and reports.

    accelerate launch -m bridgekit.train.worker RUN_DIR --stage baselines     # source and target on validation
    accelerate launch -m bridgekit.train.worker RUN_DIR --stage train         # everything else

The run folder's config.yaml is all this reads.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from bridgekit.config import ConfigError
from bridgekit.model.pair import split_prompts
from bridgekit.runs import (
    append_jsonl,
    load_eval,
    load_jsonl,
    load_run_config,
    load_status,
    watch_parent,
    write_jsonl,
    write_status,
    write_text_atomic,
)  # fmt: skip
from bridgekit.tasks import Example, check_positions, literal_prompt, source_prompt
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
    if "shuffled" in config.eval.conditions and any(e.donor_id is None for e in experiment.examples("test")):
        raise ConfigError("task.n_test: too few problems for each to have a donor: more, or no `shuffled` condition")
    check_lengths(experiment)
    if experiment.processes.is_first:
        record_provenance(experiment)
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


def record_provenance(experiment: Experiment) -> None:
    """Where this stage's numbers come from; one on other code or elsewhere is added, the earlier ones stay."""
    path, record = experiment.folder / "provenance.json", experiment.provenance()
    if path.is_file():
        old = json.loads(path.read_text())
        if all(old.get(key) == record[key] for key in record.keys() - {"command", "started"}):
            return
        record["earlier"] = [*old.pop("earlier", []), old]
    write_text_atomic(path, json.dumps(record, indent=1) + "\n")


def run_baselines(experiment: Experiment) -> None:
    """Source and target alone on all validation problems: the headroom, before anything is trained."""
    rows = experiment.evaluate(experiment.examples("val"), {}, None, ("source", "target"), stage="baseline")
    if rows:
        write_jsonl(experiment.folder / "headroom.jsonl", [row | {"eval_step": "headroom"} for row in rows])


def run_training(experiment: Experiment) -> None:
    """The bridge and its controls, then one evaluation on test problems."""
    config, folder, processes = experiment.config, experiment.folder, experiment.processes
    if not (folder / "headroom.jsonl").exists():
        run_baselines(experiment)
    if processes.is_first:
        for stale in [*folder.glob("metrics*.jsonl"), folder / "controls.json"]:
            stale.unlink(missing_ok=True)
    processes.wait()
    experiment.router_threshold = tune_router(list(load_jsonl(folder / "headroom.jsonl")))
    for name in ("bridged", *config.train.controls):
        experiment.bridges |= train_bridge(experiment, name)
    since, test = time.time(), choose_test(experiment)
    conditions = tuple(dict.fromkeys([*config.eval.conditions, *experiment.bridges]))
    rows = experiment.evaluate(test, None, "final", conditions, want_attention=True, stage="test")
    experiment.spend("test", since)
    if not processes.is_first:
        return
    if config.eval.noise_floor:
        flips = count_flips(experiment, test, experiment.bridges["bridged"], rows)
        append_jsonl(folder / "metrics.jsonl", {"step": config.train.steps, "noise_floor": flips})
    finish(experiment)


def finish(experiment: Experiment) -> None:
    """Verdict, summary line, the status that says the run is finished, and its part of the reports."""
    from bridgekit.results.reports import report_end
    from bridgekit.results.verdict import judge

    folder = experiment.folder
    frame = load_eval(folder / "eval_samples_step_final.jsonl")
    verdict = judge([frame], seeds=[experiment.config.run.seed])
    write_text_atomic(folder / "verdict.json", json.dumps(verdict.to_dict(), indent=1) + "\n")
    held = frame[frame["novelty"] != "seen"] if "novelty" in frame else frame
    shares = " ".join(
        f"{c} {held[f'{c}_correct'].mean():.4f}" for c in ("source", "target", "bridged") if f"{c}_correct" in held
    )
    write_text_atomic(folder / "summary.log", f"{folder.name} n {len(held)} {shares} {verdict.outcome}\n")
    write_text_atomic(folder / "timing.json", json.dumps(experiment.seconds_spent, indent=1) + "\n")
    write_status(
        folder, state="finished", stage="done", elapsed=round(time.time() - experiment.started, 1),
        parameters=experiment.bridges["bridged"].n_parameters,
    )  # fmt: skip
    report_end(folder)


def mark_failed(folder: Path, stage: str, error: Exception) -> None:
    """Say in the run folder why the run ended; a finished run stays as it is."""
    from bridgekit.results.reports import report_end

    with contextlib.suppress(OSError):  # a full disk: the line on standard error says it
        if folder.is_dir() and load_status(folder).get("state") != "finished":
            write_status(folder, state="failed", stage=stage, error=str(error))
            report_end(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bridgekit.train.worker", description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stage", choices=("baselines", "train"), default="train")
    args = parser.parse_args(argv)
    watch_parent(args.run_dir)
    experiment = None
    try:
        experiment = open_job(args.run_dir)
        (run_baselines if args.stage == "baselines" else run_training)(experiment)
        experiment.processes.wait()
    except Exception as error:
        mark_failed(args.run_dir, args.stage, error)
        print(f"error: {(str(error) or type(error).__name__).splitlines()[0]}", file=sys.stderr, flush=True)
        if not isinstance(error, ConfigError):
            raise
        return 2
    finally:
        if experiment is not None:  # gloo workers abort at exit where bridges or groups are left
            experiment.bridges.clear()
            experiment.processes.accelerator.free_memory()
            experiment.processes.accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
