"""QuantizedLinear: kernel, body and numpy on every form of weight, and beside ONNX Runtime's MatMulNBits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.runtime_ops.operator_cases import ISAS, judge, limited, run_node
from tests.runtime_ops.quantized_weights import Weight, rounded, weight

NOTHING = np.zeros(0, np.float32)


def inputs_of(x: np.ndarray, w: Weight, norm: Any = None, bias: Any = None, residual: Any = None) -> list[Any]:
    given = [NOTHING if v is None else v for v in (norm, bias)]
    return [x, given[0], *w.inputs, given[1], np.zeros(0, x.dtype) if residual is None else residual]


FORMS: list[dict[str, Any]] = [
    {"bits": 4, "block_size": 32},
    {"bits": 4, "block_size": 16, "zero_points": True},
    {"bits": 4, "block_size": 32, "minimums": True, "half": True},
    {"bits": 4, "block_size": 32, "minimums": True, "zero_points": True},
    {"bits": 4, "block_size": 128, "half": True},
    {"bits": 4, "block_size": 256},
    {"bits": 8, "block_size": 32, "zero_points": True},
    {"bits": 8, "block_size": 128, "minimums": True},
    {"bits": 8, "block_size": 256, "half": True},
    {"bits": 2, "block_size": 16},
    {"bits": 2, "block_size": 64, "zero_points": True},
    {"bits": 2, "block_size": 128, "minimums": True},
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_every_form_of_weight(isa: str, form: dict[str, Any], activation_bits: int) -> None:
    """Row lengths that fill chunks and that don't, row counts that fill tiles and that don't."""
    rng = np.random.default_rng(form["bits"] * 1000 + form["block_size"])
    for tokens, rows, blocks in ((1, 7, 1), (5, 33, 5), (4, 4, 9)):
        w = weight(rng, rows, blocks * form["block_size"], **form)
        x = rng.standard_normal((tokens, blocks * form["block_size"])).astype(np.float32)
        with limited(isa):
            (y,) = judge(
                "QuantizedLinear", inputs_of(x, w), atol=2e-5, rtol=1e-5,
                bits=w.bits, block_size=form["block_size"], activation_bits=activation_bits,
            )  # fmt: skip
        numbers, _ = rounded(x, form["block_size"], activation_bits)
        np.testing.assert_allclose(y, numbers @ w.dense().T, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("tokens", [1, 3, 130])
def test_norm_bias_and_residual(isa: str, dtype: type, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    w = weight(rng, 20, 96)
    x = (3 * rng.standard_normal((1, tokens, 96))).astype(dtype)
    norm, bias = rng.uniform(0.5, 2, 96).astype(np.float32), rng.standard_normal(20).astype(np.float32)
    residual = rng.standard_normal((1, tokens, 20)).astype(dtype)
    normal = x / np.sqrt((x.astype(np.float64) ** 2).mean(-1, keepdims=True) + 1e-6) * norm
    numbers, step = rounded(normal, 32, 8)
    dense = w.dense()
    # A norm is off by a unit of the last place, which may round one activation of a row to the next step.
    flipped = step * np.abs(dense).max() * 1.01
    last_place = 4e-3 if dtype == np.float16 else 1e-5
    with limited(isa):
        (y,) = judge(
            "QuantizedLinear", inputs_of(x, w, norm, bias, residual), atol=flipped + last_place,
            bits=4, block_size=32, epsilon=1e-6,
        )  # fmt: skip
    np.testing.assert_allclose(y, numbers @ dense.T + bias + residual, atol=flipped + 2 * last_place)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (64,), (1, 2, 1, 64)])
def test_shapes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    w = weight(rng, 5, 64)
    x = rng.standard_normal(shape).astype(np.float32)
    residual = rng.standard_normal((*shape[:-1], 5)).astype(np.float32)
    judge("QuantizedLinear", inputs_of(x, w, residual=residual), atol=1e-5, bits=4, block_size=32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_none(isa: str, wrong: float) -> None:
    rng = np.random.default_rng(1)
    w = weight(rng, 6, 64)
    x = rng.standard_normal((3, 64)).astype(np.float32)
    x[1, 40] = wrong
    with limited(isa):
        (y,) = judge("QuantizedLinear", inputs_of(x, w), atol=1e-5, bits=4, block_size=32)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


def test_zeros_and_tiny_numbers() -> None:
    w = weight(np.random.default_rng(2), 6, 64)
    x = np.zeros((2, 64), np.float32)
    x[1, 3] = 1e-30
    judge("QuantizedLinear", inputs_of(x, w), atol=1e-36, bits=4, block_size=32)


@pytest.mark.parametrize("isa", ISAS)
def test_is_what_matmul_nbits_computes(isa: str) -> None:
    """The same initializers, and at 8 bits of activations the same rounding as at accuracy level 4."""
    rng = np.random.default_rng(3)
    w = weight(rng, 48, 160, zero_points=True)
    x = rng.standard_normal((4, 160)).astype(np.float32)
    given = {"x": x, "w": w.packed, "s": w.scales.reshape(-1), "z": w.zero_points.reshape(-1)}
    values = {
        name: ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(a.shape))
        for name, a in given.items()
    }
    for name in "wsz":
        values[name].const_value = ir.tensor(given[name], name=name)
    node = ir.node(
        "MatMulNBits", list(values.values()), {"K": 160, "N": 48, "bits": 4, "block_size": 32, "accuracy_level": 4},
        domain="com.microsoft", outputs=[ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))],
    )  # fmt: skip
    graph = ir.Graph(
        [values["x"]], node.outputs, nodes=[node], initializers=[values[n] for n in "wsz"],
        opset_imports={"": 21, "com.microsoft": 1}, name="g",
    )  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": x})[0]
    with limited(isa):
        found = run_node("QuantizedLinear", inputs_of(x, w), bits=4, block_size=32)[0]
    _, step = rounded(x, 32, 8)
    # Kernels of other processors round activations by row or not at all, never further than a step.
    assert np.abs(found - expected).max() <= step * np.abs(w.dense()).sum(1).max() / 8


def _valid() -> list[Any]:
    return inputs_of(np.zeros((2, 64), np.float32), weight(np.random.default_rng(4), 5, 64))


@pytest.mark.parametrize(
    ("index", "array", "says"),
    [
        (0, np.zeros((2, 32), np.float32), "the weight takes rows of 64 numbers"),
        (0, np.zeros((), np.float32), "the weight takes rows of 64 numbers"),
        (1, np.zeros(63, np.float32), "the norm has 63 gains"),
        (2, np.zeros((5, 2, 8), np.uint8), "8 bytes a block, and 32 numbers of 4 bits take 16"),
        (2, np.zeros((5, 32), np.uint8), r"must be \[rows, blocks, bytes\]"),
        (3, np.zeros((5, 1), np.float32), "10 blocks and 5 scales"),
        (4, np.zeros((5, 2), np.uint8), "needs 5 bytes of zero points, and has 10"),
        (5, np.zeros((5, 1), np.float32), "10 blocks and 5 minimums"),
        (6, np.zeros(4, np.float32), "the bias has 4 numbers"),
        (7, np.zeros((2, 4), np.float32), r"the residual is \[2, 4\]"),
    ],
)
def test_what_is_wrong_names_the_node(index: int, array: np.ndarray, says: str) -> None:
    inputs = _valid()
    inputs[index] = array
    with pytest.raises(Exception, match=f"QuantizedLinear 'the_node': .*{says}"):
        run_node("QuantizedLinear", inputs, bits=4, block_size=32)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"bits": 3, "block_size": 32}, "bits is 3"),
        ({"bits": 4, "block_size": 24}, "block_size is 24"),
        ({"bits": 4, "block_size": 512}, "block_size is 512"),
        ({"bits": 4, "block_size": 32, "activation_bits": 4}, "activation_bits is 4"),
    ],
)
def test_wrong_attributes_name_the_node(attributes: dict[str, int], says: str) -> None:
    with pytest.raises(Exception, match=f"QuantizedLinear 'the_node': {says}"):
        run_node("QuantizedLinear", _valid(), **attributes)
