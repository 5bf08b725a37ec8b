"""Inputs that must not pass: three sound runs, each time spoilt in one way. None transfers, and each is named.

python -m pytest tests/results/test_doctored.py
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from results.test_verdict import CONTROLS, EVERYTHING, HALF, TARGET, make_frame

from bridgekit.results.table import load_frame
from bridgekit.results.verdict import judge

N_UNITS, N = 150, 450
SOLVED = {"source_only": 0.04, "target_only": 0.99, "both": 0.99}  # better than the target, but where it matters
POOR = {"source_only": 0.04, "target_only": 0.7, "both": 0.7}


class Run(dict):
    """`rows`, `config` (flat), `provenance`, `controls`, `code`, and further `files` by name."""

    def __init__(self, seed: int, **rates: dict) -> None:
        rows = make_frame(seed, N_UNITS, **rates)
        rows["bridged_logprob"] = np.random.default_rng(seed).uniform(-2, 0, N)
        rows = rows.assign(question="How many are " + rows["id"] + "?", gold_extracted="12")
        wrong = ~rows["bridged_correct"]  # another seed makes other mistakes
        rows.loc[wrong, "bridged_extracted"] = [f"{seed}{i}" for i in range(wrong.sum())]
        super().__init__(rows=rows, files={}, code={}, controls={c: {"mix": 400} for c in ("constant", "self_bridge")})
        self["config"] = {"run.seed": seed, "train.steps": 400, "task.task": "units", "task.n_test": N}
        self["provenance"] = {"source": "aaaa", "target": "bbbb", "lexicon_seed": 2}

    def write(self, folder: Path) -> Path:
        folder.mkdir()
        config: dict = {}
        for key, value in self["config"].items():
            config.setdefault(key.split(".")[0], {})[key.split(".")[1]] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        for name in ("provenance", "controls"):
            if self[name]:
                (folder / f"{name}.json").write_text(json.dumps(self[name]))
        if self["code"]:
            (folder / "code").mkdir()
            (folder / "code" / "code.json").write_text(json.dumps(self["code"]))
        self["rows"].to_json(folder / "eval_samples_step_final.jsonl", orient="records", lines=True)
        for name, change in self["files"].items():
            text = (folder / name).read_text() if (folder / name).is_file() else ""
            (folder / name).write_text(change(text))
        return folder


def last(part: str, **values):
    """The third run with other values of one of its parts."""
    return lambda runs: runs[2][part].update({key.replace("__", "."): value for key, value in values.items()})


def every(part: str, value):
    return lambda runs: [run.update({part: value(run[part])}) for run in runs]


def rows(change, *which: int):
    """The rows of these runs (else of all), changed."""
    return lambda runs: [runs[i].update(rows=change(runs[i]["rows"])) for i in which or range(3)]


def copies(change=lambda rows: rows):
    """One run three times, called seeds 1, 2 and 3; the copies changed a little."""
    return lambda runs: [run.update(rows=change(runs[0]["rows"].copy())) for run in runs[1:]]


def rates(**changed: dict):
    """Runs of a bridge, or with controls, of other strength."""
    return lambda runs: [run.update(rows=Run(seed, **changed)["rows"]) for seed, run in enumerate(runs, start=1)]


def half_wrong(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.assign(bridged_correct=frame["bridged_correct"] & (np.arange(len(frame)) > 9))


few = lambda frame: frame[frame["unit"].isin([f"u{i}" for i in range(20)])]  # noqa: E731
cut = {"eval_samples_step_final.jsonl": lambda text: text[:-40]}
old = {"metrics_constant.jsonl": lambda text: '{"step": 0, "eval": {"constant": 0.5}}\n'}
DOCTORED = {
    # one run as several
    "the same seed twice": (last("config", run__seed=1), "give one run for each distinct seed"),
    "one run three times": (copies(), "are the same run"),
    "... rows reordered": (copies(lambda r: r.sample(frac=1, random_state=0)), "are the same run"),
    "... a row missing": (copies(lambda r: r.drop(index=[3])), "are the same run"),
    "... log-probabilities rounded": (copies(lambda r: r.round({"bridged_logprob": 1})), "are the same run"),
    "... without log-probabilities": (copies(lambda r: r.drop(columns="bridged_logprob")), "are the same run"),
    "... without what was extracted": (copies(lambda r: r.drop(columns="self_bridge_extracted")), "are the same run"),
    "... a few answers changed": (copies(half_wrong), "are the same run"),
    "... other ids": (copies(lambda r: r.assign(id="x" + r["id"])), r"same problems \(no id in common"),
    # no seeds of one experiment
    "another source": (last("provenance", source="cccc"), "source is 'cccc' there and 'aaaa' here"),
    "another target": (last("provenance", target="cccc"), "target is 'cccc' there"),
    "another lexicon": (last("provenance", lexicon_seed=4), "lexicon_seed is 4 there"),
    "no provenance": (lambda runs: runs[2].update(provenance={}), "is no other seed of .* is None there"),
    "another producer": (last("config", bridge__producer="dit"), "bridge.producer is 'dit' there"),
    "another direction": (last("config", pair__direction="swapped"), "pair.direction is 'swapped' there"),
    "another size": (last("config", bridge__n_soft_tokens=4), "bridge.n_soft_tokens is 4 there"),
    "another task": (last("config", task__task="gsm8k"), "task.task is 'gsm8k' there"),
    "other data": (last("config", task__data_seed=9), "task.data_seed is 9 there"),
    "longer training": (last("config", train__steps=800), "train.steps is 800 there"),
    "other controls": (last("config", train__controls=["constant"]), "train.controls is "),
    "other own code": (last("code", x={"sha256": "f"}), "code is .'f'. there"),
    # other problems, or not all of them
    "disjoint questions": (rows(lambda r: r.assign(id="y" + r["id"], question=r["id"]), 2), "no id in common"),
    "other questions": (rows(lambda r: r.assign(question="?" + r["question"]), 2), "question differs"),
    "another right answer": (rows(lambda r: r.assign(gold_extracted="13"), 2), "gold_extracted differs"),
    "other units": (rows(lambda r: r.assign(unit=r["unit"] + "a"), 2), "unit differs"),
    "other groups": (rows(lambda r: r.assign(group=r["group"].iloc[::-1].tolist()), 2), "group differs"),
    "20 rows in one": (rows(lambda r: r[:20], 2), "the whole test set .20 of 450 problems in seed 3"),
    "lost lines": (rows(lambda r: r[:-9]), "the whole test set .441 of 450 problems in seed 1"),
    "too many": (every("config", lambda c: c | {"task.n_test": 400}), "the whole test set .450 of 400 problems"),
    "a cut file": (lambda runs: runs[2].update(files=cut), "line 450: not a whole JSON object"),
    "an empty file": (rows(lambda r: r[:0], 2), "no examples in it"),
    "an id twice": (rows(lambda r: pd.concat([r, r[:1]]), 2), "id q0 occurs twice"),
    "problems twice under other ids": (
        lambda runs: [
            every("config", lambda c: c | {"task.n_test": 2 * N})(runs),
            rows(lambda r: pd.concat([r, r.assign(id="z" + r["id"])]))(runs),
        ],
        "a test of distinct problems .450 stand twice",
    ),
    # not known what stands or falls together
    "no groups in one": (rows(lambda r: r.drop(columns="group"), 2), "the source-only part .*in seed 3"),
    "no groups at all": (rows(lambda r: r.drop(columns=["group", "unit", "novelty"])), "not run: the source-only part"),
    "no units": (rows(lambda r: r.drop(columns="unit")), "has problems with a group and no unit"),
    "units here and there": (rows(lambda r: r.assign(unit=r["unit"].where(r.index > 5))), "with a group and no unit"),
    "no novelty": (rows(lambda r: r.drop(columns="novelty")), "has problems with a group and no novelty"),
    "all of it seen": (rows(lambda r: r.assign(novelty="seen"), 2), "no held-out problem"),
    "20 units": (rows(few), "a test of 30 units or more .20 in seed 1"),
    "few source-only units": (
        rows(lambda r: r[~((r["group"] == "source_only") & (r["unit"].str[1:].astype(int) > 60))]),
        "the source-only part .fewer than 30 held-out units in seed 1",
    ),
    # controls that are none
    "an untrained control": (every("controls", lambda c: c | {"constant": {"mix": 0}}), "constant .not trained"),
    "a half-trained control": (last("controls", self_bridge={"mix": 199}), "weights of step 199, seed 3"),
    "an untrained control of an old run": (
        lambda runs: runs[2].update(controls={}, files=old), "constant .not trained: weights of step 0, seed 3"
    ),
    "a control is missing": (rows(lambda r: r.filter(regex="^(?!shuffled)"), 2), "not run: shuffled .seed 3"),
    "a control without scores": (rows(lambda r: r.assign(shuffled_correct=None), 2), "shuffled .not scored on every"),
    "a control without some answers": (
        rows(lambda r: r.assign(constant_extracted=r["constant_extracted"].where(r.index > 99))), "constant .not scored"
    ),
    "another selection is better": (rates(**{"constant.last": EVERYTHING}), "Not shown to beat constant, last weights"),
    # models that know nothing
    "a random target": (
        every("config", lambda c: c | {"pair.target_model": "geometry:llama-3.1-8b"}),
        r"models with trained weights \(geometry:llama-3.1-8b in seed 1",
    ),
    # no effect where it counts
    "nothing on source-only problems": (
        rates(bridged=SOLVED, target=POOR, **dict.fromkeys(CONTROLS, POOR)), "Not shown to beat target on source-only"
    ),
    "the target bridged to itself does it": (rates(self_bridge=HALF, bridged=HALF), "Not shown to beat self_bridge"),
    "one seed without effect": (
        lambda runs: runs[2].update(rows=Run(3, bridged=TARGET)["rows"]), "Not shown to beat target .seed 3"
    ),
}  # fmt: skip


def write(runs: list[Run], root: Path) -> list[Path]:
    return [run.write(root / f"run_seed{i}") for i, run in enumerate(runs, start=1)]


def test_three_sound_runs_transfer(tmp_path):
    verdict = judge(write([Run(1), Run(2), Run(3)], tmp_path), n_boot=500)
    assert verdict.outcome == "transfers" and verdict.seeds == [1, 2, 3] and len(DOCTORED) >= 40


@pytest.mark.parametrize("name", DOCTORED)
def test_a_doctored_input_does_not_pass_and_is_named(name, tmp_path):
    doctor, words = DOCTORED[name]
    runs = [Run(1), Run(2), Run(3)]
    doctor(runs)
    try:
        verdict = judge(write(runs, tmp_path), n_boot=500)
        assert verdict.outcome != "transfers"
        said = verdict.text
    except ValueError as error:
        said = str(error)
        assert "\n" not in said
    assert pd.Series([said]).str.contains(words, regex=True).all(), said


def test_an_evaluation_without_its_broken_lines_is_no_proof(tmp_path):
    """Also three copies of one run, each cut at another line."""
    runs = [Run(1), Run(2), Run(3)]
    runs[2]["files"] = cut
    frames = [load_frame(folder, skip_broken=True) for folder in write(runs, tmp_path)]
    verdict = judge(frames, n_boot=500)
    assert verdict.outcome == "unproven" and "the whole test set (449 of 450 problems in seed 3)" in verdict.text
    copies(lambda rows: rows[:-50])(runs)
    (tmp_path / "copies").mkdir()
    frames = [load_frame(folder, skip_broken=True) for folder in write(runs, tmp_path / "copies")]
    with pytest.raises(ValueError, match="are the same run"):
        judge(frames)
