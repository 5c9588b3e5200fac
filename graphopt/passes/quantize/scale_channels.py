"""Passes that scale the channels of what linear layers read, so that weights or activations lose less when rounded."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import infer
from graphopt.calibration.request import Request
from graphopt.graph.edits import Editor
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.fold.layers import Numbers
from graphopt.passes.quantize.channel_folds import ChannelFold, ChannelFolds, ReaderGroup, scale

Statistics = Mapping[Request, npt.NDArray[Any]]
"""What was found of the value that a group reads, by what was asked for."""


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
    """

    family: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    head: bool = False

    def apply(self, model: ir.Model) -> bool:
        """Scale every group that can be, once: a second run would scale what is scaled already."""
        if model.graph.meta.get(self.name) == self.option_values():
            return False
        facts, edit = infer(model), Editor(model)
        found = self._groups(ChannelFolds(model, facts))
        if not found:
            return False
        plans = self._plans(model, found)
        changed: list[tuple[ReaderGroup, ScalePlan]] = []
        for index, (group, fold) in enumerate(found):
            plan = plans.get(index)
            if plan is None:
                self.left(group.readers[0], f"{group.label}: the data says nothing of what it reads")
                continue
            reason = scale(group, fold, plan.factors, facts, edit)
            if reason is not None:
                self.left(group.readers[0], f"{group.label}: {reason}")
                continue
            changed.append((group, plan))
            self.applied(group.readers[0], f"{group.label}: {plan.detail}" + "; its cache is scaled too" * fold.cached)
        # A layer may be scaled for what it reads and for what it makes: both come first.
        for group, plan in changed:
            self.finish(group, plan, edit)
        if changed:
            model.graph.meta[self.name] = self.option_values()
        return bool(changed)

    def _groups(self, folds: ChannelFolds) -> list[tuple[ReaderGroup, ChannelFold]]:
        found = []
        for group in folds.groups():
            if not isinstance(group, ReaderGroup):
                self.left(group[0].node, group[1])
                continue
            if group.roles == ["head"] and not self.head:
                continue
            fold = folds.fold(group)
            if isinstance(fold, str):
                self.left(group.readers[0], f"{group.label}: {fold}")
            else:
                found.append((group, fold))
        return found

    def _plans(self, model: ir.Model, found: Sequence[tuple[ReaderGroup, ChannelFold]]) -> dict[int, ScalePlan]:
        """What is done to each group. The model is left as it is meanwhile, since it is being run on the data."""
        assert self.calibration is not None
        asked = {request: i for i, (group, _) in enumerate(found) for request in self.requests(group)}
        plans: dict[int, ScalePlan] = {}
        for stage in self.calibration.stages(model, list(asked)):
            gathered: dict[int, dict[Request, npt.NDArray[Any]]] = {}
            for request, summary in stage.summaries.items():
                if summary.rows:
                    gathered.setdefault(asked[request], {})[request] = summary.array
            for index, statistics in sorted(gathered.items()):
                plans[index] = self.plan(*found[index], statistics)
        return plans

    @abc.abstractmethod
    def requests(self, group: ReaderGroup) -> Sequence[Request]:
        """What has to be known of the value that a group reads."""

    @abc.abstractmethod
    def plan(self, group: ReaderGroup, fold: ChannelFold, statistics: Statistics) -> ScalePlan:
        """The factors of a group."""

    def finish(self, group: ReaderGroup, plan: ScalePlan, edit: Editor) -> None:
        """What else is done to the weights of a group when all are scaled."""
