"""The weights of a module, by the module's own names and one at a time."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.export.conversions import plan
from graphopt.export.dependencies import require
from graphopt.export.dequantization import dequantizer, require_dequantized
from graphopt.export.safetensors_files import stored_tensors
from graphopt.export.streamed_tensor import FLOATING, CastWeights, blocks_of, cast
from graphopt.export.torch_tensors import as_torch, ir_dtype

__all__ = [
    "CheckpointWeights",
    "Weights",
    "cast",
    "cast_like",
    "checkpoint_weights",
    "load_into",
    "not_finite",
    "shared_names",
]


class Weights(Protocol):
    """The parameters and persistent buffers of a module by its own names (state_dict keys), read one at a time."""

    def names(self) -> Collection[str]:
        """The names of what the checkpoint gives."""
        ...

    def tensor(self, name: str) -> ir.TensorProtocol:
        """One of them; shape and dtype are known without reading the data, and reading it twice gives the same."""
        ...


class CheckpointWeights:
    """The weights in the safetensors files of a Hugging Face folder.

    Attributes:
        folder: The folder.
        unexpected: Names that the checkpoint has and the module hasn't, as the module would call them. What the
            module's class declares of no use isn't among them.
        untied: Pairs of names that are one parameter of the module, and two different ones in the checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, ir.TensorProtocol],
        unexpected: tuple[str, ...],
        untied: tuple[tuple[str, str], ...],
    ) -> None:
        self.folder, self.unexpected, self.untied = folder, unexpected, untied
        self._tensors = tensors

    def names(self) -> Collection[str]:
        """The names of what the checkpoint gives, those of tied weights included."""
        return self._tensors.keys()

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The weight of this name: in the file as it is, or computed when it is read.

        Names of one tied weight give the same object.
        """
        return self._tensors[name]

    def missing(self, module: Any) -> list[str]:
        """Names of the module that the checkpoint has no numbers for, in the module's order.

        Buffers that the module's class computes (`_keys_to_ignore_on_load_missing`) aren't among them. Parameters that
        it declares dispensable are: transformers leaves them at random numbers.
        """
        patterns = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
        buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        return [
            name
            for name in module.state_dict()
            if name not in self._tensors
            and not (name in buffers and any(re.search(pattern, name) for pattern in patterns))
        ]


def checkpoint_weights(folder: Path, module: Any) -> CheckpointWeights:
    """Read the headers of a folder's safetensors files and assign the tensors in them to the names of a module.

    Names with and without the prefix of the base model, transformers' renamings and conversions and tied weights are
    seen to as its `from_pretrained` does it. No data is read, except of two tensors for one tied weight.

    Args:
        folder: The folder of the model.
        module: The torch.nn.Module (for transformers' renamings: a PreTrainedModel). Its parameters' values don't
            matter, and they may be on the device meta.

    Raises:
        UsageError: There are no safetensors files, or several of which none is the model's, or quantized weights that
            transformers can't dequantize (fp8 and mxfp4 it can: they are computed in the module's types).
        ModelError: A file is missing or broken, or a tensor hasn't the shape that the module has it in.
    """
    quantizer = dequantizer(folder, module)
    own: dict[str, Any] = module.state_dict()
    tensors, unexpected = plan(stored_tensors(folder), module, own, quantizer)
    if quantizer is not None:
        require_dequantized(folder, tensors.values(), quantizer.quantization_config)
    for name, tensor in tensors.items():
        held, wanted = tuple(tensor.shape.numpy()), tuple(own[name].shape)
        if held != wanted:
            raise ModelError(
                f"{folder}: the weight {name} is {list(held)} in the files, and {list(wanted)} by config.json; one of "
                "them is another model's"
            )
    untied: list[tuple[str, str]] = []
    for names in shared_names(module):
        given = [name for name in names if name in tensors]
        for other in given[1:]:
            if same(tensors[given[0]], tensors[other]):
                tensors[other] = tensors[given[0]]
            else:
                untied.append((given[0], other))
        if given:
            tensors.update({name: tensors[given[0]] for name in names if name not in tensors})
    ordered = {name: tensors[name] for name in own if name in tensors}
    return CheckpointWeights(folder, ordered, tuple(sorted(unexpected)), tuple(untied))


def cast_like(weights: Weights, module: Any) -> Weights:
    """The weights with their floating-point tensors in the types that a module has them in, cast as `cast` does it.

    So the parts of a float16 model that transformers keeps in float32 are in float32. Names that the module hasn't keep
    their type.
    """
    types = {name: ir_dtype(value.dtype) for name, value in module.state_dict().items()}
    wanted = {name: dtype for name, dtype in types.items() if dtype in FLOATING}
    return CastWeights(weights, lambda name: wanted.get(name) or weights.tensor(name).dtype)


def shared_names(module: Any) -> list[list[str]]:
    """The names in the module's state_dict of each parameter or buffer that has several, in the module's order.

    They are one object, or transformers would make them one (which older versions leave undone on the device meta).
    """
    own = module.state_dict()
    sources = getattr(module, "all_tied_weights_keys", None) or {}
    objects: dict[str, Any] = {}
    for kind in (module.named_parameters, module.named_buffers):
        objects.update({name: value for name, value in kind(remove_duplicate=False) if name in own})
    places: dict[int, list[str]] = defaultdict(list)
    for name in own:
        if name in objects:
            places[id(objects.get(sources.get(name, name), objects[name]))].append(name)
    return [names for names in places.values() if len(names) > 1]


def same(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Whether two tensors are equal bit for bit; reads them a block at a time."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape.numpy() != b.shape.numpy():
        return False
    if not (isinstance(a, ir.ExternalTensor) and isinstance(b, ir.ExternalTensor)):
        return np.array_equal(a.numpy().reshape(-1).view(np.uint8), b.numpy().reshape(-1).view(np.uint8))
    if (a.path, a.offset) == (b.path, b.offset):
        return True
    pairs = zip(blocks_of(a), blocks_of(b), strict=True)
    return all(np.array_equal(x.view(np.uint8), y.view(np.uint8)) for x, y in pairs)


def load_into(module: Any, weights: Weights) -> None:
    """Put the weights into a module, in place; what is one parameter under several names stays one.

    Where the types agree the parameter shares its memory with the mapped file (and what is written to it stays out of
    the file). Else the numbers are cast. Parameters on the device meta are replaced by real ones. Names that the module
    hasn't are passed over.

    Raises:
        ModelError: A weight hasn't the shape of the parameter.
    """
    torch = require("torch")
    given = set(weights.names())
    done: set[int] = set()
    real: dict[int, Any] = {}
    for kind in (module.named_parameters, module.named_buffers):
        for name, value in list(kind(remove_duplicate=False)):
            if name not in given or id(value) in done:
                continue
            done.add(id(value))
            tensor = as_torch(weights.tensor(name))
            if tensor.shape != value.shape:
                raise ModelError(f"the weight {name} is {list(tensor.shape)}, and {list(value.shape)} in the module")
            if value.device.type != "meta":
                value.data = tensor.to(value.device, value.dtype)
            elif isinstance(value, torch.nn.Parameter):
                real[id(value)] = torch.nn.Parameter(tensor.to(value.dtype), requires_grad=False)
            else:
                real[id(value)] = tensor.to(value.dtype)
    for part in module.modules() if real else ():
        for held in (part._parameters, part._buffers):
            held.update({key: real[id(value)] for key, value in held.items() if id(value) in real})


def not_finite(weights: Weights) -> list[str]:
    """The names of the floating-point weights with a NaN or an infinity among their numbers.

    This reads everything. It isn't an error of a checkpoint: masks hold -inf, and rows that nothing uses hold NaN in
    published models, and an export keeps them bit for bit. Call it to say where a NaN comes from that the verification
    has met.
    """
    seen: dict[int, bool] = {}
    found: list[str] = []
    for name in weights.names():
        tensor = weights.tensor(name)
        if tensor.dtype not in FLOATING:
            continue
        if id(tensor) not in seen:
            seen[id(tensor)] = not all(np.isfinite(block).all() for block in blocks_of(tensor))
        if seen[id(tensor)]:
            found.append(name)
    return found
