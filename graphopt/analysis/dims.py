"""Symbolic integers: sizes of tensors, and what shape arithmetic computes from them.

A `Dim` is a polynomial with integer coefficients over `Symbol`s, kept in canonical form, so that `a == b` is a
*proof* that both are the same number in every run; `a != b` proves nothing (use `differ`). What a polynomial can't
express is a symbol of its own, interned by its operands: floor division, minimum, maximum, broadcasting, selection and
comparison of the same operands are the same symbol, and an unknown number is a symbol that equals only itself.

Why not sympy, which onnx_ir uses for its symbolic dimensions: a product or quotient of two sums takes it 1 ms and this
module 10 to 60 µs, and its simplifications are about real and complex numbers, not about sizes.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Mapping

_order = itertools.count()
_interned: weakref.WeakValueDictionary[tuple[object, ...], Symbol] = weakref.WeakValueDictionary()

MAX_TERMS = 32
MAX_DEGREE = 12
MAX_DEPTH = 24
"""Beyond these a result becomes an opaque symbol, so that hostile graphs can't make polynomials explode."""

Bound = int | float
"""An integer, or an infinity."""


class Symbol:
    """An opaque integer: a free one (`op` is "" and `name` says what it is), or an operation on `args`.

    Attributes:
        op: "", "floordiv", "min", "max", "broadcast", "where", "equal", "less" or "mul" (an unexpanded product).
        args: The operands of `op`.
        low: A proven lower bound, inclusive; -inf where there is none.
        high: A proven upper bound, inclusive; inf where there is none.
    """

    __slots__ = ("__weakref__", "args", "depth", "high", "low", "name", "op", "order")

    def __init__(self, op: str, args: tuple[Dim, ...], name: str, low: Bound, high: Bound) -> None:
        self.op, self.args, self.name, self.low, self.high = op, args, name, low, high
        self.order = next(_order)
        self.depth = 1 + max((a.depth for a in args), default=-1)

    def __lt__(self, other: Symbol) -> bool:
        return self.order < other.order

    def __repr__(self) -> str:
        if not self.op:
            return self.name
        if self.depth > 4:
            return f"{self.op}(...)"
        return f"{self.op}({', '.join(map(repr, self.args))})"


Monomial = tuple[Symbol, ...]
"""Symbols of a product in their order, repeated for powers; empty for the constant term."""


class Dim:
    """An integer polynomial; immutable and hashable, equal to another `Dim` or `int` only where proven so."""

    __slots__ = ("_bounds", "_hash", "_terms", "depth")

    def __init__(self, terms: dict[Monomial, int]) -> None:
        self._terms = terms
        self._hash: int | None = None
        self._bounds: tuple[Bound, Bound] | None = None
        self.depth: int = max((s.depth for m in terms for s in m), default=0)

    # ---- making

    @staticmethod
    def of(value: int | Dim) -> Dim:
        """The constant `value` (a `Dim` is returned as it is)."""
        if isinstance(value, Dim):
            return value
        known = _CONSTANTS.get(value)
        if known is not None:
            return known
        return Dim({(): int(value)} if value else {})

    @staticmethod
    def symbol(name: str, low: Bound = 0, high: Bound = math.inf) -> Dim:
        """The free integer called `name`: the same symbol each time for the same name and bounds."""
        return operation("", (), name, low, high)

    @staticmethod
    def unknown(name: str = "?", low: Bound = 0, high: Bound = math.inf) -> Dim:
        """An integer of which nothing but its bounds is known; equals nothing but itself."""
        return Dim({(Symbol("", (), name, low, high),): 1})

    # ---- looking

    @property
    def value(self) -> int | None:
        """The number where it is constant, else None."""
        if not self._terms:
            return 0
        if len(self._terms) == 1 and () in self._terms:
            return self._terms[()]
        return None

    @property
    def low(self) -> Bound:
        """A proven lower bound, inclusive (-inf where there is none)."""
        return self.bounds[0]

    @property
    def high(self) -> Bound:
        """A proven upper bound, inclusive (inf where there is none)."""
        return self.bounds[1]

    @property
    def bounds(self) -> tuple[Bound, Bound]:
        """`(low, high)`, by interval arithmetic."""
        if self._bounds is None:
            low: Bound = 0
            high: Bound = 0
            for monomial, factor in self._terms.items():
                span: tuple[Bound, Bound] = (factor, factor)
                for symbol in monomial:
                    span = _interval_product(span, (symbol.low, symbol.high))
                low, high = low + span[0], high + span[1]
            self._bounds = (low, high)
        return self._bounds

    def terms(self) -> Mapping[Monomial, int]:
        """The polynomial: its coefficient of each product of symbols. Don't write into it."""
        return self._terms

    def symbols(self) -> set[Symbol]:
        """Every symbol it depends on, those inside operations too."""
        found: set[Symbol] = set()
        stack: list[Dim] = [self]
        while stack:
            for monomial in stack.pop()._terms:
                for symbol in monomial:
                    if symbol not in found:
                        found.add(symbol)
                        stack.extend(symbol.args)
        return found

    def evaluate(self, lookup: Callable[[Symbol], int | None]) -> int | None:
        """The number for given numbers of the free symbols; None where one that matters isn't known.

        Args:
            lookup: The number of a free symbol, or None. Asked for free symbols (`op` empty) only.
        """
        total = 0
        for monomial, factor in self._terms.items():
            product = factor
            for symbol in monomial:
                number = _evaluate_symbol(symbol, lookup)
                if number is None:
                    return None
                product *= number
            total += product
        return total

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if isinstance(other, Dim):
            return self._terms == other._terms
        if isinstance(other, int):
            return self.value == other
        return NotImplemented

    def __hash__(self) -> int:
        if self._hash is None:
            value = self.value
            self._hash = hash(value) if value is not None else hash(frozenset(self._terms.items()))
        return self._hash

    def __repr__(self) -> str:
        if not self._terms:
            return "0"
        parts = []
        for monomial in sorted(self._terms, key=lambda m: (-len(m), m)):
            factor, product = self._terms[monomial], "*".join(map(repr, monomial))
            text = str(factor) if not product else product if factor == 1 else f"{factor}*{product}"
            parts.append(text)
        return " + ".join(parts)

    # ---- ring operations

    def __add__(self, other: Dim | int) -> Dim:
        other = Dim.of(other)
        if not other._terms:
            return self
        if not self._terms:
            return other
        terms = dict(self._terms)
        for monomial, factor in other._terms.items():
            total = terms.get(monomial, 0) + factor
            if total:
                terms[monomial] = total
            else:
                del terms[monomial]
        if len(terms) > MAX_TERMS:
            return Dim.unknown("sum", self.low + other.low, self.high + other.high)
        return Dim(terms)

    __radd__ = __add__

    def __neg__(self) -> Dim:
        return Dim({monomial: -factor for monomial, factor in self._terms.items()})

    def __sub__(self, other: Dim | int) -> Dim:
        return self + -Dim.of(other)

    def __rsub__(self, other: int) -> Dim:
        return Dim.of(other) + -self

    def __mul__(self, other: Dim | int) -> Dim:
        other = Dim.of(other)
        if self.value == 1:
            return other
        if other.value == 1:
            return self
        terms: dict[Monomial, int] = {}
        for left, a in self._terms.items():
            for right, b in other._terms.items():
                monomial = tuple(sorted(left + right)) if left and right else left or right
                terms[monomial] = terms.get(monomial, 0) + a * b
        terms = {m: f for m, f in terms.items() if f}
        if len(terms) > MAX_TERMS or any(len(m) > MAX_DEGREE for m in terms):
            low, high = _interval_product(self.bounds, other.bounds)
            return operation("mul", tuple(sorted((self, other), key=rank)), "", low, high)
        return Dim(terms)

    __rmul__ = __mul__

    def exact_div(self, divisor: Dim | int) -> Dim | None:
        """The quotient polynomial where `divisor` divides without remainder, else None.

        The quotient is right wherever `divisor` isn't 0 at run time.
        """
        divisor = Dim.of(divisor)
        if not divisor._terms:
            return None
        lead = max(divisor._terms, key=_monomial_rank)
        remainder, quotient = self, Dim.of(0)
        for _ in range(MAX_TERMS + 1):
            if not remainder._terms:
                return quotient
            head = max(remainder._terms, key=_monomial_rank)
            rest = _divide_monomial(head, lead)
            if rest is None or remainder._terms[head] % divisor._terms[lead]:
                return None
            step = Dim({rest: remainder._terms[head] // divisor._terms[lead]})
            quotient, remainder = quotient + step, remainder - step * divisor
        return None

    def __floordiv__(self, divisor: Dim | int) -> Dim:
        """Division rounded towards minus infinity; unspecified where `divisor` is 0 at run time."""
        divisor = Dim.of(divisor)
        exact = self.exact_div(divisor)
        if exact is not None:
            return exact
        number = divisor.value
        if number is None:
            nonnegative = self.low >= 0 and divisor.low >= 0
            return operation("floordiv", (self, divisor), "", 0 if nonnegative else -math.inf, math.inf)
        if number == 0:
            return Dim.unknown("division by zero", -math.inf)
        if number < 0:
            return (-self) // -number
        return _floordiv_constant(self, number)

    def __mod__(self, divisor: Dim | int) -> Dim:
        """The remainder with the sign of `divisor`."""
        return self - (self // divisor) * divisor


def as_symbol(dim: Dim) -> Symbol | None:
    """The symbol that `dim` consists of, where it is just one."""
    if len(dim._terms) == 1:
        (monomial, factor), *_ = dim._terms.items()
        if factor == 1 and len(monomial) == 1:
            return monomial[0]
    return None


def operation(op: str, args: tuple[Dim, ...], name: str, low: Bound, high: Bound) -> Dim:
    """The interned symbol of `op` on `args` (a free symbol called `name` where `op` is empty), as a `Dim`."""
    key = (op, args, name, low, high)
    symbol = _interned.get(key)
    if symbol is None:
        symbol = Symbol(op, args, name, low, high)
        if symbol.depth > MAX_DEPTH:
            return Dim.unknown(op, low, high)
        _interned[key] = symbol
    if low == high:
        return Dim.of(int(low))
    return Dim({(symbol,): 1})


def rank(dim: Dim) -> list[tuple[tuple[int, ...], int]]:
    """An order of operands that depends on nothing but how they were made."""
    return sorted((tuple(s.order for s in m), f) for m, f in dim._terms.items())


def _monomial_rank(monomial: Monomial) -> tuple[int, tuple[int, ...]]:
    """Graded lexicographic order, which multiplication keeps (long division needs that)."""
    return len(monomial), tuple(-s.order for s in monomial)


def _divide_monomial(a: Monomial, b: Monomial) -> Monomial | None:
    rest = list(a)
    for symbol in b:
        if symbol not in rest:
            return None
        rest.remove(symbol)
    return tuple(rest)


def _interval_product(a: tuple[Bound, Bound], b: tuple[Bound, Bound]) -> tuple[Bound, Bound]:
    corners = [x * y if x and y else 0 for x in a for y in b]
    return min(corners), max(corners)


def _floordiv_constant(a: Dim, n: int) -> Dim:
    """`a // n` for n > 1: whole multiples come out, common factors cancel, nested divisions merge."""
    whole = Dim({m: f // n for m, f in a._terms.items() if f // n})
    rest = Dim({m: f % n for m, f in a._terms.items() if f % n})
    offset = rest._terms.get((), 0)
    variable = {m: f for m, f in rest._terms.items() if m}
    if rest.low >= 0 and rest.high < n:
        return whole
    common = math.gcd(n, *variable.values())
    if common > 1:
        # floor((g r + k) / (g n)) = floor((r + floor(k / g)) / n)
        reduced = Dim({m: f // common for m, f in variable.items()}) + offset // common
        return whole + reduced // (n // common)
    inner = as_symbol(Dim(variable))
    if inner is not None and inner.op == "floordiv" and (m := inner.args[1].value) is not None and m > 0:
        # floor((floor(x / m) + k) / n) = floor((x + k m) / (m n))
        return whole + (inner.args[0] + offset * m) // (m * n)
    low = rest.low // n if rest.low > -math.inf else -math.inf
    high = rest.high // n if rest.high < math.inf else math.inf
    return whole + operation("floordiv", (rest, Dim.of(n)), "", low, high)


def _evaluate_symbol(symbol: Symbol, lookup: Callable[[Symbol], int | None]) -> int | None:
    if not symbol.op:
        return lookup(symbol)
    numbers = [a.evaluate(lookup) for a in symbol.args]
    if symbol.op == "where":
        condition, a, b = numbers
        return None if condition is None else a if condition else b
    known = [n for n in numbers if n is not None]
    if len(known) != len(numbers):
        return None
    match symbol.op:
        case "floordiv":
            return known[0] // known[1] if known[1] else None
        case "min":
            return min(known)
        case "max":
            return max(known)
        case "equal":
            return int(known[0] == known[1])
        case "less":
            return int(known[0] < known[1])
        case "mul":
            return known[0] * known[1]
        case _:
            return next((n for n in known if n != 1), 1)


_CONSTANTS: dict[int, Dim] = {}
_CONSTANTS.update({n: Dim({(): n} if n else {}) for n in range(-16, 1025)})
ZERO, ONE = Dim.of(0), Dim.of(1)
