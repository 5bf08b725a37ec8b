# ruff: noqa: F401
"""Old names of `first_runs`, for modules that still import them."""

from bridgekit.audit.first_runs import conditions_of, evaluation_files, is_right
