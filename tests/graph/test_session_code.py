"""Sessions as code: what a model asks for, and the library with kernels."""

from __future__ import annotations

from graphopt.graph.session_code import cpp_lines, csharp_lines, python_lines

SETTINGS = [
    {"setting": "session.x", "value": 'a"b'},
    {"setting": "disabled_optimizers", "value": "A, B"},
    {"setting": "intra_op_num_threads", "value": "4"},
    {"setting": "graph_optimization_level", "value": "ORT_ENABLE_BASIC"},
]


def test_python() -> None:
    lines = python_lines(SETTINGS, 'm"\n.onnx', "./lib.so")
    compile(lines, "settings", "exec")
    assert 'options.register_custom_ops_library("./lib.so")' in lines
    assert "options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC" in lines
    assert "disabled_optimizers=['A', 'B']" in lines
    assert "register" not in python_lines(SETTINGS, "m.onnx")


def test_cpp() -> None:
    lines = cpp_lines(SETTINGS, "m.onnx", "./lib.so")
    assert 'options.RegisterCustomOpsLibrary(ORT_TSTR("./lib.so"));' in lines
    assert 'options.AddConfigEntry("session.x", "a\\"b");' in lines
    assert 'options.AddConfigEntry("optimization.disable_specified_optimizers", "A;B");' in lines
    assert "options.SetIntraOpNumThreads(4);" in lines
    assert "options.SetGraphOptimizationLevel(ORT_ENABLE_BASIC);" in lines


def test_csharp() -> None:
    lines = csharp_lines(SETTINGS, "m.onnx", "./lib.so")
    assert 'options.RegisterCustomOpLibrary("./lib.so");' in lines
    assert 'options.AddSessionConfigEntry("session.x", "a\\"b");' in lines
    assert 'options.AddSessionConfigEntry("optimization.disable_specified_optimizers", "A;B");' in lines
    assert "options.IntraOpNumThreads = 4;" in lines
    assert "options.GraphOptimizationLevel = GraphOptimizationLevel.ORT_ENABLE_BASIC;" in lines
