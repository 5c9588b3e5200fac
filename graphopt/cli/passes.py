"""graphopt passes."""

from __future__ import annotations

import click
from rich.table import Table

from graphopt.cli.console import json_option, out, print_json


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  graphopt passes
  graphopt passes show raise-layer-norm""",
)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the passes, or show the page of one."""
    if ctx.invoked_subcommand is None:
        _list(as_json)


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List every pass with its family, its guarantee and what it does."""
    _list(as_json)


def _list(as_json: bool) -> None:
    from graphopt.passes import registry
    from graphopt.report.pages import summary

    rows = [
        {
            "name": name,
            "family": cls.family,
            "guarantee": cls.guarantee.value,
            "summary": summary(cls),
            "paper": cls.paper,
        }
        for name, cls in registry.builtin().items()
    ]
    offered = [
        {"name": n, "family": "other", "guarantee": "", "summary": e.value, "paper": ""}
        for n, e in registry.offered().items()
    ]
    if as_json:
        print_json(rows + offered)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("pass", "family", "guarantee", "what it does"):
        table.add_column(column, no_wrap=column != "what it does")
    for row in rows + offered:
        table.add_row(row["name"], row["family"], row["guarantee"], row["summary"])
    out().print(table)


@command.command()
@click.argument("name")
def show(name: str) -> None:
    """Show the page of the pass NAME: what it does, formula, source, options, when not to use it."""
    from rich.markdown import Markdown

    from graphopt.errors import UsageError
    from graphopt.passes import registry
    from graphopt.passes.base import Pass
    from graphopt.report.pages import page

    cls = registry.find(name)
    if not issubclass(cls, Pass):
        raise UsageError(f"{name!r} is not one of graphopt's passes; its own documentation describes it.")
    console = out()
    if console.is_terminal:
        console.print(Markdown(page(cls)))
    else:
        click.echo(page(cls))
