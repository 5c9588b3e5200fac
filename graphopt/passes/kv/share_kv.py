"""share-kv: layers read the keys and values of an earlier layer, and lose their own with their cache."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.errors import InputDataError, UsageError
from graphopt.graph.edits import Editor
from graphopt.graph.importance import read_importance
from graphopt.graph.kv_edits import remove_pairs
from graphopt.graph.kv_interface import KVInterface
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.kv.cached_layers import CachedLayer, Caches, Sharing
from graphopt.passes.kv.packed_queries import narrow_queries
from graphopt.passes.kv.sharing_heal import Healing, of_layer
from graphopt.passes.kv.sharing_search import LossSearch
from graphopt.passes.kv.sharing_trials import Pair, SharingTrials, by_distance, roots

Search = Literal["loss", "similar", "dissimilar"]
SEARCH_SAMPLES = 4
"""Samples at most that candidates are refitted on."""


class ShareKV(Pass):
    """Let layers of a decoder read the key/value cache of an earlier layer; their own goes, with its projections.

        y_l = softmax(s · q_l K_dᵀ + mask) · V_d,   d < l

    with K_d and V_d the keys (rotated) and values of layer d, of past and new tokens. The projections of keys and
    values of layer l, the rotation of its keys and the inputs and outputs of its cache are deleted, and the caches that
    are left are numbered anew. `group-query-attention` reads the other layer's cache where it lies, so nothing is
    copied and no operator of graphopt's own is needed.

    Paper: KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing (Yang et al., 2024).

    1. A donor that loses its own cache is replaced by the layer whose cache it reads.
    2. `search: loss`: one pair after the other, each where the divergence of the model's outputs from the original's
       is least. Candidates are, for each layer, the layer before it and the `donors` whose caches change the result of
       its attention least. All of them are tried alone; later steps try those again of which least is expected. A
       trial gives indices to one session, in which each layer gathers its keys and values by index. With healing the
       candidates are refitted first, each to the cache of the layer before it: of those layers, twice as many as are
       wanted, that lose least without.
    3. `search: dissimilar` (the paper's rule): pairs in the order of the Euclidean distance of their mean keys and
       values, the farthest first, each accepted where the cosine of the final hidden states with the original's stays
       at `threshold` at least. `search: similar`: the nearest first.
    4. Healing (option `heal`): each layer that lost its cache is refitted, from the first to the last. W_q gets, by
       least squares, the queries whose scores on the donor's keys come nearest to the original ones on its own (turned
       back by the rotation, each token's weighted by its attention); W_o then the weights by which the attention's
       result comes nearest to what the residual stream was behind it in the original, tokens counting by the inverse
       square of its length. A ridge, chosen on held-out samples, keeps both small; what gives nothing there is left.
    5. What was found is among the options that the report lists, as `pairs`; given so, nothing is searched, and no data
       is needed.

    **Options:** `pairs` (default: search): [layer, donor] for each layer that loses its cache, layers counted from 0
    among those with a cache; `count` (default: by `fraction`): how many layers lose their cache; `fraction` (default
    0.1): the same as a part of the layers; `search` (default "loss"): rules 2 and 3; `keep` (default none): layers that
    keep their cache; `donors` (default 2): rule 2; `looks` (default 6): candidates that a later step tries again;
    `threshold` (default 0.5): rule 3; `samples` (default 2): of the data, for trials; `heal` (default: true for a
    search, false for given pairs): rule 4; `heal_samples` (default 8): of the data, for it.

    **Needs:** `Attention` with a cache, as `raise-attention` makes it; the same types and sizes of both caches; data
    for a search.
    **Guarantees:** LOSSY, see docs/kv.md for what it costs.

    **Left alone, with the reason:** a cache that isn't joined by `Attention`, or that isn't an input and an output of
    the model as it is; a pair of caches of other sizes, or from one of which tokens may be dropped (evictable-kv).

    A projection that makes queries, keys and values at once is cut to the queries, where these stand side by side in
    it; where heads are packed one by one (GPT-NeoX), it goes on making all three.

    **When not to use it:** on models that weren't trained so every layer costs much. `quantize-kv` behind it quantizes
    the caches that are left.
    """

    name: ClassVar[str] = "share-kv"
    family: ClassVar[str] = "kv"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing"

    def __init__(
        self,
        pairs: list[list[int]] | None = None,
        count: int | None = None,
        fraction: float = 0.1,
        search: Search = "loss",
        keep: list[int] | None = None,
        donors: int = 2,
        looks: int = 6,
        threshold: float = 0.5,
        samples: int = 2,
        heal: bool | None = None,
        heal_samples: int = 8,
    ) -> None:
        super().__init__()
        self.pairs = None if pairs is None else _checked(pairs)
        if count is not None and count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        if not 0 < fraction < 1:
            raise ValueError(f"fraction is a part of the layers, between 0 and 1, not {fraction}")
        if search not in get_args(Search):
            raise ValueError(f'search is "loss", "similar" or "dissimilar", not {search!r}')
        if donors < 0 or looks < 1 or samples < 1:
            raise ValueError("looks and samples must be positive, and donors can't be negative")
        if heal_samples < 2:
            raise ValueError(f"heal_samples must be at least 2, of which one is held out, not {heal_samples}")
        self.count, self.fraction, self.search, self.keep = count, fraction, search, list(keep or ())
        self.donors, self.looks, self.threshold, self.samples = donors, looks, threshold, samples
        self.heal, self.heal_samples = pairs is None if heal is None else heal, heal_samples
        if pairs is None or self.heal:
            self.needs = ("text",)
        self.expected: list[float] = []
        self._found: list[list[int]] | None = None
        self._losing: set[int] = set()
        """Layers from whose caches tokens may be dropped."""

    def option_values(self) -> dict[str, Any]:
        """See the base; with the pairs that were found, once they are."""
        found = {} if self._found is None else {"pairs": self._found, "expected_divergence": self.expected}
        return {**super().option_values(), **found}

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        caches = Caches.of(self, model)
        if caches is None:
            return False
        interface, facts, layers, left = caches.interface, caches.facts, caches.layers, caches.left
        importance = read_importance(model.metadata_props)
        self._losing = set() if importance is None else set(importance.outputs)
        if self.pairs is None:
            pairs = self._searched(model, interface, layers, facts)
            self._found = [list(pair) for pair in pairs]
        else:
            pairs = [(layer, donor) for layer, donor in self.pairs]
            last = max((number for pair in pairs for number in pair), default=0)
            if last >= interface.layers:
                raise UsageError(f"share-kv: there is no layer {last}: {interface.layers} layers have a cache.")
        final = {layer: donor for layer, donor in roots(pairs).items() if self._possible(layer, donor, layers, left)}
        if not final:
            return False
        edit = Editor(model)
        sharing, healing = Sharing(edit, facts), self._healing(model, [layers[layer] for layer in final], facts)
        for number, donor in sorted(final.items()):
            layer, told = layers[number], f"layer {number} reads the cache of layer {donor}"
            if healing is not None:
                refit = healing.refit(model, layer, of_layer(layers[donor]), facts)
                told += f"; {refit if isinstance(refit, str) else refit.put(layer, facts, edit)}"
            self.applied(layer.node, told)
            query = layer.node.inputs[0]
            assert query is not None
            sharing.share(layer, layers[donor])
            narrow_queries(query, facts, edit)
        remove_pairs(model, interface, [pair for layer in final for pair in layers[layer].pairs])
        return True

    def _healing(self, model: ir.Model, layers: list[CachedLayer], facts: ShapeFacts) -> Healing | None:
        if not self.heal or self.calibration is None:
            return None
        healing = self._healer(model)
        healing.remember(model, layers, facts)
        return healing

    def _possible(
        self,
        layer: int,
        donor: int,
        layers: dict[int, CachedLayer],
        left: dict[int, tuple[ir.Node | None, str]],
    ) -> bool:
        """Whether a layer can read the cache of another; else the reason is recorded."""
        if layer in left:
            return False
        if donor in left:
            return self.left(layers[layer].node, f"it can't read the cache of layer {donor}: {left[donor][1]}")
        if self._losing & {layer, donor}:
            which = f"its cache or that of layer {donor}"
            return self.left(layers[layer].node, f"tokens may be dropped from {which} alone (evictable-kv)")
        if layers[layer].form != layers[donor].form:
            return self.left(layers[layer].node, f"its cache has other sizes or types than that of layer {donor}")
        return True

    def _searched(
        self, model: ir.Model, interface: KVInterface, layers: dict[int, CachedLayer], facts: ShapeFacts
    ) -> list[Pair]:
        assert self.calibration is not None
        count = self.count if self.count is not None else max(1, round(self.fraction * interface.layers))
        if self.search == "loss":
            search = LossSearch(
                model, interface, layers, facts, self.calibration, self.samples, self.keep, self.donors, self.looks
            )
            chosen = search.healed(count, self._healer(model, SEARCH_SAMPLES)) if self.heal else search.plain(count)
            self.expected = [one.loss for one in chosen]
            return list(chosen[-1].order) if chosen else []
        trials = SharingTrials(model, interface, self.calibration, self.samples)
        distances = {pair: d for pair, d in trials.distances().items() if pair[0] not in self.keep}
        found = by_distance(
            distances, count, trials.cosine, similar=self.search == "similar", threshold=self.threshold,
            progress=self.calibration.progress,
        )  # fmt: skip
        self.expected = list(trials.losses([found])) if found else []
        return found

    def _healer(self, model: ir.Model, most: int | None = None) -> Healing:
        assert self.calibration is not None
        count = self.heal_samples if most is None else min(most, self.heal_samples)
        samples = list(self.calibration.feeds(model, count))
        if len(samples) < 2:
            raise InputDataError("share-kv: healing needs at least two samples, of which one is held out.")
        return Healing(samples, self.calibration.threads)


def _checked(pairs: list[list[int]]) -> list[list[int]]:
    """Pairs of numbers of layers, as they were given.

    Raises:
        ValueError: They aren't, or a donor isn't an earlier layer, or a layer comes twice.
    """
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, list | tuple) for pair in pairs):
        raise ValueError(f"pairs is a list of [layer, donor], such as [[13, 12], [17, 16]], not {pairs!r}")
    for pair in pairs:
        if len(pair) != 2 or not all(isinstance(number, int) and number >= 0 for number in pair):
            raise ValueError(f"pairs holds [layer, donor] for each layer that loses its cache, not {pair}")
        if pair[1] >= pair[0]:
            raise ValueError(f"layer {pair[0]} can read the cache of an earlier layer only, not of {pair[1]}")
    if len({pair[0] for pair in pairs}) < len(pairs):
        raise ValueError("a layer stands in pairs twice")
    return [list(pair) for pair in pairs]
