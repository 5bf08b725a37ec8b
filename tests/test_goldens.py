"""What the code computed before it was put into folders, and must compute still.

tests/goldens/README.md says how it was made.

python -m pytest tests/test_goldens.py                # a part of each, for `make test`
python -m pytest tests/test_goldens.py -m golden      # all of them; some minutes
"""

import dataclasses
import gzip
import hashlib
import json
import math
from functools import lru_cache
from pathlib import Path

import pytest

from bridgekit.config import build_config, load_config, to_flat

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
NEW_FIELDS = ("fact_pairs", "numbers", "value_at")  # of an example, since the goldens were made


@lru_cache
def golden(name: str):
    return json.loads(gzip.decompress((GOLDENS / f"{name}.json.gz").read_bytes()))


def assert_close(new, old, where: str, tolerance: float = 1e-9) -> None:
    """Equal in all but the last digits of floats; a dict may have more keys than before."""
    if isinstance(old, dict):
        for key in old:
            assert_close(new[key], old[key], f"{where}.{key}", tolerance)
    elif isinstance(old, list):
        assert len(new) == len(old), f"{where}: {len(new)} instead of {len(old)}"
        for i, pair in enumerate(zip(new, old, strict=True)):
            assert_close(*pair, f"{where}[{i}]", tolerance)
    elif isinstance(old, float):
        assert math.isclose(new, old, rel_tol=tolerance, abs_tol=tolerance), f"{where}: {new} instead of {old}"
    elif old is None:
        assert new is None or new != new, f"{where}: {new} instead of nothing"
    else:
        assert new == old, f"{where}: {new!r} instead of {old!r}"


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def digest(examples: list) -> str:
    rows = [{k: v for k, v in dataclasses.asdict(e).items() if k not in NEW_FIELDS} for e in examples]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("seed", range(1, 7))
def test_problems_about_units_are_those_that_were_drawn_before(seed):
    from bridgekit.tasks import units

    old = golden("units")
    for direction in ("forward", "swapped"):
        lexicon = units.make_lexicon(seed)
        lexicon = lexicon if direction == "forward" else units.swap_roles(lexicon)
        name = f"lexicon {seed} {direction}"
        assert units.fingerprint_lexicon(lexicon) == old["lexicons"][name]["fingerprint"]
        made = {f"{name} {s} data_seed 2": units.make_examples(lexicon, s, 48, 2) for s in ("train", "val", "test")}
        half = {"train_units_share": 0.5, "train_values_share": 0.5}
        made[f"{name} train share 0.8 units 0.5 values 0.5"] = units.make_examples(
            lexicon, "train", 300, 1, share=0.8, **half
        )
        made[f"{name} seen units 0.5 values 0.5"] = units.make_seen_examples(lexicon, 40, 1, 0.5, 0.5)
        for label, examples in made.items():
            assert digest(examples) == old["examples"][label]["sha256"], label


@pytest.mark.parametrize("n_facts", [1, 4, 8])
def test_contexts_of_facts_are_those_that_were_drawn_before(n_facts):
    from bridgekit.tasks import units

    for vary in (False, True):
        label = f"lexicon 2 context {n_facts} train{' vary' if vary else ''}"
        options = {"variant": "context", "n_facts": n_facts, "vary_facts": vary}
        examples = units.make_examples(units.make_lexicon(2), "train", 60, 1, **options)
        assert digest(examples) == golden("units")["examples"][label]["sha256"], label


# ---- what is planned -------------------------------------------------------------------------------------------------

MOVED = {
    "ablation_capacity": "capacity", "ablation_compression": "compression", "ablation_flow": "flow",
    "ablation_generalisation": "generalisation", "ablation_losses": "losses", "ablation_gpu": "plan_abc",
    "compositions": "compositions", "headline": "headline", "repairs": "repairs", "values": "values",
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_a_study_plans_the_runs_that_it_planned_before(name, monkeypatch):
    from bridgekit.study import load_study, plan_study

    monkeypatch.chdir(ROOT)
    planned = plan_study(load_study(f"parameters/studies/{MOVED[name]}.yaml"), "runs")
    old = golden("plans")
    wanted = old["files"][name]["runs"]
    assert set(planned) == set(wanted)
    for folder, config in planned.items():
        flat = {k: list(v) if isinstance(v, tuple) else v for k, v in to_flat(config).items()}
        changed = {k: flat[k] for k, default in old["default"].items() if flat[k] != default}
        expected = wanted[folder].get("config", wanted[folder])
        assert_close(changed, {k: v for k, v in expected.items() if k in old["default"]}, folder)


# ---- what is concluded -----------------------------------------------------------------------------------------------


def fields_of(judged) -> dict:
    return {
        **{k: getattr(judged, k) for k in ("outcome", "passes", "complete", "not_run", "not_applicable", "seeds")},
        "comparisons": [
            {"seed": c.seed, "control": c.control, "subset": c.subset, "adjusted_p": c.adjusted_p, "holds": c.holds}
            | {k: v for k, v in dataclasses.asdict(c.difference).items() if k not in ("a", "b")}
            for c in judged.comparisons
        ],
        "rivals": {
            name: [{k: getattr(d, k) for k in ("difference", "low", "high")} for d in by_seed]
            for name, by_seed in judged.rivals.items()
        },
    }


def judge_again(folders: list[str]) -> dict:
    from bridgekit.results.verdict import judge

    return fields_of(judge([ROOT / "preserved_data" / folder for folder in folders]))


SOME_RUNS = ("phase1_cpu_seed1", "headline_dit_fresh4_seed2", "swap_cpu_swapped_seed1")


@pytest.mark.parametrize(
    "run", [pytest.param(r, marks=() if r in SOME_RUNS else pytest.mark.golden) for r in golden("judge")["runs"]]
)
def test_a_preserved_run_is_judged_as_before(run):
    old = {k: v for k, v in golden("judge")["runs"][run]["judge"].items() if k in fields_of_names()}
    assert_close(judge_again([run]), old, run)


@pytest.mark.golden
@pytest.mark.parametrize("group", golden("judge")["groups"])
def test_three_seeds_are_judged_as_before(group):
    old = {k: v for k, v in golden("judge")["groups"][group].items() if k in fields_of_names()}
    assert_close(judge_again([f"{group}_seed{seed}" for seed in old["seeds"]]), old, group)


def fields_of_names() -> tuple[str, ...]:
    return ("outcome", "passes", "complete", "not_run", "not_applicable", "seeds", "comparisons", "rivals")


def test_the_audit_says_of_every_claim_what_it_said_before():
    from bridgekit.audit.report import run_audit

    audit = run_audit(ROOT / "preserved_data")
    old = golden("audit")
    assert audit.counts == old["counts"]
    assert {v.claim["id"]: v.verdict for v in audit.verdicts} == {k: v["verdict"] for k, v in old["claims"].items()}


# ---- what is drawn in figures ----------------------------------------------------------------------------------------

LEXICON, VALUES = ("{label} {producer} {seed}", "{lexicon} {producer} {seed}"), "{label}, swapped {kind} {variant}"
DRAWN = [  # (figure, a row's name in the golden, its value there, the row's name now, its value now)
    *((f, "{variant} {subset}", "difference", None, "point") for f in ("ablation_losses", "ablation_flow")),
    *((f, "{variant} {subset}", c, None, c) for f in ("ablation_losses", "ablation_flow") for c in ("adjusted_p", "n")),
    *((f, "{variant} {seed}", "recovery", None, "point") for f in ("capacity", "compression", "generalisation")),
    *(("capacity", "{variant} {seed}", c, None, c) for c in ("bits", "bits_per_token", "in_message")),
    *((f, "{producer} x {label} {seed}", "recovery", "{variant} {seed}", "point")
      for f in ("compositions", "compositions_values")),
    ("attention_classes", "{token_class}", "share", None, "point"),
    ("costs", "{condition}", "accuracy", None, "point"),
    ("costs", "{condition}", "tokens", None, "tokens"),
    ("courses", "{variant} {seed} {step}", "accuracy", None, "point"),
    ("digits", "{label} whole value", "right", "{variant} {digits}", "point"),
    ("digits", "{label} tens digit", "tens_right", "{variant} {digits}", "point"),
    ("digits", "{label} ones digit", "ones_right", "{variant} {digits}", "point"),
    ("digits", "{label} whole value", "trained_value", "{variant} {digits}", "trained_value"),
    ("faults", "bridged {step_label} {seed}", "recovery", "{condition} {variant} {seed}", "point"),
    ("faults", "target {step_label} {seed}", "target", "{condition} {variant} {seed}", "point"),
    ("preserved_curves", "{run} {condition} {final} {step}", "accuracy", None, "accuracy"),
    *(("preserved_gains", "{run}", c, None, c) for c in ("gained", "lost", "p")),
    *(("preserved_headroom", "{label}", c, None, c) for c in ("source_only", "both", "target_only", "neither")),
    ("preserved_power", "{comparison} {n}", "effect", None, "effect"),
    *(("preserved_verdicts", "{document}", c, None, c) for c in ("agrees", "differs", "cannot be checked")),
    ("recovery", LEXICON[0], "recovery", LEXICON[1], "point"),
    ("recovery", LEXICON[0], "mix", LEXICON[1], "mix"),
    ("values", "{label} values {kind} all values in training", "all_values", VALUES, "point"),
    ("values", "{label} values {kind} half of them taken out", "half_values", VALUES, "point"),
    ("values", "{label} values {kind} difference", "difference", VALUES, "point"),
    # drawn of three seeds now, of one before: what no bridge has a part in is the same
    *((f, "{condition} {subset}", "accuracy", None, "accuracy") for f in ("conditions", "groups")),
]  # fmt: skip
NO_BRIDGE = ("source", "target", "target_suffix", "target_told", "relay_full", "relay_cut", "relay_answer", "union")
RENAMED = {" \N{MULTIPLICATION SIGN} ": " x ", "kv cache": "kv", "prefix + residual": "prefix+residual",
           "the seeds' design": "the first experiments' design", "false ": "", ".0": ""}  # fmt: skip


def values_by_name(rows: list[dict], name: str, column: str) -> dict[str, float]:
    found = {}
    for row in rows:
        key = name.format(**row).lower() + " "
        for old, new in RENAMED.items():
            key = key.replace(old, new)
        key = key.split(" true ")[0]  # the final evaluation had the last numbered step's number, and has none now
        found[key] = float(row[column])
    return found


@pytest.mark.parametrize(("figure", "old_name", "old_column", "name", "column"), DRAWN)
def test_a_figure_shows_the_numbers_that_it_showed_before(figure, old_name, old_column, name, column):
    import pandas as pd

    old = golden("figures")[figure]
    wanted = [dict(zip(old["columns"], row, strict=True)) for row in old["rows"]]
    rows = pd.read_csv(ROOT / "figures" / f"{figure}.csv").to_dict("records")
    if figure in ("conditions", "groups"):
        subsets = {row["subset"] for row in rows}
        wanted = [row for row in wanted if row["condition"] in NO_BRIDGE and row["subset"] in subsets]
    drawn = values_by_name(rows, name or old_name, column)
    for key, value in values_by_name(wanted, old_name, old_column).items():
        assert math.isclose(drawn[key], value, rel_tol=1e-8, abs_tol=1e-9), f"{key}: {drawn[key]} instead of {value}"


# ---- what is trained -------------------------------------------------------------------------------------------------


def hash_weights(bridge) -> str:
    values = (value.detach().contiguous().numpy().tobytes() for value in bridge.state_dict().values())
    return hashlib.sha256(b"".join(values)).hexdigest()


def same_machine() -> bool:
    import torch

    made_on = golden("trainings")["machine"]
    here = {"torch": torch.__version__, "capability": torch.backends.cpu.get_cpu_capability()}
    return all(here[k] == made_on[k] for k in here)


def make_experiment(changes: dict, folder: Path, pair, accelerator=None):
    from bridgekit.runs import create_run
    from bridgekit.train.experiment import Experiment

    settings = golden("trainings")["base"] | changes | {"runs_dir": str(folder), "cache_dir": str(folder / "cache")}
    config = build_config({k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})
    swapped = dataclasses.replace(pair, source=pair.target, target=pair.source)
    own = swapped if config.pair.direction == "swapped" else pair
    return Experiment(config, create_run(config) if accelerator else None, accelerator, own)


def test_every_bridge_starts_from_the_weights_it_started_from(pair, tmp_path):
    old = golden("trainings")
    for name, case in old["trainings"].items():
        experiment = make_experiment(case["overrides"], tmp_path, pair)
        for bridge_name, wanted in old["initial"][name].items():
            bridge = experiment.build_bridge(bridge_name)
            shapes = [f"{k} {'x'.join(map(str, v.shape))}" for k, v in bridge.state_dict().items()]
            assert shapes == old["parameters"][name][bridge_name], name
            if same_machine():
                assert hash_weights(bridge) == wanted["sha256"], name
            total = sum(v.double().abs().sum().item() for v in bridge.state_dict().values())
            assert math.isclose(total, wanted["sums"][1], rel_tol=1e-6), name


SOME_CASES = ("resampler prefix forward", "dit residual swapped", "all losses dit")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in SOME_CASES else pytest.mark.golden) for n in golden("trainings")["trainings"]],
)
def test_ten_steps_lead_where_they_led(name, pair, accelerator, tmp_path):
    """Losses in every case; the last weights bit for bit on the kind of machine that made the goldens."""
    from bridgekit.runs import load_jsonl
    from bridgekit.train import trainer

    old = golden("trainings")["trainings"][name]
    experiment = make_experiment(old["overrides"], tmp_path, pair, accelerator)
    for bridge_name in old["metrics"]:
        trainer.train_bridge(experiment, bridge_name)
        file = "metrics.jsonl" if bridge_name == "bridged" else f"metrics_{bridge_name}.jsonl"
        rows = [r for r in load_jsonl(experiment.folder / file) if "loss" in r]
        wanted = [r for r in old["metrics"][bridge_name] if "loss" in r]
        tolerance = 1e-9 if same_machine() else 1e-3
        for new, before in zip(rows, wanted, strict=True):
            assert_close({k: new[k] for k in before}, before, f"{name}, {bridge_name}", tolerance)


def test_a_configuration_of_an_earlier_run_is_read():
    for path in sorted((ROOT / "preserved_data").glob("*/config.yaml")):
        assert load_config(path).run.name
