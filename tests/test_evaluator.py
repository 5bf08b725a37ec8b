"""Every condition from one decode path: each reads what its name says; baselines are made once.

python -m pytest tests/test_evaluator.py
"""

import contextlib
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit import launch
from bridgekit.config import CONDITIONS
from bridgekit.model.bridge import build_bridge
from bridgekit.model.generation import Generated, decode_bridged
from bridgekit.model.pair import Pair, split_prompts
from bridgekit.model.states import SourceStates, read_source
from bridgekit.runs import find_eval, load_eval, read_jsonl, read_status
from bridgekit.tasks import load_examples
from bridgekit.tasks.answers import INVALID, extract_answer
from bridgekit.tasks.base import literal_prompt
from bridgekit.train import worker as train
from bridgekit.train.data import split_rows
from bridgekit.train.evaluator import (
    BASELINES,
    Evaluator,
    add_router,
    matched_noise,
    sampler_seed,
    tune_router,
)

KEYS = (
    "eval_step index question gold_full_text gold_extracted id split group unit value novelty family steps "
    "donor_id donor_gold sampler_seed"
).split()


@pytest.fixture
def make_evaluator(pair, accelerator, tmp_path):
    """`make_evaluator(config)`: an evaluator in a folder of its own; baselines are cached where it says."""
    numbers = itertools.count()

    def make(config, pair=pair) -> Evaluator:
        folder = tmp_path / f"run_{next(numbers)}"
        folder.mkdir()
        return Evaluator(config, pair, accelerator, folder)

    return make


def build_bridges(config, evaluator) -> dict:
    """Untrained: what a condition reads and how it decodes does not depend on what the bridge has learned."""
    pair, torch_seed = evaluator.pair, itertools.count(1)

    def build(n_layers, source, **changes):
        torch.manual_seed(next(torch_seed))
        return build_bridge(config.with_(**changes), n_layers, source.hidden_size, pair.target)

    return {
        "bridged": build(len(evaluator.layers), pair.source),
        "constant": build(len(evaluator.layers), pair.source, producer="constant"),
        "constant_natural": build(len(evaluator.layers), pair.source, producer="constant"),
        "self_bridge": build(len(evaluator.self_layers), pair.target),
    }


@contextlib.contextmanager
def counted(*models):
    """Counts the forward passes of language models."""
    count = [0]

    def add(module, arguments):
        count[0] += 1

    hooks = [lm.model.register_forward_pre_hook(add) for lm in models]
    try:
        yield count
    finally:
        for hook in hooks:
            hook.remove()


# -- one evaluation -----------------------------------------------------------------------------------------


def test_every_condition_is_in_every_row(tiny, val, make_evaluator):
    config = tiny(max_new_tokens=16)
    evaluator = make_evaluator(config)
    evaluator.router_threshold = 0.0
    rows = evaluator.evaluate(val, build_bridges(config, evaluator), "final", CONDITIONS, want_attention=True)
    path = find_eval(evaluator.folder)
    assert list(read_jsonl(path)) == rows and len(rows) == len(val)
    for i, (row, e) in enumerate(zip(rows, val, strict=True)):
        assert set(KEYS) <= set(row)
        assert (row["index"], row["id"], row["eval_step"]) == (i, e.id, "final")
        assert (row["gold_full_text"], row["gold_extracted"], row["donor_gold"]) == (
            e.solution,
            e.gold,
            e.donor_gold,
        )
        for condition in CONDITIONS:
            if condition == "union":
                continue
            assert row[f"{condition}_extracted"] == extract_answer(row[f"{condition}_full"])
            assert condition == "router" or row[f"{condition}_logprob"] <= 0
    frame = load_eval(path)
    assert {f"{c}_correct" for c in CONDITIONS} <= set(frame)
    assert (frame["union_correct"] == (frame["source_correct"] | frame["target_correct"])).all()
    assert [p.name for p in evaluator.folder.iterdir() if p.name.startswith(".parts")] == [".parts"]
    assert not list((evaluator.folder / ".parts").iterdir())
    with np.load(evaluator.folder / "attention.npz") as attention:
        assert sorted(attention["ids"]) == sorted(e.id for e in val)
        assert attention["mean"].astype(float).sum(1) == pytest.approx(1, abs=0.01)
        units = (attention["mean"] > 0) & (attention["token_class"] == 1)
        assert units.any(1).all()  # each question has its unit's word


def test_controls_that_were_not_trained_are_left_out(tiny, val, make_evaluator):
    config = tiny(max_new_tokens=4)
    evaluator = make_evaluator(config)
    bridges = {"bridged": build_bridges(config, evaluator)["bridged"]}
    (row,) = evaluator.evaluate(val[:1], bridges, "0", ("source", "target", "bridged", "constant", "self_bridge"))
    assert "bridged_full" in row and "constant_full" not in row and "self_bridge_full" not in row


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_evaluation_that_breaks_off_leaves_no_file_that_looks_finished(tiny, val, make_evaluator, error):
    config = tiny(max_new_tokens=4)
    evaluator = make_evaluator(config)

    def report(condition: str) -> None:
        if condition == "bridged":
            raise error

    with pytest.raises(error):
        evaluator.evaluate(
            val, build_bridges(config, evaluator), "final", ("source", "target", "bridged"), report=report
        )
    assert not list(evaluator.folder.glob("eval_samples*")) and not list(evaluator.folder.glob("*.npz"))


# -- baselines, by content ----------------------------------------------------------------------------------


def test_baselines_are_made_once(tiny, pair, val, make_evaluator):
    config = tiny()
    conditions = BASELINES
    with counted(pair.source, pair.target) as count:
        first = make_evaluator(config).evaluate(val, {}, "0", conditions)
        assert count[0] > 0
        count[0] = 0
        assert make_evaluator(config).evaluate(val, {}, "0", conditions) == first
        assert count[0] == 0
        again = make_evaluator(config.with_(eval_batch_size=3, producer="constant", seed=5, steps=9))
        rows = again.evaluate(val[::-1], {}, "0", conditions)  # nothing of this is what a baseline depends on
        assert count[0] == 0
    assert [row["relay_cut_full"] for row in rows] == [row["relay_cut_full"] for row in first][::-1]


def test_a_baseline_is_made_anew_when_what_it_depends_on_changes(tiny, pair, val, make_evaluator):
    config = tiny(max_new_tokens=8)
    make_evaluator(config).evaluate(val, {}, "0", ("target",))

    def forwards(config=config, pair=pair, examples=val) -> int:
        with counted(pair.target) as count:
            make_evaluator(config, pair).evaluate(examples, {}, "0", ("target",))
        return count[0]

    assert forwards() == 0
    assert forwards(config.with_(max_new_tokens=9)) > 0
    assert forwards(examples=[replace(val[0], question="How many?"), *val[1:]]) == 8  # one row, one batch
    others = Pair(pair.source, replace(pair.target, fingerprint="other weights"), pair.lexicon_seed)
    assert forwards(pair=others) > 0
    assert forwards() == 0  # and nothing was lost meanwhile


# -- what each condition reads ------------------------------------------------------------------------------


def decode(config, pair, bridge, examples, readers, change=lambda hidden, mask, seeds: hidden) -> list[Generated]:
    """Bridged text of `examples` from the states of `readers`, put together here from its parts."""
    evaluator_layers = config.bridge.source_layers.split(",")
    states = SourceStates(
        pair.source, read_source(pair.source, readers, "prompt", {}), tuple(map(int, evaluator_layers)), 0
    )
    hidden, mask = states.batch(np.arange(len(readers)), pair.target.device)
    seeds = torch.tensor([sampler_seed(config.run.seed, e.id) for e in examples])
    pieces = split_prompts(pair.target, [literal_prompt(e) for e in examples])
    before, after = split_rows(pair.target, pieces, config.bridge.soft_position, config.bridge.prompt_mode)
    with torch.no_grad():
        message = bridge.eval().encode(change(hidden, mask, seeds), mask, seeds)
        return decode_bridged(pair.target, bridge, message, before, after, config.eval.max_new_tokens)


@pytest.mark.parametrize("producer", ["resampler", "dit"])
def test_bridged_shuffled_zero_and_noise_read_what_they_should(tiny, pair, val, make_evaluator, producer):
    config = tiny(producer=producer, source_layers="2,4", max_new_tokens=12, soft_position="end")
    evaluator = make_evaluator(config)
    bridges = build_bridges(config, evaluator)
    some = val[:6]
    by_id = {e.id: e for e in val}
    donors = [by_id[e.donor_id] for e in some]
    rows = evaluator.evaluate(val, bridges, "0", ("bridged", "shuffled", "zero", "noise"))[:6]
    wanted = {
        "bridged": decode(config, pair, bridges["bridged"], some, some),
        "shuffled": decode(config, pair, bridges["bridged"], some, donors),
        "zero": decode(config, pair, bridges["bridged"], some, some, lambda hidden, *_: torch.zeros_like(hidden)),
        "noise": decode(config, pair, bridges["bridged"], some, some, matched_noise),
    }
    for condition, said in wanted.items():
        assert [row[f"{condition}_full"] for row in rows] == [g.text for g in said], condition
        assert [row[f"{condition}_logprob"] for row in rows] == pytest.approx([g.logprob for g in said], abs=2e-5)
    for one, other in itertools.combinations(wanted, 2):  # four conditions, not one under four names
        assert any(abs(row[f"{one}_logprob"] - row[f"{other}_logprob"]) > 1e-4 for row in rows), (one, other)


def test_a_donor_need_not_be_among_the_problems_evaluated(tiny, val, make_evaluator):
    """With fewer eval_samples than test problems `shuffled` still reads its donor, never its own question."""
    config = tiny(max_new_tokens=8)
    evaluator = make_evaluator(config)
    bridges = build_bridges(config, evaluator)
    all_rows = evaluator.evaluate(val, bridges, "0", ("shuffled",))
    few = evaluator.evaluate(val[:3], bridges, "1", ("shuffled",), donors=val)
    said = [(row["shuffled_full"], row["shuffled_logprob"]) for row in all_rows[:3]]
    assert [(row["shuffled_full"], pytest.approx(row["shuffled_logprob"], abs=2e-5)) for row in few] == said
    with pytest.raises(ValueError, match="shuffled.*donor"):
        evaluator.evaluate(val[:1], bridges, "2", ("shuffled",))


def test_matched_noise_has_the_size_of_the_states(pair):
    mask = torch.tensor([[True] * 40, [True] * 30 + [False] * 10])
    hidden = torch.randn(2, 40, 3, 64) * torch.tensor([1.0, 10.0, 0.1])[:, None] * mask[..., None, None]
    seeds = torch.tensor([4, 5])
    noise = matched_noise(hidden, mask, seeds)
    for i, n in enumerate((40, 30)):
        ratio = noise[i, :n].pow(2).mean((0, 2)).sqrt() / hidden[i, :n].pow(2).mean((0, 2)).sqrt()
        assert ratio.numpy() == pytest.approx(1, abs=0.1)
        assert not noise[i, n:].any()
    assert torch.equal(matched_noise(hidden[1:], mask[1:], seeds[1:]), noise[1:])
    flat = torch.stack([noise.flatten(), hidden.flatten()])
    assert abs(torch.corrcoef(flat)[0, 1]) < 0.05


def test_text_conditions_say_what_their_names_promise(tiny, pair, val, make_evaluator):
    config = tiny(n_soft_tokens=5)
    evaluator = make_evaluator(config)
    texts = ["<<2*13=26>>26 pins.\n#### 26", "no answer\nat all", "####"]
    said = {"source": [Generated(text, -0.1, 9) for text in texts]}
    some = val[:3]

    def prompts(condition):
        return [p.text for p in evaluator._prompts(condition, some, said)]

    literal = [literal_prompt(e).text for e in some]
    assert prompts("source") == prompts("target") == prompts("target_suffix") == literal
    assert prompts("target_told") == [e.told + text for e, text in zip(some, literal, strict=True)]
    relayed = {c: [p.removesuffix(t) for p, t in zip(prompts(c), literal, strict=True)] for c in prompts_of_relay()}
    assert relayed["relay_full"] == [f"Helper: {text.replace(chr(10), ' ')}\n" for text in texts]
    assert relayed["relay_answer"] == ["Helper: #### 26\n", "Helper: \n", "Helper: \n"]
    for text, whole, cut in zip(texts, relayed["relay_full"], relayed["relay_cut"], strict=True):
        ids = pair.target.tokenize([text])[0][:5]
        assert cut == f"Helper: {pair.target.tokenizer.decode(ids).strip().replace(chr(10), ' ')}\n"
        assert whole.startswith(cut.strip())
    with pytest.raises(ValueError, match="relay_full.*source"):
        evaluator._prompts("relay_full", some, {})


def prompts_of_relay() -> list[str]:
    return [c for c in CONDITIONS if c.startswith("relay")]


@pytest.mark.parametrize("mode", ["soft_plus_text", "soft_only"])
@pytest.mark.parametrize("position", ["start", "question", "end"])
def test_target_suffix_has_exactly_the_text_of_the_bridged_prompt(tiny, pair, val, make_evaluator, mode, position):
    evaluator = make_evaluator(tiny(prompt_mode=mode, soft_position=position))
    lm = pair.target
    suffix = [lm.bos + p.all for p in split_prompts(lm, evaluator._prompts("target_suffix", val, {}))]
    pieces = split_prompts(lm, [literal_prompt(e) for e in val])
    before, after = split_rows(lm, pieces, position, mode)
    assert suffix == [b + a for b, a in zip(before, after, strict=True)]


def test_a_self_bridge_reads_only_what_the_target_may_read(tiny, pair, make_evaluator):
    config = tiny(variant="context", n_facts=3)
    examples = load_examples(config, pair.lexicon_seed, "val")[:5]
    evaluator = make_evaluator(config)
    own = evaluator.source_states("self_bridge", examples)
    assert [pair.target.tokenizer.decode(row[1:]) for row in own.rows] == [literal_prompt(e).text for e in examples]
    theirs = evaluator.source_states("bridged", examples)
    for e, row in zip(examples, theirs.rows, strict=True):
        assert e.facts in pair.source.tokenizer.decode(row) and e.facts


def test_a_source_may_be_read_through_its_own_solution(tiny, pair, val, make_evaluator):
    evaluator = make_evaluator(tiny(source_view="solution", max_new_tokens=40))
    rows = evaluator.evaluate(val[:3], {}, "0", ("source",))
    states = evaluator.source_states("bridged", val[:3])
    for e, row, ids in zip(val, rows, states.rows, strict=False):
        wanted = literal_prompt(e).text + row["source_full"]  # its own words, not the gold answer
        assert pair.source.tokenizer.decode(ids[1:]) == wanted


def test_no_answer_flips_between_batch_sizes_on_cpu(tiny, val, make_evaluator):
    config = tiny(eval_batch_size=16, max_new_tokens=12)
    evaluator = make_evaluator(config)
    bridges = build_bridges(config, evaluator)
    rows = evaluator.evaluate(val, bridges, "0", ("bridged",))
    assert evaluator.count_flips(val, bridges["bridged"], rows) == {
        "batch_sizes": [16, 2],
        "flipped": 0,
        "n": len(val),
    }
    rows[0]["bridged_extracted"] += "0"
    assert evaluator.count_flips(val, bridges["bridged"], rows)["flipped"] == 1


# -- router -------------------------------------------------------------------------------------------------


def routed(leads, source_right, target_right) -> list[dict]:
    return [
        {
            "source_logprob": round(lead / 7, 5), "target_logprob": 0.0, "gold_extracted": "1",
            "source_extracted": "1" if s else "2", "target_extracted": "1" if t else INVALID,
            "source_full": f"s{s}", "target_full": f"t{t}",
        }
        for lead, s, t in zip(leads, source_right, target_right, strict=True)
    ]  # fmt: skip


def accuracy(rows: list[dict], threshold: float) -> float:
    add_router(rows, threshold)
    return sum(row["router_extracted"] == row["gold_extracted"] for row in rows)


@given(st.lists(st.tuples(st.integers(-9, 9), st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=300, deadline=None)
def test_the_router_s_threshold_is_the_best_there_is(cases):
    """Against every threshold below, between and above the leads; equal leads cannot be told apart."""
    rows = routed(*zip(*cases, strict=True))
    leads = sorted({row["source_logprob"] for row in rows})
    between = [(a + b) / 2 for a, b in itertools.pairwise(leads)]
    best = max(accuracy(rows, t) for t in (leads[0] - 1, *between, leads[-1] + 1))
    assert accuracy(rows, tune_router(rows)) == best


def test_the_router_takes_the_source_above_its_threshold():
    rows = routed([7, 14], [1, 1], [0, 0])
    add_router(rows, 1.5)
    assert [row["router_full"] for row in rows] == ["t0", "s1"]


# -- several processes --------------------------------------------------------------------------------------


def test_two_processes_train_and_say_the_same_as_one(tiny, make_job, monkeypatch):
    """One run here, one under `accelerate launch` with two workers and an odd number of problems."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    changes = dict(
        n_test=17, n_val=7, val_samples=7, max_new_tokens=12, warmup_steps=3, info_nce_weight=0.1,
        kl_weight=0.1, conditions=["source", "target", "bridged", "noise", "shuffled", "relay_cut"],
    )  # fmt: skip
    job = make_job(tiny(**changes))
    train.run_training(job)
    folders = [job.folder, launch.open_run(tiny(**changes, num_processes=2))]
    launch.run_stage(folders[1], "train")
    assert [read_status(folder)["state"] for folder in folders] == ["finished", "finished"]
    assert [json.loads((f / "provenance.json").read_text())["processes"] for f in folders] == [1, 2]
    final = [list(read_jsonl(find_eval(folder))) for folder in folders]
    assert len(final[0]) == 17 + 8  # with the problems about seen units
    for one, two in zip(*final, strict=True):
        assert two == {k: pytest.approx(v, abs=1e-3) if k.endswith("logprob") else v for k, v in one.items()}
    metrics = [list(read_jsonl(folder / "metrics.jsonl")) for folder in folders]
    for one, two in zip(*metrics, strict=True):
        assert one["step"] == two["step"] and one.get("eval") == two.get("eval")
        if "loss" in one:
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
            assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
            assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    attention = [np.load(folder / "attention.npz") for folder in folders]
    for name in ("ids", "token_class"):
        assert np.array_equal(attention[0][name], attention[1][name])
    assert attention[1]["mean"].astype(float) == pytest.approx(attention[0]["mean"].astype(float), abs=1e-2)
