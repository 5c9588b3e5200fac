from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import ModelError, VerificationError
from graphopt.graph.load import load
from graphopt.graph.skeleton import skeleton
from graphopt.runtime_ops import memory_session as session_module
from graphopt.runtime_ops.memory_session import WeightStore, make_session, run


def cast_model(dtype: ir.DataType, array: np.ndarray) -> ir.Model:
    """One weight of any type, cast to float32; the result shows whether every number arrived."""
    tensor = ir.tensor(array, dtype=dtype, name="w")
    weight = ir.Value(name="w", type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
    result = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape))
    node = ir.node("Cast", [weight], {"to": 1}, outputs=[result])
    graph = ir.Graph([], [result], nodes=[node], initializers=[weight], opset_imports={"": 21}, name="g")
    return ir.Model(graph, ir_version=10)


DTYPES = [
    "FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT64", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT8E5M2", "INT4", "UINT4",
]  # fmt: skip


@pytest.fixture(params=["inline", "file"])
def inline_total(request, monkeypatch) -> None:
    """With weights inside the protobuf, and with weights in the temporary file, as large models have them."""
    if request.param == "file":
        monkeypatch.setattr(session_module, "INLINE_TOTAL_BYTES", 0)


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("optimizations", ["all", "none"])
def test_weights_of_every_type_arrive(name, optimizations, inline_total) -> None:
    dtype = ir.DataType[name]
    array = (np.arange(4096) % 8).reshape(64, 64).astype(dtype.numpy())
    session = make_session(cast_model(dtype, array), optimizations)
    np.testing.assert_array_equal(run(session, {})[0], array.astype(np.float32))


def test_file_backed_weights_are_referenced_not_copied(tmp_path, monkeypatch) -> None:
    array = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    proto = ir.to_proto(cast_model(ir.DataType.FLOAT, array))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = load(tmp_path / "m.onnx")

    def fail(*_: object) -> None:
        raise AssertionError("a weight that lies in a file was written or read")

    monkeypatch.setattr(WeightStore, "place", fail)
    monkeypatch.setattr(session_module, "_inline", fail)
    np.testing.assert_array_equal(run(make_session(model, "none"), {})[0], array)


def test_small_external_weights_are_put_inside(tmp_path) -> None:
    proto = ir.to_proto(cast_model(ir.DataType.FLOAT, np.ones((2, 2), np.float32)))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    assert run(make_session(ir.load(tmp_path / "m.onnx")), {})[0].sum() == 4


IF = """<ir_version: 8, opset_import: ["": 17]>
g (bool c, float[1024] x) => (float[1024] y) {
  y = If (c) <
    then_branch = a () => (float[1024] r) { r = Add(x, w) },
    else_branch = b () => (float[1024] q) { q = Sub(x, w) }
  >
}"""


def test_large_initializers_of_subgraphs(inline_total) -> None:
    proto = onnx.parser.parse_model(IF)
    array = np.arange(1024, dtype=np.float32)
    for index, attribute in enumerate(proto.graph.node[0].attribute):
        # The same name in both branches, as exporters write it: these stay inline.
        attribute.g.initializer.append(onnx.numpy_helper.from_array(array + index, "w"))
    model = ir.from_proto(proto)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    feeds = {"x": np.zeros(1024, np.float32)}
    session = make_session(model, "none")
    np.testing.assert_array_equal(run(session, {**feeds, "c": np.array(True)})[0], array)
    np.testing.assert_array_equal(run(session, {**feeds, "c": np.array(False)})[0], -(array + 1))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before

    first = proto.graph.node[0].attribute[0].g
    first.initializer[0].name = first.node[0].input[1] = "alone"
    session = make_session(ir.from_proto(proto), "none")
    np.testing.assert_array_equal(run(session, {**feeds, "c": np.array(True)})[0], array)


def test_skeleton_leaves_the_model_as_it_was() -> None:
    model = cast_model(ir.DataType.FLOAT, np.ones((64, 64), np.float32))
    tensor = model.graph.initializers["w"].const_value
    proto, weights = skeleton(model)
    assert model.graph.initializers["w"].const_value is tensor
    assert [w.name for w in weights] == ["w"]
    assert proto.ByteSize() < 500


def test_store_writes_a_tensor_once_and_cleans_up() -> None:
    store = WeightStore()
    tensor = ir.tensor(np.ones((64, 64), np.float32))
    path, offset = store.place(tensor)
    assert store.place(tensor) == (path, offset)
    assert path.stat().st_size == 16384
    other_path, other = store.place(ir.tensor(np.zeros(5, np.int8)))
    assert (other_path, other) == (path, 16384)
    store.close()
    assert not Path(path).exists()


def test_inputs_and_outputs_that_numpy_has_no_name_for() -> None:
    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["": 21]>
g (bfloat16[2] x, float8e4m3fn[2] e) => (bfloat16[2] y, float8e4m3fn[2] f, int4[3] i, float[2] plain)
<float[3] w = {1, -2, 3}> { y = Identity(x) f = Identity(e) i = Cast<to = 22>(w) plain = Cast<to = 1>(x) }""")
    x, e = np.array([1, 2.5], ml_dtypes.bfloat16), np.array([0.5, -3], ml_dtypes.float8_e4m3fn)
    y, f, i, plain = run(make_session(ir.from_proto(proto)), {"x": x, "e": e})
    assert y.dtype == x.dtype
    assert f.dtype == e.dtype
    assert y.tolist() == x.tolist()
    assert f.tolist() == e.tolist()
    assert i.astype(int).tolist() == [1, -2, 3]
    assert plain.tolist() == [1, 2.5]


@pytest.mark.parametrize(("opset", "version"), [(99, 10), (21, 99)])
def test_a_model_beyond_what_onnxruntime_loads(opset, version) -> None:
    model = cast_model(ir.DataType.FLOAT, np.ones((2, 2), np.float32))
    model.graph.opset_imports[""] = opset
    model.ir_version = version
    with pytest.raises(VerificationError, match=r"older opset or IR version, or install a newer onnxruntime"):
        make_session(model)


def test_missing_file(tmp_path) -> None:
    with pytest.raises(ModelError, match="no model file"):
        make_session(tmp_path / "none.onnx")


def test_unknown_operator_is_one_clear_line() -> None:
    text = '<ir_version: 8, opset_import: ["": 17, "odd": 1]> g (float x) => (float y) { y = odd.Op(x) }'
    proto = onnx.parser.parse_model(text)
    with pytest.raises(VerificationError, match=r"doesn't load the graph 'g': .*Op") as caught:
        make_session(ir.from_proto(proto))
    assert "\n" not in str(caught.value)
