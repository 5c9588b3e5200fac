"""The Hadamard and Kronecker operators' kernels beside their bodies, a MatMul and the memory limit, interleaved.

    python benchmarks/transforms.py                             sizes of SmolLM2 and of a 7B model, M = 1, 16, 128
    python benchmarks/transforms.py --features 4096 --rows 1 --threads 1 --seconds 2
    python benchmarks/transforms.py --half --page docs/operator-speed.md    into the page

Every system is a model of eight nodes with tokens of their own, so that the session's own cost is shared. In each round
all systems run one after the other, once untimed and once timed. Besides each kernel and its body: for the Kronecker
product the two MatMuls that it could be without Transposes, and as ONNX Runtime's nearest kernel a MatMul with the
whole matrix of K × K numbers, alone or with DynamicQuantizeLinear (one scale for all tokens) behind it. The memory
limit is the time in which as many threads read as many bytes as a node reads and writes, from a buffer as large as all
that the eight nodes touch.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from graphopt.runtime_ops.hadamard_transform.factors import hadamard_factor
from graphopt.runtime_ops.operator import DOMAIN, add_body

FEATURES = (576, 1536, 4096, 11008)
NODES = 8
LARGEST_MATRIX = 4096
"""Features up to which the MatMul with the whole matrix is made."""
KERNEL, BODY, MATMULS = "kernel", "body", "two MatMuls"


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        operator: Its name.
        inputs: The constants behind its x.
        attributes: The node's.
        half: Whether tokens are float16.
        note: What the table says of it.
    """

    operator: str
    inputs: tuple[np.ndarray[Any, Any], ...]
    attributes: dict[str, float]
    half: bool
    note: str

    @property
    def quantizes(self) -> bool:
        return len(operators()[self.operator].outputs) > 1


def cases(features: int, wanted: list[str], half: bool) -> list[Case]:
    """The operators at a size."""
    rng = np.random.default_rng(features)
    factor = hadamard_factor(features)
    a = max(d for d in range(1, int(features**0.5) + 1) if features % d == 0)
    b = features // a
    square = [(rng.standard_normal((n, n)) / n**0.5).astype(np.float32) for n in (a, b)]
    rotation = {"group_size": features, "scale": features**-0.5}
    note = f"2^{(features // len(factor)).bit_length() - 1}·{len(factor)}"
    found = [
        Case("HadamardTransform", (factor,), rotation, half, note),
        Case("HadamardQuantize", (factor,), rotation, half, note),
        Case("KroneckerTransform", tuple(square), {}, half, f"{a}·{b}"),
        Case("KroneckerQuantize", tuple(square), {}, half, f"{a}·{b}"),
    ]  # fmt: skip
    return [case for case in found if not wanted or case.operator in wanted]


def systems(case: Case, features: int) -> list[str]:
    """What there is to compare."""
    found = [KERNEL, BODY]
    if case.operator == "KroneckerTransform":
        found.append(MATMULS)
    if not case.half and features <= LARGEST_MATRIX:
        found.append("MatMul K × K" + (", DynamicQuantizeLinear" if case.quantizes else ""))
    return found


def constant(array: np.ndarray[Any, Any], name: str) -> ir.Value:
    tensor = ir.Tensor(array)
    return ir.Value(name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))


def nodes_of(system: str, case: Case, x: ir.Value, features: int, index: int, given: list[ir.Value]) -> list[ir.Node]:
    """The nodes that make one transform of x; constants that they need are added to `given`."""
    if system in (KERNEL, BODY):
        if not given:
            given += [constant(array, f"c{i}") for i, array in enumerate(case.inputs)]
        operator = operators()[case.operator]
        attributes: list[ir.Attr] = [
            ir.AttrFloat32(name, value) if isinstance(value, float) else ir.AttrInt64(name, int(value))
            for name, value in operator.attributes_of(**case.attributes).items()
        ]
        return [ir.Node(DOMAIN, case.operator, [x, *given], attributes=attributes, num_outputs=len(operator.outputs))]
    if system == MATMULS:
        a, b = (len(matrix) for matrix in case.inputs)
        if not given:
            given += [constant(np.ascontiguousarray(case.inputs[0].T), "left"), constant(case.inputs[1], "right"),
                      constant(np.array([-1, a, b]), "into"), constant(np.array([-1, features]), "back")]  # fmt: skip
        nodes = [ir.Node("", "Cast", [x], attributes=[ir.AttrInt64("to", 1)])] if case.half else []
        nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0] if nodes else x, given[2]]))
        nodes.append(ir.Node("", "MatMul", [nodes[-1].outputs[0], given[1]]))
        nodes.append(ir.Node("", "MatMul", [given[0], nodes[-1].outputs[0]]))
        nodes.append(ir.Node("", "Reshape", [nodes[-1].outputs[0], given[3]]))
        if case.half:
            nodes.append(ir.Node("", "Cast", [nodes[-1].outputs[0]], attributes=[ir.AttrInt64("to", 10)]))
        return nodes
    # A matrix of its own for each node: in a model, none is in a cache from the node before.
    given.append(constant(np.random.default_rng(index).standard_normal((features, features), np.float32), f"m{index}"))
    product = ir.Node("", "MatMul", [x, given[-1]])
    if not case.quantizes:
        return [product]
    return [product, ir.Node("", "DynamicQuantizeLinear", [product.outputs[0]], num_outputs=3)]


def count(system: str, features: int) -> int:
    """Nodes of a system's model; one is enough where it takes long."""
    return NODES if system in (KERNEL, BODY, MATMULS) or features < 1024 else 1


def session(system: str, case: Case, features: int, threads: int) -> onnxruntime.InferenceSession:
    """A session of NODES transforms, each of an input of its own: equal nodes of one input are made one."""
    dtype = ir.DataType.FLOAT16 if case.half else ir.DataType.FLOAT
    tokens = [
        ir.Value(name=f"x{index}", type=ir.TensorType(dtype), shape=ir.Shape(["M", features]))
        for index in range(count(system, features))
    ]
    given: list[ir.Value] = []
    parts = [nodes_of(system, case, x, features, index, given) for index, x in enumerate(tokens)]
    outputs = []
    for index, part in enumerate(parts):
        kinds = [parameter.type for parameter in operators()[case.operator].outputs]
        if system not in (KERNEL, BODY) and case.quantizes:
            kinds = ["uint8", "float", "uint8"]
        for number, (output, kind) in enumerate(zip(part[-1].outputs, kinds, strict=True)):
            output.name = f"y{index}_{number}"
            output.type = ir.TensorType(dtype if kind == "T" else ir.DataType[kind.upper()])
            outputs.append(output)
    nodes = [node for part in parts for node in part]
    graph = ir.Graph(tokens, outputs, nodes=nodes, initializers=given, opset_imports={"": 21}, name="g")
    model = ir.Model(graph, ir_version=10)
    options = timed_options(threads)
    if system in (KERNEL, BODY):
        add_body(model, case.operator)
        if system == KERNEL:
            options.register_custom_ops_library(str(library_path()))
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


@dataclasses.dataclass(frozen=True)
class Result:
    """Seconds of a node, its ratio to the kernel round by round, and the seconds that memory allows."""

    seconds: float
    ratio: float
    limit: float


def measure(case: Case, features: int, rows: int, threads: int, seconds: float) -> dict[str, Result]:
    """All systems of a case at so many tokens."""
    rng = np.random.default_rng(rows)
    tokens = [
        rng.standard_normal((rows, features)).astype(np.float16 if case.half else np.float32) for _ in range(NODES)
    ]
    runs: dict[str, Callable[[], object]] = {}
    for system in systems(case, features):
        made = session(system, case, features, threads)
        binding = made.io_binding()
        for index, x in enumerate(tokens[: count(system, features)]):
            binding.bind_cpu_input(f"x{index}", x)
        for output in made.get_outputs():
            binding.bind_output(output.name, "cpu")

        def run(made: Any = made, binding: Any = binding) -> None:
            made.run_with_iobinding(binding)

        run()
        runs[system] = run
    times: dict[str, list[float]] = {system: [] for system in runs}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[KERNEL]) < 5:
        for system, run in runs.items():
            run()  # what the one before it left in the caches isn't part of it
            start = time.perf_counter()
            run()
            times[system].append((time.perf_counter() - start) / count(system, features))
    moved = tokens[0].nbytes + (tokens[0].size + 4 * rows if case.quantizes else tokens[0].nbytes)
    limit = moved / read_bandwidth(threads, max(1 << 16, NODES * moved))
    return {
        system: Result(
            statistics.median(found),
            statistics.median(t / k for t, k in zip(found, times[KERNEL], strict=True)),
            limit,
        )
        for system, found in times.items()
    }


def table(rows: list[tuple[Case, int, int, int, dict[str, Result]]]) -> str:
    """A table for each operator and number of threads."""
    lines: list[str] = []
    for operator in dict.fromkeys(case.operator for case, *_ in rows):
        for threads in dict.fromkeys(t for case, _, _, t, _ in rows if case.operator == operator):
            chosen = [row for row in rows if row[0].operator == operator and row[3] == threads]
            names = list(dict.fromkeys(name for *_, found in chosen for name in found if name != KERNEL))
            lines += [f"### {operator}, {threads} thread{'s' * (threads > 1)}", ""]
            others = " | ".join(f"{name} µs (ratio)" for name in names)
            lines.append(f"| K | type | M | kernel µs | of the memory limit | {others} |")
            lines.append("|---" * (5 + len(names)) + "|")
            for case, features, m, _, found in chosen:
                kernel = found[KERNEL]
                cells = [f"{features} = {case.note}", "float16" if case.half else "float", str(m),
                         f"{kernel.seconds * 1e6:.1f}", f"{kernel.limit / kernel.seconds:.0%}"]  # fmt: skip
                for name in names:
                    one = found.get(name)
                    cells.append(f"{one.seconds * 1e6:.1f} ({one.ratio:.2f})" if one else "")
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=list(FEATURES))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--operators", nargs="+", default=[])
    parser.add_argument("--half", action="store_true", help="float16 too")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line of a table")
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks")
    options = parser.parse_args()
    rows = []
    for threads in options.threads:
        for features in options.features:
            for half in (False, True) if options.half else (False,):
                for case in cases(features, options.operators, half):
                    for m in options.rows:
                        rows.append((case, features, m, threads, measure(case, features, m, threads, options.seconds)))
                        print(table(rows[-1:]), flush=True)
    rows.sort(key=lambda row: list(operators()).index(row[0].operator))
    text = table(rows)
    print(text)
    if options.page:
        put_tables(options.page, "transforms", f"{circumstances()}\n\n{text}")


if __name__ == "__main__":
    main()
