"""reuse-layers: layers that compute with the weights of another layer, which are stored once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.depth_units import DepthUnits, depth_units
from graphopt.analysis.shapes import infer
from graphopt.errors import UsageError
from graphopt.graph.constants import initializer_bytes
from graphopt.graph.edits import Editor
from graphopt.passes.base import Guarantee, SearchPass
from graphopt.passes.depth.corresponding import NotAlikeError, Place, corresponding
from graphopt.search.greedy import greedy, trials_at_most
from graphopt.verification.trials import Trials

TiedNorms = Literal["own", "shared"]
Donors = Literal["previous", "adjacent"]
Pair = tuple[int, int]
"""The place of a layer, and that of the layer whose weights it gets."""


class ReuseLayers(SearchPass):
    """Let layers compute with the weights of another layer of the same form, usually the one before.

        W_l := W_d,   d = l − 1

    The layer d runs twice, so to say, and stands in the file once. **Bytes go down, time doesn't**: each layer still
    computes all it did, and its attention keeps a cache of its own. Memory while running goes down only as far as the
    runtime shares what it prepares of one weight.

    Papers: Skrr: Skip and Re-use Text Encoder Layers for Memory Efficient Text-to-Image Generation (an adjacent block
    in place of one that is left out); FoldGPT: Simple and Effective Large Language Model Compression Scheme (blocks of
    a group share their weights; its gates and fine-tuning are left out). Choosing by the divergence of the outputs
    takes the place of Skrr's measure, which is made for text-to-image models.

    1. Two layers have the same form where the same operators with the same attributes read weights of the same types
       and shapes, walked from what they add back to the stream. Masks, positions and caches stay each layer's own.
    2. Norms stay each layer's own, or go with the weights (`norms`).
    3. Which layers: the pairs with the least divergence of the outputs from the original's, one after the other, each
       beside those that were chosen already. A trial exchanges weights within one session. A layer that itself gets
       others' weights hands those on.
    4. What was chosen is among the options that the report lists, as `pairs`; given as an option, nothing is searched
       and no data needed.

    **Options:** `count` (default 1): how many layers get another's weights; `donors` (default "previous"): whose,
    "previous" or "adjacent" (the one before or the one behind); `norms` (default "own"): rule 2, or "shared"; `pairs`
    (default none): a layer's number and its donor's, counted from 0, such as {7: 6}; any two of the same form;
    `samples` (default 2): of the data; `shortlist` (default 0: all): how many pairs, those that last cost least, each
    further one is chosen among.

    **Needs:** data, but for `pairs`; a canonical graph. **Guarantees:** LOSSY.

    **Left alone, with the reason:** a layer that has no neighbour of its form.

    **When not to use it:** for speed; without training on a model whose layers aren't alike: on SmolLM2-135M (4 windows
    of 512 tokens, perplexity 22.95) the best layer that runs twice gives 29.5, while the model without its best layer
    has 25.0 and saves the same bytes. Weights in few bits cost less quality for the same bytes, too.
    """

    name: ClassVar[str] = "reuse-layers"
    family: ClassVar[str] = "depth"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "FoldGPT: Simple and Effective Large Language Model Compression Scheme"

    def __init__(
        self,
        count: int = 1,
        donors: Donors = "previous",
        norms: TiedNorms = "own",
        pairs: dict[int | str, int | str] | None = None,
        samples: int = 2,
        shortlist: int = 0,
    ) -> None:
        super().__init__()
        for option, value, known in (("donors", donors, Donors), ("norms", norms, TiedNorms)):
            if value not in get_args(known):
                raise ValueError(f"{option} is one of {', '.join(get_args(known))}, not {value!r}")
        if count < 1 or samples < 1 or shortlist < 0:
            raise ValueError("count and samples must be at least 1, shortlist 0")
        self.count, self.donors, self.norms = count, donors, norms
        self.samples, self.shortlist = samples, shortlist
        self.pairs: dict[int, int] | None = None
        if pairs is None:
            self.needs = ("samples",)
        else:
            try:
                self.pairs = {int(layer): int(donor) for layer, donor in pairs.items()}
            except (TypeError, ValueError, AttributeError) as error:
                raise ValueError(
                    f"pairs gives a layer's number its donor's, such as {{7: 6}}, not {pairs!r}"
                ) from error
        self.saved = 0

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        found = depth_units(model, infer(model, believe_names=True))
        pairs = _resolved(self.pairs) if self.pairs is not None else self._searched(model, found)
        self.saved, changes = 0, []
        for layer, donor in pairs.items():
            try:
                changes.append((layer, donor, self._places(found, layer, donor)))
            except NotAlikeError as error:
                raise UsageError(f"reuse-layers: layer {layer} can't be layer {donor}: {error}.") from error
        edit = Editor(model)
        changed = False
        for layer, donor, places in changes:
            before = initializer_bytes(model)
            for place in places:
                edit.set_input(place.node, place.index, place.other)
            saved = before - initializer_bytes(model)
            self.saved += saved
            changed |= bool(places)
            add = found.layers[layer][-1].branch.add
            if places:
                self.applied(
                    add, f"layer {layer} has the weights of layer {donor}: {saved} bytes less, as much to compute"
                )
        self.pairs = pairs
        return changed

    def _places(self, found: DepthUnits, layer: int, donor: int) -> list[Place]:
        layers = found.layers
        if not (0 <= layer < len(layers) and 0 <= donor < len(layers)):
            raise UsageError(
                f"reuse-layers: the model has no layer {max(layer, donor)}; its last is {len(layers) - 1}."
            )
        places = corresponding(layers[layer], layers[donor])
        return [place for place in places if self.norms == "shared" or not place.norm]

    def _searched(self, model: ir.Model, found: DepthUnits) -> dict[int, int]:
        """The pairs of least loss."""
        assert self.calibration is not None
        candidates: dict[Pair, list[Place]] = {}
        for layer, units in enumerate(found.layers):
            reasons = []
            for donor in (layer - 1, layer + 1) if self.donors == "adjacent" else (layer - 1,):
                if 0 <= donor < len(found.layers):
                    try:
                        candidates[layer, donor] = _exchangeable(self._places(found, layer, donor))
                    except NotAlikeError as error:
                        reasons.append(str(error))
            if reasons and not any(pair[0] == layer for pair in candidates):
                self.left(units[-1].branch.add, f"layer {layer} keeps its weights: {reasons[0]}")
        if not candidates:
            return {}
        if self.count > len(candidates):
            raise UsageError(f"reuse-layers: {self.count} layers can't get another's weights, since few are alike.")
        weights = list(dict.fromkeys(place.own for places in candidates.values() for place in places))
        samples = self.calibration.feeds(model, self.samples)
        shortlist = self.shortlist or None
        trials = Trials(
            model, weights, samples, threads=self.calibration.threads, jobs=self.calibration.jobs,
            together=len(candidates), trials=trials_at_most(len(candidates), self.count, 1, shortlist),
        )  # fmt: skip
        losses: dict[tuple[Pair, ...], float] = {}

        def exchanged(chosen: tuple[Pair, ...]) -> dict[str, npt.NDArray[Any]]:
            changed: dict[str, npt.NDArray[Any]] = {}
            for layer, donor in _resolved(dict(chosen)).items():
                # Between neighbours all forms were compared; those of a chain are alike, too.
                for place in _exchangeable(self._places(found, layer, donor)):
                    changed[place.own.name or ""] = _array(place.other)
            return changed

        def tried(sets: Sequence[tuple[Pair, ...]]) -> Iterator[float]:
            for chosen, loss in zip(sets, trials.losses(map(exchanged, sets)), strict=True):
                losses[chosen] = loss
                yield loss

        progress = self.calibration.progress
        steps = greedy(
            list(candidates), tried, self.count, shortlist=shortlist, progress=progress,
            what="choosing layers that are used again",
            # A layer has one donor, and of two layers one keeps its weights.
            excludes=lambda one, other: one[0] == other[0] or one == other[::-1],
        )  # fmt: skip
        if len(steps) < self.count:
            raise UsageError(f"reuse-layers: no {self.count} layers can get the weights of others that keep theirs.")
        self.scores = {f"{k[0][0]}: {k[0][1]}": value for k, value in losses.items() if len(k) == 1}
        self.expected = steps[-1].loss
        return _resolved(dict(steps[-1].chosen))


def _resolved(pairs: Mapping[int, int]) -> dict[int, int]:
    """Each layer with the donor that keeps its own weights.

    Raises:
        UsageError: Layers that get each other's weights.
    """
    found = {}
    for layer, donor in pairs.items():
        seen = {layer}
        while donor in pairs and donor not in seen:
            seen.add(donor)
            donor = pairs[donor]
        if donor in seen:
            raise UsageError(f"reuse-layers: layer {layer} would get its own weights again, so that none are left.")
        found[layer] = donor
    return found


def _exchangeable(places: list[Place]) -> list[Place]:
    """Those whose constant is an initializer that nothing else reads, which a trial may exchange."""
    return [p for p in places if p.own.is_initializer() and {user for user, _ in p.own.uses()} == {p.node}]


def _array(value: ir.Value) -> npt.NDArray[Any]:
    assert value.const_value is not None
    return np.asarray(value.const_value.numpy())
