"""Every CUDA launcher of the library, held against PyTorch on a GPU and timed beside what the GPU can do at most.

    python benchmarks/cuda_operators.py                         builds the library, checks and times everything
    python benchmarks/cuda_operators.py --operators HadamardTransform KroneckerTransform
    python benchmarks/cuda_operators.py --library libgraphopt_ops.so --page docs/cuda.md

benchmarks/cuda_cases/ has the cases, a file for each operator. A launch is timed by CUDA events with its operands in
the GPU's memory, not in its cache: something larger is written before each. Its limit is the larger of two times: of
its least bytes at the speed of a large copy, and of its least operations at the speed of a large product of matrices in
its arithmetic, both measured in the same run. The exit status is 1 where a launcher is wrong, and 2 where there is
nothing to run it on.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cuda_case import Arithmetic, Call, Case, all_cases, largest_difference
from cuda_launchers import Launchers, Unavailable, built, gpu

ROUNDS = 30


@dataclasses.dataclass(frozen=True)
class Limits:
    """What the GPU can do at most, as measured.

    Attributes:
        bandwidth: Bytes a second.
        speed: Operations a second by arithmetic.
    """

    bandwidth: float
    speed: dict[Arithmetic, float]

    def seconds(self, call: Call) -> tuple[float, str]:
        """The least time of a call, and what it is the limit of."""
        memory, work = call.bytes / self.bandwidth, call.operations / self.speed[call.arithmetic]
        return (memory, "memory") if memory >= work else (work, call.arithmetic)


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        case: The case.
        difference: See `cuda_case.largest_difference`; above 1 it is wrong.
        seconds: The median of a launch; None: it isn't timed.
        limit: The least it could be, and of what.
        error: What CUDA says where it can't be launched.
    """

    case: Case
    difference: float
    seconds: float | None = None
    limit: tuple[float, str] | None = None
    error: str = ""

    @property
    def right(self) -> bool:
        return not self.error and self.difference <= 1


def seconds_of(torch: Any, run: Callable[[], object], flush: Any, rounds: int = ROUNDS) -> float:
    """The median of so many runs on the GPU, with what they touch not in its cache."""
    times = []
    for number in range(rounds + 3):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def measured_limits(torch: Any, flush: Any) -> Limits:
    """The limits of the GPU at hand."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / seconds_of(torch, lambda: target.copy_(source), flush)
    size = 8192
    operations = 2 * size**3
    torch.backends.cuda.matmul.allow_tf32 = False
    floats = torch.randn(size, size, device="cuda")
    halves = floats.half()
    integers = torch.randint(-127, 128, (size, size), device="cuda").to(torch.int8)
    turned = integers.t()  # its rows are columns, as the kernels of integers want them
    return Limits(
        bandwidth,
        {
            "float32": operations / seconds_of(torch, lambda: floats @ floats, flush, 10),
            "float16 tensor": operations / seconds_of(torch, lambda: halves @ halves, flush, 10),
            "int8 tensor": operations / seconds_of(torch, lambda: torch._int_mm(integers, turned), flush, 10),
        },
    )


def judge(torch: Any, launchers: Launchers, case: Case, limits: Limits | None, flush: Any) -> Result:
    """Run a case, compare, and time it where there are limits."""
    try:
        call = case.make(torch, "cuda", launchers)
        stream = torch.cuda.current_stream().cuda_stream
        launchers.launch(case.launcher, call.arguments, stream)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return Result(case, float("inf"), error=str(error).splitlines()[0])
    difference = largest_difference(call)
    if limits is None or not case.timed:
        return Result(case, difference)
    seconds = seconds_of(torch, lambda: launchers.launch(case.launcher, call.arguments, stream), flush)
    return Result(case, difference, seconds, limits.seconds(call))


def table(results: list[Result]) -> str:
    """What was timed, as a table in Markdown, and what is wrong."""
    lines = ["| operator | launcher | shape | µs | limit µs | achieved | limit |", "|---|---|---|---|---|---|---|"]
    for result in results:
        if result.seconds is None or result.limit is None:
            continue
        least, what = result.limit
        short = result.case.launcher.removeprefix("graphopt_cuda_")
        cells = [result.case.operator, short, result.case.shape, f"{result.seconds * 1e6:.1f}", f"{least * 1e6:.1f}",
                 f"{least / result.seconds:.0%}", what]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    wrong = [result for result in results if not result.right]
    lines += ["", f"{len(results) - len(wrong)} of {len(results)} cases agree with PyTorch."]
    for result in wrong:
        why = result.error or f"{result.difference:.3g} times as far off as allowed"
        lines.append(f"- WRONG: {result.case.launcher} {result.case.shape}: {why}")
    return "\n".join(lines)


def main() -> int:
    """Check, time, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", help="these alone")
    parser.add_argument("--library", type=Path, help="a built library, instead of building one")
    parser.add_argument("--check", action="store_true", help="don't time")
    parser.add_argument("--page", type=Path, help="write the table there")
    options = parser.parse_args()
    try:
        torch = gpu()
        launchers = Launchers(ctypes.CDLL(str(built(options.library))))
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return 2
    flush = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    limits = None if options.check else measured_limits(torch, flush)
    results = []
    for case in all_cases(options.operators):
        results.append(judge(torch, launchers, case, limits, flush))
        print(f"{'ok   ' if results[-1].right else 'WRONG'} {case.launcher} {case.shape}", flush=True)
    text = table(results)
    if limits is not None:
        speeds = ", ".join(f"{value / 1e12:.0f} TFLOP/s of {name}" for name, value in limits.speed.items())
        text = f"{torch.cuda.get_device_name()}: {limits.bandwidth / 1e9:.0f} GB/s, {speeds}, as measured.\n\n{text}"
    print(text)
    if options.page:
        head = (
            "# CUDA kernels\n\nMade by `python benchmarks/cuda_operators.py --page docs/cuda.md`, which says how.\n\n"
        )
        options.page.write_text(head + text + "\n", encoding="utf-8")
    return 0 if all(result.right for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
