"""The algebra of convolution windows against convolutions written out, on thousands of geometries of one axis."""

from __future__ import annotations

import itertools
import random

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.analysis.windows import Window, merged, window_of
from graphopt.passes.fold.kernels import Kernel, added, composed

RNG = np.random.default_rng(0)


def written_out(x: np.ndarray, weights: np.ndarray, window: Window) -> np.ndarray:
    (stride,), (dilation,) = window.strides, window.dilations
    padded = np.concatenate([np.zeros(window.begin), x, np.zeros(window.end)])
    count = (len(padded) - window.reach[0] - 1) // stride + 1
    taps = range(len(weights))
    return np.array([sum(weights[a] * padded[stride * o + dilation * a] for a in taps) for o in range(count)])


def fits(size: int, window: Window) -> bool:
    return size + window.begin[0] + window.end[0] > window.reach[0]


def kernel(weights: np.ndarray, window: Window) -> Kernel:
    return Kernel((1, 1, len(weights)), 1, window, ir.DataType.DOUBLE, lambda: weights.reshape(1, 1, -1))


def window(kernel_size: int, stride: int, dilation: int, begin: int, end: int) -> Window:
    return Window((kernel_size,), (stride,), (dilation,), (begin,), (end,))


FIRST = list(itertools.product(range(1, 4), range(1, 4), range(1, 3), range(4), range(4)))
SECOND = list(itertools.product(range(1, 4), range(1, 3), range(1, 3), range(3), range(3)))


def test_composed_windows() -> None:
    picks = random.Random(0)
    refused_rightly = taken = 0
    for _ in range(4000):
        first, second, size = window(*picks.choice(FIRST)), window(*picks.choice(SECOND)), picks.randrange(1, 9)
        v, w, x = (RNG.normal(size=n) for n in (first.kernel[0], second.kernel[0], size))
        if not fits(size, first) or not fits(len(h := written_out(x, v, first)), second):
            continue
        both = first.then(second)
        expected = written_out(h, w, second)
        got = written_out(x, composed(kernel(v, first), kernel(w, second)).numbers()[0, 0], both)
        assert len(got) == len(expected) == both.outputs([size])[0]
        equal = np.allclose(got, expected, atol=1e-12)
        for known in (size, None):
            if not second.padded or first.zero_outside(second, [known]):
                assert equal, (first, second, known)
                taken += 1
        refused_rightly += not equal
    assert taken > 1000
    assert refused_rightly > 300


def test_merged_windows() -> None:
    picks = random.Random(0)
    taken = 0
    for _ in range(6000):
        stride, size = picks.randrange(1, 3), picks.randrange(1, 9)
        one, two = (
            window(picks.randrange(1, 5), stride, *(picks.randrange(1, 3), *picks.choices(range(4), k=2))) for _ in "ab"
        )
        if not fits(size, one) or not fits(size, two):
            continue
        v, w, x = (RNG.normal(size=n) for n in (one.kernel[0], two.kernel[0], size))
        parts = written_out(x, v, one), written_out(x, w, two)
        for known in (size, None):
            both = merged([one, two], [known])
            if both is None:
                assert known is None or len(parts[0]) != len(parts[1])
                continue
            numbers = added([kernel(v, one), kernel(w, two)], both).numbers()[0, 0]
            np.testing.assert_allclose(written_out(x, numbers, both), parts[0] + parts[1], atol=1e-12)
            taken += 1
    assert taken > 500


def conv(**attributes: object) -> ir.Node:
    return ir.node("Conv", [ir.Value(name="x"), ir.Value(name="w")], attributes, name="c")


def test_padding_by_the_size() -> None:
    """ONNX: the output has ⌈L / s⌉ positions; an odd zero goes to the end for SAME_UPPER, to the beginning for LOWER."""
    for size, stride, taps in itertools.product(range(1, 9), range(1, 4), range(1, 5)):
        for mode in ("SAME_UPPER", "SAME_LOWER"):
            found = window_of(conv(auto_pad=mode, strides=[stride]), [taps], lambda size=size: [size])
            assert isinstance(found, Window)
            assert found.outputs([size]) == (-(-size // stride),)
            odd = found.end[0] - found.begin[0]
            assert odd in ((0, 1) if mode == "SAME_UPPER" else (0, -1))
            if stride == 1:
                assert window_of(conv(auto_pad=mode), [taps], lambda: None) == found


@pytest.mark.parametrize(
    "attributes",
    [
        {"pads": [1]},
        {"pads": [-1, 0]},
        {"strides": [0]},
        {"strides": [1, 1]},
        {"dilations": [0]},
        {"kernel_shape": [2]},
    ],
)
def test_attributes_that_do_not_fit(attributes: dict[str, list[int]]) -> None:
    assert "don't fit" in str(window_of(conv(**attributes), [3], lambda: None))
