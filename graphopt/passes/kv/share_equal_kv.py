"""share-equal-kv: caches that hold the same numbers are kept once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.graph.edits import Editor, sort
from graphopt.graph.equal_caches import note_equal
from graphopt.graph.importance import read_importance
from graphopt.graph.kept_layers import note_kept
from graphopt.graph.kv_interface import CachePair, KVInterface, kv_interface
from graphopt.graph.kv_names import rename_in_assumptions
from graphopt.passes.base import Pass
from graphopt.passes.kv.cached_layers import CachedLayer, Sharing, cached_layers, new_rows
from graphopt.passes.kv.equal_values import ValueNumbers


class ShareEqualKV(Pass):
    """Keep caches once that hold the same numbers in several layers: of keys, of values, or of both.

        V_l = V_1 for all l,   V_l' = λ₁ V_l + λ₂ V_1

    In SVFormer (the left formula) all layers use the values of the first one, and a runtime that keeps a cache for each
    layer holds them as often as there are layers. ResFormer (the right one) may be written so that each layer caches
    its own values and those of the first besides. So may decoders whose layers share keys and values (cross-layer
    attention).

    Paper: Value Residual Learning For Alleviating Attention Concentration In Transformers (Zhou et al., 2024).

    1. Equality is proved by induction over the runs of the model. All caches of one size are taken for equal at first,
       as they are while they are empty; where their presents aren't the same value of the graph then (same operators,
       attributes and inputs, weights of equal bytes), they are told apart, again and again until nothing changes. No
       name of an input, and no architecture, counts.
    2. Of caches that are equal the earliest stays. Inputs and outputs of the others go, and what read them reads it. An
       attention with keys of its own and the values of an earlier one puts new keys behind its past by a Concat, and
       reads the values where they lie: the copies of them that each layer made at each step go too.
    3. Names of inputs and outputs that stay are as they were. The metadata notes which others they stand for, so that
       `graphopt verify` compares the result with its original, fed with caches that are equal.

    **Needs:** a cache that is empty before the first run, and from then on nothing but what the model gave out: where
    somebody else fills or changes it, caches needn't be equal.
    **Guarantees:** EXACT, as a decoder of fewer caches: the result is what the original gives on equal caches. Programs
    that name the inputs one by one have to name fewer.

    **Left alone, with the reason:** caches that lose tokens layer by layer (`evictable-kv`). Operators of other domains
    are equal to nothing: `raise-contrib-attention` makes standard ones of them.

    **When not to use it:** for runtimes that expect keys and values of every layer, such as onnxruntime-genai, where
    values alone are shared. `group-query-attention` leaves layers alone that read another's values beside keys of their
    own, so that past and present can't be one buffer. It isn't slower for that: 8 layers of width 576 took 7.9 and 11.3
    ms a token after 256 and 1024, with all caches in one buffer 8.3 and 11.9 ms (CPU time, one thread).
    """

    name: ClassVar[str] = "share-equal-kv"
    family: ClassVar[str] = "kv"
    paper: ClassVar[str] = "Value Residual Learning For Alleviating Attention Concentration In Transformers"

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        interface = kv_interface(model)
        if interface is None:
            return False
        facts = infer(model, believe_names=True)
        equal = _equal(model, interface, facts)
        if not equal:
            return False
        if read_importance(model.metadata_props) is not None:
            for pair in equal:
                if (node := _output(model, pair).producer()) is not None:
                    self.left(node, "its cache stays: tokens may be dropped from it (evictable-kv)")
            return False
        return self._merge(model, interface, equal, facts)

    def _merge(
        self, model: ir.Model, interface: KVInterface, equal: dict[CachePair, CachePair], facts: ShapeFacts
    ) -> bool:
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        edit = Editor(model)
        layers, _ = cached_layers(model, interface, facts)
        sharing = Sharing(edit, facts)
        for layer in layers.values():
            donors = [equal.get(pair) for pair in layer.pairs]
            if any(donors):
                presents = [None if donor is None else _output(model, donor) for donor in donors]
                self.applied(layer.node, f"layer {layer.number} reads {_said(donors)}")
                _read_elsewhere(layer, presents, sharing, edit)
        told = {pair for layer in layers.values() for pair in layer.pairs}
        names: dict[str, str] = {}
        for pair, donor in equal.items():
            past, present = inputs[pair.past], _output(model, pair)
            producer = present.producer()
            if pair not in told and producer is not None:
                self.applied(producer, f"{pair.past!r} is always {donor.past!r}, which is read instead")
            past.replace_all_uses_with(inputs[donor.past])
            graph.inputs.remove(past)
            graph.outputs.remove(present)
            present.replace_all_uses_with(_output(model, donor))
            if producer is not None:
                edit.remove_dead(producer)
            present.name = edit.names.fresh(f"{present.name}/equal")
            names |= {pair.past: donor.past, str(pair.present): str(donor.present)}
        rename_in_assumptions(model, names)
        note_equal(model, names)
        note_kept(model, (p.layer for p in interface.pairs), (p.layer for p in interface.pairs if p not in equal))
        sort(model)
        return True


def _equal(model: ir.Model, interface: KVInterface, facts: ShapeFacts) -> dict[CachePair, CachePair]:
    """Caches that hold what an earlier one does, with that one."""
    values = {value.name: value for value in (*model.graph.inputs, *model.graph.outputs)}
    pairs = [pair for pair in interface.pairs if pair.present is not None and not pair.cross]
    classes: dict[CachePair, Hashable] = {pair: _form(pair) for pair in pairs}
    numbers = ValueNumbers(model, facts)
    while True:
        found = numbers.of({values[pair.past]: classes[pair] for pair in pairs})
        # A present that isn't computed in the main graph has no number.
        apart = {pair: (classes[pair], found.get(values[pair.present], pair.past)) for pair in pairs}
        if len(set(apart.values())) == len(set(classes.values())):
            break
        classes = dict(apart)
    order = {value: place for place, value in enumerate(out for node in model.graph for out in node.outputs)}
    alike: dict[Hashable, list[CachePair]] = defaultdict(list)
    for pair in sorted(pairs, key=lambda pair: order.get(values[pair.present], -1)):
        alike[apart[pair]].append(pair)
    return {pair: group[0] for group in alike.values() for pair in group[1:]}


def _output(model: ir.Model, pair: CachePair) -> ir.Value:
    """The present of a pair."""
    return next(value for value in model.graph.outputs if value.name == pair.present)


def _form(pair: CachePair) -> Hashable:
    """What caches must have in common to be equal while they are empty."""
    sizes = tuple(size if isinstance(size, int) else None for size in pair.shape)
    return (pair.part, pair.dtype, pair.layout, pair.axis, sizes)


def _read_elsewhere(layer: CachedLayer, presents: list[ir.Value | None], sharing: Sharing, edit: Editor) -> None:
    """Let an attention read keys, values or both of past and new tokens from earlier ones."""
    node = layer.node
    edit.at(node)
    read = []
    for slot, given in enumerate(presents, 1):
        if given is not None:
            read.append(given)
            continue
        past, own = node.inputs[slot + 3], node.outputs[slot]
        joined = edit.op("Concat", [past, new_rows(layer, slot, edit)], {"axis": 2}, like=own)
        edit.replace(own, joined)
        read.append(joined)
    edit.replace(node.outputs[0], sharing.write(layer, read[0], read[1]))


def _said(donors: list[CachePair | None]) -> str:
    keys, values = donors
    if keys is not None and values is not None and keys.layer == values.layer:
        return f"keys and values of layer {keys.layer}"
    told = [f"the {name} of layer {one.layer}" for name, one in (("keys", keys), ("values", values)) if one is not None]
    return " and ".join(told)
