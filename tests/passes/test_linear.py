"""raise-linear and lower-linear: what becomes what, what stays and why, and that the pair comes to rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.models import catalogue
from graphopt.pass_manager import PassManager
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.lower.linear import LowerLinear
from graphopt.passes.raise_.convert_opset import ConvertOpset
from graphopt.passes.raise_.linear import RaiseLinear

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
WEIGHT = "float[2, 3] w = {1, 2, 3, 4, 5, 6}"
TURNED = "float[3, 2] w = {1, 2, 3, 4, 5, 6}"
BIAS = "float[3] b = {1, 2, 3}"


def gemm(call: str, *constants: str, x: str = "[M, 2] x", extra: str = "") -> ir.Model:
    return parse(f"{HEAD} g (float{x}) => (float[M, 3] y) <{', '.join(constants)}> {{ y = Gemm {call}  {extra} }}")


def weight_of(model: ir.Model) -> np.ndarray:
    (node,) = (node for node in model.graph if node.op_type == "MatMul")
    return node.inputs[1].const_value.numpy()


@pytest.mark.parametrize(
    ("call", "constants", "operators"),
    [
        ("(x, w, b)", (WEIGHT, BIAS), ["MatMul", "Add"]),
        ("<transB = 1> (x, w, b)", (TURNED, BIAS), ["MatMul", "Add"]),
        ("<alpha = 0.5, beta = 2.0> (x, w, b)", (WEIGHT, BIAS), ["MatMul", "Add"]),
        ("<alpha = 2.0, transB = 1> (x, w)", (TURNED,), ["MatMul"]),
        ("<beta = 0.0> (x, w, b)", (WEIGHT, BIAS), ["MatMul"]),
        ("(x, w, b)", (WEIGHT, "float[1, 3] b = {1, 2, 3}"), ["MatMul", "Add"]),
        ("(x, w, b)", (WEIGHT, "float[1] b = {4}"), ["MatMul", "Add"]),
        ("(x, w, b)", (WEIGHT, "float b = {4}"), ["MatMul", "Add"]),
        ("(x, w, b)", (WEIGHT, "float[1, 1] b = {4}"), ["MatMul", "Add"]),
        ("(x, w, b)", (WEIGHT, "float b = {0}"), ["MatMul"]),
    ],
)
def test_gemm(call: str, constants: tuple[str, ...], operators: list[str]) -> None:
    after = assert_exact(gemm(call, *constants), RaiseLinear())
    assert op_types(after) == operators
    if "Add" in operators:
        assert after.graph.node(-1).inputs[1].const_value.shape.numpy() == (3,)


def reason(model: ir.Model, rule: RaiseLinear | LowerLinear | None = None) -> str:
    rule = RaiseLinear() if rule is None else rule
    before = op_types(model)
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    return site.detail


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (gemm("(x, w, b)", WEIGHT, "float[4, 1] b = {1, 2, 3, 4}", x="[4, 2] x"), "has one number a row"),
        (gemm("<transA = 1> (x, w, b)", WEIGHT, BIAS, x="[2, M] x"), "it transposes its input"),
        (
            parse(f"{HEAD} g (float[M, 2] x, float[2, 3] w) => (float[M, 3] y) {{ y = Gemm(x, w) }}"),
            "the weights of Gemm '' aren't constant",
        ),
        (
            parse(f"{HEAD} g (float[M, 2] x, float[3] b) => (float[M, 3] y) <{WEIGHT}> {{ y = Gemm(x, w, b) }}"),
            "the bias of Gemm '' isn't constant",
        ),
        (
            parse(
                f"{HEAD} g (float[M, 2] x, int64[M] i) => (float[M, 3] y, float[M, 2] e) <{TURNED}> "
                "{ y = Gemm<transB = 1>(x, w)  e = Gather(w, i) }"
            ),
            "its weight 'w' is tied with Gather: changing it would make a second copy",
        ),
    ],
    ids=["rows", "transA", "weight", "bias", "tied"],
)
def test_left(model: ir.Model, why: str) -> None:
    assert why in reason(model)


def test_left_in_float64() -> None:
    text = f"{HEAD} g (double[M, 2] x) => (double[M, 3] y) <double[2, 3] w = {{1, 2, 3, 4, 5, 6}}> {{ y = Gemm(x, w) }}"
    assert "float64" in reason(parse(text))


def test_left_where_alpha_overflows() -> None:
    text = f"{HEAD} g (float16[M, 1] x) => (float16[M, 1] y) <float16[1, 1] w = {{30000}}> "
    assert "overflow" in reason(parse(text + "{ y = Gemm<alpha = 4.0>(x, w) }"))


def test_left_where_the_caller_sets_an_attribute() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "local": 1]>
    g (float[M, 2] x) => (float[M, 2] y) { y = local.f<t = 1>(x) }
    <domain: "local", opset_import: ["": 21]> f <t> (x) => (y) {
        w = Constant<value = float[2, 2] {1, 2, 3, 4}>()  y = Gemm<transB: int = @t>(x, w) }"""
    assert "takes an attribute from the function" in reason(parse(text))


def test_in_a_function_and_in_a_branch() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "local": 1]>
    g (bool c, float[M, 2] x) => (float[M, 2] y, float[M, 2] z) <float[2, 2] v = {1, 2, 3, 4}> {
        y = local.f(x)
        z = If (c) <then_branch = t () => (float[M, 2] p) { p = Gemm<transB = 1>(x, v) },
                    else_branch = e () => (float[M, 2] q) { q = Identity(x) }> }
    <domain: "local", opset_import: ["": 21]> f (x) => (y) {
        w = Constant<value = float[2, 2] {1, 2, 3, 4}>()  y = Gemm<transB = 1>(x, w) }"""
    after = assert_exact(parse(text), RaiseLinear())
    (function,) = after.functions.values()
    assert [n.op_type for n in function if n.op_type != "Constant"] == ["MatMul"]
    assert [n.op_type for g in after.graph.subgraphs() for n in g if g.name == "t"] == ["MatMul"]


def test_large_weights_are_transposed_when_they_are_saved() -> None:
    model = gemm("<transB = 1> (x, w)", TURNED)
    value = model.graph.initializers["w"]
    reads = []

    def read() -> ir.TensorProtocol:
        reads.append(1)
        return ir.tensor(np.arange(3 * 400_000, dtype=np.float32).reshape(3, -1))

    value.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([3, 400_000]))
    RaiseLinear()(model)
    assert reads == []
    np.testing.assert_array_equal(weight_of(model), np.arange(3 * 400_000, dtype=np.float32).reshape(3, -1).T)


def test_a_matrix_of_unknown_shape_is_said_to_be_one() -> None:
    # ONNX Runtime joins MatMul and Add again only where it knows that they work on a matrix.
    text = f"{HEAD} g (float[A, M, 2] x) => (float[M, 3] y) <{WEIGHT}, {BIAS}> {{ q = Squeeze(x)  y = Gemm(q, w, b) }}"
    model = parse(text)
    (squeezed,) = (node.outputs[0] for node in model.graph if node.op_type == "Squeeze")
    squeezed.type, squeezed.shape = ir.TensorType(ir.DataType.FLOAT), None
    RaiseLinear()(model)
    assert len(squeezed.shape) == 2


@pytest.mark.parametrize("tied", [False, True])
def test_a_transposed_weight_is_left_to_fold_constants(tied: bool) -> None:
    text = f"{HEAD} g (float[M, 128] x, int64[M] i) => (float[M, 64] y{', float[M, 128] e' if tied else ''}) "
    text += f"<float[64, 128] w = {{{', '.join('1' * 64 * 128)}}}> "
    model = parse(text + f"{{ t = Transpose(w)  y = MatMul(x, t) {' e = Gather(w, i)' if tied else ''} }}")
    assert not RaiseLinear()(model).modified
    rule = FoldConstants()
    assert rule(model).modified is not tied
    assert ("Transpose" in op_types(model)) is tied
    if tied:
        assert "would make the file" in rule.sites[0].detail


# ---- between two Reshapes

FLAT = "k = Constant<value_ints = [-1, 2]>()  f = Reshape(x, k)"
SHAPE = "s = Shape<start = 0, end = -1>(x)  n = Constant<value_ints = [3]>()  t = Concat<axis = 0>(s, n)"


def flat(
    body: str, *constants: str, opening: str = FLAT, target: str = SHAPE, outputs: str = "", x: str = "B, S, 2"
) -> ir.Model:
    given = ", ".join(constants or (WEIGHT, BIAS))
    y = ", ".join([*x.split(", ")[:-1], "3"])
    return parse(
        f"{HEAD} g (float[{x}] x) => (float[{y}] y{outputs}) <{given}> "
        f"{{ {opening}\n {target}\n {body}\n y = Reshape(g, t) }}"
    )


@pytest.mark.parametrize(
    ("body", "operators"),
    [
        ("g = Gemm(f, w, b)", ["MatMul", "Add"]),
        ("g = MatMul(f, w)", ["MatMul"]),
        ("p = MatMul(f, w)  g = Add(b, p)", ["MatMul", "Add"]),
        ("e = Gelu(f)  p = Gemm(e, w, b)  g = Tanh(p)", ["Gelu", "MatMul", "Add", "Tanh"]),
    ],
)
@pytest.mark.parametrize("x", ["B, S, 2", "B, S, T, 2", "5, 7, 2"])
def test_between_reshapes(body: str, operators: list[str], x: str) -> None:
    after = assert_exact(flat(body, x=x), RaiseLinear())
    assert [op for op in op_types(after) if op not in ("Shape", "Concat")] == operators


def test_two_layers_between_reshapes() -> None:
    body = "p = Gemm<transB = 1>(f, u, b)  r = Relu(p)  g = Gemm(r, v, b)"
    constants = ("float[3, 2] u = {1, 2, 3, 4, 5, 6}", "float[3, 3] v = {1, 2, 3, 4, 5, 6, 7, 8, 9}", BIAS)
    after = assert_exact(flat(body, *constants), RaiseLinear())
    assert op_types(after) == ["MatMul", "Add", "Relu", "MatMul", "Add"]


def test_two_layers_that_share_the_flattened_value() -> None:
    body = "g = Gemm(f, w, b)  h = MatMul(f, w)  z = Reshape(h, t)"
    after = assert_exact(flat(body, outputs=", float[B, S, 3] z"), RaiseLinear())
    assert sorted(op_types(after)) == ["Add", "MatMul", "MatMul"]


def test_behind_flatten() -> None:
    after = assert_exact(flat("g = Gemm(f, w, b)", opening="f = Flatten<axis = 2>(x)"), RaiseLinear())
    assert op_types(after) == ["MatMul", "Add"]


def test_not_where_the_value_between_is_read_elsewhere() -> None:
    model = flat("g = MatMul(f, w)", outputs=", float[M, 3] g")
    assert "'g' is a graph output" in reason(model)


def test_not_where_a_constant_differs_by_row() -> None:
    model = flat(
        "p = MatMul(f, w)  g = Add(p, c)", WEIGHT, "float[6, 3] c = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}", x="2, 3, 2"
    )
    assert "more than one number a column" in reason(model)


def test_not_where_the_leading_axes_change_places() -> None:
    target = (
        "s = Shape<start = 0, end = 1>(x)  r = Shape<start = 1, end = 2>(x)  n = Constant<value_ints = [3]>()"
        "  t = Concat<axis = 0>(r, s, n)"
    )
    assert "isn't proven to restore the leading axes" in reason(flat("g = MatMul(f, w)", target=target, x="B, S, 2"))


def test_not_where_it_splits_heads() -> None:
    model = parse(
        f"{HEAD} g (float[B, S, 2] x) => (float[B, S, 3, 1] y) <{WEIGHT}> "
        f"{{ {FLAT}\n s = Shape<start = 0, end = -1>(x)  n = Constant<value_ints = [3, 1]>()"
        "  t = Concat<axis = 0>(s, n)  g = MatMul(f, w)  y = Reshape(g, t) }"
    )
    rule = RaiseLinear()
    assert not rule(model).modified
    assert rule.sites == []


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["Relu", "Tanh", "bias", "linear", "scale"]), min_size=0, max_size=5), st.booleans())
def test_any_chain_between_reshapes(chain: list[str], flatten: bool) -> None:
    nodes, value = [], "f"
    for number, what in enumerate([*chain, "linear"]):
        call = {"bias": "Add({}, c)", "linear": "Gemm({}, v, c)", "scale": "Mul(c, {})"}.get(what, what + "({})")
        nodes.append(f"v{number} = {call.format(value)}")
        value = f"v{number}"
    text = (
        f"{HEAD} g (float[B, S, 2] x) => (float[B, S, 2] y) <float[2, 2] v = {{1, 2, 3, 5}}, float[2] c = {{1, 2}}> "
        f"{{ {'f = Flatten<axis = -1>(x)' if flatten else FLAT}\n s = Shape(x)\n {' '.join(nodes)}\n"
        f" y = Reshape({value}, s) }}"
    )
    after = assert_exact(parse(text), RaiseLinear(), seeds=1)
    assert not {"Reshape", "Flatten", "Gemm"} & set(op_types(after))


# ---- lower-linear


@pytest.mark.parametrize("add", ["Add(p, b)", "Add(b, p)"])
@pytest.mark.parametrize("bias", [BIAS, "float[1, 3] b = {1, 2, 3}"])
def test_lowered(add: str, bias: str) -> None:
    model = parse(f"{HEAD} g (float[M, 2] x) => (float[M, 3] y) <{WEIGHT}, {bias}> {{ p = MatMul(x, w)  y = {add} }}")
    after = assert_exact(model, LowerLinear())
    assert op_types(after) == ["Gemm"]


@pytest.mark.parametrize(
    ("x", "body", "why"),
    [
        ("[B, S, 2] x", "p = MatMul(x, w)  y = Add(p, b)", ""),
        ("[M, 2] x", "p = MatMul(x, w)  q = Add(p, b)  y = Add(p, q)", "'p' is read by 2 nodes"),
        ("[M, 2] x", "p = MatMul(x, w)  y = Mul(p, b)", ""),
        ("[M, 2] x", "q = Squeeze(x)  p = MatMul(q, w)  y = Add(p, b)", "the rank of 'q' isn't known"),
    ],
)
def test_not_lowered(x: str, body: str, why: str) -> None:
    rank = "[B, S, 3]" if "S" in x.split("]")[0] else "[M, 3]"
    model = parse(f"{HEAD} g (float{x}) => (float{rank} y) <{WEIGHT}, {BIAS}> {{ {body} }}")
    rule = LowerLinear()
    assert not rule(model).modified
    assert [site.detail for site in rule.sites] == ([why] if why else [])


def test_the_pair_comes_to_rest() -> None:
    model = gemm("<transB = 1, alpha = 0.5> (x, w, b)", TURNED, BIAS)
    manager = PassManager([RaiseLinear(keep_plain=True), LowerLinear()], verifier_of=None)
    assert manager(model).modified
    assert op_types(model) == ["Gemm"]
    assert not model.graph.node(0).attributes
    assert not manager(model).modified


@pytest.mark.parametrize("call", ["(f, w, b)", "<transB = 1> (f, w, b)"])
def test_keep_plain(call: str) -> None:
    """A plain Gemm stays, transposed or not; one that works on a flattened value doesn't."""
    weight = TURNED if "transB" in call else WEIGHT
    alone = gemm(call.replace("f,", "x,"), weight, BIAS)
    assert not RaiseLinear(keep_plain=True)(alone).modified
    between = parse(f"""{HEAD} g (float[2, 5, 2] x) => (float[2, 5, 3] y)
        <{weight}, {BIAS}, int64[2] flat = {{-1, 2}}, int64[3] back = {{2, 5, 3}}> {{
            f = Reshape(x, flat)
            l = Gemm {call}
            y = Reshape(l, back)
        }}""")
    after = assert_exact(between, RaiseLinear(keep_plain=True))
    assert op_types(after) == ["MatMul", "Add"]


def test_a_gemm_whose_weight_something_else_reads_keeps_its_reshapes() -> None:
    model = parse(f"""{HEAD} g (float[2, 5, 2] x) => (float[2, 5, 3] y, float[3, 2] z)
        <{TURNED}, {BIAS}, int64[2] flat = {{-1, 2}}, int64[3] back = {{2, 5, 3}}> {{
            f = Reshape(x, flat)
            l = Gemm <transB = 1> (f, w, b)
            y = Reshape(l, back)
            z = Relu(w)
        }}""")
    rule = RaiseLinear(keep_plain=True)
    assert not rule(model).modified
    assert all("tied with Relu" in site.detail for site in rule.sites)
    assert rule.sites


@pytest.mark.real
@pytest.mark.parametrize(
    ("key", "count", "shape"),
    [("openwakeword-alexa", 3, (1, 16, 96)), ("openwakeword-timer", 3, (1, 34, 96)), ("silero-vad-ifless", 0, None)],
)
def test_real_model(key: str, count: int, shape: tuple[int, ...] | None) -> None:
    ort = pytest.importorskip("onnxruntime")
    path = catalogue.fetch(key)
    model = ir.load(path)
    ConvertOpset()(model)
    rule = RaiseLinear()
    rule(model)
    assert sum(site.op_type == "Gemm" and site.outcome == "applied" for site in rule.sites) >= count
    if shape is None:
        return
    feed = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    before, after = (
        ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        for source in (str(path), ir.to_proto(model).SerializeToString())
    )
    name = before.get_inputs()[0].name
    for one, other in zip(before.run(None, {name: feed}), after.run(None, {name: feed}), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5)


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_fresh_export(dynamo: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4, bias=False)).eval()
    target = tmp_path / "linear.onnx"
    torch.onnx.export(model, (torch.randn(2, 8),), str(target), dynamo=dynamo, opset_version=18)
    after = ir.load(target)
    assert "Gemm" in op_types(after)
    RaiseLinear()(after)
    assert "Gemm" not in op_types(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
