"""skip-rms-norm: a residual addition and the RMSNormalization behind it become one operator."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, producer
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor
from graphopt.passes.base import LOWERED
from graphopt.passes.lower.group_query_attention import CONTRIB
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class SkipRmsNorm(ShapeRulePass):
    """Write a residual addition and the root mean square normalization behind it as ONNX Runtime's
    `SkipSimplifiedLayerNormalization`, which gives the sum too.

        s = x + r,   y = s / √(mean(s²) + ε) · g

    Paper: Root Mean Square Layer Normalization (Zhang, Sennrich, 2019).

    Measured on ONNX Runtime 1.31 (CPU, median ratio of the time to the two operators, 576 channels, 1 and 2 threads):
    one row 1.04 and 1.03, 16 rows 1.40 and 1.41, 128 rows 1.45 and 1.35, 512 rows 1.05 and 1.23; of 2048 channels 1.25
    at one row. It never wins, so by default the target profile decides (`residual-rms-norm`), and without one nothing
    is done. In a decoder it is a hundredth of a per cent to half a per cent of the time, for two nodes a layer less.

    **Options:** `always` (default false): at every site, whatever the profile says; `decoders` (default false): at
    every site of a model with a `GroupQueryAttention`, which is one lowered for generation: there the cost is below
    what can be measured of the whole, and two nodes a layer less are a smaller graph to load and to look at.

    **Needs:** `RMSNormalization` over the last axis with a scale of one number a channel; both operands of the addition
    of the same shape, [rows, channels] or [batch, tokens, channels]; float32 or float16.
    **Guarantees:** the same function; where the sum is read elsewhere, it is the operator's fourth output.

    **Left alone, with the reason:** operands of which one is broadcast, or whose shapes aren't certain; float64 and
    bfloat16; with `always` or `decoders` only. A sum with a constant is a bias, and no site.

    **Targets:** cpu.

    **When not to use it:** for speed on the CPU.
    """

    name: ClassVar[str] = "skip-rms-norm"
    family: ClassVar[str] = "lower"
    paper: ClassVar[str] = "Root Mean Square Layer Normalization"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    anchors: ClassVar[tuple[str, ...]] = ("RMSNormalization",)

    def __init__(self, always: bool = False, decoders: bool = False) -> None:
        super().__init__()
        self.always, self.decoders = always, decoders

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """See whether the model is a decoder lowered for generation."""
        super().prepare(model, edit)
        self._everywhere = self.always or (
            self.decoders and any(node.op_type in ("GroupQueryAttention", "CachedAttention") for node in model.graph)
        )

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        summed, scale = node.inputs[0], node.inputs[1]
        addition = producer(summed, "Add")
        if summed is None or scale is None or addition is None or any(is_constant(v) for v in addition.inputs):
            return False
        if addition.graph is not node.graph:
            return False
        width = self.shape(scale)
        if not self._everywhere:
            channels = width[-1] if width else None
            if self.profile is None or self.prefers("residual-rms-norm", channels) != "skip":
                return False
        if (why := self._obstacle(node, addition)) is not None:
            return self.left(node, f"not merged with the addition before it: {why}")
        epsilon = node.attributes.get("epsilon")
        attributes = {"epsilon": 1e-5 if epsilon is None else epsilon.as_float()}
        # At the addition, whose sum may be read before the norm; the scale is there in any case.
        edit.at(addition if is_constant(scale) else node)
        inputs = [*addition.inputs, scale]
        read_elsewhere = len(summed.uses()) > 1 or summed.is_graph_output()
        if read_elsewhere and not is_constant(scale):
            return self.left(node, "not merged with the addition before it: its scale isn't constant")
        wanted = 4 if read_elsewhere else 1
        y = edit.op("SkipSimplifiedLayerNormalization", inputs, attributes, domain=CONTRIB, outputs=wanted)
        edit.model.graph.opset_imports.setdefault(CONTRIB, 1)
        made = y.producer()
        assert made is not None
        made.meta[LOWERED] = True
        y.type, y.shape = node.outputs[0].type, node.outputs[0].shape
        self.applied(node, f"merged with {addition.name!r}")
        edit.replace(node.outputs[0], y)
        if read_elsewhere:
            total = made.outputs[3]
            for unused in made.outputs[1:3]:
                unused.name = ""
            total.type, total.shape = summed.type, summed.shape
            edit.replace(summed, total)
        return True

    def _obstacle(self, node: ir.Node, addition: ir.Node) -> str | None:
        x, skip = addition.inputs[0], addition.inputs[1]
        scale = node.inputs[1]
        assert x is not None
        assert skip is not None
        assert scale is not None
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return "an attribute is set by the caller of its function"
        dtype = self.dtype(x)
        if dtype not in _TYPES or self.dtype(scale) != dtype:
            return f"it computes in {'an unknown type' if dtype is None else dtype.name}"
        a, b, width = self.dims(x), self.dims(skip), self.shape(scale)
        if a is None or b is None or a != b or len(a) not in (2, 3):
            return "the shapes of its operands aren't certain to be the same"
        if attribute_int(node, "axis", -1) not in (-1, len(a) - 1) or width is None or width != (a[-1].value,):
            return "it isn't over the last axis with one number a channel"
        if attribute_int(node, "stash_type", 1) != 1:
            return "it computes in another type"
        return None
