"""Run work in processes of its own, with a limit of time, and measure what each takes.

    python benchmarks/export_matrix_worker.py export_matrix_tools:graphopt jobs.json

The file holds a list of jobs: `record`, the file that gets the outcome, `arguments` of the function, and `limit` in
seconds. Libraries are imported once (by the function's module's `prepare`, given the function's name); each job then
runs in a fork, so that no job pays for imports, and none sees what another left behind. Runs in any interpreter.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.01


@dataclasses.dataclass
class Outcome:
    """What became of one piece of work.

    Attributes:
        value: What the work returned.
        error: Why it didn't, in one line; empty where it did.
        seconds: Seconds of wall time.
        cpu_seconds: Seconds of processors, of child processes too.
        base_mb: Private memory (RssAnon) of the process at the start, in 10**6 bytes: libraries.
        peak_mb: The most private memory that was seen, looked at every hundredth of a second.
    """

    value: Any = None
    error: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    base_mb: float = 0.0
    peak_mb: float = 0.0


def main() -> None:
    """Do the jobs of a file, one after the other."""
    place, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    module_name, _, name = place.partition(":")
    try:
        module = importlib.import_module(module_name)
        module.prepare(name)
        work = getattr(module, name)
    except ImportError as error:
        for job in jobs:
            write(job, Outcome(error=f"not installed: {error}"))
        return
    for job in jobs:
        write(job, forked(lambda arguments=job["arguments"]: work(**arguments), job["limit"]))


def write(job: Mapping[str, Any], outcome: Outcome) -> None:
    """Keep the outcome in the job's record."""
    record = Path(job["record"])
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(dataclasses.asdict(outcome)) + "\n")


def forked(work: Callable[[], Any], limit: float) -> Outcome:
    """Do the work in a fork of this process, which is ended with all that it started after `limit` seconds.

    What the work prints is dropped. It returns something that JSON can hold.
    """
    start = time.perf_counter()
    with tempfile.NamedTemporaryFile() as told:
        child = os.fork()
        if child == 0:
            _run(work, told.name)
        base = peak = _private(child)
        late = False
        while True:
            done, status, usage = os.wait4(child, os.WNOHANG)
            if done:
                break
            now = _private(child)
            base, peak = base or now, max(peak, now)
            if time.perf_counter() - start > limit and not late:
                late = True
                _end(child)
            time.sleep(POLL_SECONDS)
        _end(child)
        outcome = Outcome(
            seconds=round(time.perf_counter() - start, 2),
            cpu_seconds=round(usage.ru_utime + usage.ru_stime, 2),
            base_mb=round(base / 1e6, 1),
            peak_mb=round(peak / 1e6, 1),
        )
        text = Path(told.name).read_text()
    if late:
        outcome.error = f"it took more than {limit:g} s"
    elif not text:
        outcome.error = f"its process died of {_cause_of_death(status)}"
    else:
        outcome.value, outcome.error = json.loads(text)
    return outcome


def _run(work: Callable[[], Any], told: str) -> None:
    """The child: do the work, tell, and end without anything that the parent would do at its end."""
    try:
        os.setsid()
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        try:
            answer: tuple[Any, str] = (work(), "")
        except BaseException as error:
            answer = (None, reason(error))
        text = json.dumps(answer)
        Path(told).write_text(text)
    finally:
        os._exit(0)


def _end(child: int) -> None:
    """End the child's session: itself, and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)


def _private(process: int) -> int:
    """Bytes of memory that belong to no file (RssAnon); 0 where the process is gone."""
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def _cause_of_death(status: int) -> str:
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"


def reason(error: BaseException) -> str:
    """The type and the first line of the error at the bottom of a chain: exporters wrap it in advice.

    A sentence of graphopt's own is complete.
    """
    if not _own(error):
        while error.__cause__ is not None:
            error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A line that announces the next one says nothing alone.
    count = next((i for i, line in enumerate(lines, start=1) if not line.endswith(":")), len(lines))
    said = " ".join(lines[:count])[:300]
    return said if _own(error) else f"{type(error).__name__}: {said}"


def _own(error: BaseException) -> bool:
    return type(error).__module__ == "graphopt.errors"


if __name__ == "__main__":
    main()
