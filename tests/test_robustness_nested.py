"""Control flow, functions, sequences, optionals, strings and foreign operators go through the exact recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from roundtrip import ops, text, through

import graphopt
from graphopt.errors import GraphoptError

pytest.importorskip("onnxruntime")

X = {"x": np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)}
IN, OUT = "g (float[2, 3] x", "float[2, 3] y)"

MODELS = {
    # ---- If
    "captured values": f"""{IN}, bool c) => ({OUT} <float two = {{2}}> {{
        h = Identity(x) k = Mul(h, two) dead = Exp(k) m = Neg(x)
        y = If (c) <then_branch = a () => (float[2, 3] r) {{ i = Identity(k) r = Neg(i) }},
                    else_branch = b () => (float[2, 3] q) {{ n = Neg(x) q = Add(n, m) }}> }}""",
    "a branch that passes an outer value on": f"""{IN}, bool c) => ({OUT} {{
        h = Neg(x) y = If (c) <then_branch = a () => (float[2, 3] r) {{ r = Identity(h) }},
                               else_branch = b () => (float[2, 3] q) {{ q = Identity(x) }}> }}""",
    "branches that give constants": f"""{IN}, bool c) => ({OUT} {{
        s = If (c) <then_branch = a () => (float r) <float r = {{1.5}}> {{ }},
                    else_branch = b () => (float q) {{ q = Constant<value_float = 2.5>() }}>
        y = Mul(x, s) }}""",
    "one value twice in a branch": f"""{IN}, bool c) => ({OUT} {{
        u, v = If (c) <then_branch = a () => (float[2, 3] r, float[2, 3] s) {{ r = Neg(x) s = Identity(r) }},
                       else_branch = b () => (float[2, 3] q, float[2, 3] t) {{ q = Exp(x) t = Exp(x) }}>
        y = Add(u, v) }}""",
    "initializers of equal names in both branches": f"""{IN}, bool c) => ({OUT} {{
        y = If (c) <then_branch = a () => (float[2, 3] r) <float[3] w = {{1, 2, 3}}> {{ r = Mul(x, w) }},
                    else_branch = b () => (float[2, 3] q) <float[3] w = {{4, 5, 6}}> {{ q = Mul(x, w) }}> }}""",
    "an initializer that only a subgraph uses": f"""{IN}, bool c) => ({OUT} <float[3] w = {{1, 2, 3}}> {{
        y = If (c) <then_branch = a () => (float[2, 3] r) {{ r = Mul(x, w) }},
                    else_branch = b () => (float[2, 3] q) {{ q = Neg(x) }}> }}""",
    "a constant condition, nested": f"""{IN}, bool c) => ({OUT} <bool t = {{1}}, float[3] w = {{1, 2, 3}}> {{
        h = Neg(x)
        y = If (c) <then_branch = a () => (float[2, 3] r) {{
                r = If (t) <then_branch = a2 () => (float[2, 3] r2) <float[3] w2 = {{3, 2, 1}}> {{ k = Mul(h, w2) r2 = Mul(k, w) }},
                            else_branch = b2 () => (float[2, 3] q2) {{ q2 = Exp(x) }}> }},
                    else_branch = b () => (float[2, 3] q) {{ q = Neg(h) }}> }}""",
    "constant conditions whose branches repeat names": f"""{IN}) => ({OUT} <bool t = {{1}}, bool f = {{0}}> {{
        h = If (t) <then_branch = a () => (float[2, 3] r) {{ k = Neg(x) r = Exp(k) }},
                    else_branch = b () => (float[2, 3] q) {{ q = Neg(x) }}>
        y = If (f) <then_branch = a2 () => (float[2, 3] r) {{ r = Neg(h) }},
                    else_branch = b2 () => (float[2, 3] q) {{ k = Exp(h) q = Identity(k) }}> }}""",
    "a constant condition whose branch passes an input on": f"""{IN}) => ({OUT} <bool t = {{1}}> {{
        y = If (t) <then_branch = a () => (float[2, 3] r) {{ r = Identity(x) }},
                    else_branch = b () => (float[2, 3] q) {{ q = Neg(x) }}> }}""",
    "a branch taken that gives its initializer twice": f"""{IN}) => ({OUT} <bool t = {{1}}> {{
        u, v = If (t) <then_branch = a () => (float[3] r, float[3] s) <float[3] r = {{1, 2, 3}}> {{ s = Identity(r) }},
                       else_branch = b () => (float[3] q, float[3] p) {{ q = Constant<value_floats = [1.0, 1.0, 1.0]>() p = Neg(q) }}>
        m = Mul(x, u) y = Mul(m, v) }}""",
    "what only a dead If captured": f"""{IN}, bool c) => ({OUT} <float[3] w = {{1, 2, 3}}> {{
        h = Mul(x, w) k = Exp(h)
        dead = If (c) <then_branch = a () => (float[2, 3] r) {{ r = Neg(k) }},
                       else_branch = b () => (float[2, 3] q) {{ q = Identity(h) }}>
        y = Neg(x) }}""",
    "branches of different shapes": """g (float[2, 3] x, bool c) => (float[m, n] y, int64[2] s) {
        h = If (c) <then_branch = a () => (float[3, 2] r) { r = Transpose(x) },
                    else_branch = b () => (float[2, 3] q) { q = Neg(x) }>
        s = Shape(h) e = Reshape(h, s) y = Neg(e) }""",
    # ---- Loop and Scan
    "a loop that grows what it carries": """g (float[2, 3] x, int64 n) => (float[k, 3] y, int64[2] s) <bool t = {1}> {
        z = Identity(x)
        y = Loop (n, t, z) <body = b (int64 i, bool c, float[a, 3] v) => (bool d, float[e, 3] w)
            { d = Identity(c) sh = Shape(v) u = Reshape(v, sh) w = Concat<axis = 0>(u, x) }>
        s = Shape(y) }""",
    "a loop with scan outputs and an If in it": """g (float[2, 3] x, int64 n) => (float[2, 3] y, float[m, 2, 3] all) <bool t = {1}, float one = {1}> {
        k = Mul(x, one) neg = Neg(k)
        y, all = Loop (n, t, x) <body = b (int64 i, bool c, float[2, 3] v) => (bool d, float[2, 3] w, float[2, 3] o) <int64 two = {2}, int64 zero = {0}> {
            d = Identity(c) r = Mod(i, two) even = Equal(r, zero)
            w = If (even) <then_branch = p () => (float[2, 3] pw) { pp = Mul(one, v) pw = Add(pp, neg) },
                           else_branch = q () => (float[2, 3] qw) { qn = Neg(k) qw = Sub(v, qn) }>
            o = Identity(v) }> }""",
    "a loop without a trip count": """g (float[2, 3] x) => (float[2, 3] y) <bool t = {1}, float limit = {100}> {
        y = Loop ("", t, x) <body = b (int64 i, bool c, float[2, 3] v) => (bool d, float[2, 3] w)
            { w = Exp(v) m = ReduceMax<keepdims = 0>(w) d = Less(m, limit) }> }""",
    "nested loops": """g (float[2, 3] x, int64 n) => (float[2, 3] y) <bool t = {1}> {
        y = Loop (n, t, x) <body = b (int64 i, bool c, float[2, 3] v) => (bool d, float[2, 3] w) {
            d = Identity(c) k = Neg(v)
            w = Loop (i, c, v) <body = b2 (int64 i2, bool c2, float[2, 3] v2) => (bool d2, float[2, 3] w2)
                { d2 = Identity(c2) k2 = Neg(v) s = Add(k, k2) s2 = Add(s, x) w2 = Add(v2, s2) }> }> }""",
    "a scan": """g (float[2, 3] x, float[3] h) => (float[3] last, float[2, 3] y) <float one = {1}> {
        w = Mul(x, one)
        last, y = Scan<num_scan_inputs = 1, body = b (float[3] s, float[3] v) => (float[3] s2, float[3] o)
            { a = Add(s, v) n = Neg(h) a2 = Mul(a, n) s2 = Identity(a2) o = Identity(a2) }>(h, w) }""",
    # ---- sequences and optionals
    "sequences": """g (float[2, 3] x) => (float[n, 3] y, float[2, 3] first, int64 count) <int64 zero = {0}, int64 one = {1}> {
        i = Identity(x) n = Neg(i) s = SequenceConstruct(i, n) s2 = SequenceInsert(s, x, zero) s3 = SequenceErase(s2, one)
        t = Identity(s3) y = ConcatFromSequence<axis = 0>(t) first = SequenceAt(t, zero) count = SequenceLength(t) }""",
    "a sequence as output": """g (float[4, 3] x) => (seq(float[m, 3]) y, float[a, 3] z) <int64[2] parts = {1, 3}, int64 one = {1}> {
        s = SplitToSequence<axis = 0>(x, parts) y = Identity(s) t = SplitToSequence<axis = 0>(x, parts) z = SequenceAt(t, one) }""",
    "an empty sequence in a loop": """g (float[2, 3] x, int64 n) => (float[k, 3] y) <bool t = {1}> {
        e = SequenceEmpty<dtype = 1>() f = SequenceInsert(e, x)
        s = Loop (n, t, f) <body = b (int64 i, bool c, seq(float[2, 3]) v) => (bool d, seq(float[2, 3]) w)
            { d = Identity(c) k = Neg(x) w = SequenceInsert(v, k) }>
        y = ConcatFromSequence<axis = 0>(s) }""",
    "optionals": """g (float[2, 3] x) => (float[2, 3] y, bool has) {
        i = Identity(x) o = Optional(i) has = OptionalHasElement(o) e = OptionalGetElement(o) y = Neg(e) }""",
    # ---- strings
    "strings": """g (float[2, 3] x) => (float[2, 3] y, string[2] s, bool[2] e) <string[2] a = {"p", "q"}, string[2] b = {"p", "q"}> {
        i = Identity(a) s = StringConcat(i, b) e = Equal(a, b) y = Neg(x) }""",
}


def feeds(proto: onnx.ModelProto) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    result: dict[str, np.ndarray] = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [d.dim_value for d in kind.shape.dim]
        if kind.elem_type == TensorProto.BOOL:
            result[value.name] = np.array(True)
        elif kind.elem_type == TensorProto.INT64:
            result[value.name] = np.array(3)
        else:
            result[value.name] = rng.normal(size=shape).astype(np.float32)
    return result


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str, tmp_path: Path) -> None:
    proto = text(MODELS[name])
    inputs = feeds(proto)
    after = through(proto, tmp_path, inputs)
    if "c" in inputs:
        through(proto, tmp_path, {**inputs, "c": np.array(False)})
    if "constant condition" in name or "branch taken" in name:
        assert ops(after)["If"] == (1 if "nested" in name else 0)
    if "dead If" in name:
        assert ops(after) == {"Neg": 1}


FUNCTIONS = '<ir_version: 10, opset_import: ["" : 21, "local" : 1]>'


def test_functions(tmp_path: Path) -> None:
    """Attributes with and without defaults, calls of calls, an omitted input, the same names everywhere."""
    proto = text(
        """g (float[2, 3] x) => (float[2, 3] y) {
        a = local.leaky<slope = 0.5>(x) b = local.twice(a) c = local.leaky(b) d = Neg(c) y = local.clip(d) }
        <domain: "local", opset_import: ["" : 21]> leaky <slope: float = 0.1> (x) => (y)
        { a = LeakyRelu<alpha: float = @slope>(x) d = Identity(a) y = Neg(d) }
        <domain: "local", opset_import: ["" : 21, "local" : 1]> twice (x) => (y)
        { a = local.leaky<slope = 0.25>(x) y = local.leaky<slope = 0.75>(a) }
        <domain: "local", opset_import: ["" : 21]> clip (x, low, high) => (y) { y = Clip(x, low, high) }
        <domain: "local", opset_import: ["" : 21]> unused (x) => (y) { y = Neg(x) }""",
        FUNCTIONS,
    )
    after = through(proto, tmp_path, X)
    assert not after.functions
    assert ops(after)["LeakyRelu"] == 4


def test_function_called_in_a_subgraph(tmp_path: Path) -> None:
    proto = text(
        """g (float[2, 3] x, bool c) => (float[2, 3] y) <float[3] w = {1, 2, 3}> {
        y = If (c) <then_branch = a () => (float[2, 3] r) { h = local.f(x, w) r = local.f(h, w) },
                    else_branch = b () => (float[2, 3] q) { q = local.f(x, w) }> }
        <domain: "local", opset_import: ["" : 21]> f (x, w) => (y) {
            z = Constant<value = float {0.0}>() s = ReduceSum<keepdims = 0>(x) p = Greater(s, z) h = Mul(x, w)
            y = If (p) <then_branch = a () => (float[2, 3] r) <float[1] k = {2}> { i = Identity(h) r = Mul(i, k) },
                        else_branch = b () => (float[2, 3] q) { q = Neg(h) }> }""",
        FUNCTIONS,
    )
    for condition in (True, False):
        assert not through(proto, tmp_path, {**X, "c": np.array(condition)}).functions


@pytest.mark.parametrize("domain", ["", "ai.onnx"])
def test_function_with_an_opset_of_its_own(domain: str, tmp_path: Path) -> None:
    """ONNX Runtime takes such a file if the domain goes by its short name."""
    proto = text(
        f"""g (float[2, 3] x) => (float[2, 3] y) {{ a = local.f(x) b = Identity(a) y = local.f(b) }}
        <domain: "local", opset_import: ["{domain}" : 17]> f (x) => (y) {{ t = Identity(x) u = Neg(t) y = Exp(u) }}""",
        FUNCTIONS,
    )
    assert not through(proto, tmp_path, X if domain == "" else None).functions


def test_constant_if_in_a_function_that_stays(tmp_path: Path) -> None:
    """Functions have no initializers, so what is moved out of a branch must be a node there."""
    proto = text(
        """g (float[2, 3] x) => (float[2, 3] y) { a = ai.graphopt.f(x) y = Neg(a) }
        <domain: "ai.graphopt", opset_import: ["" : 21]> f (x) => (y) {
            t = Constant<value = bool {1}>()
            y = If (t) <then_branch = a () => (float[2, 3] r) <float[3] k = {1, 2, 3}> { r = Mul(x, k) },
                        else_branch = b () => (float[2, 3] q) { q = Neg(x) }> }""",
        FUNCTIONS.replace("local", "ai.graphopt"),
    )
    after = through(proto, tmp_path, X)
    assert len(after.functions) == 1


def test_onnxruntime_operators(tmp_path: Path) -> None:
    proto = text(
        """g (float[2, 3] x) => (float[2, 3] y) <float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}, float[3] b = {1, 2, 3}> {
        i = Identity(x) m = com.microsoft.FusedMatMul<alpha = 0.5>(i, w) g1 = com.microsoft.BiasGelu(m, b)
        g2 = com.microsoft.BiasGelu(m, b) y = Add(g1, g2) }""",
        '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>',
    )
    # ONNX Runtime's own operators become standard ones; equal calls are one.
    assert ops(through(proto, tmp_path, X)) == {"Gemm": 1, "Gelu": 1, "Add": 1}


def test_unknown_operators_stay(tmp_path: Path) -> None:
    """They may have a state: two equal calls are two calls. ONNX Runtime can't run them, so nothing is verified."""
    body = """g (float[2, 3] x) => (float[2, 3] y) <float[3] w = {1, 2, 3}> {
        i = Identity(x) a = some.Odd<k = 3, s = "t">(i, "", w) b = some.Odd<k = 3, s = "t">(i, "", w) c = some.Constant()
        d = Add(a, b) e = Identity(d) y = some.Even(e, c) }"""
    proto = text(body, '<ir_version: 10, opset_import: ["" : 17, "some" : 2]>')
    after = through(proto, tmp_path, verify="none")
    assert ops(after) == {"Odd": 2, "Constant": 1, "Add": 1, "Even": 1}
    assert list(after.graph.node[0].input) == ["x", "", "w"]
    with pytest.raises(GraphoptError, match="--verify none"):
        graphopt.optimize(tmp_path / "model.onnx")


def test_training_operators(tmp_path: Path) -> None:
    proto = text(
        """g (float r, int64 t, float[2] x, float[2] gr, float[2] h) => (float[2] x2, float[2] h2) {
        i = Identity(gr) x2, h2 = ai.onnx.preview.training.Adagrad<decay_factor = 0.1, epsilon = 0.1, norm_coefficient = 0.1>(r, t, x, i, h) }""",
        '<ir_version: 10, opset_import: ["" : 17, "ai.onnx.preview.training" : 1]>',
    )
    inputs = {k: np.array([1, 2], np.float32) for k in ("x", "gr", "h")}
    through(proto, tmp_path, {"r": np.float32(0.1), "t": np.int64(1), **inputs}, verify="none", reference=True)


def test_batch_normalization_in_training(tmp_path: Path) -> None:
    proto = text(
        # No two constants are equal: ONNX Runtime writes the new statistics over the old ones, and over their twins.
        """g (float[2, 3] x) => (float[2, 3] y) <float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}, float[3] s = {1, 2, 3},
        float[3] b = {1, 2, 1}, float[3] m = {0, 0, 0}, float[3] v = {1, 1, 1}> {
        h = MatMul(x, w) y, m2, v2 = BatchNormalization<training_mode = 1>(h, s, b, m, v) }""",
    )
    assert ops(through(proto, tmp_path, X))["BatchNormalization"] == 1


def test_names_that_hide_outer_ones_are_refused(tmp_path: Path) -> None:
    body = """g (float[2, 3] x, bool c) => (float[2, 3] y) <float[3] w = {1, 2, 3}> { h = Mul(x, w)
        y = If (c) <then_branch = a () => (float[2, 3] r) <float[3] w = {3, 2, 1}> { r = Mul(h, w) },
                    else_branch = b () => (float[2, 3] q) { q = Neg(x) }> }"""
    onnx.save(text(body), tmp_path / "m.onnx")
    with pytest.raises(GraphoptError, match="'w'"):
        graphopt.optimize(tmp_path / "m.onnx")


def test_deep_nesting(tmp_path: Path) -> None:
    """30 Ifs in each other, each with a captured value."""
    inner = "r0 = Neg(x)"
    for depth in range(1, 31):
        inner = f"""i{depth} = Identity(x) n{depth} = Neg(i{depth})
            r{depth} = If (c) <then_branch = a{depth} () => (float[2, 3] r{depth - 1}) {{ {inner} }},
                               else_branch = b{depth} () => (float[2, 3] q{depth}) {{ q{depth} = Exp(n{depth}) }}>"""
    proto = text(f"g (float[2, 3] x, bool c) => (float[2, 3] r30) {{ {inner} }}")
    through(proto, tmp_path, {**X, "c": np.array(True)})


def test_exotic_types(tmp_path: Path) -> None:
    proto = text(
        """g (float[2, 4] x) => (float[2, 2] y, bfloat16[2, 4] h) {
        d = DequantizeLinear<axis = 0, block_size = 2>(w, s) m = MatMul(x, d) y = Identity(m)
        b = Cast<to = 16>(x) t = Mul(b, bf) f = Cast<to = 17>(t) h = Cast<to = 16>(f) }"""
    )
    w = helper.make_tensor("w", TensorProto.INT4, [4, 2], [1, -2, 3, -4, 5, -6, 7, -8])
    bf = helper.make_tensor("bf", TensorProto.BFLOAT16, [4], [1.0, 2.0, 3.0, 4.0])
    proto.graph.initializer.extend([w, bf, numpy_helper.from_array(np.full((2, 2), 0.1, np.float32), "s")])
    rng = np.random.default_rng(0)
    after = through(proto, tmp_path, {"x": rng.normal(size=(2, 4)).astype(np.float32)}, verify="none", reference=True)
    assert {t.data_type for t in after.graph.initializer} == {TensorProto.INT4, TensorProto.BFLOAT16, TensorProto.FLOAT}
