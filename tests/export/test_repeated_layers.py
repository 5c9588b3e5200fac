"""Repetition of layers in a graph, without PyTorch: what is repeated, and what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from graphopt.export.bfloat16 import compute_in_float
from graphopt.export.layers import NotRepeatable, Plan, repeat

KEPT, COUNT = 4, 7


def graph(layers: int, odd: int | None = None, skip: bool = False) -> ir.Model:
    """x → layers of tanh(x · w) + x · scale, with a cache of sums; `scale` is a constant that the layer's number isn't in.

    Args:
        layers: Layers.
        odd: A layer with another constant.
        skip: The third layer also reads what the first gives.
    """
    inputs = ["float[n, 4] x", *(f"float[n, 4] past_{i}" for i in range(layers))]
    outputs = ["float[n, 4] y", *(f"float[n, 4] present_{i}" for i in range(layers))]
    body = ["shared = Exp(x)", "h0 = Neg(x)"]
    for i in range(layers):
        scale = 3.0 if i == odd else 2.0
        extra = "h1" if skip and i == 2 else "shared"
        body += [
            f"m{i} = MatMul(h{i}, w_{i})",
            f"present_{i} = Add(m{i}, past_{i})",
            f"s{i} = Constant<value_float = {scale}>()",
            f"t{i} = Mul(present_{i}, s{i})",
            f"u{i} = Add(t{i}, {extra})",
            f"h{i + 1} = Add(u{i}, h{i})",
        ]
    body.append(f"y = Tanh(h{layers})")
    text = f'<ir_version: 10, opset_import: ["": 20]>\ng ({", ".join(inputs)}) => ({", ".join(outputs)}) {{\n'
    proto = onnx.parser.parse_model(text + "\n".join(body) + "\n}")
    for i in range(layers):
        weight = np.random.default_rng(i).normal(size=(4, 4)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, f"w_{i}"))
    model = ir.from_proto(proto)
    for value in [*model.graph.inputs, *model.graph.initializers.values(), *model.graph.outputs]:
        if value.name and "_" in value.name:
            kind, _, number = value.name.partition("_")
            value.name = f"layers.{number}.weight" if kind == "w" else f"{kind}.{number}.sum"
    return model


PLAN = Plan("layers", COUNT, KEPT, (2,) * (COUNT - KEPT), (0,) * COUNT)
NAMES = {f"layers.{i}.weight" for i in range(COUNT)}


def test_repeated_is_the_same_as_written_out() -> None:
    model, whole = graph(KEPT), graph(COUNT)
    repeat(model.graph, PLAN, NAMES, ("past", "present"))
    for name, value in model.graph.initializers.items():
        value.const_value = whole.graph.initializers[name].const_value
    assert {v.name for v in model.graph.inputs} == {v.name for v in whole.graph.inputs}
    assert {v.name for v in model.graph.outputs} == {v.name for v in whole.graph.outputs}
    assert set(model.graph.initializers) == set(whole.graph.initializers)
    feeds = {v.name: np.random.default_rng(9).normal(size=(3, 4)).astype(np.float32) for v in whole.graph.inputs}
    wanted = sorted(v.name or "" for v in whole.graph.outputs)
    found, expected = (ReferenceEvaluator(ir.to_proto(m)).run(wanted, feeds) for m in (model, whole))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"odd": 1}, "layers 2 and 1 differ in what Mul"), ({"skip": True}, "layer 2 reads h1, which layer 0 computes")],
)
def test_what_is_not_a_row_of_equal_layers(options: dict[str, object], message: str) -> None:
    model = graph(KEPT, **options)  # type: ignore[arg-type]
    before = ir.to_proto(model).SerializeToString()
    with pytest.raises(NotRepeatable, match=message):
        repeat(model.graph, PLAN, NAMES, ("past", "present"))
    assert ir.to_proto(model).SerializeToString() == before


def test_arithmetic_in_bfloat16_rounds_as_before() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
    g (bfloat16[n] a, bfloat16[n] b) => (bfloat16[n] y, bfloat16[n] p) {
      p = Mul(a, b)  q = Cast<to = 1>(p)  r = Exp(q)  s = Cast<to = 16>(r)  y = Add(s, p)
    }"""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text)))
    assert compute_in_float(model.graph) == 2
    model.graph.sort()
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    types = {node.op_type: node.inputs[0].dtype for node in model.graph if node.op_type in ("Mul", "Add", "Exp")}
    assert set(types.values()) == {ir.DataType.FLOAT}
    a, b = (np.random.default_rng(i).normal(size=50).astype(ml_dtypes.bfloat16) for i in range(2))
    product = (a.astype(np.float32) * b.astype(np.float32)).astype(ml_dtypes.bfloat16)
    exponential = np.exp(product.astype(np.float32)).astype(ml_dtypes.bfloat16)
    total = (exponential.astype(np.float32) + product.astype(np.float32)).astype(ml_dtypes.bfloat16)
    y, p = ReferenceEvaluator(ir.to_proto(model)).run(None, {"a": a, "b": b})
    np.testing.assert_array_equal(np.asarray(p).view(np.uint16), product.view(np.uint16))
    np.testing.assert_array_equal(np.asarray(y).view(np.uint16), total.view(np.uint16))
