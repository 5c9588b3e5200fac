"""Weights of SmolLM2-135M-Instruct that no longer lie on the 4-bit grid of the file that they come from."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from graphopt.export.gguf.reader import read
from graphopt.models.catalogue import fetch

Floats = npt.NDArray[np.float32]


@functools.lru_cache(maxsize=1)
def matrices(layer: int = 12) -> dict[str, Floats]:
    """The linear weights [N, K] of a layer: the gains of its norms are folded in, and the channels between v and o, and
    between up and down, are rescaled by factors of 0.8 to 1.25."""
    tensors = read(fetch("smollm2")).tensors

    def stored(name: str) -> Floats:
        return np.asarray(tensors[f"blk.{layer}.{name}.weight"].values(), np.float32)

    rng = np.random.default_rng(layer)
    attention, mlp = stored("attn_norm"), stored("ffn_norm")
    heads, head = 3, 64
    of_values, of_up = (np.exp(rng.uniform(np.log(0.8), np.log(1.25), count)) for count in (heads * head, 1536))
    repeated = of_values.reshape(heads, head).repeat(3, axis=0).reshape(-1)
    found = {
        "q": stored("attn_q") * attention,
        "k": stored("attn_k") * attention,
        "v": stored("attn_v") * attention * of_values[:, None],
        "o": stored("attn_output") / repeated,
        "gate": stored("ffn_gate") * mlp,
        "up": stored("ffn_up") * mlp * of_up[:, None],
        "down": stored("ffn_down") / of_up,
    }
    return {name: np.ascontiguousarray(weight, np.float32) for name, weight in found.items()}


def some_rows(rows: int = 128) -> dict[str, Floats]:
    """The first rows of four of the matrices, of 576 and 1536 columns."""
    return {name: matrices()[name][:rows] for name in ("q", "o", "gate", "down")}


def mean_error(of: dict[str, Floats], rounded: dict[str, Floats]) -> float:
    """The mean over matrices of the squared error relative to the matrix."""
    return float(np.mean([np.sum((rounded[name] - w) ** 2) / np.sum(w**2) for name, w in of.items()]))
