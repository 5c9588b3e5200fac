"""group-query-attention: attention with a key/value cache becomes one operator, rotation and projections packed in."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.graph.computed import concatenated
from graphopt.graph.edits import Editor
from graphopt.passes.base import LOWERED
from graphopt.passes.fold.layers import Layer
from graphopt.passes.lower.cached_attention import CachedAttentionPass
from graphopt.passes.lower.cached_site import CachedSite, NotTaken, projection
from graphopt.passes.lower.rotary_table import Need, Table, first_input

CONTRIB = "com.microsoft"
CHUNKS = "no-batched-chunks"


@dataclasses.dataclass
class _Plan:
    """How one site is written.

    Attributes:
        mask: The padding mask that says how many tokens there are; None: the cache and the new tokens do.
        window: Keys that a query sees at most, 0 for all.
        needs: What is taken for granted.
        table: The rows that the operator rotates by itself; None: it doesn't.
        packed: The projections that become one product; empty: they stay.
    """

    mask: ir.Value | None
    window: int
    needs: list[Need]
    table: Table | None
    packed: list[Layer]


class GroupQueryAttention(CachedAttentionPass):
    """Write attention over a key/value cache as ONNX Runtime's `GroupQueryAttention`.

        y[i] = Σⱼ softmaxⱼ(s · R(q[i]) · R(k[j])) · v[j],   j ≤ i + past, and i + past − j < window where there is one

    Paper: GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints (Ainslie et al., 2023).

    Queries, keys and values are read as the projections write them, [batch, tokens, heads · depth], and the result is
    written so: the Reshape and Transpose around the heads go. New keys and values are put behind the cache by the
    operator; with one buffer for past and present (IoBinding) it doesn't copy what is there already.

    1. The mask has to be causal, with a window or without (the operator counts a window of w keys, the query's own
       included). Padding from a mask [batch, tokens] has to be on the right, at the end of each row: a causal query
       never sees it, so the mask isn't read at all, but for its length, which is that of past and new tokens. That no
       row is padded on the left can't be proved from a graph: it is assumed (`--assume no-left-padding`).
    2. The operator refuses a batch with several new tokens after a past. Where the graph doesn't rule that out, it is
       assumed (`--assume batch=1` or `no-batched-chunks`).
    3. `RotaryEmbedding` on queries and keys is done inside (option `rotary`), by a table of [past + new tokens, R/2] of
       which the graph fills the rows of the new tokens from its own cosines and sines: one table for all layers, and
       any scaling of frequencies is in it already. Inside, all rows of a batch have the same positions. That is so
       where the cosines don't depend on the batch, where the batch is 1, or by assumption (`--assume
       counted-positions`). Elsewhere the rotation stays an operator before it, in the layout of the projections. With
       `max-length=N` assumed too, the table has N rows, the same in every run: up to 16 KB are stored, larger ones
       computed by nodes that read constants alone, which a session with its usual optimizations does once, when it is
       loaded (8192 rows of 64 features would be 2 MB of the file).
    4. Three projections of one value whose weights nothing else reads become one product (option `packed`), biases too.
       The operator reads the packed result without a Split.

    5. Keys and values that are the present ones of an earlier attention (`share-kv`) are read where they lie: the
       operator gets them as its past, and no new ones. It gives out no present then, so nothing is copied.

    Measured on ONNX Runtime 1.31 (CPU, 9 heads on 3, depth 64, time of one site with rotation to the spelled-out form;
    in brackets `Attention` of ai.onnx): one token after 256 0.65 (0.54) and 0.48 (0.46) with 1 and 2 threads, with a
    shared buffer 0.46 and 0.39; after 2048 0.51 (0.39) and 0.44 (0.27), with a shared buffer 0.30 and 0.20; 512 new
    tokens 0.89 (0.90) and 0.85 (0.91).

    **Options:** `rotary` (default true): rule 3; `packed` (default true): rule 4.

    **Needs:** opset 23, as `Attention` does; float32 or float16; a depth that is a multiple of 8, the same for keys and
    values; for rule 3 an even quarter, R a multiple of 16, of the depth that is rotated.
    **Guarantees:** the same function, on the inputs that are assumed; each assumption that was relied on is in the
    model's metadata, and `graphopt.session` checks it. Names, shapes and order of inputs and outputs stay.

    **Left alone, with the reason:** a mask that isn't causal, or that isn't understood; a bias (ALiBi, T5), for
    which `Attention` is as fast; padding and batches on which nothing is assumed; scores or float64 that the operator
    hasn't. `Attention` without a cache is no site.

    **Targets:** cpu.

    **When not to use it:** for a decoder that is run without a shared buffer on long contexts: `Attention` copies less.
    """

    name: ClassVar[str] = "group-query-attention"
    family: ClassVar[str] = "lower"
    paper: ClassVar[str] = "GQA: Training Generalized Multi-Query Transformer Models from Multi-Head Checkpoints"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    writes: ClassVar[str] = "GroupQueryAttention"

    def __init__(self, rotary: bool = True, packed: bool = True) -> None:
        super().__init__()
        self.rotary, self.packed = rotary, packed

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """See the base."""
        super().prepare(model, edit)
        self._empty: dict[tuple[object, ...], ir.Value] = {}

    def take(self, site: CachedSite, edit: Editor) -> bool:
        """See the class."""
        plan = self._plan(site, edit.model)
        self.rely_on_all(plan.needs, edit.model)
        self.applied(site.node, self._said(site, plan))
        self._write(site, plan, edit)
        return True

    # ---- deciding

    def _plan(self, site: CachedSite, model: ir.Model) -> _Plan:
        mask, window, needs = self.mask(site)
        if site.batch != 1 and site.tokens != 1:
            needs.append(self._chunks(site, mask, model))
        table = None
        if self.rotary and site.rotation is not None:
            found = self._tables.plan(site, mask)
            if found is not None:
                table = found
                needs += found.needs
        self.require(needs)
        return _Plan(mask, window, needs, table, self._packed(site, table))

    def _chunks(self, site: CachedSite, mask: ir.Value | None, model: ir.Model) -> Need:
        problem = "a batch with several tokens after a past isn't ruled out"
        given = {"ids": first_input(model, self._facts, site), "past": self._lengths.past(site), "mask": mask}
        roles = {role: value.name or "" for role, value in given.items() if value is not None}
        if "ids" not in roles or len(roles) < 2:
            raise NotTaken(f"{problem}, and no inputs of the model show whether it comes")
        return Need(CHUNKS, roles, "GroupQueryAttention takes chunks after a past row by row", problem, "batch=1")

    def _packed(self, site: CachedSite, table: Table | None) -> list[Layer]:
        if not self.packed or site.shared is not None or (site.rotation is not None and table is None):
            return []
        found = [projection(operand) for operand in (site.q, site.k, site.v)]
        layers = [layer for layer in found if layer is not None]
        first = layers[0] if layers else None
        if first is None or len(layers) < 3:
            return []
        alike = all(
            layer.node.inputs[0] is first.node.inputs[0]
            and layer.weight.dtype == first.weight.dtype
            and layer.inputs == first.inputs
            for layer in layers
        )
        return layers if alike and len({layer.node for layer in layers}) == 3 else []

    # ---- writing

    def _write(self, site: CachedSite, plan: _Plan, edit: Editor) -> None:
        edit.at(site.node)
        lengths = self._lengths.of(site, plan.mask)
        inputs: list[ir.Value | None]
        if plan.packed:
            inputs = [self._pack(plan.packed, edit), None, None]
        elif site.shared is not None:
            nothing = self._nothing(site, edit)
            inputs = [self.tokens(site.q, site, edit, rotated=plan.table is None), nothing, nothing]
        else:
            inputs = _unsplit(
                [self.tokens(o, site, edit, rotated=plan.table is None) for o in (site.q, site.k, site.v)]
            )
        inputs += [*(site.shared or (site.past_key, site.past_value)), lengths.last, lengths.total]
        rotation = site.rotation if plan.table is not None else None
        if plan.table is not None:
            inputs += self._tables.write(plan.table, site, plan.mask)
        attributes = {
            "num_heads": site.heads,
            "kv_num_heads": site.kv_heads,
            "scale": site.scale,
            "softcap": site.softcap or None,
            "local_window_size": plan.window or None,
            "do_rotary": 1 if rotation is not None else None,
            "rotary_interleaved": (attribute_int(rotation, "interleaved", 0) or None) if rotation is not None else None,
        }
        # With new keys and values the operator gives wrong numbers unless all its outputs are asked for.
        outputs = 1 if site.shared is not None else 3
        y = edit.op("GroupQueryAttention", inputs, attributes, domain=CONTRIB, outputs=outputs)
        edit.model.graph.opset_imports.setdefault(CONTRIB, 1)
        made = y.producer()
        assert made is not None
        made.meta[LOWERED] = True
        self.replace(site, y, edit)
        for old, new in zip(site.node.outputs[1:3], made.outputs[1:3], strict=False):
            new.type, new.shape = old.type, old.shape
            edit.replace(old, new)

    def _nothing(self, site: CachedSite, edit: Editor) -> ir.Value:
        """No new keys or values, [batch, 0, heads · depth], made once for all layers."""
        width, dtype = site.kv_heads * site.depth, self._facts.dtype(site.q.value) or ir.DataType.FLOAT
        key = (site.node.graph, site.batch, width, dtype)
        if key not in self._empty:
            rows = edit.op("Shape", [site.past_key], {"start": 0, "end": 1})
            sizes = edit.op("Concat", [rows, edit.constant(np.array([0, width]), "nothing")], {"axis": 0})
            zero = ir.tensor(np.zeros(1, dtype.numpy()))
            self._empty[key] = edit.op("ConstantOfShape", [sizes], {"value": zero})
        return self._empty[key]

    def _pack(self, layers: list[Layer], edit: Editor) -> ir.Value:
        weight = edit.constant(concatenated([layer.weight for layer in layers], 1), "packed")
        product = edit.op("MatMul", [layers[0].node.inputs[0], weight])
        if all(layer.add is None for layer in layers):
            return product
        parts = [np.broadcast_to(layer.bias(), (layer.outputs,)) for layer in layers]
        bias = np.concatenate(parts).astype(layers[0].weight.dtype.numpy())
        return edit.op("Add", [product, edit.constant(bias, "bias")])

    def _said(self, site: CachedSite, plan: _Plan) -> str:
        parts = [f"{site.heads} heads on {site.kv_heads}"]
        if site.rotation is not None:
            parts.append("rotated inside" if plan.table is not None else "rotated before")
        if plan.packed:
            parts.append("projections packed")
        if site.shared is not None:
            parts.append("on the cache of an earlier layer")
        if plan.window:
            parts.append(f"window {plan.window}")
        return f"wrote GroupQueryAttention: {', '.join(parts)}"


def _unsplit(parts: list[ir.Value]) -> list[ir.Value | None]:
    """Queries, keys and values as the one product that they were split from, where they were."""
    split = parts[0].producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != parts:
        return list(parts)
    source, last = split.inputs[0], -1 if parts[0].shape is None else len(parts[0].shape) - 1
    if source is None or attribute_int(split, "axis", 0) not in (-1, last):
        return list(parts)
    return [source, None, None]
