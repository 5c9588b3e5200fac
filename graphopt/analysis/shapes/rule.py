"""What a shape rule sees and returns, and the table that finds the rule of an operator."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.dims import Dim

Shape: TypeAlias = tuple[Dim, ...]
Content: TypeAlias = npt.NDArray[Any]
"""The elements of a small integer tensor, as an array of `Dim`."""

MAX_CONTENT = 64
"""Elements of the largest tensor whose content is followed."""

INT64 = ir.DataType.INT64
BOOL = ir.DataType.BOOL
FLOAT = ir.DataType.FLOAT
SYMBOLIC_TYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
"""Types in which content is computed. Shape arithmetic is taken not to overflow 32 bits."""


@dataclasses.dataclass(frozen=True, slots=True)
class Fact:
    """What is known of one value.

    Attributes:
        dtype: Its element type; None where unknown or where it is no tensor.
        shape: Its dimensions; None where the rank isn't known.
        content: Its elements, for integer and bool tensors of at most `MAX_CONTENT` elements; an array that
            must not be written to.
    """

    dtype: ir.DataType | None = None
    shape: Shape | None = None
    content: Content | None = None


NOTHING = Fact()


class UnknownShapeError(Exception):
    """Raised inside a rule where what it needs isn't known; the outputs are then unknown."""


Result: TypeAlias = Shape | Content | Fact | None
"""What a rule says of one output: a shape, a content (which has a shape), all, or nothing."""
Rule: TypeAlias = Callable[["Op"], Result | list[Result]]
TypeSource: TypeAlias = int | ir.DataType | None
"""The element type of an output: that of the input with this index, a fixed one, or the rule tells."""


class Op:
    """One node as a rule sees it: facts of its inputs, its attributes, the opset."""

    __slots__ = ("attributes", "facts", "node", "opset")

    def __init__(
        self, node: ir.Node, facts: Sequence[Fact | None], opset: int, attributes: Mapping[str, ir.Attr]
    ) -> None:
        self.node, self.facts, self.opset, self.attributes = node, facts, opset, attributes

    # ---- inputs

    def has(self, index: int) -> bool:
        """Whether input `index` is given."""
        return index < len(self.facts) and self.facts[index] is not None

    def fact(self, index: int) -> Fact:
        """What is known of input `index` (nothing, where it isn't given)."""
        return (self.facts[index] if index < len(self.facts) else None) or NOTHING

    def shape(self, index: int) -> Shape:
        """The shape of input `index`.

        Raises:
            UnknownShapeError: its rank isn't known.
        """
        shape = self.fact(index).shape
        if shape is None:
            raise UnknownShapeError
        return shape

    def rank(self, index: int) -> int:
        """The rank of input `index` (raises as `shape`)."""
        return len(self.shape(index))

    def dtype(self, index: int) -> ir.DataType | None:
        """The element type of input `index`, where known."""
        return self.fact(index).dtype

    def content(self, index: int) -> Content:
        """The elements of input `index`.

        Raises:
            UnknownShapeError: they aren't known.
        """
        content = self.fact(index).content
        if content is None:
            raise UnknownShapeError
        return content

    def constants(self, index: int) -> list[int]:
        """The elements of input `index` as numbers (raises where one isn't constant)."""
        numbers = [dim.value for dim in self.content(index).flat]
        if any(n is None for n in numbers):
            raise UnknownShapeError
        return [n for n in numbers if n is not None]

    # ---- attributes

    def attribute(self, name: str) -> Any:
        """The value of an attribute, None where it isn't given (raises where a function's caller decides it)."""
        attribute = self.node.attributes.get(name)
        if attribute is not None and attribute.is_ref():
            reference = attribute.ref_attr_name
            attribute = self.attributes.get(reference) if reference else None
            if attribute is None:
                raise UnknownShapeError
        return None if attribute is None else attribute.value

    def integer(self, name: str, default: int | None = None) -> int:
        """An integer attribute (raises where it isn't given and has no default)."""
        value = self.attribute(name)
        if value is None:
            if default is None:
                raise UnknownShapeError
            return default
        return int(value)

    def integers(self, name: str) -> list[int] | None:
        """A list attribute, None where it isn't given."""
        value = self.attribute(name)
        return None if value is None else [int(v) for v in value]

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        value = self.attribute(name)
        return default if value is None else str(value)

    def axes(self, name: str, index: int) -> list[int] | None:
        """A list that is an attribute or, in later opsets, input `index`; None where neither is given."""
        given = self.integers(name)
        if given is not None:
            return given
        return self.constants(index) if self.has(index) else None

    # ---- results

    def unknown(self, low: int = 0, high: float = math.inf) -> Dim:
        """A size of which nothing is known but its bounds."""
        outputs = self.node.outputs
        return Dim.unknown(f"?{outputs[0].name if outputs else ''}", low, high)

    def unknowns(self, rank: int) -> Shape:
        """A shape of that rank with nothing else known."""
        return tuple(self.unknown() for _ in range(rank))


def axis_of(axis: int, rank: int) -> int:
    """`axis` counted from the front (raises where there is no such axis)."""
    if not -rank <= axis < rank:
        raise UnknownShapeError
    return axis + rank if axis < 0 else axis


def constant_of(dim: Dim) -> int:
    """The number that `dim` is (raises where it isn't constant)."""
    if dim.value is None:
        raise UnknownShapeError
    return dim.value


def static(shape: Shape) -> tuple[int, ...]:
    """`shape` as numbers (raises where one isn't constant)."""
    return tuple(constant_of(d) for d in shape)


def content_of(dims: Iterable[Dim | int] | Dim | int, shape: tuple[int, ...] | None = None) -> Content:
    """An array of `Dim` from numbers (rank 0 for a single one), reshaped to `shape` where given."""
    array: Content
    if isinstance(dims, Dim | int):
        array = np.empty((), dtype=object)
        array[()] = Dim.of(dims)
    else:
        items = [Dim.of(d) for d in dims]
        array = np.empty(len(items), dtype=object)
        array[:] = items
    return array if shape is None else array.reshape(shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A rule and where the element types of the outputs come from (the last one serves all further outputs)."""

    rule: Rule
    types: tuple[TypeSource, ...]


RULES: dict[str, Entry] = {}
"""Rules by operator: "Op" of the default domain, else "domain::Op"."""


def rule(*operators: str, types: TypeSource | tuple[TypeSource, ...] = 0) -> Callable[[Rule], Rule]:
    """Register a function as the rule of `operators` (each argument may hold several names)."""

    def register(function: Rule) -> Rule:
        entry = Entry(function, types if isinstance(types, tuple) else (types,))
        for operator in " ".join(operators).split():
            RULES[operator] = entry
        return function

    return register


def microsoft(*operators: str) -> tuple[str, ...]:
    """The names of ONNX Runtime's contributed operators as keys of the table."""
    return tuple(f"com.microsoft::{operator}" for operator in operators)
