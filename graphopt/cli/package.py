"""graphopt package."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from graphopt.cli.console import MODEL, json_option, out, print_json


@click.command(
    epilog="""\b
Examples:
  graphopt package model.opt.onnx -o served/
  graphopt package smollm2/model.onnx -o served/ --force   replaces the package of before
  graphopt package model.opt.onnx -o served/ --json"""
)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=MODEL, required=True, metavar="FOLDER", help="The folder that is made.")
@click.option("--force", is_flag=True, help="Replace a folder that was made like this.")
@json_option
def command(model: Path, output: Path, force: bool, as_json: bool) -> None:
    """Put MODEL into a folder with everything that runs it on ONNX Runtime alone, without graphopt or Python.

    That is the model with its weights, what lies beside it (tokenizer, configuration), the library with the kernels of
    graphopt's operators where the model has such, and a README.md with the lines to copy for Python, C++ and C#.
    """
    from graphopt.export.serving_package import package

    made = package(model, output, force=force)
    if as_json:
        print_json(dataclasses.asdict(made))
        return
    console = out()
    for name in made.files:
        size = (made.folder / name).stat().st_size
        console.print(f"{made.folder / name}  {size:,} bytes", markup=False, soft_wrap=True)
    if made.library is None:
        console.print(f"without the library of kernels: {made.note}", markup=False, soft_wrap=True)
    for sentence in made.left:
        console.print(sentence, markup=False, soft_wrap=True)
    console.print(f"{made.folder / 'README.md'} says how to run it", markup=False, soft_wrap=True)
