"""What a model loses where layers read the caches of others, told by sessions in which the choice is an input."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.shapes import infer
from graphopt.calibration.calibration import Calibration
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor, sort
from graphopt.graph.kv_interface import KVInterface
from graphopt.passes.kv.cached_layers import CachedLayer, Sharing, cached_layers
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.verification.trials import Trials

Array: TypeAlias = npt.NDArray[Any]
Pair: TypeAlias = tuple[int, int]
"""A layer that loses its cache, and the earlier one whose cache it reads."""


def roots(pairs: Sequence[Pair]) -> dict[int, int]:
    """For each layer without a cache of its own the one whose cache it reads in the end."""
    donors = dict(pairs)
    found = {}
    for layer in donors:
        root = donors[layer]
        while root in donors:
            root = donors[root]
        found[layer] = root
    return found


class SharingTrials:
    """A decoder on a few samples, with the caches that its layers read as inputs.

    Each layer gathers its keys and values from those of all layers up to it, by an index that a trial gives. No
    activation passes through Python but what is judged.

    Args:
        model: The decoder, which stays as it is.
        interface: Its interface.
        calibration: The samples.
        samples: How many of them.
        weights: Names of initializers that trials exchange too.
        together: As of `Trials`.
        trials: As of `Trials`.
    """

    def __init__(
        self,
        model: ir.Model,
        interface: KVInterface,
        calibration: Calibration,
        samples: int,
        weights: Sequence[str] = (),
        *,
        together: int = 1,
        trials: int | None = None,
    ) -> None:
        self._model, self._interface, self._calibration, self._weights = model, interface, calibration, weights
        self._together, self._expected = together, trials
        self._samples = list(calibration.feeds(model, samples))
        self._trials: dict[bool, tuple[Trials, dict[int, ir.Value], dict[int, dict[int, int]]]] = {}

    def losses(
        self, sets: Iterable[Sequence[Pair]], weights: Callable[[Pair], Mapping[str, Array]] | None = None
    ) -> Iterator[float]:
        """The mean divergence KL(original ‖ shared) of the distributions over the vocabulary, in nats, of each set.

        Args:
            sets: Who reads whose cache.
            weights: Other contents of some of the weights, by name, in their shape and type, for a pair; None: none.
        """
        trials, switches = self._opened(final=False)
        given = weights or (lambda pair: {})
        return trials.losses(
            {**switches(pairs), **{name: array for pair in pairs for name, array in given(pair).items()}}
            for pairs in sets
        )

    def cosine(self, pairs: Sequence[Pair]) -> float:
        """The mean cosine of the final hidden states with the original's, over tokens."""
        trials, switches = self._opened(final=True)
        return 1 - trials.loss(switches(pairs)) / 2

    def _opened(self, *, final: bool) -> tuple[Trials, Callable[[Sequence[Pair]], dict[str, Array]]]:
        """Trials, and what they are given for pairs."""
        if final not in self._trials:
            model, indices, places = self._switched(final=final)
            exchanged = [*indices.values(), *(model.graph.initializers[name] for name in self._weights)]
            trials = Trials(
                model, exchanged, self._samples, threads=self._calibration.threads, jobs=self._calibration.jobs,
                together=1 if final else self._together, trials=self._expected,
            )  # fmt: skip
            self._trials[final] = trials, indices, places
        trials, indices, places = self._trials[final]

        def switches(pairs: Sequence[Pair]) -> dict[str, Array]:
            return {
                indices[layer].name or "": np.array([places[layer][root]], dtype=np.int64)
                for layer, root in roots(pairs).items()
            }

        return trials, switches

    def _switched(self, *, final: bool) -> tuple[ir.Model, dict[int, ir.Value], dict[int, dict[int, int]]]:
        """A copy with an index for each layer, and for each layer the places of those that it may read."""
        copy, edit, layers, sharing = self._copy()
        indices: dict[int, ir.Value] = {}
        places: dict[int, dict[int, int]] = {}
        for number, layer in layers.items():
            others = [one for one in layers.values() if one.form == layer.form and one.number <= number]
            places[number] = {one.number: place for place, one in enumerate(others)}
            edit.at(layer.node)
            index = edit.constant(np.array([len(others) - 1]), "donor")
            # The attention itself stays, for it makes the present ones; what reads its result reads another's.
            first = edit.constant(np.array([0]), "first")
            stacked = []
            for part in range(2):
                each = [edit.op("Unsqueeze", [one.presents[part], first]) for one in others]
                stack = edit.op("Concat", each, {"axis": 0})
                chosen = edit.op("Gather", [stack, index], {"axis": 0})
                stacked.append(edit.op("Squeeze", [chosen, first], like=layer.presents[part]))
            before = layer.node.outputs[0]
            users = [(use.node, use.idx) for use in before.uses()]
            y = sharing.write(layer, stacked[0], stacked[1])
            for user, slot in users:
                user.replace_input_with(slot, y)
            indices[number] = index
        sort(copy)
        if final:
            _give_out_final(copy, edit, self._interface.logits)
        return copy, indices, places

    def _copy(self) -> tuple[ir.Model, Editor, dict[int, CachedLayer], Sharing]:
        copy = self._model.clone()
        edit, facts = Editor(copy), infer(copy, believe_names=True)
        layers, _ = cached_layers(copy, self._interface, facts)
        return copy, edit, layers, Sharing(edit, facts)

    def local_errors(self) -> dict[Pair, float]:
        """|y' − y|² / |y|² of the output y of each attention where it alone reads an earlier layer's cache, on the
        first sample, from one run."""
        copy, edit, layers, sharing = self._copy()
        outputs: dict[Pair, ir.Value] = {}
        for layer in layers.values():
            edit.at(next(iter(layer.node.outputs[0].uses())).node)
            for donor in layers.values():
                if donor.form == layer.form and donor.number < layer.number:
                    outputs[layer.number, donor.number] = self._error(layer, donor, edit, sharing)
        sort(copy)
        return self._measured(copy, outputs, self._samples[:1])

    @staticmethod
    def _error(layer: CachedLayer, donor: CachedLayer, edit: Editor, sharing: Sharing) -> ir.Value:
        own = layer.node.outputs[0]
        other = sharing.write(layer, *donor.presents)
        difference = edit.op("ReduceSumSquare", [edit.op("Sub", [other, own])], {"keepdims": 0})
        return edit.op("Div", [difference, edit.op("ReduceSumSquare", [own], {"keepdims": 0})])

    def distances(self) -> dict[Pair, float]:
        """The mean of the Euclidean distances of the mean keys and of the mean values of two layers, over all tokens
        of all samples."""
        copy, edit, layers, _ = self._copy()
        outputs: dict[Pair, ir.Value] = {}
        for layer in layers.values():
            edit.at(layer.node)
            for part, present in enumerate(layer.presents):
                axes = edit.constant(np.array([0, 2]), "axes")
                outputs[layer.number, part] = edit.op("ReduceMean", [present, axes], {"keepdims": 0})
        sort(copy)
        means = self._measured_arrays(copy, outputs, self._samples)
        return {
            (layer.number, donor.number): float(
                np.mean([np.linalg.norm(means[layer.number, part] - means[donor.number, part]) for part in range(2)])
            )
            for layer in layers.values()
            for donor in layers.values()
            if donor.form == layer.form and donor.number < layer.number
        }

    def _measured(
        self, copy: ir.Model, outputs: Mapping[Pair, ir.Value], samples: Sequence[Mapping[str, Array]]
    ) -> dict[Pair, float]:
        return {key: float(array) for key, array in self._measured_arrays(copy, outputs, samples).items()}

    def _measured_arrays(
        self, copy: ir.Model, outputs: Mapping[Pair, ir.Value], samples: Sequence[Mapping[str, Array]]
    ) -> dict[Pair, Array]:
        """The means of some values over samples."""
        for value in outputs.values():
            value.type = ir.TensorType(ir.DataType.FLOAT) if value.type is None else value.type
        copy.graph.outputs[:] = list(outputs.values())
        session = make_session(copy, threads=self._calibration.threads)
        sums: list[Array] = []
        for sample in samples:
            found = [np.asarray(array, dtype=np.float64) for array in run(session, dict(sample))]
            sums = found if not sums else [a + b for a, b in zip(sums, found, strict=True)]
        return {key: total / len(samples) for key, total in zip(outputs, sums, strict=True)}


def by_distance(
    distances: Mapping[Pair, float],
    count: int,
    cosine: Callable[[Sequence[Pair]], float],
    *,
    similar: bool,
    threshold: float,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Pair]:
    """KVSharer's rule: pairs in the order of their distances, the farthest first (or the nearest, where `similar`),
    each accepted where the cosine with it and those before it stays at the threshold at least.

    Args:
        distances: By pair.
        count: Pairs that are accepted at most.
        cosine: That of the final hidden states with the original's.
        similar: Whether the nearest come first.
        threshold: The least cosine.
        progress: Called before each pair.
    """
    order = sorted(distances, key=lambda pair: (distances[pair] if similar else -distances[pair], pair))
    accepted: list[Pair] = []
    for number, (layer, donor) in enumerate(order):
        if len(accepted) == count:
            break
        if progress is not None:
            progress("choosing caches to share", number, len(order))
        if any(layer == other for other, _ in accepted):
            continue
        if cosine([*accepted, (layer, donor)]) >= threshold:
            accepted.append((layer, donor))
    return accepted


def candidates(errors: Mapping[Pair, float], donors: int) -> list[Pair]:
    """For each layer the nearest earlier one, and the `donors` of the least errors."""
    found: dict[Pair, None] = {}
    for layer in sorted({layer for layer, _ in errors}):
        own = [pair for pair in errors if pair[0] == layer]
        found[max(own, key=lambda pair: pair[1])] = None
        found.update(dict.fromkeys(sorted(own, key=lambda pair: (errors[pair], -pair[1]))[:donors]))
    return list(found)


def _give_out_final(model: ir.Model, edit: Editor, logits: str | None) -> None:
    """Make the final hidden states, each divided by its length, the only output."""
    current = next(value for value in model.graph.outputs if value.name == logits)
    node = current.producer()
    while node is not None and node.inputs[0] is not None:
        edit.at(node)
        current = node.inputs[0]
        if is_op(node, "MatMul", "Gemm") and any(is_constant(value) for value in node.inputs[1:]):
            break
        node = current.producer()
    final = edit.op("LpNormalization", [current], {"axis": -1, "p": 2})
    final.type = ir.TensorType(current.dtype or ir.DataType.FLOAT)
    model.graph.outputs[:] = [final]
    sort(model)
