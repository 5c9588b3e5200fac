"""How features of a token are stored in a cache: as they are, by codebooks, or as what a prediction leaves of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.passes.kv.feature_bases import Floats
from graphopt.passes.quantize.gaussian_grids import nearest_vectors

Rows: TypeAlias = npt.NDArray[np.float32]
Place: TypeAlias = tuple[int, int]
"""A cache: the number of its layer, and 0 for keys or 1 for values."""

ENTRIES = 256
"""Vectors that a byte tells apart."""
_STEPS, _ZERO = 8, 160
"""A byte b stands for the scale 2^((b - 160) / 8): steps of 9 %, from 1e-6 to 3,700."""
_SCALES = np.exp2((np.arange(256) - _ZERO) / _STEPS).astype(np.float32)


class Store(Protocol):
    """How features are stored."""

    @property
    def width(self) -> int:
        """Numbers that are stored of a token."""

    @property
    def dtype(self) -> ir.DataType | None:
        """Their type; None: that of the features."""

    def write(
        self, features: ir.Value, past: ir.Value, before: Mapping[Place, ir.Value], edit: Editor
    ) -> tuple[ir.Value, ir.Value]:
        """The cache with new tokens behind those of the past, [B, 1, T, width], and the features of all [B, 1, T, r].

        Args:
            features: Those of new tokens, [B, 1, S, r]; float32 where `dtype` isn't None.
            past: The cache before, [B, 1, P, width].
            before: Features of caches that are written already, [B, 1, T, r'].
            edit: Where it is written.
        """


@dataclasses.dataclass(frozen=True)
class Plain:
    """Features stored as they are.

    Attributes:
        width: r.
    """

    width: int
    dtype: ir.DataType | None = None

    def write(
        self, features: ir.Value, past: ir.Value, before: Mapping[Place, ir.Value], edit: Editor
    ) -> tuple[ir.Value, ir.Value]:
        """See the protocol."""
        whole = edit.op("Concat", [past, features], {"axis": 2})
        return whole, whole


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """Features in groups of c neighbours, each stored as a byte: the place of the nearest of 256 vectors.

    Attributes:
        features: r, a multiple of c.
        tables: The vectors, [1 or r / c, 256, c]: one table for all groups, or one for each.
        metrics: What makes a vector t the nearest, (x − t) M (x − t)ᵀ, one M for each table [·, c, c]; None: the
            identity.
        scales: Equal parts of the features that are divided by their root mean square first, which takes a byte of each
            token; 0: nothing is.
    """

    features: int
    tables: Rows
    metrics: Floats | None = None
    scales: int = 0
    dtype: ir.DataType | None = ir.DataType.UINT8

    @property
    def channels(self) -> int:
        """c."""
        return int(self.tables.shape[2])

    @property
    def width(self) -> int:
        """See the protocol."""
        return self.features // self.channels + self.scales

    def stored(self, rows: npt.NDArray[Any]) -> Rows:
        """What rows [N, r] are read back as."""
        parts = rows.astype(np.float32).reshape(len(rows), max(self.scales, 1), -1)
        level = np.ones((1, 1, 1), np.float32)
        if self.scales:
            with np.errstate(divide="ignore"):
                steps = np.log2(np.square(parts).mean(axis=2, keepdims=True)) * (_STEPS / 2) + _ZERO
            level = _SCALES[np.clip(np.rint(steps), 0, 255).astype(np.uint8)]
        groups = (parts / level).reshape(len(rows), -1, self.channels)
        found = np.empty_like(groups)
        for index, table in enumerate(self.tables):
            own = groups if len(self.tables) == 1 else groups[:, index]
            metric = None if self.metrics is None else self.metrics[index]
            read = table[nearest_vectors(own.reshape(-1, self.channels), table, metric)].reshape(own.shape)
            if len(self.tables) == 1:
                found = read
            else:
                found[:, index] = read
        return np.asarray(found.reshape(parts.shape) * level, np.float32).reshape(rows.shape)

    def write(
        self, features: ir.Value, past: ir.Value, before: Mapping[Place, ir.Value], edit: Editor
    ) -> tuple[ir.Value, ir.Value]:
        """See the protocol."""
        table = edit.constant(np.ascontiguousarray(self.tables.reshape(-1, self.channels)), "codebook")
        whole = edit.op("Concat", [past, self._encoded(features, table, edit)], {"axis": 2})
        return whole, self._decoded(whole, table, edit)

    def _encoded(self, features: ir.Value, table: ir.Value, edit: Editor) -> ir.Value:
        """The bytes of features [B, 1, S, r], [B, 1, S, width], by the vectors of all groups, [·, c]."""
        to_byte, rows, levels = {"to": ir.DataType.UINT8.value}, features, None
        if self.scales:
            parts = edit.op("Reshape", [features, _sizes(edit, 0, -1, self.scales, self.features // self.scales)])
            squares = edit.op("ReduceMean", [edit.op("Mul", [parts, parts]), _sizes(edit, 3)], {"keepdims": 1})
            steps = edit.op("Mul", [edit.op("Log", [squares]), _number(edit, _STEPS / 2 / np.log(2))])
            steps = edit.op("Round", [edit.op("Add", [steps, _number(edit, _ZERO)])])
            levels = edit.op("Cast", [edit.op("Clip", [steps, _number(edit, 0), _number(edit, 255)])], to_byte)
            rows = edit.op("Div", [parts, _scaled(levels, edit)])
        groups = edit.op("Reshape", [rows, _sizes(edit, 0, -1, self.features // self.channels, self.channels)])
        each = len(self.tables) > 1
        if each:
            groups = edit.op("Transpose", [groups], {"perm": [0, 2, 1, 3]})
        with edit.for_load():  # so that the file holds the vectors once
            product, shift = self._likeness(table, edit)
        scores = edit.op("Sub", [edit.op("MatMul", [groups, product]), shift])
        codes = edit.op("Cast", [edit.op("ArgMax", [scores], {"axis": -1, "keepdims": 0})], to_byte)
        if each:
            codes = edit.op("Transpose", [codes], {"perm": [0, 2, 1]})
        if levels is not None:
            codes = edit.op("Concat", [codes, edit.op("Squeeze", [levels, _sizes(edit, 3)])], {"axis": 2})
        return edit.op("Unsqueeze", [codes, _sizes(edit, 1)])

    def _likeness(self, table: ir.Value, edit: Editor) -> tuple[ir.Value, ir.Value]:
        """M t of all vectors as columns [groups, c, 256], and half of t M tᵀ [groups, 1, 256]; of one table for all
        groups [c, 256] and [256].

        (x − t) M (x − t)ᵀ without x M xᵀ, which is the same for all: x · (M t) less half of t M tᵀ, the greatest.
        """
        each, vectors = len(self.tables) > 1, table
        if each:
            vectors = edit.op("Reshape", [table, _sizes(edit, -1, ENTRIES, self.channels)])
        seen = vectors
        if self.metrics is not None:
            wide = edit.op("Cast", [vectors], {"to": ir.DataType.DOUBLE.value})
            metrics = edit.constant(np.ascontiguousarray(self.metrics if each else self.metrics[0]), "metric")
            seen = edit.op("Cast", [edit.op("MatMul", [wide, metrics])], {"to": ir.DataType.FLOAT.value})
        squares = edit.op("ReduceSum", [edit.op("Mul", [seen, vectors]), _sizes(edit, -1)], {"keepdims": 0})
        halves = edit.op("Mul", [squares, _number(edit, 0.5)])
        if each:
            halves = edit.op("Unsqueeze", [halves, _sizes(edit, 1)])
        return edit.op("Transpose", [seen], {"perm": [0, 2, 1] if each else [1, 0]}), halves

    def _decoded(self, codes: ir.Value, table: ir.Value, edit: Editor) -> ir.Value:
        """The features [B, 1, T, r] of bytes [B, 1, T, width], by the vectors of all groups [·, c]."""
        places, levels = codes, None
        if self.scales:
            end, last = _sizes(edit, self.features // self.channels), _sizes(edit, 3)
            places = edit.op("Slice", [codes, _sizes(edit, 0), end, last])
            levels = edit.op("Slice", [codes, end, _sizes(edit, self.width), last])
        places = edit.op("Cast", [places], {"to": ir.DataType.INT32.value})
        if len(self.tables) > 1:
            firsts = np.arange(len(self.tables), dtype=np.int32) * ENTRIES
            places = edit.op("Add", [places, edit.constant(firsts, "firsts")])
        found = edit.op("Gather", [table, places], {"axis": 0})
        if levels is not None:
            parts = edit.op("Reshape", [found, _sizes(edit, 0, -1, self.scales, self.features // self.scales)])
            each = edit.op("Reshape", [_scaled(levels, edit), _sizes(edit, 0, -1, self.scales, 1)])
            found = edit.op("Mul", [parts, each])
        return edit.op("Reshape", [found, _sizes(edit, 0, 1, -1, self.features)])


@dataclasses.dataclass(frozen=True, eq=False)
class Residual:
    """What a prediction from other caches leaves, by codebooks: x ≈ [a, b, ...] W + w + codes.

    Attributes:
        codes: How it is stored.
        sources: The caches whose features a, b, ... it is predicted from; none: it is w.
        weight: W [features of all sources, r].
        shift: w [r].
    """

    codes: Codebook
    sources: tuple[Place, ...]
    weight: npt.NDArray[Any]
    shift: Floats

    @property
    def width(self) -> int:
        """See the protocol."""
        return self.codes.width

    @property
    def dtype(self) -> ir.DataType | None:
        """See the protocol."""
        return self.codes.dtype

    def predicted(self, sources: npt.NDArray[Any]) -> Floats:
        """The prediction from features of the sources side by side [N, features of all]."""
        return np.asarray(sources @ self.weight + self.shift)

    def write(
        self, features: ir.Value, past: ir.Value, before: Mapping[Place, ir.Value], edit: Editor
    ) -> tuple[ir.Value, ir.Value]:
        """See the protocol."""
        shift = edit.constant(np.asarray(self.shift, np.float32), "shift")
        if not self.sources:
            whole, left = self.codes.write(edit.op("Sub", [features, shift]), past, before, edit)
            return whole, edit.op("Add", [left, shift])
        parts = [before[place] for place in self.sources]
        joined = parts[0] if len(parts) == 1 else edit.op("Concat", parts, {"axis": -1})
        weight = edit.constant(np.asarray(self.weight, np.float32), "predictor")
        every = edit.op("Add", [edit.op("MatMul", [joined, weight]), shift])
        begin = edit.op("Shape", [past], {"start": 2, "end": 3})
        end = edit.constant(np.array([np.iinfo(np.int64).max]), "end")
        new = edit.op("Slice", [every, begin, end, _sizes(edit, 2)])
        whole, left = self.codes.write(edit.op("Sub", [features, new]), past, before, edit)
        return whole, edit.op("Add", [every, left])


def _scaled(levels: ir.Value, edit: Editor) -> ir.Value:
    """The scales that bytes stand for."""
    places = edit.op("Cast", [levels], {"to": ir.DataType.INT32.value})
    return edit.op("Gather", [edit.constant(_SCALES, "scales"), places], {"axis": 0})


def _number(edit: Editor, number: float) -> ir.Value:
    return edit.constant(np.array(number, np.float32), "number")


def _sizes(edit: Editor, *sizes: int) -> ir.Value:
    return edit.constant(np.array(sizes), "sizes")
