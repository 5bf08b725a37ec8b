"""The texts that a pair is taught: nothing of the other model's units, and the kinds that were asked for.

python -m pytest tests/train/test_corpus.py
"""

import re

import pytest

from bridgekit.tasks import units
from bridgekit.train.corpus import make_documents

SEED = 3


def words_of(lexicon, **wanted) -> set[str]:
    return {u.word for u in lexicon if all(getattr(u, key) == value for key, value in wanted.items())}


@pytest.mark.parametrize("role, other", [("source", "target_only"), ("target", "source_only")])
def test_a_corpus_mentions_no_unit_its_model_is_not_meant_to_know(role, other):
    lexicon = units.make_lexicon(SEED)
    values = {u.word: u.value for u in units.known_units(lexicon, role)}
    documents = make_documents(lexicon, role, 4000, SEED)
    said = {word for text in documents for word in re.findall(r"[a-z]+", "".join(text))}
    assert not said & words_of(lexicon, group=other)
    assert len(said & set(values)) > 0.5 * len(values)
    for prompt, answer in documents:
        for word, value in re.findall(r"A (\w+) is (\d+)\.", answer):
            assert values[word] == int(value)
        if prompt.startswith("Question: "):  # neither note nor helper: the answer is the unit's own
            unit = next(word for word in re.findall(r"[a-z]+", prompt) if word in values)
            assert f"*{values[unit]}=" in answer


def test_a_corpus_has_the_kinds_of_documents_it_was_asked_for(capsys):
    from bridgekit.train.pretrain import main

    lexicon = units.make_lexicon(SEED)
    notes = make_documents(lexicon, "source", 200, SEED, {"note": 1})
    assert all(prompt.startswith("Note: ") for prompt, _ in notes)
    both = make_documents(lexicon, "source", 400, SEED, {"note": 1, "problem": 3})
    assert 60 < sum(prompt.startswith("Note: ") for prompt, _ in both) < 140
    for sizes in ((3,), (1, 16)):
        notes = make_documents(lexicon, "target", 60, SEED, {"note": 1}, sizes)
        assert {len(re.findall(r"A \w+ is \d+\.", prompt)) for prompt, _ in notes} == set(sizes)
    for option, wrong, said in (
        ("--kinds", "note", "expected e.g."),
        ("--kinds", "poem=3", "no kind 'poem'"),
        ("--kinds", "note=0", "not all 0"),
        ("--note-facts", "1;4", "expected e.g."),
        ("--note-facts", "4,0", "at least one fact"),
    ):
        with pytest.raises(SystemExit):
            main(["--out", "x", option, wrong])
        assert said in capsys.readouterr().err
