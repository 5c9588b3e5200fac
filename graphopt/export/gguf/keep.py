"""The blocks of a GGUF file kept in a graph: float weights become integer operators that compute the same."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import get_args

import onnx_ir as ir

from graphopt.errors import UsageError
from graphopt.export.gguf.operators import Writer
from graphopt.export.gguf.origin import Origins
from graphopt.export.gguf.quantized import Rows
from graphopt.export.gguf.weights import GGUFWeights
from graphopt.graph.edits import Editor, opset
from graphopt.runtime_ops.block_products import Inputs
from graphopt.runtime_ops.operator import OLDEST_OPSET

SMALL = 1 << 10
"""Constants of fewer numbers than this (scales, tables of positions) aren't reported."""


@dataclass(frozen=True)
class Left:
    """A weight that stays float: the initializer's name, its bytes, and why."""

    name: str
    nbytes: int
    reason: str


@dataclass
class KeptReport:
    """What was kept.

    Attributes:
        kept: For each type of the file the initializers, by the names they had, that are integers now.
        left: Weights that stayed float, with the reasons.
        bytes_before: Of the weights that were kept, as float32.
        bytes_after: The same as integers, scales and offsets.
    """

    kept: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    left: list[Left] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(frozen=True)
class _Use:
    """A node that reads a weight: as a matrix (`source` is what it multiplies), or as an embedding."""

    node: ir.Node
    weight: ir.Value
    transposed: bool
    source: ir.Value
    is_gather: bool

    @property
    def read(self) -> tuple[ir.Value, bool]:
        """The weight and the way it is read."""
        return self.weight, self.transposed


def keep_quantized(
    model: ir.Model, weights: GGUFWeights, *, inputs: Inputs = "int16", merge: bool = True
) -> KeptReport:
    """Replace the float weights that came from a GGUF file by the file's own blocks, in place and without loss.

    MatMul and Gemm (also behind a Transpose of the weight) become graphopt's `QuantizedLinear`, or com.microsoft
    `MatMulNBits`, where types with an offset add, for each block of the input, its sum times the offset (the sums are
    made once for all matrices that read the input); Gather becomes `GatherBlockQuantized`. An embedding that is also
    the head is one initializer. Nothing is read but the names and, where a weight isn't known by its parameter's name,
    its content; the new initializers are lazy. Subgraphs and functions are left alone.

    Args:
        model: The exported graph, opset 13 or later.
        weights: The parameters of the file that it was exported from.
        inputs: What the operators make of their inputs (see `Inputs`). "int16" is graphopt's own operator: equal to the
            float graph to about 1e-4, and the fastest where its library is registered; elsewhere it is computed in
            float32. The others are ONNX Runtime's own. "int8" rounds as llama.cpp does: logits are off by some 1e-2.
            "int8x2" is equal to about 1e-4 and takes 1.2 times as long as that for one row of 2048 × 5632, twice as
            long for many; "float32" is equal to 1e-6 where weights have 4 bits, and takes 2.4 times as long for one
            row, 0.9 times for many.
        merge: Compute matrices that read the same input as one, and split the result.

    Returns:
        What was kept and what was not, with reasons.

    Raises:
        UsageError: `inputs` is something else, or "int16" in a model of an older opset than its operator needs.
    """
    if inputs not in get_args(Inputs):
        raise UsageError(f"inputs can't be {inputs!r}; use {', '.join(get_args(Inputs))}")
    if inputs == "int16" and opset(model) < OLDEST_OPSET:
        raise UsageError(f"inputs 'int16' need opset {OLDEST_OPSET} or newer, not {opset(model)}; use int8x2.")
    report = KeptReport()
    origins = Origins(weights)
    found: dict[tuple[ir.Value, bool], Rows | str] = {}
    writer = Writer(Editor(model), inputs)
    uses = list(_uses(model, report))
    for use in uses:
        if use.read not in found:
            found[use.read] = origins.find(*use.read)
            _record(report, use.weight, found[use.read], writer)
    readers = Counter(use.weight for use in uses)
    groups: dict[object, list[tuple[_Use, Rows]]] = defaultdict(list)
    for number, use in enumerate(uses):
        rows = found[use.read]
        if isinstance(rows, Rows):
            # A weight that is read again, the embedding's mostly, isn't joined with others: it would be stored twice.
            alone = not merge or use.is_gather or readers[use.weight] > 1
            key = number if alone else (use.source, rows.parts[0][0].type)
            groups[key].append((use, rows))
    for members in groups.values():
        first = members[0][0]
        if first.is_gather:
            writer.gather(first.node, members[0][1], first.weight)
        else:
            writer.matrices([(use.node, use.source, rows, use.weight) for use, rows in members])
    if report.kept:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
    return report


def _record(report: KeptReport, weight: ir.Value, rows: Rows | str, writer: Writer) -> None:
    assert weight.const_value is not None
    nbytes, name = weight.const_value.nbytes, weight.name or ""
    if isinstance(rows, Rows):
        report.kept[rows.parts[0][0].type.name].append(name)
        report.bytes_before += nbytes
        report.bytes_after += writer.size(rows)
    else:
        report.left.append(Left(name, nbytes, rows))


def _uses(model: ir.Model, report: KeptReport) -> Iterator[_Use]:
    """The uses of constant matrices that integer operators can take over, node by node in the graph's order."""
    for node in list(model.graph):
        if node.domain != "":
            continue
        if node.op_type == "Gather" and node.attributes.get_int("axis", 0) == 0:
            data, indices = node.inputs
            if data is not None and indices is not None and _is_matrix(data):
                yield _Use(node, data, False, indices, True)
        elif node.op_type in ("MatMul", "Gemm"):
            use = _product(node)
            if isinstance(use, _Use):
                yield use
            elif use is not None:
                weight, reason = use
                assert weight.const_value is not None
                report.left.append(Left(weight.name or "", weight.const_value.nbytes, reason))


def _product(node: ir.Node) -> _Use | tuple[ir.Value, str] | None:
    """The use of a constant matrix by a MatMul or Gemm; the matrix and why not; None where it has none."""
    source, weight = node.inputs[0], node.inputs[1]
    if source is None or weight is None:
        return None
    transposed = True  # [K, N], as MatMul reads it
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1:
        transposed = False
    behind = weight.producer()
    if behind is not None and behind.op_type == "Transpose" and behind.inputs[0] is not None:
        if list(behind.attributes.get_ints("perm", [1, 0])) != [1, 0]:
            return None
        weight, transposed = behind.inputs[0], not transposed
    if not _is_matrix(weight):
        return None
    if node.op_type == "Gemm":
        plain = node.attributes.get_float("alpha", 1.0) == 1 and node.attributes.get_float("beta", 1.0) == 1
        if not plain or node.attributes.get_int("transA", 0) == 1:
            return weight, "the Gemm that reads it scales or transposes"
    if source.shape is None and node.op_type == "MatMul":
        return weight, "the rank of what it is multiplied with isn't known"
    if source.const_value is not None:
        return weight, "it is multiplied with a constant"
    return _Use(node, weight, transposed, source, False)


def _is_matrix(value: ir.Value) -> bool:
    tensor = value.const_value
    if not value.is_initializer() or value.is_graph_input() or tensor is None:
        return False
    return len(tensor.shape) == 2 and tensor.size >= SMALL
