"""Equal contents are found without reading more than needed, and never wrongly."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.graph.computed import computed, identity, origin_of
from graphopt.graph.content import same_content, sample


@settings(max_examples=60, deadline=None, derandomize=True)
@given(size=st.sampled_from([0, 1, 5, 8192, 8193, 50_000]), change=st.integers(0, 49_999))
def test_one_byte_is_seen(size: int, change: int) -> None:
    a = np.random.default_rng(0).integers(0, 255, size, np.uint8)
    b = a.copy()
    assert same_content(ir.tensor(a), ir.tensor(b))
    assert sample(ir.tensor(a)) == sample(ir.tensor(b))
    if size:
        b[change % size] ^= 1
        assert not same_content(ir.tensor(a), ir.tensor(b))


def test_bits_and_not_numbers() -> None:
    nan, zero = np.array([np.nan], np.float32), np.zeros(1, np.float32)
    assert same_content(ir.tensor(nan), ir.tensor(nan.copy()))
    assert not same_content(ir.tensor(zero), ir.tensor(-zero))
    half = np.ones(3, ml_dtypes.bfloat16)
    assert same_content(ir.tensor(half), ir.tensor(half.copy()))
    assert sample(ir.tensor(np.float32(1))) != sample(ir.tensor(np.float32(2)))


def test_files_are_compared_block_by_block(tmp_path: Path) -> None:
    size = 1 << 25
    for name in "ab":
        np.full(size, 7, np.uint8).tofile(tmp_path / name)
    a, b = (
        ir.ExternalTensor(name, 0, size, ir.DataType.UINT8, shape=ir.Shape([size]), name=name, base_dir=tmp_path)
        for name in "ab"
    )
    tracemalloc.start()
    assert same_content(a, b)
    assert sample(a) == sample(b)
    assert tracemalloc.get_traced_memory()[1] < size // 8
    tracemalloc.stop()
    assert identity(a) != identity(b)
    assert same_content(a, a)


def test_computed_tensors_are_equal_by_origin() -> None:
    source = ir.tensor(np.ones(100_000, np.float32))

    def make(factor: float, origin: bool = True) -> ir.LazyTensor:
        def compute() -> ir.TensorProtocol:
            raise AssertionError("nothing is computed to compare")

        note = ("times", factor, identity(source)) if origin else None
        return computed(compute, ir.DataType.FLOAT, (100_000,), origin=note)

    assert same_content(make(2.0), make(2.0))
    assert sample(make(2.0)) == sample(make(2.0))
    assert not same_content(make(2.0), make(3.0))
    unknown = make(2.0, origin=False)
    assert origin_of(unknown) is None
    assert not same_content(unknown, make(2.0, origin=False))
    assert same_content(unknown, unknown)
    assert not same_content(make(2.0), source)
    assert identity(make(2.0)) == identity(make(2.0))
    assert identity(ir.tensor(np.ones(3))) == identity(ir.tensor(np.ones(3)))
    assert identity(source) != identity(ir.tensor(np.ones(100_000, np.float32)))
