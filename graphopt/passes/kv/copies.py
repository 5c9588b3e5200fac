"""Copies of a decoder that give out other values, run on samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.edits import sort
from graphopt.runtime_ops.memory_session import make_session, run

Array = npt.NDArray[Any]


def copied(model: ir.Model) -> tuple[ir.Model, dict[str | None, ir.Value]]:
    """A copy, and its values by name."""
    copy = model.clone()
    values = {v.name: v for v in (*copy.graph.inputs, *copy.graph.initializers.values())}
    values |= {v.name: v for node in copy.graph for v in node.outputs}
    return copy, values


def values_of(
    copy: ir.Model, outputs: Mapping[str, ir.Value], samples: Sequence[Mapping[str, Array]], threads: int | None
) -> Iterator[dict[str, Array]]:
    """Some values of a copy on each sample; the copy gives out nothing else from then on.

    Args:
        copy: The copy.
        outputs: The values, by any name.
        samples: Inputs of the model that it was made of.
        threads: Threads within an operator.
    """
    distinct = list(dict.fromkeys(outputs.values()))
    constants = {name: v.const_value.numpy() for name, v in outputs.items() if v.const_value is not None}
    distinct = [value for value in distinct if value.const_value is None]
    for value in distinct:
        value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
    copy.graph.outputs[:] = distinct
    sort(copy)
    _prune(copy)
    session = make_session(copy, threads=threads, reuse=False)
    wanted = {value.name: value.shape for value in copy.graph.inputs}
    for sample in samples:
        fed = {name: _as_declared(array, wanted[name]) for name, array in sample.items() if name in wanted}
        found = dict(zip(distinct, run(session, fed), strict=True))
        yield {name: constants[name] if name in constants else found[value] for name, value in outputs.items()}


def _as_declared(array: Array, shape: ir.Shape | None) -> Array:
    """What is fed; an empty cache in the sizes that it has by now."""
    if array.size or shape is None:
        return array
    sizes = [size if isinstance(size, int) else now for size, now in zip(shape, array.shape, strict=True)]
    return np.zeros(sizes, array.dtype)


def _prune(model: ir.Model) -> None:
    """Remove nodes of which nothing is used. Optional outputs stay: an `Attention` with a past needs its presents."""
    for node in reversed(model.graph):
        if not any(output.uses() or output.is_graph_output() for output in node.outputs):
            model.graph.remove(node, safe=True)
