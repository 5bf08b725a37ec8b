# ruff: noqa: E501 (cases and rows of text)
"""Make the goldens of the code before the restructuring (commit 1a94541): what it computes, as JSON.

    git worktree add /tmp/old 1a94541
    OMP_NUM_THREADS=1 nice -n 5 python make_goldens.py --old /tmp/old --out tests/goldens            # all eight files
    OMP_NUM_THREADS=1 nice -n 5 python make_goldens.py --old /tmp/old --out tests/goldens plans units

One function per file; each calls the old package as its notebooks and verbs call it and writes what comes out. The
checkout is only read: work is done in a scratch folder with links to it. See README.md for what is exact.
"""

import argparse
import ast
import contextlib
import csv
import dataclasses
import gzip
import hashlib
import importlib
import io
import json
import math
import os
import re
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

COMMIT = "1a94541"
LIMIT = 150_000  # larger files are compressed
BIG = 2_000  # a CSV of more cells is kept as a hash


# ---- helpers --------------------------------------------------------------------------------------------------------


def plain(value):
    """JSON's own types: floats with 10 significant digits, NaN as null, tuples as lists, numpy's scalars as Python's."""
    if hasattr(value, "item") and not isinstance(value, (list, tuple, dict)) and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return float(f"{value:.10g}") if math.isfinite(value) else str(value)
    if dataclasses.is_dataclass(value):
        return plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value)


def write(out: Path, name: str, content) -> None:
    data = (json.dumps(plain(content), indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    for stale in (out / name, out / f"{name}.gz"):
        stale.unlink(missing_ok=True)
    if len(data) > LIMIT:
        packed = io.BytesIO()
        with gzip.GzipFile(filename="", fileobj=packed, mode="wb", compresslevel=9, mtime=0) as stream:
            stream.write(data)
        name, data = f"{name}.gz", packed.getvalue()
    (out / name).write_bytes(data)
    print(f"{name}: {len(data):,} bytes", flush=True)


def table(frame) -> dict:
    """A DataFrame as {columns, rows}."""
    return {"columns": list(frame.columns), "rows": frame.astype(object).to_numpy().tolist()}


def sha(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def differences(config, default: dict) -> dict:
    """The keys of a configuration that are not the default's."""
    from bridgekit.config import to_flat

    return {key: value for key, value in to_flat(config).items() if value != default[key]}


# ---- 1. judge -------------------------------------------------------------------------------------------------------


def make_judge() -> dict:
    """The claim rule, headroom, table of conditions and recovery of every preserved run, and of three seeds together."""
    from bridgekit import verdict
    from bridgekit.runs import find_eval, load_eval, read_run_config

    runs, frames = {}, {}
    for folder in sorted(Path("preserved_data").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            frames[folder.name] = load_eval(find_eval(folder)), read_run_config(folder).run.seed
    for name, (frame, seed) in frames.items():
        row = {"seed": seed, "judge": judged_fields(verdict.judge([frame], seeds=[seed]))}
        row["conditions_table"] = table(verdict.conditions_table(frame))
        row["recovery"] = {
            s: recovery_of(frame, s) for s in ("source_only_held_unit", "source_only_held_value", "source_only")
        }
        row["donor_follow"] = tried(verdict.donor_follow, frame)
        row["headroom_of_final"] = verdict.headroom(frame)  # source and target alone on the test problems
        kept = Path("preserved_data") / name / "headroom.jsonl"  # on validation; no preserved run has kept it
        row["headroom"] = verdict.headroom(load_eval(kept)) if kept.is_file() else None
        runs[name] = row
    groups = {}
    for name in [f"headline_{p}{s}" for p in ("resampler", "dit") for s in ("", "_fresh4", "_fresh5")]:
        some = [frames[f"{name}_seed{seed}"] for seed in (1, 2, 3)]
        groups[name] = judged_fields(verdict.judge([f for f, _ in some], seeds=[s for _, s in some]))
    return {"runs": runs, "groups": groups}


def judged_fields(judged) -> dict:
    comparisons = []
    for c in judged.comparisons:
        d = dataclasses.asdict(c.difference)
        comparisons.append({"seed": c.seed, "control": c.control, "subset": c.subset, "adjusted_p": c.adjusted_p,
                            "holds": c.holds} | {k: v for k, v in d.items() if k not in ("a", "b")})  # fmt: skip
    rivals = {name: [{k: getattr(d, k) for k in ("difference", "low", "high")} for d in by_seed]
              for name, by_seed in judged.rivals.items()}  # fmt: skip
    return {"outcome": judged.outcome, "passes": judged.passes, "complete": judged.complete, "not_run": judged.not_run,
            "not_applicable": judged.not_applicable, "comparisons": comparisons, "rivals": rivals,
            "failed": [[c.seed, c.control, c.subset] for c in judged.failed], "exact": judged.exact,
            "seeds": judged.seeds, "text": judged.text}  # fmt: skip


def tried(function, *arguments, **options):
    """The result, or the refusal in words."""
    try:
        return function(*arguments, **options)
    except ValueError as error:
        return {"refused": str(error)}


def recovery_of(frame, subset: str):
    from bridgekit import verdict

    return tried(verdict.recovery, frame, subset=subset)


# ---- 2. studies -----------------------------------------------------------------------------------------------------


def make_studies() -> dict:
    """The tables of every kept study, each of its runs, and the tables of the paper notebook."""
    from bridgekit import costs, headline, variants
    from bridgekit.runs import find_eval, load_eval_once
    from bridgekit.studies import open_study
    from bridgekit.sweep import is_study

    studies = {}
    for path in sorted(Path("preserved_data/studies").glob("*.tar.xz")):
        name = path.name.split(".")[0]
        folder = open_study(name)
        entry = {
            "runs": {f.name: run_points(load_eval_once(find_eval(f))) for f in sorted(folder.iterdir()) if f.is_dir()}
        }
        if is_study(Path("parameters") / f"{name}.yaml"):
            study, planned, runs, folder = headline.open_runs(name)
            compared = variants.compare_variants(study, runs)
            spent = variants.read_costs(study, planned, folder)
            entry |= {
                "found": {variant: list(seeds) for variant, seeds in runs.items()},
                "compare_variants": table(compared),
                "tabulate_variants": table(variants.tabulate_variants(study, runs, compared, spent)),
                "read_costs": spent,
                "read_curves": table(variants.read_curves(study, planned, folder)),
                "swept_axis": variants.swept_axis(planned),
            }
            if entry["swept_axis"]:
                entry["read_axis"] = table(variants.read_axis(study, planned, runs, folder))
        studies[name] = entry
        print(name, len(entry["runs"]), "runs", flush=True)
    paper = {
        "read_compositions": headline.read_compositions(),
        "read_composition_recovery": headline.read_composition_recovery(),
        "read_composition_recovery_values": headline.read_composition_recovery("source_only_held_value"),
        "read_digits": headline.read_digits(),
        "read_values": headline.read_values(),
        "read_series_faults": headline.read_series(headline.FAULTS),
        "read_series_differences": headline.read_series(headline.DIFFERENCES),
        "read_series_differences_values": headline.read_series(headline.DIFFERENCES, "source_only_held_value"),
        "read_recovery": headline.read_recovery(),
        "read_recovery_values": headline.read_recovery("source_only_held_value"),
        "read_recovery_both": headline.read_recovery("source_only"),
        "read_courses": headline.read_courses(),
        "read_verdicts": headline.read_verdicts(),
        "read_rivals": headline.read_rivals(),
    }
    frames = list(headline.load_runs("headline_resampler").values())
    paper["count_written"] = costs.count_written(frames, "bridgekit/embedded_pair")
    passing = headline.passing_compositions(paper["read_compositions"])
    return {"studies": studies, "paper": {k: table(v) for k, v in paper.items()}, "passing_compositions": passing}


def run_points(frame) -> dict:
    """The outcome of the claim rule on one run, and the share right of each condition on each subset."""
    from bridgekit import verdict

    judged = verdict.judge([frame])
    points: dict = {}
    for row in verdict.conditions_table(frame).to_dict("records"):
        here = points.setdefault(row["subset"], {"n": row["n"], "n_units": row["n_units"]})
        here[row["condition"]] = row["accuracy"]
        if row["condition"] == "bridged":
            here |= {"low": row["low"], "high": row["high"], "invalid": row["invalid"]}
    return {"outcome": judged.outcome, "not_run": judged.not_run, "points": points,
            "target_difference": [judged.comparisons[0].difference.difference, judged.comparisons[0].difference.low,
                                  judged.comparisons[0].difference.high]}  # fmt: skip


# ---- 3. figures -----------------------------------------------------------------------------------------------------


def make_figures() -> dict:
    """What every figure was drawn from: its CSV; a large one (attention maps) as its shape and a hash."""
    found = {}
    for path in sorted(Path("figures").rglob("*.csv")):
        with path.open(newline="") as stream:
            head, *rows = csv.reader(stream)
        cells = [[number(cell) for cell in row] for row in rows]
        name = path.relative_to("figures").with_suffix("").as_posix()
        if len(rows) * len(head) > BIG and "attention_" in name:
            rounded = [[round(c, 5) if isinstance(c, float) else c for c in row] for row in cells]
            found[name] = {"columns": head, "shape": [len(rows), len(head)],
                           "sha256_5_digits": sha(json.dumps(rounded, ensure_ascii=False))}  # fmt: skip
        else:
            found[name] = {"columns": head, "rows": cells}
    return found


def number(cell: str):
    if re.fullmatch(r"\[[-+.\de, ]+\]", cell):  # a list, such as the difference of each seed
        return json.loads(cell)
    try:
        value = float(cell)
    except ValueError:
        return cell
    if re.fullmatch(r"-?\d+", cell):
        return int(cell)
    return value if math.isfinite(value) else cell


# ---- 4. audit -------------------------------------------------------------------------------------------------------


def make_audit() -> dict:
    """What `bridgekit audit --format json` says, which holds neither times nor paths, with each value unrounded.

    Own claims have no names: each stands with what it measures, in the order of own_claims.yaml.
    """
    from bridgekit import audit, own_claims

    ran = audit.run_audit("preserved_data", ".")
    content = json.loads(audit.as_json(ran))
    content["claims"] = {
        v.claim["id"]: {"verdict": v.verdict, "found": v.found, "why": v.why, "opposite": v.opposite, "measured": v.measured}
        for v in ran.verdicts
    }  # fmt: skip
    content["own_claims"] = []
    for v in ran.own:
        own = {key: v.claim[key] for key in ("document", "value", "near", "measure") if key in v.claim}
        own["measure"] = json.dumps(own["measure"], sort_keys=True)
        recomputed = own_claims._measure_over_runs(v.claim["measure"], ran.records)
        content["own_claims"].append(own | {"verdict": v.verdict, "found": v.found, "recomputed": recomputed})
    return content


# ---- 5. plans -------------------------------------------------------------------------------------------------------


def make_plans() -> dict:
    """What every file of parameters/ runs: the configurations as differences from the default."""
    from bridgekit import headless, sweep
    from bridgekit.config import load_config, read_parameters, to_flat

    default = to_flat(load_config())
    plans = {"default": default, "files": {}}
    for path in sorted(Path("parameters").glob("*.yaml")):
        kind = kind_of(path)
        entry: dict = {"kind": kind}
        if kind == "phase1":
            # twice: as `bridgekit train -f` and sweeps read it, and as the notebook does, with its own cell below it
            entry["config"] = differences(load_config(path), default)
            values = headless.gather_parameters("notebooks/phase1.ipynb", path, {}, [])
            entry["notebook_config"] = differences(headless.resolve_config(values), default)
            if path.stem == "phase1":
                entry["whole"] = to_flat(load_config(path))
        elif kind == "study":
            planned = sweep.Sweep(path, Path("runs")).planned
            entry["runs"] = {name: differences(config, default) for name, (config, _) in planned.items()}
            entry |= plan_ablation(path, default)
        elif kind == "sweep":
            made = sweep.Sweep(path, Path("runs"))
            entry["runs"] = {name: differences(config, default) for name, (config, _) in made.planned.items()}
            entry["pair_of"] = {name: pair for name, (_, pair) in made.planned.items() if pair}
            entry["pairs"], entry["pair_options"] = made.pairs, made.pair_options
        elif kind == "swap":
            entry["arms"] = plan_swap(path, default)
        elif kind == "diagnostics":
            entry["given"] = read_parameters(path)
            entry["values"] = headless.gather_parameters("notebooks/diagnostics.ipynb", path, {}, [])
        plans["files"][path.stem] = entry
    plans["notebook_defaults"] = {p.stem: headless.read_defaults(p) for p in sorted(Path("notebooks").glob("*.ipynb"))}
    plans["notebook_defaults_plan"] = {
        "phase1": differences(headless.resolve_config(headless.gather_parameters("notebooks/phase1.ipynb", None, {}, [])), default),
        "swap": plan_swap(None, default),
        "ablation": plan_ablation(None, default),
    }  # fmt: skip
    return plans


def kind_of(path: Path) -> str:
    import yaml

    content = yaml.safe_load(path.read_text())
    if "variants" in content:
        return "study"
    if "runs" in content:
        return "sweep"
    return path.stem.split("_")[0]


def plan_swap(path: Path | None, default: dict) -> dict:
    """The four arms, by the lines of notebooks/swap.ipynb."""
    from bridgekit import headless, swap
    from bridgekit.config import load_config

    v = headless.gather_parameters("notebooks/swap.ipynb", path, {}, [])
    own = [f"run.runs_dir={v['runs_dir']}", f"run.cache_dir={v['runs_dir']}/.cache"]
    keys = ("name", "seed", "producer", "injector", "n_soft_tokens", "steps", "batch_size", "lr", "source_only_share",
            "eval_samples")  # fmt: skip
    config = load_config(overrides=[*v["overrides"], *own], **{key: v[key] for key in keys})
    return {name: differences(c, default) for name, c in swap.plan_swap(config, v["prompt_teacher"]).items()}


def plan_ablation(path: Path | None, default: dict) -> dict:
    """What notebooks/ablation.ipynb would train with the file, by its lines: only what the plan's rule asks for."""
    from bridgekit import decision, headless
    from bridgekit.study import Study, plan_study

    v = headless.gather_parameters("notebooks/ablation.ipynb", path, {}, [])
    decided = decision.decide_run(v["phase1_run"]) if v["phase1_run"] else None
    keys = ("name", "base", "overrides", "variants", "replicates", "reference", "seeds")
    study = Study(**{key: v[key] for key in keys})
    due = decision.due_variants(list(v["variants"]), decided)
    planned = plan_study(study, v["runs_dir"], keep=due)
    result = {"notebook_due": due, "notebook_runs": list(planned), "decision": decided and decided.branch}
    if path is None:
        result["runs"] = {
            name: differences(config, default) for name, config in plan_study(study, v["runs_dir"]).items()
        }
    return result


# ---- 6. trainings ---------------------------------------------------------------------------------------------------

TINY = {
    "seed": 1, "source_device": "cpu", "target_device": "cpu", "dtype": "float32", "bridge_dim": 32, "heads": 2, "depth": 1,
    "n_soft_tokens": 4, "n_train": 64, "n_val": 16, "n_test": 16, "val_samples": 16, "batch_size": 8, "steps": 10,
    "eval_every": 10, "warmup_steps": 2, "max_new_tokens": 64, "eval_batch_size": 16, "controls": [], "dropout": 0.0,
    "state_dropout": 0.0, "conditions": ["source", "target", "bridged"],
}  # fmt: skip
CONTEXT = {"variant": "context", "n_facts": 4}
DECODE = {"decode_weight": 0.5, "decode_every": 2, "decode_batch": 4, "decode_samples": 4, "decode_tokens": 40}
SEEDS = {"producer": "dit", "dit_condition": "mean", "dit_tokens": "teacher", "dit_prediction": "velocity",
         "train_prompt_mode": "soft_only", "source_projection": True, "kl_weight": 0.1, "kl_tokens": 20,
         "prompt_weight": 0.001, "info_nce_weight": 0.05, "flow_weight": 0.1, "format_weight": 0.1}  # fmt: skip


def training_cases() -> dict[str, dict]:
    """{name: what is not TINY's}."""
    cases = {}
    for direction in ("forward", "swapped"):
        for producer in ("resampler", "dit", "constant"):
            for injector in ("prefix", "residual", "prefix+residual", "kv"):
                own = {"n_soft_tokens": -1, "prompt_mode": "soft_plus_text"} if injector == "kv" else {}
                cases[f"{producer} {injector} {direction}"] = {
                    "producer": producer,
                    "injector": injector,
                    "direction": direction,
                } | own
    dit = {"producer": "dit"}
    return cases | {
        "context prompt": {**CONTEXT, "source_view": "prompt"},
        "context facts": {**CONTEXT, "source_view": "facts"},
        "context facts vary local": {**CONTEXT, "source_view": "facts", "vary_facts": True, "queries": "local"},
        "context facts dit": {**CONTEXT, **dit, "source_view": "facts"},
        "context kv": {**CONTEXT, "injector": "kv", "n_soft_tokens": -1},
        "source_view solution": {"source_view": "solution"},
        "queries local": {"queries": "local"},
        "queries local dit": {**dit, "queries": "local"},
        "kl": {"kl_weight": 0.5},
        "kl tokens": {"kl_weight": 0.5, "kl_tokens": 8},
        "prompt": {"prompt_weight": 0.5},
        "info_nce": {"info_nce_weight": 0.5},
        "format": {"format_weight": 0.5},
        "flow dit": {**dit, "flow_weight": 0.5},
        "decode own_steps": {**DECODE, "decode_estimator": "own_steps"},
        "decode policy_gradient": {**DECODE, "decode_estimator": "policy_gradient"},
        "all losses dit": {**dit, "kl_weight": 0.1, "prompt_weight": 0.1, "info_nce_weight": 0.05, "format_weight": 0.1,
                           "flow_weight": 0.1},
        "answer_tokens": {"answer_tokens": 8},
        "dit_condition mean": {**dit, "dit_condition": "mean"},
        "dit_condition attention": {**dit, "dit_condition": "attention"},
        "dit_prediction velocity": {**dit, "dit_prediction": "velocity"},
        "dit_prediction velocity flow": {**dit, "dit_prediction": "velocity", "flow_weight": 0.5},
        "dit_tokens teacher": {**dit, "dit_tokens": "teacher"},
        "dit_steps": {**dit, "dit_steps_train": 2, "dit_steps_eval": 3},
        "teacher prompt": {"teacher": "prompt", "prompt_weight": 1.0, "nll_weight": 0.0, "n_soft_tokens": -1},
        "teacher prompt literal kept": {"teacher": "prompt", "prompt_weight": 1.0, "nll_weight": 0.0,
                                        "n_soft_tokens": -1, "prompt_mode": "soft_plus_text"},
        "seeds design": SEEDS | {"n_soft_tokens": -1},
        "source_projection": {"source_projection": True},
        "source_layers": {"source_layers": "0,2,5"},
        "inject_layers": {"injector": "residual", "inject_layers": "1,3"},
        "rms_match off": {"rms_match": False},
        "n_soft_tokens -1": {"n_soft_tokens": -1},
        "n_soft_tokens -1 dit": {**dit, "n_soft_tokens": -1},
        "soft_position question": {"soft_position": "question"},
        "soft_position end": {"soft_position": "end"},
        "prompt_mode soft_only": {"prompt_mode": "soft_only"},
        "train_prompt_mode soft_only": {"train_prompt_mode": "soft_only"},
        "cache off": {"cache_states_gb": 1e-9},
        "data choices": {"data_seed": 2, "seed": 3, "source_only_share": 0.8, "train_units_share": 0.15},
        "train_values_share": {"train_values_share": 0.5},
        "depth 2 heads 4": {"depth": 2, "heads": 4},
        "controls": {"controls": ["constant", "constant_natural", "self_bridge"], "source_only_share": 0.8},
        "controls swapped": {"controls": ["constant", "constant_natural", "self_bridge"], "direction": "swapped"},
        "controls kv": {"controls": ["constant", "self_bridge"], "injector": "kv", "n_soft_tokens": -1},
        "controls dit losses": {**dit, "controls": ["constant", "self_bridge"], "flow_weight": 0.1, "prompt_weight": 0.1,
                                "info_nce_weight": 0.05},
    }  # fmt: skip


def make_trainings() -> dict:
    """Ten steps of every composition, loss and setting on the CPU; and one tiny run with all conditions, end to end."""
    import torch

    runs, initial, shapes, refused = {}, {}, {}, {}
    for name, changes in training_cases().items():
        result = train_tiny(changes)
        if "refused" in result:
            refused[name] = {"overrides": changes, "refused": result["refused"]}
        else:
            initial[name] = result.pop("initial")
            shapes[name] = result.pop("shapes")
            runs[name] = {"overrides": changes} | result
        print("training", name, "refused" if name in refused else "", flush=True)
    machine = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability(), "threads": 1}
    return {"machine": machine, "base": TINY, "trainings": runs, "refused": refused, "initial": initial, "parameters": shapes,
            "all_conditions": run_all_conditions()["evaluation"]}  # fmt: skip


def train_tiny(changes: dict) -> dict:
    """One case, through the trainer's own functions; weights are hashed after building and after the last step."""
    import torch
    from bridgekit import train, trainer
    from bridgekit.config import ConfigError, build_config
    from bridgekit.evaluator import Evaluator
    from bridgekit.runs import create_run, read_jsonl

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="golden.") as scratch:
        try:
            config = build_config(TINY | changes | {"runs_dir": scratch, "cache_dir": f"{scratch}/cache"})
            job = train.open_job(create_run(config, Path(scratch) / "run"))
        except ConfigError as error:
            return {"refused": str(error)}
        with contextlib.redirect_stdout(io.StringIO()):
            evaluator = Evaluator(config, job.pair, job.accelerator, job.folder)
            result = {"initial": {}, "last": {}, "shapes": {}, "metrics": {}}
            bridges = {}
            for name in ("bridged", *config.train.controls):
                with watched(trainer, name, result):
                    bridges[name] = trainer.train_bridge(job, name, evaluator)
                file = job.folder / ("metrics.jsonl" if name == "bridged" else f"metrics_{name}.jsonl")
                result["metrics"][name] = [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(file)]
            conditions = tuple(dict.fromkeys([*config.eval.conditions, *config.train.controls]))
            rows = evaluator.evaluate(job.test, bridges, "final", conditions, want_attention=True, donors=job.donors)
    for name in bridges:
        result.setdefault("answers", {})[name] = {r["id"]: r[f"{name}_extracted"] for r in rows}
        result.setdefault("texts_sha256", {})[name] = sha(json.dumps([r[f"{name}_full"] for r in rows]))
        result.setdefault("logprobs", {})[name] = [r[f"{name}_logprob"] for r in rows]
    return result


@contextlib.contextmanager
def watched(trainer, name: str, result: dict):
    """Hash the weights right after they are built, and after the last step: before the best ones are loaded."""
    build, load = trainer.build_bridge, trainer.load_bridge

    def build_bridge(*arguments):
        bridge = build(*arguments)
        result["initial"][name] = {"sha256": hash_weights(bridge), "sums": sum_weights(bridge)}
        result["shapes"][name] = [
            f"{key} {'x'.join(map(str, value.shape))}" for key, value in bridge.state_dict().items()
        ]
        return bridge

    def load_bridge(bridge, *arguments):
        result["last"][name] = {"sha256": hash_weights(bridge), "sums": sum_weights(bridge)}
        return load(bridge, *arguments)

    trainer.build_bridge, trainer.load_bridge = build_bridge, load_bridge
    try:
        yield
    finally:
        trainer.build_bridge, trainer.load_bridge = build, load


def hash_weights(bridge) -> str:
    """sha256 of all values in the order of the state dict; which names they have is stored apart."""
    digest = hashlib.sha256()
    for value in bridge.state_dict().values():
        digest.update(value.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def sum_weights(bridge) -> list[float]:
    """The sum of all values and of their sizes: what can be compared, with a tolerance, on any CPU."""
    values = [value.detach().double() for value in bridge.state_dict().values()]
    return [sum(v.sum().item() for v in values), sum(v.abs().sum().item() for v in values)]


@lru_cache(maxsize=1)
def run_all_conditions() -> dict:
    """One tiny run with every condition and control, in child processes as `bridgekit train` starts them."""
    from bridgekit import launch
    from bridgekit.config import CONDITIONS, CONTROLS, build_config
    from bridgekit.runs import create_run, read_jsonl

    runs_dir = Path("runs/golden").resolve()
    own = {"name": "golden", "runs_dir": str(runs_dir), "cache_dir": str(runs_dir / ".cache"), "noise_floor": True,
           "controls": list(CONTROLS), "conditions": list(CONDITIONS), "injector": "prefix+residual"}  # fmt: skip
    folder = create_run(build_config(TINY | own), runs_dir / "golden_seed1")
    with contextlib.redirect_stdout(io.StringIO()):
        launch.run_training(folder)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    reports = {path.name for path in runs_dir.iterdir() if path.is_file()}
    rows = list(read_jsonl(folder / "eval_samples_step_final.jsonl"))
    metrics = list(read_jsonl(folder / "metrics.jsonl"))
    contents = {
        name: json.loads((folder / name).read_text())
        for name in ("verdict.json", "status.json", "timing.json", "provenance.json")
    }
    kept = ("_extracted", "_logprob")
    evaluation = {
        "overrides": {k: v for k, v in own.items() if k not in ("runs_dir", "cache_dir")},
        "rows": [{k: v for k, v in r.items() if not k.endswith("_full") and k not in ("question", "gold_full_text")} for r in rows],
        "texts_sha256": {k: sha(json.dumps([r[k] for r in rows])) for k in rows[0] if k.endswith("_full")},
        "metrics": [{k: v for k, v in r.items() if k != "seconds"} for r in metrics],
        "headroom": [{k: v for k, v in r.items() if k == "id" or k.endswith(kept)} for r in read_jsonl(folder / "headroom.jsonl")],
        "verdict": contents["verdict.json"],
        "summary": (folder / "summary.log").read_text(),
    }  # fmt: skip
    keys = {name: sorted(content) for name, content in contents.items()}
    keys["eval_samples_step_final.jsonl"] = list(rows[0])
    keys["headroom.jsonl"] = list(next(read_jsonl(folder / "headroom.jsonl")))
    keys["metrics.jsonl"] = sorted({k for row in metrics for k in row})
    return {"evaluation": evaluation, "files": sorted(files), "reports": sorted(reports), "keys": keys}


# ---- 7. units -------------------------------------------------------------------------------------------------------

GSM8K = [  # (question, answer): invented here; the first seven and the last train, the last five test: one is in both
    ("Ada plants 4 rows of 6 bulbs. How many bulbs?", "4 rows of 6 are 4*6=<<4*6=24>>24 bulbs.\n#### 24"),
    ("Ben reads 12 pages a day for 5 days. How many pages?", "He reads 12*5=<<12*5=60>>60 pages.\n#### 60"),
    ("A tram has 40 seats and 13 are free. How many are taken?", "Taken are 40-13=<<40-13=27>>27.\n#### 27"),
    ("Cora buys 3 ropes at $7 and pays with $50. How many dollars come back?", "3*7=<<3*7=21>>21\n50-21=<<50-21=29>>29\n#### 29"),
    ("Half of 90 goats are sold. How many stay?", "90/2=<<90/2=45>>45 stay.\n#### 45"),
    ("A mill grinds 1,200 kg in the first week and twice that in the second. How many kg?", "1200*2=<<1200*2=2400>>2400\n1200+2400=<<1200+2400=3600>>3600\n#### 3,600"),
    ("Dan has 9 marbles and loses 4. How many are left?", "9-4=<<9-4=5>>5\n#### 5"),
    ("Eva cuts 8 loaves into 10 slices. How many slices?", "8*10=<<8*10=80>>80\n#### 80"),
    ("A well is 24 m deep, a rope 6 m short of it. How long is the rope?", "24-6=<<24-6=18>>18\n#### 18"),
    ("Finn earns $15 an hour for 6 hours. How many dollars?", "15*6=<<15*6=90>>90\n#### 90"),
    ("Gia shares 42 plums among 6. How many each?", "42/6=<<42/6=7>>7\n#### 7"),
    ("Dan has 9 marbles and loses 5. How many are left?", "9-5=<<9-5=4>>4\n#### 4"),
]  # fmt: skip


def make_units() -> dict:
    """Problems about invented units, real questions, and what is drawn from seeds."""
    import torch
    from bridgekit.batches import indices_at, noise_seeds
    from bridgekit.bridges.base import hashed_normal, hashed_uniform
    from bridgekit.evaluator import sampler_seed
    from bridgekit.tasks import units

    examples, lexicons = {}, {}
    for seed in range(1, 7):
        lexicon = units.make_lexicon(seed)
        for direction, own in (("forward", lexicon), ("swapped", units.swap_roles(lexicon))):
            name = f"lexicon {seed} {direction}"
            lexicons[name] = {"fingerprint": units.fingerprint_lexicon(own), "n": len(own), "first": own[:2]}
            for split in ("train", "val", "test"):
                for data_seed in (1, 2):
                    examples[f"{name} {split} data_seed {data_seed}"] = digest(
                        units.make_examples(own, split, 48, data_seed)
                    )
            for share in (-1.0, 0.8):
                more = [("", {})]
                more += [(f" units {s}", {"train_units_share": s}) for s in (0.15, 0.5)]
                more += [(" values 0.5", {"train_values_share": 0.5}),
                         (" units 0.5 values 0.5", {"train_units_share": 0.5, "train_values_share": 0.5})]  # fmt: skip
                for label, options in more:
                    examples[f"{name} train share {share}{label}"] = digest(
                        units.make_examples(own, "train", 300, 1, share=share, **options), full=False
                    )
            for units_share, values_share in ((1.0, 1.0), (0.15, 1.0), (0.5, 0.5)):
                made = units.make_seen_examples(own, 40, 1, units_share, values_share)
                examples[f"{name} seen units {units_share} values {values_share}"] = digest(made, full=False)
    for seed in (1, 2):
        lexicon = units.make_lexicon(seed)
        for split in ("train", "val", "test"):
            for n_facts in (1, 4, 8):
                for vary in (False, True):
                    made = units.make_examples(
                        lexicon, split, 60, 1, variant="context", n_facts=n_facts, vary_facts=vary
                    )
                    examples[f"lexicon {seed} context {n_facts} {split}{' vary' if vary else ''}"] = digest(made)
    seeds = torch.tensor([0, 1, 7, 2**31 - 1, 123456789])
    return {
        "lexicons": lexicons,
        "examples": examples,
        "load_examples": loaded_examples(),
        "gsm8k": gsm8k_examples(),
        "prompts": prompts(),
        "indices_at": {str(a): indices_at(*a) for a in ((1, 0, 8, 64), (1, 7, 8, 64), (1, 8, 8, 64), (2, 3, 24, 50), (5, 100, 16, 20000))},
        "noise_seeds": {str(a): noise_seeds(*a) for a in ((1, 0, 8), (1, 1, 8), (2, 0, 4), (3, 450, 5))},
        "sampler_seed": {f"{s} {i}": sampler_seed(s, i) for s in (0, 1, 2, 101) for i in ("units-test-00000", "units-seen-00003", "gsm8k-test-00001", "")},
        "hashed_uniform": {str(n): hashed_uniform(seeds, n) for n in (1, 6)},
        "hashed_normal": {str(shape): hashed_normal(seeds, shape) for shape in ((4,), (2, 3), (1, 2, 2))},
    }  # fmt: skip


def digest(made: list, full: bool = True) -> dict:
    rows = [dataclasses.asdict(example) for example in made]
    found = {"n": len(rows), "sha256": sha(json.dumps(rows, ensure_ascii=False, sort_keys=True))}
    return found | ({"first": rows[:2]} if full else {"first_id": rows[0]["id"], "first_question": rows[0]["question"]})


def loaded_examples() -> dict:
    """The same through `load_examples`, as runs ask for them."""
    from bridgekit.config import load_config
    from bridgekit.tasks import load_examples

    found = {}
    for name in ("phase1", "phase1_gpu", "phase1_seeds", "phase1_smoke"):
        for direction in ("forward", "swapped"):
            config = load_config(f"parameters/{name}.yaml", direction=direction)
            for split in ("train", "val", "test"):
                found[f"{name} {direction} {split}"] = digest(load_examples(config, 2, split), full=False)
    config = load_config("parameters/phase1_gpu.yaml", ["variant=context", "n_facts=8", "vary_facts=true"])
    found |= {f"context 8 vary {s}": digest(load_examples(config, 2, s), full=False) for s in ("train", "val", "test")}
    return found


def gsm8k_examples() -> dict:
    """Real questions' reader on a folder of our own: 8 training rows, 5 test rows, one of them the same."""
    from bridgekit.config import Task
    from bridgekit.tasks import gsm8k

    found = {"rows": GSM8K}
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("train", [*GSM8K[:7], GSM8K[11]]), ("test", GSM8K[7:])):
            lines = [json.dumps({"question": q, "answer": a}) for q, a in rows]
            (Path(folder) / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        for n_shots in (0, 2):
            for data_seed in (1, 2):
                task = Task(
                    task="gsm8k", data=folder, n_shots=n_shots, data_seed=data_seed, n_train=3, n_val=2, n_test=5
                )
                for split in ("train", "val", "test"):
                    found[f"shots {n_shots} data_seed {data_seed} {split}"] = digest(gsm8k.make_examples(task, split))
    return found


def prompts() -> dict:
    """The text that each model reads, for a problem with facts in weights and one with facts in context."""
    from bridgekit.tasks import base, units

    lexicon = units.make_lexicon(1)
    found = {}
    for variant in ("weights", "context"):
        example = units.make_examples(lexicon, "test", 12, 1, variant=variant)[0]
        found[variant] = {
            "literal": base.literal_prompt(example).text,
            "source": base.source_prompt(example).text,
            "told": base.told_prompt(example).text,
            "relay": base.relay_prompt(example, "<<1+1=2>>2 pins.\n#### 2").text,
        }
    return found


# ---- 8. capabilities ------------------------------------------------------------------------------------------------


def make_capabilities() -> list[dict]:
    """Everything a user can ask for by name; `now` is filled in after the restructuring."""
    from bridgekit import config as configuration
    from bridgekit import evaluator, figures, limits, losses, verdict
    from bridgekit.runs import find_eval, read_jsonl

    entries: list[dict] = []

    def add(what: str, name: str, detail=None) -> None:
        entries.append({"what": what, "name": name, "now": ""} | ({} if detail is None else {"detail": detail}))

    for verb, options in list_verbs().items():
        add("verb", verb)
        for option, detail in options.items():
            add("option", f"{verb} {option}", detail)
    for line in Path("Makefile").read_text().splitlines():
        if found := re.match(r"([a-z0-9]+):.*?## (.+)", line):
            add("make target", found[1], found[2])
        elif found := re.match(r"([A-Z]+)\s*\?=\s*(.*)", line):
            add("make variable", found[1], found[2])
    default = configuration.to_flat(configuration.load_config())
    for key, field in configuration.KEYS.items():
        kind = getattr(field.type, "__name__", "list") if not str(field.type).startswith("tuple") else "list"
        detail = {"type": kind, "default": field.default}
        detail |= {"resolved default": default[key]} if default[key] != field.default else {}
        detail |= {"choices": limits.CHOICES[key]} if key in limits.CHOICES else {}
        detail |= {"must be": "above 0"} if key in limits.POSITIVE else {}
        detail |= {"must be": "not negative"} if key in limits.NOT_NEGATIVE else {}
        add("configuration key", key, detail)
    for path in sorted(Path("notebooks").glob("*.ipynb")):
        list_notebook(path, add)
    for path in sorted(Path("figures").rglob("*")):
        if path.is_file():
            add("figure file", path.relative_to("figures").as_posix())
    for name in sorted({p.relative_to("figures").with_suffix("").as_posix() for p in Path("figures").rglob("*.csv")}):
        add("figure", name)
    preserved = Path("preserved_data/headline_resampler_seed1")
    row = next(read_jsonl(find_eval(preserved)))
    tiny = run_all_conditions()
    written = row_keys(evaluator)
    for key in dict.fromkeys([*written, *row, *tiny["keys"]["eval_samples_step_final.jsonl"]]):
        where = {
            "_row": key in written,
            "preserved": key in row,
            "tiny run": key in tiny["keys"]["eval_samples_step_final.jsonl"],
        }
        add("evaluation key", key, [name for name, there in where.items() if there])
    for file, keys in tiny["keys"].items():
        for key in keys if file != "eval_samples_step_final.jsonl" else ():
            add("key of a run file", f"{file} {key}")
    kept = {p.relative_to(preserved).as_posix() for p in preserved.rglob("*") if p.is_file()}
    for name in sorted({*tiny["files"], *kept}):
        add(
            "run folder file",
            name,
            [w for w, there in (("run", name in tiny["files"]), ("preserved", name in kept)) if there],
        )
    for name in tiny["reports"]:
        add("runs folder file", name)
    for what, names in (
        ("condition", limits.CONDITIONS), ("computed condition", limits.COMPUTED), ("group", limits.GROUPS),
        ("control", limits.CONTROLS), ("producer", limits.PRODUCERS), ("injector", limits.INJECTORS),
        ("subset", list(verdict.SUBSETS)), ("rival", verdict.RIVALS),
        ("loss", [k.split(".")[1].removesuffix("_weight") for k in configuration.KEYS if k.startswith("loss.") and k.endswith("_weight")]),
        ("rule", [f"{subset}: {', '.join(controls)}" for subset, controls in verdict.RULE.items()]),
    ):  # fmt: skip
        for name in names:
            detail = verdict.SUBSETS[name] if what == "subset" else None
            detail = {"label": figures.LABELS.get(name)} if what == "condition" else detail
            add(what, name, detail)
    for name in sorted(
        n for n, f in vars(losses).items() if callable(f) and getattr(f, "__module__", "") == losses.__name__
    ):
        add("loss function", name)
    for path in sorted(Path("preserved_data/studies").glob("*")):
        add("kept study", path.name)
    for path in sorted(Path("preserved_data").iterdir()):
        if path.is_dir() and path.name != "studies":
            for one in sorted(path.iterdir()) if path.name == "first_experiments" else [path]:
                add("kept run", one.relative_to("preserved_data").as_posix())
    for path in sorted(Path("parameters").glob("*.yaml")):
        add("parameters file", path.name, kind_of(path))
    list_measures(add)
    return entries


def list_verbs() -> dict[str, dict]:
    """{verb: {option: its default, choices and help}}; a verb that parses in its own module is caught there."""
    from bridgekit import cli

    verbs = cli.build_parser()._subparsers._group_actions[0].choices
    found = {verb: list_options(parser) for verb, parser in verbs.items() if verb not in cli.FORWARDED}
    modules = {verb: module for verb, (module, _) in cli.FORWARDED.items()} | {"(module) bridgekit.train": "train"}
    for verb, module in modules.items():
        found[verb] = list_options(caught_parser(f"bridgekit.{module}"))
    return found


def caught_parser(module: str) -> argparse.ArgumentParser:
    """The parser that a module's `main` builds."""

    class Caught(Exception):
        pass

    def catch(parser, *arguments, **options):
        raise Caught(parser)

    real = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = catch
    try:
        importlib.import_module(module).main([])
    except Caught as caught:
        return caught.args[0]
    finally:
        argparse.ArgumentParser.parse_args = real
    raise RuntimeError(f"{module}: parses no arguments")


def list_options(parser: argparse.ArgumentParser) -> dict:
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found[name] = {"subcommand": True}
                found |= {f"{name} {option}": detail for option, detail in list_options(sub).items()}
            continue
        name = " ".join(action.option_strings) or str(action.metavar or action.dest)
        detail = {"default": None if action.default is argparse.SUPPRESS else action.default, "nargs": action.nargs}
        detail |= {"choices": list(action.choices)} if action.choices else {}
        detail |= {"help": action.help} if action.help else {}
        found[name] = {k: v for k, v in detail.items() if v is not None}
    return found


def list_notebook(path: Path, add) -> None:
    """Its parameters, the figures it saves, its headings, and what of the package it calls."""
    from bridgekit.headless import read_defaults

    for name, value in read_defaults(path).items():
        add("notebook parameter", f"{path.stem} {name}", {"type": type(value).__name__, "default": value})
    cells = json.loads(path.read_text())["cells"]
    for cell in cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
                add("notebook section", f"{path.stem}: {heading}")
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "save_figure":
                place = ast.unparse(node.args[1])
                add("notebook figure", f"{path.stem}: {place}")
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith(("plot_", "write_tables")):
                add("notebook call", f"{path.stem}: {ast.unparse(node.func)}")


def row_keys(evaluator) -> list[str]:
    """The keys that `Evaluator._row` writes, from its source; `<condition>` stands for any."""
    import inspect

    source = inspect.getsource(evaluator.Evaluator._row)
    return [
        *re.findall(r'"(\w+)": ', source),
        *(f"<condition>_{k}" for k in re.findall(r'f"\{condition\}_(\w+)"', source)),
    ]


def list_measures(add) -> None:
    """What claims are recomputed with; the claims themselves stand in audit.json."""
    from bridgekit.measures import MEASURES
    from bridgekit.own_claims import OWN_MEASURES

    for name in sorted(OWN_MEASURES):
        add("measure", name, None if name in MEASURES and OWN_MEASURES[name] is MEASURES[name] else "of own claims")


# ---- all ------------------------------------------------------------------------------------------------------------

FILES = {
    "plans": make_plans, "units": make_units, "judge": make_judge, "figures": make_figures, "audit": make_audit,
    "studies": make_studies, "capabilities": make_capabilities, "trainings": make_trainings,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", metavar="FILE", help=f"of {', '.join(FILES)} (default: all)")
    parser.add_argument("--old", type=Path, default=Path.cwd(), help="a checkout of the old commit (default: here)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    old, out = args.old.resolve(), args.out.resolve()
    sys.path.insert(0, str(old))
    os.environ["PYTHONPATH"] = str(old)  # of children
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="goldens.") as scratch:
        for path in old.iterdir():
            if path.name not in (".git", "runs", "data", ".venv"):
                (Path(scratch) / path.name).symlink_to(path)
        os.chdir(scratch)
        import bridgekit

        if Path(bridgekit.__file__).resolve().parent != old / "bridgekit":
            sys.exit(f"error: bridgekit is imported from {bridgekit.__file__}, not from {old}")
        for name in args.files or FILES:
            write(out, "figures.json" if name == "figures" else f"{name}.json", FILES[name]())
        os.chdir(out)


if __name__ == "__main__":
    main()
