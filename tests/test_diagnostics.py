"""A look inside a finished run: what is refused, what is measured against known cases, what a trained bridge shows.

python -m pytest tests/test_diagnostics.py
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bridgekit.config import ConfigError
from bridgekit.inside import causal, diagnostics, readings_inside
from bridgekit.inside import measure as inside
from bridgekit.model.bridge import build_bridge, checkpoint_path, save_bridge
from bridgekit.model.pair import fingerprint_folder, pick_layers, resolve_folder
from bridgekit.runs import append_jsonl, find_eval, load_eval, write_status
from bridgekit.tasks import units
from bridgekit.train.experiment import open_finished
from bridgekit.train.trainer import variant
from bridgekit.train.worker import describe

PRESERVED = Path(__file__).parent.parent / "preserved_data"
SIZE = dict(n_val=60, n_test=120, val_samples=24, n_train=200)


@pytest.fixture(scope="module")
def finish(make_job):
    """`finish(config)`: a run folder as training leaves it, with a bridge and a constant that learned nothing."""

    def make(config) -> Path:
        job = make_job(config)
        if config.pair.direction == "swapped":
            job.pair = replace(job.pair, source=job.pair.target, target=job.pair.source)
        layers = len(pick_layers(job.pair.source, config.bridge.source_layers))
        for name in ("bridged", "constant"):
            torch.manual_seed(1)
            bridge = build_bridge(variant(config, name), layers, job.pair.source.hidden_size, job.pair.target)
            save_bridge(bridge, job.folder, name, {})
        (job.folder / "provenance.json").write_text(json.dumps(describe(job)))
        append_jsonl(job.folder / "metrics.jsonl", {"step": 2, "loss": 1.0, "gates": bridge.injector.gates()})
        write_status(job.folder, state="finished")
        return job.folder

    return make


@pytest.fixture(scope="module")
def run(finish, tiny):
    return finish(tiny(**SIZE))


@pytest.fixture(scope="module")
def open_fresh(finish, tiny, pair):
    """`open_fresh(injector="kv")`: a run of these settings, opened with the pair that is loaded already."""
    return lambda **changes: open_finished(finish(tiny(**SIZE | changes)), device="cpu", pair=pair)


@pytest.fixture(scope="module")
def opened(run, pair):
    return open_finished(run, device="cpu", pair=pair)


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


# ---- opening ------------------------------------------------------------------------------------------------------


def test_a_finished_run_opens_with_both_its_bridges_and_is_not_written_to(run):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    opened = open_finished(run, device="cpu")
    assert set(opened.bridges) == {"bridged", "constant"}
    assert not any(p.requires_grad for p in opened.bridges["bridged"].parameters())
    assert all(e.novelty != "seen" for e in opened.test)
    diagnostics.soft_token_sizes(opened, opened.test[:4])
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*")} == before


def refused(folder: Path, **changes) -> str:
    with pytest.raises(ConfigError) as error:
        open_finished(folder, device="cpu", **changes)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_folder_without_a_run_is_refused(tmp_path):
    assert "config.yaml not found" in refused(tmp_path) and str(tmp_path) in refused(tmp_path)


@pytest.mark.parametrize("state", ["running", "failed"])
def test_an_unfinished_run_is_refused(copy, state):
    write_status(copy, state=state)
    assert f"not finished ({state})" in refused(copy)
    (copy / "status.json").unlink()
    assert "not finished (never started)" in refused(copy)


def test_a_run_without_its_checkpoint_is_refused(copy):
    checkpoint_path(copy, "bridged").unlink()
    assert f"{copy}: no checkpoint/bridged.safetensors" in refused(copy)


@pytest.mark.parametrize("role", ["source", "target"])
def test_a_run_of_another_pair_is_refused(copy, role):
    known = json.loads((copy / "provenance.json").read_text())
    (copy / "provenance.json").write_text(json.dumps(known | {role: "0123456789abcdef"}))
    text = refused(copy)
    assert f"another {role} model (0123456789abcdef; 'embedded' is {known[role]})" in text and f"{role}_model" in text
    (copy / "provenance.json").unlink()
    assert "which pair the run was trained on" in refused(copy)


def test_the_models_exchanged_are_another_pair(copy):
    """Shapes differ here; with two models of one shape only the fingerprint would tell."""
    source, target = (str(resolve_folder(f"{role}_model", "embedded")) for role in ("source", "target"))
    assert "trained on another source model" in refused(copy, source_model=target, target_model=source)


def test_a_checkpoint_that_does_not_fit_or_is_cut_short_is_refused(copy):
    path = checkpoint_path(copy, "bridged")
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: does not fit" in refused(copy)
    shutil.copy(checkpoint_path(copy, "constant"), path)
    assert f"{path}: does not fit" in refused(copy)


# ---- what is measured ---------------------------------------------------------------------------------------------


def test_picked_examples_ask_each_unit_once_before_any_twice(opened):
    examples = opened.pick("source_only", 1000)
    words = [e.unit for e in examples]
    n = len(set(words))
    assert {e.group for e in examples} == {"source_only"} and len(set(words[:n])) == n
    assert opened.pick("source_only", 5) == examples[:5]


def test_messages_are_those_that_evaluation_decodes(opened):
    """The bridged answers of the evaluator come from the same tokens: batch by batch, whatever the batch."""
    examples = opened.test[:70]  # more than one batch
    tokens, mask = opened.encode(examples)
    alone, _ = opened.encode(examples[66:67])
    assert tokens.shape == (70, 4, opened.pair.target.hidden_size) and mask.all()
    assert torch.allclose(tokens[66], alone[0], atol=1e-4)
    constant, _ = opened.encode(examples, "constant")
    assert (constant == constant[:1]).all() and not (tokens == tokens[:1]).all()


def test_soft_tokens_have_the_tables_size_and_only_a_constant_never_varies(opened):
    table = diagnostics.soft_token_sizes(opened, opened.test[:40])
    assert np.allclose(table["rms"], opened.pair.target.embedding_rms, rtol=1e-3)
    assert (table["varying"] > 0.001).all() and (table["varying_low"] <= table["varying"]).all()
    constant = diagnostics.soft_token_sizes(opened, opened.test[:40], "constant")
    assert constant["varying"].abs().max() < 1e-9
    assert "`rms_match` makes it so" in readings_inside.read_sizes(table, True)


def test_a_soft_token_that_is_a_vocabulary_token_finds_itself(opened):
    table = opened.pair.target.model.get_input_embeddings().weight
    constant = opened.bridges["constant"]
    kept = constant.producer.tokens.data.clone()
    ids = opened.pair.target.tokenizer.convert_tokens_to_ids(["7", "3", "1", "0"])
    constant.producer.tokens.data = table[ids].clone().float() * 3
    frame = diagnostics.nearest_tokens(opened, opened.test[:2], name="constant")
    constant.producer.tokens.data = kept
    nearest = frame[frame["rank"] == 1]
    assert list(nearest["token"]) == ["7", "3", "1", "0"] * 2 and np.allclose(nearest["cosine"], 1, atol=1e-5)
    assert "100% of the nearest tokens are digits" in readings_inside.read_neighbours(frame)
    assert readings_inside.format_neighbours(frame).count("\n") == 2 + 4


def test_entropy_is_that_of_the_targets_own_distribution(opened):
    examples = opened.test[:6]
    frame = diagnostics.answer_entropy(opened, examples)
    target, e = opened.pair.target, examples[3]
    place = e.solution.index(f"*{e.value}=") + 1
    ids = target.bos + target.tokenize([f"Question: {e.question}\nAnswer:\n{e.solution[:place]}"])[0]
    logprobs = target.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    row = frame[(frame["id"] == e.id) & (frame["condition"] == "target") & (frame["place"] == "value")].iloc[0]
    assert row["entropy"] == pytest.approx(-(logprobs.exp() * logprobs).sum().item() / np.log(2), abs=1e-4)
    digit = target.tokenizer.convert_tokens_to_ids(str(e.value)[0])
    assert row["right_probability"] == pytest.approx(logprobs[digit].exp().item(), abs=1e-4)
    assert len(frame) == 6 * 2 * 2


def test_the_value_begins_where_the_answer_first_multiplies_by_it(opened):
    tokenizer = opened.pair.target.tokenizer
    for e in opened.test[:60]:
        encoded = tokenizer(e.solution, add_special_tokens=False, return_offsets_mapping=True)
        at = diagnostics.value_place(e, encoded["offset_mapping"])
        assert tokenizer.decode(encoded["input_ids"][at:]).startswith(f"{e.value}=")
    assert diagnostics.value_place(replace(e, value=None), encoded["offset_mapping"]) is None


def test_attention_is_made_where_the_run_has_none_and_the_constant_has_none(opened, tmp_path):
    examples = opened.test[:5]
    arrays, path = diagnostics.read_attention(opened, examples, tmp_path)
    assert path == tmp_path / "attention.npz" and sorted(arrays["ids"]) == sorted(e.id for e in examples)
    assert np.allclose(arrays["mean"].sum(1), 1, atol=1e-2) and not list(tmp_path.glob("*.part*"))
    kept = opened.bridges["bridged"]
    opened.bridges["bridged"] = opened.bridges["constant"]
    assert diagnostics.read_attention(opened, examples, tmp_path / "none")[0] == {}
    opened.bridges["bridged"] = kept


def test_representations_are_compared_with_the_digits_of_the_value(opened):
    table = diagnostics.compare_representations(opened, opened.pick(None, 60))
    pairs = {frozenset((r.a, r.b)): r.cka for r in table.itertuples()}
    n = 2 * len(opened.evaluator.layers) + 4  # each layer at the word and on the mean; messages, embeddings, digits
    assert len(pairs) == n * (n - 1) / 2
    assert pairs[frozenset(("source layer 4, word end", "source layer 5, word end"))] > 0.4
    assert abs(pairs[frozenset(("target embeddings, question", "digits of the value"))]) < 0.2


@pytest.mark.parametrize("source_view", ["prompt", "solution"])
def test_the_words_end_is_found_in_whatever_the_source_reads(open_fresh, source_view):
    for task in ("weights", "context"):
        opened = open_fresh(variant=task, source_view=source_view)
        examples = opened.test[:12]
        rows = opened.evaluator.source_states("bridged", examples).rows
        for e, row in zip(examples, rows, strict=True):
            upto = opened.pair.source.tokenizer.decode(row[: diagnostics.unit_end(opened, e, row) + 1])
            assert upto.endswith(e.unit) and upto.count(e.unit) == (2 if e.facts else 1)


def test_the_probe_of_the_message_reports_each_held_out_unit_once(opened):
    frame = diagnostics.probe_message(opened, n=100)
    held = {e.unit for e in opened.test if e.group == "source_only" and e.novelty == "held_unit"}
    assert frame.set_index("novelty").loc["held_unit", "n"].iloc[0] == len(held)
    assert "held-out units" in readings_inside.read_message_probe(frame)


# ---- the causal check ---------------------------------------------------------------------------------------------


def test_an_answer_is_worked_out_again_for_any_value(opened):
    for e in opened.test:
        assert causal.answer_with(e, e.value) == e.gold
        donor = next((d for d in opened.test if d.id == e.donor_id), None)
        if donor is not None:
            assert causal.answer_with(e, donor.value) == e.donor_gold


def test_donors_leave_every_place_where_it_was_and_change_the_answer(opened):
    pairs = causal.pair_with_donors(opened, opened.test[:60])
    value_of = {u.word: (u.value, u.group, u.split) for u in opened.lexicon}
    assert len(pairs) > 50
    for lm in (opened.pair.source, opened.pair.target):
        for e, donor in pairs:
            own, other = lm.tokenize([e.question, donor.question])
            changed = [a != b for a, b in zip(own, other, strict=True)]
            assert 0 < sum(changed) <= e.question.count(e.unit) * 7
    for e, donor in pairs:
        assert value_of[donor.unit] == (donor.value, e.group, "test")
        assert donor.gold != e.gold and e.unit not in donor.question
        assert donor.question == e.question.replace(e.unit, donor.unit)
    assert pairs == causal.pair_with_donors(opened, opened.test[:60])


def test_patched_states_are_the_donors_where_asked_and_its_own_elsewhere(opened):
    pairs = causal.pair_with_donors(opened, opened.test[:8])
    states = causal.place_variants(opened, pairs)
    chunk = np.arange(len(pairs))
    got = {name: x.batch(chunk, torch.device("cpu")) for name, x in states.items()}
    own, donor = got["nowhere"][0], got["whole prompt"][0]
    word, rest = got["unit word"][0], got["all but the word"][0]
    assert torch.allclose(word + rest, own + donor, atol=1e-5) and not torch.equal(word, donor)
    for row, (e, _) in enumerate(pairs):
        taken = (word[row] != own[row]).flatten(1).any(1).nonzero().flatten().tolist()
        ids = [states["nowhere"].rows[row][i] for i in taken]
        said = opened.pair.source.tokenizer.decode(ids).replace(" ", "")
        assert said and said in e.unit * e.question.count(e.unit)  # its first letters may be the donor's as well
        assert diagnostics.unit_end(opened, e, states["nowhere"].rows[row]) in taken
    with pytest.raises(ValueError, match="same number of tokens"):
        shorter = opened.evaluator.source_states("bridged", [replace(e, question="How many?") for e, _ in pairs])
        causal.PatchedStates(states["nowhere"], shorter, [])


def test_a_constant_follows_nobody(opened):
    frame = causal.causal_check(opened, opened.test[:6])
    said = frame[frame["condition"] == "constant"].pivot(index="id", columns="variant", values="answer")
    assert set(said.columns) == set(causal.VARIANTS)
    assert (said.nunique(axis=1) == 1).all()
    table = causal.causal_table(frame)
    assert len(table) == 2 * 4 * 2 and (table["low"] <= table["share"]).all()
    assert "Constant, bridge's mix" in readings_inside.read_causal(table)


@pytest.mark.parametrize("injector", ["residual", "kv", "prefix+residual"])
def test_every_injector_can_be_looked_into(open_fresh, injector):
    opened = open_fresh(injector=injector, **(dict(n_soft_tokens=-1) if injector == "kv" else {}))
    frame = causal.causal_check(opened, opened.pick("source_only", 4), variants=("nowhere", "whole prompt"))
    closed = frame[frame["condition"] == "bridged"].groupby("id")["answer"].nunique()
    if injector != "prefix+residual":  # all gates are closed: nothing that is put into the source reaches the answer
        assert (closed == 1).all()
    entropy = diagnostics.answer_entropy(opened, opened.test[:4]).pivot(index=["id", "place"], columns="condition")
    assert entropy["entropy"].notna().all(axis=None)
    if injector != "prefix+residual":
        assert np.allclose(entropy[("entropy", "bridged")], entropy[("entropy", "target")], atol=1e-4)
    assert len(diagnostics.soft_token_sizes(opened, opened.test[:8]))
    assert len(diagnostics.compare_representations(opened, opened.pick(None, 24)))
    assert len(diagnostics.probe_message(opened, n=60))
    gates = inside.gates_from_metrics(opened.run / "metrics.jsonl")
    assert len(gates) and (gates["value"] == 0).all()


def test_facts_in_the_context_have_their_donors_in_the_same_note(open_fresh):
    opened = open_fresh(variant="context")
    pairs = causal.pair_with_donors(opened, opened.test[:40])
    assert pairs
    for e, donor in pairs:
        assert f"A {donor.unit} is {donor.value}." in e.facts and donor.facts == e.facts
    states = causal.place_variants(opened, pairs[:6])
    own, word = (states[v].batch(np.arange(6), torch.device("cpu"))[0] for v in ("nowhere", "unit word"))
    for row, (e, _) in enumerate(pairs[:6]):  # the note's own tokens stay as they were
        n = len(opened.pair.source.tokenize([e.facts])[0])
        assert torch.equal(own[row, :n], word[row, :n]) and not torch.equal(own[row], word[row])
    probe = diagnostics.probe_source(opened, every=40)
    assert set(probe["novelty"]) == {"held_unit"} and len(probe) == 6 * 3 * 3


def test_a_bridge_that_does_not_read_the_question_has_no_causal_check(open_fresh):
    opened = open_fresh(variant="context", source_view="facts")
    with pytest.raises(ConfigError, match="bridge.source_view"):
        causal.causal_check(opened, opened.test[:4])


def test_the_answer_of_a_trained_bridge_follows_the_donor(pair):
    """On the smallest kept bridge that was trained on the shipped pair: the whole chain, as the notebook runs it."""
    shipped = {role: fingerprint_folder(resolve_folder(f"{role}_model", "embedded")) for role in ("source", "target")}
    kept = [path for path in PRESERVED.glob("*/checkpoint/bridged.safetensors")
            if json.loads((path.parents[1] / "provenance.json").read_text()).items() >= shipped.items()]  # fmt: skip
    assert kept, "preserved_data holds no bridge of the shipped pair: the notebook's default run cannot be opened"
    run = min(kept, key=lambda path: path.stat().st_size).parents[1]
    opened = open_finished(run, device="cpu", pair=pair)
    table = causal.causal_table(causal.causal_check(opened, opened.pick("source_only", 24)))
    follows = table[(table["condition"] == "bridged") & (table["outcome"] == "follows")].set_index("variant")["share"]
    assert follows["whole prompt"] > 0.6 and follows["unit word"] > 0.6
    assert follows["nowhere"] < 0.2 and follows["all but the word"] < 0.2
    frame = load_eval(find_eval(run))
    shares = inside.attention_by_class(diagnostics.read_attention(opened, opened.test[:8], run)[0], frame)
    assert shares.set_index("token_class").loc["unit word", "low"] > shares["uniform"].iloc[0]


def test_swapped_runs_ask_the_other_models_units(finish, tiny):
    opened = open_finished(finish(tiny(**SIZE, direction="swapped")), device="cpu")
    taught = {u.word for u in units.make_lexicon(opened.pair.lexicon_seed) if u.group == "target_only"}
    assert {e.unit for e in opened.pick("source_only", 20)} <= taught
    assert causal.pair_with_donors(opened, opened.pick("source_only", 5))
