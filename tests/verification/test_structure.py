from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.verification.structure import check_structure, found_by_onnx, new_problems


def parse(text: str, imports: str = '"": 17') -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{imports}]>\n{text}"))


IF = """
g (bool c, float[3] x) => (float[3] y) {
  y = If (c) <then_branch = a () => (float[3] r) { r = Relu(x) }, else_branch = b () => (float[3] q) { q = Neg(x) }>
}"""


def test_sound_graphs() -> None:
    assert check_structure(parse("g (float[n] x) => (float[n] y) { y = Relu(x) }")) == []
    assert check_structure(parse(IF)) == []


@pytest.mark.parametrize("domain", ["com.microsoft", "somebody.else"])
def test_custom_domains_are_no_error(domain) -> None:
    text = f"g (float[n] x) => (float[n] y) {{ z = {domain}.Odd<k = 3>(x) y = Relu(z) }}"
    assert check_structure(parse(text, f'"": 17, "{domain}": 1')) == []
    (problem,) = check_structure(parse(text))
    assert f"needs the domain '{domain}', which the model doesn't import" in problem


def test_undefined_input() -> None:
    model = parse("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    model.graph.node(0).replace_input_with(0, ir.Value(name="ghost"))
    assert check_structure(model) == ["Relu uses 'ghost', which nothing makes."]


def test_value_of_another_branch_is_undefined() -> None:
    model = parse(IF)
    node = model.graph.node(0)
    then_branch, else_branch = (node.attributes[k].as_graph() for k in ("then_branch", "else_branch"))
    else_branch.node(0).replace_input_with(0, then_branch.outputs[0])
    (problem,) = check_structure(model)
    assert "uses 'r', which nothing makes" in problem


def test_cycle_and_order() -> None:
    model = parse("g (float[n] x) => (float[n] y) { a = Relu(x) y = Add(a, x) }")
    model.graph.node(0).replace_input_with(0, model.graph.outputs[0])
    (problem,) = check_structure(model)
    assert "Relu uses 'y' before it is made: a cycle, or nodes out of order" in problem
    model = parse("g (float[n] x) => (float[n] y) { a = Relu(x) y = Neg(a) }")
    relu = model.graph.node(0)
    model.graph.remove(relu)
    model.graph.append(relu)
    assert "before it is made" in check_structure(model)[0]


def test_names_made_twice() -> None:
    model = parse("g (float[n] x) => (float[n] y) { a = Relu(x) y = Neg(a) }")
    model.graph.node(0).outputs[0].name = "y"
    assert check_structure(model) == ["The name 'y' is made twice."]
    model = parse(IF)
    model.graph.node(0).attributes["then_branch"].as_graph().outputs[0].name = "x"
    assert check_structure(model) == ["The name 'x' in If hides a value of an outer graph."]


def test_outputs_that_nothing_makes() -> None:
    model = parse("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    model.graph.outputs.append(ir.Value(name="more", type=ir.TensorType(ir.DataType.FLOAT)))
    assert check_structure(model) == ["The output 'more' is made by nothing."]
    model = parse("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    del model.graph.outputs[:]
    assert check_structure(model) == ["The graph has no outputs."]


def test_what_the_checker_finds() -> None:
    model = parse("g (float[n] x) => (float[n] y) { y = Relu(x) }")
    model.graph.node(0).op_type = "Relux"
    assert "Relux" in check_structure(model)[0]
    model = parse("g (float[2, 3] x, int64[2, 3] z) => (float[2, 3] y) { y = Add(x, z) }")
    assert "int64" in check_structure(model)[0]
    model = parse("g (float[2, 3] x, float[4, 5] z) => (float[2, 5] y) { y = MatMul(x, z) }")
    assert "Incompatible dimensions" in check_structure(model)[0]


def test_false_declared_output_shapes_are_let_pass() -> None:
    assert check_structure(parse("g (float[2, 3] x) => (float[2, 5] y) { y = Relu(x) }")) == []


def test_large_weights_are_not_serialized() -> None:
    model = parse("g (float[2, 1024] x) => (float[2, 8] y) { y = MatMul(x, w) }")
    value = model.graph.node(0).inputs[1]

    def fail() -> ir.Tensor:
        raise AssertionError("the weight was read")

    value.const_value = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([1024, 8]), name="w")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1024, 8])
    model.graph.register_initializer(value)
    assert check_structure(model) == []
    value.const_value = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([1000, 8]), name="w")
    assert "Incompatible dimensions" in check_structure(model)[0]
    value.const_value = None
    assert "has no data" in check_structure(model)[0]


def test_time_grows_with_the_nodes_only() -> None:
    def chain(length: int) -> ir.Model:
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n"]))
        nodes, last = [], x
        for i in range(length):
            node = ir.node("Neg", [last], outputs=[ir.Value(name=f"v{i}")])
            nodes.append(node)
            last = node.outputs[0]
        last.type, last.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["n"])
        return ir.Model(ir.Graph([x], [last], nodes=nodes, opset_imports={"": 17}, name="g"), ir_version=8)

    model = chain(5000)
    begin = time.process_time()
    assert check_structure(model) == []
    assert time.process_time() - begin < 1.0


def test_functions_are_checked_too() -> None:
    model = ir.from_proto(
        onnx.parser.parse_model("""
<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (float[n] x) => (float[n] y) { y = local.twice(x) }
<domain: "local", opset_import: ["": 17]> twice (a) => (b) { b = Add(a, a) }
""")
    )
    assert check_structure(model) == []
    function = next(iter(model.functions.values()))
    function.graph.node(0).replace_input_with(0, ir.Value(name="ghost"))
    (problem,) = check_structure(model)
    assert "of function 'twice' uses 'ghost', which nothing makes" in problem


def test_overridable_initializer() -> None:
    model = parse("g (float[3] x, float[1000] w) => (float[1000] y) { s = ReduceSum(x) y = Mul(w, s) }")
    weight = model.graph.inputs[1]
    weight.const_value = ir.tensor(np.ones(1000, np.float32), name="w")
    model.graph.register_initializer(weight)
    assert check_structure(model) == []


def test_what_the_original_had_is_not_new() -> None:
    wrong = "g (float[2, 3] x, float[4] b) => (float[2, 3] y) { h = Add(x, b) y = Relu(h) }"
    right = wrong.replace("float[4]", "float[3]")
    cyclic = "g (float[2, 3] x, float[4] b) => (float[2, 3] y) { h = Add(h, b) y = Relu(h) }"
    assert found_by_onnx(check_structure(parse(wrong))[0])
    assert new_problems(parse(wrong), parse(wrong)) == []
    assert new_problems(parse(wrong), parse(right)) != []
    assert new_problems(parse(cyclic), parse(wrong)) != []
    unknown = wrong.replace("Relu", "Relux")
    assert found_by_onnx(check_structure(parse(unknown))[0])
    assert new_problems(parse(unknown), parse(unknown)) == []
    assert new_problems(parse(unknown), parse(wrong)) != []
