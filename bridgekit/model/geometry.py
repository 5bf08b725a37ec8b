"""Models of published shapes with random weights, made where they are used: for planning and benchmarks, not results.

    lm = load_model("target_model", "geometry:llama-3.1-8b", device, dtype)     # or geometry:llama-3.1-8b@2 for seed 2

Shape, vocabulary size and dtype are the real ones. Tokenizers and lexicon are the embedded pair's, so prompts are as
long as there; ids beyond that tokenizer's are never read.

    model, tokenizer = make_stand_in(folder)     # what a user's own parts are tried on, before the real model is loaded
"""

import functools
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bridgekit.config import EMBEDDED, GEOMETRY, refuse_if
from bridgekit.keys import GEOMETRIES, SIZES

NARROW = 64  # width of a stand-in's feed-forwards


def make_geometry(
    key: str, model: str, device: torch.device, dtype: torch.dtype, spread: dict | None = None
) -> tuple[torch.nn.Module, object, str]:
    """A random model on its device, its tokenizer and its fingerprint; the weights depend on name, seed and dtype.

    `spread`: options of `from_pretrained` by which its layers are made on several GPUs."""
    name, _, seed = model.removeprefix(GEOMETRY).partition("@")
    is_seed = not seed or seed.isdecimal()
    refuse_if(not is_seed, f"pair.{key}: '{model}': after @ stands a seed such as 2, got '{seed}'")
    seed = int(seed or 1)
    shape = dict(zip(SIZES, GEOMETRIES[name], strict=True))
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / key.split("_")[0])
    ends = {end: getattr(tokenizer, end) for end in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(**shape, **ends, sliding_window=None)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        if spread:  # a checkpoint without tensors: every layer is made where it will be
            transformers.utils.logging.set_verbosity_error()  # or all of them would be named as missing
            kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            made = kind.from_pretrained(None, config=config, state_dict={}, dtype=dtype, **spread)
        else:
            with device:
                made = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made, tokenizer, f"geometry-{name}-{seed}-{str(dtype).removeprefix('torch.')}"


def make_stand_in(folder: Path) -> tuple[torch.nn.Module, object]:
    """A random model of a folder's kind and sizes, and its tokenizer; only the feed-forwards are narrow.

    All weights of one shape are the same tensor, so that those of a large model take little room."""
    draw = functools.cache(lambda shape: torch.empty(shape).normal_(std=0.02))
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config(decoder=True).intermediate_size = NARROW
    with init_empty_weights():
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.load_state_dict({name: draw(weight.shape) for name, weight in made.state_dict().items()}, assign=True)
    return made.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder)
