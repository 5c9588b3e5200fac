"""graphopt target."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.table import Table

from graphopt.cli.console import OUTPUT, json_option, out, print_json, progress
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.analysis.profile import Comparison, Profile
    from graphopt.analysis.target import TargetFacts


@click.command(
    epilog="""\b
Examples:
  graphopt target
  graphopt target --measure                 measures this machine, for `graphopt optimize` to lower by
  graphopt target --measure --quick -o here.json
  graphopt target --profile here.json
  graphopt target cuda --json"""
)
@click.argument("name", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--measure", is_flag=True, help="Measure which spellings run fastest here (a minute), and keep that.")
@click.option("--quick", is_flag=True, help="With --measure: a quarter of the time, and more noise.")
@click.option("-o", "--output", type=OUTPUT, help="With --measure: the file of the profile  [default: in the cache]")
@click.option("--profile", type=click.Path(path_type=Path), help="Show this profile instead of this machine's.")
@json_option
def command(name: str, measure: bool, quick: bool, output: Path | None, profile: Path | None, as_json: bool) -> None:
    """Say which operators and opsets the installed ONNX Runtime executes, and which spellings of a computation were
    measured to run fastest on this machine."""
    from graphopt.analysis import profile_cache
    from graphopt.analysis.profile import load
    from graphopt.analysis.target import facts
    from graphopt.runtime_ops.library import described, library_path, offered

    if name != "cpu" and (measure or profile is not None):
        raise UsageError("Profiles are measured for the target cpu.")
    if not measure and (quick or output is not None):
        raise UsageError("--quick and --output belong to --measure; give it too.")
    if measure and profile is not None:
        raise UsageError("Give either --measure or --profile, not both.")
    try:
        found = facts(name)
        place = output or profile_cache.cached_path()
    except ImportError as error:
        raise UsageError("ONNX Runtime is missing; install graphopt[cpu] or graphopt[gpu].") from error
    needed = f"{name.upper()}ExecutionProvider"
    if needed not in found.providers:
        raise UsageError(f"ONNX Runtime {found.version} as installed has no {needed}; install graphopt[gpu].")
    shown = None
    if measure:
        from graphopt.analysis import measure_profile

        seconds = measure_profile.QUICK_SECONDS if quick else measure_profile.DEFAULT_SECONDS
        with progress(as_json) as bar:
            shown = measure_profile.measure(budget_seconds=seconds, progress=bar)
        shown.save(place)
    elif profile is not None:
        shown = load(profile)
    elif name == "cpu":
        shown = profile_cache.cached()
    if as_json:
        library = {"path": library_path(), "operators": offered()}
        profile_data = None if shown is None else {"id": shown.id, **shown.to_dict()}
        print_json({**found.to_dict(), "library": library, "profile": profile_data})
        return
    console = out()
    print_facts(found, console)
    console.print(described(), markup=False, soft_wrap=True)
    if name != "cpu":
        return
    console.print()
    if shown is None:
        console.print("No profile of this machine yet: `graphopt target --measure` makes one in about a minute.")
        return
    print_profile(shown, console)
    if measure:
        console.print(f"Profile: {place}", markup=False, soft_wrap=True)


def print_facts(found: TargetFacts, console: Console) -> None:
    """Which operators have kernels."""
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


def print_profile(profile: Profile, console: Console) -> None:
    """One row for each alternative to a choice's default: its CPU time over the default's by width and rows."""
    from graphopt.analysis.choices import CHOICES
    from graphopt.analysis.profile import preferred

    console.print(
        f"Profile {profile.id}: {profile.runtime} on {profile.cpu}, {profile.cores} processors, {profile.date}, "
        f"measured in {profile.seconds:.0f} s",
        markup=False,
        soft_wrap=True,
    )
    for choice in CHOICES.values():
        if choice.name not in profile.executed:
            continue
        default = profile.default(choice.name)
        console.print(f"\n[bold]{choice.name}[/]: {choice.title}", soft_wrap=True)
        for alternative in choice.alternatives:
            runs = profile.executed[choice.name].get(alternative)
            operators = ", ".join(runs.operators) if runs and runs.operators else "doesn't run"
            mark = "default" if alternative == default else ""
            if not mark and profile.same(choice.name, alternative, default):
                mark = "the same"
            console.print(f"  {alternative:22} {mark:8} {operators}", style="dim", markup=False, soft_wrap=True)
        points = [(e.rows, e.width) for e in profile.entries if e.choice == choice.name]
        if not points:
            console.print("  ONNX Runtime executes the same graph for all of them")
            continue
        rows, widths = (sorted(set(axis)) for axis in zip(*points, strict=True))
        unit = "pixels" if choice.layout == "image" else "rows"
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 1))
        for column in ("", "width", "threads"):
            table.add_column(column, justify="right" if column else "left")
        for number in rows:
            table.add_column(f"{number}", justify="right", no_wrap=True)
        table.add_column(unit, no_wrap=True)
        for alternative in choice.alternatives:
            if profile.same(choice.name, alternative, default):
                continue
            for number, (width, threads) in enumerate(itertools.product(widths, profile.threads)):
                found = [profile.compare(choice.name, alternative, default, r, width, threads) for r in rows]
                label = "" if number else f"{alternative} / {default}"
                table.add_row(
                    label,
                    str(width),
                    str(threads),
                    *map(_cell, found),
                    "preferred" if preferred(profile, choice.name, width) == alternative else "",
                )
        console.print(table)
    console.print(
        "\nNumbers are CPU times over that of the default at so many rows; - is faster, + slower beyond noise.\n"
        "An alternative is preferred where it is faster somewhere and slower nowhere.",
        style="dim",
        soft_wrap=True,
    )


def _cell(found: Comparison | None) -> str:
    if found is None:
        return ""
    text = f"{found.cpu:.2f}"
    return f"[green]{text}-[/]" if found.faster else f"[red]{text}+[/]" if found.slower else f"{text} "
