"""parallel-layers: neighbouring layers, or the branches of one layer, read one input side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, get_args

import onnx_ir as ir

from graphopt.analysis.depth_units import DepthUnit, DepthUnits, depth_units
from graphopt.analysis.shapes import infer
from graphopt.errors import UsageError
from graphopt.graph.edits import Editor
from graphopt.passes.base import Guarantee, SearchPass
from graphopt.passes.depth.lanes import Lane, obstacle, put_side_by_side, switched
from graphopt.search.greedy import greedy, trials_at_most
from graphopt.verification.trials import Trials

Granularity = Literal["layer", "branch"]
Run = tuple[int, ...]
"""Places of the lanes of a group, one behind the other."""


class ParallelLayers(SearchPass):
    """Let neighbouring layers, or attention and MLP of a layer, read the same input; what they add is summed.

        x₂ = x₀ + f(x₀) + g(x₀ + f(x₀))   becomes   x₂ = x₀ + f(x₀) + g(x₀)

    The middle layers of a trained model are alike enough that one needs little of what the one before it added. Fewer
    steps then wait for one another, and products that read one value can be joined: behind `fold-norm-affine` the norms
    of attention and MLP are equal, so that queries, keys, values, gate and up read one norm. A cache stays each
    attention's own.

    Papers: Transformer Layers as Painters, which averages what parallel layers give; here what they add is summed, as
    in a stream of layers in a row. Measured on SmolLM2-135M (4 windows of 512 tokens, perplexity 22.95), one pair of
    layers: summed 24.33, averaged 26.66; attention and MLP of one layer side by side 23.22.

    1. "layer": each of `size` neighbouring layers is as before, but reads what the first of them reads. Its own MLP
       reads its own sum.
    2. "branch": attention and MLP of a layer read what the layer reads, as in models that were trained so; with
       `size` 2 or more the branches of so many layers.
    3. Which groups: those with the least divergence of the outputs from the original's, one group after the other, each
       beside those that were chosen already. A candidate is a run of one session in which lanes are switched to another
       input; nothing is saved or loaded for it.
    4. What was chosen is among the options that the report lists, as `groups`; given as an option, nothing is searched
       and no data needed.

    **Options:** `count` (default 1): how many groups; `size` (default none: 2 for "layer", 1 for "branch"): layers in a
    group; `granularity` (default "layer"): rules 1 and 2; `first` (default 1): the first layer that may be in a group,
    counted from 0, or from the end where negative; `last` (default -2): the last one; `groups` (default none): lists of
    layers or branches by name that read one input, such as [[7, 8, 9]] or [["attention.3", "mlp.3"]]; `samples`
    (default 2): of the data; `shortlist` (default 0: all): how many groups, those that last cost least, each further
    one is chosen among.

    **Needs:** data, but for `groups`; a canonical graph. **Guarantees:** LOSSY.

    **Left alone, with the reason:** branches whose sum is normalised (post-LN), and those between which something else
    stands.

    **When not to use it:** for time on a CPU with few cores, unless `graphopt bench` shows a gain: a product there
    already takes all cores, and nothing is computed less.
    """

    name: ClassVar[str] = "parallel-layers"
    family: ClassVar[str] = "depth"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "Transformer Layers as Painters"

    def __init__(
        self,
        count: int = 1,
        size: int | None = None,
        granularity: Granularity = "layer",
        first: int = 1,
        last: int = -2,
        groups: list[list[int | str]] | None = None,
        samples: int = 2,
        shortlist: int = 0,
    ) -> None:
        super().__init__()
        if granularity not in get_args(Granularity):
            raise ValueError(f"granularity is one of {', '.join(get_args(Granularity))}, not {granularity!r}")
        least = 2 if granularity == "layer" else 1
        if min(count, samples) < 1 or shortlist < 0 or (size is not None and size < least):
            raise ValueError(
                f"count and samples must be at least 1, shortlist 0, size {least} for granularity {granularity!r}"
            )
        self.count, self.granularity, self.first, self.last, self.samples = count, granularity, first, last, samples
        self.size, self.shortlist = size, shortlist
        self.groups: list[list[str]] | None = None
        if groups is None:
            self.needs = ("samples",)
        elif not all(isinstance(group, list | tuple) and len(group) > 1 for group in groups):
            raise ValueError("groups holds lists of two names or more, such as [[7, 8], [11, 12]]")
        else:
            self.groups = [[str(name) for name in group] for group in groups]

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        facts = infer(model, believe_names=True)
        found = depth_units(model, facts)
        groups = self._searched(model, found) if self.groups is None else self._given(found, self.groups)
        edit = Editor(model)
        for lanes in groups:
            put_side_by_side(lanes, facts, edit)
            names = [_name(lane) for lane in lanes]
            self.applied(lanes[-1][-1].branch.add, f"{', '.join(names[1:])} read what {names[0]} reads")
        self.groups = [[_name(lane) for lane in lanes] for lanes in groups]
        return bool(groups)

    def _given(self, found: DepthUnits, groups: Sequence[Sequence[str]]) -> list[list[Lane]]:
        chosen: list[list[Lane]] = []
        taken: set[DepthUnit] = set()
        for names in groups:
            try:
                lanes: list[Lane] = sorted((found.named([name]) for name in names), key=lambda lane: lane[0].index)
            except ValueError as error:
                raise UsageError(f"parallel-layers: {error}.") from error
            units = [unit for lane in lanes for unit in lane]
            if len({*units}) < len(units) or taken & {*units}:
                raise UsageError(f"parallel-layers: a branch of {', '.join(names)} stands in two lanes.")
            if (reason := obstacle(lanes)) is not None:
                raise UsageError(f"parallel-layers: {', '.join(names)} can't read one input: {reason}.")
            taken.update(units)
            chosen.append(lanes)
        return chosen

    def _searched(self, model: ir.Model, found: DepthUnits) -> list[list[Lane]]:
        assert self.calibration is not None
        layers = [layer for layer in found.layers if layer[0].stream == 0]
        first, last = (place if place >= 0 else len(layers) + place for place in (self.first, self.last))
        lanes: list[Lane] = []
        starts: list[int] = []
        for layer in layers[max(first, 0) : last + 1]:
            starts.append(len(lanes))
            lanes += [layer] if self.granularity == "layer" else [[unit] for unit in layer]
        size = self.size or (2 if self.granularity == "layer" else 1)
        runs = self._runs(lanes, [*starts, len(lanes)], size)
        if not runs:
            return []
        # A lane's switch chooses what the lane before it reads, so that lanes of one search follow one another.
        longest = max(_stretches(runs), key=len)
        runs = [run for run in runs if run[0] in longest]
        if self.count > len(runs):
            raise UsageError(f"parallel-layers: there is no room for {self.count} groups of {size} layers.")
        places = sorted(longest)
        losses: dict[tuple[Run, ...], float] = {}
        laned = switched(model, [lanes[place] for place in places])
        samples = self.calibration.feeds(model, self.samples)
        shortlist, progress = self.shortlist or None, self.calibration.progress
        trials = Trials(
            laned.model, list(laned.switches.values()), samples, threads=self.calibration.threads,
            jobs=self.calibration.jobs, together=len(runs), trials=trials_at_most(len(runs), self.count, 1, shortlist),
        )  # fmt: skip

        def tried(sets: Sequence[tuple[Run, ...]]) -> Iterator[float]:
            joined = (laned.joined([p - places[0] for run in chosen for p in run[1:]]) for chosen in sets)
            for chosen, loss in zip(sets, trials.losses(joined), strict=True):
                losses[chosen] = loss
                yield loss

        steps = greedy(
            runs, tried, self.count, shortlist=shortlist, progress=progress, what="choosing what reads one input",
            excludes=lambda one, other: not set(one).isdisjoint(other),
        )  # fmt: skip
        if len(steps) < self.count:
            raise UsageError(f"parallel-layers: there is no room for {self.count} groups beside those chosen first.")
        best = steps[-1].chosen
        self.expected = steps[-1].loss
        self.scores = {_name(lanes[key[0][0]]): value for key, value in losses.items() if len(key) == 1}
        return [[lanes[place] for place in run] for run in best]

    def _runs(self, lanes: list[Lane], starts: list[int], size: int) -> list[Run]:
        """The groups that may be chosen, by the places of their lanes."""
        runs = []
        for begin, end in zip(starts, starts[size:], strict=False):
            if end - begin < 2:
                continue
            if (reason := obstacle(lanes[begin:end])) is not None:
                self.left(lanes[begin][0].branch.add, f"{_name(lanes[begin])} and what follows stay in a row: {reason}")
            else:
                runs.append(tuple(range(begin, end)))
        return runs


def _stretches(runs: Sequence[Run]) -> list[set[int]]:
    """Places of runs that touch one another, together."""
    found: list[set[int]] = []
    for run in runs:
        if found and run[0] - 1 <= max(found[-1]):
            found[-1].update(run)
        else:
            found.append(set(run))
    return found


def _name(lane: Lane) -> str:
    return lane[0].name if len(lane) == 1 else str(lane[0].layer)
