"""Sessions of models with graphopt's own operators: on kernels where they serve, on bodies elsewhere."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

import graphopt
from graphopt.errors import GraphoptWarning, ModelError, UsageError
from graphopt.graph.session_settings import request
from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.memory_session import make_session, run
from graphopt.runtime_ops.operator import DOMAIN

X = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
ONE = helper.make_tensor("factor", TensorProto.FLOAT, [1, 1], [1.0])
HALF = helper.make_node(
    "HadamardTransform", ["x", "factor"], ["h"], "the_transform", domain=DOMAIN, group_size=8, scale=0.5
)


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    matrix = np.ones((1, 1))
    for _ in range(3):
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return np.asarray(x, np.float64) @ matrix * 0.5


def saved(
    place: Path,
    nodes: Sequence[onnx.NodeProto] = (HALF,),
    output: str = "h",
    kind: int = TensorProto.FLOAT,
    functions: Sequence[onnx.FunctionProto] = (),
) -> Path:
    """A model of these nodes, with the portable body of the transform."""
    body = ir.to_proto(operators()["HadamardTransform"].bodies()[0])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1), helper.make_opsetid("mine", 1)]
    del body.opset_import[:]
    body.opset_import.extend(opsets[:1])
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, ["n", 8])],
        [helper.make_tensor_value_info(output, kind, ["n", 8])],
        [ONE],
    )
    model = helper.make_model(graph, opset_imports=opsets, functions=[body, *functions], ir_version=10)
    onnx.save(model, place)
    return place


def executed(path: Path, folder: Path, **options: Any) -> list[str]:
    """The operators that a session of graphopt's runs, those of subgraphs included."""
    sess_options = onnxruntime.SessionOptions()
    sess_options.optimized_model_filepath = str(folder / "executed.onnx")
    sess_options.log_severity_level = 4
    graphopt.session(path, sess_options, **options)
    model = ir.load(folder / "executed.onnx")
    return [node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)]


@pytest.fixture(autouse=True)
def no_warning() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def library() -> Path:
    path = library_path()
    if path is None:
        pytest.skip("the library with the kernels isn't built")
    return path


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_with_and_without_kernels(tmp_path: Path, library: Path, kind: int) -> None:
    path = saved(tmp_path / "m.onnx", kind=kind)
    assert executed(path, tmp_path) == ["HadamardTransform"]
    assert "HadamardTransform" not in executed(path, tmp_path, kernels=False)
    x = X if kind == TensorProto.FLOAT else X.astype(np.float16)
    for kernels in (True, False):
        (y,) = graphopt.session(path, kernels=kernels).run(None, {"x": x})
        assert y.dtype == x.dtype
        np.testing.assert_allclose(y, expected(x), atol=1e-5 if kind == TensorProto.FLOAT else 1e-2)


def test_where_there_is_no_library_the_body_serves_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.onnx")
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    with pytest.warns(GraphoptWarning, match=r"m.onnx runs on the portable bodies .* kernels wasn't built\.") as caught:
        session = graphopt.session(path)
    assert caught[0].filename == __file__
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected(X), atol=1e-5)
    graphopt.session(path, kernels=False)  # asked for: nothing to say
    plain = tmp_path / "plain.onnx"
    saved(plain, [helper.make_node("Neg", ["x"], ["h"])])
    graphopt.session(plain)  # no use for the library


def test_a_library_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "m.onnx")
    for text in (None, "not a library"):
        place = tmp_path / f"{text}.so"
        if text is not None:
            place.write_text(text)
        monkeypatch.setenv("GRAPHOPT_LIBRARY", str(place))
        with pytest.raises(ModelError, match=r"\.so can't be loaded: "):
            graphopt.session(path)


def test_options_serve_several_sessions(tmp_path: Path, library: Path) -> None:
    path = saved(tmp_path / "m.onnx")
    options = onnxruntime.SessionOptions()
    sessions = [graphopt.session(path, options) for _ in range(3)]
    for session in [*sessions, graphopt.session(path)]:
        np.testing.assert_allclose(session.run(None, {"x": X})[0], expected(X), atol=1e-5)
    del sessions
    np.testing.assert_allclose(graphopt.session(path, options).run(None, {"x": X})[0], expected(X), atol=1e-5)


def test_options_that_hold_the_library_already(tmp_path: Path, library: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    options.register_custom_ops_library(str(library))
    session = graphopt.session(saved(tmp_path / "m.onnx"), options)
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected(X), atol=1e-5)
    double = saved(tmp_path / "double.onnx", kind=TensorProto.DOUBLE)
    with pytest.raises(UsageError, match=r"hold graphopt's library, but .* for HadamardTransform 'the_transform' with"):
        graphopt.session(double, options)


def test_own_settings_stay(tmp_path: Path, library: Path) -> None:
    path = saved(tmp_path / "m.onnx")
    model = graphopt.load(path)
    request(model, "session.set_denormal_as_zero", "1", "a test")
    graphopt.save(model, path, in_place=True)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.set_denormal_as_zero", "0")
    graphopt.session(path, options)
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "0"
    options = onnxruntime.SessionOptions()
    graphopt.session(path, options)
    assert options.get_session_config_entry("session.set_denormal_as_zero") == "1"


def test_types_without_a_kernel_run_on_bodies(tmp_path: Path, library: Path) -> None:
    """A body takes more types than the kernel here: that of a double computes in float32."""
    path = saved(tmp_path / "m.onnx", kind=TensorProto.DOUBLE)
    with pytest.warns(GraphoptWarning, match="no kernel for HadamardTransform 'the_transform' with its types"):
        session = graphopt.session(path)
    np.testing.assert_allclose(session.run(None, {"x": X.astype(np.float64)})[0], expected(X), atol=1e-5)


def block() -> onnx.FunctionProto:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    one = helper.make_node("Constant", [], ["factor"], value=ONE)
    return helper.make_function("mine", "Block", ["x"], ["h"], [one, HALF], opsets)


@pytest.mark.parametrize("where", ["if", "function"])
def test_nodes_in_branches_and_functions(tmp_path: Path, library: Path, where: str) -> None:
    if where == "if":
        names = [helper.make_tensor_value_info("h", TensorProto.FLOAT, None)]
        branch = helper.make_graph([HALF], "branch", [], names)
        other = helper.make_graph([helper.make_node("Neg", ["x"], ["h"])], "other", [], names)
        nodes = [
            helper.make_node("Size", ["x"], ["size"]),
            helper.make_node("Cast", ["size"], ["some"], to=TensorProto.BOOL),
            helper.make_node("If", ["some"], ["y"], then_branch=branch, else_branch=other),
        ]
        path = saved(tmp_path / "m.onnx", nodes, "y")
    else:
        path = saved(
            tmp_path / "m.onnx", [helper.make_node("Block", ["x"], ["y"], domain="mine")], "y", functions=[block()]
        )
    assert "HadamardTransform" in executed(path, tmp_path)
    assert "HadamardTransform" not in executed(path, tmp_path, kernels=False)
    for kernels in (True, False):
        (y,) = graphopt.session(path, kernels=kernels).run(None, {"x": X})
        np.testing.assert_allclose(y, expected(X), atol=1e-5)


def test_types_that_the_file_does_not_tell(tmp_path: Path, library: Path) -> None:
    """Inside a function no value has a type, so that ONNX Runtime is the first to see that there is no kernel."""
    nodes = [helper.make_node("Block", ["x"], ["y"], domain="mine")]
    path = saved(tmp_path / "m.onnx", nodes, "y", TensorProto.DOUBLE, [block()])
    with pytest.warns(GraphoptWarning, match="the library can't run all of it"):
        session = graphopt.session(path)
    np.testing.assert_allclose(session.run(None, {"x": X.astype(np.float64)})[0], expected(X), atol=1e-5)


def test_a_node_that_is_wrong_is_named(tmp_path: Path, library: Path) -> None:
    node = helper.make_node(
        "HadamardTransform", ["x", "factor"], ["h"], "wrong", domain=DOMAIN, group_size=0, scale=0.5
    )
    with pytest.raises(ModelError, match="HadamardTransform 'wrong': group_size is 0, and must be positive"):
        graphopt.session(saved(tmp_path / "m.onnx", [node]))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("optimizations", ["all", "none"])
def test_verification_runs_the_kernels(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool, optimizations: Any
) -> None:
    path = saved(tmp_path / "m.onnx")
    registered: list[Any] = []
    monkeypatch.setattr("graphopt.runtime_ops.memory_session.register", lambda *a: registered.append(a))
    make_session(ir.load(path) if in_memory else path, optimizations)
    assert len(registered) == 1
    monkeypatch.undo()
    session = make_session(ir.load(path) if in_memory else path, optimizations)
    np.testing.assert_allclose(run(session, {"x": X})[0], expected(X), atol=1e-5)
