"""Which sites a user leaves out of a quantization."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import onnx_ir as ir


class Selection:
    """Sites by role or by name.

    Args:
        exclude: Roles ("head"), operators ("Conv") or patterns of node names ("*/attention/*") that are left alone.

    Raises:
        ValueError: It isn't a list of texts.
    """

    def __init__(self, exclude: Sequence[str] | None) -> None:
        if exclude is not None and (isinstance(exclude, str) or not all(isinstance(e, str) for e in exclude)):
            raise ValueError("exclude is a list of roles, operators and patterns of node names")
        self._exclude = tuple(exclude or ())

    def excluded(self, node: ir.Node, role: str = "") -> str | None:
        """The sentence that says why a site is left alone, None where it isn't excluded."""
        for one in self._exclude:
            if one in (role, node.op_type) or fnmatch.fnmatchcase(node.name or "", one):
                return f"it is excluded by {one!r}"
        return None
