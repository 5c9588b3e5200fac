"""A pre-activation network under `fold-batch-norm`: of each unit only the inner norm has a convolution to go into.

He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks (2016). A unit is BN → ReLU → Conv → BN → ReLU → Conv,
added to its input; its first norm reads the sum of the units before, which nothing may rescale, and feeds an activation.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types

from graphopt.analysis.conv_structures import conv_structures
from graphopt.passes.fold.batch_norm import FoldBatchNorm

UNIT = ["BatchNormalization", "Relu", "Conv", "Relu", "Conv", "Add"]


def network(units: int, projection: bool = False) -> ir.Model:
    """A stem, units of 6 channels, and the last norm and activation; `projection`: the first skip is a Conv."""
    rng = np.random.default_rng(0)
    lines, weights = [], {"stem": (6, 3, 3, 3)}

    def norm(x: str, y: str) -> str:
        for part in ("gain", "shift", "mean", "variance"):
            weights[f"{y}_{part}"] = (6,)
        return f"{y} = BatchNormalization({x}, {y}_gain, {y}_shift, {y}_mean, {y}_variance)"

    lines.append("x0 = Conv<pads = [1,1,1,1]>(x, stem)")
    for i in range(units):
        lines += [norm(f"x{i}", f"first{i}"), f"a{i} = Relu(first{i})", f"p{i} = Conv<pads = [1,1,1,1]>(a{i}, w{i})"]
        lines += [norm(f"p{i}", f"inner{i}"), f"b{i} = Relu(inner{i})", f"q{i} = Conv<pads = [1,1,1,1]>(b{i}, v{i})"]
        weights |= {f"w{i}": (6, 6, 3, 3), f"v{i}": (6, 6, 3, 3)}
        skip = f"x{i}"
        if projection and i == 0:
            lines.append(f"skip = Conv(a{i}, s)")
            weights["s"] = (6, 6, 1, 1)
            skip = "skip"
        lines.append(f"x{i + 1} = Add(q{i}, {skip})")
    lines += [norm(f"x{units}", "last"), "y = Relu(last)"]
    text = f"(float[N,3,H,W] x) => (float[N,6,H,W] y) {{ {' '.join(lines)} }}"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g {text}')
    for node in proto.graph.node:
        node.name = node.output[0]
    for name, shape in weights.items():
        array = rng.uniform(0.5, 2, shape) if "variance" in name else rng.normal(size=shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(np.float32), name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


DIMS = {"N": 2, "H": 5, "W": 6}


def test_only_the_inner_norm_is_folded() -> None:
    rule = FoldBatchNorm()
    after = assert_exact(network(3), rule, dims=DIMS, rtol=1e-6)  # weights are rounded to float32 once
    assert op_types(after) == ["Conv", *UNIT * 3, "BatchNormalization", "Relu"]
    names = [node.name for node in after.graph if node.op_type == "BatchNormalization"]
    assert names == ["first0", "first1", "first2", "last"]


def test_the_reasons() -> None:
    rule = FoldBatchNorm()
    rule(network(2))
    sites = {site.node: (site.outcome, site.detail) for site in rule.sites}
    for i in range(2):
        assert sites[f"inner{i}"] == ("applied", f"folded into Conv 'p{i}' before it")
    # The first unit's norm has a convolution before it, whose output the skip reads too.
    assert sites["first0"] == (
        "left", "before it: 'x0' is read by 2 nodes; behind it: Relu 'a0' has no weights to fold into",
    )  # fmt: skip
    assert sites["first1"] == (
        "left", "before it: no layer; behind it: Relu 'a1' has no weights to fold into",
    )  # fmt: skip
    assert sites["last"][0] == "left"


class FoldFirst(ir.passes.InPlacePass):
    """What a tool does that looks past the skip: the first norm, moved before both readers, goes into the stem."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        norm = next((node for node in model.graph if node.name == "first0"), None)
        if norm is None:
            return ir.passes.PassResult(model, False)
        stem = norm.inputs[0]
        assert stem is not None
        stem.replace_all_uses_with(norm.outputs[0])
        norm.replace_input_with(0, stem)
        return ir.passes.PassResult(model, FoldBatchNorm()(model).modified)


def test_folding_the_first_norm_would_be_wrong() -> None:
    with pytest.raises(AssertionError, match="relative error"):
        assert_exact(network(1), FoldFirst(), dims=DIMS, rtol=1e-6)


def test_a_projection_of_the_activation_frees_the_first_norm() -> None:
    """Where the skip is a convolution of the activated value, as at the start of a stage, only the norm reads x0."""
    after = assert_exact(network(1, projection=True), FoldBatchNorm(), dims=DIMS, rtol=1e-6)
    assert [node.name for node in after.graph if node.op_type == "BatchNormalization"] == ["last"]


def test_the_units_are_recognised() -> None:
    assert [s.kind for s in conv_structures(network(3))] == ["pre-activation residual"] * 3
    folded = network(3)
    FoldBatchNorm()(folded)
    assert [s.kind for s in conv_structures(folded)] == ["pre-activation residual"] * 3
