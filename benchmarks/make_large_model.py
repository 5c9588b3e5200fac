"""Write a large model with random weights, to measure the time and the peak memory of `graphopt optimize`.

Either a chain of many nodes, or a transformer encoder, spelled out as exporters write it, with external data of a
given size. Weights are written block by block: the peak memory is that of one block, not of the model.

    python benchmarks/make_large_model.py --chain 6000 --output chain.onnx
    python benchmarks/make_large_model.py --bytes 2.7e9 --output large/model.onnx
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
BLOCK = 1 << 20
"""Numbers drawn and written at once."""
ALIGNMENT = 4096
"""Bytes; external tensors start at multiples of it, so that they can be memory-mapped."""
HEAD = 64
"""Size of an attention head."""


def main() -> None:
    """Parse the command line and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--chain", type=int, metavar="N", help="a chain of N nodes")
    kind.add_argument("--bytes", type=float, metavar="N", help="a transformer with about N bytes of external data")
    parser.add_argument("--hidden", type=int, default=1024, help="hidden size of the transformer (default: 1024)")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if (options.chain if options.bytes is None else options.bytes) <= 0:
        parser.error("the size must be positive")
    if options.hidden <= 0 or options.hidden % HEAD:
        parser.error(f"the hidden size must be a multiple of {HEAD}")
    start = time.perf_counter()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".large-", dir=options.output.parent) as temporary:
        staged = Path(temporary) / options.output.name
        if options.chain is not None:
            model = chain(options.chain)
        else:
            with (staged.parent / f"{staged.name}.data").open("wb") as data:
                model = transformer(int(options.bytes), options.hidden, data, f"{staged.name}.data")
        onnx.save(model, staged)
        for file in sorted(Path(temporary).iterdir(), reverse=True):  # The weights before the model.
            os.replace(file, options.output.parent / file.name)
    print(f"{options.output}: {len(model.graph.node)} nodes in {time.perf_counter() - start:.1f} s")


def chain(length: int) -> onnx.ModelProto:
    """A model of `length` nodes, each of which reads the one before; every eighth can be removed or folded away."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    initializers: list[TensorProto] = []
    current = "input"
    for index in range(length):
        output = "output" if index == length - 1 else f"value_{index}"
        op_type = ("Add", "Tanh", "Mul", "Identity", "Sub", "Sigmoid", "Transpose", "Transpose")[index % 8]
        inputs, attributes = [current], {}
        if op_type in ("Add", "Mul", "Sub"):
            array = rng.uniform(0.5, 1.5, size=8).astype(np.float32)
            initializers.append(numpy_helper.from_array(array, f"weight_{index}"))
            inputs.append(f"weight_{index}")
        elif op_type == "Transpose":
            attributes["perm"] = [0, 2, 1]
        nodes.append(helper.make_node(op_type, inputs, [output], name=f"node_{index}", **attributes))
        current = output
    shape = ["batch", 8, 8]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, shape)],
        initializers,
    )
    return _model(graph)


def transformer(size: int, hidden: int, data: BinaryIO, location: str) -> onnx.ModelProto:
    """A pre-LN transformer encoder over [batch, sequence, hidden] whose weights, written to `data`, have `size` bytes.

    The size is met to within one layer (48 * hidden^2 bytes), and there is at least one layer.
    """
    layers = max(1, round(size / (48 * hidden * hidden)))
    builder = _Builder(data, location)
    x = "hidden_in"
    for layer in range(layers):
        builder.prefix = f"layers.{layer}"
        x = builder.op("Add", [x, _attention(builder, builder.layer_norm(x, hidden), hidden)])
        up = builder.linear(builder.layer_norm(x, hidden), hidden, 4 * hidden, "up")
        x = builder.op("Add", [x, builder.linear(builder.gelu(up), 4 * hidden, hidden, "down")])
    builder.prefix = "final"
    builder.op("Mul", [builder.layer_norm(x, hidden), builder.scalar(1.0)], output="hidden_out")
    shape = ["batch", "sequence", hidden]
    graph = helper.make_graph(
        builder.nodes,
        "transformer",
        [helper.make_tensor_value_info("hidden_in", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("hidden_out", TensorProto.FLOAT, shape)],
        builder.initializers,
    )
    return _model(graph)


def _attention(builder: _Builder, x: str, hidden: int) -> str:
    heads = hidden // HEAD

    def split(name: str, perm: list[int]) -> str:
        shape = builder.integers([0, 0, heads, HEAD])
        by_head = builder.op("Reshape", [builder.linear(x, hidden, hidden, name), shape])
        return builder.op("Transpose", [by_head], perm=perm)

    query, key, value = split("q", [0, 2, 1, 3]), split("k", [0, 2, 3, 1]), split("v", [0, 2, 1, 3])
    scores = builder.op("Mul", [builder.op("MatMul", [query, key]), builder.scalar(HEAD**-0.5)])
    mixed = builder.op("MatMul", [builder.op("Softmax", [scores], axis=-1), value])
    joined = builder.op("Transpose", [mixed], perm=[0, 2, 1, 3])
    joined = builder.op("Reshape", [joined, builder.integers([0, 0, hidden])])
    return builder.linear(joined, hidden, hidden, "o")


class _Builder:
    """Collects nodes, and writes weights to the external data file as they come."""

    def __init__(self, data: BinaryIO, location: str) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.prefix = ""
        self._data = data
        self._location = location
        self._rng = np.random.default_rng(0)
        self._count = 0

    def op(self, op_type: str, inputs: Sequence[str], output: str | None = None, **attributes: object) -> str:
        self._count += 1
        name = f"{self.prefix}/{op_type}_{self._count}"
        output = output or f"{name}:0"
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=name, **attributes))
        return output

    def linear(self, x: str, inputs: int, outputs: int, name: str) -> str:
        weight = self.random([inputs, outputs], f"{self.prefix}.{name}.weight", inputs**-0.5)
        bias = self.random([outputs], f"{self.prefix}.{name}.bias", 0.02)
        return self.op("Add", [self.op("MatMul", [x, weight]), bias])

    def layer_norm(self, x: str, hidden: int) -> str:
        self._count += 1
        name = f"{self.prefix}.norm_{self._count}"
        centred = self.op("Sub", [x, self.op("ReduceMean", [x], axes=[-1])])
        variance = self.op("ReduceMean", [self.op("Pow", [centred, self.scalar(2.0)])], axes=[-1])
        deviation = self.op("Sqrt", [self.op("Add", [variance, self.scalar(1e-5)])])
        scaled = self.op("Mul", [self.op("Div", [centred, deviation]), self.random([hidden], f"{name}.weight", 1.0)])
        return self.op("Add", [scaled, self.random([hidden], f"{name}.bias", 0.02)])

    def gelu(self, x: str) -> str:
        erf = self.op("Erf", [self.op("Div", [x, self.scalar(2**0.5)])])
        doubled = self.op("Mul", [x, self.op("Add", [erf, self.scalar(1.0)])])
        return self.op("Mul", [doubled, self.scalar(0.5)])

    def scalar(self, value: float) -> str:
        return self._constant(np.array(value, dtype=np.float32))

    def integers(self, values: list[int]) -> str:
        return self._constant(np.array(values, dtype=np.int64))

    def _constant(self, array: np.ndarray) -> str:
        return self.op("Constant", [], value=numpy_helper.from_array(array))

    def random(self, shape: list[int], name: str, scale: float) -> str:
        self._data.seek(-self._data.tell() % ALIGNMENT, os.SEEK_CUR)
        offset, count = self._data.tell(), int(np.prod(shape))
        for start in range(0, count, BLOCK):
            block = self._rng.standard_normal(min(BLOCK, count - start), dtype=np.float32)
            self._data.write((block * np.float32(scale)).tobytes())
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self._location), ("offset", offset), ("length", 4 * count)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)


if __name__ == "__main__":
    main()
