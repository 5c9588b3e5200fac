"""Healing: projections of a layer that reads another's cache, refitted so that it gives what it gave on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op
from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.graph.scratch import Scratch
from graphopt.passes.fold.layers import Layer, layer_of
from graphopt.passes.kv.cached_layers import CachedLayer, Sharing
from graphopt.passes.kv.copies import copied, values_of
from graphopt.passes.kv.query_targets import query_targets, turned_back
from graphopt.passes.lower.cached_site import CachedSite, NotTaken, projection, read, token_outputs

Array = npt.NDArray[Any]

Presents: TypeAlias = Callable[[Editor, dict[str | None, ir.Value]], tuple[ir.Value, ir.Value]]
"""Writes the keys and values [B, H, P + S, D] that an attention is to read, into a copy of a model at the editor's
site, from the values of the copy by name."""

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
"""What is added to the diagonal of a normal matrix, as a part of its mean: the best on held-out samples is taken."""
QUERY_RIDGE = 0.01
MOST_QUERIES = 256
"""Tokens of a sample that W_q is fitted on, spread evenly."""
HELD_OUT = 4
"""One sample of so many is held out."""


@dataclasses.dataclass(frozen=True)
class Refit:
    """New weights of a layer.

    Attributes:
        queries: W_q [K, H·D] for the new keys, None: as it was.
        output: W_o [H·D, N] for the new values, None: as it was.
        before: |c' − c|² / |c|² of what the layer adds to the residual stream, on held-out samples, with the
            weights as they were.
        after: The same with the new ones.
    """

    queries: Array | None
    output: Array | None
    before: float
    after: float

    def put(self, layer: CachedLayer, facts: ShapeFacts, edit: Editor) -> str:
        """Give a layer that still has its own cache the new weights, and say what that gives."""
        place = place_of(layer, facts)
        assert not isinstance(place, str)
        for product, array in ((place.queries, self.queries), (place.output, self.output)):
            if product is None or array is None:
                continue
            tensor = ir.tensor(array.astype(product.weight.dtype.numpy()))
            value = product.node.inputs[1]
            if value is not None and value.is_initializer() and len(value.uses()) == 1:
                tensor.name = value.name
                value.const_value = tensor
            else:
                edit.at(product.node)
                edit.set_input(product.node, 1, edit.constant(tensor, "refitted"))
        if self.output is None:
            return f"its weights stay, no others come nearer than an error of {self.before:.2f}"
        which = "the output projection" if self.queries is None else "the projections of queries and outputs"
        return f"{which} refitted, error {self.before:.2f} before and {self.after:.2f} after"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer's weights stand.

    Attributes:
        site: Its attention.
        queries: The product that makes queries, None where more than a rotation lies behind it.
        output: The product that reads the heads' results.
        result: These, [B, S, H·D].
        residual: What the product is added to, None where it can't be told.
    """

    site: CachedSite
    queries: Layer | None
    output: Layer
    result: ir.Value
    residual: ir.Value | None


def of_layer(donor: CachedLayer) -> Presents:
    """The keys and values of an earlier layer."""
    keys, values = donor.presents
    return lambda edit, at: (at[keys.name], at[values.name])


def place_of(layer: CachedLayer, facts: ShapeFacts) -> Place | str:
    """Where the weights of a layer stand, or why they can't be refitted."""
    try:
        site = read(layer.node, facts)
    except NotTaken as reason:
        return str(reason)
    if site is None:
        return "it has no cache"
    results = [site.node.outputs[0]] if site.joined else list(token_outputs(site.node.outputs[0], site, facts))
    for result in results:
        for user, slot in result.uses():
            found = layer_of(user) if is_op(user, "MatMul") and slot == 0 else ""
            if isinstance(found, Layer) and not found.sharers() and len(result.uses()) == 1:
                return Place(site, projection(site.q), found, result, _residual(found.node.outputs[0]))
    return "no product with a weight of its own reads its result"


def _residual(value: ir.Value) -> ir.Value | None:
    """What `value`, with its bias, is added to."""
    current: ir.Value = value
    for _ in range(2):
        uses = list(current.uses())
        if len(uses) != 1 or not is_op(uses[0].node, "Add"):
            return None
        other = uses[0].node.inputs[1 - uses[0].idx]
        if other is not None and not is_constant(other):
            return other
        current = uses[0].node.outputs[0]
    return None


class Healing:
    """Refits layers of a decoder on samples.

    First the queries: for each token the one that comes nearest to the original scores on the new keys (see
    `query_targets`), turned back by the rotation, and W_q by least squares on the layer's input. Then W_o by least
    squares, from the results on the new keys and values to what the layer added to the residual stream with its own.
    Tokens count by the inverse square of the residual stream's length, as the norms behind it see them.

    Args:
        samples: Inputs of the model, at least two.
        threads: Threads within an operator.
    """

    def __init__(self, samples: Sequence[Mapping[str, Array]], threads: int | None) -> None:
        self._samples, self._threads = samples, threads
        self._scratch = Scratch()
        self._streams: dict[int, list[Array]] = {}

    def remember(self, model: ir.Model, layers: Sequence[CachedLayer], facts: ShapeFacts) -> None:
        """Note the residual stream behind the attention of some layers, before anything is shared: later refits of
        these then make up for what was lost before them too."""
        wanted: dict[str, ir.Value] = {}
        for layer in layers:
            place = place_of(layer, facts)
            if not isinstance(place, str) and place.residual is not None:
                wanted |= {f"c{layer.number}": place.output.node.outputs[0], f"r{layer.number}": place.residual}
        if not wanted:
            return
        copy, at = copied(model)
        for found in values_of(
            copy, {name: at[value.name] for name, value in wanted.items()}, self._samples, self._threads
        ):
            for layer in layers:
                if f"c{layer.number}" in found:
                    stream = self._scratch.array(found[f"c{layer.number}"] + found[f"r{layer.number}"])
                    self._streams.setdefault(layer.number, []).append(stream)

    def refit(self, model: ir.Model, layer: CachedLayer, other: Presents, facts: ShapeFacts) -> Refit | str:
        """New weights for `layer` on `other` keys and values, or why there are none; the model stays as it is."""
        place = place_of(layer, facts)
        if isinstance(place, str):
            return place
        queries = None if place.queries is None else self._queries(model, layer, other, place, place.queries)
        own, new = self._moments(model, layer, other, place, queries)
        weight = place.output.weight.numpy().astype(np.float64)
        before = _error(own[1], weight)
        best: tuple[float, Array | None, Array | None] = (before, None, None)
        for moments, asked in ((own, None), (new, queries)):
            for ridge in RIDGES:
                error = _error(moments[1], _solved(moments[0], ridge))
                if error < best[0]:
                    whole = _Moments.sum(*moments)
                    best = error, asked, _solved(whole, ridge)
        return Refit(best[1], best[2], before, best[0])

    def _queries(
        self, model: ir.Model, layer: CachedLayer, other: Presents, place: Place, product: Layer
    ) -> Array | None:
        """W_q for the other keys."""
        source, rotation = product.node.inputs[0], place.site.q.rotation
        assert source is not None
        values: dict[str, ir.Value | None] = {
            "x": source, "q": layer.node.inputs[0], "k": layer.presents[0],
        }  # fmt: skip
        if rotation is not None:
            values |= {"cos": rotation.inputs[1], "sin": rotation.inputs[2], "ids": (*rotation.inputs, None)[3]}
        bias = product.bias()
        assert not isinstance(bias, str)
        normal: Array | None = None
        right: Array | None = None
        given = {name: value for name, value in values.items() if value is not None}
        for found in self._run(model, given, layer, other):
            queries = _split(found["q"], layer.heads)
            step = -(-queries.shape[2] // MOST_QUERIES)
            queries, x = queries[:, :, step - 1 :: step], found["x"][:, step - 1 :: step]
            targets, counts = np.empty_like(queries), np.empty(queries.shape[:3], np.float32)
            for row in range(len(queries)):
                targets[row], counts[row] = query_targets(
                    found["weights"][row][:, step - 1 :: step], queries[row], found["k"][row], found["other"][row]
                )
            if rotation is not None:
                cos, sin = found["cos"], found["sin"]
                if "ids" in found:
                    cos, sin = cos[found["ids"]], sin[found["ids"]]
                targets = turned_back(targets, rotation, cos[:, step - 1 :: step], sin[:, step - 1 :: step])
            x = x.reshape(-1, x.shape[-1]).astype(np.float64)
            t = targets.transpose(0, 2, 1, 3).reshape(len(x), -1) - bias
            seen = counts.mean(axis=1).reshape(-1, 1)
            scaled = x * (seen / max(float(seen.mean()), 1e-12))
            normal = scaled.T @ x if normal is None else normal + scaled.T @ x
            right = scaled.T @ t if right is None else right + scaled.T @ t
        if normal is None or right is None:
            return None
        return _ridge(normal, right, QUERY_RIDGE)

    def _moments(
        self, model: ir.Model, layer: CachedLayer, other: Presents, place: Place, queries: Array | None
    ) -> tuple[tuple[_Moments, _Moments], tuple[_Moments, _Moments]]:
        """Moments for W_o with the layer's own queries, and with other ones: each of the samples that it is fitted on,
        and of those held out."""
        copy, at = copied(model)
        edit, facts = Editor(copy), infer(copy, believe_names=True)
        node = at[layer.node.outputs[0].name].producer()
        assert node is not None
        outputs: dict[str, ir.Value] = {"c": at[place.output.node.outputs[0].name]}
        if place.residual is not None:
            outputs["r"] = at[place.residual.name]
        edit.at(node)
        keys, values = other(edit, at)
        mark = node.inputs[0]
        for name, asked in (("own", None), ("new", queries)):
            if asked is not None:
                assert place.queries is not None
                self._other_queries(edit, at, node, place.queries, asked)
            y = Sharing(edit, facts).write(dataclasses.replace(layer, node=node), keys, values)
            if not layer.joined:
                y = edit.op("Transpose", [y], {"perm": [0, 2, 1, 3]})
                y = edit.op("Reshape", [y, edit.constant(np.array([0, 0, -1]), "joined")])
            outputs[name] = y
            if queries is None:
                outputs["new"] = y
                break
        node.replace_input_with(0, mark)
        own, new = (_Moments(), _Moments()), (_Moments(), _Moments())
        for index, found in enumerate(values_of(copy, outputs, self._samples, self._threads)):
            held = index % HELD_OUT == min(HELD_OUT, len(self._samples)) - 1
            wanted, residual = found["c"], found.get("r")
            if residual is not None and layer.number in self._streams:
                wanted = self._streams[layer.number][index] - residual
            own[held].add(found["own"], wanted, residual)
            new[held].add(found["new"], wanted, residual)
        return own, new

    @staticmethod
    def _other_queries(
        edit: Editor, at: Mapping[str | None, ir.Value], node: ir.Node, product: Layer, queries: Array
    ) -> None:
        """Make the queries of an attention by another weight, beside those that it has."""
        copies: dict[ir.Value, ir.Value] = {}
        old = at[product.node.outputs[0].name]
        edit.at(node)
        weight = edit.constant(queries.astype(product.weight.dtype.numpy()), "queries")
        source = old.producer()
        assert source is not None
        copies[old] = edit.op("MatMul", [source.inputs[0], weight], like=old)
        path: list[ir.Node] = []
        value = node.inputs[0]
        while value is not None and value is not old:
            maker = value.producer()
            assert maker is not None
            path.append(maker)
            value = next(v for v in maker.inputs if v is not None and not is_constant(v))
        for maker in reversed(path):
            attributes = {name: a.value for name, a in maker.attributes.items()}
            inputs = [copies.get(v, v) if v is not None else None for v in maker.inputs]
            copies[maker.outputs[0]] = edit.op(maker.op_type, inputs, attributes, like=maker.outputs[0])
        queries_now = node.inputs[0]
        assert queries_now is not None
        node.replace_input_with(0, copies[queries_now])

    def _run(
        self, model: ir.Model, values: Mapping[str, ir.Value], layer: CachedLayer, other: Presents
    ) -> Iterator[dict[str, Array]]:
        """Some values of a model on each sample, the weights that an attention gives, and other keys."""
        copy, at = copied(model)
        node = at[layer.node.outputs[0].name].producer()
        assert node is not None
        edit = Editor(copy)
        edit.at(node)
        attributes = {name: a.value for name, a in node.attributes.items()} | {"qk_matmul_output_mode": 3}
        again = edit.op("Attention", list(node.inputs), attributes, outputs=4).producer()
        assert again is not None
        outputs = {name: at[value.name] for name, value in values.items()}
        keys, _ = other(edit, at)
        yield from values_of(
            copy, {**outputs, "weights": again.outputs[3], "other": keys}, self._samples, self._threads
        )


@dataclasses.dataclass
class _Moments:
    """Second moments of weighted rows: of inputs, of inputs and targets, and of targets."""

    inputs: Array | float = 0.0
    crossed: Array | float = 0.0
    targets: float = 0.0

    def add(self, a: Array, c: Array, residual: Array | None) -> None:
        """Take rows [.., K] and their targets [.., N]."""
        rows, wanted = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (a, c))
        if residual is not None:
            squares = np.square(residual.astype(np.float64)).sum(axis=-1).reshape(-1, 1)
            weights = 1 / np.maximum(squares, 1e-12)
        else:
            weights = np.ones((len(rows), 1))
        scaled = rows * weights
        self.inputs = self.inputs + scaled.T @ rows
        self.crossed = self.crossed + scaled.T @ wanted
        self.targets += float((wanted * wanted * weights).sum())

    @classmethod
    def sum(cls, one: _Moments, other: _Moments) -> _Moments:
        """Those of the rows of both."""
        return cls(one.inputs + other.inputs, one.crossed + other.crossed, one.targets + other.targets)


def _solved(moments: _Moments, ridge: float) -> Array:
    return _ridge(np.asarray(moments.inputs), np.asarray(moments.crossed), ridge)


def _ridge(normal: Array, right: Array, ridge: float) -> Array:
    damped = normal + max(ridge * np.trace(normal) / len(normal), 1e-12) * np.eye(len(normal))
    return np.asarray(np.linalg.solve(damped, right))


def _error(moments: _Moments, weight: Array) -> float:
    """|a W − c|² / |c|² over the rows of some moments."""
    inputs, crossed = np.asarray(moments.inputs), np.asarray(moments.crossed)
    squared = float(((inputs @ weight) * weight).sum()) - 2 * float((crossed * weight).sum()) + moments.targets
    return max(squared, 0.0) / moments.targets if moments.targets else 0.0


def _split(queries: Array, heads: int) -> Array:
    """[B, H, S, D], of that or of [B, S, H·D]."""
    if queries.ndim == 4:
        return queries
    batch, tokens, width = queries.shape
    return queries.reshape(batch, tokens, heads, width // heads).transpose(0, 2, 1, 3)
