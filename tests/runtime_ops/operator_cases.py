"""One node of an operator of graphopt's as a model, run on its portable body and on the library's kernel."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.operator import DOMAIN, add_body

ISAS = ("generic", "avx2", "avx512")
"""The sets of instructions that inner loops are compiled for, on x86-64."""
_limit = ""
"""The set that they are limited to."""


def node_model(
    name: str,
    inputs: Sequence[Any],
    attributes: Mapping[str, Any],
    opset: int = 21,
    fixed: bool = False,
    outputs: int | None = None,
) -> bytes:
    """A model of one node.

    Args:
        name: The operator.
        inputs: An array each, or None where it is left out; the model's inputs are called "input0", ... with open sizes.
        attributes: The node's attributes; defaults are added.
        opset: Of the standard operators.
        fixed: Declare the sizes of the inputs, as a model's constants do.
        outputs: How many of its outputs are the model's; None: all.
    """
    operator = operators()[name]
    values: list[ir.Value | None] = []
    for index, array in enumerate(inputs):
        if array is None:
            values.append(None)
            continue
        dtype = ir.DataType.from_numpy(np.asarray(array).dtype)
        shape = ir.Shape(np.asarray(array).shape if fixed else [None] * np.asarray(array).ndim)
        values.append(ir.Value(name=f"input{index}", type=ir.TensorType(dtype), shape=shape))
    made = [
        ir.AttrFloat32(key, value) if isinstance(value, float)
        else ir.AttrInt64s(key, value) if isinstance(value, list | tuple)
        else ir.AttrInt64(key, value)
        for key, value in operator.attributes_of(**attributes).items()
    ]  # fmt: skip
    node = ir.Node(DOMAIN, name, values, attributes=made, num_outputs=len(operator.outputs), name="the_node")
    for index, output in enumerate(node.outputs):
        output.name = f"output{index}"
        kind = operator.outputs[index].type
        given = values[0].dtype if kind == "T" and values[0] is not None else ir.DataType[kind.upper()]
        output.type = ir.TensorType(ir.DataType(int(given or 1)))
    graph = ir.Graph(
        [v for v in values if v is not None], node.outputs[:outputs], nodes=[node], opset_imports={"": opset}, name="g"
    )
    model = ir.Model(graph, ir_version=10 if opset > 20 else 9)
    add_body(model, name)
    return ir.to_proto(model).SerializeToString()


def run_node(
    name: str, inputs: Sequence[Any], *, kernel: bool = True, threads: int = 1, opset: int = 21, **attributes: Any
) -> list[Any]:
    """The outputs of one node, of the library's kernel or of the body.

    Raises:
        Exception: What ONNX Runtime raises.
    """
    types = tuple(None if a is None else (np.asarray(a).dtype, np.asarray(a).ndim) for a in inputs)
    settled = tuple((key, tuple(value) if isinstance(value, list) else value) for key, value in attributes.items())
    session = _session(_model(name, types, settled, opset), threads, _limit if kernel else None)
    return session.run(None, {f"input{i}": np.asarray(a) for i, a in enumerate(inputs) if a is not None})


@functools.lru_cache(32)
def _model(
    name: str, types: tuple[tuple[Any, int] | None, ...], attributes: tuple[tuple[str, Any], ...], opset: int
) -> bytes:
    """`node_model` for inputs of these types and ranks."""
    arrays = [None if given is None else np.zeros((1,) * given[1], given[0]) for given in types]
    return node_model(name, arrays, dict(attributes), opset)


@functools.lru_cache(32)
def _session(model: bytes, threads: int, isa: str | None) -> onnxruntime.InferenceSession:
    """A session of a model; `isa`: what the kernels' inner loops are limited to, None: it runs on the bodies."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if isa is not None:
        path = library_path()
        assert path is not None, "the library with the kernels isn't built"
        options.register_custom_ops_library(str(path))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def in_place(name: str, inputs: Sequence[Any], **attributes: Any) -> Any:
    """The first output of one node's kernel, bound to the memory of its first input."""
    path = library_path()
    assert path is not None, "the library with the kernels isn't built"
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(path))
    model = node_model(name, inputs, attributes)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(np.array(array)) for array in inputs]
    for index, value in enumerate(values):
        binding.bind_ortvalue_input(f"input{index}", value)
    binding.bind_ortvalue_output("output0", values[0])
    session.run_with_iobinding(binding)
    return values[0].numpy().copy()


@contextlib.contextmanager
def limited(isa: str) -> Iterator[None]:
    """Inner loops for this set of instructions; the test is skipped where the machine lacks it."""
    path = library_path()
    assert path is not None, "the library with the kernels isn't built"
    library = ctypes.CDLL(str(path))
    library.graphopt_limit_isa.restype = ctypes.c_char_p
    if library.graphopt_limit_isa(isa.encode()).decode() != isa:
        library.graphopt_limit_isa(b"")
        pytest.skip(f"this machine has no {isa}")
    global _limit
    _limit = isa
    try:
        yield
    finally:
        _limit = ""
        library.graphopt_limit_isa(b"")


def judge(name: str, inputs: Sequence[Any], *, atol: float, rtol: float = 0.0, **attributes: Any) -> list[Any]:
    """Hold the kernel, on one thread and on two, against the body; returns the body's outputs.

    Args:
        name: The operator.
        inputs: An array each, or None.
        atol: The largest difference of an element.
        rtol: The same relative to the element.
        attributes: The node's.
    """
    expected = run_node(name, inputs, kernel=False, **attributes)
    for threads in (1, 2):
        found = run_node(name, inputs, threads=threads, **attributes)
        for want, have in zip(expected, found, strict=True):
            assert have.dtype == want.dtype
            assert have.shape == want.shape
            if want.dtype.kind == "f":
                np.testing.assert_allclose(
                    have.astype(np.float64), want.astype(np.float64), rtol=rtol, atol=atol, equal_nan=True
                )
            else:
                np.testing.assert_array_equal(have, want)
    return expected
