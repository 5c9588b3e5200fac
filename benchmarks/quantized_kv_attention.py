"""QuantizedKVAttention's kernel beside GroupQueryAttention, its own body and the memory limit, interleaved.

    python benchmarks/quantized_kv_attention.py                                  one new token, both shapes, three pasts
    python benchmarks/quantized_kv_attention.py --shapes 32x8x128 --past 4096 --threads 1 --systems int8 "8 bits"
    python benchmarks/quantized_kv_attention.py --new 128 --past 0 1024          a prompt, or a piece of one
    python benchmarks/quantized_kv_attention.py --page docs/operator-speed.md    into the page

Every system is a model of as many equal nodes with caches of their own as a float cache of --megabytes allows, so that
caches come from where they come from in a model, and the session's own cost is shared. Past and present are one buffer
(IoBinding). In each round all systems run one after the other; the table has the median of a node's time in
microseconds, in how many of it GroupQueryAttention with an int8 and a float cache would fit, and the speed of its cache
beside the most that as many threads read. Shapes are heads × KV heads × features of a head.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from measured_page import circumstances, put_tables
from memory_limit import read_bandwidth
from timed_session import timed_options

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.operator import DOMAIN, add_body
from graphopt.runtime_ops.quantized_kv_attention import layout_of

SHAPES = {"32x8x128": (32, 8, 128), "9x3x64": (9, 3, 64)}
INT8, FLOAT = "GroupQueryAttention int8", "GroupQueryAttention float"
_TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int8): 3, np.dtype(np.float16): 10}


@dataclasses.dataclass(frozen=True)
class System:
    """A kind of cache: of GroupQueryAttention (bits 32, 8 or 4), or of QuantizedKVAttention with these attributes."""

    bits: int = 0
    scales: str = "PER_CHANNEL"
    attributes: dict[str, int] = dataclasses.field(default_factory=dict)
    kernel: bool = True


def _ours(key: int, value: int, kernel: bool = True, **attributes: int) -> System:
    return System(attributes={"key_bits": key, "value_bits": value, **attributes}, kernel=kernel)


SYSTEMS = {
    FLOAT: System(32),
    INT8: System(8),
    "GroupQueryAttention int8, one scale": System(8, "PER_TENSOR"),
    "GroupQueryAttention int4": System(4),
    "8 bits": _ours(8, 8),
    "4 bits": _ours(4, 4),
    "3 bits": _ours(3, 3),
    "2 bits": _ours(2, 2),
    "keys 4, values 2 bits": _ours(4, 2),
    "8 bits, rotated at read": _ours(8, 8, rotate_at_read=1),
    "4 bits, rotated at read": _ours(4, 4, rotate_at_read=1),
    "3 bits, rotated at read": _ours(3, 3, rotate_at_read=1),
    "8 bits, keys per token": _ours(8, 8, key_per_channel=0),
    "4 bits, groups of 32": _ours(4, 4, key_per_channel=0, group_size=32),
    "body, 8 bits": _ours(8, 8, kernel=False),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement: heads, KV heads and features of a head; tokens of the past and new ones; threads."""

    shape: tuple[int, int, int]
    past: int
    new: int
    threads: int


class Run:
    """A session of `count` nodes with everything bound."""

    def __init__(self, system: System, case: Case, count: int) -> None:
        self.case, self.count = case, count
        heads, kv, depth = case.shape
        self.rng = np.random.default_rng(0)
        capacity = -(-(case.past + case.new) // 128) * 128
        self.feeds = {
            "q": self.rng.standard_normal((1, case.new, heads * depth), np.float32),
            "k": self.rng.standard_normal((1, case.new, kv * depth), np.float32),
            "v": self.rng.standard_normal((1, case.new, kv * depth), np.float32),
            "last": np.array([case.past + case.new - 1], np.int32),
        }
        angles = np.arange(capacity)[:, None] * 10000.0 ** (-np.arange(depth // 2) / (depth // 2))
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        for name, array in self.feeds.items():
            self.inputs.append(self.value(name, array.dtype, array.shape))
        self.tables = [self.constant(f(angles).astype(np.float32), n) for f, n in ((np.cos, "cos"), (np.sin, "sin"))]
        self.caches: list[tuple[str, str, np.ndarray[Any, Any]]] = []
        nodes = [
            self.contrib(i, system, capacity) if system.bits else self.ours(i, system, capacity) for i in range(count)
        ]
        self.bytes = sum(array.nbytes for _, _, array in self.caches) / count * (case.past + case.new) / capacity
        outputs = [output for node in nodes for output in node.outputs]
        graph = ir.Graph(
            self.inputs, outputs, nodes=nodes, initializers=self.initializers,
            opset_imports={"": 21, "com.microsoft": 1}, name="g",
        )  # fmt: skip
        model = ir.Model(graph, ir_version=10)
        options = timed_options(case.threads)
        if not system.bits:
            add_body(model, "QuantizedKVAttention")
            if system.kernel:
                options.register_custom_ops_library(str(library_path()))
        self.session = onnxruntime.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.binding = self.session.io_binding()
        known = {v.name for v in self.session.get_inputs()}
        for name, array in self.feeds.items():
            if name in known:
                self.binding.bind_cpu_input(name, array)
        for node in nodes:
            self.binding.bind_output(node.outputs[0].name or "", "cpu")
        for past, present, array in self.caches:
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            self.binding.bind_ortvalue_input(past, value)
            self.binding.bind_ortvalue_output(present, value)

    def value(self, name: str, dtype: Any, shape: Any) -> ir.Value:
        """A value of the graph."""
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(np.dtype(dtype))), shape=ir.Shape(shape))

    def constant(self, array: np.ndarray[Any, Any], name: str) -> ir.Value:
        """An initializer."""
        made = self.value(name, array.dtype, array.shape)
        made.const_value = ir.Tensor(array)
        self.initializers.append(made)
        return made

    def cache(self, index: int, name: str, array: np.ndarray[Any, Any]) -> tuple[ir.Value, ir.Value]:
        """A cache's input and output."""
        past, present = f"past{index}.{name}", f"present{index}.{name}"
        self.caches.append((past, present, array))
        made = self.value(past, array.dtype, array.shape)
        self.inputs.append(made)
        return made, self.value(present, array.dtype, array.shape)

    def contrib(self, index: int, system: System, capacity: int) -> ir.Node:
        """A node of GroupQueryAttention."""
        heads, kv, depth = self.case.shape
        shape = (1, kv, capacity, depth if system.bits > 4 else depth // 2)
        kind = {32: np.float32, 8: np.int8, 4: np.uint8}[system.bits]
        given = self.rng.standard_normal(shape, np.float32)
        array = given if system.bits == 32 else self.rng.integers(-100, 100, shape).astype(kind)
        (past_k, present_k), (past_v, present_v) = (self.cache(index, n, array.copy()) for n in "kv")
        inputs: list[ir.Value | None] = [*self.inputs[:3], past_k, past_v, self.inputs[3]]
        inputs += [self.constant(np.array(self.case.past + self.case.new, np.int32), f"total{index}"), *self.tables]
        attributes: dict[str, Any] = {
            "num_heads": heads, "kv_num_heads": kv, "scale": depth**-0.5, "do_rotary": 1,
        }  # fmt: skip
        if system.bits < 32:
            numbers = (1, kv, 1, depth) if system.scales == "PER_CHANNEL" else (1,)
            scale = np.full(numbers, 0.02 if system.bits == 8 else 0.3, np.float32)
            inputs += [None] * 3 + [self.constant(scale, f"scale{index}{n}") for n in "kv"]
            attributes |= {
                "k_quant_type": system.scales, "v_quant_type": system.scales, "kv_cache_bit_width": system.bits,
            }  # fmt: skip
        made = ir.convenience.convert_attributes(attributes)
        y = self.value(f"y{index}", np.float32, (1, self.case.new, heads * depth))
        return ir.Node(
            "com.microsoft", "GroupQueryAttention", inputs, attributes=made, outputs=[y, present_k, present_v]
        )

    def ours(self, index: int, system: System, capacity: int) -> ir.Node:
        """A node of QuantizedKVAttention."""
        heads, kv, depth = self.case.shape
        attributes = operators()["QuantizedKVAttention"].attributes_of(
            num_heads=heads, kv_num_heads=kv, scale=depth**-0.5, **system.attributes
        )
        codes, scales, recent = layout_of(attributes, depth).shapes(1, capacity)
        arrays = {
            "codes": self.rng.integers(0, 256, codes, dtype=np.uint8),
            "scales": (self.rng.random(scales) * 0.02).astype(np.float16),
            "recent": self.rng.standard_normal(recent, np.float32).astype(np.float16),
        }
        pairs = [self.cache(index, name, array) for name, array in arrays.items()]
        inputs = [*self.inputs[:3], *(past for past, _ in pairs), self.inputs[3], *self.tables]
        y = self.value(f"y{index}", np.float32, (1, self.case.new, heads * depth))
        made = [
            ir.AttrFloat32(key, value) if isinstance(value, float) else ir.AttrInt64(key, value)
            for key, value in attributes.items()
        ]
        outputs = [y, *(present for _, present in pairs)]
        return ir.Node(DOMAIN, "QuantizedKVAttention", inputs, attributes=made, outputs=outputs)

    def time(self) -> float:
        """Seconds of a node in one run."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return (time.perf_counter() - start) / self.count


@dataclasses.dataclass
class Result:
    """What was measured of a system: seconds of a node, bytes of its cache, bytes a second that memory allows."""

    seconds: float
    bytes: float
    limit: float


def measure(case: Case, names: list[str], options: argparse.Namespace) -> dict[str, Result]:
    """The medians of all systems."""
    _, kv, depth = case.shape
    float_bytes = 8 * kv * depth * (case.past + case.new)
    count = max(1, min(64, round(options.megabytes * 1e6 / float_bytes))) if case.new == 1 else 2
    runs = {name: Run(SYSTEMS[name], case, count if SYSTEMS[name].kernel else 1) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for run in runs.values():
        run.time()
    end = time.perf_counter() + options.seconds
    while time.perf_counter() < end or len(times[names[0]]) < 5:
        for name, run in runs.items():
            if SYSTEMS[name].kernel or len(times[name]) < 3:
                times[name].append(run.time())
    limits: dict[int, float] = {}
    found = {}
    for name, run in runs.items():
        size = 1 << max(20, int(run.bytes * run.count).bit_length())
        if case.new == 1 and size not in limits:
            limits[size] = read_bandwidth(case.threads, size)
        found[name] = Result(statistics.median(times[name]), run.bytes, limits.get(size, 0.0))
    return found


def table(results: dict[Case, dict[str, Result]]) -> str:
    """The page: a table for each shape, number of new tokens and number of threads."""
    lines: list[str] = []
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in results:
        groups.setdefault((case.new, case.shape, case.threads), []).append(case)
    for (new, shape, threads), cases in groups.items():
        tokens = "one new token" if new == 1 else f"{new} new tokens"
        what = "int8's time / its own, float's time / its own"
        what += "; cache of fp32's bytes; of the memory limit" if new == 1 else ""
        lines += [
            f"{shape[0]} heads on {shape[1]} of {shape[2]} features, {tokens}, {threads} thread{'s' * (threads > 1)}: "
            f"µs ({what})",
            "",
            "| | " + " | ".join(f"past {case.past}" for case in cases) + " |",
            "|---|" + "---|" * len(cases),
        ]
        for name in results[cases[0]]:
            row = f"| {name} |"
            for case in cases:
                result = results[case][name]
                ratios = [
                    f"{results[case][other].seconds / result.seconds:.2f}"
                    for other in (INT8, FLOAT)
                    if other in results[case]
                ]
                row += f" {result.seconds * 1e6:.0f} ({', '.join(ratios)}"
                if new == 1:
                    whole = 8 * shape[1] * shape[2] * (case.past + case.new)
                    speed = result.bytes / result.seconds / result.limit
                    row += f"; {result.bytes / whole:.1%}; {speed:.0%}"
                row += ") |"
            lines.append(row)
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--past", nargs="+", type=int, default=[256, 1024, 4096])
    parser.add_argument("--new", type=int, default=1)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), help="their names, or parts of them")
    parser.add_argument("--megabytes", type=float, default=128, help="of float caches, of all nodes of a session")
    parser.add_argument("--seconds", type=float, default=4, help="of rounds for each case")
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks")
    options = parser.parse_args()
    names = [name for name in SYSTEMS if any(part in name for part in options.systems)]
    results: dict[Case, dict[str, Result]] = {}
    for shape in options.shapes:
        for threads in options.threads:
            for past in options.past:
                case = Case(SHAPES[shape], past, options.new, threads)
                results[case] = measure(case, names, options)
                print(table({case: results[case]}), flush=True)
    if options.page is not None:
        put_tables(options.page, "quantized-kv-attention", f"{circumstances()}\n\n{table(results)}")


if __name__ == "__main__":
    main()
