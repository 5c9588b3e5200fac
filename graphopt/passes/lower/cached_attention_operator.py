"""cached-attention: attention with a key/value cache becomes graphopt's operator, which reads the cache once."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.graph.edits import Editor
from graphopt.passes.base import LOWERED
from graphopt.passes.lower.cached_site import shared_cache
from graphopt.passes.raise_.shape_rules import ShapeRulePass
from graphopt.runtime_ops.library import library_path
from graphopt.runtime_ops.operator import DOMAIN, OLDEST_OPSET, add_body, operators

CONTRIB = "com.microsoft"
OPERATOR = "CachedAttention"
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_PLACES = 9
_NAMES = ("position ids", "a bias", "sinks")
_OFF = {"smooth_softmax": (0, -1), "qk_output": (0,), "kv_cache_bit_width": (0,)}
"""Attributes that may stand there, as long as they say nothing."""
_READ = ("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size", "do_rotary", "rotary_interleaved")


class CachedAttention(ShapeRulePass):
    """Write ONNX Runtime's `GroupQueryAttention` over a float cache as graphopt's own `CachedAttention`.

        y[i] = Σⱼ softmaxⱼ(s · R(q[i]) · R(k[j])) · v[j],   j ≤ i, and i − j < window where there is one

    Paper: GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (Ainslie et al., 2023).

    The inputs, the cache and its convention stay: past and present may be one buffer, which is written in place. The
    kernel reads each key and value once for all query heads that share it, and divides a long cache over the threads
    however few its heads are. Besides it takes several new tokens after a past for more than one row.

    The operator's portable body goes into the model, so that it runs on an ONNX Runtime without the library too; there
    the scores of a prompt are spelled out.

    **Needs:** opset 18; float32 or float16; the library with graphopt's kernels, without which nothing is done.
    **Guarantees:** the same function where rows have tokens; what is padded at the end of a row is undefined in both.

    **Left alone, with the reason:** a quantized cache; position ids, a bias of the scores, sinks; normalised queries
    and keys; an output of the scores; what has no past, or that of an earlier layer (`share-kv`).

    **Targets:** cpu.

    **When not to use it:** for runtimes that don't register the library: the body is slower than `GroupQueryAttention`.
    """

    name: ClassVar[str] = "cached-attention"
    family: ClassVar[str] = "lower"
    paper: ClassVar[str] = "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    anchors: ClassVar[tuple[str, ...]] = (f"{CONTRIB}::GroupQueryAttention",)

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Make the empty inputs once for all sites."""
        super().prepare(model, edit)
        self._empty: dict[tuple[ir.DataType, tuple[int, ...]], ir.Value] = {}

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if (why := self._obstacle(node, edit)) is not None:
            return self.left(node, f"not {OPERATOR}: {why}")
        query = node.inputs[0]
        assert query is not None
        dtype = self.dtype(query) or ir.DataType.FLOAT
        given = dict(enumerate(node.inputs))
        nothing, no_table = self._nothing(edit, dtype, (0,)), self._nothing(edit, dtype, (0, 0))
        packed = given.get(1) is None
        turned = attribute_int(node, "do_rotary", 0) != 0
        inputs = [query, *((nothing, nothing) if packed else (given[1], given[2])), *(given[i] for i in range(3, 7))]
        inputs += [given[7], given[8]] if turned else [no_table, no_table]
        attributes = {name: node.attributes[name].value for name in _READ if name in node.attributes}
        attributes.pop("do_rotary", None)
        add_body(edit.model, OPERATOR)
        y = edit.op(OPERATOR, inputs, operators()[OPERATOR].attributes_of(**attributes), domain=DOMAIN, outputs=3)
        made = y.producer()
        assert made is not None
        made.meta[LOWERED] = True
        heads = f"{attributes['num_heads']} heads on {attributes['kv_num_heads']}"
        self.applied(node, f"became {OPERATOR}: {heads}")
        for old, new in zip(node.outputs, made.outputs, strict=False):
            new.type, new.shape = old.type, old.shape
            edit.replace(old, new)
        return True

    def _nothing(self, edit: Editor, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
        value = self._empty.get((dtype, shape))
        if value is None or value.graph is None:
            value = edit.constant(np.zeros(shape, dtype.numpy()), "nothing")
            self._empty[dtype, shape] = value
        return value

    def _obstacle(self, node: ir.Node, edit: Editor) -> str | None:
        """Why a GroupQueryAttention stays; None: it needn't."""
        if library_path() is None:
            return "the library with graphopt's kernels isn't built"
        if edit.opset < OLDEST_OPSET:
            return f"the operator's body needs opset {OLDEST_OPSET}"
        if node.graph is not edit.model.graph:
            return "it stands in a subgraph or function"
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return "an attribute is set by the caller of its function"
        given = dict(enumerate(node.inputs))
        query, past, values = given.get(0), given.get(3), given.get(4)
        if query is None or (dtype := self.dtype(query)) not in _TYPES:
            return "it computes in another type than float32 and float16"
        if past is None or values is None or given.get(5) is None or given.get(6) is None:
            return "it has no past"
        if not past.is_graph_input() and shared_cache(past, values) is not None:
            return "it reads the cache of an earlier layer, and the operator takes none without new keys"
        if (cache := self.dtype(past)) != dtype:
            return f"its cache is of type {'unknown' if cache is None else cache.name}"
        if (given.get(1) is None) != (given.get(2) is None):
            return "it has keys or values alone"
        for place in range(_PLACES, len(node.inputs)):
            if node.inputs[place] is not None:
                named = place - _PLACES
                return f"it has {_NAMES[named] if named < len(_NAMES) else 'scales of its cache, or norms'}"
        return self._attribute_obstacle(node, given)

    def _attribute_obstacle(self, node: ir.Node, given: dict[int, ir.Value | None]) -> str | None:
        if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
            return "its scores are read"
        if attribute_int(node, "do_rotary", 0) and (given.get(7) is None or given.get(8) is None):
            return "it rotates without tables"
        if attribute_int(node, "local_window_size", -1) == 0:
            return "its window is empty"
        heads, kv_heads = attribute_int(node, "num_heads", 0), attribute_int(node, "kv_num_heads", 0)
        if not heads or not kv_heads or heads % kv_heads:
            return "its heads don't come in groups"
        for name, attribute in node.attributes.items():
            if name in _READ or (name in _OFF and attribute.value in _OFF[name]):
                continue
            if name in ("k_quant_type", "v_quant_type") and attribute.value == "NONE":
                continue
            return f"it has {name}"
        return None
