"""Random valid graphs for property tests: a program of small steps over a list of float tensors.

Every tensor has shape [batch, sequence, D] up to permutations and unit dimensions; batch and sequence are dynamic in
the model and bound to numbers only by the inputs, so that shape arithmetic has something to be wrong about.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

WIDTH = 4
Step = tuple[str, int, int]


class _Builder:
    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        # (name, symbolic shape): "b" and "s" are dynamic.
        self.values: list[tuple[str, tuple[str | int, ...]]] = [("x", ("b", "s", WIDTH))]
        self.count = 0

    def node(self, op: str, inputs: Sequence[str], outputs: int = 1, **attributes: object) -> str:
        self.count += 1
        names = [f"v{self.count}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"n{self.count}", **attributes))
        return names[0]

    def const(self, array: np.ndarray | Sequence[int]) -> str:
        array = np.asarray(array)
        self.count += 1
        name = f"c{self.count}"
        if self.count % 2:
            self.initializers[name] = numpy_helper.from_array(array, name)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=numpy_helper.from_array(array, name)))
        return name

    def scalar(self, number: float) -> str:
        return self.const(np.array(number, dtype=np.float32))

    def add(self, name: str, shape: tuple[str | int, ...]) -> None:
        self.values.append((name, shape))

    def shape_of(self, name: str, shape: tuple[str | int, ...]) -> list[str]:
        """Each dimension as a one-element tensor, computed the way exporters do."""
        whole = self.node("Shape", [name])
        parts = []
        for axis, dim in enumerate(shape):
            if isinstance(dim, int) and axis % 2:
                parts.append(self.const(np.array([dim])))
            else:
                scalar = self.node("Gather", [whole, self.const(np.array(axis))], axis=0)
                parts.append(self.node("Unsqueeze", [scalar, self.const(np.array([0]))]))
        return parts

    def step(self, kind: str, which: int, argument: int) -> None:
        name, shape = self.values[which % len(self.values)]
        last = shape[-1]
        match kind:
            case "unary":
                op = ("Neg", "Tanh", "Sigmoid", "Relu", "Identity", "Abs", "Exp")[argument % 7]
                self.add(self.node(op, [self.node("Tanh", [name]) if op == "Exp" else name]), shape)
            case "affine":
                op = ("Add", "Mul", "Sub", "Div")[argument % 4]
                number = (1.0, 0.0, 0.5, 1.000001, 1e-10)[argument % 5]
                operands = [name, self.scalar(1.0 if op == "Div" and not number else number)]
                self.add(self.node(op, operands[::-1] if argument % 3 == 0 and op in ("Add", "Mul") else operands), shape)
            case "binary":
                other = next((n for n, s in reversed(self.values) if s == shape), name)
                self.add(self.node(("Add", "Mul", "Sub")[argument % 3], [name, other]), shape)
            case "twice":
                first, second = self.node("Sigmoid", [name]), self.node("Sigmoid", [name])
                self.add(self.node("Add", [first, second]), shape)
            case "cast":
                self.add(self.node("Cast", [name], to=TensorProto.FLOAT), shape)
            case "transpose" if len(shape) > 1:
                order = list(self.rng.permutation(len(shape)))
                self.add(self.node("Transpose", [name], perm=[int(i) for i in order]), tuple(shape[i] for i in order))
            case "reshape":
                parts = self.shape_of(name, shape)
                if argument % 3 == 0:  # to itself
                    self.add(self.node("Reshape", [name, self.node("Concat", parts, axis=0)]), shape)
                elif argument % 3 == 1 and len(shape) == 3:  # [a, b, c] to [a, 1, b, c]
                    parts.insert(1, self.const(np.array([1])))
                    target = self.node("Concat", parts, axis=0)
                    self.add(self.node("Reshape", [name, target]), (shape[0], 1, *shape[1:]))
                elif isinstance(last, int) and last == WIDTH:  # there and back
                    split = [*parts[:-1], self.const(np.array([2])), self.const(np.array([-1]))]
                    halves = self.node("Reshape", [name, self.node("Concat", split, axis=0)])
                    self.add(self.node("Reshape", [halves, self.node("Concat", parts, axis=0)]), shape)
            case "expand":
                target = self.node("Concat", self.shape_of(name, shape), axis=0)
                self.add(self.node("Expand", [name, target]), shape)
            case "unsqueeze" if len(shape) < 5:
                self.add(self.node("Unsqueeze", [name, self.const(np.array([1]))]), (shape[0], 1, *shape[1:]))
            case "squeeze":
                if 1 in shape:
                    axis = shape.index(1)
                    rest = shape[:axis] + shape[axis + 1 :]
                    if rest:
                        self.add(self.node("Squeeze", [name, self.const(np.array([axis]))]), rest)
            case "slice":
                big = np.iinfo(np.int64).max
                stop = (big, 2, -1)[argument % 3]
                if isinstance(last, int) and last == WIDTH:
                    kept = {big: last, 2: 2, -1: last - 1}[stop]
                    ends = [self.const(np.array([v])) for v in (0, stop, -1)]
                    self.add(self.node("Slice", [name, *ends]), (*shape[:-1], kept))
            case "matmul" if last == WIDTH and len(shape) > 1:
                weight = self.const(self.rng.normal(size=(WIDTH, WIDTH)).astype(np.float32))
                if argument % 2:
                    weight = self.node("Transpose", [weight], perm=[1, 0])
                self.add(self.node("MatMul", [name, weight]), shape)
            case "layer_norm":
                axes = self.const(np.array([-1]))
                centred = self.node("Sub", [name, self.node("ReduceMean", [name, axes], keepdims=1)])
                square = self.node("Pow", [centred, self.scalar(2.0)]) if argument % 2 else self.node("Mul", [centred] * 2)
                variance = self.node("ReduceMean", [square, axes], keepdims=1)
                deviation = self.node("Sqrt", [self.node("Add", [variance, self.scalar(1e-5)])])
                self.add(self.node("Div", [centred, deviation]), shape)
            case "rms_norm":
                axes = self.const(np.array([-1]))
                square = self.node("Pow", [name, self.scalar(2.0)])
                mean = self.node("ReduceMean", [square, axes], keepdims=1)
                root = self.node("Sqrt", [self.node("Add", [mean, self.scalar(1e-6)])])
                self.add(self.node("Mul", [name, self.node("Reciprocal", [root])]), shape)
            case "gelu":
                erf = self.node("Erf", [self.node("Div", [name, self.scalar(float(np.sqrt(2.0)))])])
                product = self.node("Mul", [name, self.node("Add", [erf, self.scalar(1.0)])])
                self.add(self.node("Mul", [product, self.scalar(0.5)]), shape)
            case "silu":
                self.add(self.node("Mul", [name, self.node("Sigmoid", [name])]), shape)
            case "if":
                condition = self.const(np.array(bool(argument % 2)))
                if argument % 3 == 0:
                    total = self.node("ReduceSum", [name], keepdims=0)
                    condition = self.node("Greater", [total, self.scalar(0.0)])
                branches = {}
                for branch, op in (("then_branch", "Neg"), ("else_branch", "Identity")):
                    out = f"{branch}_{self.count}"
                    info = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
                    body = helper.make_node(op, [name], [out], name=f"{out}_node")
                    branches[branch] = helper.make_graph([body], branch, [], [info])
                self.add(self.node("If", [condition], **branches), shape)

    def model(self, outputs: Sequence[int]) -> ir.Model:
        chosen = dict.fromkeys(self.values[i % len(self.values)] for i in outputs)
        made = [(n, s) for n, s in chosen if n != "x"] or [(self.node("Neg", ["x"]), self.values[0][1])]
        graph = helper.make_graph(
            self.nodes,
            "random",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", "s", WIDTH])],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in made],
            list(self.initializers.values()),
        )
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        onnx.checker.check_model(proto)
        return ir.from_proto(proto)


KINDS = (
    "unary", "affine", "binary", "twice", "cast", "transpose", "reshape", "expand", "unsqueeze", "squeeze", "slice",
    "matmul", "layer_norm", "rms_norm", "gelu", "silu", "if",
)  # fmt: skip


@st.composite
def models(draw: st.DrawFn, max_steps: int = 14) -> ir.Model:
    """Random models with input x of shape [b, s, 4]."""
    number = st.integers(0, 30)
    steps = draw(st.lists(st.tuples(st.sampled_from(KINDS), number, number), min_size=1, max_size=max_steps))
    builder = _Builder(draw(st.integers(0, 3)))
    for step in steps:
        builder.step(*step)
    return builder.model(draw(st.lists(st.integers(0, 60), min_size=1, max_size=3)) + [len(builder.values) - 1])
