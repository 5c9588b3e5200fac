"""What an operator of graphopt's is: its schema, its portable body, and what it costs.

Each folder beside this file that holds an `OPERATOR` is one:

    hadamard_transform/
        __init__.py     OPERATOR: schema, documentation, cost
        body.py         BODY: the portable body, an onnxscript function of standard operators; PARTS: functions it calls
        cpu.cc          the CPU kernel (native/operator.h says how); kernels.h and simd.cc its inner loops
        cuda.cu         CUDA kernels as plain launchers; cuda.cc makes a kernel of ONNX Runtime of them
        fuzz.cc         what a valid node is, for the fuzzer (`make sanitize`), which breaks it in every way

The body goes into a model as a local function of the operator's name, so any ONNX runtime executes it. Where the
library (`graphopt.runtime_ops.library`) is registered with a session, its kernel is taken instead.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

if TYPE_CHECKING:
    import onnx

DOMAIN = "ai.graphopt"
VERSION = 1
OLDEST_OPSET = 18
"""The first version of the standard operators that every body is right for."""

Shapes = Sequence[Any]
"""Sizes of the inputs of a node, a sequence of numbers each; None: an input that is left out or of unknown sizes."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one run of a node costs.

    Attributes:
        flops: Floating-point operations (a multiplication and an addition are two), or as many of integers.
        bytes: Bytes read and written.
    """

    flops: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An input or output.

    Attributes:
        name: Its name in the body.
        type: "T" or "S" (each stands for one of the operator's types), or an ONNX type such as "uint8".
        shape: Its sizes, as the page shows them, for example "[N, K / block_size]".
        meaning: A phrase.
        optional: Whether it can be left out.
    """

    name: str
    type: str
    shape: str
    meaning: str
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute. A kernel never sees a default, so `Operator.attributes_of` writes every one on the node.

    Attributes:
        name: Its name.
        type: What it holds.
        meaning: A phrase.
        default: None: it must be given.
    """

    name: str
    type: Literal["int", "float", "ints"]
    meaning: str
    default: int | float | tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Operator:
    """An operator of the domain `ai.graphopt`.

    Attributes:
        name: Its name.
        summary: What it does, in one sentence.
        description: Its formula and terms, in Markdown.
        inputs: Its inputs.
        outputs: Its outputs.
        attributes: Its attributes.
        types: The types that "T" and "S" stand for; the body and the CPU kernel take each of them.
        cost: What a node costs, of the sizes of its inputs and its attributes. A size that it needs and isn't given
            makes it raise a TypeError.
        source: Title of the publication, or an empty string.
    """

    name: str
    summary: str
    description: str
    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    attributes: tuple[Attribute, ...]
    cost: Callable[[Shapes, Mapping[str, Any]], Cost]
    types: tuple[str, ...] = ("float", "float16")
    source: str = ""

    def attributes_of(self, **given: Any) -> dict[str, Any]:
        """All attributes of a node, with the defaults of those that aren't given.

        Raises:
            ValueError: One is unknown or missing.
        """
        known = {attribute.name: attribute for attribute in self.attributes}
        if unknown := sorted(given.keys() - known.keys()):
            raise ValueError(f"{self.name} has no attribute {unknown[0]!r}")
        values = {name: given.get(name, attribute.default) for name, attribute in known.items()}
        if missing := sorted(name for name, value in values.items() if value is None):
            raise ValueError(f"{self.name} needs its attribute {missing[0]!r}")
        return values

    def read(self, node: ir.Node) -> dict[str, Any]:
        """The attributes of a node, by name, with the defaults of those that are younger than its model.

        Raises:
            ValueError: One is missing.
        """
        known = {attribute.name for attribute in self.attributes} & node.attributes.keys()
        return self.attributes_of(**{name: node.attributes[name].value for name in known})

    def bodies(self) -> list[ir.Function]:
        """New copies of the portable body and of the functions that it is made of, the body first."""
        found = [ir.from_proto(proto) for proto in _bodies(self.name)]
        return [function for function in found if isinstance(function, ir.Function)]


@functools.cache
def _bodies(name: str) -> tuple[onnx.FunctionProto, ...]:
    """The portable body of an operator and its parts; onnxscript takes longer to write them than ONNX IR to read."""
    module = importlib.import_module(f"{__package__}.{folder_of(name)}.body")
    return tuple(f.to_function_proto() for f in (module.BODY, *getattr(module, "PARTS", ())))


@functools.cache
def _folders() -> dict[str, str]:
    """The folder of each operator."""
    import graphopt.runtime_ops as package

    found: dict[str, str] = {}
    for entry in pkgutil.iter_modules(package.__path__):
        if entry.ispkg:
            module = importlib.import_module(f"{package.__name__}.{entry.name}")
            if isinstance(operator := getattr(module, "OPERATOR", None), Operator):
                found[operator.name] = entry.name
    return found


def folder_of(name: str) -> str:
    """The folder of an operator, beside this file.

    Raises:
        KeyError: There is no such operator.
    """
    return _folders()[name]


@functools.cache
def operators() -> Mapping[str, Operator]:
    """The operators by name."""
    found = {name: importlib.import_module(f"{__package__}.{folder}").OPERATOR for name, folder in _folders().items()}
    return dict(sorted(found.items()))


def add_body(model: ir.Model, name: str) -> ir.Function:
    """Put the portable body of an operator into a model, unless it is there, and import the domain.

    Raises:
        KeyError: There is no such operator.
        ValueError: The model's opset is older than the bodies are written for.
    """
    model.graph.opset_imports.setdefault(DOMAIN, VERSION)
    found = model.functions.get((DOMAIN, name, ""))
    if found is not None:
        return found
    opset = model.graph.opset_imports.get("", 0)
    if opset < OLDEST_OPSET:
        raise ValueError(f"the body of {name} needs opset {OLDEST_OPSET}, and the model has {opset}")
    for function in operators()[name].bodies():
        # ONNX Runtime takes a function only where its opset is the model's; what bodies use means the same in all.
        function.opset_imports[""] = opset
        model.functions.setdefault(function.identifier(), function)
    return model.functions[DOMAIN, name, ""]


def uses(model: ir.Model) -> list[ir.Node]:
    """The nodes of a model that are operators of graphopt's, those of subgraphs and of other functions included."""
    graphs = [model.graph, *(f.graph for f in model.functions.values() if f.domain != DOMAIN)]
    return [n for graph in graphs for n in ir.traversal.RecursiveGraphIterator(graph) if n.domain == DOMAIN]
