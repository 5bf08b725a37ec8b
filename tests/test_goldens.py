"""What the code computed before it was put into folders, and must compute still.

tests/goldens/README.md says how it was made, tests/goldens/accepted.md what differs on purpose.

python -m pytest tests/test_goldens.py                # a part of each, for `make test`
python -m pytest tests/test_goldens.py -m golden      # all of them; some minutes
"""

import dataclasses
import gzip
import hashlib
import json
import math
from functools import lru_cache
from itertools import product
from pathlib import Path

import pytest
from conftest import NEW_STUDIES

from bridgekit.config import build_config, load_config, to_flat

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
NEW_FIELDS = ("fact_pairs", "numbers", "value_at")  # of an example, since the goldens were made


@lru_cache
def golden(name: str):
    return json.loads(gzip.decompress((GOLDENS / f"{name}.json.gz").read_bytes()))


def each(argument: str, names, quick: tuple[str, ...]):
    """A test for each name, of which `make test` runs the quick ones and `-m golden` the others."""
    marked = [name if name in quick else pytest.param(name, marks=pytest.mark.golden) for name in names]
    return pytest.mark.parametrize(argument, marked)


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


def test_what_is_drawn_from_seeds_is_what_was_drawn_before():
    import torch

    from bridgekit.model.message import hashed_normal, hashed_uniform
    from bridgekit.train.conditions import sampler_seed
    from bridgekit.train.data import indices_at, noise_seeds

    old, seeds = golden("units"), torch.tensor([0, 1, 7, 2**31 - 1, 123456789])
    for name, function in {"indices_at": indices_at, "noise_seeds": noise_seeds}.items():
        for arguments, numbers in old[name].items():
            assert function(*json.loads(arguments.replace("(", "[").replace(")", "]"))).tolist() == numbers, name
    for arguments, number in old["sampler_seed"].items():
        seed, _, example_id = arguments.partition(" ")
        assert sampler_seed(int(seed), example_id) == number
    for n, numbers in old["hashed_uniform"].items():
        assert_close(hashed_uniform(seeds, int(n)).tolist(), numbers, "hashed_uniform")
    for shape, numbers in old["hashed_normal"].items():
        shape = tuple(int(n) for n in shape.strip("()").split(",") if n)
        assert_close(hashed_normal(seeds, shape).tolist(), numbers, "hashed_normal", 1e-6)


@pytest.mark.parametrize("variant", ["weights", "context"])
def test_each_model_reads_the_text_that_it_read_before(variant):
    from bridgekit import tasks
    from bridgekit.tasks import units

    example = units.make_examples(units.make_lexicon(1), "test", 12, 1, variant=variant)[0]
    made = [tasks.literal_prompt(example), tasks.source_prompt(example), tasks.told_prompt(example)]
    made.append(tasks.relay_prompt(example, "<<1+1=2>>2 pins.\n#### 2"))
    old = golden("units")["prompts"][variant]
    assert [prompt.text for prompt in made] == [old[name] for name in ("literal", "source", "told", "relay")]


@each("name", ("phase1", "phase1_gpu", "phase1_seeds"), ("phase1",))
def test_a_run_asks_the_problems_that_it_asked_before(name):
    from bridgekit.tasks import load_examples

    for direction, split in product(("forward", "swapped"), ("train", "val", "test")):
        config = load_config(ROOT / f"parameters/{name}.yaml", direction=direction)
        old = golden("units")["load_examples"][f"{name} {direction} {split}"]
        assert digest(load_examples(config, 2, split)) == old["sha256"], f"{direction} {split}"


@pytest.mark.parametrize(("n_shots", "data_seed"), [*product((0, 2), (1, 2))])
def test_real_questions_are_split_as_before(n_shots, data_seed, tmp_path):
    from bridgekit.tasks import load_examples

    old = golden("units")["gsm8k"]
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in old["rows"]]
    (tmp_path / "train.jsonl").write_text("\n".join([*rows[:7], rows[11]]))  # one of them is in the test file too
    (tmp_path / "test.jsonl").write_text("\n".join(rows[7:]))
    options = {"n_shots": n_shots, "data_seed": data_seed, "n_train": 3, "n_val": 2, "n_test": 5, "val_samples": 2}
    options |= {"conditions": ["source", "target", "bridged"], "controls": []}
    config = load_config(task="gsm8k", data=str(tmp_path), **options)
    for split in ("train", "val", "test"):
        label = f"shots {n_shots} data_seed {data_seed} {split}"
        assert digest(load_examples(config, None, split)) == old[label]["sha256"], label


# ---- what is planned -------------------------------------------------------------------------------------------------

MOVED = {
    "ablation_capacity": "capacity", "ablation_compression": "compression", "ablation_flow": "flow",
    "ablation_generalisation": "generalisation", "ablation_losses": "losses", "ablation_gpu": "plan_abc",
    "compositions": "compositions", "headline": "headline", "repairs": "repairs", "values": "values",
}  # fmt: skip


def test_every_study_has_a_golden_or_a_test():
    files = {path.stem for path in (ROOT / "parameters/studies").glob("*.yaml")}
    assert files == {*MOVED.values(), *NEW_STUDIES}, "plan a new study in tests/test_study.py"


@pytest.mark.parametrize("name", MOVED)
def test_a_study_plans_the_runs_that_it_planned_before(name, monkeypatch):
    from bridgekit.study import load_study, plan_study

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("bridgekit.study.measure_prompts", lambda config: (1024, 40, 640))  # as measured, but at once
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


every_run = each("run", golden("judge")["runs"], SOME_RUNS)


@every_run
def test_a_preserved_run_is_judged_as_before(run):
    old = {k: v for k, v in golden("judge")["runs"][run]["judge"].items() if k in fields_of_names()}
    assert_close(judge_again([run]), old, run)


@every_run
def test_a_preserved_run_has_the_shares_recovery_and_headroom_that_it_had(run):
    from bridgekit.results import table, verdict
    from bridgekit.results.statistics import paired_ratio
    from bridgekit.runs import find_eval, load_eval

    frame, old = load_eval(find_eval(ROOT / "preserved_data" / run)), golden("judge")["runs"][run]
    check_table(verdict.conditions_table(frame), old["conditions_table"], ["condition", "subset"])
    for subset, found in old["recovery"].items():
        if "refused" not in found:
            recovered = paired_ratio(table.select(frame, subset), "bridged", "target_told")
            assert_close(dataclasses.asdict(recovered), found, f"{run} {subset}")
    room = {k: v for k, v in old["headroom_of_final"].items() if k != "text"}
    new = verdict.headroom(frame)._asdict()
    new = {k: dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for k, v in new.items()}
    assert_close(new, room, run)


@pytest.mark.golden
@pytest.mark.parametrize("group", golden("judge")["groups"])
def test_three_seeds_are_judged_as_before(group):
    old = {k: v for k, v in golden("judge")["groups"][group].items() if k in fields_of_names()}
    assert_close(judge_again([f"{group}_seed{seed}" for seed in old["seeds"]]), old, group)


def fields_of_names() -> tuple[str, ...]:
    return ("outcome", "passes", "complete", "not_run", "not_applicable", "seeds", "comparisons", "rivals")


@pytest.mark.golden  # the audit's whole text is held to preserved_data/README.md by tests/audit/test_audit.py
def test_the_audit_says_of_every_claim_what_it_said_before():
    from bridgekit.audit.report import run_audit

    audit = run_audit(ROOT / "preserved_data")
    old = golden("audit")
    assert audit.counts == old["counts"]
    assert {v.claim["id"]: v.verdict for v in audit.verdicts} == {k: v["verdict"] for k, v in old["claims"].items()}


STUDIES = golden("studies")["studies"]


def load_study_answers(name: str):
    from bridgekit.results.table import load_answers
    from bridgekit.runs import open_study

    answers = load_answers(open_study(name))
    return answers.assign(variant=answers["variant"].str.removeprefix(f"{name}_"))


@each("name", STUDIES, ("ablation_flow",))
def test_the_runs_of_a_study_have_the_shares_that_they_had(name):
    from bridgekit.results.table import SUBSETS, select, share

    answers, old, n_found = load_study_answers(name), STUDIES[name]["runs"], 0
    for subset in SUBSETS:
        part = select(answers, subset)
        for row in share(part, ["run", "condition"]).to_dict("records") if len(part) else ():
            points = old[row["run"]]["points"][subset]
            names = {row["condition"]: "point", "n": "n", "n_units": "n_units"}
            names |= {"low": "low", "high": "high"} if row["condition"] == "bridged" else {}
            assert_close({k: row[v] for k, v in names.items()}, {k: points[k] for k in names}, f"{row['run']} {subset}")
            n_found += 1
    about = {"n", "n_units", "low", "high", "invalid"}
    assert n_found == sum(len(points.keys() - about) for run in old.values() for points in run["points"].values())


@each("name", [name for name in STUDIES if "compare_variants" in STUDIES[name]], ("ablation_flow",))
def test_the_variants_of_a_study_differ_as_they_did(name, monkeypatch):
    from bridgekit.results import compare
    from bridgekit.study import load_study, plan_study
    from bridgekit.tasks import load_examples

    monkeypatch.chdir(ROOT)
    study, answers = load_study(f"parameters/studies/{MOVED[name]}.yaml"), load_study_answers(name)
    compared = compare.compare_variants(answers, study.reference, study.replicates)
    old = STUDIES[name]["compare_variants"]
    check_table(compared.rename(columns={"point": "difference"}), old, ["variant", "subset"])
    if "read_axis" in STUDIES[name]:
        configs = {folder.partition(f"{name}_")[2].rpartition("_seed")[0]: c for folder, c in plan_study(study).items()}
        tests = {variant: load_examples(c, None, "test") for variant, c in configs.items()}
        axis = compare.axis_table(answers, {v: compare.axis_settings(c) for v, c in configs.items()}, tests)
        check_table(axis.rename(columns={"point": "recovery"}), STUDIES[name]["read_axis"], ["variant", "seed"])


def check_table(frame, old: dict, names: list[str]) -> None:
    """Each row of the golden table, by its names, in all columns that it had."""
    rows = {tuple(row[n] for n in names): row for row in frame.to_dict("records")}
    assert len(rows) == len(frame) == len(old["rows"])
    for values in old["rows"]:
        row = dict(zip(old["columns"], values, strict=True))
        row = {column: value for column, value in row.items() if not column.startswith("in_message")}  # needs problems
        label = tuple(row[n] for n in names)
        assert_close(rows[label], row, str(label))


# ---- what is drawn in figures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", golden("figures"))
def test_a_figure_shows_the_numbers_that_it_showed_before(figure):
    import pandas as pd

    rows = pd.read_csv(ROOT / "figures" / f"{figure}.csv").to_dict("records")
    for old in golden("figures")[figure]:
        drawn = {old["row"].format(**row): row[old["column"]] for row in rows}
        assert_close({name: float(drawn[name]) for name in old["values"]}, old["values"], figure, 1e-8)


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


SOME_CASES = ("all losses dit", "seeds design", "decode own_steps", "decode policy_gradient", "teacher prompt")
SOME_CASES += ("soft_position end", "resampler residual swapped", "controls dit losses")


@each("name", golden("trainings")["trainings"], SOME_CASES)
def test_ten_steps_lead_where_they_led(name, pair, accelerator, tmp_path, monkeypatch):
    """Losses in every case; to the last digits on the kind of machine that made the goldens."""
    from bridgekit.runs import load_jsonl
    from bridgekit.train import trainer

    monkeypatch.setattr(trainer, "validate", lambda *arguments: {"mix": 0.0})  # no loss depends on it
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


def test_every_condition_answers_as_it_did(pair, accelerator, tmp_path, monkeypatch):
    """One tiny run with all of them; trained controls are left out, whose weights are chosen otherwise now."""
    from bridgekit.runs import find_eval, load_jsonl
    from bridgekit.train import trainer, worker
    from bridgekit.train.conditions import TABLE, Text

    old = golden("trainings")["all_conditions"]
    validated = {row["step"]: {"mix": row["eval"]["bridged"]} for row in old["metrics"] if "eval" in row}
    monkeypatch.setattr(trainer, "validate", lambda experiment, name, bridge, step, metrics: validated[step])
    experiment = make_experiment(old["overrides"] | {"controls": [], "noise_floor": False}, tmp_path, pair, accelerator)
    worker.run_training(experiment)
    rows, controls = list(load_jsonl(find_eval(experiment.folder))), ("constant", "self_bridge")
    if not same_machine():  # some answers flip from one kind of CPU to another, an untrained bridge's above all
        names = [f"{name}_extracted" for name, row in TABLE.items() if isinstance(row, Text)]
        equal = [new[n] == before[n] for new, before in zip(rows, old["rows"], strict=True) for n in names]
        assert sum(equal) >= 0.9 * len(equal)
        return
    for new, before in zip(rows, old["rows"], strict=True):
        kept = {key: value for key, value in before.items() if not key.startswith(controls)}
        assert_close(new, kept, before["id"], 1e-6)
    for key, wanted in old["texts_sha256"].items():
        if not key.startswith(controls) and key not in ("question", "gold_full_text"):
            assert hashlib.sha256(json.dumps([row[key] for row in rows]).encode()).hexdigest() == wanted, key


def test_a_configuration_of_an_earlier_run_is_read():
    for path in sorted((ROOT / "preserved_data").glob("*/config.yaml")):
        assert load_config(path).run.name
