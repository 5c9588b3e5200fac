"""raise-contrib-attention: ONNX Runtime's attention operators against their own kernels, and as Attention of ai.onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import op_types
from onnx import helper, numpy_helper

from graphopt.passes.raise_.contrib_attention import RaiseContribAttention
from graphopt.verification.structure import check_structure

MS = "com.microsoft"
RNG = np.random.default_rng(0)
B, S, L, P, H, D = 3, 5, 7, 4, 2, 8
W = H * D
Array = np.ndarray


def normal(*shape: int) -> Array:
    return RNG.normal(size=shape).astype(np.float32)


def lengths(*counts: int, total: int) -> Array:
    return (np.arange(total) < np.array(counts)[:, None]).astype(np.int32)


def model_of(
    op_type: str,
    arrays: Mapping[int, Array],
    shapes: Mapping[int, Sequence[int | str]],
    attributes: Mapping[str, Any],
    outputs: int = 1,
    constant: Sequence[int] = (),
) -> ir.Model:
    """One node of com.microsoft; inputs have declared shapes, those in `constant` are initializers."""
    names = [f"i{index}" if index in arrays else "" for index in range(max(arrays) + 1)]
    node = helper.make_node(op_type, names, [f"o{i}" for i in range(outputs)], "site", domain=MS, **attributes)
    inputs, initializers = [], []
    for index, array in arrays.items():
        if index in constant:
            initializers.append(numpy_helper.from_array(array, f"i{index}"))
            continue
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        inputs.append(helper.make_tensor_value_info(f"i{index}", kind, shapes.get(index, array.shape)))
    dtype = helper.np_dtype_to_tensor_dtype(arrays[0].dtype)
    made = [
        helper.make_tensor_value_info(f"o{i}", dtype, ["a", "b", "c", "d"][: 4 if i else 3]) for i in range(outputs)
    ]
    graph = helper.make_graph([node], "g", inputs, made, initializers)
    imports = [helper.make_opsetid("", 23), helper.make_opsetid(MS, 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))


def run(model: ir.Model, feeds: Mapping[str, Array]) -> list[Array]:
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, ["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def raised(model: ir.Model) -> ir.Model:
    """The model after the pass: valid, without the domain, and found at rest by a second run."""
    after = model.clone()
    rule = RaiseContribAttention()
    assert rule(after).modified, [site.detail for site in rule.sites]
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert check_structure(after) == []
    assert MS not in after.graph.opset_imports
    assert not RaiseContribAttention()(after).modified
    again = model.clone()
    RaiseContribAttention()(again)
    assert ir.to_proto(again) == ir.to_proto(after)
    return after


def left(model: ir.Model) -> str:
    rule = RaiseContribAttention()
    before = ir.to_proto(model)
    assert not rule(model).modified
    assert ir.to_proto(model) == before
    (site,) = rule.sites
    return site.detail


BATCHED = {index: ["B", "S", W] for index in (0, 1, 2)}
PADDED = lengths(S, 3, 0, total=S)
PER_QUERY = RNG.integers(0, 2, size=(B, S, S)).astype(np.int32)
QKV = {0: normal(B, S, W), 1: normal(B, S, W), 2: normal(B, S, W)}
CROSSED = {0: normal(B, S, W), 1: normal(B, L, W), 2: normal(B, L, W)}
HEADED = {0: normal(B, S, W), 1: normal(B, H, L, D), 2: normal(B, H, L, D)}
PAST = {6: normal(B, H, P, D), 7: normal(B, H, P, D)}
BIAS = {3: normal(3 * W)}
CROSS_SHAPES = {0: ["B", "S", W], 1: ["B", "L", W], 2: ["B", "L", W]}
HEAD_SHAPES = {0: ["B", "S", W], 1: ["B", H, "L", D], 2: ["B", H, "L", D]}
PAST_SHAPES = {6: ["B", H, "P", D], 7: ["B", H, "P", D]}
ALL = np.array([S, 3, 0], dtype=np.int32)
LOWEST = np.where(PADDED[:, None, None, :] > 0, 0, np.finfo(np.float32).min).astype(np.float32)

MULTI_HEAD: dict[str, tuple[dict[int, Array], dict[int, Any], dict[str, Any], int]] = {
    "plain": (QKV, BATCHED, {}, 1),
    "scale": (QKV, BATCHED, {"scale": 0.3}, 1),
    "values of another size": (QKV | {2: normal(B, S, 3 * H)}, {0: ["B", "S", W], 1: ["B", "S", W]}, {}, 1),
    "presents without a past": (QKV | BIAS, BATCHED, {}, 3),
    "bias": (QKV | BIAS, BATCHED, {}, 1),
    "cross": (CROSSED, CROSS_SHAPES, {}, 1),
    "cross, bias": (CROSSED | BIAS, CROSS_SHAPES, {}, 1),
    "keys by heads": (HEADED, HEAD_SHAPES, {}, 1),
    "keys by heads, bias": (HEADED | BIAS, HEAD_SHAPES, {}, 1),
    "keys by heads, mask": (HEADED | {4: lengths(L, 2, 0, total=L)}, HEAD_SHAPES | {4: ["B", "L"]}, {}, 1),
    "mask": (QKV | {4: PADDED}, BATCHED | {4: ["B", "S"]}, {}, 1),
    "mask, other fill": (QKV | {4: PADDED}, BATCHED, {"mask_filter_value": -2.5}, 1),
    "mask, lowest fill": (QKV | {4: PADDED}, BATCHED, {"mask_filter_value": float(np.finfo(np.float32).min)}, 1),
    "mask per query": (QKV | {4: PER_QUERY}, BATCHED | {4: ["B", "S", "S"]}, {}, 1),
    "counts": (QKV | {4: ALL}, BATCHED | {4: ["B"]}, {}, 1),
    "bias of scores": (QKV | {5: normal(B, H, S, S)}, BATCHED, {}, 1),
    "bias of scores for all": (QKV | {5: normal(1, 1, S, S), 4: PADDED}, BATCHED, {}, 1),
    "lowest bias": (QKV | {5: np.broadcast_to(LOWEST, (B, 1, S, S)).copy()}, BATCHED, {}, 1),
    "lowest bias, mask": (QKV | {5: np.broadcast_to(LOWEST, (B, 1, S, S)).copy(), 4: PER_QUERY}, BATCHED, {}, 1),
    "causal": (QKV, BATCHED, {"unidirectional": 1}, 1),
    "causal, padded left": (QKV | {4: 1 - PADDED}, BATCHED, {"unidirectional": 1}, 1),
    "causal, mask per query": (QKV | {4: PER_QUERY}, BATCHED, {"unidirectional": 1}, 1),
    "past": (QKV | PAST, BATCHED | PAST_SHAPES, {}, 3),
    "past, causal": (QKV | PAST | BIAS, BATCHED | PAST_SHAPES, {"unidirectional": 1}, 3),
    "past, mask": (
        QKV | PAST | {4: lengths(P + S, 3, 0, total=P + S)},
        BATCHED | PAST_SHAPES | {4: ["B", "T"]},
        {"unidirectional": 1},
        3,
    ),
}


@pytest.mark.parametrize("case", MULTI_HEAD)
def test_multi_head_attention(case: str) -> None:
    arrays, shapes, attributes, outputs = MULTI_HEAD[case]
    model = model_of("MultiHeadAttention", arrays, shapes, {"num_heads": H} | attributes, outputs, [3])
    after = raised(model)
    assert op_types(after).count("Attention") == 1
    feeds = {value.name: arrays[int(value.name[1:])] for value in model.graph.inputs}
    for one, other in zip(run(model, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=5e-3 if 4 in arrays else 1e-5)


X, WEIGHTS = normal(B, S, 12), normal(12, 3 * W)
PACKED: dict[str, tuple[dict[int, Array], dict[str, Any]]] = {
    "plain": ({}, {}),
    "mask": ({3: PADDED}, {}),
    "mask per query": ({3: PER_QUERY}, {}),
    "counts": ({3: ALL}, {}),
    "scale": ({}, {"scale": 0.25}),
    "bias of scores": ({5: normal(B, H, S, S), 3: PADDED}, {}),
    "causal": ({3: 1 - PADDED}, {"unidirectional": 1}),
    "other sizes": ({1: normal(12, 2 * W + 6), 2: normal(2 * W + 6)}, {"qkv_hidden_sizes": [W, W, 6]}),
}


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("case", PACKED)
def test_attention(case: str, constant: bool) -> None:
    extra, attributes = PACKED[case]
    arrays = {0: X, 1: WEIGHTS, 2: normal(3 * W)} | extra
    shapes = {0: ["B", "S", 12]} | ({3: ["B"]} if case == "counts" else {})
    model = model_of("Attention", arrays, shapes, {"num_heads": H} | attributes, 1, [1, 2] if constant else [])
    after = raised(model)
    assert op_types(after).count("MatMul") == (3 if constant else 1)
    feeds = {value.name: arrays[int(value.name[1:])] for value in model.graph.inputs}
    (one,), (other,) = run(model, feeds), run(after, feeds)
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=5e-3 if 3 in arrays else 1e-5)
