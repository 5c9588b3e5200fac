"""layer-norm-to-crms-norm: a centred residual stream with one feature fewer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.feature_space import FeatureSpace
from graphopt.graph.computed import weight
from graphopt.graph.constants import constant_array, constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.fold.centring import Plan, centre, centred, set_constant
from graphopt.passes.fold.layer_norm_to_rms_norm import LayerNormToRmsNorm, has_bias

_CARRIERS = ("Add", "Sub", "Sum", "Neg", "Identity", "Cast", "Mul", "Div", "Where", "Concat", "Gather", "Transpose")
"""Operators of a feature space that hold no number which depends on how many features there are."""


class LayerNormToCrmsNorm(LayerNormToRmsNorm):
    """Leave the last feature out of a centred residual stream: it is minus the sum of the others.

        x centred over d features:  x_d = −Σ x_i  (i < d)
        RMSNorm(x)_i = x_i / √((Σ x_i² + (Σ x_i)²) / d + ε)          i < d, sums over i < d
        W·RMSNorm(x) = Σ (W_i − W_d) · RMSNorm(x)_i                  for the linear layers that read the norm

    Paper: Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers.

    Everything that `layer-norm-to-rms-norm` does, and then every writer loses its last output, every reader its last
    input. No information is lost. Every row of the residual stream, and each weight beside it, has d − 1 instead of d
    numbers.

    **Options:** `min_norms` (default 2): a stream that fewer norms read is left alone.

    **Needs:** what `layer-norm-to-rms-norm` needs; norms without gain and bias (run `fold-norm-affine` before), read by
    nothing but linear layers whose weights no one else reads. **Guarantees:** the same function.

    **Left alone, with the reason:** all that `layer-norm-to-rms-norm` leaves; a writer that can only be centred at run
    time; a stream through a Reshape, Expand, Slice or Split, which hold the number of features.

    **When not to use it:** for speed. ONNX Runtime has no kernel for this norm, and d − 1 (767, 1023, ...) fits no
    vector width; what remains is 1/d of the weights. It is here as the smallest exact form.
    """

    name: ClassVar[str] = "layer-norm-to-crms-norm"
    family: ClassVar[str] = "fold"
    paper: ClassVar[str] = "Pre-RMSNorm and Pre-CRMSNorm Transformers: Equivalent and Efficient Pre-LN Transformers"
    opset: ClassVar[int] = 18

    def __init__(self, min_norms: int = 2) -> None:
        super().__init__(min_norms)

    def plan(self, space: FeatureSpace, norms: list[ir.Node], model: ir.Model) -> Plan | str:
        """See `LayerNormToRmsNorm`."""
        plan = super().plan(space, norms, model)
        if isinstance(plan, str):
            return plan
        if plan.at_run_time:
            return f"{plan.at_run_time[0].value.name!r} can only be centred at run time"
        written = {writer.value for writer in space.writers}
        for value in space.axes:
            node = value.producer()
            if node is not None and value not in written and not is_op(node, *_CARRIERS):
                return f"{node.op_type} {node.name!r} holds the number of features"
        for norm in norms:
            if (why := self._unreadable(norm)) is not None:
                return why
        return plan

    @staticmethod
    def _unreadable(norm: ir.Node) -> str | None:
        """Why the readers of `norm` can't do without its last output."""
        gain = constant_array(norm.inputs[1])
        if gain is None or (gain != 1).any() or has_bias(norm):
            return f"{norm.name!r} has a gain or bias: run fold-norm-affine first"
        output = norm.outputs[0]
        if output.is_graph_output():
            return f"{output.name!r} is a graph output"
        for user, index in output.uses():
            weight = user.inputs[1] if len(user.inputs) > 1 else None
            linear = is_op(user, "MatMul", "Gemm") and index == 0 and user.graph is norm.graph
            tensor = constant_tensor(weight)
            if not linear or weight is None or tensor is None or attribute_int(user, "transA", 0) != 0:
                return f"{user.op_type} {user.name!r} reads the norm and is no linear layer"
            if len(tensor.shape) != 2 or len(weight.uses()) > 1 or weight.is_graph_output():
                return f"the weights of {user.op_type} {user.name!r} are shared, or no matrix"
        return None

    def carry_out(self, plan: Plan, norms: list[ir.Node], edit: Editor) -> None:
        """See `LayerNormToRmsNorm`."""
        size = plan.space.size
        for value in plan.space.axes:
            value.shape = None
        centre(plan, edit, _centred_and_shorter)
        for norm in norms:
            for user, index in list(norm.outputs[0].uses()):
                weight = user.inputs[1]
                assert weight is not None
                tensor = constant_tensor(weight)
                assert tensor is not None
                axis = -1 if attribute_int(user, "transB", 0) == 1 else -2
                set_constant(weight, [(user, index + 1)], _without_last(tensor, axis), edit)
            self._write(norm, size, edit)

    def _write(self, norm: ir.Node, size: int, edit: Editor) -> None:
        edit.at(norm)
        x, gain = norm.inputs[:2]
        assert gain is not None
        assert gain.const_value is not None or constant_tensor(gain) is not None
        tensor = constant_tensor(gain)
        assert tensor is not None
        dtype = tensor.dtype.numpy()
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        axes = edit.constant(np.array([-1], dtype=np.int64), "axes")
        squares = edit.op("ReduceSumSquare", [x, axes], {"keepdims": 1})
        total = edit.op("ReduceSum", [x, axes], {"keepdims": 1})
        squares = edit.op("Add", [squares, edit.op("Mul", [total, total])])
        mean = edit.op("Div", [squares, edit.constant(np.asarray(size, dtype=dtype), "features")])
        mean = edit.op("Add", [mean, edit.constant(np.asarray(epsilon, dtype=dtype), "epsilon")])
        self.applied(norm, f"CRMSNorm over {size - 1} of {size} features, ε = {epsilon:.6g}")
        norm.outputs[0].shape = None
        edit.replace(norm.outputs[0], edit.op("Div", [x, edit.op("Sqrt", [mean])]))


def _centred_and_shorter(tensor: ir.TensorProtocol, axis: int) -> ir.TensorProtocol:
    """`tensor` centred over `axis`, without the last number along it."""
    shape = tensor.shape.numpy()
    if len(shape) < -axis or shape[axis] == 1:
        return centred(tensor, axis)
    whole = centred(tensor, axis)

    def compute() -> ir.TensorProtocol:
        array = whole.numpy()
        return ir.tensor(np.ascontiguousarray(np.delete(array, -1, axis=axis)), dtype=tensor.dtype, name=tensor.name)

    return weight(compute, tensor.dtype, _shorter(shape, axis), tensor.name)


def _without_last(tensor: ir.TensorProtocol, axis: int) -> ir.TensorProtocol:
    """W_i − W_d along `axis`, for all i but the last."""

    def compute() -> ir.TensorProtocol:
        array = np.moveaxis(tensor.numpy(), axis, 0)
        result = np.empty((len(array) - 1, *array.shape[1:]), dtype=array.dtype)
        last = array[-1].astype(np.float64)
        for row in range(len(result)):
            result[row] = array[row] - last
        return ir.tensor(np.ascontiguousarray(np.moveaxis(result, 0, axis)), dtype=tensor.dtype, name=tensor.name)

    return weight(compute, tensor.dtype, _shorter(tensor.shape.numpy(), axis), tensor.name)


def _shorter(shape: Sequence[int], axis: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[axis] -= 1
    return tuple(sizes)
