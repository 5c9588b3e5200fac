"""`remove-dead-channels`: which hidden channels go, proved in float64, and what is left with which reason."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from graphopt.errors import UsageError
from graphopt.graph import load
from graphopt.graph.save import weight_bytes
from graphopt.models import catalogue
from graphopt.pass_manager import PassManager
from graphopt.passes.fold.dead_channels import RemoveDeadChannels
from graphopt.recipe import load as load_recipe

H = 6
DEAD = [1, 4]


def zeroed(array: np.ndarray, axis: int, channels: list[int] | None = None) -> np.ndarray:
    array = array.copy()
    array[tuple(slice(None) if a != axis else (DEAD if channels is None else channels) for a in range(array.ndim))] = 0
    return array


def model(
    body: str, head: str = "(double[N,3,5] x) => (double[N,3,4] y)", opset: int = 21, **weights: np.ndarray
) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> g {head} {{ {body} }}')
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def channels(m: ir.Model, name: str = "v", axis: int = 0) -> int:
    """The hidden channels that the last layer reads."""
    last = [n for n in m.graph if n.op_type in ("MatMul", "Gemm", "Conv")][-1]
    return int(last.inputs[1].const_value.shape[axis])


def reasons(before: ir.Model) -> list[str]:
    rule = RemoveDeadChannels()
    text = ir.to_proto(before).SerializeToString(deterministic=True)
    assert not rule(before).modified
    assert ir.to_proto(before).SerializeToString(deterministic=True) == text
    return [s.detail for s in rule.sites]


RNG = np.random.default_rng(0)
U, V, A, B = RNG.normal(size=(5, H)), RNG.normal(size=(H, 4)), RNG.normal(size=H), RNG.normal(size=4)
MLP = "h = MatMul(x, u)  i = Add(h, a)  r = {f}(i)  j = MatMul(r, v)  y = Add(j, b)"
SMALL = {"u": zeroed(U, 1), "a": zeroed(A, 0), "v": V, "b": B}


@pytest.mark.parametrize(
    "f", ["Relu", "Gelu", "Tanh", 'Gelu<approximate = "tanh">', "Elu", "HardSwish", "Sigmoid", "Abs", "Exp", "Softplus"]
)
@pytest.mark.parametrize("bias", ["zero", "any"])
def test_channels_without_weights(f: str, bias: str) -> None:
    """They hold f(bias) for every input, which goes to the bias behind."""
    before = model(MLP.format(f=f), **{**SMALL, "a": SMALL["a"] if bias == "zero" else A})
    after = assert_exact(before, RemoveDeadChannels(), dims={"N": 2})
    assert channels(after) == H - 2
    assert op_types(after) == op_types(before)


def test_channels_that_are_not_read() -> None:
    before = model(MLP.format(f="Exp"), u=U, a=A, v=zeroed(V, 0), b=B)
    assert channels(assert_exact(before, RemoveDeadChannels(), dims={"N": 2})) == H - 2


def test_a_bias_is_made_where_there_is_none() -> None:
    before = model("h = MatMul(x, u)  r = Sigmoid(h)  y = MatMul(r, v)", u=zeroed(U, 1), v=V)
    after = assert_exact(before, RemoveDeadChannels(), dims={"N": 2})
    assert op_types(after) == ["MatMul", "Sigmoid", "MatMul", "Add"]


@pytest.mark.parametrize("which", ["gate", "up", "read"])
def test_a_gated_mlp(which: str) -> None:
    body = "g = MatMul(x, u)  s = Sigmoid(g)  t = Mul(g, s)  p = MatMul(x, w)  m = Mul(p, t)  y = MatMul(m, v)"
    arrays = {
        "u": zeroed(U, 1) if which == "gate" else U,
        "w": zeroed(RNG.normal(size=(5, H)), 1) if which == "up" else RNG.normal(size=(5, H)),
        "v": zeroed(V, 0) if which == "read" else V,
    }
    after = assert_exact(model(body, **arrays), RemoveDeadChannels(), dims={"N": 2})
    assert channels(after) == H - 2
    assert sorted(v.const_value.shape[1] for v in after.graph.initializers.values()) == [4, 4, 4]


def test_constants_of_each_channel_are_cut_too() -> None:
    body = "h = MatMul(x, u)  k = Mul(c, h)  l = Add(k, d)  r = Relu(l)  n = Mul(r, two)  y = MatMul(n, v)"
    before = model(
        body, u=zeroed(U, 1), c=RNG.normal(size=H), d=-np.abs(RNG.normal(size=(1, H))), two=np.array(2.0), v=V
    )
    after = assert_exact(before, RemoveDeadChannels(), dims={"N": 2})
    assert channels(after) == H - 2


def test_gemm() -> None:
    before = model(
        "h = Gemm<transB = 1, beta = 2.0>(x, u, a)  r = Relu(h)  y = Gemm<alpha = 0.5, beta = 3.0>(r, v, b)",
        "(double[N,5] x) => (double[N,4] y)", u=zeroed(U.T, 0), a=np.abs(A), v=V, b=B,
    )  # fmt: skip
    after = assert_exact(before, RemoveDeadChannels(), dims={"N": 2})
    assert channels(after) == H - 2


@pytest.mark.parametrize(("pads", "bias"), [("", "any"), ("<pads = [1, 1]>", "zero"), ("<pads = [1, 1]>", "any")])
def test_conv(pads: str, bias: str) -> None:
    u, v = RNG.normal(size=(H, 5, 3)), RNG.normal(size=(4, H, 3))
    a = np.abs(A) if bias == "any" else zeroed(A, 0)
    size = 9 if pads else 7
    before = model(
        f"h = Conv<pads = [1, 1]>(x, u, a)  r = Relu(h)  y = Conv{pads}(r, v, b)",
        f"(double[N,5,9] x) => (double[N,4,{size}] y)", u=zeroed(u, 0), a=a, v=v, b=B,
    )  # fmt: skip
    if pads and bias == "any":
        assert reasons(before) == []  # the border would get less of the constant
        return
    assert channels(assert_exact(before, RemoveDeadChannels(), dims={"N": 2}), axis=1) == H - 2


def test_channels_die_one_after_the_other() -> None:
    """The neuron that alone reads another dies, and that one with it."""
    w = RNG.normal(size=(H, H))
    w[2, [c for c in range(H) if c not in DEAD]] = 0
    before = model(
        "h = MatMul(x, u)  r = Relu(h)  i = MatMul(r, w)  s = Relu(i)  y = MatMul(s, v)", u=U, w=w, v=zeroed(V, 0)
    )
    after = assert_exact(before, RemoveDeadChannels(multiple=1), dims={"N": 2})
    shapes = sorted(tuple(v.const_value.shape) for v in after.graph.initializers.values())
    assert shapes == [(4, 4), (5, 4), (5, 5)]


def test_one_channel_stays() -> None:
    before = model(MLP.format(f="Relu"), u=np.zeros((5, H)), a=np.ones(H), v=V, b=B)
    assert channels(assert_exact(before, RemoveDeadChannels(multiple=1), dims={"N": 2})) == 1


def test_left_with_a_reason() -> None:
    body = MLP.format(f="Relu")
    output = model(body, "(double[N,3,5] x) => (double[N,3,4] y, double[N,3,6] r)", **SMALL)
    assert reasons(output) == ["2 of 6 channels are dead, but 'r' is a graph output"]
    elsewhere = model(body + "  z = ReduceSum(r)", "(double[N,3,5] x) => (double[N,3,4] y, double[1,1,1] z)", **SMALL)
    assert reasons(elsewhere) == ["2 of 6 channels are dead, but 'r' is read elsewhere"]
    shared = model(body + "  z = MatMul(x, u)", "(double[N,3,5] x) => (double[N,3,4] y, double[N,3,6] z)", **SMALL)
    assert reasons(shared) == ["2 of 6 channels are dead, but other nodes read the weights 'u' too"]


def test_nothing_to_report() -> None:
    assert reasons(model(MLP.format(f="Relu"), u=U, a=A, v=V, b=B)) == []
    assert reasons(model(MLP.format(f="Softmax"), **SMALL)) == []
    residual = model(
        "h = MatMul(x, u)  s = Add(h, x)  y = MatMul(s, v)",
        "(double[N,6] x) => (double[N,4] y)",
        u=zeroed(RNG.normal(size=(H, H)), 1),
        v=V,
    )
    assert reasons(residual) == []
    grouped = model(
        "h = Conv<group = 6>(x, u)  y = Conv(h, v)", "(double[N,6,9] x) => (double[N,4,9] y)",
        u=zeroed(RNG.normal(size=(6, 1, 1)), 0), v=RNG.normal(size=(4, 6, 1)),
    )  # fmt: skip
    assert reasons(grouped) == []


def test_float16_and_a_branch() -> None:
    half = {name: array.astype(np.float16) for name, array in SMALL.items()}
    before = model(MLP.format(f="Relu"), "(float16[N,3,5] x) => (float16[N,3,4] y)", **half)
    assert RemoveDeadChannels()(before).modified
    assert channels(before) == H - 2
    before = model(
        f"y = If (c) <then_branch = t () => (double[N,4] p) {{ {MLP.format(f='Relu').replace('y =', 'p =')} }}, "
        "else_branch = e () => (double[N,4] q) { q = MatMul(x, o) }>",
        "(bool c, double[N,5] x) => (double[N,4] y)", **SMALL, o=RNG.normal(size=(5, 4)),
    )  # fmt: skip
    after = assert_exact(before, RemoveDeadChannels(), dims={"N": 2})
    (then, _) = after.graph.subgraphs()
    assert sorted(tuple(v.const_value.shape) for v in then.initializers.values()) == [(4,), (4, 4), (5, 4)]


def test_a_large_weight_is_cut_when_it_is_saved() -> None:
    u = zeroed(RNG.normal(size=(600, 600)), 1)
    before = model(
        "h = MatMul(x, u)  r = Relu(h)  y = MatMul(r, v)", "(double[N,600] x) => (double[N,600] y)",
        u=u, v=RNG.normal(size=(600, 600)),
    )  # fmt: skip
    after = assert_exact(before, RemoveDeadChannels(multiple=1), dims={"N": 2}, seeds=1)
    assert channels(after) == 598
    RemoveDeadChannels(multiple=1)(before)
    assert all(isinstance(v.const_value, ir.LazyTensor) for v in before.graph.initializers.values())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    columns=st.sets(st.integers(0, H - 1)), biases=st.sets(st.integers(0, H - 1)), rows=st.sets(st.integers(0, H - 1)),
    f=st.sampled_from(["Relu", "Sigmoid", "Tanh", "Neg"]),
)  # fmt: skip
def test_any_pattern_of_zeros(columns: set[int], biases: set[int], rows: set[int], f: str) -> None:
    before = model(
        MLP.format(f=f),
        u=zeroed(U, 1, sorted(columns)),
        a=zeroed(A, 0, sorted(biases)),
        v=zeroed(V, 0, sorted(rows)),
        b=B,
    )
    after = assert_exact(before, RemoveDeadChannels(multiple=1), dims={"N": 2}, seeds=1)
    assert channels(after) == max(1, H - len(columns | rows))


def test_what_kernels_like_stays() -> None:
    """Of 64 channels 3 are dead: no multiple of 16 is left without keeping them. Of 17 dead ones 16 go."""
    rng = np.random.default_rng(0)
    for dead, kept in ((3, 64), (16, 48), (17, 48), (64, 16)):
        u = zeroed(rng.normal(size=(5, 64)), 1, list(range(dead)))
        before = model("h = MatMul(x, u)  r = Relu(h)  y = MatMul(r, v)", u=u, v=rng.normal(size=(64, 4)))
        if kept == 64:
            assert reasons(before) == ["3 of 64 channels are dead, too few to leave a multiple of 16"]
        else:
            assert channels(assert_exact(before, RemoveDeadChannels(), dims={"N": 2})) == kept
    with pytest.raises(UsageError, match="power of two"):
        RemoveDeadChannels(multiple=12)


@pytest.mark.real
def test_a_real_model_has_dead_channels() -> None:
    """Weight decay left two layers of this text detector with hundreds of channels that hold a denormal number."""
    model = load(catalogue.fetch("ppocr-v6-det"))
    passes = load_recipe().passes()
    at = next(i for i, p in enumerate(passes) if getattr(p, "name", "") == "fold-batch-norm")
    before = weight_bytes(model)
    report = PassManager([*passes[:at], RemoveDeadChannels(), *passes[at:]], verify="phase")(model)
    sites = [s for r in report.records if r.name == RemoveDeadChannels.name for s in r.sites]
    found = sorted(s.detail for s in sites if s.outcome == "applied")
    assert found == ["192 of 768 channels before it removed", "480 of 768 channels before it removed"]
    assert weight_bytes(model) < 0.8 * before
    assert report.verdict is not None
    assert report.verdict.ok
