"""Which probes a model runs on, and the search for sizes that suit it where the first guess doesn't."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.errors import VerificationError
from graphopt.graph.skeleton import first_line
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.verification.probes import Probe, resized
from graphopt.verification.signature import Kind, Signature, signature

if TYPE_CHECKING:
    import onnxruntime

# What is tried after the size that a probe asks for. 576, 512, 288, 256, 1280, 16000: windows of audio models.
_CANDIDATES: dict[Kind, tuple[int, ...]] = {
    "batch": (1, 2),
    "sequence": (32, 16, 64, 128, 1, 2, 4, 256, 512),
    "space": (32, 48, 64, 96, 128, 192, 224, 256, 320, 640),
    "free": (32, 64, 576, 512, 288, 256, 1280, 2048, 4096, 16000, 1, 2, 4, 16, 128),
    "past": (0, 1),
}
Runs = dict[str, tuple[list[Any], float]]
"""Outputs and seconds by probe."""

MOST_TRIES = 200
"""How many sizes are tried for a probe before it is given up."""
MOST_ELEMENTS = 1 << 22
"""Sizes that make an input larger than this aren't tried."""
MOST_SECONDS = 20.0
"""How long the search for sizes takes for all probes of a model together."""


def usable_probes(
    model: ir.Model,
    probes: Sequence[Probe],
    session: onnxruntime.InferenceSession | None = None,
    runs: Runs | None = None,
) -> tuple[list[Probe], list[tuple[Probe, str]]]:
    """Keep the probes on which the model runs, with other sizes where those asked for don't work.

    A file may declare one symbol for different sizes, need multiples of 32, or accept a single size of a dimension
    that it declares dynamic. So other sizes are tried, near ones first: for whole variables, then for single
    dimensions. Sizes that worked are tried first for the next probe.

    Args:
        model: The model as it came.
        probes: From `make_probes` or `load_probes`.
        session: A session of `model`, if there is one already.
        runs: Takes the session's outputs on each probe that works, and the seconds that they took.

    Returns:
        The probes that work, and those that don't with ONNX Runtime's reason.

    Raises:
        VerificationError: None works; the message says how to give inputs.
    """
    if session is None:
        session = make_session(model, "all")
    shape = signature(model) if any(p.recipe is not None for p in probes) else Signature((), {})
    good: list[Probe] = []
    bad: list[tuple[Probe, str]] = []
    found: list[tuple[dict[str, int], dict[str, int]]] = []
    deadline = time.monotonic() + MOST_SECONDS
    for probe in probes:
        reason = _reason(session, probe, runs)
        if reason is None:
            good.append(probe)
            continue
        other = None
        if probe.recipe is not None:
            # Where nothing at all has worked so far, later probes are less likely to.
            tries = MOST_TRIES if good or not bad else MOST_TRIES // 10
            other = _search(session, shape, probe, found, deadline, tries, runs)
        if other is None:
            bad.append((probe, reason))
        else:
            good.append(other)
    if probes and not good:
        if not any(probe.recipe is not None for probe in probes):
            raise VerificationError(f"ONNX Runtime doesn't run the model on the inputs given. It says: {bad[0][1]}")
        raise VerificationError(
            "ONNX Runtime runs the model on none of the inputs made from its signature; give some with "
            f"--inputs FILE.npz. It says: {bad[0][1]}"
        )
    return good, bad


def _reason(session: onnxruntime.InferenceSession, probe: Probe, runs: Runs | None = None) -> str | None:
    """Why the model doesn't run on a probe, or None where it does, with its outputs in `runs`."""
    begin = time.perf_counter()
    try:
        outputs = run(session, probe.feeds)
    except Exception as error:
        return first_line(error)
    if runs is not None:
        runs[probe.name] = outputs, time.perf_counter() - begin
    return None


def _search(
    session: onnxruntime.InferenceSession,
    shape: Signature,
    probe: Probe,
    found: list[tuple[dict[str, int], dict[str, int]]],
    deadline: float,
    tries: int,
    runs: Runs | None = None,
) -> Probe | None:
    """The probe with sizes on which the model runs; they are put down in `found`."""
    assert probe.recipe is not None
    for sizes in itertools.islice(_ladder(shape, probe, found), tries):
        if time.monotonic() > deadline:
            return None
        if any(math.prod(i.shape({**probe.recipe.sizes, **sizes})) > MOST_ELEMENTS for i in shape.inputs):
            continue
        other = resized(shape, probe, sizes)
        if _reason(session, other, runs) is None:
            found.insert(0, (_without_batch(shape, probe.recipe.sizes), _without_batch(shape, sizes)))
            return other
    return None


def _without_batch(shape: Signature, sizes: dict[str, int]) -> dict[str, int]:
    return {k: n for k, n in sizes.items() if shape.variables.get(k) != "batch"}


def _ladder(
    shape: Signature, probe: Probe, found: Sequence[tuple[dict[str, int], dict[str, int]]]
) -> Iterator[dict[str, int]]:
    """Sizes to try, likely ones first; `found` holds pairs of sizes asked for and sizes that worked instead."""
    recipe = probe.recipe
    assert recipe is not None
    asked = _without_batch(shape, recipe.sizes)
    yield from (worked for before, worked in found if before == asked)
    names = [v for v, kind in shape.variables.items() if kind != "past"]
    options = [_options(recipe.sizes[v], shape.variables[v]) for v in names]
    # Whole variables and single dimensions take turns: either may be what is wrong.
    whole = _near_first(names, options)
    single = _near_first(*_single_dimensions(shape, recipe.sizes))
    tries = _in_turns(whole, single)
    others = [worked for before, worked in found if before != asked]
    if others:
        # A probe that asks for a second size gets another one than the first had, where the model has two.
        for sizes in itertools.islice(tries, MOST_TRIES // 4):
            if _without_batch(shape, {**recipe.sizes, **sizes}) not in [{**asked, **worked} for worked in others]:
                yield sizes
        yield from others
    yield from tries


def _in_turns(first: Iterator[dict[str, int]], second: Iterator[dict[str, int]]) -> Iterator[dict[str, int]]:
    while some := [*itertools.islice(first, 10), *itertools.islice(second, 10)]:
        yield from some


def _options(size: int, kind: Kind) -> list[int]:
    return list(dict.fromkeys((size, *_CANDIDATES[kind])))


def _single_dimensions(shape: Signature, sizes: dict[str, int]) -> tuple[list[str], list[list[int]]]:
    """Dimensions that share a variable with others, each to be sized for itself."""
    places: dict[str, list[str]] = {}
    for item in shape.inputs:
        for axis, dim in enumerate(item.dims):
            variable = dim if isinstance(dim, str) else None
            if variable is not None:
                places.setdefault(variable, []).append(f"{item.name}[{axis}]")
            elif not isinstance(dim, int) and dim is not None:
                places.setdefault(f"{item.name}[{axis}]", []).append(f"{item.name}[{axis}]")
    names: list[str] = []
    options: list[list[int]] = []
    for variable, where in places.items():
        if variable in shape.variables:
            kind, own = shape.variables[variable], sizes[variable]
            where = where[1:]
        else:  # a dimension given by an expression: it may really be one of its parts
            item = next(i for i in shape.inputs if variable.rpartition("[")[0] == i.name)
            own, kind = item.shape(sizes)[int(variable.rpartition("[")[2].rstrip("]"))], "sequence"
        for place in where:
            if kind == "batch" and not place.endswith("[0]"):
                kind = "free"
            names.append(place)
            options.append(list(dict.fromkeys((own, *sorted(set(sizes.values())), *_CANDIDATES[kind]))))
    # A cache of 30 layers has 60 such dimensions; combinations of so many lead nowhere.
    return names[:8], options[:8]


def _near_first(names: list[str], options: list[list[int]]) -> Iterator[dict[str, int]]:
    """All combinations, those with the fewest steps away from the first options before others."""
    for distance in range(1, sum(len(o) - 1 for o in options) + 1):
        for steps in _splits(distance, [len(o) - 1 for o in options]):
            yield {name: option[step] for name, option, step in zip(names, options, steps, strict=True)}


def _splits(total: int, limits: list[int]) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of numbers up to `limits`."""
    if not limits:
        if total == 0:
            yield ()
        return
    for first in range(min(total, limits[0]), -1, -1):
        for rest in _splits(total - first, limits[1:]):
            yield (first, *rest)
