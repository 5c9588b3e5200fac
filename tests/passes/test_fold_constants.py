"""fold-constants: what isn't folded because the standard, its evaluator and runtimes differ, and reaching a fixed point."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.graph.computed import LAZY_BYTES
from graphopt.graph.constants import left_for_load
from graphopt.graph.edits import Editor
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.passes.base import Pass
from graphopt.passes.clean.fold_constants import LAZY, LAZY_TYPES, FoldConstants
from graphopt.passes.fold.weight_subgraphs import FoldWeightSubgraphs

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def left(pass_: FoldConstants) -> list[str]:
    return [s.detail for s in pass_.sites if s.outcome == "left"]


@pytest.mark.parametrize("rule", [FoldConstants(max_bytes=1 << 30), FoldWeightSubgraphs(min_bytes=1)])
def test_what_was_written_for_sessions_to_compute_stays_without_a_word(rule: Pass, tmp_path: Path) -> None:
    def written(*, for_load: bool) -> ir.Model:
        model = parse(f"{HEAD} g (float[2] x) => (float[64, 2] y) <int64[2] s = {{64, 2}}> {{ y = Expand(x, s) }}")
        edit = Editor(model)
        edit.at(model.graph[0])
        rows, size = edit.constant(np.ones((1, 2), np.float32)), edit.constant(np.array([64, 2]))
        with edit.for_load() if for_load else contextlib.nullcontext():
            many = edit.op("Expand", [edit.op("Neg", [rows]), size])
        edit.replace(model.graph.outputs[0], edit.op("Add", [many, model.graph.inputs[0]]))
        save(model, tmp_path / "model.onnx")
        return load(tmp_path / "model.onnx")

    model = written(for_load=True)
    assert not rule(model).modified
    assert rule.sites == []
    assert [left_for_load(node) for node in model.graph] == [True, True, False]
    other = written(for_load=False)
    assert rule(other).modified or rule.sites


def test_operators_of_old_opsets_stay() -> None:
    """The evaluator has the Softmax of opset 13, which is another function, and broadcasting came with opset 7."""
    model = parse(
        """<ir_version: 8, opset_import: ["": 11]> g (float[1] x) => (float[2, 1, 2] y)
        <float[2, 1, 2] c = {1, 2, 3, 5}> { s = Softmax<axis = 0>(c) t = Add(c, c) u = Add(s, t) y = Add(x, u) }"""
    )
    assert op_types(assert_exact(model, FoldConstants())) == ["Softmax", "Add", "Add"]
    model = parse(
        """<ir_version: 8, opset_import: ["": 6]> g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] c = {1, 2, 3, 5}, float[2] b = {1, 2}> { t = Add<axis = 0, broadcast = 1>(c, b) y = Add(x, t) }"""
    )
    assert not FoldConstants()(model).modified


def test_every_output_is_computed() -> None:
    model = parse(
        f"""{HEAD} g (float[1] x) => (float[1, 1, 2] y, int64[1, 1, 2] i) <float[1, 1, 3] c = {{1, 3, 2}}> {{
        p, q = MaxPool<kernel_shape = [2]>(c) y = Add(x, p) j = Cast<to = 7>(x) i = Add(q, j) }}"""
    )
    after = assert_exact(model, FoldConstants())
    assert "MaxPool" not in op_types(after)


def test_equal_constant_outputs_are_stable() -> None:
    model = parse(
        f"""{HEAD} g () => (float[0] a, float[0] b, float[0] c) <float[0] e = {{}}, int64[3] parts = {{0, 0, 0}}>
        {{ a, b, c = Split(e, parts) }}"""
    )
    assert op_types(assert_exact(model, FoldConstants())) == ["Identity"] * 3


def test_a_constant_output_is_not_computed_again() -> None:
    model = parse(f"{HEAD} g () => (float[2] y) <float[2] a = {{1, 2}}> {{ y = Neg(a) }}")
    assert op_types(assert_exact(model, FoldConstants())) == ["Identity"]


def test_nan_stays_where_it_is_looked_at() -> None:
    """ONNX Runtime's Sign gives 0 for a NaN in float16, the standard's evaluator gives NaN."""
    for op, folded in (("Sign", False), ("Transpose", True)):
        model = parse(
            f"{HEAD} g (float[1] x) => (float[1] y) {{ s = {op}(c) y = Add(x, s) }}".replace(
                "(float[1] x)", "(float[1] x, float[1] c)"
            )
        )
        model.graph.inputs.pop()
        constant = next(v for v in model.graph.node(0).inputs)
        constant.const_value = ir.tensor(np.array([np.nan], np.float32), name="c")
        model.graph.register_initializer(constant)
        pass_ = FoldConstants()
        assert pass_(model).modified is folded
        assert folded or "NaN" in left(pass_)[0]


def test_empty_reductions_stay() -> None:
    pass_ = FoldConstants()
    model = parse(f"{HEAD} g (float[1] x) => (float[1] y) <float[0] e = {{}}> {{ m = ReduceMean(e) y = Add(x, m) }}")
    assert not pass_(model).modified
    assert "empty" in left(pass_)[0]


def test_results_of_four_bits_stay_computed_where_they_are_outputs() -> None:
    pass_ = FoldConstants()
    model = parse(f"{HEAD} g () => (int4[2] y) <float[2] a = {{1, 2}}> {{ y = Cast<to = 22>(a) }}")
    assert not pass_(model).modified
    assert "Identity" in left(pass_)[0]


def test_results_that_tell_shapes_are_used_at_once() -> None:
    """The shape of the second result is known only once the first one is a constant."""
    model = parse(
        f"""{HEAD} g (float[1] x) => (float[n] y) <float[2] a = {{1.5, 2.5}}> {{
        f = Floor(a) s = ReduceSum<keepdims = 0>(f) i = Cast<to = 7>(s) k = Constant<value_ints = [0]>()
        u = Unsqueeze(i, k) e = Expand(a2, u) z = Neg(e) y = Add(x, z) a2 = Constant<value_floats = [2.0]>() }}""".replace(
            " a2 = Constant<value_floats = [2.0]>() }", " }"
        ).replace("f = Floor(a)", "a2 = Constant<value_floats = [2.0]>() f = Floor(a)")
    )
    assert op_types(assert_exact(model, FoldConstants())) == ["Add"]


@pytest.mark.parametrize("dtype", sorted(LAZY_TYPES, key=int))
@pytest.mark.parametrize("op", sorted(LAZY - {"ConstantOfShape", "Split"}))
def test_what_is_computed_at_saving_never_fails(op: str, dtype: ir.DataType) -> None:
    if dtype == ir.DataType.BOOL and op in ("Add", "Div", "Mul", "Neg", "Reciprocal", "Sqrt", "Sub"):
        pytest.skip("no such operator in the standard")
    side = 1 << 11
    w = np.ones((side, side * 8 // dtype.bitwidth), dtype.numpy())
    small = {
        "Reshape": ["shape"], "Expand": ["same"], "Tile": ["once"], "Squeeze": ["axis"], "Unsqueeze": ["axis"],
        "Gather": ["rows"], "Slice": ["axis", "end"], "Concat": ["w"], "Where": ["w"], "Add": ["w"], "Sub": ["w"],
        "Mul": ["w"], "Div": ["w"],
    }  # fmt: skip
    arrays = {
        "w": w[None] if op == "Squeeze" else w, "shape": np.array([w.size]), "same": np.array(w.shape), "once": np.array([1, 1]),
        "axis": np.array([0]), "rows": np.arange(side), "end": np.array([side]), "c": np.array(True),
    }  # fmt: skip
    inputs = (["c"] if op == "Where" else []) + ["w"] + small.get(op, [])
    attributes = {"Cast": {"to": 1}, "Concat": {"axis": 0}, "Transpose": {"perm": [1, 0]}}.get(op, {})
    out = onnx.TensorProto.FLOAT if op == "Cast" else int(dtype)
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [onnx.helper.make_node(op, inputs, ["k"], **attributes), onnx.helper.make_node("Shape", ["k"], ["s"]),
             onnx.helper.make_node("some", ["k"], ["y"], domain="d")],
            "g", [], [onnx.helper.make_tensor_value_info("y", out, None)],
            [onnx.numpy_helper.from_array(arrays[n], n) for n in dict.fromkeys(inputs)],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("d", 1)],
    )  # fmt: skip
    model = ir.from_proto(proto)
    FoldConstants(max_bytes=1 << 30)(model)
    lazy = [v.const_value for v in model.graph.initializers.values() if isinstance(v.const_value, ir.LazyTensor)]
    assert lazy
    for tensor in lazy:
        assert tensor.nbytes >= LAZY_BYTES
        assert len(tensor.tobytes()) == tensor.nbytes
