"""The pair: whole, small, frozen, right about what it knows; prompts cut into pieces, no token changed.

python -m pytest tests/model/test_pair.py
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridgekit.config import EMBEDDED, ConfigError, check_models, load_config
from bridgekit.model.generation import generate_batch
from bridgekit.model.pair import (
    fingerprint_folder,
    load_pair,
    pick_layers,
    split_prompts,
    word_tokens,
)
from bridgekit.tasks import Prompt, literal_prompt, load_examples, units
from bridgekit.tasks.answers import extract_answer

ROLES = ("source", "target")


@pytest.fixture
def copied(tmp_path):
    """A copy of the embedded pair that a test may damage, and the configuration that asks for it."""
    folder = tmp_path / "pair"
    shutil.copytree(EMBEDDED, folder)
    return folder, load_config(source_model=str(folder / "source"), target_model=str(folder / "target"))


def refuse(config, *named: str) -> None:
    """A pair that cannot be loaded is refused in one line, which names these."""
    with pytest.raises(ConfigError) as caught:
        load_pair(config)
    assert "\n" not in str(caught.value) and all(part in str(caught.value) for part in named), str(caught.value)


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


def test_a_missing_folder_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ConfigError, match=r"^pair.source_model: .*nothing.*config.json not found.*"):
        check_models(load_config(source_model=str(tmp_path / "nothing")))


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
