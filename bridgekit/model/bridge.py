"""Every bridge behind one interface: producer x injector."""

from bridgekit.config import Config
from bridgekit.model.constant import Constant
from bridgekit.model.dit import DiT
from bridgekit.model.injectors import CacheFusion, Prefix, PrefixAndResidual, Residual
from bridgekit.model.message import Bridge, Message
from bridgekit.model.resampler import Resampler

__all__ = ["Bridge", "Message", "build_bridge"]

PRODUCERS = {"resampler": Resampler, "dit": DiT, "constant": Constant}
INJECTORS = {"prefix": Prefix, "residual": Residual, "prefix+residual": PrefixAndResidual, "kv": CacheFusion}


def build_bridge(config: Config, n_layers: int, source_dim: int, target) -> Bridge:
    """A fresh bridge from `n_layers` captured layers of width `source_dim` to a target LanguageModel."""
    producer = PRODUCERS[config.bridge.producer](config.bridge, n_layers, source_dim, target.hidden_size)
    rms = target.embedding_rms if config.bridge.rms_match else None
    projection = config.bridge.source_projection and config.bridge.producer != "constant"
    injector = INJECTORS[config.bridge.injector](config.bridge, target)
    return Bridge(producer, injector, n_layers * source_dim, projection, rms)
