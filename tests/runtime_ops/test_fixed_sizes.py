"""Bodies in models whose constants declare their sizes: what isn't given must not stop ONNX Runtime's shape inference."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

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
