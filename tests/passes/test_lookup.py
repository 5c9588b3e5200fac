from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse

import graphopt
from graphopt.graph.edits import nodes
from graphopt.models.catalogue import fetch
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.fold.lookup import BINARY, UNARY, FoldLookup

HEAD = '<ir_version: 11, opset_import: ["": 24]>'
TABLE = "float[4, 3] t = {1, -2, 3, -4, 5, -6, 0.5, 0.25, 2, 4, -1, 7}"
FEEDS = {"i": np.array([[0, 3], [2, -1]], np.int64)}


def moved(body: str, constants: str = "", outputs: str = "float[2, 2, 3] y") -> tuple[ir.Model, FoldLookup]:
    rule = FoldLookup()
    before = parse(f"{HEAD} g (int64[2, 2] i) => ({outputs}) <{TABLE}{constants}> {{ {body} }}")
    return assert_exact(before, rule, feeds=FEEDS), rule


@pytest.mark.parametrize("op_type", UNARY)
def test_a_function_of_each_number(op_type: str) -> None:
    after, _ = moved(f"r = Gather(t, i) y = {op_type}(r)")
    assert op_types(after) == [op_type, "Gather"]


@pytest.mark.parametrize("op_type", BINARY)
@pytest.mark.parametrize("constant", ["float[3] c = {1, 2, 4}", "float c = {2}", "float[1, 1, 3] c = {1, 2, 4}"])
@pytest.mark.parametrize("operands", ["r, c", "c, r"])
def test_a_row(op_type: str, constant: str, operands: str) -> None:
    after, _ = moved(f"r = Gather(t, i) y = {op_type}({operands})", f", {constant}")
    assert op_types(after) == [op_type, "Gather"]
    FoldConstants()(after)
    assert op_types(after) == ["Gather"]


def test_a_chain() -> None:
    after, _ = moved("r = Gather(t, i) a = Add(r, c) b = Gelu <approximate = \"tanh\"> (a) y = Mul(b, c)",
                     ", float[3] c = {1, 2, 3}")  # fmt: skip
    assert op_types(after) == ["Add", "Gelu", "Mul", "Gather"]


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("r = Gather(t, i) y = Add(r, c)", ", float[2, 1] c = {1, 2}"),  # another summand for each row
        ("r = Gather(t, i) y = Add(r, r)", ""),
        ("r = Gather(t, j) q = Relu(r) y = Expand(q, s)", ", int64[2] j = {0, 1}, int64[3] s = {2, 2, 3}"),
    ],
)  # fmt: skip
def test_no_site(body: str, constants: str) -> None:
    after, rule = moved(body, constants)
    assert "Gather" in op_types(after)[:2]
    assert not rule.sites


def test_a_constant_with_more_axes_than_the_result() -> None:
    after, rule = moved("r = Gather(t, i) y = Add(r, c)", ", float[1, 1, 1, 3] c = {1, 2, 3}", "float[1, 2, 2, 3] y")
    assert op_types(after) == ["Gather", "Add"]
    assert not rule.sites


def test_columns_are_not_moved() -> None:
    after, rule = moved(
        "k = Clip(i, m, u) r = Gather <axis = 1> (t, k) y = Neg(r)",
        ", int64 m = {-1}, int64 u = {0}",
        "float[4, 2, 2] y",
    )
    assert op_types(after) == ["Clip", "Gather", "Neg"]
    assert not rule.sites


def test_other_readers() -> None:
    after, rule = moved("r = Gather(t, i) y = Relu(r) z = MatMul(y, u) u = Transpose(t)".replace(
        "z = MatMul(y, u) u = Transpose(t)", "u = Transpose(t) z = MatMul(y, u)"), outputs="float[2, 2, 3] y, float[2, 2, 4] z")  # fmt: skip
    assert "something else reads the table" in rule.sites[0].detail
    assert op_types(after)[0] == "Gather"
    after, rule = moved("r = Gather(t, i) y = Relu(r)", outputs="float[2, 2, 3] y, float[2, 2, 3] r")
    assert not rule.sites


def test_a_large_table_stays() -> None:
    model = parse(f"{HEAD} g (int64[2] i, float[1024, 512] t) => (float[2, 512] y) {{ r = Gather(t, i) y = Relu(r) }}")
    table = model.graph.inputs.pop()
    table.const_value = ir.tensor(np.zeros((1024, 512), np.float32), name="t")
    model.graph.register_initializer(table)
    rule = FoldLookup()
    assert not rule(model).modified
    assert "elements" in rule.sites[0].detail


@pytest.mark.real
def test_magika() -> None:
    recipe = {"passes": ["convert-opset", "fold-constants", "raise-gelu", "raise-one-hot", "fold-lookup", "fold-constants",
                         "eliminate-dead-code"]}  # fmt: skip
    result = graphopt.optimize(fetch("magika"), recipe)
    assert result.report.ok
    assert [n.op_type for n in nodes(result.model)].count("Gelu") == 1  # the other one is in the table
