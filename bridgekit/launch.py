"""Start work in children and show how far it is: a run under `accelerate launch`, a notebook under papermill.

    run_dir = open_run(config); run_stage(run_dir, "baselines"); run_stage(run_dir, "train")
    folder = execute_notebook("notebooks/phase1.ipynb", ["parameters/phase1.yaml"], overrides=["train.steps=200"])

A child's output goes to `train.log` in the run folder, what it is doing to `status.json`. This process imports no torch
and holds no GPU; however a call ends, its children are gone.
"""

import ast
import contextlib
import datetime
import html
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bridgekit import runs
from bridgekit.config import BY_NAME, KEYS, Config, ConfigError, load_config, load_layers, nearest
from bridgekit.runs import load_jsonl, load_status, project_root, write_status
from bridgekit.tasks import check_inputs

STAGES = ("baselines", "train")
POLL_SECONDS = 0.25
KILL_SECONDS = 3.0  # between asking a child to stop and making it
FOLLOWED = "BRIDGEKIT_FOLLOWED"  # the folder whose status a waiting terminal shows; a notebook's view writes it there
# What a log ends with: the worker's own word, an exception, or the signal that the launcher saw. {pattern: the reason}
REASONS = {
    r"^(?:\[\w+\]: ?)?error: (.+)$": "{}",
    r"^(?:\[\w+\]: ?)?(?!subprocess\.|torch\.distributed\.elastic)([\w.]*(?:Error|Exception)\b.*)$": "{}",
    r"(?:died with <Signals\.|Signal \d+ \()(\w+)(?:: \d+>|\) received by PID)": "a training process was killed by {}",
}


# -- one run ----------------------------------------------------------------------------------------------------


def open_run(config: Config, run_dir: str | Path = "", folder: Path | None = None) -> Path:
    """The run folder that was made for this very configuration, or a new one, with the user's own code in it.

    Everything that was given is checked before anything is made; `folder` is where to make it.
    """
    from bridgekit.extend import copy_code

    with contextlib.chdir(project_root()):
        if not run_dir:
            check_inputs(config)
            run_dir = runs.create_run(config, folder)
            copy_code(config, run_dir)
        elif runs.load_run_config(run_dir) != config:
            raise ConfigError(f"run_dir: '{run_dir}' was made for another configuration; leave run_dir empty")
        return Path(run_dir).resolve()


def run_stage(run_dir: str | Path, stage: str) -> None:
    """Run one stage of a run in a child and wait for it, with a live view; a failure raises the child's own reason."""
    run_dir = (project_root() / run_dir).resolve()
    config, view = runs.load_run_config(run_dir), LiveView(run_dir)
    if load_status(run_dir).get("state") == "finished":
        raise ConfigError(f"run '{run_dir}' is finished, and its test set is read once: open a new run")
    with runs.lock_run(run_dir) as lock:
        write_status(run_dir, state="running", stage=stage)
        child = Child(run_dir, training_command(run_dir, stage, config.train.num_processes), lock)
        try:
            while child.process.poll() is None:
                view.show(load_status(run_dir))
                time.sleep(POLL_SECONDS)
        except BaseException:
            child.kill()
            mark_failed(run_dir, f"{stage}: interrupted")
            raise
    failed = child.process.returncode != 0
    if failed:
        mark_failed(run_dir, f"{stage}: {child.why()}")
    elif load_status(run_dir)["state"] == "running":  # the last stage itself says that the run is finished
        write_status(run_dir, **load_status(run_dir) | {"stage": f"{stage} done"})
    view.close(load_status(run_dir))
    if failed:
        raise RuntimeError(f"{stage} failed: {child.why()} (log: {child.log})")


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
        "num_cpu_threads_per_process": threads or runs.count_threads(num_processes),
        "mixed_precision": "no",  # `pair.dtype` decides
        "dynamo_backend": "no",
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    flags += ["--multi_gpu"] if num_processes > 1 else []
    worker = ["-m", "bridgekit.train.worker", str(run_dir), "--stage", stage]
    return [sys.executable, "-m", "accelerate.commands.launch", *flags, *worker]


class Child:
    """A process that writes a folder, with its output in train.log there; it ends when we do.

    It has a session of its own, so that a terminal's Ctrl-C comes to us alone, and inherits the folder's lock, which
    stays taken for as long as anything writes.
    """

    def __init__(self, folder: Path, command: list[str], lock: int, **environment: str) -> None:
        ours = {"BRIDGEKIT_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
        # OpenMP threads busy-wait: long spinning slows a shared machine tenfold, none slows an idle one by a quarter.
        whole = {"GOMP_SPINCOUNT": "30000"} | os.environ | ours | environment  # tens of microseconds
        self.log, self.started = folder / "train.log", time.time()
        with open(self.log, "ab") as log:
            self.log_start = log.tell()
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "pass_fds": (lock,)}
            streams |= {"cwd": project_root(), "env": whole}
            self.process = subprocess.Popen(command, start_new_session=True, **streams)

    def kill(self) -> None:
        """End it and all its descendants; workers have sessions of their own, so no group reaches them."""
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.process.pid)
            family = [*parent.children(recursive=True), parent]
            for end in (psutil.Process.terminate, psutil.Process.kill):
                for process in family:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        end(process)
                _, family = psutil.wait_procs(family, timeout=KILL_SECONDS)
            self.process.wait()

    def why(self) -> str:
        """Why it has ended."""
        unknown = f"the process ended with exit code {self.process.returncode}"
        return find_error(self.log, self.log_start) or unknown


def find_error(log: Path, start: int = 0) -> str | None:
    """Why a log ends: its last `error: ...` line after byte `start`, or last exception, or fatal signal."""
    text = "\n".join(log.read_bytes()[start:].decode(errors="replace").splitlines())
    for pattern, reason in REASONS.items():
        if found := re.findall(pattern, text, re.MULTILINE):
            return reason.format(found[-1])
    return None


# -- what is seen of a run ----------------------------------------------------------------------------------------


class LiveView:
    """Progress in one place: bar and curves in a notebook, a line on a terminal, a line per stage in a log."""

    def __init__(self, run_dir: Path | None = None) -> None:
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        self.in_notebook = type(shell).__name__ == "ZMQInteractiveShell"
        self.on_terminal = not self.in_notebook and sys.stdout.isatty()
        self.followed = os.environ.get(FOLLOWED) if self.in_notebook else None
        self.run_dir, self.text, self.news = run_dir, "", ()
        self.display_id, self.is_displayed = uuid.uuid4().hex, False  # of the notebook's output

    def show(self, status: dict) -> None:
        """The status, if it says anything new."""
        text = describe_progress(status)
        if text == self.text:
            return
        self.text, before = text, self.news
        self.news = tuple(map(status.get, ("stage", "val_accuracy", "best", "state")))
        if self.followed:  # the terminal that waits for this notebook shows it too
            write_status(self.followed, **status | {"state": "running", "error": None})
        if self.in_notebook:
            self._show_in_notebook(text, status)
        elif self.on_terminal:
            print(f"\r\x1b[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        elif self.news != before:
            print(text, flush=True)

    def _show_in_notebook(self, text: str, status: dict) -> None:
        from IPython.display import display

        share = status.get("step", 0) / (status.get("steps") or 1)
        picture = f'<progress value="{share:.3f}" style="width: 30em"></progress><pre>{html.escape(text)}</pre>'
        bundle = {"text/plain": text, "text/html": picture + draw_curves(self.run_dir)}
        display(bundle, raw=True, display_id=self.display_id, update=self.is_displayed)
        self.is_displayed = True

    def note(self, text: str) -> None:
        """A line that stays, above the live one."""
        print(f"\r\x1b[K{text}" if self.on_terminal else text, flush=True)
        self.text = ""

    def close(self, status: dict) -> None:
        self.show(status)
        if self.on_terminal and self.text:
            print(flush=True)


def describe_progress(status: dict) -> str:
    """A status as one line of text."""
    known = {name: value for name, value in status.items() if value is not None}
    stage, spent = known.get("stage", ""), "in all" if known.get("stage", "").endswith("done") else "so far"
    parts = [stage, f"step {known.get('step', 0)}/{known['steps']}" if known.get("steps") else ""]
    names = {"loss": "loss", "val_accuracy": "val", "best": "best"}
    parts += [f"{label} {known[name]:.3f}" for name, label in names.items() if name in known]
    times = {"elapsed": spent, "seconds_left": "left"}
    parts += [f"{datetime.timedelta(seconds=round(known[k]))} {label}" for k, label in times.items() if k in known]
    parts += [known.get("running", ""), f"failed: {known['error']}" if known.get("error") else ""]
    return " · ".join(filter(None, parts))


def draw_curves(run_dir: Path | None) -> str:
    """Training loss and validation accuracy of a run's bridge so far, side by side, as a small SVG."""
    if run_dir is None or not (run_dir / "metrics.jsonl").is_file():
        return ""
    rows = list(load_jsonl(run_dir / "metrics.jsonl", []))  # its last line may be half-written
    losses = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    shares = [(row["step"], row["eval"]["bridged"]) for row in rows if "bridged" in row.get("eval", {})]
    highest, picture = max((loss for _, loss in losses), default=1) or 1, ""
    for left, name, points, high in ((0, "loss", losses, highest), (220, "validation accuracy", shares, 1.0)):
        last = max((step for step, _ in points), default=1) or 1
        thinned = points[:: 1 + len(points) // 80]
        line = " ".join(f"{left + 200 * step / last:.0f},{78 - 60 * y / high:.0f}" for step, y in thinned)
        value = f" {points[-1][1]:.3f}" if points else ""
        picture += (
            f'<text x="{left}" y="11" font-size="11" fill="currentColor">{name}{value}</text>'
            f'<path d="M{left},18v60h200" fill="none" stroke="gray"/>'
            f'<polyline points="{line}" fill="none" stroke="currentColor" stroke-width="1.5"/>'
        )
    return f'<svg width="430" height="84">{picture}</svg>'


@contextlib.contextmanager
def following(run_dir: Path) -> Iterator[None]:
    """Show a folder's status on this terminal while something else writes it."""
    view, stop = LiveView(), threading.Event()

    def follow() -> None:
        while not stop.wait(POLL_SECONDS):
            view.show(load_status(run_dir))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        view.close(load_status(run_dir))


# -- a notebook without a browser -------------------------------------------------------------------------------


def load_defaults(notebook: str | Path) -> dict[str, object]:
    """{name: literal} of the cell tagged `parameters`; papermill's inspection misses values with a '='."""
    import nbformat

    if not Path(notebook).is_file():
        raise ConfigError(f"{notebook}: no such notebook")
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (nbformat.reader.NotJSONError, nbformat.ValidationError, AttributeError) as error:
        raise ConfigError(f"{notebook}: not a notebook ({str(error).splitlines()[0]})") from None
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{notebook}: needs one cell tagged 'parameters', found {len(tagged)}")
    return {name: ast.literal_eval(value) for name, value in _assignments(tagged[0].source).items()}


def _assignments(source: str) -> dict[str, ast.expr]:
    return {node.targets[0].id: node.value for node in ast.parse(source).body if isinstance(node, ast.Assign)}


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
        raise ConfigError(f"{notebook}.ipynb: no parameter '{name}': did you mean '{nearest(name, known)}'?")


def _is_key(name: str) -> bool:
    return name in KEYS or name in BY_NAME


def refuse_unknown(notebook: str | Path, namespace: dict[str, object]) -> None:
    """The same check inside a notebook, `refuse_unknown("phase1", globals())`: plain papermill only warns.

    It reads the cell that papermill has injected, so it may be run again at any time.
    """
    path = project_root() / "notebooks" / f"{notebook}.ipynb"
    for source in namespace.get("In", []):
        if source.startswith("# Parameters\n"):
            given = _assignments(source)
            if given.pop("notebook", None) and (meant := namespace["notebook"]) != path.stem:
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
    parameters: dict | None = None,
    overrides: Sequence[str] = (),
) -> Path:
    """Execute a notebook, and return the folder it ran in; what cannot run is refused first.

    A notebook with a parameter `run_dir` runs something and gets a run folder; one without, a plain folder. The copy
    there is `NAME.running.ipynb` until its last cell has ended well; the stored notebook is never written to.
    """
    notebook = Path(notebook)
    values = gather_parameters(notebook, files, parameters or {}, overrides)
    import papermill  # takes a second, so after what can be refused at once

    if "run_dir" in values:
        folder = open_run(resolve_config(values))
        values["run_dir"] = str(folder)
        os.environ.pop(FOLLOWED, None)
    else:
        folder = runs.make_folder(project_root() / "runs", notebook.stem)
        os.environ[FOLLOWED] = str(folder)
    print(f"{notebook} runs in {folder}", flush=True)
    executed, evidence = (folder / f"{notebook.stem}.{state}.ipynb" for state in ("running", "failed"))
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # a failure is said once, by us
    options = {"kernel_name": "python3", "cwd": project_root(), "extra_arguments": ["--log-level=ERROR"]}
    try:
        with following(folder):
            papermill.execute_notebook(notebook, executed, values, progress_bar=False, autosave_cell_every=5, **options)
    except BaseException as error:
        reason = _describe_failure(error)
        mark_failed(folder, reason)
        if executed.exists():
            executed.rename(evidence)
        if isinstance(error, Exception):
            raise RuntimeError(f"{notebook.name} failed: {reason}; what ran is in {evidence}") from None
        raise
    executed.rename(folder / notebook.name)
    return folder


def _describe_failure(error: BaseException) -> str:
    """One line: a failing cell's own message, or what stopped the kernel."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "interrupted"
    name, text = getattr(error, "ename", ""), getattr(error, "evalue", str(error))  # papermill's error of a cell
    prefix = f"{name}: " if name not in ("", "RuntimeError", "ConfigError") else ""
    return ((prefix + text).splitlines() or [name or type(error).__name__])[0]
