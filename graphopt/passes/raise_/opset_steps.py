"""Which changes of the operators of the default domain are known, from opset 7 to 24.

Each change ("Pad 11": Pad as opset 11 redefined it) is of one of three kinds:

- in `COMPATIBLE`: a node that was right before means the same after, unchanged (more element types, attributes
  and inputs whose default is the old behaviour, clarified wording);
- in `ADAPTERS`: a function of `opset_adapters` rewrites the node;
- in neither: not known, and a model with such a node is left at its opset.

`OBSTACLES` holds the nodes of the first two kinds that can't be carried over, as functions that return the reason.
They see the node before anything was rewritten. The source is the operator changelog of the ONNX standard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.edits import Editor

Step = tuple[str, int]
"""An operator and the opset that redefined it."""

_COMPATIBLE_TEXT = """
    Abs 13; Acos 22; Acosh 22; Add 13 14; ArgMax 11 12 13; ArgMin 11 12 13; Asin 22; Asinh 22; Atan 22; Atanh 22;
    Attention 24; AveragePool 10 11 19 22; BatchNormalization 15; Bernoulli 22; Cast 9 13 19 21 23 24;
    CastLike 19 21 23 24; Ceil 13; Clip 12 13; Compress 11; Concat 11 13; Constant 9 11 12 13 19 21 23 24;
    ConstantOfShape 20 21 23 24; Conv 11 22; ConvTranspose 11 22; Cos 22; Cosh 22; CumSum 14; DeformConv 22;
    DepthToSpace 11 13; DequantizeLinear 13 19 21 23 24; Det 22; Div 13 14; Dropout 10 13 22; Elu 22;
    Equal 11 13 19; Erf 13; Exp 13; Expand 13; EyeLike 22; Flatten 9 11 13 21 23 24; Floor 13; GRU 14 22;
    Gather 11 13; GatherElements 13; GatherND 12 13; Gemm 9 11 13; GlobalAveragePool 22; GlobalLpPool 22;
    GlobalMaxPool 22; Greater 9 13; GreaterOrEqual 16; GridSample 22; HardSigmoid 22; HardSwish 22; Hardmax 11;
    Identity 13 14 16 19 21 23 24; If 11 13 16 19 21 23 24; InstanceNormalization 22; IsInf 20; IsNaN 13 20;
    LRN 13; LSTM 14 22; LayerNormalization 17; LeakyRelu 16; Less 9 13;
    LessOrEqual 16; Log 13; LogSoftmax 11; Loop 11 13 16 19 21 23 24;
    LpNormalization 22; LpPool 11 18 22; MatMul 9 13; Max 8 12 13; MaxPool 8 10 11 12 22; MaxRoiPool 22;
    MaxUnpool 11 22; Mean 8 13; Min 8 12 13; Mish 22; Mod 13; Mul 13 14;
    Multinomial 22; Neg 13; NegativeLogLikelihoodLoss 13 22; NonMaxSuppression 11; NonZero 13; OneHot 11;
    OptionalGetElement 18; OptionalHasElement 18; PRelu 9 16; Pad 13 18 19 21 23 24; Pow 12 13 15;
    QLinearMatMul 21; QuantizeLinear 13 19 21 23 24; RNN 14 22; RandomNormal 22; RandomNormalLike 22;
    RandomUniform 22; RandomUniformLike 22; Reciprocal 13; ReduceL1 11 13; ReduceL2 11 13; ReduceLogSum 11 13;
    ReduceLogSumExp 11 13; ReduceMax 11 12 13 20; ReduceMean 11 13; ReduceMin 11 12 13 20; ReduceProd 11 13;
    ReduceSum 11; ReduceSumSquare 11 13; Relu 13 14; Reshape 13 14 19 21 23 24; Resize 18 19; RoiAlign 22;
    Round 22; Scan 11 16 19 21 23 24; ScatterElements 13 16 18; ScatterND 13 16 18; Selu 22;
    Shape 13 15 19 21 23 24; Sigmoid 13; Sign 13; Sin 22; Sinh 22; Size 13 19 21 23 24; Slice 11 13; Softmax 11;
    SoftmaxCrossEntropyLoss 13; Softplus 22; Softsign 22; SpaceToDepth 13; Split 11; SplitToSequence 24; Sqrt 13;
    Squeeze 11 21 23 24; Sub 13 14; Sum 8 13; Tan 22; Tanh 13; ThresholdedRelu 22; Tile 13; TopK 11 24;
    Transpose 13 21 23 24; Unsqueeze 11 21 23 24; Where 16
"""
COMPATIBLE: frozenset[Step] = frozenset(
    (entry.split()[0], int(opset)) for entry in _COMPATIBLE_TEXT.split(";") for opset in entry.split()[1:]
)

RENAMED: dict[Step, str] = {("Upsample", 10): "Resize", ("Scatter", 11): "ScatterElements"}
"""Operators that the standard withdrew, by the step that withdrew them, and what took their place."""

OF_THE_RUNTIME = ("LayerNormalization", "SimplifiedLayerNormalization")
"""Operators that ONNX Runtime has in the default domain at every opset. Files that it optimized and saved hold them
below the opset that took one over unchanged (17), or where the standard never had it."""

WITHOUT_KERNEL: frozenset[Step] = frozenset(
    (op, 22)
    for op in (
        *("GlobalLpPool", "MaxRoiPool", "Multinomial", "RoiAlign"),
        *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli"),
    )
)
"""Steps after which ONNX Runtime 1.31 (CPU) can no longer run an operator that it runs in its older form."""


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What an adapter works with.

    Attributes:
        edit: The editor; its site is the node.
        facts: Shapes and types as they were inferred before the first edit.
        target: The opset that the model will have in the end.
    """

    edit: Editor
    facts: ShapeFacts
    target: int

    def integers(self, values: Any, name: str) -> ir.Value:
        """A constant of int64."""
        return self.edit.constant(np.asarray(values, dtype=np.int64), name)

    def number_like(self, number: float, value: ir.Value, name: str) -> ir.Value:
        """A scalar constant of the element type of `value`; where that isn't known it is cast at run time."""
        dtype = dtype_of(value, self.facts)
        array: npt.NDArray[Any] = np.asarray(number, dtype=np.float32 if dtype is None else dtype.numpy())
        constant = self.edit.constant(array, name)
        return constant if dtype is not None else self.edit.op("CastLike", [constant, value])

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let `new` take the place of `old`, and be known as well as it."""
        self.facts.learn(new, self.facts.fact_if_known(old))
        self.edit.replace(old, new)


def dtype_of(value: ir.Value | None, facts: ShapeFacts) -> ir.DataType | None:
    """The element type of `value`; None where it is omitted, or neither the graph nor the file says it."""
    return None if value is None else facts.dtype(value) or value.dtype


Adapter = Callable[[ir.Node, Conversion], None]
Obstacle = Callable[[ir.Node, ShapeFacts, int], "str | None"]

ADAPTERS: dict[Step, Adapter] = {}
OBSTACLES: dict[Step, list[Obstacle]] = {}
ASKS_TYPES: set[Step] = set()


def adapter(*steps: Step, reads: tuple[str, ...] = (), asks_types: bool = False) -> Callable[[Adapter], Adapter]:
    """Register an adapter of these steps.

    Args:
        steps: What it carries a node over.
        reads: The attributes whose values it has to know (a function's node may take them from a parameter).
        asks_types: Whether it asks for the element type or the rank of the node's first input.
    """

    def by_reference(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
        for name in reads:
            if name in node.attributes and node.attributes[name].is_ref():
                return f"takes its attribute '{name}' from the function that it is in"
        return None

    def register(function: Adapter) -> Adapter:
        for step in steps:
            ADAPTERS[step] = function
            if asks_types:
                ASKS_TYPES.add(step)
            if reads:
                OBSTACLES.setdefault(step, []).append(by_reference)
        return function

    return register


def obstacle(*steps: Step) -> Callable[[Obstacle], Obstacle]:
    """Register a reason for which some nodes can't be carried over these steps."""

    def register(function: Obstacle) -> Obstacle:
        for step in steps:
            OBSTACLES.setdefault(step, []).append(function)
        return function

    return register
