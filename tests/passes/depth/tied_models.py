"""Tiny models of many architectures, what they give, and how to change what is in a layer of theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from tiny_transformers import cached_feeds, exported, exported_cached, feeds

from graphopt.analysis.depth_units import DepthUnits, depth_units
from graphopt.analysis.shapes import infer
from graphopt.api import canonical
from graphopt.graph.edits import Editor
from graphopt.graph.load import load
from graphopt.runtime_ops.memory_session import make_session, run

DECODERS = ["llama", "gemma", "gemma2", "gpt2", "opt", "neox"]
ALL = [*DECODERS, "bert", "vit", "whisper"]


def made(name: str) -> ir.Model:
    """A canonical model; decoders with a cache."""
    exporter = "dynamo" if name == "whisper" else "torchscript"
    model = load(exported_cached(name, exporter) if name in DECODERS else exported(name, exporter))
    canonical(model)
    return model


def given(name: str) -> dict[str, np.ndarray]:
    """Inputs of `made(name)`."""
    return cached_feeds(name) if name in DECODERS else feeds(name)


def units_of(model: ir.Model) -> DepthUnits:
    return depth_units(model, infer(model, believe_names=True))


def silence(model: ir.Model, names: Iterable[str]) -> None:
    """Multiply what some branches add by 0."""
    edit = Editor(model)
    for unit in units_of(model).named(names):
        add = unit.branch.add
        edit.at(add)
        nothing = edit.constant(np.zeros((), dtype=np.float32), "zero")
        add.replace_input_with(1 - unit.branch.operand, edit.op("Mul", [unit.branch.output, nothing]))


def outputs(model: ir.Model, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs of a model by name; inputs that it doesn't have are left out."""
    session = make_session(model.clone(), threads=1)
    names: list[Any] = [output.name for output in session.get_outputs()]
    return dict(zip(names, run(session, arrays), strict=True))


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance)
