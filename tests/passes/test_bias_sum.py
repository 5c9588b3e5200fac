"""bias-sum: the bias before a Gelu, by what a profile says."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse
from fake_profiles import Ratio, fake

from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.lower.bias_sum import BiasSum
from graphopt.recipe import load as load_recipe

NUMBERS = ", ".join(["0.5"] * 128)
TEXT = f"""<ir_version: 10, opset_import: ["": 21]>
g (float[b, s, 128] x, float[b, s, 128] r) => (float[b, s, 128] y)
<float[128] c = {{{NUMBERS}}}> {{
  %s
  y = Gelu(a)
}}"""

TO = {"float16": 10, "bfloat16": 16}


def rule(ratio: Ratio | float) -> BiasSum:
    made = BiasSum()
    made.profile = fake("gelu", ratio, alternative="sum")
    return made


def test_by_the_profile() -> None:
    for body in ("a = Add(x, c)", "a = Add(c, x)"):
        assert op_types(assert_exact(parse(TEXT % body), rule(0.8))) == ["Sum", "Gelu"]
        assert op_types(assert_exact(parse(TEXT % body), rule(1.2))) == ["Add", "Gelu"]
    assert op_types(assert_exact(parse(TEXT % "a = Sum(x, c)"), rule(1.2))) == ["Add", "Gelu"]


def test_without_a_profile_nothing() -> None:
    assert not BiasSum()(parse(TEXT % "a = Add(x, c)")).modified


def test_a_profile_without_the_choice_leaves_the_default() -> None:
    made = BiasSum()
    made.profile = fake("siblings", 0.5)
    assert not made(parse(TEXT % "a = Add(x, c)")).modified


def test_at_the_rows_that_the_graph_fixes() -> None:
    def slow_at_one(rows: int, width: int, threads: int) -> float:
        return 1.2 if rows == 1 else 0.8

    text = TEXT % "a = Add(x, c)"
    assert not rule(slow_at_one)(parse(text)).modified
    assert rule(slow_at_one)(parse(text.replace("b, s,", "2, 64,"))).modified
    assert not rule(slow_at_one)(parse(text.replace("b, s,", "1, 1,"))).modified


@pytest.mark.parametrize("body", ["a = Add(x, r)", "a = Mul(x, c)", "a = Sum(x, r, c)"])
def test_no_bias(body: str) -> None:
    made = rule(0.5)
    assert not made(parse(TEXT % body)).modified
    assert made.sites == []


def test_read_elsewhere_or_of_another_kind() -> None:
    read_twice = (TEXT % "a = Add(x, c)").replace("y = Gelu(a)", "g = Gelu(a)\n  y = Mul(g, a)")
    tanh = (TEXT % "a = Add(x, c)").replace("Gelu(a)", 'Gelu <approximate = "tanh"> (a)')
    output = (TEXT % "a = Add(x, c)").replace("128] y)", "128] y, float[b, s, 128] a)")
    double = (TEXT % "a = Add(x, c)").replace("float[", "double[")
    for text in (read_twice, tanh, output, double):
        assert not rule(0.5)(parse(text)).modified


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_types(dtype: str) -> None:
    text = (
        (TEXT % "a = Add(x, k)")
        .replace("float[b", f"{dtype}[b")
        .replace("a = Add", f"k = Cast <to = {TO[dtype]}> (c)  a = Add")
    )
    model = parse(text)
    FoldConstants()(model)
    assert "Cast" not in op_types(model)
    assert not rule(0.5)(model).modified


def test_a_matrix_stays_for_gemm() -> None:
    assert not rule(0.5)(parse((TEXT % "a = Add(x, c)").replace("b, s, 128", "b, 128"))).modified


def test_an_unknown_rank_is_told() -> None:
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        g (float[n] x, int64[k] shape) => (float y)
        <float[128] c = {{{NUMBERS}}}> {{ r = Reshape(x, shape)  a = Add(r, c)  y = Gelu(a) }}"""
    made = rule(0.5)
    assert not made(parse(text)).modified
    assert ["rank" in s.detail for s in made.sites] == [True]


def test_in_a_branch() -> None:
    text = f"""<ir_version: 10, opset_import: ["": 21]>
        g (bool t, float[1, 2, 128] x) => (float[1, 2, 128] y)
        <float[128] c = {{{NUMBERS}}}> {{
            y = If (t) <
                then_branch = p () => (float[1, 2, 128] u) {{ a = Add(x, c)  u = Gelu(a) }},
                else_branch = e () => (float[1, 2, 128] v) {{ v = Neg(x) }}
            >
        }}"""
    after = assert_exact(parse(text), rule(0.5))
    assert "Sum" in [n.op_type for g in after.graph.subgraphs() for n in g]


def test_for_the_cpu_only() -> None:
    recipe = load_recipe({"passes": ["bias-sum"]})
    assert len(recipe.passes("cpu")) == 1
    assert recipe.passes("portable") == []


def test_onnx_runtime_no_longer_fuses_it(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime isn't installed")
    for lower, expected in ((False, "BiasGelu"), (True, "Gelu")):
        model = parse(TEXT % "a = Add(x, c)")
        if lower:
            rule(0.5)(model)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "o.onnx")
        options.log_severity_level = 4
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        session.run(None, {name: np.ones((1, 2, 128), np.float32) for name in ("x", "r")})
        assert expected in [n.op_type for n in ir.load(tmp_path / "o.onnx").graph]


@pytest.mark.real
def test_on_a_real_encoder() -> None:
    import graphopt
    from graphopt.models import catalogue

    names = ["lift-constants", "convert-opset", "fold-constants", "raise-layer-norm", "raise-gelu"]
    recipe = {"passes": [*names, "bias-sum", "residual-sum"]}
    profile = fake("gelu", 0.8, alternative="sum")
    result = graphopt.optimize(catalogue.fetch("paraphrase-minilm"), recipe, profile=profile)
    assert result.report.ok
    applied = {r.name: sum(s.outcome == "applied" for s in r.sites) for r in result.report.run.records if r.round == 1}
    assert applied["bias-sum"] == 3
    assert applied["residual-sum"] == 7


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False])
def test_what_torch_writes(tmp_path, dynamo: bool) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch isn't installed")
    pytest.importorskip("onnxscript", reason="onnxscript isn't installed")
    import warnings

    import graphopt

    net = torch.nn.Sequential(torch.nn.Linear(8, 128), torch.nn.GELU(), torch.nn.Linear(128, 8)).eval()
    path = tmp_path / "mlp.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            torch.onnx.export(net, (torch.randn(2, 5, 8),), dynamo=True, opset_version=20, verbose=False).save(
                str(path)
            )
        else:
            torch.onnx.export(net, (torch.randn(2, 5, 8),), str(path), dynamo=False, opset_version=17)
    recipe = {"passes": ["lift-constants", "convert-opset", "fold-constants", "raise-gelu", "bias-sum"]}
    result = graphopt.optimize(path, recipe, profile=fake("gelu", 0.8, alternative="sum"), verify="pass")
    assert result.report.ok
    assert "Sum" in [n.op_type for n in result.model.graph]
