"""The command line: thin verbs over the package; each imports what it needs only when it is called.

bridgekit run notebooks/phase1.ipynb -f parameters/phase1.yaml -o train.steps=200
bridgekit study parameters/studies/losses.yaml
bridgekit config -f parameters/phase1.yaml
bridgekit verdict runs/phase1_*
"""

import argparse
import importlib
import json
import os
import signal
import sys
import textwrap
from collections import Counter
from pathlib import Path

from bridgekit import config as configuration
from bridgekit.alive import GO_ON, watch_parent
from bridgekit.runs import join_command, load_json, load_status


def run_notebook(arguments: argparse.Namespace) -> None:
    """Execute a notebook, then say where everything is, and the verdict."""
    from bridgekit import launch

    parameters = {name: configuration.parse_yaml(f"-p {name}", value) for name, value in arguments.parameters}
    parameters |= {"trust_code": True} if arguments.trust_code else {}
    given = arguments.notebook, arguments.files, parameters, arguments.overrides
    folder = launch.execute_notebook(*given, resume=arguments.resume)
    print(f"run folder         {folder}\nexecuted notebook  {folder / arguments.notebook.name}")
    if figures := sorted(path.name for path in (folder / "figures").glob("*.pdf")):
        print(f"figures            {folder / 'figures'}: {', '.join(figures)}")
    if (verdict := folder / "verdict.json").exists():
        print("\n" + textwrap.fill(json.loads(verdict.read_text())["text"], 100, break_on_hyphens=False))


def train_bridge(arguments: argparse.Namespace) -> None:
    """What notebooks/phase1.ipynb trains, in one child: nobody looks at the baselines before."""
    from bridgekit import launch

    files, run = arguments.files, arguments.resume
    overrides = [f"{name}={value}" for name, value in arguments.parameters] + arguments.overrides
    if run:
        launch.refuse_running(Path(run))
        ended = load_status(run).get("state") == "finished"
        configuration.refuse_if(ended, f"--resume: '{run}' is finished: nothing is left to do")
        files = [Path(run) / "config.yaml", *files]
    run_dir = launch.open_run(configuration.load_config(files, overrides, "phase1"), run, new=True)
    print(f"run folder {run_dir}", flush=True)
    launch.run_stage(run_dir, launch.STAGES[-1])
    print_verdict(argparse.Namespace(run_dirs=[run_dir], skip_broken=False))


def print_config(arguments: argparse.Namespace) -> None:
    config = configuration.load_config(arguments.files, arguments.overrides, "phase1")
    default = configuration.to_flat(configuration.load_config())
    idle = configuration.find_idle(config)
    for key, value in configuration.to_flat(config).items():
        mark = f"  # changed, without effect: only if {idle[key]}" if key in idle else "  # changed"
        print(configuration.format_override(key, value) + mark * (value != default[key]))


def print_verdict(arguments: argparse.Namespace) -> None:
    from bridgekit.results import table, verdict

    frames = [table.load_frame(run, arguments.skip_broken) for run in arguments.run_dirs]
    for run, frame in zip(arguments.run_dirs, frames, strict=True):
        if lines := frame.attrs.get("left_out"):
            print(f"{run}: left out line {', '.join(map(str, lines))}; {len(frame):,} lines are used")
    print(verdict.judge(frames).text)


def export_bridge(arguments: argparse.Namespace) -> None:
    from bridgekit.train.experiment import Experiment

    models = arguments.source_model, arguments.target_model
    experiment = Experiment.load(arguments.run_dir, *models, device="cpu", trust_code=arguments.trust_code)
    print(f"exported to {experiment.export(arguments.out)}")


def show_status(arguments: argparse.Namespace) -> None:
    """A line for each run: what it is doing, or how it ended, and its size on disk; then how many there are of each."""
    from bridgekit.alive import true_status

    folders, counted = list_runs(arguments.runs), Counter()
    if not folders:
        print("no runs yet; this makes one: bridgekit run notebooks/phase1.ipynb -f parameters/phase1.yaml")
    width = max((len(str(folder)) for folder in folders), default=0)
    for folder in folders:
        status = true_status(folder)
        counted[state := status.get("state", "new")] += 1
        size = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())
        parts = [*describe_state(folder, status), f"{size / 1e6:.1f} MB"]
        print(f"{folder!s:{width}}  {state:9}  {' · '.join(filter(None, parts))}")
    if len(folders) > 1:
        print(", ".join(f"{n} {state}" for state, n in counted.items()))


def describe_state(folder: Path, status: dict) -> list[str]:
    """What `bridgekit status` says of a run, by its state."""
    from bridgekit.alive import find_writer
    from bridgekit.results.live import describe_progress

    state, where = status.get("state"), f"job {status['job']}" if "job" in status else find_writer(folder)
    if state == "finished":
        spent, facts = sum(load_json(folder / "timing.json").values()), load_json(folder / "provenance.json")
        hours = f"{spent * facts.get('processes', 1) / 3600:.2f} {'GPU' if facts.get('gpus') else 'CPU'}-hours"
        verdict = load_json(folder / "verdict.json")
        older = any("step" not in made for made in verdict.get("comparisons", ()))  # it did not ask which weights
        return [verdict.get("outcome", "") + " by an older rule" * older, hours] if facts else []
    if state == "queued":
        return [where or "waits for its batch"]
    shown = describe_progress({key: value for key, value in status.items() if key != "error"})
    return [status.get("error"), shown, where if state == "running" else ""]


def clean_runs(arguments: argparse.Namespace) -> None:
    """Free what finished runs needed only to go on; a run that is being written, or can go on, keeps everything."""
    from bridgekit.alive import find_writer
    from bridgekit.runs import free_run

    total = 0
    for folder in list_runs(arguments.runs):
        if not find_writer(folder) and load_status(folder).get("state") == "finished" and (freed := free_run(folder)):
            print(f"{folder}: {freed / 1e6:.1f} MB freed")
            total += freed
    print(f"{total / 1e6:.1f} MB freed in all")


def list_runs(folders: list[Path]) -> list[Path]:
    """The run folders that are named, or lie in a named folder; in runs/ there may be none yet."""
    found = [
        run
        for folder in folders
        for run in [folder, *sorted(folder.glob("*"))]
        if any((run / name).is_file() for name in ("config.yaml", "parameters.json"))
    ]
    missing = not found and folders != [Path("runs")]
    named = ", ".join(map(str, folders))
    why = "no run folder (config.yaml not found): name one, or a folder of them"
    configuration.refuse_if(missing, f"{named}: {why}")
    return found


MANY = {"action": "append", "default": []}
FILE = {"dest": "files", "type": Path, "metavar": "FILE", "help": "a file of parameters/; of several the later wins"}
OVERRIDE = {"dest": "overrides", "metavar": "KEY=VALUE", "help": "one configuration key"}
FILES = {"-f": MANY | FILE, "-o": MANY | OVERRIDE}
RESUME = {"--resume": {"default": "", "metavar": "RUN", "help": "go on with this run, which was interrupted"}}
RUNS = {
    "runs": {"nargs": "*", "type": Path, "default": [Path("runs")], "metavar": "RUN", "help": "or a folder of them"}
}
PAIR = MANY | {"dest": "parameters", "nargs": 2, "metavar": ("KEY", "VALUE"), "help": "a parameter of the notebook"}
TRUST = {"--trust-code": {"action": "store_true", "help": "the Python files in a run's code/ may be executed"}}
MODEL = {"default": "", "help": "where that model lies here, if not as the run says"}
VERBS = {  # {verb: (function, what it does, {argument: its options})}
    "run": (
        run_notebook,
        "execute a notebook: run folder, executed notebook, figures, verdict",
        {"notebook": {"type": Path}, "-p": PAIR} | FILES | RESUME | TRUST,
    ),
    "train": (train_bridge, "the same training and evaluation without a notebook", {"-p": PAIR} | FILES | RESUME),
    "status": (show_status, "what runs are doing, or how they ended", RUNS),
    "clean": (clean_runs, "free what finished runs needed only to go on", RUNS),
    "config": (print_config, "the resolved configuration, and every key there is", FILES),
    "verdict": (
        print_verdict,
        "may these finished runs (one per seed) say that the bridge transfers?",
        {
            "run_dirs": {"nargs": "+", "type": Path, "metavar": "RUN"},
            "--skip-broken": {"action": "store_true", "help": "leave out lines of an evaluation that are cut"},
        },
    ),
    "export": (
        export_bridge,
        "a trained bridge with all that another machine needs to use it",
        {"run_dir": {"type": Path, "metavar": "RUN"}, "out": {"type": Path, "metavar": "FOLDER"}}
        | {"--source-model": MODEL, "--target-model": MODEL, **TRUST},
    ),
}
FORWARDED = {  # verbs whose module reads its own arguments: {verb: (module, what it does)}
    "plan": ("train.plan", "what a run needs of GPU, time and disk, and what is missing, before it is started"),
    "study": ("study", "many runs at once, on the GPUs there are"),
    "sweep": ("study", "the former name of study"),
    "batch": ("batch", "notebooks and studies of a file, in order or at once; again: exactly what is missing"),
    "submit": ("slurm", "send a notebook, a study or a batch to Slurm"),
    "pair": ("train.pretrain", "make a pair of models from scratch, with a lexicon of its own"),
    "bench": ("train.bench", "what steps and answers cost on this machine, with models of real size"),
    "fetch": ("tasks.real", "bring real questions into a folder that runs read"),
    "audit": ("audit.report", "recompute every claim from its data"),
    "report": ("results.reports", "write LOG.md, EXPERIMENTS_SUMMARY.md and REPORT.md of a runs folder again"),
    "preserve": ("audit.keep", "keep what is worth keeping of a run in preserved_data/"),
    "readme": ("results.readme", "write README.md and RESULTS.md again from their templates and the kept runs"),
}
TERMINATED = 143


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; the forwarded ones are only listed."""
    parser = configuration.Parser(prog="bridgekit", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(metavar="verb", required=True)
    for verb, (function, what, arguments) in VERBS.items():
        keys = configuration.describe_keys() if verb == "config" else None
        one = verbs.add_parser(verb, help=what, epilog=keys, formatter_class=argparse.RawDescriptionHelpFormatter)
        one.set_defaults(run=function)
        for name, options in arguments.items():
            one.add_argument(name, **options)
    for verb, (_, what) in FORWARDED.items():
        verbs.add_parser(verb, help=what, add_help=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a mistake of the user's ends in one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    is_inner = {"BRIDGEKIT_PARENT_PID", "SLURM_JOB_ID"} & os.environ.keys()  # a batch or a job has started this
    outer = os.environ.get("BRIDGEKIT_COMMAND") if is_inner else ""
    os.environ["BRIDGEKIT_COMMAND"] = outer or join_command(["bridgekit", *argv])  # what runs record as their command
    if "BRIDGEKIT_PARENT_PID" in is_inner:
        watch_parent()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(TERMINATED))  # through the exits that end children
    try:
        if argv and argv[0] in FORWARDED:
            return importlib.import_module(f"bridgekit.{FORWARDED[argv[0]][0]}").main(argv[1:]) or 0
        unknown = argv and not argv[0].startswith("-") and argv[0] not in VERBS
        near = configuration.nearest(argv[0], [*VERBS, *FORWARDED]) if unknown else ""
        out = f"did you mean '{near}'? (all there is: bridgekit --help)"
        configuration.refuse_if(unknown, f"no verb '{argv[0] if argv else ''}': {out}")
        arguments = build_parser().parse_args(argv)
        return arguments.run(arguments) or 0
    except OSError as error:
        why = f"{error.filename}: {error.strerror}: name another path, or mend this one" if error.filename else error
        text, code = " ".join(str(why).split()), 2
    except ValueError as error:
        text, code = " ".join(str(error).split()), 2
    except RuntimeError as error:
        text, code = str(error), GO_ON if type(error).__name__ == "Stopped" else 1
    except KeyboardInterrupt:
        text, code = "interrupted", 130
    except SystemExit as error:
        if error.code != TERMINATED:  # but argparse's
            raise
        text, code = "terminated", TERMINATED
    print(f"error: {text}", file=sys.stderr, flush=True)
    if code in (TERMINATED, GO_ON):
        os._exit(code)  # at once: a half-closed notebook kernel's sockets would fill the screen with tracebacks
    return code
