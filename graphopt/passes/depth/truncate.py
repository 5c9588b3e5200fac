"""truncate: the first layers alone, with what read the last one reading the last that stays."""

from __future__ import annotations

import math
from typing import ClassVar, get_args

import onnx_ir as ir

from graphopt.analysis.depth_units import depth_units
from graphopt.analysis.shapes import infer
from graphopt.errors import UsageError
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.depth.bypass import Norms, bypass, obstacles


class Truncate(Pass):
    """Keep the first layers of a model, and let all that read the last layer read the last one that stays.

        y = head(norm(x_L))   becomes   y = head(norm(x_n)),   n < L

    What comes behind the layers (final norm, pooling, head) stays as it is: logits are those that the early layer
    already tells, and an encoder's last hidden state is that of the early layer. Caches of the removed layers go, which
    are the last ones, so that no name changes.

    Papers: The EarlyBIRD Catches the Bug: On Exploiting Early Layers of Encoder Models for More Efficient Code
    Classification (one early layer in place of the last; its combinations of several layers are for training).

    **Options:** `layers` (default none): how many stay; `fraction` (default 0.75, where `layers` isn't given): of all
    layers, rounded to the nearest number; `stream` (default 0): which residual stream is cut where a model has several
    (encoder and decoder), the longest first; `norms` (default "remove"): whether the normalization of a post-LN sum
    goes with its branch ("keep": the last sum is normalised by all norms in a row).

    **Needs:** a canonical graph; no data. **Guarantees:** LOSSY.

    **Left alone, with the reason:** a branch whose sum has another shape than its skip, as between the stages of a
    convolutional model.

    **When not to use it:** for a decoder as it is, which uses its last layers to choose the token: `drop-layers` takes
    those that are missed least. It is for encoders whose task is read off an early layer, and in front of training.
    """

    name: ClassVar[str] = "truncate"
    family: ClassVar[str] = "depth"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = (
        "The EarlyBIRD Catches the Bug: On Exploiting Early Layers of Encoder Models for More Efficient Code "
        "Classification"
    )

    def __init__(
        self, layers: int | None = None, fraction: float | None = None, stream: int = 0, norms: Norms = "remove"
    ) -> None:
        super().__init__()
        if layers is not None and fraction is not None:
            raise ValueError("layers and fraction both say how many stay; give one of them")
        if layers is not None and layers < 1:
            raise ValueError(f"at least one layer must stay, not {layers}")
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(f"fraction must be above 0 and at most 1, not {fraction}")
        if stream < 0:
            raise ValueError(f"stream must not be negative, not {stream}")
        if norms not in get_args(Norms):
            raise ValueError(f"norms is one of {', '.join(get_args(Norms))}, not {norms!r}")
        self.layers, self.stream, self.norms = layers, stream, norms
        self.fraction = 0.75 if fraction is None and layers is None else fraction

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        facts = infer(model, believe_names=True)
        found = depth_units(model, facts)
        for node, reason in found.left:
            self.left(node, reason)
        layers = [layer for layer in found.layers if layer[0].stream == self.stream]
        if not layers:
            streams = len({unit.stream for unit in found.units})
            raise UsageError(f"truncate: the model has {streams} streams of layers, and stream {self.stream} is none.")
        stay = self.layers or max(1, math.floor((self.fraction or 1) * len(layers) + 0.5))
        if stay > len(layers):
            raise UsageError(f"truncate: {stay} layers can't stay, since the model has {len(layers)}.")
        gone = [unit for layer in layers[stay:] for unit in layer]
        for unit, reason in obstacles(model, found, gone, facts).items():
            raise UsageError(f"truncate: {unit.name} can't be removed: {reason}.")
        for unit in gone:
            cache = f", with its cache ({', '.join(pair.past for pair in unit.caches)})" if unit.caches else ""
            self.applied(unit.branch.add, f"{unit.name} removed: {unit.bytes} bytes of weights{cache}")
        bypass(model, found, gone, facts, norms=self.norms)
        # Run again on the result of another pass, the same number stays.
        self.layers, self.fraction = stay, None
        return bool(gone)
