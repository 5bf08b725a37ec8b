"""Models of published shapes with random weights, made where they are used: for planning and benchmarks, not results.

    lm = load_model("target_model", "geometry:llama-3.1-8b", device, dtype)     # or geometry:llama-3.1-8b@2 for seed 2

Shape, vocabulary size and dtype are the real ones. Tokenizers and lexicon are the embedded pair's, so prompts are as
long as there; ids beyond that tokenizer's are never read.
"""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from bridgekit.config import EMBEDDED, GEOMETRY, refuse_if

SHAPES = {  # model type, hidden size, layers, heads, key-value heads, feed-forward width, vocabulary, tied, positions
    "tiny": ("llama", 64, 2, 4, 2, 128, 2048, True, 1024),
    "qwen2.5-0.5b": ("qwen2", 896, 24, 14, 2, 4864, 151936, True, 32768),
    "qwen2.5-1.5b": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True, 32768),
    "mistral-7b": ("mistral", 4096, 32, 32, 8, 14336, 32768, False, 32768),
    "llama-3.1-8b": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 131072),
    "llama-3.1-70b": ("llama", 8192, 80, 64, 8, 28672, 128256, False, 131072),
}
NAMES = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads intermediate_size vocab_size"
NAMES = [*NAMES.split(), "tie_word_embeddings", "max_position_embeddings"]


def make_geometry(
    key: str, model: str, device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, object, str]:
    """A random model on its device, its tokenizer and its fingerprint; the weights depend on name, seed and dtype."""
    name, _, seed = model.removeprefix(GEOMETRY).partition("@")
    is_seed = not seed or seed.isdecimal()
    refuse_if(not is_seed, f"pair.{key}: '{model}': after @ stands a seed such as 2, got '{seed}'")
    seed = int(seed or 1)
    kind, *shape = SHAPES[name]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / key.split("_")[0])
    ends = {end: getattr(tokenizer, end) for end in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = AutoConfig.for_model(kind, **dict(zip(NAMES, shape, strict=True)), **ends, sliding_window=None)
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return made, tokenizer, f"geometry-{name}-{seed}-{str(dtype).removeprefix('torch.')}"
