"""Quantization measured: every recipe on off-grid SmolLM2, integer encoders and vision models, memory on a large one.

    python benchmarks/quantization.py --page docs/quantization.md                       all of it, hours
    python benchmarks/quantization.py --resume --page docs/quantization.md              what is missing
    python benchmarks/quantization.py --parts decoder --only rtn gptq --windows 4 --rounds 3
    python benchmarks/quantization.py --off-grid off-grid/model.onnx --tokenizer off-grid --work quantized

Three parts. **decoder**: each recipe of `quantization_variants.py` at each of its settings on off-grid SmolLM2
(`graphopt.models.off_grid`): bytes on disk, perplexity, divergence and agreement with the float model on the same
tokens, decode and prefill speed (interleaved with the float model's, in two sittings), and beside them ONNX Runtime's
quantizers, onnxruntime-genai's int4 model and llama.cpp on the same weights, where they are installed. **models**:
MiniLM, PP-OCR's recogniser, ResNet-50, YOLOv8n and classifiers of Fashion-MNIST with integer activations. **memory**:
peak memory and time of quantizing a model of 2.7 GB.

What was measured is kept in the work folder: `--resume` goes on there. A recipe that doesn't ship, or fails, is listed
with the reason. `--page` writes the tables between the page's marks, makes the page where there is none, and writes the
Pareto plot beside it (`quantization.svg`).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import quantization_decoder
import quantization_memory
import quantization_models
from measured_page import circumstances, put_tables

from graphopt.errors import GraphoptError

PARTS = ("decoder", "models", "memory")


def main() -> int:
    """Measure what is asked for, print it, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("quantization-benchmark"), help="folder for graphs, kept")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", default=[], help="methods, rows or models; default: all")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run with the same options measured")
    parser.add_argument("--page", type=Path, help="write the tables there, and the plot beside it")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--source", type=Path, help="decoder: an export of SmolLM2 by export_smollm2.py")
    parser.add_argument("--off-grid", type=Path, help="decoder: the off-grid model, instead of making it")
    parser.add_argument("--tokenizer", type=Path, help="decoder: the folder of its tokenizer.json")
    parser.add_argument("--text", type=Path, help="decoder: text to judge with; default: graphopt's evaluation text")
    parser.add_argument("--calibration", type=Path, help="decoder: text to calibrate with; default: graphopt's")
    parser.add_argument("--windows", type=int, default=16, help="decoder: windows of 512 tokens that judge")
    parser.add_argument("--samples", type=int, default=16, help="decoder: windows of 512 tokens to calibrate with")
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds of each of two sittings; 0: no timing of decoders"
    )
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--large", type=float, default=quantization_memory.BYTES, help="memory: bytes of the model")
    options = parser.parse_args()
    try:
        for part in options.parts:
            plot = None
            if part == "decoder":
                lines, plot = quantization_decoder.measure(options)
            elif part == "models":
                lines = quantization_models.measure(options)
            else:
                lines = quantization_memory.measure(options)
            text = "\n".join([circumstances(), "", *lines])
            print(text)
            if options.page is not None:
                write(options.page, part, text, plot)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def write(page: Path, part: str, text: str, plot: str | None) -> None:
    """Put a part's tables into the page, which is made where it is missing, and its plot beside it."""
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(PAGE, encoding="utf-8")
    put_tables(page, part, text)
    if plot is not None:
        page.with_suffix(".svg").write_text(plot, encoding="utf-8")


PAGE = """# Quantization measured

The tables are written by `python benchmarks/quantization.py --page docs/quantization.md`.

## A decoder in few bits

The weights of SmolLM2-135M lie on a 4-bit grid already, so everything here is on the exactly equivalent off-grid model
of `python -m graphopt.models.off_grid`. Speeds are those of the float model over the ratio of times, measured in turn.
*Of RTN's loss closed*: how much of what rounding to nearest loses at the same bits and groups, in perplexity, a method
gets back.

![Divergence from the float model by size on disk](quantization.svg)

<!-- decoder -->
<!-- end of decoder -->

## Encoders and vision models with integer activations

<!-- models -->
<!-- end of models -->

## Memory and time on a large model

<!-- memory -->
<!-- end of memory -->
"""


if __name__ == "__main__":
    sys.exit(main())
