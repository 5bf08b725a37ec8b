"""Open a finished run: its configuration, the pair it was trained on, its bridges and its test problems.

    opened = open_finished("preserved_data/headline_resampler_seed1")  # checks the run, and the pair it is opened with
    examples = opened.pick("source_only", 200)
    tokens, mask = opened.encode(examples)

Nothing is trained and the run folder is never written to. Every message is made as evaluation makes it, through
`Evaluator` and the bridge contract, whichever bridge it is.
Shapes: B batch, N examples, K soft tokens, D_t hidden size of the target.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from bridgekit.config import Config, ConfigError
from bridgekit.model.bridge import Bridge, build_bridge, checkpoint_path, load_bridge
from bridgekit.model.message import Message
from bridgekit.model.pair import Pair, load_pair
from bridgekit.model.states import SourceStates
from bridgekit.runs import read_run_config, read_status
from bridgekit.tasks import Example, load_examples, units
from bridgekit.train.data import TrainingSet, TrainingTexts
from bridgekit.train.evaluator import Evaluator, sampler_seed
from bridgekit.train.trainer import variant

BATCH = 64


@dataclass
class Experiment:
    """A finished run with its pair and its bridges, in evaluation mode."""

    run: Path
    config: Config
    pair: Pair
    evaluator: Evaluator
    bridges: dict[str, Bridge]  # `bridged`, and `constant` where its checkpoint was kept
    test: list[Example]  # held-out problems; those about train units are left out

    @classmethod
    def load(cls, run: str | Path, source_model: str = "embedded", target_model: str = "embedded", device: str = "auto",
             pair: Pair | None = None) -> "Experiment":  # fmt: skip
        """A finished run with the pair it was trained on; anything else is refused in one line."""
        return open_finished(run, source_model, target_model, device, pair)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.evaluator.layers

    def source_states(self, examples: list[Example], condition: str = "bridged", cache_gb: float = 0) -> SourceStates:
        return self.evaluator.source_states(condition, examples, cache_gb)

    def decode_messages(self, condition: str, bridge: Bridge, examples, states, attention=None):
        return self.evaluator.decode_messages(condition, bridge, examples, states, attention)

    def pick(self, group: str | None, n: int) -> list[Example]:
        """The first `n` test problems of a group, as many units as possible before one is asked twice."""
        turns: dict[int, list[Example]] = {}
        asked: dict[str | None, int] = {}
        for e in self.test:
            if group is None or e.group == group:
                turn = asked[e.unit] = asked.get(e.unit, -1) + 1 if e.unit else 0
                turns.setdefault(turn, []).append(e)
        return [e for turn in sorted(turns) for e in turns[turn]][:n]

    @cached_property
    def lexicon(self) -> tuple:
        lexicon = units.make_lexicon(self.pair.lexicon_seed)
        return units.swap_roles(lexicon) if self.config.pair.direction == "swapped" else lexicon

    def training_set(self, examples: list[Example]) -> TrainingSet:
        """The examples as training would see them, in the prompt mode and at the length of evaluation."""
        whole = self.config.with_(train_prompt_mode="same", answer_tokens=0)
        states = self.evaluator.source_states("bridged", examples)
        return TrainingSet(TrainingTexts(whole, self.pair.target, examples), states)

    def seeds(self, examples: list[Example]) -> np.ndarray:
        return np.array([sampler_seed(self.config.run.seed, e.id) for e in examples])

    @torch.no_grad()
    def encode(self, examples: list[Example], name: str = "bridged") -> tuple[torch.Tensor, torch.Tensor]:
        """The messages' tokens and mask. -> (N, K, D_t), (N, K)"""
        states, seeds = self.evaluator.source_states("bridged", examples), self.seeds(examples)
        tokens, masks = [], []
        for chunk in chunks(len(examples)):
            message = encode_chunk(self.bridges[name], states, chunk, seeds, self.pair.target.device)
            tokens.append(message.tokens.float())
            masks.append(message.mask)
        width = max(t.shape[1] for t in tokens)
        pad = torch.nn.functional.pad
        tokens = torch.cat([pad(t, (0, 0, 0, width - t.shape[1])) for t in tokens])
        return tokens, torch.cat([pad(m, (0, width - m.shape[1])) for m in masks])


def chunks(n: int) -> list[np.ndarray]:
    return [np.arange(i, min(i + BATCH, n)) for i in range(0, n, BATCH)]


def encode_chunk(bridge: Bridge, states: SourceStates, chunk: np.ndarray, seeds: np.ndarray, device) -> Message:
    hidden, mask = states.batch(chunk, device)
    noise = torch.from_numpy(seeds[chunk]).to(device)
    return bridge.encode(hidden, mask, noise, alignment=states.alignment(chunk, device))


# ---- opening a run ------------------------------------------------------------------------------------------------


def open_finished(
    run: str | Path, source_model: str = "embedded", target_model: str = "embedded", device: str = "auto",
    pair: Pair | None = None,
) -> Experiment:  # fmt: skip
    """A finished run with the pair it was trained on; anything else is refused in one line.

    A kept run names the pair's folder on the machine that trained it, so the models are named here again; an empty
    name takes what the run's own config.yaml says. A `pair` that is loaded already is not loaded again.
    """
    run = Path(run)
    check_finished(run)
    config = read_run_config(run)
    given = {"source_model": source_model, "target_model": target_model}
    config = config.with_(
        **{k: v for k, v in given.items() if v}, source_device=device, target_device=device, dtype="auto"
    )
    pair = pair or load_pair(config)
    check_same_pair(run, pair)
    from accelerate import Accelerator

    evaluator = Evaluator(config, pair, Accelerator(cpu=pair.target.device.type == "cpu"), run)
    bridges = {"bridged": load_finished(run, "bridged", config, pair, evaluator)}
    if checkpoint_path(run, "constant").is_file():
        bridges["constant"] = load_finished(run, "constant", variant(config, "constant"), pair, evaluator)
    test = [e for e in load_examples(config, pair.lexicon_seed, "test") if e.novelty != "seen"]
    return Experiment(run, config, pair, evaluator, bridges, test)


def check_finished(run: Path) -> None:
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: no run here (config.yaml not found): name a folder of runs/ or preserved_data/ with a checkpoint"
        )
    state = read_status(run).get("state", "never started")
    if state != "finished":
        raise ConfigError(f"{run}: this run is not finished ({state}): let it end, or start it again, then look inside")
    if not checkpoint_path(run, "bridged").is_file():
        raise ConfigError(
            f"{run}: no checkpoint/bridged.safetensors: name a run that kept its bridge "
            "(`bridgekit preserve --max-checkpoint-mb` says how large one may be)"
        )


def check_same_pair(run: Path, pair: Pair) -> None:
    """The bridge fits these two models alone: with others of the same shape it would run, and mean nothing."""
    path = run / "provenance.json"
    try:
        known = json.loads(path.read_text())
        trained_on = {role: known[role] for role in ("source", "target")}
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{path}: does not say which pair the run was trained on: restore it from the run") from None
    for role, fingerprint in trained_on.items():
        here = getattr(pair, role)
        if here.fingerprint != fingerprint:
            raise ConfigError(
                f"{run}: trained on another {role} model ({fingerprint}; '{here.origin}' is {here.fingerprint}): give "
                f"the pair it was trained on as source_model and target_model"
            )


def load_finished(run: Path, name: str, config: Config, pair: Pair, evaluator: Evaluator) -> Bridge:
    bridge = build_bridge(config, len(evaluator.layers), pair.source.hidden_size, pair.target)
    try:
        load_bridge(bridge, run, name)
    except (RuntimeError, SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:160]
        raise ConfigError(
            f"{checkpoint_path(run, name)}: does not fit the run's config.yaml ({reason}): restore both, or name "
            "another run"
        ) from None
    return bridge.to(pair.target.device).eval().requires_grad_(False)
