from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from graphopt.errors import UsageError, VerificationError
from graphopt.verification.timing import benchmark


@pytest.fixture
def models(tmp_path):
    paths = []
    for name, count in (("one", 1), ("many", 12)):
        body = " ".join(f"v{i + 1} = MatMul(v{i}, v0)" for i in range(count))
        text = f'<ir_version: 8, opset_import: ["": 17]> g (float[n, n] v0) => (float[n, n] v{count}) {{ {body} }}'
        paths.append(tmp_path / f"{name}.onnx")
        onnx.save(onnx.parser.parse_model(text), paths[-1])
    return paths


def test_ratios_are_to_the_first_and_the_control_is_the_first_again(models) -> None:
    feeds = {"v0": np.full((160, 160), 1e-3, np.float32)}
    result = benchmark(models, feeds, runs=7, warmup=1, threads=1, min_round_ms=1)
    one, many = result.models
    assert one.wall_ratio.median == one.cpu_ratio.median == 1
    # Twelve times the work; the machine may be busy.
    assert many.cpu_ratio.median > 4
    assert many.wall_ratio.low <= many.wall_ratio.median <= many.wall_ratio.high
    assert 0.4 < result.control.cpu_ratio.median < 2.5
    assert result.control.name.endswith("(control)")
    data = json.loads(json.dumps(result.to_dict()))
    assert data["runs"] == 7
    assert data["feeds"] == {"v0": [160, 160]}


def test_short_runs_are_repeated_within_a_round(models) -> None:
    result = benchmark(models[:1], {"v0": np.ones((2, 2), np.float32)}, runs=3, warmup=0, min_round_ms=2)
    assert result.calls > 1
    assert result.models[0].wall_ms < 2


def test_bad_requests(models) -> None:
    feeds = {"v0": np.ones((2, 2), np.float32)}
    with pytest.raises(UsageError):
        benchmark([], feeds)
    with pytest.raises(UsageError):
        benchmark(models, feeds, runs=0)
    with pytest.raises(VerificationError, match=r"one.onnx doesn't run on the given inputs"):
        benchmark(models, {"v0": np.ones((2, 2))})
