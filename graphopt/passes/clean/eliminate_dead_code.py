"""eliminate-dead-code: what no output depends on."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import ClassVar

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common

from graphopt.graph.edits import functions, opset, subgraphs_of
from graphopt.passes.base import Pass


class EliminateDeadCode(Pass):
    """Remove nodes, initializers, functions and opset imports that no output depends on, and optional outputs unused.

    In subgraphs and function bodies too. Empty inputs at the end of a node's list go as well, and the `value_info` of
    values that are gone. Graph inputs stay, used or not: they are the interface. Outputs of `Loop` and `Scan` stay,
    because their number is that of the body.

    **Needs:** nothing. **Guarantees:** the same numbers, bit for bit.

    **Why not onnx_ir's RemoveUnusedNodesPass:** it keeps what only a removed `If` or `Loop` had captured, and the
    unused initializers of subgraphs, drops outputs of BatchNormalization together with its `training_mode`, and says
    nothing when all it did was to drop outputs. Functions and imports are `RemoveUnused{Functions,Opsets}Pass`.

    **When not to use it:** never.
    """

    name: ClassVar[str] = "eliminate-dead-code"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        modified = self._clean(model.graph, opset(model))
        for function in functions(model):
            modified |= self._clean(function.graph, function.opset_imports.get("", opset(model)))
        modified |= common.RemoveUnusedFunctionsPass()(model).modified  # type: ignore[no-untyped-call]
        return modified | common.RemoveUnusedOpsetsPass()(model).modified

    def _clean(self, graph: ir.Graph, version: int) -> bool:
        modified = False
        for node in reversed(graph):  # users before makers, so that one walk is enough
            if node.outputs and not _any_used(node.outputs):
                self.applied(node, "nothing uses it")
                _release(node)
                graph.remove(node, safe=True)
                modified = True
                continue
            for inner in subgraphs_of(node):
                modified |= self._clean(inner, version)
            if node.domain in ("", "ai.onnx"):
                modified |= self._drop_outputs(node, version) | self._drop_inputs(node, version)
        for name, value in list(graph.initializers.items()):
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                del graph.initializers[name]
                modified = True
        return modified

    def _drop_outputs(self, node: ir.Node, version: int) -> bool:
        """Take the names off optional outputs that nothing uses, and remove those at the end."""
        # Their number says whether an old BatchNormalization or Dropout is in training.
        if len(node.outputs) < 2 or node.op_type == "BatchNormalization" or version < 7:
            return False
        optional = _optional_outputs(node.op_type, version)
        dropped = []
        for index, output in enumerate(node.outputs):
            if index in optional and output.name and not _any_used([output]):
                dropped.append(output.name)
                output.name = ""
        if not dropped:
            return False
        count = len(node.outputs)
        while count and not node.outputs[count - 1].name:
            count -= 1
        node.resize_outputs(count)
        return self.applied(node, f"outputs that nothing uses dropped: {', '.join(dropped)}")

    def _drop_inputs(self, node: ir.Node, version: int) -> bool:
        count, least = len(node.inputs), _least_inputs(node.op_type, version)
        while count > least and node.inputs[count - 1] is None:
            count -= 1
        if count == len(node.inputs):
            return False
        node.resize_inputs(count)
        return self.applied(node, "empty inputs at the end dropped")


def _any_used(values: Iterable[ir.Value]) -> bool:
    return any(value.uses() or value.is_graph_output() for value in values)


def _release(node: ir.Node) -> None:
    """Detach the bodies of a node, so that what they captured no longer counts as used."""
    for graph in subgraphs_of(node):
        graph.outputs.clear()
        for inner in graph.all_nodes():
            for index in range(len(inner.inputs)):
                inner.replace_input_with(index, None)


@functools.cache
def _optional_outputs(op_type: str, version: int) -> frozenset[int]:
    """Indices of the outputs that an operator of the default domain may lack."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return frozenset()
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return frozenset(index for index, output in enumerate(schema.outputs) if output.option == optional)


@functools.cache
def _least_inputs(op_type: str, version: int) -> int:
    """How many inputs an operator of the default domain must list, empty ones among them (Loop: both optional ones)."""
    try:
        return int(onnx.defs.get_schema(op_type, version, "").min_input)
    except onnx.defs.SchemaError:
        return 0
