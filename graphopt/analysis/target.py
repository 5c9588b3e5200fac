"""What the installed ONNX Runtime can execute: asked of it, not listed by version."""

from __future__ import annotations

import dataclasses
import functools
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

TARGETS = ("cpu", "cuda", "portable")

# Canonical operators whose kernels differ between versions and providers, with a smallest instance of each:
# (domain, operator, opset, inputs as shapes, attributes).
_PROBED: tuple[tuple[str, str, int, tuple[tuple[int, ...], ...], dict[str, Any]], ...] = (
    ("", "LayerNormalization", 17, ((1, 2, 8), (8,), (8,)), {}),
    ("", "Gelu", 20, ((1, 8),), {}),
    ("", "RMSNormalization", 23, ((1, 2, 8), (8,)), {}),
    ("", "RotaryEmbedding", 23, ((1, 2, 3, 8), (1, 3, 4), (1, 3, 4)), {}),
    ("", "Attention", 23, ((1, 2, 3, 8), (1, 2, 3, 8), (1, 2, 3, 8)), {}),
    ("", "Swish", 24, ((1, 8),), {}),
    ("com.microsoft", "SkipLayerNormalization", 1, ((1, 2, 8), (1, 2, 8), (8,)), {}),
    ("com.microsoft", "SkipSimplifiedLayerNormalization", 1, ((1, 2, 8), (1, 2, 8), (8,)), {}),
    ("com.microsoft", "QuickGelu", 1, ((1, 8),), {}),
    ("com.microsoft", "FusedMatMul", 1, ((2, 8), (8, 4)), {}),
)


@dataclasses.dataclass(frozen=True)
class OperatorSupport:
    """Whether one operator has a kernel for one element type.

    Attributes:
        operator: "domain::Op" or "Op" for the default domain, with its opset, for example "Swish-24".
        dtype: "float32" or "float16".
        runs: A session with the operator can be made.
        kernel: It runs by a kernel of its own, and not by expansion into other operators; None where it doesn't run.
    """

    operator: str
    dtype: str
    runs: bool
    kernel: bool | None


@dataclasses.dataclass(frozen=True)
class TargetFacts:
    """Facts about the runtime that models are lowered for."""

    runtime: str
    version: str
    providers: tuple[str, ...]
    machine: str
    highest_opset: int
    highest_ir: int
    operators: tuple[OperatorSupport, ...]

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON data."""
        return dataclasses.asdict(self)


def facts(target: str = "cpu") -> TargetFacts:
    """Ask the installed ONNX Runtime (takes about a second).

    Raises:
        ImportError: There is no ONNX Runtime.
    """
    import onnxruntime

    provider = "CUDAExecutionProvider" if target == "cuda" else "CPUExecutionProvider"
    return TargetFacts(
        "ONNX Runtime",
        onnxruntime.__version__,
        tuple(onnxruntime.get_available_providers()),
        f"{platform.system()} {platform.machine()}",
        highest_opset(),
        _highest_ir(),
        tuple(
            _support(domain, op, opset, shapes, attributes, dtype, provider)
            for domain, op, opset, shapes, attributes in _PROBED
            for dtype in ("float32", "float16")
        ),
    )


@functools.cache
def highest_opset() -> int:
    """The highest opset of the default domain that the installed ONNX Runtime loads."""
    newest = onnx.defs.onnx_opset_version()
    return next((v for v in range(newest, 6, -1) if _loads(_model([_node("Identity")], opset=v, ir=8))), 0)


@functools.cache
def _highest_ir() -> int:
    return next((v for v in range(onnx.IR_VERSION, 2, -1) if _loads(_model([_node("Identity")], opset=13, ir=v))), 0)


def _node(op: str) -> onnx.NodeProto:
    return onnx.helper.make_node(op, ["x0"], ["y"])


def _model(
    nodes: Sequence[onnx.NodeProto],
    *,
    opset: int,
    ir: int = 10,
    domain: str = "",
    shapes: Sequence[tuple[int, ...]] = ((1,),),
    dtype: int = onnx.TensorProto.FLOAT,
) -> onnx.ModelProto:
    inputs = [onnx.helper.make_tensor_value_info(f"x{i}", dtype, shape) for i, shape in enumerate(shapes)]
    graph = onnx.helper.make_graph(list(nodes), "probe", inputs, [onnx.helper.make_empty_tensor_value_info("y")])
    imports = {"": opset} if not domain else {"": 21, domain: opset}
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid(d, v) for d, v in imports.items()], ir_version=ir
    )
    model.graph.output[0].type.tensor_type.elem_type = dtype
    return model


def _loads(model: onnx.ModelProto) -> bool:
    return _session(model, "CPUExecutionProvider") is not None


def _session(model: onnx.ModelProto, provider: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if provider not in onnxruntime.get_available_providers():
        return None
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
    except Exception:  # ONNX Runtime has a class of exception for each reason; every one means "doesn't load"
        return None


def _support(
    domain: str,
    op: str,
    opset: int,
    shapes: Sequence[tuple[int, ...]],
    attributes: Mapping[str, Any],
    dtype: str,
    provider: str,
) -> OperatorSupport:
    label = f"{domain}::{op}" if domain else f"{op}-{opset}"
    element = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    node = onnx.helper.make_node(op, [f"x{i}" for i in range(len(shapes))], ["y"], domain=domain, **attributes)
    model = _model([node], opset=opset, domain=domain, shapes=shapes, dtype=element)
    session = _session(model, provider)
    if session is None:
        return OperatorSupport(label, dtype, False, None)
    return OperatorSupport(label, dtype, True, _executed_as(model, provider) == [op])


def _executed_as(model: onnx.ModelProto, provider: str) -> list[str]:
    """Operators of the graph that ONNX Runtime really executes (functions without a kernel are expanded)."""
    import tempfile
    from pathlib import Path

    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(Path(folder) / "executed.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[provider])
        return [n.op_type for n in onnx.load(options.optimized_model_filepath).graph.node]
