"""Execute a notebook without a browser: its parameters strictly checked, by papermill, into a run folder.

    execute_notebook("notebooks/phase1.ipynb", "parameters/phase1.yaml", overrides=["train.steps=200"])

The stored notebook is never written to. The executed copy lies in the run folder: as `NAME.running.ipynb`
while it runs, and under its own name only once its last cell has ended well.
"""

import ast
import difflib
import json
import logging
import textwrap
import time
from pathlib import Path

from bridgekit.config import BY_NAME, KEYS, Config, ConfigError, load_config, read_parameters
from bridgekit.launch import following, mark_failed, open_run, project_root

OWN = ("run_dir", "overrides")  # parameters of a notebook that are no configuration keys


def read_defaults(notebook: str | Path) -> dict[str, object]:
    """{name: literal} of the cell tagged `parameters`; papermill's inspection misses values with a '='."""
    import nbformat

    notebook = Path(notebook)
    if not notebook.is_file():
        raise ConfigError(f"{notebook}: no such notebook")
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError) as error:
        raise ConfigError(f"{notebook}: not a notebook ({str(error).splitlines()[0]})") from None
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{notebook}: needs one cell tagged 'parameters', found {len(tagged)}")
    nodes = [node for node in ast.parse(tagged[0].source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}


def gather_parameters(
    notebook: str | Path,
    parameters_file: str | Path | None,
    parameters: dict[str, object],
    overrides: list[str],
) -> dict[str, object]:
    """What to pass to a notebook: a file's values, then single ones, each held to its name and type.

    A file's list of overrides stands instead of the notebook's own; `overrides` come on top.
    """
    defaults = read_defaults(notebook)
    given = read_parameters(parameters_file) if parameters_file else {}
    given |= parameters
    for name, value in given.items():
        if name not in defaults:
            raise ConfigError(_describe_unknown(Path(notebook).name, name, list(defaults)))
        if name not in BY_NAME and type(value) is not type(defaults[name]):
            wanted = type(defaults[name]).__name__
            raise ConfigError(f"{name}: expected {wanted}, got {type(value).__name__} {value!r}")
    given_overrides = given.get("overrides", defaults.get("overrides", []))
    if not all(isinstance(text, str) for text in given_overrides):
        raise ConfigError(f"overrides: expected a list of key=value texts, got {given_overrides!r}")
    if given.get("run_dir"):
        raise ConfigError("run_dir: a headless run makes its own folder; choose `name` or `run.runs_dir`")
    if "overrides" in defaults:
        given["overrides"] = [*given_overrides, *overrides]
    elif overrides:
        raise ConfigError(f"{Path(notebook).name}: takes no overrides; its parameters are {', '.join(defaults)}")
    return defaults | given


def _describe_unknown(notebook: str, name: str, known: list[str]) -> str:
    if name in KEYS or name in BY_NAME:
        return f"{name}: not in the parameters cell of {notebook}; give it as an override: {name}=value"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    return f"{notebook}: no parameter '{name}': did you mean '{near}'?"


def resolve_config(parameters: dict[str, object]) -> Config:
    """The configuration that a notebook with these parameters runs."""
    values = {name: value for name, value in parameters.items() if name not in OWN}
    return load_config(overrides=parameters["overrides"], **values)


def execute_notebook(
    notebook: str | Path,
    parameters_file: str | Path | None = None,
    parameters: dict[str, object] | None = None,
    overrides: list[str] | tuple[str, ...] = (),
) -> Path:
    """Execute a notebook, and return the folder it ran in; what cannot run is refused first.

    A notebook with a parameter `run_dir` runs something and gets a run folder; one without, a plain folder.
    """
    notebook = Path(notebook)
    values = gather_parameters(notebook, parameters_file, parameters or {}, list(overrides))
    if "run_dir" in values:
        folder = open_run(resolve_config(values))
        values["run_dir"] = str(folder)
    else:
        folder = project_root() / "runs" / f"{notebook.stem}_{time.strftime('%Y%m%d_%H%M%S')}"
        folder.mkdir(parents=True)
    print(f"{notebook} runs in {folder}", flush=True)
    executed = folder / f"{notebook.stem}.running.ipynb"
    try:
        with following(folder):
            _execute(notebook, executed, values)
    except BaseException as error:
        reason = _describe_failure(error)
        mark_failed(folder, reason)
        evidence = folder / f"{notebook.stem}.failed.ipynb"
        if executed.exists():
            executed.rename(evidence)
        if isinstance(error, Exception):
            raise RuntimeError(f"{notebook.name} failed: {reason}; what ran is in {evidence}") from None
        raise
    executed.rename(folder / notebook.name)
    return folder


def _execute(notebook: Path, executed: Path, values: dict[str, object]) -> None:
    import papermill

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # a failure is said once, by us
    papermill.execute_notebook(
        notebook, executed, parameters=values, kernel_name="python3", cwd=project_root(), progress_bar=False,
        autosave_cell_every=5, extra_arguments=["--log-level=ERROR"],
    )  # fmt: skip


def _describe_failure(error: BaseException) -> str:
    """One line: a failing cell's own message, or what stopped the kernel."""
    if hasattr(error, "evalue"):  # papermill's error of a cell
        text = error.evalue if error.ename in ("RuntimeError", "ConfigError") else f"{error.ename}: {error.evalue}"
    elif isinstance(error, (KeyboardInterrupt, SystemExit)):
        text = "interrupted"
    else:
        text = str(error) or type(error).__name__
    return (text.splitlines() or [type(error).__name__])[0]


def describe_run(folder: Path, notebook: Path) -> str:
    """Where everything is, and the verdict in a paragraph."""
    lines = [f"run folder         {folder}", f"executed notebook  {folder / notebook.name}"]
    figures = sorted(path.name for path in (folder / "figures").glob("*.pdf"))
    if figures:
        lines.append(f"figures            {folder / 'figures'}: {', '.join(figures)}")
    verdict = folder / "verdict.json"
    if verdict.exists():
        lines += ["", textwrap.fill(json.loads(verdict.read_text())["text"], 100, break_on_hyphens=False)]
    return "\n".join(lines)
