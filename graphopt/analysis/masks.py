"""What an attention mask is: causal, a window, padding, a bias, as functions of batch, head, query row and key column.

    allowed(b, h, i, j) = j ≤ i + offset  and  i + offset - j < window  and  P[b, j + shift] ≠ 0  and  other
    value(b, h, i, j)   = bias(b, h, i, j) where allowed, else the masked value (or masked value + bias)

The form is found by evaluating the mask at symbolic indices (`graphopt.analysis.elements`), not by matching what an
exporter wrote. Nothing is guessed: what isn't understood is `other`, or no form at all, with the node and the reason.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis import element_arithmetic, element_moves  # noqa: F401  (they register the rules)
from graphopt.analysis.algebra import is_op
from graphopt.analysis.conditions import FALSE, TRUE, Condition, Group, Literal, TooComplexError
from graphopt.analysis.dim_functions import known
from graphopt.analysis.dims import ZERO, Dim, Symbol, as_symbol, rank
from graphopt.analysis.elements import Assumption, Binary, Elements, Read, SameSize
from graphopt.analysis.leaves import Cases, Element, OpaqueError, Poly
from graphopt.analysis.shapes import Shape, ShapeFacts
from graphopt.graph.constants import constant_array

MASKED_BELOW = -1e3
"""An additive constant this low masks; a higher one is a bias. (exporters write -1e4 and lower, Swin's windows -100)"""


@dataclasses.dataclass(frozen=True)
class MaskForm:
    """A mask as a function of batch b, head h, query row i and key column j.

    Attributes:
        value: The mask.
        axes: The symbols b, h, i, j of the conditions; 0 where there is but one.
        rows: Number of query rows S.
        columns: Number of key columns T.
        boolean: Whether it is boolean (True: attend), else it is added to the scores.
        allowed: The whole condition under which a key is attended to.
        element: All of the mask: the condition, or the number in each case.
        causal: Whether j ≤ i + `offset` is demanded.
        offset: The number of key columns before the first row's own, where `causal` or `window` is given.
        from_past: Whether `offset` is proven to be T - S, the number of past positions.
        window: j > i + offset - window is demanded: how many keys a row sees at most; None: no window.
        padding: The tensor [B, T'] whose element (b, j + `shift`) must not be 0.
        shift: See `padding`.
        positions: The integer tensor that holds the position of each query: j ≤ positions[(b,) i] is demanded.
        other: Conditions of another kind that are demanded too.
        biased: Whether something is added to the scores where they aren't masked.
        bias: The value of the graph that is added, where it is one; it broadcasts as the mask does.
        alibi: Slope of each head, where the bias is slope · (j - i + anything that a row of a head shares).
        masked_value: What is added where it masks (the highest where it differs); None where it is boolean or
            masks nothing.
        masked_values: All of these, such as (-3.4e38, -inf) where two masks were added.
        assumptions: What the mask needs to be this form: sizes that are equal, a padding of 0 and 1 only.
        obstacles: Values that aren't followed further, and why.
    """

    value: ir.Value
    axes: tuple[Dim, Dim, Dim, Dim]
    rows: Dim
    columns: Dim
    boolean: bool
    allowed: Condition
    element: Element
    causal: bool = False
    offset: Dim | None = None
    from_past: bool = False
    window: int | None = None
    padding: ir.Value | None = None
    shift: Dim = ZERO
    positions: ir.Value | None = None
    other: tuple[Condition, ...] = ()
    biased: bool = False
    bias: ir.Value | None = None
    alibi: npt.NDArray[np.float64] | None = None
    masked_value: float | None = None
    masked_values: tuple[float, ...] = ()
    assumptions: frozenset[Assumption] = frozenset()
    obstacles: tuple[str, ...] = ()

    @property
    def key(self) -> object:
        """Two masks of one model with the same key hold the same numbers in every run, broadcast to [B, H, S, T]."""
        return (self.boolean, self.element, self.assumptions)

    @property
    def always(self) -> bool:
        """Whether it masks nothing and adds nothing."""
        return self.allowed == TRUE and not self.biased

    @property
    def is_only_causal(self) -> bool:
        """Whether it is j ≤ i + `offset` and nothing else (where `equalities` hold, if there are any)."""
        alone = self.window is None and self.padding is None and self.positions is None and not self.other
        return self.causal and alone and not self.biased and not self.binary

    @property
    def row_never_empty(self) -> bool:
        """Whether it is proven that each row may see a key: it sees its own column at least."""
        if self.allowed == TRUE:
            return True
        alone = self.padding is None and self.positions is None and not self.other
        return alone and self.causal and self.offset is not None and self.offset.low >= 0

    @property
    def equalities(self) -> tuple[tuple[Dim, Dim], ...]:
        """Pairs of sizes that must be equal for the form to hold (in other runs one of them is 1 and broadcasts)."""
        return tuple((a.a, a.b) for a in self.assumptions if isinstance(a, SameSize))

    @property
    def binary(self) -> tuple[ir.Value, ...]:
        """Tensors that must hold nothing but 0 and 1 for the form to hold."""
        return tuple(a.value for a in self.assumptions if isinstance(a, Binary))

    def describe(self) -> str:
        """As words: "causal, window 4096, padding from 'attention_mask'"."""
        parts = []
        if self.causal:
            parts.append("causal" if self.from_past else f"causal with offset {self.offset!r}")
        if self.window is not None:
            parts.append(f"window {self.window}")
        if self.positions is not None:
            parts.append(f"up to the position in {self.positions.name!r}")
        if self.padding is not None:
            parts.append(f"padding from {self.padding.name!r}" + (f" at j + {self.shift!r}" if self.shift != 0 else ""))
        if self.alibi is not None:
            parts.append(f"ALiBi of {len(self.alibi)} heads")
        elif self.biased:
            parts.append("a bias" + (f" {self.bias.name!r}" if self.bias is not None else ""))
        parts += [f"where {condition!r}" for condition in self.other]
        parts += [f"if {a.name!r} is 0 or 1" for a in self.binary]
        return ", ".join(parts) or "nothing masked"


@dataclasses.dataclass(frozen=True)
class NoForm:
    """Why a mask isn't understood: the value at which the walk stopped, and the fact that was missing."""

    value: ir.Value
    reason: str


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
        self.true = [size - 1 for size in sizes] + self._within(shape)
        b, h, i, j = (self.elements.index(name, size) for name, size in zip("bhij", sizes, strict=True))
        self.axes = (b, h, i, j)
        self.rows, self.columns = sizes[2], sizes[3]
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

    def _sizes(self, shape: Shape) -> tuple[Dim, Dim, Dim, Dim]:
        full = [*[Dim.of(1)] * (4 - len(shape)), *(self._one_of(size) for size in shape)]
        for axis, wanted in zip((2, 3), self.wanted, strict=True):
            size = full[axis]
            if wanted is not None and size != 1:
                if size != wanted and size.low < 2:
                    self.assumed.add(SameSize(size, wanted))
                full[axis] = wanted
            elif wanted is not None:
                full[axis] = wanted
        return full[0], full[1], full[2], full[3]

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
            alibi=self._alibi(bias) if biased and bias is not None else None,
            bias=self._added(self.value, self.axes[4 - len(self.shape) :], bias) if biased else None,
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

    def _alibi(self, bias: Poly) -> npt.NDArray[np.float64] | None:
        """The slopes where the bias is slope[h] · j + what doesn't depend on j."""
        column = as_symbol(self.axes[3])
        head = as_symbol(self.axes[1])
        slopes: npt.NDArray[np.float64] | None = None
        for monomial, factor in bias.terms:
            if column not in monomial:
                if any(s in self.elements.reads and not self._slope(s) for s in monomial):
                    return None
                continue
            rest = list(monomial)
            rest.remove(column)
            found = self._slope(rest[0]) if len(rest) == 1 else None
            if slopes is not None or found is None:
                return None
            slopes = found[0] * factor
        return slopes if head is not None else None

    def _slope(self, symbol: Symbol) -> tuple[npt.NDArray[np.float64]] | None:
        """The numbers of a constant that is read at the head."""
        read = self.elements.reads.get(symbol)
        array = None if read is None else constant_array(read.value)
        if read is None or array is None or array.size != max(array.shape, default=0):
            return None
        place = [i for i in read.indices if i != 0]
        return (array.reshape(-1).astype(np.float64),) if place == [self.axes[1]] else None

    def _added(self, value: ir.Value, indices: Sequence[Dim], bias: Poly | None) -> ir.Value | None:
        """The value that is the bias: what is added to a pure mask, or chosen beside a masked value."""
        if bias is None:
            return None
        element, _ = self.elements.element(value, indices)
        if isinstance(element, Cases) and element.leaf == bias:
            return value
        node = value.producer()
        if node is None or not is_op(node, "Add", "Where", "Identity"):
            return None
        for operand in node.inputs:
            if operand is None or self.facts.dtype(operand) != self.facts.dtype(self.value):
                continue
            try:
                place = self.elements.broadcast(node, operand, tuple(indices))
            except OpaqueError:
                continue
            found = self._added(operand, place, bias)
            if found is not None:
                return found
        return None

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
