"""A typical workload of a model, for timing: one batch, a usual length, an ordinary image."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from graphopt.errors import UsageError, VerificationError
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.load import load
from graphopt.verification.probes import Probe, Recipe, load_probes, make_feeds
from graphopt.verification.signature import Kind, signature
from graphopt.verification.timing import BenchResult, benchmark
from graphopt.verification.usable import usable_probes

USUAL: dict[Kind, int] = {"batch": 1, "sequence": 128, "past": 0, "space": 320, "free": 128}
"""Sizes of dynamic dimensions by what they count."""


def typical_feeds(path: str | os.PathLike[str], dims: Mapping[str, int] | None = None, seed: int = 0) -> dict[str, Any]:
    """Inputs of usual sizes; the nearest sizes that the model runs with, where it doesn't take those.

    Args:
        path: The model.
        dims: Sizes of dynamic dimensions by name, in place of `USUAL`.
        seed: Seed of the random numbers.

    Raises:
        UsageError: A name in `dims` is no dynamic dimension of the inputs.
        VerificationError: ONNX Runtime runs the model with no size tried.
    """
    model = load(path)
    shape = signature(model)
    for name in dims or {}:
        if name not in shape.variables:
            known = ", ".join(shape.variables) or "none"
            raise UsageError(f"{path} has no dynamic dimension {name!r}; it has {known}.")
    sizes = {name: (dims or {}).get(name, USUAL[kind]) for name, kind in shape.variables.items()}
    recipe = Recipe(sizes, seed=seed)
    good, _ = usable_probes(model, [Probe("workload", make_feeds(shape, recipe), "usual sizes", recipe)])
    return good[0].feeds


def benchmark_models(
    paths: Sequence[str | os.PathLike[str]],
    *,
    inputs: str | os.PathLike[str] | None = None,
    dims: Mapping[str, int] | None = None,
    seed: int = 0,
    runs: int = 30,
    threads: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """Time models against each other on the same inputs, made from the first one's signature or given.

    A decoder whose cache is another than the first one's (quantized, of lower rank) gets an empty one of its own.

    Args:
        paths: The models; ratios are to the first.
        inputs: An .npz file with an array for each input, in place of a typical workload.
        dims: Sizes of dynamic dimensions by name.
        seed: Seed of the random numbers.
        runs: Rounds that count.
        threads: Threads within an operator; 0: all cores.
        progress: Called before the timing starts.

    Raises:
        UsageError: An unknown dimension, or dimensions besides `inputs`.
        InputDataError: `inputs` doesn't fit the first model.
        VerificationError: A model doesn't load or run, or has inputs besides its cache that the first one hasn't.
    """
    if progress is not None:
        progress("timing", 0, 1)
    if inputs is not None and dims:
        raise UsageError("Inputs of your own have their sizes already; give either them or sizes of dimensions.")
    if inputs is not None:
        feeds = load_probes(inputs, load(paths[0]))[0].feeds
    else:
        feeds = typical_feeds(paths[0], dims, seed)
    own = {os.fspath(path): _own_cache(path, paths[0], feeds, dims, seed) for path in paths[1:]}
    return benchmark(paths, feeds, runs=runs, threads=threads or None, own=own)


def _own_cache(
    path: str | os.PathLike[str],
    first: str | os.PathLike[str],
    feeds: Mapping[str, Any],
    dims: Mapping[str, int] | None,
    seed: int,
) -> dict[str, Any]:
    """The inputs of a model's cache that `feeds` hasn't, with nothing in them.

    Raises:
        VerificationError: Other inputs are missing too, or the caches in `feeds` hold something.
    """
    model = load(path)
    missing = [name for name in (given.name for given in signature(model).inputs) if name not in feeds]
    if not missing:
        return {}
    interface = kv_interface(model)
    caches = set() if interface is None else {pair.past for pair in interface.pairs}
    if others := [name for name in missing if name not in caches]:
        raise VerificationError(f"{path} doesn't run on the inputs of {first}: it has {', '.join(others)} besides.")
    before = kv_interface(load(first))
    held = {} if before is None else {pair.past: pair for pair in before.pairs}
    if any(name in feeds and np.size(feeds[name]) for name, pair in held.items() if not pair.cross):
        raise VerificationError(
            f"{path} has another cache than {first} and can't be fed the tokens in that one; time them as they "
            "generate: graphopt bench --generate."
        )
    free = {name for name, kind in signature(model).variables.items() if kind != "past"}
    made = typical_feeds(path, {name: size for name, size in (dims or {}).items() if name in free}, seed)
    return {name: made[name] for name in missing}
