"""What the passes have in common that write attention over a cache as an operator that counts the tokens of a row."""

from __future__ import annotations

import abc
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.analysis.masks import Masks, NoForm
from graphopt.analysis.shapes import ShapeFacts, lazily
from graphopt.graph.edits import Editor
from graphopt.passes.base import RulePass
from graphopt.passes.lower.cached_site import CachedSite, NotTaken, Operand, as_tokens, read, token_outputs
from graphopt.passes.lower.rotary_table import Need, RotaryTables
from graphopt.passes.lower.token_lengths import TokenLengths

LEFT = "no-left-padding"


class CachedAttentionPass(RulePass):
    """Base of these passes: reads the sites, and what of their masks such an operator can be told.

    Attributes:
        writes: The operator that is written.
    """

    anchors: ClassVar[tuple[str, ...]] = ("Attention",)
    writes: ClassVar[str]

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Know what is known already. Sizes that the signature declares equal by name are taken as equal, as by
        raise-attention."""
        self._facts: ShapeFacts = lazily(model, believe_names=True)
        self._masks = Masks(self._facts)
        self._lengths = TokenLengths(self._facts, edit)
        self._tables = RotaryTables(self._facts, edit, self.assumptions, self._lengths)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """As `Pass.call`; facts don't outlive it."""
        try:
            return super().call(model)
        finally:
            for name in ("_facts", "_masks", "_lengths", "_tables"):
                self.__dict__.pop(name, None)

    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """See the class."""
        try:
            site = read(node, self._facts)
            return site is not None and self.take(site, edit)
        except NotTaken as reason:
            return self.left(node, f"not {self.writes}: {reason}")

    @abc.abstractmethod
    def take(self, site: CachedSite, edit: Editor) -> bool:
        """Write the operator in place of a site.

        Raises:
            NotTaken: The operator can't do what the site does, or an assumption is missing.
        """

    def rely_on_all(self, needs: list[Need], model: ir.Model) -> None:
        """Note in the model what is taken for granted; see `require`."""
        for need in needs:
            self.rely_on(model, need.assumption, need.inputs, need.reason)

    def require(self, needs: list[Need]) -> None:
        """Raise NotTaken where one of `needs` isn't assumed."""
        for need in needs:
            if not self.assumptions.holds(need.assumption):
                instead = f", or {need.instead}" if need.instead else ""
                raise NotTaken(f"{need.problem}: --assume {need.assumption}{instead}")

    def mask(self, site: CachedSite) -> tuple[ir.Value | None, int, list[Need]]:
        """The padding mask, the window, and what has to be assumed for them."""
        if site.mask is None:
            if not site.causal and site.tokens != 1:
                raise NotTaken("every query sees every key, and the operator is causal")
            return None, 0, []
        if site.causal:
            raise NotTaken("it has a mask and is_causal; attention-masks makes one of them")
        form = self._masks.form(site.mask, site.tokens, site.total)
        if isinstance(form, NoForm):
            raise NotTaken(f"its mask isn't understood at {form.value.name!r}: {form.reason}")
        if form.biased:
            raise NotTaken(f"its mask is {form.describe()}, and with a bias Attention is as fast")
        if form.positions is not None or form.other or (form.padding is not None and form.shift != 0):
            raise NotTaken(f"its mask is {form.describe()}")
        if not (form.causal and form.from_past) and site.tokens != 1:
            raise NotTaken(f"its mask is {form.describe()}, and the operator is causal")
        if form.padding is None:
            if form.assumptions:
                raise NotTaken("sizes of its mask aren't certain")
            return None, form.window or 0, []
        if not form.padding.is_graph_input():
            raise NotTaken(f"its padding {form.padding.name!r} is no input of the model, so nothing can check it")
        if any(value is not form.padding for value in form.binary):
            raise NotTaken(f"its mask is {form.describe()}")
        need = Need(
            LEFT, {"mask": form.padding.name or ""}, f"{self.writes} takes rows to be padded at the end",
            "rows may be padded on the left",
        )  # fmt: skip
        return form.padding, form.window or 0, [need]

    def tokens(self, operand: Operand, site: CachedSite, edit: Editor, *, rotated: bool) -> ir.Value:
        """An operand as [batch, tokens, heads · depth], with its rotation or without."""
        value = as_tokens(operand, site.depth, edit)
        if operand.rotation is None or not rotated:
            return value
        attributes = {name: attribute.value for name, attribute in operand.rotation.attributes.items()}
        attributes["num_heads"] = operand.heads
        return edit.op("RotaryEmbedding", [value, *operand.rotation.inputs[1:]], attributes)

    def replace(self, site: CachedSite, y: ir.Value, edit: Editor) -> None:
        """Let `y`, [batch, tokens, heads · depth], take the place of the result of the attention."""
        result = site.node.outputs[0]
        y.type = result.type
        if site.joined:
            edit.replace(result, y)
            return
        for old in token_outputs(result, site, self._facts):
            edit.replace(old, y)
        if not result.uses() and not result.is_graph_output():
            return
        sizes = edit.constant(np.array([0, 0, site.heads, site.depth]), "heads")
        split = edit.op("Reshape", [y, sizes])
        edit.replace(result, edit.op("Transpose", [split], {"perm": [0, 2, 1, 3]}, like=result))
