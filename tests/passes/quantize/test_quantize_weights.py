"""quantize-weights: what is written for which matrix, that it computes with the rounded numbers, and what stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import op_types, parse_weighted

import graphopt
from graphopt.passes.quantize.grids import UniformGrid
from graphopt.passes.quantize.packing import packed_bytes
from graphopt.passes.quantize.quantize_weights import QuantizeWeights
from graphopt.passes.quantize.roundings import round_to_nearest
from graphopt.passes.quantize.setting import Setting
from graphopt.runtime_ops.memory_session import make_session
from graphopt.runtime_ops.operator import uses

HEAD = '<ir_version: 10, opset_import: ["": 21]>\n'
ONE = HEAD + "g (float[batch, 64] x) => (float[batch, 48] y) <float[64, 48] w> { z = MatMul(x, w)  y = Abs(z) }"
"""The Abs makes no head of it."""
GATED = (
    HEAD
    + """g (float[batch, seq, 64] x) => (float[batch, seq, 64] y)
<float[64, 96] gate, float[64, 96] up, float[96, 64] down> {
  a = MatMul(x, gate)
  s = Sigmoid(a)
  act = Mul(a, s)
  b = MatMul(x, up)
  h = Mul(act, b)
  y = MatMul(h, down)
}"""
)
TIED = (
    HEAD
    + """g (int64[batch, seq] ids) => (float[batch, seq, 80] logits) <float[80, 64] table> {
  x = Gather(table, ids)
  turned = Transpose<perm = [1, 0]>(table)
  t = Tanh(x)
  logits = MatMul(t, turned)
}"""
)


def weight_of(model: ir.Model, name: str) -> Any:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def run(model: ir.Model, **feeds: Any) -> Any:
    return make_session(model).run(None, feeds)[0]


def rounded(weight: Any, **options: Any) -> Any:
    """What a MatMul [K, N] computes with when it is rounded by groups of its inputs."""
    group = options.pop("group_size", 32) or weight.shape[0]
    grid = UniformGrid(options.pop("bits", 4), **{"search": True, **options})
    return round_to_nearest(np.ascontiguousarray(weight.T), grid, group).dequantized().T


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", [{}, {"symmetric": False}, {"symmetric": False, "floats": True}])
@pytest.mark.parametrize("operator", ["contrib", "graphopt", "standard"])
def test_a_product_computes_with_the_rounded_weight(bits: int, kind: dict[str, bool], operator: str) -> None:
    model = parse_weighted(ONE)
    w = weight_of(model, "w")
    x = np.random.default_rng(1).standard_normal((5, 64)).astype(np.float32)
    changed = QuantizeWeights(bits=bits, operator=operator, level=0, **kind).call(model).modified
    if operator == "standard" and (bits == 2 or "floats" in kind):
        assert not changed
        return
    assert changed
    # Rounding of activations (none, 16 bits, or 8 bits where level 0 has no kernel for the width) is all that differs.
    tolerance = {"contrib": 2e-2 if bits == 2 else 1e-4, "graphopt": 2e-3, "standard": 2e-2}[operator]
    want = np.abs(x @ rounded(w, bits=bits, **kind))
    assert np.abs(run(model, x=x) - want).max() <= tolerance * np.abs(want).max()
    assert "w" not in model.graph.initializers


def test_what_is_written() -> None:
    model = parse_weighted(ONE)
    assert QuantizeWeights().call(model).modified
    assert op_types(model) == ["Cast", "MatMulNBits", "Abs"]
    (node,) = [n for n in model.graph if n.op_type == "MatMulNBits"]
    assert {k: a.value for k, a in node.attributes.items()} == {
        "K": 64, "N": 48, "bits": 4, "block_size": 32, "accuracy_level": 4,
    }  # fmt: skip
    sizes = {v.dtype: tuple(v.shape or ()) for v in model.graph.initializers.values()}
    assert sizes == {ir.DataType.UINT8: (48, 2, 16), ir.DataType.FLOAT16: (48, 2)}
    assert not QuantizeWeights().call(model).modified


def test_matrices_that_read_one_value_become_one() -> None:
    model = parse_weighted(GATED)
    names = {name: weight_of(model, name) for name in ("gate", "up", "down")}
    pass_ = QuantizeWeights(level=0)
    assert pass_.call(model).modified
    assert op_types(model).count("MatMulNBits") == 2
    assert op_types(model).count("Split") == 1
    assert [site.outcome for site in pass_.sites] == ["applied"] * 3
    x = np.random.default_rng(2).standard_normal((2, 3, 64)).astype(np.float32)
    gate, up, down = (rounded(names[n]) for n in ("gate", "up", "down"))
    a = x @ gate
    want = (a / (1 + np.exp(-a)) * (x @ up)) @ down
    np.testing.assert_allclose(run(model, x=x), want, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("operator", ["contrib", "graphopt"])
def test_a_tied_table_is_stored_once(operator: str) -> None:
    model = parse_weighted(TIED)
    table = weight_of(model, "table")
    assert QuantizeWeights(operator=operator).call(model).modified
    assert sum(v.dtype == ir.DataType.UINT8 and v.shape is not None and len(v.shape) == 3
               for v in model.graph.initializers.values()) == 1  # fmt: skip
    ids = np.array([[3, 79, 0]])
    near = round_to_nearest(table, UniformGrid(8, search=True), 32).dequantized()
    want = np.tanh(near[ids]) @ near.T
    assert np.abs(run(model, ids=ids) - want).max() <= 1e-2 * np.abs(want).max()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 96])
def test_a_tied_table_with_zero_points(bits: int, columns: int) -> None:
    """The look-up reads those of the head, of which two may lie in a byte, and the last byte of a row be half full."""
    model = parse_weighted(TIED.replace("80, 64", f"80, {columns}"))
    table = weight_of(model, "table")
    options = {"bits": bits, "group_size": 32, "symmetric": False}
    assert QuantizeWeights(sites={"table": options}).call(model).modified
    ids = np.array([[3, 79, 0]])
    near = round_to_nearest(table, UniformGrid(bits, symmetric=False, search=True), 32).dequantized()
    want = np.tanh(near[ids]) @ near.T
    assert np.abs(run(model, ids=ids) - want).max() <= 1e-2 * np.abs(want).max()


def test_the_table_may_stay() -> None:
    model, pass_ = parse_weighted(TIED), QuantizeWeights(head_bits=0)
    assert not pass_.call(model).modified
    assert {site.detail for site in pass_.sites} == {
        "weights with the role embed are excluded", "weights with the role head are excluded",
    }  # fmt: skip


def test_a_gemm_keeps_its_bias() -> None:
    text = (
        HEAD
        + """g (float[batch, 64] x) => (float[batch, 48] y) <float[48, 64] w, float[48] b> {
      y = Gemm<transB = 1>(x, w, b)
    }"""
    )
    model = parse_weighted(text)
    w, b = weight_of(model, "w"), weight_of(model, "b")
    assert QuantizeWeights(level=0, bits=8).call(model).modified
    x = np.ones((2, 64), np.float32)
    want = x @ rounded(w.T, bits=8) + b
    assert np.abs(run(model, x=x) - want).max() <= 2e-2 * np.abs(want).max()


@pytest.mark.parametrize("group_size", [16, 32, 64, 0, 8, 24])
def test_groups(group_size: int) -> None:
    """Whole rows are blocks with one scale; groups that no block divides go to the codebook's operator."""
    model, pass_ = parse_weighted(ONE.replace("64", "192")), QuantizeWeights(group_size=group_size, level=0)
    w = weight_of(model, "w")
    assert pass_.call(model).modified
    assert [node.op_type for node in uses(model)] == (["CodebookMatMul"] if group_size in (8, 24) else [])
    x = np.random.default_rng(3).standard_normal((2, 192)).astype(np.float32)
    want = np.abs(x @ rounded(w, group_size=group_size))
    np.testing.assert_allclose(run(model, x=x), want, atol=2e-4 * np.abs(want).max())


@pytest.mark.parametrize("operator", ["contrib", "graphopt"])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"bits": 8}, {"bits": 2}])
@pytest.mark.parametrize("columns", [160, 152])
def test_rows_that_do_not_end_with_a_group(columns: int, options: dict[str, Any], operator: str) -> None:
    """Blocks that divide rows and groups share their scales; where there are none, the last block is filled up."""
    model = parse_weighted(ONE.replace("64", str(columns)))
    w = weight_of(model, "w")
    assert QuantizeWeights(group_size=64, operator=operator, level=0, **options).call(model).modified
    x = np.random.default_rng(3).standard_normal((3, columns)).astype(np.float32)
    want = np.abs(x @ rounded(w, group_size=64, **options))
    assert np.abs(run(model, x=x) - want).max() <= 2e-2 * np.abs(want).max()


def test_a_table_has_groups_that_divide_its_rows() -> None:
    model = parse_weighted(TIED.replace("80, 64", "80, 160"))
    table = weight_of(model, "table")
    assert QuantizeWeights(group_size=64).call(model).modified
    near = round_to_nearest(table, UniformGrid(8, search=True), 32).dequantized()
    ids = np.array([[3, 79, 0]])
    want = np.tanh(near[ids]) @ near.T
    assert np.abs(run(model, ids=ids) - want).max() <= 1e-2 * np.abs(want).max()


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 3}, {"bits": 3, "symmetric": False}, {"bits": 3, "symmetric": False, "floats": True}, {"bits": 5}, {"grid": "nf4"}, {"grid": "fp4"}, {"grid": "nupes"},
        {"grid": "bitmod"}, {"grid": "higgs"}, {"grid": "higgs", "bits": 2}, {"grid": "higgs", "scale_group": 64}, {"outliers": 0.01},
        {"groups": "range"}, {"groups": "axis"}, {"compensation": "lorc", "rank": 4, "bits": 2},
    ],
)  # fmt: skip
@pytest.mark.parametrize("operator", ["contrib", "graphopt"])
def test_every_setting_is_computed_with(options: dict[str, Any], operator: str) -> None:
    model = parse_weighted(ONE.replace("64", "192").replace("48", "64"))
    w = weight_of(model, "w")
    pass_ = QuantizeWeights(operator=operator, level=0, **options)
    assert pass_.call(model).modified
    x = np.random.default_rng(3).standard_normal((3, 192)).astype(np.float32)
    near = pass_.setting.round(np.ascontiguousarray(w.T)).dequantized()
    want = np.abs(x @ near.T)
    assert np.abs(run(model, x=x) - want).max() <= 2e-2 * np.abs(want).max()
    assert not QuantizeWeights(operator=operator, level=0, **options).call(model).modified


@pytest.mark.parametrize("operator", ["contrib", "graphopt"])
def test_three_bits_with_zero_points_have_one_codebook(operator: str) -> None:
    """Groups with a codebook of their own take long; the zero points are bytes in the file all the same."""
    model = parse_weighted(ONE)
    QuantizeWeights(bits=3, symmetric=False, operator=operator).call(model)
    (node,) = (node for node in model.graph if node.op_type == "CodebookMatMul")
    shapes = {index: node.inputs[index].const_value.shape.numpy() for index in (2, 4)}  # type: ignore[union-attr]
    assert shapes == {2: (1, 8, 1, 1), 4: (0,)}
    stored = {name: v.const_value for name, v in model.graph.initializers.items() if name.endswith("zeros")}
    assert [(t.shape.numpy(), t.dtype) for t in stored.values() if t is not None] == [((48, 2), ir.DataType.UINT8)]


def test_a_role_has_options_of_its_own() -> None:
    model = parse_weighted(GATED)
    pass_ = QuantizeWeights(bits=2, roles={"down": {"bits": 4}}, head_bits=4)
    assert pass_.call(model).modified
    bits = [node.attributes.get_int("bits") for node in model.graph if node.op_type == "MatMulNBits"]
    assert bits == [2, 4]
    assert pass_.option_values()["roles"] == {"down": {"bits": 4}}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("<float[64, 48] w> { y = Gemm<alpha = 2.0>(x, w) }", "scales or transposes"),
        ("<float[64, 8] w> { y = MatMul(x, w) }", "has only 512 numbers"),
    ],
)
def test_what_stays_says_why(body: str, why: str) -> None:
    outputs = 8 if "8] w" in body and "48]" not in body else 48
    model = parse_weighted(HEAD + f"g (float[batch, 64] x) => (float[batch, {outputs}] y) {body}")
    pass_ = QuantizeWeights()
    assert not pass_.call(model).modified
    assert why in pass_.sites[-1].detail


@pytest.mark.parametrize("bits", [3, 4])
def test_groups_along_the_outputs_that_no_operator_has_go_along_the_inputs(bits: int) -> None:
    """Of 48 outputs, which aren't made of groups of 32, or in 3 bits: not left in floats."""
    model = parse_weighted(ONE)
    value = model.graph.initializers["w"]
    sizes = np.exp(np.random.default_rng(1).standard_normal((64, 1))).astype(np.float32)
    w = (weight_of(model, "w") * sizes).astype(np.float32)
    value.const_value = ir.tensor(w, name="w")
    pass_ = QuantizeWeights(bits=bits, groups="axis", group_size=32)
    assert pass_.setting.round(np.ascontiguousarray(w.T)).weight.transposed
    assert pass_.call(model).modified
    assert [site.outcome for site in pass_.sites] == ["applied"]
    near = pass_.setting.with_options({"groups": "fixed"}).round(np.ascontiguousarray(w.T)).dequantized()
    x = np.random.default_rng(3).standard_normal((3, 64)).astype(np.float32)
    want = np.abs(x @ near.T)
    assert np.abs(run(model, x=x) - want).max() <= 2e-2 * want.max()


def test_excluded_roles() -> None:
    model, pass_ = parse_weighted(GATED), QuantizeWeights(exclude=["down"])
    assert pass_.call(model).modified
    assert "down" in model.graph.initializers
    assert any(site.detail == "weights with the role down are excluded" for site in pass_.sites)


@pytest.mark.parametrize(
    "options", [{"bits": 9}, {"bits": 1}, {"group_size": 12}, {"operator": "best"}, {"level": 2}, {"head_bits": 1},
                {"floats": True}, {"scale_group": 64}, {"grid": "higgs", "scale_group": 4},
                {"grid": "higgs", "rounding": "comq"}, {"groups": "axis", "rounding": "gptq"},
                {"groups": "axis", "outliers": 0.01}, {"roles": {"v": {"bits": 9}}}],
)  # fmt: skip
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        QuantizeWeights(**options)


def test_a_large_weight_goes_through_a_file(tmp_path: Any) -> None:
    model = parse_weighted(ONE.replace("64", "512").replace("48", "256"))
    QuantizeWeights().call(model)
    tensors = [v.const_value for v in model.graph.initializers.values()]
    assert any(isinstance(tensor, ir.ExternalTensor) for tensor in tensors)
    graphopt.save(model, tmp_path / "saved.onnx")
    assert uses(model) == []
    x = np.ones((1, 512), np.float32)
    np.testing.assert_array_equal(run(graphopt.load(tmp_path / "saved.onnx"), x=x), run(model, x=x))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4, "group_size": 32},
        {"bits": 4, "group_size": 128},
        {"bits": 2, "group_size": 32},
        {"bits": 8, "group_size": 64},
        {"bits": 4, "group_size": 32, "symmetric": True},
        {"bits": 3, "group_size": 64},
        {"bits": 3, "group_size": 128},
        {"bits": 3, "group_size": 64, "symmetric": True},
    ],
)
def test_bytes_are_those_that_are_stored(options: dict[str, Any]) -> None:
    # Rows of 576 numbers don't end with a group of 128, and are stored in blocks of 64.
    model = parse_weighted(ONE.replace("64", "576").replace("48", "96"))
    rows = np.ascontiguousarray(weight_of(model, "w").T)
    setting = Setting().with_options({"symmetric": False, **options})
    counted = packed_bytes(setting.round(rows).weight)
    QuantizeWeights(**{"symmetric": False, **options})(model)
    read = {value.name for node in model.graph for value in node.inputs if value is not None}
    stored = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None and v.name in read]
    # Codebooks, which weights share, and scalars apart.
    found = sum(tensor.nbytes for tensor in stored if tensor.shape[:1] == (96,))
    assert counted == found
