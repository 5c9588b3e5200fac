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
from graphopt.calibration.carried import Carried
from graphopt.calibration.data import Dataset, Feeds
from graphopt.calibration.piece_model import RECEIVED, VALID, bounded, piece_model
from graphopt.calibration.pieces import Grain, Piece, cut
from graphopt.calibration.request import Request, TokenWeights, rows_of
from graphopt.calibration.statistics import Accumulator, Summary
from graphopt.calibration.token_feeds import TokenAxes
from graphopt.errors import GraphoptError, InputDataError, UsageError
from graphopt.graph.skeleton import first_line
from graphopt.runtime_ops.memory_session import WeightStore, make_session, run

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
    run_ = _Run(model, list(dict.fromkeys(requests)), data, sequential, budget_bytes, threads, progress)
    run_.plan(grain, piece_bytes)
    if cache is not None:
        run_.cache = StageCache(cache, data.fingerprint)
    try:
        yield from run_.stages()
    finally:
        run_.close()


@dataclasses.dataclass
class _Run:
    """The state of one run."""

    model: ir.Model
    requests: list[Request]
    data: Dataset
    sequential: bool
    budget_bytes: int
    threads: int | None
    progress: Progress | None

    def __post_init__(self) -> None:
        _name_all(self.model)
        for request in self.requests:
            value = request.value
            if value.graph is not self.model.graph or value.is_initializer():
                raise UsageError(f"The value {value.name!r} can't be observed: it is constant or in another graph.")
        self.carried = Carried(self.budget_bytes)
        self.axes = TokenAxes.read(self.model)
        self.valid: list[npt.NDArray[np.bool_] | None] = []
        self.cache: StageCache | None = None
        # Weights as they are now; in a run that isn't sequential those count, whatever the caller does to the model.
        self.weights = {v: v.const_value for v in self.model.graph.initializers.values() if v.const_value is not None}
        self.sizes: list[tuple[int, int]] = []
        """Rows and tokens of each sample."""
        self.later: list[set[str]] = []
        """For each piece, the inputs of the model that later ones read."""
        self.done = 0
        """Pieces that have run over all samples."""

    def plan(self, grain: Grain, piece_bytes: int) -> None:
        """Cut the model."""
        sizes: dict[ir.Value, int] = {}
        together: list[tuple[ir.Value, ir.Value]] = []
        for request in self.requests:
            value, axis = request.value, request.channel_axis
            known = value.shape is not None and -len(value.shape) <= axis < len(value.shape)
            channels = value.shape[axis] if known and value.shape is not None else None
            count = request.statistic.bytes(channels if isinstance(channels, int) else 1024)
            sizes[value] = sizes.get(value, 0) + count
            if request.weights is not None:
                together.append((value, request.weights.attention.outputs[0]))
        limit = None if self.sequential else piece_bytes
        first = next(self.data.feeds(self.model), {})
        empty = {name for name, array in first.items() if array.size == 0}
        self.pieces = cut(self.model, sizes, together, empty=empty, limit_bytes=limit, grain=grain)
        inputs: set[str] = set()
        for piece in reversed(self.pieces):
            self.later.insert(0, set(inputs))
            read, _, _ = bounded([*piece.wanted, *piece.made], set(piece.entering))
            inputs |= {value.name or "" for value in read if value.is_graph_input()}

    def _piece_model(self, piece: Piece, *, observed: bool, shown: Sequence[ir.Node] = ()) -> ir.Model:
        """A piece with the weights that count now; unless `observed` it makes only what is carried on."""
        outputs = [*piece.wanted, *piece.made] if observed else piece.made
        padded = self.axes.attention_mask is not None
        return piece_model(self.model, piece, outputs, shown, self._used(), padded=padded)

    def stages(self) -> Iterator[Stage]:
        """See the function."""
        for index, piece in enumerate(self.pieces):
            requests = [r for r in self.requests if r.value in piece.wanted]
            shown = list(dict.fromkeys(r.weights.attention for r in requests if r.weights is not None))
            submodel = self._piece_model(piece, observed=True, shown=shown)
            found = None
            if self.cache is not None:
                self.cache.enter(submodel, [r.key for r in requests])
                found = self.cache.load()
            if found is None:
                self._catch_up(index)
                summaries, received = self._observe(index, submodel, requests, shown)
                if self.cache is not None:
                    self.cache.save([summaries[r] for r in requests], [received[node] for node in shown])
            else:
                summaries = dict(zip(requests, found[0], strict=True))
                received = dict(zip(shown, found[1], strict=True))
            before = self._used()
            del submodel  # and the tensors that only it holds
            yield Stage(index, len(self.pieces), summaries, piece.weights, received)
            changed = self._changed(piece, before)
            if self.cache is not None and changed:
                self.cache.leave(self._piece_model(piece, observed=False))
            if self.done > index:
                if changed and piece.made:
                    self._forward(index)
                self._settle(index)

    def close(self) -> None:
        """Remove what was kept."""
        self.carried.close()

    # ---- weights

    def _used(self) -> dict[ir.Value, ir.TensorProtocol]:
        """The weights that count."""
        if not self.sequential:
            return self.weights
        return {v: v.const_value for v in self.model.graph.initializers.values() if v.const_value is not None}

    def _changed(self, piece: Piece, before: Mapping[ir.Value, ir.TensorProtocol]) -> bool:
        now = self._used()
        return any(now.get(value) is not before.get(value) for value in piece.weights)

    # ---- running

    def _start(self) -> None:
        """Take the samples."""
        if self.valid:
            return
        count = 0
        for sample, feeds in enumerate(self.data.feeds(self.model)):
            self.valid.append(self.axes.valid(feeds))
            self.sizes.append(self.axes.sizes(feeds))
            for name, array in feeds.items():
                self.carried.put(sample, name, array)
            count += 1
        if count == 0:
            raise InputDataError("There is no sample in the calibration data.")

    def _catch_up(self, index: int) -> None:
        """Make what enters a piece, where those before it were found in the cache."""
        self._start()
        for earlier in range(self.done, index):
            self._forward(earlier)
            self._settle(earlier)
        assert self.done == index

    def _forward(self, index: int) -> None:
        """Run a piece without looking at it."""
        piece = self.pieces[index]
        if piece.made:
            session = self._session(self._piece_model(piece, observed=False))
            for sample in range(len(self.valid)):
                self._tell("calibrating again", index, sample)
                self._keep(index, sample, self._outputs(session, sample))
        self.done = index + 1

    def _observe(
        self, index: int, model: ir.Model, requests: Sequence[Request], shown: Sequence[ir.Node]
    ) -> tuple[dict[Request, Summary], dict[ir.Node, Array]]:
        """Run a piece over all samples and gather what is asked of it."""
        found = {request: request.statistic.accumulator() for request in requests}
        received: dict[ir.Node, list[Array]] = {node: [] for node in shown}
        session = self._session(model) if model.graph.outputs else None
        for sample in range(len(self.valid)):
            self._tell("calibrating", index, sample)
            outputs = self._outputs(session, sample) if session is not None else {}
            seen = {node: outputs.pop(f"{RECEIVED}{node.name}")[:, 0] for node in shown}
            for node, attention in seen.items():
                received[node].append(attention)
            for request, accumulator in found.items():
                self._gather(sample, request, accumulator, outputs, seen)
            self._keep(index, sample, outputs)
        self.done = index + 1
        means = {node: _by_position(arrays) for node, arrays in received.items()}
        return {request: one.summary() for request, one in found.items()}, means

    def _gather(
        self,
        sample: int,
        request: Request,
        accumulator: Accumulator,
        outputs: Mapping[str, Array],
        seen: Mapping[ir.Node, Array],
    ) -> None:
        name = request.value.name or ""
        array = outputs[name] if name in outputs else self.carried.get(sample, name)
        valid, weights = self.valid[sample], None
        if request.weights is not None:
            weights = self._weights(request.weights, seen[request.weights.attention], valid)
        accumulator.add(*rows_of(np.asarray(array), request.channel_axis, valid, weights))

    @staticmethod
    def _weights(by: TokenWeights, received: Array, valid: npt.NDArray[np.bool_] | None) -> Array:
        if valid is None or valid.shape != received.shape:
            valid = np.ones(received.shape, dtype=np.bool_)
        return by.of(received, valid)

    def _session(self, model: ir.Model) -> tuple[Any, WeightStore]:
        """A session for a piece, whose inputs have the types of what is carried."""
        for value in model.graph.inputs:
            if value.name != VALID:
                array = self.carried.get(0, value.name or "")
                dtype = ir.DataType.STRING if array.dtype == object else ir.DataType.from_numpy(array.dtype)
                value.type = ir.TensorType(dtype)
                value.shape = ir.Shape([None] * array.ndim)
        store = WeightStore()
        session = make_session(model, threads=self.threads, store=store)
        return session, store

    def _outputs(self, session: tuple[Any, WeightStore], sample: int) -> dict[str, Array]:
        feeds: Feeds = {}
        for item in session[0].get_inputs():
            feeds[item.name] = self._share(sample) if item.name == VALID else self.carried.get(sample, item.name)
        try:
            outputs = run(session[0], feeds)
        except GraphoptError:
            raise
        except Exception as error:  # ONNX Runtime has a class of exception for each reason
            raise InputDataError(f"The model doesn't run on sample {sample + 1}: {first_line(error)}.") from error
        return {item.name: array for item, array in zip(session[0].get_outputs(), outputs, strict=True)}

    def _share(self, sample: int) -> Array:
        """What each query counts in the mean of the attention, [batch, 1, queries]."""
        valid = self.valid[sample]
        if valid is None:
            valid = np.ones(self.sizes[sample], dtype=np.bool_)
        shares = valid / np.maximum(valid.sum(axis=1, keepdims=True), 1)
        return np.asarray(shares[:, None], dtype=np.float32)

    def _keep(self, index: int, sample: int, outputs: Mapping[str, Array]) -> None:
        for value in self.pieces[index].made:
            name = value.name or ""
            self.carried.put(sample, name, np.asarray(outputs[name]))
        if not self.sequential:
            self._drop(index, sample)

    def _settle(self, index: int) -> None:
        """Forget what no later piece reads."""
        for sample in range(len(self.valid)):
            self._drop(index, sample)

    def _drop(self, index: int, sample: int) -> None:
        self.carried.keep(sample, self.later[index] | {value.name or "" for value in self.pieces[index].leaving})

    def _tell(self, what: str, index: int, sample: int) -> None:
        if self.progress is not None:
            count = len(self.valid)
            self.progress(what, index * count + sample, len(self.pieces) * count)


def _by_position(arrays: Sequence[Array]) -> Array:
    """The mean over rows of arrays [batch, tokens], as far as all of them go."""
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
