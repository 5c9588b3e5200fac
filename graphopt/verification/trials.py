"""Trials: what a model loses where some of its weights are others, told by one session, with no model made anew.

The weights in question become inputs of the session. A run is given those that a trial changes, and for the rest what
the model has, which ONNX Runtime reads where it lies. Candidates that don't wait for one another are tried by several
processes, each with a session of its own on the same files.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import InputDataError, UsageError, VerificationError
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.scratch import Mapped, Scratch
from graphopt.graph.session_settings import read as read_settings
from graphopt.runtime_ops.machine import available_bytes, cores, own_bytes
from graphopt.runtime_ops.memory_session import WeightStore, make_session, with_references
from graphopt.verification.quality.classification import Scores, are_probabilities
from graphopt.verification.quality.tasks import guess_task
from graphopt.verification.trial_loss import Changed, TrialLoss, Work, found, outputs, rows
from graphopt.verification.trial_workers import Workers

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]
Judge = Literal["divergence", "perplexity"]

PAYS_SECONDS = 30.0
"""What the trials of a search must take in one process, at least, for more to be started without being asked for."""
PAYS_CORES = 4
"""Cores from which on they are: with two, ONNX Runtime's own threads leave little idle (see docs/calibration.md)."""
PROCESS_BYTES = 128 << 20
"""What a process takes before it has a session."""
SPARE = 0.8
"""The part of the free memory that processes may take, by what the first one took."""


class Trials:
    """A model on a few samples, with weights that can be exchanged.

    The loss of a trial is the mean divergence KL(original ‖ trial) of the distributions that a language model or a
    classifier gives, in nats; of an embedder the mean of 1 − cos(y, y') of a sample's two embeddings; of other models
    Σ |y − y'|² / Σ |y|² over their outputs of floats. By "perplexity" it is what the next tokens of the samples' own
    text lose in log-likelihood, the mean in nats, which is ln(perplexity / that of the original) and may be below 0. It
    is 0 for the model itself. Weights, samples and the original's outputs lie in a temporary file, so that memory
    doesn't grow with them.

    Processes share the threads: n of them have 1/n each. A loss hangs on the threads of its session as far as ONNX
    Runtime's operators do, and on nothing else, not on which process tells it. A process that ends is done without.

    Args:
        model: The model, which stays as it is.
        weights: Initializers of its main graph that trials exchange.
        samples: Inputs, an array each by name.
        threads: Threads within an operator, of all processes together; None: one for each core.
        jobs: Processes; None: one for each core as far as `together` and the memory that is free go (by what the first
            session takes), and one with fewer than `PAYS_CORES` or where all trials take less than `PAYS_SECONDS`.
        together: Candidates that `losses` is given at a time, at most.
        trials: How many are made in all, at least about; None: `together`.
        judge: What the loss is.

    Raises:
        VerificationError: The model doesn't run on the samples, or has no output of floats.
        InputDataError: There is no sample.
        UsageError: No perplexity can be told, since the model doesn't give logits for each token of a text.
    """

    def __init__(
        self,
        model: ir.Model,
        weights: Sequence[ir.Value],
        samples: Iterable[Mapping[str, Array]],
        *,
        threads: int | None = None,
        jobs: int | None = 1,
        together: int = 1,
        trials: int | None = None,
        judge: Judge = "divergence",
    ) -> None:
        # One for all: files that processes map stay until these have ended.
        self._scratch, self._store = Scratch(), WeightStore()
        own = {}
        for weight in weights:
            assert weight.name is not None
            assert weight.const_value is not None
            own[weight.name] = self._scratch.shared(weight.const_value.numpy())
        guess = guess_task(model)
        decoder = kv_interface(model) if guess.task == "language" else None
        judged = guess.output if decoder is None else decoder.logits
        tokens, mask = None, guess.mask
        if judge == "perplexity":
            if decoder is None or decoder.token_ids is None:
                raise UsageError("A perplexity can be told of a decoder that reads token ids and gives logits, alone.")
            tokens, mask = decoder.token_ids, decoder.attention_mask
        self._model = _opened(model, list(own), judged)
        kept = [{name: self._scratch.shared(array) for name, array in sample.items()} for sample in samples]
        if not kept:
            raise InputDataError("There is no sample to try changes of the weights on.")
        given = {name: found(array) for name, array in own.items()}
        feeds = [{name: found(array) for name, array in sample.items()} for sample in kept]
        all_threads = threads or cores()
        unknown = own_bytes() is None or available_bytes() is None
        alone = getattr(sys, "frozen", False) or (jobs is None and (all_threads < PAYS_CORES or unknown))
        self._jobs = min(1 if alone else jobs or all_threads, max(together, 1))

        def opened() -> onnxruntime.InferenceSession:
            self._threads = _shared(threads, all_threads, self._jobs)
            return make_session(self._model, threads=self._threads, store=self._store)

        def answered() -> list[list[Mapped | Array]]:
            return [[self._scratch.shared(y) for y in outputs(session, {**sample, **given})] for sample in feeds]

        if jobs is None and self._jobs > 1:
            with _PeakMemory() as memory:
                session = opened()
                outputs(session, {**feeds[0], **given})
            if (fitting := memory.fitting()) < self._jobs:
                self._jobs = fitting
                del session
                session = opened()
        else:
            session = opened()
        begin = time.perf_counter()
        expected = answered()
        seconds = (time.perf_counter() - begin) * (trials or together)
        if jobs is None and self._jobs > 1 and seconds < PAYS_SECONDS:
            # With all threads, and what these give, since a loss hangs on them.
            self._jobs = 1
            del session
            session = opened()
            expected = answered()
        arrays = [[found(y) for y in ys] for ys in expected]
        if tokens is not None and any(
            ys[0].shape[:2] != sample[tokens].shape for ys, sample in zip(arrays, feeds, strict=True)
        ):
            raise UsageError("No perplexity can be told of a model that gives logits of the last token alone.")
        scores: Scores = "logits"
        if guess.task == "classification" and all(are_probabilities(rows(y)) for ys in arrays for y in ys):
            scores = "probabilities"
        self._here = TrialLoss(session, given, feeds, arrays, guess.task, scores, mask, tokens)
        self._shared = own, kept, expected
        self._workers: Workers | None = None

    def __len__(self) -> int:
        """How many samples there are."""
        return len(self._here.samples)

    @property
    def jobs(self) -> int:
        """How many processes try candidates."""
        return self._jobs

    def loss(self, changed: Changed, samples: int | None = None) -> float:
        """What the model loses with these weights.

        Args:
            changed: New contents by the weight's name, in its shape and type.
            samples: How many of the samples it is judged on, the first ones; None: all.

        Raises:
            VerificationError: It doesn't run.
        """
        return self._here.loss(changed, samples)

    def losses(self, candidates: Iterable[Changed], samples: int | None = None) -> Iterator[float]:
        """What the model loses with each of several candidates, as soon as it is known, in their order.

        Args:
            candidates: As of `loss`; read as they are needed, so that they needn't lie in memory together.
            samples: As of `loss`.

        Raises:
            VerificationError: One doesn't run.
        """
        if self._jobs > 1 and self._workers is None:
            self._workers = self._started()
        if self._workers is None or not len(self._workers):
            yield from (self.loss(changed, samples) for changed in candidates)
        else:
            yield from self._workers.losses(self._here, candidates, samples)

    def close(self) -> None:
        """End the other processes; what is tried from then on is tried in this one."""
        self._jobs = 1
        if self._workers is not None:
            self._workers.close()

    def _started(self) -> Workers:
        data, folder = with_references(self._model, self._store)
        own, kept, expected = self._shared
        here, threads, settings = self._here, self._threads, read_settings(self._model)
        assert threads is not None
        work = Work(
            data, folder, settings, threads, own, kept, expected, here.task, here.scores, here.mask, here.tokens
        )
        workers = Workers(work, self._jobs - 1)
        weakref.finalize(self, workers.close)
        return workers


def _shared(threads: int | None, all_threads: int, jobs: int) -> int | None:
    """The threads of one process; None where ONNX Runtime chooses."""
    return threads if jobs == 1 else max(1, all_threads // jobs)


class _PeakMemory:
    """How much memory of its own this process takes at most, beyond what it had at first; a context."""

    def __init__(self) -> None:
        self._first = own_bytes()
        self._peak = self._first or 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def fitting(self) -> int:
        """How many processes like this one fit; one where the system doesn't tell."""
        free = available_bytes()
        if self._first is None or free is None:
            return 1
        return 1 + max(0, int(SPARE * free / (self._peak - self._first + PROCESS_BYTES)))

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._look()

    def _look(self) -> None:
        self._peak = max(self._peak, own_bytes() or 0)


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
