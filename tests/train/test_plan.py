"""The forecast: exact sizes, measured steps, refusals with a way out; without a GPU and without torch.

python -m pytest tests/train/test_plan.py
"""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import TINY

from bridgekit import runner
from bridgekit.config import ConfigError, load_config
from bridgekit.keys import SIZES
from bridgekit.train import forecast as forecasts
from bridgekit.train import plan
from bridgekit.train.forecast import FITTED, GiB, Lengths, Shape, count_bridge, forecast, nearest_fit

LARGE = list(map(plan.known_shape, ("mistral-7b", "llama-3.1-8b")))
LENGTHS = Lengths(1364, 1364, (85,), (85,), (180,))
MEASURED = """task=gsm8k data=x n_shots=8 source_view=question soft_position=question batch_size=8 n_train=6000
controls=[] conditions=[source,target,bridged] bridge_dim=1024 heads=16 depth=4 n_soft_tokens=64 cache_states_gb=0
kl_weight=0.1 prompt_weight=0.1 info_nce_weight=0.1 format_weight=0.1"""
DIT = dict(producer="dit", bridge_dim=512, heads=8, depth=6, n_soft_tokens=2048, batch_size=2, prompt_mode="soft_only")
KV = dict(injector="kv", soft_position="start", bridge_dim=512, heads=8, depth=2, n_soft_tokens=-1)
PAIR = dict(source_model="geometry:mistral-7b", target_model="geometry:llama-3.1-8b", n_train=64)


def needs(gpu="H200", **changes):
    return forecast(load_config(overrides=MEASURED.split()).with_(**changes), *LARGE, LENGTHS, gpu)


KINDS = [{}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 32}]


@pytest.mark.parametrize("given", KINDS + [{"model_type": kind} for kind in ("mistral", "qwen2", "qwen3")])
def test_parameters_are_those_of_the_real_model(given):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(zip(SIZES, ("llama", 64, 2, 4, 2, 96, 128, False, 128), strict=True))
    config = AutoConfig.for_model(**sizes | given)
    real = AutoModelForCausalLM.from_config(config)
    assert Shape.of(json.loads(config.to_json_string())).parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize("producer", ["resampler", "dit", "constant"])
@pytest.mark.parametrize("injector", ["prefix", "residual", "kv"])
@pytest.mark.parametrize("queries", ["learned", "placed"])
def test_parameters_of_a_bridge_are_exact(pair, producer, injector, queries):
    from bridgekit.model.bridge import build_bridge
    from bridgekit.tasks.models import pick_layers

    aligned = dict(n_soft_tokens=-1, kv_mix="linear" if queries == "placed" else "mlp")
    more = aligned if injector == "kv" else dict(source_projection=True, dit_condition="attention")
    more |= dict(dit_condition="cross") if queries == "placed" and injector == "prefix" else {}
    config = load_config(**TINY | dict(producer=producer, injector=injector, queries=queries) | more)
    shapes = [Shape.of(lm.model.config.to_dict()) for lm in (pair.source, pair.target)]
    real = build_bridge(config, len(pick_layers(pair.source, "auto")), shapes[0].hidden, pair.target)
    assert sum(count_bridge(config, *shapes)) == real.n_parameters


STEPS = {"resampler 8": ({}, 0.26, 47.0), "resampler 2": ({"batch_size": 2}, 0.068, 34.5), "kv": (KV, 0.233, 46.0)}
STEPS |= {"dit": (DIT, 0.38, 52.8), "dit with text": (DIT | {"prompt_mode": "soft_plus_text"}, 0.387, 49.8)}


@pytest.mark.parametrize(("changes", "seconds", "gib"), STEPS.values(), ids=STEPS)
def test_a_training_step_is_what_was_measured(changes, seconds, gib):
    """On one H200, without validation and without the context of CUDA."""
    found = needs(**changes)
    held = sum((found.resident | found.training).values()) - found.training["keys and values of answers"]
    assert (held - FITTED["context"]) / GiB == pytest.approx(gib, rel=0.04)
    assert found.seconds["training step"] == pytest.approx(seconds, rel=0.12)


def test_decoding_is_what_was_measured():
    found = needs(eval_batch_size=200, n_test=200, n_val=200, val_samples=200, max_new_tokens=256)
    held = sum((found.resident | found.evaluation).values()) - found.evaluation["keys and values of answers, source"]
    assert (held - FITTED["context"]) / GiB == pytest.approx(43.8, rel=0.04)
    assert found.seconds["validation"] == pytest.approx(5.6, rel=0.1)


def test_more_takes_more():
    rising = {"batch_size": (8, 16, 64), "n_soft_tokens": (64, 128, 2048), "eval_batch_size": (8, 64, 256)}
    for key, values in rising.items():
        peaks = [needs(**{key: value, "n_test": 512}).peak for value in values]
        assert peaks == sorted(peaks) and peaks[0] < peaks[-1], key
    assert needs(batch_size=32).seconds["training step"] > needs(batch_size=16).seconds["training step"]
    assert needs(sort_steps=16).seconds["training step"] <= needs().seconds["training step"]
    assert needs("A100").gpu_hours > needs("H100").gpu_hours > needs("H200").gpu_hours
    assert needs(num_processes=4).peak < needs().peak < needs(cache_states_gb=100.0).peak
    apart = needs(source_device="cuda:0", target_device="cuda:1").resident["weights of both models"]
    spread = needs(target_device="shard:4").resident["weights of both models"]
    assert spread == 2 * LARGE[0].parameters + 2 * LARGE[1].parameters / 4
    assert apart == 2 * LARGE[1].parameters and needs(kl_weight=0.0).peak < needs().peak


def test_what_does_not_fit_is_refused_with_what_fits(monkeypatch, tmp_path):
    config = load_config(**TINY | PAIR | dict(batch_size=512, source_device="auto", target_device="auto"))
    peak_of = plan.make_plan(config, "H100").peak_of
    assert peak_of(config.with_(**nearest_fit(config, peak_of, memory := peak_of(config) / 1.05))) <= memory
    assert nearest_fit(config, peak_of, 20.0) is None  # less than the weights
    monkeypatch.setattr(plan, "find_gpu", lambda: plan.Gpu("NVIDIA H100", memory, memory, 1))
    plan.refuse_unfit(config)  # a twentieth too much: the forecast may err as much
    monkeypatch.setattr(plan, "find_gpu", lambda: plan.Gpu("NVIDIA H100", 40.0, 40.0, 1))
    with pytest.raises(ConfigError, match=r"needs about \d+ GiB, the GPU has 40: what fits: -o train.batch_size=\d+; "):
        plan.refuse_unfit(config)
    monkeypatch.setattr(runner, "list_gpus", lambda: ["0"])
    assert "what fits" in runner.run_planned({"big": config}, tmp_path).outcome["big"]
    assert not (tmp_path / "big/config.yaml").exists()
    plan.refuse_unfit(load_config(**TINY))  # on a CPU


def test_what_is_missing_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert plan.main(["parameters/phase1_h100_node.yaml", "-o", f"task.data={tmp_path}", "--gpu-memory", "80"]) == 2
    out = capsys.readouterr().out
    named = "hf download mistralai/", "HF_TOKEN", "no train.jsonl", "shape of geometry:llama-3.1-8b", "of 80 GiB"
    assert all(part in out for part in named), out
    assert plan.main(["parameters/phase1.yaml", "-o", f"pair.source_model={tmp_path}", "--json"]) == 2
    assert f"no model in '{tmp_path}'" in json.loads(capsys.readouterr().out)["missing"][0]


def test_it_runs_without_torch():
    code = "import sys; from bridgekit.train.plan import main; code = main(['parameters/phase1.yaml'])"
    done = subprocess.run([sys.executable, "-c", f"{code}; print('torch' in sys.modules, code)"], capture_output=True)
    assert done.stdout.endswith(b"it can run\nFalse 0\n"), done


def test_its_constants_are_those_of_the_code_it_foresees():
    from bridgekit.model import attention, decoding
    from bridgekit.train import captured

    assert (forecasts.WIDTH, forecasts.FUSED, forecasts.PREFILL) == (captured.WIDTH, attention.FUSED, decoding.PREFILL)


@pytest.mark.parametrize(
    "cuda, driver, said",
    [
        ("'13.0'", "12.6", "this one is built for CUDA 13.0, the driver takes 12.6"),
        ("None", "12.6", "this one is a build without CUDA"),
        ("'12.8'", "12.6", None),  # of one major version
        ("'13.0'", "13.1", None),
    ],
)
def test_a_torch_that_the_driver_does_not_take_is_named(tmp_path, monkeypatch, cuda, driver, said):
    """By a stand-in for nvidia-smi; the file is written as torch's own."""
    (tmp_path / "version.py").write_text(f"__version__ = '2.11.0'\ndebug = False\ncuda: Optional[str] = {cuda}\n")
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho '| Driver Version: 560.35.05      CUDA Version: {driver}     |'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    torch = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: torch)
    found = plan.check_build()
    assert found == [] if said is None else said in found[0] and "index for CUDA 12.6" in found[0]
