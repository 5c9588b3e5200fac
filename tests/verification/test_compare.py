from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest

from graphopt.verification.compare import TOLERANCES, Tolerance, compare


def one(a, b, **options):
    (result,) = compare([a], [b], ["y"], **options)
    return result


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_tolerance_is_relative_to_the_largest_element(dtype) -> None:
    tolerance = TOLERANCES[np.dtype(dtype).name]
    reference = np.array([100.0, 0.0, -3.0])
    inside, outside = reference.copy(), reference.copy()
    inside[1] += 50 * tolerance.absolute
    outside[1] += 300 * tolerance.absolute
    if dtype in (np.float64, np.float32):
        assert one(reference.astype(dtype), inside.astype(dtype)).margin == pytest.approx(0.5, rel=0.02)
    assert one(reference.astype(dtype), inside.astype(dtype)).ok
    assert not one(reference.astype(dtype), outside.astype(dtype)).ok


def test_margin_and_reason() -> None:
    result = one(np.float32([1, 2]), np.float32([1, 2.1]))
    assert not result.ok
    assert result.max_abs == pytest.approx(0.1, rel=1e-4)
    assert result.max_rel == pytest.approx(0.05, rel=1e-4)
    assert result.margin == pytest.approx(250, rel=0.01)
    assert "5.0e-02 of its largest magnitude 2" in result.reason


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_at_the_same_places(special) -> None:
    a = np.float32([1, special, 3])
    assert one(a, a.copy()).ok
    assert not one(a, np.float32([1, 2, 3])).ok
    assert not one(np.float32([1, 2, 3]), a).ok
    result = one(a, np.float32([special, 1, 3]))
    assert not result.ok
    assert "at 2 places" in result.reason


def test_sign_of_infinity() -> None:
    assert not one(np.float32([np.inf]), np.float32([-np.inf])).ok
    assert not one(np.float32([np.nan]), np.float32([-np.inf])).ok


def test_infinite_elements_do_not_set_the_scale() -> None:
    assert not one(np.float32([np.inf, 1]), np.float32([np.inf, 1.01])).ok


def test_shape_and_dtype() -> None:
    assert "shape [3] instead of [1, 3]" in one(np.zeros((1, 3)), np.zeros(3)).reason
    assert "dtype float64 instead of float32" in one(np.zeros(3, np.float32), np.zeros(3)).reason


def test_integers_bools_and_strings_are_exact() -> None:
    big = np.int64([2**62, 1])
    assert one(big, big.copy()).ok
    assert not one(big, np.int64([2**62 + 1, 1])).ok
    result = one(np.int32([1, 2, 9]), np.int32([1, 2, 5]))
    assert not result.ok
    assert result.max_abs == 4
    assert not one(np.array([True]), np.array([False])).ok
    assert one(np.array(["a", "b"], object), np.array(["a", "b"], object)).ok
    assert "differs in 1 of 2" in one(np.array(["a", "b"], object), np.array(["a", "c"], object)).reason


def test_bitwise() -> None:
    a = np.float32([1, np.nan, 0])
    assert one(a, a.copy(), bitwise=True).ok
    almost = a.copy()
    almost[0] = np.nextafter(almost[0], np.float32(2))
    assert one(a, almost).ok
    assert not one(a, almost, bitwise=True).ok
    assert not one(np.float32([0.0]), np.float32([-0.0]), bitwise=True).ok
    assert not one(a, np.float32([1, 2, 0]), bitwise=True).ok


def test_zeros_and_the_floor() -> None:
    zeros = np.zeros(3, np.float32)
    assert one(zeros, zeros.copy()).ok
    assert one(zeros, zeros + np.float32(1e-7)).ok
    assert not one(zeros, zeros + np.float32(1e-5)).ok
    assert one(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32)).ok


def test_sequences_maps_and_optionals() -> None:
    a = [np.float32([1]), np.float32([2, 3])]
    assert all(c.ok for c in compare([a], [[x.copy() for x in a]], ["s"]))
    assert [c.name for c in compare([a], [a], ["s"])] == ["s[0]", "s[1]"]
    assert "2 elements instead of" not in one(a, a[:1]).reason
    assert "1 elements instead of 2" in one(a, a[:1]).reason
    (result,) = compare([[{"k": 1.0}]], [[{"k": 1.0}]], ["m"])
    assert result.name == "m[0]['k']"
    assert result.ok
    assert not one({"k": np.float32(1)}, {"j": np.float32(1)}).ok
    assert compare([None], [None], ["o"]) == []
    assert not one(np.float32(1), None).ok


def test_own_tolerance_by_name() -> None:
    a, b = np.float32([1.0]), np.float32([1.005])
    assert not one(a, b).ok
    assert one(a, b, tolerances={"y": Tolerance(1e-2, 0)}).ok
    assert not one(np.int32([1]), np.int32([2]), tolerances={"y": Tolerance(10, 10)}).ok


def test_complex() -> None:
    a = np.complex64([1 + 2j])
    assert one(a, a.copy()).ok
    assert not one(a, np.complex64([1 + 2.1j])).ok


def test_json() -> None:
    text = json.dumps(one(np.zeros(2), np.zeros(3)).to_dict(), allow_nan=False)
    assert json.loads(text)["max_abs"] is None
