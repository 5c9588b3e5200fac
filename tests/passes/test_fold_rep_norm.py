"""`fold-rep-norm`: RepBN as one batch normalization, PowerNorm as an RMSNorm with its gain."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types

from graphopt.passes import registry
from graphopt.passes.fold.rep_norm import FoldRepNorm

BN = "n = BatchNormalization(x, g, b, m, v)"
STATISTICS = {"g": (4,), "b": (4,), "m": (4,), "v": (4,)}
NORM = {"g": (4,), "b": (4,)}


def model(graph: str, opset: int = 23, dtype: str = "double", **weights: tuple[int, ...] | float) -> ir.Model:
    """A model from text with random positive weights of the given shapes; a number is a scalar of that value."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}]> g {graph.replace("T[", dtype + "[")}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    types = {"double": np.float64, "float": np.float32, "float16": np.float16}
    for name, shape in weights.items():
        array = rng.uniform(0.5, 2, size=shape) if isinstance(shape, tuple) else np.array(shape)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(types[dtype]), name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def fold(before: ir.Model, expected: list[str]) -> ir.Model:
    after = assert_exact(before, FoldRepNorm(), dims={"N": 2, "S": 3})
    assert op_types(after) == expected
    return after


def reasons(m: ir.Model) -> list[str]:
    """Why the sites of `m` are left; `m` stays as it was."""
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    rule = FoldRepNorm()
    assert not rule(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    return [site.detail for site in rule.sites]


RMS = "(T[N,S,4] x) => (T[N,S,4] y) { f = Constant<value_ints = [0, 0, 1, 4]>()  v = Reshape(x, f)  q = Mul(v, v)"
FOLDED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "RepBN": (
        f"(T[N,4,S] x) => (T[N,4,S] y) {{ {BN}  a = Mul(k, x)  y = Add(n, a) }}",
        {**STATISTICS, "k": (1,)},
        ["BatchNormalization"],
    ),
    "plus its input": (
        f"(T[N,4] x) => (T[N,4] y) {{ {BN}  y = Add(x, n) }}",
        STATISTICS,
        ["BatchNormalization"],
    ),
    "minus a scale a channel, each part with more": (
        f"(T[N,4,S] x) => (T[N,4,S] y) {{ {BN}  s = Div(n, l)  a = Mul(x, k)  c = Add(a, l)  y = Sub(s, c) }}",
        {**STATISTICS, "k": (4, 1), "l": (4, 1)},
        ["BatchNormalization"],
    ),
    "two batch normalizations": (
        f"(T[N,4,S] x) => (T[N,4,S] y) {{ {BN}  o = BatchNormalization(x, v, m, b, g)  y = Add(n, o) }}",
        STATISTICS,
        ["BatchNormalization"],
    ),
    "the mean square of a token, tiled": (
        RMS + "  a = Constant<value_ints = [3]>()  s = ReduceMean(q, a)  t = Constant<value_ints = [1, 1, 1, 4]>()"
        "  r = Tile(s, t)  h = Constant<value_ints = [0, 0, 4]>()  c = Reshape(r, h)  e = Add(c, eps)  d = Sqrt(e)"
        "  y = Div(x, d) }",
        {"eps": 1e-5},
        ["Mul", "ReduceMean", "Add", "Sqrt", "Div"],
    ),
    "the mean square of a token, expanded": (
        RMS + "  a = Constant<value_ints = [-1]>()  s = ReduceMean<keepdims = 0>(q, a)"
        "  w = Constant<value_ints = [-1]>()  u = Unsqueeze(s, w)  t = Constant<value_ints = [1, 1, 1, 4]>()"
        "  r = Expand(u, t)  h = Constant<value_ints = [2]>()  c = Squeeze(r, h)  e = Add(eps, c)  d = Sqrt(e)"
        "  y = Div(x, d) }",
        {"eps": 1e-5},
        ["Mul", "ReduceMean", "Add", "Sqrt", "Div"],
    ),
    "a scale into the gain": (
        "(T[N,S,4] x) => (T[N,4,S] y) { n = RMSNormalization(x, g)  t = Transpose<perm = [0, 2, 1]>(n)"
        "  d = Div(t, k)  y = Mul(l, d) }",
        {"g": (4,), "k": (4, 1), "l": 3.0},
        ["RMSNormalization", "Transpose"],
    ),
    "scale and shift": (
        "(T[N,S,4] x) => (T[N,S,4] y) { n = LayerNormalization(x, g)  d = Mul(n, k)  s = Sub(d, l)  y = Relu(s) }",
        {"g": (4,), "k": (4,), "l": (4,)},
        ["LayerNormalization", "Relu"],
    ),
    "scale and shift of a bias": (
        "(T[N,S,4] x) => (T[N,S,4] y) { n = LayerNormalization(x, g, b)  d = Sub(k, n)  y = Relu(d) }",
        {**NORM, "k": (4,)},
        ["LayerNormalization", "Relu"],
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folds(case: str) -> None:
    graph, weights, expected = FOLDED[case]
    fold(model(graph, **weights), expected)


def test_before_opset_18_the_axes_are_an_attribute() -> None:
    graph, weights, expected = FOLDED["the mean square of a token, tiled"]
    graph = graph.replace("a = Constant<value_ints = [3]>()  ", "").replace(
        "ReduceMean(q, a)", "ReduceMean<axes = [3]>(q)"
    )
    fold(model(graph, opset=17, **weights), expected)


LEFT: dict[str, tuple[str, dict[str, Any], str]] = {
    "read elsewhere": (
        f"(T[N,4,S] x) => (T[N,4,S] y, T[N,4,S] z) {{ {BN}  y = Add(n, x)  z = Relu(n) }}",
        STATISTICS,
        "'n' is read by 2 nodes",
    ),
    "a number a position": (
        f"(T[N,4,3] x) => (T[N,4,3] y) {{ {BN}  a = Mul(x, k)  y = Add(n, a) }}",
        {**STATISTICS, "k": (3,)},
        "aren't one number a channel",
    ),
    "two groups": (
        RMS.replace("1, 4]", "2, 2]") + "  a = Constant<value_ints = [3]>()  s = ReduceMean(q, a)"
        "  t = Constant<value_ints = [1, 1, 1, 2]>()  r = Tile(s, t)  h = Constant<value_ints = [0, 0, 4]>()"
        "  c = Reshape(r, h)  e = Add(c, eps)  d = Sqrt(e)  y = Div(x, d) }",
        {"eps": 1e-5},
        "over groups of the channels",
    ),
    "the mean of another token": (
        RMS + "  a = Constant<value_ints = [3]>()  s = ReduceMean(q, a)  t = Constant<value_ints = [1, 1, 4, 1]>()"
        "  r = Tile(s, t)  o = Constant<value_ints = [1, 1, 1, 1]>()  z = Tile(r, o)"
        "  h = Constant<value_ints = [1, -1, 4]>()  c = Reshape(z, h)  e = Add(c, eps)  d = Sqrt(e)  y = Div(x, d) }",
        {"eps": 1e-5},
        "isn't known to be repeated for each channel",
    ),
    "a computed gain": (
        "(T[N,4] x, T[4] g) => (T[N,4] y) { n = LayerNormalization(x, g, b)  y = Mul(n, k) }",
        {"b": (4,), "k": (4,)},
        "isn't constant",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_its_reason(case: str) -> None:
    graph, weights, expected = LEFT[case]
    (why,) = reasons(model(graph, **weights))
    assert expected in why


SILENT: dict[str, tuple[str, dict[str, Any]]] = {
    "training": (
        "(T[N,4,S] x) => (T[N,4,S] y) { n, p, q = BatchNormalization<training_mode = 1>(x, g, b, m, v)  y = Add(n, x) }",
        STATISTICS,
    ),
    "of another value": (f"(T[N,4] x, T[N,4] z) => (T[N,4] y) {{ {BN}  y = Add(n, z) }}", STATISTICS),
    "no normalization": ("(T[N,4] x) => (T[N,4] y) { a = Mul(x, k)  y = Add(a, x) }", {"k": (4,)}),
    "a shift behind an RMSNorm": (
        "(T[N,4] x) => (T[N,4] y) { n = RMSNormalization(x, g)  y = Add(n, k) }",
        {"g": (4,), "k": (4,)},
    ),
    "a norm that another reads too": (
        "(T[N,4] x) => (T[N,4] y) { n = LayerNormalization(x, g, b)  m = Mul(n, k)  y = Add(m, n) }",
        {**NORM, "k": (4,)},
    ),
    "over two axes": (
        "(T[N,4,4] x) => (T[N,4,4] y) { n = LayerNormalization<axis = 1>(x, g, b)  y = Mul(n, k) }",
        {"g": (4, 4), "b": (4, 4), "k": (4,)},
    ),
}


@pytest.mark.parametrize("case", SILENT)
def test_no_site(case: str) -> None:
    graph, weights = SILENT[case]
    assert reasons(model(graph, **weights)) == []


def test_float16() -> None:
    graph, weights, expected = FOLDED["RepBN"]
    m = model(graph, dtype="float16", **weights)
    assert FoldRepNorm()(m).modified
    assert op_types(m) == expected
    assert {v.const_value.dtype for v in m.graph.initializers.values()} == {ir.DataType.FLOAT16}
    wide = model(graph, dtype="float16", **{**weights, "k": 6e4})
    wide.graph.initializers["v"].const_value = ir.tensor(np.full(4, 6e-8, np.float16), name="v")
    wide.graph.initializers["g"].const_value = ir.tensor(np.full(4, 100, np.float16), name="g")
    assert reasons(wide) == ["its scales would leave float16"]


def test_in_a_subgraph() -> None:
    m = model(
        f"""(T[N,4,S] x, bool c) => (T[P,Q,R] y) {{
        y = If(c) <then_branch = yes () => (T[P,Q,R] p) {{ {BN}  a = Mul(x, k)  p = Add(a, n) }},
            else_branch = no () => (T[P,Q,R] p) {{ p = Relu(x) }}> }}""",
        **STATISTICS,
        k=0.3,
    )
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 4, 5)), "c": np.array(True)}
    after = assert_exact(m, FoldRepNorm(), feeds=feeds)
    yes = next(iter(after.graph)).attributes["then_branch"].as_graph()
    assert [n.op_type for n in yes] == ["BatchNormalization"]


# ---- the modules of both papers, as they are exported


def _networks() -> dict[str, tuple[Any, list[str]]]:
    import torch
    from torch import nn

    class RepBN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha, self.bn = nn.Parameter(torch.rand(1)), nn.BatchNorm1d(8)
            for parameter in (self.bn.weight, self.bn.bias, self.bn.running_mean):
                nn.init.normal_(parameter)

        def forward(self, x: Any) -> Any:
            x = x.transpose(1, 2)
            return (self.bn(x) + self.alpha * x).transpose(1, 2)

    class PowerNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
            self.register_buffer("phi", torch.rand(1, 8, 1, 1) + 0.5)

        def forward(self, x: Any) -> Any:
            t, b, c = x.shape
            groups = x.contiguous().reshape(t, b, 1, c)
            square = torch.mean(groups * groups, dim=3, keepdim=True)
            square = torch.repeat_interleave(square, repeats=c, dim=-1).contiguous().reshape(t, b, c)
            x = (x / torch.sqrt(square + 1e-5)).permute(1, 2, 0).contiguous()
            # The paper's code has reshape(b, c, -1) here, of which TorchScript makes a Reshape that fails.
            y = x.flatten(2).unsqueeze(-1) / (self.phi + 1e-5).sqrt()
            y = self.weight.reshape(1, c, 1, 1) * y + self.bias.reshape(1, c, 1, 1)
            return y.reshape(x.size()).permute(2, 0, 1).contiguous()

    torch.manual_seed(0)
    return {
        "RepBN": (nn.Sequential(RepBN(), nn.Linear(8, 6)), ["Transpose", "Transpose", "MatMul", "Add"]),
        "PowerNorm": (
            nn.Sequential(PowerNorm(), nn.Linear(8, 6)),
            ["RMSNormalization", "Transpose", "Unsqueeze", "Reshape", "Transpose", "MatMul", "Add"],
        ),
    }


CLEAN = (
    "lift-constants", "eliminate-dead-code", "eliminate-identities", "eliminate-common-subexpressions",
    "simplify-shapes", "convert-opset", "fold-constants", "simplify-shapes", "eliminate-identities",
)  # fmt: skip


@pytest.mark.export
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", [False, True], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("network", ["RepBN", "PowerNorm"])
def test_what_exporters_write(network: str, script: bool) -> None:
    torch = pytest.importorskip("torch")
    onnxruntime = pytest.importorskip("onnxruntime")
    module, expected = _networks()[network]
    module, x = module.eval(), torch.randn(5, 3, 8)
    logging.disable(logging.WARNING)
    try:
        if script:
            buffer = io.BytesIO()
            torch.onnx.export(module, (x,), buffer, dynamo=False, opset_version=17)
            m = ir.from_proto(onnx.load_from_string(buffer.getvalue()))
        else:
            m = ir.from_proto(torch.onnx.export(module, (x,), dynamo=True, opset_version=20).model_proto)
    finally:
        logging.disable(logging.NOTSET)
    for name in (*CLEAN, "fold-rep-norm", "raise-rms-norm", "fold-rep-norm", "fold-batch-norm", "fold-affine"):
        registry.make(name)(m)
    assert [op for op in op_types(m) if op not in ("Unsqueeze", "Reshape")] == [
        op for op in expected if op not in ("Unsqueeze", "Reshape")
    ]
    session = onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, module(x).detach().numpy(), rtol=1e-4, atol=1e-5)
