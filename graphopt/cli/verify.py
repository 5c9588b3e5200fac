"""graphopt verify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphopt.cli.console import MODEL, exit_with, inputs_option, json_option, out, print_json, progress, seed_option
from graphopt.cli.judging import judge_of, quality_options
from graphopt.errors import UsageError, VerificationError


@click.command(
    epilog="""\b
Examples:
  graphopt verify model.onnx model.opt.onnx
  graphopt verify model.onnx model.opt.onnx --inputs real.npz --json
  graphopt verify decoder.onnx decoder.int4.onnx --quality held-out.txt --floor ppl=+5%

\b
Exit codes: 0 equal within the tolerances; 5 different, or not comparable; with --quality 0 judged, and 7 a
--floor was missed."""
)
@click.argument("reference", type=MODEL)
@click.argument("candidate", type=MODEL)
@inputs_option(instead=True)
@seed_option
@click.option("--tokenizer", type=MODEL, metavar="FOLDER", help="Folder of the tokenizer.json for text.")
@click.option("--image-values", type=click.Choice(["unit", "signed", "imagenet", "raw"]),
              help="What the model takes for pixels of images  [default: unit, 0 to 1]")  # fmt: skip
@quality_options
@json_option
def command(
    reference: Path,
    candidate: Path,
    inputs: Path | None,
    seed: int,
    tokenizer: Path | None,
    image_values: str | None,
    as_json: bool,
    **judging: Any,
) -> None:
    """Run REFERENCE and CANDIDATE on probe inputs, with and without ONNX Runtime's optimizations, and compare them
    where what they take for granted about inputs holds. With --quality, judge instead how well CANDIDATE still does
    the task of REFERENCE."""
    from graphopt.api import verify
    from graphopt.report.terminal import print_quality, print_verdict
    from graphopt.verification.quality.floors import require_floors

    if judging["quality"] is not None and inputs is not None:
        raise UsageError("--quality brings its own data; --inputs doesn't go with it.")
    for option, value in (("--tokenizer", tokenizer), ("--image-values", image_values)):
        if judging["quality"] is None and value is not None:
            raise UsageError(f"{option} is for the data of --quality; give both.")
    judge = judge_of(reference, tokenizer, images=image_values, **judging)
    if judge is not None:
        with progress(as_json) as bar:
            quality, missed = judge.judge(candidate, bar)
        if as_json:
            print_json(quality)
        else:
            print_quality(quality, out())
        require_floors(missed)
        return
    with progress(as_json) as bar:
        bar("comparing", 0, 1)
        verdict = verify(reference, candidate, inputs=inputs, seed=seed)
    if as_json:
        print_json(verdict.to_dict())
    else:
        print_verdict(verdict.to_dict(), out())
    if not verdict.ok:
        exit_with(VerificationError)
