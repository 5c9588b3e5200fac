"""Conditions on integers: comparisons of polynomials joined by and, or, not, simplified by what can be proven.

A condition is a `Literal` (d ≥ 0, d = 0 or d ≠ 0 for a `Dim` d) or a `Group` of conditions (all, or any, of them). The
negation of a literal is a literal, so that nothing else is needed. `Logic` makes them in simplified form: a literal
that follows from another one vanishes from a conjunction, a pair that contradicts makes it false, an alternative that
is contradicted vanishes from a disjunction, (p or q) and (p or not q) is p. What follows from what is proven by the
bounds of the polynomials, and by the ranges of the indices in them: i in [0, rows) makes `i ≥ 0` true and
`rows - 1 - i ≥ 0` too.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Literal as Choice
from typing import TypeAlias

from graphopt.analysis.dims import Dim, Symbol, rank

MAX_PARTS = 24
"""Parts of the largest group; a condition that needs more isn't followed."""


class TooComplexError(Exception):
    """A condition has more parts than are followed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Literal:
    """d ≥ 0 ("ge"), d = 0 ("eq") or d ≠ 0 ("ne")."""

    kind: Choice["ge", "eq", "ne"]
    dim: Dim

    def __repr__(self) -> str:
        return f"{self.dim!r} {({'ge': '>=', 'eq': '==', 'ne': '!='})[self.kind]} 0"


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """All (`conjunction`) or any of `parts`; none at all is true and false."""

    conjunction: bool
    parts: frozenset[Condition]

    def __repr__(self) -> str:
        if not self.parts:
            return "true" if self.conjunction else "false"
        return "(" + (" and " if self.conjunction else " or ").join(sorted(map(repr, self.parts))) + ")"


Condition: TypeAlias = Literal | Group
TRUE = Group(True, frozenset())
FALSE = Group(False, frozenset())


class Logic:
    """Makes conditions; knows the ranges of the index symbols.

    Attributes:
        last: The largest number that an index can be, by its symbol, in all ways in which it is known. The smallest
            is 0.
    """

    def __init__(self) -> None:
        self.last: dict[Symbol, tuple[Dim, ...]] = {}

    # ---- proofs

    def lows(self, dim: Dim) -> Iterator[Dim]:
        """Lower bounds of `dim` over the ranges of the indices in it, with no index where one can be replaced."""
        spans = [tuple(self.last[m[0]]) for m in dim.terms() if len(m) == 1 and m[0] in self.last]
        symbols = [m[0] for m in dim.terms() if len(m) == 1 and m[0] in self.last]
        for lasts in itertools.islice(itertools.product(*spans), 4):
            low = dim
            for symbol, last in zip(symbols, lasts, strict=True):
                factor = dim.terms()[(symbol,)]
                if all(symbol not in m for m in dim.terms() if m != (symbol,)):
                    low = low - Dim({(symbol,): factor}) + (last * factor if factor < 0 else 0)
            yield low

    def nonnegative(self, dim: Dim) -> bool:
        """Whether `dim` ≥ 0 is proven."""
        return dim.low >= 0 or any(low.low >= 0 for low in self.lows(dim))

    def implies(self, a: Literal, b: Literal) -> bool:
        """Whether `b` is proven to hold where `a` does."""
        if a == b:
            return True
        p, q = a.dim, b.dim
        if b.kind == "eq":
            return False
        if b.kind == "ge":
            return (a.kind != "ne" and self.nonnegative(q - p)) or (a.kind == "eq" and self.nonnegative(q + p))
        if a.kind == "ne":
            return False
        apart = self.nonnegative(q - p - 1) or (a.kind == "ge" and self.nonnegative(-q - p - 1))
        if a.kind == "eq":
            apart = apart or any(self.nonnegative(s) for s in (p - q - 1, q + p - 1, -q - p - 1))
        # a: p >= 0 and q >= p + 1, or -q >= p + 1: then q isn't 0.
        return apart

    # ---- making

    def ge(self, dim: Dim) -> Condition:
        """dim ≥ 0."""
        if self.nonnegative(dim):
            return TRUE
        return FALSE if self.nonnegative(-dim - 1) else Literal("ge", dim)

    def eq(self, dim: Dim) -> Condition:
        """dim = 0."""
        return self.negate(self.ne(dim))

    def ne(self, dim: Dim) -> Condition:
        """dim ≠ 0."""
        if dim == 0:
            return FALSE
        if self.nonnegative(dim):
            return TRUE if self.nonnegative(dim - 1) else self.ge(dim - 1)
        if self.nonnegative(-dim):
            return self.ge(-dim - 1)
        lead = max(dim.terms(), key=lambda m: rank(Dim({m: 1})))
        return Literal("ne", -dim if dim.terms()[lead] < 0 else dim)

    def negate(self, condition: Condition) -> Condition:
        """Not `condition`."""
        if isinstance(condition, Group):
            return Group(not condition.conjunction, frozenset(self.negate(p) for p in condition.parts))
        if condition.kind == "ge":
            return self.ge(-condition.dim - 1)
        return Literal("ne" if condition.kind == "eq" else "eq", condition.dim)

    def any_of(self, parts: Iterable[Condition]) -> Condition:
        """Any of `parts`."""
        return self.negate(self.all_of([self.negate(p) for p in parts]))

    def all_of(self, parts: Iterable[Condition]) -> Condition:
        """All of `parts`.

        Raises:
            TooComplexError: it would have more than `MAX_PARTS` parts.
        """
        literals: list[Literal] = []
        choices: list[Group] = []
        pending = list(parts)
        while pending:
            part = pending.pop()
            if isinstance(part, Literal):
                literals.append(part)
            elif part.conjunction:
                pending.extend(part.parts)
            elif not part.parts:
                return FALSE
            elif part not in choices:
                choices.append(part)
            if len(literals) + len(choices) > MAX_PARTS:
                raise TooComplexError
        kept = self._strongest(literals)
        if kept is None:
            return FALSE
        for edge in [lit for lit in kept if lit.kind == "ne"]:
            # p >= 0 and p != 0 is p - 1 >= 0
            beside = next((lit for lit in kept if lit.kind == "ge" and lit.dim in (edge.dim, -edge.dim)), None)
            if beside is not None:
                rest = [lit for lit in kept if lit not in (edge, beside)]
                return self.all_of([*rest, self.ge(beside.dim - 1), *choices])
        return self._with_choices(kept, choices)

    def _strongest(self, literals: list[Literal]) -> list[Literal] | None:
        """`literals` without those that follow from another one; None where two contradict."""
        kept: list[Literal] = []
        for new in sorted(dict.fromkeys(literals), key=repr):
            if any(self.implies(old, new) for old in kept):
                continue
            kept = [old for old in kept if not self.implies(new, old)]
            opposite = self.negate(new)
            if opposite == TRUE or (isinstance(opposite, Literal) and any(self.implies(old, opposite) for old in kept)):
                return None
            kept.append(new)
        return kept

    def _with_choices(self, literals: list[Literal], choices: list[Group]) -> Condition:
        left: list[Group] = []
        for choice in choices:
            if any(self._follows(literals, part) for part in choice.parts):
                continue
            possible = [part for part in choice.parts if not self._contradicts(literals, part)]
            if not possible:
                return FALSE
            if len(possible) == 1:
                return self.all_of([*literals, possible[0], *(c for c in choices if c is not choice)])
            if len(possible) < len(choice.parts):
                choice = Group(False, frozenset(possible))
            if choice not in left:
                left.append(choice)
        for one in left:
            for other in left:
                if one is other:
                    continue
                if one.parts < other.parts:
                    return self.all_of([*literals, *(c for c in left if c is not other)])
                (mine, its) = one.parts - other.parts, other.parts - one.parts
                if len(mine) == len(its) == 1 and self.negate(next(iter(mine))) == next(iter(its)):
                    rest = self.any_of(one.parts & other.parts)
                    return self.all_of([*literals, rest, *(c for c in left if c is not one and c is not other)])
        found: frozenset[Condition] = frozenset([*literals, *left])
        return next(iter(found)) if len(found) == 1 else Group(True, found)

    def _follows(self, literals: list[Literal], part: Condition) -> bool:
        """Whether `part` holds where all `literals` do."""
        if isinstance(part, Literal):
            return any(self.implies(literal, part) for literal in literals)
        follow = (self._follows(literals, p) for p in part.parts)
        return all(follow) if part.conjunction else any(follow)

    def _contradicts(self, literals: list[Literal], part: Condition) -> bool:
        """Whether `part` doesn't hold where all `literals` do."""
        return self._follows(literals, self.negate(part))
