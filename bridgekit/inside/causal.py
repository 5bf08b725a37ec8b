"""Does the answer follow the source's state? Another unit's state is put in place of this one's.

    frame = causal_check(open_finished(run), n=200)
    table = causal_table(frame)

The source reads the same question with another unit's word in it, so that every place stays where it was; the message
is made from that; the target reads the original question. The answer *follows the donor* if it is the one that the
donor's value gives here. Variants, by where the donor's states stand:

- `nowhere`: its own states. How often the answer is the donor's by chance alone.
- `whole prompt`: everywhere. What a bridge that carries the fact must follow.
- `unit word`: at the unit word's tokens alone. Is the fact read there?
- `all but the word`: everywhere else. Is it read anywhere else?

A donor is of the same group and split, has another value, and a word of as many tokens for both models.
Shapes: B batch, S source tokens, L captured layers, D_s source hidden size.
"""

import random
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from bridgekit.config import ConfigError
from bridgekit.model.states import SourceStates
from bridgekit.results.statistics import clustered_proportion
from bridgekit.tasks import Example, units
from bridgekit.tasks.answers import extract_answer
from bridgekit.train.attention import classify_tokens
from bridgekit.train.experiment import Experiment

VARIANTS = ("nowhere", "whole prompt", "unit word", "all but the word")


def answer_with(example: Example, value: int) -> str:
    """The final answer if the unit's value were another: the problem's numbers are read off its worked answer."""
    family = next(f for f in units.FAMILIES if f.name == example.family)
    numbers = {"a": 0, "b": 0, "c": 0, "k": 0}
    for step, (left, right) in zip(family.steps, re.findall(r"<<(\d+)[-+*/](\d+)=", example.solution), strict=True):
        names = re.fullmatch(r"(\w+)[-+*/](\w+)", step).groups()
        numbers |= {n: int(x) for n, x in zip(names, (left, right), strict=True) if n in numbers}
    return units.solve(family, numbers, value, "")[1]


def pair_with_donors(opened: Experiment, examples: list[Example], seed: int = 0) -> list[tuple[Example, Example]]:
    """Each example with itself as the donor's word would have it; left out where no donor has as many tokens."""
    if opened.config.task.task != "units" or opened.config.bridge.source_view == "facts":
        raise ConfigError("bridge.source_view: the causal check replaces the unit's word in the question; this bridge "
                          "does not read the question: name a run with source_view `prompt`")  # fmt: skip
    lexicon = [u for u in opened.lexicon if u.split == "test"]
    lengths = count_word_tokens(opened, [u.word for u in lexicon])
    pairs = []
    for example in examples:
        rng = random.Random(f"donor {seed} {example.id}")
        if example.facts:  # another fact of the note the source reads
            donors = [(w, int(v)) for w, v in re.findall(r"A (\w+) is (\d+)\.", example.facts)]
            lengths |= count_word_tokens(opened, [w for w, _ in donors] + [example.unit])
        else:
            donors = [(u.word, u.value) for u in lexicon if u.group == example.group]
        gold = {v: answer_with(example, v) for v in {v for _, v in donors}}
        fitting = [(w, v) for w, v in donors if lengths[w] == lengths[example.unit] and gold[v] != example.gold]
        if fitting:
            word, value = rng.choice(fitting)
            question = re.sub(rf"\b{example.unit}\b", word, example.question)
            pairs.append((example, replace(example, question=question, unit=word, value=value, gold=gold[value])))
    return pairs


def count_word_tokens(opened: Experiment, words: list[str]) -> dict[str, tuple[int, int]]:
    """Tokens of ` word` for the source and the target."""
    counts = [[len(ids) for ids in lm.tokenize([f" {w}" for w in words])] for lm in
              (opened.pair.source, opened.pair.target)]  # fmt: skip
    return dict(zip(words, zip(*counts, strict=True), strict=True))


class PatchedStates(SourceStates):
    """One prompt's states with another's at chosen tokens; both have the same number of tokens."""

    def __init__(self, own: SourceStates, donor: SourceStates, places: list[np.ndarray]):
        if (own.lengths != donor.lengths).any():
            raise ValueError("patched states: a prompt and its donor's must have the same number of tokens")
        self.__dict__ |= vars(own)
        self.own, self.donor, self.places = own, donor, places

    def batch(self, indices: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, S, L, D_s), (B, S)"""
        states, mask = self.own.batch(indices, device)
        others, _ = self.donor.batch(indices, device)
        taken = torch.zeros_like(mask)
        for row, i in enumerate(indices):
            taken[row, : len(self.places[i])] = torch.from_numpy(self.places[i]).to(device)
        return torch.where(taken[..., None, None], others, states), mask


def place_variants(opened: Experiment, pairs: list[tuple[Example, Example]]) -> dict[str, SourceStates]:
    """The source states of each variant."""
    own = opened.evaluator.source_states("bridged", [e for e, _ in pairs])
    donor = opened.evaluator.source_states("bridged", [d for _, d in pairs])
    words = [
        np.array(classify_tokens(opened.pair.source, d, row)) == 1
        for (_, d), row in zip(pairs, donor.rows, strict=True)
    ]
    for (example, _), row, at in zip(pairs, own.rows, words, strict=True):
        if example.facts:  # the note is the same in both prompts: what differs is the question alone
            at &= np.array(classify_tokens(opened.pair.source, example, row)) == 1
    return {
        "nowhere": own,
        "whole prompt": donor,
        "unit word": PatchedStates(own, donor, words),
        "all but the word": PatchedStates(own, donor, [~at for at in words]),
    }


def causal_check(opened: Experiment, examples: list[Example], variants=VARIANTS, seed: int = 0) -> pd.DataFrame:
    """One row per example, bridge and variant: does its answer follow the donor, does it stay?"""
    pairs = same_length(opened, pair_with_donors(opened, examples, seed))
    if not pairs:
        raise ConfigError(f"{opened.run}: none of {len(examples)} problems has a donor of as many tokens: take more")
    states = place_variants(opened, pairs)
    asked = [e for e, _ in pairs]
    rows = []
    for name, bridge in opened.bridges.items():
        for variant in variants:
            said = opened.evaluator.decode_messages(name, bridge, asked, states[variant], None)
            for (e, donor), out in zip(pairs, said, strict=True):
                answer = extract_answer(out.text)
                rows.append({
                    "id": e.id, "unit": e.unit, "value": e.value, "novelty": e.novelty, "group": e.group,
                    "donor_unit": donor.unit, "donor_value": donor.value, "condition": name, "variant": variant,
                    "answer": answer, "follows": answer == donor.gold, "stays": answer == e.gold,
                })  # fmt: skip
    return pd.DataFrame(rows)


def same_length(opened: Experiment, pairs: list[tuple[Example, Example]]) -> list[tuple[Example, Example]]:
    """Pairs whose two source prompts have as many tokens; a worked answer in the prompt may make them differ."""
    own, donor = (opened.evaluator.source_states("bridged", [p[i] for p in pairs]).lengths for i in (0, 1))
    return [p for p, a, b in zip(pairs, own, donor, strict=True) if a == b]


def causal_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Share that follows the donor and share that stays, for each bridge and variant, with clustered intervals."""
    rows = []
    for (condition, variant), some in frame.groupby(["condition", "variant"], sort=False):
        for outcome in ("follows", "stays"):
            share = clustered_proportion(some[outcome], some["unit"])
            rows.append(dict(condition=condition, variant=variant, outcome=outcome, share=share.point, low=share.low,
                             high=share.high, n=share.n, n_units=share.n_clusters))  # fmt: skip
    return pd.DataFrame(rows)
