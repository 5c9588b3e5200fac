"""Trials of several processes."""

from __future__ import annotations

import _thread
import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from graphopt.errors import GraphoptWarning, VerificationError
from graphopt.verification import trials as module
from graphopt.verification.trials import Trials

Array = npt.NDArray[Any]
X = np.random.default_rng(1).standard_normal((300, 128)).astype(np.float32)
"""Large enough to lie in a file, and so are the weights."""
TEXT = """
<ir_version: 10, opset_import: ["" : 20]>
agraph (float[n, 128] x) => (float[n, 64] y) {
    h = MatMul (x, a)
    t = Tanh (h)
    y = MatMul (t, b)
}
"""


def made(**options: Any) -> Trials:
    """Trials of a model of two weights on two samples."""
    model, rng = ir.from_onnx_text(TEXT), np.random.default_rng(0)
    for name, shape in (("a", (128, 128)), ("b", (128, 64))):
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=name)
        model.graph.initializers[name] = value
    weights = list(model.graph.initializers.values())
    return Trials(model, weights, [{"x": X}, {"x": X[::-1].copy()}], **{"threads": 2, "together": 8, **options})


def candidates(count: int = 8) -> list[dict[str, Array]]:
    return [{"b": np.full((128, 64), 1 + i / 7, np.float32)} for i in range(count)]


@pytest.fixture(scope="module")
def wanted() -> list[float]:
    """What one process gives."""
    return [made(threads=1, jobs=1).loss(changed) for changed in candidates()]


def started(trials: Trials) -> list[subprocess.Popen[bytes]]:
    """Its processes; they are started."""
    trials._workers = trials._workers or trials._started()
    return [worker._process for worker in trials._workers._workers]


class Slow:
    """What this process does of the trials, which takes its time at first."""

    def __init__(self, trials: Trials, seconds: float) -> None:
        self.own, self.seconds, self.done = trials._here, seconds, 0

    def put(self, trials: Trials) -> Slow:
        started(trials)
        trials._here = self  # type: ignore[assignment]
        return self

    def loss(self, changed: Mapping[str, Array], samples: int | None) -> float:
        self.done += 1
        time.sleep(self.seconds)
        return self.own.loss(changed, samples)


def test_processes_give_what_one_gives_bit_for_bit(wanted: list[float]) -> None:
    trials = made(jobs=2)
    assert trials.jobs == 2
    (process,) = started(trials)
    assert list(trials.losses(candidates())) == wanted
    assert list(trials.losses(candidates()[::-1])) == wanted[::-1]
    alone = made(threads=1, jobs=1)
    assert list(trials.losses(candidates(3), 1)) == [alone.loss(changed, 1) for changed in candidates(3)]
    assert list(trials.losses([])) == []
    assert started(trials) == [process]
    assert process.poll() is None
    del trials
    assert process.poll() is not None


def test_candidates_are_read_as_they_are_needed_and_all_processes_take_a_part(wanted: list[float]) -> None:
    trials, read = made(jobs=2), []
    here = Slow(trials, 0.5).put(trials)

    def some() -> Iterator[dict[str, Array]]:
        for number, changed in enumerate(candidates()):
            read.append(number)
            yield changed

    found = trials.losses(some())
    assert next(found) == wanted[0]
    assert len(read) <= 5
    here.seconds = 4
    assert [wanted[0], *found] == wanted
    assert here.done < len(wanted)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_process_that_dies_is_done_without(wanted: list[float], when: str) -> None:
    trials = made(jobs=3, threads=3)
    first, second = started(trials)
    if when == "before":
        first.kill()
    else:
        Slow(trials, 1).put(trials)
        first.send_signal(signal.SIGSTOP)  # It holds a candidate when it dies.
        threading.Timer(2, first.kill).start()
    with pytest.warns(GraphoptWarning, match="process that tried candidates was killed, as systems do where memory"):
        assert list(trials.losses(candidates())) == wanted
    assert started(trials) == [second]
    second.kill()
    with pytest.warns(GraphoptWarning, match="goes on without it"):
        assert list(trials.losses(candidates())) == wanted
    assert list(trials.losses(candidates())) == wanted


def test_a_process_that_cant_make_its_session_is_done_without(
    wanted: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = made(jobs=2)
    own, kept, expected = trials._shared
    broken = {name: dataclasses.replace(place, path=f"{place.path}.gone") for name, place in own.items()}  # type: ignore[type-var]
    trials._shared = broken, kept, expected  # type: ignore[assignment]
    with pytest.warns(GraphoptWarning, match="candidates said: FileNotFoundError"):
        assert list(trials.losses(candidates())) == wanted
    trials = made(jobs=2)
    monkeypatch.setattr(sys, "executable", "/there/is/no/python")
    with pytest.warns(GraphoptWarning, match="No more than 1 processes try candidates: No such file"):
        assert list(trials.losses(candidates())) == wanted


@pytest.mark.filterwarnings("ignore:A process that tried candidates said")
def test_a_candidate_that_doesnt_run_is_an_error_as_in_one_process() -> None:
    trials = made(jobs=2)
    processes = started(trials)
    with pytest.raises(VerificationError, match="doesn't run on the calibration data"):
        list(trials.losses([{"b": np.zeros((3, 3), np.float32)}] * 4))
    trials.close()
    assert [process.poll() is None for process in processes] == [False]


@pytest.mark.parametrize("how", ["interrupted", "abandoned"])
def test_nothing_goes_on_behind_a_search_that_ended(how: str, wanted: list[float]) -> None:
    trials = made(jobs=2)
    (process,) = started(trials)
    here = Slow(trials, 0.5).put(trials)
    found = trials.losses(candidates())
    assert next(found) == wanted[0]
    if how == "interrupted":
        here.seconds = 3
        process.send_signal(signal.SIGSTOP)
        # Tests that run in the background of a shell have interrupts ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            threading.Timer(0.5, _thread.interrupt_main).start()
            begin = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                list(found)
            assert time.monotonic() - begin < 2.9
        finally:
            signal.signal(signal.SIGINT, before)
    else:
        found.close()
    assert process.poll() is not None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_process_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    # The program has no guard against being imported again by its processes.
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import sys, time
            from verification.test_trial_workers import candidates, made
            trials = made(jobs=2)
            list(trials.losses(candidates()))
            print(trials._workers._workers[0]._process.pid, flush=True)
            time.sleep(600)
        """)
    )
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    with subprocess.Popen(
        [sys.executable, program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            return
        time.sleep(0.1)
    raise AssertionError("the process goes on")


def test_processes_are_as_many_as_pay_and_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "cores", lambda: 6)
    assert made(jobs=None, threads=None).jobs == 1  # all trials of it take less than starting a process
    monkeypatch.setattr(module, "PAYS_SECONDS", 0.0)
    monkeypatch.setattr(module, "available_bytes", lambda: 64 << 30)
    assert (made(jobs=None, threads=None).jobs, made(jobs=None, threads=None)._threads) == (6, 1)
    assert (made(jobs=None, threads=None, together=3).jobs, made(jobs=None, threads=4, together=2)._threads) == (3, 2)
    assert made(jobs=None, threads=3).jobs == 1  # few threads are busy in one process, too
    assert made(jobs=None, threads=None, together=1).jobs == made(threads=None, jobs=4, together=1).jobs == 1
    for free, jobs, threads in ((0, 1, None), (module.PROCESS_BYTES * 3 // 2, 2, 3)):
        monkeypatch.setattr(module, "available_bytes", lambda free=free: free)
        monkeypatch.setattr(module, "own_bytes", lambda: 1 << 30)
        trials = made(jobs=None, threads=None)
        assert (trials.jobs, trials._threads) == (jobs, threads)
    assert made(jobs=3, threads=None).jobs == 3  # what is asked for is done
    monkeypatch.setattr(module, "available_bytes", lambda: None)
    assert made(jobs=None, threads=None).jobs == 1
