"""Sources of which every dynamic dimension has three sizes: one to trace with, two to verify with.

The dimensions of outputs are found by runs of two of them, without numbers: an output's size that is a dynamic
dimension's in both is that dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.export.dry_run import dry_run
from graphopt.export.source import Input, Reference, Source, wrap

Columns = Mapping[str, tuple[int, ...]]
"""Of each dynamic dimension its sizes in the sample and in the two probes."""
Named = Sequence[tuple[str, Any]]
"""Names and tensors, in order."""
Dims = tuple[int | str, ...]

_TOLD = (0, 2)
"""Which sizes tell the dimensions of outputs apart: no two dimensions may have the same pair."""


def tensors(inputs: Sequence[Input], sizes: Columns, place: int = 0) -> list[Any]:
    """A tensor for each input, of the sizes at this place."""
    generator = np.random.default_rng(place)
    return [item.tensor({symbol: column[place] for symbol, column in sizes.items()}, generator) for item in inputs]


def told(
    module: Any, call: Callable[..., Named], inputs: Sequence[Input], sizes: Columns
) -> dict[str, tuple[Dims, Any]]:
    """Dimensions and dtype of each output; a dimension that follows from no other is called "<output>_dim_<axis>".

    Raises:
        Exception: Whatever the module's code raises, see `graphopt.export.dry_run`.
    """
    first, second = (dry_run(module, call, tensors(inputs, sizes, place)) for place in _TOLD)
    symbols = {tuple(column[place] for place in _TOLD): symbol for symbol, column in sizes.items()}
    found: dict[str, tuple[Dims, Any]] = {}
    for (name, one), (_, other) in zip(first, second, strict=True):
        dims: list[int | str] = []
        for axis, pair in enumerate(zip(one.shape, other.shape, strict=True)):
            dims.append(symbols.get(pair, f"{name}_dim_{axis}") if pair[0] != pair[1] else int(pair[0]))
        found[name] = (tuple(dims), one.dtype)
    return found


def sources_of(makers: Mapping[str, Callable[[], Source]]) -> dict[str, Source]:
    """The source of each maker, which is made again by the same."""
    made = {}
    for name, maker in makers.items():
        made[name] = maker()
        made[name].again = maker
    return made


def sized_source(
    label: str, module: Any, part: Any, call: Callable[..., Named], inputs: Sequence[Input], sizes: Columns
) -> Source:
    """The source of `call`.

    Args:
        label: How messages call it.
        module: What `call` runs.
        part: A module that has the parameters that `call` reads, see `graphopt.export.parts`.
        call: Gives the outputs' names and tensors from a tensor for each input.
        inputs: Its inputs; what stands at places that are 0 in one that ends in "attention_mask" isn't compared.
        sizes: Of every dynamic dimension, also those that only outputs have.
    """
    dims = {name: dims for name, (dims, _) in told(module, call, inputs, sizes).items()}
    columns = [{symbol: column[place] for symbol, column in sizes.items()} for place in range(3)]
    source = Source(
        label, wrap(lambda *given: tuple(tensor for _, tensor in call(*given)), part), list(inputs), list(dims),
        columns[0], [columns[1:]], dims=dims,
    )  # fmt: skip

    def references(run: Callable[[tuple[Any, ...]], Sequence[Any]]) -> Iterator[Reference]:
        for place in (1, 2):
            given = tensors(inputs, sizes, place)
            made = [tensor.detach().cpu().numpy().copy() for tensor in run(tuple(given))]
            feeds = {item.name: tensor.cpu().numpy() for item, tensor in zip(inputs, given, strict=True)}
            masks = {item.dims: feeds[item.name] for item in inputs if item.name.endswith("attention_mask")}
            masks |= {dims[n]: array for n, array in zip(dims, made, strict=True) if n.endswith("attention_mask")}
            real = {n: real_places(dims[n], array, masks) for n, array in zip(dims, made, strict=True)}
            yield Reference(columns[place], feeds, made, real)

    source.references = references
    return source


def real_places(
    dims: Dims, output: npt.NDArray[Any], masks: Mapping[Dims, npt.NDArray[Any]]
) -> npt.NDArray[np.bool_] | None:
    """Where an output is of a token and not of padding, broadcast to its shape; None: everywhere.

    Args:
        dims: The output's dimensions.
        output: The output.
        masks: Masks, 0 at padding, by their own dimensions; one of "total" is also of "sequence".
    """
    for mask_dims, mask in masks.items():
        if len(mask_dims) != 2:
            continue
        # New tokens are the last of all.
        symbols = ("sequence", "total") if mask_dims[1] == "total" else mask_dims[1:]
        for axis, symbol in enumerate(dims):
            if axis and symbol in symbols:
                shape = [1] * output.ndim
                shape[0], shape[axis] = mask.shape[0], output.shape[axis]
                return np.broadcast_to(mask[:, -output.shape[axis] :].reshape(shape) == 1, output.shape)
    return None
