"""Low-rank adapters kept beside the weights of an exported graph, switched at run time without a new session.

Each weight that one of the adapters changes gets a branch, y = x Wᵀ + (x A) B, whose A [in, rank] and B [rank, out] are
initializers that are graph inputs too. ONNX Runtime calls those overridable: they need not be fed, and stand for
themselves where they aren't. As they stand they have rank 0, so the branch adds zeros and the model is the base. An
adapter is a file of numbers for them, which ONNX Runtime reads and puts in their place for one run:

    adapter = onnxruntime.LoraAdapter()
    adapter.Load("french.onnx_adapter")
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session.run(None, feeds, options)

onnxruntime-genai reads the same files (`Adapters.load`). The scale of the adapter is in B.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError, UsageError, first_line
from graphopt.export.adapters.checkpoint import Adapter
from graphopt.export.adapters.projections import shared_tensors
from graphopt.export.adapters.site import Array
from graphopt.export.adapters.targets import Names, Target, shape_text, target_of
from graphopt.export.dependencies import require
from graphopt.graph.edits import Editor

SUFFIX = ".onnx_adapter"


@dataclass(frozen=True)
class KeptAdapter:
    """The numbers of one adapter for the overridable inputs of the model.

    Attributes:
        name: What it is called.
        parameters: A [in, rank] and B [rank, out] by the name of the input, in the type of the weight.
    """

    name: str
    parameters: dict[str, Array]

    def write(self, path: Path) -> Path:
        """Write them in ONNX Runtime's adapter format.

        Raises:
            ModelError: The file can't be written.
        """
        runtime = require("onnxruntime")
        values = {name: _ort_value(runtime, array) for name, array in self.parameters.items()}
        adapter = runtime.AdapterFormat()
        adapter.set_adapter_version(1)
        adapter.set_model_version(1)
        adapter.set_parameters(values)
        try:
            adapter.export_adapter(str(path))
        except Exception as error:
            raise ModelError(f"the adapter {self.name} can't be written to {path}: {first_line(error)}") from error
        return path


@dataclass(frozen=True)
class SeparateReport:
    """What `keep_adapters` did.

    Attributes:
        inputs: The inputs added to the model, in order: A and B of each changed module.
        adapters: The numbers of each adapter.
    """

    inputs: list[str]
    adapters: list[KeptAdapter]


def keep_adapters(
    model: ir.Model, adapters: Mapping[str, Adapter | str | Path], *, tied: Mapping[str, str] | None = None
) -> SeparateReport:
    """Give every weight that the adapters change a branch that they can be switched into; the model stays the base.

    The numbers of the adapters are read, those of the base aren't.

    Args:
        model: An exported model, whose initializers have the module's parameter names; changed in place.
        adapters: Folders of adapters by what they are to be called.
        tied: For parameters that the graph doesn't hold, being another one's numbers, the name of that one
            ("lm_head.weight": "model.embed_tokens.weight"): their branch goes to what the other's matrix product is.

    Raises:
        UsageError: An adapter that isn't low-rank, or of another base; a weight that the graph uses in no way known.
        ModelError: A broken file.
    """
    weights = _GraphWeights(model, tied or {})
    plans: dict[str, list[tuple[str, Target]]] = {}
    read: list[tuple[str, Adapter]] = []
    for name, given in adapters.items():
        adapter = given if isinstance(given, Adapter) else Adapter(given)
        _check_low_rank(adapter)
        names = Names(adapter, dict.fromkeys(weights.names()))
        for module in adapter.modules:
            weight = names.weight(module)
            target = target_of(adapter, float(names.times(module)), module, weight, weights.shape(weight), turned=False)
            plans.setdefault(weight, []).append((name, target))
        read.append((name, adapter))
    # What can't be done, or not be read, is found out before anything is changed.
    sites = {weight: _uses(weights.value(weight), weight, [t for _, t in planned]) for weight, planned in plans.items()}
    parameters: dict[str, dict[str, Array]] = {name: {} for name, _ in read}
    for name, adapter in read:
        own = [(w, t) for w, planned in plans.items() for called, t in planned if called == name]
        shared = shared_tensors(adapter, [(t.outputs, t.inputs) for _, t in own])
        for weight, target in own:
            names_of = _input_names(model, weight)
            pair = _factors(target, shared, weights.dtype(weight))
            parameters[name].update(zip(names_of, pair, strict=True))
    editor = Editor(model)
    inputs: list[str] = []
    for weight, planned in plans.items():
        target, (first, second) = planned[0][1], _input_names(model, weight)
        a = _overridable(model, first, (target.inputs, None), weights.dtype(weight))
        b = _overridable(model, second, (None, target.outputs), weights.dtype(weight))
        inputs += [first, second]
        for node in sites[weight]:
            _branch(editor, node, a, b)
    return SeparateReport(inputs, [KeptAdapter(name, parameters[name]) for name, _ in read])


def _input_names(model: ir.Model, weight: str) -> tuple[str, str]:
    stem = weight.removesuffix(".weight")
    found = (f"{stem}.lora_A", f"{stem}.lora_B")
    taken = {*model.graph.initializers, *(value.name for value in model.graph.inputs)}
    if clash := next((name for name in found if name in taken), None):
        raise UsageError(f"the graph has {clash} already, so its adapters have been kept separate before")
    return found


def _factors(target: Target, shared: Callable[[str], Array], dtype: ir.DataType) -> tuple[Array, Array]:
    """A [in, rank] and B [rank, out] in the type of the weight."""
    factors = target.adapter.method.factors
    assert factors is not None
    with target.fitting():
        left, right = factors(target.site(shared))
        if (left.shape[0], right.shape[1], left.shape[1]) != (target.outputs, target.inputs, right.shape[0]):
            raise ValueError(f"the product is one of {shape_text(left.shape)} and {shape_text(right.shape)}")
    left = left * np.float32(target.share)
    kind = dtype.numpy()
    return np.ascontiguousarray(right.T.astype(kind)), np.ascontiguousarray(left.T.astype(kind))


class _GraphWeights:
    """Names and shapes of a graph's initializers, tied ones included."""

    def __init__(self, model: ir.Model, tied: Mapping[str, str]) -> None:
        self._values = {name: value for name, value in model.graph.initializers.items() if not value.is_graph_input()}
        for name, other in tied.items():
            if name not in self._values and other in self._values:
                self._values[name] = self._values[other]

    def names(self) -> Collection[str]:
        return self._values.keys()

    def value(self, name: str) -> ir.Value:
        return self._values[name]

    def dtype(self, name: str) -> ir.DataType:
        tensor = self._values[name].const_value
        assert tensor is not None
        return tensor.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        tensor = self._values[name].const_value
        assert tensor is not None
        return tuple(tensor.shape.numpy())


def _check_low_rank(adapter: Adapter) -> None:
    why = None
    if adapter.method.factors is None or adapter.method.magnitude is not None:
        kind = "DoRA" if adapter.method.magnitude else adapter.config["peft_type"]
        why = f"is a {kind} adapter, which doesn't only add a product of two small matrices"
    elif adapter.config.get("target_parameters"):
        why = "adapts parameters by name (target_parameters)"
    elif adapter.replaced:
        why = f"also replaces whole parameters ({next(iter(adapter.replaced))})"
    else:
        for module, keys in adapter.modules.items():
            extra = next((n for n in keys if n.endswith((".bias", "trainable_tokens_delta"))), None)
            if extra is not None:
                why = f"also changes {module} by {extra}"
    if why is not None:
        raise UsageError(f"{adapter.folder} {why}, so it can't be kept separate; merge it")


def _uses(value: ir.Value, weight: str, targets: list[Target]) -> list[ir.Node]:
    """The products (or, of an embedding, look-ups) that the weight goes into, straight or transposed.

    Raises:
        UsageError: It goes into none, or is one of a convolution.
    """
    embedding = any("lora_embedding_A" in t.adapter.modules[t.module] for t in targets)
    found: list[ir.Node] = []
    pending = [value]
    while pending:
        current = pending.pop()
        for node, index in current.uses():
            if node.domain != "":
                continue
            if node.op_type in ("Transpose", "Cast", "Identity"):
                pending.extend(node.outputs)
            elif (embedding and node.op_type == "Gather" and index == 0) or (
                not embedding and node.op_type in ("MatMul", "Gemm") and index == 1 and node.domain == ""
            ):
                found.append(node)
    if not found:
        users = ", ".join(sorted({node.op_type for node, _ in value.uses()})) or "nothing"
        raise UsageError(
            f"the adapter of {weight} can't be kept separate, because the graph uses that weight in {users} and not in "
            f"{'a Gather' if embedding else 'a MatMul or Gemm'}; merge it"
        )
    return found


def _branch(editor: Editor, node: ir.Node, a: ir.Value, b: ir.Value) -> None:
    """y + (x A) B in place of y."""
    editor.at(node)
    y = node.outputs[0]
    x = node.inputs[1 if node.op_type == "Gather" else 0]
    assert x is not None
    if node.op_type == "Gather":
        inner = editor.op("Gather", [a, x])
    else:
        if (turned := node.attributes.get("transA")) is not None and turned.as_int():
            x = editor.op("Transpose", [x], {"perm": [1, 0]})
        inner = editor.op("MatMul", [x, a])
    added = editor.op("MatMul", [inner, b], like=y)
    again = editor.op(node.op_type, list(node.inputs), dict(node.attributes), like=y)
    producer = again.producer()
    assert producer is not None
    producer.metadata_props.update(node.metadata_props)
    editor.replace(y, editor.op("Add", [again, added], like=y))


def _overridable(model: ir.Model, name: str, shape: tuple[int | None, int | None], dtype: ir.DataType) -> ir.Value:
    """An initializer of rank 0 that is a graph input too."""
    sizes = tuple(size or 0 for size in shape)
    symbol = f"{name.rpartition('.')[0]}.rank"
    value = ir.Value(
        name=name,
        type=ir.TensorType(dtype),
        shape=ir.Shape([symbol if size is None else size for size in shape]),
        const_value=ir.Tensor(np.zeros(sizes, dtype.numpy()), dtype=dtype, name=name),
    )
    model.graph.inputs.append(value)
    model.graph.register_initializer(value)
    return value


def _ort_value(runtime: Any, array: Array) -> Any:
    kind = runtime.OrtValue
    if array.dtype.name == "bfloat16":
        return kind.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), int(ir.DataType.BFLOAT16))
    return kind.ortvalue_from_numpy(array)
