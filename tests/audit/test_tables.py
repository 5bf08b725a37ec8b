"""The tables of the first experiments say what the preserved outcomes say.

python -m pytest tests/audit/test_tables.py
"""

from pathlib import Path

import pytest

from bridgekit.audit import tables
from bridgekit.audit.report import run_audit

FIRST = Path(__file__).parents[2] / "preserved_data" / "first_experiments"


def test_curves_gains_headroom_and_power():
    records = run_audit(FIRST).records
    curves = tables.curves_table(records)
    forward = curves[curves["direction"] == "Mistral-7B to Llama-3.1-8B"]
    assert forward["run"].nunique() == 4 and forward["group"].nunique() == 1 and curves["group"].nunique() == 5
    assert curves.loc[curves["final"], "step"].isna().all() and curves["step"].max() == 2000
    gains = tables.gains_table(records).set_index("run")
    assert gains.loc["phase1_20251116_142710", ["gained", "lost", "n"]].tolist() == [10, 35, 200]
    headroom = tables.headroom_table(records).set_index("label")
    assert sorted(headroom["source_only"]) == [7, 59] and (headroom.sum(axis=1) == 200).all()
    power = tables.power_table(records).groupby("comparison")
    assert power["needed_for_2_points"].first()["two runs of one setting"] == pytest.approx(2451, abs=1)
    assert (power["effect"].diff().dropna() < 0).all()
