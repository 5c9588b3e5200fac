"""quantize-kv: the key/value cache of a decoder in 8 bits or fewer, quantized as it is written."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.graph.edits import Editor
from graphopt.graph.kv_interface import kv_interface
from graphopt.passes.base import Guarantee
from graphopt.passes.kv.cache_bits import WIDTHS, allocated, as_options, bits_given, by_loss, by_norms, cached_sites
from graphopt.passes.kv.cache_readers import cache_readers, same_rotation, tell_tokens
from graphopt.passes.kv.position_tables import PositionTable, PositionTables
from graphopt.passes.kv.static_cache import GROUP_QUERY, StaticCaches
from graphopt.passes.lower.cached_attention import CachedAttentionPass
from graphopt.passes.lower.cached_site import CachedSite, NotTaken, read, whole_mask
from graphopt.passes.lower.rotary_table import Need, first_input
from graphopt.runtime_ops.operator import DOMAIN, OLDEST_OPSET, add_body, operators
from graphopt.runtime_ops.quantized_kv_attention import CacheLayout, layout_of

OPERATOR = "QuantizedKVAttention"
PARTS = ("codes", "scales", "recent")
Sensitivity = Literal["loss", "norms"]


@dataclasses.dataclass
class _Plan:
    """How one site is written.

    Attributes:
        mask: The attention mask, an input of the model.
        padded: Whether what is in it counts, and not its length alone.
        window: Keys that a query sees at most, 0 for all.
        needs: What is taken for granted.
        table: The rotations by position; None: nothing is rotated inside.
        readers: Nodes that ask for the shape of the old cache.
        ids: An input [B, new tokens, ...] where there are such, else None.
        borrowers: Later sites that read this one's cache, with their plans.
    """

    mask: ir.Value
    padded: bool
    window: int
    needs: list[Need]
    table: PositionTable | None
    readers: list[ir.Node]
    ids: ir.Value | None
    borrowers: list[tuple[CachedSite, _Plan]] = dataclasses.field(default_factory=list)


class QuantizeKV(CachedAttentionPass):
    """Keep the keys and values of a decoder in 8, 4, 3 or 2 bits: `QuantizedKVAttention` in place of `Attention`.

        k ≈ u · d + m,   u = clip(round((k − m) / d), 0, 2ᵇ − 1),   m = min k,   d = (max k − m) / (2ᵇ − 1)

    with d and m for each channel of a key over a block of tokens, and for each token of a value, made when the block is
    full; the newest tokens stay in half precision until then. Nothing is calibrated.

    Papers: KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (Liu et al., 2024); for keys before their
    rotation KVQuant: Towards 10 Million Context Length LLM Inference with KV Cache Quantization (Hooper et al., 2024).

    1. The inputs and outputs of a layer's cache change: `codes`, `scales` and `recent` take the place of `key` and
       `value`, under names made from theirs. How many tokens are in the cache only the attention mask tells: its sums
       are the lengths of the rows. See docs/generation.md.
    2. Keys are stored before their rotation and rotated when they are read (option `rotate_at_read`), since channels
       have steadier ranges then. That takes the rotations of all positions: computed once where `max-length` is
       assumed, else anew in each run. Where position ids needn't count up from the first token,
       `RotaryEmbedding` stays before the operator, and keys are stored rotated.
    3. `operator: contrib` takes ONNX Runtime's own operator in its place: each `GroupQueryAttention` gets a cache of 8
       or 4 bits with one static scale for each channel, calibrated on text (`--calibration`). It needs no library,
       and is the coarser of both.
    4. With a `budget` each layer's keys and values get bits of their own: those of least Σ α / (2ᵇ − 1)² whose mean is
       the budget. α is what an error costs: with `sensitivity: loss` the divergence of the model's outputs where they
       alone are rounded to 3 bits, told by trials in one session; with `norms` the squared norm of the projection,
       without data (More for Keys, Less for Values: Adaptive KV Cache Quantization, Hariri et al., 2025). What was
       chosen is among the options that the report lists, as `sites`.
    5. Layers that read an earlier layer's cache (`share-kv`) get the operator together with that layer: its cache is
       written by the earlier one alone, and they read it (`shared`).

    The portable body of the operator goes into the model, so that it runs on an ONNX Runtime without the library too,
    but slowly: for every token the whole cache is unpacked.

    **Options:** `key_bits` (default 8): bits of a number of a key, 8, 4, 3 or 2; `value_bits` (default 8): of a value;
    `key_per_channel` (default true): scales of keys per channel of a block, else per token as those of values;
    `block_size` (default 32): tokens of a block; `group_size` (default 0): features that share a scale per token, 0 for
    all of a head; `window` (default 32): newest tokens that are never quantized; `rotate_at_read` (default true):
    rule 2; `operator` (default "graphopt"): "contrib": rule 3; `windows` (default 8): windows of text that rule 3 looks
    at; `sites` (default none): `key_bits` and `value_bits` of some layers, by number; `budget` (default none): the mean
    bits of a number in the cache, rule 4; `sensitivity` (default "loss"): rule 4; `samples` (default 1): rule 4.

    **Needs:** opset 23, as `Attention` does; float32 or float16; heads of the same size for keys and values, a multiple
    of 8; an attention mask with its padding at the end (`--assume no-left-padding`); for rule 2 `--assume
    counted-positions`.
    **Guarantees:** LOSSY, see docs/quantize-kv.md for what it costs.

    **Left alone, with the reason:** an attention whose mask isn't causal, or isn't understood; a cache that something
    else reads, or that stands in a subgraph; a model without an attention mask.

    **When not to use it:** for short contexts, where weights and not the cache take the memory.
    """

    name: ClassVar[str] = "quantize-kv"
    family: ClassVar[str] = "kv"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache"
    anchors: ClassVar[tuple[str, ...]] = ("Attention", GROUP_QUERY)
    writes: ClassVar[str] = OPERATOR

    def __init__(
        self,
        key_bits: int = 8,
        value_bits: int = 8,
        key_per_channel: bool = True,
        block_size: int = 32,
        group_size: int = 0,
        window: int = 32,
        rotate_at_read: bool = True,
        operator: str = "graphopt",
        windows: int = 8,
        sites: dict[int, dict[str, int]] | None = None,
        budget: float | None = None,
        sensitivity: Sensitivity = "loss",
        samples: int = 1,
    ) -> None:
        super().__init__()
        if key_bits not in WIDTHS or value_bits not in WIDTHS:
            raise ValueError(f"keys and values have 2, 3, 4 or 8 bits, not {key_bits} and {value_bits}")
        if block_size < 4 or block_size % 4 or group_size < 0 or group_size % 4:
            raise ValueError("block_size and group_size must be multiples of 4")
        if window < 0 or windows < 1:
            raise ValueError("window can't be negative, and windows must be positive")
        if operator not in ("graphopt", "contrib"):
            raise ValueError(f'operator is "graphopt" or "contrib", not {operator!r}')
        if operator == "contrib" and (key_bits != value_bits or key_bits not in (4, 8)):
            raise ValueError("GroupQueryAttention has keys and values of 8 bits or of 4")
        self.key_bits, self.value_bits, self.key_per_channel = key_bits, value_bits, key_per_channel
        self.block_size, self.group_size, self.window = block_size, group_size, window
        self.rotate_at_read, self.windows = rotate_at_read, windows
        self.operator = operator
        self.sites_given = bits_given(sites)
        if operator == "contrib" and (sites is not None or budget is not None):
            raise ValueError("sites and budget are for graphopt's own operator, whose layers may differ")
        if budget is not None and not WIDTHS[0] <= budget <= WIDTHS[-1]:
            raise ValueError(f"budget is the mean number of bits, from 2 to 8, not {budget}")
        if sensitivity not in get_args(Sensitivity) or samples < 1:
            raise ValueError(f'sensitivity is "loss" or "norms", and samples are positive, not {sensitivity!r}')
        self.budget, self.sensitivity, self.samples = budget, sensitivity, samples
        if operator == "contrib" or (budget is not None and sensitivity == "loss"):
            self.needs = ("text",)

    def option_values(self) -> dict[str, Any]:
        """See the base; with the bits of each layer, once a budget has chosen them."""
        values = super().option_values()
        return {**values, "sites": {layer: as_options(bits) for layer, bits in sorted(self.sites_given.items())}}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the base."""
        try:
            return super().call(model)
        finally:
            for name in ("_positions", "_rows", "_none", "_static", "_layers"):
                self.__dict__.pop(name, None)

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """See the base; scales of rule 3 are calibrated first, all in one run."""
        super().prepare(model, edit)
        self._positions = PositionTables(self._tables, edit, self.assumptions)
        self._rows: dict[tuple[ir.Value, bool], ir.Value] = {}
        self._none: ir.Value | None = None
        self._static = None
        interface = kv_interface(model)
        pairs = () if interface is None else interface.pairs
        self._layers = {pair.past: pair.layer for pair in pairs if pair.part == "key"}
        if self.budget is not None and interface is not None:
            if self.sensitivity == "loss":
                assert self.calibration is not None
                found = by_loss(model, interface, self.calibration, self.samples)
            else:
                found = by_norms(cached_sites(model, interface, self._facts))
            if found:
                self.sites_given = allocated(found, self.budget)
        if self.operator == "contrib":
            self._static = StaticCaches(model, edit, self.key_bits, self.calibration, self.windows)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if self._static is None:
            return node.op_type == "Attention" and super().rewrite(node, edit)
        if node.op_type == "Attention":
            cached = len(node.inputs) > 4 and node.inputs[4] is not None
            return cached and self.left(node, "group-query-attention didn't take it")
        reason = self._static.obstacle(node)
        if reason is not None:
            return bool(reason) and self.left(node, f"its cache stays as it is: {reason}")
        self._static.write(node)
        return self.applied(node, f"GroupQueryAttention with a cache of {self.key_bits} bits and static scales")

    def take(self, site: CachedSite, edit: Editor) -> bool:
        """Write the operator in place of a site; see the base."""
        plan = self._plan(site, edit)
        for one, of_one in [(site, plan), *plan.borrowers]:
            self.rely_on_all(of_one.needs, edit.model)
            self.applied(one.node, self._said(site, of_one) + ("" if one is site else ", of an earlier layer's cache"))
        self._write(site, plan, edit)
        return True

    # ---- deciding

    def _plan(self, site: CachedSite, edit: Editor) -> _Plan:
        if site.node.graph is not edit.model.graph:
            raise NotTaken("it stands in a subgraph or function")
        if site.shared is not None:
            raise NotTaken("it reads the cache of an earlier layer, which stays as it is")
        if edit.opset < OLDEST_OPSET:
            raise NotTaken(f"the operator's body needs opset {OLDEST_OPSET}")
        if self.group_size and site.depth % self.group_size:
            raise NotTaken(f"groups of {self.group_size} don't divide its {site.depth} features")
        readers, sharing = cache_readers(site)
        ids = first_input(edit.model, self._facts, site)
        if readers and ids is None:
            raise NotTaken("the length of its cache is read, and no input tells how many tokens are new")
        padding, window, needs = self.mask(site)
        mask = padding if padding is not None else whole_mask(edit.model, site, self._facts)
        if mask is None:
            raise NotTaken(
                "nothing but the cache would tell how many tokens there are: the model has no attention mask"
            )
        table = self._positions.plan(site, mask)
        if table is not None:
            needs += table.needs
        self.require(needs)
        plan = _Plan(mask, padding is not None, window, needs, table, readers, ids)
        return dataclasses.replace(plan, borrowers=[self._borrower(node, site, plan) for node in sharing])

    def _borrower(self, node: ir.Node, donor: CachedSite, plan: _Plan) -> tuple[CachedSite, _Plan]:
        """A site that reads the cache of an earlier one, and how it is written.

        Raises:
            NotTaken: It can't be written with that cache.
        """
        try:
            site = read(node, self._facts)
            if site is None or site.shared != tuple(donor.node.outputs[1:3]) or node.graph is not donor.node.graph:
                raise NotTaken("it reads something else than the whole of that cache")
            padding, window, needs = self.mask(site)
            if padding is not (plan.mask if plan.padded else None):
                raise NotTaken("its mask counts other tokens")
            if plan.table is not None:
                table = self._positions.plan(site, plan.mask)
                if table is None or not same_rotation(site, table, donor, plan.table):
                    raise NotTaken("its queries aren't rotated as the keys of that cache are")
            self.require(needs)
        except NotTaken as reason:
            raise NotTaken(f"a later layer reads its cache ({node.name!r}), and {reason}") from reason
        return site, dataclasses.replace(plan, window=window, needs=needs, readers=[], borrowers=[])

    # ---- writing

    def _write(self, site: CachedSite, plan: _Plan, edit: Editor) -> None:
        edit.at(site.node)
        attributes = self._attributes(site, site, plan)
        tokens = [self.tokens(o, site, edit, rotated=plan.table is None) for o in (site.q, site.k, site.v)]
        pasts = self._inputs(site, layout_of(attributes, site.depth), edit)
        lengths = self._lengths_of(plan.mask, plan.padded, edit)
        tables = self._no_table(edit) if plan.table is None else self._positions.write(plan.table, plan.mask)
        add_body(edit.model, OPERATOR)
        y = edit.op(OPERATOR, [*tokens, *pasts, lengths, *tables], attributes, domain=DOMAIN, outputs=4)
        made = y.producer()
        assert made is not None
        for reader in plan.readers:
            self._answer(reader, site, plan, edit)
        presents = list(made.outputs[1:])
        for borrower, of_borrower in plan.borrowers:
            edit.at(borrower.node)
            query = self.tokens(borrower.q, borrower, edit, rotated=plan.table is None)
            attributes = self._attributes(borrower, site, of_borrower) | {"shared": 1}
            inputs = [query, *tokens[1:], *presents, lengths, *tables]
            # The body has four outputs, and checks of types take no fewer on the node.
            self.replace(borrower, edit.op(OPERATOR, inputs, attributes, domain=DOMAIN, outputs=4), edit)
        edit.at(site.node)
        self._outputs(site, made, edit)
        self.replace(site, y, edit)
        for value in (site.past_key, site.past_value):
            edit.model.graph.inputs.remove(value)

    def _attributes(self, site: CachedSite, donor: CachedSite, plan: _Plan) -> dict[str, Any]:
        """The attributes of the operator in place of `site`, whose cache is that of `donor`."""
        rotation = site.rotation if plan.table is not None else None
        return operators()[OPERATOR].attributes_of(
            num_heads=site.heads,
            kv_num_heads=site.kv_heads,
            scale=1 / math.sqrt(site.depth) if site.scale is None else site.scale,
            softcap=site.softcap,
            local_window_size=plan.window or -1,
            key_bits=self._bits(donor)[0],
            value_bits=self._bits(donor)[1],
            key_per_channel=int(self.key_per_channel),
            block_size=self.block_size,
            group_size=self.group_size,
            window=self.window,
            rotate_at_read=int(self.rotate_at_read and plan.table is not None),
            rotary_interleaved=0 if rotation is None else attribute_int(rotation, "interleaved", 0),
        )

    def _inputs(self, site: CachedSite, layout: CacheLayout, edit: Editor) -> list[ir.Value]:
        """The new caches, among the inputs where the old ones are."""
        graph, rename = edit.model.graph, renamed(site.past_key.name or "")
        batch = site.past_key.shape[0] if site.past_key.shape is not None else None
        made = []
        for part, sizes in zip(PARTS, layout.shapes(1, 0), strict=True):
            blocks = [] if part == "recent" else [ir.SymbolicDim("past_blocks")]
            shape = ir.Shape([batch, *blocks, *sizes[1 + len(blocks) :]])
            dtype = ir.DataType.UINT8 if part == "codes" else ir.DataType.FLOAT16
            made.append(ir.Value(name=edit.names.fresh(rename(part)), type=ir.TensorType(dtype), shape=shape))
        place = min(graph.inputs.index(site.past_key), graph.inputs.index(site.past_value))
        graph.inputs[place:place] = made
        return made

    @staticmethod
    def _outputs(site: CachedSite, made: ir.Node, edit: Editor) -> None:
        """Give out the new caches where the old ones were."""
        graph, (key, value) = edit.model.graph, site.node.outputs[1:3]
        rename = renamed(key.name or "")
        place = min(graph.outputs.index(key), graph.outputs.index(value))
        for part, past, present in zip(PARTS, made.inputs[3:6], made.outputs[1:], strict=True):
            assert past is not None
            assert past.shape is not None
            sizes = list(past.shape)
            if part != "recent":
                sizes[1] = ir.SymbolicDim("present_blocks")
            present.name = edit.names.fresh(rename(part))
            present.type, present.shape = past.type, ir.Shape(sizes)
        graph.outputs.remove(key)
        graph.outputs.remove(value)
        graph.outputs[place:place] = made.outputs[1:]

    def _lengths_of(self, mask: ir.Value, padded: bool, edit: Editor) -> ir.Value:
        """Tokens of each row less 1, int32 [B]."""
        if (mask, padded) not in self._rows:
            one = edit.constant(np.array([1], dtype=np.int32), "one")
            if padded:
                whole = mask.dtype in (ir.DataType.INT64, ir.DataType.INT32)
                ones = mask if whole else edit.op("Cast", [mask], {"to": ir.DataType.INT64.value})
                every = edit.op("ReduceSum", [ones, edit.constant(np.array([1]), "axis")], {"keepdims": 0})
            else:
                every = edit.op("Shape", [mask], {"start": 1, "end": 2})
            last = edit.op("Sub", [edit.op("Cast", [every], {"to": ir.DataType.INT32.value}), one])
            if not padded:
                last = edit.op("Expand", [last, edit.op("Shape", [mask], {"start": 0, "end": 1})])
            self._rows[mask, padded] = last
        return self._rows[mask, padded]

    def _no_table(self, edit: Editor) -> list[ir.Value]:
        if self._none is None:
            self._none = edit.constant(np.zeros((0, 0), dtype=np.float32), "unrotated")
        return [self._none, self._none]

    @staticmethod
    def _answer(reader: ir.Node, site: CachedSite, plan: _Plan, edit: Editor) -> None:
        """Tell a Shape of the old cache what it asked for: there are as many tokens as the mask has before the new."""

        def size(axis: int) -> ir.Value:
            if axis == 0:
                return edit.op("Shape", [plan.mask], {"start": 0, "end": 1})
            return edit.constant(np.array([site.kv_heads if axis == 1 else site.depth]), "size")

        assert plan.ids is not None
        tell_tokens(reader, plan.mask, plan.ids, size, edit)
        edit.at(site.node)

    def _bits(self, site: CachedSite) -> tuple[int, int]:
        """Bits of the keys and of the values of a layer."""
        given = self.sites_given.get(self._layers.get(site.past_key.name or "", -1), {})
        return given.get("key", self.key_bits), given.get("value", self.value_bits)

    def _said(self, site: CachedSite, plan: _Plan) -> str:
        keys, values = self._bits(site)
        parts = [f"{keys} bits" if keys == values else f"keys of {keys} bits, values of {values}"]
        if site.rotation is not None:
            at_read = self.rotate_at_read and plan.table is not None
            parts.append("rotated when read" if at_read else "rotated before" if plan.table is None else "rotated")
        if plan.window:
            parts.append(f"window {plan.window}")
        return f"wrote {OPERATOR}: {', '.join(parts)}"


def renamed(key: str) -> Callable[[str], str]:
    """Names for the parts of a cache, from that of its keys."""
    last = next(reversed(list(re.finditer(r"(?<![a-z])keys?(?![a-z])", key))), None)
    return lambda part: f"{key}.{part}" if last is None else f"{key[: last.start()]}{part}{key[last.end() :]}"
