"""Running a reference and its candidates over the same data, one batch at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, VerificationError, first_line
from graphopt.runtime_ops.session import session
from graphopt.verification.quality.metrics import Quality

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]
Batch: TypeAlias = Mapping[str, Array]
"""An array for each input, samples along the first axis."""
Path = str | os.PathLike[str]


class Measure(Protocol):
    """What one task gathers about one candidate."""

    def add(self, feeds: Batch, expected: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        """Take in the reference's and the candidate's outputs of one batch."""

    def quality(self) -> Quality:
        """The numbers over all batches."""


def judge(
    reference: Path,
    candidates: Sequence[Path],
    batches: Iterable[Batch],
    measure: Callable[[], Measure],
    *,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Quality]:
    """Judge candidates on data; the outputs of one batch at a time are in memory.

    Args:
        reference: The original.
        candidates: What was made of it, with the same inputs, and outputs of the same names.
        batches: The data, of which no batch was used for calibration.
        measure: Makes what gathers the numbers of one candidate.
        threads: Threads within an operator; 0: all cores.
        progress: Called after each batch.

    Returns:
        The quality of each candidate.

    Raises:
        ModelError: A model doesn't load.
        InputDataError: There is no data, or the reference doesn't run on it.
        VerificationError: A candidate lacks an output of the reference, gives it in another shape, or doesn't run.
    """
    original = Runner(reference, threads)
    runners = [Runner(candidate, threads) for candidate in candidates]
    measures = [measure() for _ in candidates]
    total = len(batches) if isinstance(batches, Sequence) else 0
    count = 0
    for count, feeds in enumerate(batches, 1):
        try:
            expected = original.run(feeds)
        except VerificationError as error:
            raise InputDataError(f"{error} The data doesn't fit the model.") from error
        for runner, gathering in zip(runners, measures, strict=True):
            gathering.add(feeds, expected, matching(runner.name, runner.run(feeds), expected))
        if progress is not None:
            progress("quality", count, max(total, count))
    if not count:
        raise InputDataError("There is no data to judge the model on.")
    return [gathering.quality() for gathering in measures]


class Runner:
    """A session as users run it: with all optimizations and kernels.

    Args:
        path: The model.
        threads: Threads within an operator; 0: all cores.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what fails is raised, and told once
        self.name = os.fspath(path)
        self.session: onnxruntime.InferenceSession = session(path, options)
        self.outputs = [output.name for output in self.session.get_outputs()]

    def run(self, feeds: Batch) -> dict[str, Array]:
        """The outputs by name; what isn't a tensor is left out.

        Raises:
            VerificationError: ONNX Runtime doesn't run the model on this.
        """
        try:
            outputs = self.session.run(None, dict(feeds))
        except Exception as error:  # ONNX Runtime has a class of exception for each reason
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise VerificationError(f"{self.name} doesn't run on {shapes}: {first_line(error)}.") from error
        return {n: array for n, array in zip(self.outputs, outputs, strict=True) if isinstance(array, np.ndarray)}


def matching(name: str, found: Mapping[str, Array], expected: Mapping[str, Array]) -> Mapping[str, Array]:
    """The candidate's outputs, which must be those of the reference.

    Raises:
        VerificationError: One is missing, or has another rank or last dimension.
    """
    for output, array in expected.items():
        if output not in found:
            raise VerificationError(f"{name} can't be judged: it has no output {output!r}, which the reference has.")
        if found[output].ndim != array.ndim:
            raise VerificationError(
                f"{name} can't be judged: its output {output!r} has the shape {list(found[output].shape)}, the "
                f"reference's {list(array.shape)}."
            )
    return found


def same_shape(name: str, expected: Array, found: Array) -> None:
    """Refuse an output whose elements can't be compared one by one.

    Raises:
        VerificationError: The shapes differ.
    """
    if expected.shape != found.shape:
        raise VerificationError(
            f"The models can't be judged: the output {name!r} has the shape {list(found.shape)} in the candidate and "
            f"{list(expected.shape)} in the reference."
        )
