"""One model with every operator: with the library, without it, and packaged for runtimes with nothing else installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.export.serving_package import package
from graphopt.runtime_ops import library_path, operators
from tests.runtime_ops.operator_cases import node_model
from tests.runtime_ops.operator_examples import EXAMPLES
from tests.runtime_ops.runtimes import fetched, installed, run_in
from tests.runtime_ops.test_runtimes import OPSET, same

SERVED = """
import re, sys
from pathlib import Path
import numpy as np

text = Path("README.md").read_text().partition("## Python")[2].partition("\\n## ")[0]
exec(re.search(r"^```python\\n(.*?)^```$", text, re.MULTILINE | re.DOTALL).group(1))
np.savez(sys.argv[2], *session.run(None, dict(np.load(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The model and its inputs."""
    graph, feeds = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, "ai.graphopt": 1}, name="every_operator"), {}
    whole = ir.Model(graph, ir_version=9)
    for name in operators():
        inputs, attributes = EXAMPLES[name](np.float32)[0]
        part = ir.from_proto(_proto(node_model(name, inputs, attributes, OPSET)))
        for value in [*part.graph.inputs, *part.graph.outputs]:
            value.name = f"{name}.{value.name}"
        feeds |= {f"{name}.input{i}": np.asarray(array) for i, array in enumerate(inputs) if array is not None}
        nodes, given, made = list(part.graph), list(part.graph.inputs), list(part.graph.outputs)
        part.graph.inputs.clear()
        part.graph.outputs.clear()
        part.graph.remove(nodes)
        for node in nodes:
            node.name = name
        graph.inputs.extend(given)
        graph.extend(nodes)
        graph.outputs.extend(made)
        for identifier, function in part.functions.items():
            whole.functions.setdefault(identifier, function)
    path = tmp_path_factory.mktemp("model") / "every.onnx"
    graphopt.save(whole, path)
    return path, feeds


def _proto(content: bytes) -> Any:
    import onnx

    return onnx.load_from_string(content)


def test_it_holds_every_operator(model: tuple[Path, dict[str, Any]]) -> None:
    found = {node.op_type for node in graphopt.load(model[0]).graph}
    assert found == set(operators())


def test_with_the_library_and_without_it(model: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    if library_path() is None:
        pytest.skip("the library with the kernels isn't built")
    path, feeds = model
    with_library = graphopt.session(path).run(None, feeds)
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    without = graphopt.session(path).run(None, feeds)
    for have, want in zip(with_library, without, strict=True):
        same(have, want, "the kernels beside the bodies")


@pytest.mark.parametrize("version", ["1.17.3", "installed"])
def test_packaged(version: str, model: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, feeds = model
    environment = installed(tmp_path / "site") if version == "installed" else fetched(version, "<2")
    served = package(path, tmp_path / "served")
    assert served.library == (None if (library := library_path()) is None else library.name)
    np.savez(tmp_path / "in.npz", **feeds)
    run_in(environment, "-c", SERVED, tmp_path / "in.npz", tmp_path / "out.npz", cwd=served.folder)
    wanted = graphopt.session(path).run(None, feeds)
    for have, want in zip(np.load(tmp_path / "out.npz").values(), wanted, strict=True):
        same(have, want, version)
