"""What the models of a pair are taught, the recipe of a pair, its training loop and its record.

python -m pytest tests/train/test_pretrain.py
"""

import hashlib
import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch

from bridgekit import cli
from bridgekit.tasks import units
from bridgekit.train import pretrain
from bridgekit.train.corpus import make_documents

SEED = 3
SMALL = dict(hidden=16, layers=1, heads=2, kv_heads=2, feed_forward=32, vocab=300)

OLD_KINDS = {"problem": 42, "fact": 32, "note": 15, "helper": 11}
HASHES = {  # of documents, notes and the tokenizer
    "source": ["10f0d5049e43", "ba6c8b5cef5e", "20206a4b050a"],
    "target": ["733df85a180b", "2f18accd2275", "27f2449b0b11"],
}


def test_documents_and_tokenizers_are_the_same_for_a_seed_on_every_machine():
    """The shipped pair was taught these: a change of any draw would be a pair that nobody has looked at."""
    lexicon = units.make_lexicon(2)
    for role, vocab in (("source", 1024), ("target", 1536)):
        documents = make_documents(lexicon, role, 3000, 2, OLD_KINDS)
        notes = make_documents(lexicon, role, 1000, 2, {"note": 60, "problem": 40}, (1, 4, 16))
        tokenizer = pretrain.train_tokenizer(role, [p + a for p, a in documents], vocab).backend_tokenizer.to_str()
        texts = json.dumps(documents), json.dumps(notes), tokenizer
        assert [hashlib.sha256(text.encode()).hexdigest()[:12] for text in texts] == HASHES[role]


@pytest.mark.parametrize("role, other", [("source", "target_only"), ("target", "source_only")])
def test_a_corpus_mentions_no_unit_its_model_is_not_meant_to_know(role, other):
    lexicon = units.make_lexicon(SEED)
    values = {u.word: u.value for u in units.known_units(lexicon, role)}
    documents = make_documents(lexicon, role, 4000, SEED)
    mentioned = {word for text in documents for word in re.findall(r"[a-z]+", "".join(text))}
    assert not mentioned & {u.word for u in lexicon if u.group == other}
    assert len(mentioned & set(values)) > 0.5 * len(values)
    for prompt, answer in documents:
        for word, value in [] if prompt else re.findall(r"A (\w+) is (\d+)\.", answer):
            assert values[word] == int(value)
        if prompt.startswith("Question: ") and answer:  # neither note nor helper: the answer is the unit's own
            unit = next(word for word in re.findall(r"[a-z]+", prompt) if word in values)
            assert f"*{values[unit]}=" in answer


@pytest.mark.parametrize(
    "options, text",
    [
        (["--kinds", "note"], "kinds: expected e.g."),
        (["--kinds", "poem=3"], "kinds: no 'poem'"),
        (["--kinds", "note=0"], "all weights are 0"),
        (["--note-facts", "4,0"], "note_facts: expected e.g. 1,4,16"),
        (["--shape", "hiden=3"], "shape: no 'hiden'"),
        (["--shape", "hidden=0"], "shape: every size must be above 0"),
        (["--stepz", "3"], "did you mean 'steps'"),
        (["--steps", "0"], "steps: must be >= 1"),
        (["--lr", "nan"], "lr: must be > 0"),
    ],
)
def test_a_recipe_that_cannot_be_made_is_refused_in_one_line(tmp_path, capsys, options, text):
    assert cli.main(["pair", "--out", str(tmp_path / "pair"), *options]) == 2
    error = capsys.readouterr().err
    assert text in error and error.count("\n") == 1 and not (tmp_path / "pair").exists()


def test_options_of_the_command_are_the_recipe():
    argv = "--out x --lexicon-seed 5 --kinds note=60,problem=40 --note-facts 1,4 --shape layers=2 --lr 1e-4".split()
    recipe = pretrain.parse_recipe(argv)
    assert (recipe.lexicon_seed, recipe.lr, recipe.kinds) == (5, 1e-4, {"note": 60, "problem": 40})
    assert recipe.note_facts == (1, 4) and recipe.shape == {"layers": 2}
    assert pretrain.parse_recipe(argv[:2]).kinds == pretrain.KINDS


def test_a_pair_is_made_by_two_children_that_end_with_it_and_its_record_comes_last(tmp_path, monkeypatch):
    shape = ",".join(f"{name}={size}" for name, size in (SMALL | {"vocab": 400}).items())
    argv = ["--out", str(tmp_path / "pair"), "--steps", "2", "--documents", "600", "--batch", "2", "--shape", shape]
    watched = []

    def run(command, env):
        assert env["BRIDGEKIT_PARENT_PID"] == str(os.getpid()) and not (tmp_path / "pair" / "pair.json").exists()
        pretrain.main(command[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(pretrain.subprocess, "run", run)
    monkeypatch.setattr(pretrain.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pretrain, "watch_parent", lambda: watched.append(True))
    for name in ("measure_knowledge", "measure_probe"):
        monkeypatch.setattr(pretrain, name, lambda *model: {})
    pretrain.main(argv)
    assert len(watched) == 3
    record = json.loads((tmp_path / "pair" / "pair.json").read_text())
    assert list(record) == ["lexicon_seed", "lexicon", "accepted", "models", "torch"]
    assert record["accepted"] is False  # nothing was measured
    fields = "role parameters steps batch lr digit_weight documents kinds note_facts seconds validation probe"
    assert [list(model) for model in record["models"]] == [fields.split()] * 2
    assert sorted(path.name for path in (tmp_path / "pair").iterdir()) == ["pair.json", "source", "target"]
    with pytest.raises(ValueError, match="already holds a pair"):
        pretrain.main(argv)


def test_what_a_model_knows_is_measured_on_validation_units(pair):
    lexicon = units.make_lexicon(pair.lexicon_seed)
    shares = pretrain.measure_knowledge(pair.source, lexicon, "source", n=30)
    assert set(shares) == {"known", "unknown", "told", "among_4", "among_16", "among_64"}
    assert shares["known"] > 0.9 > 0.3 > shares["unknown"] and shares["told"] > 0.9
    probe = pretrain.measure_probe(pair.source, lexicon[::12], "source")
    assert list(probe) == [0, 1, 2, 3, 4, 5] and set(probe[0]) == {"held_unit", "held_value"}
    json.dumps(probe)


def test_only_weighed_tokens_are_learned_and_a_line_of_the_log_is_the_mean_since_the_last(capsys):
    """`fit` on a table of bigrams: the weighed token is predicted from the one before it, and nothing else moves."""

    class Bigrams(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.logits = torch.nn.Parameter(torch.arange(25.0).view(5, 5).sin())
            self.states = torch.nn.Parameter(torch.arange(30.0).view(5, 6).cos())
            self.config = SimpleNamespace(hidden_size=6, num_hidden_layers=0)

        def forward(self, input_ids, use_cache, output_hidden_states):
            hidden = [self.states[input_ids], None] if output_hidden_states else None
            return SimpleNamespace(logits=self.logits[input_ids], hidden_states=hidden)

    model, ids, weights = Bigrams(), torch.tensor([[1, 2, 3, 4]]), torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    before = model.logits.detach().clone()
    options = "--out x --steps 5 --log-every 4 --batch 1 --lr 1e-6 --weight-decay 0 --digit-weight 0"
    recipe = pretrain.parse_recipe(options.split())
    nothing = torch.zeros_like(ids)
    pretrain.fit(model, ids, weights, nothing, recipe, "source")
    lines = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert lines == pytest.approx([-before[2].log_softmax(-1)[3].item()] * 2, abs=2e-4)  # nearly nothing is learned
    assert (model.logits != before).any(1).tolist() == [False, False, True, False, False]


def test_digits_are_read_where_a_known_word_ends_and_nowhere_else():
    """Fitted to one marked token, the reading is right of that token's state; the other states stay as they were."""
    torch.manual_seed(0)
    read = torch.zeros(1, 3, 22, requires_grad=True)
    marks = torch.tensor([[0, 47, 0]])
    before = pretrain.digit_loss(read, marks)
    before.backward()
    assert before.item() == pytest.approx(2 * math.log(11)) and (read.grad[0, [0, 2]] == 0).all()
    right = torch.zeros(1, 3, 22)
    right[0, 1, [4, 11 + 7]] = 50.0
    assert pretrain.digit_loss(right, marks) < 1e-6 < pretrain.digit_loss(right, torch.tensor([[0, 74, 0]]))


def test_of_an_unknown_word_no_digit_is_read():
    read, marks = torch.zeros(1, 2, 22), torch.tensor([[0, pretrain.UNKNOWN]])
    read[0, 1, [10, 11 + 10]] = 50.0
    assert pretrain.digit_loss(read, marks) < 1e-6 < pretrain.digit_loss(read, torch.tensor([[0, 10]]))


@pytest.mark.parametrize("role", pretrain.ROLES)
def test_a_word_that_nothing_said_before_is_marked_as_unknown(role):
    """By the documents' own words: in a prompt the first time, and not where the answer says it once more."""
    lexicon = units.make_lexicon(21)
    values = {u.word: u.value for u in units.known_units(lexicon, role)}
    documents = make_documents(lexicon, role, 400, 1)
    tokenizer = pretrain.train_tokenizer(role, [prompt + answer for prompt, answer in documents], 600)
    ids, _, marks = (part.flatten() for part in pretrain.pack_documents(tokenizer, documents, 0.1, values))
    met = [tokenizer.decode(ids[: int(i) + 1][-12:]) for i in (marks == pretrain.UNKNOWN).nonzero()]
    wanted = []
    for prompt, _ in documents:
        words = dict.fromkeys(word for word in re.findall("[a-z]+", prompt) if units.is_invented(word))
        wanted += [word for word in words if word not in values]
    assert len(met) > 300 and all(text.endswith(word) for text, word in zip(met, wanted, strict=False))
    assert not set(wanted) & {unit.word for unit in lexicon}


@pytest.mark.parametrize("role", pretrain.ROLES)
def test_the_last_token_of_every_known_word_is_marked_with_its_value(role):
    lexicon = units.make_lexicon(21)
    values = {u.word: u.value for u in units.known_units(lexicon, role)}
    documents = make_documents(lexicon, role, 300, 1, {"problem": 3, "fact": 3, "note": 1, "helper": 2, "recall": 1})
    texts = [prompt + answer for prompt, answer in documents]
    tokenizer = pretrain.train_tokenizer(role, texts, 600)
    for text, (ids, marks) in zip(texts, pretrain.tokenize_marked(tokenizer, texts, values), strict=True):
        ends = [tokenizer.decode(ids[: i + 1])[-20:] for i, mark in enumerate(marks) if mark > 0]
        said = [word for word in re.findall("[a-z]+", text) if word in values]
        assert [mark for mark in marks if mark > 0] == [values[word] for word in said]
        assert all(end.endswith(word) for end, word in zip(ends, said, strict=True))


@pytest.mark.parametrize(
    "changes, wanted", [({}, True), ({"known": 0.9}, False), ({"told": 0.9}, False), ({"held_value": 0.9}, False)]
)
def test_a_model_is_accepted_for_what_it_knows_is_told_and_how_it_holds_values(changes, wanted):
    right = {"known": 1.0, "told": 0.98, "held_value": 0.97} | changes
    probe = {"0": {"held_unit": 1.0, "held_value": 0.0}, "3": {"held_value": right.pop("held_value")}}
    assert pretrain.is_accepted({"validation": right, "probe": probe}) is wanted


def test_a_recall_states_the_facts_of_its_note_once_more():
    lexicon = units.make_lexicon(21)
    for note, answer in make_documents(lexicon, "source", 200, 1, {"recall": 1}):
        facts = dict(re.findall(r"A (\w+) is (\d+)\.", note))
        stated = set(re.findall("[a-z]+", answer)) & facts.keys()
        assert stated == facts.keys() and not facts.keys() & {u.word for u in lexicon}
        for word, value in re.findall(r"A (\w+) is (\d+)\.", answer):
            assert facts[word] == value


def test_the_start_of_a_document_is_not_learned_and_a_list_of_facts_only_in_its_digits():
    tokenizer = pretrain.train_tokenizer("source", ["A bag has 12 pins.", "sisak: 15", "0123456789"] * 40, 300)
    documents = [("A bag", "12"), ("", "sisak: 15")] * 200
    ids, weights, marks = pretrain.pack_documents(tokenizer, documents, 0.25, {"bag": 12})
    assert set(marks.unique().tolist()) == {0, 12} and (weights[marks > 0] == 0.25).all()
    digits = torch.tensor(tokenizer.convert_tokens_to_ids(list("0123456789")))
    assert (weights[ids == tokenizer.bos_token_id] == 0).all() and (weights[torch.isin(ids, digits)] == 1).all()
    assert weights.unique().tolist() == [0.0, 0.25, 1.0]
