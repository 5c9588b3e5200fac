from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from exactness import op_types, parse

import graphopt
from graphopt.graph.edits import nodes
from graphopt.models.catalogue import fetch
from graphopt.passes.raise_.one_hot import RaiseOneHot

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)[0]


def raised(text: str, **feeds: np.ndarray) -> tuple[ir.Model, RaiseOneHot]:
    """The model after the pass, with the same numbers in ONNX Runtime, and unchanged by a second run."""
    before = parse(text)
    after, rule = before.clone(), RaiseOneHot()
    rule(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert not RaiseOneHot()(after.clone()).modified
    if feeds:
        expected, got = outputs(before, feeds), outputs(after, feeds)
        assert got.dtype == expected.dtype
        assert np.array_equal(expected, got)
    return after, rule


def classes(first: int, count: int) -> str:
    return f"{{{', '.join(str(first + i) for i in range(count))}}}"


WEIGHT = "float[3, 2] w = {1, -2, 3, -4, 5, -6}"
EVERY = np.array([[-9, -4, -3, -2, -1, 0], [1, 2, 3, 4, 5, 2147483647]], np.int32)


@pytest.mark.parametrize("first", [0, 1, -2])
@pytest.mark.parametrize("dtype", ["int32", "int64", "int8", "uint8"])
@pytest.mark.parametrize("commuted", [False, True])
def test_a_comparison(first: int, dtype: str, commuted: bool) -> None:
    if dtype == "uint8" and first < 0:
        return
    operands = "c, i2" if commuted else "i2, c"
    text = f"""{HEAD} g ({dtype}[2, n] i) => (float[2, n, 2] y)
        <{dtype}[1, 1, 3] c = {classes(first, 3)}, int64[1] last = {{-1}}, {WEIGHT}> {{
        i2 = Unsqueeze(i, last) e = Equal({operands}) f = Cast <to = 1> (e) y = MatMul(f, w) }}"""
    after, _ = raised(text, i=EVERY.astype(dtype))
    assert "Gather" in op_types(after)
    assert "MatMul" not in op_types(after)


def test_a_choice_of_one_and_zero() -> None:
    after, _ = raised(
        f"""{HEAD} g (int64[2, 6, 1] i) => (float[2, 6, 2] y)
        <int64[3] c = {classes(0, 3)}, float one = {{1}}, float[1] zero = {{0}}, {WEIGHT}> {{
        e = Equal(i, c) f = Where(e, one, zero) y = MatMul(f, w) }}""",
        i=EVERY.astype(np.int64)[..., None],
    )
    assert op_types(after) == ["Squeeze", "Clip", "Gather"]


def test_one_hot_reads_negative_indices_from_the_end() -> None:
    after, _ = raised(
        f"""{HEAD} g (int64[2, 6] i) => (float[2, 6, 2] y)
        <int64 depth = {{3}}, float[2] values = {{0, 1}}, {WEIGHT}> {{ e = OneHot(i, depth, values) y = MatMul(e, w) }}""",
        i=np.clip(EVERY, -9, 9).astype(np.int64),
    )
    assert "OneHot" not in op_types(after)
    assert "Gather" in op_types(after)


def test_the_encoding_stays_for_its_other_readers() -> None:
    after, _ = raised(
        f"""{HEAD} g (int64[6, 1] i) => (float[6, 2] y, float[6, 3] f) <int64[3] c = {classes(0, 3)}, {WEIGHT}> {{
        e = Equal(i, c) f = Cast <to = 1> (e) y = MatMul(f, w) }}""",
        i=EVERY[:1].T.astype(np.int64),
    )
    assert sorted(op_types(after)) == ["Cast", "Clip", "Equal", "Gather", "Squeeze"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("c = {0, 1, 2}", "c = {0, 2, 4}"), "consecutive"),
        (("c = {0, 1, 2}", "c = {2, 1, 0}"), "consecutive"),
        (("{1, -2, 3, -4, 5, -6}", "{1, -2, inf, -4, 5, -6}"), "infinities"),
        (("int64[6, 1] i", "int64[6, n] i"), None),
        (("e = Equal(i, c)", "e = Less(i, c)"), None),
        (("y = MatMul(f, w)", "g = Neg(f) y = MatMul(g, w)"), None),
        (("MatMul(f, w)", "MatMul(f, v)"), None),
    ],
)
def test_left_alone(change: tuple[str, str], reason: str | None) -> None:
    text = f"""{HEAD} g (int64[6, 1] i, float[3, 2] v) => (float[6, 2] y) <int64[3] c = {{0, 1, 2}}, {WEIGHT}> {{
        e = Equal(i, c) f = Cast <to = 1> (e) y = MatMul(f, w) }}""".replace(*change)
    after, rule = raised(text)
    assert "MatMul" in op_types(after)
    assert [reason in s.detail for s in rule.sites] == ([True] if reason else [])


def test_half_precision_and_a_branch() -> None:
    before = parse(f"""{HEAD} g (bool q, int64[6, 1] i) => (float16[6, 2] y)
        <float16[3, 2] w = {{1, 2, 3, 4, 5, 6}}, int64[3] c = {{0, 1, 2}}> {{
        y = If (q) <
            then_branch = a () => (float16[6, 2] u) {{ e = Equal(i, c) f = Cast <to = 10> (e) u = MatMul(f, w) }},
            else_branch = b () => (float16[6, 2] v) {{ e2 = Equal(i, c) f2 = Cast <to = 10> (e2) v = MatMul(f2, w) }}
        > }}""")
    after = before.clone()
    RaiseOneHot()(after)
    assert [n.op_type for n in nodes(after)].count("Gather") == 2
    feeds = {"q": np.array(True), "i": EVERY[:1].T.astype(np.int64)}
    assert np.array_equal(outputs(before, feeds), outputs(after, feeds))


@pytest.mark.real
def test_magika() -> None:
    recipe = {"passes": ["convert-opset", "fold-constants", "raise-one-hot", "eliminate-dead-code"]}
    result = graphopt.optimize(fetch("magika"), recipe)
    assert result.report.ok
    assert "Equal" not in [n.op_type for n in nodes(result.model)]
