"""Products without the rounding of what they read: the same function, closely, and what ONNX Runtime makes of scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

import graphopt
from graphopt.graph.save import save
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.runtime_ops.packed_products import needs_folding
from graphopt.verification.unrounded import rounds, unrounded
from graphopt.verification.verifier import Verifier
from tests.runtime_ops.operator_cases import node_model
from tests.runtime_ops.quantized_weights import weight

FORMS: list[dict[str, Any]] = [
    {"bits": 4, "block_size": 32},
    {"bits": 4, "block_size": 64, "zero_points": True, "half": True},
    {"bits": 4, "block_size": 32, "minimums": True, "half": True},
    {"bits": 8, "block_size": 32, "zero_points": True},
    {"bits": 2, "block_size": 16, "minimums": True},
]


def model_of(name: str, inputs: list[Any], given: dict[int, str], **attributes: Any) -> ir.Model:
    """A model of one node; `given` names the inputs that stay inputs, the others are initializers."""
    proto = onnx.load_from_string(node_model(name, inputs, attributes, fixed=True))
    for index, array in enumerate(inputs):
        if index not in given:
            proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), f"input{index}"))
    kept = [value for value in proto.graph.input if int(value.name.removeprefix("input")) in given]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    model = ir.from_proto(proto)
    for index, label in given.items():
        next(v for v in model.graph.inputs if v.name == f"input{index}").name = label
    return model


def normal(x: np.ndarray, gains: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5) * gains


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_linear(form: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    w = weight(rng, 48, 128, **form)
    x, gains = rng.standard_normal((2, 3, 128)).astype(np.float32), rng.uniform(0.5, 2, 128).astype(np.float32)
    bias, residual = rng.standard_normal(48).astype(np.float32), rng.standard_normal((2, 3, 48)).astype(np.float32)
    inputs = [x, gains, *w.inputs, bias, residual]
    given = {0: "x", 7: "residual"}
    format_ = {"bits": form["bits"], "block_size": form["block_size"], "activation_bits": 8}
    model = model_of("QuantizedLinear", inputs, given, **format_)
    assert rounds(model)
    plain = unrounded(model)
    assert not rounds(plain)
    expected = normal(x.astype(np.float64), gains) @ w.dense().T + bias + residual
    close = 1e-5 * np.abs(expected).max()
    for optimizations in ("all", "none"):
        (y,) = run(make_session(plain, optimizations), {"x": x, "residual": residual})
        np.testing.assert_allclose(y, expected, atol=close)
    (exact,) = run(make_session(model), {"x": x, "residual": residual})
    assert np.abs(exact - expected).max() > 10 * close  # what rounding does


@pytest.mark.parametrize("activation", [0, 1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mlp(activation: int, dtype: type) -> None:
    rng = np.random.default_rng(2)
    first, second = weight(rng, 2 * 96, 64, minimums=True), weight(rng, 64, 96, zero_points=True)
    x = rng.standard_normal((1, 4, 64)).astype(dtype)
    inputs = [x, rng.uniform(0.5, 2, 64).astype(np.float32), *first.inputs, *second.inputs]
    options = {"bits": 4, "block_size": 32, "activation": activation}
    plain = unrounded(model_of("QuantizedMlp", inputs, {0: "x"}, **options, activation_bits=8))
    fine = model_of("QuantizedMlp", inputs, {0: "x"}, **options, activation_bits=16)
    (y,), (expected,) = (run(make_session(model), {"x": x}) for model in (plain, fine))
    largest = float(np.abs(expected.astype(np.float64)).max())
    atol = largest * (2e-3 if dtype == np.float16 else 8 / 32512)
    np.testing.assert_allclose(y.astype(np.float64), expected.astype(np.float64), atol=atol)


def nbits(cast: bool, seed: int = 0, accuracy_level: int = 4) -> ir.Model:
    """y = x · W in 4 bits; scales in float16, cast, or in float32."""
    w = weight(np.random.default_rng(seed), 64, 128, half=True)
    scales = "s = Cast<to = 1>(half)" if cast else ""
    proto = onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
g (float[m, 128] x) => (float[m, 64] y) {{
  {scales}
  y = com.microsoft.MatMulNBits<K = 128, N = 64, bits = 4, block_size = 32, accuracy_level = {accuracy_level}>(x, w, s)
}}""")
    numbers = {"w": w.packed, "half" if cast else "s": w.scales if cast else w.scales.astype(np.float32)}
    for name, array in numbers.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


@pytest.mark.parametrize("in_file", [False, True])
def test_scales_that_are_cast(in_file: bool, tmp_path: Any) -> None:
    """Without optimizations ONNX Runtime would multiply by nothing; graphopt's sessions don't let it."""
    model = nbits(cast=True)
    assert needs_folding(model)
    assert not needs_folding(nbits(cast=False))
    assert not needs_folding(nbits(cast=True, accuracy_level=1))
    x = np.random.default_rng(3).standard_normal((3, 128)).astype(np.float32)
    expected = x @ weight(np.random.default_rng(0), 64, 128, half=True).dense().T
    path = tmp_path / "model.onnx"
    save(model, path)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    sessions = [make_session(str(path) if in_file else model, mode) for mode in ("all", "none")]
    for session in [*sessions, graphopt.session(path, options)]:
        (y,) = run(session, {"x": x})
        np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())


def test_a_rewrite_behind_rounding_is_compared_closely() -> None:
    """What rounding hides is seen: a scale that is off by 0.1 % is refused, another form of the same isn't."""
    verifier = Verifier(nbits(cast=True))
    assert verifier.check(nbits(cast=False)).ok
    other = nbits(cast=False)
    scales = other.graph.initializers["s"]
    scales.const_value = ir.tensor(scales.const_value.numpy() * np.float32(1.001), name="s")
    assert not verifier.check(other).ok
    assert "without that rounding" in " ".join(verifier.notes)
