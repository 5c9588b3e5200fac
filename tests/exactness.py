"""How a test proves a pass exact: in float64 on the reference evaluator to 1e-12, and idempotent."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx.reference
import onnx.reference.ops.op_attention
import onnx_ir as ir
from onnx.reference.op_run import OpRun

from graphopt.graph.edits import walk

RTOL_FLOAT64 = 1e-12


def parse(text: str) -> ir.Model:
    """A model from ONNX text syntax, checked."""
    proto = onnx.parser.parse_model(text)
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def parse_weighted(text: str, seed: int = 0) -> ir.Model:
    """As `parse`; names declared without a value that no node makes become initializers of random numbers."""
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(seed)
    made = {name for node in proto.graph.node for name in node.output}
    for info in list(proto.graph.value_info):
        if info.name not in made:
            kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
            shape = [d.dim_value for d in info.type.tensor_type.shape.dim]
            proto.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(kind), info.name))
            proto.graph.value_info.remove(info)
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


def op_types(model: ir.Model) -> list[str]:
    """The operators of the main graph in order, Constant left out."""
    return [n.op_type for n in model.graph if n.op_type != "Constant"]


def to_float64(model: ir.Model) -> ir.Model:
    """A copy of `model` that computes in float64 wherever it computed in float32."""
    proto = ir.to_proto(ir.external_data.load_to_model(model.clone()))

    def tensor(t: onnx.TensorProto) -> None:
        if t.data_type == onnx.TensorProto.FLOAT:
            t.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(t).astype(np.float64), t.name))

    def value_type(v: onnx.ValueInfoProto) -> None:
        if v.type.HasField("tensor_type") and v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            v.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE

    def graph_(g: onnx.GraphProto) -> None:
        for t in g.initializer:
            tensor(t)
        for v in [*g.input, *g.output, *g.value_info]:
            value_type(v)
        for n in g.node:
            node(n)

    def node(n: onnx.NodeProto) -> None:
        for a in n.attribute:
            if a.type == onnx.AttributeProto.TENSOR:
                tensor(a.t)
            elif a.type == onnx.AttributeProto.GRAPH:
                graph_(a.g)
            elif a.name in ("to", "dtype") and a.i == onnx.TensorProto.FLOAT:
                # stash_type stays: the evaluator refuses any but 1, and computes in the type of X whatever it says.
                a.i = onnx.TensorProto.DOUBLE
            elif n.op_type == "Constant" and a.name in ("value_float", "value_floats"):
                numbers = [a.f] if a.name == "value_float" else list(a.floats)
                array = np.array(numbers[0] if a.name == "value_float" else numbers, dtype=np.float64)
                a.CopyFrom(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(array)))

    graph_(proto.graph)
    for f in proto.functions:
        for n in f.node:
            node(n)
    return ir.from_proto(proto)


_erf = np.vectorize(math.erf, otypes=[np.float64])


class Erf(OpRun):
    """erf in the type of its input: the evaluator's own goes through float32 and is wrong by 3e-8."""

    def _run(self, x: np.ndarray) -> tuple[np.ndarray]:
        return (_erf(x).astype(x.dtype),)


class Gelu(OpRun):
    """Gelu by its definition: the function body that the evaluator would use holds 0.044715 in float32."""

    def _run(self, x: np.ndarray, approximate: str | None = None) -> tuple[np.ndarray]:
        if approximate == "tanh":
            t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
        else:
            t = _erf(x / math.sqrt(2))
        return ((0.5 * x * (1 + t)).astype(x.dtype),)


class GroupNormalization(OpRun):
    """Group normalization by its definition: the function body goes through float32."""

    def _run(
        self, x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float | None = None,
        num_groups: int | None = None, stash_type: int | None = None,
    ) -> tuple[np.ndarray]:  # fmt: skip
        groups = x.reshape(x.shape[0], num_groups, -1)
        mean, variance = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
        normal = ((groups - mean) / np.sqrt(variance + (1e-5 if epsilon is None else epsilon))).reshape(x.shape)
        shape = [-1] + [1] * (x.ndim - 2)
        return ((normal * scale.reshape(shape) + bias.reshape(shape)).astype(x.dtype),)


class Attention(onnx.reference.ops.op_attention.Attention_23):  # type: ignore[misc, name-defined]
    """Attention with the root of its scale in the type of its inputs, which the evaluator takes in float32, and for
    sequences of no elements."""

    def _run(self, *inputs: np.ndarray, **attributes: Any) -> tuple[np.ndarray, ...]:
        for name in ("scale", "softcap"):
            if attributes.get(name) is not None:
                attributes[name] = float(attributes[name])
        q, k, v = inputs[:3]
        past = inputs[4] if len(inputs) > 4 else None
        if 0 in q.shape or (past is None and 0 in k.shape):  # the evaluator takes the maximum of nothing
            heads = attributes.get("q_num_heads")
            depth = v.shape[-1] if heads is None else v.shape[-1] // attributes["kv_num_heads"] * heads
            keys, values = (new if past is None else np.concatenate((old, new), axis=2)
                            for old, new in ((past, k), (inputs[5] if past is not None else None, v)))  # fmt: skip
            return np.zeros((*q.shape[:-1], depth), q.dtype), keys, values, np.zeros(())
        return tuple(super()._run(*inputs, **attributes))


def reference_outputs(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[Any]:
    """Outputs of the onnx reference evaluator, mended where it doesn't compute in the type of its inputs."""
    return onnx.reference.ReferenceEvaluator(
        ir.to_proto(model), new_ops=[Erf, Gelu, GroupNormalization, Attention]
    ).run(None, dict(feeds))


def random_feeds(model: ir.Model, seed: int = 0, dims: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """Random inputs for a small model: floats around 0, integers in [0, 3); symbolic dims from `dims`, else 3."""
    rng = np.random.default_rng(seed)
    feeds: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        shape = [d if isinstance(d, int) else (dims or {}).get(str(d), 3) for d in value.shape or ()]
        dtype = value.dtype.numpy()
        if np.issubdtype(dtype, np.floating):
            feeds[value.name] = rng.normal(size=shape).astype(dtype)
        elif dtype == np.bool_:
            feeds[value.name] = rng.integers(0, 2, size=shape).astype(bool)
        else:
            feeds[value.name] = rng.integers(0, 3, size=shape).astype(dtype)
    return feeds


def assert_exact(
    before: ir.Model,
    run: Callable[[ir.Model], Any],
    *,
    seeds: int = 3,
    dims: Mapping[str, int] | None = None,
    rtol: float = RTOL_FLOAT64,
    feeds: Mapping[str, np.ndarray] | None = None,
) -> ir.Model:
    """Run a pass on a copy of `before`, prove it exact in float64 and idempotent, and return the result.

    The error is relative to the largest magnitude of each output.
    """
    after = before.clone()
    run(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    again = after.clone()
    result = run(again)
    assert not result.modified, "a second run changed something"
    assert ir.to_proto(again).SerializeToString(deterministic=True) == ir.to_proto(after).SerializeToString(
        deterministic=True
    )
    double_before, double_after = to_float64(before), to_float64(after)
    for seed in range(seeds):
        inputs = dict(feeds) if feeds is not None else random_feeds(before, seed, dims)
        inputs = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in inputs.items()}
        expected = reference_outputs(double_before, inputs)
        got = reference_outputs(double_after, inputs)
        assert len(expected) == len(got)
        for e, g, out in zip(expected, got, before.graph.outputs, strict=True):
            assert e.shape == g.shape, f"{out.name}: shape {e.shape} became {g.shape}"
            assert e.dtype == g.dtype, f"{out.name}: {e.dtype} became {g.dtype}"
            if not np.issubdtype(e.dtype, np.floating):
                np.testing.assert_array_equal(e, g)
                continue
            finite = np.isfinite(e)
            np.testing.assert_array_equal(np.where(finite, 0, e), np.where(finite, 0, g))
            scale = np.max(np.abs(e[finite]), initial=1e-300)
            error = np.max(np.abs(e[finite] - g[finite]), initial=0.0) / scale
            assert error <= rtol, f"{out.name}: relative error {error:.3g}"
    return after


def names(model: ir.Model) -> set[str]:
    """Names of all nodes, for tests of uniqueness."""
    return {n.name for g in walk(model) for n in g}
