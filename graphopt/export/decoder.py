"""Causal language models as sources of an export: tokens and a cache in, logits and the cache of all tokens out.

What a model takes and what its cache holds is read off its signature and off one run on tensors without numbers, so
grouped heads, latent attention, layers that share keys, and states in place of keys need no list.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import UsageError, first_line
from graphopt.export import cache as caches
from graphopt.export import layers
from graphopt.export.dependencies import require
from graphopt.export.dry_run import dry_run
from graphopt.export.sample_inputs import integers
from graphopt.export.sized_source import real_places
from graphopt.export.source import Input, Reference, Source, wrap

TOKENS = ("input_ids", "attention_mask", "position_ids")
"""Inputs of every run, as far as the module has them; attention_mask [batch, total], the others [batch, sequence]."""
SAMPLE = {"batch": 2, "sequence": 4, "past": 6, "total": 10}


@dataclass(frozen=True)
class Slot:
    """One tensor of the cache.

    Attributes:
        name: "0.key" and the like, see `graphopt.export.cache`.
        dims: Its dimensions on the way in: sizes, "batch", and "past".
    """

    name: str
    dims: tuple[int | str, ...]

    @property
    def present(self) -> tuple[int | str, ...]:
        """Its dimensions on the way out, where the new tokens are in it too."""
        return tuple("total" if dim == "past" else dim for dim in self.dims)


def causal_lm(label: str, model: Any) -> Source:
    """A decoder with its cache.

    Inputs: input_ids [batch, sequence], attention_mask [batch, total] and position_ids [batch, sequence], int64, as far
    as the model has them; past_key_values.N.key and .value [batch, heads, past, head size]. Outputs: logits
    [batch, sequence, vocabulary]; present.N.key and .value [batch, heads, total, head size]. total = past + sequence.

    Args:
        label: How messages call the model.
        model: A transformers model with a language modelling head, in eval mode; its weights may be missing.

    Raises:
        UsageError: The model has no cache, or one whose sizes follow from nothing that is known.
    """
    parameters = inspect.signature(model.forward).parameters
    named = [name for name in TOKENS if name in parameters]
    if "input_ids" not in named or "past_key_values" not in parameters:
        raise UsageError(
            f"{label}: {type(model).__name__} doesn't take input_ids and past_key_values, so it isn't a decoder with a "
            "cache; write a function that returns the model and its example inputs, and export module:function"
        )
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    slots = cache_slots(label, model)
    call = functools.partial(_run, model, named, slots)
    inputs = [_token_input(name, vocabulary) for name in named]
    inputs += [Input(f"past_key_values.{slot.name}", slot.dims, _cache(model.dtype)) for slot in slots]
    outputs: dict[str, tuple[int | str, ...]] = {"logits": ("batch", "sequence", vocabulary)}
    outputs |= {f"present.{slot.name}": slot.present for slot in slots}
    source = Source(label, wrap(call, model), inputs, list(outputs), dict(SAMPLE), [])
    source.dims = outputs
    source.again = functools.partial(causal_lm, label, model)
    source.references = functools.partial(_references, source, vocabulary)
    return source


def cache_slots(label: str, model: Any, part: Any = None) -> list[Slot]:
    """What the model's cache holds after a run, with the dimensions of each tensor.

    Args:
        label: How messages call the model.
        model: A transformers model that runs on tokens.
        part: The part of it that the cache's layers are in, where others have lists of layers too; None: all of it.

    Raises:
        UsageError: It has no cache, or a size of it follows from nothing that is known.
    """
    part = model if part is None else part
    plan = layers.plan(part)
    if plan is None:
        return _seen_slots(label, model)
    with layers.cut(part, plan):
        first = _seen_slots(label, model)
    by_layer: dict[int, list[Slot]] = {}
    for slot in first:
        by_layer.setdefault(int(slot.name.split(".")[0]), []).append(slot)
    if sorted(by_layer) != list(range(plan.kept)):
        return _seen_slots(label, model)  # Layers of the list and of the cache aren't the same.
    made_of = [*range(plan.kept - 1), *plan.templates, plan.kept - 1]
    return [
        Slot(f"{layer}.{slot.name.split('.', 1)[1]}", slot.dims)
        for layer, template in enumerate(made_of)
        for slot in by_layer[template]
    ]


def _seen_slots(label: str, model: Any) -> list[Slot]:
    sizes = ({"batch": 2, "past": 5}, {"batch": 3, "past": 7})
    try:
        found = [_shapes(model, **size) for size in sizes]
    except Exception as error:
        raise UsageError(f"{label} ({type(model).__name__}) doesn't run on tokens: {first_line(error)}") from error
    if not found[0]:
        raise UsageError(f"{label}: {type(model).__name__} gives out no cache; its config may say use_cache: false")
    slots = []
    for (name, first), (_, second) in zip(*found, strict=True):
        dims: list[int | str] = []
        for a, b in zip(first, second, strict=True):
            same = [symbol for symbol in sizes[0] if (sizes[0][symbol], sizes[1][symbol]) == (a, b)]
            if a != b and not same:
                raise UsageError(f"{label}: the size {a} of the cache's {name} follows from neither batch nor tokens")
            dims.append(same[0] if same else int(a))
        slots.append(Slot(name, tuple(dims)))
    return slots


def _shapes(model: Any, batch: int, past: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the cache after a run of so many tokens."""
    torch = require("torch")
    ids = torch.ones((batch, past), dtype=torch.long)
    masked = "attention_mask" in inspect.signature(model.forward).parameters

    def call(ids: Any) -> Any:
        more = {"attention_mask": torch.ones_like(ids)} if masked else {}
        return model(input_ids=ids, **more, past_key_values=caches.empty(model.config, _depth(model)), use_cache=True)

    held = getattr(dry_run(model, call, [ids]), "past_key_values", None)
    return [] if held is None else [(name, tuple(tensor.shape)) for name, tensor in caches.flatten(held)]


def _run(model: Any, named: Sequence[str], slots: Sequence[Slot], *tensors: Any) -> tuple[Any, ...]:
    past = dict(zip((slot.name for slot in slots), tensors[len(named) :], strict=True))
    result = model(
        **dict(zip(named, tensors, strict=False)),
        past_key_values=caches.rebuild(model.config, past, _depth(model)),
        use_cache=True,
    )
    present = dict(caches.flatten(result.past_key_values))
    return (result.logits, *(present[slot.name] for slot in slots))


def _depth(model: Any) -> int:
    """Layers of the model's decoder, as its configuration tells."""
    depth: int = model.config.get_text_config(decoder=True).num_hidden_layers
    return depth


def _token_input(name: str, vocabulary: int) -> Input:
    if name == "attention_mask":
        return Input(name, ("batch", "total"), lambda shape, _: require("torch").ones(shape, dtype=_long()))
    if name == "position_ids":
        return Input(name, ("batch", "sequence"), _counted)
    return Input(name, ("batch", "sequence"), integers(vocabulary))


def _long() -> Any:
    return require("torch").long


def _counted(shape: tuple[int, ...], _: np.random.Generator) -> Any:
    torch = require("torch")
    return torch.arange(shape[1]).expand(shape).contiguous()


def _cache(dtype: Any) -> Callable[[tuple[int, ...], np.random.Generator], Any]:
    return lambda shape, _: require("torch").zeros(shape, dtype=dtype)


# ---- what it must answer


CALLS = ((1, 7, 0, None), (3, 7, 0, "right"), (3, 6, 0, "left"), (1, 1, 7, None), (3, 1, 6, "left"), (3, 4, 5, "left"))
"""Batch, new tokens, tokens in the cache, side of the padding: prompts, steps, and a prompt in chunks."""


def _references(
    source: Source, vocabulary: int, run: Callable[[tuple[Any, ...]], Sequence[Any]]
) -> Iterator[Reference]:
    """Runs of the module on prompts, steps and chunks; what is in the cache comes from the module itself."""
    torch = require("torch")
    named = [item.name for item in source.inputs]
    for seed, (batch, sequence, past, padding) in enumerate(CALLS):
        mask = padded(batch, past + sequence, padding)
        positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
        ids = np.random.default_rng(seed).integers(0, vocabulary, mask.shape)
        given = {"input_ids": ids, "position_ids": positions}
        held = {
            i.name: i.tensor({"batch": batch, "past": 0}, np.random.default_rng(0))
            for i in source.inputs[_tokens(named) :]
        }

        def tensors(
            start: int, end: int, held: Mapping[str, Any], given: Any = given, mask: Any = mask
        ) -> tuple[Any, ...]:
            made = {name: torch.from_numpy(array[:, start:end].copy()) for name, array in given.items()}
            made |= {"attention_mask": torch.from_numpy(mask[:, :end].copy()), **held}
            return tuple(made[name] for name in named)

        if past:
            before = run(tensors(0, past, held))
            held = dict(zip(held, before[1:], strict=True))
        sizes = {"batch": batch, "sequence": sequence, "past": past, "total": past + sequence}
        args = tensors(past, past + sequence, held)
        outputs = [tensor.detach().numpy().copy() for tensor in run(args)]
        feeds = {name: tensor.numpy() for name, tensor in zip(named, args, strict=True)}
        real = {
            name: real_places(dims, array, {("batch", "total"): mask})
            for (name, dims), array in zip((source.dims or {}).items(), outputs, strict=True)
        }
        yield Reference(sizes, feeds, outputs, real)


def _tokens(named: Sequence[str]) -> int:
    return sum(name in TOKENS for name in named)


def padded(batch: int, total: int, side: str | None) -> npt.NDArray[np.int64]:
    """A mask [batch, total] with two slots of the first row and one of the second masked at this side."""
    mask = np.ones((batch, total), np.int64)
    for row in range(batch if side else 0):
        masked = max(2 - row, 0)
        mask[row, :masked] = side != "left"
        mask[row, total - masked :] = side == "left"
    return mask
