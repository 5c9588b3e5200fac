"""Corners at which the clean-up passes went wrong once: signed zeros, types of old opsets, scopes of inlined names."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exactness import op_types, parse

from graphopt.passes.base import Pass
from graphopt.passes.clean.eliminate_common_subexpressions import EliminateCommonSubexpressions
from graphopt.passes.clean.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.clean.eliminate_identities import EliminateIdentities
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.clean.inline_functions import InlineFunctions
from graphopt.passes.clean.simplify_shapes import SimplifyShapes

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
CALLS = '<ir_version: 10, opset_import: ["": 21, "local": 1]>'


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feeds)


def same_bits(before: ir.Model, pass_: Pass, feeds: dict[str, np.ndarray] | None = None) -> ir.Model:
    """Run a pass on a copy and prove it right in ONNX Runtime, signs of zeros included, and idempotent."""
    after = before.clone()
    pass_(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert not type(pass_)()(after.clone()).modified
    for e, g in zip(outputs(before, feeds or {}), outputs(after, feeds or {}), strict=True):
        assert e.dtype == g.dtype
        assert e.shape == g.shape
        assert e.tobytes() == g.tobytes()
    return after


def test_subtracting_minus_zero_stays() -> None:
    model = parse(f"{HEAD} g (float[3] x) => (float[3] y) <float z = {{-0.0}}> {{ y = Sub(x, z) }}")
    after = same_bits(model, EliminateIdentities(), {"x": np.array([-0.0, 0.0, 1.0], np.float32)})
    assert op_types(after) == ["Sub"]


def test_attributes_that_differ_in_the_sign_of_zero() -> None:
    model = parse(
        f"{HEAD} g (float[2] x) => (float[2] y) {{ a = LeakyRelu<alpha = 0.0>(x) b = LeakyRelu<alpha = -0.0>(x) "
        "c = Reciprocal(a) d = Reciprocal(b) y = Sub(c, d) }"
    )
    same_bits(model, EliminateCommonSubexpressions(), {"x": np.array([-1.0, 2.0], np.float32)})


@pytest.mark.parametrize("rule", [EliminateIdentities, SimplifyShapes])
def test_mask_of_an_old_dropout_is_cast(rule: type[Pass]) -> None:
    """Before opset 10 the mask has the type of the data."""
    model = parse(
        '<ir_version: 4, opset_import: ["": 7]> g (float[3] x) => (float[3] y, bool[3] m) '
        "{ y, k = Dropout(x) m = Cast<to = 9>(k) }"
    )
    assert op_types(same_bits(model, rule(), {"x": np.ones(3, np.float32)})) == ["Dropout", "Cast"]


@pytest.mark.parametrize("rule", [EliminateIdentities, SimplifyShapes])
def test_statistics_of_batch_norm_have_a_type_of_their_own(rule: type[Pass]) -> None:
    model = parse(
        '<ir_version: 10, opset_import: ["": 15]> g (float[2, 3, 4] x) => (float16[2, 3, 4] y, float16[3] m) '
        "<float[3] s = {1, 1, 1}> { h = Cast<to = 10>(x) y, a, b = BatchNormalization<training_mode = 1>(h, s, s, s, s) "
        "m = Cast<to = 10>(a) }"
    )
    same_bits(model, rule(), {"x": np.ones((2, 3, 4), np.float32)})


def test_loop_keeps_the_empty_inputs_that_it_must_list() -> None:
    model = parse(
        f'{HEAD} g (int64 n) => (int64[k] y) {{ y = Loop(n, "") <body = b (int64 i, bool c) => (bool d, int64 o) '
        "{ d = Identity(c) o = Add(i, i) }> }"
    )
    same_bits(model, EliminateDeadCode(), {"n": np.array(3)})


@pytest.mark.parametrize(
    "body",
    [
        "<int64 w = {9223372036854775807}, int64 o = {1}> { v = Add(w, o) y = Cast<to = 7>(v) }",
        "<int32 w = {1073741824}, int32 o = {4}, int32 z = {1}> { m = Mul(w, o) b = Less(m, z) y = Cast<to = 7>(b) }",
        "<uint64[1] w = {18446744073709551615}> { t = Transpose(w) y = Cast<to = 7>(t) }",
        "<int32[2] w = {1073741824, 4}> { m = ReduceProd<keepdims = 0>(w) y = Cast<to = 7>(m) }",
    ],
)
def test_integers_that_wrap_round(body: str) -> None:
    proto = onnx.parser.parse_model(f"{HEAD} g () => (int64 y) {body}")
    if "uint64" in body:
        proto.graph.output[0].type.tensor_type.shape.dim.add()
    same_bits(ir.from_proto(proto), SimplifyShapes())


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
def test_softmax_over_two_dimensions_isnt_folded(op: str) -> None:
    """ONNX's reference implementation knows the form of opset 13 only."""
    model = parse(
        '<ir_version: 7, opset_import: ["": 12]> g (float[1, 2, 2] x) => (float[1, 2, 2] y) '
        f"<float[1, 2, 2] w = {{1, 2, 3, 4}}> {{ s = {op}<axis = 1>(w) y = Add(x, s) }}"
    )
    assert op in op_types(same_bits(model, FoldConstants(), {"x": np.zeros((1, 2, 2), np.float32)}))


def test_local_response_normalization_isnt_folded() -> None:
    """ONNX's reference implementation sums over other channels at the border."""
    w = np.random.default_rng(0).normal(size=(2, 4, 3, 2)).astype(np.float32)
    model = parse(f"{HEAD} g (float[2, 4, 3, 2] x) => (float[2, 4, 3, 2] y) {{ y = LRN<size = 3>(x) }}")
    x = model.graph.inputs[0]
    model.graph.inputs.clear()
    x.const_value = ir.tensor(w, name="x")
    model.graph.register_initializer(x)
    assert op_types(same_bits(model, FoldConstants())) == ["LRN"]


def test_squeeze_of_an_empty_list_of_axes() -> None:
    """The standard's shape inference removes no axis, ONNX Runtime every one of length 1."""
    proto = onnx.parser.parse_model(
        '<ir_version: 6, opset_import: ["": 11]> g (float[1, 3] x) => (float[n] y) '
        "{ s = Squeeze<axes : ints = []>(x) y = Neg(s) }"
    )
    assert not SimplifyShapes()(ir.from_proto(proto)).modified


# ---- scopes


def test_inlined_names_dont_hide_those_of_later_subgraphs() -> None:
    model = parse(
        f"{CALLS} g (float[3] x, bool c) => (float[3] y) {{ t = local.f(x) y = If(c) <"
        "then_branch = a () => (float[3] p) { h = Abs(t) p = Neg(h) }, "
        "else_branch = b () => (float[3] q) { h_2 = Exp(t) q = Neg(h_2) }> }"
        '<domain: "local", opset_import: ["": 21]> f (a) => (b) { h = Abs(a) b = Exp(h) }'
    )
    for condition in (True, False):
        after = same_bits(model, InlineFunctions(), {"x": np.ones(3, np.float32), "c": np.array(condition)})
        assert op_types(after) == ["Abs", "Exp", "If"]


def test_inlined_loops_dont_hide_names_with_their_inputs() -> None:
    loop = "b = Loop(n, k, a) <body = body (int64 i, bool c, float[3] acc) => (bool d, float[3] o) "
    model = parse(
        f"{CALLS} g (float[3] x, int64 n, bool k) => (float[3] y, float[3] z) "
        "{ i = Abs(x) y = local.f(i, n, k) z = local.f(y, n, k) }"
        f'<domain: "local", opset_import: ["": 21, "local": 1]> f (a, n, k) => (b) {{ {loop}'
        "{ d = Identity(c) o = local.h(acc, n, k) }> }"
        f'<domain: "local", opset_import: ["": 21]> h (a, n, k) => (b) {{ {loop} '
        "{ w = Constant<value_float = 0.5>() d = Identity(c) o = Mul(acc, w) }> }"
    )
    after = same_bits(model, InlineFunctions(), {"x": np.ones(3, np.float32), "n": np.array(2), "k": np.array(True)})
    assert op_types(after) == ["Abs", "Loop", "Loop"]


def test_function_that_passes_an_input_on() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model(
            f"{CALLS} g (float[3] x) => (float[3] y, float[3] z) {{ y, z = local.f(x) }}"
            '<domain: "local", opset_import: ["": 21]> f (a) => (a, b) { b = Neg(a) }'
        )
    )
    InlineFunctions()(model)
    assert [v.name for v in model.graph.inputs] == ["x"]
    assert [v.name for v in model.graph.outputs] == ["y", "z"]
    assert op_types(model) == ["Neg", "Identity"]
    got = outputs(model, {"x": np.ones(3, np.float32)})
    assert [float(o[0]) for o in got] == [1.0, -1.0]


def test_branch_with_initializers_in_a_function() -> None:
    """A function has no initializers, so those of the branch become Constant nodes."""
    model = parse(
        f"{CALLS} g (float[3] x) => (float[3] y) {{ y = local.f(x) }}"
        '<domain: "local", opset_import: ["": 21]> f (a) => (b) { c = Constant<value = bool {1}>() b = If(c) <'
        "then_branch = t () => (float[3] p) <float w = {2}> { p = Mul(a, w) }, "
        "else_branch = e () => (float[3] q) { q = Neg(a) }> }"
    )
    after = same_bits(model, FoldConstants(), {"x": np.ones(3, np.float32)})
    (function,) = after.functions.values()
    assert "If" not in [n.op_type for n in function.graph]
    assert not function.graph.initializers


def test_branch_that_gives_out_its_initializer() -> None:
    model = parse(
        f"{HEAD} g (float[3] x) => (float[3] y, float[3] z) <bool c = {{1}}> {{ y, z = If(c) <"
        "then_branch = t () => (float[3] p, float[3] q) <float[3] w = {1, 2, 3}> { p = Add(x, w) q = Identity(w) }, "
        "else_branch = e () => (float[3] r, float[3] s) { r = Neg(x) s = Neg(x) }> }"
    )
    assert "If" not in op_types(same_bits(model, FoldConstants(), {"x": np.ones(3, np.float32)}))
