"""Costs of small graphs by hand, and that what isn't known is counted as unknown."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt.analysis.cost
from graphopt.analysis.cost import Counted, cost
from graphopt.analysis.shapes import infer

HEADER = '<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>'


def load(text, header=HEADER):
    return ir.from_proto(onnx.parser.parse_model(header + text))


def zeros(*shape):
    return "{" + ", ".join(["0"] * int(np.prod(shape))) + "}"


@pytest.mark.parametrize(
    ("inputs", "body", "flops"),
    [
        (f"float[b, 5, 8] x) => (float[?] y) <float[8, 3] w = {zeros(8, 3)}", "y = MatMul(x, w)", 2 * 2 * 5 * 8 * 3),
        (
            f"float[b, 8] x) => (float[?] y) <float[3, 8] w = {zeros(3, 8)}, float[3] c = {zeros(3)}",
            "y = Gemm<transB=1>(x, w, c)",
            2 * 2 * 8 * 3 + 2 * 3,
        ),
        (
            f"float[b, 4, 6, 6] x) => (float[?] y) <float[8, 2, 3, 3] w = {zeros(8, 2, 3, 3)}",
            "y = Conv<group=2, pads=[1, 1, 1, 1]>(x, w)",
            2 * (2 * 8 * 36) * (2 * 9),
        ),
        (
            f"float[b, 4, 3, 3] x) => (float[?] y) <float[4, 2, 2, 2] w = {zeros(4, 2, 2, 2)}",
            "y = ConvTranspose<strides=[2, 2]>(x, w)",
            2 * (2 * 4 * 9) * (2 * 4),
        ),
        ("float[b, 5, 8] x) => (float[?] y) <float c = {2}", "y = Mul(x, c)", 80),
        ("float[b, 5, 8] x) => (float[?] y) <float c = {2}", "y = Softmax(x)", 5 * 80),
        ("float[b, 5, 8] x) => (float[?] y) <float[8] c = {1, 1, 1, 1, 1, 1, 1, 1}", "y = RMSNormalization(x, c)", 400),
        ("float[b, 5, 8] x) => (float[?] y) <float c = {2}", "y = Transpose<perm=[1, 0, 2]>(x)", 0),
        ("float[b, 5, 8] x) => (float[?] y) <float c = {2}", 'y = Einsum<equation="bsd,btd->bst">(x, x)', 2 * 2 * 25 * 8),
        (
            f"float[5, b, 8] x) => (float[?] y) <float[1, 12, 8] w = {zeros(12, 8)}, float[1, 12, 3] r = {zeros(12, 3)}",
            "y = LSTM<hidden_size=3>(x, w, r)",
            5 * 2 * 4 * 3 * (2 * (8 + 3) + 4),
        ),
        ("float[b, 9, 5, 16] q, float[b, 3, 7, 16] k) => (float[?] y) <float c = {2}", "y = Attention(q, k, k)",
         2 * 9 * 5 * 7 * (2 * 16 + 5 + 2 * 16)),
        (f"float[b, 8] x) => (float[?] y) <uint8[3, 1, 4] w = {zeros(12)}, float[3] s = {zeros(3)}",
         "y = com.microsoft.MatMulNBits<K=8, N=3, bits=4, block_size=16>(x, w, s)", 2 * 2 * 8 * 3),
    ],
)  # fmt: skip
def test_flops(inputs, body, flops):
    result = cost(load(f"g ({inputs}> {{ {body} }}"), dims={"b": 2})
    assert result.flops == flops
    assert result.unknown_flops == 0


def test_sizes():
    model = load("""g (float[b, s, 8] x, float[b, 3, h, w] image, float[p, 3, q, 64] past_k) => (float[?] y)
        { y = Relu(x) }""")
    assert cost(model).sizes == {
        "b": 1, "x[0]": 1, "s": 128, "x[1]": 128, "image[0]": 1, "h": 224, "image[2]": 224, "w": 224, "image[3]": 224,
        "p": 1, "past_k[0]": 1, "q": 0, "past_k[2]": 0,
    }  # fmt: skip
    assert cost(model, dims={"s": 7}).flops == 7 * 8
    assert cost(model, dims={"x[1]": 9, "b": 2}).flops == 2 * 9 * 8
    assert cost(model, infer(model), {"x[1]": 9}).activation_bytes == 9 * 8 * 4


def test_weights_count_once():
    text = f"""g (float[b, 4] x) => (float[?] y) <float[4, 4] w = {zeros(4, 4)}, float[4, 4] unused = {zeros(4, 4)}>
        {{ c = Constant<value_floats=[1.0, 2.0, 3.0, 4.0]>()  h = MatMul(x, w)  k = MatMul(h, w)  y = Add(k, c) }}"""
    result = cost(load(text))
    assert (result.parameters, result.weight_bytes) == (20, 80)
    assert dict(result.nodes) == {"Add": 1, "Constant": 1, "MatMul": 2}
    assert result.node_count == 4


def test_packed_weights_take_half_a_byte():
    model = load("g (float[b, 4] x) => (float[?] y) { y = Identity(x) }")
    value = ir.Value(
        name="w", const_value=ir.Tensor(np.zeros((3, 5), dtype=ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)
    )
    model.graph.register_initializer(value)
    node = ir.node("DequantizeLinear", [value, model.graph.inputs[0]])
    model.graph.append(node)
    assert cost(model).parameters == 15
    assert cost(model).weight_bytes == 8


def test_unknown_is_counted():
    text = """g (float[b, 4] x) => (float[?] y) { h = custom.Thing(x)  k = Mul(h, h)  y = Relu(x) }"""
    result = cost(load(text, HEADER.replace("com.microsoft", "custom")), dims={"b": 2})
    assert result.flops == 8
    assert result.unknown_flops == 2
    assert result.unknown_bytes == 1  # `k` is used by nothing
    assert [n.flops for n in result.per_node] == [None, None, 8]


def test_what_was_counted_is_counted_again_only_where_it_changed(monkeypatch):
    model = load(
        f" g (float[b, 8] x) => (y) <float[8, 3] w = {zeros(8, 3)}> {{ a = Relu(x)  m = MatMul(a, w)  y = Neg(m) }}"
    )
    counted, facts, asked = Counted(), infer(model), []
    count = graphopt.analysis.cost._flops
    monkeypatch.setattr(
        "graphopt.analysis.cost._flops", lambda node, shape: asked.append(node.op_type) or count(node, shape)
    )

    def again(**sizes):
        nonlocal facts
        asked.clear()
        facts = infer(model, earlier=facts)
        flops = cost(model, facts, sizes, activations=False, counted=counted).flops
        assert flops == cost(model, dims=sizes).flops
        return asked[: len(asked) - len(model.graph)]

    assert again() == ["Relu", "MatMul", "Neg"]
    assert again() == []
    model.graph[2].op_type = "Softmax"
    assert again() == ["Softmax"]
    model.graph.initializers["w"].const_value = ir.tensor(np.zeros((8, 5), np.float32))
    assert again() == ["MatMul", "Softmax"]
    assert again(b=7) == ["Relu", "MatMul", "Softmax"]
    assert again(b=7) == []


def test_inputs_that_do_not_fit_are_unknown_not_negative():
    text = f"""g (float[b, 1, t] x) => (float[?] y) <float[2, 1, 9] w = {zeros(18)}> {{ y = Conv(x, w) }}"""
    result = cost(load(text), dims={"t": 3})
    assert (result.flops, result.unknown_flops, result.unknown_bytes) == (0, 1, 1)


def test_quick():
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["b", "s", 64]))
    inputs, nodes = [value], []
    for k in range(2_400):
        nodes.append(ir.node("Add", [value, inputs[0]], name=f"n{k}"))
        value = nodes[-1].outputs[0]
    model = ir.Model(ir.Graph(inputs, [value], nodes=nodes, opset_imports={"": 20}), ir_version=10)
    facts, start = infer(model), time.process_time()
    assert cost(model, facts).flops == 2_400 * 128 * 64
    assert time.process_time() - start < 0.5
