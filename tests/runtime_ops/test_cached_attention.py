"""CachedAttention: body, kernel, and ONNX Runtime's GroupQueryAttention on the same inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime_ops import library_path
from tests.runtime_ops.operator_cases import ISAS, judge, limited, node_model, run_node

Array = np.ndarray
NAME = "CachedAttention"
EMPTY_TABLE = (0, 0)


@dataclasses.dataclass
class Case:
    """One node's inputs and attributes."""

    inputs: list[Array]
    attributes: dict[str, Any]

    @property
    def new(self) -> int:
        return self.inputs[0].shape[1]


def case(
    lengths: list[int],
    new: int,
    *,
    heads: int = 6,
    kv_heads: int = 2,
    depth: int = 16,
    capacity: int | None = None,
    packed: bool = True,
    turned: int = 0,
    dtype: Any = np.float32,
    **attributes: Any,
) -> Case:
    """A case whose rows have `lengths` tokens with the `new` ones.

    Args:
        lengths: Tokens of each row.
        new: New ones, the same for all rows; a first run has rows padded at the end.
        heads: Query heads.
        kv_heads: Heads of keys and values.
        depth: Of a head.
        capacity: Rows of the past; None: as many as the longest row has before the new tokens.
        packed: Whether queries, keys and values stand side by side.
        turned: Features that are rotated.
        dtype: Of the numbers.
        attributes: The node's.
    """
    rng = np.random.default_rng([*lengths, new, heads, depth])
    batch, total = len(lengths), max([*lengths, new])
    rows = total - new if capacity is None else capacity
    tokens = [rng.standard_normal((batch, new, n * depth)).astype(dtype) for n in (heads, kv_heads, kv_heads)]
    if packed:
        tokens = [np.concatenate(tokens, axis=2), np.zeros(0, dtype), np.zeros(0, dtype)]
    past = [rng.standard_normal((batch, kv_heads, rows, depth)).astype(dtype) for _ in range(2)]
    angles = rng.uniform(-3, 3, (total, turned // 2)) if turned else np.zeros(EMPTY_TABLE)
    counts = [np.array(lengths, np.int32) - 1, np.array(total, np.int32)]
    tables = [np.cos(angles).astype(dtype), np.sin(angles).astype(dtype)]
    return Case([*tokens, *past, *counts, *tables], {"num_heads": heads, "kv_num_heads": kv_heads, **attributes})


def group_query_attention(c: Case) -> list[Array]:
    """What ONNX Runtime's operator gives for a case."""
    given_in = [array if array.size or index in (3, 4) else None for index, array in enumerate(c.inputs)]
    values = [
        None if a is None else ir.Value(
            name=f"i{n}", shape=ir.Shape(a.shape), type=ir.TensorType(ir.DataType.from_numpy(a.dtype))
        )
        for n, a in enumerate(given_in)
    ]  # fmt: skip
    attributes = {**c.attributes, "do_rotary": int(given_in[7] is not None)}
    made = [ir.AttrFloat32(k, v) if isinstance(v, float) else ir.AttrInt64(k, v) for k, v in attributes.items()]
    node = ir.Node("com.microsoft", "GroupQueryAttention", values, attributes=made, num_outputs=3)
    for index, output in enumerate(node.outputs):
        output.name, output.type = f"o{index}", ir.TensorType(ir.DataType.from_numpy(c.inputs[0].dtype))
    graph = ir.Graph(
        [v for v in values if v is not None], node.outputs, nodes=[node], name="g",
        opset_imports={"": 21, "com.microsoft": 1},
    )  # fmt: skip
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    found: list[Array] = session.run(None, {f"i{n}": a for n, a in enumerate(given_in) if a is not None})
    return found


def hold(c: Case, atol: float = 2e-6) -> list[Array]:
    """Body and kernel agree."""
    return judge(NAME, c.inputs, atol=atol, rtol=atol, **c.attributes)


def hold_against_ort(c: Case, atol: float = 4e-6) -> None:
    """Body, kernel and GroupQueryAttention agree, on what counts."""
    lengths, found, expected = c.inputs[5] + 1, hold(c, atol), group_query_attention(c)
    for row, length in enumerate(lengths):
        start = max(0, length - c.new)
        np.testing.assert_allclose(
            found[0][row, : length - start].astype(float), expected[0][row, : length - start].astype(float), atol=atol
        )
        for have, want in zip(found[1:], expected[1:], strict=True):
            assert have.shape == want.shape
            np.testing.assert_allclose(have[row, :, :length], want[row, :, :length], atol=atol)


CASES = {
    "first token": case([1], 1),
    "one token": case([40], 1, turned=16),
    "one token, long": case([1500], 1, turned=16),
    "one token, buffer": case([40], 1, capacity=64, turned=16),
    "rows of different lengths": case([40, 7, 1, 300], 1, turned=16, capacity=300),
    "separate": case([40, 33], 1, packed=False, turned=16, capacity=50),
    "one head": case([70], 1, heads=1, kv_heads=1, depth=64),
    "five heads on one": case([70], 1, heads=5, kv_heads=1, depth=40),
    "seven heads each": case([33], 1, heads=14, kv_heads=2, depth=8),
    "half of the features": case([20], 1, depth=64, turned=32),
    "interleaved": case([20], 1, depth=32, turned=32, rotary_interleaved=1),
    "window": case([500], 1, local_window_size=37),
    "longer window": case([20], 1, local_window_size=37),
    "cap": case([200], 1, softcap=3.0),
    "scale": case([200], 1, scale=0.7),
    "prompt": case([100], 100, turned=16),
    "prompt into a buffer": case([100], 100, capacity=128, turned=16),
    "prompts of different lengths": case([100, 64, 1], 100, turned=16, packed=False),
    "long prompt": case([333], 333, heads=3, kv_heads=3, depth=64, turned=64),
    "prompt, five on one": case([130], 130, heads=5, kv_heads=1, depth=24),
    "prompt, window": case([300], 300, local_window_size=70),
    "prompt, short window": case([300], 300, local_window_size=1),
    "prompt, cap": case([150], 150, softcap=2.0),
    "prompt, interleaved": case([67], 67, depth=64, turned=32, rotary_interleaved=1),
    "chunk": case([90], 30, turned=16),
    "two tokens": case([130], 2, capacity=200, turned=16),
    "chunk, window": case([290], 100, local_window_size=50, turned=16),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_group_query_attention(name: str) -> None:
    hold_against_ort(CASES[name])


@pytest.mark.parametrize("name", ["one token, buffer", "rows of different lengths", "prompt", "chunk", "interleaved"])
def test_half_precision(name: str) -> None:
    single = CASES[name]
    inputs = [a.astype(np.float16) if a.dtype == np.float32 else a for a in single.inputs]
    hold_against_ort(Case(inputs, single.attributes), atol=4e-3)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("depth", [20, 64, 104])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_every_set_of_instructions(isa: str, depth: int, dtype: type) -> None:
    atol = 4e-6 if dtype == np.float32 else 4e-3
    with limited(isa):
        for group in (1, 2, 7):
            hold(case([75, 4], 1, heads=group, kv_heads=1, depth=depth, turned=depth // 4 * 2, dtype=dtype), atol)
        hold(case([75, 40], 50, heads=3, kv_heads=1, depth=depth, turned=depth // 4 * 2, dtype=dtype), atol)


def test_new_tokens_after_pasts_of_different_lengths() -> None:
    """What GroupQueryAttention refuses: each row is as it is alone."""
    c = case([40, 25, 90], 7, turned=16)
    together = hold(c)
    for row, length in enumerate((40, 25, 90)):
        tokens = [c.inputs[0][row : row + 1], *c.inputs[1:3]]
        past = [array[row : row + 1, :, : length - 7] for array in c.inputs[3:5]]
        counts = [np.array([length - 1], np.int32), np.array(length, np.int32)]
        alone = Case([*tokens, *past, *counts, *c.inputs[7:]], c.attributes)
        expected = group_query_attention(alone)
        np.testing.assert_allclose(together[0][row], expected[0][0], atol=4e-6)
        np.testing.assert_allclose(together[1][row, :, :length], expected[1][0], atol=4e-6)


def test_rows_that_no_token_has_filled() -> None:
    """They are kept, may be no numbers, and are zeros where the past has none."""
    c = case([9, 20], 1, capacity=32, turned=16)
    for array in c.inputs[3:5]:
        array[0, :, 9:], array[1, :, 20:] = np.nan, np.nan
    y, key, _ = hold(c)
    assert np.isfinite(y).all()
    assert np.isnan(key[0, :, 9:]).all()
    grown = case([9, 20], 1)
    assert not hold(grown)[1][0, :, 19:].any()


@pytest.mark.parametrize("new", [1, 70])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_what_is_no_number(new: int, number: float) -> None:
    c = case([100], new, packed=False)
    c.inputs[0][0, -1, 3] = number
    hold(c)
    c = case([100], new, packed=False)
    c.inputs[1][0, -1, 3] = number
    hold(c)


def test_sizes_of_nothing() -> None:
    hold(case([], 1))
    hold(case([5], 0, packed=False, capacity=8))
    hold(case([5, 5], 5, heads=2, depth=1))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("new", "name"), [(1, "one token"), (40, "a chunk")])
def test_a_buffer_that_past_and_present_share(threads: int, new: int, name: str) -> None:
    del name
    c = case([400, 300], new, heads=4, depth=64, capacity=512, turned=32)
    expected = run_node(NAME, c.inputs, kernel=False, **c.attributes)
    for kernel in (True, False):
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        if kernel:
            options.register_custom_ops_library(str(library_path()))
        session = ort.InferenceSession(
            node_model(NAME, c.inputs, c.attributes), options, providers=["CPUExecutionProvider"]
        )
        binding, kept = session.io_binding(), []
        for index, array in enumerate(c.inputs):
            kept.append(ort.OrtValue.ortvalue_from_numpy(array.copy()))
            binding.bind_ortvalue_input(f"input{index}", kept[-1])
        binding.bind_output("output0")
        binding.bind_ortvalue_output("output1", kept[3])
        binding.bind_ortvalue_output("output2", kept[4])
        session.run_with_iobinding(binding)
        found = [binding.get_outputs()[0].numpy(), kept[3].numpy(), kept[4].numpy()]
        for have, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(have, want, atol=4e-6)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    cut=st.integers(0, 40),
    window=st.sampled_from([-1, 1, 5, 64]),
)
def test_tokens_one_by_one_are_tokens_at_once(lengths: list[int], cut: int, window: int) -> None:
    """A run of some tokens and then of the last one ends as the run of all of them does."""
    new = max(1, min(lengths) - cut)
    whole = case(lengths, new, turned=16, capacity=100, local_window_size=window, depth=16, packed=False)
    expected = run_node(NAME, whole.inputs, **whole.attributes)
    if new == 1:
        return
    parts = [[a[:, : new - 1] for a in whole.inputs[:3]], [a[:, new - 1 :] for a in whole.inputs[:3]]]
    past, made = whole.inputs[3:5], []
    for part, short in zip(parts, (1, 0), strict=True):
        counts = [whole.inputs[5] - short, whole.inputs[6]]
        y, *past = run_node(NAME, [*part, *past, *counts, *whole.inputs[7:]], **whole.attributes)
        made.append(y)
    np.testing.assert_allclose(np.concatenate(made, axis=1), expected[0], atol=4e-6)
    for have, want in zip(past, expected[1:], strict=True):
        np.testing.assert_allclose(have, want, atol=4e-6)


def with_input(c: Case, index: int, array: Array) -> Case:
    return Case([array if i == index else a for i, a in enumerate(c.inputs)], c.attributes)


ONE = case([20, 9], 1, capacity=32, turned=16)


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (with_input(ONE, 5, np.array([33, 3], np.int32)), "row 0 has 33 tokens before 1 new ones"),
        (with_input(ONE, 5, np.array([2**31 - 1, 3], np.int32)), "row 0 has 2147483647 tokens"),
        (with_input(ONE, 5, np.array([3, -1], np.int32)), "seqlens_k of row 1 is -1"),
        (with_input(ONE, 5, np.array([3], np.int32)), r"seqlens_k is \[1\]"),
        (with_input(ONE, 6, np.array(34, np.int32)), "total_sequence_length is 34"),
        (with_input(ONE, 6, np.array(-1, np.int32)), "total_sequence_length is -1"),
        (with_input(ONE, 5, np.array([25, 3], np.int32)), "the tables have 20 rows, and row 0 has 26 tokens"),
        (with_input(ONE, 7, np.zeros((20, 9), np.float32)), "the tables are"),
        (with_input(ONE, 7, np.zeros((19, 8), np.float32)), "the tables are"),
        (with_input(ONE, 0, np.zeros((2, 1, 150), np.float32)), "query, key and value are"),
        (with_input(ONE, 0, np.zeros((3, 1, 160), np.float32)), "the query is"),
        (with_input(ONE, 1, np.zeros((2, 1, 32), np.float32)), "query, key and value are"),
        (with_input(ONE, 4, np.zeros((2, 2, 31, 16), np.float32)), "the past must be"),
        (Case(ONE.inputs, {"num_heads": 5, "kv_num_heads": 2}), "num_heads is 5"),
        (Case(ONE.inputs, {"num_heads": 6, "kv_num_heads": 0}), "num_heads is 6"),
        (Case(ONE.inputs, {"num_heads": 6, "kv_num_heads": 3}), "there are 3 heads of keys"),
    ],
)
def test_what_is_wrong_names_the_node(broken: Case, says: str) -> None:
    with pytest.raises(Exception, match=f"{NAME} 'the_node': .*{says}"):
        run_node(NAME, broken.inputs, **broken.attributes)
