"""Strict configuration: what is not understood is refused in one line, what is written is read back equal.

python -m pytest tests/test_config.py
"""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bridgekit.config import (
    FILE_OBJECT,
    KEYS,
    NEVER,
    Config,
    ConfigError,
    build_config,
    differences,
    dump_config,
    effective_settings,
    format_override,
    load_config,
    parse_override,
    to_flat,
)
from bridgekit.tasks.models import check_models


def refuse(*named: str, **values) -> None:
    """Values, or a file and overrides, are refused in one line that names these."""
    with pytest.raises(ConfigError) as caught:
        load_config(**values)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in named), message


@pytest.fixture
def write(tmp_path):
    path = tmp_path / "some.yaml"
    return lambda text: path.write_text(text) and path


# -- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    """steps="200" steps=2.0 steps=true steps=null lr=fast lr=false name=7 rms_match=1 rms_match="on"
    conditions=source conditions=[1] controls={}""".split(),
)
def test_a_wrong_type_is_refused(text):
    key, value = parse_override(text)
    refuse(key, type(value).__name__ if not isinstance(value, (str, list, dict)) else "expected", **{key: value})


def test_a_number_that_yaml_reads_as_text_is_explained(write):
    for values in (dict(files=write("lr: 1e-4")), dict(overrides=["train.lr=1e-4"]), dict(lr="1e-4")):
        refuse("train.lr", "1e-4", "1.0e-4", **values)
    assert load_config(write("lr: 1.0e-4")).train.lr == 1e-4
    assert isinstance(load_config(write("lr: 1")).train.lr, float)


NOTHING = {"nll_weight": 0.0, "controls": []}
PROMPT = {"nll_weight": 0.0, "prompt_weight": 1.0}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"stpes": 3}, ["'stpes'", "'steps'"]),
        ({"overrides": ["train.bridge_dim=3"]}, ["'train.bridge_dim'"]),
        ({"overrides": ["steps"]}, ["key=value"]),
        ({"overrides": ["controls=["]}, ["YAML"]),
        ({"overrides": ["=3"]}, ["''"]),
        ({"files": "none.yaml"}, ["none.yaml", "no such"]),
        ({"files": "."}, ["no such"]),
        ({"n_soft_tokens": 0}, ["bridge.n_soft_tokens", "= -1 or >= 1 and <= 2048", "got 0"]),
        ({"eval_samples": 2001}, ["eval.eval_samples", "2000"]),
        ({"val_samples": 513}, ["train.val_samples", "512"]),
        ({"producer": "/home/me/mine.py:Mine"}, ["bridge.producer", f"resampler, dit, constant, {FILE_OBJECT}"]),
        ({"producer": "../mine.py:Mine"}, ["bridge.producer", "a path begins in the project folder"]),
        ({"extra": "mine.py"}, ["loss.extra", FILE_OBJECT]),
        ({"injector": "suffix"}, ["bridge.injector", "nearest: prefix"]),
        ({"task": "gsm8k"}, ["task.data", "bridgekit fetch gsm8k"]),
        ({"task": "gsm8k", "data": "x", "variant": "context"}, ["task.variant", "no knowledge groups"]),
        ({"source_device": "cuda:"}, ["pair.source_device", "cuda:<number>"]),
        ({"target_device": "shard:1"}, ["pair.target_device", "shard:<GPUs>"]),
        ({"target_device": "shard:2", "num_processes": 2, "batch_size": 8}, ["pair.target_device", "num_processes=1"]),
        ({"target_device": "shard:2", "injector": "residual"}, ["pair.target_device", "injector prefix"]),
        ({"lr": float("nan")}, ["train.lr", "finite"]),
        ({"heads": 5}, ["bridge.heads", "bridge_dim"]),
        ({"source_view": "facts"}, ["bridge.source_view", "context"]),
        ({"teacher": "facts", "token_weight": 1.0}, ["bridge.teacher", "context"]),
        ({"injector": "kv"}, ["bridge.n_soft_tokens", "set n_soft_tokens=-1"]),
        ({"flow_weight": 0.1}, ["loss.flow_weight", "dit"]),
        ({"extra_weight": 0.1}, ["loss.extra_weight", f"loss.extra={FILE_OBJECT}"]),
        ({"producer_options": ["width=3"]}, ["bridge.producer_options", "'resampler' takes no options"]),
        ({"num_processes": 3}, ["train.batch_size", "num_processes"]),
        ({"decode_weight": 1.0, "decode_batch": 5, "num_processes": 2}, ["loss.decode_batch", "num_processes"]),
        ({"conditions": ["source", "target", "bridged", "shufled"]}, ["conditions", "nearest: shuffled"]),
        ({"conditions": ["bridged", "relay_full"]}, ["eval.conditions", "source, target"]),
        ({"controls": ["target"]}, ["train.controls", "'target'"]),
        ({"name": "a/b"}, ["run.name"]),
        ({"teacher_steps": 5}, ["train.teacher_steps", "prompt"]),
        (PROMPT | {"teacher_steps": 5, "controls": []}, ["train.teacher_steps", "another"]),
        ({"prompt_weight": 0.1, "teacher_steps": 500}, ["train.teacher_steps", "below steps (500)"]),
        (NOTHING, ["loss.nll_weight"]),
        (NOTHING | {"flow_weight": 1.0, "producer": "constant"}, ["loss.nll_weight"]),  # it has no flow
        (NOTHING | {"decode_weight": 1.0}, ["decode_every=1"]),  # nine steps of ten would have no loss
        (PROMPT, ["train.controls: constant, constant_natural"]),
    ],
)
def test_an_impossible_value_is_refused(values, named):
    refuse(*named, **values)


def test_any_loss_of_every_step_is_enough():
    enough = [{"decode_weight": 1.0, "decode_every": 1}, {"steps": 0}, {"flow_weight": 1.0, "producer": "dit"}]
    enough += [{"prompt_weight": 1.0, "controls": ["self_bridge"]}, {"extra": "mine.py:loss", "extra_weight": 1.0}]
    assert all(load_config(**NOTHING | values) for values in enough) and load_config(**PROMPT | {"kl_weight": 1.0})


def test_every_number_has_a_lower_limit_and_every_condition_names_keys():
    for name, (default, _, _, condition) in KEYS.items():
        if type(default) in (int, float) and name != "task.data_seed":
            refuse(name, **{name: type(default)(-2)})
        names = [part.split()[0] for either in condition.split(" or ") for part in either.split(" and ") if part]
        assert condition == NEVER or set(names) <= set(KEYS)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("steps: [", ["some.yaml", "YAML"]),
        ("- steps", ["some.yaml", "key: value"]),
        ("train: {stpes: 3}", ["train.stpes", "train.steps"]),
        ("train: 3", ["'train'"]),
        ("3: 4", ["'3'"]),
        ("overrides: train.steps=3", ["some.yaml", "overrides", "list"]),
        ("overrides: [3]", ["some.yaml", "overrides", "3"]),
        ("format: 3", ["some.yaml", "format 3", "update bridgekit"]),
    ],
)
def test_a_mistaken_file_is_refused(write, text, named):
    refuse(*named, files=write(text))


def test_missing_models_are_refused(tmp_path):
    check_models(Config())
    check_models(load_config(source_model="someone/on-the-hub"))
    for key in ("source_model", "target_model"):
        with pytest.raises(ConfigError, match=f"pair.{key}: no model in '{tmp_path}'"):
            check_models(load_config(**{key: str(tmp_path)}))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="pair.source_model: no safetensors file"):
        check_models(load_config(source_model=str(tmp_path)))


# -- read ---------------------------------------------------------------------------------------------------


def test_later_sources_win(write):
    path = write("steps: 1\nlr: 0.1\ntrain: {patience: 4}\nbatch_size: 64\noverrides: [train.lr=0.2, bridge.depth=1]")
    config = load_config(path, ["depth=3", "depth=4"], steps=2, lr=0.3, patience=5)
    assert (config.train.steps, config.train.patience) == (2, 5)  # keywords over the file
    assert config.train.lr == 0.2  # the file's overrides over both
    assert config.bridge.depth == 4  # the caller's overrides over all, the last one first
    assert config.train.batch_size == 64 and config.run == Config().run
    with pytest.raises(ConfigError, match="bridge.depth"):  # a copy with changes is checked too
        Config().with_(depth=0)


TAUGHT = {"teacher": "prompt", "prompt_weight": 0.1}


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({"teacher": "prompt"}, "soft_plus_text"),  # nothing is taught by it
        ({"prompt_weight": 0.1}, "soft_plus_text"),  # the teacher is the answer
        (TAUGHT, "soft_only"),
        ({"teacher": "prompt", "dit_tokens": "teacher", "producer": "dit"}, "soft_only"),
        (TAUGHT | {"injector": "residual"}, "soft_plus_text"),  # no tokens
        (TAUGHT | {"prompt_mode": "soft_plus_text"}, "soft_plus_text"),
    ],
)
def test_a_prompt_teacher_chooses_soft_only_unless_told_otherwise(values, mode, write):
    config = load_config(**values)
    assert config.bridge.prompt_mode == load_config(write(dump_config(config))).bridge.prompt_mode == mode
    # resolved once: a control that drops the teacher's loss keeps the mode of the bridge it is compared with
    assert config.with_(prompt_weight=0.0, flow_weight=0.0).bridge.prompt_mode == mode


TEXTS = ["plain", "a/b c", "on", "1e-4", "3", "null", "a: b #c", "'\"", "[x]", "=", "\N{MICRO SIGN}m"]
VALUES = {int: st.integers(-1, 4096), float: st.floats(1e-9, 1e12), bool: st.booleans(), str: st.sampled_from(TEXTS)}


def values_of(key: str) -> st.SearchStrategy:
    """Values a key may well have; what another key forbids is sorted out by the configuration itself."""
    default, _, allowed, _ = KEYS[key]
    if isinstance(default, tuple):
        return st.permutations(allowed)
    return st.sampled_from(allowed) if allowed and isinstance(allowed, tuple) else VALUES[type(default)]


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_read_back_equal(tmp_path_factory, data):
    keys = data.draw(st.lists(st.sampled_from(sorted(KEYS)), unique=True, max_size=5))
    changes = {key: data.draw(values_of(key), label=key) for key in keys}
    try:
        config = load_config(**changes)
    except ConfigError:
        assume(False)
    path, flat = tmp_path_factory.mktemp("config") / "config.yaml", to_flat(config)
    path.write_text(dump_config(config))
    assert load_config(path) == config == build_config(flat)
    assert load_config(overrides=[format_override(key, value) for key, value in flat.items()]) == config
    changes = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    assert all(flat[key] == value or value == "auto" for key, value in changes.items())


# -- compared -----------------------------------------------------------------------------------------------

ALONE, OWN = {"prompt_mode": "soft_only"}, {"producer": "a.py:A"}


@pytest.mark.parametrize(
    ("one", "other", "effective", "inert"),
    [
        ({}, {"decode_every": 3}, [], ["loss.decode_every"]),
        ({"decode_weight": 1.0}, {"decode_weight": 1.0, "decode_every": 3}, ["loss.decode_every"], []),
        ({}, {"dit_steps_eval": 9, "teacher": "prompt"}, [], ["bridge.dit_steps_eval", "bridge.teacher"]),
        (OWN, OWN | {"dit_steps_eval": 9}, ["bridge.dit_steps_eval"], []),
        ({}, {"n_facts": 8}, [], ["task.n_facts"]),
        ({}, {"soft_position": "question"}, [], ["bridge.soft_position"]),  # without shots it is the start
        ({}, {"soft_position": "end"}, ["bridge.soft_position"], []),
        (ALONE, ALONE | {"soft_position": "end"}, [], ["bridge.soft_position"]),
        ({}, {"train_prompt_mode": "soft_plus_text"}, [], ["bridge.train_prompt_mode"]),
        ({}, {"name": "other", "eval_batch_size": 7, "cache_dir": "x"}, [], []),  # no settings of the experiment
        ({}, {"seed": 2}, ["run.seed"], []),
    ],
)
def test_settings_without_effect_make_no_other_experiment(one, other, effective, inert):
    one, other = to_flat(load_config(**one)), to_flat(load_config(**other))
    assert [list(part) for part in differences(one, other)] == [effective, inert]
    assert (effective_settings(one) == effective_settings(other)) is (not effective)
    assert effective_settings(one, seed=False) == effective_settings(one | {"run.seed": 9}, seed=False)
    lists = {key: list(value) if isinstance(value, tuple) else value for key, value in one.items()}
    assert differences(one, lists) == ({}, {})  # a run's config.yaml has lists
