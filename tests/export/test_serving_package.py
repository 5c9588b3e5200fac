"""`graphopt package`: a folder that runs where nothing but ONNX Runtime is."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tiny_decoders import decoder

import graphopt
from graphopt.errors import ModelError, UsageError
from graphopt.export import serving_package
from graphopt.export.serving_package import package
from graphopt.export.serving_readme import example_lines
from graphopt.graph.assumptions import Reliance, note
from graphopt.graph.session_settings import request
from graphopt.runtime_ops import library_path
from tests.runtime_ops.runtimes import installed, run_in
from tests.runtime_ops.test_kernel_session import X, expected, saved

RUNS = """
import re, sys
from pathlib import Path
import numpy as np

text = Path("README.md").read_text().partition("## Python")[2].partition("\\n## ")[0]
blocks = re.findall(r"^```python\\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
for block in blocks:
    exec(block)
print(len(blocks), [o.shape for o in outputs])
if len(sys.argv) > 1:
    np.savez(sys.argv[2], *session.run(None, dict(np.load(sys.argv[1]))))
try:
    import onnx
except ImportError:
    print("nothing else")
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(tmp_path_factory.mktemp("environment") / "site")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """With an operator of graphopt's, weights in a file beside it, and what else lies beside a model."""
    (tmp_path / "source").mkdir()
    path = saved(tmp_path / "source" / "m.opt.onnx")
    made = graphopt.load(path)
    request(made, "session.set_denormal_as_zero", "1", "denormals are slow")
    request(made, "disabled_optimizers", "GeluFusion", "it is wrong")
    note(made, Reliance("batch=1", {"ids": "x"}, "the kernel is for one row", "a-pass"))
    graphopt.save(made, path, in_place=True, external_data=True)
    (path.parent / "config.json").write_text('{"model_type": "llama"}')
    (path.parent / "tokenizer.json").write_text("{}")
    (path.parent / "notes.txt").write_text("mine")
    return path


def test_it_runs_where_nothing_but_onnxruntime_is(model: Path, environment: Path, tmp_path: Path) -> None:
    made = package(model, tmp_path / "new" / "served")
    assert made.folder == tmp_path / "new" / "served"
    library = library_path()
    names = {"README.md", "graphopt.json", "model.onnx", "config.json", "tokenizer.json"}
    assert set(made.files) == names | ({library.name} if library else set())
    assert made.library == (library.name if library else None)
    np.savez(tmp_path / "in.npz", x=X)
    told = run_in(environment, "-c", RUNS, tmp_path / "in.npz", tmp_path / "out.npz", cwd=made.folder).splitlines()
    assert told == ["2 [(1, 8)]", "nothing else"]
    before = graphopt.session(model, check=False).run(None, {"x": X})
    np.testing.assert_array_equal(np.load(tmp_path / "out.npz")["arr_0"], before[0])
    np.testing.assert_allclose(before[0], expected(X), atol=1e-5)
    text = (made.folder / "README.md").read_text()
    assert "`session.set_denormal_as_zero` = `1`: denormals are slow" in text
    assert "the batch is 1 (the kernel is for one row)" in text
    for start in ("options.AddConfigEntry(", "options.AddSessionConfigEntry("):
        assert f'{start}"session.set_denormal_as_zero", "1");' in text
    if library is not None:
        assert f'options.RegisterCustomOpsLibrary(ORT_TSTR("./{library.name}"));' in text
        assert f'options.RegisterCustomOpLibrary("./{library.name}");' in text
    data = json.loads((made.folder / "graphopt.json").read_text())
    assert data["operators"] == {"HadamardTransform": 1}
    assert data["session"]["config"] == {"session.set_denormal_as_zero": "1"}
    assert [entry["assumption"] for entry in data["assumptions"]] == ["batch=1"]


def test_without_a_library(model: Path, environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    made = package(model, tmp_path / "served")
    assert made.library is None
    assert made.note == "the library with graphopt's kernels wasn't built"
    text = (made.folder / "README.md").read_text()
    assert "register_custom_ops_library" not in text
    assert "only more slowly" in text
    np.savez(tmp_path / "in.npz", x=X)
    run_in(environment, "-c", RUNS, tmp_path / "in.npz", tmp_path / "out.npz", cwd=made.folder)
    np.testing.assert_allclose(np.load(tmp_path / "out.npz")["arr_0"], expected(X), atol=1e-5)


def test_types_without_a_kernel_leave_the_library_out(tmp_path: Path, environment: Path) -> None:
    if library_path() is None:
        pytest.skip("the library with the kernels isn't built")
    made = package(saved(tmp_path / "double.onnx", kind=onnx.TensorProto.DOUBLE), tmp_path / "served")
    assert made.library is None
    assert "no kernel for HadamardTransform 'the_transform'" in made.note
    run_in(environment, "-c", RUNS, cwd=made.folder)


def test_a_decoder_of_standard_operators(tmp_path: Path, environment: Path) -> None:
    onnx.save(decoder("concat", positions=True), tmp_path / "model.onnx")
    described = {"model": {"decoder": {"filename": "model.onnx"}}, "search": {}}
    (tmp_path / "genai_config.json").write_text(json.dumps(described))
    made = package(tmp_path, tmp_path / "served")
    assert (made.library, made.note) == (None, "the model has no operators of graphopt's")
    assert "operators of its own" not in (made.folder / "README.md").read_text()
    assert json.loads((made.folder / "genai_config.json").read_text()) == described
    assert run_in(environment, "-c", RUNS, cwd=made.folder).startswith("2 [(1, ")


def test_onnxruntime_genai_registers_the_library_too(model: Path, tmp_path: Path) -> None:
    place = model.parent / "genai_config.json"
    place.write_text(json.dumps({"model": {"decoder": {"filename": "m.opt.onnx", "session_options": {"a": "b"}}}}))
    made = package(model, tmp_path / "served")
    decoder_of = json.loads((made.folder / "genai_config.json").read_text())["model"]["decoder"]
    library = {} if made.library is None else {"custom_ops_library": made.library}
    assert decoder_of == {"filename": "model.onnx", "session_options": {"a": "b", **library}}
    for text in ('{"model": {"decoder": {"filename": "other.onnx"}}}', "[]"):  # of another model; of none
        place.write_text(text)
        made = package(model, tmp_path / "served", force=True)
        assert "genai_config.json" not in made.files
        assert ["is of another file" in sentence for sentence in made.left] == [True]
    place.write_text("{")
    with pytest.raises(ModelError, match=r"genai_config.json can't be read"):
        package(model, tmp_path / "served", force=True)


def test_nothing_of_others_is_overwritten(model: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in model.parent.iterdir()}
    target = tmp_path / "served"
    target.mkdir()
    package(model, target)  # an empty folder is free
    with pytest.raises(UsageError, match="exists; give another folder, or --force"):
        package(model, target)
    (target / "config.json").write_text("{}")  # changed by hand, but of a package
    package(model, target, force=True)
    assert json.loads((target / "config.json").read_text()) == {"model_type": "llama"}
    (target / "thesis.tex").write_text("three years of work")
    with pytest.raises(UsageError, match=r"holds thesis\.tex, which is of no package"):
        package(model, target, force=True)
    for force in (True, False):
        with pytest.raises(UsageError, match="lies in"):
            package(model, model.parent, force=force)
        with pytest.raises(UsageError, match="lies in"):
            package(model, model.parent.parent, force=force)
    with pytest.raises(UsageError, match="is a file"):
        package(model, model)
    assert {file.name: file.read_bytes() for file in model.parent.iterdir()} == before


def test_a_failure_leaves_the_old_package(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "served"
    package(model, target)
    before = {file.name: file.read_bytes() for file in target.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(serving_package, "readme", full)
    with pytest.raises(ModelError, match=r"No space left on device; nothing was changed\."):
        package(model, target, force=True)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before
    with pytest.raises(ModelError, match="No space left"):
        package(model, tmp_path / "other")
    assert sorted(os.listdir(tmp_path)) == ["served", "source"]


def test_the_example_of_every_kind_of_input(tmp_path: Path) -> None:
    text = """<ir_version: 9, opset_import: ["": 20]>
    g (float[n, 64] a, int64[n, 3] b, bool[2] c, string[1] d, float[2, 20] e) => (float[n, 64] y, bool[2] z) {
      y = Neg(a)  z = Not(c)
    }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    lines = example_lines(graphopt.load(tmp_path / "m.onnx"))
    assert lines is not None
    scope: dict[str, Any] = {"session": graphopt.session(tmp_path / "m.onnx")}
    exec(lines, scope)
    assert {name: array.dtype.kind for name, array in scope["inputs"].items()} == dict(
        a="f", b="i", c="b", d="O", e="f"
    )
    assert [o.shape for o in scope["outputs"]] == [(1, 64), (2,)]
    assert re.search(r"'a': np.zeros\(\(1, 64\), np.float32\),  # n, 64\n", lines)
    onnx.save(onnx.parser.parse_model(text.replace("float[2, 20]", "bfloat16[2, 20]")), tmp_path / "b.onnx")
    assert example_lines(graphopt.load(tmp_path / "b.onnx")) is None
