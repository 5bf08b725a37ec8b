"""Does the answer follow the source's state? Another unit's state is put in place of this one's.

    answers = swap_states(Experiment.load(run), examples)
    table = causal_table(answers)         # condition variant outcome, point low high n n_units

The source reads the same question with another unit's word in it, so that every token stays where it was. The message
is made from those states; the target reads the original question. The answer *follows the donor* if it is the one that
the donor's value gives here. Variants, by where the donor's states stand:

- `nowhere`: its own states. How often the answer is the donor's by chance alone.
- `whole prompt`: everywhere. A bridge that carries the fact must follow.
- `unit word`: at the unit word's tokens alone. Is the fact read there?
- `all but the word`: everywhere else. Is it read anywhere else?

A donor is of the same group and split, has another value, and a word of as many tokens for both models.
"""

import copy
import math
import random
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from bridgekit.config import ConfigError
from bridgekit.inside.probe import question_words
from bridgekit.model.states import SourceStates
from bridgekit.results.table import share
from bridgekit.tasks import Example, source_prompt, units
from bridgekit.train.experiment import Experiment

VARIANTS = ("nowhere", "whole prompt", "unit word", "all but the word")


def pair_with_donors(experiment: Experiment, examples: list[Example]) -> list[tuple[Example, Example]]:
    """Each example with itself as the donor's word would have it; left out where no donor has as many tokens."""
    if experiment.config.task.task != "units" or experiment.config.bridge.source_view == "facts":
        raise ConfigError(
            "bridge.source_view: the causal check replaces the unit's word in the question, which this bridge does not "
            "read: name a run of task `units` with source_view `prompt`"
        )
    lexicon, pairs = [u for u in experiment.lexicon if u.split == "test"], []
    words = sorted({u.word for u in lexicon} | {word for e in examples for word, _ in e.fact_pairs})
    counts = [
        map(len, lm.tokenize([f" {w}" for w in words])) for lm in (experiment.pair.source, experiment.pair.target)
    ]
    lengths = dict(zip(words, zip(*counts, strict=True), strict=True))  # tokens of each word, for both models
    for example in examples:
        # other facts of the note that the source reads, or else other units
        donors = example.fact_pairs or [(u.word, u.value) for u in lexicon if u.group == example.group]
        gold = {value: units.answer_with(example, value) for value in {value for _, value in donors}}
        fitting = [(w, v) for w, v in donors if lengths[w] == lengths[example.unit] and gold[v] != example.gold]
        if fitting:
            word, value = random.Random(f"donor 0 {example.id}").choice(fitting)
            question = re.sub(rf"\b{example.unit}\b", word, example.question)
            pairs.append((example, replace(example, question=question, unit=word, value=value, gold=gold[value])))
    own, donor = (experiment.source_states([pair[i] for pair in pairs]).lengths for i in (0, 1))
    return [pair for pair, a, b in zip(pairs, own, donor, strict=True) if a == b]  # worked answers may differ in length


def patch_states(own: SourceStates, donor: SourceStates, places: list[np.ndarray]) -> SourceStates:
    """One prompt's states with another's at chosen tokens; both have the same number of tokens."""
    patched, taken = copy.copy(own), torch.from_numpy(np.concatenate(places)).to(own.lm.device)
    patched.flat = copy.copy(own.flat)
    patched.flat.states = torch.where(taken[:, None, None], donor.flat.states, own.flat.states)
    return patched


def place_variants(experiment: Experiment, pairs: list[tuple[Example, Example]]) -> dict[str, SourceStates]:
    """The source states of each variant."""
    own, donor = (experiment.source_states([pair[i] for pair in pairs], cache_gb=math.inf) for i in (0, 1))
    places = [np.zeros(length, dtype=bool) for length in own.lengths]
    for at, (example, _) in zip(places, pairs, strict=True):
        for word in question_words(experiment.pair.source, source_prompt(example).text, example.unit):
            at[word.start : word.stop] = True
    word, rest = patch_states(own, donor, places), patch_states(own, donor, [~at for at in places])
    return dict(zip(VARIANTS, (own, donor, word, rest), strict=True))


def swap_states(experiment: Experiment, examples: list[Example]) -> pd.DataFrame:
    """One row per example, bridge and variant: is its answer the donor's (`follows`), is it its own (`stays`)?"""
    pairs = pair_with_donors(experiment, examples)
    if not pairs:
        raise ConfigError(
            f"{experiment.run}: none of {len(examples)} problems has a donor of as many tokens: take more"
        )
    states, asked = place_variants(experiment, pairs), [example for example, _ in pairs]
    rows = []
    for name, bridge in experiment.bridges.items():
        for variant, patched in states.items():
            texts = experiment.decode_messages(name, bridge, asked, patched)
            for (e, donor), generated in zip(pairs, texts, strict=True):
                answer = experiment.task.extract(generated.text)
                facts = {"id": e.id, "unit": e.unit, "value": e.value, "novelty": e.novelty, "group": e.group}
                facts |= {"donor_unit": donor.unit, "donor_value": donor.value, "condition": name, "variant": variant}
                rows.append(facts | {"answer": answer, "follows": answer == donor.gold, "stays": answer == e.gold})
    return pd.DataFrame(rows)


def causal_table(answers: pd.DataFrame) -> pd.DataFrame:
    """Share that follows the donor and share that stays, for each bridge and variant."""
    long = answers.melt(["unit", "condition", "variant"], ["follows", "stays"], "outcome", "correct")
    return share(long.astype({"correct": bool}), ["condition", "variant", "outcome"])
