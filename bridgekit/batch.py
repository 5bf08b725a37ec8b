"""A night of runs: notebooks with their parameters and studies, checked as a whole, done in one call.

    bridgekit batch parameters/night.yaml             # one after the other, or one on each GPU
    bridgekit batch parameters/night.yaml --jobs 4    # four at once, over the GPUs there are

A file has `entries`. Each is `study: FILE`, or `notebook: FILE` with `parameters: FILE` (one or a list) and
`overrides: [key=value, ...]`. An entry that cannot run is named at the start and stops no other. A second call does
exactly what is missing: what is finished is kept, what was interrupted goes on. Exit code 0: all is done; 1: a run
failed; 2: no run failed, but an entry is bad.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bridgekit import launch, runs
from bridgekit.alive import find_writer, lock_run, wait_for_worker
from bridgekit.config import Config, Parser, load_parameters, nearest, parse_texts, refuse_if
from bridgekit.runner import Job, Making, Runner, list_gpus, plan_jobs
from bridgekit.runs import project_root
from bridgekit.study import load_study, plan_study
from bridgekit.tasks import check_inputs

KINDS = {"notebook": ("notebook", "parameters", "overrides"), "study": ("study",)}  # {kind of entry: its keys}


@dataclass(eq=False, kw_only=True)
class Execution(Job):
    """A notebook that is executed."""

    notebook: Path
    values: dict[str, object]
    config: Config | None  # what it runs; None where the notebook has no run of its own

    def is_done(self) -> bool:
        return (self.folder / self.notebook.name).is_file()

    def make_folder(self) -> None:
        """Its run folder; one that was made for these very values is gone on with."""
        if not self.folder.is_dir():
            self.folder = launch.open_notebook(self.notebook, self.values)

    def prepare(self, threads: int) -> list[str]:
        return [sys.executable, "-m", "bridgekit", *self.arguments()]

    def arguments(self) -> list[str]:
        return ["run", str(self.notebook), "--resume", str(self.folder)]

    def settle(self) -> str:
        wait_for_worker(self.folder)
        return launch.settle(self.child, "notebook") if self.child.process.returncode else ""


def plan_notebook(entry: dict) -> Execution:
    """The execution of an entry, checked; its folder is that of an earlier call, or one that is not made yet."""
    files = entry.get("parameters") or []
    notebook, files = Path(str(entry["notebook"])), [files] if isinstance(files, str) else files
    is_files = isinstance(files, list) and all(isinstance(file, str) for file in files)
    refuse_if(not is_files, f"parameters: expected a file or a list of files, got {files!r}")
    overrides = entry.get("overrides") or []
    parse_texts("overrides", overrides)
    values, config = launch.gather_parameters(notebook, files, {}, overrides), None
    if "run_dir" in values:
        config = launch.resolve_config(values)
        check_inputs(config)
    root, text = project_root() / (config.run.runs_dir if config else "runs"), launch.dump_parameters(notebook, values)
    name, ended = config.run.name if config else notebook.stem, notebook.name
    begun = [path.parent for path in sorted(root.glob(f"*/{launch.PARAMETERS}")) if path.read_text() == text]
    folder = max(begun, key=lambda folder: (folder / ended).is_file(), default=root / f"{name}_<time>")
    n_gpus = config.train.num_processes if config else 1
    return Execution(
        name=f"{notebook.stem} {name}" if name != notebook.stem else name, folder=folder, notebook=notebook,
        values=values, config=config, n_gpus=n_gpus, passes_on=True,
    )  # fmt: skip


def plan_entry(entry: object) -> list[Job]:
    """The jobs of an entry; what cannot run is refused."""
    kinds = [kind for kind in KINDS if isinstance(entry, dict) and kind in entry]
    refuse_if(len(kinds) != 1, f"expected `notebook: FILE` or `study: FILE`, got {entry!r}")
    for key in entry:
        known = KINDS[kinds[0]]
        refuse_if(key not in known, f"unknown key '{key}': did you mean '{nearest(key, known)}'?")
    if kinds == ["notebook"]:
        return [plan_notebook(entry)]
    study = load_study(str(entry["study"]))
    return plan_jobs(plan_study(study), "runs", study.pairs, study.pair_options)


def plan_entries(entries: Sequence[object], n_gpus: int = 0) -> tuple[list[Job], list[str]]:
    """The jobs of all entries, and a line for each entry that is bad; `n_gpus` are here, where that is known."""
    jobs: list[Job] = []
    bad: list[str] = []
    owner: dict[str, int] = {}  # {what a job does: the entry that has it}
    for number, entry in enumerate(entries, start=1):
        what = entry.get("notebook") or entry.get("study") if isinstance(entry, dict) else entry
        try:
            planned = plan_entry(entry)
            for job in planned:
                does = launch.dump_parameters(job.notebook, job.values) if job.passes_on else str(job.folder)
                first = owner.setdefault(does, number)
                refuse_if(first != number, f"{job.name} is in entry {first} already: leave it out, or give it a name")
                lacking = 0 < n_gpus < job.n_gpus
                refuse_if(lacking, f"train.num_processes: {job.name} needs {job.n_gpus} GPUs, there are {n_gpus}")
                job.is_done()  # refuses a finished folder of other settings
            for job in planned:  # two entries may have one name
                job.name += f" (entry {number})" * isinstance(job, Execution)
            jobs += planned
        except (ValueError, OSError) as error:
            bad.append(f"entry {number} ({what}): {' '.join(str(error).split())}")
    return jobs, bad


def load_batch(path: Path) -> list[object]:
    """The entries of a file."""
    values = load_parameters(path)
    entries = values.pop("entries", None)
    refuse_if(values, f"{path}: unknown key '{next(iter(values), '')}' (a batch has: entries)")
    is_list = isinstance(entries, list) and entries
    refuse_if(not is_list, f"{path}: needs `entries:`, a list of `notebook: FILE` and `study: FILE`")
    return entries


def queue_jobs(jobs: Sequence[Job], bad: list[str], **where: object) -> list[Job]:
    """The jobs that are due, with folders in which `bridgekit status` finds them; one that gets none is bad."""
    due = []
    for job in jobs:
        try:
            if job.is_done() or find_writer(job.folder):
                continue
            job.make_folder()
            if not isinstance(job, Making):
                runs.write_status(job.folder, state="queued", **where)
            due.append(job)
        except (ValueError, OSError) as error:
            bad.append(f"{job.name}: {' '.join(str(error).split())}")
            print(f"bad: {bad[-1]}", file=sys.stderr, flush=True)
    return due


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit batch` verb."""
    parser = Parser(prog="bridgekit batch", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a file with `entries`, e.g. parameters/night.yaml")
    jobs_help = "how many runs at once (default: one on each GPU, and one where there is no GPU)"
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help=jobs_help)
    args = parser.parse_args(argv)
    refuse_if(args.jobs < 0, f"--jobs: how many runs at once, or 0 for the default, got {args.jobs}")
    n_gpus = len(list_gpus())
    at_most = args.jobs or max(1, n_gpus)
    jobs, bad = plan_entries(load_batch(args.file), n_gpus)
    for line in bad:
        print(f"bad: {line}", file=sys.stderr, flush=True)
    if not jobs:
        return 2
    with lock_run(project_root() / "runs" / args.file.stem, "batch"):
        due = queue_jobs(jobs, bad, pid=os.getpid())
        for job in due:
            if isinstance(job, Execution) and job.config is None:  # it starts its own trainings
                job.n_gpus = max(1, n_gpus // at_most)
        print(f"{len(jobs)} runs: {len(jobs) - len(due)} are finished or under way, {len(due)} are started", flush=True)
        runner = Runner(due, -(-at_most // max(1, n_gpus)), at_most)
        if due:
            runner.run()
    lines = [f"failed: {name}: {runner.outcome[name]}" for name in runner.failed] + [f"bad: {line}" for line in bad]
    print("\n".join(lines or ["all is done"]), file=sys.stderr if lines else sys.stdout, flush=True)
    return 1 if runner.failed else 2 if bad else 0
