"""Headers of GGUF files, dequantization from the formulas of the blocks, and files that are none."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.export
gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")

from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf_files import SCALES, add, blocks, tiny, write  # noqa: E402

from graphopt.errors import ModelError, UsageError  # noqa: E402
from graphopt.export.gguf import reader  # noqa: E402


def simple(path: Path, kind: Type = Type.F32, rows: int = 40, columns: int = 256) -> Path:
    """A file of one matrix."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("llama.list", [1, 2, 3])
    writer.add_bool("llama.flag", True)
    writer.add_float32("llama.rope.freq_base", 0.5)
    array = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    writer.add_tensor(
        "w", blocks(kind, rows, columns) if kind in SCALES else gguf.quantize(array, kind), raw_dtype=kind
    )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, np.float16, 1, at)[0])


def four(block: bytes, at: int) -> list[int]:
    return [b & 15 for b in block[at : at + 16]] + [b >> 4 for b in block[at : at + 16]]


def fifth(block: bytes, at: int) -> list[int]:
    (word,) = struct.unpack_from("<I", block, at)
    return [(word >> i & 1) << 4 for i in range(32)]


def six_bits(packed: bytes, i: int) -> tuple[int, int]:
    """Scale and minimum of one of eight sub-blocks."""
    if i < 4:
        return packed[i] & 63, packed[i + 4] & 63
    return (packed[i + 4] & 15) | (packed[i - 4] >> 6) << 4, (packed[i + 4] >> 4) | (packed[i] >> 6) << 4


def q2_k(b: bytes) -> list[float]:
    d, least, out = half(b, 80), half(b, 82), []
    for sub in range(16):
        begin, shift = 16 + 32 * (sub // 8) + 16 * (sub % 2), 2 * (sub % 8 // 2)
        out += [d * (b[sub] & 15) * (b[begin + i] >> shift & 3) - least * (b[sub] >> 4) for i in range(16)]
    return out


def q3_k(b: bytes) -> list[float]:
    d, out = half(b, 108), []
    for sub in range(16):
        low = b[96 + sub % 8] >> 4 * (sub // 8) & 15
        scale = d * ((low | (b[104 + sub % 4] >> 2 * (sub // 4) & 3) << 4) - 32)
        begin, shift, bit = 32 + 32 * (sub // 8) + 16 * (sub % 2), 2 * (sub % 8 // 2), sub // 2
        out += [
            scale * ((b[begin + i] >> shift & 3) - (0 if b[16 * (sub % 2) + i] >> bit & 1 else 4)) for i in range(16)
        ]
    return out


def q4_k(b: bytes) -> list[float]:
    d, least, out = half(b, 0), half(b, 2), []
    for sub in range(8):
        scale, minimum = six_bits(b[4:16], sub)
        run = b[16 + 32 * (sub // 2) :][:32]
        out += [d * scale * (q >> 4 * (sub % 2) & 15) - least * minimum for q in run]
    return out


def q5_k(b: bytes) -> list[float]:
    d, least, out = half(b, 0), half(b, 2), []
    for sub in range(8):
        scale, minimum = six_bits(b[4:16], sub)
        run = b[48 + 32 * (sub // 2) :][:32]
        values = [(q >> 4 * (sub % 2) & 15) + 16 * (b[16 + i] >> sub & 1) for i, q in enumerate(run)]
        out += [d * scale * q - least * minimum for q in values]
    return out


def q6_k(b: bytes) -> list[float]:
    d, out = half(b, 208), []
    scales = np.frombuffer(b, np.int8, 16, 192)
    for i in range(256):
        part, quarter, lane = i // 128, i % 128 // 32, i % 32
        low = b[64 * part + 32 * (quarter % 2) + lane] >> 4 * (quarter // 2) & 15
        high = b[128 + 32 * part + lane] >> 2 * quarter & 3
        out.append(d * int(scales[i // 16]) * ((low | high << 4) - 32))
    return out


FORMULAS = {
    Type.Q4_0: lambda b: [half(b, 0) * (q - 8) for q in four(b, 2)],
    Type.Q4_1: lambda b: [half(b, 0) * q + half(b, 2) for q in four(b, 4)],
    Type.Q5_0: lambda b: [half(b, 0) * ((q | h) - 16) for q, h in zip(four(b, 6), fifth(b, 2), strict=True)],
    Type.Q5_1: lambda b: [half(b, 0) * (q | h) + half(b, 2) for q, h in zip(four(b, 8), fifth(b, 4), strict=True)],
    Type.Q8_0: lambda b: [half(b, 0) * int(q) for q in np.frombuffer(b, np.int8, 32, 2)],
    Type.Q2_K: q2_k,
    Type.Q3_K: q3_k,
    Type.Q4_K: q4_k,
    Type.Q5_K: q5_k,
    Type.Q6_K: q6_k,
}
"""The values of one block, in double precision."""


@pytest.mark.parametrize("kind", FORMULAS, ids=lambda kind: kind.name)
def test_values_follow_from_the_formula_of_the_block(tmp_path: Path, kind: Type) -> None:
    found = reader.read(simple(tmp_path / "m.gguf", kind)).tensors["w"]
    size, stored = gguf.GGML_QUANT_SIZES[kind]
    assert found.nbytes == 40 * 256 // size * stored
    expected = [v for block in found.blocks().reshape(-1, stored) for v in FORMULAS[kind](block.tobytes())]
    exact = np.reshape(expected, found.shape)
    # Float32 rounds once or twice: of the product and of the sum, whose terms may cancel.
    scale = np.abs(exact).reshape(40, -1, size).max(axis=2).repeat(size, axis=1)
    assert (np.abs(found.values() - exact) <= 4e-7 * scale.reshape(40, 256)).all()


@pytest.mark.parametrize(("kind", "bits"), [(Type.F32, 23), (Type.F16, 10), (Type.BF16, 7)])
def test_floats(tmp_path: Path, kind: Type, bits: int) -> None:
    array = np.random.default_rng(0).normal(size=(40, 256)).astype(np.float32)
    found = reader.read(simple(tmp_path / "m.gguf", kind)).tensors["w"].values()
    assert found.dtype == np.float32
    assert np.allclose(found, array, rtol=2.0 ** -(bits + 1), atol=1e-7)


def test_values_in_runs_of_rows_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = reader.read(simple(tmp_path / "m.gguf", Type.Q4_K)).tensors["w"]
    whole = found.values()
    monkeypatch.setattr(reader, "CHUNK_BYTES", 7 * 4 * 256)
    assert [len(chunk) for chunk in found.chunks()] == [7, 7, 7, 7, 7, 5]
    assert np.array_equal(found.values(), whole)


def test_metadata_without_the_arrays_of_strings(tmp_path: Path) -> None:
    file = reader.read(simple(tmp_path / "m.gguf"))
    assert file.architecture == "llama"
    assert file.of_architecture("list") == [1, 2, 3]
    assert file.of_architecture("flag") is True
    assert file.of_architecture("rope.freq_base") == 0.5
    assert file.of_architecture("none") is None
    assert "tokenizer.ggml.tokens" not in file.metadata


class TestBadInput:
    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"there is no file .*m\.gguf; give a \.gguf file"):
            reader.read(tmp_path / "m.gguf")

    def test_wrong_magic(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"<html>" * 20)
        with pytest.raises(ModelError, match=r"m\.gguf isn't a GGUF file: it doesn't begin with GGUF"):
            reader.read(tmp_path / "m.gguf")

    def test_empty(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"")
        with pytest.raises(ModelError, match="isn't a GGUF file"):
            reader.read(tmp_path / "m.gguf")

    @pytest.mark.parametrize("version", [1, 7, 3 << 24])
    def test_unknown_version(self, tmp_path: Path, version: int) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", version, 0, 0))
        with pytest.raises(ModelError, match=rf"m\.gguf is GGUF version {version}, where"):
            reader.read(tmp_path / "m.gguf")

    def test_truncated_anywhere(self, tmp_path: Path) -> None:
        whole = simple(tmp_path / "w.gguf", Type.Q8_0).read_bytes()
        for size in [*range(4, 500, 7), len(whole) - 1]:
            (tmp_path / "m.gguf").write_bytes(whole[:size])
            with pytest.raises(ModelError, match=r"m\.gguf is truncated.*; download it again"):
                reader.read(tmp_path / "m.gguf")

    def test_counts_of_a_damaged_header_end_at_once(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(100))
        with pytest.raises(ModelError, match="is truncated within its header"):
            reader.read(tmp_path / "m.gguf")

    def test_unknown_type(self, tmp_path: Path) -> None:
        path = simple(tmp_path / "m.gguf")
        content = path.read_bytes()
        at = content.index(b"\x01\x00\x00\x00\x00\x00\x00\x00w") + 9 + 4 + 16
        path.write_bytes(content[:at] + struct.pack("<I", 999) + content[at + 4 :])
        with pytest.raises(UsageError, match=r"m\.gguf: w is of the GGUF type 999, which the installed gguf package"):
            reader.read(path)
        path.write_bytes(content[:at] + struct.pack("<I", Type.Q8_1) + content[at + 4 :])
        with pytest.raises(UsageError, match=r"w is of the type Q8_1, which can't be dequantized"):
            reader.read(path)

    def test_rows_that_are_no_whole_blocks(self, tmp_path: Path) -> None:
        path = simple(tmp_path / "m.gguf", columns=250)
        content = path.read_bytes()
        at = content.index(b"\x01\x00\x00\x00\x00\x00\x00\x00w") + 9 + 4 + 16
        path.write_bytes(content[:at] + struct.pack("<I", Type.Q4_1) + content[at + 4 :])
        with pytest.raises(ModelError, match=r"w has the dimensions \[40, 250\], which aren't whole blocks of Q4_1"):
            reader.read(path)

    def test_split_files(self, tmp_path: Path) -> None:
        path = simple(tmp_path / "m-00001-of-00003.gguf")
        with pytest.raises(UsageError, match=r"is one part of a split model; join them first with `llama-gguf-split"):
            reader.read(path)

    def test_split_files_by_another_name(self, tmp_path: Path) -> None:
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
        writer.add_uint16("split.count", 3)
        add(writer, "w", np.zeros((2, 32), np.float32), Type.F32)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UsageError, match="is one part of a split model"):
            reader.read(tmp_path / "m.gguf")

    def test_a_model_cut_after_its_header(self, tmp_path: Path) -> None:
        path = write(tmp_path / "m.gguf", "llama", tiny("llama"))
        path.write_bytes(path.read_bytes()[:-100_000])
        with pytest.raises(ModelError, match=r"m\.gguf is truncated: \S+ takes the bytes \d+ to \d+ of \d+"):
            reader.read(path)
