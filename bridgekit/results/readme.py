"""README.md and RESULTS.md from templates that call the recomputation: a number in them cannot be typed.

    bridgekit readme            # write both files from results/templates/*.j2 and the kept runs
    bridgekit readme --check    # compare, and name the first line that differs

What a template may call is `Numbers`: `{{ share("phase1_cpu_seed1", "bridged", "source_only").interval }}`. A constant
that no run gives (a threshold, a setting) is written as `{{ fixed("0.001", "weight in the plan") }}`.
"""

import functools
import itertools
import json
import re
import sys
from pathlib import Path

import pandas as pd

from bridgekit import runs
from bridgekit.config import Parser
from bridgekit.results import compare, table, verdict
from bridgekit.results.reports import render
from bridgekit.results.style import format_interval, format_share
from bridgekit.tasks.units import make_lexicon, pick_train_units

DOCUMENTS = ("README.md", "RESULTS.md")
TEMPLATES = Path(__file__).with_name("templates")
_CALLS = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)
_TYPED = re.compile(r"(?<![\w./-])[-+]?\d+\.\d{2,}(?![\w.]*\.\d)|(?<![\w.])\d+(?:\.\d+)?\s?%")


class Number:
    """The one row of a table; prints its point, `.interval` its interval too, `.percent` whole percent."""

    def __init__(self, rows: pd.DataFrame, signed: bool = False) -> None:
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} rows where one number was asked for")
        (self.row,), self.signed = rows.to_dict("records"), signed

    def __getattr__(self, column: str) -> object:
        """`low high n n_units smallest_effect holds ...`: whatever columns the table has."""
        return self.row[column]

    def __str__(self) -> str:
        return format_share(self.point, signed=self.signed)

    @property
    def interval(self) -> str:
        return format_interval(self.point, self.low, self.high, signed=self.signed)

    @property
    def percent(self) -> str:
        return f"{format_share(100 * self.point, 0)}%"


class Numbers:
    """What a template may call. A name is a kept run (`phase1_cpu_seed1`) or all seeds of one (`headline_dit`)."""

    def __init__(self, root: str | Path = "preserved_data") -> None:
        self.root = Path(root)

    @functools.cache  # noqa: B019 - one object for one rendering
    def folders(self, name: str) -> list[Path]:
        """The folders of a run, or of all its seeds: its own, or those in the study that its name begins with."""
        pattern = name if re.search(r"_seed\d+$", name) else f"{name}_seed*"
        studies = [path.name.removesuffix(".tar.xz") for path in sorted(self.root.glob("studies/*.tar.xz"))]
        places = [runs.open_study(study, self.root / "studies") for study in studies if name.startswith(f"{study}_")]
        found = sorted(self.root.glob(pattern)) or [path for place in places for path in sorted(place.glob(pattern))]
        if not found:
            raise ValueError(
                f"{self.root}: no run '{name}' is kept there, nor in one of its studies: `bridgekit preserve`"
            )
        return found

    @functools.cache  # noqa: B019
    def answers(self, name: str) -> pd.DataFrame:
        return table.load_answers(self.folders(name))

    def share(self, name: str, condition: str = "bridged", subset: str = "all") -> Number:
        """Share right, over all seeds."""
        return Number(table.share(table.select(self.answers(name), subset).query("condition == @condition")))

    def shares(self, name: str, condition: str = "bridged", subset: str = "all") -> list[float]:
        """Share right of each seed."""
        rows = table.select(self.answers(name), subset).query("condition == @condition")
        return table.share(rows, "seed")["point"].tolist()

    def recovery(self, name: str, subset: str = "source_only_held_unit") -> Number:
        """What the bridge has right as a share of what the target has right when told: mean and range of the seeds."""
        rows = table.ratio(table.select(self.answers(name), subset), "bridged", "target_told", by="seed")
        if len(rows) > 1:
            rows = rows.assign(low=rows["point"].min(), high=rows["point"].max(), point=rows["point"].mean())[:1]
        return Number(rows)

    def difference(self, name: str, one: str = "bridged", other: str = "target", subset: str = "all") -> Number:
        """Share right of one condition minus another's, paired by problem and seed."""
        return Number(table.difference(table.select(self.answers(name), subset), one, other), signed=True)

    @functools.cache  # noqa: B019
    def verdict(self, name: str) -> verdict.Verdict:
        """The claim rule on all seeds of a run."""
        return verdict.judge(self.folders(name))

    @functools.cache  # noqa: B019
    def _compared(self, study: str, reference: str) -> pd.DataFrame:
        answers = table.load_answers(runs.open_study(study, self.root / "studies"))
        return compare.compare_variants(answers, f"{study}_{reference}")

    def change(self, study: str, variant: str, reference: str, subset: str = "source_only_held_unit") -> Number:
        """Bridged accuracy of a variant minus the reference's, and the smallest effect that would have been found."""
        rows = self._compared(study, reference)
        return Number(rows[(rows["variant"] == f"{study}_{variant}") & (rows["subset"] == subset)], signed=True)

    def intervention(self, name: str, taken_out: bool) -> dict[str, Number]:
        """Held-out units after half of the values left the training: those values, or the others; before and after."""
        arms = {"before": self.folders(f"{name}_units"), "after": self.folders(f"{name}_values")}
        folder = arms["after"][0]
        trained = [unit for unit in make_lexicon(runs.lexicon_seed_of(folder)) if unit.split == "train"]
        taught = {u.value for u in pick_train_units(trained, 1.0, runs.load_run_config(folder).task.train_values_share)}
        rows = table.load_answers(arms)
        held = table.select(rows[rows["variant"] == "before"], "source_only_held_unit")[
            "id"
        ]  # after, some are new values
        rows = rows[rows["condition"].eq("bridged") & rows["id"].isin(held) & (rows["value"].isin(taught) != taken_out)]
        found = {arm: Number(table.share(rows[rows["variant"] == arm])) for arm in arms}
        return found | {"change": Number(table.difference(rows, "after", "before", on="variant"), signed=True)}

    def figure_data(self, name: str, column: str, signed: bool = False, **where) -> Number:
        """A value of the data of a figure, for what takes a model or minutes."""
        rows = self.figure_rows(name)
        rows = rows[(rows[[*where]] == [*where.values()]).all(axis=1)]
        others = ["point"] * (column != "point")
        return Number(rows.drop(columns=others, errors="ignore").rename(columns={column: "point"}), signed)

    def figure_rows(self, name: str) -> pd.DataFrame:
        """The data of a figure; refused where an input of the figure has changed."""
        base = self.root.parent / "figures" / name
        facts = json.loads(base.with_suffix(".json").read_text())
        for part in (facts["data"], *facts["inputs"]):
            if runs.hash_file(base.parent / part["name"]) != part["sha256"]:
                raise ValueError(f"figures/{name}: {part['name']} is not what it was drawn from; draw it again")
        return pd.read_csv(base.with_suffix(".csv"))

    def status(self, name: str) -> dict:
        """What a run recorded of its end: `elapsed` seconds, trained `parameters`."""
        return runs.load_status(self.folders(name)[0])

    def example(self, name: str, conditions: list[str]) -> dict:
        """A source-only problem about a unit the bridge never met that it has right, with each condition's answer."""
        rows = table.select(table.load_frame(self.folders(name)[0]), "source_only_held_unit")
        row = rows[rows["bridged_correct"] & ~rows["target_correct"]].iloc[0]
        answers = {condition: row[f"{condition}_full"].replace("\n", " ") for condition in conditions}
        return {"question": row["question"], "unit": row["unit"], "value": row["value"], "answers": answers}

    def benchmark(self, name: str = "h200") -> dict:
        """What steps and answers cost at real size (`bridgekit bench`)."""
        return runs.load_json(self.root / "benchmarks" / f"{name}.json")

    def faults(self) -> list[dict]:
        """What became of killed runs (`python tests/faults.py`)."""
        return json.loads((self.root / "faults.json").read_text())

    def fresh_pairs(self) -> dict:
        """How the pairs of the headline were made, and of each pair its record."""
        return runs.load_json(self.root / "studies" / "headline_fresh_pairs.json")

    def simulation(self) -> dict:
        """How often the claim rule errs in simulated experiments without an effect (`tests/results/simulate.py`)."""
        return runs.load_json(self.root / "verdict_simulation.json")

    def trained_controls(self) -> dict[str, int]:
        """How many trained controls are kept, and how many of them are weights from before the first step."""
        steps = [
            s["mix"] for path in self.root.glob("*/config.yaml") for s in table.load_control_steps(path.parent).values()
        ]
        return {"all": len(steps), "untrained": steps.count(0)}

    def lines_of_code(self) -> int:
        """Lines of the package, in steps of 500, so that a small change does not make the page stale."""
        lines = sum(len(path.read_text().splitlines()) for path in Path(__file__).parents[1].rglob("*.py"))
        return 500 * round(lines / 500)


def render_document(name: str, root: str | Path = "preserved_data") -> str:
    """A document from its template; a template with a typed number is refused."""
    if typed := find_typed((TEMPLATES / f"{name}.j2").read_text(encoding="utf-8")):
        raise ValueError(f"{name}.j2: '{typed[0]}' is typed; call what recomputes it, or fixed('{typed[0]}', 'why')")
    numbers = Numbers(root)
    calls = {key: getattr(numbers, key) for key in dir(Numbers) if not key.startswith("_")}
    return render(f"{name}.j2", _print, fixed=lambda text, why: text, **calls)


def _print(value: object) -> object:
    return format_share(value) if isinstance(value, float) else value


def find_typed(template: str) -> list[str]:
    """Numbers with two or more decimals, and percentages, that stand outside of any call."""
    return _TYPED.findall(_CALLS.sub("", template))


def main(argv: list[str] | None = None) -> int:
    """The `bridgekit readme` verb."""
    parser = Parser(prog="bridgekit readme", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path("preserved_data"), help="the kept runs (%(default)s)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a file is not current")
    args = parser.parse_args(argv)
    stale = 0
    for name in DOCUMENTS:
        path, text = args.root.parent / name, render_document(name, args.root)
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        if not args.check:
            runs.write_text_atomic(path, text)
        elif old != text:
            pairs = itertools.zip_longest(old.splitlines(), text.splitlines(), fillvalue="(end)")
            number, (was, new) = next((i, pair) for i, pair in enumerate(pairs, 1) if pair[0] != pair[1])
            print(f"{path}, line {number}: '{was}' should be '{new}' (bridgekit readme)", file=sys.stderr)
            stale = 1
    return stale
