"""The weights of a GGUF file, dequantized one at a time while they are written."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.export.gguf.names import Parameter, Processor, names, parameters, skeleton
from graphopt.export.gguf.reader import GGUFFile, StoredTensor


class GGUFWeights:
    """The parameters of a module out of a GGUF file: float32, dequantized exactly as the types define it.

    Nothing is read but the file's header. A tensor that is stored as the module has it is written in runs of rows, so
    that not even it is in memory as a whole.

    Args:
        file: The file.
        config: Its configuration (`configuration`).
        model_class: The transformers class whose parameters are meant.

    Raises:
        ModelError: A parameter is missing or has another size.
        UsageError: The file has tensors for which the module has no place.
    """

    def __init__(self, file: GGUFFile, config: Any, model_class: Any) -> None:
        self.file = file
        self._processor = Processor(file, config)
        module = skeleton(model_class, config)
        self._table = names(module, self._processor)
        self._parameters = parameters(file, module, self._processor, self._table)
        self._tensors: dict[str, ir.TensorProtocol] = {}

    def names(self) -> Collection[str]:
        """The parameters that the file gives; a head that is the embedding isn't among them."""
        return self._parameters.keys()

    def parameter(self, name: str) -> Parameter:
        """What a parameter is made of.

        Raises:
            ModelError: The file doesn't give it.
        """
        try:
            return self._parameters[name]
        except KeyError:
            raise ModelError(f"{self.file.path} has no tensor for the parameter {name}") from None

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The parameter, float32, read when its data are asked for; the same object for the same name.

        Raises:
            ModelError: The file doesn't give it.
        """
        if name not in self._tensors:
            parameter = self.parameter(name)
            plain = len(parameter.stored) == 1 and self._is_plain(parameter)
            self._tensors[name] = _Dequantized(
                name, parameter.shape, parameter.stored[0] if plain else None, lambda: self._read(parameter)
            )
        return self._tensors[name]

    def stored(self, name: str) -> tuple[StoredTensor, npt.NDArray[np.int64]] | None:
        """The stored tensor that a parameter of two dimensions is, and which of its rows each row of the parameter is.

        None where the parameter is made of it by more than an order of rows, or the file doesn't give it.
        """
        parameter = self._parameters.get(name)
        rows = None if parameter is None else self._processor.rows(parameter)
        return None if parameter is None or rows is None else (parameter.stored[0], rows)

    def _is_plain(self, parameter: Parameter) -> bool:
        rows = self._processor.rows(parameter)
        return rows is not None and bool((np.diff(rows) == 1).all())

    def _read(self, parameter: Parameter) -> npt.NDArray[np.float32]:
        return self._processor.apply(parameter, [stored.values() for stored in parameter.stored], self._table)


class _Dequantized(ir.LazyTensor):
    """A parameter that is dequantized when it is read, in runs of rows where the file holds it as it is."""

    __slots__ = ("_stored",)

    def __init__(self, name: str, shape: tuple[int, ...], stored: StoredTensor | None, read: Any) -> None:
        super().__init__(lambda: ir.tensor(read()), ir.DataType.FLOAT, ir.Shape(shape), name=name)
        self._stored = stored

    def tofile(self, file: BinaryIO) -> None:
        """Write the values, little-endian."""
        if self._stored is None:
            super().tofile(file)
            return
        for chunk in self._stored.chunks():
            file.write(np.ascontiguousarray(chunk, dtype="<f4").data)
