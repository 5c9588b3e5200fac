"""raise-contrib-attention: ONNX Runtime's attention operators against their own kernels, and as Attention of ai.onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import op_types, parse, reference_outputs, to_float64
from onnx import helper, numpy_helper
from tiny_transformers import exported, feeds

from graphopt.graph.assumptions import Assumptions, read
from graphopt.models import catalogue
from graphopt.passes.base import LOWERED
from graphopt.passes.lower.group_query_attention import GroupQueryAttention
from graphopt.passes.raise_.contrib import RaiseContrib
from graphopt.passes.raise_.contrib_attention import RaiseContribAttention
from graphopt.passes.raise_.convert_opset import ConvertOpset
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


def raising(*assumed: str) -> RaiseContribAttention:
    rule = RaiseContribAttention()
    rule.assumptions = Assumptions.parse(assumed)
    return rule


def raised(model: ir.Model, *assumed: str) -> ir.Model:
    """The model after the pass: valid, without the domain, and found at rest by a second run."""
    after = model.clone()
    rule = raising(*assumed)
    assert rule(after).modified, [site.detail for site in rule.sites]
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert check_structure(after) == []
    assert MS not in after.graph.opset_imports
    assert not raising(*assumed)(after).modified
    again = model.clone()
    raising(*assumed)(again)
    assert ir.to_proto(again) == ir.to_proto(after)
    return after


def sees_a_key(mask: Array | None, queries: int, keys: int, causal: bool) -> Array:
    """Whether each query has a key that nothing hides from it: bool [B, S]."""
    seen = np.tri(queries, keys, keys - queries, dtype=bool)[None] if causal else np.ones((1, queries, keys), bool)
    if mask is not None:
        counted = lengths(*mask, total=keys) if mask.ndim == 1 else mask
        seen = seen & (counted if counted.ndim == 3 else counted[:, None]).astype(bool)
    return np.broadcast_to(seen, (B, queries, keys)).any(-1)


def assert_attends_alike(got: Array, wanted: Array, sees: Array, values: Array) -> None:
    """The same numbers, but for queries that see no key.

    All of such a query's scores stand beside the fill, -10000, where float32 is a grid of 2^-10. Two additions
    (bias and mask) in two orders set a score apart by 4 halves of a step at most, δ = 2^-9, hence a weight by the
    factor e^2δ and an output by 2δ of the largest value.
    """
    np.testing.assert_allclose(got[sees], wanted[sees], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[~sees], wanted[~sees], rtol=1e-4, atol=2.0**-8 * float(np.abs(values).max()))


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
    (wanted, *presents), (got, *others) = run(model, feeds), run(after, feeds)
    keys = arrays[1].shape[-2] + (P if 6 in arrays else 0)
    sees = sees_a_key(arrays.get(4), S, keys, "unidirectional" in attributes)
    values = np.abs(arrays[2]).max() + np.abs(arrays.get(3, np.zeros(1))).max() + np.abs(arrays.get(7, 0)).max()
    assert_attends_alike(got, wanted, sees, values)
    for one, other in zip(presents, others, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-6, atol=1e-6)


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
    sees = sees_a_key(arrays.get(3), S, S, "unidirectional" in attributes)
    assert_attends_alike(other, one, sees, X @ arrays[1] + arrays[2])


def test_weights_are_cut_when_they_are_asked_for() -> None:
    wide = 512
    arrays = {0: normal(1, 2, wide), 1: normal(wide, 3 * wide), 2: normal(3 * wide)}
    after = raised(model_of("Attention", arrays, {0: [1, "S", wide]}, {"num_heads": 8}, 1, [1, 2]))
    weights = [node.inputs[1].const_value for node in after.graph if node.op_type == "MatMul"]
    assert [type(weight) for weight in weights] == [ir.LazyTensor] * 3
    np.testing.assert_array_equal(np.concatenate([weight.numpy() for weight in weights], axis=1), arrays[1])


def softmaxed(scores: Array) -> Array:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


@pytest.mark.parametrize("fill", [-10000.0, -3.0, float(np.finfo(np.float32).min)])
@pytest.mark.parametrize("causal", [False, True])
def test_in_float64(fill: float, causal: bool) -> None:
    arrays = QKV | BIAS | {4: PADDED if not causal else 1 - PADDED}
    attributes = {"num_heads": H, "mask_filter_value": fill, "unidirectional": int(causal)}
    model = model_of("MultiHeadAttention", arrays, BATCHED, attributes, 1, [3])
    if causal and fill < -1e30:
        assert "as low as what lies ahead" in left(model)
        return
    after = to_float64(raised(model))
    double = [arrays[i].astype(np.float64) + arrays[3][i * W : (i + 1) * W].astype(np.float64) for i in range(3)]
    q, k, v = (x.reshape(B, S, H, D).transpose(0, 2, 1, 3) for x in double)
    scores = q @ k.transpose(0, 1, 3, 2) * float(np.float32(1 / np.sqrt(D)))
    scores = scores + np.where(arrays[4] > 0, 0.0, float(np.float32(fill)))[:, None, None]
    if causal:
        scores = np.where(np.tri(S, dtype=bool), scores, -np.inf)
    wanted = (softmaxed(scores) @ v).transpose(0, 2, 1, 3).reshape(B, S, W)
    feeds = {f"i{i}": arrays[i].astype(np.float64) for i in range(3)} | {"i4": arrays[4]}
    np.testing.assert_allclose(reference_outputs(after, feeds)[0], wanted, rtol=1e-11, atol=1e-11)


def test_in_float16() -> None:
    halves = {i: x.astype(np.float16) for i, x in QKV.items()} | {3: BIAS[3].astype(np.float16), 4: PADDED}
    after = raised(model_of("MultiHeadAttention", halves, BATCHED, {"num_heads": H}, 1, [3]))
    whole = model_of("MultiHeadAttention", QKV | BIAS | {4: PADDED}, BATCHED, {"num_heads": H}, 1, [3])
    feeds = {f"i{i}": halves[i] for i in (0, 1, 2, 4)}
    (half,) = run(after, feeds)
    (full,) = run(whole, {f"i{i}": (QKV | {4: PADDED})[i] for i in (0, 1, 2, 4)})
    assert half.dtype == np.float16
    # Beside -10000 a float16 score keeps no digit behind the point, so the row without any key is its own.
    np.testing.assert_allclose(half[:2].astype(np.float32), full[:2], atol=2e-2)


REFUSED: list[tuple[str, dict[int, Array], dict[int, Any], dict[str, Any], int, str]] = [
    ("MultiHeadAttention", QKV, BATCHED, {"num_heads": 3}, 1, "aren't 3 equal heads"),
    ("MultiHeadAttention", {0: normal(B, S, H, 3, D)}, {}, {}, 1, "packed by heads"),
    ("MultiHeadAttention", QKV | {6: PAST[6]}, BATCHED, {}, 3, "one of past_key and past_value"),
    ("MultiHeadAttention", QKV | PAST | {8: np.ones(1, np.int32)}, BATCHED, {}, 3, "a buffer shared"),
    ("MultiHeadAttention", QKV, BATCHED, {}, 4, "its output 3"),
    ("MultiHeadAttention", QKV, {2: ["B", "S", "V"]}, {}, 1, "the size of the last axis of 'i2' isn't known"),
    ("MultiHeadAttention", CROSSED, CROSS_SHAPES, {"unidirectional": 1}, 1, "aren't known to be as many"),
    ("MultiHeadAttention", QKV | {5: normal(1, 1, S, S)}, BATCHED, {"unidirectional": 1}, 1, "beside a bias"),
    ("MultiHeadAttention", QKV | {4: ALL}, BATCHED | {4: ["N"]}, {}, 1, "one count for each row"),
    ("MultiHeadAttention", QKV | {4: PADDED[:, :1]}, BATCHED, {}, 1, "mask of one column"),
    ("Attention", {0: X, 1: WEIGHTS, 4: normal(2, B, H, P, D)}, {}, {}, 2, "one tensor of keys and values"),
    ("Attention", {0: X, 1: WEIGHTS}, {}, {"do_rotary": 1}, 1, "no kernel"),
    ("Attention", {0: X, 1: WEIGHTS}, {}, {"qkv_hidden_sizes": [W, W, 8]}, 1, "columns aren't"),
    ("Attention", {0: X, 1: WEIGHTS, 3: np.ones((B, 1, 9, 9), np.int32)}, {}, {}, 1, "its mask has 4 axes"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_left_alone(case: int) -> None:
    op_type, arrays, shapes, attributes, outputs, reason = REFUSED[case]
    assert reason in left(model_of(op_type, arrays, shapes, {"num_heads": H} | attributes, outputs))


@pytest.mark.parametrize(
    ("op_type", "reason"),
    [
        ("DecoderMaskedMultiHeadAttention", "a buffer that past and present share"),
        ("PackedAttention", "packed without padding"),
        ("QAttention", "quantized arithmetic"),
        ("PagedAttention", "its cache in pages"),
        ("SparseAttention", "sparse choice of keys"),
        ("RelativePositionBias", "no counterpart"),
    ],
)
def test_operators_that_stay(op_type: str, reason: str) -> None:
    model = model_of("MultiHeadAttention", QKV, BATCHED, {"num_heads": H})
    model.graph.node(0).op_type = op_type
    assert reason in left(model)


def test_what_a_pass_lowered_stays_without_a_word() -> None:
    model = model_of("MultiHeadAttention", QKV, BATCHED, {"num_heads": H})
    model.graph.node(0).meta[LOWERED] = True
    rule = RaiseContribAttention()
    assert not rule(model).modified
    assert rule.sites == []


def test_before_opset_23() -> None:
    model = model_of("MultiHeadAttention", QKV, BATCHED, {"num_heads": H})
    model.graph.opset_imports[""] = 21
    assert "needs opset 23" in left(model)


def test_in_a_subgraph_and_one_mask_for_both() -> None:
    text = """<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
    g (float[B, S, 16] x, int32[B, S] mask, bool which) => (float[B, S, 16] y) {
        a = com.microsoft.MultiHeadAttention <num_heads = 2> (x, x, x, , mask)
        b = com.microsoft.MultiHeadAttention <num_heads = 2> (a, a, a, , mask)
        y = If (which) <
            then_branch = t () => (float[B, S, 16] c) {
                c = com.microsoft.MultiHeadAttention <num_heads = 2> (b, b, b, , mask)
            },
            else_branch = e () => (float[B, S, 16] d) { d = Identity(b) }
        >
    }"""
    model = parse(text)
    after = raised(model)
    assert op_types(after).count("Attention") == 2
    assert op_types(after).count("Where") == 1  # and another one in the subgraph
    for which in (True, False):
        feeds = {"x": QKV[0], "mask": PADDED, "which": np.array(which)}
        sees = sees_a_key(PADDED, S, S, False)
        assert_attends_alike(run(after, feeds)[0], run(model, feeds)[0], sees, 3 * QKV[0])  # three in a row


# ---- GroupQueryAttention


def decoder(
    attributes: str = "",
    query: str = "packed, , ",
    extra: str = "",
    layers: int = 1,
    depth: int = 16,
    counted: str = "summed",
    cos: int = 8,
    read: bool = False,
    cached: bool = True,
) -> ir.Model:
    """Layers as a generative builder writes them: 2 heads on 1, sizes counted from a mask or from the cache."""
    width = 4 * depth
    cut = "q#, kk#, vv# = Split <axis = -1> (packed#, parts)"
    body, outputs, caches, value = "", ["float[B, S, N] y"], "", "x"
    for layer in range(layers):
        pasts = f"pk{layer}, pv{layer}" if cached else ","
        caches += f", float[B, 1, P, {depth}] pk{layer}, float[B, 1, P, {depth}] pv{layer}" if cached else ""
        outputs += [f"float[B, 1, T, {depth}] k{layer}", f"float[B, 1, T, {depth}] v{layer}"]
        after = "y" if layer == layers - 1 else f"h{layer}"
        body += f"""
            product{layer} = MatMul({value}, w)
            packed{layer} = Add(product{layer}, b)
            {cut.replace("#", str(layer)) if query == "split" else ""}
            {after}, k{layer}, v{layer} = com.microsoft.GroupQueryAttention
                <num_heads = 2, kv_num_heads = 1 {attributes}>
                ({query.replace("packed", f"packed{layer}").replace("split", f"q{layer}, kk{layer}, vv{layer}")},
                 {pasts}, last, total, cos, sin {extra})"""
        value = after
    sums = {
        "summed": "count = ReduceSum <keepdims = 0> (mask, axis) less = Sub(count, one) last = Cast <to = 6> (less) "
        "sizes = Shape(mask) size = Gather(sizes, at) total = Cast <to = 6> (size)",
        "sizes": "past = Shape <start = 2, end = 3> (pk0) new = Shape <start = 1, end = 2> (x) "
        "all = Add(past, new) total = Cast <to = 6> (all) ones = Cast <to = 6> (one) less = Sub(total, ones) "
        "rows = Shape <start = 0, end = 1> (x) last = Expand(less, rows)",
        "given": "last = Identity(seqlens) total = Identity(whole)",
    }[counted]
    also = ", int32[B] seqlens, int32[1] whole" if counted == "given" else ""
    also += ", float[1, 1, S, T] bias" if read else ""
    also += f", float[{2 * depth}, {width}] w, float[{width}] b, float[32, {cos}] cos, float[32, {cos}] sin"
    text = f"""<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>
    g (float[B, S, {2 * depth}] x, int64[B, T] mask {caches} {also})
        => ({", ".join(outputs)})
    <int64[1] one = {{1}}, int64[1] axis = {{1}}, int64 at = {{1}},
     int64[3] parts = {{{2 * depth}, {depth}, {depth}}}> {{ {sums} {body} }}"""
    model = parse(text)
    if layers == 1:
        model.graph.outputs[0].shape = ir.Shape(["B", "S", 2 * depth])
    rng = np.random.default_rng(1)
    angles = rng.normal(size=(32, cos))
    arrays = {"w": rng.normal(size=(2 * depth, width)) / 4, "b": rng.normal(size=width)}
    arrays |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    for value in list(model.graph.inputs):
        if value.name in arrays:
            model.graph.inputs.remove(value)
            value.const_value = ir.tensor(arrays[value.name].astype(np.float32), name=value.name)
            model.graph.register_initializer(value)
    return model


def step(model: ir.Model, batch: int, new: int, past: int) -> dict[str, Array]:
    sizes = {"B": batch, "S": new, "P": past, "T": new + past}
    feeds = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else sizes[size.value] for size in value.shape]
        whole = value.dtype in (ir.DataType.INT64, ir.DataType.INT32)
        feeds[value.name] = np.ones(shape, value.dtype.numpy()) if whole else normal(*shape)
    return feeds


STEPS = [(1, 6, 0), (3, 6, 0), (3, 1, 5), (1, 3, 5)]
ROTARY = ", do_rotary = 1"


@pytest.mark.parametrize("size", STEPS, ids=str)
@pytest.mark.parametrize(
    ("options", "products"),
    [
        ({}, 3),
        ({"attributes": ", scale = 0.3, softcap = 5.0"}, 3),
        ({"attributes": ROTARY}, 3),
        ({"attributes": ROTARY + ", rotary_interleaved = 1"}, 3),
        ({"attributes": ROTARY, "depth": 32}, 3),
        ({"attributes": ROTARY + ", local_window_size = 3"}, 3),
        ({"attributes": ROTARY, "query": "split"}, 1),
        ({"attributes": ROTARY, "extra": ", , bias", "read": True}, 3),
        ({"attributes": ROTARY, "layers": 2}, 6),
        ({"attributes": ROTARY, "counted": "sizes"}, 3),
    ],
    ids=lambda option: str(option) if isinstance(option, dict) else "",
)
def test_group_query_attention(options: dict[str, Any], products: int, size: tuple[int, int, int]) -> None:
    model = decoder(**options)
    assumed = () if options.get("counted") == "sizes" else ("no-padding",)
    after = raised(model, *assumed)
    assert [(r.assumption, dict(r.inputs)) for r in read(after)] == [(name, {"mask": "mask"}) for name in assumed]
    assert op_types(after).count("MatMul") == products
    assert op_types(after).count("Range") <= 2
    feeds = step(model, *size)
    for one, other in zip(run(model, feeds), run(after, feeds), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("attributes", ["", ROTARY, ROTARY + ", local_window_size = 3"])
def test_group_query_attention_without_a_cache(attributes: str) -> None:
    model = decoder(attributes, cached=False)
    after = raised(model, "no-padding")
    given = {"x": normal(3, 6, 32), "mask": np.ones((3, 6), np.int64)}
    for one, other in zip(run(model, given), run(after, given), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("declared", [True, False])
@pytest.mark.parametrize("attributes", ["", ROTARY, ROTARY + ", local_window_size = 3"])
def test_there_and_back(attributes: str, declared: bool) -> None:
    model = decoder(attributes, layers=2)
    fed = {size: step(model, *size) for size in STEPS}
    for value in model.graph.inputs:
        if not declared and value.name[0] == "p":
            value.shape = ir.Shape(["B", "G", "P", "D"])
    after = raised(model, "no-padding")
    lower = GroupQueryAttention()
    lower.assumptions = Assumptions.parse(["no-padding", "no-batched-chunks", "counted-positions"])
    assert lower(after).modified
    assert op_types(after).count("GroupQueryAttention") == 2
    assert op_types(after).count("RotaryEmbedding") == 0
    assert not raising("no-padding")(after).modified  # what was lowered here isn't raised in the next round
    assert op_types(after).count("MatMul") == 2
    for size in STEPS:
        for one, other in zip(run(model, fed[size]), run(after, fed[size]), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "--assume no-padding"),
        ({"counted": "given"}, "what its seqlens_k counts isn't known"),
        ({"attributes": ", smooth_softmax = 1"}, "its smooth_softmax is 1"),
        ({"attributes": ", local_window_size = 3", "extra": ", , bias", "read": True}, "a window beside a bias"),
        ({"extra": ", mask"}, "it has position_ids"),
        ({"extra": ", , , b"}, "a sink beside the keys"),
    ],
    ids=str,
)
def test_group_query_attention_that_stays(options: dict[str, Any], reason: str) -> None:
    model = decoder(**options)
    if options:
        rule = raising("no-padding")
        assert not rule(model).modified
        assert reason in rule.sites[0].detail
    else:
        assert reason in left(model)


# ---- real models


@pytest.mark.real
@pytest.mark.parametrize("raw", [True, False], ids=["mask", "counts"])
def test_saved_by_the_transformers_optimizer(raw: bool, tmp_path: Path) -> None:
    optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
    options = pytest.importorskip("onnxruntime.transformers.fusion_options").FusionOptions("bert")
    options.use_raw_attention_mask(raw)
    fusion = optimizer.optimize_model(
        str(catalogue.fetch("paraphrase-minilm")), model_type="bert", num_heads=12, hidden_size=384, opt_level=0,
        optimization_options=options,
    )  # fmt: skip
    fusion.save_model_to_file(str(tmp_path / "fused.onnx"))
    before = ir.load(tmp_path / "fused.onnx")
    assert op_types(before).count("Attention") == 3
    after = before.clone()
    ConvertOpset()(after)
    RaiseContrib()(after)
    after = raised(after)
    assert op_types(after).count("Attention") == 3
    assert op_types(after).count("Range") == (0 if raw else 1)
    rng = np.random.default_rng(0)
    for batch in (1, 3):
        mask = lengths(12, 7, 3, total=12)[:batch].astype(np.int64)
        named = {"input_ids": rng.integers(1, 1000, (batch, 12)), "attention_mask": mask}
        feeds = {v.name: named.get(v.name, np.zeros((batch, 12), np.int64)) for v in before.graph.inputs}
        for one, other in zip(run(before, feeds), run(after, feeds), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)


@pytest.mark.export
@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_fused_after_a_fresh_export(exporter: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = exported("bert", exporter)
    if exporter == "dynamo":
        fusions = pytest.importorskip("onnxscript.rewriter.ort_fusions")
        before = ir.load(source)
        before = fusions.optimize_for_ort(before)
        before = before[0] if isinstance(before, tuple) else before
    else:
        optimizer = pytest.importorskip("onnxruntime.transformers.optimizer")
        fusion = optimizer.optimize_model(str(source), model_type="bert", num_heads=4, hidden_size=32, opt_level=0)
        fusion.save_model_to_file(str(tmp_path / "fused.onnx"))
        before = ir.load(tmp_path / "fused.onnx")
    assert sum(node.domain == MS and "Attention" in node.op_type for node in before.graph) == 3
    after = before.clone()
    ConvertOpset()(after)
    RaiseContrib()(after)
    after = raised(after)
    assert op_types(after).count("Attention") == 3
    for batch in (1, 3):
        inputs = feeds("bert", batch=batch)
        for one, other in zip(run(before, inputs), run(after, inputs), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-4, atol=2e-5)
