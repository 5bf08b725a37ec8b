"""Start work in children and show how far it is: a run under `accelerate launch`, a notebook under papermill.

    run_dir = train(config)                                          # open the run, baselines, training, evaluation
    run_dir = open_run(config); run_stage(run_dir, "baselines")      # or stage by stage
    folder = execute_notebook("notebooks/phase1.ipynb", ["parameters/phase1.yaml"], overrides=["train.steps=200"])

A child's output goes to `train.log` in the run folder, what it is doing to `status.json`. This process imports no torch
and holds no GPU; however a call ends, its children are gone.
"""

import ast
import contextlib
import difflib
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
import time
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

from bridgekit import runs
from bridgekit.config import Config, ConfigError, load_config, load_parameters, resolve_key
from bridgekit.live import FOLLOWED, POLL_SECONDS, LiveView, following
from bridgekit.runs import load_status, project_root, write_status
from bridgekit.tasks import check_inputs

STAGES = ("baselines", "train")
KILL_SECONDS = 3.0  # between asking a child to stop and making it
# What the worker says of its end, and, where it could say nothing, what the launcher above it saw.
_WORKER_ERROR = re.compile(r"(?:\[\w+\]: ?)?(?:error: (?P<own>.+)|(?P<python>[\w.]*(?:Error|Exception)\b.*))")
_KILLED = re.compile(r"died with <Signals\.(\w+)|Signal \d+ \((\w+)\) received by PID")
_LAUNCHER = ("subprocess.", "torch.distributed.elastic")


# -- one run ----------------------------------------------------------------------------------------------------


def train(config: Config) -> Path:
    """Every stage of a new run, with a live view; returns its folder."""
    run_dir = open_run(config)
    for stage in STAGES:
        run_stage(run_dir, stage)
    return run_dir


def open_run(config: Config, run_dir: str | Path = "") -> Path:
    """The run folder: a new one, or the one that was made for this very configuration."""
    with contextlib.chdir(project_root()):
        if not run_dir:
            return make_run(config).resolve()
        if runs.load_run_config(run_dir) != config:
            raise ConfigError(f"run_dir: '{run_dir}' was made for another configuration; leave run_dir empty")
        return Path(run_dir).resolve()


def make_run(config: Config, folder: Path | None = None) -> Path:
    """A new run folder, with the user's own code in it, once everything that was given has been checked."""
    from bridgekit.extend import copy_code

    check_inputs(config)
    folder = runs.create_run(config, folder)
    copy_code(config, folder)
    return folder


def run_stage(run_dir: str | Path, stage: str) -> None:
    """Run one stage of a run in a child process and wait for it, with a live view.

    Raises RuntimeError with the child's own reason if it fails.
    """
    run_dir = (project_root() / run_dir).resolve()
    config = runs.load_run_config(run_dir)
    if load_status(run_dir).get("state") == "finished":
        raise ConfigError(f"run '{run_dir}' is finished, and its test set is read once: open a new run")
    view = LiveView(run_dir)
    with runs.lock_run(run_dir) as lock, open(run_dir / "train.log", "ab") as log:
        write_status(run_dir, state="running", stage=stage)
        start = log.tell()
        child = start_child(training_command(run_dir, stage, config.train.num_processes), log, keep=(lock,))
        try:
            while child.poll() is None:
                view.show(load_status(run_dir))
                time.sleep(POLL_SECONDS)
        except BaseException:
            kill_tree(child)
            mark_failed(run_dir, f"{stage}: interrupted")
            raise
    if child.returncode != 0:
        reason = find_error(run_dir / "train.log", start) or f"the process ended with exit code {child.returncode}"
        mark_failed(run_dir, f"{stage}: {reason}")
        view.close(load_status(run_dir))
        raise RuntimeError(f"{stage} failed: {reason} (log: {run_dir / 'train.log'})")
    status = load_status(run_dir)
    if status["state"] == "running":  # the last stage itself says that the run is finished
        write_status(run_dir, **status | {"stage": f"{stage} done"})
    view.close(load_status(run_dir))


def mark_failed(run_dir: Path, reason: str) -> None:
    """The status of a run that will not finish; how far it was stays in it. The log of all runs says so too."""
    from bridgekit.results.reports import report_end

    write_status(run_dir, **load_status(run_dir) | {"state": "failed", "error": reason, "seconds_left": None})
    report_end(run_dir)


def training_command(run_dir: Path, stage: str, num_processes: int, threads: int = 0) -> list[str]:
    """The `accelerate launch` command; on CPU too several processes need --multi_gpu, or one starts."""
    options = {
        "num_processes": num_processes,
        "num_machines": 1,
        "main_process_port": 0,  # a free one: two runs may share a machine
        "num_cpu_threads_per_process": share_cores(num_processes) if threads == 0 else threads,
        "mixed_precision": "no",  # `pair.dtype` decides
        "dynamo_backend": "no",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    flags += ["--multi_gpu"] if num_processes > 1 else []
    worker = ["-m", "bridgekit.train.worker", str(run_dir), "--stage", stage]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, *worker]


def share_cores(n: int) -> int:
    """Threads for each of `n` processes at once, unless the user has set them: more than cores make each crawl."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, runs.count_cores() // n))


def start_child(
    command: list[str], log: typing.BinaryIO, extra: dict[str, str] | None = None, keep: Sequence[int] = ()
) -> subprocess.Popen:
    """Start a child in a session of its own, so that a terminal's Ctrl-C comes to us alone; it ends when we do.

    `keep` are descriptors that it inherits: a run's lock stays taken for as long as anything writes.
    """
    environment = os.environ | {
        "BRIDGEKIT_PARENT_PID": str(os.getpid()),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # OpenMP threads busy-wait. Long spinning slows a shared machine tenfold; none slows an idle one by a quarter.
        # 30,000 spins are tens of microseconds.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "30000"),
        **(extra or {}),
    }
    return subprocess.Popen(
        command, cwd=project_root(), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        start_new_session=True, pass_fds=keep,
    )  # fmt: skip


def kill_tree(child: subprocess.Popen) -> None:
    """End a child and all its descendants; workers have sessions of their own, so no group reaches them."""
    import psutil

    try:
        parent = psutil.Process(child.pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for end in ("terminate", "kill"):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                getattr(process, end)()
        _, family = psutil.wait_procs(family, timeout=KILL_SECONDS)
    child.wait()


def find_error(log: Path, start: int = 0) -> str | None:
    """Why a log ends: its last `error: ...` line after byte `start`, or last exception, or fatal signal."""
    text = log.read_bytes()[start:].decode(errors="replace")
    matches = [match for line in text.splitlines() if (match := _WORKER_ERROR.fullmatch(line))]
    own = [match["own"] for match in matches if match["own"]]
    python = [match["python"] for match in matches if not (match["python"] or _LAUNCHER[0]).startswith(_LAUNCHER)]
    signals = [f"a training process was killed by {a or b}" for a, b in _KILLED.findall(text)]
    return (own or python or signals or [None])[-1]


# -- a notebook without a browser -------------------------------------------------------------------------------


def load_defaults(notebook: str | Path) -> dict[str, object]:
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


def load_layers(files: Iterable[str | Path], notebook: str = "") -> dict[str, object]:
    """The parameters of several files: later ones win, and their lists of overrides add up."""
    values: dict[str, object] = {}
    for file in files:
        layer = load_parameters(file)
        meant = layer.pop("notebook", notebook)
        if notebook and meant != notebook:
            raise ConfigError(f"{file}: holds parameters of the notebook '{meant}', not of '{notebook}'")
        own = layer.get("overrides", [])
        if not isinstance(own, list) or not all(isinstance(text, str) for text in own):
            raise ConfigError(f"{file}: overrides: expected a list of key=value texts, got {own!r}")
        if "overrides" in layer:
            layer["overrides"] = [*values.get("overrides", []), *own]
        values |= layer
    return values


def gather_parameters(
    notebook: str | Path, files: Iterable[str | Path], parameters: dict[str, object], overrides: Sequence[str]
) -> dict[str, object]:
    """What to pass to a notebook: the values of files, then single ones, each held to its name and type.

    The files' overrides stand instead of the notebook's own; `overrides` come on top.
    """
    notebook, defaults = Path(notebook), load_defaults(notebook)
    given = load_layers(files, notebook.stem) | parameters
    check_names(notebook.stem, given, defaults)
    for name, value in given.items():
        if not _is_key(name) and type(value) is not type(defaults[name]):
            wanted = type(defaults[name]).__name__
            raise ConfigError(f"{name}: expected {wanted}, got {type(value).__name__} {value!r}")
    if given.get("run_dir"):
        raise ConfigError("run_dir: a headless run makes its own folder; choose `name` or `run.runs_dir`")
    if overrides and "overrides" not in defaults:
        raise ConfigError(f"{notebook.name}: takes no overrides; its parameters are {', '.join(defaults)}")
    if overrides:
        given["overrides"] = [*given.get("overrides", defaults["overrides"]), *overrides]
    return defaults | given


def check_names(notebook: str, given: Iterable[str], known: dict[str, object]) -> None:
    """Refuse a name that the notebook's parameters cell has not."""
    for name in (name for name in given if name not in known):
        if _is_key(name):
            raise ConfigError(f"{name}: not in the parameters cell of {notebook}; give it as an override: {name}=value")
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"{notebook}.ipynb: no parameter '{name}': did you mean '{near}'?")


def _is_key(name: str) -> bool:
    with contextlib.suppress(ConfigError):
        return bool(resolve_key(name))
    return False


def refuse_unknown(notebook: str | Path, namespace: dict[str, object]) -> None:
    """The same check inside a notebook, `refuse_unknown("phase1", globals())`: plain papermill only warns.

    It reads the cell that papermill has injected, so it may be run again at any time.
    """
    path = project_root() / "notebooks" / f"{notebook}.ipynb"
    for source in namespace.get("In", []):
        if source.startswith("# Parameters\n"):
            nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
            given = {node.targets[0].id: namespace[node.targets[0].id] for node in nodes}
            if (meant := given.pop("notebook", path.stem)) != path.stem:
                raise ConfigError(f"notebook: these are parameters of '{meant}', not of '{path.stem}'")
            check_names(path.stem, given, load_defaults(path))


def resolve_config(parameters: dict[str, object]) -> Config:
    """The configuration that a notebook with these parameters runs; those that are no keys are the notebook's own."""
    values = {name: value for name, value in parameters.items() if _is_key(name)}
    return load_config(overrides=parameters["overrides"], **values)


def notebook_config(notebook: str | Path, namespace: dict[str, object]) -> Config:
    """The configuration of a notebook's own names, `notebook_config("phase1", globals())`; unknown ones are refused."""
    refuse_unknown(notebook, namespace)
    stored = load_defaults(project_root() / "notebooks" / f"{notebook}.ipynb")
    return resolve_config({name: namespace[name] for name in stored})


def execute_notebook(
    notebook: str | Path,
    files: Sequence[str | Path] = (),
    parameters: dict[str, object] | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Execute a notebook, and return the folder it ran in; what cannot run is refused first.

    A notebook with a parameter `run_dir` runs something and gets a run folder; one without, a plain folder. The copy
    there is `NAME.running.ipynb` until its last cell has ended well; the stored notebook is never written to.
    """
    notebook = Path(notebook)
    values = gather_parameters(notebook, files, parameters or {}, overrides)
    if "run_dir" in values:
        folder = open_run(resolve_config(values))
        values["run_dir"] = str(folder)
        os.environ.pop(FOLLOWED, None)
    else:
        folder = runs.make_folder(project_root() / "runs", runs.stamped(notebook.stem))
        os.environ[FOLLOWED] = str(folder)
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
    if (verdict := folder / "verdict.json").exists():
        lines += ["", textwrap.fill(json.loads(verdict.read_text())["text"], 100, break_on_hyphens=False)]
    return "\n".join(lines)
