"""Every condition from one table and one decode path: each reads what its name says; baselines are made once.

python -m pytest tests/train/test_conditions.py
"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.config import CONDITIONS, Config
from bridgekit.model.generation import Generated
from bridgekit.model.pair import Pair, Prompt, split_prompts
from bridgekit.results.reports import describe_flips
from bridgekit.runs import find_eval, load_eval, load_jsonl
from bridgekit.tasks import get_task, literal_prompt, load_examples
from bridgekit.tasks.answers import INVALID, extract_answer
from bridgekit.train import conditions
from bridgekit.train.baselines import AnswerFile, Baselines
from bridgekit.train.conditions import (
    TABLE,
    Bridged,
    Text,
    count_flips,
    lead,
    make_prompts,
    matched_noise,
    tune_router,
)
from bridgekit.train.data import split_rows
from bridgekit.train.experiment import Experiment

KEYS = set(
    "eval_step index question gold_full_text gold_extracted id split group unit value novelty family steps "
    "donor_id donor_gold sampler_seed".split()
)
UNITS = get_task(Config())
TEXTS = tuple(name for name, row in TABLE.items() if isinstance(row, Text))


# -- one evaluation ---------------------------------------------------------------------------------------------------


def test_every_condition_is_in_every_row(tiny, val, make_experiment, build_bridges):
    experiment = make_experiment(tiny(max_new_tokens=16))
    experiment.router_threshold = 0.0
    rows = experiment.evaluate(val, build_bridges(experiment), "final", CONDITIONS, want_attention=True)
    path = find_eval(experiment.folder)
    assert list(load_jsonl(path)) == rows and len(rows) == len(val)
    parts = ("full", "extracted", "logprob", "correct")
    for i, (row, e) in enumerate(zip(rows, val, strict=True)):
        assert set(row) == KEYS | {f"{c}_{part}" for c in CONDITIONS if c != "union" for part in parts}
        assert (row["index"], row["id"], row["eval_step"]) == (i, e.id, "final")
        assert (row["gold_full_text"], row["gold_extracted"], row["donor_gold"]) == (e.solution, e.gold, e.donor_gold)
        for c in TABLE:
            assert row[f"{c}_extracted"] == extract_answer(row[f"{c}_full"]) and row[f"{c}_logprob"] <= 0
            assert row[f"{c}_correct"] == (row[f"{c}_extracted"] == e.gold)
    frame = load_eval(path)
    assert (frame["union_correct"] == (frame["source_correct"] | frame["target_correct"])).all()
    with np.load(experiment.folder / "attention.npz") as attention:
        assert sorted(attention["ids"]) == sorted(e.id for e in val)
        assert attention["mean"].astype(float).sum(1) == pytest.approx(1, abs=0.01)
        assert ((attention["mean"] > 0) & (attention["token_class"] == 1)).any(1).all()  # each has its unit's word


def test_a_row_of_the_table_is_all_a_new_condition_needs(tiny, val, make_experiment, build_bridges):
    experiment = make_experiment(tiny(max_new_tokens=8))
    bridges = build_bridges(experiment)
    mine = {
        "hint": Text("target", lambda e: replace(literal_prompt(e), prefix="Think.\n")),
        "next": Bridged("bridged", reads=lambda e, by_id: val[val.index(e) + 1]),
    }
    rows = experiment.evaluate(val[:3], bridges, conditions=mine)
    assert not list(experiment.folder.glob("eval_samples*"))  # without a step nothing is written
    for i, row in enumerate(rows):
        assert {k.removesuffix("_full") for k in row if k.endswith("_full")} == {"gold", *mine} - {"gold"}
        moved = replace(val[i + 1], id=val[i].id)  # the next question's states with this one's noise
        states = experiment.source_states([moved])
        assert row["next_full"] == experiment.decode_messages("bridged", bridges["bridged"], [val[i]], states)[0].text


def test_controls_that_were_not_trained_are_left_out(tiny, val, make_experiment, build_bridges):
    experiment = make_experiment(tiny(max_new_tokens=4))
    bridges = {"bridged": build_bridges(experiment)["bridged"]}
    wanted = ("source", "target", "bridged", "constant", "self_bridge", "router", "union")
    (row,) = experiment.evaluate(val[:1], bridges, None, wanted)
    assert {k for k in row if k.endswith("_full")} == {"source_full", "target_full", "bridged_full"}
    with pytest.raises(ValueError, match="no bridge 'bridged'"):
        experiment.evaluate(val[:1], {}, None, ("bridged",))


# -- baselines, by content --------------------------------------------------------------------------------------------


def test_baselines_are_made_once(tiny, pair, val, make_experiment, forwards):
    config = tiny()
    with forwards(pair.source, pair.target) as count:
        first = make_experiment(config).evaluate(val, {}, "0", TEXTS)
        made, count[0] = count[0], 0
        assert make_experiment(config).evaluate(val, {}, "0", TEXTS) == first
        again = make_experiment(config.with_(eval_batch_size=3, producer="constant", seed=5, steps=9))
        rows = again.evaluate(val[::-1], {}, "0", TEXTS)  # nothing of this is what a baseline depends on
        assert made > 0 and count[0] == 0
    assert [row["relay_cut_full"] for row in rows] == [row["relay_cut_full"] for row in first][::-1]


def test_a_baseline_is_made_anew_when_what_it_depends_on_changes(tiny, pair, val, accelerator, forwards, tmp_path):
    config = tiny(max_new_tokens=8)

    def count(config=config, pair=pair, examples=val) -> int:
        with forwards(pair.target) as found:
            Experiment(config, tmp_path, accelerator, pair).evaluate(examples, {}, "0", ("target",))
        return found[0]

    assert count() > 0 and count() == 0
    assert count(config.with_(max_new_tokens=9)) > 0
    assert count(examples=[replace(val[0], question="How many?"), *val[1:]]) == 8  # one row, one batch
    others = Pair(pair.source, replace(pair.target, fingerprint="other weights"), pair.lexicon_seed)
    assert count(pair=others) > 0
    assert count() == 0  # and nothing was lost meanwhile
    half = SimpleNamespace(decode_key=pair.target.decode_key, dtype=torch.bfloat16, device=pair.target.device)
    own, prompt = Baselines(UNITS, 8, 4), literal_prompt(val[0])
    assert own.key(half, prompt) != own.key(pair.target, prompt)


def test_answers_of_parallel_runs_are_all_kept(tmp_path):
    path = tmp_path / "cache" / "answers.jsonl"

    def append_some(n: int) -> None:
        file = AnswerFile(path)
        for i in range(20):
            file.add({f"{n} {i}": (Generated(f"text {i} " * 200, -0.5, 3), {})})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append_some, range(4)))
    assert len(AnswerFile(path).known) == 80 and all(line.endswith("}") for line in path.read_text().splitlines())


def test_damaged_lines_of_a_cache_are_left_out_and_the_others_used(tiny, val, make_experiment):
    config = tiny(max_new_tokens=8)
    experiment = make_experiment(config)
    first = experiment.evaluate(val, {}, "0", ("target",))
    path = experiment.baselines.file.path
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]) + '{"text": "no key"}\n\x00\x00\n{"key": "a", "te')
    again = make_experiment(config)
    assert len(again.baselines.file.known) == len(val) - 1
    assert again.evaluate(val, {}, "0", ("target",)) == first
    assert len(AnswerFile(path).known) == len(val), "what was appended after a cut line is whole"


def test_an_evaluation_goes_on_where_it_was_killed(tiny, make_experiment, build_bridges, monkeypatch):
    config = tiny(eval_batch_size=4, max_new_tokens=8)
    test = make_experiment(config).examples("test")
    names = ("target", "bridged", "shuffled", "noise")
    whole = make_experiment(config)
    bridges = build_bridges(whole)
    rows = whole.evaluate(test, bridges, "final", names, want_attention=True)
    killed, batches = make_experiment(config), []

    def kill(*given, **more):
        batches.append(1)
        if len(batches) == 5:
            raise KeyboardInterrupt
        return decode(*given, **more)

    decode = conditions.decode_bridged
    monkeypatch.setattr(conditions, "decode_bridged", kill)
    with pytest.raises(KeyboardInterrupt):
        killed.evaluate(test, bridges, "final", names, want_attention=True)
    assert not [*killed.folder.glob("eval_samples*"), *killed.folder.glob("*.npz")]
    goes_on = Experiment(config, killed.folder, whole.processes.accelerator, pair=whole.pair)
    assert goes_on.evaluate(test, bridges, "final", names, want_attention=True) == rows
    assert len(batches) == 1 + 3 * -(-len(test) // 4), "no batch was decoded twice but the one that was killed"
    for name in ("eval_samples_step_final.jsonl", "attention.npz"):
        assert (killed.folder / name).read_bytes() == (whole.folder / name).read_bytes()


# -- what each condition reads ----------------------------------------------------------------------------------------


def test_bridged_shuffled_zero_and_noise_read_what_they_should(tiny, val, make_experiment, build_bridges, monkeypatch):
    experiment = make_experiment(tiny(source_layers="2,4", max_new_tokens=4, eval_batch_size=len(val)))
    bridge, read = build_bridges(experiment)["bridged"], []
    encode, by_seed = bridge.encode, dict(zip(experiment.seeds(val).tolist(), val, strict=True))

    def watch(states, mask, seeds, **more):
        read.append({by_seed[int(seed)].id: states[i][mask[i]] for i, seed in enumerate(seeds)})
        return encode(states, mask, seeds, **more)

    monkeypatch.setattr(bridge, "encode", watch)
    experiment.evaluate(val, {"bridged": bridge}, None, ("bridged", "shuffled", "zero", "noise"))
    bridged, shuffled, zero, noise = read
    for e in val:
        own = experiment.source_states([e]).batch([0], bridged[e.id].device)[0][0]
        assert torch.allclose(bridged[e.id], own, atol=1e-3)
        assert torch.allclose(shuffled[e.id], bridged[e.donor_id], atol=1e-3)
        assert not zero[e.id].any() and zero[e.id].shape == noise[e.id].shape == own.shape
        assert noise[e.id].all() and not torch.allclose(noise[e.id], own, atol=0.1)


def test_a_donor_need_not_be_among_the_problems_evaluated(tiny, val, make_experiment, build_bridges):
    """With fewer eval_samples than test problems `shuffled` still reads its donor, never its own question."""
    experiment = make_experiment(tiny(max_new_tokens=8))
    bridges = build_bridges(experiment)
    all_rows = experiment.evaluate(val, bridges, None, ("shuffled",))[:3]
    few = experiment.evaluate(val[:3], bridges, None, ("shuffled",))
    assert [r["shuffled_full"] for r in few] == [r["shuffled_full"] for r in all_rows]
    assert [r["shuffled_logprob"] for r in few] == pytest.approx([r["shuffled_logprob"] for r in all_rows], abs=2e-5)
    with pytest.raises(ValueError, match="shuffled.*donor"):
        experiment.evaluate([replace(val[0], donor_id="nobody")], bridges, None, ("shuffled",))


def test_matched_noise_has_the_size_of_the_states():
    mask = torch.tensor([[True] * 40, [True] * 30 + [False] * 10])
    hidden = torch.randn(2, 40, 3, 64) * torch.tensor([1.0, 10.0, 0.1])[:, None] * mask[..., None, None]
    seeds = torch.tensor([4, 5])
    noise = matched_noise(hidden, mask, seeds)
    for i, n in enumerate((40, 30)):
        ratio = noise[i, :n].pow(2).mean((0, 2)).sqrt() / hidden[i, :n].pow(2).mean((0, 2)).sqrt()
        assert ratio.numpy() == pytest.approx(1, abs=0.1) and not noise[i, n:].any()
    assert torch.equal(matched_noise(hidden[1:], mask[1:], seeds[1:]), noise[1:])
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), hidden.flatten()]))[0, 1]) < 0.05


@pytest.mark.parametrize("mode", ["soft_plus_text", "soft_only"])
@pytest.mark.parametrize("position", ["start", "question", "end"])
def test_target_suffix_has_exactly_the_text_of_the_bridged_prompt(tiny, pair, val, make_experiment, mode, position):
    experiment, lm = make_experiment(tiny(prompt_mode=mode, soft_position=position)), pair.target
    suffix: list[Prompt] = make_prompts(experiment, TABLE["target_suffix"], val, None)
    pieces = split_prompts(lm, [literal_prompt(e) for e in val])
    before, after = split_rows(lm, pieces, position, mode)
    assert [lm.bos + p.all for p in split_prompts(lm, suffix)] == [b + a for b, a in zip(before, after, strict=True)]


def test_a_self_bridge_reads_only_what_the_target_may_read(tiny, pair, make_experiment):
    config = tiny(variant="context", n_facts=3)
    examples = load_examples(config, pair.lexicon_seed, "val")[:5]
    experiment = make_experiment(config)
    own = experiment.source_states(examples, "self_bridge")
    assert [pair.target.tokenizer.decode(row[1:]) for row in own.rows] == [literal_prompt(e).text for e in examples]
    for e, row in zip(examples, experiment.source_states(examples).rows, strict=True):
        assert e.facts in pair.source.tokenizer.decode(row) and e.facts


def test_a_source_may_be_read_through_its_own_solution(tiny, pair, val, make_experiment):
    experiment = make_experiment(tiny(source_view="solution", max_new_tokens=40))
    rows = experiment.evaluate(val[:3], {}, None, ("source",))
    for e, row, ids in zip(val, rows, experiment.source_states(val[:3]).rows, strict=False):
        wanted = literal_prompt(e).text + row["source_full"]  # its own words, not the gold answer
        assert pair.source.tokenizer.decode(ids[1:]) == wanted


def test_no_answer_flips_between_batch_sizes_on_cpu(tiny, val, make_experiment, build_bridges, pair, forwards):
    experiment = make_experiment(tiny(eval_batch_size=16, max_new_tokens=12, source_view="solution"))
    bridge = build_bridges(experiment)["bridged"]
    rows = experiment.evaluate(val, {"bridged": bridge}, None, ("bridged",))
    rows[0]["bridged_extracted"] += "0"
    with forwards(pair.source) as count:  # what the source wrote is no part of the comparison: it is not made again
        found = count_flips(experiment, val, bridge, rows)
    assert found == {"batch_sizes": [16, 2], "flipped": 1, "n": len(val)} and count[0] == 0
    said = describe_flips(found | {"eager": 0})
    assert said.endswith("change by arithmetic alone: 1 with batches of 2 instead of 16, 0 with no captured graphs")


def test_the_task_says_where_an_answer_is_complete(tiny, val, make_experiment, build_bridges):
    experiment = make_experiment(tiny(max_new_tokens=32))
    bridges, names = build_bridges(experiment), ("target", "bridged")
    whole = {c: [g.n_tokens for g in experiment.answer(c, val, bridges)] for c in names}
    experiment.task = replace(experiment.task, name="short", is_complete=lambda text: True)
    experiment.baselines.task = experiment.task  # looked at every 16 tokens
    for name in names:
        found = [g.n_tokens for g in experiment.answer(name, val, bridges)]
        assert found == [min(n, 16) for n in whole[name]] != whole[name]


# -- router -----------------------------------------------------------------------------------------------------------


def routed(leads, source_right, target_right) -> list[dict]:
    return [
        {
            "source_logprob": round(a / 7, 5), "target_logprob": 0.0, "gold_extracted": "1",
            "source_extracted": "1" if s else "2", "target_extracted": "1" if t else INVALID,
        }
        for a, s, t in zip(leads, source_right, target_right, strict=True)
    ]  # fmt: skip


def accuracy(rows: list[dict], threshold: float) -> float:
    def choose(row: dict) -> str:
        source, target = (Generated("", row[f"{c}_logprob"], 1) for c in ("source", "target"))
        return row["source_extracted"] if lead(source, target) > threshold else row["target_extracted"]

    return sum(choose(row) == row["gold_extracted"] for row in rows)


@given(st.lists(st.tuples(st.integers(-9, 9), st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_router_s_threshold_is_the_best_there_is(cases):
    """Against every threshold below, between and above the leads; equal leads cannot be told apart."""
    rows = routed(*zip(*cases, strict=True))
    leads = sorted({row["source_logprob"] for row in rows})
    between = [(a + b) / 2 for a, b in itertools.pairwise(leads)]
    best = max(accuracy(rows, t) for t in (leads[0] - 1, *between, leads[-1] + 1))
    assert accuracy(rows, tune_router(rows)) == best


def test_the_router_takes_the_source_above_its_threshold(tiny, val, make_experiment):
    experiment = make_experiment(tiny(max_new_tokens=24))
    texts = {c: [g.text for g in experiment.answer(c, val)] for c in ("source", "target")}
    for threshold, wanted in ((-1e9, "source"), (1e9, "target")):
        experiment.router_threshold = threshold
        assert [g.text for g in experiment.answer("router", val)] == texts[wanted]
    experiment.router_threshold = None  # tuned on the validation problems when it is asked for
    experiment.answer("router", val[:2])
    assert experiment.router_threshold == tune_router(experiment.evaluate(val, {}, None, ("source", "target")))
