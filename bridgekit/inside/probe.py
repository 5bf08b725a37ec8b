"""Is a unit's value linearly there, in which layer and at which token? Closed-form ridge, seconds per model.

    frame = probe_pair(source, lexicon)                      # layer place novelty digit, point low high n n_units
    frame = probe_pair(lm, lexicon, "target", report="val")  # while making a pair: no test unit is looked at

Tens and ones are classifiers of their own, so that a value the probe never saw can still be read; `joint` asks for
both. Fitted on units of the train split, strength chosen on the validation split (on a tenth of the train units where
the validation units are reported on), reported on units it never saw.
This module stands below train/: a pair is probed when it is made.
Shapes: N prompts, P places, L hidden states (0 is the embeddings), D hidden size, C classes.
"""

import random
import re

import pandas as pd
import torch
from torch.nn.functional import one_hot

from bridgekit.model.pair import LanguageModel, pad_ids, word_tokens
from bridgekit.model.states import in_batches
from bridgekit.results.table import share
from bridgekit.tasks import Example, source_prompt, units

PLACES = ("word end", "next token", "last token")
DIGITS = ("tens", "ones", "joint")
NOVELTIES = ("held_unit", "held_value", "not taught")  # the last is the control: units the model knows nothing of
FIT, CHOOSE = "fit", "choose"
PROMPTS_PER_UNIT = 2  # that the probe is fitted on
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, as a share of the features' mean variance


def probe_pair(
    lm: LanguageModel, lexicon, role: str = "source", report: str = "test", layers: tuple[int, ...] | None = None
) -> pd.DataFrame:
    """Share of the units of split `report` whose digits are read, by layer, place, novelty and digit."""
    fit, choose, report_on = pick_probe_units(lexicon, role, report)
    rng, parts = random.Random("probe 0"), {FIT: fit * PROMPTS_PER_UNIT, CHOOSE: choose, **report_on}
    return probe_prompts(lm, {name: ask_units(asked, rng) for name, asked in parts.items()}, layers)


def probe_prompts(
    lm: LanguageModel, parts: dict[str, list[Example]], layers: tuple[int, ...] | None = None
) -> pd.DataFrame:
    """Fit on part FIT, choose the strength on part CHOOSE, report on every other, by layer, place and digit."""
    layers = tuple(range(lm.n_layers + 1)) if layers is None else layers
    states = {name: place_states(lm, asked, layers) for name, asked in parts.items()}  # (N, P, L, D) each
    values = {name: torch.tensor([e.value for e in asked]) for name, asked in parts.items()}
    answers = []
    for j, layer in enumerate(layers):
        for p, place in enumerate(PLACES):
            x = {name: part[:, p, j] for name, part in states.items()}
            probe = DigitProbe(x[FIT], values[FIT], x[CHOOSE], values[CHOOSE])
            for name in [name for name in parts if name not in (FIT, CHOOSE)]:
                read = probe.read(x[name], values[name], [e.unit for e in parts[name]])
                answers.append(read.assign(layer=layer, place=place, novelty=name))
    return share(pd.concat(answers, ignore_index=True), ["layer", "place", "novelty", "digit"])


def pick_probe_units(lexicon, role: str, report: str) -> tuple[list, list, dict[str, list]]:
    """Units to fit on, to choose the strength on, and to report on by novelty; no unit is in two of them."""
    if report not in ("val", "test"):
        raise ValueError(f"probe: units are reported on `val` or `test`, not on '{report}'")
    known = units.known_units(lexicon, role)
    taught = {u.word for u in known}
    fit, choose = ([u for u in known if u.split == split] for split in ("train", "val"))
    report_on = {n: [u for u in known if u.split == report and u.novelty == n] for n in NOVELTIES[:2]}
    report_on["not taught"] = [u for u in lexicon if u.word not in taught and u.split == report]
    if report == "val":  # then a tenth of the train units choose
        fit, choose = [u for i, u in enumerate(fit) if i % 10], fit[::10]
    return fit, choose, {name: found for name, found in report_on.items() if found}


def ask_units(asked: list[units.Unit], rng: random.Random) -> list[Example]:
    """A problem about each unit, of a family that is drawn."""
    return [units.make_example(rng, u, u.split, rng.randrange(len(units.FAMILIES)), "probe") for u in asked]


def question_words(lm: LanguageModel, text: str, word: str) -> list[range]:
    """The word's tokens, counted with BOS, wherever the last question says it: facts and shots come before."""
    before = len(re.findall(rf"\b{re.escape(word)}\b", text[: max(0, text.rfind("Question:"))]))
    first = len(lm.bos)
    return [range(first + r.start, first + r.stop) for r in word_tokens(lm, text, word)[before:]]


def find_places(lm: LanguageModel, asked: list[Example]) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Token ids of each prompt with BOS, and its PLACES: the word's last token, the next one, the prompt's last."""
    texts = [source_prompt(e).text for e in asked]
    rows = [lm.bos + ids for ids in lm.tokenize(texts)]
    ends = [question_words(lm, text, e.unit)[0].stop - 1 for text, e in zip(texts, asked, strict=True)]
    return rows, [(end, end + 1, len(row) - 1) for end, row in zip(ends, rows, strict=True)]


def place_states(lm: LanguageModel, asked: list[Example], layers: tuple[int, ...]) -> torch.Tensor:
    """States at the three places of each prompt. (N, P, L, D)"""
    out = torch.empty(len(asked), len(PLACES), len(layers), lm.hidden_size, device=lm.device)
    rows, places = find_places(lm, asked)
    for chunk in in_batches([len(row) for row in rows], 256):
        ids, mask = pad_ids([rows[i] for i in chunk], lm.device)
        states = lm.hidden_states(ids, mask.long(), layers).float()  # (B, S, L, D)
        at = torch.tensor([places[i] for i in chunk], device=lm.device)  # (B, P)
        out[torch.from_numpy(chunk).to(lm.device)] = states[torch.arange(len(chunk), device=lm.device)[:, None], at]
    return out


class DigitProbe:
    """Two ridge classifiers on one-hot digits; the strength is the one with the best joint share on `choose`."""

    def __init__(self, x: torch.Tensor, values: torch.Tensor, choose_x: torch.Tensor, choose_values: torch.Tensor):
        """x (N, D), values (N,)"""
        self.mean, self.scale = x.double().mean(0), x.double().std(0).clamp(min=1e-9)
        fits = []
        for strength in STRENGTHS:
            self.weights = fit_ridge(self._normalise(x), one_hot_digits(values).to(x.device), strength)
            tens, ones, joint = (right.double().mean().item() for right in self.right(choose_x, choose_values))
            fits.append((joint, tens + ones, strength, self.weights))
        *_, self.weights = max(fits, key=lambda fit: fit[:3])

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() - self.mean) / self.scale

    def right(self, x: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Is the tens digit read right, the ones digit, both? (N, D), (N,) -> (N,) each, in the order of DIGITS"""
        scores = self._normalise(x) @ self.weights[:-1] + self.weights[-1]  # (N, 20)
        tens = scores[:, :10].argmax(1).cpu() == values // 10
        ones = scores[:, 10:].argmax(1).cpu() == values % 10
        return tens, ones, tens & ones

    def read(self, x: torch.Tensor, values: torch.Tensor, words: list[str]) -> pd.DataFrame:
        """A row per prompt and digit: unit digit correct."""
        right = zip(DIGITS, self.right(x, values), strict=True)
        return pd.concat([pd.DataFrame({"unit": words, "digit": d, "correct": r.numpy()}) for d, r in right])


def one_hot_digits(values: torch.Tensor) -> torch.Tensor:
    """Both digits of each value, one-hot. (N,) -> (N, 20)"""
    return torch.cat([one_hot(values // 10, 10), one_hot(values % 10, 10)], 1).double()


def fit_ridge(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights with a free intercept in the last row. x (N, D), y (N, C) -> (D + 1, C)"""
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    penalty = torch.full((x.shape[1],), strength * len(x), dtype=x.dtype, device=x.device)
    penalty[-1] = 0.0
    return torch.linalg.solve(x.T @ x + penalty.diag(), x.T @ y)
