"""Loading: memory-mapped weights, and one clear sentence for each kind of broken file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.graph import load, save
from graphopt.graph.load import MappedTensor

TEXT = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[n, 4] x) => (float[n, 4] y) <float[4] b = {1, 2, 3, 4}> { y = Add(x, b) }"""


def write(path: Path, proto: onnx.ModelProto, **kwargs: object) -> Path:
    onnx.save(proto, path, **kwargs)
    return path


def big_model(seed: int = 0, side: int = 256) -> onnx.ModelProto:
    weights = np.random.default_rng(seed).normal(size=(side, side)).astype(np.float32)
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", side])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", side])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")],
        "g",
        [x],
        [y],
        [onnx.numpy_helper.from_array(weights, "w")],
    )
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)


def test_inline_weights_stay_in_the_file(tmp_path: Path) -> None:
    proto = big_model()
    model = load(write(tmp_path / "m.onnx", proto))
    tensor = model.graph.initializers["w"].const_value
    assert isinstance(tensor, MappedTensor)
    np.testing.assert_array_equal(tensor.numpy(), onnx.numpy_helper.to_array(proto.graph.initializer[0]))


def test_hard_linked_inline_file_loads(tmp_path: Path) -> None:
    (tmp_path / "b.onnx").hardlink_to(write(tmp_path / "a.onnx", big_model()))
    assert load(tmp_path / "b.onnx").graph.initializers["w"].const_value.numpy().shape == (256, 256)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b"\x00\x01\x02 no protobuf", "truncated or not an ONNX model"),
        (b"{'json': 1}", "not an ONNX model"),
    ],
)
def test_other_files(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=says):
        load(path)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_truncated(tmp_path: Path, keep: float) -> None:
    data = big_model().SerializeToString()
    path = tmp_path / "m.onnx"
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelError, match=r"m\.onnx"):
        load(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="is a folder"):
        load(tmp_path)


def external(tmp_path: Path) -> Path:
    return write(tmp_path / "m.onnx", big_model(), save_as_external_data=True, location="m.data", size_threshold=0)


def test_external_data_missing(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ModelError, match=r"external data file 'm.data' of 'w' is missing"):
        load(path)


def test_external_data_truncated(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:-4])
    with pytest.raises(ModelError, match="truncated: 'w' needs bytes"):
        load(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "sub/../../secret"])
def test_external_data_escapes(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(256 * 256 * 4))
    path = external(folder)
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="outside of the model's folder"):
        load(path)


def test_links_of_a_download_cache(tmp_path: Path) -> None:
    """A snapshot whose two files are links into one folder of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    path = external(tmp_path)
    path.rename(blobs / "aaa")
    (tmp_path / "m.data").rename(blobs / "bbb")
    (snapshot / "m.onnx").symlink_to(blobs / "aaa")
    (snapshot / "m.data").symlink_to(blobs / "bbb")
    assert load(snapshot / "m.onnx").graph.initializers["w"].const_value.numpy().shape == (256, 256)
    (snapshot / "m.onnx").unlink()
    (snapshot / "m.onnx").write_bytes((blobs / "aaa").read_bytes())
    with pytest.raises(ModelError, match="symbolic link"):
        load(snapshot / "m.onnx")


def test_cycle(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.node.append(onnx.helper.make_node("Add", ["q", "x"], ["p"]))
    proto.graph.node.append(onnx.helper.make_node("Add", ["p", "x"], ["q"]))
    with pytest.raises(ModelError, match="cycle"):
        load(write(tmp_path / "m.onnx", proto))


def test_unsorted_nodes_are_sorted(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }"""
    )
    nodes = list(proto.graph.node)[::-1]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    assert [n.op_type for n in load(write(tmp_path / "m.onnx", proto)).graph] == ["Relu", "Neg"]


def test_names_of_nodes_are_made_different(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) {
        [n] a = Relu(x) [n_2] b = Neg(a) [n] c = Neg(b) d = Neg(c) e = Neg(d) [n] y = Neg(e) }"""
    )
    names = [n.name or "" for n in load(write(tmp_path / "m.onnx", proto)).graph]
    assert names == ["n", "n_2", "n_3", "", "", "n_4"]


def test_sparse_initializer_becomes_dense(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 3] y) { y = Add(x, s) }"""
    )
    values = onnx.numpy_helper.from_array(np.array([5, 7], np.float32), "s")
    proto.graph.sparse_initializer.append(
        onnx.helper.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array([1, 5]), "i"), [2, 3])
    )
    model = load(write(tmp_path / "m.onnx", proto))
    np.testing.assert_array_equal(model.graph.initializers["s"].const_value.numpy(), [[0, 5, 0], [0, 0, 7]])


def test_ir3_initializers_are_no_inputs(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.input.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [4]))
    for version, inputs in ((3, ["x"]), (8, ["x", "b"])):
        proto.ir_version = version
        model = load(write(tmp_path / f"m{version}.onnx", proto))
        assert [v.name for v in model.graph.inputs] == inputs
        assert "b" in model.graph.initializers
        assert model.ir_version == max(version, 4)  # in version 3 this would not be a valid model any more
        onnx.checker.check_model(ir.to_proto(model))


def test_long_name_of_the_default_domain(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.opset_import[0].domain = "ai.onnx"
    assert load(write(tmp_path / "m.onnx", proto)).graph.opset_imports == {"": 17}


def test_wrong_length_of_inline_data(tmp_path: Path) -> None:
    proto = big_model()
    proto.graph.initializer[0].raw_data += b"\0\0\0\0"
    with pytest.raises(ModelError, match="'w' holds"):
        load(write(tmp_path / "m.onnx", proto))


def test_round_trip_of_every_dtype(tmp_path: Path) -> None:
    tensors = []
    for dtype in ir.DataType:
        if dtype in (ir.DataType.UNDEFINED, ir.DataType.STRING) or dtype.value > 23:
            continue
        count = 1 << 15
        nbytes = count * dtype.bitwidth // 8
        raw = np.random.default_rng(dtype.value).integers(0, 2, nbytes).astype(np.uint8).tobytes()
        tensors.append(onnx.TensorProto(name=f"t{dtype.value}", data_type=dtype.value, dims=[count], raw_data=raw))
    proto = onnx.parser.parse_model(TEXT)
    proto.ir_version = 11
    proto.graph.initializer.extend(tensors)
    path = write(tmp_path / "m.onnx", proto)
    for external_data in (False, True):
        out = tmp_path / f"out{external_data}.onnx"
        save(load(path), out, external_data=external_data)
        again = load(out)
        for tensor in tensors:
            assert again.graph.initializers[tensor.name].const_value.tobytes() == tensor.raw_data, tensor.name
