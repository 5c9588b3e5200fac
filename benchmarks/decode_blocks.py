"""The decode blocks: QuantizedLinear and QuantizedMlp beside ONNX Runtime's own operators, alone and in a model.

    python benchmarks/decode_blocks.py                              the operators' tables
    python benchmarks/decode_blocks.py --model genai/model.onnx     tokens a second too
    python benchmarks/decode_blocks.py --rounds 9 --threads 2 --json result.json --page docs/decode-blocks.md

A model is onnxruntime-genai's (int4): it runs in its own generator, its graph in graphopt's, and rewritten.

For each shape the kernel, the combination of ONNX Runtime's operators that it stands for (norm, MatMulNBits at level 4,
activation, residual), and the portable body run in turn, round by round; a model is a chain of such nodes, as many as
make 64 MB of weights, so that no weight is in a cache when its turn comes. Times are microseconds a node, medians;
`limit` is the time in which the memory gives the node's bytes, by the best way of reading, measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
from measured_page import put_tables
from memory_limit import read_bandwidth
from timed_session import timed_options

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.operator import DOMAIN, add_body

BLOCK, CHAIN_BYTES = 32, 64 << 20
SHAPES = {
    "QuantizedLinear": [(576, 960), (576, 576), (4096, 6144), (4096, 4096)],
    "QuantizedMlp": [(576, 1536), (4096, 11008)],
}
"""Width and rows of a product, or width and hidden width of a branch: of SmolLM2 and of a 7B model."""
TOKENS = (1, 16, 128)
BODY_TOKENS = (1,)
"""The portable body unpacks its weights at every run here, so it is measured once for each shape."""


class Chain:
    """A model of nodes one behind the other, each with weights of its own."""

    def __init__(self, kind: str, width: int, rows: int, form: str) -> None:
        self.kind, self.width, self.rows, self.form = kind, width, rows, form
        self.rng = np.random.default_rng(0)
        self.values: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        weights = (3 if kind == "QuantizedMlp" else 1) * width * rows
        self.node_bytes = weights // 2 + weights // BLOCK * 4
        self.count = 1 if form == "body" else max(2, CHAIN_BYTES // self.node_bytes)
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["tokens", width]))
        end = x
        for _ in range(self.count):
            end = getattr(self, f"_{kind.removeprefix('Quantized').lower()}")(end)
        end.type = ir.TensorType(ir.DataType.FLOAT)
        imports = {"": 23, "com.microsoft": 1}
        graph = ir.Graph([x], [end], nodes=self.nodes, initializers=self.values, opset_imports=imports, name="chain")
        model = ir.Model(graph, ir_version=10)
        if form != "ort":
            add_body(model, kind)
        self.content = ir.to_proto(model).SerializeToString()

    def constant(self, array: npt.NDArray[Any]) -> ir.Value:
        name = f"c{len(self.values)}"
        kind = ir.TensorType(ir.DataType.from_numpy(array.dtype))
        self.values.append(
            ir.Value(name=name, const_value=ir.tensor(array, name=name), type=kind, shape=ir.Shape(array.shape))
        )
        return self.values[-1]

    def op(self, name: str, inputs: Sequence[ir.Value], domain: str = "", **attributes: Any) -> ir.Value:
        node = ir.node(name, list(inputs), attributes, domain=domain, outputs=[ir.Value(name=f"v{len(self.nodes)}")])
        self.nodes.append(node)
        return node.outputs[0]

    def _packed(self, rows: int, columns: int) -> list[ir.Value]:
        blocks = columns // BLOCK
        scales = self.rng.uniform(0.5, 1.5, (rows, blocks)).astype(np.float32) * np.float32(0.2 / columns**0.5)
        numbers = self.rng.integers(0, 256, (rows, blocks, BLOCK // 2), dtype=np.uint8)
        return [self.constant(numbers), self.constant(scales)]

    def _own(self, name: str, inputs: Sequence[ir.Value]) -> ir.Value:
        return self.op(name, inputs, DOMAIN, **operators()[name].attributes_of(bits=4, block_size=BLOCK))

    def _nbits(self, x: ir.Value, rows: int, columns: int) -> ir.Value:
        attributes = {"K": columns, "N": rows, "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
        return self.op("MatMulNBits", [x, *self._packed(rows, columns)], "com.microsoft", **attributes)

    def _linear(self, x: ir.Value) -> ir.Value:
        """Norm and product; what follows is the first `width` numbers of the result."""
        gains = self.constant(np.ones(self.width, np.float32))
        nothing = [self.constant(np.zeros(0, t)) for t in (np.uint8, np.float32, np.float32, np.float32)]
        if self.form == "ort":
            y = self._nbits(self.op("RMSNormalization", [x, gains], axis=-1), self.rows, self.width)
        else:
            y = self._own("QuantizedLinear", [x, gains, *self._packed(self.rows, self.width), *nothing])
        if self.rows == self.width:
            return y
        ends = [self.constant(np.array([n], np.int64)) for n in (0, self.width, 1)]
        return self.op("Slice", [y, *ends])

    def _mlp(self, x: ir.Value) -> ir.Value:
        gains = self.constant(np.ones(self.width, np.float32))
        if self.form != "ort":
            none = [self.constant(np.zeros(0, t)) for t in (np.uint8, np.float32)]
            first, second = self._packed(2 * self.rows, self.width), self._packed(self.width, self.rows)
            return self._own("QuantizedMlp", [x, gains, *first, *none, *second, *none])
        n = self.op("RMSNormalization", [x, gains], axis=-1)
        gate, up = self._nbits(n, self.rows, self.width), self._nbits(n, self.rows, self.width)
        hidden = self.op("Mul", [self.op("Mul", [gate, self.op("Sigmoid", [gate])]), up])
        return self.op("Add", [x, self._nbits(hidden, self.width, self.rows)])

    def runner(self, threads: int, tokens: int) -> Callable[[], float]:
        """A function that runs it once and gives the microseconds of a node."""
        options = timed_options(threads)
        if self.form == "own":
            options.register_custom_ops_library(str(library_path()))
        if self.form == "body":  # with its weights unpacked at each run, as where they don't fit unpacked
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(self.content, options, providers=["CPUExecutionProvider"])
        x = np.random.default_rng(1).standard_normal((tokens, self.width)).astype(np.float32)

        def run() -> float:
            start = time.perf_counter()
            session.run(None, {"x": x})
            return (time.perf_counter() - start) / self.count * 1e6

        return run


def interleaved(runners: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Times of each, in turn and in another order each round."""
    times: dict[str, list[float]] = {name: [] for name in runners}
    for run in runners.values():
        run()
    for _ in range(rounds):
        for name in random.sample(list(runners), len(runners)):
            times[name].append(runners[name]())
    return times


def table(rounds: int, threads: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of the operators' table."""
    limits = {count: read_bandwidth(count, CHAIN_BYTES) for count in threads}
    rows = []
    for kind, shapes in SHAPES.items():
        for width, other in shapes:
            own, peer, body = (Chain(kind, width, other, form) for form in ("own", "ort", "body"))
            for count in threads:
                for tokens in TOKENS:
                    runners = {"own": own.runner(count, tokens), "ort": peer.runner(count, tokens)}
                    times = interleaved(runners, rounds)
                    ratios = [a / b for a, b in zip(times["own"], times["ort"], strict=True)]
                    row = {
                        "operator": kind, "width": width, "rows": other, "threads": count, "tokens": tokens,
                        "own": statistics.median(times["own"]), "ort": statistics.median(times["ort"]),
                        "ratio": statistics.median(ratios), "limit": own.node_bytes / limits[count] * 1e6,
                    }  # fmt: skip
                    if tokens in BODY_TOKENS:
                        row["body"] = statistics.median(interleaved({"body": body.runner(count, tokens)}, 3)["body"])
                    rows.append(row)
                    print(line(row), flush=True)
    return rows


HEAD = (
    "| operator | shape | threads | tokens | kernel, µs | ONNX Runtime's operators, µs | ratio | body, µs "
    "| memory limit, µs |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    """A row of the table in Markdown."""
    body = f"{row['body']:.0f}" if "body" in row else ""
    return (
        f"| {row['operator']} | {row['width']} × {row['rows']} | {row['threads']} | {row['tokens']} | {row['own']:.1f} "
        f"| {row['ort']:.1f} | {row['ratio']:.2f} | {body} | {row['limit']:.1f} |"
    )


def decoding(model: Path, rounds: int, threads: int) -> list[dict[str, Any]]:
    """Tokens a second of onnxruntime-genai's int4 model and of what the recipe `decode` makes of it."""
    from gguf_speed import GenAI, size

    from graphopt.models.texts import wikipedia
    from graphopt.runtime_ops.generation import Generator
    from graphopt.verification.decoding_speed import benchmark_decoding

    steps = {"its graph in graphopt's generator": model}
    for name, recipe in {"decode blocks": "blocks", "decode blocks, CachedAttention": "decode"}.items():
        target = model.parent.parent / f"{model.parent.name}-{recipe}" / "model.onnx"
        if not target.exists():
            passes = ["convert-opset", "raise-contrib", "raise-rms-norm", "quantized-linear", "eliminate-dead-code"]
            given = {"passes": passes if recipe == "blocks" else [*passes[:-1], "cached-attention", passes[-1]]}
            (written := target.parent.with_suffix(".yaml")).write_text(json.dumps(given))
            command = [sys.executable, "-m", "graphopt", "optimize", str(model), "-o", str(target)]
            target.parent.mkdir(exist_ok=True)
            subprocess.run(
                [*command, "--recipe", str(written), "--verify", "none"], check=True, stdout=subprocess.DEVNULL
            )
        steps[name] = target
    makers: list[Callable[[], Any]] = [lambda: GenAI(model, threads, False)]

    def named(file: Path, name: str) -> Generator:
        made = Generator(file, threads=threads)
        made.name = name
        return made

    makers += [lambda name=name, file=file: named(file, name) for name, file in steps.items()]
    ids = ids_of(model, wikipedia("evaluation"))
    result = benchmark_decoding([m() for m in makers], makers[0](), ids[None], 128, rounds, threads=threads)
    limit = read_bandwidth(threads, CHAIN_BYTES)
    sizes = {name: size(file) for name, file in steps.items()}
    rows = []
    for item in [*result.models, result.control]:
        bytes_ = sizes.get(item.name, size(model))
        rows.append({
            "name": item.name, "prefill": item.prefill_tokens_s, "decode": item.decode_tokens_s,
            "ratio": 1 / item.decode_ratio.median, "of the limit": item.decode_tokens_s * bytes_ / limit,
        })  # fmt: skip
    return rows


def ids_of(model: Path, text: str) -> npt.NDArray[np.int64]:
    """The first 512 tokens of a text."""
    from graphopt.calibration.text import tokenize

    return np.asarray(tokenize(text, model.parent)[:512], np.int64)


DECODE_HEAD = "| system | prompt, tokens/s | new tokens/s | to genai | of the memory limit |\n|---|---|---|---|---|"


def decode_line(row: dict[str, Any]) -> str:
    """A row of the second table in Markdown."""
    share = f"{row['of the limit']:.0%}"
    return f"| {row['name']} | {row['prefill']:.0f} | {row['decode']:.1f} | {row['ratio']:.2f} | {share} |"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model.onnx of onnxruntime-genai's builder (int4)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, min(2, os.cpu_count() or 1)])
    parser.add_argument("--no-operators", action="store_true", help="the model only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="put the tables into this page, between its marks")
    options = parser.parse_args()
    found: dict[str, Any] = {"onnxruntime": ort.__version__}
    print(HEAD)
    found["operators"] = [] if options.no_operators else table(options.rounds, options.threads)
    if options.model is not None:
        found["decoding"] = decoding(options.model, options.rounds, max(options.threads))
        print(DECODE_HEAD)
        print("\n".join(map(decode_line, found["decoding"])))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    if options.page:
        parts = {"operators": [HEAD, *map(line, found["operators"])]}
        parts["decoding"] = [DECODE_HEAD, *map(decode_line, found.get("decoding", []))]
        for name, lines in parts.items():
            if len(lines) > 1:
                put_tables(options.page, name, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
