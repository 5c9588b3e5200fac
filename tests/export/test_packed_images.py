"""Facts of packed patches as transformers' own loops give them; attention within stretches; what traces can hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
vision_utils = pytest.importorskip("transformers.vision_utils")

from graphopt.export.packed_images import _attention, patch_facts  # noqa: E402
from graphopt.export.traceable import Reached, traceable  # noqa: E402

blocks = st.integers(1, 6)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(blocks, blocks), min_size=1, max_size=4), st.sampled_from([1, 2, 3]), st.integers(1, 4))
def test_facts_are_those_of_transformers(sides: list[tuple[int, int]], merge: int, window: int) -> None:
    grid = torch.tensor([[1, rows * merge, columns * merge] for rows, columns in sides])
    facts = patch_facts(grid, int(grid.prod(-1).sum()), merge, window)
    assert torch.equal(facts["position_ids"], vision_utils.get_vision_position_ids(grid, merge))
    assert torch.equal(facts["cu_seqlens"], vision_utils.get_vision_cu_seqlens(grid))
    index, begins = vision_utils.get_vision_window_index(grid, merge, window * merge * 5, 5)
    assert torch.equal(facts["window_index"], index)
    # Repeated where theirs isn't, and never falling.
    assert torch.equal(torch.unique_consecutive(facts["cu_window_seqlens"]), begins)


def test_without_windows_there_are_no_facts_of_them() -> None:
    assert set(patch_facts(torch.tensor([[1, 2, 2]]), 4, 2)) == {"position_ids", "cu_seqlens", "max_seqlen"}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(0, 99))
def test_attention_within_stretches(lengths: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    total = sum(lengths)
    q, k, v = (torch.from_numpy(rng.normal(size=(1, 2, total, 4))) for _ in range(3))
    begins = np.cumsum([0, *lengths])
    repeated = torch.from_numpy(np.sort(np.concatenate([begins, begins[:-1], begins[:-1]])))
    found, _ = _attention(None, q, k, v, scaling=0.3, cu_seq_lens_q=repeated)
    for start, end in itertools.pairwise(begins):
        part = slice(start, end)
        weights = torch.softmax(q[:, :, part] @ k[:, :, part].transpose(2, 3) * 0.3, -1)
        torch.testing.assert_close(found[:, part], (weights @ v[:, :, part]).transpose(1, 2))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-2, 2, width=32), max_size=6),
    st.lists(st.floats(-2, 2, width=32), max_size=5).map(sorted),
    st.booleans(),
)
def test_bucketize(numbers: list[float], boundaries: list[float], right: bool) -> None:
    given = (torch.tensor(numbers), torch.tensor(boundaries))
    expected = torch.bucketize(*given, right=right)
    with traceable():
        found = torch.bucketize(*given, right=right)
    assert torch.equal(found, expected)


def test_masks_select_all_and_say_so() -> None:
    x = torch.arange(6).reshape(3, 2)
    with traceable() as context:
        assert x[0].tolist() == [0, 1]
        assert not context.selected
        kept = x[x[:, 0] > 0]
        assert context.selected
    assert torch.equal(kept, x)


def test_conv3d_without_a_bias() -> None:
    layer = torch.nn.Conv3d(2, 3, 2, stride=2, bias=False)
    x = torch.randn(1, 2, 4, 4, 4)
    with torch.no_grad():
        expected = layer(x)
        with traceable():
            torch.testing.assert_close(layer(x), expected)


def test_a_result_ends_what_follows() -> None:
    x = torch.ones(2)
    with traceable() as context:
        context.result = x
        with pytest.raises(Reached) as reached:
            list(x)
    assert reached.value.result is x
