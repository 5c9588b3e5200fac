"""Tiny models of many architectures, and what they are given."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from tiny_transformers import cached_feeds, exported, exported_cached, feeds

from graphopt.api import canonical
from graphopt.graph.load import load

DECODERS = ["llama", "gemma", "gemma2", "qwen3", "gpt2", "opt", "neox"]
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


def weight_bytes(model: ir.Model) -> int:
    """Bytes of the initializers."""
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


def assert_same(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=tolerance, atol=tolerance)
