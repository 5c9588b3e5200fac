"""What a pass is given to calibrate with: data, how much memory it may take, and where finished stages are kept."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir

from graphopt.cache import cache_folder
from graphopt.calibration.data import Dataset, Feeds
from graphopt.calibration.pieces import Grain
from graphopt.calibration.request import Request
from graphopt.calibration.stages import BUDGET_BYTES, PIECE_BYTES, Progress, Stage, stages
from graphopt.calibration.statistics import Summary
from graphopt.errors import UsageError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Data, and how a model is run on it.

    Attributes:
        data: The samples.
        piece_bytes: Weights and statistics of one piece of the model, unless one layer has more.
        budget_bytes: Activations kept in memory between pieces; what is more goes to a temporary file.
        threads: Threads within an operator; None leaves it to ONNX Runtime.
        jobs: Processes that try the candidates of a search side by side and share the threads; None: as many as pay and
            fit; see `graphopt.verification.trials.Trials`.
        cache: A folder in which finished stages are kept and found again; None: nowhere. `stage_cache()` is the
            user's.
        progress: Called before each sample of each piece.
    """

    data: Dataset
    piece_bytes: int = PIECE_BYTES
    budget_bytes: int = BUDGET_BYTES
    threads: int | None = None
    jobs: int | None = None
    cache: Path | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        if self.jobs is not None and self.jobs < 1:
            raise UsageError(f"At least one process must try the candidates of a search, not {self.jobs}.")

    def stages(
        self, model: ir.Model, requests: Sequence[Request], *, sequential: bool = False, grain: Grain = "layer"
    ) -> Iterator[Stage]:
        """Run a model piece by piece and give the statistics of each; see `graphopt.calibration.stages.stages`."""
        return stages(
            model,
            requests,
            self.data,
            sequential=sequential,
            grain=grain,
            piece_bytes=self.piece_bytes,
            budget_bytes=self.budget_bytes,
            threads=self.threads,
            cache=self.cache,
            progress=self.progress,
        )

    def feeds(self, model: ir.Model, limit: int | None = None) -> Iterator[Feeds]:
        """The inputs of a model for each sample, for a pass that runs it in a way of its own.

        Args:
            model: The model.
            limit: How many samples at most; None: all.
        """
        return itertools.islice(self.data.feeds(model), limit)

    def gather(self, model: ir.Model, requests: Sequence[Request]) -> dict[Request, Summary]:
        """All statistics at once, from one run of the model as it is; only for those that are small."""
        return {key: value for stage in self.stages(model, requests) for key, value in stage.summaries.items()}

    def counted(self, what: str, items: Iterable[T], count: int) -> Iterator[T]:
        """So many items, with `progress` called before each is asked for.

        Args:
            what: What is said to be done.
            items: At least `count`, such as the losses of candidates.
            count: How many.
        """
        given = iter(items)
        for done in range(count):
            if self.progress is not None:
                self.progress(what, done, count)
            yield next(given)

    def to_dict(self) -> dict[str, Any]:
        """What a report says of it."""
        return {"data": self.data.description, "fingerprint": self.data.fingerprint}


def stage_cache(cache: Path | str | None = None) -> Path:
    """The folder of finished stages in the cache of the user; see `graphopt.cache.cache_folder`."""
    return cache_folder(cache) / "calibration"
