"""Is a unit's value linearly there, in which layer and at which token? Closed-form ridge, seconds per model.

    table = probe_pair(source, lexicon)                     # {layer: {place: {novelty: {tens, ones, joint, n}}}}
    table = probe_pair(lm, lexicon, "target", report="val")  # while making a pair: no test unit is looked at
    frame = list_probe(table)                               # long: layer, place, novelty, digit, accuracy, low, high

Tens and ones are classifiers of their own, so that a value the probe never saw can still be read; `joint` asks for
both. Fitted on units of the train split, strength chosen on the validation split (on a tenth of the train units where
the validation units are reported on), reported on units it never saw.
Shapes: N prompts, P places, L hidden states (0 is the embeddings), D hidden size, C classes.
"""

import random
import re
from dataclasses import dataclass

import numpy as np
import torch

from bridgekit.model.generation import pad_ids
from bridgekit.model.pair import LanguageModel
from bridgekit.results.statistics import wilson
from bridgekit.tasks import CUE, Example, source_prompt, units

PLACES = ("word end", "next token", "last token")
DIGITS = ("tens", "ones", "joint")
NOVELTIES = ("held_unit", "held_value", "not taught")  # the last is the control: units the model knows nothing of
FIT, CHOOSE = "fit", "choose"
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the ridge, as a share of the features' mean variance


@dataclass(frozen=True)
class Asked:
    """A prompt, the unit's word in its question, and the unit's value."""

    text: str
    word: str
    value: int


def probe_pair(
    lm: LanguageModel, lexicon, role: str = "source", *, report: str = "test", prompts_per_unit: int = 2,
    layers: tuple[int, ...] | None = None, seed: int = 0,
) -> dict[int, dict[str, dict[str, dict]]]:  # fmt: skip
    """{layer: {place: {novelty: {tens, ones, joint: share right, n: units}}}}, on the units of split `report`."""
    fit, choose, report_on = pick_probe_units(lexicon, role, report, seed)
    rng = random.Random(f"probe {seed}")
    parts = {FIT: fit * prompts_per_unit, CHOOSE: choose, **report_on}
    return probe_prompts(lm, {name: ask_units(some, rng) for name, some in parts.items()}, layers)


def probe_prompts(
    lm: LanguageModel, parts: dict[str, list[Asked]], layers: tuple[int, ...] | None = None
) -> dict[int, dict[str, dict[str, dict]]]:
    """Fit on part FIT, choose the strength on part CHOOSE, report on every other: {layer: {place: {part: shares}}}."""
    layers = tuple(range(lm.n_layers + 1)) if layers is None else layers
    states = {name: read_places(lm, some, layers) for name, some in parts.items()}  # (N, P, L, D) each
    values = {name: torch.tensor([a.value for a in some]) for name, some in parts.items()}
    table: dict[int, dict] = {}
    for j, layer in enumerate(layers):
        table[layer] = {}
        for p, place in enumerate(PLACES):
            here = {name: x[:, p, j] for name, x in states.items()}
            probe = DigitProbe(here.pop(FIT), values[FIT], here.pop(CHOOSE), values[CHOOSE])
            table[layer][place] = {name: probe.score(x, values[name]) for name, x in here.items()}
    return table


def pick_probe_units(lexicon, role: str, report: str, seed: int) -> tuple[list, list, dict[str, list]]:
    """Units to fit on, to choose the strength on, and to report on by novelty; no unit is in two of them."""
    known = units.known_units(lexicon, role)
    taught = {u.word for u in known}
    fit = [u for u in known if u.split == "train"]
    choose = [u for u in known if u.split == "val"]
    control = [u for u in lexicon if u.word not in taught and u.split == report]
    if report not in ("val", "test"):
        raise ValueError(f"probe: units are reported on `val` or `test`, not on '{report}'")
    report_on = {n: [u for u in known if u.split == report and u.novelty == n] for n in NOVELTIES[:2]}
    if report == "val":  # then a tenth of the train units choose
        fit, choose = [u for i, u in enumerate(fit) if i % 10], fit[::10]
    return fit, choose, {k: v for k, v in (report_on | {"not taught": control}).items() if v}


def ask_units(some_units: list[units.Unit], rng: random.Random) -> list[Asked]:
    """One prompt for each unit, with its word."""
    questions = [units.make_problem(rng, rng.choice(units.FAMILIES), u.word).question for u in some_units]
    return [Asked(f"Question: {q}{CUE}", u.word, u.value) for q, u in zip(questions, some_units, strict=True)]


def ask_examples(examples: list[Example]) -> list[Asked]:
    """The source's own prompts of some examples, with whatever facts they give it."""
    return [Asked(source_prompt(e).text, e.unit, e.value) for e in examples]


def read_places(lm: LanguageModel, asked: list[Asked], layers: tuple[int, ...], batch_size: int = 256) -> torch.Tensor:
    """States at the unit word's last token, at the token after it and at the cue's last token. (N, P, L, D)"""
    out = torch.empty(len(asked), len(PLACES), len(layers), lm.hidden_size, device=lm.device)
    rows, places = locate_places(lm, asked)
    order = np.argsort([len(r) for r in rows], kind="stable")
    for i in range(0, len(order), batch_size):
        chunk = order[i : i + batch_size]
        ids, mask = pad_ids([rows[j] for j in chunk], lm.device)
        states = lm.hidden_states(ids, mask.long(), layers).float()  # (B, S, L, D)
        at = torch.tensor([places[j] for j in chunk], device=lm.device)  # (B, P)
        picked = states[torch.arange(len(chunk), device=lm.device)[:, None], at]
        out[torch.from_numpy(chunk).to(lm.device)] = picked
    return out


def locate_places(lm: LanguageModel, asked: list[Asked]) -> tuple[list[list[int]], list[tuple[int, int, int]]]:
    """Token ids of each prompt with BOS, and the three places in it; the word is looked for in the question."""
    encoded = lm.tokenizer([a.text for a in asked], add_special_tokens=False, return_offsets_mapping=True)
    rows, places = [], []
    for a, ids, offsets in zip(asked, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        stop = re.compile(rf"\b{re.escape(a.word)}\b").search(a.text, a.text.index("Question:")).end()
        last = max(i for i, (start, _) in enumerate(offsets) if start < stop) + len(lm.bos)
        rows.append(lm.bos + ids)
        places.append((last, last + 1, len(rows[-1]) - 1))
    return rows, places


class DigitProbe:
    """Two ridge classifiers on one-hot digits; the strength is the one with the best joint share on `choose`."""

    def __init__(self, x: torch.Tensor, values: torch.Tensor, choose_x: torch.Tensor, choose_values: torch.Tensor):
        """x (N, D), values (N,)"""
        self.mean = x.double().mean(0)
        self.scale = x.double().std(0).clamp(min=1e-9)
        fits = []
        for strength in STRENGTHS:
            self.weights = fit_ridge(self._normalise(x), one_hot_digits(values).to(x.device), strength)
            score = self.score(choose_x, choose_values)
            fits.append((score["joint"], score["tens"] + score["ones"], strength, self.weights))
        *_, self.strength, self.weights = max(fits, key=lambda f: f[:3])

    def _normalise(self, x: torch.Tensor) -> torch.Tensor:
        return (x.double() - self.mean) / self.scale

    def predict(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Most likely tens and ones digit. (N, D) -> (N,), (N,)"""
        x = self._normalise(x)
        scores = torch.cat([x, x.new_ones(len(x), 1)], 1) @ self.weights  # (N, 20)
        return scores[:, :10].argmax(1).cpu(), scores[:, 10:].argmax(1).cpu()

    def score(self, x: torch.Tensor, values: torch.Tensor) -> dict[str, float]:
        tens, ones = self.predict(x)
        right_tens, right_ones = tens == values // 10, ones == values % 10
        shares = dict(zip(DIGITS, (right_tens, right_ones, right_tens & right_ones), strict=True))
        return {name: right.double().mean().item() for name, right in shares.items()} | {"n": len(values)}


def one_hot_digits(values: torch.Tensor) -> torch.Tensor:
    """Both digits of each value, one-hot. (N,) -> (N, 20)"""
    hot = torch.nn.functional.one_hot
    return torch.cat([hot(values // 10, 10), hot(values % 10, 10)], 1).double()


def fit_ridge(x: torch.Tensor, y: torch.Tensor, strength: float) -> torch.Tensor:
    """Weights with a free intercept in the last row. x (N, D), y (N, C) -> (D + 1, C)"""
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    gram = x.T @ x
    penalty = torch.full((x.shape[1],), strength * len(x), dtype=x.dtype, device=x.device)
    penalty[-1] = 0.0
    return torch.linalg.solve(gram + penalty.diag(), x.T @ y)


def list_probe(table: dict[int, dict]):
    """One row per layer, place, novelty and digit, with Wilson's interval: each unit is asked once."""
    import pandas as pd

    rows = []
    for layer, by_place in table.items():
        for place, by_novelty in by_place.items():
            for novelty, shares in by_novelty.items():
                for digit in DIGITS:
                    low, high = wilson(round(shares[digit] * shares["n"]), shares["n"])
                    rows.append(dict(layer=layer, place=place, novelty=novelty, digit=digit,
                                     accuracy=shares[digit], low=low, high=high, n=shares["n"]))  # fmt: skip
    return pd.DataFrame(rows)
