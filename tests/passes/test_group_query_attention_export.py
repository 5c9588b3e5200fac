"""group-query-attention on decoders with a cache as exporters write them, in ONNX Runtime."""

from __future__ import annotations

import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graphopt.api import optimize
from graphopt.graph.assumptions import read
from graphopt.graph.edits import walk
from graphopt.graph.load import load
from graphopt.passes import registry

KV_HEADS, DEPTH, LAYERS = 2, 16, 2
ASSUMED = ["no-left-padding", "no-batched-chunks", "counted-positions"]


def _build(name: str) -> Any:
    import transformers as t

    size = {
        "hidden_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": KV_HEADS,
        "vocab_size": 101, "intermediate_size": 64, "head_dim": DEPTH,
    }  # fmt: skip
    match name:
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**size))
        case "qwen3":
            return t.Qwen3ForCausalLM(t.Qwen3Config(**size))
        case "gemma2":
            return t.Gemma2ForCausalLM(t.Gemma2Config(**size, query_pre_attn_scalar=DEPTH, sliding_window=64))
    raise KeyError(name)


def exported(name: str, exporter: str, folder: Path) -> Path:
    import torch
    import transformers

    torch.manual_seed(0)
    model = _build(name)
    model.set_attn_implementation("eager" if name == "gemma2" else "sdpa")

    class WithCache(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, *past: Any) -> tuple[Any, ...]:
            cache = transformers.DynamicCache()
            for layer in range(LAYERS):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            result = self.model(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
                use_cache=True,
            )  # fmt: skip
            return (result.logits, *(x for layer in result.past_key_values.layers for x in (layer.keys, layer.values)))

    past = [f"past.{n}.{part}" for n in range(LAYERS) for part in ("key", "value")]
    present = [f"present.{n}.{part}" for n in range(LAYERS) for part in ("key", "value")]
    inputs, outputs = ["input_ids", "attention_mask", "position_ids", *past], ["logits", *present]

    def dims(value: str) -> dict[int, str]:
        if "." in value:
            return {0: "batch", 2: "past" if value.startswith("past") else "total"}
        return {0: "batch", 1: "total" if value == "attention_mask" else "sequence"}

    feeds = fed(2, 6, 4)
    arguments = tuple(torch.from_numpy(feeds[key]) for key in inputs)
    path = folder / f"{name}-{exporter}.onnx"
    module = WithCache().eval().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            shapes = [dims(key) for key in inputs]
            torch.onnx.export(
                module, arguments, path, dynamo=True, dynamic_shapes=(*shapes[:3], tuple(shapes[3:])), opset_version=20,
                external_data=False, input_names=inputs, output_names=outputs, verbose=False,
            )  # fmt: skip
        else:
            axes = {key: dims(key) for key in (*inputs, *outputs)}
            torch.onnx.export(
                module, arguments, path, dynamo=False, opset_version=17, dynamic_axes=axes, input_names=inputs,
                output_names=outputs,
            )  # fmt: skip
    model_ir = load(path)
    for value in model_ir.graph.inputs:
        value.shape = ir.Shape([dims(value.name or "").get(axis, dim) for axis, dim in enumerate(value.shape or ())])
    ir.save(model_ir, path)
    return path


def fed(batch: int, past: int, tokens: int, padded: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch + past + tokens)
    mask = np.ones((batch, past + tokens), dtype=np.int64)
    if padded:
        mask[0, -2:] = 0
    feeds = {
        "input_ids": rng.integers(3, 100, size=(batch, tokens)),
        "attention_mask": mask,
        "position_ids": np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, past:],
    }
    for layer in range(LAYERS):
        for part in ("key", "value"):
            feeds[f"past.{layer}.{part}"] = rng.normal(size=(batch, KV_HEADS, past, DEPTH)).astype(np.float32)
    return feeds


def run(model: Path | ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = ort.InferenceSession(source, providers=["CPUExecutionProvider"])
    known = {value.name for value in session.get_inputs()}
    found: list[np.ndarray] = session.run(None, {k: v for k, v in feeds.items() if k in known})
    return found


RECIPE = [
    "inline-functions", "lift-constants", "eliminate-dead-code", "eliminate-identities", "simplify-shapes",
    "convert-opset", "fold-constants", "raise-layer-norm", "raise-rms-norm", "raise-linear",
    "raise-rotary", "raise-attention", "attention-masks", "group-query-attention", "eliminate-dead-code",
]  # fmt: skip


@pytest.mark.export
@pytest.mark.parametrize(("name", "exporter"), [("llama", "dynamo"), ("qwen3", "torchscript"), ("gemma2", "dynamo")])
def test_decoders(name: str, exporter: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = exported(name, exporter, Path(folder))
        passes = [name for name in RECIPE if name in registry.builtin()]
        result = optimize(path, {"passes": passes}, assume=ASSUMED, verify="none")
        ops = Counter(node.op_type for graph in walk(result.model) for node in graph)
        left = [site.detail for _, site in result.report.run.left() if "GroupQuery" in site.detail]
        assert ops["GroupQueryAttention"] == LAYERS, (ops, left)
        assert ops["RotaryEmbedding"] == 0
        assert ops["MatMul"] == LAYERS * (7 if name == "qwen3" else 5) + 1
        assert {entry.assumption for entry in read(result.model)} == set(ASSUMED)
        for batch, past, tokens, padded in ((1, 0, 5, False), (3, 0, 5, True), (3, 6, 1, False), (1, 6, 3, False)):
            feeds = fed(batch, past, tokens, padded)
            there = feeds["attention_mask"] != 0
            for index, (expected, got) in enumerate(zip(run(path, feeds), run(result.model, feeds), strict=True)):
                assert expected.shape == got.shape
                difference = np.abs(expected - got)
                kept = difference[there[:, past:]] if index == 0 else difference.transpose(0, 2, 1, 3)[there]
                assert kept.max() <= 1e-4 * np.abs(expected).max()
