"""Activations between pieces, in memory and in files."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from graphopt.calibration.carried import Carried

ARRAYS = {
    "float": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.linspace(0, 1, 6, dtype=np.float16).reshape(1, 6),
    "bfloat": np.linspace(-3, 3, 8).astype(ml_dtypes.bfloat16).reshape(2, 4),
    "bool": np.asarray([[True, False]]),
    "whole": np.arange(5),
    "turned": np.arange(12, dtype=np.float64).reshape(3, 4).T,
    "number": np.asarray(3.5),
    "empty": np.zeros((1, 2, 0, 4), np.float32),
    "text": np.asarray(["a", "bc"], dtype=object),
}


@pytest.mark.parametrize("budget", [0, 60, 1 << 20])
def test_what_is_kept_comes_back(budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    carried = Carried(budget)
    for sample in range(2):
        for name, array in ARRAYS.items():
            carried.put(sample, name, array if array.dtype == object else array + array.dtype.type(sample))
    for sample in (1, 0):
        for name, array in ARRAYS.items():
            found = carried.get(sample, name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            expected = array if array.dtype == object else array + array.dtype.type(sample)
            np.testing.assert_array_equal(found, expected)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert bool(files) == (budget < 1 << 20)
    total = 2 * sum(array.nbytes for array in ARRAYS.values())
    assert carried.peak_bytes == total
    carried.put(0, "float", ARRAYS["float"] * 2)
    np.testing.assert_array_equal(carried.get(0, "float"), ARRAYS["float"] * 2)
    carried.keep(0, {"float"})
    assert carried.names(0) == ["float"]
    assert len(carried.names(1)) == len(ARRAYS)
    carried.drop(0, "unknown")
    assert carried.peak_bytes == total
    carried.close()
    assert not list(tmp_path.iterdir())
    assert carried.names(1) == []
