"""Functions of symbolic integers beyond + - * //: minimum, maximum, broadcasting, comparison, selection.

Each returns a polynomial where bounds or equality decide, else the interned symbol of the operation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from graphopt.analysis.dims import ONE, ZERO, Dim, Symbol, as_symbol, operation, rank


def ceil_div(a: Dim | int, b: Dim | int) -> Dim:
    """Division rounded towards infinity."""
    divisor = Dim.of(b)
    if divisor.value is not None and divisor.value > 0:  # the form that other floor divisions have
        return (divisor - 1 + a) // divisor
    return -(-Dim.of(a) // divisor)


def differ(a: Dim, b: Dim) -> bool:
    """Whether it is proven that `a` and `b` are never the same number."""
    low, high = (a - b).bounds
    return low > 0 or high < 0


def minimum(a: Dim, b: Dim) -> Dim:
    """The smaller of the two."""
    low, high = (a - b).bounds
    if high <= 0:
        return a
    if low >= 0:
        return b
    return operation("min", tuple(sorted((a, b), key=rank)), "", min(a.low, b.low), min(a.high, b.high))


def maximum(a: Dim, b: Dim) -> Dim:
    """The larger of the two."""
    low, high = (a - b).bounds
    if low >= 0:
        return a
    if high <= 0:
        return b
    return operation("max", tuple(sorted((a, b), key=rank)), "", max(a.low, b.low), max(a.high, b.high))


def broadcast(a: Dim, b: Dim) -> Dim:
    """The size that two broadcast dimensions give in every run in which they fit: the one that isn't 1."""
    if a == b or b.value == 1:
        return a
    if a.value == 1:
        return b
    # Apart from 1 the sizes must agree, so one that is proven to be another number than 1 is the result.
    if a.value is not None or differ(a, ONE):
        return a
    if b.value is not None or differ(b, ONE):
        return b
    parts: dict[Dim, None] = {}
    for dim in (a, b):
        symbol = as_symbol(dim)
        parts.update(dict.fromkeys(symbol.args if symbol is not None and symbol.op == "broadcast" else (dim,)))
    # A table of positions cut to the length of a sequence: where it is shorter than that, the two don't fit.
    parts = {part: None for part in parts if not _cut_to_one_of(part, parts)}
    if len(parts) == 1:
        return next(iter(parts))
    low = 0 if any(p.low < 1 for p in parts) else max(p.low for p in parts)
    return operation("broadcast", tuple(sorted(parts, key=rank)), "", low, max(p.high for p in parts))


def _cut_to_one_of(dim: Dim, parts: Iterable[Dim]) -> bool:
    """Whether `dim` is the smaller of one of `parts` and a number above 1."""
    symbol = as_symbol(dim)
    if symbol is None or symbol.op != "min":
        return False
    numbers = [arg.value for arg in symbol.args if arg.value is not None]
    others = [arg for arg in symbol.args if arg.value is None]
    return len(numbers) == 1 and numbers[0] > 1 and len(others) == 1 and others[0] in parts


def equal(a: Dim, b: Dim) -> Dim:
    """1 where `a` and `b` are the same number, else 0."""
    if a == b:
        return ONE
    if differ(a, b):
        return ZERO
    return operation("equal", tuple(sorted((a, b), key=rank)), "", 0, 1)


def less(a: Dim, b: Dim) -> Dim:
    """1 where `a` < `b`, else 0."""
    low, high = (a - b).bounds
    if high < 0:
        return ONE
    if low >= 0:
        return ZERO
    return operation("less", (a, b), "", 0, 1)


def where(condition: Dim, a: Dim, b: Dim) -> Dim:
    """`a` where `condition` isn't 0, else `b`."""
    if a == b or differ(condition, ZERO):
        return a
    if condition.value == 0:
        return b
    return operation("where", (condition, a, b), "", min(a.low, b.low), max(a.high, b.high))


def product(dims: Iterable[Dim]) -> Dim:
    """The product of all (1 for none)."""
    result = ONE
    for dim in dims:
        result = result * dim
    return result


def known(dim: Dim, nonnegative: Sequence[Dim]) -> Dim:
    """`dim` with the minima, maxima and broadcasts in it decided that are once all of `nonnegative` are ≥ 0."""
    if not any(symbol.op in ("min", "max", "broadcast") for symbol in dim.symbols()):
        return dim
    result = ZERO
    for monomial, factor in dim.terms().items():
        term = Dim.of(factor)
        for symbol in monomial:
            term = term * _known_symbol(symbol, nonnegative)
        result = result + term
    return result


def _known_symbol(symbol: Symbol, nonnegative: Sequence[Dim]) -> Dim:
    if symbol.op not in ("min", "max", "broadcast"):
        return Dim({(symbol,): 1})
    args = [known(arg, nonnegative) for arg in symbol.args]
    result = args[0]
    for arg in args[1:]:
        if symbol.op == "broadcast":
            result = broadcast(result, arg)
            continue
        first, second = (result, arg) if symbol.op == "min" else (arg, result)
        if follows(second - first, nonnegative):
            continue
        if follows(first - second, nonnegative):
            result = arg
        else:
            result = minimum(result, arg) if symbol.op == "min" else maximum(result, arg)
    return result


def follows(dim: Dim, nonnegative: Sequence[Dim]) -> bool:
    """Whether `dim` ≥ 0 is proven once all of `nonnegative` are."""
    return dim.low >= 0 or any((dim - other).low >= 0 for other in nonnegative)
