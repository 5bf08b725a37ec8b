# ruff: noqa: F401
"""Old names of `first_runs`, for modules that still import them."""

from bridgekit.audit.first_runs import Record as RunRecord
from bridgekit.audit.first_runs import find_runs
from bridgekit.audit.first_runs import load_run as read_run
