"""expand-group-norm: an instance normalization of the groups, scale and bias."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse, reference_outputs, to_float64
from fake_profiles import fake

from graphopt.passes.lower.expand_group_norm import ExpandGroupNorm
from graphopt.recipe import load as load_recipe

TEXT = """<ir_version: 10, opset_import: ["": %(opset)d]>
g (%(type)s[n, 4, h, w] x%(inputs)s) => (%(type)s[n, 4, h, w] y)
<%(type)s[4] s = {%(scale)s}, %(type)s[4] b = {%(bias)s}> {
  y = GroupNormalization <num_groups = %(groups)d, epsilon = 0.001> (x, s, b)
}"""
USUAL = {
    "opset": 21, "type": "float", "inputs": "", "scale": "1, 2, 3, 4", "bias": "0, 1, 2, 3", "groups": 2
}  # fmt: skip


def group_norm(**changes: object) -> ir.Model:
    return parse(TEXT % {**USUAL, **changes})


@pytest.mark.parametrize("groups", [1, 2])
def test_groups(groups: int) -> None:
    after = assert_exact(group_norm(groups=groups), ExpandGroupNorm(), dims={"h": 5, "w": 2})
    assert sorted(op_types(after)) == ["Add", "InstanceNormalization", "Mul", "Reshape", "Reshape", "Shape"]
    assert [v.name for v in after.graph.outputs] == ["y"]


def test_one_group_a_channel() -> None:
    after = assert_exact(group_norm(groups=4), ExpandGroupNorm())
    assert op_types(after) == ["InstanceNormalization"]


def test_no_scale_and_no_bias() -> None:
    after = assert_exact(group_norm(scale="1, 1, 1, 1", bias="0, 0, 0, 0"), ExpandGroupNorm())
    assert sorted(op_types(after)) == ["InstanceNormalization", "Reshape", "Reshape", "Shape"]
    after = assert_exact(group_norm(bias="0, 0, 0, 0"), ExpandGroupNorm())
    assert "Mul" in op_types(after)
    assert "Add" not in op_types(after)


def test_scale_and_bias_that_are_computed() -> None:
    before = parse("""<ir_version: 10, opset_import: ["": 21]>
        g (float[2, 4, 3, 3] x, float[4] s, float[4] b) => (float[2, 4, 3, 3] y, float[2, 4, 3, 3] z) {
            y = GroupNormalization <num_groups = 2> (x, s, b)
            z = Relu(y)
        }""")
    after = assert_exact(before, ExpandGroupNorm())
    assert op_types(after).count("Reshape") == 4


def test_three_and_five_axes() -> None:
    for dims in ("2, 4, 6", "2, 4, 2, 3, 2"):
        before = parse(f"""<ir_version: 10, opset_import: ["": 21]>
            g (float[{dims}] x) => (float[{dims}] y)
            <float[4] s = {{1, 2, 3, 4}}, float[4] b = {{4, 3, 2, 1}}> {{
                y = GroupNormalization <num_groups = 2> (x, s, b)
            }}""")
        assert "InstanceNormalization" in op_types(assert_exact(before, ExpandGroupNorm()))


def test_in_a_branch() -> None:
    before = parse("""<ir_version: 10, opset_import: ["": 21]>
        g (bool c, float[1, 4, 2, 2] x, float[4] s) => (float[1, 4, 2, 2] y) {
            y = If (c) <
                then_branch = t () => (float[1, 4, 2, 2] u) { u = GroupNormalization <num_groups = 2> (x, s, s) },
                else_branch = e () => (float[1, 4, 2, 2] v) { v = Neg(x) }
            >
        }""")
    after = assert_exact(before, ExpandGroupNorm())
    inner = [n.op_type for g in after.graph.subgraphs() for n in g]
    assert "InstanceNormalization" in inner
    assert "GroupNormalization" not in inner


@pytest.mark.parametrize(("changes", "reason"), [({"type": "bfloat16"}, "bfloat16"), ({"type": "double"}, "double")])
def test_left_alone(changes: dict[str, object], reason: str) -> None:
    rule = ExpandGroupNorm()
    model = group_norm(**changes)
    assert not rule(model).modified
    assert [reason in s.detail for s in rule.sites] == [True]


def test_scale_by_group() -> None:
    text = """<ir_version: 10, opset_import: ["": 20]>
        g (float[2, 4, 3] x, float[2] s) => (float[2, 4, 3] y) {
            y = GroupNormalization <num_groups = 2> (x, s, s)
        }"""
    model = ir.from_proto(onnx.parser.parse_model(text))  # the checker refuses the operator before opset 21
    rule = ExpandGroupNorm()
    assert not rule(model).modified
    assert "opset" in rule.sites[0].detail


def test_an_unknown_rank() -> None:
    model = parse("""<ir_version: 10, opset_import: ["": 21]>
        g (float[4] x, int64[k] shape, float[4] s) => (float y) {
            r = Reshape(x, shape)
            y = GroupNormalization <num_groups = 2> (r, s, s)
        }""")
    rule = ExpandGroupNorm()
    assert not rule(model).modified
    assert "rank" in rule.sites[0].detail


def test_an_attribute_of_a_function() -> None:
    model = parse("""<ir_version: 10, opset_import: ["": 21, "local": 1]>
        g (float[1, 4, 2] x, float[4] s) => (float[1, 4, 2] y) { y = local.f <k = 2> (x, s) }
        <opset_import: ["": 21], domain: "local">
        f <k> (x, s) => (y) { y = GroupNormalization <num_groups: int = @k> (x, s, s) }""")
    rule = ExpandGroupNorm()
    assert not rule(model).modified
    assert "inline" in rule.sites[0].detail


def test_a_profile_decides() -> None:
    for ratio, changed in ((0.7, False), (1.5, True)):
        rule = ExpandGroupNorm()
        rule.profile = fake("group-norm", ratio)
        assert rule(group_norm()).modified == changed
        assert [s.outcome for s in rule.sites] == ["applied" if changed else "left"]


def test_for_the_cpu_only() -> None:
    recipe = load_recipe({"passes": ["expand-group-norm"]})
    assert len(recipe.passes("cpu")) == 1
    assert recipe.passes("portable") == recipe.passes("cuda") == []


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_onnx_runtime_agrees(offset: float) -> None:
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime isn't installed")
    before = group_norm()
    after = before.clone()
    ExpandGroupNorm()(after)
    x = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32) + np.float32(offset)
    exact = reference_outputs(to_float64(before), {"x": x.astype(np.float64)})[0]
    errors = []
    for model in (before, after):
        data = ir.to_proto(model).SerializeToString()
        result = ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        errors.append(np.abs(result - exact).max())
    # ONNX Runtime's own definition takes the variance as a difference of squares and loses digits beside an offset.
    assert errors[1] <= max(1e-5, errors[0])
    assert errors[1] < 1e-4


@pytest.mark.export
def test_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch isn't installed")
    pytest.importorskip("onnxscript", reason="onnxscript isn't installed")
    import graphopt

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 16, 3)
            self.norm = torch.nn.GroupNorm(4, 16)

        def forward(self, x):
            return torch.nn.functional.silu(self.norm(self.conv(x)))

    path = tmp_path / "block.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            Block().eval(), (torch.randn(1, 3, 16, 16),), dynamo=True, opset_version=23, verbose=False
        )
    program.save(str(path))
    assert "GroupNormalization" in [n.op_type for n in onnx.load(path).graph.node]
    result = graphopt.optimize(path, {"passes": ["expand-group-norm"]}, verify="pass")
    assert result.report.ok
    assert result.report.run.verdict is not None
    operators = [n.op_type for n in result.model.graph]
    assert "GroupNormalization" not in operators
    assert "InstanceNormalization" in operators
