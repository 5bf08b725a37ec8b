"""The command line: thin verbs over the package; each imports what it needs only when it is called.

bridgekit run notebooks/phase1.ipynb -f parameters/phase1.yaml -o train.steps=200
bridgekit study parameters/studies/losses.yaml
bridgekit config -f parameters/phase1.yaml
bridgekit verdict runs/phase1_*
"""

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

import yaml

from bridgekit import config as configuration
from bridgekit.runs import join_command

FORWARDED = {  # verbs whose module reads its own arguments: {verb: (module, what it does)}
    "study": ("study", "many runs at once, on the GPUs there are"),
    "sweep": ("study", "the former name of study"),
    "pair": ("train.pretrain", "make a pair of models from scratch, with a lexicon of its own"),
    "fetch": ("tasks.gsm8k", "bring real questions into a folder that runs read"),
    "audit": ("audit.report", "recompute every claim from its data"),
    "report": ("results.reports", "write LOG.md, EXPERIMENTS_SUMMARY.md and REPORT.md of a runs folder again"),
    "preserve": ("audit.keep", "keep what is worth keeping of a run in preserved_data/"),
    "readme": ("results.readme", "write README.md and RESULTS.md again from their templates and the kept runs"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a mistake of the user's ends in one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    os.environ["BRIDGEKIT_COMMAND"] = join_command(["bridgekit", *argv])  # what runs record as their command
    signal.signal(signal.SIGTERM, _stop)
    try:
        if argv and argv[0] in FORWARDED:
            return importlib.import_module(f"bridgekit.{FORWARDED[argv[0]][0]}").main(argv[1:]) or 0
        arguments = build_parser().parse_args(argv)
        return arguments.run(arguments) or 0
    except (ValueError, FileNotFoundError, PermissionError, FileExistsError) as error:
        return _say(f"error: {' '.join(str(error).split())}", 2)
    except RuntimeError as error:
        return _say(f"error: {error}", 1)
    except KeyboardInterrupt:
        return _say("error: interrupted", 130)
    except Terminated:
        _say("error: terminated", 143)
        os._exit(143)  # at once: a half-closed notebook kernel's sockets would fill the screen with tracebacks


class Terminated(SystemExit):
    """SIGTERM: leaves through the exits that end children and mark the run as failed."""


def _stop(number: int, frame: object) -> None:
    raise Terminated(128 + number)


def _say(text: str, code: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bridgekit", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(metavar="verb", required=True)

    run = verbs.add_parser("run", help="execute a notebook: run folder, executed notebook, figures, verdict")
    run.add_argument("notebook", type=Path)
    run.add_argument("-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), dest="parameters",
                     help="a parameter of the notebook")  # fmt: skip
    run.set_defaults(run=run_notebook)

    train = verbs.add_parser("train", help="the same training and evaluation without a notebook")
    train.set_defaults(run=train_bridge)

    config = verbs.add_parser(
        "config", help="the resolved configuration, and every key there is", epilog=configuration.describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    config.set_defaults(run=print_config)
    for one in (run, train, config):
        one.add_argument("-f", action="append", default=[], dest="files", type=Path, metavar="FILE",
                         help="a file of parameters/; of several the later wins")  # fmt: skip
        one.add_argument("-o", action="append", default=[], dest="overrides", metavar="KEY=VALUE",
                         help="one configuration key")  # fmt: skip

    verdict = verbs.add_parser("verdict", help="may these finished runs (one per seed) say that the bridge transfers?")
    verdict.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN")
    verdict.add_argument("--skip-broken", action="store_true", help="leave out lines of an evaluation that are cut")
    verdict.set_defaults(run=lambda arguments: print_verdict(arguments.run_dirs, arguments.skip_broken))

    export = verbs.add_parser("export", help="a trained bridge with all that another machine needs to use it")
    export.add_argument("run_dir", type=Path, metavar="RUN")
    export.add_argument("out", type=Path, metavar="FOLDER")
    for side in ("source", "target"):
        export.add_argument(f"--{side}-model", default="", help="where that model lies here, if not as the run says")
    export.set_defaults(run=export_bridge)
    for one in (run, export):
        one.add_argument("--trust-code", action="store_true", help="the Python files in a run's code/ may be executed")

    for verb, (_, what) in FORWARDED.items():  # listed here for --help alone
        verbs.add_parser(verb, help=what, add_help=False)
    return parser


def run_notebook(arguments: argparse.Namespace) -> None:
    from bridgekit import launch

    parameters = {name: yaml.safe_load(value) for name, value in arguments.parameters}
    if arguments.trust_code:
        parameters["trust_code"] = True
    folder = launch.execute_notebook(arguments.notebook, arguments.files, parameters, arguments.overrides)
    print(launch.describe_run(folder, arguments.notebook))


def train_bridge(arguments: argparse.Namespace) -> None:
    from bridgekit import launch

    run_dir = launch.open_run(load_layered(arguments))
    print(f"run folder {run_dir}", flush=True)
    for stage in launch.STAGES:
        launch.run_stage(run_dir, stage)
    print_verdict([run_dir])


def load_layered(arguments: argparse.Namespace) -> configuration.Config:
    """The configuration of `-f` files and `-o` overrides, as phase1's notebook would run it."""
    from bridgekit import launch

    values = launch.load_layers(arguments.files, "phase1")
    return configuration.load_config(overrides=[*values.pop("overrides", []), *arguments.overrides], **values)


def print_config(arguments: argparse.Namespace) -> None:
    default = configuration.to_flat(configuration.load_config())
    for key, value in configuration.to_flat(load_layered(arguments)).items():
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(plain, default_flow_style=True, width=9999)
        print(f"{key}={text.splitlines()[0]}" + ("  # changed" if value != default[key] else ""))


def print_verdict(run_dirs: list[Path], skip_broken: bool = False) -> None:
    from bridgekit import runs
    from bridgekit.results import verdict

    files = [runs.find_eval(run_dir) for run_dir in run_dirs]
    frames = [runs.load_eval(file, skip_broken) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if lines := frame.attrs.get("left_out"):
            print(f"{file}: left out line {', '.join(map(str, lines))}; {len(frame):,} lines are used")
    print(verdict.judge(frames).text)


def export_bridge(arguments: argparse.Namespace) -> None:
    from bridgekit.train.experiment import Experiment

    models = arguments.source_model, arguments.target_model
    experiment = Experiment.load(arguments.run_dir, *models, device="cpu", trust_code=arguments.trust_code)
    print(f"exported to {experiment.export(arguments.out)}")


if __name__ == "__main__":
    sys.exit(main())
