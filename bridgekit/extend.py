"""A user's own producer, injector, task or loss: `path/to/file.py:Object` in a configuration key.

    bridge.producer: notebooks/my_bridge.py:MyProducer       # a file below the project's root
    bridge.producer_options: [width=64]                      # keyword arguments, held to the signature

That is one file: it may import installed packages, but no file beside it. A run folder keeps a copy under code/ with
its hash; `code_dir` names that folder, and without it files are taken from the project's root, the working directory.
"""

import difflib
import hashlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from bridgekit.config import OPTIONS, Config, ConfigError, check_type, is_path, to_flat
from bridgekit.runs import hash_file, write_bytes_atomic, write_text_atomic

# What an object must be: {key: (is it a class, the arguments that it is given, the methods that it must have)}
CONTRACTS = {
    "bridge.producer": (True, ("config", "n_layers", "source_dim", "target_dim"), ("forward",)),
    "bridge.injector": (True, ("config", "target"), ("soft", "attach")),
    "task.task": (False, (), ("examples",)),
    "loss.extra": (False, ("logits", "labels", "labels_mask", "message", "batch", "target"), ("__call__",)),
}


def load_object(key: str, text: str, code_dir: str | Path | None = None) -> object:
    """The object that `path/to/file.py:Object` names; what cannot be loaded is refused with its file and line."""
    name, _, wanted = text.partition(":")
    path = Path(code_dir or ".") / name
    if not path.is_file():
        raise ConfigError(f"{key}: no file '{path}': name one below the project's root, as path/to/file.py:Object")
    content = path.read_bytes()  # an edited file is another module, the same one is loaded once
    module_name = f"bridgekit_own_{path.stem}_{hashlib.sha256(str(path.resolve()).encode() + content).hexdigest()[:12]}"
    if module_name not in sys.modules:
        _import_file(key, path, module_name)
    module = sys.modules[module_name]
    if not hasattr(module, wanted):
        near = difflib.get_close_matches(wanted, [n for n in vars(module) if n[0] != "_"], n=1, cutoff=0.0)
        raise ConfigError(f"{key}: {path}: no '{wanted}' in it" + (f": did you mean '{near[0]}'?" if near else ""))
    return getattr(module, wanted)


def _import_file(key: str, path: Path, module_name: str) -> None:
    spec = importlib.util.spec_from_file_location(module_name, path.resolve())
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
        line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else 1
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise ConfigError(f"{key}: {path}:{line}: does not import: {type(error).__name__}: {reason}") from None


def check_contract(key: str, made: object) -> None:
    """Refuse an object that cannot be what the key names."""
    is_class, given, methods = CONTRACTS[key]
    missing = [name for name in methods if not callable(getattr(made, name, None))]
    why = f"has no {missing[0]}()" if missing else ""
    if is_class and not inspect.isclass(made):
        why = f"must be a class, got {type(made).__name__}"
    elif is_class and not why:
        try:
            inspect.signature(made).bind_partial(*given)
        except TypeError:
            why = f"must be made as {made.__name__}({', '.join(given)}, **options)"
    if why:
        raise ConfigError(f"{key}: {describe_place(made)} {why}")


def parse_options(key: str, made: Callable, options: Sequence[str]) -> dict[str, object]:
    """`name=value` texts as keyword arguments, values read as YAML; what the callable does not take is refused."""
    key = next(k for k, options_key in OPTIONS.items() if key in (k, options_key))
    is_class, given, _ = CONTRACTS[key]
    taken = list(inspect.signature(made).parameters.values()) if callable(made) else []
    taken = taken[len(given) :] if is_class else [p for p in taken if p.name not in given]
    named = {p.name: p.default for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    found: dict[str, object] = {}
    for text in options:
        name, equals, value = text.partition("=")
        if not equals or name in found:
            raise ConfigError(f"{OPTIONS[key]}: '{text}': write each option once, as name=value")
        if name not in named and not any(p.kind == p.VAR_KEYWORD for p in taken):
            near = difflib.get_close_matches(name, named, n=1, cutoff=0.0)
            hint = f"did you mean '{near[0]}'?" if near else "it takes none"
            raise ConfigError(f"{OPTIONS[key]}: {describe_place(made)} takes no option '{name}': {hint}")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{OPTIONS[key]}: '{text}': its value is not valid YAML") from None
        if (kind := type(named.get(name))) in (bool, int, float, str):  # of the default
            found[name] = check_type(f"{OPTIONS[key]}: {name}", kind, found[name])
    if missing := [name for name, default in named.items() if default is inspect.Parameter.empty and name not in found]:
        raise ConfigError(
            f"{OPTIONS[key]}: {describe_place(made)} needs option '{missing[0]}': give {missing[0]}=<value>"
        )
    return found


def load_checked(config: Config, key: str, code_dir: str | Path | None = None) -> tuple[object, dict[str, object]]:
    """The object of a key with its options, after all checks that need no tensors."""
    flat = to_flat(config)
    made = load_object(key, flat[key], code_dir)
    check_contract(key, made)
    return made, parse_options(key, made, flat[OPTIONS[key]])


def describe_place(made: object) -> str:
    """`file.py:12 Object`: where an object of the user's is defined."""
    found = made if inspect.isclass(made) or inspect.isroutine(made) else type(made)
    try:
        return f"{Path(inspect.getsourcefile(found)).name}:{inspect.getsourcelines(found)[1]} {found.__name__}"
    except (OSError, TypeError):  # a number, a list: it has no source
        return repr(made)


def copy_code(config: Config, folder: str | Path) -> None:
    """Copy the user's files that a run needs into its folder, with code.json: {key: {file, object, sha256}}."""
    record = {}
    for key, text in to_flat(config).items():
        if key in OPTIONS and is_path(text):
            name, _, wanted = text.partition(":")
            copy = Path(folder) / "code" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            write_bytes_atomic(copy, Path(name).read_bytes())
            record[key] = {"file": name, "object": wanted, "sha256": hash_file(copy)}
    if record:
        write_text_atomic(Path(folder) / "code" / "code.json", json.dumps(record, indent=1) + "\n")


def check_trust(folder: str | Path, trust_code: bool) -> Path | None:
    """The folder of a run's own copy of the user's files, None if it has none; it is used only when it is trusted."""
    code = Path(folder) / "code"
    if not code.is_dir():
        return None
    if not trust_code:
        raise ConfigError(f"{folder}: this run brings Python code of its own (code/): read it, then give --trust-code")
    try:
        record = json.loads((code / "code.json").read_text())
        changed = [known["file"] for known in record.values() if hash_file(code / known["file"]) != known["sha256"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(
            f"{code}: code.json or a file it names is missing or damaged: restore it from the run"
        ) from None
    if changed:
        raise ConfigError(f"{code}: '{changed[0]}' is not the file that was trained with: restore it from the run")
    return code
