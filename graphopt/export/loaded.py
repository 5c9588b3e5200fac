"""A model that is ready to be exported: its module, its graphs-to-be, and its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.export.source import INNER, Source
from graphopt.export.streamed_tensor import cast_tensor
from graphopt.export.torch_tensors import as_array, ir_dtype
from graphopt.export.weights import Weights, load_into


@dataclass
class Loaded:
    """What is exported together.

    Attributes:
        label: How messages call it.
        sources: A source for each file to write, by the file's name without its ending.
        module: The module that all sources run, or parts of it.
        weights: Its weights; None: they're in the module.
        implementations: The attention implementations to trace with, the best first; empty: the module's own.
        computed: Names of parameters that no checkpoint holds, because the module's class computes them.
        companions: Writes what belongs beside the model (tokenizer, configuration) into a folder; gives the files, and
            what a user should know of them.
        notes: What a user should know about how it was loaded.
    """

    label: str
    sources: dict[str, Source]
    module: Any
    weights: Weights | None = None
    implementations: tuple[str, ...] = ()
    computed: frozenset[str] = frozenset()
    companions: Callable[[Path], tuple[list[Path], list[str]]] | None = None
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def attending(self, implementation: str) -> Iterator[None]:
        """The module with this attention implementation."""
        if not self.implementations:
            yield
            return
        before = self.module.config._attn_implementation
        self.module.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self.module.set_attn_implementation(before)

    def put_in(self) -> None:
        """Put the weights into the module, as it is now: layers that were cut off get none."""
        if self.weights is not None:
            load_into(self.module, self.weights)

    def weight_bytes(self) -> int:
        """Bytes of the module's parameters, each counted once."""
        return sum(p.numel() * p.element_size() for p in self.module.parameters())

    def fill(self, model: ir.Model, source: Source) -> None:
        """Give a traced graph its weights, each read when it is written.

        Raises:
            ModelError: A parameter has no weights.
        """
        own = _tensors(source.module)
        given = self.weights.names() if self.weights is not None else ()
        names: dict[int, str] = {}
        first: dict[int, str] = {}
        for name, tensor in _tensors(self.module).items():
            first.setdefault(id(tensor), name)
            # Of several names of one parameter a checkpoint may have any.
            if id(tensor) not in names or name in given:
                names[id(tensor)] = name
        for value in list(model.graph.initializers.values()):
            tensor = own.get(f"{INNER}{value.name}", own.get(value.name or ""))
            if tensor is None:
                continue  # A constant of the trace.
            name = names.get(id(tensor), "")
            if self.weights is not None and name in given:
                value.const_value = cast_tensor(self.weights.tensor(name), ir_dtype(tensor.dtype))
            elif self.weights is not None and isinstance(tensor, _parameter()) and name not in self.computed:
                raise ModelError(f"{self.label} has no weights for {name or value.name}")
            else:
                value.const_value = ir.Tensor(as_array(tensor), name=value.name)
            value.dtype, value.shape = value.const_value.dtype, ir.Shape(tuple(tensor.shape))
            if (called := first.get(id(tensor))) is not None and called not in model.graph.initializers:
                value.name = called  # Exporters take any of several names.


def _parameter() -> Any:
    import torch

    return torch.nn.Parameter


def _tensors(module: Any) -> Mapping[str, Any]:
    return dict([*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)])
