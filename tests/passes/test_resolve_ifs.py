from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exactness import op_types, parse

from graphopt import optimize
from graphopt.analysis.failure import why_fails
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import nodes
from graphopt.models.catalogue import fetch
from graphopt.passes.clean.resolve_ifs import ResolveIfs

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
SQUEEZE = """
    s = Shape(x) t = Gather <axis = 0> (s, two) c = Equal(t, one)
    a = If (c) <
        then_branch = yes () => (float[p, q] u) { u = Squeeze(x, two) },
        else_branch = no () => (float[p, q, r] v) { v = Identity(x) }
    >"""
CONSTANTS = "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}>"


def run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options).run(None, feeds)


def resolved(text: str, *feeds: dict[str, np.ndarray]) -> tuple[ir.Model, ResolveIfs]:
    """The model after the pass: valid, equal bit for bit on `feeds`, and unchanged by a second run."""
    before = ir.from_proto(onnx.parser.parse_model(text))
    after, rule = before.clone(), ResolveIfs()
    rule(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert not ResolveIfs()(after.clone()).modified
    for given in feeds:
        for e, g in zip(run(before, given), run(after, given), strict=True):
            assert e.tobytes() == g.tobytes()
    return after, rule


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "Conv", "Gemm"])
def test_a_rank_that_is_refused(kind: str) -> None:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}.get(kind, 0)
    if gates:
        nodes_, weights = (
            f"b = Unsqueeze(a, zero) h, y = {kind} <hidden_size = 2> (b, w, r)",
            (f"float[1, {2 * gates}, 4] w, float[1, {2 * gates}, 2] r"),
        )
        output, feeds = "float[i, j, k] y", {"w": noise(1, 2 * gates, 4), "r": noise(1, 2 * gates, 2)}
    elif kind == "Conv":
        nodes_, weights, output = "b = Unsqueeze(a, zero) y = Conv(b, w)", "float[2, 3, 1] w", "float[i, j, k] y"
        feeds = {"w": noise(2, 3, 1)}
    else:
        nodes_, weights, output, feeds = "y = Gemm(a, w)", "float[4, 2] w", "float[i, j] y", {"w": noise(4, 2)}
    text = f"{HEAD} g (float[n, 4, t] x, {weights}) => ({output}) {CONSTANTS} {{ {SQUEEZE} {nodes_} }}"
    after, rule = resolved(text, {"x": noise(3, 4, 1), **feeds})
    assert "If" not in op_types(after)
    assert op_types(after)[0] == "Squeeze"
    assert [s.outcome for s in rule.sites] == ["applied"]
    # The assumption behind it: the runtime refuses what the other branch gives.
    with pytest.raises(Exception, match=r"."):
        run(ir.from_proto(onnx.parser.parse_model(text)), {"x": noise(3, 4, 5), **feeds})


def test_through_an_if_that_the_rank_decides() -> None:
    """As TorchScript writes an LSTM cell on a squeezed tensor: a second If adds an axis to what has two."""
    text = f"""{HEAD} g (float[n, 4, t] x, float[1, 8, 4] w, float[1, 8, 2] r) => (float[i, j, k] y)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64 number = {{2}}> {{ {SQUEEZE}
        d = Shape(a) e = Size(d) f = Equal(e, number) f2 = Not(f)
        b = If (f2) <
            then_branch = more () => (float[i, j, k, l] u2) {{ u2 = Unsqueeze(a, zero) }},
            else_branch = same () => (float[i, j] v2) {{ v2 = Identity(a) }}
        >
        b2 = Unsqueeze(b, zero)
        h, y = LSTM <hidden_size = 2> (b2, w, r)
    }}"""
    after, _ = resolved(text, {"x": noise(3, 4, 1), "w": noise(1, 8, 4), "r": noise(1, 8, 2)})
    assert [n.op_type for n in after.graph].count("If") == 0
    assert op_types(after) == ["Squeeze", "Identity", "Unsqueeze", "LSTM"]


def test_both_branches_can_be_taken() -> None:
    after, rule = resolved(
        f"{HEAD} g (float[n, 4, t] x) => (float[i, j, k] y) {CONSTANTS} {{ {SQUEEZE} y = Relu(a) }}",
        {"x": noise(3, 4, 1)},
        {"x": noise(3, 4, 5)},
    )
    assert "If" in op_types(after)
    assert [(s.outcome, "nothing behind it" in s.detail) for s in rule.sites] == [("left", True)]


def test_a_dead_node_refuses_nothing() -> None:
    """A runtime may drop it, so that a run with the other branch succeeds."""
    after, _ = resolved(
        f"{HEAD} g (float[n, 4, t] x, float[4, 2] w) => (float[i, j, k] y) {CONSTANTS} "
        f"{{ {SQUEEZE} y = Relu(a) dead = Gemm(a, w) }}"
    )
    assert "If" in op_types(after)


def test_an_operator_inside_a_branch_may_not_run() -> None:
    after, _ = resolved(
        f"""{HEAD} g (float[n, 4, t] x, bool q, float[4, 2] w) => (float[i, j, k] y) {CONSTANTS} {{ {SQUEEZE}
        y = If (q) <
            then_branch = f () => (float[i, j] u2) {{ u2 = Gemm(a, w) }},
            else_branch = g () => (float[i, j, k] v2) {{ v2 = Relu(a) }}
        > }}""",
        {"x": noise(3, 4, 5), "q": np.array(False), "w": noise(4, 2)},
    )
    assert op_types(after).count("If") == 2


def test_equal_branches_and_those_that_differ_in_an_attribute() -> None:
    text = """{HEAD} g (bool c, float[2, 3] x) => (float[i, j] y) {{
        y = If (c) <
            then_branch = f () => (float[i, j] u) {{ a = Neg(x) u = LeakyRelu <alpha = 0.1> (a) }},
            else_branch = g () => (float[i, j] v) {{ b = Neg(x) v = LeakyRelu <alpha = {alpha}> (b) }}
        > }}"""
    feeds = [{"c": np.array(c), "x": noise(2, 3)} for c in (True, False)]
    after, rule = resolved(text.format(HEAD=HEAD, alpha=0.1), *feeds)
    assert op_types(after) == ["Neg", "LeakyRelu"]
    assert after.graph.outputs[0].name == "y"
    assert [s.detail for s in rule.sites] == ["both branches compute the same"]
    after, rule = resolved(text.format(HEAD=HEAD, alpha=0.2), *feeds)
    assert op_types(after) == ["If"]
    assert [s.outcome for s in rule.sites] == ["left"]


def test_inside_a_loop_and_a_function() -> None:
    body = SQUEEZE.replace("float[p, q] u", "u").replace("float[p, q, r] v", "v")
    function = f"""<ir_version: 10, opset_import: ["": 21, "local": 1]>
        g (float[n, 4, t] x, float[4, 2] w) => (float[i, j] y) {{ y = local.f(x, w) }}
        <domain: "local", opset_import: ["": 21]> f (x0, w) => (y) {{
            one = Constant <value_ints = [1]> () two = Constant <value_ints = [2]> ()
            perm = Constant <value_ints = [0, 0, 0]> () x = Reshape(x0, perm) {body} y = Gemm(a, w)
        }}"""
    before = onnx.parser.parse_model(function)
    after = ir.from_proto(before)
    ResolveIfs()(after)
    assert [n.op_type for n in nodes(after)].count("If") == 0
    feeds = {"x": noise(3, 4, 1), "w": noise(4, 2)}
    assert run(ir.from_proto(before), feeds)[0].tobytes() == run(after, feeds)[0].tobytes()


def test_nothing_is_assumed_without_an_assumption() -> None:
    model = parse(f"{HEAD} g (float[2, 3] x, float[3, 2] w) => (float[2, 2] y) {{ a = Relu(x) y = Gemm(a, w) }}")
    first = next(iter(model.graph))
    assert why_fails(ShapeFacts(model), first, {}, 21) is None


@pytest.mark.real
@pytest.mark.parametrize(("key", "ifs"), [("silero-vad", 1), ("silero-vad-16k", 0), ("silero-vad-half", 0)])
def test_silero(key: str, ifs: int) -> None:
    recipe = {"passes": ["inline-functions", "lift-constants", "simplify-shapes", "resolve-ifs", "fold-constants"]}
    result = optimize(fetch(key), recipe)
    assert result.report.ok
    assert [n.op_type for n in nodes(result.model)].count("If") == ifs
