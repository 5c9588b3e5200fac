"""graphopt bench."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphopt.cli.console import MODEL, inputs_option, json_option, out, parse_dims, print_json, progress, seed_option
from graphopt.errors import UsageError

GENERATION = {
    "prompt_tokens": "--prompt-tokens", "new_tokens": "--new-tokens", "batch": "--batch", "cache": "--cache",
    "text": "--perplexity", "tokenizer": "--tokenizer", "window": "--window", "tokens": "--tokens",
}  # fmt: skip
"""Options that go with --generate only."""


@click.command(
    epilog="""\b
Examples:
  graphopt bench model.onnx model.opt.onnx
  graphopt bench a.onnx b.onnx c.onnx --dim batch=1 --dim sequence=128 --runs 50 --threads 2
  graphopt bench decoder.onnx --generate --against other.onnx --prompt-tokens 512 --new-tokens 128
  graphopt bench decoder.onnx --generate --perplexity text.txt --tokenizer folder"""
)
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option(
    "--runs", type=click.IntRange(min=3), help="Rounds that are counted.  [default: 30, or 5 with --generate]"
)
@click.option("--threads", default=0, type=click.IntRange(min=0), help="Threads of each session  [default: all cores]")
@click.option("--dim", "dims", multiple=True, metavar="NAME=N", help="Size of a dynamic dimension of the inputs.")
@inputs_option(instead=True)
@click.option("--against", type=MODEL, multiple=True, help="One more model; the same as one more argument.")
@click.option("--generate", is_flag=True, help="Time decoders that read a prompt and write text with a KV cache.")
@click.option("--prompt-tokens", type=click.IntRange(min=1), help="Tokens of each prompt.  [default: 512]")
@click.option("--new-tokens", type=click.IntRange(min=1), help="Tokens written after it.  [default: 128]")
@click.option("--batch", type=click.IntRange(min=1), help="Prompts at once.  [default: 1]")
@click.option(
    "--cache",
    type=click.Choice(["auto", "growing", "static"]),
    help="A new cache each step, or one shared buffer.  [default: static where it can be]",
)
@click.option(
    "--perplexity",
    "text",
    metavar="FILE.txt",
    help='Also the perplexity of a text; "wikipedia": the built-in one. The prompts are its beginning then.',
)
@click.option("--tokenizer", type=MODEL, metavar="FOLDER", help="Where the tokenizer.json for the text lies.")
@click.option("--window", type=click.IntRange(min=2), help="Tokens of a window of the text.  [default: 512]")
@click.option("--tokens", type=click.IntRange(min=2), help="Use this many tokens of the text.  [default: all]")
@seed_option
@json_option
def command(
    models: tuple[Path, ...],
    runs: int | None,
    threads: int,
    dims: tuple[str, ...],
    inputs: Path | None,
    against: tuple[Path, ...],
    generate: bool,
    seed: int,
    as_json: bool,
    **generation: Any,
) -> None:
    """Run MODELS in turn on the same inputs and print medians and ratios of CPU and wall time to the first one."""
    given = {name: value for name, value in generation.items() if value is not None}
    paths = [*models, *against]
    if generate:
        if dims or inputs is not None:
            raise UsageError("--generate makes its inputs itself; --dim and --inputs don't go with it.")
        _generation(paths, given | {"runs": runs or 5, "threads": threads, "seed": seed}, as_json)
        return
    if given:
        raise UsageError(f"{GENERATION[next(iter(given))]} goes with --generate only.")
    from graphopt.report.terminal import print_timing
    from graphopt.runtime_ops.library import described, mentioned
    from graphopt.verification.workload import benchmark_models

    with progress(as_json) as bar:
        result = benchmark_models(
            paths,
            inputs=inputs,
            seed=seed,
            runs=runs or 30,
            threads=threads,
            dims=parse_dims(dims) or None,
            progress=bar,
        )
    if as_json:
        print_json(result.to_dict())
    else:
        print_timing(result.to_dict(), out())
        if any(mentioned(path) for path in paths):
            out().print(described(), markup=False, soft_wrap=True)


def _generation(paths: list[Path], given: dict[str, Any], as_json: bool) -> None:
    from graphopt.cli.bench_generation import Request, bench_generation
    from graphopt.report.terminal import print_generation

    with progress(as_json) as bar:
        data = bench_generation(paths, Request(**given), bar)
    if as_json:
        print_json(data)
    else:
        print_generation(data, out())
