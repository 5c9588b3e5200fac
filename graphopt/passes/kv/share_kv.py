"""share-kv: layers read the keys and values of an earlier layer, and lose their own with their cache."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.shapes import infer
from graphopt.graph.edits import Editor
from graphopt.graph.kv_edits import remove_pairs
from graphopt.graph.kv_interface import kv_interface
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.kv.cached_layers import CachedLayer, Sharing, cached_layers


class ShareKV(Pass):
    """doc"""

    name: ClassVar[str] = "share-kv"
    family: ClassVar[str] = "kv"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "KVSharer: Efficient Inference via Layer-Wise Dissimilar KV Cache Sharing"

    def __init__(self, pairs: list[list[int]] | None = None) -> None:
        super().__init__()
        self.pairs = [[int(number) for number in pair] for pair in pairs or []]

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        interface = kv_interface(model)
        if interface is None:
            return False
        facts = infer(model, believe_names=True)
        layers, left = cached_layers(model, interface, facts)
        donors = {a: b for a, b in self.pairs}
        sharing = Sharing(Editor(model), facts)
        for number in sorted(donors):
            root = number
            while root in donors:
                root = donors[root]
            layer, donor = layers[number], layers[root]
            self.applied(layer.node, f"reads {root}")
            sharing.share(layer, donor)
        remove_pairs(model, interface, [pair for n in donors for pair in layers[n].pairs])
        return True
