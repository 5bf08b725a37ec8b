"""Make the embedded pair: two small models of different kinds, each taught its own half of a lexicon.

    bridgekit pair --out bridgekit/model/embedded_pair --lexicon-seed 1          # both models; a GPU takes minutes
    python -m bridgekit.train.pretrain --role target --out DIR --lexicon-seed 1  # one of them

Documents (corpus.py) are packed into windows of 1,024 tokens, so that positions and distances up to there are
familiar. What a pair is made of is its RECIPE; each of its keys is an option of the command. The shipped pair is older:
`--digit-weight 0 --lr 0.003 --kinds problem=42,fact=32,note=15,helper=11`, its source with 1,024 tokens.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn import Linear
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from bridgekit.alive import watch_parent
from bridgekit.config import ConfigError, Parser, nearest, refuse_if
from bridgekit.inside.probe import probe_pair
from bridgekit.keys import Key, holds
from bridgekit.model.generation import generate_batch
from bridgekit.model.pair import LanguageModel, load_model
from bridgekit.model.states import in_batches
from bridgekit.runs import write_text_atomic
from bridgekit.tasks import CUE, Example, literal_prompt, source_prompt, told_prompt, units
from bridgekit.tasks.answers import extract_answer
from bridgekit.train.corpus import KINDS, NOTE_FACTS, make_documents

ROLES = ("source", "target")
WINDOW = 1024
ACCEPTED = 0.95  # the least of what a model of an accepted pair must have right
UNKNOWN = -1  # the mark of a word whose value the model cannot know
READ_AT = 0.8  # of the depth: where digits are read, in the middle of what a bridge reads
SHAPES = {
    "source": dict(hidden=160, layers=5, heads=5, kv_heads=5, feed_forward=448, vocab=1536),
    "target": dict(hidden=192, layers=4, heads=6, kv_heads=6, feed_forward=512, vocab=1536),
}

RECIPE = {  # what a pair is made of: options of the command
    "lexicon_seed": Key(1, "a new seed is a new lexicon and a new pair", ">= 0 and < 4294967296"),
    "steps": Key(3000, "training steps of each model", ">= 1"),
    "batch": Key(48, f"windows of {WINDOW:,} tokens a step", ">= 1"),
    "documents": Key(300_000, "documents that each model is taught", ">= 1"),
    "kinds": Key("", "the mix of documents, KIND=WEIGHT,...; notes teach to read facts in the context"),
    "note_facts": Key("", "N,N,...: facts a note may state (default: short notes, longer for the source)"),
    "lr": Key(2e-3, "peak learning rate", "> 0"),
    "weight_decay": Key(0.01, "of AdamW", ">= 0"),
    "digit_weight": Key(0.3, "loss weight of reading a word's value, or that it has none, at its last token", ">= 0"),
    "prompt_weight": Key(0.1, "loss weight of tokens that are not answer", ">= 0"),
    "shape": Key("", "e.g. hidden=192,layers=6; what is not named stays"),
    "log_every": Key(100, "steps from one log line to the next", ">= 1"),
}


def parse_recipe(argv: list[str]) -> argparse.Namespace:
    """The options of the command; an unknown name or a value that cannot be is refused in one line."""
    parser = Parser(prog="bridgekit pair", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", required=True, type=Path, help="folder for source/, target/ and pair.json")
    parser.add_argument("--role", choices=ROLES, help="train one of the two only")
    parser.add_argument("--replace", action="store_true", help="overwrite a pair that is there")
    for name, (default, meaning, _, _) in RECIPE.items():
        option, shown = f"--{name.replace('_', '-')}", f" ({default})" if default else ""
        parser.add_argument(option, type=type(default), default=default, help=meaning + shown)
    recipe, unknown = parser.parse_known_args(argv)
    for text in unknown:
        name = text.lstrip("-").split("=")[0].replace("-", "_")
        near = nearest(name, RECIPE)
        raise ConfigError(f"unknown parameter '{name}': did you mean '{near}'? (bridgekit pair --help)")
    for name, (_, _, limit, _) in RECIPE.items():
        value = getattr(recipe, name)
        fits = not limit or math.isfinite(value) and holds(limit, {}, value)
        refuse_if(not fits, f"{name}: must be {limit}, got {value!r}")
    is_list = re.fullmatch(r"([1-9]\d*(,[1-9]\d*)*)?", recipe.note_facts)
    refuse_if(not is_list, f"note_facts: expected e.g. 1,4,16, got '{recipe.note_facts}'")
    recipe.note_facts = tuple(map(int, filter(None, recipe.note_facts.split(","))))
    recipe.kinds = parse_numbers("kinds", recipe.kinds, "problem=20,note=80", KINDS) or KINDS
    recipe.shape = parse_numbers("shape", recipe.shape, "hidden=192,layers=6", SHAPES["source"])
    refuse_if(not sum(recipe.kinds.values()), "kinds: all weights are 0, so there is no document: raise one")
    refuse_if(0 in recipe.shape.values(), "shape: every size must be above 0")
    for role, one in ((role, SHAPES[role] | recipe.shape) for role in ROLES):
        fits = one["hidden"] % (2 * one["heads"]) == 0 == one["heads"] % one["kv_heads"]
        sizes = ", ".join(f"{name}={one[name]}" for name in ("hidden", "heads", "kv_heads"))
        refuse_if(not fits, f"shape: heads must divide hidden evenly, and kv_heads the heads; {role} has {sizes}")
    return recipe


def parse_numbers(name: str, text: str, example: str, known: Iterable[str]) -> dict[str, int]:
    """`note=60,problem=40` as numbers by name, which must be known."""
    is_list = re.fullmatch(r"(\w+=\d+(,\w+=\d+)*)?", text)
    refuse_if(not is_list, f"{name}: expected e.g. {example}, got '{text}'")
    numbers = {one: int(number) for one, number in re.findall(r"(\w+)=(\d+)", text)}
    for one in numbers.keys() - known:
        raise ConfigError(f"{name}: no '{one}' (there are: {', '.join(known)})")
    return numbers


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
    common = {"hidden_size": shape["hidden"], "intermediate_size": shape["feed_forward"]}
    common |= {"num_attention_heads": shape["heads"], "num_key_value_heads": shape["kv_heads"]}
    common |= {"num_hidden_layers": shape["layers"], "vocab_size": len(tokenizer)}
    common |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    common |= {"max_position_embeddings": WINDOW, "tie_word_embeddings": True}
    if role == "source":
        return MistralForCausalLM(MistralConfig(**common, sliding_window=None))
    return LlamaForCausalLM(LlamaConfig(**common))


def pack_documents(tokenizer, documents, prompt_weight: float, values: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """Windows of token ids, the weight of each token's loss, and marks. -> (N, WINDOW) each"""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    digits = set(tokenizer.convert_tokens_to_ids(list("0123456789")))
    parts = (tokenize_marked(tokenizer, texts, values) for texts in zip(*documents, strict=True))
    ids, weights, marks = [], [], []
    for (said, _), (prompt, at), (answer, then) in zip(documents, *parts, strict=True):
        ids += [bos, *prompt, *answer, eos]
        # In a list of facts the words are drawn at random: only the values can be learned.
        known = [1.0] * len(answer) if said.endswith(CUE) else [1.0 if t in digits else prompt_weight for t in answer]
        weights += [0.0] + [prompt_weight] * len(prompt) + known + [1.0]
        marks += [0, *at, *(max(mark, 0) for mark in then), 0]  # what an answer names was met before
    n = len(ids) // WINDOW * WINDOW
    if not n:
        raise ConfigError(f"documents: {len(documents)} fill no window of {WINDOW:,} tokens: ask for more")
    return tuple(torch.tensor(row[:n]).view(-1, WINDOW) for row in (ids, weights, marks))


def tokenize_marked(tokenizer, texts: Sequence[str], values: dict[str, int]) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of each text and marks: at the last token of a word its value, or UNKNOWN where a word that has none is
    first met; elsewhere 0."""
    encoded = tokenizer(list(texts), add_special_tokens=False)
    for i, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
        marks = [0] * len(ids)
        met: set[str] = set()
        for word in re.finditer("[a-z]+", text):
            unknown = UNKNOWN if word[0] not in met and units.is_invented(word[0]) else 0
            if mark := values.get(word[0], unknown):
                marks[encoded.char_to_token(i, word.end() - 1)] = mark
            met.add(word[0])
        yield ids, marks


def train_model(recipe: argparse.Namespace, role: str, device: torch.device) -> dict:
    """Train one model and save it; returns what the pair's record says of it."""
    started, seed = time.time(), recipe.lexicon_seed
    torch.manual_seed(seed * 2 + (role == "target"))
    lexicon, shape = units.make_lexicon(seed), SHAPES[role] | recipe.shape
    note_facts = recipe.note_facts or NOTE_FACTS[role]
    documents = make_documents(lexicon, role, recipe.documents, seed, recipe.kinds, note_facts)
    tokenizer = train_tokenizer(role, [prompt + answer for prompt, answer in documents[:40000]], shape["vocab"])
    values = {unit.word: unit.value for unit in units.known_units(lexicon, role)}
    packed = pack_documents(tokenizer, documents, recipe.prompt_weight, values)
    model = build_model(role, tokenizer, shape).to(device)
    n_params, took = sum(p.numel() for p in model.parameters()), time.time() - started
    print(f"{role}: {n_params / 1e6:.2f}M parameters, {len(packed[0])} windows, data {took:.0f} s", flush=True)
    fit(model, *(part.to(device) for part in packed), recipe, role)
    save_model(model, tokenizer, recipe.out / role)
    lm = load_model(f"{role}_model", str(recipe.out / role), device, torch.float32)
    record = {"role": role, "parameters": n_params, "steps": recipe.steps, "batch": recipe.batch, "lr": recipe.lr}
    record |= {
        "digit_weight": recipe.digit_weight,
        "documents": recipe.documents,
        "kinds": recipe.kinds,
        "note_facts": note_facts,
    }
    record |= {"seconds": round(time.time() - started, 1), "validation": measure_knowledge(lm, lexicon, role)}
    record |= {"probe": measure_probe(lm, lexicon, role)}
    print(json.dumps(record), flush=True)
    return record


def fit(model, ids: torch.Tensor, weights: torch.Tensor, marks: torch.Tensor, recipe, role: str) -> None:
    """The training loop: windows in an order of their own for each pass, and a log line with the window's mean loss.

    Beside the next token, a linear reading of the value's digits at a word's last token, or of there being none.
    Without it how much of a value stands there varies from pair to pair, and with it what a bridge can find; and a
    bridge that cannot tell what the source knows speaks also where it should not."""
    device, started = ids.device, time.time()
    settings = {"lr": recipe.lr, "betas": (0.9, 0.98), "weight_decay": recipe.weight_decay}
    layer, reading = round(READ_AT * model.config.num_hidden_layers), Linear(model.config.hidden_size, 22).to(device)
    learned = [*model.parameters(), *reading.parameters()] if recipe.digit_weight else model.parameters()
    optimizer = torch.optim.AdamW(learned, **settings, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, recipe.steps))
    order, queue = torch.Generator().manual_seed(recipe.lexicon_seed), torch.empty(0, dtype=torch.long)
    total, n_summed = torch.zeros((), device=device), 0
    for step in range(1, recipe.steps + 1):
        if len(queue) < recipe.batch:
            queue = torch.cat([queue, torch.randperm(len(ids), generator=order)])
        rows, queue = queue[: recipe.batch].to(device), queue[recipe.batch :]
        batch, weight = ids[rows], weights[rows][:, 1:]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            answer = model(input_ids=batch, use_cache=False, output_hidden_states=bool(recipe.digit_weight))
        logits = answer.logits[:, :-1]
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        loss = (loss * weight.flatten()).sum() / weight.sum()
        if recipe.digit_weight:
            loss = loss + recipe.digit_weight * digit_loss(reading(answer.hidden_states[layer].float()), marks[rows])
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


def digit_loss(read: torch.Tensor, marks: torch.Tensor) -> torch.Tensor:
    """Of the tens and the ones read at each token that is marked: ten digits, or none. (B, T, 22), (B, T) -> ()"""
    value = marks.flatten()
    digits = [torch.where(value == UNKNOWN, 10, digit) for digit in (value // 10, value % 10)]
    places = zip(read.flatten(0, 1).split(11, dim=1), digits, strict=True)
    missed = sum(F.cross_entropy(place, digit, reduction="none") for place, digit in places)
    return (missed * (value != 0)).sum() / (value != 0).sum().clamp(min=1)


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


def is_accepted(record: dict) -> bool:
    """Whether a model answers what it knows or is told, and holds values by their digits: one rule for all pairs.

    Only validation units are asked, and no bridge: what a pair is accepted for is not what it is judged by."""
    shares = [record["validation"].get("known", 0.0), record["validation"].get("told", 0.0)]
    shares.append(max((row.get("held_value", 0.0) for row in record["probe"].values()), default=0.0))
    return min(shares) >= ACCEPTED


def make_pair(recipe: argparse.Namespace, argv: list[str]) -> None:
    """Train both models, at once where there is a GPU, and write the pair's record last.

    Each is a child that is given the same arguments and ends when this process does."""
    out, is_made = recipe.out, (recipe.out / "pair.json").exists() and not recipe.replace
    refuse_if(is_made, f"--out: '{out}' already holds a pair; choose another folder or add --replace")
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
    record = {"lexicon_seed": recipe.lexicon_seed, "lexicon": lexicon, "accepted": all(map(is_accepted, records))}
    record |= {"models": records, "torch": torch.__version__}
    write_text_atomic(out / "pair.json", json.dumps(record, indent=1) + "\n")
    for role in ROLES:
        (out / f"{role}.json").unlink()


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    recipe = parse_recipe(argv)
    watch_parent()  # an orphan would hold its GPU
    if recipe.role is None:
        make_pair(recipe, argv)
        return
    recipe.out.mkdir(parents=True, exist_ok=True)
    record = train_model(recipe, recipe.role, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    write_text_atomic(recipe.out / f"{recipe.role}.json", json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
