"""graphopt passes."""

from __future__ import annotations

import re

import click
from rich.table import Table
from rich.text import Text

from graphopt.cli.console import json_option, out, print_json
from graphopt.errors import UsageError


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


@command.command("list", short_help="List every pass.")
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
    rows += [_offered(name) for name in sorted(registry.offered()) if name not in registry.builtin()]
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("pass", "family", "guarantee", "what it does"):
        table.add_column(column, no_wrap=column != "what it does")
    for row in rows:
        table.add_row(*(Text(row[key]) for key in ("name", "family", "guarantee", "summary")))
    out(wide=True).print(table)


def _offered(name: str) -> dict[str, str]:
    """The row of a pass of another package."""
    from graphopt.passes import registry
    from graphopt.passes.base import Pass
    from graphopt.report.pages import summary

    row = {"name": name, "family": "other", "guarantee": "unstated", "summary": "", "paper": ""}
    try:
        cls = registry.find(name)
    except UsageError as error:
        return {**row, "guarantee": "", "summary": str(error)}
    if not issubclass(cls, Pass):
        return {**row, "summary": registry.offered()[name].value}
    return {**row, "family": cls.family, "guarantee": cls.guarantee.value, "summary": summary(cls), "paper": cls.paper}


@command.command(short_help="Show the page of a pass.")
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Show the page of the pass NAME: what it does, formula, source, options, when not to use it."""
    from rich.markdown import Markdown

    from graphopt.passes import registry
    from graphopt.passes.base import Pass
    from graphopt.report.pages import page

    cls = registry.find(name)
    if not issubclass(cls, Pass):
        raise UsageError(f"{name!r} is not one of graphopt's passes; its own documentation describes it.")
    text = re.sub(r"\A<!--.*?-->\s*", "", page(cls))  # what it is generated from concerns who changes the page
    console = out()
    if as_json:
        print_json({"name": name, "family": cls.family, "guarantee": cls.guarantee.value, "page": text.rstrip()})
    elif console.is_terminal:
        console.print(Markdown(text))
    else:
        click.echo(text.rstrip())
