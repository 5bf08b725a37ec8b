"""Tasks: where the questions come from and which text each model reads. One file per task; no torch here."""

from bridgekit.tasks.base import Example, load_examples

__all__ = ["Example", "load_examples"]
