"""quantized-linear: products, norms, residuals and feed-forward branches become graphopt's operators."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import op_types, parse_weighted, random_feeds

from graphopt.passes.lower.quantized_linear import QuantizedLinear
from graphopt.runtime_ops.library import library_path
from graphopt.runtime_ops.memory_session import make_session

pytestmark = pytest.mark.skipif(library_path() is None, reason="the library with the kernels isn't built")

TEXT = """<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
g (float[b, s, 64] x%s) => (float[b, s, %d] y%s)
<float[64] w, uint8[64, 2, 16] o, float[128] os, uint8[96, 2, 16] g, float[192] gs, uint8[96, 2, 16] u, float[192] us,
 uint8[192, 2, 16] gu, float[384] gus, uint8[64, 3, 16] d, float[192] ds, float[64] bias, uint8[64] oz, float[128] oz4,
 int32[64] order, int64[2] halves> {
  %s
}"""
ATTRIBUTES = "bits = 4, block_size = 32, accuracy_level = %d"
SQUARE = f"com.microsoft.MatMulNBits<K = 64, N = 64, {ATTRIBUTES % 4}>"
GATE = f"com.microsoft.MatMulNBits<K = 64, N = 96, {ATTRIBUTES % 4}>"
BOTH = f"com.microsoft.MatMulNBits<K = 64, N = 192, {ATTRIBUTES % 4}>"
DOWN = f"com.microsoft.MatMulNBits<K = 96, N = 64, {ATTRIBUTES % 4}>"


def model(body: str, width: int = 64, inputs: str = "", outputs: str = "") -> ir.Model:
    made = parse_weighted(TEXT % (inputs, width, outputs, body))
    rng = np.random.default_rng(1)
    for name, value in made.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        shape = tensor.shape.numpy()
        if tensor.dtype == ir.DataType.UINT8:
            value.const_value = ir.tensor(rng.integers(0, 256, shape, dtype=np.uint8), name=name)
        elif name in ("os", "gs", "us", "gus", "ds"):
            value.const_value = ir.tensor(rng.uniform(0.01, 0.03, shape).astype(np.float32), name=name)
        elif name == "halves":
            value.const_value = ir.tensor(np.array([96, 96], np.int64), name=name)
    return made


def lowered(body: str, width: int = 64, tolerance: float = 0.02, **options: object) -> tuple[ir.Model, QuantizedLinear]:
    """The result on a copy, close to what it was; a second run changes nothing."""
    before = model(body, width)
    after, rule = before.clone(), QuantizedLinear(**options)
    rule(after)
    assert not QuantizedLinear(**options)(after).modified
    feeds = random_feeds(before)
    expected = make_session(before, optimizations="none").run(None, feeds)
    found = make_session(after).run(None, feeds)
    for want, have in zip(expected, found, strict=True):
        np.testing.assert_allclose(have, want, atol=tolerance * np.abs(want).max())
    return after, rule


def left(rule: QuantizedLinear) -> list[str]:
    return [site.detail for site in rule.sites if site.outcome == "left"]


@pytest.mark.parametrize(("level", "bits"), [(4, 8), (0, 16), (1, 16)])
def test_a_product_keeps_its_initializers(level: int, bits: int) -> None:
    text = f"y = com.microsoft.MatMulNBits<K = 64, N = 64, {ATTRIBUTES % level}>(x, o, os, oz, , bias)"
    after, _ = lowered(text)
    (node,) = after.graph
    assert node.op_type == "QuantizedLinear"
    assert node.attributes["activation_bits"].as_int() == bits
    assert [v.name for v in node.inputs[2:5]] == ["o", "os", "oz"]
    assert node.inputs[6].name == "bias"


def test_zero_points_that_are_floats_become_minimums() -> None:
    after, _ = lowered(
        f"y = com.microsoft.MatMulNBits<K = 64, N = 64, {ATTRIBUTES % 0}>(x, o, os, oz4)", tolerance=1e-3
    )
    (node,) = after.graph
    scales, zeros = (after.graph.initializers["os"].const_value, model("y = Identity(x)").graph.initializers["oz4"])
    assert scales is not None
    np.testing.assert_allclose(
        node.inputs[5].const_value.numpy(), -scales.numpy() * zeros.const_value.numpy(), rtol=1e-6
    )


HEAD = "com.microsoft.MatMulNBits<K = 64, N = 64, bits = 8, block_size = 32, accuracy_level = 4>(n, h, {})"
TABLE = """
  ids = ArgMax<axis = -1, keepdims = 0>(x)
  table = Reshape(hs, by_block)
  n = com.microsoft.GatherBlockQuantized<bits = 8, block_size = 32, gather_axis = 0, quantize_axis = 2>(h, ids, table)
  n64 = Reshape(n, row)
  y = """


@pytest.mark.parametrize("exact", [True, False])
def test_scales_of_halves_that_a_table_shares_are_stored_once_in_half(exact: bool) -> None:
    text = (TEXT % ("", 64, "", TABLE + HEAD.format("hs").replace("(n,", "(n64,"))).replace(
        "int64[2] halves",
        "int64[2] halves, uint8[64, 2, 32] h, float[128] hs, int64[3] by_block = {64, 2, 1}, int64[3] row = {0, 0, -1}",
    )
    before = parse_weighted(text)
    rng = np.random.default_rng(2)
    scales = rng.uniform(0.01, 0.03, 128).astype(np.float32)
    given = {
        "h": rng.integers(0, 256, (64, 2, 32), dtype=np.uint8),
        "hs": scales.astype(np.float16).astype(np.float32) if exact else scales,
    }
    for name, numbers in given.items():
        before.graph.initializers[name].const_value = ir.tensor(numbers, name=name)
    after, rule = before.clone(), QuantizedLinear()
    rule(after)
    (node,) = [n for n in after.graph if n.op_type == "QuantizedLinear"]
    assert node.inputs[3].dtype == (ir.DataType.FLOAT16 if exact else ir.DataType.FLOAT)
    assert ("Cast" in op_types(after)) == exact
    feeds = random_feeds(before)
    (want,) = make_session(before).run(None, feeds)
    (have,) = make_session(after).run(None, feeds)
    np.testing.assert_allclose(have, want, atol=0.02 * np.abs(want).max())


def test_norm_and_residual_go_in() -> None:
    body = f"n = RMSNormalization<axis = -1, epsilon = 0.001>(x, w)\n  p = {SQUARE}(n, o, os)\n  y = Add(x, p)"
    after, _ = lowered(body)
    (node,) = after.graph
    assert node.attributes["epsilon"].as_float() == pytest.approx(0.001)
    assert [v.name for v in (node.inputs[0], node.inputs[1], node.inputs[7])] == ["x", "w", "x"]


def test_blocks_can_be_left_out() -> None:
    body = f"n = RMSNormalization<axis = -1>(x, w)\n  p = {SQUARE}(n, o, os)\n  y = Add(x, p)"
    after, _ = lowered(body, blocks=False)
    assert op_types(after) == ["RMSNormalization", "QuantizedLinear", "Add"]


def test_a_norm_that_something_else_reads_stays() -> None:
    body = f"n = RMSNormalization<axis = -1>(x, w)\n  p = {SQUARE}(n, o, os)\n  y = Mul(n, p)"
    after, rule = lowered(body)
    assert op_types(after) == ["RMSNormalization", "QuantizedLinear", "Mul"]
    assert left(rule) == ["the norm before it isn't read by such products alone"]


def test_the_skip_form_of_a_norm() -> None:
    body = (
        f"t = Tanh(x)\n  n, , , r = com.microsoft.SkipSimplifiedLayerNormalization(x, t, w)\n"
        f"  p = {SQUARE}(n, o, os)\n  y = Add(r, p)"
    )
    after, _ = lowered(body)
    assert op_types(after) == ["Tanh", "Add", "QuantizedLinear"]


SILU = "s = Sigmoid(a)\n  t = Mul(a, s)"


@pytest.mark.parametrize(
    ("activation", "number"),
    [(SILU, 0), ("t = Gelu(a)", 1), ('t = Gelu<approximate = "tanh">(a)', 2), ("t = Relu(a)", 3)],
)
def test_a_branch_becomes_one_operator(activation: str, number: int) -> None:
    body = (
        f"n = RMSNormalization<axis = -1>(x, w)\n  a = {GATE}(n, g, gs)\n  v = {GATE}(n, u, us)\n  {activation}\n"
        f"  h = Mul(t, v)\n  p = {DOWN}(h, d, ds)\n  y = Add(p, x)"
    )
    after, _ = lowered(body, tolerance=0.05)
    (node,) = after.graph
    assert (node.op_type, node.attributes["activation"].as_int()) == ("QuantizedMlp", number)
    assert list(node.inputs[2].shape) == [192, 2, 16]


def test_gate_and_up_that_are_one_product_already() -> None:
    body = (
        f"n = RMSNormalization<axis = -1>(x, w)\n  b = {BOTH}(n, gu, gus)\n  a, v = Split<axis = -1>(b, halves)\n"
        f"  {SILU}\n  h = Mul(t, v)\n  p = {DOWN}(h, d, ds)\n  y = Add(p, x)"
    )
    after, _ = lowered(body, tolerance=0.05)
    (node,) = after.graph
    assert node.op_type == "QuantizedMlp"
    assert node.inputs[2].name == "gu"
    exchanged = body.replace("a, v = Split", "v, a = Split")
    after, rule = lowered(exchanged, tolerance=0.05)
    assert "QuantizedMlp" not in op_types(after)
    assert left(rule) == ["gate and up stand in the other order in their weight"]


def test_a_residual_from_elsewhere_is_no_branch() -> None:
    body = (
        f"n = RMSNormalization<axis = -1>(x, w)\n  a = {GATE}(n, g, gs)\n  v = {GATE}(n, u, us)\n  {SILU}\n"
        f"  h = Mul(t, v)\n  p = {DOWN}(h, d, ds)\n  z = Tanh(x)\n  y = Add(p, z)"
    )
    after, rule = lowered(body, tolerance=0.05)
    assert op_types(after).count("QuantizedLinear") == 3
    assert left(rule) == ["what is added behind it isn't what gate and up read"]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (f"y = {SQUARE}(x, o, os, , order)", "its weight is permuted (g_idx)"),
        (f"i = Identity(os)\n  j = Mul(i, i)\n  y = {SQUARE}(x, o, j)", "its weight isn't constant"),
    ],
)
def test_what_stays_says_why(body: str, why: str) -> None:
    after = model(body)
    rule = QuantizedLinear()
    rule(after)
    assert "MatMulNBits" in op_types(after)
    assert left(rule) == [why]


def test_an_older_opset_stays() -> None:
    text = TEXT.replace('"": 23', '"": 17') % ("", 64, "", f"y = {SQUARE}(x, o, os)")
    after = parse_weighted(text)
    rule = QuantizedLinear()
    rule(after)
    assert left(rule) == ["the operator's body needs opset 18"]


def test_without_the_library_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    after = model(f"y = {SQUARE}(x, o, os)")
    rule = QuantizedLinear()
    assert not rule(after).modified
    assert left(rule) == ["the library with graphopt's kernels isn't built"]


def test_float_zero_points_and_shared_scales_keep_their_precision() -> None:
    halves = np.random.default_rng(3).uniform(0.01, 0.03, 128).astype(np.float16).astype(np.float32)
    for body in (
        f"y = com.microsoft.MatMulNBits<K = 64, N = 64, {ATTRIBUTES % 0}>(x, o, os, oz4)",
        f"z = {SQUARE}(x, o, os)\n  v = {SQUARE}(z, o, os)\n  y = {SQUARE}(v, o, os)",
    ):
        before = model(body)
        before.graph.initializers["os"].const_value = ir.tensor(halves, name="os")
        after = before.clone()
        QuantizedLinear()(after)
        found = [node for node in after.graph if node.op_type == "QuantizedLinear"]
        assert {node.inputs[3].dtype for node in found} == {ir.DataType.FLOAT}
        feeds = random_feeds(before)
        (want,), (have,) = (make_session(one).run(None, feeds) for one in (before, after))
        np.testing.assert_allclose(have, want, atol=(1e-4 if len(found) == 1 else 0.05) * np.abs(want).max())
