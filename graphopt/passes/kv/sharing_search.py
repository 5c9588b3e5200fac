"""Which layers of a decoder are to read whose cache: searches by measured loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.calibration.calibration import Calibration
from graphopt.graph.kv_interface import KVInterface
from graphopt.passes.kv.cached_layers import CachedLayer
from graphopt.passes.kv.sharing_heal import Healing, of_layer, place_of
from graphopt.passes.kv.sharing_trials import Pair, SharingTrials, candidates
from graphopt.search.greedy import Found, greedy, trials_at_most

Array = npt.NDArray[Any]

POOL = 2
"""Layers that are refitted for the search, for each that is to lose its cache."""
ALIKE = 0.5
"""Relative squared change of an attention's result below which another cache does instead of the nearest one."""


@dataclasses.dataclass(frozen=True)
class LossSearch:
    """Greedy search by the divergence of the model's outputs.

    Attributes:
        model: The decoder, which stays as it is.
        interface: Its interface.
        layers: Its layers with a cache.
        facts: Its shapes.
        calibration: The samples.
        samples: Samples of a trial.
        keep: Layers that keep their cache.
        donors: Donors that are tried for each layer, besides the one before it.
        looks: Candidates that a later step tries again.
    """

    model: ir.Model
    interface: KVInterface
    layers: Mapping[int, CachedLayer]
    facts: ShapeFacts
    calibration: Calibration
    samples: int
    keep: Sequence[int]
    donors: int
    looks: int

    def plain(self, count: int) -> list[Found[Pair]]:
        """Pairs for layers whose weights stay as they are: the best set of each size."""
        most = len(self.layers) * (self.donors + 1)
        trials = self._trials(most, trials_at_most(most, count, 1, self.looks))
        errors = self._errors(trials)
        pairs = candidates(errors, self.donors)
        return self._greedy(pairs, count, trials.losses, lambda one, other: one[0] == other[0])

    def healed(self, count: int, healing: Healing) -> list[Found[Pair]]:
        """Pairs for layers that will be refitted: the best set of each size.

        Layers are ordered by the loss where they read the cache that changes their attention's result least. The first
        of them, twice as many as are wanted, are refitted to the cache of the layer before them (or to that one, where
        it is nearly their own), each in the original model; these, with their new weights, are the candidates. A layer
        that is a donor keeps its cache.
        """
        trials = self._trials(len(self.layers), len(self.layers))
        errors = self._errors(trials)
        best = [
            min((pair for pair in errors if pair[0] == layer), key=lambda pair: (errors[pair], -pair[1]))
            for layer in sorted({layer for layer, _ in errors})
        ]
        tried = self.calibration.counted("trying layers", trials.losses([pair] for pair in best), len(best))
        alone = {pair[0]: loss for pair, loss in zip(best, tried, strict=True)}
        del trials
        pool: list[Pair] = []
        for layer in sorted(alone, key=lambda one: (alone[one], one))[: POOL * count]:
            nearest = max((pair for pair in errors if pair[0] == layer), key=lambda pair: pair[1])
            alike = next(pair for pair in best if pair[0] == layer)
            pool.append(alike if errors[alike] < ALIKE else nearest)
        weights: dict[Pair, dict[str, Array]] = {}
        for layer, donor in self.calibration.counted("refitting layers", pool, len(pool)):
            weights[layer, donor] = self._refitted(layer, donor, healing)
        names = sorted({name for given in weights.values() for name in given})
        refitted = self._trials(len(pool), trials_at_most(len(pool), min(count, len(pool)), 1, self.looks), names)

        def losses(sets: Iterable[Sequence[Pair]]) -> Iterable[float]:
            return refitted.losses(sets, weights.__getitem__)

        return self._greedy(pool, count, losses, lambda one, other: bool(set(one[:1]) & set(other) or other[0] in one))

    def _trials(self, together: int, trials: int, weights: Sequence[str] = ()) -> SharingTrials:
        return SharingTrials(
            self.model, self.interface, self.calibration, self.samples, weights, together=together, trials=trials
        )

    def _errors(self, trials: SharingTrials) -> dict[Pair, float]:
        return {pair: error for pair, error in trials.local_errors().items() if pair[0] not in self.keep}

    def _refitted(self, layer: int, donor: int, healing: Healing) -> dict[str, Array]:
        """New contents of a layer's weights by name, of those that are initializers of their own."""
        refit = healing.refit(self.model, self.layers[layer], of_layer(self.layers[donor]), self.facts)
        place = place_of(self.layers[layer], self.facts)
        found: dict[str, Array] = {}
        if isinstance(refit, str) or isinstance(place, str):
            return found
        for product, array in ((place.queries, refit.queries), (place.output, refit.output)):
            value = None if product is None else product.node.inputs[1]
            if array is not None and value is not None and value.const_value is not None:
                found[value.name or ""] = np.asarray(array, value.const_value.dtype.numpy())
        return found

    def _greedy(
        self,
        pairs: Sequence[Pair],
        count: int,
        losses: Callable[[Sequence[tuple[Pair, ...]]], Iterable[float]],
        excludes: Callable[[Pair, Pair], bool],
    ) -> list[Found[Pair]]:
        return greedy(
            pairs, losses, min(count, len(pairs)), shortlist=self.looks, excludes=excludes,
            progress=self.calibration.progress, what="choosing caches to share",
        )  # fmt: skip
