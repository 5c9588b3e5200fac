"""Operators in models whose inputs declare their sizes: bodies load, and the analysis knows the outputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from graphopt.analysis.shapes import infer
from graphopt.runtime_ops import operators
from tests.runtime_ops.operator_cases import node_model, run_node
from tests.runtime_ops.operator_examples import EXAMPLES


@pytest.mark.parametrize("name", operators())
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_body_loads_where_every_size_is_known(name: str, dtype: type) -> None:
    for inputs, attributes in EXAMPLES[name](dtype):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        model = node_model(name, inputs, attributes, fixed=True)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        found = session.run(None, {f"input{i}": np.asarray(a) for i, a in enumerate(inputs) if a is not None})
        expected = run_node(name, inputs, kernel=False, **attributes)
        for have, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(operators()))
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_shapes_and_types_are_inferred(name: str, dtype: type) -> None:
    """What the graph analysis says of an operator's outputs is what a run gives: passes behind it rely on the types."""
    for inputs, attributes in EXAMPLES[name](dtype):
        model = ir.from_proto(onnx.load_from_string(node_model(name, inputs, attributes, fixed=True)))
        for value in model.graph.outputs:
            value.type = value.shape = None
        facts = infer(model)
        found = run_node(name, inputs, **attributes)
        for value, array in zip(model.graph.outputs, found, strict=True):
            assert facts.dtype(value) == ir.DataType.from_numpy(array.dtype), value.name
            shape = facts.shape(value)
            assert shape is not None, value.name
            known = [d.value for d in shape]
            assert [n if k is None else k for k, n in zip(known, array.shape, strict=True)] == list(array.shape)
