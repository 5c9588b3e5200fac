"""Exported files behind one way of being called, whatever their inputs are called and however many there are.

What a file is for follows from its inputs: those of a cache, those of an encoder's states, tokens.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
_CACHE = re.compile(r"^(?:input\.|output\.)?(?:past_key_values|present)(?:_key_values)?\.(.+)$")
_STATES = ("encoder_hidden_states", "encoder_outputs.last_hidden_state", "encoder_outputs.0", "encoder_outputs")
_TYPES = {"float": np.float32, "int64": np.int64, "int32": np.int32, "bool": np.bool_}


class Refused(Exception):
    """A file that can't be called so; the message says why."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One file.

    Attributes:
        inputs: The dimensions by input: a size, or the name of a dynamic one.
        types: The element types of the inputs, as `_TYPES` has them.
        outputs: Names.
        run: Arrays by input to arrays by output.
    """

    inputs: Mapping[str, Sequence[Any]]
    types: Mapping[str, str]
    outputs: Sequence[str]
    run: Callable[[Mapping[str, Array]], Mapping[str, Array]]

    @property
    def caches(self) -> dict[str, str]:
        """The cache's inputs: the graph's name by the cache's own."""
        return _caches(self.inputs)

    def call(self, known: Mapping[str, Array]) -> Mapping[str, Array]:
        """Run on what is known, by the inputs' names.

        Raises:
            Refused: An input isn't known.
        """
        given: dict[str, Array] = {}
        for name in self.inputs:
            plain = name.removeprefix("input.")
            if name not in known and plain not in known:
                raise Refused(f"it has an input {name}, which nothing says how to fill")
            array = known[name] if name in known else known[plain]
            given[name] = np.ascontiguousarray(array, _TYPES.get(self.types.get(name, ""), array.dtype))
        return self.run(given)

    def empty(self, batch: int) -> dict[str, Array]:
        """A cache without tokens: the dynamic sizes of its inputs are the batch, and then none."""
        return {
            name: np.zeros([d if isinstance(d, int) else 0 if axis else batch for axis, d in enumerate(dims)])
            for name, dims in self.inputs.items()
            if _CACHE.match(name)
        }


def _caches(names: Any) -> dict[str, str]:
    return {found[1]: name for name in names if (found := _CACHE.match(name))}


def opened(path: Path) -> Part:
    """The file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    outputs = [value.name for value in session.get_outputs()]
    return Part(
        {value.name: value.shape for value in session.get_inputs()},
        {value.name: re.sub(r"tensor\((\w+)\)", r"\1", value.type) for value in session.get_inputs()},
        outputs,
        lambda given: dict(zip(outputs, session.run(outputs, dict(given)), strict=True)),
    )


class Stepwise:
    """The files of a model that generates.

    A file with cache inputs takes steps, and prompts too where no other file is for them; one without an encoder's
    states and without the decoder's tokens is the encoder.
    """

    def __init__(self, parts: Sequence[Part], encoded: bool) -> None:
        self.step = self.start = self.encoder = None
        for part in parts:
            if part.caches:
                # Where one file holds both branches beside two that hold one each, the two are taken.
                if self.step is None or "use_cache_branch" in self.step.inputs:
                    self.step = part
            elif encoded and not any(name in part.inputs for name in (*_STATES, "decoder_input_ids")):
                self.encoder = part
            else:
                self.start = part

    def begin(self, given: Mapping[str, Array]) -> dict[str, Array]:
        """What the calls know of what was encoded: `given` is what the encoder is given."""
        known = {f"encoder.{name}": array for name, array in given.items()}
        if self.encoder is not None:
            states = self.encoder.call(given)
            known |= dict.fromkeys(_STATES, states[next(iter(self.encoder.outputs))])
        return known

    def call(
        self, tokens: Mapping[str, Array], state: Mapping[str, Array], past: int
    ) -> tuple[Array, dict[str, Array]]:
        """The logits of some tokens, and the state after them.

        Args:
            tokens: `input_ids`, `attention_mask`, `position_ids` of the call.
            state: What `begin` or the call before gave.
            past: Tokens before these.

        Raises:
            Refused: The files aren't made for such a call.
        """
        ids = tokens["input_ids"]
        batch, count = ids.shape
        prompt = past == 0 and self.start is not None
        part = self.start if prompt else self.step
        if part is None:
            raise Refused("it has no cache" if past else "it takes no prompt")
        known: dict[str, Array] = {
            **{name: array for name, array in state.items() if not name.startswith("encoder.")},
            "cache_position": np.arange(past, past + count),
            "use_cache_branch": np.array([past > 0]),
        }
        encoded = {name.removeprefix("encoder."): v for name, v in state.items() if name.startswith("encoder.")}
        if encoded and "decoder_input_ids" in part.inputs:
            known |= encoded | {f"decoder_{name}": array for name, array in tokens.items()}
        else:
            known |= {f"encoder_{name}": array for name, array in encoded.items()} | dict(tokens)
        if past == 0 and not prompt:
            known |= part.empty(batch)
        for name, graph_name in part.caches.items():
            if name in state:
                known[graph_name] = state[name]
        results = part.call(known)
        logits = next((results[name] for name in ("logits", "output_0") if name in results), None)
        if logits is None:
            raise Refused(f"none of its outputs is called logits: {', '.join(list(results)[:4])}")
        after = {name: results[graph_name] for name, graph_name in _caches(results).items()}
        return logits, {**state, **after}
