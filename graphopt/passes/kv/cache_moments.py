"""Second moments of keys, values and queries of a decoder on samples, gathered in its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.kv.copies import copied, values_of
from graphopt.passes.kv.feature_bases import Floats
from graphopt.passes.kv.query_targets import turned_back
from graphopt.passes.lower.cached_site import CachedSite, Operand, as_tokens

Array = npt.NDArray[Any]

DISTANCES = 64
"""Distances of a query from a key, spread evenly over a sample, over which the weight of keys is averaged."""


@dataclasses.dataclass(frozen=True)
class Gathered:
    """What was found of some layers, whose keys and values stand side by side; d = their KV heads · D.

    Attributes:
        keys: E[kᵀ k] of the keys before rotation, [d, d].
        key_mean: E[k], [d].
        values: E[vᵀ v] of the values, [d, d].
        value_mean: E[v], [d].
        asked: E[qᵀ q] of the queries that ask each KV head, as it sees them: turned by the distance, [heads, D, D].
    """

    keys: Floats
    key_mean: Floats
    values: Floats
    value_mean: Floats
    asked: Floats


def gathered(
    model: ir.Model,
    groups: Sequence[Sequence[CachedSite]],
    samples: Sequence[Mapping[str, Array]],
    threads: int | None,
    *,
    attended: bool = True,
) -> list[Gathered]:
    """The moments of each group of layers, from one run over the samples; the model stays as it is.

    Args:
        model: The model.
        groups: Layers whose keys and values stand side by side.
        samples: Inputs of the model, with empty caches.
        threads: Threads within an operator.
        attended: Count keys by the attention that they receive, half of their weight, and take values as the attention
            of each head averages them; else each token counts alike.
    """
    copy, at = copied(model)
    edit = Editor(copy)
    outputs: dict[str, ir.Value] = {}
    for number, sites in enumerate(groups):
        nodes = [at[site.node.outputs[0].name].producer() for site in sites]
        keys, values, weights = [], [], []
        for place, (site, node) in enumerate(zip(sites, nodes, strict=True)):
            assert node is not None
            edit.at(node)
            q, k, v = operands(site, at, edit)
            keys.append(k)
            values.append(v)
            outputs[f"q{number}.{place}"] = by_head(q, site, edit)
            if attended:
                weights.append(as_float(attention_weights(node, edit), edit))
            outputs |= rotation_inputs(site, at, f"{number}.{place}")
        whole = [parts[0] if len(parts) == 1 else edit.op("Concat", parts, {"axis": -1}) for parts in (keys, values)]
        counts = received(weights, edit) if attended else None
        seen = _averaged(whole[1], weights, edit) if attended else whole[1]
        for name, rows, counted in (("k", whole[0], counts), ("v", seen, None)):
            moment, mean = _moments(rows, counted, edit)
            outputs |= {f"{name}{number}": moment, f"{name}m{number}": mean}
    sums: dict[str, Floats] = {}
    tables: dict[str, Array] = {}
    for found in values_of(copy, outputs, samples, threads):
        for name, array in found.items():
            if name.startswith(("cos", "sin", "ids")):
                tables.setdefault(name, array)
            else:
                sums[name] = sums.get(name, np.zeros(1)) + array.astype(np.float64) / len(samples)
    return [
        Gathered(
            sums[f"k{number}"], sums[f"km{number}"], sums[f"v{number}"], sums[f"vm{number}"],
            np.concatenate([asked_of(sums, tables, f"{number}.{place}", site) for place, site in enumerate(sites)]),
        )
        for number, sites in enumerate(groups)
    ]  # fmt: skip


def as_float(value: ir.Value, edit: Editor) -> ir.Value:
    """The same in float32."""
    return value if value.dtype == ir.DataType.FLOAT else edit.op("Cast", [value], {"to": ir.DataType.FLOAT.value})


def attention_weights(node: ir.Node, edit: Editor) -> ir.Value:
    """The weights that an attention gives where its past is empty, [B, H, S, S]."""
    attributes = {name: a.value for name, a in node.attributes.items()} | {"qk_matmul_output_mode": 3}
    again = edit.op("Attention", list(node.inputs[:4]), attributes, outputs=4).producer()
    assert again is not None
    return again.outputs[3]


def received(weights: Sequence[ir.Value], edit: Editor) -> ir.Value:
    """How much each token counts [B, S, 1], 1 in the mean: half of it alike, half by the attention that it receives."""
    axes = edit.constant(np.array([1, 2]), "axes")
    means = [edit.op("ReduceMean", [each, axes], {"keepdims": 0}) for each in weights]
    total = means[0] if len(means) == 1 else edit.op("Mean", means)
    count = edit.op("CastLike", [edit.op("Shape", [total], {"start": 1, "end": 2}), total])
    one, half = edit.constant(np.array([1.0])), edit.constant(np.array([0.5]))
    one, half = (edit.op("CastLike", [number, total]) for number in (one, half))
    counted = edit.op("Mul", [edit.op("Add", [edit.op("Mul", [total, count]), one]), half])
    return edit.op("Unsqueeze", [counted, edit.constant(np.array([2]), "axis")])


def _averaged(values: ir.Value, weights: Sequence[ir.Value], edit: Editor) -> ir.Value:
    """Values [B, S, d] as each head of each layer averages them, one after the other: [B, heads · S, d]."""
    each = edit.op("Unsqueeze", [values, edit.constant(np.array([1]), "axis")])
    parts = [edit.op("MatMul", [one, each]) for one in weights]
    whole = parts[0] if len(parts) == 1 else edit.op("Concat", parts, {"axis": 1})
    width = edit.op("Shape", [values], {"start": 2, "end": 3})
    sizes = edit.op("Concat", [edit.constant(np.array([0, -1]), "rows"), width], {"axis": 0})
    return edit.op("Reshape", [whole, sizes])


def operands(site: CachedSite, at: Mapping[str | None, ir.Value], edit: Editor) -> list[ir.Value]:
    """Queries, keys and values in the copy before their rotation, [B, S, heads · D], in float32: sums over tokens of
    their squares leave the range of half precision."""

    def tokens(operand: Operand) -> ir.Value:
        return as_tokens(dataclasses.replace(operand, value=at[operand.value.name]), site.depth, edit)

    return [as_float(tokens(one), edit) for one in (site.q, site.k, site.v)]


def rotation_inputs(site: CachedSite, at: Mapping[str | None, ir.Value], name: str) -> dict[str, ir.Value]:
    """What the keys of a site are rotated by, in the copy, under the names by which `asked_of` finds it."""
    turn = site.k.rotation
    if turn is None:
        return {}
    given = {"cos": turn.inputs[1], "sin": turn.inputs[2], "ids": (*turn.inputs, None)[3]}
    return {f"{part}{name}": at[value.name] for part, value in given.items() if value is not None}


def _moments(rows: ir.Value, counts: ir.Value | None, edit: Editor) -> tuple[ir.Value, ir.Value]:
    """E[xᵀ x] and E[x] of [B, S, d], each row counted as `counts` [B, S, 1] says."""
    counted = rows if counts is None else edit.op("Mul", [rows, counts])
    means = edit.op("ReduceMean", [counted, edit.constant(np.array([0, 1]), "axes")], {"keepdims": 0})
    product = edit.op("MatMul", [edit.op("Transpose", [counted], {"perm": [0, 2, 1]}), rows])
    return _per_token(product, rows, edit), means


def by_head(queries: ir.Value, site: CachedSite, edit: Editor) -> ir.Value:
    """Σ E[qᵀ q] of [B, S, H·D] over the queries of each KV head, [KV, D, D]."""
    group = site.heads // site.kv_heads
    sizes = edit.constant(np.array([0, -1, site.kv_heads, group, site.depth]), "groups")
    split = edit.op("Reshape", [queries, sizes])
    split = edit.op("Transpose", [split], {"perm": [0, 2, 1, 3, 4]})
    rows = edit.op("Reshape", [split, edit.constant(np.array([0, 0, -1, site.depth]), "rows")])
    product = edit.op("MatMul", [edit.op("Transpose", [rows], {"perm": [0, 1, 3, 2]}), rows])
    return _per_token(product, queries, edit)


def _per_token(product: ir.Value, rows: ir.Value, edit: Editor) -> ir.Value:
    """The mean over the batch of sums over its tokens, divided by how many tokens there are."""
    mean = edit.op("ReduceMean", [product, edit.constant(np.array([0]), "axis")], {"keepdims": 0})
    count = edit.op("Shape", [rows], {"start": 1, "end": 2})
    return edit.op("Div", [mean, edit.op("CastLike", [count, mean])])


def asked_of(sums: Mapping[str, Floats], tables: Mapping[str, Array], name: str, site: CachedSite) -> Floats:
    """The moments of the queries of each KV head, turned by distances from a key."""
    moments, turn = sums[f"q{name}"], site.k.rotation
    if turn is None:
        return moments
    cos, sin = tables[f"cos{name}"], tables[f"sin{name}"]
    if (ids := tables.get(f"ids{name}")) is not None:
        cos, sin = cos[ids], sin[ids]
    step = -(-cos.shape[1] // DISTANCES)
    cos, sin = (table[:1, ::step].astype(np.float64) for table in (cos, sin))
    heads, depth, _ = moments.shape
    turned = np.broadcast_to(moments[None, :, :, None, :], (1, heads, depth, cos.shape[1], depth))
    for _ in range(2):  # its rows, then its columns
        rows = turned.reshape(1, heads * depth, cos.shape[1], depth)
        turned = turned_back(rows, turn, cos, -sin).reshape(heads, depth, cos.shape[1], depth).transpose(0, 3, 2, 1)
    return np.asarray(turned.mean(axis=2))
