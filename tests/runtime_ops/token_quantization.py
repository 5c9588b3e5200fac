"""What holds of every operator that gives out bytes with one scale for each token: HadamardQuantize, KroneckerQuantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from tests.runtime_ops.operator_cases import node_model, run_node


def quantized(r: np.ndarray, clip: float, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and scales of float32 numbers [tokens, features], by the formula."""
    with np.errstate(invalid="ignore", over="ignore"):
        raw = np.abs(r).max(axis=-1, keepdims=True) * np.float32(clip) / np.float32(largest)
        scale = np.where(raw < np.float32(2.0**-126), np.float32(1), raw)
        scale = np.where(np.isfinite(r).all(axis=-1, keepdims=True), scale, np.float32(np.nan))
        codes = np.clip(np.rint(r * (np.float32(1) / scale)), -largest, largest)
    return (128 + np.nan_to_num(codes)).astype(np.uint8), scale.astype(np.float32)


def judge_quantized(
    name: str, inputs: Sequence[Any], transformed: np.ndarray, *, exact: bool, **attributes: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Hold kernel, body and formula against each other; returns the body's outputs.

    Args:
        name: The operator.
        inputs: An array each.
        transformed: What is quantized, float32 numbers as the transform's body gives them.
        exact: Whether the transform's numbers are the same to the last bit; else a byte in a hundred may be one off.
        attributes: The node's.
    """
    clip, largest = attributes.get("clip", 1.0), attributes.get("largest", 127)
    codes, scales = quantized(transformed, clip, largest)
    body = run_node(name, inputs, kernel=False, **attributes)
    for found in (body, *(run_node(name, inputs, threads=threads, **attributes) for threads in (1, 2))):
        y, scale = found
        assert (y.dtype, scale.dtype) == (np.uint8, np.float32)
        assert y.shape == codes.shape
        assert scale.shape == (*y.shape[:-1], 1)
        if exact:
            np.testing.assert_array_equal(scale, scales)
            np.testing.assert_array_equal(y, codes)
        else:
            np.testing.assert_allclose(scale, scales, rtol=1e-4, equal_nan=True)
            off = np.abs(y.astype(int) - codes)
            assert off.max(initial=0) <= 1
            assert (off > 0).sum() <= 0.01 * off.size + 1
    return body[0], body[1]


def into_integer_product(
    name: str, inputs: Sequence[Any], weight: np.ndarray, scales: np.ndarray, **attributes: Any
) -> Any:
    """What MatMulIntegerToFloat makes of the bytes and scales of the operator's kernel, its body beside it.

    Args:
        name: The operator.
        inputs: Its inputs.
        weight: int8 [K, N].
        scales: float32 [N].
        attributes: The node's.
    """
    model = ir.from_proto(_proto(node_model(name, inputs, attributes)))
    y, y_scale = model.graph.outputs
    given = [
        ir.Value(
            name=n,
            const_value=ir.tensor(a),
            type=ir.TensorType(ir.DataType.from_numpy(a.dtype)),
            shape=ir.Shape(a.shape),
        )
        for n, a in (("weight", weight), ("scales", scales), ("zero", np.array(128, np.uint8)))
    ]
    for value in given:
        model.graph.register_initializer(value)
    node = ir.Node("com.microsoft", "MatMulIntegerToFloat", [y, given[0], y_scale, given[1], given[2]], num_outputs=1)
    node.outputs[0].name = "product"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.append(node)
    model.graph.outputs[:] = [node.outputs[0]]
    model.graph.opset_imports["com.microsoft"] = 1
    from graphopt.runtime_ops import library_path

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {f"input{i}": a for i, a in enumerate(inputs)})[0]


def _proto(content: bytes) -> Any:
    import onnx

    return onnx.load_model_from_string(content)
