"""How each model of the attention matrix is exported: by which exporter, at which opset, from which implementation."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from matrix_models import Model


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to export a model.

    Attributes:
        exporter: "export" (torch.export) or "script" (TorchScript), "text" (written by hand).
        opset: The opset asked for; 0: the exporter's own choice.
        attention: The attention implementation of transformers, "" for a module that has none of its own.
        cached: With past_key_values.* inputs and present.* outputs.
    """

    exporter: Literal["export", "script", "text"]
    opset: int
    attention: str
    cached: bool = False

    @property
    def name(self) -> str:
        """As the options and the table call it."""
        return "-".join(
            filter(None, (self.exporter, str(self.opset or ""), self.attention, "cache" if self.cached else ""))
        )

    def file(self, key: str) -> str:
        """Where the export lies in the folder of exports."""
        return f"{key.replace(':', '-')}/{self.name}.onnx"


USUAL = (
    Variant("export", 18, "eager"), Variant("export", 20, "sdpa"), Variant("export", 23, "sdpa"),
    Variant("script", 11, "eager"), Variant("script", 14, "sdpa"), Variant("script", 17, "eager"),
)  # fmt: skip
"""The variants by default: every exporter and opset, both implementations."""
RARE = (
    Variant("export", 18, "sdpa"), Variant("export", 20, "eager"), Variant("export", 23, "eager"),
    Variant("script", 14, "eager"), Variant("script", 17, "sdpa"),
)  # fmt: skip


def variants_of(model: Model, names: Sequence[str] | None = None) -> Iterator[Variant]:
    """The variants of a model, of those that are named: the usual ones, or "all"; a decoder also with a cache."""
    if model.key.startswith("onnx:"):
        yield Variant("text", 0, "")
        return
    chosen = USUAL if names is None else (*USUAL, *RARE)
    seen: set[Variant] = set()
    for cached in (False, True) if model.kind == "decoder" else (False,):
        for plain in chosen:
            held = model.implementations
            attention = plain.attention if plain.attention in held else held[0] if held else ""
            variant = dataclasses.replace(plain, attention=attention, cached=cached)
            if variant in seen or not (names is None or "all" in names or variant.name in names or plain.name in names):
                continue
            seen.add(variant)
            yield variant
