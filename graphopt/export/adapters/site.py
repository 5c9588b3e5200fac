"""One module that an adapter changes, as the formulas see it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Site:
    """The numbers that an adapter holds for one module.

    Attributes:
        module: Path of the module in the model that peft wrapped, such as "model.layers.0.mlp.up_proj".
        tensors: The module's own adapter tensors by their name in the method ("lora_A", "oft_R", "lora_B.bias"):
            float32, indices as integers.
        shared: Gives a tensor that all modules share ("vera_A"), by name.
        config: adapter_config.json.
        outputs: Number of output features, once the base weight is known (0 before).
        inputs: Number of input features, of a convolution input channels times kernel positions (0 before).
    """

    module: str
    tensors: Mapping[str, Array]
    shared: Callable[[str], Array]
    config: Mapping[str, Any]
    outputs: int = 0
    inputs: int = 0

    def setting(self, pattern: str, default: str) -> Any:
        """The setting of this module: what the first key of `config[pattern]` says that its path ends with.

        Keys are regular expressions. Where none fits, it is `config[default]`.
        """
        for key, value in (self.config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({key})$", self.module):
                return value
        return self.config[default]

    def flat(self, name: str) -> Array:
        """A tensor as a matrix [first dimension, everything else]: the kernels of a convolution in one row each."""
        found = self.tensors[name]
        return np.asarray(found.reshape(found.shape[0], -1))


def float64(array: Array) -> Array:
    """The same numbers in double precision, for what inverts or decomposes."""
    return np.asarray(array, np.float64)
