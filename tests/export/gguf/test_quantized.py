"""The grids of GGUF's types: integers, scales and offsets give the dequantized weights again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.export
gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")

from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf_files import blocks  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from graphopt.export.gguf import quantized  # noqa: E402
from graphopt.export.gguf.quantized import GRIDS, Rows  # noqa: E402
from graphopt.export.gguf.reader import StoredTensor, read  # noqa: E402


def stored(path: Path, kind: str, rows: int = 24, columns: int = 512, seed: int = 0) -> StoredTensor:
    """A matrix of random blocks."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("w", blocks(Type[kind], rows, columns, seed), raw_dtype=Type[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read(path).tensors["w"]


def unpacked(rows: Rows) -> np.ndarray:
    """The weights that the integer operators compute with, in double precision."""
    grid = rows.grid
    numbers = rows.integers("q").numpy()
    assert numbers.dtype == np.uint8
    assert numbers.shape == (rows.count, rows.length // grid.block, grid.block * grid.bits // 8)
    if grid.bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1).reshape(*numbers.shape[:2], -1)
    scales = rows.scales("s").numpy().astype(np.float64)[..., None]
    weights = scales * (numbers.astype(np.float64) - 2 ** (grid.bits - 1))
    minimums = rows.minimums("m")
    if minimums is not None:
        weights += grid.middle * scales + minimums.numpy().astype(np.float64)[..., None]
    return weights.reshape(rows.count, rows.length)


@pytest.mark.parametrize("kind", GRIDS)
def test_the_grid_gives_the_dequantized_weights(tmp_path: Path, kind: str) -> None:
    matrix = stored(tmp_path / "m.gguf", kind)
    expected = matrix.values().astype(np.float64)
    found = unpacked(Rows(((matrix, np.arange(24)),)))
    # Only the sum s·q + m is rounded, and by the dequantization alone.
    assert (np.abs(found - expected) <= np.spacing(np.abs(expected).max(), dtype=np.float32)).all()
    if GRIDS[kind].minimums is None:
        assert np.array_equal(found, expected)


@settings(max_examples=25, deadline=None)
@given(kind=st.sampled_from(sorted(GRIDS)), seed=st.integers(0, 99), data=st.data())
def test_any_rows_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, kind: str, seed: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    first, second = (stored(folder / f"{i}.gguf", kind, seed=seed + i) for i in range(2))
    chosen = [np.array(data.draw(st.lists(st.integers(0, 23), min_size=1, max_size=24)), np.int64) for _ in range(2)]
    rows = Rows(((first, chosen[0]), (second, chosen[1])))
    expected = np.concatenate([first.values()[chosen[0]], second.values()[chosen[1]]])
    assert np.allclose(unpacked(rows), expected, rtol=0, atol=1e-7 * np.abs(expected).max())


def test_every_integer_of_q8_0_is_kept(tmp_path: Path) -> None:
    matrix = stored(tmp_path / "m.gguf", "Q8_0", rows=64)
    signed = matrix.blocks().reshape(-1, 34)[:, 2:].view(np.int8)
    assert set(signed.ravel()) == set(range(-128, 128))
    numbers = Rows(((matrix, np.arange(64)),)).integers("q").numpy()
    assert np.array_equal(numbers.ravel().astype(int) - 128, signed.ravel())


def test_runs_of_rows_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows(((stored(tmp_path / "m.gguf", "Q4_1"), np.arange(3, 20)),))
    whole = rows.integers("q").numpy()
    monkeypatch.setattr(quantized, "CHUNK_BYTES", 5 * 4 * 512)
    assert np.array_equal(rows.integers("q").numpy(), whole)
