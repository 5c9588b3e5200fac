"""CodebookMatMul: body, kernel and the product in NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.codebook_matmul.packing import pack_indices
from graphopt.runtime_ops.library import kernels
from tests.runtime_ops.codebook_cases import Case, quantized
from tests.runtime_ops.operator_cases import ISAS, judge, limited, node_model, run_node

NAME = "CodebookMatMul"

CASES = {
    "4 bits": Case(37, 576, 4, batch=(3,)),
    "3 bits": Case(37, 576, 3, batch=(2,)),
    "2 bits": Case(37, 576, 2, bias=True),
    "one row": Case(64, 256, 4),
    "many rows of x": Case(33, 300, 3, batch=(2, 53), bias=True),
    "rows shorter than a vector": Case(7, 19, 4, group_size=8),
    "a column": Case(3, 1, 2),
    "an output": Case(1, 1000, 3, group_size=1000),
    "groups of 24": Case(9, 200, 3, group_size=24, batch=(2,)),
    "groups of 5": Case(9, 101, 4, group_size=5),
    "one scale a row": Case(18, 130, 2, group_size=4096),
    "a codebook a row": Case(21, 140, 4, books=-1, group_size=40),
    "selected codebooks": Case(21, 640, 3, books=4, select=True, group_size=128),
    "selected codebooks in small groups": Case(6, 100, 4, books=3, select=True, group_size=16, batch=(4,)),
    "256 codebooks": Case(5, 512, 2, books=256, select=True, group_size=256),
    "8 bits": Case(11, 100, 8, batch=(2,)),
    "1 bit": Case(11, 77, 1),
    "5 bits": Case(11, 77, 5, group_size=7),
    "pairs": Case(9, 131, 8, (1, 2), group_size=64, batch=(4,)),
    "fours": Case(9, 131, 10, (1, 4), books=2, select=True, group_size=64),
    "eights": Case(9, 131, 12, (1, 8), group_size=200, batch=(2,)),
    "one row and pairs": Case(9, 131, 8, (1, 2), group_size=90, books=2, select=True, outliers=9),
    "one row and 8 bits": Case(9, 1300, 8, books=-1, group_size=200, bias=True),
    "one row and small groups": Case(9, 131, 4, books=2, select=True, group_size=20),
    "one row and fours": Case(9, 131, 10, (1, 4), books=2, select=True, group_size=64, outliers=9),
    "one row and eights": Case(9, 1300, 12, (1, 8), books=-1, group_size=200, bias=True),
    "one row and fours down the columns": Case(22, 131, 8, (4, 1), books=2, select=True, group_size=64),
    "one row and eights down the columns": Case(21, 131, 12, (8, 1), books=-1, group_size=20, outliers=9),
    "eights down the columns": Case(21, 131, 12, (8, 1), group_size=200, batch=(2,), bias=True),
    "tiles": Case(13, 50, 7, (2, 3), books=-1, group_size=9),
    "16 bits": Case(3, 40, 16, (1, 2)),
    "outliers": Case(40, 300, 4, outliers=90, bias=True),
    "outliers, more rows": Case(40, 700, 4, outliers=300, batch=(5,)),
    "outliers in tiles": Case(16, 100, 6, (4, 2), outliers=60, batch=(5,)),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", CASES)
def test_is_the_product(name: str, isa: str) -> None:
    case = CASES[name]
    with limited(isa):
        (y,) = judge(NAME, case.inputs(), atol=2e-5 * case.columns**0.5, **case.attributes)
    np.testing.assert_allclose(y, case.product(case.arrays()), atol=2e-5 * case.columns**0.5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("dtype", "scale_dtype"), [(np.float32, np.float16), (np.float16, np.float32), (np.float16, np.float16)]
)
@pytest.mark.parametrize("name", ["4 bits", "2 bits", "eights", "one row and fours down the columns"])
def test_types(name: str, isa: str, dtype: type, scale_dtype: type) -> None:
    case = dataclasses.replace(CASES[name], dtype=dtype, scale_dtype=scale_dtype)
    rtol = 1e-3 if dtype == np.float16 else 0.0
    with limited(isa):
        (y,) = judge(NAME, case.inputs(), atol=2e-5 * case.columns**0.5, rtol=rtol, **case.attributes)
    assert y.dtype == dtype


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "block"), [(1, 32), (3, 40), (6, 32), (1, 7)])
def test_rounded_activations(isa: str, bits: int, block: int, rows: int) -> None:
    case = Case(21, 330, bits, activation_block=block, batch=(rows,), group_size=64, outliers=30, bias=True)
    with limited(isa):
        (y,) = judge(NAME, case.inputs(), atol=1e-3, **case.attributes)
    np.testing.assert_allclose(y, case.product(case.arrays()), atol=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("books", ["one", "a row", "selected"])
@pytest.mark.parametrize("scale_dtype", [np.float32, np.float16])
def test_codebooks_of_one_byte_are_exact(bits: int, books: str, scale_dtype: type) -> None:
    case = Case(
        19, 300, bits, activation_block=32, group_size=128, scale_dtype=scale_dtype,
        books={"one": 1, "a row": -1, "selected": 5}[books], select=books == "selected",
    )  # fmt: skip
    for units in (1, 12, 127):
        arrays = case.arrays()
        shape = arrays["codebooks"].shape
        whole = np.random.default_rng(1).integers(-units, units + 1, shape).astype(np.float32)
        whole[:, 0] = units
        arrays["codebooks"] = whole * np.float32(0.37)
        inputs = [array for name, array in arrays.items() if name != "loose"]
        judge(NAME, inputs, atol=4e-6 * units * case.columns**0.5, **case.attributes)


def test_equal_and_zero_codebooks() -> None:
    for value in (0.0, 0.25, 1e-38, -3e31):
        case = Case(5, 100, 4, activation_block=32)
        arrays = case.arrays()
        arrays["codebooks"][:] = value
        arrays["scales"][:] = 1e-3
        inputs = [array for name, array in arrays.items() if name != "loose"]
        judge(NAME, inputs, atol=1e-6, rtol=1e-4, **case.attributes)


@pytest.mark.parametrize("block", [0, 32])
def test_sizes_of_nothing(block: int) -> None:
    for case in (
        Case(0, 64),
        Case(3, 64, batch=(0,)),
        Case(3, 64, batch=(2, 0)),
        Case(3, 0, bias=True),
        Case(3, 64, batch=()),
    ):
        sized = dataclasses.replace(case, activation_block=block)
        (y,) = judge(NAME, sized.inputs(), atol=1e-3, **sized.attributes)
        np.testing.assert_allclose(y, sized.product(sized.arrays()), atol=1e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("rows", [1, 5])
def test_what_is_no_number_stays_in_its_row(isa: str, block: int, rows: int) -> None:
    case = Case(9, 300, 4, activation_block=block, batch=(rows,))
    for value in (np.nan, np.inf, -np.inf):
        inputs = case.inputs()
        inputs[0][0, 137] = value
        with limited(isa):
            (y,) = judge(NAME, inputs, atol=1e-3, **case.attributes)
        assert not np.isfinite(y[0]).any()
        assert np.isfinite(y[1:]).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("name", ["3 bits", "a codebook a row", "outliers", "eights"])
def test_constant_weights_are_checked_once(name: str, block: int, threads: int) -> None:
    case = dataclasses.replace(CASES[name], activation_block=block)
    inputs = case.inputs()
    model = ir.from_proto(onnx.load_from_string(node_model(NAME, inputs, case.attributes)))
    graph = model.graph
    for index, value in reversed(list(enumerate(graph.inputs))[1:]):
        value.const_value = ir.Tensor(inputs[index], name=value.name)
        graph.inputs.pop(index)
        graph.initializers.add(value)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(3)
    arrays = case.arrays()
    for rows in (1, 9, 2, 0, 1):
        x = rng.standard_normal((rows, case.columns)).astype(np.float32)
        made = session.run(None, {"input0": x})[0]
        taken = quantized(x, block) if block else x
        expected = taken @ case.weights(arrays).T + (arrays["bias"] if case.bias else 0)
        np.testing.assert_allclose(made, expected, atol=1e-3)


def test_nf4_bitmod_and_easy_quant() -> None:
    rng = np.random.default_rng(5)
    weights = rng.standard_normal((24, 256)).astype(np.float32)
    x = rng.standard_normal((2, 256)).astype(np.float32)
    none = {"selectors": np.zeros(0, np.uint8), "outlier_rows": np.zeros(0, np.int32)}
    none |= {"outlier_columns": np.zeros(0, np.int32), "outlier_values": np.zeros(0, np.float32)}

    def run(indices: Any, codebooks: Any, scales: Any, group: int, **others: Any) -> Any:
        packed = pack_indices(indices, 4)
        given = {
            "x": x,
            "indices": packed,
            "codebooks": codebooks.astype(np.float32),
            "scales": scales,
            **none,
            **others,
        }
        return judge(
            NAME, [*given.values(), np.zeros(0, np.float32)], atol=1e-4, columns=256, bits=4, group_size=group
        )[0]

    # NF4: the quantiles of a normal distribution, scales of the groups' absolute maxima.
    nf4 = np.linspace(-1, 1, 16) ** 3
    grouped = weights.reshape(24, 4, 64)
    scales = np.abs(grouped).max(-1)
    indices = np.abs(grouped[..., None] / scales[..., None, None] - nf4).argmin(-1)
    expected = (nf4[indices] * scales[..., None]).reshape(24, 256)
    np.testing.assert_allclose(
        run(indices.reshape(24, 256), nf4.reshape(1, 16, 1, 1), scales, 64), x @ expected.T, atol=1e-4
    )

    # BitMoD: FP4 with one of four special values in the place of minus zero, chosen for each group of 128.
    base = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6])
    types = np.stack([np.append(base, special) for special in (-8, -5, 5, 8)])
    grouped = weights.reshape(24, 2, 128)
    scales = np.abs(grouped).max(-1).astype(np.float32) / 6
    errors = np.abs(grouped[..., None, :, None] / scales[..., None, None, None] - types[:, None])
    chosen = (errors.min(-1) ** 2).sum(-1).argmin(-1)
    indices = np.take_along_axis(errors.argmin(-1), chosen[..., None, None], 2)[:, :, 0]
    expected = (types[chosen[..., None], indices] * scales[..., None]).reshape(24, 256)
    found = run(indices.reshape(24, 256), types.reshape(4, 16, 1, 1), scales, 128, selectors=chosen.astype(np.uint8))
    np.testing.assert_allclose(found, x @ expected.T, atol=1e-4)

    # EasyQuant: a scale a row, and what lies beyond the range kept as it is.
    outlying = np.abs(weights) > 2.2
    scales = np.abs(np.where(outlying, 0, weights)).max(-1, keepdims=True).astype(np.float32) / 7
    integers = np.arange(-8, 8)
    indices = np.clip(np.round(weights / scales), -8, 7).astype(np.int64) + 8
    rows, columns = np.nonzero(outlying)
    others = {
        "outlier_rows": np.searchsorted(rows, np.arange(25)).astype(np.int32),
        "outlier_columns": columns.astype(np.int32),
        "outlier_values": (weights - integers[indices] * scales)[outlying].astype(np.float32),
    }
    expected = np.where(outlying, weights, integers[indices] * scales)
    found = run(indices, integers.reshape(1, 16, 1, 1), scales, 256, **others)
    np.testing.assert_allclose(found, x @ expected.T, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"indices": np.zeros((8, 19), np.uint8)}, r"the indices is \[8, 19\], and must be \[8, 20\]"),
        ({"indices": np.zeros((7, 20), np.uint8)}, r"must be \[8, 20\]"),
        ({"indices": np.zeros(160, np.uint8)}, r"must be \[8, 20\]"),
        ({"codebooks": np.zeros((1, 15, 1, 1), np.float32)}, "have 15 entries, and indices of 4 bits need 16"),
        ({"codebooks": np.zeros((1, 16), np.float32)}, r"codebooks is \[1, 16\], and must be \[codebooks"),
        ({"codebooks": np.zeros((0, 16, 1, 1), np.float32)}, r"is \[0, 16, 1, 1\]"),
        ({"codebooks": np.zeros((3, 16, 1, 1), np.float32)}, "one for each of 8 rows of tiles, not 3"),
        ({"codebooks": np.full((1, 16, 1, 1), np.inf, np.float32)}, "number 0 of the codebooks isn't finite"),
        ({"codebooks": np.zeros((1, 16, 1, 5), np.float32)}, "isn't a multiple of the tiles' 5 columns"),
        ({"scales": np.ones((8, 1), np.float32)}, r"the scales is \[8, 1\], and must be \[8, 2\]"),
        ({"scales": np.ones(16, np.float32)}, "must be .rows, groups."),
        ({"selectors": np.ones((8, 2), np.uint8)}, "selector 0 is 1, and there are 1 codebooks"),
        ({"selectors": np.zeros((8, 1), np.uint8)}, r"the selectors is \[8, 1\], and must be \[8, 2\]"),
        ({"outlier_values": np.ones(2, np.float32)}, r"the outlier columns is \[3\], and must be \[2\]"),
        ({"outlier_rows": np.zeros(8, np.int32)}, r"the outlier rows is \[8\], and must be \[9\]"),
        ({"outlier_rows": np.array([0, 1, 3, 2, 3, 3, 3, 3, 3], np.int32)}, "decrease after row 2"),
        ({"outlier_rows": np.array([0, 1, 9, 9, 9, 9, 9, 9, 3], np.int32)}, "decrease after row 7"),
        ({"outlier_rows": np.array([1, 1, 1, 2, 3, 3, 3, 3, 3], np.int32)}, "go from 1 to 3, and must go from 0 to 3"),
        ({"outlier_rows": np.array([0, -1, 1, 2, 3, 3, 3, 3, 4], np.int32)}, "go from 0 to 4"),
        ({"outlier_columns": np.array([0, 40, 1], np.int32)}, "outlier 1 is in column 40 of 40"),
        ({"outlier_columns": np.array([0, 1, -1], np.int32)}, "outlier 2 is in column -1"),
        ({"bias": np.ones(7, np.float32)}, r"the bias is \[7\], and must be \[8\]"),
        ({"x": np.float32(3)}, r"x is \[\], and the weights have 40 columns"),
        ({"x": np.zeros((3, 39), np.float32)}, r"x is \[3, 39\], and the weights have 40 columns"),
        ({"columns": -1}, "columns is -1"),
        ({"columns": 41}, r"the indices is|must be \[8, 21\]"),
        ({"bits": 0}, "bits is 0, and must be 1 to 16"),
        ({"bits": 17}, "bits is 17"),
        ({"group_size": 0}, "group_size is 0"),
        ({"activation_block": -1}, "activation_block is -1"),
    ],
)
@pytest.mark.parametrize("rows", [1, 4])
def test_what_is_wrong_names_the_node(changes: dict[str, Any], says: str, rows: int) -> None:
    case = Case(8, 40, 4, group_size=32, outliers=3, batch=(rows,))
    arrays = {name: array for name, array in case.arrays().items() if name != "loose"}
    arrays |= {name: value for name, value in changes.items() if name in arrays}
    attributes = case.attributes | {name: value for name, value in changes.items() if name not in arrays}
    with pytest.raises(Exception, match=f"{NAME} 'the_node': .*{says}"):
        run_node(NAME, list(arrays.values()), **attributes)


def test_the_library_has_kernels_for_all_types() -> None:
    path = library_path()
    assert path is not None
    types = {
        types[0::3][:2] for name, provider, types in kernels(path) if (name, provider) == (NAME, "CPUExecutionProvider")
    }
    assert types == {(x, scales) for x in (1, 10) for scales in (1, 10)}


def test_cost() -> None:
    case = Case(24, 64, 4, batch=(2,), group_size=32, outliers=10, bias=True)
    operator = operators()[NAME]
    cost = operator.cost([array.shape for array in case.inputs()], operator.attributes_of(**case.attributes))
    assert cost.flops == 2 * 2 * (24 * 64 + 10)
    assert cost.bytes == 24 * 32 + 4 * (16 + 24 * 2 + 25 + 10 + 10 + 24 + 2 * 64 + 2 * 24)
