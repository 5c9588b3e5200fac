"""One and the same library in the oldest supported onnxruntime, the oldest that graphopt itself runs on, and today's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.library import kernels
from tests.runtime_ops.operator_cases import node_model, run_node
from tests.runtime_ops.operator_examples import EXAMPLES
from tests.runtime_ops.runtimes import fetched, installed, run_in

HERE = Path(__file__).parent
OPSET = 20
"""The newest that the oldest onnxruntime takes."""
DTYPES = (np.float32, np.float16)


def nodes() -> dict[str, tuple[str, list[Any], dict[str, Any]]]:
    """Operator, inputs and attributes of each node that is tried, by a name for it."""
    return {
        f"{name}-{np.dtype(dtype)}-{number}": (name, *example)
        for name in operators()
        for dtype in DTYPES
        for number, example in enumerate(EXAMPLES[name](dtype))
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its inputs for each of the nodes."""
    folder = tmp_path_factory.mktemp("models")
    for stem, (name, inputs, attributes) in nodes().items():
        place = folder / f"{stem}.onnx"
        place.write_bytes(node_model(name, inputs, attributes, OPSET))
        feeds = {f"input{i}": np.asarray(array) for i, array in enumerate(inputs) if array is not None}
        np.savez(place.with_suffix(".npz"), **feeds)
    return folder


def test_every_operator_has_an_example() -> None:
    assert sorted(operators().keys() - EXAMPLES.keys()) == [], "add one to tests/runtime_ops/operator_examples.py"


@pytest.mark.parametrize("version", ["1.17.3", "1.22.1", "installed"])
def test_the_library_and_the_bodies_in(version: str, folder: Path, tmp_path: Path) -> None:
    library = library_path()
    if library is None:
        pytest.skip("the library with the kernels isn't built")
    if version == "installed":
        environment = installed(tmp_path / "site")
    else:
        environment = fetched(version, "<2" if version < "1.19" else ">=2")
    told, *ran = run_in(environment, HERE / "run_models.py", folder, library).splitlines()
    assert told == (onnxruntime.__version__ if version == "installed" else version)
    assert [line for line in ran if "FAILED" in line] == []
    operators_of = {tuple(line.split()[:2]): line.split()[2:] for line in ran}
    known = {name for name, _, _ in kernels(library)}
    for stem, (name, inputs, attributes) in nodes().items():
        if name in known:
            assert operators_of[stem, "kernel"] == [name]
        assert name not in operators_of[stem, "body"]
        expected = run_node(name, inputs, kernel=False, opset=OPSET, **attributes)
        for way in ("kernel", "body"):
            file = np.load(folder / f"{stem}.{way}.npz")
            for want, have in zip(expected, file.values(), strict=True):
                same(have, want, f"{stem}, {way}")


def same(have: Any, want: Any, where: str) -> None:
    assert (have.dtype, have.shape) == (want.dtype, want.shape), where
    if want.dtype.kind == "f":
        scale = max(1.0, float(np.abs(want.astype(np.float64)).max(initial=0)))
        tolerance = (2e-5 if want.dtype == np.float32 else 4e-3) * scale
        np.testing.assert_allclose(have.astype(np.float64), want.astype(np.float64), atol=tolerance, err_msg=where)
    else:
        # A number that lies between two may be rounded to either where it was summed in another order.
        assert np.mean(have != want) <= 0.01, where
