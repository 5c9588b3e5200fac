"""Keys and values of a decoder on samples, token by token, gathered in its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.kv.cache_codes import Rows
from graphopt.passes.kv.cache_moments import (
    as_float,
    asked_of,
    attention_weights,
    by_head,
    operands,
    received,
    rotation_inputs,
)
from graphopt.passes.kv.copies import Array, copied, values_of
from graphopt.passes.kv.feature_bases import Floats
from graphopt.passes.lower.cached_site import CachedSite

Samples: TypeAlias = Sequence[Mapping[str, Array]]
"""Inputs of a model, with empty caches."""


@dataclasses.dataclass(frozen=True, eq=False)
class CacheRows:
    """What was found of a layer; d = KV heads · D.

    Attributes:
        keys: Keys before their rotation, [N, d].
        values: Values, [N, d].
        counts: How much each token counts, [N], 1 in the mean of a sample: half of it alike, half by the attention that
            it receives; None: it wasn't asked for.
        asked: E[qᵀ q] of the queries that ask each KV head, turned by the distance, [heads, D, D]; None likewise.
    """

    keys: Rows
    values: Rows
    counts: Rows | None
    asked: Floats | None


def rows_of(
    model: ir.Model, sites: Sequence[CachedSite], samples: Samples, threads: int | None, *, attended: bool
) -> list[CacheRows]:
    """Keys and values of some layers, from one run over the samples; the model stays as it is.

    Args:
        model: The model.
        sites: The layers.
        samples: Inputs of the model, with empty caches.
        threads: Threads within an operator.
        attended: Find what queries ask too, and the attention that each token receives.
    """
    copy, at = copied(model)
    edit = Editor(copy)
    outputs: dict[str, ir.Value] = {}
    for number, site in enumerate(sites):
        node = at[site.node.outputs[0].name].producer()
        assert node is not None
        edit.at(node)
        q, k, v = operands(site, at, edit)
        outputs |= {f"k{number}": k, f"v{number}": v}
        if not attended:
            continue
        outputs |= {f"q{number}": by_head(q, site, edit)}
        outputs |= {f"n{number}": received([as_float(attention_weights(node, edit), edit)], edit)}
        outputs |= rotation_inputs(site, at, f"{number}")
    rows: dict[str, list[Array]] = {}
    sums: dict[str, Floats] = {}
    tables: dict[str, Array] = {}
    for found in values_of(copy, outputs, samples, threads):
        for name, array in found.items():
            if name.startswith("q"):
                sums[name] = sums.get(name, np.zeros(1)) + array.astype(np.float64) / len(samples)
            elif name[0] in "kvn" and array.ndim == 3:
                rows.setdefault(name, []).append(array.reshape(-1, array.shape[2]))
            else:
                tables.setdefault(name, array)
    whole = {name: np.concatenate(parts) for name, parts in rows.items()}
    return [
        CacheRows(
            whole[f"k{number}"], whole[f"v{number}"],
            whole[f"n{number}"][:, 0] if attended else None,
            asked_of(sums, tables, f"{number}", site) if attended else None,
        )
        for number, site in enumerate(sites)
    ]  # fmt: skip
