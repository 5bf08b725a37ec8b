# ruff: noqa: F401
"""Old name of `reports.replace_block`, for modules that still import it."""

from bridgekit.results.reports import replace_block
