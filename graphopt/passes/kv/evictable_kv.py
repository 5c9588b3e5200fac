"""evictable-kv: each layer's cache may have a length of its own, and tells on demand which tokens matter in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.masks import Masks, NoForm
from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.graph.cache_flow import qualified
from graphopt.graph.edits import Editor, captured_values, nodes, sort
from graphopt.graph.importance import Importance, note_importance, read_importance
from graphopt.graph.kv_interface import KVInterface, asks_for_another_axis, kv_interface
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.kv.cache_readers import tell_tokens
from graphopt.passes.kv.cached_layers import CachedLayer, cached_layers
from graphopt.passes.kv.token_importance import ImportanceOutputs

LEFT = "no-left-padding"
_MASK, _LENGTH = 3, 2


class EvictableKV(Pass):
    """Let the key/value cache of each layer have a length of its own, so that tokens can be dropped from it.

        y_l = softmax(s · q_l K_lᵀ + causal) · V_l,   query i sees key j where j ≤ i + P_l

        importance_l[b, h, j] = 1/G · Σ over the G query heads of KV head h, Σ over the last `window` queries i,
                                of softmax_j(s · q_l[i] K_lᵀ + causal)

    with P_l tokens in the cache of layer l. [Eviction](../generation.md#tokens-dropped-from-the-cache) of
    `graphopt.Generator` drops tokens by it; anything else may too, by giving a layer fewer rows of keys and values than
    the layer before. What is kept needs no order: keys are stored rotated.

    Papers: PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient
    Generation; ZigZagkv: Dynamic KV Cache Compression for Long-context Modeling based on Layer Uncertainty; DynamicKV:
    Task-Aware Adaptive KV Cache Compression for Long Context LLMs; ChunkKV: Semantic-Preserving KV Cache Compression
    for Efficient Long-Context LLM Inference.

    1. A causal mask becomes `is_causal`, which the operator aligns at the end of the layer's own cache. A mask over
       padding goes with it: that no row is padded on the left is assumed (`--assume no-left-padding`).
    2. Whoever reads the length of a cache, as to count positions, is told the tokens that there were: the length of the
       attention mask, which goes on counting all tokens, less the new ones.
    3. The lengths of the caches get names of their own in the signature, `past_0`, `past_1`, ...
    4. A boolean input `importance` (false where it isn't fed) asks for the outputs `importance.0`, `importance.1`, ...
       [batch, KV heads, past + new]. Their computation stands in an If, so that a run that doesn't ask pays next to
       nothing. Input, outputs and window are in the model's metadata.

    **Options:** `window` (default 32): queries of a run, the last ones, whose attention counts.

    **Needs:** `Attention` with a cache of its own, as `raise-attention` makes it; positions that are fed, or a mask
    [batch, past + new] to count them in.
    **Guarantees:** EXACT as long as nothing is dropped; what is lost otherwise is in docs/kv.md.

    **Left alone, with the reason:** what needs the places of the keys, and so all of them: windows, ALiBi and other
    biases; a cache that later layers read (share-kv), that isn't joined by `Attention`, or whose length is fixed; all
    layers where positions are counted by the length of a cache and no mask tells it. Such a layer keeps all its tokens.

    `group-query-attention` still takes the layers: it reads each cache's length from its shape, and the rotation stays
    before the operator, which would rotate by places in the cache. Past and present can't share a buffer then, and the
    projections of queries, keys and values stay apart, since those of the queries are read twice.

    **When not to use it:** with quantize-kv, whose operator counts all tokens in the mask. Put it behind the passes
    that change caches, which leave these alone afterwards; where layers go, what is told is numbered anew.
    """

    name: ClassVar[str] = "evictable-kv"
    family: ClassVar[str] = "kv"
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    paper: ClassVar[str] = "DynamicKV: Task-Aware Adaptive KV Cache Compression for Long Context LLMs"

    def __init__(self, window: int = 32) -> None:
        super().__init__()
        if window < 1:
            raise ValueError(f"window must be at least one query, not {window}")
        self.window = window

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        interface = kv_interface(model)
        if interface is None or not interface.pairs or read_importance(model.metadata_props) is not None:
            return False
        facts = infer(model, believe_names=True)
        found, left = cached_layers(model, interface, facts)
        joins = {pair.layer: pair.node for pair in interface.pairs}
        named = {node.name: node for node in nodes(model)}
        for number, (attention, reason) in left.items():
            node = attention or named.get(joins[number])
            if node is not None:
                self.left(node, f"its cache stays whole: {reason}")
        masks, layers = Masks(facts), []
        paddings: dict[ir.Value, None] = {}
        for layer in found.values():
            padding = self._padding(layer, masks, facts)
            if isinstance(padding, str):
                self.left(layer.node, f"its cache stays whole: {padding}")
                continue
            layers.append(layer)
            if padding is not None:
                paddings[padding] = None
        lengths = _length_readers(model.graph, layers)
        counted = _counted(model, interface)
        if lengths and counted is None:
            for layer in layers:
                self.left(layer.node, "its cache stays whole: positions are counted by its length, and no attention "
                                      "mask says how many tokens there were")  # fmt: skip
            return False
        if not layers:
            return False
        for mask in paddings:
            self.rely_on(model, LEFT, {"mask": mask.name or ""}, "each layer counts the tokens of its own cache")
        edit = Editor(model)
        for layer in layers:
            layer.node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
            if len(layer.node.inputs) > _MASK and layer.node.inputs[_MASK] is not None:
                edit.at(layer.node)
                edit.set_input(layer.node, _MASK, None)
        if counted is not None:
            for reader in lengths:
                _tell(reader, *counted, layers, edit)
        self._give_out(model, layers, facts, edit)
        sort(model)
        return True

    def _give_out(self, model: ir.Model, layers: Sequence[CachedLayer], facts: ShapeFacts, edit: Editor) -> None:
        """Name the lengths, and add input and outputs."""
        sizes = _sizes_in_use(model)
        importance = ImportanceOutputs(model, edit, self.window)
        outputs = {}
        for layer in layers:
            past, total = (_unused(f"{what}_{layer.number}", sizes) for what in ("past", "total"))
            pasts = [value for value in layer.node.inputs[4:6] if value is not None]
            for values, name in ((pasts, past), (layer.presents, total)):
                for value in values:
                    value.shape = None if value.shape is None else ir.Shape(
                        [name if axis == _LENGTH else size for axis, size in enumerate(value.shape)]
                    )  # fmt: skip
            output = importance.add(layer, facts)
            outputs[layer.number] = output.name or ""
            self.applied(layer.node, f"its cache may lose tokens, by {output.name!r}")
        note_importance(model, Importance(importance.asked.name or "", self.window, outputs))

    def _padding(self, layer: CachedLayer, masks: Masks, facts: ShapeFacts) -> ir.Value | str | None:
        """The mask input over padding where there is one, or why the cache can't lose tokens."""
        node = layer.node
        readers = {user for value in layer.presents for user, _ in value.uses() if qualified(user) != "Shape"}
        if readers:
            return f"its keys or values are read by {next(iter(readers)).op_type} besides"
        pasts = {user for value in node.inputs[4:6] if value for user, _ in value.uses() if qualified(user) != "Shape"}
        if pasts != {node}:
            return "its past is read by something else besides"
        query, past = facts.shape(node.inputs[0]), facts.shape(node.inputs[4])
        assert query is not None
        assert past is not None
        if past[_LENGTH].value is not None:
            return "its length is fixed"
        tokens = query[1 if layer.joined else 2]
        mask = node.inputs[_MASK]
        causal = bool(attribute_int(node, "is_causal", 0))
        if mask is None:
            return None if causal or tokens == 1 else "every query sees every key"
        if causal:
            return "it has a mask and is_causal; attention-masks makes one of them"
        form = masks.form(mask, tokens, past[_LENGTH] + tokens)
        if isinstance(form, NoForm):
            return f"its mask isn't understood at {form.value.name!r}: {form.reason}"
        further = form.window is not None or form.positions is not None or form.shift != 0 or bool(form.other)
        if form.biased or further or not ((form.causal and form.from_past) or tokens == 1):
            return f"its mask, {form.describe()}, depends on the places of the keys"
        if any(value is not form.padding for value in form.binary):
            return f"its mask is {form.describe()}"
        if form.padding is None:
            return None if not form.assumptions else "sizes of its mask aren't certain"
        if not form.padding.is_graph_input():
            return f"its padding {form.padding.name!r} is no input of the model, so nothing can check it"
        if not self.assumptions.holds(LEFT):
            return f"rows may be padded on the left: --assume {LEFT}"
        return form.padding


# ---- lengths


def _length_readers(graph: ir.Graph, layers: Sequence[CachedLayer]) -> list[ir.Node]:
    """Those who read the length of a cache of `layers`, and are still needed once these have no masks."""
    maskless = {layer.node for layer in layers}
    live: dict[ir.Node, None] = {}
    stack = [value.producer() for value in graph.outputs]
    while stack:
        node = stack.pop()
        if node is None or node in live:
            continue
        live[node] = None
        read = [v for slot, v in enumerate(node.inputs) if v is not None and not (slot == _MASK and node in maskless)]
        stack.extend(value.producer() for value in (*read, *captured_values(node)))
    caches = [v for layer in layers for v in (*layer.node.inputs[4:6], *layer.presents) if v is not None]
    users = dict.fromkeys(user for value in caches for user, _ in value.uses() if qualified(user) == "Shape")
    return [user for user in users if user in live and not asks_for_another_axis(user, _LENGTH)]


def _counted(model: ir.Model, interface: KVInterface) -> tuple[ir.Value, ir.Value] | None:
    """The mask whose length is that of all tokens, past and new, and the new tokens; None where they aren't fed."""
    inputs = {value.name: value for value in model.graph.inputs}
    mask, ids = inputs.get(interface.attention_mask), inputs.get(interface.token_ids)
    fits = all(value is not None and value.shape is not None and len(value.shape) == 2 for value in (mask, ids))
    return (mask, ids) if fits and mask is not None and ids is not None else None


def _tell(reader: ir.Node, mask: ir.Value, ids: ir.Value, layers: Sequence[CachedLayer], edit: Editor) -> None:
    """Let a Shape of a cache give the tokens that there were in place of those that are left."""
    if reader.graph is None:  # dead with a mask
        return
    value = reader.inputs[0]

    def size(axis: int) -> ir.Value:
        return edit.op("Shape", [value], {"start": axis, "end": axis + 1})

    present = any(value is one for layer in layers for one in layer.presents)
    tell_tokens(reader, mask, ids, size, edit, present=present)


def _sizes_in_use(model: ir.Model) -> set[str]:
    """Names of dynamic sizes of the signature."""
    shapes = [value.shape for value in (*model.graph.inputs, *model.graph.outputs) if value.shape is not None]
    return {str(size.value) for shape in shapes for size in shape if not isinstance(size, int)}


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name
