"""Editing: what a removed node held is let go of, at any depth."""

from __future__ import annotations

from exactness import parse

from graphopt.graph.edits import Editor


def test_a_removed_if_lets_go_of_what_nested_bodies_captured() -> None:
    model = parse("""<ir_version: 10, opset_import: ["": 21]>
        g (bool c, bool d, float[2] x) => (float[2] y, float[2] z) {
            a = Neg(x)
            b = Abs(x)
            z = Identity(x)
            y = If (c) <
                then_branch = t () => (float[2] u) {
                    u = If (d) <
                        then_branch = tt () => (float[2] v) { v = Relu(a) },
                        else_branch = te () => (float[2] w) { w = Neg(a) }
                    >
                },
                else_branch = e () => (float[2] q) { q = Sigmoid(b) }
            >
        }""")
    edit = Editor(model)
    node = next(n for n in model.graph if n.op_type == "If")
    edit.at(node)
    edit.replace(node.outputs[0], edit.op("Relu", [model.graph.inputs[2]], like=node.outputs[0]))
    assert [n.op_type for n in model.graph] == ["Identity", "Relu"]


def test_an_outer_value_that_a_removed_body_gave_out() -> None:
    model = parse("""<ir_version: 10, opset_import: ["": 21]>
        g (bool c, float[2] x) => (float[2] y) {
            a = Neg(x)
            y = If (c) <
                then_branch = t () => (float[2] u) { u = Relu(a) },
                else_branch = e () => (float[2] w) { w = Neg(a) }
            >
        }""")
    node = next(n for n in model.graph if n.op_type == "If")
    body = node.attributes["then_branch"].as_graph()
    body.outputs[:] = [model.graph[0].outputs[0]]  # a branch may give out an outer value as it is
    edit = Editor(model)
    edit.at(node)
    edit.replace(node.outputs[0], edit.op("Relu", [model.graph.inputs[1]], like=node.outputs[0]))
    assert [n.op_type for n in model.graph] == ["Relu"]
