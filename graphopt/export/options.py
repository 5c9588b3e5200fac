"""How a model is exported, and what was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from graphopt.errors import UsageError
from graphopt.export.trace import Exporter
from graphopt.runtime_ops.block_products import Inputs

Verify = Literal["auto", "full", "layers", "none"]
Finish = Callable[[ir.Model], ir.Model]

OPSET = {"dynamo": 23, "torchscript": 17}
"""The opset of each exporter where none is asked for: 17 is the first with LayerNormalization, 23 with Attention."""


@dataclass(frozen=True)
class Way:
    """How a model is traced: by what, with which attention implementation (empty: the module's own), at which opset."""

    exporter: Exporter
    implementation: str
    opset: int

    def __str__(self) -> str:
        return " ".join(filter(None, (self.exporter, self.implementation, f"opset {self.opset}")))


@dataclass(frozen=True)
class Options:
    """How to export.

    Attributes:
        opset: Version of the default operator domain; None: 23 for dynamo, 17 for torchscript.
        attention: transformers' attention implementation, "sdpa" or "eager"; None: one that exports to ONNX's operator
            where the model can use it.
        exporter: "dynamo" (torch.export) or "torchscript" (tracing); None: the first, and the second where the first
            can't.
        dtype: "float32" or "float16", of weights and floating-point inputs of Hugging Face models.
        last_logits: A decoder gives the logits of the last position only.
        repeat: Equal layers are traced a few times and repeated in the graph, where that can be.
        verify: "full": compare with PyTorch; "layers": compare the first layers, as many as are traced; "none"; "auto":
            full where the memory is free for it, else layers.
        adapters: peft folders: merged into the weights, or (`keep_adapters`) kept beside them, to be switched when run.
        keep_adapters: See `adapters`; each is written to <folder's name>.onnx_adapter beside the model.
        keep_quantized: Of a GGUF file's weights keep the integers, where there are operators for them.
        activations: What those operators make of their inputs: "int16", "int8", "int8x2" or "float32"; see
            `graphopt.export.gguf.keep`.
        runtime: "genai": write genai_config.json beside the model, for onnxruntime-genai.
        finish: Rewrites each graph before it is written, exactly.
    """

    opset: int | None = None
    attention: str | None = None
    exporter: Exporter | None = None
    dtype: str = "float32"
    last_logits: bool = False
    repeat: bool = True
    verify: Verify = "auto"
    adapters: Sequence[str | Path] = ()
    keep_adapters: bool = False
    keep_quantized: bool = False
    activations: Inputs = "int16"
    runtime: Literal["genai"] | None = None
    finish: Finish | None = None

    def check(self, name: str) -> None:
        """Raise UsageError for what can't be."""
        if self.exporter not in (None, *OPSET):
            raise UsageError(f"there is no exporter {self.exporter!r}; use dynamo or torchscript")
        if self.attention not in (None, "sdpa", "eager"):
            raise UsageError(f"there is no attention implementation {self.attention!r}; use sdpa or eager")
        if self.dtype not in ("float32", "float16"):
            raise UsageError(f"models aren't exported in {self.dtype}; use float32 or float16")
        if self.verify not in ("auto", "full", "layers", "none"):
            raise UsageError(f"there is no verification {self.verify!r}; use auto, full, layers or none")
        if self.runtime not in (None, "genai"):
            raise UsageError(f"there is no layout for {self.runtime!r}; use genai")
        if self.keep_adapters and not self.adapters:
            raise UsageError("there are no adapters to keep; name their folders with --adapter")
        if self.keep_quantized and not name.endswith(".gguf"):
            raise UsageError(f"{name} isn't a GGUF file, so it has no quantized weights to keep")
        if self.keep_quantized and self.dtype != "float32":
            raise UsageError("quantized weights are kept in a float32 model only; leave out --dtype")
        if self.keep_quantized and self.adapters and not self.keep_adapters:
            raise UsageError("an adapter can't be merged into weights that are kept quantized; use --keep-adapters")
        if is_factory(name) and (self.dtype != "float32" or self.attention is not None or self.last_logits):
            raise UsageError(
                f"dtype, attention and last logits are for Hugging Face models; {name} makes its module as it wants it"
            )


def is_factory(name: str) -> bool:
    """Whether this is "module:callable"."""
    module, colon, attribute = name.partition(":")
    identifiers = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in identifiers)


@dataclass(frozen=True)
class Part:
    """One model that an export wrote.

    Attributes:
        path: The model.
        inputs: The dimensions of each input: a size, or the name of a dynamic one.
        outputs: The same for each output.
        opset: The version of the default operator domain.
        nodes: Number of nodes, Constant ones too.
        errors: For each output the largest absolute difference from PyTorch, relative to the largest magnitude
            of that output, over all calls. Empty: not compared.
    """

    path: Path
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    opset: int
    nodes: int
    errors: dict[str, float]


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        parts: The models, one of them for most.
        files: All files written, the models first.
        way: How it was traced.
        seconds: Seconds of wall time by step: load, reference, trace, write, verify.
        notes: What the user should know.
    """

    parts: tuple[Part, ...]
    files: tuple[Path, ...]
    way: Way
    seconds: dict[str, float]
    notes: tuple[str, ...]

    @property
    def path(self) -> Path:
        """The first model."""
        return self.parts[0].path

    @property
    def inputs(self) -> dict[str, tuple[int | str, ...]]:
        """Of the first model."""
        return self.parts[0].inputs

    @property
    def outputs(self) -> dict[str, tuple[int | str, ...]]:
        """Of the first model."""
        return self.parts[0].outputs

    @property
    def opset(self) -> int:
        """Of the first model."""
        return self.parts[0].opset

    @property
    def nodes(self) -> int:
        """Of all models."""
        return sum(part.nodes for part in self.parts)

    @property
    def max_relative_error(self) -> float:
        """The largest error of any output."""
        return max((error for part in self.parts for error in part.errors.values()), default=0.0)
