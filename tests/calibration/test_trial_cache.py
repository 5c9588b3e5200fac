"""What trials gave, kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from exactness import parse_weighted

from graphopt.calibration.cache import TrialCache

MODEL = (
    '<ir_version: 10, opset_import: ["": 21]> g (float[n, 8] x) => (float[n, 8] y) <float[8, 8] w> { y = MatMul(x, w) }'
)


def model(seed: int = 0) -> ir.Model:
    return parse_weighted(MODEL, seed)


def test_each_trial_is_there_as_soon_as_it_is_made(tmp_path: Path) -> None:
    first = TrialCache(tmp_path, model(), "data")
    assert first.load("a") is None
    for number, name in enumerate("ab"):
        first.save(name, np.array([number, 0.1]))
        np.testing.assert_array_equal(TrialCache(tmp_path, model(), "data").load(name), [number, 0.1])
    assert TrialCache(tmp_path, model(), "data").load("c") is None
    assert len(list(tmp_path.iterdir())) == 1


def test_other_data_or_weights_have_trials_of_their_own(tmp_path: Path) -> None:
    TrialCache(tmp_path, model(), "data").save("a", np.ones(2))
    assert TrialCache(tmp_path, model(), "other").load("a") is None
    assert TrialCache(tmp_path, model(1), "data").load("a") is None


def test_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    cache = TrialCache(tmp_path, model(), "data")
    cache.save("a", np.ones(2))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    again = TrialCache(tmp_path, model(), "data")
    assert again.load("a") is None
    again.save("a", np.zeros(2))
    assert TrialCache(tmp_path, model(), "data").load("a") is not None


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    cache = TrialCache(None, model(), "data")
    cache.save("a", np.ones(2))
    assert cache.load("a") is not None
    assert list(tmp_path.iterdir()) == []


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    for seed in range(4):
        TrialCache(tmp_path, model(), str(seed), most_bytes=1).save("a", np.ones(2))
    assert len(list(tmp_path.iterdir())) == 1
    assert TrialCache(tmp_path, model(), "3").load("a") is not None
