"""What the commands share: consoles, progress, JSON output, and options of the same meaning."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graphopt.errors import GraphoptError, ModelError

F = TypeVar("F", bound=Callable[..., Any])

MODEL = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
seed_option = click.option("--seed", default=0, show_default=True, help="Seed of the generated probe inputs.")
inputs_option = click.option(
    "--inputs",
    type=MODEL,
    metavar="FILE.npz",
    help="Inputs of your own, one array an input, besides the generated ones.",
)


def out() -> Console:
    """The console for results."""
    return Console(highlight=False)


def print_json(data: Any) -> None:
    """One JSON document to standard output."""
    json.dump(data, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, as `progress(what, done, total)`; silent where nobody looks."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda what, done, total: None
        return
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(task, description=what, completed=done, total=total)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically.

    Raises:
        ModelError: The folder isn't writable or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ModelError(f"{path} couldn't be written: {error.strerror}.") from error


def parse_size(text: str | None) -> int | None:
    """Bytes of "2GB", "500MiB", "1000000".

    Raises:
        GraphoptError: Not a size.
    """
    if text is None:
        return None
    units = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
    number = text.strip().lower().rstrip("bkmgi")
    unit = text.strip().lower()[len(number) :]
    try:
        return int(float(number) * units[unit.strip()])
    except (KeyError, ValueError) as error:
        raise click.BadParameter(f"{text!r} is not a size such as 2GB or 500MiB.") from error


def parse_dims(pairs: tuple[str, ...]) -> dict[str, int]:
    """Sizes of dynamic dimensions from `name=number` pairs."""
    dims = {}
    for pair in pairs:
        name, _, number = pair.partition("=")
        if not name or not number.isdigit():
            raise click.BadParameter(f"{pair!r} must be a dimension and a number, such as batch=4.")
        dims[name] = int(number)
    return dims


def exit_with(error: type[GraphoptError]) -> None:
    """End with the exit code of an error whose report has been printed already."""
    sys.exit(error.exit_code)
