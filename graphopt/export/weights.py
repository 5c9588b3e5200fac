"""Where the numbers of an exported model come from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import onnx_ir as ir


class Weights(Protocol):
    """The parameters and persistent buffers of a module by its own names (state_dict keys), read one at a time."""

    def names(self) -> Collection[str]:
        """What the checkpoint gives."""
        ...

    def tensor(self, name: str) -> ir.TensorProtocol:
        """Lazy: shape and dtype are known without reading the data; reading it twice gives the same."""
        ...
