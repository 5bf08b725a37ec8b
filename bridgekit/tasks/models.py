"""Whether the two models can be used: by their files here and by the hub's word, before anything is loaded or made.

check_models(config)          # the folders
check_hub(config)             # what has to come from the hub, with one question for each model
"""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

from bridgekit.config import Config, ConfigError, is_geometry, refuse_if, resolve_model_folder
from bridgekit.keys import UNSUPPORTED

MODELS = ("source_model", "target_model")
SETTINGS = "tokenizer_config.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
MAX_AUTO_LAYERS = 8  # that an injector works on
LONGEST_HEADER = 100_000_000  # bytes of a safetensors file, as the library has it


def check_models(config: Config) -> None:
    """Refuse a missing pair, and one of a kind that cannot work, before any run folder is made or GPU taken."""
    for key in MODELS:
        folder = resolve_model_folder(key, getattr(config.pair, key))
        if folder is None:
            continue
        if not any(folder.glob("*.safetensors")):
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
            out = "make a pair with `bridgekit pair`"
            out = "save it again as safetensors: pickled weights can run code" if pickled else out
            raise ConfigError(f"pair.{key}: no safetensors file in '{folder}': {out}")
        for name in ("config.json", "tokenizer.json", SETTINGS, "model.safetensors.index.json"):
            found = load_object(folder / name)
            refuse_if(found is None, f"pair.{key}: {name} in '{folder}' is not valid JSON: restore it")
        settings = load_object(folder / "config.json")
        kind = settings.get("model_type")
        out = "use a model with attention in all or some of its layers"
        refuse_if(kind in UNSUPPORTED, f"pair.{key}: '{folder}' is a {kind}, which no bridge works on here: {out}")
        has_tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
        refuse_if(not has_tokenizer, f"pair.{key}: no tokenizer in '{folder}' ({TOKENIZERS[0]}): restore it")
        has_template = any(folder.glob("chat_template*")) or "chat_template" in load_object(folder / SETTINGS)
        no_chat = config.pair.prompt_format == "chat" and not has_template
        refuse_if(no_chat, f"pair.prompt_format: '{folder}' has no chat template: set prompt_format=plain")
        if isinstance(n_layers := settings.get("num_hidden_layers"), int):
            reads = (key == "source_model") == (config.pair.direction == "forward")
            name = "bridge.source_layers" if reads else "bridge.inject_layers"
            if reads or config.bridge.injector != "prefix":
                pick_layers(SimpleNamespace(n_layers=n_layers), getattr(config.bridge, name.split(".")[1]), name)
        named = load_object(folder / "model.safetensors.index.json").get("weight_map", {}).values()
        for file in sorted({*folder.glob("*.safetensors"), *(folder / name for name in named)}):
            whole = is_whole(file)
            refuse_if(not whole, f"pair.{key}: {file.name} in '{folder}' is cut, damaged or not there: copy it again")


def load_object(path: Path) -> dict | None:
    """The JSON object in a file; {} where there is no file, None where it holds something else."""
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(size, LONGEST_HEADER)))
        ends = [part["data_offsets"][1] for name, part in header.items() if name != "__metadata__"]
        return file.stat().st_size == 8 + size + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return False


def pick_layers(lm, wanted: str, key: str = "bridge.source_layers") -> tuple[int, ...]:
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


# ---- the hub --------------------------------------------------------------------------------------------------------


def check_hub(config: Config) -> None:
    """Refuse a model that has to come from the hub, and which the hub does not give."""
    for key in MODELS:
        model = getattr(config.pair, key)
        if not is_geometry(model) and resolve_model_folder(key, model) is None:
            name, _, revision = model.partition("@")
            try:
                ask_hub(name, revision)
            except OSError as error:
                why = explain_hub(error, name, revision)
                raise ConfigError(f"pair.{key}: cannot load '{model}': {why}") from None


@functools.cache
def ask_hub(name: str, revision: str) -> dict[str, bool]:
    """Ask the hub once for a model; where it cannot be reached, which transformers would retry for minutes, a copy on
    this disk will do. -> options for loading it"""
    import huggingface_hub as hub

    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(name, "config.json", revision=revision or None), timeout=10)
    except Exception as error:  # of the hub, or of whatever its client speaks to the network with
        if not isinstance(hub.try_to_load_from_cache(name, "config.json", revision=revision or None), str):
            raise OSError(str(error) or type(error).__name__) from error
        return dict(local_files_only=True)
    return {}


def explain_hub(error: BaseException, name: str, revision: str) -> str:
    """Why the hub did not give a model, and what to do."""
    first, kinds = str(error).strip().splitlines()[0], set()
    while error is not None:
        kinds, error = kinds | {type(error).__name__}, error.__cause__ or error.__context__
    if "GatedRepoError" in kinds:
        return f"it is gated: ask for access at https://huggingface.co/{name}, then `hf auth login` or set HF_TOKEN"
    if "RevisionNotFoundError" in kinds:
        return f"it has no revision '{revision}'"
    if "safetensors" in first:
        return "it has no safetensors, and pickled weights can run code: use a revision that has them"
    if kinds & {
        "RepositoryNotFoundError",
        "LocalEntryNotFoundError",
        "OfflineModeIsEnabled",
        "ConnectError",
        "ConnectTimeout",
    }:
        return f"no folder '{name}' here, and the hub was not reached or shows no such model (private: `hf auth login`)"
    return first
