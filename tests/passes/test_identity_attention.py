"""`remove-identity-attention`: every spelling of the mask, proofs for finite ones, and what is left."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse, random_feeds, reference_outputs

from graphopt.analysis.bounds import Bounds
from graphopt.analysis.diagonal import Diagonals
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph import load
from graphopt.pass_manager import PassManager
from graphopt.passes.fold.identity_attention import RemoveIdentityAttention
from graphopt.passes.fold.merge_linears import MergeLinears
from graphopt.recipe import load as load_recipe

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
N = 3
EYE = np.eye(N)
MASK = np.where(EYE == 1, 0.0, -np.inf)
# Sizes that two inputs share are fixed: the sizes of a symbol aren't taken for equal.
BLOCK = """{head} g (T[2,2,{n},4] q, T[2,2,{n},4] k, T[2,2,{n},5] v{more}) => (T[2,2,{n},5] y) {{
    t = Transpose<perm = [0, 1, 3, 2]>(k)
    s = MatMul(q, t)
    {scores}
    p = Softmax<axis = -1>(z)
    {after}
    y = MatMul({p}, v)
}}"""


def block(
    scores: str,
    after: str = "",
    p: str = "p",
    n: str = "3",
    dtype: str = "double",
    more: str = "",
    **constants: np.ndarray,
) -> ir.Model:
    """An attention whose mask is laid on by `scores`, from s to z; constants by name."""
    text = BLOCK.format(head=HEAD, scores=scores, after=after, p=p, n=n, more=more).replace("T[", dtype + "[")
    proto = onnx.parser.parse_model(text)
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def removed(before: ir.Model, expected: list[str] | None = None, **dims: int) -> ir.Model:
    with np.errstate(all="ignore"):
        after = assert_exact(before, RemoveIdentityAttention(), dims={"B": 2, "N": 4, **dims})
    assert op_types(after) == (["Identity"] if expected is None else expected)
    return after


def reasons(before: ir.Model) -> list[str]:
    """Why the attentions of `before` were left."""
    rule = RemoveIdentityAttention()
    operators = op_types(before)
    assert not rule(before).modified
    assert op_types(before) == operators
    return [site.detail for site in rule.sites]


INF = np.array(-np.inf)
CONSTANT = {
    "added": ("z = Add(s, m)", {"m": MASK}),
    "added, the mask first": ("z = Add(m, s)", {"m": MASK[None, None]}),
    "one for each head, with a bias": ("z = Add(s, m)", {"m": np.stack([MASK, MASK + 2 * np.diag([1.0, 2, 3])])}),
    "chosen": ("z = Where(m, s, low)", {"m": EYE == 1, "low": INF}),
    "chosen the other way": ("z = Where(m, low, s)", {"m": EYE == 0, "low": INF}),
    "under a scale": ("a = Div(s, c)  b = Add(a, m)  z = Mul(c, b)", {"m": MASK, "c": np.array([2.0])}),
    "with another mask": ("a = Add(s, m)  z = Add(d, a)", {"m": MASK, "d": np.ones((2, 1, 3))}),
    "with another mask before": ("a = Add(s, d)  z = Add(a, m)", {"m": MASK, "d": np.ones((2, 1, 3))}),
}


@pytest.mark.parametrize("case", CONSTANT)
def test_constant_masks(case: str) -> None:
    scores, constants = CONSTANT[case]
    removed(block(scores, **constants))


RUN_TIME = {
    "eye": "h = Shape<start = 2>(s)  o = ConstantOfShape(h) e = EyeLike<dtype = 9>(o)  z = Where(e, s, low)",
    "not the eye": "h = Shape<start = 2>(s)  o = ConstantOfShape(h)  e = EyeLike(o)  b = Cast<to = 9>(e)  n = Not(b) "
    "zero = Constant<value = double {0}>()  m = Where(n, low, zero)  a = Add(s, m)  z = Identity(a)",
    "a range compared with itself": "h = Shape<start = 2, end = 3>(s)  i0 = Constant<value_int = 0>()  i1 = Constant<value_int = 1>() "
    "l = Squeeze(h)  r = Range(i0, l, i1)  c0 = Constant<value_ints = [0]>()  c1 = Constant<value_ints = [1]>() "
    "row = Unsqueeze(r, c0)  col = Unsqueeze(r, c1)  e = Equal(row, col)  z = Where(e, s, low)",
    "two equal ranges": "h = Shape<start = 2, end = 3>(s)  i0 = Constant<value_int = 0>()  i1 = Constant<value_int = 1>() "
    "l = Squeeze(h)  r = Range(i0, l, i1)  r2 = Range(i0, l, i1)  c0 = Constant<value_ints = [1, -1]>()  "
    "c1 = Constant<value_ints = [-1, 1]>()  row = Reshape(r, c0)  col = Reshape(r2, c1)  e = Equal(col, row)  n = Not(e) "
    "c2 = Constant<value_ints = [0, 1]>()  n4 = Unsqueeze(n, c2)  z = Where(n4, low, s)",
}


@pytest.mark.parametrize("case", RUN_TIME)
@pytest.mark.parametrize("size", [1, 4])
def test_masks_made_at_run_time(case: str, size: int) -> None:
    # The declared sizes of three inputs are three symbols, so the sequence is that of one input.
    text = f"""{HEAD} g (double[B,N,8] x) => (double[B,2,N,4] y) {{
        split = Constant<value_ints = [0, 0, 2, 4]>()  r0 = Reshape(x, split)
        v = Transpose<perm = [0, 2, 1, 3]>(r0)  t = Transpose<perm = [0, 2, 3, 1]>(r0)  s = MatMul(v, t)
        low = Constant<value = double {{-1e9}}>()  {RUN_TIME[case]}
        p = Softmax(z)  y = MatMul(p, v) }}"""
    before = parse(text)
    for node in before.graph:
        if node.outputs[0].name == "low":
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(INF))
    removed(before, ["Reshape", "Transpose"], N=size)


def test_between_the_softmax_and_the_values() -> None:
    removed(block("z = Add(s, m)", "d = Dropout(p)  e = Cast<to = 11>(d)", "e", m=MASK))
    guard = "n = IsNaN(p)  g = Where(n, zero, p)"
    removed(block("a = Mul(s, c)  z = Add(a, m)", guard, "g", m=MASK, zero=np.array(0.0), c=np.array(0.5)))
    before = block("a = Add(s, pad)  z = Add(a, m)", guard, "g", more=", T[2,1,1,3] pad", m=MASK, zero=np.array(0.0))
    assert "another mask could forbid" in reasons(before)[0]


def test_the_probabilities_may_be_read_elsewhere() -> None:
    model = parse(
        f"""{HEAD} g (double[3,4] q, double[3,4] v) => (double[3,4] y, double[3,3] p) {{
        t = Transpose(q)  s = MatMul(q, t)  h = Shape(s)  o = ConstantOfShape(h)  e = EyeLike<dtype = 9>(o)
        l = Constant<value = double {{-1e9}}>()  a = Tanh(s)  z = Where(e, a, l)  p = Softmax(z)  y = MatMul(p, v) }}"""
    )
    after = removed(
        model,
        ["Transpose", "MatMul", "Shape", "ConstantOfShape", "EyeLike", "Tanh", "Where", "Softmax", "Identity"],
    )
    assert [o.name for o in after.graph.outputs] == ["y", "p"]


FINITE = np.where(EYE == 1, 0.0, -1e4)


def test_finite_masks_need_a_bound() -> None:
    assert "nothing bounds the scores" in reasons(block("z = Add(s, m)", m=FINITE))[0]
    assert "nothing bounds the scores" in reasons(block("z = Where(m, s, low)", m=EYE == 1, low=np.array(-1e9)))[0]
    removed(block("a = Tanh(s)  b = Mul(a, c)  z = Add(b, m)", m=FINITE, c=np.array(50.0)))
    removed(block("a = Clip(s, l, h)  z = Add(a, m)", m=FINITE, l=np.array(-50.0), h=np.array(50.0)))
    assert (
        "too little"
        in reasons(
            block(
                "a = Mul(s2, c)  s2 = Tanh(s)  z = Add(a, m)".replace(
                    "a = Mul(s2, c)  s2 = Tanh(s)", "s2 = Tanh(s)  a = Mul(s2, c)"
                ),
                m=FINITE,
                c=np.array(5000.0),
            )
        )[0]
    )
    removed(
        block(
            "a = Sigmoid(s)  i = Sub(one, e)  m = Mul(i, low)  z = Add(a, m)",
            e=EYE,
            one=np.array(1.0),
            low=np.array(-1e9),
        )
    )


def test_scores_of_normalized_tokens_are_bounded() -> None:
    rng = np.random.default_rng(0)
    text = f"""{HEAD} g (double[B,3,4] x) => (double[B,3,4] y) {{
        n = LayerNormalization(x, g, b)  q0 = MatMul(n, wq)  q = Add(q0, bq)  k = MatMul(n, wk)  v = MatMul(n, wv)
        t = Transpose<perm = [0, 2, 1]>(k)  s = MatMul(q, t)  a = Div(s, c)  z = Add(a, m)  p = Softmax(z)
        o = MatMul(p, v)  y = MatMul(o, wo) }}"""
    proto = onnx.parser.parse_model(text)
    arrays = {
        "g": rng.normal(size=4),
        "b": rng.normal(size=4),
        "bq": rng.normal(size=4),
        "c": np.array(2.0),
        "m": np.where(EYE == 1, 0, -1e9),
    }
    arrays.update({f"w{i}": rng.normal(size=(4, 4)) for i in "qkvo"})
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in arrays.items())
    before = ir.from_proto(proto)
    after = removed(before, ["LayerNormalization", "MatMul", "MatMul"])
    assert set(after.graph.initializers) == {"g", "b", "wv", "wo"}
    assert op_types(assert_exact(after, MergeLinears(), dims={"B": 2})) == ["LayerNormalization", "MatMul"]


def test_nan_on_the_diagonal_is_left() -> None:
    before = block("i = Sub(one, e)  m = Mul(i, low)  z = Add(s, m)", e=EYE, one=np.array(1.0), low=INF)
    assert "NaN on its diagonal" in reasons(before)[0]


@pytest.mark.parametrize(
    "mask",
    [
        np.triu(np.full((3, 3), -np.inf), 1),
        np.zeros((3, 3)),
        np.full((3, 3), -np.inf),
        MASK[:, ::-1].copy(),
        -MASK,
        MASK.T[:1],
    ],
    ids=["causal", "none", "everything", "the other diagonal", "plus infinity", "a row"],
)
def test_other_masks_are_not_looked_at(mask: np.ndarray) -> None:
    assert reasons(block("z = Add(s, m)", m=mask)) == []


def test_a_mask_that_could_be_widened_is_left() -> None:
    """The eye of one unknown size, laid on scores of another: of size 1 it would forbid nothing."""
    text = f"""{HEAD} g (double[3,4] q, double[3,4] v, double[K,K] o) => (double[3,4] y) {{
        t = Transpose(q)  s = MatMul(q, t)  e = EyeLike<dtype = 9>(o)  low = Constant<value = double {{-1e9}}>()
        a = Tanh(s)  z = Where(e, a, low)  p = Softmax(z)  y = MatMul(p, v) }}"""
    assert reasons(parse(text)) == []  # K and K are two symbols: not even a square
    text = text.replace("double[K,K] o", "double[K] k").replace(
        "e = EyeLike", "h = Shape(k)  hh = Concat<axis = 0>(h, h)  o = ConstantOfShape(hh)  e = EyeLike"
    )
    assert reasons(parse(text)) == ["the mask may be smaller than the scores and widened"]


def test_values_that_would_be_broadcast_are_left() -> None:
    before = block("z = Add(s, m)", m=MASK)
    before.graph.inputs[2].shape = ir.Shape([1, 1, 3, 5])
    assert reasons(before) == ["its output isn't known to have the shape of the values"]


def test_softmax_of_old_opsets_and_other_axes() -> None:
    before = block("z = Add(s, m)", m=MASK)
    next(n for n in before.graph if n.op_type == "Softmax").attributes["axis"] = ir.AttrInt64("axis", 2)
    assert reasons(before) == []
    text = """<ir_version: 8, opset_import: ["": 11]> g (double[3,4] q, double[3,4] v) => (double[3,4] y) {
        t = Transpose(q)  s = MatMul(q, t)  h = Shape(s)  o = ConstantOfShape(h)  e = EyeLike<dtype = 9>(o)
        l = Constant<value = double {-1e9}>()  a = Tanh(s)  z = Where(e, a, l)  p = Softmax(z)  y = MatMul(p, v) }"""
    removed(parse(text))


def test_one_key() -> None:
    text = f"""{HEAD} g (double[B,2,3,4] q, double[B,2,1,4] k, double[B,2,1,5] v) => (double[B,2,3,5] y) {{
        t = Transpose<perm = [0, 1, 3, 2]>(k)  s = MatMul(q, t)  p = Softmax(s)  y = MatMul(p, v) }}"""
    assert reasons(parse(text)) == ["there is one key, but the shape of the output isn't known"]
    removed(parse(text.replace("[B,2,", "[7,2,")), ["Expand"])
    text = f"""{HEAD} g (double[B,2,8] x, double[B,2,1,4] q) => (double[B,2,1,8] y) {{
        a = Constant<value_ints = [2]>()  v = Unsqueeze(x, a)  t = Transpose<perm = [0, 1, 3, 2]>(v)
        s = MatMul(v, t)  p = Softmax(s)  y = MatMul(p, v) }}"""
    removed(parse(text), ["Unsqueeze"])


def test_products_with_an_identity_matrix() -> None:
    text = f"{HEAD} g (double[B,3] x) => (double[B,3] y) {{ h = MatMul(x, e)  y = Relu(h) }}"
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(EYE, "e"))
    removed(ir.from_proto(proto), ["Relu"])


def test_float16() -> None:
    before = block("z = Add(s, m)", dtype="float16", m=MASK.astype(np.float16))
    after = before.clone()
    RemoveIdentityAttention()(after)
    feeds = random_feeds(before, dims={"B": 2})
    np.testing.assert_array_equal(reference_outputs(before, feeds)[0], reference_outputs(after, feeds)[0])
    low = np.array(-65504, np.float16)
    before = block("a = Tanh(s)  z = Where(m, a, low)", dtype="float16", m=EYE == 1, low=low)
    RemoveIdentityAttention()(before)
    assert op_types(before) == ["Identity"]


def test_in_a_branch() -> None:
    text = f"""{HEAD} g (bool c, double[3,4] q, double[3,4] v) => (double[3,4] y) {{
        y = If (c) <then_branch = t () => (double[3,4] a) {{ k = Transpose(q)  s = MatMul(q, k)  z = Add(s, m)
            p = Softmax(z)  a = MatMul(p, v) }}, else_branch = e () => (double[3,4] b) {{ b = Neg(v) }}> }}"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(MASK, "m"))
    after = assert_exact(ir.from_proto(proto), RemoveIdentityAttention())
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["Identity"], ["Neg"]]
    assert not after.graph.initializers


ATTENTION = '<ir_version: 10, opset_import: ["": 23]> g (float[B,2,3,4] q, float[B,2,3,4] k, float[B,2,3,4] v) => ({out}) {{ {body} }}'


def attention(body: str, out: str = "float[B,2,3,4] y", mask: np.ndarray | None = None) -> ir.Model:
    proto = onnx.parser.parse_model(ATTENTION.format(body=body, out=out))
    constant = MASK.astype(np.float32) if mask is None else mask
    proto.graph.initializer.append(onnx.numpy_helper.from_array(constant, "m"))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def test_attention_operator() -> None:
    # The batch of three inputs is three symbols for the facts, so the three are made of one.
    one = "y = Attention(v, v, v, m)"
    for mask in (MASK.astype(np.float32), EYE == 1):
        before = attention(one, mask=mask)
        after = before.clone()
        RemoveIdentityAttention()(after)
        assert op_types(after) == ["Identity"]
        feeds = random_feeds(before, dims={"B": 2})
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(
                reference_outputs(before, feeds)[0], reference_outputs(after, feeds)[0], rtol=1e-6
            )
    assert reasons(attention("y = Attention(q, k, v, m)")) == ["its output isn't known to have the shape of the values"]
    assert reasons(attention("y = Attention<softcap = 3.0>(v, v, v, m)")) == ["it caps the scores after the mask"]
    both = "y, a, b = Attention(v, v, v, m)"
    assert reasons(attention(both, "float[B,2,3,4] y, float[B,2,3,4] a")) == ["it also gives out a cache or its scores"]
    assert "nothing bounds" in reasons(attention(one, mask=np.where(EYE == 1, 0, -1e9).astype(np.float32)))[0]
    assert reasons(attention(one, mask=np.zeros((3, 3), np.float32))) == []


def test_attention_operator_with_one_key() -> None:
    text = """<ir_version: 10, opset_import: ["": 23]> g (float[B,2,1,4] v) => (float[B,2,1,4] y) {
        t = Tanh(v)  y = Attention(t, t, v) }"""
    before = parse(text)
    after = before.clone()
    RemoveIdentityAttention()(after)
    assert op_types(after) == ["Identity"]
    feeds = random_feeds(before, dims={"B": 2})
    np.testing.assert_array_equal(reference_outputs(before, feeds)[0], reference_outputs(after, feeds)[0])
    # A mask could forbid the one key.
    masked = text.replace("(float[B,2,1,4] v)", "(float[B,2,1,4] v, bool[1,1] m)").replace("t, v)", "t, v, m)")
    assert reasons(parse(masked)) == []


def test_in_a_function() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "local": 1]> g (double[3,4] x) => (double[3,4] y) { y = local.f(x) }
        <domain: "local", opset_import: ["": 21]> f (x) => (y) { e = Constant<value = double[2,2] {1, 0, 0, 1}>()
        t = Transpose(x)  h = MatMul(e, t)  y = Transpose(h) }"""
    after = assert_exact(parse(text.replace("double[3,4]", "double[4,2]")), RemoveIdentityAttention())
    (function,) = after.functions.values()
    assert [n.op_type for n in function] == ["Transpose", "Transpose"]


def test_runtime_agrees() -> None:
    """The masked original in ONNX Runtime gives the values bit for bit."""
    ort = pytest.importorskip("onnxruntime")
    before = block("z = Add(s, m)", dtype="float", m=MASK.astype(np.float32))
    session = ort.InferenceSession(ir.to_proto(before).SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = random_feeds(before, dims={"B": 2})
    np.testing.assert_array_equal(session.run(None, feeds)[0], feeds["v"])


def test_bounds_are_bounds() -> None:
    text = f"""{HEAD} g (double[4,6] x) => (double[4,6] y) {{
        a = Tanh(x)  w = Constant<value = double[6] {{1, -2, 3, 0.5, 1, 1}}>()  b = Mul(a, w)  c = Add(b, a)
        l = Constant<value = double {{-0.1}}>()  h = Constant<value = double {{0.7}}>()  d = Clip(x, l, h)  e = Sub(c, d)
        n = LayerNormalization(x, w)  t = Transpose(n)  f = MatMul(e, t)  r = RMSNormalization(x, w)  s = MatMul(f, r)
        i = Concat<axis = 0>(s, n)  j = Neg(i)  k = Slice(j, z, four)  z = Constant<value_ints = [0]>()
        q = Div(k, w)  y = Relu(q) four = Constant<value_ints = [4]>() }}"""
    text = (
        text.replace(
            "k = Slice(j, z, four)  z = Constant<value_ints = [0]>()",
            "z = Constant<value_ints = [0]>()  four = Constant<value_ints = [4]>()  k = Slice(j, z, four)",
        )
        .replace(" four = Constant<value_ints = [4]>() }", " }")
        .replace('["": 21]', '["": 23]')
    )
    model = parse(text)
    bounds = Bounds(ShapeFacts(model))
    values = [v for n in model.graph for v in n.outputs if n.op_type not in ("Constant",)]
    found = {v.name: bounds.of(v) for v in values}
    assert all(bound is not None for bound in found.values())
    assert bounds.of(model.graph.inputs[0]) is None
    wide = model.clone()
    wide.graph.outputs.clear()
    wide.graph.outputs.extend(v for n in wide.graph for v in n.outputs if v.name in found)
    for seed, scale in ((0, 0.1), (1, 10.0), (2, 1e6)):
        x = scale * np.random.default_rng(seed).normal(size=(4, 6))
        for value, array in zip(wide.graph.outputs, reference_outputs(wide, {"x": x}), strict=True):
            assert np.abs(array).max() <= found[value.name] * (1 + 1e-9), value.name


def test_diagonals_follow_types() -> None:
    """A number that a cast turns into an infinity, or a bool, is that; bfloat16 constants aren't read."""
    text = f"""{HEAD} g (double[3] x) => (float16[3,3] y, bool[3,3] b) {{
        h = Shape(x)  hh = Concat<axis = 0>(h, h)  o = ConstantOfShape(hh)  e = EyeLike<dtype = 1>(o)
        c = Constant<value = float {{-1e9}}>()  one = Constant<value = float {{1}}>()  i = Sub(one, e)  m = Mul(i, c)
        y = Cast<to = 10>(m)  b = Cast<to = 9>(m) }}"""
    model = parse(text)
    diagonals = Diagonals(ShapeFacts(model))
    y, b = (diagonals.of(v) for v in model.graph.outputs)
    assert y.dtype == np.float16
    assert list(y) == [0, -np.inf]
    assert list(b) == [False, True]
    value = ir.Value(name="w", const_value=ir.tensor(np.eye(2, dtype=ml_dtypes.bfloat16)))
    ir.Graph([], [], nodes=[], initializers=[value])
    assert diagonals.of(value) is None


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("form", ["sdpa", "float mask", "masked_fill"])
def test_of_an_export(form: str, dynamo: bool, tmp_path: Path) -> None:
    """A transformer block whose attention was trained to the identity, through both exporters and the exact recipe."""
    torch = pytest.importorskip("torch")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.LayerNorm(32)
            self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
            eye = torch.eye(7, dtype=torch.bool)
            self.register_buffer("eye", eye)
            self.register_buffer("mask", torch.zeros(7, 7).masked_fill(~eye, -1e9))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(self.norm(x)).reshape(2, 7, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
            if form == "sdpa":
                y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.eye)
            else:
                scores = q @ k.transpose(-2, -1) * 8**-0.5
                scores = scores + self.mask if form == "float mask" else scores.masked_fill(~self.eye, -torch.inf)
                y = scores.softmax(-1) @ v
            return x + self.out(y.transpose(1, 2).reshape(2, 7, 32))

    path = tmp_path / "block.onnx"
    torch.onnx.export(Block().eval(), (torch.randn(2, 7, 32),), str(path), dynamo=dynamo, opset_version=18)
    model = load(path)
    passes = load_recipe().passes()
    at = next(i for i, p in enumerate(passes) if getattr(p, "name", "") == "raise-rotary")
    mine = RemoveIdentityAttention()
    report = PassManager([*passes[:at], mine, *passes[at:]])(model)
    assert any(r.name == mine.name and r.status == "applied" for r in report.records), [s.detail for s in mine.sites]
    assert "Softmax" not in op_types(model)
    assert report.verdict is not None
    assert report.verdict.ok
