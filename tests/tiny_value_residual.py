"""Tiny decoders of Value Residual Learning (ResFormer, SVFormer), with one cache for each layer as `DynamicCache` keeps
them, exported by both exporters of PyTorch."""

from __future__ import annotations

import functools
import itertools
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from graphopt.graph.load import load

if TYPE_CHECKING:
    import torch

Form = Literal["svformer", "svformer-unused", "mixed", "separate", "cross-layer", "llama"]
"""Whose values a layer reads: "svformer" those of the first layer, "svformer-unused" these, with weights for its own
that it doesn't use, "mixed" λ₁ V_l + λ₂ V_1, cached so, "separate" the same, cached as V_l and a copy of V_1, and
"llama" its own. "cross-layer": keys as well as values of the first layer."""
LAYERS, HIDDEN, HEADS, KV_HEADS, DEPTH, VOCABULARY = 3, 64, 4, 2, 16, 101


def parts(form: Form, layer: int) -> list[str]:
    """The caches of a layer."""
    return ["key", "value", "first"] if form == "separate" and layer else ["key", "value"]


def caches(form: Form, layers: int = LAYERS) -> list[str]:
    """The names of all caches, without "past." or "present."."""
    return [f"{layer}.{part}" for layer in range(layers) for part in parts(form, layer)]


@functools.cache
def _classes() -> type[torch.nn.Module]:
    import torch
    from torch import nn

    def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()

    class Norm(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    class Layer(nn.Module):
        def __init__(self, form: Form, number: int, hidden: int, heads: int, kv_heads: int) -> None:
            super().__init__()
            self.form, self.number, self.heads, self.kv_heads = form, number, heads, kv_heads
            width = kv_heads * DEPTH
            self.norm, self.norm2 = Norm(hidden), Norm(hidden)
            self.q, self.o = nn.Linear(hidden, heads * DEPTH, bias=False), nn.Linear(heads * DEPTH, hidden, bias=False)
            self.k = nn.Linear(hidden, width, bias=False)
            if not number or form not in ("svformer", "cross-layer"):
                self.v = nn.Linear(hidden, width, bias=False)
            self.own, self.firsts = nn.Parameter(torch.tensor(0.6)), nn.Parameter(torch.tensor(0.4))
            self.up, self.down = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)

        def split(self, x: torch.Tensor, heads: int) -> torch.Tensor:
            return x.view(x.shape[0], x.shape[1], heads, DEPTH).transpose(1, 2)

        def forward(
            self, x: torch.Tensor, angles: torch.Tensor, mask: torch.Tensor, past: list[torch.Tensor], first: Any
        ) -> tuple[torch.Tensor, list[torch.Tensor], Any]:
            normed = self.norm(x)
            q = turned(self.split(self.q(normed), self.heads), angles)
            if first is not None and self.form == "cross-layer":
                k = first[0]
            else:
                k = turned(self.split(self.k(normed), self.kv_heads), angles)
            if first is None or self.form in ("mixed", "separate", "llama"):
                v = self.split(self.v(normed), self.kv_heads)
            else:
                v = first[1]
            if first is not None and self.form == "mixed":
                v = self.own * v + self.firsts * first[1]
            new = [k, v, *([first[1]] if first is not None and self.form == "separate" else [])]
            present = [torch.cat([old, now], dim=2) for old, now in zip(past, new, strict=True)]
            keys, values = present[:2]
            if len(present) == 3:
                values = self.own * values + self.firsts * present[2]
            keys, values = (one.repeat_interleave(self.heads // self.kv_heads, dim=1) for one in (keys, values))
            scores = q @ keys.transpose(2, 3) * DEPTH**-0.5 + mask
            y = (scores.softmax(dim=-1) @ values).transpose(1, 2).reshape(x.shape[0], x.shape[1], self.heads * DEPTH)
            x = x + self.o(y)
            return x + self.down(nn.functional.silu(self.up(self.norm2(x)))), present, first or (k, v)

    class Decoder(nn.Module):
        def __init__(self, form: Form, layers: int, hidden: int, heads: int, kv_heads: int, vocabulary: int) -> None:
            super().__init__()
            self.form = form
            self.embedding = nn.Embedding(vocabulary, hidden)
            self.layers = nn.ModuleList(Layer(form, i, hidden, heads, kv_heads) for i in range(layers))
            self.norm, self.head = Norm(hidden), nn.Linear(hidden, vocabulary, bias=False)

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, *past: torch.Tensor
        ) -> tuple[torch.Tensor, ...]:
            x = self.embedding(input_ids)
            frequencies = 10000.0 ** (-torch.arange(DEPTH // 2) / (DEPTH / 2))
            angles = (position_ids[:, :, None] * frequencies).repeat(1, 1, 2)[:, None]
            before, new = past[0].shape[2], input_ids.shape[1]
            seen = torch.arange(before + new)[None, :] <= torch.arange(before, before + new)[:, None]
            allowed = seen[None, None] & attention_mask[:, None, None, :].bool()
            mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
            given, presents, first = iter(past), [], None
            for number, layer in enumerate(self.layers):
                own = list(itertools.islice(given, len(parts(self.form, number))))
                x, present, first = layer(x, angles, mask, own, first)
                presents += present
            return (self.head(self.norm(x)), *presents)

    return Decoder


def exported(
    form: Form,
    exporter: str,
    folder: Path,
    *,
    layers: int = LAYERS,
    hidden: int = HIDDEN,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    vocabulary: int = VOCABULARY,
) -> Path:
    """The file of a decoder with random weights, by "dynamo" or "torchscript"."""
    import torch

    torch.manual_seed(0)
    module: Any = _classes()(form, layers, hidden, heads, kv_heads, vocabulary)
    for parameter in module.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    names = caches(form, layers)
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past.{name}" for name in names)]
    outputs = ["logits", *(f"present.{name}" for name in names)]

    def dims(value: str) -> dict[int, str]:
        if "." in value:
            return {0: "batch", 2: "past" if value.startswith("past") else "total"}
        return {0: "batch", 1: "total" if value == "attention_mask" else "sequence"}

    feeds = fed(form, 2, 6, 4, layers=layers, kv_heads=kv_heads)
    arguments = tuple(torch.from_numpy(feeds[key]) for key in inputs)
    path, raw = folder / f"{form}-{exporter}.onnx", folder / f"{form}-{exporter}.raw.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = [dims(key) for key in inputs]
            torch.onnx.export(
                module.eval().requires_grad_(False), arguments, raw, dynamo=True, opset_version=20, verbose=False,
                dynamic_shapes=(*shapes[:3], tuple(shapes[3:])), external_data=False, input_names=inputs,
                output_names=outputs,
            )  # fmt: skip
        else:
            axes = {key: dims(key) for key in (*inputs, *outputs)}
            torch.onnx.export(
                module.eval().requires_grad_(False), arguments, raw, dynamo=False, opset_version=17, dynamic_axes=axes,
                input_names=inputs, output_names=outputs,
            )  # fmt: skip
    model = load(raw)
    for value in model.graph.inputs:
        value.shape = ir.Shape([dims(value.name or "").get(axis, dim) for axis, dim in enumerate(value.shape or ())])
    ir.save(model, path)
    return path


def fed(
    form: Form, batch: int, past: int, tokens: int, *, layers: int = LAYERS, kv_heads: int = KV_HEADS
) -> dict[str, np.ndarray]:
    """Inputs by name, with noise in the caches."""
    rng = np.random.default_rng(batch + past + tokens)
    feeds = {
        "input_ids": rng.integers(0, VOCABULARY, size=(batch, tokens)),
        "attention_mask": np.ones((batch, past + tokens), dtype=np.int64),
        "position_ids": np.tile(np.arange(past, past + tokens), (batch, 1)),
    }
    shape = (batch, kv_heads, past, DEPTH)
    return feeds | {f"past.{name}": rng.normal(size=shape).astype(np.float32) for name in caches(form, layers)}
