"""The generator of large models: what it writes is valid, runs, and has the size asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "make_large_model.py"


def make(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_chain(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    assert make("--chain", 100, "--output", tmp_path / "c.onnx").returncode == 0
    assert os.listdir(tmp_path) == ["c.onnx"]
    model = onnx.load(tmp_path / "c.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert len(model.graph.node) == 100
    x = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    out = ort.InferenceSession(tmp_path / "c.onnx").run(None, {"input": x})[0]
    assert np.isfinite(out).all()


def test_transformer_of_a_size(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    assert make("--bytes", 2e6, "--hidden", 64, "--output", tmp_path / "m.onnx").returncode == 0
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)
    model = onnx.load(tmp_path / "m.onnx")
    weights = sum(4 * int(np.prod(t.dims)) for t in model.graph.initializer)
    assert abs(weights - 2e6) < 48 * 64 * 64
    x = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    out = ort.InferenceSession(tmp_path / "m.onnx").run(None, {"hidden_in": x})[0]
    assert out.shape == x.shape
    assert np.isfinite(out).all()


def test_wrong_sizes() -> None:
    assert "must be positive" in make("--chain", 0, "--output", "x").stderr
    assert "multiple of 64" in make("--bytes", 1, "--hidden", 100, "--output", "x").stderr
