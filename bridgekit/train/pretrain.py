"""Make the embedded pair: two small models of different kinds, each taught its own half of a lexicon.

    bridgekit pair --out bridgekit/model/embedded_pair --lexicon-seed 1          # both models; a GPU takes minutes
    python -m bridgekit.train.pretrain --role target --out DIR --lexicon-seed 1  # one of them

Documents (bridgekit/corpus.py) are packed into windows of 1,024 tokens, so that positions and distances up to there
are familiar.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from bridgekit.config import ConfigError
from bridgekit.inside.probe import probe_pair
from bridgekit.model.generation import generate_batch
from bridgekit.model.pair import LanguageModel, load_model
from bridgekit.tasks import literal_prompt, source_prompt, told_prompt, units
from bridgekit.tasks.answers import extract_answer
from bridgekit.train.corpus import KINDS, NOTE_FACTS, make_documents

WINDOW = 1024
SHAPES = {  # hidden, layers, heads, key-value heads, feed-forward, vocabulary
    "source": dict(hidden=160, layers=5, heads=5, kv_heads=5, feed_forward=448, vocab=1024),
    "target": dict(hidden=192, layers=4, heads=6, kv_heads=6, feed_forward=512, vocab=1536),
}


def train_tokenizer(role: str, texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Source: SentencePiece-like BPE with `▁`; target: byte-level BPE. Both split numbers into digits."""
    special = ["<unk>", "<s>", "</s>"] if role == "source" else ["<|begin|>", "<|end|>"]
    if role == "source":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        split = pre_tokenizers.Split(Regex(r"▁?\p{L}+|\p{N}|\n+|[^\p{L}\p{N}\n]"), "isolated")
        tokenizer.pre_tokenizer = split
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special += [f"<0x{i:02X}>" for i in range(256)]
        alphabet: list[str] = []
    else:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos, eos = ("<s>", "</s>") if role == "source" else ("<|begin|>", "<|end|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=eos,
        clean_up_tokenization_spaces=False,
    )


def build_model(role: str, tokenizer, shape: dict) -> torch.nn.Module:
    common = dict(
        vocab_size=len(tokenizer), hidden_size=shape["hidden"], intermediate_size=shape["feed_forward"],
        num_hidden_layers=shape["layers"], num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"], max_position_embeddings=WINDOW, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    if role == "source":
        return MistralForCausalLM(MistralConfig(**common, sliding_window=None))
    return LlamaForCausalLM(LlamaConfig(**common))


def pack_documents(tokenizer, documents, prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of token ids and the weight of each token's loss. -> (N, WINDOW), (N, WINDOW)"""
    prompts = tokenizer([p for p, _ in documents], add_special_tokens=False)["input_ids"]
    answers = tokenizer([a for _, a in documents], add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    digits = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
    ids, weights = [], []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids += [bos, *prompt, *answer, eos]
        # In a list of facts the words are drawn at random: only the values can be learned.
        known = [1.0] * len(answer) if prompt else [1.0 if t in digits else prompt_weight for t in answer]
        weights += [0.0] + [prompt_weight] * len(prompt) + known + [1.0]
    n = len(ids) // WINDOW * WINDOW
    return torch.tensor(ids[:n]).view(-1, WINDOW), torch.tensor(weights[:n]).view(-1, WINDOW)


def train_model(args, role: str, device: torch.device) -> dict:
    """Train one model and save it; returns what the pair's record says of it."""
    started = time.time()
    torch.manual_seed(args.lexicon_seed * 2 + (role == "target"))
    lexicon = units.make_lexicon(args.lexicon_seed)
    documents = make_documents(lexicon, role, args.documents, args.lexicon_seed, args.kinds, args.note_facts)
    shape = SHAPES[role] | {k: v for k, v in (args.shape or {}).items()}
    tokenizer = train_tokenizer(role, [p + a for p, a in documents[:40000]], shape["vocab"])
    ids, weights = pack_documents(tokenizer, documents, args.prompt_weight)
    model = build_model(role, tokenizer, shape).to(device)
    n_params = sum(p.numel() for p in model.parameters())
    took = f"data {time.time() - started:.0f} s"
    print(f"{role}: {n_params / 1e6:.2f}M parameters, {len(ids)} windows, {took}", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.98), weight_decay=args.weight_decay, fused=device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: learning_rate(s, args.steps))
    ids, weights = ids.to(device), weights.to(device)
    order = torch.Generator().manual_seed(args.lexicon_seed)
    queue = torch.empty(0, dtype=torch.long)
    total = torch.zeros((), device=device)
    for step in range(1, args.steps + 1):
        if len(queue) < args.batch:
            queue = torch.cat([queue, torch.randperm(len(ids), generator=order)])
        rows, queue = queue[: args.batch].to(device), queue[args.batch :]
        batch, weight = ids[rows], weights[rows][:, 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        loss = (loss * weight.flatten()).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        total += loss.detach()
        if step % args.log_every == 0 or step == args.steps:
            mean, elapsed = total.item() / args.log_every, time.time() - started
            print(f"{role}: step {step}/{args.steps} loss {mean:.4f} {elapsed:.0f} s", flush=True)
            total.zero_()
    folder = Path(args.out) / role
    save_model(model, tokenizer, folder)
    lm = load_model(f"{role}_model", str(folder), device, torch.float32)
    record = {"role": role, "parameters": n_params, "steps": args.steps, "batch": args.batch, "lr": args.lr,
              "documents": args.documents, "kinds": args.kinds,
              "note_facts": args.note_facts or NOTE_FACTS[role], "seconds": round(time.time() - started, 1),
              "validation": measure_knowledge(lm, lexicon, role),
              "probe": measure_probe(lm, lexicon, role)}  # fmt: skip
    print(json.dumps(record), flush=True)
    return record


def learning_rate(step: int, steps: int) -> float:
    """Warm-up over the first 3%, then a cosine to zero."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_model(model, tokenizer, folder: Path) -> None:
    """Half-precision safetensors, in place only when complete."""
    fresh = folder.with_name(folder.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    model.to(torch.float16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def measure_knowledge(lm: LanguageModel, lexicon, role: str, n: int = 1000) -> dict[str, float]:
    """Share right on validation problems: units it knows, units it does not, and with the fact stated; and with the
    fact among others about words that nobody knows, which a pair for facts in context must be able to read."""
    examples = units.make_examples(lexicon, "val", n, seed=10_000)
    ours = ("both", f"{role}_only")
    foreign = [e for e in examples if e.group not in ours]
    results = {
        "known": _share_right(lm, [e for e in examples if e.group in ours], literal_prompt),
        "unknown": _share_right(lm, foreign, literal_prompt),
        "told": _share_right(lm, foreign, told_prompt),
    }
    for n_facts in (4, 16, 64):
        some = units.make_examples(lexicon, "val", n // 5, seed=10_000, variant="context", n_facts=n_facts)
        results[f"among_{n_facts}"] = _share_right(lm, some, source_prompt)
    return results


def _share_right(lm: LanguageModel, examples: list[units.Example], prompt_of) -> float:
    right = 0
    for i in range(0, len(examples), 256):
        some = examples[i : i + 256]
        prompts = lm.tokenize([prompt_of(e).text for e in some])
        out = generate_batch(lm, [lm.bos + p for p in prompts], [[] for _ in prompts])
        right += sum(extract_answer(g.text) == e.gold for g, e in zip(out, some, strict=True))
    return round(right / len(examples), 4)


def measure_probe(lm: LanguageModel, lexicon, role: str) -> dict[int, dict[str, float]]:
    """Share of validation units whose value a linear probe reads at the word's last token, by layer: what a bridge
    can hope for, held-out units and held-out values apart."""
    table = probe_pair(lm, lexicon, role, report="val")
    novelties = ("held_unit", "held_value")
    return {k: {n: round(places["word end"][n]["joint"], 4) for n in novelties} for k, places in table.items()}


def make_pair(args, argv: list[str]) -> None:
    """Train both models, at once where there is a GPU, and write the pair's record last.

    Each is a child of its own, given the same arguments."""
    out = Path(args.out)
    if (out / "pair.json").exists() and not args.replace:
        raise ConfigError(f"--out: '{out}' already holds a pair; choose another folder or add --replace")
    out.mkdir(parents=True, exist_ok=True)
    (out / "pair.json").unlink(missing_ok=True)
    commands = [[sys.executable, "-m", "bridgekit.train.pretrain", *argv, "--role", r] for r in ("source", "target")]
    if torch.cuda.is_available():
        children = [subprocess.Popen(c) for c in commands]
        codes = [c.wait() for c in children]
    else:
        codes = [subprocess.run(c).returncode for c in commands]
    if any(codes):
        raise RuntimeError(f"a model's training failed (exit codes {codes}); no pair.json was written in {out}")
    records = [json.loads((out / f"{role}.json").read_text()) for role in ("source", "target")]
    for role in ("source", "target"):
        (out / f"{role}.json").unlink()
    lexicon = units.fingerprint_lexicon(units.make_lexicon(args.lexicon_seed))
    summary = {
        "lexicon_seed": args.lexicon_seed,
        "lexicon": lexicon,
        "models": records,
        "torch": torch.__version__,
    }
    (out / "pair.json").write_text(json.dumps(summary, indent=1) + "\n")


def parse_shape(text: str) -> dict:
    return {k: int(v) for k, v in (part.split("=") for part in text.split(","))}


def parse_sizes(text: str) -> tuple[int, ...]:
    """`1,4,16,64`: numbers of facts, each at least 1."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected e.g. 1,4,16,64, got '{text}'") from None
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"a note states at least one fact, got '{text}'")
    return sizes


def parse_kinds(text: str) -> dict[str, int]:
    """`note=60,problem=40`: kinds that are not named do not occur."""
    try:
        kinds = {name: int(weight) for name, weight in (part.split("=") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected e.g. problem=20,note=80, got '{text}'") from None
    if unknown := set(kinds) - set(KINDS):
        raise argparse.ArgumentTypeError(f"no kind '{min(unknown)}' (there are: {', '.join(KINDS)})")
    if min(kinds.values()) < 0 or not sum(kinds.values()):
        raise argparse.ArgumentTypeError(f"weights are at least 0 and not all 0, got '{text}'")
    return kinds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bridgekit pair", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="folder for source/, target/ and pair.json")
    parser.add_argument("--lexicon-seed", type=int, default=1, help="a new seed is a new lexicon and a new pair")
    parser.add_argument("--role", choices=("source", "target"), help="train one of the two only")
    parser.add_argument("--replace", action="store_true", help="overwrite a pair that is there")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=48, help="windows of 1,024 tokens a step")
    parser.add_argument("--documents", type=int, default=300_000)
    parser.add_argument(
        "--kinds",
        type=parse_kinds,
        default=KINDS,
        metavar="KIND=WEIGHT,...",
        help="the mix of documents; more notes make models that read facts in their context",
    )
    parser.add_argument(
        "--note-facts",
        type=parse_sizes,
        default=(),
        metavar="N,N,...",
        help="how many facts a note may state, drawn among these (default: short notes, for the source longer ones)",
    )
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--prompt-weight", type=float, default=0.1, help="loss weight of tokens that are not answer")
    parser.add_argument("--shape", type=parse_shape, help="e.g. hidden=192,layers=6")
    parser.add_argument("--log-every", type=int, default=100)
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.role is None:
        make_pair(args, argv)
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    record = train_model(args, args.role, device)
    (Path(args.out) / f"{args.role}.json").write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
