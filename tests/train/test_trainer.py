"""Training: a step's losses, the best weights by each measure, and what cannot be learned from.

python -m pytest tests/train/test_trainer.py
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch

from bridgekit.config import CONTROLS, to_flat
from bridgekit.model import losses
from bridgekit.model.bridge import checkpoint_path
from bridgekit.model.generation import Generated, decode_bridged, unpad
from bridgekit.runs import load_jsonl
from bridgekit.tasks import load_examples
from bridgekit.tasks.answers import extract_answer
from bridgekit.train import objective, trainer
from bridgekit.train.objective import decode_loss, own_steps, step_losses
from bridgekit.train.trainer import BestWeights

NAMES = ("nll", "kl", "prompt", "info_nce", "format", "flow")


@pytest.fixture(scope="session")
def one_step(tiny, make_experiment, training_set, val):
    """A configuration's experiment with a bridge, three examples of unequal lengths, and the losses of one step."""

    def make(indices=(4, 0, 9), **changes):
        experiment = make_experiment(tiny(source_layers="1,2", **changes))
        bridge = experiment.build_bridge().eval()
        batch = training_set(experiment.config, val).batch(np.array(indices), np.arange(1, len(indices) + 1))
        return experiment, bridge, batch, step_losses(experiment, bridge, batch)

    return make


# -- the losses of one step -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, producer", [*((n, p) for n in NAMES[:-1] for p in ("resampler", "dit", "constant")), ("flow", "dit")]
)
def test_each_loss_alone_has_a_gradient_to_the_bridge(one_step, pair, name, producer):
    _, bridge, _, found = one_step(producer=producer, **{"nll_weight": 0.0, f"{name}_weight": 1.0})
    assert list(found) == [name]
    total, count = found[name]
    (total / count).backward()
    for part, p in bridge.named_parameters():
        gated = producer == "dit" and ".time." in f".{part}"  # opens with the first step, as the others move
        assert p.grad is not None and (gated or p.grad.abs().sum() > 0), f"{name}: nothing reaches {part}"
        assert p.grad.isfinite().all()
    assert all(p.grad is None for p in pair.target.model.parameters())


def test_a_loss_without_weight_is_not_computed(one_step):
    assert list(one_step()[3]) == ["nll"] and list(one_step(nll_weight=0.0, kl_weight=0.1)[3]) == ["kl"]


def plain_answer_logits(lm, parts: list[torch.Tensor], labels) -> torch.Tensor:
    """One example, nothing padded, through the model's own forward: the logits that predict its answer. (1, A, V)"""
    embeds = torch.cat([*parts, lm.embed(labels)])
    return lm.model(inputs_embeds=embeds[None], use_cache=False).logits[:, -len(labels) - 1 : -1]


def test_a_step_s_losses_are_those_of_its_examples_one_by_one(one_step, pair):
    """The whole of a training step against unpadded examples, in each of which one loss follows from its definition."""
    weights = dict(nll_weight=1.0, kl_weight=0.5, kl_tokens=6, format_weight=0.1, prompt_weight=0.2, info_nce_weight=1)
    experiment, bridge, batch, found = one_step(**weights, soft_position="end", n_soft_tokens=-1, teacher="prompt")
    lm, wanted, pooled, places = pair.target, {}, [], []
    with torch.no_grad():
        message = bridge.encode(batch.states, batch.mask, batch.seeds)
        for i in range(3):
            before, after, literal, labels = (
                ids[i][mask[i]]
                for ids, mask in (batch.before, batch.after, batch.literal, (batch.labels, batch.labels_mask))
            )
            soft, every = message.tokens[i][message.mask[i]], torch.ones(1, len(labels), dtype=torch.bool)
            student = plain_answer_logits(lm, [lm.embed(before), soft, lm.embed(after)], labels)
            alone = plain_answer_logits(lm, [lm.embed(literal)], labels)
            parts = {
                "nll": losses.answer_nll(student, labels[None], every),
                "format": losses.format_nll(student, labels[None], batch.marker[i : i + 1, : len(labels)]),
                "kl": losses.kl_slice(student, alone, every, 6),
            }
            wanted = {k: [*wanted.get(k, []), v] for k, v in parts.items()}
            pooled.append((soft.mean(0), lm.embed(literal).mean(0)))
            n = min(len(soft), len(literal))
            places.append((soft[:n], lm.embed(literal)[:n]))
        anchors, positives = (torch.stack(side) for side in zip(*pooled, strict=True))
        tokens, embeds = (torch.cat(side) for side in zip(*places, strict=True))
        wanted["info_nce"] = [losses.info_nce(anchors, positives, 0, experiment.config.loss.info_nce_temperature)]
        distance = (tokens - embeds).pow(2).mean(-1).sum() / embeds.pow(2).mean()
        wanted["prompt"] = [(distance, torch.tensor(len(embeds)))]
    assert set(found) == set(wanted)
    for name, (total, count) in found.items():
        assert count == sum(int(n) for _, n in wanted[name]), name
        assert total.item() == pytest.approx(sum(t.item() for t, _ in wanted[name]), rel=1e-4), name


def test_moving_labels_moves_every_answer_loss_and_padding_none(one_step):
    experiment, bridge, batch, found = one_step(nll_weight=1.0, kl_weight=1.0, format_weight=1.0)
    moved = step_losses(experiment, bridge, replace(batch, labels=batch.labels.roll(1, dims=1)))
    assert all(moved[k][0].item() != pytest.approx(found[k][0].item(), rel=1e-2) for k in found)
    longer = {k: torch.nn.functional.pad(getattr(batch, k), (0, 2)) for k in ("labels", "labels_mask", "marker")}
    for name, (total, count) in step_losses(experiment, bridge, replace(batch, **longer)).items():
        assert count == found[name][1] and total.item() == pytest.approx(found[name][0].item(), rel=1e-5), name


@pytest.mark.parametrize("teacher", ["answer", "prompt"])
def test_the_flow_goes_to_the_teacher_s_embeddings(one_step, pair, teacher):
    _, bridge, batch, found = one_step(producer="dit", flow_weight=1.0, teacher=teacher)
    ids, mask = (batch.labels, batch.labels_mask) if teacher == "answer" else batch.literal

    def error(embeds) -> float:
        return bridge.encode(batch.states, batch.mask, batch.seeds, teacher=(embeds, mask)).flow_error.sum().item()

    embeds = pair.target.embed(ids)
    assert found["flow"][0].item() == pytest.approx(error(embeds), rel=1e-4) and int(found["flow"][1]) == 3
    assert error(embeds.roll(1, dims=1)) != pytest.approx(found["flow"][0].item(), rel=1e-3)


def test_a_loss_of_one_s_own_is_given_what_it_names(one_step):
    def spread(message, labels, scale):
        return scale * message.tokens.var(dim=1).mean()

    experiment, bridge, batch, _ = one_step(nll_weight=1.0)
    own = replace_extra(experiment, spread, scale=2.0)
    total, count = step_losses(own, bridge, batch)["extra"]
    wanted = 2 * bridge.encode(batch.states, batch.mask, batch.seeds).tokens.var(dim=1).mean()
    assert total.item() / count == pytest.approx(wanted.item(), rel=1e-5)
    both = replace_extra(experiment, lambda **given: (given["logits"].sum(), torch.tensor(len(given))))
    assert step_losses(both, bridge, batch)["extra"][1] == 6


def replace_extra(experiment, loss, **options) -> SimpleNamespace:
    names = ("config_of", "pair", "processes", "task", "config")
    own = {name: getattr(experiment, name) for name in names}
    return SimpleNamespace(**own, extra_loss=objective.wrap_extra_loss(loss, options))


# -- decode-aware supervision -----------------------------------------------------------------------------------------

DECODE = dict(decode_weight=1.0, decode_every=2, decode_batch=4, decode_samples=3, decode_tokens=20)


def decoded(one_step, **changes):
    experiment, bridge, batch, _ = one_step(indices=range(6), **(DECODE | changes))
    return experiment, bridge, batch, bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment)


@pytest.mark.parametrize("estimator", ["own_steps", "policy_gradient"])
@pytest.mark.parametrize("injector, k", [("prefix", 4), ("residual", 4), ("kv", -1)])
def test_the_decode_loss_reaches_the_bridge(one_step, pair, training_set, estimator, injector, k):
    changes = dict(decode_estimator=estimator, injector=injector, n_soft_tokens=k, decode_tokens=60)
    experiment, bridge, _, _ = decoded(one_step, **changes)
    unknown = load_examples(experiment.config.with_(n_val=200), pair.lexicon_seed, "val")
    unknown = [e for e in unknown if e.group == "source_only"][:6]
    batch = training_set(experiment.config, unknown).batch(np.arange(6), np.arange(6))
    message = bridge.encode(batch.states, batch.mask, batch.seeds, alignment=batch.alignment)
    if estimator == "policy_gradient":  # the target guesses: call a guess right that it does not make each time
        rows = torch.arange(4).repeat_interleave(3)
        texts = [unpad(ids[rows], mask[rows]) for ids, mask in (batch.before, batch.after)]
        drawn = decode_bridged(
            pair.target, bridge, message.select(rows), *texts, 60, batch.seeds[rows] + torch.arange(12)
        )
        answers = [extract_answer(g.text) for g in drawn]
        guess = next(a for i, a in enumerate(answers) if len({*answers[i - i % 3 : i - i % 3 + 3]}) > 1)
        right = torch.tensor(pair.target.tokenize([f"#### {guess}"]))
        batch = replace(batch, final=(right.expand(6, -1), torch.ones(6, right.shape[1], dtype=torch.bool)))
    total, count = decode_loss(experiment, bridge, batch, message)
    assert count > 0 and math.isfinite(total.item())
    (total / count).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in bridge.parameters()), "no gradient"


def test_gold_answer_after_the_target_s_own_steps_by_hand(one_step, pair):
    """The mean over the questions' last lines, each after what the bridged target had said before its own marker."""
    experiment, bridge, batch, message = decoded(one_step)
    found, count = decode_loss(experiment, bridge, batch, message)
    wanted, n, lm = 0.0, 0, pair.target
    for i in range(4):
        one = message.select(torch.tensor([i]))
        before, after = batch.before[0][i][batch.before[1][i]], batch.after[0][i][batch.after[1][i]]
        steps = own_steps(lm, decode_bridged(lm, bridge, one, [before.tolist()], [after.tolist()], 20)[0])
        gold = batch.final[0][i][batch.final[1][i]]
        parts = [lm.embed(before), one.tokens[0], lm.embed(after), lm.embed(torch.tensor(steps, dtype=torch.long))]
        with torch.no_grad():
            scores = plain_answer_logits(lm, parts, gold)[0].log_softmax(-1)
        wanted -= scores.gather(1, gold[:, None]).sum().item()
        n += len(gold)
        assert lm.tokenizer.decode(gold, skip_special_tokens=True).startswith("####")
    assert count.item() == n and found.item() == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("estimator", ["own_steps", "policy_gradient"])
def test_the_decoded_questions_are_the_first_slots_however_they_are_dealt_out(one_step, estimator, pair, monkeypatch):
    """Each process decodes its own slots of the first four, and a sampled answer has the seed of its slot."""
    experiment, bridge, batch, message = decoded(one_step, decode_estimator=estimator)
    calls = []

    def watch(target, bridge, message, before, after, n, seeds=None, **options):
        calls.append(
            {
                (tuple(b + a), None if seeds is None else int(seeds[i]))
                for i, (b, a) in enumerate(zip(before, after, strict=True))
            }
        )
        return decode_bridged(target, bridge, message, before, after, n, seeds, **options)

    monkeypatch.setattr(objective, "decode_bridged", watch)
    decode_loss(experiment, bridge, batch, message)
    for rank in range(2):
        rows = torch.arange(rank, 6, 2)
        parts = {k: tuple(x[rows] for x in getattr(batch, k)) for k in ("before", "after", "final")}
        part = replace(batch, seeds=batch.seeds[rows], slots=batch.slots[rows], mask=batch.mask[rows], **parts)
        decode_loss(experiment, bridge, part, message.select(rows))
    assert len(calls[0]) == (4 if estimator == "own_steps" else 12)
    assert calls[1] | calls[2] == calls[0] and not calls[1] & calls[2]


def test_an_answer_is_not_right_where_the_gold_one_cannot_be_read(one_step, monkeypatch):
    experiment, bridge, batch, message = decoded(one_step, decode_estimator="policy_gradient")
    rewards = []
    monkeypatch.setattr(losses, "leave_one_out", lambda reward: rewards.append(reward) or reward)
    ids, mask = batch.final
    decode_loss(experiment, bridge, replace(batch, final=(ids[:, :0], mask[:, :0])), message)
    assert rewards[0].sum() == 0


def test_own_steps_end_before_the_marker(pair):
    ids = pair.target.tokenize(["<<3*4=12>>12 pins.\n#### 12"])[0]
    steps = own_steps(pair.target, Generated("", 0.0, len(ids), (*ids, *pair.target.eos_ids)))
    assert pair.target.tokenizer.decode(steps) == "<<3*4=12>>12 pins.\n"
    unfinished = pair.target.tokenize(["<<3*4=1"])[0]
    assert own_steps(pair.target, Generated("", 0.0, 3, tuple(unfinished))) == unfinished


# -- the best weights -------------------------------------------------------------------------------------------------


def offer_all(experiment, name: str, measured: list[tuple[float, float]]) -> BestWeights:
    """Accuracies on the mix and on source-only problems, as validation finds them in steps of one."""
    best, bridge = BestWeights(experiment, name), experiment.build_bridge(name)
    for step, (mix, only) in enumerate(measured):
        with torch.no_grad():
            next(bridge.parameters()).fill_(step)
        best.offer(bridge, step, {"mix": mix, "source_only": only})
    return best


def weights_at(experiment, name: str) -> float:
    with safetensors.safe_open(checkpoint_path(experiment.folder, name), "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).flatten()[0].item(), file.metadata()["step"]


def test_better_or_equal_is_kept_and_waiting_is_counted(tiny, make_experiment):
    experiment = make_experiment(tiny(steps=6, producer="constant"))
    found = []
    measured = [(a, 0.0) for a in (0.3, 0.5, 0.4, 0.5, 0.6, 0.1, 0.2)]
    for n in range(1, 8):
        best = offer_all(experiment, "bridged", measured[:n])
        found.append((weights_at(experiment, "bridged")[0], best.selections["mix"].step, best.waited))
    # An equal accuracy is taken, because later weights saw more; but it is no progress.
    assert found == [(0, 0, 0), (1, 1, 0), (1, 1, 1), (3, 3, 2), (4, 4, 0), (4, 4, 1), (4, 4, 2)]


def test_a_control_s_weights_come_from_its_second_half_by_three_measures(tiny, make_experiment):
    """On the mix doing nothing is best, so step 0 would win there: a control must be trained, and chosen fairly."""
    experiment = make_experiment(tiny(steps=6, controls=["constant"]))
    measured = [(0.9, 0.0), (0.8, 0.1), (0.8, 0.2), (0.7, 0.3), (0.5, 0.6), (0.5, 0.4), (0.4, 0.4)]
    best = offer_all(experiment, "constant", measured)
    assert {k: s.step for k, s in best.selections.items()} == {"mix": 3, "source_only": 4, "last": 6}
    assert best.waited == 3  # counted from half of the steps on
    bridges = best.load()
    assert list(bridges) == ["constant", "constant.source_only", "constant.last"]
    for name, step in zip(bridges, (3, 4, 6), strict=True):
        assert weights_at(experiment, name) == (step, str(step))
        assert next(bridges[name].parameters()).flatten()[0] == step
    text = (experiment.folder / "controls.json").read_text()
    assert '"constant"' in text and '"source_only": 4' in text


def test_a_selection_of_the_same_step_is_kept_once(tiny, make_experiment):
    experiment = make_experiment(tiny(steps=4, controls=["constant"]))
    assert list(offer_all(experiment, "constant", [(0.1, 0.1)] * 5).load()) == ["constant"]
    names = [p.stem for p in (experiment.folder / "checkpoint").iterdir()]
    assert names == ["constant"] and weights_at(experiment, "constant")[1] == "4"
    without_groups = [(0.5, -1.0), (0.4, -1.0), (0.6, -1.0), (0.2, -1.0), (0.1, -1.0)]
    best = offer_all(experiment, "constant", without_groups)
    assert list(best.load()) == ["constant", "constant.last"]
    assert '"source_only"' not in (experiment.folder / "controls.json").read_text()


def test_patience_stops_a_bridge_at_once_and_a_control_after_half_of_its_steps(tiny, make_experiment):
    changes = dict(steps=12, eval_every=1, lr=1e-12, patience=2, val_samples=6, max_new_tokens=4)
    experiment = make_experiment(tiny(**changes, controls=["constant"]))
    steps = {}
    for name, file in (("bridged", "metrics.jsonl"), ("constant", "metrics_constant.jsonl")):
        trainer.train_bridge(experiment, name)
        steps[name] = [m["step"] for m in load_jsonl(experiment.folder / file) if "eval" in m]
    assert steps == {"bridged": [0, 1, 2], "constant": [6, 7, 8]}  # not validated before half


# -- what is trained, and how fast ------------------------------------------------------------------------------------


def test_a_control_is_the_bridge_s_own_training_but_for_one_thing(tiny):
    config = tiny(producer="dit", flow_weight=0.1, info_nce_weight=0.2, source_only_share=0.6)
    changed = {
        name: {k for k, v in to_flat(trainer.control_config(config, name)).items() if v != to_flat(config)[k]}
        for name in CONTROLS
    }
    speak_of_the_source = {"loss.flow_weight", "loss.info_nce_weight"}
    assert changed["self_bridge"] == set()
    assert changed["constant"] == {"bridge.producer", *speak_of_the_source}
    assert changed["constant_natural"] == {"bridge.producer", "task.source_only_share", *speak_of_the_source}


@pytest.mark.parametrize("share", [0.75, -1.0])
def test_the_mix_of_the_training_data_is_the_one_asked_for(tiny, make_experiment, share):
    experiment = make_experiment(tiny(source_only_share=share, n_train=80))
    lm, asked = experiment.pair.target, {}
    for name in ("bridged", "constant", "constant_natural"):
        literal = experiment.training_data(name).texts.literal
        asked[name] = {lm.tokenizer.decode(i[m][1:]) for i, m in zip(literal.ids, literal.mask, strict=True)}
    wanted = {}
    for mix in (0.75, -1.0):
        examples = load_examples(experiment.config.with_(source_only_share=mix), experiment.pair.lexicon_seed, "train")
        wanted[mix] = {f"Question: {e.question}\nAnswer:\n" for e in examples}
        assert sum(e.group == "source_only" for e in examples) == (60 if mix == 0.75 else round(0.23 * 80))
    assert asked == {"bridged": wanted[share], "constant": wanted[share], "constant_natural": wanted[-1.0]}


def test_numbers_that_are_none_are_named_with_their_step_and_loss():
    window = [
        {"nll": torch.tensor(a), "kl": torch.tensor(b)} for a, b in ((1.0, 2.0), (1.0, math.nan), (math.nan, 1.0))
    ]
    with pytest.raises(RuntimeError, match="bridged: kl is nan at step 9: lower train.lr"):
        trainer.check_finite("bridged", 10, window, {"nll": math.nan, "kl": math.nan})
    trainer.check_finite("bridged", 10, [], {"nll": 1.0})


def test_the_rate_warms_up_and_decays(tiny):
    config = tiny(steps=30, warmup_steps=10)
    rates = [trainer.learning_rate(config, step) for step in range(31)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10:] == pytest.approx([(1 + math.cos(math.pi * i / 20)) / 2 for i in range(21)])
    assert trainer.learning_rate(tiny(steps=3, warmup_steps=10), 2) == 1.0  # a warm-up longer than the training


def test_summary_of_rows_counts_units_and_groups():
    rows = [
        {"group": g, "unit": u, "gold_extracted": "1", "bridged_extracted": b}
        for g, u, b in (("source_only", "a", "1"), ("source_only", "a", "2"), ("both", "b", "1"), ("both", "c", "1"))
    ]
    wanted = {"bridged": 0.75, "bridged_source_only": 0.5, "n": 4, "n_units": 3}
    assert trainer.summarise_rows(rows, ("bridged",)) == wanted
    for row in rows:
        row.update(group=None, unit=None, bridged_correct=True)  # the task's own score counts
    assert trainer.summarise_rows(rows, ("bridged",)) == {"bridged": 1.0, "n": 4, "n_units": 4}
