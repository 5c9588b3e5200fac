"""deduplicate-initializers: equal weights stored once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.graph.edits import walk
from graphopt.passes.base import Pass

SAMPLE_BYTES = 4096


class DeduplicateInitializers(Pass):
    """Store equal initializers once and let all their users read that one.

    Finds what exporters write twice: tied embeddings and lm_heads, the constants of each layer, equal layers. Equal
    means the same type, shape and bytes. Initializers of subgraphs are compared within their graph.

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit; the file doesn't grow. Initializers that are
    graph inputs (they can be overridden) or outputs stay.

    **Why not onnx_ir's DeduplicateHashedInitializersPass:** it reads and hashes every weight (SHA-512 over 540 MB takes
    longer than all other clean-ups together). Here weights are read only if type, shape and a sample of the bytes are
    equal.

    **When not to use it:** before training goes on with the file: tied weights stay tied.
    """

    name: ClassVar[str] = "deduplicate-initializers"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        changed = False
        for graph in walk(model):
            alike: dict[Hashable, list[ir.Value]] = defaultdict(list)
            for value in graph.initializers.values():
                tensor = value.const_value
                if (
                    tensor is None
                    or value.is_graph_input()
                    or value.is_graph_output()
                    or isinstance(tensor, ir.LazyTensor)
                ):
                    continue
                if tensor.dtype == ir.DataType.STRING:
                    continue
                alike[tensor.dtype, tuple(tensor.shape.numpy())].append(value)
            for candidates in alike.values():
                if len(candidates) > 1:
                    changed |= self._merge(graph, candidates)
        return changed

    def _merge(self, graph: ir.Graph, candidates: list[ir.Value]) -> bool:
        kept: dict[Hashable, list[ir.Value]] = defaultdict(list)
        changed = False
        for value in candidates:
            tensor = value.const_value
            assert tensor is not None
            group = kept[_sample(tensor)]
            twin = next((k for k in group if _equal(k.const_value, tensor)), None)
            if twin is None:
                group.append(value)
                continue
            if (first := next(iter(value.uses()), None)) is not None:
                self.applied(first.node, f"reads {twin.name!r} instead of its copy {value.name!r}")
            value.replace_all_uses_with(twin)
            assert value.name is not None
            graph.initializers.pop(value.name)
            changed = True
        return changed


def _sample(tensor: ir.TensorProtocol) -> bytes:
    """A digest of the first and last bytes."""
    data = _bytes(tensor)
    if data.size <= 2 * SAMPLE_BYTES:
        return hashlib.blake2b(data.tobytes()).digest()
    return hashlib.blake2b(data[:SAMPLE_BYTES].tobytes() + data[-SAMPLE_BYTES:].tobytes()).digest()


def _bytes(tensor: ir.TensorProtocol) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    array = tensor.numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _equal(a: ir.TensorProtocol | None, b: ir.TensorProtocol) -> bool:
    assert a is not None
    if _place(a) is not None and _place(a) == _place(b):
        return True
    return bool(np.array_equal(_bytes(a), _bytes(b)))


def _place(tensor: ir.TensorProtocol) -> tuple[str, int | None] | None:
    """Where a tensor lies on disk, if it does."""
    return (tensor.path, tensor.offset) if isinstance(tensor, ir.ExternalTensor) else None
