"""Feature spaces: which values hold one vector of features, who writes it and who reads it."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest
from exactness import parse_weighted as parse

from graphopt.analysis.feature_space import FeatureSpace, carry, feature_space, feature_spaces
from graphopt.analysis.shapes import infer

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def unchecked(text: str) -> ir.Model:
    """A model whose output declares no type."""
    return ir.from_proto(onnx.parser.parse_model(text))


def value(model: ir.Model, name: str) -> ir.Value:
    for node in model.graph:
        for out in node.outputs:
            if out.name == name:
                return out
    return next(v for v in model.graph.inputs if v.name == name)


def space_of(model: ir.Model, name: str, axis: int = -1) -> FeatureSpace:
    space = feature_space(value(model, name), axis, infer(model))
    assert space is not None
    return space


def test_a_pre_norm_block() -> None:
    model = parse(f"""{HEAD} g (int64[2, 5] ids, float[2, 5, 4] z) => (float[2, 5, 3] y)
        <float[9, 4] table, float[5, 4] positions, float[4, 4] w, float[4] b, float[4] g, float[4, 3] head> {{
        e = Gather(table, ids)
        s0 = Add(e, positions)
        n = LayerNormalization <axis = -1> (s0, g)
        m = MatMul(n, w)
        mb = Add(m, b)
        s1 = Add(s0, mb)
        f = LayerNormalization <axis = -1> (s1, g)
        y = MatMul(f, head)
    }}""")
    space = space_of(model, "s1")
    assert (space.size, space.conflict) == (4, None)
    assert {v.name for v in space.axes} == {"e", "s0", "m", "mb", "s1"}
    assert sorted((w.kind, w.value.name) for w in space.writers) == [
        ("constant", "b"), ("constant", "positions"), ("constant", "table"), ("linear", "m"),
    ]  # fmt: skip
    assert [(r.kind, r.node.name) for r in space.readers if r.node] == [
        ("norm", r.node.name) for r in space.readers if r.node
    ]
    assert len(space.readers) == 2
    assert [n.outputs[0].name for n in space.adds] == ["s1"]
    # Every value of it is the same space.
    assert len(feature_spaces([(v, a) for v, a in space.axes.items()], infer(model))) == 1


def test_patches_are_followed_through_layout() -> None:
    model = parse(f"""{HEAD} g (float[2, 3, 8, 8] image) => (float[2, 5, 6] y)
        <float[6, 3, 4, 4] w, float[6] b, float[2, 1, 6] token, float[6] gain, int64[3] to = {{2, 6, 4}}> {{
        p = Conv <strides = [4, 4]> (image, w, b)
        r = Reshape(p, to)
        t = Transpose <perm = [0, 2, 1]> (r)
        c = Concat <axis = 1> (token, t)
        y = LayerNormalization <axis = -1> (c, gain)
    }}""")
    space = space_of(model, "c")
    assert {v.name: a for v, a in space.axes.items()} == {"c": -1, "t": -1, "r": -2, "p": -3}
    assert sorted(w.kind for w in space.writers) == ["constant", "conv"]
    assert [r.kind for r in space.readers] == ["norm"]


def test_what_mixes_or_weighs_features_ends_it() -> None:
    model = parse(f"""{HEAD} g (float[2, 5, 4] x, float[2, 5, 1] scale) => (float[2, 5, 4] y, float[2, 5, 4] z)
        <float[4] gamma = {{1, 2, 3, 4}}> {{
        a = Mul(x, scale)
        b = Mul(a, gamma)
        r = Relu(a)
        y = Add(b, r)
        z = Softmax(a)
    }}""")
    space = space_of(model, "a")
    assert {v.name for v in space.axes} == {"x", "a"}
    assert [w.kind for w in space.writers] == ["input"]
    assert sorted(r.node.op_type for r in space.readers if r.node) == ["Mul", "Relu", "Softmax"]
    other = space_of(model, "y")
    assert sorted(w.kind for w in other.writers) == ["other", "other"]
    assert [r.kind for r in other.readers] == ["output"]


def test_two_axes_for_one_value_are_a_conflict() -> None:
    model = parse(f"""{HEAD} g (float[4, 4] x) => (float[4, 4] y) {{
        t = Transpose <perm = [1, 0]> (x)
        y = Add(x, t)
    }}""")
    assert space_of(model, "y").conflict is not None


def test_readers_in_subgraphs_and_of_shapes() -> None:
    model = parse(f"""{HEAD} g (bool c, float[2, 4] x) => (float[2, 4] y, int64[2] n) {{
        a = Neg(x)
        n = Shape(a)
        y = If (c) <
            then_branch = t () => (float[2, 4] u) {{ u = Relu(a) }},
            else_branch = e () => (float[2, 4] v) {{ v = Neg(x) }}
        >
    }}""")
    kinds = sorted(r.kind for r in space_of(model, "a").readers)
    assert kinds == ["subgraph", "subgraph"]


@pytest.mark.parametrize(
    ("text", "slot", "axis", "expected"),
    [
        ("y = Transpose <perm = [2, 0, 1]> (x)", ("in", 0), -1, {("in", 0): -1, ("out", 0): -3}),
        ("y = Transpose <perm = [2, 0, 1]> (x)", ("out", 0), -3, {("in", 0): -1, ("out", 0): -3}),
        ("y = Gather <axis = 1> (x, i)", ("in", 0), -1, {("in", 0): -1, ("out", 0): -1}),
        ("y = Gather <axis = 1> (x, i)", ("in", 0), -3, {("in", 0): -3, ("out", 0): -4}),
        ("y = Gather <axis = 1> (x, i)", ("in", 0), -2, None),
        ("y = ReduceMean <keepdims = 0> (x, one)", ("in", 0), -1, {("in", 0): -1, ("out", 0): -1}),
        ("y = ReduceMean <keepdims = 0> (x, one)", ("in", 0), -3, {("in", 0): -3, ("out", 0): -2}),
        ("y = ReduceMean <keepdims = 0> (x, one)", ("in", 0), -2, None),
        ("y = ReduceSum <keepdims = 1> (x, one)", ("out", 0), -3, {("in", 0): -3, ("out", 0): -3}),
        ("y = Slice(x, zero, one, one)", ("in", 0), -1, {("in", 0): -1, ("out", 0): -1}),
        ("y = Slice(x, zero, one, one)", ("in", 0), -2, None),
        ("y, z = Split <axis = 1, num_outputs = 2> (x)", ("out", 1), -1,
         {("in", 0): -1, ("out", 0): -1, ("out", 1): -1}),
        ("y = Reshape(x, flat)", ("in", 0), -1, {("in", 0): -1, ("out", 0): -1}),
        ("y = Reshape(x, flat)", ("in", 0), -2, None),
        ("y = Cast <to = 6> (x)", ("in", 0), -1, None),
        ("y = Cast <to = 11> (x)", ("in", 0), -1, {("in", 0): -1, ("out", 0): -1}),
        ("y = Div(x, x)", ("in", 0), -1, None),
        ("y = Div(half, x)", ("in", 1), -1, None),
        ("y = Sqrt(x)", ("in", 0), -1, None),
    ],
)  # fmt: skip
def test_carry(text: str, slot, axis: int, expected) -> None:
    model = unchecked(f"""<ir_version: 10, opset_import: ["": 21]> g (float[2, 6, 4] x, int64[3, 5] i) => (y)
        <int64[1] one = {{1}}, int64[1] zero = {{0}}, int64[2] flat = {{12, 4}}, float half = {{0.5}}> {{ {text} }}""")
    node = model.graph[0]
    assert carry(node, slot, axis, infer(model)) == expected


def test_moved_values_are_really_the_same_features() -> None:
    """A linear map M of the features commutes with every operator that carries them."""
    rng = np.random.default_rng(0)
    m = rng.normal(size=(4, 4))
    for text, axis in (
        ("y = Transpose <perm = [2, 0, 1]> (x)", -3),
        ("y = Gather <axis = 1> (x, i)", -1),
        ("y = ReduceMean <keepdims = 0> (x, one)", -1),
        ("y = Reshape(x, flat)", -1),
        ("y = Slice(x, zero, one, one)", -1),
        ("y = Neg(x)", -1),
    ):
        model = unchecked(f"""<ir_version: 10, opset_import: ["": 21]> g (double[2, 6, 4] x, int64[3] i) => (y)
            <int64[1] one = {{1}}, int64[1] zero = {{0}}, int64[2] flat = {{12, 4}}> {{ {text} }}""")
        model.graph.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
        run = onnx.reference.ReferenceEvaluator(ir.to_proto(model))
        x, i = rng.normal(size=(2, 6, 4)), np.array([0, 2, 5])
        (plain,) = run.run(None, {"x": x, "i": i})
        (mapped,) = run.run(None, {"x": x @ m, "i": i})
        np.testing.assert_allclose(np.moveaxis(np.moveaxis(plain, axis, -1) @ m, -1, axis), mapped, rtol=1e-12)
