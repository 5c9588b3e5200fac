"""Random graphs of shape arithmetic, for property tests: integer vectors and scalars made from the shapes of inputs."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import strategies as st

STEPS = ["shape", "gather", "slice", "concat", "add", "sub", "mul", "div", "min", "max", "where", "unsqueeze", "squeeze",
         "prod", "reshape", "reverse", "tile", "range", "expand", "transpose", "cast", "less"]  # fmt: skip


class ShapeArithmetic:
    """Grows a graph of shape arithmetic from random choices; keeps int64 vectors, scalars and data tensors."""

    def __init__(self, draw):
        self.draw, self.nodes, self.constants = draw, [], []
        self.vectors, self.scalars, self.tensors = [], [], ["x", "z"]

    def name(self):
        return f"v{len(self.nodes) + len(self.constants)}"

    def node(self, op_type, inputs, **attributes):
        name = self.name()
        self.nodes.append(onnx.helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def constant(self, numbers):
        name = self.name()
        self.constants.append(onnx.numpy_helper.from_array(np.array(numbers, dtype=np.int64), name))
        return name

    def pick(self, pool):
        return self.draw(st.sampled_from(pool))

    def integer(self, low, high):
        return self.draw(st.integers(low, high))

    def step(self):
        kind = self.pick(STEPS)
        if kind == "shape" or not self.vectors or not self.scalars:
            vector = self.node("Shape", [self.pick(self.tensors)], start=self.integer(0, 1))
            self.vectors.append(vector)
            self.scalars.append(self.node("Gather", [vector, self.constant(0)]))
            return
        v, w, s, t = (self.pick(p) for p in (self.vectors, self.vectors, self.scalars, self.scalars))
        match kind:
            case "gather":
                self.scalars.append(self.node("Gather", [v, self.constant(self.integer(-1, 0))]))
            case "slice":
                bounds = [self.constant([n]) for n in (self.integer(-2, 1), self.integer(-1, 4), 0)]
                self.vectors.append(self.node("Slice", [v, *bounds]))
            case "reverse":
                bounds = [self.constant([n]) for n in (-1, -(2**31), 0, -1)]
                self.vectors.append(self.node("Slice", [v, *bounds]))
            case "concat":
                self.vectors.append(self.node("Concat", [v, w], axis=0))
            case "add" | "sub" | "mul" | "min" | "max":
                self.scalars.append(self.node(kind.capitalize(), [s, t]))
                self.vectors.append(self.node(kind.capitalize(), [v, s]))
            case "div":
                self.scalars.append(self.node("Div", [s, self.constant(self.integer(1, 4))]))
            case "where":
                other = self.constant(self.integer(-1, 2))
                self.vectors.append(self.node("Where", [self.node("Equal", [v, other]), s, v]))
            case "less":
                self.scalars.append(self.node("Cast", [self.node("Less", [s, t])], to=7))
            case "unsqueeze":
                self.vectors.append(self.node("Unsqueeze", [s, self.constant([0])]))
            case "squeeze":
                self.scalars.append(self.node("Squeeze", [self.node("Unsqueeze", [s, self.constant([0])])]))
            case "prod":
                op_type = self.pick(["ReduceProd", "ReduceSum", "ReduceMin", "ReduceMax"])
                self.scalars.append(self.node(op_type, [v], keepdims=0))
            case "cast":
                self.scalars.append(self.node("Cast", [self.node("Cast", [s], to=6)], to=7))
            case "reshape":
                target = self.pick([[-1], [0, -1], [1, -1], [-1, 1]])
                self.tensors.append(self.node("Reshape", [self.pick(self.tensors), self.constant(target)]))
            case "tile":
                self.vectors.append(self.node("Tile", [v, self.constant([self.integer(0, 2)])]))
            case "range":
                self.vectors.append(self.node("Range", [self.constant(0), s, self.constant(self.integer(1, 3))]))
            case "expand":
                one = self.constant([1])
                self.tensors.append(self.node("Expand", [one, self.node("Max", [v, self.constant(0)])]))
            case "transpose":
                self.tensors.append(self.node("Transpose", [self.pick(self.tensors)]))

    @property
    def names(self):
        """All values that nodes make."""
        return [n.output[0] for n in self.nodes]

    def model(self):
        """A model of inputs x [n, n] and z [n, 3, n] (one name for sizes that differ), all values being outputs."""
        make = onnx.helper.make_tensor_value_info
        inputs = [make("x", 1, ["n", "n"]), make("z", 1, ["n", 3, "n"])]
        outputs = [onnx.ValueInfoProto(name=n) for n in self.names]
        graph = onnx.helper.make_graph(self.nodes, "g", inputs, outputs, self.constants)
        return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
