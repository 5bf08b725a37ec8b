"""What a run needs, before queue time is spent: memory, seconds, GPU-hours and disk, what is missing, what would fit.

    bridgekit plan parameters/phase1_h100_node.yaml -o train.batch_size=16 --gpu-memory 80 --gpu H100

It reads config.json and tokenizer.json of the models and the task's files; no weights, no GPU and no torch are needed.
The sums stand in forecast.py. Before a job is started on a GPU, `refuse_unfit` asks the same.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

from bridgekit.config import EMBEDDED, Config, ConfigError, Parser, count_shards, is_geometry, load_config, refuse_if
from bridgekit.config import resolve_model_folder as resolve_folder
from bridgekit.keys import GEOMETRIES, GEOMETRY, REAL, SIZES
from bridgekit.runs import count_threads, project_root
from bridgekit.tasks import Example, get_task, literal_prompt, source_prompt, units
from bridgekit.train.forecast import GiB, Lengths, Needs, Shape, describe_fit, forecast, nearest_fit

TOLERANCE = 1.1  # of a GPU's memory: a forecast that is above refuses a job
SAMPLED = 1024  # training questions whose lengths are taken for all
CHARACTERS, TEMPLATE = 3.5, (32, 5)  # a token has, in English; a chat template has around a prompt, before and after
# Tokens of a solved question, a question and an answer, where the data is missing: of 8-shot GSM8K, others are guesses.
USUAL = {"gsm8k": (170, 85, 180), "math": (250, 150, 400), "hotpotqa": (1400, 1400, 8), "units": (0, 60, 60)}


Gpu = namedtuple("Gpu", "name total free count")  # the smallest of those that are visible, in GiB
Model = namedtuple("Model", "shape folder missing note", defaults=("",))  # as far as its files are here


def find_gpu() -> Gpu | None:
    """Asked without torch, whose context would take memory; None where no GPU is visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible is not None and visible.strip() in ("", "-1"):
        return None
    query = "nvidia-smi --query-gpu=name,memory.total,memory.free --format=csv,noheader,nounits".split()
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    rows = [line.rsplit(",", 2) for line in lines if line.count(",") >= 2]
    chosen = [int(i) for i in (visible or "").split(",") if i.strip().isdecimal()]
    rows = [rows[i] for i in chosen if i < len(rows)] or rows
    try:
        found = [Gpu(name.strip(), int(total) / 1024, int(free) / 1024, len(rows)) for name, total, free in rows]
    except ValueError:  # a card that does not say how much it has
        return None
    return min(found, key=lambda gpu: gpu.total, default=None)


def known_shape(name: str) -> Shape:
    return Shape.of(dict(zip(SIZES, GEOMETRIES[name], strict=True)))


def find_model(key: str, model: str) -> Model:
    """A model's shape, its folder, and what is missing of it."""
    if is_geometry(model):
        resolve_folder(key, model)
        return Model(known_shape(model.removeprefix(GEOMETRY).split("@")[0]), EMBEDDED / key.split("_")[0], [])
    try:
        folder = resolve_folder(key, model)
    except ConfigError as error:
        return Model(None, None, [str(error)])
    hub_id, missing, way_out = "", [], "save it as safetensors"
    if folder is None:
        from huggingface_hub import get_token, try_to_load_from_cache

        hub_id, _, revision = model.partition("@")
        cached = try_to_load_from_cache(hub_id, "config.json", revision=revision or None)
        folder = Path(cached).parent if isinstance(cached, str) else None
        token = "an access token is set" if get_token() else "no access token is set: `hf auth login`, or HF_TOKEN"
        way_out = f"`hf download {hub_id}`; if it is gated, ask for access at https://huggingface.co/{hub_id} ({token})"
    if folder is None or not any(folder.glob("*.safetensors")):
        missing = [f"pair.{key}: no weights of '{model}' {'in the hub cache' * bool(hub_id)}: {way_out}"]
    if folder is None:
        near = next((name for name in GEOMETRIES if name != "tiny" and name in hub_id.lower()), None)
        note = (
            f"{model}: forecast with the shape of {GEOMETRY}{near}" if near else f"{model}: its size is not known here"
        )
        return Model(known_shape(near) if near else None, None, missing, note)
    try:
        return Model(Shape.of(json.loads((folder / "config.json").read_text())), folder, missing)
    except (ValueError, KeyError, TypeError, AttributeError):
        note = f"{model}: its config.json is of a kind whose size is not counted here"
        return Model(None, folder, missing, note)


def count_tokens(folder: Path | None) -> Callable[[list[str]], list[int]]:
    """Texts to numbers of tokens: by the model's tokenizer, or an estimate from their characters."""
    if folder is None or not (folder / "tokenizer.json").is_file():
        return lambda texts: [round(len(text) / CHARACTERS) for text in texts]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda texts: [len(row.ids) for row in tokenizer.encode_batch(texts, add_special_tokens=False)]


def measure_lengths(config: Config, source: Path | None, target: Path | None) -> tuple[Lengths, list[str]]:
    """Lengths of the task's texts, and what is missing of its data."""
    task, more = config.task, TEMPLATE if config.pair.prompt_format == "chat" else (0, 0)
    try:
        made = get_task(config)
        if task.task in REAL:
            made.check(config)
        few = config.with_(n_train=min(task.n_train, SAMPLED))
        examples = made.examples(few, units.load_lexicon_seed(config), "train")
    except (ConfigError, OSError) as error:
        shot, asked, answer = USUAL.get(task.task, USUAL["gsm8k"])
        start, asked = task.n_shots * shot + more[0], (asked + more[1],)
        return Lengths(start, start, asked, asked, (answer,), f"usual for {task.task}, a guess"), [str(error)]

    def own(prompt: Callable[[Example], object]) -> list[str]:
        return [p.text[p.n_shared :] for p in map(prompt, examples)]

    count, count_read, shots = count_tokens(target), count_tokens(source), examples[0].shots
    texts = own(source_prompt) if config.bridge.source_view != "facts" else [e.facts for e in examples]
    asked, read = (tuple(n + more[1] for n in ns) for ns in (count(own(literal_prompt)), count_read(texts)))
    counted = all(folder and (folder / "tokenizer.json").is_file() for folder in (source, target))
    origin = f"{len(examples)} questions, " + ("counted by the tokenizers" if counted else "a token per 3.5 characters")
    start, source_start = (1 + of([shots])[0] + more[0] for of in (count, count_read))
    answers = tuple(n + 1 for n in count([e.solution for e in examples]))
    return Lengths(start, source_start, asked, read, answers, origin), []


class Plan(NamedTuple):
    """A forecast and what it rests on; no `needs` where a model's size is not known."""

    needs: Needs | None
    lengths: Lengths
    missing: list[str]
    notes: list[str]
    peak_of: Callable[[Config], float]  # GiB of another configuration of the same models and texts


def make_plan(config: Config, gpu: str) -> Plan:
    """What a configuration needs on a GPU of this name."""
    keys = ("source_model", "target_model")[:: 1 if config.pair.direction == "forward" else -1]
    with contextlib.chdir(project_root()):
        source, target = models = [find_model(key, getattr(config.pair, key)) for key in keys]
        lengths, missing = measure_lengths(config, source.folder, target.folder)
    missing, notes = [*source.missing, *target.missing, *missing], [m.note for m in models if m.note]
    if source.shape is None or target.shape is None:
        return Plan(None, lengths, missing, notes, lambda other: 0.0)

    def needs_of(other: Config) -> Needs:
        return forecast(other, source.shape, target.shape, lengths, gpu)

    needs, fetched = needs_of(config), sum(2 * m.shape.parameters for m in models if m.missing)
    return Plan(replace(needs, disk=needs.disk + fetched), lengths, missing, notes, lambda c: needs_of(c).peak / GiB)


def has_gpu() -> bool:
    """Whether this machine shows a GPU of any make; a container may have one without nvidia-smi."""
    devices = [path for form in ("nvidia[0-9]*", "kfd", "dxg", "dri/render*") for path in Path("/dev").glob(form)]
    return bool(devices) and os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() not in ("", "-1")


def check_devices(config: Config) -> None:
    """Refuse GPUs that are not here, and a number of threads that is none."""
    count_threads()  # or its refusal
    for key, device in (("source", config.pair.source_device), ("target", config.pair.target_device)):
        there = sys.platform == "darwin" if device == "mps" else device in ("auto", "cpu") or has_gpu()
        refuse_if(not there, f"pair.{key}_device: no GPU for '{device}' is seen here: use auto or cpu")
        if device.startswith("cuda:") and (gpu := find_gpu()):
            why = f"'{device}' is not here, GPUs are numbered from 0, there are {gpu.count}"
            refuse_if(int(device.partition(":")[2]) >= gpu.count, f"pair.{key}_device: {why}")
        spread = count_shards(device)
        if spread > 1 and (gpu := find_gpu()):
            refuse_if(spread > gpu.count, f"pair.{key}_device: '{device}' needs {spread} GPUs, there are {gpu.count}")


def refuse_unfit(config: Config) -> None:
    """Refuse a job whose forecast is more than a tenth above the memory of the GPU that is here."""
    check_devices(config)
    elsewhere = {config.pair.target_device, config.pair.source_device} & {"cpu", "mps"}
    if elsewhere or os.environ.get("BRIDGEKIT_PLAN") == "off" or (gpu := find_gpu()) is None:
        return
    plan = make_plan(config, gpu.name)
    if plan.needs is None or (peak := plan.needs.peak / GiB) <= TOLERANCE * gpu.total:
        return
    way_out = f"{describe_fit(nearest_fit(config, plan.peak_of, gpu.total))}; BRIDGEKIT_PLAN=off starts it as it is"
    raise ConfigError(f"memory: the run needs about {peak:.0f} GiB, the GPU has {gpu.total:.0f}: {way_out}")


def check_machine(config: Config, plan: Plan, gpu: Gpu | None) -> list[str]:
    """What this machine lacks: free memory, GPUs and disk."""
    lacking, n = [], config.train.num_processes
    folder = project_root() / config.run.runs_dir
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if plan.needs and plan.needs.disk > free:
        lacking.append(f"run.runs_dir: {plan.needs.disk / 1e9:.0f} GB of disk are needed, {free / 1e9:.0f} are free")
    if gpu and gpu.count < n:
        lacking.append(f"train.num_processes: {n} GPUs are needed, there are {gpu.count}")
    if gpu and plan.needs and gpu.free < plan.needs.peak / GiB <= gpu.total:
        lacking.append(f"pair.target_device: {gpu.free:.0f} of {gpu.total:.0f} GiB are free: end what takes the rest")
    return lacking + (check_build() if gpu else [])


def check_build() -> list[str]:
    """Whether torch, which is not imported here, was built for a CUDA that the driver takes."""
    said = subprocess.run(["nvidia-smi"], capture_output=True, text=True, check=False).stdout
    driver = re.search(r"CUDA Version: ((\d+)\.\d+)", said)
    torch = importlib.util.find_spec("torch")
    if driver is None or torch is None:
        return []
    version = Path(torch.origin).with_name("version.py").read_text()
    built = re.search(r"^cuda\b.*= '((\d+)\.\d+)'", version, re.MULTILINE)
    if built and int(built[2]) <= int(driver[2]):
        return []
    kind, wanted = f"is built for CUDA {built[1]}" if built else "is a build without CUDA", driver[1]
    return [f"torch: this one {kind}, the driver takes {wanted}: install it from PyTorch's index for CUDA {wanted}"]


def tabulate(config: Config, plan: Plan, memory: float) -> list[tuple[str, str]]:
    """(item, forecast) of everything; the parts of the memory are those of its peak."""
    needs, most = plan.needs, max(plan.needs.training, plan.needs.evaluation, key=lambda part: sum(part.values()))
    seconds, n = needs.seconds, config.train.num_processes
    parts = {name: f"{size / GiB:.1f} GiB" for name, size in (needs.resident | most).items() if size > 0.05 * GiB}
    when = "training" if most is needs.training else "evaluation"
    return [
        (f"memory of each GPU, greatest in {when}", f"{needs.peak / GiB:.1f} of {memory:.0f} GiB"),
        *((f"  {name}", size) for name, size in parts.items()),
        ("a training step", f"{seconds['training step']:.3f} s"),
        (f"a validation, {config.train.val_samples} questions", f"{seconds['validation']:.0f} s"),
        ("baselines and test set", f"{(seconds['baselines'] + seconds['test']) / 60:.0f} min"),
        (f"whole run, {n} GPU{'s' * (n > 1)}, at most", f"{seconds['whole run'] / 60:,.0f} min"),
        ("GPU-hours, at most", f"{needs.gpu_hours:.1f}"),
        ("disk", f"{needs.disk / 1e9:.1f} GB"),
        ("bridge", f"{needs.bridge / 1e6:.1f}M parameters"),
    ]


def main(argv: list[str] | None = None) -> int:
    """Print the plan; exit code 0 if the run can start, 2 if not."""
    parser = Parser(prog="bridgekit plan", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, metavar="PARAMETERS", help="files of parameters/")
    parser.add_argument("-f", dest="more", action="append", default=[], metavar="FILE", help="the same, as elsewhere")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--gpu-memory", type=float, default=0.0, metavar="GiB", help="default: the GPU's here, else 80")
    parser.add_argument("--gpu", default="", metavar="NAME", help="e.g. H200, A100; default: the GPU's here, else H100")
    parser.add_argument("--json", action="store_true", help="the numbers, in bytes and seconds")
    args = parser.parse_args(argv)
    refuse_if(not args.files + args.more, "bridgekit plan: name a file of parameters/")
    config, here = load_config([*args.files, *args.more], args.overrides, "phase1"), find_gpu()
    name = args.gpu or (here.name if here else "H100")
    memory = args.gpu_memory or (here.total if here else 80.0)
    plan = make_plan(config, name)
    missing = plan.missing + check_machine(config, plan, None if args.gpu or args.gpu_memory else here)
    fits = plan.needs is None or plan.needs.peak / GiB <= memory
    changes = {} if fits else nearest_fit(config, plan.peak_of, memory)
    ready = fits and not missing
    if args.json:
        facts = {"gpu": name, "gpu_memory": memory * GiB, "fits": fits, "nearest": changes, "missing": missing}
        facts |= {"notes": plan.notes, "lengths": plan.lengths.origin}
        print(json.dumps((asdict(plan.needs) | {"peak": plan.needs.peak} if plan.needs else {}) | facts, indent=1))
        return 0 if ready else 2
    print(f"{config.run.name} on {name}{'' if here else ' (no GPU here)'}; texts: {plan.lengths.origin}")
    for item, value in tabulate(config, plan, memory) if plan.needs else [("memory and time", "not known")]:
        print(f"{item:52} {value:>16}")
    for line in [f"note: {note}" for note in plan.notes] + [f"missing: {line}" for line in missing]:
        print(line)
    print("it can run" if ready else "it cannot run yet" if fits else "it does not fit; " + describe_fit(changes))
    return 0 if ready else 2
