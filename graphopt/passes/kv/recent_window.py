"""The last tokens of a cache as they are, beside a cache from which the older ones are rebuilt."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.graph.edits import Editor
from graphopt.graph.kv_interface import CachePair

_LENGTH = 2
_END = np.iinfo(np.int64).max


class RecentWindow:
    """Writes caches [B, H, min(past, window), D] of exact keys and values (CSKV's bi-branch cache).

    The cache of features holds all tokens, so that nothing has to move from one cache to the other: the older tokens
    are those that the exact cache doesn't hold.

    Args:
        tokens: How many it holds at most; 0: there is none.
        edit: Where it is written.
    """

    def __init__(self, tokens: int, edit: Editor) -> None:
        self.tokens, self._edit = tokens, edit
        self._older: dict[ir.Value, ir.Value] = {}

    def split(self, pair: CachePair, like: ir.Value, past: ir.Value, new: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Features of the older tokens [B, 1, P - R, r], and the exact keys or values of the recent and the new ones
        [B, H, R + S, D].

        Args:
            pair: The layer's keys or values at the interface before.
            like: Its past [B, H, P, D].
            past: The cache of features [B, 1, P, r].
            new: New keys or values [B, H, S, D].
        """
        if not self.tokens:
            return past, new
        edit, graph = self._edit, self._edit.model.graph
        recent, present = (
            ir.Value(
                name=edit.names.fresh(f"{name}.recent"),
                type=like.type,
                shape=None
                if like.shape is None
                else ir.Shape([size if axis != _LENGTH else length for axis, size in enumerate(like.shape)]),
            )
            for name, length in ((pair.past, "recent"), (pair.present, "recent_now"))
        )
        graph.inputs.append(recent)
        tail = edit.op("Concat", [recent, new], {"axis": _LENGTH})
        begin, end, axis = (edit.constant(np.array([n]), "window") for n in (-self.tokens, _END, _LENGTH))
        last = edit.op("Slice", [tail, begin, end, axis], like=present)
        last.name = present.name
        graph.outputs.append(last)
        if past not in self._older:
            sizes = [edit.op("Shape", [value], {"start": _LENGTH, "end": _LENGTH + 1}) for value in (past, recent)]
            first = edit.constant(np.array([0]), "first")
            self._older[past] = edit.op("Slice", [past, first, edit.op("Sub", sizes), axis])
        return self._older[past], tail
