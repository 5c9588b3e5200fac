"""The description of a decoder that onnxruntime-genai loads: genai_config.json, read off the graph.

Names, layers, heads and sizes come from the graph (`graphopt.graph.kv_interface`), so that any decoder is described,
whatever its architecture: `model.type` is "decoder", the runtime's word for one that it knows nothing else about. From
the model's configuration come the length of the context and the special tokens, from its generation configuration how
tokens are chosen.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError, UsageError
from graphopt.graph.assumptions import carried
from graphopt.graph.kv_interface import CachePair, KVInterface, kv_interface

FILE = "genai_config.json"
LIMIT = "max_position_embeddings"

SEARCH: dict[str, Any] = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": True,
    "length_penalty": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
"""What a generation configuration says about choosing tokens, with transformers' default where it says nothing."""

_UNLIMITED = 10**9
"""Tokenizers write a number beyond this where they know of no limit."""


def write_genai_config(
    folder: Path,
    model: ir.Model,
    file: str,
    config: Any,
    generation: Any = None,
    *,
    context_length: int | None = None,
) -> Path:
    """Write genai_config.json into a folder, whole or not at all; arguments and errors as those of `genai_config`.

    Where the configuration doesn't tell the length of the context, tokenizer_config.json in the folder may.
    """
    if context_length is None and _number(_text(config), LIMIT) is None:
        context_length = _tokenizer_limit(folder)
    return _write(folder, genai_config(model, file, config, generation, context_length=context_length))


def update_genai_config(folder: Path, model: ir.Model, file: str, old: Path) -> Path:
    """Write genai_config.json for a model that was made from another one, such as by `graphopt optimize`.

    What the graph says is written anew, above all whether past and present may share a buffer; special tokens and
    search options are those of the `old` file.

    Raises:
        ModelError: The old file can't be read, or onnxruntime-genai can't run the model.
    """
    try:
        data = json.loads(old.read_text(encoding="utf-8"))
        before, search = data["model"], data["search"]
        longest, limit = int(search["max_length"]), int(before["context_length"])
        decoder = {key: value for key, value in before["decoder"].items() if key not in ("inputs", "outputs")}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{old} can't be used as a genai_config.json ({error}); export the model again") from error
    interface = _runnable(model)
    limit = _limited(limit, model) or limit
    found = _graph(model, file, interface)
    data["model"] = {**before, **found, "context_length": limit, "decoder": decoder | found["decoder"]}
    shared = {"max_length": min(longest, limit), "past_present_share_buffer": interface.shared_buffer}
    data["search"] = {**search, **shared}
    return _write(folder, data)


def genai_config(
    model: ir.Model, file: str, config: Any, generation: Any = None, *, context_length: int | None = None
) -> dict[str, Any]:
    """What genai_config.json of a decoder holds.

    Args:
        model: The decoder, with a growing or a shared cache.
        file: Its file name, relative to the folder of the configuration.
        config: Its configuration: a transformers one, or an object or mapping with the same names.
        generation: Its generation configuration, likewise; None: it has none.
        context_length: The most tokens, past and new; None: what the configuration says.

    Raises:
        ModelError: Not a decoder, or one that onnxruntime-genai can't run; the message says what it lacks.
        UsageError: Nothing tells the length of the context.
    """
    interface = _runnable(model)
    text = _text(config)
    length = context_length or _number(text, LIMIT)
    limit = _limited(length, model)
    if limit is None:
        raise UsageError(
            f"neither config.json ({LIMIT}) nor tokenizer_config.json (model_max_length) tells how many tokens the "
            "model takes, which genai_config.json must say; write one of them into its file"
        )
    found = _graph(model, file, interface)
    decoder = found["decoder"]
    decoder["session_options"] = {"log_id": "onnxruntime-genai", "provider_options": []}
    heads = _number(text, "num_attention_heads") or decoder["num_key_value_heads"]
    decoder["num_attention_heads"] = heads
    decoder["hidden_size"] = _number(text, "hidden_size") or heads * decoder["head_size"]
    sources = [generation, text, config]
    vocabulary = found["vocab_size"]
    tokens = {name: _tokens(sources, name, vocabulary) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens["pad_token_id"] is None:
        eos = tokens["eos_token_id"]
        tokens["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    search = {name: _option(generation, name, default) for name, default in SEARCH.items()}
    search |= {"max_length": limit, "past_present_share_buffer": interface.shared_buffer}
    described = {"type": "decoder", "context_length": limit, **{k: v for k, v in tokens.items() if v is not None}}
    return {"model": described | found, "search": dict(sorted(search.items()))}


def _graph(model: ir.Model, file: str, interface: KVInterface) -> dict[str, Any]:
    """What the graph tells: the part of `model` that changes with it."""
    keys, values = (_part(interface, part) for part in ("key", "value"))
    inputs = {"input_ids": interface.token_ids}
    inputs |= {"attention_mask": interface.attention_mask} if interface.attention_mask else {}
    inputs |= {"position_ids": interface.position_ids} if interface.position_ids else {}
    inputs |= {"past_key_names": _template([pair.past for pair in keys])}
    inputs |= {"past_value_names": _template([pair.past for pair in values])}
    outputs = {
        "logits": interface.logits,
        "present_key_names": _template([pair.present or "" for pair in keys]),
        "present_value_names": _template([pair.present or "" for pair in values]),
    }
    decoder = {
        "filename": file,
        "head_size": keys[0].head_size,
        "inputs": inputs,
        "outputs": outputs,
        "num_hidden_layers": interface.layers,
        "num_key_value_heads": keys[0].heads,
    }
    return {"decoder": decoder, "vocab_size": _vocabulary(model, interface)}


def _runnable(model: ir.Model) -> KVInterface:
    """The interface of a decoder that onnxruntime-genai can run.

    Raises:
        ModelError: It can't.
    """
    interface = kv_interface(model)
    if interface is None:
        raise ModelError("onnxruntime-genai runs decoders with a KV cache, and the model has none")
    problems = list(interface.problems)
    if interface.encoder_decoder:
        problems.append("it attends to another sequence")
    if interface.token_ids is None:
        problems.append("no input is recognised as token ids")
    if interface.logits is None:
        problems.append("no output is recognised as the logits")
    others = [*interface.others, *([interface.use_cache] if interface.use_cache else [])]
    if others:
        problems.append(f"nothing would fill its inputs {', '.join(others)}")
    if any(pair.part == "both" for pair in interface.pairs):
        problems.append("it has keys and values in one tensor")
    elif wrong := [pair.past for pair in interface.pairs if pair.layout != "BHSD"]:
        problems.append(f"the cache {wrong[0]!r} isn't [batch, heads, past, head size]")
    elif unknown := [pair.past for pair in interface.pairs if not pair.heads or not pair.head_size]:
        problems.append(f"the heads and their size aren't declared for the cache {unknown[0]!r}")
    keys, values = ({pair.layer: pair.past for pair in _part(interface, part)} for part in ("key", "value"))
    if alone := [past for layer, past in {**keys, **values}.items() if (layer in keys) != (layer in values)]:
        problems.append(f"the cache {alone[0]!r} stands alone in its layer, which reads another's beside it")
    if windowed := [pair.past for pair in interface.pairs if pair.windowed]:
        problems.append(f"the cache {windowed[0]!r} keeps the rows of a window alone, where the runtime expects all")
    types = {v.name: v.dtype for v in model.graph.inputs}
    counts = {types.get(n) for n in (interface.attention_mask, interface.position_ids) if n is not None}
    if len(counts) > 1 or not counts <= {ir.DataType.INT32, ir.DataType.INT64}:
        problems.append("attention mask and position ids must both be int64, or both int32")
    if problems:
        raise ModelError(f"onnxruntime-genai can't run the model: {'; '.join(problems)}")
    return interface


def _part(interface: KVInterface, part: str) -> list[CachePair]:
    return [pair for pair in interface.pairs if pair.part == part]


def _template(names: Sequence[str]) -> str:
    """The names of all layers as one C format, such as "past_key_values.%d.key". Layers without a cache leave gaps in
    the numbers, which the runtime finds by itself.

    Raises:
        ModelError: They differ in more than the number of the layer.
    """
    for match in re.finditer(r"\d+", names[0]):
        head, tail = names[0][: match.start()], names[0][match.end() :]
        found = [re.fullmatch(re.escape(head) + r"(0|[1-9]\d*)" + re.escape(tail), name) for name in names]
        numbers = [int(number[1]) for number in found if number is not None]
        if len(numbers) == len(names) and numbers == sorted(set(numbers)) and "%" not in head + tail:
            return f"{head}%d{tail}"
    raise ModelError(
        f"onnxruntime-genai finds caches by names that differ in the number of the layer alone, and here the first is "
        f"{names[0]!r}; rename them with `graphopt optimize --rename-kv-cache`"
    )


def _vocabulary(model: ir.Model, interface: KVInterface) -> int:
    """The width of the logits, which the runtime makes room for."""
    logits = next(v for v in model.graph.outputs if v.name == interface.logits)
    size = logits.shape[-1] if logits.shape is not None and len(logits.shape) == 3 else None
    if logits.shape is not None and len(logits.shape) != 3:
        raise ModelError(f"onnxruntime-genai wants logits [batch, sequence, vocabulary], not {list(logits.shape)}")
    found = size if isinstance(size, int) else interface.vocabulary
    if found is None:
        raise ModelError(f"the size of the vocabulary isn't declared for the output {interface.logits!r}")
    return found


def _limited(length: int | None, model: ir.Model) -> int | None:
    """A length of context, no longer than the model takes for granted."""
    known = [n for n in (length, carried(model).max_length) if n is not None]
    return min(known, default=None)


def _tokenizer_limit(folder: Path) -> int | None:
    try:
        data = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return _number(data, "model_max_length") if isinstance(data, dict) else None


def _text(config: Any) -> Any:
    """The configuration of the language model within that of a model with several parts."""
    inner = getattr(config, "get_text_config", None)
    return inner(decoder=True) if callable(inner) else config


def _get(source: Any, name: str) -> Any:
    return source.get(name) if isinstance(source, Mapping) else getattr(source, name, None)


def _number(source: Any, name: str) -> int | None:
    value = _get(source, name)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < _UNLIMITED else None


def _tokens(sources: Sequence[Any], name: str, vocabulary: int) -> int | list[int] | None:
    """One token id, or a list of several, of the first source that has it; without ids that no logits stand for, which
    the runtime refuses."""
    for source in sources:
        value = None if source is None else _get(source, name)
        given = value if isinstance(value, list | tuple) else [value]
        ids = [token for token in given if isinstance(token, int) and 0 <= token < vocabulary]
        if ids:
            return ids if len(ids) > 1 and name == "eos_token_id" else ids[0]
    return None


def _option(generation: Any, name: str, default: Any) -> Any:
    value = None if generation is None else _get(generation, name)
    # Others, such as early_stopping="never", have no meaning here.
    return type(default)(value) if isinstance(value, int | float) else default


def _write(folder: Path, data: dict[str, Any]) -> Path:
    target = folder / FILE
    temporary = folder / f".{FILE}.{os.getpid()}"
    try:
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ModelError(f"{target} can't be written: {error.strerror or error}") from error
    return target
