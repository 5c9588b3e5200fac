"""Comparing the outputs of two models: what counts as equal.

An output passes where, at every element, |reference - candidate| <= absolute * scale + relative * |reference| + floor.
`scale` is the largest magnitude among the finite elements of that output, because rounding errors of a sum grow with
what is summed and not with what is left over. The left side over the right side is the *margin*: up to 1 is equal.
NaN and infinity have to be at the same places, and shapes and dtypes have to be the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far an element may be off.

    Attributes:
        absolute: Fraction of the output's scale.
        relative: Fraction of the element's own magnitude.
        floor: An error that never counts, whatever the scale: ONNX Runtime's sigmoid alone is off by 1.8e-7 where the
            true value is 1e-8, so an output of such numbers has no better digits.
    """

    absolute: float
    relative: float
    floor: float = 0.0

    def widened(self, absolute: float) -> Tolerance:
        """This tolerance with at least that fraction of the scale."""
        return dataclasses.replace(self, absolute=max(self.absolute, absolute))


TOLERANCES: dict[str, Tolerance] = {
    "float64": Tolerance(1e-10, 1e-10, 1e-15),
    "float32": Tolerance(1e-4, 1e-4, 5e-7),
    "float16": Tolerance(1e-2, 1e-2, 1e-6),
    "bfloat16": Tolerance(5e-2, 5e-2, 5e-7),
}
"""Tolerances by dtype; a complex number counts as its two parts, and all other dtypes must be equal.

float32: ONNX Runtime's own optimizations move the outputs of 30 trained models by at most 1e-5 of the scale (vision,
audio, encoders) and 5.5e-5 (a decoder of 30 layers, whose residual stream carries a few very large activations), so
1e-4 is what reordering may do, and wrong weights do far more. The 16-bit types, whose last place is 1e-3 and 8e-3,
allow about ten of those, as ONNX Runtime computes them in float32 and rounds after each operator.
"""


@dataclasses.dataclass(frozen=True)
class OutputComparison:
    """One output of one run, compared.

    Attributes:
        name: The output; parts of sequences and maps as "name[0]", "name['key']".
        ok: Whether it is equal within the tolerance.
        max_abs: Largest |reference - candidate| of finite elements; infinite where shapes or dtypes differ.
        max_rel: The same over the scale.
        margin: The error over what is allowed; at most 1 where it passes, infinite where nothing would help.
        tolerance: What was allowed; None where the elements had to be equal.
        reason: Why it failed, or an empty string.
        scale: Largest magnitude of the reference's finite elements (floats only).
        elements: How many elements were compared; none says nothing.
    """

    name: str
    ok: bool
    max_abs: float
    max_rel: float
    margin: float
    tolerance: Tolerance | None
    reason: str = ""
    scale: float = 0.0
    elements: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON types; infinity is written as null."""
        return {
            "name": self.name,
            "ok": self.ok,
            "max_abs": finite(self.max_abs),
            "max_rel": finite(self.max_rel),
            "margin": finite(self.margin),
            "tolerance": dataclasses.asdict(self.tolerance) if self.tolerance else None,
            "reason": self.reason,
            "scale": finite(self.scale),
            "elements": self.elements,
        }


def compare(
    reference_outputs: Sequence[Any],
    candidate_outputs: Sequence[Any],
    names: Sequence[str],
    bitwise: bool = False,
    tolerances: Mapping[str, Tolerance] | None = None,
) -> list[OutputComparison]:
    """Compare the outputs of one run with those of another.

    Args:
        reference_outputs: Arrays, lists (sequences), dicts (maps) or None (empty optionals).
        candidate_outputs: The same of the candidate, in the same order.
        names: Names of the outputs.
        bitwise: Elements must have the same bits, except that every NaN equals every other.
        tolerances: Tolerance by output name, in place of that of its dtype.

    Returns:
        One comparison for each output, or for each array in a sequence or map.
    """
    result: list[OutputComparison] = []
    for name, reference, candidate in zip(names, reference_outputs, candidate_outputs, strict=True):
        own = (tolerances or {}).get(name)
        result.extend(_compare_any(name, reference, candidate, bitwise, own))
    return result


def _compare_any(
    name: str, reference: Any, candidate: Any, bitwise: bool, tolerance: Tolerance | None
) -> Iterator[OutputComparison]:
    if isinstance(reference, list | tuple) and isinstance(candidate, list | tuple):
        if len(reference) != len(candidate):
            yield _different(name, f"has {len(candidate)} elements instead of {len(reference)}")
            return
        for index, (a, b) in enumerate(zip(reference, candidate, strict=True)):
            yield from _compare_any(f"{name}[{index}]", a, b, bitwise, tolerance)
    elif isinstance(reference, dict) and isinstance(candidate, dict):
        if set(reference) != set(candidate):
            yield _different(name, "has other keys")
            return
        for key, value in reference.items():
            yield from _compare_any(f"{name}[{key!r}]", value, candidate[key], bitwise, tolerance)
    elif reference is None or candidate is None:
        if reference is not candidate:
            yield _different(name, "is " + ("missing" if candidate is None else "there where there should be none"))
    elif isinstance(reference, str | bytes) or isinstance(candidate, str | bytes):
        yield _equal(name) if reference == candidate else _different(name, f"is {candidate!r}, not {reference!r}")
    else:
        first, second = np.asarray(reference), np.asarray(candidate)
        yield dataclasses.replace(_compare_arrays(name, first, second, bitwise, tolerance), elements=first.size)


def _compare_arrays(name: str, a: Array, b: Array, bitwise: bool, tolerance: Tolerance | None) -> OutputComparison:
    if a.dtype != b.dtype:
        return _different(name, f"has dtype {b.dtype} instead of {a.dtype}")
    if a.shape != b.shape:
        return _different(name, f"has shape {list(b.shape)} instead of {list(a.shape)}")
    if a.dtype.kind == "c":
        a, b = _as_real(a), _as_real(b)
    allowed = tolerance or TOLERANCES.get(a.dtype.name)
    if a.dtype.name not in TOLERANCES:
        allowed = None
    if allowed is None:
        if a.dtype.kind in "OUSb":
            wrong = int(np.count_nonzero(a != b))
            return _equal(name) if wrong == 0 else _different(name, f"differs in {wrong} of {a.size} elements")
        wide_a, wide_b = _wide(a), _wide(b)
        wrong = int(np.count_nonzero((wide_a != wide_b) & ~(np.isnan(wide_a) & np.isnan(wide_b))))
        if wrong == 0:
            return _equal(name)
        error = float(np.nanmax(np.abs(wide_a - wide_b), initial=0.0))
        scale = float(np.nanmax(np.abs(wide_a), initial=0.0)) or 1.0
        reason = f"differs in {wrong} of {a.size} elements of type {a.dtype}, which must be equal"
        return OutputComparison(name, False, error, error / scale, np.inf, None, reason)
    if bitwise and _same_bits(a, b):
        return _equal(name)

    wide_a, wide_b = _wide(a), _wide(b)
    finite_a, finite_b = np.isfinite(wide_a), np.isfinite(wide_b)
    with np.errstate(invalid="ignore"):
        special = (finite_a != finite_b) | (~finite_a & (wide_a != wide_b) & ~(np.isnan(wide_a) & np.isnan(wide_b)))
    if wrong := int(np.count_nonzero(special)):
        at = tuple(int(i) for i in np.argwhere(special)[0])
        return _different(
            name, f"is {wide_b[at]} instead of {wide_a[at]} at {list(at)} (NaN or infinity at {wrong} places)"
        )
    magnitude = np.abs(np.where(finite_a, wide_a, 0.0))
    errors = np.abs(np.where(finite_a, wide_a - np.where(finite_a, wide_b, 0.0), 0.0))
    error = float(errors.max(initial=0.0))
    scale = float(magnitude.max(initial=0.0))
    relative = error / scale if scale > 0 else (0.0 if error == 0 else np.inf)
    limit = allowed.absolute * scale + allowed.relative * magnitude + allowed.floor
    with np.errstate(divide="ignore", invalid="ignore"):
        margin = float(np.where(errors == 0, 0.0, errors / limit).max(initial=0.0))
    if bitwise:
        wrong = int(np.count_nonzero(errors)) or int(np.count_nonzero(np.signbit(a) != np.signbit(b)))
        reason = f"differs in {wrong} of {a.size} elements (by {relative:.1e} of the scale), but must be equal"
        return OutputComparison(name, False, error, relative, np.inf, None, reason, scale)
    reason = "" if margin <= 1 else f"is off by {error:.3g}, {relative:.1e} of its largest magnitude {scale:.3g}"
    return OutputComparison(name, margin <= 1, error, relative, margin, allowed, reason, scale)


def _wide(array: Array) -> Array:
    """float64, or exact Python integers' range for 64-bit integers."""
    if array.dtype.kind in "iu" and array.dtype.itemsize == 8:
        return array.astype(np.longdouble)
    return array.astype(np.float64)


def _as_real(array: Array) -> Array:
    return np.stack([array.real, array.imag], axis=-1)


def _same_bits(a: Array, b: Array) -> bool:
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    same = np.ascontiguousarray(a).view(unsigned) == np.ascontiguousarray(b).view(unsigned)
    return bool(np.all(same | ((a != a) & (b != b))))


def _equal(name: str) -> OutputComparison:
    return OutputComparison(name, True, 0.0, 0.0, 0.0, None)


def _different(name: str, reason: str) -> OutputComparison:
    return OutputComparison(name, False, np.inf, np.inf, np.inf, None, reason)


def finite(number: float) -> float | None:
    """`number`, or None where JSON has no word for it."""
    return float(number) if np.isfinite(number) else None
