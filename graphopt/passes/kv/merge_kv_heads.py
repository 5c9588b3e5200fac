"""merge-kv-heads: groups of key and value heads become one head each, for which all their queries ask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor
from graphopt.graph.kv_interface import asks_for_another_axis
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.fold.layers import Layer
from graphopt.passes.kv.cached_layers import CachedLayer, Caches
from graphopt.passes.kv.sharing_heal import Healing, Place, Presents, place_of
from graphopt.passes.lower.cached_site import Operand, projection

Array = npt.NDArray[Any]
Groups = Literal["contiguous", "similar"]


class MergeKVHeads(Pass):
    """Make one head of keys and values of several: multi-head attention becomes grouped-query attention.

        W_k'[:, g] = mean over i ∈ g of W_k[:, i],   W_v'[:, g] = mean over i ∈ g of W_v[:, i]

    for each group g of heads; all queries of the group's heads ask its one head then. The cache has as many heads as
    there are groups, and shrinks with them. A rotation commutes with the mean, since the heads of one token are turned
    alike.

    Paper: GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (Ainslie et al., 2023),
    which trains on afterwards; here queries and outputs are refitted instead.

    1. `groups: contiguous`: neighbours are merged. `groups: similar`: heads whose weights are most alike (by the cosine
       of keys' and values' weights together), the heads of queries and the rows of the output projection put in the
       order of the groups, which changes nothing.
    2. Healing (option `heal`): W_q is refitted to ask of the merged keys what it asked of its own, and W_o to give what
       it gave, as in `share-kv`.

    **Options:** `heads` (default 1): heads of keys and values that are left, a divisor of those that there are;
    `groups` (default "similar"): rule 1; `heal` (default false): rule 2; `samples` (default 8): of the data, for it;
    `keep` (default none): layers that stay as they are, counted from 0 among those with a cache.

    **Needs:** `Attention` with a cache; queries, keys and values each from a product with a weight of its own, with
    nothing but a bias and a rotation between; data for healing.
    **Guarantees:** LOSSY; exact where the heads of a group are equal. Names of inputs and outputs stay.

    **Left alone, with the reason:** packed projections, norms of keys, a number of heads that `heads` doesn't divide.

    **When not to use it:** on few, different heads: look at docs/kv.md for what it costs.
    """

    name: ClassVar[str] = "merge-kv-heads"
    family: ClassVar[str] = "kv"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"

    def __init__(
        self,
        heads: int = 1,
        groups: Groups = "similar",
        heal: bool = False,
        samples: int = 8,
        keep: list[int] | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or samples < 2:
            raise ValueError(f"heads must be positive and samples at least 2, not {heads} and {samples}")
        if groups not in get_args(Groups):
            raise ValueError(f'groups is "contiguous" or "similar", not {groups!r}')
        self.heads, self.groups, self.heal, self.samples, self.keep = heads, groups, heal, samples, list(keep or ())
        if heal:
            self.needs = ("text",)

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        caches = Caches.of(self, model, "heads")
        if caches is None:
            return False
        layers, facts, edit = caches.layers, caches.facts, Editor(model)
        healing = None
        if self.heal and self.calibration is not None:
            feeds = list(self.calibration.feeds(model, self.samples))
            healing = Healing(feeds, self.calibration.threads)
            healing.remember(model, list(layers.values()), facts)
        changed = False
        for number, layer in sorted(layers.items()):
            if number not in self.keep and layer.kv_heads > self.heads:
                changed |= self._merged(model, layer, facts, edit, healing)
        return changed

    def _merged(
        self, model: ir.Model, layer: CachedLayer, facts: ShapeFacts, edit: Editor, healing: Healing | None
    ) -> bool:
        place = place_of(layer, facts)
        if isinstance(place, str):
            return self.left(layer.node, f"its heads stay: {place}")
        parts = [projection(operand) for operand in (place.site.q, place.site.k, place.site.v)]
        q, k, v = parts
        if q is None or k is None or v is None or len({part.node for part in (q, k, v)}) < 3:
            return self.left(layer.node, "its heads stay: queries, keys or values aren't products with weights")
        if layer.kv_heads % self.heads:
            return self.left(layer.node, f"its heads stay: {self.heads} doesn't divide {layer.kv_heads}")
        users = [user for value in layer.node.inputs[4:6] if value is not None for user, _ in value.uses()]
        if not all(user is layer.node or asks_for_another_axis(user, 1) for user in users):
            return self.left(layer.node, "its heads stay: the number of them in its cache is read")
        order = self._order(k, v, layer)
        self._permute(place, (q, k, v), layer, order, edit)
        told = f"{layer.kv_heads} heads of keys and values became {self.heads}"
        if healing is not None:
            place = place_of(layer, facts)
            refit = healing.refit(model, layer, _means(layer, self.heads), facts)
            told += f"; {refit if isinstance(refit, str) else refit.put(layer, facts, edit)}"
        self._merge(layer, place_of(layer, facts), edit)
        return self.applied(layer.node, told)

    def _order(self, k: Layer, v: Layer, layer: CachedLayer) -> list[int]:
        """The heads of keys and values in the order of their groups."""
        heads, size = layer.kv_heads, layer.kv_heads // self.heads
        if self.groups == "contiguous" or size == heads:
            return list(range(heads))
        rows = np.concatenate([_by_head(part.weight.numpy(), heads).reshape(heads, -1) for part in (k, v)], axis=1)
        lengths = np.linalg.norm(rows.astype(np.float64), axis=1)
        alike = (rows @ rows.T) / np.maximum(lengths[:, None] * lengths[None], 1e-30)
        order: list[int] = []
        while len(order) < heads:
            free = [head for head in range(heads) if head not in order]
            first = free[0]
            nearest = sorted(free[1:], key=lambda head: (-alike[first, head], head))
            order += [first, *nearest[: size - 1]]
        return order

    @staticmethod
    def _permute(
        place: Place, products: tuple[Layer, Layer, Layer], layer: CachedLayer, order: Sequence[int], edit: Editor
    ) -> None:
        """Put heads in an order, in all projections of a layer; the cache is in that order from now on."""
        if list(order) == list(range(layer.kv_heads)):
            return
        group = layer.heads // layer.kv_heads
        asked = [head * group + i for head in order for i in range(group)]
        places = ((layer.heads, asked), (layer.kv_heads, order), (layer.kv_heads, order))
        for product, (heads, those) in zip(products, places, strict=True):

            def moved(array: Array, heads: int = heads, those: Sequence[int] = those) -> Array:
                return np.take(array.reshape(*array.shape[:-1], heads, -1), those, axis=-2).reshape(array.shape)

            _put(product.node, 1, moved(product.weight.numpy()), edit)
            _map_bias(product, moved, edit)
        out = place.output.weight.numpy()
        rows = np.take(out.reshape(layer.heads, -1, out.shape[1]), asked, axis=0)
        _put(place.output.node, 1, rows.reshape(out.shape), edit)

    def _merge(self, layer: CachedLayer, place: Place | str, edit: Editor) -> None:
        """Write the mean of each group of neighbours in place of its heads."""
        assert not isinstance(place, str)
        heads = self.heads

        def merged(array: Array) -> Array:
            rows = array.reshape(*array.shape[:-1], heads, layer.kv_heads // heads, -1)
            mean = rows.astype(np.float64).mean(axis=-2).astype(array.dtype)
            return np.asarray(mean.reshape(*array.shape[:-1], -1))

        for slot, operand in ((1, place.site.k), (2, place.site.v)):
            product = projection(operand)
            assert product is not None
            _put(product.node, 1, merged(product.weight.numpy()), edit)
            _map_bias(product, merged, edit)
            width = heads * _depth(layer, slot)
            for value in (product.node.outputs[0], product.output):
                value.shape = None if value.shape is None else ir.Shape([*value.shape[:-1], width])
            self._rebuild(layer, operand, slot, product.output, edit)
        for cache in (*layer.node.inputs[4:6], *layer.node.outputs[1:3]):
            if cache is not None and cache.shape is not None:
                cache.shape = ir.Shape([cache.shape[0], heads, *cache.shape[2:]])
        if layer.joined:
            layer.node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", heads)

    def _rebuild(self, layer: CachedLayer, operand: Operand, slot: int, tokens: ir.Value, edit: Editor) -> None:
        """Let the attention read merged heads, split off and turned as they were."""
        node = layer.node
        edit.at(node)
        value: ir.Value | None = tokens
        if not layer.joined:
            sizes = edit.constant(np.array([0, 0, self.heads, -1]), "heads")
            value = edit.op("Transpose", [edit.op("Reshape", [value, sizes])], {"perm": [0, 2, 1, 3]})
        if operand.rotation is not None:
            attributes = {name: attribute.value for name, attribute in operand.rotation.attributes.items()}
            if layer.joined:
                attributes["num_heads"] = self.heads
            value = edit.op("RotaryEmbedding", [value, *operand.rotation.inputs[1:]], attributes)
        if layer.joined and operand.rotation is None:
            return
        edit.set_input(node, slot, value)


def _means(layer: CachedLayer, heads: int) -> Presents:
    """Keys and values of a layer with heads merged, in a copy of the model."""

    def made(edit: Editor, at: dict[str | None, ir.Value]) -> tuple[ir.Value, ir.Value]:
        found = []
        for present in layer.presents:
            sizes = edit.constant(np.array([0, heads, layer.kv_heads // heads, -1, layer.depth]), "groups")
            if present is layer.presents[1]:
                sizes = edit.constant(np.array([0, heads, layer.kv_heads // heads, -1, _depth(layer, 2)]), "groups")
            split = edit.op("Reshape", [at[present.name], sizes])
            axis = edit.constant(np.array([2]), "axis")
            found.append(edit.op("ReduceMean", [split, axis], {"keepdims": 0}))
        return found[0], found[1]

    return made


def _depth(layer: CachedLayer, slot: int) -> int:
    """Elements of a head of the keys (slot 1) or values (slot 2)."""
    past = layer.node.inputs[slot + 3]
    size = None if past is None or past.shape is None else past.shape[3]
    return size if isinstance(size, int) else layer.depth


def _by_head(weight: Array, heads: int) -> Array:
    """[heads, K, D] of [K, heads · D]."""
    return weight.reshape(len(weight), heads, -1).transpose(1, 0, 2)


def _put(node: ir.Node, slot: int, array: Array, edit: Editor) -> None:
    """Give a node another constant, under the old one's name where nothing else reads that."""
    value = node.inputs[slot]
    tensor = ir.tensor(np.ascontiguousarray(array))
    if value is not None and value.is_initializer() and len(value.uses()) == 1:
        tensor.name = value.name
        value.const_value, value.shape = tensor, ir.Shape(tensor.shape.numpy())
    else:
        edit.at(node)
        edit.set_input(node, slot, edit.constant(tensor, "merged"))


def _map_bias(product: Layer, change: Callable[[Array], Array], edit: Editor) -> None:
    """Change the bias of a product, where it has one."""
    bias = product.bias()
    assert not isinstance(bias, str)
    if product.add is not None:
        slot = next(i for i, v in enumerate(product.add.inputs) if v is not None and v is not product.node.outputs[0])
        full = np.broadcast_to(bias, (product.outputs,)).astype(product.weight.dtype.numpy())
        _put(product.add, slot, change(full), edit)
