"""What a training step, an evaluation and loading cost on this machine, with models of real size and random weights.

    bridgekit bench --out preserved_data/benchmarks/h200.json           # the usual rows, one GPU, about four minutes
    bridgekit bench --rows resampler_8 prefix_200 --cap-gib 79
    bridgekit bench --rows growth --out preserved_data/benchmarks/growth.json     # more tokens, rows and questions
    bridgekit bench --rows resampler_8 --processes 1 2 4 --out preserved_data/benchmarks/scaling.json

The questions are invented ones as long as GSM8K's, behind solved ones; a step has every named loss and dropout on. Each
row stands beside what the hardware allows, measured in the same process. The first steps, in which graphs are
captured, are not counted: `first` says what they cost.
"""

import dataclasses
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from bridgekit.alive import launch_command
from bridgekit.config import Parser, load_config, refuse_if
from bridgekit.model.pair import Pair, load_pair
from bridgekit.runs import write_text_atomic
from bridgekit.tasks import units
from bridgekit.train.corpus import make_documents
from bridgekit.train.experiment import Experiment
from bridgekit.train.trainer import Captured, build_optimizer, may_capture, train_step

BASE = """
task.task=gsm8k task.n_shots=7 task.n_train=256 task.n_val=64 task.n_test=200 train.controls=[] train.val_samples=8
bridge.source_view=question bridge.soft_position=question bridge.dropout=0.1 bridge.bridge_dtype=bfloat16
loss.kl_weight=0.5 loss.info_nce_weight=0.05 loss.format_weight=0.1 eval.conditions=[source,target,bridged]""".split()
RESAMPLER = """loss.prompt_weight=0.001 bridge.n_soft_tokens=64 bridge.bridge_dim=1024 bridge.heads=16
bridge.depth=4""".split()
DIT = """bridge.producer=dit bridge.n_soft_tokens=2048 bridge.bridge_dim=512 bridge.heads=8 bridge.depth=6
loss.prompt_weight=0.001 loss.flow_weight=0.1 bridge.teacher=prompt train.batch_size=2""".split()
KV = "bridge.injector=kv bridge.n_soft_tokens=-1 bridge.bridge_dim=512 bridge.heads=8 bridge.depth=2".split()
RESIDUAL = [*RESAMPLER, "bridge.injector=residual", "loss.prompt_weight=0"]
DECODED = "loss.decode_weight=0.1 loss.decode_every=1 loss.decode_batch=2 loss.decode_tokens=64".split()
STEPS = {  # {row: overrides}
    "resampler_2": [*RESAMPLER, "train.batch_size=2"],
    "resampler_8": [*RESAMPLER, "train.batch_size=8"],
    "resampler_16": [*RESAMPLER, "train.batch_size=16"],
    "kv_8": [*KV, "train.batch_size=8"],
    "residual_8": [*RESIDUAL, "train.batch_size=8"],
    "resampler_8_decoded": [*RESAMPLER, "train.batch_size=8", *DECODED],
    "dit_2048_alone_2": [*DIT, "bridge.prompt_mode=soft_only"],
    "dit_2048_2": [*DIT, "bridge.prompt_mode=soft_plus_text"],
}
ANSWERS = {"prefix_200": RESAMPLER, "residual_200": RESIDUAL, "kv_200": KV}
USUAL = [*STEPS, *ANSWERS]
SOFT = {f"soft_{k}": [*RESAMPLER, f"bridge.n_soft_tokens={k}", "train.batch_size=2"] for k in (16, 64, 256, 1024, 2048)}
BATCHES = {f"batch_{n}": [*RESAMPLER, f"train.batch_size={n}"] for n in (1, 2, 4, 8, 16, 32, 64)}
QUESTIONS = {f"questions_{n}": [*RESAMPLER, f"task.n_test={n}"] for n in (50, 200, 800, 1319)}
STEPS, ANSWERS = STEPS | SOFT | BATCHES, ANSWERS | QUESTIONS
GROUPS = {"usual": USUAL, "growth": [*SOFT, *BATCHES, *QUESTIONS]}


def write_questions(folder: Path, n: int = 4200) -> None:
    """A folder in GSM8K's format: three invented problems to a question, so that it is as long as a real one."""
    documents = dict(make_documents(units.make_lexicon(1), "source", 3 * n, 1, {"problem": 1}))
    whole = [(p.split("Question: ")[1].rsplit("\nAnswer")[0], a) for p, a in documents.items()]
    rows = []
    for parts in zip(whole[::3], whole[1::3], whole[2::3], strict=False):
        steps = [answer.split("####")[0].strip() for _, answer in parts[:-1]]
        rows.append({"question": " ".join(q for q, _ in parts), "answer": "\n".join([*steps, parts[-1][1]])})
    for name, part in (("train", rows[: len(rows) * 2 // 3]), ("test", rows[len(rows) * 2 // 3 :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


def wait() -> float:
    """Now, when the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_ceilings(device: torch.device, size: int = 8192) -> dict[str, float]:
    """What this device reaches: matrix products in half precision (TFLOP/s) and copies of memory (TB/s)."""
    a, n = torch.randn(size, size, device=device, dtype=torch.bfloat16), 20 if device.type == "cuda" else 1
    b, since = a @ a, wait()
    for _ in range(n):
        torch.mm(a, a, out=b)
    rate, room = n * 2 * size**3 / (wait() - since) / 1e12, a.flatten().repeat(8 if device.type == "cuda" else 1)
    copy, since = room.clone(), wait()
    for _ in range(n):
        copy.copy_(room)
    return {"tflops": round(rate, 1), "tb_per_s": round(n * 4 * room.numel() / (wait() - since) / 1e12, 3)}


def peak_gib(reset: bool = False) -> float:
    """Of the fullest GPU of this process."""
    used, devices = 0, range(torch.cuda.device_count())
    if reset and devices:
        torch.cuda.empty_cache()
    for device in devices:
        if reset:
            torch.cuda.reset_peak_memory_stats(device)
        used = max(used, torch.cuda.max_memory_allocated(device))
    return round(used / 2**30, 1)


def time_steps(experiment: Experiment, n: int = 9) -> dict:
    """Median seconds of a training step over n steps, each met before, so that its graph is there."""
    config, bridge = experiment.config, experiment.build_bridge()
    peak_gib(reset=True)
    since = wait()
    data = experiment.training_data()
    prepared, optimizer = wait() - since, build_optimizer(config, bridge)
    captured, spent, since = Captured(experiment, "bridged", bridge) if may_capture(experiment) else None, [], wait()
    for step in [*range(n)] * 3:
        train_step(experiment, "bridged", bridge, optimizer, data, step, captured)
        spent.append(wait() - since)
        since = wait()
    batch = experiment.batch(0)
    real = int(batch.after[1].sum() + batch.labels_mask.sum()) + len(batch.labels) * max(config.bridge.n_soft_tokens, 0)
    return {
        "seconds": round(statistics.median(spent[-n:]), 4), "fastest": round(min(spent[-n:]), 4),
        "slowest": round(max(spent[-n:]), 4), "gib": peak_gib(), "first": round(sum(spent[:-n]), 1),
        "prepare_s": round(prepared, 1), "parameters": bridge.n_parameters, "batch": len(batch.labels),
        "tokens": real, "shared": len(batch.shared_asked or ()),
        # forward and backward: each real token meets every weight of the target's layers twice
        "needed_tflop": round(4e-12 * real * count_weights(experiment.pair), 1),
    }  # fmt: skip


def count_weights(pair: Pair) -> int:
    """Weights of the target that every token is multiplied with: all but embeddings and head."""
    embeddings = pair.target.model.get_input_embeddings().weight.numel()
    return sum(p.numel() for p in pair.target.decoder.parameters()) - embeddings


def time_answers(experiment: Experiment, new_tokens: int) -> dict:
    """Seconds of an evaluation whose answers all have `new_tokens` tokens: the first, and one like it."""
    examples, bridge = experiment.examples("test"), experiment.build_bridge()
    experiment.task = dataclasses.replace(experiment.task, is_complete=lambda text: False)
    ends, experiment.pair.target.eos_ids = experiment.pair.target.eos_ids, set()
    peak_gib(reset=True)
    spent = []
    for _ in range(2):
        since = wait()
        answers = experiment.answer("bridged", examples, {"bridged": bridge})
        spent.append(round(wait() - since, 2))
    experiment.pair.target.eos_ids = ends
    n = sum(answer.n_tokens for answer in answers)
    return {"seconds": spent[1], "first": spent[0], "gib": peak_gib(), "questions": len(examples), "new_tokens": n}


def run(rows: list[str], pair_names: tuple[str, str], cap_gib: float, new_tokens: int, overrides: list[str]) -> dict:
    """All wanted rows with one pair, and what the hardware allows; as one of several processes, together with them.

    A row's batch is then that of all processes."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available()) if "RANK" in os.environ else None
    device = accelerator.device if accelerator else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world = accelerator.num_processes if accelerator else 1
    if device.type == "cuda" and cap_gib:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * 2**30 / torch.cuda.mem_get_info()[1]))
    table = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU",
        "torch": torch.__version__, "processes": world, "cap_gib": cap_gib,
        "source": pair_names[0], "target": pair_names[1],
        "ceilings": measure_ceilings(device, 8192 if device.type == "cuda" else 512), "rows": {},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        write_questions(Path(folder))
        given = [
            *BASE,
            f"task.data={folder}",
            f"pair.source_model={pair_names[0]}",
            f"pair.target_model={pair_names[1]}",
        ]
        given += [f"eval.max_new_tokens={new_tokens}", "eval.eval_batch_size=200", *overrides]
        since = wait()
        pair = load_pair(load_config(overrides=given), device)
        table["load_s"] = round(wait() - since, 1)
        for name in rows:
            config = load_config(overrides=[*given, *(STEPS | ANSWERS)[name], *overrides])
            experiment = Experiment(config.with_(batch_size=world * config.train.batch_size), None, accelerator, pair)
            try:
                row = time_answers(experiment, new_tokens) if name in ANSWERS else time_steps(experiment)
            except torch.OutOfMemoryError:
                row = {"seconds": None, "why": f"does not fit into {cap_gib:g} GiB"}
            table["rows"][name] = row
            if experiment.processes.is_first:
                print(name, json.dumps(row), flush=True)
            del experiment
            pair.target.forget(), pair.source.forget()
            gc.collect()
    return table


def scale(argv: list[str], counts: list[int]) -> dict:
    """The same rows with each number of processes; a step of n processes has n times the questions."""
    tables = {}
    for n in counts:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "table.json"
            done = subprocess.run(launch_command(["bridgekit.train.bench", *argv, "--out", str(out)], n), check=False)
            if done.returncode:  # it has said why
                sys.exit(done.returncode)
            tables[str(n)] = json.loads(out.read_text())
    return tables


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="bridgekit bench", description=__doc__.splitlines()[0])
    names = [*GROUPS, *STEPS, *ANSWERS]
    parser.add_argument("--rows", nargs="*", default=["usual"], choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--processes", type=int, nargs="*", help="run the rows with each of these numbers of GPUs")
    parser.add_argument("--source", default="geometry:mistral-7b", help="geometry:<name>, a folder or a hub id")
    parser.add_argument("--target", default="geometry:llama-3.1-8b")
    parser.add_argument("--cap-gib", type=float, default=79.0, help="memory of the card to use; 0: all")
    parser.add_argument("--new-tokens", type=int, default=256, help="of each answer")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="a JSON file for the table")
    parser.add_argument("--questions", type=Path, metavar="FOLDER", help="only write invented questions there")
    args = parser.parse_args(argv)
    refuse_if(min(args.processes or [1]) < 1, f"--processes: numbers of 1 or more, got {args.processes}")
    if args.questions:
        args.questions.mkdir(parents=True, exist_ok=True)
        write_questions(args.questions, 9600)
        return 0
    rows = [row for name in args.rows for row in GROUPS.get(name, [name])]
    options = [f"--source={args.source}", f"--target={args.target}", f"--cap-gib={args.cap_gib}"]
    options += [f"--new-tokens={args.new_tokens}", *(f"-o={override}" for override in args.overrides)]
    if args.processes:
        table = scale(["--rows", *rows, *options], args.processes)
    else:
        table = run(rows, (args.source, args.target), args.cap_gib, args.new_tokens, args.overrides)
    if args.out and not int(os.environ.get("RANK", 0)):
        write_text_atomic(args.out, json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
