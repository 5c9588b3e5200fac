"""graphopt verify."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli.console import MODEL, exit_with, inputs_option, json_option, out, print_json, progress, seed_option
from graphopt.errors import VerificationError


@click.command(
    epilog="""\b
Examples:
  graphopt verify model.onnx model.opt.onnx
  graphopt verify model.onnx model.opt.onnx --inputs real.npz --json

\b
Exit codes: 0 equal within the tolerances; 5 different, or not comparable."""
)
@click.argument("reference", type=MODEL)
@click.argument("candidate", type=MODEL)
@inputs_option(instead=True)
@seed_option
@json_option
def command(reference: Path, candidate: Path, inputs: Path | None, seed: int, as_json: bool) -> None:
    """Run REFERENCE and CANDIDATE on probe inputs, with and without ONNX Runtime's optimizations, and compare them
    where what they take for granted about inputs holds."""
    from graphopt.api import verify
    from graphopt.report.terminal import print_verdict

    with progress(as_json) as bar:
        bar("comparing", 0, 1)
        verdict = verify(reference, candidate, inputs=inputs, seed=seed)
    if as_json:
        print_json(verdict.to_dict())
    else:
        print_verdict(verdict.to_dict(), out())
    if not verdict.ok:
        exit_with(VerificationError)
