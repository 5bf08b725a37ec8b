"""Send runs to Slurm: a readable script beside them, with one array element for each run that is due.

    bridgekit submit parameters/studies/losses.yaml --site parameters/sites/modules.yaml
    bridgekit submit notebooks/phase1.ipynb -f parameters/phase1_gpu.yaml --time 1:00:00 --dry-run
    bridgekit submit parameters/night.yaml                # a batch: its notebooks and studies

The run folders are made here, so a parameter file that is edited while a job waits changes nothing. Each element goes
on with its run: preempted, or two minutes before its time limit, it saves, ends and is put back into the queue. A site
file says what this cluster needs; SITE lists its keys. submitit is not used: it sends pickled functions.
"""

import argparse
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bridgekit import runs
from bridgekit.alive import find_writer, list_slurm_jobs
from bridgekit.batch import load_batch, plan_entries, queue_jobs
from bridgekit.config import Parser, check_type, load_parameters, nearest, refuse_if
from bridgekit.runner import Job, Making
from bridgekit.runs import join_command, load_status, project_root
from bridgekit.train.plan import make_plan

SITE = {  # what a site file may say: {key: default}
    "partition": "",
    "account": "",
    "qos": "",
    "gres": "",  # one GPU, as --gres names it: gpu, or gpu:a100; empty: jobs without a GPU
    "gpu": "",  # its name for the forecast: H200, H100, A100, 4090
    "cpus": 0,  # of each job and node
    "memory": "",  # of each job and node: 64G
    "time": "",  # H:MM:SS; else the forecast of `bridgekit plan` sets the time limit
    "modules": (),  # loaded one by one; one that is not there ends the job in a line
    "lines": (),  # of bash, before the run: source a venv, export HF_HOME
    "python": "",  # default: the one that `bridgekit submit` runs in; a container's: apptainer exec --nv my.sif python
    "options": (),  # more options of sbatch: --constraint=a100
}
MARGIN, ROUND = 1.5, 600  # of the time limit over the forecast; seconds that it is rounded up to
ASK_SECONDS = 120  # before its time limit a job is asked to stop
RESTARTS = 50  # after which a run that never gets further is no longer put back


def load_site(path: Path | None) -> dict[str, object]:
    """A site file's values, each held to its name and type."""
    given = load_parameters(path) if path else {}
    for key, value in given.items():
        refuse_if(key not in SITE, f"{path}: unknown key '{key}': did you mean '{nearest(key, SITE)}'?")
        given[key] = check_type(f"{path}: {key}", type(SITE[key]), str(value) if key == "time" else value)
    return SITE | given


def parse_time(where: str, text: str) -> int:
    """`[days-]hours:minutes:seconds` in seconds; 0 for an empty text."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):([0-5]?\d):([0-5]?\d)", text or "0:00:00")
    refuse_if(not found, f"{where}: write the time as H:MM:SS or D-HH:MM:SS, got '{text}'")
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def format_time(seconds: float) -> str:
    minutes, seconds = divmod(math.ceil(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def choose_time(jobs: Sequence[Job], site: dict, asked: str) -> int:
    """The time limit in seconds: the one that is given, or the forecast and a half; a limit below it is warned of."""
    limit = parse_time("--time", asked) or parse_time("time", site["time"])
    configs = [config for job in jobs if site["gres"] and (config := getattr(job, "config", None))]
    needs = [make_plan(config, site["gpu"] or "H100").needs for config in configs]
    forecast = max((need.seconds["whole run"] for need in needs if need), default=0)
    if limit and limit < forecast:
        what = f"the time limit {format_time(limit)} is shorter than the forecast {format_time(forecast)}"
        print(f"warning: {what}: each job stops before it and goes on in the queue", file=sys.stderr, flush=True)
    known = len(needs) == len(jobs) and all(needs)
    out = "give --time H:MM:SS, or `time` in the site file"
    refuse_if(not limit and not known, f"--time: no forecast of these runs (no GPU, or models of unknown size): {out}")
    return limit or math.ceil((MARGIN * forecast + ROUND) / ROUND) * ROUND


def check_partition(name: str, where: object) -> None:
    """Refuse a partition that Slurm does not have; without Slurm here nobody can tell."""
    if not name or shutil.which("sinfo") is None:
        return
    there = call_slurm("sinfo", "--noheader", "--format=%R").split()
    refuse_if(name not in there, f"partition: no '{name}' here ({where}): there are {', '.join(sorted(set(there)))}")


def call_slurm(*command: str, text: str | None = None) -> str:
    """What a program of Slurm prints; what it refuses is refused."""
    out = "send from a login node, or see the script with --dry-run"
    refuse_if(shutil.which(command[0]) is None, f"{command[0]}: no Slurm on this machine: {out}")
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=project_root(), check=False)
    why = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    refuse_if(done.returncode, f"{command[0]}: {' '.join(why[-1].split())}")
    return done.stdout.strip()


def write_script(jobs: Sequence[Job], site: dict, args: argparse.Namespace, folder: Path, more: Sequence[str]) -> str:
    """The batch script of some jobs that lies in a folder, as text."""
    from bridgekit.results.reports import render  # takes a second

    n_jobs, n_gpus = len(jobs), max(1, max(job.n_gpus for job in jobs) // args.nodes)
    throttle = f"%{args.at_once}" if args.at_once else ""
    options = {
        "job-name": args.file.stem,
        "array": f"1-{n_jobs}{throttle}" if n_jobs > 1 else "",
        "nodes": args.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": site["cpus"],
        "mem": site["memory"],
        "gres": f"{site['gres']}:{n_gpus}" if site["gres"] else "",
        **{key: site[key] for key in ("partition", "account", "qos")},
        "output": join_command([str(folder / ("%a.log" if n_jobs > 1 else "job.log"))]),
        "open-mode": "append",
        "signal": f"B:TERM@{ASK_SECONDS}",
    }
    return render(
        "job.sh.j2",
        options=[f"--{name}={value}" for name, value in options.items() if value]
        + ["--requeue", *site["options"], *more],
        command=args.command, script=join_command([str(folder / "job.sh")]), site=args.site, restarts=RESTARTS,
        modules=site["modules"], lines=site["lines"], nodes=args.nodes,
        runs=[join_command(job.arguments()) for job in jobs],
        python=site["python"] or join_command([sys.executable]),
    )  # fmt: skip


def send(jobs: Sequence[Job], site: dict, args: argparse.Namespace, more: Sequence[str]) -> str:
    """Write the script of some jobs and give it to Slurm. -> its job id"""
    folder = runs.make_folder(project_root() / "runs" / "slurm", args.file.stem)
    runs.write_text_atomic(folder / "job.sh", write_script(jobs, site, args, folder, more))
    job_id = call_slurm("sbatch", "--parsable", str(folder / "job.sh")).split(";")[0]
    for number, job in enumerate(jobs, start=1):
        if not isinstance(job, Making):
            own = f"{job_id}_{number}" if len(jobs) > 1 else job_id
            runs.write_status(job.folder, state="queued", job=own)
    what = f"{len(jobs)} {'pair' if isinstance(jobs[0], Making) else 'run'}{'s' * (len(jobs) > 1)}"
    print(f"job {job_id}: {what}; script and output in {join_command([str(folder)])}", flush=True)
    return job_id


def is_under_way(job: Job) -> bool:
    """Whether somebody runs it, or a job that Slurm has in its queue will."""
    return bool(find_writer(job.folder)) or load_status(job.folder).get("job") in (list_slurm_jobs() or ())


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit submit` verb."""
    parser = Parser(prog="bridgekit submit", description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="a notebook, a study, or a batch")
    parser.add_argument("-f", dest="files", action="append", default=[], metavar="FILE", help="a notebook's parameters")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="one key of it")
    parser.add_argument("--site", type=Path, metavar="FILE", help="what this cluster needs: parameters/sites/*.yaml")
    parser.add_argument("--time", default="", metavar="H:MM:SS", help="time limit of each run (default: its forecast)")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of each run")
    parser.add_argument("--at-once", type=int, default=0, metavar="N", help="how many runs at once (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the script, make and send nothing")
    args = parser.parse_args(argv)
    args.command = join_command(["bridgekit", "submit", *(sys.argv[2:] if argv is None else argv)])
    refuse_if(args.nodes < 1 or args.at_once < 0, "--nodes, --at-once: whole numbers above 0")
    site, is_notebook = load_site(args.site), args.file.suffix == ".ipynb"
    check_partition(site["partition"], args.site)
    refuse_if((args.files or args.overrides) and not is_notebook, f"-f, -o: of a notebook, not of '{args.file}'")
    entries = [{"notebook": str(args.file), "parameters": args.files, "overrides": args.overrides}]
    is_batch = not is_notebook and "entries" in load_parameters(args.file)
    if not is_notebook:
        entries = load_batch(args.file) if is_batch else [{"study": str(args.file)}]
    jobs, bad = plan_entries(entries)
    refuse_if(bad and not is_batch, bad[0].partition("): ")[2] if bad else "")
    for line in bad:
        print(f"bad: {line}", file=sys.stderr, flush=True)
    for job in jobs:
        uneven = job.n_gpus % args.nodes and not isinstance(job, Making)
        refuse_if(uneven, f"--nodes: {job.name} has {job.n_gpus} processes: train.num_processes is a multiple of nodes")
    due = [job for job in jobs if not job.is_done() and not is_under_way(job)]
    parts = [[j for j in due if isinstance(j, Making) == making] for making in (True, False)]
    place, more = project_root() / "runs" / "slurm" / f"{args.file.stem}_<time>", []
    limits = [[f"--time={format_time(choose_time(part, site, args.time))}"] if part else [] for part in parts]
    for part, limit in zip(parts, limits, strict=True):
        script = write_script(part, site, args, place, limit) if part else ""
        if args.dry_run:
            print(script, end="")
        elif part:
            call_slurm("sbatch", "--test-only", text=script)
    for part, limit in zip(parts, limits, strict=True) if not args.dry_run else ():
        if part := queue_jobs(part, bad):
            job_id = send(part, site, args, limit + more)
            more = [f"--dependency=afterok:{job_id}", "--kill-on-invalid-dep=yes"]  # runs come after their pairs
    if len(due) < len(jobs):
        print(f"{len(jobs) - len(due)} of {len(jobs)} runs are finished or under way", file=sys.stderr, flush=True)
    return 2 if bad else 0
