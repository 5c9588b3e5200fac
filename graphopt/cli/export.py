"""graphopt export."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from graphopt.cli.console import MODEL, json_option, out, print_json, require_writable
from graphopt.errors import UsageError


@click.command(
    epilog="""\b
Examples:
  graphopt export ./SmolLM2 -o smollm2/                        a decoder with its KV cache, from a Hugging Face folder
  graphopt export ./Llama-7B -o llama/ --dtype float16 --last-logits
  graphopt export SmolLM2.Q4_1.gguf -o smollm2-q4/ --keep-quantized
  graphopt export ./SmolLM2 -o tuned/ --adapter ./my-lora      a peft adapter merged into the weights
  graphopt export ./whisper-tiny -o whisper/                   encoder, decoder, and decoder with past
  graphopt export ./all-MiniLM-L6-v2 -o minilm/                an encoder
  graphopt export my_models:small_cnn -o cnn.onnx              a callable that returns (module, example inputs)
  graphopt export ./bert -o bert.onnx --attention eager --exporter torchscript"""
)
@click.argument("source")
@click.option("-o", "--output", type=MODEL, required=True, help="A folder that gets model.onnx, or a .onnx file.")
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--last-logits", is_flag=True, help="A decoder gives the logits of the last position only.")
@click.option(
    "--raw", is_flag=True, help="The graph as the exporter writes it; else it's brought to standard operators, exactly."
)
@click.option("--exporter", type=click.Choice(["dynamo", "torchscript"]), help="Default: dynamo, then torchscript.")
@click.option(
    "--attention",
    type=click.Choice(["sdpa", "eager"]),
    help="transformers' implementation to trace. Default: one that exports to ONNX's own operator, where it can be.",
)
@click.option("--opset", type=int, help="Version of the default operator domain. Default: 23; torchscript: 17.")
@click.option("--every-layer", is_flag=True, help="Trace every layer; else equal ones are traced once and repeated.")
@click.option(
    "--verify",
    type=click.Choice(["auto", "full", "layers", "none"]),
    default="auto",
    show_default=True,
    help="Compare all of it with PyTorch, or the first layers; auto: all, if memory is free for that.",
)
@click.option(
    "--adapter", "adapters", multiple=True, type=click.Path(path_type=Path), help="A peft folder; may be repeated."
)
@click.option("--keep-adapters", is_flag=True, help="Keep adapters beside the weights, to be switched at run time.")
@click.option("--keep-quantized", is_flag=True, help="Keep the integers of a GGUF file's weights, without loss.")
@click.option(
    "--activations",
    type=click.Choice(["int16", "float32", "int8x2", "int8"]),
    default="int16",
    show_default=True,
    help="What the operators of kept integers make of their inputs: int16 is graphopt's own operator; int8 rounds.",
)
@click.option("--for", "runtime", type=click.Choice(["genai"]), help="Write genai_config.json for onnxruntime-genai.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@json_option
def command(
    source: str, output: Path, force: bool, raw: bool, every_layer: bool, as_json: bool, **options: Any
) -> None:
    """Export SOURCE to ONNX and verify it against PyTorch.

    SOURCE is a Hugging Face folder or name, a GGUF file, or module:callable. Decoders get their KV cache as inputs and
    outputs, and batch, sequence and past of any length; encoder-decoders and vision-language models become a file for
    each part. Weights are read from the checkpoint one at a time, so a model may be larger than memory.
    """
    from rich.console import Console

    from graphopt.api import canonical
    from graphopt.export.exporter import export_report

    targets = [output] if output.suffix == ".onnx" else [output / "model.onnx", *output.glob("*.onnx")]
    require_writable(targets[0])
    if (found := next((target for target in targets if target.exists()), None)) is not None and not force:
        raise UsageError(f"{found} exists; give another output, or --force to overwrite it.")
    errors = Console(stderr=True)
    with errors.status("exporting") as status:
        report = export_report(
            source,
            output,
            finish=None if raw or options["opset"] else canonical,
            repeat=not every_layer,
            progress=None if as_json else lambda text: status.update(text),
            **options,
        )
    if as_json:
        print_json({**dataclasses.asdict(report), "max_relative_error": report.max_relative_error})
        return
    console = out()
    seconds = ", ".join(f"{step} {time:.1f}" for step, time in report.seconds.items())
    for part in report.parts:
        console.print(f"{part.path}: {part.nodes} nodes, opset {part.opset}", markup=False, soft_wrap=True)
        for kind, values in (("input ", part.inputs), ("output", part.outputs)):
            for name, dims in _shortened(values):
                console.print(f"  {kind} {name} {dims}", markup=False, soft_wrap=True)
        if part.errors:
            worst = max(part.errors.values())
            console.print(f"  equal to PyTorch to {worst:.1e} of the largest output value")
    console.print(f"traced with {report.way}")
    console.print(f"{sum(report.seconds.values()):.1f} s: {seconds}", markup=False, soft_wrap=True)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def _shortened(values: Mapping[str, tuple[int | str, ...]]) -> list[tuple[str, str]]:
    """Names and dimensions; of the layers of a cache the first and the last."""
    lines: list[tuple[str, str]] = []
    numbered = re.compile(r"(\D*?\.)(\d+)(\..*)")
    for name, dims in values.items():
        match = numbered.fullmatch(name)
        if match and int(match[2]) > 0:
            first = f"{match[1]}0{match[3]}"
            for index, (known, _) in enumerate(lines):
                if known.startswith(first) and values.get(first) == dims:
                    lines[index] = (f"{first} ... {match[2]}{match[3]}", str(list(dims)))
                    break
            else:
                lines.append((name, str(list(dims))))
        else:
            lines.append((name, str(list(dims))))
    return lines
