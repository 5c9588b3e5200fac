"""graphopt target."""

from __future__ import annotations

import click
from rich.table import Table

from graphopt.cli.console import json_option, out, print_json
from graphopt.errors import UsageError


@click.command(
    epilog="""\b
Examples:
  graphopt target
  graphopt target cuda --json"""
)
@click.argument("name", type=click.Choice(["cpu", "cuda"]), default="cpu")
@json_option
def command(name: str, as_json: bool) -> None:
    """Ask the installed ONNX Runtime which operators it has kernels for, and which opsets it loads."""
    from graphopt.analysis.target import facts

    try:
        found = facts(name)
    except ImportError as error:
        raise UsageError("ONNX Runtime is missing; install graphopt[cpu] or graphopt[gpu].") from error
    needed = f"{name.upper()}ExecutionProvider"
    if needed not in found.providers:
        raise UsageError(f"ONNX Runtime {found.version} as installed has no {needed}; install graphopt[gpu].")
    if as_json:
        print_json(found.to_dict())
        return
    console = out()
    console.print(
        f"{found.runtime} {found.version} on {found.machine}; providers {', '.join(found.providers)}", soft_wrap=True
    )
    console.print(f"loads opset up to {found.highest_opset}, IR up to {found.highest_ir}")
    table = Table(box=None, pad_edge=False)
    for column in ("operator", "float32", "float16"):
        table.add_column(column)
    words = {True: "kernel", False: "expanded", None: "doesn't run"}
    by_operator: dict[str, dict[str, str]] = {}
    for entry in found.operators:
        by_operator.setdefault(entry.operator, {})[entry.dtype] = words[entry.kernel if entry.runs else None]
    for operator, dtypes in by_operator.items():
        table.add_row(operator, dtypes["float32"], dtypes["float16"])
    console.print(table)
    console.print("expanded: no kernel of its own, ONNX Runtime runs the operators it stands for", style="dim")
