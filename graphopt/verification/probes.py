"""Probe inputs: what a model is fed to see whether another one computes the same."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.errors import InputDataError
from graphopt.graph.assumptions import NOTHING, Assumptions
from graphopt.verification.signature import Input, Signature, signature

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """From what a probe is made; the same recipe makes the same numbers.

    Attributes:
        sizes: Sizes by variable of the signature, or by "input[axis]" for one dimension alone.
        content: "noise" (normal, mean 0, variance 1) or "zeros" (silence) for floats.
        padding: The side on which masks are 0 in all rows but the first.
        values: Numbers of scalar inputs.
        shift: How much later the positions of each row start than those of the row before, and of the first than usual.
        seed: Seed of the random numbers.
    """

    sizes: dict[str, int]
    content: Literal["noise", "zeros"] = "noise"
    padding: Literal["none", "left", "right"] = "none"
    values: dict[str, float] = dataclasses.field(default_factory=dict)
    shift: int = 0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Probe:
    """Inputs for one run of a model.

    Attributes:
        name: A short name, unique among the probes of a model.
        feeds: An array for every input.
        description: Sizes and contents in words.
        recipe: How it was made, or None for inputs given by the user.
    """

    name: str
    feeds: dict[str, Array]
    description: str
    recipe: Recipe | None = None


def make_probes(
    model: ir.Model,
    seed: int = 0,
    sizes: tuple[int, int] = (8, 13),
    batches: tuple[int, int] = (1, 3),
    assumptions: Assumptions = NOTHING,
) -> list[Probe]:
    """Make probes from the model's own signature.

    Every dynamic dimension gets two sizes. Integers stay inside the range that the graph implies
    (`graphopt.verification.input_ranges`); scalars that are compared with constants get these and one other number;
    masks are full, padded on the left and padded on the right, never all zero in a row; positions count the tokens
    before them that the mask has, and start elsewhere in one probe of a decoder; floats are normal noise, and zeros in
    a probe of its own. A decoder with a key/value cache is probed in prefill (empty cache), decode (one new token) and
    chunked prefill (several new tokens after a filled cache), with batches and padding in each of them.

    Args:
        model: The model.
        seed: Seed of all random numbers; the same seed gives the same probes.
        sizes: The two sizes of sequences and other dynamic dimensions; images take multiples of 32 instead.
        batches: The two batch sizes.
        assumptions: What a result may take for granted. Probes outside of that are made all the same, for what doesn't
            need it, but for a `max-length`, which no probe exceeds, and which one probe reaches.

    Raises:
        VerificationError: An input is no tensor, so that graphopt can't make values for it.
    """
    shape = signature(model)
    return [
        Probe(name, make_feeds(shape, recipe), describe(shape, recipe), recipe)
        for name, recipe in _plans(shape, seed, sizes, batches, assumptions)
    ]


def load_probes(given: str | os.PathLike[str] | Mapping[str, Array], model: ir.Model) -> list[Probe]:
    """Make a probe of arrays given by the user, or of an .npz file that holds one for each input, under its name.

    Args:
        given: The arrays, or the file, as `numpy.savez(path, **feeds)` writes it.
        model: The model that the arrays must fit. Inputs that have a default (initializers) may be left out.

    Returns:
        One probe. (A list, so that it can stand where `make_probes` stands.)

    Raises:
        InputDataError: The file can't be read, or names, dtypes, ranks or static dimensions don't fit.
    """
    if isinstance(given, Mapping):
        return [_given(Path("the inputs given"), {n: np.asarray(a) for n, a in given.items()}, model)]
    path = Path(given)
    try:
        if not zipfile.is_zipfile(path):  # numpy.load takes other files for pickled objects
            with path.open("rb"):
                raise InputDataError(f"{path} is not an .npz file; write it with numpy.savez.")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except OSError as error:
        raise InputDataError(f"{path} can't be read: {error.strerror or error}.") from error
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise InputDataError(
            f"{path} can't be read as an .npz file of arrays ({error}); write it with numpy.savez."
        ) from error
    return [_given(path, arrays, model)]


def _given(path: Path, arrays: dict[str, Array], model: ir.Model) -> Probe:
    inputs = {v.name or "": v for v in model.graph.inputs}
    if unknown := sorted(set(arrays) - set(inputs)):
        raise InputDataError(f"{path} holds {_list(unknown)}, but the model's inputs are {_list(inputs)}.")
    needed = {n for n, v in inputs.items() if not v.is_initializer()}
    if missing := sorted(needed - set(arrays)):
        raise InputDataError(f"{path} lacks the input {_list(missing)}; it must hold an array for each of them.")
    feeds = {name: _checked(path, inputs[name], array) for name, array in arrays.items()}
    shapes = ", ".join(f"{n} {list(a.shape)}" for n, a in feeds.items())
    return Probe(path.name, feeds, f"from {path.name}: {shapes}")


def _checked(path: Path, value: ir.Value, array: Array) -> Array:
    dtype = value.dtype
    if dtype is None:
        return array
    if dtype == ir.DataType.STRING:
        if array.dtype.kind not in "US":
            raise InputDataError(f"{path}: input {value.name!r} takes strings, not {array.dtype}.")
        array = array.astype(object)
    elif array.dtype != dtype.numpy():
        # An .npz file has no bfloat16, float8 or int4: their numbers come in the type that holds them.
        wider = np.float32 if dtype.is_floating_point() else np.int8
        if np.issubdtype(dtype.numpy(), np.generic) and dtype.numpy().kind in "fiub":
            raise InputDataError(
                f"{path}: input {value.name!r} takes {dtype.numpy()}, not {array.dtype}; convert the array."
            )
        if array.dtype != wider:
            raise InputDataError(f"{path}: give input {value.name!r} ({dtype.name}) as {np.dtype(wider)}.")
        array = array.astype(dtype.numpy())
    if value.shape is None:
        return array
    fits = len(value.shape) == array.ndim and all(
        not isinstance(d, int) or d < 0 or d == n for d, n in zip(value.shape, array.shape, strict=True)
    )
    if not fits:
        raise InputDataError(
            f"{path}: input {value.name!r} takes the shape {value.shape}, but the array has {list(array.shape)}."
        )
    return array


def _list(names: Any) -> str:
    return ", ".join(repr(n) for n in names)


# ---- which probes a model gets


LONGEST_BYTES = 32 << 20
"""A cache of the longest length that is assumed is probed where it takes at most this many bytes."""


def _plans(
    shape: Signature, seed: int, sizes: tuple[int, int], batches: tuple[int, int], assumptions: Assumptions
) -> Iterator[tuple[str, Recipe]]:
    choices = {i.name: _choices(i) for i in shape.with_role("scalar") if len(_choices(i)) > 1}
    base = {name: values[0] for name, values in choices.items()}
    masked = bool(shape.with_role("mask")) or any(_padding_token(i) is not None for i in shape.inputs)
    number = itertools.count(seed * 1000)
    longest = assumptions.max_length
    # Every length stays within what is assumed; `least` is how much of it is left for what is new.
    small, large = sizes if longest is None else (min(sizes[0], longest), min(sizes[1], longest))

    def within(past: int, least: int) -> int:
        return past if longest is None else max(0, min(past, longest - least))

    def plan(size: int, batch: int, **options: Any) -> Recipe:
        fixed: dict[str, int] = {k: options.pop(k) for k in ("past", "sequence") if k in options}
        result = _sizes(shape, (small, large), size, batches[batch])
        for variable, kind in shape.variables.items():
            result[variable] = fixed.get(kind, result[variable])
        return Recipe(result, values={**base, **options.pop("values", {})}, seed=next(number), **options)

    if shape.decodes:
        one = {"past": within(small, 1), "sequence": 1}
        some = {"past": within(small - 1, 4), "sequence": min(4, large)}
        yield "prefill", plan(0, 0, past=0)
        yield "prefill, batch", plan(1, 1, past=0)
        if shape.with_role("position"):
            # An input of its own, which need not count from the cache.
            alone = assumptions.holds("batch=1")
            yield "prefill, other positions", plan(0, 0 if alone else 1, past=0, sequence=min(4, large), shift=2)
        if masked:
            yield "prefill, left padding", plan(0, 1, past=0, padding="left")
            yield "prefill, right padding", plan(0, 1, past=0, padding="right")
        yield "decode", plan(0, 0, past=within(large, 1), sequence=1)
        yield "decode, batch", plan(0, 1, **one)
        if masked:
            yield "decode, left padding", plan(0, 1, **one, padding="left")
        yield "chunk", plan(0, 0, **some)
        if masked:
            yield "chunk, left padding", plan(0, 1, **some, padding="left")
            yield "chunk, right padding", plan(0, 1, **some, padding="right")
        # Where padding is probed in chunks, a batch of them without it has nothing new to show but to who assumes that.
        if not masked or assumptions.holds("no-padding"):
            yield "chunk, batch", plan(0, 1, **some)
        if masked and assumptions.holds("no-batched-chunks"):  # padding where the batch is 1 is claimed too
            yield "chunk of one, left padding", plan(0, 0, **some, padding="left")
            yield "chunk of one, right padding", plan(0, 0, **some, padding="right")
        if longest is not None and longest > large + 1:
            recipe = plan(0, 0, past=longest - 1, sequence=1)
            caches = shape.with_role("past")
            if sum(math.prod(i.shape(recipe.sizes)) * i.dtype.bitwidth // 8 for i in caches) <= LONGEST_BYTES:
                yield "decode, longest", recipe
    else:
        yield "noise", plan(0, 0)
        yield "batch, noise" if shape.variables else "noise 2", plan(1, 1)
        if masked:
            yield "left padding", plan(0, 1, padding="left")
            yield "right padding", plan(1, 1, padding="right")
        if any(i.role in ("float", "past") for i in shape.inputs):
            yield "zeros", plan(0, 0, content="zeros")
        if "sequence" in shape.variables.values():
            yield "length 1", plan(0, 0, sequence=1)
    for name, values in choices.items():
        for value in values[1:]:
            yield f"{name} = {value:g}", plan(0, 0, values={name: value}, **({"past": 0} if shape.decodes else {}))


def _sizes(shape: Signature, sizes: tuple[int, int], index: int, batch: int) -> dict[str, int]:
    # Heights and widths differ, so that a swap of the two shows.
    images = itertools.cycle((64, 96) if index == 0 else (128, 64))
    result = {}
    for variable, kind in shape.variables.items():
        if kind == "batch":
            result[variable] = batch
        elif kind == "space":
            result[variable] = next(images)
        else:
            result[variable] = sizes[index]
    return result


def _choices(item: Input) -> list[float]:
    """The numbers of a scalar worth a probe each: those it is compared with, and one that is none of them."""
    if item.dtype == ir.DataType.BOOL:
        return [1, 0]
    compared = [c for c in item.use.compared if c == int(c)]
    if not compared:
        return [1]
    # Half of the largest: for a sampling rate that is the other usual one, and elsewhere as good as any.
    other = max(compared) // 2
    while other in compared:
        other += 1
    return [*reversed(compared), other]


def _padding_token(item: Input) -> int | None:
    """The token that the graph itself compares ids with to find padding."""
    if item.role != "index" or not item.use.compared:
        return None
    token = int(item.use.compared[0])
    return token if 0 <= token < (item.use.limit or 0) else None


# ---- numbers


def make_feeds(shape: Signature, recipe: Recipe) -> dict[str, Array]:
    """The arrays of a recipe, one for every input, each from a random stream of its own."""
    feeds = {}
    for item in shape.inputs:
        random = np.random.default_rng([recipe.seed, zlib.crc32(item.name.encode())])
        feeds[item.name] = _values(shape, item, recipe, random)
    return feeds


def _values(shape: Signature, item: Input, recipe: Recipe, random: np.random.Generator) -> Array:
    dims, dtype = item.shape(recipe.sizes), item.dtype.numpy()
    match item.role:
        case "text":
            return random.choice(np.array(["a", "graph", "of words"], dtype=object), size=dims)
        case "float" | "past" if item.dtype.is_floating_point():
            numbers = random.standard_normal(dims).astype(dtype)
            return np.zeros(dims, dtype) if recipe.content == "zeros" else numbers
        case "mask":
            if item.dtype.is_floating_point() and len(dims) > 2:
                return np.zeros(dims, dtype)  # added to scores: nothing masked
            return _mask(dims, recipe.padding, _new(shape, recipe)).astype(dtype)
        case "position":
            count = _positions(shape, recipe, dims)
            if item.use.limit is not None:
                count = count % item.use.limit
            return np.broadcast_to(count, dims).astype(dtype)
        case "length":
            longest = max((recipe.sizes[v] for v, kind in shape.variables.items() if kind != "batch"), default=1)
            return np.maximum(1, longest - np.arange(dims[0])).astype(dtype)
        case "scalar":
            value = recipe.values.get(item.name)
            if value is None:
                past = next((recipe.sizes[v] for v, kind in shape.variables.items() if kind == "past"), None)
                value = past if past is not None and "past" in item.name.lower() else _choices(item)[0]
            return np.full(dims, value).astype(dtype)
    ids = random.integers(0, _limit(item), size=dims)
    token = _padding_token(item)
    if token is not None and recipe.padding != "none" and len(dims) == 2:
        ids = np.where(_mask(dims, recipe.padding) == 1, ids, token)
    return ids.astype(dtype)


def _limit(item: Input) -> int:
    """Below which number the random integers of an input stay."""
    if item.dtype == ir.DataType.BOOL:
        return 2
    most = 1 << min(item.dtype.bitwidth - (0 if "UINT" in item.dtype.name else 1), 62)
    if item.use.limit is not None:
        return min(item.use.limit, most)
    if item.use.compared:
        return min(max(2, int(max(item.use.compared)) + 2), most)
    # Pixels fill their type; other integers of unknown meaning stay small.
    return 256 if item.dtype == ir.DataType.UINT8 else 3


def _new(shape: Signature, recipe: Recipe) -> int | None:
    """How many tokens a decoder gets besides those in its cache; None where there is no cache."""
    if not shape.decodes:
        return None
    return min((recipe.sizes[v] for v, kind in shape.variables.items() if kind == "sequence"), default=None)


def _positions(shape: Signature, recipe: Recipe, dims: tuple[int, ...]) -> Array:
    """Positions that count on from the cache, or, where rows are padded, the tokens before that the mask has."""
    new = dims[-1] if dims else 1
    start = next((recipe.sizes[v] for v, kind in shape.variables.items() if kind == "past"), 0)
    rows = dims[-2] if len(dims) > 1 else 1
    masks = [i.shape(recipe.sizes) for i in shape.with_role("mask")]
    mask = next((m for m in masks if len(m) == 2 and m[0] == rows and m[1] == start + new), None)
    if recipe.padding != "none" and mask is not None:
        counted: Array = np.cumsum(_mask(mask, recipe.padding, _new(shape, recipe)), axis=1) - 1
        return np.maximum(counted, 0)[:, start:]
    shifts = recipe.shift * np.arange(1, rows + 1)
    return start + shifts[:, None] + np.arange(new) if len(dims) > 1 else start + recipe.shift + np.arange(new)


def _mask(dims: tuple[int, ...], padding: str, new: int | None = None) -> Array:
    """Ones, with zeros on one side in all rows but the first; on the right among the last `new` only."""
    mask = np.ones(dims, np.int64)
    if padding == "none" or len(dims) < 2 or dims[-1] < 2:
        return mask
    rows, length = dims[0], dims[-1]
    most = length if padding == "left" or new is None else min(new, length)
    for row in range(rows):
        padded = most // 3 if rows == 1 else row * most // (rows + 1)
        side = slice(0, padded) if padding == "left" else slice(length - padded, length)
        mask[row, ..., side] = 0
    return mask


def describe(shape: Signature, recipe: Recipe) -> str:
    """A recipe in words: the shapes of the first inputs, content, padding, scalars."""
    shown = [f"{i.name} {list(i.shape(recipe.sizes))}" for i in shape.inputs]
    if len(shown) > 4:
        shown = [*shown[:4], f"... ({len(shown)} inputs)"]
    words = [", ".join(shown)]
    if recipe.content == "zeros":
        words.append("floats zero")
    if recipe.padding != "none":
        words.append(f"{recipe.padding} padding")
    if recipe.shift:
        words.append(f"positions of each row {recipe.shift} later")
    words += [f"{name} = {value:g}" for name, value in recipe.values.items()]
    return "; ".join(words)


def resized(shape: Signature, probe: Probe, sizes: Mapping[str, int]) -> Probe:
    """The same probe with other sizes."""
    assert probe.recipe is not None
    recipe = dataclasses.replace(probe.recipe, sizes={**probe.recipe.sizes, **sizes})
    return Probe(probe.name, make_feeds(shape, recipe), describe(shape, recipe), recipe)
