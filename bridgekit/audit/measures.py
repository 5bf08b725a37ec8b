# ruff: noqa: F401
"""Old names of `claims`, for modules that still import them."""

from bridgekit.audit.claims import Records
from bridgekit.audit.claims import answers_at as right_at
