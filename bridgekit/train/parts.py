"""Try a user's own parts and loss on random numbers: what `extend.check_parts` starts before a run is made.

    python -m bridgekit.train.parts bridge.producer=my_bridge.py:MeanState     # exit code 2: it cannot be used

The target is a random model of the real one's kind and sizes, which are read from its folder. Where it has none yet (a
model of the hub, `geometry:`) only a producer is tried.
"""

import sys
from types import SimpleNamespace

import torch

from bridgekit.config import Config, ConfigError, is_geometry, load_config, refuse_if
from bridgekit.keys import is_path
from bridgekit.model.bridge import Bridge, build_bridge, load_part, try_producer
from bridgekit.model.generation import bridged_logits
from bridgekit.model.geometry import make_stand_in
from bridgekit.model.message import Injector
from bridgekit.model.pair import LanguageModel
from bridgekit.tasks.extend import blame, load_checked
from bridgekit.tasks.models import pick_layers
from bridgekit.train.data import Batch
from bridgekit.train.objective import wrap_extra_loss
from bridgekit.train.plan import find_model

TOKENS = 5  # of the longer of two questions


def main(overrides: list[str]) -> int:
    """Make the user's parts and use them on random numbers; exit code 2 and one line where one cannot be used."""
    config = load_config(overrides=overrides)
    keys = ("source_model", "target_model")[:: 1 if config.pair.direction == "forward" else -1]
    (source, _, _, _), (target, folder, _, _) = (find_model(key, getattr(config.pair, key)) for key in keys)
    if source is None or target is None:  # sizes that are not known here
        return 0
    torch.set_num_threads(1)
    try:
        layers = pick_layers(SimpleNamespace(n_layers=source.layers), config.bridge.source_layers)
        mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 2]])
        states = torch.randn(2, TOKENS, len(layers), source.hidden) * mask[..., None, None]
        if folder and not is_geometry(getattr(config.pair, keys[1])):
            lm = LanguageModel(*make_stand_in(folder), "stand-in", "", config.pair.prompt_format)
            bridge = build_bridge(config, len(layers), source.hidden, lm)  # which tries its parts
            if is_path(config.loss.extra):
                try_loss(config, bridge, lm, states, mask)
        elif is_path(config.bridge.producer):
            made, options = load_part(config, "producer")
            with blame("bridge.producer", made):
                producer = made(config.bridge, len(layers), source.hidden, target.hidden, **options)
            k = TOKENS if config.bridge.n_soft_tokens == -1 else config.bridge.n_soft_tokens
            bridge = Bridge(producer, Injector(), config, len(layers) * source.hidden, 1.0)
            try_producer(bridge, states, mask, (2, k, target.hidden))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def try_loss(config: Config, bridge: Bridge, target: LanguageModel, states, mask) -> None:
    """Refuse a loss that fails on random states (2, S, L, D_s), or has no finite sum with a gradient. mask (2, S)"""
    row, seeds, places = (torch.tensor([target.sample[:TOKENS]] * 2), mask), mask.sum(1), torch.arange(TOKENS)
    alignment = torch.stack([places, places + 1], -1).expand(2, -1, -1)
    batch = Batch(
        states, mask, seeds, torch.arange(2), alignment, row, row, row, row, *row, mask, row, (TOKENS, TOKENS)
    )
    message = bridge.encode(states, mask, seeds, alignment=alignment, teacher=(target.embed(row[0]), mask))
    given = dict(logits=bridged_logits(target, bridge, message, row, row, *row), labels=row[0], labels_mask=mask)
    made, options = load_checked(config, "loss.extra")
    with blame("loss.extra", made) as what:
        parts = wrap_extra_loss(made, options)(message=message, batch=batch, target=target, **given)
        found = ", ".join(str(tuple(p.shape)) if isinstance(p, torch.Tensor) else type(p).__name__ for p in parts)
        refuse_if(found != "(), ()", f"{what} returned shapes {found}: wanted a scalar, or (sum, count), both scalars")
        refuse_if(not parts[0].isfinite(), f"{what} returned {parts[0].item()} on random numbers")
        refuse_if(not parts[0].requires_grad, f"{what} has no gradient: make it of `logits` or `message`")
        parts[0].backward()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
