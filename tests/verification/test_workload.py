"""Timing on a typical workload: decoders whose caches differ, and what can't be compared."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import tiny_decoders

from graphopt.api import canonical, optimize, verify
from graphopt.errors import VerificationError
from graphopt.graph.save import save
from graphopt.verification.workload import benchmark_models


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A decoder, and the same one with a quantized cache."""
    model = ir.from_proto(tiny_decoders.decoder("attention", layers=2))
    assert canonical(model) is model
    recipe = {"passes": [{"quantize-kv": {"block_size": 8, "window": 4}}]}
    assume = ("no-left-padding", "no-batched-chunks", "counted-positions")
    paths = [tmp_path_factory.mktemp("decoders") / name for name in ("plain.onnx", "quantized.onnx")]
    save(model, paths[0])
    save(optimize(model.clone(), recipe, verify="none", assume=assume).model, paths[1])
    return paths


def test_a_cache_of_another_kind_is_an_empty_one(decoders: list[Path]) -> None:
    plain, quantized = benchmark_models(decoders, runs=3, threads=1).models
    assert plain.cpu_ratio.median == 1
    assert quantized.cpu_ratio.median > 0


def test_tokens_in_a_cache_of_another_kind_cannot_be_fed(decoders: list[Path]) -> None:
    with pytest.raises(VerificationError, match="--generate"):
        benchmark_models(decoders, dims={"past": 3}, runs=3)


def test_an_input_that_the_first_model_lacks_is_named(tmp_path: Path) -> None:
    paths = []
    for name, more in (("one", ""), ("two", ", float[n] scale")):
        text = f'<ir_version: 8, opset_import: ["": 17]> g (float[n] x{more}) => (float[n] y) {{ y = Neg(x) }}'
        paths.append(tmp_path / f"{name}.onnx")
        onnx.save(onnx.parser.parse_model(text), paths[-1])
    with pytest.raises(VerificationError, match="it has scale besides"):
        benchmark_models(paths, runs=3)


def test_only_caches_are_said_to_differ(decoders: list[Path], tmp_path: Path) -> None:
    other = ir.load(decoders[0]).clone()
    ids = next(value for value in other.graph.inputs if value.name == "input_ids")
    ids.name = "tokens"
    save(other, tmp_path / "other.onnx")
    with pytest.raises(VerificationError) as told:
        verify(decoders[0], tmp_path / "other.onnx")
    assert "--quality" not in str(told.value)
    with pytest.raises(VerificationError, match="--quality"):
        verify(decoders[0], decoders[1])
