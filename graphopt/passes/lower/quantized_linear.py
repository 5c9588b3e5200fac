"""quantized-linear: products with block-quantized weights become graphopt's operator, with what stands around them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.graph.computed import concatenated, weight
from graphopt.graph.computed import identity as identity_of
from graphopt.graph.constants import constant_tensor, is_nothing
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.shape_rules import ShapeRulePass
from graphopt.runtime_ops.library import library_path
from graphopt.runtime_ops.operator import DOMAIN, OLDEST_OPSET, add_body, operators

CONTRIB = "com.microsoft"
LINEAR, MLP = "QuantizedLinear", "QuantizedMlp"
_X, _NORM, _WEIGHT, _BIAS, _RESIDUAL = 0, 1, 2, 6, 7
_FORMAT = ("bits", "block_size", "activation_bits")
_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class QuantizedLinear(ShapeRulePass):
    """Write products with block-quantized weights as graphopt's own `QuantizedLinear` and `QuantizedMlp`.

    At 4 bits a decoder's token costs less in bytes than in small operators, each of which wakes the threads anew. So
    whatever stands around a product goes into its kernel:

    1. `MatMulNBits` becomes `QuantizedLinear`, on the same initializers. At `accuracy_level` 4 activations are rounded
       to 8 bits in the weight's blocks, as there; at other levels to 16 bits, which is off by some 1e-5. Zero points
       that are floats, which `MatMulNBits` computes slowly, become minimums: s·(q − z) = s·q + (−s·z).
    2. An `RMSNormalization` that only such products read is computed by each of them; a
       `SkipSimplifiedLayerNormalization` becomes an addition and that.
    3. A residual addition behind a product becomes its residual.
    4. down(act(gate(x)) ⊙ up(x)) + r, where r is what the norm before gate and up reads, becomes one `QuantizedMlp`;
       gate and up become one weight. The activation is SiLU, GELU (by erf or tanh) or ReLU.

    The operators' portable bodies go into the model, so that it runs on an ONNX Runtime without the library too; there
    weights are float32 once the session is made.

    **Options:** `activation_bits` (8, 16 or 0; default 0): what activations are rounded to; 0: by the `accuracy_level`
    of each product. `blocks` (default true): rules 2 to 4.

    **Needs:** opset 18; float32 or float16; constant weights without a permutation (`g_idx`) of 2, 4 or 8 bits; the
    library with graphopt's kernels, without which nothing is done. **Guarantees:** the same function up to the
    rounding of activations.

    **Targets:** cpu.

    **When not to use it:** for runtimes that don't register the library: on the bodies a decoder is as fast as in
    float32, and as large in memory.
    """

    name: ClassVar[str] = "quantized-linear"
    family: ClassVar[str] = "lower"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)
    anchors: ClassVar[tuple[str, ...]] = (f"{CONTRIB}::MatMulNBits", f"{DOMAIN}::{LINEAR}")

    def __init__(self, activation_bits: int = 0, blocks: bool = True) -> None:
        super().__init__()
        if activation_bits not in (0, 8, 16):
            raise ValueError(f"activation_bits must be 0, 8 or 16, not {activation_bits}")
        self.activation_bits, self.blocks = activation_bits, blocks

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Write the products first, so that a norm's readers are known for what they are."""
        super().prepare(model, edit)
        self._empty: dict[ir.DataType, ir.Value] = {}
        for node in list(model.graph):
            if node.domain == CONTRIB and node.op_type == "MatMulNBits":
                edit.at(node)
                self._product(node, edit)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        if node.op_type == "MatMulNBits":
            if node.graph is not edit.model.graph:
                return self.left(node, "it stands in a subgraph or function")
            reason = self._obstacle(node, edit)
            return self.left(node, reason or "it became one while another pass ran")
        if not self.blocks or node.graph is not edit.model.graph:
            return False
        return self._with_norm(node, edit) or self._with_residual(node, edit) or self._as_mlp(node, edit)

    # ---- the product

    def _obstacle(self, node: ir.Node, edit: Editor) -> str | None:
        """Why a MatMulNBits stays; None: it needn't."""
        if library_path() is None:
            return "the library with graphopt's kernels isn't built"
        if edit.opset < OLDEST_OPSET:
            return f"the operator's body needs opset {OLDEST_OPSET}"
        if any(attribute.is_ref() for attribute in node.attributes.values()):
            return "an attribute is set by the caller of its function"
        x, given = node.inputs[0], _given(node)
        if x is None or self.dtype(x) not in _TYPES:
            return "it computes in another type than float32 and float16"
        if given.get(4) is not None:
            return "its weight is permuted (g_idx)"
        if any(given.get(i) is not None and constant_tensor(given[i]) is None for i in (1, 2, 3, 5)):
            return "its weight isn't constant"
        if (bits := attribute_int(node, "bits", 4)) not in (2, 4, 8):
            return f"it has {bits} bits"
        block, length = attribute_int(node, "block_size", 0) or 0, attribute_int(node, "K", 0) or 0
        if not 16 <= block <= 256:
            return f"its blocks have {block} numbers"
        if length % block:
            return "its rows don't end with a block"
        return None

    def _product(self, node: ir.Node, edit: Editor) -> None:
        if self._obstacle(node, edit) is not None:
            return
        given = _given(node)
        x, packed, scales = (given[i] for i in range(3))
        assert x is not None
        assert packed is not None
        assert scales is not None
        zeros, bias = given.get(3), given.get(5)
        if zeros is None or zeros.dtype == ir.DataType.UINT8:  # else minimums are made of them in their type
            scales = self._in_half(scales, node, edit)
        level = attribute_int(node, "accuracy_level", 0)
        attributes = operators()[LINEAR].attributes_of(
            bits=attribute_int(node, "bits", 4),
            block_size=attribute_int(node, "block_size", 0),
            activation_bits=self.activation_bits or (8 if level == 4 else 16),
        )
        minimums = self.nothing(edit, scales.dtype or ir.DataType.FLOAT)
        if zeros is not None and zeros.dtype != ir.DataType.UINT8:
            minimums, zeros = self._minimums(scales, zeros, edit), None
        inputs = [
            x,
            self.nothing(edit, ir.DataType.FLOAT),
            packed,
            scales,
            zeros or self.nothing(edit, ir.DataType.UINT8),
            minimums,
            self._as_float(bias, edit) or self.nothing(edit, ir.DataType.FLOAT),
            self.nothing(edit, self.dtype(x) or ir.DataType.FLOAT),
        ]
        add_body(edit.model, LINEAR)
        y = edit.op(LINEAR, inputs, attributes, domain=DOMAIN, like=node.outputs[0])
        self.applied(node, f"became {LINEAR} with activations of {attributes['activation_bits']} bits")
        edit.replace(node.outputs[0], y)

    def nothing(self, edit: Editor, dtype: ir.DataType) -> ir.Value:
        """The empty tensor that says that an input isn't there; one for each type."""
        value = self._empty.get(dtype)
        if value is None or value.graph is None:
            value = edit.constant(np.zeros(0, dtype.numpy()), "nothing")
            self._empty[dtype] = value
        return value

    def _as_float(self, value: ir.Value | None, edit: Editor) -> ir.Value | None:
        """A constant as float32."""
        if value is None or value.dtype == ir.DataType.FLOAT:
            return value
        tensor = constant_tensor(value)
        assert tensor is not None
        return edit.constant(tensor.numpy().astype(np.float32), "as_float")

    @staticmethod
    def _in_half(scales: ir.Value, node: ir.Node, edit: Editor) -> ir.Value:
        """Scales of numbers in half precision that are stored in float32 as float16, which the operator takes; others
        as they are. Other readers (the look-up in a table that the head shares) get them cast, which a session does
        when it is loaded; not other products, whose scales must be constant (`BlockProducts`)."""
        tensor, others = constant_tensor(scales), [use for use in scales.uses() if use.node is not node]
        if scales.dtype != ir.DataType.FLOAT or tensor is None or scales.is_graph_output():
            return scales
        products = ("MatMulNBits", LINEAR)
        if any(use.node.op_type in products or use.node.graph is not node.graph for use in others):
            return scales
        numbers = tensor.numpy()
        with np.errstate(over="ignore"):
            half = numbers.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), numbers):
            return scales
        kept = edit.constant(half, "scales")
        for reader, index in others:
            edit.at(reader)
            edit.set_input(reader, index, edit.op("Cast", [kept], {"to": ir.DataType.FLOAT.value}))
        edit.at(node)
        return kept

    @staticmethod
    def _minimums(scales: ir.Value, zeros: ir.Value, edit: Editor) -> ir.Value:
        s, z = constant_tensor(scales), constant_tensor(zeros)
        assert s is not None
        assert z is not None

        def compute() -> ir.TensorProtocol:
            product = s.numpy().astype(np.float32) * z.numpy().astype(np.float32).reshape(s.shape.numpy())
            return ir.tensor((-product).astype(s.numpy().dtype))

        origin = ("minimums", identity_of(s), identity_of(z))
        return edit.constant(weight(compute, s.dtype, s.shape.numpy(), origin=origin), "minimums")

    # ---- what stands around it

    def _with_norm(self, node: ir.Node, edit: Editor) -> bool:
        """Rule 2."""
        normed, gains = node.inputs[_X], node.inputs[_NORM]
        norm = normed.producer() if normed is not None else None
        if normed is None or norm is None or not is_nothing(gains):
            return False
        skips = norm.op_type == "SkipSimplifiedLayerNormalization"
        if not skips and norm.op_type not in _NORMS:
            return False
        if skips and (len([v for v in norm.inputs if v is not None]) != 3 or normed is not norm.outputs[0]):
            return False
        scale, source = norm.inputs[2 if skips else 1], norm.inputs[0]
        if scale is None or source is None or constant_tensor(scale) is None or self.rank(scale) != 1:
            return False
        axis = attribute_int(norm, "axis", -1)
        if axis is None or (axis != -1 and axis + 1 != self.rank(source)):
            return False
        if attribute_int(norm, "stash_type", 1) != 1 or self.dtype(source) != self.dtype(normed):
            return False
        readers = [use.node for use in normed.uses()]
        if normed.is_graph_output() or not all(_is(n, LINEAR) and n.inputs[_X] is normed for n in readers):
            return self.left(node, "the norm before it isn't read by such products alone")
        if skips:
            edit.at(norm)
            summed = edit.op("Add", norm.inputs[:2], like=source)
            if len(norm.outputs) > 3:
                norm.outputs[3].replace_all_uses_with(summed, replace_graph_outputs=True)
            source = summed
        epsilon = norm.attributes.get("epsilon")
        gains = self._as_float(scale, edit)
        for reader in readers:
            reader.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5 if epsilon is None else epsilon.as_float())
            edit.set_input(reader, _NORM, gains)
        for reader in readers:
            edit.set_input(reader, _X, source)
        return self.applied(node, f"took in the norm {norm.name!r}")

    def _with_residual(self, node: ir.Node, edit: Editor) -> bool:
        """Rule 3."""
        y = node.outputs[0]
        uses = tuple(y.uses())
        if len(uses) != 1 or y.is_graph_output() or not is_nothing(node.inputs[_RESIDUAL]):
            return False
        addition = uses[0].node
        if addition.op_type not in ("Add", "Sum") or len(addition.inputs) != 2 or addition.graph is not node.graph:
            return False
        other = addition.inputs[1 - uses[0].idx]
        if other is None or other is y or constant_tensor(other) is not None:
            return False
        here, there = self.dims(y), self.dims(other)
        if here is None or there is None or here != there:
            return self.left(node, "what is added to it isn't certain to have its shape")
        edit.at(addition)
        inputs = [*node.inputs[:_RESIDUAL], other]
        made = edit.op(LINEAR, inputs, _values(node), domain=DOMAIN, like=addition.outputs[0])
        self.applied(node, f"took in the residual of {addition.name!r}")
        edit.replace(addition.outputs[0], made)
        return True

    def _as_mlp(self, node: ir.Node, edit: Editor) -> bool:
        """Rule 4."""
        branch = self._branch(node)
        if branch is None:
            return False
        if isinstance(branch, str):
            return self.left(node, branch)
        attributes = {**_values(node), "activation": branch.activation, "epsilon": branch.epsilon}
        inputs = [branch.source, branch.norm, *self._stacked(branch.rows, edit), *node.inputs[_WEIGHT:_BIAS]]
        add_body(edit.model, MLP)
        edit.at(node)
        y = edit.op(MLP, inputs, operators()[MLP].attributes_of(**attributes), domain=DOMAIN, like=node.outputs[0])
        self.applied(node, f"became {MLP} with what stands between the norm and it")
        edit.replace(node.outputs[0], y)
        return True

    def _branch(self, down: ir.Node) -> _Branch | str | None:
        """The feed-forward branch that ends with a product; None: none does; a text: why it isn't taken."""
        residual, hidden = down.inputs[_RESIDUAL], down.inputs[_X]
        gated = _binary(hidden, "Mul")
        if gated is None or residual is None or is_nothing(residual) or not is_nothing(down.inputs[_NORM]):
            return None
        for act, up in (gated, gated[::-1]):
            found = _activation(act)
            if found is None:
                continue
            activation, gate = found
            products = [_product_of(gate), _product_of(up)]
            if products[0] is None or products[1] is None:
                continue
            (first, place), (second, other) = products[0], products[1]
            if (first is second) != (place is not None and other is not None):
                continue
            if first is second and (place, other) != (0, 1):
                return "gate and up stand in the other order in their weight"
            for product in {first, second}:
                if not is_nothing(product.inputs[_BIAS]) or not is_nothing(product.inputs[_RESIDUAL]):
                    return "gate or up has a bias"
                if any(_value(product, name) != _value(down, name) for name in _FORMAT):
                    return "gate, up and down aren't quantized alike"
            if not is_nothing(down.inputs[_BIAS]):
                return "down has a bias"
            if first.inputs[_X] is not residual or second.inputs[_X] is not residual:
                return "what is added behind it isn't what gate and up read"
            if first.inputs[_NORM] is not second.inputs[_NORM]:
                return "gate and up have different norms"
            rows = [first] if first is second else [first, second]
            return _Branch(residual, first.inputs[_NORM], rows, activation, _value(first, "epsilon"))
        return None

    def _stacked(self, rows: list[ir.Node], edit: Editor) -> list[ir.Value | None]:
        """The inputs of the weight of several products, one below the other."""
        if len(rows) == 1:
            return list(rows[0].inputs[_WEIGHT:_BIAS])
        made: list[ir.Value | None] = []
        for a, b in zip(rows[0].inputs[_WEIGHT:_BIAS], rows[1].inputs[_WEIGHT:_BIAS], strict=True):
            first, second = constant_tensor(a), constant_tensor(b)
            assert first is not None
            assert second is not None
            made.append(a if first.size == 0 else edit.constant(concatenated([first, second], 0), "gate_up"))
        return made


@dataclasses.dataclass
class _Branch:
    """A feed-forward branch: what it reads, its norm's gains, the products of gate and up, the activation's number."""

    source: ir.Value
    norm: ir.Value | None
    rows: list[ir.Node]
    activation: int
    epsilon: Any


def _is(node: ir.Node | None, op_type: str) -> bool:
    return node is not None and node.domain == DOMAIN and node.op_type == op_type


def _given(node: ir.Node) -> dict[int, ir.Value | None]:
    """The inputs of a MatMulNBits; scales that are kept in half precision and cast are the constant itself."""
    given = dict(enumerate(node.inputs))
    scales = given.get(2)
    cast = None if scales is None else scales.producer()
    kept = cast.inputs[0] if cast is not None and is_op(cast, "Cast") else None
    if kept is not None and constant_tensor(kept) is not None and kept.dtype in _TYPES:
        given[2] = kept
    return given


def _value(node: ir.Node, name: str) -> Any:
    return node.attributes[name].value


def _values(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def _sole(value: ir.Value | None) -> ir.Node | None:
    """What makes a value that is read once."""
    if value is None or len(value.uses()) != 1 or value.is_graph_output():
        return None
    return value.producer()


def _binary(value: ir.Value | None, op_type: str) -> tuple[ir.Value, ir.Value] | None:
    """The operands of a node that makes a value that is read once."""
    node = _sole(value)
    if node is None or node.op_type != op_type or len(node.inputs) != 2:
        return None
    a, b = node.inputs
    return None if a is None or b is None else (a, b)


def _activation(value: ir.Value) -> tuple[int, ir.Value] | None:
    """The number of the activation that makes a value, and what it is applied to."""
    node = _sole(value)
    if node is None or node.inputs[0] is None:
        return None
    if node.op_type == "Relu":
        return 3, node.inputs[0]
    if node.op_type == "Gelu":
        exact = (node.attributes.get_string("approximate", "none") or "none") == "none"
        return (1 if exact or node.domain == CONTRIB else 2), node.inputs[0]
    if node.op_type == "FastGelu" and len(node.inputs) == 1:
        return 2, node.inputs[0]
    if node.op_type in ("Swish", "QuickGelu"):
        default = 1.0 if node.op_type == "Swish" else 1.702
        return (0, node.inputs[0]) if node.attributes.get_float("alpha", default) == 1.0 else None
    if (pair := _binary(value, "Mul")) is not None:
        for x, squashed in (pair, pair[::-1]):
            sigmoid = _sole(squashed)
            if sigmoid is not None and sigmoid.op_type == "Sigmoid" and sigmoid.inputs[0] is x and len(x.uses()) == 2:
                return 0, x
    return None


def _product_of(value: ir.Value) -> tuple[ir.Node, int | None] | None:
    """The QuantizedLinear that makes a value, and which half of its result the value is; None: all of it."""
    if value.is_graph_output():
        return None
    node = value.producer()
    if _is(node, LINEAR):
        return node, None  # type: ignore[return-value]
    if node is None or node.op_type != "Split" or len(node.outputs) != 2:
        return None
    source = node.inputs[0]
    product = _sole(source)
    if not _is(product, LINEAR) or attribute_int(node, "axis", 0) not in (-1, 2 if source is None else -1):
        return None
    widths = constant_tensor(node.inputs[1]) if len(node.inputs) > 1 else None
    if widths is not None and len(set(widths.numpy().tolist())) != 1:
        return None
    return product, node.outputs.index(value)  # type: ignore[return-value]
