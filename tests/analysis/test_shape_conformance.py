"""The rules against onnx's own node tests: with constant and with dynamic input sizes, what is said must be true."""

from __future__ import annotations

import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.analysis.shapes import infer

GROUPS = ["A", "B", "C", "DEF", "G", "HIJKL", "M", "NOPQ", "R", "S", "TUVWXYZ"]


@pytest.fixture(scope="module")
def cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return [c for c in collect_testcases(None) if c.model is not None]


def first_operator(case):
    return case.model.graph.node[0].op_type if case.model.graph.node else "A"


def prepared(case, dynamic):
    """The model with all input sizes dynamic, or all small integer inputs constant; and the true sizes."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    sizes, constants = {}, set()
    for array, value in zip(case.data_sets[0][0], list(model.graph.input), strict=False):
        if not isinstance(array, np.ndarray) or not value.type.HasField("tensor_type"):
            continue
        sizes.update({f"{value.name}[{k}]": n for k, n in enumerate(array.shape)})
        if dynamic:
            for dim in value.type.tensor_type.shape.dim:
                dim.dim_param = "N"  # one name for all sizes, as some real files have it
        elif array.dtype.kind in "iub" and array.size <= 64:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
            constants.add(value.name)
    inputs = [v for v in model.graph.input if v.name not in constants]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    # What files declare of outputs isn't believed, so a false declaration must not matter.
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim if value.type.HasField("tensor_type") else ():
            dim.dim_value = 77
    return ir.from_proto(model), sizes


def compare(case, dynamic):
    """How many sizes were proven, after checking them all."""
    model, sizes = prepared(case, dynamic)
    facts = infer(model)
    assert not facts.faults, case.name
    proven = 0
    for value, array in zip(model.graph.outputs, case.data_sets[0][1], strict=False):
        if not isinstance(array, np.ndarray):
            continue
        fact = facts.fact(value)
        if fact.dtype is not None and array.dtype.kind not in "OUSV":
            assert fact.dtype.numpy() == array.dtype, case.name
        if fact.shape is None:
            continue
        numbers = [d.evaluate(lambda s: sizes.get(s.name)) for d in fact.shape]
        assert len(numbers) == array.ndim, case.name
        for said, true in zip(numbers, array.shape, strict=True):
            assert said is None or said == true, f"{case.name}: {fact.shape}, in truth {array.shape}"
            proven += said is not None
        for said, true in zip(() if fact.content is None else fact.content.flat, array.reshape(-1), strict=False):
            content = said.evaluate(lambda s: sizes.get(s.name))
            assert content is None or content == int(true), f"{case.name}: {fact.content}, in truth {array}"
    return proven


@pytest.mark.parametrize("letters", GROUPS)
def test_node_tests_of_onnx(cases, letters):
    chosen = [c for c in cases if first_operator(c)[0] in letters]
    proven = sum(compare(case, dynamic) for case in chosen for dynamic in (False, True))
    assert proven > len(chosen)


def test_all_operators_are_in_a_group(cases):
    assert {first_operator(c)[0] for c in cases} <= set("".join(GROUPS))
