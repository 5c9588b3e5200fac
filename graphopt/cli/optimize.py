"""graphopt optimize."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphopt.cli.console import (
    MODEL,
    OUTPUT,
    assume_option,
    inputs_option,
    json_option,
    out,
    parse_size,
    print_json,
    progress,
    require_writable,
    seed_option,
    write_text,
)  # fmt: skip
from graphopt.cli.judging import judge_of, quality_options
from graphopt.errors import GraphoptError, QualityError, UsageError

if TYPE_CHECKING:
    from graphopt.recipe import Recipe

ROLLED_BACK = 6
"""Exit code: the output is good, but a pass broke its promise and was taken back."""


@click.command(
    epilog="""\b
Examples:
  graphopt optimize model.onnx                        writes model.opt.onnx
  graphopt optimize model.onnx -o fast/model.onnx --report report.html --bench
  graphopt optimize model.onnx --recipe clean --verify phase
  graphopt optimize model.onnx --inputs real.npz --json > report.json
  graphopt optimize model.onnx --recipe rtn --set bits=8 --set group_size=128
  graphopt optimize decoder.onnx --assume no-left-padding --assume max-length=2048
  graphopt optimize decoder.onnx --recipe kv4 --quality held-out.txt --floor ppl=+2% --floor 'kl<=0.05'
  graphopt optimize decoder.onnx --recipe awq --calibration text.jsonl --floor ppl=+5%
  graphopt optimize decoder.onnx --recipe depth+kv4+awq4 --calibration text.txt --quality held-out.txt

\b
Exit codes: 0 done; 2 wrong usage; 3 broken model; 4 inputs don't fit; 5 nothing to compare on;
6 done, but a pass failed its verification and was taken back; 7 a --floor was missed: nothing was written."""
)
@click.argument("model", type=MODEL)
@click.option("-o", "--output", type=OUTPUT, help="File of the result  [default: model.opt.onnx for model.onnx]")
@click.option("--in-place", is_flag=True, help="Replace the input, atomically.")
@click.option("--recipe", metavar="NAME|FILE", help="A recipe that ships, or a YAML file  [default: exact]")
@click.option("--set", "options", multiple=True, metavar="OPTION=VALUE",
              help="An option of the recipe's passes: bits=3, or quantize-weights.bits=3.")  # fmt: skip
@click.option("--target", type=click.Choice(["cpu", "cuda", "portable"]), default="cpu", show_default=True,
              help="What the result runs on.")  # fmt: skip
@click.option("--verify", type=click.Choice(["auto", "pass", "phase", "none"]), default="auto", show_default=True,
              help="After each pass, after each phase, whichever is cheap, or never.")  # fmt: skip
@inputs_option(instead=False)
@click.option("--calibration", metavar="DATA", help="For passes that need data: text (.txt, .jsonl), arrays (.npz), "
              "a folder of images, or self: what a decoder writes.")  # fmt: skip
@click.option("--tokenizer", type=MODEL, metavar="FOLDER", help="Folder of the tokenizer.json for text.")
@click.option("--calibration-samples", "samples", type=click.IntRange(min=1), metavar="N",
              help="Windows, samples or images at most  [default: 128; of self 64]")  # fmt: skip
@click.option("--calibration-window", "window", type=click.IntRange(min=2), metavar="N",
              help="Tokens of a window of text  [default: decoder 512, encoder 128, self 256]")  # fmt: skip
@click.option("--jobs", type=click.IntRange(min=1), metavar="N",
              help="Processes that try candidates of a search side by side  [default: as many as pay]")  # fmt: skip
@click.option("--image-values", type=click.Choice(["unit", "signed", "imagenet", "raw"]),
              help="What the model takes for pixels of images  [default: unit, 0 to 1]")  # fmt: skip
@click.option(
    "--profile", metavar="FILE|none", help="Target profile to lower by  [default: this machine's, if it was measured]"
)
@assume_option("Take for granted that inputs suit this; what a pass relies on is noted in the result.")
@seed_option
@click.option("--external-data/--inline", "external_data", default=None,
              help="Weights beside the model or in it  [default: as the input]")  # fmt: skip
@click.option("--shard-size", metavar="SIZE", help="Split external data into files of at most this size, e.g. 2GB.")
@click.option("--report", "report_path", type=OUTPUT, metavar="FILE.html", help="Write a self-contained HTML report.")
@click.option(
    "--bench/--no-bench",
    default=None,
    help="Time the result against the original  [default: where it is calibrated and judged]",
)
@click.option(
    "--steps/--no-steps",
    default=None,
    help="Also make the model behind each lossy pass, and tell its size, quality and speed  [default: where several "
    "recipes are joined and judged]",
)
@click.option("--rename-kv-cache", "rename_kv", is_flag=True,
              help="Name a decoder's inputs and outputs by convention: past_key_values.0.key, ...")  # fmt: skip
@quality_options
@click.option("--force", is_flag=True, help="Overwrite an existing output.")
@json_option
def command(
    model: Path,
    output: Path | None,
    in_place: bool,
    recipe: str | None,
    options: tuple[str, ...],
    target: str,
    verify: str,
    inputs: Path | None,
    calibration: str | None,
    tokenizer: Path | None,
    samples: int | None,
    window: int | None,
    jobs: int | None,
    image_values: str | None,
    profile: str | None,
    assume: tuple[str, ...],
    seed: int,
    external_data: bool | None,
    shard_size: str | None,
    report_path: Path | None,
    bench: bool | None,
    steps: bool | None,
    rename_kv: bool,
    force: bool,
    as_json: bool,
    **judging: Any,
) -> None:
    """Run a recipe of passes on MODEL; verify what each pass did; write the result and say what changed."""
    from graphopt.analysis.profile_cache import cached_path
    from graphopt.api import optimize
    from graphopt.calibration.sources import load_data
    from graphopt.graph.load import load
    from graphopt.graph.save import same_file
    from graphopt.report.terminal import print_report
    from graphopt.verification.quality.floors import require_floors

    if in_place and output is not None:
        raise UsageError("Give either --in-place or an output, not both.")
    if in_place and bench:
        raise UsageError("--bench needs the original, which --in-place replaces; give an output, then compare.")
    if in_place and steps:
        raise UsageError("--steps compares with the original, which --in-place replaces; give an output.")
    if bench and rename_kv:
        raise UsageError("--bench feeds both models by name; after --rename-kv-cache use graphopt bench --generate.")
    if shard_size is not None and external_data is False:
        raise UsageError("--shard-size splits external data; give either it or --inline.")
    # In place means the file itself, also where a link leads to it.
    destination = model.resolve() if in_place else output or model.parent / f"{model.stem}.opt{model.suffix}"
    for path in (destination, report_path):
        if path is not None and path != model.resolve():
            require_writable(path)
    if report_path is not None and report_path.resolve() in (model.resolve(), destination.resolve()):
        raise UsageError(f"The report can't be written to {report_path}, which is a model; give another file.")
    if not in_place:
        if same_file(destination, model):
            raise UsageError(f"{destination} is the input; give another output, or --in-place to replace it.")
        if destination.exists() and not force:
            raise UsageError(f"{destination} exists; give another output, or --force to overwrite it.")
    shard_bytes = parse_size(shard_size)
    about_data = {"--calibration-samples": samples, "--calibration-window": window}
    if calibration is None and (needless := [option for option, value in about_data.items() if value is not None]):
        raise UsageError(f"{needless[0]} is for the data of --calibration; give both.")
    if calibration is None and jobs is not None:
        raise UsageError("--jobs is for searches, which need data; give --calibration too.")
    about_both = {"--tokenizer": tokenizer, "--image-values": image_values}
    needless = [option for option, value in about_both.items() if value is not None]
    if needless and calibration is None and judging["quality"] is None:
        raise UsageError(f"{needless[0]} is for the data of --calibration or --quality; give one of them.")
    failure: GraphoptError | None = None
    with progress(as_json) as bar:
        data_set = None
        if calibration is not None:
            bar("reading calibration data", 0, 1)
            data_set = load_data(
                calibration,
                load(model),
                tokenizer=tokenizer,
                samples=samples,
                window=window,
                images=image_values or "unit",
                seed=seed,
            )
        earlier = load(model) if in_place else None
        judge = judge_of(model, tokenizer, data_set, image_values, text=str(calibration), **judging)
        optimized = functools.partial(
            optimize, model, target=target, jobs=jobs, profile=chosen_profile(profile, target), assume=assume,
            rename_kv=rename_kv, seed=seed, progress=bar,
        )  # fmt: skip
        result = optimized(
            recipe, options=options, verify=verify, inputs=inputs, calibration=data_set,  # type: ignore[arg-type]
        )  # fmt: skip

        lossy = any(r.guarantee == "lossy" and r.status == "applied" for r in result.report.run.records)
        if judge is not None and not (judge.asked or judge.floors or lossy):
            judge = None  # Exact passes were verified.
        compared = lossy and judge is not None and not (in_place or rename_kv)
        asked = bench or steps
        if bench is None:
            bench = compared and data_set is not None
        if steps is None:
            steps = compared and "+" in result.report.recipe.name

        def accept(written: Path) -> None:
            """Judge the file while it can still be thrown away."""
            if judge is not None:
                result.report.quality, missed = judge.judge(written, bar)
                require_floors(missed, f"; {destination} was not written")

        try:
            result.save(
                destination,
                external_data=external_data,
                shard_bytes=shard_bytes,
                in_place=in_place,
                progress=lambda done, count: bar("saving", done, count),
                accept=accept,
            )
        except QualityError as error:
            failure = error
        if failure is None:
            from graphopt.export.packaging import follow

            result.report.notes += follow(model, destination, replaced=earlier, force=force)
        if failure is None and (bench or steps):
            from graphopt.cli.steps import measure

            def write(part: Recipe, place: Path) -> None:
                needs = any(getattr(one, "needs", ()) for one in part.passes(target))
                made = optimized(part, verify="none", calibration=data_set if needs else None)
                made.save(place, external_data=external_data)

            try:
                measure(
                    result.report, model, destination, write, judge,
                    bench=bench, steps=steps, inputs=inputs, seed=seed, progress=bar,
                )  # fmt: skip
            except GraphoptError as error:  # The model is written, and what was done to it is told.
                if asked:
                    failure = error
                else:
                    result.report.notes.append(f"What it gives and costs wasn't all measured: {error}")
    given: dict[str, Any] = {
        "--verify": verify,
        "--inputs": inputs,
        "--calibration": calibration,
    }
    given |= about_data | about_both | {"--jobs": jobs}
    # Without an option the result depends on whether this machine was measured.
    if target == "cpu":
        used = "none" if result.report.profile is None else profile or cached_path()
        given["--profile"] = used
    given |= {"--shard-size": shard_size}
    result.report.arguments = [str(part) for pair in given.items() if pair[1] is not None for part in pair]
    result.report.arguments += [part for text in options for part in ("--set", text)]
    result.report.arguments += [part for name in assume for part in ("--assume", name)]
    result.report.arguments += [] if judge is None else judge.arguments
    if steps:
        result.report.arguments.append("--steps")
    if rename_kv:
        result.report.arguments.append("--rename-kv-cache")
    if external_data is not None:
        result.report.arguments.append("--external-data" if external_data else "--inline")
    data = result.report.to_dict()
    if report_path is not None:
        from graphopt.report.html import render_html

        write_text(report_path, render_html(data))
    if as_json:
        print_json(data)
    else:
        print_report(data, out())
        if judge is None and lossy and judging["quality"] is None:
            out().print("What this costs at its task wasn't judged: --quality held-out.txt does it; --bench times it.")
        if report_path is not None:
            out().print(f"Report: {report_path}", markup=False, soft_wrap=True)
    if failure is not None:
        raise failure
    if not result.report.ok:
        sys.exit(ROLLED_BACK)


def chosen_profile(given: str | None, target: str) -> str | None:
    """The argument `profile` of `graphopt.optimize` behind the option."""
    if given is None:
        return "auto" if target == "cpu" else None
    return None if given == "none" else given
