"""Which tokens count how much in the statistics of a weight."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.analysis.attention_sites import AttentionSite
from graphopt.analysis.linear_sites import LinearSite
from graphopt.calibration.request import TokenWeights


class TokensOf:
    """The weights of tokens for each linear site.

    Queries, keys and values count by the attention that they go into; all else by the last attention before it.

    Args:
        model: The model.
        attention: Its attention sites.
        form: "all": all tokens alike; else the form of `TokenWeights`.
        roles: The roles of linear sites that are weighted, or "all"; others count all tokens alike.
    """

    def __init__(self, model: ir.Model, attention: Sequence[AttentionSite], form: str, roles: Sequence[str]) -> None:
        self._form, self._roles = form, frozenset(roles)
        self._last: dict[ir.Node, ir.Node] = {}
        self._next: dict[ir.Node, ir.Node] = {}
        if form == "all":
            return
        anchors = {site.node for site in attention}
        order = list(model.graph)
        for table, walk in ((self._last, order), (self._next, reversed(order))):
            seen = None
            for node in walk:
                seen = node if node in anchors else seen
                if seen is not None:
                    table[node] = seen

    def of(self, site: LinearSite) -> TokenWeights | None:
        """The weights for the input of a site; None: none."""
        if self._form == "all" or not self._roles & {site.role, "all"}:
            return None
        near = self._next if site.role in ("q", "k", "v", "kv", "qkv") else self._last
        node = near.get(site.node)
        return None if node is None else TokenWeights(node, self._form)  # type: ignore[arg-type]
