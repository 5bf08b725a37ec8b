"""A user's own producer, injector, task or loss: `path/to/file.py:Object` in a configuration key.

    bridge.producer: notebooks/my_bridge.py:MyProducer       # a file below the project's root
    bridge.producer_options: [width=64]                      # keyword arguments, held to the signature

That is one file: it may import installed packages, but no file beside it. A run folder keeps a copy under code/ with
its hash; `code_dir` names that folder, and without it files are taken from the project's root, the working directory.
"""

import contextlib
import functools
import hashlib
import importlib.util
import inspect
import json
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bridgekit.config import Config, ConfigError, check_type, format_override, nearest, parse_yaml, refuse_if, to_flat
from bridgekit.keys import FILE_OBJECT, OPTIONS, is_path

# What an object must be: {key: (is it a class, the arguments that it is given, the methods that it must have)}
CONTRACTS = {
    "bridge.producer": (True, ("config", "n_layers", "source_dim", "target_dim"), ("forward",)),
    "bridge.injector": (True, ("config", "target"), ("soft", "attach")),
    "task.task": (False, (), ("examples",)),
    "loss.extra": (False, ("logits", "labels", "labels_mask", "message", "batch", "target"), ("__call__",)),
}


def load_object(key: str, text: str, code_dir: str | Path | None = None) -> object:
    """The object that `path/to/file.py:Object` names; what cannot be loaded, or be what the key names, is refused."""
    name, _, wanted = text.partition(":")
    path = Path(code_dir or ".") / name
    refuse_if(not path.is_file(), f"{key}: no file '{path}': name one below the project's root, as {FILE_OBJECT}")
    content = str(path.resolve()).encode() + path.read_bytes()  # an edited file is another module
    module_name = f"bridgekit_own_{path.stem}_{hashlib.sha256(content).hexdigest()[:12]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path.resolve())
        module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.resolve()]
            line = error.lineno if isinstance(error, SyntaxError) else [1, *lines][-1]
            why = " ".join(f"does not import: {type(error).__name__}: {error}".split())
            raise ConfigError(f"{key}: {path}:{line}: {why}") from None
    names = vars(sys.modules[module_name])
    near = nearest(wanted, [name for name in names if name[0] != "_"])
    refuse_if(wanted not in names, f"{key}: {path}: no '{wanted}' in it" + f": did you mean '{near}'?" * bool(near))
    made, (is_class, given, methods) = names[wanted], CONTRACTS[key]
    what = f"{key}: {describe_place(made)}"
    refuse_if(is_class and not inspect.isclass(made), f"{what} must be a class, got {type(made).__name__}")
    for method in methods:
        refuse_if(not callable(getattr(made, method, None)), f"{what} has no {method}()")
    try:
        if is_class:
            inspect.signature(made).bind_partial(*given)
    except TypeError:
        raise ConfigError(f"{what} must be made as {made.__name__}({', '.join(given)}, **options)") from None
    return made


def parse_options(key: str, made: Callable, options: Sequence[str]) -> dict[str, object]:
    """`name=value` texts as keyword arguments, values read as YAML; what the callable does not take is refused."""
    (is_class, given, _), key = CONTRACTS[key], OPTIONS[key]
    taken = list(inspect.signature(made).parameters.values()) if callable(made) else []
    taken = taken[len(given) :] if is_class else [p for p in taken if p.name not in given]
    named = {p.name: p.default for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_all, what = any(p.kind == p.VAR_KEYWORD for p in taken), f"{key}: {describe_place(made)}"
    found: dict[str, object] = {}
    for text in options:
        name, equals, value = text.partition("=")
        refuse_if(not equals or name in found, f"{key}: '{text}': write each option once, as name=value")
        hint = f"did you mean '{nearest(name, named)}'?" if named else "it takes none"
        refuse_if(name not in named and not takes_all, f"{what} takes no option '{name}': {hint}")
        found[name] = parse_yaml(f"{key}: '{text}'", value)
        if (kind := type(named.get(name))) in (bool, int, float, str):  # of the default
            found[name] = check_type(f"{key}: {name}", kind, found[name])
    for name, default in named.items():
        needed = default is inspect.Parameter.empty and name not in found
        refuse_if(needed, f"{what} needs option '{name}': give {name}=<value>")
    return found


def load_checked(config: Config, key: str, code_dir: str | Path | None = None) -> tuple[object, dict[str, object]]:
    """The object of a key with its options, after all checks that need no tensors."""
    flat = to_flat(config)
    made = load_object(key, flat[key], code_dir)
    return made, parse_options(key, made, flat[OPTIONS[key]])


def describe_place(made: object) -> str:
    """`file.py:12 Object`: where an object of the user's is defined."""
    found = made if inspect.isclass(made) or inspect.isroutine(made) else type(made)
    try:
        return f"{Path(inspect.getsourcefile(found)).name}:{inspect.getsourcelines(found)[1]} {found.__name__}"
    except (OSError, TypeError):  # a number, a list: it has no source
        return repr(made)


@contextlib.contextmanager
def blame(key: str, made: object) -> Iterator[str]:
    """Any error of the user's own code as one line, `key: file.py:12 Object: ...`; yields the line's beginning."""
    what = f"{key}: {describe_place(made)}:"
    try:
        yield what
    except ConfigError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(f"{what} {why}") from error


def own_objects(config: Config) -> dict[str, str]:
    """{key: `path/to/file.py:Object`} of the keys that name an object of the user's."""
    return {key: text for key, text in to_flat(config).items() if key in OPTIONS and is_path(text)}


def check_parts(config: Config) -> None:
    """Refuse a producer, an injector or a loss of the user's that fails, or gives what cannot be trained with."""
    if own_objects(config).keys() - {"task.task"}:
        given = {key: value for key, value in to_flat(config).items() if not key.startswith("run.")}  # seeds are alike
        try_apart(tuple(format_override(*item) for item in given.items()))


@functools.cache
def try_apart(overrides: tuple[str, ...]) -> None:
    """Try the parts of this configuration once, in a process of its own: that takes torch."""
    command = [sys.executable, "-m", "bridgekit.train.parts", *overrides]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode == 2:
        raise ConfigError(tried.stderr.strip().splitlines()[-1])


def copy_code(config: Config, folder: str | Path) -> None:
    """Copy the user's files that a run needs into its folder, with code.json: {key: {file, object, sha256}}."""
    partial, record = Path(folder) / "code.partial", {}
    for key, text in own_objects(config).items():
        name, _, wanted = text.partition(":")
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(name, partial / name)
        record[key] = {
            "file": name,
            "object": wanted,
            "sha256": hashlib.sha256((partial / name).read_bytes()).hexdigest(),
        }
    if record:
        (partial / "code.json").write_text(json.dumps(record, indent=1) + "\n")
        partial.rename(Path(folder) / "code")


def check_trust(folder: str | Path, trust_code: bool) -> Path | None:
    """The folder of a run's own copy of the user's files, None if it has none; it is used only when it is trusted."""
    code, restore = Path(folder) / "code", "restore it from the run"
    if not code.is_dir():
        return None
    own = "this run brings Python code of its own (code/): read it, then give --trust-code (in Python trust_code=True)"
    refuse_if(not trust_code, f"{folder}: {own}")
    try:
        for known in json.loads((code / "code.json").read_text()).values():
            changed = hashlib.sha256((code / known["file"]).read_bytes()).hexdigest() != known["sha256"]
            refuse_if(changed, f"{code}: '{known['file']}' is not the file that was trained with: {restore}")
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError):
        raise ConfigError(f"{code}: code.json or a file it names is missing or damaged: {restore}") from None
    return code
