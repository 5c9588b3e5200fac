"""graphopt export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from graphopt.cli.console import MODEL, json_option, out, print_json, require_writable
from graphopt.errors import UsageError


@click.command(
    epilog="""\b
Examples:
  graphopt export ./all-MiniLM-L6-v2 -o minilm/               a Hugging Face folder
  graphopt export my_models:small_cnn -o cnn.onnx             a callable that returns (module, example inputs)
  graphopt export ./bert -o bert.onnx --attention eager --exporter torchscript"""
)
@click.argument("source")
@click.option("-o", "--output", type=MODEL, required=True, help="A .onnx file, or a folder that gets model.onnx.")
@click.option("--exporter", type=click.Choice(["dynamo", "torchscript"]), default="dynamo", show_default=True)
@click.option("--attention", type=click.Choice(["sdpa", "eager"]), default="sdpa", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True)
@click.option("--opset", type=int, help="Version of the default operator domain.")
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@json_option
def command(
    source: str, output: Path, exporter: str, attention: str, dtype: str, opset: int | None, force: bool, as_json: bool
) -> None:
    """Export SOURCE (a Hugging Face folder or name, or module:callable) to ONNX and verify it against PyTorch."""
    from rich.console import Console

    from graphopt.export.exporter import export_report

    target = output if output.suffix == ".onnx" else output / "model.onnx"
    require_writable(target)
    if target.exists() and not force:
        raise UsageError(f"{target} exists; give another output, or --force to overwrite it.")
    errors = Console(stderr=True)
    with errors.status("exporting") as status:
        report = export_report(
            source,
            output,
            opset=opset,
            attention=attention,  # type: ignore[arg-type]
            exporter=exporter,  # type: ignore[arg-type]
            dtype=dtype,
            progress=None if as_json else lambda text: status.update(text),
        )
    if as_json:
        print_json({**dataclasses.asdict(report), "max_relative_error": report.max_relative_error})
        return
    console = out()
    what = f"{report.nodes} nodes, opset {report.opset}, {report.seconds:.1f} s"
    console.print(f"{report.path}: {what}", markup=False, soft_wrap=True)
    for name, dims in report.inputs.items():
        console.print(f"  input  {name} {list(dims)}", markup=False, soft_wrap=True)
    for name, dims in report.outputs.items():
        console.print(f"  output {name} {list(dims)}", markup=False, soft_wrap=True)
    console.print(f"  equal to PyTorch to {report.max_relative_error:.1e} of the largest output value")
    for note in report.notes:
        console.print(f"  note: {note}", markup=False, soft_wrap=True)
