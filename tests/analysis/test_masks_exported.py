"""The masks that exporters write: those of transformers today, and the code of its older versions.

Each form is compared with the numbers of a run, at other sizes than those of the export.
"""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from mask_values import assert_form

from graphopt.analysis.masks import MaskForm, Masks
from graphopt.analysis.shapes import lazily
from graphopt.models.catalogue import fetch

BATCH, TOKENS, PAST = 2, 5, 3
SIZES = {"batch": 3, "sequence": 4, "past": 2, "total": 6, "target": 7}
AXES = {
    "input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"},
    "decoder_input_ids": {0: "batch", 1: "target"}, "past": {0: "batch", 2: "past"},
}  # fmt: skip
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 101}


@functools.cache
def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


def axes_of(name: str) -> dict[int, str]:
    return AXES["past" if name.startswith("past") else name]


def write(module: Any, arguments: dict[str, Any], exporter: str) -> ir.Model:
    """`module` as "dynamo" or "torchscript" writes it, with the sizes named as in `AXES`."""
    import torch

    path = Path(folder().name) / "model.onnx"
    names = list(arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if exporter == "torchscript":
            torch.onnx.export(
                module, tuple(arguments.values()), path, dynamo=False, opset_version=17, input_names=names,
                output_names=["out"], dynamic_axes={name: axes_of(name) for name in names},
            )  # fmt: skip
            return ir.load(path)
        shapes = (tuple(dict.fromkeys(axes_of(name), torch.export.Dim.DYNAMIC) for name in names),)
        torch.onnx.export(
            module, tuple(arguments.values()), path, dynamo=True, opset_version=20, input_names=names,
            dynamic_shapes=shapes, verbose=False, external_data=False,
        )  # fmt: skip
    model = ir.load(path)
    for value in model.graph.inputs:
        sizes = axes_of(value.name or "")
        value.shape = ir.Shape([sizes.get(k, d) for k, d in enumerate(value.shape or ())])
    return model


def assert_true(model: ir.Model, values: list[ir.Value], sizes: dict[str, int], told: bool = False) -> list[MaskForm]:
    """The forms of `values`, compared with the numbers of a run; `told`: for S and P + S of the inputs."""
    facts = lazily(model)
    masks = Masks(facts)
    lengths: tuple[Any, ...] = ()
    if told:
        shapes = {v.name: facts.shape(v) for v in model.graph.inputs}
        ids, past = shapes["input_ids"], shapes["past"]
        assert ids is not None
        assert past is not None
        lengths = ids[1], ids[1] + past[2]
    forms: list[MaskForm] = []
    for value in values:
        form = masks.form(value, *lengths)
        assert isinstance(form, MaskForm), form
        forms.append(form)
    proto = ir.to_proto(model)
    known = {v.name for v in proto.graph.input} | {v.name for v in proto.graph.initializer}
    read = [r.value.name for r in masks.elements.reads.values()] + [f.bias.name for f in forms if f.bias is not None]
    wanted = list(dict.fromkeys(n for n in [*(v.name for v in values), *read] if n not in known))
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(proto.SerializeToString(), options)
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in value.shape or ()]
        numbers = rng.integers(0, 2, size=shape) if value.name == "attention_mask" else rng.integers(3, 20, size=shape)
        feeds[value.name or ""] = numbers.astype(value.dtype.numpy())  # type: ignore[union-attr]
    arrays = {**feeds, **dict(zip(wanted, session.run(wanted, feeds), strict=True))}
    for form in forms:
        assert_form(form, masks.elements, arrays)
    return forms


# ---- transformers today


def build(name: str) -> Any:
    import transformers as t

    wide = {**WIDTHS, "intermediate_size": 64}
    match name:
        case "llama":
            return t.LlamaForCausalLM(t.LlamaConfig(**wide, num_key_value_heads=2))
        case "mistral":
            return t.MistralForCausalLM(t.MistralConfig(**wide, num_key_value_heads=2, sliding_window=4))
        case "gemma2":
            return t.Gemma2ForCausalLM(t.Gemma2Config(**wide, num_key_value_heads=2, head_dim=8, sliding_window=4))
        case "bloom":
            return t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=101))
        case "falcon":
            return t.FalconForCausalLM(t.FalconConfig(**WIDTHS, multi_query=False))
        case "mpt":
            return t.MptForCausalLM(t.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=101, max_seq_len=64))
        case "bart":
            return t.BartForConditionalGeneration(
                t.BartConfig(
                    d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, vocab_size=101,
                    decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
                )
            )  # fmt: skip
        case "t5":
            return t.T5ForConditionalGeneration(
                t.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=101)
            )
    raise KeyError(name)


def exported(name: str, exporter: str, past: bool, mask: bool) -> ir.Model:
    """A tiny model with random weights, with a cache (`past`) and an attention mask (`mask`) as inputs, or without."""
    import torch
    import transformers

    torch.manual_seed(0)
    model = build(name).eval()
    model.config.use_cache = past
    model.set_attn_implementation("eager")
    ids = torch.randint(3, 100, (BATCH, TOKENS))
    arguments = {"input_ids": ids}
    if mask:
        arguments["attention_mask"] = torch.ones(BATCH, TOKENS + (PAST if past else 0), dtype=torch.long)
    if name in ("bart", "t5"):
        arguments["decoder_input_ids"] = torch.randint(3, 100, (BATCH, TOKENS + 1))
    layers = getattr(model.config, "num_hidden_layers", 0)
    heads = getattr(model.config, "num_key_value_heads", None) or getattr(model.config, "num_attention_heads", 0)
    if past:
        for k in range(2 * layers):
            arguments[f"past_{k}"] = torch.randn(BATCH, heads, PAST, 8)

    class Positional(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            given = dict(zip(arguments, tensors, strict=True))
            if past:
                cache = transformers.DynamicCache(config=model.config)
                for k in range(layers):
                    cache.update(given.pop(f"past_{2 * k}"), given.pop(f"past_{2 * k + 1}"), k)
                given["past_key_values"] = cache
            return self.model(**given)[0]

    return write(Positional().eval(), arguments, exporter)


def masks_of(model: ir.Model) -> list[ir.Value]:
    """What is added to the scores of each softmax, or chooses among them."""
    found: list[ir.Value] = []
    for node in model.graph:
        value = node.inputs[0] if node.op_type == "Softmax" else None
        for _ in range(8):
            step = None if value is None else value.producer()
            if step is None or step.op_type not in ("Add", "Where", "Cast", "Identity"):
                break
            of_scores = [k for k, operand in enumerate(step.inputs) if _from_product(operand)]
            if not of_scores:
                break
            if step.op_type in ("Add", "Where"):
                others = step.inputs[:1] if step.op_type == "Where" else step.inputs
                found += [v for k, v in enumerate(others) if v is not None and k not in of_scores]
            value = step.inputs[of_scores[0]]
    return list(dict.fromkeys(found))


def _from_product(value: ir.Value | None, depth: int = 0) -> bool:
    node = None if value is None else value.producer()
    if node is None or depth > 14:
        return False
    through = ("Mul", "Div", "Add", "Cast", "Reshape", "Where", "Tanh", "Identity", "Concat", "Transpose")
    if node.op_type in ("MatMul", "Gemm", "Einsum"):
        return True
    return node.op_type in through and any(_from_product(v, depth + 1) for v in node.inputs)


@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "exporter", "past", "mask", "expected"),
    [
        ("llama", "dynamo", True, True, ["causal, padding from 'attention_mask'"]),
        ("llama", "torchscript", True, True, ["causal, padding from 'attention_mask'"]),
        ("mistral", "dynamo", True, True, ["window 4, padding from 'attention_mask'"]),
        ("gemma2", "dynamo", False, True, ["causal, window 4, padding from", "causal, padding from 'attention_mask'"]),
        ("bloom", "dynamo", False, True, ["causal, padding from 'attention_mask'"]),
        ("mpt", "dynamo", False, True, ["where", "ALiBi of 4 heads"]),
        ("bart", "torchscript", False, True, ["padding from", "causal", "padding from"]),
        ("t5", "torchscript", False, True, ["padding from", "a bias", "causal", "a bias", "padding", "nothing masked"]),
    ],
)
def test_masks_of_transformers(name: str, exporter: str, past: bool, mask: bool, expected: list[str]) -> None:
    model = exported(name, exporter, past, mask)
    forms = assert_true(model, masks_of(model), SIZES if past else {**SIZES, "total": SIZES["sequence"]})
    told = list(dict.fromkeys(form.describe() for form in forms))
    assert len(told) == len(expected) or name in ("bart", "t5"), told
    for text in expected:
        assert any(text in t for t in told), (text, told)


# ---- the code of older versions, as traced models carry it


def _lowest() -> float:
    return float(np.finfo(np.float32).min)


def _positions(ids: Any, mask: Any, past: Any) -> Any:
    """4.40 to 4.49: a triangle times what lies beyond the cache positions, padding written into it in place."""
    import torch

    rows, held = ids.shape[1], past.shape[2]
    columns = mask.shape[-1]
    positions = torch.arange(held, held + rows)
    causal = torch.triu(torch.full((rows, columns), _lowest()), diagonal=1)
    causal *= torch.arange(columns) > positions.reshape(-1, 1)
    causal = causal[None, None].expand(ids.shape[0], 1, -1, -1).clone()
    padding = causal[:, :, :, :columns] + mask[:, None, None, :]
    causal[:, :, :, :columns] = causal[:, :, :, :columns].masked_fill(padding == 0, _lowest())
    return causal


def _triangle(ids: Any, past: Any) -> Any:
    import torch

    rows, held = ids.shape[1], past.shape[2]
    causal = torch.full((rows, rows), _lowest())
    steps = torch.arange(rows)
    causal.masked_fill_(steps < (steps + 1).view(rows, 1), 0)
    causal = torch.cat([torch.zeros(rows, held), causal], dim=-1)
    return causal[None, None].expand(ids.shape[0], 1, rows, rows + held)


def _inverted(ids: Any, mask: Any) -> Any:
    import torch

    wide = mask[:, None, None, :].expand(ids.shape[0], 1, ids.shape[1], mask.shape[1]).to(torch.float32)
    inverted = 1.0 - wide
    return inverted.masked_fill(inverted.to(torch.bool), _lowest())


def _converter(ids: Any, mask: Any, past: Any) -> Any:
    """4.35 to 4.39."""
    import torch

    return _triangle(ids, past).masked_fill(_inverted(ids, mask).to(torch.bool), _lowest())


def _summed(ids: Any, mask: Any, past: Any) -> Any:
    """Until 4.34."""
    return _inverted(ids, mask) + _triangle(ids, past)


def _buffer(ids: Any, mask: Any, past: Any) -> Any:
    """GPT-2: a slice of a stored triangle."""
    import torch

    held = torch.tril(torch.ones(64, 64, dtype=torch.bool)).view(1, 1, 64, 64)
    columns = ids.shape[1] + past.shape[2]
    seen = held[:, :, columns - ids.shape[1] : columns, :columns]
    return torch.where(seen, torch.tensor(0.0), torch.tensor(_lowest()))


def _window(ids: Any, mask: Any, past: Any) -> Any:
    import torch

    columns = ids.shape[1] + past.shape[2]
    apart = torch.arange(past.shape[2], columns)[:, None] - torch.arange(columns)[None, :]
    near = (apart >= 0) & (apart < 4)
    return torch.where(near[None, None] & (mask[:, None, None, :] != 0), 0.0, float("-inf"))


@pytest.mark.export
@pytest.mark.parametrize(
    ("code", "exporter", "expected"),
    [
        (_positions, "dynamo", "causal, padding from 'attention_mask'"),
        (_converter, "torchscript", "causal, padding from 'attention_mask', if 'attention_mask' is 0 or 1"),
        (_summed, "dynamo", "causal, padding from 'attention_mask', if 'attention_mask' is 0 or 1"),
        (_buffer, "torchscript", "causal"),
        (_window, "torchscript", "causal, window 4, padding from 'attention_mask'"),
    ],
)
def test_masks_of_older_code(code: Callable[[Any, Any, Any], Any], expected: str, exporter: str) -> None:
    import torch

    class Mask(torch.nn.Module):  # type: ignore[misc]
        def forward(self, *given: Any) -> Any:
            return code(*given), *(tensor + 0 for tensor in given)  # so that all stay inputs

    arguments = {
        "input_ids": torch.zeros(BATCH, TOKENS, dtype=torch.long),
        "attention_mask": torch.ones(BATCH, TOKENS + PAST, dtype=torch.long),
        "past": torch.zeros(BATCH, 2, PAST, 4),
    }
    model = write(Mask(), arguments, exporter)
    (form,) = assert_true(model, [model.graph.outputs[0]], SIZES, told=True)
    assert form.describe() == expected
    assert form.from_past
    if code is _buffer:
        assert not form.assumptions


@pytest.mark.real
def test_the_mask_of_a_real_encoder() -> None:
    model = ir.load(fetch("paraphrase-minilm"))
    masks = Masks(lazily(model))
    forms = [masks.form(value) for value in masks_of(model)]
    assert forms
    for form in forms:
        assert isinstance(form, MaskForm)
        assert form.describe() == "padding from 'attention_mask', if 'attention_mask' is 0 or 1"
        assert form.masked_value == _lowest()
