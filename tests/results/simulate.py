"""How often the claim rule errs: simulated experiments without an effect, and its power with one of 0.05.

    python tests/results/simulate.py [--n 2000] [--processes 2]     # writes preserved_data/verdict_simulation.json

Rows that the file has are not made again.

Each row has `n` experiments of three seeds that the real `judge` decides. In the null rows the bridge equals one
control and is 0.1 above the others: on every problem, or on source-only problems alone. Answers correlate within units;
the seeds' answers are independent given the unit, half of them shared, or the same.
"""

import argparse
import json
import multiprocessing
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import ndtri
from scipy.stats import beta

from bridgekit.results.verdict import RULE, judge

AGREE = {"wholly": 1.0, "half": 0.5, "not at all": 0.0}  # share of a trained bridge's answers that are those of seed 1
WHERE = ("all, no groups", "all", "source-only alone")  # where the bridge equals the control
COMMON, UNIT = 0.5, 0.2  # of an answer's latent variance: shared by all conditions, and by a unit's problems
LEVEL, N_BOOT = 0.7, 500
KEYS = ("equal to", "where", "seeds agree", "gain", "problems", "n")  # of a row: what is simulated
OUT = Path(__file__).parents[2] / "preserved_data" / "verdict_simulation.json"


def make_experiment(
    rng: np.random.Generator, equal: str, where: str, agree: float, gain: float, n: int
) -> list[pd.DataFrame]:
    """Three seeds of one experiment; `equal` is the control without an effect, empty for power."""
    unit, number = rng.integers(n // 2, size=n), np.arange(n)
    group = rng.choice(["source_only", "target_only", "both"], n // 2, p=[0.3, 0.4, 0.3])[unit]
    frame = pd.DataFrame({"id": number, "unit": unit, "novelty": "held_unit", "group": group})
    frame = frame[["id"]] if where == WHERE[0] else frame
    shared, unit_part = rng.normal(size=n) * COMMON**0.5, UNIT**0.5 * (where != WHERE[0])
    frames, first = [], {}
    for _ in range(3):
        rows = frame.assign(bridged_logprob=rng.uniform(-3, 0, n))  # two seeds that answer alike are told apart by it
        for name in ("bridged", *RULE):
            per_unit = rng.normal(size=n // 2)[unit] * unit_part
            latent = shared + per_unit + rng.normal(size=n) * (1 - COMMON - unit_part**2) ** 0.5
            old = first.setdefault(name, latent)
            latent = np.where(rng.random(n) < (1.0 if name == "target" else agree), old, latent)
            here = group == "source_only" if where == WHERE[2] else np.full(n, True)
            below = np.where(here & (name == equal), 0.0, gain) if name != "bridged" else np.zeros(n)
            rows[f"{name}_correct"] = latent < ndtri(LEVEL - below)
        frames.append(rows)
    return frames


def simulate(row: tuple) -> dict:
    """One row of the table: shares of `transfers` and `harms`, with Clopper and Pearson's one-sided 95% bound."""
    equal, where, agree, gain, size, n, seed = row
    rng = np.random.default_rng(seed)
    found = Counter(
        judge(make_experiment(rng, equal, where, AGREE[agree], gain, size), n_boot=N_BOOT).outcome for _ in range(n)
    )
    told = {"equal to": equal, "where": where, "seeds agree": agree, "gain": gain, "problems": size, "n": n}
    for outcome in ("transfers", "harms"):
        count = found[outcome]
        told |= {
            outcome: count / n,
            f"{outcome}_upper": round(float(beta.ppf(0.95, count + 1, n - count)), 4) if count < n else 1.0,
        }
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=2000, help="simulated experiments a row (%(default)s)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    rows = [(equal, where, agree, 0.1, 400, args.n) for agree, where, equal in product(AGREE, WHERE, RULE)]
    rows += [("", where, agree, 0.05, 3000, max(20, args.n // 10)) for where, agree in product(WHERE[:1], AGREE)]
    rows = [(*row, seed) for seed, row in enumerate(rows[-len(AGREE) :] + rows[: -len(AGREE)])]
    kept = json.loads(args.out.read_text()) if args.out.exists() else {"null": [], "with_effect": []}
    found = [row for row in kept["with_effect"] + kept["null"] if tuple(map(row.get, KEYS)) in {r[:-1] for r in rows}]
    known = {tuple(map(row.get, KEYS)) for row in found}
    with multiprocessing.Pool(args.processes) as pool:
        for row in pool.imap(simulate, [row for row in rows if row[:-1] not in known]):
            found.append(row)
            print(json.dumps(row), flush=True)
            write(args.out, found, len(rows))


def write(path: Path, found: list[dict], planned: int) -> None:
    """The rows there are, and the worst of them."""
    null, power = ([row for row in found if bool(row["equal to"]) == is_null] for is_null in (True, False))
    summary = {"rows": len(found), "planned": planned, "least_n": min(row["n"] for row in found)}
    for name in ("transfers", "harms"):
        summary[f"{name}_most"] = max((row[name] for row in null), default=None)
        summary[f"{name}_upper"] = max((row[f"{name}_upper"] for row in null), default=None)
    summary["power"] = min((row["transfers"] for row in power), default=None)
    path.write_text(json.dumps(summary | {"null": null, "with_effect": power}, indent=1) + "\n")


if __name__ == "__main__":
    main()
