"""Tensors computed piece by piece, and transposed so."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from graphopt.graph import streamed
from graphopt.graph.load import MappedTensor
from graphopt.graph.streamed import StreamedTensor, contiguous, transposed


def test_pieces_make_up_the_tensor_each_time(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(4, 6)
    read = 0

    def blocks():
        nonlocal read
        read += 1
        yield whole[:1]
        yield whole[1:].T.copy().T  # Not contiguous.

    tensor = StreamedTensor(blocks, ir.DataType.FLOAT, ir.Shape((4, 6)), "x")
    assert read == 0
    assert np.array_equal(tensor.numpy(), whole)
    assert tensor.tobytes() == whole.tobytes()
    with (tmp_path / "out").open("wb") as out:
        out.write(b"ab")
        tensor.tofile(out)
        out.write(b"yz")
    assert (tmp_path / "out").read_bytes() == b"ab" + whole.tobytes() + b"yz"
    buffer = io.BytesIO()
    tensor.tofile(buffer)
    assert buffer.getvalue() == whole.tobytes()
    assert read == 4


def test_a_tensor_without_elements() -> None:
    for pieces in ([], [np.empty(0, np.float32)]):
        tensor = StreamedTensor(lambda pieces=pieces: iter(pieces), ir.DataType.FLOAT, ir.Shape((0, 3)), "x")
        assert tensor.numpy().shape == (0, 3)
        assert tensor.tobytes() == b""


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_transposed_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[int, ...], piece: int
) -> None:
    monkeypatch.setattr(streamed, "PIECE_ELEMENTS", piece)
    array = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    (tmp_path / "f").write_bytes(b"xx" + array.tobytes())
    stored = MappedTensor("f", 2, 120, ir.DataType.INT16, shape=ir.Shape((3, 4, 5)), name="x", base_dir=tmp_path)
    tensor = transposed(stored, order)
    assert isinstance(tensor, StreamedTensor)
    assert tuple(tensor.shape.numpy()) == array.transpose(order).shape
    assert np.array_equal(tensor.numpy(), array.transpose(order))
    assert tensor.tobytes() == array.transpose(order).tobytes()
    rows = max(1, piece // (60 // array.shape[order[0]]))
    assert all(block.shape[0] <= rows for block in tensor.blocks())
    back = transposed(tensor, np.argsort(order).tolist())
    assert np.array_equal(back.numpy(), array)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.complex128, np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(), (7,), (5, 7), (1, 6), (6, 1), (3, 5, 4), (2, 1, 3, 4), (0, 3)])
def test_contiguous_as_numpy_makes_it(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], dtype: type) -> None:
    monkeypatch.setattr(streamed, "TILE", 3)
    array = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    for order in itertools.permutations(range(len(shape))):
        for view in (array.transpose(order), array.transpose(order)[::-1] if shape else array):
            found = contiguous(view)
            assert found.flags.c_contiguous
            assert found.dtype == view.dtype
            assert np.array_equal(found, view)


def test_transposed_four_bit_numbers_stay_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "PIECE_ELEMENTS", 3)
    array = np.arange(15).reshape(3, 5) % 8
    tensor = transposed(ir.Tensor(array.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4), (1, 0))
    expected = ir.Tensor(array.T.astype(ir.DataType.INT4.numpy()), dtype=ir.DataType.INT4)
    buffer = io.BytesIO()
    tensor.tofile(buffer)
    assert buffer.getvalue() == expected.tobytes()


def test_transposed_in_its_own_way() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    asked = []

    def moved(order):
        asked.append(order)
        return ir.Tensor(array.T.copy())

    tensor = StreamedTensor(lambda: iter((array,)), ir.DataType.FLOAT, ir.Shape((2, 3)), moved=moved)
    assert np.array_equal(transposed(tensor, [1, 0]).numpy(), array.T)
    assert asked == [(1, 0)]
