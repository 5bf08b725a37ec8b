"""From examples to tensors: tokenized once; the batch of a step is a pure function of (seed, step, slot).

    texts = TrainingTexts(config, pair.target, examples)
    batch = step_batch(config, TrainingSet(texts, states), step)     # all slots of the step's global batch

Shapes: B batch, S source tokens, L captured layers, D_s source hidden size, A answer tokens.
"""

from dataclasses import dataclass

import numpy as np
import torch

from bridgekit.config import Config, refuse_if
from bridgekit.model.attention import LEAST, Shared, share_rows
from bridgekit.model.generation import answer_states
from bridgekit.model.pair import LanguageModel, Pieces, format_prompts, split_prompts
from bridgekit.model.states import FlatStates, Ragged, SourceStates, count_shared, in_parts
from bridgekit.tasks import Example, Prompt, literal_prompt
from bridgekit.train.notes import note_facts


def indices_at(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The examples of a step, a function of (seed, step) alone: resuming and other process counts follow."""
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {e: np.random.default_rng([seed, int(e)]).permutation(n) for e in np.unique(places // n)}
    return np.array([orders[p // n][p % n] for p in places])


def deal(seed: int, step: int, batch_size: int, lengths: np.ndarray, window: int) -> np.ndarray:
    """The examples of a step; of `window` steps together those of like length go into one step, whose place is drawn.

    Every example is read as often as without."""
    drawn = indices_at(seed, step // window, batch_size * window, len(lengths))
    if window == 1:
        return drawn
    batches = drawn[np.argsort(lengths[drawn], kind="stable")].reshape(window, batch_size)
    return batches[np.random.default_rng([seed, step // window, 78]).permutation(window)[step % window]]


def noise_seeds(seed: int, step: int, batch_size: int) -> np.ndarray:
    """Sampler seeds of a step's slots."""
    return np.random.default_rng([seed, step, 77]).integers(0, 2**31, batch_size)


@dataclass
class Batch:
    """What one training step reads; an (ids, mask) pair is padded at the right end."""

    states: torch.Tensor  # (B, S, L, D_s)
    mask: torch.Tensor  # (B, S)
    seeds: torch.Tensor  # (B,) of the sampler's noise and of dropout
    slots: torch.Tensor  # (B,) places in the step's global batch
    alignment: torch.Tensor | None  # (B, P, 2), for an injector that needs it
    before: tuple[torch.Tensor, torch.Tensor]  # the target's text before the soft tokens
    after: tuple[torch.Tensor, torch.Tensor]  # and after them, without the answer
    literal: tuple[torch.Tensor, torch.Tensor]  # the whole literal prompt
    asked: tuple[torch.Tensor, torch.Tensor]  # what of it comes after the shared start, for the KL teacher
    labels: torch.Tensor  # (B, A), the answer with its end token
    labels_mask: torch.Tensor  # (B, A)
    marker: torch.Tensor  # (B, A), True on the tokens of `####`
    final: tuple[torch.Tensor, torch.Tensor]  # the answer's last line, from `####` on, with its end token
    widths: tuple[int, int]  # of the longest question-like and answer-like rows of the step's global batch
    shared: Shared | None = None  # what stands in front of every `before`
    shared_asked: Shared | None = None  # and of every `asked`
    noted: tuple[torch.Tensor, ...] | None = None  # the teacher's note of the facts: ids, mask, and soft tokens (B, P)
    taught: torch.Tensor | None = None  # (B, A, D), the target's own last states on the labels, where they are kept


class TrainingTexts:
    """What the target reads of all training examples, tokenized; shared by a bridge and its controls."""

    def __init__(self, config: Config, target: LanguageModel, examples: list[Example], marker: str = "####"):
        mode = config.bridge.train_prompt_mode
        mode = config.bridge.prompt_mode if mode == "same" else mode
        prompts = [literal_prompt(e) for e in examples]
        pieces = split_prompts(target, prompts)
        self.shared, before, after = split_target(config, target, pieces, mode)
        answers, markers = tokenize_answers(
            target, prompts, [e.solution for e in examples], marker, [p.all for p in pieces]
        )
        nowhere = len if marker else lambda answer: 0  # an answer without marker is nothing but final
        finals = [a[m.index(1) if 1 in m else nowhere(a) :] for a, m in zip(answers, markers, strict=True)]
        first = config.loss.answer_tokens or None
        answers, markers = [a[:first] for a in answers], [m[:first] for m in markers]
        literal = [target.bos + p.all for p in pieces]
        self.shared_asked, asked = share_rows(target, literal, count_shared(target, pieces))
        rows = [before, after, literal, asked, answers, markers, finals]
        self.device, self.taught, self.noted = target.device, None, None
        if config.bridge.teacher == "facts":
            noted = note_facts(target, examples, config.bridge.n_soft_tokens)
            self.noted = [Ragged([[pair[i] for pair in row] for row in noted], target.device) for i in (0, 1)]
        ragged = (Ragged(r, target.device) for r in rows)
        self.before, self.after, self.literal, self.asked, self.answers, self.markers, self.finals = ragged

    @torch.no_grad()
    def teach(self, target: LanguageModel, gb: float) -> None:
        """Keep the last states that the target alone has on every answer, where they fit: its logits follow."""
        lengths, shape = self.answers.lengths, (target.hidden_size,)
        room = FlatStates.find_room(lengths, shape, target.dtype, target.device, gb)
        if self.taught is None and room:
            self.taught = FlatStates(lengths, shape, target.dtype, room)
            for part in in_parts(self.asked.lengths + lengths):
                asked, (labels, mask) = self.asked.take(part), self.answers.take(part)
                nothing = (asked[0][:, :0], asked[1][:, :0])
                states = answer_states(target, nothing, asked, None, labels, mask, self.shared_asked)
                self.taught.put(part, states, mask)


class TrainingSet:
    """Texts and source states of all training examples; `batch` gathers what a step needs."""

    def __init__(self, texts: TrainingTexts, states: SourceStates):
        self.texts, self.states = texts, states

    def __len__(self) -> int:
        return len(self.texts.answers.lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Of each question and its answer."""
        return self.texts.asked.lengths + self.texts.answers.lengths

    def widths(self, indices: np.ndarray) -> tuple[int, int]:
        """The longest rows of some examples: of their questions, however they are cut, and of their answers."""
        texts, shared = self.texts, len(self.texts.shared_asked or ())
        parts = [self.states, texts.before, texts.after, texts.asked, *(texts.noted or [])]
        question = max(texts.literal.lengths[indices].max() - shared, *(p.lengths[indices].max() for p in parts))
        return int(question), int(texts.answers.lengths[indices].max())

    def batch(self, indices: np.ndarray, seeds: np.ndarray, slots=None, widths=None) -> Batch:
        """The examples at `indices` (B,), with their sampler seeds (B,) and slots (B,)."""
        texts, device = self.texts, self.texts.device
        states, mask = self.states.batch(indices, device)
        labels, labels_mask = texts.answers.take(indices)
        marker, _ = texts.markers.take(indices)
        slots = np.arange(len(indices)) if slots is None else slots
        return Batch(
            states, mask, torch.from_numpy(seeds).to(device), torch.from_numpy(slots).to(device),
            self.states.alignment(indices, device), texts.before.take(indices), texts.after.take(indices),
            texts.literal.take(indices), texts.asked.take(indices), labels, labels_mask, marker.bool() & labels_mask,
            texts.finals.take(indices), widths or self.widths(indices), texts.shared, texts.shared_asked,
            texts.noted and (*texts.noted[0].take(indices), texts.noted[1].take(indices)[0]),
            None if texts.taught is None else texts.taught.take(indices, device),
        )  # fmt: skip


def step_batch(config: Config, data: TrainingSet, step: int, rank: int = 0, world: int = 1) -> Batch:
    """The slots rank, rank + world, ... of the step's global batch: the first n slots are spread over all processes."""
    size, seed = config.train.batch_size, config.run.seed
    slots, indices = np.arange(size)[rank::world], deal(seed, step, size, data.lengths, config.train.sort_steps)
    return data.batch(indices[slots], noise_seeds(seed, step, size)[slots], slots, data.widths(indices))


def split_rows(lm: LanguageModel, pieces: list[Pieces], position: str, mode: str) -> tuple[list, list]:
    """Rows of token ids before and after the place where soft tokens go."""
    if mode == "soft_only":  # what is left of the text is the cue to answer
        return [lm.bos for _ in pieces], [p.cue for p in pieces]
    places = [{"start": 0, "question": len(p.prefix), "end": len(p.prefix + p.question)}[position] for p in pieces]
    rows = list(zip(pieces, places, strict=True))
    return [lm.bos + p.all[:n] for p, n in rows], [p.all[n:] for p, n in rows]


def split_target(config: Config, lm: LanguageModel, pieces: list[Pieces], mode: str):
    """What stands in front of all rows, and each row's ids before and after the place where soft tokens go.

    Few-shot examples are shared where no message acts on them: soft tokens stand behind, and other injectors begin at
    the question (`inject_from`)."""
    bridge, has_soft = config.bridge, config.bridge.injector not in ("residual", "kv")
    before, after = split_rows(lm, pieces, bridge.soft_position if has_soft else "question", mode)
    begins = bridge.inject_from == "question" or bridge.inject_from == "auto" and config.task.n_shots > 0
    n = count_shared(lm, pieces) if begins or bridge.injector == "prefix" else 0
    shared, own = share_rows(lm, before, min(n, *map(len, before)) if n else 0)
    refused = n >= LEAST and begins and bridge.injector != "prefix" and mode != "soft_only" and shared is None
    refuse_if(refused, f"bridge.inject_from: {lm.origin} cannot share its shots: set inject_from=prompt")
    return shared, own, after


def tokenize_answers(
    lm: LanguageModel, prompts: list[Prompt], solutions: list[str], marker: str = "####", known=None
) -> tuple[list[list[int]], list[list[int]]]:
    """Answer ids ending in the end token, and for each token whether it belongs to the last `marker`.

    `known`: the prompts' own ids."""
    encoded = lm.tokenize_after([p.text for p in format_prompts(lm, prompts)], solutions, known)
    answers, markers = [], []
    for text, ids, offsets in zip(solutions, *encoded, strict=True):
        start = text.rfind(marker) if marker else -1
        answers.append([*ids, lm.end_id])
        markers.append([int(start >= 0 and a < start + len(marker) and b > start) for a, b in offsets] + [0])
    return answers, markers
