"""layer-norm-to-rms-norm: exact on centred streams, refused where the mean is seen."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse_weighted, to_float64
from tiny_transformers import exported, feeds

import graphopt
from graphopt.graph import load
from graphopt.pass_manager import PassManager
from graphopt.passes.fold.centring import centred
from graphopt.passes.fold.layer_norm_to_rms_norm import LayerNormToRmsNorm
from graphopt.recipe import load as load_recipe

HEAD = '<ir_version: 10, opset_import: ["": 23]>'
WEIGHTS = (
    "<float[9, 4] table, float[5, 4] positions, float[4, 4] w, float[4] b, float[4] g, float[4] beta, float[4, 3] head>"
)
BLOCK = """
    e = Gather(table, ids)
    s0 = Add(e, positions)
    n = LayerNormalization <axis = -1, epsilon = 0.1> (s0, g, beta)
    a = Relu(n)
    m = MatMul(a, w)
    mb = Add(m, b)
    s1 = Add(s0, mb)
    f = LayerNormalization <axis = -1> (s1, g)
"""


def block(end: str, outputs: str = "float[2, 5, 3] y", body: str = BLOCK, inputs: str = "int64[2, 5] ids") -> ir.Model:
    return to_float64(parse_weighted(f"{HEAD} g ({inputs}) => ({outputs}) {WEIGHTS} {{ {body} {end} }}"))


def test_a_pre_norm_block() -> None:
    rule = LayerNormToRmsNorm()
    after = assert_exact(block("y = MatMul(f, head)"), rule)
    assert op_types(after) == [
        "Gather", "Add", "RMSNormalization", "Add", "Relu", "MatMul", "Add", "Add", "RMSNormalization", "MatMul",
    ]  # fmt: skip
    for name in ("table", "positions", "w", "b"):
        array = after.graph.initializers[name].const_value.numpy()
        np.testing.assert_allclose(array.mean(axis=-1), 0, atol=1e-15)


def test_a_bias_that_would_stay() -> None:
    rule = LayerNormToRmsNorm(add_bias=False)
    after = assert_exact(block("y = MatMul(f, head)"), rule)
    assert "LayerNormalization" in op_types(after)
    assert all("would stay as an Add" in site.detail for site in rule.sites)


@pytest.mark.parametrize(
    ("end", "outputs", "reason"),
    [
        ("y = MatMul(s1, head)", "float[2, 5, 3] y", "the mean of 's1' is seen by MatMul"),
        ("y = MatMul(f, head)", "float[2, 5, 3] y, float[2, 5, 4] s1", "an output of the graph"),
        ("r = RMSNormalization <axis = -1> (s1, g) y = Add(f, r)", "float[2, 5, 4] y", "seen by RMSNormalization"),
        ("t = Transpose <perm = [1, 0, 2]> (s1) y = Relu(t)", "float[5, 2, 4] y, float[2, 5, 4] f", "seen by Relu"),
    ],
)
def test_a_mean_that_is_seen(end: str, outputs: str, reason: str) -> None:
    rule = LayerNormToRmsNorm()
    after = assert_exact(block(end, outputs), rule)
    assert op_types(after).count("LayerNormalization") == 2
    assert len(rule.sites) == 2
    assert all(reason in site.detail for site in rule.sites)


def test_post_norm_is_refused() -> None:
    body = """
        e = Gather(table, ids)
        n = LayerNormalization <axis = -1> (e, g, beta)
        m = MatMul(n, w)
        s = Add(n, m)
        f = LayerNormalization <axis = -1> (s, g)
        m2 = MatMul(f, w)
        s2 = Add(f, m2)
    """
    rule = LayerNormToRmsNorm(min_norms=1)
    end = "f2 = LayerNormalization <axis = -1> (s2, g) y = MatMul(f2, head)"
    after = assert_exact(block(end, body=body), rule)
    # The embedding's norm alone reads a stream of constants; the others read what linear layers read too.
    assert [s.outcome for s in rule.sites].count("left") == 2
    assert op_types(after).count("LayerNormalization") == 2
    rule = LayerNormToRmsNorm()
    assert not rule(block(end, body=body)).modified


def test_a_tied_table_is_centred_at_run_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.passes.fold.centring.COPIED_BYTES", 0)
    body = (
        BLOCK
        + """
        s2 = Add(s1, mb)
        f1 = LayerNormalization <axis = -1> (s2, g)
        f2 = LayerNormalization <axis = -1> (s0, g)
        f3 = Add(f1, f2)
        tied = Transpose <perm = [1, 0]> (table)
    """
    )
    before = block("y = MatMul(f3, tied)", "float[2, 5, 9] y, float[2, 5, 4] f", body=body)
    after = assert_exact(before, LayerNormToRmsNorm())
    assert op_types(after).count("RMSNormalization") == 4
    assert op_types(after).count("ReduceMean") == 1
    np.testing.assert_array_equal(
        after.graph.initializers["table"].const_value.numpy(), before.graph.initializers["table"].const_value.numpy()
    )


def test_a_writer_that_no_constant_makes() -> None:
    body = BLOCK.replace("e = Gather(table, ids)", "e = Sigmoid(x)")
    rule = LayerNormToRmsNorm()
    after = assert_exact(block("y = MatMul(f, head)", body=body, inputs="float[2, 5, 4] x"), rule)
    assert "LayerNormalization" in op_types(after)
    assert "Sigmoid" in rule.sites[0].detail
    assert "at run time, for 2 norms" in rule.sites[0].detail


def test_a_bias_that_someone_else_reads() -> None:
    end = "h = MatMul(f, head) y = Add(f, b)"
    before = block(end, "float[2, 5, 4] y, float[2, 5, 3] h")
    after = assert_exact(before, LayerNormToRmsNorm())
    assert op_types(after).count("RMSNormalization") == 2
    np.testing.assert_array_equal(
        after.graph.initializers["b"].const_value.numpy(), before.graph.initializers["b"].const_value.numpy()
    )


def test_a_large_table_that_someone_else_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.passes.fold.centring.COPIED_BYTES", 0)
    rule = LayerNormToRmsNorm()
    assert not rule(block("h = MatMul(f, head) y = Add(f, b)", "float[2, 5, 4] y, float[2, 5, 3] h")).modified
    assert "'b' is shared with Add" in rule.sites[0].detail


def test_patches_class_token_and_gemm() -> None:
    text = f"""{HEAD} g (float[2, 3, 8, 8] image) => (float[10, 4] y)
        <float[4, 3, 4, 4] k, float[4] kb, float[1, 1, 4] token, int64[3] to = {{2, 4, 4}}, float[4] g, float[4, 4] w,
         float[4] b, int64[2] flat = {{10, 4}}, int64[3] back = {{2, 5, 4}}, int64[3] grow = {{2, 1, 4}}> {{
        p = Conv <strides = [4, 4]> (image, k, kb)
        r = Reshape(p, to)
        t = Transpose <perm = [0, 2, 1]> (r)
        c = Expand(token, grow)
        s0 = Concat <axis = 1> (c, t)
        n = LayerNormalization <axis = 2> (s0, g)
        f = Reshape(n, flat)
        m = Gemm <transB = 1> (f, w, b)
        mr = Reshape(m, back)
        s1 = Add(s0, mr)
        n1 = LayerNormalization <axis = -1> (s1, g)
        y = Reshape(n1, flat)
    }}"""
    after = assert_exact(to_float64(parse_weighted(text)), LayerNormToRmsNorm())
    assert op_types(after).count("RMSNormalization") == 2
    assert "ReduceMean" not in op_types(after)


def test_a_grouped_convolution_is_refused() -> None:
    text = f"""{HEAD} g (float[2, 4, 8] x) => (float[2, 8, 4] y) <float[4, 2, 1] k, float[4] g> {{
        p = Conv <group = 2> (x, k)
        t = Transpose <perm = [0, 2, 1]> (p)
        a = LayerNormalization <axis = -1> (t, g)
        b = LayerNormalization <axis = -1, epsilon = 0.1> (t, g)
        y = Add(a, b)
    }}"""
    rule = LayerNormToRmsNorm()
    assert not rule(to_float64(parse_weighted(text))).modified
    assert "is grouped" in rule.sites[0].detail


def test_old_opset_and_used_statistics() -> None:
    model = block("y = MatMul(f, head)")
    model.graph.opset_imports[""] = 21
    rule = LayerNormToRmsNorm()
    assert not rule(model).modified
    assert "needs opset 23" in rule.sites[0].detail
    body = BLOCK.replace("f = Layer", "f, mean = Layer")
    rule = LayerNormToRmsNorm()
    assert not rule(block("y = MatMul(f, head)", "float[2, 5, 3] y, float[2, 5, 1] mean", body=body)).modified
    assert "gives out is used" in rule.sites[0].detail


def test_inside_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.passes.fold.centring.COPIED_BYTES", 0)
    inner = BLOCK.replace("\n", " ")
    text = f"""{HEAD} g (bool c, int64[2, 5] ids) => (float[2, 5, 4] y) {WEIGHTS} {{
        y = If (c) <
            then_branch = t () => (float[2, 5, 4] u) {{ {inner} u = Neg(f) }},
            else_branch = e () => (float[2, 5, 4] v) {{ v = Gather(table, ids) }}
        >
    }}"""
    rule = LayerNormToRmsNorm()
    model = to_float64(parse_weighted(text))
    for seed in (0, 1):
        given = {"c": np.array(bool(seed)), "ids": np.arange(10).reshape(2, 5) % 9}
        assert_exact(model, rule, feeds=given, seeds=1)
    # The other branch reads the table, which therefore stays, and 2 norms don't pay for centring it at run time.
    assert "at run time" in rule.sites[0].detail


@pytest.mark.parametrize("axis", [-1, -2, -3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_centred(axis: int, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.graph.computed.LAZY_BYTES", 0)
    monkeypatch.setattr("graphopt.passes.fold.layers._CHUNK", 7)
    array = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(dtype)
    tensor = centred(ir.tensor(array, name="t"), axis)
    assert isinstance(tensor, ir.LazyTensor)
    wide = array.astype(np.float64)
    np.testing.assert_array_equal(tensor.numpy(), (wide - wide.mean(axis=axis, keepdims=True)).astype(dtype))
    uniform = centred(ir.tensor(np.full((3, 1), 2, dtype)), -1)
    assert not uniform.numpy().any()


BEFORE = (
    "inline-functions",
    "lift-constants",
    "simplify-shapes",
    "convert-opset",
    "fold-constants",
    "raise-layer-norm",
)


@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "exporter", "norms"),
    [("gpt2", "dynamo", 7), ("opt", "dynamo", 7), ("vit", "dynamo", 7), ("whisper", "dynamo", 14),
     ("gpt2", "torchscript", 7), ("opt", "torchscript", 7), ("vit", "torchscript", 7), ("neox", "torchscript", 7)],
)  # fmt: skip
def test_transformers_are_exact_in_float64(name: str, exporter: str, norms: int) -> None:
    model = load(exported(name, exporter))
    PassManager([p for p in load_recipe().passes() if getattr(p, "name", "") in BEFORE], verify="none")(model)
    double = to_float64(model)
    inputs = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in feeds(name).items()}
    after = assert_exact(double, LayerNormToRmsNorm(), feeds=inputs, seeds=1)
    assert op_types(after).count("RMSNormalization") == norms
    assert "LayerNormalization" not in op_types(after)


@pytest.mark.export
def test_bert_is_refused() -> None:
    model = load(exported("bert", "torchscript"))
    PassManager(load_recipe().passes(), verify="none")(model)
    rule = LayerNormToRmsNorm()
    assert not rule(model).modified
    assert sum("is seen by MatMul" in site.detail for site in rule.sites) == 6


@pytest.mark.export
def test_in_onnx_runtime() -> None:
    passes = [*BEFORE, "layer-norm-to-rms-norm"]
    result = graphopt.optimize(exported("whisper", "dynamo"), recipe={"passes": passes}, verify="pass")
    assert result.report.ok
    assert result.report.run.verdict is not None
    assert result.report.run.verdict.ok
    assert op_types(result.model).count("RMSNormalization") == 14
