"""The Python API: what a model and inputs can be given as."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import InputDataError, UsageError, VerificationError

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> { i = Identity(x)  a = Mul(i, w)  y = Tanh(a) }"""


def test_a_model_in_any_form(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    onnx.save(proto, tmp_path / "m.onnx")
    before = proto.SerializeToString()
    for given in (proto, ir.from_proto(onnx.parser.parse_model(TEXT)), tmp_path / "m.onnx", str(tmp_path / "m.onnx")):
        result = graphopt.optimize(given)
        assert result.report.run.after.nodes == 2
        assert graphopt.verify(proto, result).ok
        assert graphopt.verify(tmp_path / "m.onnx", result.model).ok
    assert proto.SerializeToString() == before
    assert graphopt.inspect(proto)["nodes"] == 3
    with pytest.raises(UsageError, match="must be a path"):
        graphopt.optimize(3)


def test_inputs_as_arrays() -> None:
    proto = onnx.parser.parse_model(TEXT)
    arrays = {"x": np.ones((5, 4), np.float32)}
    assert graphopt.optimize(proto, inputs=arrays).report.probes[0]["description"].endswith("x [5, 4]")
    assert graphopt.verify(proto, proto, inputs=arrays).ok
    with pytest.raises(InputDataError, match="'z'"):
        graphopt.optimize(proto, inputs={"z": arrays["x"]}, verify="none")


def test_models_that_cannot_be_compared() -> None:
    other = onnx.parser.parse_model(TEXT.replace(" y)", " z)").replace("y = Tanh", "z = Tanh"))
    with pytest.raises(VerificationError, match="the graph 'g' has no output 'y'"):
        graphopt.verify(onnx.parser.parse_model(TEXT), other)


def test_session(tmp_path: Path) -> None:
    result = graphopt.optimize(onnx.parser.parse_model(TEXT))
    result.save(tmp_path / "o.onnx")
    session = graphopt.session(tmp_path / "o.onnx")
    assert session.run(None, {"x": np.zeros((1, 4), np.float32)})[0].shape == (1, 4)
