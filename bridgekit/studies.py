"""The former place of archives of studies."""

from bridgekit.results.archive import keep_study  # noqa: F401
from bridgekit.runs import open_study  # noqa: F401
