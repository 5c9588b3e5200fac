"""What of the export needs no torch: arguments, messages, comparison."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from graphopt.errors import UsageError, first_line
from graphopt.export import export_model
from graphopt.export.compare import relative_error
from graphopt.export.dependencies import quiet, require
from graphopt.export.exporter import _target, output_dims
from graphopt.export.feed_forward import _height_width
from graphopt.export.options import is_factory
from graphopt.export.source import _probes


def test_import_needs_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import sys, graphopt.export, graphopt.models.catalogue\n"
        "print([m for m in ('torch', 'transformers', 'onnxruntime', 'safetensors') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize(("module", "extra"), [("torch", "export"), ("onnxruntime", "cpu")])
def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, module: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=rf"export needs {module}.*`pip install graphopt\[{extra}\]`"):
        require(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exporter": "jit"}, "no exporter 'jit'; use dynamo or torchscript"),
        ({"attention": "flash"}, "no attention implementation 'flash'"),
        ({"dtype": "bfloat16"}, "aren't exported in bfloat16"),
    ],
)
def test_wrong_options(tmp_path: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        export_model("somewhere", tmp_path / "m.onnx", **options)  # type: ignore[arg-type]


def test_factories_are_told_from_folders() -> None:
    assert is_factory("package.module:make")
    assert is_factory("module:Class.make")
    for other in ("folder", "./folder:x", "org/name", "C:\\models\\bert", "module:"):
        assert not is_factory(other)


def test_target(tmp_path: Path) -> None:
    assert _target(tmp_path / "m.onnx") == (tmp_path / "m.onnx", None)
    assert _target(tmp_path) == (tmp_path / "model.onnx", tmp_path)
    assert _target(tmp_path / "new") == (tmp_path / "new" / "model.onnx", tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"without the ending .onnx"):
        _target(tmp_path / "file")


def test_relative_error() -> None:
    a = np.array([1.0, -4.0], np.float32)
    assert relative_error(a, a) == 0
    assert relative_error(a, a + np.float32(0.5)) == pytest.approx(0.125)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.zeros(2), np.ones(2)) == float("inf")
    assert relative_error(a, np.array([1.0, np.nan], np.float32)) == float("inf")
    assert relative_error(np.array([np.nan, np.inf]), np.array([np.nan, np.inf])) == 0
    assert relative_error(np.array([np.inf]), np.array([-np.inf])) == float("inf")
    assert relative_error(np.array([], np.float32), np.array([], np.float32)) == 0
    assert relative_error(np.array([1, 2]), np.array([1, 3])) == float("inf")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (224, (224, 224)),
        ([32, 48], (32, 48)),
        ({"height": 3, "width": 5}, (3, 5)),
        ({"shortest_edge": 9}, (9, 9)),
        ({"longest_edge": 9}, None),
        (None, None),
    ],
)
def test_image_sizes(size: object, expected: object) -> None:
    assert _height_width(size) == expected


def test_probes_differ_in_every_size_and_from_each_other() -> None:
    assert _probes({"n": 2}, {"n"}) == [[{"n": 1}, {"n": 3}]]
    doubled, halved = _probes({"n": 2, "height": 32, "width": 32}, {"n"})
    assert doubled == [{"n": 1, "height": 32, "width": 64}, {"n": 3, "height": 64, "width": 32}]
    assert halved == [{"n": 1, "height": 32, "width": 16}, {"n": 3, "height": 16, "width": 32}]


def test_output_dimensions_follow_from_two_runs() -> None:
    def reference(batch: int, length: int) -> SimpleNamespace:
        output = np.zeros((batch, 4, length, length // 2))
        return SimpleNamespace(sizes={"batch": batch, "length": length}, outputs=[output])

    source = SimpleNamespace(outputs=None, label="it", dims=None)
    assert output_dims(source, [reference(1, 16), reference(3, 8)]) == {  # type: ignore[arg-type,list-item]
        "output": ("batch", 4, "length", "output_dim_3")
    }
    source.outputs = ["a", "b"]
    with pytest.raises(UsageError, match="it has 1 outputs"):
        output_dims(source, [reference(1, 16), reference(3, 8)])  # type: ignore[arg-type,list-item]


def test_quiet_restores_what_it_silenced(capfd: pytest.CaptureFixture[str]) -> None:
    before = logging.root.manager.disable
    with contextlib.suppress(KeyError), quiet() as told:
        print("printed")
        os.write(2, b"from C++\n")
        logging.getLogger("torch.onnx").warning("logged")
        warnings.warn("of\n this", stacklevel=1)
        raise KeyError
    assert told == ["of this"]
    assert logging.root.manager.disable == before
    assert capfd.readouterr() == ("", "")
    print("again")
    assert capfd.readouterr().out == "again\n"


def test_first_line_is_the_cause_without_colours() -> None:
    outer = RuntimeError("something failed")
    outer.__cause__ = ValueError("\n\x1b[96mthe reason\x1b[0m:\nmore")
    assert first_line(outer) == "the reason"
    assert first_line(KeyError()) == "KeyError"
