"""How large the numbers become that a decoder puts into its key/value cache, from text."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphopt.calibration.text import TextDataset
from graphopt.graph.kv_interface import KVInterface
from graphopt.runtime_ops.generation import Generator

if TYPE_CHECKING:
    import onnxruntime


def cache_ranges(
    session: onnxruntime.InferenceSession, interface: KVInterface, data: TextDataset, windows: int
) -> dict[str, npt.NDArray[Any]]:
    """The largest absolute number of every channel in each cache tensor, by the name of its input.

    Args:
        session: The decoder, with a cache [batch, KV heads, tokens, features] of floats.
        interface: Its inputs and outputs.
        data: The text.
        windows: How many windows of it are looked at, each from an empty cache.

    Returns:
        Arrays [KV heads, features], float32.

    Raises:
        ModelError: Not a decoder that can be run.
        InputDataError: The decoder doesn't run on the text.
    """
    generator = Generator(session, interface=interface, cache="growing")
    found: dict[str, npt.NDArray[Any]] = {}
    for ids in itertools.islice(data, windows):
        decoding = generator.start(1, data.window)
        decoding.feed(ids)
        for name, value in decoding.caches.items():
            largest = np.abs(value.numpy().astype(np.float32)).max(axis=(0, 2), initial=0)
            found[name] = np.maximum(found.get(name, largest), largest)
    return found
