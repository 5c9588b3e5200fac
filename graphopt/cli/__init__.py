"""The command line: one file a command, imported when it is used, so that `graphopt --help` is quick."""

from __future__ import annotations

import importlib
import io
import signal
import sys
import warnings
from types import FrameType
from typing import Any, TextIO

import click

import graphopt

COMMANDS = {
    "optimize": "Make a model smaller and faster, and prove it unchanged.",
    "inspect": "Say what a model is made of, and why it isn't better.",
    "verify": "Compare two models on probe inputs.",
    "bench": "Time models against each other.",
    "passes": "List the passes, or show the page of one.",
    "target": "Say what the installed ONNX Runtime executes.",
    "export": "Export a PyTorch or Hugging Face model to ONNX.",
    "package": "Put a model and all that runs it into one folder.",
    "models": "List or fetch real models to try graphopt on.",
}


class LazyGroup(click.Group):
    """Imports a command's module when the command is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names in the order of `COMMANDS`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"graphopt.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of `--help`, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Suggest a near name for one that doesn't exist."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if near:
                raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from error
            raise


def _version(context: click.Context, _parameter: click.Parameter, asked: bool) -> None:
    """Print the version, and whether there are kernels: pip doesn't show that it couldn't build them."""
    if asked:
        from graphopt.runtime_ops.library import described

        click.echo(f"graphopt, version {graphopt.__version__}\n{described()}")
        context.exit()


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: graphopt optimize model.onnx -o model.opt.onnx --report report.html",
)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show the version, and kernels.",
)
def cli() -> None:
    """Optimize ONNX models for ONNX Runtime, and prove each rewrite on numbers."""


def main() -> None:
    """The entry point: errors of ours become one sentence and an exit code, never a traceback."""
    from graphopt.cli.startup import prepare
    from graphopt.errors import GraphoptError

    prepare()
    warnings.showwarning = _show_warning

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks is still printed
    try:
        status: Any = cli.main(standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except GraphoptError as error:
        fail(str(error), error.exit_code)
    except click.UsageError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        fail(error.format_message(), 2)
    except (KeyboardInterrupt, click.Abort):
        fail("interrupted; no file is left half-written.", 130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}.", 1)
    except MemoryError:
        fail("out of memory; try --verify none, which needs no session of the model.", 1)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning of ours as one sentence, where it comes from left out."""
    from graphopt.errors import GraphoptWarning

    if issubclass(category, GraphoptWarning):
        click.echo(f"graphopt: {message}", err=True)
    else:
        click.echo(warnings.formatwarning(message, category, filename, lineno, line), err=True, nl=False)


def fail(message: str, code: int) -> None:
    """Print one sentence to standard error and exit."""
    click.echo(f"graphopt: {message if message.endswith(('.', '?')) else message + '.'}", err=True)
    sys.exit(code)
