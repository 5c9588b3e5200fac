"""eliminate-dead-code: subgraphs, captured values, optional outputs, empty inputs."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.passes.clean.eliminate_dead_code import EliminateDeadCode

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def test_what_only_a_removed_if_captured_goes_with_it() -> None:
    model = parse(
        f"""{HEAD} g (float[3] x, bool c) => (float[3] y) <float[3] w = {{1, 2, 3}}> {{
        h = Mul(x, w) k = Exp(h)
        dead = If (c) <then_branch = a () => (float[3] r) {{
                r = If (c) <then_branch = a2 () => (float[3] r2) {{ r2 = Neg(k) }},
                            else_branch = b2 () => (float[3] q2) {{ q2 = Add(k, w) }}> }},
                       else_branch = b () => (float[3] q) {{ q = Neg(h) }}>
        y = Neg(x) }}"""
    )
    after = assert_exact(model, EliminateDeadCode(), dims={})
    assert op_types(after) == ["Neg"]
    assert not after.graph.initializers


def test_inside_a_branch() -> None:
    model = parse(
        f"""{HEAD} g (float[3] x, bool c) => (float[3] y) <float[3] w = {{1, 2, 3}}> {{
        h = Mul(x, w)
        y = If (c) <then_branch = a () => (float[3] r) <float[3] v = {{1, 2, 3}}, float[3] u = {{1, 2, 3}}> {{ d = Add(h, v) r = Mul(x, u) }},
                    else_branch = b () => (float[3] q) {{ q = Neg(x) }}> }}"""
    )
    after = assert_exact(model, EliminateDeadCode())
    assert op_types(after) == ["If"]
    branch = after.graph.node(0).attributes["then_branch"].as_graph()
    assert op_types(ir.Model(branch, ir_version=10)) == ["Mul"]
    assert list(branch.initializers) == ["u"]


def test_outputs_of_a_loop_stay() -> None:
    """Their number is that of the body's outputs."""
    model = parse(
        f"""{HEAD} g (float[3] x, int64 n) => (float[3] y) <bool t = {{1}}> {{
        y, other, scan = Loop (n, t, x, x) <body = b (int64 i, bool c, float[3] v, float[3] u) => (bool d, float[3] w, float[3] p, float[3] q)
            {{ d = Identity(c) w = Add(v, u) p = Neg(u) q = Neg(v) }}> }}"""
    )
    feeds = {"x": np.array([1, 2, 3], np.float32), "n": np.array(2)}
    after = assert_exact(model, EliminateDeadCode(), feeds=feeds)
    assert len(after.graph.node(0).outputs) == 3


@pytest.mark.parametrize(
    ("call", "outputs"),
    [
        ("y, i = MaxPool<kernel_shape = [2]>(x)", 1),
        ("y, mean, dev = LayerNormalization<axis = -1>(x, w)", 1),
        ("y, m = Dropout(x)", 1),
        ("y, z = Split<axis = 1, num_outputs = 2>(x)", 2),  # not optional
    ],
)
def test_unused_optional_outputs_are_dropped(call: str, outputs: int) -> None:
    shape = "float[1, 2, 4] x"
    result = "float[1, 2, 3] y" if "MaxPool" in call else "float[1, 1, 4] y" if "Split" in call else "float[1, 2, 4] y"
    model = parse(f"{HEAD} g ({shape}) => ({result}) <float[4] w = {{1, 2, 3, 4}}> {{ {call} }}")
    after = assert_exact(model, EliminateDeadCode())
    assert len(after.graph.node(0).outputs) == outputs


def test_outputs_that_say_training_stay() -> None:
    """In opset 9, a BatchNormalization with five outputs is in training."""
    model = parse(
        """<ir_version: 8, opset_import: ["": 9]> g (float[2, 3] x) => (float[2, 3] y)
        <float[3] s = {1, 2, 3}, float[3] b = {1, 2, 3}, float[3] m = {1, 2, 3}, float[3] v = {1, 2, 3}>
        { y, m2, v2, sm, sv = BatchNormalization(x, s, b, m, v) }"""
    )
    assert not EliminateDeadCode()(model).modified
    assert len(model.graph.node(0).outputs) == 5


def test_empty_inputs_at_the_end() -> None:
    model = parse(
        f"""{HEAD} g (float[3] x) => (float[3] y, float[3] z) <float k = {{1}}> {{ y = Clip(x, "", "") z = Clip(x, "", k) }}"""
    )
    after = assert_exact(model, EliminateDeadCode())
    assert [len(n.inputs) for n in after.graph] == [1, 3]


def test_foreign_operators_keep_their_inputs_and_outputs() -> None:
    model = parse(
        """<ir_version: 10, opset_import: ["": 21, "some": 1]> g (float[3] x) => (float[3] y) { a, b = some.Op(x, "") y = Neg(a) }"""
    )
    assert not EliminateDeadCode()(model).modified
