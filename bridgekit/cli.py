"""The command line: thin verbs over the package; each imports what it needs only when it is called.

bridgekit run notebooks/phase1.ipynb -f parameters/phase1.yaml -o train.steps=200
bridgekit config -f parameters/phase1.yaml
bridgekit verdict runs/phase1_*
"""

import argparse
import inspect
import re
import signal
import sys
from pathlib import Path

import yaml

from bridgekit import config as configuration

FORWARDED = {  # verbs whose module reads its own arguments: {verb: (module, what it does)}
    "sweep": ("sweep", "many runs at once, on the GPUs there are"),
    "pair": ("train.pretrain", "make a pair of models from scratch, with a lexicon of its own"),
    "fetch": ("tasks.fetch", "bring real questions into a folder that runs read"),
    "audit": ("audit.report", "recompute every claim from its data"),
    "report": ("results.reports", "write LOG.md, EXPERIMENTS_SUMMARY.md and REPORT.md of a runs folder again"),
    "preserve": ("results.preserve", "keep what is worth keeping of a run in preserved_data/"),
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; a mistake of the user's ends in one line on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    signal.signal(signal.SIGTERM, _stop)
    try:
        if argv and argv[0] in FORWARDED:
            return _forward(argv[0], argv[1:])
        arguments = build_parser().parse_args(argv)
        return arguments.run(arguments) or 0
    except (ValueError, FileNotFoundError, PermissionError, FileExistsError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130


def _stop(number: int, frame: object) -> None:
    """Leave through the exits that end children and mark the run as failed."""
    raise SystemExit(128 + number)


def _forward(verb: str, argv: list[str]) -> int:
    import importlib

    return importlib.import_module(f"bridgekit.{FORWARDED[verb][0]}").main(argv) or 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bridgekit", description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(metavar="verb", required=True)

    run = verbs.add_parser("run", help="execute a notebook: run folder, executed notebook, figures, verdict")
    run.add_argument("notebook", type=Path)
    _add_parameters(run)
    run.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), dest="parameters",
        help="a parameter of the notebook",
    )  # fmt: skip
    run.set_defaults(run=run_notebook)

    train = verbs.add_parser("train", help="the same training and evaluation without a notebook")
    _add_parameters(train)
    train.set_defaults(run=train_bridge)

    config = verbs.add_parser(
        "config", help="the resolved configuration, and every key there is", epilog=describe_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_parameters(config)
    config.set_defaults(run=print_config)

    verdict = verbs.add_parser("verdict", help="may these finished runs (one per seed) say that the bridge transfers?")
    verdict.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN")
    verdict.add_argument("--skip-broken", action="store_true", help="leave out lines of an evaluation that are cut")
    verdict.set_defaults(run=print_verdict)

    for verb, (_, what) in FORWARDED.items():  # listed here for --help alone
        verbs.add_parser(verb, help=what, add_help=False)
    return parser


def _add_parameters(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", dest="file", type=Path, metavar="FILE", help="a file of parameters/")
    parser.add_argument(
        "-o", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="one configuration key"
    )


def run_notebook(arguments: argparse.Namespace) -> None:
    from bridgekit import headless

    parameters = {name: yaml.safe_load(value) for name, value in arguments.parameters}
    run_dir = headless.execute_notebook(arguments.notebook, arguments.file, parameters, arguments.overrides)
    print(headless.describe_run(run_dir, arguments.notebook))


def train_bridge(arguments: argparse.Namespace) -> None:
    from bridgekit import launch

    run_dir = launch.open_run(configuration.load_config(arguments.file, arguments.overrides))
    print(f"run folder {run_dir}", flush=True)
    launch.run_training(run_dir)
    _print_verdict([run_dir])


def print_config(arguments: argparse.Namespace) -> None:
    config = configuration.load_config(arguments.file, arguments.overrides)
    default = configuration.to_flat(configuration.load_config())
    for key, value in configuration.to_flat(config).items():
        plain = list(value) if isinstance(value, tuple) else value
        text = yaml.safe_dump(plain, default_flow_style=True, width=9999)
        print(f"{key}={text.splitlines()[0]}" + ("  # changed" if value != default[key] else ""))


def describe_keys() -> str:
    """Every key with its type, default and the comment beside it in config.py."""
    lines = []
    for section, cls in configuration.SECTIONS.items():
        comments = dict(re.findall(r"^    (\w+):.*?# (.+)$", inspect.getsource(cls), re.MULTILINE))
        for key, field in configuration.KEYS.items():
            if key.startswith(f"{section}."):
                kind = getattr(field.type, "__name__", "list")
                comment = comments.get(field.name, "")
                lines.append(f"  {key} ({kind}, {field.default!r})" + (f": {comment}" if comment else ""))
    return "keys, as section.name or name alone:\n" + "\n".join(lines)


def print_verdict(arguments: argparse.Namespace) -> None:
    _print_verdict(arguments.run_dirs, arguments.skip_broken)


def _print_verdict(run_dirs: list[Path], skip_broken: bool = False) -> None:
    from bridgekit import runs
    from bridgekit.results import verdict

    files = [runs.find_eval(run_dir) for run_dir in run_dirs]
    frames = [runs.load_eval(file, skip_broken) for file in files]
    for file, frame in zip(files, frames, strict=True):
        if lines := frame.attrs.get("left_out"):
            print(f"{file}: left out line {', '.join(map(str, lines))}; {len(frame):,} lines are used")
    print(verdict.judge(frames).text)


if __name__ == "__main__":
    sys.exit(main())
