"""graphopt inspect."""

from __future__ import annotations

from pathlib import Path

import click

from graphopt.cli.console import MODEL, assume_option, exit_with, json_option, out, parse_dims, print_json
from graphopt.errors import ModelError, UsageError


@click.command(
    epilog="""\b
Examples:
  graphopt inspect model.onnx
  graphopt inspect model.onnx --why                    what wasn't raised, folded or removed, and why
  graphopt inspect model.onnx --why --assume no-left-padding
  graphopt inspect model.onnx --dim batch=8 --dim sequence=512"""
)
@click.argument("model", type=MODEL)
@click.option("--why", is_flag=True, help="Run the exact passes on a copy and list the sites that they left alone.")
@assume_option("With --why: take for granted that inputs suit this.")
@click.option("--dim", "dims", multiple=True, metavar="NAME=N", help="Size of a dynamic dimension, for FLOPs.")
@json_option
def command(model: Path, why: bool, assume: tuple[str, ...], dims: tuple[str, ...], as_json: bool) -> None:
    """Say what MODEL is: interface, operators, parameters, bytes, FLOPs, structures found."""
    from graphopt.api import inspect
    from graphopt.report.terminal import print_inspection

    if assume and not why:
        raise UsageError("--assume is for the passes that --why runs; give both.")
    data = inspect(model, why=why, dims=parse_dims(dims) or None, assume=assume)
    if as_json:
        print_json(data)
    else:
        print_inspection(data, out())
    if data["problems"]:
        exit_with(ModelError)
