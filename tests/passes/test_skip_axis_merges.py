from __future__ import annotations

import math
from pathlib import Path

import pytest
from exactness import assert_exact, op_types, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.analysis.dims import Dim
from graphopt.graph.edits import nodes
from graphopt.graph.load import load
from graphopt.passes.clean.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.clean.skip_axis_merges import SkipAxisMerges, merged_axes
from graphopt.verification.equivalence import verify

HEAD = '<ir_version: 10, opset_import: ["": 21]>'


def test_batch_and_heads_of_any_size() -> None:
    """As torch.export writes the transposed keys of an attention."""
    before = parse(f"""{HEAD} g (float[b, 3, t, 4] x) => (float[i, 3, 4, j] y)
        <int64[1] any = {{-1}}, int64[1] heads = {{3}}, int64[1] head = {{4}}> {{
        length = Shape <start = 2, end = 3> (x) batch = Shape <start = 0, end = 1> (x)
        s = Concat <axis = 0> (any, length, head) merged = Reshape(x, s)
        moved = Transpose <perm = [0, 2, 1]> (merged)
        u = Concat <axis = 0> (batch, heads, head, length) y = Reshape(moved, u) }}""")
    after = assert_exact(before, SkipAxisMerges(), dims={"b": 2, "t": 5})
    EliminateDeadCode()(after)
    assert op_types(after) == ["Transpose"]
    assert list(next(iter(after.graph)).attributes["perm"].as_ints()) == [0, 1, 3, 2]


@pytest.mark.parametrize(
    ("merged", "perm", "split", "axes"),
    [
        ([6, 4, 5], [1, 0, 2], [4, 2, 3, 5], [2, 0, 1, 3]),
        ([2, 60], [1, 0], [3, 4, 5, 2], [1, 2, 3, 0]),
        ([2, 3, 20], [2, 1, 0], [4, 5, 3, 2], [2, 3, 1, 0]),
        ([2, 3, 4, 5], [3, 0, 1, 2], [5, 2, 3, 4], [3, 0, 1, 2]),
        ([6, 4, 5], [1, 0, 2], [4, 3, 2, 5], None),  # split in another way
        ([8, 15], [1, 0], [3, 5, 4, 2], None),  # no merge
        ([6, 4, 5], [1, 0, 2], [4, 6, 5], None),  # not split
    ],
)
def test_groups(merged: list[int], perm: list[int], split: list[int], axes: list[int] | None) -> None:
    def numbers(values: list[int]) -> str:
        return f"int64[{len(values)}] {{}} = {{{{{', '.join(map(str, values))}}}}}"

    sizes = ", ".join(map(str, split))
    before = parse(f"""{HEAD} g (float[2, 3, 4, 5] x) => (float[{sizes}] y)
        <{numbers(merged).format("m")}, {numbers(split).format("s")}> {{
        a = Reshape(x, m) b = Transpose <perm = {perm}> (a) y = Reshape(b, s) }}""")
    after = assert_exact(before, SkipAxisMerges())
    if axes is None:
        assert op_types(after) == ["Reshape", "Transpose", "Reshape"]
    else:
        assert op_types(after) == ["Transpose"]
        assert list(next(iter(after.graph)).attributes["perm"].as_ints()) == axes


def test_sizes_that_may_differ() -> None:
    """Two inputs that declare one name for a size don't have to have the same."""
    before = parse(f"""{HEAD} g (float[b, 3, t, 4] x, float[b, 2] other) => (float[i, 3, 4, j] y)
        <int64[3] s = {{-1, 5, 4}}, int64[1] heads = {{3}}, int64[2] tail = {{4, 5}}> {{
        batch = Shape <start = 0, end = 1> (other) merged = Reshape(x, s) moved = Transpose <perm = [0, 2, 1]> (merged)
        u = Concat <axis = 0> (batch, heads, tail) y = Reshape(moved, u) }}""")
    assert not SkipAxisMerges()(before).modified


def test_the_parts_stay_for_other_readers() -> None:
    before = parse(f"""{HEAD} g (float[2, 3, 4, 5] x) => (float[2, 3, 5, 4] y, float[6, 5, 4] z)
        <int64[3] m = {{6, 4, 5}}, int64[4] s = {{2, 3, 5, 4}}> {{
        a = Reshape(x, m) z = Transpose <perm = [0, 2, 1]> (a) y = Reshape(z, s) }}""")
    assert sorted(op_types(assert_exact(before, SkipAxisMerges()))) == ["Reshape", "Transpose", "Transpose"]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.data())
@settings(max_examples=100, deadline=None)
def test_merged_axes_are_those_whose_product_they_are(sizes: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, len(sizes) - 1)) if len(sizes) > 1 else st.just(set())))
    parts = [sizes[a:b] for a, b in zip([0, *cuts], [*cuts, len(sizes)], strict=True)]
    merged = [math.prod(part) for part in parts]
    groups = merged_axes(tuple(map(Dim.of, sizes)), tuple(map(Dim.of, merged)))
    if groups is not None:  # an axis of size 1 may stand on either side of a cut
        assert [axis for group in groups for axis in group] == list(range(len(sizes)))
        for group, size in zip(groups, merged, strict=True):
            assert math.prod(sizes[axis] for axis in group) == size


@pytest.mark.export
def test_as_torch_writes_it(tmp_path: Path) -> None:
    import torch

    class Net(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    inputs = tuple(torch.randn(2, 3, 6, 4) for _ in range(3))
    path = tmp_path / "m.onnx"
    shapes = tuple({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC} for _ in inputs)
    torch.onnx.export(
        Net().eval(), inputs, str(path), dynamo=True, dynamic_shapes=shapes, opset_version=18, optimize=False
    )
    model = load(path)
    before = [n.op_type for n in nodes(model)].count("Reshape")
    FoldConstants()(model)
    assert SkipAxisMerges()(model).modified
    assert verify(path, model, bitwise=True).ok
    assert [n.op_type for n in nodes(model)].count("Reshape") == before - 2
