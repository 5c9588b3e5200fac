"""The part of a model's inputs and outputs on which a result is judged: where it holds what it takes for granted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.assumptions import Reliance, outside
from graphopt.verification.compare import OutputComparison, Tolerance, compare
from graphopt.verification.probes import Probe

Array = npt.NDArray[Any]

PADDED = "no-left-padding"
"""The assumption under which what comes out at padded positions is unspecified."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the outputs of the original are like, as far as padding is concerned.

    Attributes:
        tokens: Name of the input [batch, new tokens, ...], or None.
        outputs: Declared sizes by output, None for a size that is dynamic or unknown.
    """

    tokens: str | None
    outputs: dict[str, tuple[int | None, ...] | None]

    @classmethod
    def of(cls, model: ir.Model) -> Layout:
        """The layout of `model`, by the signs that `graphopt.verification.signature` goes by too."""
        inputs = [v for v in model.graph.inputs if not v.is_initializer() and v.shape is not None]
        tokens = [
            v.name
            for v in inputs
            if v.dtype is not None
            and "mask" not in (v.name or "").lower()
            and ((v.dtype.is_integer() and len(v.shape or ()) == 2) or "embeds" in (v.name or "").lower())
        ]
        first = next((name for name in tokens if "position" not in (name or "").lower()), None)
        return cls(first, {v.name or "": _sizes(v) for v in model.graph.outputs})


class Domain:
    """Where a result holds what it takes for granted.

    Attributes:
        relied: What it takes for granted.
        left_open: Outputs of which something was left out of a comparison.
    """

    def __init__(self, relied: Sequence[Reliance], layout: Layout) -> None:
        self.relied = list({(e.assumption, *sorted(e.inputs.items())): e for e in relied}.values())
        self.left_open: dict[str, None] = {}
        self._layout = layout

    @property
    def names(self) -> str:
        """The assumptions, as a list in words."""
        return ", ".join(dict.fromkeys(e.assumption for e in self.relied))

    def covers(self, probe: Probe) -> bool:
        """Whether the result claims to be right on a probe."""
        return outside(self.relied, probe.feeds) is None

    def notes(self, probes: Sequence[Probe]) -> Iterator[str]:
        """What of `probes` isn't compared, and why."""
        outside = [repr(probe.name) for probe in probes if not self.covers(probe)]
        if outside and len(outside) < len(probes):
            yield (
                f"Compared only where the result is valid ({self.names}): on {len(probes) - len(outside)} of "
                f"{len(probes)} probes, not on {', '.join(outside)}."
            )
        if self.left_open:
            names = ", ".join(repr(name) for name in list(self.left_open)[:3])
            more = f" and {len(self.left_open) - 3} more" if len(self.left_open) > 3 else ""
            yield f"At padded positions, which {PADDED} leaves open, {names}{more} are not compared."

    def compare(
        self,
        probe: Probe,
        expected: Mapping[str, Any],
        outputs: Mapping[str, Any],
        bitwise: bool,
        tolerances: Mapping[str, Tolerance],
    ) -> list[OutputComparison]:
        """Compare `outputs` with those expected on a probe, without what is unspecified there.

        Args:
            probe: What was fed.
            expected: Outputs of the original by name.
            outputs: Those of the candidate, of the names to compare.
            bitwise: See `graphopt.verification.compare.compare`.
            tolerances: Tolerance by output name, in place of that of its dtype.
        """
        found: list[OutputComparison] = []
        for name, output in outputs.items():
            reference, skipped = expected[name], 0
            unspecified = self.unspecified(probe, name, reference)
            if unspecified is not None and np.shape(output) == unspecified.shape:
                reference, output = _without(reference, unspecified), _without(output, unspecified)
                skipped = int(np.count_nonzero(unspecified))
                self.left_open[name] = None
            parts = compare([reference], [output], [name], bitwise, tolerances)
            found += [dataclasses.replace(part, elements=part.elements - skipped) for part in parts]
        return found

    def unspecified(self, probe: Probe, name: str, output: Any) -> npt.NDArray[np.bool_] | None:
        """The elements of an output that are unspecified on a probe, because they are computed at padded positions;
        None: there are none.

        Those are positions of an output [batch, new tokens, ...], and slots of a cache [batch, heads, past and new
        tokens, ...], at which the mask is 0. An axis of declared size is never one of tokens.
        """
        entry = next((e for e in self.relied if e.assumption == PADDED and e.inputs["mask"] in probe.feeds), None)
        if entry is None or not isinstance(output, np.ndarray):
            return None
        mask = np.asarray(probe.feeds[entry.inputs["mask"]])
        if mask.ndim != 2 or output.ndim < 2 or len(mask) != len(output) or mask.all():
            return None
        tokens = probe.feeds.get(entry.inputs.get("ids", self._layout.tokens or ""))
        new = mask.shape[1] if tokens is None or np.ndim(tokens) < 2 else np.shape(tokens)[1]
        axis = self._axis(name, output, (mask.shape[1], new))
        if axis is None:
            return None
        padded = mask[:, -output.shape[axis] :] == 0
        shape = [len(mask), *(1,) * (output.ndim - 1)]
        shape[axis] = output.shape[axis]
        return np.broadcast_to(padded.reshape(shape), output.shape)

    def _axis(self, name: str, output: Array, lengths: tuple[int, int]) -> int | None:
        declared = self._layout.outputs.get(name)
        for axis in (2, 1) if output.ndim > 3 else (1,):
            fixed = declared is not None and len(declared) == output.ndim and declared[axis] is not None
            if not fixed and 0 < output.shape[axis] in lengths:
                return axis
        return None


def _without(array: Array, unspecified: npt.NDArray[np.bool_]) -> Array:
    """A copy of an output in which unspecified elements are 0."""
    copy = np.array(array)
    copy[unspecified] = np.zeros((), copy.dtype)
    return copy


def _sizes(value: ir.Value) -> tuple[int | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)
