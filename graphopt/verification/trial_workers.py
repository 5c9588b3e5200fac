"""Processes that try candidates side by side, each with a session of its own made of the same files.

They are plain processes of Python that read candidates from one pipe and write losses to another: the program that runs
this needs no main module that can be imported again, and what ended shows as the end of a pipe. A process ends with
the pipe, so that none outlives the one that started it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from graphopt.errors import GraphoptError, GraphoptWarning, first_line
from graphopt.verification.trial_loss import Changed, TrialLoss, Work

_CODE = "import sys; sys.path[:] = {path!r}; from graphopt.verification.trial_workers import serve; serve()"
_LOOK_SECONDS = 1.0
"""How often the main thread looks up from waiting, where a system lets no interrupt through meanwhile."""
Try = Callable[[Changed, int | None], float]


class _Worker:
    """One process."""

    def __init__(self, work: bytes, threads: int) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (it goes away with the worker)
        limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**limits, **os.environ},
        )
        self._work: bytes | None = work

    def loss(self, changed: Changed, samples: int | None) -> float:
        """What a candidate loses.

        Raises:
            OSError, EOFError, pickle.UnpicklingError: The process ended.
            _FailedError: It can't do it.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._work is not None:
            self._process.stdin.write(self._work)
            self._work = None
        pickle.dump((dict(changed), samples), self._process.stdin, pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()
        answer = pickle.load(self._process.stdout)
        if not isinstance(answer, float):
            raise _FailedError(str(answer))
        return answer

    def ended(self, error: Exception) -> str:
        """Why it gives no losses, as part of a sentence; it is ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            # What closed its pipe is about to end, and how it did tells why.
            self._process.wait(0 if isinstance(error, _FailedError) else 5)
        code = self._process.poll()
        self.close()
        if isinstance(error, _FailedError):
            return f"said: {first_line(error)}"
        if code == -9:
            return "was killed, as systems do where memory runs out"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"ended with code {code}" + (f": {lines[-1]}" if lines else "")

    def close(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class _FailedError(Exception):
    """A process that lives says that it failed."""


class Workers:
    """Processes beside this one, which takes its part.

    Args:
        work: What they make their sessions of. It lies in files that must stay until `close`.
        count: How many are started.
    """

    def __init__(self, work: Work, count: int) -> None:
        self._workers: list[_Worker] = []
        self._threads = ThreadPoolExecutor(count + 1)
        self._here = threading.Lock()
        data = pickle.dumps(work, pickle.HIGHEST_PROTOCOL)
        try:
            for _ in range(count):
                self._workers.append(_Worker(data, work.threads))
        except OSError as error:
            _warn(f"No more than {len(self._workers) + 1} processes try candidates: {error.strerror}.")

    def __len__(self) -> int:
        """How many there are still."""
        return len(self._workers)

    def losses(self, here: TrialLoss, candidates: Iterable[Changed], samples: int | None) -> Iterator[float]:
        """What candidates lose, in their order.

        A candidate whose process ends or fails is tried again in this one, without that process from then on.

        Args:
            here: What tries candidates in this process.
            candidates: Read as they are needed.
            samples: As of `Trials.loss`.
        """

        def own(changed: Changed, samples: int | None) -> float:
            with self._here:
                return here.loss(changed, samples)

        lanes: dict[Try, _Worker | None] = {own: None, **{worker.loss: worker for worker in self._workers}}
        running: dict[Future[float], tuple[Try, int, Changed]] = {}
        known: dict[int, float] = {}
        waiting, following = enumerate(candidates), 0
        try:
            while True:
                busy = {lane for lane, _, _ in running.values()}
                for lane in [lane for lane in lanes if lane not in busy]:
                    given = next(waiting, None)
                    if given is None:
                        break
                    running[self._threads.submit(lane, given[1], samples)] = (lane, *given)
                while following in known:
                    yield known.pop(following)
                    following += 1
                if not running:
                    break
                for done in wait(running, _LOOK_SECONDS, FIRST_COMPLETED).done:
                    lane, index, changed = running.pop(done)
                    worker = lanes[lane]
                    try:
                        known[index] = done.result()
                    except Exception as error:
                        if worker is None:
                            raise
                        del lanes[lane]
                        self._workers.remove(worker)
                        _warn(f"A process that tried candidates {worker.ended(error)}. The search goes on without it.")
                        running[self._threads.submit(own, changed, samples)] = (own, index, changed)
        finally:
            if running:  # an error, an interrupt, or nobody wants to know the rest
                self.close()

    def close(self) -> None:
        """End all, whatever they do."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        self._threads.shutdown(wait=False, cancel_futures=True)


def _warn(message: str) -> None:
    warnings.warn(message, GraphoptWarning, stacklevel=2)


def serve() -> None:
    """What a process does: it reads its work, then candidates, and writes the loss of each, or why there is none."""
    # An interrupt is for the process that started this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    # What a library prints must not come between answers.
    os.dup2(2, 1)
    loss: TrialLoss | None = None
    with contextlib.suppress(EOFError, BrokenPipeError):
        work: Work | None = pickle.load(source)
        while True:
            changed, samples = pickle.load(source)
            answer: Any
            try:
                if work is not None:  # a model with small weights has them in these bytes
                    loss, work = work.opened(), None
                assert loss is not None
                answer = loss.loss(changed, samples)
            except (GraphoptError, MemoryError, OSError, ValueError) as error:
                answer = f"{type(error).__name__}: {first_line(error)}"
            pickle.dump(answer, answers, pickle.HIGHEST_PROTOCOL)
            answers.flush()
