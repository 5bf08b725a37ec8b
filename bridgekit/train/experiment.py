"""One object that holds an experiment: pair, task, examples, states and bridges; what everything else is called with.

    experiment = Experiment(load_config("parameters/phase1.yaml"))            # in a notebook: nothing is written
    example = experiment.examples("val")[0]
    bridge = experiment.build_bridge()
    loss = experiment.step_losses(bridge, experiment.batch(step=0))["loss"]
    experiment = Experiment.load("preserved_data/headline_resampler_seed1")    # a finished run, never written to
    experiment.ask("Hal has 9 lomom of pins. How many pins?")

Training and evaluation of a run (worker.py) use the same object with a run folder and an accelerator.
Shapes: B batch, N examples, S source tokens, L captured layers, K soft tokens, D_s and D_t hidden sizes.
"""

import json
import shutil
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed

from bridgekit.config import Config, ConfigError, dump_config, refuse_if
from bridgekit.model.bridge import (
    Bridge,
    build_bridge,
    checkpoint_path,
    describe_card,
    load_bridge,
    load_part,
    save_bridge,
)
from bridgekit.model.generation import Generated, evaluating
from bridgekit.model.message import Message
from bridgekit.model.pair import Pair, load_pair, split_prompts
from bridgekit.model.states import SourceStates, align_tokens, count_shared, read_source
from bridgekit.results.verdict import judge
from bridgekit.runs import load_jsonl, load_run_config, load_status, provenance, write_status, write_text_atomic
from bridgekit.tasks import Example, extend, get_task, source_prompt, units
from bridgekit.tasks.models import pick_layers
from bridgekit.train import objective, trainer
from bridgekit.train.baselines import Baselines
from bridgekit.train.conditions import (
    TABLE,
    Bridged,
    Choice,
    answer_row,
    decode_messages,
    evaluate,
    find_row,
    sampler_seed,
    tune_router,
)  # fmt: skip
from bridgekit.train.data import Batch, TrainingSet, TrainingTexts, step_batch
from bridgekit.train.processes import Processes

BATCH = 64  # messages made at once by `encode`


class Experiment:
    """A configuration with its pair; with a folder and an accelerator it is a run of one or several processes."""

    def __init__(self, config: Config, folder: str | Path | None = None, accelerator=None, pair: Pair | None = None):
        self.config, self.folder = config, Path(folder) if folder else None
        self.processes = Processes(accelerator)
        self.pair = pair or load_pair(config, accelerator.device if accelerator else None)
        self.device = self.pair.target.device  # where every bridge lives
        self.layers = pick_layers(self.pair.source, config.bridge.source_layers)
        self.self_layers = pick_layers(self.pair.target, "auto")
        self.code_dir = self.folder / "code" if self.folder and (self.folder / "code").is_dir() else None
        self.task = get_task(config, self.code_dir)
        self.bridges: dict[str, Bridge] = {}
        self.router_threshold: float | None = None
        self.seconds_spent: dict[str, float] = {}  # by stage
        self.started = time.time()
        name = f"{self.pair.source.fingerprint}_{self.pair.target.fingerprint}".replace("/", "-")
        shared = Path(config.run.cache_dir) / f"baselines_{name}.jsonl" if accelerator else None
        self.baselines = Baselines(self.task, config.eval.max_new_tokens, config.eval.eval_batch_size, shared)
        self._examples: dict[tuple, list[Example]] = {}
        self._texts: dict[float, TrainingTexts] = {}
        self._configs: dict[str, Config] = {}

    @property
    def run(self) -> Path | None:
        return self.folder

    # ---- the questions ----------------------------------------------------------------------------------------------

    def examples(self, split: str, share: float | None = None) -> list[Example]:
        """Problems of `train`, `val` or `test`; `share`: of source-only ones in training, where not the config's."""
        if (split, share) not in self._examples:
            made = self.task.examples(self.config, self.pair.lexicon_seed, split, share)
            self._examples[split, share] = made
        return self._examples[split, share]

    @cached_property
    def test(self) -> list[Example]:
        """Held-out test problems: those about train units are left out."""
        return [e for e in self.examples("test") if e.novelty != "seen"]

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

    def seeds(self, examples: list[Example]) -> np.ndarray:
        """The sampler's seed of each example. (N,)"""
        return np.array([sampler_seed(self.config.run.seed, e.id) for e in examples])

    # ---- states and bridges -----------------------------------------------------------------------------------------

    def config_of(self, name: str) -> Config:
        """The configuration of a bridge: the experiment's own, or that of a control."""
        base = name.split(".")[0]
        if base not in self._configs:
            self._configs[base] = trainer.control_config(self.config, base)
        return self._configs[base]

    def source_states(self, examples: list[Example], condition: str = "bridged", cache_gb: float = 0) -> SourceStates:
        """What a bridge reads of these examples, in training and evaluation alike; kept if it fits into `cache_gb`.

        That is the target's own states for `self_bridge`, else the source's."""
        pair, settings = self.pair, self.config_of(condition).bridge
        lm, view, layers = pair.source, settings.source_view, self.layers
        if condition.split(".")[0] == "self_bridge":  # the target may read only what it can read anyway
            lm, layers, view = pair.target, self.self_layers, "question" if view == "question" else "prompt"
            examples = [replace(e, facts="") for e in examples]
        solutions = {}
        if view == "solution":
            texts = self.baselines.answer(lm, [source_prompt(e) for e in examples])
            solutions = {e.id: g.text for e, g in zip(examples, texts, strict=True)}
        aligned = load_part(self.config, "injector", self.code_dir)[0].aligned
        spans = align_tokens(lm, pair.target, examples) if aligned else None
        rows = read_source(lm, examples, view, solutions)
        # A constant looks at nothing: it gets one token per prompt, and the source hardly runs.
        if settings.producer == "constant" and settings.n_soft_tokens != -1:
            rows, view = [row[:1] for row in rows], "facts"
        first = split_prompts(lm, [source_prompt(e) for e in examples[:1]])
        n_shared = 0 if view == "facts" else count_shared(lm, first)
        return SourceStates(lm, rows, layers, cache_gb, spans, n_shared, view != "question")

    def build_bridge(self, name: str = "bridged") -> Bridge:
        """A fresh bridge on the target's device, with the initial weights that the run's seed gives."""
        is_self = name.split(".")[0] == "self_bridge"
        layers, lm = (self.self_layers, self.pair.target) if is_self else (self.layers, self.pair.source)
        set_seed(self.config.run.seed)
        return build_bridge(self.config_of(name), len(layers), lm.hidden_size, self.pair.target, self.code_dir)

    def find_bridge(self, bridge: str | Bridge) -> tuple[str, Bridge]:
        """One of the bridges by its name, or any other, which reads what `bridged` reads."""
        return (bridge, self.bridges[bridge]) if isinstance(bridge, str) else ("bridged", bridge)

    @torch.no_grad()
    def encode(self, examples: list[Example], bridge: str | Bridge = "bridged") -> tuple[torch.Tensor, torch.Tensor]:
        """The messages' tokens and mask. -> (N, K, D_t), (N, K)"""
        named = examples and all(isinstance(e, Example) for e in examples)
        refuse_if(not named, "encode: give Examples: experiment.test[:8], or from_jsonl(...)")
        name, bridge = self.find_bridge(bridge)
        states, seeds = self.source_states(examples, name), self.seeds(examples)
        with evaluating(bridge):
            made = [encode_chunk(bridge, states, chunk, seeds, self.device) for chunk in chunks(len(examples))]
        width, pad = max(m.tokens.shape[1] for m in made), torch.nn.functional.pad
        tokens = torch.cat([pad(m.tokens.float(), (0, 0, 0, width - m.tokens.shape[1])) for m in made])
        return tokens, torch.cat([pad(m.mask, (0, width - m.mask.shape[1])) for m in made])

    # ---- training ---------------------------------------------------------------------------------------------------

    def training_data(self, name: str = "bridged") -> TrainingSet:
        """What a bridge or control is trained on: texts and states of the training examples of its mix."""
        config = self.config_of(name)
        share = config.task.source_only_share
        examples = self.examples("train", share)
        if share not in self._texts:
            self._texts[share] = TrainingTexts(config, self.pair.target, examples, self.task.marker)
        if config.loss.kl_weight and self.device.type == "cuda":
            self._texts[share].teach(self.pair.target, config.train.cache_states_gb)
        return TrainingSet(self._texts[share], self.source_states(examples, name, config.train.cache_states_gb))

    def forget_data(self) -> None:
        """Free what was kept for trainings: the test needs the room."""
        self._texts.clear()

    def training_set(self, examples: list[Example]) -> TrainingSet:
        """Any examples as training would see them, in the prompt mode and at the length of evaluation."""
        whole = self.config.with_(train_prompt_mode="same", answer_tokens=0)
        return TrainingSet(
            TrainingTexts(whole, self.pair.target, examples, self.task.marker), self.source_states(examples)
        )

    @cached_property
    def _data(self) -> TrainingSet:
        return self.training_data()

    def batch(self, step: int) -> Batch:
        """The examples of a training step, as tensors."""
        return step_batch(self.config, self._data, step, self.processes.rank, self.processes.world)

    def step_losses(
        self, bridge: Bridge, batch: Batch, step: int = 0, name: str = "bridged", decodes: bool = True
    ) -> dict[str, torch.Tensor]:
        """The mean of each loss that is due, and their weighted sum as `loss`, which has the gradient."""
        totals = objective.step_losses(self, bridge, batch, step, name, decodes)
        means = objective.mean_losses(totals, self.processes)
        return means | {"loss": objective.weigh(self.config_of(name), means)}

    @cached_property
    def extra_loss(self):
        """The user's own loss (`loss.extra`), or None."""
        if not self.config.loss.extra_weight:
            return None
        loss, options = extend.load_checked(self.config, "loss.extra", self.code_dir)
        return objective.wrap_extra_loss(loss, options)

    # ---- answering --------------------------------------------------------------------------------------------------

    def answer(self, condition, examples: list[Example], bridges: dict[str, Bridge] | None = None) -> list[Generated]:
        """What a condition, by its name or as a row of the table, answers to each example."""
        row = find_row(condition) if isinstance(condition, str) else condition
        bridges = self.bridges if bridges is None else bridges
        if isinstance(row, Choice) and self.router_threshold is None:
            file = self.folder / "headroom.jsonl" if self.folder else None
            known = list(load_jsonl(file)) if file and file.exists() else None
            self.router_threshold = tune_router(
                known or self.evaluate(self.examples("val"), {}, None, ("source", "target"))
            )
        if isinstance(row, Bridged) and row.bridge not in bridges and self.folder:
            bridges = {row.bridge: self._load_bridge(row.bridge)}
        return answer_row(self, row, examples, bridges)

    def ask(self, question: str, bridge: Bridge | None = None, names=("source", "target", "bridged"), **fields):
        """A question of one's own, answered side by side. -> DataFrame with condition, answer (in one line), extracted

        `fields` are further fields of the Example, such as `facts` that only the source reads."""
        import pandas as pd

        is_text = isinstance(question, str) and question.strip()
        refuse_if(not is_text, "ask: give one question as a text; for many: from_jsonl(...) and `answer`")
        shots = self.examples("val")[0].shots
        fields = dict(id="asked", split="asked", solution="", gold="", shots=shots) | fields
        example = Example(question=question, **fields)
        bridges = {"bridged": bridge} if bridge else self.bridges
        names = [n for n in names if n in bridges or not isinstance(find_row(n), Bridged)]
        texts = {n: self.answer(n, [example], bridges)[0].text for n in names}
        rows = [
            {"condition": n, "answer": " ".join(t.split()), "extracted": self.task.extract(t)} for n, t in texts.items()
        ]
        return pd.DataFrame(rows)

    def evaluate(self, examples, bridges=None, step=None, conditions=None, **options) -> list[dict]:
        """A row per example; written into the run folder only with a `step`. `conditions`: names, or rows by name."""
        conditions = self.config.eval.conditions if conditions is None else conditions
        return evaluate(self, examples, self.bridges if bridges is None else bridges, step, conditions, **options)

    def decode_messages(self, condition: str, bridge: Bridge, examples, states: SourceStates, attention=None):
        """The target's answers with messages of given states, treated as the condition treats them."""
        change = getattr(TABLE.get(condition), "change", None)
        return decode_messages(self, bridge, examples, states, change, attention)

    # ---- a run's records --------------------------------------------------------------------------------------------

    def report(self, stage: str, **status) -> None:
        """What a watcher of the run sees."""
        if self.folder and self.processes.is_first:
            status |= {"elapsed": round(time.time() - self.started, 1)}
            if self.device.type == "cuda":  # of this process; the other processes' GPUs hold about as much
                status["gpu_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 1)
            write_status(self.folder, state="running", stage=stage, **status)

    def log(self, text: str) -> None:
        if self.processes.is_first:
            print(text, flush=True)

    def spend(self, stage: str, since: float) -> None:
        self.seconds_spent[stage] = self.seconds_spent.get(stage, 0) + time.time() - since

    def provenance(self) -> dict:
        """Where the numbers come from: code, versions, machine, and which two models."""
        devices = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return provenance(self.config) | {
            "gpus": sorted(devices), "processes": self.processes.world, "dtype": str(self.pair.target.dtype),
            "source": self.pair.source.fingerprint, "target": self.pair.target.fingerprint,
            "lexicon_seed": self.pair.lexicon_seed,
        }  # fmt: skip

    # ---- finished runs ----------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls, run: str | Path, source_model: str = "", target_model: str = "", device: str = "auto",
        pair: Pair | None = None, trust_code: bool = False,
    ) -> "Experiment":  # fmt: skip
        """A finished run with the pair it was trained on and its bridges; anything else is refused in one line.

        A kept run may name its pair's folder on another machine: then give the two models here. A run with a folder
        code/ holds a user's own Python and is opened only with `trust_code`."""
        run = Path(run)
        check_finished(run)
        extend.check_trust(run, trust_code)
        models = {k: v for k, v in (("source_model", source_model), ("target_model", target_model)) if v}
        config = load_run_config(run).with_(**models, source_device=device, target_device=device, dtype="auto")
        pair = pair or load_pair(config)
        check_same_pair(run, pair)
        experiment = cls(config, run, pair=pair)
        for name in ("bridged", "constant"):
            if checkpoint_path(run, name).is_file():
                experiment.bridges[name] = experiment._load_bridge(name)
        return experiment

    def _load_bridge(self, name: str) -> Bridge:
        """A bridge with its kept weights, in evaluation mode."""
        bridge = self.build_bridge(name)
        bridge.metadata = load_bridge(bridge, self.folder, name)
        return bridge.eval().requires_grad_(False)

    def export(self, out: str | Path) -> Path:
        """A folder with the trained bridge and all that `Experiment.load(out)` needs on another machine."""
        out = Path(out)
        if out.exists() and any(out.iterdir()):
            raise ConfigError(f"{out}: not empty: name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        run = self.folder or out  # a bridge trained in a notebook has no run folder, and no records yet
        bridge, record, outcome = self.bridges["bridged"], self.provenance(), ""
        if (run / "provenance.json").is_file():
            record = json.loads((run / "provenance.json").read_text())
        if (run / "verdict.json").is_file():  # by the rule of today, whatever it was judged by then
            judged = judge([run])
            outcome = "; ".join([judged.outcome, *(f"not run: {name}" for name in judged.not_run)])
        if self.code_dir:
            shutil.copytree(self.code_dir, out / "code")
        save_bridge(bridge, out, "bridged", {"step": bridge.metadata.get("step", "unknown")})
        write_text_atomic(out / "config.yaml", dump_config(self.config))
        write_text_atomic(out / "provenance.json", json.dumps(record, indent=1) + "\n")
        card = describe_card(bridge, self.config, self.pair, self.layers, bridge.metadata, outcome)
        write_text_atomic(out / "CARD.md", card)
        write_status(out, state="finished", stage="exported", parameters=bridge.n_parameters)
        return out


def chunks(n: int) -> list[np.ndarray]:
    return [np.arange(i, min(i + BATCH, n)) for i in range(0, n, BATCH)]


def encode_chunk(
    bridge: Bridge, states: SourceStates, chunk: np.ndarray, seeds: np.ndarray, device, want_attention: bool = False
) -> Message:
    """The messages of some examples, each with its own sampler noise."""
    hidden, mask = states.batch(chunk, device)
    noise = torch.from_numpy(seeds[chunk]).to(device)
    alignment = states.alignment(chunk, device)
    return bridge.encode(hidden, mask, noise, alignment=alignment, want_attention=want_attention)


def check_finished(run: Path) -> None:
    if not (run / "config.yaml").is_file():
        raise ConfigError(
            f"{run}: no run here (config.yaml not found): name a folder of runs/ or preserved_data/ with a checkpoint"
        )
    state = load_status(run).get("state", "never started")
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
        model = getattr(pair, role)
        if model.fingerprint != fingerprint:
            raise ConfigError(
                f"{run}: trained on another {role} model ({fingerprint}; '{model.origin}' is {model.fingerprint}): "
                "give the pair it was trained on as source_model and target_model"
            )
