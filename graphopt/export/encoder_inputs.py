"""What the encoder of an encoder-decoder is fed: found in its signature, its configuration, its layers and dry runs."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.errors import UsageError, first_line
from graphopt.export.dependencies import require
from graphopt.export.dry_run import dry_run, used
from graphopt.export.sample_inputs import floats, integers, padding_mask
from graphopt.export.source import Input

BATCHES = (2, 1, 3)
"""Rows of the sample, then of the probes; every tuple of sizes here is in this order."""
TOKENS = (8, 16, 7)
FRAMES = ((64, 96, 80), (8000, 16000, 12000))
"""Lengths of sound to try: of spectra or small models, of waveforms."""


@dataclass(frozen=True)
class EncoderInputs:
    """The inputs of an encoder, and the length of what it gives for them.

    Attributes:
        inputs: The main input, then the attention mask where it counts.
        sizes: Of each dynamic dimension ("batch", the input's own, "encoder_sequence" for the output's length): its
            sizes in the sample and in the probes.
        width: Size of the last dimension of what the encoder gives.
        mask: The dimensions of the mask; None: it has none, or one that changes nothing.
        result: The class of what the encoder returns.
        gives_mask: Whether it also returns a mask of its states, which the decoder reads in place of that of the
            inputs.
    """

    inputs: list[Input]
    sizes: dict[str, tuple[int, ...]]
    width: int
    mask: tuple[int | str, ...] | None
    result: Any
    gives_mask: bool


def encoder_inputs(
    label: str, module: Any, encoder: Any, image: tuple[int, int] | None = None, embedded: bool = False
) -> EncoderInputs:
    """The inputs of `encoder`, a part of `module`.

    Args:
        label: What messages call the model.
        module: The encoder-decoder.
        encoder: What it gives as its encoder.
        image: Height and width of the images, where the configuration doesn't tell them.
        embedded: It is fed with embeddings in place of tokens.

    Raises:
        UsageError: They can't be derived; the message says which.
    """
    parameters = inspect.signature(encoder.forward).parameters
    wanted = (getattr(encoder, "main_input_name", module.main_input_name), module.main_input_name)
    main = next((name for name in (("inputs_embeds",) if embedded else wanted) if name in parameters), None)
    if main is None:
        raise UsageError(
            f"{label}: its encoder {type(encoder).__name__} doesn't take its main input {wanted[0]}; "
            "write a function that returns the encoder and its example inputs, and export module:function"
        )
    dtype = module.dtype
    with_mask = "attention_mask" in parameters
    refused = ""
    config = getattr(encoder, "config", module.config)
    width = module.get_input_embeddings().weight.shape[-1] if embedded else 0
    for item, sizes in _candidates(label, main, encoder, config, dtype, image, width):
        mask_dims = ("batch", next((d for d in item.dims if isinstance(d, str) and d != "batch"), ""))
        mask = Input("attention_mask", mask_dims, padding_mask)
        given = [item, mask] if with_mask and mask_dims[1] else [item]
        try:
            found = [_run(module, encoder, given, {s: n[i] for s, n in sizes.items()}) for i in range(len(BATCHES))]
        except Exception as error:
            refused = refused or first_line(error)
            continue
        shapes = [tuple(result[0].shape) for result in found]
        if any(len(shape) != 3 or shape[1] < 1 for shape in shapes):
            refused = refused or f"it gives {shapes[0]}"
            continue
        if len(given) > 1 and not _mask_counts(module, encoder, given, sizes):
            given = [item]
        return EncoderInputs(
            inputs=given,
            sizes={**sizes, "encoder_sequence": tuple(shape[1] for shape in shapes)},
            width=shapes[0][2],
            mask=mask_dims if len(given) > 1 else None,
            result=type(found[0]),
            gives_mask=len(given) > 1 and getattr(found[0], "attention_mask", None) is not None,
        )
    raise UsageError(
        f"{label}: its encoder {type(encoder).__name__} doesn't run on the input {main} as text, image or sound"
        + (f" ({refused})" if refused else "")
        + "; write a function that returns the encoder and its example inputs, and export module:function"
    )


def encode(encoder: Any, inputs: Sequence[Input], gives_mask: bool) -> Callable[..., tuple[Any, ...]]:
    """A function of the encoder's inputs that gives (last hidden state,), or that and the int64 mask of the states."""

    def call(*tensors: Any) -> tuple[Any, ...]:
        result = _result(encoder, inputs, tensors)
        return (result[0], result.attention_mask.long()) if gives_mask else (result[0],)

    return call


def _result(encoder: Any, inputs: Sequence[Input], tensors: Sequence[Any]) -> Any:
    return encoder(**{item.name: tensor for item, tensor in zip(inputs, tensors, strict=True)}, return_dict=True)


def _run(module: Any, encoder: Any, inputs: Sequence[Input], sizes: dict[str, int]) -> Any:
    tensors = [item.tensor(sizes, np.random.default_rng(0)) for item in inputs]
    return dry_run(module, lambda *given: _result(encoder, inputs, given), tensors)


def _mask_counts(module: Any, encoder: Any, inputs: Sequence[Input], sizes: dict[str, tuple[int, ...]]) -> bool:
    tensors = [item.tensor({s: n[0] for s, n in sizes.items()}, np.random.default_rng(0)) for item in inputs]
    return used(module, encode(encoder, inputs, gives_mask=False), tensors)[-1]


def longest(config: Any, default: int = 512) -> int:
    """Tokens that a model's table of positions has room for; some start behind the padding index."""
    names = ("max_position_embeddings", "max_target_positions", "n_positions")
    found = [n for n in (getattr(config, name, None) for name in names) if isinstance(n, int) and n > 2]
    return min([default, *found]) - 2


def _candidates(
    label: str, main: str, encoder: Any, config: Any, dtype: Any, image: tuple[int, int] | None, width: int
) -> list[tuple[Input, dict[str, tuple[int, ...]]]]:
    """Forms that the main input may have, with sizes of their dynamic dimensions."""
    batch: dict[str, tuple[int, ...]] = {"batch": BATCHES}
    if main in ("input_ids", "inputs_embeds"):
        room = longest(config)
        sizes = {**batch, "encoder_sequence": tuple(min(n, room) for n in TOKENS)}
        if main == "inputs_embeds":
            return [(Input(main, ("batch", "encoder_sequence", width), floats(dtype)), sizes)]
        return [(Input(main, ("batch", "encoder_sequence"), integers(_words(encoder, config))), sizes)]
    if main == "pixel_values":
        height, width = image or _image_size(label, config)
        channels = getattr(config, "num_channels", None) or 3
        return [(Input(main, ("batch", channels, height, width), floats(dtype)), batch)]
    if main == "flattened_patches":
        sizes = {**batch, "encoder_sequence": TOKENS}
        # Row and column of a patch, then its pixels.
        return [(Input(main, ("batch", "encoder_sequence", 2 + _first_width(encoder)), _placed_patches(dtype)), sizes)]
    if main in ("input_features", "input_values", "inputs"):
        return _sound(main, encoder, config, dtype)
    return []


def _words(encoder: Any, config: Any) -> int:
    try:
        return int(encoder.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return int(getattr(config, "src_vocab_size", None) or config.get_text_config(encoder=True).vocab_size)


def _image_size(label: str, config: Any) -> tuple[int, int]:
    size = getattr(config, "image_size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    raise UsageError(f"{label}: the configuration of its encoder doesn't tell the size of its images (image_size)")


def _sound(main: str, encoder: Any, config: Any, dtype: Any) -> list[tuple[Input, dict[str, tuple[int, ...]]]]:
    """Waveforms [batch, samples], spectra with the bins first or last; any length, else the one that is expected."""
    width = _first_width(encoder)
    waveform: tuple[int | str, ...] = ("batch", "samples")
    spectra: list[tuple[int | str, ...]] = [("batch", width, "frames"), ("batch", "frames", width)]
    forms = [*spectra, waveform] if main == "input_features" else [waveform, *spectra]
    found: list[tuple[Input, dict[str, tuple[int, ...]]]] = []
    for lengths in FRAMES:
        for dims in forms:
            symbol = next(d for d in dims if d in ("samples", "frames"))
            found.append((Input(main, dims, floats(dtype)), {"batch": BATCHES, str(symbol): lengths}))
    positions = getattr(config, "max_source_positions", None)
    if positions:
        torch = require("torch")
        strides = [m.stride[0] for m in encoder.modules() if isinstance(m, torch.nn.Conv1d)]
        whole = positions * math.prod(strides)
        for dims in spectra:
            fixed = tuple(whole if d == "frames" else d for d in dims)
            found.append((Input(main, fixed, floats(dtype)), {"batch": BATCHES}))
    return found


def _first_width(encoder: Any) -> int:
    """Numbers per frame: what the first layer with weights takes."""
    torch = require("torch")
    for layer in encoder.modules():
        if isinstance(layer, torch.nn.Conv1d):
            return int(layer.in_channels)
        if isinstance(layer, torch.nn.Linear):
            return int(layer.in_features)
        if isinstance(layer, torch.nn.LayerNorm):
            return int(layer.normalized_shape[-1])
    return 1


def _placed_patches(dtype: Any) -> Callable[[tuple[int, ...], np.random.Generator], Any]:
    """Patches [batch, places, 2 + numbers], each with its row and column, from 1."""

    def make(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
        made = generator.normal(size=shape).astype(np.float32)
        places = np.arange(shape[1])
        made[..., 0], made[..., 1] = 1 + places // 4, 1 + places % 4
        return require("torch").from_numpy(made).to(dtype)

    return make
