"""Passes that scale the channels of what linear layers read, so that weights or activations lose less when rounded."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import infer
from graphopt.graph.edits import Editor
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.fold.layers import Numbers
from graphopt.passes.quantize.channel_folds import ChannelFold, ChannelFolds, ReaderGroup, scale

Statistics = Mapping[str, npt.NDArray[Any]]
"""Arrays over the channels of one value: "mean_abs" [K], "absmax" [K], "second_moment" [K, K]."""
Source = Callable[[ir.Model, Sequence[ir.Value], Sequence[str]], Iterator[Statistics]]
"""Gives the statistics of these names of each value of a model, in the order of the values."""


@dataclasses.dataclass(frozen=True)
class ScalePlan:
    """What is done to a group.

    Attributes:
        factors: By number, [count], positive.
        detail: What to say of them.
        shares: For each reader the part of its range that each group of each row keeps, [N, G]; None: all of it.
    """

    factors: Numbers
    detail: str
    shares: Sequence[npt.NDArray[np.float32] | None] = ()


class ScaleChannels(Pass):
    """Finds the groups and where their factors go; a subclass says which factors.

    Attributes:
        head: Whether the output layer is scaled too.
        source: What gives the statistics.
    """

    family: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    head: bool = False
    source: Source | None = None

    def apply(self, model: ir.Model) -> bool:
        """Scale every group that can be."""
        facts, edit = infer(model), Editor(model)
        folds = ChannelFolds(model, facts)
        found: list[tuple[ReaderGroup, ChannelFold]] = []
        for group in folds.groups():
            if not isinstance(group, ReaderGroup):
                self.left(group[0].node, group[1])
                continue
            if group.readers[0].meta.get(self.name) or (group.roles == ["head"] and not self.head):
                continue  # a second run would scale what is scaled already
            fold = folds.fold(group)
            if isinstance(fold, str):
                self.left(group.readers[0], f"{group.label}: {fold}")
            else:
                found.append((group, fold))
        if not found:
            return False
        # The model isn't touched before the last statistics are there: it is still being run on the data.
        plans = [
            self.plan(group, fold, statistics)
            for (group, fold), statistics in zip(found, self._gather(model, [g.x for g, _ in found]), strict=True)
        ]
        changed: list[tuple[ReaderGroup, ScalePlan]] = []
        for (group, fold), plan in zip(found, plans, strict=True):
            reason = scale(group, fold, plan.factors, facts, edit)
            if reason is not None:
                self.left(group.readers[0], f"{group.label}: {reason}")
                continue
            changed.append((group, plan))
            for node in group.readers:
                node.meta[self.name] = True
            self.applied(group.readers[0], f"{group.label}: {plan.detail}" + "; its cache is scaled too" * fold.cached)
        # A layer may be scaled for what it reads and for what it makes: both come first.
        for group, plan in changed:
            self.finish(group, plan, edit)
        return bool(changed)

    def _gather(self, model: ir.Model, values: Sequence[ir.Value]) -> Iterator[Statistics]:
        assert self.source is not None
        return self.source(model, values, self.needs)

    @abc.abstractmethod
    def plan(self, group: ReaderGroup, fold: ChannelFold, statistics: Statistics) -> ScalePlan:
        """The factors of a group. The model must be left as it is."""

    def finish(self, group: ReaderGroup, plan: ScalePlan, edit: Editor) -> None:
        """What else is done to the weights of a group when all are scaled."""
