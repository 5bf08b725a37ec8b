"""The linear probe: right on planted facts, at chance on noise, and looking at the tokens it says it looks at.

python -m pytest tests/inside/test_probe.py
"""

import random

import pytest
import torch

from bridgekit.inside import probe
from bridgekit.tasks import units

VALUES = torch.tensor(units.NARROW.all)


def plant(values: torch.Tensor, noise: float, seed: int) -> torch.Tensor:
    """States that hold both digits linearly, through one fixed random mixing. (N,) -> (N, 40)"""
    mixing = torch.randn(20, 40, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    extra = torch.randn(len(values), 40, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    return (probe.one_hot_digits(values) @ mixing + noise * extra) * 7 + 3


def draw(n: int, among: torch.Tensor, seed: int) -> torch.Tensor:
    return among[torch.randint(len(among), (n,), generator=torch.Generator().manual_seed(seed))]


def test_ridge_is_least_squares_with_a_free_intercept_and_a_penalty_on_the_rest():
    x = torch.randn(50, 3, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    y = x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.double) + 4.0
    assert torch.allclose(probe.fit_ridge(x, y, 1e-12).flatten(), torch.tensor([1.0, -2.0, 0.5, 4.0]).double())
    heavy = probe.fit_ridge(x, y, 1e9).flatten()
    assert heavy[:3].abs().max() < 1e-6 and heavy[3] == pytest.approx(y.mean().item())


def test_planted_digits_are_read_also_of_values_that_were_never_fitted():
    held, seen = VALUES[::8], torch.tensor([v for v in units.NARROW.all if v not in VALUES[::8]])
    fit, choose = draw(600, seen, 1), draw(100, seen, 2)
    fitted = probe.DigitProbe(plant(fit, 0.1, 1), fit, plant(choose, 0.1, 2), choose)
    for values in (draw(200, seen, 3), draw(200, held, 4)):
        assert fitted.right(plant(values, 0.1, 5), values)[2].double().mean() > 0.98


def test_places_are_the_words_last_token_the_next_one_and_the_prompts_last(pair):
    lm = pair.source
    asked = probe.ask_units(random.Random(1).sample(units.make_lexicon(pair.lexicon_seed), 60), random.Random(2))
    for a, row, (end, after, last) in zip(asked, *probe.find_places(lm, asked), strict=True):
        assert row[: len(lm.bos)] == lm.bos and after == end + 1 and last == len(row) - 1
        upto, past = lm.tokenizer.decode(row[: end + 1]), lm.tokenizer.decode(row[: end + 2])
        assert upto.endswith(a.unit) and not past.endswith(a.unit)
        assert a.unit not in lm.tokenizer.decode(row[:end])  # the first time it is said


def test_with_facts_in_front_the_word_is_that_of_the_question(pair):
    examples = units.make_examples(units.make_lexicon(pair.lexicon_seed), "test", 20, 1, variant="context")
    for e, row, (end, *_) in zip(examples, *probe.find_places(pair.source, examples), strict=True):
        upto = pair.source.tokenizer.decode(row[: end + 1])
        assert e.unit in e.facts and upto.count(e.unit) == 2 and upto.endswith(e.unit)


def test_states_are_those_of_the_prompt_alone_whatever_the_batch(pair):
    asked = probe.ask_units(units.make_lexicon(pair.lexicon_seed)[:9], random.Random(3))
    rows, places = probe.find_places(pair.source, asked)
    for row, at, got in zip(rows, places, probe.place_states(pair.source, asked, (0, 2, 5)), strict=True):
        alone = pair.source.hidden_states(torch.tensor([row]), torch.ones(1, len(row)).long(), (0, 2, 5))[0]
        assert torch.allclose(got, alone[list(at)], atol=1e-4)


@pytest.mark.parametrize("report", ["test", "val"])
def test_no_unit_is_both_fitted_and_reported_on_and_no_held_value_is_fitted(pair, report):
    lexicon = units.make_lexicon(pair.lexicon_seed)
    fit, choose, report_on = probe.pick_probe_units(lexicon, "source", report)
    words = [u.word for part in (fit, choose, *report_on.values()) for u in part]
    assert len(words) == len(set(words)) and set(report_on) == set(probe.NOVELTIES)
    assert not {u.value for u in report_on["held_value"]} & {u.value for u in fit + choose}
    assert {u.value for u in report_on["held_unit"]} <= {u.value for u in fit}
    assert {u.group for u in report_on["not taught"]} == {"target_only"}
    if report == "val":
        assert not any(u.split == "test" for part in (fit, choose, *report_on.values()) for u in part)
    with pytest.raises(ValueError, match="'train'"):
        probe.pick_probe_units(lexicon, "source", "train")


def test_the_shipped_source_holds_its_facts_at_the_words_end_and_not_in_its_embeddings(pair):
    lexicon = units.make_lexicon(pair.lexicon_seed)[::3]
    frame = probe.probe_pair(pair.source, lexicon, layers=(0, 2))
    assert len(frame) == 2 * 3 * 3 * 3 and frame["point"].between(frame["low"], frame["high"]).all()
    joint = frame[(frame["digit"] == "joint") & (frame["place"] == "word end")].set_index(["layer", "novelty"])["point"]
    assert joint[2, "held_unit"] > 0.5 > 0.1 > joint[0, "held_unit"]
    assert joint[2, "not taught"] < 0.1
    held = sum(u.novelty == "held_unit" and u.split == "test" and u.group != "target_only" for u in lexicon)
    assert set(frame[frame["novelty"] == "held_unit"]["n"]) == {held}  # each unit is asked once
