"""An encoder-decoder of transformers as three sources: encoder, decoder for the first tokens, decoder with a cache.

Names and split are those of optimum, whose classes load the three files: encoder_model, decoder_model (which also makes
the keys and values of the encoder's states, once) and decoder_with_past_model (which reads them). Nothing is known of
architectures: inputs come from the signature, the cache and all sizes from dry runs of the module.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import UsageError, first_line
from graphopt.export.cache import flatten, rebuild
from graphopt.export.dependencies import require
from graphopt.export.dry_run import used
from graphopt.export.encoder_inputs import TOKENS, encode, encoder_inputs, longest
from graphopt.export.parts import only, without
from graphopt.export.sample_inputs import floats, integers, padding_mask
from graphopt.export.sized_source import Columns, Named, sized_source, sources_of, tensors, told
from graphopt.export.source import Input, Source
from graphopt.export.vision_language import embed_tokens, vision_encoder

FILES = ("encoder_model", "decoder_model", "decoder_with_past_model")
"""The sources' names, which are the files' without ending."""

_NEW = {"decoder_model": (4, 1, 5), "decoder_with_past_model": (3, 1, 4)}
"""New tokens in the sample and the probes."""
_PAST = (5, 6, 9)


def is_encoder_decoder(module: Any) -> bool:
    """Whether `encoder_decoder_sources` is for this module or class: its forward takes tokens of a decoder apart."""
    parameters = inspect.signature(module.forward).parameters
    return {"decoder_input_ids", "encoder_outputs"} <= set(parameters)


def encoder_decoder_sources(
    module: Any, config: Any, *, label: str, image: tuple[int, int] | None = None
) -> dict[str, Source]:
    """The sources of the three files of an encoder-decoder with a language model's head.

    - encoder_model: input_ids, input_features, input_values, pixel_values or flattened_patches, and attention_mask, to
      last_hidden_state;
    - decoder_model: encoder_attention_mask, input_ids, encoder_hidden_states to logits,
      present.N.decoder.key/.value and present.N.encoder.key/.value;
    - decoder_with_past_model: encoder_attention_mask, input_ids, past_key_values.N.decoder.key/.value and
      past_key_values.N.encoder.key/.value to logits and present.N.decoder.key/.value.

    One whose text goes with images has a vision_encoder and embed_tokens too (`graphopt.export.vision_language`), and
    its encoder_model takes inputs_embeds in place of input_ids.

    Dynamic: "batch", "encoder_sequence" (states of the encoder), "sequence" (new tokens), "past" (tokens in the cache),
    "total" (both); where the encoder gives less states than it takes frames or samples, these too. The mask is that of
    the encoder's inputs; a model that doesn't read it has no such input.

    Args:
        module: The transformers module, in eval mode. Its weights aren't read.
        config: Its configuration.
        label: What messages call the model.
        image: Height and width of its images, where the configuration doesn't tell them.

    Raises:
        UsageError: Inputs or cache can't be derived, or there are no logits; the message says what is missing.
    """
    embedded = hasattr(module, "get_image_features") and module.main_input_name != "pixel_values"
    parts = _Parts(label, module, config, image, embedded)
    makers: dict[str, Callable[[], Source]] = {}
    if embedded:
        makers["vision_encoder"] = functools.partial(vision_encoder, label, module, image)
        makers["embed_tokens"] = functools.partial(embed_tokens, label, module)
    makers |= zip(FILES, (parts.encoder, parts.first, parts.with_past), strict=True)
    return sources_of(makers)


@dataclass
class _Parts:
    """The sources of a module, made again and again while its layers come and go."""

    label: str
    module: Any
    config: Any
    image: tuple[int, int] | None
    embedded: bool

    def __post_init__(self) -> None:
        self.encoder_module = self.module.get_encoder()
        self.given = encoder_inputs(self.label, self.module, self.encoder_module, self.image, self.embedded)

    def encoder(self) -> Source:
        """The encoder."""
        names = ["last_hidden_state", "encoder_attention_mask"] if self.given.gives_mask else ["last_hidden_state"]
        run = encode(self.encoder_module, self.given.inputs, self.given.gives_mask)

        def call(*given: Any) -> Named:
            return list(zip(names, run(*given), strict=True))

        part = only(self.module, self.encoder_module)
        return self._source("encoder_model", part, call, self.given.inputs, self.given.sizes)

    def first(self) -> Source:
        """The decoder before there is a cache."""
        name = "decoder_model"
        sizes = self._sizes(name)
        inputs = self._keep_used(name, [*self._mask(), self._tokens(), self._states()], sizes)
        return self._source(name, self._decoder_module(), self._first_call(inputs), inputs, sizes)

    def with_past(self) -> Source:
        """The decoder behind a cache; the encoder's part of it comes in and doesn't go out."""
        name = "decoder_with_past_model"
        sizes = {**self._sizes(name), "past": _PAST}
        sizes["total"] = tuple(a + b for a, b in zip(sizes["sequence"], _PAST, strict=True))
        cache = self._cache()
        try:
            inputs = self._keep_used(name, [*self._mask(), self._tokens(), *cache], sizes)
        except UsageError:
            # Some take one token at a time behind a cache.
            sizes["sequence"] = (1, 1, 1)
            sizes["total"] = tuple(n + 1 for n in _PAST)
            inputs = self._keep_used(name, [*self._mask(), self._tokens(one=True), *cache], sizes)
        return self._source(name, self._decoder_module(), self._later_call(inputs), inputs, sizes)

    def _decoder_module(self) -> Any:
        return without(self.module, self.encoder_module)

    # ---- inputs

    def _sizes(self, name: str) -> dict[str, tuple[int, ...]]:
        room = longest(self.config.get_text_config(decoder=True)) - max(_PAST)
        lengths = self.given.sizes["encoder_sequence"]
        if len(set(lengths)) == 1:  # Images and windows of sound of one size; the decoder doesn't depend on it.
            lengths = TOKENS
        new = tuple(max(1, min(n, room)) for n in _NEW[name])
        return {**self.given.sizes, "encoder_sequence": lengths, "sequence": new}

    def _mask(self) -> list[Input]:
        takes = "attention_mask" in inspect.signature(self.module.forward).parameters
        dims = ("batch", "encoder_sequence") if self.given.gives_mask else self.given.mask
        return [Input("encoder_attention_mask", dims, padding_mask)] if dims is not None and takes else []

    def _tokens(self, one: bool = False) -> Input:
        config = self.config.get_text_config(decoder=True)
        words = getattr(config, "tgt_vocab_size", None) or config.vocab_size
        return Input("input_ids", ("batch", 1 if one else "sequence"), integers(words))

    def _states(self) -> Input:
        dims = ("batch", "encoder_sequence", self.given.width)
        return Input("encoder_hidden_states", dims, floats(self.module.dtype))

    def _cache(self) -> list[Input]:
        """The cache's tensors, as the decoder without a cache gives them."""
        name = "decoder_model"
        inputs = [*self._mask(), self._tokens(), self._states()]
        with self._refusing(name):
            found = told(self.module, self._first_call(inputs), inputs, self._sizes(name))
        held = {part.removeprefix("present."): kept for part, kept in found.items() if part != "logits"}
        if not any(".encoder." in part for part in held):
            raise UsageError(
                f"{self.label}: {type(self.module).__name__} keeps no cache of its encoder's states, so there is no "
                "decoder to be exported with one"
            )
        if odd := [part for part, (dims, _) in held.items() if any(f"{part}_dim_" in str(dim) for dim in dims)]:
            raise UsageError(
                f"{self.label}: the cache {odd[0]} of {type(self.module).__name__} has a dimension that is neither "
                "the batch nor a number of tokens, so it can't be exported with a cache"
            )
        return [
            Input(f"past_key_values.{part}", tuple("past" if d == "sequence" else d for d in dims), floats(dtype))
            for part, (dims, dtype) in held.items()
        ]

    # ---- calls

    def _first_call(self, inputs: Sequence[Input]) -> Callable[..., Named]:
        names = [item.name for item in inputs]
        transformers = require("transformers")

        def call(*args: Any) -> Named:
            given = dict(zip(names, args, strict=True))
            # Given, so that layers with a window keep every key: the window is in the mask.
            empty = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
            return self._forward(given, given["encoder_hidden_states"], empty)

        return call

    def _later_call(self, inputs: Sequence[Input]) -> Callable[..., Named]:
        names = [item.name for item in inputs]
        prefix = "past_key_values."

        def call(*args: Any) -> Named:
            given = dict(zip(names, args, strict=True))
            past = {name.removeprefix(prefix): given.pop(name) for name in names if name.startswith(prefix)}
            keys = next(tensor for name, tensor in past.items() if ".encoder." in name)
            # The keys and values are there already: of the states only the length is read.
            states = keys.new_zeros(keys.shape[0], keys.shape[-2], self.given.width)
            made = self._forward(given, states, rebuild(self.config, past))
            return [(name, tensor) for name, tensor in made if ".encoder." not in name]

        return call

    def _forward(self, given: Mapping[str, Any], states: Any, cache: Any) -> Named:
        """logits, then present.N.decoder.key and what else there is of the cache."""
        masks = {"attention_mask": given["encoder_attention_mask"]} if "encoder_attention_mask" in given else {}
        ours = self.given.gives_mask
        result = self.module(
            decoder_input_ids=given["input_ids"],
            encoder_outputs=self.given.result(last_hidden_state=states, **(masks if ours else {})),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **({} if ours else masks),
        )
        if getattr(result, "logits", None) is None:
            raise UsageError(
                f"{self.label}: {type(self.module).__name__} gives no logits; export the class with its head"
            )
        if result.past_key_values is None:
            raise UsageError(f"{self.label}: {type(self.module).__name__} gives no cache (past_key_values)")
        present = [(f"present.{part}", tensor) for part, tensor in flatten(result.past_key_values)]
        return [("logits", result.logits), *present]

    # ---- dry runs

    def _keep_used(self, name: str, inputs: list[Input], sizes: Columns) -> list[Input]:
        """Without the inputs that change nothing: Whisper, for one, reads no mask."""
        call = (self._first_call if name == "decoder_model" else self._later_call)(inputs)
        with self._refusing(name):
            kept = used(self.module, lambda *given: [t for _, t in call(*given)], tensors(inputs, sizes))
        return [item for item, counts in zip(inputs, kept, strict=True) if counts]

    @contextlib.contextmanager
    def _refusing(self, name: str) -> Iterator[None]:
        try:
            yield
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(
                f"{self.label}: {type(self.module).__name__} doesn't run as {name} on new tokens and the states of its "
                f"encoder alone ({first_line(error)}); write a function that returns the module and its example "
                "inputs, and export module:function"
            ) from error

    def _source(
        self, name: str, part: Any, call: Callable[..., Named], inputs: Sequence[Input], sizes: Columns
    ) -> Source:
        with self._refusing(name):
            return sized_source(f"{self.label}/{name}", self.module, part, call, inputs, sizes)
