"""A vision-language model as three sources: its vision part, its embedding of tokens, and its decoder of embeddings.

Names and split are those of transformers.js and of the models that are published for it: vision_encoder, embed_tokens
and decoder_model_merged, which takes a cache of any length, none at all to begin with. Who runs them puts the features
of the images where the image tokens are among the embedded tokens. Nothing is known of architectures: the vision part
is what `get_image_features` runs, the decoder is the model's own forward on embeddings.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import UsageError, first_line
from graphopt.export import cache as caches
from graphopt.export.decoder import cache_slots
from graphopt.export.dry_run import dry_run, used
from graphopt.export.image_features import image_features
from graphopt.export.parts import only, without
from graphopt.export.sample_inputs import floats, integers, padding_mask
from graphopt.export.sized_source import Named, sized_source, sources_of, tensors
from graphopt.export.source import Input, Source

FILES = ("vision_encoder", "embed_tokens", "decoder_model_merged")
"""The sources' names, which are the files' without ending."""
TYPES = ("token_type_ids", "mm_token_type_ids")
"""How models call the input that tells image tokens from others, where their mask depends on it."""

SIZES = {"batch": (2, 1, 3), "sequence": (4, 7, 1), "past": (5, 0, 6), "total": (9, 7, 7)}
"""Of the sample, then of the probes: a prompt, and a step."""


def is_vision_language(module: Any) -> bool:
    """Whether `vision_language_sources` is for this module or class: it embeds tokens beside images."""
    parameters = inspect.signature(module.forward).parameters
    wanted = {"pixel_values", "inputs_embeds", "past_key_values", "input_ids"}
    return wanted <= set(parameters) and "decoder_input_ids" not in parameters


def vision_language_sources(
    module: Any, config: Any, *, label: str, image: tuple[int, int] | None = None
) -> dict[str, Source]:
    """The sources of the three files of a vision-language model.

    - vision_encoder: pixel_values, with pixel_attention_mask or image_grid_thw where the model has them, to
      image_features [..., width of the language model];
    - embed_tokens: input_ids [batch, sequence] to inputs_embeds [batch, sequence, width];
    - decoder_model_merged: inputs_embeds, attention_mask [batch, total], position_ids [batch, sequence] or
      [3, batch, sequence], token_type_ids [batch, total] where the mask depends on them, past_key_values.N.key/.value
      to logits [batch, sequence, vocabulary] and present.N.key/.value. total = past + sequence.

    Args:
        module: The transformers module, in eval mode. Its weights aren't read.
        config: Its configuration.
        label: What messages call the model.
        image: Height and width of its images, where the configuration doesn't tell them.

    Raises:
        UsageError: The model hands its parts more than embeddings, or a part can't be derived; the message says what.
    """
    makers: tuple[Callable[[], Source], ...] = (
        functools.partial(vision_encoder, label, module, image),
        functools.partial(embed_tokens, label, module),
        functools.partial(_Decoder.source, label, module, config, image),
    )
    return sources_of(dict(zip(FILES, makers, strict=True)))


def vision_encoder(label: str, module: Any, image: tuple[int, int] | None) -> Source:
    """The source of vision_encoder; arguments and errors as `vision_language_sources`."""
    found = image_features(label, module, image)
    others = [part for part in (module.get_decoder(), module.get_output_embeddings()) if part is not None]
    part = without(module, *(part for part in others if not _share(part, found.parts)))

    def call(*given: Any) -> Named:
        return [("image_features", *found.call(*given))]

    return sized_source(f"{label}/vision_encoder", module, part, call, found.inputs, found.sizes)


def _share(one: Any, others: Sequence[Any]) -> bool:
    """Whether a module has a module in common with one of the others."""
    inner = {id(module) for module in one.modules()}
    return any(id(module) in inner for other in others for module in other.modules())


def embed_tokens(label: str, module: Any) -> Source:
    """The source of embed_tokens."""
    embedding = module.get_input_embeddings()

    def call(ids: Any) -> Named:
        return [("inputs_embeds", embedding(ids))]

    inputs = [Input("input_ids", ("batch", "sequence"), integers(embedding.weight.shape[0]))]
    sizes = {symbol: SIZES[symbol] for symbol in ("batch", "sequence")}
    return sized_source(f"{label}/embed_tokens", module, only(module, embedding), call, inputs, sizes)


@dataclass
class _Decoder:
    """The module's own forward on embeddings.

    Attributes:
        label: What messages call the model.
        module: The module.
        slots: The names of its cache's tensors, and their inputs.
        fresh: Whether the cache is to look as if nothing were in it: some read token types in the first run only.
    """

    label: str
    module: Any
    slots: dict[str, Input]
    fresh: bool = False

    @classmethod
    def source(cls, label: str, module: Any, config: Any, image: tuple[int, int] | None) -> Source:
        """The source of decoder_model_merged."""
        part = without(module, *image_features(label, module, image).parts)
        slots = {
            slot.name: Input(f"past_key_values.{slot.name}", slot.dims, floats(module.dtype))
            for slot in cache_slots(label, module, part)
        }
        decoder = cls(label, module, slots)
        try:
            inputs = decoder._inputs()
            return sized_source(f"{label}/decoder_model_merged", module, part, decoder.call(inputs), inputs, SIZES)
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{label}: {type(module).__name__} doesn't run on embeddings and a cache alone ({first_line(error)}); "
                "write a function that returns its decoder and its example inputs, and export module:function"
            ) from error

    def call(self, inputs: Sequence[Input]) -> Callable[..., Named]:
        """logits and present.N.key and the rest from these inputs."""
        names = [item.name for item in inputs]
        prefix = "past_key_values."

        def call(*args: Any) -> Named:
            given = dict(zip(names, args, strict=True))
            past = {name.removeprefix(prefix): given.pop(name) for name in names if name.startswith(prefix)}
            depth = self.module.config.get_text_config(decoder=True).num_hidden_layers
            cache = caches.rebuild(self.module.config, past, depth)
            result = self.module(
                **given, past_key_values=_as_fresh(cache) if self.fresh else cache, use_cache=True, return_dict=True
            )
            present = dict(caches.flatten(result.past_key_values))
            return [("logits", result.logits), *((f"present.{name}", present[name]) for name in self.slots)]

        return call

    def _inputs(self) -> list[Input]:
        """The inputs that count, in order."""
        width = self.module.get_input_embeddings().weight.shape[-1]
        parameters = inspect.signature(self.module.forward).parameters
        inputs = [
            Input("inputs_embeds", ("batch", "sequence", width), floats(self.module.dtype)),
            Input("attention_mask", ("batch", "total"), padding_mask),
        ]
        if "position_ids" in parameters:
            inputs.append(self._positions(inputs))
        types = [Input(name, ("batch", "total"), integers(2)) for name in TYPES if name in parameters]
        found = self._counting([*inputs, *types, *self.slots.values()])
        if types and not any(item.name in TYPES for item in found):
            self.fresh = True
            again = self._counting([*inputs, *types, *self.slots.values()])
            self.fresh = any(item.name in TYPES for item in again)
            found = again if self.fresh else found
        return found

    def _positions(self, inputs: Sequence[Input]) -> Input:
        """Positions along three axes (frames, rows, columns) for those that rotate by them, else along one."""
        along_three = Input("position_ids", (3, "batch", "sequence"), integers(16))
        trial = [*inputs, along_three, *self.slots.values()]
        try:
            _, logits = dry_run(self.module, self.call(trial), tensors(trial, SIZES))[0]
        except Exception:
            return Input("position_ids", ("batch", "sequence"), integers(16))
        three = tuple(logits.shape[:-1]) == (SIZES["batch"][0], SIZES["sequence"][0])
        return along_three if three else Input("position_ids", ("batch", "sequence"), integers(16))

    def _counting(self, inputs: Sequence[Input]) -> list[Input]:
        call = self.call(inputs)
        kept = used(self.module, lambda *given: [t for _, t in call(*given)], tensors(inputs, SIZES))
        return [item for item, counts in zip(inputs, kept, strict=True) if counts]


def _as_fresh(cache: Any) -> Any:
    """The cache, saying that nothing is in it."""
    made = type(cache)
    cache.__class__ = type(made.__name__, (made,), {"is_initialized": property(lambda _: False)})
    return cache
