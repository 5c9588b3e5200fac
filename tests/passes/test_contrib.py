"""raise-contrib: each of ONNX Runtime's operators against its own kernel, or its definition where the CPU has none."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import op_types, reference_outputs
from onnx import TensorProto, helper, numpy_helper

from graphopt.passes.base import Site
from graphopt.passes.raise_.contrib import RaiseContrib
from graphopt.passes.raise_.contrib_rules import RULES
from graphopt.verification.structure import check_structure

MS = "com.microsoft"
WITHOUT_KERNEL = (
    "BiasSplitGelu", "GemmFastGelu", "FusedMatMulActivation", "GroupNorm", "SkipGroupNorm", "BiasSoftmax", "BiasAdd",
    "BiasDropout", "BitmaskDropout", "BitmaskBiasDropout",
)  # fmt: skip
Arrays = list[np.ndarray | None]


def model_of(
    op_type: str,
    arrays: Arrays,
    attributes: Mapping[str, Any] | None = None,
    *,
    outputs: int = 1,
    read: tuple[int, ...] = (0,),
    constant: tuple[int, ...] = (),
    opset: int = 23,
) -> ir.Model:
    """One contributed node: arrays are its inputs (None: left out), those in `constant` are initializers."""
    names = ["" if array is None else f"i{index}" for index, array in enumerate(arrays)]
    results = [f"o{index}" if index in read else f"unused{index}" for index in range(outputs)]
    node = helper.make_node(op_type, names, results, "site", domain=MS, **(attributes or {}))
    inputs, initializers = [], []
    for index, array in enumerate(arrays):
        if array is None:
            continue
        if index in constant:
            initializers.append(numpy_helper.from_array(array, f"i{index}"))
        else:
            kind = helper.np_dtype_to_tensor_dtype(array.dtype)
            shape = [f"d{index}_{axis}" for axis in range(array.ndim)]
            inputs.append(helper.make_tensor_value_info(f"i{index}", kind, shape))
    dtype = next(a.dtype for a in arrays if a is not None and a.dtype.kind not in "iub")
    made = [
        helper.make_tensor_value_info(
            f"o{index}",
            TensorProto.INT32
            if (op_type, index) == ("EmbedLayerNormalization", 1)
            else helper.np_dtype_to_tensor_dtype(dtype),
            None,
        )
        for index in read
    ]
    graph = helper.make_graph([node], "g", inputs, made, initializers)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(MS, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))
    # The checker wants ranks: those of the kernel's results, or of the first input where there is no kernel.
    given = {value.name: arrays[int(value.name[1:])] for value in model.graph.inputs}
    found = run(model, given) if op_type not in WITHOUT_KERNEL else [arrays[0]] * len(read)
    for value, array in zip(model.graph.outputs, found, strict=True):
        value.shape = ir.Shape([f"{value.name}_{axis}" for axis in range(array.ndim)])
    return model


def feeds_of(model: ir.Model, arrays: Arrays) -> dict[str, np.ndarray]:
    return {value.name: arrays[int(value.name[1:])] for value in model.graph.inputs}


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def raised(model: ir.Model, operators: list[str] | None = None, **options: Any) -> ir.Model:
    """The model after the pass, which is valid, standard, and finds nothing in a second run."""
    after = model.clone()
    rule = RaiseContrib(**options)
    assert rule(after).modified, [site.detail for site in rule.sites]
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert check_structure(after) == []
    assert MS not in after.graph.opset_imports
    assert not RaiseContrib(**options)(after).modified
    again = model.clone()
    RaiseContrib(**options)(again)
    assert ir.to_proto(again) == ir.to_proto(after)
    if operators is not None:
        assert sorted(op_types(after)) == sorted(operators)
    return after


def left(model: ir.Model) -> str:
    rule = RaiseContrib()
    before = op_types(model)
    assert not rule(model).modified
    assert op_types(model) == before
    (site,) = rule.sites
    assert isinstance(site, Site)
    return site.detail


RNG = np.random.default_rng(0)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return RNG.normal(size=shape).astype(dtype)


def ids(*shape: int, below: int) -> np.ndarray:
    return RNG.integers(0, below, size=shape).astype(np.int32)


X = normal(2, 3, 8)
GAIN, SHIFT, BIAS = normal(8), normal(8), normal(8)
IMAGE = normal(2, 4, 6, 6)
WEIGHT, CHANNELS = normal(5, 4, 3, 3), normal(5)
CONV = [IMAGE, WEIGHT, CHANNELS]
PADS = {"pads": [1, 1, 1, 1]}
MATRICES: Arrays = [normal(3, 4), normal(4, 5), normal(5)]
EMBED: Arrays = [ids(2, 5, below=9), ids(2, 5, below=2), normal(9, 8), normal(12, 8), normal(2, 8), GAIN, SHIFT]
TABLES = {"constant": (2, 3, 4, 5, 6)}
MASK = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], np.int32)

KERNELS: list[tuple[str, Arrays, dict[str, Any], dict[str, Any], list[str]]] = [
    ("Gelu", [X], {}, {}, ["Gelu"]),
    ("BiasGelu", [X, BIAS], {}, {}, ["Add", "Gelu"]),
    ("FastGelu", [X], {}, {}, ["Gelu"]),
    ("FastGelu", [X, BIAS], {}, {}, ["Add", "Gelu"]),
    ("QuickGelu", [X], {}, {}, ["Mul", "Sigmoid", "Mul"]),
    ("QuickGelu", [X], {"alpha": 1.0}, {}, ["Sigmoid", "Mul"]),
    ("QuickGelu", [X], {"alpha": -0.5}, {}, ["Mul", "Sigmoid", "Mul"]),
    ("FusedMatMul", [normal(2, 3, 4), normal(2, 4, 5)], {"alpha": 0.125}, {}, ["MatMul", "Mul"]),
    ("FusedMatMul", [normal(2, 4, 3), normal(2, 4, 5)], {"transA": 1}, {}, ["Transpose", "MatMul"]),
    ("FusedMatMul", [normal(2, 3, 4), normal(5, 4)], {"transB": 1}, {}, ["Transpose", "MatMul"]),
    ("FusedMatMul", [normal(4), normal(4, 5)], {"transA": 1}, {}, ["MatMul"]),
    ("FusedMatMul", [normal(3, 2, 4), normal(2, 4, 5)], {"transBatchA": 1}, {}, ["Transpose", "MatMul"]),
    ("FusedMatMul", [normal(4, 2, 3), normal(2, 4, 5)], {"transBatchA": 1, "transA": 1}, {}, ["Transpose", "MatMul"]),
    (
        "FusedMatMul",
        [normal(2, 6, 3, 4), normal(5, 2, 6, 4)],
        {"transBatchB": 1, "transB": 1, "alpha": 2.0},
        {},
        ["Transpose", "MatMul", "Mul"],
    ),
    ("TransposeMatMul", [normal(4, 3), normal(4, 5)], {"transA": 1}, {}, ["Transpose", "MatMul"]),
    *[
        ("FusedGemm", MATRICES, {"activation": name, **given}, {}, ["Gemm", name])
        for name, given in [
            *((name, {}) for name in ("Relu", "Sigmoid", "Tanh", "Softplus", "Softsign")),
            *((name, {"activation_alpha": 0.3}) for name in ("LeakyRelu", "Elu", "ThresholdedRelu", "Celu")),
            ("HardSigmoid", {"activation_alpha": 0.3, "activation_beta": 0.4}),
            ("Selu", {"activation_alpha": 1.5, "activation_gamma": 1.2}),
        ]
    ],
    (
        "FusedGemm",
        [normal(4, 3), normal(5, 4), normal(3, 1)],
        {"activation": "Relu", "transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0},
        {},
        ["Gemm", "Relu"],
    ),
    ("FusedGemm", MATRICES[:2], {"activation": "Relu"}, {}, ["Gemm", "Relu"]),
    ("FusedConv", CONV, PADS, {}, ["Conv"]),
    ("FusedConv", [IMAGE, WEIGHT], {"activation": "Relu", "strides": [2, 2]}, {}, ["Conv", "Relu"]),
    ("FusedConv", CONV, {"activation": "Tanh", "auto_pad": "SAME_UPPER"}, {}, ["Conv", "Tanh"]),
    ("FusedConv", CONV, {"activation": "Sigmoid", **PADS}, {}, ["Conv", "Sigmoid"]),
    ("FusedConv", CONV, {"activation": "LeakyRelu", "activation_params": [0.2]}, {}, ["Conv", "LeakyRelu"]),
    ("FusedConv", CONV, {"activation": "Clip", "activation_params": [-0.5, 1.5]}, {}, ["Conv", "Clip"]),
    ("FusedConv", CONV, {"activation": "HardSigmoid", "activation_params": [0.2, 0.6]}, {}, ["Conv", "HardSigmoid"]),
    ("FusedConv", [*CONV, normal(2, 5, 6, 6)], {"activation": "Relu", **PADS}, {}, ["Conv", "Add", "Relu"]),
    (
        "FusedConv",
        [IMAGE, WEIGHT, None, normal(2, 5, 6, 6)],
        {"activation": "Relu", **PADS},
        {},
        ["Conv", "Add", "Relu"],
    ),
    ("SkipLayerNormalization", [X, normal(2, 3, 8), GAIN, SHIFT], {}, {}, ["Add", "LayerNormalization"]),
    ("SkipLayerNormalization", [X, normal(3, 8), GAIN], {"epsilon": 0.1}, {}, ["Add", "LayerNormalization"]),
    (
        "SkipLayerNormalization",
        [X, normal(1, 3, 8), GAIN, SHIFT, BIAS],
        {"epsilon": 1e-5},
        {"outputs": 4, "read": (0, 3)},
        ["Add", "Add", "LayerNormalization"],
    ),
    (
        "SkipSimplifiedLayerNormalization",
        [X, normal(2, 3, 8), GAIN],
        {"epsilon": 1e-6},
        {"outputs": 4, "read": (0, 3)},
        ["Add", "RMSNormalization"],
    ),
    (
        "SkipSimplifiedLayerNormalization",
        [X, normal(2, 3, 8), GAIN, BIAS],
        {"epsilon": 1e-6},
        {},
        ["Add", "Add", "RMSNormalization"],
    ),
    (
        "EmbedLayerNormalization",
        [*EMBED, MASK],
        {"epsilon": 1e-5},
        {"outputs": 3, "read": (0, 1, 2), **TABLES},
        ["Gather"] * 2 + ["Shape", "Slice"] + ["Add"] * 2 + ["LayerNormalization", "Equal", "Cast", "ReduceSum"],
    ),
    (
        "EmbedLayerNormalization",
        [*EMBED, None, ids(2, 5, below=12)],
        {},
        {"outputs": 2, **TABLES},
        ["Gather"] * 3 + ["Add"] * 2 + ["LayerNormalization"],
    ),
    (
        "EmbedLayerNormalization",
        [*EMBED, None, ids(1, 5, below=12)],
        {},
        {"outputs": 2, "read": (0, 1), **TABLES},
        ["Gather"] * 3 + ["Add"] * 2 + ["LayerNormalization", "Shape", "ConstantOfShape"],
    ),
    (
        "EmbedLayerNormalization",
        [EMBED[0], None, *EMBED[2:4], None, *EMBED[5:]],
        {},
        {"outputs": 2, **TABLES},
        ["Gather", "Shape", "Slice", "Add", "LayerNormalization"],
    ),
    ("Trilu", [normal(3, 4)], {"upper": 0}, {}, ["Trilu"]),
    ("GatherND", [normal(3, 4), ids(2, 1, below=3)], {}, {}, ["Cast", "GatherND"]),
    ("GatherND", [normal(3, 4), ids(2, 2, below=3).astype(np.int64)], {}, {}, ["GatherND"]),
    ("ExpandDims", [normal(3, 4), np.array(-1, np.int32)], {}, {"constant": (1,)}, ["Unsqueeze"]),
    ("Range", [np.array(1, np.float32), np.array([9], np.float32)], {}, {}, ["Squeeze"] * 2 + ["Range"]),
    ("Range", [np.array(a, np.float32) for a in (1, 4, 0.5)], {}, {"constant": (0, 1, 2)}, ["Range"]),
    ("Pad", [normal(2, 3), np.array([0, 1, 2, 0])], {"mode": "constant"}, {"constant": (1,)}, ["Pad"]),
    ("Pad", [normal(2, 3), np.array([[0, 1, 1, 0]]), np.ones(1, np.float32)], {}, {}, ["Reshape", "Squeeze", "Pad"]),
]


@pytest.mark.parametrize(
    ("op_type", "arrays", "attributes", "shape", "operators"),
    KERNELS,
    ids=[f"{case[0]}-{number}" for number, case in enumerate(KERNELS)],
)
def test_against_the_kernel(
    op_type: str, arrays: Arrays, attributes: dict[str, Any], shape: dict[str, Any], operators: list[str]
) -> None:
    before = model_of(op_type, arrays, attributes, **shape)
    feeds = feeds_of(before, arrays)
    after = raised(before, operators)
    for expected, got in zip(run(before, feeds), run(after, feeds), strict=True):
        assert expected.shape == got.shape
        assert expected.dtype == got.dtype
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


HALF = {"Gelu", "BiasGelu", "FastGelu", "QuickGelu", "FusedMatMul", "FusedConv", "SkipLayerNormalization"} | {
    "SkipSimplifiedLayerNormalization"
}


@pytest.mark.parametrize("op_type", sorted(HALF))
def test_in_float16(op_type: str) -> None:
    _, arrays, attributes, shape, _ = next(case for case in reversed(KERNELS) if case[0] == op_type)
    halves = [None if array is None else array.astype(np.float16) for array in arrays]
    before = model_of(op_type, halves, attributes, **shape)
    feeds = feeds_of(before, halves)
    for expected, got in zip(run(before, feeds), run(raised(before), feeds), strict=True):
        assert got.dtype == np.float16
        np.testing.assert_allclose(got.astype(float), expected.astype(float), rtol=4e-3, atol=4e-3)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def tanh_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:
    raised_to = np.exp(x - x.max(axis=-1, keepdims=True))
    return raised_to / raised_to.sum(axis=-1, keepdims=True)


def group_norm(x: np.ndarray, gain: np.ndarray, shift: np.ndarray, groups: int, silu: bool) -> np.ndarray:
    """Of channels in the last axis."""
    parts = x.reshape(x.shape[0], -1, groups, x.shape[-1] // groups)
    mean, variance = parts.mean(axis=(1, 3), keepdims=True), parts.var(axis=(1, 3), keepdims=True)
    y = ((parts - mean) / np.sqrt(variance + float(np.float32(1e-5)))).reshape(x.shape) * gain + shift
    return y / (1 + np.exp(-y)) if silu else y


D8, D2 = normal(8, dtype=float), normal(8, dtype=float)
D = normal(2, 3, 8, dtype=float)
F, F8 = X, BIAS
PIXELS = normal(2, 5, 6, 8, dtype=float)
FIRST = np.ascontiguousarray(np.moveaxis(PIXELS, -1, 1))
RESIDUAL = normal(2, 8, dtype=float)
TWO = {"groups": 2, "activation": 1}

DEFINITIONS: list[tuple[str, Arrays, dict[str, Any], dict[str, Any], Callable[[], list[np.ndarray]]]] = [
    ("BiasSplitGelu", [D, D8], {}, {}, lambda: [(D + D8)[..., :4] * gelu((D + D8)[..., 4:])]),
    ("GemmFastGelu", [F, np.outer(F8, F8)], {}, {}, lambda: [tanh_gelu(F @ np.outer(F8, F8))]),
    ("GemmFastGelu", [F, np.outer(F8, F8), F8], {}, {}, lambda: [tanh_gelu(F @ np.outer(F8, F8) + F8)]),
    (
        "FusedMatMulActivation",
        [D, D],
        {"transB": 1, "alpha": 0.5, "activation": "Softmax", "activation_axis": -1},
        {},
        lambda: [softmax(0.5 * D @ D.transpose(0, 2, 1))],
    ),
    ("GroupNorm", [PIXELS, D8, D2], TWO, {}, lambda: [group_norm(PIXELS, D8, D2, 2, True)]),
    (
        "GroupNorm",
        [FIRST, D8, D2],
        {"groups": 4, "activation": 0, "channels_last": 0},
        {},
        lambda: [np.moveaxis(group_norm(PIXELS, D8, D2, 4, False), -1, 1)],
    ),
    (
        "SkipGroupNorm",
        [PIXELS, D8, D2, RESIDUAL, D8],
        TWO,
        {"outputs": 2, "read": (0, 1)},
        lambda: [
            group_norm(PIXELS + RESIDUAL[:, None, None] + D8, D8, D2, 2, True),
            PIXELS + RESIDUAL[:, None, None] + D8,
        ],
    ),
    (
        "SkipGroupNorm",
        [FIRST, D8, D2, FIRST, D8],
        {**TWO, "channels_last": 0},
        {"outputs": 2},
        lambda: [np.moveaxis(group_norm(2 * PIXELS + D8, D8, D2, 2, True), -1, 1)],
    ),
    ("BiasSoftmax", [D, D8], {"axis": 2, "is_inner_broadcast": 0}, {}, lambda: [softmax(D + D8)]),
    (
        "BiasSoftmax",
        [D, D[:, :1]],
        {"axis": 1, "is_inner_broadcast": 1},
        {},
        lambda: [softmax((D + D[:, :1]).reshape(2, -1)).reshape(2, 3, 8)],
    ),
    ("BiasAdd", [D, D8, D], {}, {}, lambda: [D + D8 + D]),
    ("BiasDropout", [D, D8], {}, {"outputs": 2}, lambda: [D + D8]),
    ("BitmaskBiasDropout", [D, D8, D], {"seed": 1}, {"outputs": 2}, lambda: [D + D8 + D]),
    ("BiasDropout", [D, D8, None, np.array(0.5), np.array(False)], {}, {"constant": (3, 4)}, lambda: [D + D8]),
    ("BitmaskDropout", [D], {}, {"outputs": 2}, lambda: [D]),
]


@pytest.mark.parametrize(
    ("op_type", "arrays", "attributes", "shape", "definition"),
    DEFINITIONS,
    ids=[f"{case[0]}-{number}" for number, case in enumerate(DEFINITIONS)],
)
def test_against_the_definition(
    op_type: str,
    arrays: Arrays,
    attributes: dict[str, Any],
    shape: dict[str, Any],
    definition: Callable[[], list[np.ndarray]],
) -> None:
    assert op_type in WITHOUT_KERNEL
    before = model_of(op_type, arrays, attributes, **shape)
    after = raised(before)
    for expected, got in zip(definition(), reference_outputs(after, feeds_of(before, arrays)), strict=True):
        # The standard computes a GroupNormalization in float32, and holds the constants of the tanh form in it.
        rounded = "GroupNorm" in op_type or op_type == "GemmFastGelu"
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=3e-6 if rounded else 1e-12)


def test_group_norm_in_half_precision_computes_in_the_type_of_its_gain() -> None:
    before = model_of("GroupNorm", [PIXELS.astype(np.float16), D8.astype(np.float32), D2.astype(np.float32)], TWO)
    after = raised(before, ["Cast", "Transpose", "GroupNormalization", "Transpose", "Sigmoid", "Mul", "Cast"])
    (got,) = reference_outputs(
        after, {"i0": PIXELS.astype(np.float16), "i1": D8.astype(np.float32), "i2": D2.astype(np.float32)}
    )
    assert got.dtype == np.float16
    np.testing.assert_allclose(got, group_norm(PIXELS, D8, D2, 2, True), rtol=1e-2, atol=1e-2)


def test_every_rule_has_a_case() -> None:
    assert {case[0] for case in KERNELS} | {case[0] for case in DEFINITIONS} == set(RULES)


# ---- what stays


def test_left_where_the_mean_is_read() -> None:
    before = model_of("SkipLayerNormalization", [X, X, GAIN], {}, outputs=2)
    mean = before.graph.node(0).outputs[1]
    mean.type, mean.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 3, 1])
    before.graph.outputs.append(mean)
    assert "its output 1, 'unused1', is used too" in left(before)


def test_left_where_a_dropout_mask_is_read() -> None:
    before = model_of("BiasDropout", [D, D8], {}, outputs=2)
    mask = before.graph.node(0).outputs[1]
    mask.type, mask.shape = ir.TensorType(ir.DataType.BOOL), ir.Shape([2, 3, 8])
    before.graph.outputs.append(mask)
    assert "its output 1" in left(before)


@pytest.mark.parametrize(("constant", "value"), [((3, 4), True), ((3,), False)])
def test_left_where_a_dropout_may_train(constant: tuple[int, ...], value: bool) -> None:
    arrays = [D, D8, None, np.array(0.5), np.array(value)]
    assert "may be in training mode" in left(model_of("BiasDropout", arrays, constant=constant))


@pytest.mark.parametrize(
    ("op_type", "arrays", "opset", "needed"),
    [
        ("BiasGelu", [X, BIAS], 19, 20),
        ("SkipSimplifiedLayerNormalization", [X, X, GAIN], 22, 23),
        ("SkipLayerNormalization", [X, X, GAIN], 16, 17),
    ],
)
def test_left_below_the_opset(op_type: str, arrays: Arrays, opset: int, needed: int) -> None:
    reason = left(model_of(op_type, arrays, opset=opset))
    assert reason == f"needs opset {needed}, the model has {opset}: run convert-opset first"


def test_left_in_bfloat16() -> None:
    before = model_of("SkipLayerNormalization", [X, X, GAIN])
    for value in before.graph.inputs:
        value.type = ir.TensorType(ir.DataType.BFLOAT16)
    before.graph.outputs[0].type = ir.TensorType(ir.DataType.BFLOAT16)
    assert "in bfloat16 ONNX Runtime's CPU has a kernel for it and none for Add" in left(before)
    raised(before, ["Add", "LayerNormalization"], bfloat16=True)


def test_left_in_float64() -> None:
    assert "0.044715 in float32" in left(model_of("FastGelu", [D]))
    before = model_of("SkipSimplifiedLayerNormalization", [X, X, GAIN])
    for value in (*before.graph.inputs, *before.graph.outputs):
        value.type = ir.TensorType(ir.DataType.DOUBLE)
    assert "RMSNormalization in float32" in left(before)


def test_left_with_an_activation_of_no_standard() -> None:
    before = model_of("FusedGemm", MATRICES, {"activation": "Relu"})
    before.graph.node(0).attributes["activation"] = ir.AttrString("activation", "ScaledTanh")
    assert "'ScaledTanh' isn't one of the ONNX standard" in left(before)
    before = model_of("FusedConv", CONV, {"activation": "Relu"})
    before.graph.node(0).attributes["activation"] = ir.AttrString("activation", "Clip")
    assert "'Clip' with 0 parameters" in left(before)


def test_left_where_the_rank_is_not_known() -> None:
    before = model_of("FusedMatMul", [normal(3, 4), normal(5, 4)], {"transB": 1})
    before.graph.inputs[1].shape = None
    assert "the rank of 'i1' isn't known" in left(before)


def test_left_where_a_bias_is_spread_over_inner_axes() -> None:
    before = model_of("BiasSoftmax", [D, D[:, 0]], {"axis": 2, "is_inner_broadcast": 1})
    assert "spread over inner axes" in left(before)


@pytest.mark.parametrize(
    ("op_type", "domain", "reason"),
    [
        ("MatMulNBits", MS, "is quantized arithmetic"),
        ("DynamicQuantizeMatMul", MS, "is quantized arithmetic"),
        ("Inverse", MS, "has no counterpart"),
        ("Conv", f"{MS}.nchwc", "has its data in the layout of one machine"),
    ],
)
def test_operators_that_stay(op_type: str, domain: str, reason: str) -> None:
    before = model_of("Gelu", [X])
    node = before.graph.node(0)
    node.op_type, node.domain = op_type, domain
    before.graph.opset_imports[domain] = 1
    assert reason in left(before)


@pytest.mark.parametrize("op_type", ["MultiHeadAttention", "QAttention", "PagedAttention", "RotaryEmbedding"])
def test_attention_is_for_other_passes(op_type: str) -> None:
    before = model_of("Gelu", [X])
    before.graph.node(0).op_type = op_type
    rule = RaiseContrib()
    assert not rule(before).modified
    assert rule.sites == []


def test_a_function_of_that_name_is_no_operator_of_the_runtime() -> None:
    text = """<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
    g (float[2] x) => (float[2] y) { y = com.microsoft.Gelu(x) }
    <domain: "com.microsoft", opset_import: ["": 23]> Gelu (a) => (b) { b = Neg(a) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rule = RaiseContrib()
    assert not rule(model).modified
    assert rule.sites == []


def test_left_where_the_caller_of_a_function_sets_an_attribute() -> None:
    text = """<ir_version: 10, opset_import: ["": 23, "local": 1, "com.microsoft": 1]>
    g (float[2] x) => (float[2] y) { y = local.f<a = 1.0>(x) }
    <domain: "local", opset_import: ["": 23, "com.microsoft": 1]> f <a> (x) => (y) {
        y = com.microsoft.QuickGelu<alpha: float = @a>(x) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rule = RaiseContrib()
    assert not rule(model).modified
    assert [site.detail for site in rule.sites] == [
        "the caller of its function sets an attribute of it: inline functions first"
    ]


# ---- where it stands


def test_in_a_branch_and_in_a_function() -> None:
    text = """<ir_version: 10, opset_import: ["": 23, "local": 1, "com.microsoft": 1]>
    g (bool c, float[2, 4] x, float[4] b) => (float[2, 4] y, float[2, 4] z) {
        y = If (c) <
            then_branch = t () => (float[2, 4] u) { u = com.microsoft.BiasGelu(x, b) },
            else_branch = e () => (float[2, 4] v) { v = Neg(x) }>
        z = local.f(x, b)
    }
    <domain: "local", opset_import: ["": 23, "com.microsoft": 1]> f (x, b) => (y) {
        y = com.microsoft.FusedGemm<activation = "HardSigmoid", transB = 1, activation_beta = 0.4>(x, x, b) }"""
    before = ir.from_proto(onnx.parser.parse_model(text.replace('b) }"', 'b) }"')))
    after = before.clone()
    rule = RaiseContrib()
    assert rule(after).modified
    onnx.checker.check_model(ir.to_proto(after))
    branch = after.graph.node(0).attributes["then_branch"].as_graph()
    assert [node.op_type for node in branch] == ["Add", "Gelu"]
    (function,) = after.functions.values()
    assert [node.op_type for node in function] == ["Gemm", "HardSigmoid"]
    assert MS not in function.opset_imports


def test_the_bias_goes_beside_the_product_it_came_from() -> None:
    text = """<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
    g (float[B, S, 4] x) => (float[B, S, 4] y, float[B, S, 4] s)
    <float[4, 4] w = {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7}, float[4] gain = {1,2,3,4}, float[4] bias = {1,0,1,2}> {
        p = MatMul(x, w)
        y, m, d, s = com.microsoft.SkipLayerNormalization<epsilon = 0.01>(x, p, gain, , bias)
    }"""
    before = ir.from_proto(onnx.parser.parse_model(text))
    after = raised(before, ["MatMul", "Add", "Add", "LayerNormalization"])
    biased, total = (node for node in after.graph if node.op_type == "Add")
    assert biased.inputs[0].producer().op_type == "MatMul"
    assert [value.name for value in after.graph.outputs] == ["y", "s"]
    assert total.outputs[0].name == "s"
    feeds = {"x": normal(2, 3, 4)}
    for expected, got in zip(run(before, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_dropout_of_a_graph_input_keeps_the_name_of_the_output() -> None:
    after = raised(model_of("BitmaskDropout", [D]), ["Identity"])
    assert after.graph.outputs[0].name == "o0"
