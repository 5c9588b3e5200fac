"""The cache of a transformers decoder as a row of named tensors: what goes into an exported graph and comes out of it.

Nothing is known of architectures here: a cache is a list of layers, a layer holds tensors under names of its class
(keys and values, or the states of a convolution or a recurrence), and what a layer of a model holds is seen by running
the model once. An encoder-decoder's cache is two of these: the decoder's own, and the cross-attention's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.export.dependencies import require

PARTS = {"key": "keys", "value": "values"}
"""Parts of an attention layer's cache by the name in the graph: the attribute that holds them."""
STATES = {"conv": "conv_states", "recurrent": "recurrent_states"}
"""The same for layers with a state in place of keys; these hold a tensor, or several by number."""


def flatten(cache: Any) -> list[tuple[str, Any]]:
    """Names and tensors of a cache, in the order of its layers: "0.key", "0.value", "1.key", ...

    The cache of an encoder-decoder gives "0.decoder.key", "0.decoder.value", "0.encoder.key", "0.encoder.value", ...:
    the decoder's own keys, then those of the encoder's states. Layers that hold nothing (they use the keys of another
    layer) are left out.
    """
    own, cross = _pair(cache)
    if cross is None:
        return [(f"{index}.{name}", tensor) for index, layer in enumerate(own) for name, tensor in _layer(layer)]
    found: list[tuple[str, Any]] = []
    for index, (layer, other) in enumerate(zip(own, cross, strict=True)):
        found += [(f"{index}.decoder.{name}", tensor) for name, tensor in _layer(layer)]
        found += [(f"{index}.encoder.{name}", tensor) for name, tensor in _layer(other)]
    return found


def empty(config: Any, layers: int) -> Any:
    """A cache of so many layers that hold nothing yet.

    Attention layers with a window get a cache of full length like the others: the window is in the mask, and one
    length serves all layers.
    """
    transformers = require("transformers")
    from transformers.cache_utils import DynamicLayer

    made = transformers.DynamicCache(config=config)
    made.layers = [made.layers[i] if i < len(made.layers) else DynamicLayer() for i in range(layers)]
    for index, layer in enumerate(made.layers):
        if getattr(layer, "is_sliding", False):
            made.layers[index] = _unbounded(layer)
    return made


def rebuild(config: Any, tensors: Mapping[str, Any], layers: int | None = None) -> Any:
    """A cache that holds these tensors, named as `flatten` names them.

    Args:
        config: The configuration of the model that reads the cache.
        tensors: Keys and values [batch, heads, past, head size], states of any shape.
        layers: Number of layers; None: up to the last that a tensor belongs to.
    """
    if any(name.split(".")[1] in ("decoder", "encoder") for name in tensors):
        halves: list[dict[str, Any]] = [{}, {}]
        for name, tensor in tensors.items():
            index, half, part = name.split(".", 2)
            halves[half == "encoder"][f"{index}.{part}"] = tensor
        return require("transformers").EncoderDecoderCache(*(rebuild(config, half, layers) for half in halves))
    last = max((int(name.split(".")[0]) for name in tensors), default=-1)
    made = empty(config, last + 1 if layers is None else layers)
    for name, tensor in tensors.items():
        index, part, *number = name.split(".")
        layer = made.layers[int(index)]
        if part in PARTS:
            if not layer.is_initialized:
                layer.lazy_initialization(tensor, tensor)
            setattr(layer, PARTS[part], tensor)
        else:
            _set_state(layer, part, int(number[0]) if number else 0, tensor)
    return made


def _unbounded(layer: Any) -> Any:
    """A layer that keeps all tokens, in place of one with a window."""
    from transformers import cache_utils

    if hasattr(layer, "conv_states"):
        return cache_utils.LinearAttentionAndFullAttentionLayer(layer.number_of_states)
    return cache_utils.DynamicLayer()


def _pair(cache: Any) -> tuple[Sequence[Any], Sequence[Any] | None]:
    cross = getattr(cache, "cross_attention_cache", None)
    if cross is None:
        return cache.layers, None
    return cache.self_attention_cache.layers, cross.layers


def _layer(layer: Any) -> list[tuple[str, Any]]:
    torch = require("torch")
    found: list[tuple[str, Any]] = []
    for name, attribute in (PARTS | STATES).items():
        held = getattr(layer, attribute, None)
        if isinstance(held, torch.Tensor):
            found.append((name, held))
        elif isinstance(held, Mapping):
            several = len(held) > 1
            found += [(f"{name}.{key}" if several else name, t) for key, t in held.items() if t is not None]
    return found


def _set_state(layer: Any, part: str, number: int, tensor: Any) -> None:
    attribute = STATES[part]
    held = getattr(layer, attribute, None)
    if not isinstance(held, Mapping):
        setattr(layer, attribute, tensor)
        layer.has_previous_state = True
        return
    # Lazily made states are copied into in place, which a graph input can't be: so they're given as made already.
    held[number] = tensor  # type: ignore[index]
    layer.has_previous_state[number] = True
    if part == "conv":
        layer.conv_kernel_size[number] = tensor.shape[-1]
        layer.is_conv_states_initialized[number] = True
    else:
        layer.is_recurrent_states_initialized[number] = True
    layer.device, layer.dtype = tensor.device, tensor.dtype
