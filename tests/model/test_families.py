"""Any decoder of transformers: tiny random models of many families go through every injector, or are refused.

python -m pytest tests/model/test_families.py
"""

import re
import tempfile
from functools import cache

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from bridgekit.config import ConfigError, load_config
from bridgekit.model.bridge import build_bridge
from bridgekit.model.generation import bridged_logits, decode_bridged, unpad
from bridgekit.model.pair import load_model, pad_ids

INJECTORS = ("prefix", "residual", "prefix+residual", "kv")
ENDS = dict(vocab_size=300, bos_token_id=1, eos_token_id=2, pad_token_id=0)
NEW = ENDS | dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
NEW |= dict(num_key_value_heads=2, max_position_embeddings=256)
MOE = NEW | dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
GPT = ENDS | dict(n_embd=64, n_layer=2, n_head=4, n_positions=256)
OLD = ENDS | dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_layers=2, n_layer=2)
MLA = dict(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16)
MLA |= dict(v_head_dim=16, head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
PLAIN = """llama mistral qwen2 qwen3 glm glm4 phi olmo olmo2 olmo3 stablelm starcoder2 smollm3 exaone4 cohere cohere2
granite nanochat gemma gemma2 gemma3_text vaultgemma phi3 nemotron persimmon gpt_neox helium""".split()
EXPERTS = "mixtral qwen2_moe qwen3_moe granitemoe gpt_oss llama4_text".split()
FAMILIES = dict.fromkeys(PLAIN, NEW) | dict.fromkeys(EXPERTS, MOE)
FAMILIES |= dict.fromkeys(("gpt2", "gpt_bigcode"), GPT)
FAMILIES |= dict.fromkeys(("gptj", "codegen"), GPT | dict(rotary_dim=8))
FAMILIES |= {
    "granite": NEW | dict(logits_scaling=8.0, embedding_multiplier=12.0),
    "gpt_neo": OLD | dict(num_heads=4, attention_types=[[["global", "local"], 1]], intermediate_size=96),
    "falcon": OLD, "falcon-new": OLD | dict(num_kv_heads=2, new_decoder_architecture=True),
    "falcon-alibi": OLD | dict(alibi=True, multi_query=False), "bloom": OLD | dict(n_head=4),
    "mpt": ENDS | dict(d_model=64, n_heads=4, n_layers=2, max_seq_len=256, expansion_ratio=2),
    "opt": OLD | dict(ffn_dim=96, word_embed_proj_dim=64), "opt-350m": OLD | dict(ffn_dim=96, word_embed_proj_dim=32),
    "biogpt": NEW, "xglm": ENDS | dict(d_model=64, ffn_dim=96, num_layers=2, attention_heads=4),
    "gemma4_text": MOE | dict(vocab_size_per_layer_input=300, hidden_size_per_layer_input=16),
    "deepseek_v3": MOE | MLA, "gemma4_text-alone": MOE | dict(hidden_size_per_layer_input=0),
    "lfm2": NEW | dict(layer_types=["conv", "full_attention"]),
    "falcon_h1": NEW | dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_chunk_size=8),
    "jamba": MOE | dict(attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False),
    "qwen3_next": MOE | LINEAR | dict(layer_types=["linear_attention", "full_attention"]),
    "recurrent_gemma": NEW | dict(block_types=["recurrent", "attention"]), "minimax": MOE,
    "mamba": OLD | dict(state_size=8), "rwkv": OLD | dict(attention_hidden_size=64),
}  # fmt: skip
REFUSED = {"opt-350m", "recurrent_gemma", "minimax", "mamba", "rwkv"}
WITHOUT_KV = {"deepseek_v3", "lfm2", "jamba", "qwen3_next", "codegen"}
WITHOUT = {(family, "kv") for family in WITHOUT_KV} | {("gemma4_text", i) for i in INJECTORS if "prefix" in i}
PROMPTS, ANSWER = ["Question: a box has 3 pins.\nAnswer:\n", "Question: 12 + 30\nAnswer:\n"], "So 3 pins.\n#### 3"


@cache
def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ends, alphabet = ["<pad>", "<s>", "</s>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=ends, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*PROMPTS, ANSWER], trainer)
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@cache
def load(family: str):
    """A random model of a family, loaded from a folder as a user's would be."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix=f"{family}-") as folder, torch.random.fork_rng():
        torch.manual_seed(0)
        kind = family if family in PLAIN else family.split("-")[0]
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **FAMILIES[family])).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return load_model("target_model", folder, torch.device("cpu"), torch.float32)


def go_through(family: str, injector: str) -> None:
    """Likelihood with a gradient, and free decoding, of a bridged model whose gates stand open."""
    lm, n, k = load(family), len(PROMPTS), -1 if injector == "kv" else 3
    changes = dict(bridge_dim=16, heads=2, depth=1, n_soft_tokens=k, prompt_mode="soft_plus_text")
    torch.manual_seed(0)
    bridge = build_bridge(load_config(injector=injector, **changes), 1, 10, lm)
    for name, p in bridge.named_parameters():
        if name.endswith("opening"):
            torch.nn.init.constant_(p, 0.1)
    rows = [lm.bos + ids for ids in lm.tokenize(PROMPTS)]
    (ids,), _ = lm.tokenize_after(PROMPTS[:1], [ANSWER])
    labels, mask = pad_ids([ids] * n, lm.device)
    before, after = pad_ids([r[:1] for r in rows], lm.device), pad_ids([r[1:] for r in rows], lm.device)
    places = torch.arange(5).expand(n, -1)
    states, seeds = torch.randn(n, 5, 1, 10), torch.arange(n)
    alignment = torch.stack([places, places + 1], -1)
    message = bridge.encode(states, places < 5, seeds, alignment=alignment)
    logits = bridged_logits(lm, bridge, message, before, after, labels, mask)
    logits.log_softmax(-1)[:, :, 5].sum().backward()
    assert logits.isfinite().all() and any(p.grad is not None and p.grad.any() for p in bridge.parameters())
    with torch.no_grad():
        message = bridge.encode(states, places < 5, seeds, alignment=alignment)
        texts = decode_bridged(lm, bridge, message, unpad(*before), unpad(*after), 4)
        alone = [decode_bridged(lm, bridge, message.select(torch.tensor([i])), [rows[i][:1]], [rows[i][1:]], 4)[0]
                 for i in range(n)]  # fmt: skip
        steps = torch.tensor([texts[0].ids])
        one = ((ids[:1], real[:1]) for ids, real in (before, after))
        given = bridged_logits(lm, bridge, message.select(torch.tensor([0])), *one, steps, steps >= 0)
    assert [t.ids for t in texts] == [t.ids for t in alone]  # padding and neighbours change nothing
    assert given[0].argmax(-1).tolist() == list(texts[0].ids)  # training reads what decoding does


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_goes_through_every_injector_or_is_refused_in_one_line(family):
    if family in REFUSED:
        with pytest.raises(ConfigError, match=rf"^pair.target_model: [^\n]*{family.split('-')[0]}[^\n]*$"):
            load(family)
        return
    lm = load(family)
    ids = torch.tensor([lm.sample])
    with torch.no_grad():
        out = lm.decoder(input_ids=ids, output_hidden_states=True, use_cache=False)
        assert torch.equal(lm.head(out.last_hidden_state), lm.model(input_ids=ids).logits)
        assert torch.equal(lm.hidden_states(ids, None, (2, 0, 1)), torch.stack(out.hidden_states, 2)[:, :, [2, 0, 1]])
        everything = lm.embed(torch.arange(lm.model.get_input_embeddings().weight.shape[0])).pow(2).mean().sqrt()
        assert lm.embedding_rms == pytest.approx(everything.item(), rel=1e-3)
    for injector in INJECTORS:
        if (family, injector) in WITHOUT:
            with pytest.raises(ConfigError, match=rf"^bridge.injector: {re.escape(injector)}: {family}[^\n]*residual$"):
                go_through(family, injector)
        else:
            go_through(family, injector)
