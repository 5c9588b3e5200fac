"""CachedAttention against ONNX Runtime's GroupQueryAttention, with a cache that past and present share.

    python benchmarks/cached_attention.py [--rounds 21] [--threads 1 2] [--heads 9/3/64 32/8/128]

For each shape both run in turn, round by round. Times are medians in microseconds, of the whole run of a model of one
node; the ratio is the median of the rounds' ratios of the operator's time to GroupQueryAttention's. For one new token
the share of the memory limit is that of the best way to read as many bytes as all caches have. So that a decode step
finds its cache as it does in a model, outside of the processor's caches, several caches take turns.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from measured_page import circumstances, put_tables
from memory_limit import read_bandwidth

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.operator import DOMAIN, add_body

HEAD = (
    "| heads | threads | past | new | GroupQueryAttention µs | CachedAttention µs | ratio | of the memory limit |\n"
    "|---|---|---|---|---|---|---|---|"
)
COLD_BYTES = 64 << 20
"""Bytes of all caches that take turns, about what a small model's weights push out of the processor's caches."""


def model(heads: int, kv_heads: int, depth: int, own: bool) -> bytes:
    """One node; inputs i0, i3, i4, i5, i6, i7, i8 and outputs o0, o1, o2."""
    float_, int_ = ir.TensorType(ir.DataType.FLOAT), ir.TensorType(ir.DataType.INT32)
    ranks = {0: 3, 3: 4, 4: 4, 5: 1, 6: 0, 7: 2, 8: 2}
    given = {
        n: ir.Value(name=f"i{n}", type=int_ if n in (5, 6) else float_, shape=ir.Shape([None] * rank))
        for n, rank in ranks.items()
    }
    attributes: dict[str, int | float] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": depth**-0.5}
    inputs: list[ir.Value | None] = [given.get(n) for n in range(9)]
    nothing = []
    if own:
        attributes = operators()["CachedAttention"].attributes_of(**attributes)
        for n in (1, 2):
            nothing.append(ir.Value(name=f"nothing{n}", const_value=ir.tensor(np.zeros(0, np.float32))))
            inputs[n] = nothing[-1]
    else:
        attributes["do_rotary"] = 1
    made = [ir.AttrFloat32(k, v) if isinstance(v, float) else ir.AttrInt64(k, v) for k, v in attributes.items()]
    domain, name = (DOMAIN, "CachedAttention") if own else ("com.microsoft", "GroupQueryAttention")
    node = ir.Node(domain, name, inputs, attributes=made, num_outputs=3)
    for index, output in enumerate(node.outputs):
        output.name, output.type = f"o{index}", float_
    opsets = {"": 21, "com.microsoft": 1}
    graph = ir.Graph(
        list(given.values()), node.outputs, nodes=[node], initializers=nothing, name="g", opset_imports=opsets
    )
    made_model = ir.Model(graph, ir_version=10)
    if own:
        add_body(made_model, "CachedAttention")
    serialized: bytes = ir.to_proto(made_model).SerializeToString()
    return serialized


def runner(
    source: bytes, threads: int, sizes: tuple[int, int, int], past: int, new: int, copies: int
) -> Callable[[], float]:
    """A function that runs one node once and says how long it took, on the next of `copies` caches."""
    heads, kv_heads, depth = sizes
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library_path()))
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    total = past + new
    angles = rng.uniform(-3, 3, (total, depth // 2))
    fixed = {
        "i0": rng.standard_normal((1, new, (heads + 2 * kv_heads) * depth)).astype(np.float32),
        "i5": np.array([total - 1], np.int32), "i6": np.array(total, np.int32),
        "i7": np.cos(angles).astype(np.float32), "i8": np.sin(angles).astype(np.float32),
    }  # fmt: skip
    bindings, kept = [], []
    for _ in range(copies):
        binding = session.io_binding()
        for name, array in fixed.items():
            binding.bind_cpu_input(name, array)
        for name, other in (("i3", "o1"), ("i4", "o2")):
            cache = ort.OrtValue.ortvalue_from_numpy(rng.standard_normal((1, kv_heads, total, depth), dtype=np.float32))
            kept.append(cache)
            binding.bind_ortvalue_input(name, cache)
            binding.bind_ortvalue_output(other, cache)
        binding.bind_output("o0")
        bindings.append(binding)
    turns = itertools.cycle(bindings)

    def run() -> float:
        binding, _ = next(turns), kept  # the caches live as long as the function
        begin = time.perf_counter()
        session.run_with_iobinding(binding)
        return time.perf_counter() - begin

    return run


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--heads", nargs="+", default=["9/3/64", "32/8/128"])
    parser.add_argument("--past", type=int, nargs="*", default=[32, 128, 540, 1024, 4096])
    parser.add_argument("--prompt", type=int, nargs="*", default=[128, 512])
    parser.add_argument("--page", type=Path, help="put the table into this page, between its marks")
    args = parser.parse_args()
    if library_path() is None:
        print(f"{Path(__file__).name}: the library with the kernels isn't built; make library", file=sys.stderr)
        return 1
    text = f"{HEAD}\n"
    print(HEAD)
    for shape in args.heads:
        heads, kv_heads, depth = (int(part) for part in shape.split("/"))
        sizes = (heads, kv_heads, depth)
        sources = [model(heads, kv_heads, depth, own) for own in (False, True)]
        for threads in args.threads:
            for past, new in [*((p, 1) for p in args.past), *((0, n) for n in args.prompt)]:
                bytes_ = 2 * kv_heads * (past + new) * depth * 4
                copies = 1 if new > 1 else max(2, min(64, COLD_BYTES // bytes_))
                runs = [runner(source, threads, sizes, past, new, copies) for source in sources]
                inner = 1 if new > 1 else 16
                times: list[list[float]] = [[], []]
                for turn in range(args.rounds + 2):
                    pair = [statistics.median(run() for _ in range(inner)) for run in runs]
                    if turn >= 2:
                        times[0].append(pair[0])
                        times[1].append(pair[1])
                ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
                theirs, ours = (statistics.median(t) for t in times)
                limit = bytes_ / read_bandwidth(threads, 2 * copies * bytes_)
                share = f"{limit / ours:.0%}" if new == 1 else ""
                row = f"| {shape} | {threads} | {past} | {new} | {1e6 * theirs:.0f} | {1e6 * ours:.0f} | {ratio:.2f} |"
                row += f" {share} |"
                print(row, flush=True)
                text += row + "\n"
    if args.page is not None:
        put_tables(args.page, "cached-attention", f"{circumstances()}\n\n{text}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
