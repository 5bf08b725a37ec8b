"""The former place of examples and prompts: they are in bridgekit.tasks."""

from bridgekit.tasks import (  # noqa: F401
    CUE,
    Example,
    Prompt,
    literal_prompt,
    relay_prompt,
    source_prompt,
    told_prompt,
)
