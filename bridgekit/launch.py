"""Start work in children and show how far it is: a run under `accelerate launch`, a notebook under papermill.

    run_dir = open_run(config); run_stage(run_dir, "baselines"); run_stage(run_dir, "train")
    folder = execute_notebook("notebooks/phase1.ipynb", ["parameters/phase1.yaml"], overrides=["train.steps=200"])

A child's output goes to `train.log` in the run folder, what it is doing to `status.json`. This process imports no torch
and holds no GPU; however a call ends, its children are gone.
"""

import ast
import contextlib
import json
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bridgekit import alive, runs
from bridgekit.alive import LOOK_SECONDS, Child, find_writer, lock_run, training_command
from bridgekit.config import (
    BY_NAME,
    KEYS,
    Config,
    ConfigError,
    check_written,
    dump_config,
    find_idle,
    is_safe,
    load_config,
    load_layers,
    nearest,
    refuse_if,
    suggest_file,
    to_flat,
)
from bridgekit.results.live import FOLLOWED, LiveView, following
from bridgekit.runs import load_status, project_root, write_status
from bridgekit.tasks import check_inputs, check_texts
from bridgekit.tasks.extend import check_parts, copy_code
from bridgekit.train.plan import check_devices, refuse_unfit

STAGES = ("baselines", "train")
DONE_WITH = {"baselines": "headroom.jsonl"}  # what a stage leaves behind; the last one finishes the run
PARAMETERS = "parameters.json"  # of the notebook that a run folder was made for


# -- one run ----------------------------------------------------------------------------------------------------


class Stopped(RuntimeError):
    """A run was asked to stop, or killed; it can go on."""


def open_run(config: Config, run_dir: str | Path = "", folder: Path | None = None, new: bool = False) -> Path:
    """The run folder of a configuration: `run_dir`, an unfinished one of these settings, or a new one.

    Everything that was given is checked before anything is made, and the user's own code is copied into a new folder.
    `folder` is where to make a run of a study, which has been checked as a whole; `new` asks for one that nothing has
    been written to. A `run_dir` that was made for other settings is refused, but for the keys of SAFE.
    """
    with contextlib.chdir(project_root()):
        if run_dir:
            return resume_run(config, Path(run_dir))
        if folder is None:
            check_inputs(config)
            check_parts(config)
            check_texts(config)
            refuse_unfit(config)
            for key, condition in find_idle(config).items():
                print(f"note: {key} has no effect here, only if {condition}", file=sys.stderr, flush=True)
        unfinished = None if folder or new else find_unfinished(config)
        if unfinished:
            print(f"goes on with {unfinished}, which is unfinished", flush=True)
            return unfinished.resolve()
        run_dir = runs.create_run(config, folder)
        copy_code(config, run_dir)
        return run_dir.resolve()


def find_unfinished(config: Config) -> Path | None:
    """The newest run of this name and these settings that has not finished."""
    for folder in sorted(Path(config.run.runs_dir).glob(f"{config.run.name}_*"), reverse=True):
        if (folder / "config.yaml").is_file() and load_status(folder).get("state", "new") not in (
            "finished",
            "unknown",
        ):
            with contextlib.suppress(ValueError):  # of a configuration that can no longer be read
                if runs.same_run(runs.load_run_config(folder), config):
                    return folder
    return None


def resume_run(config: Config, run_dir: Path) -> Path:
    """A run's folder, to go on with; settings that would make it another experiment are refused."""
    if not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"run_dir: '{run_dir}' is no run folder (config.yaml not found): name a run's")
    known = runs.load_run_config(run_dir)
    old, new = to_flat(known), to_flat(config)
    apart = [key for key in new if old[key] != new[key] and not is_safe(key)]
    if apart:
        key = apart[0]
        more = f", and {len(apart) - 1} more" if len(apart) > 1 else ""
        why = f"'{run_dir}' was made with {key} {old[key]!r}, not {new[key]!r}{more}"
        raise ConfigError(f"run_dir: {why}: give it the same settings, or leave run_dir empty")
    if known != config and load_status(run_dir).get("state") != "finished":
        with lock_run(run_dir):
            runs.write_text_atomic(run_dir / "config.yaml", dump_config(config))
    return run_dir.resolve()


def refuse_running(run_dir: Path) -> None:
    """Refuse to go on with a run that somebody runs, or that is no run."""
    is_run = any((run_dir / name).is_file() for name in ("config.yaml", PARAMETERS))
    refuse_if(not is_run, f"--resume: '{run_dir}' is no run folder (config.yaml not found): name a run's")
    writer = find_writer(run_dir)
    refuse_if(writer, f"--resume: '{run_dir}' is running ({writer}): wait, or end it")


def run_stage(run_dir: str | Path, stage: str) -> None:
    """Run one stage of a run in a child and wait for it, with a live view; a failure raises the child's own reason.

    A stage that is done is not run again, one that was interrupted goes on, and one that another process runs is
    followed to its end.
    """
    run_dir = (project_root() / run_dir).resolve()
    config, view = runs.load_run_config(run_dir), LiveView(run_dir)
    while find_writer(run_dir):
        view.show(load_status(run_dir))
        time.sleep(LOOK_SECONDS)
    if load_status(run_dir).get("state") == "finished" or (run_dir / DONE_WITH.get(stage, "?")).is_file():
        view.note(f"{stage}: done already")
        return
    with lock_run(run_dir):
        write_status(run_dir, state="running", stage=stage)
        child = Child(run_dir, training_command(run_dir, stage, config.train.num_processes))
        try:
            while child.poll() is None:
                view.show(load_status(run_dir))
                time.sleep(LOOK_SECONDS)
        except BaseException:
            end_children({run_dir: child})
            raise
        failed = settle(child, stage)
        if not failed and load_status(run_dir)["state"] == "running":  # the last stage itself says that it is finished
            write_status(run_dir, **load_status(run_dir) | {"stage": f"{stage} done", "pid": os.getpid()})
    status = load_status(run_dir)
    view.close(status)
    if failed and status.get("state") == "stopped":
        raise Stopped(f"{stage} was stopped ({status['error']}); to go on: {how_to_go_on(run_dir)}")
    if failed:
        raise RuntimeError(f"{stage} failed: {failed} (log: {child.log})")


def how_to_go_on(run_dir: Path) -> str:
    """What a user does to go on with a run that was interrupted."""
    notebook = next((path.name.split(".")[0] for path in run_dir.glob("*.*.ipynb")), "")
    run = runs.join_command([str(run_dir)])
    if notebook:
        return f"bridgekit run notebooks/{notebook}.ipynb --resume {run}"
    return f"run this cell again, or bridgekit train --resume {run}"


def settle(child: Child, stage: str) -> str:
    """After a child's end: why it failed, empty if it did not; its folder says so too."""
    from bridgekit.results.reports import mark_ended  # takes a second

    alive.wait_for_worker(child.folder, "worker")  # it may outlive its launcher for a moment
    child.quiet()
    if not child.log.exists():
        return "its folder was deleted while it ran: open a new run"
    state = load_status(child.folder).get("state")
    unfinished = stage == STAGES[-1] and state != "finished"  # whatever its exit code says
    why = child.why() if child.process.returncode or unfinished else ""
    if why and state not in ("stopped", "failed"):  # else it has said so itself
        ended = "stopped" if re.search("killed by SIG(KILL|TERM|HUP)", why) else "failed"
        mark_ended(child.folder, ended, f"{stage}: {why}")
    return why


def end_children(children: dict[Path, "Child"]) -> None:
    """Ask the children of these folders to stop, all at once, and say so there. A second Ctrl-C does not disturb it."""
    from bridgekit.results.reports import mark_ended

    with alive.unless_in_thread(signal.SIGINT, signal.SIGTERM):
        for child in children.values():
            child.ask()
        for folder, child in children.items():
            child.end()
            state = load_status(folder)
            if state.get("state") == "running" and (folder / "config.yaml").is_file():
                mark_ended(folder, "stopped", "interrupted")


# -- a notebook without a browser -------------------------------------------------------------------------------


def load_defaults(notebook: str | Path) -> dict[str, object]:
    """{name: literal} of the cell tagged `parameters`; papermill's inspection misses values with a '='."""
    import nbformat

    if not Path(notebook).is_file():
        raise ConfigError(f"{notebook}: no such notebook{suggest_file(notebook)}")
    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (ValueError, nbformat.ValidationError, AttributeError, LookupError, TypeError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise ConfigError(f"{notebook}: not a notebook ({why}): open it in JupyterLab, or restore it") from None
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ConfigError(f"{notebook}: needs one cell tagged 'parameters', found {len(tagged)}: tag one in JupyterLab")
    try:
        return {name: ast.literal_eval(value) for name, value in _assignments(tagged[0].source).items()}
    except (ValueError, SyntaxError, AttributeError) as error:
        where = f"line {error.lineno} of " if isinstance(error, SyntaxError) else ""
        why = "must have a plain `name = value` in each line, without computing"
        raise ConfigError(f"{notebook}: {where}its parameters cell {why}: correct it") from None


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
    check_written(namespace)


def resolve_config(parameters: dict[str, object]) -> Config:
    """The configuration that a notebook with these parameters runs; those that are no keys are the notebook's own."""
    values = {name: value for name, value in parameters.items() if _is_key(name)}
    return load_config(overrides=parameters["overrides"], **values)


def check_parameters(values: dict[str, object]) -> None:
    """Refuse what a notebook without a run folder of its own would refuse in its kernel."""
    check_written(values)
    with contextlib.chdir(project_root()):
        for name in ("run", "root"):  # the folders that notebooks read
            missing = name in values and not Path(values[name]).is_dir()
            refuse_if(missing, f"{name}: no folder '{values.get(name)}': name one that exists, from the project's root")
        if "base" in values:
            load_config(values["base"], values["overrides"])
        elif "overrides" in values and "run_dir" not in values:
            check_inputs(config := resolve_config(values))
            check_devices(config)


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
    resume: str | Path = "",
) -> Path:
    """Execute a notebook, and return the folder it ran in; what cannot run is refused first.

    A notebook with a parameter `run_dir` runs something and gets a run folder; one without, a plain folder. The copy
    there is `NAME.running.ipynb` until its last cell has ended well; the stored notebook is never written to. `resume`
    names the folder of an execution that was interrupted: its parameters hold again, but for those given now.
    """
    notebook = Path(notebook)
    earlier = load_parameters_of(Path(resume), notebook) if resume else {}
    values = gather_parameters(notebook, files, earlier | (parameters or {}), overrides)
    check_parameters(values)
    import papermill  # takes a second, so after what can be refused at once

    from bridgekit.results.reports import mark_ended, write_html

    folder = open_notebook(notebook, values, resume)
    if "run_dir" in values:
        values["run_dir"] = str(folder)
        os.environ.pop(FOLLOWED, None)
    else:
        os.environ[FOLLOWED] = str(folder)
    print(f"{notebook} runs in {folder}", flush=True)
    executed, evidence = (folder / f"{notebook.stem}.{state}.ipynb" for state in ("running", "failed"))
    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # a failure is said once, by us
    options = {"kernel_name": "python3", "cwd": project_root(), "extra_arguments": ["--log-level=CRITICAL"]}
    try:
        with following(folder):
            papermill.execute_notebook(notebook, executed, values, progress_bar=False, autosave_cell_every=5, **options)
    except BaseException as error:
        with alive.unless_in_thread(signal.SIGINT, signal.SIGTERM):
            reason = _describe_failure(error)
            alive.wait_for_worker(folder)
            if load_status(folder).get("state") != "stopped":
                mark_ended(folder, "failed" if isinstance(error, Exception) else "stopped", reason)
            if executed.exists():
                executed.rename(evidence)
        status = load_status(folder)
        if status.get("state") == "stopped" and "run_dir" in values:
            raise Stopped(
                f"{notebook.name} was stopped ({status['error']}); to go on: {how_to_go_on(folder)}"
            ) from None
        if isinstance(error, Exception):
            raise RuntimeError(f"{notebook.name} failed: {reason}; what ran is in {evidence}") from None
        raise
    executed.rename(folder / notebook.name)
    evidence.unlink(missing_ok=True)
    if "run_dir" not in values:  # else the run itself has said it
        write_status(folder, state="finished", stage="executed")
    write_html(folder / notebook.name)  # last: without the page everything is there
    return folder


def open_notebook(notebook: Path, values: dict[str, object], resume: str | Path = "") -> Path:
    """The folder in which a notebook runs with these values, new or gone on with; it keeps them."""
    if "run_dir" in values:
        folder = open_run(resolve_config(values), resume, new=True)
    else:
        folder = Path(resume).resolve() if resume else runs.make_folder(project_root() / "runs", notebook.stem)
    runs.write_text_atomic(folder / PARAMETERS, dump_parameters(notebook, values))
    return folder


def dump_parameters(notebook: Path, values: dict[str, object]) -> str:
    """What a folder keeps of the notebook that runs in it."""
    return json.dumps({"notebook": notebook.stem} | values, indent=1) + "\n"


def load_parameters_of(run_dir: Path, notebook: Path) -> dict[str, object]:
    """What an interrupted execution was given; one that has ended well has nothing to go on with."""
    known = run_dir / PARAMETERS
    refuse_if(not known.is_file(), f"--resume: '{run_dir}' is no run of a notebook ({PARAMETERS} not found): name one")
    ended = f"--resume: '{run_dir}' is finished, and so is its {notebook.name}: nothing is left to do"
    refuse_if((run_dir / notebook.name).is_file(), ended)
    values = json.loads(known.read_text())
    meant = values.pop("notebook", notebook.stem)
    refuse_if(meant != notebook.stem, f"--resume: '{run_dir}' is a run of {meant}.ipynb, not of {notebook.name}")
    refuse_running(run_dir)
    return {name: value for name, value in values.items() if name != "run_dir"}


def _describe_failure(error: BaseException) -> str:
    """One line: a failing cell's own message, or what stopped the kernel."""
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return "interrupted"
    name, text = getattr(error, "ename", ""), getattr(error, "evalue", str(error))  # papermill's error of a cell
    prefix = f"{name}: " if name not in ("", "RuntimeError", "ConfigError") else ""
    return ((prefix + text).splitlines() or [name or type(error).__name__])[0]
