"""SmolLM2 from its GGUF file (Q4_1): blocks kept, dequantized, and beside llama.cpp and onnxruntime-genai, interleaved.

    python benchmarks/gguf_speed.py                           exports, then measures all that is installed
    python benchmarks/gguf_speed.py --source model.onnx       with an export that is there (of export_smollm2.py)
    python benchmarks/gguf_speed.py --text wiki.txt --rounds 9 --threads 2
    python benchmarks/gguf_speed.py --threads 1 --prompt-tokens 64 --new-tokens 32      on a busy machine: see CPU time

Prints for each system the size on disk, how far its logits are from the dequantized export's (over 128 tokens), the
perplexity over 20 windows of 512 tokens, and tokens per second of a prompt and of the tokens after it, with the ratio
of times to llama.cpp. (Where threads spin, CPU time means little, and beside other work wall-clock time neither.) In
each round every system runs once, in another order each time, the first one twice, which shows the noise. Kept graphs
are made from the export and go through `graphopt optimize` as the dequantized one does; that of graphopt's own
operators by the recipe exact+decode. ONNX Runtime's threads spin while they wait, as is its default, and llama.cpp's;
`--sleeping`: they don't. `pip install 'graphopt[zoo]' llama-cpp-python` brings the peers; what isn't installed is left
out and said.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from attention import ASSUMED
from decoder_judge import session_options
from export_smollm2 import build, export, load_module

from graphopt.analysis.interleaved import NO_SPINNING
from graphopt.calibration.text import tokenize
from graphopt.errors import GraphoptError
from graphopt.export.gguf import from_gguf, keep_quantized
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.models.catalogue import fetch
from graphopt.models.texts import wikipedia
from graphopt.runtime_ops.block_products import Inputs
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.scoring import perplexity
from graphopt.verification.decoding_speed import benchmark_decoding

WINDOW, WINDOWS, COMPARED = 512, 20, 128
FLOAT, LLAMA, GENAI = "graphopt, dequantized", "llama.cpp", "genai int4"


class LlamaCpp:
    """The file itself in llama.cpp."""

    name, cache = LLAMA, "static"

    def __init__(self, path: Path, threads: int, every: bool = False) -> None:
        import llama_cpp

        self.api = llama_cpp
        self.model = llama_cpp.Llama(
            str(path), n_ctx=1024, n_batch=WINDOW, n_threads=threads, n_threads_batch=threads, logits_all=every,
            verbose=False,
        )  # fmt: skip

    def start(self, batch: int, capacity: int) -> LlamaCpp:
        self.model.reset()
        return self

    def prefill(self, decoding: LlamaCpp, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        return self.feed(ids)[:, -1]

    def feed(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        self.model.eval(ids[0].tolist())
        rows = ids.shape[1] if self.model._logits_all else 1
        logits = self.api.llama_get_logits(self.model.ctx)
        return np.ctypeslib.as_array(logits, shape=(1, rows, self.model.n_vocab()))


class GenAI:
    """A folder of onnxruntime-genai's builder, in its own loop: it chooses the tokens itself."""

    name, cache = GENAI, "static"

    def __init__(self, path: Path, threads: int, sleeping: bool) -> None:
        import json

        import onnxruntime_genai as genai

        options = {"intra_op_num_threads": threads, **(NO_SPINNING if sleeping else {})}
        config = genai.Config(str(path.parent))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.genai, self.model = genai, genai.Model(config)

    def start(self, batch: int, capacity: int) -> Any:
        parameters = self.genai.GeneratorParams(self.model)
        length = capacity + 1  # an end of text would end the measurement
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        self.generator = self.genai.Generator(self.model, parameters)
        return self

    def prefill(self, decoding: Any, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        self.generator.append_tokens(ids[0].astype(np.int32))
        self.generator.generate_next_token()  # the one after the prompt, which takes no run
        return np.zeros((1, 1))

    def feed(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        self.generator.generate_next_token()
        return np.zeros((1, 1, 1))


def main() -> int:
    """Make what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("gguf-benchmark"), help="folder for the graphs, kept")
    parser.add_argument("--source", type=Path, help="an export of SmolLM2 by export_smollm2.py")
    parser.add_argument("--text", type=Path, help="a text file; default: graphopt's evaluation text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-perplexity", action="store_true")
    parser.add_argument("--sleeping", action="store_true", help="ONNX Runtime's threads sleep while they wait")
    options = parser.parse_args()
    try:
        run(options)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(options: argparse.Namespace) -> None:
    """Measure and print a table."""
    path = fetch("smollm2", progress=print)
    files = graphs(path, options.work, options.source)
    text = options.text.read_text(encoding="utf-8") if options.text else wikipedia("evaluation")
    ids = tokenize(text, options.work / "tokenizer")[: WINDOW * WINDOWS]
    sizes = {name: size(file) for name, file in files.items()}
    makers: dict[str, Callable[[], Any]] = {
        name: lambda file=file, name=name: named(generator(file, options), name) for name, file in files.items()
    }
    scored = dict(makers)
    if GENAI in files:
        makers[GENAI] = lambda: GenAI(files[GENAI], options.threads, options.sleeping)
    try:
        import llama_cpp

        print(f"llama-cpp-python {llama_cpp.__version__}: {llama_cpp.llama_print_system_info().decode()}")
        makers = {LLAMA: lambda: LlamaCpp(path, options.threads), **makers}
        scored = {LLAMA: lambda: LlamaCpp(path, options.threads, every=True), **scored}
        sizes[LLAMA] = path.stat().st_size
    except ImportError as error:
        print(f"{LLAMA} is left out: {error}")
    expected = logits(scored[FLOAT](), ids[:COMPARED])
    errors, scores = {}, {}
    for name, make in scored.items():
        system = make()
        found = logits(system, ids[:COMPARED])
        errors[name] = float(np.abs(found - expected).max() / np.abs(expected).max())
        if not options.no_perplexity:
            scores[name] = score(system, ids)
            print(f"{name}: perplexity {scores[name]:.3f}", flush=True)
        del system
    systems = [make() for make in makers.values()]
    control = next(iter(makers.values()))()
    prompt = np.asarray(ids[: options.prompt_tokens], np.int64)[None]
    result = benchmark_decoding(
        systems, control, prompt, options.new_tokens, options.rounds, threads=options.threads,
        progress=lambda _, n, total: print(f"round {n} of {total}", flush=True),
    )  # fmt: skip
    print(f"\nratios: time over that of {result.models[0].name}; control: the same once more\n")
    print("| system | MB | logits off by | perplexity | prefill | decode | decode wall | decode CPU |")
    print("|---|---|---|---|---|---|---|---|")
    for item in [*result.models, result.control]:
        known = item.name in sizes
        megabytes = f"{sizes[item.name] / 1e6:.1f}" if known else ""
        off = f"{errors[item.name]:.1e}" if known else ""
        words = f"{scores[item.name]:.3f}" if item.name in scores else ""
        print(
            f"| {item.name} | {megabytes} | {off} | {words} | {item.prefill_tokens_s:.0f} | {item.decode_tokens_s:.1f} "
            f"| {item.decode_ratio.median:.2f} | {item.decode_cpu_ratio.median:.2f} |"
        )


def graphs(path: Path, work: Path, source: Path | None) -> dict[str, Path]:
    """The files that are compared, by what they are called; made where they are missing."""
    made = from_gguf(path)
    tokenizer = work / "tokenizer"
    if not tokenizer.exists():
        tokenizer.mkdir(parents=True)
        made.write_companions(tokenizer)
    module = None
    if source is None:
        source = work / "export" / "model.onnx"
        if not source.exists():
            start = time.perf_counter()
            module = load_module("sdpa")
            export(module, source, "dynamo", 21)
            print(f"exported in {time.perf_counter() - start:.0f} s")
    files = {FLOAT: optimized(source, work / "float")}
    for inputs in get_args(Inputs):
        target = work / inputs
        if not (target / "model.onnx").exists():
            model = load(source)
            report = keep_quantized(model, made.weights, inputs=inputs)
            print(f"{inputs}: kept { ({k: len(v) for k, v in report.kept.items()}) }, float: {report.left}")
            save(model, target / "kept" / "model.onnx", external_data=True)
            optimized(target / "kept" / "model.onnx", target, "exact+decode" if inputs == "int16" else "exact")
            shutil.rmtree(target / "kept")
        files[f"graphopt, {inputs}"] = target / "model.onnx"
    genai = work / "genai" / "model.onnx"
    if not genai.exists():
        try:
            build(module or load_module("sdpa"), genai, "int4")
        except GraphoptError as error:
            print(f"{GENAI} is left out: {error}")
            return files
    return {**files, GENAI: genai}


def optimized(source: Path, folder: Path, recipe: str = "exact") -> Path:
    """The graph after `graphopt optimize` with what a generator may assume."""
    target = folder / "model.onnx"
    if not target.exists():
        command = [sys.executable, "-m", "graphopt", "optimize", str(source), "-o", str(target), "--verify", "none"]
        command += ["--recipe", recipe]
        command += [part for name in ASSUMED for part in ("--assume", name)]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise GraphoptError(f"graphopt optimize fails on {source}: {result.stdout.strip()[-400:]}")
    return target


def size(file: Path) -> int:
    """Bytes of a model and its external data."""
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*"))


def generator(file: Path, options: argparse.Namespace) -> Generator:
    """A generator whose threads wait as the options say."""
    if options.sleeping:
        return Generator(file, sess_options=session_options(options.threads))
    return Generator(file, threads=options.threads)


def named(system: Generator, name: str) -> Generator:
    """The generator under another name."""
    system.name = name
    return system


def logits(system: Any, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The logits after each of some tokens [tokens, vocabulary]."""
    found = system.start(1, len(ids)).feed(np.asarray(ids, np.int64)[None])
    return np.array(found[0], np.float32)


def score(system: Any, ids: npt.NDArray[np.int64]) -> float:
    """The perplexity over windows that know nothing of each other."""
    if isinstance(system, Generator):
        return float(perplexity(system, ids, WINDOW).value)
    total, count = 0.0, 0
    for start in range(0, len(ids), WINDOW):
        window = ids[start : start + WINDOW]
        rows = logits(system, window)[:-1].astype(np.float64)
        top = rows.max(axis=1, keepdims=True)
        norms = np.log(np.exp(rows - top).sum(axis=1)) + top[:, 0]
        total += float((norms - rows[np.arange(len(rows)), window[1:]]).sum())
        count += len(rows)
    return float(np.exp(total / count))


if __name__ == "__main__":
    sys.exit(main())
