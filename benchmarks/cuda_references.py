"""References and memory that the CUDA cases of several operators share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = 127


def quantized_tokens(torch: Any, values: Any, clip: float, largest: int) -> list[Any]:
    """Bytes and scales of float32 numbers [tokens, features], as HadamardQuantize and KroneckerQuantize define them."""
    # A division by a number would be a product with its inverse.
    magnitude = values.abs().amax(dim=-1, keepdim=True)
    raw = magnitude * clip / torch.full_like(magnitude, largest)
    scale = torch.where(raw < 2.0**-126, torch.ones_like(raw), raw)
    codes = (values * (1 / scale)).clamp(-largest, largest).round()
    finite = values.isfinite().all(dim=-1, keepdim=True)
    codes = torch.where(finite, codes, torch.zeros_like(codes))
    scale = torch.where(finite, scale, torch.full_like(scale, float("nan")))
    return [(128 + codes).to(torch.uint8), scale[:, 0]]


def of_body(torch: Any, operator: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> list[Any]:
    """What an operator's portable body makes of tensors, on the CPU; the outputs come to the first input's device."""
    import onnx_ir as ir
    import onnxruntime

    from graphopt.runtime_ops import operators
    from graphopt.runtime_ops.operator import DOMAIN, add_body

    described = operators()[operator]
    arrays = [tensor.detach().cpu().numpy() for tensor in inputs]
    values = []
    for index, array in enumerate(arrays):
        dtype, shape = ir.DataType.from_numpy(array.dtype), ir.Shape([None] * array.ndim)
        values.append(ir.Value(name=f"input{index}", type=ir.TensorType(dtype), shape=shape))
    made: list[ir.Attr] = [
        ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, value)
        for name, value in described.attributes_of(**attributes).items()
    ]
    node = ir.Node(DOMAIN, operator, values, attributes=made, num_outputs=len(described.outputs))
    for index, (output, parameter) in enumerate(zip(node.outputs, described.outputs, strict=True)):
        output.name = f"output{index}"
        output.type = values[0].type if parameter.type == "T" else ir.TensorType(ir.DataType[parameter.type.upper()])
    graph = ir.Graph(values, node.outputs, nodes=[node], opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    add_body(model, operator)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = session.run(None, {f"input{index}": array for index, array in enumerate(arrays)})
    return [torch.from_numpy(array).to(inputs[0].device) for array in found]


def aligned(torch: Any, size: int, device: str, boundary: int = 256) -> Any:
    """So many bytes of working memory at a multiple of `boundary`."""
    memory = torch.empty(size + boundary, dtype=torch.uint8, device=device)
    start = -memory.data_ptr() % boundary
    return memory[start : start + size]
