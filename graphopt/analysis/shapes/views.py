"""Shape rules of operators that give the same elements another shape."""

from __future__ import annotations

from graphopt.analysis import dim_functions as df
from graphopt.analysis.dims import ONE, Dim, as_symbol
from graphopt.analysis.shapes.rule import Fact, Op, Result, Shape, UnknownShapeError, axis_of, rule, static


def reshaped(op: Op, shape: Shape) -> Result:
    """The result of an operator that keeps the order of the elements of input 0 and gives them `shape`."""
    fact = op.fact(0)
    if fact.content is None:
        return Fact(fact.dtype, shape)
    return Fact(fact.dtype, shape, fact.content.reshape(static(shape)))


def reshape_target(given: Shape | None, target: list[Dim], allowzero: bool, unknown: Dim) -> Shape:
    """The shape that Reshape gives.

    A computed entry that is 0 at run time means "copy the input's size" unless `allowzero`. So an entry that may be 0
    is taken for the size itself only where that makes no difference: it equals the input's size in that place, there
    is no such place, or it divides the number of elements, so that a zero makes both sides empty. (In the last case
    the shapes could differ where two independent sizes are 0 in the same run.)

    Args:
        given: The input's shape.
        target: The content of the second input.
        allowzero: The attribute.
        unknown: The size to use for -1 where it can't be computed.
    """
    size = None if given is None else df.product(given)
    result: list[Dim | None] = []
    for i, dim in enumerate(target):
        copied = None if given is None or i >= len(given) else given[i]
        beyond = given is not None and i >= len(given)
        if dim.value == -1:
            result.append(None)
        elif allowzero or dim.low >= 1 or beyond or (copied is not None and vanishes_with(copied, dim)):
            result.append(dim)
        elif dim.value == 0:
            result.append(copied if copied is not None else Dim.unknown("copied"))
        elif dim.low >= 0 and size is not None and size.exact_div(dim) is not None:
            result.append(dim)
        elif dim.low >= 0 and copied is not None:
            result.append(df.where(dim, dim, copied))
        else:
            result.append(Dim.unknown("target"))
    if result.count(None) > 1:
        raise UnknownShapeError
    others = df.product(d for d in result if d is not None)
    inferred = unknown
    if size is not None and others.value != 0:
        exact = size.exact_div(others)
        inferred = exact if exact is not None else size // others
        sizes = [d for d in result if d is not None]
        if allowzero and exact is not None and given is not None and not _surely_divides(given, sizes):
            inferred = unknown
    return tuple(inferred if d is None else d for d in result)


def vanishes_with(a: Dim, b: Dim) -> bool:
    """Whether it is proven that `a` is 0 in every run in which `b` is."""
    if a.exact_div(b) is not None:
        return True
    outer, inner = as_symbol(a), as_symbol(b)
    if outer is None or outer.op != "broadcast":
        return False
    return set(inner.args if inner is not None and inner.op == "broadcast" else (b,)) <= set(outer.args)


def _surely_divides(given: Shape, others: list[Dim]) -> bool:
    """Whether -1 beside an empty size still means the quotient: what is left after cancelling sizes isn't 0.

    With allowzero ONNX Runtime accepts -1 beside 0 (the standard doesn't) and divides the products of the sizes that
    aren't 0.
    """
    rest = list(given)
    for dim in others:
        if dim in rest:
            rest.remove(dim)
        elif dim.low < 1:
            return False
    return True


@rule("Reshape")
def _reshape(op: Op) -> Result:
    allowzero = bool(op.integer("allowzero", 0))
    given = op.fact(0).shape
    shape_attribute = op.integers("shape")
    if shape_attribute is not None:  # opset 1 to 4
        target = [Dim.of(n) for n in shape_attribute]
    else:
        fact = op.fact(1)
        if fact.content is None:
            if fact.shape is not None and fact.shape[0].value is not None:
                return op.unknowns(fact.shape[0].value)
            return None
        target = list(fact.content.flat)
    return reshaped(op, reshape_target(given, target, allowzero, op.unknown()))


@rule("Flatten")
def _flatten(op: Op) -> Result:
    shape = op.shape(0)
    axis = op.integer("axis", 1)
    axis += len(shape) if axis < 0 else 0
    return reshaped(op, (df.product(shape[:axis]), df.product(shape[axis:])))


@rule("Squeeze")
def _squeeze(op: Op) -> Result:
    shape = op.shape(0)
    axes = op.axes("axes", 1)
    if axes is not None and not axes:
        raise UnknownShapeError  # numpy removes none, ONNX Runtime every axis of length 1
    if axes is None:
        if any(d.value is None and not df.differ(d, ONE) for d in shape):
            raise UnknownShapeError
        return reshaped(op, tuple(d for d in shape if d.value != 1))
    removed = {axis_of(a, len(shape)) for a in axes}
    return reshaped(op, tuple(d for i, d in enumerate(shape) if i not in removed))


@rule("Unsqueeze")
def _unsqueeze(op: Op) -> Result:
    shape = op.shape(0)
    axes = op.axes("axes", 1)
    if axes is None:
        raise UnknownShapeError
    rank = len(shape) + len(axes)
    added = {axis_of(a, rank) for a in axes}
    rest = iter(shape)
    return reshaped(op, tuple(ONE if i in added else next(rest) for i in range(rank)))
