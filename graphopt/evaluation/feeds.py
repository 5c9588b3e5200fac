"""The inputs of a model for evaluation data."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import InputDataError
from graphopt.evaluation.data import LABELS, TEXTS, EvaluationData, Samples
from graphopt.graph.input_roles import InputRoles
from graphopt.verification.probes import load_probes
from graphopt.verification.quality.runs import Batch

BATCH = 8
"""Samples that run together where the model's batch is free."""


class Fed:
    """What a data set feeds a model, made anew at every pass over it, so that it never lies in memory as a whole.

    Args:
        samples: The data set.
        model: The model.
        limit: Feeds that are used at most; None: all.
    """

    def __init__(self, samples: Samples, model: ir.Model, limit: int | None = None) -> None:
        self._samples, self._model, self._limit = samples, model, limit

    def __iter__(self) -> Iterator[Batch]:
        """The feeds."""
        return itertools.islice(self._samples.feeds(self._model), self._limit)


def array_batches(data: EvaluationData, model: ir.Model, samples: int | None) -> list[Batch]:
    """Arrays in batches as the model takes them; arrays of different lengths are the inputs of one run."""
    assert data.arrays is not None
    inputs = {value.name: value for value in model.graph.inputs}
    arrays = {n: a for n, a in data.arrays.items() if n in inputs or n not in (LABELS, TEXTS)}
    counts = {array.shape[0] for array in arrays.values() if array.ndim}
    if len(counts) != 1:
        return [load_probes(arrays, model)[0].feeds]
    count = min(counts.pop(), samples or 1 << 62)
    declared = [inputs[n].shape for n, array in arrays.items() if n in inputs and array.ndim]
    fixed = {shape[0] for shape in declared if shape is not None and len(shape) and isinstance(shape[0], int)}
    sizes = {size for size in fixed if isinstance(size, int) and size > 0}
    size = min(sizes) if sizes else BATCH
    if sizes and count % size:
        raise InputDataError(f"The model takes {size} samples at once, and {data.name} holds {count}.")
    batches: list[Batch] = []
    for begin in range(0, count, size):
        feeds = {n: a[begin : begin + size][: count - begin] if a.ndim else a for n, a in arrays.items()}
        batches.append(load_probes(feeds, model)[0].feeds if not begin else feeds)
    return batches


def encoder_feeds(model: ir.Model, ids: npt.NDArray[np.int64], name: str) -> dict[str, npt.NDArray[Any]]:
    """The inputs of an encoder for one text: its tokens, all of which count, in their positions, of the first type.

    Args:
        model: The encoder.
        ids: The tokens [tokens].
        name: What the text is called.

    Raises:
        InputDataError: The model takes no tokens, or something besides.
    """
    own = [value for value in model.graph.inputs if not value.is_initializer()]
    types = [v for v in own if re.search("type|segment", v.name or "", re.IGNORECASE)]
    roles = InputRoles.read([v for v in own if v not in types])
    if roles.token_ids is None or roles.others:
        why = "and no input of the model takes tokens"
        if roles.token_ids is not None:
            why = f"which doesn't tell the input {roles.others[0]!r}"
        raise InputDataError(f"{name} is text, {why}; give an .npz file with an array for each input.")
    row = ids[None]
    made = {
        roles.token_ids: row,
        roles.attention_mask: np.ones_like(row),
        roles.position_ids: np.arange(row.shape[1])[None],
        **{value.name: np.zeros_like(row) for value in types},
    }
    dtypes = {v.name: v.dtype for v in own}
    return {n: a if (t := dtypes[n]) is None else a.astype(t.numpy()) for n, a in made.items() if n is not None}
