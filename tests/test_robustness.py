"""Unusual models go through the exact recipe: verified after each pass, equal, nothing rolled back, stable."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from roundtrip import ops, text, through

pytest.importorskip("onnxruntime")

X = {"x": np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)}

MODELS = {
    # ---- graph outputs and inputs in unusual places
    "an output is an input": "g (float[2, 3] x) => (float[2, 3] x, float[2, 3] y) { y = Neg(x) }",
    "no node at all": "g (float[2, 3] x) => (float[2, 3] x) { }",
    "an output is an initializer": "g (float[2, 3] x) => (float[2, 3] y, float[2] w) <float[2] w = {1, 2}> { y = Neg(x) }",
    "outputs are one initializer through identities": """g (float[2, 3] x) => (float[2, 3] y, float[2] a, float[2] b)
        <float[2] w = {1, 2}> { y = Neg(x) a = Identity(w) b = Identity(w) }""",
    "outputs are one input through identities": """g (float[2, 3] x) => (float[2, 3] a, float[2, 3] b)
        { a = Identity(x) t = Identity(x) b = Identity(t) }""",
    "equal outputs": "g (float[2, 3] x) => (float[2, 3] a, float[2, 3] b, float[2, 3] c) { a = Neg(x) b = Neg(x) c = Neg(x) }",
    "an output that others use": """g (float[2, 3] x) => (float[2, 3] a, float[2, 3] b)
        { a = Identity(x) t = Identity(a) b = Neg(t) }""",
    "an unused input": "g (float[2, 3] x, float[5] unused) => (float[2, 3] y) { y = Neg(x) }",
    # ---- constants
    "all constant": """g () => (float[2, 2] y, int64[2] s) <float[2, 2] a = {1, 2, 3, 4}, float[2] b = {5, 6}>
        { t = Add(a, b) y = MatMul(t, a) s = Shape(y) }""",
    "constants of every spelling": """g (float[2, 3] x) => (float[2, 3] y, string[2] t) {
        a = Constant<value_float = 1.5>() b = Constant<value_floats = [1.0, 2.0, 3.0]>() c = Constant<value_int = 2>()
        d = Constant<value_ints = [2, 3]>() t = Constant<value_strings = ["p", "q"]>()
        e = Cast<to = 1>(c) f = Add(a, b) h = Mul(f, e) i = Expand(h, d) y = Add(x, i) }""",
    "constants that share their numbers but not their type": """g (float[2, 3] x) => (float[2, 3] y, int64[2] z)
        <float[2] p = {0, 0}, int64 q = {0}, int64[1] q1 = {0}, float r = {0}, float[2] m = {-0, -0}> {
        a = ReduceSum<keepdims = 1>(p) b = ReduceSum<keepdims = 1>(m) s = Add(x, r) t = Add(s, a) y = Sub(t, b)
        z0 = Shape(x) z1 = Add(z0, q) z = Add(z1, q1) }""",
    "a negative zero": """g (float[2, 3] x) => (float[2, 3] y, float[2, 3] z) <float zero = {0.0}, float minus = {-0.0}>
        { a = Mul(x, zero) y = Div(x, a) b = Mul(x, minus) z = Div(x, b) }""",
    # ---- sizes 0 and no dimensions
    "a scalar": "g (float x) => (float y, int64[z] s) { a = Mul(x, x) y = Sqrt(a) s = Shape(y) }",
    "empty tensors": """g (float[2, 3] x) => (float[n, 3] y, float[m] r) <float[0, 3] e = {}, int64[1] k = {-1}>
        { y = Concat<axis = 0>(e, x, e) t = Transpose(e) r = Reshape<allowzero = 0>(t, k) }""",
    "an empty slice": """g (float[2, 3] x) => (float[n, 3] y) <int64[1] a = {0}, int64[1] z = {0}>
        { s = Slice(x, a, z) y = Concat<axis = 0>(s, x) }""",
    # ---- optional inputs and outputs
    "empty optional inputs": """g (float[2, 3] x) => (float[2, 3] y, float[1, 3] z)
        <float m = {0.5}, int64[2] a = {0, 0}, int64[2] b = {1, 3}, int64[2] s = {1, 1}>
        { y = Clip(x, "", m) z = Slice(x, a, b, "", s) }""",
    "unused optional outputs": """g (float[1, 1, 2, 3] x) => (float[1, 1, 1, 2] y, float[1, 1, 2, 3] z)
        <float[3] w = {1, 2, 3}> { y, i = MaxPool<kernel_shape = [2, 2]>(x) z, mean, dev = LayerNormalization<axis = -1>(x, w) }""",
    "a recurrent layer of which one output is used": """g (float[2, 1, 3] x) => (float[1, 1, 2] h)
        <float[1, 8, 3] w = {WEIGHTS24}, float[1, 8, 2] r = {WEIGHTS16}>
        { "", h, "" = LSTM<hidden_size = 2>(x, w, r, "", "", "", "", "") }""",
    # ---- data-dependent shapes
    "data-dependent shapes": """g (float[2, 3] x) => (int64[2, n] i, float[m] u, float[k] c, int64[1] s)
        { i = NonZero(x) u = Unique<sorted = 1>(x) z = Constant<value_float = 0.0>() g = Greater(x, z) f = Flatten<axis = 0>(x)
          q = Flatten<axis = 0>(g) r = Constant<value_ints = [-1]>() qq = Reshape(q, r) ff = Reshape(f, r)
          c = Compress<axis = 0>(ff, qq) s = Shape(c) }""",
}


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    body = MODELS[name]
    for count in (16, 24):
        body = body.replace(f"WEIGHTS{count}", ", ".join(str(i / count - 0.5) for i in range(count)))
    proto = text(body)
    rng = np.random.default_rng(0)
    feeds = {
        v.name: rng.normal(size=[d.dim_value for d in v.type.tensor_type.shape.dim]).astype(np.float32)
        for v in proto.graph.input
    }
    through(proto, tmp_path, feeds)


def test_names_twice_and_no_names(tmp_path: Path) -> None:
    body = "g (float[2, 3] x) => (float[2, 3] y) { [n] a = Neg(x) [n] b = Neg(a) c = Exp(b) d = Identity(c) [n] y = Neg(d) }"
    through(text(body), tmp_path, X, reference=True)  # ONNX Runtime refuses the original


def test_an_output_listed_twice(tmp_path: Path) -> None:
    proto = text("g (float[2, 3] x) => (float[2, 3] y) { t = Identity(x) u = Neg(t) y = Identity(u) }")
    proto.graph.output.append(proto.graph.output[0])
    assert ops(through(proto, tmp_path, X)) == {"Neg": 1}


def test_overridable_initializers(tmp_path: Path) -> None:
    """The default is no constant: the caller may give another value, also another shape."""
    proto = text(
        """g (float[2, 3] x, int64[k] shape, float[m] w, float[m] v) => (float y, float[2, 3] z) {
        r = Reshape(x, shape) s = Shape(shape) c = Cast<to = 1>(s) a = Mul(x, w) b = Mul(x, v) d = Add(a, b)
        z = Identity(d) t = ReduceSum<keepdims = 0>(r) u = Squeeze(c) y = Add(t, u) }"""
    )
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.output[0].type.tensor_type.shape.SetInParent()
    proto.graph.initializer.append(numpy_helper.from_array(np.array([3, 2]), "shape"))
    for name in "wv":
        proto.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), name))
    through(proto, tmp_path, X)
    through(proto, tmp_path, {**X, "shape": np.array([1, 6, 1])})
    after = through(proto, tmp_path, {**X, "w": np.array([1, 2, 3], np.float32)})
    assert [v.name for v in after.graph.input] == ["x", "shape", "w", "v"]
    assert {t.name for t in after.graph.initializer} >= {"shape", "w", "v"}


def test_ir_version_3(tmp_path: Path) -> None:
    head = '<ir_version: 3, opset_import: ["" : 8]>'
    proto = text("g (float[2, 3] x, float[3] w) => (float[2, 3] y) { a = Mul(x, w) b = Add(w, w) y = Add(a, b) }", head)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.float32), "w"))
    after = through(proto, tmp_path, X)
    assert [v.name for v in after.graph.input] == ["x"]
    assert ops(after) == {"Mul": 1, "Add": 1}


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 15, 17, 18, *range(20, 27), 28])
def test_every_opset(opset: int, tmp_path: Path) -> None:
    """Above 26, ONNX Runtime's limit, nothing is verified and nothing converted."""
    head = f'<ir_version: {8 if opset < 19 else 10}, opset_import: ["" : {opset}]>'
    body = """g (float[2, 3] x) => (float[2, 3] y, float[3, 2] t) <float[3] w = {1, 2, 3}, float one = {1.0}> {
        a = Identity(x) b = Mul(a, w) c = Neg(w) d = Add(b, c) e = Neg(w) f = Add(d, e) h = Mul(f, one)
        s = Sigmoid(h) y = Mul(h, s) q = Transpose(h) r = Transpose(q) t = Transpose(r) }"""
    runs = opset <= 26
    after = through(text(body, head), tmp_path, X, verify="pass" if runs else "none", reference=not runs)
    assert ops(after)["Neg"] == ops(after)["Identity"] == 0
    assert ops(after)["Transpose"] == 1
    version = after.opset_import[0].version
    assert version == (max(opset, 23) if opset < 23 else opset)


RANDOM = ("RandomNormal<shape = [2, 3]>()", "RandomUniform<shape = [2, 3]>()", "RandomNormalLike(x)",
          "RandomUniformLike(x)", "Bernoulli(p)", "Multinomial<sample_size = 3>(p)")  # fmt: skip


@pytest.mark.parametrize("draw", RANDOM)
def test_two_draws_are_two_draws(draw: str, tmp_path: Path) -> None:
    body = f"""g (float[2, 3] x) => (float[2, 3] y) <float[2, 3] p = {{0.1, 0.2, 0.3, 0.4, 0.5, 0.6}}> {{
        a = {draw} b = {draw} c = Sub(a, b) d = Cast<to = 1>(c) y = Add(x, d) }}"""
    after = through(text(body), tmp_path, X, random=True)
    assert ops(after)[draw.split("<")[0].split("(")[0]] == 2


def test_dropout_in_training_is_random(tmp_path: Path) -> None:
    body = """g (float[2, 3] x) => (float[2, 3] y) <float r = {0.5}, bool t = {1}, float[2, 3] w = {1, 2, 3, 4, 5, 6}> {
        a = Dropout(w, r, t) b = Dropout(w, r, t) c = Add(a, b) y = Mul(c, x) }"""
    assert ops(through(text(body), tmp_path, X, random=True))["Dropout"] == 2


def test_declarations_that_lie(tmp_path: Path) -> None:
    """Declared shapes of values and outputs, and equal names of sizes, are not to be believed."""
    proto = text(
        """g (float[n, n] x) => (float[7, 7] y, float[n, n, n] z) {
        s = Shape(x) r = Reshape(x, s) t = Transpose(r) y = Neg(t) e = Expand(x, s)
        k = Constant<value_ints = [0]>() z = Unsqueeze(e, k) }"""
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("t", TensorProto.FLOAT, [5, 5]))
    proto.graph.value_info.append(helper.make_tensor_value_info("r", TensorProto.FLOAT, [1, 1, 1]))
    through(proto, tmp_path, X)


def test_quantized_graph(tmp_path: Path) -> None:
    """Quantize and Dequantize pairs stay, int8 weights stay int8."""
    proto = text(
        """g (float[2, 3] x) => (float[2, 2] y) <float s = {0.1}, float s2 = {0.1}, int8 z = {0}, int8 z2 = {0},
        int8[3, 2] w = {1, -2, 3, -4, 5, -6}, float[2] ws = {0.1, 0.2}, int8[2] wz = {0, 0}, int32[2] b = {7, 8},
        float[2] bs = {0.01, 0.02}> {
        q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s2, z2) dw = DequantizeLinear<axis = 1>(w, ws, wz)
        m = MatMul(d, dw) db = DequantizeLinear<axis = 0>(b, bs) a = Add(m, db)
        q2 = QuantizeLinear(a, s, z) y = DequantizeLinear(q2, s, z) }"""
    )
    after = through(proto, tmp_path, X)
    assert ops(after) == ops(proto)
    assert {t.name: t.data_type for t in after.graph.initializer if t.name in "wb"} == {
        "w": TensorProto.INT8, "b": TensorProto.INT32,
    }  # fmt: skip


def test_metadata_stays(tmp_path: Path) -> None:
    proto = text("g (float[2, 3] x) => (float[2, 3] y) { a = Identity(x) y = Neg(a) }")
    helper.set_model_props(proto, {"names": "{0: 'cat'}", "stride": "32"})
    proto.model_version, proto.domain, proto.doc_string = 7, "org.example", "about"
    proto.graph.doc_string, proto.graph.input[0].doc_string = "the graph", "the input"
    after = through(proto, tmp_path, X)
    assert {p.key: p.value for p in after.metadata_props} == {"names": "{0: 'cat'}", "stride": "32"}
    assert (after.model_version, after.domain, after.doc_string) == (7, "org.example", "about")
    assert (after.graph.name, after.graph.doc_string, after.graph.input[0].doc_string) == (
        "g",
        "the graph",
        "the input",
    )
