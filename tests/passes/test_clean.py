"""The clean-up passes: structure changes, numbers don't, and what must stay stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse, reference_outputs

from graphopt.graph.constants import constant_array
from graphopt.passes.clean.deduplicate_initializers import DeduplicateInitializers
from graphopt.passes.clean.eliminate_common_subexpressions import EliminateCommonSubexpressions
from graphopt.passes.clean.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.clean.eliminate_identities import EliminateIdentities
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.clean.inline_functions import InlineFunctions
from graphopt.passes.clean.lift_constants import LiftConstants

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def left(pass_: object) -> list[str]:
    return [s.detail for s in pass_.sites if s.outcome == "left"]


# ---- lift-constants, inline-functions, dead code


def test_lift_constants() -> None:
    model = parse(f"{HEAD} g (float[3] x) => (float[3] y) {{ c = Constant<value_float = 2.0>() y = Mul(x, c) }}")
    after = assert_exact(model, LiftConstants())
    assert [n.op_type for n in after.graph] == ["Mul"]


def test_constant_output_stays_a_node() -> None:
    model = parse(f"{HEAD} g () => (float y) {{ y = Constant<value_float = 2.0>() }}")
    assert [n.op_type for n in assert_exact(model, LiftConstants()).graph] == ["Constant"]


FUNCTION = """
<ir_version: 10, opset_import: ["": 21, "local": 1]>
g (float[3] x) => (float[3] y) { y = local.twice(x) }
<domain: "local", opset_import: ["": %d]> twice (a) => (b) { b = Add(a, a) }
"""


def test_inline_functions() -> None:
    after = assert_exact(parse(FUNCTION % 21), InlineFunctions())
    assert op_types(after) == ["Add"]
    assert not after.functions


def test_function_of_another_opset_stays() -> None:
    pass_ = InlineFunctions()
    after = assert_exact(parse(FUNCTION % 17), pass_)
    assert op_types(after) == ["twice"]
    assert "opset 17" in left(pass_)[0]


def test_dead_code() -> None:
    model = parse(
        f"{HEAD} g (float[3] x, float[3] unused) => (float[3] y) <float[1] w = {{1}}> {{ d = Add(x, w) y = Neg(x) }}"
    )
    after = assert_exact(model, EliminateDeadCode())
    assert op_types(after) == ["Neg"]
    assert not after.graph.initializers
    assert [v.name for v in after.graph.inputs] == ["x", "unused"]


# ---- deduplicate-initializers


def test_deduplicate() -> None:
    model = parse(
        f"{HEAD} g (float[2] x) => (float[2] y) <float[2] a = {{1, 2}}, float[2] b = {{1, 2}}, float[1, 2] c = {{1, 2}}>"
        "{ p = Add(x, a) q = Mul(p, b) r = Add(q, c) y = Squeeze(r) }"
    )
    after = assert_exact(model, DeduplicateInitializers())
    assert sorted(after.graph.initializers) == ["a", "c"]


def test_equal_ends_but_different_middle_is_kept() -> None:
    model = parse(f"{HEAD} g (float[4, 4096] x) => (float[4, 4096] y) {{ y = Neg(x) }}")
    for name, middle in (("a", 1.0), ("b", 2.0), ("c", 1.0)):
        array = np.zeros(10_000, np.float32)
        array[5_000] = middle
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        model.graph.register_initializer(value)
        model.graph.append(ir.node("ReduceSum", [value], name=f"use_{name}"))
    DeduplicateInitializers()(model)
    assert sorted(model.graph.initializers) == ["a", "b"]


def test_overridable_initializers_stay_apart() -> None:
    proto = onnx.parser.parse_model(
        f"{HEAD} g (float[2] x, float[2] a) => (float[2] y) <float[2] b = {{1, 2}}> {{ p = Add(x, a) y = Add(p, b) }}"
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 2], np.float32), "a"))
    model = ir.from_proto(proto)
    assert not DeduplicateInitializers()(model).modified


# ---- eliminate-identities


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("h = Identity(x) y = Neg(h)", ["Neg"]),
        ("h = Neg(x) y = Identity(h)", ["Neg"]),
        ("y = Identity(x)", ["Identity"]),  # an input can't take the name of an output
        ("h = Neg(x) y = Cast<to = 1>(h)", ["Neg"]),
        ("h = Neg(x) y = Sum(h)", ["Neg"]),
        ("h = Neg(x) y = Concat<axis = 0>(h)", ["Neg"]),
        ("h = Neg(x) y = Mul(h, one)", ["Neg"]),
        ("h = Neg(x) y = Mul(one, h)", ["Neg"]),
        ("h = Neg(x) y = Div(h, one)", ["Neg"]),
        ("h = Neg(x) y = Sub(h, zero)", ["Neg"]),
        ("h = Neg(x) y = Div(one, h)", ["Neg", "Div"]),
        ("h = Neg(x) y = Add(h, zero)", ["Neg", "Add"]),  # -0 + 0 is +0
        ("h = Neg(x) y = Add(h, tiny)", ["Neg", "Add"]),
        ("h = Neg(x) y = Mul(h, near)", ["Neg", "Mul"]),
        ("h = Neg(x) y = Dropout(h)", ["Neg"]),
        (
            "h = Neg(x) t = Constant<value_float = 0.5>() b = Cast<to = 9>(t) y = Dropout(h, t, b)",
            ["Neg", "Cast", "Dropout"],
        ),
    ],
)
def test_identities(body: str, expected: list[str]) -> None:
    model = parse(
        f"{HEAD} g (float[2, 3] x) => (float[2, 3] y) "
        f"<float one = {{1}}, float zero = {{0}}, float tiny = {{0.0000000001}}, float near = {{1.000001}}> {{ {body} }}"
    )
    if "Dropout(h, t" in body:
        EliminateIdentities()(model)
        assert op_types(model) == expected
        return
    assert op_types(assert_exact(model, EliminateIdentities())) == expected


@pytest.mark.parametrize(
    ("inputs", "body", "expected"),
    [
        ("float[2] x, int64[1] l", "h = CastLike(x, l) y = Neg(h)", ["Cast", "Neg"]),
        ("int64[2] x, int64[1] l", "h = CastLike(x, l) y = Neg(h)", ["Neg"]),
    ],
)
def test_cast_like(inputs: str, body: str, expected: list[str]) -> None:
    model = parse(f"{HEAD} g ({inputs}) => (int64[2] y) {{ {body} }}")
    assert op_types(assert_exact(model, EliminateIdentities())) == expected


def test_one_that_broadcasts_stays() -> None:
    model = parse(f"{HEAD} g (float[3] x) => (float[1, 3] y) <float[1, 1] one = {{1}}> {{ y = Mul(x, one) }}")
    assert op_types(assert_exact(model, EliminateIdentities())) == ["Mul"]


def test_identity_of_an_outer_value_in_a_branch_stays() -> None:
    model = parse(
        f"{HEAD} g (float[3] x, bool c) => (float[3] y) {{ h = Neg(x) y = If(c) <"
        "then_branch = t () => (float[3] p) { p = Identity(h) }, else_branch = e () => (float[3] q) { q = Abs(h) }> }"
    )
    after = assert_exact(model, EliminateIdentities())
    assert op_types(after) == ["Neg", "If"]


def test_two_outputs_of_one_value_keep_their_names() -> None:
    model = parse(f"{HEAD} g (float[3] x) => (float[3] y, float[3] z) {{ h = Neg(x) y = Identity(h) z = Identity(h) }}")
    after = assert_exact(model, EliminateIdentities())
    assert [v.name for v in after.graph.outputs] == ["y", "z"]


# ---- eliminate-common-subexpressions


def test_common_subexpressions() -> None:
    model = parse(
        f"{HEAD} g (float[3] x) => (float[3] y) <float one = {{1}}, float uno = {{1}}>"
        "{ a = Neg(x) b = Neg(x) p = Add(a, one) q = Add(b, uno) y = Mul(p, q) }"
    )
    assert op_types(assert_exact(model, EliminateCommonSubexpressions())) == ["Neg", "Add", "Mul"]


def test_subgraph_uses_what_the_outer_graph_computed() -> None:
    model = parse(
        f"{HEAD} g (float[3] x, bool c) => (float[3] y, float[3] h) {{ h = Exp(x) y = If(c) <"
        "then_branch = t () => (float[3] p) { i = Exp(x) p = Neg(i) }, else_branch = e () => (float[3] q) { q = Abs(x) }> }"
    )
    after = assert_exact(model, EliminateCommonSubexpressions())
    branch = next(n for n in after.graph if n.op_type == "If").attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch] == ["Neg"]


@pytest.mark.parametrize("body", [
    "a = RandomNormal<shape = [3]>() b = RandomNormal<shape = [3]>() p = Add(a, b) y = Add(p, x)",
    "h = Sigmoid(x) a = Bernoulli(h) b = Bernoulli(h) y = Add(a, b)",
    "a = custom.Draw(x) b = custom.Draw(x) y = Add(a, b)",
])  # fmt: skip
def test_draws_are_never_merged(body: str) -> None:
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 21, "custom": 1]> g (float[3] x) => (float[3] y) {{ {body} }}'
    )
    model = ir.from_proto(proto)
    assert not EliminateCommonSubexpressions()(model).modified


def test_zeros_of_different_sign_are_different() -> None:
    model = parse(
        f"{HEAD} g (float[3] x) => (float[3] y) {{ a = LeakyRelu<alpha = 0.0>(x) b = LeakyRelu<alpha = -0.0>(x)"
        " c = LeakyRelu<alpha = 0.0>(x) p = Div(x, a) q = Div(x, b) r = Sub(p, q) y = Sub(r, c) }"
    )
    after = model.clone()
    assert EliminateCommonSubexpressions()(after).modified
    assert op_types(after).count("LeakyRelu") == 2


def test_equal_identities_of_outputs_stay() -> None:
    """Each could only become an Identity of another output."""
    text = f"{HEAD} g (float[3] x) => (float[3] a, float[3] b) {{ a = Identity(x) b = Identity(x) }}"
    assert not EliminateCommonSubexpressions()(parse(text)).modified


def test_both_copies_are_outputs() -> None:
    model = parse(f"{HEAD} g (float[3] x) => (float[3] y, float[3] z) {{ y = Exp(x) z = Exp(x) }}")
    after = assert_exact(model, EliminateCommonSubexpressions())
    assert op_types(after) == ["Exp", "Identity"]
    assert [v.name for v in after.graph.outputs] == ["y", "z"]


# ---- fold-constants


def test_fold() -> None:
    model = parse(
        f"{HEAD} g (float[3] x) => (float[3] y) <float[3] a = {{1, 2, 3}}, float[3] b = {{4, 5, 6}}>"
        "{ s = Mul(a, b) t = Sqrt(s) y = Add(x, t) }"
    )
    after = assert_exact(model, FoldConstants(), rtol=1e-7)  # the folded constant is rounded to float32 once
    assert op_types(after) == ["Add"]
    np.testing.assert_allclose(
        constant_array(next(iter(after.graph.initializers.values()))), np.sqrt([4, 10, 18]), rtol=1e-7
    )


def test_epsilon_of_a_logarithm_survives() -> None:
    model = parse(f"{HEAD} g (float[3] x) => (float[3] y) <float e = {{0.0000000001}}> {{ h = Add(x, e) y = Log(h) }}")
    for pass_ in (FoldConstants(), EliminateIdentities()):
        after = assert_exact(model, pass_)
        assert np.isfinite(reference_outputs(after, {"x": np.zeros(3, np.float32)})[0]).all()


def test_constants_do_not_blow_the_file_up() -> None:
    model = parse(
        f"{HEAD} g (float[1] x) => (float[1000, 1000] y) <float a = {{1}}, int64[2] s = {{1000, 1000}}>"
        "{ big = Expand(a, s) y = Add(x, big) }"
    )
    pass_ = FoldConstants()
    assert not pass_(model).modified
    assert "larger" in left(pass_)[0]
    assert FoldConstants(max_bytes=5_000_000)(model).modified


def test_absurd_size_is_never_computed() -> None:
    model = parse(
        f"{HEAD} g (float[1] x) => (float[1] y) <int64[2] s = {{1000000, 1000000}}>"
        "{ big = ConstantOfShape(s) r = ReduceMax<keepdims = 0>(big) y = Add(x, r) }"
    )
    assert not FoldConstants()(model).modified


@pytest.mark.parametrize("body", [
    "a = RandomUniform<shape = [3]>() y = Add(a, x)",
    "a = RandomUniformLike(w) y = Add(a, x)",
    "a = Bernoulli(w) y = Add(a, x)",
])  # fmt: skip
def test_random_is_never_folded(body: str) -> None:
    model = parse(f"{HEAD} g (float[3] x) => (float[3] y) <float[3] w = {{0.5, 0.5, 0.5}}> {{ {body} }}")
    assert not FoldConstants()(model).modified


def test_quantized_weights_stay_quantized() -> None:
    model = parse(
        f"{HEAD} g (float[3] x) => (float[3] y) <int8[3] w = {{1, 2, 3}}, float s = {{0.5}}>"
        "{ d = DequantizeLinear(w, s) y = Mul(x, d) }"
    )
    assert not FoldConstants()(model).modified


def test_large_results_are_lazy() -> None:
    weights = np.random.default_rng(0).normal(size=(1024, 512)).astype(np.float32)
    model = parse(f"{HEAD} g (float[2, 512] x) => (float[2, 1024] y) {{ t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t) }}"
                  .replace("=> (", "=> (").replace("x)", "x, float[1024, 512] w)", 1))  # fmt: skip
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(weights, name="w")
    model.graph.register_initializer(value)
    assert FoldConstants()(model).modified
    assert op_types(model) == ["MatMul"]
    (folded,) = model.graph.initializers.values()
    assert isinstance(folded.const_value, ir.LazyTensor)
    np.testing.assert_array_equal(folded.const_value.numpy(), weights.T)


def test_constant_if_is_inlined() -> None:
    model = parse(
        f"{HEAD} g (float[3] x) => (float[3] y) <bool c = {{1}}> {{ h = Neg(x) y = If(c) <"
        "then_branch = t () => (float[3] p) <float[3] w = {1, 2, 3}> { i = Exp(h) p = Mul(i, w) },"
        "else_branch = e () => (float[3] q) { q = Abs(h) }> }"
    )
    after = assert_exact(model, FoldConstants())
    assert op_types(after) == ["Neg", "Exp", "Mul"]
    assert after.graph.outputs[0].name == "y"


def test_if_that_passes_an_outer_value_on() -> None:
    model = parse(
        f"{HEAD} g (float[3] x) => (float[3] y) <bool c = {{0}}> {{ h = Neg(x) k = If(c) <"
        "then_branch = t () => (float[3] p) { p = Exp(h) }, else_branch = e () => (float[3] q) { q = Identity(h) }>"
        " y = Abs(k) }"
    )
    after = assert_exact(model, FoldConstants())
    assert op_types(after) == ["Neg", "Identity", "Abs"]
