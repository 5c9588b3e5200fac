"""Stacks of equal layers, from the shapes of weights alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.analysis.layers import stacks


def chain(widths: list[tuple[int, int]]) -> ir.Model:
    """MatMuls of these weight shapes, one after the other as far as names go."""
    tensors = [numpy_helper.from_array(np.zeros(shape, np.float32), f"w{i}") for i, shape in enumerate(widths)]
    nodes = [helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], name=f"n{i}") for i in range(len(widths))]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("h0", f"h{len(widths)}")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], tensors)
    return ir.from_proto(helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]))


LAYER = [(4, 4), (4, 4), (4, 4), (4, 4), (4, 8), (8, 4)]


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ([(3, 4), *LAYER * 5, (4, 9)], [(5, 6)]),
        ([*LAYER * 3, (4, 2), *[(2, 6), (6, 2)] * 4], [(3, 6), (4, 2)]),
        ([(4, 4)] * 7, [(7, 1)]),
        ([(4, 4)] * 2, []),
        ([(1, 2), (2, 3), (3, 4)], []),
        ([(1, 2), (2, 1)] * 2, [(2, 2)]),
        ([], []),
    ],
)
def test_stacks(widths: list[tuple[int, int]], expected: list[tuple[int, int]]) -> None:
    assert [(s.count, len(s.weights)) for s in stacks(chain(widths))] == expected


def test_names_of_the_ends() -> None:
    (stack,) = stacks(chain([(3, 4), *LAYER * 5, (4, 9)]))
    assert (stack.first, stack.last) == ("n1", "n30")
    assert stack.weights[4:] == ("MatMul 4×8", "MatMul 8×4")
