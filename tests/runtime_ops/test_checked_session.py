"""Sessions that refuse inputs which a model isn't right for, whichever way it is run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from narrowing import INPUTS, decoder

import graphopt
from graphopt.errors import AssumptionError, ModelError
from graphopt.graph.assumptions import Reliance, note


def saved(folder: Path, *assumptions: str) -> Path:
    model = decoder()
    for name in assumptions:
        note(model, Reliance(name, INPUTS, "a test", "nobody"))
    graphopt.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def feeds(
    batch: int = 1, new: int = 3, past: int = 0, mask: Any = None, start: int | None = None
) -> dict[str, np.ndarray[Any, Any]]:
    return {
        "input_ids": np.ones((batch, new), np.int64),
        "attention_mask": np.ones((batch, past + new), np.int64) if mask is None else np.array(mask, np.int64),
        "position_ids": np.tile(np.arange(new) + (past if start is None else start), (batch, 1)),
        "past_key": np.ones((batch, 2, past, 4), np.float32),
    }


def on_host(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, onnxruntime.OrtValue]:
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}


LEFT = [[0, 1, 1]]
CASES = [
    ("no-padding", feeds(mask=[[1, 1, 0]]), "'attention_mask' holds zeros"),
    ("no-left-padding", feeds(mask=LEFT), "row 0 of 'attention_mask' has a 0 at 0 before a 1"),
    ("batch=1", feeds(batch=2), "the batch of 'input_ids' is 2"),
    ("no-batched-chunks", feeds(2, 3, 4), "3 tokens come for each of 2 rows"),
    ("counted-positions", feeds(2, 3, 4, start=0), "row 0 of 'position_ids' has 0 where 4 is the count"),
    ("max-length=5", feeds(1, 2, 4), "past and new tokens together are 6"),
]
RIGHT = {
    "no-left-padding": feeds(mask=[[1, 1, 0]]),
    "no-batched-chunks": feeds(2, 1, 4),
    "max-length=5": feeds(1, 2, 3),
}


@pytest.mark.parametrize(("assumption", "wrong", "told"), CASES)
def test_every_way_to_run(tmp_path: Path, assumption: str, wrong: dict[str, Any], told: str) -> None:
    session = graphopt.session(saved(tmp_path, assumption))
    plain = graphopt.session(saved(tmp_path, assumption), check=False)
    assert isinstance(session, onnxruntime.InferenceSession)
    assert type(plain) is onnxruntime.InferenceSession

    def bound(arrays: dict[str, Any], how: str) -> onnxruntime.IOBinding:
        binding = session.io_binding()
        for name, array in arrays.items():
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            if how == "array":
                binding.bind_cpu_input(name, array)
            else:
                binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits")
        return binding

    def run_async(arrays: dict[str, Any]) -> None:
        session.run_async(None, arrays, lambda *_: None, None)

    for call in (
        lambda: session.run(None, wrong),
        lambda: session.run(["logits"], {name: array.tolist() for name, array in wrong.items()}),
        lambda: run_async(wrong),
        lambda: session.run_with_ort_values(None, on_host(wrong)),
        lambda: session.run_with_iobinding(bound(wrong, "array")),
        lambda: session.run_with_iobinding(bound(wrong, "value")),
    ):
        with pytest.raises(AssumptionError, match=told) as caught:
            call()
        assert assumption in str(caught.value)
    right = RIGHT.get(assumption, feeds())
    expected = plain.run(["logits"], right)[0]
    np.testing.assert_array_equal(session.run(["logits"], right)[0], expected)
    np.testing.assert_array_equal(session.run_with_ort_values(["logits"], on_host(right))[0].numpy(), expected)
    for how in ("array", "value"):
        binding = bound(right, how)
        session.run_with_iobinding(binding)
        np.testing.assert_array_equal(binding.copy_outputs_to_cpu()[0], expected)
    plain.run(None, wrong)


def test_of_inputs_bound_by_a_pointer_the_shape_is_seen(tmp_path: Path) -> None:
    session = graphopt.session(saved(tmp_path, "batch=1", "no-left-padding"))
    binding = session.io_binding()
    assert isinstance(binding, onnxruntime.IOBinding)
    arrays = feeds(mask=LEFT)
    for name, array in arrays.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)  # what the mask holds isn't looked at
    two = feeds(batch=2)
    for name, array in two.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    with pytest.raises(AssumptionError, match="the batch of 'input_ids' is 2"):
        session.run_with_iobinding(binding)
    binding.clear_binding_inputs()
    for name, array in arrays.items():
        binding.bind_input(name, "cpu", 0, array.dtype, shape=array.shape, buffer_ptr=array.ctypes.data)
    session.run_with_iobinding(binding)


def test_a_binding_made_otherwise_is_run_unseen(tmp_path: Path) -> None:
    session = graphopt.session(saved(tmp_path, "batch=1"))
    binding = onnxruntime.IOBinding(session)
    for name, array in feeds(batch=2).items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    assert binding.copy_outputs_to_cpu()[0].shape == (2, 3, 9)


def test_what_a_bound_array_holds_at_the_time_of_the_run_counts(tmp_path: Path) -> None:
    session = graphopt.session(saved(tmp_path, "no-padding"))
    arrays = feeds()
    binding = session.io_binding()
    for name, array in arrays.items():
        binding.bind_cpu_input(name, array)
    binding.bind_output("logits")
    session.run_with_iobinding(binding)
    arrays["attention_mask"][0, 0] = 0
    with pytest.raises(AssumptionError):
        session.run_with_iobinding(binding)


def test_a_model_without_assumptions_gets_a_plain_session(tmp_path: Path) -> None:
    assert type(graphopt.session(saved(tmp_path))) is onnxruntime.InferenceSession


def test_an_input_that_another_tool_renamed_is_told_of(tmp_path: Path) -> None:
    path = saved(tmp_path, "batch=1")
    model = graphopt.load(path)
    model.graph.inputs[0].name = "renamed_ids"
    graphopt.save(model, tmp_path / "renamed.onnx")
    with pytest.raises(ModelError, match=r"'input_ids'.*check=False"):
        graphopt.session(tmp_path / "renamed.onnx")
    graphopt.session(tmp_path / "renamed.onnx", check=False)
