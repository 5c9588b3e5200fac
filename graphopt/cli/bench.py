"""graphopt bench."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli.console import MODEL, inputs_option, json_option, out, parse_dims, print_json, progress, seed_option


@click.command(
    epilog="""\b
Examples:
  graphopt bench model.onnx model.opt.onnx
  graphopt bench a.onnx b.onnx c.onnx --dim batch=1 --dim sequence=128 --runs 50 --threads 2"""
)
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option("--runs", default=30, show_default=True, type=click.IntRange(min=3), help="Rounds that are counted.")
@click.option("--threads", default=0, type=click.IntRange(min=0), help="Threads of each session  [default: all cores]")
@click.option("--dim", "dims", multiple=True, metavar="NAME=N", help="Size of a dynamic dimension of the inputs.")
@inputs_option(instead=True)
@seed_option
@json_option
def command(
    models: tuple[Path, ...],
    runs: int,
    threads: int,
    dims: tuple[str, ...],
    inputs: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    """Run MODELS in turn on the same inputs and print medians and ratios of CPU and wall time to the first one."""
    from graphopt.report.terminal import print_timing
    from graphopt.verification.workload import benchmark_models

    with progress(as_json) as bar:
        result = benchmark_models(
            list(models),
            inputs=inputs,
            seed=seed,
            runs=runs,
            threads=threads,
            dims=parse_dims(dims) or None,
            progress=bar,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_timing(result.to_dict(), out())
