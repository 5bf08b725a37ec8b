"""Any decoder of transformers: its parts are found by structure, not by one family's names.

    decoder = Decoder(model)     # layers, head(hidden), hidden_states(...), projections(layer); tryout.py tries them

Shapes: B batch, T tokens, L captured layers, D hidden size, V vocabulary, D_kv width of a layer's keys.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast

INNER = ("language_model", "text_model", "decoder")  # what a model for several kinds of input calls its decoder
ROW_BY_ROW = ("qkv_proj", "c_attn", "Wqkv")  # all queries, then all keys, then all values
HEAD_BY_HEAD = ("query_key_value",)  # each head's (or group's) queries, key and value


class Projection(NamedTuple):
    """Where keys or values leave a layer: a module, and which columns of its output they are (None: all)."""

    module: nn.Module
    columns: torch.Tensor | None
    width: int  # D_kv


class KnownOutput(MoeModelOutputWithPast):
    """A decoder's output of which only the hidden states are known."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class KnownStates(nn.Module):
    """Stands in a decoder's place and gives hidden states that are known; all else it has is the decoder's."""

    def __init__(self, decoder: nn.Module, hidden: torch.Tensor):
        super().__init__()
        self.decoder, self.output = [decoder], KnownOutput(last_hidden_state=hidden)  # in a list: not a part of it

    def forward(self, *args, **options) -> KnownOutput:
        return self.output

    def __getattr__(self, name: str):
        return getattr(self.__dict__["decoder"][0], name)


class Decoder:
    """The parts of a causal model that a bridge works on."""

    def __init__(self, model: nn.Module):
        self.model, self.config = model, model.config.get_text_config(decoder=True)
        self.above, self.name = model, find_child(model, (model.base_model_prefix, "model"))  # where the decoder is
        while inner := find_child(self.module, INNER):
            self.above, self.name = self.module, inner
        n = self.config.num_hidden_layers
        stacks = (m for m in self.module.modules() if isinstance(m, nn.ModuleList) and len(m) == n)
        self.layers: nn.ModuleList | None = next(stacks, None)

    @property
    def module(self) -> nn.Module:
        """Embeddings or ids to hidden states, without the head."""
        return getattr(self.above, self.name)

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own logits from its last hidden states: its own code after the decoder. (B, T, D) -> (B, T, V)"""
        decoder, ids = self.module, torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        self.above._modules[self.name] = KnownStates(decoder, hidden)
        try:
            return self.model(input_ids=ids, use_cache=False).logits
        finally:
            self.above._modules[self.name] = decoder

    @torch.no_grad()
    def hidden_states(self, layers: tuple[int, ...], **inputs) -> torch.Tensor:
        """States at `layers`: what a layer reads (0: the embeddings), the last one after the final norm.

        -> (B, T, L, D)"""
        found: dict[int, torch.Tensor] = {}

        def keep(index, module, args, options):
            found[index] = args[0] if args else options["hidden_states"]

        with ExitStack() as hooks:
            for index in set(layers) - {len(self.layers)}:
                hook = self.layers[index].register_forward_pre_hook(partial(keep, index), with_kwargs=True)
                hooks.callback(hook.remove)
            found[len(self.layers)] = self.module(**inputs, use_cache=False).last_hidden_state
        here = found[len(self.layers)].device  # a model's layers may be on several
        return torch.stack([found[i].to(here) for i in layers], dim=2)

    def projections(self, index: int) -> tuple[Projection, Projection] | None:
        """Of a layer: where its keys and its values come from; None where that is not known."""
        parts = {name.split(".")[-1]: m for name, m in self.layers[index].named_modules() if count_outputs(m)}
        if {"k_proj", "v_proj"} <= parts.keys():
            return tuple(Projection(parts[n], None, count_outputs(parts[n])) for n in ("k_proj", "v_proj"))
        for name in (*ROW_BY_ROW, *HEAD_BY_HEAD):
            if name in parts:
                columns = self.split_columns(name, count_outputs(parts[name]))
                return tuple(Projection(parts[name], c, len(c)) for c in columns)
        return None

    def split_columns(self, name: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns of keys and of values in the output of one projection for queries, keys and values."""
        config, heads = self.config, self.config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        shared = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
        if name in HEAD_BY_HEAD or shared:
            groups = 1 if shared else getattr(config, "num_kv_heads", None) or heads
            grouped = torch.arange(n).view(groups, -1, size)  # each group: its queries, one key, one value
            return grouped[:, -2].flatten(), grouped[:, -1].flatten()
        width = size * (getattr(config, "num_key_value_heads", None) or heads)
        return torch.arange(n - 2 * width, n - width), torch.arange(n - width, n)


def find_child(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of these names under which the module has a module of its own."""
    return next((name for name in names if isinstance(getattr(module, name, None), nn.Module)), None)


def count_outputs(module: nn.Module) -> int | None:
    """Columns that a linear map gives; GPT-2 has a kind of its own."""
    return getattr(module, "out_features", None) or getattr(module, "nf", None)


@contextmanager
def add_to(projection: Projection, change) -> Iterator[None]:
    """For as long as the context is open, `change(own)` (B, T, D_kv) is added to a projection's keys or values."""

    def hook(module, inputs, output):
        if projection.columns is None:
            update = change(output)
            return output if update is None else output + update
        columns = projection.columns.to(output.device)
        update = change(output.index_select(-1, columns))
        return output if update is None else output.index_add(-1, columns, update.to(output.dtype))

    handle = projection.module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
