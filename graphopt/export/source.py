"""What is exported: a module, its inputs with the names of their dynamic sizes, and the names of its outputs."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import UsageError, first_line
from graphopt.export.dependencies import require

Sizes = Mapping[str, int]

INNER = "inner."
"""How a wrapped module's own names begin in the wrapper."""
SAMPLE_BATCH = 2
"""torch.export takes a size of 0 or 1 for a constant, so the sample has at least 2 of everything dynamic."""


@dataclass(frozen=True)
class Input:
    """One input of the exported model.

    Attributes:
        name: Its name in the ONNX model.
        dims: Its dimensions: a fixed size, or the name of a dynamic one.
        make: Gives a tensor of the shape asked for, made with the NumPy generator given.
    """

    name: str
    dims: tuple[int | str, ...]
    make: Callable[[tuple[int, ...], np.random.Generator], Any]

    def tensor(self, sizes: Sizes, generator: np.random.Generator) -> Any:
        """A torch tensor of this input for these sizes of the dynamic dimensions."""
        return self.make(tuple(d if isinstance(d, int) else sizes[d] for d in self.dims), generator)


@dataclass(frozen=True)
class Reference:
    """PyTorch's answer to one call.

    Attributes:
        sizes: The dynamic sizes.
        feeds: Inputs by name.
        outputs: Outputs in order.
        real: By the name of an output, True where it counts; what stands at padding doesn't. Without a name, or None:
            everywhere.
    """

    sizes: dict[str, int]
    feeds: dict[str, npt.NDArray[Any]]
    outputs: list[npt.NDArray[Any]]
    real: dict[str, npt.NDArray[np.bool_] | None] | None = None


@dataclass
class Source:
    """A module to export, called with one tensor for each input and returning a tuple of tensors.

    Attributes:
        label: How messages call it.
        module: A torch module in eval mode.
        inputs: Its inputs in order.
        outputs: Names of its outputs in order; None: named after the count, once it is known.
        sample: The sizes to export with.
        probes: Sizes to verify with: sets of which the first that the module takes is used.
        dims: Each output's dimensions where they're known; None: found out from the probes.
        references: Gives the runs to verify with, in place of `probes`, from a function that runs the module: for a
            module whose inputs can't be chosen one by one.
        again: Makes the source once more from its module, which has fewer layers now; None: it doesn't depend on them.
    """

    label: str
    module: Any
    inputs: list[Input]
    outputs: list[str] | None
    sample: dict[str, int]
    probes: list[list[dict[str, int]]]
    dims: dict[str, tuple[int | str, ...]] | None = None
    references: Callable[[Callable[[tuple[Any, ...]], Sequence[Any]]], Iterator[Reference]] | None = None
    again: Callable[[], Source] | None = None

    def tensors(self, sizes: Sizes, seed: int) -> tuple[Any, ...]:
        """One tensor for each input, the same for the same seed."""
        generator = np.random.default_rng(seed)
        return tuple(item.tensor(sizes, generator) for item in self.inputs)


def wrap(call: Callable[..., Any], inner: Any) -> Any:
    """A torch module in eval mode that holds `inner` and runs `call` on its positional tensors."""
    torch = require("torch")

    class Wrapper(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *tensors: Any) -> Any:
            return call(*tensors)

    # The wrapper itself too: an exporter restores the mode it found, down to every module inside.
    return Wrapper().eval().requires_grad_(False)


def from_factory(name: str) -> Source:
    """The source that the callable `module:factory` returns.

    The callable takes no arguments and returns (module, example inputs[, input names[, output names[,
    dynamic axes]]]). Example inputs are a tensor, a sequence of tensors or a mapping from parameter to tensor;
    dynamic axes map the name of an input to {dimension: name} or to a list of dimensions. Without them the first
    dimension of the inputs is dynamic and called "batch". The current folder is looked in too.

    Raises:
        UsageError: No such callable, or it returns something else.
    """
    torch = require("torch")
    made = _call(name)
    if not isinstance(made, tuple) or not 2 <= len(made) <= 5 or not isinstance(made[0], torch.nn.Module):
        raise UsageError(
            f"{name} must return (torch.nn.Module, example inputs[, input names[, output names[, dynamic axes]]]), "
            f"not {_describe(made)}"
        )
    module, examples = made[0], made[1]
    names, outputs, axes = [*made[2:], None, None, None][:3]
    module.eval()
    parameters = _parameters(module)
    keywords: list[str] | None = None
    if isinstance(examples, Mapping):
        keywords = list(examples)
        tensors = list(examples.values())
        parameters = keywords
    else:
        tensors = [examples] if isinstance(examples, torch.Tensor) else list(examples)
    if not tensors or not all(isinstance(t, torch.Tensor) for t in tensors):
        raise UsageError(f"{name} must give its example inputs as torch tensors, at least one")
    input_names = [str(n) for n in names or parameters[: len(tensors)]]
    if not names:  # A forward with *args has fewer names than tensors.
        input_names += [f"input_{i}" for i in range(len(input_names), len(tensors))]
    if len(input_names) != len(tensors) or len(set(input_names)) != len(input_names):
        raise UsageError(f"{name} gives {len(tensors)} example inputs, but the input names are {input_names}")
    symbols = _symbols(name, input_names, outputs, tensors, axes)
    dims = [
        tuple(symbols.get((input_name, axis), size) for axis, size in enumerate(tensor.shape))
        for input_name, tensor in zip(input_names, tensors, strict=True)
    ]
    sample: dict[str, int] = {}
    for (input_name, axis), symbol in symbols.items():
        size = max(SAMPLE_BATCH, tensors[input_names.index(input_name)].shape[axis])
        if sample.setdefault(symbol, size) != size:
            raise UsageError(f"{name}: the dimensions called {symbol!r} have different sizes in the example inputs")

    def call(*args: Any) -> tuple[Any, ...]:
        result = module(**dict(zip(keywords, args, strict=True))) if keywords else module(*args)
        return tuple(_flat(result))

    return Source(
        label=name,
        module=wrap(call, module),
        inputs=[Input(n, d, _tiled(t)) for n, d, t in zip(input_names, dims, tensors, strict=True)],
        outputs=[str(n) for n in outputs] if outputs else None,
        sample=sample,
        probes=_probes(sample, {s for (_, axis), s in symbols.items() if axis == 0}),
    )


def _call(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    here = os.getcwd()
    added = here not in sys.path and "" not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        target: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            target = getattr(target, part)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"there is no callable {name}: {first_line(error)}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(target):
        raise UsageError(f"{name} is {_describe(target)}, not a callable")
    try:
        return target()
    except Exception as error:
        raise UsageError(f"{name}() failed with {type(error).__name__}: {first_line(error)}") from error


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(type(v).__name__ for v in value) + ")"
    return f"a {type(value).__name__}"


def _parameters(module: Any) -> list[str]:
    """Names of the positional parameters of the module's forward."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]


def _symbols(
    name: str, names: Sequence[str], outputs: Sequence[str] | None, tensors: Sequence[Any], axes: Any
) -> dict[tuple[str, int], str]:
    """The name of each dynamic dimension, by input and axis."""
    if axes is None:
        first = tensors[0].shape[0] if tensors[0].dim() else None
        return {(n, 0): "batch" for n, t in zip(names, tensors, strict=True) if t.dim() and t.shape[0] == first}
    if not isinstance(axes, Mapping):
        raise UsageError(f"{name}: dynamic axes must map an input's name to its axes, not be {_describe(axes)}")
    found: dict[tuple[str, int], str] = {}
    for input_name, dims in axes.items():
        if input_name not in names:
            if input_name in (outputs or ()):
                continue  # Its dynamic dimensions are found out.
            raise UsageError(
                f"{name}: dynamic axes are given for {input_name!r}, but the inputs are {', '.join(names)}"
            )
        rank = tensors[names.index(input_name)].dim()
        named = dims if isinstance(dims, Mapping) else {axis: f"{input_name}_dim_{axis}" for axis in dims}
        for axis, symbol in named.items():
            if not -rank <= axis < rank:
                raise UsageError(f"{name}: the input {input_name} has {rank} dimensions, and none is number {axis}")
            found[input_name, axis % rank] = str(symbol)
    return found


def _tiled(example: Any) -> Callable[[tuple[int, ...], np.random.Generator], Any]:
    def make(shape: tuple[int, ...], generator: np.random.Generator) -> Any:
        tensor = example
        for axis, size in enumerate(shape):
            if tensor.shape[axis] != size:
                torch = require("torch")
                # Repeated, so that every number stays one that the module takes.
                index = torch.from_numpy(generator.permutation(size) % max(1, tensor.shape[axis]))
                tensor = tensor.index_select(axis, index)
        return tensor.contiguous()

    return make


def _probes(sample: Sizes, batches: set[str]) -> list[list[dict[str, int]]]:
    """First dimensions 1 and 3; every other one as in the sample and doubled, or halved where that can't be.

    Multiples keep what strides divide by. The order differs from one size to the next, so that the outputs'
    dimensions can be told apart.
    """

    def pair(symbol: str, place: int, halve: bool) -> tuple[int, int]:
        size = sample[symbol]
        if symbol in batches:
            return 1, 3
        other = max(1, size // 2) if halve else 2 * size
        return (size, other) if place % 2 == 0 else (other, size)

    others = [symbol for symbol in sample if symbol not in batches]
    sets: list[list[dict[str, int]]] = []
    for halve in (False, True):
        pairs = {s: pair(s, others.index(s) if s in others else 0, halve) for s in sample}
        sets.append([{s: sizes[i] for s, sizes in pairs.items()} for i in range(2)])
    return sets if others else sets[:1]


def _flat(result: Any) -> list[Any]:
    """The tensors in what a module returns, in order."""
    torch = require("torch")
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        return [t for v in result.values() for t in _flat(v)]
    if isinstance(result, tuple | list):
        return [t for v in result for t in _flat(v)]
    return []
