"""merge-siblings: groups of MatMuls and convolutions, what keeps a layer out of them, and real and exported models."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse, parse_weighted
from fake_profiles import fake
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.models import catalogue
from graphopt.passes.lower.merge_siblings import MergeSiblings
from graphopt.passes.raise_.convert_opset import ConvertOpset

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
A = "float[2, 3] a = {1, 2, 3, 4, 5, 6}"
B = "float[2, 1] b = {7, 8}"
C = "float[2, 2] c = {9, 1, 2, 3}"
BIAS_A, BIAS_B = "float[3] u = {1, 2, 3}", "float[1] v = {4}"


def graph(body: str, *constants: str, outputs: str = "float[B, S, 3] p, float[B, S, 1] q", more: str = "") -> ir.Model:
    given = ", ".join(constants or (A, B))
    return parse(f"{HEAD} g (float[B, S, 2] x{more}) => ({outputs}) <{given}> {{ {body} }}")


@pytest.mark.parametrize(
    ("body", "constants", "operators"),
    [
        ("p = MatMul(x, a)  q = MatMul(x, b)", (A, B), ["MatMul", "Split"]),
        (
            "m = MatMul(x, a)  p = Add(m, u)  n = MatMul(x, b)  q = Add(v, n)",
            (A, B, BIAS_A, BIAS_B),
            ["MatMul", "Add", "Split"],
        ),
        # A bias of zeros for the one that has none.
        ("m = MatMul(x, a)  p = Add(m, u)  q = MatMul(x, b)", (A, B, BIAS_A), ["MatMul", "Add", "Split"]),
        ("m = MatMul(x, a)  p = Gelu(m)  n = MatMul(x, b)  q = Gelu(n)", (A, B), ["MatMul", "Gelu", "Split"]),
        ("m = MatMul(x, a)  p = Relu(m)  n = MatMul(x, b)  q = Tanh(n)", (A, B), ["MatMul", "Split", "Relu", "Tanh"]),
        (
            "m = MatMul(x, a)  p = Add(m, x2)  q = MatMul(x, b)",
            (A, B, "float[1, 3] x2 = {1, 2, 3}"),
            ["MatMul", "Split", "Add"],
        ),
    ],
)
def test_products(body: str, constants: tuple[str, ...], operators: list[str]) -> None:
    assert op_types(assert_exact(graph(body, *constants), MergeSiblings())) == operators


def test_three_of_different_widths() -> None:
    model = graph(
        "p = MatMul(x, a)  q = MatMul(x, b)  r = MatMul(x, c)",
        *(A, B, C),
        outputs="float[B, S, 3] p, float[B, S, 1] q, float[B, S, 2] r",
    )
    after = assert_exact(model, MergeSiblings())
    assert op_types(after) == ["MatMul", "Split"]
    assert [value.name for value in after.graph.outputs] == ["p", "q", "r"]
    assert set(after.graph.initializers) & {"a", "b", "c"} == set()


CONV = "(float[N, 2, 5, 5] x) => (float[N, 2, H, W] p, float[N, 1, H, W] q)"
KERNELS = "float[2, 2, 1, 1] a = {1, 2, 3, 4}, float[1, 2, 1, 1] b = {5, 6}, float[2] u = {1, 2}"


@pytest.mark.parametrize(
    ("body", "operators"),
    [
        ("p = Conv(x, a, u)  q = Conv<pads = [0, 0, 0, 0]>(x, b)", ["Conv", "Split"]),
        (
            "m = Conv<strides = [2, 2]>(x, a)  p = Relu(m)  n = Conv<strides = [2, 2]>(x, b)  q = Relu(n)",
            ["Conv", "Relu", "Split"],
        ),
        ('p = Conv<auto_pad = "SAME_UPPER">(x, a)  q = Conv<auto_pad = "SAME_UPPER">(x, b)', ["Conv", "Split"]),
        ("p = Conv<strides = [2, 2]>(x, a)  q = Conv(x, b)", ["Conv", "Conv"]),
        ("p = Conv<group = 2>(x, d)  q = Conv(x, b)", ["Conv", "Conv"]),
    ],
)
def test_convolutions(body: str, operators: list[str]) -> None:
    kernels = KERNELS + ", float[2, 1, 1, 1] d = {1, 2}"
    text = f"{HEAD} g {CONV} <{kernels}> {{ {body} }}"
    # Sizes of the two outputs differ where the layers do.
    model = parse(text.replace("[N, 1, H, W] q", "[N, 1, I, J] q"))
    assert op_types(assert_exact(model, MergeSiblings())) == operators


def test_convolutions_can_be_left_out() -> None:
    model = parse(f"{HEAD} g {CONV} <{KERNELS}> {{ p = Conv(x, a)  q = Conv(x, b) }}")
    assert not MergeSiblings(convolutions=False)(model).modified


def reason(model: ir.Model, rule: MergeSiblings) -> str:
    before = op_types(model)
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    return site.detail


PAIR = "p = MatMul(x, a)  q = MatMul(x, b)"


def test_limits() -> None:
    assert "it reads 2 channels, and min_inputs is 3" in reason(graph(PAIR), MergeSiblings(min_inputs=3))
    assert "would have 32 bytes, and max_bytes is 31" in reason(graph(PAIR), MergeSiblings(max_bytes=31))
    assert MergeSiblings(min_inputs=2, max_bytes=32)(graph(PAIR)).modified


def test_left_where_weights_are_shared() -> None:
    body = "p = MatMul(x, a)  q = MatMul(x, a)"
    model = graph(body, A, outputs="float[B, S, 3] p, float[B, S, 3] q")
    assert "read elsewhere too" in reason(model, MergeSiblings())


def test_the_one_with_a_shared_weight_stays_out() -> None:
    body = f"{PAIR}  r = MatMul(x, c)  s = Transpose(c)"
    outputs = "float[B, S, 3] p, float[B, S, 1] q, float[B, S, 2] r, float[2, 2] s"
    after = assert_exact(graph(body, A, B, C, outputs=outputs), MergeSiblings())
    assert sorted(op_types(after)) == ["MatMul", "MatMul", "Split", "Transpose"]


def test_left_below_opset_13() -> None:
    text = '<ir_version: 10, opset_import: ["": 12]> g (float[B, 2] x) => (float[B, 3] p, float[B, 1] q) '
    assert "needs opset 13" in reason(parse(f"{text}<{A}, {B}> {{ {PAIR} }}"), MergeSiblings())


@pytest.mark.parametrize(
    "body",
    [
        "p = MatMul(x, a)  q = Relu(x)",
        "p = MatMul(x, a)  y = Neg(x)  q = MatMul(y, b)",
    ],
)
def test_no_siblings_no_report(body: str) -> None:
    model = graph(body, A, B, outputs="float[B, S, 3] p, float[B, S, N] q")
    rule = MergeSiblings()
    assert not rule(model).modified
    assert rule.sites == []


def test_overridable_weights_are_not_constant() -> None:
    model = graph(PAIR, A, B, more=", float[2, 1] b")
    assert not MergeSiblings()(model).modified


def test_the_product_that_something_else_reads() -> None:
    body = "p = MatMul(x, a)  r = Add(p, u)  q = MatMul(x, b)"
    model = graph(body, A, B, BIAS_A, outputs="float[B, S, 3] p, float[B, S, 1] q, float[B, S, 3] r")
    assert op_types(assert_exact(model, MergeSiblings())) == ["MatMul", "Split", "Add"]


def test_the_merged_layer_stands_before_all_readers() -> None:
    # The second sibling comes after a reader of the first.
    body = "p = MatMul(x, a)  r = Relu(p)  y = Relu(r)  q = MatMul(x, b)"
    model = graph(body, A, B, outputs="float[B, S, 1] q, float[B, S, 3] y")
    assert op_types(assert_exact(model, MergeSiblings())) == ["MatMul", "Split", "Relu", "Relu"]


def test_in_float16_and_float64() -> None:
    for kind in ("float16", "double"):
        text = f"{HEAD} g (float[B, 2] x) => (float[B, 3] p, float[B, 1] q) <{A}, {B}, {BIAS_A}> "
        text += "{ m = MatMul(x, a)  p = Add(m, u)  q = MatMul(x, b) }"
        after = assert_exact(
            parse(text.replace("float[", f"{kind}[")), MergeSiblings(), rtol=2e-3 if kind == "float16" else 1e-12
        )
        assert op_types(after) == ["MatMul", "Add", "Split"]


def test_in_a_branch_and_in_a_function() -> None:
    text = f"""<ir_version: 10, opset_import: ["": 21, "local": 1]>
    g (bool c, float[M, 2] x) => (float[M, N] y, float[M, N] z) <{A}, {C}> {{
        y = local.f(x)
        z = If (c) <then_branch = t () => (float[M, N] w) {{ p = MatMul(x, a)  q = MatMul(x, c2)  w = Concat<axis = 1>(p, q) }},
                    else_branch = e () => (float[M, N] v) {{ v = Concat<axis = 1>(x, x) }}> }}
    <domain: "local", opset_import: ["": 21]> f (x) => (y) {{
        a = Constant<value = float[2, 2] {{1, 2, 3, 4}}>()  b = Constant<value = float[2, 1] {{5, 6}}>()
        p = MatMul(x, a)  q = MatMul(x, b)  y = Concat<axis = 1>(p, q) }}""".replace(
        "float[2, 2] c =", "float[2, 2] c2 ="
    )
    after = assert_exact(parse(text), MergeSiblings())
    (function,) = after.functions.values()
    assert [n.op_type for n in function if n.op_type != "Constant"] == ["MatMul", "Split", "Concat"]
    assert [n.op_type for g in after.graph.subgraphs() for n in g if g.name == "t"] == ["MatMul", "Split", "Concat"]


def test_large_weights_are_concatenated_when_they_are_saved() -> None:
    model = graph(PAIR)
    reads = []

    def lazy(columns: int) -> ir.LazyTensor:
        def read() -> ir.TensorProtocol:
            reads.append(columns)
            return ir.tensor(np.full((2, columns), columns, dtype=np.float32))

        return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([2, columns]))

    for name, columns in (("a", 300_000), ("b", 200_000)):
        model.graph.initializers[name].const_value = lazy(columns)
    MergeSiblings()(model)
    assert reads == []
    (weight,) = (v for v in model.graph.initializers.values() if v.name.endswith("merged"))
    array = weight.const_value.numpy()
    assert array.shape == (2, 500_000)
    assert [array[1, 0], array[0, -1]] == [300_000, 200_000]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(["", "bias", "Relu", "out"])), min_size=2, max_size=5))
def test_any_group(group: list[tuple[int, str]]) -> None:
    rng = np.random.default_rng(0)
    body, constants, outputs = [], [], []
    for number, (width, what) in enumerate(group):
        numbers = ", ".join(str(float(n)) for n in rng.integers(-9, 9, size=2 * width))
        constants.append(f"float[2, {width}] w{number} = {{{numbers}}}")
        body.append(f"m{number} = MatMul(x, w{number})")
        if what == "bias":
            constants.append(f"float[{width}] b{number} = {{{', '.join('3' * width)}}}")
        call = {"bias": f"Add(m{number}, b{number})", "Relu": f"Relu(m{number})"}.get(what, f"Neg(m{number})")
        body.append(f"y{number} = {call}")
        outputs.append(f"float[B, S, {width}] y{number}")
        if what == "out":
            outputs.append(f"float[B, S, {width}] m{number}")
    model = graph("  ".join(body), *constants, outputs=", ".join(outputs))
    after = assert_exact(model, MergeSiblings(), seeds=1)
    assert op_types(after).count("MatMul") == 1


@pytest.mark.real
def test_real_model(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    path = catalogue.fetch("paraphrase-minilm")
    model = ir.load(path)
    ConvertOpset()(model)
    rule = MergeSiblings()
    rule(model)
    # The queries, keys and values of three layers.
    assert [site.detail.split(" to ")[1] for site in rule.sites] == ["1152 channels"] * 3
    ids = np.random.default_rng(0).integers(1, 1000, size=(2, 12))
    before, after = (
        ort.InferenceSession(source, providers=["CPUExecutionProvider"])
        for source in (str(path), ir.to_proto(model).SerializeToString())
    )
    feed = {
        i.name: np.ones_like(ids) if "mask" in i.name else np.zeros_like(ids) if "type" in i.name else ids
        for i in before.get_inputs()
    }
    for one, other in zip(before.run(None, feed), after.run(None, feed), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_fresh_export(dynamo: bool) -> None:
    torch = pytest.importorskip("torch")

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = torch.nn.Linear(4, 6, bias=False), torch.nn.Linear(4, 6)
            self.one, self.two = torch.nn.Conv1d(3, 2, 1), torch.nn.Conv1d(3, 5, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.gate(x) * torch.sigmoid(self.up(x)), torch.cat([self.one(x), self.two(x)], dim=1)

    buffer = io.BytesIO()
    torch.onnx.export(Block().eval(), (torch.randn(2, 3, 4),), buffer, dynamo=dynamo, opset_version=18)
    model = ir.from_proto(onnx.load_from_string(buffer.getvalue()))
    rule = MergeSiblings()
    assert rule(model).modified
    assert sorted(site.detail.split(" to ")[1] for site in rule.sites) == ["12 channels", "7 channels"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize(("ratio", "operators"), [(0.8, ["MatMul", "Split"]), (1.2, ["MatMul", "MatMul"])])
def test_as_the_target_profile_says(ratio: float, operators: list[str]) -> None:
    rule = MergeSiblings(measured=True)
    rule.profile = fake("siblings", ratio)
    text = f"""{HEAD} g (float[B, S, 768] x) => (float[B, S, 3] p, float[B, S, 1] q)
        <float[768, 3] a, float[768, 1] b> {{ p = MatMul(x, a)  q = MatMul(x, b) }}"""
    assert op_types(assert_exact(parse_weighted(text), rule)) == operators


def test_without_a_profile_nothing_is_merged() -> None:
    rule = MergeSiblings(measured=True)
    assert not rule(graph("p = MatMul(x, a)  q = MatMul(x, b)")).modified
    assert rule.sites == []
