"""CodebookMatMul's kernel beside its body, MatMulNBits, MatMul and the memory limit, interleaved.

    python benchmarks/codebook_matmul.py                                 SmolLM2's shapes, M = 1, 16, 128
    python benchmarks/codebook_matmul.py --shapes 4096x4096 --rows 1 --threads 1
    python benchmarks/codebook_matmul.py --all --page docs/operator-speed.md     7B shapes too, into the page

Every system is a model of as many equal nodes with weights of their own as make up --megabytes of 4-bit indices, so
that weights come from where they come from in a model, and the session's own cost is shared. In each round all systems
run one after the other; the table has the median of a node's time in microseconds, its ratio to MatMulNBits at accuracy
level 4, and for one row of x the speed of its weights beside the most that as many threads read of as many bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from measured_page import circumstances, put_tables
from memory_limit import read_bandwidth
from timed_session import timed_options

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.codebook_matmul.packing import packed_size
from graphopt.runtime_ops.operator import DOMAIN, add_body

SMOLLM2 = ("576x576", "192x576", "1536x576", "576x1536")
SEVEN_BILLION = ("4096x4096", "11008x4096", "4096x11008")
REFERENCE = "MatMulNBits 4 bits, level 4"


@dataclasses.dataclass(frozen=True)
class System:
    """One way to multiply: how a node and its constants are made, and how many bytes of constants it reads."""

    make: Callable[[ir.Value, int, int, np.random.Generator], ir.Node]
    kernels: bool = False
    floats: bool = False
    """Whether it ends up with weights in float32, so that fewer nodes fit."""


def constant(array: np.ndarray[Any, Any], name: str) -> ir.Value:
    """An initializer."""
    tensor = ir.Tensor(array)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))


def codebook(
    bits: int, activation_block: int = 0, group: int = 32, tile: tuple[int, int] = (1, 1), half: bool = False
) -> Callable[..., ir.Node]:
    """A node of CodebookMatMul."""

    def make(x: ir.Value, n: int, k: int, rng: np.random.Generator) -> ir.Node:
        rows, per_row = -(-n // tile[0]), -(-k // tile[1])
        none = np.zeros(0)
        arrays = {
            "indices": rng.integers(0, 256, (rows, packed_size(per_row, bits)), dtype=np.uint8),
            "codebooks": rng.standard_normal((1, 1 << bits, *tile)).astype(np.float32),
            "scales": rng.random((n, -(-k // group))).astype(np.float16 if half else np.float32),
            "selectors": none.astype(np.uint8),
            "outlier_rows": none.astype(np.int32),
            "outlier_columns": none.astype(np.int32),
            "outlier_values": none.astype(np.float32),
            "bias": none.astype(np.float32),
        }
        values = [constant(array, f"{name}{rng.integers(1 << 62)}") for name, array in arrays.items()]
        attributes = operators()["CodebookMatMul"].attributes_of(
            columns=k, bits=bits, group_size=group, activation_block=activation_block
        )
        made = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        return ir.Node(DOMAIN, "CodebookMatMul", [x, *values], attributes=made)

    return make


def matmul_nbits(bits: int, level: int, block: int = 32) -> Callable[..., ir.Node]:
    """A node of ONNX Runtime's MatMulNBits."""

    def make(x: ir.Value, n: int, k: int, rng: np.random.Generator) -> ir.Node:
        packed = rng.integers(0, 256, (n, k // block, block * bits // 8), dtype=np.uint8)
        scales = rng.random((n, k // block)).astype(np.float32)
        values = [constant(a, f"{s}{rng.integers(1 << 62)}") for s, a in (("packed", packed), ("scales", scales))]
        attributes = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": level}
        made = [ir.AttrInt64(name, value) for name, value in attributes.items()]
        return ir.Node("com.microsoft", "MatMulNBits", [x, *values], attributes=made)

    return make


def matmul(x: ir.Value, n: int, k: int, rng: np.random.Generator) -> ir.Node:
    """A MatMul of float32."""
    return ir.Node("", "MatMul", [x, constant(rng.standard_normal((k, n), np.float32), f"w{rng.integers(1 << 62)}")])


SYSTEMS = {
    REFERENCE: System(matmul_nbits(4, 4)),
    "MatMulNBits 4 bits, level 0": System(matmul_nbits(4, 0)),
    "MatMulNBits 2 bits, level 4": System(matmul_nbits(2, 4)),
    "MatMul float32": System(matmul, floats=True),
    "body, 4 bits": System(codebook(4), floats=True),
    "kernel, 4 bits": System(codebook(4), True),
    "kernel, 3 bits": System(codebook(3), True),
    "kernel, 2 bits": System(codebook(2), True),
    "kernel, 4 bits, x in 8": System(codebook(4, 32), True),
    "kernel, 3 bits, x in 8": System(codebook(3, 32), True),
    "kernel, 2 bits, x in 8": System(codebook(2, 32), True),
    "kernel, 8 bits": System(codebook(8), True),
    "kernel, 8 bits for 1 × 2": System(codebook(8, group=64, tile=(1, 2)), True),
    "kernel, 8 bits for 1 × 4": System(codebook(8, group=64, tile=(1, 4)), True),
    "kernel, 12 bits for 1 × 8": System(codebook(12, group=1 << 20, tile=(1, 8)), True),
    "kernel, 12 bits for 8 × 1": System(codebook(12, group=1 << 20, tile=(8, 1)), True),
}


def session(system: System, n: int, k: int, count: int, threads: int) -> tuple[onnxruntime.InferenceSession, float]:
    """A session of `count` nodes, and the bytes of one node's constants."""
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["M", k]))
    nodes = [system.make(x, n, k, rng) for _ in range(count)]
    constants = [value for node in nodes for value in node.inputs if value is not None and value is not x]
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"y{index}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [x], [node.outputs[0] for node in nodes], nodes=nodes, initializers=constants,
        opset_imports={"": 21, "com.microsoft": 1}, name="g",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    options = timed_options(threads)
    if nodes[0].domain == DOMAIN:
        add_body(model, nodes[0].op_type)
        if system.kernels:
            options.register_custom_ops_library(str(library_path()))
    size = sum(value.const_value.nbytes for value in constants if value.const_value is not None) / count
    made = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return made, 4.0 * n * k if system.floats else size


@dataclasses.dataclass
class Result:
    """What was measured of a system: seconds of a node, bytes of its constants, bytes a second that memory allows."""

    seconds: float
    bytes: float
    limit: float


def measure(n: int, k: int, m: int, threads: int, names: list[str], options: argparse.Namespace) -> dict[str, Result]:
    """The medians of all systems at one shape."""
    runs: dict[str, tuple[Callable[[], object], int, float]] = {}
    for name in names:
        system = SYSTEMS[name]
        count = max(1, math.ceil(options.megabytes * 2e6 / (n * k)))
        if m > 1 or system.floats:
            count = max(1, min(count, math.ceil(64e6 / (n * k))) // (8 if system.floats else 2))
        made, size = session(system, n, k, count, threads)
        binding = made.io_binding()
        binding.bind_cpu_input("x", np.random.default_rng(1).standard_normal((m, k)).astype(np.float32))
        for output in made.get_outputs():
            binding.bind_output(output.name, "cpu")

        def run(made: Any = made, binding: Any = binding) -> None:
            made.run_with_iobinding(binding)

        run()
        runs[name] = (run, count, size)
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(times[names[0]]) < 5:
        for name, (run, count, _) in runs.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) / count)
    # Each system's weights have left the caches for those of the others when its turn comes again.
    limit = read_bandwidth(threads, int(sum(count * size for _, count, size in runs.values()))) if m == 1 else 0.0
    return {name: Result(statistics.median(times[name]), size, limit) for name, (_, _, size) in runs.items()}


def table(results: dict[tuple[str, int, int], dict[str, Result]]) -> str:
    """The page: a table for each number of rows and of threads."""
    lines = []
    for m, threads in sorted({(m, threads) for _, m, threads in results}):
        shapes = [shape for shape, rows, count in results if (rows, count) == (m, threads)]
        lines += [f"M = {m}, {threads} thread{'s' * (threads > 1)}: µs of a node (its ratio to {REFERENCE}"
                  f"{'; the fraction of the memory limit)' if m == 1 else ')'}", ""]  # fmt: skip
        lines += [
            "| N × K | " + " | ".join(s.replace("x", " × ") for s in shapes) + " |",
            "|---|" + "---|" * len(shapes),
        ]
        for name in results[shapes[0], m, threads]:
            cells = []
            for shape in shapes:
                row = results[shape, m, threads]
                one = row[name]
                ratio = f"{one.seconds / row[REFERENCE].seconds:.2f}" if REFERENCE in row else "–"
                part = f"; {one.bytes / one.seconds / one.limit:.0%}" if one.limit else ""
                cells.append(f"{one.seconds * 1e6:.1f} ({ratio}{part})")
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SMOLLM2), help="N×K, written 576x1536.")
    parser.add_argument("--all", action="store_true", help="The shapes of SmolLM2 and of a 7B model.")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 128], help="M, the rows of x.")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--only", nargs="+", help="Systems whose names hold one of these, and the reference.")
    parser.add_argument("--megabytes", type=float, default=24.0, help="4-bit indices of all nodes together, at M = 1.")
    parser.add_argument("--seconds", type=float, default=3.0, help="Time for each shape.")
    parser.add_argument("--page", type=Path, help="Put the tables into this page, between its marks.")
    options = parser.parse_args()
    names = [n for n in SYSTEMS if n == REFERENCE or not options.only or any(part in n for part in options.only)]
    results = {}
    for m in options.rows:
        for threads in options.threads:
            for shape in (*SMOLLM2, *SEVEN_BILLION) if options.all else options.shapes:
                n, k = map(int, shape.split("x"))
                results[shape, m, threads] = measure(n, k, m, threads, names, options)
    page = table(results)
    print(page)
    if options.page:
        put_tables(options.page, "codebook-matmul", f"{circumstances()}\n\n{page}")


if __name__ == "__main__":
    main()
