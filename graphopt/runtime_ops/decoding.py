"""One batch on its way through a decoder: its cache, mask and positions, fed piece by piece."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

from graphopt.errors import GraphoptError, InputDataError, UsageError, first_line
from graphopt.graph.importance import read_importance
from graphopt.graph.kv_interface import KVInterface

if TYPE_CHECKING:
    import onnxruntime

Cache = Literal["growing", "static"]
"""A new buffer for the present at every run, or one buffer that past and present share."""

_DTYPES: dict[str, tuple[int, Any]] = {
    "tensor(float)": (1, np.float32), "tensor(uint8)": (2, np.uint8), "tensor(int8)": (3, np.int8),
    "tensor(int32)": (6, np.int32), "tensor(int64)": (7, np.int64), "tensor(bool)": (9, np.bool_),
    "tensor(float16)": (10, np.float16), "tensor(double)": (11, np.float64),
    "tensor(bfloat16)": (16, ml_dtypes.bfloat16),
}  # fmt: skip
"""ONNX element type and numpy type by ONNX Runtime's name."""


class Decoding:
    """A batch in progress. Keys and values never leave ONNX Runtime: what a run gives out, the next one takes in.

    Args:
        session: The decoder's session.
        interface: Its inputs and outputs.
        batch: Rows.
        cache: "growing", or "static" with `capacity` rows for each sequence.
        capacity: Tokens that a static cache can hold.
        compact: Whether the mask only counts the tokens of each row, which lie at the start of its cache
            (GroupQueryAttention); else it says of every place in the cache whether it counts.
        extra: Further inputs by name, the same in every run.

    Attributes:
        importance: How the model tells which cached tokens matter; None: it doesn't.
        told: What it told in the last run that asked: by layer [batch, KV heads, tokens].
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        interface: KVInterface,
        batch: int,
        *,
        cache: Cache = "growing",
        capacity: int = 0,
        compact: bool = False,
        extra: dict[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self.session, self.interface, self.batch = session, interface, batch
        self.cache, self.capacity, self.compact = cache, capacity, compact
        self.importance = read_importance(session.get_modelmeta().custom_metadata_map)
        self.told: dict[int, npt.NDArray[Any]] = {}
        self.lengths: npt.NDArray[np.int64] = np.zeros(batch, dtype=np.int64)
        """Tokens that count, of each row."""
        self._valid = np.zeros((batch, 0), dtype=np.bool_)
        self._total = 0
        self._types = {v.name: _DTYPES[v.type] for v in session.get_inputs() if v.type in _DTYPES}
        self._device = _device(session)
        self._extra = extra or {}
        self._binding = session.io_binding()
        for name, array in self._extra.items():
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array))
        if interface.use_cache is not None:
            self._binding.bind_cpu_input(interface.use_cache, np.ones(1, dtype=np.bool_))
        self._caches = _empty(session, interface, batch, capacity if cache == "static" else 0)
        for pair, value in zip(interface.pairs, self._caches, strict=True):
            self._binding.bind_ortvalue_input(pair.past, value)

    def feed(
        self, ids: npt.NDArray[np.int64], valid: npt.NDArray[np.bool_] | None = None, *, ask: bool = False
    ) -> npt.NDArray[Any]:
        """Run the decoder on the next tokens of every row.

        Args:
            ids: [batch, new].
            valid: Which of them count, [batch, new]; None: all.
            ask: Fill in `told`, where the model has an `importance`.

        Returns:
            The logits [batch, rows, vocabulary], of the last row alone where the model gives no more. It is memory of
            the runtime that the next `feed` may reuse: copy what is to stay.

        Raises:
            InputDataError: ONNX Runtime can't run the decoder on this, or the cache is full.
        """
        valid = np.ones(ids.shape, dtype=np.bool_) if valid is None else valid
        new = ids.shape[1]
        if self.cache == "static" and int(self.lengths.max(initial=0)) + new > self.capacity:
            raise InputDataError(f"The cache holds {self.capacity} tokens; {new} more don't fit.")
        positions = np.maximum(self.lengths[:, None] + np.cumsum(valid, axis=1) - 1, 0)
        self.lengths = self.lengths + valid.sum(axis=1)
        self._valid = np.concatenate([self._valid, valid], axis=1)
        self._bind(self.interface.token_ids, ids)
        self._bind(self.interface.position_ids, positions)
        self._bind(self.interface.attention_mask, self._mask(new, valid))
        names = self._bind_outputs(ask)
        try:
            self.session.run_with_iobinding(self._binding)
        except GraphoptError:  # a session that checks what it is given
            raise
        except Exception as error:  # ONNX Runtime has a class of exception for each reason
            raise InputDataError(
                f"The decoder doesn't run on {new} new tokens after {self._valid.shape[1] - new} in a batch of "
                f"{self.batch}: {first_line(error)}."
            ) from error
        outputs = dict(zip(names, self._binding.get_outputs(), strict=True))
        if self.cache == "growing":
            self._caches = [outputs[pair.present or ""] for pair in self.interface.pairs]
            for pair, value in zip(self.interface.pairs, self._caches, strict=True):
                self._binding.bind_ortvalue_input(pair.past, value)
        if self.importance is not None and ask:
            self.told = {layer: outputs[name].numpy() for layer, name in self.importance.outputs.items()}
        self._logits = outputs[self.interface.logits or ""]
        logits = _view(self._logits)
        return logits[:, None] if logits.ndim == 2 else logits

    def fork(self) -> Decoding:
        """Another batch that goes on from here by itself, on the same keys and values.

        Raises:
            UsageError: The cache is static: what is in it changes with each run.
        """
        if self.cache == "static":
            raise UsageError("A batch can go on in two ways only with a growing cache.")
        other = Decoding(self.session, self.interface, self.batch, compact=self.compact, extra=self._extra)
        other.lengths, other.told, other._valid = self.lengths, self.told, self._valid
        other._caches = list(self._caches)
        for pair, value in zip(self.interface.pairs, other._caches, strict=True):
            other._binding.bind_ortvalue_input(pair.past, value)
        return other

    def keep(self, places: Mapping[int, npt.NDArray[np.int64]]) -> None:
        """Drop all tokens but some from the caches of layers.

        Args:
            places: By layer, the places in its cache of those that stay [batch, KV heads, kept].
        """
        for index, pair in enumerate(self.interface.pairs):
            kept = places.get(pair.layer)
            if kept is not None and kept.shape[-1] < self._caches[index].shape()[2]:
                self._caches[index] = _gathered(self._caches[index], kept)
                self._binding.bind_ortvalue_input(pair.past, self._caches[index])

    @property
    def caches(self) -> dict[str, onnxruntime.OrtValue]:
        """The cache as it stands, by the names of the inputs that take it."""
        return {pair.past: value for pair, value in zip(self.interface.pairs, self._caches, strict=True)}

    def _bind(self, name: str | None, array: npt.NDArray[Any]) -> None:
        if name is not None:
            self._binding.bind_cpu_input(name, np.ascontiguousarray(array, dtype=self._types[name][1]))

    def _mask(self, new: int, valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        if not self.compact:
            return self._valid
        # While a prompt comes in, its padding takes places too; afterwards it is overwritten.
        total = max(int(self.lengths.max()), new if self._valid.shape[1] == new else 0)
        return np.arange(total) < self.lengths[:, None]

    def _bind_outputs(self, ask: bool) -> list[str]:
        import onnxruntime

        assert self.interface.logits is not None
        names = [self.interface.logits]
        # A binding keeps the values of the run before, so outputs of new sizes are bound anew.
        self._binding.bind_output(self.interface.logits, "cpu")
        for pair, value in zip(self.interface.pairs, self._caches, strict=True):
            assert pair.present is not None
            names.append(pair.present)
            if self.cache == "static":
                self._binding.bind_ortvalue_output(pair.present, value)
            else:
                self._binding.bind_output(pair.present, self._device)
        if self.importance is not None:
            # By a value: a binding knows no array for an input that has a default.
            asked = onnxruntime.OrtValue.ortvalue_from_numpy(np.array(ask))
            self._binding.bind_ortvalue_input(self.importance.asked, asked)
            for name in self.importance.outputs.values():
                names.append(name)
                self._binding.bind_output(name, "cpu")
        return names


def bind_shared_cache(
    session: onnxruntime.InferenceSession,
    binding: onnxruntime.IOBinding,
    interface: KVInterface,
    batch: int,
    capacity: int,
) -> dict[str, onnxruntime.OrtValue]:
    """Make an empty cache for a loop of one's own, and bind each tensor of it as past and as present.

    Args:
        session: The decoder's session.
        binding: A binding of it.
        interface: Its inputs and outputs: `graphopt.graph.kv_interface.kv_interface(load(path))`.
        batch: Rows.
        capacity: Tokens that each row has room for.

    Returns:
        The buffers by the names of the inputs that take them; they belong to the binding's runs from now on.

    Raises:
        UsageError: Past and present can't be one buffer in this decoder.
        ModelError: The sizes of its cache can't be told.
    """
    if not interface.shared_buffer:
        raise UsageError("Past and present can share a buffer only where every layer writes its cache in place.")
    values = _empty(session, interface, batch, capacity)
    for pair, value in zip(interface.pairs, values, strict=True):
        binding.bind_ortvalue_input(pair.past, value)
        binding.bind_ortvalue_output(pair.present, value)
    return {pair.past: value for pair, value in zip(interface.pairs, values, strict=True)}


def _device(session: onnxruntime.InferenceSession) -> str:
    return "cuda" if session.get_providers()[0] == "CUDAExecutionProvider" else "cpu"


def _empty(
    session: onnxruntime.InferenceSession, interface: KVInterface, batch: int, capacity: int
) -> list[onnxruntime.OrtValue]:
    """Tensors for the pairs of a decoder with room for `capacity` tokens a row."""
    import onnxruntime

    types = {v.name: _DTYPES[v.type][0] for v in session.get_inputs() if v.type in _DTYPES}
    device, made = _device(session), []
    for pair in interface.pairs:
        shape = pair.sizes_at(capacity, batch)
        value = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, types[pair.past], device)
        if device == "cpu" and 0 not in shape:
            # What no token has filled yet is multiplied with a weight of 0, which makes NaN of whatever isn't finite.
            ctypes.memset(value.data_ptr(), 0, value.tensor_size_in_bytes())
        made.append(value)
    return made


def _gathered(value: onnxruntime.OrtValue, places: npt.NDArray[np.int64]) -> onnxruntime.OrtValue:
    """Rows of a cache [batch, heads, length, size] at `places` [batch, heads, kept]."""
    import onnxruntime

    batch, heads, length, size = value.shape()
    first = length * np.arange(batch * heads).reshape(batch, heads, 1)
    rows = (first + places).reshape(-1)
    shape = [batch, heads, places.shape[-1], size]
    if (device := value.device_name()) != "cpu":
        found = value.numpy().reshape(-1, size)[rows].reshape(shape)
        return onnxruntime.OrtValue.ortvalue_from_numpy(found, device)
    made = onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, _DTYPES[value.data_type()][0], device)
    np.take(_view(value).reshape(-1, size), rows, axis=0, out=_view(made).reshape(-1, size), mode="clip")
    return made


def _view(value: onnxruntime.OrtValue) -> npt.NDArray[Any]:
    """The numbers of a value in the memory where they lie; `OrtValue.numpy` copies them all."""
    shape: list[int] = value.shape()
    dtype = np.dtype(_DTYPES[value.data_type()][1])
    size = math.prod(shape) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(value.data_ptr())
    return np.frombuffer(memory, dtype=dtype).reshape(shape)
