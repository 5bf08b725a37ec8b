"""The causal check: donors that change the answer and no place, states patched where asked, who follows whom.

python -m pytest tests/inside/test_causal.py
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bridgekit.config import ConfigError, resolve_model_folder
from bridgekit.inside import causal, measure, probe
from bridgekit.model.pair import fingerprint_folder
from bridgekit.runs import find_eval, load_eval
from bridgekit.tasks import source_prompt, units
from bridgekit.train.experiment import Experiment

PRESERVED = Path(__file__).parents[2] / "preserved_data"
CPU = torch.device("cpu")


def test_donors_leave_every_place_where_it_was_and_change_the_answer(experiment):
    pairs = causal.pair_with_donors(experiment, experiment.test[:60])
    facts = {u.word: (u.value, u.group, u.split) for u in experiment.lexicon}
    assert len(pairs) > 50 and pairs == causal.pair_with_donors(experiment, experiment.test[:60])
    for e, donor in pairs:
        assert facts[donor.unit] == (donor.value, e.group, "test")
        assert donor.gold != e.gold and e.unit not in donor.question
        assert donor.question == e.question.replace(e.unit, donor.unit)
        for lm in (experiment.pair.source, experiment.pair.target):
            own, other = lm.tokenize([e.question, donor.question])
            changed = sum(a != b for a, b in zip(own, other, strict=True))
            assert 0 < changed <= e.question.count(e.unit) * 7


def test_patched_states_are_the_donors_where_asked_and_its_own_elsewhere(experiment):
    pairs = causal.pair_with_donors(experiment, experiment.test[:8])
    states = causal.place_variants(experiment, pairs)
    own, donor, word, rest = (states[v].batch(np.arange(len(pairs)), CPU)[0] for v in causal.VARIANTS)
    assert torch.allclose(word + rest, own + donor, atol=1e-5) and not torch.equal(word, donor)
    source = experiment.pair.source
    for row, (e, _) in enumerate(pairs):
        taken = (word[row] != own[row]).flatten(1).any(1).nonzero().flatten().tolist()
        text = source.tokenizer.decode([states["nowhere"].rows[row][i] for i in taken]).replace(" ", "")
        assert text and text in e.unit * e.question.count(e.unit)  # its first letters may be the donor's as well
        assert probe.question_words(source, source_prompt(e).text, e.unit)[0].stop - 1 in taken


def test_a_constant_follows_nobody(experiment):
    answers = causal.swap_states(experiment, experiment.test[:6])
    constant = answers[answers["condition"] == "constant"].pivot(index="id", columns="variant", values="answer")
    assert set(constant.columns) == set(causal.VARIANTS) and (constant.nunique(axis=1) == 1).all()
    table = causal.causal_table(answers)
    assert len(table) == 2 * 4 * 2 and table["point"].between(table["low"], table["high"]).all()


def test_facts_in_the_context_have_their_donors_in_the_same_note(open_fresh):
    experiment = open_fresh(variant="context")
    pairs = causal.pair_with_donors(experiment, experiment.test[:40])
    assert pairs
    for e, donor in pairs:
        assert f"A {donor.unit} is {donor.value}." in e.facts and donor.facts == e.facts
    states = causal.place_variants(experiment, pairs[:6])
    own, word = (states[v].batch(np.arange(6), CPU)[0] for v in ("nowhere", "unit word"))
    for row, (e, _) in enumerate(pairs[:6]):  # the note's own tokens stay as they were
        n = len(experiment.pair.source.tokenize([e.facts])[0])
        assert torch.equal(own[row, :n], word[row, :n]) and not torch.equal(own[row], word[row])


def test_a_bridge_that_does_not_read_the_question_has_no_causal_check(open_fresh):
    experiment = open_fresh(variant="context", source_view="facts")
    with pytest.raises(ConfigError, match="bridge.source_view"):
        causal.swap_states(experiment, experiment.test[:4])


def test_swapped_runs_ask_the_other_models_units(tiny, pair):
    swapped = replace(pair, source=pair.target, target=pair.source)
    experiment, lexicon = (
        Experiment(tiny(n_test=120, direction="swapped"), pair=swapped),
        units.make_lexicon(pair.lexicon_seed),
    )
    asked = experiment.pick("source_only", 20)
    assert {e.unit for e in asked} <= {u.word for u in lexicon if u.group == "target_only"}
    assert causal.pair_with_donors(experiment, asked[:5])


def test_the_answer_of_a_trained_bridge_follows_the_donor(pair, tmp_path):
    """On the smallest kept bridge that was trained on the shipped pair: the whole chain, as the notebook runs it."""
    folders = {role: resolve_model_folder(f"{role}_model", "embedded") for role in ("source", "target")}
    shipped = {role: fingerprint_folder(folder) for role, folder in folders.items()}
    kept = [path for path in PRESERVED.glob("*/checkpoint/bridged.safetensors")
            if json.loads((path.parents[1] / "provenance.json").read_text()).items() >= shipped.items()]  # fmt: skip
    assert kept, "preserved_data holds no bridge of the shipped pair: the notebook's default run cannot be opened"
    experiment = Experiment.load(min(kept, key=lambda path: path.stat().st_size).parents[1], device="cpu", pair=pair)
    experiment.bridges.pop("constant", None)
    table = causal.causal_table(causal.swap_states(experiment, experiment.pick("source_only", 24)))
    follows = table[table["outcome"] == "follows"].set_index("variant")["point"]
    assert follows["whole prompt"] > 0.6 and follows["unit word"] > 0.6
    assert follows["nowhere"] < 0.2 and follows["all but the word"] < 0.2
    arrays, _ = measure.load_attention(experiment, experiment.test[:8], tmp_path)
    classes = measure.attention_by_class(arrays, load_eval(find_eval(experiment.run))).set_index("token_class")
    assert classes.loc["unit word", "low"] > classes.loc["unit word", "uniform"]
