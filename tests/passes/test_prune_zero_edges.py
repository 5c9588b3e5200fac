"""`prune-zero-edges`: weighted sums without the terms whose weight is 0."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types

from graphopt.pass_manager import PassManager
from graphopt.passes.fold.zero_edges import PruneZeroEdges
from graphopt.recipe import load


def model(graph: str, dtype: str = "double", **weights: Any) -> ir.Model:
    """A model from text with initializers of the given numbers."""
    text = f'<ir_version: 10, opset_import: ["" : 21]> g {graph.replace("T[", dtype + "[")}'
    proto = onnx.parser.parse_model(text)
    types = {"double": np.float64, "float16": np.float16}
    for name, numbers in weights.items():
        array = numbers if isinstance(numbers, np.ndarray) else np.array(numbers, types[dtype])
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def fold(before: ir.Model, expected: list[str]) -> ir.Model:
    after = assert_exact(before, PruneZeroEdges(), dims={"N": 2, "S": 3})
    assert op_types(after) == expected
    return after


def reasons(m: ir.Model) -> list[str]:
    """Why the sites of `m` are left; `m` stays as it was."""
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    rule = PruneZeroEdges()
    assert not rule(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    return [site.detail for site in rule.sites]


STACK = (
    "(T[N,4] x, T[N,4] z) => (T[%s,P] y) { a = Constant<value_ints = [0]>()  r = Relu(x)  u = Unsqueeze(x, a)"
    "  v = Unsqueeze(r, a)  w = Unsqueeze(z, a)  c = Concat<axis = 0>(u, v, w)"
    "  f = Constant<value_ints = [3, -1]>()  m = Reshape(c, f)  y = %s(k, m) }"
)
EINSUM = 'Einsum<equation = "ij, jk -> ik">'
FOLDED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a sum": (
        "(T[N,4] x) => (T[N,4] y) { r = Relu(x)  a = Mul(x, o)  y = Add(a, r) }",
        {"o": 0.0},
        ["Relu"],
    ),
    "an average over depth": (
        "(T[N,4] x) => (T[N,4] y) { p = Relu(x)  q = Tanh(p)  a = Mul(x, o)  b = Mul(h, p)  c = Add(a, b)"
        "  y = Add(c, q) }",
        {"o": 0.0, "h": 0.5},
        ["Relu", "Tanh", "Mul", "Add"],
    ),
    "zeros a channel": (
        "(T[2,4] x, T[2,4] z) => (T[2,4] y) { a = Mul(o, x)  y = Sub(z, a) }",
        {"o": [0.0] * 4},
        ["Identity"],
    ),
    "subtracted from zero": (
        "(T[2,4] x, T[2,4] z) => (T[2,4] y) { a = Mul(o, x)  y = Sub(a, z) }",
        {"o": 0.0},
        ["Neg"],
    ),
    "a sum of several": (
        "(T[2,4] x, T[2,4] z, T[1,4] w) => (T[2,4] y) { a = Div(o, x)  b = Mul(w, o)  y = Sum(a, z, b, w) }",
        {"o": 0.0},
        ["Sum"],
    ),
    "the last term": (
        "(T[2,4] x, T[2,4] z) => (T[2,4] y) { a = Mul(x, o)  y = Sum(z, a) }",
        {"o": 0.0},
        ["Identity"],
    ),
    "a stack": (
        STACK % (1, "MatMul"),
        {"k": [[0.5, 0.0, 1.0]]},
        ["Unsqueeze", "Unsqueeze", "Concat", "Reshape", "MatMul"],
    ),
    "several averages of a stack": (
        STACK % (2, "MatMul"),
        {"k": [[0.5, 0.0, 0.0], [2.0, 0.0, 0.0]]},
        ["Unsqueeze", "Concat", "Reshape", "MatMul"],
    ),
    "a stack in Einstein's notation": (
        STACK % (1, EINSUM),
        {"k": [[0.0, 0.5, 1.0]]},
        ["Relu", "Unsqueeze", "Unsqueeze", "Concat", "Reshape", "Einsum"],
    ),
    "two multiples": (
        "(T[N,4] x) => (T[N,4] y) { r = Relu(x)  a = Mul(r, k)  b = Div(r, l)  c = Sub(a, b)  y = Add(c, r) }",
        {"k": [1.0, 2.0, 3.0, 4.0], "l": 2.5},
        ["Relu", "Mul"],
    ),
    "one that is a multiple itself": (
        "(T[N,4] x) => (T[N,4] y) { a = Mul(x, k)  b = Mul(a, l)  y = Add(a, b) }",
        {"k": 3.0, "l": 2.5},
        ["Mul", "Mul"],
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_prunes(case: str) -> None:
    graph, weights, expected = FOLDED[case]
    fold(model(graph, **weights), expected)


LEFT: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "a term that widens": (
        "(T[N,4] x, T[1,4] z) => (T[N,4] y) { a = Mul(x, o)  y = Add(a, z) }",
        {"o": 0.0},
        ["the term that is 0 may give the sum more elements than the others have"],
    ),
    "a stack that is read elsewhere": (
        (STACK % (1, "MatMul")).replace("(T[1,P] y)", "(T[1,P] y, T[3,Q] m)"),
        {"k": [[0.5, 0.0, 1.0]]},
        ["the stack 'm' is read by something else too"],
    ),
    "zeros alone": (
        "(T[N,4] x, T[N,4] z) => (T[N,4] y) { a = Mul(x, o)  b = Mul(z, o)  y = Add(a, b) }",
        {"o": 0.0},
        [],
    ),
    "nearly zero": ("(T[N,4] x, T[N,4] z) => (T[N,4] y) { a = Mul(x, o)  y = Add(a, z) }", {"o": 1e-30}, []),
    "no zero in the stack": (STACK % (1, "MatMul"), {"k": [[0.5, 1e-9, 1.0]]}, []),
    "a column that one of two averages needs": (
        STACK % (2, "MatMul"),
        {"k": [[0.5, 0.0, 1.0], [0.5, 1.0, 1.0]]},
        [],
    ),
    "multiples that undo each other": (
        "(T[N,4] x) => (T[N,4] y) { a = Mul(x, k)  b = Mul(x, k)  y = Sub(a, b) }",
        {"k": 3.0},
        [],
    ),
    "multiples that are read elsewhere": (
        "(T[N,4] x) => (T[N,4] y, T[N,4] a, T[N,4] b) { a = Mul(x, k)  b = Mul(x, l)  y = Add(a, b) }",
        {"k": 3.0, "l": 2.0},
        [],
    ),
    "twice the same": ("(T[N,4] x) => (T[N,4] y) { y = Add(x, x) }", {}, []),
    "integers": (
        "(int64[2,4] x, int64[2,4] z) => (int64[2,4] y) { a = Mul(x, o)  y = Add(a, z) }",
        {"o": np.array(0)},
        [],
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left(case: str) -> None:
    graph, weights, expected = LEFT[case]
    assert reasons(model(graph, **weights)) == expected


def test_overridable_weights() -> None:
    m = model("(T[N,4] x, T[N,4] z) => (T[N,4] y) { a = Mul(x, o)  y = Add(a, z) }", o=0.0)
    m.graph.inputs.append(m.graph.initializers["o"])
    assert reasons(m) == []


def test_float16_and_a_subgraph() -> None:
    m = model(
        """(T[N,4] x, bool c) => (T[P,Q] y) { r = Relu(x)
        y = If(c) <then_branch = yes () => (T[P,Q] p) { a = Mul(x, o)  p = Add(a, r) },
            else_branch = no () => (T[P,Q] p) { a = Mul(x, k)  b = Mul(x, h)  p = Add(a, b) }> }""",
        "float16",
        o=0.0,
        k=2.0,
        h=0.5,
    )
    assert PruneZeroEdges()(m).modified
    onnx.checker.check_model(ir.to_proto(m), full_check=True)
    graphs = {graph.name: [node.op_type for node in graph] for graph in m.graph.subgraphs()}
    assert graphs == {"yes": ["Identity"], "no": ["Mul"]}
    large = model("(T[N,4] x) => (T[N,4] y) { a = Mul(x, k)  b = Mul(x, k)  y = Add(a, b) }", "float16", k=6e4)
    assert reasons(large) == []


@pytest.mark.export
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("script", [False, True], ids=["torch.export", "TorchScript"])
@pytest.mark.parametrize("stacked", [False, True], ids=["sums", "stack"])
def test_denseformer(stacked: bool, script: bool) -> None:
    torch = pytest.importorskip("torch")
    onnxruntime = pytest.importorskip("onnxruntime")

    class DenseFormer(torch.nn.Module):
        """Depth-weighted averages after each of three blocks; the second and the third drop the input."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
            weights = [[0.5, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.5, 1.0]]
            self.alphas = torch.nn.ParameterList(torch.nn.Parameter(torch.tensor(w)) for w in weights)

        def forward(self, x: Any) -> Any:
            outputs = [x]
            for block, alpha in zip(self.blocks, self.alphas, strict=True):
                outputs.append(torch.tanh(block(outputs[-1])))
                if stacked:
                    outputs[-1] = torch.tensordot(alpha, torch.stack(outputs), dims=1)
                else:
                    outputs[-1] = sum(alpha[i] * value for i, value in enumerate(outputs))
            return outputs[-1]

    torch.manual_seed(0)
    network, x = DenseFormer().eval(), torch.randn(2, 5, 8)
    logging.disable(logging.WARNING)
    try:
        if script:
            buffer = io.BytesIO()
            torch.onnx.export(network, (x,), buffer, dynamo=False, opset_version=17)
            m = ir.from_proto(onnx.load_from_string(buffer.getvalue()))
        else:
            m = ir.from_proto(torch.onnx.export(network, (x,), dynamo=True, opset_version=20).model_proto)
    finally:
        logging.disable(logging.NOTSET)
    PassManager(load().passes(), verifier_of=None)(m)
    rule = PruneZeroEdges()
    assert rule(m).modified
    assert sum(site.outcome == "applied" for site in rule.sites) == 2
    session = onnxruntime.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(got, network(x).detach().numpy(), rtol=1e-4, atol=1e-5)
