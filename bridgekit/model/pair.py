"""Load two frozen language models from anywhere, and turn prompts into the token pieces everything else uses.

    pair = load_pair(config)          # pair.source, pair.target: LanguageModel

Shapes: B batch, S source tokens, T target tokens, L captured layers, D hidden size.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from bridgekit.config import Config, ConfigError, check_models, refuse_if, resolve_model_folder
from bridgekit.tasks import Prompt, units

MAX_AUTO_LAYERS = 8  # that an injector works on


@dataclass
class LanguageModel:
    """A frozen causal model with its tokenizer."""

    model: torch.nn.Module
    tokenizer: object
    origin: str  # `embedded`, folder or hub id, as configured
    fingerprint: str  # of weights and tokenizer

    def __post_init__(self):
        config, bos, eos = self.model.config, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.device, self.dtype = self.model.device, self.model.dtype
        self.decoder = self.model.base_model  # without its head: embeddings or ids to hidden states
        self.hidden_size, self.n_layers = config.hidden_size, config.num_hidden_layers
        self.max_positions = getattr(config, "max_position_embeddings", float("inf"))
        self.bos: list[int] = [] if bos is None else [bos]
        ends = self.model.generation_config.eos_token_id
        self.eos_ids: set[int] = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        # A taught answer ends in the tokenizer's own end token, which a chat model's turn ends in.
        self.end_id: int = eos if eos in self.eos_ids else min(self.eos_ids, default=eos)
        # What a cached text depends on: the fingerprint, which kept runs are matched by, and the end tokens.
        self.decode_key = f"{self.fingerprint}-{'.'.join(map(str, sorted(self.eos_ids)))}"

    @property
    def layers(self) -> torch.nn.ModuleList:
        """The decoder's layers, for hooks."""
        try:
            return self.decoder.layers
        except AttributeError:
            kind = self.model.config.model_type
            raise ConfigError(f"pair: {kind} ('{self.origin}') has no `layers` a bridge could work on") from None

    @cached_property
    def embedding_rms(self) -> float:
        """Root mean square of the embedding table's entries: the size a soft token should have."""
        return self.model.get_input_embeddings().weight.float().pow(2).mean().sqrt().item()

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_input_embeddings()(ids)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits of last hidden states. (..., D) -> (..., V)"""
        return self.model.get_output_embeddings()(hidden)

    def tokenize(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    def offsets(self, texts: list[str]) -> list[list[tuple[int, int]]]:
        """Of each text's tokens, without BOS: the first character and the one after the last."""
        options = dict(add_special_tokens=False, return_offsets_mapping=True)
        return self.tokenizer(texts, **options)["offset_mapping"] if texts else []

    @torch.no_grad()
    def hidden_states(self, ids: torch.Tensor, mask, layers: tuple[int, ...], **options) -> torch.Tensor:
        """States of right-padded prompts at `layers` (0 is the embeddings). (B, S) -> (B, S, L, D)"""
        kept = {}

        def keep(index, module, inputs, output):
            kept[index] = output[0] if isinstance(output, tuple) else output

        hooks = [self.layers[i - 1].register_forward_hook(partial(keep, i)) for i in layers if 0 < i < self.n_layers]
        try:
            out = self.decoder(input_ids=ids, attention_mask=mask, use_cache=False, **options)
        finally:
            for hook in hooks:
                hook.remove()
        ends = {0: self.embed(ids) if 0 in layers else None, self.n_layers: out.last_hidden_state}
        return torch.stack([ends[i] if i in ends else kept[i] for i in layers], dim=2)


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


def split_prompts(lm: LanguageModel, prompts: list[Prompt]) -> list[Pieces]:
    """Tokenize whole prompts, then cut at the pieces' character boundaries.

    Tokenizing the pieces one by one would give other tokens than the model saw in training; a token that straddles
    a boundary goes to the earlier piece.
    """
    texts, pieces = [p.text for p in prompts], []
    for prompt, ids, offsets in zip(prompts, lm.tokenize(texts), lm.offsets(texts), strict=True):
        first = sum(start < len(prompt.prefix) for start, _ in offsets)
        second = sum(start < len(prompt.prefix + prompt.question) for start, _ in offsets)
        shared = sum(end <= prompt.n_shared for _, end in offsets) if prompt.n_shared else 0
        pieces.append(Pieces(ids[:first], ids[first:second], ids[second:], shared))
    return pieces


def word_tokens(lm: LanguageModel, text: str, word: str) -> list[range]:
    """For each time the whole word stands in the text: its tokens, counted without BOS, found by their offsets."""
    (offsets,), found = lm.offsets([text]), []
    for match in re.finditer(rf"\b{re.escape(word)}\b", text):
        tokens = [i for i, (start, end) in enumerate(offsets) if start < match.end() and end > match.start()]
        found.append(range(tokens[0], tokens[-1] + 1))
    return found


def pick_layers(lm: LanguageModel, wanted: str, key: str = "bridge.source_layers") -> tuple[int, ...]:
    """Layers from a configuration's text: numbers like `0,2`, or `auto`.

    Of hidden states (0: the embeddings) auto reads three of the upper part: at 0.6, 0.8 and all of the depth. A linear
    probe finds a unit's value there, at the word's end (`probe` in pair.json). The best layer differs between pairs;
    the last layer alone loses the ones digit of unseen values. Of layers to work on (`bridge.inject_layers`) auto takes
    all of a small model, and eight spread over a large one.
    """
    n = lm.n_layers
    if key == "bridge.source_layers":
        last, auto = n, {max(1, round(0.6 * n)), max(1, round(0.8 * n)), n}
    else:
        most = min(n, MAX_AUTO_LAYERS)
        last, auto = n - 1, {round(i * (n - 1) / max(1, most - 1)) for i in range(most)}
    if wanted == "auto":
        return tuple(sorted(auto))
    try:
        layers = tuple(map(int, wanted.split(",")))
    except ValueError:
        raise ConfigError(f"{key}: expected 'auto' or numbers like '0,2', got '{wanted}'") from None
    fits = all(0 <= i <= last for i in layers) and len(set(layers)) == len(layers)
    refuse_if(not fits, f"{key}: this model has 0 to {last}, each once, got '{wanted}'")
    return layers


# ---- loading --------------------------------------------------------------------------------------------------------


def pad_ids(rows: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids and mask. -> (B, T), (B, T) bool"""
    lengths = torch.tensor([len(r) for r in rows], dtype=torch.long)
    mask = torch.arange(max(map(len, rows), default=0)) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([i for r in rows for i in r], dtype=torch.long)
    return ids.to(device), mask.to(device)


def fingerprint_folder(folder: Path) -> str:
    """Hash of weights and tokenizer: which model this is. Kept runs are matched by it, so it may not change."""
    digest = hashlib.sha256()
    for path in [p for pattern in ("*.safetensors", "tokenizer*", "config.json") for p in sorted(folder.glob(pattern))]:
        digest.update(path.name.encode())
        with path.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()[:16]


def load_model(key: str, model: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A frozen model in eval mode from safetensors, without remote code; one with tensors missing is refused."""
    folder = resolve_model_folder(key, model)
    place, options = folder or model, dict(dtype=dtype, use_safetensors=True, output_loading_info=True)
    transformers.utils.logging.disable_progress_bar()  # it would stand in every log and notebook
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False, **options)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise ConfigError(f"pair.{key}: cannot load '{model}': {str(error).strip().splitlines()[0]}") from None
    if missing := sorted(info["missing_keys"]):
        lost = f"{len(missing)} tensors, first '{missing[0]}'"
        raise ConfigError(f"pair.{key}: '{model}' lacks {lost}: they would be random; restore its safetensors")
    hub = f"{model}@{getattr(loaded.config, '_commit_hash', None)}"
    loaded.requires_grad_(False).eval().to(device)
    return LanguageModel(loaded, tokenizer, model, fingerprint_folder(folder) if folder else hub)


def load_pair(config: Config, device: torch.device | None = None) -> Pair:
    """Both models, already exchanged when the direction is swapped; `device` is where `auto` puts them."""
    check_models(config)
    settings, seed = config.pair, units.load_lexicon_seed(config)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [("source_model", settings.source_model), ("target_model", settings.target_model)]
    devices = [device if d == "auto" else torch.device(d) for d in (settings.source_device, settings.target_device)]
    loaded = []
    for model, place in zip(models if settings.direction == "forward" else models[::-1], devices, strict=True):
        auto = "bfloat16" if place.type == "cuda" else "float32"
        dtype = getattr(torch, auto if settings.dtype == "auto" else settings.dtype)
        loaded.append(load_model(*model, place, dtype))
    return Pair(*loaded, lexicon_seed=seed)
