"""What an element of a tensor can be: an integer or float polynomial in indices, sizes and elements read from others,
one for each of several conditions.

Numbers that a run computes from constants alone are rounded as it would round them (-3.4e38 twice is -inf in float32);
everything else is real arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.analysis.conditions import FALSE, TRUE, Condition, Group, Literal, Logic
from graphopt.analysis.dims import Dim, Monomial, Symbol

MAX_CASES = 16
"""Leaves of the largest element that is followed."""


class OpaqueError(Exception):
    """What an element is isn't understood; the message says why."""


@dataclasses.dataclass(frozen=True, slots=True)
class Poly:
    """A float polynomial: `constant` + the products of `terms` with their coefficients."""

    constant: float
    terms: frozenset[tuple[Monomial, float]] = frozenset()

    @staticmethod
    def of(constant: float, terms: dict[Monomial, float] | None = None) -> Poly:
        """Without vanishing terms; -0 is 0."""
        return Poly(constant + 0.0, frozenset((m, f) for m, f in (terms or {}).items() if f))

    @staticmethod
    def from_dim(dim: Dim) -> Poly:
        """The integer polynomial `dim` as floats."""
        terms = {m: float(f) for m, f in dim.terms().items() if m}
        return Poly.of(float(dim.terms().get((), 0)), terms)

    def plus(self, other: Poly, dtype: ir.DataType | None, sign: float = 1.0) -> Poly:
        """self + sign · other."""
        constant = rounded(self.constant + sign * other.constant, dtype)
        overflows = not math.isfinite(constant) and math.isfinite(self.constant) and math.isfinite(other.constant)
        if overflows and (self.terms or other.terms):
            raise OpaqueError("its numbers overflow")
        terms = dict(self.terms)
        for monomial, factor in other.terms:
            terms[monomial] = terms.get(monomial, 0.0) + sign * factor
        return Poly.of(constant, terms)

    def times(self, other: Poly, dtype: ir.DataType | None) -> Poly:
        """self · other."""
        if (self.terms or other.terms) and not (math.isfinite(self.constant) and math.isfinite(other.constant)):
            raise OpaqueError("an infinity is multiplied by what isn't constant")
        terms: dict[Monomial, float] = {}
        for left, a in [((), self.constant), *self.terms]:
            for right, b in [((), other.constant), *other.terms]:
                product: Monomial = tuple(sorted(left + right))
                terms[product] = terms.get(product, 0.0) + a * b
        return Poly.of(rounded(terms.pop(()), dtype), terms)

    def integer(self) -> Dim | None:
        """As an integer polynomial, where all its coefficients are integers."""
        numbers: dict[Monomial, float] = dict(self.terms)
        if self.constant:
            numbers[()] = self.constant
        if not all(math.isfinite(f) and f == int(f) for f in numbers.values()):
            return None
        return Dim({m: int(f) for m, f in numbers.items()})


Leaf: TypeAlias = Dim | Poly


@dataclasses.dataclass(frozen=True, slots=True)
class Cases:
    """A number: the leaf whose condition holds; exactly one does."""

    dtype: ir.DataType | None
    items: tuple[tuple[Condition, Leaf], ...]

    @property
    def leaf(self) -> Leaf | None:
        """The leaf, where there is but one."""
        return self.items[0][1] if len(self.items) == 1 else None


Element: TypeAlias = Condition | Cases
"""A condition for a boolean tensor, else numbers."""


def rounded(number: float, dtype: ir.DataType | None) -> float:
    """`number` in the precision of `dtype` (as it is where that is no float)."""
    if dtype is None or not dtype.is_floating_point() or dtype == ir.DataType.DOUBLE:
        return number
    with np.errstate(all="ignore"):
        return float(np.float64(number).astype(dtype.numpy()))


def is_condition(element: Element) -> bool:
    """Whether it is the element of a boolean tensor."""
    return isinstance(element, Literal | Group)


class Numbers:
    """Arithmetic of elements."""

    def __init__(self, logic: Logic) -> None:
        self.logic = logic

    def cases(self, dtype: ir.DataType | None, items: Iterable[tuple[Condition, Leaf]]) -> Cases:
        """Cases of which equal leaves are merged and impossible ones dropped."""
        guards: dict[Leaf, list[Condition]] = {}
        for guard, leaf in items:
            if guard != FALSE:
                guards.setdefault(_where_equal(guard, leaf), []).append(guard)
        if len(guards) > MAX_CASES:
            raise OpaqueError("it takes too many different values")
        if len(guards) == 1:
            return Cases(dtype, ((TRUE, next(iter(guards))),))
        joined = [(g[0] if len(g) == 1 else self.logic.any_of(g), leaf) for leaf, g in guards.items()]
        return Cases(dtype, tuple(joined))

    def constant(self, dtype: ir.DataType | None, leaf: Leaf) -> Cases:
        """The same leaf whatever holds."""
        return Cases(dtype, ((TRUE, leaf),))

    def number(self, element: Element, dtype: ir.DataType | None) -> Cases:
        """`element` cast to the number type `dtype`."""
        real = dtype is not None and dtype.is_floating_point()
        if isinstance(element, Literal | Group):
            one, zero = (Poly(1.0), Poly(0.0)) if real else (Dim.of(1), Dim.of(0))
            return self.cases(dtype, [(element, one), (self.logic.negate(element), zero)])
        if real:
            leaves = [(g, _as_float(leaf, dtype)) for g, leaf in element.items]
            return self.cases(dtype, leaves)
        found: list[tuple[Condition, Leaf]] = []
        for guard, leaf in element.items:
            if isinstance(leaf, Poly):
                whole = leaf.integer()
                if whole is None:
                    raise OpaqueError("a float that may be no integer is cast to one")
                leaf = whole
            found.append((guard, leaf))
        return self.cases(dtype, found)

    def condition(self, element: Element) -> Condition:
        """`element` cast to a boolean: whether it isn't 0."""
        if isinstance(element, Literal | Group):
            return element
        return self.compare(element, self.constant(element.dtype, Dim.of(0)), "ne")

    def compare(self, a: Element, b: Element, kind: str) -> Condition:
        """`a` kind `b`, with kind "eq", "ne", "ge" or "gt"."""
        logic = self.logic
        if isinstance(a, Literal | Group) and isinstance(b, Literal | Group):
            if kind not in ("eq", "ne"):
                raise OpaqueError("booleans are put in order")
            same = logic.any_of([logic.all_of([a, b]), logic.all_of([logic.negate(a), logic.negate(b)])])
            return same if kind == "eq" else logic.negate(same)
        if isinstance(a, Literal | Group) or isinstance(b, Literal | Group):
            raise OpaqueError("a boolean is compared with a number")
        found = []
        for guard, x in a.items:
            for other, y in b.items:
                both = logic.all_of([guard, other])
                if both != FALSE:
                    found.append(logic.all_of([both, self._compare(x, y, kind)]))
        return logic.any_of(found)

    def _compare(self, x: Leaf, y: Leaf, kind: str) -> Condition:
        if isinstance(x, Poly) or isinstance(y, Poly):
            p, q = _poly(x), _poly(y)
            if not (p.terms or q.terms) or not (math.isfinite(p.constant) and math.isfinite(q.constant)):
                return TRUE if _holds(p.constant, q.constant, kind) else FALSE
            difference = p.plus(q, None, -1.0).integer()
            if difference is None:
                raise OpaqueError("floats that aren't constant are compared")
        else:
            difference = x - y
        match kind:
            case "eq":
                return self.logic.eq(difference)
            case "ne":
                return self.logic.ne(difference)
            case "ge":
                return self.logic.ge(difference)
        return self.logic.ge(difference - 1)

    def choose(self, condition: Condition, a: Element, b: Element) -> Element:
        """`a` where `condition` holds, else `b`."""
        logic = self.logic
        otherwise = logic.negate(condition)
        if condition == TRUE:
            return a
        if condition == FALSE:
            return b
        if isinstance(a, Literal | Group) and isinstance(b, Literal | Group):
            return logic.any_of([logic.all_of([condition, a]), logic.all_of([otherwise, b])])
        if isinstance(a, Literal | Group) or isinstance(b, Literal | Group):
            raise OpaqueError("a boolean stands beside a number")
        items = [(logic.all_of([condition, g]), leaf) for g, leaf in a.items]
        items += [(logic.all_of([otherwise, g]), leaf) for g, leaf in b.items]
        return self.cases(a.dtype, items)

    def combine(self, elements: Sequence[Element], function: Callable[[Leaf, Leaf], Leaf]) -> Cases:
        """`function` of numbers, from left to right."""
        result = elements[0]
        if isinstance(result, Literal | Group):
            raise OpaqueError("arithmetic on booleans")
        for element in elements[1:]:
            if isinstance(element, Literal | Group):
                raise OpaqueError("arithmetic on booleans")
            items = []
            for guard, x in result.items:
                for other, y in element.items:
                    both = self.logic.all_of([guard, other])
                    if both != FALSE:
                        items.append((both, function(x, y)))
            result = self.cases(result.dtype, items)
        return result


def _where_equal(guard: Condition, leaf: Leaf) -> Leaf:
    """`leaf` with the number in place of each symbol that `guard` says equals one: 1 - m where m = 1 is 0."""
    for part in guard.parts if isinstance(guard, Group) and guard.conjunction else [guard]:
        if not isinstance(part, Literal) or part.kind != "eq":
            continue
        terms = dict(part.dim.terms())
        number = -terms.pop((), 0)
        if len(terms) == 1 and list(terms.values()) == [1] and len(monomial := next(iter(terms))) == 1:
            leaf = _with_number(leaf, monomial[0], number)
    return leaf


def _with_number(leaf: Leaf, symbol: Symbol, number: int) -> Leaf:
    if isinstance(leaf, Dim):
        for monomial, factor in list(leaf.terms().items()):
            if monomial == (symbol,):
                leaf = leaf - Dim({monomial: factor}) + factor * number
        return leaf
    terms = dict(leaf.terms)
    factor_of = terms.pop((symbol,), None)
    return leaf if factor_of is None else Poly.of(leaf.constant + factor_of * number, terms)


def _holds(a: float, b: float, kind: str) -> bool:
    return {"eq": a == b, "ne": a != b, "ge": a >= b, "gt": a > b}[kind]


def _poly(leaf: Leaf) -> Poly:
    return leaf if isinstance(leaf, Poly) else Poly.from_dim(leaf)


def _as_float(leaf: Leaf, dtype: ir.DataType | None) -> Poly:
    poly = _poly(leaf)
    return Poly(rounded(poly.constant, dtype), poly.terms)
