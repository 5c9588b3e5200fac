"""Trials: what a model loses where some of its weights are others, told by one session, with no model made anew.

The weights in question become inputs of the session. A run is given those that a trial changes, and for the rest what
the model has, which ONNX Runtime reads where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import InputDataError, VerificationError, first_line
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.scratch import Scratch
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.runtime_ops.scoring import ROWS
from graphopt.verification.quality.classification import Scores, are_probabilities, probabilities
from graphopt.verification.quality.embedding import pooled
from graphopt.verification.quality.generic import cosine_of
from graphopt.verification.quality.language import Rows, divergence
from graphopt.verification.quality.tasks import guess_task

Array = npt.NDArray[Any]
_DISTRIBUTIONS = ("language", "classification")


class Trials:
    """A model on a few samples, with weights that can be exchanged.

    The loss of a trial is the mean divergence KL(original ‖ trial) of the distributions that a language model or a
    classifier gives, in nats; of an embedder the mean of 1 − cos(y, y') of a sample's two embeddings; of other models
    Σ |y − y'|² / Σ |y|² over their outputs of floats. It is 0 for the model itself. Weights and the original's outputs
    lie in a temporary file, so that memory doesn't grow with either.

    Args:
        model: The model, which stays as it is.
        weights: Initializers of its main graph that trials exchange.
        samples: Inputs, an array each by name.
        threads: Threads within an operator; None leaves it to ONNX Runtime.

    Raises:
        VerificationError: The model doesn't run on the samples, or has no output of floats.
        InputDataError: There is no sample.
    """

    def __init__(
        self,
        model: ir.Model,
        weights: Sequence[ir.Value],
        samples: Iterable[Mapping[str, Array]],
        *,
        threads: int | None = None,
    ) -> None:
        self._scratch = Scratch()
        self._own: dict[str, Array] = {}
        names = []
        for weight in weights:
            assert weight.name is not None
            assert weight.const_value is not None
            self._own[weight.name] = self._scratch.array(weight.const_value.numpy())
            names.append(weight.name)
        guess = guess_task(model)
        decoder = kv_interface(model) if guess.task == "language" else None
        judged = guess.output if decoder is None else decoder.logits
        self._task, self._mask = guess.task, guess.mask
        self._scores: Scores = "logits"
        self._session = make_session(_opened(model, names, judged), threads=threads)
        self._samples = [dict(sample) for sample in samples]
        if not self._samples:
            raise InputDataError("There is no sample to try changes of the weights on.")
        self._expected = [[self._scratch.array(y) for y in self._outputs(sample, {})] for sample in self._samples]
        if self._task == "classification" and all(are_probabilities(_rows(y)) for ys in self._expected for y in ys):
            self._scores = "probabilities"

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._samples)

    def loss(self, changed: Mapping[str, Array], samples: int | None = None) -> float:
        """What the model loses with these weights.

        Args:
            changed: New contents by the weight's name, in its shape and type.
            samples: How many of the samples it is judged on, the first ones; None: all.

        Raises:
            VerificationError: It doesn't run.
        """
        total = weight = 0.0
        for sample, expected in list(zip(self._samples, self._expected, strict=True))[:samples]:
            for y, found in zip(expected, self._outputs(sample, changed), strict=True):
                if self._task in _DISTRIBUTIONS:
                    total, weight = total + self._divergence(y, found), weight + y.size // y.shape[-1]
                elif self._task == "embedding":
                    mask = None if self._mask is None else sample.get(self._mask)
                    vectors = zip(pooled(y, mask), pooled(found, mask), strict=True)
                    total, weight = total + sum(1 - cosine_of(a, b) for a, b in vectors), weight + len(y)
                else:
                    wide = y.astype(np.float64)
                    total, weight = total + float(np.square(found - wide).sum()), weight + float(np.square(wide).sum())
        return total / weight if weight else 0.0

    def _divergence(self, expected: Array, found: Array) -> float:
        """The sum of KL(expected ‖ found) over rows; what is no number doesn't pass for a small loss."""
        total = 0.0
        p, q = _rows(expected), _rows(found)
        for first in range(0, len(p), ROWS):
            a, b = (self._logits(rows[first : first + ROWS]) for rows in (p, q))
            total += float(divergence(Rows.of(a), Rows.of(b)).sum())
        return total if np.isfinite(total) else float("inf")

    def _logits(self, rows: Array) -> Array:
        """Logits of the distributions [rows, classes]; of a classifier in the form that its judge reads."""
        if self._task != "classification":
            return rows
        given = probabilities(rows.astype(np.float64), self._scores)
        return np.asarray(np.log(np.maximum(given, np.finfo(np.float64).tiny)))

    def _outputs(self, sample: Mapping[str, Array], changed: Mapping[str, Array]) -> list[Array]:
        try:
            return run(self._session, {**sample, **self._own, **changed})
        except Exception as error:
            raise VerificationError(f"The model doesn't run on the calibration data: {first_line(error)}.") from error


def _opened(model: ir.Model, names: Sequence[str], judged: str | None) -> ir.Model:
    """A copy of a model with some initializers as inputs, and only the output that is judged; None: all of floats."""
    copy = model.clone()
    for name in names:
        value = copy.graph.initializers.pop(name)
        if value.const_value is not None:
            value.type = ir.TensorType(value.const_value.dtype)
            value.shape = ir.Shape(value.const_value.shape.numpy())
        value.const_value = None
        if value not in copy.graph.inputs:
            copy.graph.inputs.append(value)
    outputs = [
        value
        for value in copy.graph.outputs
        if (value.name == judged if judged is not None else value.dtype is not None and value.dtype.is_floating_point())
    ]
    if not outputs:
        raise VerificationError("The model has no output of floating-point numbers by which a change could be judged.")
    copy.graph.outputs[:] = outputs
    return copy


def _rows(output: Array) -> Array:
    return output.reshape(-1, output.shape[-1])
