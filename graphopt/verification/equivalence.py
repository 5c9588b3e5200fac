"""Whether two models are equal: the same interface, and the same outputs on probe inputs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import VerificationError
from graphopt.graph.assumptions import carried
from graphopt.graph.equal_caches import as_if_equal, merged_since, with_copies
from graphopt.graph.importance import importance_names
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.kv_names import original_names, restore_names
from graphopt.graph.load import load
from graphopt.verification.probes import load_probes, make_probes
from graphopt.verification.verdict import Verdict
from graphopt.verification.verifier import Verifier


def verify(
    path_a: ir.Model | str | os.PathLike[str],
    path_b: ir.Model | str | os.PathLike[str],
    inputs: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    bitwise: bool = False,
    threads: int | None = None,
) -> Verdict:
    """Compare two models, where what they take for granted (`graphopt.graph.assumptions`) holds.

    Args:
        path_a: The original, or its file; its signature gives the probes.
        path_b: The candidate, with the same inputs and outputs.
        inputs: An array for each input, or an .npz file of them, in place of probes made from the signature.
        seed: Seed of the probes.
        bitwise: See `Verifier.check`.
        threads: Threads within an operator; None leaves it to ONNX Runtime.

    Raises:
        VerificationError: The signatures differ, or ONNX Runtime doesn't run the original.
        ModelError: A file is missing or broken.
        InputDataError: `inputs` doesn't fit the model.
    """
    a, b = (m if isinstance(m, ir.Model) else load(m) for m in (path_a, path_b))
    # A decoder that was given other names is still compared with what it was made from.
    if _ends(a) != _ends(b):
        if original_names(a):
            path_a = a = _with_names_of_before(a)
        if original_names(b):
            path_b = b = _with_names_of_before(b)
    # Caches that one of them keeps once are equal in the other.
    once = merged_since(b, _ends(a))
    if not once and (equal := merged_since(a, _ends(b))):
        path_a, path_b = a, b = with_copies(a, equal), as_if_equal(b, equal)
    told = {name for model in (a, b) for name in importance_names(model.metadata_props)}
    for kind, ours, theirs in (("input", a.graph.inputs, b.graph.inputs), ("output", a.graph.outputs, b.graph.outputs)):
        first, second = {v.name: v for v in ours}, {v.name: v for v in theirs}
        for name in [*first, *second]:
            if name in told or name in once:  # what was added for whoever drops tokens from a cache, or is there still
                continue
            if name not in first or name not in second:
                lacking, other = (path_b, path_a) if name in first else (path_a, path_b)
                raise VerificationError(
                    f"The models can't be compared: {_label(lacking)} has no {kind} {name!r}, "
                    f"which {_label(other)} has.{_of_caches(name, a, b)}"
                )
            if first[name].type is not None and second[name].type is not None and first[name].type != second[name].type:
                raise VerificationError(
                    f"The models can't be compared: {kind} {name!r} is {first[name].type} in {_label(path_a)} "
                    f"and {second[name].type} in {_label(path_b)}."
                )
    inputs_b = {value.name: value for value in b.graph.inputs}
    for value in a.graph.inputs:
        same = inputs_b.get(value.name)
        if same is not None and _apart(value.shape, same.shape):
            raise VerificationError(
                f"The models can't be compared: input {value.name!r} is {_sizes(value)} in {_label(path_a)} and "
                f"{_sizes(same)} in {_label(path_b)}."
            )
    if told & {v.name for v in a.graph.outputs} - {v.name for v in b.graph.outputs}:
        path_a = a = a.clone()
        a.graph.outputs[:] = [v for v in a.graph.outputs if v.name not in told]
    known = carried(a) | carried(b)
    probes = load_probes(inputs, a) if inputs is not None else make_probes(a, seed, assumptions=known)
    verifier = Verifier(path_a, probes, seed=seed, threads=threads)
    try:
        return verifier.check(path_b, bitwise)
    finally:
        verifier.close()


def _of_caches(name: str | None, a: ir.Model, b: ir.Model) -> str:
    """What to do with two decoders that keep their pasts differently, as a sentence, where `name` is of a cache; else
    nothing."""
    known = [kv_interface(model) for model in (a, b)]
    pairs = [() if interface is None else interface.pairs for interface in known]
    if not all(pairs) or not any(name in (pair.past, pair.present) for ours in pairs for pair in ours):
        return ""
    return " Their caches differ, and with them what is right: judge the text that they predict (--quality)."


def _apart(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Whether no array has both shapes."""
    if a is None or b is None:
        return False
    both = zip(a, b, strict=False)
    return len(a) != len(b) or any(isinstance(m, int) and isinstance(n, int) and m != n for m, n in both)


def _sizes(value: ir.Value) -> str:
    return f"[{', '.join(str(size) for size in value.shape or ())}]"


def _ends(model: ir.Model) -> set[str | None]:
    return {v.name for v in (*model.graph.inputs, *model.graph.outputs)}


def _with_names_of_before(model: ir.Model) -> ir.Model:
    copy = model.clone()
    restore_names(copy)
    return copy


def _label(model: ir.Model | str | os.PathLike[str]) -> str:
    return f"the graph {model.graph.name!r}" if isinstance(model, ir.Model) else Path(model).name
