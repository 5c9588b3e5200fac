"""Compare exported files, run in ONNX Runtime, with the PyTorch module of the folder that they were exported from.

Decoders answer the calls of `decoder_domain`; encoder-decoders prompts, steps and chunks after encoded inputs with and
without padding; other models batch 1 and 3 at several lengths, padded at either end. Every file fills its own cache,
so its layout is its own affair.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import export_matrix_models
import numpy as np
from decoder_domain import CASES, Case, cut
from export_matrix_files import Array, Part, Refused, Stepwise, opened
from export_matrix_models import GENERATING, load
from export_matrix_worker import reason
from matrix_models import MODELS, WORDS, Model, feeds

TOKENS = (7, 12)
"""Lengths of what isn't generated."""
_DECODED = {"prefill": (0, 4), "decode": (4, 1), "chunk": (4, 3)}
"""An encoder-decoder's calls: tokens before, tokens of the call."""


def prepare(name: str) -> None:
    """Import what judging needs."""
    export_matrix_models.prepare(name)
    import onnxruntime  # noqa: F401

    import graphopt.export.compare
    import graphopt.graph.load  # noqa: F401


@dataclasses.dataclass(frozen=True)
class Call:
    """One call: its name, PyTorch's answer by output, and what the files answer."""

    label: str
    expected: Callable[[], Mapping[str, Array]]
    found: Callable[[], Mapping[str, Array]]
    error: Callable[[Array, Array], float]


def judge(key: str, folder: str, output: str) -> dict[str, Any]:
    """Errors by call (a sentence where the files refuse it), the nodes and bytes of the files, and inputs they lack."""
    from graphopt.graph.edits import nodes
    from graphopt.graph.load import load as read

    model = MODELS[key]
    paths = sorted(Path(output).rglob("*.onnx"))
    size = sum(path.stat().st_size for path in Path(output).rglob("*.onnx*"))
    answer: dict[str, Any] = {"files": len(paths), "nodes": None, "bytes": size}
    try:
        parts = [opened(path) for path in paths]
    except Exception as error:
        return {**answer, "calls": dict.fromkeys(labels(model), f"doesn't load: {reason(error)}")}
    answer["nodes"] = sum(1 for path in paths for _ in nodes(read(path)))
    module = load(folder)
    answer["without"] = _without(model, module, parts)
    return {**answer, "calls": {call.label: _error(call) for call in calls(model, module, parts)}}


def _without(model: Model, module: Any, parts: list[Part]) -> list[str]:
    """Inputs of the module's calls that no file has."""
    asked = [*feeds(model, 1), *(["position_ids"] if model.kind == "decoder" else [])]
    accepted = inspect.signature(module.forward).parameters
    held = {name for part in parts for name in part.inputs}
    return [
        name
        for name in asked
        # The decoder's tokens are called plainly in a file of their own.
        if name in accepted and name not in held and name.removeprefix("decoder_") not in held
    ]


def labels(model: Model) -> list[str]:
    """The names of a model's calls."""
    return [call.label for call in calls(model, None, [])]


def calls(model: Model, module: Any, parts: list[Part]) -> Iterator[Call]:
    """The calls that the files of a model must answer as its module does."""
    if model.kind == "decoder":
        return _decoder(module, Stepwise(parts, encoded=False))
    if model.kind in GENERATING:
        return _encoder_decoder(model, module, Stepwise(parts, encoded=True))
    return _plain(model, module, parts)


def _error(call: Call) -> float | str:
    """The largest error over those outputs that both have."""
    expected = call.expected()
    try:
        found = call.found()
        places = list(expected)
        named = {places[int(n[7:])] if n.startswith("output_") and int(n[7:]) < len(places) else n: n for n in found}
        both = [name for name in expected if name in named]
        if not both:
            raise Refused(f"its outputs {', '.join(list(found)[:4])} aren't the module's")
        worst = max(call.error(expected[name], found[named[name]]) for name in both)
        return worst if np.isfinite(worst) else "numbers that aren't finite, or another shape"
    except Exception as error:
        return str(error) if isinstance(error, Refused) else reason(error)


def _decoder(module: Any, files: Stepwise) -> Iterator[Call]:
    def expected(case: Case) -> Mapping[str, Array]:
        tokens = case.tokens(module.config.vocab_size)
        cache, whole = {}, tokens["input_ids"].shape[1]
        if case.past:
            cache = {"past_key_values": _torch(module, cut(tokens, 0, case.past), use_cache=True).past_key_values}
        return {"logits": _torch(module, cut(tokens, case.past, whole), use_cache=True, **cache).logits.numpy()}

    def found(case: Case) -> Mapping[str, Array]:
        tokens = case.tokens(module.config.vocab_size)
        state: Mapping[str, Array] = {}
        if case.past:
            state = files.call(cut(tokens, 0, case.past), {}, 0)[1]
        whole = tokens["input_ids"].shape[1]
        return {"logits": files.call(cut(tokens, case.past, whole), state, case.past)[0]}

    for case in CASES:
        yield Call(case.label, lambda c=case: expected(c), lambda c=case: found(c), case.error)


def _encoder_decoder(model: Model, module: Any, files: Stepwise) -> Iterator[Call]:
    paddings = ("none", "left", "right") if model.kind == "seq2seq" else ("none",)
    for batch, step, padding in itertools.product((1, 3), _DECODED, paddings):
        inputs = _padded(feeds(model, batch), padding)
        encoded = {name: array for name, array in inputs.items() if not name.startswith("decoder_")}
        past, count = _DECODED[step]
        ids = np.random.default_rng(3).integers(5, 100, (batch, past + count))
        tokens = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "position_ids": np.tile(np.arange(past + count), (batch, 1)),
        }

        def expected(encoded: Any = encoded, ids: Array = ids, past: int = past) -> Mapping[str, Array]:
            more: dict[str, Any] = {"use_cache": True}
            if past:
                more["past_key_values"] = _torch(module, encoded, decoder_input_ids=ids[:, :past], **more)[
                    "past_key_values"
                ]
            return {"logits": _torch(module, encoded, decoder_input_ids=ids[:, past:], **more).logits.numpy()}

        def found(encoded: Any = encoded, tokens: Any = tokens, past: int = past) -> Mapping[str, Array]:
            state: Mapping[str, Array] = files.begin(encoded)
            if past:
                state = files.call(cut(tokens, 0, past), state, 0)[1]
            return {"logits": files.call(cut(tokens, past, tokens["input_ids"].shape[1]), state, past)[0]}

        label = f"batch {batch}, {step}" + (f", {padding} padding" if padding != "none" else "")
        yield Call(label, expected, found, _relative)


def _plain(model: Model, module: Any, parts: list[Part]) -> Iterator[Call]:
    texts = any(name.endswith("_ids") for name in feeds(model, 1))
    lengths = TOKENS if texts or model.kind == "waveform" else TOKENS[:1]
    for batch, tokens, padding in itertools.product((1, 3), lengths, ("none", "left", "right") if texts else ("none",)):
        inputs = _padded(feeds(model, batch, tokens), padding)
        mask = inputs.get("attention_mask")
        if model.kind in ("dual", "queries"):
            # The greatest id is the end of a text, whose state is the text's.
            inputs["input_ids"][0, -3 if padding == "right" else -1] = WORDS - 1
            inputs["input_ids"][1:, -1] = WORDS - 1

        def expected(inputs: Any = inputs) -> Mapping[str, Array]:
            import torch

            result = _torch(module, inputs)
            return {name: value.numpy() for name, value in result.items() if isinstance(value, torch.Tensor)}

        def found(inputs: Any = inputs) -> Mapping[str, Array]:
            if len(parts) != 1:
                raise Refused(f"it is {len(parts)} files")
            more = {}
            if "input_ids" in inputs:
                more["token_type_ids"] = np.zeros_like(inputs["input_ids"])
            if "pixel_values" in inputs:
                batch, _, *size = inputs["pixel_values"].shape
                more["pixel_mask"] = np.ones([batch, *size], np.int64)
            return parts[0].call({**more, **inputs})

        def error(expected: Array, found: Array, mask: Any = mask) -> float:
            if mask is not None and expected.shape == found.shape and expected.shape[:2] == mask.shape:
                return _relative(expected[mask == 1], found[mask == 1])
            return _relative(expected, found)

        label = f"batch {batch}" + (f", {tokens} tokens" if len(lengths) > 1 else "")
        yield Call(label + (f", {padding} padding" if padding != "none" else ""), expected, found, error)


def _padded(inputs: dict[str, Array], padding: str) -> dict[str, Array]:
    """The same with two tokens of the first row masked at one end."""
    mask = inputs.get("attention_mask")
    if mask is not None and padding != "none":
        mask[0, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
    return inputs


def _torch(module: Any, inputs: Mapping[str, Array], **more: Any) -> Any:
    """The module's answer; inputs that its forward doesn't have are left out."""
    import torch

    accepted = inspect.signature(module.forward).parameters
    given = {name: array for name, array in inputs.items() if name in accepted} | more
    with torch.no_grad():
        return module(**{n: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for n, v in given.items()})


def _relative(expected: Array, found: Array) -> float:
    from graphopt.export.compare import relative_error

    return relative_error(expected, found) if expected.shape == found.shape else float("inf")
