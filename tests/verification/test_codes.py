"""Codes of quantized caches: which outputs hold them, and how far they may differ."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.verification.codes import code_outputs, settled


def model(domain: str, operator: str) -> ir.Model:
    cache = [ir.Value(name=n, type=ir.TensorType(t)) for n, t in (("a", ir.DataType.UINT8), ("b", ir.DataType.FLOAT))]
    node = ir.node(operator, cache, domain=domain, num_outputs=2)
    for old, new in zip(cache, node.outputs, strict=True):
        new.type, new.name = old.type, f"{old.name}_out"
    return ir.Model(ir.Graph(cache, node.outputs, nodes=[node], opset_imports={"": 23}), ir_version=10)


def test_presents_of_integers_hold_codes() -> None:
    assert code_outputs(model("ai.graphopt", "QuantizedKVAttention")) == {"a_out"}
    assert code_outputs(model("com.microsoft", "GroupQueryAttention")) == {"a_out"}
    assert code_outputs(model("", "QuantizeLinear")) == set()


@pytest.mark.parametrize(("size", "wrong", "taken"), [(10, 1, True), (10, 2, False), (400, 4, True), (400, 5, False)])
def test_a_few_codes_may_flip(size: int, wrong: int, taken: bool) -> None:
    expected = np.zeros(size, np.uint8)
    found = expected.copy()
    found[:wrong] = 1
    assert (settled(expected, found) is expected) == taken


def test_what_is_of_another_shape_or_type_stays() -> None:
    expected = np.zeros(4, np.uint8)
    for found in (np.zeros(5, np.uint8), np.zeros(4, np.int8), None):
        assert settled(expected, found) is found
