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
                self.add(
                    self.node(op, operands[::-1] if argument % 3 == 0 and op in ("Add", "Mul") else operands), shape
                )
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
                square = (
                    self.node("Pow", [centred, self.scalar(2.0)]) if argument % 2 else self.node("Mul", [centred] * 2)
                )
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
            case "concat":
                axis = argument % len(shape)
                size = shape[axis]
                if isinstance(size, int) and len(shape) > 1:
                    wide = self.node(
                        "Concat", [name, self.node("Neg", [name]), name][: 1 + argument % 3], axis=axis - len(shape)
                    )
                    self.add(wide, (*shape[:axis], size * (1 + argument % 3), *shape[axis + 1 :]))
            case "split" if isinstance(last, int) and last >= 2:
                parts = [1, last - 1] if argument % 2 else [last - 1, 1]
                first = self.node("Split", [name, self.const(np.array(parts))], outputs=2, axis=-1)
                chosen = argument % 3 % 2
                self.add(first[:-1] + str(chosen), (*shape[:-1], parts[chosen]))
            case "where":
                condition = self.node("Greater", [name, self.scalar(0.1234567)])
                other = (self.scalar(-1.0), self.node("Neg", [name]), self.scalar(0.0))[argument % 3]
                self.add(self.node("Where", [condition, name, other]), shape)
            case "softmax":
                self.add(self.node("Softmax", [name], axis=argument % len(shape) - len(shape)), shape)
            case "clip":
                low = self.scalar(-0.5) if argument % 2 else ""
                self.add(self.node("Clip", [name, low, self.scalar(0.5)] if argument % 3 else [name, low]), shape)
            case "dropout":
                dropped = self.node("Dropout", [name, self.scalar(0.5)][: 1 + argument % 2], outputs=1 + argument % 2)
                self.add(dropped, shape)
            case "batch_norm" if len(shape) >= 2 and isinstance(shape[1], int):
                channels = shape[1]
                gain, bias, mean = (self.const(self.rng.normal(size=channels).astype(np.float32)) for _ in range(3))
                variance = self.const(self.rng.uniform(0.5, 2, size=channels).astype(np.float32))
                self.add(self.node("BatchNormalization", [name, gain, bias, mean, variance]), shape)
            case "conv" if len(shape) == 3 and isinstance(shape[1], int):
                weight = self.const(self.rng.normal(size=(WIDTH, shape[1], 1)).astype(np.float32))
                bias = [self.const(self.rng.normal(size=WIDTH).astype(np.float32))] if argument % 2 else []
                self.add(self.node("Conv", [name, weight, *bias]), (shape[0], WIDTH, shape[2]))
            case "mask":  # ones of a computed shape, the way exporters make masks
                target = self.node("Concat", self.shape_of(name, shape), axis=0)
                value = numpy_helper.from_array(np.array([1.0], dtype=np.float32))
                ones = self.node("ConstantOfShape", [target], value=value)
                if argument % 2:
                    ones = self.node("Where", [self.node("Equal", [ones, self.scalar(0.0)]), self.scalar(-1e9), ones])
                self.add(self.node("Mul", [name, ones]), shape)
            case "positions" if len(shape) >= 2:  # arange(size of an axis) broadcast along it
                axis = argument % len(shape)
                whole = self.node("Shape", [name])
                size = self.node("Gather", [whole, self.const(np.array(axis))], axis=0)
                steps = self.node("Range", [self.const(np.array(0)), size, self.const(np.array(1))])
                column = self.const(np.array([-1] + [1] * (len(shape) - axis - 1)))
                grid = self.node("Reshape", [self.node("Cast", [steps], to=TensorProto.FLOAT), column])
                self.add(self.node("Add", [name, grid]), shape)
            case "flatten" if len(shape) >= 3:  # [a, b, ...] to [a·b, ...] and back
                parts = self.shape_of(name, shape)
                merged = self.node("Mul", parts[:2])
                flat = self.node("Reshape", [name, self.node("Concat", [merged, *parts[2:]], axis=0)])
                back = [*parts[:2], self.const(np.array([-1]))] if isinstance(last, int) and len(shape) == 3 else parts
                if argument % 2:
                    flat = self.node("Tanh", [flat])
                self.add(self.node("Reshape", [flat, self.node("Concat", back, axis=0)]), shape)
            case "heads" if len(shape) == 3 and last == WIDTH:  # [b, s, 4] to [b, 2, s, 2] and back, as in attention
                b, s, _ = self.shape_of(name, shape)
                two = self.const(np.array([2]))
                four = self.const(np.array([WIDTH])) if argument % 2 else self.node("Mul", [two, two])
                split = self.node("Reshape", [name, self.node("Concat", [b, s, two, two], axis=0)])
                heads = self.node("Transpose", [split], perm=[0, 2, 1, 3])
                scores = self.node("MatMul", [heads, self.node("Transpose", [heads], perm=[0, 1, 3, 2])])
                mixed = self.node("MatMul", [self.node("Softmax", [scores], axis=-1), heads])
                merged = self.node("Transpose", [mixed], perm=[0, 2, 1, 3])
                self.add(self.node("Reshape", [merged, self.node("Concat", [b, s, four], axis=0)]), shape)
            case "repeat" if len(shape) >= 2:  # the repeat_kv of grouped-query attention
                parts = self.shape_of(name, shape)
                wide = self.node("Unsqueeze", [name, self.const(np.array([1]))])
                parts.insert(1, self.const(np.array([1 + argument % 2])))
                wide = self.node("Expand", [wide, self.node("Concat", parts, axis=0)])
                self.add(self.node("ReduceSum", [wide, self.const(np.array([1]))], keepdims=0), shape)
            case "constants":  # arithmetic on constants
                a, b = (self.const(self.rng.normal(size=WIDTH).astype(np.float32)) for _ in range(2))
                value = self.node(("Add", "Mul", "Sub")[argument % 3], [a, b])
                if last == WIDTH:
                    self.add(self.node("Add", [name, self.node("Neg", [value])]), shape)
            case "loop":
                bound = self.const(np.array(1 + argument % 3))
                i, c, v, d, w, o = (f"loop{self.count}_{n}" for n in "icvdwo")
                body = helper.make_graph(
                    [
                        helper.make_node("Identity", [c], [d]),
                        helper.make_node("Add", [v, name], [f"{w}_sum"]),
                        helper.make_node("Tanh", [f"{w}_sum"], [w]),
                        helper.make_node("Neg", [v], [o]),
                    ],
                    "body",
                    [
                        helper.make_tensor_value_info(i, TensorProto.INT64, []),
                        helper.make_tensor_value_info(c, TensorProto.BOOL, []),
                        helper.make_tensor_value_info(v, TensorProto.FLOAT, None),
                    ],
                    [
                        helper.make_tensor_value_info(d, TensorProto.BOOL, []),
                        helper.make_tensor_value_info(w, TensorProto.FLOAT, None),
                    ]
                    + [helper.make_tensor_value_info(o, TensorProto.FLOAT, None)] * (argument % 2),
                )
                self.add(
                    self.node("Loop", [bound, self.const(np.array(True)), name], outputs=1 + argument % 2, body=body),
                    shape,
                )
            case "if":
                condition = self.const(np.array(bool(argument % 2)))
                if argument % 3 == 0:
                    total = self.node("ReduceSum", [name], keepdims=0)
                    # Not 0: sums of centred values are 0 but for rounding, which would choose the branch.
                    condition = self.node("Greater", [total, self.scalar(0.1234567)])
                branches = {}
                for branch, op in (("then_branch", "Neg"), ("else_branch", "Identity")):
                    out = f"{branch}_{self.count}"
                    info = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
                    body = [helper.make_node(op, [name], [out], name=f"{out}_node")]
                    weights = []
                    if argument % 5 == 0:  # with a weight of its own
                        weights = [numpy_helper.from_array(np.array(0.5, dtype=np.float32), f"{out}_weight")]
                        body = [
                            helper.make_node("Mul", [name, f"{out}_weight"], [f"{out}_scaled"], name=f"{out}_mul"),
                            helper.make_node(op, [f"{out}_scaled"], [out], name=f"{out}_node"),
                        ]
                    branches[branch] = helper.make_graph(body, branch, [], [info], weights)
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
    "matmul", "layer_norm", "rms_norm", "gelu", "silu", "concat", "split", "where", "softmax", "clip", "dropout",
    "batch_norm", "conv", "mask", "positions", "flatten", "heads", "repeat", "constants", "loop", "if",
)  # fmt: skip


@st.composite
def models(draw: st.DrawFn, max_steps: int = 14) -> ir.Model:
    """Random models with input x of shape [b, s, 4]."""
    number = st.integers(0, 30)
    steps = draw(st.lists(st.tuples(st.sampled_from(KINDS), number, number), min_size=1, max_size=max_steps))
    builder = _Builder(draw(st.integers(0, 3)))
    for step in steps:
        builder.step(*step)
    return builder.model([*draw(st.lists(st.integers(0, 60), min_size=1, max_size=3)), len(builder.values) - 1])
