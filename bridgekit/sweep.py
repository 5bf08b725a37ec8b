"""The former place of the runner."""

from bridgekit.runner import run_planned  # noqa: F401
from bridgekit.runs import same_run  # noqa: F401
