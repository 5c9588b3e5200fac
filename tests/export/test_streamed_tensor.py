"""The cast of weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from graphopt.errors import ModelError
from graphopt.export import streamed_tensor
from graphopt.export.streamed_tensor import blocks_of, cast, cast_tensor
from graphopt.graph.computed import identity
from graphopt.graph.load import MappedTensor
from graphopt.graph.save import save
from graphopt.graph.streamed import transposed

FLOATS = {
    "float64": ir.DataType.DOUBLE,
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}


class Given:
    """Weights from arrays; `tied` is the same tensor as `a`."""

    def __init__(self, **tensors: npt.NDArray[np.generic]) -> None:
        self.held: dict[str, ir.TensorProtocol] = {n: ir.Tensor(a, name=n) for n, a in tensors.items()}
        self.held["tied"] = self.held["a"]

    def names(self) -> Collection[str]:
        return self.held.keys()

    def tensor(self, name: str) -> ir.TensorProtocol:
        return self.held[name]


@given(
    source=st.sampled_from(sorted(FLOATS)),
    target=st.sampled_from(sorted(FLOATS)),
    values=arrays.arrays(
        np.float32, arrays.array_shapes(min_dims=0, max_dims=3), elements=st.floats(-6e4, 6e4, width=32)
    ),
    block=st.integers(1, 7),
)
def test_a_cast_rounds_to_the_nearest(source: str, target: str, values: npt.NDArray[np.float32], block: int) -> None:
    array = values.astype(FLOATS[source].numpy())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_tensor, "BLOCK_ELEMENTS", block)
        tensor = cast_tensor(ir.Tensor(array), FLOATS[target])
        result = tensor.numpy()
        assert tensor.dtype == FLOATS[target]
        assert result.shape == array.shape
        assert np.array_equal(result, array.astype(FLOATS[target].numpy()))
        assert all(piece.size <= block for piece in blocks_of(tensor))


def test_half_way_goes_to_the_even_one() -> None:
    steps = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-11 + 2**-20], np.float32)
    assert cast_tensor(ir.Tensor(steps), ir.DataType.FLOAT16).numpy().tolist() == [1, 1 + 2**-9, 1 + 2**-10]


def test_only_floating_point_is_cast_and_ties_stay() -> None:
    weights = cast(Given(a=np.ones(3, np.float32), n=np.arange(3), b=np.array([True])), "float16")
    assert weights.tensor("a").dtype == ir.DataType.FLOAT16
    assert weights.tensor("a") is weights.tensor("tied")
    assert weights.tensor("n").dtype == ir.DataType.INT64
    assert weights.tensor("b").dtype == ir.DataType.BOOL
    assert set(weights.names()) == {"a", "n", "b", "tied"}


def test_nothing_to_cast_is_the_tensor_itself() -> None:
    weights = Given(a=np.ones(3, np.float16))
    assert cast(weights, "float16").tensor("a") is weights.tensor("a")


def test_eight_bits_are_widened_exactly() -> None:
    every = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    result = cast_tensor(ir.Tensor(every), ir.DataType.FLOAT16).numpy()
    assert np.array_equal(result, every.astype(np.float16), equal_nan=True)


@pytest.mark.parametrize("source", [np.float32, np.float64, ml_dtypes.bfloat16])
def test_numbers_too_large_are_refused_by_name(source: type) -> None:
    fits = cast(Given(a=np.array([65504, -65504, 65519], np.float32).astype(source)), "bfloat16")
    assert np.isfinite(fits.tensor("a").numpy().astype(np.float32)).all()
    weights = cast(Given(a=np.array([1, 2, -70000, np.inf], np.float32).astype(source)), "float16")
    with pytest.raises(
        ModelError, match=r"the weight a has the value 7\d+, and float16 ends at 65504; export it in float32"
    ):
        weights.tensor("a").numpy()


def test_what_was_infinite_or_no_number_stays_so() -> None:
    odd = np.array([np.inf, -np.inf, np.nan, 1], np.float32)
    for target in FLOATS:
        found = cast(Given(a=odd), target).tensor("a").numpy().astype(np.float32)
        assert np.array_equal(found, odd, equal_nan=True)


@pytest.mark.parametrize("external", [True, False])
def test_a_refusal_while_saving_leaves_nothing(tmp_path: Path, external: bool) -> None:
    weights = cast(Given(a=np.full(5000, 1, np.float32), b=np.full(5000, 1e5, np.float32)), "float16")
    values = [ir.Value(name=name, const_value=weights.tensor(name)) for name in ("a", "b")]
    node = ir.node("Add", values)
    model = ir.Model(
        ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 21}), ir_version=10
    )
    with pytest.raises(ModelError, match="the weight b has the value 100000, and float16 ends at 65504"):
        save(model, tmp_path / "new" / "m.onnx", external_data=external)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_cast_of_a_transposed_weight_takes_no_memory_for_it(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    (tmp_path / "f").write_bytes(array.tobytes())
    stored = MappedTensor("f", 0, 48, ir.DataType.FLOAT, shape=ir.Shape((3, 4)), name="x", base_dir=tmp_path)
    tensor = transposed(cast_tensor(stored, ir.DataType.FLOAT16), (1, 0))
    assert tensor.dtype == ir.DataType.FLOAT16
    assert np.array_equal(tensor.numpy(), array.T)
    # The same cast of the same place is known to be the same.
    again = cast_tensor(stored, ir.DataType.FLOAT16)
    assert identity(again) == identity(cast_tensor(stored, ir.DataType.FLOAT16))
    assert identity(again) != identity(cast_tensor(stored, ir.DataType.DOUBLE))
