"""What the commands share: consoles, progress, JSON output, and options of the same meaning."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console

from graphopt.errors import GraphoptError, ModelError, UsageError

F = TypeVar("F", bound=Callable[..., Any])

MODEL = click.Path(path_type=Path)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
seed_option = click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the generated probe inputs."
)
LIST_COLUMNS = 200
"""Width of a list that no terminal shows, so that a line is one entry for `grep`."""


def inputs_option(instead: bool) -> Callable[[F], F]:
    """`--inputs`, in place of the generated inputs (`instead`) or besides them."""
    place = "instead of" if instead else "besides"
    help_text = f"Inputs of your own, one array an input, {place} the generated ones."
    return click.option("--inputs", type=MODEL, metavar="FILE.npz", help=help_text)


class AssumeOption(click.Option):
    """`--assume`, whose help names every assumption that exists; it is looked up when help is asked for."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        """See the class."""
        from graphopt.graph.assumptions import KINDS

        kinds = [f"{kind.name}: {kind.meaning}; e.g. {kind.example}." for kind in KINDS.values()]
        self.help = "\n\n".join([(self.help or "").split("\n")[0], *kinds])
        return super().get_help_record(ctx)


def assume_option(purpose: str) -> Callable[[F], F]:
    """`--assume`, which may be given several times."""
    help_text = f"{purpose} May be given several times:"
    return click.option("--assume", cls=AssumeOption, multiple=True, metavar="NAME", help=help_text)


def out(wide: bool = False) -> Console:
    """The console for results; `wide` for lists, which are as wide as they need where no terminal shows them."""
    console = Console(highlight=False)
    if wide and not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LIST_COLUMNS
    return console


def print_json(data: Any) -> None:
    """One JSON document to standard output."""
    json.dump(data, sys.stdout, indent=2, default=str)
    sys.stdout.write("\n")


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, as `progress(what, done, total)`, with an estimate of the time that is left;
    silent where nobody looks."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal or console.is_dumb_terminal:
        yield lambda what, done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"), console=console, transient=True,
    ) as bar:  # fmt: skip
        task, left = bar.add_task("", total=None, left=""), TimeLeft()

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total, left=left.told(what, done, total))

        yield tell


class TimeLeft:
    """How long something that is told step by step takes from now on, by how long its steps took on average.

    Args:
        clock: Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._begun = ("", 0, 0.0)
        self._last = 0

    def told(self, what: str, done: int, total: int) -> str:
        """What is said of it, as "about 0:01:30 left"; nothing before a step is done, or for less than a second.

        Args:
            what: What is done; something else begins anew.
            done: Steps that are done.
            total: Steps in all.
        """
        now = self._clock()
        if what != self._begun[0] or done < self._last:
            self._begun = what, done, now
        self._last = done
        _, first, begin = self._begun
        seconds = (now - begin) / (done - first) * (total - done) if done > first else 0.0
        return f"about {datetime.timedelta(seconds=round(seconds))} left" if seconds >= 1 else ""


def write_text(path: Path, text: str) -> None:
    """Write a file atomically.

    Raises:
        ModelError: The folder isn't writable or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ModelError(f"{path} couldn't be written: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def require_writable(path: Path) -> None:
    """Refuse a place where no file can be written before the work, and not after it.

    Raises:
        UsageError: `path` is a folder, or would lie in something else than one.
        ModelError: The folder isn't writable.
    """
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give the name of a file in it.")
    folder = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise UsageError(f"{path} can't be written, because {folder} is not a folder.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ModelError(f"{path} can't be written, because the folder {folder} is read-only.")


class OutputPath(click.Path):
    """A file to write; one that ends in a slash is a folder, even where there is none yet."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See the class."""
        if isinstance(value, str) and value.endswith(("/", os.sep)):
            self.fail(f"{value!r} is a folder; give the name of a file in it.", param, ctx)
        return super().convert(value, param, ctx)


OUTPUT = OutputPath(path_type=Path)


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
        size = int(float(number) * units[unit.strip()])
    except (KeyError, ValueError, OverflowError) as error:
        raise click.BadParameter(f"{text!r} is not a size such as 2GB or 500MiB.") from error
    if size <= 0:
        raise click.BadParameter(f"{text!r} must be more than nothing, such as 2GB.")
    return size


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
