"""Try a user's own producer on random states before a run is made, in a process of its own: that takes torch.

check_parts(config)           # in a process without torch; a run's child tries everything once more
python -m bridgekit.train.parts bridge.producer=my_bridge.py:MeanState     # what it starts
"""

import functools
import subprocess
import sys
from types import SimpleNamespace

from bridgekit.config import Config, ConfigError, format_override, load_config, to_flat
from bridgekit.keys import is_path
from bridgekit.tasks.extend import blame
from bridgekit.tasks.models import pick_layers
from bridgekit.train.plan import find_model

TOKENS = 5  # of the longer of two questions


def check_parts(config: Config) -> None:
    """Refuse a producer of the user's that fails, or makes tokens of another shape than the target takes."""
    if is_path(config.bridge.producer):
        given = {key: value for key, value in to_flat(config).items() if not key.startswith("run.")}  # seeds are alike
        try_apart(tuple(format_override(*item) for item in given.items()))


@functools.cache
def try_apart(overrides: tuple[str, ...]) -> None:
    """Try the producer of this configuration in a child, once."""
    command = [sys.executable, "-m", "bridgekit.train.parts", *overrides]
    tried = subprocess.run(command, capture_output=True, text=True, check=False)
    if tried.returncode == 2:
        raise ConfigError(tried.stderr.strip().splitlines()[-1])


def main(overrides: list[str]) -> int:
    """Make the producer and a message of random states; exit code 2 and one line where it cannot be used."""
    import torch

    from bridgekit.model.bridge import Bridge, load_part, try_producer
    from bridgekit.model.message import Injector

    config = load_config(overrides=overrides)
    keys = ("source_model", "target_model")[:: 1 if config.pair.direction == "forward" else -1]
    source, target = (find_model(key, getattr(config.pair, key)).shape for key in keys)
    if source is None or target is None:  # sizes that are not known here
        return 0
    torch.set_num_threads(1)
    try:
        layers = pick_layers(SimpleNamespace(n_layers=source.layers), config.bridge.source_layers)
        made, options = load_part(config, "producer")
        with blame("bridge.producer", made):
            producer = made(config.bridge, len(layers), source.hidden, target.hidden, **options)
        bridge = Bridge(producer, Injector(), config, len(layers) * source.hidden, 1.0)
        mask = torch.arange(TOKENS) < torch.tensor([[TOKENS], [TOKENS - 2]])
        states = torch.randn(2, TOKENS, len(layers), source.hidden) * mask[..., None, None]
        k = TOKENS if config.bridge.n_soft_tokens == -1 else config.bridge.n_soft_tokens
        try_producer(bridge, states, mask, (2, k, target.hidden))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
