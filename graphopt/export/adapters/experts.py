"""LoRA of parameters that stack the matrices of all experts, [experts, out, in] or [experts, in, out].

peft wraps a module once for each such parameter (`target_parameters`) and stores A as [experts · r, in] and B as
[out, r · experts], without the parameter's name: the wrapper nearest to the module is the one of its first parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.errors import UsageError
from graphopt.export.adapters.checkpoint import WRAPPED, Adapter
from graphopt.export.adapters.low_rank import lora_scale
from graphopt.export.adapters.site import Array, Site


@dataclass(frozen=True)
class Stacked:
    """The change of one stacked parameter.

    Attributes:
        adapter: The adapter.
        share: What its ΔW is multiplied by.
        module: The wrapper, as the adapter's modules have it.
        turned: Whether the base stores [experts, in, out].
        experts: Their number.
    """

    adapter: Adapter
    share: float
    module: str
    turned: bool
    experts: int

    def added(self, array: Array, dtype: np.dtype) -> Array:
        """W[e] + (alpha/r) B[e] A[e] for each expert e, one expert in float32 at a time."""
        keys = self.adapter.modules[self.module]
        a, b = (self.adapter.array(keys[f"lora_{n}"]) for n in "AB")
        a = a.reshape(self.experts, -1, a.shape[1])
        b = b.reshape(b.shape[0], -1, self.experts)
        site = Site(self.module.partition(WRAPPED)[0], {}, self.adapter.shared, self.adapter.config)
        scale = np.float32(lora_scale(site, a.shape[1]) * self.share)
        out = np.empty(array.shape, dtype)
        for expert in range(self.experts):
            delta = scale * (b[:, :, expert] @ a[expert])
            out[expert] = array[expert].astype(np.float32) + (delta.T if self.turned else delta)
        return out


def stacked_target(
    adapter: Adapter,
    share: float,
    module: str,
    candidates: Sequence[str],
    shape: Callable[[str], tuple[int, ...]],
    turned: Callable[[str], bool],
) -> tuple[str, Stacked]:
    """Which parameter a wrapper is for, by the shapes and, where those leave a choice, by the order of the parameters.

    Args:
        adapter: The adapter.
        share: What its ΔW is multiplied by.
        module: The wrapper.
        candidates: Names of the module's targeted parameters in the base's order.
        shape: Gives the shape of a parameter.
        turned: Whether the caller knows a parameter to be stored as [experts, in, out].

    Raises:
        UsageError: None fits.
    """
    keys = adapter.modules[module]
    if not {"lora_A", "lora_B"} <= keys.keys():
        raise UsageError(f"{adapter.path} lacks tensors for {module}: it has {', '.join(sorted(keys))}")
    a, b = adapter.shapes[keys["lora_A"]], adapter.shapes[keys["lora_B"]]
    fitting = [name for name in candidates if _fits(shape(name), a, b)]
    if not fitting:
        near = ", ".join(f"{name} {'×'.join(map(str, shape(name)))}" for name in candidates)
        raise UsageError(
            f"{adapter.folder} is of another base: {keys['lora_A']} fits matrices of {b[0]} × {a[1]} features, and the "
            f"base has {near}"
        )
    stem, _, depth = module.partition(WRAPPED)
    wrappers = sum(other.partition(WRAPPED)[0] == stem for other in adapter.modules)
    place = wrappers - 1 - int(depth or 0)
    own = candidates[place] if place < len(candidates) else fitting[0]
    name = own if own in fitting else fitting[0]
    experts, rows, columns = shape(name)
    straight, swapped = (rows, columns) == (b[0], a[1]), (columns, rows) == (b[0], a[1])
    return name, Stacked(adapter, share, module, swapped and (not straight or turned(name)), experts)


def _fits(shape: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    if len(shape) != 3 or a[0] != b[1] or a[0] % shape[0]:
        return False
    return (b[0], a[1]) in (shape[1:], shape[:0:-1])
