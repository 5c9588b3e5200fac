"""`fold-weight-subgraphs`: weights computed from weights, proved in float64, in bounded memory, and what is left."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types
from onnx import TensorProto, helper, numpy_helper

from graphopt.graph import load, save
from graphopt.graph.computed import LAZY_BYTES, origin_of
from graphopt.graph.save import weight_bytes
from graphopt.models import catalogue
from graphopt.pass_manager import PassManager
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.fold.weight_subgraphs import FoldWeightSubgraphs
from graphopt.recipe import load as load_recipe
from graphopt.verification.verifier import Verifier

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
RNG = np.random.default_rng(0)


def model(
    body: str, head: str = "(double[B,16] x) => (double[B,N] y)", opset: int = 21, **weights: np.ndarray
) -> ir.Model:
    """A model from text with the given constants."""
    proto = onnx.parser.parse_model(f"{HEAD.replace('21', str(opset))} g {head} {{ {body} }}")
    for name, array in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def normal(*shape: int, dtype: type = np.float64) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def reasons(before: ir.Model, rule: FoldWeightSubgraphs | None = None) -> list[str]:
    rule = rule or FoldWeightSubgraphs(min_bytes=1024)
    operators = op_types(before)
    assert not rule(before).modified
    assert op_types(before) == operators
    return [site.detail for site in rule.sites]


W = normal(16, 24)
CASES: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "lora": (
        "d = MatMul(a, b)  e = Mul(d, s)  w2 = Add(w, e)  y = MatMul(x, w2)",
        {"w": W, "a": normal(16, 4), "b": normal(4, 24), "s": np.array(0.5)},
    ),
    "weight normalization": (
        "q = Mul(w, w)  r = ReduceSum(q, zero)  n = Sqrt(r)  u = Div(w, n)  w2 = Mul(u, g)  y = MatMul(x, w2)",
        {"w": W, "zero": np.array([0]), "g": normal(24)},
    ),
    "weight standardization": (
        "m = ReduceMean(w, zero)  c = Sub(w, m)  q = Mul(c, c)  v = ReduceMean(q, zero)  e = Add(v, eps)  n = Sqrt(e) "
        "w2 = Div(c, n)  y = MatMul(x, w2)",
        {"w": W, "zero": np.array([0]), "eps": np.array(1e-5)},
    ),
    "fake quantization": (
        "d = Div(w, s)  r = Round(d)  c = Clip(r, low, high)  w2 = Mul(c, s)  y = MatMul(x, w2)",
        {"w": W, "s": np.array(0.03), "low": np.array(-7.0), "high": np.array(7.0)},
    ),
    "companded": ("a = Tanh(w)  e = Sign(a)  f = Mul(e, a)  w2 = Mul(f, a)  y = MatMul(x, w2)", {"w": W}),
    "hypernetwork": (
        "h = MatMul(z, p)  t = Tanh(h)  w2 = Reshape(t, to)  y = MatMul(x, w2)",
        {"z": normal(1, 8), "p": normal(8, 384), "to": np.array([16, 24])},
    ),
    "gates in another order": (
        "i = Slice(w, c0, c8, c1)  f = Slice(w, c8, c16, c1)  o = Slice(w, c16, c24, c1)  w2 = Concat<axis = 1>(o, i, f) "
        "y = MatMul(x, w2)",
        {"w": W, **{f"c{i}": np.array([i]) for i in (0, 1, 8, 16, 24)}},
    ),
    "one hypernetwork for two layers": (
        "h = Tanh(p)  w2 = MatMul(z, h)  w3 = MatMul(k, h)  y1 = MatMul(x, w2)  y2 = MatMul(x, w3)  y = Add(y1, y2)",
        {"p": normal(64, 24), "z": normal(16, 64), "k": normal(16, 64)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_folded(case: str) -> None:
    body, weights = CASES[case]
    before = model(body, **weights)
    rest = [op for op in op_types(before)][-3 if case.startswith("one") else -1 :]
    after = assert_exact(before, FoldWeightSubgraphs(min_bytes=1024), dims={"B": 2})
    assert op_types(after) == rest
    assert weight_bytes(after) <= weight_bytes(before)


def test_fold_constants_alone_leaves_an_adapter() -> None:
    """Why there is a pass of its own."""
    rng, body = np.random.default_rng(0), CASES["lora"][0]
    before = model(
        body, "(double[B,64] x) => (double[B,64] y)", w=rng.normal(size=(64, 64)), a=rng.normal(size=(64, 2)),
        b=rng.normal(size=(2, 64)), s=np.array(0.5),
    )  # fmt: skip
    after = before.clone()
    FoldConstants()(after)
    assert op_types(after) == op_types(before)
    assert op_types(assert_exact(before, FoldWeightSubgraphs(), dims={"B": 2})) == ["MatMul"]


def test_each_operator_rounds_in_its_own_type() -> None:
    w, s = normal(64, 64, dtype=np.float16), np.array(0.1, np.float16)
    before = model(
        "d = Div(w, s)  r = Round(d)  w2 = Mul(r, s)  c = Cast<to = 1>(x)  h = Cast<to = 10>(c)  y = MatMul(h, w2)",
        "(float16[B,64] x) => (float16[B,64] y)", w=w, s=s,
    )  # fmt: skip
    FoldWeightSubgraphs(min_bytes=1024)(before)
    (tensor,) = [v.const_value for v in before.graph.initializers.values()]
    np.testing.assert_array_equal(tensor.numpy(), np.rint(w / s) * s)
    assert tensor.numpy().dtype == np.float16


def test_larger_results_are_left() -> None:
    body, weights = CASES["lora"]
    before = model(body + "  z = Neg(w)", "(double[B,16] x) => (double[B,24] y, double[16,24] z)", **weights)
    # Two results where there was one weight; an adapter of less than 1 KiB doesn't count.
    assert reasons(before) == ["constant, but storing its result would make the file 0.00307 MB larger"] * 2
    half = model("c = Cast<to = 11>(w)  y = MatMul(x, c)", w=W.astype(np.float16))
    assert reasons(half) == ["constant, but storing its result would make the file 0.00307 MB larger"]
    unpacked = model("c = Cast<to = 11>(w)  d = Mul(c, s)  y = MatMul(x, d)", w=W.astype(np.int8), s=np.array(0.1))
    assert "larger" in reasons(unpacked)[0]


def test_a_result_that_pays_for_itself_is_taken_from_a_group_that_does_not() -> None:
    before = model(
        "h = MatMul(z, p)  e = MatMul(k, h)  y1 = MatMul(x, h)  o = Expand(e, big)  y2 = MatMul(x, e)  y = Add(y1, y2)",
        "(double[B,16] x) => (double[B,24] y, double[40,16,24] o)",
        z=normal(16, 64), p=normal(64, 24), k=normal(16, 16), big=np.array([40, 16, 24]),
    )  # fmt: skip
    rule = FoldWeightSubgraphs(min_bytes=1024)
    assert rule(before).modified
    assert "MatMul" in op_types(before)
    assert weight_bytes(before) < 8 * (16 * 64 + 64 * 24 + 16 * 16)
    assert any("MB larger" in site.detail for site in rule.sites)


def test_quantized_random_and_unknown_are_left() -> None:
    quantized = model(
        "d = DequantizeLinear(w, s)  t = Transpose(d)  y = MatMul(x, t)", "(float[B,64] x) => (float[B,64] y)",
        w=np.ones((64, 64), np.int8), s=np.array(0.1, np.float32),
    )  # fmt: skip
    assert reasons(quantized) == ["reads what DequantizeLinear makes of a constant: the weights stay quantized"]
    random = model("r = RandomNormal<shape = [16, 24], dtype = 11>()  w2 = Mul(r, w)  y = MatMul(x, w2)", w=W)
    assert reasons(random) == ["reads the random numbers of RandomNormal"]
    nan = model("d = Div(w, zero)  w2 = Sub(d, d)  y = MatMul(x, w2)", w=W, zero=np.array(0.0))
    assert "NaN" in reasons(nan)[0]
    huge = model(
        "e = Expand(w, to)  r = ReduceMax<keepdims = 0>(e, c)  y = MatMul(x, r)",
        w=W,
        to=np.array([99, 16, 24]),
        c=np.array([0]),
    )
    assert reasons(huge, FoldWeightSubgraphs(1024, max_temporary=100_000)) == [
        "constant, but the result of Expand on the way would take 0.304 MB"
    ]
    overridable = model("w2 = Tanh(w)  y = MatMul(x, w2)", "(double[B,16] x, double[16,24] w) => (double[B,24] y)", w=W)
    assert reasons(overridable) == []


def test_bfloat16_is_left() -> None:
    before = model(
        "w2 = Tanh(w)  h = Cast<to = 1>(w2)  y = MatMul(x, h)",
        "(float[B,64] x) => (float[B,64] y)",
        w=normal(64, 64, dtype=np.float32),
    )
    value = before.graph.initializers["w"]
    value.const_value = ir.tensor(np.ones((64, 64), ml_dtypes.bfloat16), name="w")
    value.type = ir.TensorType(ir.DataType.BFLOAT16)
    found = reasons(before)
    assert len(found) == 1


def test_in_a_branch_with_the_weight_outside() -> None:
    before = model(
        "y = If (c) <then_branch = t () => (double[B,24] a) { w2 = Tanh(w)  a = MatMul(x, w2) }, "
        "else_branch = e () => (double[B,24] b) { v2 = Exp(v)  b = MatMul(x, v2) }>",
        "(bool c, double[B,16] x) => (double[B,24] y)", w=W, v=normal(16, 24),
    )  # fmt: skip
    after = assert_exact(before, FoldWeightSubgraphs(min_bytes=1024), dims={"B": 2})
    assert [[n.op_type for n in g] for g in after.graph.subgraphs()] == [["MatMul"], ["MatMul"]]
    assert not after.graph.initializers


def test_a_weight_that_is_a_graph_output() -> None:
    before = model("w2 = Tanh(w)  y = MatMul(x, w2)", "(double[B,16] x) => (double[B,24] y, double[16,24] w2)", w=W)
    after = assert_exact(before, FoldWeightSubgraphs(min_bytes=1024), dims={"B": 2})
    assert sorted(op_types(after)) == ["Identity", "MatMul"]


SIDE = 512


def stacked(folder: Path, layers: int) -> Path:
    """So many layers, each with a weight of 1 MiB, fake-quantized and with an adapter, on disk."""
    rng, nodes, constants = np.random.default_rng(0), [], {"s": np.array(0.01, np.float32)}
    value = "x"
    for i in range(layers):
        names = {n: f"{n}{i}" for n in ("w", "a", "b", "d", "m", "q", "r", "v", "h")}
        constants[names["w"]] = rng.normal(size=(SIDE, SIDE)).astype(np.float32)
        constants[names["a"]] = rng.normal(size=(SIDE, 4)).astype(np.float32)
        constants[names["b"]] = rng.normal(size=(4, SIDE)).astype(np.float32)
        steps = (("MatMul", "ab", "d"), ("Add", "wd", "m"), ("Div", "ms", "q"), ("Round", "q", "r"), ("Mul", "rs", "v"))
        for op, inputs, output in steps:
            nodes.append(helper.make_node(op, [names.get(n, n) for n in inputs], [names[output]]))
        nodes.append(helper.make_node("MatMul", [value, names["v"]], [names["h"]]))
        value = names["h"]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIDE])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [1, SIDE])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    path = folder / f"{layers}.onnx"
    onnx.save(proto, path, save_as_external_data=True, location=f"{layers}.data")
    return path


@pytest.mark.parametrize("rule", [FoldWeightSubgraphs, FoldConstants])
def test_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path, rule: type) -> None:
    peaks = []
    for layers in (4, 40):
        path, target = stacked(tmp_path, layers), tmp_path / "out.onnx"
        tracemalloc.start()
        model = load(path)
        rule()(model)
        save(model, target)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        if rule is FoldWeightSubgraphs:
            assert op_types(model) == ["MatMul"] * layers
            assert op_types(load(target)) == ["MatMul"] * layers
            size = sum(file.stat().st_size for file in tmp_path.glob("out.onnx*"))
            assert size < layers * SIDE * SIDE * 4 + 100_000
    assert peaks[1] < peaks[0] + 4 * LAZY_BYTES


def test_equal_computations_are_known(tmp_path: Path) -> None:
    model = load(stacked(tmp_path, 2))
    for name in "wab":
        model.graph.initializers[f"{name}1"].const_value = model.graph.initializers[f"{name}0"].const_value
    FoldWeightSubgraphs()(model)
    first, second = (v.const_value for v in model.graph.initializers.values())
    assert origin_of(first) is not None
    assert origin_of(first) == origin_of(second)


@pytest.mark.real
def test_recurrent_weights_of_a_real_model(tmp_path: Path) -> None:
    """PyTorch's exporter cuts the weights of an LSTM into gates and puts them together in ONNX's order."""
    model = load(catalogue.fetch("silero-vad-openvino"))
    verifier = Verifier(model.clone())
    passes = [p for p in load_recipe().passes() if getattr(p, "name", "") != FoldWeightSubgraphs.name]
    at = next(i for i, p in enumerate(passes) if getattr(p, "name", "") == "fold-constants")
    other = model.clone()
    PassManager(passes, verifier_of=None)(other)
    rule = FoldWeightSubgraphs()
    report = PassManager([*passes[:at], rule, *passes[at:]], verifier_of=None)(model)
    assert any(r.name == rule.name and r.status == "applied" for r in report.records)
    # What fold-constants would leave is gone, and the weights have as many bytes.
    assert op_types(other).count("Concat") > op_types(model).count("Concat")
    assert weight_bytes(model) <= weight_bytes(other) + 1024
    assert verifier.check(model).ok


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False])
def test_parametrized_weights_of_an_export(dynamo: bool, tmp_path: Path) -> None:
    """A weight-normalized layer, one with an adapter, a standardized and a fake-quantized one, through both exporters."""
    torch = pytest.importorskip("torch")

    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.normed = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(96, 96))
            self.w, self.s, self.f = (torch.nn.Parameter(torch.randn(96, 96) / 10) for _ in range(3))
            self.a, self.b = torch.nn.Parameter(torch.randn(4, 96)), torch.nn.Parameter(torch.randn(96, 4) / 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.tanh(self.normed(x))
            x = torch.tanh(x @ (self.w + 0.5 * (self.b @ self.a)))
            centred = self.s - self.s.mean(0, keepdim=True)
            x = torch.tanh(torch.nn.functional.linear(x, centred / (centred.std(0, keepdim=True) + 1e-5)))
            return x @ (torch.round(self.f / 0.02).clamp(-8, 7) * 0.02)

    path = tmp_path / "layers.onnx"
    torch.onnx.export(
        Layers().eval(), (torch.randn(2, 96),), str(path), dynamo=dynamo, opset_version=18, do_constant_folding=False
    )
    model = load(path)
    passes = load_recipe().passes()
    at = next(i for i, p in enumerate(passes) if getattr(p, "name", "") == "fold-constants")
    report = PassManager([*passes[:at], FoldWeightSubgraphs(), *passes[at:]])(model)
    assert set(op_types(model)) <= {"MatMul", "Gemm", "Add", "Tanh"}
    assert weight_bytes(model) <= 4 * (4 * 96 * 96 + 96) + 2048
    assert report.verdict is not None
    assert report.verdict.ok
