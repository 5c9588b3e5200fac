"""The normal form of an attention mask; `graphopt.analysis.masks` finds it."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.conditions import TRUE, Condition
from graphopt.analysis.dims import ZERO, Dim
from graphopt.analysis.elements import Assumption, Binary, SameSize
from graphopt.analysis.leaves import Element


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
        pairs = [(a.a, a.b) for a in self.assumptions if isinstance(a, SameSize)]
        return tuple(sorted(pairs, key=repr))

    @property
    def binary(self) -> tuple[ir.Value, ...]:
        """Tensors that must hold nothing but 0 and 1 for the form to hold."""
        values = [a.value for a in self.assumptions if isinstance(a, Binary)]
        return tuple(sorted(values, key=lambda value: value.name or ""))

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
