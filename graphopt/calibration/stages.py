"""Running a model piece by piece over all samples, so that memory doesn't grow with its layers.

Each piece is a session of its own; what crosses into the next one is kept for every sample. A stage is one piece with
the statistics of the values observed in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.cache import StageCache
from graphopt.calibration.data import Dataset
from graphopt.calibration.piece_model import bounded, piece_model
from graphopt.calibration.pieces import Grain, Piece, cut
from graphopt.calibration.request import Request, rows_of
from graphopt.calibration.samples import Samples
from graphopt.calibration.statistics import Accumulator, Summary
from graphopt.errors import ModelError, UsageError

Array = npt.NDArray[Any]
Progress: TypeAlias = Callable[[str, int, int], None]
"""Called with (what is being done, steps done, steps in all)."""

PIECE_BYTES = 128 << 20
"""Weights and statistics of one piece together, unless one layer has more."""
BUDGET_BYTES = 256 << 20
"""Activations kept in memory between two pieces; what is more goes to a temporary file."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A piece of a model that has run over all samples.

    Attributes:
        index: Its number, from 0.
        count: Number of stages.
        summaries: What was gathered, by request.
        weights: The initializers that its nodes read, itself or through what is computed from constants.
        received: For each attention that a request names: the attention that a token receives, the mean over samples,
            heads and queries, by position [tokens] (the samples' first tokens, as many as all have), float64.
    """

    index: int
    count: int
    summaries: Mapping[Request, Summary]
    weights: tuple[ir.Value, ...]
    received: Mapping[ir.Node, Array]

    def __getitem__(self, request: Request) -> Summary:
        """What was gathered for one request."""
        return self.summaries[request]


def stages(
    model: ir.Model,
    requests: Sequence[Request],
    data: Dataset,
    *,
    sequential: bool = False,
    grain: Grain = "layer",
    piece_bytes: int = PIECE_BYTES,
    budget_bytes: int = BUDGET_BYTES,
    threads: int | None = None,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Iterator[Stage]:
    """Run a model piece by piece over all samples and give the statistics of each piece when it has run.

    A stage comes once, in the order of the graph; every request is in exactly one. The pieces behind the last request
    don't run.

    Args:
        model: The model. It isn't changed; values and nodes without a name get one.
        requests: What to gather: values of the main graph.
        data: The samples.
        sequential: Between two stages the caller may give initializers another `const_value` of the same type and
            shape. A piece whose weights changed is run again, so that the following ones see what the changed weights
            make; pieces are as small as `grain` allows then. Otherwise the weights count that the model has now.
        grain: "layer": cuts only where as little crosses as between layers (of a transformer: before and behind
            attention and MLP). "site": between any two observed values, so that in a sequential run each sees all
            weights before it changed.
        piece_bytes: Weights and statistics of one piece, unless one layer has more (not for sequential runs).
        budget_bytes: Activations kept in memory between pieces; what is more goes to a temporary file.
        threads: Threads within an operator; None leaves it to ONNX Runtime.
        cache: A folder in which finished stages are kept and found again; None: nowhere.
        progress: Called before each sample of each piece.

    Raises:
        UsageError: A value that can't be observed.
        InputDataError: The data doesn't fit the model, or the model doesn't run on it.
        ModelError: An attention whose probabilities can't be seen, or a model that ONNX Runtime doesn't load.
    """
    run_ = _Run(model, requests, data, sequential, budget_bytes, threads, progress)
    run_.plan(grain, piece_bytes)
    if cache is not None:
        run_.cache = StageCache(cache, data.fingerprint)
    try:
        yield from run_.stages()
    finally:
        run_.samples.close()


class _Run:
    """One run of a model over all samples."""

    def __init__(
        self,
        model: ir.Model,
        requests: Sequence[Request],
        data: Dataset,
        sequential: bool = False,
        budget_bytes: int = BUDGET_BYTES,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        _name_all(model)
        self.model, self.requests = model, list(dict.fromkeys(requests))
        for request in self.requests:
            value = request.value
            if value.graph is not model.graph or value.is_initializer():
                raise UsageError(f"The value {value.name!r} can't be observed: it is constant or in another graph.")
        self.sequential, self.progress = sequential, progress
        self.samples = Samples(model, data, budget_bytes, threads)
        self.cache: StageCache | None = None
        # Weights as they are now; in a run that isn't sequential those count, whatever the caller does to the model.
        self.weights = {v: v.const_value for v in model.graph.initializers.values() if v.const_value is not None}
        self.pieces: list[Piece] = []
        self.inputs_later: list[set[str]] = []
        """For each piece, the inputs of the model that later ones read."""
        self.shown: list[list[ir.Node]] = []
        """For each piece, the attentions that are looked at."""
        self.kept: list[list[ir.Node]] = []
        """For each piece, those of them that lie in it: what they show is the same for all pieces behind it."""
        self.done = 0
        """Pieces that have run over all samples."""

    def plan(self, grain: Grain, piece_bytes: int) -> None:
        """Cut the model."""
        sizes: dict[ir.Value, int] = {}
        for request in self.requests:
            sizes[request.value] = sizes.get(request.value, 0) + request.bytes
        limit = None if self.sequential else piece_bytes
        by = {r: r.weights.attention for r in self.requests if r.weights is not None}
        ahead = [node.outputs[0] for node in by.values()]
        if any(node.graph is not self.model.graph for node in by.values()):
            raise ModelError("How much attention tokens receive can be seen in the main graph only.")
        self.pieces = cut(self.model, sizes, ahead, empty=self.samples.empty(), limit_bytes=limit, grain=grain)
        behind: set[ir.Node] = set()
        for piece in self.pieces:
            own = set(piece.nodes)
            # A piece may end before the attention by which it is weighted, and looks ahead then.
            needed = [node for r, node in by.items() if r.value in piece.wanted and node not in behind]
            self.kept.append(list(dict.fromkeys(node for node in by.values() if node in own)))
            self.shown.append(list(dict.fromkeys([*needed, *self.kept[-1]])))
            behind |= own
        inputs: set[str] = set()
        for index in reversed(range(len(self.pieces))):
            piece = self.pieces[index]
            self.inputs_later.insert(0, set(inputs))
            seen = [node.outputs[0] for node in self.shown[index]]
            read, _, _ = bounded([*piece.wanted, *piece.made, *seen], set(piece.entering))
            inputs |= {value.name or "" for value in read if value.is_graph_input()}

    def stages(self) -> Iterator[Stage]:
        """See the function."""
        for index, piece in enumerate(self.pieces):
            before = self._used()
            yield self._stage(index)  # of which nothing is kept here
            now = self._used()
            changed = any(now.get(value) is not before.get(value) for value in piece.weights)
            if self.cache is not None and changed:
                self.cache.leave(self._piece_model(index, observed=False))
            if self.done > index:
                if changed:
                    self._forward(index)
                self._settle(index)

    def _stage(self, index: int) -> Stage:
        """Run a piece, or find what it gave in the cache."""
        piece, shown = self.pieces[index], self.shown[index]
        requests = [r for r in self.requests if r.value in piece.wanted]
        model = self._piece_model(index, observed=True)
        found = None
        if self.cache is not None:
            self.cache.enter(model, [r.key for r in requests])
            found = self.cache.load()
        if found is None:
            self._catch_up(index)
            summaries, received = self._observe(index, model, requests)
            if self.cache is not None:
                self.cache.save([summaries[r] for r in requests], [received[node] for node in shown])
        else:
            summaries = dict(zip(requests, found[0], strict=True))
            received = dict(zip(shown, found[1], strict=True))
        return Stage(index, len(self.pieces), summaries, piece.weights, received)

    def _used(self) -> dict[ir.Value, ir.TensorProtocol]:
        """The weights that count."""
        if not self.sequential:
            return self.weights
        return {v: v.const_value for v in self.model.graph.initializers.values() if v.const_value is not None}

    def _piece_model(self, index: int, *, observed: bool) -> ir.Model:
        """A piece with the weights that count now; unless `observed` it makes only what later pieces need."""
        piece = self.pieces[index]
        outputs = [*piece.wanted, *piece.made] if observed else piece.made
        shown = self.shown[index] if observed else self.kept[index]
        padded = self.samples.axes.attention_mask is not None
        return piece_model(self.model, piece, outputs, shown, self._used(), padded=padded)

    def _catch_up(self, index: int) -> None:
        """Make what enters a piece, where those before it were found in the cache."""
        self.samples.start()
        for earlier in range(self.done, index):
            self._forward(earlier)
            self._settle(earlier)

    def _forward(self, index: int) -> None:
        """Run a piece without statistics."""
        model = self._piece_model(index, observed=False)
        if model.graph.outputs:
            session = self.samples.session(model)
            for sample in range(len(self.samples)):
                self._tell("calibrating again", index, sample)
                self._keep(index, sample, self.samples.run(session, sample))
        self.done = index + 1

    def _observe(
        self, index: int, model: ir.Model, requests: Sequence[Request]
    ) -> tuple[dict[Request, Summary], dict[ir.Node, Array]]:
        """Run a piece over all samples and gather what is asked of it."""
        found = {request: request.statistic.accumulator() for request in requests}
        session = self.samples.session(model) if model.graph.outputs else None
        for sample in range(len(self.samples)):
            self._tell("calibrating", index, sample)
            outputs = self.samples.run(session, sample) if session is not None else {}
            for request, accumulator in found.items():
                self._gather(sample, request, accumulator, outputs)
            self._keep(index, sample, outputs)
        self.done = index + 1
        received = {node: _by_position(self.samples.received[node]) for node in self.shown[index]}
        return {request: one.summary() for request, one in found.items()}, received

    def _gather(self, sample: int, request: Request, accumulator: Accumulator, outputs: Mapping[str, Array]) -> None:
        name = request.value.name or ""
        array = outputs[name] if name in outputs else self.samples.carried.get(sample, name)
        if request.patches is not None:
            rows = request.patches.of(np.asarray(array))
            accumulator.add(rows.reshape(-1, rows.shape[-1]))
            return
        valid, weights = self.samples.valid[sample], None
        if request.weights is not None:
            received = self.samples.received[request.weights.attention][sample]
            counts = valid if valid is not None and valid.shape == received.shape else np.ones(received.shape, np.bool_)
            weights = request.weights.of(received, counts)
        accumulator.add(*rows_of(np.asarray(array), request.channel_axis, valid, weights))

    def _keep(self, index: int, sample: int, outputs: Mapping[str, Array]) -> None:
        for value in self.pieces[index].made:
            self.samples.carried.put(sample, value.name or "", np.asarray(outputs[value.name or ""]))
        if not self.sequential:  # else the piece may run again
            self._drop(index, sample)

    def _settle(self, index: int) -> None:
        """Forget what no later piece reads."""
        for sample in range(len(self.samples)):
            self._drop(index, sample)

    def _drop(self, index: int, sample: int) -> None:
        leaving = {value.name or "" for value in self.pieces[index].leaving}
        self.samples.carried.keep(sample, self.inputs_later[index] | leaving)

    def _tell(self, what: str, index: int, sample: int) -> None:
        if self.progress is not None:
            count = len(self.samples)
            self.progress(what, index * count + sample, len(self.pieces) * count)


def _by_position(received: Mapping[int, Array]) -> Array:
    """The mean over rows of arrays [batch, tokens], as far as all of them go."""
    arrays = list(received.values())
    length = min(array.shape[1] for array in arrays)
    return np.asarray(np.concatenate([array[:, :length] for array in arrays]).mean(axis=0, dtype=np.float64))


def _name_all(model: ir.Model) -> None:
    """Give values and nodes of the main graph that lack a name one of their own."""
    used = {value.name for value in [*model.graph.inputs, *model.graph.initializers.values()]}
    used |= {value.name for node in model.graph for value in node.outputs} | {node.name for node in model.graph}
    count = 0

    def fresh() -> str:
        nonlocal count
        while True:
            count += 1
            if f"unnamed_{count}" not in used:
                return f"unnamed_{count}"

    for node in model.graph:
        if not node.name:
            node.name = fresh()
        for value in node.outputs:
            if value.name is None:
                value.name = fresh()
