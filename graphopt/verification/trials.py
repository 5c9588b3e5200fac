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
from graphopt.verification.quality.language import Rows, divergence
from graphopt.verification.quality.tasks import guess_task

Array = npt.NDArray[Any]
_DISTRIBUTIONS = ("language", "classification")


class Trials:
    """A model on a few samples, with weights that can be exchanged.

    The loss of a trial is the mean divergence KL(original ‖ trial) of the distributions that a language model or a
    classifier gives, in nats; of other models Σ |y − y'|² / Σ |y|² over their outputs of floats. It is 0 for the model
    itself. Weights and the original's outputs lie in a temporary file, so that memory doesn't grow with either.

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
        task = guess_task(model).task
        decoder = kv_interface(model) if task == "language" else None
        self._distributions = task in _DISTRIBUTIONS
        judged = [decoder.logits] if decoder is not None and decoder.logits is not None else None
        self._session = make_session(_opened(model, names, judged), threads=threads)
        self._samples = [dict(sample) for sample in samples]
        if not self._samples:
            raise InputDataError("There is no sample to try changes of the weights on.")
        self._expected = [[self._scratch.array(y) for y in self._outputs(sample, {})] for sample in self._samples]

    def loss(self, changed: Mapping[str, Array]) -> float:
        """What the model loses with these weights.

        Args:
            changed: New contents by the weight's name, in its shape and type.

        Raises:
            VerificationError: It doesn't run.
        """
        total = weight = 0.0
        for sample, expected in zip(self._samples, self._expected, strict=True):
            for y, found in zip(expected, self._outputs(sample, changed), strict=True):
                if self._distributions:
                    total, weight = total + _divergence(y, found), weight + y.size // y.shape[-1]
                else:
                    wide = y.astype(np.float64)
                    total, weight = total + float(np.square(found - wide).sum()), weight + float(np.square(wide).sum())
        return total / weight if weight else 0.0

    def _outputs(self, sample: Mapping[str, Array], changed: Mapping[str, Array]) -> list[Array]:
        try:
            return run(self._session, {**sample, **self._own, **changed})
        except Exception as error:
            raise VerificationError(f"The model doesn't run on the calibration data: {first_line(error)}.") from error


def _opened(model: ir.Model, names: Sequence[str], judged: Sequence[str] | None) -> ir.Model:
    """A copy of a model with some initializers as inputs, and only the outputs that are judged."""
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
        if (value.name in judged if judged is not None else value.dtype is not None and value.dtype.is_floating_point())
    ]
    if not outputs:
        raise VerificationError("The model has no output of floating-point numbers by which a change could be judged.")
    copy.graph.outputs[:] = outputs
    return copy


def _divergence(expected: Array, found: Array) -> float:
    """The sum of KL(expected ‖ found) over rows of logits; nothing that is no number passes for a small loss."""
    p, q = (array.reshape(-1, array.shape[-1]) for array in (expected, found))
    total = 0.0
    for first in range(0, len(p), ROWS):
        part = slice(first, first + ROWS)
        total += float(divergence(Rows.of(p[part]), Rows.of(q[part])).sum())
    return total if np.isfinite(total) else float("inf")
