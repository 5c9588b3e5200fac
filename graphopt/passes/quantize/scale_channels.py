"""Passes that scale the channels of what linear layers read, so that weights or activations lose less when rounded."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

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


class ScaleChannels(Pass):
    """Finds the groups and where their factors go; a subclass says which factors.

    Attributes:
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
        values = [group.x for group, _ in found]
        changed = False
        for (group, fold), statistics in zip(found, self._gather(model, values), strict=True):
            factors, detail = self.factors(group, fold, statistics)
            reason = scale(group, fold, factors, facts, edit)
            if reason is not None:
                self.left(group.readers[0], f"{group.label}: {reason}")
                continue
            changed = True
            detail += self.refine(group, fold.spread(factors), statistics, edit)
            for node in group.readers:
                node.meta[self.name] = True
            self.applied(group.readers[0], f"{group.label}: {detail}" + "; scales its cache" * fold.cached)
        return changed

    def _gather(self, model: ir.Model, values: Sequence[ir.Value]) -> Iterator[Statistics]:
        assert self.source is not None
        return self.source(model, values, self.needs)

    @abc.abstractmethod
    def factors(self, group: ReaderGroup, fold: ChannelFold, statistics: Statistics) -> tuple[Numbers, str]:
        """The factors of a group by number, [count], positive, and what to say of them."""

    def refine(self, group: ReaderGroup, channels: Numbers, statistics: Statistics, edit: Editor) -> str:
        """What else is done to the weights of a group once they are scaled by `channels` [K], and what to say of it."""
        return ""
