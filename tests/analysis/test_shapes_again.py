"""Facts made from earlier ones are those that would be made anew, whatever happened to the model in between."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from random_graphs import models

from graphopt.analysis.shapes import ShapeFacts, infer, lazily
from graphopt.analysis.shapes.facts import KEPT_KEY, MADE_KEY
from graphopt.graph.edits import Editor, nodes, sort
from graphopt.passes import registry
from graphopt.passes.base import Guarantee

HEAD = '<ir_version: 10, opset_import: ["": 20]>'


def parse(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(HEAD + text))


def known(model: ir.Model, facts: ShapeFacts) -> list[tuple[str, ...]]:
    """All facts as text; sizes of which nothing is known are alike."""
    found = []
    for node in nodes(model):
        for value in node.outputs:
            fact = facts.fact(value)
            content = None if fact.content is None else (fact.content.shape, list(fact.content.flat))
            text = f"{fact.dtype} {fact.shape} {content}"
            found.append((node.op_type, re.sub(r"\?[^,()\[\] *+]*", "?", text)))
    return found


def assert_same(model: ir.Model, earlier: ShapeFacts) -> ShapeFacts:
    again = infer(model, earlier=earlier)
    assert known(model, again) == known(model, infer(model))
    return again


def exact_passes() -> list[str]:
    return [name for name, cls in registry.builtin().items() if cls.guarantee is Guarantee.EXACT]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(model=models(max_steps=24))
def test_after_every_pass(model: ir.Model) -> None:
    facts = infer(model)
    for name in exact_passes():
        registry.make(name)(model)
        sort(model)
        facts = assert_same(model, facts)


TEXT = """ g (float[n, 4] x, float[n, 2, 6] z) => (float[a, b] y) <int64[2] target = {2, -1}, float[4] w = {1, 2, 3, 4}> {
    s = Shape(x)  k = Constant <value = int64[1] {0}> ()  n = Gather(s, k)  c = Concat <axis = 0> (n, k)
    r = Reshape(x, target)  t = Transpose <perm = [1, 0]> (r)  m = Mul(x, w)  q = Squeeze(n)  e = Resize(z, , scales)
    scales = Constant <value = float[3] {1, 1, 2}> ()  y = Relu(t)
}"""


def swap_attribute(model: ir.Model) -> None:
    node = next(n for n in nodes(model) if n.op_type == "Transpose")
    node.attributes["perm"] = ir.AttrInt64s("perm", [0, 1])


def swap_initializer(model: ir.Model) -> None:
    model.graph.initializers["target"].const_value = ir.tensor(np.array([4, -1]))


def swap_constant(model: ir.Model) -> None:
    node = next(n for n in nodes(model) if n.outputs[0].name == "k")
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array([1])))


def swap_numbers_that_no_fact_holds(model: ir.Model) -> None:
    node = next(n for n in nodes(model) if n.outputs[0].name == "scales")
    node.attributes["value"] = ir.AttrTensor("value", ir.tensor(np.array([1, 3, 2], dtype=np.float32)))


def swap_operator(model: ir.Model) -> None:
    node = next(n for n in nodes(model) if n.op_type == "Transpose")
    node.op_type = "Relu"
    node.attributes.clear()


def swap_input(model: ir.Model) -> None:
    node = next(n for n in nodes(model) if n.op_type == "Reshape")
    node.replace_input_with(0, model.graph.inputs[1])


def override_initializer(model: ir.Model) -> None:
    model.graph.inputs.append(model.graph.initializers["target"])


def declare_input(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([3, 4])


def another_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 9


@pytest.mark.parametrize(
    "change",
    [
        swap_attribute, swap_initializer, swap_constant, swap_numbers_that_no_fact_holds, swap_operator, swap_input,
        override_initializer, declare_input, another_opset,
    ],
)  # fmt: skip
def test_after_a_change_in_place(change: Callable[[ir.Model], None]) -> None:
    model = parse(TEXT)
    before = infer(model)
    told = known(model, before)
    change(model)
    again = assert_same(model, before)
    assert change is another_opset or known(model, again) != told
    assert_same(model, again)


def test_what_did_not_change_is_not_inferred_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse(TEXT)
    facts = infer(model)
    asked: list[str] = []
    apply = ShapeFacts.apply
    monkeypatch.setattr(
        ShapeFacts, "apply", lambda self, node, *rest: asked.append(node.op_type) or apply(self, node, *rest)
    )
    facts = infer(model, earlier=facts)
    assert asked == []
    relu = next(n for n in nodes(model) if n.op_type == "Relu")
    edit = Editor(model)
    edit.at(relu)
    edit.replace(relu.outputs[0], edit.op("Relu", [edit.op("Transpose", [relu.inputs[0]], {"perm": [0, 1]})]))
    infer(model, earlier=facts)
    assert asked == ["Transpose", "Relu"]


def test_branches_and_calls_are_followed_anew() -> None:
    model = parse(""" g (bool c, float[n, 4] x) => (y) {
        y = If (c) < then_branch = t () => (u) { r = Relu(x)  u = Neg(r) }, else_branch = e () => (v) { v = Neg(x) } >
    }""")
    facts = infer(model)
    inner = next(n for n in nodes(model) if n.op_type == "Relu")
    inner.op_type = "Shape"
    again = assert_same(model, facts)
    assert known(model, again) != known(model, facts)


def test_facts_are_kept_for_one_question() -> None:
    model = parse(TEXT)
    facts = infer(model)
    assert MADE_KEY not in model.meta
    model.meta[KEPT_KEY] = facts
    assert lazily(model) is facts
    model.meta[MADE_KEY] = facts
    other = lazily(model)
    assert other is not facts
    assert known(model, other) == known(model, facts)
    assert model.meta[MADE_KEY] is facts
    newest = infer(model)
    assert model.meta[MADE_KEY] is newest
