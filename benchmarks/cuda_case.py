"""What a case of the CUDA harness is: one launcher with inputs, what it must give, and what it can't do without.

benchmarks/cuda_cases/ has a file for each operator with CUDA kernels, with a function

    def cases() -> Iterator[Case]

of all its cases: shapes that models have (timed) and odd ones (held against the reference alone).
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from cuda_launchers import OPERATORS, Arguments

if TYPE_CHECKING:
    from cuda_launchers import Launchers

Arithmetic = Literal["float32", "float16 tensor", "int8 tensor"]
"""What does the multiplications, with limits of their own: the ordinary units or the tensor cores."""


@dataclasses.dataclass
class Call:
    """A launch on tensors of one device.

    Attributes:
        arguments: Of the launcher, without the stream, by name or in its header's order: tensors, None, whole numbers
            and floats as the header has them. By name, fields of a structure that it takes stand among them.
        outputs: The tensors among them that it writes.
        expected: Makes what they must hold then, of what the other arguments held before.
        bytes: That must be read and written at least.
        operations: That must be done at least; a multiplication and an addition are two.
        arithmetic: What does them.
        atol: Largest difference of a floating-point number.
        rtol: The same relative to it.
        steps: Largest difference of an integer.
        share: Part of the integers that may differ at all.
    """

    arguments: Arguments
    outputs: list[Any]
    expected: Callable[[], list[Any]]
    bytes: int
    operations: int = 0
    arithmetic: Arithmetic = "float32"
    atol: float = 0.0
    rtol: float = 0.0
    steps: int = 0
    share: float = 0.0


@dataclasses.dataclass(frozen=True)
class Case:
    """One launcher at one shape.

    Attributes:
        operator: Whose launcher it is.
        launcher: Its symbol.
        shape: As the table shows it.
        make: Makes the call's tensors, given PyTorch, the device and the library's launchers.
        timed: Whether it is timed; else it is checked alone.
    """

    operator: str
    launcher: str
    shape: str
    make: Callable[[Any, str, Launchers], Call]
    timed: bool = True


def all_cases(operators: list[str] | None = None) -> Iterator[Case]:
    """The cases of all files of benchmarks/cuda_cases, or of these operators.

    A file has the name of the operator's folder; where that has no CUDA kernels, there are no cases.
    """
    package = importlib.import_module("cuda_cases")
    for entry in sorted(pkgutil.iter_modules(package.__path__), key=lambda entry: entry.name):
        if not (OPERATORS / entry.name / "cuda.cu").is_file():
            continue
        for case in importlib.import_module(f"cuda_cases.{entry.name}").cases():
            if not operators or case.operator in operators:
                yield case


def largest_difference(call: Call) -> float:
    """The largest difference between what a call wrote and what it should have, as a part of what is allowed.

    Floating-point numbers that are NaN in both are alike.
    """
    worst = 0.0
    for found, wanted in zip(call.outputs, call.expected(), strict=True):
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            return float("inf")
        if found.numel() == 0:
            continue
        if found.dtype.is_floating_point:
            a, b = found.double(), wanted.double()
            off = (a - b).abs() / (call.atol + call.rtol * b.abs()).clamp(min=1e-300)
            off[(a == b) | (a.isnan() & b.isnan())] = 0
            off[off.isnan()] = float("inf")
        else:
            off = (found.long() - wanted.long()).abs().double()
            if call.share < float((off > 0).double().mean()):
                return float("inf")
            off = off / max(call.steps, 1e-300)
        worst = max(worst, float(off.max()))
    return worst
