"""The former place of `bridgekit fetch`: it is in bridgekit.tasks.gsm8k."""

from bridgekit.tasks.gsm8k import fetch, main  # noqa: F401
