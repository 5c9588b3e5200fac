"""What an attention mask is: causal, a window, padding, a bias, as functions of batch, head, query row and key column.

    allowed(b, h, i, j) = j ≤ i + offset  and  i + offset - j < window  and  P[b, j + shift] ≠ 0  and  other
    value(b, h, i, j)   = bias(b, h, i, j) where allowed, else the masked value (or masked value + bias)

The form is found by evaluating the mask at symbolic indices (`graphopt.analysis.elements`), not by matching what an
exporter wrote. Nothing is guessed: what isn't understood is `other`, or no form at all, with the node and the reason.
"""

from __future__ import annotations

import dataclasses
import math

import onnx_ir as ir

from graphopt.analysis import element_arithmetic, element_moves  # noqa: F401  (they register the rules)
from graphopt.analysis.conditions import FALSE, Condition, Group, Literal, TooComplexError
from graphopt.analysis.dim_functions import known
from graphopt.analysis.dims import Dim, Symbol, as_symbol, rank
from graphopt.analysis.elements import Assumption, Binary, Elements, Read, SameSize
from graphopt.analysis.leaves import Cases, Element, OpaqueError, Poly
from graphopt.analysis.mask_forms import MaskForm, NoForm
from graphopt.analysis.score_biases import added, slopes
from graphopt.analysis.shapes import Shape, ShapeFacts

__all__ = ["MaskForm", "Masks", "NoForm"]

MASKED_BELOW = -1e3
"""An additive constant this low masks; a higher one is a bias. (exporters write -1e4 and lower, Swin's windows -100)"""


class Masks:
    """The forms of the masks of one model; each is found once."""

    def __init__(self, facts: ShapeFacts) -> None:
        self.elements = Elements(facts)
        self._facts = facts
        self._known: dict[tuple[ir.Value, Dim | None, Dim | None], MaskForm | NoForm] = {}

    def form(self, value: ir.Value, rows: Dim | None = None, columns: Dim | None = None) -> MaskForm | NoForm:
        """The form of the mask `value` of rank 0 to 4, which broadcasts to [B, H, S, T].

        Args:
            value: A boolean or float tensor.
            rows: S, where the attention tells it; else the size of the axis of the mask.
            columns: T, likewise.
        """
        key = (value, rows, columns)
        if key not in self._known:
            self._known[key] = _Site(self.elements, self._facts, value, rows, columns).form()
        return self._known[key]


class _Site:
    """The search for the form of one mask."""

    def __init__(
        self, elements: Elements, facts: ShapeFacts, value: ir.Value, rows: Dim | None, columns: Dim | None
    ) -> None:
        self.elements, self.facts, self.value = elements, facts, value
        self.wanted = (rows, columns)

    def form(self) -> MaskForm | NoForm:
        shape = self.facts.shape(self.value)
        if shape is None or len(shape) > 4:
            return NoForm(self.value, "the rank of the mask isn't known" if shape is None else "it has over four axes")
        dtype = self.facts.dtype(self.value)
        if dtype is None or not (dtype == ir.DataType.BOOL or dtype.is_floating_point()):
            return NoForm(self.value, "it is neither boolean nor float")
        self.assumed: set[Assumption] = set()
        self.shape = shape
        sizes = self._sizes(shape)
        # A mask without elements is of any form.
        self.true = [size - 1 for ways in sizes for size in ways] + self._within(shape)
        b, h, i, j = (self.elements.index(name, *ways) for name, ways in zip("bhij", sizes, strict=True))
        self.axes = (b, h, i, j)
        self.rows, self.columns = sizes[2][-1], sizes[3][-1]
        indices = tuple(
            Dim.of(0) if size == 1 else index for size, index in zip(shape, self.axes[4 - len(shape) :], strict=True)
        )
        element, assumed = self.elements.element(self.value, indices)
        self.assumed |= assumed
        try:
            if not isinstance(element, Cases):
                return self._made(element, element, (), None)
            return self._additive(element)
        except (OpaqueError, TooComplexError) as error:
            return NoForm(self.value, str(error) or "its conditions are too many")

    def _sizes(self, shape: Shape) -> list[tuple[Dim, ...]]:
        """The size of each axis, and the one that it is said to have where that isn't provably the same."""
        sizes: list[tuple[Dim, ...]] = [(Dim.of(1),)] * (4 - len(shape))
        sizes += [(self._one_of(size),) for size in shape]
        for axis, wanted in zip((2, 3), self.wanted, strict=True):
            size = sizes[axis][0]
            if wanted is None or size == wanted:
                continue
            if size != 1 and size.low < 2:
                self.assumed.add(SameSize(size, wanted))
            sizes[axis] = (wanted,) if size == 1 else (size, wanted)
        return sizes

    def _within(self, shape: Shape) -> list[Dim]:
        """What holds in any run in which the mask broadcasts: columns that are the first T of a longer constant."""
        wanted = self.wanted[1]
        symbol = as_symbol(shape[-1]) if shape else None
        if wanted is None or symbol is None or symbol.op != "min" or wanted not in symbol.args:
            return []
        others = [arg for arg in symbol.args if arg != wanted]
        # min(c, T) is T or 1; c is greater than 1: so T isn't greater than c.
        return [other - wanted for other in others] if all(other.low >= 2 for other in others) else []

    def _one_of(self, size: Dim) -> Dim:
        """`size`, or of sizes that broadcast against each other one: that which says most of how it came about."""
        parts = _broadcast_parts(size)
        if len(parts) > 1:
            self.assumed.add(SameSize(size, size))
        return max(parts, key=lambda dim: len(dim.terms()))

    # ---- additive masks

    def _additive(self, element: Cases) -> MaskForm:
        masked: list[tuple[Condition, Poly]] = []
        free: list[tuple[Condition, Poly]] = []
        for guard, leaf in element.items:
            assert isinstance(leaf, Poly)
            if math.isnan(leaf.constant):
                raise OpaqueError("it may hold NaN")
            (masked if leaf.constant <= MASKED_BELOW else free).append((guard, leaf))
        logic = self.elements.logic
        allowed = logic.negate(logic.any_of([g for g, _ in masked]))
        if allowed == FALSE or not free:
            raise OpaqueError("it masks everything")
        biases = {leaf for _, leaf in free}
        shared = {leaf.terms for leaf in biases}
        if any(leaf.terms and leaf.terms not in shared for _, leaf in masked):
            raise OpaqueError("whether it masks depends on what isn't followed")
        values = tuple(sorted({leaf.constant for _, leaf in masked}, reverse=True))
        return self._made(allowed, element, values, next(iter(biases)) if len(biases) == 1 else None)

    def _made(self, allowed: Condition, element: Element, values: tuple[float, ...], bias: Poly | None) -> MaskForm:
        boolean = not isinstance(element, Cases)
        biased = not boolean and (bias is None or bias != Poly(0.0))
        form = MaskForm(
            self.value, self.axes, self.rows, self.columns, boolean, allowed, element, biased=biased,
            masked_value=values[0] if values else None, masked_values=values,
            alibi=slopes(self.elements, self.axes, bias) if biased and bias is not None else None,
            bias=added(self.elements, self.value, self.axes[4 - len(self.shape) :], bias) if biased else None,
            obstacles=tuple(self._obstacles(allowed, bias)),
        )  # fmt: skip
        form = self._conditions(form, allowed)
        return dataclasses.replace(form, assumptions=self._needed())

    def _obstacles(self, allowed: Condition, bias: Poly | None) -> list[str]:
        symbols = _symbols(allowed) | {s for m, _ in (bias.terms if bias is not None else ()) for s in m}
        found = []
        for symbol in sorted(symbols):
            read = self.elements.reads.get(symbol)
            why = None if read is None else self.elements.obstacles.get(read.value)
            if read is not None and why is not None:
                found.append(f"{read.value.name!r}: {why}")
        return found

    # ---- conditions

    def _conditions(self, form: MaskForm, allowed: Condition) -> MaskForm:
        parts = list(allowed.parts) if isinstance(allowed, Group) and allowed.conjunction else [allowed]
        left: list[Condition] = []
        uppers: list[Dim] = []
        lowers: list[Dim] = []
        row, column = self.axes[2], self.axes[3]
        for part in sorted(parts, key=repr):
            distance = part.dim + column - row if isinstance(part, Literal) and part.kind == "ge" else None
            below = part.dim - column + row if isinstance(part, Literal) and part.kind == "ge" else None
            if distance is not None and not self._indexed(distance):
                uppers.append(distance)
            elif below is not None and not self._indexed(below):
                lowers.append(below)
            elif (padded := self._padding(part)) is not None and form.padding is None:
                form = dataclasses.replace(form, padding=padded[0], shift=padded[1])
            elif (positions := self._positions(part)) is not None and form.positions is None:
                form = dataclasses.replace(form, positions=positions)
            else:
                left.append(part)
        if len(uppers) == 1:
            past = self._past(uppers[0])
            form = dataclasses.replace(form, causal=True, offset=uppers[0], from_past=past)
        elif uppers:
            left += [Literal("ge", d + row - column) for d in uppers]
        for lower in lowers:
            # lower + j - i >= 0 and window = lower + 1 + offset
            window = None if form.offset is None else (lower + 1 + form.offset).value
            if window is not None and form.window is None and window > 0:
                form = dataclasses.replace(form, window=window)
            else:
                left.append(Literal("ge", lower + column - row))
        return dataclasses.replace(form, other=tuple(left))

    def _indexed(self, dim: Dim) -> bool:
        symbols = dim.symbols()
        return any(s in self.elements.logic.last or s in self.elements.reads for s in symbols)

    def _past(self, offset: Dim) -> bool:
        return offset == self.columns - self.rows

    def _read(self, symbols: set[Symbol]) -> tuple[Symbol, Read] | None:
        found = [(s, self.elements.reads[s]) for s in symbols if s in self.elements.reads]
        return found[0] if len(found) == 1 else None

    def _padding(self, part: Condition) -> tuple[ir.Value, Dim] | None:
        """The tensor and shift, where the condition is that an element of a tensor [B, T] at (b, j + shift) isn't 0."""
        if not isinstance(part, Literal):
            return None
        found = self._read(part.dim.symbols())
        if found is None:
            return None
        symbol, read = found
        dim = Dim({(symbol,): 1})
        one = part == self.elements.logic.eq(dim - 1)
        if part != self.elements.logic.ne(dim) and not one:
            return None
        if len(read.indices) != 2 or read.indices[0] != self.axes[0]:
            return None
        shift = read.indices[1] - self.axes[3]
        if self._indexed(shift):
            return None
        if one:
            self.assumed.add(Binary(read.value))
        return read.value, shift

    def _positions(self, part: Condition) -> ir.Value | None:
        """The tensor, where the condition is j ≤ an element of an integer tensor at ([b,] i)."""
        if not isinstance(part, Literal) or part.kind != "ge":
            return None
        found = self._read(part.dim.symbols())
        if found is None or part.dim + self.axes[3] != Dim({(found[0],): 1}):
            return None
        indices = found[1].indices
        fits = indices in ((self.axes[2],), (self.axes[0], self.axes[2]))
        return found[1].value if fits else None

    def _needed(self) -> frozenset[Assumption]:
        """What was assumed, with a broadcast size as the equality of its parts."""
        needed: set[Assumption] = set()
        for assumption in self.assumed:
            if not isinstance(assumption, SameSize):
                needed.add(assumption)
                continue
            if known(assumption.a, self.true) == known(assumption.b, self.true):
                continue
            parts = sorted({*_broadcast_parts(assumption.a), *_broadcast_parts(assumption.b)}, key=rank)
            needed.update(SameSize(parts[0], other) for other in parts[1:])
        return frozenset(needed)


def _symbols(condition: Condition) -> set[Symbol]:
    if isinstance(condition, Literal):
        return condition.dim.symbols()
    found: set[Symbol] = set()
    for part in condition.parts:
        found |= _symbols(part)
    return found


def _broadcast_parts(size: Dim) -> tuple[Dim, ...]:
    symbol = as_symbol(size)
    return symbol.args if symbol is not None and symbol.op == "broadcast" else (size,)
