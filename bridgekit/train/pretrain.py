"""Make the embedded pair: two small models of different kinds, each taught its own half of a lexicon.

    bridgekit pair --out bridgekit/model/embedded_pair --lexicon-seed 1          # both models; a GPU takes minutes
    python -m bridgekit.train.pretrain --role target --out DIR --lexicon-seed 1  # one of them

Documents (corpus.py) are packed into windows of 1,024 tokens, so that positions and distances up to there are
familiar. What a pair is made of is a `PairRecipe`; each of its fields is an option of the command.
"""

import argparse
import difflib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from bridgekit.alive import watch_parent
from bridgekit.config import ConfigError, check_type
from bridgekit.inside.probe import probe_pair
from bridgekit.keys import holds
from bridgekit.model.generation import generate_batch
from bridgekit.model.pair import LanguageModel, load_model
from bridgekit.model.states import in_batches
from bridgekit.runs import write_text_atomic
from bridgekit.tasks import Example, literal_prompt, source_prompt, told_prompt, units
from bridgekit.tasks.answers import extract_answer
from bridgekit.train.corpus import KINDS, NOTE_FACTS, make_documents

ROLES = ("source", "target")
WINDOW = 1024
SHAPES = {
    "source": dict(hidden=160, layers=5, heads=5, kv_heads=5, feed_forward=448, vocab=1024),
    "target": dict(hidden=192, layers=4, heads=6, kv_heads=6, feed_forward=512, vocab=1536),
}


def key(default: object, meaning: str, allowed: str = "") -> typing.Any:
    return field(default=default, metadata={"meaning": meaning, "allowed": allowed})


@dataclass(frozen=True, kw_only=True)
class PairRecipe:
    """What a pair is made of; checked as a configuration is."""

    lexicon_seed: int = key(1, "a new seed is a new lexicon and a new pair", ">= 0")
    steps: int = key(3000, "training steps of each model", ">= 1")
    batch: int = key(48, f"windows of {WINDOW:,} tokens a step", ">= 1")
    documents: int = key(300_000, "documents that each model is taught", ">= 1")
    kinds: tuple = key((), "the mix of documents, KIND=WEIGHT,...; notes teach to read facts in the context")
    note_facts: tuple = key((), "N,N,...: facts a note may state (default: short notes, longer for the source)")
    lr: float = key(3e-3, "peak learning rate", "> 0")
    weight_decay: float = key(0.01, "of AdamW", ">= 0")
    prompt_weight: float = key(0.1, "loss weight of tokens that are not answer", ">= 0")
    shape: tuple = key((), "e.g. hidden=192,layers=6; what is not named stays")
    log_every: int = key(100, "steps from one log line to the next", ">= 1")

    @property
    def mix(self) -> dict[str, int]:
        """Weights of the kinds of documents; a kind that is not named does not occur."""
        return split_numbers(self.kinds) or KINDS

    def facts(self, role: str) -> tuple[int, ...]:
        return tuple(map(int, self.note_facts)) or NOTE_FACTS[role]

    def sizes(self, role: str) -> dict[str, int]:
        return SHAPES[role] | split_numbers(self.shape)


LISTS = {  # options with several values: the form of each, an example, the names there are
    "kinds": (r"(\w+)=\d+", "problem=20,note=80", KINDS),
    "note_facts": (r"()[1-9]\d*", "1,4,16", ("",)),
    "shape": (r"(\w+)=[1-9]\d*", "hidden=192,layers=6", SHAPES["source"]),
}


def build_recipe(**values) -> PairRecipe:
    """A checked recipe; an unknown name, a wrong type or a value out of range is refused in one line."""
    known = {one.name: one for one in fields(PairRecipe)}
    for name, value in values.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"unknown parameter '{name}': did you mean '{near}'? (bridgekit pair --help)")
        limit = known[name].metadata["allowed"]
        values[name] = check_type(name, known[name].type, value)
        if limit and not (math.isfinite(value) and holds(limit, {}, values[name])):
            raise ConfigError(f"{name}: must be {limit}, got {value!r}")
        for text in values[name] if name in LISTS else ():
            form, example, names = LISTS[name]
            if not (found := re.fullmatch(form, text)):
                raise ConfigError(f"{name}: expected e.g. {example}, got '{text}'")
            if found[1] not in names:
                raise ConfigError(f"{name}: no '{found[1]}' (there are: {', '.join(names)})")
    recipe = PairRecipe(**values)
    if not sum(recipe.mix.values()):
        raise ConfigError("kinds: all weights are 0, so there is no document: raise one")
    return recipe


def split_numbers(texts: tuple[str, ...]) -> dict[str, int]:
    """`("note=60", "problem=40")` as numbers by name."""
    return {name: int(number) for name, number in (text.split("=") for text in texts)}


def train_tokenizer(role: str, texts: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """Source: SentencePiece-like BPE with `▁`; target: byte-level BPE. Both split numbers into digits."""
    if role == "source":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁?\p{L}+|\p{N}|\n+|[^\p{L}\p{N}\n]"), "isolated")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        bos, eos, alphabet = "<s>", "</s>", []
        special = ["<unk>", bos, eos, *(f"<0x{i:02X}>" for i in range(256))]
    else:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
        bos, eos, alphabet = "<|begin|>", "<|end|>", pre_tokenizers.ByteLevel.alphabet()
        special = [bos, eos]
    options = {"vocab_size": vocab, "special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(**options))
    names = {"bos_token": bos, "eos_token": eos, "pad_token": eos}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, clean_up_tokenization_spaces=False)


def build_model(role: str, tokenizer, shape: dict[str, int]) -> torch.nn.Module:
    """A Mistral for the source, a Llama for the target."""
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
    if not n:
        raise ConfigError(f"documents: {len(documents)} fill no window of {WINDOW:,} tokens: ask for more")
    return torch.tensor(ids[:n]).view(-1, WINDOW), torch.tensor(weights[:n]).view(-1, WINDOW)


def train_model(recipe: PairRecipe, role: str, out: Path, device: torch.device) -> dict:
    """Train one model and save it; returns what the pair's record says of it."""
    started, seed = time.time(), recipe.lexicon_seed
    torch.manual_seed(seed * 2 + (role == "target"))
    lexicon, shape = units.make_lexicon(seed), recipe.sizes(role)
    documents = make_documents(lexicon, role, recipe.documents, seed, recipe.mix, recipe.facts(role))
    tokenizer = train_tokenizer(role, [prompt + answer for prompt, answer in documents[:40000]], shape["vocab"])
    ids, weights = pack_documents(tokenizer, documents, recipe.prompt_weight)
    model = build_model(role, tokenizer, shape).to(device)
    n_params, took = sum(p.numel() for p in model.parameters()), time.time() - started
    print(f"{role}: {n_params / 1e6:.2f}M parameters, {len(ids)} windows, data {took:.0f} s", flush=True)
    fit(model, ids.to(device), weights.to(device), recipe, role)
    save_model(model, tokenizer, out / role)
    lm = load_model(f"{role}_model", str(out / role), device, torch.float32)
    record = {
        "role": role, "parameters": n_params, "steps": recipe.steps, "batch": recipe.batch, "lr": recipe.lr,
        "documents": recipe.documents, "kinds": recipe.mix, "note_facts": recipe.facts(role),
        "seconds": round(time.time() - started, 1),
        "validation": measure_knowledge(lm, lexicon, role), "probe": measure_probe(lm, lexicon, role),
    }  # fmt: skip
    print(json.dumps(record), flush=True)
    return record


def fit(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor, recipe: PairRecipe, role: str) -> None:
    """The training loop: windows in an order of their own for each pass, and a log line with the window's mean loss."""
    device, started = ids.device, time.time()
    settings = {"lr": recipe.lr, "betas": (0.9, 0.98), "weight_decay": recipe.weight_decay}
    optimizer = torch.optim.AdamW(model.parameters(), **settings, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe.steps))
    order, queue = torch.Generator().manual_seed(recipe.lexicon_seed), torch.empty(0, dtype=torch.long)
    total, n_summed = torch.zeros((), device=device), 0
    for step in range(1, recipe.steps + 1):
        if len(queue) < recipe.batch:
            queue = torch.cat([queue, torch.randperm(len(ids), generator=order)])
        rows, queue = queue[: recipe.batch].to(device), queue[recipe.batch :]
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
        total, n_summed = total + loss.detach(), n_summed + 1
        if step % recipe.log_every == 0 or step == recipe.steps:
            mean, elapsed = total.item() / n_summed, time.time() - started
            print(f"{role}: step {step}/{recipe.steps} loss {mean:.4f} {elapsed:.0f} s", flush=True)
            total, n_summed = torch.zeros_like(total), 0


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: warm-up over the first 3%, then a cosine to zero."""
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
    """Share right on validation problems: units it knows, units it does not, and those with the fact stated; and with
    the fact among others about words that no model knows, which a pair for facts in context must be able to read."""
    examples = units.make_examples(lexicon, "val", n, seed=10_000)
    foreign = [e for e in examples if e.group not in ("both", f"{role}_only")]
    shares = {"known": share_right(lm, [e for e in examples if e not in foreign], literal_prompt)}
    shares |= {"unknown": share_right(lm, foreign, literal_prompt), "told": share_right(lm, foreign, told_prompt)}
    for n_facts in (4, 16, 64):
        noted = units.make_examples(lexicon, "val", n // 5, seed=10_000, variant="context", n_facts=n_facts)
        shares[f"among_{n_facts}"] = share_right(lm, noted, source_prompt)
    return shares


def share_right(lm: LanguageModel, examples: list[Example], prompt_of) -> float:
    rows, right = [lm.bos + ids for ids in lm.tokenize([prompt_of(e).text for e in examples])], 0
    for chunk in in_batches([len(row) for row in rows], 256):
        answers = generate_batch(lm, [rows[i] for i in chunk], [[] for _ in chunk])
        right += sum(extract_answer(g.text) == examples[i].gold for g, i in zip(answers, chunk, strict=True))
    return round(right / len(examples), 4)


def measure_probe(lm: LanguageModel, lexicon, role: str) -> dict[int, dict[str, float]]:
    """Share of validation units whose value a linear probe reads at the word's last token, by layer: what a bridge
    can hope for, held-out units and held-out values apart."""
    frame = probe_pair(lm, lexicon, role, report="val")
    wanted = (frame["place"] == "word end") & (frame["digit"] == "joint") & (frame["novelty"] != "not taught")
    table = frame[wanted].pivot(index="layer", columns="novelty", values="point").round(4)
    return {int(layer): row.to_dict() for layer, row in table.iterrows()}


def make_pair(recipe: PairRecipe, out: Path, replace: bool, argv: list[str]) -> None:
    """Train both models, at once where there is a GPU, and write the pair's record last.

    Each is a child that is given the same arguments and ends when this process does."""
    if (out / "pair.json").exists() and not replace:
        raise ConfigError(f"--out: '{out}' already holds a pair; choose another folder or add --replace")
    out.mkdir(parents=True, exist_ok=True)
    (out / "pair.json").unlink(missing_ok=True)
    environment = os.environ | {"BRIDGEKIT_PARENT_PID": str(os.getpid())}
    commands = [[sys.executable, "-m", "bridgekit.train.pretrain", *argv, "--role", role] for role in ROLES]
    if torch.cuda.is_available():
        children = [subprocess.Popen(command, env=environment) for command in commands]
        codes = [child.wait() for child in children]
    else:
        codes = [subprocess.run(command, env=environment).returncode for command in commands]
    if any(codes):
        raise RuntimeError(f"a model's training failed (exit codes {codes}); no pair.json was written in {out}")
    lexicon = units.fingerprint_lexicon(units.make_lexicon(recipe.lexicon_seed))
    records = [json.loads((out / f"{role}.json").read_text()) for role in ROLES]
    record = {"lexicon_seed": recipe.lexicon_seed, "lexicon": lexicon, "models": records, "torch": torch.__version__}
    write_text_atomic(out / "pair.json", json.dumps(record, indent=1) + "\n")
    for role in ROLES:
        (out / f"{role}.json").unlink()


def parse_arguments(argv: list[str]) -> tuple[argparse.Namespace, PairRecipe]:
    parser = argparse.ArgumentParser(prog="bridgekit pair", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, help="folder for source/, target/ and pair.json")
    parser.add_argument("--role", choices=ROLES, help="train one of the two only")
    parser.add_argument("--replace", action="store_true", help="overwrite a pair that is there")
    names = [known.name for known in fields(PairRecipe)]
    for known in fields(PairRecipe):
        kind = known.type if known.type in (int, float) else lambda text: tuple(text.split(","))
        meaning = f"{known.metadata['meaning']}{f' ({known.default})' if known.default else ''}"
        parser.add_argument(f"--{known.name.replace('_', '-')}", type=kind, default=known.default, help=meaning)
    args, unknown = parser.parse_known_args(argv)
    strange = {text.lstrip("-").split("=")[0].replace("-", "_"): text for text in unknown[:1]}
    return args, build_recipe(**{name: getattr(args, name) for name in names}, **strange)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, recipe = parse_arguments(argv)
    watch_parent()  # an orphan would hold its GPU
    if args.role is None:
        make_pair(recipe, args.out, args.replace, argv)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    record = train_model(recipe, args.role, args.out, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_text_atomic(args.out / f"{args.role}.json", json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
