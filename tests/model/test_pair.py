"""The pair: whole, small, frozen, right about what it knows; prompts cut into pieces, no token changed.

python -m pytest tests/model/test_pair.py
"""

import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import refused
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.config import EMBEDDED, ConfigError, is_geometry, load_config
from bridgekit.model import fingerprint
from bridgekit.model.fingerprint import fingerprint_folder
from bridgekit.model.generation import generate_batch
from bridgekit.model.geometry import make_geometry
from bridgekit.model.pair import (
    LanguageModel,
    format_prompts,
    load_model,
    load_pair,
    split_prompts,
    word_tokens,
)
from bridgekit.tasks import Prompt, literal_prompt, load_examples, units
from bridgekit.tasks.answers import extract_answer
from bridgekit.tasks.models import ask_hub, check_models, explain_hub, pick_layers

ROLES = ("source", "target")


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded pair that a test may damage, and the configuration that asks for it."""
    folder = tmp_path / "pair"
    shutil.copytree(EMBEDDED, folder)
    return folder, load_config(source_model=str(folder / "source"), target_model=str(folder / "target"))


def refuse(config, *named: str) -> None:
    message = refused(load_pair, config)
    assert all(part in message for part in named), message


# -- the embedded pair --------------------------------------------------------------------------------------


def test_each_model_knows_its_own_units_and_together_they_know_all(pair):
    examples, right = load_examples(load_config(n_val=160, val_samples=160), pair.lexicon_seed, "val"), {}
    groups = np.array([e.group for e in examples])
    for role in ROLES:
        lm = getattr(pair, role)
        rows = [lm.bos + p.all for p in split_prompts(lm, [literal_prompt(e) for e in examples])]
        texts = [g.text for g in generate_batch(lm, rows, [[] for _ in rows])]
        right[role] = np.array([extract_answer(t) == e.gold for t, e in zip(texts, examples, strict=True)])
        assert not any(p.requires_grad for p in lm.model.parameters()) and not lm.model.training
        knows = np.isin(groups, (f"{role}_only", "both"))
        assert right[role][knows].mean() > 0.95 and right[role][~knows].mean() < 0.2
    assert (right["source"] | right["target"]).mean() > 0.95


def test_a_fingerprint_changes_with_a_byte_and_end_tokens_enter_the_key_of_cached_texts_alone(copied):
    folder, config = copied
    before, path = load_pair(config).target, folder / "target/generation_config.json"
    assert before.fingerprint == "9ab9844ce8054c80"  # as kept runs name it
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [3, *before.eos_ids]}))
    after = load_pair(config).target
    assert after.fingerprint == before.fingerprint and after.decode_key != before.decode_key
    assert after.eos_ids == before.eos_ids | {3} and after.end_id == before.end_id
    for name in ("model.safetensors", "tokenizer.json"):
        data = (folder / "target" / name).read_bytes()
        (folder / "target" / name).write_bytes(data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])
        assert fingerprint_folder(folder / "target") != before.fingerprint
        (folder / "target" / name).write_bytes(data)


# -- prompts in pieces --------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@given(text=st.text("Hal s9\n.数é", max_size=24), cuts=st.tuples(st.integers(0, 24), st.integers(0, 24)))
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_whole_texts_tokens_and_one_on_a_boundary_goes_to_the_earlier(pair, role, text, cuts):
    lm = getattr(pair, role)
    first, second = sorted(cuts)
    (pieces,) = split_prompts(lm, [Prompt(text[:first], text[first:second], text[second:])])
    assert pieces.all == lm.tokenize([text])[0]
    # Counted by hand: a piece begins with the first token that starts at or after the cut.
    starts = [a for a, _ in lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]]
    place = [next((i for i, s in enumerate(starts) if s >= cut), len(starts)) for cut in (first, second)]
    assert (len(pieces.prefix), len(pieces.prefix + pieces.question)) == tuple(place)


@pytest.mark.parametrize("role", ROLES)
def test_a_words_tokens_are_those_that_share_its_characters(pair, val, role):
    lm = getattr(pair, role)
    for e in val[:12]:
        text = literal_prompt(e).text
        (ids,), found = lm.tokenize([text]), word_tokens(lm, text, e.unit)
        assert len(found) == text.count(e.unit) > 0
        for tokens in found:
            assert e.unit in lm.tokenizer.decode([ids[i] for i in tokens])
            for fewer in (tokens[1:], tokens[:-1]):  # and none of them is there for nothing
                assert e.unit not in lm.tokenizer.decode([ids[i] for i in fewer])
    assert len(word_tokens(lm, "A sisaken is no sisak.", "sisak")) == 1


@pytest.mark.parametrize("role", ROLES)
def test_an_answer_after_its_prompt_has_the_embedded_pairs_own_tokens(pair, val, role):
    lm, prompts, answers = getattr(pair, role), [literal_prompt(e).text for e in val], [e.solution for e in val]
    assert lm.tokenize_after(prompts, answers) == lm.locate(answers)
    # " 3" after "Question:" is one token with its space, and it belongs to the answer.
    (ids,), (offsets,) = lm.tokenize_after(["Question:"], [" 3 pins"])
    assert lm.tokenize(["Question:"])[0] + ids == lm.tokenize(["Question: 3 pins"])[0]
    assert offsets[0][0] == 0 and offsets[-1][1] == len(" 3 pins")
    # "Answer" is one token that stands in neither part, so what follows is tokenized alone.
    assert len(lm.tokenize(["Answer"])[0]) == 1 and lm.tokenize_after(["Ans"], ["wer"])[0] == lm.tokenize(["wer"])


def test_an_answer_has_no_mark_that_a_tokenizer_puts_before_every_text(pair):
    from tokenizers import pre_tokenizers

    marks = tokenizer_of(pair.source)
    marks.backend_tokenizer.normalizer = None
    marks.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    lm = LanguageModel(pair.source.model, marks, "marks", "none")
    alone, ((ids,), (offsets,)) = lm.tokenize(["So 3"])[0], lm.tokenize_after(["Answer:\n"], ["So 3"])
    assert ids != alone and lm.tokenize(["Answer:\n"])[0] + ids == lm.tokenize(["Answer:\nSo 3"])[0]
    assert offsets[0][0] == 0 and offsets[-1][1] == 4


def tokenizer_of(lm):
    """The embedded tokenizer of a model, loaded again, so that a test may change it."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(lm.tokenizer.name_or_path)


def test_a_chat_prompt_is_a_users_turn_and_its_answer_ends_as_a_turn_does(pair, val):
    tokenizer, plain = tokenizer_of(pair.target), pair.target
    with pytest.raises(ConfigError, match="^pair.prompt_format: 'x' has no chat template"):
        LanguageModel(plain.model, tokenizer, "x", "none", "chat")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
        "{{ '<|end|>' if m.role == 'assistant' else '<turn>' }}{% endfor %}"
        "{{ '[assistant]\n' if add_generation_prompt }}"
    )
    lm = LanguageModel(plain.model, tokenizer, "x", "none", "chat")
    (prompt,) = format_prompts(lm, [literal_prompt(val[0])])
    assert prompt.text == f"[user] {literal_prompt(val[0]).question}<turn>[assistant]\n"
    (pieces,) = split_prompts(lm, [literal_prompt(val[0])])
    assert lm.tokenizer.decode(pieces.question).strip() == literal_prompt(val[0]).question
    assert lm.tokenizer.decode(lm.bos + pieces.all) == tokenizer.bos_token + prompt.text
    assert lm.end_id == tokenizer.eos_token_id and lm.decode_key != plain.decode_key
    assert format_prompts(plain, [literal_prompt(val[0])]) == [literal_prompt(val[0])]


@pytest.mark.parametrize(
    "ends, eos, wanted", [([7, 8, 9], 9, (9, {7, 8, 9})), (7, 9, (7, {7})), (None, 9, (9, {9})), (9, 9, (9, {9}))]
)
def test_an_answer_ends_in_the_tokenizers_end_where_the_model_ends_there(pair, ends, eos, wanted):
    tokenizer, old = tokenizer_of(pair.target), pair.target.model.generation_config.eos_token_id
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    pair.target.model.generation_config.eos_token_id = ends
    try:
        lm = LanguageModel(pair.target.model, tokenizer, "x", "none")
    finally:
        pair.target.model.generation_config.eos_token_id = old
    assert (lm.end_id, lm.eos_ids) == wanted


def test_layers_to_read_and_to_work_on(pair):
    lm, key = pair.source, "bridge.inject_layers"
    n, auto = lm.n_layers, pick_layers(lm, "auto")
    assert auto[-1] == n and auto == tuple(sorted(set(auto))) and 0 not in auto
    assert pick_layers(lm, f"0, {n}") == (0, n) and pick_layers(lm, "0,2", key) == (0, 2)
    assert pick_layers(lm, "auto", key) == tuple(range(n))
    large = pick_layers(SimpleNamespace(n_layers=32), "auto", key)
    assert len(large) == 8 and large[0] == 0 and large[-1] == 31
    for wrong in ("2;4", "", "1,,2", f"{n + 1}", "-1", "1.5", "1,1"):
        for name in ("bridge.source_layers", key):
            with pytest.raises(ConfigError, match=name):
                pick_layers(lm, wrong, name)
    with pytest.raises(ConfigError, match=f"this model has 0 to {n - 1}"):
        pick_layers(lm, str(n), key)


# -- loading ------------------------------------------------------------------------------------------------


def test_swapped_exchanges_the_two_models(pair):
    swapped = load_pair(load_config(direction="swapped", source_device="cpu", target_device="cpu"))
    fingerprints = swapped.target.fingerprint, swapped.source.fingerprint
    assert fingerprints == (pair.source.fingerprint, pair.target.fingerprint)
    assert swapped.lexicon_seed == pair.lexicon_seed


@pytest.mark.parametrize(
    "name, change, key, named",
    [
        ("target/model.safetensors", None, "pair.target_model", "bridgekit pair"),
        ("target/model.safetensors", lambda data: data[: len(data) // 2], "pair.target_model", "target'"),
        ("target/model.safetensors", lambda data: b"\xff" * 16 + data[16:], "pair.target_model", "target'"),
        ("source/config.json", lambda data: b'{"model_type": ', "pair.source_model", "source'"),
        ("source/tokenizer.json", lambda data: b'{"model_type": ', "pair.source_model", "source'"),
        ("pair.json", lambda data: b'{"lexicon', "pair.target_model", "does not name its lexicon"),
    ],
)
def test_a_damaged_pair_is_refused(copied, name, change, key, named):
    folder, config = copied
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if change:
        (folder / name).write_bytes(change(data))
    refuse(config, key, named)


def test_a_model_with_missing_tensors_is_refused(copied):
    from safetensors.torch import load_file, save_file

    folder, config = copied
    tensors = load_file(folder / "target/model.safetensors")
    name = next(n for n in tensors if "mlp" in n)
    del tensors[name]
    save_file(tensors, folder / "target/model.safetensors", {"format": "pt"})
    refuse(config, "pair.target_model", name, "restore its safetensors")


def test_models_that_were_taught_different_lexicons_are_refused(copied):
    folder, config = copied
    record = {"lexicon_seed": 9, "lexicon": units.fingerprint_lexicon(units.make_lexicon(9))}
    (folder / "pair.json").write_text(json.dumps(record))
    for direction in ("forward", "swapped"):
        other = replace(config, pair=replace(config.pair, target_model="embedded", direction=direction))
        refuse(other, "pair.source_model", "source_model lexicon 9", "target_model lexicon 2")


def test_a_model_the_hub_cannot_give_is_refused(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no test waits for a network
    real = dict(task="gsm8k", data="x", controls=["constant"], conditions=["source", "target", "bridged"])
    refuse(load_config(target_model="no-such-owner/no-such-model", **real), "pair.target_model", "no-such-owner")


def test_what_the_hub_says_becomes_one_line_with_a_way_out():
    def failure(kind):
        try:
            try:
                raise type(kind, (Exception,), {})()
            except Exception as cause:
                raise OSError("first line\nsecond") from cause
        except OSError as error:
            return explain_hub(error, "org/name", "v9")

    assert "huggingface.co/org/name" in failure("GatedRepoError") and "HF_TOKEN" in failure("GatedRepoError")
    assert "no revision 'v9'" in failure("RevisionNotFoundError") and failure("Other") == "first line"
    assert "no folder 'org/name' here" in failure("RepositoryNotFoundError")
    assert "pickled" in explain_hub(OSError("org/name has no file named model.safetensors"), "org/name", "")


def test_a_model_on_this_disk_loads_where_the_hub_cannot_be_reached(monkeypatch):
    def fail(*args, **options):
        raise type("ConnectError", (Exception,), {})("no network")

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", fail)
    with pytest.raises(ConfigError, match="^pair.target_model: .*no folder 'pairs/mine' here"):
        load_model("target_model", "pairs/mine", torch.device("cpu"), torch.float32)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **options: "config.json")
    assert ask_hub("org/name", "v9") == {"local_files_only": True}


def test_pickled_weights_and_unsupported_kinds_are_refused_before_anything_is_loaded(copied):
    folder, config = copied
    (folder / "target/config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match="^pair.target_model: .*is a mamba"):
        check_models(config)
    (folder / "target/model.safetensors").rename(folder / "target/pytorch_model.bin")
    with pytest.raises(ConfigError, match="^pair.target_model: .*pickled weights"):
        check_models(config)


def test_a_model_whose_logits_are_not_its_hidden_states_is_refused(copied, monkeypatch):
    from bridgekit.model.adapter import Decoder

    _, config = copied
    monkeypatch.setattr(Decoder, "head", lambda self, hidden: 1.01 * self.model.lm_head(hidden))
    refuse(config, "pair.source_model", "cannot be reproduced from its hidden states")


def test_a_large_folder_is_hashed_whole_and_remembered_until_a_file_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(fingerprint, "CHUNK", 1000)
    folder, cache = tmp_path / "model", tmp_path / "cache/bridgekit/fingerprints.json"
    folder.mkdir()
    data = os.urandom(3500)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text("{}")
    small = fingerprint_folder(folder)
    assert not cache.exists()
    monkeypatch.setattr(fingerprint, "LARGE", 1000)
    first = fingerprint_folder(folder)
    assert first != small and first == fingerprint_folder(folder) and first in cache.read_text()
    hashed = []
    real = fingerprint.hash_chunk
    monkeypatch.setattr(fingerprint, "hash_chunk", lambda chunk: hashed.append(chunk) or real(chunk))
    assert fingerprint_folder(folder) == first and not hashed
    for place in (0, 1700, 3499):  # a byte of any chunk
        (folder / "model.safetensors").write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert fingerprint_folder(folder) != first
    assert len(hashed) == 3 * 5
    (folder / "model.safetensors").write_bytes(data)
    for broken in ("", "[]", '{"x', json.dumps({str(folder.resolve()): 3})):
        cache.write_text(broken)
        assert fingerprint_folder(folder) == first


def test_random_geometries_are_made_by_name_and_seed_and_say_that_they_are_random(pair):
    place = torch.device("cpu")
    first, again, other = (
        load_model("target_model", f"geometry:tiny{s}", place, torch.float32) for s in ("", "@1", "@2")
    )
    assert is_geometry(first.origin) and not is_geometry(pair.target.origin)
    assert first.fingerprint == again.fingerprint == "geometry-tiny-1-float32" != other.fingerprint
    weights = [lm.model.state_dict()["model.layers.0.mlp.up_proj.weight"] for lm in (first, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert first.tokenize(["So 3"]) == pair.target.tokenize(["So 3"])
    whole, _, _ = make_geometry("target_model", "geometry:tiny", place, torch.float32, {"device_map": {"": "cpu"}})
    ids = torch.tensor([[5, 6, 7]])
    assert [p.shape for p in whole.parameters()] == [p.shape for p in first.model.parameters()]
    assert (whole(ids).logits.std() / first.model(ids).logits.std()).item() == pytest.approx(1, abs=0.2)
    config = load_config(source_model="geometry:tiny", target_model="geometry:tiny@2")
    check_models(config)
    assert units.load_lexicon_seed(config) == pair.lexicon_seed and load_pair(config).source.hidden_size == 64
    with pytest.raises(ConfigError, match="^pair.target_model: no shape 'tinny' .nearest: tiny"):
        check_models(load_config(target_model="geometry:tinny"))
