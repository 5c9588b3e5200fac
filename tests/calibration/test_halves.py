"""A second moment of halves of the samples."""

from __future__ import annotations

import numpy as np

from graphopt.calibration.halves import HALVES, HalvedMoment
from graphopt.calibration.statistics import SecondMoment


def test_samples_take_turns_and_all_are_the_whole() -> None:
    rng = np.random.default_rng(0)
    samples = [rng.normal(size=(rows, 5)).astype(np.float32) for rows in (3, 7, 4)]
    halved, whole = HalvedMoment().accumulator(), SecondMoment().accumulator()
    for sample in samples:
        halved.add(sample)
        whole.add(sample)
    found = halved.summary()
    np.testing.assert_allclose(found.array, whole.summary().array, rtol=1e-5, atol=1e-6)
    assert found["rows"].tolist() == [7, 7]
    even, odd = (found[name] for name in HALVES)
    np.testing.assert_allclose(odd, samples[1].T @ samples[1] / 7, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose((even + odd) / 2, found.array, rtol=1e-4, atol=1e-6)


def test_one_sample_has_no_halves() -> None:
    halved = HalvedMoment().accumulator()
    assert not halved.summary().arrays
    halved.add(np.eye(3, dtype=np.float32))
    assert list(halved.summary().arrays) == ["second_moment"]
