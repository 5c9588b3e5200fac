"""What a model loses with other weights: a session, the samples, and what the original gave for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from graphopt.errors import VerificationError, first_line
from graphopt.graph.scratch import Mapped
from graphopt.graph.session_settings import SessionSettings
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.runtime_ops.scoring import ROWS
from graphopt.verification.quality.classification import Scores, probabilities
from graphopt.verification.quality.embedding import pooled
from graphopt.verification.quality.generic import cosine_of
from graphopt.verification.quality.language import Rows, divergence

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]
Changed: TypeAlias = Mapping[str, Array]
"""New contents of some weights by name."""
MEANING = "2"
"""Of a loss; those of another that were kept are made anew. 2: embedders are judged by their embeddings."""
_DISTRIBUTIONS = ("language", "classification")


@dataclasses.dataclass(frozen=True)
class TrialLoss:
    """What `graphopt.verification.trials.Trials` tells the loss of a trial by.

    Attributes:
        session: Of the model with the weights in question as inputs.
        own: What these are in the original.
        samples: Inputs.
        expected: The original's outputs for each sample.
        task: What the model is for.
        scores: What a classifier gives.
        mask: The input that says which tokens of an embedder count, or of a text; None: there is none.
        tokens: The input with the tokens that a language model is to foretell; None: it is judged by its distributions.
    """

    session: onnxruntime.InferenceSession
    own: Changed
    samples: Sequence[Mapping[str, Array]]
    expected: Sequence[Sequence[Array]]
    task: str | None
    scores: Scores
    mask: str | None
    tokens: str | None = None

    def loss(self, changed: Changed, samples: int | None = None) -> float:
        """See `Trials.loss`."""
        total = weight = 0.0
        for sample, expected in list(zip(self.samples, self.expected, strict=True))[:samples]:
            found_outputs = outputs(self.session, {**sample, **self.own, **changed})
            for y, found in zip(expected, found_outputs, strict=True):
                if self.tokens is not None:
                    surprise, tokens = self._surprise(sample, y, found)
                    total, weight = total + surprise, weight + tokens
                elif self.task in _DISTRIBUTIONS:
                    total, weight = total + self._divergence(y, found), weight + y.size // y.shape[-1]
                elif self.task == "embedding":
                    mask = None if self.mask is None else sample.get(self.mask)
                    vectors = zip(pooled(y, mask), pooled(found, mask), strict=True)
                    total, weight = total + sum(1 - cosine_of(a, b) for a, b in vectors), weight + len(y)
                else:
                    wide = y.astype(np.float64)
                    total, weight = total + float(np.square(found - wide).sum()), weight + float(np.square(wide).sum())
        loss = total / weight if weight else 0.0
        # What is no number doesn't pass for a small loss.
        return loss if np.isfinite(loss) else float("inf")

    def _surprise(self, sample: Mapping[str, Array], expected: Array, found: Array) -> tuple[float, float]:
        """The sum of ln p_expected(token) − ln p_found(token) over the tokens of a text, and how many these are."""
        assert self.tokens is not None
        ids = sample[self.tokens]
        counts = np.ones(ids.shape) if self.mask is None else sample[self.mask][:, -ids.shape[1] :]
        total = weight = 0.0
        for text, counted, p, q in zip(ids, counts, expected, found, strict=True):
            for first in range(0, len(text) - 1, ROWS):
                last = min(first + ROWS, len(text) - 1)
                # A token is foretold by what stands behind the one before it, where both are of the text.
                weights = (counted[first:last] * counted[first + 1 : last + 1]).astype(np.float64)
                before, after = (self._log_likelihood(y[first:last], text[first + 1 : last + 1]) for y in (p, q))
                total, weight = total + float((weights * (before - after)).sum()), weight + float(weights.sum())
        return total, weight

    @staticmethod
    def _log_likelihood(logits: Array, tokens: Array) -> npt.NDArray[np.float64]:
        rows = Rows.of(logits)
        return rows.logits[np.arange(len(tokens)), tokens].astype(np.float64) - rows.sums

    def _divergence(self, expected: Array, found: Array) -> float:
        """The sum of KL(expected ‖ found) over rows."""
        total = 0.0
        p, q = rows(expected), rows(found)
        for first in range(0, len(p), ROWS):
            a, b = (self._logits(both[first : first + ROWS]) for both in (p, q))
            total += float(divergence(Rows.of(a), Rows.of(b)).sum())
        return total

    def _logits(self, some: Array) -> Array:
        """Logits of the distributions [rows, classes]; of a classifier in the form that its judge reads."""
        if self.task != "classification":
            return some
        given = probabilities(some.astype(np.float64), self.scores)
        return np.asarray(np.log(np.maximum(given, np.finfo(np.float64).tiny)))


@dataclasses.dataclass(frozen=True)
class Work:
    """All that another process needs to make a `TrialLoss`; what is large lies in files.

    Attributes:
        model: The bytes of the model with the weights in question as inputs.
        folder: The root that its references to files begin at.
        requested: What it asks of a session.
        threads: Threads within an operator.
        own: As of `TrialLoss`, and so are the others.
    """

    model: bytes
    folder: str
    requested: SessionSettings
    threads: int
    own: Mapping[str, Mapped | Array]
    samples: Sequence[Mapping[str, Mapped | Array]]
    expected: Sequence[Sequence[Mapped | Array]]
    task: str | None
    scores: Scores
    mask: str | None
    tokens: str | None

    def opened(self) -> TrialLoss:
        """Make the session.

        Raises:
            VerificationError: ONNX Runtime doesn't load the model.
        """
        model = ir.from_proto(onnx.ModelProto.FromString(self.model))
        ir.external_data.set_base_dir(model.graph, self.folder)
        return TrialLoss(
            make_session(model, threads=self.threads, requested=self.requested),
            {name: found(array) for name, array in self.own.items()},
            [{name: found(array) for name, array in sample.items()} for sample in self.samples],
            [[found(array) for array in arrays] for arrays in self.expected],
            self.task,
            self.scores,
            self.mask,
            self.tokens,
        )


def found(array: Mapped | Array) -> Array:
    """The array, wherever it lies."""
    return array.array() if isinstance(array, Mapped) else array


def outputs(session: onnxruntime.InferenceSession, feeds: Mapping[str, Array]) -> list[Array]:
    """What a session gives.

    Raises:
        VerificationError: It doesn't run.
    """
    try:
        return run(session, feeds)
    except Exception as error:
        raise VerificationError(f"The model doesn't run on the calibration data: {first_line(error)}.") from error


def rows(output: Array) -> Array:
    """An output as rows along its last axis."""
    return output.reshape(-1, output.shape[-1])
