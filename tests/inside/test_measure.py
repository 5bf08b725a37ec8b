"""What is measured inside a bridge, against cases whose answer is known.

python -m pytest tests/inside/test_measure.py
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from bridgekit.inside import measure

RNG = np.random.default_rng


def test_picked_examples_ask_each_unit_once_before_any_twice(open_fresh):
    words = [e.unit for e in open_fresh(n_test=2000).pick("source_only", 1000)]
    n = len(set(words))
    assert len(set(words[:n])) == n < len(words)


def test_messages_do_not_depend_on_the_batch_nor_on_whether_the_bridge_is_in_training(open_fresh):
    experiment = open_fresh(state_dropout=0.5)
    examples = experiment.test[:70]  # more than one batch
    tokens, mask = experiment.encode(examples)
    alone, _ = experiment.encode(examples[66:67])
    assert tokens.shape == (70, 4, experiment.pair.target.hidden_size) and mask.all()
    assert torch.allclose(tokens[66], alone[0], atol=1e-4)
    constant, _ = experiment.encode(examples, "constant")
    assert (constant == constant[:1]).all() and not (tokens == tokens[:1]).all()
    training = experiment.build_bridge().train()
    assert torch.equal(experiment.encode(examples, training)[0], tokens) and training.training


def test_a_soft_token_that_is_a_vocabulary_token_finds_itself_also_in_an_untrained_bridge(experiment):
    constant, target = experiment.build_bridge("constant"), experiment.pair.target
    ids = target.tokenizer.convert_tokens_to_ids(["7", "3", "1", "0"])
    constant.producer.tokens.data = target.model.get_input_embeddings().weight[ids].clone().float() * 3
    words = measure.nearest_words(experiment, constant, experiment.test[:2])
    nearest = words[words["rank"] == 1]
    assert list(nearest["token"]) == ["7", "3", "1", "0"] * 2 and np.allclose(nearest["cosine"], 1, atol=1e-5)
    assert 0 < words["chance"].iloc[0] < 0.9
    table = measure.tabulate_words(words, most=3)
    assert table.shape == (3, 3) and table.iloc[0, 1].startswith("<code>7</code> 1.00<br>")


def test_what_the_browser_shows_of_a_message_is_escaped(experiment, monkeypatch):
    monkeypatch.setattr(type(experiment.pair.target.tokenizer), "decode", lambda *a, **k: "<b>$x|\n")
    text = measure.describe_message(experiment)(experiment.test[0].id)
    assert "<b>" not in text and "$" not in text and text.count("<tr>") == 1 + 4


def test_soft_tokens_have_the_tables_size_and_only_a_constant_never_varies(experiment):
    table = measure.soft_token_sizes(experiment, experiment.test[:40])
    assert np.allclose(table["rms"], table["table_rms"], rtol=1e-3) and (table["point"] > 0.001).all()
    assert measure.soft_token_sizes(experiment, experiment.test[:40], "constant")["point"].abs().max() < 1e-9


def test_the_share_of_a_soft_token_that_varies_is_the_planted_one():
    fixed, own = RNG(1).normal(size=(1, 3, 200)), RNG(2).normal(size=(150, 3, 200))
    fixed *= np.sqrt(200 / (fixed**2).sum(2, keepdims=True))
    table = measure.varying_share(fixed + own * np.array([0, 1, 3])[None, :, None])
    assert table["point"].tolist() == pytest.approx([0, 0.5, 0.9], abs=0.04)
    assert table["point"].between(table["low"], table["high"]).all()
    assert (table["high"] - table["low"])[1:].max() < 0.1
    few = measure.varying_share(RNG(3).normal(size=(4, 1, 20_000)))["point"]
    assert few.tolist() == pytest.approx([1], abs=0.02)  # nothing is shared, though the mean of four is no zero


def test_entropy_is_that_of_the_targets_own_distribution(experiment):
    examples = experiment.test[:6]
    frame = measure.answer_entropy(experiment, examples)
    target, e = experiment.pair.target, examples[3]
    place = e.solution.index(f"*{e.value}=") + 1
    ids = target.bos + target.tokenize([f"Question: {e.question}\nAnswer:\n{e.solution[:place]}"])[0]
    logprobs = target.model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = frame[(frame["id"] == e.id) & (frame["condition"] == "target")].iloc[0]
    assert found["entropy"] == pytest.approx(-(logprobs.exp() * logprobs).sum().item() / np.log(2), abs=1e-4)
    digit = target.tokenizer.convert_tokens_to_ids(str(e.value)[0])
    assert found["right"] == pytest.approx(logprobs[digit].exp().item(), abs=1e-4)
    table = measure.entropy_table(frame)
    assert len(frame) == 6 * 2 and (table["low"] >= 0).all()
    assert table[table["measure"] == "right"]["high"].max() <= 1


# ---- attention and gates --------------------------------------------------------------------------------------------

FRAME = pd.DataFrame({"id": ["q1", "q2", "q3"], "unit": ["pim", "pim", "tor"], "value": [12, 12, 40],
                      "group": ["both", "both", "source_only"]})  # fmt: skip
ARRAYS = {
    "ids": np.array(["q1", "q2", "q3"]),
    "mean": np.array([[0.5, 0.3, 0.2, 0.0], [0.5, 0.1, 0.4, 0.0], [0.8, 0.1, 0.05, 0.05]], np.float16),
    "token_class": np.array([[1, 2, 0, -1], [1, 2, 0, -1], [1, 2, 0, 0]], np.int8),
    "map/q1": np.full((2, 3), 1 / 3, np.float16), "tokens/q1": np.array(["a", "b", "c"]),
    "map/q3": np.full((2, 4), 1 / 4, np.float16), "tokens/q3": np.array(["a", "b", "c", "d"]),
}  # fmt: skip


def test_attention_by_class_is_the_mean_share_beside_an_even_one():
    table = measure.attention_by_class(ARRAYS, FRAME).set_index("token_class")
    assert list(table.index) == ["unit word", "digits", "rest"]
    assert table["point"].tolist() == pytest.approx([0.6, 1 / 6, 0.7 / 3], abs=1e-3)
    assert table["uniform"].tolist() == pytest.approx([(1 / 3 + 1 / 3 + 1 / 4) / 3] * 2 + [(1 / 3 + 1 / 3 + 1 / 2) / 3])
    assert (table["n"] == 3).all() and (table["n_units"] == 2).all()
    with pytest.raises(ValueError, match="different runs"):
        measure.attention_by_class(ARRAYS, FRAME.assign(id="x"))


def test_maps_of_what_only_the_source_knew_come_first_with_their_tokens():
    assert measure.map_ids(ARRAYS, FRAME, 5) == {"q3": "A tor is 40", "q1": "A pim is 12"}
    rows = measure.map_frame(ARRAYS, "q3")
    assert list(rows["token"]) == list("abcd") * 2 and rows["weight"].sum() == pytest.approx(2)


def test_attention_is_made_where_the_run_has_none_and_stays_small(experiment, tmp_path, monkeypatch):
    examples = experiment.test[:20]
    arrays, path = measure.load_attention(experiment, examples, tmp_path)
    assert path == tmp_path / "attention.npz" and sorted(arrays["ids"]) == sorted(e.id for e in examples)
    assert np.allclose(arrays["mean"].sum(1), 1, atol=1e-2)
    assert sum(key.startswith("map/") for key in arrays) == 16  # of the others the mean over soft tokens alone
    monkeypatch.setitem(experiment.bridges, "bridged", experiment.bridges["constant"])
    assert measure.load_attention(experiment, examples[:2], tmp_path / "none")[0] == {}


def draw_states(n=120, width=20, seed=0):
    return RNG(seed).normal(size=(n, width)) * np.linspace(0.2, 3, width)


def cka(x, y):
    return measure.cka_table({"x": x, "y": y}, range(len(x)))["point"].item()


def test_cka_does_not_change_under_rotation_scale_and_shift_and_falls_with_noise():
    x, rotation = draw_states(), stats.ortho_group.rvs(20, random_state=1)
    y = draw_states(seed=2) + x
    assert cka(x, x) == pytest.approx(1) and cka(x, 7 * x @ rotation + 3) == pytest.approx(1)
    assert cka(x, y) == pytest.approx(cka(x @ rotation, 0.1 * y - 5)) == pytest.approx(cka(y, x))
    falling = [cka(x, x + s * draw_states(seed=3)) for s in (0, 0.5, 1, 2, 8)]
    assert falling == sorted(falling, reverse=True) and falling[-1] < 0.2 < 0.8 < falling[1]
    assert cka(x, np.ones((120, 3))) == pytest.approx(0)


def test_cka_of_independent_states_is_about_zero_also_where_they_are_wider_than_many():
    """The plain estimate is far above zero there: with 2,000 wide states of 100 questions it is about 0.95."""
    found = [cka(RNG(i).normal(size=(100, 2000)), RNG(900 + i).normal(size=(100, 2000))) for i in range(8)]
    assert abs(np.mean(found)) < 0.03 and max(map(abs, found)) < 0.15


def test_cka_intervals_leave_out_units_and_cover_the_value_of_many():
    mixing, large = RNG(5).normal(size=(20, 20)), draw_states(2000, seed=6)
    truth, covered = cka(large, large @ mixing), 0
    for i in range(40):
        x = draw_states(80, seed=100 + i)
        row = measure.cka_table({"a": x, "b": x @ mixing}, range(80)).iloc[0]
        covered += row["low"] <= truth <= row["high"]
    assert covered >= 34
    with pytest.raises(ValueError, match="too few"):
        measure.cka_table({"a": x, "b": x}, [0] * 80)


def test_the_probe_of_the_message_reports_each_held_out_unit_once(experiment, monkeypatch):
    pick = experiment.pick
    monkeypatch.setattr(experiment, "pick", lambda group, n: 2 * pick(group, n))
    frame = measure.probe_message(experiment, n=100)
    held = {e.unit for e in experiment.test if e.group == "source_only" and e.novelty == "held_unit"}
    assert set(frame[frame["novelty"] == "held_unit"]["n"]) == {len(held)}


@pytest.mark.parametrize(
    "changes",
    [dict(injector="kv", n_soft_tokens=-1), dict(injector="residual", variant="context", source_view="facts")],
)
def test_every_bridge_can_be_looked_into(open_fresh, changes):
    experiment = open_fresh(**changes)
    examples = experiment.test[:8]
    entropy = measure.answer_entropy(experiment, examples).set_index(["condition", "id"])[["entropy", "right"]]
    assert entropy.notna().all(axis=None)
    assert np.allclose(entropy.loc["bridged"], entropy.loc["target"], atol=1e-4)  # closed gates
    assert len(measure.soft_token_sizes(experiment, examples)) and len(measure.probe_message(experiment, n=60))
    names = set(measure.compare_representations(experiment, experiment.pick(None, 24))["a"])
    assert f"source layer {experiment.layers[0]}, word end" in names
    without = [replace(e, unit=None, value=None) for e in experiment.pick(None, 24)]  # a task that has no units
    assert not any("word" in name for name in measure.compare_representations(experiment, without)["a"])


def test_facts_in_the_context_are_probed_on_problems(open_fresh):
    frame = measure.probe_source(open_fresh(variant="context"), every=80)
    assert set(frame["novelty"]) == {"held_unit"} and len(frame) == 6 * 3 * 3


def test_a_look_inside_reads_whole_answers_whatever_was_supervised(open_fresh, experiment):
    short = open_fresh(answer_tokens=4)
    whole, supervised = short.training_set(experiment.test[:3]), short.training_data()
    assert min(whole.texts.answers.lengths) > 4 == max(supervised.texts.answers.lengths)
