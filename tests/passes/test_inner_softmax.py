"""inner-softmax: a softmax over an inner axis taken apart or flattened, and raise-softmax leaving it so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.models import catalogue
from graphopt.passes import registry
from graphopt.passes.lower.inner_softmax import InnerSoftmax
from graphopt.passes.raise_.softmax import RaiseSoftmax

APART = ["ReduceMax", "Sub", "Exp", "ReduceSum", "Div"]


def graph(shape: str, axis: int, *, op_type: str = "Softmax", dtype: str = "float", opset: int = 21) -> ir.Model:
    return parse(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g ({dtype}[{shape}] x) => ({dtype}[{shape}] y) '
        f"{{ y = {op_type}<axis={axis}>(x) }}"
    )


@pytest.mark.parametrize(
    ("shape", "axis"), [("2, 3, 16, 17", 1), ("B, 2, H, W", 1), ("B, 4, N", -2), ("3, 16, 17", -3), ("B, C, 4, N", 2)]
)
def test_few_elements_are_taken_apart(shape: str, axis: int) -> None:
    after = assert_exact(graph(shape, axis), InnerSoftmax())
    assert op_types(after) == APART
    assert not RaiseSoftmax()(after).modified
    assert op_types(assert_exact(after, RaiseSoftmax(few=0))) == ["Softmax"]


@pytest.mark.parametrize("op_type", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(
    ("shape", "axis"), [("2, 5, 3, 4", 1), ("B, 5, 3, 4", -3), ("7, 3, 4", 0), ("B, 2, 3, 5", 1), ("0, 5, 3, 4", 1)]
)
def test_axes_behind_as_one(shape: str, axis: int, op_type: str) -> None:
    after = assert_exact(graph(shape, axis, op_type=op_type), InnerSoftmax())
    assert [op for op in op_types(after) if op != "Shape"] == ["Reshape", op_type, "Reshape"]
    assert not RaiseSoftmax()(after).modified


@pytest.mark.parametrize(
    "sizes", [{"B": 2, "C": 5, "H": 3, "W": 4}, {"B": 0, "C": 5, "H": 3, "W": 4}, {"B": 2, "C": 5, "H": 3, "W": 0}]
)
def test_sizes_known_at_run_time_only(sizes: dict[str, int]) -> None:
    after = assert_exact(graph("B, C, H, W", 1), InnerSoftmax(), dims=sizes)
    assert {"Concat", "ReduceProd"} <= set(op_types(after))


def test_half_precision_isnt_taken_apart() -> None:
    model = graph("2, 3, 16, 17", 1, dtype="float16")
    assert InnerSoftmax()(model).modified
    assert [op for op in op_types(model) if op != "Shape"] == ["Reshape", "Softmax", "Reshape"]


@pytest.mark.parametrize(
    ("shape", "axis", "opset"), [("B, 3, H, W", -1, 21), ("B, 3, H, W", 3, 21), ("B, 9, N", 1, 21), ("B, 4, 8", 1, 21),
                                 ("2, 5, 3, 4", 1, 17)]
)  # fmt: skip
def test_others_stay(shape: str, axis: int, opset: int) -> None:
    rule = InnerSoftmax()
    assert not rule(graph(shape, axis, opset=opset)).modified
    assert rule.sites == []


def test_unknown_rank_is_a_reason() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[N] i, int64[K] dims) => (float[A, B] y) {
      x = Reshape(i, dims)  y = Softmax<axis=0>(x) }"""
    rule = InnerSoftmax()
    assert not rule(parse("\n".join(text.split("  ")))).modified
    assert "rank isn't known" in rule.sites[0].detail


def test_the_same_bits_in_onnx_runtime() -> None:
    ort = pytest.importorskip("onnxruntime")
    before = graph("2, 5, 3, 4", 1)
    after = before.clone()
    InnerSoftmax()(after)
    feed = {"x": np.random.default_rng(0).normal(size=(2, 5, 3, 4)).astype(np.float32)}
    one, other = (
        ort.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for m in (before, after)
    )
    np.testing.assert_array_equal(one, other)


@pytest.mark.real
def test_real_model() -> None:
    """The distribution over 16 distances of a box's edge, in a detector."""
    ort = pytest.importorskip("onnxruntime")
    path = catalogue.fetch("yolov8n")
    model = ir.load(path)
    for name in ("lift-constants", "simplify-shapes", "convert-opset"):
        registry.make(name)(model)
    rule = InnerSoftmax()
    rule(model)
    assert [site.outcome for site in rule.sites] == ["applied"]
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3
    feed = {"images": np.random.default_rng(0).uniform(size=(1, 3, 64, 96)).astype(np.float32)}
    before, after = (
        ort.InferenceSession(source, quiet, providers=["CPUExecutionProvider"]).run(None, feed)[0]
        for source in (str(path), ir.to_proto(model).SerializeToString())
    )
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-3)
