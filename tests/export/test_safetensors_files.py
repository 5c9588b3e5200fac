"""Which files of a folder hold a model's weights, what lies in them, and one sentence for each way to be broken."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError, UsageError
from graphopt.export.safetensors_files import read_header, stored_tensors


def write(file: Path, *names: str, **more: Any) -> Path:
    """A file of float32 tensors that count up, without the library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name in names:
        array = np.arange(6, dtype=np.float32).reshape(2, 3) + len(data)
        header[name] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    header |= more
    return put(file, json.dumps(header).encode(), data)


def put(file: Path, header: bytes, data: bytes = b"") -> Path:
    file.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return file


def index(file: Path, **places: str) -> None:
    file.write_text(json.dumps({"metadata": {}, "weight_map": places}))


class TestWhichFiles:
    def test_one_file_of_any_name(self, tmp_path: Path) -> None:
        write(tmp_path / "weights.safetensors", "a")
        assert set(stored_tensors(tmp_path)) == {"a"}

    def test_the_usual_name_goes_before_others(self, tmp_path: Path) -> None:
        write(tmp_path / "model.safetensors", "a")
        write(tmp_path / "other.safetensors", "b")
        assert set(stored_tensors(tmp_path)) == {"a"}

    def test_shards_of_an_index(self, tmp_path: Path) -> None:
        write(tmp_path / "model-00001-of-00002.safetensors", "a", "b")
        write(tmp_path / "model-00002-of-00002.safetensors", "c")
        write(tmp_path / "consolidated.safetensors", "d")
        one, two = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
        index(tmp_path / "model.safetensors.index.json", a=one, b=one, c=two)
        found = stored_tensors(tmp_path)
        assert list(found) == ["a", "b", "c"]
        assert found["b"].numpy().tolist() == [[24, 25, 26], [27, 28, 29]]

    def test_shards_without_an_index(self, tmp_path: Path) -> None:
        for number in (1, 2):
            write(tmp_path / f"model-0000{number}-of-00002.safetensors", f"t{number}")
        assert set(stored_tensors(tmp_path)) == {"t1", "t2"}
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelError, match=r"model-00002-of-00002.safetensors is missing; download it"):
            stored_tensors(tmp_path)

    def test_the_name_that_the_configuration_gives(self, tmp_path: Path) -> None:
        write(tmp_path / "model.safetensors", "a")
        write(tmp_path / "special.safetensors", "b")
        (tmp_path / "config.json").write_text('{"transformers_weights": "special.safetensors"}')
        assert set(stored_tensors(tmp_path)) == {"b"}

    def test_adapters_are_no_weights(self, tmp_path: Path) -> None:
        write(tmp_path / "adapter_model.safetensors", "a")
        with pytest.raises(UsageError, match="holds an adapter and no model; give the folder of its base model"):
            stored_tensors(tmp_path)
        write(tmp_path / "weights.safetensors", "b")
        assert set(stored_tensors(tmp_path)) == {"b"}

    def test_several_that_are_no_parts_of_one(self, tmp_path: Path) -> None:
        for name in ("a", "b", "c", "d"):
            write(tmp_path / f"{name}.safetensors", name)
        with pytest.raises(
            UsageError, match=r"has a.safetensors, b.safetensors, c.safetensors and 1 more and no model"
        ):
            stored_tensors(tmp_path)

    def test_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"has no weights; give a folder with model.safetensors"):
            stored_tensors(tmp_path)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
    def test_only_pickles(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"x")
        (tmp_path / "training_args.bin").write_bytes(b"x")
        with pytest.raises(UsageError, match=rf"has its weights only as {name}, .*save_pretrained"):
            stored_tensors(tmp_path)

    def test_links_as_download_caches_have_them(self, tmp_path: Path) -> None:
        (tmp_path / "blobs").mkdir()
        (tmp_path / "snapshot").mkdir()
        write(tmp_path / "blobs" / "0123", "a")
        os.symlink("../blobs/0123", tmp_path / "snapshot" / "model.safetensors")
        assert stored_tensors(tmp_path / "snapshot")["a"].numpy()[1, 2] == 5


class TestIndex:
    def test_a_missing_shard(self, tmp_path: Path) -> None:
        index(tmp_path / "model.safetensors.index.json", a="x.safetensors", b="x.safetensors", c="y.safetensors")
        with pytest.raises(
            ModelError, match=r"x.safetensors is missing \(2 of 2 files are missing\), .* 2 tensors lie"
        ):
            stored_tensors(tmp_path)
        write(tmp_path / "x.safetensors", "a", "b")
        with pytest.raises(
            ModelError, match=r"y.safetensors is missing, where model.* says that 1 tensors lie; download"
        ):
            stored_tensors(tmp_path)

    def test_a_tensor_that_is_not_in_its_file(self, tmp_path: Path) -> None:
        index(tmp_path / "model.safetensors.index.json", a="x.safetensors", b="x.safetensors")
        write(tmp_path / "x.safetensors", "a")
        with pytest.raises(
            ModelError, match=r"x.safetensors doesn't hold the tensor b, which the index beside it promises"
        ):
            stored_tensors(tmp_path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "isn't JSON"),
            ("[]", "is no JSON object"),
            ("{}", "has no weight_map"),
            ('{"weight_map": {"a": 3}}', "has no weight_map"),
            ('{"weight_map": {"a": "../secret"}}', r"names the file ../secret, which isn't in its folder"),
        ],
    )
    def test_one_that_is_broken(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ModelError, match=message):
            stored_tensors(tmp_path)


class TestHeader:
    def test_types_and_places(self, tmp_path: Path) -> None:
        header = {
            "scalar": {"dtype": "I64", "shape": [], "data_offsets": [0, 8]},
            "empty": {"dtype": "F16", "shape": [0, 4], "data_offsets": [8, 8]},
            "half": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
            "eighth": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [12, 15]},
            "bool": {"dtype": "BOOL", "shape": [1], "data_offsets": [15, 16]},
            "unaligned": {"dtype": "F32", "shape": [1], "data_offsets": [17 - 1, 20]},
        }
        data = (7).to_bytes(8, "little") + b"\x80\x3f\x00\xc0" + b"\x38\x40\x44" + b"\x01" + np.float32(2.5).tobytes()
        found = read_header(put(tmp_path / "f.safetensors", json.dumps(header).encode() + b" ", data))
        assert found["scalar"].numpy() == 7
        assert found["empty"].numpy().shape == (0, 4)
        assert found["half"].dtype == ir.DataType.BFLOAT16
        assert found["half"].numpy().astype(np.float32).tolist() == [1, -2]
        assert found["eighth"].numpy().astype(np.float32).tolist() == [1, 2, 3]
        assert found["bool"].numpy().tolist() == [True]
        assert found["unaligned"].numpy().tolist() == [2.5]

    def test_every_length_of_a_truncated_file(self, tmp_path: Path) -> None:
        whole = write(tmp_path / "f.safetensors", "a", "b").read_bytes()
        for length in range(len(whole)):
            (tmp_path / "f.safetensors").write_bytes(whole[:length])
            with pytest.raises(ModelError, match=r"f.safetensors is truncated: it has \d+ bytes"):
                read_header(tmp_path / "f.safetensors")

    def test_more_bytes_than_the_header_tells(self, tmp_path: Path) -> None:
        file = write(tmp_path / "f.safetensors", "a")
        file.write_bytes(file.read_bytes() + b"x")
        with pytest.raises(ModelError, match=r"f.safetensors is damaged: it has \d+ bytes where its header tells of"):
            read_header(file)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (b"{...", r"isn't a safetensors file: its header isn't JSON \("),
            (b"\xff\xfe", "its header isn't JSON"),
            (b"[]", "its header is no JSON object"),
            (b'{"a": 3}', "its header's entry of a is 3"),
            (b'{"a": {"dtype": "F32", "shape": [1]}}', "its header's entry of a is"),
            (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "its header's entry of a is"),
            (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "its header's entry of a is"),
            (b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "its header's entry of a is"),
            (b'{"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 4]}}', "of the type F4, which isn't supported"),
            (
                b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}',
                r"its tensor a, F32 \[3\], needs 12 bytes, and its header gives it 4",
            ),
        ],
    )
    def test_a_broken_header(self, tmp_path: Path, header: bytes, message: str) -> None:
        with pytest.raises(ModelError, match=f"f.safetensors.*{message}"):
            read_header(put(tmp_path / "f.safetensors", header, b"\0" * 4))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer, not the weights"),
            (b"<!DOCTYPE html><html></html>", "isn't a safetensors file: its header would be"),
            (b"", "is truncated: it has 0 bytes"),
        ],
    )
    def test_something_else(self, tmp_path: Path, content: bytes, message: str) -> None:
        (tmp_path / "f.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match=message):
            read_header(tmp_path / "f.safetensors")

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"f.safetensors can't be read: No such file"):
            read_header(tmp_path / "f.safetensors")
