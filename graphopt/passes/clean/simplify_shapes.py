"""simplify-shapes: the shape arithmetic of exporters, proven away."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.dims import ONE, Dim
from graphopt.analysis.shapes import Shape, ShapeFacts, infer
from graphopt.analysis.shapes.elementwise import broadcast_shapes
from graphopt.analysis.shapes.rule import SYMBOLIC_TYPES
from graphopt.analysis.shapes.targets import expand_literal, reshape_literal, unsettled
from graphopt.analysis.shapes.views import reshape_target
from graphopt.graph.constants import is_constant
from graphopt.graph.edits import Editor, functions, subgraphs_of
from graphopt.passes.base import RulePass, Site

VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
"""Operators that keep the order of the elements and change the shape only."""

NO_OPS = frozenset({*VIEWS, "Expand", "Slice", "Transpose", "Tile", "Cast", "CastLike", "Pad", "Concat", "Split"})
"""Operators that may turn out to give back their first input."""

BROADCASTING = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Sum", "Min", "Max", "Where", "And", "Or", "Xor", "Equal", "Less", "Greater"),
        *("LessOrEqual", "GreaterOrEqual", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Expand"),
    }
)
"""Operators that give the same bits whether an operand is expanded before (Pow doesn't: ONNX Runtime computes a scalar
exponent by another formula)."""

ARITHMETIC = frozenset(
    {
        *("Shape", "Size", "Gather", "Range", "ConstantOfShape", "Neg", "Not", "Abs", "Mod", "Pow", "Identity"),
        *("ReduceProd", "ReduceSum", "ReduceMin", "ReduceMax"),
    }
)


class SimplifyShapes(RulePass):
    """Remove what exporters write to compute shapes, where symbolic shapes prove that it isn't needed.

    Every size of a graph input that isn't constant is a symbol, and each small integer tensor is followed as a list of
    integer polynomials of these symbols (`graphopt.analysis.shapes`). With them:

    1. An integer or bool tensor of at most 64 elements whose content is proven constant becomes a constant.
    2. `Reshape`, `Flatten`, `Squeeze`, `Unsqueeze`, `Expand`, `Slice`, `Transpose`, `Tile`, `Cast`, `Pad`, `Split` and
       `Concat` that are proven to give back their input are removed; so are chains of the first four that end in the
       shape in which they began.
    3. `Expand` before an operator that broadcasts anyway is removed where the result keeps its proven shape.
    4. A `Reshape` of a reshaped tensor reads the tensor itself; pairs of `Transpose`, of `Squeeze` and of `Unsqueeze`
       become one.
    5. A computed target of `Reshape` or `Expand` becomes a constant: sizes equal to the input's in the same place are
       copied (0; 1 for `Expand`), and one other may be inferred (-1) if no other size can be 0: ONNX Runtime refuses
       -1 beside an empty size, and empty batches and caches do occur.
    6. Where two integer tensors have the same symbolic content, the first one is used for both.

    The `Shape`, `Gather`, `Concat` and `Where` nodes behind are then dead and go.

    **Needs:** nothing. **Guarantees:** the same numbers bit for bit for every size of the inputs, 0 and 1 included.
    (One exception: two independent sizes 0 in one run, where ONNX reads a computed 0 in a Reshape target as "copy".)
    Declared shapes of intermediate values and outputs are not believed, and two inputs that declare the same dynamic
    size aren't taken to have it. Function bodies are simplified as far as nothing of their inputs matters.

    **When not to use it:** never. A graph with static shapes has nothing left for it after constant folding.
    """

    name: ClassVar[str] = "simplify-shapes"
    family: ClassVar[str] = "clean"
    bitwise: ClassVar[bool] = True
    anchors: ClassVar[tuple[str, ...]] = tuple(sorted(NO_OPS | BROADCASTING | ARITHMETIC))

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Keep the editor for the merging of equal contents, which follows the local rules."""
        self._edit = edit

    def apply(self, model: ir.Model) -> bool:
        """Apply the local rules and the merging of equal contents until a fresh analysis finds nothing more."""
        applied: list[Site] = []
        while True:
            # Facts stay true under the rules, but what is left can be known better: an operator whose content isn't
            # followed may have gone.
            self._facts: ShapeFacts = infer(model)
            self.sites = []
            changed = super().apply(model)
            changed |= self._merge_graph(model.graph, {})
            for function in functions(model):
                changed |= self._merge_graph(function.graph, {})
            if not changed:
                self.sites = applied + self.sites
                return bool(applied)
            applied += [s for s in self.sites if s.outcome == "applied"]

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if not node.inputs or node.inputs[0] is None:
            return False
        return self._to_constants(node) or any(rule(self, node) for rule in _RULES.get(node.op_type, ()))

    # ---- 1: constants

    def _to_constants(self, node: ir.Node) -> bool:
        if node.op_type == "Identity":
            return False
        changed = False
        for output in node.outputs:
            fact = self._facts.fact(output)
            if fact.content is None or fact.dtype is None or not (output.uses() or output.is_graph_output()):
                continue
            numbers = [d.value for d in fact.content.flat]
            if any(n is None for n in numbers):
                continue
            array = np.array(numbers, dtype=object).reshape(fact.content.shape).astype(fact.dtype.numpy())
            self.applied(node, f"computes nothing but the constant {array.tolist()}")
            self._edit.replace(output, self._edit.constant(array))
            changed = True
        return changed

    # ---- 2: operators that do nothing

    def _no_op(self, node: ir.Node) -> bool:
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        before, after = self._facts.fact(source), self._facts.fact(output)
        if before.dtype is None or before.dtype != after.dtype:
            return False
        if node.op_type not in ("Cast", "CastLike") and (before.shape is None or before.shape != after.shape):
            return False
        if not _NO_OP_IF.get(node.op_type, _always)(self, node):
            return False
        return self._pass_on(node, source, f"gives back {source.name!r}: shape {_text(before.shape)}")

    def _pass_on(self, node: ir.Node, source: ir.Value, why: str) -> bool:
        self.applied(node, why)
        self._edit.replace(node.outputs[0], source)
        return True

    def _view_chain(self, node: ir.Node) -> bool:
        """A chain of views that ends in the shape of the tensor it began with."""
        wanted = self._facts.shape(node.outputs[0])
        for ancestor in self._ancestors(node):
            if wanted is not None and self._facts.shape(ancestor) == wanted:
                return self._pass_on(node, ancestor, f"comes back to the shape of {ancestor.name!r}")
        return False

    def _ancestors(self, node: ir.Node) -> list[ir.Value]:
        """The tensors of which `node`, a view, shows the elements, nearest first (its own input left out)."""
        result: list[ir.Value] = []
        value = node.inputs[0]
        while value is not None and (producer := value.producer()) is not None:
            if producer.op_type not in VIEWS or producer.domain not in ("", "ai.onnx") or not producer.inputs:
                break
            value = producer.inputs[0]
            if value is not None:
                result.append(value)
        return result

    # ---- 3: needless expansion

    def _needless_expand(self, node: ir.Node) -> bool:
        source, output = node.inputs[0], node.outputs[0]
        assert source is not None
        changed = False
        for consumer, index in list(output.uses()):
            if consumer.op_type not in BROADCASTING or consumer.domain not in ("", "ai.onnx"):
                continue
            if consumer.op_type == "Expand":
                content = self._facts.data(consumer.inputs[1]) if index == 0 else None
                shapes = [self._facts.shape(source), None if content is None else tuple(content.flat)]
            else:
                shapes = [self._facts.shape(source if i == index else v) for i, v in enumerate(consumer.inputs)]
            known = [s for s in shapes if s is not None]
            wanted = self._facts.shape(consumer.outputs[0])
            if len(known) == len(shapes) and wanted is not None and broadcast_shapes(known) == wanted:
                self.applied(node, f"not needed by {consumer.op_type} {consumer.name!r}, which broadcasts by itself")
                self._edit.set_input(consumer, index, source)
                changed = True
        return changed

    # ---- 4 and 5: merged views, constant targets

    def _reshape(self, node: ir.Node) -> bool:
        wanted = self._facts.shape(node.outputs[0])
        if wanted is None or len(node.inputs) < 2:
            return False
        ancestors = [a for a in self._ancestors(node) if self._facts.shape(a) is not None]
        source = node.inputs[0]
        assert source is not None
        root = ancestors[-1] if ancestors else source
        given = self._facts.shape(root)
        if given is None:
            return False
        computed = not is_constant(node.inputs[1])
        if not computed and root is source:
            return False
        content = self._facts.data(node.inputs[1])
        entries = [] if content is None else list(content.flat)
        # With allowzero ONNX Runtime accepts -1 beside an empty size, without it doesn't.
        allowzero = node.attributes.get_int("allowzero", 0) == 1
        inferred = None if allowzero else next((i for i, d in enumerate(entries) if d.value == -1), None)
        literal = reshape_literal(given, wanted, inferred)
        if literal is not None:
            detail = f"target made the constant {literal}" if computed else "merged with the views before it"
            self._edit.set_input(node, 1, self._edit.constant(np.array(literal, dtype=np.int64), "shape"))
            node.attributes.pop("allowzero", None)
            if root is not source:
                self._edit.set_input(node, 0, root)
            return self.applied(node, detail)
        if root is not source and entries and reshape_target(given, entries, allowzero, ONE) == wanted:
            self._edit.set_input(node, 0, root)
            return self.applied(node, "merged with the views before it")
        if computed:
            return self.left(node, _stays_computed(unsettled(given, wanted)))
        return False

    def _expand(self, node: ir.Node) -> bool:
        given, wanted = self._facts.shape(node.inputs[0]), self._facts.shape(node.outputs[0])
        if given is None or wanted is None or is_constant(node.inputs[1]):
            return False
        literal = expand_literal(given, wanted)
        if literal is None:
            return False
        self._edit.set_input(node, 1, self._edit.constant(np.array(literal, dtype=np.int64), "shape"))
        return self.applied(node, f"target made the constant {literal}")

    def _inner(self, node: ir.Node) -> ir.Node | None:
        """The node of the same operator that makes the input of `node` and serves nothing else."""
        value = node.inputs[0]
        inner = None if value is None else value.producer()
        if value is None or inner is None or inner.op_type != node.op_type or inner.domain != node.domain:
            return None
        return inner if len(value.uses()) == 1 and not value.is_graph_output() else None

    def _transpose(self, node: ir.Node) -> bool:
        inner = self._inner(node)
        source = None if inner is None else inner.inputs[0]
        shape = self._facts.shape(source)
        if inner is None or source is None or shape is None:
            return False
        first, second = _permutation(inner, len(shape)), _permutation(node, len(shape))
        if first is None or second is None:
            return False
        perm = [first[p] for p in second]
        node.attributes["perm"] = ir.AttrInt64s("perm", perm)
        self._edit.set_input(node, 0, source)
        return self.applied(node, f"merged with the Transpose before it into {perm}")

    def _squeezes(self, node: ir.Node) -> bool:
        inner = self._inner(node)
        source = None if inner is None else inner.inputs[0]
        shapes = [self._facts.shape(v) for v in (source, node.inputs[0], node.outputs[0])]
        if inner is None or source is None or any(s is None for s in shapes):
            return False
        ranks = [len(s) for s in shapes if s is not None]
        outer_axes, inner_axes = self._axes(node, max(ranks[1:])), self._axes(inner, max(ranks[:2]))
        if outer_axes is None or inner_axes is None:
            return False
        if node.op_type == "Unsqueeze":
            kept = [i for i in range(ranks[2]) if i not in outer_axes]
            axes = sorted({*outer_axes, *(kept[a] for a in inner_axes)})
        else:
            kept = [i for i in range(ranks[0]) if i not in inner_axes]
            axes = sorted({*inner_axes, *(kept[a] for a in outer_axes)})
        if "axes" in node.attributes:
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        else:
            self._edit.set_input(node, 1, self._edit.constant(np.array(axes, dtype=np.int64), "axes"))
        self._edit.set_input(node, 0, source)
        return self.applied(node, f"merged with the {node.op_type} before it, axes {axes}")

    def _axes(self, node: ir.Node, rank: int) -> list[int] | None:
        """The axes of a Squeeze or Unsqueeze, counted from the front in the larger of its two ranks."""
        attribute = node.attributes.get("axes")
        if attribute is not None:
            axes = None if attribute.is_ref() else list(attribute.as_ints())
        else:
            content = self._facts.data(node.inputs[1]) if len(node.inputs) > 1 else None
            axes = None if content is None else [d.value for d in content.flat]
        if axes is None or any(a is None for a in axes):
            return None
        return [a + rank if a < 0 else a for a in axes if a is not None]

    # ---- 6: equal contents

    def _merge_graph(self, graph: ir.Graph, outer: dict[Hashable, ir.Value]) -> bool:
        """Use the first of the tensors of equal content in `graph`; `outer` has those computed before it outside."""
        first, changed = dict(outer), False
        for node in list(graph):
            if node.graph is None:  # died with an earlier merge
                continue
            for inner in subgraphs_of(node):
                changed |= self._merge_graph(inner, first)
            for value in node.outputs:
                fact = self._facts.fact(value)
                if fact.content is None or fact.dtype not in SYMBOLIC_TYPES or not fact.content.size:
                    continue
                if all(d.value is not None for d in fact.content.flat):
                    continue
                key = (fact.dtype, fact.content.shape, tuple(fact.content.flat))
                earlier = first.setdefault(key, value)
                if (maker := earlier.producer()) is None or maker.graph is None:  # died with an earlier merge
                    earlier = first[key] = value
                if earlier is value or value.is_graph_output() or not value.uses():
                    continue
                self.applied(node, f"computes the same sizes as {earlier.name!r}: {_text(tuple(fact.content.flat))}")
                self._edit.at(node)
                self._edit.replace(value, earlier)
                changed = True
        return changed


def _always(_: SimplifyShapes, __: ir.Node) -> bool:
    return True


def _one_input(_: SimplifyShapes, node: ir.Node) -> bool:
    return len(node.inputs) == 1


def _forward(rules: SimplifyShapes, node: ir.Node) -> bool:
    """Whether all steps of a Slice are positive: an equal shape then means that nothing is cut off or turned round."""
    if len(node.inputs) < 5 or node.inputs[4] is None:
        return True
    steps = rules._facts.data(node.inputs[4])
    return steps is not None and all(d.low >= 1 for d in steps.flat)


def _no_padding(rules: SimplifyShapes, node: ir.Node) -> bool:
    """Whether all amounts of a Pad are 0: an equal shape could also come from a shift."""
    attribute = node.attributes.get("pads")
    if attribute is not None:
        return not attribute.is_ref() and not any(attribute.as_ints())
    pads = rules._facts.data(node.inputs[1]) if len(node.inputs) > 1 else None
    return pads is not None and all(d.value == 0 for d in pads.flat)


def _identity_permutation(rules: SimplifyShapes, node: ir.Node) -> bool:
    shape = rules._facts.shape(node.inputs[0])
    return shape is not None and _permutation(node, len(shape)) == list(range(len(shape)))


def _permutation(node: ir.Node, rank: int) -> list[int] | None:
    attribute = node.attributes.get("perm")
    if attribute is None:
        return list(reversed(range(rank)))
    return None if attribute.is_ref() else list(attribute.as_ints())


def _stays_computed(sizes: list[Dim]) -> str:
    inputs = sorted({s.name for dim in sizes for s in dim.symbols() if not s.op and "[" in s.name})
    named = f" ({', '.join(inputs[:4])}{', ...' if len(inputs) > 4 else ''})" if inputs else ""
    return (
        f"its target stays computed: it depends on {len(inputs) or 'several'} sizes of the inputs{named}, of which a "
        "constant can leave one open and none where an input may be empty; fixed sizes would make it constant"
    )


def _short(dim: Dim) -> str:
    text = repr(dim)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(shape: Shape | None) -> str:
    return "unknown" if shape is None else "[" + ", ".join(map(_short, shape)) + "]"


_NO_OP_IF: dict[str, Callable[[SimplifyShapes, ir.Node], bool]] = {
    "Slice": _forward,
    "Pad": _no_padding,
    "Transpose": _identity_permutation,
    "Concat": _one_input,
    "Split": lambda _, node: len(node.outputs) == 1,
}

_Rule = Callable[[SimplifyShapes, ir.Node], bool]
_RULES: dict[str, tuple[_Rule, ...]] = {op: (SimplifyShapes._no_op,) for op in NO_OPS}
_RULES |= {op: (SimplifyShapes._no_op, SimplifyShapes._view_chain) for op in VIEWS}
_RULES["Reshape"] += (SimplifyShapes._reshape,)
_RULES["Expand"] += (SimplifyShapes._needless_expand, SimplifyShapes._expand)
_RULES["Transpose"] += (SimplifyShapes._transpose,)
_RULES["Squeeze"] += (SimplifyShapes._squeezes,)
_RULES["Unsqueeze"] += (SimplifyShapes._squeezes,)
