"""The ONNX standard's backend tests as models and inputs: those of the installed onnx package, and folders of files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper


@dataclasses.dataclass(frozen=True)
class Case:
    """One backend test.

    Attributes:
        name: Folder and name of the test.
        model: The model; called once, so that a list of cases stays small.
        inputs: The inputs of each data set, in the order of the model's inputs: arrays, lists (sequences), None.
    """

    name: str
    model: Callable[[], onnx.ModelProto]
    inputs: Callable[[], list[list[Any]]]


def package_cases() -> list[Case]:
    """Every backend test of the installed onnx package, sorted by name."""
    import onnx.backend.test
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        generated = collect_testcases(None)
    cases = [
        Case(
            f"node/{c.name}",
            lambda c=c: c.model,  # type: ignore[misc]
            lambda c=c: [[_array(value) for value in inputs] for inputs, _ in c.data_sets],  # type: ignore[misc]
        )
        for c in generated
        if c.model is not None
    ]
    data = Path(onnx.backend.test.__file__).parent / "data"
    cases += folder_cases(data)
    cases += [_light_case(path) for path in sorted((data / "light").glob("*.onnx"))]
    return sorted(cases, key=lambda case: case.name)


def folder_cases(folder: Path) -> list[Case]:
    """Every test below a folder: `model.onnx` beside `test_data_set_*/input_*.pb`."""
    return [
        Case(
            str(path.parent.relative_to(folder)),
            lambda path=path: onnx.load(path),  # type: ignore[misc]
            lambda path=path: _read_inputs(path),  # type: ignore[misc]
        )
        for path in sorted(folder.rglob("model.onnx"))
    ]


def _read_inputs(path: Path) -> list[list[Any]]:
    model = onnx.load(path)
    sets = sorted(path.parent.glob("test_data_set_*"))
    result = []
    for folder in sets[:1] if len(sets) > 3 else sets:
        files = sorted(folder.glob("input_*.pb"), key=lambda f: int(f.stem.split("_")[1]))
        result.append([_value(f.read_bytes(), v.type) for f, v in zip(files, model.graph.input, strict=False)])
    return result


def _value(data: bytes, kind: onnx.TypeProto) -> Any:
    if kind.HasField("sequence_type"):
        return numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind.HasField("optional_type"):
        return numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return numpy_helper.to_array(onnx.TensorProto.FromString(data))


def _light_case(path: Path) -> Case:
    """A famous network whose weights are made by ConstantOfShape."""

    def inputs() -> list[list[Any]]:
        model = onnx.load(path)
        given = {t.name for t in model.graph.initializer}
        rng = np.random.default_rng(0)
        shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input if v.name not in given]
        return [[rng.random(shape, dtype=np.float32) for shape in shapes]]

    return Case(f"light/{path.stem}", lambda: onnx.load(path), inputs)


def _array(value: Any) -> Any:
    """Generated tests hold what numpy has no type for (bfloat16, float8, int4) as protobuf."""
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value
