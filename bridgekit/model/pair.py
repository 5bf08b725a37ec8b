"""Load two frozen language models from anywhere, and turn prompts into the token pieces everything else uses.

    pair = load_pair(config)          # pair.source, pair.target: LanguageModel

Shapes: B batch, S source tokens, T target tokens, L captured layers, D hidden size.
"""

import re
from bisect import bisect_left, bisect_right
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter

import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridgekit.config import Config, ConfigError, count_shards, is_geometry, refuse_if, resolve_model_folder
from bridgekit.model.adapter import Decoder
from bridgekit.model.attention import fuse_pieces
from bridgekit.model.fingerprint import fingerprint_folder
from bridgekit.model.geometry import make_geometry
from bridgekit.model.tryout import try_decoder
from bridgekit.tasks import CUE, Prompt, units
from bridgekit.tasks.models import ask_hub, check_models, explain_hub

SAMPLE = "Question: What is 12 + 3?"  # what a model is tried on
MARK = "prompt-goes-here"  # stands for a text while a chat template is filled in
# What templates ask beside the messages: no worked thoughts, and no date of today, which would change every prompt.
TEMPLATE = dict(tokenize=False, enable_thinking=False, date_string="26 Jul 2024")


@dataclass
class LanguageModel:
    """A frozen causal model with its tokenizer."""

    model: torch.nn.Module
    tokenizer: object
    origin: str  # `embedded`, folder, hub id or geometry, as configured
    fingerprint: str  # of weights and tokenizer
    prompt_format: str = "plain"

    def __post_init__(self):
        self.forget()
        self.in_parts: bool | None = None  # does two-part attention work with it? Tried when it is first needed
        self.parts, tokenizer = Decoder(self.model), self.tokenizer
        config, bos, eos = self.parts.config, tokenizer.bos_token_id, tokenizer.eos_token_id
        self.device, self.dtype = self.model.device, self.model.dtype
        self.captures = self.device.type == "cuda" and not self.is_sharded  # are its steps replayed as captured graphs?
        self.decoder = self.parts.module  # without its head: embeddings or ids to hidden states
        self.hidden_size, self.n_layers = config.hidden_size, config.num_hidden_layers
        self.max_positions = getattr(config, "max_position_embeddings", float("inf"))
        # BOS where the tokenizer puts it, or has a token that is nothing else; GPT-2's ends texts as well.
        adds_bos = bos is not None and (bos != eos or tokenizer(SAMPLE)["input_ids"][:1] == [bos])
        self.bos: list[int] = [bos] if adds_bos else []
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [eos] if ends is None else [ends]
        self.eos_ids: set[int] = {end for end in ends if end is not None}
        # A taught answer ends in the tokenizer's own end token, which a chat model's turn ends in.
        self.end_id: int = eos if eos in self.eos_ids else min(self.eos_ids, default=eos)
        # What a cached text depends on: the fingerprint, which kept runs are matched by, and the end tokens.
        self.decode_key = f"{self.fingerprint}-{'.'.join(map(str, sorted(self.eos_ids)))}"
        if self.prompt_format == "chat":
            self.end_id, self.decode_key = self.turn_end(), f"{self.decode_key}-chat"
            self.eos_ids |= {self.end_id}

    def forget(self) -> None:
        """Free what is kept between batches: the keys of shared starts, and room with its captured graphs."""
        self.starts, self.rooms = {}, []

    @property
    def is_sharded(self) -> bool:
        """Are its layers on several GPUs?"""
        return len({*(getattr(self.model, "hf_device_map", None) or {}).values()}) > 1

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The decoder's layers, for hooks."""
        return self.parts.layers

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the embeddings' entries, as the decoder is given them: the size a soft token should have.

        Some families scale what they look up in their table."""
        table, ids = self.model.get_input_embeddings().weight, torch.tensor(self.sample, device=self.device)
        looked_up, scaled = (x.float().pow(2).mean().sqrt() for x in (table[ids], self.embed(ids)))
        return (table.float().pow(2).mean().sqrt() * (scaled / looked_up)).item()

    @cached_property
    def embeddings(self) -> torch.Tensor:
        """Those of all tokens, as the decoder is given them; the table itself where it is not scaled. (V, D)"""
        table, ids = self.model.get_input_embeddings().weight, torch.tensor(self.sample, device=self.device)
        return table if torch.equal(table[ids], self.embed(ids)) else self.embed(torch.arange(len(table)).to(ids))

    @property
    def sample(self) -> list[int]:
        """A few tokens of plain text."""
        return self.tokenize([SAMPLE])[0]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Embeddings as the decoder takes them. (B, T) -> (B, T, D)"""
        return self.model.get_input_embeddings()(ids)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own logits of its last hidden states, also capped or scaled. (B, T, D) -> (B, T, V)"""
        return self.parts.head(hidden)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def locate(self, texts: list[str]) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Ids of each text's tokens, without BOS, and where each stands: its first character and the one after it."""
        if not texts:
            return [], []
        options = dict(add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False)
        read = self.tokenizer(texts, **options)
        return read["input_ids"], read["offset_mapping"]

    def tokenize_after(
        self, prompts: list[str], answers: list[str], known: list[list[int]] | None = None
    ) -> tuple[list[list[int]], list[list[tuple[int, int]]]]:
        """Ids and character offsets of answers as they stand after their prompts.

        Tokenized alone an answer would begin otherwise with tokenizers that put a mark before every text. Where the
        prompt's end and the answer's beginning would be one token, the answer is tokenized alone: the model never
        sees that token after this prompt. The prompts' own ids may be `known`: long ones take long."""
        ids, offsets = [], []
        whole = self.locate([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
        rows = zip(self.tokenize(prompts) if known is None else known, *whole, strict=True)
        for prompt, answer, (before, both, places) in zip(prompts, answers, rows, strict=True):
            if both[: len(before)] == before:
                start, places = len(prompt), places[len(before) :]
                ids.append(both[len(before) :])
                offsets.append([(max(first - start, 0), last - start) for first, last in places])
            else:
                (alone,), (places,) = self.locate([answer])
                ids.append(alone)
                offsets.append(places)
        return ids, offsets

    def fill_template(self, answer: str | None = None) -> list[str]:
        """The chat template around a user's turn and, if there is one, the model's answer: what is not theirs."""
        turns = [{"role": "user", "content": MARK}] + [{"role": "assistant", "content": MARK}] * (answer is not None)
        try:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None, **TEMPLATE)
        except Exception as error:  # templates are programs of their authors
            why = " ".join(str(error).split())[:120]
            raise ConfigError(
                f"pair.prompt_format: '{self.origin}' has no chat template for one turn ({why})"
            ) from None
        bos = self.tokenizer.bos_token
        return (text.removeprefix(bos) if bos and self.bos else text).split(MARK)

    def turn_end(self) -> int:
        """The token that ends a turn of a chat model."""
        (after,) = self.tokenize(self.fill_template(answer=MARK)[-1:])
        ends = {self.tokenizer.eos_token_id, *self.eos_ids}
        return next((token for token in after if token in ends), self.end_id)

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor, mask, layers: tuple[int, ...], **options) -> torch.Tensor:
        """States of right-padded prompts at `layers` (0 is the embeddings). (B, S) -> (B, S, L, D)

        The mask (B, S) may be None; further options are the decoder's."""
        return self.parts.hidden_states(layers, input_ids=ids, attention_mask=mask, **options)


@dataclass
class Pair:
    source: LanguageModel
    target: LanguageModel
    lexicon_seed: int | None


@dataclass(frozen=True)
class Pieces:
    """Token ids of a prompt's three pieces, without BOS."""

    prefix: list[int]
    question: list[int]
    cue: list[int]
    n_shared: int = 0  # of the prefix: those that all prompts of the task begin with

    @property
    def all(self) -> list[int]:
        return self.prefix + self.question + self.cue


def format_prompts(lm: LanguageModel, prompts: list[Prompt]) -> list[Prompt]:
    """Prompts as the model is asked: with `pair.prompt_format: chat` each is a user's turn, without its cue.

    The template's text in front goes to the prefix, what follows the question is the new cue."""
    if lm.prompt_format == "plain":
        return prompts
    front, cue = lm.fill_template()
    shared, ends = len(front), [cue + p.cue.removeprefix(CUE) for p in prompts]
    return [Prompt(front + p.prefix, p.question, e, shared + p.n_shared) for p, e in zip(prompts, ends, strict=True)]


def split_prompts(lm: LanguageModel, prompts: list[Prompt]) -> list[Pieces]:
    """Tokenize whole prompts as the model is asked, then cut at the pieces' character boundaries.

    Tokenizing the pieces one by one would give other tokens than the model saw in training; a token that straddles
    a boundary goes to the earlier piece.
    """
    prompts = format_prompts(lm, prompts)
    pieces = []
    for prompt, ids, offsets in zip(prompts, *lm.locate([p.text for p in prompts]), strict=True):
        first = bisect_left(offsets, len(prompt.prefix), key=itemgetter(0))  # tokens that start before
        second = bisect_left(offsets, len(prompt.prefix + prompt.question), key=itemgetter(0))
        shared = bisect_right(offsets, prompt.n_shared, key=itemgetter(1)) if prompt.n_shared else 0
        pieces.append(Pieces(ids[:first], ids[first:second], ids[second:], shared))
    return pieces


def tokens_at(offsets: list[tuple[int, int]], first: int, last: int) -> list[int]:
    """The tokens that stand on any character from `first` to before `last`."""
    return [i for i, (start, end) in enumerate(offsets) if start < last and end > first]


def word_tokens(lm: LanguageModel, text: str, word: str) -> list[range]:
    """For each time the whole word stands in the text: its tokens, counted without BOS, found by their offsets."""
    (_, (offsets,)), found = lm.locate([text]), []
    for match in re.finditer(rf"\b{re.escape(word)}\b", text):
        tokens = tokens_at(offsets, *match.span())
        found.append(range(tokens[0], tokens[-1] + 1))
    return found


# ---- loading --------------------------------------------------------------------------------------------------------


def pad_ids(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask. -> (B, T), (B, T) bool"""
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.long)
    mask = torch.arange(max(map(len, rows), default=0)) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([i for r in rows for i in r], dtype=torch.long)
    return ids.to(device), mask.to(device)


def load_model(
    key: str, model: str, device: torch.device, dtype: torch.dtype, prompt_format: str = "plain", shards: int = 1
) -> LanguageModel:
    """A frozen model in eval mode, tried on a few tokens; one that would fail or mislead later is refused."""
    folder, place = resolve_model_folder(key, model), place_layers(device, shards)
    if is_geometry(model):
        loaded, tokenizer, fingerprint = make_geometry(key, model, device, dtype, place if shards > 1 else None)
    else:
        with ThreadPoolExecutor(1) as pool:  # the files are hashed while they are loaded
            hashed = pool.submit(fingerprint_folder, folder) if folder else None
            loaded, tokenizer = load_weights(key, model, str(folder or model), dtype, place)
            commit = f"{model.split('@')[0]}@{getattr(loaded.config, '_commit_hash', None)}"
            fingerprint = hashed.result() if hashed else commit
    why = (
        f"'{model}' has a tokenizer that does not say which characters a token stands for: use one with tokenizer.json"
    )
    refuse_if(not tokenizer.is_fast, f"pair.{key}: {why}")
    lm = LanguageModel(loaded.requires_grad_(False).eval(), tokenizer, model, fingerprint, prompt_format)
    rows = loaded.get_input_embeddings().weight.shape[0]
    refuse_if(lm.end_id is None, f"pair.{key}: '{model}' has no end token (eos_token_id): its answers would never end")
    fits = max(*lm.sample, *lm.bos, lm.end_id) < rows
    refuse_if(
        not fits, f"pair.{key}: '{model}' has a tokenizer with more tokens than its {rows} embeddings: not its own"
    )
    if lm.is_sharded:  # what leaves the last layer goes on where the bridge is
        add_hook_to_module(lm.decoder, AlignDevicesHook(lm.device, io_same_device=True), append=True)
    try_decoder(lm.parts, lm.sample, f"pair.{key}: '{model}' ({loaded.config.model_type})")
    if not lm.is_sharded:
        fuse_pieces(loaded)
    return lm


def place_layers(device: torch.device, shards: int) -> dict[str, object]:
    """Options of `from_pretrained`: all layers straight to their device, or over so many GPUs, as they have room."""
    if shards > 1:
        return {"device_map": "balanced", "max_memory": {i: torch.cuda.mem_get_info(i)[0] for i in range(shards)}}
    return {} if device.type == "cpu" else {"device_map": {"": device}}


def load_weights(key: str, model: str, place: str, dtype: torch.dtype, here: dict[str, object]):
    """Model and tokenizer from safetensors, without remote code; one with tensors missing is refused."""
    is_hub = place == model and resolve_model_folder(key, model) is None
    name, _, revision = place.partition("@") if is_hub else (place, "", "")
    options = dict(trust_remote_code=False) | (dict(revision=revision) if revision else {})
    transformers.utils.logging.disable_progress_bar()  # it would stand in every log and notebook
    try:
        options |= ask_hub(name, revision) if is_hub else {}
        loaded, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options, **here
        )
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, SafetensorError, ValueError, RuntimeError, ImportError) as error:
        why = explain_hub(error, name, revision) if is_hub else str(error).strip().splitlines()[0]
        raise ConfigError(f"pair.{key}: cannot load '{model}': {why}") from None
    if missing := sorted(info["missing_keys"]):
        lost = f"{len(missing)} tensors, first '{missing[0]}'"
        raise ConfigError(f"pair.{key}: '{model}' lacks {lost}: they would be random; restore its safetensors")
    return loaded, tokenizer


def load_pair(config: Config, device: torch.device | None = None) -> Pair:
    """Both models, already exchanged when the direction is swapped; `device` is where `auto` puts them.

    One after the other: transformers changes torch's global defaults while it loads."""
    check_models(config)
    settings, seed = config.pair, units.load_lexicon_seed(config)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [("source_model", settings.source_model), ("target_model", settings.target_model)]
    loaded, devices = [], (settings.source_device, settings.target_device)
    for model, asked in zip(models if settings.direction == "forward" else models[::-1], devices, strict=True):
        shards = count_shards(asked)
        place = device if asked == "auto" else torch.device("cuda:0" if shards > 1 else asked)
        auto = "bfloat16" if place.type == "cuda" else "float32"
        dtype = getattr(torch, auto if settings.dtype == "auto" else settings.dtype)
        loaded.append(load_model(*model, place, dtype, settings.prompt_format, shards))
    return Pair(*loaded, lexicon_seed=seed)
