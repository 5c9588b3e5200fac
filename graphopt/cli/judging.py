"""`--quality`, `--task` and `--floor`: judging a result by how well it does its task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from graphopt.errors import InputDataError, UsageError

if TYPE_CHECKING:
    from graphopt.calibration.data import Dataset
    from graphopt.evaluation.data import EvaluationData
    from graphopt.evaluation.judging import Evaluation
    from graphopt.verification.quality.floors import Floor, Missed

F = TypeVar("F", bound=Callable[..., Any])

BUILT_IN = "wikipedia"
"""The name of the held-out text of `graphopt.models.texts`, in place of a file."""
NOT = "none"
"""In place of a file: nothing is judged."""
TASKS = ("language", "embedding", "classification", "detection", "recognition", "generic")


def quality_options(command: F) -> F:
    """The options of judging; their values come as `quality`, `task`, `floor`, `quality_samples`,
    `score_threshold`, `ignore_spaces`."""
    data = (
        'Judge it on held-out data: text (.txt, .jsonl), arrays (.npz), images (a folder), or the text "wikipedia"; '
        "none: don't."
    )
    options = [
        click.option("--quality", metavar="FILE", help=data),
        click.option(
            "--task", type=click.Choice(TASKS), help="What it is judged as  [default: what the graph says]"
        ),
        click.option(
            "--floor", multiple=True, metavar="METRIC=BOUND",
            help="What a metric must reach, such as ppl=+5%, kl<=0.05 or top1>=0.98; else exit code 7.",
        ),
        click.option(
            "--quality-samples", type=click.IntRange(min=1), metavar="N",
            help="Judge on the first N windows of text, texts or samples  [default: all]",
        ),
        click.option(
            "--score-threshold", type=click.FloatRange(0, 1), metavar="SCORE",
            help="Score from which a detector sees something  [default: 0.25]",
        ),
        click.option("--ignore-spaces", is_flag=True, help="Leave spaces out where a recogniser's texts are compared."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


@dataclasses.dataclass
class Judge:
    """Judges results against one original.

    Attributes:
        evaluation: The original and the data.
        floors: What must be reached.
        asked: Whether the data was given, and isn't what calibration leaves of its own.
    """

    evaluation: Evaluation
    floors: list[Floor]
    asked: bool = True

    def judge(
        self, candidate: Path, progress: Callable[[str, int, int], None] | None = None
    ) -> tuple[dict[str, Any], list[Missed]]:
        """What the report says of a candidate's quality, and the floors that it misses.

        Raises:
            GraphoptError: The data doesn't fit; see `graphopt.evaluate`.
        """
        from graphopt.verification.quality.floors import missed_floors

        [found] = self.evaluation.judge([candidate], progress)
        missed = missed_floors(found, self.floors)
        data = {
            "data": self.evaluation.data.name,
            **found.to_dict(),
            "bytes": [bytes_on_disk(self.evaluation.reference), bytes_on_disk(candidate)],
            "floors": {floor.name: floor.text for floor in self.floors},
            "missed": [floor.to_dict() for floor in missed],
        }
        return data, missed

    @property
    def arguments(self) -> list[str]:
        """The command line arguments that ask for this."""
        from graphopt.verification.quality.detection import THRESHOLD

        options = self.evaluation.options
        found = ["--quality", self.evaluation.data.name] if self.asked else []
        found += [] if options.task is None else ["--task", options.task]
        found += [part for floor in self.floors for part in ("--floor", floor.text)]
        found += [] if options.samples is None else ["--quality-samples", str(options.samples)]
        found += [] if options.threshold == THRESHOLD else ["--score-threshold", str(options.threshold)]
        return [*found, *(["--ignore-spaces"] if options.ignore_spaces else [])]


def judge_of(
    model: Path,
    tokenizer: Path | None,
    calibration: Dataset | None = None,
    images: str | None = None,
    *,
    quality: str | None,
    task: Any,
    floor: Sequence[str],
    quality_samples: int | None,
    score_threshold: float | None,
    ignore_spaces: bool,
    text: str = "",
) -> Judge | None:
    """What the options ask for; None: no judging. Mistakes are told before the work.

    Without `--quality`, a language model that is calibrated with text is judged on what that leaves of it.

    Args:
        model: The original.
        tokenizer: Folder of the tokenizer.json for text.
        calibration: What is calibrated with.
        images: What the pixels of images become; None: 0 to 1.
        text: What the calibration data is called.
        quality: As the options have it; and so on.
        task: See `quality_options`.
        floor: See there.
        quality_samples: See there.
        score_threshold: See there.
        ignore_spaces: See there.

    Raises:
        UsageError: An option without `--quality`, or a floor that can't be read or isn't measured.
        InputDataError: The data can't be read, doesn't fit, or is calibrated with.
        ModelError: The model can't be loaded.
    """
    given = {
        "--task": task, "--floor": floor, "--quality-samples": quality_samples, "--score-threshold": score_threshold,
        "--ignore-spaces": ignore_spaces,
    }  # fmt: skip
    from graphopt.calibration.text import TextDataset
    from graphopt.evaluation.data import load_evaluation
    from graphopt.evaluation.judging import Options, held_out, prepare
    from graphopt.graph.load import load
    from graphopt.verification.quality.detection import THRESHOLD
    from graphopt.verification.quality.floors import parse_floors
    from graphopt.verification.quality.tasks import guess_task

    alone = [name for name, value in given.items() if value is not None and value is not False and value != ()]
    parse_floors(floor)
    data: EvaluationData | None = None
    if quality is None:
        if isinstance(calibration, TextDataset) and guess_task(load(model), task).task == "language":
            data = held_out(calibration, text)
    elif quality != NOT:
        if Path(quality).exists():
            data = load_evaluation(quality, images or "unit")
        elif quality == BUILT_IN:
            data = built_in()
        else:
            raise InputDataError(
                f'{quality} doesn\'t exist; --quality takes a file, "{BUILT_IN}" for a built-in text, or "{NOT}".'
            )
    if data is None:
        if alone:
            raise UsageError(f"{alone[0]} is for judging on data; give that with --quality.")
        return None
    options = Options(
        task=task, tokenizer=tokenizer, samples=quality_samples, ignore_spaces=ignore_spaces,
        threshold=THRESHOLD if score_threshold is None else score_threshold,
    )  # fmt: skip
    try:
        evaluation = prepare(model, data, options, calibration)
    except InputDataError:
        if quality is not None or alone:
            raise
        return None  # The text repeats itself, so that nothing of it is held out.
    return Judge(evaluation, parse_floors(floor, evaluation.metrics), asked=quality is not None)


def built_in() -> EvaluationData:
    """The held-out text of `graphopt.models.texts`."""
    from graphopt.evaluation.data import EvaluationData
    from graphopt.models.texts import wikipedia

    text = wikipedia("evaluation")
    return EvaluationData(BUILT_IN, text=text, rows=tuple(line for line in text.splitlines() if line))


def bytes_on_disk(model: Path) -> int:
    """The bytes of a model's file and of the files that hold its weights."""
    from graphopt.api import describe_source
    from graphopt.graph.load import load

    return int(describe_source(load(model))["bytes"])
