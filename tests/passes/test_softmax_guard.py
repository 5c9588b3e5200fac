from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

from graphopt.graph.edits import nodes
from graphopt.graph.load import load
from graphopt.passes.clean.softmax_guard import SoftmaxGuard
from graphopt.verification.equivalence import verify

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
LOWEST = "-3.4028234663852886e38"


def attention(mask: str, guard: str = "Where(n, zero, p)", fill: str = LOWEST, dtype: str = "float") -> str:
    numbers = "{0} zero = {{0}}, {0} low = {{{1}}}, {0} half = {{{2}}}".format(
        dtype, fill, "14336" if dtype == "float16" else "0.5"
    )
    return f"""{HEAD} g ({dtype}[2, 4, 8] q, {dtype}[2, 8, k] kt, {dtype}[2, k, 3] v, bool[2, 1, k] seen,
        {dtype}[k] given) => ({dtype}[2, 4, 3] y) <{dtype} none = {{0}}, {numbers}> {{
        s0 = MatMul(q, kt) s = Mul(s0, half) {mask} z = Add(s, m)
        p = Softmax <axis = -1> (z) n = IsNaN(p) w = {guard} y = MatMul(w, v) }}"""


CHOICE = "m = Where(seen, none, low)"


def guarded(text: str, masked: bool = False) -> tuple[ir.Model, str]:
    """The model after the pass and what it says; equal on noise, where asked with a row without tokens."""
    before = parse(text)
    rng = np.random.default_rng(0)
    shapes = {v.name: [d if isinstance(d, int) else 5 for d in v.shape] for v in before.graph.inputs}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    feeds["seen"] = np.ones((2, 1, 5), bool)
    feeds["seen"][0, 0, 2:] = False
    feeds["seen"][1] = not masked
    after = assert_exact(before, SoftmaxGuard(), feeds=feeds)
    rule = SoftmaxGuard()
    rule(before)
    return after, rule.sites[0].detail


@pytest.mark.parametrize(
    "mask",
    [
        CHOICE,
        "m = Where(seen, low, none)",
        "m = Identity(none)",
        "h = Cast <to = 1> (seen) m = Mul(h, low)",
        "h = Cast <to = 1> (seen) g = Sub(none, h) m = Neg(g)",
        "h = Cast <to = 1> (seen) m = Div(h, half)",
        "a = Constant <value_ints = [0]> () h = Where(seen, none, low) g = Unsqueeze(h, a) m = Squeeze(g, a)",
    ],
)
def test_scores_that_stay_finite(mask: str) -> None:
    after, detail = guarded(attention(mask))
    assert "IsNaN" not in op_types(after)
    assert "stay finite" in detail


@pytest.mark.parametrize(
    ("mask", "fill"), [(CHOICE, "-inf"), ("m = Identity(given)", LOWEST), ("c = Div(half, none) m = Neg(c)", LOWEST)]
)
def test_a_row_may_be_minus_infinity_alone(mask: str, fill: str) -> None:
    after, detail = guarded(attention(mask, fill=fill), masked=True)
    assert [t for t in op_types(after) if t in ("Slice", "IsNaN", "MatMul")].count("Slice") == 1
    assert op_types(after)[-1] == "Where"
    assert "one test a row" in detail


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (attention(CHOICE, fill="-inf").replace("y = MatMul(w, v)", "w2 = Neg(w) y = MatMul(w2, v)"), "no MatMul alone"),
        (attention(CHOICE, fill="-inf").replace("<axis = -1>", "<axis = 1>"), "last axis"),
        (attention(CHOICE, fill="-inf").replace("[2, 8, k] kt", "[2, 8, 2] kt").replace("[2, k, 3] v", "[2, 2, 3] v")
         .replace("[2, 1, k] seen", "[2, 1, 2] seen").replace("[k] given", "[2] given"), "no longer than"),
        (attention(CHOICE, guard="Where(n, half, p)"), None),
        (attention(CHOICE, guard="Where(n, p, zero)"), None),
        (attention(CHOICE, guard="Where(n, zero, z)"), None),
        (attention(CHOICE).replace("n = IsNaN(p)", "n = IsNaN(z)"), None),
    ],
)  # fmt: skip
def test_left_alone(text: str, reason: str | None) -> None:
    model, rule = parse(text), SoftmaxGuard()
    assert not rule(model).modified
    assert [reason in s.detail for s in rule.sites] == ([True] if reason else [])


def test_half_precision_may_overflow() -> None:
    model, rule = parse(attention(CHOICE, fill="64256", dtype="float16")), SoftmaxGuard()
    before = model.clone()
    rule(model)
    assert "one test a row" in rule.sites[0].detail
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert verify(before, model).ok


def test_in_a_branch() -> None:
    body = "{p} = Softmax <axis = -1> ({z}) {n} = IsNaN({p}) {w} = Where({n}, zero, {p}) {y} = MatMul({w}, v)"
    model = parse(f"""{HEAD} g (bool c, float[2, 4, k] z, float[2, k, 3] v) => (float[2, 4, 3] y) <float zero = {{0}}> {{
        y = If (c) <
            then_branch = a () => (float[2, 4, 3] y1) {{ {body.format(z="z", p="p1", n="n1", w="w1", y="y1")} }},
            else_branch = b () => (float[2, 4, 3] y2) {{ {body.format(z="z", p="p2", n="n2", w="w2", y="y2")} }}
        > }}""")
    before = model.clone()
    assert SoftmaxGuard()(model).modified
    assert [n.op_type for n in nodes(model)].count("Slice") == 2
    assert verify(before, model).ok


@pytest.mark.export
def test_as_torch_writes_it(tmp_path: Path) -> None:
    import torch

    class Net(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    inputs = (*(torch.randn(2, 2, 6, 4) for _ in range(3)), torch.rand(2, 1, 6, 6) > 0.3)
    for dynamo in (True, False):
        path = tmp_path / f"{dynamo}.onnx"
        torch.onnx.export(Net().eval(), inputs, str(path), dynamo=dynamo, opset_version=18)
        model = load(path)
        guards = [n.op_type for n in nodes(model)].count("IsNaN")
        rule = SoftmaxGuard()
        rule(model)
        assert len([s for s in rule.sites if s.outcome == "applied"]) == guards
        assert verify(path, model).ok
        if dynamo:
            assert guards == 1
