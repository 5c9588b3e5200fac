"""The match that normalization layers share: a value divided by the root of its own mean square.

    y = v / √(mean(v²) + ε)  [· gain]  [+ bias]        v = x (RMSNorm) or x − mean(x) (the others)

The walk starts at the mean of the square, the one node that every spelling has, goes down to v and up to the
product, and takes along what belongs to the operator: a constant gain, a constant bias, and casts from and to a
half-precision type where `stash_type` = 1 says the same.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import (
    as_float32,
    cast_target,
    constant_rank,
    escaping,
    is_op,
    other_operand,
    producer,
    same,
    users,
)
from graphopt.analysis.moments import Mean, centred, folded, mean_of, read_mean, squared, viewed
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.raise_.root_mean_square import NotRaised, Product, RootWalk
from graphopt.passes.raise_.shape_rules import ShapeRulePass

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclasses.dataclass
class Affine:
    """A constant gain or bias: its numbers, and its value in the graph where that holds them as they are."""

    array: npt.NDArray[Any]
    value: ir.Value | None


@dataclasses.dataclass
class Normalization:
    """A site that the operator can stand for.

    Attributes:
        x: The input of the operator.
        axes: The axes that are normalised, negative, in order.
        epsilon: The number added to the mean square, a float32.
        gain: Factor per element of the axes of gain and bias, shape of these axes.
        bias: Summand per element of these axes, shape of these axes; None for 0.
        root: The last node; the operator takes the place of its output.
    """

    x: ir.Value
    axes: tuple[int, ...]
    epsilon: float
    gain: Affine
    bias: Affine | None
    root: ir.Node

    def write(self, edit: Editor, op_type: str, rank: int = 0) -> str:
        """Put `op_type` in the place of the site; returns what was done, for the report.

        Args:
            edit: What to write through.
            op_type: LayerNormalization, RMSNormalization or InstanceNormalization.
            rank: The rank of x where the axis isn't the last, so that it is moved there and back.
        """
        edit.at(self.root)
        old = self.root.outputs[0]
        x, what = self.x, f"over the last {'axis' if len(self.axes) == 1 else f'{len(self.axes)} axes'}"
        attributes = {"axis": -len(self.axes), "epsilon": self.epsilon, "stash_type": 1}
        order: list[int] = []
        if rank:
            (axis,) = (axis + rank for axis in self.axes)
            order = [*(i for i in range(rank) if i != axis), axis]
            x, what = edit.op("Transpose", [x], {"perm": order}), f"over axis {axis}, between transposes"
        if op_type == "InstanceNormalization":
            attributes, what = {"epsilon": self.epsilon}, "of the axes behind the channels"
        bias = self.bias
        if bias is None and op_type == "InstanceNormalization":
            bias = Affine(np.zeros_like(self.gain.array), None)
        inputs = [x, self._operand(edit, self.gain, "gain")]
        if bias is not None:
            inputs.append(self._operand(edit, bias, "bias"))
        new = edit.op(op_type, inputs, attributes, like=None if rank else old)
        if rank:
            new = edit.op("Transpose", [new], {"perm": [order.index(i) for i in range(rank)]}, like=old)
        edit.replace(old, new)
        return f"{op_type} {what}, ε = {self.epsilon:.6g}"

    @staticmethod
    def _operand(edit: Editor, affine: Affine, name: str) -> ir.Value:
        return affine.value if affine.value is not None else edit.constant(affine.array, name)


class Matcher(RootWalk):
    """One attempt at one site.

    Args:
        node: A ReduceMean, ReduceSum or ReduceSumSquare.
        centre: Whether v must be x − mean(x) or must not (RMSNorm).
        shapes: The pass, which knows the shapes.
    """

    def __init__(self, node: ir.Node, centre: bool, shapes: ShapeRulePass) -> None:
        super().__init__()
        self.node = node
        self.centre = centre
        self.shapes = shapes

    # ---- what the operator allows; these are for LayerNorm and RMSNorm

    stashes = True
    """Whether the operator computes in float32 whatever the type of x is (`stash_type`)."""
    of_gain = "the normalised axis"
    """What gain and bias run along."""

    def check_axes(self, axes: tuple[int, ...], x: ir.Value) -> None:
        """Refuse axes that the operator can't be over."""
        if axes != tuple(range(-len(axes), 0)):
            raise NotRaised(f"the mean is over axes {list(axes)}, not over the last ones")

    def affine_axes(self, axes: tuple[int, ...], x: ir.Value) -> tuple[int, ...]:
        """The axes that gain and bias run along."""
        return axes

    def check_site(self, x: ir.Value, root: ir.Node, gain: Affine | None, dtype: ir.DataType) -> None:
        """Refuse a site for what was found last: its type, whether it has a gain, what follows."""
        if dtype == ir.DataType.DOUBLE:
            raise NotRaised("it computes in float64, the operator in float32 (stash_type)")

    # ---- the match

    def match(self) -> Normalization | None:
        """Find the pattern around the node; None where the site is something else.

        Raises:
            NotRaised: The site is close, but isn't this operator, or isn't known to be.
        """
        mean = read_mean(self.node)
        if mean is None:
            return None
        mean = viewed(mean)
        if is_op(self.node, "ReduceSumSquare"):
            v = mean.operand
        else:
            square = squared(mean.operand)
            if square is None:
                return None
            v, nodes = square
            self.take(*nodes)
        centre = centred(v)
        if (centre is not None) != self.centre:
            if self.centre:
                self._explain_single_pass(v, mean)
            return None
        self.take(*mean.nodes)
        inverse = self.inverse_root(mean.value)
        if inverse is None:
            return None
        product = self.product(*inverse, v, centre)
        if product is None:
            return None
        x = v if centre is None else centre.x
        axes = self.axes_of(mean, x)
        if centre is not None:
            self.take(centre.node)
            self.beside.extend(centre.mean.nodes)
            if self.axes_of(centre.mean, x) != axes:
                raise NotRaised("the mean and the variance are over different axes")
        self.check_axes(axes, x)
        along = self.affine_axes(axes, x)
        dims = self._dims(x, along)
        for some in [mean] if centre is None else [mean, centre.mean]:
            if some.count is not None:
                self._check_count(some, self._dims(x, axes))
        return self._finish(x, axes, along, product, dims)

    @staticmethod
    def _explain_single_pass(v: ir.Value, mean: Mean) -> None:
        for user in users(mean.value):
            if not is_op(user, "Sub") or user.inputs[0] is not mean.value:
                continue
            product = squared(user.inputs[1])
            inner = None if product is None else mean_of(product[0])
            if inner is not None and same(inner.operand, v):
                raise NotRaised(
                    "the variance is E[x²] − E[x]², which cancels where the mean is large: "
                    "LayerNormalization gives other numbers"
                )

    # ---- facts about axes

    def axes_of(self, mean: Mean, x: ir.Value) -> tuple[int, ...]:
        """The axes that the mean is over, counted from the last one, in order; see `RootWalk`."""
        if mean.axes is None:
            raise NotRaised(f"the axes of {mean.nodes[0].op_type} aren't constant, or not given")
        if not (mean.kept or (mean.view is not None and self.shapes.keeps_axes(mean.value, mean.operand, mean.axes))):
            raise NotRaised("the reduced axes aren't kept (keepdims=0), so the division broadcasts differently")
        axes = mean.axes
        if any(axis >= 0 for axis in axes):
            rank = self.shapes.rank(x)
            if rank is None:
                raise NotRaised(f"the rank isn't known, so axes {list(axes)} may not be the last")
            axes = tuple(axis if axis < 0 else axis - rank for axis in axes)
        return tuple(sorted(axes))

    def _dims(self, x: ir.Value, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The lengths of some axes.

        A gain of D elements doesn't prove that x has D there: it would broadcast a length of 1.
        """
        shape = self.shapes.shape(x)
        if shape is None or len(shape) < -axes[0]:
            shape = (None,) * -axes[0]
        known = [size for size in (shape[axis] for axis in axes) if size is not None]
        if len(known) != len(axes):
            raise NotRaised(f"the length of {self.of_gain} isn't known, so the gain can't be written for it")
        return tuple(known)

    @staticmethod
    def _check_count(mean: Mean, dims: tuple[int, ...]) -> None:
        """A sum divided by a constant is a mean only where the constant is the number of elements."""
        elements = math.prod(dims)
        if mean.count is not None and abs(mean.count - elements) > 1e-6 * elements:
            raise NotRaised(f"a sum over {elements} elements is divided by {mean.count:g}, so it isn't their mean")

    # ---- what follows the product

    def _finish(
        self, x: ir.Value, axes: tuple[int, ...], along: tuple[int, ...], product: Product, dims: tuple[int, ...]
    ) -> Normalization:
        root, dtype = product.root, self.dtype or self.shapes.dtype(x)
        gain = bias = None
        if product.gain is not None:
            gain = self._affine(product.gain, x, along, dims)
            if gain is None:
                raise NotRaised("what the reciprocal root is multiplied by isn't a gain over the normalised axes")
        if product.bias is not None:
            bias = self._affine(product.bias, x, along, dims)
            if bias is None:
                raise NotRaised("what the mean is subtracted from isn't a bias over the normalised axes")
        dtype = dtype or next((ir.DataType.from_numpy(a.array.dtype) for a in (gain, bias) if a is not None), None)
        passed: list[ir.Node] = []
        end = root
        while bias is None and (user := self._sole_user(end)) is not None:
            if is_op(user, "Cast") and cast_target(user) == dtype:
                passed.append(user)
            elif is_op(user, "Cast"):
                # Computed in float32 and rounded to the type that x had: that is what stash_type = 1 means.
                target, upcast = cast_target(user), producer(x, "Cast")
                wide = upcast.inputs[0] if upcast is not None else None
                if wide is None or self.shapes.dtype(wide) != target or target not in _HALF:
                    break
                if gain is not None or dtype != ir.DataType.FLOAT or not self.stashes:
                    break
                after = self._sole_user(user)
                if target == ir.DataType.BFLOAT16 and not self.centre and (after is None or not is_op(after, "Mul")):
                    # Without a kernel for bfloat16 a runtime multiplies by the gain, which the graph so far didn't.
                    break
                x, dtype, root = wide, target, user
                self.take(user, *passed)
                passed = []
            else:
                is_gain, is_bias = is_op(user, "Mul") and gain is None, is_op(user, "Add") and self.centre
                operand = other_operand(user, end.outputs[0])
                if operand is None or not (is_gain or is_bias):
                    break
                affine = self._affine(operand, x, along, dims)
                if affine is None:
                    break
                dtype = dtype or ir.DataType.from_numpy(affine.array.dtype)
                gain, bias = (affine, None) if is_gain else (gain, affine)
                root = user
                self.take(user, *passed)
                passed = []
            end = user
        if dtype is None:
            raise NotRaised("the type isn't known")
        self.check_site(x, root, gain, dtype)
        self._check(x, len(axes), root)
        if gain is None:
            gain = Affine(np.ones(dims, dtype=dtype.numpy()), None)
        return Normalization(x, axes, self.epsilon, gain, bias, root)

    @staticmethod
    def _sole_user(node: ir.Node) -> ir.Node | None:
        value = node.outputs[0]
        found = [] if value.is_graph_output() else users(value)
        return found[0] if len(found) == 1 and found[0].graph is node.graph else None

    def _affine(self, value: ir.Value, x: ir.Value, along: tuple[int, ...], dims: tuple[int, ...]) -> Affine | None:
        """`value` as numbers along some axes of x, None where it is anything else."""
        array = folded(value)
        if array is None:
            return None
        depth = max(array.ndim, -along[0])
        if array.ndim > len(along) and not self.shapes.has_rank(x, array.ndim):
            return None
        inner = array.reshape((1,) * (depth - array.ndim) + array.shape)
        if any(size != 1 for axis, size in enumerate(inner.shape, -depth) if axis not in along):
            return None
        inner = inner.reshape([inner.shape[axis] for axis in along])
        if any(size not in (1, d) for size, d in zip(inner.shape, dims, strict=True)):
            return None
        as_is = array.shape == dims and along[-1] == -1 and constant_tensor(value) is not None
        return Affine(array, value) if as_is else Affine(np.array(np.broadcast_to(inner, dims)), None)

    def _check(self, x: ir.Value, axes: int, root: ir.Node) -> None:
        if self.epsilon < 0 or as_float32(self.epsilon) is None:
            raise NotRaised(f"epsilon {self.epsilon!r} isn't a float32, which the attribute is")
        rank = constant_rank([*self.inside, *self.beside])
        if rank > axes and not self.shapes.has_rank(x, rank):
            raise NotRaised(f"a constant of rank {rank} may broadcast the result, whose rank isn't known")
        if any(node.graph is not root.graph for node in self.inside):
            raise NotRaised("it is spread over an outer graph and a subgraph")
        used = escaping(self.inside, root)
        if used is not None:
            raise NotRaised(f"{used.name!r} inside it is used elsewhere too")
