"""A decoder is tried on a few tokens when it is loaded, so that what would go wrong later is refused in one line.

try_decoder(decoder, ids, "pair.target_model: 'gpt9'")
keys, values = try_projections(decoder, layer, ids)      # None: this layer's cache cannot be fused
"""

import torch
from transformers import DynamicCache

from bridgekit.config import ConfigError, refuse_if
from bridgekit.model.adapter import Decoder, Projection, add_to

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}  # of the norm of what is compared


def check_alike(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise where two tensors differ by more than the rounding of their dtype."""
    error = ((found - wanted).float().norm() / wanted.float().norm()).item()
    if not error <= TOLERANCE[wanted.dtype]:
        raise ValueError(f"they differ by {error:.0%} of their size")


@torch.no_grad()
def try_decoder(decoder: Decoder, ids: list[int], what: str) -> None:
    """Refuse a decoder that does not behave as training and decoding take it to; `what` begins the message.

    The same few tokens are read as ids, as embeddings, padded on either side, and token by token with a cache."""
    model, module, n = decoder.model, decoder.module, len(ids)
    row = torch.tensor([ids], device=model.device)
    short, lengths = row[:, 2:], torch.tensor([[n], [n - 2]], device=model.device)
    refuse_if(decoder.layers is None, f"{what} has no list of layers that a bridge could work on")
    why = "has no embeddings that soft tokens could stand beside"
    try:
        embeds = model.get_input_embeddings()(row)
        assert embeds.shape[-1] == decoder.config.hidden_size, "its embeddings have another width than its layers"
        why = "gives logits that cannot be reproduced from its hidden states"
        hidden, logits = module(input_ids=row, use_cache=False).last_hidden_state, model(input_ids=row).logits
        check_alike(decoder.head(hidden), logits)
        why = "reads more of a token than its embedding"
        check_alike(module(inputs_embeds=embeds, use_cache=False).last_hidden_state, hidden)
        why = "gives other hidden states in a padded batch"
        layers, place = range(len(decoder.layers) + 1), torch.arange(n, device=model.device)
        padded = torch.cat([row, torch.cat([short, row[:, :2]], 1)])
        states = decoder.hidden_states(layers, input_ids=padded, attention_mask=(place < lengths).long())
        check_alike(states[1:, : n - 2], decoder.hidden_states(layers, input_ids=short))
        why = "does not decode from embeddings, left padding and a cache"
        cache, mask = DynamicCache(config=model.config), (place >= n - lengths).long()
        options = dict(past_key_values=cache, use_cache=True, logits_to_keep=1)
        inputs = dict(attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        first = model(inputs_embeds=embeds.repeat(2, 1, 1), **inputs, **options).logits[:, -1]
        check_alike(first, torch.cat([logits[:, -1], model(input_ids=short).logits[:, -1]]))
        cache.reorder_cache(torch.tensor([1], device=model.device))  # row 0 has ended
        inputs = dict(attention_mask=torch.cat([mask[1:], mask[1:, -1:]], 1), position_ids=lengths[1:])
        longer = model(input_ids=torch.cat([short, row[:, :1]], 1)).logits
        check_alike(model(input_ids=row[:, :1], **inputs, **options).logits[:, -1], longer[:, -1])
    except Exception as error:
        raise ConfigError(f"{what} {why} ({' '.join(str(error).split())[:160]})") from None


@torch.no_grad()
def takes_soft_tokens(decoder: Decoder, ids: list[int]) -> bool:
    """Whether a decoder reads embeddings that are no token's; some look every one up in their table."""
    embeds = decoder.model.get_input_embeddings()(torch.tensor([ids], device=decoder.model.device))
    try:
        found = decoder.module(inputs_embeds=(embeds + embeds.flip(1)) / 2, use_cache=False).last_hidden_state
    except (RuntimeError, ValueError):
        return False
    return bool(found.isfinite().all())


@torch.no_grad()
def try_projections(decoder: Decoder, index: int, ids: list[int]) -> tuple[Projection, Projection] | None:
    """A layer's projections of keys and values, if a change of each changes all that is cached of it and nothing else.

    Layers without keys, with keys that are compressed or shared, or of an unknown layout give None."""

    def cached() -> tuple[torch.Tensor, torch.Tensor]:
        cache = DynamicCache(config=decoder.model.config)
        row = torch.tensor([ids], device=decoder.model.device)
        decoder.module(input_ids=row, past_key_values=cache, use_cache=True)
        return cache.layers[index].keys, cache.layers[index].values

    projections = decoder.projections(index)
    for place, projection in enumerate(projections or ()):
        before = cached()
        ramp = torch.linspace(1, 2, projection.width, device=decoder.model.device)  # a norm would take out a constant
        with add_to(projection, lambda own, ramp=ramp: ramp.to(own.dtype).expand_as(own)):
            changed = [a != b for a, b in zip(cached(), before, strict=True)]
        if changed[1 - place].any() or changed[place].float().mean() < 0.9:
            return None
    return projections
