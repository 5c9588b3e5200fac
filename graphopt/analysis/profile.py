"""Target profiles: what was measured to run fastest on a machine, and a cost model between the points measured.

A profile holds, for each choice of `graphopt.analysis.choices`, the times of its alternatives over a grid of
(rows, width) and thread counts, each with its uncertainty and an A/A control. Between the points, the logarithm of the
ratio of two alternatives is interpolated linearly in the logarithms of rows and width; beyond them it is that of the
nearest point, and the uncertainty grows with the distance.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graphopt.analysis.choices import CHOICES, TOKEN_ROWS
from graphopt.errors import UsageError

FORMAT = 1
MARGIN = 0.05
"""An alternative must be faster than the default by this share, beyond its uncertainty, at some shape."""
DRIFT = 0.05
"""Uncertainty added for each factor of two beyond the points measured."""
DOUBTFUL = 0.25
"""A point whose ratio is no better known than this says nothing for an alternative."""
BLOCKED = 1.1
"""Wall time over that of the default, beyond its noise, from which an alternative counts as slower whatever its CPU
time."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """How one alternative did at one point.

    Attributes:
        cpu_us: Median CPU time of one block over all threads, in microseconds.
        wall_us: Median wall-clock time of one block, in microseconds.
        cpu_ratio: Median of the rounds' ratios of CPU time to that of the choice's first alternative.
        wall_ratio: The same of wall-clock time.
        cpu_noise: Half the width of the 95 % confidence interval of `cpu_ratio`, or half the distance between the two
            sessions that it was measured in, whichever is larger.
        wall_noise: The same of `wall_ratio`.
    """

    cpu_us: float
    wall_us: float
    cpu_ratio: float
    wall_ratio: float
    cpu_noise: float
    wall_noise: float


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured of one choice at one point.

    Attributes:
        choice: Name of the choice.
        rows: Rows (tokens in the batch, or pixels).
        width: Width (features, or channels).
        threads: Threads within an operator.
        alternatives: The measurements by alternative, the baseline first.
        control: The baseline in its second session over the same in its first: how far it seems from itself.
    """

    choice: str
    rows: int
    width: int
    threads: int
    alternatives: dict[str, Measured]
    control: Measured


@dataclasses.dataclass(frozen=True)
class Executed:
    """What the runtime makes of an alternative and its neighbours by default.

    Attributes:
        operators: The operators executed, in order of their first use; empty where it doesn't run the alternative.
        graph: Stands for the whole graph executed: alternatives with the same one are the same to the runtime, and
            only the first of them is timed.
    """

    operators: tuple[str, ...]
    graph: str


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Time of one alternative over that of another.

    Attributes:
        cpu: Ratio of CPU times; below 1 the first one is faster.
        cpu_noise: How far from 1 it may be without saying anything.
        wall: Ratio of wall-clock times.
        wall_noise: The same for it.
    """

    cpu: float
    cpu_noise: float
    wall: float
    wall_noise: float

    @property
    def faster(self) -> bool:
        """Whether the first alternative is faster beyond noise and margin."""
        return self.cpu + max(self.cpu_noise, MARGIN) < 1 and not self.slower

    @property
    def slower(self) -> bool:
        """Whether the first alternative is slower beyond noise."""
        return self.cpu - self.cpu_noise > 1 or self.wall - self.wall_noise > BLOCKED


@dataclasses.dataclass(frozen=True)
class Profile:
    """What was measured of a runtime on a machine.

    Attributes:
        runtime: Name and version of the runtime.
        cpu: The processor's name.
        cores: Processors that the measuring process could use.
        threads: Thread counts measured.
        date: Day of the measurement, as YYYY-MM-DD.
        seconds: How long the measurement took.
        entries: What was measured.
        executed: What the runtime really executed, by choice and alternative.
    """

    runtime: str
    cpu: str
    cores: int
    threads: tuple[int, ...]
    date: str
    seconds: float
    entries: tuple[Entry, ...]
    executed: dict[str, dict[str, Executed]] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def _points(self) -> dict[tuple[str, int], dict[tuple[int, int], Entry]]:
        """The entries by choice and threads, then by (rows, width)."""
        points: dict[tuple[str, int], dict[tuple[int, int], Entry]] = {}
        for entry in self.entries:
            points.setdefault((entry.choice, entry.threads), {})[entry.rows, entry.width] = entry
        return points

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits that stand for the profile's contents."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()[:12]

    def default(self, choice: str) -> str:
        """The default of a choice with the runtime measured."""
        return CHOICES[choice].default_for(_version(self.runtime))

    @property
    def description(self) -> str:
        """What was measured and when, without the machine."""
        threads = " and ".join(map(str, self.threads))
        return f"{self.runtime}, {threads} thread{'s' if self.threads != (1,) else ''}, measured on {self.date}"

    def compare(
        self, choice: str, alternative: str, over: str, rows: int, width: int, threads: int
    ) -> Comparison | None:
        """Time of `alternative` over that of `over`, interpolated; None where nothing was measured."""
        alternative, over = (self._representative(choice, name) for name in (alternative, over))
        if alternative == over:
            return Comparison(1.0, 0.0, 1.0, 0.0)
        measured = self._points.get((choice, threads), {})
        points = {at: e for at, e in measured.items() if {alternative, over} <= e.alternatives.keys()}
        if not points:
            return None
        cpu = wall = cpu_noise = wall_noise = 0.0
        for at, weight in _corners(points, rows, width):
            entry = points[at]
            first, second, control = entry.alternatives[alternative], entry.alternatives[over], entry.control
            cpu += weight * math.log(first.cpu_ratio / second.cpu_ratio)
            wall += weight * math.log(first.wall_ratio / second.wall_ratio)
            # What the control seems away from itself is noise as well; the mean of its two sessions halves it.
            cpu_noise += weight * max(first.cpu_noise, second.cpu_noise, abs(control.cpu_ratio - 1) / 2)
            wall_noise += weight * max(first.wall_noise, second.wall_noise, abs(control.wall_ratio - 1) / 2)
        outside = DRIFT * _octaves_outside(points, rows, width)
        return Comparison(math.exp(cpu), cpu_noise + outside, math.exp(wall), wall_noise + outside)

    def ratio(self, choice: str, alternative: str, over: str, rows: int, width: int, threads: int) -> float | None:
        """CPU time of `alternative` over that of `over` at a shape, or None where nothing was measured."""
        found = self.compare(choice, alternative, over, rows, width, threads)
        return None if found is None else found.cpu

    def prefers(self, choice: str, shapes: Sequence[tuple[int, int]]) -> str:
        """The alternative that is never slower than the choice's default at `shapes`, and faster at some; the default
        where there is none.

        Args:
            choice: Name of the choice.
            shapes: The (rows, width) that matter; every thread count of the profile is looked at.

        Raises:
            KeyError: There is no such choice.
        """
        known = CHOICES[choice]
        default = self.default(choice)
        best, best_mean = default, 1.0
        for alternative in known.alternatives:
            if alternative == default:
                continue
            found = [
                self.compare(choice, alternative, default, rows, width, threads)
                for rows, width in shapes
                for threads in self.threads
            ]
            measured = [f for f in found if f is not None]
            if not measured or len(measured) < len(found) or any(f.cpu_noise > DOUBTFUL for f in measured):
                continue
            mean = math.exp(sum(math.log(f.cpu) for f in measured) / len(measured))
            safe = not any(f.slower for f in measured) and mean < 1 - MARGIN
            if safe and any(f.faster for f in measured) and mean < best_mean:
                best, best_mean = alternative, mean
        return best

    def same(self, choice: str, alternative: str, other: str) -> bool:
        """Whether the runtime makes the same graph of two alternatives."""
        return self._representative(choice, alternative) == self._representative(choice, other)

    def _representative(self, choice: str, alternative: str) -> str:
        """The first alternative that the runtime makes the same graph of."""
        executed = self.executed.get(choice, {})
        if not (own := executed.get(alternative)) or not own.operators:
            return alternative
        return next(name for name, other in executed.items() if other.graph == own.graph)

    # ---- files

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON data."""
        return {"format": FORMAT, **dataclasses.asdict(self)}

    def dumps(self) -> str:
        """The text of the profile's file: the same profile gives the same bytes."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_dict(cls, data: Any) -> Profile:
        """A profile from JSON data.

        Raises:
            ValueError: Not the data of a profile.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"it has not the format {FORMAT} of a profile")
        try:
            entries = tuple(_entry(e) for e in data["entries"])
            return cls(
                str(data["runtime"]), str(data["cpu"]), int(data["cores"]), tuple(int(t) for t in data["threads"]),
                str(data["date"]), float(data["seconds"]), entries,
                {str(c): {str(a): Executed(tuple(map(str, e["operators"])), str(e["graph"])) for a, e in by.items()}
                 for c, by in data["executed"].items()},
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"an entry is missing or wrong ({type(error).__name__}: {error})") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the profile to a file, atomically.

        Raises:
            UsageError: The file can't be written.
        """
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(self.dumps(), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise UsageError(f"The profile can't be written to {path}: {error.strerror or error}.") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def preferred(profile: Profile | None, choice: str, width: int | None, rows: int | None = None) -> str:
    """What a pass should use: the alternative that `profile` prefers at a width, or the default without one.

    Args:
        profile: The profile, or None.
        choice: Name of the choice.
        width: Features or channels; None where it isn't known, and then all widths measured count.
        rows: Tokens or pixels where the graph fixes them; None: the usual ones.
    """
    known = CHOICES[choice]
    if profile is None:
        return known.default_for(_installed())
    usual = TOKEN_ROWS if known.layout != "image" else known.rows
    shapes = [(r, w) for r in ((rows,) if rows else usual) for w in ((width,) if width else known.widths)]
    return profile.prefers(choice, shapes)


def load(path: str | os.PathLike[str]) -> Profile:
    """Read a profile.

    Raises:
        UsageError: There is none, or it isn't one.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"The profile {path} can't be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no target profile: it isn't text.") from error
    try:
        return Profile.from_dict(json.loads(text))
    except ValueError as error:
        raise UsageError(
            f"{path} is no target profile: {str(error).rstrip('.')}; `graphopt target --measure` makes one."
        ) from error


def _version(text: str) -> tuple[int, int] | None:
    """(1, 31) of "ONNX Runtime 1.31.1"."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return None if found is None else (int(found[1]), int(found[2]))


@functools.cache
def _installed() -> tuple[int, int] | None:
    """The version of the installed ONNX Runtime, without importing it; None where there is none."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return _version(importlib.metadata.version(package))
    return None


# ---- the cost model


def _corners(points: dict[tuple[int, int], Entry], rows: int, width: int) -> list[tuple[tuple[int, int], float]]:
    """The points around a shape with their weights, which sum to 1."""
    found = []
    for r, by_rows in _bracket(sorted({r for r, _ in points}), rows):
        # A width may be missing at some rows where a measurement was cut short.
        for w, by_width in _bracket(sorted({w for at, w in points if at == r}), width):
            found.append(((r, w), by_rows * by_width))
    return found


def _bracket(known: list[int], wanted: int) -> list[tuple[int, float]]:
    """The neighbours of `wanted` among `known`, weighted by how near they are on a logarithmic scale."""
    if wanted <= known[0]:
        return [(known[0], 1.0)]
    if wanted >= known[-1]:
        return [(known[-1], 1.0)]
    index = bisect.bisect_left(known, wanted)
    low, high = known[index - 1], known[index]
    share = math.log(wanted / low) / math.log(high / low)
    return [(low, 1 - share), (high, share)] if share < 1 else [(high, 1.0)]


def _octaves_outside(points: dict[tuple[int, int], Entry], rows: int, width: int) -> float:
    """By how many factors of two a shape lies outside of the points, both directions added."""
    total = 0.0
    for axis, wanted in enumerate((rows, width)):
        known = [at[axis] for at in points]
        total += max(0.0, math.log2(min(known) / wanted), math.log2(wanted / max(known)))
    return total


def _entry(data: Any) -> Entry:
    def measured(d: Any) -> Measured:
        found = Measured(**{f.name: float(d[f.name]) for f in dataclasses.fields(Measured)})
        if not all(math.isfinite(v) and v >= 0 for v in dataclasses.astuple(found)) or not (
            found.cpu_ratio > 0 and found.wall_ratio > 0
        ):
            raise ValueError("a time isn't a positive number")
        return found

    entry = Entry(
        str(data["choice"]), int(data["rows"]), int(data["width"]), int(data["threads"]),
        {str(name): measured(d) for name, d in data["alternatives"].items()}, measured(data["control"]),
    )  # fmt: skip
    if min(entry.rows, entry.width, entry.threads) < 1 or not entry.alternatives:
        raise ValueError("a shape isn't positive")
    return entry
