"""What every task gives: examples, and the pieces of text that prompts are made of.

A prompt is three pieces, so that soft tokens can be put between them: a shared `prefix` (few-shot examples, or
nothing), the example's own `question`, and the `cue` after which the model answers.
"""

from dataclasses import dataclass, replace

CUE = "\nAnswer:\n"


@dataclass(frozen=True, kw_only=True)
class Example:
    id: str
    split: str  # train | val | test
    question: str
    solution: str  # the gold worked answer, ends in `#### n`
    gold: str
    shots: str = ""  # solved questions in front of it, which all prompts have
    facts: str = ""  # read by the source alone (context variant)
    told: str = ""  # the needed fact in words, for `target_told`
    group: str | None = None  # who knows the unit; None where questions are independent
    unit: str | None = None
    value: int | None = None
    novelty: str | None = None  # of the unit, for a bridge trained on the train split
    family: str | None = None
    steps: int | None = None
    donor_id: str | None = None  # whose source states `shuffled` uses
    donor_gold: str | None = None  # the answer if the donor's fact were true here


@dataclass(frozen=True)
class Prompt:
    """Text of one prompt in its three pieces."""

    prefix: str
    question: str
    cue: str = CUE

    @property
    def text(self) -> str:
        return self.prefix + self.question + self.cue


def literal_prompt(example: Example) -> Prompt:
    return Prompt(example.shots, f"Question: {example.question}")


def source_prompt(example: Example) -> Prompt:
    """The source's own prompt: the target's, plus the facts when they are given to it in context."""
    return replace(literal_prompt(example), prefix=example.shots + example.facts)


def told_prompt(example: Example) -> Prompt:
    return replace(literal_prompt(example), prefix=example.shots + example.told)


def relay_prompt(example: Example, helper_text: str) -> Prompt:
    """The target's prompt with the source's own words in front: the rival that hands over text."""
    said = f"Helper: {helper_text.strip().replace(chr(10), ' ')}\n"
    return replace(literal_prompt(example), prefix=example.shots + said)
